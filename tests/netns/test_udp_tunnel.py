"""The udp tunnel between real hosts, on the real kernel."""

import errno
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
import udp_reference as reference
from transfer import both_ways, one_way

from bench.pairs import Pair, build, make_pair
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.process import Exit, TunnelError
from flanneld.backend.udp.tun import ALL, Offload
from lab import Container, Lab, Namespace, eventually
from lab.process import freeze, is_running
from lab.tunnel import PORT, HostTunnel, connect, container_of, route_to

MakeLab = Callable[..., Lab]
IP_RECVERR, MSG_ERRQUEUE = 11, 0x2000
TOP = Path(__file__).resolve().parents[2]


def make(lab: Lab, **options: object) -> Pair:
    """Two hosts of the lab, connected, with a container each. ``options`` for both tunnels."""
    tunnels = [HostTunnel(host, **options) for host in lab.hosts]  # type: ignore[arg-type]  # any
    connect(lab.hosts, tunnels)
    containers = [container_of(host) for host in lab.hosts]
    return Pair(containers, [t.process.pid for t in tunnels], tunnels)


@pytest.fixture
def pair(make_lab: MakeLab) -> Pair:
    return make(make_lab(2, etcd=False))


def udp_socket(namespace: Namespace, address: str = "", port: int = 0) -> socket.socket:
    def open_it() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((address, port))
        made.settimeout(2.0)
        return made

    opened = namespace.inside(open_it)
    namespace.lab.when_closing(opened.close)
    return opened


def inner(source: str, target: str, *, ttl: int = 64, payload: bytes = b"hello") -> bytes:
    """A UDP packet to port 7 as it is inside a datagram."""
    transport = struct.pack("!HHHH", 5555, 7, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(transport), 1, 0x4000, ttl, 17, 0)
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    return reference.with_checksums(head + addresses + transport)


def works(pair: Pair) -> None:
    one, two = pair.containers
    assert one.ping(two.address, count=3).lost == 0
    assert two.ping(one.address, count=3).lost == 0


def both(pair: Pair) -> tuple[Container, Container]:
    one, two = pair.containers
    return one, two


# Forwarding


def test_pings_of_all_sizes_and_what_they_cost_in_ttl(pair: Pair) -> None:
    one, two = pair.containers
    result = one.ping(two.address, count=3)
    assert result.lost == 0
    # Two hops of the kernel, two of the tunnel, as in the original.
    assert "ttl=60" in result.output
    for size in ("0", "1", "999", "1444", "4000", "60000"):
        done = one.run(["ping", "-n", "-c", "2", "-i", "0.05", "-s", size, str(two.address)])
        assert " 0% packet loss" in done.stdout
    record = one.run(["ping", "-n", "-c", "2", "-i", "0.05", "-R", str(two.address)], check=False)
    assert " 0% packet loss" in record.stdout


def test_each_datagram_is_one_inner_packet(pair: Pair) -> None:
    pair.tunnels[1].close()
    # The socket is still open and bound: what is sent to it can be read from it.
    listener = pair.tunnels[1].descriptors.udp
    sender = udp_socket(pair.containers[0])
    sent = [bytes([n]) * (n * 14) for n in range(100)]
    for payload in sent:
        sender.sendto(payload, (str(pair.containers[1].address), 9))
    seen: list[bytes] = []

    def receive() -> bool:
        try:
            # With UDP_GRO several of one size may come in one call, said in a control message.
            data, control, _, _ = listener.recvmsg(65536, 64)
        except BlockingIOError:
            return len(seen) == len(sent)
        assert not control or struct.unpack("=i", control[0][2])[0] >= len(data)
        seen.append(data)
        return len(seen) == len(sent)

    eventually(receive, 5.0, "all datagrams", interval=0.0)
    for packet, payload in zip(seen, sent, strict=True):
        assert packet[:2] == b"\x45\0"
        assert struct.unpack("!H", packet[2:4])[0] == len(packet)
        assert packet[8] == 62
        assert packet[28:] == payload
        assert reference.is_intact(packet)


