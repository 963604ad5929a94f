"""One soak: a fault every ten seconds, and after each whether everything is as it should be."""

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import flanneld
from lab import Lab, LabError, NotInTime, eventually

from .faults import MARGIN, Fault, faults_of, pairs_of
from .pinger import LATE, Lost
from .record import Event, Process, Record
from .world import HOSTS, World

PERIOD = 10.0
CONVERGENCE = 30.0
"""Seconds after which a network that is not as it should be is a failure. What is promised is
shorter for each fault; how long it took is in the record."""
_STRAY = ("Traceback", "Stuck:", "Lease has been revoked")

RSS_KB, DESCRIPTORS, THREADS = 2048, 2, 1
"""By how much a daemon's memory, descriptors and threads may be more than in its first sample.

Descriptors: it has two polls open at the start, and keeps what it once needs at one time: another
connection to the same etcd member for a write, and a socket of the kernel's.
"""
LIFE = 300.0
"""Seconds that a daemon must have lived for its memory to say something."""
STEP = 0.2


def soak(
    seed: int,
    minutes: float,
    backend: str,
    *,
    only: Sequence[Fault] | None = None,
    period: float = PERIOD,
    logs: Path | None = None,
) -> Record:
    """Run one, and print what happens. ``only`` are the faults, in this order; else by chance.

    The daemons' and etcds' logs are copied to the directory ``logs``.

    The failures are in the record. Raises what the lab raises when it cannot even be set up.
    """
    began = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
    record = Record(seed, minutes, backend, began, flanneld.__version__)
    print(f"soak: SEED={seed} MINUTES={minutes:g} BACKEND={backend}", flush=True)
    with Lab(0, etcd=False) as lab:
        world = World(lab, record)
        try:
            world.open()
            print(f"{HOSTS} hosts, 3 etcds: all converged, pings run", flush=True)
            _strike_until(world, _Choice(world, only), minutes * 60, period)
            _calm(world)
        finally:
            world.close()
            _copy_logs(world, logs)
        _finish(world)
    for failure in record.failures:
        print(f"FAILED: {failure}", flush=True)
    return record


def _copy_logs(world: World, logs: Path | None) -> None:
    if logs is None:
        return
    logs.mkdir(parents=True, exist_ok=True)
    for daemon in world.lab.daemons:
        (logs / f"flanneld-{daemon.host.label}.log").write_text(daemon.whole_log())
    if world.lab.etcd is not None:
        for member in world.cluster.members:
            (logs / f"etcd-{member.member.name}.log").write_text(member.log())


class _Choice:
    """Each kind of fault once, in an order by chance; then all again in another order."""

    def __init__(self, world: World, only: Sequence[Fault] | None) -> None:
        self._world = world
        self._all = faults_of(world.backend)
        self._only = None if only is None else [*only]
        self._left: list[Fault] = []

    def next(self) -> Fault | None:
        """Return the next one; None when a given list is through."""
        if self._only is not None:
            return self._only.pop(0) if self._only else None
        if not self._left:
            self._left = self._world.rng.sample(self._all, len(self._all))
        return self._left.pop()


def _strike_until(world: World, choice: _Choice, seconds: float, period: float) -> None:
    world.measure()
    while world.now() < seconds and (fault := choice.next()) is not None:
        due = world.now() + period
        event = _one(world, fault)
        if event.converged is None:
            _mend(world)
        time.sleep(max(0.0, due - world.now()))
        world.measure()
        event.ended = world.now()
        _say(world, event)


def _one(world: World, fault: Fault) -> Event:
    hold = world.rng.uniform(*fault.hold)
    number = len(world.record.events) + 1
    event = Event(number, fault.name, "", world.now(), 0.0)
    world.record.events.append(event)
    try:
        strike = fault.strike(world)
        event.on = strike.on
        if world.backend in fault.losing:
            event.pairs = pairs_of(world, strike)
            event.until = float("inf")
        struck = world.now()
        if fault.hold[1]:
            time.sleep(hold)
            strike.undo()
            event.undone = world.now()
        else:
            event.undone = struck
        if event.pairs:
            event.until = event.undone + fault.after + MARGIN
        moment = time.monotonic()
        eventually(lambda: world.is_converged(moment), CONVERGENCE, "convergence", interval=STEP)
        event.converged = world.now()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is written down as a failure
        reason = str(error).splitlines()[0] if isinstance(error, NotInTime) else repr(error)
        world.record.failures.append(f"#{number} {fault.name} ({event.on}): {reason}")
        event.undone = event.undone or world.now()
        event.until = min(event.until, world.now())
    return event


