"""Received packets joined to super-packets for the TUN device: the inverse of `segment`.

Consecutive packets of one TCP or UDP flow are appended to one pending super-packet, which is
written when something else comes, so that the order of packets stays as it was. Only what the
kernel would cut into exactly the same packets again is joined: no IP options, no fragments, TCP
flags ACK or ACK and PSH, equal headers, consecutive sequence numbers, all checksums right. (A
super-packet goes to the kernel without checksum; joining a damaged packet would heal it.)
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.packet import (
    ACK,
    GSO_TCPV4,
    GSO_UDP_L4,
    IP_HEADER,
    LONGEST_PACKET,
    NEEDS_CSUM,
    PSH,
    TCP,
    TCP_CSUM,
    UDP,
    UDP_CSUM,
    UDP_HEADER,
    VNET,
    VNET_LEN,
    VNET_PLAIN,
    Buffer,
    decrement_ttl,
    pseudo,
    set_ip_checksum,
    swapped,
    words,
)
from flanneld.backend.udp.segment import Bytes

# The most packets in one call of `Coalescer.add_rows`.
ROWS = 128
# Below this many packets numpy's fixed cost is more than a loop's.
_FEW = 4
# UDP_MAX_SEGMENTS of kernels before 6.9 (linux/udp.h).
_UDP_SEGMENTS = 64
# The part of the headers that is compared: IP and TCP with all options.
_HEAD = 80

# Writes one frame: a virtio header and a packet, in pieces. The second argument is the number of
# packets in it.
Write: TypeAlias = Callable[[Sequence[Buffer], int], None]
# Says whether a packet with this inner source may be let in.
Admit: TypeAlias = Callable[[bytes], bool]
# Told about a packet whose TTL ended here.
Expired: TypeAlias = Callable[[memoryview], None]


def _mask(protocol: int, header: int) -> Bytes:
    """Return which bytes of the headers must be equal in packets that are joined."""
    mask = np.zeros(_HEAD, np.uint8)
    mask[:header] = 0xFF
    mask[4:6] = mask[10:12] = 0  # IP id, header checksum
    if protocol == TCP:
        mask[24:28] = mask[36:38] = 0  # sequence number, checksum
        mask[33] = 0xFF & ~PSH
    else:
        mask[26:28] = 0  # checksum
    return mask


_MASKS = {
    (protocol, header): _mask(protocol, header).view(np.uint64)
    for protocol, headers in ((TCP, range(40, 81, 4)), (UDP, (28,)))
    for header in headers
}


class Coalescer:
    """Packets in, frames for the TUN device out, in the same order.

    The TTL is taken down here. ``tcp`` and ``udp`` say what may be joined; they may be switched
    off at any time.
    """

    def __init__(self, write: Write, expired: Expired, counters: Counters) -> None:
        self.tcp = True
        self.udp = True
        self._write = write
        self._expired = expired
        self._counters = counters
        self._buffer = bytearray(VNET_LEN + LONGEST_PACKET + 1)
        self._view = memoryview(self._buffer)
        self._packet = self._view[VNET_LEN:]
        self._array = np.frombuffer(self._buffer, np.uint8)[VNET_LEN:]
        self._head = np.zeros((ROWS, _HEAD), np.uint8)
        self._key = b""
        self._header = 0
        self._size = 0
        self._count = 0
        self._fill = 0
        self._sequence = 0

    def add(self, packet: memoryview, admit: Admit) -> None:
        """Take one packet; it is changed in place. Anything may be in it."""
        length = len(packet)
        if length < IP_HEADER:
            self._counters.drop_malformed += 1
            return
        if packet[0] >> 4 != 4:
            self._counters.drop_not_ipv4 += 1
            return
        header = (packet[0] & 15) * 4
        total = packet[2] << 8 | packet[3]
        if header < IP_HEADER or not header <= total <= length:
            self._counters.drop_malformed += 1
            return
        if not admit(packet[12:16].tobytes()):
            self._counters.drop_wrong_source += 1
            return
        if packet[8] <= 1:
            self._counters.drop_ttl += 1
            self._expired(packet[:total])
            return
        transport = self._joinable(packet) if total == length else 0
        if transport and self._is_intact(packet):
            self._append_one(packet, transport)
            return
        self.flush()
        decrement_ttl(packet)
        self._write((VNET_PLAIN, packet[:total]), 1)

    def add_rows(self, rows: Bytes, view: memoryview, size: int, admit: Admit) -> None:
        """Take packets of one size, at most ROWS: the rows of a matrix; changed in place.

        A row may be longer than the packet, its stride is even. The byte after an odd size holds
        zero. ``view`` is the same memory, beginning with the first row.
        """
        count, stride = len(rows), rows.strides[0]
        at = 0
        if count >= _FEW and size >= IP_HEADER + UDP_HEADER + 1:
            head = self._head[:count]
            width = min(_HEAD, size)
            head[:, :width] = rows[:, :width]
            head[:, width:] = 0
            batch: _Batch | None = None
            while count - at >= _FEW:
                first = view[at * stride : at * stride + size]
                transport = self._joinable(first)
                if not transport:
                    self.add(first, admit)
                    at += 1
                    continue
                if batch is None:
                    batch = _Batch(rows[:, : size + (size & 1)], head)
                end = batch.run(at, first[9], transport)
                if end - at >= _FEW and batch.is_intact(at, end, first[9], transport, size):
                    self._add_run(rows[at:end], head[at:end], first, transport, admit)
                else:
                    self._add_each(view, at, end, stride=stride, size=size, admit=admit)
                at = end
        self._add_each(view, at, count, stride=stride, size=size, admit=admit)

    def flush(self) -> None:
        """Write what is pending."""
        count = self._count
        if not count:
            return
        self._count = 0
        packet, fill = self._packet, self._fill
        if count == 1:
            self._buffer[:VNET_LEN] = VNET_PLAIN
            self._write((self._view[: VNET_LEN + fill],), 1)
            return
        protocol = packet[9]
        packet[2:4] = fill.to_bytes(2, "big")
        set_ip_checksum(packet, IP_HEADER)
        total = pseudo(packet[12:20], protocol, fill - IP_HEADER).to_bytes(2, "little")
        if protocol == TCP:
            packet[36:38] = total
            kind, offset = GSO_TCPV4, TCP_CSUM
        else:
            packet[24:26] = (fill - IP_HEADER).to_bytes(2, "big")
            packet[26:28] = total
            kind, offset = GSO_UDP_L4, UDP_CSUM
        gso = self._size - self._header
        VNET.pack_into(self._buffer, 0, NEEDS_CSUM, kind, self._header, gso, IP_HEADER, offset)
        self._write((self._view[: VNET_LEN + fill],), count)

    def _joinable(self, packet: memoryview) -> int:
        """Return the length of the headers of a packet that may be joined, else 0.

        Its checksums and its TTL (but for 0 and 1) are not looked at.
        """
        length = len(packet)
        if (
            length < IP_HEADER + UDP_HEADER + 1
            or packet[0] != 0x45
            or packet[2] << 8 | packet[3] != length
            # Don't fragment, and no fragment: then its IP id means nothing (RFC 6864).
            or packet[6] != 0x40
            or packet[7]
            or packet[8] <= 1
        ):
            return 0
        protocol = packet[9]
        if protocol == TCP:
            if not self.tcp or length <= 40 or packet[33] & ~PSH != ACK:
                return 0
            header = IP_HEADER + (packet[32] >> 4) * 4
            return header if 40 <= header < length and packet[32] & 15 == 0 else 0
        if protocol == UDP:
            named = packet[24] << 8 | packet[25]
            summed = packet[26] or packet[27]
            return 28 if self.udp and named == length - IP_HEADER and summed else 0
        return 0

    @staticmethod
    def _is_intact(packet: memoryview) -> bool:
        total = words(packet) + pseudo(packet[12:20], packet[9], len(packet) - IP_HEADER)
        return total % 65535 == 0 and words(packet[:IP_HEADER]) == 0

    def _add_each(
        self, view: memoryview, at: int, end: int, *, stride: int, size: int, admit: Admit
    ) -> None:
        for row in range(at, end):
            self.add(view[row * stride : row * stride + size], admit)

    def _append_one(self, packet: memoryview, header: int) -> None:
        """Append one packet, or begin anew with it."""
        length = len(packet)
        key = _key(packet, header)
        sequence = int.from_bytes(packet[24:28], "big") if packet[9] == TCP else 0
        if not self._room(key, sequence, length):
            self._begin(packet, key, header)
        else:
            fill = self._fill
            self._packet[fill : fill + length - header] = packet[header:]
            self._advance(1, length - header, fill + length - header)
        if packet[9] == TCP and packet[33] & PSH:
            self._packet[33] |= PSH
            self.flush()
        elif length < self._size:
            self.flush()

    def _add_run(
        self, rows: Bytes, head: Bytes, first: memoryview, header: int, admit: Admit
    ) -> None:
        """Take intact packets of one flow and one size, with consecutive sequence numbers."""
        if not admit(first[12:16].tobytes()):
            self._counters.drop_wrong_source += len(rows)
            return
        size, tcp = len(first), first[9] == TCP
        key = _key(first, header)
        pushed: list[int] = []
        if tcp:
            pushed = [int(at) + 1 for at in np.flatnonzero(head[:, 33] & PSH)]
        at = 0
        for stop in [*pushed, len(rows)]:
            while at < stop:
                sequence = int.from_bytes(head[at, 24:28].tobytes(), "big") if tcp else 0
                room = self._room(key, sequence, size)
                if not room:
                    self._begin(rows[at, :size].data, key, header)
                    at += 1
                    continue
                count = min(room, stop - at)
                fill, each = self._fill, size - header
                end = fill + count * each
                self._array[fill:end].reshape(count, each)[:] = rows[at : at + count, header:size]
                self._advance(count, each, end)
                at += count
            if pushed and stop == pushed[0]:
                del pushed[0]
                if self._count:
                    self._packet[33] |= PSH
                self.flush()

    def _room(self, key: bytes, sequence: int, length: int) -> int:
        """Return how many packets of this length can be appended."""
        if (
            not self._count
            or key != self._key
            or length > self._size
            or (key[-1] == TCP and sequence != self._sequence)
        ):
            return 0
        each = length - self._header
        room = (LONGEST_PACKET - self._fill) // each
        return room if key[-1] == TCP else min(room, _UDP_SEGMENTS - self._count)

    def _begin(self, packet: memoryview, key: bytes, header: int) -> None:
        self.flush()
        length = len(packet)
        self._packet[:length] = packet
        decrement_ttl(self._packet)
        self._key, self._header, self._size = key, header, length
        self._count, self._fill = 1, length
        if packet[9] == TCP:
            sequence = int.from_bytes(packet[24:28], "big")
            self._sequence = (sequence + length - header) & 0xFFFFFFFF

    def _advance(self, count: int, each: int, fill: int) -> None:
        self._count += count
        self._fill = fill
        self._sequence = (self._sequence + count * each) & 0xFFFFFFFF


def _key(packet: memoryview, header: int) -> bytes:
    """Return what must be equal in packets that are joined. The last byte is the protocol."""
    ip = packet[:header].tobytes()
    if ip[9] == TCP:
        # Without lengths, IP id, sequence number, flags (all have ACK or ACK and PSH), checksums.
        return b"".join((ip[:2], ip[6:9], ip[12:24], ip[28:33], ip[34:36], ip[38:], b"\x06"))
    return b"".join((ip[:2], ip[6:9], ip[12:24], b"\x11"))


class _Batch:
    """What is computed once for all packets of a call."""

    def __init__(self, rows: Bytes, head: Bytes) -> None:
        self._rows = rows
        self._head = head
        self._words = head.view(np.uint64)
        self._differs: dict[int, NDArray[np.uint8]] = {}
        self._sums: NDArray[np.uint32] | None = None

    def run(self, at: int, protocol: int, header: int) -> int:
        """Return the end of the packets from ``at`` on whose headers are like its own."""
        kind = header if protocol == TCP else 0
        differs = self._differs.get(kind)
        if differs is None:
            changed = self._words[1:] ^ self._words[:-1]
            changed &= _MASKS[protocol, header]
            differs = np.any(changed, axis=1).view(np.uint8)
            self._differs[kind] = differs
        rest = differs[at:]
        if not len(rest):
            return at + 1
        where = int(rest.argmax())
        return at + where + 1 if rest[where] else len(self._head)

    def is_intact(self, at: int, end: int, protocol: int, header: int, size: int) -> bool:
        """Return whether all checksums are right and the sequence numbers follow each other."""
        if self._sums is None:
            self._sums = np.add.reduce(self._rows.view(np.uint16), axis=1, dtype=np.uint32)
        head = self._head[at:end]
        ip = np.add.reduce(head[:, :IP_HEADER].view(np.uint16), axis=1, dtype=np.uint32)
        if (ip % 65535).any():
            return False
        addresses = head[0, 12:20].tobytes()
        extra = words(addresses) + (protocol << 8) + swapped(size - IP_HEADER)
        if ((self._sums[at:end] + extra) % 65535).any():
            return False
        if protocol == TCP:
            sequence = head[:, 24:28].view(np.uint32)[:, 0].byteswap()
            return bool(((sequence[1:] - sequence[:-1]) == size - header).all())
        # A UDP checksum of 0 means that there is none.
        return bool(head[:, 26:28].view(np.uint16).all())
