"""The fast path: most packets do not go through the tunnel's process, but are moved by the kernel.

Two programs are hooked in, one where packets go into the TUN device and one where datagrams come
into the external interface, and both do there what the tunnel does, with the same bytes on the
wire. What they do not take goes on to the tunnel's process: everything to peers without a fast path
of their own, fragments, IP options, what expires, whoever is nobody's peer. So the tunnel's process
has to be right about everything, and a host without eBPF lacks nothing but speed.

- A peer without a fast path (the original, an older kernel) reads datagrams from a socket. It must
  not be sent packets whose checksum a device was to complete, or super-packets that a virtual link
  does not cut; the tunnel's process does all of that. Peers tell each other by the datagrams:
  what a fast path sends has no UDP checksum, and an IP id of its own. They find out by the echo
  requests by which the tunnel's process greets a peer (`greeting`).
- The host's firewall sees the packets as before, going into and coming out of the TUN device, but
  not the datagrams that the kernel moves. So that its connection tracking goes on letting in those
  of the slow way, one packet in a few seconds takes it. IPsec would be passed by: where there are
  policies, there is no fast path.
- Received TCP goes on by way of a link that joins it, if that can be had (`joining`).
- Nothing that is on the way is lost when it comes or goes, but for what a virtual link has brought
  half done: of that TCP sends again.
"""

import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Network

from flanneld.backend.udp import programs
from flanneld.backend.udp.joining import Joining, remove_left
from flanneld.backend.udp.packet import SECRET_BYTES
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.program_steps import COUNTERS, PEER_BYTES, Path, peer
from flanneld.clock import now
from flanneld.errors import DeviceError
from flanneld.interface import ExternalInterface
from flanneld.kernel.bpf import TCX_EGRESS, TCX_INGRESS, CounterMap, Link, PrefixMap, hook_in
from flanneld.kernel.ipsec import Policies

log = logging.getLogger(__name__)

# Seconds between two looks whether it is still, or again, as it should be.
CHECK = 5.0
# Peers there is room for; empty it takes no memory.
_MOST_PEERS = 1 << 20
# linux/sockios.h, linux/if_arp.h
_SIOCGIFHWADDR, _ARPHRD_ETHER = 0x8927, 1
_IFREQ = struct.Struct("=16sH22x")


class FastPathError(Exception):
    """There can be no fast path, and why."""


@dataclass(slots=True)
class _Attached:
    """What is hooked in; gone when its descriptors are closed, in whatever way."""

    path: Path
    peers: PrefixMap
    counters: CounterMap
    external: Link
    tun: Link

    def is_on(self, external: int, tun: int) -> bool:
        """Tell whether it is on these devices, and not on former ones with the same indices."""
        return (self.external.index(), self.tun.index()) == (external, tun)

    def receive_by(self, inlet: int) -> None:
        """Have received TCP put into that device; 0: into none. No packet is lost by it."""
        if inlet == self.path.inlet:
            return
        path = replace(self.path, inlet=inlet)
        # It is the next until the other goes.
        new = _receive(path)
        self.external.close()
        self.path, self.external = path, new

    def close(self) -> None:
        """Take it off. Safe to repeat."""
        for each in (self.tun, self.external, self.counters, self.peers):
            each.close()


