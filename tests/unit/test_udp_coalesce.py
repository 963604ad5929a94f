"""The vectorised coalescing against the scalar one."""

import struct
from collections.abc import Sequence

import numpy as np
import pytest
import udp_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from test_udp_segment import super_packet

from flanneld.backend.udp.batch import BATCH_ROWS, Batch, Scratch
from flanneld.backend.udp.buffers import Buffers
from flanneld.backend.udp.coalesce import Coalescer
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.packet import Buffer

TCP, UDP = reference.TCP, reference.UDP
# As it is after other batches.
SCRATCH = Scratch(BATCH_ROWS << 12, Buffers())
for used in vars(SCRATCH).values():
    used.view(np.uint8)[...] = 0xA5


class Device:
    """Collects what a TUN device is given."""

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, bytes]] = []
        self.counters = Counters()
        self.expired: list[bytes] = []
        self.coalescer = Coalescer(
            self.write,
            lambda packet: self.expired.append(bytes(packet)),
            self.counters,
            Buffers(),
        )

    def write(self, frame: Sequence[Buffer], packets: int) -> None:
        assert packets > 0
        data = b"".join(frame)
        self.frames.append((data[:10], data[10:]))

    def take(self, packets: list[bytes], *, in_rows: bool) -> None:
        """Hand over packets as they come from the socket: in runs of one size."""
        at = 0
        while at < len(packets):
            size = len(packets[at])
            end = at
            while end < len(packets) and len(packets[end]) == size and end - at < BATCH_ROWS:
                end += 1
            if in_rows and size >= 29:
                memory = np.frombuffer(bytearray(b"".join(packets[at:end])), np.uint8)
                batch = Batch(memory, end - at, size, SCRATCH)
                self.coalescer.add_rows(batch, lambda _: True)
            else:
                for packet in packets[at:end]:
                    self.coalescer.add(memoryview(bytearray(packet)), lambda _: True)
            at = end
        self.coalescer.flush()


def check(packets: list[bytes], device: Device) -> None:
    """What was written is what the scalar implementation writes, and cuts into the same again."""
    expected = reference.coalesce(packets)
    assert len(device.frames) == len(expected)
    for (vnet, packet), frame in zip(device.frames, expected, strict=True):
        flags, kind, header, gso, start, offset = struct.unpack("=BBHHHH", vnet)
        if len(frame.packets) == 1:
            assert vnet == bytes(10)
            assert packet == frame.packets[0]
            continue
        assert (flags, start, gso) == (1, 20, frame.gso)
        assert (kind, offset) == ((1, 16) if frame.kind == "tcp" else (5, 6))
        assert header == len(frame.packets[0]) - frame.gso
        assert reference.ones_sum(packet[:20]) == 0xFFFF
        pseudo = packet[12:20] + struct.pack("!BBH", 0, packet[9], len(packet) - 20)
        at = 20 + offset
        assert packet[at : at + 2] == struct.pack("!H", reference.ones_sum(pseudo))
        again = reference.segment(packet, gso)
        # An IP id means nothing in a packet that must not be fragmented.
        assert [_without_id(p) for p in again] == [_without_id(p) for p in frame.packets]


def _without_id(packet: bytes) -> bytes:
    return packet[:4] + packet[6:10] + packet[12:]


def flow(
    protocol: int, sizes: list[int], *, sequence: int = 5, flags: int = 0x10, options: bytes = b""
) -> list[bytes]:
    packets = []
    for number, size in enumerate(sizes):
        packet = super_packet(
            protocol, bytes([number % 256]) * size, identity=number, sequence=sequence % 2**32,
            flags=flags, tcp_options=options if protocol == TCP else b"",
        )  # fmt: skip
        packets.append(reference.with_checksums(packet))
        sequence += size
    return packets


@st.composite
def trouble(draw: st.DrawFn) -> list[bytes]:
    """Flows, mixed, with everything that can be wrong with packets."""
    packets: list[bytes] = []
    for _ in range(draw(st.integers(1, 5))):
        protocol = draw(st.sampled_from([TCP, UDP]))
        size = draw(st.sampled_from([1, 2, 17, 100, 101]))
        count = draw(st.integers(1, 20))
        last = draw(st.integers(1, size + 2))
        run = flow(
            protocol, [size] * count + [last],
            sequence=draw(st.sampled_from([0, 77, 2**32 - 300])),
            options=draw(st.sampled_from([b"", bytes(12)])),
        )  # fmt: skip
        for at in draw(st.sets(st.integers(0, len(run) - 1), max_size=3)):
            run[at] = draw(change(run[at]))
        if draw(st.booleans()) and packets:
            # Interleaved with what came before.
            packets = [p for pair in zip(packets, run, strict=False) for p in pair]
        else:
            packets += run
    return packets


