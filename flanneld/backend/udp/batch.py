"""Received packets of one size, looked at all at once."""

import numpy as np
from numpy.typing import NDArray

from flanneld.backend.udp.packet import ACK, IP_HEADER, PSH, TCP, UDP, pseudo, words
from flanneld.backend.udp.segment import Bytes

# The most packets in a `Batch`.
ROWS = 128
# Below this many packets numpy's fixed cost is more than a loop's.
FEW = 4
# The part of the headers that is compared: IP and TCP with all options.
HEAD = 80

_MODULUS = np.uint32(65535)
_sum = np.add.reduce
_NOWHERE = np.zeros(0, np.intp)


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


class Batch:
    """Received packets of one size in memory, with all views of it made beforehand.

    ``memory`` begins with the first packet, whose address is even if ``size`` is; there are
    ``count`` of them, at most ROWS, one after the other. The same object serves all batches of
    this shape in the same place. ``scratch``, of ``count * (size + 1)`` bytes or more at an even
    address, may be shared with other batches: nothing is kept there.
    """

    def __init__(self, memory: Bytes, count: int, size: int, scratch: Bytes) -> None:
        self.count = count
        self.size = size
        self.rows = memory[: count * size].reshape(count, size)
        self.fresh = True
        """New packets have come since the sums were computed."""
        self._view = memory.data
        # An odd last byte is summed with a zero beside it, of which packets in a row have none.
        self._padded = None
        if size & 1:
            self._padded = scratch[: count * (size + 1)].reshape(count, size + 1)
        source = self.rows if self._padded is None else self._padded
        self._pairs = source.view(np.uint16)
        whole = self.rows[:, :HEAD]
        # Headers are looked at where they are, or in a copy if that is at odd places.
        self._copied = (
            size % 8 != 0 or size < HEAD or memory.__array_interface__["data"][0] % 8 != 0
        )
        if self._copied:
            whole = np.zeros((count, HEAD), np.uint8)
        width = min(HEAD, size)
        self._width_rows, self._width_head = self.rows[:, :width], whole[:, :width]
        self._words = whole.view(np.uint64)
        self._ids, self._ip_checksums = (
            whole[:, at : at + 2].view(np.uint16)[:, 0] for at in (4, 10)
        )
        self._sequences = whole[:, 24:28].view(np.uint32)[:, 0]
        self._udp_checksums = whole[:, 26:28].view(np.uint16)[:, 0]
        self._numbers = np.arange(count, dtype=np.uint32)
        # The headers without what may differ.
        self._same = bytearray(count * HEAD)
        self._same_words = np.frombuffer(self._same, np.uint64).reshape(count, HEAD // 8)
        self._sums = np.zeros((2, count), np.uint32)
        self._extra = np.zeros((2, 1), np.uint32)
        self._flags = self._view[33 : count * size : size]
        # Nonzero where a sum or a sequence number is wrong.
        self._wrong = np.zeros((3, count), np.uint32)
        self._step = 0
        self._multiples = self._numbers
        self._different: dict[int, NDArray[np.intp]] = {}
        self._summed = False
        self._payloads: dict[int, Bytes] = {}

    def packet(self, row: int) -> memoryview:
        """Return a packet."""
        at = row * self.size
        return self._view[at : at + self.size]

    def head(self, row: int) -> bytes:
        """Return the beginning of a packet."""
        at = row * self.size
        return self._view[at : at + min(HEAD, self.size)].tobytes()

    def payloads(self, at: int, end: int, header: int) -> Bytes:
        """Return what follows the headers in some packets."""
        if end - at < self.count:
            return self.rows[at:end, header : self.size]
        # A view costs more than finding it again.
        found = self._payloads.get(header)
        if found is None:
            found = self._payloads[header] = self.rows[:, header : self.size]
        return found

    def run(self, at: int, protocol: int, header: int) -> int:
        """Return the end of the packets from ``at`` on whose headers are like its own.

        In TCP the last one may have PSH and the others not.
        """
        if self.fresh:
            self.fresh = self._summed = False
            self._different.clear()
            if self._copied:
                self._width_head[...] = self._width_rows
        kind = header if protocol == TCP else 0
        where = self._different.get(kind)
        if where is None:
            same, words = self._same, self._same_words
            np.bitwise_and(self._words, _MASKS[protocol, header], out=words)
            where = _NOWHERE
            if same[:HEAD] * self.count != same:
                where = np.flatnonzero((words[1:] != words[:-1]).any(axis=1))
            self._different[kind] = where
        end = self.count
        if len(where):
            later = where[int(where.searchsorted(at)) :]
            if len(later):
                end = int(later[0]) + 1
        # The mask leaves PSH to be looked at here.
        if protocol == TCP and end - at > 1:
            pushed = self._flags[at : end - 1].tobytes().find(ACK | PSH)
            if pushed >= 0:
                end = at + 1 + pushed
        return end

    def is_intact(self, at: int, end: int, first: bytes, header: int) -> bool:
        """Return whether all checksums are right and the sequence numbers follow each other.

        The packets are some that `run` found to be alike; ``first`` is the first one's beginning.
        """
        if not self._summed:
            self._summed = True
            if self._padded is not None:
                self._padded[:, : self.size] = self.rows
                self._padded[:, self.size] = 0
            _sum(self._pairs, 1, np.uint32, self._sums[0])
            np.add(self._ids, self._ip_checksums, out=self._sums[1], dtype=np.uint32)
        sums, wrong, sequences, extra = self._sums, self._wrong, self._sequences, self._extra
        if end - at < self.count:
            sums, wrong = sums[:, at:end], wrong[:, at:end]
            sequences = sequences[at:end]
        # The IP header's own sum is zero, so the row's is that of what follows it.
        tcp = first[9] == TCP
        extra[0, 0] = pseudo(first[12:20], first[9], self.size - IP_HEADER)
        # Of the IP header what is equal in all of them.
        extra[1, 0] = words(first[:4] + first[6:10] + first[12:20])
        np.add(sums, extra, wrong[:2])
        np.remainder(wrong[:2], _MODULUS, wrong[:2])
        if tcp:
            expected = self._steps(size=self.size - header)[: end - at] + np.uint32(
                int.from_bytes(first[24:28], "big")
            )
            np.bitwise_xor(expected.byteswap(True), sequences, wrong[2])
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
