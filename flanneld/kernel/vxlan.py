"""The vxlan device: made, compared, mended."""

import errno
import logging
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from flanneld.errors import DeviceError
from flanneld.kernel.device import Kernel, opened_kernel
from flanneld.kernel.hostwire import Device, Vxlan
from flanneld.kernel.state import contains

log = logging.getLogger(__name__)

# vxlan's own default would be the IANA's 4789; flannel's is Linux's first one.
DEFAULT_PORT = 8472

# What vxlan puts before an Ethernet frame over IPv4: 14 + 20 + 8 + 8 bytes.
OVERHEAD = 50


@dataclass(frozen=True, slots=True)
class VxlanSpec:
    """A vxlan device as it should be."""

    name: str
    vni: int
    underlay: str
    """Name of the external interface."""
    local: IPv4Address
    port: int
    gbp: bool
    learning: bool
    mtu: int
    mac: str
    """For a device that has to be made; one that is there keeps its own."""


class VxlanDevice:
    """Keeps one vxlan device as specified; every method may be repeated.

    All raise DeviceError, with what stands in the way.
    """

    def __init__(self, spec: VxlanSpec) -> None:
        self.spec = spec
        self.mac = spec.mac
        """The device's MAC; it is ours to keep from the first `ensure` on."""
        self.index = 0
        self.underlay_index = 0
        self.has_underlay = False
        """The external interface was there at the last `ensure`."""
        self._settled = False
        self._addressed = 0
        self._refused_mtu = 0

    def ensure(self) -> None:
        """Make the device, or mend what differs; it is up afterwards, and the indexes known."""
        spec = self.spec
        with opened_kernel(f"cannot set up {spec.name}") as kernel:
            underlay = kernel.device(spec.underlay)
            self.has_underlay = underlay is not None
            if underlay is None:
                raise DeviceError(f"cannot set up {spec.name}: there is no {spec.underlay}")
            self.underlay_index = underlay.index
            device = kernel.device(spec.name)
            if device is None:
                device = self._make(kernel)
                if self._settled:
                    log.warning("%s was gone: it is made anew", spec.name)
            elif not self._fits(kernel, device):
                kernel.link("del", index=device.index)
                device = self._make(kernel)
            elif self._settled and not device.up:
                log.warning("%s was set down: it is set up again", spec.name)
            self._mend(kernel, device)
            self.index = device.index
            self._settled = True

    def ensure_address(self, address: IPv4Address, networks: tuple[IPv4Network, ...]) -> None:
        """Give the device ``address``/32 and take its other addresses inside ``networks`` away."""
        with opened_kernel(f"cannot set the address of {self.spec.name}") as kernel:
            found = kernel.addresses_of(self.index)
            # First of all: with its last address a device loses all its routes.
            if (address, 32) not in found:
                if self._addressed == self.index:
                    log.warning(
                        "%s has lost its address %s/32: it is put back", self.spec.name, address
                    )
                kernel.add_address(self.index, address, 32)
            self._addressed = self.index
            for other, length in found:
                if (other, length) == (address, 32):
                    continue
                if any(contains(network, IPv4Network(other)) for network in networks):
                    kernel.remove_address(self.index, other, length)
                    log.info("Removed IP address %s/%d from %s", other, length, self.spec.name)

    def _fits(self, kernel: Kernel, device: Device) -> bool:
        """Tell whether the existing device can be kept; if not, say why.

        Raises DeviceError where no other could be made in its place: it may still be of use.
        """
        spec = self.spec
        if device.vxlan is None:
            raise DeviceError(
                f"{spec.name} exists and is no vxlan device (but {device.kind or 'another kind'}),"
                " so it is not flannel's: rename or delete it, or choose another VNI"
            )
        reason = _incompatible(device.vxlan, spec, self.underlay_index)
        if reason is None:
            if not self._settled:
                self.mac = device.mac
            return True
        users = _users(kernel, spec.port)
        if users.get(spec.vni, spec.name) != spec.name:
            raise DeviceError(_used_by(users[spec.vni], spec))
        # vxlan devices share their port, with no one else.
        if not users and _is_taken(spec.port):
            raise DeviceError(_port_in_use(spec))
        log.warning(
            '"%s" already exists with incompatible configuration: %s; recreating device',
            spec.name,
            reason,
        )
        return False

    def _make(self, kernel: Kernel) -> Device:
        spec = self.spec
        gbp = {"vxlan_gbp": True} if spec.gbp else {}
        try:
            kernel.link(
                "add",
                ifname=spec.name,
                kind="vxlan",
                # Set at creation, so that no systemd policy replaces it.
                address=self.mac,
                mtu=spec.mtu,
                vxlan_id=spec.vni,
                vxlan_link=self.underlay_index,
                vxlan_local=str(spec.local),
                vxlan_port=spec.port,
                vxlan_learning=int(spec.learning),
                **gbp,
            )
        except FileExistsError as error:
            user = _users(kernel, spec.port).get(spec.vni)
            if user is not None:
                raise DeviceError(_used_by(user, spec)) from error
            raise DeviceError(
                f"cannot make {spec.name}: something with that name or VNI {spec.vni} exists"
            ) from error
        _set_sysctl(f"net/ipv6/conf/{spec.name}/accept_ra", "0")
        device = kernel.device(spec.name)
        if device is None:
            raise DeviceError(f"{spec.name} vanished as soon as it was made")
        return device

    def _mend(self, kernel: Kernel, device: Device) -> None:
        spec, index = self.spec, device.index
        if device.mac != self.mac:
            log.warning(
                "%s has got another MAC, %s: ours, %s, is put back",
                *(spec.name, device.mac, self.mac),
            )
            kernel.link("set", index=index, address=self.mac)
        if device.mtu != spec.mtu:
            self._set_mtu(kernel, index, device.mtu)
        if not device.up:
            try:
                kernel.link("set", index=index, state="up")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise DeviceError(_port_in_use(spec)) from error

    def _set_mtu(self, kernel: Kernel, index: int, present: int) -> None:
        """Set the MTU; where the external interface's has shrunk meanwhile, keep the present."""
        spec = self.spec
        try:
            kernel.link("set", index=index, mtu=spec.mtu)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if self._refused_mtu != present:
                self._refused_mtu = present
                log.error(
                    "MTU of %s: %d instead of %d, as the MTU of %s is too small by now",
                    *(spec.name, present, spec.mtu, spec.underlay),
                )
            return
        self._refused_mtu = 0
        log.info("MTU of %s: %d, set to %d", spec.name, present, spec.mtu)


