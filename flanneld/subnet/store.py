"""What a key-value store must promise so that hosts can lease subnets through it.

`LeaseStore` is the small face of etcd that the subnet manager needs; `etcdv2` implements it.
The keys are the names directly below ``<prefix>/subnets``, such as ``10.5.34.0-24``.

The contract, which everything above relies on:

* A write is always conditional. `LeaseStore.create` succeeds only if the key is absent,
  `LeaseStore.swap` and `LeaseStore.remove` only if the key still has the index and the value of
  the node given. Nothing overwrites what somebody else has written meanwhile. The index alone
  does not tell that: a store restored from a backup gives it a second time, to another write.
* `CompareFailed` and `KeyNotFound` mean that the write was not carried out. After
  `StoreUnavailable` it may have been: the caller reads again before it decides.
* Reads are linearizable (etcd: quorum reads). Polls need not be: a member that lags behind says
  so by `Behind`.
* Indexes grow with every write to the store. A store whose index went backwards has lost data.
* Every call ends within seconds, polls within their timeout, and at once after `close`.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from flanneld.errors import StoreError


class Behind(StoreError):
    """The member asked knows less than we do: it lags, or the store went back in time."""


@dataclass(frozen=True, slots=True)
class Node:
    """One key below ``subnets``: a lease, if its name and value are readable."""

    name: str
    value: str
    ttl: int | None
    """Seconds until the store deletes the key; None for a key without expiry (a reservation)."""
    index: int
    """The store's index of the last write to this key (etcd: modifiedIndex)."""
    created_index: int = field(default=0, compare=False)
    """The store's index when the key was created (etcd: createdIndex). A swap keeps it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys below ``subnets`` at one moment; empty if the directory does not exist."""

    nodes: tuple[Node, ...]
    index: int
    """The store's index at that moment: every event up to it is contained in `nodes`."""


class Change(Enum):
    """What a `StoreEvent` did."""

    SET = auto()
    GONE = auto()
    ALL_GONE = auto()
    """The directory of leases, or one above it, was deleted."""


@dataclass(frozen=True, slots=True)
class StoreEvent:
    """One write to the store, as a poll reports it."""

    change: Change
    name: str
    """The key's name below ``subnets``; empty for ALL_GONE."""
    node: Node | None
    """The key after the write; None unless SET."""
    index: int


@dataclass(frozen=True, slots=True)
class Poll:
    """The answer to one poll."""

    event: StoreEvent | None
    """The first event after the index asked for; None if there was none until the timeout."""
    index: int
    """Nothing up to this index is missing: the index to poll after next."""
    store_index: int
    """The store's index when the poll began: how much there may be to catch up with."""


class LeaseStore(Protocol):
    """See the module's text for the promises common to all methods.

    Every method raises `StoreUnavailable` when no member answers, `StoreDenied` when the
    credentials are not good enough, and `StoreError` for any other answer of the store.
    """

    def read_config(self) -> str:
        """Return the text of the network config. Raises `KeyNotFound` if there is none."""
        ...

    def snapshot(self) -> Snapshot:
        """Return every key below ``subnets``, and the index to poll after."""
        ...

    def read(self, name: str) -> tuple[Node | None, int]:
        """Return one key, None if absent, and the index to poll after."""
        ...

    def create(self, name: str, value: str, ttl: int | None) -> Node:
        """Create a key, with ``ttl`` seconds to live. Raises `CompareFailed` if it exists."""
        ...

    def swap(self, before: Node, value: str, ttl: int | None) -> Node:
        """Write a key that still is ``before``. Raises `CompareFailed` or `KeyNotFound`."""
        ...

    def remove(self, before: Node) -> None:
        """Delete a key that still is ``before``. Raises `CompareFailed` or `KeyNotFound`."""
        ...

    def poll(self, name: str | None, after: int, timeout: float) -> Poll:
        """Wait for the first event after index ``after``, of one key or (None) of all.

        Raises `HistoryCleared` if the store no longer knows the events after ``after``, and
        `Behind` if it has not yet come as far as ``after``.
        """
        ...

    def close(self) -> None:
        """End every call that is under way in any thread, and refuse new ones."""
        ...
