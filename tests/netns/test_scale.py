"""Many hosts at once: every lease becomes one route, whatever happens on the way."""

import json
from collections import Counter
from functools import partial

import pytest
from network import (
    PATIENCE,
    MakeLab,
    RouteMonitor,
    client_of,
    etcd_of,
    key_of,
    leases,
    peer_routes,
    put_config,
    routes,
    value_of,
    wait_routes,
)

from lab import Flanneld, Host, Lab, eventually
from lab.etcdv2 import EtcdV2
from lab.process import freeze, thaw

BURST = 500


def peers(count: int, first: int = 0) -> dict[str, str]:
    """Return made-up peers: gateway by subnet, all of them different."""
    numbers = range(first, first + count)
    return {
        f"10.{17 + n // 250}.{n % 250}.0/24": f"172.30.{1 + n // 250}.{n % 250}" for n in numbers
    }


@pytest.fixture
def wide(make_lab: MakeLab) -> tuple[Lab, Host, Flanneld]:
    """One host, in a network for 4,000 of them, that has a link to all their addresses."""
    lab = make_lab(1)
    (host,) = lab.hosts
    put_config(lab, Network="10.16.0.0/12", SubnetLen=24, SubnetMax="10.16.49.0")
    host.ip("addr add 172.30.0.1/16 dev eth0")
    return lab, host, Flanneld(host)


def write(client: EtcdV2, subnets: dict[str, str]) -> None:
    """Write leases as fast as etcd takes them."""
    for subnet, gateway in subnets.items():
        client.put(key_of(subnet), value_of(gateway), ttl=3600)


def added(monitor: RouteMonitor) -> Counter[str]:
    """Return how often each route was written."""
    return Counter(line.split()[0] for line in monitor.lines() if not line.startswith("Deleted "))


Wide = tuple[Lab, Host, Flanneld]


def test_a_burst_of_leases_is_written_to_the_kernel_once_each(wide: Wide) -> None:
    lab, host, daemon = wide
    daemon.start().wait_ready()
    monitor = RouteMonitor(host)
    wanted = peers(BURST)
    with client_of(lab) as client:
        write(client, wanted)
    wait_routes(host, wanted, 2 * PATIENCE)
    assert added(monitor) == dict.fromkeys(wanted, 1)
    assert monitor.deleted() == []
    # A line for each would bury everything else.
    assert daemon.log().count("\n") < 12 + BURST


def test_a_burst_of_comings_and_goings_ends_as_etcd_does(wide: Wide) -> None:
    lab, host, daemon = wide
    daemon.start().wait_ready()
    stay, move, go = peers(150), peers(150, 150), peers(150, 300)
    moved = {subnet: f"172.30.9.{n}" for n, subnet in enumerate(move, 1)}
    with client_of(lab) as client:
        write(client, stay | move)
        for subnet, gateway in go.items():
            client.put(key_of(subnet), value_of(gateway), ttl=3600)
            client.delete(key_of(subnet))
        write(client, moved)
    wait_routes(host, stay | moved, 2 * PATIENCE)


def test_a_burst_with_garbage_in_between_loses_nothing(wide: Wide) -> None:
    lab, host, daemon = wide
    daemon.start().wait_ready()
    monitor = RouteMonitor(host)
    wanted = peers(BURST)
    with client_of(lab) as client:
        for number, (subnet, gateway) in enumerate(wanted.items()):
            client.put(key_of(subnet), value_of(gateway), ttl=3600)
            if number % 5 == 0:
                client.put(f"/coreos.com/network/subnets/foo{number}", value_of(gateway))
                client.put(f"/coreos.com/network/subnets/10.30.{number % 250}.0-24", "garbage")
                client.put(f"/elsewhere/{number}", "x")
                client.put(f"/coreos.com/network/subnets/directory/{number}", "x")
    wait_routes(host, wanted, 2 * PATIENCE)
    assert added(monitor) == dict.fromkeys(wanted, 1)
    assert daemon.is_running


def test_a_burst_while_the_daemon_sleeps_through_etcds_history(wide: Wide) -> None:
    """The watch has to start anew in the middle: a snapshot, and no route written twice."""
    lab, host, daemon = wide
    daemon.start().wait_ready()
    monitor = RouteMonitor(host)
    wanted = peers(BURST)
    subnets = list(wanted)
    with client_of(lab) as client:
        write(client, {subnet: wanted[subnet] for subnet in subnets[:200]})
        freeze(daemon.pid)
        write(client, {subnet: wanted[subnet] for subnet in subnets[200:300]})
        for number in range(1100):
            client.put("/elsewhere/key", str(number))
        write(client, {subnet: wanted[subnet] for subnet in subnets[300:400]})
        thaw(daemon.pid)
        write(client, {subnet: wanted[subnet] for subnet in subnets[400:]})
    wait_routes(host, wanted, 2 * PATIENCE)
    assert added(monitor) == dict.fromkeys(wanted, 1)
    assert monitor.deleted() == []