def remove_former(address: IPv4Address, keep: str) -> None:
    """Remove the vxlan device of this host's former run, if it had another VNI or backend.

    It is recognised by flannel's name and by the former subnet's ``address``.
    """
    with opened_kernel("cannot look for former vxlan devices") as kernel:
        for found in kernel.addresses():
            if (found.ip, found.prefixlen) != (address, 32):
                continue
            device = kernel.device_at(found.index)
            if device is None or device.vxlan is None or device.name == keep:
                continue
            if device.name.startswith("flannel."):
                kernel.link("del", index=device.index)
                log.info("Removed %s, the device of a former run", device.name)


def remove_device(name: str) -> None:
    """Remove a device with everything on it. Raises DeviceError."""
    with opened_kernel(f"cannot remove {name}") as kernel:
        device = kernel.device(name)
        if device is not None:
            kernel.link("del", index=device.index)


def connected_networks(name: str) -> tuple[IPv4Network, ...]:
    """Return the networks to which the addresses of a device belong. Raises DeviceError."""
    with opened_kernel(f"cannot read the addresses of {name}") as kernel:
        device = kernel.device(name)
        if device is None:
            raise DeviceError(f"there is no {name}")
        return tuple(kernel.networks_of(device.index))


def _incompatible(found: Vxlan, spec: VxlanSpec, underlay: int) -> str | None:
    """Name the first attribute in which the device differs, in the original's words and order."""
    for name, present, wanted in (
        ("vni", found.vni, spec.vni),
        ("vtep (external) interface", found.underlay, underlay),
        ("vtep (external) IP", found.local, spec.local),
        ("group address", found.group, None),
        ("learning", found.learning, spec.learning),
        ("port", found.port, spec.port),
        ("gbp", found.gbp, spec.gbp),
    ):
        if present != wanted:
            return f"{name}: {present} vs {wanted}"
    return None


def _users(kernel: Kernel, port: int) -> dict[int, str]:
    """Return the names of the vxlan devices that use a UDP port, by VNI."""
    return {
        device.vxlan.vni: device.name
        for device in kernel.devices()
        if device.vxlan is not None and device.vxlan.port == port
    }


def _used_by(user: str, spec: VxlanSpec) -> str:
    return (
        f"cannot make {spec.name}: {user} already uses VNI {spec.vni} on"
        f" port {spec.port}: delete it, or set another VNI or Port in the network config"
    )


def _port_in_use(spec: VxlanSpec) -> str:
    return (
        f"cannot set up {spec.name}: UDP port {spec.port} is in use by another program"
        " or a vxlan device of another kind (GBP): free it, or set another Port in the"
        " network config"
    )


def _is_taken(port: int) -> bool:
    """Tell whether somebody has the UDP port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _set_sysctl(path: str, value: str) -> None:
    """Set what is good to have; a read-only /proc/sys must not stop us."""
    try:
        with open(f"/proc/sys/{path}", "w", encoding="ascii") as file:
            file.write(value)
    except OSError as error:
        log.info("Could not set %s=%s: %s", path.replace("/", "."), value, error.strerror)
