"""The memory that packets go through."""

from pathlib import Path

from flanneld.backend.udp.buffers import Buffers


def test_pieces_do_not_overlap_and_begin_at_cache_lines() -> None:
    buffers = Buffers()
    pieces = [buffers.take(size) for size in (1, 70, 300_000, 2 << 20, 5 << 20, 3)]
    for number, piece in enumerate(pieces):
        piece[:] = bytes([number + 1]) * len(piece)
    assert [(len(p), p[0], p[-1]) for p in pieces] == [
        (size, number + 1, number + 1)
        for number, size in enumerate((1, 70, 300_000, 2 << 20, 5 << 20, 3))
    ]


def test_the_kernel_may_use_a_huge_page() -> None:
    """It may not for shared memory, on most hosts, and says so only here."""
    before = set(_maps())
    piece = Buffers().take(1 << 20)
    piece[0] = 1
    flags = [flags for where, flags in _maps().items() if where not in before]
    assert any("hg" in each and "sh" not in each for each in flags)


def _maps() -> dict[str, list[str]]:
    maps, where = {}, ""
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmFlags:"):
            maps[where] = line.split()[1:]
        elif not line.split()[0].endswith(":"):
            where = line.split()[0]
    return maps
