"""host-gw: a plain route to each peer's subnet, with the peer itself as the gateway.

Fastest of all, for hosts that share one layer-2 segment. There is no device, no config key and no
lease data; the containers' MTU is the external interface's.
"""

import threading
from ipaddress import IPv4Network

from flanneld.backend.peers import PeerNetwork
from flanneld.errors import BackendError
from flanneld.interface import ExternalInterface
from flanneld.kernel.state import Entry, Route
from flanneld.subnet.config import Config
from flanneld.subnet.lease import Lease, LeaseAttrs
from flanneld.subnet.manager import SubnetManager

TYPE = "host-gw"


def peer_entries(lease: Lease, oif: int) -> tuple[Entry, ...]:
    """Return the route to a peer's subnet, through the device with index ``oif``."""
    return (Route(lease.subnet, lease.attrs.public_ip, oif),)


class HostGW:
    """The host-gw backend; see the module's text."""

    def __init__(
        self,
        manager: SubnetManager,
        external: ExternalInterface,
        previous_network: IPv4Network | None,
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
        self._previous_network = previous_network

    def register_network(self, config: Config, stop: threading.Event) -> PeerNetwork:
        """See `Backend.register_network`."""
        attrs = LeaseAttrs(self._external.ext_addr, TYPE, None)
        lease = self._manager.acquire_lease(config, attrs, stop)
        return PeerNetwork(
            manager=self._manager,
            config=config,
            lease=lease,
            mtu=self._external.mtu,
            device=self._external.name,
            entries=peer_entries,
            previous_network=self._previous_network,
        )
