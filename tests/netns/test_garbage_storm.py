"""Somebody writes nonsense into etcd, as fast as it goes: nothing grows, nothing gets through."""

import json
import random
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from garbage import nonsense
from network import (
    PATIENCE,
    SUBNETS_KEY,
    MakeLab,
    RouteMonitor,
    client_of,
    key_of,
    put_config,
    start,
    wait_settled,
)
from overlay import put_peer

from flanneld.logs import LONGEST
from flanneld.memory import CALM
from flanneld.retry import MOST_LINES
from lab import Flanneld, eventually
from lab.etcdv2 import EtcdV2
from lab.namespaces import CONFIG_KEY
from lab.process import freeze, thaw
from lab.wait import NotInTime

WARM_UP, STORM = 800, 2400

# KiB. What Python's own memory for small objects and a thread's stack may take once: as a rule it
# is 300, but Python takes memory by the MiB, and 1,050 was seen. With the C library left to itself
# it was 1,400 to 2,700; one value kept of each write would be some 4 MB.
SLACK = 1300

# Keys; with their nonsense that is a list of leases of 3 MB.
LONG_LIST = [f"10.5.{50 + number // 10}.{number % 10 * 4}-30" for number in range(1000)]

# KiB, as tests/soak allows.
LISTED_SLACK = 2048

NAMES = [
    *(f"10.5.{number}.0-24" for number in range(60, 160)),
    *(f"10.{number}.1.0-24" for number in range(6, 30)),
    *("10.5.0.0-16", "10.5.0.0-17", "0.0.0.0-0", "10.5.70.7-32", "10.5.70.9-24", "foo", "a b"),
    *("10.5.1.0-24\u2028", "x" * 200, "10.5.50.0-25/below"),
]


def write(client: EtcdV2, source: random.Random, count: int) -> None:
    for _ in range(count):
        key = f"/coreos.com/network/subnets/{source.choice(NAMES)}"
        if source.random() < 0.1:
            client.put(CONFIG_KEY, source.choice(["", "{", "null", nonsense(source)]))
        elif source.random() < 0.2:
            client.delete(key)
        else:
            client.put(key, nonsense(source), ttl=source.choice([None, 1, 100]))


def threads_of(pid: int) -> set[str]:
    return {path.name for path in Path(f"/proc/{pid}/task").iterdir()}


def wait_until_read(daemon: Flanneld, kind: str, peers: range) -> None:
    """Wait until the daemon knows all that was written: it has taken a peer from its end.

    ``peers`` are numbers of subnets that it has not heard of yet.
    """
    usable = {"Network": "10.5.0.0/16", "SubnetMax": "10.5.49.0", "Backend": {"Type": kind}}
    with client_of(daemon.host.lab) as client:
        client.put(CONFIG_KEY, json.dumps(usable))
        for number in peers:
            # What comes together with many others has no line of its own: then another one.
            subnet = f"10.5.{number}.0/24"
            put_peer(client, subnet, "10.97.0.98", "02:00:00:00:00:98", kind=kind)
            try:
                daemon.wait_log(f"Subnet added: {subnet}", 2.0)
            except NotInTime:
                continue
            finally:
                client.delete(key_of(subnet))
            return
    raise NotInTime(daemon.explain())


@pytest.mark.parametrize("kind", ["vxlan", "udp"])
def test_nonsense_in_etcd_costs_neither_memory_nor_a_thread(make_lab: MakeLab, kind: str) -> None:
    lab = make_lab(1)
    put_config(lab, Backend={"Type": kind})
    (daemon,) = start(*lab.hosts)
    monitor, source = RouteMonitor(daemon.host), random.Random(7)
    with client_of(lab) as client:
        wait_until_read(daemon, kind, range(175, 200))
        rss = daemon.rss_kb()
        write(client, source, WARM_UP)
        wait_until_read(daemon, kind, range(200, 225))
        threads = threads_of(daemon.pid)
        write(client, source, STORM)
        wait_until_read(daemon, kind, range(225, 250))
    assert daemon.rss_kb() - rss < SLACK
    assert threads_of(daemon.pid) == threads
    assert "Traceback" not in daemon.log()
    written = [line.removeprefix("Deleted ").split()[0] for line in monitor.lines()]
    assert bool(written) == (kind == "vxlan")
    assert all(IPv4Network(dst).subnet_of(IPv4Network("10.5.0.0/16")) for dst in written)
    lines = daemon.log().splitlines()
    ignored = [line for line in lines if "Ignoring " in line]
    assert MOST_LINES <= len(ignored) <= 4 * MOST_LINES
    assert "Too many such lines" in daemon.log()
    assert max(map(len, lines)) <= LONGEST + 200
    # None that begins as no line of ours: forged.
    assert {line[0] for line in lines} <= set("IWE")


@pytest.mark.parametrize("kind", ["vxlan", "udp"])
def test_a_long_list_of_nonsense_is_given_back(make_lab: MakeLab, kind: str) -> None:
    """All leases come in one answer: it is read, most of it is nonsense, and its memory is free."""
    lab = make_lab(1)
    put_config(lab, Backend={"Type": kind})
    (daemon,) = start(*lab.hosts)
    wait_settled([daemon])
    source = random.Random(7)
    with client_of(lab) as client:
        wait_until_read(daemon, kind, range(200, 225))
        rss = daemon.rss_kb()
        for name in LONG_LIST:
            client.put(f"{SUBNETS_KEY}/{name}", nonsense(source))
        # All at once: what was written while it was frozen a daemon reads as one list.
        freeze(daemon.pid)
        for name in LONG_LIST:
            client.put(f"{SUBNETS_KEY}/{name}", nonsense(source))
        thaw(daemon.pid)
        wait_until_read(daemon, kind, range(225, 250))
        for name in LONG_LIST:
            client.delete(f"{SUBNETS_KEY}/{name}")

        def is_given_back() -> bool:
            # A watch that nothing happens to looks at the time every 25 s only.
            client.put(key_of("10.5.199.0/24"), "nonsense")
            grown = daemon.rss_kb() - rss
            assert grown < LISTED_SLACK, f"{grown} KiB more than before"
            return True

        eventually(is_given_back, CALM + PATIENCE, "the memory")
