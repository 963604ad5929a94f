"""When the kernel gets its entries for peers: its own notifications, with this process's clock."""

import contextlib
import errno
import select
import socket
import struct
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Self

from flanneld.kernel.wire import (
    AF_BRIDGE,
    NUD_PERMANENT,
    RT_TABLE_MAIN,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    RTMGRP_IPV4_ROUTE,
    RTMGRP_NEIGH,
)
from lab.namespaces import Namespace

# The subnets of all peers have this length; nothing else that comes up while measuring has.
SUBNET_LENGTH = 24
# asm-generic/socket.h; a dump's worth of notifications must fit, whoever is slow.
_SO_RCVBUFFORCE, _BUFFER_BYTES = 33, 128 << 20
_HEADER = struct.Struct("=IHHII")
# Seconds without a notification after which no more are expected.
_QUIET = 0.3


class KernelWatch:
    """A netlink socket in the namespace, read by a thread, from when it is made until ``close``.

    Counts by kind ("route", "neighbour", "fdb") what was written, and "gone" for what was removed.
    With a ``pause`` the thread reads only so often (seconds), which spares the CPU when thousands
    come: a time is then at most that much late.
    """

    def __init__(self, namespace: Namespace, pause: float = 0.0) -> None:
        self._pause = pause
        self._socket = namespace.inside(_open)
        self._closing = threading.Event()
        self._news = threading.Event()
        self._failure: OSError | None = None
        self.counts: Counter[str] = Counter()
        self.last = 0.0
        """When the newest entry was seen (time.monotonic())."""
        self._last_of_all = time.monotonic()
        self._thread = threading.Thread(target=self._read, name="kernel watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading."""
        self._closing.set()
        self._thread.join()
        self._socket.close()

    def wait_written(self, peers: int, timeout: float) -> float | None:
        """Wait until every kind that comes at all has come for so many peers, and no more comes.

        Returns when the last one was seen; None if they are not complete ``timeout`` seconds from
        now.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._raise_failure()
            kinds = [count for kind, count in self.counts.items() if kind != "gone"]
            quiet = time.monotonic() - self._last_of_all > _QUIET
            if quiet and (not peers or (kinds and min(kinds) >= peers)):
                return self.last
            time.sleep(0.01)
        return None

    def wait_next(self, timeout: float, quiet: float) -> float | None:
        """Wait for an entry, then until none came for ``quiet`` seconds; when was the last?

        Counts from the latest ``forget``. None if nothing comes within ``timeout`` seconds.
        """
        if not self._news.wait(timeout):
            self._raise_failure()
            return None
        while (left := self._last_of_all + quiet - time.monotonic()) > 0:
            time.sleep(left)
        self._raise_failure()
        return self.last

    def wait_gone(self, peers: int, timeout: float = 20.0) -> None:
        """Wait until the entries of so many peers are gone, or as good as that gets."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            quiet = time.monotonic() - self._last_of_all > _QUIET
            if quiet and self.counts["gone"] >= peers:
                return
            time.sleep(0.02)

    def forget(self) -> None:
        """Count from now on."""
        self.counts.clear()
        self._news.clear()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _read(self) -> None:
        buffer = bytearray(1 << 16)
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while not self._closing.is_set():
            if not poll.poll(50):
                continue
            try:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        self._take(buffer, self._socket.recv_into(buffer))
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    error.add_note("more notifications than the socket's buffer holds")
                self._failure = error
                return
            self._closing.wait(self._pause)

    def _take(self, buffer: bytearray, length: int) -> None:
        now = time.monotonic()
        offset = 0
        while offset + 28 <= length:
            size, number, _, _, _ = _HEADER.unpack_from(buffer, offset)
            kind = _kind(number, buffer, offset + 16)
            if kind:
                self.counts[kind] += 1
                self._last_of_all = now
                if kind != "gone":
                    self.last = now
                    self._news.set()
            offset += max(16, (size + 3) & ~3)


def _kind(number: int, buffer: bytearray, at: int) -> str:
    """What a notification is about; empty for what is none of a peer's entries.

    ``at`` is where struct rtmsg or struct ndmsg begins.
    """
    if number in (RTM_NEWROUTE, RTM_DELROUTE):
        if buffer[at + 1] != SUBNET_LENGTH or buffer[at + 4] != RT_TABLE_MAIN:
            return ""
        return "route" if number == RTM_NEWROUTE else "gone"
    if number == RTM_DELNEIGH:
        return "gone"
    if number == RTM_NEWNEIGH:
        if buffer[at] == AF_BRIDGE:
            return "fdb"
        (state,) = struct.unpack_from("=H", buffer, at + 8)
        return "neighbour" if state & NUD_PERMANENT else ""
    return ""


def _open() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        sock.bind((0, RTMGRP_IPV4_ROUTE | RTMGRP_NEIGH))
    except BaseException:
        sock.close()
        raise
    return sock
