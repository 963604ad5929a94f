"""The tunnel's two paths with a device and a socket that refuse things."""

import errno
import os
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from types import SimpleNamespace

import pytest
import udp_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from test_udp_coalesce import flow
from test_udp_segment import super_packet

from flanneld.backend.udp import transmit
from flanneld.backend.udp.buffers import Buffers
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.packet import NEEDS_CSUM, VNET, VNET_PLAIN
from flanneld.backend.udp.peers import PeerRoute, RouteTable
from flanneld.backend.udp.receive import Receiver
from flanneld.backend.udp.transmit import Transmitter

TCP, UDP = reference.TCP, reference.UDP
PEER, OTHER = ("10.97.0.2", 8285), ("10.97.0.3", 8285)


@dataclass
class Socket:
    """A UDP socket: keeps what is sent, hands out what is to be received."""

    refuse: Callable[[int, int], int] = lambda _size, _count: 0
    """errno for a send of packets of this size, so many at once; 0 lets it pass."""
    sent: list[bytes] = field(default_factory=list)
    sent_to: dict[object, list[bytes]] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)
    incoming: list[tuple[bytes, int, str]] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    receives: int = 0

    def sendmsg(
        self, pieces: list[bytes], control: list[tuple[int, int, bytes]], _flags: int, to: object
    ) -> int:
        data = b"".join(pieces)
        size = struct.unpack("=H", control[0][2])[0]
        packets = [data[at : at + size] for at in range(0, len(data), size)]
        assert len(packets) <= 64
        assert len(data) <= 65507
        assert all(len(packet) == size for packet in packets[:-1])
        self._pass(packets, size, to)
        return len(data)

    def sendto(self, packet: bytes, to: object) -> int:
        self._pass([bytes(packet)], len(packet), to)
        return len(packet)

    def _pass(self, packets: list[bytes], size: int, to: object) -> None:
        number = self.refuse(size, len(packets))
        if number:
            raise OSError(number, os.strerror(number))
        assert to in (PEER, OTHER)
        self.sent += packets
        self.sent_to.setdefault(to, []).extend(packets)
        self.calls.append(len(packets))

    def recvmsg_into(
        self, buffers: list[memoryview], _size: int
    ) -> tuple[int, list[tuple[int, int, bytes]], int, tuple[str, int]]:
        if not self.incoming:
            raise BlockingIOError
        if self.errors:
            raise OSError(self.errors.pop(), "an error")
        self.receives += 1
        data, size, sender = self.incoming.pop(0)
        # The kernel would cut it off.
        assert len(data) <= len(buffers[0])
        buffers[0][: len(data)] = data
        control = [(socket.IPPROTO_UDP, 104, struct.pack("=i", size))] if size else []
        return len(data), control, 0, (sender, 1234)


class Bench:
    """Both paths between a fake device (one message is one packet) and a fake socket."""

    def __init__(self, *, segments: bool = True, source_check: bool = True) -> None:
        self.udp = Socket()
        self.said: list[str] = []
        self.answers: list[tuple[tuple[int, int], bytes]] = []
        self.counters = Counters()
        self.kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours = ours
        for end in (self.kernel, ours):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        routes = RouteTable(8285)
        routes.set(
            PeerRoute(IPv4Network(f"10.5.{number}.0/24"), IPv4Address(peer[0]))
            for number, peer in ((2, PEER), (3, OTHER))
        )
        self.transmitter = Transmitter(
            ours.fileno(), self.udp, routes, self.counters,  # type: ignore[arg-type]  # a fake
            buffers=Buffers(), mtu=1472, segments=segments, say=self.said.append,
            answer=lambda kind, packet: self.answers.append((kind, bytes(packet))),
        )  # fmt: skip
        self.receiver = Receiver(
            ours.fileno(), self.udp, routes, self.counters,  # type: ignore[arg-type]  # a fake
            buffers=Buffers(), source_check=source_check, join_tcp=True, join_udp=True,
            expired=lambda packet: self.answers.append(((11, 0), bytes(packet))),
            say=self.said.append,
        )  # fmt: skip

    def transmit(self, *frames: bytes) -> None:
        for frame in frames:
            self.kernel.send(frame)
            if len(frame) > 9000:
                self.transmitter.turn()
        while self.transmitter.turn():
            pass
        self.transmitter.flush()

    def receive(self) -> list[bytes]:
        while self.receiver.turn():
            pass
        self.receiver.flush()
        written = []
        while True:
            try:
                written.append(self.kernel.recv(70_000))
            except BlockingIOError:
                return written


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.kernel.close()
    made.ours.close()


