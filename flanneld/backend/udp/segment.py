"""Super-packets from the TUN device cut into packets, with numpy: all at once, not one by one.

With TCP segmentation offload one read returns up to 64 KB of one TCP flow under one header. What
a network card would do with it is done here: every packet gets the header with its own length, IP
id, sequence number, flags and checksums. The IP header's checksum and the packets' checksums are
sums over the rows of a matrix.
"""

from dataclasses import dataclass
from typing import TypeAlias

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
    words,
)

Bytes: TypeAlias = NDArray[np.uint8]

# The most packets one call makes; a caller with a longer super-packet calls again.
ROWS = 128

# Consecutive IP ids, and the header checksums that go with them. _ID[i] is i modulo 65536,
# _SUM[i] is -i in one's complement, both as they are on the wire. The wrap from 65535 to 0 is in
# the first; it changes a sum by one, which `_headers` sees to.
_COUNT = np.arange(2 * 65536, dtype=np.int64)
_ID = (_COUNT[: 65536 + ROWS] % 65536).astype(np.uint16).byteswap()
_SUM = (-_COUNT[: 65536 + 2 * ROWS] % 65535).astype(np.uint16).byteswap()
_ROW = _COUNT[:ROWS].astype(np.uint32)
del _COUNT


@dataclass(frozen=True, slots=True)
class Rows:
    """Packets laid out one after the other.

    ``stride`` is the distance between their beginnings: the size made even, so that sums over
    16-bit words are sums over rows. ``last`` is the size of the last one, at most ``size``.
    """

    count: int
    size: int
    stride: int
    last: int


class BadSuperPacket(Exception):
    """The headers do not describe what was read. The kernel does not make such packets."""


def header_length(source: Bytes, start: int, protocol: int) -> int:
    """Return the length of the IP and transport headers; ``start`` is where the latter begins.

    Read from the packet: ``hdr_len`` of the virtio header is not reliable. Raises BadSuperPacket.
    """
    least = TCP_HEADER if protocol == TCP else UDP_HEADER
    if start + least > len(source) or int(source[0]) != 0x40 | start // 4 or start % 4:
        raise BadSuperPacket
    header = start + (int(source[start + 12]) // 16 * 4 if protocol == TCP else UDP_HEADER)
    if int(source[9]) != protocol or header < start + least or header >= len(source):
        raise BadSuperPacket
    return header


def segment(
    source: Bytes, start: int, protocol: int, gso: int, out: Bytes, *, first: int = 0
) -> tuple[Rows, int]:
    """Cut a super-packet (TCP or UDP) into packets with ``gso`` bytes of payload each.

    ``source`` is the packet from its IP header on, ``start`` where its transport header begins.
    Makes at most ROWS packets, beginning with the payload's byte ``first`` (a multiple of
    ``gso``), at the beginning of ``out``, whose address must be even. Returns them and the first
    payload byte not yet used. Raises BadSuperPacket.
    """
    header = header_length(source, start, protocol)
    if gso <= 0:
        raise BadSuperPacket
    payload = len(source) - header
    end = min(payload, first + ROWS * gso)
    full, rest = divmod(end - first, gso)
    count = full + (rest > 0)
    size = header + gso
    stride = size + (size & 1)
    rows = out[: count * stride].reshape(count, stride)
    head = bytearray(source[:header])
    checksum_at = start + (TCP_CSUM if protocol == TCP else UDP_CSUM)
    flags = head[start + 13] if protocol == TCP else 0
    if protocol == TCP:
        head[start + 13] = flags & ~(PSH | FIN | CWR)
    else:
        head[start + 4 : start + 6] = (gso + UDP_HEADER).to_bytes(2, "big")
    addresses = bytes(head[12:20])
    total = pseudo(addresses, protocol, size - start)
    head[checksum_at : checksum_at + 2] = total.to_bytes(2, "little")
    head[2:4] = size.to_bytes(2, "big")
    index = first // gso
    _write_headers(rows, head, start, index)
    rows[:full, header:size] = source[header + first : header + first + full * gso].reshape(
        full, gso
    )
    if size & 1:
        rows[:, size] = 0
    if protocol == TCP:
        sequence = int.from_bytes(head[start + 4 : start + 8], "big") + first
        numbers = _ROW[:count] * np.uint32(gso) + np.uint32(sequence & 0xFFFFFFFF)
        rows[:, start + 4 : start + 8] = numbers.byteswap().view(np.uint8).reshape(count, 4)
        if first == 0:
            rows[0, start + 13] |= flags & CWR
        if end == payload:
            rows[count - 1, start + 13] |= flags & (PSH | FIN)
    if rest:
        _shorten(rows[full], source[header + end - rest : header + end], head, start, protocol)
    _sum_rows(rows, checksum_at, protocol)
    return Rows(count, size, stride, header + rest if rest else size), end


def _write_headers(rows: Bytes, head: bytearray, start: int, index: int) -> None:
    """Write ``head`` into all rows, with consecutive IP ids and their header checksums."""
    identity = (int.from_bytes(head[4:6], "big") + index) & 0xFFFF
    head[4:6] = head[10:12] = b"\0\0"
    # Big-endian here: ids count up by one.
    total = (int.from_bytes(head[:start], "big") + identity) % 65535
    rows[:, : len(head)] = np.frombuffer(head, np.uint8)
    count = len(rows)
    pairs = rows.view(np.uint16)
    pairs[:, 2] = _ID[identity : identity + count]
    pairs[:, 5] = _SUM[total : total + count]
    wrapped = 65536 - identity
    if wrapped < count:
        pairs[wrapped:, 5] = _SUM[total + wrapped - 1 : total + count - 1]


def _shorten(row: Bytes, payload: Bytes, head: bytearray, start: int, protocol: int) -> None:
    """Make ``row`` the shorter last packet."""
    size = len(head) + len(payload)
    identity = row[4:6].tobytes()
    head[2:4] = size.to_bytes(2, "big")
    head[4:6] = identity
    head[10:12] = b"\0\0"
    total = words(head[:start])
    row[2:4] = np.frombuffer(head[2:4], np.uint8)
    row[10:12] = np.frombuffer((-total % 65535).to_bytes(2, "little"), np.uint8)
    length = size - start
    at = start + (TCP_CSUM if protocol == TCP else UDP_CSUM)
    row[at : at + 2] = np.frombuffer(
        pseudo(head[12:20], protocol, length).to_bytes(2, "little"), np.uint8
    )
    if protocol == UDP:
        row[start + 4 : start + 6] = np.frombuffer(length.to_bytes(2, "big"), np.uint8)
    row[len(head) : size] = payload
    row[size:] = 0


def _sum_rows(rows: Bytes, at: int, protocol: int) -> None:
    """Turn the pseudo header's sum at byte ``at`` into the checksum, in every row.

    The sum runs over the whole row: a valid IP header adds nothing to it.
    """
    pairs = rows.view(np.uint16)
    total = np.add.reduce(pairs, axis=1, dtype=np.uint32)
    if protocol == TCP:
        # 1..65535 instead of 0..65534: the sum of anything but zeros folds to at least 1.
        pairs[:, at // 2] = 65534 - (total - 1) % 65535
    else:
        pairs[:, at // 2] = 65535 - total % 65535


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
