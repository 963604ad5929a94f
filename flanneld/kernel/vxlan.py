"""The vxlan device: made, compared, mended; through pyroute2."""

import errno
import logging
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from socket import AF_INET
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from flanneld.errors import DeviceError
from flanneld.kernel.device import IFF_UP, add_address, addresses_of, find_link, opened_kernel
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
        self._settled = False
        self._addressed = 0
        self._refused_mtu = 0

    def ensure(self) -> None:
        """Make the device, or mend what differs; it is up afterwards, and the indexes known."""
        spec = self.spec
        with opened_kernel(f"cannot set up {spec.name}") as kernel:
            underlay = find_link(kernel, spec.underlay)
            if underlay is None:
                raise DeviceError(f"cannot set up {spec.name}: there is no {spec.underlay}")
            self.underlay_index = int(underlay["index"])
            link = find_link(kernel, spec.name)
            if link is None:
                link = self._make(kernel)
                if self._settled:
                    log.warning("%s was gone: it is made anew", spec.name)
            elif not self._fits(link):
                kernel.link("del", index=link["index"])
                link = self._make(kernel)
            elif self._settled and not link["flags"] & IFF_UP:
                log.warning("%s was set down: it is set up again", spec.name)
            self._mend(kernel, link)
            self.index = int(link["index"])
            self._settled = True

    def ensure_address(self, address: IPv4Address, networks: tuple[IPv4Network, ...]) -> None:
        """Give the device ``address``/32 and take its other addresses inside ``networks`` away."""
        with opened_kernel(f"cannot set the address of {self.spec.name}") as kernel:
            found = addresses_of(kernel, self.index)
            # First of all: with its last address a device loses all its routes.
            if (address, 32) not in found:
                if self._addressed == self.index:
                    log.warning(
                        "%s has lost its address %s/32: it is put back", self.spec.name, address
                    )
                add_address(kernel, self.index, address, 32)
            self._addressed = self.index
            for other, length in found:
                if (other, length) == (address, 32):
                    continue
                if any(contains(network, IPv4Network(other)) for network in networks):
                    kernel.addr("del", index=self.index, address=str(other), prefixlen=length)
                    log.info("Removed IP address %s/%d from %s", other, length, self.spec.name)

    def _fits(self, link: Any) -> bool:
        """Tell whether the existing device can be kept; if not, say why."""
        spec = self.spec
        kind = link.get(("linkinfo", "kind"))
        if kind != "vxlan":
            raise DeviceError(
                f"{spec.name} exists and is no vxlan device (but {kind or 'another kind'}), so it"
                " is not flannel's: rename or delete it, or choose another VNI"
            )
        reason = _incompatible(link.get(("linkinfo", "data")), spec, self.underlay_index)
        if reason is None:
            if not self._settled:
                self.mac = link.get("address")
            return True
        log.warning(
            '"%s" already exists with incompatible configuration: %s; recreating device',
            spec.name,
            reason,
        )
        return False

    def _make(self, kernel: Any) -> Any:
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
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
            raise DeviceError(_who_uses(kernel, spec)) from error
        _set_sysctl(f"net/ipv6/conf/{spec.name}/accept_ra", "0")
        link = find_link(kernel, spec.name)
        if link is None:
            raise DeviceError(f"{spec.name} vanished as soon as it was made")
        return link

    def _mend(self, kernel: Any, link: Any) -> None:
        spec, index = self.spec, link["index"]
        if link.get("address") != self.mac:
            log.warning(
                "%s has got another MAC, %s: ours, %s, is put back",
                *(spec.name, link.get("address"), self.mac),
            )
            kernel.link("set", index=index, address=self.mac)
        if link.get("mtu") != spec.mtu:
            self._set_mtu(kernel, index, link.get("mtu"))
        if not link["flags"] & IFF_UP:
            try:
                kernel.link("set", index=index, state="up")
            except NetlinkError as error:
                if error.code != errno.EADDRINUSE:
                    raise
                raise DeviceError(
                    f"cannot set up {spec.name}: UDP port {spec.port} is in use by another program"
                    " or a vxlan device of another kind (GBP): free it, or set another Port in the"
                    " network config"
                ) from error

    def _set_mtu(self, kernel: Any, index: int, present: int) -> None:
        """Set the MTU; where the external interface's has shrunk meanwhile, keep the present."""
        spec = self.spec
        try:
            kernel.link("set", index=index, mtu=spec.mtu)
        except NetlinkError as error:
            if error.code != errno.EINVAL:
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
        for message in kernel.get_addr(family=AF_INET):
            if (message.get("local"), message["prefixlen"]) != (str(address), 32):
                continue
            links = kernel.get_links(message["index"])
            name = str(links[0].get("ifname")) if links else ""
            vxlan = bool(links) and links[0].get(("linkinfo", "kind")) == "vxlan"
            if vxlan and name.startswith("flannel.") and name != keep:
                kernel.link("del", index=message["index"])
                log.info("Removed %s, the device of a former run", name)


def connected_networks(name: str) -> tuple[IPv4Network, ...]:
    """Return the networks to which the addresses of a device belong. Raises DeviceError."""
    with opened_kernel(f"cannot read the addresses of {name}") as kernel:
        link = find_link(kernel, name)
        if link is None:
            raise DeviceError(f"there is no {name}")
        return tuple(
            IPv4Network((message.get("address"), message["prefixlen"]), strict=False)
            for message in kernel.get_addr(index=link["index"], family=AF_INET)
        )


def _incompatible(data: Any, spec: VxlanSpec, underlay: int) -> str | None:
    """Name the first attribute in which the device differs, in the original's words and order."""
    group = data.get("vxlan_group") or data.get("vxlan_group6")
    for name, present, wanted in (
        ("vni", data.get("vxlan_id"), spec.vni),
        ("vtep (external) interface", data.get("vxlan_link") or 0, underlay),
        ("vtep (external) IP", data.get("vxlan_local"), str(spec.local)),
        ("group address", group, None),
        ("learning", bool(data.get("vxlan_learning")), spec.learning),
        ("port", data.get("vxlan_port"), spec.port),
        ("gbp", bool(data.get("vxlan_gbp")), spec.gbp),
    ):
        if present != wanted:
            return f"{name}: {present} vs {wanted}"
    return None


def _who_uses(kernel: Any, spec: VxlanSpec) -> str:
    for link in kernel.get_links():
        data = link.get(("linkinfo", "data"))
        if link.get(("linkinfo", "kind")) != "vxlan" or data is None:
            continue
        if (data.get("vxlan_id"), data.get("vxlan_port")) == (spec.vni, spec.port):
            return (
                f"cannot make {spec.name}: {link.get('ifname')} already uses VNI {spec.vni} on"
                f" port {spec.port}: delete it, or set another VNI or Port in the network config"
            )
    return f"cannot make {spec.name}: something with that name or VNI {spec.vni} exists"


def _set_sysctl(path: str, value: str) -> None:
    """Set what is good to have; a read-only /proc/sys must not stop us."""
    try:
        with open(f"/proc/sys/{path}", "w", encoding="ascii") as file:
            file.write(value)
    except OSError as error:
        log.info("Could not set %s=%s: %s", path.replace("/", "."), value, error.strerror)
