"""This host's part of a udp network: the peers' leases handed to the tunnel, and all kept so."""

import logging
import select
import threading
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network

from flanneld.backend.device import DeviceWatch, remove_former
from flanneld.backend.feed import LeaseFeed, Line, log_changes
from flanneld.backend.udp.descriptors import Descriptors
from flanneld.backend.udp.fastpath import FastPath
from flanneld.backend.udp.keeper import TunnelKeeper
from flanneld.backend.udp.peers import PeerRoute
from flanneld.errors import DeviceError
from flanneld.heartbeat import IDLE, Heartbeat, Pulse
from flanneld.kernel.netlink import AddressEvent, KernelEvent, LinkEvent
from flanneld.kernel.reconcile import Reconciler
from flanneld.kernel.state import Route, Territory
from flanneld.kernel.tunlink import TunLink
from flanneld.subnet.config import Config
from flanneld.subnet.lease import Lease
from flanneld.subnet.manager import SubnetManager
from flanneld.subnet.watch import EventType, LeaseEvent

log = logging.getLogger(__name__)


class TunDevice:
    """The TUN device as a `Device`: it lives as long as its descriptor, unless it is deleted."""

    def __init__(
        self,
        descriptors: Descriptors,
        keeper: TunnelKeeper,
        link: TunLink,
        fast_path: FastPath,
    ) -> None:
        self._descriptors = descriptors
        self._keeper = keeper
        self._link = link
        self._fast_path = fast_path
        self._made_for = 0

    @property
    def name(self) -> str:
        """See `Device.name`."""
        return self._descriptors.tun.name

    @property
    def index(self) -> int:
        """The index of the present device."""
        return self._descriptors.tun.index

    def is_touched_by(self, event: KernelEvent) -> bool:
        """See `Device.is_touched_by`."""
        if isinstance(event, LinkEvent):
            link = event.link
            ours = link.index == self.index or link.name == self.name
            return ours or self._fast_path.is_touched_by(link.index, link.name)
        return isinstance(event, AddressEvent) and event.index == self.index

    def ensure(self) -> bool:
        """See `Device.ensure`. A device that was renamed or moved away is given up for a new one:
        its name is in people's firewall rules."""
        tun = self._descriptors.tun
        if self._descriptors.tun_lost() or not self._link.is_there(tun.index, tun.name):
            self._keeper.stop()
            self._descriptors.reopen_tun()
            named = "" if self.name == tun.name else f", as {self.name}"
            log.warning("%s was gone: it is made anew%s", tun.name, named)
        self._link.ensure(self.index, self.name)
        self._fast_path.ensure(self.index)
        before, self._made_for = self._made_for, self.index
        return self.index != before


