"""The subnet file, ``subnet.env``: what this host leased, for docker and for the next start."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from flanneld.errors import SubnetFileError
from flanneld.subnet.config import parse_cidr
from flanneld.subnet.gojson import shown

_LARGEST = 65536  # bytes; what flanneld writes has about 100


@dataclass(frozen=True, slots=True)
class Previous:
    """What an earlier start left in the subnet file.

    ``warning`` is one line to log if the file was there but could not be used.
    """

    subnet: IPv4Network | None = None
    network: IPv4Network | None = None
    warning: str | None = None


def render(network: IPv4Network, subnet: IPv4Network, mtu: int, ip_masq: bool) -> str:
    """The file's text, byte for byte v0.8.0's. The host has the subnet's second address."""
    return (
        f"FLANNEL_NETWORK={network}\n"
        f"FLANNEL_SUBNET={subnet.network_address + 1}/{subnet.prefixlen}\n"
        f"FLANNEL_MTU={mtu}\n"
        f"FLANNEL_IPMASQ={'true' if ip_masq else 'false'}\n"
    )


def unusable(path: str | Path) -> str | None:
    """Why there can be no subnet file at ``path``; ``None`` if there can, as far as one sees.

    What stands there and is no file is not ours to replace or remove: ``/dev/null``, say.
    """
    if not Path(path).name:
        return "it names no file"
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):
        return None  # reading and writing will say what is the matter
    if stat.S_ISDIR(mode):
        return os.strerror(errno.EISDIR)
    return None if stat.S_ISREG(mode) or stat.S_ISLNK(mode) else "not a regular file"


def check_place(path: str | Path) -> None:
    """Refuse, before anything is touched, what `write` would. Raises SubnetFileError."""
    reason = unusable(path)
    if reason is not None:
        raise SubnetFileError(
            f"Failed to write subnet file {path}: {reason}; name another with --subnet-file"
        )


def write(path: str | Path, text: str) -> None:
    """Put ``text`` into the file at ``path``, at once and durably.

    A reader, or a crash at any moment, sees the whole old or the whole new text. Missing
    directories are made (0755); the file has mode 0666 less the umask. Raises
    :class:`SubnetFileError`; then the old file is still there, unless only making the new
    one durable failed.
    """
    check_place(path)
    try:
        target = Path(path)
        _make_directories(target.parent)
        replace(target, text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SubnetFileError(
            f"Failed to write subnet file {path}: {reason}; make its directory writable, "
            "or name another file with --subnet-file"
        ) from error


def replace(target: Path, text: str) -> None:
    """Put a file with this text in the place of ``target``, at once and durably.

    Its directory must exist. Raises OSError or ValueError.
    """
    # A name of our own each time: two processes may write beside each other.
    temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
    try:
        _write_durably(temporary, text.encode())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(target.parent)


def _make_directories(directory: Path) -> None:
    """Like ``mkdir -p``, but each new directory gets mode 0755 less the umask."""
    missing = []
    while not directory.is_dir() and directory != directory.parent:
        missing.append(directory)
        directory = directory.parent
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another daemon made it; a file is seen later
            os.mkdir(new, 0o755)


def _write_durably(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def read_previous(path: str | Path) -> Previous:
    """What the file at ``path`` says about the last start; nothing if it is missing.

    Never raises: the previous subnet is a wish, not a need.
    """
    try:
        values = dict(_assignments(read_text(path)))
    except FileNotFoundError:
        return Previous()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Previous(
            warning=f"Couldn't fetch previous subnet from subnet file at {path}: {reason}"
        )
    warnings: list[str] = []

    def network(key: str, what: str) -> IPv4Network | None:
        if key not in values:
            return None
        try:
            found = parse_cidr(values[key])
        except ValueError as error:
            warnings.append(f"Couldn't parse previous {what} from subnet file at {path}: {error}")
            return None
        return found if found.prefixlen else None  # 0.0.0.0/0 stands for none

    subnet = network("FLANNEL_SUBNET", "subnet")
    whole = network("FLANNEL_NETWORK", "network")
    return Previous(subnet, whole, "; ".join(warnings) or None)


def read_text(path: str | Path) -> str:
    """The text of a subnet file. Raises OSError, or ValueError for what cannot be one."""
    # O_NONBLOCK: a FIFO in this place must not hang the start.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        chunks = []
        size = 0
        while size <= _LARGEST and (chunk := os.read(descriptor, _LARGEST + 1 - size)):
            chunks.append(chunk)
            size += len(chunk)
    finally:
        os.close(descriptor)
    if size > _LARGEST:
        raise ValueError(f"larger than {_LARGEST} bytes")
    return b"".join(chunks).decode("utf-8-sig", "replace")


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    """Names and values of a dotenv file. Raises ``ValueError`` for a line that is neither
    blank, a comment nor an assignment.
    """
    for number, full_line in enumerate(text.split("\n"), 1):
        line = _without_comment(full_line).strip()
        if not line:
            continue
        name, separator, value = line.partition("=")
        if not separator:
            name, separator, value = line.partition(":")
        if not separator:
            raise ValueError(f"Can't separate key from value in line {number}: {shown(line)}")
        words = name.split()
        if words[:1] == ["export"]:
            del words[0]
        yield " ".join(words), _unquoted(value.strip())


def _without_comment(line: str) -> str:
    quote = ""
    for position, char in enumerate(line):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char == "#":
            return line[:position]
    return line


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value
