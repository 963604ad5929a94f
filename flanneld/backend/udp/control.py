"""The messages between the daemon and the tunnel's process. No numpy.

They go over a SOCK_SEQPACKET pair, so each arrives whole. The daemon sends commands, each with a
number, and gets an answer with that number when the command has been carried out. The tunnel also
says what the daemon should log. Both sides come from one installation, but not always of one
moment (an upgrade under a running daemon): what cannot be understood is an error, not a guess.
"""

import enum
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from flanneld.backend.udp.peers import PeerRoute

VERSION = 2

# Exit statuses of the tunnel's process.
ENDED, FAILED, TUN_LOST = 0, 1, 3

# Operation, version, "more follows", number.
_HEADER = struct.Struct("!BBBxI")
# Subnet, prefix length, public IP.
_ROUTE = struct.Struct("!IB3xI")
# 36 KB, well below the least send buffer.
_ROUTES_IN_ONE = 3000
LONGEST_MESSAGE = _HEADER.size + _ROUTES_IN_ONE * _ROUTE.size


class Op(enum.IntEnum):
    """What a message is."""

    SET = 1
    REMOVE = 2
    REPLACE = 3
    STATISTICS = 4
    FAST_PATH = 5
    """The kernel moves packets, too, and super-packets from it begin with the body; or, if that is
    empty, it does not."""
    READY = 16
    DONE = 17
    """The answer to a command; to STATISTICS with `Counters.encode` as body."""
    SAY = 18
    """A line for the log."""


class BadMessage(Exception):
    """The other side speaks another language."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``more``: the command goes on in the next one."""

    op: Op
    number: int = 0
    body: bytes = b""
    more: bool = False

    def encode(self) -> bytes:
        """Return the bytes of one packet."""
        return _HEADER.pack(self.op, VERSION, self.more, self.number) + self.body

    @classmethod
    def decode(cls, data: bytes) -> "Message":
        """Read what `encode` wrote. Raises BadMessage."""
        try:
            op, version, more, number = _HEADER.unpack_from(data)
            if version != VERSION:
                raise BadMessage(f"version {version} instead of {VERSION}: restart flanneld")
            return cls(Op(op), number, data[_HEADER.size :], bool(more))
        except (struct.error, ValueError) as error:
            raise BadMessage(f"{len(data)} bytes that are no message: {error}") from None


def route_messages(op: Op, number: int, routes: Sequence[PeerRoute]) -> Iterator[Message]:
    """Return a command about any number of routes, in messages of bounded size."""
    starts = range(0, len(routes), _ROUTES_IN_ONE) or range(1)
    for start in starts:
        part = routes[start : start + _ROUTES_IN_ONE]
        body = b"".join(
            _ROUTE.pack(int(r.subnet.network_address), r.subnet.prefixlen, int(r.public_ip))
            for r in part
        )
        yield Message(op, number, body, more=start + _ROUTES_IN_ONE < len(routes))


def subnet_messages(number: int, subnets: Iterable[IPv4Network]) -> Iterator[Message]:
    """Return the command to remove the routes to these subnets."""
    nobody = IPv4Address(0)
    return route_messages(Op.REMOVE, number, [PeerRoute(subnet, nobody) for subnet in subnets])


def routes(body: bytes) -> list[PeerRoute]:
    """Read the routes of a message. Raises BadMessage."""
    try:
        return [
            PeerRoute(IPv4Network((subnet, length)), IPv4Address(public_ip))
            for subnet, length, public_ip in _ROUTE.iter_unpack(body)
        ]
    except (struct.error, ValueError) as error:
        raise BadMessage(f"routes: {error}") from None


@dataclass(frozen=True, slots=True)
class Settings:
    """What the tunnel's process is started with. Descriptors are numbers, -1 for none."""

    tun: int
    socket: int
    control: int
    icmp: int
    port: int
    """Of the peers' tunnels."""
    mtu: int
    """Of the TUN device: what most packets are not longer than."""
    offload: int
    source_check: bool

    def arguments(self) -> list[str]:
        """Return the command line."""
        return [str(int(getattr(self, name))) for name in self.__slots__]

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Settings":
        """Read the command line. Raises ValueError."""
        if len(arguments) != len(cls.__slots__):
            raise ValueError(f"{len(arguments)} arguments instead of {len(cls.__slots__)}")
        *numbers, check = map(int, arguments)
        tun, socket, control, icmp, port, mtu, offload = numbers
        return cls(tun, socket, control, icmp, port, mtu, offload, bool(check))
