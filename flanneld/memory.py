"""What the C library does with memory that is free again.

Left to itself glibc keeps much of it. The first large block that is freed (the list of all leases,
as etcd sent it) raises the size from which a block has pages of its own, and with it how much may
lie idle at a heap's end. Each thread has a heap of its own, and what is free in one is no help to
another. And what lies between two blocks in use is never given back. So a daemon was 1 MB larger
after one list of 260 KB, most of it nonsense, and 22 MB after some of 6 MB, with next to nothing
of that in use.
"""

import ctypes
import gc
from collections.abc import Callable

# The numbers of mallopt(3) in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

# Bytes from which a block has pages of its own, which go back to the kernel as soon as it is free.
# More than one reading of kernel events takes (128 KiB), which may come a thousand times a second.
_OWN_PAGES = 192 * 1024

# Bytes that may lie idle at the heap's end.
_KEPT = 256 * 1024

# Seconds from something large to the time when what it took is given back: others follow it soon
# where somebody writes much, and a start has better things to do.
CALM = 5.0


# How many more objects there must be than at Python's last look for cycles of garbage until it
# looks again. With its own 700 a start with 10,000 peers looked through all of them over and over,
# for a third of its time; with this it does so for a tenth, and no daemon became larger.
_YOUNG = 5000


def look_seldom_for_garbage() -> None:
    """Have Python look for cycles of garbage less often than it does by itself."""
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])


def keep_little() -> None:
    """Have memory that is free again used by all threads, and given back to the kernel.

    To be called before there are threads. Where the C library has no such settings (musl, which
    keeps little anyway) nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # One heap is enough: Python's threads take turns, too.
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_THRESHOLD, _OWN_PAGES)
    mallopt(_TRIM_THRESHOLD, _KEPT)


def give_back() -> None:
    """Give all pages that nothing is in back to the kernel, where the C library can (musl cannot).

    Takes 0.1 ms; where there are 10,000 pieces to give back, some 20 ms.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Tidying:
    """Gives memory back `CALM` seconds after something large. Times are of a steady clock."""

    def __init__(self, forget: Callable[[], object]) -> None:
        """``forget`` drops what is only of use while something large is read."""
        self._forget = forget
        self._due: float | None = None

    def plan(self, now: float) -> None:
        """Take note that something large was read just now."""
        if self._due is None:
            self._due = now + CALM

    def work(self, now: float) -> None:
        """Give memory back if it is time."""
        if self._due is not None and now >= self._due:
            self._due = None
            self._forget()
            give_back()
