"""The steps that the fast path's programs are made of. Pure.

R6 is the packet's context, R7 the time, R8 the inner packet's length, R9 the peer; offsets named
``at``, ``outer`` or ``inner`` are places on the stack, below FP. They destroy R0 to R5, and go to
the label "pass" with whatever the programs do not take.

The stack is written from its end to its beginning: kernels before 6.8, and programs that may not do
all (CAP_PERFMON), refuse a second store into eight bytes whose first four hold a known number.

These, too, may be used under version 2 of the GPL; see `programs`.
"""

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

from flanneld.backend.udp.packet import (
    GREETING_ID,
    GSO_TCPV4,
    GSO_UDP_L4,
    NEEDS_CSUM,
    OVERHEAD,
    SECRET_BYTES,
    WHOLE_BYTES,
)
from flanneld.kernel import bpf_skb as skb
from flanneld.kernel.bpf_asm import Assembler, If, Op, Reg, Size

R0, R1, R2, R3, R4, R5 = Reg.R0, Reg.R1, Reg.R2, Reg.R3, Reg.R4, Reg.R5
R6, R7, R8, R9, FP = Reg.R6, Reg.R7, Reg.R8, Reg.R9, Reg.FP
B, H, W, DW = Size.B, Size.H, Size.W, Size.DW

# A peer in the map: public IP (network byte order), then three moments of the monotonic clock (ns):
# until when it is known to have a fast path, from when a packet has to go the slow way, and until
# when datagrams to it get the Ethernet header (destination, source, type) that is the last.
_PEER = struct.Struct("=4s4xQQQ14s2x")
PEER_IP, _PEER_FAST_UNTIL, _PEER_SLOW_AT, _PEER_ROUTED_UNTIL, PEER_ETHERNET = 0, 8, 16, 24, 32
PEER_BYTES = _PEER.size


def peer(public_ip: IPv4Address) -> bytes:
    """Return the map's value for a peer of which nothing else is known."""
    return _PEER.pack(public_ip.packed, 0, 0, 0, bytes(12) + b"\x08\x00")


COUNTERS = ("sent_packets", "sent_bytes", "received_packets", "received_bytes")
SENT, RECEIVED = 0, 2

MS = 1_000_000
FAST_MS = 15_000
"""How long one datagram without a checksum shows that its sender has a fast path."""
DOUBT_MS = 1_000
"""How long it counts as having one after a datagram with a checksum, as others send them."""
SLOW_EVERY_MS = 5_000
"""How often a packet to a peer goes the slow way; a super-packet only if no other came for long."""
SLOW_SUPER_MS = 20_000
_ROUTE_MS = 1_000

# The longest packet that is taken: with all that comes before it its length must fit into 16 bits.
LONGEST = 0xFFFF - OVERHEAD - WHOLE_BYTES

# linux/bpf.h: struct bpf_fib_lookup
_FIB_BYTES, _FIB_LENGTH, _FIB_IFINDEX, _FIB_SRC, _FIB_DST = 64, 6, 8, 16, 32
_FIB_SMAC, _FIB_DMAC, _MAC = 52, 58, 6
_AF_INET = 2
# As good as success is that the neighbour's MAC is not known yet.
_FIB_SUCCESS, _FIB_NO_NEIGHBOUR = 0, 7
ETHERNET, IP, OUTER = 14, 20, OVERHEAD
TCP, _UDP, _ICMP = 6, 17, 1
_TCP_HEADER, _TCP_CHECKSUM, _UDP_HEADER, _UDP_CHECKSUM = 20, 16, 8, 6
_TTL = 64
# Of the datagrams' IP headers, where it means nothing to others (RFC 6864); "fl".
_ID = 0x666C


_IPV4 = skb.raw16(0x0800)
# "More fragments", or an offset.
_FRAGMENT = skb.raw16(0x3FFF)


@dataclass(frozen=True, slots=True)
class Path:
    """What the programs are assembled for."""

    peers: int
    """The map of the peers (`peer`) by subnet; a descriptor."""
    counters: int
    """The map of `COUNTERS`; a descriptor."""
    address: IPv4Address
    """The external interface's, which the tunnel's socket is bound to."""
    port: int
    """The tunnels'."""
    external: int
    """The external interface's index."""
    tun: int
    """The TUN device's index."""
    inlet: int
    """Index of the device into which received TCP is put, to be joined; 0: there is none."""
    mtu: int
    """The TUN device's."""
    secret: bytes
    """What shows the tunnel's process that a super-packet comes from the program."""


