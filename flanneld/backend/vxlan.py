"""vxlan: the kernel wraps packets to a peer into UDP; the daemon is never in a packet's way.

Each peer is three entries on the device ``flannel.<VNI>``, as in flannel v0.9 and later: a route
to its subnet through the subnet's own address, a permanent neighbour that gives this address the
MAC of the peer's device (its VTEP), and an FDB entry that gives the MAC the peer's public IP.
"""

import hashlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from flanneld import lock
from flanneld.backend.mtu import inner_mtu, mtu_key
from flanneld.backend.peers import PeerNetwork
from flanneld.errors import DeviceError, Stopped
from flanneld.interface import ExternalInterface
from flanneld.kernel.device import prepare_changes
from flanneld.kernel.netlink import AddressEvent, KernelEvent, LinkEvent
from flanneld.kernel.state import Entry, FdbEntry, Neighbour, Route, Territory
from flanneld.kernel.vxlan import (
    DEFAULT_PORT,
    OVERHEAD,
    VxlanDevice,
    VxlanSpec,
    connected_networks,
)
from flanneld.subnet import gojson
from flanneld.subnet.config import Config, bool_key, int_key
from flanneld.subnet.env import Previous
from flanneld.subnet.lease import BadLease, Lease, LeaseAttrs
from flanneld.subnet.manager import SubnetManager

log = logging.getLogger(__name__)

TYPE = "vxlan"

# A device's name has at most 15 characters, and "flannel." takes 8 of them.
MAX_VNI = 9_999_999

# Seconds for a former run to let go of the device, as it may have been killed a moment ago.
PATIENCE, LOOK_EVERY = 2.0, 0.05

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
# As `encode_data` writes it; see `lease._USUAL`.
_USUAL_DATA = re.compile(r'\{"VtepMAC":"([0-9a-f]{2}(?::[0-9a-f]{2}){5})"\}')


@dataclass(frozen=True, slots=True)
class VxlanConfig:
    """The backend's keys."""

    vni: int
    port: int
    """0: the kernel's default."""
    gbp: bool
    learning: bool
    direct_routing: bool
    mtu: int
    """What counts as the external interface's MTU; 0: its own."""

    def __str__(self) -> str:
        return (
            f"VNI={self.vni} Port={self.port} GBP={_go(self.gbp)} Learning={_go(self.learning)}"
            f" DirectRouting={_go(self.direct_routing)}"
        )


def read_config(config: Config) -> VxlanConfig:
    """Read the backend's keys. Raises BackendError that names the key."""
    keys = config.backend
    return VxlanConfig(
        vni=int_key(keys, "VNI", 1, 0, MAX_VNI),
        port=int_key(keys, "Port", 0, 0, 65535),
        gbp=bool_key(keys, "GBP", False),
        learning=bool_key(keys, "Learning", False),
        direct_routing=bool_key(keys, "DirectRouting", False),
        mtu=mtu_key(keys, OVERHEAD),
    )


def choose_mac(public_ip: IPv4Address, vni: int) -> str:
    """Return the MAC for a new device: the same after a reboot, and of no other host.

    It is locally administered, as a device's own choice must be. The public IP tells hosts apart
    better than a machine id does, which clones of one machine share.
    """
    digest = hashlib.sha256(f"flannel vxlan {public_ip} {vni}".encode()).digest()
    return bytes([digest[0] & 0xFE | 0x02, *digest[1:6]]).hex(":")


def encode_data(mac: str) -> str:
    """Return the lease data of a host with this VTEP MAC, byte for byte as v0.8.0."""
    return f'{{"VtepMAC":"{mac}"}}'


def decode_mac(attrs: LeaseAttrs) -> bytes:
    """Return the VTEP MAC of a peer (6 bytes). Raises BadLease."""
    data = attrs.backend_data or ""
    usual = _USUAL_DATA.fullmatch(data)
    text = usual[1] if usual else _mac_text(data)
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1 or not any(mac):
        raise BadLease(f"BackendData: VtepMAC {text} is no host's address")
    return mac


def _mac_text(data: str) -> str:
    try:
        members = gojson.members(data) or []
    except gojson.JSONError as error:
        raise BadLease(f"BackendData: {error}") from error
    found = [member for member in members if gojson.fold(member.name) == "vtepmac"]
    if not found:
        raise BadLease("BackendData: VtepMAC is missing")
    text = found[-1].value
    if not isinstance(text, str) or not _MAC.fullmatch(text):
        shown = gojson.shown(found[-1].raw)
        raise BadLease(f"BackendData: VtepMAC must be a MAC address, not {shown}")
    return text


def peer_entries(
    lease: Lease, device: int, underlay: int, on_link: Callable[[IPv4Address], bool]
) -> tuple[Entry, ...]:
    """Return what a peer needs in the kernel. Raises BadLease for unusable lease data.

    ``device`` and ``underlay`` are the indexes of the vxlan device and the external interface;
    ``on_link`` tells for which public IPs a plain route will do.
    """
    public_ip, subnet = lease.attrs.public_ip, lease.subnet
    # Also of a peer that is on-link now: what is on-link may change.
    mac, gateway = decode_mac(lease.attrs), subnet.network_address
    if on_link(public_ip):
        return (Route(subnet, public_ip, underlay),)
    # The route comes last: a packet must not look for a neighbour that is not there yet.
    return (
        Neighbour(gateway, mac, device),
        FdbEntry(mac, public_ip, device),
        Route(subnet, gateway, device, onlink=True),
    )


