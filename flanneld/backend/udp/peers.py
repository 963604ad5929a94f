"""Which peer a packet goes to, and whether a packet may come from a peer."""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network


@dataclass(frozen=True, slots=True)
class PeerRoute:
    """A peer's subnet and the public address its tunnel is reached at."""

    subnet: IPv4Network
    public_ip: IPv4Address


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    """A peer's public address, as routes lead to it."""

    ip: str
    address: tuple[str, int]
    """The same with the port, as a socket takes it."""
    device: str
    """The address of its TUN device, the first of the route's subnet."""


# Destinations remembered, at 100 bytes each. A scan through the network must not eat memory.
_CACHED = 4096


class RouteTable:
    """The peers' subnets. A lookup costs the same for one peer and for ten thousand.

    Longest prefix first: one dictionary per prefix length (as a rule there is one length), and
    what was found is remembered per destination.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._by_length: dict[int, dict[int, Peer]] = {}
        self._lengths: tuple[tuple[int, dict[int, Peer]], ...] = ()
        self._peers: dict[str, Peer] = {}
        self._routes_of: dict[str, int] = {}
        self._cache: dict[bytes, Peer | None] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_length.values()))

    def set(self, routes: Iterable[PeerRoute]) -> None:
        """Add routes; one to a subnet that has a route replaces it."""
        for route in routes:
            length = route.subnet.prefixlen
            table = self._by_length.setdefault(length, {})
            key = int(route.subnet.network_address) >> (32 - length)
            peer = self._use(route)
            self._release(table.get(key))
            table[key] = peer
        self._changed()

    def remove(self, subnets: Iterable[IPv4Network]) -> None:
        """Remove the routes to exactly these subnets; an unknown one is no error."""
        for subnet in subnets:
            table = self._by_length.get(subnet.prefixlen, {})
            key = int(subnet.network_address) >> (32 - subnet.prefixlen)
            self._release(table.pop(key, None))
        self._changed()

    def replace(self, routes: Iterable[PeerRoute]) -> None:
        """Make these all the routes there are."""
        self._by_length = {}
        self._peers = {}
        self._routes_of = {}
        self.set(routes)

    def lookup(self, address: bytes) -> Peer | None:
        """Return the peer of an address (4 bytes), None without a route."""
        try:
            return self._cache[address]
        except KeyError:
            pass
        number = int.from_bytes(address, "big")
        found = None
        for shift, table in self._lengths:
            found = table.get(number >> shift)
            if found is not None:
                break
        if len(self._cache) >= _CACHED:
            self._cache.clear()
        self._cache[address] = found
        return found

    def knows(self, public_ip: str) -> bool:
        """Return whether this is the public address of a peer."""
        return public_ip in self._peers

    def _use(self, route: PeerRoute) -> Peer:
        ip = str(route.public_ip)
        self._routes_of[ip] = self._routes_of.get(ip, 0) + 1
        device = str(route.subnet.network_address)
        peer = self._peers.get(ip)
        if peer is None or peer.device != device:
            peer = self._peers[ip] = Peer(ip, (ip, self._port), device)
        return peer

    def _release(self, peer: Peer | None) -> None:
        if peer is None:
            return
        self._routes_of[peer.ip] -= 1
        if not self._routes_of[peer.ip]:
            del self._routes_of[peer.ip], self._peers[peer.ip]

    def _changed(self) -> None:
        self._cache.clear()
        lengths = sorted(self._by_length, reverse=True)
        self._lengths = tuple(
            (32 - length, self._by_length[length]) for length in lengths if self._by_length[length]
        )
