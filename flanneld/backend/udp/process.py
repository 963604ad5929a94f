"""The daemon's side of the tunnel's process: start it, tell it the peers, ask it, end it.

The daemon opens the descriptors and keeps them, so that a tunnel that died can be started again
on the same device without a packet less than necessary. No numpy.
"""

import enum
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from flanneld.backend.udp import control, tun
from flanneld.backend.udp.control import Message, Op, Settings
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.tun import ALL, Offload
from flanneld.errors import BackendError

log = logging.getLogger(__name__)

# Importing numpy takes 0.2 s, on a machine that boots much more.
START_SECONDS = 30.0
# The tunnel looks at its control socket after some milliseconds even under full load.
ANSWER_SECONDS = 5.0
_TOP = Path(__file__).resolve().parents[3]


class TunnelError(BackendError):
    """The tunnel's process has ended or does not answer. Start it again."""


class Exit(enum.Enum):
    """Why the process ended."""

    CLOSED = "it was told to"
    TUN_LOST = "its TUN device was deleted"
    DIED = "it died"


@dataclass(slots=True)
class Descriptors:
    """What the tunnel works on. Outlives the process; the TUN device lives as long as it does."""

    tun: tun.Tun
    udp: socket.socket
    icmp: socket.socket | None
    offload: Offload

    @classmethod
    def open(
        cls,
        address: IPv4Address,
        port: int,
        *,
        pattern: str = "flannel%d",
        wanted: Offload = ALL,
    ) -> "Descriptors":
        """Open all; the device has no address and is down. Raises DeviceError.

        ``wanted`` leaves out offloads; those this kernel lacks are logged, one line each.
        """
        device = tun.open_tun(log.warning, pattern, wanted)
        try:
            udp, offload = tun.open_socket(log.warning, address, port, device.offload)
        except BaseException:
            os.close(device.fd)
            raise
        try:
            return cls(device, udp, tun.open_icmp(log.warning), offload)
        except BaseException:
            udp.close()
            os.close(device.fd)
            raise

    def reopen_tun(self, pattern: str = "flannel%d", wanted: Offload = ALL) -> None:
        """Make the TUN device anew after it was deleted. Raises DeviceError."""
        device = tun.open_tun(log.warning, pattern, wanted)
        os.close(self.tun.fd)
        self.tun = device

    def tun_lost(self) -> bool:
        """Tell whether the TUN device has been deleted."""
        return tun.is_lost(self.tun.fd)

    def close(self) -> None:
        """Close all; the TUN device goes with it. Not to be repeated."""
        os.close(self.tun.fd)
        self.udp.close()
        if self.icmp is not None:
            self.icmp.close()


