"""The rows of the table in docs/operations.md that are not shown elsewhere for each backend.

A test is named after its row. All of one backend share a network of two hosts, each with a
container; docs/failures.md lists every row with its tests, those in other files included.
"""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import IPv4Address

import pytest
from network import (
    LEASE_SECONDS,
    PATIENCE,
    MakeLab,
    Pings,
    client_of,
    count,
    etcd_of,
    key_of,
    leases,
    peer_routes,
    put_config,
    wait_lease,
    wait_told,
)
from overlay import entries, of_peers, problems, start_containers

from lab import Flanneld, Host, Lab, eventually
from lab.cluster import EtcdCluster
from lab.process import freeze, thaw

from .fleet import Fleet, peers_said, value_of_peer

BACKENDS = ["host-gw", "vxlan", "udp"]
STRANGER, STRANGERS_MAC = "10.97.0.199", "02:00:00:00:01:99"

AWAY, BACK = "Watch subnets: ", "Watch subnets is back"

# More events than etcd keeps.
HISTORY = 1010


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def lab(_machine: None, backend: str) -> Iterator[Lab]:
    with Lab(2) as lab:
        put_config(lab, Backend={"Type": backend})
        yield lab


@pytest.fixture(scope="module")
def shared(lab: Lab, backend: str) -> Fleet:
    """A network of this backend, as the former test left it."""
    fleet = Fleet(lab, backend)
    fleet.start(*lab.hosts)
    start_containers(lab.hosts)
    return fleet


@pytest.fixture
def fleet(shared: Fleet) -> Fleet:
    """The same, as the next test wants it: with a good config, all daemons running."""
    put_config(shared.lab, Backend={"Type": shared.backend})
    ended = [daemon for daemon in shared.daemons if not daemon.is_running]
    for daemon in shared.daemons:
        daemon.extra = ()
    for daemon in ended:
        # The test before has failed half way.
        daemon.start().wait_ready()
        wait_whole(shared)
    return shared


def is_connected(fleet: Fleet) -> bool:
    one, two = (host.containers[0] for host in fleet.lab.hosts)
    return one.ping(two.address).lost == two.ping(one.address).lost == 0


def wait_whole(fleet: Fleet) -> None:
    """Wait until each host knows the leases in etcd, and the containers reach each other."""
    eventually(fleet.is_converged, 2 * PATIENCE, "all hosts to know each other")
    eventually(partial(is_connected, fleet), PATIENCE, "an answer to a ping")


@contextmanager
def no_packet_lost(fleet: Fleet, *, but_udp: bool = False) -> Iterator[None]:
    """Pings run both ways meanwhile. ``but_udp``: that backend needs the daemon that is down."""
    if but_udp and fleet.backend == "udp":
        yield
    else:
        with Pings(fleet.lab.hosts) as pings:
            yield
            pings.go_on(10)
    wait_whole(fleet)


@contextmanager
def frozen(daemon: Flanneld) -> Iterator[None]:
    """The daemon does nothing for a while; its host, and udp's tunnel, go on."""
    freeze(daemon.pid)
    try:
        yield
    finally:
        thaw(daemon.pid)


def in_kernel(host: Host, backend: str) -> object:
    """Return what the kernel has of the peers."""
    return entries(host) if backend == "vxlan" else peer_routes(host)


def removals(fleet: Fleet) -> list[int]:
    """Return how often each daemon has said that a peer is gone."""
    return [count(daemon, "Subnet removed") for daemon in fleet.daemons]


def has_more(daemon: Flanneld, text: str, times: int) -> bool:
    return count(daemon, text) > times


def errors(daemon: Flanneld) -> list[str]:
    return [line for line in daemon.log().splitlines() if line.startswith("E")]


def test_etcd_is_unreachable_at_start_and_then_the_config_is_wrong(fleet: Fleet) -> None:
    """SIGTERM ends it all the same; the way to the peers is that of the former run."""
    daemon, etcd = fleet.daemons[0], etcd_of(fleet.lab)
    subnet = daemon.subnet()
    with no_packet_lost(fleet, but_udp=True):
        daemon.kill9()
        put_config(fleet.lab, Backend={"Type": fleet.backend}, Network="10.5.0.0/33")
        etcd.stop()
        daemon.start().wait_log("^E.*Couldn't fetch network config: .*connection refused")
        assert daemon.terminate() == 0
        daemon.start().wait_log("^E.*Couldn't fetch network config: .*connection refused")
        etcd.start()
        daemon.wait_log("^E.*Couldn't fetch network config: invalid CIDR address: 10.5.0.0/33")
        assert daemon.ready_after() is None
        put_config(fleet.lab, Backend={"Type": fleet.backend})
        daemon.wait_ready()
    assert daemon.subnet() == subnet


