"""Netlink bytes: golden messages, pyroute2 as a second opinion, and hostile input.

The golden bytes are written down from linux/netlink.h, linux/rtnetlink.h and linux/neighbour.h, as
a little-endian host has them.
"""

import errno
import socket
import struct
import sys
from collections import Counter
from ipaddress import IPv4Address, IPv4Network
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from flanneld.kernel import wire
from flanneld.kernel.state import PROTOCOL, Entry, FdbEntry, Found, Neighbour, Route

SUBNET = IPv4Network("10.5.34.0/24")
HOST = IPv4Address("192.168.1.2")
MAC = bytes.fromhex("aabbccddeeff")

ROUTE = Route(SUBNET, HOST, 3)
ONLINK = Route(SUBNET, HOST, 3, onlink=True)
NEIGHBOUR = Neighbour(IPv4Address("10.5.34.0"), MAC, 5)
FDB = FdbEntry(MAC, HOST, 5)

ADDRESSES = st.integers(0, 2**32 - 1).map(IPv4Address)
HOSTS = st.integers(1, 2**32 - 1).map(IPv4Address)
NETWORKS = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)
INDEXES = st.integers(1, 2**31 - 1)
MACS = st.binary(min_size=6, max_size=6)
SEQUENCES = st.integers(0, 2**32 - 1)
ROUTES = st.builds(Route, NETWORKS, HOSTS, INDEXES, st.booleans())
NEIGHBOURS = st.builds(Neighbour, ADDRESSES, MACS, INDEXES)
FDB_ENTRIES = st.builds(FdbEntry, MACS, ADDRESSES, INDEXES)
ENTRIES: st.SearchStrategy[Entry] = st.one_of(ROUTES, NEIGHBOURS, FDB_ENTRIES)


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def route_body(*attributes: bytes, **fields: int) -> bytes:
    """A struct rtmsg (a plain /24 route of ours unless said otherwise) and its attributes."""
    rtm = {"family": 2, "dst_len": 24, "src_len": 0, "tos": 0, "table": 254, "protocol": PROTOCOL}
    rtm |= {"scope": 0, "type": 1, "flags": 0} | fields
    return struct.pack("=8BI", *rtm.values()) + b"".join(attributes)


def neighbour_body(family: int, state: int, flags: int, *attributes: bytes) -> bytes:
    return struct.pack("=BxxxiHBB", family, 5, state, flags, 0) + b"".join(attributes)


DST = attribute(wire.RTA_DST, SUBNET.network_address.packed)
GATEWAY = attribute(wire.RTA_GATEWAY, HOST.packed)
OIF = attribute(wire.RTA_OIF, struct.pack("=I", 3))
NEIGHBOUR_DST = attribute(wire.NDA_DST, NEIGHBOUR.ip.packed)
LLADDR = attribute(wire.NDA_LLADDR, MAC)
# The port is in network byte order, and padded.
PORT_AND_VNI = attribute(wire.NDA_PORT, b"\x12\xb6") + attribute(wire.NDA_VNI, b"\7\0\0\0")


def parse(data: bytes) -> Found | None:
    """Parse the one message in ``data``, whatever its kind."""
    [(start, end, kind, *_)] = wire.split_messages(data)
    is_route = kind in (wire.RTM_NEWROUTE, wire.RTM_DELROUTE)
    return (wire.parse_route if is_route else wire.parse_neighbour)(data, start, end)


def parse_route(body: bytes) -> Found | None:
    return wire.parse_route(body, 0, len(body))


