"""What the backends with kernel entries share: from the peers' leases to the kernel.

A backend brings its device and a pure function from a peer's lease to the peer's route; following
the leases, and keeping the kernel in step with them, is done here for all.
"""

import logging
import math
import select
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Network
from typing import Protocol

from flanneld.backend.device import Device, DeviceWatch, remove_former
from flanneld.backend.feed import LeaseFeed, Line, log_changes
from flanneld.errors import DeviceError
from flanneld.heartbeat import IDLE, Heartbeat, Pulse
from flanneld.kernel.reconcile import ALL, Reconciler
from flanneld.kernel.state import Entry, Found, Route, Slot, Territory, contains
from flanneld.retry import Sparing
from flanneld.subnet.config import Config
from flanneld.subnet.gojson import shown
from flanneld.subnet.lease import BadLease, Lease
from flanneld.subnet.manager import SubnetManager
from flanneld.subnet.watch import EventType, LeaseEvent

log = logging.getLogger(__name__)


# Readings of kernel events one after the other, without a pause between, until work goes on.
STORM = 200


class PeerDevice(Device, Protocol):
    """A device whose peers are kernel entries."""

    def prepare(self) -> None:
        """Have at hand what any later `ensure` may take: for when the start is over."""
        ...

    def entries(self, lease: Lease) -> tuple[Entry, ...]:
        """Return what a peer needs in the kernel, in the order in which it must be written.

        A pure function of the lease and the device's indexes, as of the last `ensure` that went
        well. Raises BadLease.
        """
        ...

    def territory(self) -> Territory:
        """Return what is ours to remove."""
        ...

    def waiting(self) -> int:
        """Return the index whose entries must wait while the device cannot be mended.

        The others are kept meanwhile. 0: there is no interface for them either, so all wait.
        """
        ...


