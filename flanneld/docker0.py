"""Whether docker's bridge has the address that flanneld leased for it.

docker takes the bridge's address when it starts. After the subnet changed, or when docker was
started without flannel's options, its containers have addresses that no other host has a route to,
and nothing else says so. flanneld changes nothing about it: it is docker's bridge.
"""

import errno
import fcntl
import logging
import socket
import struct
import threading
from ipaddress import IPv4Interface, IPv4Network

log = logging.getLogger(__name__)

BRIDGE = "docker0"

# Seconds between two looks: docker is often started after flanneld, and restarted at any time.
PAUSE = 60.0

# linux/sockios.h, and struct ifreq of linux/if.h: a name and a union, here a struct sockaddr_in.
_SIOCGIFADDR = 0x8915
_SIOCGIFNETMASK = 0x891B
_IFREQ = struct.Struct("16s4x4s16x")


def judge(found: IPv4Interface | None, network: IPv4Network, subnet: IPv4Network) -> str:
    """Say what is wrong with the bridge's address, in one line; nothing if it fits the subnet.

    Without a bridge or an address nothing is wrong: docker does not run, or has not got there.
    A bridge with another address of the subnet, or a part of it, serves as well as the first.
    """
    if found is None or found.network.subnet_of(subnet):
        return ""
    wanted = f"{subnet.network_address + 1}/{subnet.prefixlen}"
    if found.ip in subnet:
        reason = "its length is not the subnet's, so containers do not find those of other hosts"
    elif found.network.overlaps(network):
        reason = "other hosts do not find its containers there, and may own that subnet by now"
    else:
        reason = "docker was started without flannel's options, and other hosts do not find its"
        reason += " containers"
    return (
        f"{BRIDGE} has {found}, but this host's subnet is {subnet}: {reason}. Run mk-docker-opts"
        f" again and restart docker with its options (--bip={wanted}): systemctl restart docker"
    )


def read_address(bridge: str = BRIDGE) -> IPv4Interface | None:
    """Return a device's first IPv4 address, None without a device or an address.

    Two ioctls rather than netlink: this is done for as long as the daemon runs. Raises OSError.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            address = _ask(sock, _SIOCGIFADDR, bridge)
            mask = _ask(sock, _SIOCGIFNETMASK, bridge)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
                return None
            raise
    return IPv4Interface((address, mask.bit_count()))


def _ask(sock: socket.socket, request: int, device: str) -> int:
    answer = fcntl.ioctl(sock, request, _IFREQ.pack(device.encode(), bytes(4)))
    return int.from_bytes(_IFREQ.unpack(answer)[1])


def start_watch(network: IPv4Network, subnet: IPv4Network, stop: threading.Event) -> None:
    """Start a thread that looks at the bridge until ``stop`` is set."""
    watch = Watch(network, subnet)
    threading.Thread(target=watch.run, args=(stop,), name="docker0", daemon=True).start()


class Watch:
    """Looks at the bridge again and again, and logs each change of what there is to say."""

    def __init__(self, network: IPv4Network, subnet: IPv4Network) -> None:
        self._network = network
        self._subnet = subnet
        self._problem = ""
        self._cannot_look = ""

    def run(self, stop: threading.Event, pause: float = PAUSE) -> None:
        """Look now, and every ``pause`` seconds, until ``stop`` is set."""
        self.look()
        while not stop.wait(pause):
            self.look()

    def look(self) -> None:
        """Look once. Never raises: the network does not depend on it."""
        try:
            found = read_address()
        except OSError as error:
            reason = error.strerror or str(error)
            if reason != self._cannot_look:
                log.warning("Cannot read the address of %s: %s", BRIDGE, reason)
            self._cannot_look = reason
            return
        self._cannot_look = ""
        problem = judge(found, self._network, self._subnet)
        if problem == self._problem:
            return
        self._problem = problem
        if problem:
            log.warning("%s", problem)
        elif found is not None:
            log.info("%s has %s now, as it should", BRIDGE, found)
