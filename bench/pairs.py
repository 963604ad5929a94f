"""Pairs of hosts, each connected in another way, with a container on each host."""

import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Protocol

from lab.namespaces import Container, Host, Lab, Namespace
from lab.process import run
from lab.tunnel import MTU, PORT, HostTunnel, connect, container_of, route_to, subnet_of

# The C loop on both hosts; ours; ours with all packets through its process; ours to the C loop and
# back; what the kernel can do.
KINDS = ("c", "ours", "process", "ours-c", "c-ours", "vxlan", "routing")
_HERE = Path(__file__).parent
# linux/if_tun.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class Ends(Protocol):
    """Where traffic begins and ends: two containers, or the hosts themselves."""

    @property
    def containers(self) -> Sequence[Container | Host]: ...


@dataclass
class Pair:
    """Two hosts. Data flows from the first container to the second."""

    containers: list[Container] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    """The processes that move packets, in the order of the hosts; none if the kernel does."""
    tunnels: list[HostTunnel] = field(default_factory=list)


def build(directory: Path) -> tuple[Path, Path]:
    """Compile the traffic generator and the C loop."""
    results = []
    for name in ("traffic", "udp_proxy"):
        output = directory / name
        run(["gcc", "-O2", "-Wall", "-o", str(output), str(_HERE / f"{name}.c")])
        results.append(output)
    return results[0], results[1]


def make_pair(lab: Lab, kind: str, proxy: Path) -> Pair:
    """Add two hosts to the lab and connect them."""
    hosts = [lab.add_host(), lab.add_host()]
    pair = Pair()
    if kind in ("vxlan", "routing"):
        for host, other in (hosts, hosts[::-1]):
            _connect_by_kernel(host, other, kind)
        mtu = 1450 if kind == "vxlan" else 1500
    else:
        mtu = MTU
        both = (0, 1)
        ours = {"c": (), "ours": both, "process": both, "ours-c": (0,), "c-ours": (1,)}[kind]
        for side, host in enumerate(hosts):
            if side in ours:
                pair.tunnels.append(HostTunnel(host, fast=kind != "process"))
                pair.pids.append(pair.tunnels[-1].process.pid)
            else:
                route = route_to(hosts[1 - side])
                address = f"10.5.{host.number}.0/16"
                process = start_proxy(host, address, route.subnet, route.public_ip, proxy)
                pair.pids.append(process.pid)
        connect(hosts, pair.tunnels)
    pair.containers = [container_of(host, mtu) for host in hosts]
    for one, two in (pair.containers, pair.containers[::-1]):
        if one.ping(two.address, count=3).received == 0:
            raise RuntimeError(f"{kind}: no connection")
    return pair


def as_two_machines(pair: Pair, processors: Sequence[int]) -> None:
    """Connect the pair's hosts as by network cards, and give each a processor of its own.

    What leaves is cut, what arrives is joined again where it belongs together (GRO), and all that
    follows is done by the receiving host's processor: the other end of its eth0 sees to that.
    Checksums are left undone: cards compute them at no cost, and here only processors could.
    """
    for side, container in enumerate(pair.containers):
        host = container.host
        _without_iptables(host.lab.underlay)
        as_over_a_wire(host)
        host.run(["ethtool", "-K", "eth0", "gro", "on"])
        # Or it would hand on what it has without eth0 having a look.
        underlay, port = host.lab.underlay, host.port
        underlay.run(["ethtool", "-K", port, "tso", "off"])
        steering = f"/sys/class/net/{port}/queues/rx-0/rps_cpus"
        mask = _mask(processors[1 - side])
        # With a /sys of that namespace.
        run(["ip", "netns", "exec", underlay.name, "sh", "-c", f"echo {mask} > {steering}"])
    for pid, processor in zip(pair.pids, processors, strict=False):
        os.sched_setaffinity(pid, {processor})


def _mask(processor: int) -> str:
    """Return the set of one processor, as sysfs writes it: 32 bits between commas."""
    return ",".join([f"{1 << processor % 32:x}", *["00000000"] * (processor // 32)])


def _without_iptables(switch: Namespace) -> None:
    """Have a namespace that stands for a switch ask no iptables about what it bridges."""
    key = "net/bridge/bridge-nf-call-iptables"
    if switch.inside(Path("/proc/sys", key).exists):
        switch.set_sysctl(key, "0")


def as_over_a_wire(host: Host) -> None:
    """Have nothing larger than a datagram leave by the host's eth0, as by a network card."""
    names = ("tx-tcp", "tx-udp", "tx-udp_tnl", "tx-udp_tnl-csum")
    off = [word for name in names for word in (f"{name}-segmentation", "off")]
    host.run(["ethtool", "-K", "eth0", *off])


def _connect_by_kernel(host: Host, other: Host, kind: str) -> None:
    subnet = subnet_of(other)
    if kind == "routing":
        host.ip(f"route add {subnet} via {other.address}")
        return
    mac, other_mac = (f"02:98:00:00:00:{h.number:02x}" for h in (host, other))
    gateway = subnet.network_address
    host.ip(
        f"link add flannel.1 address {mac} type vxlan id 1 local {host.address} dev eth0"
        " dstport 8472 nolearning",
        f"addr add 10.5.{host.number}.0/32 dev flannel.1",
        "link set flannel.1 up",
        f"neigh add {gateway} lladdr {other_mac} dev flannel.1 nud permanent",
        f"route add {subnet} via {gateway} dev flannel.1 onlink",
    )
    run(
        f"bridge -n {host.name} fdb add {other_mac} dev flannel.1 dst {other.address}"
        " self permanent".split()
    )


def start_proxy(
    host: Host, address: str, subnet: IPv4Network, peer: IPv4Address, proxy: Path
) -> subprocess.Popen[bytes]:
    """Start the C loop for one peer, with a TUN device and a socket as the original has them.

    ``address`` is the device's, written 10.5.1.0/16.
    """
    tun, udp = host.inside(lambda: _open(host))
    host.ip(f"addr add {address} dev flannel0", f"link set flannel0 mtu {MTU} up")
    target = (subnet.network_address, subnet.netmask, peer, PORT)
    process = subprocess.Popen(
        [proxy, *map(str, (tun, udp.fileno(), MTU, *target))],
        pass_fds=[tun, udp.fileno()],
        stdin=subprocess.DEVNULL,
    )
    host.lab.processes.append(process)
    os.close(tun)
    udp.close()
    return process


def _open(host: Host) -> tuple[int, socket.socket]:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"flannel0", _IFF_TUN | _IFF_NO_PI))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    udp.bind((str(host.address), PORT))
    return tun, udp
