"""A whole Debian machine under qemu, for what needs a booted systemd.

No KVM is needed, and no network: its one interface gets an address from qemu and leads nowhere.
What it is made of is built once and kept under ``build/vm``: a minute the first time. Then it boots
in some ten seconds; programs in it take three to seven times as long as outside.
"""

import contextlib
import hashlib
import json
import platform
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab import needs
from lab.process import LabError, end, environment, run, tail
from lab.wait import eventually

# Command -> Debian package.
PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "depmod": "kmod",
}

# What is installed in the machine.
INSIDE = (
    "systemd,systemd-sysv,dbus,udev,kmod,procps,python3,iproute2,iptables,nftables,iputils-ping,"
    "etcd-server,docker.io,busybox-static"
)

_TOP = Path(__file__).resolve().parent.parent
CACHE = _TOP / "build" / "vm"
# Copied over the machine's root file system.
_ROOT_FILES = Path(__file__).resolve().parent / "vm_root"
_ENABLED = ("systemd-networkd", "systemd-networkd-wait-online", "lab-agent")

# Seconds. On a busy machine all of it takes several times as long as on an idle one.
BUILD, BOOT = 900.0, 300.0


class NoAnswer(LabError):
    """The machine did not answer in time."""


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel and a disk to start it with."""

    kernel: Path
    disk: Path


@dataclass(frozen=True, slots=True)
class Done:
    """What a command in the machine said, both streams together, and its status."""

    output: str
    status: int


def build() -> Image:
    """Return the image, built if it is not there yet. Raises LabError without what it needs."""
    problem = needs.missing(PACKAGES)
    if problem:
        raise LabError(problem)
    if platform.machine() != "x86_64":
        raise LabError(f"the machine is an x86_64 one, and this is {platform.machine()}")
    files = sorted(path for path in _ROOT_FILES.rglob("*") if path.is_file())
    recipe = "\n".join([INSIDE, *(path.read_text() for path in [Path(__file__), *files])])
    home = CACHE / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    image = Image(home / "vmlinuz", home / "disk.img")
    if not image.disk.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as scratch:
            _build(Path(scratch))
            shutil.rmtree(home, ignore_errors=True)
            (Path(scratch) / "image").rename(home)
    return image


def _build(scratch: Path) -> None:
    root, image = scratch / "root", scratch / "image"
    image.mkdir()
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    mirror = [str(sources)] if sources.exists() else []
    what = ["--variant=minbase", "--mode=root", f"--include={INSIDE}"]
    run(["mmdebstrap", *what, release, str(root), *mirror], timeout=BUILD)
    version = _add_kernel(scratch, root)
    # Also where nothing in here may be a device: the kernel brings its own.
    shutil.copytree(_ROOT_FILES, root, dirs_exist_ok=True)
    run(["systemctl", f"--root={root}", "enable", *_ENABLED])
    run(["depmod", "-b", str(root), version])
    shutil.copy(root / "boot" / f"vmlinuz-{version}", image / "vmlinuz")
    _make_disk(image / "disk.img", root, 1800)


def _add_kernel(scratch: Path, root: Path) -> str:
    """Unpack the newest cloud kernel, which has what it boots from built in; return its version."""
    depends = run(["apt-cache", "depends", "linux-image-cloud-amd64"]).stdout.split()
    package = next(name for name in depends[1:] if name.startswith("linux-image-"))
    run(
        ["sh", "-c", f"cd {shlex.quote(str(scratch))} && apt-get download {package}"], timeout=BUILD
    )
    kernel = scratch / "kernel"
    run(["dpkg-deb", "-x", str(next(scratch.glob(f"{package}_*.deb"))), str(kernel)], timeout=BUILD)
    # Not unpacked over the root: /lib is a link there.
    shutil.copytree(kernel / "lib" / "modules", root / "usr" / "lib" / "modules")
    shutil.copytree(kernel / "boot", root / "boot", dirs_exist_ok=True)
    return package.removeprefix("linux-image-")


def _make_disk(path: Path, tree: Path, megabytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(megabytes << 20)
    options = ["-q", "-F", "-O", "^has_journal", "-m", "0"]
    run(["mkfs.ext4", *options, "-d", str(tree), str(path)], timeout=BUILD)


class Machine:
    """A running machine; leaving the context ends it. The image stays as it was built."""

    def __init__(self, image: Image, tree: Path, *, memory: int = 1536) -> None:
        """``tree`` is copied over the machine's root once it has booted; memory is in MiB."""
        self._image = image
        self._tree = tree
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = b""
        self._requests = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flannel-vm-")))
            self._console = scratch / "console"
            _make_disk(scratch / "tree.img", self._tree, 512)
            output = stack.enter_context((scratch / "qemu.log").open("wb"))
            self._process = subprocess.Popen(
                self._command(scratch),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                start_new_session=True,
            )
            stack.callback(end, [self._process])
            self._socket = stack.enter_context(socket.socket(socket.AF_UNIX))
            eventually(lambda: self._connect(scratch / "cmd"), BOOT, "qemu", detail=self.explain)
            self.run("true", timeout=BOOT)
            self.run("mount /dev/nvme1n1 /mnt && cp -a /mnt/. / && umount /mnt", timeout=BOOT)
            self.run("systemctl daemon-reload")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _command(self, scratch: Path) -> Sequence[str]:
        def disk(name: str, path: Path) -> list[str]:
            drive = f"file={path},format=raw,if=none,id={name},cache=unsafe"
            return ["-drive", drive, "-device", f"nvme,drive={name},serial={name}"]

        return [
            "qemu-system-x86_64",
            *("-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-smp", "2"),
            *("-m", str(self._memory), "-nographic", "-nodefaults", "-snapshot"),
            *("-serial", f"file:{self._console}"),
            *disk("d0", self._image.disk),
            *disk("d1", scratch / "tree.img"),
            *("-nic", "user,restrict=on,model=virtio-net-pci"),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=c0,path={scratch / 'cmd'},server=on,wait=off"),
            *("-device", "virtserialport,chardev=c0,name=cmd"),
            *("-kernel", str(self._image.kernel)),
            "-append",
            "console=ttyS0 root=/dev/nvme0n1 rw panic=-1 mitigations=off apparmor=0",
        ]

    def _connect(self, path: Path) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise LabError(f"qemu ended with status {self._process.returncode}\n{self.explain()}")
        try:
            self._socket.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def run(self, command: str, *, timeout: float = 120.0, check: bool = True) -> Done:
        """Run a shell command in the machine, as root.

        Raises NoAnswer if there is none in time, and with ``check`` LabError if its status is
        not 0.
        """
        self._requests += 1
        request = {"id": self._requests, "command": command, "timeout": timeout}
        deadline = time.monotonic() + timeout
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            # An older answer is one that somebody gave up waiting for.
            while (answer := self._answer(deadline))["id"] != self._requests:
                pass
        except TimeoutError as error:
            message = f"`{command}`: no answer within {timeout:g} s\n{self.explain()}"
            raise NoAnswer(message) from error
        done = Done(answer["output"], answer["status"])
        if check and done.status != 0:
            raise LabError(f"`{command}` ended with status {done.status}:\n{done.output}")
        return done

    def _answer(self, deadline: float) -> Any:
        while b"\n" not in self._answers:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(65536)
            if not data:
                raise LabError(f"the machine is gone\n{self.explain()}")
            self._answers += data
        line, _, self._answers = self._answers.partition(b"\n")
        return json.loads(line)

    def reboot(self) -> None:
        """Reboot the machine, and wait until it takes commands again. The disk keeps its state."""
        boot = "cat /proc/sys/kernel/random/boot_id"
        before = self.run(boot).output

        def is_back() -> bool:
            # What is asked while it goes down is lost.
            with contextlib.suppress(NoAnswer):
                return self.run(boot, timeout=5.0).output != before
            return False

        self.run("systemctl --no-block reboot")
        eventually(is_back, BOOT, "the reboot", detail=self.explain, interval=0.5)

    def ask(self, command: str) -> str:
        """Return what a command says, without the last newline, whatever its status."""
        return self.run(command, check=False).output.strip()

    def wait(self, check: Callable[[], object], what: str, timeout: float = 120.0) -> None:
        """Wait until ``check()`` is true. Raises NotInTime with the journal's last lines."""
        eventually(check, timeout, what, detail=self.journal, interval=0.5)

    def journal(self) -> str:
        """Return the journal's last lines."""
        return self.ask("journalctl --no-pager --lines=60 --output=short-monotonic")

    def explain(self) -> str:
        """Return the last lines of the console, for a message."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return f"--- the machine's console:\n{tail(text, 30)}"
