"""What the measurements of the control plane stand on: overlays, hosts, implementations."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.leases import LINK, NETWORK, OWN_SUBNETS, Writer
from bench.results import Results
from lab import Flanneld, Host, Lab, LabError, NotInTime
from lab.daemon import FLANNELD

# Seconds until what has not come will not come.
PATIENCE = 60.0
OURS = "flanneld"


@dataclass(frozen=True, slots=True)
class Implementation:
    """A flanneld: what the tables call it, and the command that starts it."""

    name: str
    program: tuple[str, ...]


def implementations(peers: Sequence[Path]) -> list[Implementation]:
    """Ours, and the other binaries it is to be compared with, named after their files."""
    found = [Implementation(OURS, FLANNELD)]
    for path in peers:
        name = path.name if path.name not in {i.name for i in found} else str(path)
        found.append(Implementation(name, (str(path.resolve()),)))
    return found


@dataclass(frozen=True, slots=True)
class Effort:
    """How often things are done."""

    starts: int
    rounds: int
    events: int
    idle_seconds: float
    slices: int
    traffic_rounds: int
    traffic_seconds: float


# At rest for a minute: what is looked at once in so many times is in it as often as it should be.
FULL = Effort(9, 3, 200, 60.0, 24, 3, 1.0)
QUICK = Effort(1, 1, 10, 2.0, 3, 1, 0.4)


class Scene:
    """One run: the lab, who is measured, how often, and the results so far."""

    def __init__(
        self, lab: Lab, who: Sequence[Implementation], effort: Effort, deadline: float
    ) -> None:
        self.lab = lab
        self.implementations = list(who)
        self.effort = effort
        self.results = Results()
        self.writer = Writer(lab)
        self._deadline = deadline
        self._sites: dict[str, Host] = {}

    def say(self, text: str) -> None:
        """Tell the person who waits how far it is."""
        print(f"  {text}", file=sys.stderr, flush=True)

    def rounds(self, count: int, seconds: float) -> Iterator[list[Implementation]]:
        """Up to ``count`` rounds, each with the implementations in the other order.

        No round begins after ``seconds``, nor after the whole run's time, except the first.
        """
        until = min(time.monotonic() + seconds, self._deadline)
        for number in range(count):
            if number and time.monotonic() > until:
                self.results.problems.append(
                    f"{number} of {count} rounds in a section: the time allowed for it was over"
                )
                return
            yield self.implementations[:: -1 if number % 2 else 1]

    def host(self, name: str) -> Host:
        """The host of this name, with a link to all made-up peers."""
        if name not in self._sites:
            host = self.lab.add_host()
            host.ip(f"addr add {LINK.network_address + 1}/{LINK.prefixlen} dev eth0")
            self._sites[name] = host
        return self._sites[name]


class Overlay:
    """A network of its own in etcd, with made-up peers; ``size`` is their number."""

    def __init__(self, scene: Scene, name: str, backend: str) -> None:
        self.scene = scene
        self.backend = backend
        self.prefix = f"/bench/{name}"
        self.size = 0
        first, last = OWN_SUBNETS
        config = {
            "Network": str(NETWORK),
            "SubnetLen": 24,
            "SubnetMin": str(first),
            "SubnetMax": str(last),
            "Backend": {"Type": backend},
        }
        self.client = scene.writer.client()
        self.client.put(f"{self.prefix}/config", json.dumps(config))

    def grow(self, size: int) -> None:
        """Write leases until there are so many peers."""
        if size > self.size:
            self.scene.writer.put(self.prefix, self.backend, range(self.size, size))
            self.size = size

    def close(self) -> None:
        """Remove it from etcd."""
        self.client.delete(self.prefix, recursive=True)
        self.client.close()


class Site:
    """One implementation on a host of its own, in an overlay."""

    def __init__(self, overlay: Overlay, who: Implementation) -> None:
        self.overlay = overlay
        self.who = who
        self.host = overlay.scene.host(who.name)
        flag = f"--etcd-prefix={overlay.prefix}"
        self.daemon = Flanneld(self.host, flag, program=who.program)

    def start(self) -> float:
        """Start it; the seconds until subnet.env was there, which may have been so before.

        Raises NotInTime when it does not come.
        """
        self.daemon.start()
        while not self.host.subnet_file.exists():
            time.sleep(0.001)
            if time.monotonic() > self.daemon.started + PATIENCE or not self.daemon.is_running:
                raise NotInTime(f"no subnet.env\n{self.daemon.explain()}")
        return time.monotonic() - self.daemon.started

    def ready(self) -> float:
        """The seconds from its start to READY=1. Raises NotInTime."""
        self.daemon.wait_ready(PATIENCE)
        return self.daemon.ready_after() or PATIENCE

    def stop(self) -> None:
        """End it; everything stays as it is."""
        if self.daemon.is_running:
            self.daemon.terminate(20.0)

    def clean(self) -> None:
        """End it and remove whatever it left: on the host, and its lease."""
        self.daemon.stop()
        links = {link["ifname"] for link in self.host.ip_json("link")}
        for name in ("flannel.1", "flannel0"):
            if name in links:
                self.host.ip(f"link del {name}")
        self.host.run(["ip", "route", "flush", "root", str(NETWORK)], check=False)
        try:
            subnet = self.daemon.subnet()
        except (FileNotFoundError, ValueError, LabError):
            return
        self.overlay.client.delete(f"{self.overlay.prefix}/subnets/{str(subnet).replace('/', '-')}")
        self.host.subnet_file.unlink()

    def missing(self, peers: int) -> int:
        """How many of so many peers have no entry in the kernel now."""
        routes = self.host.run(["ip", "-4", "route", "show", "root", str(NETWORK)]).stdout
        found = sum("/24" in line for line in routes.splitlines())
        if self.overlay.backend == "vxlan":
            fdb = self.host.run(["bridge", "fdb", "show", "dev", "flannel.1"]).stdout
            entries = sum(" dst " in line for line in fdb.splitlines())
            # The original's v0.8.0 has no route for each peer.
            found = min(found, entries) if found else entries
        return max(0, peers - found)
