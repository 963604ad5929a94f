"""What the tunnel's process does, on the descriptors it has inherited.

One thread; it drains the TUN device and the socket in turn until both are empty, then waits. It
lives as long as the daemon at the other end of the control socket.
"""

import errno
import gc
import os
import select
import socket
import sys
import time

from flanneld import memory
from flanneld.backend.udp import control, icmp, privileges
from flanneld.backend.udp.buffers import Buffers
from flanneld.backend.udp.control import ENDED, FAILED, TUN_LOST, Message, Op, Settings
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.greeting import Greeter
from flanneld.backend.udp.peers import PeerRoute, RouteTable
from flanneld.backend.udp.receive import Receiver
from flanneld.backend.udp.transmit import PATIENCE_MS, Transmitter
from flanneld.backend.udp.tun import Offload

# Under load the control socket is looked at after so many turns, some milliseconds.
_TURNS = 32
_RECEIVE_BYTES = 1 << 16
# A packet after such a pause is taken to be no burst's first. A wrong guess costs one more call.
_ALONE_SECONDS = 0.0001


class TunLost(Exception):
    """The TUN device has been deleted."""


class Tunnel:
    """Everything the process holds."""

    def __init__(self, settings: Settings) -> None:
        self._tun = settings.tun
        self._udp = socket.socket(fileno=settings.socket)
        self._control = socket.socket(fileno=settings.control)
        self._icmp = socket.socket(fileno=settings.icmp) if settings.icmp >= 0 else None
        self._counters = Counters()
        self._routes = RouteTable(settings.port)
        self._greeter: Greeter | None = None
        self._limit = icmp.RateLimit(icmp.RATE, icmp.BURST, time.monotonic)
        # Routes of a command whose end has not come yet.
        self._parts: list[PeerRoute] = []
        self._knows_all = False
        offload = Offload(settings.offload)
        buffers = Buffers()
        self._transmitter = Transmitter(
            self._tun,
            self._udp,
            self._routes,
            self._counters,
            buffers=buffers,
            mtu=settings.mtu,
            segments=Offload.SEGMENT in offload,
            answer=self._answer,
            say=self.say,
        )
        self._receiver = Receiver(
            self._tun,
            self._udp,
            self._routes,
            self._counters,
            buffers=buffers,
            source_check=settings.source_check,
            join_tcp=Offload.JOIN_TCP in offload,
            join_udp=Offload.JOIN_UDP in offload,
            expired=lambda packet: self._answer(icmp.TIME_EXCEEDED, packet),
            say=self.say,
        )

    def run(self) -> None:
        """Forward packets until the daemon closes its end. Raises TunLost."""
        self._send(Message(Op.READY))
        # Until then every destination would be unreachable, and its senders be told so. The packets
        # wait in the device's queue.
        while not self._knows_all:
            select.select([self._control], [], [])
            if not self._obey():
                return
        poll = select.poll()
        poll.register(self._tun, select.POLLIN)
        poll.register(self._udp, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        tun_fd, udp_fd = self._tun, self._udp.fileno()
        last = 0.0
        while True:
            tun = udp = command = 0
            ready = poll.poll(PATIENCE_MS if self._transmitter.may_wait else None)
            for fd, event in ready:
                if fd == tun_fd:
                    tun = event
                elif fd == udp_fd:
                    udp = event
                else:
                    command = event
            if tun & (select.POLLERR | select.POLLNVAL):
                raise TunLost
            now = time.monotonic()
            # Datagrams that keep coming in are no reason to wait for longer.
            if not ready or self._transmitter.is_overdue(now):
                self._transmitter.flush()
            try:
                self._forward(tun, udp, alone=now - last > _ALONE_SECONDS)
            except OSError as error:
                # Reading and writing differ in what they say of a device that is gone.
                if error.errno in (errno.EBADFD, errno.EFAULT):
                    raise TunLost from error
                raise
            last = now
            if command and not self._obey():
                return

    def _forward(self, tun: int, udp: int, *, alone: bool) -> None:
        """Forward until both sides are empty, or it is time to look at the control socket.

        ``tun`` and ``udp`` say which side there is something on. ``alone``: nothing came for a
        while, so this is one packet, and who waits for it should not wait for us to look for more.
        """
        if alone:
            if tun:
                self._transmitter.one()
            if udp:
                self._receiver.one()
        else:
            transmit, receive = self._transmitter.turn, self._receiver.turn
            for _ in range(_TURNS):
                more = transmit()
                if not receive() and not more:
                    break
        # Not before: what comes while the other side has its turn may still be joined.
        if not self._transmitter.may_wait:
            self._transmitter.flush()
        self._receiver.flush()
        if self._greeter is not None and self._transmitter.sent_to:
            self._greeter.greet(self._transmitter.sent_to)
            self._transmitter.sent_to.clear()

    def say(self, text: str) -> None:
        """Have the daemon log a line."""
        self._send(Message(Op.SAY, body=text.encode()))

    def _answer(self, kind: tuple[int, int], packet: memoryview) -> None:
        """Send an ICMP error about a packet to its sender, if that is allowed."""
        if not icmp.may_answer(packet):
            return
        counters = self._counters
        if self._icmp is None or not self._limit.allows():
            counters.icmp_not_sent += 1
            return
        sender = socket.inet_ntoa(packet[12:16])
        try:
            self._icmp.sendto(icmp.error(kind, packet), (sender, 0))
        except OSError:
            counters.icmp_not_sent += 1
        else:
            if kind == icmp.NET_UNREACHABLE:
                counters.icmp_unreachable += 1
            else:
                counters.icmp_time_exceeded += 1

    # The control socket

    def _send(self, message: Message) -> None:
        try:
            self._control.send(message.encode())
        except OSError:
            # The daemon is gone or does not read; the first ends us soon, a line may be lost.
            return

    def _obey(self) -> bool:
        """Carry out all commands that have come. Returns False when the daemon is gone."""
        while True:
            try:
                data = self._control.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if not data:
                return False
            self._carry_out(Message.decode(data))

    def _carry_out(self, message: Message) -> None:
        body = b""
        if message.op in (Op.SET, Op.REMOVE, Op.REPLACE):
            self._parts += control.routes(message.body)
            if message.more:
                return
            routes, self._parts = self._parts, []
            # What waits is for a peer that may be gone then.
            self._transmitter.flush()
            if message.op is Op.SET:
                self._routes.set(routes)
            elif message.op is Op.REMOVE:
                self._routes.remove(route.subnet for route in routes)
            else:
                self._routes.replace(routes)
                self._knows_all = True
            self._counters.peers = len(self._routes)
        elif message.op is Op.FAST_PATH:
            self._receiver.secret = message.body
            self._greeter = None
            if message.body and self._icmp is not None:
                self._greeter = Greeter(self._icmp, time.monotonic)
        elif message.op is Op.STATISTICS:
            body = self._counters.encode()
        else:
            raise control.BadMessage(f"{message.op.name} is not for the tunnel")
        self._send(Message(Op.DONE, message.number, body))


def main(arguments: list[str]) -> int:
    """Run the tunnel; returns the process's exit status."""
    settings = Settings.parse(arguments)
    os.set_blocking(settings.control, False)
    tunnel = Tunnel(settings)
    for line in privileges.drop():
        tunnel.say(line)
    # Nothing here makes cycles, and looking for them costs 8 % of the throughput.
    gc.collect()
    # What was only needed to import numpy: more than 1 MB.
    memory.give_back()
    gc.freeze()
    gc.disable()
    try:
        tunnel.run()
    except TunLost:
        return TUN_LOST
    except control.BadMessage as error:
        print(f"udp tunnel: {error}", file=sys.stderr)
        return FAILED
    return ENDED
