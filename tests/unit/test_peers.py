"""From batches of lease events to what the kernel is told.

The reconciler is a double here: it applies what it is given to a dict of slots. That the kernel
does the same is tested in tests/netns.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.backend import device as device_watch
from flanneld.backend import peers
from flanneld.backend.hostgw import ExternalLink, HostGW
from flanneld.backend.peers import PeerNetwork
from flanneld.errors import DeviceError
from flanneld.heartbeat import Pulse
from flanneld.interface import ExternalInterface
from flanneld.kernel import vxlan
from flanneld.kernel.netlink import KernelEvent, LinkEvent, Overflow
from flanneld.kernel.state import (
    PROTOCOL,
    Entry,
    FdbEntry,
    Found,
    Neighbour,
    Route,
    Slot,
    Territory,
)
from flanneld.kernel.wire import Link
from flanneld.subnet.config import Config, parse_config
from flanneld.subnet.env import Previous
from flanneld.subnet.lease import BadLease, Lease, LeaseAttrs
from flanneld.subnet.manager import SubnetManager
from flanneld.subnet.watch import EventType, LeaseEvent

CONFIG = parse_config('{"Network":"10.5.0.0/16"}')
PATIENCE = 10.0
INDEX = 4  # of the device
BAD = 66  # a lease with this data is of no use


def lease(number: int, *, host: int = 0, mac: int = 0, kind: str = "vxlan") -> Lease:
    """The lease of 10.5.NUMBER.0/24 by 192.168.0.HOST; all three numbers are one unless said."""
    attrs = LeaseAttrs(IPv4Address(f"192.168.0.{host or number}"), kind, str(mac or number))
    return Lease(IPv4Network(f"10.5.{number}.0/24"), attrs, 100, 1)


OWN = lease(99)


def entries(item: Lease, oif: int) -> tuple[Entry, ...]:
    """As of a vxlan peer; its data is the last byte of its MAC."""
    if item.attrs.backend_data == str(BAD):
        raise BadLease("VtepMAC is missing")
    mac = bytes([2, 0, 0, 0, 0, int(item.attrs.backend_data or 0)])
    gateway = item.subnet.network_address
    return (
        FdbEntry(mac, item.attrs.public_ip, oif),
        Neighbour(gateway, mac, oif),
        Route(item.subnet, gateway, oif, onlink=True),
    )


class FakeDevice:
    """A `PeerDevice` that gets the next of the indexes each time somebody looks at it.

    The last index stays; 0 is a device that cannot be mended.
    """

    name = "flannel.1"

    def __init__(self, *indexes: int) -> None:
        self.indexes = list(indexes or (INDEX,))
        self.index = 0
        self.looks = 0

    def is_touched_by(self, event: KernelEvent) -> bool:
        return isinstance(event, LinkEvent) and event.link.name == self.name

    def ensure(self) -> bool:
        self.looks += 1
        index = self.indexes.pop(0) if len(self.indexes) > 1 else self.indexes[0]
        if not index:
            raise DeviceError("flannel.1 is in the way")
        before, self.index = self.index, index
        return index != before

    def entries(self, lease: Lease) -> tuple[Entry, ...]:
        return entries(lease, self.index)

    def territory(self) -> Territory:
        return Territory((CONFIG.network,), self.index)

    def prepare(self) -> None:
        """There is nothing to import."""

    def waiting(self) -> int:
        return 0


def added(item: Lease, previous: Lease | None = None) -> LeaseEvent:
    return LeaseEvent(EventType.ADDED, item, previous)


def removed(item: Lease) -> LeaseEvent:
    return LeaseEvent(EventType.REMOVED, item)


class FakeReconciler:
    """Keeps what it is told; its descriptor becomes readable for `events`."""

    def __init__(self) -> None:
        self.kernel: dict[Slot, Entry] = {}
        self.territory: Territory | None = None
        self.calls: list[str] = []
        self.spares: list[Callable[[Found], bool] | None] = []
        self.in_step = False
        self.events: list[KernelEvent] = []
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.closed = False
        self.neighbours = False

    def fileno(self) -> int:
        return self.bell

    def set_all(
        self,
        entries: Iterable[Entry],
        territory: Territory,
        spare: Callable[[Found], bool] | None,
    ) -> None:
        self.calls.append("set_all")
        self.spares.append(spare)
        self.kernel = {entry.slot: entry for entry in entries}
        assert self._has_device()
        self.territory, self.in_step = territory, True

    def update(self, put: Sequence[Entry], drop: Iterable[Slot]) -> None:
        self.calls.append("update")
        assert not {entry.slot for entry in put} & set(drop)
        for slot in drop:
            self.kernel.pop(slot, None)
        self.kernel.update((entry.slot, entry) for entry in put)
        assert self._has_device()

    def _has_device(self) -> bool:
        return all(entry.oif for entry in self.kernel.values())

    def tell(self, *events: KernelEvent) -> None:
        """Have the kernel report these."""
        self.events = list(events)
        os.eventfd_write(self.bell, 1)

    def handle(self) -> list[KernelEvent]:
        os.eventfd_read(self.bell)
        events, self.events = self.events, []
        return events

    def wait_beyond(self, calls: int) -> None:
        """Wait until there have been more calls than so many."""
        end = time.monotonic() + PATIENCE
        while len(self.calls) <= calls:
            assert time.monotonic() < end
            time.sleep(0.0005)

    def due(self) -> float | None:
        return None

    def hold(self, _device: int) -> None:
        pass

    def work(self) -> None:
        pass

    def close(self) -> None:
        os.close(self.bell)
        self.closed = True


Step = Sequence[LeaseEvent] | Callable[[FakeReconciler], object]


class Leases:
    """The subnet manager's part: yields the batches, each when the one before has been applied.

    A batch that is a tuple is not waited for.
    """

    def __init__(self, steps: Sequence[Step], reconciler: FakeReconciler) -> None:
        self.steps = steps
        self.reconciler = reconciler
        self.wake: Callable[[], None] = lambda: None
        self.finish: Callable[[], None] = lambda: None

    def watch_leases(
        self, _config: Config, own: Lease, stop: threading.Event, _pulse: Pulse
    ) -> Iterator[Sequence[LeaseEvent]]:
        assert own is OWN
        self.wake()
        for step in self.steps:
            if callable(step):
                step(self.reconciler)
                continue
            if isinstance(step, tuple):
                yield step
                continue
            before = len(self.reconciler.calls)
            yield step
            self.reconciler.wait_beyond(before)
            assert not stop.is_set()
        self.finish()


def follow(
    *steps: Step,
    device: FakeDevice | None = None,
    former: str | None = None,
    neighbours: bool = True,
) -> FakeReconciler:
    """Let a network follow the batches; return its reconciler with the state it led to."""
    reconciler = FakeReconciler()
    leases = Leases(steps, reconciler)
    network = PeerNetwork(
        manager=cast(SubnetManager, leases),
        config=CONFIG,
        lease=OWN,
        mtu=1450,
        device=device or FakeDevice(),
        former_subnet=IPv4Network(former) if former else None,
        neighbours=neighbours,
    )
    stop = threading.Event()
    synced: list[int] = []

    def finish() -> None:
        stop.set()
        network.wake()

    def make_reconciler(*, neighbours: bool) -> FakeReconciler:
        reconciler.neighbours = neighbours
        return reconciler

    leases.wake, leases.finish = network.wake, finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "Reconciler", make_reconciler)
        patch.setattr(device_watch, "GAP", 0.002)
        patch.setattr(device_watch, "FAILED", 0.03)
        network.run(stop, lambda: synced.append(len(reconciler.calls)))
    assert reconciler.closed
    assert reconciler.neighbours is neighbours
    # Said once, and not before the first batch was in the kernel.
    assert synced == ([1] if reconciler.calls else [])
    return reconciler


def wanted(*leases: Lease, oif: int = INDEX) -> dict[Slot, Entry]:
    return {entry.slot: entry for item in leases for entry in entries(item, oif)}


def pause(_reconciler: FakeReconciler) -> None:
    time.sleep(0.03)


def test_the_first_batch_is_everything() -> None:
    # Woken for nothing first: it must not take that for being in step.
    result = follow(pause, [added(lease(1)), added(lease(2))])
    assert result.calls == ["set_all"]
    assert result.kernel == wanted(lease(1), lease(2))
    assert result.territory == Territory((CONFIG.network,), INDEX)


def test_an_empty_first_batch_is_compared_with_the_kernel() -> None:
    result = follow([], neighbours=False)
    assert result.calls == ["set_all"]
    assert result.territory == Territory((CONFIG.network,), INDEX)


def test_what_a_former_run_left_for_a_peer_is_spared_the_first_time() -> None:
    """Whose subnet the store knows, or what cannot be a peer's under this config, is not."""
    another, of_no_use = lease(2, kind="host-gw"), lease(3, mac=BAD)
    result = follow(
        [added(lease(1)), added(another), added(of_no_use)],
        tell(link(7), calls=1),
        device=FakeDevice(INDEX, 7),
    )
    assert result.calls == ["set_all", "set_all"]
    spare, later = result.spares
    assert spare is not None
    assert later is None
    neighbour, fdb, route = (Found(entry, PROTOCOL) for entry in entries(lease(7), INDEX))
    assert spare(neighbour)
    assert spare(fdb)
    assert spare(route)
    for subnet in ("10.5.2.0/24", "10.5.3.0/24", "10.5.99.0/24", "10.6.1.0/24", "10.5.7.0/25"):
        there = Route(IPv4Network(subnet), IPv4Address("192.168.0.7"), INDEX)
        assert not spare(Found(there, PROTOCOL))


