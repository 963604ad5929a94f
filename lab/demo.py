"""A first look at flanneld: ``python -m lab.demo [--hosts N] [--backend NAME]``.

Every step shows what it found and checks it; the first thing that is not as it should be ends
the demo with status 1. Nothing is left behind, in whatever way it ends.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Network

from lab import needs
from lab.daemon import FLANNELD, Flanneld
from lab.namespaces import CONFIG_KEY, NETWORK, Container, Host, Lab
from lab.ping import PingResult
from lab.process import LabError
from lab.report import Report
from lab.signals import Terminated
from lab.wait import NotInTime, eventually

SUBNETS_KEY = "/coreos.com/network/subnets"
# More would not fit on the page, nor into a minute.
MAX_HOSTS = 12
_PINGS = 3
_WRONG = "This is not as it should be."
_SECONDS_DOWN = 1.0
_LEASE_SECONDS = 86400


class Untrue(Exception):
    """Something is not as it should be."""

    def __init__(self, expected: str, seen: str, *daemons: Flanneld) -> None:
        super().__init__(f"expected {expected}, seen {seen}")
        self.expected = expected
        self.seen = seen
        self.daemons = daemons


class Demo:
    """The steps, in order, on one lab."""

    def __init__(self, lab: Lab, backend: str, report: Report, program: Sequence[str]) -> None:
        self.lab = lab
        self.backend = backend
        self.report = report
        self.network = IPv4Network(NETWORK)
        self.daemons = [Flanneld(host, program=program) for host in lab.hosts]
        self.containers: list[Container] = []

    def holds(self) -> bool:
        """Show everything; False, and said why, at the first thing that is not right."""
        try:
            self.run()
        except Untrue as error:
            self.report.bad(_WRONG)
            self.report.pair("expected", error.expected)
            self.report.pair("seen", error.seen)
            # Now, while the daemons and their logs are still there.
            for daemon in error.daemons:
                self.report.verbatim(daemon.explain())
            return False
        except (NotInTime, LabError) as error:
            self.report.bad(_WRONG)
            self.report.verbatim(str(error))
            return False
        return True

    def run(self) -> None:
        """Raises Untrue, NotInTime or LabError at the first thing that is not right."""
        self.write_config()
        self.start_daemons()
        self.show_leases()
        self.show_routes()
        self.start_containers()
        self.ping_all()
        self.kill_and_restart()

    def write_config(self) -> None:
        self.report.step("etcd is running, and the network's configuration is written into it.")
        self.lab.put_config(self.backend)
        assert self.lab.etcd is not None
        with self.lab.etcd.client() as client:
            node = client.get(CONFIG_KEY)
        if node is None:
            raise Untrue(f"the key {CONFIG_KEY}", "no such key")
        self.report.table(("KEY", "VALUE"), [(CONFIG_KEY, node.value)])

    def start_daemons(self) -> None:
        self.report.step("flanneld starts on every host and leases a subnet for it.")
        for daemon in self.daemons:
            daemon.start()
        rows = []
        for daemon in self.daemons:
            daemon.wait_ready(20.0)
            env = daemon.host.subnet_env()
            after = daemon.ready_after()
            subnet = env.subnet.network
            rows.append((daemon.host.label, daemon.host.address, subnet, env.mtu, f"{after:.2f} s"))
            if not subnet.subnet_of(self.network):
                raise Untrue(f"a subnet of {self.network}", str(subnet), daemon)
        self.report.table(("HOST", "ADDRESS", "SUBNET", "MTU", "READY AFTER"), rows)
        subnets = {daemon.subnet() for daemon in self.daemons}
        if len(subnets) != len(self.daemons):
            raise Untrue("a subnet of its own for each host", str(subnets), *self.daemons)

    def show_leases(self) -> None:
        self.report.step(f"etcd holds one lease for each host, below {SUBNETS_KEY}.")
        assert self.lab.etcd is not None
        with self.lab.etcd.client() as client:
            nodes = client.list(SUBNETS_KEY)
        rows = []
        for daemon in self.daemons:
            name = str(daemon.subnet()).replace("/", "-")
            node = nodes.pop(name, None)
            if node is None:
                raise Untrue(f"the key {SUBNETS_KEY}/{name}", "no such key", daemon)
            value = node.json()
            address, kind = value.get("PublicIP"), value.get("BackendType", "")
            data = "-"
            if "BackendData" in value:
                data = json.dumps(value["BackendData"], separators=(",", ":"))
            rows.append((name, address, f"{node.ttl} s", kind or "-", data))
            if address != str(daemon.host.address):
                raise Untrue(f"PublicIP {daemon.host.address}", str(address), daemon)
            # The original's udp backend writes no type, so neither does ours.
            if kind != self.backend and (kind or self.backend != "udp"):
                raise Untrue(f"BackendType {self.backend}", repr(kind), daemon)
            if node.ttl is None or not _LEASE_SECONDS - 60 <= node.ttl <= _LEASE_SECONDS:
                raise Untrue("a lease of one day, just begun", f"{node.ttl} s left", daemon)
        self.report.table(("KEY", "PUBLIC IP", "EXPIRES IN", "BACKEND", "BACKEND DATA"), rows)
        if nodes:
            raise Untrue("no other lease", ", ".join(nodes), *self.daemons)

    def show_routes(self) -> None:
        self.report.step("Every host has a route to every other host's subnet.")
        rows = []
        for daemon in self.daemons:
            others = [other.subnet() for other in self.daemons if other is not daemon]
            host = daemon.host
            eventually(
                partial(self._has_routes, host, others),
                10.0,
                f"a route on {host.label} to each of {', '.join(map(str, others))}",
                detail=daemon.explain,
            )
            for destination, gateway, device in self._routes(host):
                rows.append((host.label, destination, gateway, device))
        self.report.table(("HOST", "TO", "VIA", "DEVICE"), rows)

    def _routes(self, host: Host) -> list[tuple[IPv4Network, str, str]]:
        """The host's routes into the network: destination, gateway, device."""
        routes = []
        for route in host.ip_json("-4", "route", "show"):
            if route["dst"] == "default" or route.get("type", "unicast") != "unicast":
                continue
            destination = IPv4Network(route["dst"])
            if destination.subnet_of(self.network):
                routes.append((destination, route.get("gateway", "-"), route.get("dev", "-")))
        return routes

    def _has_routes(self, host: Host, subnets: Sequence[IPv4Network]) -> bool:
        destinations = [destination for destination, _, _ in self._routes(host)]
        return all(any(subnet.subnet_of(d) for d in destinations) for subnet in subnets)

    def start_containers(self) -> None:
        self.report.step("One container starts on each host, set up from the host's subnet.env.")
        rows = []
        for host in self.lab.hosts:
            env = host.subnet_env()
            container = host.add_container()
            self.containers.append(container)
            rows.append((container.label, host.label, container.address, env.subnet.ip, env.mtu))
        self.report.table(("CONTAINER", "HOST", "ADDRESS", "BRIDGE", "MTU"), rows)

    def ping_all(self) -> None:
        self.report.step(
            f"Every container pings every other one: answers to {_PINGS} packets each."
        )
        rows = []
        lost = []
        for source in self.containers:
            row = [source.label]
            for target, result in zip(self.containers, self._ping_from(source), strict=True):
                row.append(f"{result.received}/{result.sent}" if result else "-")
                if result and (result.lost or result.sent != _PINGS):
                    lost.append(f"{source.label} to {target.label}: {row[-1]}")
            rows.append(row)
        self.report.table(("FROM / TO", *(c.label for c in self.containers)), rows)
        if lost:
            raise Untrue("an answer to every packet", ", ".join(lost), *self.daemons)

    def _ping_from(self, source: Container) -> list[PingResult | None]:
        """The results of pinging every container, in order; None for the source itself."""

        def ping(target: Container) -> PingResult | None:
            return None if target is source else source.ping(target.address, _PINGS)

        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(ping, self.containers))

    def kill_and_restart(self) -> None:
        one, two = self.containers[:2]
        daemon = self.daemons[1]
        label = daemon.host.label
        self.report.step(
            f"The daemon on {label} is killed (kill -9) and started again"
            f" {_SECONDS_DOWN:g} s later, while {one.label} pings {two.label}."
        )
        before = daemon.subnet()
        ping = one.start_ping(two.address)
        ping.wait_received(10)
        daemon.kill9()
        at_kill = ping.received()
        time.sleep(_SECONDS_DOWN)
        daemon.start()
        daemon.wait_ready(20.0)
        meanwhile = ping.received() - at_kill
        ping.wait_received(10)
        result = ping.stop()
        self.report.table(
            ("PING", "PACKETS SENT", "ANSWERED WITH NO DAEMON", "LOST"),
            [(f"{one.label} to {two.label}", result.sent, meanwhile, result.lost)],
        )
        after = daemon.subnet()
        if after != before:
            raise Untrue(f"the subnet {before} again", str(after), daemon)
        if self.backend == "udp":
            self.report.note(
                f"{label} has its subnet {after} back. With the udp backend the packets' way"
                " ends with the daemon: those sent while it was dead are lost."
            )
            return
        self.report.note(
            f"{label} has its subnet {after} back. The kernel forwards the packets,"
            " and flanneld leaves its routes alone when it dies or starts."
        )
        if result.lost or not meanwhile:
            seen = f"{result.lost} of {result.sent} lost, {meanwhile} answered without a daemon"
            raise Untrue("no packet lost", seen, daemon)


