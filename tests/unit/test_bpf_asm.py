"""The assembler's bytes, by hand from linux/bpf.h, and what it refuses."""

import pytest

from flanneld.kernel.bpf_asm import Assembler, If, Op, Reg, Size

R0, R1, R2, FP = Reg.R0, Reg.R1, Reg.R2, Reg.FP


def code(*words: str) -> bytes:
    return bytes.fromhex("".join(words))


def test_every_kind_of_instruction() -> None:
    a = Assembler()
    a.load(Size.W, R1, R2, 16)
    a.store(Size.H, FP, -4, R1)
    a.store(Size.DW, FP, -16, 7)
    a.add_to(R0, 8, R1)
    a.alu(Op.MOV, R1, -1)
    a.alu(Op.ADD, R1, R2)
    a.alu(Op.RSH, R1, 16)
    a.mov(R2, 0xFFFFFFFF)
    a.mov(R2, R1)
    a.big_endian(R1, 16)
    a.map(R1, 5)
    a.call(69)
    a.exit()
    assert a.assemble() == code(
        *("6121100000000000", "6b1afcff00000000", "7a0af0ff07000000", "db10080000000000"),
        *("b7010000ffffffff", "0f21000000000000", "7701000010000000", "b4020000ffffffff"),
        *("bf12000000000000", "dc01000010000000", "1811000005000000", "0000000000000000"),
        *("8500000045000000", "9500000000000000"),
    )


def test_jumps_forward_and_back() -> None:
    a = Assembler()
    a.label("back")
    a.jump(If.EQ, R1, 3, "on")
    a.jump(If.GT, R1, R2, "back")
    a.map(R0, 1)  # takes two instructions
    a.label("on")
    a.goto("back")
    assert a.assemble() == code(
        *("1501030003000000", "2d21feff00000000", "1810000001000000", "0000000000000000"),
        "0500fbff00000000",
    )


def test_labels_are_placed_once_and_not_forgotten() -> None:
    a = Assembler()
    a.goto("nowhere")
    with pytest.raises(KeyError):
        a.assemble()
    a.label("here")
    with pytest.raises(ValueError, match="'here' twice"):
        a.label("here")
