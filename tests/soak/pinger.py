"""Pings between all containers, from one thread: when each lost one was sent, and on which path."""

import contextlib
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass
from ipaddress import IPv4Address

from lab import Container

INTERVAL = 0.025
"""Seconds between two pings of a pair. They alternate in who asks, so both ways are seen."""
LATE = 3.0
"""Seconds after which an answer does not count."""

_REQUEST, _REPLY = 8, 0
# linux/socket.h, linux/icmp.h: the bits of the types that a raw socket does not get.
_SOL_RAW, _ICMP_FILTER = 255, 1
_ONLY_REPLIES = struct.pack("=I", 0xFFFFFFFF & ~(1 << _REPLY))
_BUFFER = 4 << 20
_IP_HEADER = 20

Pair = tuple[str, str]
"""The labels of two hosts, in order."""


def pair_of(one: str, two: str) -> Pair:
    """Return the pair of two hosts."""
    return (one, two) if one < two else (two, one)


@dataclass(frozen=True, slots=True)
class Lost:
    """A ping without an answer: when it was sent (monotonic), and between which hosts."""

    at: float
    pair: Pair


@dataclass(frozen=True, slots=True)
class _Station:
    address: IPv4Address
    socket: socket.socket


class Pinger(threading.Thread):
    """Pings between each two of the containers that were added, until it is stopped.

    ``add``, ``remove`` and the questions may be called from another thread.
    """

    def __init__(self) -> None:
        super().__init__(name="pinger", daemon=True)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._stations: dict[str, _Station] = {}
        self._pairs: dict[int, Pair] = {}
        self._next_id = 0
        self._round = 0
        self._waiting: dict[tuple[int, int], float] = {}
        self._answered: dict[Pair, float] = {}
        self._lost: list[Lost] = []
        self._sent = 0

    def add(self, label: str, container: Container) -> None:
        """Have the container of a host take part."""
        raw = container.inside(
            lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        )
        raw.setblocking(False)
        raw.setsockopt(_SOL_RAW, _ICMP_FILTER, _ONLY_REPLIES)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        with self._lock:
            for other in self._stations:
                self._next_id += 1
                self._pairs[self._next_id] = pair_of(label, other)
            self._stations[label] = _Station(container.address, raw)
            self._selector.register(raw, selectors.EVENT_READ)

    def remove(self, label: str) -> None:
        """End the pings with a host. Those that are on their way do not count."""
        with self._lock:
            station = self._stations.pop(label)
            self._selector.unregister(station.socket)
            station.socket.close()
            gone = {number for number, pair in self._pairs.items() if label in pair}
            for number in gone:
                self._answered.pop(self._pairs.pop(number), None)
            self._waiting = {k: at for k, at in self._waiting.items() if k[0] not in gone}

    def run(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            with self._lock:
                self._send()
                self._give_up(time.monotonic() - LATE)
            due += INTERVAL
            while (rest := due - time.monotonic()) > 0 and not self._over.is_set():
                self._receive(rest)
            # Held up for long, it does not make up for what it did not send.
            due = max(due, time.monotonic() - INTERVAL)

    def stop(self) -> None:
        """Send nothing more, wait for the last answers, and end. Safe to repeat."""
        if self._over.is_set():
            return
        self._over.set()
        if self.ident is not None:
            self.join()
            until = time.monotonic() + LATE
            while self._waiting and time.monotonic() < until:
                self._receive(0.1)
            self._give_up(time.monotonic())
        for station in self._stations.values():
            station.socket.close()
        self._selector.close()

    def sent(self) -> int:
        """Return how many pings were sent."""
        return self._sent

    def lost(self) -> list[Lost]:
        """Return all pings without an answer that were sent `LATE` seconds ago or before."""
        with self._lock:
            return list(self._lost)

    def flows_since(self, moment: float) -> bool:
        """Whether each pair had an answer to a ping sent after this moment."""
        with self._lock:
            return all(self._answered.get(p, 0.0) > moment for p in self._pairs.values())

    def silent_since(self, moment: float) -> list[Pair]:
        """Return the pairs that had no answer to a ping sent after this moment."""
        with self._lock:
            return [p for p in self._pairs.values() if self._answered.get(p, 0.0) <= moment]

    def _send(self) -> None:
        self._round += 1
        sequence = self._round & 0xFFFF
        for number, (one, two) in self._pairs.items():
            source, target = (one, two) if sequence % 2 else (two, one)
            self._sent += 1
            self._waiting[number, sequence] = time.monotonic()
            # What cannot be sent is not answered, and lost.
            with contextlib.suppress(OSError):
                self._stations[source].socket.sendto(
                    _echo(number, sequence), (str(self._stations[target].address), 0)
                )

    def _receive(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            with self._lock, contextlib.suppress(OSError):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                for _ in range(256):
                    self._heard(sock.recv(256))

    def _heard(self, packet: bytes) -> None:
        kind, _, _, number, sequence = struct.unpack_from("!BBHHH", packet, _IP_HEADER)
        at = self._waiting.pop((number, sequence), None)
        if kind == _REPLY and at is not None and number in self._pairs:
            pair = self._pairs[number]
            self._answered[pair] = max(at, self._answered.get(pair, 0.0))

    def _give_up(self, sent_before: float) -> None:
        # In order of sending: the oldest are in front.
        for key, at in list(self._waiting.items()):
            if at > sent_before:
                break
            del self._waiting[key]
            if key[0] in self._pairs:
                self._lost.append(Lost(at, self._pairs[key[0]]))


def _echo(number: int, sequence: int) -> bytes:
    head = struct.pack("!BBHHH", _REQUEST, 0, 0, number, sequence)
    total = sum(struct.unpack("!4H", head))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = 0xFFFF & ~(total + (total >> 16))
    return struct.pack("!BBHHH", _REQUEST, 0, checksum, number, sequence)
