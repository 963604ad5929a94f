"""A daemon that ends and comes back: what it leaves, adopts, sweeps and never touches."""

from ipaddress import IPv4Network
from typing import Any

import pytest
from network import (
    PATIENCE,
    MakeLab,
    Pings,
    RouteMonitor,
    client_of,
    key_of,
    leases,
    mesh,
    peer_routes,
    put_config,
    routes,
    running,
    start,
    value_of,
    wait_meshed,
    wait_routes,
)

from lab import Flanneld, Host

# Routes that are none of flanneld's business: inside and outside Network, of all sorts, and some
# that carry its protocol number but lie outside its Network or are not in the main table.
FOREIGN = (
    "10.5.240.0/24 via 10.97.0.240 proto static",
    "10.5.241.0/24 via 10.97.0.241 proto boot",
    "10.5.242.0/24 via 10.97.0.242 proto bgp metric 20",
    "blackhole 10.5.243.0/24 proto static",
    "10.5.0.0/16 via 10.97.0.244 proto zebra",
    "10.5.240.0/24 via 10.97.0.245 proto static metric 100",
    "10.5.245.0/24 via 10.97.0.246 proto 102 table 77",
    "172.30.1.0/24 via 10.97.0.247 proto static",
    "10.6.1.0/24 via 10.97.0.248 proto 102",
    "10.4.0.0/15 via 10.97.0.249 proto 102",
)


def add_foreign(host: Host) -> list[dict[str, Any]]:
    # Not as one batch: there a name after a number is read as that number (iproute2 6.1).
    for route in FOREIGN:
        host.ip(f"route add {route}")
    return foreign(host)


def foreign(host: Host) -> list[dict[str, Any]]:
    """Return all routes of all tables but those to peers."""
    peers = peer_routes(host)
    everything = routes(host, "table", "all")
    kept = [r for r in everything if r["dst"] not in peers or r["dst"] in ("10.6.1.0/24",)]
    return sorted(kept, key=str)


def end(daemon: Flanneld, how: str) -> None:
    if how == "SIGTERM":
        assert daemon.terminate(PATIENCE) == 0
    else:
        daemon.kill9()


@pytest.mark.parametrize("how", ["SIGTERM", "kill -9"])
def test_a_restart_keeps_the_subnet_and_loses_no_packet(make_lab: MakeLab, how: str) -> None:
    lab, daemons = running(make_lab, 2)
    daemon, peer = daemons
    subnet, text = daemon.subnet(), daemon.host.subnet_file.read_text()
    lease = leases(lab)[str(subnet)]
    with Pings(lab.hosts) as pings:
        monitors = [RouteMonitor(host) for host in lab.hosts]
        for _ in range(2):
            end(daemon, how)
            assert peer_routes(daemon.host) == mesh(daemons, daemon.host)
            pings.go_on(10)
            daemon.start()
            daemon.wait_ready()
            pings.go_on(10)
    assert daemon.subnet() == subnet
    assert daemon.host.subnet_file.read_text() == text
    assert leases(lab)[str(subnet)].created_index == lease.created_index
    # Adopted: the routes stood still, neither deleted nor written again.
    for monitor in monitors:
        assert monitor.lines() == []
    assert peer.is_running
    assert "Subnet removed" not in peer.log()


def known(daemons: list[Flanneld]) -> set[str]:
    return {str(daemon.subnet()) for daemon in daemons}


def test_without_its_subnet_file_the_host_finds_its_lease(make_lab: MakeLab) -> None:
    """After a reboot /run is empty."""
    lab, daemons = running(make_lab, 2)
    daemon = daemons[0]
    subnet = daemon.subnet()
    daemon.kill9()
    daemon.host.subnet_file.unlink()
    daemon.host.ip("route flush proto 102")
    daemon.start()
    daemon.wait_ready()
    assert daemon.subnet() == subnet
    assert len(leases(lab)) == 2
    wait_meshed(daemons)


