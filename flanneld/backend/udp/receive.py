"""From the peers to the TUN device."""

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence

import numpy as np

from flanneld.backend.udp import segment
from flanneld.backend.udp.batch import FEW, ROWS, Batch, Scratch
from flanneld.backend.udp.coalesce import Admit, Coalescer
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

# Shapes of batches remembered.
_BATCHES = 512
# Senders remembered.
_SENDERS = 4096
# An IP and a UDP header, and anything in it.
_LEAST = 29
# The most calls in a turn: what comes as a batch counts for eight. More would let the TUN device's
# queue run over.
_BUDGET, _BATCH_COST = 64, 8
# Bytes of packets that are taken in one go, and another call's.
_ROOM = int(os.environ.get('PYTHON_ROOM', 4)) * LONGEST_PACKET
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
        self._arena = bytearray(_ROOM + LONGEST_PACKET + 1)
        self._view = memoryview(self._arena)
        self._array = np.frombuffer(self._arena, np.uint8)
        self._scratch = Scratch(len(self._arena))
        self._whole = [self._view]
        self._admits: dict[str, Admit] = {}
        self._batches: dict[tuple[int, int, int], Batch] = {}

    def one(self) -> None:
        """Receive one packet and write it at once; what came together with it is written too.

        Raises OSError when the TUN device is gone.
        """
        try:
            length, control, _, address = self._udp.recvmsg_into(self._whole, _CONTROL_BYTES)
        except OSError:
            # Nothing there, or about something sent earlier.
            return
        batch = _size_of_each(control) if control else 0
        packets = -(-length // batch) if 0 < batch < length else 1
        admit = self._admit(address[0])
        if admit is None:
            self._counters.drop_unknown_peer += packets
        elif packets == 1:
            # Whoever waits for it should not wait for us to look for more to join it with.
            self._coalescer.add(self._view[:length], admit, join=False)
        else:
            full = length // batch
            self._take(full, batch, admit)
            if full * batch < length:
                self._coalescer.add(self._view[full * batch : length], admit)
        counters = self._counters
        counters.udp_receive_calls += 1
        counters.udp_received_packets += packets
        counters.udp_received_bytes += length

    def turn(self) -> bool:
        """Receive and write some packets. Returns whether there may be more.

        Raises OSError when the TUN device is gone.
        """
        receive, view, counters = self._udp.recvmsg_into, self._view, self._counters
        # At the arena's beginning there are ``rows`` packets of ``size`` bytes from one sender,
        # ``end`` bytes in all: what several calls bring is taken in one go.
        rows = size = end = received = packets_in = bytes_in = 0
        sender = ""
        admit: Admit | None = None
        more = True
        budget = _BUDGET
        while budget > 0:
            try:
                length, control, _, address = receive([view[end:]], _CONTROL_BYTES)
            except BlockingIOError:
                more = False
                break
            except OSError:
                # About something sent earlier, or no memory: reading it has cleared it.
                budget -= _BATCH_COST
                continue
            each = _size_of_each(control) if control else 0
            if 0 < each < length:
                packets = -(-length // each)
                budget -= _BATCH_COST
            else:
                each, packets = length, 1
                budget -= 1
            received += 1
            packets_in += packets
            bytes_in += length
            if each != size or address[0] != sender:
                self._take(rows, size, admit)
                if end:
                    view[:length] = view[end : end + length]
                rows, size, end = 0, each, 0
                if address[0] != sender:
                    sender = address[0]
                    admit = self._admit(sender)
            if admit is None:
                counters.drop_unknown_peer += packets
                # So that a flood of these cannot keep us from the other side.
                budget -= _BATCH_COST
                continue
            full = length // each if each else 0
            rows += full
            rest = end + full * each
            end += length
            if rest < end or end > _ROOM or not each:
                # The shorter last one of several.
                self._take(rows, size, admit)
                if rest < end or not each:
                    self._coalescer.add(view[rest:end], admit)
                rows = end = 0
        self._take(rows, size, admit)
        counters.udp_receive_calls += received
        counters.udp_received_packets += packets_in
        counters.udp_received_bytes += bytes_in
        return more

    def flush(self) -> None:
        """Write what is pending."""
        self._coalescer.flush()

    def _admit(self, sender: str) -> Admit | None:
        """Return what decides on inner sources from this sender, None for a stranger."""
        if not self._source_check:
            return _anybody
        if not self._routes.knows(sender):
            return None
        admit = self._admits.get(sender)
        if admit is None:
            if len(self._admits) >= _SENDERS:
                self._admits.clear()
            admit = self._admits[sender] = _of_sender(self._routes, sender)
        return admit

    def _take(self, rows: int, size: int, admit: Admit | None) -> None:
        """Take packets of one size from the arena's beginning."""
        if not rows or admit is None:
            return
        if rows < FEW or size < _LEAST:
            for at in range(0, rows * size, size):
                self._coalescer.add(self._view[at : at + size], admit)
            return
        for first in range(0, rows, ROWS):
            key = (first, min(ROWS, rows - first), size)
            batch = self._batches.get(key)
            if batch is None:
                if len(self._batches) >= _BATCHES:
                    del self._batches[next(iter(self._batches))]
                memory = self._array[first * size :]
                batch = Batch(memory, key[1], size, self._scratch)
                self._batches[key] = batch
            self._coalescer.add_rows(batch, admit)

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
        protocol, source = TCP if tcp else UDP, whole[VNET_LEN:]
        for packet in segment.segment(source, IP_HEADER, protocol, gso, out):
            self._write((VNET_PLAIN, packet), 1)


def _of_sender(routes: RouteTable, sender: str) -> Admit:
    """Return what decides whether an inner source is behind the peer with this public address."""
    lookup = routes.lookup

    def is_of_sender(source: bytes) -> bool:
        peer = lookup(source)
        return peer is not None and peer.ip == sender

    return is_of_sender


def _size_of_each(control: Sequence[tuple[int, int, bytes]]) -> int:
    """Return the size of the datagrams that were received in one call, 0 if it was one."""
    for level, kind, data in control:
        if level == socket.IPPROTO_UDP and kind == UDP_GRO and len(data) == _SIZE.size:
            return int(_SIZE.unpack(data)[0])
    return 0
