"""Names that say which run they belong to, and the sweep of what dead runs left behind."""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

from lab.process import end_strangers, run

NETNS_DIRECTORY = Path("/run/netns")
CGROUPS = Path("/sys/fs/cgroup")
MEMORY = Path("/dev/shm")  # noqa: S108 - only subdirectories made with mkdtemp

# What new_prefix() makes; the first group is the process id of the run.
_PREFIX = r"fl(\d+)-[0-9a-f]{4}"
_NAMESPACE = re.compile(_PREFIX + r"-(net|h\d+|c\d+)")
_DIRECTORY = re.compile(_PREFIX + r"-.*")


def new_prefix() -> str:
    """``fl``, our process id, and four random digits: two labs of one process differ too."""
    return f"fl{os.getpid()}-{secrets.token_hex(2)}"


def temporary_directory(prefix: str, *, memory: int = 0) -> Path:
    """A new directory named after the run; the caller removes it.

    ``memory``: bytes for which a file system in memory is preferred, when it has twice as much.
    """
    parent = None
    if memory and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * memory:
        parent = MEMORY
    return Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=parent))


def remove_directory(path: Path) -> None:
    """Remove a temporary directory. Safe to repeat."""
    shutil.rmtree(path, ignore_errors=True)


def remove_directories(prefix: str) -> None:
    """Remove every temporary directory of one run. Safe to repeat."""
    for parent in _parents():
        for path in parent.glob(f"{prefix}-*"):
            remove_directory(path)


def pids(namespace: str) -> list[int]:
    """The processes in a named namespace. Threads elsewhere than their process do not count."""
    listed = run(["ip", "netns", "pids", namespace], check=False)
    return [int(pid) for pid in listed.stdout.split()]


def delete_namespace(namespace: str) -> None:
    """End what still runs in the namespace and delete it. Safe to repeat."""
    if not (NETNS_DIRECTORY / namespace).exists():
        return
    end_strangers(pids(namespace))
    run(["ip", "netns", "del", namespace], check=False)


def remove_cgroups(name: str) -> None:
    """Remove a control group and those in it, from every hierarchy. Safe to repeat.

    Of one in which a process runs the kernel keeps what it needs.
    """
    for parent in _hierarchies():
        for directory, _, _ in os.walk(parent / name, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def _hierarchies() -> list[Path]:
    # Version 2 has one hierarchy, version 1 one for each controller.
    if not CGROUPS.is_dir():
        return []
    return [CGROUPS, *(path for path in CGROUPS.iterdir() if path.is_dir())]


def sweep_stale() -> list[str]:
    """Remove what runs left behind that were killed before they could clean up.

    Only what can be proved to be such a run's: the name has the exact form of ours, and the
    process it names no longer exists. Returns what was removed.
    """
    removed = []
    for path in _of_dead_runs(NETNS_DIRECTORY, _NAMESPACE):
        delete_namespace(path.name)
        removed.append(path.name)
    for parent in _parents():
        for path in _of_dead_runs(parent, _DIRECTORY):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(str(path))
    for parent in _hierarchies():
        for path in _of_dead_runs(parent, _NAMESPACE):
            remove_cgroups(path.name)
            removed.append(str(path))
    return removed


def _parents() -> set[Path]:
    return {parent for parent in (Path(tempfile.gettempdir()), MEMORY) if parent.is_dir()}


def _of_dead_runs(parent: Path, form: re.Pattern[str]) -> list[Path]:
    if not parent.is_dir():
        return []
    return [
        path
        for path in sorted(parent.iterdir())
        if (match := form.fullmatch(path.name)) and not Path("/proc", match[1]).exists()
    ]
