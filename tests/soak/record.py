"""What a soak has seen, as it is written down and drawn. All times are seconds from its start."""

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Seconds. A packet sent so shortly before a fault may still be under way when it strikes.
UNDER_WAY = 0.005


@dataclass(slots=True)
class Event:
    """One fault, and what came of it."""

    number: int
    name: str
    on: str
    """Which host, member or key."""
    begun: float
    undone: float
    """When it was over: the member is back, the daemon started. ``begun`` for one without undo."""
    converged: float | None = None
    ended: float = 0.0
    """When the next one began."""
    pairs: list[list[str]] = field(default_factory=list)
    """The paths on which packets may be lost,"""
    until: float = 0.0
    """and until when."""
    lost: int = 0
    """Packets lost where that is allowed, until `ended`,"""
    lost_for: float = 0.0
    """the last of them so many seconds after ``undone`` (0 if before),"""
    lost_wrongly: int = 0
    """and those lost where it is not."""

    def allows(self, pair: tuple[str, str], at: float) -> bool:
        """Whether a packet between these hosts, sent at this time, may be lost."""
        return list(pair) in self.pairs and self.begun - UNDER_WAY <= at <= self.until


@dataclass(slots=True)
class Process:
    """A daemon (or a tunnel) from its start: resident KiB, descriptors, threads at each time."""

    name: str
    pid: int
    steady: bool
    """No fault ends it."""
    at: list[float] = field(default_factory=list)
    rss_kb: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """A whole soak."""

    seed: int
    minutes: float
    backend: str
    began: str
    """The wall clock's time, UTC."""
    version: str
    events: list[Event] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    lost: list[tuple[float, str, str]] = field(default_factory=list)
    """Time of sending, and the two hosts."""
    sent: int = 0
    leases: list[tuple[float, int | None]] = field(default_factory=list)
    """How many leases etcd had, None when it did not answer; one entry for each change."""
    members: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    """What state each etcd member went into: up, down, frozen, cut off."""
    hosts: list[tuple[str, float, float | None]] = field(default_factory=list)
    """Each host that took part, from when to when (None: the end)."""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def event_of(self, pair: tuple[str, str], at: float) -> Event:
        """Return the fault that a packet sent at this time and lost belongs to.

        The latest that had begun by then (before the first one, that); or the next, if the packet
        may have met it and is not allowed to have been lost by the former.
        """
        number = max(1, bisect_right(self.events, at, key=lambda event: event.begun))
        latest, *later = self.events[number - 1 : number + 1]
        if not latest.allows(pair, at) and any(event.allows(pair, at) for event in later):
            return later[0]
        return latest

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read what `write` wrote."""
        document: dict[str, Any] = json.loads(path.read_text())
        events = [Event(**event) for event in document.pop("events")]
        processes = [Process(**process) for process in document.pop("processes")]
        return cls(**document, events=events, processes=processes)
