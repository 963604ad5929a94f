"""What systemd is told (sd_notify): READY, STATUS, WATCHDOG and STOPPING."""

import select
import threading
from collections.abc import MutableMapping
from typing import Any

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
        self._leaving = False
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

        This message alone must arrive: without it the unit's start fails. If it cannot be said
        within `READY_PATIENCE`, it is said by a thread as soon as the service manager reads.
        """
        if self._notifier is not None and self._notifier.socket is not None:
            if self._wait_for_room(READY_PATIENCE):
                self._send("READY=1")
            else:
                threading.Thread(target=self._ready_later, name="ready", daemon=True).start()

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
        self._leaving = True
        self._send("STOPPING=1")

    def _ready_later(self) -> None:
        while not self._leaving:
            if self._wait_for_room(READY_PATIENCE):
                self._send("READY=1")
                # What was said meanwhile was lost. READY=1 may have taken the only room.
                if self._wait_for_room(READY_PATIENCE) and not self._leaving:
                    self._send(f"STATUS={self._status}")
                return

    def _wait_for_room(self, seconds: float) -> bool:
        """Wait until the service manager's queue takes one more message; False if it does not.

        Not by the socket's timeout: another thread may want to say goodbye meanwhile.
        """
        return bool(select.select([], [self._notifier.socket], [], seconds)[1])

    def _send(self, message: str) -> None:
        if self._notifier is not None:
            self._notifier.notify(message)
