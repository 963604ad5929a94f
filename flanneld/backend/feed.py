"""The lease events on their way from the store to a backend's loop."""

import logging
import os
import queue
import threading
from collections.abc import Sequence
from typing import TypeAlias

from flanneld.heartbeat import Pulse
from flanneld.logs import MANY, verbose
from flanneld.subnet.config import Config
from flanneld.subnet.lease import Lease
from flanneld.subnet.manager import SubnetManager
from flanneld.subnet.watch import LeaseEvent

log = logging.getLogger(__name__)

# A format and its arguments: of thousands of lines that are not written none is made, either.
Line: TypeAlias = tuple[str, *tuple[object, ...]]


class LeaseFeed:
    """Follows the leases in a thread of its own, and rings a bell when there is something."""

    def __init__(self, manager: SubnetManager, config: Config, own: Lease) -> None:
        """``own`` is this host's lease, which is not reported. Nothing is asked yet."""
        self._manager = manager
        self._config = config
        self._own = own
        self._inbox: queue.SimpleQueue[Sequence[LeaseEvent] | BaseException] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)

    def start(self, stop: threading.Event, pulse: Pulse) -> None:
        """Follow the leases until ``stop``, with this sign of life."""
        log.info("Watching for new subnet leases")
        work = (stop, pulse)
        threading.Thread(target=self._follow, args=work, name="leases", daemon=True).start()

    def fileno(self) -> int:
        """Return the descriptor that becomes readable with every batch and every `wake`."""
        return self._bell

    def wake(self) -> None:
        """Ring the bell. May be called by any thread and by a signal handler."""
        os.eventfd_write(self._bell, 1)

    def take(self) -> Sequence[LeaseEvent] | None:
        """Return the next batch, or None if there is none; does not wait.

        One for each ring, so that the caller's loop comes round between them, also while leases
        change faster than it takes them. Raises what ended the following.
        """
        try:
            os.eventfd_read(self._bell)
            batch = self._inbox.get_nowait()
        except (BlockingIOError, queue.Empty):
            return None
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def _follow(self, stop: threading.Event, pulse: Pulse) -> None:
        try:
            for batch in self._manager.watch_leases(self._config, self._own, stop, pulse):
                self._inbox.put(batch)
                self.wake()
        except BaseException as error:  # noqa: BLE001 - raised again in the backend's loop
            self._inbox.put(error)
            self.wake()


def log_changes(lines: Sequence[Line]) -> None:
    """Log which peers came and went; of many at once, only how many."""
    if len(lines) > MANY:
        log.info("%d subnets added or removed (-v=1 lists them)", len(lines))
    level = logging.INFO if len(lines) <= MANY else verbose(1)
    if log.isEnabledFor(level):
        for line in lines:
            log.log(level, *line)
