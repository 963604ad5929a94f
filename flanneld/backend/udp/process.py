"""The daemon's side of the tunnel's process: start it, tell it the peers, end it. No numpy."""

import enum
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Network
from pathlib import Path

from flanneld.backend.udp import control
from flanneld.backend.udp.control import Message, Op, Settings
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.descriptors import Descriptors
from flanneld.backend.udp.peers import PeerRoute
from flanneld.clock import now
from flanneld.errors import BackendError
from flanneld.logs import verbose

log = logging.getLogger(__name__)

# Importing numpy takes 0.2 s, on a machine that boots much more.
START_SECONDS = 30.0
# The tunnel looks at its control socket after some milliseconds even under full load.
ANSWER_SECONDS = 5.0
# A process that was killed is gone at once, if it may be killed.
END_SECONDS = 1.0

_TOP = Path(__file__).resolve().parents[3]
# Of the environment only what Python and its libraries need: the daemon's has the store's password.
_NEEDED = ("PATH", "LANG", "LC_", "LD_", "PYTHON")
# Of what it wrote to its standard error, the end.
_LAST_WORDS = 4000


class TunnelError(BackendError):
    """The tunnel's process has ended, cannot be started or does not answer. Start it again."""


class Exit(enum.Enum):
    """Why the process ended."""

    CLOSED = "it was told to"
    TUN_LOST = "its TUN device was deleted"
    DIED = "it died"


