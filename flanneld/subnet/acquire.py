"""How a host gets its lease: list the leases, decide, write, and look again, until it has one.

What to take is decided in `allocate`. Log lines keep the original's wording, which people search
for.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network
from random import Random

from flanneld.clock import now
from flanneld.errors import (
    CompareFailed,
    KeyNotFound,
    OutOfSubnets,
    Stopped,
    StoreError,
    StoreSilent,
)
from flanneld.retry import Once, Outage
from flanneld.subnet.allocate import Create, Discard, Reuse, decide, elder
from flanneld.subnet.config import Config
from flanneld.subnet.gojson import shown
from flanneld.subnet.lease import (
    LEASE_TTL,
    BadLease,
    Lease,
    LeaseAttrs,
    overlap,
    parse_lease,
    subnet_key,
    taken_range,
)
from flanneld.subnet.store import LeaseStore, Node, Snapshot

log = logging.getLogger(__name__)

# Seconds between looks whether a subnet has become free.
OUT_OF_SUBNETS_PAUSE = 5.0

# Seconds. After a member was silent, or said that it was out of time, the pause is about as long as
# that took, and at most this.
LONGEST_PAUSE = 10.0


class Acquisition:
    """One host on its way to a lease."""

    def __init__(
        self,
        store: LeaseStore,
        config: Config,
        attrs: LeaseAttrs,
        previous: IPv4Network | None,
        *,
        rng: Random,
        waiting: Callable[[str], None],
        check_config: Callable[[], None],
    ) -> None:
        """``previous`` is the subnet of this host's former run, if known.

        ``waiting`` is told why there is no lease yet. ``check_config`` is called after each wait,
        and raises ConfigChanged if ``config`` is no longer what the store has.
        """
        self.listed: tuple[Snapshot, float] | None = None
        """The last list of leases, and when it came."""
        self._store = store
        self._config = config
        self._attrs = attrs
        self._previous = previous
        self._random = rng
        self._waiting = waiting
        self._check_config = check_config
        self._say = Once(log.log)
        # Subnets whose keys were created in earlier rounds.
        self._created: set[IPv4Network] = set()
        # Another host was faster in an earlier round.
        self._contended = False

    def run(self, stop: threading.Event) -> Lease:
        """Return the lease once it is ours. Raises Stopped, ConfigChanged."""
        store_away = Outage(log.log, "failed to acquire lease", steady=1.0)
        full = Outage(log.log, "failed to acquire lease", steady=OUT_OF_SUBNETS_PAUSE)
        waited = False
        while not stop.is_set():
            began = now()
            try:
                lease = self._round(waited)
            except OutOfSubnets as error:
                self._say.warn(error.warnings)
                self._waiting(str(error))
                full.failed(error, stop)
                waited = True
            except (CompareFailed, KeyNotFound):
                # Somebody was faster. A moment at random, so that the next round is not a draw.
                self._contended, waited = True, False
                stop.wait(self._random.uniform(0, 0.05))
            except StoreError as error:
                took = now() - began
                self._waiting(str(error))
                store_away.failed(error, stop)
                if isinstance(error, StoreSilent):
                    self._spare_the_store(took, stop)
                waited = True
            else:
                if lease is not None:
                    return lease
                waited = False
        raise Stopped

    def _spare_the_store(self, took: float, stop: threading.Event) -> None:
        """Pause once more, about as long as the answer ``took`` that did not come.

        So many hosts start at once that there is more to do than the store can. If all of them
        asked again at once it would work for nobody.
        """
        # The bound first: bounded afterwards, those that waited for long would ask again together.
        stop.wait(min(took, LONGEST_PAUSE / 1.5) * self._random.uniform(0.5, 1.5))

    def _list_leases(self) -> Snapshot:
        """Return all leases."""
        self.listed = None  # two lists of 10,000 leases are too many
        snapshot = self._store.snapshot()
        self.listed = snapshot, now()
        return snapshot

    def _round(self, waited: bool) -> Lease | None:
        """Take one step; return the lease once it is ours. ``waited`` before it, for whatever."""
        attrs, say = self._attrs, self._say
        snapshot = self._list_leases()
        if waited:
            # Only now: a store that has no list for us is not asked for more.
            self._check_config()
        leases, taken, bad = read_leases(snapshot.nodes)
        # Before there may be no subnet left: then these may be the reason.
        say.warn(bad)
        decision = decide(
            leases,
            taken,
            attrs.public_ip,
            self._previous,
            self._config,
            rng=self._random,
            contended=self._contended,
        )
        say.warn(decision.warnings)
        say.info(decision.notes)
        match decision:
            case Reuse(lease=found) if found.subnet in self._created and _blocked(found, taken):
                # Created a round ago, when what is unreadable now may have been another's lease.
                self._store.remove(_node_of(found, snapshot))
                return None
            case Reuse(lease=found):
                ttl = None if found.is_reservation else LEASE_TTL
                node = self._store.swap(_node_of(found, snapshot), attrs.encode(), ttl)
                return Lease(found.subnet, attrs, node.ttl, node.index, node.created_index)
            case Discard(lease=found):
                self._store.remove(_node_of(found, snapshot))
                return None
            case Create(subnet=subnet):
                self._created.add(subnet)
                node = self._store.create(subnet_key(subnet), attrs.encode(), LEASE_TTL)
                lease = Lease(subnet, attrs, node.ttl, node.index, node.created_index)
                # That the index grew by one since the first look is no proof that nothing was
                # written meanwhile: the store may have been restored.
                other, blocked = find_rival(lease, self._list_leases())
                if other is not None or blocked:
                    return None  # the next round finds it too, and gives ours up
                log.info("Allocated lease (%s) to current node (%s) ", subnet, attrs.public_ip)
                return lease


def find_rival(lease: Lease, snapshot: Snapshot) -> tuple[Lease | None, bool]:
    """Look again after a lease was created: another host may have been faster.

    Return its lease (see `elder`), and whether an unreadable key has a part of the range.
    """
    near = [
        node
        for node in snapshot.nodes
        if (found := taken_range(node.name)) and overlap(found, lease.subnet)
    ]
    leases, taken, _ = read_leases(near)
    return elder(lease, leases), _blocked(lease, taken)


def _blocked(lease: Lease, unreadable: Iterable[IPv4Network]) -> bool:
    """Tell whether a key that cannot be read has a part of the lease's range."""
    return any(overlap(found, lease.subnet) for found in unreadable if found != lease.subnet)


def read_leases(nodes: Iterable[Node]) -> tuple[list[Lease], list[IPv4Network], list[str]]:
    """Return the readable leases, the ranges of unreadable ones, and a note for each of these."""
    leases, taken, notes = [], [], []
    for node in nodes:
        try:
            leases.append(
                parse_lease(node.name, node.value, node.ttl, node.index, node.created_index)
            )
        except BadLease as error:
            notes.append(f"Ignoring bad subnet node {shown(node.name)}: {error}")
            blocked = taken_range(node.name)
            if blocked is not None:
                taken.append(blocked)
    return leases, taken, notes


def _node_of(lease: Lease, snapshot: Snapshot) -> Node:
    """Return the key that a lease was read from."""
    return next(node for node in snapshot.nodes if node.name == lease.key)
