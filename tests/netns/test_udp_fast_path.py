"""The udp backend's fast path between real hosts: what goes by it, what does not, and when."""

import ctypes
import platform
import select
import socket
import struct
import time
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network

import pytest
from network import PATIENCE, MakeLab, put_config
from overlay import problems, start_containers
from test_udp_network import running, tunnel_of, wait_connected
from test_udp_programs import ETH_P_ALL, inner, mac, outer, packet_socket
from test_udp_tunnel import udp_socket
from transfer import both_ways, one_way

from bench.pairs import Pair, as_over_a_wire
from flanneld.backend.udp import fastpath, program_steps
from flanneld.backend.udp.descriptors import Descriptors
from flanneld.backend.udp.fastpath import FastPath
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.tun import UDP_SEGMENT
from flanneld.interface import ExternalInterface
from flanneld.kernel import bpf
from lab import Flanneld, Host, Lab, eventually
from lab.daemon import FLANNELD
from lab.process import freeze, is_running, thaw
from lab.tunnel import MTU, PORT, HostTunnel, connect, container_of

TOGETHER = "The kernel moves most packets itself"
# The daemon's command, without the right to eBPF.
WITHOUT_BPF = ("setpriv", "--bounding-set=-bpf,-sys_admin", "--inh-caps=-all", *FLANNELD)


def make(lab: Lab, *fast: bool) -> Pair:
    """Two hosts of the lab, connected; ``fast``: which of them have a fast path."""
    tunnels = [HostTunnel(host, fast=on) for host, on in zip(lab.hosts, fast, strict=True)]
    connect(lab.hosts, tunnels)
    assert [tunnel.fast_path.is_on for tunnel in tunnels] == list(fast)
    return Pair([container_of(host) for host in lab.hosts], [], tunnels)


@pytest.fixture
def pair(make_lab: MakeLab) -> Pair:
    return make(make_lab(2, etcd=False), True, True)


def is_on(path: FastPath) -> bool:
    return path.is_on


def sent_fast(tunnel: HostTunnel) -> int:
    return tunnel.fast_path.counters().get("sent_packets", 0)


def received_fast(tunnel: HostTunnel) -> int:
    return tunnel.fast_path.counters().get("received_packets", 0)


def get_acquainted(pair: Pair) -> None:
    """Have both hosts know of each other's fast path, and both ways have carried something."""
    one, two = pair.containers
    assert one.ping(two.address, count=5).lost == 0
    before = [sent_fast(tunnel) for tunnel in pair.tunnels]
    assert one.ping(two.address, count=2).lost == 0
    assert [sent_fast(tunnel) for tunnel in pair.tunnels] == [n + 2 for n in before]


# What goes by it


def test_pings_go_by_it_with_the_originals_ttl(pair: Pair) -> None:
    one, two = pair.containers
    get_acquainted(pair)
    sent, received = [[f(t) for t in pair.tunnels] for f in (sent_fast, received_fast)]
    processes = pair.tunnels[0].counters.udp_sent_packets
    result = one.ping(two.address, count=5)
    assert result.lost == 0
    assert "ttl=60" in result.output
    assert [sent_fast(tunnel) for tunnel in pair.tunnels] == [n + 5 for n in sent]
    assert [received_fast(tunnel) for tunnel in pair.tunnels] == [n + 5 for n in received]
    assert pair.tunnels[0].counters.udp_sent_packets == processes
    # In pieces, with options, and longer than a datagram: by the tunnel's process.
    for more in (["-s", "4000"], ["-R"], ["-s", "60000"]):
        done = one.run(["ping", "-n", "-c", "2", "-i", "0.05", *more, str(two.address)])
        assert " 0% packet loss" in done.stdout
    assert pair.tunnels[0].counters.udp_sent_packets > 40


@pytest.mark.parametrize("wire", [False, True], ids=["virtual link", "as over a wire"])
def test_tcp_both_ways_is_exact_and_goes_by_it(pair: Pair, wire: bool) -> None:
    one, two = pair.containers
    if wire:
        for container in pair.containers:
            as_over_a_wire(container.host)
    both_ways(one, two, megabytes=40)
    for tunnel in pair.tunnels:
        counters = tunnel.counters
        # 40 MB are 30,000 packets: some at the beginning, and one now and then.
        assert sent_fast(tunnel) > 20_000
        assert counters.udp_sent_packets < 2_000
        assert not {k: v for k, v in counters.drops.items() if v and k != "not_ipv4"}
        if wire:
            assert received_fast(tunnel) > 20_000
        else:
            # Super-packets, whole, through the process.
            assert counters.udp_received_packets > 20_000
            assert counters.segments_per_receive > 10


