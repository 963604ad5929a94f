"""The faults, and which row of docs/operations.md promises what happens.

Packets may be lost only where a fault says so: on the paths of a host, while it lasts and for so
many seconds after. All else is lost wrongly.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from . import kernel, strikes
from .pinger import pair_of
from .strikes import Strike
from .world import World

ALL = ("vxlan", "host-gw", "udp")
KERNEL = ("vxlan", "host-gw")
DEVICE = ("vxlan", "udp")

MARGIN = 1.0
"""Seconds added to those promised: five hosts and three etcds share one small machine."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault. ``row`` is the first cell of its row in docs/operations.md."""

    name: str
    row: str
    strike: Callable[[World], Strike]
    hold: tuple[float, float] = (0.0, 0.0)
    """Seconds until it is undone, from and to."""
    after: float = 0.0
    """Seconds after it is undone in which packets may still be lost, by that row."""
    losing: Sequence[str] = ()
    """The backends with which packets may be lost."""
    backends: Sequence[str] = ALL


def pairs_of(world: World, strike: Strike) -> list[list[str]]:
    """Return the paths on which a fault may lose packets."""
    if strike.host is None:
        return []
    label = strike.host.label
    others = [strike.peer] if strike.peer else [d.host for d in world.daemons]
    return sorted([*pair_of(label, o.label)] for o in others if o.label != label)


_AWHILE = (3.0, 6.0)
_AT_ONCE = (0.0, 3.0)

_RENEWAL = "our lease is deleted or expires"
_ROUTE = "a route of ours is deleted, or replaced by another"
_ENTRY = "a neighbour or FDB entry is deleted or changed"
_DEVICE = "`flannel.1` is deleted, set down, or changed"
_STORE = "etcd comes back empty, or restored from a backup"
_GONE = "etcd is gone while running"
_MEMBER = "one etcd endpoint of several dies"
_DEAF = "one hangs, or is cut off from the others"

FAULTS = (
    Fault(
        "daemon killed",
        "kill -9, or another sudden end of the daemon",
        strikes.kill_daemon,
        _AT_ONCE,
        1.0,
        ["udp"],
    ),
    Fault("daemon stopped", "SIGTERM, SIGINT", strikes.terminate_daemon, _AT_ONCE, 1.0, ["udp"]),
    Fault(
        "daemon frozen",
        "a loop of the daemon is stuck, or the daemon is frozen",
        strikes.freeze_daemon,
        _AWHILE,
    ),
    Fault(
        "wall clock jumps", "the wall clock jumps, or the host was suspended", strikes.jump_clock
    ),
    Fault(
        "udp tunnel killed",
        "the udp tunnel's process dies, or does not answer",
        strikes.kill_tunnel,
        after=1.0,
        losing=["udp"],
        backends=["udp"],
    ),
    Fault("etcd leader killed", _MEMBER, strikes.kill_leader, _AWHILE),
    Fault("etcd member killed", _MEMBER, strikes.kill_member, _AWHILE),
    Fault("etcd leader frozen", _DEAF, strikes.freeze_leader, _AWHILE),
    Fault("etcd member frozen", _DEAF, strikes.freeze_member, _AWHILE),
    Fault("etcd member cut off", _DEAF, strikes.cut_off_member, _AWHILE),
    Fault(
        "etcd quorum lost", "most members of an etcd cluster are down", strikes.kill_quorum, _AWHILE
    ),
    Fault("etcd rolling restart", _MEMBER, strikes.restart_one_by_one),
    Fault("etcd all killed", _GONE, strikes.kill_all, _AWHILE),
    Fault("etcd emptied", _STORE, strikes.empty),
    Fault("etcd restored", _STORE, strikes.restore),
    Fault("host cut off from etcd", _GONE, strikes.cut_off_host, _AWHILE),
    Fault("own lease deleted", _RENEWAL, strikes.delete_lease),
    Fault("lease overwritten", "our key is overwritten with nonsense", strikes.spoil_lease),
    Fault("foreign keys", "nonsense below `subnets/` in etcd", strikes.write_garbage, _AT_ONCE),
    Fault(
        "burst of garbage",
        "nonsense below `subnets/` in etcd",
        strikes.burst_of_garbage,
        _AT_ONCE,
    ),
    Fault("reservation", "Reserve a subnet for a host", strikes.reserve, _AT_ONCE),
    Fault("short lease ends", "Free a subnet at once", strikes.short_lease, (4.0, 4.0)),
    Fault("subnet handed over", "our subnet is held by another host", strikes.hand_over_subnet),
    Fault("host replaced", "Remove flannel from a host", strikes.replace_host),
    Fault("route spoilt", _ROUTE, kernel.spoil_route, (0.0, 0.0), 1.0, KERNEL, KERNEL),
    Fault("tun route spoilt", _ROUTE, kernel.spoil_tun_route, (0.0, 0.0), 1.0, ["udp"], ["udp"]),
    Fault(
        "neighbour spoilt", _ENTRY, kernel.spoil_neighbour, (0.0, 0.0), 1.0, ["vxlan"], ["vxlan"]
    ),
    Fault("FDB entry spoilt", _ENTRY, kernel.spoil_fdb, (0.0, 0.0), 1.0, ["vxlan"], ["vxlan"]),
    Fault("all flushed", _ROUTE, kernel.flush_all, (0.0, 0.0), 1.0, KERNEL, KERNEL),
    Fault("device deleted", _DEVICE, kernel.delete_device, (0.0, 0.0), 2.0, DEVICE, DEVICE),
    Fault("device down", _DEVICE, kernel.down_device, (0.0, 0.0), 2.0, DEVICE, DEVICE),
    Fault("device changed", _DEVICE, kernel.change_device, (0.0, 0.0), 2.0, DEVICE, DEVICE),
    Fault(
        "eth0 down",
        "the interface goes down and up (host-gw)",
        kernel.down_interface,
        _AWHILE,
        2.0,
        ALL,
    ),
    Fault("host unplugged", _GONE, kernel.unplug_host, _AWHILE, 2.0, ALL),
    Fault(
        "masquerade flushed",
        "somebody flushes the masquerade or forward rules (firewalld, docker, a person)",
        kernel.flush_masquerade,
    ),
    Fault(
        "kernel refuses",
        "the kernel refuses entries: no right (`EPERM`), no memory or room"
        " (`ENOMEM`, `ENOBUFS`, `ENOSPC`)",
        kernel.refuse,
        _AWHILE,
        backends=KERNEL,
    ),
)


def faults_of(backend: str) -> list[Fault]:
    """Return the faults that a network with this backend can have."""
    return [fault for fault in FAULTS if backend in fault.backends]


def named(names: Iterable[str]) -> list[Fault]:
    """Return the faults of these names. Raises KeyError for one that does not exist."""
    known = {fault.name: fault for fault in FAULTS}
    return [known[name] for name in names]
