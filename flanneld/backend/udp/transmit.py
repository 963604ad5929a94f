"""From the TUN device to the peers."""

import os
import socket
import time
from collections.abc import Callable

import numpy as np

from flanneld.backend.udp import segment
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.icmp import NET_UNREACHABLE, TIME_EXCEEDED
from flanneld.backend.udp.packet import (
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_UDP_L4,
    IP_HEADER,
    LONGEST_PACKET,
    NEEDS_CSUM,
    PSH,
    TCP,
    UDP,
    VNET,
    VNET_LEN,
    complete_checksum,
    decrement_ttl,
)
from flanneld.backend.udp.peers import Peer, RouteTable
from flanneld.backend.udp.send import Sender

# Packets read before they are sent.
SLOTS = 64
_SUPERS_IN_A_TURN = 4
# Below this many packets numpy's fixed cost is more than a loop's.
_FEW = 4
_OUTS = 4
# A super-packet's payload and a header, at most 120 bytes and one to make it even, for each row.
_OUT_BYTES = LONGEST_PACKET + segment.ROWS * 122
# Shapes of super-packets remembered.
_CUTS = 160
# How long the rest of a long super-packet waits for the next one.
PATIENCE_MS = 1

_PROTOCOLS = {GSO_TCPV4: TCP, GSO_TCPV4 | GSO_ECN: TCP, GSO_UDP_L4: UDP}


