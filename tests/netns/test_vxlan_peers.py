"""Peers that come, change and go: what of them is in the kernel, and what is not."""

import re
from functools import partial
from ipaddress import IPv4Address

import pytest
from network import (
    PATIENCE,
    MakeLab,
    RouteMonitor,
    client_of,
    key_of,
    leases,
    routes,
    start,
)
from overlay import (
    addresses,
    entries,
    mesh,
    of_peers,
    problems,
    put_keys,
    put_peer,
    running,
    start_containers,
    tcp_both_ways,
    the_link,
    wait_entries,
)

from lab import Flanneld, Host, Lab, eventually
from lab.process import freeze, thaw

SUBNET, OTHER = "10.5.201.0/24", "10.5.202.0/24"
MAC_A, MAC_B, MAC_C = "02:00:00:00:00:aa", "02:00:00:00:00:bb", "02:00:00:00:00:cc"
IP_A, IP_B = "10.97.0.77", "10.97.0.88"

# More events than etcd keeps.
HISTORY = 1000


def alone(make_lab: MakeLab, **keys: object) -> tuple[Lab, Host, Flanneld]:
    """Return a lab with one host and its running daemon."""
    lab, (daemon,) = running(make_lab, 1, **keys)
    return lab, lab.hosts[0], daemon


CHANGES = pytest.mark.parametrize(
    ("ip", "mac"),
    [
        pytest.param(IP_B, MAC_A, id="public IP"),
        pytest.param(IP_A, MAC_B, id="MAC"),
        pytest.param(IP_B, MAC_B, id="both"),
    ],
)


@CHANGES
def test_a_changed_peer_is_followed(make_lab: MakeLab, ip: str, mac: str) -> None:
    """Old entries out and new ones in; those of others are not touched."""
    lab, host, daemon = alone(make_lab)
    other = (OTHER, IP_A, MAC_C)
    with client_of(lab) as client:
        put_peer(client, *other)
        put_peer(client, SUBNET, IP_A, MAC_A)
        wait_entries(host, of_peers([(SUBNET, IP_A, MAC_A), other]))
        monitor = RouteMonitor(host)
        put_peer(client, SUBNET, ip, mac)
        wait_entries(host, of_peers([(SUBNET, ip, mac), other]))
    # The route was never away, so no packet took another one.
    assert monitor.deleted() == []
    assert problems(daemon) == []


@CHANGES
def test_a_changed_peer_is_noticed_on_resync(make_lab: MakeLab, ip: str, mac: str) -> None:
    """The change is among more events than etcd keeps: only a snapshot can show it."""
    lab, host, daemon = alone(make_lab)
    with client_of(lab) as client:
        put_peer(client, SUBNET, IP_A, MAC_A)
        wait_entries(host, of_peers([(SUBNET, IP_A, MAC_A)]))
        freeze(daemon.pid)
        try:
            # The one event for which the watch is waiting at this moment.
            put_peer(client, OTHER, IP_A, MAC_C)
            client.delete(key_of(OTHER))
            put_peer(client, SUBNET, ip, mac)
            for n in range(HISTORY + 10):
                client.put("/elsewhere", str(n))
        finally:
            thaw(daemon.pid)
        daemon.wait_log("outside history window")
        wait_entries(host, of_peers([(SUBNET, ip, mac)]))


def test_a_peer_that_leaves_takes_everything_along(make_lab: MakeLab) -> None:
    lab, host, daemon = alone(make_lab)
    with client_of(lab) as client:
        put_peer(client, SUBNET, IP_A, MAC_A)
        put_peer(client, OTHER, IP_B, MAC_B)
        wait_entries(host, of_peers([(SUBNET, IP_A, MAC_A), (OTHER, IP_B, MAC_B)]))
        client.delete(key_of(SUBNET))
        wait_entries(host, of_peers([(OTHER, IP_B, MAC_B)]))
        client.delete(key_of(OTHER))
        wait_entries(host, [])
    assert problems(daemon) == []


def test_a_host_with_an_old_and_a_new_lease_keeps_its_fdb_entry(make_lab: MakeLab) -> None:
    """Both have its MAC. When the old one ends, the new one's traffic must go on."""
    lab, host, daemon = alone(make_lab)
    with client_of(lab) as client:
        put_peer(client, SUBNET, IP_A, MAC_A)
        put_peer(client, OTHER, IP_A, MAC_A)
        both = of_peers([(SUBNET, IP_A, MAC_A), (OTHER, IP_A, MAC_A)])
        wait_entries(host, [line for n, line in enumerate(both) if n != len(both) - 1])
        client.delete(key_of(SUBNET))
        wait_entries(host, of_peers([(OTHER, IP_A, MAC_A)]))
        # It moves, and the FDB entry with it; then it leaves.
        put_peer(client, OTHER, IP_B, MAC_A)
        wait_entries(host, of_peers([(OTHER, IP_B, MAC_A)]))
        client.delete(key_of(OTHER))
        wait_entries(host, [])
    assert problems(daemon) == []


