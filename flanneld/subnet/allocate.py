"""Which subnet this host should take: one round of acquiring a lease, as a pure decision.

The caller lists the store's leases, asks :func:`decide`, and carries the answer out with a
compare-and-swap. If that fails, or after a :class:`Discard`, it lists and asks again.

Unlike v0.8.0 another host's lease is never taken, not even for the subnet this host had before.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from random import Random

from flanneld.errors import OutOfSubnets
from flanneld.subnet.config import Config
from flanneld.subnet.lease import Lease, overlap

# Hosts that start together pick at random among this many, so that few of them collide.
CANDIDATES = 100

# And among this many once another host was faster: then many start together, and with each further
# collision the store has to list all leases once more.
CONTENDED = 6400


@dataclass(frozen=True, slots=True)
class Reuse:
    """Publish this host's attributes in the lease it already has; keep its kind of TTL."""

    lease: Lease
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Discard:
    """Delete this lease of our own IP, unless it changed meanwhile; then decide again."""

    lease: Lease
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Create:
    """Create a lease for this subnet. ``previous``: it is the one the subnet file names."""

    subnet: IPv4Network
    previous: bool
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


Decision = Reuse | Discard | Create
"""What to do. ``warnings`` and ``notes`` are the lines to log, in this order; in v0.8.0's wording
where it has one."""


def compatible(subnet: IPv4Network, config: Config) -> bool:
    """Whether this host may hold ``subnet`` under ``config``."""
    return (
        subnet.prefixlen == config.subnet_len
        and config.subnet_min <= subnet.network_address <= config.subnet_max
    )


def elder(lease: Lease, leases: Iterable[Lease]) -> Lease | None:
    """Return another host's lease that has had a part of this one's range for longer, if any.

    The store compares keys, not ranges: hosts that were given different values of ``SubnetLen``
    can at one instant create keys for overlapping ranges. The key that was created first holds.
    """
    for other in leases:
        # Ranges of one length are the same, which is one key, or apart.
        if (
            other.subnet.prefixlen != lease.subnet.prefixlen
            and other.attrs.public_ip != lease.attrs.public_ip
            and (not lease.created_index or other.created_index < lease.created_index)
            and overlap(other.subnet, lease.subnet)
        ):
            return other
    return None


def decide(
    leases: Sequence[Lease],
    unreadable: Sequence[IPv4Network],
    own_ip: IPv4Address,
    previous: IPv4Network | None,
    config: Config,
    *,
    rng: Random,
    contended: bool = False,
) -> Decision:
    """Choose this host's subnet.

    ``leases`` are all leases in the store; ``unreadable`` the ranges of keys that are no
    readable lease but look taken; ``previous`` the subnet this host had, from the subnet file;
    ``contended`` is whether another host was faster than this one in an earlier round.
    In this order: a compatible lease of our own IP, unless an elder one overlaps it; the
    previous subnet if free; one of the first free subnets, at random. Raises
    :class:`OutOfSubnets` if there is none.
    """
    own = sorted(
        (lease for lease in leases if lease.attrs.public_ip == own_ip),
        # The best to keep first.
        key=lambda lease: (
            lease.subnet != previous,
            not lease.is_reservation,
            int(lease.subnet.network_address),
        ),
    )
    usable = [
        lease for lease in own if compatible(lease.subnet, config) and not elder(lease, leases)
    ]
    if usable:
        return _reuse(usable[0], own, own_ip)

    notes: list[str] = []
    warnings: list[str] = []
    for lease in own:
        found = f"Found lease ({lease.subnet}) for current IP ({own_ip}) but"
        other = elder(lease, leases)
        if other is not None:
            found = f"{found} lease {other.subnet} of {other.attrs.public_ip} has been there longer"
            remedy = "delete one of the two"
        else:
            found = f"{found} not compatible with current config"
            remedy = "delete it or change the config"
        if not lease.is_reservation:
            notes.append(f"{found}, deleting")
            return Discard(lease, tuple(notes), tuple(warnings))
        warnings.append(f"{found}, leaving it alone: it is a reservation; {remedy}")

    if previous is not None:
        found = f"Found previously leased subnet ({previous})"
        if not compatible(previous, config):
            warnings.append(
                f"{found} that is not compatible with the Etcd network config, ignoring"
            )
        elif holder := _holder(previous, leases, unreadable):
            warnings.append(f"{found}, but {holder}; taking another")
        else:
            notes.append(f"{found}, reusing")
            return Create(previous, True, tuple(notes), tuple(warnings))

    taken = [lease.subnet for lease in leases]
    taken.extend(unreadable)
    notes.append(f"Picking subnet in range {config.subnet_min} ... {config.subnet_max}")
    free = first_free(taken, config, CONTENDED if contended else CANDIDATES)
    if not free:
        raise OutOfSubnets(_out_of_subnets(config), tuple(warnings))
    subnet = IPv4Network((rng.choice(free), config.subnet_len))
    return Create(subnet, False, tuple(notes), tuple(warnings))


