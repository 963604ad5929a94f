"""The bpf system call: maps, programs, and links that go when their descriptor does (bpf(2)).

Numbers and layouts are those of linux/bpf.h. Every failure is an OSError with the kernel's reason.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import NoReturn

# asm/unistd.h; only where the byte order is the one that programs are assembled for.
_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "loongarch64": 280}

_MAP_CREATE, _MAP_LOOKUP, _MAP_DELETE, _PROG_LOAD = 0, 1, 3, 5
_OBJECT_INFO, _MAP_UPDATE_BATCH, _LINK_CREATE = 15, 26, 28
_SCHED_CLS = 3
_NO_PREALLOC = 1
# Room for what the kernel has to say about a program that it refuses.
_LOG_BYTES = 1 << 16
_INSTRUCTION_BYTES = 8
# Some helpers are only for programs that may be used under the GPL.
_LICENCE = b"Dual MIT/GPL"

# How often a program is loaded before it is given up: signals disturb that.
_PATIENCE = 5

# struct bpf_link_info: type, id, program, and of one with TCX the device's index.
_LINK_INFO = struct.Struct("=III4xI")

# Type, key, value, entries, flags, inner map, NUMA node, name.
_MAP_LAYOUT = "=IIIIIII16s"
# Map, key, value, flags.
_ENTRY_LAYOUT = "=I4xQQQ"

_PERCPU_ARRAY, _LPM_TRIE = 6, 11
TCX_INGRESS, TCX_EGRESS = 46, 47
"""Where `attach` hooks a program in. Since Linux 6.6."""


def _bpf(command: int, layout: str, *values: int | bytes) -> int:
    """Make the system call; returns its result."""
    number = _NUMBERS.get(platform.machine())
    # Not a Python of 32 bits on a kernel of 64, where the same number is another call.
    if number is None or sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    attributes = bytearray(struct.pack(layout, *values))
    where = ctypes.c_void_p(_address(attributes))
    result: int = _libc().syscall(number, command, where, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _address(buffer: bytearray) -> int:
    """Return where the bytes lie, as long as the buffer is there and keeps its length."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class _Owned:
    """A descriptor, closed once."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close it. Safe to repeat."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class PrefixMap(_Owned):
    """Values by IPv4 prefix; a program that looks an address up gets the longest's.

    A key is `key`'s 8 bytes: the prefix length, and the address in network byte order.
    """

    def __init__(self, name: str, value_bytes: int, entries: int) -> None:
        """Make an empty one, for at most so many prefixes."""
        self._value_bytes = value_bytes
        wanted = (_LPM_TRIE, 8, value_bytes, entries, _NO_PREALLOC, 0, 0, name.encode())
        super().__init__(_bpf(_MAP_CREATE, _MAP_LAYOUT, *wanted))

    def put(self, values: Mapping[bytes, bytes]) -> None:
        """Set these, all with one system call."""
        if not values:
            return
        keys, data = bytearray().join(values), bytearray().join(values.values())
        where = (0, 0, _address(keys), _address(data))
        _bpf(_MAP_UPDATE_BATCH, "=QQQQIIQQ", *where, len(values), self.fd, 0, 0)

    def get(self, key: bytes) -> bytes | None:
        """Return the value of the longest prefix that covers ``key``'s."""
        wanted, value = bytearray(key), bytearray(self._value_bytes)
        try:
            _bpf(_MAP_LOOKUP, _ENTRY_LAYOUT, self.fd, _address(wanted), _address(value), 0)
        except FileNotFoundError:
            return None
        return bytes(value)

    def drop(self, key: bytes) -> None:
        """Remove exactly this prefix; an unknown one is no error."""
        wanted = bytearray(key)
        with suppress(FileNotFoundError):
            _bpf(_MAP_DELETE, _ENTRY_LAYOUT, self.fd, _address(wanted), 0, 0)

    @staticmethod
    def key(address: bytes, length: int) -> bytes:
        """Return the key of a prefix."""
        return struct.pack("=I4s", length, address)


class CounterMap(_Owned):
    """Counters of 64 bits, a set for each processor: the one value, with index 0, of an array."""

    def __init__(self, name: str, counters: int) -> None:
        """Make them; all are 0."""
        # The kernel fills in a set for every processor there could be.
        with open("/sys/devices/system/cpu/possible", encoding="ascii") as possible:
            last = possible.read().strip().rpartition(",")[2].rpartition("-")[2]
        self._sets = int(last) + 1
        self._counters = counters
        wanted = (_PERCPU_ARRAY, 4, 8 * counters, 1, 0, 0, 0, name.encode())
        super().__init__(_bpf(_MAP_CREATE, _MAP_LAYOUT, *wanted))

    def read(self) -> list[int]:
        """Return each counter's sum over the processors."""
        numbers = self._counters * self._sets
        index, values = bytearray(4), bytearray(8 * numbers)
        _bpf(_MAP_LOOKUP, _ENTRY_LAYOUT, self.fd, _address(index), _address(values), 0)
        found = struct.unpack(f"={numbers}Q", values)
        return [sum(found[at :: self._counters]) for at in range(self._counters)]


class Program(_Owned):
    """A program for packets (BPF_PROG_TYPE_SCHED_CLS) that the kernel has checked and taken."""

    def __init__(self, name: str, code: bytes) -> None:
        """Load it. The OSError of a refused one has the verifier's last words as `strerror`."""
        for _ in range(_PATIENCE):
            try:
                super().__init__(self._load(name, code, None))
            except BlockingIOError:
                continue  # a signal came while it was checked
            except OSError as error:
                self._explain(error, name, code)
            return
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _explain(self, error: OSError, name: str, code: bytes) -> NoReturn:
        """Raise the error, with what the verifier says."""
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.E2BIG):
            raise error
        said = bytearray(_LOG_BYTES)
        with suppress(OSError):
            # Only to hear what is wrong with it.
            os.close(self._load(name, code, said))
        lines = said.rstrip(b"\0").decode(errors="replace").strip().splitlines()
        raise OSError(error.errno, " / ".join([error.strerror or "", *lines[-2:]])) from None

    @staticmethod
    def _load(name: str, code: bytes, said: bytearray | None) -> int:
        program, licence = bytearray(code), bytearray(_LICENCE + b"\0")
        head = (_SCHED_CLS, len(code) // _INSTRUCTION_BYTES, _address(program), _address(licence))
        log = (1, len(said), _address(said)) if said else (0, 0, 0)
        return _bpf(_PROG_LOAD, "=IIQQIIQII16s", *head, *log, 0, 0, name.encode())

    def attach(self, index: int, where: int) -> "Link":
        """Hook it into the device with this index, behind what others have hooked in."""
        try:
            return Link(_bpf(_LINK_CREATE, "=IIIIIIQ", self.fd, index, where, 0, 0, 0, 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            why = "this kernel has no TCX, which came with Linux 6.6: nothing is wrong"
            raise OSError(errno.EOPNOTSUPP, why) from None


class Link(_Owned):
    """A program on a device. It is taken off when the descriptor is closed, however that comes."""

    def index(self) -> int:
        """Return the index of the device it is on; 0 if that is gone, and another has its index."""
        info = bytearray(_LINK_INFO.size)
        _bpf(_OBJECT_INFO, "=IIQ", self.fd, len(info), _address(info))
        index: int = _LINK_INFO.unpack(info)[-1]
        return index


def hook_in(name: str, code: bytes, index: int, where: int) -> Link:
    """Load a program and attach it; the link keeps it."""
    program = Program(name, code)
    try:
        return program.attach(index, where)
    finally:
        program.close()
