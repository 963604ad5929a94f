"""The lease monitor: keeps our lease, in the foreground, for as long as the daemon runs."""

import logging
import queue
import threading
from collections import deque
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import uniform

from flanneld.clock import now
from flanneld.errors import LeaseLost, StoreError
from flanneld.heartbeat import STORE, Heartbeat, Pulse
from flanneld.logs import go_duration
from flanneld.retry import REPEAT, essence
from flanneld.subnet.lease import Lease
from flanneld.subnet.manager import LeaseState, LeaseStatus, SubnetManager

log = logging.getLogger(__name__)

# Seconds between tries of a renewal; the original's.
RETRY = 60.0

# A plain wait does not count the time a host is suspended. Looking at the clock this often, in
# seconds, makes the first renewal after a resume due at once.
LOOK = 30.0

# A renewal comes up to this part of its wait early, at random. Each one is told to every host: if
# 2,000 that started together renewed together, it would be four million messages in a moment.
EARLY = 0.1

# Seconds until a lost lease that could not be put back is tried again.
RETRY_LOST = 1.0

# A lease that is altered more often than this many times within that many seconds is fought over
# by hosts that advertise one public IP. Giving up is better than a storm of writes.
FIGHTS, FIGHT_TIME = 3, 60.0


class LeaseMonitor:
    """Renews a lease in time and takes it back if it is lost; see `run`."""

    def __init__(self, manager: SubnetManager, lease: Lease, margin: float) -> None:
        """``margin`` is how many seconds before its end the lease is renewed at the latest."""
        self._manager = manager
        self._lease = lease
        self._margin = margin
        self._inbox: queue.SimpleQueue[LeaseStatus | BaseException | None] = queue.SimpleQueue()
        # Indexes of our own writes, so that their echo in the watch is recognised.
        self._written: deque[int] = deque([lease.modified_index], maxlen=64)
        # The store has our value, as far as we know.
        self._published = True
        self._failure: frozenset[str] = frozenset()
        self._said_at = 0.0
        # A write that failed may have been carried out all the same.
        self._in_doubt = False
        self._altered: deque[float] = deque(maxlen=FIGHTS)
        self._renew_at: float | None = None
        self._ends_at = 0.0
        # Seconds by which the next renewal is to be early.
        self._early = 0.0
        self._plan(lease)

    def fail(self, error: BaseException) -> None:
        """Make `run` raise ``error``: another thread of the daemon has died of it."""
        self._inbox.put(error)

    def feed(self, stop: threading.Event, heart: Heartbeat | None = None) -> None:
        """Pass on what the store says of our lease, until ``stop``. Runs in a thread of its own."""
        pulse = heart.pulse("own lease") if heart else None
        for status in self._manager.watch_lease(self._lease, stop, pulse):
            self._inbox.put(status)

    def run(self, stop: threading.Event, heart: Heartbeat | None = None) -> None:
        """Keep the lease until ``stop``.

        Raises LeaseLost if another host has the subnet, and what `fail` was given.
        """
        pulse = heart.pulse("lease monitor") if heart else Pulse()
        while not stop.is_set():
            wait = self._wait()
            pulse.beat(wait)
            try:
                item = self._inbox.get(timeout=wait)
            except queue.Empty:
                item = None
            pulse.beat(STORE)
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                self._handle(item)
            if self._renew_at is not None and now() >= self._renew_at and not stop.is_set():
                self._renew()

    def _wait(self) -> float:
        if self._renew_at is None:
            return LOOK
        return min(max(self._renew_at - now(), 0.0), LOOK)

    def _handle(self, status: LeaseStatus) -> None:
        stored = status.lease
        if status.state is LeaseState.TAKEN:
            raise LeaseLost(status.detail)
        if status.state is LeaseState.ABSENT:
            self._put_back()
        elif status.state is LeaseState.ALTERED:
            self._restore(stored, status.detail)
        elif stored.modified_index in self._written:
            # Echoes come in order: an older write seen after this one was brought by a backup.
            while self._written[0] != stored.modified_index:
                self._written.popleft()
            if stored.modified_index == self._lease.modified_index:
                # Its remaining time, fresh from the store. Whether it has an end, too: a store
                # that went back gives an index of ours to another write.
                self._lease = stored
                self._schedule(stored)
        elif not self._lease.modified_index:
            # Put back by a write whose answer was lost: nobody has looked for overlaps yet.
            self._renew()
        elif stored.modified_index < self._lease.modified_index:
            log.warning("The store went back in time: publishing the lease again")
            self._lease = stored
            self._renew()
        else:
            self._accept(stored)

    def _put_back(self) -> None:
        """The lease was deleted, expired, or lost with the store's data."""
        log.warning("Lease of %s is gone from the store: taking it back", self._lease.subnet)
        if self._lease.is_reservation:
            log.warning("It was a reservation; it comes back as a lease: reserve it anew if needed")
        # No index: the key is expected to be absent.
        self._lease = replace(self._lease, ttl=0, modified_index=0)
        self._published = False
        self._renew()

    def _restore(self, stored: Lease, detail: str) -> None:
        """Somebody wrote other attributes, or garbage, into our key."""
        log.warning(
            "Lease of %s was altered by somebody else, restoring it (%s). If another host has the"
            " public IP %s too, give each its own by --public-ip or --iface",
            stored.subnet,
            detail,
            self._lease.attrs.public_ip,
        )
        if len(self._altered) == FIGHTS and now() - self._altered[0] < FIGHT_TIME:
            raise LeaseLost(
                f"another host keeps writing the lease of {stored.subnet} with our public IP"
                f" {self._lease.attrs.public_ip}: give each host its own by --public-ip or --iface"
            )
        self._altered.append(now())
        # Who writes our public IP without an end reserves the subnet for us. Nonsense without an
        # end reserves nothing: then the lease stays what it was.
        nonsense = stored.attrs == self._lease.attrs
        ttl = self._lease.ttl if nonsense else stored.ttl
        self._lease = replace(self._lease, ttl=ttl, modified_index=stored.modified_index)
        self._published = False
        self._renew()

    def _accept(self, stored: Lease) -> None:
        """Our key was written anew with our attributes: by a write of ours whose answer was lost,
        or by an operator who changed its lifetime."""
        if not self._in_doubt:
            log.warning(
                "Lease of %s was rewritten by somebody else. If that was not you, another host may"
                " have the public IP %s too",
                stored.subnet,
                stored.attrs.public_ip,
            )
        self._in_doubt = False
        self._lease = stored
        self._written.append(stored.modified_index)
        self._plan(stored)

    def _renew(self) -> None:
        try:
            self._lease = self._manager.keep_lease(self._lease)
        except StoreError as error:
            self._in_doubt = True
            pause = RETRY
            if not self._published:
                pause = RETRY_LOST
            elif self._ends_at - now() < 4 * RETRY:
                pause = max(RETRY_LOST, (self._ends_at - now()) / 4)
            self._renew_at = now() + pause
            self._say_failure(error, pause)
            return
        self._in_doubt, self._published, self._failure = False, True, frozenset()
        self._written.append(self._lease.modified_index)
        if self._lease.ttl is not None:
            end = datetime.now(UTC) + timedelta(seconds=self._lease.ttl)
            log.info("Lease renewed, new expiration: %s UTC", end.strftime("%Y-%m-%d %H:%M:%S %z"))
        self._plan(self._lease)

    def _say_failure(self, error: StoreError, pause: float) -> None:
        """When its reason is another, and once a minute: it may be tried every second for days."""
        reason = essence(str(error))
        if reason != self._failure or now() - self._said_at >= REPEAT:
            self._failure, self._said_at = reason, now()
            wait = "1 min" if pause == RETRY else f"{pause:.0f} s"
            log.error("Error renewing lease (trying again in %s): %s", wait, error)

    def _plan(self, lease: Lease) -> None:
        """After a write: choose the moment of the next one."""
        wait = max(0.0, (lease.ttl or 0) - self._margin)
        self._early = uniform(0.0, EARLY) * wait  # noqa: S311 - spreads hosts, keeps no secret
        self._schedule(lease)
        self._log_schedule()

    def _schedule(self, lease: Lease) -> None:
        if lease.ttl is None:
            self._renew_at = None
            return
        self._ends_at = now() + lease.ttl
        self._renew_at = self._ends_at - self._margin - self._early

    def _log_schedule(self) -> None:
        if self._renew_at is None:
            log.info("Lease of %s is a reservation: it is never renewed", self._lease.subnet)
        else:
            wait = round((self._renew_at - now()) * 1_000_000_000)
            log.info("Waiting for %s to renew lease", go_duration(wait))
