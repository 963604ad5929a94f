"""The daemon's heartbeat: the service manager's watchdog is fed while every loop comes round.

A loop that waits says beforehand for how long at most, so that a store that is away, or a night in
which nothing happens, is not taken for a loop that is stuck. A timer that fed the watchdog on its
own would tell systemd only that a timer runs.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence

log = logging.getLogger(__name__)

# Seconds that one round of a loop may take beside its announced wait: 10,000 peers on a slow and
# busy machine need a tenth of it.
SLACK = 30.0

# Seconds in which the store's client is back from what a loop asked of it, whatever the store does.
# An outage costs one request: for each endpoint a look-up of its name (up to 30 s), a connection
# (2 s) and an answer (5 s; the list of all leases 20 s). Lost races cost up to 30 requests that
# were answered.
STORE = 300.0

# Seconds. A loop that waits for events only comes round as often as this.
IDLE = 10.0

# Beats per watchdog interval. Half of it is customary; one more, as a message may be lost in a
# full queue.
BEATS = 3


def watchdog_interval(environ: Mapping[str, str], pid: int) -> float | None:
    """Return the seconds within which the service manager wants a sign of life; None for none.

    Reads WATCHDOG_USEC and WATCHDOG_PID as sd_watchdog_enabled(3) describes them.
    """
    text, whose = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        return None
    if whose and whose != str(pid):
        return None  # the variable was inherited: it is another process that is watched
    return int(text) / 1_000_000


def take_watchdog_interval(environ: MutableMapping[str, str]) -> float | None:
    """Return `watchdog_interval` of this process, and keep the variables from its children."""
    interval = watchdog_interval(environ, os.getpid())
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        environ.pop(name, None)
    return interval


def late(deadlines: Mapping[str, float], time: float) -> Sequence[str]:
    """Return the names of the loops whose deadline has passed, the one stuck longest first."""
    return sorted((n for n, due in deadlines.items() if due < time), key=lambda n: deadlines[n])


class Pulse:
    """The sign of life of one loop. One that nobody made a `Heartbeat` for is not looked at."""

    def __init__(self) -> None:
        self.due = _clock() + SLACK

    def beat(self, wait: float = 0.0) -> None:
        """Say that the loop runs, and comes back here after a wait of up to ``wait`` seconds."""
        self.due = _clock() + wait + SLACK

    def end(self) -> None:
        """Say that the loop has come to its end, as it should."""
        self.due = math.inf


class Heartbeat:
    """Knows the pulses of all loops, and feeds the watchdog while none of them is late."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pulses: dict[str, Pulse] = {}

    def pulse(self, name: str) -> Pulse:
        """Return the pulse of a loop that begins now; its thread alone lets it beat."""
        pulse = Pulse()
        with self._lock:
            self._pulses[name] = pulse
        return pulse

    def late(self) -> Sequence[str]:
        """Return the loops that should have come round by now."""
        with self._lock:
            deadlines = {name: pulse.due for name, pulse in self._pulses.items()}
        return late(deadlines, _clock())

    def run(self, stop: threading.Event, interval: float, feed: Callable[[], None]) -> None:
        """Feed the watchdog, which bites after ``interval`` seconds, until ``stop``."""
        stuck: Sequence[str] = ()
        while not stop.is_set():
            before, stuck = stuck, self.late()
            if not stuck:
                feed()
            # One look is not enough for a word: a process that was frozen finds all loops late
            # for the moment they need.
            elif stuck == before:
                log.error(
                    "Stuck: %s. The watchdog is not fed any more and ends the daemon",
                    ", ".join(stuck),
                )
            stop.wait(interval / BEATS)


def _clock() -> float:
    """Return seconds of the clock that systemd's watchdog goes by: it stands in a suspend."""
    return time.monotonic()
