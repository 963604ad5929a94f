"""The tunnel's descriptors: the TUN device, the UDP socket, the ICMP socket; and their offloads.

Opened by the parent, used by the tunnel's process. No numpy.
"""

import enum
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address

from flanneld.errors import DeviceError

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNGETIFF = 0x800454D2
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_F_CSUM, _F_TSO4, _F_USO4, _F_USO6 = 0x01, 0x02, 0x20, 0x40
_IFREQ = struct.Struct("16sH22x")

# linux/udp.h
UDP_SEGMENT, UDP_GRO = 103, 104
# linux/icmp.h: a mask of types a raw socket does not want to receive.
_SOL_RAW, _ICMP_FILTER = 255, 1

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33

# The default of 208 KB holds three super-packets: a third of the throughput. From 1 MB on more
# makes no difference.
BUFFER_BYTES = 4 << 20


class Offload(enum.IntFlag):
    """Work the kernel takes over, or takes and gives in large pieces. Each is optional."""

    CSUM = 1
    """The TUN device hands out packets with unfinished checksums."""
    TSO = 2
    """The TUN device hands out super-packets of TCP."""
    USO = 4
    """The TUN device hands out super-packets of UDP."""
    JOIN_TCP = 8
    """The TUN device is given super-packets of TCP."""
    JOIN_UDP = 16
    """The TUN device is given super-packets of UDP."""
    SEGMENT = 32
    """The socket sends many datagrams in one call (UDP_SEGMENT, Linux 4.18)."""
    GRO = 64
    """The socket receives many datagrams in one call (UDP_GRO, Linux 5.0)."""


ALL = ~Offload(0)

Say = Callable[[str], None]


class AddressInUse(DeviceError):
    """Somebody else is bound to the tunnel's address and port."""


@dataclass(frozen=True, slots=True)
class Tun:
    """An open TUN device. It is gone when the last descriptor of it is closed."""

    fd: int
    name: str
    index: int
    """In the network namespace where it was made."""
    offload: Offload


def open_tun(say: Say, pattern: str = "flannel%d", wanted: Offload = ALL) -> Tun:
    """Make a TUN device with the offloads of ``wanted`` that this kernel has.

    What it has not is told to ``say``, one line each. Raises DeviceError.
    """
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DeviceError(
            f"/dev/net/tun cannot be opened: {error.strerror}; the udp backend needs the kernel's"
            " tun module and CAP_NET_ADMIN"
        ) from error
    try:
        request = _IFREQ.pack(pattern.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
        answer = fcntl.ioctl(fd, _TUNSETIFF, request)
        name = _IFREQ.unpack(answer)[0].rstrip(b"\0").decode()
        return Tun(fd, name, socket.if_nametoindex(name), _set_offloads(fd, say, wanted))
    except OSError as error:
        os.close(fd)
        raise DeviceError(
            f"TUN device {pattern.replace('%d', '0')} cannot be made: {error.strerror}; is"
            " /dev/net/tun the kernel's, and CAP_NET_ADMIN there?"
        ) from error


def is_lost(fd: int) -> bool:
    """Tell whether the TUN device of this descriptor has been deleted."""
    try:
        fcntl.ioctl(fd, _TUNGETIFF, _IFREQ.pack(b"", 0))
    except OSError as error:
        return error.errno == errno.EBADFD
    return False


def _set_offloads(fd: int, say: Say, wanted: Offload) -> Offload:
    # The kernel insists: no TSO without CSUM, no USO for IPv4 without that for IPv6.
    steps = (
        (Offload.USO, _F_CSUM | _F_TSO4 | _F_USO4 | _F_USO6, "UDP segmentation offload"),
        (Offload.TSO, _F_CSUM | _F_TSO4, "TCP segmentation offload"),
        (Offload.CSUM, _F_CSUM, "checksum offload"),
    )
    got = wanted
    if not got & Offload.CSUM:
        got &= ~(Offload.TSO | Offload.USO)
    if not got & Offload.TSO:
        got &= ~Offload.USO
    for offload, bits, name in steps:
        if not got & offload:
            continue
        try:
            fcntl.ioctl(fd, _TUNSETOFFLOAD, bits)
        except OSError as error:
            say(f"the TUN device has no {name} ({error.strerror}); going on without")
            got &= ~offload
            if offload is Offload.USO:
                # Both ways came with Linux 6.2.
                got &= ~Offload.JOIN_UDP
            continue
        return got
    fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
    return got


def open_socket(
    say: Say, address: IPv4Address, port: int, wanted: Offload = ALL
) -> tuple[socket.socket, Offload]:
    """Return the tunnel's UDP socket and those of ``wanted`` it has. Raises DeviceError."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        udp.bind((str(address), port))
    except OSError as error:
        udp.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"UDP {address}:{port} is in use: is another flanneld running on this host? End"
                " it, or set another Port in the network config, the same for all hosts"
            ) from error
        more = (
            " (a port below 1024 takes CAP_NET_BIND_SERVICE)" if error.errno == errno.EACCES else ""
        )
        raise DeviceError(
            f"UDP {address}:{port} cannot be bound: {error.strerror}{more}"
        ) from error
    for force, plain in (
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
    ):
        try:
            udp.setsockopt(socket.SOL_SOCKET, force, BUFFER_BYTES)
        except PermissionError:
            udp.setsockopt(socket.SOL_SOCKET, plain, BUFFER_BYTES)
    got = wanted
    if got & Offload.SEGMENT:
        try:
            udp.getsockopt(socket.IPPROTO_UDP, UDP_SEGMENT)
        except OSError as error:
            say(f"the socket has no UDP_SEGMENT ({error.strerror}); sending one by one")
            got &= ~Offload.SEGMENT
    if got & Offload.GRO:
        try:
            udp.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        except OSError as error:
            say(f"the socket has no UDP_GRO ({error.strerror}); receiving one by one")
            got &= ~Offload.GRO
    return udp, got


def open_icmp(say: Say) -> socket.socket | None:
    """Return a socket that can only send ICMP, None (and why) without CAP_NET_RAW."""
    try:
        icmp = socket.socket(
            socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP
        )
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES):
            raise DeviceError(f"no raw ICMP socket: {error.strerror}") from error
        say(
            "no raw ICMP socket (CAP_NET_RAW is missing): senders are not told about"
            " unreachable destinations"
        )
        return None
    icmp.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", 0xFFFFFFFF))
    return icmp