class FastPath:
    """Keeps the fast path as long as it can be had. Belongs to the backend's thread."""

    def __init__(
        self,
        external: ExternalInterface,
        udp: socket.socket,
        *,
        port: int,
        mtu: int,
        wanted: bool = True,
    ) -> None:
        """``udp`` is the tunnel's socket, ``mtu`` the TUN device's. Nothing is attached yet.

        Unless it is ``wanted``, nothing ever is.
        """
        self._external = external
        self._udp = udp
        self._port = port
        self._mtu = mtu
        self._wanted = wanted
        self._attached: _Attached | None = None
        self._peers: dict[IPv4Network, PeerRoute] = {}
        self._tun = 0
        self._check_at = 0.0
        self._policies: Policies | None = None
        self._trouble = ""
        """Why there is none; empty if there is one, or it was not tried yet."""
        self._joining = Joining()

    @property
    def is_on(self) -> bool:
        """Whether packets go by it."""
        return self._attached is not None

    @property
    def secret(self) -> bytes:
        """What the tunnel's process must know while packets go by it; else empty."""
        return b"" if self._attached is None else self._attached.path.secret

    def fileno(self) -> int | None:
        """Return the descriptor that becomes readable when `work` is due at once."""
        return None if self._policies is None else self._policies.fileno()

    def due(self) -> float | None:
        """Return the seconds until `work` has something to do; None if it never has."""
        return max(0.0, self._check_at - now()) if self._wanted else None

    def work(self, *, at_once: bool = False) -> None:
        """Look whether it still may be, and can be now, if it is time."""
        if at_once and self._policies is not None:
            # In any case, or it would be due at once for ever.
            self._policies.forget()
        if self._tun and (at_once or now() >= self._check_at):
            self.ensure(self._tun)

    def ensure(self, tun: int) -> None:
        """Attach it to the TUN device of that index, if it is not; say what changed."""
        if not self._wanted:
            if not self._trouble:
                self._trouble = "FastPath is false"
                self.report()
                remove_left(tun)
            return
        self._tun = tun
        self._check_at = now() + CHECK
        try:
            external = self._external_index()
            self._check_policies()
            if self._attached is not None and not self._attached.is_on(external, tun):
                self._detach()
            if self._attached is None:
                self._attached = self._attach(tun, external)
                self._put(self._peers.values())
                log.info("The kernel moves most packets itself, without the tunnel's process")
            self._attached.receive_by(self._joining.ensure(tun))
        except (FastPathError, DeviceError, OSError) as error:
            self._give_up(error)
        else:
            self._trouble = ""

    def is_touched_by(self, index: int, name: str) -> bool:
        """Tell whether the device that changed is one it needs, beside the TUN device."""
        if index == self._external.index or name == self._external.name:
            return True
        return self._joining.is_touched_by(index)

    def change(self, put: Iterable[PeerRoute], drop: Iterable[IPv4Network]) -> None:
        """Send to these peers from now on, and to those no more."""
        new = list(put)
        gone = [subnet for subnet in drop if self._peers.pop(subnet, None) is not None]
        self._peers.update((route.subnet, route) for route in new)
        try:
            self._put(new)
            if self._attached is not None:
                for subnet in gone:
                    if subnet not in self._peers:
                        self._attached.peers.drop(_key(subnet))
        except OSError as error:
            self._give_up(error)

    def counters(self) -> dict[str, int]:
        """Return what it has counted since it was attached; empty if it is not."""
        if self._attached is None:
            return {}
        return dict(zip(COUNTERS, self._attached.counters.read(), strict=True))

    def report(self) -> None:
        """Log the counters."""
        try:
            words = " ".join(f"{name}={value}" for name, value in self.counters().items())
            if words:
                why = self._joining.trouble
                words += f", TCP goes on one by one ({why})" if why else ", TCP is joined"
        except OSError as error:
            words = f"on, but it cannot be read ({error.strerror})"
        log.info("udp fast path: %s", words or f"off ({self._trouble})")

    def close(self) -> None:
        """Detach it for good. Safe to repeat."""
        self._detach()
        self._tun = 0
        if self._policies is not None:
            self._policies.close()
            self._policies = None

    def _external_index(self) -> int:
        """Return the external interface's index: it may have been renamed, or made anew."""
        name = self._external.name
        try:
            index = self._external.index
            try:
                name = socket.if_indextoname(index)
            except OSError:
                index = socket.if_nametoindex(name)
            answer = fcntl.ioctl(self._udp, _SIOCGIFHWADDR, _IFREQ.pack(name.encode(), 0))
        except OSError:
            raise FastPathError(f"there is no {name}") from None
        if _IFREQ.unpack(answer)[1] != _ARPHRD_ETHER:
            raise FastPathError(f"{name} is no Ethernet device")
        return index

    def _check_policies(self) -> None:
        try:
            if self._policies is None:
                self._policies = Policies()
            exist = self._policies.exist()
        except OSError as error:
            if error.errno != errno.EPROTONOSUPPORT:
                raise
            return  # a kernel without IPsec
        if exist:
            raise FastPathError("this host has IPsec policies, which it would pass by")

    def _attach(self, tun: int, external: int) -> _Attached:
        with ExitStack() as unfinished:
            peers = PrefixMap("flannel_peers", PEER_BYTES, _MOST_PEERS)
            unfinished.callback(peers.close)
            counters = CounterMap("flannel_counts", len(COUNTERS))
            unfinished.callback(counters.close)
            path = Path(
                peers=peers.fd,
                counters=counters.fd,
                address=self._external.iface_addr,
                port=self._port,
                external=external,
                tun=tun,
                inlet=0,
                mtu=self._mtu,
                secret=os.urandom(SECRET_BYTES),
            )
            # Nobody is a peer yet, so it does not matter which is first.
            incoming = _receive(path)
            unfinished.callback(incoming.close)
            outgoing = hook_in("flannel_out", programs.egress(path), tun, TCX_EGRESS)
            unfinished.pop_all()
            return _Attached(path, peers, counters, incoming, outgoing)

    def _give_up(self, error: Exception) -> None:
        self._detach()
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.errno == errno.EPERM:
            why = (
                "no right to load eBPF programs: it takes CAP_BPF, and bpf in the unit's"
                " SystemCallFilter"
            )
        if why != self._trouble:
            log.warning("All packets go through the tunnel's process: no fast path (%s)", why)
            remove_left(self._tun)
        self._trouble = why

    def _detach(self) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.close()
        # Not before: until then packets are put into it.
        self._joining.close()

    def _put(self, routes: Iterable[PeerRoute]) -> None:
        if self._attached is not None:
            self._attached.peers.put({_key(r.subnet): peer(r.public_ip) for r in routes})


def _receive(path: Path) -> Link:
    return hook_in("flannel_in", programs.ingress(path), path.external, TCX_INGRESS)


def _key(subnet: IPv4Network) -> bytes:
    return PrefixMap.key(subnet.network_address.packed, subnet.prefixlen)