@pytest.mark.parametrize(
    ("batch", "left"),
    [
        pytest.param([added(lease(2))], [lease(1), lease(2)], id="new"),
        pytest.param([removed(lease(1))], [], id="gone"),
        pytest.param([removed(lease(7))], [lease(1)], id="unknown one gone"),
        pytest.param([added(lease(1, mac=8), lease(1))], [lease(1, mac=8)], id="MAC"),
        pytest.param([added(lease(1, host=8), lease(1))], [lease(1, host=8)], id="public IP"),
        pytest.param([added(lease(1, host=8, mac=9))], [lease(1, host=8, mac=9)], id="both"),
        pytest.param([removed(lease(1)), added(lease(1))], [lease(1)], id="gone and back"),
        pytest.param([added(lease(2)), removed(lease(2))], [lease(1)], id="new and gone"),
        pytest.param(
            [removed(lease(1)), added(lease(5, host=1, mac=1))],
            [lease(5, host=1, mac=1)],
            id="a host moved: its MAC stays",
        ),
        pytest.param(
            [added(lease(2, mac=1, host=1)), removed(lease(1))],
            [lease(2, mac=1, host=1)],
            id="a host moved, the other way round",
        ),
        pytest.param(
            [added(lease(1, mac=2), lease(1)), added(lease(2, mac=1), lease(2))],
            [lease(1, mac=2), lease(2, mac=1)],
            id="two exchange their MACs",
        ),
    ],
)
def test_a_later_batch(batch: list[LeaseEvent], left: list[Lease]) -> None:
    result = follow([added(lease(1))], batch)
    assert result.calls == ["set_all", "update"]
    assert result.kernel == wanted(*left)


