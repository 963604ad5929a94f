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
    words,
)
from flanneld.backend.udp.segment import Bytes

# The most packets in a `Batch`.
ROWS = 128
# Below this many packets numpy's fixed cost is more than a loop's.
FEW = 4
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


_MODULUS = np.uint32(65535)
_NOWHERE = np.zeros(0, np.intp)


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
        self._key = b""
        self._header = 0
        self._size = 0
        self._count = 0
        self._fill = 0
        self._sequence = 0

    def add(self, packet: memoryview, admit: Admit, *, join: bool = True) -> None:
        """Take one packet; it is changed in place. Anything may be in it.

        Without ``join`` it is written at once, after what is pending.
        """
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
        transport = self._joinable(packet) if join and total == length else 0
        if transport and self._is_intact(packet):
            self._append_one(packet, transport)
            return
        if self._count:
            self.flush()
        decrement_ttl(packet)
        self._write((VNET_PLAIN, packet if total == length else packet[:total]), 1)

    def add_rows(self, batch: "Batch", admit: Admit) -> None:
        """Take the packets in a batch's memory; they are changed in place."""
        batch.fresh = True
        count, at = batch.count, 0
        while count - at >= FEW:
            first = batch.packet(at)
            transport = self._joinable(first)
            if not transport:
                self.add(first, admit)
                at += 1
                continue
            end = batch.run(at, first[9], transport)
            if end - at >= FEW and batch.is_intact(at, end, first, transport):
                self._add_run(batch, at, end, first, transport, admit=admit)
            else:
                for row in range(at, end):
                    self.add(batch.packet(row), admit)
            at = end
        for row in range(at, count):
            self.add(batch.packet(row), admit)

    def flush(self) -> None:
        """Write what is pending."""
        count = self._count
        if not count:
            return
        self._count = 0
        self._key = b""
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

    def _append_one(self, packet: memoryview, header: int) -> None:
        """Append one packet, or begin anew with it."""
        length = len(packet)
        key = _key(packet, header)
        sequence = int.from_bytes(packet[24:28], "big") if packet[9] == TCP else 0
        if not self._room(key, sequence, length):
            self._begin(packet, key, header, length - header)
        fill = self._fill
        self._packet[fill : fill + length - header] = packet[header:]
        self._advance(1, length - header)
        if packet[9] == TCP and packet[33] & PSH:
            self._packet[33] |= PSH
            self.flush()
        elif length < self._size:
            self.flush()

    def _add_run(
        self, batch: "Batch", at: int, end: int, first: memoryview, header: int, *, admit: Admit
    ) -> None:
        """Take intact packets of one flow and one size, with consecutive sequence numbers.

        PSH is in all of them or in none, or in the last.
        """
        if not admit(first[12:16].tobytes()):
            self._counters.drop_wrong_source += end - at
            return
        tcp = first[9] == TCP
        size, each = len(first), len(first) - header
        key = _key(first, header)
        sequence = int.from_bytes(first[24:28], "big") if tcp else 0
        while at < end:
            room = self._room(key, sequence, size)
            if not room:
                # Without its payload, which comes with that of the others below.
                self._begin(batch.packet(at), key, header, each)
                room = self._room(key, sequence, size)
            count = min(room, end - at)
            fill = self._fill
            self._array[fill : fill + count * each].reshape(count, each)[...] = batch.rows[
                at : at + count, header:size
            ]
            self._advance(count, each)
            at += count
            sequence = sequence + count * each & 0xFFFFFFFF
            if size < self._size:
                self.flush()
        if tcp and batch.packet(end - 1)[33] & PSH:
            self._packet[33] |= PSH
            self.flush()

    def _room(self, key: bytes, sequence: int, length: int) -> int:
        """Return how many packets of this length can be appended."""
        if (
            key != self._key
            or length > self._size
            or (key[-1] == TCP and sequence != self._sequence)
        ):
            return 0
        room = (LONGEST_PACKET - self._fill) // (length - self._header)
        if length < self._size:
            # A shorter packet is the last.
            room = min(room, 1)
        return room if key[-1] == TCP else min(room, _UDP_SEGMENTS - self._count)

    def _begin(self, packet: memoryview, key: bytes, header: int, each: int) -> None:
        """Begin a super-packet with the headers of ``packet`` and no payload yet."""
        self.flush()
        self._packet[:header] = packet[:header]
        decrement_ttl(self._packet)
        self._key, self._header, self._size = key, header, header + each
        self._fill = header
        if packet[9] == TCP:
            self._sequence = int.from_bytes(packet[24:28], "big")

    def _advance(self, count: int, each: int) -> None:
        self._count += count
        self._fill += count * each
        self._sequence = self._sequence + count * each & 0xFFFFFFFF


def _key(packet: memoryview, header: int) -> bytes:
    """Return what must be equal in packets that are joined. The last byte is the protocol."""
    ip = packet[:header].tobytes()
    if ip[9] == TCP:
        # Without lengths, IP id, sequence number, flags (all have ACK or ACK and PSH), checksums.
        return b"".join((ip[:2], ip[6:9], ip[12:24], ip[28:33], ip[34:36], ip[38:], b"\x06"))
    return b"".join((ip[:2], ip[6:9], ip[12:24], b"\x11"))


