"""A real dockerd on a host of the lab, and containers that `docker run` starts.

    with Lab(hosts=2) as lab:
        ...
        docker = Dockerd(lab.hosts[0]).start("--bip=10.5.17.1/24", "--mtu=1450")
        container = docker.run()
        assert container.ping("10.5.34.2").lost == 0

dockerd, its containerd and the shims live in a process and a mount namespace of their own: when
its first process ends, in whatever way, the kernel ends all the others and takes the mounts along.
No registry is needed: the image holds nothing but busybox.
"""

import io
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lab.names import remove_cgroups
from lab.ping import PingResult
from lab.process import LabError, end, environment, run, send, tail
from lab.wait import eventually

if TYPE_CHECKING:
    from lab.namespaces import Host

# Command -> Debian package.
PACKAGES = {"docker": "docker.io", "dockerd": "docker.io", "busybox": "busybox-static"}

IMAGE = "busybox-of-the-lab"
# Where every container serves `/cgi-bin/peer`: the address it was asked from.
HTTP_PORT = 8080

_APPLETS = ("sh", "cat", "ping", "wget", "httpd", "timeout")
_PEER_SCRIPT = "#!/bin/sh\nprintf 'Content-Type: text/plain\\n\\n%s' \"$REMOTE_ADDR\"\n"
# busybox counts from 0.
_REPLY = re.compile(r"^\d+ bytes from .* seq=(\d+) ", re.MULTILINE)
_SENT = re.compile(r"^(\d+) packets transmitted, ", re.MULTILINE)
_PATIENCE = 30.0

# A /run of its own: dockerd would use the machine's containerd if it found its socket there.
# docker-init reaps what containerd leaves behind, and hands signals on.
_START = 'mount -t tmpfs none /run && exec docker-init -- "$@"'


class Dockerd:
    """dockerd on a host, with all its files in the host's directory.

    The same object can be started again with other options; images stay, containers are gone.
    """

    def __init__(self, host: "Host") -> None:
        self.host = host
        # The image and the containers do not belong among the files that stand for /run/flannel.
        self.directory = host.lab.scratch_file(f"{host.label}-docker")
        self.directory.mkdir()
        self._socket = self.directory / "docker.sock"
        self._output = self.directory / "dockerd.log"
        # Below the lab's prefix, so that it can be told whose it is.
        self._cgroup = f"{host.lab.prefix}-{host.label}"
        self._process: subprocess.Popen[bytes] | None = None
        host.lab.when_closing(self.kill)

    def start(self, *options: str) -> Self:
        """Start dockerd with these options beside those that keep it to itself; wait for it.

        Raises LabError if it runs, NotInTime if it does not come up.
        """
        if self._process is not None:
            raise LabError(f"dockerd on {self.host.label} runs already")
        # fmt: off
        argv = [
            "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
            "sh", "-c", _START, "sh",
            "dockerd",
            f"--host=unix://{self._socket}",
            f"--data-root={self.directory / 'data'}",
            f"--exec-root={self.directory / 'exec'}",
            f"--pidfile={self.directory / 'pid'}",
            f"--config-file={self._config()}",
            # Copies of a few MB: works on every file system, and mounts nothing.
            "--storage-driver=vfs",
            "--exec-opt=native.cgroupdriver=cgroupfs", f"--cgroup-parent=/{self._cgroup}",
            *options,
        ]
        # fmt: on
        self._process = process = self.host.popen(argv, output=self._output)

        def answers() -> bool:
            if process.poll() is not None:
                raise LabError(f"dockerd ended with status {process.returncode}\n{self.explain()}")
            return self.client("version", check=False).returncode == 0

        eventually(answers, _PATIENCE, "dockerd to answer", detail=self.explain, interval=0.1)
        if not self.client("images", "--quiet", IMAGE).stdout:
            self._import_image()
        return self

    def stop(self) -> None:
        """Stop dockerd as systemd does: SIGTERM, and time to end its containers. Safe to repeat."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End dockerd, containerd and the containers at one stroke. Safe to repeat."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            # The only child of `unshare` is docker-init, the first in the process namespace: it
            # goes last, also after a SIGKILL, which the kernel then sends to the others first.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for child in children.split():
                send(int(child), number)
            process.wait(_PATIENCE)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            pass
        finally:
            end([process], grace=0.0)
            remove_cgroups(self._cgroup)

    def run(self, *options: str) -> "DockerContainer":
        """``docker run --detach`` with these options; the container serves HTTP_PORT."""
        # Nothing in there has anything to save: no grace.
        arguments = ["run", "--detach", "--rm", "--stop-signal=KILL", *options, IMAGE]
        server = ["httpd", "-f", "-p", f"0.0.0.0:{HTTP_PORT}", "-h", "/www"]
        return DockerContainer(self, self.client(*arguments, *server).stdout.strip())

    def client(
        self, *arguments: str, check: bool = True, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run ``docker ARGUMENTS``. Raises LabError as ``process.run`` does."""
        argv = ["docker", f"--host=unix://{self._socket}", *arguments]
        return run(argv, check=check, timeout=timeout)

    def explain(self) -> str:
        """Return the last log lines, for a message."""
        text = self._output.read_text(errors="replace") if self._output.exists() else ""
        return f"--- dockerd on {self.host.label}, last lines of its log:\n{tail(text)}"

    def _config(self) -> Path:
        """Return an empty configuration: the machine's own daemon.json is not for this one."""
        path = self.directory / "daemon.json"
        path.write_text("{}")
        return path

    def _import_image(self) -> None:
        archive = self.directory / "root.tar"
        _write_root(archive)
        self.client("import", str(archive), IMAGE)
        archive.unlink()


