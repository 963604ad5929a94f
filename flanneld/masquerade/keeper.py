"""Keeps the rules as they are wanted, for as long as the daemon runs.

At the end of the daemon they stay: containers keep their connections through a restart.
"""

import logging
import threading
from collections.abc import Callable
from ipaddress import IPv4Network

from flanneld.clock import now
from flanneld.errors import FlannelError
from flanneld.flags import Options
from flanneld.heartbeat import Pulse
from flanneld.masquerade.choose import Choice, choose
from flanneld.masquerade.driver import Commands, MasqueradeError
from flanneld.masquerade.rules import Rules, instance_of, wanted
from flanneld.retry import REPEAT, Outage
from flanneld.signals import kept_in_this_thread

log = logging.getLogger(__name__)

# Seconds the start waits for the rules, at most: the lock may be held, a command hang.
FIRST_TIMEOUT = 10.0

# Rules that are not there right after they were written: somebody was quick, or we cannot see them.
# After some times in a row it pauses between two tries, as each may add one rule more.
UNSEEN_TIMES = 3
UNSEEN_PAUSE = 600.0

# Seconds until the thread has ended once it is to.
END_TIMEOUT = 1.0


class Keeper:
    """Puts the rules in place, and back whenever somebody took them away.

    All that touches the rules runs in one thread, `run`.
    """

    def __init__(self, rules: Rules, choose: Callable[[Commands], Choice], resync: float) -> None:
        """``choose`` picks the driver for the rules, in the thread; ``resync`` is in seconds.

        The driver is to run its commands by what ``choose`` is given.
        """
        self._rules = rules
        self._choose = choose
        self._resync = resync
        self._tried = threading.Event()
        self._choice: Choice | None = None
        self._lacking = ""
        self._bug = ""
        self._mended_at = -REPEAT
        self._mended = 0
        self._unseen = 0
        self._unseen_at = 0.0

    def wait_tried(self, timeout: float) -> bool:
        """Wait until the rules are in place, or could not be put there at once."""
        return self._tried.wait(timeout)

    def start(self, stop: threading.Event, pulse: Pulse) -> threading.Thread:
        """Start a thread that does `run`.

        Returns when the rules are in place, or after the first failure.
        """
        thread = threading.Thread(
            target=self.run, args=(stop, pulse), name="masquerade", daemon=True
        )
        with kept_in_this_thread():
            thread.start()
        try:
            self.wait_tried(FIRST_TIMEOUT)
        except BaseException:
            # The daemon is to end: so must what the thread runs.
            stop.set()
            thread.join(END_TIMEOUT)
            raise
        return thread

    def run(self, stop: threading.Event, pulse: Pulse | None = None) -> None:
        """Until ``stop``: apply, then check every ``resync`` seconds. Never raises.

        If no rules are wanted, it takes away what a former run left, and ends once that is done.
        """
        outage = Outage(
            log.log,
            "Failed to set up the masquerade and forward rules",
            steady=self._resync,
            recovered="Masquerade and forward rules are in place again",
        )
        idle = not any(chain.rules for chain in self._rules.chains)
        pulse = pulse or Pulse()
        commands = Commands(stop, pulse.beat)
        while not stop.is_set():
            pulse.beat()
            try:
                self._step(commands)
            except FlannelError as error:
                self._tried.set()
                if stop.is_set():
                    return
                pulse.beat(self._resync)
                outage.failed(error, stop)
            except Exception as error:
                if repr(error) != self._bug:
                    log.exception("This is a bug, please report it with these lines")
                self._bug = repr(error)
                self._tried.set()
                pulse.beat(self._resync)
                outage.failed(repr(error), stop)
            else:
                self._tried.set()
                outage.over()
                if idle and self._choice is not None:
                    pulse.end()
                    return
                pulse.beat(self._resync)
                stop.wait(self._resync)

    def _step(self, commands: Commands) -> None:
        if self._choice is None:
            self._begin(commands)
        elif self._choice.driver.check():
            self._unseen = 0
        else:
            self._put(self._choice)
            self._say_mended()

    def _begin(self, commands: Commands) -> None:
        try:
            choice = self._choose(commands)
        except MasqueradeError as error:
            self._say_lacking(str(error))
            return
        self._put(choice)
        log.info("Masquerade and forward rules through %s: %s", choice.driver.name, choice.reason)
        # What follows takes away only what is no longer used; nobody has to wait for it.
        self._choice = choice
        self._tried.set()
        for remove in choice.others:
            try:
                removed = remove()
            except MasqueradeError as error:
                if commands.stopping:
                    return
                log.warning("What another driver may have left stays: %s", error)
                continue
            for line in removed:
                log.info("Removed what another driver left: %s", line)

    def _put(self, choice: Choice) -> None:
        if self._unseen < UNSEEN_TIMES or now() - self._unseen_at >= UNSEEN_PAUSE:
            choice.driver.apply()
            self._unseen, self._unseen_at = self._unseen + 1, now()
        if choice.driver.check():
            self._unseen = 0
            return
        raise MasqueradeError(
            "the rules are not as they were written: something else changes them at once,"
            f" or {choice.driver.name} shows them in a way unknown here"
        )

    def _say_lacking(self, reason: str) -> None:
        """Once for each reason: a host that has no iptables may never have needed one."""
        if reason == self._lacking:
            return
        self._lacking = reason
        if self._rules.nat.rules:
            log.error("Failed to set up IP Masquerade: %s", reason)
        elif self._rules.filter.rules:
            log.warning(
                "No forward rules, which matter where the FORWARD chain drops packets, as docker"
                " has it: %s (or turn them off with --iptables-forward-rules=false)",
                reason,
            )

    def _say_mended(self) -> None:
        """One line a minute at most, however often somebody takes the rules away."""
        self._mended += 1
        if now() - self._mended_at < REPEAT:
            return
        times = f" ({self._mended} times)" if self._mended > 1 else ""
        log.warning(
            "Masquerade or forward rules were missing or changed: they are back in place%s", times
        )
        self._mended_at, self._mended = now(), 0


def make(
    options: Options,
    network: IPv4Network,
    subnet: IPv4Network,
    *,
    enable_nftables: bool,
    former_network: IPv4Network | None,
) -> Keeper:
    """Return the keeper of this host's rules."""
    rules = wanted(
        network,
        subnet,
        masquerade=options.ip_masq,
        forward=options.iptables_forward_rules,
        random_fully=not options.ip_masq_fully_random_disable,
        instance=instance_of(options.subnet_file),
        former_network=former_network,
    )
    return Keeper(
        rules,
        lambda commands: choose(rules, enable_nftables, commands),
        options.iptables_resync,
    )