def test_a_peer_of_another_type_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    other = lease(1, kind="host-gw")
    result = follow([added(other)], [added(other)], [added(lease(2))])
    assert result.kernel == wanted(lease(2))
    line = "Ignoring non-vxlan subnet(10.5.1.0/24): type=host-gw"
    assert caplog.text.count(line) == 1


def test_a_peer_changes_its_type_and_back(caplog: pytest.LogCaptureFixture) -> None:
    other = lease(1, kind="host-gw")
    with caplog.at_level("INFO"):
        gone = follow([added(lease(1))], [added(other, lease(1))])
        assert gone.kernel == {}
        back = follow([added(lease(1))], [added(other, lease(1))], [added(lease(1), other)])
    assert back.kernel == wanted(lease(1))
    assert caplog.text.count("Subnet removed: 10.5.1.0/24") == 2
    assert caplog.text.count("Subnet added: 10.5.1.0/24 via 192.168.0.1") == 3


def test_many_changes_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        follow([added(lease(n)) for n in range(1, 60)])
    assert "59 subnets added or removed" in caplog.text
    assert "Subnet added: " not in caplog.text


def test_a_peer_that_is_of_no_use_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    bad = lease(1, mac=BAD)
    result = follow([added(bad), added(lease(2))], [added(bad)], [removed(bad)], [added(bad)])
    assert result.kernel == wanted(lease(2))
    line = "Ignoring subnet(10.5.1.0/24) of 192.168.0.1: VtepMAC is missing"
    assert caplog.text.count(line) == 2


def test_a_peer_that_becomes_useless_is_removed(caplog: pytest.LogCaptureFixture) -> None:
    bad = lease(1, mac=BAD)
    with caplog.at_level("INFO"):
        gone = follow([added(lease(1))], [added(bad, lease(1))])
        back = follow([added(lease(1))], [added(bad, lease(1))], [added(lease(1), bad)])
    assert gone.kernel == {}
    assert back.kernel == wanted(lease(1))
    assert caplog.text.count("Subnet removed: 10.5.1.0/24") == 2


