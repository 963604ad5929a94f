"""Keeps a tunnel process running, with all the peers, whatever becomes of it."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict
from ipaddress import IPv4Network

from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.process import (
    START_SECONDS,
    Descriptors,
    Exit,
    TunnelError,
    TunnelProcess,
)
from flanneld.clock import now

log = logging.getLogger(__name__)

# Seconds between two questions for the counters, which also show that the tunnel is not stuck.
CHECK = 5.0
# Seconds between two log lines about dropped packets.
DROPS_EVERY = 60.0
# Seconds until a tunnel that ended soon after its start is started again.
PAUSE = 0.8
# Seconds a tunnel must have run for its end to be news, and to be started again at once.
CALM = 10.0

# What an operator should know of: somebody sends what he should not, or packets are lost.
_TELLING = {
    "unknown_peer": "from no peer's public IP",
    "wrong_source": "with a source that is not in their sender's subnet",
    "malformed": "malformed",
    "send_failed": "that could not be sent",
    "tun_write": "that the TUN device did not take",
}


class TunnelKeeper:
    """Starts the tunnel's process, hands it the peers, and starts it again when it ends.

    Belongs to one thread, which must outlive the process, and calls `work` when the descriptor is
    readable and when `due` says so.
    """

    def __init__(
        self,
        descriptors: Descriptors,
        start: Callable[[], TunnelProcess],
    ) -> None:
        """``start`` starts a process on the descriptors. Nothing is started yet."""
        self._descriptors = descriptors
        self._start_process = start
        self._process: TunnelProcess | None = None
        self._peers: dict[IPv4Network, PeerRoute] = {}
        self._started = 0.0
        self._start_at = 0.0
        self._check_at = 0.0
        self._trouble = ""
        self._told: dict[str, int] = {}
        self._told_at = -DROPS_EVERY
        self._last = Counters()
        self.in_step = False
        """The tunnel forwards packets, and knows all the peers."""

    def fileno(self) -> int | None:
        """Return the descriptor that becomes readable when the tunnel has something to say."""
        return None if self._process is None else self._process.fileno()

    def due(self) -> float | None:
        """Return the seconds until `work` has something to do; None if only an event can tell."""
        if self._process is not None:
            return max(0.0, self._check_at - now())
        return None if self.lost_device else max(0.0, self._start_at - now())

    @property
    def lost_device(self) -> bool:
        """Whether there is no tunnel because its TUN device is gone: it has to be made anew."""
        return self._process is None and self._descriptors.tun_lost()

    def change(self, put: Iterable[PeerRoute], drop: Iterable[IPv4Network]) -> None:
        """Have the tunnel know these peers, too, and those no more: new in first, old out after."""
        new = list(put)
        gone = [subnet for subnet in drop if self._peers.pop(subnet, None) is not None]
        self._peers.update((route.subnet, route) for route in new)
        gone = [subnet for subnet in gone if subnet not in self._peers]
        if self._process is None or not self.in_step:
            return  # it gets all of them when it is ready
        try:
            if new:
                self._process.set_peers(new)
            if gone:
                self._process.remove_peers(gone)
        except TunnelError as error:
            self._ended(str(error))

    def work(self) -> None:
        """Do what is due: start the tunnel, hear what it says, hand it the peers, count."""
        if self._process is None:
            if now() >= self._start_at and not self.lost_device:
                self._start()
            return
        try:
            self._attend(self._process)
        except TunnelError as error:
            self._ended(str(error))

    def report(self) -> None:
        """Log the counters."""
        if self._process is not None and self._process.ready:
            try:
                self._last = self._process.statistics()
            except TunnelError as error:
                self._ended(str(error))
        counters = self._last
        log.info(
            "udp tunnel: %s; %.1f packets per send, %.1f per receive",
            " ".join(f"{name}={value}" for name, value in asdict(counters).items()),
            *(counters.segments_per_send, counters.segments_per_receive),
        )

    def stop(self) -> None:
        """End the process, for good or until the next `work`. Safe to repeat."""
        process, self._process, self.in_step = self._process, None, False
        if process is not None:
            process.close()
        self._start_at = 0.0

    def _start(self) -> None:
        self._started = now()
        try:
            self._process = self._start_process()
        except TunnelError as error:
            self._ended(str(error))
            return
        self._check_at = now() + START_SECONDS
        self._told, self._last = {}, Counters()

    def _attend(self, process: TunnelProcess) -> None:
        process.dispatch()
        ended = process.poll()
        if ended is Exit.TUN_LOST:
            # Its device says what happened, and the network makes it anew.
            self.stop()
        elif ended is not None:
            self._ended(process.ending())
        elif process.ready and not self.in_step:
            process.replace_peers(self._peers.values())
            self.in_step = True
            self._check_at = now() + CHECK
            if self._trouble:
                log.info("The udp tunnel is running again (process %d)", process.pid)
        elif now() >= self._check_at:
            if not process.ready:
                raise TunnelError(f"it is not ready after {START_SECONDS:.0f} s")
            self._check(process)

    def _check(self, process: TunnelProcess) -> None:
        self._check_at = now() + CHECK
        self._last = process.statistics()
        drops = {name: self._last.drops[name] for name in _TELLING}
        news = [
            f"{number - self._told.get(name, 0)} {_TELLING[name]}"
            for name, number in drops.items()
            if number > self._told.get(name, 0)
        ]
        if news and now() >= self._told_at + DROPS_EVERY:
            self._told, self._told_at = drops, now()
            log.warning("The udp tunnel dropped packets: %s", ", ".join(news))

    def _ended(self, why: str) -> None:
        """Plan a new start; log why, if that is news."""
        process, self._process, self.in_step = self._process, None, False
        if process is not None:
            process.kill()
        lived = now() - self._started
        self._start_at = now() if lived >= CALM else now() + PAUSE
        if why != self._trouble or lived >= CALM:
            self._trouble = why
            log.error("The udp tunnel has ended (%s): it is started again", why)