def tso(packet: bytes, gso: int) -> bytes:
    """A super-packet as it is read from the device."""
    kind, offset = (1, 16) if packet[9] == TCP else (5, 6)
    return VNET.pack(NEEDS_CSUM, kind, 0, gso, 20, offset) + packet


def routed(packet: bytes) -> bytes:
    """A packet after a hop, with its checksums right."""
    return reference.with_ip_checksum(packet[:8] + bytes([packet[8] - 1]) + packet[9:])


def expected(packets: list[bytes], gso: int) -> list[bytes]:
    return [routed(piece) for packet in packets for piece in reference.segment(packet, gso)]


SUPERS = [super_packet(TCP, bytes([n]) * 63_900, identity=n, sequence=n * 63_900) for n in range(4)]


@pytest.mark.parametrize("gso", [1420, 1419, 500, 100])
def test_super_packets_are_cut_in_order(bench: Bench, gso: int) -> None:
    bench.transmit(*(tso(packet, gso) for packet in SUPERS))
    assert bench.udp.sent == expected(SUPERS, gso)
    assert bench.counters.tun_read_packets == bench.counters.udp_sent_packets


def test_super_packets_of_equal_length_with_other_headers(bench: Bench) -> None:
    payload = bytes(range(250)) * 20
    packets = [
        super_packet(TCP, payload, tcp_options=bytes(4)),
        super_packet(TCP, payload, ip_options=bytes([1, 1, 1, 0])),
        super_packet(TCP, payload + bytes(4)),
        super_packet(UDP, payload + bytes(16)),
    ]
    starts = (20, 24, 20, 20)
    frames = []
    for packet, start in zip(packets, starts, strict=True):
        kind, offset = (1, 16) if packet[9] == TCP else (5, 6)
        frames.append(VNET.pack(NEEDS_CSUM, kind, 0, 1000, start, offset) + packet)
    bench.transmit(*frames, *frames)
    assert bench.udp.sent == expected(packets, 1000) * 2


def test_what_is_left_over_goes_with_the_next(bench: Bench) -> None:
    # 45 rows each, of which 44 fit into a datagram's 65507 bytes: 180 rows in 5 calls.
    bench.transmit(*(tso(packet, 1420) for packet in SUPERS))
    assert bench.udp.calls == [44, 44, 44, 44, 4]


def test_only_the_rest_of_a_long_unfinished_super_packet_may_wait(bench: Bench) -> None:
    def may_wait(packet: bytes) -> bool:
        bench.kernel.send(tso(packet, 1420))
        bench.transmitter.turn()
        waits = bench.transmitter.may_wait
        bench.transmitter.flush()
        assert not bench.transmitter.may_wait
        return waits

    assert may_wait(super_packet(TCP, bytes(1420 * 45)))
    assert not may_wait(super_packet(TCP, bytes(1420 * 45), flags=0x18))
    assert not may_wait(super_packet(TCP, bytes(1420 * 44)))
    assert not may_wait(super_packet(TCP, bytes(1420 * 10)))
    assert not may_wait(super_packet(UDP, bytes(1420 * 45)))


def test_what_the_sender_pushes_does_not_wait_with_the_rest_of_the_last(bench: Bench) -> None:
    bench.kernel.send(tso(super_packet(TCP, bytes(1420 * 45)), 1420))
    bench.transmitter.turn()
    assert bench.transmitter.may_wait
    bench.kernel.send(tso(super_packet(TCP, bytes(1420 * 10), flags=0x18), 1420))
    bench.transmitter.turn()
    assert not bench.transmitter.may_wait


def test_a_packet_longer_than_a_slot_does_not_overtake_what_waits(bench: Bench) -> None:
    first, second = super_packet(TCP, bytes(1420 * 45)), super_packet(TCP, bytes(3000))
    bench.transmit(tso(first, 1420), VNET_PLAIN + second)
    assert bench.udp.sent == [*expected([first], 1420), routed(second)]


def sent_to(packet: bytes, subnet: int) -> bytes:
    """The packet with a destination in another subnet."""
    return reference.with_ip_checksum(packet[:16] + bytes((10, 5, subnet, 2)) + packet[20:])


