"""What the fast path receives packet by packet: TCP is joined before it goes on."""

import errno
import logging
import os
import select
import signal
import socket
import time
from contextlib import suppress

import pytest
from network import PATIENCE, MakeLab, put_config
from test_udp_fast_path import WITHOUT_BPF, get_acquainted, make, received_fast
from test_udp_network import running, wait_connected
from test_udp_programs import ETH_P_ALL, ETH_P_IP, TCP, UDP, inner, packet_socket
from transfer import both_ways, one_way

from bench.pairs import Pair, as_over_a_wire
from flanneld.kernel import bpf, grolink
from flanneld.kernel.grolink import GroLink
from lab import Container, Host, eventually
from lab.daemon import FLANNELD
from lab.process import LabError
from lab.tunnel import MTU

INLET, OUTLET = "flannel0-in", "flannel0-gro"


@pytest.fixture
def pair(make_lab: MakeLab) -> Pair:
    pair = make(make_lab(2, etcd=False), True, True)
    get_acquainted(pair)
    return pair


def devices(host: Host) -> set[str]:
    return {link["ifname"] for link in host.ip_json("link", "show")}


def without_offloads(container: Container) -> None:
    """Have the container, and its port of the host's bridge, send nothing but whole packets."""
    features = ["tso", "off", "gso", "off", "tx", "off"]
    container.run(["ethtool", "-K", "eth0", *features])
    for link in container.host.ip_json("link", "show", "master", "cni0"):
        container.host.run(["ethtool", "-K", link["ifname"], *features])


class Lengths:
    """The lengths of the TCP packets that are received as from a device."""

    def __init__(self, host: Host, device: str) -> None:
        self._socket = packet_socket(host, device, ETH_P_ALL)
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE

    def longest(self) -> int:
        longest = 0
        while select.select([self._socket], [], [], 0.0)[0]:
            data, where = self._socket.recvfrom(1 << 17)
            if where[2] == socket.PACKET_HOST and data[9] == TCP:
                longest = max(longest, len(data))
        return longest


def test_tcp_over_a_wire_is_joined(pair: Pair) -> None:
    one, two = pair.containers
    as_over_a_wire(one.host)
    lengths = Lengths(two.host, "flannel0")
    one_way(one, two, megabytes=4)
    assert received_fast(pair.tunnels[1]) > 2_500
    assert lengths.longest() > 4 * MTU
    for end in (INLET, OUTLET):
        (link,) = two.host.ip_json("-d", "address", "show", "dev", end)
        assert (link["mtu"], link["addr_info"]) == (65535, [])
        assert link["num_rx_queues"] == min(os.cpu_count() or 1, 16)
    # Nothing but TCP waits for others to be joined with.
    before = two.host.ip_json("-s", "link", "show", OUTLET)[0]["stats64"]["rx"]["packets"]
    assert one.ping(two.address, count=3).lost == 0
    after = two.host.ip_json("-s", "link", "show", OUTLET)[0]["stats64"]["rx"]["packets"]
    assert after == before > 2_500


@pytest.mark.parametrize("wire", [False, True], ids=["virtual link", "as over a wire"])
def test_it_can_be_cut_again(pair: Pair, wire: bool) -> None:
    """As by a container whose device takes no super-packets, and checks what it gets."""
    one, two = pair.containers
    for container in pair.containers:
        if wire:
            as_over_a_wire(container.host)
        # On the virtual link what is sent has no checksum then, and comes one by one.
        one.run(["ethtool", "-K", "eth0", "tso", "off", "gso", "off"])
    without_offloads(two)
    before = received_fast(pair.tunnels[1])
    one_way(one, two, megabytes=20)
    assert received_fast(pair.tunnels[1]) - before > 13_000
    both_ways(one, two, megabytes=10)


