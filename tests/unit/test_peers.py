"""From batches of lease events to what the kernel is told.

The reconciler is a double here: it applies what it is given to a dict of slots. That the kernel
does the same is tested in tests/netns.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.backend import peers
from flanneld.backend.peers import PeerNetwork
from flanneld.kernel.netlink import KernelEvent, LinkEvent
from flanneld.kernel.reconcile import Territory
from flanneld.kernel.state import Entry, FdbEntry, Neighbour, Route, Slot
from flanneld.kernel.wire import Link
from flanneld.subnet.config import Config, parse_config
from flanneld.subnet.lease import Lease, LeaseAttrs
from flanneld.subnet.manager import SubnetManager
from flanneld.subnet.watch import EventType, LeaseEvent

CONFIG = parse_config('{"Network":"10.5.0.0/16"}')
PATIENCE = 10.0
LO = 1  # index of lo, which every network namespace has


def lease(number: int, *, host: int = 0, mac: int = 0, kind: str = "vxlan") -> Lease:
    """The lease of 10.5.NUMBER.0/24 by 192.168.0.HOST; all three numbers are one unless said."""
    attrs = LeaseAttrs(IPv4Address(f"192.168.0.{host or number}"), kind, str(mac or number))
    return Lease(IPv4Network(f"10.5.{number}.0/24"), attrs, 100, 1)


OWN = lease(99)


def entries(item: Lease, oif: int) -> tuple[Entry, ...]:
    """As of a vxlan peer; its data is the last byte of its MAC."""
    mac = bytes([2, 0, 0, 0, 0, int(item.attrs.backend_data or 0)])
    gateway = item.subnet.network_address
    return (
        FdbEntry(mac, item.attrs.public_ip, oif),
        Neighbour(gateway, mac, oif),
        Route(item.subnet, gateway, oif, onlink=True),
    )


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
        self.in_step = False
        self.events: list[KernelEvent] = []
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.closed = False

    def fileno(self) -> int:
        return self.bell

    def set_all(self, entries: Iterable[Entry], territory: Territory) -> None:
        self.calls.append("set_all")
        self.kernel = {entry.slot: entry for entry in entries}
        self.territory, self.in_step = territory, True

    def update(self, put: Sequence[Entry], drop: Iterable[Slot]) -> None:
        self.calls.append("update")
        assert not {entry.slot for entry in put} & set(drop)
        for slot in drop:
            self.kernel.pop(slot, None)
        self.kernel.update((entry.slot, entry) for entry in put)

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

    def work(self) -> None:
        pass

    def close(self) -> None:
        os.close(self.bell)
        self.closed = True


Step = Sequence[LeaseEvent] | Callable[[], object]


class Leases:
    """The subnet manager's part: yields the batches, each when the one before has been applied."""

    def __init__(self, steps: Sequence[Step], reconciler: FakeReconciler) -> None:
        self.steps = steps
        self.reconciler = reconciler
        self.wake: Callable[[], None] = lambda: None
        self.finish: Callable[[], None] = lambda: None

    def watch_leases(
        self, _config: Config, own: Lease, stop: threading.Event
    ) -> Iterator[Sequence[LeaseEvent]]:
        assert own is OWN
        self.wake()
        for step in self.steps:
            if callable(step):
                step()
                continue
            before = len(self.reconciler.calls)
            yield step
            self.reconciler.wait_beyond(before)
            assert not stop.is_set()
        self.finish()


def follow(
    *steps: Step, device: str = "lo", previous: str | None = None, own: Lease = OWN
) -> FakeReconciler:
    """Let a network follow the batches; return its reconciler with the state it led to."""
    reconciler = FakeReconciler()
    leases = Leases(steps, reconciler)
    network = PeerNetwork(
        manager=cast(SubnetManager, leases),
        config=CONFIG,
        lease=own,
        mtu=1450,
        device=device,
        entries=entries,
        previous_network=IPv4Network(previous) if previous else None,
    )
    stop = threading.Event()
    synced: list[int] = []

    def finish() -> None:
        stop.set()
        network.wake()

    leases.wake, leases.finish = network.wake, finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "Reconciler", lambda: reconciler)
        network.run(stop, lambda: synced.append(len(reconciler.calls)))
    assert reconciler.closed
    # Said once, and not before the first batch was in the kernel.
    assert synced == ([1] if reconciler.calls else [])
    return reconciler


def wanted(*leases: Lease, oif: int = LO) -> dict[Slot, Entry]:
    return {entry.slot: entry for item in leases for entry in entries(item, oif)}


def test_the_first_batch_is_everything() -> None:
    # Woken for nothing first: it must not take that for being in step.
    result = follow(lambda: time.sleep(0.03), [added(lease(1)), added(lease(2))])
    assert result.calls == ["set_all"]
    assert result.kernel == wanted(lease(1), lease(2))
    assert result.territory == Territory((CONFIG.network, CONFIG.network))


def test_an_empty_first_batch_sweeps_what_is_left() -> None:
    result = follow([], previous="10.6.0.0/16")
    assert result.calls == ["set_all"]
    assert result.territory == Territory((CONFIG.network, IPv4Network("10.6.0.0/16")))


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


def test_entries_follow_the_device_to_its_new_index() -> None:
    reconcilers: list[FakeReconciler] = []

    def link(index: int, name: str, deleted: bool = False) -> Callable[[], None]:
        def step() -> None:
            [reconciler] = reconcilers
            before = len(reconciler.calls)
            reconciler.events = [LinkEvent(Link(index, name, True), deleted)]
            os.eventfd_write(reconciler.bell, 1)
            if name == "lo" and not deleted:
                reconciler.wait_beyond(before)
            else:
                time.sleep(0.03)

        return step

    original = FakeReconciler.__init__

    def remember(self: FakeReconciler) -> None:
        original(self)
        reconcilers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeReconciler, "__init__", remember)
        result = follow(
            [added(lease(1))],
            link(5, "eth0"),
            link(6, "lo", deleted=True),
            link(7, "lo"),
            [added(lease(2, mac=1))],
            [removed(lease(1))],
        )
    assert result.calls == ["set_all", "set_all", "update", "update"]
    assert result.kernel == wanted(lease(2, mac=1), oif=7)


def test_the_failure_of_the_watch_is_the_networks() -> None:
    def fail() -> Any:
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
        for entry in entries(item, LO):
            choices.setdefault(entry.slot, set()).add(entry)
    # Two hosts with one MAC are somebody's mistake: then either may have its FDB entry.
    assert kernel.keys() == choices.keys()
    assert all(entry in choices[slot] for slot, entry in kernel.items())
