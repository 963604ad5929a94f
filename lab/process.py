"""Commands and processes of the lab, all ended by process id and within a bounded time."""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lab.wait import eventually


class LabError(Exception):
    """The lab itself failed: a command, a missing tool, a server that did not come up."""


def environment(**more: str) -> dict[str, str]:
    """This process's environment, plus ``more``. Output is parsed: no translated words."""
    # After a plain su, PATH may lack the directories where Debian keeps ip.
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return {**os.environ, "LC_ALL": "C", "PATH": path, **more}


def run(
    argv: Sequence[str],
    *,
    stdin: str | None = None,
    check: bool = True,
    timeout: float = 30.0,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its output as text; ``env`` is ``environment()``.

    Raises LabError when it cannot be started or takes longer than ``timeout`` seconds (it is
    killed then), and with ``check`` also when its status is not 0.
    """
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            # With no input of its own a command must not eat the terminal's.
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=environment() if env is None else env,
            # Ctrl-C reaches the lab only, which then ends everything in order.
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]}: not found") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(argv)}` did not end within {timeout:g} s") from error
    if check and done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or "(no output)"
        raise LabError(f"`{' '.join(argv)}` ended with status {done.returncode}: {said}")
    return done


def end(processes: Iterable[subprocess.Popen[bytes]], grace: float = 3.0) -> None:
    """End these processes: SIGTERM to all, up to ``grace`` seconds for all, then SIGKILL.

    A frozen process is thawed first, else it would never see the SIGTERM. Safe to repeat.
    """
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + grace
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    for process in running:
        process.wait()


def end_strangers(pids: Iterable[int], timeout: float = 3.0) -> None:
    """SIGKILL processes that are not our children, and wait until they are gone.

    ``pids`` must come from a namespace that is ours: what runs there, we or our children started.
    """
    waiting = [pid for pid in pids if pid != os.getpid()]
    for pid in waiting:
        send(pid, signal.SIGKILL)
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        time.sleep(0.01)
        waiting = [pid for pid in waiting if is_running(pid)]


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may already be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def freeze(pid: int, timeout: float = 5.0) -> None:
    """SIGSTOP, and wait until it has come: a thread on another core runs on for a moment."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: _is_frozen(pid), timeout, f"process {pid} to be frozen", interval=0.001)


def thaw(pid: int) -> None:
    """Undo ``freeze``."""
    os.kill(pid, signal.SIGCONT)


def _is_frozen(pid: int) -> bool:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return all(_state(task / "stat") == "T" for task in tasks)
    except (FileNotFoundError, ProcessLookupError):  # a thread has just ended
        return False


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return _state(Path(f"/proc/{pid}/stat")) != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _state(stat: Path) -> str:
    """The letter for the state in /proc/PID/stat."""
    # The second field is the command's name in parentheses and may hold anything.
    return stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]


def tail(text: str, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(text.splitlines()[-lines:])
