"""The udp backend's tunnel on the lab's hosts, without a daemon.

Each host gets the subnet 10.5.N.0/24, a TUN device with the network's length as flannel has it, and
a tunnel that knows the other hosts.
"""

import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.descriptors import Descriptors
from flanneld.backend.udp.fastpath import FastPath
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.process import TunnelProcess
from flanneld.backend.udp.tun import ALL, Offload
from flanneld.interface import ExternalInterface

if TYPE_CHECKING:
    from lab.namespaces import Container, Host

PORT = 8285
MTU = 1472


def subnet_of(host: "Host") -> IPv4Network:
    """The host's subnet."""
    return IPv4Network(f"10.5.{host.number}.0/24")


def route_to(host: "Host") -> PeerRoute:
    """What the other hosts' tunnels are told about this one."""
    return PeerRoute(subnet_of(host), host.address)


def write_subnet_file(host: "Host", mtu: int = MTU) -> None:
    """Write the file containers are started by."""
    host.subnet_file.write_text(
        f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.{host.number}.1/24\n"
        f"FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n"
    )


def configure(host: "Host", device: str, mtu: int = MTU) -> None:
    """Give the TUN device its address, MTU and route."""
    host.ip(
        f"addr add 10.5.{host.number}.0/16 dev {device}",
        f"link set {device} mtu {mtu} up",
    )


class HostTunnel:
    """A tunnel on a host; ends with the lab at the latest.

    ``wanted`` leaves out offloads; ``fast`` adds the fast path in the kernel.
    """

    def __init__(
        self,
        host: "Host",
        *,
        wanted: Offload = ALL,
        source_check: bool = True,
        mtu: int = MTU,
        fast: bool = False,
    ) -> None:
        self.host = host
        self.mtu = mtu
        self.wanted = wanted
        self.source_check = source_check
        self._known: set[IPv4Network] = set()
        self.descriptors = host.inside(lambda: Descriptors.open(host.address, PORT, wanted=wanted))
        host.lab.when_closing(self.descriptors.close)
        configure(host, self.descriptors.tun.name, mtu)
        if not host.subnet_file.exists():
            write_subnet_file(host, mtu)
        self.fast_path = host.inside(lambda: self._fast_path(fast))
        host.lab.when_closing(self.fast_path.close)
        self.process = self.start()
        host.lab.when_closing(self.close)

    def start(self) -> TunnelProcess:
        """Start a process on the descriptors there are."""
        self.process = TunnelProcess(
            self.descriptors,
            port=PORT,
            mtu=self.mtu,
            source_check=self.source_check,
        )
        return self.process

    def _fast_path(self, wanted: bool) -> FastPath:
        address = self.host.address
        eth0 = ExternalInterface(socket.if_nametoindex("eth0"), "eth0", 1500, address, address)
        path = FastPath(eth0, self.descriptors.udp, port=PORT, mtu=self.mtu, wanted=wanted)
        path.ensure(self.descriptors.tun.index)
        return path

    def reopen_tun(self) -> None:
        """Make the deleted device anew."""
        self.host.inside(self.descriptors.reopen_tun)
        self.host.inside(lambda: self.fast_path.ensure(self.descriptors.tun.index))
        configure(self.host, self.descriptors.tun.name, self.mtu)

    def close(self) -> None:
        """End the process."""
        self.process.close()

    def set_peers(self, routes: Iterable[PeerRoute]) -> None:
        """Add peers or change them; done when this returns, as for all of these."""
        routes = list(routes)
        self.fast_path.change(routes, [])
        self._known |= {route.subnet for route in routes}
        self.process.set_peers(routes)
        self.process.wait_settled()

    def remove_peers(self, subnets: Iterable[IPv4Network]) -> None:
        """Remove peers."""
        subnets = list(subnets)
        self.fast_path.change([], subnets)
        self._known -= set(subnets)
        self.process.remove_peers(subnets)
        self.process.wait_settled()

    def replace_peers(self, routes: Iterable[PeerRoute]) -> None:
        """Make these all peers."""
        routes = list(routes)
        self.fast_path.change(routes, self._known - {route.subnet for route in routes})
        self._known = {route.subnet for route in routes}
        if self.fast_path.is_on:
            self.process.set_fast_path(self.fast_path.secret)
        self.process.replace_peers(routes)
        self.process.wait_settled()

    @property
    def counters(self) -> Counters:
        """Its statistics as of now."""
        self.process.ask_counters()
        self.process.wait_settled()
        return self.process.counters

    def memory_kb(self, kind: str = "VmRSS") -> int:
        """Resident memory of the process in KiB; ``kind`` is a name of /proc/PID/status."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(f"{kind}:"))


def connect(hosts: Sequence["Host"], tunnels: Sequence[HostTunnel]) -> None:
    """Tell every tunnel the other hosts."""
    for tunnel in tunnels:
        tunnel.process.wait_ready()
        tunnel.replace_peers(route_to(host) for host in hosts if host is not tunnel.host)


def container_of(host: "Host", mtu: int = MTU) -> "Container":
    """One more container on the host."""
    if not host.subnet_file.exists():
        write_subnet_file(host, mtu)
    return host.add_container()
