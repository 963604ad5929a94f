"""Who uses a subnet file: each daemon holds a lock beside its own for as long as it lives."""

import fcntl
import os
from pathlib import Path


class InUse(Exception):
    """Another daemon holds the lock. ``pid`` is its process id, as far as it is known."""

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
    fd = os.open(lock_file(subnet_file), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