class PeerNetwork:
    """A `Network` whose peers are kernel entries on one device."""

    def __init__(
        self,
        *,
        manager: SubnetManager,
        config: Config,
        lease: Lease,
        mtu: int,
        device: PeerDevice,
        former_subnet: IPv4Network | None,
        neighbours: bool = False,
    ) -> None:
        """``former_subnet`` is this host's subnet in its former run, if known.

        ``neighbours``: the entries comprise neighbours and FDB entries.
        """
        self.lease = lease
        self.mtu = mtu
        self._network = config.network
        self._feed = LeaseFeed(manager, config, lease)
        self._device = device
        self._watch = DeviceWatch(device)
        self._former_subnet = former_subnet
        self._neighbours = neighbours
        self._peers: dict[IPv4Network, tuple[Entry, ...]] = {}
        self._leases: dict[IPv4Network, Lease] = {}
        self._users: Counter[Slot] = Counter()
        self._ignored: dict[IPv4Network, str] = {}
        self._warn = Sparing(log.log)
        self._placed = False
        """All entries have been made, for a device that was there."""
        self._asked = False

    def wake(self) -> None:
        """See `Network.wake`."""
        self._feed.wake()

    def report(self) -> None:
        """See `Network.report`."""
        self._asked = True
        self._feed.wake()

    def run(
        self, stop: threading.Event, synced: Callable[[], None], heart: Heartbeat | None = None
    ) -> None:
        """See `Network.run`."""
        heart = heart or Heartbeat()
        try:
            reconciler = Reconciler(neighbours=self._neighbours)
        except OSError as error:
            raise DeviceError(
                f"cannot listen to the kernel: {error.strerror} (is AF_NETLINK allowed?)"
            ) from error
        try:
            self._feed.start(stop, heart.pulse("leases"))
            self._loop(reconciler, stop, synced, heart.pulse("backend"))
        finally:
            reconciler.close()

    def _loop(
        self,
        reconciler: Reconciler,
        stop: threading.Event,
        synced: Callable[[], None],
        pulse: Pulse,
    ) -> None:
        poll = select.poll()
        poll.register(self._feed, select.POLLIN)
        poll.register(reconciler, select.POLLIN)
        complete = announced = False
        storm = 0
        while not stop.is_set():
            pulse.beat(IDLE)
            wait = min(self._wait(reconciler, complete), IDLE)
            ready = {fd for fd, _ in poll.poll(wait * 1000)}
            batch = self._feed.take() if self._feed.fileno() in ready else None
            if batch is not None:
                self._take_batch(reconciler, batch, complete)
                complete = True
            storm = storm + 1 if reconciler.fileno() in ready else 0
            if storm:
                self._watch.note(reconciler.handle())
            if self._watch.due() == 0.0:
                anew = self._ensure_device()
                if anew and complete:
                    self._set_all(reconciler)
            # First the device; meanwhile the reconciler remembers what was touched. While more
            # events come, one of them may be the device's: with it go thousands of entries.
            if complete and storm % STORM == 0 and self._may_work(reconciler):
                reconciler.work()
            if reconciler.in_step and not announced:
                announced = True
                synced()
                remove_former(self._former_subnet, self._device.name)
                self._device.prepare()
            if self._asked:
                self._asked = False
                self._say_state(reconciler)

    def _wait(self, reconciler: Reconciler, complete: bool) -> float:
        """Return the seconds until there is something to do, without an event."""
        times = [self._watch.due()]
        if complete and self._may_work(reconciler):
            times.append(reconciler.due())
        return min((time for time in times if time is not None), default=math.inf)

    def _may_work(self, reconciler: Reconciler) -> bool:
        """Tell whether entries may be written: all of them, or those of a device in order."""
        waiting = self._hold(reconciler)
        return waiting not in (0, ALL) or not self._watch.is_planned

    def _hold(self, reconciler: Reconciler) -> int:
        """Have the entries wait that need a device in trouble; return which, as for `hold`."""
        in_trouble = self._watch.trouble and self._placed
        waiting = self._device.waiting() or ALL if in_trouble else 0
        reconciler.hold(waiting)
        return waiting

    def _take_batch(
        self, reconciler: Reconciler, batch: Sequence[LeaseEvent], complete: bool
    ) -> None:
        """Apply a batch of events; with the first the peers are completely known."""
        if not complete:
            self._ensure_device()
        put, drop = self._changes(batch)
        if self._placed:
            self._hold(reconciler)
            reconciler.update(put, drop)
        elif not self._watch.is_planned:
            # Those of the first batch were made just now, for the device as it is.
            self._set_all(reconciler, remake=complete)

    def _ensure_device(self) -> bool:
        """Mend the device. Return whether the entries have to be made anew."""
        anew = self._watch.look()
        return not self._watch.is_planned and (anew or not self._placed)

    def _say_state(self, reconciler: Reconciler) -> None:
        log.info(
            "State: leased %s, %d peers, %s; device %s: %s",
            *(self.lease.subnet, len(self._peers), reconciler.summary()),
            *(self._device.name, self._watch.trouble or "in order"),
        )

    def _changes(self, batch: Sequence[LeaseEvent]) -> tuple[list[Entry], list[Slot]]:
        """Note what a batch of events means for the peers, and return it as entries."""
        put: dict[Slot, Entry] = {}
        drop: dict[Slot, None] = {}
        lines: list[Line] = []
        for event in batch:
            lease, subnet = event.lease, event.lease.subnet
            before = self._peers.pop(subnet, ())
            self._leases.pop(subnet, None)
            self._users.subtract(_shareable(before))
            for entry in before:
                put.pop(entry.slot, None)
                drop[entry.slot] = None
            entries = self._read_peer(event)
            if entries:
                self._peers[subnet], self._leases[subnet] = entries, lease
                self._users.update(_shareable(entries))
                for entry in entries:
                    put[entry.slot] = entry
                    drop.pop(entry.slot, None)
                lines.append(("Subnet added: %s via %s", subnet, lease.attrs.public_ip))
            elif before:
                lines.append(("Subnet removed: %s", subnet))
        log_changes(lines)
        self._keep_shared(put, drop)
        return list(put.values()), list(drop)

    def _keep_shared(self, put: dict[Slot, Entry], drop: dict[Slot, None]) -> None:
        """Have the newest of several peers in a slot that is to be written or dropped.

        A host that got another subnet has two leases with the same MAC until the older one ends.
        """
        shared = {slot for slot in drop if self._users[slot] > 0}
        for slot in drop.keys() - shared:
            del self._users[slot]
        shared |= {slot for slot in put if self._users[slot] > 1}
        if not shared:
            return
        for entry in self._entries():
            if entry.slot in shared:
                put[entry.slot] = entry
                drop.pop(entry.slot, None)

    def _entries(self) -> Iterator[Entry]:
        """Yield the entries of all peers; where two have the same slot, the newer lease's last."""
        for subnet, _ in sorted(self._leases.items(), key=lambda item: item[1].modified_index):
            yield from self._peers[subnet]

    def _read_peer(self, event: LeaseEvent) -> tuple[Entry, ...]:
        """Return what the peer needs; nothing if it is gone or of no use, which is said once."""
        lease, subnet = event.lease, event.lease.subnet
        own, theirs = self.lease.attrs.backend_type, lease.attrs.backend_type
        if event.type is EventType.REMOVED:
            self._ignored.pop(subnet, None)
            return ()
        if theirs != own:
            problem = f"Ignoring non-{own} subnet({subnet}): type={shown(theirs)}"
        else:
            try:
                entries = self._device.entries(lease)
            except BadLease as error:
                problem = f"Ignoring subnet({subnet}) of {lease.attrs.public_ip}: {error}"
            else:
                self._ignored.pop(subnet, None)
                return entries
        if self._ignored.get(subnet) != problem:
            self._ignored[subnet] = problem
            self._warn(problem)
        return ()

    def _set_all(self, reconciler: Reconciler, *, remake: bool = True) -> None:
        """Compare the kernel with all entries, which are made anew before, or just have been."""
        if remake:
            self._peers = {s: self._device.entries(lease) for s, lease in self._leases.items()}
            self._users = Counter(s for peer in self._peers.values() for s in _shareable(peer))
        # At the first comparison the kernel may have something that a former run left.
        spare = None if reconciler.in_step else self._may_be_a_peers
        reconciler.set_all(self._entries(), self._device.territory(), spare)
        self._placed = True

    def _may_be_a_peers(self, found: Found) -> bool:
        """Tell whether an entry of a former run may be that of a peer which the store has lost.

        Not if the store knows whose subnet it is, and not under another Network or SubnetLen.
        Neighbours and FDB entries harm nobody without their route.
        """
        entry = found.entry
        if not isinstance(entry, Route):
            return True
        subnet, own = entry.dst, self.lease.subnet
        like_ours = subnet.prefixlen == own.prefixlen and contains(self._network, subnet)
        return like_ours and subnet != own and subnet not in self._ignored


def _shareable(entries: Sequence[Entry]) -> Iterator[Slot]:
    """Yield the slots in which two peers can meet; a route's is the peer's own subnet."""
    return (entry.slot for entry in entries if not isinstance(entry, Route))