def test_without_its_lease_the_host_takes_the_subnet_of_its_file(make_lab: MakeLab) -> None:
    """After a night switched off the lease is gone, but the containers still have addresses."""
    lab, daemons = running(make_lab, 1)
    (daemon,) = daemons
    subnet = daemon.subnet()
    daemon.terminate()
    with client_of(lab) as client:
        client.delete(key_of(subnet))
    daemon.start()
    daemon.wait_ready()
    assert daemon.subnet() == subnet
    assert leases(lab)[str(subnet)].value == value_of("10.97.0.1")
    daemon.wait_log(r"Found previously leased subnet \(.*\), reusing")


def test_a_peer_that_left_meanwhile_is_swept_and_one_that_moved_is_followed(
    make_lab: MakeLab,
) -> None:
    lab, daemons = running(make_lab, 3)
    daemon, stays, leaves = daemons
    gone = leaves.subnet()
    with client_of(lab) as client:
        client.put(key_of("10.5.77.0/24"), value_of("10.97.0.77"), ttl=100)
        everybody = mesh(daemons, daemon.host)
        wait_routes(daemon.host, everybody | {"10.5.77.0/24": "10.97.0.77"})
        daemon.kill9()
        leaves.terminate()
        client.delete(key_of(gone))
        client.put(key_of("10.5.77.0/24"), value_of("10.97.0.78"), ttl=100)
    monitor = RouteMonitor(daemon.host)
    daemon.start()
    daemon.wait_ready()
    # By the time it says READY=1, and without a gap for the one that stays.
    there = {str(stays.subnet()): str(stays.host.address), "10.5.77.0/24": "10.97.0.78"}
    assert peer_routes(daemon.host) == there | {str(gone): str(leaves.host.address)}
    # Not at once: the store might have lost its lease.
    wait_routes(daemon.host, there, 2 * PATIENCE)
    assert [line.split()[1] for line in monitor.deleted()] == [str(gone)]
    daemon.wait_log(f"Removed stale route to {gone}")


def test_foreign_routes_are_never_touched(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab)
    one, two = lab.hosts
    before = add_foreign(one)
    assert len(before) >= len(FOREIGN)
    monitor = RouteMonitor(one)
    daemons = start(one, two)
    wait_routes(one, mesh(daemons, one) | outside())
    daemons[0].terminate()
    daemons[0].start()
    daemons[0].wait_ready()
    wait_routes(one, mesh(daemons, one) | outside())
    # A change of its own routes makes the daemon compare everything once more.
    one.ip("route flush proto 102 root 10.5.0.0/16")
    wait_routes(one, mesh(daemons, one) | outside())
    assert [route for route in foreign(one) if route["dst"] not in mesh(daemons, one)] == before
    assert {line.split()[1] for line in monitor.deleted()} == {str(daemons[1].subnet())}


def outside() -> dict[str, str]:
    """Return those foreign routes of the main table that carry flanneld's protocol number."""
    return {"10.6.1.0/24": "10.97.0.248", "10.4.0.0/15": "10.97.0.249"}


def test_a_second_flanneld_on_the_host_is_not_disturbed(make_lab: MakeLab) -> None:
    """Another prefix, subnet file and Network: two networks side by side, in any order."""
    lab, first = running(make_lab, 2)
    with client_of(lab) as client:
        client.put("/two/config", '{"Network":"10.9.0.0/16","Backend":{"Type":"host-gw"}}')
    second = [
        Flanneld(host, "--etcd-prefix=/two", f"--subnet-file={host.directory}/two.env")
        for host in lab.hosts
    ]
    subnets = []
    for daemon in second:
        daemon.start()
        daemon.wait_ready()
        text = (daemon.host.directory / "two.env").read_text()
        address = text.split("FLANNEL_SUBNET=")[1].split()[0]
        subnets.append(str(IPv4Network(address, strict=False)))
    one, two = lab.hosts
    wanted = mesh(first, one) | {subnets[1]: "10.97.0.2"}
    wait_routes(one, wanted)
    wait_routes(two, mesh(first, two) | {subnets[0]: "10.97.0.1"})
    monitor = RouteMonitor(one)
    for daemon in (first[0], second[0], first[0]):
        daemon.kill9()
        daemon.start()
        daemon.wait_ready()
    assert peer_routes(one) == wanted
    assert monitor.lines() == []
    assert first[0].subnet().subnet_of(IPv4Network("10.5.0.0/16"))


