"""An assembler for eBPF: what a program of some hundred instructions needs, and no compiler. Pure.

Layout and opcodes are those of linux/bpf.h and linux/bpf_common.h.
"""

import enum
import struct

_INSTRUCTION = struct.Struct("<BBhi")

# linux/bpf_common.h, linux/bpf.h: classes, modes and sources of an opcode.
_LDX, _ST, _STX, _ALU, _JMP, _ALU64 = 0x01, 0x02, 0x03, 0x04, 0x05, 0x07
_MEM, _ATOMIC, _FROM_REGISTER = 0x60, 0xC0, 0x08
_LD_IMM64, _CALL, _EXIT, _GOTO, _TO_BIG_ENDIAN, _PSEUDO_MAP_FD = 0x18, 0x85, 0x95, 0x05, 0xDC, 1


class Reg(enum.IntEnum):
    """The registers. R0 holds results, R1 to R5 arguments, which a call destroys."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    FP = 10
    """Where the 512 bytes of stack end."""


class Size(enum.IntEnum):
    """How much a load or store moves: 1, 2, 4 or 8 bytes."""

    B = 0x10
    H = 0x08
    W = 0x00
    DW = 0x18


class Op(enum.IntEnum):
    """What `Assembler.alu` does."""

    ADD = 0x00
    SUB = 0x10
    MUL = 0x20
    DIV = 0x30
    OR = 0x40
    AND = 0x50
    LSH = 0x60
    RSH = 0x70
    XOR = 0xA0
    MOV = 0xB0


class If(enum.IntEnum):
    """When `Assembler.jump` jumps; all comparisons are unsigned, of 64 bits."""

    EQ = 0x10
    GT = 0x20
    GE = 0x30
    SET = 0x40
    """A bit of both is set."""
    NE = 0x50
    LT = 0xA0
    LE = 0xB0


class Assembler:
    """Collects instructions; a label may be used before it is placed."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int, int]] = []
        self._labels: dict[str, int] = {}
        self._jumps: dict[int, str] = {}

    def load(self, size: Size, to: Reg, base: Reg, offset: int) -> None:
        """``to`` = what lies at ``base`` + ``offset``, in this machine's byte order."""
        self._add(_LDX | _MEM | size, to, base, offset, 0)

    def store(self, size: Size, base: Reg, offset: int, source: Reg | int) -> None:
        """Write a register's low bytes, or a constant of up to 32 bits, sign-extended."""
        if isinstance(source, Reg):
            self._add(_STX | _MEM | size, base, source, offset, 0)
        else:
            self._add(_ST | _MEM | size, base, 0, offset, source)

    def add_to(self, base: Reg, offset: int, amount: Reg) -> None:
        """Add to the 8 bytes there, atomically."""
        self._add(_STX | _ATOMIC | Size.DW, base, amount, offset, 0)

    def alu(self, op: Op, to: Reg, operand: Reg | int) -> None:
        """``to`` = ``to`` op ``operand``, in 64 bits; a constant is sign-extended."""
        if isinstance(operand, Reg):
            self._add(_ALU64 | _FROM_REGISTER | op, to, operand, 0, 0)
        else:
            self._add(_ALU64 | op, to, 0, 0, operand)

    def mov(self, to: Reg, source: Reg | int) -> None:
        """``to`` = ``source``; a constant of 32 bits is not sign-extended."""
        if isinstance(source, Reg):
            self.alu(Op.MOV, to, source)
        else:
            self._add(_ALU | Op.MOV, to, 0, 0, source)

    def big_endian(self, to: Reg, bits: int) -> None:
        """Turn the low ``bits`` of a register into the network's byte order; the rest is 0."""
        self._add(_TO_BIG_ENDIAN, to, 0, 0, bits)

    def map(self, to: Reg, fd: int) -> None:
        """``to`` = the map of this descriptor."""
        self._add(_LD_IMM64, to, _PSEUDO_MAP_FD, 0, fd)
        self._add(0, 0, 0, 0, 0)

    def jump(self, when: If, left: Reg, right: Reg | int, label: str) -> None:
        """Go to the label if the comparison holds; a constant is sign-extended."""
        self._jumps[len(self._code)] = label
        if isinstance(right, Reg):
            self._add(_JMP | _FROM_REGISTER | when, left, right, 0, 0)
        else:
            self._add(_JMP | when, left, 0, 0, right)

    def goto(self, label: str) -> None:
        """Go to the label."""
        self._jumps[len(self._code)] = label
        self._add(_GOTO, 0, 0, 0, 0)

    def label(self, name: str) -> None:
        """Place a label here. Raises ValueError for one that has been placed."""
        if name in self._labels:
            raise ValueError(f"label {name!r} twice")
        self._labels[name] = len(self._code)

    def call(self, helper: int) -> None:
        """Call one of the kernel's helpers; its result is in R0."""
        self._add(_CALL, 0, 0, 0, helper)

    def exit(self) -> None:
        """Return R0."""
        self._add(_EXIT, 0, 0, 0, 0)

    def assemble(self) -> bytes:
        """Return the program. Raises KeyError for a label that was never placed."""
        words = []
        for at, (opcode, to, source, shift, constant) in enumerate(self._code):
            offset = self._labels[self._jumps[at]] - at - 1 if at in self._jumps else shift
            # Constants are written as the unsigned numbers they are, addresses above all.
            signed = constant - (1 << 32) if constant >= 1 << 31 else constant
            words.append(_INSTRUCTION.pack(opcode, to | source << 4, offset, signed))
        return b"".join(words)

    def _add(self, opcode: int, to: int, source: int, offset: int, constant: int) -> None:
        self._code.append((opcode, to, source, offset, constant))
