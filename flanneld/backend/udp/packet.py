"""IPv4, TCP and UDP headers as bytes: offsets, checksums, the TTL. No I/O, no numpy.

Sums of 16-bit words are kept in little-endian order and modulo 65535, which is what
``int.from_bytes(data, "little") % 65535`` gives: one's complement addition does not care about
byte order (RFC 1071). A sum of 0 means "all ones": the data and its checksum agree.
"""

import struct
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

IP_HEADER = 20
TCP_HEADER = 20
UDP_HEADER = 8
# An IP header and a TCP header are at most this long each.
LONGEST_HEADER = 60
LONGEST_PACKET = 65535

ICMP, TCP, UDP = 1, 6, 17

FIN, PSH, ACK, CWR = 0x01, 0x08, 0x10, 0x80

# struct virtio_net_hdr (linux/virtio_net.h), in the machine's own byte order on a TUN device:
# flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
VNET = struct.Struct("=BBHHHH")
VNET_LEN = VNET.size
VNET_PLAIN = bytes(VNET_LEN)
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_UDP_L4, GSO_ECN = 0, 1, 5, 0x80

# Bytes before a packet in a datagram: IPv4 and UDP.
OVERHEAD = IP_HEADER + UDP_HEADER

# Before a super-packet from the fast path: what shows where it comes from, a virtio header.
SECRET_BYTES = 8
WHOLE_BYTES = SECRET_BYTES + VNET_LEN

# Of an echo request between two tunnels; "fl". The fast path knows it by that.
GREETING_ID = 0x666C

# Where the checksum is in a TCP and in a UDP header.
TCP_CSUM, UDP_CSUM = 16, 6


def words(data: Buffer) -> int:
    """Return the sum of the 16-bit words of ``data``; an odd last byte is padded with zero."""
    return int.from_bytes(data, "little") % 65535


def swapped(number: int) -> int:
    """Return a 16-bit number as it counts in a little-endian sum of big-endian words."""
    return (number & 0xFF) << 8 | number >> 8


def pseudo(addresses: Buffer, protocol: int, length: int) -> int:
    """Return the sum of the pseudo header (RFC 793): 8 bytes of addresses, protocol, length."""
    return (words(addresses) + (protocol << 8) + swapped(length)) % 65535


def checksum(total: int) -> bytes:
    """Return the checksum field, as on the wire, for data that sums up to ``total``.

    All zero data cannot come here: an IP header never is.
    """
    total %= 65535
    return (65535 - total if total else 0).to_bytes(2, "little")


def udp_checksum(total: int) -> bytes:
    """Return the checksum field of UDP, in which 0 is written as 0xFFFF (RFC 768)."""
    return (65535 - total % 65535).to_bytes(2, "little")


def set_ip_checksum(packet: bytearray | memoryview, header: int) -> None:
    """Write the checksum of the IP header, ``header`` bytes long, that ``packet`` begins with."""
    packet[10:12] = b"\0\0"
    packet[10:12] = checksum(words(packet[:header]))


def decrement_ttl(packet: bytearray | memoryview) -> None:
    """Take one off the TTL (at least 1) and correct the checksum by what changed (RFC 1624)."""
    packet[8] -= 1
    total = (packet[10] << 8 | packet[11]) + 0x0100
    if total >= 0xFFFF:
        total = total + 1 & 0xFFFF
    packet[10] = total >> 8
    packet[11] = total & 0xFF


def complete_checksum(packet: bytearray | memoryview, start: int, offset: int) -> bool:
    """Finish a checksum the kernel left to the device (NEEDS_CSUM).

    ``start`` is where the summed part begins, ``offset`` the field's place in it; the field holds
    the sum of the pseudo header. Returns False if they do not lie inside the packet.
    """
    at = start + offset
    if start < IP_HEADER or at + 2 > len(packet):
        return False
    total = words(packet[start:])
    # RFC 768's rule about 0 is harmless for TCP: the two ways to write zero are equal there.
    packet[at : at + 2] = udp_checksum(total) if offset == UDP_CSUM else checksum(total)
    return True
