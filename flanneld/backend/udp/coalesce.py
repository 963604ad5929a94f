"""Received packets joined to super-packets for the TUN device: the inverse of `segment`.

Consecutive packets of one TCP or UDP flow are appended to one pending super-packet, which is
written when something else comes, so that the order of packets stays as it was. Only what the
kernel would cut into exactly the same packets again is joined: no IP options, no fragments, TCP
flags ACK or ACK and PSH, equal headers, consecutive sequence numbers, all checksums right. (A
super-packet goes to the kernel without checksum; joining a damaged packet would heal it.)
"""

import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from flanneld.backend.udp.batch import HEAD, Batch
from flanneld.backend.udp.buffers import Buffers
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
    checksum,
    decrement_ttl,
    pseudo,
    swapped,
    words,
)

# UDP_MAX_SEGMENTS of kernels before 6.9 (linux/udp.h).
_UDP_SEGMENTS = 64

_BIG = struct.Struct("!H")

# Writes one frame: a virtio header and a packet, in pieces. The second argument is the number of
# packets in it.
Write: TypeAlias = Callable[[Sequence[Buffer], int], None]
# Says whether a packet with this inner source may be let in.
Admit: TypeAlias = Callable[[bytes], bool]
# Told about a packet whose TTL ended here.
Expired: TypeAlias = Callable[[memoryview], None]