def test_invalid_backend_config(fleet: Fleet) -> None:
    """One line, status 1; what carries the packets stays. (Of host-gw: behind NAT.)"""
    daemon = fleet.daemons[0]
    wrongs: dict[str, tuple[dict[str, object], str]] = {
        "host-gw": ({}, "your PublicIP differs from interface IP"),
        "vxlan": ({"VNI": "one"}, "VNI"),
        "udp": ({"Port": 65536}, "Port"),
    }
    key, words = wrongs[fleet.backend]
    before = leases(fleet.lab)
    with no_packet_lost(fleet, but_udp=True):
        assert daemon.terminate() == 0
        kept = in_kernel(daemon.host, fleet.backend)
        for wrong in (key, {"Type": "carrier-pigeon"}):
            put_config(fleet.lab, Backend={"Type": fleet.backend, **wrong})
            nat = wrong == key and fleet.backend == "host-gw"
            daemon.extra = ("--public-ip=203.0.113.5",) if nat else ()
            daemon.start()
            assert daemon.wait_exit(PATIENCE) == 1
            (line,) = errors(daemon)
            assert (words if wrong == key else "unknown backend type: carrier-pigeon") in line
            assert daemon.ready_after() is None
        assert in_kernel(daemon.host, fleet.backend) == kept
        assert {s: n.value for s, n in leases(fleet.lab).items()} == {
            s: n.value for s, n in before.items()
        }
        put_config(fleet.lab, Backend={"Type": fleet.backend})
        daemon.start().wait_ready()


def test_etcd_is_gone_while_running(fleet: Fleet) -> None:
    """A renewal falls due meanwhile: it is made when etcd is back, and not a minute later."""
    daemon, etcd = fleet.daemons[0], etcd_of(fleet.lab)
    subnet, removed = daemon.subnet(), removals(fleet)
    away = [count(each, AWAY) for each in fleet.daemons]
    with no_packet_lost(fleet):
        with frozen(daemon):
            value = leases(fleet.lab)[str(subnet)].value
            with client_of(fleet.lab) as client:
                client.put(key_of(subnet), value, ttl=600)
            wait_told(daemon)
            etcd.stop()
        daemon.wait_log("^E.*Error renewing lease")
        # Of some earlier test there may be such a line, and then, 10 seconds after it, no other.
        back = [count(each, BACK) for each in fleet.daemons]
        said = [count(each, AWAY) > n for each, n in zip(fleet.daemons, away, strict=True)]
        before = [in_kernel(each.host, fleet.backend) for each in fleet.daemons]
        etcd.start()
        wait_lease(fleet.lab, subnet, lambda node: node.ttl and node.ttl > LEASE_SECONDS - 120)
        assert [in_kernel(each.host, fleet.backend) for each in fleet.daemons] == before
        for each, times, was_said in zip(fleet.daemons, back, said, strict=True):
            if was_said:
                what = f"{each.host.label}: {BACK}"
                eventually(partial(has_more, each, BACK, times), PATIENCE, what)
    assert removals(fleet) == removed


def test_own_lease_is_deleted(fleet: Fleet) -> None:
    """Taken back so soon that no peer takes its entries away."""
    subnet, removed = fleet.daemons[0].subnet(), removals(fleet)
    value = leases(fleet.lab)[str(subnet)].value
    with no_packet_lost(fleet), client_of(fleet.lab) as client:
        for _ in range(3):
            assert client.delete(key_of(subnet))
            wait_lease(fleet.lab, subnet, lambda node: node.value == value and node.ttl)
    assert removals(fleet) == removed


