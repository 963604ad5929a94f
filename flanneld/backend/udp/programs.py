"""The two programs of the fast path, which the kernel runs on packets. Pure.

What they are for is told in `fastpath`. They take only packets that need nothing but what they do,
and leave every other one alone, unchanged: it goes its usual way, through the tunnel's process.

To use `bpf_fib_lookup` a program has to say that it may be used under the GPL. These, the text of
this module, may be used under version 2 of it, too.
"""

import struct
import sys
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
from flanneld.kernel.bpf_asm import Assembler, If, Op, Reg, Size

R0, R1, R2, R3, R4, R5 = Reg.R0, Reg.R1, Reg.R2, Reg.R3, Reg.R4, Reg.R5
R6, R7, R8, R9, FP = Reg.R6, Reg.R7, Reg.R8, Reg.R9, Reg.FP
B, H, W, DW = Size.B, Size.H, Size.W, Size.DW

# A peer in the map: public IP (network byte order), then three moments of the monotonic clock (ns):
# until when it is known to have a fast path, from when a packet has to go the slow way, and until
# when datagrams to it get the Ethernet header (destination, source, type) that is the last.
_PEER = struct.Struct("=4s4xQQQ14s2x")
_PEER_IP, _PEER_FAST_UNTIL, _PEER_SLOW_AT, _PEER_ROUTED_UNTIL, _PEER_ETHERNET = 0, 8, 16, 24, 32
PEER_BYTES = _PEER.size


def peer(public_ip: IPv4Address) -> bytes:
    """Return the map's value for a peer of which nothing else is known."""
    return _PEER.pack(public_ip.packed, 0, 0, 0, bytes(12) + b"\x08\x00")


COUNTERS = ("sent_packets", "sent_bytes", "received_packets", "received_bytes")
_SENT, _RECEIVED = 0, 2

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
_LONGEST = 0xFFFF - OVERHEAD - WHOLE_BYTES

# linux/bpf.h: struct __sk_buff
_LEN, _PACKET_TYPE, _MARK, _PROTOCOL, _VLAN_PRESENT, _GSO_SIZE = 0, 4, 8, 16, 20, 176
# linux/bpf.h: helpers
_MAP_LOOKUP, _STORE, _REDIRECT, _LOAD, _CHANGE_HEAD = 1, 9, 23, 26, 43
_ADJUST_ROOM, _FIB_LOOKUP, _REDIRECT_NEIGH, _KTIME = 50, 69, 152, 160
_ROOM_NET, _ROOM_MAC = 0, 1
_FIXED_GSO, _ENCAP_IPV4, _ENCAP_UDP = 1, 2, 16
_INGRESS = 1
_INVALIDATE_HASH = 2
# linux/if_packet.h
_PACKET_HOST = 0
# linux/bpf.h: struct bpf_fib_lookup
_FIB_BYTES, _FIB_LENGTH, _FIB_IFINDEX, _FIB_SRC, _FIB_DST = 64, 6, 8, 16, 32
_FIB_SMAC, _FIB_DMAC, _MAC = 52, 58, 6
_AF_INET = 2
# As good as success is that the neighbour's MAC is not known yet.
_FIB_SUCCESS, _FIB_NO_NEIGHBOUR = 0, 7
# linux/bpf.h: enum tcx_action_base
_NEXT, _DROP = -1, 2

_ETHERNET, _IP, _OUTER = 14, 20, OVERHEAD
_TCP, _UDP, _ICMP = 6, 17, 1
_TCP_HEADER, _TCP_CHECKSUM, _UDP_HEADER, _UDP_CHECKSUM = 20, 16, 8, 6
_TTL = 64
# Of the datagrams' IP headers, where it means nothing to others (RFC 6864); "fl".
_ID = 0x666C


def _raw(data: bytes) -> int:
    """Return what a load gives where these bytes lie."""
    return int.from_bytes(data, sys.byteorder)


def _raw16(value: int) -> int:
    return _raw(value.to_bytes(2, "big"))


