"""One TCP connection between two namespaces, as fast as it goes."""

import os
import socket
import threading
import time
from contextlib import closing
from ipaddress import IPv4Address
from types import TracebackType
from typing import Self

from lab.namespaces import Namespace

# What Linux comes with, whatever this machine has been set to: another one may pace, and so decide
# about the figures instead of what is measured.
CONGESTION = "cubic"

_CHUNK = 1 << 20
# Seconds the other end may be silent; a stuck connection must not hang the benchmark.
_SILENCE = 10.0


class Stream:
    """A connection from ``source`` in one namespace to ``target`` in another.

    Its two ends are used by two threads of this process, each on a CPU of its own as far as there
    are: where the scheduler happens to put them would make more of a difference than anything
    measured. Almost all of the time is the kernel's.
    """

    def __init__(
        self, client: Namespace, server: Namespace, source: IPv4Address, target: IPv4Address
    ) -> None:
        listener = server.inside(lambda: socket.create_server((str(target), 0)))
        with closing(listener):
            listener.settimeout(_SILENCE)
            where = (str(target), listener.getsockname()[1])
            own = (str(source), 0)
            self._near = client.inside(
                lambda: socket.create_connection(where, _SILENCE, source_address=own)
            )
            self._far, _ = listener.accept()
        self._near.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION.encode())
        self._far.settimeout(_SILENCE)
        self._buffer = memoryview(bytearray(_CHUNK))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._near.close()
        self._far.close()

    def transfer(self, megabytes: int) -> float:
        """Send so many MiB; return the seconds until all have arrived."""
        cpus = sorted(os.sched_getaffinity(0))
        sender = threading.Thread(target=self._send, args=(megabytes, cpus[0]))
        _pin(cpus[-1])
        try:
            began = time.monotonic()
            sender.start()
            missing = megabytes * _CHUNK
            while missing:
                count = self._far.recv_into(self._buffer, min(missing, _CHUNK))
                if count == 0:
                    raise ConnectionError("the other end closed the connection")
                missing -= count
            return time.monotonic() - began
        finally:
            sender.join(_SILENCE)
            os.sched_setaffinity(0, cpus)

    def _send(self, megabytes: int, cpu: int) -> None:
        _pin(cpu)
        payload = bytes(_CHUNK)
        for _ in range(megabytes):
            self._near.sendall(payload)


def _pin(cpu: int) -> None:
    """Keep the calling thread on a CPU."""
    os.sched_setaffinity(0, {cpu})
