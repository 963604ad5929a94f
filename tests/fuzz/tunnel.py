"""The udp tunnel's two paths, fed with anything, against the plain implementation of the tests.

The system calls that read and write the TUN device are replaced, and so is the UDP socket.
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from unittest import mock

import udp_reference as reference

from flanneld.backend.udp.buffers import Buffers
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.packet import NEEDS_CSUM, VNET, VNET_LEN
from flanneld.backend.udp.peers import PeerRoute, RouteTable
from flanneld.backend.udp.receive import Receiver
from flanneld.backend.udp.transmit import Transmitter

MTU = 1472
PEERS = {"10.97.0.2": IPv4Network("10.5.2.0/24"), "10.97.0.3": IPv4Network("10.5.3.0/24")}
SENDERS = [*PEERS, "10.97.0.77"]

# Sender, how often, size of each datagram (0: it is one), length of what follows.
RECORD = struct.Struct("!BBHH")
# Bytes in one run; enough for some super-packets.
LARGEST_RUN = 150_000


def routes() -> RouteTable:
    table = RouteTable(8285)
    table.set(PeerRoute(subnet, IPv4Address(ip)) for ip, subnet in PEERS.items())
    return table


@dataclass
class Incoming:
    """A UDP socket with datagrams to read."""

    left: list[tuple[bytes, int, str]]

    def recvmsg_into(
        self, buffers: list[memoryview], _size: int
    ) -> tuple[int, list[tuple[int, int, bytes]], int, tuple[str, int]]:
        if not self.left:
            raise BlockingIOError
        data, size, sender = self.left.pop(0)
        buffers[0][: len(data)] = data
        control = [(socket.IPPROTO_UDP, 104, struct.pack("=i", size))] if size else []
        return len(data), control, 0, (sender, 1234)


def records(data: bytes) -> Iterator[tuple[bytes, int, str]]:
    """Read the input: (what one call receives, size of each datagram in it or 0, sender)."""
    at = total = 0
    while at + RECORD.size <= len(data):
        sender, times, size, length = RECORD.unpack_from(data, at)
        at += RECORD.size
        body = data[at : at + length]
        at += len(body)
        datagram = (body * (1 + times % 64))[:65507] if size else body
        for _ in range(1 if size else 1 + times % 64):
            total += len(datagram) + 1
            if total > LARGEST_RUN:
                return
            yield datagram, size, SENDERS[sender % len(SENDERS)]


def receive(data: bytes) -> None:
    """What is written to the device are the packets that were admitted, in order, and no others."""
    datagrams = list(records(data))
    expected, drops = _admitted(datagrams)
    counters, expired, frames = Counters(), [], []
    said: list[str] = []

    def write(_fd: int, parts: list[bytes]) -> int:
        frames.append(b"".join(parts))
        return len(frames[-1])

    receiver = Receiver(
        -1, Incoming(datagrams), routes(), counters,  # type: ignore[arg-type]  # a double
        buffers=Buffers(), source_check=True, join_tcp=True, join_udp=True,
        expired=lambda packet: expired.append(bytes(packet)), say=said.append,
    )  # fmt: skip
    with mock.patch("os.writev", write):
        for _ in range(len(datagrams) + 1):
            receiver.one()
            if not receiver.turn():
                break
        receiver.flush()
    written = [packet for frame in frames for packet in _cut(frame)]
    assert [packet[12:] for packet in written] == [packet[12:] for packet in expected]
    # The TTL; where packets were joined their ids do not matter.
    assert [packet[8] for packet in written] == [packet[8] - 1 for packet in expected]
    assert len(expired) == drops.get("ttl", 0)
    assert not said
    assert {name: count for name, count in counters.drops.items() if count} == drops
    assert counters.tun_written_packets == len(expected)
    assert counters.udp_received_packets == len(expected) + sum(drops.values())


def _admitted(datagrams: list[tuple[bytes, int, str]]) -> tuple[list[bytes], dict[str, int]]:
    """Return the packets that may pass, and how many of the others there are for each reason."""
    passed: list[bytes] = []
    drops: dict[str, int] = {}
    for datagram, size, sender in datagrams:
        pieces = [datagram]
        if 0 < size < len(datagram):
            pieces = [datagram[at : at + size] for at in range(0, len(datagram), size)]
        for packet in pieces:
            reason = _reason(packet, sender)
            if reason:
                drops[reason] = drops.get(reason, 0) + 1
            else:
                passed.append(packet[: int.from_bytes(packet[2:4], "big")])
    return passed, drops


def _reason(packet: bytes, sender: str) -> str:
    if sender not in PEERS:
        return "unknown_peer"
    if len(packet) < 20:
        return "malformed"
    if packet[0] >> 4 != 4:
        return "not_ipv4"
    if not 20 <= (packet[0] & 15) * 4 <= int.from_bytes(packet[2:4], "big") <= len(packet):
        return "malformed"
    if IPv4Address(packet[12:16]) not in PEERS[sender]:
        return "wrong_source"
    return "ttl" if packet[8] <= 1 else ""


def _cut(frame: bytes) -> list[bytes]:
    """Return the packets of a frame as the kernel would take them."""
    flags, kind, _, gso, _, _ = VNET.unpack_from(frame)
    packet = frame[VNET_LEN:]
    assert int.from_bytes(packet[2:4], "big") == len(packet)
    if kind == 0:
        assert flags == 0
        return [packet]
    assert flags == NEEDS_CSUM
    assert (kind, packet[9]) in ((1, 6), (5, 17))
    return reference.segment(packet, gso)


@dataclass
class Outgoing:
    """A UDP socket that keeps what is sent."""

    sent: list[tuple[bytes, str]] = field(default_factory=list)

    def sendmsg(
        self,
        pieces: list[bytes],
        control: list[tuple[int, int, bytes]],
        _: int,
        to: tuple[str, int],
    ) -> int:
        data = b"".join(pieces)
        size = struct.unpack("=H", control[0][2])[0]
        packets = [data[at : at + size] for at in range(0, len(data), size)]
        assert len(packets) <= 64
        assert len(data) <= 65507
        self.sent += [(packet, to[0]) for packet in packets]
        return len(data)

    def sendto(self, packet: bytes, to: tuple[str, int]) -> int:
        self.sent.append((bytes(packet), to[0]))
        return len(packet)


def frames_in(data: bytes) -> list[bytes]:
    """Read the input: frames of a TUN device, a virtio header and a packet each."""
    frames: list[bytes] = []
    at = total = 0
    while at + 4 <= len(data):
        times, length = struct.unpack_from("!HH", data, at)
        at += 4
        head, body = data[at : at + VNET_LEN], data[at + VNET_LEN : at + VNET_LEN + length]
        at += VNET_LEN + length
        # The payload grows with `times`, the frame does not get longer than a device's.
        frame = (head.ljust(VNET_LEN, b"\0") + body * (1 + times % 512))[: VNET_LEN + 65535]
        total += len(frame)
        if total > LARGEST_RUN:
            break
        frames.append(frame)
    return frames


@contextmanager
def device(frames: list[bytes]) -> Iterator[None]:
    """A TUN device from which these frames are read."""
    left = frames[::-1]

    def readv(_fd: int, buffers: list[memoryview]) -> int:
        if not left:
            raise BlockingIOError
        frame = left.pop()
        buffers[0][: len(frame)] = frame
        return len(frame)

    with mock.patch("os.readv", readv):
        yield


def transmit(data: bytes) -> None:
    """Every packet goes to the peer its destination belongs to, or is counted as dropped."""
    frames = frames_in(data)
    counters, answers, outgoing = Counters(), [], Outgoing()
    said: list[str] = []
    table = routes()
    transmitter = Transmitter(
        -1, outgoing, table, counters,  # type: ignore[arg-type]  # a double
        buffers=Buffers(), mtu=MTU, segments=True, say=said.append,
        answer=lambda kind, packet: answers.append((kind, bytes(packet))),
    )  # fmt: skip
    with device(frames):
        for limit in (64, 1) * (len(frames) + 2):
            if not transmitter.turn(limit):
                break
        transmitter.flush()
    for packet, to in outgoing.sent:
        assert packet[0] >> 4 == 4
        assert len(packet) >= 20
        assert IPv4Address(packet[16:20]) in PEERS[to]
    for _, packet in answers:
        assert packet[0] >> 4 == 4
    drops = counters.drops
    assert not said
    assert len(answers) == drops["no_route"] + drops["ttl"]
    assert drops["send_full"] == drops["send_failed"] == 0
    assert counters.udp_sent_packets == len(outgoing.sent)
    assert counters.tun_read_packets == counters.udp_sent_packets + sum(drops.values())
    assert counters.tun_read_bytes == sum(len(frame) - VNET_LEN for frame in frames)
    if all(frame[1] == 0 for frame in frames):
        check_plain(frames, outgoing.sent)


def check_plain(frames: list[bytes], sent: list[tuple[bytes, str]]) -> None:
    """Without super-packets: to each peer its packets, in order, one hop older, else unchanged."""
    wanted: dict[str, list[bytes]] = {ip: [] for ip in PEERS}
    for frame in frames:
        packet = frame[VNET_LEN:]
        if len(packet) < 20 or packet[0] >> 4 != 4 or packet[8] <= 1:
            continue
        to = next((ip for ip, net in PEERS.items() if IPv4Address(packet[16:20]) in net), None)
        flags, _, _, _, start, offset = VNET.unpack_from(frame)
        if to is None:
            continue
        if flags & NEEDS_CSUM:
            at = start + offset
            if start < 20 or at + 2 > len(packet):
                continue
            packet = packet[:at] + _sum_of(packet, start, offset) + packet[at + 2 :]
        wanted[to].append(reference.less_ttl(packet))
    for ip, packets in wanted.items():
        assert [packet for packet, to in sent if to == ip] == packets


def _sum_of(packet: bytes, start: int, offset: int) -> bytes:
    value = reference.internet_checksum(packet[start:])
    # As `packet.complete_checksum` says: zero is written as UDP wants it, or TCP may have it.
    return struct.pack("!H", value or (0xFFFF if offset == 6 else 0))
