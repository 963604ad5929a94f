"""Whatever somebody does to the kernel's routes, the daemon puts them right."""

import os
import time

import pytest
from network import (
    PATIENCE,
    MakeLab,
    RouteMonitor,
    client_of,
    count,
    key_of,
    mesh,
    peer_routes,
    routes,
    running,
    value_of,
    wait_meshed,
    wait_routes,
)

from lab import Host, eventually
from lab.namespaces import UNDERLAY

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def wait_only_route(host: Host, subnet: str, gateway: str) -> None:
    """Wait until the one route to a subnet is the daemon's."""
    wanted = {
        "dst": subnet,
        "gateway": gateway,
        "dev": "eth0",
        "protocol": "102",
        "flags": [],
    }
    eventually(lambda: routes(host, subnet) == [wanted], PATIENCE, f"one route to {subnet}")


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(["route del {}"], id="deleted"),
        pytest.param(["route replace {} via 10.97.0.99"], id="replaced with another gateway"),
        pytest.param(["route replace blackhole {}"], id="replaced with a blackhole"),
        pytest.param(["route prepend {} via 10.97.0.99"], id="another prepended"),
        pytest.param(["route change {} via 10.97.0.2 proto 102 mtu 1000"], id="given an MTU"),
        pytest.param(["route change {} via 10.97.0.2 proto static"], id="given another protocol"),
        pytest.param(
            ["route replace {} nexthop via 10.97.0.2 nexthop via 10.97.0.3"], id="multipath"
        ),
        pytest.param(
            # Not "add": the daemon may have been quicker.
            ["route del {}", "route replace {} via 10.97.0.99 proto static"],
            id="deleted, other added",
        ),
    ],
)
def test_a_route_spoilt_by_hand_is_put_right(make_lab: MakeLab, what: list[str]) -> None:
    """Within a second."""
    lab, daemons = running(make_lab, 3)
    one, two = lab.hosts[:2]
    subnet = str(daemons[1].subnet())
    for _ in range(2):
        one.ip(*(line.format(subnet) for line in what))
        wait_only_route(one, subnet, str(two.address))
    wait_meshed(daemons)
    daemons[0].wait_log(rf"Route recovered {subnet} : {two.address}")
    # Nothing else moved.
    assert f"{daemons[2].subnet()} : " not in daemons[0].log()


def test_all_routes_flushed_come_back(make_lab: MakeLab) -> None:
    """Within a second, twenty of them as well as one; and the host's others are not ours."""
    lab, (daemon,) = running(make_lab, 1)
    (host,) = lab.hosts
    wanted = {f"10.5.{n}.0/24": f"10.97.0.{n}" for n in range(100, 120)}
    wanted.pop(str(daemon.subnet()), None)
    with client_of(lab) as client:
        for subnet, gateway in wanted.items():
            client.put(key_of(subnet), value_of(gateway), ttl=100)
    wait_routes(host, wanted)
    host.ip("route flush proto 102")
    wait_routes(host, wanted)
    host.ip("route flush root 10.5.0.0/16")
    wait_routes(host, wanted)
    assert count(daemon, "Route recovered") < 100


def test_a_route_of_a_former_peer_written_by_hand_is_swept(make_lab: MakeLab) -> None:
    """Inside Network, with the daemon's number: a leftover of somebody who meant to help."""
    lab, daemons = running(make_lab, 2)
    one = lab.hosts[0]
    one.ip("route add 10.5.250.0/24 via 10.97.0.99 proto 102")
    wait_meshed(daemons)
    daemons[0].wait_log("Removed stale route to 10.5.250.0/24")


def test_the_interface_down_and_up(make_lab: MakeLab) -> None:
    """Taken down it loses all its routes, and the kernel does not say so one by one."""
    lab, daemons = running(make_lab, 3)
    one = lab.hosts[0]
    containers = [host.add_container() for host in lab.hosts[:2]]
    for _ in range(2):
        one.ip("link set eth0 down")
        assert peer_routes(one) == {}
        time.sleep(0.3)
        one.ip("link set eth0 up")
        wait_meshed(daemons)
    eventually(lambda: containers[0].ping(containers[1].address).lost == 0, PATIENCE, "a ping")
    assert daemons[0].is_running
    assert len(daemons[0].log().splitlines()) < 60


def test_the_address_removed_and_given_back(make_lab: MakeLab) -> None:
    """As a DHCP client does it. Without the address the gateways are out of reach."""
    lab, daemons = running(make_lab, 3)
    one = lab.hosts[0]
    for _ in range(2):
        one.ip(f"addr del {one.address}/24 dev eth0")
        assert peer_routes(one) == {}
        time.sleep(0.3)
        one.ip(f"addr add {one.address}/24 dev eth0")
        wait_meshed(daemons)
    assert daemons[0].is_running


