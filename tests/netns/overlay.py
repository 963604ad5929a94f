"""What the tests of the vxlan backend have in common: the network, and what is seen of it."""

import hashlib
import re
import socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from network import PATIENCE, MakeLab, client_of, key_of, put_config, start

from lab import Flanneld, Host, Lab, eventually
from lab.etcdv2 import EtcdV2
from lab.namespaces import Namespace

# Seconds within which a device spoilt by hand must be as it was.
SOON = 2.0

_CHUNK = 1 << 16


def running(make_lab: MakeLab, hosts: int = 2, **keys: object) -> tuple[Lab, list[Flanneld]]:
    """Return a lab with a running vxlan network, every entry of its device in place."""
    lab = make_lab(hosts)
    put_keys(lab, **keys)
    daemons = start(*lab.hosts)
    for daemon in daemons:
        wanted = [] if keys.get("DirectRouting") else mesh(daemons, daemon.host)
        wait_entries(daemon.host, wanted, f"flannel.{keys.get('VNI', 1)}")
    return lab, daemons


def put_keys(lab: Lab, **keys: object) -> None:
    """Write a network config for vxlan with these keys of the backend."""
    put_config(lab, Backend={"Type": "vxlan", **keys})


def link(host: Host, name: str = "flannel.1") -> dict[str, Any] | None:
    """Return what ``ip -d -j link`` shows of a device; None if there is none."""
    return next((each for each in host.ip_json("-d", "link") if each["ifname"] == name), None)


def the_link(host: Host, name: str = "flannel.1") -> dict[str, Any]:
    """Return the same of a device that must be there."""
    found = link(host, name)
    assert found is not None, f"{host.label} has no {name}"
    return found


def mac_of(host: Host, name: str = "flannel.1") -> str:
    """Return the MAC of a device."""
    return str(the_link(host, name)["address"])


def addresses(host: Host, name: str = "flannel.1") -> list[str]:
    """Return the IPv4 addresses of a device, written 10.5.16.0/32; none if it is not there."""
    shown = [each for each in host.ip_json("-4", "addr") if each["ifname"] == name]
    found = [address for each in shown for address in each["addr_info"]]
    return [f"{address['local']}/{address['prefixlen']}" for address in found]


def lines(host: Host, *command: str) -> list[str]:
    """Return a command's lines, in order of their text, without flanneld's protocol number.

    None where the command fails, as there may be no such device.
    """
    shown = host.run(command, check=False).stdout.replace(" proto 102", "")
    return sorted(line.strip() for line in shown.splitlines())


def entries(host: Host, device: str = "flannel.1") -> list[str]:
    """Return a device's routes, permanent neighbours and FDB entries as ``ip`` and ``bridge``
    show them, but for the scope that many routes have each (see test_scale)."""
    routes = lines(host, "ip", "-4", "route", "show", "dev", device)
    return [
        *(re.sub(r" scope \d+", "", route) for route in routes),
        *lines(host, "ip", "-4", "neigh", "show", "dev", device, "nud", "permanent"),
        *lines(host, "bridge", "fdb", "show", "dev", device),
    ]


def of_peers(peers: Iterable[tuple[object, object, str]]) -> list[str]:
    """Return what `entries` must be for these (subnet, public IP, MAC)."""
    known = [(str(subnet), str(ip), mac) for subnet, ip, mac in peers]
    gateways = [subnet.partition("/")[0] for subnet, _, _ in known]
    return [
        *sorted(f"{p[0]} via {gw} onlink" for p, gw in zip(known, gateways, strict=True)),
        *sorted(f"{gw} lladdr {p[2]} PERMANENT" for p, gw in zip(known, gateways, strict=True)),
        *sorted(f"{mac} dst {ip} self permanent" for _, ip, mac in known),
    ]


def mesh(daemons: Iterable[Flanneld], host: Host, *more: tuple[object, object, str]) -> list[str]:
    """Return what `entries` must be on a host for these daemons' hosts, and more peers."""
    others = [
        (daemon.subnet(), daemon.host.address, lease_mac(daemon))
        for daemon in daemons
        if daemon.host is not host
    ]
    return of_peers([*others, *more])


def lease_mac(daemon: Flanneld) -> str:
    """Return the MAC in a daemon's lease."""
    with client_of(daemon.host.lab) as client:
        node = client.get(key_of(daemon.subnet()))
    assert node is not None
    return str(node.json()["BackendData"]["VtepMAC"])