def _mend(world: World) -> None:
    """Have the next fault meet a network that works, as far as can be."""
    for daemon in world.daemons:
        if not daemon.is_running:
            daemon.start()
    try:
        world.cluster.start()
    except LabError as error:
        world.record.failures.append(f"etcd does not come back: {str(error).splitlines()[0]}")


def _calm(world: World) -> None:
    """Wait until all is as at the start, and no packet is under way."""
    moment = time.monotonic()
    try:
        eventually(lambda: world.is_converged(moment), CONVERGENCE, "convergence", interval=STEP)
        world.record.failures += world.not_renewed()
    except AssertionError as error:
        world.record.failures.append(f"at the end: {str(error).splitlines()[0]}")
    time.sleep(LATE)
    world.measure()


def _say(world: World, event: Event) -> None:
    now = "NOT converged" if event.converged is None else f"{event.converged - event.undone:.1f} s"
    _judge(world, world.pinger.lost())
    lost = sum(each.lost for each in world.record.events)
    wrongly = sum(each.lost_wrongly for each in world.record.events)
    print(
        f"[{event.begun:6.1f}] #{event.number} {event.name} ({event.on}): {now};"
        f" lost so far {lost} of which wrongly {wrongly}",
        flush=True,
    )


def _judge(world: World, lost: list[Lost]) -> None:
    """Give each lost packet to the fault in whose time it was sent."""
    record = world.record
    zero = time.monotonic() - world.now()
    record.lost = [(round(each.at - zero, 3), *each.pair) for each in lost]
    for event in record.events:
        event.lost = event.lost_wrongly = 0
        event.lost_for = 0.0
    for at, one, two in record.lost:
        event = record.event_of((one, two), at)
        if event.allows((one, two), at):
            event.lost += 1
            event.lost_for = max(event.lost_for, at - event.undone)
        else:
            event.lost_wrongly += 1


def _finish(world: World) -> None:
    record = world.record
    record.seconds = world.now()
    record.sent = world.pinger.sent()
    _judge(world, world.pinger.lost())
    for event in record.events:
        event.until = min(event.until, record.seconds)
        if event.lost_wrongly:
            record.failures.append(
                f"#{event.number} {event.name} ({event.on}): {event.lost_wrongly} packets lost"
                " where none may be"
            )
    living = {daemon.pid for daemon in world.daemons if daemon.is_running}
    for process in record.processes:
        record.failures += grown(process, process.pid in living)
    record.failures += _strays(world)
    record.failures += _given_up(world)


def _strays(world: World) -> list[str]:
    """No daemon logged what none should, and each that lost its subnet said so, once."""
    failures = []
    due = [*world.revoked]
    for daemon in world.lab.daemons:
        for line in daemon.whole_log().splitlines():
            expected = next((each for each in due if line.endswith(f"daemon. {each}")), None)
            if expected is not None:
                due.remove(expected)
            elif any(word in line for word in _STRAY):
                failures.append(f"{daemon.host.label} logged: {line}")
    return failures + [f"no daemon said: {each}" for each in due]


def _given_up(world: World) -> list[str]:
    """No daemon dropped a peer that was there all the time.

    Not asked of a host that joined, or moved: its subnet may have been another's before.
    """
    first = [d for d in world.daemons if d.host.number <= HOSTS]
    stayed = {str(d.subnet()): d for d in first if d.host.label not in world.moved}
    return [
        f"{daemon.host.label} removed the subnet of {stayed[subnet].host.label}"
        for daemon in world.lab.daemons
        for subnet in re.findall(r"Subnet removed: (\S+)", daemon.whole_log())
        if subnet in stayed
    ]


def calm_now(values: Sequence[int], living: bool) -> int:
    """Return what a daemon has, or had, at its end.

    Killed in the middle of something, it may have had a connection more.
    """
    return values[-1] if living else min(values[-3:])


def grown(process: Process, living: bool) -> list[str]:
    """Return what a daemon has more of at its end than at its start, by more than the margin."""
    if process.at[-1] - process.at[0] < LIFE:
        return []
    failures = []
    for what, values, margin in (
        ("KiB of memory", process.rss_kb, RSS_KB),
        ("descriptors", process.descriptors, DESCRIPTORS),
        ("threads", process.threads, THREADS),
    ):
        first, last = values[0], calm_now(values, living)
        if last > first + margin:
            failures.append(f"{process.name}: {last} {what}, {first} at its start")
    return failures
