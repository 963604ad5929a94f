"""What a way to write the rules promises, and the host's iptables that two of them use."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flanneld.errors import FlannelError

# Seconds a command may take; it waits for the xtables lock within them.
COMMAND_TIMEOUT = 10.0
LOCK_TIMEOUT = 5

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


def run(argv: Sequence[str], text: str = "") -> str:
    """Run a command on this input. Return its output; raises MasqueradeError if it fails."""
    command = f"{Path(argv[0]).name} {' '.join(argv[1:])}".rstrip()
    try:
        done = subprocess.run(
            argv,
            input=text.encode(),
            capture_output=True,
            check=False,
            timeout=COMMAND_TIMEOUT,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise MasqueradeError(f"{command} did not end within {COMMAND_TIMEOUT:g} s") from None
    except OSError as error:
        raise MasqueradeError(f"{argv[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split()) or "no message"
        raise MasqueradeError(f"{command} ended with status {done.returncode}: {said}")
    return done.stdout.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Iptables:
    """An iptables of the host: its three commands, version and variant."""

    path: str
    save: str
    restore: str
    version: tuple[int, ...]
    variant: str

    @property
    def waits(self) -> bool:
        """Whether its restore takes ``--wait``."""
        return self.version >= (1, 6, 2)

    @property
    def knows_random_fully(self) -> bool:
        return self.version >= (1, 6, 2)

    def __str__(self) -> str:
        number = ".".join(map(str, self.version))
        return f"{self.path}, v{number} ({self.variant})"


def find_iptables(name: str = "iptables") -> Iptables:
    """The host's iptables, or the one of another ``name``. Raises MasqueradeError."""
    path = find(name)
    if path is None:
        raise MasqueradeError(f"{name} was not found in PATH, /usr/sbin and /sbin: install it")
    said = run([path, "--version"])
    number = re.search(r"v(\d+(?:\.\d+)*)", said)
    if number is None:
        raise MasqueradeError(f"{path} --version says {said.strip()!r}, which has no version")
    save, restore = (str(Path(path).with_name(f"{name}-{part}")) for part in ("save", "restore"))
    for command in (save, restore):
        if not os.access(command, os.X_OK):
            raise MasqueradeError(f"{command} is missing beside {path}: install it")
    # Before 1.8 there was one variant, and no word for it.
    return Iptables(
        path,
        save,
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
