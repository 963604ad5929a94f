"""The kernel and the disk of a small Debian machine, for `lab.vm`.

Built once and kept under ``build/vm``: a minute the first time.
"""

import hashlib
import platform
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab import needs
from lab.process import LabError, run

# Command -> Debian package.
PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "depmod": "kmod",
}

# What is installed in the machine: a Debian that boots, etcd, what the tests ask with, an image for
# docker, and what README has a user install on a real host.
INSIDE = (
    "systemd,systemd-sysv,dbus,udev,kmod,procps,iproute2,nftables,iputils-ping,"
    "etcd-server,busybox-static,"
    "curl,make,python3-venv,python3-dev,gcc,libc6-dev,iptables,docker.io"
)

_TOP = Path(__file__).resolve().parent.parent
CACHE = _TOP / "build" / "vm"
# Copied over the machine's root file system.
_ROOT_FILES = Path(__file__).resolve().parent / "vm_root"
_ENABLED = ("systemd-networkd", "systemd-networkd-wait-online", "lab-agent")

# Seconds, on a busy machine.
_PATIENCE = 900.0


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel and a disk to start it with."""

    kernel: Path
    disk: Path


def build() -> Image:
    """Return the image, built if it is not there yet. Raises LabError without what it needs."""
    problem = needs.missing(PACKAGES)
    if problem:
        raise LabError(problem)
    if platform.machine() != "x86_64":
        raise LabError(f"the machine is an x86_64 one, and this is {platform.machine()}")
    recipe = b"\n".join(path.read_bytes() for path in [Path(__file__), *root_files(_ROOT_FILES)])
    home = CACHE / hashlib.sha256(recipe).hexdigest()[:12]
    image = Image(home / "vmlinuz", home / "disk.img")
    if not image.disk.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as scratch:
            _build(Path(scratch))
            shutil.rmtree(home, ignore_errors=True)
            (Path(scratch) / "image").rename(home)
    return image


def root_files(top: Path) -> list[Path]:
    """Return the files below ``top`` that go into the image. Bytecode comes and goes."""
    return sorted(
        path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )


def _build(scratch: Path) -> None:
    root, image = scratch / "root", scratch / "image"
    image.mkdir()
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    mirror = [str(sources)] if sources.exists() else []
    what = ["--variant=minbase", "--mode=root", f"--include={INSIDE}"]
    run(["mmdebstrap", *what, release, str(root), *mirror], timeout=_PATIENCE)
    version = _add_kernel(scratch, root)
    # Also where nothing in here may be a device: the kernel brings its own.
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_ROOT_FILES, root, ignore=ignored, dirs_exist_ok=True)
    run(["systemctl", f"--root={root}", "enable", *_ENABLED])
    run(["depmod", "-b", str(root), version])
    shutil.copy(root / "boot" / f"vmlinuz-{version}", image / "vmlinuz")
    make_disk(image / "disk.img", root, 3000)


def _add_kernel(scratch: Path, root: Path) -> str:
    """Unpack the newest cloud kernel, which has what it boots from built in; return its version."""
    depends = run(["apt-cache", "depends", "linux-image-cloud-amd64"]).stdout.split()
    package = next(name for name in depends[1:] if name.startswith("linux-image-"))
    run(
        ["sh", "-c", f"cd {shlex.quote(str(scratch))} && apt-get download {package}"],
        timeout=_PATIENCE,
    )
    kernel = scratch / "kernel"
    run(
        ["dpkg-deb", "-x", str(next(scratch.glob(f"{package}_*.deb"))), str(kernel)],
        timeout=_PATIENCE,
    )
    # Not unpacked over the root: /lib is a link there.
    shutil.copytree(kernel / "lib" / "modules", root / "usr" / "lib" / "modules")
    shutil.copytree(kernel / "boot", root / "boot", dirs_exist_ok=True)
    return package.removeprefix("linux-image-")


def make_disk(path: Path, tree: Path, megabytes: int) -> None:
    """Make a file of this size that holds an ext4 file system with what is in ``tree``."""
    with path.open("wb") as file:
        file.truncate(megabytes << 20)
    options = ["-q", "-F", "-O", "^has_journal", "-m", "0"]
    run(["mkfs.ext4", *options, "-d", str(tree), str(path)], timeout=_PATIENCE)
