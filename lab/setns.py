"""Do something inside a network namespace without leaving one's own."""

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# linux/sched.h
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def inside(netns: Path, call: Callable[[], T]) -> T:
    """The result of ``call()``, run by a thread of its own inside the namespace at ``netns``.

    A namespace belongs to a thread, a socket keeps the one it was made in: so a socket made by
    ``call`` can be handed back and used from anywhere. Exceptions of ``call`` are raised here;
    OSError when the namespace cannot be entered.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            _enter(netns)
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - carried over to the caller, not swallowed
            errors.append(error)

    thread = threading.Thread(target=work, name=f"inside {netns.name}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(netns: Path) -> None:
    # os.setns() came with Python 3.12.
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}", str(netns))
    finally:
        os.close(fd)
