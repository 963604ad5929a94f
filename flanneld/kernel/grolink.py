"""A virtual link whose far end joins TCP packets: what a program cannot have the kernel do else.

The kernel joins what belongs together (generic receive offload, GRO) where a driver polls for
packets, and a program that redirects a packet comes after that. Of virtual devices only veth offers
the same to whoever sends into it. Nobody but the fast path uses the pair: it has no addresses.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import Any

from flanneld.errors import DeviceError
from flanneld.kernel.device import Kernel, opened_kernel
from flanneld.kernel.hostwire import Device

# Of names: what is added to the device's to which the packets go in the end.
INLET, OUTLET = "-in", "-gro"

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

    def __init__(self, inlet: int, outlet: int) -> None:
        self.inlet = inlet
        """Index of the device into which packets are put."""
        self.outlet = outlet
        """Index of the device that receives them, joined."""

    @classmethod
    def make(cls, name: str) -> "GroLink":
        """Make the pair, with names that begin with ``name``; one that was left goes first.

        Raises DeviceError.
        """
        names = name + INLET, name + OUTLET
        with opened_kernel(f"cannot make {names[1]}") as kernel:
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
                return cls(*(_set_up(kernel, each) for each in names))
            except BaseException:
                _remove(kernel, name=names[0])
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
            device = kernel.device_at(self.inlet)
            if device is not None and device.kind == "veth":
                _remove(kernel, index=self.inlet)


def remove_left(tun: str) -> None:
    """Remove the pair of a TUN device. Raises DeviceError, also if it is something else."""
    with opened_kernel(f"cannot remove {tun + INLET}") as kernel:
        for end in (INLET, OUTLET):
            _remove_left(kernel, tun + end)


def remove_unused(tun: str) -> bool:
    """Remove the pair of a TUN device that is not there; it goes with its daemon, they do not.

    Returns whether there was one. Raises DeviceError.
    """
    with opened_kernel(f"cannot remove {tun + INLET}") as kernel:
        pair = kernel.device(tun + INLET)
        if pair is None or pair.kind != "veth" or kernel.device(tun) is not None:
            return False
        _remove(kernel, index=pair.index)
        return True


def _remove_left(kernel: Kernel, name: str) -> None:
    device = kernel.device(name)
    if device is None:
        return
    if device.kind != "veth":
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


def _remove(kernel: Kernel, **which: Any) -> None:
    with suppress(OSError):
        kernel.link("del", **which)


def _is_usable(device: Device) -> bool:
    return device.up and (device.kind, device.mtu) == ("veth", _MTU)


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
