"""Whom the tunnel's process greets, and with what."""

import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

import udp_reference as reference

from flanneld.backend.udp import greeting, program_steps
from flanneld.backend.udp.greeting import EVERY, FORGOTTEN, SELDOM, Greeter
from flanneld.backend.udp.peers import PeerRoute, RouteTable


@dataclass
class Icmp:
    """Stands in for the raw socket."""

    fails: bool = False
    sent: list[tuple[bytes, str]] = field(default_factory=list)

    def sendto(self, data: bytes, address: tuple[str, int]) -> None:
        if self.fails:
            raise OSError
        self.sent.append((data, address[0]))


def table(count: int) -> RouteTable:
    routes = RouteTable(8285)
    routes.set(
        PeerRoute(IPv4Network((0x0A050000 + (n << 8), 24)), IPv4Address(0x0A610001 + n))
        for n in range(count)
    )
    return routes


def make(icmp: Icmp, clock: list[float]) -> Greeter:
    sockets: socket.socket = icmp  # type: ignore[assignment]  # as far as it is used
    return Greeter(sockets, lambda: clock[0])


def test_an_echo_request() -> None:
    data = greeting.echo_request(258)
    assert data[:2] == b"\x08\0"
    assert data[4:8] == b"fl\x01\x02"
    assert reference.ones_sum(data) == 0xFFFF


def test_each_peer_is_greeted_by_its_device_and_not_too_often() -> None:
    icmp, clock, routes = Icmp(), [100.0], table(3)
    greeter = make(icmp, clock)
    one, two = (routes.lookup(bytes([10, 5, n, 9])) for n in (1, 2))
    assert one is not None
    assert two is not None
    greeter.greet([one])
    greeter.greet([one, two])
    assert [to for _, to in icmp.sent] == ["10.5.1.0", "10.5.2.0"]
    clock[0] += EVERY
    greeter.greet([one])
    assert [to for _, to in icmp.sent] == ["10.5.1.0", "10.5.2.0", "10.5.1.0"]
    assert len({data for data, _ in icmp.sent}) == 3


def test_who_is_greeted_often_is_greeted_less_often() -> None:
    icmp, clock = Icmp(), [100.0]
    greeter, peer = make(icmp, clock), table(1).lookup(bytes([10, 5, 0, 1]))
    assert peer is not None

    def times(seconds: int) -> list[float]:
        found = []
        for _ in range(seconds * 8):
            before = len(icmp.sent)
            greeter.greet([peer])
            if len(icmp.sent) > before:
                found.append(clock[0] - 100.0)
            clock[0] += 0.125
        return found

    assert times(32) == [0.0, 2.0, 6.0, 14.0, 22.0, 30.0]
    # Long enough before it is forgotten that it has a fast path.
    assert SELDOM * 1000 + program_steps.SLOW_EVERY_MS < program_steps.FAST_MS
    clock[0] += FORGOTTEN + SELDOM
    clock[0] = 200.0
    assert times(4) == [100.0, 102.0]


def test_what_cannot_be_sent_is_no_error() -> None:
    icmp = Icmp(fails=True)
    peer = table(1).lookup(bytes([10, 5, 0, 1]))
    assert peer is not None
    make(icmp, [0.0]).greet([peer])


def test_it_does_not_remember_without_end() -> None:
    routes, greeter = table(5000), make(Icmp(), [0.0])
    peers = [routes.lookup((0x0A050001 + (n << 8)).to_bytes(4, "big")) for n in range(5000)]
    greeter.greet(peer for peer in peers if peer is not None)
    assert len(greeter._due) <= greeting._REMEMBERED