_IPV4 = _raw16(0x0800)
# "More fragments", or an offset.
_FRAGMENT = _raw16(0x3FFF)


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
    mtu: int
    """The TUN device's."""
    secret: bytes
    """What shows the tunnel's process that a super-packet comes from the program."""


def egress(path: Path) -> bytes:
    """The program for what the TUN device is about to send: into a datagram, and to the peer."""
    a = Assembler()
    outer, fib = -64, -144
    inner, ethernet = outer + _OUTER, outer - _ETHERNET
    a.mov(R6, R1)
    _only_ipv4(a)
    _load(a, 0, inner, _OUTER)
    a.load(W, R8, R6, _LEN)
    a.jump(If.GT, R8, _LONGEST, "pass")
    _only_plain(a, inner)
    _decrement_ttl(a, inner)
    a.load(W, R3, FP, inner + 16)
    _find_peer(a, path.peers)
    a.call(_KTIME)
    a.mov(R7, R0)
    _only_to_the_fast(a, inner)
    _check_route(a, path, fib)
    _copy(a, (R9, _PEER_ETHERNET), (FP, ethernet), _ETHERNET)
    a.jump(If.NE, R7, 0, "addressed")
    # Whatever is there must not look like a group's address.
    a.store(H, FP, ethernet, 0)
    a.label("addressed")
    _write_outer(a, path, outer)
    _adjust_room(a, _OUTER, _ROOM_MAC, _FIXED_GSO | _ENCAP_IPV4 | _ENCAP_UDP)
    a.jump(If.NE, R0, 0, "pass")
    a.mov(R1, R6)
    a.mov(R2, _ETHERNET)
    a.mov(R3, 0)
    a.call(_CHANGE_HEAD)
    a.jump(If.NE, R0, 0, "drop")
    # Up to the inner header's checksum.
    _store(a, 0, ethernet, _ETHERNET + _OUTER + 12)
    # The mark was about the inner packet.
    a.mov(R1, 0)
    a.store(W, R6, _MARK, R1)
    _count(a, path.counters, _SENT)
    a.mov(R1, path.external)
    a.mov(R2, 0)
    a.jump(If.EQ, R7, 0, "neighbour")
    a.call(_REDIRECT)
    a.exit()
    # Takes the Ethernet header off, looks for the neighbour and writes another.
    a.label("neighbour")
    a.mov(R3, 0)
    a.mov(R4, 0)
    a.call(_REDIRECT_NEIGH)
    a.exit()
    _verdict(a, "drop", _DROP)
    _verdict(a, "pass", _NEXT)
    return a.assemble()


def ingress(path: Path) -> bytes:
    """The program for what the external interface has received: out of the datagram, and on.

    As if it had come from the TUN device. But a super-packet, which only a virtual link brings
    whole, goes to the tunnel's process, with `WHOLE_BYTES` before it: nothing here can make the
    kernel forget that a packet was in a tunnel, and by that it goes wrong when it is cut.
    """
    a = Assembler()
    outer, head = -64, -92
    inner = outer + _OUTER
    a.mov(R6, R1)
    _only_ipv4(a)
    a.load(W, R1, R6, _VLAN_PRESENT)
    a.jump(If.NE, R1, 0, "pass")
    # A mirror port's, say.
    a.load(W, R1, R6, _PACKET_TYPE)
    a.jump(If.NE, R1, _PACKET_HOST, "pass")
    _load(a, _ETHERNET, outer, 2 * _OUTER)
    _only_to_us(a, path, outer)
    _only_plain(a, inner)
    _decrement_ttl(a, inner)
    # From the peer whose subnet it says it is from?
    a.load(W, R3, FP, inner + 12)
    _find_peer(a, path.peers)
    a.load(W, R1, R9, _PEER_IP)
    a.load(W, R2, FP, outer + 12)
    a.jump(If.NE, R1, R2, "pass")
    _only_fast(a, outer)
    a.load(W, R1, R6, _GSO_SIZE)
    a.jump(If.NE, R1, 0, "whole")
    _adjust_room(a, -_OUTER, _ROOM_MAC, _FIXED_GSO)
    a.jump(If.NE, R0, 0, "pass")
    _store(a, _ETHERNET + 8, inner + 8, 4)
    _count(a, path.counters, _RECEIVED)
    a.mov(R1, path.tun)
    a.mov(R2, _INGRESS)
    a.call(_REDIRECT)
    a.exit()
    a.label("whole")
    a.load(B, R2, FP, inner + 9)
    _write_whole(a, path, outer, head)
    _adjust_room(a, WHOLE_BYTES, _ROOM_NET, _FIXED_GSO)
    a.jump(If.NE, R0, 0, "pass")
    _store(a, _ETHERNET, outer, 12)
    _store(a, _ETHERNET + _IP, head, 8 + WHOLE_BYTES)
    _store(a, _ETHERNET + _OUTER + WHOLE_BYTES + 8, inner + 8, 4)
    _verdict(a, "pass", _NEXT)
    _verdict(a, "drop", _DROP)
    return a.assemble()