def test_tcp_both_ways_is_exact(pair: Pair) -> None:
    both_ways(*both(pair), megabytes=20)
    counters = pair.tunnels[0].counters
    assert counters.segments_per_send > 2
    assert counters.segments_per_receive > 2
    lost = {k: v for k, v in counters.drops.items() if v and k != "not_ipv4"}
    assert not lost


@pytest.mark.parametrize("missing", list(Offload), ids=lambda offload: offload.name)
def test_without_one_offload_it_goes_on_slower(make_lab: MakeLab, missing: Offload) -> None:
    pair = make(make_lab(2, etcd=False), wanted=ALL & ~missing)
    works(pair)

    def as_expected() -> bool:
        both_ways(*both(pair), megabytes=3)
        counters = pair.tunnels[0].counters
        one_by_one = counters.segments_per_send == 1.0, counters.segments_per_receive == 1.0
        # On a veth only what was sent in one call can be received in one.
        return one_by_one == (
            missing is Offload.SEGMENT,
            missing in (Offload.SEGMENT, Offload.GRO),
        )

    # On a busy machine there may be no two packets at once for a while.
    eventually(as_expected, 20.0, "packets sent and received together, or one by one")


def test_without_any_offload_it_goes_packet_by_packet(make_lab: MakeLab) -> None:
    pair = make(make_lab(2, etcd=False), wanted=Offload(0))
    works(pair)
    both_ways(*both(pair), megabytes=3)
    for tunnel in pair.tunnels:
        counters = tunnel.counters
        assert counters.segments_per_send == counters.segments_per_receive == 1.0
        assert counters.tun_written_packets == counters.tun_write_calls


@pytest.mark.parametrize("kind", ["ours-c", "c-ours"])
def test_a_peer_that_sends_packet_by_packet(make_lab: MakeLab, kind: str) -> None:
    lab = make_lab(0, etcd=False)
    _, proxy = build(lab.directory)
    pair = make_pair(lab, kind, proxy)
    works(pair)
    both_ways(*both(pair), megabytes=5)


def test_packets_larger_than_the_path_still_arrive(pair: Pair) -> None:
    pair.tunnels[0].host.ip("route add 10.97.0.2/32 dev eth0 mtu 1300")
    one, two = pair.containers
    one_way(one, two, megabytes=3)
    assert (
        " 0% packet loss"
        in one.run(["ping", "-n", "-c", "2", "-i", "0.05", "-s", "1444", str(two.address)]).stdout
    )


# ICMP


def error_for(container: Container, target: str, ttl: int) -> tuple[int, int, int, str]:
    """errno, ICMP type and code, and who sent it, after a UDP packet."""
    sender = udp_socket(container)
    sender.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
    sender.sendto(b"hello", (target, 7))

    def ask() -> tuple[bytes, list[tuple[int, int, bytes]]] | None:
        try:
            data, control, _, _ = sender.recvmsg(2000, 512, MSG_ERRQUEUE)
        except BlockingIOError:
            return None
        return data, control

    found = eventually(ask, 3.0, f"an ICMP error about {target}")
    assert found is not None
    _, control = found
    # struct sock_extended_err, then the sender's address (linux/errqueue.h).
    number, origin, kind, code = struct.unpack_from("=IBBB", control[0][2])
    assert origin == 2
    return number, kind, code, socket.inet_ntoa(control[0][2][20:24])


def test_the_sender_is_told_that_there_is_no_route(pair: Pair) -> None:
    one = pair.containers[0]
    assert error_for(one, "10.5.99.9", 64) == (errno.ENETUNREACH, 3, 0, "10.5.1.1")
    counters = pair.tunnels[0].counters
    assert counters.icmp_unreachable == 1
    assert counters.drop_no_route >= 1


def test_the_host_itself_is_told_that_there_is_no_route(pair: Pair) -> None:
    host = pair.tunnels[0].host
    sender = udp_socket(host)
    sender.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    sender.connect(("10.5.99.9", 7))
    sender.send(b"hello")
    with pytest.raises(OSError, match="unreachable") as caught:
        sender.recv(100)
    assert caught.value.errno == errno.ENETUNREACH