class Coalescer:
    """Packets in, frames for the TUN device out, in the same order.

    The TTL is taken down here. ``tcp`` and ``udp`` say what may be joined; they may be switched
    off at any time.
    """

    def __init__(
        self, write: Write, expired: Expired, counters: Counters, buffers: Buffers
    ) -> None:
        self.tcp = True
        self.udp = True
        self._write = write
        self._expired = expired
        self._counters = counters
        self._view = buffers.take(VNET_LEN + LONGEST_PACKET + 1)
        self._packet = self._view[VNET_LEN:]
        self._array = np.frombuffer(self._view, np.uint8)[VNET_LEN:]
        # Of what is pending; 0 if nothing is.
        self._key = 0
        self._tcp_pending = False
        self._header = 0
        self._size = 0
        self._count = 0
        self._fill = 0
        self._sequence = 0
        # Of its IP header and its pseudo header, without what is known only in the end.
        self._sums = (0, 0)

    def add(self, packet: memoryview, admit: Admit, *, join: bool = True) -> None:
        """Take one packet; it is changed in place. Anything may be in it.

        Without ``join`` it is written at once, after what is pending.
        """
        length = len(packet)
        if length < IP_HEADER:
            self._counters.drop_malformed += 1
            return
        # Looking into bytes costs a third of looking into a memoryview.
        head = packet[:HEAD].tobytes()
        if head[0] >> 4 != 4:
            self._counters.drop_not_ipv4 += 1
            return
        header = (head[0] & 15) * 4
        total = head[2] << 8 | head[3]
        if header < IP_HEADER or not header <= total <= length:
            self._counters.drop_malformed += 1
            return
        if not admit(head[12:16]):
            self._counters.drop_wrong_source += 1
            return
        if head[8] <= 1:
            self._counters.drop_ttl += 1
            self._expired(packet[:total])
            return
        if join and total == length:
            transport = self._joinable(head, length)
            if transport and _is_intact(packet, head):
                self._append_one(packet, head, transport)
                return
        if self._count:
            self.flush()
        decrement_ttl(packet)
        self._write((VNET_PLAIN, packet if total == length else packet[:total]), 1)

    def add_rows(self, batch: Batch, admit: Admit) -> None:
        """Take the packets in a batch's memory; they are changed in place."""
        count, size, at = batch.count, batch.size, 0
        # The first that may be joined decides what is looked for.
        while True:
            head = batch.head(at)
            header = self._joinable(head, size)
            if header:
                break
            self.add(batch.packet(at), admit)
            at += 1
            if at == count:
                return
        protocol = head[9]
        ends = batch.ends(at, protocol, header)
        heads = [head]
        if len(ends) > 1:
            heads += map(batch.head, ends[:-1])
        damaged = batch.damaged(heads)
        if 2 * len(damaged) > count - at:
            # Then this takes longer than one by one.
            for row in range(at, count):
                self.add(batch.packet(row), admit)
            return
        if damaged:
            # Each is a run of its own.
            ends = sorted({*ends, *damaged, *(row + 1 for row in damaged)} - {*range(at + 1)})
            heads = [head, *map(batch.head, ends[:-1])]
        for head, end in zip(heads, ends, strict=True):
            if at in damaged or head[9] != protocol or self._joinable(head, size) != header:
                for row in range(at, end):
                    self.add(batch.packet(row), admit)
            elif admit(head[12:16]):
                self._add_run(batch, at, end, head, header)
            else:
                self._counters.drop_wrong_source += end - at
            at = end

    def flush(self) -> None:
        """Write what is pending."""
        count = self._count
        if not count:
            return
        self._count = self._key = 0
        view, fill, header = self._view, self._fill, self._header
        if count == 1:
            view[:VNET_LEN] = VNET_PLAIN
            decrement_ttl(self._packet)
        else:
            length = fill - IP_HEADER
            tcp = self._tcp_pending
            kind, offset = (GSO_TCPV4, TCP_CSUM) if tcp else (GSO_UDP_L4, UDP_CSUM)
            gso = self._size - header
            VNET.pack_into(view, 0, NEEDS_CSUM, kind, header, gso, IP_HEADER, offset)
            ip, total = self._sums
            _BIG.pack_into(view, VNET_LEN + 2, fill)
            view[VNET_LEN + 8] -= 1
            view[VNET_LEN + 10 : VNET_LEN + 12] = checksum(ip + swapped(fill))
            if not tcp:
                _BIG.pack_into(view, VNET_LEN + IP_HEADER + 4, length)
            at = VNET_LEN + IP_HEADER + offset
            _BIG.pack_into(view, at, swapped((total + swapped(length)) % 65535))
        self._write((view[: VNET_LEN + fill],), count)

    def _joinable(self, head: bytes, length: int) -> int:
        """Return the length of the headers of a packet that may be joined, else 0.

        ``head`` is its beginning. Its checksums and its TTL (but for 0 and 1) are not looked at.
        """
        if (
            length < IP_HEADER + UDP_HEADER + 1
            or head[0] != 0x45
            or head[2] << 8 | head[3] != length
            # Don't fragment, and no fragment: then its IP id means nothing (RFC 6864).
            or head[6] != 0x40
            or head[7]
            or head[8] <= 1
        ):
            return 0
        protocol = head[9]
        if protocol == TCP:
            if not self.tcp or length <= 40 or head[33] & ~PSH != ACK:
                return 0
            header = IP_HEADER + (head[32] >> 4) * 4
            return header if 40 <= header < length and head[32] & 15 == 0 else 0
        if protocol == UDP:
            named = head[24] << 8 | head[25]
            summed = head[26] or head[27]
            return 28 if self.udp and named == length - IP_HEADER and summed else 0
        return 0

    def _append_one(self, packet: memoryview, head: bytes, header: int) -> None:
        """Append one packet, or begin anew with it."""
        length = len(packet)
        each = length - header
        tcp = head[9] == TCP
        sequence = int.from_bytes(head[24:28], "big") if tcp else 0
        key = _key(head, header)
        if not self._room(key, sequence, length):
            self._begin(head, key, header, each)
        fill = self._fill
        self._packet[fill : fill + each] = packet[header:]
        self._count += 1
        self._fill = fill + each
        self._sequence = sequence + each & 0xFFFFFFFF
        if tcp and head[33] & PSH:
            self._packet[33] |= PSH
            self.flush()
        elif length < self._size:
            self.flush()

    def _add_run(self, batch: Batch, at: int, end: int, first: bytes, header: int) -> None:
        """Take intact packets of one flow and one size, with consecutive sequence numbers.

        PSH is in none of them, or in the last. ``first`` is the first one's beginning.
        """
        size, each = batch.size, batch.size - header
        key = _key(first, header)
        tcp = first[9] == TCP
        sequence = int.from_bytes(first[24:28], "big") if tcp else 0
        begin = at
        while at < end:
            room = self._room(key, sequence, size)
            if not room:
                # Without its payload, which comes with that of the others below.
                self._begin(first if at == begin else batch.head(at), key, header, each)
                room = self._room(key, sequence, size)
            count = min(room, end - at)
            fill = self._fill
            self._fill = stop = fill + count * each
            target = self._array[fill:stop]
            target.shape = count, each
            target[...] = batch.payloads(at, at + count, header)
            self._count += count
            at += count
            self._sequence = sequence = sequence + count * each & 0xFFFFFFFF
            if at == end and tcp and batch.flags(end - 1) & PSH:
                self._packet[33] |= PSH
                self.flush()
            elif size < self._size:
                self.flush()

    def _room(self, key: int, sequence: int, length: int) -> int:
        """Return how many packets of this length can be appended."""
        if key != self._key or length > self._size:
            return 0
        tcp = self._tcp_pending
        if tcp and sequence != self._sequence:
            return 0
        room = (LONGEST_PACKET - self._fill) // (length - self._header)
        if length < self._size:
            # A shorter packet is the last.
            room = min(room, 1)
        return room if tcp else min(room, _UDP_SEGMENTS - self._count)

    def _begin(self, head: bytes, key: int, header: int, each: int) -> None:
        """Begin a super-packet with the headers of a packet and no payload yet."""
        if self._count:
            self.flush()
        self._packet[:header] = head[:header]
        self._key, self._header, self._size = key, header, header + each
        self._fill = header
        addresses, protocol = words(head[12:20]), head[9]
        # Without the length, and with one hop less. Of the pseudo header, too, without the length.
        fixed = head[0] + (head[1] << 8) + words(head[4:10]) - 1
        self._sums = fixed + addresses, addresses + (protocol << 8)
        self._tcp_pending = protocol == TCP
        if self._tcp_pending:
            self._sequence = int.from_bytes(head[24:28], "big")


def _is_intact(packet: memoryview, head: bytes) -> bool:
    """Return whether all checksums of a packet without IP options are right."""
    extra = pseudo(head[12:20], head[9], len(packet) - IP_HEADER)
    whole = int.from_bytes(packet, "little") + extra
    return whole % 65535 == 0 and words(head[:IP_HEADER]) == 0


def _key_mask(header: int, different: tuple[int, ...]) -> int:
    return int.from_bytes(bytes(0 if at in different else 0xFF for at in range(header)), "little")


# Lengths, the IP id, checksums, the sequence number, PSH (flags are ACK or ACK and PSH).
_TCP_MASKS = [
    _key_mask(header, (2, 3, 4, 5, 10, 11, 24, 25, 26, 27, 33, 36, 37)) for header in range(81)
]
_UDP_MASK = _key_mask(28, (2, 3, 4, 5, 10, 11, 24, 25, 26, 27))


def _key(head: bytes, header: int) -> int:
    """Return what must be equal in packets that are joined; the headers' lengths are in it."""
    mask = _TCP_MASKS[header] if head[9] == TCP else _UDP_MASK
    return int.from_bytes(head[:header], "little") & mask