# Pieces. R6 is the packet's context, R7 the time, R8 the inner packet's length, R9 the peer. They
# destroy R0 to R5, and go to "pass" with whatever they do not take.

# Eight bytes of stack for a map's key.
_SCRATCH = -8


def _only_ipv4(a: Assembler) -> None:
    a.load(W, R1, R6, _PROTOCOL)
    a.jump(If.NE, R1, _IPV4, "pass")


def _load(a: Assembler, offset: int, at: int, length: int) -> None:
    """Copy so many bytes of the packet to the stack."""
    a.mov(R1, R6)
    a.mov(R2, offset)
    a.mov(R3, FP)
    a.alu(Op.ADD, R3, at)
    a.mov(R4, length)
    a.call(_LOAD)
    a.jump(If.NE, R0, 0, "pass")


def _store(a: Assembler, offset: int, at: int, length: int) -> None:
    """Copy so many bytes of the stack into the packet, which is another one by that.

    Drops what cannot be written any more: it is not what it was.
    """
    a.mov(R1, R6)
    a.mov(R2, offset)
    a.mov(R3, FP)
    a.alu(Op.ADD, R3, at)
    a.mov(R4, length)
    a.mov(R5, _INVALIDATE_HASH)
    a.call(_STORE)
    a.jump(If.NE, R0, 0, "drop")


def _adjust_room(a: Assembler, length: int, mode: int, flags: int) -> None:
    a.mov(R1, R6)
    a.alu(Op.MOV, R2, length)
    a.mov(R3, mode)
    a.mov(R4, flags)
    a.call(_ADJUST_ROOM)


def _verdict(a: Assembler, label: str, verdict: int) -> None:
    a.label(label)
    a.alu(Op.MOV, R0, verdict)
    a.exit()


def _length(a: Assembler, to: Reg, length: Reg, more: int) -> None:
    """``to`` = ``length`` + ``more``, as a header has it."""
    a.mov(to, length)
    a.alu(Op.ADD, to, more)
    a.big_endian(to, 16)


def _fold(a: Assembler, total: Reg, scratch: Reg) -> None:
    """Make a sum of 16-bit words one word, with its carries (RFC 1071), and turn its bits."""
    for _ in range(2):
        a.mov(scratch, total)
        a.alu(Op.RSH, scratch, 16)
        a.alu(Op.AND, total, 0xFFFF)
        a.alu(Op.ADD, total, scratch)
    a.alu(Op.XOR, total, 0xFFFF)


def _only_to_us(a: Assembler, path: Path, outer: int) -> None:
    """Take only the tunnel's datagrams, with one packet of R8 bytes and nothing behind it."""
    a.load(B, R1, FP, outer + 9)
    a.jump(If.NE, R1, _UDP, "pass")
    a.load(H, R1, FP, outer + 22)
    a.jump(If.NE, R1, _raw16(path.port), "pass")
    a.load(W, R1, FP, outer + 16)
    a.mov(R2, _raw(path.address.packed))
    a.jump(If.NE, R1, R2, "pass")
    a.load(B, R1, FP, outer)
    a.jump(If.NE, R1, 0x45, "pass")
    a.load(H, R1, FP, outer + 6)
    a.jump(If.SET, R1, _FRAGMENT, "pass")
    a.load(W, R8, R6, _LEN)
    a.jump(If.GT, R8, _LONGEST + _ETHERNET + _OUTER, "pass")
    a.alu(Op.SUB, R8, _ETHERNET + _OUTER)
    _length(a, R2, R8, 8)
    a.load(H, R1, FP, outer + 24)
    a.jump(If.NE, R1, R2, "pass")


