"""Devices, addresses and default routes of this network namespace.

The value types come from ``flanneld.interface``, which is pure and decides with them. Read by
packed messages and not through pyroute2, whose import alone would be a third of the daemon's start.
"""

import errno
from contextlib import closing

from flanneld.errors import InterfaceError
from flanneld.interface import DefaultRoute, HostFacts
from flanneld.kernel import hostwire
from flanneld.kernel.netlink import RequestSocket
from flanneld.kernel.wire import RTM_NEWROUTE


def read_host_facts() -> HostFacts:
    """Read devices, IPv4 addresses and the main table's IPv4 default routes.

    These are three dumps, not one moment: an address may belong to a device that is not listed.
    Raises InterfaceError if the kernel refuses.
    """
    try:
        with closing(RequestSocket()) as kernel:
            return HostFacts(
                tuple(
                    kernel.dump(hostwire.pack_link_dump, hostwire.RTM_NEWLINK, hostwire.parse_link)
                ),
                tuple(
                    kernel.dump(
                        hostwire.pack_address_dump, hostwire.RTM_NEWADDR, hostwire.parse_address
                    )
                ),
                _default_routes(kernel),
            )
    except OSError as error:
        raise InterfaceError(_refused(error)) from error


def _default_routes(kernel: RequestSocket) -> tuple[DefaultRoute, ...]:
    """Read the default routes without reading the routes to all peers behind them.

    The rest of the dump is left unread, which keeps the start short on a host with thousands of
    routes; so this must be the last request on the socket.
    """
    defaults = []
    messages = kernel.iterate(hostwire.pack_main_table_dump, RTM_NEWROUTE, hostwire.parse_default)
    for more, route in messages:
        if route is not None:
            defaults.append(route)
        if not more:
            break
    return tuple(defaults)


def _refused(error: OSError) -> str:
    text = f"cannot read this host's interfaces from the kernel: {error}"
    if error.errno == errno.EAFNOSUPPORT:
        text += " (the service must be allowed AF_NETLINK sockets)"
    return text