# The first hop of the tunnel, and the second, whose answer goes back through both tunnels.
@pytest.mark.parametrize(("ttl", "by"), [(2, "10.5.1.1"), (3, "10.5.2.0")])
def test_the_sender_is_told_that_the_ttl_ended(pair: Pair, ttl: int, by: str) -> None:
    one, two = pair.containers
    found = error_for(one, str(two.address), ttl)
    assert found == (errno.EHOSTUNREACH, 11, 0, by)
    assert pair.tunnels[ttl - 2].counters.icmp_time_exceeded == 1


def test_no_icmp_about_icmp_and_fragments(pair: Pair) -> None:
    one = pair.containers[0]
    one.ping("10.5.99.9", count=3, deadline=0.2)
    one.run(["ping", "-c", "2", "-i", "0.05", "-W", "0.2", "-t", "2", "10.5.2.2"], check=False)
    sender = udp_socket(one)
    sender.sendto(bytes(4000), ("10.5.99.9", 7))
    tunnel = pair.tunnels[0]
    eventually(lambda: tunnel.counters.drop_no_route >= 6, 2.0, "packets without a route")
    # About the first of three fragments.
    assert tunnel.counters.icmp_unreachable == 1
    assert tunnel.counters.icmp_time_exceeded == 0


def test_icmp_is_limited(pair: Pair) -> None:
    sender = udp_socket(pair.containers[0])
    for _ in range(500):
        sender.sendto(b"hello", ("10.5.99.9", 7))
    tunnel = pair.tunnels[0]
    eventually(lambda: tunnel.counters.icmp_not_sent, 2.0, "an answer that is not sent")
    counters = tunnel.counters
    assert 50 <= counters.icmp_unreachable <= counters.drop_no_route - counters.icmp_not_sent


# Who is let in


def arrived(pair: Pair, packet: bytes, sender: socket.socket) -> bool:
    """Whether the container behind the first host gets a packet (to port 7)."""
    listener = udp_socket(pair.containers[0], port=7)
    listener.settimeout(0.3)
    sender.sendto(packet, (str(pair.tunnels[0].host.address), PORT))
    try:
        return listener.recv(2000) == b"hello"
    except TimeoutError:
        return False
    finally:
        listener.close()


def test_strangers_and_false_sources_are_kept_out(pair: Pair) -> None:
    target = str(pair.containers[0].address)
    host = pair.tunnels[1].host
    peer, stranger = udp_socket(host), udp_socket(host.lab.underlay)
    assert arrived(pair, inner("10.5.2.9", target), peer)
    assert not arrived(pair, inner("10.5.2.9", target), stranger)
    assert not arrived(pair, inner("10.5.3.9", target), peer)
    assert not arrived(pair, inner("10.5.1.9", target), peer)
    counters = pair.tunnels[0].counters
    assert counters.drop_unknown_peer == 1
    assert counters.drop_wrong_source == 2


def test_without_source_check_anybody_is_let_in(make_lab: MakeLab) -> None:
    pair = make(make_lab(2, etcd=False), source_check=False)
    stranger = udp_socket(pair.tunnels[0].host.lab.underlay)
    assert arrived(pair, inner("10.5.77.9", str(pair.containers[0].address)), stranger)


def test_a_removed_peer_is_a_stranger_and_a_moved_one_is_not(pair: Pair) -> None:
    tunnel, other = pair.tunnels[0], pair.tunnels[1].host
    tunnel.remove_peers([IPv4Network("10.5.2.0/24")])
    assert pair.containers[0].ping("10.5.2.2", deadline=0.2).received == 0
    assert tunnel.counters.drop_unknown_peer + tunnel.counters.drop_no_route > 0
    tunnel.set_peers([PeerRoute(IPv4Network("10.5.2.0/24"), IPv4Address("10.97.0.99"))])
    assert pair.containers[0].ping("10.5.2.2", deadline=0.2).received == 0
    tunnel.set_peers([route_to(other)])
    works(pair)


