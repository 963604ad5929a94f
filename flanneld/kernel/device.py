"""What the modules that make and mend devices share: pyroute2, and its errors as ours."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from socket import AF_INET
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from flanneld.errors import DeviceError

# linux/if.h: switched on by the administrator, with or without a carrier
IFF_UP = 1


@contextmanager
def opened_kernel(what: str) -> Iterator[Any]:
    """Open a socket to the kernel; what goes wrong with it is a DeviceError ``what: reason``."""
    try:
        with IPRoute() as kernel:
            yield kernel
    except NetlinkError as error:
        raise DeviceError(f"{what}: {os.strerror(error.code).lower()}") from error
    except OSError as error:
        raise DeviceError(f"{what}: {error}") from error


def find_link(kernel: Any, name: str) -> Any:
    """Return pyroute2's message about a device, None if there is none of that name."""
    try:
        return kernel.link("get", ifname=name)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise


def addresses_of(kernel: Any, index: int) -> list[tuple[IPv4Address, int]]:
    """Return a device's IPv4 addresses with their prefix lengths."""
    return [
        (IPv4Address(message.get("local") or message.get("address")), message["prefixlen"])
        for message in kernel.get_addr(index=index, family=AF_INET)
    ]


def add_address(kernel: Any, index: int, address: IPv4Address, length: int, **more: Any) -> None:
    """Give a device an address, if it has not got it."""
    try:
        kernel.addr("add", index=index, address=str(address), prefixlen=length, **more)
    except NetlinkError as error:
        if error.code != errno.EEXIST:  # a dump that was disturbed did not show it
            raise