class DockerContainer:
    """A running container."""

    def __init__(self, docker: Dockerd, number: str) -> None:
        self.docker = docker
        self.id = number
        form = "{{.NetworkSettings.IPAddress}}"
        found = docker.client("inspect", f"--format={form}", number).stdout.strip()
        self.address = IPv4Address(found)

    def exec(
        self, argv: Sequence[str], *, check: bool = True, timeout: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """``docker exec``: run a command in the container to its end."""
        return self.docker.client("exec", self.id, *argv, check=check, timeout=timeout)

    def ping(self, address: IPv4Address | str, count: int = 3, deadline: int = 2) -> PingResult:
        """Send ``count`` echo requests, and wait ``deadline`` seconds for the last answer."""
        argv = ["ping", "-c", str(count), "-i", "0.1", "-W", str(deadline), str(address)]
        done = self.exec(argv, check=False)
        output = done.stdout + done.stderr
        if _SENT.search(output) is None:
            raise LabError(f"ping gave no summary: {output.strip() or '(no output)'}")
        answered = {int(number) for number in _REPLY.findall(output)}
        missing = tuple(number + 1 for number in range(count) if number not in answered)
        return PingResult(count, count - len(missing), missing, output)

    def fetch(self, url: str, timeout: int = 3) -> str:
        """Return what is served at a URL: a TCP connection from the container. Raises LabError."""
        # Debian's static busybox crashes with wget -T.
        return self.exec(["timeout", str(timeout), "wget", "-q", "-O", "-", url]).stdout

    def seen_by(self, other: "DockerContainer") -> str:
        """Return the address that another container sees when this one connects to it by TCP."""
        return self.fetch(f"http://{other.address}:{HTTP_PORT}/cgi-bin/peer")

    def mtu(self) -> int:
        """Return the MTU of the container's eth0."""
        return int(self.exec(["cat", "/sys/class/net/eth0/mtu"]).stdout)


def _write_root(archive: Path) -> None:
    """Write a root file system with busybox, its applets as links, and the web server's script."""
    busybox = shutil.which("busybox", path=environment()["PATH"])
    if busybox is None:
        raise LabError("busybox: not found")
    # The name of the loader a dynamic program asks for is near its beginning.
    with open(busybox, "rb") as file:
        if b"/ld-" in file.read(4096):
            raise LabError(f"{busybox} is not static: apt-get install busybox-static")
    with tarfile.open(archive, "w") as tar:
        tar.add(Path(busybox).resolve(), "bin/busybox")
        for applet in _APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        script = tarfile.TarInfo("www/cgi-bin/peer")
        script.mode, script.size = 0o755, len(_PEER_SCRIPT)
        tar.addfile(script, io.BytesIO(_PEER_SCRIPT.encode()))
