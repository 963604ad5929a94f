"""Whether this host has IPsec policies, and when that changes (linux/xfrm.h)."""

import errno
import socket
import struct

from flanneld.kernel.wire import HEADER, NLM_F_REQUEST, NLMSG_ERROR

_NETLINK_XFRM = 6
_GET_SPD_INFO, _NEW_SPD_INFO, _GET_DEFAULT = 0x25, 0x24, 0x28
_GROUP_POLICY = 8
_SPD_INFO = 1
# How many policies there are for what comes in, goes out and is forwarded.
_COUNTS = struct.Struct("=III")
_ATTRIBUTE = struct.Struct("=HH")
# What becomes of packets that no policy is about: in, forwarded, out. Since Linux 5.15.
_DEFAULTS = struct.Struct("=BBB")
_BLOCK = 1


class Policies:
    """This network namespace's IPsec policies. Readable when one was added, changed or removed."""

    def __init__(self) -> None:
        """Begin to listen. Raises OSError: EPROTONOSUPPORT on a kernel without IPsec."""
        self._events = _open()
        try:
            self._events.setblocking(False)
            self._events.bind((0, _GROUP_POLICY))
        except BaseException:
            self._events.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor that becomes readable."""
        return self._events.fileno()

    def exist(self) -> bool:
        """Tell whether there are any. Raises OSError."""
        with _open() as kernel:
            kernel.settimeout(1.0)
            return _count(kernel) > 0 or _is_blocking(kernel)

    def close(self) -> None:
        """Listen no more."""
        self._events.close()

    def forget(self) -> None:
        """Forget what has happened until now. Raises OSError."""
        while True:
            try:
                self._events.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_XFRM)


def _ask(kernel: socket.socket, request: int) -> tuple[int, bytes]:
    """Return the type of the answer, and what follows its header and four bytes."""
    kernel.send(HEADER.pack(HEADER.size + 4, request, NLM_F_REQUEST, 1, 0) + bytes(4))
    answer = kernel.recv(4096)
    _, kind, *_ = HEADER.unpack_from(answer)
    return kind, answer[HEADER.size :]


def _is_blocking(kernel: socket.socket) -> bool:
    kind, answer = _ask(kernel, _GET_DEFAULT)
    # An older kernel refuses to answer.
    return kind != NLMSG_ERROR and _BLOCK in _DEFAULTS.unpack_from(answer)


def _count(kernel: socket.socket) -> int:
    kind, answer = _ask(kernel, _GET_SPD_INFO)
    if kind != _NEW_SPD_INFO:
        (code,) = struct.unpack_from("=i", answer)
        raise OSError(-code, "the IPsec policies cannot be read")
    at = 4
    while at + _ATTRIBUTE.size <= len(answer):
        length, name = _ATTRIBUTE.unpack_from(answer, at)
        if name == _SPD_INFO:
            return sum(_COUNTS.unpack_from(answer, at + _ATTRIBUTE.size))
        at += max(4, (length + 3) & ~3)
    return 0