@pytest.mark.parametrize("first", [True, False])
def test_of_two_with_one_mac_the_newer_lease_counts(first: bool) -> None:
    older, newer = replace(lease(1, mac=9), modified_index=5), lease(2, mac=9)
    newer = replace(newer, modified_index=6)
    events = [added(newer), added(older)] if first else [added(older), added(newer)]
    result = follow(events)
    assert result.kernel == wanted(older, newer)
    # And what is left when one of them goes, is the other's.
    assert follow(events, [removed(newer)]).kernel == wanted(older)
    assert follow(events, [removed(older)]).kernel == wanted(newer)


# The device.


def link(index: int, name: str = FakeDevice.name, deleted: bool = False) -> LinkEvent:
    return LinkEvent(Link(index, name, True), deleted)


def tell(*events: KernelEvent, calls: int = 0) -> Callable[[FakeReconciler], None]:
    """Report events; wait until so many calls came of it, or for a moment."""

    def step(reconciler: FakeReconciler) -> None:
        before = len(reconciler.calls)
        reconciler.tell(*events)
        if calls:
            reconciler.wait_beyond(before + calls - 1)
        else:
            pause(reconciler)

    return step


@pytest.mark.parametrize("event", [link(7), link(6, deleted=True), Overflow()])
def test_entries_follow_the_device_to_its_new_index(event: KernelEvent) -> None:
    device = FakeDevice(INDEX, 7)
    result = follow(
        [added(lease(1))],
        tell(link(5, "eth0")),
        tell(event, calls=1),
        [added(lease(2, mac=1))],
        [removed(lease(1))],
        device=device,
    )
    assert result.calls == ["set_all", "set_all", "update", "update"]
    assert result.kernel == wanted(lease(2, mac=1), oif=7)
    assert result.territory == Territory((CONFIG.network,), 7)
    assert device.looks == 2


def test_a_device_in_order_is_left_alone() -> None:
    device = FakeDevice()
    result = follow([added(lease(1))], tell(link(INDEX)), tell(link(INDEX)), device=device)
    assert result.calls == ["set_all"]
    assert device.looks == 3


def test_a_storm_of_events_is_one_look() -> None:
    device = FakeDevice()
    follow([added(lease(1))], tell(*[link(INDEX)] * 500), device=device)
    assert device.looks == 2


def test_nothing_is_written_before_the_device_is_in_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = FakeDevice(0, 0, 0, INDEX)
    with caplog.at_level("INFO"):
        result = follow((added(lease(1)), added(lease(2))), (removed(lease(2)),), [], device=device)
    assert result.calls == ["set_all"]
    assert result.kernel == wanted(lease(1))
    assert caplog.text.count("flannel.1 is in the way (trying again every second)") == 1
    assert caplog.text.count("The device flannel.1 is in order again") == 1


def test_a_device_that_breaks_later_is_mended_and_its_entries_made_anew() -> None:
    device = FakeDevice(INDEX, 0, 0, 9)
    result = follow([added(lease(1))], tell(link(INDEX, deleted=True), calls=1), device=device)
    assert result.calls == ["set_all", "set_all"]
    assert result.kernel == wanted(lease(1), oif=9)


def test_leases_that_come_while_the_device_is_away_are_not_lost() -> None:
    def breaks(reconciler: FakeReconciler) -> None:
        reconciler.tell(link(INDEX, deleted=True))
        time.sleep(0.01)

    device = FakeDevice(INDEX, 0, 0, 9)
    result = follow([added(lease(1))], breaks, [added(lease(2))], wait_for(9), device=device)
    assert result.kernel == wanted(lease(1), lease(2), oif=9)


def wait_for(index: int) -> Callable[[FakeReconciler], None]:
    """Wait until the entries are those of a device with this index."""

    def step(reconciler: FakeReconciler) -> None:
        end = time.monotonic() + PATIENCE
        while reconciler.territory is None or reconciler.territory.device != index:
            assert time.monotonic() < end
            time.sleep(0.001)

    return step


def test_a_device_that_was_in_order_before_the_first_leases() -> None:
    """It may break and come back as it was between the two: then all is to be written yet."""
    device = FakeDevice(INDEX, 0, INDEX)
    result = follow(tell(link(INDEX)), [added(lease(1))], device=device)
    assert result.calls == ["set_all"]
    assert result.kernel == wanted(lease(1))


# What is left of a former run.


