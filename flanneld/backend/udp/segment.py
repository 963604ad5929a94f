"""Super-packets from the TUN device cut into packets, with numpy: all at once, not one by one.

With TCP segmentation offload one read returns up to 64 KB of one TCP flow under one header. What
a network card would do with it is done here: every packet gets the header with its own length, IP
id, sequence number, flags and checksums. The IP header's checksum and the packets' checksums are
sums over the rows of a matrix.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flanneld.backend.udp.packet import (
    CWR,
    FIN,
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

# The most packets one call makes; a caller with a longer super-packet calls again.
ROWS = 128

# Consecutive IP ids, and the header checksums that go with them. _ID[i] is i modulo 65536,
# _SUM[i] is -i in one's complement, both as they are on the wire. The wrap from 65535 to 0 is in
# the first; it changes a sum by one, which `_write_headers` sees to.
_COUNT = np.arange(2 * 65536, dtype=np.int64)
_ID = (_COUNT[: 65536 + ROWS] % 65536).astype(np.uint16).byteswap()
_SUM = (-_COUNT[: 65536 + 2 * ROWS] % 65535).astype(np.uint16).byteswap()
_ROW = _COUNT[:ROWS].astype(np.uint32)
del _COUNT
_ONE, _MODULUS = np.uint32(1), np.uint32(65535)
_NONE = b"\0\0"


class Rows(NamedTuple):
    """Packets laid out one after the other.

    ``stride`` is the distance between their beginnings: the size made even, so that sums over
    16-bit words are sums over rows. ``last`` is the size of the last one, at most ``size``.
    """

    number: int
    size: int
    stride: int
    last: int


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


class Cut:
    """How to cut super-packets of one shape, with all views of the memory made beforehand.

    Views cost more than what is done through them, and a flow's super-packets are all alike.
    ``source`` is the super-packet's memory from its IP header on, ``start`` and ``header`` where
    its transport header begins and ends, ``gso`` the bytes of payload in each packet. Packets are
    made from the payload's byte ``first`` (a multiple of ``gso``) on, at most ROWS, at the
    beginning of ``out``, whose address must be even. ``end`` is the payload byte after them.
    """

    def __init__(
        self,
        source: Bytes,
        *,
        start: int,
        header: int,
        protocol: int,
        gso: int,
        out: Bytes,
        first: int = 0,
    ) -> None:
        if gso <= 0:
            raise BadSuperPacket
        payload = len(source) - header
        self.end = min(payload, first + ROWS * gso)
        full, rest = divmod(self.end - first, gso)
        count = full + (rest > 0)
        size = header + gso
        stride = size + (size & 1)
        self.rows = Rows(count, size, stride, header + rest if rest else size)
        self._start, self._header, self._protocol, self._gso = start, header, protocol, gso
        self._first, self._is_last = first, self.end == payload
        self._packet = source.data
        self._out = out[: count * stride].data
        rows = out[: count * stride].reshape(count, stride)
        pairs = rows.view(np.uint16)
        self._template = bytearray(header)
        self._template_array = np.frombuffer(self._template, np.uint8)
        self._headers = rows[:, :header]
        body = source[header + first : header + self.end]
        self._copies = [(rows[:full, header:size], body[: full * gso].reshape(full, gso))]
        self._zeros = [rows[:, size:]] if size & 1 else []
        if rest:
            self._copies.append((rows[full, header : header + rest], body[full * gso :]))
            self._zeros.append(rows[full, header + rest :])
        self._ids, self._sums = pairs[:, 2], pairs[:, 5]
        self._pairs = pairs
        self._at = start + (TCP_CSUM if protocol == TCP else UDP_CSUM)
        self._checksums = pairs[:, self._at // 2]
        self._totals = np.zeros(count, np.uint32)
        if protocol == TCP:
            self._steps = (_ROW[:count] * gso + first).astype(np.uint32)
            self._sequence = np.zeros(count, np.uint32)
            self._sequence_bytes = self._sequence.view(np.uint8).reshape(count, 4)
            self._sequences = rows[:, start + 4 : start + 8]

    def run(self) -> Rows:
        """Cut what is in the source's memory now."""
        packet, start, header = self._packet, self._start, self._header
        rows, template, protocol = self.rows, self._template, self._protocol
        tcp = protocol == TCP
        template[:] = packet[:header]
        flags = 0
        if tcp:
            flags = template[start + 13]
            template[start + 13] = flags & ~(PSH | FIN | CWR)
        else:
            template[start + 4 : start + 6] = (self._gso + UDP_HEADER).to_bytes(2, "big")
        total = pseudo(template[12:20], protocol, rows.size - start)
        template[self._at : self._at + 2] = total.to_bytes(2, "little")
        template[2:4] = rows.size.to_bytes(2, "big")
        self._write_headers()
        for target, part in self._copies:
            target[...] = part
        for target in self._zeros:
            target[...] = 0
        out = self._out
        if tcp:
            sequence = int.from_bytes(template[start + 4 : start + 8], "big")
            np.add(self._steps, np.uint32(sequence), out=self._sequence)
            self._sequence.byteswap(inplace=True)
            self._sequences[...] = self._sequence_bytes
            if flags & CWR and self._first == 0:
                out[start + 13] |= CWR
            if self._is_last:
                out[(rows.number - 1) * rows.stride + start + 13] |= flags & (PSH | FIN)
        if rows.last < rows.size:
            self._shorten(out[(rows.number - 1) * rows.stride :])
        # The sums run over the whole rows: a valid IP header adds nothing to them.
        totals = np.add.reduce(self._pairs, axis=1, dtype=np.uint32, out=self._totals)
        if tcp:
            # 1..65535 instead of 0..65534: the sum of anything but zeros folds to at least 1.
            totals -= _ONE
            np.remainder(totals, _MODULUS, out=totals)
            np.subtract(_MODULUS - _ONE, totals, out=self._checksums, casting="unsafe")
        else:
            np.remainder(totals, _MODULUS, out=totals)
            np.subtract(_MODULUS, totals, out=self._checksums, casting="unsafe")
        return rows

    def _write_headers(self) -> None:
        """Write the template into all rows, with consecutive IP ids and their checksums."""
        template, count = self._template, self.rows.number
        identity = int.from_bytes(template[4:6], "big") + self._first // self._gso & 0xFFFF
        template[4:6] = template[10:12] = _NONE
        # Big-endian here: ids count up by one.
        total = (int.from_bytes(template[: self._start], "big") + identity) % 65535
        self._headers[...] = self._template_array
        self._ids[...] = _ID[identity : identity + count]
        self._sums[...] = _SUM[total : total + count]
        wrapped = 65536 - identity
        if wrapped < count:
            self._sums[wrapped:] = _SUM[total + wrapped - 1 : total + count - 1]

    def _shorten(self, row: memoryview) -> None:
        """Correct the headers of the shorter last packet."""
        size, start = self.rows.last, self._start
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
    first, packets = 0, []
    while first < len(source) - header:
        cut = Cut(
            source, start=start, header=header, protocol=protocol, gso=gso, out=out, first=first
        )
        rows, first = cut.run(), cut.end
        for row in range(rows.number):
            size = rows.last if row == rows.number - 1 else rows.size
            packets.append(out[row * rows.stride : row * rows.stride + size].tobytes())
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
    pairs = rows.view(np.uint16)
    total = pairs[:, 5].byteswap().astype(np.uint32) + 0x0100
    total += total >= 0xFFFF
    pairs[:, 5] = total.astype(np.uint16).byteswap()
