"""What the backends with kernel entries share: from the peers' leases to the kernel.

A backend brings its device and a pure function from a peer's lease to the peer's route; following
the leases, and keeping the kernel in step with them, is done here for all.
"""

import logging
import os
import queue
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Network

from flanneld.kernel.netlink import KernelEvent, LinkEvent
from flanneld.kernel.reconcile import MANY, Reconciler, Territory
from flanneld.kernel.state import Entry, Slot
from flanneld.logs import verbose
from flanneld.subnet.config import Config
from flanneld.subnet.lease import Lease
from flanneld.subnet.manager import SubnetManager
from flanneld.subnet.watch import EventType, LeaseEvent

log = logging.getLogger(__name__)


PeerEntries = Callable[[Lease, int], tuple[Entry, ...]]
"""From a peer's lease and the index of the device to the peer's entries, in the order in which
they must be written."""


class PeerNetwork:
    """A `Network` whose peers are kernel entries on one device."""

    def __init__(
        self,
        *,
        manager: SubnetManager,
        config: Config,
        lease: Lease,
        mtu: int,
        device: str,
        entries: PeerEntries,
        previous_network: IPv4Network | None,
    ) -> None:
        """``device`` is a name; ``previous_network`` the Network of this host's former run."""
        self.lease = lease
        self.mtu = mtu
        self._manager = manager
        self._config = config
        self._device = device
        self._entries = entries
        self._networks = (config.network, previous_network or config.network)
        self._peers: dict[IPv4Network, Lease] = {}
        # How many peers want each slot: a host that has two leases has one MAC for both.
        self._users: Counter[Slot] = Counter()
        self._ignored: dict[IPv4Network, str] = {}
        self._index = 0
        self._inbox: queue.SimpleQueue[Sequence[LeaseEvent] | BaseException] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wake(self) -> None:
        """See `Network.wake`."""
        os.eventfd_write(self._bell, 1)

    def run(self, stop: threading.Event, synced: Callable[[], None]) -> None:
        """See `Network.run`."""
        log.info("Watching for new subnet leases")
        feeder = threading.Thread(target=self._feed, args=(stop,), name="leases", daemon=True)
        reconciler = Reconciler()
        try:
            feeder.start()
            self._loop(reconciler, stop, synced)
        finally:
            reconciler.close()

    def _feed(self, stop: threading.Event) -> None:
        """Bring the batches of lease events to the loop."""
        try:
            for batch in self._manager.watch_leases(self._config, self.lease, stop):
                self._inbox.put(batch)
                self.wake()
        except BaseException as error:  # noqa: BLE001 - raised again in the loop
            self._inbox.put(error)
            self.wake()

    def _loop(
        self, reconciler: Reconciler, stop: threading.Event, synced: Callable[[], None]
    ) -> None:
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        poll.register(reconciler.fileno(), select.POLLIN)
        complete = announced = False
        while not stop.is_set():
            due = reconciler.due()
            ready = {fd for fd, _ in poll.poll(None if due is None else due * 1000)}
            if self._bell in ready:
                os.eventfd_read(self._bell)
                complete = self._take_batches(reconciler, complete)
            if reconciler.fileno() in ready:
                self._follow_device(reconciler, reconciler.handle())
            if complete:
                reconciler.work()
            if reconciler.in_step and not announced:
                announced = True
                synced()

    def _take_batches(self, reconciler: Reconciler, complete: bool) -> bool:
        """Apply the batches that have come. Return whether the peers are completely known."""
        while True:
            try:
                batch = self._inbox.get_nowait()
            except queue.Empty:
                return complete
            if isinstance(batch, BaseException):
                raise batch
            if complete:
                reconciler.update(*self._changes(batch))
            else:
                # The first batch: what is left of a former run and not in it is swept.
                self._index = self._device_index()
                self._changes(batch)
                self._set_all(reconciler)
                complete = True

    def _changes(self, batch: Sequence[LeaseEvent]) -> tuple[list[Entry], list[Slot]]:
        """Note what a batch of events means for the peers, and return it as entries."""
        put: dict[Slot, Entry] = {}
        drop: dict[Slot, None] = {}
        lines = []
        for event in batch:
            lease, subnet = event.lease, event.lease.subnet
            before = self._peers.pop(subnet, None)
            for entry in self._entries(before, self._index) if before else ():
                put.pop(entry.slot, None)
                drop[entry.slot] = None
                self._users[entry.slot] -= 1
            if self._is_peer(event):
                self._peers[subnet] = lease
                for entry in self._entries(lease, self._index):
                    put[entry.slot] = entry
                    drop.pop(entry.slot, None)
                    self._users[entry.slot] += 1
                lines.append(f"Subnet added: {subnet} via {lease.attrs.public_ip}")
            elif before is not None:
                lines.append(f"Subnet removed: {subnet}")
        self._log_changes(lines)
        shared = {slot for slot in drop if self._users[slot]}
        for entry in self._all_entries() if shared else ():
            if entry.slot in shared:
                put[entry.slot] = entry
                drop.pop(entry.slot, None)
        for slot in drop:
            del self._users[slot]
        return list(put.values()), list(drop)

    @staticmethod
    def _log_changes(lines: Sequence[str]) -> None:
        if len(lines) > MANY:
            log.info("%d subnets added or removed (-v=1 lists them)", len(lines))
        level = logging.INFO if len(lines) <= MANY else verbose(1)
        for line in lines:
            log.log(level, "%s", line)

    def _is_peer(self, event: LeaseEvent) -> bool:
        """Tell whether the lease is (now) a peer's with our type; say once if it has another."""
        subnet, own = event.lease.subnet, self.lease.attrs.backend_type
        theirs = event.lease.attrs.backend_type
        if event.type is EventType.REMOVED or theirs == own:
            self._ignored.pop(subnet, None)
            return theirs == own and event.type is EventType.ADDED
        if self._ignored.get(subnet) != theirs:
            self._ignored[subnet] = theirs
            log.warning("Ignoring non-%s subnet(%s): type=%s", own, subnet, theirs)
        return False

    def _set_all(self, reconciler: Reconciler) -> None:
        entries = list(self._all_entries())
        self._users = Counter(entry.slot for entry in entries)
        reconciler.set_all(entries, Territory(self._networks))

    def _all_entries(self) -> Iterator[Entry]:
        for lease in self._peers.values():
            yield from self._entries(lease, self._index)

    def _device_index(self) -> int:
        try:
            return socket.if_nametoindex(self._device)
        except OSError:
            return self._index

    def _follow_device(self, reconciler: Reconciler, events: Sequence[KernelEvent]) -> None:
        """A device that was deleted and made anew has another index: all entries follow."""
        for event in events:
            if not isinstance(event, LinkEvent) or event.deleted:
                continue
            link = event.link
            if link.name == self._device and self._index not in (0, link.index):
                log.warning("%s has become another device: moving all routes to it", link.name)
                self._index = link.index
                self._set_all(reconciler)