@pytest.mark.parametrize("failing", [False, True])
def test_a_former_device_is_removed_once_the_peers_are_reached(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: bool
) -> None:
    removals: list[tuple[IPv4Address, str]] = []

    def remove(address: IPv4Address, keep: str) -> None:
        removals.append((address, keep))
        if failing:
            raise DeviceError("flannel.9 cannot be removed")

    monkeypatch.setattr(vxlan, "remove_former", remove)
    follow([added(lease(1))], [added(lease(2))], former="10.6.7.0/24")
    assert removals == [(IPv4Address("10.6.7.0"), "flannel.1")]
    assert ("flannel.9 cannot be removed" in caplog.text) is failing


def test_without_a_former_run_nothing_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    removals: list[object] = []
    monkeypatch.setattr(vxlan, "remove_former", lambda *given: removals.append(given))
    follow([added(lease(1))])
    assert removals == []


# The device of the host-gw backend.


class GivenLease:
    """The subnet manager's other part."""

    def acquire_lease(self, _config: Config, attrs: LeaseAttrs, _stop: threading.Event) -> Lease:
        return replace(OWN, attrs=attrs)


@pytest.mark.parametrize("former", [None, "10.6.0.0/16"])
def test_host_gw_sweeps_its_network_and_the_former_one(former: str | None) -> None:
    external = ExternalInterface(1, "lo", 1500, OWN.attrs.public_ip, OWN.attrs.public_ip)
    previous = Previous(None, IPv4Network(former) if former else None)
    backend = HostGW(cast(SubnetManager, GivenLease()), external, previous)
    device = backend.register_network(CONFIG, threading.Event())._device
    assert device.name == "lo"
    outside = Route(IPv4Network("10.6.1.0/24"), OWN.attrs.public_ip, 1)
    inside = Route(IPv4Network("10.5.1.0/24"), OWN.attrs.public_ip, 1)
    assert device.territory().holds(Found(inside, PROTOCOL))
    assert device.territory().holds(Found(outside, PROTOCOL)) is bool(former)
    assert not device.territory().holds(Found(inside, 4))
    assert device.territory().device == 0


def test_host_gw_follows_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ExternalLink("eth0", (CONFIG.network,))
    indexes = {"eth0": 3}

    def if_nametoindex(name: str) -> int:
        if name not in indexes:
            raise OSError(19, "No such device")
        return indexes[name]

    monkeypatch.setattr("flanneld.backend.hostgw.socket.if_nametoindex", if_nametoindex)
    one = lease(1)
    assert device.ensure()
    assert not device.ensure()
    assert device.entries(one) == (Route(one.subnet, one.attrs.public_ip, 3),)
    del indexes["eth0"]
    with pytest.raises(DeviceError, match="external interface eth0 is gone"):
        device.ensure()
    indexes["eth0"] = 8
    assert device.ensure()
    assert device.entries(one) == (Route(one.subnet, one.attrs.public_ip, 8),)
    assert device.is_touched_by(link(8, "eth0"))
    assert device.is_touched_by(link(8, "eth0", deleted=True))
    assert not device.is_touched_by(link(9, "eth1"))


def test_the_failure_of_the_watch_is_the_networks() -> None:
    def fail(_reconciler: FakeReconciler) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        follow([added(lease(1))], fail)


NUMBERS = st.integers(1, 3)
LEASES = st.builds(
    lambda number, host, mac, kind: lease(number, host=host, mac=mac, kind=kind),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.sampled_from(["vxlan", "vxlan", "vxlan", "udp"]),
)
BATCHES = st.lists(st.lists(st.tuples(st.booleans(), LEASES), max_size=4), max_size=5)


@given(st.lists(LEASES, max_size=3, unique_by=lambda item: item.subnet), BATCHES)
def test_after_every_batch_each_slot_is_some_peers(
    first: list[Lease], batches: list[list[tuple[bool, Lease]]]
) -> None:
    peers_now = {item.subnet: item for item in first}
    steps = [[added(item) for item in first]]
    for batch in batches:
        events = []
        for add, item in batch:
            before = peers_now.pop(item.subnet, None)
            if add:
                peers_now[item.subnet] = item
                events.append(added(item, before))
            elif before:
                events.append(removed(before))
        steps.append(events)
    left = [item for item in peers_now.values() if item.attrs.backend_type == "vxlan"]
    kernel = follow(*steps).kernel
    choices: dict[Slot, set[Entry]] = {}
    for item in left:
        for entry in entries(item, INDEX):
            choices.setdefault(entry.slot, set()).add(entry)
    # Two hosts with one MAC are somebody's mistake: then either may have its FDB entry.
    assert kernel.keys() == choices.keys()
    assert all(entry in choices[slot] for slot, entry in kernel.items())
