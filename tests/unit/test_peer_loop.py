"""From lease events to entries, and the device in between; the kernel and the store are fakes."""

import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from flanneld.backend import device, peers
from flanneld.backend.peers import PeerNetwork
from flanneld.backend.vxlan import VxlanLink, peer_entries
from flanneld.errors import DeviceError
from flanneld.kernel.netlink import KernelEvent, LinkEvent
from flanneld.kernel.reconcile import ALL
from flanneld.kernel.state import Entry, Slot, Territory
from flanneld.kernel.vxlan import VxlanDevice, VxlanSpec
from flanneld.kernel.wire import Link
from flanneld.subnet.config import parse_config
from flanneld.subnet.lease import Lease, LeaseAttrs
from flanneld.subnet.watch import EventType, LeaseEvent

CONFIG = parse_config('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
MAC_A, MAC_B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
TOUCHED: list[KernelEvent] = [LinkEvent(Link(7, "flannel.1", True), False)]


def lease(number: int, mac: str = MAC_A, ip: str = "10.97.0.2", index: int = 1) -> Lease:
    attrs = LeaseAttrs(IPv4Address(ip), "vxlan", f'{{"VtepMAC":"{mac}"}}')
    return Lease(IPv4Network(f"10.5.{number}.0/24"), attrs, 86400, index)


def added(found: Lease) -> LeaseEvent:
    return LeaseEvent(EventType.ADDED, found)


def removed(found: Lease) -> LeaseEvent:
    return LeaseEvent(EventType.REMOVED, found)


class Store:
    """A subnet manager that knows only one method."""

    def __init__(self) -> None:
        self.batches: queue.SimpleQueue[list[LeaseEvent] | None] = queue.SimpleQueue()

    def watch_leases(self, *_: object) -> Iterator[list[LeaseEvent]]:
        while (batch := self.batches.get()) is not None:
            yield batch


class Device:
    """A device that is as it should be, or in trouble."""

    name = "flannel.1"

    def __init__(self) -> None:
        self.trouble = ""
        self.has_underlay = False
        self.looks = self.made = 0
        self.index = 7

    def is_touched_by(self, event: KernelEvent) -> bool:
        return isinstance(event, LinkEvent)

    def ensure(self) -> bool:
        self.looks += 1
        if self.trouble:
            raise DeviceError(self.trouble)
        return False

    def entries(self, found: Lease) -> tuple[Entry, ...]:
        self.made += 1
        return peer_entries(found, self.index, 2, lambda _: False)

    def territory(self) -> Territory:
        return Territory((CONFIG.network,), self.index)

    def prepare(self) -> None:
        """There is nothing to import."""

    def waiting(self) -> int:
        return self.index if self.has_underlay else 0


class Kernel:
    """Stands in for the reconciler: keeps what is wanted, in a dictionary."""

    def __init__(self) -> None:
        self.wanted: dict[Slot, Entry] = {}
        self.events: queue.SimpleQueue[list[KernelEvent]] = queue.SimpleQueue()
        self.in_step = False
        self.worked = self.held = 0
        self.written: list[Entry] = []
        """What went into the kernel at once; the rest is held."""
        self.overdue = False
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)

    def tell(self, events: list[KernelEvent]) -> None:
        self.events.put(events)
        os.eventfd_write(self._bell, 1)

    def fileno(self) -> int:
        return self._bell

    def handle(self) -> list[KernelEvent]:
        os.eventfd_read(self._bell)
        return self.events.get()

    def set_all(self, entries: Iterable[Entry], _: Territory, _spare: object) -> None:
        self.wanted = {entry.slot: entry for entry in entries}
        self.in_step = True

    def update(self, put: Sequence[Entry], drop: Iterable[Slot]) -> None:
        for slot in drop:
            self.wanted.pop(slot, None)
        self.wanted.update((entry.slot, entry) for entry in put)
        self.written += [entry for entry in put if self.held not in (ALL, entry.oif)]

    def due(self) -> float | None:
        return 0.0 if self.overdue else None

    def hold(self, device: int) -> None:
        self.held = device

    def work(self) -> None:
        self.worked += 1
        self.overdue = False

    def close(self) -> None:
        os.close(self._bell)


class CountingEvent(threading.Event):
    """Counts how often the loop went round."""

    rounds = 0

    def is_set(self) -> bool:
        self.rounds += 1
        return super().is_set()


