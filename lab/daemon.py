"""A real flanneld process on a host."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from lab.notify import Notification, NotifySocket
from lab.process import LabError, end, tail
from lab.wait import NotInTime, eventually

if TYPE_CHECKING:
    from lab.cluster import EtcdCluster
    from lab.etcd import Etcd
    from lab.namespaces import Host

T = TypeVar("T")

_TOP = Path(__file__).resolve().parent.parent
FLANNELD = (sys.executable, "-m", "flanneld")


class Flanneld:
    """flanneld with the real command line, the host's own subnet file and a notify socket.

    ``extra`` are further flags, ``environ`` further variables. ``program`` may be another
    implementation of flanneld. The same object can be started again after its process ended;
    ``log`` and ``notifications`` are those of the latest start. The process ends with the lab at
    the latest.
    """

    def __init__(
        self,
        host: "Host",
        *extra: str,
        etcd: "Etcd | EtcdCluster | None" = None,
        program: Sequence[str] = FLANNELD,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.host = host
        self.extra = extra
        self.program = tuple(program)
        self.environ = dict(environ or {})
        self._etcd = etcd or host.lab.etcd
        self._log = host.lab.scratch_file(f"{host.label}-flanneld")
        self._log.touch()
        self._log_from = 0
        self._notify: NotifySocket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        host.lab.daemons.append(self)

    @property
    def argv(self) -> list[str]:
        """The whole command line."""
        store = self._etcd.client_flags() if self._etcd else []
        fixed = ["--iface=eth0", f"--subnet-file={self.host.subnet_file}"]
        return [*self.program, *store, *fixed, *self.extra]

    def start(self) -> Self:
        """Start the process. Raises LabError if it still runs."""
        if self.is_running:
            raise LabError(f"flanneld on {self.host.label} runs already")
        if self._notify is not None:
            self._notify.close()
        # A path of its own: there may be two daemons on a host.
        self._notify = NotifySocket(self.host.lab.scratch_file(f"{self.host.label}-notify"))
        self.host.lab.when_closing(self._notify.close)
        self._log_from = self._log.stat().st_size
        # FLANNELD_* of whoever runs the lab would be options of this daemon.
        own = self.host.environment()
        env = {k: v for k, v in own.items() if not k.startswith("FLANNELD_")}
        env |= {"NOTIFY_SOCKET": str(self._notify.path), "PYTHONPATH": str(_TOP), **self.environ}
        self.started = time.monotonic()
        self._process = self.host.popen(self.argv, output=self._log, env=env)
        return self

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Raises LabError when the process does not run."""
        return self._running().pid

    @property
    def exit_code(self) -> int | None:
        """The exit status, -N after signal N, None while running."""
        return self._started().poll()

    @property
    def notifications(self) -> list[Notification]:
        """What the daemon told its service manager since it was started."""
        return self._notify.messages if self._notify else []

    def ready_after(self) -> float | None:
        """Seconds from the start to READY=1, None if it has not been said."""
        for notification in self.notifications:
            if "READY=1" in notification.text.split("\n"):
                return notification.at - self.started
        return None

    def wait_ready(self, timeout: float = 10.0) -> None:
        """Wait for READY=1. Raises NotInTime, at once if the process ends first."""
        self._while_running(lambda: self.ready_after() is not None, timeout, "to be ready")

    def wait_log(self, pattern: str, timeout: float = 10.0) -> re.Match[str]:
        """Wait for a match of this regular expression in the log. Raises NotInTime."""
        expression = re.compile(pattern, re.MULTILINE)
        found = self._while_running(
            lambda: expression.search(self.log()), timeout, f"to log /{pattern}/"
        )
        assert found is not None
        return found

    def _while_running(self, check: Callable[[], T], timeout: float, what: str) -> T:
        def look() -> T:
            # Asked before the check: what the process did last is seen by the check.
            over = not self.is_running
            value = check()
            if over and not value:
                raise NotInTime(
                    f"flanneld on {self.host.label} was expected {what},"
                    f" but it ended with status {self.exit_code}\n{self.explain()}"
                )
            return value

        return eventually(
            look, timeout, f"flanneld on {self.host.label} {what}", detail=self.explain
        )

    def wait_exit(self, timeout: float = 10.0) -> int:
        """Wait for the process to end by itself: its status. Raises NotInTime."""
        process = self._started()
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            message = f"flanneld on {self.host.label} did not end within {timeout:g} s"
            raise NotInTime(f"{message}\n{self.explain()}") from None

    def terminate(self, timeout: float = 5.0) -> int:
        """SIGTERM: the exit status. Raises NotInTime if it takes longer than ``timeout``."""
        process = self._started()
        if process.poll() is None:
            process.terminate()
        return self.wait_exit(timeout)

    def kill9(self) -> None:
        """kill -9."""
        self._running().kill()
        self._started().wait()

    def stop(self) -> None:
        """End it in whatever way works. Safe to repeat."""
        if self._process is not None:
            end([self._process])

    def rss_kb(self) -> int:
        """Resident memory in KiB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise LabError(f"flanneld on {self.host.label} has ended: no memory to measure")

    def subnet(self) -> IPv4Network:
        """The subnet in the host's subnet file. Raises FileNotFoundError before it is written."""
        return self.host.subnet_env().subnet.network

    def log(self) -> str:
        """What it wrote since it was started last; empty once the lab is gone."""
        return self._written_since(self._log_from)

    def whole_log(self) -> str:
        """What it wrote over all its starts; empty once the lab is gone."""
        return self._written_since(0)

    def _written_since(self, position: int) -> str:
        if not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(position)
            return file.read().decode(errors="replace")

    def explain(self) -> str:
        """State and last log lines, for a message."""
        if self._process is None:
            return f"--- flanneld on {self.host.label}: never started"
        state = "running" if self.is_running else f"ended with status {self.exit_code}"
        name = f"flanneld on {self.host.label} ({state})"
        return f"--- {name}, last lines of its log:\n{tail(self.log()) or '(empty)'}"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise LabError(f"flanneld on {self.host.label} was never started")
        return self._process

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._started()
        if process.poll() is not None:
            raise LabError(f"flanneld on {self.host.label} has ended: {process.returncode}")
        return process
