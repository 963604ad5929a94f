"""What every subnet manager must promise; `flanneld.main` and the backends know no more of it."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from flanneld.heartbeat import Pulse
from flanneld.subnet.config import Config
from flanneld.subnet.lease import Lease, LeaseAttrs
from flanneld.subnet.watch import LeaseEvent


class LeaseState(Enum):
    """What the store says of our own lease."""

    HELD = "held"
    """It is ours, with our attributes."""
    ALTERED = "altered"
    """Nobody else's, but not as we wrote it: unreadable, or with other attributes."""
    ABSENT = "absent"
    """Deleted, expired, or lost with the store's data."""
    TAKEN = "taken"
    """It holds the public IP of another host."""


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """One report about our own lease."""

    state: LeaseState
    lease: Lease
    """As stored; our own attributes where the stored ones are not readable, index 0 if absent."""
    detail: str = ""


class SubnetManager(Protocol):
    """Leases of subnets, kept in a store that all hosts share.

    The contract: no call ever takes a subnet away from another host. Every write of a lease is
    made on condition that the key is as it was when the decision was taken (compare-and-swap),
    and a host that finds another's public IP in its key gives up (`LeaseLost`) instead of
    writing. The store being unreachable is not the lease being lost: calls that wait for the
    store wait until it is back or until ``stop`` is set.
    """

    def network_config(self) -> Config:
        """Return the network config once. Raises StoreError, or ConfigError if it is unusable."""
        ...

    def acquire_lease(self, config: Config, attrs: LeaseAttrs, stop: threading.Event) -> Lease:
        """Lease a subnet for this host: its present one, its previous one, or a new one.

        Waits for the store, and for a free subnet. Raises Stopped when ``stop`` is set, and
        ConfigChanged if the network config is another, or gone, after a wait.
        """
        ...

    def keep_lease(self, lease: Lease) -> Lease:
        """Write our lease again, with a full lifetime; put it back if it is gone.

        A reservation keeps having no end. Raises LeaseLost if another host holds the subnet,
        StoreError if the store fails (the write may or may not have been carried out).
        """
        ...

    def watch_lease(
        self, lease: Lease, stop: threading.Event, pulse: Pulse | None = None
    ) -> Iterator[LeaseStatus]:
        """Yield what the store says of our lease: once at the start, then at every change.

        ``pulse`` beats while this goes on, whether the store answers or not.
        """
        ...

    def watch_leases(
        self, config: Config, own: Lease, stop: threading.Event, pulse: Pulse | None = None
    ) -> Iterator[list[LeaseEvent]]:
        """Yield the changes of the other hosts' leases, as batches.

        The first batch is everything there is, or was when the lease was taken a moment ago, and
        comes even if that is nothing. ``pulse`` as for `watch_lease`.
        """
        ...

    def close(self) -> None:
        """End every call that is under way in any thread."""
        ...
