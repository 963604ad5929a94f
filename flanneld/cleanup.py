"""``flanneld --cleanup``: take away from this host all that flanneld has set up, and say what.

The host's lease in etcd is not touched: it ends by itself within a day, or is deleted there.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from flanneld.errors import DeviceError, FlannelError
from flanneld.flags import Options
from flanneld.kernel.link import read_host_facts
from flanneld.kernel.netlink import EntrySocket
from flanneld.kernel.reconcile import MANY
from flanneld.kernel.state import PROTOCOL
from flanneld.masquerade.choose import remove_all
from flanneld.masquerade.rules import absent
from flanneld.subnet import env

# Seconds until it is looked whether a running daemon has put everything back.
LOOK_AGAIN = 1.0

_DEVICE = re.compile(r"flannel\.\d+")


def clean_up(options: Options, out: Callable[[str], object] = print) -> int:
    """Remove rules, routes, devices and the subnet file; return the exit status.

    What cannot be removed does not keep the rest. Status 1 if something is left.
    """
    former = env.read_previous(options.subnet_file).network
    steps: tuple[Callable[[], Iterator[str]], ...] = (
        lambda: iter(remove_all(absent([former] if former else []))),
        _remove_routes,
        _remove_devices,
        lambda: _remove_file(Path(options.subnet_file)),
    )
    failed = removed = False
    for step in steps:
        try:
            for what in step():
                removed = True
                out(f"removed {what}")
        except (FlannelError, OSError) as error:
            failed = True
            sys.stderr.write(f"flanneld --cleanup: {error}\n")
    if not removed and not failed:
        out("nothing of flanneld's was found on this host")
    if removed and not failed:
        time.sleep(LOOK_AGAIN)
        failed = _is_back()
    return 1 if failed else 0


def _remove_routes() -> Iterator[str]:
    with closing(EntrySocket()) as kernel:
        found = kernel.routes(PROTOCOL)
        _, kept = kernel.apply([], found)
    gone = [str(item.entry) for item in found if item not in kept]
    yield from gone if len(gone) <= MANY else [f"{len(gone)} routes (proto {PROTOCOL})"]
    for item, why in kept.items():
        raise DeviceError(f"{item.entry} cannot be removed: {why}")


def _remove_devices() -> Iterator[str]:
    for name in _our_devices():
        # Only now, and only if there is one: pyroute2 takes its time.
        from flanneld.kernel.vxlan import remove_device

        remove_device(name)
        yield f"device {name}"


def _our_devices() -> list[str]:
    """The vxlan devices with names of ours. A udp tunnel's device ends with its daemon."""
    return [
        link.name
        for link in read_host_facts().links
        if link.kind == "vxlan" and _DEVICE.fullmatch(link.name)
    ]


def _remove_file(path: Path) -> Iterator[str]:
    with suppress(FileNotFoundError):
        os.unlink(path)
        yield f"file {path}"


def _is_back() -> bool:
    """Whether something has come back, which only a running daemon does; says so."""
    with closing(EntrySocket()) as kernel:
        back = bool(kernel.routes(PROTOCOL))
    if not back and not _our_devices():
        return False
    sys.stderr.write(
        "flanneld --cleanup: a flanneld is running on this host and puts everything back: stop it"
        " first (systemctl stop flanneld), then clean up again\n"
    )
    return True
