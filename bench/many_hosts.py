"""Many hosts on one etcd: ``python -m bench.many_hosts [HOSTS]``, or ``make bench-hosts``.

The hosts have no kernel: they are the daemon's subnet managers, thousands of threads in a few
processes (see `bench.hosts`), and etcd is a real one on loopback. After about ten minutes it ends,
and says so if it has not done everything. The hosts share this machine's processors with etcd, so
that what takes long here may do so for their sake: compare the seconds of processor time, which are
given for each side.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from typing import TextIO

from bench import etcdload, machine
from bench.fleet import Fleet, agreed
from bench.hosts import State, Tally, attrs_of
from flanneld.subnet.lease import subnet_key
from lab.etcd import LOOPBACK, Etcd, Member, free_ports
from lab.etcdv2 import EtcdV2Error
from lab.names import sweep_stale
from lab.process import LabError
from lab.report import Report
from lab.signals import stop_signals_raise
from lab.wait import NotInTime

WIDE = IPv4Network("10.0.0.0/8")
SUBNET_LEN = 24

# Minutes after which no step begins, and the part of them that one step may take until what is
# missing counts as lost.
_MINUTES, _PART = 9.0, 0.75
# Seconds at rest, and until idle polls are spread as they are for ever.
_REST, _SETTLE = 40.0, 5.0
# Renewals one by one, and at one instant (all of the hosts, if there are fewer).
_SINGLE, _BURST = 10, 200
# Requests, of those that cost much and of those that cost little.
_LISTS, _READS = 100, 1000
# Seconds that etcd is away.
_AWAY = 3.0
# And between looks at the hosts.
_LOOK = 0.5


@dataclass(slots=True)
class Step:
    """One thing that was done to etcd, and the figures: name, value, unit."""

    title: str
    figures: list[tuple[str, float, str]] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)
    logged: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, value: float, unit: str = "") -> None:
        self.figures.append((name, value, unit))

    def add_tally(self, tally: Tally) -> None:
        """The hosts' side."""
        self.requests.update(tally.calls)
        self.logged.update(tally.logged)
        self.add("requests", sum(n for kind, n in tally.calls.items() if ":" not in kind))
        self.add("CPU of all hosts", tally.cpu, "s")

    def add_spent(self, spent: etcdload.Spent) -> None:
        """etcd's side."""
        self.add("CPU of etcd", spent.cpu, "s")
        self.add("entries in etcd's log", spent.proposals)
        self.add("syncs of etcd's log", spent.syncs)
        self.add("written to etcd's log", spent.written / 2**20, "MiB")


