"""What the faults do, and how each is undone. What they may cost is in `faults`.

Those of a host's kernel are in `kernel`.
"""

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from chaos.fleet import peers_said, value_of_peer
from garbage import nonsense
from network import PATIENCE, SUBNETS_KEY, key_of

from lab import Flanneld, Host, LabError, eventually
from lab.etcd import Etcd
from lab.process import freeze, thaw

from .world import STEADY, World, tunnels_of

GARBAGE = ("", "nonsense", "{}", "[1]", '{"PublicIP": 7}', "null", "\x00\xff")
BURST = 500
# None that a host of ours could have.
BURST_NAMES = (
    *(f"10.5.{number}.0-24" for number in range(200, 250)),
    *(f"10.{number}.1.0-24" for number in range(6, 30)),
    *("10.5.0.0-17", "10.5.128.0-17", "0.0.0.0-0", "10.5.210.7-32", "10.5.210.9-24", "foo", "a b"),
    *("10.5.211.0-24\u2028", "x" * 200),
)
STRANGERS = ("foo", "10.5.7.0", "10.5.300.0-24", "192.168.1.0-24", "10.5.0.0-8", "config")


def _nothing() -> None:
    """Leave it to the daemons."""


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that has happened: to whom, and how to end it."""

    on: str
    undo: Callable[[], None] = _nothing
    host: Host | None = None
    """The host whose packets may be lost,"""
    peer: Host | None = None
    """and if only those to this one."""


class Stranger:
    """A host that somebody made up: its address, a subnet for it, and its lease's value."""

    def __init__(self, world: World) -> None:
        number = world.rng.randrange(200, 250)
        self.address = f"10.97.0.{number}"
        self.subnet = f"10.5.{number}.0/24"
        mac = f"02:00:00:00:01:{number:02x}"
        self.value = value_of_peer(world.backend, self.address, mac)


# Daemons


def _mortal(world: World) -> Flanneld:
    return world.rng.choice([d for d in world.daemons if d.host.number > STEADY])


def any_daemon(world: World) -> Flanneld:
    return world.rng.choice(world.daemons)


def _starting(daemon: Flanneld) -> Callable[[], None]:
    def undo() -> None:
        daemon.start()
        daemon.wait_ready(30.0)

    return undo


def kill_daemon(world: World) -> Strike:
    daemon = _mortal(world)
    daemon.kill9()
    return Strike(daemon.host.label, _starting(daemon), daemon.host)


def terminate_daemon(world: World) -> Strike:
    daemon = _mortal(world)
    status = daemon.terminate()
    if status != 0:
        world.record.failures.append(f"{daemon.host.label}: status {status} after SIGTERM")
    return Strike(daemon.host.label, _starting(daemon), daemon.host)


def freeze_daemon(world: World) -> Strike:
    daemon = any_daemon(world)
    pid = daemon.pid
    freeze(pid)
    return Strike(daemon.host.label, lambda: thaw(pid))


def jump_clock(world: World) -> Strike:
    """A host's wall clock jumps by a day or two, and stays there."""
    daemon = any_daemon(world)
    now = world.levers.clock(daemon.host)
    offset = world.rng.choice([days for days in (-1, 0, 1) if days != now])
    world.levers.set_clock(daemon.host, offset)
    days = {_day(offset)}
    peers_said(daemon)
    said = re.findall(r"^I(\d{4}) .*State: leased", daemon.log(), re.MULTILINE)[-1]
    if said not in days | {_day(offset)}:
        raise LabError(f"the clock of {daemon.host.label} has not jumped: {said}")
    return Strike(f"{daemon.host.label} {offset:+d} d")


def _day(offset: int) -> str:
    """Return the date in this many days as the log has it."""
    return (datetime.now() + timedelta(days=offset)).strftime("%m%d")


def kill_tunnel(world: World) -> Strike:
    daemon = any_daemon(world)
    (pid,) = eventually(lambda: tunnels_of(daemon), PATIENCE, "a tunnel")
    os.kill(pid, signal.SIGKILL)
    return Strike(daemon.host.label, host=daemon.host)


# etcd


def _member(world: World) -> Etcd:
    return world.rng.choice(world.cluster.members)


def _names(*members: Etcd) -> str:
    return " ".join(member.member.name for member in members)


def _kill(world: World, *members: Etcd) -> Strike:
    for member in members:
        member.kill()
    return Strike(_names(*members), world.cluster.start)


def kill_leader(world: World) -> Strike:
    return _kill(world, world.cluster.leader())


def kill_member(world: World) -> Strike:
    return _kill(world, _member(world))


def kill_quorum(world: World) -> Strike:
    return _kill(world, *world.rng.sample(world.cluster.members, 2))


def kill_all(world: World) -> Strike:
    return _kill(world, *world.cluster.members)


def _freeze(world: World, member: Etcd) -> Strike:
    member.freeze()

    def undo() -> None:
        member.thaw()
        world.cluster.wait_healthy()

    return Strike(_names(member), undo)


def freeze_leader(world: World) -> Strike:
    return _freeze(world, world.cluster.leader())


def freeze_member(world: World) -> Strike:
    return _freeze(world, _member(world))


