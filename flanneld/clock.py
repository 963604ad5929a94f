"""The one clock that lease times are measured with."""

import time


def now() -> float:
    """Return seconds of a clock that never jumps and that counts while the host is suspended.

    Only differences mean something. The wall clock is not used for any decision: it may be wrong,
    and it is not the store's.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)