def plain(packet: bytes) -> bytes:
    return VNET_PLAIN + reference.with_checksums(packet)


# How many, of which protocol, to which subnet, cut into what (0: packets as they are), how long.
# Of some kinds there are often several in a row.
frames = st.tuples(
    st.sampled_from([1, 1, 2, 5, 20]),
    st.sampled_from([TCP, UDP]),
    st.sampled_from([2, 2, 3, 9]),
    st.sampled_from(
        [
            *((1420, 64_000), (1420, 64_000), (1420, 2840), (101, 5000), (8, 4000)),
            *((0, 100), (0, 101), (0, 4000)),
        ]
    ),
)
FLUSH, ONE = -1, 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(frames, st.sampled_from([None, FLUSH, ONE, 1, 3, 64])), min_size=1, max_size=10
    ),
    st.booleans(),
)
def test_everything_reaches_its_peer_in_order(
    steps: list[tuple[tuple[int, int, int, tuple[int, int]], int | None]], segments: bool
) -> None:
    """Super-packets and packets to two peers and to nobody, read and flushed in any rhythm."""
    bench = Bench(segments=segments)
    waiting: list[bytes] = []

    def read(_fd: int, buffers: list[memoryview]) -> int:
        if not waiting:
            raise BlockingIOError
        frame = waiting.pop(0)
        buffers[0][: len(frame)] = frame
        return len(frame)

    wanted: dict[object, list[bytes]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "readv", read)
        for number, ((count, protocol, subnet, (gso, length)), action) in enumerate(steps):
            packet = super_packet(protocol, bytes([number]) * length, identity=65500 + number)
            packet = sent_to(packet, subnet)
            whole = reference.with_checksums(packet)
            frame = tso(packet, gso) if gso else VNET_PLAIN + whole
            waiting += [frame] * count
            if subnet != 9:
                made = expected([packet], gso) if gso else [routed(whole)]
                wanted.setdefault(PEER if subnet == 2 else OTHER, []).extend(made * count)
            if action == ONE:
                bench.transmitter.one()
            elif action == FLUSH:
                bench.transmitter.flush()
            elif action is not None:
                bench.transmitter.turn(action)
        while bench.transmitter.turn():
            pass
        bench.transmitter.flush()
    bench.kernel.close()
    bench.ours.close()
    assert bench.udp.sent_to == wanted
    counters = bench.counters
    assert counters.tun_read_packets == counters.udp_sent_packets + sum(counters.drops.values())


def test_packets_alike_but_for_where_they_go(bench: Bench) -> None:
    packets = [flow(UDP, [100])[0]] * 6
    others = [reference.with_checksums(sent_to(packet, 3)) for packet in packets]
    bench.transmit(*(VNET_PLAIN + p for pair in zip(packets, others, strict=True) for p in pair))
    assert bench.udp.sent_to == {
        PEER: [routed(packet) for packet in packets],
        OTHER: [routed(packet) for packet in others],
    }


def test_packets_alike_but_for_unfinished_checksums(bench: Bench) -> None:
    packet = flow(UDP, [100])[0]
    pseudo = packet[12:20] + struct.pack("!BBH", 0, UDP, len(packet) - 20)
    field = struct.pack("!H", reference.ones_sum(pseudo))
    unfinished = VNET.pack(NEEDS_CSUM, 0, 0, 0, 20, 6) + packet[:26] + field + packet[28:]
    bench.transmit(*[VNET_PLAIN + packet] * 4, unfinished, *[VNET_PLAIN + packet] * 4)
    assert bench.udp.sent == [routed(packet)] * 9


def test_what_waits_for_one_peer_does_not_go_to_another(bench: Bench) -> None:
    ours = super_packet(TCP, bytes(1420 * 45))
    others = sent_to(ours, 3)
    bench.transmit(*[tso(ours, 1420), tso(others, 1420)] * 3)
    assert bench.udp.sent_to == {
        PEER: expected([ours] * 3, 1420),
        OTHER: expected([others] * 3, 1420),
    }


def test_a_single_packet_does_not_overtake_what_waits(bench: Bench) -> None:
    first, second = super_packet(TCP, bytes(1420 * 45)), flow(UDP, [100])[0]
    bench.kernel.send(tso(first, 1420))
    bench.transmitter.one()
    assert bench.udp.calls == [44]
    bench.kernel.send(VNET_PLAIN + second)
    bench.transmitter.one()
    assert bench.udp.sent == [*expected([first], 1420), routed(second)]


