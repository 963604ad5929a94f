"""The host's devices, addresses and default routes from bytes; the real kernel's are read in
tests/netns/test_link.py."""

import struct
from ipaddress import IPv4Address, IPv4Network

from hypothesis import given
from hypothesis import strategies as st

from flanneld.interface import Address, DefaultRoute, Link
from flanneld.kernel import hostwire


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def test_a_link() -> None:
    body = struct.pack("=BxHiII", 0, 1, 7, 1, 0) + attribute(3, b"flannel.1\0")
    body += attribute(4, struct.pack("=I", 1450)) + attribute(18, attribute(1, b"vxlan\0"))
    assert hostwire.parse_link(body, 0, len(body)) == Link(7, "flannel.1", 1450, True, "vxlan")


def test_a_link_without_a_kind_that_is_down() -> None:
    body = struct.pack("=BxHiII", 0, 1, 2, 0, 0) + attribute(3, b"eth0\0")
    assert hostwire.parse_link(body, 0, len(body)) == Link(2, "eth0", 0, False, None)


def test_the_own_end_of_an_address() -> None:
    body = struct.pack("=BBBBI", 2, 24, 0, 253, 5) + attribute(1, b"\x0a\0\0\x02")
    other_end = Address(5, IPv4Address("10.0.0.2"), 24, 253)
    assert hostwire.parse_address(body, 0, len(body)) == other_end
    body += attribute(2, b"\x0a\0\0\x01")
    own = Address(5, IPv4Address("10.0.0.1"), 24, 253)
    assert hostwire.parse_address(body, 0, len(body)) == own


def test_what_is_on_link_on_a_point_to_point_device() -> None:
    body = struct.pack("=BBBBI", 2, 30, 0, 0, 5) + attribute(2, b"\x0a\0\0\x01")
    assert hostwire.parse_connected(body, 0, len(body)) == (5, IPv4Network("10.0.0.0/30"))
    body += attribute(1, b"\x0a\0\x09\x02")
    assert hostwire.parse_connected(body, 0, len(body)) == (5, IPv4Network("10.0.9.0/30"))


def vxlan_data(*attributes: bytes) -> bytes:
    return attribute(18, attribute(1, b"vxlan\0") + attribute(2, b"".join(attributes)))


def test_a_vxlan_device_with_all_that_is_compared() -> None:
    body = struct.pack("=BxHiII", 0, 1, 7, 1, 0) + attribute(3, b"flannel.1\0")
    body += attribute(1, bytes.fromhex("02000000000a")) + attribute(4, struct.pack("=I", 1450))
    one = body + vxlan_data(
        attribute(1, struct.pack("=I", 1)),
        attribute(3, struct.pack("=I", 2)),
        attribute(4, b"\x0a\x61\0\x01"),
        attribute(7, b"\0"),
        attribute(15, struct.pack("!H", 8472)),
    )
    vxlan = hostwire.Vxlan(1, 2, IPv4Address("10.97.0.1"), 8472, False, False, None)
    assert hostwire.parse_device(one, 0, len(one)) == hostwire.Device(
        7, "flannel.1", 1450, True, "02:00:00:00:00:0a", "vxlan", vxlan
    )
    other = body + vxlan_data(attribute(7, b"\1"), attribute(2, b"\xe0\0\0\1"), attribute(23, b""))
    found = hostwire.parse_device(other, 0, len(other))
    assert found is not None
    assert found.vxlan == hostwire.Vxlan(0, 0, None, 0, True, True, IPv4Address("224.0.0.1"))


def test_a_device_that_is_no_vxlan() -> None:
    body = struct.pack("=BxHiII", 0, 1, 2, 0, 0) + attribute(3, b"eth0\0")
    assert hostwire.parse_device(body, 0, len(body)) == hostwire.Device(
        2, "eth0", 0, False, "", "", None
    )


def route(length: int, dst: bytes | None, table: int = 254) -> bytes:
    body = struct.pack("=BBBBBBBBI", 2, length, 0, 0, table, 4, 0, 1, 0)
    if dst is not None:
        body += attribute(1, dst)
    return body + attribute(4, struct.pack("=I", 3)) + attribute(6, struct.pack("=I", 100))


def test_default_routes_come_first() -> None:
    for body, read in (
        (route(0, None), (True, DefaultRoute(3, 100, 1))),
        (route(8, b"\0\0\0\0"), (True, None)),
        (route(8, b"\x0a\0\0\0"), (False, None)),
        (route(0, None, table=100), (True, None)),
    ):
        assert hostwire.parse_default(body, 0, len(body)) == read


@given(st.binary(max_size=120), st.integers(0, 8))
def test_rubbish_is_read_without_an_exception(data: bytes, offset: int) -> None:
    for parse in (
        hostwire.parse_link,
        hostwire.parse_device,
        hostwire.parse_address,
        hostwire.parse_connected,
        hostwire.parse_default,
    ):
        parse(data, offset, len(data))
