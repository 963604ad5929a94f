"""Datagrams to the peers, as many in one call as the kernel takes."""

import errno
import socket
import struct
import time
from collections.abc import Callable, Sequence

from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.peers import Peer
from flanneld.backend.udp.tun import UDP_SEGMENT

# The most datagrams in one call: UDP_MAX_SEGMENTS of kernels before 6.9.
SEGMENTS = 64
# The most bytes: an IP packet without the headers of IP and UDP.
LONGEST_PAYLOAD = 65507
# After a packet was too big for the path, the path may have changed.
_TOO_BIG_SECONDS = 10.0


class Sender:
    """Sends packets, each as a datagram, and counts them.

    ``segments``: whether the socket can send many datagrams in one call; switched off, and said,
    when a device refuses.
    """

    def __init__(
        self, udp: socket.socket, counters: Counters, *, segments: bool, say: Callable[[str], None]
    ) -> None:
        self.segments = segments
        self.sent_to: set[Peer] = set()
        """The peers that something was sent to since this was cleared."""
        self._udp = udp
        self._counters = counters
        self._say = say
        self._controls: dict[int, list[tuple[int, int, bytes]]] = {}
        self._too_big: dict[str, tuple[int, float]] = {}

    def at_once(self, size: int) -> int:
        """Return how many packets of this size go in one call at most."""
        return min(SEGMENTS, LONGEST_PAYLOAD // size) if self.segments and size else 1

    def send(self, pieces: Sequence[memoryview], size: int, peer: Peer, packets: int = 0) -> None:
        """Send packets of one size (the last may be shorter): a piece for each packet.

        With ``packets``, their number, a piece may hold several, and they fit into one call.
        """
        self.sent_to.add(peer)
        count = packets or len(pieces)
        limit = self.at_once(size)
        if count > 1 and limit > 1 and not self._is_too_big(size, peer):
            if count > limit:
                for first in range(0, count, limit):
                    self.send(pieces[first : first + limit], size, peer)
                return
            control = self._controls.get(size)
            if control is None:
                if len(self._controls) > 1024:
                    self._controls.clear()
                control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]
                self._controls[size] = control
            try:
                sent = self._udp.sendmsg(pieces, control, 0, peer.address)
            except OSError as error:
                if not self._goes_one_by_one(error, size, peer, count):
                    return
            else:
                self._counters.udp_send_calls += 1
                self._counters.udp_sent_packets += count
                self._counters.udp_sent_bytes += sent
                return
        if not packets:
            for piece in pieces:
                self.send_one(piece, peer)
            return
        for piece in pieces:
            for first in range(0, len(piece), size):
                self.send_one(piece[first : first + size], peer)

    def send_one(self, packet: memoryview, peer: Peer) -> None:
        """Send one packet. What the kernel does not take is counted."""
        self.sent_to.add(peer)
        try:
            self._udp.sendto(packet, peer.address)
        except BlockingIOError:
            self._counters.drop_send_full += 1
        except OSError:
            # No route to the peer, a firewall's rule: the kernel's answer to one packet.
            self._counters.drop_send_failed += 1
        else:
            self._counters.udp_send_calls += 1
            self._counters.udp_sent_packets += 1
            self._counters.udp_sent_bytes += len(packet)

    def _goes_one_by_one(self, error: OSError, size: int, peer: Peer, count: int) -> bool:
        """Return whether packets that could not be sent in one call may be sent one by one."""
        if error.errno == errno.EAGAIN:
            self._counters.drop_send_full += count
            return False
        if error.errno in (errno.EMSGSIZE, errno.EINVAL):
            # Larger than the path to the peer, for which kernels before 6.14 say EINVAL; alone the
            # kernel fragments it. One peer's path is no reason to slow down all.
            if len(self._too_big) > 1024:
                self._too_big.clear()
            if peer.ip not in self._too_big:
                self._say(f"packets of {size} bytes are too big for the path to {peer.ip}")
            self._too_big[peer.ip] = (size, time.monotonic() + _TOO_BIG_SECONDS)
            return True
        if error.errno in (errno.EIO, errno.EOPNOTSUPP, errno.ENOPROTOOPT):
            # EIO: a device without checksum offload, before Linux 6.11.
            self.segments = False
            self._say(
                f"UDP_SEGMENT is refused on the way to {peer.ip} ({error.strerror});"
                " sending one by one from now on"
            )
            return True
        self._counters.drop_send_failed += count
        return False

    def _is_too_big(self, size: int, peer: Peer) -> bool:
        if not self._too_big:
            return False
        limit, until = self._too_big.get(peer.ip, (0, 0.0))
        return 0 < limit <= size and time.monotonic() < until
