"""What the tests of the whole daemon have in common: a running network, and what is seen of it."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Self

from lab import Container, Flanneld, Host, Lab, eventually
from lab.etcd import Etcd
from lab.etcdv2 import EtcdV2, Node
from lab.namespaces import CONFIG_KEY, NETWORK

MakeLab = Callable[..., Lab]

SUBNETS_KEY = "/coreos.com/network/subnets"
LEASE_SECONDS = 86400

# Seconds until what is promised within a second or two counts as not done: the machine that runs
# the tests may be slow and busy.
PATIENCE = 15.0


def etcd_of(lab: Lab) -> Etcd:
    """Return the lab's only etcd."""
    assert isinstance(lab.etcd, Etcd)
    return lab.etcd


def client_of(lab: Lab) -> EtcdV2:
    """Return a new client of the lab's etcd."""
    assert lab.etcd is not None
    return lab.etcd.client()


def put_config(lab: Lab, **keys: object) -> None:
    """Write a network config for host-gw, with these keys beside (or in place of) the usual.

    Usually hosts get subnets from 10.5.1.0 to 10.5.49.0; what is above is free for made-up peers.
    """
    usual = {} if "Network" in keys else {"Network": NETWORK, "SubnetMax": "10.5.49.0"}
    config = {"Backend": {"Type": "host-gw"}, **usual, **keys}
    with client_of(lab) as client:
        client.put(CONFIG_KEY, json.dumps(config))


def key_of(subnet: IPv4Network | str) -> str:
    """Return the key of a subnet's lease."""
    return f"{SUBNETS_KEY}/{str(subnet).replace('/', '-')}"


def value_of(address: IPv4Address | str) -> str:
    """Return the value of a host-gw host's lease."""
    return f'{{"PublicIP":"{address}","BackendType":"host-gw"}}'


def leases(lab: Lab) -> dict[str, Node]:
    """Return the leases by subnet, written 10.5.34.0/24."""
    with client_of(lab) as client:
        found = client.list(SUBNETS_KEY)
    return {name.replace("-", "/"): node for name, node in found.items()}


def start(*hosts: Host, extra: tuple[str, ...] = ()) -> list[Flanneld]:
    """Start a daemon on each of the hosts at once, and wait until all are ready."""
    daemons = [Flanneld(host, *extra).start() for host in hosts]
    for daemon in daemons:
        daemon.wait_ready(2 * PATIENCE)
    return daemons


def wait_settled(daemons: Iterable[Flanneld]) -> None:
    """Wait until their start is over: who counts lines must not meet those of a slower thread."""
    for daemon in daemons:
        daemon.wait_log("Finished starting backend", PATIENCE)
        daemon.wait_log("Masquerade and forward rules through", PATIENCE)


def running(make_lab: MakeLab, hosts: int) -> tuple[Lab, list[Flanneld]]:
    """Return a lab with a running host-gw network, every route in place."""
    lab = make_lab(hosts)
    put_config(lab)
    daemons = start(*lab.hosts)
    wait_meshed(daemons)
    return lab, daemons


def peer_routes(host: Host) -> dict[str, str]:
    """Return gateways by destination, of the routes that carry flanneld's protocol number."""
    return {route["dst"]: route.get("gateway", "") for route in routes(host, "proto", "102")}


def routes(host: Host, *selector: str) -> list[dict[str, Any]]:
    """Return what ``ip route show SELECTOR`` lists."""
    return host.ip_json("-4", "route", "show", *selector)


def mesh(daemons: Iterable[Flanneld], host: Host) -> dict[str, str]:
    """Return the routes that a host must have to these daemons' subnets, its own left out."""
    return {
        str(daemon.subnet()): str(daemon.host.address)
        for daemon in daemons
        if daemon.host is not host
    }


def wait_routes(host: Host, wanted: dict[str, str], timeout: float = PATIENCE) -> None:
    """Wait until the host has exactly these routes to peers."""

    def as_wanted() -> bool:
        found = peer_routes(host)
        assert found == wanted
        return True

    eventually(as_wanted, timeout, f"the routes of {host.label}: {wanted}")