class Running:
    """A network whose loop runs, with all that it talks to."""

    def __init__(self) -> None:
        self.store, self.device, self.kernel = Store(), Device(), Kernel()
        self.stop = CountingEvent()
        self.ready = threading.Event()
        store: Any = self.store
        self.network = PeerNetwork(
            manager=store,
            config=CONFIG,
            lease=lease(200, "02:00:00:00:00:01", "10.97.0.1"),
            mtu=1450,
            device=self.device,
            former_subnet=None,
            neighbours=True,
        )

    def batch(self, *events: LeaseEvent) -> None:
        self.store.batches.put(list(events))

    def wait(self, check: object, what: str) -> None:
        assert callable(check)
        end = time.monotonic() + 10
        while not check():
            assert time.monotonic() < end, what
            time.sleep(0.005)

    def wait_peers(self, *leases: Lease) -> None:
        wanted = {e.slot: e for found in leases for e in self.device.entries(found)}
        self.wait(lambda: self.kernel.wanted == wanted, f"{wanted}, not {self.kernel.wanted}")


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Running]:
    monkeypatch.setattr(logging.getLogger("flanneld"), "propagate", True)
    monkeypatch.setattr(device, "FAILED", 0.05)
    monkeypatch.setattr(device, "GAP", 0.01)
    running = Running()
    monkeypatch.setattr(peers, "Reconciler", lambda **_: running.kernel)
    with caplog.at_level(logging.INFO, "flanneld"), _loop(running):
        yield running


@contextmanager
def _loop(running: Running) -> Iterator[None]:
    thread = threading.Thread(target=running.network.run, args=(running.stop, running.ready.set))
    thread.start()
    try:
        yield
    finally:
        running.stop.set()
        running.store.batches.put(None)
        running.network.wake()
        thread.join(5)
    assert not thread.is_alive()


def test_two_leases_with_one_mac_share_the_fdb_entry_until_both_are_gone(net: Running) -> None:
    old, new = lease(1), lease(2, index=2)
    net.batch(added(old))
    net.wait_peers(old)
    net.batch(added(new))
    net.wait_peers(old, new)
    net.batch(removed(old))
    net.wait_peers(new)
    moved = lease(2, ip="10.97.0.3", index=3)
    net.batch(added(moved))
    net.wait_peers(moved)
    net.batch(removed(moved))
    net.wait_peers()


def test_the_first_peers_entries_are_made_once(net: Running) -> None:
    """With 10,000 peers that is a part of the start that can be seen."""
    first, second = lease(1, "02:00:00:00:00:0a"), lease(2, "02:00:00:00:00:0b")
    net.batch(added(first), added(second))
    assert net.ready.wait(5)
    assert net.device.made == 2
    net.wait_peers(first, second)


def test_they_may_come_and_go_in_one_batch_in_any_order(net: Running) -> None:
    a, b = lease(1), lease(2, index=2)
    net.batch(added(a))
    net.batch(added(b), removed(a))
    net.wait_peers(b)
    net.batch(removed(b), added(a))
    net.wait_peers(a)


def test_of_two_leases_with_one_mac_the_newer_says_where_it_is(net: Running) -> None:
    old, new = lease(1, ip="10.97.0.2", index=1), lease(2, ip="10.97.0.3", index=2)
    # In the first batch as in a later one.
    net.batch(added(new), added(old))
    net.wait_peers(old, new)
    net.batch(removed(new))
    net.wait_peers(old)
    net.batch(added(new))
    net.wait_peers(old, new)


def test_a_host_that_takes_anothers_mac_away_gives_it_back(net: Running) -> None:
    a, b = lease(1, MAC_A, "10.97.0.2"), lease(2, MAC_A, "10.97.0.3", 2)
    net.batch(added(a))
    net.batch(added(b))
    net.wait_peers(a, b)
    other = lease(2, MAC_B, "10.97.0.3", 3)
    net.batch(added(other))
    net.wait_peers(a, other)


def test_the_device_comes_first_and_its_trouble_is_said_once(
    net: Running, caplog: pytest.LogCaptureFixture
) -> None:
    net.batch(added(lease(1)))
    assert net.ready.wait(5)
    net.device.trouble = "cannot set up flannel.1: there is no eth0"
    before = net.device.looks
    net.kernel.tell(TOUCHED)
    net.wait(lambda: net.device.looks > before + 2, "tries")
    # Nothing is written to a device that is not there; it waits for it.
    net.kernel.overdue, worked = True, net.kernel.worked
    looks = net.device.looks
    net.wait(lambda: net.device.looks > looks + 2, "more tries")
    assert net.kernel.worked == worked
    net.device.trouble = ""
    net.wait(lambda: net.kernel.worked > worked, "the reconciler's work")
    lines = [r.getMessage() for r in caplog.records if "eth0" in r.getMessage()]
    assert lines == ["cannot set up flannel.1: there is no eth0 (trying again every second)"]
    assert "The device flannel.1 is in order again" in caplog.text