def test_reservation(fleet: Fleet) -> None:
    """It is used, with the lease data where there are some, and never gets an end from us."""
    daemon = fleet.daemons[0]
    subnet = str(daemon.subnet())
    value = leases(fleet.lab)[subnet].value
    assert daemon.terminate() == 0
    daemon.extra = ("--subnet-lease-renew-margin=1439",)
    with client_of(fleet.lab) as client:
        client.put(key_of(subnet), value_of_peer("udp", daemon.host.address, ""))
        daemon.start().wait_ready()
        node = leases(fleet.lab)[subnet]
        assert (node.value, node.ttl) == (value, None)
        # Nor when it was overwritten and is restored.
        client.put(key_of(subnet), "nonsense")
        wait_lease(fleet.lab, subnet, lambda node: node.value == value)
        assert leases(fleet.lab)[subnet].ttl is None
        assert str(daemon.subnet()) == subnet
        wait_whole(fleet)
        # Deleted, it was none any more.
        client.delete(key_of(subnet))
        wait_lease(fleet.lab, subnet, lambda node: node.value == value and node.ttl)


def move(fleet: Fleet, daemon: Flanneld, address: IPv4Address) -> None:
    """Give a host another address; its daemon goes on with the same subnet."""
    host = daemon.host
    assert daemon.terminate() == 0
    with client_of(fleet.lab) as client:
        client.delete(key_of(daemon.subnet()))
    host.ip("addr flush dev eth0", f"addr add {address}/24 dev eth0")
    host.address = address
    daemon.start().wait_ready()


def test_peer_changes_its_public_ip(fleet: Fleet) -> None:
    """Seen live, and seen only on resync, as the event is among more than etcd keeps."""
    watcher, peer = fleet.daemons
    before, subnet = peer.host.address, peer.subnet()
    move(fleet, peer, before + 100)
    wait_whole(fleet)
    with frozen(watcher):
        move(fleet, peer, before)
        with client_of(fleet.lab) as client:
            for number in range(HISTORY):
                client.put("/elsewhere", str(number))
    watcher.wait_log("outside history window")
    watcher.wait_log(f"Subnet added: {subnet} via {before}$")
    wait_whole(fleet)
    assert peer.subnet() == subnet


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "kill -9"])
def test_sigterm_and_kill_9_then_start(fleet: Fleet, number: signal.Signals) -> None:
    """Kernel entries and lease stay; with udp the device goes, and the lease stays."""
    daemon = fleet.daemons[0]
    host, subnet = daemon.host, daemon.subnet()
    lease, kept = leases(fleet.lab)[str(subnet)], in_kernel(daemon.host, fleet.backend)
    with no_packet_lost(fleet, but_udp=True):
        os.kill(daemon.pid, number)
        if number is signal.SIGKILL:
            assert daemon.wait_exit() == -number
        else:
            assert daemon.wait_exit() == 0
            assert daemon.notifications[-1].text == "STOPPING=1"
            assert "] Starting shutdown..." in daemon.log()
        assert leases(fleet.lab)[str(subnet)].modified_index == lease.modified_index
        assert in_kernel(host, fleet.backend) == ({} if fleet.backend == "udp" else kept)
        daemon.start().wait_ready()
        assert in_kernel(host, fleet.backend) == kept
    assert daemon.subnet() == subnet
    assert leases(fleet.lab)[str(subnet)].created_index == lease.created_index


def test_ready_comes_after_the_subnet_file_and_the_first_peers(fleet: Fleet) -> None:
    """Nothing is left of a former run; the daemon is stopped the moment it says READY=1."""
    daemon, peer = fleet.daemons
    host, subnet = daemon.host, daemon.subnet()
    assert daemon.terminate() == 0
    host.subnet_file.unlink()
    host.ip("route flush proto 102")
    if fleet.backend == "vxlan":
        host.ip("link del flannel.1")
    path = fleet.lab.scratch_file("trap")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trap:
        trap.bind(str(path))
        trap.settimeout(2 * PATIENCE)
        trapped = Flanneld(host, environ={"NOTIFY_SOCKET": str(path)}).start()
        while trap.recv(4096) != b"READY=1":
            pass
        with frozen(trapped):
            assert trapped.subnet() == subnet
            assert host.subnet_file.read_text().count("\n") == 4
            if fleet.backend != "udp":
                assert str(peer.subnet()) in str(in_kernel(host, fleet.backend))
            # No packet waits for the daemon.
            eventually(partial(is_connected, fleet), PATIENCE, "an answer to a ping")
        assert trapped.terminate() == 0
    daemon.start().wait_ready()