def test_nothing_follows_a_shorter_last_packet(bench: Bench) -> None:
    first, second = super_packet(TCP, bytes(3500)), super_packet(TCP, bytes(5000))
    for packet in (first, first, first, second):
        bench.kernel.send(tso(packet, 1000))
    # The second turn reads them one behind the other.
    for _ in range(2):
        bench.transmitter.turn()
    assert bench.udp.sent == expected([first] * 3, 1000)
    bench.transmitter.flush()
    assert bench.udp.sent == expected([first] * 3 + [second], 1000)


def test_what_goes_nowhere_does_not_make_others_wait(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [5.0]
    monkeypatch.setattr(transmit, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    bench.kernel.send(tso(super_packet(TCP, bytes(1420 * 45)), 1420))
    bench.transmitter.turn()
    assert bench.transmitter.may_wait
    for _ in range(4):
        clock[0] += 0.0005
        bench.kernel.send(tso(sent_to(super_packet(UDP, bytes(5000)), 9), 1000))
        bench.transmitter.turn()
    assert bench.transmitter.is_overdue(clock[0])


def test_a_turn_reads_only_so_many_super_packets(bench: Bench) -> None:
    packet = super_packet(TCP, bytes(3000))
    for frame in [tso(packet, 1000), plain(flow(UDP, [9])[0])] * 5:
        bench.kernel.send(frame)
    assert bench.transmitter.turn()
    assert bench.counters.tun_read_packets == 4 * 3 + 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP])
def test_without_udp_segment_one_by_one(bench: Bench, number: int) -> None:
    bench.udp.refuse = lambda _, count: number if count > 1 else 0
    plain = [VNET_PLAIN + packet for packet in flow(UDP, [100] * 20)]
    bench.transmit(*plain, *(tso(packet, 1420) for packet in SUPERS))
    wanted = [reference.less_ttl(frame[10:]) for frame in plain] + expected(SUPERS, 1420)
    assert bench.udp.sent == wanted
    assert set(bench.udp.calls) == {1}
    assert len(bench.said) == 1
    assert "one by one" in bench.said[0]
    assert not bench.transmitter._sender.segments


@pytest.mark.parametrize("number", [errno.EMSGSIZE, errno.EINVAL])
def test_packets_too_big_for_the_path_go_one_by_one(bench: Bench, number: int) -> None:
    bench.udp.refuse = lambda size, count: number if count > 1 and size > 1000 else 0
    small = [VNET_PLAIN + packet for packet in flow(UDP, [100] * 20)]
    bench.transmit(*(tso(packet, 1420) for packet in SUPERS), *small)
    wanted = expected(SUPERS, 1420) + [reference.less_ttl(frame[10:]) for frame in small]
    assert bench.udp.sent == wanted
    assert bench.udp.calls == [1] * 180 + [20]
    assert len(bench.said) == 1


@pytest.mark.parametrize(
    ("number", "counter"),
    [
        (errno.EAGAIN, "drop_send_full"),
        (errno.ENETUNREACH, "drop_send_failed"),
        (errno.EPERM, "drop_send_failed"),
        (errno.ENOBUFS, "drop_send_failed"),
    ],
)
def test_what_cannot_be_sent_is_counted(bench: Bench, number: int, counter: str) -> None:
    bench.udp.refuse = lambda _size, _count: number
    bench.transmit(VNET_PLAIN + flow(UDP, [9])[0], *(tso(packet, 1420) for packet in SUPERS))
    assert not bench.udp.sent
    assert getattr(bench.counters, counter) == 181
    assert not bench.said


def test_unfinished_checksums_are_finished(bench: Bench) -> None:
    packets = flow(UDP, [100] * 10) + flow(TCP, [333] * 10) + flow(UDP, [7])
    frames = []
    for packet in packets:
        offset = 16 if packet[9] == TCP else 6
        pseudo = packet[12:20] + struct.pack("!BBH", 0, packet[9], len(packet) - 20)
        at = 20 + offset
        unfinished = packet[:at] + struct.pack("!H", reference.ones_sum(pseudo)) + packet[at + 2 :]
        frames.append(VNET.pack(NEEDS_CSUM, 0, 0, 0, 20, offset) + unfinished)
    bench.transmit(*frames)
    assert bench.udp.sent == [reference.less_ttl(packet) for packet in packets]
    assert bench.udp.calls == [10, 10, 1]