class Bench:
    """One run: the members of etcd, how many hosts, and what was found so far."""

    def __init__(
        self, members: Sequence[Etcd], hosts: int, processes: int, minutes: float = _MINUTES
    ) -> None:
        self.members = members
        self.endpoints = ",".join(member.url for member in members)
        self.hosts = hosts
        self.processes = processes
        self.steps: list[Step] = []
        self.problems: list[str] = []
        self.deadline = time.monotonic() + minutes * 60.0
        self.patience = minutes * 60.0 * _PART
        """Seconds that one step may take."""

    def fleet(
        self, prefix: str, network: IPv4Network, previous: dict[int, IPv4Network] | None = None
    ) -> Fleet:
        """Hosts in a network of their own, which have not begun yet."""
        self.put_config(prefix, network)
        return Fleet(self.endpoints, prefix, self.hosts, self.processes, previous)

    def put_config(self, prefix: str, network: IPv4Network) -> None:
        """Write it, however busy etcd is."""
        config = {"Network": str(network), "SubnetLen": SUBNET_LEN, "Backend": {"Type": "vxlan"}}
        until = time.monotonic() + self.patience
        with self.members[0].client(timeout=self.patience) as client:
            while True:
                try:
                    client.put(f"{prefix}/config", json.dumps(config))
                except EtcdV2Error:
                    if time.monotonic() > until:
                        raise
                else:
                    return

    @contextmanager
    def step(self, title: str, fleet: Fleet, *, anew: bool = False) -> Iterator[Step]:
        """Measure both sides from here to the end of the block.

        ``anew``: etcd is started within, so that all that it has spent in the end belongs to it.
        """
        step = Step(title)
        self.steps.append(step)
        began = time.monotonic()
        before = etcdload.NOTHING if anew else etcdload.spent(self.members)
        fleet.tally()
        yield step
        step.add_tally(fleet.tally())
        step.add_spent(etcdload.spent(self.members) - before)
        print(f"  {title}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    def has_time(self) -> bool:
        """Whether another step may begin."""
        if time.monotonic() < self.deadline:
            return True
        self.problems = ["the time was over before all steps were done"]
        return False

    def wait(self, fleet: Fleet, done: Callable[[list[State]], bool]) -> list[State]:
        """Wait until this holds of the hosts, or the time is over; return how they are then."""
        until = min(time.monotonic() + self.patience, self.deadline)
        while True:
            states = fleet.states()
            if done(states) or time.monotonic() > until:
                return states
            time.sleep(_LOOK)


def costs(bench: Bench) -> None:
    """One request of each kind, with as many leases as there will be hosts, and none of these."""
    step = Step(f"What one request costs etcd, with {bench.hosts} leases")
    bench.steps.append(step)
    directory = "/v2/keys/costs/subnets"
    with bench.members[0].client(timeout=bench.patience) as client:
        for number in range(bench.hosts):
            subnet = IPv4Network((int(WIDE.network_address) + (number << 8), SUBNET_LEN))
            client.put(f"/costs/subnets/{subnet_key(subnet)}", attrs_of(number).encode(), ttl=86400)
        client.put("/costs/config", "{}")
        index = client.index()
        for name, path, count in (
            ("the list of all leases", f"{directory}?recursive=true&quorum=true", _LISTS),
            ("one key, linearizable", "/v2/keys/costs/config?quorum=true", _READS),
            ("an event", f"{directory}?recursive=true&wait=true&waitIndex={index - 1}", _READS),
        ):
            before = etcdload.spent(bench.members)
            for _ in range(count):
                size = len(client.request("GET", path)[2])
            cpu = (etcdload.spent(bench.members) - before).cpu
            step.add(f"{name}: CPU of etcd", cpu / count * 1000, "ms")
            step.add(f"{name}: size", size / 1024, "KiB")
        client.delete("/costs", recursive=True)
    print(f"  {step.title}", file=sys.stderr, flush=True)


def start(bench: Bench, fleet: Fleet, title: str) -> dict[int, IPv4Network]:
    """All hosts begin at one instant; return who has which subnet."""
    with bench.step(f"{title}: until each has its lease", fleet) as step:
        began = fleet.start()
        states = bench.wait(fleet, lambda all_: all(s.subnet or s.died for s in all_))
        _add_times(step, "to the lease", [s.leased_at - began for s in states if s.subnet])
    held = {s.number: s.subnet for s in states if s.subnet is not None}
    step.add("hosts without a lease", len(states) - len(held))
    step.add("hosts that ended", sum(bool(s.died) for s in states))
    step.add("subnets held twice", len(held) - len(set(held.values())))
    with bench.step(f"{title}: from there until each knows all the others", fleet) as step:
        converge(bench, fleet, step, began)
    return held


def converge(bench: Bench, fleet: Fleet, step: Step, began: float) -> None:
    """Wait until each host uses the leases of all the others."""
    states = bench.wait(fleet, lambda all_: agreed(all_) == len(all_))
    step.add("the last host, from the beginning", max(s.changed_at for s in states) - began, "s")
    step.add("hosts that do not know all others", len(states) - agreed(states))


def rest(bench: Bench, fleet: Fleet) -> None:
    """Nothing happens."""
    time.sleep(_SETTLE)
    with bench.step(f"At rest for {_REST:.0f} s", fleet) as step:
        time.sleep(_REST)
    step.add("descriptors of etcd", max(map(etcdload.descriptors, bench.members)))
    step.add("memory of etcd", max(map(etcdload.memory, bench.members)), "MB")


def _know(index: int, states: Sequence[State]) -> bool:
    """Whether all hosts know what was written after this index."""
    return all(state.seen > index for state in states)


def renew_one_by_one(bench: Bench, fleet: Fleet) -> None:
    """One host after the other renews its lease; each time all are waited for."""
    delays = []
    with bench.step(f"{_SINGLE} renewals, one after the other", fleet) as step:
        for number in range(_SINGLE):
            know = partial(_know, _index(bench))
            began = fleet.renew([number])
            states = bench.wait(fleet, know)
            delays.append(max(s.seen_at for s in states) - began)
    _add_times(step, "to the last host that knows", delays)


def renew_together(bench: Bench, fleet: Fleet) -> None:
    """Many renew at one instant."""
    count = min(_BURST, bench.hosts)
    with bench.step(f"{count} renewals at one instant", fleet) as step:
        before = _index(bench)
        began = fleet.renew(range(count))
        index = _settled(bench, before)
        states = bench.wait(fleet, lambda all_: all(s.seen >= index for s in all_))
        _add_times(step, "until a host knows all", [s.seen_at - began for s in states])
    # One that etcd refused is tried again only if it is due in truth.
    step.add("renewals carried out", index - before)
    step.add("hosts that do not know all", sum(s.seen < index for s in states))


def restart_etcd(bench: Bench, fleet: Fleet) -> None:
    """etcd is stopped and started again; with several members, all of them."""
    for member in bench.members:
        member.stop()
    time.sleep(_AWAY)  # all hosts have noticed, and pause
    began = time.monotonic()
    with bench.step(f"etcd stopped for {_AWAY:.0f} s and started", fleet, anew=True) as step:
        for member in bench.members:
            member.launch()
        for member in bench.members:
            member.wait_healthy(bench.patience)
        step.add("until etcd is healthy", time.monotonic() - began, "s")
        states = bench.wait(fleet, lambda all_: all(s.snapshot_at > began for s in all_))
        back = [s.snapshot_at - began for s in states if s.snapshot_at > began]
        _add_times(step, "until a host follows", back)
    step.add("hosts that do not", len(states) - len(back))


def empty_etcd(bench: Bench, fleet: Fleet) -> None:
    """etcd comes back with no data but the config: all hosts publish their leases again."""
    (member,) = bench.members
    began = time.monotonic()
    with (
        bench.step("etcd emptied", fleet, anew=True) as step,
        member.client(timeout=bench.patience) as client,
    ):
        member.wipe(wait=False)
        member.wait_healthy(bench.patience)
        bench.put_config("/wide", WIDE)
        until = began + bench.patience
        back = 0
        while back < bench.hosts and time.monotonic() < until:
            time.sleep(_LOOK)
            with suppress(EtcdV2Error):  # it is too busy
                back = len(client.list("/wide/subnets"))
        step.add("until all leases are back", time.monotonic() - began, "s")
        states = bench.wait(fleet, lambda all_: agreed(all_) == len(all_))
    step.add("leases that are not", bench.hosts - back)
    step.add("hosts that do not know all others", len(states) - agreed(states))


def _index(bench: Bench) -> int:
    with bench.members[0].client(timeout=bench.patience) as client:
        return client.index()


def _settled(bench: Bench, start: int) -> int:
    """Wait until etcd's index has grown, and grows no more; return it."""
    index, until = start, time.monotonic() + bench.patience
    while time.monotonic() < until:
        time.sleep(2 * _LOOK)
        before, index = index, _index(bench)
        if start < index == before:
            break
    return index


def _add_times(step: Step, name: str, seconds: Sequence[float]) -> None:
    ordered = sorted(seconds) or [float("nan")]
    step.add(f"{name}, median", statistics.median(ordered), "s")
    step.add(f"{name}, 99 %", ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], "s")
    step.add(f"{name}, last", ordered[-1], "s")


