"""What rtnetlink says about this host's devices, addresses and default routes. Pure.

The bytes behind `flanneld.kernel.link` and `flanneld.kernel.device`. Layouts and constants are
those of linux/rtnetlink.h, linux/if_link.h and linux/if_addr.h.
"""

import socket
import struct
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from flanneld.interface import Address, DefaultRoute, Link
from flanneld.kernel.wire import (
    HEADER,
    IFF_UP,
    IFLA_IFNAME,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    RT_TABLE_MAIN,
    RTA_OIF,
    RTA_PRIORITY,
    RTA_TABLE,
    RTM_GETROUTE,
    split_attributes,
)

RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR = 16, 18, 20, 22

_IFLA_ADDRESS, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_EXT_MASK = 1, 4, 18, 29
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_VXLAN_ID, _VXLAN_GROUP, _VXLAN_LINK, _VXLAN_LOCAL = 1, 2, 3, 4
_VXLAN_LEARNING, _VXLAN_PORT, _VXLAN_GROUP6, _VXLAN_GBP = 7, 15, 16, 23
# Counters of every device, which nobody here reads, are most of a dump.
_RTEXT_FILTER_SKIP_STATS = 8
_IFA_ADDRESS, _IFA_LOCAL = 1, 2

_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_U32_ATTRIBUTE = struct.Struct("=HHI")
_U32 = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class Vxlan:
    """What makes a vxlan device one."""

    vni: int
    underlay: int
    """Index of the device below, 0 for none."""
    local: IPv4Address | None
    port: int
    learning: bool
    gbp: bool
    group: IPv4Address | IPv6Address | None
    """The remote address of its own, for what no FDB entry leads anywhere."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device with all that is compared of it. ``vxlan`` is None for any other kind."""

    index: int
    name: str
    mtu: int
    up: bool
    mac: str
    kind: str
    vxlan: Vxlan | None