def test_only_ipv4_comes_out(pair: Pair) -> None:
    _, two = pair.containers
    host = two.host
    out = packet_socket(host, "flannel0", ETH_P_ALL)
    into = packet_socket(host, INLET, ETH_P_ALL)
    # What is not taken out goes on here.
    on = [packet_socket(host, OUTLET, kind) for kind in (0x86DD, 0x0806, ETH_P_IP)]
    packets = [inner(kind, source="10.5.1.9", target=str(two.address)) for kind in (TCP, UDP)]
    for kind in (b"\x86\xdd", b"\x08\x06", b"\x08\0"):
        for packet in packets:
            into.send(bytes(12) + kind + packet)
    heard = []
    while select.select([out], [], [], 0.5)[0]:
        data, where = out.recvfrom(1 << 16)
        if (
            where[2] == socket.PACKET_HOST
            and data[:1] == b"\x45"
            and data[12:16] == packets[0][12:16]
        ):
            heard.append(data)
    assert heard == packets
    assert select.select(on, [], [], 0.0)[0] == []


def test_without_it_packets_go_on_one_by_one(
    make_lab: MakeLab, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else's device has the name."""
    lab = make_lab(2, etcd=False)
    for host in lab.hosts:
        host.ip(f"link add {OUTLET} type bridge")
    with caplog.at_level(logging.INFO):
        pair = make(lab, True, True)
    said = [r.getMessage() for r in caplog.records if "one by one" in r.getMessage()]
    assert len(said) == 2
    assert f"{OUTLET} exists and is no veth device (but bridge)" in said[0]
    assert "rename or delete it" in said[0]
    get_acquainted(pair)
    one, two = pair.containers
    as_over_a_wire(one.host)
    one_way(one, two, megabytes=4)
    assert received_fast(pair.tunnels[1]) > 2_500
    for tunnel in pair.tunnels:
        assert devices(tunnel.host) >= {OUTLET, "flannel0"}
        assert INLET not in devices(tunnel.host)
    # When the name is free again.
    tunnel = pair.tunnels[1]
    tunnel.host.ip(f"link del {OUTLET}")
    tunnel.fast_path._joining._again_at = 0.0
    caplog.clear()
    with caplog.at_level(logging.INFO):
        tunnel.host.inside(lambda: tunnel.fast_path.ensure(tunnel.descriptors.tun.index))
    assert [r.getMessage() for r in caplog.records] == ["TCP packets from the peers are joined"]
    lengths = Lengths(two.host, "flannel0")
    one_way(one, two, megabytes=4)
    assert lengths.longest() > 4 * MTU


@pytest.mark.parametrize(
    "harm",
    [
        f"ip link del {INLET}",
        f"ip link set {OUTLET} down",
        f"ip link set {INLET} down",
        f"ip link set {INLET} mtu 1400",
        f"ethtool -K {OUTLET} gro off",
        f"ethtool -K {INLET} tso on",
    ],
)
def test_what_is_done_to_it_by_hand_is_mended(make_lab: MakeLab, harm: str) -> None:
    lab, daemons = running(make_lab)
    one, two = (host.containers[0] for host in lab.hosts)
    as_over_a_wire(one.host)
    one_way(one, two, megabytes=1)
    lab.hosts[1].run(harm.split())
    said = f"{INLET} or {OUTLET} was gone, down or changed: both are made anew"
    eventually(lambda: said in daemons[1].log(), PATIENCE, "it to be noticed")
    begun = time.monotonic()
    one_way(one, two, megabytes=1)
    # TCP's own patience is longer than a second only after some losses.
    assert time.monotonic() - begun < 5.0
    lengths = Lengths(two.host, "flannel0")
    wait_connected(lab)
    one_way(one, two, megabytes=4)
    assert lengths.longest() > 4 * MTU
    assert daemons[1].log().count(said) == 1
    os.kill(daemons[1].pid, signal.SIGUSR1)
    eventually(lambda: ", TCP is joined" in daemons[1].log(), PATIENCE, "the state")


def test_it_ends_with_the_daemon_or_is_replaced(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    host, daemon = lab.hosts[0], daemons[0]
    assert devices(host) >= {INLET, OUTLET}
    assert daemon.terminate() == 0
    assert not devices(host) & {INLET, OUTLET}
    daemon.start().wait_ready()
    daemon.kill9()
    left = {link["ifindex"] for link in host.ip_json("link", "show", "type", "veth")}
    assert devices(host) >= {INLET, OUTLET}
    daemon.start().wait_ready()
    wait_connected(lab)
    assert "one by one" not in daemon.log()
    assert devices(host) >= {INLET, OUTLET}
    for name in (INLET, OUTLET):
        assert host.ip_json("link", "show", name)[0]["ifindex"] not in left
    one_way(host.containers[0], lab.hosts[1].containers[0], megabytes=1)
    daemon.kill9()
    done = host.run([*FLANNELD, "--cleanup", f"--subnet-file={host.subnet_file}"])
    assert {f"removed device {INLET}", f"removed device {OUTLET}"} <= {*done.stdout.splitlines()}
    assert not devices(host) & {INLET, OUTLET}


def test_a_start_that_makes_none_removes_what_was_left(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    host, daemon = lab.hosts[0], daemons[0]
    daemon.kill9()
    assert devices(host) >= {INLET, OUTLET}
    before, daemon.program = daemon.program, WITHOUT_BPF
    daemon.start().wait_ready()
    assert not devices(host) & {INLET, OUTLET}
    assert daemon.terminate() == 0
    daemon.program = before
    daemon.start().wait_ready()
    daemon.kill9()
    assert devices(host) >= {INLET, OUTLET}
    put_config(lab, Backend={"Type": "host-gw"})
    daemon.start().wait_ready()
    eventually(lambda: not devices(host) & {INLET, OUTLET}, PATIENCE, "their end")


def refused(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_pair_that_cannot_be_set_up_is_removed(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grolink, "_set_offload", refused)
    pair = make(make_lab(2, etcd=False), True, True)
    for container in pair.containers:
        assert not devices(container.host) & {INLET, OUTLET}
    assert len([r for r in caplog.records if "one by one" in r.getMessage()]) == 2
    get_acquainted(pair)
    one, two = pair.containers
    one_way(one, two, megabytes=1)


def test_who_changes_it_again_and_again_has_his_way(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    one, two = (host.containers[0] for host in lab.hosts)
    as_over_a_wire(one.host)
    said = "is set down or changed again and again, by somebody else"

    def given_up() -> bool:
        with suppress(LabError):  # it is not there for a moment
            two.host.ip(f"link set {OUTLET} down")
        return said in daemons[1].log()

    eventually(given_up, PATIENCE, "the daemon to give it up")
    assert daemons[1].log().count("both are made anew") <= 4
    assert not devices(two.host) & {INLET, OUTLET}
    one_way(one, two, megabytes=4)


def test_a_stranger_with_its_index_is_left_alone(make_lab: MakeLab) -> None:
    (host,) = make_lab(1, etcd=False).hosts
    pair = host.inside(lambda: GroLink.make("flannel9"))
    host.ip("link del flannel9-in", f"link add stranger index {pair.inlet} type veth peer name s1")
    assert not host.inside(pair.is_in_order)
    host.inside(pair.close)
    assert devices(host) >= {"stranger", "s1"}


def test_a_kernel_without_tcx_is_not_made_to_make_devices(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux before 6.6: there is none here, so its answer is a double's."""

    def refuse(*_: object) -> bpf.Link:
        raise OSError(errno.EOPNOTSUPP, "no TCX")

    def make_none(name: str) -> GroLink:
        raise AssertionError(name)

    monkeypatch.setattr(bpf.Program, "attach", refuse)
    monkeypatch.setattr(GroLink, "make", make_none)
    make(make_lab(2, etcd=False), False, False)
