"""udp: packets go through a TUN device into a process that sends each as the payload of a datagram.

For every kernel and every network that lets UDP through, and what a network config without
``Backend`` means. Wire format, device and lease are those of the original, so that both work in one
cluster. How a packet travels is told in docs/backends.md.
"""

import logging
import threading
import time
from dataclasses import dataclass

from flanneld.backend.mtu import inner_mtu, mtu_key
from flanneld.backend.udp.descriptors import Descriptors
from flanneld.backend.udp.fastpath import FastPath
from flanneld.backend.udp.keeper import TunnelKeeper
from flanneld.backend.udp.network import TunDevice, UdpNetwork
from flanneld.backend.udp.packet import OVERHEAD
from flanneld.backend.udp.process import TunnelProcess
from flanneld.backend.udp.tun import AddressInUse
from flanneld.errors import Stopped
from flanneld.interface import ExternalInterface
from flanneld.kernel.tunlink import TunLink
from flanneld.subnet.config import Config, bool_key, int_key
from flanneld.subnet.env import Previous
from flanneld.subnet.lease import LeaseAttrs
from flanneld.subnet.manager import SubnetManager

log = logging.getLogger(__name__)

# Not IANA's, but flannel's since its first version.
DEFAULT_PORT = 8285

# Seconds for a former run's tunnel to let go of the port: it ends with its daemon, but not in the
# same moment.
PATIENCE, LOOK_EVERY = 2.0, 0.05


@dataclass(frozen=True, slots=True)
class UdpConfig:
    """The backend's keys."""

    port: int
    source_check: bool
    fast_path: bool
    """Whether the kernel may move packets itself."""
    mtu: int
    """What counts as the external interface's MTU; 0: its own."""


def read_config(config: Config) -> UdpConfig:
    """Read the backend's keys. Raises BackendError that names the key."""
    keys = config.backend
    return UdpConfig(
        port=int_key(keys, "Port", DEFAULT_PORT, 1, 65535),
        source_check=bool_key(keys, "SourceCheck", True),
        fast_path=bool_key(keys, "FastPath", True),
        mtu=mtu_key(keys, OVERHEAD),
    )


class Udp:
    """The udp backend; see the module's text."""

    def __init__(
        self, manager: SubnetManager, external: ExternalInterface, previous: Previous
    ) -> None:
        """See `Constructor`."""
        self._manager = manager
        self._external = external
        self._previous = previous

    def register_network(self, config: Config, stop: threading.Event) -> UdpNetwork:
        """See `Backend.register_network`."""
        keys, external = read_config(config), self._external
        mtu = inner_mtu(keys.mtu, external, OVERHEAD)
        lease = self._manager.acquire_lease(config, LeaseAttrs(external.ext_addr), stop)
        descriptors = self._open(keys.port, stop)

        fast_path = FastPath(
            external, descriptors.udp, port=keys.port, mtu=mtu, wanted=keys.fast_path
        )

        def start() -> TunnelProcess:
            return TunnelProcess(
                descriptors,
                port=keys.port,
                mtu=mtu,
                source_check=keys.source_check,
            )

        try:
            keeper = TunnelKeeper(descriptors, start)
            link = TunLink(lease.subnet.network_address, config.network, mtu)
            device = TunDevice(descriptors, keeper, link, fast_path)
            device.ensure()
            return UdpNetwork(
                manager=self._manager,
                config=config,
                lease=lease,
                mtu=mtu,
                descriptors=descriptors,
                keeper=keeper,
                device=device,
                fast_path=fast_path,
                former_network=self._previous.network,
                former_subnet=self._previous.subnet,
            )
        except BaseException:
            fast_path.close()
            descriptors.close()
            raise

    def _open(self, port: int, stop: threading.Event) -> Descriptors:
        """Open the descriptors. Raises DeviceError, and Stopped."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return Descriptors.open(self._external.iface_addr, port)
            except AddressInUse:
                if time.monotonic() >= end:
                    raise
            if stop.wait(LOOK_EVERY):
                raise Stopped