class TunnelProcess:
    """One run of the tunnel's process. Not thread-safe: it belongs to the backend's thread.

    That thread must outlive it: the kernel ends the process with the thread that started it.
    Nothing here waits for the tunnel but `wait_ready` and `wait_settled`: a command is sent, and
    its answer is taken by `dispatch`. The tunnel forwards nothing before its first `replace_peers`.
    """

    def __init__(
        self,
        descriptors: Descriptors,
        *,
        port: int,
        mtu: int,
        source_check: bool = True,
    ) -> None:
        """``port`` is that of all tunnels, ``mtu`` the TUN device's. Raises TunnelError."""
        self.ready = False
        """It listens to commands."""
        self.counters = Counters()
        """As of the last answer to `ask_counters`."""
        self._number = 0
        self._closed = False
        # Commands without an answer yet, and until when there should be one.
        self._open: dict[int, float] = {}
        try:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise TunnelError(f"cannot be started: {error.strerror}") from error
        try:
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
            # What it says before it can use the control socket; a file does not fill up as a pipe.
            self._words = os.memfd_create("flannel-udp", os.MFD_CLOEXEC)
            try:
                self._process = _start(settings, self._words)
            except OSError:
                os.close(self._words)
                raise
        except OSError as error:
            self._control.close()
            raise TunnelError(f"cannot be started: {error.strerror}") from error
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_settled(self) -> bool:
        """Whether every command has been carried out."""
        return not self._open

    def fileno(self) -> int:
        """Return what becomes readable when there is something for `dispatch`, or it has ended."""
        return self._control.fileno()

    def deadline(self) -> float | None:
        """Return when the oldest command must have been answered; None if all have been."""
        return min(self._open.values(), default=None)

    def set_peers(self, routes: Iterable[PeerRoute]) -> None:
        """Add peers, or change where known subnets are. Raises TunnelError, as all commands do."""
        number = self._next()
        self._send(number, control.route_messages(Op.SET, number, list(routes)))

    def remove_peers(self, subnets: Iterable[IPv4Network]) -> None:
        """Remove the routes to these subnets; unknown ones do not matter."""
        number = self._next()
        self._send(number, control.subnet_messages(number, subnets))

    def replace_peers(self, routes: Iterable[PeerRoute]) -> None:
        """Make these all the peers there are, in one step."""
        number = self._next()
        self._send(number, control.route_messages(Op.REPLACE, number, list(routes)))

    def set_fast_path(self, secret: bytes) -> None:
        """Tell it the fast path's secret, or by an empty one that there is none."""
        number = self._next()
        self._send(number, iter([Message(Op.FAST_PATH, number, secret)]))

    def ask_counters(self) -> None:
        """Ask for the counters as of now."""
        number = self._next()
        self._send(number, iter([Message(Op.STATISTICS, number)]))

    def dispatch(self) -> None:
        """Take the answers, and log what the tunnel has to say. Raises TunnelError.

        Also where an answer is overdue.
        """
        while True:
            try:
                data = self._control.recv(control.LONGEST_MESSAGE, socket.MSG_DONTWAIT)
            except (BlockingIOError, ConnectionError):
                break
            if not data:
                break
            try:
                self._take(Message.decode(data))
            except control.BadMessage as error:
                raise TunnelError(str(error)) from error
        deadline = self.deadline()
        if deadline is not None and now() > deadline:
            raise TunnelError(f"it does not answer for {ANSWER_SECONDS:.0f} s")

    def wait_ready(self, timeout: float = START_SECONDS) -> None:
        """Wait until it listens to commands. Raises TunnelError."""
        self._wait(lambda: self.ready, timeout)

    def wait_settled(self, timeout: float = ANSWER_SECONDS) -> None:
        """Wait until every command has been carried out. Raises TunnelError."""
        self._wait(lambda: self.is_settled, timeout)

    def poll(self) -> Exit | None:
        """Return why it has ended, None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        if self._closed:
            return Exit.CLOSED
        return Exit.TUN_LOST if status == control.TUN_LOST else Exit.DIED

    def ending(self) -> str:
        """Return how it ended by itself, for the log; empty if it still runs or was closed."""
        try:
            # Its end of the socket closes a moment before it has ended.
            status = self._process.wait(0.1)
        except subprocess.TimeoutExpired:
            return ""
        if self._closed:
            return ""
        start = max(0, os.fstat(self._words).st_size - _LAST_WORDS)
        words = os.pread(self._words, _LAST_WORDS, start)
        lines = words.decode(errors="replace").strip().splitlines()
        for line in lines:
            log.log(verbose(1), "udp tunnel: %s", line)
        last = f": {lines[-1]}" if lines else ""
        if status < 0:
            return f"killed by {signal.Signals(-status).name}{last}"
        return f"exit status {status}{last}"

    def close(self) -> None:
        """End it at once, whatever it does: it holds nothing worth waiting for. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        self._control.close()
        os.close(self._words)
        try:
            self._process.kill()
            self._process.wait(END_SECONDS)
        except (PermissionError, subprocess.TimeoutExpired) as error:
            # It is another user's: that takes CAP_KILL, unless it ends with its end of the socket.
            log.error("The udp tunnel (process %d) cannot be ended: %s", self.pid, error)

    def _next(self) -> int:
        self._number = (self._number + 1) & 0xFFFFFFFF
        return self._number

    def _send(self, number: int, messages: Iterator[Message]) -> None:
        self._open[number] = now() + ANSWER_SECONDS
        for message in messages:
            # Ten thousand peers are more than the buffer holds: a tunnel that reads makes room.
            if not select.select([], [self._control], [], ANSWER_SECONDS)[1]:
                raise TunnelError("it does not read")
            try:
                self._control.send(message.encode())
            except OSError as error:
                raise TunnelError(f"it cannot be told anything: {error.strerror}") from error

    def _wait(self, done: Callable[[], bool], timeout: float) -> None:
        end = now() + timeout
        self.dispatch()
        while not done():
            if not select.select([self._control], [], [], max(0.0, end - now()))[0]:
                raise TunnelError("no answer")
            if self.poll() is not None:
                raise TunnelError("it has ended")
            self.dispatch()

    def _take(self, message: Message) -> None:
        if message.op is Op.SAY:
            log.warning("%s", message.body.decode(errors="replace"))
        elif message.op is Op.READY:
            self.ready = True
        elif message.op is Op.DONE:
            self._open.pop(message.number, None)
            if message.body:
                self.counters = Counters.decode(message.body)


def _start(settings: Settings, words: int) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name.startswith(_NEEDED)}
    if _TOP.name not in ("site-packages", "dist-packages"):
        # Run from its source: the tunnel must be of the same.
        path = os.pathsep.join(filter(None, (str(_TOP), environment.get("PYTHONPATH"))))
        environment["PYTHONPATH"] = path
    descriptors = (settings.tun, settings.socket, settings.control, settings.icmp)
    return subprocess.Popen(
        # -P: not from whatever directory we are in.
        [sys.executable, "-P", "-m", "flanneld.backend.udp", *settings.arguments()],
        stdin=subprocess.DEVNULL,
        stdout=words,
        stderr=words,
        cwd="/",
        env=environment,
        pass_fds=[fd for fd in descriptors if fd >= 0],
    )
