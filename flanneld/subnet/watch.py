"""Snapshot plus watch: which leases the peers hold, from what the store says.

`LeaseTracker` is the one place where a snapshot and the events after it are merged. It is pure:
the caller brings snapshots, events and the time, and gets the changes.

The algorithm. ``index`` is a high-water mark: everything up to it is contained in the known
leases. A snapshot is compared with the known leases whole, attributes too, since a peer may have
changed its MAC or address while nobody looked. An event at or below the mark is old news. A
renewal changes nothing and yields nothing. A key that becomes unreadable, or whose lease must not
be used, counts as gone.

A lease that is gone is used for `LINGER` seconds more: a host whose lease was deleted by mistake,
or expired, takes it back within milliseconds, and no packet should fall into that gap. One that is
only found missing in a snapshot is used for `UNSEEN` seconds: an outage hid how it went, and its
host comes out of that outage a moment later than we do.

A store that went back in time (emptied, or restored from a backup) is believed in what it adds,
not in what it lacks: its peers are still there, and will publish their leases again. So what it
lost is held, with the attributes last known, until the first of these: an event for that key;
another key that takes the same range or the same public IP; the end of the lease as last known.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address

from flanneld.subnet.gojson import shown
from flanneld.subnet.lease import BadLease, Lease, overlap, parse_lease
from flanneld.subnet.store import Change, Node, Snapshot, StoreEvent

# Seconds. Long for a host that takes its lease back, short for one that has left.
LINGER = 1.0

# Seconds. Longer than the longest pause between two looks at a store that was away, and a request.
# A backup that lacks few writes shows in nothing but the missing keys, as etcd itself writes some
# at its start and so comes past our mark.
UNSEEN = 4.0

# Seconds by which two readings of one lease's end may differ: the store counts whole seconds.
_TTL_SLACK = 3.0

# How long a lost reservation is held: it has no end of its own. As long as a lease.
HOLD_RESERVATION = 86400.0


class EventType(Enum):
    """What became of a peer's lease."""

    ADDED = "added"
    """New, or changed: then `LeaseEvent.previous` is what it was."""
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class LeaseEvent:
    """One change of the set of peers' leases."""

    type: EventType
    lease: Lease
    previous: Lease | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    lease: Lease
    ends: float