def test_what_needs_only_the_external_interface_is_kept_while_the_device_is_in_trouble(
    net: Running,
) -> None:
    net.batch(added(lease(1)))
    assert net.ready.wait(5)
    assert net.kernel.held == 0
    net.device.trouble, net.device.has_underlay = "cannot make flannel.1: no memory", True
    net.kernel.tell(TOUCHED)
    net.wait(lambda: net.kernel.held == net.device.index, "its entries to be held")
    net.kernel.overdue, worked = True, net.kernel.worked
    net.kernel.tell([])
    net.wait(lambda: net.kernel.worked > worked, "the reconciler's work")
    assert net.kernel.held == net.device.index
    net.batch(added(lease(2, MAC_B)))
    net.wait_peers(lease(1), lease(2, MAC_B))
    assert net.kernel.written == []
    net.device.trouble = ""
    net.wait(lambda: net.kernel.held == 0, "its entries to be held no longer")


def test_without_the_external_interface_the_entries_of_new_peers_wait_too(net: Running) -> None:
    net.batch(added(lease(1)))
    assert net.ready.wait(5)
    net.device.trouble = "cannot set up flannel.1: there is no eth0"
    net.kernel.tell(TOUCHED)
    net.wait(lambda: net.kernel.held == ALL, "everything to be held")
    net.batch(added(lease(2, MAC_B)))
    net.wait_peers(lease(1), lease(2, MAC_B))
    assert net.kernel.written == []
    net.device.trouble = ""
    net.wait(lambda: net.kernel.held == 0, "nothing to be held")
    net.batch(added(lease(3, "02:00:00:00:00:0c")))
    net.wait(lambda: len(net.kernel.written) == 3, "the next one's entries")


@pytest.mark.parametrize("overdue", [False, True])
def test_before_the_first_leases_are_known_it_waits_without_a_spin(
    net: Running, overdue: bool
) -> None:
    """The store may be away at this moment, for long."""
    net.kernel.overdue = overdue
    net.kernel.tell(TOUCHED)
    net.wait(lambda: net.device.looks == 1, "a look at the device")
    rounds = net.stop.rounds
    time.sleep(0.2)
    assert net.stop.rounds - rounds < 5
    net.batch()
    assert net.ready.wait(5)


# The vxlan device as a PeerDevice


class Flaky(VxlanDevice):
    """A device that is made anew, but at first will not take its address."""

    def __init__(self) -> None:
        ip = IPv4Address("10.97.0.1")
        super().__init__(
            VxlanSpec("flannel.1", 1, "eth0", ip, 8472, False, False, 1450, "02:00:00:00:00:01")
        )
        self.refuses = False

    def ensure(self) -> None:
        self.underlay_index, self.has_underlay = 2, True

    def ensure_address(self, *_: object) -> None:
        if self.refuses:
            raise DeviceError("cannot set the address of flannel.1: no buffer space available")


def test_entries_are_made_anew_also_when_the_new_device_first_gave_trouble() -> None:
    device = Flaky()
    link = VxlanLink(device, False, lease(1), (CONFIG.network,))
    device.index = 3
    assert link.ensure()
    assert not link.ensure()
    device.index, device.refuses = 4, True
    with pytest.raises(DeviceError):
        link.ensure()
    # Until it is in order they are made for the one before, whose entries wait.
    assert {entry.oif for entry in link.entries(lease(2))} == {3} == {link.waiting()}
    device.refuses = False
    assert link.ensure()
    assert not link.ensure()
    assert {entry.oif for entry in link.entries(lease(2))} == {4}


@pytest.mark.parametrize(
    ("index", "name", "touched"),
    [
        (3, "flannel.1", True),
        (3, "renamed", True),
        (9, "flannel.1", True),
        (2, "eth0", True),
        (9, "eth0", True),
        (9, "cni0", False),
    ],
)
def test_which_devices_matter(index: int, name: str, touched: bool) -> None:
    device = Flaky()
    link = VxlanLink(device, False, lease(1), (CONFIG.network,))
    device.index = 3
    link.ensure()
    for deleted in (False, True):
        assert link.is_touched_by(LinkEvent(Link(index, name, True), deleted)) == touched