class Batch:
    """Received packets of one size in memory, with all views of it made beforehand.

    ``memory`` begins with the first packet, whose address is even if ``size`` is; there are
    ``count`` of them, at most ROWS, ``stride`` bytes apart. The same object serves all batches of
    this shape in the same place.
    """

    def __init__(self, memory: Bytes, count: int, size: int, stride: int) -> None:
        self.count = count
        self.size = size
        self.rows = memory[: count * stride].reshape(count, stride)
        self.fresh = True
        """New packets have come since the sums were computed."""
        self._view = memory.data
        self._stride = stride
        # An odd last byte is summed with a zero beside it, of which packets in a row have none.
        self._padded = np.zeros((count, size + 1), np.uint8) if size & 1 else None
        source = self.rows[:, :size] if self._padded is None else self._padded
        self._pairs = source.view(np.uint16)
        width = min(_HEAD, size)
        self._width_rows = self.rows[:, :width]
        self._head = np.zeros((count, _HEAD), np.uint8)
        self._width_head = self._head[:, :width]
        words64 = self._head.view(np.uint64)
        self._later, self._earlier = words64[1:], words64[:-1]
        self._ip_pairs = self._head[:, :IP_HEADER].view(np.uint16)
        self._sequences = self._head.view(np.uint32)[:, 6]
        self._numbers = np.arange(count, dtype=np.uint32)
        self._changed = np.zeros((count - 1, _HEAD // 8), np.uint64)
        self._sums = np.zeros((2, count), np.uint32)
        self._extra = np.zeros((2, 1), np.uint32)
        # Nonzero where a sum or a sequence number is.
        self._wrong = np.zeros((3, count), np.uint32)
        self._udp_checksums = self._head.view(np.uint16)[:, 13]
        self._step = 0
        self._multiples = self._numbers
        self._different: dict[int, NDArray[np.intp]] = {}
        self._summed = False

    def packet(self, row: int) -> memoryview:
        """Return a packet."""
        at = row * self._stride
        return self._view[at : at + self.size]

    def run(self, at: int, protocol: int, header: int) -> int:
        """Return the end of the packets from ``at`` on whose headers are like its own.

        In TCP the last one may have PSH and the others not.
        """
        if self.fresh:
            self.fresh = self._summed = False
            self._different.clear()
            self._width_head[...] = self._width_rows
        kind = header if protocol == TCP else 0
        where = self._different.get(kind)
        if where is None:
            np.bitwise_xor(self._later, self._earlier, out=self._changed)
            np.bitwise_and(self._changed, _MASKS[protocol, header], out=self._changed)
            where = _NOWHERE
            if np.count_nonzero(self._changed):
                where = np.flatnonzero(self._changed.any(axis=1))
            self._different[kind] = where
        end = self.count
        if len(where):
            later = where[int(where.searchsorted(at)) :]
            if len(later):
                end = int(later[0]) + 1
        # The mask leaves PSH to be looked at here.
        if protocol == TCP and end - at > 1:
            pushed = self._head[at : end - 1, 33] & PSH
            if np.count_nonzero(pushed):
                end = at + 1 + int(pushed.argmax())
        return end

    def is_intact(self, at: int, end: int, first: memoryview, header: int) -> bool:
        """Return whether all checksums are right and the sequence numbers follow each other."""
        if not self._summed:
            self._summed = True
            if self._padded is not None:
                self._padded[:, : self.size] = self.rows[:, : self.size]
            np.add.reduce(self._pairs, axis=1, dtype=np.uint32, out=self._sums[0])
            np.add.reduce(self._ip_pairs, axis=1, dtype=np.uint32, out=self._sums[1])
        # The IP header's own sum is zero, so the row's is that of what follows it.
        self._extra[0, 0] = pseudo(first[12:20], first[9], self.size - IP_HEADER)
        sums, wrong, sequences = self._sums, self._wrong, self._sequences
        if end - at < self.count:
            sums, wrong = sums[:, at:end], wrong[:, at:end]
            sequences = sequences[at:end]
        np.add(sums, self._extra, out=wrong[:2])
        np.remainder(wrong[:2], _MODULUS, out=wrong[:2])
        if first[9] == TCP:
            begin = int.from_bytes(first[24:28], "big")
            expected = self._steps(size=self.size - header)[: end - at] + np.uint32(begin)
            np.bitwise_xor(expected.byteswap(inplace=True), sequences, out=wrong[2])
            return not np.count_nonzero(wrong)
        # A UDP checksum of 0 means that there is none.
        summed = np.count_nonzero(self._udp_checksums[at:end])
        return not np.count_nonzero(wrong[:2]) and summed == end - at

    def _steps(self, size: int) -> NDArray[np.uint32]:
        """Return multiples of the payload's size, which is what sequence numbers grow by."""
        if size != self._step:
            self._step = size
            self._multiples = self._numbers * np.uint32(size)
        return self._multiples
