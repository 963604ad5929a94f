"""A whole Debian machine under qemu, for what needs a booted systemd.

No KVM is needed, and no network: its one interface gets an address from qemu and leads nowhere, or
is wired to that of another machine. `lab.vm_image` builds what it boots from. Then it boots in some
ten seconds; programs in it take three to seven times as long as outside.
"""

import contextlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.process import LabError, end, environment, tail
from lab.vm_image import Image, make_disk
from lab.wait import eventually

# Seconds until something is taken for hung. A boot takes 10 s on an idle machine, and minutes on a
# busy one.
PATIENCE = 900.0

# The interface of a machine that is on no wire.
ALONE = ("-nic", "user,restrict=on,model=virtio-net-pci")


class NoAnswer(LabError):
    """The machine did not answer in time."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a command in the machine said, both streams together, and its status."""

    output: str
    status: int


@dataclass(frozen=True, slots=True)
class Port:
    """A machine's name and its one interface, at one end of a wire between two machines.

    The ends of the wire are two unix sockets that qemu makes; either machine may start first.
    Nobody needs to have the address of the router: it makes this the default route's interface.
    """

    hostname: str
    address: IPv4Interface
    router: IPv4Address
    here: Path
    there: Path

    def nic(self) -> Sequence[str]:
        """Return qemu's options for the interface."""
        mac = "02:00:" + ":".join(f"{byte:02x}" for byte in self.address.packed)
        local = f"local.type=unix,local.path={self.here}"
        remote = f"remote.type=unix,remote.path={self.there}"
        wire = ["-netdev", f"dgram,id=n0,{local},{remote}"]
        return [*wire, "-device", f"virtio-net-pci,netdev=n0,mac={mac}"]

    def boot_options(self) -> str:
        """Return what systemd-network-generator and systemd read from the kernel's command line."""
        where = f"{self.address.ip}::{self.router}:{self.address.netmask}"
        return f" systemd.hostname={self.hostname} ip={where}::enp0s1:none"


class Machine:
    """A running machine; leaving the context ends it. The image stays as it was built."""

    def __init__(
        self, image: Image, tree: Path, *, port: Port | None = None, memory: int = 1536
    ) -> None:
        """``tree`` is copied over the machine's root once it has booted; memory is in MiB."""
        self._image = image
        self._tree = tree
        self._port = port
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = b""
        self._requests = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flannel-vm-")))
            self._console = scratch / "console"
            make_disk(scratch / "tree.img", self._tree, 512)
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
            eventually(
                lambda: self._connect(scratch / "cmd"), PATIENCE, "qemu", detail=self.explain
            )
            self.run("true")
            self.run("mount /dev/nvme1n1 /mnt && cp -a /mnt/. / && umount /mnt")
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
            # The oldest that numpy runs on: what newer ones have is slow to emulate.
            *("-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "Nehalem"),
            *("-smp", "2", "-m", str(self._memory), "-nographic", "-nodefaults", "-snapshot"),
            *("-serial", f"file:{self._console}"),
            # First, and so at the same place of the bus: enp0s1.
            *(self._port.nic() if self._port else ALONE),
            *disk("d0", self._image.disk),
            *disk("d1", scratch / "tree.img"),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=c0,path={scratch / 'cmd'},server=on,wait=off"),
            *("-device", "virtserialport,chardev=c0,name=cmd"),
            *("-kernel", str(self._image.kernel)),
            "-append",
            "console=ttyS0 root=/dev/nvme0n1 rw panic=-1 mitigations=off apparmor=0"
            # For units that do not say it themselves, as etcd's and containerd's.
            f" systemd.default_timeout_start_sec={PATIENCE:.0f}"
            + (self._port.boot_options() if self._port else ""),
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

    def run(self, command: str, *, timeout: float = PATIENCE, check: bool = True) -> Done:
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
                return self.run(boot, timeout=30.0).output != before
            return False

        self.run("systemctl --no-block reboot")
        eventually(is_back, PATIENCE, "the reboot", detail=self.explain, interval=0.5)

    def ask(self, command: str) -> str:
        """Return what a command says, without the last newline, whatever its status."""
        return self.run(command, check=False).output.strip()

    def wait(self, check: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
        """Wait until ``check()`` is true. Raises NotInTime with the journal's last lines."""
        # A check is a process or two in there, which take from what is waited for.
        eventually(check, timeout, what, detail=self.journal, interval=2.0)

    def journal(self) -> str:
        """Return the journal's last lines."""
        return self.ask("journalctl --no-pager --lines=60 --output=short-monotonic")

    def explain(self) -> str:
        """Return the last lines of the console, for a message."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return f"--- the machine's console:\n{tail(text, 30)}"
