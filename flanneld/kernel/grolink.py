"""A virtual link whose far end joins TCP packets: what a program cannot have the kernel do else.

The kernel joins what belongs together (generic receive offload, GRO) where a driver polls for
packets, and a program that redirects a packet comes after that. Of virtual devices only veth offers
the same to whoever sends into it. Nobody but the fast path uses the pair: it has no addresses.
"""

import ctypes
import errno
import fcntl
import os
import re
import socket
import struct
from contextlib import suppress

from flanneld.errors import DeviceError
from flanneld.kernel.device import Kernel, opened_kernel
from flanneld.kernel.hostwire import Device

# Of names: what is added to the device's to which the packets go in the end.
INLET, OUTLET = "-in", "-gro"
NAMES = re.compile(rf"(flannel\d+)({INLET}|{OUTLET})")
"""Of both ends; the first group is the TUN device's."""

# linux/sockios.h, linux/ethtool.h
_SIOCETHTOOL = 0x8946
_ETHTOOL_GTSO, _ETHTOOL_STSO, _ETHTOOL_GGRO, _ETHTOOL_SGRO = 0x1E, 0x1F, 0x2B, 0x2C
_IFREQ = struct.Struct("=16sQ16x")
# The largest there is: nothing that has come this far is too long.
_MTU = 65535
# Each has its own poll; more than there are processors are of no use, and many cost memory.
_MOST_QUEUES = 16
# linux/if_link.h: IN6_ADDR_GEN_MODE_NONE, no IPv6 address and so no solicitations.
_NO_IPV6 = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})]}


class GroLink:
    """The pair, from `make` to `close`. A killed daemon leaves it behind, unused."""

    def __init__(self, name: str, inlet: int, outlet: int) -> None:
        self._name = name
        self.inlet = inlet
        """Index of the device into which packets are put."""
        self.outlet = outlet
        """Index of the device that receives them, joined."""

    @classmethod
    def make(cls, name: str) -> "GroLink":
        """Make the pair of a TUN device; one that was left with its names goes first.

        Raises DeviceError.
        """
        names = name + INLET, name + OUTLET
        with opened_kernel(f"cannot set up {names[0]} and {names[1]}") as kernel:
            for each in names:
                _remove_left(kernel, each)
            queues = min(os.cpu_count() or 1, _MOST_QUEUES)
            end = {"mtu": _MTU, "num_tx_queues": queues, "num_rx_queues": queues}
            peer = {"ifname": names[1], **end}
            kernel.link("add", ifname=names[0], kind="veth", peer=peer, **end)
            try:
                # A pair in which the sender cuts gives its packets to the receiver one by one.
                _set_offload(names[0], _ETHTOOL_STSO, on=False)
                _set_offload(names[1], _ETHTOOL_SGRO, on=True)
                return cls(name, *(_set_up(kernel, each) for each in names))
            except BaseException:
                _remove_left(kernel, names[0])
                raise

    def is_in_order(self) -> bool:
        """Tell whether both ends are there, up, and as they were made. Raises DeviceError."""
        with opened_kernel("cannot look for the devices that join packets") as kernel:
            ends = [kernel.device_at(index) for index in (self.inlet, self.outlet)]
            names = [each.name for each in ends if each is not None and _is_usable(each)]
            return len(names) == len(ends) and (
                not _offload(names[0], _ETHTOOL_GTSO) and _offload(names[1], _ETHTOOL_GGRO)
            )

    def close(self) -> None:
        """Remove the pair. Safe to repeat; what fails is left."""
        with suppress(DeviceError), opened_kernel("") as kernel:
            ends = [kernel.device_at(index) for index in (self.inlet, self.outlet)]
            inlet = ends[0]
            # One that is alone, and has another name, is somebody else's with the same index.
            if all(map(_is_veth, ends)) or (inlet is not None and inlet.name == self._name + INLET):
                _remove(kernel, index=self.inlet)


def remove_left(tun: str) -> None:
    """Remove the pair of a TUN device. Raises DeviceError, also if it is something else."""
    with opened_kernel(f"cannot remove {tun + INLET}") as kernel:
        for end in (INLET, OUTLET):
            _remove_left(kernel, tun + end)


def remove_unused() -> list[str]:
    """Remove the pairs of TUN devices that are gone, as these do with their daemon.

    Returns their names. Raises DeviceError.
    """
    with opened_kernel("cannot look for devices of a former run") as kernel:
        devices = {device.name: device for device in kernel.devices()}
        found = [
            name
            for name, device in devices.items()
            if _is_veth(device) and (ours := NAMES.fullmatch(name)) and ours[1] not in devices
        ]
        for name in found:
            _remove_left(kernel, name)
        return found


def _remove_left(kernel: Kernel, name: str) -> None:
    device = kernel.device(name)
    if device is None:
        return
    if not _is_veth(device):
        raise DeviceError(
            f"{name} exists and is no veth device (but {device.kind or 'another kind'}),"
            " so it is not flannel's: rename or delete it"
        )
    _remove(kernel, index=device.index)


def _set_up(kernel: Kernel, name: str) -> int:
    device = kernel.device(name)
    if device is None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    with suppress(OSError):  # no IPv6 in this kernel
        kernel.link("set", index=device.index, IFLA_AF_SPEC=_NO_IPV6)
    kernel.link("set", index=device.index, arp=False, state="up")
    return device.index


def _remove(kernel: Kernel, index: int) -> None:
    with suppress(OSError):
        kernel.link("del", index=index)


def _is_veth(device: Device | None) -> bool:
    return device is not None and device.kind == "veth"


def _is_usable(device: Device) -> bool:
    return _is_veth(device) and device.up and device.mtu == _MTU


def _set_offload(name: str, command: int, *, on: bool) -> None:
    """Set one of a device's features."""
    _ethtool(name, command, on)


def _offload(name: str, command: int) -> bool:
    """Tell whether a device has one of its features switched on."""
    return bool(_ethtool(name, command, 0))


def _ethtool(name: str, command: int, value: int) -> int:
    """Make the ioctl for what is one number; returns what that is afterwards."""
    what = (ctypes.c_uint32 * 2)(command, value)
    request = _IFREQ.pack(name.encode(), ctypes.addressof(what))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
    return int(what[1])
