"""The fast path's programs: each packet on real devices, compared with a plain reference.

Nobody reads the TUN device and the tunnel's socket but the test, so it sees what the programs leave
to the tunnel's process; and what they have moved, where it comes out.
"""

import os
import random
import select
import socket
import struct
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

import pytest
import udp_reference as reference
from network import MakeLab

from flanneld.backend.udp import program_steps
from flanneld.backend.udp.descriptors import Descriptors
from flanneld.backend.udp.fastpath import FastPath
from flanneld.backend.udp.greeting import echo_request
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.tun import Offload
from flanneld.interface import ExternalInterface
from flanneld.kernel.bpf import PrefixMap
from lab import Host, eventually
from lab.tunnel import MTU, PORT, configure, route_to

ETH_P_IP, ETH_P_ALL = 0x0800, 0x0003
TCP, UDP, ICMP = 6, 17, 1
SECOND = 1_000_000_000
# From a fast path: no UDP checksum, and the number that the programs write.
FAST_ID = 0x666C
EXAMPLES = 400


def packet_socket(host: Host, device: str, protocol: int = ETH_P_IP) -> socket.socket:
    """``protocol``: with all of them it sees packets before a program takes them, else after."""

    def open_it() -> socket.socket:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
        opened.bind((device, protocol))
        opened.setblocking(False)
        return opened

    opened = host.inside(open_it)
    host.lab.when_closing(opened.close)
    return opened


def mac(host: Host) -> bytes:
    (link,) = host.ip_json("link", "show", "eth0")
    return bytes.fromhex(link["address"].replace(":", ""))


@dataclass
class Bench:
    """One host with a fast path whose process is the test, and one that sends and listens."""

    here: Host
    there: Host
    descriptors: Descriptors
    path: FastPath
    into_tun: socket.socket
    """Sends into the TUN device, as the host's stack does; hears what comes out of it."""
    wire: socket.socket
    """The other host's eth0."""

    def set_peer(self, fast_until: int = 0, slow_at: int = 1 << 62) -> None:
        """Put the other host's entry into the map."""
        assert self.path._attached is not None
        ip, *_ = program_steps._PEER.unpack(program_steps.peer(self.there.address))
        value = program_steps._PEER.pack(ip, fast_until, slow_at, 0, bytes(12) + b"\x08\0")
        self.path._attached.peers.put({self.key: value})

    @property
    def key(self) -> bytes:
        subnet = route_to(self.there).subnet
        return PrefixMap.key(subnet.network_address.packed, subnet.prefixlen)

    def peer(self) -> tuple[int, int]:
        """Until when the peer is known to be fast, from when a packet has to go slowly."""
        assert self.path._attached is not None
        value = self.path._attached.peers.get(self.key)
        assert value is not None
        _, fast_until, slow_at, _, _ = program_steps._PEER.unpack(value)
        return fast_until, slow_at

    def send(self, packet: bytes) -> tuple[str, bytes]:
        """Send a packet into the TUN device; return which way it took, and what came out there."""
        self.into_tun.send(packet)
        while True:
            wire, tun = self.wire.fileno(), self.descriptors.tun.fd
            ready, _, _ = select.select([wire, tun], [], [], 2.0)
            if not ready:
                return "lost", b""
            if tun in ready:
                data = os.read(tun, 1 << 16)[10:]
                if data == packet:
                    return "slow", data
                continue  # the kernel's own, as a router solicitation
            frame = self.wire.recv(1 << 16)
            if frame[23] == UDP and frame[:6] == mac(self.there):
                assert frame[6:12] == mac(self.here)
                return "fast", frame[14:]

    def receive(self, datagram: bytes) -> tuple[str, bytes]:
        """Have the host receive an IP packet; return which way its inside took."""
        self.wire.send(mac(self.here) + mac(self.there) + b"\x08\0" + datagram)
        udp = self.descriptors.udp
        while True:
            ready, _, _ = select.select([udp, self.into_tun], [], [], 0.1)
            if not ready:
                return "lost", b""
            if udp in ready:
                return "slow", udp.recv(1 << 16)
            data, where = self.into_tun.recvfrom(1 << 16)
            if where[2] == socket.PACKET_HOST:
                return "fast", data