def test_after_a_restart_the_newer_of_two_leases_with_one_mac_counts(make_lab: MakeLab) -> None:
    lab, host, daemon = alone(make_lab)
    daemon.terminate()
    with client_of(lab) as client:
        put_peer(client, OTHER, IP_A, MAC_A)
        put_peer(client, SUBNET, IP_B, MAC_A)
        daemon.start()
        daemon.wait_ready()
        assert f"{MAC_A} dst {IP_B} self permanent" in entries(host)
        client.delete(key_of(SUBNET))
        wait_entries(host, of_peers([(OTHER, IP_A, MAC_A)]))


# Leases that are of no use


def test_another_backends_lease_is_ignored_with_one_warning(make_lab: MakeLab) -> None:
    lab, host, daemon = alone(make_lab)
    warning = f"Ignoring non-vxlan subnet({SUBNET}): type=host-gw"
    with client_of(lab) as client:
        for _ in range(3):
            put_peer(client, SUBNET, IP_A, MAC_A, kind="host-gw")
        put_peer(client, OTHER, IP_B, MAC_B)
        wait_entries(host, of_peers([(OTHER, IP_B, MAC_B)]))
        assert problems(daemon) == [warning]
        # It changes to ours, and back.
        put_peer(client, SUBNET, IP_A, MAC_A)
        wait_entries(host, of_peers([(SUBNET, IP_A, MAC_A), (OTHER, IP_B, MAC_B)]))
        put_peer(client, SUBNET, IP_A, MAC_A, kind="host-gw")
        wait_entries(host, of_peers([(OTHER, IP_B, MAC_B)]))
    assert problems(daemon) == [warning, warning]
    assert routes(host, "proto", "102", "dev", "eth0") == []


@pytest.mark.parametrize("keys", [{}, {"DirectRouting": True}], ids=["vxlan", "direct"])
def test_garbage_in_the_data_is_ignored_once_and_harms_nobody(
    make_lab: MakeLab, keys: dict[str, object]
) -> None:
    """The recorded kinds, with which Go's daemon kept old entries or asked for nonsense."""
    lab, host, daemon = alone(make_lab, **keys)
    # On no network of the host.
    good = (OTHER, "192.0.2.9", MAC_B)
    garbage = {
        '{"VtepMAC":"zz"}': 'VtepMAC must be a MAC address, not "zz"',
        '{"VtepMAC":5}': "VtepMAC must be a MAC address, not 5",
        "{}": "VtepMAC is missing",
        '["VtepMAC"]': "VtepMAC is missing",
        "null": "empty text",
        '{"VtepMAC":"ff:ff:ff:ff:ff:ff"}': "VtepMAC ff:ff:ff:ff:ff:ff is no host's address",
    }
    with client_of(lab) as client:
        put_peer(client, *good)
        for data, why in garbage.items():
            put_peer(client, SUBNET, IP_A, MAC_A)
            for _ in range(2):
                put_peer(client, SUBNET, IP_A, MAC_A, data=data)
            daemon.wait_log(re.escape(why))
            wait_entries(host, of_peers([good]))
        expected = [
            f"Ignoring subnet({SUBNET}) of {IP_A}: BackendData: {w}" for w in garbage.values()
        ]
        assert problems(daemon) == expected
        assert routes(host, SUBNET) == []
        # What is on-link may change: nothing of it may end the daemon.
        host.ip("addr add 192.0.2.1/24 dev eth0", "addr add 172.31.0.1/24 dev eth0")
        put_peer(client, SUBNET, IP_A, MAC_A)
        daemon.wait_log(f"Subnet added: {SUBNET}")
    assert daemon.is_running


# DirectRouting


def direct_routes(host: Host) -> dict[str, str]:
    """Return the gateways of flanneld's routes through eth0."""
    found = routes(host, "proto", "102", "dev", "eth0")
    assert all(route["flags"] == [] for route in found)
    return {route["dst"]: route["gateway"] for route in found}


