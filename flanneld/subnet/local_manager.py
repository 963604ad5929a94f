"""The subnet manager in which the hosts themselves settle who has which subnet.

The store only keeps keys and compares indexes; who may take what is decided here and in
`allocate`. Log lines keep the original's wording, which people search for.
"""

import contextlib
import logging
import random
import threading
from collections.abc import Iterator
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
    OutOfSubnets,
    Stopped,
    StoreError,
    StoreUnavailable,
)
from flanneld.heartbeat import STORE, Pulse
from flanneld.logs import verbose
from flanneld.retry import Outage
from flanneld.subnet.allocate import Create, Discard, Reuse, decide
from flanneld.subnet.config import Config, parse_config
from flanneld.subnet.lease import (
    BadLease,
    Lease,
    LeaseAttrs,
    check_peer,
    parse_lease,
    subnet_key,
    taken_range,
)
from flanneld.subnet.manager import LeaseState, LeaseStatus
from flanneld.subnet.store import Behind, LeaseStore, Node, Snapshot
from flanneld.subnet.watch import LeaseEvent, LeaseTracker

log = logging.getLogger(__name__)

# Seconds a lease lives; the original's.
LEASE_TTL = 86400

# Seconds. After a poll without any event the store is asked for a linearizable read, so that a
# member cut off from its cluster is noticed: it would let us wait for ever.
POLL = 20.0
OWN_POLL = 60.0

# Seconds between looks whether a subnet has become free.
OUT_OF_SUBNETS_PAUSE = 5.0

# Lost races for one key. Each loss means that somebody else made progress.
RACES = 10

# Far behind the store one snapshot is cheaper than one request for each event (0.4 ms): from
# this many events on, and more where the snapshot is large.
CATCH_UP = 16

# Seconds until a member that lags behind is asked again.
BEHIND_PAUSE = 0.2

_HISTORY_CLEARED = "Watch of subnet leases failed because etcd index outside history window"


