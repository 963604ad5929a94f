"""From the TUN device to the peers."""

import os
import socket
import time
from collections.abc import Callable

import numpy as np

from flanneld.backend.udp import segment
from flanneld.backend.udp.buffers import Buffers
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
# The super-packets' payload, what is left of those before, and for each packet a header: at most
# 120 bytes and one to make it even.
_OUT_BYTES = (_SUPERS + 1) * LONGEST_PACKET + segment.SHEET_ROWS * 122
# Sheets remembered.
_SHEETS = 64
# How long the rest of a long super-packet waits for the next one.
PATIENCE_MS = 1

# Of a packet in its slot: the virtio header, the first byte, the destination.
_KIND = np.frombuffer(b"\xff" * (VNET_LEN + 1) + bytes(15) + b"\xff" * 4 + bytes(2), np.uint64)

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
        buffers: Buffers,
        mtu: int,
        segments: bool,
        answer: Callable[[tuple[int, int], memoryview], None],
        say: Callable[[str], None],
    ) -> None:
        self.may_wait = False
        """Packets are waiting that need not be sent before the next are read."""
        self._waits_since = 0.0
        self._tun = tun
        self._routes = routes
        self._counters = counters
        self._answer = answer
        # Larger packets than this go where super-packets do, so a slot need not hold them.
        self._stride = min(16384, (VNET_LEN + mtu + 64) // 64 * 64)
        # First the packets' slots, then those of super-packets.
        self._supers_at = SLOTS * self._stride
        self._view = buffers.take(self._supers_at + _SUPERS * _SUPER_STRIDE)
        self._array = np.frombuffer(self._view, np.uint8)
        matrix = self._array[: SLOTS * self._stride].reshape(SLOTS, self._stride)
        self._packets = matrix[:, VNET_LEN:]
        self._kinds = matrix[:, : _KIND.nbytes].view(np.uint64)
        self._slots = [[self._view[slot * self._stride :]] for slot in range(SLOTS)]
        self._lengths = [0] * SLOTS
        self._super_slots = [
            [self._view[self._supers_at + number * _SUPER_STRIDE :]] for number in range(_SUPERS)
        ]
        self._super_lengths = [0] * _SUPERS
        # The last that was read was a super-packet: so will the next be.
        self._in_bulk = False
        # Super-packets are cut into this.
        self._out = np.frombuffer(buffers.take(_OUT_BYTES), np.uint8)
        self._sheets: dict[tuple[int, int, int, int], segment.Sheet] = {}
        # The one with packets in it that are not sent yet, where they go and how long the last is.
        self._sheet: segment.Sheet | None = None
        self._peer: Peer | None = None
        self._last = 0
        # Something that may be more than a small rest.
        self._added = False
        # The sender has more: it has filled a super-packet, and set no PSH.
        self._goes_on = False
        self._sender = Sender(udp, counters, segments=segments, say=say)
        self.sent_to = self._sender.sent_to
        """See `Sender.sent_to`."""

    def one(self) -> None:
        """Read one packet and send it at once, on the shortest way. Raises OSError as `turn`."""
        try:
            length = os.readv(self._tun, self._slots[0])
        except BlockingIOError:
            return
        view = self._view
        head = view[: VNET_LEN + IP_HEADER].tobytes()
        if head[1] != GSO_NONE:
            self._add_super(0, length)
            if self._added:
                self._send_sheet()
            return
        # With rubbish these are any bytes.
        peer = self._routes.lookup(head[26:30])
        if (
            peer is None
            or self._sheet is not None
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
                # One that came to the other kind's slot is moved: it happens once in many.
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
        lengths, stride = self._lengths, self._stride
        self._counters.tun_read_calls += count
        self._counters.tun_read_packets += count
        self._counters.tun_read_bytes += sum(lengths[:count]) - count * VNET_LEN
        if count < _FEW:
            for slot in range(count):
                self._send_packet(slot * stride, lengths[slot])
            return
        for peer, slots in self._groups(count):
            if peer is None or len(slots) < _FEW or not self._send_alike(slots, peer):
                for slot in slots:
                    self._send_packet(slot * stride, lengths[slot])

    def _groups(self, count: int) -> list[tuple[Peer | None, list[int]]]:
        """Return the packets in the first ``count`` slots by where they go and what they are.

        Those of a group are of one length, with equal virtio headers. Packets to one peer stay in
        order; those to different peers need not.
        """
        lengths, stride, view = self._lengths, self._stride, self._view
        lookup = self._routes.lookup
        if lengths[:count].count(lengths[0]) == count:
            kinds = (self._kinds[:count] & _KIND).tobytes()
            if kinds[: _KIND.nbytes] * count == kinds:
                # As a rule; three times as fast.
                target = view[VNET_LEN + 16 : VNET_LEN + 20].tobytes()
                return [(lookup(target), [*range(count)])]
        groups: list[tuple[Peer | None, list[int]]] = []
        latest: dict[Peer | None, tuple[int, bytes, list[int]]] = {}
        for slot in range(count):
            at = slot * stride
            length = lengths[slot]
            # With IPv6 and with rubbish these are any bytes; it is sorted out later.
            peer = lookup(view[at + VNET_LEN + 16 : at + VNET_LEN + 20].tobytes())
            header = view[at : at + VNET_LEN + 1].tobytes()
            group = latest.get(peer)
            if group is not None and group[0] == length and group[1] == header:
                group[2].append(slot)
            else:
                slots = [slot]
                latest[peer] = (length, header, slots)
                groups.append((peer, slots))
        return groups

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
        if int(np.minimum.reduce(rows[:, 8])) <= 1:
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
        """Cut what is in the first ``count`` of the super-packets' slots, and send most of it."""
        if not count:
            return
        for number in range(count):
            at, length = self._supers_at + number * _SUPER_STRIDE, self._super_lengths[number]
            if self._view[at + 1] != GSO_NONE:
                self._add_super(at, length)
                continue
            # One that does not fit into a packet's slot.
            self.flush()
            self._count_read(1, length - VNET_LEN)
            self._send_packet(at, length)
        if self._added:
            self._send_sheet()

    def _add_super(self, at: int, length: int) -> None:
        """Cut one super-packet; if this has `_added` something, `_send_sheet` is to be called."""
        begin, end = at + VNET_LEN, at + length
        packet = self._view[begin:end]
        flags, kind, _, gso, start, _ = VNET.unpack_from(self._view, at)
        peer = self._route(packet)
        if peer is None:
            self._count_read(1, length - VNET_LEN)
            return
        if not flags & NEEDS_CSUM:
            # Joined by a driver that has looked at the checksums: nobody says where one begins.
            start = (packet[0] & 15) * 4
        protocol = _PROTOCOLS.get(kind, 0)
        try:
            header = segment.header_length(packet, start, protocol)
            key = (start, header, protocol, gso)
            sheet = self._sheets.get(key)
            if sheet is None:
                sheet = self._new_sheet(*key)
        except segment.BadSuperPacket:
            self._count_read(1, length - VNET_LEN)
            self._counters.drop_malformed += 1
            return
        if self._sheet is not None and (self._sheet is not sheet or self._peer is not peer):
            self.flush()
        packet[8] -= 1
        source, first = self._array[begin:end], 0
        while first < len(packet) - header:
            if sheet.is_full:
                self.flush()
            self._sheet, self._peer, self._added = sheet, peer, True
            first, self._last = sheet.add(source, first)
        packets = -(-(len(packet) - header) // gso)
        self._count_read(packets, length - VNET_LEN)
        # Without PSH the sender has more, and fills a super-packet: it is not waiting for the rest.
        self._goes_on = bool(
            protocol == TCP
            and packets > self._sender.at_once(sheet.size)
            and not packet[start + 13] & PSH
        )
        if self._last < sheet.size:
            # Nothing can follow it in one call.
            self.flush()

    def _new_sheet(self, start: int, header: int, protocol: int, gso: int) -> segment.Sheet:
        sheet = segment.Sheet(self._out, start=start, header=header, protocol=protocol, gso=gso)
        if len(self._sheets) >= _SHEETS:
            del self._sheets[next(iter(self._sheets))]
        self._sheets[start, header, protocol, gso] = sheet
        return sheet

    def _send_sheet(self, *, whole: bool = False) -> None:
        """Send what was cut, but not a small rest, unless ``whole``."""
        sheet, peer = self._sheet, self._peer
        if sheet is None or peer is None:
            return
        sheet.finish()
        size, number = sheet.size, sheet.number
        limit = self._sender.at_once(size)
        if sheet.stride != size or limit < 2:
            # A piece for each, because there is something between them, or no call takes more.
            pieces = [sheet.packet(row, size) for row in range(number - 1)]
            self._sender.send([*pieces, sheet.packet(number - 1, self._last)], size, peer)
            at = number
        else:
            at = 0
            while number - at >= (1 if whole else limit):
                end = min(number, at + limit)
                last = self._last if end == number else size
                self._sender.send([sheet.packets(at, end, last)], size, peer, end - at)
                at = end
        sheet.clear(keep=number - at)
        self._added = False
        self.may_wait = self._goes_on and at < number
        if self.may_wait:
            self._waits_since = time.monotonic()
        if at == number:
            self._sheet = None

    def flush(self) -> None:
        """Send the packets that wait."""
        if self._sheet is not None:
            self._send_sheet(whole=True)

    def is_overdue(self, now: float) -> bool:
        """Return whether the packets that may wait have waited long enough."""
        return self.may_wait and (now - self._waits_since) * 1000 > PATIENCE_MS
