"""Who is at work here: each daemon shows itself, claims its device, and locks its subnet file."""

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

# Abstract socket names belong to the network namespace, as the routes, devices and rules do. So a
# daemon in a container with the host's network is seen, too, and none of another namespace.
_PRESENCE = "flanneld/"
_DEVICE = "flanneld/device/"
_SOCKETS = Path("/proc/net/unix")


class InUse(Exception):
    """Another daemon has it. ``pid`` is its process id, as far as it is known."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid


def lock_file(subnet_file: str | Path) -> Path:
    """Return the path of the lock that belongs to a subnet file."""
    path = Path(subnet_file)
    return path.with_name(f".{path.name}.lock")


def take(subnet_file: str | Path) -> int:
    """Take the lock and return the descriptor that holds it, to be kept open.

    The kernel gives the lock back with the process, however it ends. Raises InUse, and OSError if
    there is no such directory or it is read-only.
    """
    # Not 0644: whoever may open a file for reading may lock it.
    fd = os.open(lock_file(subnet_file), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise InUse(pid or "unknown") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def show_presence() -> None:
    """Show for as long as this process lives that a daemon works on this network namespace.

    Raises OSError.
    """
    # In another PID namespace the same number may be taken.
    sock = _bound(f"{_PRESENCE}{os.getpid()}/{os.urandom(8).hex()}")
    sock.detach()  # the kernel closes it with the process


def present() -> list[str]:
    """Return the process ids of the daemons that work on this network namespace."""
    try:
        listed = _SOCKETS.read_text(errors="replace")
    except OSError:
        return []
    return re.findall(rf" @{_PRESENCE}(\d+)/[0-9a-f]+$", listed, re.MULTILINE)


def claim(device: str) -> socket.socket:
    """Claim a device of this network namespace; it is ours until the socket is closed.

    The kernel closes it with the process, however it ends; other programs that this one starts do
    not get it. Only daemons that claim their devices are seen. Raises InUse, and OSError.
    """
    try:
        # Nobody connects to it: that a name is bound only once is all that counts.
        return _bound(f"{_DEVICE}{device}")
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    others = present()
    if str(os.getpid()) in others:
        others.remove(str(os.getpid()))
    raise InUse(" or ".join(others) or "unknown")


def _bound(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(f"\0{name}")
    except BaseException:
        sock.close()
        raise
    return sock
