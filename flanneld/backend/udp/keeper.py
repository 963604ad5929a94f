"""Keeps a tunnel process running, with all the peers, whatever becomes of it."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict
from ipaddress import IPv4Network

from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.descriptors import Descriptors
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.process import START_SECONDS, Exit, TunnelError, TunnelProcess
from flanneld.clock import now

log = logging.getLogger(__name__)

# Seconds between two questions for the counters, which also show that the tunnel is not stuck.
CHECK = 5.0
# Seconds between two log lines about dropped packets.
DROPS_EVERY = 60.0
# Seconds a tunnel must have run for its end to be news, and to be started again at once.
CALM = 10.0
# Seconds until one that did not live that long is started again, from the third time on.
PAUSE, AT_ONCE = 0.8, 2

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
        self._secret = b""
        self._started = 0.0
        self._start_at = 0.0
        self._check_at = 0.0
        self._early_ends = 0
        self._trouble = ""
        self._handed_over = False
        self._asked: Counters | None = None
        """The counters before the ones that were asked for."""
        self._wants_report = False
        self._told: dict[str, int] = {}
        self._told_at = -DROPS_EVERY
        self.in_step = False
        """The tunnel forwards packets, and knows all the peers."""

    def fileno(self) -> int | None:
        """Return the descriptor that becomes readable when the tunnel has something to say."""
        return None if self._process is None else self._process.fileno()

    def due(self) -> float | None:
        """Return the seconds until `work` has something to do; None if only an event can tell."""
        if self._process is not None:
            deadline = self._process.deadline()
            at = self._check_at if deadline is None else min(self._check_at, deadline)
            return max(0.0, at - now())
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
        if self._process is None or not self._handed_over:
            return  # it gets all of them when it is ready
        try:
            if new:
                self._process.set_peers(new)
            if gone:
                self._process.remove_peers(gone)
        except TunnelError as error:
            self._ended(str(error))

    def set_fast_path(self, secret: bytes) -> None:
        """Have the tunnel know the fast path's secret, or by an empty one that there is none."""
        if secret == self._secret:
            return
        self._secret = secret
        if self._process is None or not self._handed_over:
            return  # it gets it when it is ready
        try:
            self._process.set_fast_path(secret)
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
        """Log the counters, as soon as the tunnel has told them."""
        if self._process is None or not self._process.ready:
            log.info("udp tunnel: not running (%s)", self._trouble or "it is starting")
            return
        self._wants_report = True
        self._ask(self._process)

    def stop(self) -> None:
        """End the process, for good or until the next `work`. Safe to repeat."""
        self._forget()
        self._start_at = 0.0

    def _forget(self) -> TunnelProcess | None:
        process, self._process = self._process, None
        self.in_step = self._handed_over = self._wants_report = False
        self._asked = None
        if process is not None:
            process.close()
        return process

    def _start(self) -> None:
        self._started = now()
        try:
            self._process = self._start_process()
        except TunnelError as error:
            self._ended(str(error))
            return
        self._check_at = now() + START_SECONDS
        self._told = {}

    def _attend(self, process: TunnelProcess) -> None:
        process.dispatch()
        ended = process.poll()
        if ended is Exit.TUN_LOST and self._descriptors.tun_lost():
            # Its device says what happened, and the network makes it anew.
            self.stop()
        elif ended is not None:
            self._ended("")
        elif not process.ready:
            if now() >= self._check_at:
                raise TunnelError(f"it is not ready after {START_SECONDS:.0f} s")
        elif not self._handed_over:
            if self._secret:
                process.set_fast_path(self._secret)
            process.replace_peers(self._peers.values())
            self._handed_over = True
            self._check_at = now() + CHECK
        else:
            self.in_step = self.in_step or process.is_settled
            self._take_counters(process)
            if now() >= self._check_at:
                self._check_at = now() + CHECK
                self._ask(process)
                self._notice_calm(process)

    def _ask(self, process: TunnelProcess) -> None:
        if self._asked is None:
            self._asked = process.counters
            try:
                process.ask_counters()
            except TunnelError as error:
                self._ended(str(error))

    def _take_counters(self, process: TunnelProcess) -> None:
        if self._asked is None or process.counters is self._asked:
            return
        self._asked = None
        if self._wants_report:
            self._wants_report = False
            _log_counters(process.counters)
        drops = {name: process.counters.drops[name] for name in _TELLING}
        news = [
            f"{number - self._told.get(name, 0)} {_TELLING[name]}"
            for name, number in drops.items()
            if number > self._told.get(name, 0)
        ]
        if news and now() >= self._told_at + DROPS_EVERY:
            self._told, self._told_at = drops, now()
            log.warning("The udp tunnel dropped packets: %s", ", ".join(news))

    def _notice_calm(self, process: TunnelProcess) -> None:
        if now() >= self._started + CALM:
            self._early_ends = 0
            if self._trouble:
                self._trouble = ""
                log.info("The udp tunnel runs again (process %d)", process.pid)

    def _ended(self, why: str) -> None:
        """Plan a new start; log why, if that is news: its own last words, if it has any."""
        if self._process is not None:
            why = self._process.ending() or why
        self._forget()
        early = now() < self._started + CALM
        self._early_ends = self._early_ends + 1 if early else 0
        self._start_at = now() + (PAUSE if self._early_ends > AT_ONCE else 0.0)
        if why != self._trouble or not early:
            self._trouble = why
            log.error("The udp tunnel has ended (%s): it is started again", why)


def _log_counters(counters: Counters) -> None:
    log.info(
        "udp tunnel: %s; %.1f packets per send, %.1f per receive",
        " ".join(f"{name}={value}" for name, value in asdict(counters).items()),
        *(counters.segments_per_send, counters.segments_per_receive),
    )
