"""The udp tunnel's route table, ICMP errors and messages; what was recorded of the original."""

import random
import struct
import tracemalloc
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
import udp_reference as reference
from hypothesis import given
from hypothesis import strategies as st

from flanneld.backend.udp import control, icmp
from flanneld.backend.udp.control import BadMessage, Message, Op, Settings
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.packet import decrement_ttl
from flanneld.backend.udp.peers import PeerRoute, RouteTable

PCAP = Path(__file__).parents[1] / "fixtures" / "pcap"


def route(subnet: str, ip: str) -> PeerRoute:
    return PeerRoute(IPv4Network(subnet), IPv4Address(ip))


def captured(name: str) -> list[bytes]:
    """The packets of a capture."""
    data = (PCAP / name).read_bytes()
    at, packets = 24, []
    while at < len(data):
        length = struct.unpack_from("<I", data, at + 8)[0]
        packets.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    return packets


routes_strategy = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 32), st.integers(1, 9)).map(
        lambda t: PeerRoute(
            IPv4Network((t[0] >> (32 - t[1]) << (32 - t[1]), t[1])), IPv4Address(t[2])
        )
    ),
    max_size=20,
)


@given(routes_strategy, routes_strategy, routes_strategy, st.integers(0, 2**32 - 1))
def test_the_longest_prefix_wins(
    first: list[PeerRoute], removed: list[PeerRoute], added: list[PeerRoute], address: int
) -> None:
    table, model = RouteTable(8285), {}
    table.replace(first)
    table.remove(r.subnet for r in removed + first[::3])
    table.set(added)
    for r in first:
        model[r.subnet] = r.public_ip
    for r in removed + first[::3]:
        model.pop(r.subnet, None)
    for r in added:
        model[r.subnet] = r.public_ip
    assert len(table) == len(model)
    for number in (address, *(int(r.subnet.network_address) for r in first + added)):
        wanted = IPv4Address(number)
        matching = [net for net in model if wanted in net]
        best = max(matching, key=lambda net: net.prefixlen, default=None)
        for _ in range(2):
            peer = table.lookup(wanted.packed)
            assert (peer and peer.address) == (best and (str(model[best]), 8285))
    for ip in {r.public_ip for r in first + added}:
        assert table.knows(str(ip)) is (ip in model.values())


def test_a_peer_s_device_is_its_present_subnet_s() -> None:
    table = RouteTable(1)
    table.set([route("10.5.1.0/24", "1.2.3.4")])
    # The host takes another subnet: the new one comes first, the old one goes then.
    table.set([route("10.5.7.0/24", "1.2.3.4")])
    table.remove([IPv4Network("10.5.1.0/24")])
    peer = table.lookup(bytes((10, 5, 7, 9)))
    assert peer is not None
    assert peer.device == "10.5.7.0"
    assert table.knows("1.2.3.4")
    table.remove([IPv4Network("10.5.7.0/24")])
    assert not table.knows("1.2.3.4")


def test_a_scan_does_not_fill_the_memory() -> None:
    table = RouteTable(1)
    table.set([route("10.5.1.0/24", "1.2.3.4")])
    tracemalloc.start()
    # As many addresses as a network of the usual length has.
    for number in range(65536):
        table.lookup(struct.pack("!I", number))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 1 << 20
    assert table.lookup(bytes((10, 5, 1, 9))) is not None


def test_icmp_is_what_the_original_writes_but_for_the_ip_header() -> None:
    offending, original = captured("udp-tun-h1-ping-and-unreachable.pcap")[4:6]
    assert offending[9] == 17
    assert original[9] == 1
    assert icmp.may_answer(offending)
    assert icmp.error(icmp.NET_UNREACHABLE, offending) == original[20:]


def test_the_ttl_is_taken_down_as_by_the_original() -> None:
    wire = [frame[42:] for frame in captured("udp-underlay-two-pings.pcap")]
    for before, after in (
        (captured("udp-tun-h1-ping-and-unreachable.pcap")[0], wire[0]),
        (wire[0], captured("udp-tun-h2-two-pings.pcap")[0]),
    ):
        packet = bytearray(before)
        decrement_ttl(packet)
        assert packet == after


PACKET = captured("udp-tun-h1-ping-and-unreachable.pcap")[4]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (9, 1),  # ICMP
        (7, 1), (6, 0x21), (6, 1),  # a later fragment
        (16, 224), (16, 255),  # multicast, broadcast
        (12, 0), (12, 127), (12, 224), (12, 255),  # no host
        (0, 0x44),
    ],
)  # fmt: skip
def test_no_icmp_about(at: int, value: int) -> None:
    packet = bytearray(PACKET)
    packet[at] = value
    assert not icmp.may_answer(packet)


def test_icmp_about_a_first_fragment() -> None:
    packet = bytearray(PACKET)
    packet[6] = 0x20
    assert icmp.may_answer(packet)


@given(st.binary(min_size=20, max_size=80))
def test_icmp_about_anything_is_intact(packet: bytes) -> None:
    if icmp.may_answer(packet):
        assert reference.ones_sum(icmp.error(icmp.TIME_EXCEEDED, packet)) == 0xFFFF


def test_the_rate_limit() -> None:
    now = [0.0]
    limit = icmp.RateLimit(100.0, 5.0, lambda: now[0])
    assert [limit.allows() for _ in range(7)] == [True] * 5 + [False] * 2
    now[0] = 0.02
    assert [limit.allows() for _ in range(3)] == [True, True, False]
    now[0] = 100.0
    assert sum(limit.allows() for _ in range(100)) == 5


@pytest.mark.parametrize("count", [0, 1, 2999, 3000, 3001, 10_000])
@pytest.mark.parametrize("op", [Op.SET, Op.REPLACE])
def test_routes_travel_whole(op: Op, count: int) -> None:
    dice = random.Random(count)
    routes = [
        PeerRoute(IPv4Network((n << 8, 24)), IPv4Address(dice.randrange(2**32)))
        for n in range(count)
    ]
    messages = [message.encode() for message in control.route_messages(op, 7, routes)]
    assert max(map(len, messages)) <= control.LONGEST_MESSAGE
    decoded = [Message.decode(data) for data in messages]
    assert [m.more for m in decoded] == [True] * (len(decoded) - 1) + [False]
    assert all((m.op, m.number) == (op, 7) for m in decoded)
    assert [r for m in decoded for r in control.routes(m.body)] == routes


@given(st.binary(max_size=100))
def test_what_is_no_message_is_refused(data: bytes) -> None:
    try:
        message = Message.decode(data)
        control.routes(message.body)
    except BadMessage:
        return
    assert message.encode()[:2] == data[:2]


def test_another_version_is_refused() -> None:
    data = bytearray(Message(Op.READY).encode())
    data[1] += 1
    with pytest.raises(BadMessage, match="restart flanneld"):
        Message.decode(bytes(data))


def test_settings_travel_on_the_command_line() -> None:
    settings = Settings(3, 4, 5, -1, 8285, 1472, 127, source_check=False)
    assert Settings.parse(settings.arguments()) == settings
    with pytest.raises(ValueError, match="arguments"):
        Settings.parse(["1"])


def test_counters_travel_and_other_names_are_left_out() -> None:
    counters = Counters(udp_sent_packets=2**40, udp_send_calls=2**38, drop_ttl=3)
    assert Counters.decode(counters.encode() + b"\nfuture=1") == counters
    assert counters.segments_per_send == 4.0
    assert counters.drops["ttl"] == 3