def _only_plain(a: Assembler, at: int) -> None:
    """Take only whole TCP, UDP and ICMP packets of R8 bytes without IP options."""
    a.load(B, R1, FP, at)
    a.jump(If.NE, R1, 0x45, "pass")
    a.load(H, R1, FP, at + 6)
    a.jump(If.SET, R1, _FRAGMENT, "pass")
    a.load(H, R1, FP, at + 2)
    a.big_endian(R1, 16)
    a.jump(If.NE, R1, R8, "pass")
    a.load(B, R1, FP, at + 9)
    a.jump(If.EQ, R1, _TCP, "plain")
    a.jump(If.EQ, R1, _ICMP, "plain")
    a.jump(If.NE, R1, _UDP, "pass")
    # One without a checksum of its own needs the datagram's, which has none here.
    a.load(H, R1, FP, at + 26)
    a.jump(If.EQ, R1, 0, "pass")
    a.label("plain")


def _decrement_ttl(a: Assembler, header: int) -> None:
    """Take one off a header's TTL; pass if it expires. RFC 1624: the checksum is 0x0100 more."""
    a.load(W, R1, FP, header + 8)
    a.mov(R2, R1)
    a.alu(Op.AND, R2, 0xFF)
    a.jump(If.LE, R2, 1, "pass")
    a.mov(R2, R1)
    a.alu(Op.RSH, R2, 16)
    a.alu(Op.ADD, R2, _raw16(0x0100))
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


def _find_peer(a: Assembler, peers: int) -> None:
    """R9 = the peer whose subnet the address in R3 is of."""
    a.store(W, FP, _SCRATCH, 32)
    a.store(W, FP, _SCRATCH + 4, R3)
    _look_up(a, peers, "pass")
    a.mov(R9, R0)


def _look_up(a: Assembler, map_fd: int, otherwise: str) -> None:
    """R0 = the value of the key that lies in the scratch bytes."""
    a.map(R1, map_fd)
    a.mov(R2, FP)
    a.alu(Op.ADD, R2, _SCRATCH)
    a.call(_MAP_LOOKUP)
    a.jump(If.EQ, R0, 0, otherwise)


def _only_to_the_fast(a: Assembler, inner: int) -> None:
    """Take only what goes to a peer with a fast path, and greetings with their answers.

    These have no checksum that a device still has to complete, and any peer can read them: by them
    two fast paths get to know each other.
    """
    a.load(DW, R1, R9, _PEER_FAST_UNTIL)
    a.jump(If.GT, R1, R7, "fast")
    a.load(B, R1, FP, inner + 9)
    a.jump(If.NE, R1, _ICMP, "pass")
    a.load(H, R1, FP, inner + 24)
    a.jump(If.NE, R1, _raw16(GREETING_ID), "pass")
    a.goto("greeting")
    a.label("fast")
    _now_and_then_slow(a)
    a.label("greeting")


def _now_and_then_slow(a: Assembler) -> None:
    """Let one packet in some seconds pass, a super-packet only if there was no other for long.

    So the host's connection tracking sees that it speaks with the peer, and the tunnel's process
    that it has to greet it.
    """
    a.load(DW, R1, R9, _PEER_SLOW_AT)
    a.jump(If.GT, R1, R7, "not due")
    a.load(W, R2, R6, _GSO_SIZE)
    a.jump(If.EQ, R2, 0, "due")
    a.mov(R2, SLOW_SUPER_MS - SLOW_EVERY_MS)
    a.alu(Op.MUL, R2, MS)
    a.alu(Op.ADD, R1, R2)
    a.jump(If.GT, R1, R7, "not due")
    a.label("due")
    _later(a, R1, SLOW_EVERY_MS)
    a.store(DW, R9, _PEER_SLOW_AT, R1)
    a.goto("pass")
    a.label("not due")


