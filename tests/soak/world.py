"""The network under soak: five hosts, a cluster of three etcds, a container on each host."""

import contextlib
import os
import random
import threading
import time
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from chaos.fleet import peers_said
from firewall import LEGACY, RESTORE, Kind, flanneld, forward_lines, in_place, saved
from network import LEASE_SECONDS, PATIENCE, SUBNETS_KEY, key_of, peer_routes, put_config, routes
from overlay import addresses, entries, link, of_peers, start_containers

from lab import Container, Flanneld, Host, Lab, LabError, eventually
from lab.cluster import EtcdCluster
from lab.etcdv2 import EtcdV2, EtcdV2Error, Node

from .levers import Levers
from .pinger import Pinger
from .record import Process, Record

HOSTS = 5
STEADY = 2
"""The daemons of this many hosts, the first ones, are never ended: they show a leak."""
RENEWAL_MINUTES = 2
"""Each lease is renewed so many minutes after the last time."""
DEVICES = {"vxlan": "flannel.1", "udp": "flannel0"}
# Subnets from 10.5.200.0 up are for leases that somebody makes up.
_LAST_SUBNET = "10.5.99.0"
_SAMPLE_EVERY = 0.5
# A renewal that fails is tried again after 60 s.
_LATE_RENEWAL = 75.0


def kind_of(host: Host) -> Kind:
    """Return the host's iptables: the legacy one and nftables' take turns."""
    return LEGACY if host.number % 2 else RESTORE


@dataclass(frozen=True, slots=True)
class _Device:
    """What of a device nobody may change for long."""

    mac: object
    mtu: int
    up: bool
    addresses: list[str]

    @classmethod
    def of(cls, host: Host, name: str) -> "_Device | None":
        shown = link(host, name)
        if shown is None:
            return None
        up = "UP" in shown["flags"]
        return cls(shown.get("address"), shown["mtu"], up, addresses(host, name))


