"""Bounded waiting."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class NotInTime(AssertionError):
    """Something did not happen within its time. An AssertionError: in a test it is a failure."""


def eventually(
    check: Callable[[], T],
    timeout: float,
    what: str,
    *,
    detail: Callable[[], str] | None = None,
    interval: float = 0.02,
) -> T:
    """The first true value ``check()`` gives, asked every ``interval`` seconds.

    ``check`` may also raise AssertionError for "not yet"; any other exception ends the wait.
    After ``timeout`` seconds raises NotInTime, which names ``what`` was waited for, the last
    value or assertion seen, and the text of ``detail()`` (a log's last lines, say).
    """
    deadline = time.monotonic() + timeout
    while True:
        # Read before the check: the last look is always one that began after the deadline.
        late = time.monotonic() >= deadline
        seen: object
        try:
            value = check()
            if value:
                return value
            seen = repr(value)
        except NotInTime:
            raise
        except AssertionError as error:
            seen = error
        if late:
            message = f"not within {timeout:g} s: {what}; last seen: {seen}"
            if detail is not None:
                message += "\n" + detail()
            raise NotInTime(message)
        time.sleep(interval)