def wait_meshed(daemons: list[Flanneld], timeout: float = PATIENCE) -> None:
    """Wait until each daemon's host has exactly the routes to all the others."""
    for daemon in daemons:
        wait_routes(daemon.host, mesh(daemons, daemon.host), timeout)


def wait_lease(lab: Lab, subnet: object, check: Callable[[Node], object]) -> Node:
    """Wait until the lease of a subnet is there and ``check`` holds for it."""

    def found() -> Node | None:
        node = leases(lab).get(str(subnet))
        return node if node is not None and check(node) else None

    node = eventually(found, PATIENCE, f"the lease of {subnet} as expected")
    assert node is not None
    return node


def count(daemon: Flanneld, text: str) -> int:
    """Return how many lines of the daemon's log hold this text."""
    return sum(text in line for line in daemon.log().splitlines())


def wait_told(daemon: Flanneld) -> None:
    """Wait until etcd has told a frozen daemon of a write to its key, on both of its watches."""

    def unread() -> int:
        shown = daemon.host.run(["ss", "-tnpH"]).stdout.splitlines()
        return sum(int(line.split()[1]) > 0 for line in shown if f"pid={daemon.pid}," in line)

    eventually(lambda: unread() >= 2, PATIENCE, "etcd to tell both watches")


# What `ip monitor` writes when it looks at all named namespaces of the machine, and one of a lab
# beside this one goes at that moment.
VANISHED = "Error: Peer netns reference is invalid."


class RouteMonitor:
    """``ip monitor route`` on a host, from the moment this object exists."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._output = host.lab.scratch_file(f"{host.label}-monitor")
        self._marks = 0
        host.popen(["ip", "-4", "-oneline", "monitor", "route"], output=self._output)
        # It listens as soon as it reports a route of ours; the first may come too early.
        eventually(self._is_reported, PATIENCE, "ip monitor to listen")

    def _is_reported(self) -> bool:
        self._marks += 1
        mark = f"198.51.100.{self._marks % 256}"
        self._host.ip(f"route add blackhole {mark}", f"route del blackhole {mark}")
        try:
            eventually(lambda: f"Deleted blackhole {mark}" in self._text(), 0.5, "a mark")
        except AssertionError:
            return False
        return True

    def _text(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def lines(self) -> list[str]:
        """Return everything that happened so far, up to now for sure; a line for each event."""
        eventually(self._is_reported, PATIENCE, "ip monitor to have caught up")
        return [
            line
            for line in self._text().splitlines()
            if "198.51.100." not in line and line != VANISHED
        ]

    def deleted(self) -> list[str]:
        """Return the deletions."""
        return [line for line in self.lines() if line.startswith("Deleted ")]


def _answers(source: Container, target: Container) -> bool:
    return source.ping(target.address).lost == 0


class Pings:
    """Pings in both directions between the first containers of the first two hosts.

    ``interval`` is in seconds. Leaving the context asserts that no packet was lost and that there
    were some.
    """

    def __init__(self, hosts: Sequence[Host], interval: float = 0.01) -> None:
        one, two = ((host.containers or [host.add_container()])[0] for host in hosts[:2])
        self._pairs = [(one, two), (two, one)]
        self._interval = interval

    def __enter__(self) -> Self:
        # The first packets wait for ARP, on all bridges and between the hosts.
        for source, target in self._pairs:
            eventually(partial(_answers, source, target), PATIENCE, "an answer to a ping")
        self._running = [s.start_ping(t.address, self._interval) for s, t in self._pairs]
        self.go_on(10)
        return self

    def go_on(self, answers: int) -> None:
        """Wait for some more answers in both directions."""
        for ping in self._running:
            ping.wait_received(answers, PATIENCE)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.go_on(10)
        for ping in self._running:
            result = ping.stop()
            if kind is None:
                assert result.received > 0
                assert result.missing == ()
