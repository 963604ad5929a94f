"""`make soak` in short: a few faults one soon after the other, and that it sees what goes wrong."""

import re
from pathlib import Path

import pytest
from soak import kernel, run
from soak.faults import ALL, FAULTS, Fault, faults_of, named
from soak.record import Process, Record
from soak.report import report
from soak.run import grown, soak
from soak.strikes import Strike
from soak.world import HOSTS, World

OPERATIONS = Path(__file__).parent.parent.parent / "docs" / "operations.md"


def test_each_fault_is_one_that_the_documentation_has() -> None:
    text = OPERATIONS.read_text()
    rows = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert {fault.row for fault in FAULTS} <= {*rows, *headings}
    assert all(faults_of(backend) for backend in ALL)


SHORT = (
    "device deleted",
    "etcd leader killed",
    "daemon killed",
    "lease overwritten",
    "wall clock jumps",
    "kernel refuses",
    "subnet handed over",
    "host replaced",
    "etcd restored",
)


@pytest.mark.usefixtures("_machine")
def test_a_short_soak(tmp_path: Path) -> None:
    only = named(SHORT)
    record = soak(seed=7, minutes=5, backend="vxlan", only=only, period=3.0, logs=tmp_path)
    assert record.failures == []
    assert [event.name for event in record.events] == [*SHORT]
    assert all(event.converged is not None for event in record.events)
    assert record.sent > 2000
    # The device that was deleted cost packets, and nothing else did.
    assert {event.name for event in record.events if event.lost} <= {"device deleted"}
    assert len(record.hosts) == HOSTS + 1
    # Looked at now and then: one that was away for a moment may not have been seen so.
    assert "up" in {state for changes in record.members.values() for _, state in changes}
    assert {process.steady for process in record.processes} == {True, False}
    assert any("is back" in log.read_text() for log in tmp_path.glob("flanneld-*.log"))
    # And once more from what was written down.
    record.write(tmp_path / "soak.json")
    page = report(Record.read(tmp_path / "soak.json"))
    assert page == report(record)
    assert "Everything was as promised." in page


def end_a_daemon(world: World) -> Strike:
    daemon = world.daemons[-1]
    daemon.kill9()
    world.revoked.append("(10.5.1.0/24 is now held by 10.97.0.77)")
    return Strike(daemon.host.label)


@pytest.mark.usefixtures("_machine")
def test_a_soak_sees_what_is_not_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets lost where none may be, a network that does not become as it was, a silent daemon."""
    monkeypatch.setattr(run, "CONVERGENCE", 2.0)
    unplug, end = (
        Fault("cut", "", kernel.unplug_host, hold=(1.0, 1.0)),
        Fault("ended", "", end_a_daemon),
    )
    record = soak(seed=8, minutes=5, backend="vxlan", only=[unplug, end], period=2.0)
    assert record.events[0].lost_wrongly > 0
    assert record.events[0].converged is not None
    assert record.events[1].converged is None
    one, two, three = sorted(record.failures)
    assert "packets lost where none may be" in one
    assert "the daemon of h5 has ended" in two
    assert three == "no daemon said: (10.5.1.0/24 is now held by 10.97.0.77)"
    assert "Not as promised" in report(record)


def test_what_a_daemon_has_more_of_at_its_end() -> None:
    at = [10.0 * n for n in range(100)]

    def process(
        *, rss: int = 0, descriptors: int = 0, threads: int = 0, steps: int = 100
    ) -> Process:
        """What is more at the end has come little by little."""
        return Process(
            "flanneld on h1",
            1,
            True,
            at[:steps],
            [40000 + rss * n // 99 for n in range(steps)],
            [11 + descriptors * n // 99 for n in range(steps)],
            [7 + threads * n // 99 for n in range(steps)],
        )

    assert grown(process(), True) == []
    assert grown(process(rss=2000, descriptors=2, threads=1), True) == []
    # One that has lived for too short a time says nothing.
    assert grown(process(rss=90000, steps=20), True) == []
    assert grown(process(rss=9900), True) == [
        "flanneld on h1: 49900 KiB of memory, 40000 at its start"
    ]
    assert len(grown(process(rss=9900, descriptors=20, threads=10), True)) == 3