def _reuse(chosen: Lease, own: Iterable[Lease], own_ip: IPv4Address) -> Reuse:
    note = f"Found lease ({chosen.subnet}) for current IP ({own_ip}), reusing"
    warnings = tuple(
        f"Found lease ({lease.subnet}) for current IP ({own_ip}) too, leaving it alone: "
        f"{'delete the reservation' if lease.is_reservation else 'it expires'} "
        "unless another host has the same public IP"
        for lease in own
        if lease is not chosen
    )
    return Reuse(chosen, (note,), warnings)


def _holder(
    subnet: IPv4Network, leases: Iterable[Lease], unreadable: Iterable[IPv4Network]
) -> str | None:
    """Who has taken ``subnet`` or a part of it; ``None`` if it is free."""
    first, last = _ends(subnet)
    for lease in leases:
        start, end = _ends(lease.subnet)
        if start <= last and first <= end:
            return f"lease {lease.subnet} of {lease.attrs.public_ip} has it"
    for taken in unreadable:
        start, end = _ends(taken)
        if start <= last and first <= end:
            return f"an unreadable key in the store stands for {taken}"
    return None


def first_free(taken: Iterable[IPv4Network], config: Config, most: int = CANDIDATES) -> list[int]:
    """The first free subnets' addresses from ``subnet_min`` upwards, at most ``most``.

    Its time grows with the number of taken ranges, not with the size of the network.
    """
    base, size = int(config.subnet_min), config.subnet_size
    free: list[int] = []
    for start, stop in _gaps(taken, config):
        end = min(stop, start + most - len(free))
        free.extend(range(base + start * size, base + end * size, size))
        if len(free) == most:
            break
    return free


def _gaps(taken: Iterable[IPv4Network], config: Config) -> Iterator[tuple[int, int]]:
    """Runs of free subnets, as numbers counted from ``subnet_min``: first, one past the last."""
    base, size, count = int(config.subnet_min), config.subnet_size, _count(config)
    blocks = []
    for network in taken:
        first, last = _ends(network)
        blocks.append(((first - base) // size, (last - base) // size))
    blocks.sort()
    free_from = 0
    for first, last in blocks:
        if first >= count:
            break
        if first > free_from:
            yield free_from, first
        free_from = max(free_from, last + 1)
    if free_from < count:
        yield free_from, count


def _count(config: Config) -> int:
    """How many subnets there are to hand out."""
    return (int(config.subnet_max) - int(config.subnet_min)) // config.subnet_size + 1


def _ends(network: IPv4Network) -> tuple[int, int]:
    """First and last address. Cheaper than ``broadcast_address``, for lists of thousands."""
    first = int(network.network_address)
    return first, first + (1 << (32 - network.prefixlen)) - 1


def _out_of_subnets(config: Config) -> str:
    return (
        f"out of subnets: all {_count(config)} of length /{config.subnet_len} from "
        f"{config.subnet_min} to {config.subnet_max} are taken; delete leases no longer used, "
        "or widen Network, SubnetMin and SubnetMax"
    )
