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

from flanneld.backend.udp.batch import FEW, Batch
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

# UDP_MAX_SEGMENTS of kernels before 6.9 (linux/udp.h).
_UDP_SEGMENTS = 64

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

    def add_rows(self, batch: Batch, admit: Admit) -> None:
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
        self, batch: Batch, at: int, end: int, first: memoryview, header: int, *, admit: Admit
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