class TunnelProcess:
    """One run of the tunnel's process. Not thread-safe: it belongs to the backend's thread.

    That thread must outlive it: the kernel ends the process with the thread that started it.
    ``port`` is that of all tunnels, ``mtu`` the TUN device's.
    """

    def __init__(
        self,
        descriptors: Descriptors,
        *,
        port: int,
        mtu: int,
        source_check: bool = True,
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        self._number = 0
        self._closed = False
        settings = Settings(
            tun=descriptors.tun.fd,
            socket=descriptors.udp.fileno(),
            control=theirs.fileno(),
            icmp=descriptors.icmp.fileno() if descriptors.icmp else -1,
            port=port,
            mtu=mtu,
            offload=int(descriptors.offload),
            source_check=source_check,
        )
        path = os.pathsep.join(filter(None, (str(_TOP), os.environ.get("PYTHONPATH"))))
        try:
            # -P: not from whatever directory we are in.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flanneld.backend.udp.tunnel", *settings.arguments()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=[
                    fd
                    for fd in (settings.tun, settings.socket, settings.control, settings.icmp)
                    if fd >= 0
                ],
            )
        except OSError as error:
            ours.close()
            raise TunnelError(f"the udp tunnel cannot be started: {error}") from error
        finally:
            theirs.close()
        self.ready = False
        """Packets are forwarded."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fileno(self) -> int:
        """Return what becomes readable when there is something for `dispatch`, or it has ended."""
        return self._control.fileno()

    def wait_ready(self, timeout: float = START_SECONDS) -> None:
        """Wait until packets are forwarded. Raises TunnelError."""
        deadline = time.monotonic() + timeout
        while not self.ready:
            self._take(self._receive(deadline))

    def set_peers(self, routes: Iterable[PeerRoute]) -> None:
        """Add peers, or change where known subnets are. Raises TunnelError, as all of these do."""
        number = self._next()
        self._command(control.route_messages(Op.SET, number, list(routes)), number)

    def remove_peers(self, subnets: Iterable[IPv4Network]) -> None:
        """Remove the routes to these subnets; unknown ones do not matter."""
        number = self._next()
        self._command(control.subnet_messages(number, subnets), number)

    def replace_peers(self, routes: Iterable[PeerRoute]) -> None:
        """Make these all the peers there are, in one step."""
        number = self._next()
        self._command(control.route_messages(Op.REPLACE, number, list(routes)), number)

    def statistics(self) -> Counters:
        """Return the counters as of now."""
        number = self._next()
        return Counters.decode(self._command(iter([Message(Op.STATISTICS, number)]), number))

    def dispatch(self) -> None:
        """Log what the tunnel has to say; does not wait. Raises TunnelError."""
        while True:
            try:
                data = self._control.recv(control.LONGEST_MESSAGE, socket.MSG_DONTWAIT)
            except (BlockingIOError, ConnectionError):
                return
            if not data:
                return
            try:
                self._take(Message.decode(data))
            except control.BadMessage as error:
                raise self._failed(str(error)) from error

    def poll(self) -> Exit | None:
        """Return why it has ended, None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        if self._closed:
            return Exit.CLOSED
        self.dispatch()
        # tunnel.TUN_LOST, which cannot be imported here without numpy.
        return Exit.TUN_LOST if status == 3 else Exit.DIED

    def ending(self) -> str:
        """Return how it ended, for the log; empty while it runs."""
        status = self._process.poll()
        if status is None:
            return ""
        if status >= 0:
            return f"exit status {status}"
        return f"killed by {signal.Signals(-status).name}"

    def kill(self) -> None:
        """End it at once, whatever it does. Safe to repeat."""
        self._process.kill()
        self.close()

    def close(self, timeout: float = 2.0) -> None:
        """End it. Safe to repeat."""
        self._closed = True
        self._control.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _next(self) -> int:
        self._number = (self._number + 1) & 0xFFFFFFFF
        return self._number

    def _command(self, messages: Iterator[Message], number: int) -> bytes:
        """Send a command and return its answer."""
        deadline = time.monotonic() + ANSWER_SECONDS
        for message in messages:
            self._wait(select.POLLOUT, deadline)
            try:
                self._control.send(message.encode())
            except OSError as error:
                raise self._failed(str(error)) from error
        while True:
            answer = self._receive(deadline)
            if answer.op is Op.DONE and answer.number == number:
                return answer.body
            self._take(answer)

    def _receive(self, deadline: float) -> Message:
        self._wait(select.POLLIN, deadline)
        try:
            data = self._control.recv(control.LONGEST_MESSAGE)
        except OSError as error:
            raise self._failed(str(error)) from error
        if not data:
            raise self._failed("the process has ended")
        try:
            return Message.decode(data)
        except control.BadMessage as error:
            raise self._failed(str(error)) from error

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._control, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise self._failed("no answer")

    def _take(self, message: Message) -> None:
        if message.op is Op.SAY:
            log.warning("%s", message.body.decode(errors="replace"))
        elif message.op is Op.READY:
            self.ready = True

    def _failed(self, why: str) -> TunnelError:
        return TunnelError(f"udp tunnel (process {self.pid}): {why}")
