"""What the faults do, and how each is undone. What they may cost is in `faults`."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from firewall import iptables
from network import PATIENCE, key_of
from overlay import mac_of

from lab import Flanneld, Host, eventually
from lab.etcd import Etcd
from lab.namespaces import UNDERLAY
from lab.process import freeze, thaw

from .world import DEVICES, STEADY, World, kind_of, tunnels_of

GARBAGE = ("", "nonsense", "{}", "[1]", '{"PublicIP": 7}', "null", "\x00\xff")
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


# Daemons


def _mortal(world: World) -> Flanneld:
    return world.rng.choice([d for d in world.daemons if d.host.number > STEADY])


def _any(world: World) -> Flanneld:
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
    daemon = _any(world)
    pid = daemon.pid
    freeze(pid)
    return Strike(daemon.host.label, lambda: thaw(pid))


def kill_tunnel(world: World) -> Strike:
    daemon = _any(world)
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


def cut_off_host(world: World) -> Strike:
    """A host does not reach etcd, and is there for its peers as before."""
    host = _any(world).host
    members = [member.address for member in world.cluster.members]
    host.ip(*(f"route add blackhole {address}/32" for address in members))
    return Strike(
        host.label, lambda: host.ip(*(f"route del blackhole {address}/32" for address in members))
    )


# Keys


def delete_lease(world: World) -> Strike:
    daemon = _any(world)
    with world.client() as client:
        client.delete(key_of(daemon.subnet()))
    return Strike(daemon.host.label)


def spoil_lease(world: World) -> Strike:
    daemon = _any(world)
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
    number = world.rng.randrange(200, 250)
    mac = f',"BackendData":{{"VtepMAC":"02:00:00:00:01:{number:02x}"}}'
    kind = "" if world.backend == "udp" else f',"BackendType":"{world.backend}"'
    value = f'{{"PublicIP":"10.97.0.{number}"{kind}{mac if world.backend == "vxlan" else ""}}}'
    with world.client() as client:
        client.put(key_of(f"10.5.{number}.0/24"), value, ttl=3)
    return Strike(f"10.5.{number}.0")


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


# The kernel


def _ours(world: World) -> tuple[Flanneld, Flanneld, dict[str, str]]:
    daemon, peer = world.rng.sample(world.daemons, 2)
    values = {"subnet": str(peer.subnet()), "gateway": str(peer.subnet().network_address)}
    if world.backend == "vxlan":
        values["mac"] = mac_of(peer.host)
    return daemon, peer, values


def _spoil_entry(world: World, *choices: str) -> Strike:
    daemon, peer, values = _ours(world)
    _carry_out(daemon.host, world.rng.choice(choices).format(**values))
    return Strike(f"{daemon.host.label} → {peer.host.label}", host=daemon.host, peer=peer.host)


def _carry_out(host: Host, command: str) -> None:
    words = command.split()
    host.run(words if words[0] == "bridge" else ["ip", *words])


def spoil_route(world: World) -> Strike:
    return _spoil_entry(
        world,
        "route del {subnet}",
        "route replace blackhole {subnet}",
        "route replace {subnet} via 10.97.0.254",
    )


def spoil_tun_route(world: World) -> Strike:
    host = _any(world).host
    choice = world.rng.choice(
        ["route del 10.5.0.0/16", "route replace 10.5.0.0/16 via 10.97.0.254"]
    )
    host.ip(choice)
    return Strike(host.label, host=host)


def spoil_neighbour(world: World) -> Strike:
    return _spoil_entry(
        world,
        "neigh del {gateway} dev flannel.1",
        "neigh replace {gateway} dev flannel.1 lladdr 02:00:00:00:00:99 nud permanent",
    )


def spoil_fdb(world: World) -> Strike:
    return _spoil_entry(
        world,
        "bridge fdb del {mac} dev flannel.1",
        "bridge fdb replace {mac} dev flannel.1 dst 10.97.0.99",
    )


def flush_all(world: World) -> Strike:
    host = _any(world).host
    if world.backend == "vxlan":
        _carry_out(host, "neigh flush dev flannel.1 nud permanent")
    _carry_out(host, "route flush proto 102")
    return Strike(host.label, host=host)


def delete_device(world: World) -> Strike:
    host = _any(world).host
    host.ip(f"link del {DEVICES[world.backend]}")
    return Strike(host.label, host=host)


def down_device(world: World) -> Strike:
    host = _any(world).host
    host.ip(f"link set {DEVICES[world.backend]} down")
    return Strike(host.label, host=host)


def change_device(world: World) -> Strike:
    host = _any(world).host
    device = DEVICES[world.backend]
    choices = ["link set {device} mtu 1300", "addr flush dev {device}"]
    if world.backend == "vxlan":
        choices.append("link set {device} address 02:00:00:00:00:99")
    host.ip(world.rng.choice(choices).format(device=device))
    return Strike(host.label, host=host)


def down_interface(world: World) -> Strike:
    host = _any(world).host
    host.ip("link set eth0 down")
    return Strike(
        host.label,
        lambda: host.ip("link set eth0 up", f"route add default via {UNDERLAY.ip} dev eth0"),
        host,
    )


def unplug_host(world: World) -> Strike:
    host = _any(world).host
    host.unplug()
    return Strike(host.label, host.plug, host)


def flush_masquerade(world: World) -> Strike:
    host = _any(world).host
    for words in world.rng.choice(
        [["-t nat -F"], ["-t nat -F FLANNEL-POSTRTG"], ["-F"], ["-t nat -F", "-F"]]
    ):
        iptables(host, kind_of(host), *words.split())
    return Strike(host.label)