def test_ten_thousand_peers(pair: Pair) -> None:
    tunnel = pair.tunnels[0]
    many = [
        PeerRoute(IPv4Network((f"11.{n >> 8}.{n & 255}.0", 24)), IPv4Address(0x0B000000 + n))
        for n in range(10_000)
    ]
    tunnel.set_peers(many)
    assert tunnel.counters.peers == 10_001
    works(pair)
    tunnel.remove_peers(route.subnet for route in many)
    assert tunnel.counters.peers == 1
    tunnel.replace_peers([*many, route_to(pair.tunnels[1].host)])
    works(pair)


# Rubbish


def test_rubbish_neither_crashes_nor_stalls_it(pair: Pair) -> None:
    tunnel, host = pair.tunnels[0], pair.tunnels[1].host
    sender = udp_socket(host)
    target = (str(tunnel.host.address), PORT)
    dice = random.Random(1)
    good = inner("10.5.2.9", str(pair.containers[0].address), payload=bytes(100))
    for number in range(4000):
        packet = bytearray(good)
        for _ in range(dice.randrange(1, 4)):
            packet[dice.randrange(40)] = dice.randrange(256)
        data = (
            dice.randbytes(dice.randrange(200)),
            bytes(packet),
            bytes(packet[: dice.randrange(len(packet))]),
            bytes(packet) + bytes(dice.randrange(2000)),
        )[number % 4]
        count, control = 1, []
        if data and number % 8 > 3:
            # Many of one size at once.
            count = min(dice.randrange(1, 60), 60_000 // len(data))
            control = [(socket.IPPROTO_UDP, 103, struct.pack("=H", len(data)))]
        if len(data) > 1472:
            count, control = 1, []
        sender.sendmsg([data] * count, control, 0, target)
    # What is left of the flood in the socket's buffer may cost the first packets.
    one, two = pair.containers
    eventually(lambda: one.ping(two.address).lost == 0, 10.0, "a ping after the flood")
    works(pair)
    drops = tunnel.counters.drops
    assert drops["malformed"] > 100
    assert drops["not_ipv4"] > 100
    assert drops["wrong_source"] > 10
    both_ways(*both(pair), megabytes=3)


def test_what_is_not_ipv4_is_dropped(pair: Pair) -> None:
    tunnel = pair.tunnels[0]
    host = tunnel.host
    host.ip("addr add fd00::1/64 dev flannel0 nodad")
    before = tunnel.counters.drop_not_ipv4
    host.run(["ping", "-6", "-c", "2", "-i", "0.05", "-W", "0.2", "fd00::2"], check=False)
    assert tunnel.counters.drop_not_ipv4 >= before + 2
    works(pair)


# The process


def test_a_deleted_device_is_reported_and_made_anew(pair: Pair) -> None:
    tunnel = pair.tunnels[0]
    process = tunnel.process
    tunnel.host.ip("link del flannel0")
    assert eventually(process.poll, 1.0, "the end of the process") is Exit.TUN_LOST
    process.close()
    tunnel.reopen_tun()
    assert tunnel.descriptors.tun.name == "flannel0"
    connect(tunnel.host.lab.hosts, [_started(tunnel)])
    works(pair)


def test_a_device_set_down_does_not_end_it(pair: Pair) -> None:
    tunnel = pair.tunnels[0]
    tunnel.host.ip("link set flannel0 down")
    pair.containers[1].ping(pair.containers[0].address, count=3, deadline=0.1)
    assert tunnel.process.poll() is None
    assert tunnel.counters.drop_tun_write >= 3
    tunnel.host.ip("link set flannel0 up")
    works(pair)


def _started(tunnel: HostTunnel) -> HostTunnel:
    tunnel.start()
    return tunnel


def test_it_is_started_again_on_the_same_device(pair: Pair) -> None:
    tunnel = pair.tunnels[0]
    os.kill(tunnel.process.pid, signal.SIGKILL)
    assert eventually(tunnel.process.poll, 2.0, "the end of the process") is Exit.DIED
    assert tunnel.process.ending() == "killed by SIGKILL"
    with pytest.raises(TunnelError):
        tunnel.replace_peers([])
    tunnel.process.close()
    connect(tunnel.host.lab.hosts, [_started(tunnel)])
    works(pair)


def test_it_ends_when_it_is_closed(pair: Pair) -> None:
    process = pair.tunnels[0].process
    process.close()
    assert process.poll() is Exit.CLOSED


def test_it_ends_with_its_daemon(make_lab: MakeLab) -> None:
    host = make_lab(1, etcd=False).hosts[0]
    output = host.lab.scratch_file("daemon")
    script = (
        "import time; from ipaddress import IPv4Address\n"
        "from flanneld.backend.udp.descriptors import Descriptors\n"
        "from flanneld.backend.udp.process import TunnelProcess\n"
        f"d = Descriptors.open(IPv4Address('{host.address}'), {PORT})\n"
        f"t = TunnelProcess(d, port={PORT}, mtu=1472)\n"
        "t.wait_ready(); print(t.pid, flush=True); time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(TOP)}
    daemon = host.popen([sys.executable, "-c", script], output=output, env=env)
    pid = int(eventually(lambda: output.read_text().strip(), 20.0, "the tunnel's process id"))
    # It cannot notice by itself: the kernel has to end it.
    freeze(pid)
    assert is_running(pid)
    daemon.kill()
    daemon.wait()
    eventually(lambda: not is_running(pid), 2.0, "the end of the tunnel")


def test_it_has_no_privileges_and_no_other_descriptors(pair: Pair) -> None:
    pid = pair.tunnels[0].process.pid
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name][0], 16) == 0
    assert status["NoNewPrivs"] == ["1"]
    assert set(status["Uid"]) == set(status["Gid"]) == {"65534"}
    assert status["Groups"] == []
    assert status["Threads"] == ["1"]
    # Standard input and outputs, TUN, UDP, control, ICMP.
    assert len(os.listdir(f"/proc/{pid}/fd")) == 7


