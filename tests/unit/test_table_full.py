"""What the reconciler says and does when the kernel refuses entries; the kernel is a fake here.

Linux exempts permanent neighbours from the limit of its table since 5.0, so that the real one
cannot be made to refuse them.
"""

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network

import pytest

from flanneld.kernel import reconcile
from flanneld.kernel.netlink import EntryEvent, KernelEvent, Overflow, Refusal
from flanneld.kernel.reconcile import ALL, CALM, CHECK, Reconciler
from flanneld.kernel.refusals import CHECK_REFUSED
from flanneld.kernel.state import PROTOCOL, Entry, FdbEntry, Found, Neighbour, Route, Territory

DEVICE = 7
TERRITORY = Territory((IPv4Network("10.5.0.0/16"),), DEVICE)


class Kernel:
    """Holds at most ``room`` neighbours; stands in for both sockets."""

    port = 1

    def __init__(self, room: int, number: int) -> None:
        self.room = room
        self.number = number
        self.entries: dict[object, Entry] = {}
        self.keeps = ""
        """Why it does not delete anything."""
        self.events: list[KernelEvent] = []

    def ignore(self, _port: int) -> None:
        pass

    def read(self) -> list[KernelEvent]:
        events, self.events = self.events, []
        return events

    def apply(
        self,
        write: Sequence[Entry],
        delete: Sequence[Found],
        _may_replace: Callable[[Entry], bool] = lambda _: True,
        **_options: bool,
    ) -> tuple[dict[Entry, Refusal], dict[Found, Refusal]]:
        refused: dict[Entry, Refusal] = {}
        for entry in write:
            neighbours = sum(isinstance(e, Neighbour) for e in self.entries.values())
            if isinstance(entry, Neighbour) and neighbours >= self.room:
                refused[entry] = Refusal(self.number, os.strerror(self.number).lower())
            else:
                self.entries[entry.slot] = entry
        if self.keeps:
            return refused, {item: Refusal(errno.EADDRNOTAVAIL, self.keeps) for item in delete}
        for item in delete:
            self.entries.pop(item.entry.slot, None)
        return refused, {}

    def routes(self, protocol: int) -> list[Found]:
        return [
            Found(e, PROTOCOL)
            for e in self.entries.values()
            if isinstance(e, Route) and protocol in (0, PROTOCOL)
        ]

    def neighbours(self, _oif: int) -> list[Found]:
        return [Found(e) for e in self.entries.values() if isinstance(e, Neighbour)]

    def fdb(self, _oif: int) -> list[Found]:
        return [Found(e) for e in self.entries.values() if isinstance(e, FdbEntry)]


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(reconcile, "now", made)
    return made


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    # logs.setup() of another test may have cut it off.
    monkeypatch.setattr(logging.getLogger("flanneld"), "propagate", True)
    with caplog.at_level(logging.INFO, "flanneld"):
        yield


def entries(count: int) -> list[Entry]:
    made: list[Entry] = []
    for n in range(count):
        subnet = IPv4Network(f"10.5.{n}.0/24")
        mac = bytes([2, 0, 0, 0, 0, n])
        gateway = subnet.network_address
        made += [
            Neighbour(gateway, mac, DEVICE),
            FdbEntry(mac, IPv4Address(f"10.97.0.{n}"), DEVICE),
            Route(subnet, gateway, DEVICE, onlink=True),
        ]
    return made


