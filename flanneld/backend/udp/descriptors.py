"""What the tunnel works on, opened and kept by the daemon. No numpy."""

import logging
import os
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address

from flanneld.backend.udp import tun
from flanneld.backend.udp.tun import ALL, Offload
from flanneld.errors import DeviceError
from flanneld.logs import verbose

log = logging.getLogger(__name__)

# As the original's; the kernel takes the first free number.
PATTERN = "flannel%d"


@dataclass(slots=True)
class Descriptors:
    """The TUN device, the UDP socket and the ICMP socket.

    They outlive the tunnel's process, so that one that died can be started again on the same
    device; the device lives as long as they do.
    """

    tun: tun.Tun
    udp: socket.socket
    icmp: socket.socket | None
    wanted: Offload
    """Offloads that may be used."""

    @classmethod
    def open(
        cls, address: IPv4Address, port: int, *, pattern: str = PATTERN, wanted: Offload = ALL
    ) -> "Descriptors":
        """Open all; the device has no address and is down. Raises DeviceError.

        ``wanted`` leaves out offloads; those this kernel lacks are logged, one line each.
        """
        # First what may be somebody else's: a device that comes and goes alarms the whole host.
        udp, got = tun.open_socket(log.warning, address, port, wanted)
        try:
            icmp = tun.open_icmp(log.warning)
        except BaseException:
            udp.close()
            raise
        try:
            return cls(tun.open_tun(log.warning, pattern, wanted), udp, icmp, got)
        except BaseException:
            udp.close()
            if icmp is not None:
                icmp.close()
            raise

    @property
    def offload(self) -> Offload:
        """The offloads there are."""
        return self.wanted & self.tun.offload

    def reopen_tun(self) -> None:
        """Make the TUN device anew, by the same name if that is free. Raises DeviceError."""

        def say(text: str) -> None:
            log.log(verbose(1), "%s", text)  # as said when it was opened the first time

        try:
            device = tun.open_tun(say, self.tun.name, self.wanted)
        except DeviceError:
            device = tun.open_tun(say, PATTERN, self.wanted)
        os.close(self.tun.fd)
        self.tun = device

    def tun_lost(self) -> bool:
        """Tell whether the TUN device has been deleted."""
        return tun.is_lost(self.tun.fd)

    def close(self) -> None:
        """Close all; the TUN device goes with it. Safe to repeat."""
        if self.udp.fileno() < 0:
            return
        os.close(self.tun.fd)
        self.udp.close()
        if self.icmp is not None:
            self.icmp.close()