def test_an_idle_tunnel_sleeps_and_is_small(pair: Pair) -> None:
    both_ways(*both(pair), megabytes=10)
    tunnel = pair.tunnels[0]
    schedstat = Path(f"/proc/{tunnel.process.pid}/schedstat")

    def sleeps() -> bool:
        before = schedstat.read_text()
        time.sleep(1.0)
        return schedstat.read_text() == before

    # On a busy machine the end of the connections above may take its time.
    eventually(sleeps, 20.0, "a second in which the tunnel does nothing")
    # How much of the libraries' files is mapped differs from machine to machine (13 MB here);
    # the rest is the tunnel's own.
    assert tunnel.memory_kb("RssAnon") <= 22 * 1024
    assert tunnel.memory_kb("VmRSS") <= 40 * 1024


def test_numpy_is_not_imported_by_the_daemon() -> None:
    script = (
        "import sys, flanneld.backend.udp.process, flanneld.backend.udp.control\n"
        "sys.exit('numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=TOP)


def test_one_socket_and_device_cannot_be_opened_twice(pair: Pair) -> None:
    with pytest.raises(Exception, match="another flanneld"):
        HostTunnel(pair.tunnels[0].host)


# FLANNEL_UDP_MB=2000 for the long one.
@pytest.mark.parametrize("fast", [False, True], ids=["by the process", "with the fast path"])
def test_much_data_while_peers_come_and_go(make_lab: MakeLab, fast: bool) -> None:
    pair = make(make_lab(2, etcd=False), fast=fast)
    megabytes = int(os.environ.get("FLANNEL_UDP_MB", "200"))
    dice = random.Random(2)
    others = [
        PeerRoute(IPv4Network((0x0A050000 + (n << 8), 24)), IPv4Address(0x0A610000 + n))
        for n in range(3, 256)
    ]

    def change_peers() -> None:
        for tunnel, other in zip(pair.tunnels, pair.tunnels[::-1], strict=True):
            chosen = dice.sample(others, dice.randrange(len(others)))
            match dice.randrange(3):
                case 0:
                    tunnel.set_peers(chosen)
                case 1:
                    tunnel.remove_peers(route.subnet for route in chosen)
                case _:
                    tunnel.replace_peers([*chosen, route_to(other.host)])

    both_ways(*both(pair), megabytes=megabytes, meanwhile=change_peers)
    if fast:
        assert pair.tunnels[0].fast_path.counters()["sent_bytes"] > megabytes << 19