def reconciler_on(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Reconciler:
    monkeypatch.setattr(reconcile, "EntrySocket", lambda: kernel)
    monkeypatch.setattr(reconcile, "Monitor", lambda **_: kernel)
    return Reconciler(neighbours=True)


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC])
def test_a_full_neighbour_table_names_the_sysctl_and_the_value(
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
) -> None:
    kernel = Kernel(3, number)
    reconciler = reconciler_on(kernel, monkeypatch)
    reconciler.set_all(entries(5), TERRITORY)
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    reason = os.strerror(number).lower()
    assert errors == [
        f"Error adding neighbour 10.5.3.0 lladdr 02:00:00:00:00:03: {reason}",
        f"Error adding neighbour 10.5.4.0 lladdr 02:00:00:00:00:04: {reason}",
        "The kernel's neighbour table is full: set the sysctl"
        " net.ipv4.neigh.default.gc_thresh3 to 1034 or more",
    ]
    # Everything else is in place, and the refused ones are tried again, which is not news.
    assert len(kernel.entries) == 13
    caplog.clear()
    for wait in (1.0, 2.0, 4.0, 8.0, CHECK_REFUSED, CHECK_REFUSED):
        assert reconciler.due() == wait
        clock.time += wait
        reconciler.work()
        assert caplog.records == []
    # The operator raises the limit.
    kernel.room = 1034
    clock.time += CHECK_REFUSED
    reconciler.work()
    assert len(kernel.entries) == 15
    assert [r.getMessage() for r in caplog.records] == [
        "Recovered neighbour 10.5.3.0 lladdr 02:00:00:00:00:03",
        "Recovered neighbour 10.5.4.0 lladdr 02:00:00:00:00:04",
    ]


def test_another_refusal_says_nothing_of_the_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    assert clock.time
    reconciler_on(Kernel(0, errno.EPERM), monkeypatch).set_all(entries(1), TERRITORY)
    assert "operation not permitted" in caplog.text
    assert "gc_thresh3" not in caplog.text


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENETDOWN])
def test_a_device_that_is_away_is_said_when_it_stays_away(
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
) -> None:
    """The kernel refuses its entries before it reports what happened to it."""
    kernel = Kernel(0, number)
    reconciler = reconciler_on(kernel, monkeypatch)
    reconciler.set_all(entries(1), TERRITORY)
    assert caplog.records == []
    for _ in range(3):
        clock.time += CHECK_REFUSED
        reconciler.work()
    reason = os.strerror(number).lower()
    assert [r.getMessage() for r in caplog.records] == [
        f"Error adding neighbour 10.5.0.0 lladdr 02:00:00:00:00:00: {reason}"
    ]
    kernel.room = 1
    clock.time += CHECK_REFUSED
    reconciler.work()
    assert caplog.text.count("Recovered neighbour 10.5.0.0") == 1


def test_what_is_in_place_by_somebody_elses_hand_is_refused_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    kernel = Kernel(1, errno.ENOBUFS)
    reconciler = reconciler_on(kernel, monkeypatch)
    wanted = entries(2)
    reconciler.set_all(wanted, TERRITORY)
    assert "1 refused" in reconciler.summary()
    kernel.entries |= {entry.slot: entry for entry in wanted}
    kernel.events = [EntryEvent(Found(entry), False) for entry in wanted[3:4]]
    reconciler.handle()
    clock.time += CHECK_REFUSED
    reconciler.work()
    assert "0 refused" in reconciler.summary()
    assert reconciler.due() == CHECK
    assert caplog.text.count("Recovered neighbour 10.5.1.0") == 1


def test_what_cannot_be_deleted_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    """As an FDB entry that leads through a device which is gone."""
    kernel = Kernel(9, 0)
    reconciler = reconciler_on(kernel, monkeypatch)
    reconciler.set_all(entries(2), TERRITORY)
    stale = FdbEntry(bytes([2, 0, 0, 0, 0, 99]), IPv4Address("10.97.0.99"), DEVICE)
    kernel.entries[stale.slot] = stale
    kernel.keeps = "cannot assign requested address"
    for _ in range(3):
        clock.time += CHECK
        reconciler.work()
        # What else there is to do meanwhile is no reason to repeat it.
        kernel.events = [EntryEvent(Found(entries(1)[0]), True)]
        reconciler.handle()
        clock.time += 1.0
        reconciler.work()
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert errors == [f"Error deleting {stale}: cannot assign requested address"]
    assert "Removed stale" not in caplog.text
    kernel.keeps = ""
    clock.time += CHECK
    reconciler.work()
    assert f"Removed stale {stale}" in caplog.text


