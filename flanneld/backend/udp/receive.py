"""From the peers to the TUN device."""

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence

import numpy as np

from flanneld.backend.udp import segment
from flanneld.backend.udp.batch import BATCH_ROWS, FEW, Batch, Scratch
from flanneld.backend.udp.buffers import Buffers
from flanneld.backend.udp.coalesce import Admit, Coalescer
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.packet import (
    GSO_TCPV4,
    IP_HEADER,
    LONGEST_PACKET,
    SECRET_BYTES,
    TCP,
    UDP,
    VNET_LEN,
    VNET_PLAIN,
    WHOLE_BYTES,
    Buffer,
)
from flanneld.backend.udp.peers import RouteTable
from flanneld.backend.udp.tun import UDP_GRO

# Shapes of batches remembered.
_BATCHES = 128
# Senders remembered.
_SENDERS = 4096
# An IP and a UDP header, and anything in it.
_LEAST = 29
# The most calls in a turn: what comes as a batch counts for eight. More would let the TUN device's
# queue run over.
_BUDGET, _BATCH_COST = 64, 8
# Bytes of packets that are taken in one go, and another call's.
_ROOM = 4 * LONGEST_PACKET
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
        buffers: Buffers,
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
        self.secret = b""
        """What super-packets from the fast path begin with, if there is one."""
        self._say = say
        self._coalescer = Coalescer(self._write, expired, counters, buffers)
        self._coalescer.tcp = join_tcp
        self._coalescer.udp = join_udp
        self._view = buffers.take(_ROOM + LONGEST_PACKET + 1)
        self._array = np.frombuffer(self._view, np.uint8)
        self._scratch = Scratch(len(self._view), buffers)
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
        size = _size_of_each(control, length)
        admit = self._admit(address[0])
        if self._is_whole(0, length):
            self._write_whole(0, length, admit)
            return
        packets = self._count(length, size)
        if admit is None:
            self._counters.drop_unknown_peer += packets
        elif packets == 1:
            # Whoever waits for it should not wait for us to look for more to join it with.
            self._coalescer.add(self._view[:length], admit, join=False)
        else:
            full = length // size
            self._take(full, size, admit)
            if full < packets:
                self._coalescer.add(self._view[full * size : length], admit)

    def turn(self) -> bool:
        """Receive and write some packets. Returns whether there may be more.

        Raises OSError when the TUN device is gone.
        """
        receive, view = self._udp.recvmsg_into, self._view
        # At the memory's beginning there are ``rows`` packets of ``size`` bytes from one sender,
        # ``end`` bytes in all: what several calls bring is taken in one go.
        rows = size = end = 0
        sender = ""
        admit: Admit | None = None
        more, budget = True, _BUDGET
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
            if self._is_whole(end, length):
                self._take(rows, size, admit)
                self._write_whole(end, length, self._admit(address[0]))
                rows = end = 0
                budget -= _BATCH_COST
                continue
            each = _size_of_each(control, length)
            packets = self._count(length, each)
            budget -= _BATCH_COST if packets > 1 else 1
            if each != size or address[0] != sender:
                self._take(rows, size, admit)
                if end:
                    view[:length] = view[end : end + length]
                rows, size, end = 0, each, 0
                if address[0] != sender:
                    sender = address[0]
                    admit = self._admit(sender)
            if admit is None:
                self._counters.drop_unknown_peer += packets
                # So that a flood of these cannot keep us from the other side.
                budget -= _BATCH_COST
                continue
            full = length // each if each else 0
            rows += full
            shorter, end = end + full * each, end + length
            if full < packets or end > _ROOM:
                self._take(rows, size, admit)
                if full < packets:
                    self._coalescer.add(view[shorter:end], admit)
                rows = end = 0
        self._take(rows, size, admit)
        return more

    def _is_whole(self, at: int, length: int) -> bool:
        """Tell whether a datagram holds a super-packet that the fast path has looked at."""
        secret = self.secret
        return bool(secret) and length > WHOLE_BYTES and self._view[at : at + len(secret)] == secret

    def _write_whole(self, at: int, length: int, admit: Admit | None) -> None:
        """Write it as it is, behind what has come before.

        The fast path has looked at its source. But the secret may not be one any more: an ICMP
        error about a datagram quotes it.
        """
        view = self._view[at + SECRET_BYTES : at + length]
        size = int.from_bytes(view[4:6], sys.byteorder) or 1
        packets = max(1, (len(view) - VNET_LEN) // size)
        counters = self._counters
        counters.udp_receive_calls += 1
        counters.udp_received_packets += packets
        counters.udp_received_bytes += length - WHOLE_BYTES
        if admit is None:
            counters.drop_unknown_peer += packets
        elif not admit(view[VNET_LEN + 12 : VNET_LEN + 16].tobytes()):
            counters.drop_wrong_source += packets
        else:
            self._coalescer.flush()
            self._write((view,), packets)

    def _count(self, length: int, size: int) -> int:
        """Count what a call received; returns the number of packets."""
        packets = -(-length // size) if size else 1
        counters = self._counters
        counters.udp_receive_calls += 1
        counters.udp_received_packets += packets
        counters.udp_received_bytes += length
        return packets

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
        """Take packets of one size from the memory's beginning."""
        if not rows or admit is None:
            return
        if rows < FEW or size < _LEAST:
            for at in range(0, rows * size, size):
                self._coalescer.add(self._view[at : at + size], admit)
            return
        for first in range(0, rows, BATCH_ROWS):
            key = (first, min(BATCH_ROWS, rows - first), size)
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
        coalescer = self._coalescer
        if coalescer.tcp if tcp else coalescer.udp:
            name = "TCP" if tcp else "UDP"
            self._say(f"the TUN device takes no super-packets of {name}; writing one by one")
        if tcp:
            coalescer.tcp = False
        else:
            coalescer.udp = False
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


def _size_of_each(control: Sequence[tuple[int, int, bytes]], length: int) -> int:
    """Return the size of the datagrams that came with one call; the last can be shorter."""
    for level, kind, data in control:
        if level == socket.IPPROTO_UDP and kind == UDP_GRO and len(data) == _SIZE.size:
            size = int(_SIZE.unpack(data)[0])
            return size if 0 < size < length else length
    return length
