"""The subnet manager in which the hosts themselves settle who has which subnet.

The store only keeps keys and compares indexes. How a host gets its lease is `acquire`; how it keeps
the lease, and follows those of the others, is here. Log lines keep the original's wording, which
people search for.
"""

import contextlib
import logging
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Network

from flanneld.clock import now
from flanneld.errors import (
    CompareFailed,
    ConfigChanged,
    ConfigError,
    HistoryCleared,
    KeyNotFound,
    LeaseLost,
    StoreError,
    StoreUnavailable,
)
from flanneld.heartbeat import STORE, Pulse
from flanneld.logs import verbose
from flanneld.memory import Tidying
from flanneld.retry import Outage, Sparing
from flanneld.subnet.acquire import Acquisition, find_rival, read_leases
from flanneld.subnet.allocate import elder
from flanneld.subnet.config import Config, parse_config
from flanneld.subnet.lease import (
    LEASE_TTL,
    BadLease,
    Lease,
    LeaseAttrs,
    check_peer,
    parse_lease,
    parse_subnet_key,
    subnet_key,
)
from flanneld.subnet.manager import LeaseState, LeaseStatus
from flanneld.subnet.store import Behind, LeaseStore, Node, Snapshot
from flanneld.subnet.watch import LeaseEvent, LeaseTracker

log = logging.getLogger(__name__)

# Seconds. After a poll without any event the store is asked for a linearizable read: an endpoint
# cut off from its cluster would let us wait for ever. (One of several the store's client leaves.)
POLL = 20.0
OWN_POLL = 60.0

# Lost races for one key. Each loss means that somebody else made progress.
RACES = 10

# Far behind the store one snapshot is cheaper than one request for each event (0.4 ms): from
# this many events on, and more where the snapshot is large.
CATCH_UP = 16

# Seconds. What was listed for the lease is not followed if it is older: with --ip-masq a start may
# wait for ten seconds in between.
LIST_AGE = 1.0

# Seconds until a member that lags behind is asked again.
BEHIND_PAUSE = 0.2

_HISTORY_CLEARED = "Watch of subnet leases failed because etcd index outside history window"


