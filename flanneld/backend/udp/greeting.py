"""How two hosts find out that both have a fast path (see `fastpath`). No I/O but `Greeter`'s.

Whoever sends a peer something the slow way, because it is not known to have a fast path, sends it
an ICMP echo request, too: from TUN device to TUN device, an ordinary packet that any host answers.
If both have a fast path, request and answer go by it, and so each knows of the other.
"""

import socket
import struct
from collections.abc import Callable, Iterable

from flanneld.backend.udp.packet import GREETING_ID, checksum, words
from flanneld.backend.udp.peers import Peer

# Seconds from one greeting of a peer to the next, while packets to it go the slow way: at first,
# and at most, doubling. The longest is less than what a peer counts as known for (`FAST_MS`), with
# what may pass until a packet goes the slow way (`SLOW_EVERY_MS`).
EVERY, SELDOM = 2.0, 8.0
# After such a pause it is a new acquaintance.
FORGOTTEN = 60.0
# Peers remembered; forgotten they are greeted once too often.
_REMEMBERED = 4096
_ECHO_REQUEST = 8


def echo_request(number: int) -> bytes:
    """Return an ICMP echo request (RFC 792), without an IP header."""
    text = struct.pack("!BBHHH", _ECHO_REQUEST, 0, 0, GREETING_ID, number) + b"flannel "
    return text[:2] + checksum(words(text)) + text[4:]


class Greeter:
    """Greets the peers that packets are sent to, each only now and then."""

    def __init__(self, icmp: socket.socket, clock: Callable[[], float]) -> None:
        """``icmp`` is a raw ICMP socket."""
        self._icmp = icmp
        self._clock = clock
        # When each may be greeted again, and how long it is then to the next time.
        self._due: dict[str, tuple[float, float]] = {}
        self._number = 0

    def greet(self, peers: Iterable[Peer]) -> None:
        """Greet those of the peers whose time it is."""
        now = self._clock()
        for peer in peers:
            due, pause = self._due.get(peer.device, (0.0, EVERY))
            if now < due:
                continue
            if now > due + FORGOTTEN:
                pause = EVERY
            if len(self._due) >= _REMEMBERED:
                self._due.clear()
            self._due[peer.device] = (now + pause, min(2 * pause, SELDOM))
            self._number = (self._number + 1) & 0xFFFF
            try:
                self._icmp.sendto(echo_request(self._number), (peer.device, 0))
            except OSError:
                continue  # no route yet, a firewall's rule: next time
