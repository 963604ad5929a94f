"""Netlink sockets for what comes in bulk: writing and dumping entries, and watching the kernel."""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from flanneld.kernel import wire
from flanneld.kernel.state import Entry, Found
from flanneld.kernel.wire import Link

T = TypeVar("T")

# linux/netlink.h, asm/socket.h
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 270, 10, 11, 12
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
# linux/bpf_common.h: load a word from an offset; jump if equal; return.
_BPF_LD_W_ABS, _BPF_JEQ_K, _BPF_RET_K = 0x20, 0x15, 0x06

# Bytes in one send; the kernel handles it whole before the call returns.
_SEND = 32768
_RECEIVE = 1 << 17
# Seconds; the kernel answers a send of this size within milliseconds.
_TIMEOUT = 5.0
# ESRCH for a route, ENOENT for a neighbour or FDB entry, ENODEV if it went with its device.
_GONE = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV})
# The monitor's buffer ran over, or there was no memory for an event.
_LOST = frozenset({errno.ENOBUFS, errno.ENOMEM})
# A dump that was disturbed by a change is taken again; the last one is used as it is.
_DUMP_TRIES = 4

# Messages read at one go from the monitor, so that others get their turn in a storm of events.
_READS = 256

# Bytes. Refusals of a whole send (1 KiB each, as the kernel counts), and a burst of 10,000 events.
_REQUEST_BUFFER = 4 << 20
_MONITOR_BUFFER = 8 << 20