class LocalManager:
    """A `SubnetManager` on a `LeaseStore`."""

    def __init__(
        self,
        store: LeaseStore,
        previous: IPv4Network | None,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``previous`` is the subnet of this host's former run, if known.

        ``waiting`` is told why there is no lease yet, each time that one cannot be had.
        """
        self._store = store
        self._previous = previous
        self._waiting = waiting
        self._config_text = ""
        # The last list of an acquisition, and when it came: the first of the watch.
        self._listed: tuple[Snapshot, float] | None = None
        self._random = random.Random()  # noqa: S311 - spreads hosts, keeps no secret
        # Of both watches: it is one store that is away.
        self._away = Outage(log.log, "Watch subnets", recovered="Watch subnets is back")

    def __str__(self) -> str:
        return f"Etcd Local Manager with Previous Subnet: {self._previous or '0.0.0.0/0'}"

    def network_config(self) -> Config:
        """See `SubnetManager.network_config`."""
        try:
            self._config_text = self._store.read_config()
        except KeyNotFound as absent:
            raise ConfigError(
                f"{absent}: write the network config to the key config below --etcd-prefix,"
                " or correct that flag"
            ) from absent
        return parse_config(self._config_text)

    def acquire_lease(self, config: Config, attrs: LeaseAttrs, stop: threading.Event) -> Lease:
        """See `SubnetManager.acquire_lease`."""
        acquisition = Acquisition(
            self._store,
            config,
            attrs,
            self._previous,
            rng=self._random,
            waiting=self._waiting,
            check_config=self._check_config_is_the_same,
        )
        lease = acquisition.run(stop)
        self._listed = acquisition.listed
        return lease

    def _check_config_is_the_same(self) -> None:
        """Raise ConfigChanged if it is not: after a wait, and in a store that was away."""
        if not self._config_text:
            return
        try:
            text = self._store.read_config()
        except KeyNotFound:
            text = ""
        if text != self._config_text:
            raise ConfigChanged("the network config has changed in the store")

    def keep_lease(self, lease: Lease) -> Lease:
        """See `SubnetManager.keep_lease`."""
        absent = not lease.modified_index
        for _ in range(RACES):
            try:
                # Read first: in a store that went back our index can be that of another's write.
                present = None if absent else self._store.read(lease.key)[0]
                if present is None:
                    return self._put_back(lease)
                ttl = _lifetime(lease, present)
                node = self._store.swap(present, lease.attrs.encode(), ttl)
                return _renewed(lease, node)
            except KeyNotFound:
                absent = True
            except CompareFailed:
                absent = False
        raise StoreError(f"the lease of {lease.subnet} changed {RACES} times while it was written")

    def _put_back(self, lease: Lease) -> Lease:
        """Create our key anew. Raises LeaseLost if another host's lease overlaps it by now."""
        leases = read_leases(self._store.snapshot().nodes)[0]
        # It is there if the answer to an earlier try was lost.
        there = [found for found in leases if found.subnet == lease.subnet]
        _check_elder(lease, elder(there[0] if there else replace(lease, created_index=0), leases))
        node = self._store.create(lease.key, lease.attrs.encode(), LEASE_TTL)
        lease = _renewed(lease, node)
        # What is unreadable is no host's that we know of: it ends no daemon that runs.
        other, _ = find_rival(lease, self._store.snapshot())
        if other is not None:
            # Or the peers would send here what is the other's. If it fails, our next start does it.
            with contextlib.suppress(StoreError):
                self._store.remove(node)
        _check_elder(lease, other)
        return lease

    def watch_lease(
        self, lease: Lease, stop: threading.Event, pulse: Pulse | None = None
    ) -> Iterator[LeaseStatus]:
        """See `SubnetManager.watch_lease`."""
        pulse = pulse or Pulse()
        name = subnet_key(lease.subnet)
        while not stop.is_set():
            pulse.beat(STORE)
            try:
                node, index = self._store.read(name)
                self._away.over()
                yield _status(lease, node)
                while not stop.is_set():
                    wait, began = self._spread(OWN_POLL), now()
                    pulse.beat(wait + STORE)
                    poll = self._store.poll(name, index, wait)
                    if poll.event is None:
                        _pause_after_idle(wait, began, stop)
                        break  # to read again: the store may have lost the key without a word
                    yield _status(lease, poll.event.node)
                    index = poll.index
            except HistoryCleared:
                log.warning(_HISTORY_CLEARED)
                stop.wait(BEHIND_PAUSE)
            except Behind:
                stop.wait(BEHIND_PAUSE)
            except StoreError as error:
                self._watch_failed(error, stop)

    def watch_leases(
        self, config: Config, own: Lease, stop: threading.Event, pulse: Pulse | None = None
    ) -> Iterator[list[LeaseEvent]]:
        """See `SubnetManager.watch_leases`."""
        pulse = pulse or Pulse()

        def reject(lease: Lease) -> str | None:
            return check_peer(lease, config.network, own.subnet, own.attrs.public_ip)

        tracker = LeaseTracker(subnet_key(own.subnet), reject)
        warn = Sparing(log.log)
        tidying = Tidying(parse_subnet_key.cache_clear)
        first = True
        while not stop.is_set():
            tidying.work(now())
            pulse.beat(STORE)
            try:
                listed, self._listed = self._listed, None
                if listed is None or now() - listed[1] > LIST_AGE:
                    del listed
                    listed = self._store.snapshot(), now()
                    self._away.over()
                events = tracker.snapshot(*listed)
                del listed
                tidying.plan(now())
                _log_notes(tracker, warn)
                if events or first:
                    first = False
                    yield events
                del events  # all leases there are, which nobody needs while they are followed
                yield from self._follow(tracker, warn, stop, pulse, tidying)
            except HistoryCleared:
                log.warning(_HISTORY_CLEARED)
                stop.wait(BEHIND_PAUSE)
            except Behind as error:
                log.log(verbose(1), "Watch subnets: %s", error)
                stop.wait(BEHIND_PAUSE)
            except StoreError as error:
                self._watch_failed(error, stop)

    def _watch_failed(self, error: StoreError, stop: threading.Event) -> None:
        """Say so, once for both watches, and pause."""
        if not stop.is_set():
            # First the connection breaks, then new ones are refused: that is no news.
            kind = "away" if isinstance(error, StoreUnavailable) else ""
            self._away.failed(error, stop, kind=kind)

    def _follow(
        self,
        tracker: LeaseTracker,
        warn: Sparing,
        stop: threading.Event,
        pulse: Pulse,
        tidying: Tidying,
    ) -> Iterator[list[LeaseEvent]]:
        """Poll after the tracker's index until a snapshot is the better way on."""
        idle = False
        while not stop.is_set():
            wait, due = self._spread(POLL), tracker.due(now())
            if due is not None:
                wait = min(wait, due + 0.01)  # a little late, so that something is due then
            began = now()
            pulse.beat(wait + STORE)
            try:
                poll = self._store.poll(None, tracker.index, wait)
            except HistoryCleared as error:
                if not idle:
                    raise
                # Others wrote 1,000 times elsewhere in the store while we waited for an event.
                log.log(verbose(1), "Watch subnets: %s", error)
                return
            idle = poll.event is None
            if poll.event is None:
                tracker.advance(poll.index)
                self._check_config()
                events = []
                _pause_after_idle(wait, began, stop)
            else:
                events = tracker.event(poll.event, now())
            events += tracker.expire(now())
            _log_notes(tracker, warn)
            if events:
                yield events
            tidying.work(now())
            if poll.store_index - tracker.index > max(CATCH_UP, len(tracker) // CATCH_UP):
                return

    def _check_config(self) -> None:
        """Make one linearizable read, and say so if the network config is another by now."""
        try:
            text = self._store.read_config()
        except KeyNotFound:
            text = ""
        except StoreUnavailable:
            raise
        except StoreError as error:
            text = f"unreadable: {error}"
        if text != self._config_text:
            self._config_text = text
            log.warning("The network config has changed in the store: restart flanneld to use it")

    def _spread(self, seconds: float) -> float:
        return seconds * self._random.uniform(0.75, 1.25)

    def close(self) -> None:
        """See `SubnetManager.close`."""
        self._store.close()


def _pause_after_idle(wait: float, began: float, stop: threading.Event) -> None:
    """A proxy that ends polls early must not make us ask without pause."""
    stop.wait(max(0.0, min(wait, 1.0) - (now() - began)))


def _log_notes(tracker: LeaseTracker, warn: Sparing) -> None:
    for note in tracker.take_notes():
        warn(note)


def _lifetime(lease: Lease, present: Node) -> int | None:
    """Return the TTL to write our lease with: none where the key is a reservation.

    Raises LeaseLost if the key is another host's.
    """
    status = _status(lease, present)
    if status.state is LeaseState.TAKEN:
        raise LeaseLost(status.detail)
    # Nonsense reserves nothing. Whoever saw it knows what the key was before.
    nonsense = status.state is LeaseState.ALTERED and status.lease.attrs == lease.attrs
    before = lease if nonsense and present.index == lease.modified_index else present
    return None if before.ttl is None else LEASE_TTL


def _renewed(lease: Lease, node: Node) -> Lease:
    return replace(lease, ttl=node.ttl, modified_index=node.index, created_index=node.created_index)


def _check_elder(lease: Lease, other: Lease | None) -> None:
    if other is not None:
        raise LeaseLost(
            f"{other.attrs.public_ip} holds {other.subnet}, which overlaps {lease.subnet}"
        )


def _status(own: Lease, node: Node | None) -> LeaseStatus:
    """Say what the store's key means for the lease we believe to hold."""
    if node is None:
        return LeaseStatus(LeaseState.ABSENT, replace(own, modified_index=0))
    try:
        stored = parse_lease(node.name, node.value, node.ttl, node.index, node.created_index)
    except BadLease as error:
        ours = replace(own, ttl=node.ttl, modified_index=node.index)
        return LeaseStatus(LeaseState.ALTERED, ours, str(error))
    if stored.attrs.public_ip != own.attrs.public_ip:
        return LeaseStatus(
            LeaseState.TAKEN, stored, f"{own.subnet} is now held by {stored.attrs.public_ip}"
        )
    if stored.attrs != own.attrs:
        return LeaseStatus(LeaseState.ALTERED, stored, f"it holds {node.value}")
    return LeaseStatus(LeaseState.HELD, stored)