def pack_device_request(seq: int, *, name: str = "", index: int = 0) -> bytes:
    """Return the request for one device, by its name or its index."""
    body = _IFINFOMSG.pack(0, 0, index, 0, 0)
    if name:
        # The kernel refuses a longer name; none of that is there.
        text = name.encode()[:15] + b"\0"
        body += _ATTRIBUTE.pack(4 + len(text), IFLA_IFNAME) + text + bytes(-len(text) % 4)
    body += _U32_ATTRIBUTE.pack(8, _IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
    return HEADER.pack(HEADER.size + len(body), RTM_GETLINK, NLM_F_REQUEST, seq, 0) + body


def parse_device(data: bytes, offset: int, end: int) -> Device | None:
    """Read the body of a link message with all that is compared of a device."""
    link = parse_link(data, offset, end)
    if link is None:
        return None
    mac, vxlan = "", None
    for attribute, start, size in split_attributes(data, offset + _IFINFOMSG.size, end):
        if attribute == _IFLA_ADDRESS and size == 6:
            mac = data[start : start + 6].hex(":")
        elif attribute == _IFLA_LINKINFO and link.kind == "vxlan":
            for inner, at, length in split_attributes(data, start, start + size):
                if inner == _IFLA_INFO_DATA:
                    vxlan = _parse_vxlan(data, at, at + length)
    return Device(link.index, link.name, link.mtu, link.up, mac, link.kind or "", vxlan)


def _parse_vxlan(data: bytes, offset: int, end: int) -> Vxlan:
    found = {
        attribute: data[start : start + size]
        for attribute, start, size in split_attributes(data, offset, end)
    }
    local, group = found.get(_VXLAN_LOCAL, b""), found.get(_VXLAN_GROUP, b"")
    group6 = found.get(_VXLAN_GROUP6, b"")
    remote = IPv6Address(group6) if len(group6) == 16 and any(group6) else None
    return Vxlan(
        vni=int.from_bytes(found.get(_VXLAN_ID, b""), sys.byteorder),
        underlay=int.from_bytes(found.get(_VXLAN_LINK, b""), sys.byteorder),
        local=IPv4Address(local) if len(local) == 4 else None,
        port=int.from_bytes(found.get(_VXLAN_PORT, b""), "big"),
        learning=any(found.get(_VXLAN_LEARNING, b"")),
        gbp=_VXLAN_GBP in found,
        group=IPv4Address(group) if len(group) == 4 and any(group) else remote,
    )


def pack_link_dump(seq: int) -> bytes:
    """Return the request for all devices."""
    body = _IFINFOMSG.pack(0, 0, 0, 0, 0)
    body += _U32_ATTRIBUTE.pack(8, _IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
    return _pack_dump(RTM_GETLINK, seq, body)


def pack_address_dump(seq: int) -> bytes:
    """Return the request for all IPv4 addresses."""
    return _pack_dump(RTM_GETADDR, seq, _IFADDRMSG.pack(socket.AF_INET, 0, 0, 0, 0))


def pack_main_table_dump(seq: int) -> bytes:
    """Return the request for the IPv4 routes of the main table, of whatever type."""
    body = _RTMSG.pack(socket.AF_INET, 0, 0, 0, RT_TABLE_MAIN, 0, 0, 0, 0)
    body += _U32_ATTRIBUTE.pack(8, RTA_TABLE, RT_TABLE_MAIN)
    return _pack_dump(RTM_GETROUTE, seq, body)


def parse_link(data: bytes, offset: int, end: int) -> Link | None:
    """Read the body of a link message; None if it has no name."""
    if end - offset < _IFINFOMSG.size:
        return None
    family, _, index, flags, _ = _IFINFOMSG.unpack_from(data, offset)
    name, mtu, kind = "", 0, None
    for attribute, start, size in split_attributes(data, offset + _IFINFOMSG.size, end):
        if attribute == IFLA_IFNAME:
            name = _text(data, start, size)
        elif attribute == _IFLA_MTU and size == 4:
            mtu = _U32.unpack_from(data, start)[0]
        elif attribute == _IFLA_LINKINFO:
            for inner, at, length in split_attributes(data, start, start + size):
                if inner == _IFLA_INFO_KIND:
                    kind = _text(data, at, length)
    if family != socket.AF_UNSPEC or not name:
        return None
    return Link(index, name, mtu, bool(flags & IFF_UP), kind)


def parse_address(data: bytes, offset: int, end: int) -> Address | None:
    """Read the body of an address message; None if it is not IPv4."""
    found = _parse_address(data, offset, end)
    if found is None:
        return None
    index, length, scope, own, other = found
    return Address(index, IPv4Address(own or other), length, scope)


def parse_connected(data: bytes, offset: int, end: int) -> tuple[int, IPv4Network] | None:
    """Read from an address message the device and the network that is on-link there."""
    found = _parse_address(data, offset, end)
    if found is None or found[1] > 32:
        return None
    index, length, _, own, other = found
    return index, IPv4Network((other or own, length), strict=False)


def _parse_address(data: bytes, offset: int, end: int) -> tuple[int, int, int, bytes, bytes] | None:
    """Return (index, prefix length, scope, the host's own end, the other end)."""
    if end - offset < _IFADDRMSG.size:
        return None
    family, length, _, scope, index = _IFADDRMSG.unpack_from(data, offset)
    own = other = b""
    for attribute, start, size in split_attributes(data, offset + _IFADDRMSG.size, end):
        if attribute == _IFA_LOCAL and size == 4:
            own = data[start : start + 4]
        elif attribute == _IFA_ADDRESS and size == 4:
            # The same as the other, but on a point-to-point device.
            other = data[start : start + 4]
    if family != socket.AF_INET or not (own or other):
        return None
    return index, length, scope, own, other


def parse_default(data: bytes, offset: int, end: int) -> tuple[bool, DefaultRoute | None]:
    """Read the body of a message about a route of the main table.

    Returns whether default routes can still follow, as a table is dumped in order of destination,
    and the route if it is one.
    """
    if end - offset < _RTMSG.size:
        return True, None
    family, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(data, offset)
    oif, metric, first = None, 0, 0
    for attribute, start, size in split_attributes(data, offset + _RTMSG.size, end):
        if attribute == RTA_TABLE and size == 4:
            table = _U32.unpack_from(data, start)[0]
        elif attribute == RTA_OIF and size == 4:
            oif = _U32.unpack_from(data, start)[0]
        elif attribute == RTA_PRIORITY and size == 4:
            metric = _U32.unpack_from(data, start)[0]
        elif attribute == 1 and size == 4:  # RTA_DST
            first = data[start]
    if family != socket.AF_INET or table != RT_TABLE_MAIN:
        return True, None
    if length:
        return first == 0, None
    return True, DefaultRoute(oif, metric, kind)


def _text(data: bytes, start: int, size: int) -> str:
    return data[start : start + size].rstrip(b"\0").decode(errors="replace")


def _pack_dump(kind: int, seq: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, seq, 0) + body
