"""`LeaseTracker` against a model store, with everything that can happen between the two.

The store is written to, loses keys by time, by hand and whole directories, and is set back to an
older copy. The watcher reads events late, twice, or not at all, and takes snapshots.
"""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flanneld.subnet.lease import BadLease, Lease, LeaseAttrs, check_peer, parse_lease
from flanneld.subnet.store import Change, Node, Snapshot, StoreEvent
from flanneld.subnet.watch import (
    HOLD_RESERVATION,
    LINGER,
    UNSEEN,
    EventType,
    LeaseEvent,
    LeaseTracker,
)

OWN = "10.5.99.0-24"
OWN_IP = IPv4Address("10.97.0.99")


def reject(lease: Lease) -> str | None:
    return check_peer(lease, IPv4Network("10.5.0.0/16"), IPv4Network("10.5.99.0/24"), OWN_IP)


def value(host: int, mac: str) -> str:
    return LeaseAttrs(IPv4Address(f"10.97.0.{host}"), "vxlan", f'"{mac}"').encode()


def usable(node: Node) -> Lease | None:
    if node.name == OWN:
        return None
    try:
        lease = parse_lease(node.name, node.value, node.ttl, node.index)
    except BadLease:
        return None
    return None if reject(lease) else lease


def _clash(one: Lease, other: Lease) -> bool:
    return one.subnet.overlaps(other.subnet) or one.attrs.public_ip == other.attrs.public_ip


@dataclass
class Key:
    value: str
    end: float | None
    index: int


@dataclass
class Store:
    """What etcd does, as far as leases are concerned."""

    index: int = 0
    keys: dict[str, Key] = field(default_factory=dict)
    log: list[StoreEvent] = field(default_factory=list)
    log_start: int = 0

    def write(self, name: str, text: str, ttl: int | None, now: float) -> None:
        self.index += 1
        self.keys[name] = Key(text, None if ttl is None else now + ttl, self.index)
        node = Node(name, text, ttl, self.index)
        self.log.append(StoreEvent(Change.SET, name, node, self.index))

    def delete(self, name: str) -> None:
        self.index += 1
        del self.keys[name]
        self.log.append(StoreEvent(Change.GONE, name, None, self.index))

    def delete_directory(self) -> None:
        self.index += 1
        self.keys.clear()
        self.log.append(StoreEvent(Change.ALL_GONE, "", None, self.index))

    def expire(self, now: float) -> None:
        for name in [n for n, key in self.keys.items() if key.end is not None and key.end <= now]:
            self.delete(name)

    def snapshot(self, now: float) -> Snapshot:
        nodes = [
            Node(name, key.value, None if key.end is None else int(key.end - now), key.index)
            for name, key in self.keys.items()
        ]
        return Snapshot(tuple(nodes), self.index)

    def copy(self) -> "Store":
        return Store(self.index, dict(self.keys), log_start=self.index)


# Few of each, so that they clash. 99 is ourselves.
NAMES = st.sampled_from(["10.5.1.0-24", "10.5.2.0-24", "10.5.0.0-22"])
HOSTS = st.sampled_from([1, 2, 1, 2, 99])
MACS = st.sampled_from(["a", "b"])
VALUES = st.builds(value, HOSTS, MACS)
TTLS = st.sampled_from([50, 86400, None, None])
WRITES = st.tuples(NAMES, VALUES, TTLS)


