"""The kernel state a backend wants, and what must be done to get there. Pure.

An `Entry` is a route, a neighbour or an FDB entry. Each has a slot, the key by which the kernel
tells it from others: a route its destination (in the main table, with metric 0 and TOS 0), a
neighbour its address and device, an FDB entry its MAC and device. A slot in which ours stands is
ours: what somebody puts there instead is replaced. Where something else stood before us, only what
we or the original wrote gives way. Outside of these slots only what is marked as ours is touched.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

# Marks our routes (`ip route show proto 102`). Not assigned in iproute2's rt_protos up to 6.12.
PROTOCOL = 102

# What the original's routes carry, as all those that are added without a protocol (RTPROT_BOOT).
PROTOCOL_BOOT = 3

# Of plain numbers: a start with 10,000 peers looks into tables of slots half a million times, and
# the hash of an `IPv4Network` takes ten times as long.
Slot = Hashable


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast IPv4 route: main table, metric 0."""

    dst: IPv4Network
    via: IPv4Address
    """0.0.0.0 for a route straight to the device, which has scope link."""
    oif: int
    """Index of the output device."""
    onlink: bool = False
    """The gateway is taken to be on the link, whatever the addresses say."""

    @property
    def slot(self) -> Slot:
        """See the module's text."""
        return int(self.dst.network_address) << 6 | self.dst.prefixlen

    def __str__(self) -> str:
        return f"route to {self.dst}" + (f" via {self.via}" if int(self.via) else "")


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent IPv4 neighbour."""

    ip: IPv4Address
    mac: bytes
    """6 bytes"""
    oif: int

    @property
    def slot(self) -> Slot:
        """See the module's text."""
        return ("neighbour", int(self.ip), self.oif)

    def __str__(self) -> str:
        return f"neighbour {self.ip} lladdr {self.mac.hex(':')}"


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """A permanent forwarding entry of a vxlan device: the host behind a MAC."""

    mac: bytes
    """6 bytes"""
    dst: IPv4Address
    oif: int

    @property
    def slot(self) -> Slot:
        """See the module's text."""
        return ("fdb", self.mac, self.oif)

    def __str__(self) -> str:
        return f"FDB entry {self.mac.hex(':')} dst {self.dst}"


Entry = Route | Neighbour | FdbEntry


@dataclass(frozen=True, slots=True)
class Found:
    """An entry as the kernel reports it."""

    entry: Entry
    """Of a route without gateway or device, ``via`` is 0.0.0.0 and ``oif`` 0."""
    protocol: int = 0
    """Of a route; `PROTOCOL` marks ours."""
    metric: int = 0
    """Of a route."""
    tos: int = 0
    """Of a route."""
    plain: bool = True
    """Nothing about it that ours lack: a route has one next hop and no TOS, source or metrics; a
    neighbour or FDB entry is permanent, and leads to no port or network of its own."""
    permanent: bool = True
    """Of a neighbour or FDB entry: the kernel does not forget it by itself."""
    elsewhere: bytes = b""
    """Of an FDB entry that leads to a port, network or device of its own: these, as the netlink
    attributes by which the kernel tells it from others of its MAC."""

    @property
    def in_slot(self) -> bool:
        """Whether it stands where an entry of ours would."""
        return self.metric == self.tos == 0

    @property
    def may_be_replaced(self) -> bool:
        """Whether it may give way where we had nothing yet: ours, or one as the original's.

        Not the kernel's own route to a bridge, nor anybody else's.
        """
        entry = self.entry
        if not isinstance(entry, Route) or self.protocol == PROTOCOL:
            return True
        return self.protocol == PROTOCOL_BOOT and int(entry.via) != 0

    def is_written_as(self, entry: Entry) -> bool:
        """Tell whether this is the entry just as we would write it."""
        marked = self.protocol == PROTOCOL or not isinstance(entry, Route)
        return marked and self.plain and self.entry == entry


@dataclass(frozen=True, slots=True)
class Territory:
    """What is ours to remove, wanted or not."""

    networks: tuple[IPv4Network, ...]
    """Routes with our protocol number inside these. Other flannelds on this host, with other
    networks, mark their routes alike."""
    device: int = 0
    """Index of a device of ours (0: none): its permanent neighbours and FDB entries, and the
    routes through it that the original left: inside the networks, too, as what carries the
    protocol number of ``ip route`` may be anybody's, say to a network behind a peer."""

    def holds(self, found: Found) -> bool:
        """Tell whether an entry is ours."""
        entry = found.entry
        if not isinstance(entry, Route):
            return entry.oif == self.device and found.permanent
        the_originals = found.protocol == PROTOCOL_BOOT and entry.oif == self.device != 0
        if found.protocol != PROTOCOL and not the_originals:
            return False
        return any(contains(network, entry.dst) for network in self.networks)


@dataclass(frozen=True, slots=True)
class Difference:
    """What leads from the found state to the wanted one."""

    write: tuple[Entry, ...]
    """To add, or to replace what stands in the slot; in the order given by what is wanted."""
    delete: tuple[Found, ...]

    def without(self, is_held: Callable[[Entry], bool]) -> "Difference":
        """Return what is left when some of the entries are left alone."""
        return Difference(
            tuple(entry for entry in self.write if not is_held(entry)),
            tuple(item for item in self.delete if not is_held(item.entry)),
        )


def difference(
    wanted: Mapping[Slot, Entry], found: Iterable[Found], ours: Callable[[Found], bool]
) -> Difference:
    """Compare what is wanted with what was found.

    ``ours`` says whether a found entry that is not wanted is ours to remove. Applying the result
    and comparing again gives nothing to do.
    """
    first: dict[Slot, Found] = {}
    delete = []
    for item in found:
        slot = item.entry.slot
        if item.in_slot and slot in wanted:
            # Of several routes in a slot the first counts; it is replaced by the write.
            first.setdefault(slot, item)
        elif ours(item):
            delete.append(item)
    write = tuple(
        entry
        for slot, entry in wanted.items()
        if slot not in first or not first[slot].is_written_as(entry)
    )
    return Difference(write, tuple(delete))


def contains(outer: IPv4Network, inner: IPv4Network) -> bool:
    """Tell whether ``inner`` lies inside ``outer``; cheaper than `IPv4Network.subnet_of`."""
    return outer.prefixlen <= inner.prefixlen and int(inner.network_address) & int(
        outer.netmask
    ) == int(outer.network_address)