@st.composite
def change(draw: st.DrawFn, packet: bytes) -> bytes:
    """Do something to a packet."""
    what = draw(st.sampled_from(["flip", "flags", "header", "ip", "cut", "pad", "random", "udp0"]))
    data = bytearray(packet)
    if what == "flip":
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif what == "flags" and data[9] == TCP:
        data[33] = draw(st.sampled_from([0x10, 0x18, 0x18, 0x11, 0x50, 0x90, 0x02, 0x00]))
        return reference.with_checksums(bytes(data))
    elif what == "header":
        # TOS, id, fragment, TTL, addresses, ports, sequence, ack..., with right checksums.
        at = draw(st.sampled_from([1, 4, 5, 6, 7, 8, 15, 19, 21, 23]))
        data[at] = draw(st.integers(0, 255))
        return reference.with_checksums(bytes(data))
    elif what == "ip":
        options = bytes([1]) * 4
        data[0] = 0x46
        data[2:4] = struct.pack("!H", len(data) + 4)
        return reference.with_ip_checksum(bytes(data[:20]) + options + bytes(data[20:]))
    elif what == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    elif what == "pad":
        return bytes(data) + bytes(draw(st.integers(1, 9)))
    elif what == "random":
        return draw(st.binary(max_size=80))
    elif what == "udp0" and data[9] == UDP:
        data[26:28] = b"\0\0"
    return bytes(data)


@settings(max_examples=300, deadline=None)
@given(trouble(), st.booleans())
def test_is_what_the_scalar_one_makes(packets: list[bytes], in_rows: bool) -> None:
    device = Device()
    device.take(packets, in_rows=in_rows)
    check(packets, device)


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize(("size", "count"), [(1420, 44), (1420, 128), (1419, 100), (64, 128)])
def test_a_long_run(protocol: int, size: int, count: int) -> None:
    packets = flow(protocol, [size] * count, sequence=2**32 - 2000)
    device = Device()
    device.take(packets, in_rows=True)
    check(packets, device)
    assert len(device.frames) < 5


def test_runs_of_several_calls_are_joined() -> None:
    packets = flow(TCP, [1000] * 30)
    device = Device()
    for at in range(0, 30, 10):
        memory = np.frombuffer(bytearray(b"".join(packets[at : at + 10])), np.uint8)
        device.coalescer.add_rows(Batch(memory, 10, 1040, SCRATCH), lambda _: True)
    assert not device.frames
    device.coalescer.flush()
    check(packets, device)
    assert len(device.frames) == 1


def test_a_damaged_packet_stays_damaged() -> None:
    packets = flow(TCP, [100] * 10)
    damaged = bytearray(packets[4])
    damaged[60] ^= 1
    packets[4] = bytes(damaged)
    device = Device()
    device.take(packets, in_rows=True)
    assert (bytes(10), reference.less_ttl(packets[4])) in device.frames
    check(packets, device)


def test_sources_that_are_not_admitted_are_counted() -> None:
    packets = flow(TCP, [100] * 10)
    memory = np.frombuffer(bytearray(b"".join(packets)), np.uint8)
    device = Device()
    device.coalescer.add_rows(Batch(memory, 10, 140, SCRATCH), lambda source: source[0] != 10)
    device.coalescer.add(memoryview(bytearray(packets[0])), lambda source: source[0] != 10)
    device.coalescer.flush()
    assert not device.frames
    assert device.counters.drop_wrong_source == 11


def test_what_is_dropped_is_counted() -> None:
    packet = bytearray(flow(UDP, [10])[0])
    dying = bytearray(packet)
    dying[8] = 1
    cut_off = packet[:-1]
    ipv6 = bytearray(packet)
    ipv6[0] = 0x65
    device = Device()
    device.take([bytes(p) for p in (dying, cut_off, ipv6, b"", b"E" * 19)], in_rows=False)
    assert not device.frames
    assert device.expired == [dying]
    assert device.counters.drops == Counters(drop_ttl=1, drop_malformed=3, drop_not_ipv4=1).drops