def test_udp_of_all_sizes(pair: Pair) -> None:
    get_acquainted(pair)
    one, two = pair.containers
    sink, source = udp_socket(two, str(two.address), 0), udp_socket(one)
    before = sent_fast(pair.tunnels[0])
    for size in (0, 1, 2, 999, 1444, 1445, 5000, 60000):
        payload = bytes(range(256)) * (size // 256 + 1)
        source.sendto(payload[:size], (str(two.address), sink.getsockname()[1]))
        assert sink.recv(1 << 16) == payload[:size]
    assert sent_fast(pair.tunnels[0]) - before >= 4


@pytest.mark.parametrize("wire", [False, True], ids=["virtual link", "as over a wire"])
def test_super_packets_of_udp(pair: Pair, wire: bool) -> None:
    """As QUIC sends them: many datagrams in one call."""
    one, two = pair.containers
    if wire:
        as_over_a_wire(one.host)
    get_acquainted(pair)
    sink, source = udp_socket(two, str(two.address), 0), udp_socket(one)
    target = (str(two.address), sink.getsockname()[1])
    before = sent_fast(pair.tunnels[0])
    for size in (1, 100, 999, 1400):
        sent = [bytes([number]) * size for number in range(40)]
        control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]
        source.sendmsg([b"".join(sent)], control, 0, target)
        assert [sink.recv(1 << 16) for _ in sent] == sent
    assert sent_fast(pair.tunnels[0]) - before >= 4 * 40


def test_all_that_is_on_the_wire_is_one_packet_in_each_datagram(pair: Pair) -> None:
    """Nothing larger, and nothing half done: what a card sends, any peer can read."""
    one, two = pair.containers
    as_over_a_wire(one.host)
    get_acquainted(pair)
    wire = packet_socket(two.host, "eth0", ETH_P_ALL)
    wire.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
    one_way(one, two, megabytes=5)
    seen = 0
    while select.select([wire], [], [], 0.2)[0]:
        frame, where = wire.recvfrom(1 << 17)
        if where[2] != socket.PACKET_HOST or frame[23] != 17:
            continue
        packet = frame[42:]
        assert struct.unpack("!HH", frame[34:38]) == (PORT, PORT)
        assert packet[0] == 0x45
        assert struct.unpack("!H", packet[2:4])[0] == len(packet) <= MTU
        seen += 1
    assert seen > 3_000


# Who has one


@pytest.mark.parametrize("fast", [(True, False), (False, True)])
def test_with_a_peer_that_has_none(make_lab: MakeLab, fast: tuple[bool, bool]) -> None:
    pair = make(make_lab(2, etcd=False), *fast)
    one, two = pair.containers
    assert one.ping(two.address, count=3).lost == 0
    assert two.ping(one.address, count=3).lost == 0
    both_ways(one, two, megabytes=10)
    for container in pair.containers:
        as_over_a_wire(container.host)
    both_ways(one, two, megabytes=10)
    tunnel = pair.tunnels[fast.index(True)]
    # Greetings only.
    assert 1 <= sent_fast(tunnel) < 20
    assert received_fast(tunnel) == 0
    assert pair.tunnels[fast.index(False)].counters.drops["wrong_source"] == 0


def test_tcp_alone_makes_both_known(pair: Pair) -> None:
    """Without a ping of anybody's: the tunnel's process greets the peer."""
    one, two = pair.containers
    both_ways(one, two, megabytes=20)
    assert sent_fast(pair.tunnels[0]) > 10_000


def test_a_stream_in_one_direction_stays_on_it(pair: Pair) -> None:
    """Longer than the peer counts as known: the process greets it again before that ends."""
    get_acquainted(pair)
    one, two = pair.containers
    sink, source = udp_socket(two, str(two.address), 0), udp_socket(one)
    target = (str(two.address), sink.getsockname()[1])
    before = pair.tunnels[0].counters.udp_sent_packets
    count = int((program_steps.FAST_MS / 1000 + 2) / 0.05)
    for _ in range(count):
        source.sendto(b"statistics", target)
        assert sink.recv(100) == b"statistics"
        time.sleep(0.05)
    # One in five seconds.
    assert 2 <= pair.tunnels[0].counters.udp_sent_packets - before <= 5


