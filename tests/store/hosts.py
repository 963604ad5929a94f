"""Hosts as the tests of the subnet manager see them: managers, their watches, and raw writes."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from types import TracebackType
from typing import Generic, Self, TypeVar

from flanneld.subnet.config import Config, parse_config
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from flanneld.subnet.lease import Lease, LeaseAttrs, subnet_key
from flanneld.subnet.local_manager import LocalManager
from flanneld.subnet.manager import LeaseState, LeaseStatus
from flanneld.subnet.store import Node as StoreNode
from flanneld.subnet.watch import EventType, LeaseEvent
from lab.etcd import Etcd
from lab.etcdv2 import EtcdV2, Node
from lab.wait import eventually

T = TypeVar("T")

# Seconds; generous, since a wait that is long enough ends at once.
SOON = 20.0

OWN_IP = IPv4Address("10.97.0.1")
NETWORK = '{"Network":"10.5.0.0/16"}'


def attrs(ip: str | IPv4Address = OWN_IP, mac: str = "") -> LeaseAttrs:
    """What a host publishes; with ``mac`` the vxlan backend's, else host-gw's."""
    if mac:
        return LeaseAttrs(IPv4Address(ip), "vxlan", f'{{"VtepMAC":"{mac}"}}')
    return LeaseAttrs(IPv4Address(ip), "host-gw")


def peer_ip(number: int) -> str:
    return str(IPv4Address("10.98.0.0") + number)


def peer_subnet(number: int) -> str:
    """The subnet of peer 1, 2, ...: not those that hosts of a test pick for themselves."""
    return str(IPv4Network((int(IPv4Address("10.5.128.0")) + 16 * number, 28)))


def later(node: StoreNode, found: StoreNode | None) -> StoreNode:
    """What a node is to be that is found some moments after it was written: it has less to live."""
    if node.ttl is None or found is None or found.ttl is None:
        return node
    assert node.ttl - SOON <= found.ttl <= node.ttl
    return replace(node, ttl=found.ttl)


class Following(Generic[T]):
    """A generator of the manager's, run in a thread; ``items`` is what it gave so far."""

    def __init__(self, generator: Iterator[T], stop: threading.Event) -> None:
        self.items: list[T] = []
        self.error: BaseException | None = None
        self._generator = generator
        self._stop = stop
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._generator:
                self.items.append(item)
        except BaseException as error:  # noqa: BLE001 - shown by the test that waits
            self.error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def until(self, check: Callable[[list[T]], object], what: str, timeout: float = SOON) -> None:
        """Wait until ``check`` holds for the items so far."""

        def holds() -> bool:
            assert self.error is None, repr(self.error)
            return bool(check(list(self.items)))

        eventually(holds, timeout, what, detail=lambda: f"so far: {self.items[-20:]}")

    def join(self) -> None:
        self._stop.set()
        self._thread.join(SOON)
        assert self.ended, "the watch did not end"
        assert self.error is None, repr(self.error)


class Peers(Following[list[LeaseEvent]]):
    """`LocalManager.watch_leases` and the set of peers it told of."""

    def events(self) -> list[LeaseEvent]:
        return [event for batch in list(self.items) for event in batch]

    def now(self) -> dict[str, LeaseAttrs]:
        """Subnet -> attributes, as a backend would have them. Checks that the events fit."""
        known: dict[str, LeaseAttrs] = {}
        for event in self.events():
            subnet = str(event.lease.subnet)
            if event.type is EventType.REMOVED:
                assert known.pop(subnet) == event.lease.attrs
                continue
            before = known.get(subnet)
            assert before == (event.previous.attrs if event.previous else None)
            assert before != event.lease.attrs, f"{subnet} was told twice"
            known[subnet] = event.lease.attrs
        return known

    def expect(self, leases: dict[str, LeaseAttrs], timeout: float = SOON) -> None:
        """Wait until the peers are exactly these."""
        self.until(lambda items: items and self.now() == leases, f"peers {leases}", timeout)

    def expect_numbers(self, numbers: Iterable[int], timeout: float = SOON) -> None:
        """Wait until the peers are exactly those of ``Cluster.join``."""
        self.expect({peer_subnet(n): attrs(peer_ip(n)) for n in numbers}, timeout)