def show(hosts: int, backend: str, report: Report, program: Sequence[str] = FLANNELD) -> int:
    """Run the demo: the exit status."""
    begun = time.monotonic()
    report.title(f"flannel on {hosts} hosts, backend {backend}")
    report.text("Hosts and containers are network namespaces; etcd and flanneld are real.")
    try:
        with Lab(hosts) as lab:
            true = Demo(lab, backend, report, program).holds()
    except LabError as error:
        report.bad("The small network could not be set up or taken down.")
        report.verbatim(str(error))
        return 1
    if not true:
        return 1
    seconds = time.monotonic() - begun
    report.good(
        f"All of this was checked and is true. It took {seconds:.0f} s,"
        " and everything has been removed again."
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.demo", description="Shows flanneld at work on a few small hosts."
    )
    parser.add_argument("--hosts", type=int, default=3, metavar="N", help="how many (default 3)")
    parser.add_argument(
        "--backend", default="vxlan", metavar="NAME", help="the backend (default vxlan)"
    )
    options = parser.parse_args(arguments)
    if not 2 <= options.hosts <= MAX_HOSTS:
        parser.error(f"--hosts: {options.hosts}, but the demo takes 2 to {MAX_HOSTS}")
    problem = needs.missing()
    if problem:
        print(f"The demo cannot run: {problem}", file=sys.stderr)
        return 1
    report = Report()
    try:
        Lab.sweep_stale()
        return show(options.hosts, options.backend, report)
    except Terminated as signalled:
        report.bad("Stopped. Everything has been removed again.")
        return 128 + signalled.number
    except KeyboardInterrupt:
        report.bad("Stopped by Ctrl-C. Everything has been removed again.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
