"""Devices and their addresses: read by packed messages, changed through pyroute2.

pyroute2 is imported with the first change. On a host where everything is as it was left, which is
every restart, that saves 50 ms of the start; `prepare_changes` imports it when there is time.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from flanneld.errors import DeviceError
from flanneld.interface import Address
from flanneld.kernel import hostwire
from flanneld.kernel.hostwire import Device
from flanneld.kernel.netlink import RequestSocket

log = logging.getLogger(__name__)


class Kernel:
    """The devices of the present network namespace. Every method raises OSError."""

    def __init__(self) -> None:
        self._requests = RequestSocket()
        self._changes: Any = None

    def device(self, name: str) -> Device | None:
        """Return the device of that name, if there is one."""
        return self._one(hostwire.pack_device_request(1, name=name))

    def device_at(self, index: int) -> Device | None:
        """Return the device with that index, if there is one."""
        return self._one(hostwire.pack_device_request(1, index=index))

    def devices(self) -> list[Device]:
        """Return all devices."""
        return self._requests.dump(
            hostwire.pack_link_dump, hostwire.RTM_NEWLINK, hostwire.parse_device
        )

    def addresses(self) -> list[Address]:
        """Return all IPv4 addresses."""
        return self._requests.dump(
            hostwire.pack_address_dump, hostwire.RTM_NEWADDR, hostwire.parse_address
        )

    def addresses_of(self, index: int) -> list[tuple[IPv4Address, int]]:
        """Return a device's IPv4 addresses with their prefix lengths."""
        return [(each.ip, each.prefixlen) for each in self.addresses() if each.index == index]

    def networks_of(self, index: int) -> list[IPv4Network]:
        """Return the networks that a device's addresses put on-link."""
        found = self._requests.dump(
            hostwire.pack_address_dump, hostwire.RTM_NEWADDR, hostwire.parse_connected
        )
        return [network for at, network in found if at == index]

    def link(self, command: str, **attributes: Any) -> None:
        """Have pyroute2 add, set or delete (``del``) a device."""
        self._change("link", command, attributes)

    def add_address(self, index: int, address: IPv4Address, length: int, **more: Any) -> None:
        """Give a device an address, if it has not got it."""
        with suppress(FileExistsError):  # a dump that was disturbed did not show it
            self._change("addr", "add", _address(index, address, length) | more)

    def remove_address(self, index: int, address: IPv4Address, length: int) -> None:
        """Take an address away from a device."""
        self._change("addr", "del", _address(index, address, length))

    def close(self) -> None:
        """Close the sockets."""
        self._requests.close()
        if self._changes is not None:
            self._changes.close()

    def _one(self, request: bytes) -> Device | None:
        try:
            return self._requests.get(request, hostwire.RTM_NEWLINK, hostwire.parse_device)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    def _change(self, what: str, command: str, attributes: dict[str, Any]) -> None:
        from flanneld.kernel.iproute import IPRoute, NetlinkError

        if self._changes is None:
            self._changes = IPRoute()
        try:
            getattr(self._changes, what)(command, **attributes)
        except NetlinkError as error:
            # The class by errno, such as FileExistsError.
            raise OSError(error.code, os.strerror(error.code)) from error


def prepare_changes() -> None:
    """Import what a change takes.

    Not first when something is wrong: it takes a tenth of a second and 6.5 MB, and the package's
    files may have been replaced by then. If they are being replaced now, that is only said.
    """
    try:
        import flanneld.kernel.iproute  # noqa: F401 - see above
    except Exception as error:  # noqa: BLE001 - half a file may raise any; nothing is changed now
        log.warning("cannot import pyroute2, by which the device would be mended: %r", error)


@contextmanager
def opened_kernel(what: str) -> Iterator[Kernel]:
    """Open the kernel; what goes wrong with it is a DeviceError ``what: reason``."""
    try:
        kernel = Kernel()
        try:
            yield kernel
        finally:
            kernel.close()
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else error
        raise DeviceError(f"{what}: {reason}") from error


def _address(index: int, address: IPv4Address, length: int) -> dict[str, Any]:
    return {"index": index, "address": str(address), "prefixlen": length}