def move_behind_router(lab: Lab, host: Host) -> None:
    """Give a host an address of another network, with the bridge's namespace as the router."""
    lab.underlay.ip("addr add 10.98.0.254/24 dev br0")
    for key in ("all", "br0"):
        lab.underlay.set_sysctl(f"net/ipv4/conf/{key}/send_redirects", "0")
    lab.underlay.set_sysctl("net/ipv4/ip_forward", "1")
    host.address = IPv4Address(f"10.98.0.{host.number}")
    host.ip(
        "addr flush dev eth0",
        f"addr add {host.address}/24 dev eth0",
        "route add default via 10.98.0.254",
    )


def test_direct_routing_where_the_peer_is_on_link_and_vxlan_elsewhere(make_lab: MakeLab) -> None:
    lab = make_lab(3)
    put_keys(lab, DirectRouting=True)
    one, two, three = lab.hosts
    move_behind_router(lab, three)
    daemons = start(*lab.hosts)
    near, direct = daemons[:2], daemons[2:]
    for daemon, other in (near, near[::-1]):
        host = daemon.host
        wait_entries(host, mesh(direct, host))
        assert direct_routes(host) == {str(other.subnet()): str(other.host.address)}
    wait_entries(three, mesh(daemons, three))
    assert direct_routes(three) == {}
    start_containers(lab.hosts)
    a, b, c = (host.containers[0] for host in lab.hosts)
    for target in (b, c):
        assert a.ping(target.address, 3).lost == 0
        tcp_both_ways(target, a, a.address, 1 << 20)
    # With no vxlan at all, the direct way is left.
    one.run(["iptables", "-A", "OUTPUT", "-p", "udp", "--dport", "8472", "-j", "DROP"])
    assert a.ping(b.address, 3).lost == 0
    assert a.ping(c.address, 3, deadline=0.3).lost == 3
    assert the_link(two)["mtu"] == two.subnet_env().mtu == 1450


def test_what_is_on_link_is_followed(make_lab: MakeLab) -> None:
    """The external interface gets another address, or loses it."""
    lab, host, daemon = alone(make_lab, DirectRouting=True)
    with client_of(lab) as client:
        put_peer(client, SUBNET, "10.99.0.7", MAC_A)
    wait_entries(host, of_peers([(SUBNET, "10.99.0.7", MAC_A)]))
    assert direct_routes(host) == {}
    for _ in range(2):
        host.ip("addr add 10.99.0.1/24 dev eth0")
        wait_entries(host, [])
        assert direct_routes(host) == {SUBNET: "10.99.0.7"}
        host.ip("addr del 10.99.0.1/24 dev eth0")
        wait_entries(host, of_peers([(SUBNET, "10.99.0.7", MAC_A)]))
        assert direct_routes(host) == {}
    assert daemon.is_running


def test_direct_routing_switched_on_and_off_leaves_nothing_behind(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    one = lab.hosts[0]
    start_containers(lab.hosts)
    near, far = (host.containers[0] for host in lab.hosts)
    by_vxlan = mesh(daemons, one)
    directly = {str(daemons[1].subnet()): str(daemons[1].host.address)}
    for direct in (True, False):
        put_keys(lab, DirectRouting=direct)
        for daemon in daemons:
            daemon.kill9()
            daemon.start()
        for daemon in daemons:
            daemon.wait_ready()
        wait_entries(one, [] if direct else by_vxlan)
        assert direct_routes(one) == (directly if direct else {})
        assert near.ping(far.address, 3).lost == 0


def test_a_direct_route_follows_its_peer(make_lab: MakeLab) -> None:
    lab, host, _ = alone(make_lab, DirectRouting=True)
    far = "192.0.2.9"
    with client_of(lab) as client:
        for ip in (IP_A, IP_B, far, IP_A):
            put_peer(client, SUBNET, ip, MAC_A)
            wanted = {} if ip == far else {SUBNET: ip}
            eventually(partial(_has_direct_routes, host, wanted), PATIENCE, f"the move to {ip}")
            wait_entries(host, of_peers([(SUBNET, ip, MAC_A)] if ip == far else []))


def _has_direct_routes(host: Host, wanted: dict[str, str]) -> bool:
    return direct_routes(host) == wanted


# Behind NAT


def test_a_public_ip_of_its_own_is_for_the_peers_only(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    put_keys(lab)
    daemon = start(lab.hosts[0], extra=("--public-ip=198.51.100.7",))[0]
    assert leases(lab)[str(daemon.subnet())].json()["PublicIP"] == "198.51.100.7"
    data = the_link(lab.hosts[0])["linkinfo"]["info_data"]
    assert data["local"] == "10.97.0.1"
    assert addresses(lab.hosts[0]) == [f"{daemon.subnet().network_address}/32"]
