"""Super-packets from the TUN device cut into packets, with numpy: all at once, not one by one.

With TCP segmentation offload one read returns up to 64 KB of one TCP flow under one header. What
a network card would do with it is done here: every packet gets the header with its own length, IP
id, sequence number, flags and checksums. The IP header's checksum and the packets' checksums are
sums over the rows of a matrix.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from flanneld.backend.udp.packet import (
    CWR,
    FIN,
    LONGEST_PACKET,
    PSH,
    TCP,
    TCP_CSUM,
    TCP_HEADER,
    UDP,
    UDP_CSUM,
    UDP_HEADER,
    pseudo,
    set_ip_checksum,
)

Bytes: TypeAlias = NDArray[np.uint8]

# The most packets in a `Sheet`.
SHEET_ROWS = 320

# Consecutive IP ids, and the header checksums that go with them. _ID[i] is i modulo 65536,
# _SUM[i] is -i in one's complement, both as they are on the wire. The wrap from 65535 to 0 is in
# the first; it changes a sum by one, which `Sheet._write_headers` sees to.
_COUNT = np.arange(2 * 65536, dtype=np.int64)
_ID = (_COUNT[: 65536 + SHEET_ROWS] % 65536).astype(np.uint16).byteswap()
_SUM = (-_COUNT[: 65536 + 2 * SHEET_ROWS] % 65535).astype(np.uint16).byteswap()
_ROW = _COUNT[:SHEET_ROWS].astype(np.uint32)
del _COUNT
_ONE, _MODULUS = np.uint32(1), np.uint32(65535)
_CARRIES, _STEP = np.uint16(0xFFFE), np.uint16(1)
_NONE = b"\0\0"
_sum = np.add.reduce


class BadSuperPacket(Exception):
    """The headers do not describe what was read. The kernel does not make such packets."""


def header_length(packet: memoryview, start: int, protocol: int) -> int:
    """Return the length of the IP and transport headers; ``start`` is where the latter begins.

    Read from the packet: ``hdr_len`` of the virtio header is not reliable. Raises BadSuperPacket.
    """
    least = TCP_HEADER if protocol == TCP else UDP_HEADER
    if start + least > len(packet) or packet[0] != 0x40 | start // 4 or start % 4:
        raise BadSuperPacket
    header = start + (packet[start + 12] // 16 * 4 if protocol == TCP else UDP_HEADER)
    if packet[9] != protocol or header < start + least or header >= len(packet):
        raise BadSuperPacket
    return header


class Sheet:
    """Packets of one size, one after the other, cut from super-packets.

    Packets are laid out ``stride`` bytes apart in ``out``, whose address must be even: ``size``
    made even, so that sums over 16-bit words are sums over rows. The super-packets have their
    transport header from ``start`` to ``header``, and ``gso`` bytes of payload for each packet.
    Raises BadSuperPacket if these cannot be. Several sheets may share one ``out``, but only one of
    them may have packets.
    """

    def __init__(self, out: Bytes, *, start: int, header: int, protocol: int, gso: int) -> None:
        self.size = size = header + gso
        self.stride = stride = size + (size & 1)
        if gso <= 0 or size > LONGEST_PACKET or stride > len(out):
            raise BadSuperPacket
        self.number = 0
        """Packets there are. Those from a super-packet's end can be shorter; see `add`."""
        self._start, self._header, self._protocol, self._gso = start, header, protocol, gso
        self._capacity = capacity = min(SHEET_ROWS, len(out) // stride)
        # So many have their checksums.
        self._finished = 0
        self._view = out.data
        self._array = out
        rows = out[: capacity * stride].reshape(capacity, stride)
        self._pairs = pairs = rows.view(np.uint16)
        self._heads, self._bodies = rows[:, :header], rows[:, header:size]
        self._pads = rows[:, size:] if size & 1 else None
        self._ids, self._sums = pairs[:, 2], pairs[:, 5]
        self._at = start + (TCP_CSUM if protocol == TCP else UDP_CSUM)
        self._checksums = pairs[:, self._at // 2]
        self._totals = np.zeros(capacity, np.uint32)
        if protocol == TCP:
            self._sequences = rows[:, start + 4 : start + 8].view(">u4")[:, 0]
            self._steps = _ROW[:capacity] * np.uint32(gso)

    @property
    def is_full(self) -> bool:
        """Whether no packet can be added."""
        return self.number == self._capacity

    def clear(self, *, keep: int = 0) -> None:
        """Forget all packets but the last ``keep``, which become the first. All are finished."""
        if keep:
            begin, end = (self.number - keep) * self.stride, self.number * self.stride
            self._view[: end - begin] = self._view[begin:end]
        self.number = self._finished = keep

    def add(self, source: Bytes, first: int = 0) -> tuple[int, int]:
        """Add packets from a super-packet's payload from byte ``first`` on, as many as fit.

        ``source`` is the super-packet, ``first`` a multiple of ``gso``. Returns the payload's byte
        after them, and the last one's size: it is the only one that may be shorter.
        """
        at, header, gso, size = self.number, self._header, self._gso, self.size
        full, rest = divmod(len(source) - header - first, gso)
        if full + (rest > 0) > self._capacity - at:
            full, rest = min(full, self._capacity - at), 0
        middle = at + full
        self.number = end = middle + (rest > 0)
        begin = header + first
        stop = begin + full * gso
        flags = self._write_headers(source, at, end, first)
        if full:
            self._bodies[at:middle] = source[begin:stop].reshape(full, gso)
        last = size
        if rest:
            last = header + rest
            begin = middle * self.stride
            self._array[begin + header : begin + last] = source[stop : stop + rest]
            self._array[begin + last : begin + self.stride] = 0
        view, stride = self._view, self.stride
        if flags:
            if flags & CWR and first == 0:
                view[at * stride + self._start + 13] |= CWR
            if flags & (PSH | FIN) and stop + rest == len(source):
                view[(end - 1) * stride + self._start + 13] |= flags & (PSH | FIN)
        if rest:
            self._shorten(view[middle * stride : end * stride], last)
        return stop + rest - header, last

    def finish(self) -> None:
        """Compute the checksums of the packets that were added."""
        at, end = self._finished, self.number
        if at == end:
            return
        self._finished = end
        if self._pads is not None:
            self._pads[at:end] = 0
        # The sums run over the whole rows: a valid IP header adds nothing to them.
        totals = _sum(self._pairs[at:end], axis=1, dtype=np.uint32, out=self._totals[at:end])
        if self._protocol == TCP:
            # 1..65535 instead of 0..65534: the sum of anything but zeros folds to at least 1.
            totals -= _ONE
            np.remainder(totals, _MODULUS, totals)
            np.subtract(_MODULUS - _ONE, totals, self._checksums[at:end], casting="unsafe")
        else:
            np.remainder(totals, _MODULUS, totals)
            np.subtract(_MODULUS, totals, self._checksums[at:end], casting="unsafe")

    def packet(self, row: int, size: int) -> memoryview:
        """Return a packet; ``size`` is that of all, or the last one's."""
        at = row * self.stride
        return self._view[at : at + size]

    def packets(self, at: int, end: int, last: int) -> memoryview:
        """Return packets without anything between them; ``last`` is the last one's size."""
        return self._view[at * self.stride : (end - 1) * self.stride + last]

    def _write_headers(self, source: Bytes, at: int, end: int, first: int) -> int:
        """Write the headers of packets of full size; returns the super-packet's TCP flags.

        With consecutive IP ids and sequence numbers; PSH, FIN and CWR are left out.
        """
        start, count = self._start, end - at
        head = bytearray(source.data[: self._header])
        flags = 0
        if self._protocol == TCP:
            flags = head[start + 13]
            head[start + 13] = flags & ~(PSH | FIN | CWR)
            sequence = int.from_bytes(head[start + 4 : start + 8], "big") + first & 0xFFFFFFFF
        else:
            head[start + 4 : start + 6] = (self._gso + UDP_HEADER).to_bytes(2, "big")
        total = pseudo(head[12:20], self._protocol, self.size - start)
        head[self._at : self._at + 2] = total.to_bytes(2, "little")
        head[2:4] = self.size.to_bytes(2, "big")
        identity = int.from_bytes(head[4:6], "big") + first // self._gso & 0xFFFF
        head[4:6] = head[10:12] = _NONE
        # Big-endian here: ids count up by one.
        total = (int.from_bytes(head[:start], "big") + identity) % 65535
        self._heads[at:end] = np.frombuffer(head, np.uint8)
        self._ids[at:end] = _ID[identity : identity + count]
        self._sums[at:end] = _SUM[total : total + count]
        wrapped = 65536 - identity
        if wrapped < count:
            self._sums[at + wrapped : end] = _SUM[total + wrapped - 1 : total + count - 1]
        if self._protocol == TCP:
            self._sequences[at:end] = self._steps[:count] + np.uint32(sequence)
        return flags

    def _shorten(self, row: memoryview, size: int) -> None:
        """Correct the headers of a shorter packet."""
        start = self._start
        head = bytearray(row[: self._header])
        head[2:4] = size.to_bytes(2, "big")
        set_ip_checksum(head, start)
        length = size - start
        total = pseudo(head[12:20], self._protocol, length)
        head[self._at : self._at + 2] = total.to_bytes(2, "little")
        if self._protocol == UDP:
            head[start + 4 : start + 6] = length.to_bytes(2, "big")
        row[: self._header] = head


def segment(source: Bytes, start: int, protocol: int, gso: int, out: Bytes) -> list[bytes]:
    """Return the packets of one super-packet. Raises BadSuperPacket."""
    header = header_length(source.data, start, protocol)
    sheet = Sheet(out, start=start, header=header, protocol=protocol, gso=gso)
    first, packets = 0, []
    while first < len(source) - header:
        first, last = sheet.add(source, first)
        sheet.finish()
        packets += [sheet.packet(row, sheet.size).tobytes() for row in range(sheet.number - 1)]
        packets.append(sheet.packet(sheet.number - 1, last).tobytes())
        sheet.clear()
    return packets


def complete_checksums(rows: Bytes, start: int, offset: int) -> None:
    """Finish the checksums of packets of one size (NEEDS_CSUM; see `packet.complete_checksum`).

    ``rows`` has an even number of columns; a last column that pads an odd size holds zeros.
    ``start`` is even, as every IP header's length is.
    """
    pairs = rows[:, start:].view(np.uint16)
    total = np.add.reduce(pairs, axis=1, dtype=np.uint32)
    if offset == UDP_CSUM:
        pairs[:, offset // 2] = 65535 - total % 65535
    else:
        pairs[:, offset // 2] = 65534 - (total - 1) % 65535


def decrement_ttls(rows: Bytes) -> None:
    """Take one off every row's TTL (all at least 1) and correct the header checksums."""
    rows[:, 8] -= 1
    # The TTL is the lower byte of a little-endian word; see `packet.decrement_ttl`.
    sums = rows.view(np.uint16)[:, 5]
    carry = sums >= _CARRIES
    sums += _STEP
    sums += carry