def wait_entries(
    host: Host, wanted: list[str], device: str = "flannel.1", timeout: float = PATIENCE
) -> None:
    """Wait until the entries of a device are exactly these."""

    def as_wanted() -> bool:
        assert entries(host, device) == wanted
        return True

    eventually(as_wanted, timeout, f"the entries of {device} on {host.label}: {wanted}")


def put_peer(
    client: EtcdV2, subnet: str, public_ip: object, mac: str, *, data: str = "", kind: str = "vxlan"
) -> None:
    """Write a peer's lease, as Go's v0.8.0 does; ``data`` is the whole of other lease data."""
    data = data or f'{{"VtepMAC":"{mac}"}}'
    value = f'{{"PublicIP":"{public_ip}","BackendType":"{kind}","BackendData":{data}}}'
    client.put(key_of(subnet), value, ttl=1000)


def make_vxlan(
    host: Namespace, subnet: str, mac: str, *options: str, name: str = "flannel.1"
) -> None:
    """Make a vxlan device by hand, with the original's attributes and address."""
    (eth0,) = host.ip_json("-4", "addr", "show", "dev", "eth0")
    local = eth0["addr_info"][0]["local"]
    vni = name.partition(".")[2]
    host.ip(
        f"link add {name} mtu 1450 address {mac} type vxlan id {vni} local {local} dev eth0"
        f" dstport 8472 nolearning {' '.join(options)}",
        f"addr add {subnet.partition('/')[0]}/32 dev {name}",
        f"link set {name} up",
    )


def add_peer_by_hand(host: Namespace, subnet: str, public_ip: object, mac: str) -> None:
    """Do for a peer what Go flanneld does from v0.9 on."""
    gateway = subnet.partition("/")[0]
    host.ip(
        f"neigh replace {gateway} lladdr {mac} dev flannel.1 nud permanent",
        f"route replace {subnet} via {gateway} dev flannel.1 onlink",
    )
    host.run(["bridge", "fdb", "replace", mac, "dev", "flannel.1", "dst", str(public_ip)])


def write_subnet_env(host: Host, subnet: str, network: str = "10.5.0.0/16") -> None:
    """Write the subnet file of a host's former run."""
    own = IPv4Network(subnet)
    address = f"{own.network_address + 1}/{own.prefixlen}"
    host.subnet_file.write_text(
        f"FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={address}\n"
        "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    )


def start_containers(hosts: Sequence[Host]) -> None:
    """Start a container on each host that has none."""
    for host in hosts:
        if not host.containers:
            host.add_container()


def problems(daemon: Flanneld, since: int = 0) -> list[str]:
    """Return the warnings and errors in the log after the first ``since`` characters, without
    their heads."""
    found = re.findall(r"^[WEF]\d{4} [^]]*\] (.*)$", daemon.log()[since:], re.MULTILINE)
    return [str(line) for line in found]


# Traffic


def tcp_both_ways(client: Namespace, server: Namespace, address: object, size: int) -> None:
    """Send ``size`` bytes over a new TCP connection, and have them sent back."""
    payload = bytes(range(256)) * (size // 256)
    listener = server.inside(lambda: socket.create_server((str(address), 0)))
    with closing(listener):
        port = listener.getsockname()[1]
        near = client.inside(lambda: socket.create_connection((str(address), port), timeout=5))
        with closing(near):
            listener.settimeout(5)
            far, _ = listener.accept()
            with closing(far):
                far.settimeout(5)
                assert _transfer(near, far, payload) == _digest(payload)
                assert _transfer(far, near, payload) == _digest(payload)


def _transfer(source: socket.socket, target: socket.socket, payload: bytes) -> str:
    sender = threading.Thread(target=source.sendall, args=(payload,))
    sender.start()
    received = hashlib.sha256()
    missing = len(payload)
    while missing and (data := target.recv(min(_CHUNK, missing))):
        received.update(data)
        missing -= len(data)
    sender.join(5)
    return received.hexdigest()


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def udp_both_ways(client: Namespace, server: Namespace, address: object, size: int) -> IPv4Address:
    """Send one datagram of ``size`` bytes, have it sent back, and return the sender as seen."""
    payload = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    far = server.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    near = client.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with closing(far), closing(near):
        far.bind((str(address), 0))
        for each in (far, near):
            each.settimeout(5)
        near.sendto(payload, far.getsockname())
        data, sender = far.recvfrom(_CHUNK)
        assert data == payload
        far.sendto(data, sender)
        assert near.recv(_CHUNK) == payload
    return IPv4Address(sender[0])