@pytest.mark.parametrize("number", [0, 1], ids=["neighbour", "FDB entry"])
@pytest.mark.parametrize("restored", [True, False])
def test_what_somebody_changed_and_put_right_himself_is_left_alone(
    number: int,
    restored: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    clock: Clock,
) -> None:
    kernel = Kernel(9, 0)
    reconciler = reconciler_on(kernel, monkeypatch)
    reconciler.set_all(entries(1), TERRITORY)
    ours = entries(1)[number]
    other = Neighbour(IPv4Address("10.5.0.0"), bytes([2, 0, 0, 0, 0, 9]), DEVICE)
    changed = (other, FdbEntry(bytes([2, 0, 0, 0, 0, 0]), IPv4Address("10.97.0.9"), DEVICE))[number]
    assert changed.slot == ours.slot
    found = [(changed, False), (ours, False), (ours, True), (ours, False)]
    for entry, deleted in found if restored else found[:3]:
        kernel.events = [EntryEvent(Found(entry), deleted)]
        reconciler.handle()
    clock.time += 1.0
    reconciler.work()
    assert caplog.text.count("Recovered") == (0 if restored else 1)


def test_a_route_is_written_again_as_others_may_stand_before_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    kernel = Kernel(9, 0)
    reconciler = reconciler_on(kernel, monkeypatch)
    reconciler.set_all(entries(1), TERRITORY)
    ours = entries(1)[2]
    kernel.events = [EntryEvent(Found(ours, PROTOCOL), deleted) for deleted in (True, False)]
    reconciler.handle()
    clock.time += 1.0
    reconciler.work()
    assert caplog.text.count("Route recovered") == 1


def test_of_many_refusals_a_few_are_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    assert clock.time
    reconciler_on(Kernel(0, errno.ENOBUFS), monkeypatch).set_all(entries(200), TERRITORY)
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 12
    assert errors[-2] == "Error adding 200 in all (-v=1 lists them)"
    assert "gc_thresh3 to 1424 or more" in errors[-1]


def test_a_storm_in_which_events_are_lost_again_and_again_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    kernel = Kernel(9, 0)
    reconciler = reconciler_on(kernel, monkeypatch)
    reconciler.set_all(entries(2), TERRITORY)
    for _ in range(20):
        kernel.events = [Overflow(), Overflow()]
        kernel.entries.popitem()
        reconciler.handle()
        clock.time += 1.0
        reconciler.work()
        assert len(kernel.entries) == 6
    assert caplog.text.count("Kernel events were lost") == 1
    clock.time += CALM
    kernel.events = [Overflow()]
    reconciler.handle()
    assert caplog.text.count("Kernel events were lost") == 2


def test_entries_of_a_device_that_is_held_are_left_alone_and_no_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    kernel = Kernel(9, 0)
    reconciler = reconciler_on(kernel, monkeypatch)
    direct = Route(IPv4Network("10.5.99.0/24"), IPv4Address("10.97.0.99"), 2)
    wanted = [*entries(2), direct]
    reconciler.set_all(wanted, TERRITORY)
    assert list(kernel.entries.values()) == wanted
    reconciler.hold(DEVICE)
    # The device is gone, and more with it.
    kernel.entries.clear()
    kernel.events = [Overflow()]
    reconciler.handle()
    later = entries(3)[6:]
    reconciler.update(later, [])
    clock.time += 1.0
    reconciler.work()
    assert list(kernel.entries.values()) == [direct]
    assert reconciler.due() not in (None, 0.0)
    reconciler.hold(0)
    clock.time += 1.0
    reconciler.work()
    assert set(kernel.entries.values()) == {*wanted, *later}
    assert "Error" not in caplog.text


def test_while_everything_is_held_nothing_is_written_or_deleted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    kernel = Kernel(9, 0)
    reconciler = reconciler_on(kernel, monkeypatch)
    direct = Route(IPv4Network("10.5.99.0/24"), IPv4Address("10.97.0.99"), 2)
    before = [*entries(2), direct]
    reconciler.set_all(before, TERRITORY)
    reconciler.hold(ALL)
    later = entries(3)[6:]
    reconciler.update(later, [entry.slot for entry in [*before[:3], direct]])
    kernel.events = [EntryEvent(Found(before[3]), True)]
    reconciler.handle()
    clock.time += CHECK
    reconciler.work()
    assert list(kernel.entries.values()) == before
    reconciler.hold(0)
    clock.time += 1.0
    reconciler.work()
    assert set(kernel.entries.values()) == {*before[3:6], *later}
    assert "Error" not in caplog.text
