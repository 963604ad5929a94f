"""The ruleset's generation: the message's bytes, hostile answers, and when a check is spared.

The golden bytes are a little-endian host's; the answer is one of Linux 6.18.
"""

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanneld.masquerade.driver import MasqueradeError
from flanneld.masquerade.generation import COMPLETE_EVERY, Generation, pack_request, parse_answer

REQUEST = bytes.fromhex("14000000 100a 0100 07000000 00000000 00000000")
ANSWER = bytes.fromhex(
    "30000000 0f0a 0000 07000000 ac1d0000 00000102"
    "0800 0100 00000102"  # NFTA_GEN_ID
    "0800 0200 00001dac"  # NFTA_GEN_PROC_PID
    "0b00 0300 707974686f6e00 00"  # NFTA_GEN_PROC_NAME
)
# EPERM
REFUSAL = bytes.fromhex(
    "24000000 0200 0000 07000000 ac1d0000 ffffffff 14000000100a01000700000000000000"
)


def answer(*attributes: bytes, kind: int = 0x0A0F, seq: int = 7) -> bytes:
    body = struct.pack("=BBH", 0, 0, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, seq, 0) + body


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def test_the_request() -> None:
    assert pack_request(7) == REQUEST


def test_the_answer() -> None:
    assert parse_answer(ANSWER, 7) == 0x102
    assert parse_answer(REFUSAL + ANSWER, 7) == 0x102
    # In another order, and with what a later kernel may add.
    more = (attribute(9, b"new"), attribute(0x4003, b"nft\0"), attribute(1, b"\xff\0\0\1"))
    assert parse_answer(answer(*more), 7) == 0xFF000001


@pytest.mark.parametrize(
    "data",
    [
        b"",
        REFUSAL,
        answer(),
        answer(attribute(1, b"")),
        answer(attribute(1, bytes(3))),
        answer(attribute(1, bytes(8))),
        answer(attribute(2, bytes(4))),
        answer(attribute(1, bytes(4)), kind=0x0A10),
        answer(attribute(1, bytes(4)), kind=0x000F),
        answer(attribute(1, bytes(4)), seq=8),
        struct.pack("=IHHII", 16, 0x0A0F, 0, 7, 0),
        struct.pack("=IHHII", 0, 0x0A0F, 0, 7, 0) + ANSWER[16:],
        struct.pack("=IHHII", 0xFFFFFFFF, 0x0A0F, 0, 7, 0) + ANSWER[16:],
    ],
)
def test_what_is_no_answer(data: bytes) -> None:
    assert parse_answer(data, 7) is None


@pytest.mark.parametrize("size", range(len(ANSWER)))
def test_a_truncated_answer(size: int) -> None:
    """Cut off by the end of the data, and with a header that says so."""
    assert parse_answer(ANSWER[:size], 7) is None
    whole = struct.pack("=I", size) + ANSWER[4:size]
    assert parse_answer(whole, 7) == (0x102 if size >= 28 else None)


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=80), st.binary(max_size=64).map(answer)))
def test_any_answer_is_a_generation_or_none(data: bytes) -> None:
    found = parse_answer(data, 7)
    assert found is None or 0 <= found < 2**32


# --- what is spared


def spared(reads: Iterable[int | None], outcomes: Iterable[bool | Exception] = ()) -> str:
    """Return what became of one check after the other: spared (.), good (y), bad (n) or error (e).

    ``reads`` are the generations at each check, ``outcomes`` those of complete checks, then good.
    """
    reads = list(reads)
    left, results = iter(outcomes), iter(reads)
    done: list[str] = []

    def complete() -> bool:
        outcome = next(left, True)
        if isinstance(outcome, Exception):
            done.append("e")
            raise outcome
        done.append("y" if outcome else "n")
        return outcome

    found = Generation(lambda: next(results))
    for count in range(len(reads)):
        try:
            good = found.check(complete)
        except MasqueradeError:
            continue
        if len(done) == count:
            done.append(".")
        assert good is (done[-1] != "n")
    return "".join(done)


def test_a_check_is_complete_until_one_is_good_and_when_the_generation_changes() -> None:
    assert spared([4, 4, 4]) == "y.."
    assert spared([4, 4, 5, 5, 4, 4]) == "y.y.y."
    assert spared([0, 0]) == "y."
    assert spared([4, 4, 4, 4], [False, False]) == "nny."
    assert spared([4, 5, 5, 5, 5], [True, False, MasqueradeError("busy")]) == "yney."
    # Back at one that was good once: not by the same rules.
    assert spared([4, 5, 4, 4], [True, False]) == "yny."


def test_without_an_answer_every_check_is_complete() -> None:
    assert spared([None] * 4) == "yyyy"
    assert spared([4, None, 4, 4]) == "yyy."


def test_it_is_complete_every_so_often_all_the_same() -> None:
    turn = "y" + "." * (COMPLETE_EVERY - 1)
    assert spared([4] * 3 * COMPLETE_EVERY) == 3 * turn
    assert spared([4] * 2 + [5] * 2 * COMPLETE_EVERY) == "y." + 2 * turn


def test_the_generation_is_that_before_the_check() -> None:
    """What changes meanwhile may not have been seen."""
    now = [4]

    def disturbed() -> bool:
        now[0] += 1
        return True

    found = Generation(lambda: now[0])
    assert found.check(disturbed)
    assert found.check(disturbed)
    assert now == [6]
