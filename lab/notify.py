"""The service manager's end of sd_notify: a socket that collects what a daemon says."""

import select
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Notification:
    """One datagram, and when it came (time.monotonic())."""

    text: str
    at: float


class NotifySocket:
    """A datagram socket at ``path``, read by a thread until ``close()``.

    In the file system, not abstract: abstract names belong to one network namespace. What was sent
    is among `messages` at once, however late the thread gets its turn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self._messages: list[Notification] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._collect, name=str(path), daemon=True)
        self._thread.start()

    @property
    def messages(self) -> list[Notification]:
        """Everything sent so far, oldest first."""
        if not self._closing.is_set():
            self._take()
        return list(self._messages)

    def _collect(self) -> None:
        while not self._closing.is_set():
            select.select([self._socket], [], [])
            self._take()

    def _take(self) -> None:
        """Take what has come and nobody has taken yet."""
        with self._lock, suppress(BlockingIOError):
            while data := self._socket.recv(4096, socket.MSG_DONTWAIT):
                text = data.decode(errors="replace")
                self._messages.append(Notification(text, time.monotonic()))

    def close(self) -> None:
        """Stop listening; what was received stays readable. Safe to repeat."""
        if self._closing.is_set():
            return
        self._closing.set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", str(self.path))
        self._thread.join()
        self._socket.close()
        self.path.unlink(missing_ok=True)
