"""What happens to a host's kernel: what somebody does to it, and what it does not take."""

import errno
import re

from firewall import iptables
from network import PATIENCE, key_of, peer_routes
from overlay import mac_of

from lab import Flanneld, Host, eventually
from lab.namespaces import UNDERLAY

from .strikes import Stranger, Strike, any_daemon
from .world import DEVICES, World, kind_of

REFUSALS = {
    "caps": "operation not permitted",
    f"send {errno.ENOBUFS}": "no buffer space available",
    f"answer {errno.ENOSPC}": "no space left on device",
    f"answer {errno.ENOMEM}": "cannot allocate memory",
}
"""What refuse.c is told, and what a daemon says then."""


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
    host = any_daemon(world).host
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
    host = any_daemon(world).host
    if world.backend == "vxlan":
        _carry_out(host, "neigh flush dev flannel.1 nud permanent")
    _carry_out(host, "route flush proto 102")
    return Strike(host.label, host=host)


def delete_device(world: World) -> Strike:
    host = any_daemon(world).host
    host.ip(f"link del {DEVICES[world.backend]}")
    return Strike(host.label, host=host)


def down_device(world: World) -> Strike:
    host = any_daemon(world).host
    host.ip(f"link set {DEVICES[world.backend]} down")
    return Strike(host.label, host=host)


def change_device(world: World) -> Strike:
    host = any_daemon(world).host
    device = DEVICES[world.backend]
    choices = ["link set {device} mtu 1300", "addr flush dev {device}"]
    if world.backend == "vxlan":
        choices.append("link set {device} address 02:00:00:00:00:99")
    host.ip(world.rng.choice(choices).format(device=device))
    return Strike(host.label, host=host)


def down_interface(world: World) -> Strike:
    host = any_daemon(world).host
    host.ip("link set eth0 down")
    return Strike(
        host.label,
        lambda: host.ip("link set eth0 up", f"route add default via {UNDERLAY.ip} dev eth0"),
        host,
    )


def unplug_host(world: World) -> Strike:
    host = any_daemon(world).host
    host.unplug()
    return Strike(host.label, host.plug, host)


def flush_masquerade(world: World) -> Strike:
    host = any_daemon(world).host
    for words in world.rng.choice(
        [["-t nat -F"], ["-t nat -F FLANNEL-POSTRTG"], ["-F"], ["-t nat -F", "-F"]]
    ):
        iptables(host, kind_of(host), *words.split())
    return Strike(host.label)


def refuse(world: World) -> Strike:
    """A host's kernel takes nothing just when a peer joins; when it does again, the peer is there.

    Until then packets to the others must flow.
    """
    daemon, stranger = any_daemon(world), Stranger(world)
    host = daemon.host
    order = world.rng.choice([*REFUSALS])
    since = len(daemon.log())
    world.levers.refuse(host, order)
    with world.client() as client:
        client.put(key_of(stranger.subnet), stranger.value, ttl=600)
    refused = re.compile(f"^E.*{REFUSALS[order]}", re.MULTILINE)
    eventually(lambda: refused.search(daemon.log()[since:]), PATIENCE, "a refusal to be said")

    def undo() -> None:
        world.levers.refuse(host, "")
        try:
            eventually(lambda: stranger.subnet in peer_routes(host), PATIENCE, "the peer's route")
        finally:
            with world.client() as client:
                client.delete(key_of(stranger.subnet))

    return Strike(f"{host.label}: {order}", undo)
