"""ICMP errors about packets the tunnel cannot deliver. No I/O.

They leave through a raw ICMP socket, so the kernel writes the IP header and chooses the source
as for its own errors: the address that faces the sender. Written to the TUN device instead, with
any address of this host as source, the kernel would drop them as martians; that is why nobody
ever received those of the original.
"""

from collections.abc import Callable

from flanneld.backend.udp.packet import ICMP, IP_HEADER, Buffer, checksum, words

NET_UNREACHABLE = (3, 0)
TIME_EXCEEDED = (11, 0)

# The kernel's own limit (net.ipv4.icmp_msgs_per_sec and icmp_msgs_burst).
RATE = 1000.0
BURST = 50.0


def may_answer(packet: Buffer) -> bool:
    """Return whether an error about this IPv4 packet may be sent at all (RFC 1122, 3.2.2).

    Not about ICMP, not about a fragment but the first, and only if the source is one host and the
    destination no multicast or broadcast address.
    """
    header = (packet[0] & 15) * 4
    if header < IP_HEADER or len(packet) < header or packet[9] == ICMP:
        return False
    if packet[6] & 0x1F or packet[7]:
        return False
    return 0 < packet[12] < 224 and packet[12] != 127 and packet[16] < 224


def error(kind: tuple[int, int], packet: Buffer) -> bytes:
    """Return the ICMP message (without an IP header) about ``packet``: its header and 8 bytes."""
    header = (packet[0] & 15) * 4
    text = bytes(kind) + bytes(6) + bytes(packet[: header + 8])
    return text[:2] + checksum(words(text)) + text[4:]


class RateLimit:
    """At most ``rate`` per second on average, ``burst`` at once (a token bucket)."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._tokens = burst
        self._at = clock()

    def allows(self) -> bool:
        """Return whether one more may go now, and count it if so."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
