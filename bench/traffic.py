"""Throughput, packets per second and round trip: each backend beside the physical limit.

Every way of connecting two hosts has a pair of its own and all take turns, so that a busy machine
is equally busy for all.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.pairs import Ends, build, make_pair
from bench.results import Key, Results
from bench.scene import PATIENCE, Overlay, Scene
from bench.tcp import Stream
from bench.udp_tunnel import Bench
from lab import Container, Flanneld, Host, NotInTime, eventually

TCP, PACKETS, ROUND_TRIP = "TCP, 1 stream", "UDP, 64 B", "round trip"
BACKENDS = ("host-gw", "vxlan", "udp")
# What is as good as it gets: the same devices made by hand, a loop in C as the original's proxy,
# and from one host's own address to the other's.
BY_HAND = {"host-gw": "routing", "vxlan": "vxlan", "udp": "c"}
LIMITS = {
    "host-gw": "made by hand",
    "vxlan": "made by hand",
    "udp": "loop in C",
    "none": "no overlay",
}
# Of a turn of TCP: MiB of the first one, seconds of the later ones, MiB at most.
_TRIAL, _TURN_SECONDS, _MOST = 8, 0.15, 128

Way = tuple[str, str]
"""Backend and implementation."""


@dataclass(frozen=True, slots=True)
class _Pair:
    containers: tuple[Container | Host, Container | Host]


def measure(scene: Scene, seconds: float) -> None:
    """All loads over all ways."""
    traffic, proxy = build(scene.lab.directory)
    bare = _Pair((scene.lab.add_host(), scene.lab.add_host()))
    ways: dict[Way, Ends] = {("none", LIMITS["none"]): bare}
    for backend in BACKENDS:
        ways[backend, LIMITS[backend]] = make_pair(scene.lab, BY_HAND[backend], proxy)
        for who in scene.implementations:
            try:
                ways[backend, who.name] = _pair(scene, backend, who.name, who.program)
            except NotInTime as error:
                scene.results.problems.append(f"{who.name}, {backend}, traffic: {error}")
    _tcp(scene, ways, seconds * 0.4)
    _datagrams(scene, ways, traffic, seconds * 0.6)


def _pair(scene: Scene, backend: str, name: str, program: tuple[str, ...]) -> Ends:
    """Two hosts connected by real daemons, with a container on each. Raises NotInTime."""
    overlay = Overlay(scene, f"traffic-{backend}-{name}", backend)
    overlay.client.close()
    hosts = [scene.lab.add_host(), scene.lab.add_host()]
    flag = f"--etcd-prefix={overlay.prefix}"
    daemons = [Flanneld(host, flag, program=program).start() for host in hosts]
    for daemon in daemons:
        daemon.wait_ready(PATIENCE)
    one, two = (host.add_container() for host in hosts)
    for source, target in ((one, two), (two, one)):
        eventually(
            partial(_answers, source, target), PATIENCE, f"{backend}, {name}: a ping to be answered"
        )
    return _Pair((one, two))


def _answers(source: Container, target: Container) -> bool:
    return source.ping(target.address).lost == 0


def _tcp(scene: Scene, ways: dict[Way, Ends], seconds: float) -> None:
    """Short turns, each a connection of its own: the hash of its ports decides on a queue."""
    sizes = {}
    for way, pair in ways.items():
        taken = _turn(pair, _TRIAL)
        sizes[way] = max(2, min(_MOST, int(_TRIAL / taken * _TURN_SECONDS)))
    for number, _ in enumerate(scene.rounds(scene.effort.slices, seconds)):
        order = list(ways)[:: -1 if number % 2 else 1]
        for way in order:
            megabytes = sizes[way]
            rate = megabytes * 8 * 2**20 / _turn(ways[way], megabytes) / 1e6
            scene.results.add(Key(TCP, *way), "Mbit/s", rate)
    _say(scene, TCP, ways)


def _turn(pair: Ends, megabytes: int) -> float:
    one, two = pair.containers
    with Stream(one, two, one.address, two.address) as stream:
        return stream.transfer(megabytes)


def _datagrams(scene: Scene, ways: dict[Way, Ends], traffic: Path, seconds: float) -> None:
    bench = Bench(scene.lab, traffic, scene.effort.traffic_seconds)
    for number, _ in enumerate(scene.rounds(scene.effort.traffic_rounds, seconds)):
        order = list(ways)[:: -1 if number % 2 else 1]
        for way in order:
            packets = bench.flow(ways[way], "udp", (0,), "64") / 1e3
            scene.results.add(Key(PACKETS, *way), "kpackets/s", packets)
        for way in order:
            scene.results.add(Key(ROUND_TRIP, *way), "us", bench.round_trip(ways[way]))
    _say(scene, PACKETS, ways)
    _say(scene, ROUND_TRIP, ways)


def _say(scene: Scene, measure: str, ways: dict[Way, Ends]) -> None:
    for way in ways:
        series = scene.results.find(measure, *way)
        if series is not None:
            scene.say(f"{measure}, {', '.join(way)}: {series.median:.0f} {series.unit}")


def ratio(results: Results, measure: str, backend: str, name: str) -> float | None:
    """The median, over the rounds, of a way's ratio to the limit of its backend."""
    ours, limit = (results.find(measure, backend, each) for each in (name, LIMITS[backend]))
    if ours is None or limit is None or name == LIMITS[backend]:
        return None
    pairs = zip(ours.values, limit.values, strict=False)
    return statistics.median(a / b for a, b in pairs if b)