def test_a_route_that_the_original_left_is_taken_over_without_a_gap(make_lab: MakeLab) -> None:
    """v0.8.0's routes are `proto boot`, and stay after its end: replaced in place."""
    lab, daemons = running(make_lab, 2)
    (daemon, peer), one = daemons, lab.hosts[0]
    daemon.terminate()
    one.ip(f"route replace {peer.subnet()} via {peer.host.address} dev eth0 proto boot")
    assert peer_routes(one) == {}
    monitor = RouteMonitor(one)
    with Pings(lab.hosts) as pings:
        daemon.start()
        daemon.wait_ready()
        pings.go_on(10)
    assert peer_routes(one) == mesh(daemons, one)
    assert len(routes(one, str(peer.subnet()))) == 1
    assert monitor.deleted() == []


def test_with_another_network_one_start_is_enough(make_lab: MakeLab) -> None:
    """The lease of the former network is given back, its routes are swept, others' are not."""
    lab, daemons = running(make_lab, 2)
    old = [daemon.subnet() for daemon in daemons]
    one = lab.hosts[0]
    one.ip("route add 10.5.240.0/24 via 10.97.0.240 proto static")
    put_config(lab, Network="10.8.0.0/16")
    for daemon in daemons:
        daemon.wait_log("Waiting for .* to renew lease")
        daemon.terminate()
    for daemon in daemons:
        daemon.start()
    for daemon in daemons:
        daemon.wait_ready()
        assert daemon.subnet().subnet_of(IPv4Network("10.8.0.0/16"))
        assert str(daemon.host.subnet_env().network) == "10.8.0.0/16"
    wait_meshed(daemons)
    assert set(leases(lab)) == known(daemons)
    assert not known(daemons) & {str(subnet) for subnet in old}
    assert [route["dst"] for route in routes(one, "root", "10.5.0.0/16")] == ["10.5.240.0/24"]
    daemons[0].wait_log("not compatible with current config, deleting")


def test_with_another_subnet_len_one_start_is_enough(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    put_config(lab, SubnetLen=26)
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        daemon.start()
    for daemon in daemons:
        daemon.wait_ready()
        assert daemon.subnet().prefixlen == 26
    wait_meshed(daemons)
    assert set(leases(lab)) == known(daemons)


def test_an_unknown_backend_type_at_the_restart_ends_it_and_changes_nothing(
    make_lab: MakeLab,
) -> None:
    lab, daemons = running(make_lab, 2)
    daemon = daemons[0]
    text, before = daemon.host.subnet_file.read_text(), leases(lab)
    put_config(lab, Backend={"Type": "carrier-pigeon"})
    daemon.terminate()
    daemon.start()
    assert daemon.wait_exit(2 * PATIENCE) == 1
    errors = [line for line in daemon.log().splitlines() if line.startswith("E")]
    assert len(errors) == 1
    assert "Error fetching backend: unknown backend type: carrier-pigeon" in errors[0]
    assert daemon.ready_after() is None
    assert daemon.host.subnet_file.read_text() == text
    assert peer_routes(daemon.host) == mesh(daemons, daemon.host)
    assert leases(lab).keys() == before.keys()


def test_a_config_that_changes_while_running_is_said_and_not_followed(make_lab: MakeLab) -> None:
    """Noticed with the next look at the store: here one second after a peer has left."""
    lab, daemons = running(make_lab, 1)
    (daemon,) = daemons
    subnet = daemon.subnet()
    with client_of(lab) as client:
        client.put(key_of("10.5.77.0/24"), value_of("10.97.0.77"), ttl=100)
        wait_routes(daemon.host, {"10.5.77.0/24": "10.97.0.77"})
        put_config(lab, Network="10.8.0.0/16")
        client.delete(key_of("10.5.77.0/24"))
    daemon.wait_log("^W.*The network config has changed in the store: restart flanneld", PATIENCE)
    assert daemon.subnet() == subnet
    assert daemon.is_running
