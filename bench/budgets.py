"""What is promised of speed and size, and whether the run kept it.

The figures of the original are those of its v0.8.0 and v0.20.2 on two cores like those the budgets
were set on; on another machine the ratios within one run say more.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bench import events, start, traffic
from bench.results import Results
from bench.scene import OURS


@dataclass(frozen=True, slots=True)
class Verdict:
    """A budget, and what this run has to say about it."""

    what: str
    wanted: str
    found: str
    met: bool

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Budget:
    """The most a median of ours may be. ``peers`` as in `results.Key`."""

    what: str
    measure: str
    unit: str
    most: float
    peers: int = 0


_BUDGETS = (
    Budget("cold start to subnet.env", start.SUBNET_ENV, "s", 0.27),
    Budget("cold start to subnet.env, the aim", start.SUBNET_ENV, "s", 0.15),
    Budget("1,000 peers after exec", start.PROGRAMMED, "s", 0.1, 1_000),
    Budget("10,000 peers after exec", start.PROGRAMMED, "s", 0.8, 10_000),
    Budget("1,000 peers after subnet.env", start.PROGRAMMED_AFTER, "s", 0.1, 1_000),
    Budget("10,000 peers after subnet.env", start.PROGRAMMED_AFTER, "s", 0.8, 10_000),
    # 1.5 times the original's 2.2 to 3.6 ms.
    Budget("one lease, 1,000 peers", events.LATENCY, "ms", 5.4, 1_000),
    Budget("burst of 500, drained", events.drained(500), "s", 0.1, 1_000),
    Budget("burst of 500, lost", events.lost(500), "leases", 0, 1_000),
    Budget("burst of 5,000, lost", events.lost(5_000), "leases", 0, 1_000),
    Budget("memory, 1,000 peers", start.MEMORY, "MB", 42, 1_000),
    Budget("CPU at rest, 1,000 peers", start.IDLE_CPU, "%", 0.2, 1_000),
)


def check(results: Results) -> list[Verdict]:
    """Hold what was measured against the budgets; what was not measured is left out."""
    found = [
        Verdict(
            f"{budget.what}, {backend}",
            f"<= {budget.most:g} {budget.unit}",
            f"{series.median:.3g} {budget.unit}",
            series.median <= budget.most,
        )
        for budget in _BUDGETS
        for backend in start.BACKENDS
        if (series := results.find(budget.measure, backend, OURS, budget.peers)) is not None
    ]
    return [*found, *_traffic(results)]


def _traffic(results: Results) -> Iterator[Verdict]:
    for backend, least in (("host-gw", 0.97), ("vxlan", 0.97), ("udp", 10.0)):
        ratio = traffic.ratio(results, traffic.TCP, backend, OURS)
        if ratio is not None:
            limit = traffic.LIMITS[backend]
            yield Verdict(
                f"TCP, {backend}", f">= {least:g} x {limit}", f"{ratio:.2f} x", ratio >= least
            )
    udp = results.find(traffic.TCP, "udp", OURS)
    kernel = results.find(traffic.TCP, "vxlan", traffic.LIMITS["vxlan"])
    if udp and kernel:
        ratio = udp.median / kernel.median
        yield Verdict("TCP, udp", ">= 0.5 x kernel vxlan", f"{ratio:.2f} x", ratio >= 0.5)