@pytest.fixture
def bench(make_lab: MakeLab) -> Bench:
    lab = make_lab(2, etcd=False)
    here, there = lab.hosts
    no_checksums = Offload.SEGMENT | Offload.GRO
    opened = here.inside(lambda: Descriptors.open(here.address, PORT, wanted=no_checksums))
    lab.when_closing(opened.close)
    configure(here, opened.tun.name)
    index = here.inside(lambda: socket.if_nametoindex("eth0"))
    eth0 = ExternalInterface(index, "eth0", 1500, here.address, here.address)
    path = FastPath(eth0, opened.udp, port=PORT, mtu=MTU)
    here.inside(lambda: path.ensure(opened.tun.index))
    lab.when_closing(path.close)
    assert path.is_on
    path.change([route_to(there)], [])
    # The wire's address is known, as it is while hosts talk.
    assert here.ping(there.address, count=1).lost == 0
    bench = Bench(
        here, there, opened, path, packet_socket(here, "flannel0"), packet_socket(there, "eth0")
    )
    os.set_blocking(opened.tun.fd, False)
    return bench


def inner(
    protocol: int = UDP,
    *,
    source: str = "10.5.1.2",
    target: str = "10.5.2.2",
    ttl: int = 64,
    fragment: int = 0x4000,
    options: bytes = b"",
    payload: bytes = b"hello",
    number: int = 1,
) -> bytes:
    """A whole packet with right checksums."""
    if protocol == TCP:
        body = struct.pack("!HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 100, 0, 0) + payload
    elif protocol == UDP:
        body = struct.pack("!HHHH", 5555, 7, 8 + len(payload), 0) + payload
    else:
        body = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + payload
        if protocol == ICMP:
            value = reference.internet_checksum(body)
            body = body[:2] + struct.pack("!H", value) + body[4:]
    header = 20 + len(options)
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    head = struct.pack(
        "!BBHHHBBH",
        *(0x40 | header // 4, 0, header + len(body), number, fragment, ttl, protocol, 0),
    )
    packet = head + addresses + options + body
    if protocol in (TCP, UDP):
        return reference.with_checksums(packet)
    return reference.with_ip_checksum(packet)


def greeting(target: str) -> bytes:
    """What the tunnel's process sends, with the kernel's header."""
    packet = inner(ICMP, target=target)[:20] + echo_request(7)
    return reference.with_ip_checksum(packet[:2] + struct.pack("!H", len(packet)) + packet[4:])


def outer(
    packet: bytes,
    source: IPv4Address,
    target: IPv4Address,
    *,
    number: int = FAST_ID,
    checksum: bool = False,
    ports: tuple[int, int] = (PORT, PORT),
) -> bytes:
    """A datagram as the programs, or a socket, send it."""
    udp = struct.pack("!HHHH", *ports, 8 + len(packet), 0) + packet
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), number, 0x4000, 64, UDP, 0)
    whole = head + source.packed + target.packed + udp
    return reference.with_checksums(whole) if checksum else reference.with_ip_checksum(whole)


def monotonic() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def known(bench: Bench) -> None:
    bench.set_peer(fast_until=monotonic() + 100 * SECOND)


# What the programs take, and what becomes of it


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_a_packet_becomes_one_datagram(bench: Bench, protocol: int) -> None:
    known(bench)
    here, there = bench.here.address, bench.there.address
    for size in (0, 1, 2, 100, 1431, 1432, MTU - 40):
        for ttl in (2, 64, 255):
            packet = inner(protocol, payload=bytes(size), ttl=ttl)
            way, datagram = bench.send(packet)
            assert way == "fast"
            assert datagram == outer(reference.less_ttl(packet), here, there)
    counters = bench.path.counters()
    assert counters["sent_packets"] == 21


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_a_datagram_becomes_the_packet(bench: Bench, protocol: int) -> None:
    for size in (0, 1, 2, 100, MTU - 40):
        packet = inner(protocol, source="10.5.2.2", target="10.5.1.0", payload=bytes(size))
        datagram = outer(packet, bench.there.address, bench.here.address)
        way, data = bench.receive(datagram)
        assert way == "fast"
        assert data == reference.less_ttl(packet)
    assert bench.path.counters()["received_packets"] == 5


