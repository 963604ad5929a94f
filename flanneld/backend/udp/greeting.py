"""How two hosts find out that both have a fast path (see `fastpath`). No I/O but `Greeter`'s.

Whoever sends a peer something the slow way, because it is not known to have a fast path, sends it
an ICMP echo request, too: from TUN device to TUN device, an ordinary packet that any host answers.
If both have a fast path, request and answer go by it, and so each knows of the other.
"""

import socket
from collections.abc import Callable, Iterable

from flanneld.backend.udp.packet import checksum, words
from flanneld.backend.udp.peers import Peer

# Seconds between two greetings to one peer, while packets to it go the slow way.
EVERY = 2.0
# Peers remembered; forgotten they are greeted once too often.
_REMEMBERED = 4096
_ECHO_REQUEST = 8


def echo_request(number: int) -> bytes:
    """Return an ICMP echo request (RFC 792), without an IP header."""
    text = bytes([_ECHO_REQUEST, 0, 0, 0]) + b"fl" + number.to_bytes(2, "big") + b"flannel "
    return text[:2] + checksum(words(text)) + text[4:]


class Greeter:
    """Greets the peers that packets are sent to, each only now and then."""

    def __init__(self, icmp: socket.socket, clock: Callable[[], float]) -> None:
        """``icmp`` is a raw ICMP socket."""
        self._icmp = icmp
        self._clock = clock
        self._due: dict[str, float] = {}
        self._number = 0

    def greet(self, peers: Iterable[Peer]) -> None:
        """Greet those of the peers whose time it is."""
        now = self._clock()
        for peer in peers:
            if now < self._due.get(peer.device, 0.0):
                continue
            if len(self._due) >= _REMEMBERED:
                self._due.clear()
            self._due[peer.device] = now + EVERY
            self._number = (self._number + 1) & 0xFFFF
            try:
                self._icmp.sendto(echo_request(self._number), (peer.device, 0))
            except OSError:
                continue  # no route yet, a firewall's rule: next time