class UdpNetwork:
    """A `Network` whose packets go through the tunnel's process."""

    def __init__(
        self,
        *,
        manager: SubnetManager,
        config: Config,
        lease: Lease,
        mtu: int,
        descriptors: Descriptors,
        keeper: TunnelKeeper,
        device: TunDevice,
        fast_path: FastPath,
        former_network: IPv4Network | None,
        former_subnet: IPv4Network | None,
    ) -> None:
        """``former_network`` and ``former_subnet``: of this host's former run, if known."""
        self.lease = lease
        self.mtu = mtu
        self._network = config.network
        self._feed = LeaseFeed(manager, config, lease)
        self._descriptors = descriptors
        self._keeper = keeper
        self._device = device
        self._fast_path = fast_path
        self._watch = DeviceWatch(device)
        self._former_subnet = former_subnet
        self._territory = Territory((config.network, former_network or config.network))
        self._peers: dict[IPv4Network, PeerRoute] = {}
        self._complete = False
        """The peers are all known."""
        self._placed = False
        """The route into the tunnel has been made."""
        self._asked = False

    def wake(self) -> None:
        """See `Network.wake`."""
        self._feed.wake()

    def report(self) -> None:
        """See `Network.report`."""
        self._asked = True
        self._feed.wake()

    def run(
        self, stop: threading.Event, synced: Callable[[], None], heart: Heartbeat | None = None
    ) -> None:
        """See `Network.run`. The tunnel and its device end with it."""
        heart = heart or Heartbeat()
        try:
            reconciler = Reconciler()
        except OSError as error:
            self._fast_path.close()
            self._descriptors.close()
            raise DeviceError(
                f"cannot listen to the kernel: {error.strerror} (is AF_NETLINK allowed?)"
            ) from error
        try:
            self._feed.start(stop, heart.pulse("leases"))
            self._loop(reconciler, stop, synced, heart.pulse("backend"))
        finally:
            self._keeper.stop()
            self._fast_path.close()
            self._descriptors.close()
            reconciler.close()

    def _loop(
        self,
        reconciler: Reconciler,
        stop: threading.Event,
        synced: Callable[[], None],
        pulse: Pulse,
    ) -> None:
        announced = False
        # What happened to the device between registration and now was heard by nobody.
        self._watch.plan()
        while not stop.is_set():
            pulse.beat(IDLE)
            ready = self._wait(reconciler)
            batch = self._feed.take() if self._feed.fileno() in ready else None
            if batch is not None:
                self._apply(batch)
            if reconciler.fileno() in ready:
                self._watch.note(reconciler.handle())
            self._mend(reconciler, policies=self._fast_path.fileno() in ready)
            if reconciler.in_step and self._keeper.in_step and not announced:
                announced = True
                synced()
            if self._asked:
                self._asked = False
                self._say_state(reconciler)

    def _wait(self, reconciler: Reconciler) -> set[int]:
        """Wait for an event or for something to be due; return the readable descriptors."""
        poll = select.poll()
        poll.register(self._feed, select.POLLIN)
        poll.register(reconciler, select.POLLIN)
        for descriptor in (self._keeper.fileno(), self._fast_path.fileno()):
            if descriptor is not None:
                poll.register(descriptor, select.POLLIN)
        times = [self._watch.due(), self._fast_path.due()]
        if self._complete:
            times.append(self._keeper.due())
        if self._placed and not self._watch.is_planned:
            times.append(reconciler.due())
        due = min((time for time in times if time is not None), default=IDLE)
        return {fd for fd, _ in poll.poll(min(due, IDLE) * 1000 + 1)}

    def _apply(self, batch: Sequence[LeaseEvent]) -> None:
        """Hand the peers of a batch of events to the tunnel. Leases of all backends count."""
        put: dict[IPv4Network, PeerRoute] = {}
        drop: dict[IPv4Network, None] = {}
        lines: list[Line] = []
        for event in batch:
            subnet, public_ip = event.lease.subnet, event.lease.attrs.public_ip
            if event.type is EventType.REMOVED:
                put.pop(subnet, None)
                if self._peers.pop(subnet, None) is not None:
                    drop[subnet] = None
                    lines.append(("Subnet removed: %s", subnet))
                continue
            drop.pop(subnet, None)
            put[subnet] = self._peers[subnet] = PeerRoute(subnet, public_ip)
            lines.append(("Subnet added: %s via %s", subnet, public_ip))
        log_changes(lines)
        self._keeper.change(put.values(), drop)
        self._fast_path.change(put.values(), drop)
        self._complete = True

    def _mend(self, reconciler: Reconciler, *, policies: bool) -> None:
        """The device first, then the tunnel, then the route that leads into it.

        ``policies``: the host's IPsec policies have changed.
        """
        if self._keeper.lost_device and not self._watch.is_planned:
            self._watch.plan()
        if self._watch.due() == 0.0 and self._watch.look():
            self._placed = False
        if self._complete:
            self._keeper.work()
        self._fast_path.work(at_once=policies)
        self._keeper.set_fast_path(self._fast_path.secret)
        if self._watch.is_planned:
            return
        if self._placed:
            reconciler.work()
        elif self._keeper.in_step:
            # Not before there is a tunnel: what carried the packets until now goes with this.
            remove_former(self._former_subnet, self._device.name)
            route = Route(self._network, IPv4Address(0), self._device.index)
            reconciler.set_all([route], self._territory)
            self._placed = True

    def _say_state(self, reconciler: Reconciler) -> None:
        log.info(
            "State: leased %s, %d peers, %s; device %s: %s",
            *(self.lease.subnet, len(self._peers), reconciler.summary()),
            *(self._device.name, self._watch.trouble or "in order"),
        )
        self._fast_path.report()
        self._keeper.report()
