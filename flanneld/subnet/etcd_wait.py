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
        wait = _wait_for(self)
        if wait is not None:
            wait.until(select.POLLIN)
        return super().recv_into(*args, **kwargs)


class WatchfulTLSSocket(ssl.SSLSocket):
    """The same with TLS."""

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        wait = _wait_for(self)
        if wait is None:
            return super().recv_into(*args, **kwargs)
        # What can be read may be nothing for us, as the tickets that follow each handshake and a
        # part of a record. OpenSSL would wait for the rest by itself, and nobody look meanwhile.
        timeout = self.gettimeout()
        self.settimeout(0.0)
        try:
            while True:
                try:
                    return super().recv_into(*args, **kwargs)
                except ssl.SSLWantReadError:
                    wait.until(select.POLLIN)
                except ssl.SSLWantWriteError:
                    wait.until(select.POLLOUT)
        finally:
            self.settimeout(timeout)


def watchful(sock: socket.socket) -> WatchfulSocket:
    """Return a socket in the place of ``sock``, which is used no more."""
    timeout = sock.gettimeout()
    taken = WatchfulSocket(fileno=sock.detach())
    taken.settimeout(timeout)
    return taken


def _wait_for(sock: socket.socket) -> "_Wait | None":
    """Return how to wait before a read; None if the read itself shall."""
    watch: Watch | None = getattr(_here, "watch", None)
    timeout = sock.gettimeout()
    return None if watch is None or not timeout else _Wait(sock, watch, timeout)


class _Wait:
    """One read's wait; it may be for several things, one after the other."""

    def __init__(self, sock: socket.socket, watch: Watch, timeout: float) -> None:
        self._sock = sock
        self._look = watch.look
        now = time.monotonic()
        self._end, self._due = now + timeout, now + watch.pause

    def until(self, event: int) -> None:
        """Wait for an event of poll(2). Raises TimeoutError as the read itself would."""
        while not self._is_there(event, min(self._due, self._end) - time.monotonic()):
            now = time.monotonic()
            if now >= self._end:
                raise TimeoutError("timed out")
            if now >= self._due:
                try:
                    with watching(None):
                        pause = self._look()
                except OSError:
                    # Slow to answer, but alive: what has come meanwhile counts.
                    if self._is_there(event, 0.0):
                        return
                    raise
                self._due = time.monotonic() + pause

    def _is_there(self, event: int, timeout: float) -> bool:
        poll = select.poll()  # select() knows descriptors up to 1,023 only
        poll.register(self._sock, event)
        return bool(poll.poll(max(0, math.ceil(timeout * 1000))))