class Watching(RuleBasedStateMachine):
    """Rules are what happens; `_apply` judges every change that the tracker reports."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.store = Store()
        self.backups = [self.store.copy()]
        self.tracker = LeaseTracker(OWN, reject)
        self.backend: dict[str, LeaseAttrs] = {}
        # Data was lost, and the tracker may hold what was.
        self.lossy = False
        # The store went back, and the tracker has had no snapshot since.
        self.unnoticed = False
        # Names lost with the store's data, as the tracker must have noticed.
        self.lost: set[str] = set()
        # By name: the end as last known, and from when on it may be removed.
        self.ends: dict[str, float] = {}
        self.leaves: dict[str, float] = {}
        self.store.write(OWN, value(99, "a"), None, 0)
        self._resync()

    # What happens to the store.

    @rule(writes=st.lists(WRITES, min_size=1, max_size=3))
    def write(self, writes: list[tuple[str, str, int | None]]) -> None:
        self.backups.append(self.store.copy())
        for name, text, ttl in writes:
            self.store.write(name, text, ttl, self.now)

    @rule(name=st.one_of(NAMES, st.sampled_from(["10.9.1.0-24", "junk", "10.5.99.0-25"])))
    def write_badly(self, name: str) -> None:
        self.store.write(name, "garbage" if "9" not in name else value(7, "a"), 50, self.now)

    @precondition(lambda self: len(self.store.keys) > 1)
    @rule(data=st.data(), renew=st.booleans())
    def touch(self, data: st.DataObject, renew: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.store.keys.keys() - {OWN})))
        if renew:
            self.store.write(name, self.store.keys[name].value, 1000, self.now)
        else:
            self.store.delete(name)

    @rule(seconds=st.sampled_from([1, 60, 1000, 50_000]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        self.store.expire(self.now)

    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        self.store = data.draw(st.sampled_from(self.backups)).copy()
        self.store.expire(self.now)
        if OWN not in self.store.keys and data.draw(st.booleans()):
            self.store.write(OWN, value(99, "a"), None, self.now)
        self.lossy = self.unnoticed = True

    @rule()
    def delete_directory(self) -> None:
        self.store.delete_directory()
        self.store.write(OWN, value(99, "a"), None, self.now)
        self.lossy = True

    # What the watcher does.

    @rule(most=st.integers(1, 4))
    def read_events(self, most: int) -> None:
        for _ in range(most):
            self._poll()

    @rule()
    def resync(self) -> None:
        self._resync()

    @precondition(lambda self: self.store.log)
    @rule(data=st.data())
    def read_an_event_twice(self, data: st.DataObject) -> None:
        event = data.draw(st.sampled_from(self.store.log))
        if event.index <= self.tracker.index:
            assert self.tracker.event(event, self.now) == []

    @rule()
    def expire(self) -> None:
        self._apply(self.tracker.expire(self.now))

    @rule()
    def catch_up(self) -> None:
        self._read_everything()
        valid = self._valid()
        if not self.lossy:
            assert self.backend == valid
        if not self.unnoticed:
            # What is held is what the store lacks, or has an older state of.
            assert valid.keys() <= self.backend.keys()
            assert self.store.keys.keys() & self.backend.keys() <= valid.keys()

    @rule(writes=st.lists(WRITES, max_size=3))
    def settle(self, writes: list[tuple[str, str, int | None]]) -> None:
        """However much was lost: when all ends have passed, it is as the store says."""
        self._read_everything()
        if self.unnoticed:
            self._resync()
        self.now += HOLD_RESERVATION + 1
        self.store.expire(self.now)
        for name, text, ttl in writes:
            self.store.write(name, text, ttl, self.now)
        self._read_everything()
        assert self.backend == self._valid()
        self._resync()
        assert self.backend == self._valid()
        self.lossy = False
        self.lost.clear()

    # How it is judged.

    @invariant()
    def the_backend_has_the_trackers_leases(self) -> None:
        assert self.backend == {lease.key: lease.attrs for lease in self.tracker.leases()}
        assert len(self.tracker) == len(self.backend)

    @invariant()
    def due_tells_when_to_call_expire(self) -> None:
        due = self.tracker.due(self.now)
        assert due is None or due >= 0
        assert due is not None or not self.tracker.expire(self.now + 10 * HOLD_RESERVATION)

    def _valid(self) -> dict[str, LeaseAttrs]:
        leases = [usable(node) for node in self.store.snapshot(self.now).nodes]
        return {lease.key: lease.attrs for lease in leases if lease}

    def _read_everything(self) -> None:
        while self._poll():
            pass
        self._wait(UNSEEN)

    def _wait(self, seconds: float) -> None:
        """Time passes for the watcher; what the store loses by it is seen later."""
        self.now += seconds
        self._apply(self.tracker.expire(self.now))

    def _poll(self) -> bool:
        """Read the next event, or take a snapshot as the manager does; False if up to date."""
        index = self.tracker.index
        if not self.store.log_start <= index <= self.store.index:
            self._resync()
            return True
        event = next((event for event in self.store.log if event.index > index), None)
        if event is None:
            return False
        changes = self.tracker.event(event, self.now)
        lease = usable(event.node) if event.node else None
        if event.change is Change.ALL_GONE:
            self._lose(set(self.backend))
        elif lease:
            self._note_taken(lease)
        else:
            self._note_gone(event.name, LINGER)
        self._apply(changes)
        assert self.tracker.index == event.index
        for other in self.tracker.leases():
            # None is held against a newer one: what the store has in its place is used.
            if lease and other.key in self.lost and other.attrs != self._valid().get(other.key):
                assert not _clash(lease, other)
        return True

    def _resync(self) -> None:
        snapshot = self.store.snapshot(self.now)
        if snapshot.index < self.tracker.index:
            self._lose(self.backend.keys() - self.leaves.keys())
        changes = self.tracker.snapshot(snapshot, self.now)
        present = {node.name for node in snapshot.nodes}
        leases = {lease.key: lease for node in snapshot.nodes if (lease := usable(node))}
        for name in self.backend.keys() - leases.keys():
            if name not in self.lost or name in present:
                self._note_gone(name, LINGER if name in present else UNSEEN)
        after = {lease.key: lease.attrs for lease in self.tracker.leases()}
        for name, lease in leases.items():
            if after.get(name) == lease.attrs:
                self._note_taken(lease)
        self._apply(changes)
        assert self.tracker.index == snapshot.index
        assert leases.keys() <= after.keys()
        self.unnoticed = False

    def _lose(self, names: set[str]) -> None:
        self.lost |= names
        self.leaves |= {name: min(self.ends[name], self.leaves.get(name, 1e9)) for name in names}

    def _note_taken(self, lease: Lease) -> None:
        self.ends[lease.key] = self.now + (HOLD_RESERVATION if lease.ttl is None else lease.ttl)
        self.leaves.pop(lease.key, None)
        self.lost.discard(lease.key)

    def _note_gone(self, name: str, linger: float) -> None:
        if name in self.backend:
            end = min(self.ends[name], self.now + linger)
            self.leaves[name] = min(end, self.leaves.get(name, end))
        self.lost.discard(name)

    def _apply(self, changes: list[LeaseEvent]) -> None:
        """Do as a backend does, and check that each change is one, and is justified."""
        for change in changes:
            name, attrs = change.lease.key, change.lease.attrs
            before = self.backend.get(name)
            if change.type is EventType.ADDED:
                assert before != attrs
                assert before == (change.previous.attrs if change.previous else None)
                self.backend[name] = attrs
                # Also what the store has in place of one that was given up.
                self._note_taken(change.lease)
            else:
                assert before == attrs
                del self.backend[name]
                if self.leaves.pop(name, 1e9) > self.now:
                    assert self._replaced(change.lease)
                self.lost.discard(name)

    def _replaced(self, removed: Lease) -> bool:
        return any(_clash(lease, removed) for lease in self.tracker.leases())


Watching.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWatching = Watching.TestCase