class Transmitter:
    """Reads packets from the TUN device and sends them to the peers; ``segments`` as `Sender`."""

    def __init__(
        self,
        tun: int,
        udp: socket.socket,
        routes: RouteTable,
        counters: Counters,
        *,
        mtu: int,
        segments: bool,
        answer: Callable[[tuple[int, int], memoryview], None],
        say: Callable[[str], None],
    ) -> None:
        self.may_wait = False
        """Rows are waiting that need not be sent before the next packets are read."""
        self._waits_since = 0.0
        self._tun = tun
        self._routes = routes
        self._counters = counters
        self._answer = answer
        # Larger packets than this are handled at once, so a slot need not hold them.
        self._stride = min(16384, (VNET_LEN + mtu + 64) // 64 * 64)
        arena = bytearray(SLOTS * self._stride + VNET_LEN + LONGEST_PACKET + 64)
        self._view = memoryview(arena)
        self._array = np.frombuffer(arena, np.uint8)
        matrix = self._array[: SLOTS * self._stride].reshape(SLOTS, self._stride)
        self._packets = matrix[:, VNET_LEN:]
        self._slots = [[self._view[slot * self._stride :]] for slot in range(SLOTS)]
        self._lengths = [0] * SLOTS
        # Super-packets are cut into each of these in turn, so that rows can wait in one while the
        # next is filled.
        self._out_views = [memoryview(bytearray(_OUT_BYTES)) for _ in range(_OUTS)]
        self._outs = [np.frombuffer(view, np.uint8) for view in self._out_views]
        self._next_out = 0
        self._cuts: dict[tuple[int, ...], segment.Cut] = {}
        # Rows of one size to one peer that were cut but not sent.
        self._waiting: list[memoryview] = []
        self._rows = 0
        self._peer: Peer | None = None
        self._size = 0
        self._flags_at = 0
        self._sender = Sender(udp, counters, segments=segments, say=say)

    def one(self) -> None:
        """Read one packet and send it at once, on the shortest way. Raises OSError as `turn`."""
        try:
            length = os.readv(self._tun, self._slots[0])
        except BlockingIOError:
            return
        view = self._view
        head = view[: VNET_LEN + IP_HEADER].tobytes()
        if head[1] != GSO_NONE:
            self._send_super(0, length)
            return
        # With rubbish these are any bytes.
        peer = self._routes.lookup(head[26:30])
        if (
            peer is None
            or self._rows
            or length < VNET_LEN + IP_HEADER
            or head[10] >> 4 != 4
            or head[18] <= 1
            or (head[0] & NEEDS_CSUM and not self._complete(length))
        ):
            self.flush()
            self._count_read(1, length - VNET_LEN)
            self._send_packet(0, length)
            return
        packet = view[VNET_LEN:length]
        decrement_ttl(packet)
        self._sender.send_one(packet, peer)
        self._count_read(1, length - VNET_LEN)

    def _complete(self, length: int) -> bool:
        """Finish the checksum of the packet in the first slot. False if its place is outside."""
        _, _, _, _, start, offset = VNET.unpack_from(self._view)
        if complete_checksum(self._view[VNET_LEN:length], start, offset):
            self._view[0] = 0
            return True
        return False

    def turn(self, limit: int = SLOTS) -> bool:
        """Read and send some packets, at most ``limit``. Returns whether there may be more.

        Raises OSError when the TUN device is gone.
        """
        fd, slots, lengths, view, stride = (
            self._tun,
            self._slots,
            self._lengths,
            self._view,
            self._stride,
        )
        count = supers = 0
        more = True
        while count < limit and supers < _SUPERS_IN_A_TURN:
            try:
                length = os.readv(fd, slots[count])
            except BlockingIOError:
                more = False
                break
            at = count * stride
            if view[at + 1] != GSO_NONE or length >= stride:
                self._send_packets(count)
                count = 0
                supers += 1
                if view[at + 1] == GSO_NONE:
                    self.flush()
                    self._count_read(1, length - VNET_LEN)
                    self._send_packet(at, length)
                else:
                    self._send_super(at, length)
            else:
                lengths[count] = length
                count += 1
        self._send_packets(count)
        return more

    def _count_read(self, packets: int, size: int) -> None:
        self._counters.tun_read_calls += 1
        self._counters.tun_read_packets += packets
        self._counters.tun_read_bytes += size

    def _route(self, packet: memoryview) -> Peer | None:
        """Return the peer an IPv4 packet goes to, after its TTL; None if it ends here."""
        counters = self._counters
        if len(packet) < IP_HEADER:
            counters.drop_malformed += 1
            return None
        if packet[0] >> 4 != 4:
            counters.drop_not_ipv4 += 1
            return None
        peer = self._routes.lookup(packet[16:20].tobytes())
        if peer is None:
            counters.drop_no_route += 1
            self._answer(NET_UNREACHABLE, packet)
        elif packet[8] <= 1:
            counters.drop_ttl += 1
            self._answer(TIME_EXCEEDED, packet)
        else:
            return peer
        return None

    # Packets as they are

    def _send_packets(self, count: int) -> None:
        """Send the packets in the first ``count`` slots."""
        if not count:
            return
        self.flush()
        lengths, stride, view = self._lengths, self._stride, self._view
        self._counters.tun_read_calls += count
        self._counters.tun_read_packets += count
        self._counters.tun_read_bytes += sum(lengths[:count]) - count * VNET_LEN
        if count < _FEW:
            for slot in range(count):
                self._send_packet(slot * stride, lengths[slot])
            return
        lookup = self._routes.lookup
        # Packets to one peer stay in order; those to different peers need not.
        groups: list[tuple[Peer | None, list[int]]] = []
        latest: dict[Peer | None, tuple[int, bytes, list[int]]] = {}
        for slot in range(count):
            at = slot * stride
            length = lengths[slot]
            # With IPv6 and with rubbish these are any bytes; it is sorted out below.
            peer = lookup(view[at + VNET_LEN + 16 : at + VNET_LEN + 20].tobytes())
            header = view[at : at + VNET_LEN + 1].tobytes()
            group = latest.get(peer)
            if group is not None and group[0] == length and group[1] == header:
                group[2].append(slot)
            else:
                slots = [slot]
                latest[peer] = (length, header, slots)
                groups.append((peer, slots))
        for peer, slots in groups:
            if peer is None or len(slots) < _FEW or not self._send_alike(slots, peer):
                for slot in slots:
                    self._send_packet(slot * stride, lengths[slot])

    def _send_alike(self, slots: list[int], peer: Peer) -> bool:
        """Send packets of one length, with equal virtio headers, to one peer.

        Returns False, and does nothing, if they must be looked at one by one.
        """
        length, stride, view = self._lengths[slots[0]], self._stride, self._view
        size, at = length - VNET_LEN, slots[0] * stride
        flags, _, _, _, start, offset = VNET.unpack_from(view, at)
        if size < IP_HEADER or view[at + VNET_LEN] >> 4 != 4:
            return False
        if flags & NEEDS_CSUM and (start < IP_HEADER or start + offset + 2 > size or start & 1):
            return False
        even = size + (size & 1)
        together = slots[-1] - slots[0] + 1 == len(slots)
        if together:
            rows = self._packets[slots[0] : slots[-1] + 1, :even]
        else:
            rows = self._packets[slots, :even]
        if int(rows[:, 8].min()) <= 1:
            return False
        segment.decrement_ttls(rows)
        if flags & NEEDS_CSUM:
            rows[:, size:] = 0
            segment.complete_checksums(rows, start, offset)
        if together:
            pieces = [view[s * stride + VNET_LEN : s * stride + length] for s in slots]
        else:
            pieces = [row[:size].data for row in rows]
        self._sender.send(pieces, size, peer)
        return True

    def _send_packet(self, at: int, length: int) -> None:
        """Send one packet."""
        packet = self._view[at + VNET_LEN : at + length]
        peer = self._route(packet)
        if peer is None:
            return
        if self._view[at] & NEEDS_CSUM:
            vnet = VNET.unpack_from(self._view, at)
            if not complete_checksum(packet, vnet[4], vnet[5]):
                self._counters.drop_malformed += 1
                return
        decrement_ttl(packet)
        self._sender.send_one(packet, peer)

    # Super-packets

    def _send_super(self, at: int, length: int) -> None:
        """Cut one super-packet and send most of it; the rest may wait for the next."""
        begin = at + VNET_LEN
        packet = self._view[begin : at + length]
        flags, kind, _, gso, start, _ = VNET.unpack_from(self._view, at)
        counters = self._counters
        counters.tun_read_calls += 1
        counters.tun_read_bytes += length - VNET_LEN
        peer = self._route(packet)
        if peer is None:
            counters.tun_read_packets += 1
            return
        if not flags & NEEDS_CSUM:
            # Joined by a driver that has looked at the checksums: nobody says where one begins.
            start = (packet[0] & 15) * 4
        protocol = _PROTOCOLS.get(kind, 0)
        try:
            header = segment.header_length(packet, start, protocol)
            packet[8] -= 1
            first, payload = 0, len(packet) - header
            size = header + gso
            while first < payload:
                other = peer is not self._peer or size != self._size
                if self._rows and (other or len(self._waiting) >= _OUTS - 1):
                    self.flush()
                key = (begin, length, gso, start, header, protocol, first, self._next_out)
                cut = self._cuts.get(key)
                if cut is None:
                    cut = self._new_cut(key)
                rows = cut.run()
                counters.tun_read_packets += rows.number
                first = cut.end
                self._peer, self._size = peer, size
                self._flags_at = start + 13 if protocol == TCP else 0
                self._send_cut(rows)
        except segment.BadSuperPacket:
            counters.tun_read_packets += 1
            counters.drop_malformed += 1

    def _new_cut(self, key: tuple[int, ...]) -> segment.Cut:
        begin, length, gso, start, header, protocol, first, out = key
        cut = segment.Cut(
            self._array[begin : begin + length - VNET_LEN],
            start=start,
            header=header,
            protocol=protocol,
            gso=gso,
            out=self._outs[out],
            first=first,
        )
        if len(self._cuts) >= _CUTS:
            del self._cuts[next(iter(self._cuts))]
        self._cuts[key] = cut
        return cut

    def _send_cut(self, rows: segment.Rows) -> None:
        """Send the rows in the current out buffer with those waiting, but not a small rest."""
        out = self._out_views[self._next_out]
        self._next_out = (self._next_out + 1) % _OUTS
        count, size, stride, last = rows
        peer = self._peer
        if peer is None:
            return
        limit = self._sender.at_once(size)
        if stride != size or limit < 2:
            self.flush()
            pieces = [out[at : at + size] for at in range(0, count * stride, stride)]
            pieces[-1] = pieces[-1][:last]
            self._sender.send(pieces, size, peer)
            return
        begin = 0
        while begin < count:
            end = min(count, begin + limit - self._rows)
            final = end == count and last < size
            stop = (end - 1) * size + last if final else end * size
            self._waiting.append(out[begin * size : stop])
            self._rows += end - begin
            if final or self._rows == limit:
                self.flush()
            begin = end
        # Without PSH the sender has more, and fills a super-packet: it is not waiting for this.
        self.may_wait = bool(
            self._flags_at
            and count > limit
            and self._rows
            and not out[(count - 1) * size + self._flags_at] & PSH
        )
        if self.may_wait:
            self._waits_since = time.monotonic()

    def flush(self) -> None:
        """Send the rows that wait."""
        if self._rows and self._peer is not None:
            self.may_wait = False
            pieces, count = self._waiting, self._rows
            self._waiting, self._rows = [], 0
            self._sender.send(pieces, self._size, self._peer, count)

    def is_overdue(self, now: float) -> bool:
        """Return whether the rows that may wait have waited long enough."""
        return self.may_wait and (now - self._waits_since) * 1000 > PATIENCE_MS