def parse_neighbour(body: bytes) -> Found | None:
    return wire.parse_neighbour(body, 0, len(body))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param(
            wire.pack_write(7, ROUTE),
            "34000000 1800 0105 07000000 00000000"
            "02 18 00 00 fe 66 00 01 00000000"
            "0800 0100 0a052200  0800 0500 c0a80102  0800 0400 03000000",
            id="route",
        ),
        pytest.param(
            wire.pack_write(0xFFFFFFFF, ONLINK),
            "34000000 1800 0105 ffffffff 00000000"
            "02 18 00 00 fe 66 00 01 04000000"
            "0800 0100 0a052200  0800 0500 c0a80102  0800 0400 03000000",
            id="onlink route",
        ),
        pytest.param(
            wire.pack_write(7, ROUTE, spread=True),
            "34000000 1800 0105 07000000 00000000"
            "02 18 00 00 fe 66 70 01 00000000"
            "0800 0100 0a052200  0800 0500 c0a80102  0800 0400 03000000",
            id="route among many",
        ),
        pytest.param(
            wire.pack_write(7, ROUTE, replace=False),
            "34000000 1800 0106 07000000 00000000"
            "02 18 00 00 fe 66 00 01 00000000"
            "0800 0100 0a052200  0800 0500 c0a80102  0800 0400 03000000",
            id="route, exclusively",
        ),
        pytest.param(
            wire.pack_delete(8, Found(ROUTE, PROTOCOL)),
            "34000000 1900 0100 08000000 00000000"
            "02 18 00 00 fe 66 ff 00 00000000"
            "0800 0100 0a052200  0800 0500 c0a80102  0800 0400 03000000",
            id="delete route",
        ),
        pytest.param(
            wire.pack_delete(8, Found(Route(SUBNET, IPv4Address(0), 0), 4, metric=100)),
            "2c000000 1900 0100 08000000 00000000"
            "02 18 00 00 fe 04 ff 00 00000000"
            "0800 0100 0a052200  0800 0600 64000000",
            id="delete blackhole route of others",
        ),
        pytest.param(
            wire.pack_delete(8, Found(ROUTE, 3, tos=16)),
            "34000000 1900 0100 08000000 00000000"
            "02 18 00 10 fe 03 ff 00 00000000"
            "0800 0100 0a052200  0800 0500 c0a80102  0800 0400 03000000",
            id="delete route with a TOS",
        ),
        pytest.param(
            wire.pack_write(7, NEIGHBOUR),
            "30000000 1c00 0105 07000000 00000000"
            "02 000000 05000000 8000 00 00"
            "0800 0100 0a052200  0a00 0200 aabbccddeeff 0000",
            id="neighbour",
        ),
        pytest.param(
            wire.pack_write(7, NEIGHBOUR, replace=False),
            "30000000 1c00 0106 07000000 00000000"
            "02 000000 05000000 8000 00 00"
            "0800 0100 0a052200  0a00 0200 aabbccddeeff 0000",
            id="neighbour, exclusively",
        ),
        pytest.param(
            wire.pack_delete(7, Found(NEIGHBOUR)),
            "30000000 1d00 0100 07000000 00000000"
            "02 000000 05000000 8000 00 00"
            "0800 0100 0a052200  0a00 0200 aabbccddeeff 0000",
            id="delete neighbour",
        ),
        pytest.param(
            wire.pack_write(7, FDB),
            "30000000 1c00 0105 07000000 00000000"
            "07 000000 05000000 8000 02 00"
            "0800 0100 c0a80102  0a00 0200 aabbccddeeff 0000",
            id="FDB entry",
        ),
        pytest.param(
            wire.pack_delete(7, Found(FDB)),
            "30000000 1d00 0100 07000000 00000000"
            "07 000000 05000000 8000 02 00"
            "0800 0100 c0a80102  0a00 0200 aabbccddeeff 0000",
            id="delete FDB entry",
        ),
        pytest.param(
            wire.pack_delete(7, Found(FDB, elsewhere=PORT_AND_VNI)),
            "40000000 1d00 0100 07000000 00000000"
            "07 000000 05000000 8000 02 00"
            "0800 0100 c0a80102  0a00 0200 aabbccddeeff 0000"
            "0600 0600 12b6 0000  0800 0700 07000000",
            id="delete FDB entry with a port and VNI",
        ),
        pytest.param(
            wire.pack_route_dump(9, PROTOCOL),
            "24000000 1a00 0103 09000000 00000000"
            "02 00 00 00 fe 66 00 00 00000000  0800 0f00 fe000000",
            id="route dump",
        ),
        pytest.param(
            wire.pack_neighbour_dump(9, 5),
            "24000000 1e00 0103 09000000 0000000002 000000 00000000 0000 00 00  0800 0800 05000000",
            id="neighbour dump",
        ),
        pytest.param(
            wire.pack_fdb_dump(9, 5),
            "1c000000 1e00 0103 09000000 00000000  07 000000 05000000 0000 00 00",
            id="FDB dump",
        ),
        pytest.param(
            wire.with_ack(wire.pack_fdb_dump(9, 5)),
            "1c000000 1e00 0503 09000000 00000000  07 000000 05000000 0000 00 00",
            id="with acknowledgement",
        ),
    ],
)
def test_golden_bytes(message: bytes, expected: str) -> None:
    assert message.hex() == bytes.fromhex(expected).hex()


def attributes_of(message: rtmsg | ndmsg) -> list[tuple[str, object]]:
    return [(name, value) for name, value in message["attrs"]]


