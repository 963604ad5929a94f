"""Waiting for an answer with an eye on who owes it.

A member of a cluster that is frozen keeps its connections, and one that is cut off from the others
keeps its clients' watches: neither ever says that nothing more will come. So whoever waits for
data looks after the member now and then, on another connection, and gives the wait up if that
look says so.

It happens in the thread that waits, below the socket's read: nothing that was read ahead is
missed, nobody closes a socket that somebody else uses, and there is no thread to look after.
"""

import math
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_here = threading.local()


class Watch:
    """What a thread does while it waits for data."""

    def __init__(self, pause: float, look: Callable[[], float]) -> None:
        """``look`` is called when a read has waited ``pause`` seconds.

        It returns the seconds until it is called again, or raises an OSError that ends the read.
        """
        self.pause = pause
        self.look = look


@contextmanager
def watching(watch: Watch | None) -> Iterator[None]:
    """Let reads of this thread wait so, on the sockets of this module."""
    before = getattr(_here, "watch", None)
    _here.watch = watch
    try:
        yield
    finally:
        _here.watch = before


def pause_for(seconds: float) -> None:
    """Let this thread's next reads wait ``seconds`` before they look; without a watch: no-op."""
    watch: Watch | None = getattr(_here, "watch", None)
    if watch is not None:
        watch.pause = seconds


class WatchfulSocket(socket.socket):
    """A socket whose reads wait as the thread's watch says."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        _wait(self)
        return super().recv_into(*args, **kwargs)


class WatchfulTLSSocket(ssl.SSLSocket):
    """The same with TLS."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        if not self.pending():
            _wait(self)
        return super().recv_into(*args, **kwargs)


def watchful(sock: socket.socket) -> WatchfulSocket:
    """Return a socket in the place of ``sock``, which is used no more."""
    timeout = sock.gettimeout()
    taken = WatchfulSocket(fileno=sock.detach())
    taken.settimeout(timeout)
    return taken


def _wait(sock: socket.socket) -> None:
    """Wait until there is something to read. Raises TimeoutError as the read itself would."""
    watch: Watch | None = getattr(_here, "watch", None)
    timeout = sock.gettimeout()
    if watch is None or timeout is None:
        return
    now = time.monotonic()
    end, due = now + timeout, now + watch.pause
    while not _is_readable(sock, min(due, end) - now):
        now = time.monotonic()
        if now >= end:
            raise TimeoutError("timed out")
        if now >= due:
            with watching(None):
                pause = watch.look()
            now = time.monotonic()
            due = now + pause


def _is_readable(sock: socket.socket, timeout: float) -> bool:
    poll = select.poll()  # select() knows descriptors up to 1,023 only
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(0, math.ceil(timeout * 1000))))