def test_a_peer_that_loses_it_is_noticed(pair: Pair) -> None:
    """As when another daemon takes its place: what it sends then has checksums."""
    one, two = pair.containers
    both_ways(one, two, megabytes=5)
    pair.tunnels[1].fast_path.close()
    # TCP sends again what was lost meanwhile.
    both_ways(one, two, megabytes=5)
    before = sent_fast(pair.tunnels[0])
    both_ways(one, two, megabytes=5)
    assert sent_fast(pair.tunnels[0]) - before < 100


def test_peers_come_and_go(pair: Pair) -> None:
    one, two = pair.containers
    get_acquainted(pair)
    subnet = next(iter(pair.tunnels[0]._known))
    pair.tunnels[0].remove_peers([subnet])
    before = sent_fast(pair.tunnels[0])
    done = one.run(["ping", "-n", "-c", "1", "-W", "1", str(two.address)], check=False)
    assert "100% packet loss" in done.stdout
    assert sent_fast(pair.tunnels[0]) == before
    connect([one.host, two.host], pair.tunnels)
    get_acquainted(pair)


def test_ten_thousand_peers(pair: Pair) -> None:
    many = [
        PeerRoute(IPv4Network((0x0A800000 + (n << 8), 24)), IPv4Address(0x0A610100 + n))
        for n in range(10_000)
    ]
    pair.tunnels[0].set_peers(many)
    get_acquainted(pair)
    pair.tunnels[0].remove_peers([route.subnet for route in many])
    get_acquainted(pair)


def test_a_forged_super_packet_is_dropped(pair: Pair) -> None:
    """The tunnel's process believes only who knows this run's secret."""
    one, two = pair.containers
    here, there = one.host.address, two.host.address
    wire = packet_socket(two.host, "eth0")
    packet = inner(6, source=str(two.address), target=str(one.address))
    forged = bytes(8) + bytes([1, 1, 40, 0, 100, 0, 20, 0, 16, 0]) + packet
    frame = outer(forged, there, here, checksum=True)
    before = pair.tunnels[0].counters
    wire.send(mac(one.host) + mac(two.host) + b"\x08\0" + frame)

    def dropped() -> bool:
        drops = pair.tunnels[0].counters.drops
        return sum(drops.values()) > sum(before.drops.values())

    eventually(dropped, 3.0, "it to be dropped")
    assert pair.tunnels[0].counters.tun_written_packets == before.tun_written_packets


# When there is one


def path_on(host: Host, device: str, udp: socket.socket, tun: int) -> FastPath:
    index = socket.if_nametoindex(device)
    external = ExternalInterface(index, device, 1500, host.address, host.address)
    path = FastPath(external, udp, port=PORT, mtu=MTU)
    path.ensure(tun)
    return path