def only_ipv4(a: Assembler) -> None:
    a.load(W, R1, R6, skb.PROTOCOL)
    a.jump(If.NE, R1, _IPV4, "pass")


def only_to_us(a: Assembler, path: Path, outer: int) -> None:
    """Take only the tunnel's datagrams, with one packet of R8 bytes and nothing behind it."""
    a.load(B, R1, FP, outer + 9)
    a.jump(If.NE, R1, _UDP, "pass")
    a.load(H, R1, FP, outer + 22)
    a.jump(If.NE, R1, skb.raw16(path.port), "pass")
    a.load(W, R1, FP, outer + 16)
    a.mov(R2, skb.raw(path.address.packed))
    a.jump(If.NE, R1, R2, "pass")
    a.load(B, R1, FP, outer)
    a.jump(If.NE, R1, 0x45, "pass")
    a.load(H, R1, FP, outer + 6)
    a.jump(If.SET, R1, _FRAGMENT, "pass")
    a.load(W, R8, R6, skb.LEN)
    a.jump(If.GT, R8, LONGEST + ETHERNET + OUTER, "pass")
    a.alu(Op.SUB, R8, ETHERNET + OUTER)
    skb.length_field(a, R2, R8, 8)
    a.load(H, R1, FP, outer + 24)
    a.jump(If.NE, R1, R2, "pass")


def only_plain(a: Assembler, at: int) -> None:
    """Take only whole TCP, UDP and ICMP packets of R8 bytes without IP options."""
    a.load(B, R1, FP, at)
    a.jump(If.NE, R1, 0x45, "pass")
    a.load(H, R1, FP, at + 6)
    a.jump(If.SET, R1, _FRAGMENT, "pass")
    a.load(H, R1, FP, at + 2)
    a.big_endian(R1, 16)
    a.jump(If.NE, R1, R8, "pass")
    a.load(B, R1, FP, at + 9)
    a.jump(If.EQ, R1, TCP, "plain")
    a.jump(If.EQ, R1, _ICMP, "plain")
    a.jump(If.NE, R1, _UDP, "pass")
    # One without a checksum of its own needs the datagram's, which has none here.
    a.load(H, R1, FP, at + 26)
    a.jump(If.EQ, R1, 0, "pass")
    a.label("plain")


def decrement_ttl(a: Assembler, header: int) -> None:
    """Take one off a header's TTL; pass if it expires. RFC 1624: the checksum is 0x0100 more."""
    a.load(W, R1, FP, header + 8)
    a.mov(R2, R1)
    a.alu(Op.AND, R2, 0xFF)
    a.jump(If.LE, R2, 1, "pass")
    a.mov(R2, R1)
    a.alu(Op.RSH, R2, 16)
    a.alu(Op.ADD, R2, skb.raw16(0x0100))
    # All ones is 0, too, and not what a header may have.
    a.jump(If.LT, R2, 0xFFFF, "carried")
    a.alu(Op.ADD, R2, 1)
    a.alu(Op.AND, R2, 0xFFFF)
    a.label("carried")
    a.alu(Op.LSH, R2, 16)
    a.alu(Op.AND, R1, 0xFFFF)
    a.alu(Op.SUB, R1, 1)
    a.alu(Op.OR, R1, R2)
    a.store(W, FP, header + 8, R1)


def find_peer(a: Assembler, peers: int) -> None:
    """R9 = the peer whose subnet the address in R3 is of."""
    a.alu(Op.LSH, R3, 32)
    a.alu(Op.OR, R3, 32)
    a.store(DW, FP, skb.SCRATCH, R3)
    skb.look_up(a, peers, "pass")
    a.mov(R9, R0)


def only_to_the_fast(a: Assembler, inner: int) -> None:
    """Take only what goes to a peer with a fast path, and greetings with their answers.

    These have no checksum that a device still has to complete, and any peer can read them: by them
    two fast paths get to know each other.
    """
    a.load(DW, R1, R9, _PEER_FAST_UNTIL)
    a.jump(If.GT, R1, R7, "fast")
    a.load(B, R1, FP, inner + 9)
    a.jump(If.NE, R1, _ICMP, "pass")
    a.load(H, R1, FP, inner + 24)
    a.jump(If.NE, R1, skb.raw16(GREETING_ID), "pass")
    a.goto("greeting")
    a.label("fast")
    now_and_then_slow(a)
    a.label("greeting")