class VxlanLink:
    """The `PeerDevice` of the vxlan backend."""

    def __init__(
        self, device: VxlanDevice, direct: bool, own: Lease, networks: tuple[IPv4Network, ...]
    ) -> None:
        self.name = device.spec.name
        self._device = device
        self._direct = direct
        self._own = own.subnet.network_address
        self._networks = networks
        self._connected: tuple[IPv4Network, ...] = ()
        self._made_for: tuple[int, int, object] = (0, 0, None)
        """What the entries depend on, as of the last `ensure` that went well."""

    def is_touched_by(self, event: KernelEvent) -> bool:
        """See `PeerDevice.is_touched_by`."""
        device = self._device
        indexes = (device.index, device.underlay_index)
        if isinstance(event, LinkEvent):
            names = (device.spec.name, device.spec.underlay)
            return event.link.name in names or event.link.index in indexes
        return isinstance(event, AddressEvent) and event.index in indexes

    def ensure(self) -> bool:
        """See `PeerDevice.ensure`."""
        device = self._device
        device.ensure()
        device.ensure_address(self._own, self._networks)
        if self._direct:
            self._connected = connected_networks(device.spec.underlay)
        before = self._made_for
        self._made_for = (device.index, device.underlay_index, self._connected)
        return self._made_for != before

    def prepare(self) -> None:
        """See `PeerDevice.prepare`."""
        prepare_changes()

    def entries(self, lease: Lease) -> tuple[Entry, ...]:
        """See `PeerDevice.entries`."""
        device, underlay, _ = self._made_for
        return peer_entries(lease, device, underlay, self._on_link)

    def territory(self) -> Territory:
        """See `PeerDevice.territory`."""
        return Territory(self._networks, self._device.index)

    def waiting(self) -> int:
        """See `PeerDevice.waiting`: direct routes need only the external interface."""
        # Not the device's index, if it was made anew but is not in order yet.
        return self._made_for[0] if self._device.has_underlay else 0

    def _on_link(self, address: IPv4Address) -> bool:
        return any(address in network for network in self._connected)


class Vxlan:
    """The vxlan backend; see the module's text."""

    def __init__(
        self, manager: SubnetManager, external: ExternalInterface, previous: Previous
    ) -> None:
        """See `Constructor`."""
        self._manager = manager
        self._external = external
        self._previous = previous

    def register_network(self, config: Config, stop: threading.Event) -> PeerNetwork:
        """See `Backend.register_network`."""
        keys, external = read_config(config), self._external
        log.info("VXLAN config: %s", keys)
        spec = VxlanSpec(
            name=f"flannel.{keys.vni}",
            vni=keys.vni,
            underlay=external.name,
            local=external.iface_addr,
            port=keys.port or DEFAULT_PORT,
            gbp=keys.gbp,
            learning=keys.learning,
            mtu=inner_mtu(keys.mtu, external, OVERHEAD),
            mac=choose_mac(external.ext_addr, keys.vni),
        )
        with _claimed(spec.name, stop):
            return self._join(config, keys, spec, stop)

    def _join(
        self, config: Config, keys: VxlanConfig, spec: VxlanSpec, stop: threading.Event
    ) -> PeerNetwork:
        device = VxlanDevice(spec)
        device.ensure()
        attrs = LeaseAttrs(self._external.ext_addr, TYPE, encode_data(device.mac))
        lease = self._manager.acquire_lease(config, attrs, stop)
        networks = (config.network, self._previous.network or config.network)
        link = VxlanLink(device, keys.direct_routing, lease, networks)
        link.ensure()
        return PeerNetwork(
            manager=self._manager,
            config=config,
            lease=lease,
            mtu=spec.mtu,
            device=link,
            former_subnet=self._previous.subnet,
            neighbours=True,
        )


@contextmanager
def _claimed(name: str, stop: threading.Event) -> Iterator[None]:
    """Be the device's only daemon: within, if that fails; else for as long as this process lives.

    Raises DeviceError, and Stopped.
    """
    claim = _claim(name, stop)
    try:
        yield
    except BaseException:  # the next try may be with another device
        if claim is not None:
            claim.close()
        raise
    if claim is not None:
        claim.detach()  # the kernel closes it with the process


def _claim(name: str, stop: threading.Event) -> socket.socket | None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return lock.claim(name)
        except lock.InUse as error:
            if time.monotonic() >= end:
                raise DeviceError(
                    f"{name} belongs to another flanneld on this host (process {error.pid}):"
                    " set another VNI in the network config, or stop the other daemon"
                ) from None
        except OSError as error:
            log.warning(
                "%s cannot be claimed (%s): another flanneld on this host with the same VNI would"
                " take it, too",
                *(name, error.strerror),
            )
            return None
        if stop.wait(LOOK_EVERY):
            raise Stopped


def _go(value: bool) -> str:
    return "true" if value else "false"