class World:
    """Hosts that form one network with this backend, and what is seen of them."""

    def __init__(self, lab: Lab, record: Record) -> None:
        self.lab = lab
        self.record = record
        self.backend = record.backend
        # Not for secrets: to be repeated.
        self.rng = random.Random(record.seed)
        self.pinger = Pinger()
        self.levers = Levers(lab)
        self.daemons: list[Flanneld] = []
        self.cut_off: set[str] = set()
        self.backup: dict[str, Path] = {}
        self.moved: set[str] = set()
        """The hosts that have got another subnet than at first,"""
        self.revoked: list[str] = []
        """and what their daemons must have said about it, once each."""
        self._devices: dict[str, _Device | None] = {}
        self._processes: dict[int, Process] = {}
        self._zero = time.monotonic()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)

    @property
    def cluster(self) -> EtcdCluster:
        assert isinstance(self.lab.etcd, EtcdCluster)
        return self.lab.etcd

    def now(self) -> float:
        """Return the seconds since the soak began."""
        return time.monotonic() - self._zero

    def client(self) -> EtcdV2:
        """Return a new client of a healthy member. Raises LabError if there is none."""
        return self.cluster.client()

    def configure(self) -> None:
        """Write the network config."""
        backend = {"Type": self.backend}
        put_config(self.lab, SubnetMax=_LAST_SUBNET, Backend=backend)

    def open(self) -> None:
        """Start everything; at the end all hosts know each other and pings run."""
        self.lab.start_etcd_cluster(3)
        self.configure()
        for host in [self.lab.add_host() for _ in range(HOSTS)]:
            self.daemons.append(self._start(host))
        for daemon in self.daemons:
            daemon.wait_ready(4 * PATIENCE)
        eventually(self.is_right, 4 * PATIENCE, "all hosts to know each other")
        for daemon in self.daemons:
            self._take_part(daemon)
        self._zero = time.monotonic()
        self.record.hosts = [(d.host.label, 0.0, None) for d in self.daemons]
        self.pinger.start()
        self.keep_backup()
        self._watcher.start()
        since = time.monotonic()
        eventually(lambda: self.pinger.flows_since(since), PATIENCE, "pings on all paths")

    def _start(self, host: Host) -> Flanneld:
        margin = f"--subnet-lease-renew-margin={1440 - RENEWAL_MINUTES}"
        daemon = flanneld(host, kind_of(host), "--ip-masq", margin)
        daemon.environ |= self.levers.environ(host)
        return daemon.start()

    def _take_part(self, daemon: Flanneld) -> None:
        host = daemon.host
        start_containers([host])
        container = host.containers[0]
        # The first packets wait for ARP, on the bridges and between the hosts.
        for other in self.lab.hosts:
            if other.containers and other is not host:
                far = other.containers[0].address
                if any(other is each.host for each in self.daemons):
                    eventually(partial(_answers, container, far), PATIENCE, f"an answer from {far}")
        self._devices[host.label] = self.device_of(host)
        self.pinger.add(host.label, container)

    def device_of(self, host: Host) -> _Device | None:
        """Return the present state of flannel's device on a host."""
        name = DEVICES.get(self.backend)
        return _Device.of(host, name) if name else None

    def keep_backup(self) -> None:
        """Copy etcd's data, for it to be restored some time later."""
        self.backup = self.cluster.backup()
        self.cluster.wait_healthy()

    def close(self) -> None:
        """End the pings and what watches. Safe to repeat."""
        self._over.set()
        if self._watcher.ident is not None:
            self._watcher.join()
        self.pinger.stop()

    # Hosts come and go

    def join(self) -> Flanneld:
        """Start a daemon on a new host, and return it when all know it and pings run."""
        daemon = self._start(self.lab.add_host())
        self.daemons.append(daemon)
        daemon.wait_ready(4 * PATIENCE)
        eventually(self.is_right, 4 * PATIENCE, "all hosts to know the new one")
        self._take_part(daemon)
        self.record.hosts.append((daemon.host.label, self.now(), None))
        return daemon

    def leave(self, daemon: Flanneld) -> None:
        """Stop a host's daemon for good, free its subnet, and switch the host off."""
        label = daemon.host.label
        self.pinger.remove(label)
        self.daemons.remove(daemon)
        status = daemon.terminate()
        if status != 0:
            self.record.failures.append(f"{label}: status {status} after SIGTERM")
        with self.client() as client:
            client.delete(key_of(daemon.subnet()))
        daemon.host.ip("link set eth0 down")
        self.record.hosts = [
            (name, since, self.now() if name == label else until)
            for name, since, until in self.record.hosts
        ]

    def part(self, daemon: Flanneld) -> None:
        """End the pings with a host, as its subnet is about to be another's."""
        host = daemon.host
        self.pinger.remove(host.label)
        del self._devices[host.label]
        host.ip("addr flush dev cni0")
        self.moved.add(host.label)

    def reunite(self, daemon: Flanneld) -> None:
        """Give a host's container an address of the new subnet, when all know that."""
        eventually(self.is_right, 4 * PATIENCE, "all hosts to know the new subnet")
        bridge, (container,) = daemon.host.subnet_env().subnet, daemon.host.containers
        container.address = bridge.ip + 1
        daemon.host.ip(f"addr add {bridge} dev cni0")
        container.ip(
            "addr flush dev eth0",
            f"addr add {container.address}/{bridge.network.prefixlen} dev eth0",
            f"route add default via {bridge.ip} dev eth0",
        )
        self._take_part(daemon)

    # Is all as it should be?

    def leases(self) -> dict[str, Node]:
        """Return what is below subnets/, by subnet. Asserts that etcd answers."""
        try:
            with self.client() as client:
                found = client.list(SUBNETS_KEY)
        except (OSError, HTTPException, LabError, EtcdV2Error) as error:
            raise AssertionError(f"etcd: {error}") from error
        return {name.replace("-", "/"): node for name, node in found.items()}

    def is_right(self) -> bool:
        """Assert that each host has its lease and rules, and exactly the ways to the others."""
        found = {subnet: _value(node) for subnet, node in self.leases().items()}
        owners = sorted(value["PublicIP"] for value in found.values())
        hosts = sorted(str(daemon.host.address) for daemon in self.daemons)
        assert owners == hosts
        for daemon in self.daemons:
            host = daemon.host
            assert daemon.is_running, f"the daemon of {host.label} has ended: {daemon.exit_code}"
            assert found[str(daemon.subnet())]["PublicIP"] == str(host.address)
            others = {s: v for s, v in found.items() if v["PublicIP"] != str(host.address)}
            self._check_ways(daemon, others)
            if host.label in self._devices:
                assert self.device_of(host) == self._devices[host.label]
            in_place(host, kind_of(host), daemon.subnet())
            assert saved(host, kind_of(host), "filter") == forward_lines()
        return True

    def not_renewed(self) -> list[str]:
        """Return the leases whose renewal is overdue: by the pause after a failure, and more."""
        overdue = LEASE_SECONDS - RENEWAL_MINUTES * 60 - _LATE_RENEWAL
        return [
            f"the lease of {subnet} was not renewed: it ends in {node.ttl} s"
            for subnet, node in self.leases().items()
            if node.ttl is not None and node.ttl < overdue
        ]

    def _check_ways(self, daemon: Flanneld, others: dict[str, dict[str, Any]]) -> None:
        host = daemon.host
        if self.backend == "host-gw":
            assert peer_routes(host) == {s: v["PublicIP"] for s, v in others.items()}
        elif self.backend == "vxlan":
            peers = [(s, v["PublicIP"], v["BackendData"]["VtepMAC"]) for s, v in others.items()]
            assert entries(host) == of_peers(peers)
        else:
            assert [r["dst"] for r in routes(host, "dev", "flannel0")] == ["10.5.0.0/16"]
            assert peers_said(daemon) == len(others)

    def is_converged(self, since: float) -> bool:
        """Assert that everything is right, and pings sent after this moment were answered."""
        silent = self.pinger.silent_since(since)
        assert not silent, f"no answer to pings: {silent}"
        return self.is_right()

    # What is written down all the time

    def measure(self) -> None:
        """Note each daemon's memory, descriptors and threads."""
        for daemon in self.daemons:
            if not daemon.is_running:
                continue
            steady = daemon.host.number <= STEADY
            # It may end at any time, and so may its tunnel; a zombie has no VmRSS.
            with contextlib.suppress(OSError, KeyError):
                self._measure(f"flanneld on {daemon.host.label}", daemon.pid, steady)
                for pid in tunnels_of(daemon):
                    # Faults end it on any host.
                    self._measure(f"udp tunnel on {daemon.host.label}", pid, False)

    def _measure(self, name: str, pid: int, steady: bool) -> None:
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        rss, threads = int(status["VmRSS"].split()[0]), int(status["Threads"])
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        process = self._processes.get(pid)
        if process is None:
            process = self._processes[pid] = Process(name, pid, steady)
            self.record.processes.append(process)
        process.at.append(self.now())
        process.rss_kb.append(rss)
        process.threads.append(threads)
        process.descriptors.append(descriptors)

    def _watch(self) -> None:
        states: dict[str, str] = {}
        count: int | None = -1
        while not self._over.wait(_SAMPLE_EVERY):
            for member in self.cluster.members:
                name = member.member.name
                state = self._state_of(name)
                if states.get(name) != state:
                    states[name] = state
                    self.record.members.setdefault(name, []).append((self.now(), state))
            seen: int | None = None
            with contextlib.suppress(AssertionError):
                seen = len(self.leases())
            if seen != count:
                count = seen
                self.record.leases.append((self.now(), count))

    def _state_of(self, name: str) -> str:
        member = next(m for m in self.cluster.members if m.member.name == name)
        try:
            stat = Path(f"/proc/{member.pid}/stat").read_text()
        except (LabError, OSError):
            return "down"
        if stat.rpartition(")")[2].split()[0] == "T":
            return "frozen"
        return "cut off" if name in self.cut_off else "up"


def tunnels_of(daemon: Flanneld) -> list[int]:
    """Return the process ids of a daemon's children that are udp tunnels."""
    tasks = Path(f"/proc/{daemon.pid}/task")
    pids = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "flannel-udp\n"]


def _value(node: Node) -> dict[str, Any]:
    try:
        value: dict[str, Any] = node.json()
        assert isinstance(value["PublicIP"], str)
    except (ValueError, LookupError, TypeError) as error:
        raise AssertionError(f"{node.name} is no lease: {node.value!r}") from error
    return value


def _answers(container: Container, address: object) -> bool:
    return container.ping(str(address)).lost == 0
