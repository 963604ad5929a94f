"""Hosts that form a network while its store fails, and whether all of them know the same."""

import os
import re
import signal
import time
from dataclasses import dataclass, field

from network import (
    PATIENCE,
    MakeLab,
    client_of,
    key_of,
    leases,
    peer_routes,
    put_config,
)
from overlay import entries, of_peers

from lab import Flanneld, Host, Lab, NotInTime, eventually
from lab.cluster import EtcdCluster
from lab.etcd import Etcd
from lab.etcdv2 import Node

# The whole of it (`make chaos`): more hosts, longer failures. `make test` runs the shorter form.
WHOLE = bool(os.environ.get("FLANNEL_CHAOS"))
HOSTS = 20 if WHOLE else 6
OUTAGE = 60.0 if WHOLE else 10.0


@dataclass
class Fleet:
    """Hosts with a running daemon each, all in one network with this backend."""

    lab: Lab
    backend: str
    daemons: list[Flanneld] = field(default_factory=list)
    left: list[Flanneld] = field(default_factory=list)
    """Those that were stopped for good, and whose leases are to go."""

    @property
    def cluster(self) -> EtcdCluster:
        assert isinstance(self.lab.etcd, EtcdCluster)
        return self.lab.etcd

    def start(self, *hosts: Host) -> None:
        """Start daemons on these hosts, and wait until all hosts know each other."""
        started = [Flanneld(host).start() for host in hosts]
        for daemon in started:
            daemon.wait_ready(4 * PATIENCE)
        self.daemons += started
        eventually(self.is_converged, 2 * PATIENCE, "all hosts to know each other")

    def join(self) -> Flanneld:
        """Start a daemon on a new host; that it gets its lease is not waited for."""
        self.daemons.append(Flanneld(self.lab.add_host()).start())
        return self.daemons[-1]

    def leave(self) -> None:
        """Stop the daemon of a host, not one of the two with pings, nor the newest, for good."""
        daemon = self.daemons.pop(2)
        assert daemon.terminate() == 0
        self.left.append(daemon)

    def free(self) -> None:
        """Delete the leases of those that left. The store must be there."""
        with client_of(self.lab) as client:
            for daemon in self.left:
                assert client.delete(key_of(daemon.subnet()))
        self.left.clear()

    def expect_converged(self, after: str, timeout: float = PATIENCE) -> None:
        """Wait until all hosts know exactly the leases in etcd; print how long that took."""
        began = time.monotonic()
        eventually(self.is_converged, timeout, f"all hosts to know each other: {after}")
        print(f"{after}: {len(self.daemons)} hosts converged in {time.monotonic() - began:.1f} s")

    def is_converged(self) -> bool:
        """Assert that each daemon has a lease, and each host's kernel exactly those of the others.

        The udp backend keeps them outside of the kernel; it says how many.
        """
        found = leases(self.lab)
        owners = {node.json()["PublicIP"] for node in found.values()}
        assert {str(daemon.host.address) for daemon in self.daemons} <= owners
        for daemon in self.daemons:
            assert daemon.is_running
            own = str(daemon.host.address)
            others = {s: node for s, node in found.items() if node.json()["PublicIP"] != own}
            self._check_peers(daemon, others)
        return True

    def _check_peers(self, daemon: Flanneld, others: dict[str, Node]) -> None:
        if self.backend == "host-gw":
            wanted = {subnet: node.json()["PublicIP"] for subnet, node in others.items()}
            assert peer_routes(daemon.host) == wanted
        elif self.backend == "vxlan":
            values = [(subnet, node.json()) for subnet, node in others.items()]
            peers = [(s, v["PublicIP"], v["BackendData"]["VtepMAC"]) for s, v in values]
            assert entries(daemon.host) == of_peers(peers)
        else:
            # One that is still starting has nobody yet who would report.
            assert daemon.ready_after() is not None
            assert peers_said(daemon) == len(others)


def value_of_peer(backend: str, address: object, mac: str) -> str:
    """Return the value of the lease of a host with this backend; ``mac`` counts for vxlan only."""
    kind = "" if backend == "udp" else f',"BackendType":"{backend}"'
    data = f',"BackendData":{{"VtepMAC":"{mac}"}}' if backend == "vxlan" else ""
    return f'{{"PublicIP":"{address}"{kind}{data}}}'


def peers_said(daemon: Flanneld) -> int:
    """Ask a daemon how many peers it has.

    More than once, if need be: it has no answer before it knows of its lease, be it in etcd.
    """
    pattern = re.compile(r"State: leased \S+, (\d+) peers", re.MULTILINE)
    before = len(pattern.findall(daemon.log()))

    def answers() -> list[str]:
        return pattern.findall(daemon.log())[before:]

    def asked() -> bool:
        os.kill(daemon.pid, signal.SIGUSR1)
        try:
            return bool(eventually(answers, 1.0, "a report"))
        except NotInTime:
            return False

    eventually(asked, PATIENCE, "a report")
    return int(answers()[-1])


def make_fleet(make_lab: MakeLab, backend: str, hosts: int = HOSTS) -> Fleet:
    """Start hosts on a cluster of three."""
    lab = make_lab(hosts, etcd=False)
    lab.start_etcd_cluster(3)
    put_config(lab, SubnetMax="10.5.99.0", Backend={"Type": backend})
    fleet = Fleet(lab, backend)
    fleet.start(*lab.hosts)
    return fleet


def connected_to(fleet: Fleet, member: Etcd) -> list[Flanneld]:
    """Return the daemons that have a connection with this member."""
    selector = ["state", "established", "dst", f"{member.address}:{member.member.client_port}"]
    return [
        daemon
        for daemon in fleet.daemons
        if daemon.host.run(["ss", "-Htn", *selector]).stdout.strip()
    ]
