"""What a way to write the rules promises, and the host's iptables that two of them use."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flanneld.errors import FlannelError

# Seconds a command may take; it waits for the xtables lock within them.
COMMAND_TIMEOUT = 10.0
LOCK_TIMEOUT = 5

# Seconds between two looks whether the thread is to stop, while a command runs.
_POLL = 0.05

# Of the environment what these commands need: the daemon's has the store's password.
_NEEDED = ("PATH", "LD_", "XTABLES_", "IPTABLES_")

# Where Debian and Red Hat keep iptables and nft, whatever PATH the daemon was started with.
_MORE_PATH = "/usr/sbin:/sbin"

LEGACY = "legacy"
NF_TABLES = "nf_tables"

# The tables that the legacy iptables has in this network namespace. To read another one makes it.
_LEGACY_TABLES = Path("/proc/net/ip_tables_names")


class MasqueradeError(FlannelError):
    """The rules cannot be read or written. Tried again at the next check."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether this host supports a driver, and why, or why not."""

    usable: bool
    reason: str


class Driver(Protocol):
    """One way to have the rules in the kernel. Used by one thread."""

    name: str

    def supported(self) -> Verdict:
        """Whether this host supports it; changes nothing."""
        ...

    def check(self) -> bool:
        """Whether the rules are as wanted, each once and in order. Cheap. May raise
        MasqueradeError."""
        ...

    def apply(self) -> None:
        """Make them so, a whole chain in one atomic step; what is right is not touched.

        Rules of anybody else stay as they are, also those that come meanwhile. Raises
        MasqueradeError; then nothing has changed, or only one of the two tables.
        """
        ...

    def remove(self) -> list[str]:
        """Remove all that is flannel's. Returns what was there, a line for each."""
        ...


def find(name: str) -> str | None:
    """The path of a command of the administrator's, or None."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_MORE_PATH}")


class Commands:
    """Runs commands for one thread, none of them for longer than that thread is to run.

    ``beat`` is called before each, with the seconds until the next call at most.
    """

    def __init__(
        self,
        stop: threading.Event | None = None,
        beat: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._stop = stop or threading.Event()
        self._beat = beat

    @property
    def stopping(self) -> bool:
        """Whether the thread is to stop."""
        return self._stop.is_set()

    def run(self, argv: Sequence[str], text: str = "") -> str:
        """Run a command on this input. Return its output; raises MasqueradeError if it fails.

        One that hangs is killed, with whatever it started, after `COMMAND_TIMEOUT` or soon after
        the thread is to stop.
        """
        command = f"{Path(argv[0]).name} {' '.join(argv[1:])}".rstrip()
        self._beat(COMMAND_TIMEOUT)
        if self._stop.is_set():
            raise MasqueradeError(f"{command} is not run any more: flanneld stops")
        try:
            # A session of its own, so that all of it can be killed.
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise MasqueradeError(f"{argv[0]} cannot be run: {error.strerror}") from error
        with process:
            try:
                output, errors = self._communicate(process, command, text)
            except BaseException as error:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, OSError):
                    reason = f"{argv[0]} cannot be run: {error.strerror}"
                    raise MasqueradeError(reason) from error
                raise
        if process.returncode != 0:
            said = " ".join(errors.decode(errors="replace").split()) or "no message"
            raise MasqueradeError(f"{command} ended with status {process.returncode}: {said}")
        return output.decode(errors="replace")

    def _communicate(
        self, process: subprocess.Popen[bytes], command: str, text: str
    ) -> tuple[bytes, bytes]:
        deadline = time.monotonic() + COMMAND_TIMEOUT
        data: bytes | None = text.encode()
        while True:
            stopping = self._stop.is_set()
            try:
                return process.communicate(data, timeout=_POLL)
            except subprocess.TimeoutExpired:
                data = None  # it keeps what it has not written yet
            if stopping:
                raise MasqueradeError(f"{command} was ended: flanneld stops")
            if time.monotonic() >= deadline:
                raise MasqueradeError(f"{command} did not end within {COMMAND_TIMEOUT:g} s")


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(_NEEDED)}
    return {**kept, "LC_ALL": "C"}


@dataclass(frozen=True, slots=True)
class Iptables:
    """An iptables of the host: its two commands, version and variant."""

    path: str
    restore: str
    version: tuple[int, ...]
    variant: str

    @property
    def waits(self) -> bool:
        """Whether its commands take ``--wait`` with seconds."""
        return self.version >= (1, 6, 2)

    @property
    def knows_random_fully(self) -> bool:
        return self.version >= (1, 6, 2)

    def __str__(self) -> str:
        number = ".".join(map(str, self.version))
        return f"{self.path}, v{number} ({self.variant})"


def find_iptables(commands: Commands, name: str = "iptables") -> Iptables:
    """The host's iptables, or the one of another ``name``. Raises MasqueradeError."""
    path = find(name)
    if path is None:
        raise MasqueradeError(f"{name} was not found in PATH, /usr/sbin and /sbin: install it")
    said = commands.run([path, "--version"])
    number = re.search(r"v(\d+(?:\.\d+)*)", said)
    if number is None:
        raise MasqueradeError(f"{path} --version says {said.strip()!r}, which has no version")
    restore = str(Path(path).with_name(f"{name}-restore"))
    if not os.access(restore, os.X_OK):
        raise MasqueradeError(f"{restore} is missing beside {path}: install it")
    # Before 1.8 there was one variant, and no word for it.
    return Iptables(
        path,
        restore,
        tuple(int(part) for part in number[1].split(".")),
        NF_TABLES if f"({NF_TABLES})" in said else LEGACY,
    )


def legacy_tables() -> frozenset[str]:
    """The tables of the legacy iptables that are there already."""
    try:
        return frozenset(_LEGACY_TABLES.read_text().split())
    except OSError:
        return frozenset()  # the kernel's part of it is not loaded