def test_what_is_answered_and_dropped(bench: Bench) -> None:
    packet = flow(UDP, [100])[0]
    lost = reference.with_checksums(packet[:16] + bytes((10, 5, 9, 9)) + packet[20:])
    dying = reference.with_ip_checksum(packet[:8] + b"\x01" + packet[9:])
    bench.transmit(*(VNET_PLAIN + p for p in (lost, dying, b"\x60" + bytes(60), b"E", packet)))
    assert bench.answers == [((3, 0), lost), ((11, 0), dying)]
    assert bench.udp.sent == [reference.less_ttl(packet)]
    drops = {name: count for name, count in bench.counters.drops.items() if count}
    assert drops == {"no_route": 1, "ttl": 1, "not_ipv4": 1, "malformed": 1}


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("options", [b"", bytes(8)])
def test_super_packets_with_finished_checksums(bench: Bench, protocol: int, options: bytes) -> None:
    """A driver that joined packets and found them right: the header says so, and nothing else."""
    packet = super_packet(protocol, bytes(range(250)) * 20, ip_options=options)
    data_valid, kind = 2, 1 if protocol == TCP else 5
    bench.transmit(VNET.pack(data_valid, kind, 0, 1000, 0, 0) + packet)
    assert bench.udp.sent == expected([packet], 1000)


def test_rubbish_headers_of_super_packets_are_dropped(bench: Bench) -> None:
    packet = SUPERS[0][:3000]
    for vnet in (
        (1, 1, 0, 0, 20, 16),
        (1, 1, 0, 9, 24, 16),
        (1, 3, 0, 9, 20, 16),
        (1, 1, 0, 65535, 20, 16),
    ):
        bench.transmit(VNET.pack(*vnet) + packet)
    assert not bench.udp.sent
    assert bench.counters.drop_malformed == bench.counters.tun_read_packets == 4


def refuse_super_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.writev

    def writev(fd: int, parts: list[memoryview]) -> int:
        if b"".join(parts)[1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(fd, parts)

    monkeypatch.setattr(os, "writev", writev)


def incoming(packets: list[bytes], sender: str = PEER[0]) -> list[tuple[bytes, int, str]]:
    return [(b"".join(packets), len(packets[0]), sender)]


def from_peer(packets: list[bytes]) -> list[bytes]:
    """The same packets with a source in the peer's subnet."""
    return [
        reference.with_checksums(p[:12] + bytes((10, 5, 2, 7, 10, 5, 1, 2)) + p[20:])
        for p in packets
    ]


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("size", [500, 501])
def test_batches_are_joined(bench: Bench, protocol: int, size: int) -> None:
    packets = from_peer(flow(protocol, [size] * 30 + [13]))
    bench.udp.incoming = incoming(packets)
    (frame,) = bench.receive()
    again = reference.segment(frame[10:], size)
    assert [p[12:] for p in again] == [p[12:] for p in packets]
    assert bench.counters.udp_received_packets == bench.counters.tun_written_packets == 31


def test_single_datagrams_are_joined_too(bench: Bench) -> None:
    packets = from_peer(flow(TCP, [1001] * 40))
    bench.udp.incoming = [(packet, 0, PEER[0]) for packet in packets]
    (frame,) = bench.receive()
    assert [p[12:] for p in reference.segment(frame[10:], 1001)] == [p[12:] for p in packets]


def test_errors_of_the_socket_do_not_matter(bench: Bench) -> None:
    bench.udp.incoming = incoming(from_peer(flow(TCP, [100] * 12)))
    bench.udp.errors = [errno.ECONNREFUSED, errno.ENOBUFS] * 20
    assert len(bench.receive()) == 1


def test_strangers_between_a_peers_packets(bench: Bench) -> None:
    packets = from_peer(flow(TCP, [100] * 12))
    bench.udp.incoming = [(packet, 0, PEER[0]) for packet in packets]
    for at in (9, 6, 3, 0):
        bench.udp.incoming.insert(at, (packets[0], 0, "10.97.0.77"))
        bench.udp.incoming.insert(at, (flow(TCP, [100])[0], 0, PEER[0]))
    (first, *rest) = bench.receive()
    assert not rest
    assert [p[12:] for p in reference.segment(first[10:], 100)] == [p[12:] for p in packets]
    assert bench.counters.drop_unknown_peer == 4
    assert bench.counters.drop_wrong_source == 4


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_a_device_without_super_packets_gets_them_one_by_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    refuse_super_packets(monkeypatch)
    packets = from_peer(flow(protocol, [500] * 30))
    bench.udp.incoming = incoming(packets)
    first = bench.receive()
    bench.udp.incoming = incoming(packets)
    second = bench.receive()
    for written in (first, second):
        assert [frame[:10] for frame in written] == [VNET_PLAIN] * 30
        assert [frame[10:] for frame in written] == [reference.less_ttl(p) for p in packets]
    assert len(bench.said) == 1
    assert "one by one" in bench.said[0]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOBUFS])
