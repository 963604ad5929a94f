"""The vectorised segmentation against the scalar one."""

import struct

import numpy as np
import pytest
import udp_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from flanneld.backend.udp import segment
from flanneld.backend.udp.packet import checksum, complete_checksum, decrement_ttl, words

TCP, UDP = reference.TCP, reference.UDP


def super_packet(
    protocol: int,
    payload: bytes,
    *,
    identity: int = 7,
    sequence: int = 1000,
    flags: int = reference.ACK,
    ip_options: bytes = b"",
    tcp_options: bytes = b"",
    tos: int = 0,
) -> bytes:
    start = 20 + len(ip_options)
    if protocol == TCP:
        offset = (20 + len(tcp_options)) // 4 << 4
        transport = struct.pack("!HHIIBBHHH", 1, 2, sequence, 99, offset, flags, 500, 0, 0)
        transport += tcp_options
    else:
        transport = struct.pack("!HHHH", 53, 54, 8 + len(payload), 0)
    total = start + len(transport) + len(payload)
    head = struct.pack(
        "!BBHHHBBH", 0x40 | start // 4, tos, total, identity, 0x4000, 64, protocol, 0
    )
    addresses = bytes((10, 5, 1, 2, 10, 5, 2, 2))
    return reference.with_ip_checksum(head + addresses + ip_options + transport + payload)


def cut(packet: bytes, gso: int) -> list[bytes]:
    # In a TUN device's buffer the packet begins behind 10 bytes.
    source = np.frombuffer(bytearray(bytes(10) + packet), np.uint8)[10:]
    out = np.full(400_000, 0xEE, np.uint8)
    return segment.segment(source, (packet[0] & 15) * 4, packet[9], gso, out)


options = st.sampled_from([0, 4, 12, 40]).flatmap(lambda n: st.binary(min_size=n, max_size=n))