def now_and_then_slow(a: Assembler) -> None:
    """Let one packet in some seconds pass, a super-packet only if there was no other for long.

    So the host's connection tracking sees that it speaks with the peer, and the tunnel's process
    that it has to greet it.
    """
    a.load(DW, R1, R9, _PEER_SLOW_AT)
    a.jump(If.GT, R1, R7, "not due")
    a.load(W, R2, R6, skb.GSO_SIZE)
    a.jump(If.EQ, R2, 0, "due")
    a.mov(R2, SLOW_SUPER_MS - SLOW_EVERY_MS)
    a.alu(Op.MUL, R2, MS)
    a.alu(Op.ADD, R1, R2)
    a.jump(If.GT, R1, R7, "not due")
    a.label("due")
    later(a, R1, SLOW_EVERY_MS)
    a.store(DW, R9, _PEER_SLOW_AT, R1)
    a.goto("pass")
    a.label("not due")


def later(a: Assembler, to: Reg, milliseconds: int) -> None:
    """``to`` = so much later than R7."""
    a.mov(to, milliseconds)
    a.alu(Op.MUL, to, MS)
    a.alu(Op.ADD, to, R7)


def check_route(a: Assembler, path: Path, at: int) -> None:
    """Take only what the host would send to the peer by the external interface, in one piece.

    The kernel is asked once in a second. With that packet R7 = 0: it has to be sent by the kernel's
    table of neighbours, which so finds them and notices that they are gone.
    """
    a.load(DW, R1, R9, _PEER_ROUTED_UNTIL)
    a.jump(If.GT, R1, R7, "known route")
    for offset in range(0, _FIB_BYTES, 8):
        a.store(DW, FP, at + offset, 0)
    a.store(H, FP, at + _FIB_LENGTH, path.mtu + OUTER)
    a.store(B, FP, at, _AF_INET)
    a.store(W, FP, at + _FIB_IFINDEX, path.tun)
    a.store(W, FP, at + _FIB_SRC, skb.raw(path.address.packed))
    a.load(W, R1, R9, PEER_IP)
    a.store(W, FP, at + _FIB_DST, R1)
    a.mov(R1, R6)
    a.mov(R2, FP)
    a.alu(Op.ADD, R2, at)
    a.mov(R3, _FIB_BYTES)
    a.mov(R4, 0)
    a.call(skb.FIB_LOOKUP)
    a.load(W, R1, FP, at + _FIB_IFINDEX)
    a.jump(If.EQ, R0, _FIB_NO_NEIGHBOUR, "routed")
    a.jump(If.NE, R0, _FIB_SUCCESS, "pass")
    a.jump(If.NE, R1, path.external, "pass")
    # Not the old one's time for half of the new header.
    a.store(DW, R9, _PEER_ROUTED_UNTIL, 0)
    skb.copy(a, (FP, at + _FIB_DMAC), (R9, PEER_ETHERNET), _MAC)
    skb.copy(a, (FP, at + _FIB_SMAC), (R9, PEER_ETHERNET + _MAC), _MAC)
    later(a, R2, _ROUTE_MS)
    a.store(DW, R9, _PEER_ROUTED_UNTIL, R2)
    a.label("routed")
    a.jump(If.NE, R1, path.external, "pass")
    a.mov(R7, 0)
    a.label("known route")


def write_outer(a: Assembler, path: Path, at: int) -> None:
    """Write the datagram's headers for R8 bytes to the peer. The UDP checksum is 0: none."""
    ids = (_ID, 0x4000)  # with "don't fragment", as a socket
    fixed = struct.pack("!BBHHHBBH4s", 0x45, 0, 0, *ids, _TTL, _UDP, 0, path.address.packed)
    skb.length_field(a, R1, R8, 8)
    a.store(W, FP, at + 24, R1)
    a.store(W, FP, at + 20, skb.raw(struct.pack("!HH", path.port, path.port)))
    a.load(W, R2, R9, PEER_IP)
    a.store(W, FP, at + 16, R2)
    skb.length_field(a, R3, R8, OUTER)
    a.store(W, FP, at + 4, skb.raw(fixed[4:8]))
    a.store(H, FP, at + 2, R3)
    a.store(H, FP, at, skb.raw(fixed[:2]))
    # The checksum of all that is known, then the length and the peer.
    a.alu(Op.ADD, R3, sum(struct.unpack("=8H", fixed)))
    a.mov(R1, R2)
    a.alu(Op.AND, R1, 0xFFFF)
    a.alu(Op.ADD, R3, R1)
    a.alu(Op.RSH, R2, 16)
    a.alu(Op.ADD, R3, R2)
    skb.fold(a, R3, R1)
    a.store(W, FP, at + 12, skb.raw(fixed[12:16]))
    a.store(H, FP, at + 10, R3)
    a.store(H, FP, at + 8, skb.raw(fixed[8:10]))


