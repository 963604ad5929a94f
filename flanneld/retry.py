"""How a loop behaves while something it needs is away: growing pauses, and one log line."""

import logging
import random
import re
import threading
from collections.abc import Callable, Iterable

from flanneld.clock import now
from flanneld.logs import go_duration

# Seconds. The cap is what an operator waits at most after the store is healthy again.
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 3.0

# Seconds of success that end an outage for good: a server that answers the first request and fails
# the second, over and over, gets neither a log line nor a request for each.
CALM = 10.0

# Seconds after which a failure that stays the same is logged once more.
REPEAT = 60.0

# Lines within this time about what somebody else writes, whose number is theirs to choose.
MOST_LINES = 100


class Outage:
    """One thing that may be away for a while, seen from one loop or from several.

    Safe for use by several threads: what is away for all is said once.
    """

    def __init__(
        self,
        log: Callable[[int, str], None],
        message: str,
        *,
        steady: float | None = None,
        recovered: str | None = None,
    ) -> None:
        """Failures are logged as ``message: reason`` when the reason changes, then once a minute.

        ``steady`` is a pause that does not grow. ``recovered`` is logged, with how long it took,
        at the first success after a failure.
        """
        self._log = log
        self._message = message
        self._steady = steady
        self._recovered = recovered
        self._since: float | None = None
        self._over_at = -CALM
        self._said = False
        self._reason: frozenset[str] | None = None
        self._logged = 0.0
        self._pause = FIRST_PAUSE
        self._lock = threading.Lock()

    def failed(
        self,
        reason: object,
        stop: threading.Event,
        level: int = logging.ERROR,
        *,
        kind: str = "",
    ) -> bool:
        """Take note of a failure and pause; return False if it is time to stop.

        Failures of one ``kind`` count as one reason, whatever their texts.
        """
        text, time = str(reason), now()
        with self._lock:
            if self._since is None:
                self._since = time
                if time - self._over_at >= CALM:
                    self._reason, self._pause = None, FIRST_PAUSE
            kinds = frozenset({kind}) if kind else essence(text)
            if kinds != self._reason or time - self._logged >= REPEAT:
                self._log(level, f"{self._message}: {text}")
                self._reason, self._logged, self._said = kinds, time, True
            pause = self._next_pause()
        return not stop.wait(pause)

    def over(self) -> None:
        """Take note of a success."""
        with self._lock:
            if self._since is None:
                return
            if self._said and self._recovered:
                away = go_duration(round(now() - self._since) * 1_000_000_000)
                self._log(logging.INFO, f"{self._recovered} (after {away})")
            self._since, self._said, self._over_at = None, False, now()

    def _next_pause(self) -> float:
        if self._steady is not None:
            return self._steady
        pause = self._pause
        self._pause = min(pause * 2, LONGEST_PAUSE)
        # Half of it at random: hosts that lost the same store do not come back in step.
        return pause * random.uniform(0.5, 1.0)  # noqa: S311 - no secret depends on it


class Sparing:
    """Warnings about what comes from outside: each one, but not without end.

    After `MOST_LINES` within `REPEAT` seconds they are only counted, until the time is over and
    another comes.
    """

    def __init__(self, log: Callable[[int, str], None]) -> None:
        self._log = log
        self._since = -REPEAT
        self._said = self._left_out = 0

    def __call__(self, text: str) -> None:
        """Log a warning, or count it."""
        time = now()
        if time - self._since >= REPEAT:
            if self._left_out:
                self._log(logging.WARNING, f"{self._left_out} more such lines were left out")
            self._since, self._said, self._left_out = time, 0, 0
        if self._said < MOST_LINES:
            self._said += 1
            self._log(logging.WARNING, text)
            return
        if not self._left_out:
            self._log(logging.WARNING, f"Too many such lines: no more for up to {REPEAT:.0f} s")
        self._left_out += 1


class Once:
    """Says each line once, however often the step is repeated that has it to say."""

    def __init__(self, log: Callable[[int, str], None]) -> None:
        self._log = log
        self._warn = Sparing(log)
        self._said: set[str] = set()

    def info(self, lines: Iterable[str]) -> None:
        """Log what is new of these lines."""
        for line in self._news(lines):
            self._log(logging.INFO, line)

    def warn(self, lines: Iterable[str]) -> None:
        """Log what is new of these lines as warnings, but not without end: see `Sparing`."""
        for line in self._news(lines):
            self._warn(line)

    def _news(self, lines: Iterable[str]) -> list[str]:
        news = [line for line in lines if line not in self._said]
        self._said.update(news)
        return news


def essence(reason: str) -> frozenset[str]:
    """Return what makes two reasons the same: neither etcd's index nor the order of endpoints."""
    without_index = re.sub(r" \[\d+\]", "", reason)
    return frozenset(re.split(r"; error #\d+: ", without_index))
