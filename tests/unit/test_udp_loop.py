"""The tunnel's loop, with a poll and a clock that are the test's own."""

import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from types import SimpleNamespace

import pytest
from test_udp_paths import expected, tso
from test_udp_segment import super_packet

from flanneld.backend.udp import transmit, tunnel
from flanneld.backend.udp.control import Op, Settings, route_messages, subnet_messages
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.tun import ALL

PEER = "127.0.0.2"


class Ends:
    """A tunnel and what its descriptors lead to; in its device one message is one packet."""

    def __init__(self, stack: ExitStack) -> None:
        pair = (socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel, device = map(stack.enter_context, socket.socketpair(*pair))
        self.daemon, control = map(stack.enter_context, socket.socketpair(*pair))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        port = udp.getsockname()[1]
        self.peer = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.peer.bind((PEER, port))
        for end in (self.kernel, device, control, udp, self.peer):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.udp, self.control = udp.detach(), control.detach()
        self.tunnel = tunnel.Tunnel(
            Settings(
                tun=device.fileno(),
                socket=self.udp,
                control=self.control,
                icmp=-1,
                port=port,
                mtu=1472,
                offload=int(ALL),
                source_check=True,
            )
        )
        stack.enter_context(self.tunnel._udp)
        stack.enter_context(self.tunnel._control)
        route = PeerRoute(IPv4Network("10.5.2.0/24"), IPv4Address(PEER))
        for message in route_messages(Op.REPLACE, 1, [route]):
            self.daemon.send(message.encode())

    def arrived(self) -> list[bytes]:
        """Return what the peer has received."""
        found = []
        while True:
            try:
                found.append(self.peer.recv(2000))
            except BlockingIOError:
                return found


@pytest.fixture
def ends() -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack)


@dataclass
class Poll:
    """Says that the socket is readable in so many turns, then that the daemon is gone."""

    ends: Ends
    turns: int
    now: float = 1000.0

    def register(self, fd: int, events: int) -> None:
        """See select.poll."""

    def poll(self, _timeout: int | None) -> list[tuple[int, int]]:
        """See select.poll. Fifty microseconds pass."""
        self.now += 0.00005
        self.turns -= 1
        if self.turns >= 0:
            return [(self.ends.udp, select.POLLIN)]
        self.ends.daemon.close()
        return [(self.ends.control, select.POLLHUP)]


@pytest.mark.parametrize(("turns", "sent"), [(10, 44), (40, 45)])
def test_what_waits_for_more_goes_although_datagrams_keep_coming(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, turns: int, sent: int
) -> None:
    """The rest of a long super-packet waits a millisecond for the next, not for silence."""
    poll = Poll(ends, turns)
    monkeypatch.setattr(select, "poll", lambda: poll)
    for module in (tunnel, transmit):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: poll.now))
    packet = super_packet(6, bytes(1420 * 45))
    ends.kernel.send(tso(packet, 1420))
    ends.tunnel.run()
    assert ends.arrived() == expected([packet], 1420)[:sent]


def test_what_waits_goes_before_its_peer_does(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the address of one that is a peer no more, however long the next turn takes."""
    left = [3]
    before: list[int] = []

    def poll(_timeout: int | None) -> list[tuple[int, int]]:
        left[0] -= 1
        if left[0] > 0:
            return [(ends.udp, select.POLLIN)]
        if left[0] == 0:
            before.append(len(ends.arrived()))
            for message in subnet_messages(2, [IPv4Network("10.5.2.0/24")]):
                ends.daemon.send(message.encode())
            return [(ends.control, select.POLLIN)]
        before.append(len(ends.arrived()))
        ends.daemon.close()
        return [(ends.control, select.POLLHUP)]

    monkeypatch.setattr(
        select, "poll", lambda: SimpleNamespace(register=lambda *_: None, poll=poll)
    )
    for module in (tunnel, transmit):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    ends.kernel.send(tso(super_packet(6, bytes(1420 * 45)), 1420))
    ends.tunnel.run()
    assert before == [44, 1]