def test_ipsec_policies_end_it_and_their_end_brings_it_back(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    host, daemon = lab.hosts[0], daemons[0]
    policy = ["dir", "out", "src", "10.99.0.0/24", "dst", "10.99.1.0/24"]
    host.run(["ip", "xfrm", "policy", "add", *policy, "action", "block"])
    # At once: until then packets go out as nobody wanted it.
    daemon.wait_log(r"no fast path \(this host has IPsec policies", 1.0)
    assert attached(host, "eth0", bpf.TCX_INGRESS) == 0
    wait_connected(lab)
    # What no policy is about may be forbidden, too.
    host.run(["ip", "xfrm", "policy", "setdefault", "out", "block"])
    host.run(["ip", "xfrm", "policy", "del", *policy])
    time.sleep(1.0)
    assert attached(host, "eth0", bpf.TCX_INGRESS) == 0
    written = len(daemon.log())
    host.run(["ip", "xfrm", "policy", "setdefault", "out", "accept"])
    eventually(lambda: TOGETHER in daemon.log()[written:], fastpath.CHECK + 5.0, "its return")
    assert attached(host, "eth0", bpf.TCX_INGRESS) == 1
    wait_connected(lab)


def test_no_ethernet_no_fast_path(make_lab: MakeLab, caplog: pytest.LogCaptureFixture) -> None:
    (host,) = make_lab(1, etcd=False).hosts
    tunnel = HostTunnel(host)
    index = tunnel.descriptors.tun.index
    path = host.inside(lambda: path_on(host, "flannel0", tunnel.descriptors.udp, index))
    assert not is_on(path)
    assert "flannel0 is no Ethernet device" in caplog.text


def path_on_ext0(make_lab: MakeLab, new: Sequence[str]) -> tuple[Host, FastPath, int]:
    """A host with a device ext0, made by ``new``, a fast path on it, and the TUN's index."""
    (host,) = make_lab(1, etcd=False).hosts
    tunnel = HostTunnel(host)
    index = tunnel.descriptors.tun.index
    host.ip(*new)
    path = host.inside(lambda: path_on(host, "ext0", tunnel.descriptors.udp, index))
    host.lab.when_closing(path.close)
    assert is_on(path)
    return host, path, index


def test_an_interface_that_goes_and_comes_back(
    make_lab: MakeLab, caplog: pytest.LogCaptureFixture
) -> None:
    new = ("link add ext0 type veth peer name txe0", "link set ext0 up")
    host, path, index = path_on_ext0(make_lab, new)
    host.ip("link del ext0")
    host.inside(lambda: path.ensure(index))
    assert not is_on(path)
    assert "there is no ext0" in caplog.text
    host.ip(*new)
    host.inside(lambda: path.ensure(index))
    assert is_on(path)
    assert attached(host, "ext0", bpf.TCX_INGRESS) == 1


def test_another_interface_with_the_same_index(make_lab: MakeLab) -> None:
    new = ("link add ext0 index 4242 type veth peer name txe0", "link set ext0 up")
    host, path, index = path_on_ext0(make_lab, new)
    host.ip("link del ext0", *new, "link set ext0 name ext1")
    assert attached(host, "ext1", bpf.TCX_INGRESS) == 0
    host.inside(lambda: path.ensure(index))
    assert attached(host, "ext1", bpf.TCX_INGRESS) == 1
    assert attached(host, "flannel0", bpf.TCX_EGRESS) == 1


@pytest.mark.parametrize("source_check", [True, False])
def test_two_tunnels_on_one_interface_do_not_meet(make_lab: MakeLab, source_check: bool) -> None:
    """Each has a port of its own; and without source check the slow way lets in the rest."""
    lab = make_lab(2, etcd=False)
    tunnels = [HostTunnel(host, fast=True, source_check=source_check) for host in lab.hosts]
    connect(lab.hosts, tunnels)
    pair = Pair([container_of(host) for host in lab.hosts], [], tunnels)
    host = lab.hosts[0]
    other = host.inside(lambda: Descriptors.open(host.address, PORT + 1, pattern="other%d"))
    lab.when_closing(other.close)
    external = tunnels[0].fast_path._external
    path = FastPath(external, other.udp, port=PORT + 1, mtu=MTU)
    lab.when_closing(path.close)
    host.inside(lambda: path.ensure(other.tun.index))
    assert attached(host, "eth0", bpf.TCX_INGRESS) == 2
    get_acquainted(pair)
    assert path.counters()["received_packets"] == 0
    # From nobody's public IP.
    packet = inner(source="10.5.9.9", target="10.5.1.0")
    wire = packet_socket(lab.hosts[1], "eth0")
    frame = outer(packet, lab.hosts[1].address + 5, host.address)
    before = tunnels[0].counters.tun_written_packets
    wire.send(mac(host) + mac(lab.hosts[1]) + b"\x08\0" + frame)
    dropped = "unknown_peer"
    if source_check:
        eventually(lambda: tunnels[0].counters.drops[dropped] == 1, 3.0, "it to be dropped")
    else:
        eventually(lambda: tunnels[0].counters.tun_written_packets > before, 3.0, "it to be let in")


def attached(host: Host, device: str, where: int) -> int:
    """How many programs are hooked into a device (BPF_PROG_QUERY)."""

    def ask() -> int:
        answer = bytearray(64)
        struct.pack_into("=II", answer, 0, socket.if_nametoindex(device), where)
        number = bpf._NUMBERS[platform.machine()]
        where_it_lies = ctypes.c_void_p(bpf._address(answer))
        assert bpf._libc().syscall(number, 16, where_it_lies, 64) == 0
        count: int = struct.unpack_from("=I", answer, 24)[0]
        return count

    return host.inside(ask)


def test_nothing_is_left_when_the_daemon_is_killed(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    for host in lab.hosts:
        assert attached(host, "eth0", bpf.TCX_INGRESS) == 1
        assert attached(host, "flannel0", bpf.TCX_EGRESS) == 1
    daemons[0].kill9()
    eventually(lambda: attached(lab.hosts[0], "eth0", bpf.TCX_INGRESS) == 0, PATIENCE, "its end")
    daemons[0].start().wait_ready()
    wait_connected(lab)
    assert attached(lab.hosts[0], "eth0", bpf.TCX_INGRESS) == 1
    assert daemons[0].terminate() == 0
    assert attached(lab.hosts[0], "eth0", bpf.TCX_INGRESS) == 0


def test_a_stuck_tunnel_does_not_stop_what_goes_by_it(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    pid = tunnel_of(daemons[0])
    one, two = (host.containers[0] for host in lab.hosts)
    freeze(pid)
    try:
        # One in some seconds goes the slow way.
        assert one.ping(two.address, count=20).lost <= 1
    finally:
        if is_running(pid):
            thaw(pid)


def test_the_key_turns_it_off(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, FastPath=False)
    for daemon in daemons:
        assert TOGETHER not in daemon.log()
        assert daemon.log().count("udp fast path: off (FastPath is false)") == 1
    assert attached(lab.hosts[0], "eth0", bpf.TCX_INGRESS) == 0
    assert all(problems(daemon) == [] for daemon in daemons)


def test_without_the_right_to_it_one_line_says_so(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab, Backend={"Type": "udp"})
    daemons = [Flanneld(host, program=WITHOUT_BPF).start() for host in lab.hosts]
    for daemon in daemons:
        daemon.wait_ready()
    start_containers(lab.hosts)
    wait_connected(lab)
    for daemon in daemons:
        said = [line for line in daemon.log().splitlines() if "no fast path" in line]
        assert len(said) == 1
        assert "no right to load eBPF programs" in said[0]


def test_masquerading_and_forwarded_ports(make_lab: MakeLab) -> None:
    """With connection tracking and NAT on both hosts, as docker has it."""
    lab = make_lab(2)
    put_config(lab, Backend={"Type": "udp"})
    daemons = [Flanneld(host, "--ip-masq").start() for host in lab.hosts]
    for daemon in daemons:
        daemon.wait_ready()
    start_containers(lab.hosts)
    wait_connected(lab)
    one, two = (host.containers[0] for host in lab.hosts)
    both_ways(one, two, megabytes=2)
    # A port of host 1 that leads to the container of host 2, and its answers back.
    lab.hosts[0].run(
        [
            *("iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "8080"),
            *("-j", "DNAT", "--to-destination", f"{two.address}:80"),
        ]
    )
    listener = two.inside(lambda: socket.create_server((str(two.address), 80)))
    listener.settimeout(5.0)
    gateway = str(lab.hosts[0].subnet_env().subnet.ip)
    client = one.inside(lambda: socket.create_connection((gateway, 8080), timeout=5.0))
    with listener, client:
        server, _ = listener.accept()
        with server:
            server.settimeout(5.0)
            client.sendall(b"x" * 100_000)
            got = b""
            while len(got) < 100_000:
                got += server.recv(1 << 16)
            server.sendall(b"y" * 100_000)
            back = b""
            while len(back) < 100_000:
                back += client.recv(1 << 16)
    assert (len(got), len(back)) == (100_000, 100_000)


def only_answers(host: Host) -> None:
    """Have the host's firewall let in only answers."""
    for rule in ("-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT", "-p udp -j DROP"):
        host.run(["iptables", "-A", "INPUT", "-i", "eth0", *rule.split()])


def test_without_states_a_firewall_lets_the_slow_way_in(make_lab: MakeLab) -> None:
    """Hosts that accept only answers: each must go on sending the slow way now and then."""
    lab, daemons = running(make_lab)
    for host in lab.hosts:
        only_answers(host)
    one, two = (host.containers[0] for host in lab.hosts)
    both_ways(one, two, megabytes=2)
    assert one.ping(two.address, count=3).lost == 0
    assert all(is_running(daemon.pid) for daemon in daemons)


def test_such_a_firewall_and_a_peer_without_a_fast_path(make_lab: MakeLab) -> None:
    """Its answers come in since the question has passed the firewall, too: that of ping as well."""
    pair = make(make_lab(2, etcd=False), True, False)
    one, two = pair.containers
    only_answers(one.host)
    assert one.ping(two.address, count=3).lost == 0
    both_ways(one, two, megabytes=2)