@settings(max_examples=200, deadline=None)
@given(
    protocol=st.sampled_from([TCP, UDP]),
    size=st.integers(1, 6000),
    gso=st.integers(1, 1500),
    identity=st.one_of(st.integers(0, 65535), st.integers(65500, 65535)),
    sequence=st.one_of(st.integers(0, 2**32 - 1), st.integers(2**32 - 5000, 2**32 - 1)),
    flags=st.integers(0, 255),
    ip_options=options,
    tcp_options=options,
    tos=st.integers(0, 255),
    seed=st.binary(min_size=1, max_size=64),
)
def test_is_what_the_scalar_one_makes(
    *, protocol: int, size: int, gso: int, identity: int, sequence: int, flags: int,
    ip_options: bytes, tcp_options: bytes, tos: int, seed: bytes,
) -> None:  # fmt: skip
    payload = (seed * (size // len(seed) + 1))[:size]
    packet = super_packet(
        protocol, payload, identity=identity, sequence=sequence, flags=flags,
        ip_options=ip_options, tcp_options=tcp_options, tos=tos,
    )  # fmt: skip
    assert cut(packet, gso) == reference.segment(packet, gso)


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("gso", [1, 8, 1419, 1420, 8960])
def test_a_full_super_packet(protocol: int, gso: int) -> None:
    payload = bytes(range(256)) * 255
    packet = super_packet(protocol, payload, identity=65530, sequence=2**32 - 3000)
    packets = cut(packet, gso)
    assert packets == reference.segment(packet, gso)
    assert all(map(reference.is_intact, packets))


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_payloads_of_zeros_and_ones(byte: int) -> None:
    for protocol in (TCP, UDP):
        packet = super_packet(protocol, bytes([byte]) * 5000, identity=0, sequence=0)
        assert cut(packet, 1000) == reference.segment(packet, 1000)


def pieces(sheet: segment.Sheet, last: int) -> list[bytes]:
    sizes = [sheet.size] * (sheet.number - 1) + [last] * (sheet.number > 0)
    return [sheet.packet(row, size).tobytes() for row, size in enumerate(sizes)]


def test_a_sheet_can_be_used_again_for_other_packets() -> None:
    one = super_packet(TCP, b"a" * 3333, flags=0xFF)
    two = super_packet(TCP, b"b" * 3333, identity=65535, sequence=2**32 - 1, flags=reference.ACK)
    out = np.zeros(10_000, np.uint8)
    sheet = segment.Sheet(out, start=20, header=40, protocol=TCP, gso=1001)
    for packet in (one, two, one):
        end, last = sheet.add(np.frombuffer(packet, np.uint8))
        sheet.finish()
        assert end == 3333
        assert pieces(sheet, last) == reference.segment(packet, 1001)
        sheet.clear()


@given(
    st.sampled_from([TCP, UDP]),
    st.sampled_from([100, 101, 8]),
    st.lists(
        st.tuples(
            st.integers(0, 0xFFFF), st.sampled_from([5, 2**32 - 900]), st.integers(0, 255),
            st.integers(1, 25), st.binary(min_size=8, max_size=8), st.booleans(),
        ),
        min_size=1, max_size=5,
    ),
    st.integers(1, 100),
    st.integers(30, 60),
)  # fmt: skip
def test_several_on_one_sheet(
    protocol: int,
    gso: int,
    several: list[tuple[int, int, int, int, bytes, bool]],
    rest: int,
    room: int,
) -> None:
    """Of several lengths; finished now and then; what does not fit goes on after a `clear`."""
    header = 40 if protocol == TCP else 28
    out = np.full(room * (header + gso + 1), 0xA5, np.uint8)
    sheet = segment.Sheet(out, start=20, header=header, protocol=protocol, gso=gso)
    made, wanted, last = [], [], sheet.size
    for number, (identity, sequence, flags, count, some, stop) in enumerate(several):
        payload = (some * gso)[:gso] * count
        if number == len(several) - 1:
            payload += bytes(min(rest, gso))
        packet = super_packet(
            protocol, payload, identity=identity, sequence=sequence, flags=flags | reference.ACK
        )
        wanted += reference.segment(packet, gso)
        first = 0
        while first < len(payload):
            if sheet.is_full:
                sheet.finish()
                made += pieces(sheet, sheet.size)
                sheet.clear()
            first, last = sheet.add(np.frombuffer(packet, np.uint8), first)
        if stop:
            sheet.finish()
            keep = sheet.number // 2
            if last == sheet.size:
                made += pieces(sheet, last)[: sheet.number - keep]
                sheet.clear(keep=keep)
    sheet.finish()
    assert made + pieces(sheet, last) == wanted


@given(
    st.binary(max_size=200),
    st.integers(0, 100),
    st.sampled_from([TCP, UDP]),
    st.integers(0, 9) | st.integers(65000, 65535),
)
def test_rubbish_is_refused_or_cut(data: bytes, start: int, protocol: int, gso: int) -> None:
    source = np.frombuffer(bytearray(data), np.uint8)
    try:
        segment.segment(source, start, protocol, gso, np.zeros(60_000, np.uint8))
    except segment.BadSuperPacket:
        return
    assert data[0] == 0x40 | start // 4
    assert data[9] == protocol


@given(
    size=st.integers(40, 300),
    count=st.integers(1, 9),
    protocol=st.sampled_from([TCP, UDP]),
    seed=st.binary(min_size=1, max_size=40),
)
def test_unfinished_checksums(size: int, count: int, protocol: int, seed: bytes) -> None:
    payload = (seed * size)[: size - (40 if protocol == TCP else 28)]
    good = [
        reference.with_checksums(super_packet(protocol, payload, identity=n)) for n in range(count)
    ]
    offset = 16 if protocol == TCP else 6
    stride = size + (size & 1)
    rows = np.zeros((count, stride), np.uint8)
    for row, packet in zip(rows, good, strict=True):
        pseudo = packet[12:20] + struct.pack("!BBH", 0, protocol, size - 20)
        unfinished = bytearray(packet)
        unfinished[20 + offset : 22 + offset] = struct.pack("!H", reference.ones_sum(pseudo))
        row[:size] = np.frombuffer(unfinished, np.uint8)
        assert complete_checksum(unfinished, 20, offset)
        assert unfinished == packet
    segment.complete_checksums(rows, 20, offset)
    assert [row[:size].tobytes() for row in rows] == good


@given(st.binary(min_size=20, max_size=20).filter(lambda data: data[8] > 0))
def test_the_ttl_of_any_header(header: bytes) -> None:
    one = bytearray(header)
    decrement_ttl(one)
    assert one == reference.less_ttl(header)
    rows = np.frombuffer(bytearray(header * 3), np.uint8).reshape(3, 20)
    segment.decrement_ttls(rows)
    assert rows.tobytes() == reference.less_ttl(header) * 3


@given(st.binary(min_size=1, max_size=99))
def test_the_checksum_of_anything(data: bytes) -> None:
    if any(data):
        assert checksum(words(data)) == struct.pack("!H", reference.internet_checksum(data))
