"""Hosts that run flanneld and docker the way an operator has them run."""

import sys

from lab import Flanneld, Host, Lab
from lab.docker import Dockerd
from lab.process import run

MK_DOCKER_OPTS = (sys.executable, "-m", "flanneld.docker_opts")


class Cluster:
    """A lab whose hosts each have a flanneld, a dockerd with its options, and a container."""

    def __init__(self, lab: Lab, backend: str) -> None:
        self.lab = lab
        self.daemons: list[Flanneld] = []
        self.dockers: list[Dockerd] = []
        lab.put_config(backend)
        for host in lab.hosts:
            # docker sets FORWARD's policy to DROP only where it is docker that begins to forward.
            host.set_sysctl("net/ipv4/ip_forward", "0")
            self.daemons.append(Flanneld(host, "--ip-masq").start())
        for daemon in self.daemons:
            daemon.wait_ready(30.0)
            self.dockers.append(Dockerd(daemon.host).start(*options(daemon.host)))
        self.containers = [docker.run() for docker in self.dockers]


def options(host: Host) -> list[str]:
    """Return what mk-docker-opts makes of the host's subnet file, as a start script reads it."""
    output = host.lab.scratch_file(f"{host.label}-docker-options")
    run([*MK_DOCKER_OPTS, "-f", str(host.subnet_file), "-d", str(output), "-c"])
    script = '. "$0" && for option in $DOCKER_OPTS; do echo "$option"; done'
    return run(["sh", "-c", script, str(output)]).stdout.splitlines()
