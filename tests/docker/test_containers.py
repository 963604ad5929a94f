"""Containers started by `docker run` on two hosts, with both backends."""

import http.client
from ipaddress import IPv4Address

from lab.docker import HTTP_PORT
from lab.namespaces import UNDERLAY

from .cluster import Cluster, Outside, forward_policy, options, wait_answer


def test_docker_has_the_options_of_the_leased_subnet(cluster: Cluster) -> None:
    for docker, container in zip(cluster.dockers, cluster.containers, strict=True):
        env = docker.host.subnet_env()
        assert env.ipmasq
        # flanneld masquerades, so docker must not.
        assert options(docker.host) == [
            f"--bip={env.subnet}",
            "--ip-masq=false",
            f"--mtu={env.mtu}",
        ]
        assert container.address == env.subnet.ip + 1
        assert container.mtu() == env.mtu


def test_they_ping_each_other_though_docker_drops_what_is_forwarded(cluster: Cluster) -> None:
    one, two = cluster.containers
    for docker in cluster.dockers:
        assert forward_policy(docker.host) == "DROP"
    for source, target in ((one, two), (two, one)):
        wait_answer(source, target)
        result = source.ping(target.address, 5)
        assert result.lost == 0, result.output
        # Two hosts routed it.
        assert "ttl=62" in result.output


def test_a_container_sees_the_own_address_of_one_on_another_host(cluster: Cluster) -> None:
    one, two = cluster.containers
    assert one.seen_by(two) == str(one.address)
    assert two.seen_by(one) == str(two.address)


def test_two_containers_of_one_host_see_each_other(cluster: Cluster) -> None:
    one = cluster.containers[0]
    other = cluster.dockers[0].run()
    assert one.seen_by(other) == str(one.address)
    assert other.seen_by(cluster.containers[1]) == str(other.address)


def test_outside_the_network_a_container_is_seen_as_its_host(cluster: Cluster) -> None:
    for docker, container in zip(cluster.dockers, cluster.containers, strict=True):
        with Outside(cluster.lab) as outside:
            assert container.fetch(outside.url) == str(docker.host.address)
        assert container.ping(outside.address).lost == 0


def test_a_host_reaches_the_containers_of_all_hosts(cluster: Cluster) -> None:
    for host in cluster.lab.hosts:
        for container in cluster.containers:
            result = host.ping(container.address, 3)
            assert result.lost == 0, result.output


def test_a_published_port_is_reached_from_outside_and_sees_who_asks(cluster: Cluster) -> None:
    docker = cluster.dockers[0]
    docker.run(f"--publish=8081:{HTTP_PORT}")
    for asker, address in (
        (cluster.lab.underlay, str(UNDERLAY.ip)),
        (cluster.lab.hosts[1], str(cluster.lab.hosts[1].address)),
    ):
        body = asker.inside(lambda: _get(docker.host.address, 8081, "/cgi-bin/peer"))
        assert body == address


def _get(host: IPv4Address, port: int, path: str) -> str:
    connection = http.client.HTTPConnection(str(host), port, timeout=5.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()