def test_pyroute2_reads_our_route() -> None:
    message = rtmsg(wire.pack_write(7, ONLINK))
    message.decode()
    header = message["header"]
    assert (header["length"], header["type"], header["sequence_number"]) == (52, 24, 7)
    assert [message[name] for name in ("family", "dst_len", "tos", "table", "proto")] == [
        *(socket.AF_INET, 24, 0, 254, PROTOCOL)
    ]
    assert (message["scope"], message["type"], message["flags"]) == (0, 1, 4)
    assert attributes_of(message) == [
        ("RTA_DST", "10.5.34.0"),
        ("RTA_GATEWAY", "192.168.1.2"),
        ("RTA_OIF", 3),
    ]


@pytest.mark.parametrize(
    ("entry", "family", "flags", "address"),
    [(NEIGHBOUR, socket.AF_INET, 0, "10.5.34.0"), (FDB, 7, 2, "192.168.1.2")],
)
def test_pyroute2_reads_our_neighbours(entry: Entry, family: int, flags: int, address: str) -> None:
    message = ndmsg(wire.pack_write(7, entry))
    message.decode()
    assert [message[name] for name in ("family", "ifindex", "state", "flags")] == [
        *(family, 5, 0x80, flags)
    ]
    assert attributes_of(message) == [("NDA_DST", address), ("NDA_LLADDR", "aa:bb:cc:dd:ee:ff")]


def test_we_read_pyroute2s_route() -> None:
    message = rtmsg()
    message["family"], message["dst_len"], message["table"] = socket.AF_INET, 24, 254
    message["proto"], message["type"], message["flags"] = 4, 1, 4
    message["attrs"] = [
        ("RTA_TABLE", 254),
        ("RTA_DST", "10.5.34.0"),
        ("RTA_PRIORITY", 9),
        ("RTA_GATEWAY", "192.168.1.2"),
        ("RTA_OIF", 3),
    ]
    message["header"]["type"] = wire.RTM_NEWROUTE
    message.encode()
    assert parse(bytes(message.data)) == Found(ONLINK, protocol=4, metric=9)


def test_we_read_pyroute2s_link_and_address() -> None:
    link = ifinfmsg()
    link["index"], link["flags"] = 4, 0x1003
    link["attrs"] = [("IFLA_MTU", 1500), ("IFLA_IFNAME", "eth0")]
    address = ifaddrmsg()
    address["family"], address["index"] = socket.AF_INET, 17
    address["attrs"] = [("IFA_LOCAL", "10.0.0.1")]
    for message in (link, address):
        message.encode()
    data = bytes(link.data) + bytes(address.data)
    first, second = wire.split_messages(data)
    assert wire.parse_link(data, first[0], first[1]) == wire.Link(4, "eth0", True)
    assert wire.parse_address_index(data, second[0], second[1]) == 17


@pytest.mark.parametrize("step", [1, 256, 4096], ids=["hosts", "subnets", "wide subnets"])
def test_gateways_in_a_row_are_spread_over_all_scopes(step: int) -> None:
    scopes = Counter(
        wire.spread_scope(IPv4Address(0x0A000000 + number * step)) for number in range(10_000)
    )
    assert scopes.keys() <= set(range(200))
    # 50 in each if they were even.
    assert max(scopes.values()) < 100


@given(SEQUENCES, ENTRIES, st.booleans())
def test_what_is_written_is_read_back(seq: int, entry: Entry, spread: bool) -> None:
    protocol = PROTOCOL if isinstance(entry, Route) else 0
    assert parse(wire.pack_write(seq, entry, spread=spread)) == Found(entry, protocol)
    [(_, _, _, _, sequence, _)] = wire.split_messages(wire.pack_write(seq, entry))
    assert sequence == seq


