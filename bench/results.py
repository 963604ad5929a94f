"""What was measured: every single value, and what is said of them."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Key:
    """What a series of values is about. ``peers`` is 0 where their number does not matter."""

    measure: str
    backend: str
    implementation: str
    peers: int = 0


@dataclass(slots=True)
class Series:
    """The values of one thing measured again and again, in ``unit``."""

    key: Key
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def percentile(self, percent: float) -> float:
        """The value that ``percent`` of all do not exceed."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "measure": self.key.measure,
            "backend": self.key.backend,
            "implementation": self.key.implementation,
            "peers": self.key.peers,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "p99": self.percentile(99),
            "values": self.values,
        }


class Results:
    """All series of one run, in the order in which they began; and what went wrong."""

    def __init__(self) -> None:
        self._series: dict[Key, Series] = {}
        self.problems: list[str] = []

    def add(self, key: Key, unit: str, *values: float) -> None:
        """Add values to a series."""
        self._series.setdefault(key, Series(key, unit)).values.extend(values)

    def find(
        self, measure: str, backend: str, implementation: str, peers: int = 0
    ) -> Series | None:
        """The series, None if nothing of it was measured."""
        return self._series.get(Key(measure, backend, implementation, peers))

    def __iter__(self) -> Iterator[Series]:
        return iter(self._series.values())

    def by_peers(self, measure: str, backend: str, implementation: str) -> list[Series]:
        """The series of a measure for each number of peers, ascending."""
        wanted = (measure, backend, implementation)
        found = [s for s in self if (s.key.measure, s.key.backend, s.key.implementation) == wanted]
        return sorted(found, key=lambda series: series.key.peers)
