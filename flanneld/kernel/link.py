"""Devices and addresses of this network namespace, through pyroute2.

The value types come from ``flanneld.interface``, which is pure and decides with them. Import this
module where it is used: pyroute2 costs about 0.13 s, whichever of its modules is asked for, since
its package imports them all.
"""

import asyncio
import errno
from contextlib import aclosing
from ipaddress import IPv4Address
from socket import AF_INET
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkError

from flanneld.errors import InterfaceError
from flanneld.interface import Address, DefaultRoute, HostFacts, Link

_IFF_UP = 1  # linux/if.h: switched on by the administrator, with or without a carrier
_MAIN_TABLE = 254  # linux/rtnetlink.h, RT_TABLE_MAIN


def read_host_facts() -> HostFacts:
    """Read devices, IPv4 addresses and the main table's IPv4 default routes.

    These are three dumps, not one moment: an address may belong to a device that is not listed.
    Raises InterfaceError if the kernel refuses.
    """
    try:
        return asyncio.run(_read())
    except (NetlinkError, NetlinkDecodeError, OSError) as error:
        raise InterfaceError(_refused(error)) from error


async def _read() -> HostFacts:
    # Only pyroute2's asynchronous interface hands out a dump piece by piece.
    async with AsyncIPRoute() as netlink:
        links = [_link(each) async for each in await netlink.link("dump")]
        addresses = [_address(each) async for each in await netlink.addr("dump", family=AF_INET)]
        defaults = await _default_routes(netlink)
    return HostFacts(tuple(links), tuple(addresses), tuple(defaults))


def _link(message: Any) -> Link:
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        mtu=message.get("mtu") or 0,
        up=bool(message["flags"] & _IFF_UP),
        kind=message.get(("linkinfo", "kind")),
    )


def _address(message: Any) -> Address:
    # On a point-to-point device IFA_ADDRESS is the other end.
    own = message.get("local") or message.get("address")
    return Address(message["index"], IPv4Address(own), message["prefixlen"], message["scope"])


async def _default_routes(netlink: AsyncIPRoute) -> list[DefaultRoute]:
    """Read the default routes without reading the routes to all peers behind them.

    A table is dumped in order of destination: past 0.0.0.0 comes no default route. The rest of the
    dump is left unread, which keeps the start short on a host with thousands of routes; so this
    must be the last request on ``netlink``. (pyroute2's own get_default_routes may stop before it
    has seen the main table, and returns other tables' routes as well.)
    """
    defaults = []
    async with aclosing(await netlink.route("dump", family=AF_INET)) as routes:
        async for route in routes:
            if route["table"] != _MAIN_TABLE:
                continue
            if route["dst_len"] == 0:
                metric = route.get("priority") or 0
                defaults.append(DefaultRoute(route.get("oif"), metric, route["type"]))
            elif not route.get("dst", "0.").startswith("0."):
                break
    return defaults


def _refused(error: Exception) -> str:
    text = f"cannot read this host's interfaces from the kernel: {error}"
    if getattr(error, "errno", None) == errno.EAFNOSUPPORT:
        text += " (the service must be allowed AF_NETLINK sockets)"
    return text
