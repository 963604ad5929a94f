"""What the tunnel counts. No numpy: the parent reads the same names."""

from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Counters:
    """Totals since the tunnel's process started.

    A packet is one inner IP packet as it is on the wire, a call is one system call that moved at
    least one; so packets / calls are the segments per system call.
    """

    tun_read_calls: int = 0
    tun_read_packets: int = 0
    tun_read_bytes: int = 0
    udp_send_calls: int = 0
    udp_sent_packets: int = 0
    udp_sent_bytes: int = 0
    udp_receive_calls: int = 0
    udp_received_packets: int = 0
    udp_received_bytes: int = 0
    tun_write_calls: int = 0
    tun_written_packets: int = 0
    tun_written_bytes: int = 0
    icmp_unreachable: int = 0
    icmp_time_exceeded: int = 0
    icmp_not_sent: int = 0
    """Answers that were due but over the rate limit, or could not be sent."""
    drop_not_ipv4: int = 0
    drop_malformed: int = 0
    drop_no_route: int = 0
    drop_ttl: int = 0
    drop_unknown_peer: int = 0
    """The datagram's sender is no peer's public address."""
    drop_wrong_source: int = 0
    """The inner source is not in a subnet of the peer that sent it."""
    drop_send_failed: int = 0
    drop_send_full: int = 0
    """The socket's send buffer was full."""
    drop_tun_write: int = 0
    peers: int = 0
    """Subnets in the route table now."""

    def encode(self) -> bytes:
        """Return it as text, a name and a number per line."""
        return "\n".join(f"{name}={value}" for name, value in asdict(self).items()).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Counters":
        """Read what `encode` wrote. Names of another version are left out."""
        known = {field.name for field in fields(cls)}
        pairs = (line.partition("=") for line in data.decode().splitlines())
        return cls(**{name: int(value) for name, _, value in pairs if name in known})

    @property
    def segments_per_send(self) -> float:
        """Inner packets per system call that sent datagrams."""
        return self.udp_sent_packets / max(1, self.udp_send_calls)

    @property
    def segments_per_receive(self) -> float:
        """Inner packets per system call that received datagrams."""
        return self.udp_received_packets / max(1, self.udp_receive_calls)

    @property
    def drops(self) -> dict[str, int]:
        """The reasons and numbers of dropped packets."""
        return {n[5:]: v for n, v in asdict(self).items() if n.startswith("drop_")}