# Every byte of the headers that tells packets apart, and in TCP the options' too.
@pytest.mark.parametrize(
    ("protocol", "at"),
    [(p, at) for p in (TCP, UDP) for at in (1, 6, 8, 12, 15, 16, 19, 20, 21, 22, 23)]
    + [(TCP, at) for at in (24, 27, 28, 31, 33, 34, 35, 38, 39, 40, 51)],
)
def test_another_header_in_the_middle(protocol: int, at: int) -> None:
    packets = flow(protocol, [100] * 24, options=bytes(12))
    for number in range(9, 17):
        changed = bytearray(packets[number])
        changed[at] ^= 0x08
        packets[number] = reference.with_checksums(bytes(changed))
    device = Device()
    device.take(packets, in_rows=True)
    check(packets, device)
    assert len(device.frames) > 1


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_shorter_packets_after_longer_ones(protocol: int) -> None:
    packets = flow(protocol, [100] * 8 + [60] * 8 + [100] * 8 + [120] * 8)
    device = Device()
    device.take(packets, in_rows=True)
    check(packets, device)


@pytest.mark.parametrize("pushed", [{7}, {0}, {23}, {3, 4, 5}, {0, 23}, set(range(24))])
def test_what_is_pushed_is_written(pushed: set[int]) -> None:
    packets = flow(TCP, [100] * 24)
    for number in pushed:
        data = bytearray(packets[number])
        data[33] |= reference.PSH
        packets[number] = reference.with_checksums(bytes(data))
    device = Device()
    device.take(packets, in_rows=True)
    check(packets, device)
    assert len(device.frames) == len(pushed) + (23 not in pushed)


def test_a_shorter_last_one_is_pushed() -> None:
    packets = flow(TCP, [100] * 8) + flow(TCP, [60], sequence=805, flags=0x18)
    device = Device()
    device.take(packets, in_rows=True)
    check(packets, device)
    assert len(device.frames) == 1


@pytest.mark.parametrize("sources", [1, 2])
def test_no_checksum_beside_a_damaged_packet(sources: int) -> None:
    """The sum of the fourth is right with 0 in its field, which means that there is none."""
    packets = flow(UDP, [100] * 8)
    data = bytearray(packets[3])
    data[26:28] = b"\0\0"
    data[28:30] = b"\0\0"
    pseudo = bytes(data[12:20]) + struct.pack("!BBH", 0, UDP, len(data) - 20)
    rest = reference.ones_sum(pseudo + bytes(data[20:]))
    data[28:30] = struct.pack("!H", 0xFFFF - rest)
    packets[3] = bytes(data)
    damaged = bytearray(packets[6])
    damaged[60] ^= 1
    packets[6] = bytes(damaged)
    if sources == 2:
        packets += [
            reference.with_checksums(p[:15] + b"\x09" + p[16:]) for p in flow(UDP, [100] * 4)
        ]
    device = Device()
    device.take(packets, in_rows=True)
    check(packets, device)
    assert (bytes(10), reference.less_ttl(packets[3])) in device.frames


def test_what_cannot_be_joined_comes_first() -> None:
    first = [
        reference.with_checksums(bytes([0x45, tos]) + flow(UDP, [100])[0][2:6] + b"\0\0" + rest[8:])
        for tos, rest in ((0, flow(UDP, [100])[0]), (4, flow(UDP, [100])[0]))
    ]
    packets = first + flow(UDP, [100] * 6)
    device = Device()
    device.take(packets, in_rows=True)
    check(packets, device)
    assert len(device.frames) == 3


@pytest.mark.parametrize("damaged", [range(1, 24), range(0, 24, 2), range(5)])
def test_many_damaged_packets(damaged: range) -> None:
    packets = flow(TCP, [100] * 24)
    for number in damaged:
        data = bytearray(packets[number])
        data[60] ^= 1
        packets[number] = bytes(data)
    device = Device()
    device.take(packets, in_rows=True)
    check(packets, device)


def test_switched_off_nothing_is_joined() -> None:
    packets = flow(TCP, [100] * 8) + flow(UDP, [100] * 8)
    device = Device()
    device.coalescer.tcp = device.coalescer.udp = False
    device.take(packets, in_rows=True)
    assert device.frames == [(bytes(10), reference.less_ttl(packet)) for packet in packets]


@pytest.mark.parametrize("size", [1040, 1041])
def test_packets_of_odd_sizes_are_found_intact_at_once(size: int) -> None:
    """Not one by one, which would be as right and slower. The scratch holds what others left."""
    each = size - 40
    packets = reference.segment(super_packet(TCP, bytes(range(256)) * 40)[: 40 + 10 * each], each)
    full = [packet for packet in packets if len(packet) == size]
    memory = np.frombuffer(bytearray(b"".join(full)), np.uint8)
    batch = Batch(memory, len(full), size, SCRATCH)
    assert batch.ends(0, TCP, 40) == [len(full)] != [4]
    assert not batch.damaged([batch.head(0)])