def slow_packets(source: str, target: str) -> list[bytes]:
    plain = inner(source=source, target=target)
    no_checksum = reference.with_ip_checksum(plain[:26] + b"\0\0" + plain[28:])
    return [
        inner(ttl=1, source=source, target=target),
        inner(ttl=0, source=source, target=target),
        inner(fragment=0x2000, source=source, target=target),
        inner(fragment=0x0001, source=source, target=target),
        inner(options=bytes([1] * 4), source=source, target=target),
        inner(protocol=47, source=source, target=target),
        no_checksum,
        plain + b"\0",  # longer than it says
        plain[:-1],  # shorter
        b"\x60" + plain[1:],
        b"\x4f" + plain[1:],
        plain[:27],
        plain[:20],
    ]


def test_what_is_not_plain_is_left_to_the_process(bench: Bench) -> None:
    known(bench)
    for packet in slow_packets("10.5.1.2", "10.5.2.2"):
        assert bench.send(packet) == ("slow", packet)
    for nobody in ("10.5.3.2", "10.6.2.2"):
        assert bench.send(inner(target=nobody))[0] == "slow"


def test_what_is_not_plain_is_received_by_the_process(bench: Bench) -> None:
    there, here = bench.there.address, bench.here.address
    for packet in slow_packets("10.5.2.2", "10.5.1.0"):
        assert bench.receive(outer(packet, there, here)) == ("slow", packet)


def test_false_sources_and_strangers_are_left_to_the_process(bench: Bench) -> None:
    there, here = bench.there.address, bench.here.address
    right = inner(source="10.5.2.2", target="10.5.1.0")
    false = inner(source="10.5.3.2", target="10.5.1.0")
    assert bench.receive(outer(false, there, here)) == ("slow", false)
    assert bench.receive(outer(right, there + 7, here)) == ("slow", right)
    assert bench.receive(outer(right, there, here))[0] == "fast"
    # Not even seen by our socket.
    assert bench.receive(outer(right, there, here, ports=(PORT, PORT + 1)))[0] == "lost"
    bench.path.change([], [route_to(bench.there).subnet])
    assert bench.receive(outer(right, there, here)) == ("slow", right)


def test_what_is_for_another_machine_is_not_taken(bench: Bench) -> None:
    """As at a mirror port, or while a switch floods."""
    bench.here.ip("link set eth0 promisc on")
    there, here = bench.there.address, bench.here.address
    datagram = outer(inner(source="10.5.2.2", target="10.5.1.0"), there, here)
    for target in ("021122334455", "ffffffffffff", "01005e000001"):
        bench.wire.send(bytes.fromhex(target) + mac(bench.there) + b"\x08\0" + datagram)
    time.sleep(0.2)
    assert bench.path.counters()["received_packets"] == 0
    # One with a tag is the VLAN's device's.
    tagged = mac(bench.here) + mac(bench.there) + b"\x81\0\0\5\x08\0" + datagram
    bench.wire.send(tagged)
    time.sleep(0.2)
    assert bench.path.counters()["received_packets"] == 0


def test_the_longest_prefix_decides(bench: Bench) -> None:
    known(bench)
    other = PeerRoute(IPv4Network("10.5.2.128/25"), IPv4Address("10.97.0.200"))
    bench.path.change([other], [])
    # Nobody answers for that public IP on the wire: nothing comes to the other host.
    assert bench.send(greeting("10.5.2.200"))[0] == "lost"
    assert bench.send(greeting("10.5.2.100"))[0] == "fast"


# Who has a fast path


def test_a_peer_that_is_not_known_gets_only_greetings_this_way(bench: Bench) -> None:
    bench.set_peer()
    for protocol in (TCP, UDP, ICMP):
        assert bench.send(inner(protocol))[0] == "slow"
    question = greeting("10.5.2.0")
    assert bench.send(question)[0] == "fast"
    answer = question[:20] + b"\0" + question[21:]
    assert bench.send(answer)[0] == "fast"