def test_the_interface_deleted_and_made_anew(make_lab: MakeLab) -> None:
    """The same name, another index: as when a driver is loaded again."""
    lab, daemons = running(make_lab, 3)
    one = lab.hosts[0]
    containers = [host.add_container() for host in lab.hosts[:2]]
    (before,) = one.ip_json("link", "show", "eth0")
    one.ip("link del eth0")
    assert peer_routes(one) == {}
    time.sleep(0.3)
    lab.underlay.ip(
        # The index of the deleted device must not be used again.
        "link add filler type bridge",
        f"link add p1 type veth peer name eth0 address {before['address']} netns {one.name}",
        "link set p1 master br0 up",
    )
    (after,) = one.ip_json("link", "show", "eth0")
    assert after["ifindex"] != before["ifindex"]
    one.ip(
        f"addr add {one.address}/24 dev eth0",
        "link set eth0 up",
        f"route add default via {UNDERLAY.ip}",
    )
    wait_meshed(daemons)
    eventually(lambda: containers[0].ping(containers[1].address).lost == 0, PATIENCE, "a ping")
    # And it goes on as before, with the new device.
    one.ip("route flush proto 102")
    wait_meshed(daemons)
    with client_of(lab) as client:
        client.put(key_of("10.5.250.0/24"), value_of("10.97.0.99"), ttl=100)
    wait_routes(one, mesh(daemons, one) | {"10.5.250.0/24": "10.97.0.99"})


def test_a_peer_out_of_reach_is_said_once_and_routed_when_it_can_be(make_lab: MakeLab) -> None:
    """Its PublicIP is on no link of ours; the others do not suffer from it."""
    lab, daemons = running(make_lab, 2)
    one = lab.hosts[0]
    with client_of(lab) as client:
        client.put(key_of("10.5.250.0/24"), value_of("192.168.9.9"), ttl=100)
        client.put(key_of("10.5.251.0/24"), value_of("10.97.0.99"), ttl=100)
    reachable = mesh(daemons, one) | {"10.5.251.0/24": "10.97.0.99"}
    wait_routes(one, reachable)
    message = "Error adding route to 10.5.250.0/24 via 192.168.9.9: network is unreachable"
    daemons[0].wait_log(message)
    # Other work, that makes the daemon try everything again, is no reason to repeat it.
    one.ip("route flush proto 102", "addr add 172.30.0.1/24 dev eth0", "link set lo down")
    wait_routes(one, reachable)
    assert count(daemons[0], message) == 1
    # The network of that host becomes reachable: within a second.
    one.ip("addr add 192.168.9.1/24 dev eth0")
    wait_routes(one, reachable | {"10.5.250.0/24": "192.168.9.9"})
    daemons[0].wait_log(r"Route recovered 10\.5\.250\.0/24 : 192\.168\.9\.9")
    assert daemons[0].is_running


def test_a_peer_out_of_reach_that_leaves_is_forgotten(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 1)
    (host,) = lab.hosts
    with client_of(lab) as client:
        client.put(key_of("10.5.250.0/24"), value_of("192.168.9.9"), ttl=100)
        daemons[0].wait_log("Error adding route to 10.5.250.0/24")
        client.delete(key_of("10.5.250.0/24"))
    daemons[0].wait_log("Subnet removed: 10.5.250.0/24")
    monitor = RouteMonitor(host)
    host.ip("addr add 192.168.9.1/24 dev eth0")
    time.sleep(0.5)
    assert [line for line in monitor.lines() if "10.5.250" in line] == []


def test_somebody_who_keeps_deleting_a_route_costs_neither_cpu_nor_disk(make_lab: MakeLab) -> None:
    """Repairs become slower, to two a second, the log with them; in the end the route is there."""
    lab, daemons = running(make_lab, 3)
    one, daemon = lab.hosts[0], daemons[0]
    subnet = str(daemons[1].subnet())
    loop = f"while :; do ip route del {subnet} 2>/dev/null; done"
    before, lines = cpu_seconds(daemon.pid), len(daemon.log().splitlines())
    monitor = RouteMonitor(one)
    vandal = one.popen(["sh", "-c", loop], output=lab.scratch_file("vandal"))
    began = time.monotonic()
    time.sleep(3.0)
    used, elapsed = cpu_seconds(daemon.pid) - before, time.monotonic() - began
    vandal.kill()
    vandal.wait()
    assert 3 <= len(monitor.deleted()) < 30 * elapsed
    assert used < 0.3 * elapsed
    assert len(daemon.log().splitlines()) - lines < 10 * elapsed
    wait_meshed(daemons)
    # Left in peace it is quick again: no deletion is remembered for ever.
    assert str(daemons[2].subnet()) in peer_routes(one)
