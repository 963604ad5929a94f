"""How fast the udp backend's tunnel is: ``python -m bench.udp_tunnel`` (root, gcc, about 6 min).

Every way of connecting two hosts gets a pair of its own, in one lab; then every load is put on one
pair after the other, round by round, so that a noisy machine is equally noisy for all. The table
shows medians over the rounds and, since only that is worth anything on another machine, the ratio
to the stand-in for the original's proxy: a loop in C with one packet per system call.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.pairs import KINDS, Ends, Pair, as_two_machines, build, make_pair
from bench.tcp import CONGESTION
from lab import Lab, needs
from lab.process import end

PORT = 5001


@dataclass(frozen=True)
class Load:
    """A load, and which pairs it is put on."""

    name: str
    unit: str
    pairs: tuple[str, ...]
    measure: Callable[["Bench", Pair], float]
    wanted: dict[str, float] = field(default_factory=dict)
    """Least ratio to the C loop (for round trips: greatest)."""


class Bench:
    """One run."""

    def __init__(
        self, lab: Lab, traffic: Path, seconds: float, congestion: str = CONGESTION
    ) -> None:
        self.lab = lab
        self.traffic = str(traffic)
        self.seconds = seconds
        self.congestion = congestion
        self.port = PORT
        self.processors: Sequence[int] = ()
        """The hosts'; empty if they share all."""

    def _command(self, side: int, *arguments: str) -> list[str]:
        """Return the command for the traffic generator on that side."""
        own = ["taskset", "--cpu-list", str(self.processors[side])] if self.processors else []
        return [*own, self.traffic, *arguments]

    def _sink(self, where: Ends, side: int, kind: str) -> tuple[subprocess.Popen[bytes], Path]:
        output = self.lab.scratch_file("sink")
        process = where.containers[side].popen(
            self._command(side, kind, str(self.port)), output=output
        )
        deadline = time.monotonic() + 5.0
        while "READY" not in output.read_text():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{kind} did not start")
            time.sleep(0.005)
        return process, output

    def flow(self, pair: Ends, kind: str, sides: Sequence[int], *arguments: str) -> float:
        """Return what arrives per second (bytes of TCP, packets of UDP), over all directions."""
        self.port += 1
        sinks = [self._sink(pair, 1 - side, f"{kind}-sink") for side in sides]
        sources = [
            pair.containers[side].popen(
                self._command(
                    side,
                    f"{kind}-source",
                    str(pair.containers[1 - side].address),
                    str(self.port),
                    *arguments,
                    str(self.seconds),
                ),
                output=self.lab.scratch_file("source"),
            )
            for side in sides
        ]
        for source in sources:
            source.wait(self.seconds + 20.0)
        end([process for process, _ in sinks], grace=0.5)
        total = sum(_rate(output, self.seconds) for _, output in sinks)
        for process in (*sources, *(process for process, _ in sinks)):
            self.lab.processes.remove(process)
        return total

    def round_trip(self, pair: Ends) -> float:
        """Return the median round trip of small UDP packets on an idle pair, in microseconds."""
        self.port += 1
        process, _ = self._sink(pair, 1, "udp-echo")
        target = str(pair.containers[1].address)
        done = pair.containers[0].run(self._command(0, "ping", target, str(self.port), "200"))
        end([process], grace=0.5)
        self.lab.processes.remove(process)
        return float(done.stdout)


def _rate(output: Path, seconds: float) -> float:
    """Return the total per second from a sink's lines, without the first and last moments."""
    points = [tuple(map(int, line.split())) for line in output.read_text().splitlines()[1:]]
    begun = next((time for time, total in points if total), 0)
    first, last = begun + 0.2 * seconds * 1e6, begun + 0.95 * seconds * 1e6
    inside = [point for point in points if first <= point[0] <= last]
    if len(inside) < 2:
        return 0.0
    (t0, n0), (t1, n1) = inside[0], inside[-1]
    return (n1 - n0) / ((t1 - t0) / 1e6)


def _mbit(sides: Sequence[int], streams: int) -> Callable[[Bench, Pair], float]:
    return lambda b, pair: b.flow(pair, "tcp", sides, str(streams), b.congestion) * 8 / 1e6


def _packets(size: int) -> Callable[[Bench, Pair], float]:
    return lambda b, pair: b.flow(pair, "udp", (0,), str(size)) / 1e3


LOADS = (
    Load(
        "TCP, 1 stream",
        "Mbit/s",
        ("c", "ours", "process", "ours-c", "c-ours", "vxlan", "routing"),
        _mbit((0,), 1),
        {"ours": 10.0, "ours-c": 1.5, "c-ours": 1.2},
    ),
    Load(
        "TCP, 8 streams",
        "Mbit/s",
        ("c", "ours", "process", "vxlan"),
        _mbit((0,), 8),
        {"ours": 10.0},
    ),
    Load(
        "TCP, both ways",
        "Mbit/s",
        ("c", "ours", "process", "vxlan"),
        _mbit((0, 1), 1),
        {"ours": 10.0},
    ),
    Load(
        "UDP, 1200 B",
        "kpackets/s",
        ("c", "ours", "process", "vxlan"),
        _packets(1200),
        {"ours": 3.0},
    ),
    Load("UDP, 64 B", "kpackets/s", ("c", "ours", "process", "vxlan"), _packets(64), {"ours": 2.0}),
    Load(
        "round trip, idle", "us", ("c", "ours", "process", "vxlan"), Bench.round_trip, {"ours": 1.3}
    ),
)