@dataclass(frozen=True, slots=True)
class Refusal:
    """The kernel refused one message of a batch."""

    number: int
    """errno"""
    text: str
    """The words of errno, and the kernel's own if it had any."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class EntryEvent:
    """A route, neighbour or FDB entry was added, changed or (`deleted`) removed by somebody."""

    found: Found
    deleted: bool


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """A device appeared, changed or (`deleted`) vanished."""

    link: Link
    deleted: bool


@dataclass(frozen=True, slots=True)
class AddressEvent:
    """An IPv4 address of the device was added or removed."""

    index: int
    deleted: bool


@dataclass(frozen=True, slots=True)
class Overflow:
    """Events were lost: whatever was known of the kernel may be wrong."""


KernelEvent = EntryEvent | LinkEvent | AddressEvent | Overflow


class RequestSocket:
    """Requests to the kernel of the present network namespace.

    Every method raises OSError if the kernel gives no answer to the request as a whole.
    """

    def __init__(self) -> None:
        self._socket = _open(0, _REQUEST_BUFFER)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            try:
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            except OSError:
                continue  # older than 4.20: less is said, and the filters are applied below
        self._socket.settimeout(_TIMEOUT)
        self.port: int = self._socket.getsockname()[0]
        """Marks the events which our own requests cause."""
        self._seq = 0
        self._disturbed = False

    def dump(
        self,
        request: Callable[[int], bytes],
        wanted: int,
        parse: Callable[[bytes, int, int], T | None],
    ) -> list[T]:
        """Return what ``parse`` makes of each message of type ``wanted`` of a dump.

        ``request`` makes the request from its sequence number; ``parse`` gets the data, the start
        of the message's body and its end. A dump that was disturbed by a change is taken again.
        """
        found: list[T] = []
        for _ in range(_DUMP_TRIES):
            self._disturbed = False
            found = list(self.iterate(request, wanted, parse))
            if not self._disturbed:
                break
        return found

    def iterate(
        self,
        request: Callable[[int], bytes],
        wanted: int,
        parse: Callable[[bytes, int, int], T | None],
    ) -> Iterator[T]:
        """Yield the same, once, as it comes; who does not take all of it closes the socket."""
        seq = self._seq
        self._seq = (seq + 1) & 0x3FFFFFFF
        self._socket.send(request(seq))
        while True:
            data = self._socket.recv(_RECEIVE)
            for offset, end, kind, flags, answered, _ in wire.split_messages(data):
                if answered != seq:
                    continue
                self._disturbed |= bool(flags & wire.NLM_F_DUMP_INTR)
                if kind in (wire.NLMSG_DONE, wire.NLMSG_ERROR):
                    number, words = wire.parse_error(data, offset, end, flags)
                    # A table that never had a route does not exist.
                    if number not in (0, errno.ENOENT):
                        raise OSError(number, _refusal(number, words).text)
                    return
                found = parse(data, offset, end) if kind == wanted else None
                if found is not None:
                    yield found

    def get(
        self, request: bytes, wanted: int, parse: Callable[[bytes, int, int], T | None]
    ) -> T | None:
        """Return what ``parse`` makes of the one answer to a request, whatever its number."""
        self._socket.send(request)
        while True:
            data = self._socket.recv(_RECEIVE)
            for offset, end, kind, flags, *_ in wire.split_messages(data):
                if kind == wanted:
                    return parse(data, offset, end)
                number, words = wire.parse_error(data, offset, end, flags)
                if kind == wire.NLMSG_ERROR and number:
                    raise OSError(number, _refusal(number, words).text)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class EntrySocket(RequestSocket):
    """Requests about entries."""

    def apply(
        self,
        write: Sequence[Entry],
        delete: Sequence[Found],
        may_replace: Callable[[Entry], bool] = lambda _: True,
        *,
        spread: bool = False,
    ) -> tuple[dict[Entry, Refusal], dict[Found, Refusal]]:
        """Add or replace the first, then delete exactly the second, as one batch.

        Where ``may_replace`` is false, an entry is refused (EEXIST) if its slot is not empty.
        ``spread``: there are many routes (see `wire.spread_scope`).

        Return what was refused of each, and why. That something is gone already is no refusal.
        """
        refused = self._batch(
            [
                partial(wire.pack_write, entry=entry, replace=may_replace(entry), spread=spread)
                for entry in write
            ]
            + [partial(wire.pack_delete, found=found) for found in delete]
        )
        count = len(write)
        return (
            {write[i]: why for i, why in refused.items() if i < count},
            {
                delete[i - count]: why
                for i, why in refused.items()
                if i >= count and why.number not in _GONE
            },
        )

    def routes(self, protocol: int) -> list[Found]:
        """Return the IPv4 routes of the main table with this protocol number (0: with any)."""
        found = self.dump(
            lambda seq: wire.pack_route_dump(seq, protocol), wire.RTM_NEWROUTE, wire.parse_route
        )
        return [item for item in found if protocol in (0, item.protocol)]

    def neighbours(self, oif: int) -> list[Found]:
        """Return the IPv4 neighbours of a device."""
        found = self.dump(
            lambda seq: wire.pack_neighbour_dump(seq, oif), wire.RTM_NEWNEIGH, wire.parse_neighbour
        )
        return [item for item in found if item.entry.oif == oif]

    def fdb(self, oif: int) -> list[Found]:
        """Return the FDB entries of a device."""
        found = self.dump(
            lambda seq: wire.pack_fdb_dump(seq, oif), wire.RTM_NEWNEIGH, wire.parse_neighbour
        )
        return [item for item in found if item.entry.oif == oif]

    def _batch(self, messages: Sequence[Callable[[int], bytes]]) -> dict[int, Refusal]:
        """Send the messages, made from their sequence numbers; return the refusals by position."""
        refused: dict[int, Refusal] = {}
        start = 0
        while start < len(messages):
            base = self._seq
            chunk: list[bytes] = []
            size = 0
            while start + len(chunk) < len(messages) and size < _SEND:
                message = messages[start + len(chunk)](base + len(chunk))
                chunk.append(message)
                size += len(message)
            self._seq = (base + len(chunk)) & 0x3FFFFFFF
            chunk[-1] = wire.with_ack(chunk[-1])
            self._socket.send(b"".join(chunk))
            for seq, refusal in self._answers(base, base + len(chunk) - 1).items():
                refused[start + seq - base] = refusal
            start += len(chunk)
        return refused

    def _answers(self, first: int, last: int) -> dict[int, Refusal]:
        """Read until the answer to the last message; return the refusals by sequence number."""
        refusals: dict[int, Refusal] = {}
        while True:
            data = self._socket.recv(_RECEIVE)
            for offset, end, kind, flags, seq, _ in wire.split_messages(data):
                if kind != wire.NLMSG_ERROR or not first <= seq <= last:
                    continue  # left over from a request that was given up
                number, words = wire.parse_error(data, offset, end, flags)
                if number:
                    refusals[seq] = _refusal(number, words)
                if seq == last:
                    return refusals


class Monitor:
    """What happens to links, IPv4 addresses and entries of the present network namespace."""

    def __init__(self, *, neighbours: bool) -> None:
        """``neighbours``: also to neighbours and FDB entries, of which a busy host has many."""
        groups = wire.RTMGRP_LINK | wire.RTMGRP_IPV4_IFADDR | wire.RTMGRP_IPV4_ROUTE
        if neighbours:
            groups |= wire.RTMGRP_NEIGH
        self._socket = _open(groups, _MONITOR_BUFFER)
        self._socket.setblocking(False)

    def ignore(self, port: int) -> None:
        """Have the kernel keep back the events which requests from this netlink port cause.

        10,000 peers are 30,000 entries; their echo would overflow the buffer.
        """
        # The kernel hands each event to the filter by itself; its header ends with the port, and
        # BPF loads it as big-endian.
        number = int.from_bytes(struct.pack("=I", port), "big")
        program = b"".join(
            struct.pack("=HBBI", *instruction)
            for instruction in (
                (_BPF_LD_W_ABS, 0, 0, 12),
                (_BPF_JEQ_K, 0, 1, number),
                (_BPF_RET_K, 0, 0, 0),
                (_BPF_RET_K, 0, 0, 0xFFFFFFFF),
            )
        )
        memory = ctypes.create_string_buffer(program)
        argument = struct.pack("@HP", len(program) // 8, ctypes.addressof(memory))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, argument)

    def fileno(self) -> int:
        """Return the descriptor, to poll for reading."""
        return self._socket.fileno()

    def read(self) -> list[KernelEvent]:
        """Return events there are, without waiting; `Overflow` where some were lost."""
        events: list[KernelEvent] = []
        for _ in range(_READS):
            try:
                data = self._socket.recv(_RECEIVE)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in _LOST:
                    raise
                events.append(Overflow())
                break
            events += _events(data)
        return events

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _open(groups: int, buffer: int) -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    try:
        try:
            # Beyond net.core.rmem_max; allowed with CAP_NET_ADMIN, which routes need anyway.
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.bind((0, groups))
    except OSError:
        sock.close()
        raise
    return sock


def _refusal(number: int, words: str) -> Refusal:
    text = os.strerror(number).lower()
    return Refusal(number, f"{text} ({words.rstrip('.')})" if words else text)


def _events(data: bytes) -> list[KernelEvent]:
    events: list[KernelEvent] = []
    for offset, end, kind, *_ in wire.split_messages(data):
        if kind in (wire.RTM_NEWROUTE, wire.RTM_DELROUTE):
            found = wire.parse_route(data, offset, end)
            if found is not None:
                events.append(EntryEvent(found, kind == wire.RTM_DELROUTE))
        elif kind in (wire.RTM_NEWNEIGH, wire.RTM_DELNEIGH):
            found = wire.parse_neighbour(data, offset, end)
            if found is not None:
                events.append(EntryEvent(found, kind == wire.RTM_DELNEIGH))
        elif kind in (wire.RTM_NEWLINK, wire.RTM_DELLINK):
            link = wire.parse_link(data, offset, end)
            if link is not None:
                events.append(LinkEvent(link, kind == wire.RTM_DELLINK))
        elif kind in (wire.RTM_NEWADDR, wire.RTM_DELADDR):
            index = wire.parse_address_index(data, offset, end)
            if index is not None:
                events.append(AddressEvent(index, kind == wire.RTM_DELADDR))
    return events
