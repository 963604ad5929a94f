"""Hosts join the network and leave it, as seen on the wire, in the kernel and in etcd."""

import stat

from network import (
    LEASE_SECONDS,
    PATIENCE,
    MakeLab,
    client_of,
    etcd_of,
    key_of,
    leases,
    mesh,
    put_config,
    routes,
    running,
    start,
    value_of,
    wait_meshed,
    wait_routes,
)

from lab import Flanneld, eventually


def test_a_third_host_joins_and_every_container_reaches_every_other(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    for host in lab.hosts:
        host.add_container()
    third = lab.add_host()
    daemons += start(third)
    third.add_container()
    wait_meshed(daemons)
    containers = [container for host in lab.hosts for container in host.containers]
    for source in containers:
        for target in containers:
            if source is not target:
                result = source.ping(target.address, 3)
                assert result.lost == 0, f"{source.label} to {target.label}: {result.output}"
                # Routed by both hosts, with the sender's own address: nothing masquerades.
                hops = 64 if source.host is target.host else 62
                assert f"ttl={hops}" in result.output


def test_keys_values_and_subnet_files_are_byte_for_byte_the_originals(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    found = leases(lab)
    assert set(found) == {str(daemon.subnet()) for daemon in daemons}
    for daemon in daemons:
        subnet = daemon.subnet()
        node = found[str(subnet)]
        assert node.key == f"/coreos.com/network/subnets/{subnet.network_address}-24"
        assert node.value == (
            f'{{"PublicIP":"10.97.0.{daemon.host.number}","BackendType":"host-gw"}}'
        )
        assert node.ttl is not None
        assert LEASE_SECONDS - 120 < node.ttl <= LEASE_SECONDS
        file = daemon.host.subnet_file
        assert file.read_text() == (
            "FLANNEL_NETWORK=10.5.0.0/16\n"
            f"FLANNEL_SUBNET={subnet.network_address + 1}/24\n"
            "FLANNEL_MTU=1500\n"
            "FLANNEL_IPMASQ=false\n"
        )
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
        # No temporary file stays beside it, but the daemon's lock, which is nobody else's to hold.
        assert {path.name for path in file.parent.iterdir()} == {"subnet.env", ".subnet.env.lock"}
        assert stat.S_IMODE((file.parent / ".subnet.env.lock").stat().st_mode) == 0o600


def test_a_route_is_as_the_originals_but_for_its_mark(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    one = lab.hosts[0]
    (route,) = routes(one, str(daemons[1].subnet()))
    assert route == {
        "dst": str(daemons[1].subnet()),
        "gateway": "10.97.0.2",
        "dev": "eth0",
        "protocol": "102",
        "flags": [],
    }


def test_a_lease_deleted_in_etcd_takes_its_route_from_all_hosts(make_lab: MakeLab) -> None:
    """A host that left: its route is gone a second or two after its lease."""
    lab, daemons = running(make_lab, 3)
    leaver = daemons.pop()
    gone = leaver.subnet()
    leaver.terminate()
    # The end of the daemon is not the end of the lease.
    assert str(gone) in leases(lab)
    wait_routes(lab.hosts[0], mesh([*daemons, leaver], lab.hosts[0]))
    with client_of(lab) as client:
        assert client.delete(key_of(gone))
    wait_meshed(daemons)
    for daemon in daemons:
        daemon.wait_log(f"Subnet removed: {gone}")


def test_a_peers_lease_that_expires_takes_its_route_along(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 1)
    (host,) = lab.hosts
    with client_of(lab) as client:
        client.put(key_of("10.5.99.0/24"), value_of("10.97.0.77"), ttl=2)
    wait_routes(host, {"10.5.99.0/24": "10.97.0.77"})
    # etcd looks for expired keys about twice a second.
    wait_routes(host, {})
    assert daemons[0].is_running


def test_a_peer_that_changes_its_address_is_followed(make_lab: MakeLab) -> None:
    """One change of the route, not a gap: the old route is replaced."""
    lab, daemons = running(make_lab, 1)
    (host,) = lab.hosts
    with client_of(lab) as client:
        client.put(key_of("10.5.99.0/24"), value_of("10.97.0.77"), ttl=100)
        wait_routes(host, {"10.5.99.0/24": "10.97.0.77"})
        client.put(key_of("10.5.99.0/24"), value_of("10.97.0.78"), ttl=100)
    wait_routes(host, {"10.5.99.0/24": "10.97.0.78"})
    assert "Subnet removed" not in daemons[0].log()


def test_a_peer_of_another_backend_type_gets_no_route_and_one_warning(make_lab: MakeLab) -> None:
    lab, (daemon,) = running(make_lab, 1)
    value = '{"PublicIP":"10.97.0.77","BackendType":"vxlan","BackendData":{"VtepMAC":"1:2"}}'
    with client_of(lab) as client:
        client.put(key_of("10.5.99.0/24"), value_of("10.97.0.77"), ttl=100)
        wait_routes(lab.hosts[0], {"10.5.99.0/24": "10.97.0.77"})
        for _ in range(3):
            client.put(key_of("10.5.99.0/24"), value, ttl=100)
        client.put(key_of("10.5.98.0/24"), value_of("10.97.0.78"), ttl=100)
    wait_routes(lab.hosts[0], {"10.5.98.0/24": "10.97.0.78"})
    assert daemon.log().count("Ignoring non-host-gw subnet(10.5.99.0/24): type=vxlan") == 1


def test_what_etcd_says_cannot_steer_anything_but_the_network(make_lab: MakeLab) -> None:
    """Garbage, foreign keys, ranges outside Network, the host's own range: logged and left out."""
    lab, (daemon,) = running(make_lab, 1)
    (host,) = lab.hosts
    own = daemon.subnet()
    before = routes(host)
    bad = {
        "10.5.99.0-24": "garbage",
        "10.5.98.0-24": '{"PublicIP":"fd00::1","BackendType":"host-gw"}',
        "10.5.97.0-24": '{"BackendType":"host-gw"}',
        "10.5.96.7-24": value_of("10.97.0.70"),
        "10.6.1.0-24": value_of("10.97.0.71"),
        "0.0.0.0-0": value_of("10.97.0.72"),
        "10.5.0.0-16": value_of("10.97.0.73"),
        f"{own.network_address}-25": value_of("10.97.0.74"),
        "10.5.94.0-24": value_of(host.address),
        "10.5.93.0-24": value_of("127.0.0.1"),
        "foo": value_of("10.97.0.75"),
        "10.97.0.0-24": value_of("10.97.0.76"),
    }
    with client_of(lab) as client:
        for name, value in bad.items():
            client.put(f"/coreos.com/network/subnets/{name}", value, ttl=100)
        client.put("/coreos.com/network/subnets/directory/10.5.92.0-24", value_of("10.97.0.7"))
        client.put("/coreos.com/network/other", "x")
        client.put(key_of("10.5.50.0/24"), value_of("10.97.0.50"), ttl=100)
    wait_routes(host, {"10.5.50.0/24": "10.97.0.50"})
    assert [route for route in routes(host) if route["dst"] != "10.5.50.0/24"] == before
    for name in bad:
        assert daemon.log().count(f"Ignoring bad subnet node {name}: ") == 1
    assert daemon.is_running
    # The same at a start, when all of it is there already.
    daemon.terminate()
    host.ip("route flush proto 102")
    daemon.start()
    daemon.wait_ready()
    wait_routes(host, {"10.5.50.0/24": "10.97.0.50"})
    assert daemon.subnet() == own
    assert [route for route in routes(host) if route["dst"] != "10.5.50.0/24"] == before


def test_a_directory_of_leases_deleted_at_one_stroke_costs_nothing(make_lab: MakeLab) -> None:
    """All leases gone: everybody takes back his own, and the routes stay meanwhile."""
    lab, daemons = running(make_lab, 3)
    subnets = {str(daemon.subnet()) for daemon in daemons}
    with client_of(lab) as client:
        assert client.delete("/coreos.com/network/subnets", recursive=True)
    eventually(lambda: set(leases(lab)) == subnets, PATIENCE, "all leases back")
    wait_meshed(daemons)
    assert not any("Subnet removed" in daemon.log() for daemon in daemons)


def test_a_second_network_under_another_prefix_does_not_mix(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    third = lab.add_host()
    etcd = etcd_of(lab)
    with etcd.client() as client:
        client.put("/other/config", '{"Network":"10.9.0.0/16","Backend":{"Type":"host-gw"}}')
    (other,) = [Flanneld(third, "--etcd-prefix=/other").start()]
    other.wait_ready()
    assert other.subnet().subnet_of(other.host.subnet_env().network)
    wait_routes(third, {})
    wait_meshed(daemons)
    with etcd.client() as client:
        assert list(client.list("/other/subnets")) == [f"{other.subnet().network_address}-24"]


def test_a_config_that_names_the_smallest_networks_is_served(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab, Network="10.5.0.0/28", SubnetLen=30, SubnetMin="10.5.0.4")
    daemons = start(*lab.hosts)
    wait_meshed(daemons)
    assert {daemon.subnet().prefixlen for daemon in daemons} == {30}
    one, two = (host.add_container() for host in lab.hosts)
    assert one.ping(two.address, 3).lost == 0
