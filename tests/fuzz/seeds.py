"""Valid inputs of each target, from which searches begin."""

import struct
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network

from test_udp_coalesce import flow
from test_udp_segment import super_packet
from udp_reference import TCP, UDP, with_checksums

from flanneld.backend.udp.packet import NEEDS_CSUM, VNET, VNET_PLAIN
from flanneld.kernel import wire
from flanneld.kernel.state import FdbEntry, Found, Neighbour, Route
from flanneld.subnet import env
from fuzz.tunnel import RECORD

_ROUTE = Route(IPv4Network("10.5.17.0/24"), IPv4Address("10.97.0.2"), 2)
_NEIGHBOUR = Neighbour(IPv4Address("10.5.17.0"), bytes.fromhex("020000000001"), 3)
_FDB = FdbEntry(bytes.fromhex("020000000001"), IPv4Address("10.97.0.2"), 3)


def _message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return wire.HEADER.pack(wire.HEADER.size + len(body), kind, flags, 0, 0) + body


def _netlink() -> list[bytes]:
    written = [wire.pack_write(0, entry) for entry in (_ROUTE, _NEIGHBOUR, _FDB)]
    deleted = [wire.pack_delete(0, Found(entry, 102)) for entry in (_ROUTE, _NEIGHBOUR, _FDB)]
    name = struct.pack("=HH8s", 11, wire.IFLA_IFNAME, b"flannel\0")
    link = _message(wire.RTM_NEWLINK, struct.pack("=BxHiII", 0, 1, 7, 1, 0) + name)
    address = _message(wire.RTM_NEWADDR, struct.pack("=BBBBI", 2, 24, 0, 0, 7))
    error = _message(wire.NLMSG_ERROR, struct.pack("=i", -17) + written[0][:16])
    words = _message(
        wire.NLMSG_ERROR,
        struct.pack("=i", -22) + written[0][:16] + struct.pack("=HH8s", 12, 1, b"nothing\0"),
        wire.NLM_F_ACK_TLVS,
    )
    done = _message(wire.NLMSG_DONE, bytes(4))
    done_at_once = [b"".join(written) + done, b"\xff\xff".join(written) + b"\xff\xff" + done]
    return [*written, *deleted, link, address, error, words, *done_at_once, b"".join(deleted)]


def _from_peer(packets: list[bytes]) -> list[bytes]:
    addresses = bytes((10, 5, 2, 7, 10, 5, 1, 2))
    return [with_checksums(packet[:12] + addresses + packet[20:]) for packet in packets]


def _received() -> list[bytes]:
    found = []
    for packets in (flow(TCP, [100] * 12), flow(UDP, [300] * 7 + [13]), flow(TCP, [41])):
        own = _from_peer(packets)
        found.append(RECORD.pack(0, 0, len(own[0]), sum(map(len, own))) + b"".join(own))
        found.append(b"".join(RECORD.pack(0, 0, 0, len(p)) + p for p in own))
        found.append(b"".join(RECORD.pack(n % 3, n, 0, len(p)) + p for n, p in enumerate(own)))
    return found


def _transmitted() -> list[bytes]:
    def record(head: bytes, packet: bytes, times: int = 0) -> bytes:
        return struct.pack("!HH", times, len(packet)) + head + packet

    found = [
        b"".join(record(VNET_PLAIN, packet) for packet in packets)
        for packets in (flow(TCP, [100] * 9), flow(UDP, [99] * 5), flow(UDP, [7, 8, 9]))
    ]
    for protocol, kind, offset in ((TCP, 1, 16), (UDP, 5, 6)):
        packet = super_packet(protocol, bytes(range(250)) * 4)
        head = VNET.pack(NEEDS_CSUM, kind, 0, 300, 20, offset)
        found.append(record(head, packet))
        found.append(record(head, packet, times=63) + record(head, packet))
        plain = flow(protocol, [200])[0]
        found.append(record(VNET.pack(NEEDS_CSUM, 0, 0, 0, 20, offset), plain) * 5)
    return found


_ATTRS = (
    b'{"PublicIP":"10.97.0.2","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:01"}}'
)

SEEDS: Mapping[str, list[bytes]] = {
    "config": [
        b'{"Network":"10.5.0.0/16"}',
        b'{"Network":"10.5.0.0/16","SubnetLen":26,"SubnetMin":"10.5.1.0","SubnetMax":"10.5.9.64",'
        b'"Backend":{"Type":"vxlan","VNI":7,"Port":4789,"GBP":true,"DirectRouting":true,"MTU":1400}}',
        b'{"Network":"10.5.0.0/16","Backend":{"Type":"udp","Port":7890,"SourceCheck":false}}',
        b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48",'
        b'"Networks":["10.6.0.0/16"],"EnableNFTables":true,"Backend":{"Type":"host-gw"}}',
        b"null",
    ],
    "lease": [
        b"10.5.17.0-24\n" + _ATTRS,
        b'10.5.17.0-24\n{"PublicIP":"10.97.0.2"}',
        b'10.5.0.0-16\n{"publicip":"10.97.0.1","BackendType":null,"BackendData":null}',
        b'10.5.17.5-32\n{"PublicIP":"127.0.0.1","BackendData":{"a":["<&>\\u2028"]}}',
    ],
    "watch": [
        b"s 0 5 60 "
        + _ATTRS
        + b"\ns 1 6 60 "
        + _ATTRS
        + b"\nd 0 7\nt 2\nn 1 3 60 "
        + _ATTRS
        + b"\nS  2",
        b"n 0 5 60 " + _ATTRS + b"\nn 3 4  " + _ATTRS + b"\nS  9\nA  10\ns 0 11 60 " + _ATTRS,
        b"s 2 5 60 " + _ATTRS + b"\ns 4 6 60 " + _ATTRS + b"\ns x 7 60 x\nt 100",
    ],
    "subnet_env": [
        env.render(IPv4Network("10.5.0.0/16"), IPv4Network("10.5.17.0/24"), 1450, False).encode(),
        b"\xef\xbb\xbfFLANNEL_SUBNET: '10.5.17.1/24' # x\r\n"
        b'export FLANNEL_NETWORK="10.5.0.0/16"\n',
    ],
    "flags": [
        b"--etcd-endpoints=http://10.0.0.5:2379,https://[::1]:4001\0-iface=eth0\0-v\x001",
        b"-ip-masq=false\0--subnet-lease-renew-margin=0x3c\0-vmodule=a=1,b=2\0-log_backtrace_at=a.py:7",
        b"-iface-regex=^[[:alpha:]]+\\d{1,3}$\0\0ETCD_PREFIX=/a\0IFACE=eth1\0HEALTHZ_PORT=0x\xff",
        b"-help",
    ],
    "netlink": _netlink(),
    "tunnel_receive": _received(),
    "tunnel_transmit": _transmitted(),
}
