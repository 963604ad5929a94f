"""Random data through TCP between containers, compared by its hash."""

import hashlib
import os
import socket
import threading
from collections.abc import Callable

from lab import Container

_PIECE = 1 << 20
_SECONDS = 600.0


class _Transfer:
    """One direction: a thread that sends and one that receives."""

    def __init__(self, source: Container, target: Container, megabytes: int) -> None:
        listener = target.inside(lambda: socket.create_server((str(target.address), 0)))
        listener.settimeout(10.0)
        port = listener.getsockname()[1]
        address = (str(target.address), port)
        self._out = source.inside(lambda: socket.create_connection(address, timeout=10.0))
        self._in, _ = listener.accept()
        listener.close()
        self._out.settimeout(30.0)
        self._in.settimeout(30.0)
        self._megabytes = megabytes
        self.sent = hashlib.sha256()
        self.received = hashlib.sha256()
        self.size = 0
        self.errors: list[OSError] = []
        self.threads = [
            threading.Thread(target=self._guard, args=(work,), daemon=True)
            for work in (self._send, self._receive)
        ]

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self.errors.append(error)

    def _send(self) -> None:
        with self._out:
            for number in range(self._megabytes):
                # Sizes that fill no segment.
                data = os.urandom(_PIECE + number % 7)
                self.sent.update(data)
                self._out.sendall(data)

    def _receive(self) -> None:
        buffer = bytearray(_PIECE)
        view = memoryview(buffer)
        with self._in:
            while count := self._in.recv_into(buffer):
                self.received.update(view[:count])
                self.size += count


def _run(transfers: list[_Transfer], meanwhile: Callable[[], None] | None) -> None:
    threads = [thread for transfer in transfers for thread in transfer.threads]
    for thread in threads:
        thread.start()
    for thread in threads:
        left = _SECONDS
        while thread.is_alive() and left > 0:
            thread.join(0.05)
            left -= 0.05
            if meanwhile is not None:
                meanwhile()
    for transfer in transfers:
        assert not transfer.errors
        assert transfer.size > 0
        assert transfer.received.digest() == transfer.sent.digest()


def one_way(source: Container, target: Container, megabytes: int) -> None:
    """Send so much; fails unless exactly that arrives."""
    _run([_Transfer(source, target, megabytes)], None)


def both_ways(
    one: Container,
    two: Container,
    megabytes: int,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Send so much in each direction at once; call ``meanwhile`` again and again until then."""
    _run([_Transfer(one, two, megabytes), _Transfer(two, one, megabytes)], meanwhile)
