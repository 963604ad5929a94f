"""What an earlier daemon left on the host: taken over without a gap, or swept."""

import json
from ipaddress import IPv4Network

import pytest
from network import (
    PATIENCE,
    MakeLab,
    Pings,
    RouteMonitor,
    client_of,
    leases,
    put_config,
    routes,
    start,
)
from overlay import (
    add_peer_by_hand,
    addresses,
    entries,
    lease_mac,
    link,
    mac_of,
    make_vxlan,
    mesh,
    of_peers,
    problems,
    put_keys,
    put_peer,
    running,
    start_containers,
    the_link,
    wait_entries,
    write_subnet_env,
)

from lab import Flanneld, Host, Lab, eventually

# The recorded MACs of a v0.8.0 and a v0.20.2 host, and peers that are long gone.
SUBNETS = ("10.5.16.0/24", "10.5.40.0/24")
MACS = ("aa:7b:75:bf:06:90", "36:db:a7:31:8d:1c")
GONE = ("10.5.200.0/24", "10.97.0.200", "02:00:00:00:00:c8")


def go_network(make_lab: MakeLab, since_v09: bool) -> Lab:
    """Return two hosts as Go's daemons left them, with containers that reach each other."""
    lab = make_lab(2)
    put_keys(lab)
    data = '{"VNI":1,"VtepMAC":"%s"}' if since_v09 else ""
    with client_of(lab) as client:
        for host, subnet, mac in zip(lab.hosts, SUBNETS, MACS, strict=True):
            put_peer(client, subnet, host.address, mac, data=data and data % mac)
            make_vxlan(host, subnet, mac)
            write_subnet_env(host, subnet)
    start_containers(lab.hosts)
    for n, host in enumerate(lab.hosts):
        other = 1 - n
        peer = (SUBNETS[other], lab.hosts[other].address, MACS[other])
        if since_v09:
            add_peer_by_hand(host, *peer)
            add_peer_by_hand(host, *GONE)
        else:
            leave_as_v080(host, peer)
    return lab


def leave_as_v080(host: Host, peer: tuple[str, object, str]) -> None:
    """Do what v0.8.0 does, answered misses and forgotten addresses included."""
    _, public_ip, mac = peer
    (container,) = [c for h in host.lab.hosts if h is not host for c in h.containers]
    host.ip(
        "route add 10.5.0.0/16 dev flannel.1",
        "addr add 10.5.123.0/32 dev flannel.1",
        f"neigh add {container.address} lladdr {mac} dev flannel.1 nud reachable",
    )
    for address, behind in ((mac, public_ip), (GONE[2], GONE[1])):
        host.run(["bridge", "fdb", "add", address, "dev", "flannel.1", "dst", str(behind)])


@pytest.mark.parametrize("since_v09", [False, True], ids=["v0.8.0", "since v0.9.0"])
def test_go_daemons_are_replaced_without_a_lost_packet(make_lab: MakeLab, since_v09: bool) -> None:
    lab = go_network(make_lab, since_v09)
    one, two = lab.hosts
    before = [(the_link(host)["ifindex"], mac_of(host)) for host in lab.hosts]
    monitors = [RouteMonitor(host) for host in lab.hosts]
    with Pings(lab.hosts) as pings:
        daemons = start(one)
        # For a while one host runs the old, the other the new daemon.
        pings.go_on(10)
        daemons += start(two)
        pings.go_on(10)
    for n, host in enumerate(lab.hosts):
        peer = (SUBNETS[1 - n], lab.hosts[1 - n].address, MACS[1 - n])
        wait_entries(host, of_peers([peer]), timeout=2 * PATIENCE)
        # All of them ours now.
        kept = routes(host, "dev", "flannel.1")
        assert [route["protocol"] for route in kept] == ["102"]
        assert addresses(host) == [SUBNETS[n].replace("/24", "/32")]
        assert (the_link(host)["ifindex"], mac_of(host)) == before[n]
        gone = GONE[0] if since_v09 else "10.5.0.0/16"
        deleted = [line.split()[1] for line in monitors[n].deleted()]
        # Of the table local: what the forgotten address took along.
        assert [destination for destination in deleted if destination != "local"] == [gone]
        assert problems(daemons[n]) == []
    assert [str(daemon.subnet()) for daemon in daemons] == list(SUBNETS)
    assert [lease_mac(daemon) for daemon in daemons] == list(MACS)


def test_what_vanished_peers_left_is_swept_after_the_start(make_lab: MakeLab) -> None:
    lab = go_network(make_lab, True)
    one = lab.hosts[0]
    assert any(GONE[2] in line for line in entries(one))
    start(one)
    # Not at once: the store might have lost their leases.
    assert any(GONE[2] in line for line in entries(one))
    wanted = of_peers([(SUBNETS[1], lab.hosts[1].address, MACS[1])])
    wait_entries(one, wanted, timeout=2 * PATIENCE)


