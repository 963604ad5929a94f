"""What systemd is told (sd_notify): READY, STATUS, WATCHDOG and STOPPING."""

import select
import time
from collections.abc import MutableMapping
from typing import Any

from flanneld.clock import now
from flanneld.heartbeat import take_watchdog_interval

# Seconds for a service manager that does not read.
READY_PATIENCE = 2.0


class Notifier:
    """Talks to the service manager, or to nobody if there is none. Safe for several threads.

    Never fails, and does not block but for a moment in `ready`: the daemon does not depend on who
    listens.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take NOTIFY_SOCKET out of ``environ``, so that no child process can speak for us.

        ``watchdog_interval`` is how many seconds the service manager waits for a sign of life,
        None if it does not.
        """
        self._notifier: Any = None
        self.watchdog_interval = take_watchdog_interval(environ)
        self._status = ""
        if environ.get("NOTIFY_SOCKET"):
            # Without the variable sdnotify would leave a socket open for nothing.
            import sdnotify

            self._notifier = sdnotify.SystemdNotifier()
            if self._notifier.socket is not None:
                # Its queue holds a dozen messages; a service manager that hangs must not stop us.
                self._notifier.socket.setblocking(False)
        else:
            self.watchdog_interval = None
        environ.pop("NOTIFY_SOCKET", None)

    def ready(self) -> None:
        """Say that the subnet file and the first peers are in place.

        This message alone is worth waiting for: without it the unit's start fails.
        """
        if self._notifier is not None and self._notifier.socket is not None:
            # Not by the socket's timeout: another thread may want to say goodbye meanwhile.
            end = now() + READY_PATIENCE
            while not self._has_room() and now() < end:
                time.sleep(READY_PATIENCE / 100)
            self._send("READY=1")

    def status(self, text: str) -> None:
        """Show one line in ``systemctl status``."""
        # sdnotify encodes Latin-1, systemd wants UTF-8: ASCII is both.
        line = text.encode("ascii", "replace").decode().replace("\n", " ")
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def watchdog(self) -> None:
        """Give the sign of life that the service manager's watchdog waits for."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the daemon is on its way out."""
        self._send("STOPPING=1")

    def _has_room(self) -> bool:
        """Tell whether the service manager's queue takes one more message."""
        return bool(select.select([], [self._notifier.socket], [], 0)[1])

    def _send(self, message: str) -> None:
        if self._notifier is not None:
            self._notifier.notify(message)
