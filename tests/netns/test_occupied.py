"""Where a route to a peer would go there is something already, or the kernel does not want it."""

import pytest
from network import (
    PATIENCE,
    MakeLab,
    client_of,
    count,
    key_of,
    peer_routes,
    put_config,
    routes,
    running,
    start,
    value_of,
    wait_routes,
)

from lab import Flanneld, eventually

SUBNET = "10.5.200.0/24"


@pytest.mark.parametrize(
    ("occupy", "free"),
    [
        pytest.param(
            ["link add br9 type bridge", "addr add 10.5.200.1/24 dev br9", "link set br9 up"],
            ["link del br9"],
            id="the kernel's own to a bridge",
        ),
        pytest.param(
            [f"route add {SUBNET} via 10.97.0.254 proto static"],
            [f"route del {SUBNET}"],
            id="an operator's",
        ),
    ],
)
def test_a_route_that_was_there_before_us_stays(
    make_lab: MakeLab, occupy: list[str], free: list[str]
) -> None:
    """Without the route to its bridge a host would lose its own containers."""
    lab, (daemon,) = running(make_lab, 1)
    (host,) = lab.hosts
    host.ip(*occupy)
    before = routes(host, SUBNET)
    assert len(before) == 1
    with client_of(lab) as client:
        client.put(key_of(SUBNET), value_of("10.97.0.77"), ttl=100)
        daemon.wait_log(
            "Error adding route to 10.5.200.0/24 via 10.97.0.77: in the way is", PATIENCE
        )
        assert routes(host, SUBNET) == before
        # Found by the events, or by the next comparison.
        host.ip(*free)
        wait_routes(host, {SUBNET: "10.97.0.77"})
        client.delete(key_of(SUBNET))
    wait_routes(host, {})
    assert count(daemon, "in the way") == 1


def test_it_stays_when_the_peer_leaves(make_lab: MakeLab) -> None:
    lab, (daemon,) = running(make_lab, 1)
    (host,) = lab.hosts
    host.ip(f"route add {SUBNET} via 10.97.0.254 proto static")
    before = routes(host, SUBNET)
    with client_of(lab) as client:
        client.put(key_of(SUBNET), value_of("10.97.0.77"), ttl=100)
        daemon.wait_log("in the way is", PATIENCE)
        client.delete(key_of(SUBNET))
    daemon.wait_log(f"Subnet removed: {SUBNET}", PATIENCE)
    assert routes(host, SUBNET) == before


def test_a_peer_that_moved_out_of_reach_keeps_no_route(make_lab: MakeLab) -> None:
    """Packets must not go to where the lease says they do not belong."""
    lab, (daemon,) = running(make_lab, 1)
    (host,) = lab.hosts
    with client_of(lab) as client:
        client.put(key_of(SUBNET), value_of("10.97.0.77"), ttl=100)
        wait_routes(host, {SUBNET: "10.97.0.77"})
        client.put(key_of(SUBNET), value_of("192.168.9.9"), ttl=100)
        daemon.wait_log("Error adding route to 10.5.200.0/24 via 192.168.9.9", PATIENCE)
        eventually(lambda: peer_routes(host) == {}, PATIENCE, "no route to a peer out of reach")
        client.put(key_of(SUBNET), value_of("10.97.0.77"), ttl=100)
        wait_routes(host, {SUBNET: "10.97.0.77"})


def test_the_config_is_read_again_while_there_is_no_free_subnet(make_lab: MakeLab) -> None:
    """As the error's own advice is to widen it."""
    lab = make_lab(2)
    put_config(lab, SubnetMin="10.5.1.0", SubnetMax="10.5.1.0")
    start(lab.hosts[0])
    waiting = Flanneld(lab.hosts[1]).start()
    waiting.wait_log("out of subnets", PATIENCE)
    put_config(lab)
    waiting.wait_ready(2 * PATIENCE)


def test_a_bridge_that_came_meanwhile_keeps_its_route(make_lab: MakeLab) -> None:
    """The kernel puts it behind ours; when ours goes with the link, without a word, it leads."""
    lab, (daemon,) = running(make_lab, 1)
    (host,) = lab.hosts
    with client_of(lab) as client:
        client.put(key_of(SUBNET), value_of("10.97.0.77"), ttl=100)
        wait_routes(host, {SUBNET: "10.97.0.77"})
        host.ip("link add br9 type bridge", "addr add 10.5.200.1/24 dev br9", "link set br9 up")
        host.ip("link set eth0 down")
        host.ip("link set eth0 up")
        daemon.wait_log("in the way is", PATIENCE)
        client.delete(key_of(SUBNET))
    daemon.wait_log(f"Subnet removed: {SUBNET}", PATIENCE)
    assert [route["dev"] for route in routes(host, SUBNET)] == ["br9"]
