"""Made-up peers, written into etcd as fast as it takes them."""

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from urllib.parse import quote, urlencode

from lab import Lab, LabError
from lab.etcd import Etcd
from lab.etcdv2 import EtcdV2

NETWORK = IPv4Network("10.128.0.0/9")
# The daemons' own subnets; the peers' are below.
OWN_SUBNETS = (IPv4Address("10.255.0.0"), IPv4Address("10.255.255.0"))
# The peers' own addresses: each host has a link to all of them.
LINK = IPv4Network("172.16.0.0/12")
# Peers by number: from 0 those there from the start, then those of a burst, those that come one by
# one, those that come while the daemon sleeps.
FIRST_OF_BURST, FIRST_OF_EVENTS, FIRST_OF_RESYNC = 20_000, 28_000, 29_000

_CONNECTIONS = 8
# Requests sent ahead of their answers on one connection: it keeps etcd busy, not this process.
_AHEAD = 32
_TTL = 86_400
_STATUS, _GOOD = b"HTTP/1.1 ", (b"HTTP/1.1 20", b"HTTP/1.1 404")


def subnet(number: int) -> IPv4Network:
    """The subnet of a peer."""
    return IPv4Network((int(NETWORK.network_address) + (number << 8), 24))


def value(number: int, backend: str) -> str:
    """The value of a peer's lease, as the original writes it."""
    address = LINK.network_address + 256 + number
    data = f'{{"VtepMAC":"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"}}'
    data = f',"BackendData":{data}' if backend == "vxlan" else ""
    return f'{{"PublicIP":"{address}","BackendType":"{backend}"{data}}}'


def key(prefix: str, number: int) -> str:
    """The key of a peer's lease."""
    return f"{prefix}/subnets/{str(subnet(number)).replace('/', '-')}"


class Writer:
    """Connections to the lab's etcd, over which many requests go at once."""

    def __init__(self, lab: Lab) -> None:
        if not isinstance(lab.etcd, Etcd):
            raise LabError("the lab has no etcd to write to")
        self._etcd = lab.etcd
        target = (str(lab.etcd.address), lab.etcd.member.client_port)
        self._sockets = [
            lab.underlay.inside(lambda: socket.create_connection(target, 30.0))
            for _ in range(_CONNECTIONS)
        ]
        for sock in self._sockets:
            lab.when_closing(sock.close)

    def client(self) -> EtcdV2:
        """One more client, for what happens one by one."""
        return self._etcd.client()

    def put(self, prefix: str, backend: str, numbers: Sequence[int]) -> float:
        """Write the leases of these peers; when was the last answer (time.monotonic())?"""
        return self._all([self._request("PUT", key(prefix, n), value(n, backend)) for n in numbers])

    def delete(self, prefix: str, numbers: Sequence[int]) -> None:
        """Delete the leases of these peers, those that there are."""
        self._all([self._request("DELETE", key(prefix, n)) for n in numbers])

    def fill_history(self, count: int) -> None:
        """Make so many events that are no business of any network."""
        self._all([self._request("PUT", "/elsewhere/key", str(n)) for n in range(count)])

    def _request(self, method: str, path: str, content: str | None = None) -> bytes:
        form = "" if content is None else urlencode({"value": content, "ttl": _TTL})
        return (
            f"{method} /v2/keys{quote(path)} HTTP/1.1\r\nHost: {self._etcd.address}\r\n"
            "Content-Type: application/x-www-form-urlencoded\r\n"
            f"Content-Length: {len(form)}\r\n\r\n{form}"
        ).encode()

    def _all(self, requests: Sequence[bytes]) -> float:
        shares = [requests[n::_CONNECTIONS] for n in range(_CONNECTIONS)]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return max(pool.map(_send, self._sockets, shares))


def _send(sock: socket.socket, requests: Sequence[bytes]) -> float:
    """Send the requests and wait for all answers. Raises LabError when etcd refuses one."""
    for start in range(0, len(requests), _AHEAD):
        batch = requests[start : start + _AHEAD]
        sock.sendall(b"".join(batch))
        answers = b""
        # The end of the last answer's body may stay for the next turn: it holds no status line.
        while answers.count(_STATUS) < len(batch) or len(answers.rpartition(_STATUS)[2]) < 3:
            data = sock.recv(1 << 16)
            if not data:
                raise LabError("etcd closed the connection")
            answers += data
        if sum(map(answers.count, _GOOD)) < len(batch):
            raise LabError(f"etcd refused: {answers[-500:].decode(errors='replace')}")
    return time.monotonic()