def test_only_a_datagram_of_a_fast_path_makes_its_sender_known(bench: Bench) -> None:
    there, here = bench.there.address, bench.here.address
    packet = inner(source="10.5.2.2", target="10.5.1.0")
    bench.set_peer()
    # A socket's; and a half done checksum, as on a virtual link, that is 0 by chance.
    assert bench.receive(outer(packet, there, here, checksum=True))[0] == "slow"
    assert bench.receive(outer(packet, there, here, number=0))[0] == "fast"
    assert bench.peer()[0] == 0
    before = monotonic()
    assert bench.receive(outer(packet, there, here))[0] == "fast"
    until = bench.peer()[0]
    # The kernel's coarse clock is some milliseconds late.
    assert 14.9 * SECOND < until - before < 16 * SECOND
    assert bench.send(inner(TCP))[0] == "fast"


def test_a_socket_s_datagram_is_doubt_and_no_proof(bench: Bench) -> None:
    there, here = bench.there.address, bench.here.address
    packet = inner(source="10.5.2.2", target="10.5.1.0")
    bench.receive(outer(packet, there, here))
    before = monotonic()
    assert bench.receive(outer(packet, there, here, checksum=True))[0] == "slow"
    until = bench.peer()[0]
    assert 0.9 * SECOND < until - before < 2 * SECOND
    # Not longer by the next.
    bench.set_peer(fast_until=1)
    bench.receive(outer(packet, there, here, checksum=True))
    assert bench.peer()[0] == 1


