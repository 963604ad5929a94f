"""What signals do: SIGTERM and SIGINT end the daemon in order, a second one at once; SIGUSR1 has it
log its state."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

ENDING = (signal.SIGTERM, signal.SIGINT)

REPORT = signal.SIGUSR1
# Has no meaning; it interrupts what the main thread waits in.
NUDGE = signal.SIGUSR2
# Seconds between two of them, while it has not reacted.
NUDGE_PAUSE = 0.05

# Seconds from the signal to the end of the process, whatever the main thread is blocked in.
LIMIT = 1.5


class Terminated(BaseException):
    """A signal asks the daemon to end.

    Raised in the main thread wherever it is, also inside a blocked call. Not an Exception, so
    that no library can take it for one of its own failures.
    """


def install(last_words: Callable[[], None]) -> None:
    """Have the ending signals raise `Terminated` in the main thread, the first time.

    If the process is still there after `LIMIT`, it ends with status 0 all the same, after a call
    of ``last_words`` in another thread: Python runs handlers only between two steps of the main
    thread, and some calls of the C library (a look-up while DNS is away) take their time.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        for other in ENDING:
            signal.signal(other, signal.SIG_DFL)
        log.info("Starting shutdown...")
        # Nothing here may take a lock: the main thread may hold it.
        raise Terminated

    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(write_end, False)
    # The interpreter writes the number of each signal there at once, in whichever thread it is.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    with kept_in_this_thread():
        threading.Thread(
            target=_guard, args=(read_end, last_words), name="signals", daemon=True
        ).start()
    for number in ENDING:
        signal.signal(number, handle)
    # As with the original, these do not end a daemon that nobody taught to react to them.
    signal.signal(REPORT, signal.SIG_IGN)
    signal.signal(NUDGE, lambda _number, _frame: None)


@contextmanager
def reporting(report: Callable[[], None]) -> Iterator[None]:
    """Within, SIGUSR1 calls ``report``, which must not take a lock."""
    signal.signal(REPORT, lambda _number, _frame: report())
    try:
        yield
    finally:
        signal.signal(REPORT, signal.SIG_IGN)


def _guard(read_end: int, last_words: Callable[[], None]) -> None:
    ending = False
    while not ending:
        numbers = os.read(read_end, 64)
        ending = any(number in ENDING for number in numbers)
        if REPORT in numbers:
            _nudge()
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        time.sleep(NUDGE_PAUSE)
        _nudge()
    last_words()
    os._exit(0)


def _nudge() -> None:
    """Wake the main thread: a signal that came just before it began to wait does not."""
    ident = threading.main_thread().ident
    if ident is not None:
        signal.pthread_kill(ident, NUDGE)


@contextmanager
def kept_in_this_thread() -> Iterator[None]:
    """Threads that are started within, and theirs, leave the daemon's signals to this thread.

    Python runs handlers in the main thread, but a signal that the kernel gives to another one
    (it may, after SIGCONT) does not wake the main thread from a blocked call.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*ENDING, REPORT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
