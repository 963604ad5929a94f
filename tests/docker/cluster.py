"""Hosts that run flanneld and docker the way an operator has them run."""

import json
import socket
import sys
import threading
from collections.abc import Callable
from ipaddress import IPv4Address

from lab import Flanneld, Host, Lab, eventually
from lab.docker import DockerContainer, Dockerd
from lab.namespaces import CONFIG_KEY, NETWORK, UNDERLAY
from lab.process import run

MK_DOCKER_OPTS = (sys.executable, "-m", "flanneld.docker_opts")

# Seconds until what is promised within a second or two counts as not done.
PATIENCE = 15.0

MakeCluster = Callable[..., "Cluster"]


class Cluster:
    """A lab whose hosts each have a flanneld, a dockerd with its options, and a container."""

    def __init__(
        self,
        lab: Lab,
        backend: str = "vxlan",
        *,
        docker_first: bool = False,
        nftables: bool = False,
    ) -> None:
        """``docker_first``: docker runs, with a bridge of its own choice, when flanneld starts."""
        self.lab = lab
        self.dockers = [Dockerd(host) for host in lab.hosts]
        self.daemons = [Flanneld(host, "--ip-masq") for host in lab.hosts]
        self.containers: list[DockerContainer] = []
        assert lab.etcd is not None
        with lab.etcd.client() as etcd:
            config = {"Network": NETWORK, "Backend": {"Type": backend}, "EnableNFTables": nftables}
            etcd.put(CONFIG_KEY, json.dumps(config))
        for host in lab.hosts:
            # docker sets FORWARD's policy to DROP only where it is docker that begins to forward.
            host.set_sysctl("net/ipv4/ip_forward", "0")
        if docker_first:
            for docker in self.dockers:
                docker.start()
        for daemon in self.daemons:
            daemon.start()
        for daemon, docker in zip(self.daemons, self.dockers, strict=True):
            daemon.wait_ready(2 * PATIENCE)
            docker.stop()
            docker.start(*options(docker.host))
            self.containers.append(docker.run())


def options(host: Host) -> list[str]:
    """Return what mk-docker-opts makes of the host's subnet file, as a start script reads it."""
    output = host.lab.scratch_file(f"{host.label}-docker-options")
    run([*MK_DOCKER_OPTS, "-f", str(host.subnet_file), "-d", str(output), "-c"])
    script = '. "$0" && for option in $DOCKER_OPTS; do echo "$option"; done'
    return run(["sh", "-c", script, str(output)]).stdout.splitlines()


def forward_policy(host: Host) -> str:
    """Return what becomes of a packet that no rule of the FORWARD chain is for."""
    return host.run(["iptables", "-S", "FORWARD"]).stdout.splitlines()[0].split()[-1]


def wait_answer(source: DockerContainer, target: DockerContainer) -> None:
    """Wait until one container answers to the ping of another."""

    def answered() -> bool:
        return source.ping(target.address, 1).lost == 0

    where = f"{target.address} to answer to {source.address}"
    eventually(answered, PATIENCE, where)


class Outside:
    """A web server on the underlay, which has no route to the network. Tells who asked."""

    def __init__(self, lab: Lab) -> None:
        self.address: IPv4Address = UNDERLAY.ip
        address = (str(self.address), 0)
        self._listener = lab.underlay.inside(lambda: socket.create_server(address))
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