def test_what_the_device_does_not_take_is_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def writev(_fd: int, _parts: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "writev", writev)
    bench.udp.incoming = incoming(from_peer(flow(TCP, [500] * 30)))
    assert not bench.receive()
    assert bench.counters.drop_tun_write == 30
    assert not bench.said


def test_a_device_that_is_gone_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def writev(_fd: int, _parts: object) -> int:
        raise OSError(errno.EBADFD, "File descriptor in bad state")

    monkeypatch.setattr(os, "writev", writev)
    bench.udp.incoming = incoming(from_peer(flow(TCP, [500] * 30)))
    with pytest.raises(OSError, match="bad state"):
        bench.receive()


def test_many_small_packets_and_much_at_once(bench: Bench) -> None:
    """More packets than one batch holds, more bytes than are taken in one go."""
    small = from_peer(flow(TCP, [100] * 480))
    large = from_peer(flow(TCP, [1420] * 44 * 6, sequence=9))
    for packets, count in ((small, 120), (large, 44)):
        bench.udp.incoming = [
            call
            for at in range(0, len(packets), count)
            for call in incoming(packets[at : at + count])
        ]
        written = bench.receive()
        again = [
            p for frame in written for p in reference.segment(frame[10:], len(packets[0]) - 40)
        ]
        assert [p[12:] for p in again] == [p[12:] for p in packets]


def test_one_call_with_several(bench: Bench) -> None:
    packets = from_peer(flow(TCP, [500] * 30 + [13]))
    bench.udp.incoming = incoming(packets)
    bench.receiver.one()
    bench.receiver.flush()
    frame = bench.kernel.recv(70_000)
    assert [p[12:] for p in reference.segment(frame[10:], 500)] == [p[12:] for p in packets]
    assert bench.counters.udp_received_packets == 31
    assert bench.counters.udp_receive_calls == 1


@pytest.mark.parametrize(("sender", "count"), [("10.97.0.77", 1), (PEER[0], 10)])
def test_a_turn_receives_only_so_much(bench: Bench, sender: str, count: int) -> None:
    packets = from_peer(flow(TCP, [100] * count))
    bench.udp.incoming = incoming(packets, sender) * 30
    assert bench.receiver.turn()
    assert bench.udp.receives == 8


def test_no_device_refuses_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_super_packets(monkeypatch)
    packets = from_peer(flow(TCP, [1420] * 180))
    bench.udp.incoming = [
        call for at in range(0, 180, 44) for call in incoming(packets[at : at + 44])
    ]
    assert [frame[10:] for frame in bench.receive()] == [reference.less_ttl(p) for p in packets]
    assert len(bench.said) == 1


def test_batches_of_many_shapes_do_not_fill_the_memory(bench: Bench) -> None:
    bench.receiver._source_check = False
    tracemalloc.start()
    for size in range(1000, 1640):
        options = bytes(size % 11 * 4)
        packet = super_packet(TCP, bytes(8 * (size - 40 - len(options))), tcp_options=options)
        packets = reference.segment(packet, size - 40 - len(options))
        bench.udp.incoming = incoming(packets)
        bench.receive()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bench.counters.tun_written_packets == 640 * 8
    assert used < 1 << 20


def test_batches_of_many_odd_sizes_do_not_fill_the_memory(bench: Bench) -> None:
    """Each shape is remembered, but no copy of its packets."""
    bench.receiver._source_check = False
    for size in range(1001, 1301, 2):
        packets = reference.segment(super_packet(TCP, bytes(40 * (size - 40))), size - 40)
        bench.udp.incoming.append((b"".join(packets), size, PEER[0]))
    tracemalloc.start()
    bench.receive()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bench.counters.tun_written_packets == 40 * 150
    assert used < 2 << 20