def cut_off_member(world: World) -> Strike:
    member = _member(world)
    world.cluster.cut_off(member)
    world.cut_off.add(member.member.name)

    def undo() -> None:
        world.cluster.reunite(member)
        world.cut_off.clear()
        world.cluster.wait_healthy()

    return Strike(_names(member), undo)


def empty(world: World) -> Strike:
    world.cluster.wipe()
    world.configure()
    return Strike("etcd")


def restore(world: World) -> Strike:
    world.cluster.restore(world.backup)
    return Strike("etcd")


def restart_one_by_one(world: World) -> Strike:
    """In order, as for an upgrade: each is back before the next one goes."""
    members = world.rng.sample(world.cluster.members, len(world.cluster.members))
    for member in members:
        member.restart()
    world.cluster.wait_healthy()
    return Strike(_names(*members))


def cut_off_host(world: World) -> Strike:
    """A host does not reach etcd, and is there for its peers as before."""
    host = any_daemon(world).host
    members = [member.address for member in world.cluster.members]
    host.ip(*(f"route add blackhole {address}/32" for address in members))
    return Strike(
        host.label, lambda: host.ip(*(f"route del blackhole {address}/32" for address in members))
    )


# Keys


def delete_lease(world: World) -> Strike:
    daemon = any_daemon(world)
    with world.client() as client:
        client.delete(key_of(daemon.subnet()))
    return Strike(daemon.host.label)


def spoil_lease(world: World) -> Strike:
    daemon = any_daemon(world)
    with world.client() as client:
        client.put(key_of(daemon.subnet()), world.rng.choice(GARBAGE), ttl=600)
    return Strike(daemon.host.label)


def write_garbage(world: World) -> Strike:
    keys = [f"/coreos.com/network/subnets/{name}" for name in STRANGERS]
    with world.client() as client:
        for key in keys:
            client.put(key, world.rng.choice(GARBAGE), ttl=600)

    def undo() -> None:
        with world.client() as client:
            for key in keys:
                client.delete(key)

    return Strike(f"{len(keys)} keys", undo)


def burst_of_garbage(world: World) -> Strike:
    """Somebody writes and deletes nonsense as fast as it goes, some of it almost a lease."""
    rng = world.rng
    with world.client() as client:
        for _ in range(BURST):
            key = f"{SUBNETS_KEY}/{rng.choice(BURST_NAMES)}"
            if rng.random() < 0.2:
                client.delete(key)
            else:
                client.put(key, nonsense(rng), ttl=rng.choice([None, 1, 100]))

    def undo() -> None:
        with world.client() as client:
            for name in BURST_NAMES:
                client.delete(f"{SUBNETS_KEY}/{name}")

    return Strike(f"{BURST} writes", undo)


def reserve(world: World) -> Strike:
    """A key without a TTL for a host that does not come."""
    number = world.rng.randrange(200, 250)
    key = key_of(f"10.5.{number}.0/24")
    with world.client() as client:
        client.put(key, f'{{"PublicIP":"10.97.0.{number}"}}')

    def undo() -> None:
        with world.client() as client:
            client.delete(key)

    return Strike(f"10.5.{number}.0", undo)


def short_lease(world: World) -> Strike:
    """A peer that somebody made up, and whose lease ends by itself."""
    stranger = Stranger(world)
    with world.client() as client:
        client.put(key_of(stranger.subnet), stranger.value, ttl=3)
    return Strike(stranger.subnet)


# Hosts


def replace_host(world: World) -> Strike:
    """A host leaves for good, and a new one joins, now and then into a subnet kept for it."""
    daemon = _mortal(world)
    world.leave(daemon)
    if world.rng.random() < 0.5:
        number = len(world.lab.hosts) + 1
        with world.client() as client:
            client.put(key_of(daemon.subnet()), f'{{"PublicIP":"10.97.0.{number}"}}')
    new = world.join()
    # An older one would bring back a host that is no more.
    world.keep_backup()
    return Strike(f"{daemon.host.label} → {new.host.label}")


def hand_over_subnet(world: World) -> Strike:
    """A host's subnet goes to another: its daemon ends, is started again, and has a new subnet."""
    daemon, stranger = _mortal(world), Stranger(world)
    host, subnet = daemon.host, daemon.subnet()
    world.part(daemon)
    with world.client() as client:
        client.put(key_of(subnet), stranger.value, ttl=600)
        world.revoked.append(f"({subnet} is now held by {stranger.address})")
        status = daemon.wait_exit(PATIENCE)
        if status != 1:
            world.record.failures.append(f"{host.label}: status {status} for a subnet that is lost")
        _starting(daemon)()
        if daemon.subnet() == subnet:
            world.record.failures.append(f"{host.label} is in {subnet} again, which is another's")
        node = client.get(key_of(subnet))
        if node is None or node.value != stranger.value:
            world.record.failures.append(f"{host.label} has touched the lease of {subnet}: {node}")
        client.delete(key_of(subnet))
    world.reunite(daemon)
    # An older one would bring back the former subnet's lease.
    world.keep_backup()
    return Strike(f"{host.label}: {subnet} → {daemon.subnet()}")