def _later(a: Assembler, to: Reg, milliseconds: int) -> None:
    """``to`` = so much later than R7."""
    a.mov(to, milliseconds)
    a.alu(Op.MUL, to, MS)
    a.alu(Op.ADD, to, R7)


def _check_route(a: Assembler, path: Path, at: int) -> None:
    """Take only what the host would send to the peer by the external interface, in one piece.

    The kernel is asked once in a second. With that packet R7 = 0: it has to be sent by the kernel's
    table of neighbours, which so finds them and notices that they are gone.
    """
    a.load(DW, R1, R9, _PEER_ROUTED_UNTIL)
    a.jump(If.GT, R1, R7, "known route")
    for offset in range(0, _FIB_BYTES, 8):
        a.store(DW, FP, at + offset, 0)
    a.store(B, FP, at, _AF_INET)
    a.store(H, FP, at + _FIB_LENGTH, path.mtu + _OUTER)
    a.store(W, FP, at + _FIB_IFINDEX, path.tun)
    a.store(W, FP, at + _FIB_SRC, _raw(path.address.packed))
    a.load(W, R1, R9, _PEER_IP)
    a.store(W, FP, at + _FIB_DST, R1)
    a.mov(R1, R6)
    a.mov(R2, FP)
    a.alu(Op.ADD, R2, at)
    a.mov(R3, _FIB_BYTES)
    a.mov(R4, 0)
    a.call(_FIB_LOOKUP)
    a.load(W, R1, FP, at + _FIB_IFINDEX)
    a.jump(If.EQ, R0, _FIB_NO_NEIGHBOUR, "routed")
    a.jump(If.NE, R0, _FIB_SUCCESS, "pass")
    a.jump(If.NE, R1, path.external, "pass")
    # Not the old one's time for half of the new header.
    a.store(DW, R9, _PEER_ROUTED_UNTIL, 0)
    _copy(a, (FP, at + _FIB_DMAC), (R9, _PEER_ETHERNET), _MAC)
    _copy(a, (FP, at + _FIB_SMAC), (R9, _PEER_ETHERNET + _MAC), _MAC)
    _later(a, R2, _ROUTE_MS)
    a.store(DW, R9, _PEER_ROUTED_UNTIL, R2)
    a.label("routed")
    a.jump(If.NE, R1, path.external, "pass")
    a.mov(R7, 0)
    a.label("known route")


def _copy(a: Assembler, source: tuple[Reg, int], target: tuple[Reg, int], length: int) -> None:
    """Copy bytes within memory, two by two; both places are a register and an offset."""
    for offset in range(0, length, 2):
        a.load(H, R3, source[0], source[1] + offset)
        a.store(H, target[0], target[1] + offset, R3)


def _write_outer(a: Assembler, path: Path, at: int) -> None:
    """Write the datagram's headers for R8 bytes to the peer. The UDP checksum is 0: none."""
    ids = (_ID, 0x4000)  # with "don't fragment", as a socket
    fixed = struct.pack("!BBHHHBBH4s", 0x45, 0, 0, *ids, _TTL, _UDP, 0, path.address.packed)
    a.store(H, FP, at, _raw(fixed[:2]))
    _length(a, R3, R8, _OUTER)
    a.store(H, FP, at + 2, R3)
    for offset in (4, 8, 12):
        a.store(W, FP, at + offset, _raw(fixed[offset : offset + 4]))
    a.load(W, R2, R9, _PEER_IP)
    a.store(W, FP, at + 16, R2)
    a.store(W, FP, at + 20, _raw(struct.pack("!HH", path.port, path.port)))
    _length(a, R1, R8, 8)
    a.store(W, FP, at + 24, R1)
    # The checksum of all that is known, then the length and the peer.
    a.alu(Op.ADD, R3, sum(struct.unpack("=8H", fixed)))
    a.mov(R1, R2)
    a.alu(Op.AND, R1, 0xFFFF)
    a.alu(Op.ADD, R3, R1)
    a.alu(Op.RSH, R2, 16)
    a.alu(Op.ADD, R3, R2)
    _fold(a, R3, R1)
    a.store(H, FP, at + 10, R3)