def only_fast(a: Assembler, outer: int) -> None:
    """Take only what a fast path has sent, and note whether the peer has one.

    Its datagrams have no UDP checksum. What comes out of a socket has one; but a virtual link may
    leave it half done, and so by chance 0: only `_ID`, too, shows that the peer has a fast path.
    That it sends something the slow way now and then does not show the contrary.
    """
    a.call(skb.KTIME)
    a.mov(R7, R0)
    a.load(H, R1, FP, outer + 26)
    a.jump(If.NE, R1, 0, "doubt")
    a.load(H, R1, FP, outer + 4)
    a.jump(If.NE, R1, skb.raw16(_ID), "sent fast")
    later(a, R1, FAST_MS)
    a.store(DW, R9, _PEER_FAST_UNTIL, R1)
    a.goto("sent fast")
    a.label("doubt")
    later(a, R1, DOUBT_MS)
    a.load(DW, R2, R9, _PEER_FAST_UNTIL)
    a.jump(If.LE, R2, R1, "pass")
    a.store(DW, R9, _PEER_FAST_UNTIL, R1)
    a.goto("pass")
    a.label("sent fast")


def write_whole(a: Assembler, path: Path, outer: int, at: int) -> None:
    """Write a UDP header and what comes before a super-packet to ``at``.

    Its protocol is R2, its segments are of R1 bytes. The new length goes into the IP header at
    ``outer``.
    """
    vnet = at + 8 + SECRET_BYTES
    a.store(H, FP, vnet + 8, _TCP_CHECKSUM)
    a.store(W, FP, vnet, skb.raw(struct.pack("=BBH", NEEDS_CSUM, GSO_TCPV4, IP + _TCP_HEADER)))
    a.jump(If.EQ, R2, TCP, "tcp")
    a.store(H, FP, vnet + 8, _UDP_CHECKSUM)
    a.store(W, FP, vnet, skb.raw(struct.pack("=BBH", NEEDS_CSUM, GSO_UDP_L4, IP + _UDP_HEADER)))
    a.label("tcp")
    a.store(H, FP, vnet + 6, IP)
    a.store(H, FP, vnet + 4, R1)
    for offset in reversed(range(0, SECRET_BYTES, 4)):
        a.store(W, FP, at + 8 + offset, skb.raw(path.secret[offset : offset + 4]))
    skb.length_field(a, R1, R8, 8 + WHOLE_BYTES)
    # With no checksum: the packet has its own.
    a.store(W, FP, at + 4, R1)
    a.load(W, R1, FP, outer + 20)
    a.store(W, FP, at, R1)
    replace_length(a, outer, WHOLE_BYTES)


def replace_length(a: Assembler, header: int, more: int) -> None:
    """Write a header's length, ``more`` than it was, and its checksum (RFC 1624, eqn. 3)."""
    a.load(H, R2, FP, header + 2)
    skb.length_field(a, R1, R8, OUTER + more)
    a.store(H, FP, header + 2, R1)
    a.load(H, R3, FP, header + 10)
    a.alu(Op.XOR, R3, 0xFFFF)
    a.alu(Op.XOR, R2, 0xFFFF)
    a.alu(Op.ADD, R3, R2)
    a.alu(Op.ADD, R3, R1)
    skb.fold(a, R3, R1)
    a.store(H, FP, header + 10, R3)


def count(a: Assembler, counters: int, at: int) -> None:
    """Count a packet, or the segments of one, of R8 bytes."""
    a.store(DW, FP, skb.SCRATCH, 0)
    skb.look_up(a, counters, "counted")
    a.mov(R1, 1)
    a.load(W, R2, R6, skb.GSO_SIZE)
    a.jump(If.EQ, R2, 0, "one packet")
    # All but the headers, in pieces of that size: a little too many if it is a whole number.
    a.mov(R1, R8)
    a.alu(Op.DIV, R1, R2)
    a.label("one packet")
    a.add_to(R0, 8 * at, R1)
    a.add_to(R0, 8 * at + 8, R8)
    a.label("counted")


def receive_from(a: Assembler, device: int) -> None:
    """End the program: the packet is received as if it came from this device."""
    a.mov(R1, device)
    a.mov(R2, skb.TO_INGRESS)
    a.call(skb.REDIRECT)
    a.exit()