def run(bench: Bench) -> None:
    """Everything, one after the other, for as long as there is time."""
    costs(bench)
    single = len(bench.members) == 1
    steps: list[Callable[[Bench, Fleet], None]] = [rest, renew_one_by_one, renew_together]
    steps += [restart_etcd, empty_etcd] if single else [restart_etcd]
    with bench.fleet("/wide", WIDE) as fleet:
        held = start(bench, fleet, "First start")
        for step in steps:
            if bench.has_time():
                step(bench, fleet)
    if bench.has_time():
        with bench.fleet("/wide", WIDE, held) as fleet:
            start(bench, fleet, "Start with the leases of before")
    tight = IPv4Network((WIDE.network_address, SUBNET_LEN - bench.hosts.bit_length()))
    if bench.has_time():
        with bench.fleet("/tight", tight) as fleet:
            start(bench, fleet, f"First start in {tight}")


def write(bench: Bench, about: dict[str, str], directory: Path) -> None:
    """Print the tables; put them and the JSON there."""
    directory.mkdir(parents=True, exist_ok=True)
    document = {"machine": about, "hosts": bench.hosts, "members": len(bench.members)}
    document["problems"] = bench.problems
    steps = [
        {
            "step": step.title,
            "figures": [{"name": n, "value": v, "unit": u} for n, v, u in step.figures],
            "requests": step.requests,
            "logged": step.logged,
        }
        for step in bench.steps
    ]
    path = directory / "many_hosts.json"
    path.write_text(json.dumps(document | {"steps": steps}, indent=1) + "\n")
    tables(bench, about, sys.stdout)
    with (directory / "many_hosts.txt").open("w") as file:
        tables(bench, about, file)


