"""TCP between pods: flanneld's vxlan device against one made by hand with ``ip``.

``python -m bench.vxlan_throughput [--runs N] [--rounds N]``, as root; under a minute by default.

Both devices are on the same two hosts at the same time, and carry the traffic of the same pods,
which have an address in either network. In each run the two take turns of less than a tenth
of a second, so that what else the machine does meets both alike; each run gives a ratio.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from bench.tcp import Stream
from lab import Container, Flanneld, Host, Lab, needs
from lab.report import Report

# The network of the device made by hand: a /24 for each host, as flanneld's.
HAND = IPv4Network("10.66.0.0/16")
HAND_DEVICE, HAND_VNI = "hand0", 66

# MiB in each turn.
SLICE = 96

# The least that counts as the same, and a spread of the ratios that casts doubt on them.
SAME, BUSY = 0.97, 0.08


@dataclass(frozen=True, slots=True)
class Pod:
    """A container with an address in either network."""

    container: Container
    by_flanneld: IPv4Address
    by_hand: IPv4Address


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Return the exit status, which does not depend on the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.vxlan_throughput", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs (default 5)")
    parser.add_argument(
        "--rounds", type=int, default=40, help="turns of each in a run (default 40)"
    )
    options = parser.parse_args(argv)
    problem = needs.missing(needs.PACKAGES)
    if problem:
        print(f"cannot measure: {problem}", file=sys.stderr)
        return 1
    with Lab(hosts=2) as lab:
        pods = set_up(lab)
        measured = measure(pods, options.runs, options.rounds)
    show(*measured)
    return 0


def set_up(lab: Lab) -> tuple[Pod, Pod]:
    """Start flanneld, the pods, and the device made by hand."""
    lab.put_config("vxlan")
    daemons = [Flanneld(host).start() for host in lab.hosts]
    for daemon in daemons:
        daemon.wait_ready()
    pods = tuple(Pod(h.add_container(), _own(h), _subnet(h)[2]) for h in lab.hosts)
    for host, other in zip(lab.hosts, reversed(lab.hosts), strict=True):
        make_by_hand(host, other)
    for pod in pods:
        gateway = _subnet(pod.container.host)[1]
        pod.container.ip(
            f"addr add {pod.by_hand}/24 dev eth0", f"route add {HAND} via {gateway} dev eth0"
        )
    one, two = pods
    for target in (two.by_flanneld, two.by_hand):
        if one.container.ping(target, 3).lost:
            raise SystemExit(f"{target} does not answer")
    return one, two


def make_by_hand(host: Host, other: Host) -> None:
    """Make the device, with the same attributes, and the same three entries for the peer."""
    gateway = _subnet(other)[0]
    host.ip(
        f"link add {HAND_DEVICE} mtu 1450 address {_mac(host)} type vxlan id {HAND_VNI}"
        f" local {host.address} dev eth0 dstport 8472 nolearning",
        f"addr add {_subnet(host)[0]}/32 dev {HAND_DEVICE}",
        f"link set {HAND_DEVICE} up",
        f"neigh add {gateway} lladdr {_mac(other)} dev {HAND_DEVICE} nud permanent",
        f"route add {_subnet(other)} via {gateway} dev {HAND_DEVICE} onlink",
        f"addr add {_subnet(host)[1]}/24 dev cni0",
    )
    fdb = ["bridge", "fdb", "add", _mac(other), "dev", HAND_DEVICE, "dst", str(other.address)]
    host.run(fdb)


def measure(pods: tuple[Pod, Pod], runs: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return the Gbit/s of the runs over flanneld's device, and over that made by hand."""
    one, two = pods
    ways = {
        "flanneld": (one.by_flanneld, two.by_flanneld),
        "hand": (one.by_hand, two.by_hand),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs + 1):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            # Who comes first takes turns, too.
            for way in sorted(ways, reverse=bool(number % 2)):
                # A connection of its own for each: how fast one is depends on the queue to which
                # the hash of its ports happens to lead.
                with Stream(one.container, two.container, *ways[way]) as stream:
                    seconds[way].append(stream.transfer(SLICE))
        if run > 0:  # the first one warms up
            for way, taken in seconds.items():
                # The median: a turn in which somebody else had the CPU says nothing.
                found[way].append(SLICE * 8 * 2**20 / statistics.median(taken) / 1e9)
    return found["flanneld"], found["hand"]


def show(flanneld: list[float], hand: list[float]) -> None:
    """Print runs, medians, spread and ratio."""
    ratios = [ours / theirs for ours, theirs in zip(flanneld, hand, strict=True)]
    report = Report()
    report.title("TCP between pods over vxlan, Gbit/s")
    head = ["", *(f"run {n}" for n in range(1, len(ratios) + 1)), "median", "min", "max"]
    report.table(
        head,
        [
            _row("flanneld's device", flanneld),
            _row("made by hand", hand),
            _row("ratio", ratios),
        ],
    )
    ratio = statistics.median(ratios)
    verdict = "the same" if ratio >= SAME else "NOT the same"
    report.note(f"Median ratio {ratio:.3f}: {verdict} (at least {SAME} is wanted).")
    if max(ratios) - min(ratios) > BUSY:
        report.text("The ratios differ much: the machine is busy. Measure again when it is not.")


def _row(name: str, values: list[float]) -> list[str]:
    shown = [*values, statistics.median(values), min(values), max(values)]
    return [name, *(f"{value:.2f}" for value in shown)]


def _own(host: Host) -> IPv4Address:
    return host.containers[-1].address if host.containers else host.subnet_env().subnet.ip + 1


def _subnet(host: Host) -> IPv4Network:
    return IPv4Network((int(HAND.network_address) + (host.number << 8), 24))


def _mac(host: Host) -> str:
    return f"02:66:00:00:00:{host.number:02x}"


if __name__ == "__main__":
    sys.exit(main())