@given(
    st.builds(Route, NETWORKS, ADDRESSES, st.integers(0, 2**31 - 1)),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.integers(0, 255),
)
def test_a_deletion_names_exactly_the_route(
    route: Route, protocol: int, metric: int, tos: int
) -> None:
    read = parse(wire.pack_delete(1, Found(route, protocol, metric, tos)))
    assert read is not None
    assert (read.entry, read.protocol, read.metric, read.tos) == (route, protocol, metric, tos)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (route_body(DST, GATEWAY, OIF), Found(ROUTE, PROTOCOL)),
        (route_body(DST, GATEWAY, OIF, flags=0x15), Found(ONLINK, PROTOCOL)),
        (
            route_body(DST, GATEWAY, OIF, attribute(wire.RTA_CACHEINFO, bytes(32))),
            Found(ROUTE, PROTOCOL),
        ),
        (route_body(DST, GATEWAY, OIF, tos=8), Found(ROUTE, PROTOCOL, tos=8)),
        (route_body(DST, GATEWAY, OIF, type=6), Found(ROUTE, PROTOCOL, plain=False)),
        # RTA_PREFSRC, RTA_METRICS and RTA_MULTIPATH: our routes have none of them.
        (
            route_body(DST, GATEWAY, OIF, attribute(7, bytes(4))),
            Found(ROUTE, PROTOCOL, plain=False),
        ),
        (
            route_body(DST, GATEWAY, OIF, attribute(0x8000 | 8, bytes(8))),
            Found(ROUTE, PROTOCOL, plain=False),
        ),
        (
            route_body(DST, attribute(9, bytes(16))),
            Found(Route(SUBNET, IPv4Address(0), 0), PROTOCOL, plain=False),
        ),
        (
            route_body(dst_len=0, protocol=4, type=1),
            Found(Route(IPv4Network("0.0.0.0/0"), IPv4Address(0), 0), 4),
        ),
        (
            route_body(DST, GATEWAY, OIF, attribute(wire.RTA_TABLE, struct.pack("=I", 1000))),
            None,
        ),
        (
            route_body(DST, GATEWAY, OIF, attribute(wire.RTA_TABLE, b"\xfe\0\0\0"), table=0),
            Found(ROUTE, PROTOCOL),
        ),
        (route_body(DST, GATEWAY, OIF, table=255), None),
        (route_body(DST, GATEWAY, OIF, family=10), None),
        (route_body(DST, GATEWAY, OIF, dst_len=33), None),
        (route_body(DST, GATEWAY, OIF, dst_len=16), None),
    ],
)
def test_routes_as_the_kernel_tells_them(body: bytes, found: Found | None) -> None:
    assert parse_route(body) == found


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (neighbour_body(2, 0x80, 0, NEIGHBOUR_DST, LLADDR), Found(NEIGHBOUR)),
        (
            neighbour_body(2, 0x02, 0, LLADDR, NEIGHBOUR_DST, attribute(3, bytes(16))),
            Found(NEIGHBOUR, plain=False, permanent=False),
        ),
        # A failed neighbour has no MAC.
        (
            neighbour_body(2, 0x20, 0, NEIGHBOUR_DST),
            Found(Neighbour(NEIGHBOUR.ip, bytes(6), 5), plain=False, permanent=False),
        ),
        (neighbour_body(7, 0x80, 2, LLADDR, attribute(1, HOST.packed)), Found(FDB)),
        (neighbour_body(7, 0x80, 2, LLADDR), Found(FdbEntry(MAC, IPv4Address(0), 5))),
        # Learned, and one of a bridge's own (no NTF_SELF).
        (
            neighbour_body(7, 0x02, 2, LLADDR, attribute(1, HOST.packed)),
            Found(FDB, plain=False, permanent=False),
        ),
        # With a port and a VNI of its own, an interface of its own, or a nexthop group.
        (
            neighbour_body(7, 0x80, 2, LLADDR, attribute(1, HOST.packed), PORT_AND_VNI),
            Found(FDB, plain=False, elsewhere=PORT_AND_VNI),
        ),
        (
            neighbour_body(7, 0x80, 2, attribute(8, b"\4\0\0\0"), LLADDR),
            Found(
                FdbEntry(MAC, IPv4Address(0), 5), plain=False, elsewhere=attribute(8, b"\4\0\0\0")
            ),
        ),
        (
            neighbour_body(7, 0x80, 2, LLADDR, attribute(13, b"\6\0\0\0")),
            Found(FdbEntry(MAC, IPv4Address(0), 5), plain=False),
        ),
        (neighbour_body(7, 0x80, 4, LLADDR), None),
        (neighbour_body(7, 0x80, 2, attribute(1, HOST.packed)), None),
        (neighbour_body(10, 0x80, 0, attribute(1, bytes(16)), LLADDR), None),
        (neighbour_body(2, 0x80, 0, attribute(1, bytes(16)), LLADDR), None),
    ],
)
def test_neighbours_as_the_kernel_tells_them(body: bytes, found: Found | None) -> None:
    assert parse_neighbour(body) == found


WORDS = b"Nexthop has invalid gateway.\0"
REQUEST_HEADER = bytes(wire.HEADER.size)