def test_a_burst_with_a_restart_of_etcd_in_the_middle(wide: Wide) -> None:
    lab, host, daemon = wide
    daemon.start().wait_ready()
    monitor = RouteMonitor(host)
    wanted = peers(BURST)
    subnets = list(wanted)
    etcd = etcd_of(lab)
    with etcd.client() as client:
        write(client, {subnet: wanted[subnet] for subnet in subnets[:250]})
        etcd.restart()
        write(client, {subnet: wanted[subnet] for subnet in subnets[250:]})
    wait_routes(host, wanted, 2 * PATIENCE)
    assert added(monitor) == dict.fromkeys(wanted, 1)
    assert monitor.deleted() == []


def test_a_thousand_peers_are_there_when_it_is_ready(wide: Wide) -> None:
    """They were there before the start; and what is left of others goes in a while."""
    lab, host, daemon = wide
    wanted = peers(1000)
    with client_of(lab) as client:
        write(client, wanted)
    daemon.start().wait_ready(2 * PATIENCE)
    assert peer_routes(host) == wanted
    assert daemon.log().count("\n") < 30
    # At a restart each is recognised: nothing is written, only what is stale goes.
    stale = peers(50, 1000)
    host.ip(*(f"route add {subnet} via {via} proto 102" for subnet, via in stale.items()))
    with client_of(lab) as client:
        gone = list(wanted)[:100]
        for subnet in gone:
            client.delete(key_of(subnet))
            del wanted[subnet]
    wait_routes(host, wanted, 2 * PATIENCE)
    daemon.kill9()
    monitor = RouteMonitor(host)
    host.ip(*(f"route add {subnet} via {via} proto 102" for subnet, via in stale.items()))
    daemon.start().wait_ready(2 * PATIENCE)
    assert peer_routes(host) == wanted | stale
    wait_routes(host, wanted, 2 * PATIENCE)
    assert added(monitor) == dict.fromkeys(stale, 1)
    assert {line.split()[1] for line in monitor.deleted()} == set(stale)


def test_so_many_routes_have_scopes_of_which_nobody_needs_to_know(wide: Wide) -> None:
    """The kernel's time stays linear by them. What is done by hand finds the routes as ever."""
    lab, host, daemon = wide
    wanted = peers(1000)
    with client_of(lab) as client:
        write(client, wanted)
    daemon.start().wait_ready(2 * PATIENCE)
    assert peer_routes(host) == wanted
    shown = json.loads(host.run(["ip", "-json", "route", "show", "proto", "102"]).stdout)
    scopes = Counter(route.get("scope", "global") for route in shown)
    # 200 of them, and in none much more than its share of 5.
    assert len(scopes) > 150
    assert max(scopes.values()) < 20
    odd = next(route["dst"] for route in shown if route.get("scope"))
    foreign, other = wanted[odd], next(via for dst, via in wanted.items() if dst != odd)
    address = odd.replace(".0/24", ".7")
    assert f" via {foreign} " in host.run(["ip", "route", "get", address]).stdout
    monitor = RouteMonitor(host)
    for number, by_hand in enumerate(
        (
            f"route replace {odd} via {other}",
            f"route del {odd} via {foreign}",
            f"route change {odd} via {other} proto 102",
        ),
        1,
    ):
        host.ip(by_hand)
        # The change, and what puts it right.
        eventually(partial(_has_lines, monitor, 2 * number), PATIENCE, by_hand)
        assert peer_routes(host) == wanted
    with client_of(lab) as client:
        client.delete(key_of(odd))
    del wanted[odd]
    wait_routes(host, wanted)


def _has_lines(monitor: RouteMonitor, count: int) -> bool:
    return len(monitor.lines()) >= count


def test_a_thousand_routes_that_vanish_come_back(wide: Wide) -> None:
    """The device goes down and takes all along, without a word about each."""
    lab, host, daemon = wide
    wanted = peers(1000)
    with client_of(lab) as client:
        write(client, wanted)
    daemon.start().wait_ready(2 * PATIENCE)
    host.ip("link set eth0 down", "link set eth0 up")
    wait_routes(host, wanted, 2 * PATIENCE)
    host.ip("route flush proto 102")
    wait_routes(host, wanted, 2 * PATIENCE)
    assert daemon.log().count("\n") < 100
    assert len(routes(host)) == len(wanted) + 2


def test_many_hosts_start_at_once(make_lab: MakeLab) -> None:
    """Ten real daemons; ten leases, ninety routes."""
    lab = make_lab(10)
    put_config(lab)
    daemons = [Flanneld(host).start() for host in lab.hosts]
    for daemon in daemons:
        daemon.wait_ready(4 * PATIENCE)
    assert len(leases(lab)) == 10
    for daemon in daemons:
        wanted = {
            str(other.subnet()): str(other.host.address) for other in daemons if other is not daemon
        }
        wait_routes(daemon.host, wanted)
    eventually(lambda: all(daemon.is_running for daemon in daemons), 1.0, "all still running")
