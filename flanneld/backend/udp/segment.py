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
_sum = np.add.reduce


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
    ``sources`` is a row of memory for each super-packet, from its IP header on; ``start`` and
    ``header`` are where its transport header begins and ends, ``gso`` the bytes of payload in each
    packet. Packets are made from the payload's byte ``first`` (a multiple of ``gso``) on, at most
    ROWS of each super-packet, at the beginning of ``out``, whose address must be even. ``end`` is
    the payload byte after them. Several super-packets are cut whole: none of their packets may be
    shorter than the others.
    """

    def __init__(
        self,
        sources: Bytes,
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
        number, length = sources.shape
        payload = length - header
        self.end = min(payload, first + ROWS * gso)
        full, rest = divmod(self.end - first, gso)
        count = full + (rest > 0)
        size = header + gso
        stride = size + (size & 1)
        total = number * count
        self.rows = Rows(total, size, stride, header + rest if rest else size)
        self._start, self._header, self._protocol, self._gso = start, header, protocol, gso
        self._first, self._is_last, self._count = first, self.end == payload, count
        self._packets = [source.data for source in sources]
        self._out = out[: total * stride].data
        rows = out[: total * stride].reshape(number, count, stride)
        pairs = rows.view(np.uint16)
        self._templates = bytearray(number * header)
        self._template_rows = np.frombuffer(self._templates, np.uint8).reshape(number, 1, header)
        self._headers = rows[:, :, :header]
        body = sources[:, header + first : header + first + full * gso]
        self._bodies = body.reshape(number, full, gso) if number == 1 else _split(body, full, gso)
        self._targets = rows[:, :full, header:size]
        self._zeros = [rows[:, :, size:]] if size & 1 else []
        self._rest = None
        if rest:
            begin = header + first + full * gso
            self._rest = rows[0, full, header : header + rest], sources[0, begin : begin + rest]
            self._zeros.append(rows[0, full, header + rest :])
        self._ids, self._sums = list(pairs[:, :, 2]), list(pairs[:, :, 5])
        self._pairs = pairs
        self._at = start + (TCP_CSUM if protocol == TCP else UDP_CSUM)
        self._checksums = pairs[:, :, self._at // 2]
        self._totals = np.zeros((number, count), np.uint32)
        if protocol == TCP:
            self._steps = (_ROW[:count] * gso + first).astype(np.uint32)
            self._sequence = np.zeros((number, count), np.uint32)
            self._sequence_rows = list(self._sequence)
            self._sequence_bytes = self._sequence.view(np.uint8).reshape(number, count, 4)
            self._sequences = rows[:, :, start + 4 : start + 8]

    def run(self) -> Rows:
        """Cut what is in the sources' memory now."""
        rows, count, totals = self.rows, self._count, self._totals
        tcp = self._protocol == TCP
        flags = [self._begin(number) for number in range(len(self._packets))]
        self._headers[...] = self._template_rows
        for number in range(len(flags)):
            self._count_ids(number)
        self._targets[...] = self._bodies
        if self._rest is not None:
            target, part = self._rest
            target[...] = part
        for target in self._zeros:
            target[...] = 0
        out = self._out
        if tcp:
            self._sequence.byteswap(True)
            self._sequences[...] = self._sequence_bytes
            for number, each in enumerate(flags):
                at = number * count * rows.stride + self._start + 13
                if each & CWR and self._first == 0:
                    out[at] |= CWR
                if each & (PSH | FIN) and self._is_last:
                    out[at + (count - 1) * rows.stride] |= each & (PSH | FIN)
        if rows.last < rows.size:
            self._shorten(out[(rows.number - 1) * rows.stride :])
        # The sums run over the whole rows: a valid IP header adds nothing to them.
        _sum(self._pairs, 2, np.uint32, totals)
        if tcp:
            # 1..65535 instead of 0..65534: the sum of anything but zeros folds to at least 1.
            totals -= _ONE
            np.remainder(totals, _MODULUS, totals)
            np.subtract(_MODULUS - _ONE, totals, out=self._checksums, casting="unsafe")
        else:
            np.remainder(totals, _MODULUS, totals)
            np.subtract(_MODULUS, totals, out=self._checksums, casting="unsafe")
        return rows

    def _begin(self, number: int) -> int:
        """Prepare the header of a super-packet's packets; returns its flags of TCP."""
        start, header, size = self._start, self._header, self.rows.size
        head = bytearray(self._packets[number][:header])
        flags = 0
        if self._protocol == TCP:
            flags = head[start + 13]
            head[start + 13] = flags & ~(PSH | FIN | CWR)
            sequence = int.from_bytes(head[start + 4 : start + 8], "big")
            np.add(self._steps, np.uint32(sequence), self._sequence_rows[number])
        else:
            head[start + 4 : start + 6] = (self._gso + UDP_HEADER).to_bytes(2, "big")
        total = pseudo(head[12:20], self._protocol, size - start)
        head[self._at : self._at + 2] = total.to_bytes(2, "little")
        head[2:4] = size.to_bytes(2, "big")
        self._templates[number * header : (number + 1) * header] = head
        return flags

    def _count_ids(self, number: int) -> None:
        """Write consecutive IP ids and their checksums into a super-packet's packets."""
        count, at = self._count, number * self._header
        head = self._templates[at : at + self._start]
        identity = int.from_bytes(head[4:6], "big") + self._first // self._gso & 0xFFFF
        head[4:6] = head[10:12] = _NONE
        # Big-endian here: ids count up by one.
        total = (int.from_bytes(head, "big") + identity) % 65535
        self._ids[number][...] = _ID[identity : identity + count]
        sums = self._sums[number]
        sums[...] = _SUM[total : total + count]
        wrapped = 65536 - identity
        if wrapped < count:
            sums[wrapped:] = _SUM[total + wrapped - 1 : total + count - 1]

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


def _split(body: Bytes, full: int, gso: int) -> Bytes:
    """Return rows of ``full * gso`` bytes as such of ``gso`` bytes, without copying."""
    split: Bytes = np.lib.stride_tricks.as_strided(
        body, (len(body), full, gso), (body.strides[0], gso, 1)
    )
    return split


def segment(source: Bytes, start: int, protocol: int, gso: int, out: Bytes) -> list[bytes]:
    """Return the packets of one super-packet. Raises BadSuperPacket."""
    header = header_length(source.data, start, protocol)
    first, packets = 0, []
    while first < len(source) - header:
        cut = Cut(
            source[np.newaxis], start=start, header=header, protocol=protocol, gso=gso, out=out,
            first=first,
        )  # fmt: skip
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