# Another backend


def restart_with(lab: Lab, daemons: list[Flanneld], backend: dict[str, object]) -> None:
    put_config(lab, Backend=backend)
    for daemon in daemons:
        daemon.terminate()
        daemon.start()
    for daemon in daemons:
        daemon.wait_ready()


def host_gw_routes(daemons: list[Flanneld], host: Host) -> dict[str, str]:
    return {str(d.subnet()): str(d.host.address) for d in daemons if d.host is not host}


def direct(host: Host) -> dict[str, str]:
    found = routes(host, "proto", "102", "dev", "eth0")
    return {route["dst"]: route["gateway"] for route in found}


def wait_direct(host: Host, wanted: dict[str, str]) -> None:
    eventually(lambda: direct(host) == wanted, PATIENCE, f"host-gw's routes on {host.label}")


def wait_no_device(host: Host) -> None:
    eventually(lambda: link(host) is None, PATIENCE, f"the former device of {host.label} to go")


def test_from_host_gw_to_vxlan_and_back(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab)
    daemons = start(*lab.hosts)
    subnets = [daemon.subnet() for daemon in daemons]
    start_containers(lab.hosts)
    near, far = (host.containers[0] for host in lab.hosts)
    for backend in ("vxlan", "host-gw", "vxlan"):
        restart_with(lab, daemons, {"Type": backend})
        assert [daemon.subnet() for daemon in daemons] == subnets
        for host in lab.hosts:
            if backend == "vxlan":
                wait_entries(host, mesh(daemons, host))
                assert direct(host) == {}
            else:
                wait_direct(host, host_gw_routes(daemons, host))
                # The device would catch traffic, and its address be in the way.
                wait_no_device(host)
        assert near.ping(far.address, 3).lost == 0
    assert {node.json()["BackendType"] for node in leases(lab).values()} == {"vxlan"}


def test_another_vni_removes_the_former_device_and_no_other(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    one = lab.hosts[0]
    # A second daemon's device, an operator's of such a name, and one with the address.
    config = {"Network": "10.9.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}
    with client_of(lab) as client:
        client.put("/two/config", json.dumps(config))
    second = Flanneld(one, "--etcd-prefix=/two", f"--subnet-file={one.directory}/two.env").start()
    second.wait_ready()
    make_vxlan(one, "10.77.0.0/24", "02:00:00:00:00:77", name="flannel.77")
    address = addresses(one)[0]
    one.ip("link add mine type bridge", f"addr add {address} dev mine")
    kept = {name: the_link(one, name)["ifindex"] for name in ("flannel.2", "flannel.77", "mine")}
    restart_with(lab, daemons, {"Type": "vxlan", "VNI": 5})
    for daemon in daemons:
        host = daemon.host
        wait_entries(host, mesh(daemons, host), "flannel.5")
        assert addresses(host, "flannel.5") == [f"{daemon.subnet().network_address}/32"]
        wait_no_device(host)
    daemons[0].wait_log(r"Removed flannel\.1, the device of a former run")
    assert {name: the_link(one, name)["ifindex"] for name in kept} == kept
    assert second.is_running
    start_containers(lab.hosts)
    near, far = (host.containers[0] for host in lab.hosts)
    assert near.ping(far.address, 3).lost == 0


def test_another_port_makes_the_device_anew_with_the_same_mac(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    macs = [mac_of(host) for host in lab.hosts]
    restart_with(lab, daemons, {"Type": "vxlan", "Port": 4789})
    for host in lab.hosts:
        wait_entries(host, mesh(daemons, host))
        assert the_link(host)["linkinfo"]["info_data"]["port"] == 4789
    assert [mac_of(host) for host in lab.hosts] == macs
    assert problems(daemons[0]) == [
        '"flannel.1" already exists with incompatible configuration: port: 8472 vs 4789;'
        " recreating device"
    ]


def test_another_network_sweeps_the_former_ones_routes_and_address(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    put_config(lab, Network="10.8.0.0/16", Backend={"Type": "vxlan"})
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        daemon.start()
    for daemon in daemons:
        daemon.wait_ready()
    for daemon in daemons:
        host, subnet = daemon.host, daemon.subnet()
        assert subnet.subnet_of(IPv4Network("10.8.0.0/16"))
        wait_entries(host, mesh(daemons, host))
        assert addresses(host) == [f"{subnet.network_address}/32"]
        assert routes(host, "root", "10.5.0.0/16") == []
