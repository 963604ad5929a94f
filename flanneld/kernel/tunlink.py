"""The udp backend's TUN device as a link: its address, MTU and state."""

import logging
from ipaddress import IPv4Address, IPv4Network

from flanneld.errors import DeviceError
from flanneld.kernel.device import opened_kernel

log = logging.getLogger(__name__)

# linux/if_addr.h, IFA_F_NOPREFIXROUTE: the route to the network is ours to keep, not a by-product
# of the address.
_NO_PREFIX_ROUTE = 0x200


class TunLink:
    """Keeps a TUN device configured; `ensure` may be repeated."""

    def __init__(self, address: IPv4Address, network: IPv4Network, mtu: int) -> None:
        """The device has ``address`` with the prefix length of ``network``, as the original's."""
        self._address = (address, network.prefixlen)
        self._mtu = mtu
        self._settled = 0

    def is_there(self, index: int, name: str) -> bool:
        """Tell whether the device is still in this network namespace, and still has its name.

        Raises DeviceError.
        """
        with opened_kernel(f"cannot look for {name}") as kernel:
            device = kernel.device_at(index)
            return device is not None and (device.name, device.kind) == (name, "tun")

    def ensure(self, index: int, name: str) -> None:
        """Give the device its address and MTU and set it up; log what had been changed.

        Raises DeviceError, with what stands in the way.
        """
        address, length = self._address
        with opened_kernel(f"cannot set up {name}") as kernel:
            device = kernel.device_at(index)
            if device is None:
                raise DeviceError(f"cannot set up {name}: it is not there")
            again = self._settled == index
            if device.mtu != self._mtu:
                if again:
                    log.warning("MTU of %s: %d, set to %d", name, device.mtu, self._mtu)
                kernel.link("set", index=index, mtu=self._mtu)
            if self._address not in kernel.addresses_of(index):
                if again:
                    log.warning("%s has lost its address %s: it is put back", name, address)
                kernel.add_address(index, address, length, flags=_NO_PREFIX_ROUTE)
            if not device.up:
                if again:
                    log.warning("%s was set down: it is set up again", name)
                kernel.link("set", index=index, state="up")
        self._settled = index
