"""host-gw: a plain route to each peer's subnet, with the peer itself as the gateway.

Fastest of all, for hosts that share one layer-2 segment. There is no device, no config key and no
lease data; the containers' MTU is the external interface's.
"""

import socket
import threading
from ipaddress import IPv4Network

from flanneld.backend.peers import PeerNetwork
from flanneld.errors import BackendError, DeviceError
from flanneld.interface import ExternalInterface
from flanneld.kernel.netlink import KernelEvent, LinkEvent
from flanneld.kernel.state import Entry, Route, Territory
from flanneld.subnet.config import Config
from flanneld.subnet.env import Previous
from flanneld.subnet.lease import Lease, LeaseAttrs
from flanneld.subnet.manager import SubnetManager

TYPE = "host-gw"


def peer_entries(lease: Lease, oif: int) -> tuple[Entry, ...]:
    """Return the route to a peer's subnet, through the device with index ``oif``."""
    return (Route(lease.subnet, lease.attrs.public_ip, oif),)


class ExternalLink:
    """The `PeerDevice` of the host-gw backend: the external interface, which is not ours."""

    def __init__(self, name: str, networks: tuple[IPv4Network, ...]) -> None:
        self.name = name
        self._networks = networks
        self._index = 0

    def is_touched_by(self, event: KernelEvent) -> bool:
        """See `PeerDevice.is_touched_by`."""
        return isinstance(event, LinkEvent) and event.link.name == self.name

    def ensure(self) -> bool:
        """See `PeerDevice.ensure`: an interface that was made anew has another index."""
        before = self._index
        try:
            self._index = socket.if_nametoindex(self.name)
        except OSError as error:
            raise DeviceError(f"the external interface {self.name} is gone") from error
        return self._index != before

    def prepare(self) -> None:
        """See `PeerDevice.prepare`: nothing of the interface is changed here."""

    def entries(self, lease: Lease) -> tuple[Entry, ...]:
        """See `PeerDevice.entries`."""
        return peer_entries(lease, self._index)

    def territory(self) -> Territory:
        """See `PeerDevice.territory`."""
        return Territory(self._networks)

    def waiting(self) -> int:
        """See `PeerDevice.waiting`."""
        return 0


class HostGW:
    """The host-gw backend; see the module's text."""

    def __init__(
        self,
        manager: SubnetManager,
        external: ExternalInterface,
        previous: Previous,
    ) -> None:
        """See `Constructor`. Raises BackendError behind NAT."""
        if external.ext_addr != external.iface_addr:
            raise BackendError(
                "your PublicIP differs from interface IP, meaning that probably you're on a NAT,"
                f" which is not supported by host-gw backend (public IP {external.ext_addr},"
                f" {external.name} has {external.iface_addr}: drop --public-ip, or use vxlan)"
            )
        self._manager = manager
        self._external = external
        self._previous = previous

    def register_network(self, config: Config, stop: threading.Event) -> PeerNetwork:
        """See `Backend.register_network`."""
        attrs = LeaseAttrs(self._external.ext_addr, TYPE, None)
        lease = self._manager.acquire_lease(config, attrs, stop)
        networks = (config.network, self._previous.network or config.network)
        return PeerNetwork(
            manager=self._manager,
            config=config,
            lease=lease,
            mtu=self._external.mtu,
            device=ExternalLink(self._external.name, networks),
            former_subnet=self._previous.subnet,
        )
