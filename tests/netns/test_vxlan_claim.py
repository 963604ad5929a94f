"""Two daemons with one VNI on a host: the device is the first's, and nothing of it is touched."""

import json

import pytest
from network import PATIENCE, MakeLab, Pings, RouteMonitor, client_of
from overlay import addresses, entries, mac_of, mesh, problems, running, the_link

from lab import Flanneld, Host, Lab


def another(lab: Lab, host: Host, **keys: object) -> Flanneld:
    """Return a daemon with an etcd prefix, a subnet file and a Network of its own."""
    config = {"Network": "10.9.0.0/16", "Backend": {"Type": "vxlan", **keys}}
    with client_of(lab) as client:
        client.put("/two/config", json.dumps(config))
    return Flanneld(host, "--etcd-prefix=/two", f"--subnet-file={host.directory / 'two.env'}")


def state(host: Host) -> tuple[object, ...]:
    return (the_link(host)["ifindex"], mac_of(host), addresses(host), entries(host))


@pytest.mark.parametrize("keys", [{}, {"Port": 8473}, {"GBP": True}], ids=["same", "port", "GBP"])
def test_the_second_ends_and_nothing_of_the_firsts_is_touched(
    make_lab: MakeLab, keys: dict[str, object]
) -> None:
    """Where the device fits the second's config, and where it would be made anew for it."""
    lab, daemons = running(make_lab)
    first, host = daemons[0], lab.hosts[0]
    before, said = state(host), problems(first)
    with Pings(lab.hosts):
        routes = RouteMonitor(host)
        second = another(lab, host, **keys).start()
        assert second.wait_exit(PATIENCE) == 1
    assert problems(second) == [
        f"Error registering network: flannel.1 belongs to another flanneld on this host (process"
        f" {first.pid}): set another VNI in the network config, or stop the other daemon"
    ]
    assert second.ready_after() is None
    assert state(host) == before
    assert routes.lines() == []
    assert problems(first) == said
    with client_of(lab) as client:
        assert [node.key for node in client.list("/two").values()] == ["/two/config"]
    assert not (host.directory / "two.env").exists()
    # With the remedy it runs.
    another(lab, host, VNI=2)
    second.start().wait_ready(PATIENCE)
    assert state(host) == before


def test_when_the_first_has_ended_the_second_takes_the_device(make_lab: MakeLab) -> None:
    lab, (first,) = running(make_lab, 1)
    (host,) = lab.hosts
    second = another(lab, host)
    first.kill9()
    second.start().wait_ready(PATIENCE)
    assert first.start().wait_exit(PATIENCE) == 1
    assert f"belongs to another flanneld on this host (process {second.pid})" in problems(first)[-1]
    assert problems(second) == []


def test_a_start_waits_for_one_that_is_just_ending(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    first, host = daemons[0], lab.hosts[0]
    before = the_link(host)["ifindex"]
    successor = Flanneld(host).start()
    successor.wait_log("VXLAN config", PATIENCE)
    first.kill9()
    successor.wait_ready(PATIENCE)
    assert problems(successor) == []
    assert the_link(host)["ifindex"] == before
    assert entries(host) == mesh(daemons, host)


def test_the_other_hosts_daemon_does_not_matter_nor_one_with_another_backend(
    make_lab: MakeLab,
) -> None:
    lab, daemons = running(make_lab)
    host = lab.hosts[0]
    with client_of(lab) as client:
        client.put("/two/config", '{"Network":"10.9.0.0/16","Backend":{"Type":"host-gw"}}')
    file = host.directory / "two.env"
    second = Flanneld(host, "--etcd-prefix=/two", f"--subnet-file={file}").start()
    second.wait_ready(PATIENCE)
    assert [problems(each) for each in (*daemons, second)] == [[], [], []]