def tables(bench: Bench, about: dict[str, str], out: TextIO) -> None:
    """Write everything that was found as text."""
    report = Report(out)
    report.title(f"{bench.hosts} hosts on one etcd (members: {len(bench.members)})")
    for name, value in about.items():
        report.text(f"{name}: {value}")
    for problem in bench.problems:
        report.bad(problem)
    for step in bench.steps:
        report.step(step.title)
        report.table(("figure", "value", "unit"), [(n, _number(v), u) for n, v, u in step.figures])
        for what, counts in (("requests", step.requests), ("in the logs", step.logged)):
            if counts:
                report.note(f"{what}: " + ", ".join(f"{k} {n}" for k, n in sorted(counts.items())))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


@contextmanager
def running(count: int) -> Iterator[list[Etcd]]:
    """So many members of one etcd, on loopback."""
    ports = free_ports(2 * count)
    known = [Member(f"m{n}", LOOPBACK, ports[2 * n], ports[2 * n + 1]) for n in range(count)]
    with ExitStack() as stack:
        members = [Etcd(members=known, name=member.name) for member in known]
        for member in members:
            stack.callback(member.close)
        for member in members:
            member.launch()
        for member in members:
            member.wait_healthy()
        yield members


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write what was found. The exit status does not depend on the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.many_hosts", description=__doc__)
    parser.add_argument("hosts", type=int, nargs="?", default=2000, help="how many (2000)")
    parser.add_argument("--members", type=int, default=1, help="members of etcd (1)")
    parser.add_argument("--processes", type=int, default=4, help="processes of hosts (4)")
    parser.add_argument(
        "--minutes", type=float, default=_MINUTES, help="after which no step begins (9)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench"), help="directory (build/bench)"
    )
    options = parser.parse_args(argv)
    sweep_stale()
    about = machine.describe() | {"load average before": machine.load()}
    began = time.monotonic()
    with stop_signals_raise(), running(options.members) as members:
        bench = Bench(members, options.hosts, options.processes, options.minutes)
        try:
            run(bench)
        except (KeyboardInterrupt, LabError, NotInTime, EtcdV2Error, OSError) as error:
            # What was found until then is worth as much.
            bench.problems.append(f"the run ended early: {error!r}")
    about["load average after"] = machine.load()
    about["duration"] = f"{time.monotonic() - began:.0f} s"
    write(bench, about, options.output)
    print(f"\nIn {options.output}: many_hosts.json, many_hosts.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
