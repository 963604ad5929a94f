"""What programs for packets are made of: the packet's context, the kernel's helpers. Pure.

Every step takes R6 for the context, destroys R0 to R5, and goes to the label "pass" where it cannot
go on and the packet is still as it was, and to "drop" where it is not. Numbers are linux/bpf.h's.
"""

import sys

from flanneld.kernel.bpf_asm import Assembler, If, Op, Reg, Size

# struct __sk_buff
LEN, PACKET_TYPE, MARK, PROTOCOL, VLAN_PRESENT, GSO_SIZE = 0, 4, 8, 16, 20, 176
# linux/if_packet.h, of PACKET_TYPE
PACKET_HOST = 0

# Helpers.
MAP_LOOKUP, STORE, REDIRECT, LOAD, HASH, CHANGE_HEAD = 1, 9, 23, 26, 34, 43
ADJUST_ROOM, FIB_LOOKUP, REDIRECT_NEIGH, KTIME = 50, 69, 152, 160
ROOM_NET, ROOM_MAC = 0, 1
FIXED_GSO, ENCAP_IPV4, ENCAP_UDP = 1, 2, 16
TO_INGRESS, INVALIDATE_HASH = 1, 2

# enum tcx_action_base
NEXT, DROP = -1, 2

# Eight bytes of stack for a map's key.
SCRATCH = -8

R0, R1, R2, R3, R4, R5, R6, FP = (
    *(Reg.R0, Reg.R1, Reg.R2, Reg.R3, Reg.R4, Reg.R5, Reg.R6, Reg.FP),
)


def raw(data: bytes) -> int:
    """Return what a load gives where these bytes lie."""
    return int.from_bytes(data, sys.byteorder)


def raw16(value: int) -> int:
    """Return what a load gives where this number of 16 bits lies in network byte order."""
    return raw(value.to_bytes(2, "big"))


def load(a: Assembler, offset: int, at: int, length: int) -> None:
    """Copy so many bytes of the packet to the stack."""
    a.mov(R1, R6)
    a.mov(R2, offset)
    a.mov(R3, FP)
    a.alu(Op.ADD, R3, at)
    a.mov(R4, length)
    a.call(LOAD)
    a.jump(If.NE, R0, 0, "pass")


def store(a: Assembler, offset: int, at: int, length: int) -> None:
    """Copy so many bytes of the stack into the packet, which is another one by that.

    Drops what cannot be written any more: it is not what it was.
    """
    a.mov(R1, R6)
    a.mov(R2, offset)
    a.mov(R3, FP)
    a.alu(Op.ADD, R3, at)
    a.mov(R4, length)
    a.mov(R5, INVALIDATE_HASH)
    a.call(STORE)
    a.jump(If.NE, R0, 0, "drop")


def adjust_room(a: Assembler, length: int, mode: int, flags: int) -> None:
    """Make or take away room in the packet, as bpf_skb_adjust_room; R0 is not 0 if it failed."""
    a.mov(R1, R6)
    a.alu(Op.MOV, R2, length)
    a.mov(R3, mode)
    a.mov(R4, flags)
    a.call(ADJUST_ROOM)


def end_with(a: Assembler, label: str, verdict: int) -> None:
    """Place a label that ends the program with this verdict."""
    a.label(label)
    a.alu(Op.MOV, R0, verdict)
    a.exit()


def length_field(a: Assembler, to: Reg, length: Reg, more: int) -> None:
    """``to`` = ``length`` + ``more``, as a header has it."""
    a.mov(to, length)
    a.alu(Op.ADD, to, more)
    a.big_endian(to, 16)


def fold(a: Assembler, total: Reg, scratch: Reg) -> None:
    """Make a sum of 16-bit words one word, with its carries (RFC 1071), and turn its bits."""
    for _ in range(2):
        a.mov(scratch, total)
        a.alu(Op.RSH, scratch, 16)
        a.alu(Op.AND, total, 0xFFFF)
        a.alu(Op.ADD, total, scratch)
    a.alu(Op.XOR, total, 0xFFFF)


def copy(a: Assembler, source: tuple[Reg, int], target: tuple[Reg, int], length: int) -> None:
    """Copy bytes within memory, two by two; both places are a register and an offset.

    The last first, for old kernels' sake: see `program_steps`.
    """
    for offset in reversed(range(0, length, 2)):
        a.load(Size.H, R3, source[0], source[1] + offset)
        a.store(Size.H, target[0], target[1] + offset, R3)


def look_up(a: Assembler, map_fd: int, otherwise: str) -> None:
    """R0 = the value of the key that lies in the scratch bytes."""
    a.map(R1, map_fd)
    a.mov(R2, FP)
    a.alu(Op.ADD, R2, SCRATCH)
    a.call(MAP_LOOKUP)
    a.jump(If.EQ, R0, 0, otherwise)
