"""Whether this host has IPsec policies (linux/xfrm.h)."""

import errno
import socket
import struct

from flanneld.kernel.wire import HEADER, NLM_F_REQUEST

_NETLINK_XFRM = 6
_GET_SPD_INFO, _NEW_SPD_INFO = 0x25, 0x24
_SPD_INFO = 1
# How many policies there are for what comes in, goes out and is forwarded.
_COUNTS = struct.Struct("=III")
_ATTRIBUTE = struct.Struct("=HH")


def policies() -> int:
    """Return how many IPsec policies there are in this network namespace. Raises OSError."""
    try:
        kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_XFRM)
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:
            return 0  # a kernel without IPsec
        raise
    with kernel:
        kernel.settimeout(1.0)
        kernel.send(HEADER.pack(HEADER.size + 4, _GET_SPD_INFO, NLM_F_REQUEST, 1, 0) + bytes(4))
        answer = kernel.recv(4096)
    _, kind, *_ = HEADER.unpack_from(answer)
    if kind != _NEW_SPD_INFO:
        (code,) = struct.unpack_from("=i", answer, HEADER.size)
        raise OSError(-code, "the IPsec policies cannot be read")
    at = HEADER.size + 4
    while at + _ATTRIBUTE.size <= len(answer):
        length, name = _ATTRIBUTE.unpack_from(answer, at)
        if name == _SPD_INFO:
            return sum(_COUNTS.unpack_from(answer, at + _ATTRIBUTE.size))
        at += max(4, (length + 3) & ~3)
    return 0
