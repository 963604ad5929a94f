"""Containers started by `docker run` on two hosts, with both backends."""

import http.client
import socket
import threading
from functools import partial
from ipaddress import IPv4Address

from lab import Lab, eventually
from lab.docker import HTTP_PORT, DockerContainer

from .cluster import Cluster, options

PATIENCE = 15.0


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
        rules = docker.host.run(["iptables", "-S", "FORWARD"]).stdout.splitlines()
        assert rules[0] == "-P FORWARD DROP"
    for source, target in ((one, two), (two, one)):
        eventually(partial(_answers, source, target), PATIENCE, "an answer to a ping")
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
        (cluster.lab.underlay, "10.97.0.254"),
        (cluster.lab.hosts[1], str(cluster.lab.hosts[1].address)),
    ):
        body = asker.inside(lambda: _get(docker.host.address, 8081, "/cgi-bin/peer"))
        assert body == address


def _answers(source: DockerContainer, target: DockerContainer) -> bool:
    return source.ping(target.address, 1).lost == 0


def _get(host: IPv4Address, port: int, path: str) -> str:
    connection = http.client.HTTPConnection(str(host), port, timeout=5.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


class Outside:
    """A web server on the underlay, which has no route to the network. Tells who asked."""

    def __init__(self, lab: Lab) -> None:
        self.address = "10.97.0.254"
        self._listener = lab.underlay.inside(lambda: socket.create_server((self.address, 0)))
        self._listener.settimeout(PATIENCE)
        self.url = f"http://{self.address}:{self._listener.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "Outside":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(2 * PATIENCE)
        self._listener.close()

    def _serve(self) -> None:
        try:
            connection, (peer, _) = self._listener.accept()
        except TimeoutError:
            return
        with connection:
            connection.settimeout(PATIENCE)
            connection.recv(4096)
            connection.sendall(f"HTTP/1.0 200 OK\r\n\r\n{peer}".encode())