class LocalManager:
    """A `SubnetManager` on a `LeaseStore`."""

    def __init__(self, store: LeaseStore, previous: IPv4Network | None) -> None:
        """``previous`` is the subnet of this host's former run, if known."""
        self._store = store
        self._previous = previous
        self._config_text = ""
        self._random = random.Random()  # noqa: S311 - spreads hosts, keeps no secret

    def __str__(self) -> str:
        return f"Etcd Local Manager with Previous Subnet: {self._previous or '0.0.0.0/0'}"

    def network_config(self) -> Config:
        """See `SubnetManager.network_config`."""
        try:
            self._config_text = self._store.read_config()
        except KeyNotFound as absent:
            raise ConfigError(
                f"{absent}: write the network config there, or correct --etcd-prefix"
            ) from absent
        return parse_config(self._config_text)

    def acquire_lease(self, config: Config, attrs: LeaseAttrs, stop: threading.Event) -> Lease:
        """See `SubnetManager.acquire_lease`."""
        store_away = Outage(log.log, "failed to acquire lease", steady=1.0)
        full = Outage(log.log, "failed to acquire lease", steady=OUT_OF_SUBNETS_PAUSE)
        said: set[str] = set()
        while not stop.is_set():
            try:
                lease = self._acquire_round(config, attrs, said)
            except OutOfSubnets as error:
                full.failed(error, stop)
                self._check_config_is_the_same()
            except (CompareFailed, KeyNotFound):
                # Somebody was faster. A moment at random, so that the next round is not a draw.
                stop.wait(self._random.uniform(0, 0.05))
            except StoreError as error:
                store_away.failed(error, stop)
            else:
                if lease is not None:
                    return lease
        raise Stopped

    def _check_config_is_the_same(self) -> None:
        """Raise ConfigChanged if waiting any longer with this config is in vain."""
        with contextlib.suppress(StoreError):
            if self._config_text and self._store.read_config() != self._config_text:
                raise ConfigChanged("the network config has changed in the store")

    def _acquire_round(self, config: Config, attrs: LeaseAttrs, said: set[str]) -> Lease | None:
        leases, taken, notes = _read_leases(self._store.snapshot())
        decision = decide(leases, taken, attrs.public_ip, self._previous, config, rng=self._random)
        for note in [*notes, *decision.notes]:
            if note not in said:
                said.add(note)
                log.info("%s", note)
        match decision:
            case Reuse(lease=found):
                ttl = None if found.is_reservation else LEASE_TTL
                name = subnet_key(found.subnet)
                node = self._store.swap(name, attrs.encode(), ttl, found.modified_index)
                return Lease(found.subnet, attrs, node.ttl, node.index)
            case Discard(lease=found):
                self._store.remove(subnet_key(found.subnet), found.modified_index)
                return None
            case Create(subnet=subnet):
                node = self._store.create(subnet_key(subnet), attrs.encode(), LEASE_TTL)
                log.info("Allocated lease (%s) to current node (%s) ", subnet, attrs.public_ip)
                return Lease(subnet, attrs, node.ttl, node.index)

    def keep_lease(self, lease: Lease) -> Lease:
        """See `SubnetManager.keep_lease`."""
        name, value = subnet_key(lease.subnet), lease.attrs.encode()
        index, ttl = lease.modified_index, None if lease.is_reservation else LEASE_TTL
        for _ in range(RACES):
            try:
                if index:
                    node = self._store.swap(name, value, ttl, index)
                else:
                    self._check_free(lease)
                    node = self._store.create(name, value, LEASE_TTL)
                return replace(lease, ttl=node.ttl, modified_index=node.index)
            except KeyNotFound:
                index = 0
            except CompareFailed:
                present, _ = self._store.read(name)
                index = 0
                if present is not None:
                    status = _status(lease, present)
                    if status.state is LeaseState.TAKEN:
                        raise LeaseLost(status.detail) from None
                    index, ttl = present.index, None if present.ttl is None else LEASE_TTL
        raise StoreError(f"the lease of {lease.subnet} changed {RACES} times while it was written")

    def _check_free(self, lease: Lease) -> None:
        """Raise LeaseLost if another lease overlaps ours while our key is absent."""
        for other in _read_leases(self._store.snapshot())[0]:
            same = other.subnet == lease.subnet
            if not same and other.subnet.overlaps(lease.subnet):
                raise LeaseLost(f"{other.attrs.public_ip} holds {other.subnet}, which overlaps it")

    def watch_lease(
        self, lease: Lease, stop: threading.Event, pulse: Pulse | None = None
    ) -> Iterator[LeaseStatus]:
        """See `SubnetManager.watch_lease`."""
        pulse = pulse or Pulse()
        name = subnet_key(lease.subnet)
        away = Outage(log.log, "Subnet watch failed", recovered="Subnet watch is back")
        while not stop.is_set():
            pulse.beat(STORE)
            try:
                node, index = self._store.read(name)
                away.over()
                yield _status(lease, node)
                while not stop.is_set():
                    wait = self._spread(OWN_POLL)
                    pulse.beat(wait + STORE)
                    poll = self._store.poll(name, index, wait)
                    if poll.event is None:
                        break  # to read again: the store may have lost the key without a word
                    yield _status(lease, poll.event.node)
                    index = poll.index
            except HistoryCleared:
                log.warning(_HISTORY_CLEARED)
                stop.wait(BEHIND_PAUSE)
            except Behind:
                stop.wait(BEHIND_PAUSE)
            except StoreError as error:
                if not stop.is_set():
                    away.failed(error, stop)

    def watch_leases(
        self, config: Config, own: Lease, stop: threading.Event, pulse: Pulse | None = None
    ) -> Iterator[list[LeaseEvent]]:
        """See `SubnetManager.watch_leases`."""
        pulse = pulse or Pulse()

        def reject(lease: Lease) -> str | None:
            return check_peer(lease, config.network, own.subnet, own.attrs.public_ip)

        tracker = LeaseTracker(subnet_key(own.subnet), reject)
        away = Outage(log.log, "Watch subnets", recovered="Watch subnets is back")
        first = True
        while not stop.is_set():
            pulse.beat(STORE)
            try:
                events = tracker.snapshot(self._store.snapshot(), now())
                away.over()
                _log_notes(tracker)
                if events or first:
                    first = False
                    yield events
                yield from self._follow(tracker, stop, pulse)
            except HistoryCleared:
                log.warning(_HISTORY_CLEARED)
                stop.wait(BEHIND_PAUSE)
            except Behind as error:
                log.log(verbose(1), "Watch subnets: %s", error)
                stop.wait(BEHIND_PAUSE)
            except StoreError as error:
                if not stop.is_set():
                    away.failed(error, stop)

    def _follow(
        self, tracker: LeaseTracker, stop: threading.Event, pulse: Pulse
    ) -> Iterator[list[LeaseEvent]]:
        """Poll after the tracker's index until a snapshot is the better way on."""
        while not stop.is_set():
            wait, due = self._spread(POLL), tracker.due(now())
            if due is not None:
                wait = min(wait, due + 0.01)  # a little late, so that something is due then
            began = now()
            pulse.beat(wait + STORE)
            poll = self._store.poll(None, tracker.index, wait)
            if poll.event is None:
                tracker.advance(poll.index)
                self._check_config()
                events = []
                # A proxy that ends polls early must not make us ask without pause.
                stop.wait(max(0.0, min(wait, 1.0) - (now() - began)))
            else:
                events = tracker.event(poll.event, now())
            events += tracker.expire(now())
            _log_notes(tracker)
            if events:
                yield events
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


def _log_notes(tracker: LeaseTracker) -> None:
    for note in tracker.take_notes():
        log.warning("%s", note)


def _read_leases(snapshot: Snapshot) -> tuple[list[Lease], list[IPv4Network], list[str]]:
    """Return the readable leases, the ranges of unreadable ones, and a note for each of these."""
    leases, taken, notes = [], [], []
    for node in snapshot.nodes:
        try:
            leases.append(parse_lease(node.name, node.value, node.ttl, node.index))
        except BadLease as error:
            notes.append(f"Ignoring bad subnet node {node.name}: {error}")
            blocked = taken_range(node.name)
            if blocked is not None:
                taken.append(blocked)
    return leases, taken, notes


def _status(own: Lease, node: Node | None) -> LeaseStatus:
    """Say what the store's key means for the lease we believe to hold."""
    if node is None:
        return LeaseStatus(LeaseState.ABSENT, replace(own, modified_index=0))
    try:
        stored = parse_lease(node.name, node.value, node.ttl, node.index)
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
