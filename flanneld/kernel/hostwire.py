"""What rtnetlink says about this host's devices, addresses and default routes. Pure.

The bytes behind `flanneld.kernel.link`. Layouts and constants are those of linux/rtnetlink.h,
linux/if_link.h and linux/if_addr.h.
"""

import socket
import struct
from ipaddress import IPv4Address

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

_IFLA_MTU, _IFLA_LINKINFO, _IFLA_INFO_KIND, _IFLA_EXT_MASK = 4, 18, 1, 29
# Counters of every device, which nobody here reads, are most of a dump.
_RTEXT_FILTER_SKIP_STATS = 8
_IFA_ADDRESS, _IFA_LOCAL = 1, 2

_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_U32_ATTRIBUTE = struct.Struct("=HHI")
_U32 = struct.Struct("=I")


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
    if end - offset < _IFADDRMSG.size:
        return None
    family, length, _, scope, index = _IFADDRMSG.unpack_from(data, offset)
    own = other = None
    for attribute, start, size in split_attributes(data, offset + _IFADDRMSG.size, end):
        if attribute == _IFA_LOCAL and size == 4:
            own = data[start : start + 4]
        elif attribute == _IFA_ADDRESS and size == 4:
            # On a point-to-point device this is the other end.
            other = data[start : start + 4]
    packed = own or other
    if family != socket.AF_INET or packed is None:
        return None
    return Address(index, IPv4Address(packed), length, scope)


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