def _only_fast(a: Assembler, outer: int) -> None:
    """Take only what a fast path has sent, and note whether the peer has one.

    Its datagrams have no UDP checksum. What comes out of a socket has one; but a virtual link may
    leave it half done, and so by chance 0: only `_ID`, too, shows that the peer has a fast path.
    That it sends something the slow way now and then does not show the contrary.
    """
    a.call(_KTIME)
    a.mov(R7, R0)
    a.load(H, R1, FP, outer + 26)
    a.jump(If.NE, R1, 0, "doubt")
    a.load(H, R1, FP, outer + 4)
    a.jump(If.NE, R1, _raw16(_ID), "sent fast")
    _later(a, R1, FAST_MS)
    a.store(DW, R9, _PEER_FAST_UNTIL, R1)
    a.goto("sent fast")
    a.label("doubt")
    _later(a, R1, DOUBT_MS)
    a.load(DW, R2, R9, _PEER_FAST_UNTIL)
    a.jump(If.LE, R2, R1, "pass")
    a.store(DW, R9, _PEER_FAST_UNTIL, R1)
    a.goto("pass")
    a.label("sent fast")


def _write_whole(a: Assembler, path: Path, outer: int, at: int) -> None:
    """Write a UDP header and what comes before a super-packet to ``at``.

    Its protocol is R2, its segments are of R1 bytes. The new length goes into the IP header at
    ``outer``.
    """
    vnet = at + 8 + SECRET_BYTES
    a.store(H, FP, vnet + 4, R1)
    a.store(H, FP, vnet + 6, _IP)
    a.store(W, FP, vnet, _raw(struct.pack("=BBH", NEEDS_CSUM, GSO_TCPV4, _IP + _TCP_HEADER)))
    a.store(H, FP, vnet + 8, _TCP_CHECKSUM)
    a.jump(If.EQ, R2, _TCP, "tcp")
    a.store(W, FP, vnet, _raw(struct.pack("=BBH", NEEDS_CSUM, GSO_UDP_L4, _IP + _UDP_HEADER)))
    a.store(H, FP, vnet + 8, _UDP_CHECKSUM)
    a.label("tcp")
    for offset in range(0, SECRET_BYTES, 4):
        a.store(W, FP, at + 8 + offset, _raw(path.secret[offset : offset + 4]))
    a.load(W, R1, FP, outer + 20)
    a.store(W, FP, at, R1)
    _length(a, R1, R8, 8 + WHOLE_BYTES)
    # With no checksum: the packet has its own.
    a.store(W, FP, at + 4, R1)
    _replace_length(a, outer, WHOLE_BYTES)


def _replace_length(a: Assembler, header: int, more: int) -> None:
    """Write a header's length, ``more`` than it was, and its checksum (RFC 1624, eqn. 3)."""
    a.load(H, R2, FP, header + 2)
    _length(a, R1, R8, _OUTER + more)
    a.store(H, FP, header + 2, R1)
    a.load(H, R3, FP, header + 10)
    a.alu(Op.XOR, R3, 0xFFFF)
    a.alu(Op.XOR, R2, 0xFFFF)
    a.alu(Op.ADD, R3, R2)
    a.alu(Op.ADD, R3, R1)
    _fold(a, R3, R1)
    a.store(H, FP, header + 10, R3)


def _count(a: Assembler, counters: int, at: int) -> None:
    """Count a packet, or the segments of one, of R8 bytes."""
    a.store(W, FP, _SCRATCH, 0)
    _look_up(a, counters, "counted")
    a.mov(R1, 1)
    a.load(W, R2, R6, _GSO_SIZE)
    a.jump(If.EQ, R2, 0, "one packet")
    # All but the headers, in pieces of that size: a little too many if it is a whole number.
    a.mov(R1, R8)
    a.alu(Op.DIV, R1, R2)
    a.label("one packet")
    a.add_to(R0, 8 * at, R1)
    a.add_to(R0, 8 * at + 8, R8)
    a.label("counted")
