"""Received packets of one size, looked at all at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flanneld.backend.udp.buffers import Buffers
from flanneld.backend.udp.packet import ACK, IP_HEADER, PSH, TCP, UDP, pseudo, swapped, words
from flanneld.backend.udp.segment import Bytes

# The most packets in a `Batch`.
BATCH_ROWS = 320
# Below this many packets numpy's fixed cost is more than a loop's.
FEW = 4
# The part of the headers that is compared: IP and TCP with all options.
HEAD = 80

_MODULUS = np.uint32(65535)
_NUMBERS = np.arange(BATCH_ROWS, dtype=np.uint32)
_sum = np.add.reduce


def _mask(protocol: int, header: int) -> Bytes:
    """Return which bytes of the headers must be equal in packets that are joined."""
    mask = np.zeros(HEAD, np.uint8)
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


class Scratch:
    """What all batches of a receiver compute in: one batch at a time, see `Batch.damaged`.

    ``size`` is that of the memory the packets are in.
    """

    def __init__(self, size: int, buffers: Buffers) -> None:
        # A byte more for each packet.
        self.padded = np.frombuffer(buffers.take(size + BATCH_ROWS), np.uint8)
        self.same = np.frombuffer(buffers.take(BATCH_ROWS * HEAD), np.uint64)
        self.heads = np.frombuffer(buffers.take(BATCH_ROWS * HEAD), np.uint8)
        self.sums = np.frombuffer(buffers.take(2 * BATCH_ROWS * 4), np.uint32)


class Batch:
    """Received packets of one size in memory, with all views of it made beforehand.

    ``memory`` begins with the first packet, whose address is even if ``size`` is; there are
    ``count`` of them, at most BATCH_ROWS, one after the other. The same object serves all batches
    of this shape in the same place.
    """

    def __init__(self, memory: Bytes, count: int, size: int, scratch: Scratch) -> None:
        self.count = count
        self.size = size
        self._view = memory.data
        self._rows = memory[: count * size].reshape(count, size)
        # An odd last byte is summed with a zero beside it, of which packets in a row have none.
        self._padded = None
        if size & 1:
            self._padded = scratch.padded[: count * (size + 1)].reshape(count, size + 1)
        source = self._rows if self._padded is None else self._padded
        self._pairs = source.view(np.uint16)
        whole = self._rows[:, :HEAD]
        # Headers are looked at where they are, or in a copy if that is at odd places.
        self._copied = (
            size % 8 != 0 or size < HEAD or memory.__array_interface__["data"][0] % 8 != 0
        )
        if self._copied:
            whole = scratch.heads[: count * HEAD].reshape(count, HEAD)
        width = min(HEAD, size)
        self._width_rows, self._width_head = self._rows[:, :width], whole[:, :width]
        self._words = whole.view(np.uint64)
        self._ip_pairs = whole[:, :IP_HEADER].view(np.uint16)
        self._ids, self._ip_checksums = self._ip_pairs[:, 2], self._ip_pairs[:, 5]
        self._sequences = whole[:, 24:28].view(np.uint32)[:, 0]
        self._udp_checksums = whole[:, 26:28].view(np.uint16)[:, 0]
        self._flags = self._view[33 : (count - 1) * size : size]
        # The headers without what may differ.
        self._same = scratch.same[: count * HEAD // 8].reshape(count, HEAD // 8)
        # Of packets, of IP headers.
        self._sums = scratch.sums[: 2 * count].reshape(2, count)
        self._packet_sums, self._ip_sums = self._sums
        self._payloads = self._rows
        self._payloads_header = 0

    def packet(self, row: int) -> memoryview:
        """Return a packet."""
        at = row * self.size
        return self._view[at : at + self.size]

    def head(self, row: int) -> bytes:
        """Return the beginning of a packet."""
        at = row * self.size
        return self._view[at : at + min(HEAD, self.size)].tobytes()

    def flags(self, row: int) -> int:
        """Return the flags of a packet of TCP."""
        return self._view[row * self.size + 33]

    def payloads(self, at: int, end: int, header: int) -> Bytes:
        """Return what follows the headers in some packets."""
        if header != self._payloads_header:
            self._payloads, self._payloads_header = self._rows[:, header:], header
        return self._payloads if end - at == self.count else self._payloads[at:end]

    def ends(self, at: int, protocol: int, header: int) -> list[int]:
        """Look at the packets anew; return where runs of like ones end, from packet ``at`` on.

        Alike are packets with equal headers, but for what differs from packet to packet, and in TCP
        with consecutive sequence numbers; the last of a run may have PSH and the others not. It is
        said of packets with this protocol and length of headers; of others only that they are not
        in a run with these.
        """
        if self._copied:
            self._width_head[...] = self._width_rows
        count, same = self.count, self._same
        np.bitwise_and(self._words, _MASKS[protocol, header], same)
        ends = [count]
        raw = same.tobytes()
        if raw[:HEAD] * count != raw:
            ends += _changes((same[1:] != same[:-1]).any(axis=1))
        if protocol == TCP:
            starts = self._sequences.byteswap()
            starts -= _NUMBERS[:count] * np.uint32(self.size - header)
            raw = starts.tobytes()
            if raw[:4] * count != raw:
                ends += _changes(starts[1:] != starts[:-1])
            # The mask leaves PSH to be looked at here.
            flags = self._flags.tobytes()
            pushed = flags.find(ACK | PSH)
            while pushed >= 0:
                ends.append(pushed + 1)
                pushed = flags.find(ACK | PSH, pushed + 1)
        if len(ends) > 1:
            ends = sorted(set(ends))
            while ends[0] <= at:
                del ends[0]
        return ends

    def damaged(self, heads: Sequence[bytes]) -> set[int]:
        """Return which packets have a wrong checksum, or one of UDP that is not there.

        ``heads`` are the beginnings of all runs that `ends`, called just before, has found.
        Packets that cannot be joined may be among the damaged or not.
        """
        if self._padded is not None:
            self._padded[:, : self.size] = self._rows
            self._padded[:, self.size] = 0
        _sum(self._pairs, axis=1, dtype=np.uint32, out=self._packet_sums)
        first = heads[0]
        fixed, addresses = first[:4] + first[6:10], first[12:20]
        for head in heads:
            if head[12:20] != addresses or head[:4] + head[6:10] != fixed:
                return self._damaged_of_many()
        sums = self._sums
        np.add(self._ids, self._ip_checksums, out=self._ip_sums, dtype=np.uint32)
        # A right IP header adds nothing to its packet's sum.
        self._packet_sums += np.uint32(pseudo(addresses, first[9], self.size - IP_HEADER))
        self._ip_sums += np.uint32(words(fixed + addresses))
        np.remainder(sums, _MODULUS, sums)
        udp = first[9] == UDP
        if np.count_nonzero(sums) or (udp and np.count_nonzero(self._udp_checksums) < self.count):
            wrong = sums.any(axis=0)
            if udp:
                wrong |= self._udp_checksums == 0
            return set(np.flatnonzero(wrong).tolist())
        return set()

    def _damaged_of_many(self) -> set[int]:
        """The same for packets with several addresses or protocols; `_packet_sums` are done."""
        pairs, sums = self._ip_pairs, self._packet_sums
        _sum(pairs, axis=1, dtype=np.uint32, out=self._ip_sums)
        sums += _sum(pairs[:, 6:10], axis=1, dtype=np.uint32)
        # In a little-endian sum the protocol counts 256 times, as it stands there beside the TTL.
        sums += pairs[:, 4] & np.uint16(0xFF00)
        sums += np.uint32(swapped(self.size - IP_HEADER))
        np.remainder(self._sums, _MODULUS, self._sums)
        wrong = self._sums.any(axis=0)
        wrong |= (pairs[:, 4] >> 8 == UDP) & (self._udp_checksums == 0)
        return set(np.flatnonzero(wrong).tolist())


def _changes(different: NDArray[np.bool_]) -> list[int]:
    """Return the places of the packets that differ from the one before."""
    places: list[int] = (np.flatnonzero(different) + 1).tolist()
    return places
