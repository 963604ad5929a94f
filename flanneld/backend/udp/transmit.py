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
# Super-packets read before they are cut.
_SUPERS = 4
_SUPER_STRIDE = 1 << 16 | 1 << 7
# Below this many packets numpy's fixed cost is more than a loop's.
_FEW = 4
_OUTS = 3
# Super-packets' payload and a header, at most 120 bytes and one to make it even, for each row.
_OUT_BYTES = _SUPERS * (LONGEST_PACKET + segment.ROWS * 122)
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
        # First the packets' slots, then those of super-packets.
        self._supers_at = SLOTS * self._stride
        arena = bytearray(self._supers_at + _SUPERS * _SUPER_STRIDE)
        self._view = memoryview(arena)
        self._array = np.frombuffer(arena, np.uint8)
        matrix = self._array[: SLOTS * self._stride].reshape(SLOTS, self._stride)
        self._packets = matrix[:, VNET_LEN:]
        self._slots = [[self._view[slot * self._stride :]] for slot in range(SLOTS)]
        self._lengths = [0] * SLOTS
        begin, self._supers = self._supers_at, self._array[self._supers_at :]
        self._supers = self._supers.reshape(_SUPERS, _SUPER_STRIDE)
        self._super_slots = [[self._view[begin + n * _SUPER_STRIDE :]] for n in range(_SUPERS)]
        self._super_lengths = [0] * _SUPERS
        # The last that was read was a super-packet: so will the next be.
        self._in_bulk = False
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
        fd, view, stride, begin = self._tun, self._view, self._stride, self._supers_at
        slots, lengths = self._slots, self._lengths
        super_slots, super_lengths = self._super_slots, self._super_lengths
        count = supers = cut = 0
        more = True
        while count < limit and cut + supers < _SUPERS:
            bulk = self._in_bulk
            at = begin + supers * _SUPER_STRIDE if bulk else count * stride
            try:
                length = os.readv(fd, super_slots[supers] if bulk else slots[count])
            except BlockingIOError:
                more = False
                break
            if view[at + 1] != GSO_NONE or length >= stride:
                if not bulk:
                    self._send_packets(count)
                    count = 0
                    self._in_bulk = True
                    view[begin : begin + length] = view[at : at + length]
                super_lengths[supers] = length
                supers += 1
            else:
                if bulk:
                    self._send_supers(supers)
                    cut += supers
                    supers = 0
                    self._in_bulk = False
                    view[:length] = view[at : at + length]
                lengths[count] = length
                count += 1
        self._send_packets(count)
        self._send_supers(supers)
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

    def _send_supers(self, count: int) -> None:
        """Send what is in the first ``count`` of the super-packets' slots."""
        lengths, view = self._super_lengths, self._view
        number = 0
        while number < count:
            at, length = self._supers_at + number * _SUPER_STRIDE, lengths[number]
            if view[at + 1] == GSO_NONE:
                # One that does not fit into a packet's slot.
                self.flush()
                self._count_read(1, length - VNET_LEN)
                self._send_packet(at, length)
                number += 1
                continue
            alike = 1
            if number + 1 < count:
                kind = self._kind(at)
                while number + alike < count and (
                    lengths[number + alike] == length
                    and self._kind(at + alike * _SUPER_STRIDE) == kind
                ):
                    alike += 1
            number += self._send_super(at, length, alike)

    def _kind(self, at: int) -> tuple[bytes, bytes]:
        """Return what must be equal in super-packets that are cut together: also where they go."""
        packet = at + VNET_LEN
        return self._view[at : packet + 2].tobytes(), self._view[packet + 16 : packet + 20].tobytes()

    def _send_super(self, at: int, length: int, alike: int = 1) -> int:
        """Cut a super-packet and send most of it; the rest may wait for the next.

        As many of the ``alike`` that begin with it as can be cut together are. Returns how many.
        """
        begin = at + VNET_LEN
        packet = self._view[begin : at + length]
        flags, kind, _, gso, start, _ = VNET.unpack_from(self._view, at)
        counters = self._counters
        peer = self._route(packet)
        if peer is None:
            self._count_read(1, length - VNET_LEN)
            return 1
        if not flags & NEEDS_CSUM:
            # Joined by a driver that has looked at the checksums: nobody says where one begins.
            start = (packet[0] & 15) * 4
        protocol = _PROTOCOLS.get(kind, 0)
        try:
            header = segment.header_length(packet, start, protocol)
            if not gso:
                raise segment.BadSuperPacket
        except segment.BadSuperPacket:
            self._count_read(1, length - VNET_LEN)
            counters.drop_malformed += 1
            return 1
        packet[8] -= 1
        first, payload, size = 0, len(packet) - header, header + gso
        if alike > 1:
            alike = self._whole(begin, len(packet), alike, start, header, protocol, gso)
        counters.tun_read_calls += alike
        counters.tun_read_bytes += alike * len(packet)
        while first < payload:
            other = peer is not self._peer or size != self._size
            if self._rows and (other or len(self._waiting) >= _OUTS - 1):
                self.flush()
            key = (begin, alike, len(packet), gso, start, header, protocol, first, self._next_out)
            cut = self._cuts.get(key)
            if cut is None:
                cut = self._new_cut(key)
            rows = cut.run()
            counters.tun_read_packets += rows.number
            first = cut.end
            self._peer, self._size = peer, size
            self._flags_at = start + 13 if protocol == TCP else 0
            self._send_cut(rows)
        return alike

    def _whole(
        self, begin: int, length: int, alike: int, start: int, header: int, protocol: int, gso: int
    ) -> int:
        """Return how many super-packets from ``begin`` on are cut together; their TTLs are done.

        The first one's is done already. They need equal headers' lengths, no shorter last packet.
        """
        rows, rest = divmod(length - header, gso)
        if rest or rows > segment.ROWS:
            return 1
        for number in range(1, alike):
            at = begin + number * _SUPER_STRIDE
            packet = self._view[at : at + length]
            try:
                if packet[8] <= 1 or segment.header_length(packet, start, protocol) != header:
                    return number
            except segment.BadSuperPacket:
                return number
            packet[8] -= 1
        return alike

    def _new_cut(self, key: tuple[int, ...]) -> segment.Cut:
        begin, alike, length, gso, start, header, protocol, first, out = key
        memory = self._array[begin:]
        if alike > 1:
            memory = self._supers[(begin - self._supers_at) // _SUPER_STRIDE :][:alike]
            memory = memory[:, VNET_LEN : VNET_LEN + length]
        else:
            memory = memory[np.newaxis, :length]
        cut = segment.Cut(
            memory,
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