def test_subnet_file_cannot_be_written(fleet: Fleet) -> None:
    daemon = fleet.daemons[0]
    with no_packet_lost(fleet, but_udp=True):
        assert daemon.terminate() == 0
        failing = Flanneld(daemon.host, "--subnet-file=/proc/no/subnet.env").start()
        assert failing.wait_exit(2 * PATIENCE) == 1
        assert failing.ready_after() is None
        (line,) = errors(failing)
        assert "Failed to write subnet file /proc/no/subnet.env: " in line
        daemon.start().wait_ready()


def test_own_subnet_is_held_by_another_host(fleet: Fleet) -> None:
    """The last of them, as the host is in another subnet afterwards."""
    daemon = fleet.daemons[0]
    subnet = daemon.subnet()
    value = value_of_peer(fleet.backend, STRANGER, STRANGERS_MAC)
    with client_of(fleet.lab) as client:
        client.put(key_of(subnet), value, ttl=600)
    assert daemon.wait_exit(PATIENCE) == 1
    assert f"({subnet} is now held by {STRANGER})" in errors(daemon)[-1]
    assert daemon.notifications[-1].text == "STOPPING=1"
    # As the service manager does, and docker, whose bridge gets another address.
    daemon.host.ip("addr flush dev cni0")
    daemon.start().wait_ready()
    assert daemon.subnet() != subnet
    assert leases(fleet.lab)[str(subnet)].value == value
    # The way to the former subnet leads to its new owner, on this host, too.
    eventually(fleet.is_converged, 2 * PATIENCE, "all hosts to know each other")


def test_one_endpoint_of_several_dies_in_the_middle_of_a_watch(make_lab: MakeLab) -> None:
    """A host of each backend, each with a prefix of its own; all of them watch at this member."""
    lab = make_lab(len(BACKENDS), etcd=False)
    cluster = lab.start_etcd_cluster(3)
    member, *others = cluster.members
    only_this = [f"blackhole {other.address}/32" for other in others]
    daemons = []
    with cluster.client() as client:
        for number, (host, kind) in enumerate(zip(lab.hosts, BACKENDS, strict=True)):
            config = {"Network": f"10.{5 + number}.0.0/16", "Backend": {"Type": kind}}
            client.put(f"/{kind}/config", json.dumps(config))
            host.ip(*(f"route add {route}" for route in only_this))
            daemons.append(Flanneld(host, f"--etcd-prefix=/{kind}").start())
    for daemon in daemons:
        daemon.wait_ready(2 * PATIENCE)
        daemon.host.ip(*(f"route del {route}" for route in only_this))
    put_burst(cluster, 100, 120)
    member.kill()
    cluster.wait_healthy(without=member)
    put_burst(cluster, 120, 140)
    for daemon, kind in zip(daemons, BACKENDS, strict=True):
        assert problems(daemon) == []
        eventually(partial(has_burst, daemon, kind), 2 * PATIENCE, f"all peers with {kind}")


def put_burst(cluster: EtcdCluster, first: int, end: int) -> None:
    """Write leases of made-up hosts below all prefixes."""
    with cluster.client() as client:
        for number in range(first, end):
            for kind in BACKENDS:
                subnet, value = made_up(kind, number)
                client.put(f"/{kind}/subnets/{subnet.replace('/', '-')}", value, ttl=600)


def made_up(kind: str, number: int) -> tuple[str, str]:
    """Return subnet and lease of a made-up host."""
    subnet = f"10.{5 + BACKENDS.index(kind)}.{number}.0/24"
    return subnet, value_of_peer(kind, f"10.97.0.{number}", f"02:00:00:00:01:{number:02x}")


def has_burst(daemon: Flanneld, kind: str) -> bool:
    """Assert that exactly these are the daemon's peers, but for its own lease's number."""
    numbers = range(100, 140)
    subnets = [made_up(kind, number)[0] for number in numbers]
    if kind == "udp":
        assert peers_said(daemon) == len(numbers)
    elif kind == "vxlan":
        macs = [(f"10.97.0.{n}", f"02:00:00:00:01:{n:02x}") for n in numbers]
        assert entries(daemon.host) == of_peers(
            [(subnet, *rest) for subnet, rest in zip(subnets, macs, strict=True)]
        )
    else:
        assert peer_routes(daemon.host) == {
            subnet: f"10.97.0.{n}" for subnet, n in zip(subnets, numbers, strict=True)
        }
    return True
