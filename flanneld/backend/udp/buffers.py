"""Memory for packets, in huge pages where the kernel has them. No numpy.

Packets go through some hundred ordinary pages again and again, and in a virtual machine each that
the processor has to look up costs two walks through page tables: 5 % of the tunnel's time.
"""

import ctypes
import mmap
from contextlib import suppress

_HUGE = 2 << 20
# Pieces begin at cache lines.
_LINE = 64


class Buffers:
    """Hands out zeroed memory, which is given back with the process."""

    def __init__(self) -> None:
        self._free = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """Return memory of this size. What is left of a page too small for it is lost."""
        if size > len(self._free):
            self._free = _map(-(-size // _HUGE) * _HUGE)
        taken = self._free[:size]
        self._free = self._free[-(-size // _LINE) * _LINE :]
        return taken


def _map(size: int) -> memoryview:
    """Return memory of a multiple of a huge page's size, and at such an address."""
    # Without flags it would be shared memory, which as a rule gets no huge pages.
    mapped = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without huge pages says so.
    with suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    begin = -address % _HUGE
    return memoryview(mapped)[begin : begin + size]
