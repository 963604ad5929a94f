"""The udp tunnel's segmentation and coalescing once more: one packet at a time, no numpy.

Slow and plain on purpose. The tests compare the vectorised code with it.
"""

import struct
from dataclasses import dataclass

FIN, PSH, ACK, CWR = 0x01, 0x08, 0x10, 0x80
TCP, UDP = 6, 17


def ones_sum(data: bytes) -> int:
    """The one's complement sum of big-endian 16-bit words (RFC 1071), folded to 0..0xFFFF."""
    if len(data) % 2:
        data += b"\0"
    total = 0
    for (word,) in struct.iter_unpack("!H", data):
        total += word
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def internet_checksum(data: bytes) -> int:
    return ~ones_sum(data) & 0xFFFF


def with_ip_checksum(packet: bytes) -> bytes:
    header = (packet[0] & 15) * 4
    bare = packet[:10] + b"\0\0" + packet[12:]
    return bare[:10] + struct.pack("!H", internet_checksum(bare[:header])) + bare[12:]


def with_checksums(packet: bytes) -> bytes:
    """``packet`` (TCP or UDP) with both checksums right."""
    header = (packet[0] & 15) * 4
    at = header + (16 if packet[9] == TCP else 6)
    bare = packet[:at] + b"\0\0" + packet[at + 2 :]
    pseudo = bare[12:20] + struct.pack("!BBH", 0, bare[9], len(bare) - header)
    value = internet_checksum(pseudo + bare[header:])
    if packet[9] == UDP and value == 0:
        value = 0xFFFF
    return with_ip_checksum(bare[:at] + struct.pack("!H", value) + bare[at + 2 :])


def is_intact(packet: bytes) -> bool:
    header = (packet[0] & 15) * 4
    pseudo = packet[12:20] + struct.pack("!BBH", 0, packet[9], len(packet) - header)
    return ones_sum(packet[:header]) == 0xFFFF and ones_sum(pseudo + packet[header:]) == 0xFFFF


def less_ttl(packet: bytes) -> bytes:
    """TTL less one, the checksum changed as the original does it (never to 0xFFFF)."""
    total = struct.unpack("!H", packet[10:12])[0] + 0x0100
    if total >= 0xFFFF:
        total += 1
    middle = bytes([packet[8] - 1, packet[9]]) + struct.pack("!H", total & 0xFFFF)
    return packet[:8] + middle + packet[12:]


def segment(packet: bytes, gso: int) -> list[bytes]:
    """What a network card makes of a TSO or USO super-packet."""
    start = (packet[0] & 15) * 4
    tcp = packet[9] == TCP
    header = start + ((packet[start + 12] >> 4) * 4 if tcp else 8)
    payload = packet[header:]
    pieces = [payload[at : at + gso] for at in range(0, len(payload), gso)]
    identity = struct.unpack("!H", packet[4:6])[0]
    out = []
    for number, piece in enumerate(pieces):
        head = bytearray(packet[:header])
        head[2:4] = struct.pack("!H", header + len(piece))
        head[4:6] = struct.pack("!H", (identity + number) % 65536)
        if tcp:
            sequence = struct.unpack("!I", packet[start + 4 : start + 8])[0] + number * gso
            head[start + 4 : start + 8] = struct.pack("!I", sequence % 2**32)
            if number:
                head[start + 13] &= ~CWR
            if number < len(pieces) - 1:
                head[start + 13] &= ~(PSH | FIN)
        else:
            head[start + 4 : start + 6] = struct.pack("!H", 8 + len(piece))
        out.append(with_checksums(bytes(head) + piece))
    return out


@dataclass
class Frame:
    """What is written to the TUN device; ``gso`` 0 for a packet as it is."""

    packets: list[bytes]
    gso: int = 0
    kind: str = ""


def may_join(packet: bytes) -> str:
    """ "tcp" or "udp" for packets that may be joined with others."""
    if len(packet) < 29 or packet[0] != 0x45 or packet[8] <= 1:
        return ""
    if struct.unpack("!H", packet[2:4])[0] != len(packet) or packet[6:8] != b"\x40\0":
        return ""
    if packet[9] == TCP and len(packet) > 40:
        header = 20 + (packet[32] >> 4) * 4
        if packet[33] not in (ACK, ACK | PSH) or packet[32] & 15:
            return ""
        return "tcp" if 40 <= header < len(packet) and is_intact(packet) else ""
    if packet[9] == UDP:
        length, checksum = struct.unpack("!HH", packet[24:28])
        good = length == len(packet) - 20 and checksum != 0
        return "udp" if good and is_intact(packet) else ""
    return ""


def coalesce(packets: list[bytes]) -> list[Frame]:
    """Frames for the TUN device, which a card would cut into these packets again (less TTL)."""
    frames: list[Frame] = []
    open_frame: Frame | None = None
    for packet in packets:
        total = struct.unpack("!H", packet[2:4])[0] if len(packet) >= 20 else 0
        if len(packet) < 20 or packet[0] >> 4 != 4 or packet[8] <= 1:
            continue
        if not 20 <= (packet[0] & 15) * 4 <= total <= len(packet):
            continue
        kind = may_join(packet)
        if not kind:
            frames.append(Frame([less_ttl(packet[:total])]))
            open_frame = None
            continue
        if open_frame is None or not _follows(open_frame, packet, kind):
            header = 20 + (packet[32] >> 4) * 4 if kind == "tcp" else 28
            open_frame = Frame([], len(packet) - header, kind)
            frames.append(open_frame)
        open_frame.packets.append(less_ttl(packet))
        pushed = kind == "tcp" and packet[33] & PSH
        if pushed or len(packet) < len(open_frame.packets[0]):
            open_frame = None
    return frames


def _follows(frame: Frame, packet: bytes, kind: str) -> bool:
    first, last = frame.packets[0], frame.packets[-1]
    if kind != frame.kind or len(packet) > len(first):
        return False
    header = 20 + (first[32] >> 4) * 4 if kind == "tcp" else 28
    together = header + sum(len(p) - header for p in frame.packets) + len(packet) - header
    if together > 65535 or (kind == "udp" and len(frame.packets) == 64):
        return False
    now = less_ttl(packet)
    same = now[:2] == first[:2] and now[6:10] == first[6:10] and now[12:24] == first[12:24]
    if kind == "udp":
        return same
    sequence = struct.unpack("!I", last[24:28])[0] + len(last) - header
    return (
        same
        and now[28:33] == first[28:33]
        and now[34:36] == first[34:36]
        and now[38:header] == first[38:header]
        and struct.unpack("!I", now[24:28])[0] == sequence % 2**32
    )
