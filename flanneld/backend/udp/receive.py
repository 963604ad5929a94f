"""From the peers to the TUN device."""

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence

import numpy as np

from flanneld.backend.udp import segment
from flanneld.backend.udp.coalesce import ROWS, Admit, Coalescer
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.packet import (
    GSO_TCPV4,
    IP_HEADER,
    LONGEST_PACKET,
    TCP,
    UDP,
    VNET_LEN,
    VNET_PLAIN,
    Buffer,
)
from flanneld.backend.udp.peers import RouteTable
from flanneld.backend.udp.tun import UDP_GRO

_SLOTS = 64
# Below this many packets numpy's fixed cost is more than a loop's.
_FEW = 4
# More batches in a row would let the TUN device's queue run over.
_BATCHES_IN_A_TURN = 8
_SIZE = struct.Struct("=i")
_CONTROL_BYTES = socket.CMSG_SPACE(_SIZE.size)


def _anybody(_source: bytes) -> bool:
    return True


class Receiver:
    """Receives datagrams from the peers and writes what is in them to the TUN device.

    ``join_tcp``, ``join_udp``: whether the device is given super-packets; switched off, and said,
    when it refuses them.
    """

    def __init__(
        self,
        tun: int,
        udp: socket.socket,
        routes: RouteTable,
        counters: Counters,
        *,
        mtu: int,
        source_check: bool,
        join_tcp: bool,
        join_udp: bool,
        expired: Callable[[memoryview], None],
        say: Callable[[str], None],
    ) -> None:
        self._tun = tun
        self._udp = udp
        self._routes = routes
        self._counters = counters
        self._source_check = source_check
        self._say = say
        self._coalescer = Coalescer(self._write, expired, counters)
        self._coalescer.tcp = join_tcp
        self._coalescer.udp = join_udp
        self._stride = min(16384, (mtu + 64) // 64 * 64)
        self._arena = bytearray(_SLOTS * self._stride + LONGEST_PACKET + 1)
        self._view = memoryview(self._arena)
        self._array = np.frombuffer(self._arena, np.uint8)
        self._slots = [[self._view[slot * self._stride :]] for slot in range(_SLOTS)]
        # Packets of an odd size, moved apart.
        self._even_view = memoryview(bytearray(2 * LONGEST_PACKET))
        self._even = np.frombuffer(self._even_view, np.uint8)
        self._sender = ""

    def turn(self) -> bool:
        """Receive and write some packets. Returns whether there may be more.

        Raises OSError when the TUN device is gone.
        """
        receive, slots, stride = self._udp.recvmsg_into, self._slots, self._stride
        # Slots from first up to count hold packets of one size from one sender.
        first = count = size = batches = 0
        sender = ""
        admit: Admit | None = None
        more = True
        while count < _SLOTS and batches < _BATCHES_IN_A_TURN:
            try:
                length, control, _, address = receive(slots[count], _CONTROL_BYTES)
            except BlockingIOError:
                more = False
                break
            batch = _size_of_each(control)
            alone = 0 < batch < length or length >= stride
            if first < count and (alone or length != size or address[0] != sender):
                self._take(first * stride, count - first, size=size, stride=stride, admit=admit)
                first = count
            if address[0] != sender:
                sender = address[0]
                admit = self._admit(sender)
            packets = -(-length // batch) if 0 < batch < length else 1
            self._counters.udp_receive_calls += 1
            self._counters.udp_received_packets += packets
            self._counters.udp_received_bytes += length
            if admit is None:
                self._counters.drop_unknown_peer += packets
            elif alone:
                batches += 1
                self._take_batch(count * stride, length, batch or length, admit)
                first = count = 0
            else:
                size, count = length, count + 1
        self._take(first * stride, count - first, size=size, stride=stride, admit=admit)
        if not more:
            self._coalescer.flush()
        return more

    def _admit(self, sender: str) -> Admit | None:
        """Return what decides on inner sources from this sender, None for a stranger."""
        if not self._source_check:
            return _anybody
        if not self._routes.knows(sender):
            return None
        lookup = self._routes.lookup

        def is_of_sender(source: bytes) -> bool:
            peer = lookup(source)
            return peer is not None and peer.ip == sender

        return is_of_sender

    def _take_batch(self, at: int, length: int, size: int, admit: Admit) -> None:
        """Take what one call received: packets of one size, the last may be shorter."""
        full = length // size
        end = at + full * size
        if size & 1 and full > 1:
            stride = size + 1
            even = self._even[: full * stride].reshape(full, stride)
            even[:, :size] = self._array[at:end].reshape(full, size)
            even[:, size] = 0
            self._take_rows(
                self._even, self._even_view, 0, full, size=size, stride=stride, admit=admit
            )
        else:
            self._take_rows(self._array, self._view, at, full, size=size, stride=size, admit=admit)
        if end < at + length:
            self._coalescer.add(self._view[end : at + length], admit)

    def _take(self, at: int, count: int, *, size: int, stride: int, admit: Admit | None) -> None:
        """Take the packets in ``count`` slots."""
        if count <= 0 or admit is None:
            return
        if size & 1 and count > 1:
            self._array[at : at + count * stride].reshape(count, stride)[:, size] = 0
        self._take_rows(self._array, self._view, at, count, size=size, stride=stride, admit=admit)

    def _take_rows(
        self,
        array: segment.Bytes,
        view: memoryview,
        at: int,
        count: int,
        *,
        size: int,
        stride: int,
        admit: Admit,
    ) -> None:
        if count < _FEW:
            for begin in range(at, at + count * stride, stride):
                self._coalescer.add(view[begin : begin + size], admit)
            return
        for first in range(0, count, ROWS):
            begin, rows = at + first * stride, min(ROWS, count - first)
            matrix = array[begin : begin + rows * stride].reshape(rows, stride)
            self._coalescer.add_rows(matrix, view[begin:], size, admit)

    # The TUN device

    def _write(self, frame: Sequence[Buffer], packets: int) -> None:
        try:
            written = os.writev(self._tun, frame)
        except OSError as error:
            self._write_failed(error, frame, packets)
            return
        self._counters.tun_write_calls += 1
        self._counters.tun_written_packets += packets
        self._counters.tun_written_bytes += written - VNET_LEN

    def _write_failed(self, error: OSError, frame: Sequence[Buffer], packets: int) -> None:
        if error.errno == errno.EBADFD:
            raise error
        # A kernel that knows no such super-packet says EINVAL; EIO is a device that is down.
        if error.errno != errno.EINVAL or packets == 1:
            self._counters.drop_tun_write += packets
            return
        whole = np.frombuffer(frame[0], np.uint8)
        tcp = whole[1] == GSO_TCPV4
        name = "TCP" if tcp else "UDP"
        self._say(f"the TUN device takes no super-packets of {name}; writing one by one")
        if tcp:
            self._coalescer.tcp = False
        else:
            self._coalescer.udp = False
        gso = int.from_bytes(whole[4:6].tobytes(), sys.byteorder)
        out = np.zeros(2 * LONGEST_PACKET, np.uint8)
        protocol, source = TCP if tcp else UDP, whole[VNET_LEN:].copy()
        rows, _ = segment.segment(source, IP_HEADER, protocol, gso, out)
        for row in range(rows.count):
            size = rows.size if row < rows.count - 1 else rows.last
            begin = row * rows.stride
            self._write((VNET_PLAIN, out[begin : begin + size].data), 1)


def _size_of_each(control: Sequence[tuple[int, int, bytes]]) -> int:
    """Return the size of the datagrams that were received in one call, 0 if it was one."""
    for level, kind, data in control:
        if level == socket.IPPROTO_UDP and kind == UDP_GRO and len(data) == _SIZE.size:
            return int(_SIZE.unpack(data)[0])
    return 0