def _cpu(pid: int) -> float:
    """Return the CPU seconds of a process so far; /proc/PID/stat knows them by ticks only."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def run(
    bench: Bench, pairs: dict[str, Pair], loads: Sequence[Load], rounds: int
) -> list[dict[str, object]]:
    """Measure everything; returns one row per load and pair."""
    values: dict[tuple[str, str], list[float]] = {}
    cpu: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        for load in loads:
            order = load.pairs if number % 2 == 0 else load.pairs[::-1]
            for name in order:
                pids = pairs[name].pids
                before, begun = [_cpu(pid) for pid in pids], time.monotonic()
                value = load.measure(bench, pairs[name])
                values.setdefault((load.name, name), []).append(value)
                spent = max((_cpu(p) - b for p, b in zip(pids, before, strict=True)), default=0.0)
                share = spent / (time.monotonic() - begun)
                cpu.setdefault((load.name, name), []).append(share)
                print(f"  round {number + 1}: {load.name}, {name}: {value:.0f}", file=sys.stderr)
    rows: list[dict[str, object]] = []
    for load in loads:
        base = statistics.median(values[load.name, "c"])
        for name in load.pairs:
            seen = values[load.name, name]
            middle = statistics.median(seen)
            ratios = [a / b for a, b in zip(seen, values[load.name, "c"], strict=True) if b]
            rows.append(
                {
                    "load": load.name,
                    "pair": name,
                    "unit": load.unit,
                    "median": round(middle, 1),
                    "min": round(min(seen), 1),
                    "max": round(max(seen), 1),
                    "ratio": round(middle / base, 2) if base else None,
                    # Both sides of each from one round, so from about the same moment.
                    "ratio_of_rounds": round(statistics.median(ratios), 2) if ratios else None,
                    "ratio_spread": f"{min(ratios):.1f}-{max(ratios):.1f}" if ratios else "",
                    "wanted": load.wanted.get(name),
                    "cpu": round(statistics.median(cpu[load.name, name]), 2),
                }
            )
    return rows


def show(rows: Sequence[dict[str, object]], memory: dict[str, object]) -> None:
    """Print the table."""
    line = "{:<17} {:<8} {:>9} {:>9} {:>9}  {:<10} {:>6} {:>11} {:>6} {:>5}"
    titles = ("MEDIAN", "MIN", "MAX", "UNIT", "x C", "IN A ROUND", "WANTED", "CPU")
    print(line.format("LOAD", "PAIR", *titles))
    for row in rows:
        wanted = row["wanted"] if row["wanted"] is not None else ""
        print(
            line.format(
                *(str(row[key]) for key in ("load", "pair", "median", "min", "max", "unit")),
                str(row["ratio"]),
                str(row["ratio_spread"]),
                str(wanted),
                str(row["cpu"]),
            )
        )
    for name, value in memory.items():
        print(f"{name}: {value}")


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.udp_tunnel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.5, help="per measurement")
    parser.add_argument("--only", default="", help="loads whose name contains this")
    parser.add_argument("--pairs", default="", help="comma separated; c is always measured")
    parser.add_argument("--congestion", default=CONGESTION, help="congestion control of TCP")
    parser.add_argument(
        "--wire",
        action="store_true",
        help="as between two machines: network cards that cut and join, a processor for each host",
    )
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    packages = {name: needs.PACKAGES[name] for name in ("ip", "nsenter")} | {"gcc": "gcc"}
    packages |= {"ethtool": "ethtool"} if options.wire else {}
    processors = sorted(os.sched_getaffinity(0))[:2] if options.wire else []
    problem = needs.missing(packages)
    if not problem and len(processors) == 1:
        problem = "--wire takes two processors, and there is one"
    if problem:
        print(f"The benchmark cannot run: {problem}", file=sys.stderr)
        return 1
    names = {"c", *filter(None, options.pairs.split(","))} if options.pairs else set(KINDS)
    loads = [
        Load(x.name, x.unit, tuple(n for n in x.pairs if n in names), x.measure, x.wanted)
        for x in LOADS
        if options.only in x.name
    ]
    Lab.sweep_stale()
    with Lab(0, etcd=False) as lab, ExitStack():
        traffic, proxy = build(lab.directory)
        pairs = {name: make_pair(lab, name, proxy) for name in KINDS if name in names}
        bench = Bench(lab, traffic, options.seconds, options.congestion)
        if options.wire:
            bench.processors = processors
            for pair in pairs.values():
                as_two_machines(pair, processors)
        memory: dict[str, object] = {}
        if "ours" in pairs:
            pids = pairs["ours"].pids
            before = sum(map(_cpu, pids))
            time.sleep(3.0)
            memory["CPU seconds of both tunnels in 3 idle seconds"] = sum(map(_cpu, pids)) - before
        rows = run(bench, pairs, loads, options.rounds)
        if "ours" in pairs:
            memory["resident memory of the tunnels (KiB)"] = [
                t.memory_kb() for t in pairs["ours"].tunnels
            ]
            counters = pairs["ours"].tunnels[0].counters
            memory["load average (1, 5, 15 min) at the end"] = os.getloadavg()
            memory["segments per send"] = round(counters.segments_per_send, 1)
            memory["segments per receive"] = round(
                pairs["ours"].tunnels[1].counters.segments_per_receive, 1
            )
    show(rows, memory)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "tunnel": memory}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
