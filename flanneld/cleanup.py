"""``flanneld --cleanup``: take away from this host all that flanneld has set up, and say what.

The host's lease in etcd is not touched: it ends by itself within a day, or is deleted there.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from flanneld.errors import DeviceError, FlannelError
from flanneld.flags import Options
from flanneld.kernel.grolink import NAMES
from flanneld.kernel.link import read_host_facts
from flanneld.kernel.netlink import EntrySocket
from flanneld.kernel.state import PROTOCOL
from flanneld.lock import InUse, lock_file, present, take
from flanneld.logs import MANY
from flanneld.masquerade.choose import removals
from flanneld.masquerade.rules import absent
from flanneld.subnet import env

# Seconds until it is looked whether a running daemon has put everything back.
LOOK_AGAIN = 1.0

_STOP_FIRST = "stop it first (systemctl stop flanneld), then clean up"

# By kind: a vxlan network's, and what a killed udp daemon leaves.
_DEVICES = {
    "vxlan": re.compile(r"flannel\.\d+"),
    "veth": NAMES,
}


def clean_up(options: Options, out: Callable[[str], object] = print) -> int:
    """Remove rules, routes, devices and the subnet file; return the exit status.

    What cannot be removed does not keep the rest. Status 1 if something is left, or if a daemon
    runs: then nothing is removed.
    """
    path = Path(options.subnet_file)
    obstacle = _obstacle(path)
    lock: int | None = None
    try:
        lock = take(path) if obstacle is None else None
    except InUse as error:
        obstacle = _runs([error.pid])
    except OSError:
        pass  # no such directory, or one that is read-only: no daemon runs with this file
    if obstacle is not None:
        _complain(obstacle)
        return 1
    former = env.read_previous(path).network
    rules = absent([former] if former else [])
    removed = failed = False
    steps: list[Callable[[], Iterable[str]]] = [
        *removals(rules),
        _remove_routes,
        _remove_devices,
    ]
    for step in steps:
        try:
            for what in step():
                removed = True
                out(f"removed {what}")
        except (FlannelError, OSError) as error:
            failed = True
            _complain(str(error))
    if failed:
        # It says which network's rules are to go: another try needs that.
        _complain(f"{path} is kept, since not everything could be removed: try again")
    else:
        removed |= _remove_file(path, out)
        if lock is not None:
            lock_file(path).unlink(missing_ok=True)
    if lock is not None:
        os.close(lock)
    if removed and not failed:
        time.sleep(LOOK_AGAIN)
        failed = _is_back()
    elif not failed:
        out("nothing of flanneld's was found on this host")
    return 1 if failed else 0


def _obstacle(path: Path) -> str | None:
    """Why nothing may be removed, as far as it shows without the lock; None if it may."""
    # Whichever subnet file is its own: routes, devices and chains are the host's.
    if running := present():
        return _runs(running)
    unusable = env.unusable(path)
    return unusable and f"{path} is no subnet file: {unusable}"


def _runs(pids: Sequence[str]) -> str:
    return f"flanneld runs on this host (process {', '.join(pids)}): {_STOP_FIRST}"


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
    """The devices with names of ours. A udp tunnel's ends with its daemon."""
    return [
        link.name
        for link in read_host_facts().links
        if link.kind in _DEVICES and _DEVICES[link.kind].fullmatch(link.name)
    ]


def _remove_file(path: Path, out: Callable[[str], object]) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    out(f"removed file {path}")
    return True


def _is_back() -> bool:
    """Whether something has come back, which only a running daemon does; says so.

    An original does not show itself otherwise.
    """
    with closing(EntrySocket()) as kernel:
        back = bool(kernel.routes(PROTOCOL))
    if not back and not _our_devices():
        return False
    _complain(f"a flanneld runs on this host, and puts everything back: {_STOP_FIRST}")
    return True


def _complain(text: str) -> None:
    sys.stderr.write(f"flanneld --cleanup: {text}\n")