class OwnLease(Following[LeaseStatus]):
    """`LocalManager.watch_lease`."""

    def states(self) -> list[LeaseState]:
        return [status.state for status in list(self.items)]

    def expect(self, state: LeaseState, timeout: float = SOON) -> LeaseStatus:
        """Wait until the latest report is this one."""
        self.until(lambda items: items and items[-1].state is state, f"own lease {state}", timeout)
        return self.items[-1]


class Cluster:
    """Hosts below one prefix of one etcd, and what other programs write there."""

    def __init__(self, etcd: Etcd, prefix: str) -> None:
        self.etcd = etcd
        self.prefix = prefix
        self.stop = threading.Event()
        self._client: EtcdV2 | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.put_config()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop.set()
        self._stack.close()

    @property
    def client(self) -> EtcdV2:
        if self._client is None:
            self._client = self.etcd.client()
            self._stack.callback(self._client.close)
        return self._client

    def put_config(self, text: str = NETWORK) -> Config:
        self.client.put(f"{self.prefix}/config", text)
        return parse_config(text)

    def manager(self, previous: str | None = None, endpoints: str = "") -> LocalManager:
        store = EtcdV2Store(endpoints or self.etcd.url, self.prefix, Credentials())
        manager = LocalManager(store, IPv4Network(previous) if previous else None)
        self._stack.callback(manager.close)
        return manager

    def watch_peers(self, manager: LocalManager, own: Lease, config: Config | None = None) -> Peers:
        network = manager.network_config() if config is None else config
        peers = Peers(manager.watch_leases(network, own, self.stop), self.stop)
        self._stack.callback(peers.join)
        self._stack.callback(manager.close)
        self._stack.callback(self.stop.set)
        return peers

    def watch_own(self, manager: LocalManager, own: Lease) -> OwnLease:
        watched = OwnLease(manager.watch_lease(own, self.stop), self.stop)
        self._stack.callback(watched.join)
        self._stack.callback(manager.close)
        self._stack.callback(self.stop.set)
        return watched

    def host(self, endpoints: str = "") -> tuple[LocalManager, Lease]:
        """A host that has leased its subnet."""
        manager = self.manager(endpoints=endpoints)
        return manager, self.acquire(manager, manager.network_config(), attrs())

    def acquire(self, manager: LocalManager, config: Config, own: LeaseAttrs) -> Lease:
        """As `LocalManager.acquire_lease`, which waits without end; here Stopped after `SOON`."""
        timer = threading.Timer(SOON, self.stop.set)
        timer.start()
        try:
            return manager.acquire_lease(config, own, self.stop)
        finally:
            timer.cancel()

    def key(self, subnet: str | IPv4Network) -> str:
        return f"{self.prefix}/subnets/{subnet_key(IPv4Network(subnet))}"

    def put(
        self, subnet: str | IPv4Network, value: LeaseAttrs | str, ttl: int | None = 3600
    ) -> Node:
        """Write a lease as another host does, whoever holds it."""
        text = value if isinstance(value, str) else value.encode()
        return self.client.put(self.key(subnet), text, ttl=ttl)

    def join(self, number: int, client: EtcdV2 | None = None) -> None:
        """Peer ``number`` publishes its lease."""
        key = self.key(peer_subnet(number))
        (client or self.client).put(key, attrs(peer_ip(number)).encode(), ttl=3600)

    def leave(self, number: int) -> None:
        assert self.client.delete(self.key(peer_subnet(number)))

    def get(self, subnet: str | IPv4Network) -> Node | None:
        return self.client.get(self.key(subnet))

    def leases(self) -> dict[str, Node]:
        return self.client.list(f"{self.prefix}/subnets")

    def make_history(self, events: int = 1010) -> None:
        """Write elsewhere in etcd more events than it remembers (1000)."""
        for number in range(events):
            self.client.put("/elsewhere", str(number))


def follow_peers(cluster: Cluster, endpoints: str = "") -> tuple[Lease, Peers]:
    """A host that follows its peers; its first batch has come."""
    manager, own = cluster.host(endpoints)
    peers = cluster.watch_peers(manager, own)
    peers.until(len, "the first batch")
    return own, peers