class LeaseTracker:
    """The peers' leases as known here; turns what the store says into changes of them."""

    def __init__(self, own: str, reject: Callable[[Lease], str | None]) -> None:
        """``own`` is the name of this host's key, which is nobody's business here.

        ``reject`` says why a readable lease must not be used, or None if it may.
        """
        self.index = 0
        self._own = own
        self._reject = reject
        self._known: dict[str, _Known] = {}
        # The hashes of the values they were read from: in a snapshot most keys are as they were,
        # and need not be read again. The index does not tell: a restored store gives it twice.
        self._values: dict[str, int] = {}
        # What is gone from the store, and what it has in its place: nothing, or an older lease.
        self._held: dict[str, Lease | None] = {}
        # Of the held ones: by public IP, how many of each length, and no end comes before this.
        self._held_by_ip: dict[IPv4Address, set[str]] = {}
        self._held_lengths: Counter[int] = Counter()
        self._next_end = math.inf
        self._ignored: dict[str, str] = {}
        self._notes: list[str] = []

    def leases(self) -> list[Lease]:
        """Return the leases in use now, held ones included."""
        return [known.lease for known in self._known.values()]

    def __len__(self) -> int:
        return len(self._known)

    def advance(self, index: int) -> None:
        """Take note that there is no event up to ``index``."""
        self.index = max(self.index, index)

    def take_notes(self) -> list[str]:
        """Return, once, what is worth a warning: each newly ignored key, and lost data."""
        notes, self._notes = self._notes, []
        return notes

    def snapshot(self, snapshot: Snapshot, now: float) -> list[LeaseEvent]:
        """Compare a snapshot with the known leases; ``now`` is in seconds of a steady clock."""
        present = {node.name for node in snapshot.nodes}
        found = {node.name: lease for node in snapshot.nodes if (lease := self._read(node))}
        self._ignored = {n: why for n, why in self._ignored.items() if n in present}
        went_back = self._went_back(snapshot, found)
        self.index = snapshot.index
        missing = self._known.keys() - found.keys()
        lost = {n for n in missing - present if went_back or n in self._held}
        for name in missing - lost:
            self._leave(name, now, LINGER if name in present else UNSEEN)
        before = len(self._held)
        for name in lost:
            self._hold(name, None)
        if went_back:
            for name in self._known.keys() & found.keys():
                if _may_be_older(found[name], self._known[name], now):
                    self._hold(name, found[name])
        events: list[LeaseEvent] = []
        for name, lease in found.items():
            if not self._held and name in self._known and lease is self._known[name].lease:
                continue  # as it was, and there is nothing whose place it takes
            if name not in self._held or not _same_write(self._held[name], lease):
                events += self._take(name, lease, now)
        self._note_held(before)
        return events + self.expire(now)

    def event(self, event: StoreEvent, now: float) -> list[LeaseEvent]:
        """Apply one event of the store."""
        if event.index <= self.index:
            return []
        self.index = event.index
        if event.change is Change.ALL_GONE:
            before = len(self._held)
            for name in self._known:
                self._hold(name, None)
            self._ignored.clear()
            self._note_held(before)
            return self.expire(now)
        lease = self._read(event.node) if event.node else None
        if lease is not None:
            return self._take(event.name, lease, now)
        if event.node is None:
            self._ignored.pop(event.name, None)
        self._leave(event.name, now, LINGER)
        return []

    def due(self, now: float) -> float | None:
        """Return the seconds until `expire` may have something to do; None if nothing is held."""
        return max(0.0, self._next_end - now) if self._held else None

    def expire(self, now: float) -> list[LeaseEvent]:
        """Give up the held leases whose time is over."""
        events: list[LeaseEvent] = []
        if now < self._next_end:
            return events
        for name in list(self._held):
            # Giving one up can give up another before its turn.
            if name in self._held and self._known[name].ends <= now:
                events += self._give_up(name, now)
        self._next_end = min((self._known[name].ends for name in self._held), default=math.inf)
        return events

    def _went_back(self, snapshot: Snapshot, found: dict[str, Lease]) -> bool:
        """Tell whether the store knows less than it once told us.

        The index alone does not show it: a store that was emptied may have come past our mark
        again. But a key whose index went back, or all keys gone at one stroke, shows it too.
        """
        if snapshot.index < self.index:
            return True
        believed = self._known.keys() - self._held.keys()
        if believed and not snapshot.nodes:
            return True
        return any(
            found[name].modified_index < self._known[name].lease.modified_index
            for name in believed & found.keys()
        )

    def _read(self, node: Node) -> Lease | None:
        if node.name == self._own:
            return None
        known, value = self._known.get(node.name), hash(node.value)
        # One that is held may be known by another write than the one that was read last; and a
        # reservation, which has no end of its own, is held for a time from here on.
        if (
            known is not None
            and known.lease.ttl is not None
            and node.name not in self._held
            and known.lease.modified_index == node.index
            and self._values.get(node.name) == value
        ):
            return known.lease
        try:
            lease = parse_lease(node.name, node.value, node.ttl, node.index)
            reason = self._reject(lease)
        except BadLease as error:
            reason = str(error)
        if reason is None:
            self._ignored.pop(node.name, None)
            self._values[node.name] = value
            return lease
        if self._ignored.get(node.name) != reason:
            self._ignored[node.name] = reason
            self._notes.append(f"Ignoring bad subnet node {shown(node.name)}: {reason}")
        return None

    def _take(self, name: str, lease: Lease, now: float) -> list[LeaseEvent]:
        events: list[LeaseEvent] = []
        self._let_go(name)
        before = self._known.get(name)
        if before is None or before.lease is not lease:
            ends = now + (HOLD_RESERVATION if lease.ttl is None else lease.ttl)
            self._known[name] = _Known(lease, ends)
        for other in self._replaced_by(lease):
            if other in self._held:
                events += self._give_up(other, now)
        if before is None:
            events.append(LeaseEvent(EventType.ADDED, lease))
        elif before.lease.attrs != lease.attrs:
            events.append(LeaseEvent(EventType.ADDED, lease, before.lease))
        return events

    def _leave(self, name: str, now: float, linger: float) -> None:
        known = self._known.get(name)
        if known is not None:
            ends = min(known.ends, now + linger) if name in self._held else now + linger
            self._known[name] = _Known(known.lease, ends)
            self._hold(name, None)

    def _hold(self, name: str, instead: Lease | None) -> None:
        """Use a lease on, though the store has ``instead``."""
        if name not in self._held:
            lease = self._known[name].lease
            self._held_by_ip.setdefault(lease.attrs.public_ip, set()).add(name)
            self._held_lengths[lease.subnet.prefixlen] += 1
        self._held[name] = instead
        self._next_end = min(self._next_end, self._known[name].ends)

    def _let_go(self, name: str) -> Lease | None:
        """Hold a lease no longer; return what the store has in its place."""
        if name in self._held:
            lease = self._known[name].lease
            self._held_by_ip[lease.attrs.public_ip].discard(name)
            if not self._held_by_ip[lease.attrs.public_ip]:
                del self._held_by_ip[lease.attrs.public_ip]
            self._held_lengths[lease.subnet.prefixlen] -= 1
        return self._held.pop(name, None)

    def _replaced_by(self, lease: Lease) -> list[str]:
        """Return the held leases that end with a new one: of its host, or of its range.

        Ranges of one length are the same or apart, so that nothing has to be compared: 10,000
        hosts that come back after a wipe must not cost the square of it.
        """
        if not self._held:
            return []
        names = list(self._held_by_ip.get(lease.attrs.public_ip, ()))
        if any(n for length, n in self._held_lengths.items() if length != lease.subnet.prefixlen):
            subnet = lease.subnet
            names += [n for n in self._held if overlap(subnet, self._known[n].lease.subnet)]
        return names

    def _note_held(self, before: int) -> None:
        if len(self._held) > before:
            self._notes.append(
                f"The store has lost {len(self._held) - before} leases (emptied, or restored from"
                " backup?): the ways to their hosts are kept until they publish them again"
            )

    def _give_up(self, name: str, now: float) -> list[LeaseEvent]:
        """Hold a lease no longer: what the store has in its place counts."""
        instead = self._let_go(name)
        if instead is not None:
            return self._take(name, instead, now)
        self._values.pop(name, None)
        return [LeaseEvent(EventType.REMOVED, self._known.pop(name).lease)]


def _may_be_older(lease: Lease, known: _Known, now: float) -> bool:
    """Tell whether a store that went back may hold an older state of a lease than the one known.

    Not if it was written after the last write we know of, as no backup holds that: it has a later
    index, or it ends later.
    """
    later = lease.ttl is not None and now + lease.ttl > known.ends + _TTL_SLACK
    written_later = later or lease.modified_index > known.lease.modified_index
    return lease.attrs != known.lease.attrs and not written_later


def _same_write(held: Lease | None, lease: Lease) -> bool:
    return held is not None and (held.modified_index, held.attrs) == (
        lease.modified_index,
        lease.attrs,
    )