@pytest.mark.parametrize(
    ("body", "flags", "expected"),
    [
        (struct.pack("=i", 0) + REQUEST_HEADER, 0x100, (0, "")),
        (struct.pack("=i", -17) + REQUEST_HEADER, 0x100, (17, "")),
        (
            struct.pack("=i", -22) + REQUEST_HEADER + attribute(2, bytes(4)) + attribute(1, WORDS),
            0x300,
            (22, "Nexthop has invalid gateway."),
        ),
        (struct.pack("=i", -22) + REQUEST_HEADER + attribute(1, WORDS), 0x100, (22, "")),
        (struct.pack("=i", -22) + REQUEST_HEADER + attribute(2, bytes(4)), 0x300, (22, "")),
        (struct.pack("=i", -22), 0x300, (22, "")),
        (b"\0\0", 0, (0, "")),
        # No error codes: they must not become one that os.strerror() does not take.
        (struct.pack("=i", -(2**31)), 0, (errno.EPROTO, "")),
        (struct.pack("=i", -4096), 0, (errno.EPROTO, "")),
        (struct.pack("=i", 7), 0, (errno.EPROTO, "")),
    ],
)
def test_errors(body: bytes, flags: int, expected: tuple[int, str]) -> None:
    assert wire.parse_error(body, 0, len(body), flags) == expected


def test_messages_follow_each_other_aligned() -> None:
    odd = wire.HEADER.pack(17, 16, 2, 3, 4) + b"x" + bytes(3)
    data = odd + wire.pack_write(5, ROUTE)
    assert list(wire.split_messages(data)) == [(16, 17, 16, 2, 3, 4), (36, 72, 24, 0x501, 5, 0)]


def test_a_length_shorter_than_its_header_ends_the_walk() -> None:
    for size in range(16):
        data = size.to_bytes(4, sys.byteorder) + bytes(44)
        assert list(islice(wire.split_messages(data), 10)) == []
    for size in range(4):
        data = size.to_bytes(2, sys.byteorder) + bytes(46)
        assert list(islice(wire.split_attributes(data, 0, len(data)), 10)) == []


@pytest.mark.parametrize("size", [0, 1, 3, 5])
@pytest.mark.parametrize("kind", range(17))
def test_attributes_of_the_wrong_size_never_raise(kind: int, size: int) -> None:
    odd = struct.pack("=HH", 4 + size, kind) + b"\1" * size
    parse_route(route_body() + odd)
    for family in (2, 7):
        parse_neighbour(neighbour_body(family, 0x80, 2) + odd)


@given(st.binary(max_size=200), st.integers(0, 0xFFFF))
def test_arbitrary_bytes_never_raise(data: bytes, flags: int) -> None:
    for start, end, *_ in wire.split_messages(data):
        assert 0 < start <= end <= len(data)
    for start, size in [(s, n) for _, s, n in wire.split_attributes(data, 0, len(data))]:
        assert 0 < start <= start + size <= len(data)
    wire.parse_route(data, 0, len(data))
    wire.parse_neighbour(data, 0, len(data))
    wire.parse_link(data, 0, len(data))
    wire.parse_address_index(data, 0, len(data))
    wire.parse_error(data, 0, len(data), flags)


KERNEL_MESSAGES = [
    *(wire.pack_write(1, entry) for entry in (ROUTE, NEIGHBOUR, FDB)),
    wire.pack_delete(1, Found(ROUTE, PROTOCOL, 7)),
    wire.pack_delete(1, Found(FDB, elsewhere=PORT_AND_VNI)),
    wire.HEADER.pack(44, 16, 0, 1, 0)
    + struct.pack("=BxHiII", 0, 1, 4, 1, 0)
    + attribute(3, b"ab\xff\0")
    + bytes(4),
    wire.HEADER.pack(68, 2, 0x300, 1, 0)
    + struct.pack("=i", -22)
    + REQUEST_HEADER
    + attribute(1, WORDS),
]


@given(
    st.sampled_from(KERNEL_MESSAGES),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4),
    st.integers(0, 80),
)
def test_damaged_messages_never_raise(
    message: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(message + message)
    for position, value in changes:
        damaged[position % len(message)] = value
    data = bytes(damaged[:length])
    for start, end, _, flags, *_ in wire.split_messages(data):
        wire.parse_route(data, start, end)
        wire.parse_neighbour(data, start, end)
        wire.parse_link(data, start, end)
        wire.parse_address_index(data, start, end)
        wire.parse_error(data, start, end, flags)