def test_now_and_then_a_packet_goes_the_slow_way(bench: Bench) -> None:
    bench.set_peer(fast_until=monotonic() + 100 * SECOND, slow_at=0)
    assert bench.send(inner(TCP))[0] == "slow"
    until = bench.peer()[1]
    assert 4.9 * SECOND < until - monotonic() < 5.1 * SECOND
    for _ in range(20):
        assert bench.send(inner(TCP))[0] == "fast"
    bench.set_peer(fast_until=monotonic() + 100 * SECOND, slow_at=monotonic() - SECOND // 10)
    assert bench.send(inner(UDP))[0] == "slow"
    assert bench.send(inner(UDP))[0] == "fast"


# The way there


def test_a_route_by_another_device_is_the_process_s(bench: Bench) -> None:
    known(bench)
    assert bench.send(inner())[0] == "fast"
    bench.here.ip(
        "link add other type veth peer name rehto",
        "link set other up",
        "link set rehto up",
        "addr add 10.98.0.1/24 dev other",
        f"route add {bench.there.address}/32 via 10.98.0.2",
    )
    # Asked again within a second.
    eventually(lambda: bench.send(inner())[0] == "slow", 3.0, "the other route to be seen")
    bench.here.ip(f"route del {bench.there.address}/32")
    eventually(lambda: bench.send(inner())[0] == "fast", 3.0, "the own route to be seen")


def test_a_locked_mtu_of_the_route_is_minded(bench: Bench) -> None:
    known(bench)
    bench.here.ip(f"route add {bench.there.address}/32 dev eth0 mtu lock 1400")
    assert bench.send(inner())[0] == "slow"
    bench.here.ip(f"route replace {bench.there.address}/32 dev eth0 mtu lock 1500")
    assert bench.send(inner())[0] == "fast"


def test_a_router_that_finds_a_datagram_too_big_is_heard(bench: Bench) -> None:
    known(bench)
    way, datagram = bench.send(inner(payload=bytes(1400)))
    assert way == "fast"
    text = struct.pack("!BBHHH", 3, 4, 0, 0, 1400) + datagram[:28]
    text = text[:2] + struct.pack("!H", reference.internet_checksum(text)) + text[4:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(text), 1, 0, 64, ICMP, 0)
    addresses = bench.there.address.packed + bench.here.address.packed
    told = reference.with_ip_checksum(head + addresses + text)
    bench.wire.send(mac(bench.here) + mac(bench.there) + b"\x08\0" + told)
    eventually(lambda: bench.send(inner())[0] == "slow", 3.0, "the smaller path to be known")


def test_a_next_hop_with_a_groups_mac(bench: Bench) -> None:
    """As a cluster of firewalls has it: no packet is lost when the route is looked at anew."""
    known(bench)
    group = "03:00:5e:11:11:11"
    bench.here.ip(f"neigh replace {bench.there.address} lladdr {group} dev eth0")
    wire = packet_socket(bench.there, "eth0", ETH_P_ALL)
    seen = 0
    for _ in range(30):
        bench.into_tun.send(inner())
        while select.select([wire], [], [], 0.1)[0]:
            frame = wire.recv(1 << 16)
            if frame[:6].hex(":") == group and frame[23] == UDP:
                seen += 1
                break
        time.sleep(0.04)
    assert seen == 30


def test_a_peer_with_another_mac_is_found_again(bench: Bench) -> None:
    known(bench)
    assert bench.send(inner())[0] == "fast"
    bench.there.ip("link set eth0 address 02:97:00:00:aa:aa")
    # As another machine that takes the address over announces it.
    bench.there.run(["ping", "-c", "1", str(bench.here.address)])
    bench.here.ip(f"neigh replace {bench.there.address} lladdr 02:97:00:00:aa:aa dev eth0")
    eventually(lambda: bench.send(inner())[0] == "fast", 3.0, "the new address", interval=0.1)


# At random


def at_random(source: random.Random) -> bytes:
    """A plain packet, most often with something wrong or odd about it."""
    packet = bytearray(
        inner(
            source.choice([TCP, UDP, ICMP, 47]),
            source=source.choice(["10.5.1.2", "10.5.2.2", "10.5.2.255"]),
            target=source.choice(["10.5.2.2", "10.5.2.2", "10.5.1.0", "10.7.0.1"]),
            ttl=source.choice([0, 1, 2, 3, 64, 255]),
            fragment=source.choice([0, 0x4000, 0x4000, 0x2000, 1, 0x8000]),
            options=source.choice([b"", b"", b"", b"\1\1\1\1"]),
            payload=source.randbytes(source.choice([0, 1, 7, 100, 1400])),
            number=source.randrange(1 << 16),
        )
    )
    if source.random() < 0.3:
        packet[source.randrange(min(len(packet), 30))] = source.randrange(256)
    if source.random() < 0.1:
        del packet[source.randrange(1, len(packet)) :]
    return bytes(packet)


def is_plain(packet: bytes) -> bool:
    """Whether the programs take it, as far as the packet itself decides."""
    return (
        len(packet) >= 28
        and packet[0] == 0x45
        and struct.unpack("!H", packet[2:4])[0] == len(packet)
        and struct.unpack("!H", packet[6:8])[0] & 0x3FFF == 0
        and packet[8] > 1
        and (packet[9] in (TCP, ICMP) or (packet[9] == UDP and packet[26:28] != b"\0\0"))
    )


def behind(packet: bytes, at: int) -> bool:
    return packet[at : at + 3] == IPv4Address("10.5.2.0").packed[:3]


def test_packets_at_random_are_sent_as_the_reference_says(bench: Bench) -> None:
    known(bench)
    source = random.Random(1)
    ways = {"fast": 0, "slow": 0}
    for _ in range(EXAMPLES):
        packet = at_random(source)
        way, data = bench.send(packet)
        takes = is_plain(packet) and behind(packet, 16)
        assert way == ("fast" if takes else "slow"), packet.hex()
        ways[way] += 1
        if takes:
            expected = reference.less_ttl(packet)
            assert data == outer(expected, bench.here.address, bench.there.address)
    assert min(ways.values()) > EXAMPLES / 10


def test_datagrams_at_random_are_received_as_the_reference_says(bench: Bench) -> None:
    source = random.Random(2)
    ways = {"fast": 0, "slow": 0}
    there, here = bench.there.address, bench.here.address
    for _ in range(EXAMPLES):
        packet = at_random(source)
        checksum = source.random() < 0.2
        datagram = outer(packet, there, here, checksum=checksum)
        way, data = bench.receive(datagram)
        takes = is_plain(packet) and behind(packet, 12) and not checksum
        assert way == ("fast" if takes else "slow"), packet.hex()
        ways[way] += 1
        assert data == (reference.less_ttl(packet) if takes else packet)
    assert min(ways.values()) > EXAMPLES / 10
