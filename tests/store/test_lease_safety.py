"""Never two hosts with one subnet: managers and monitors on a real etcd that is hard to reach.

Leases live for seconds. Each host has a way of its own to etcd, on which a seeded schedule cuts
connections, delays requests and loses answers; hosts are killed and started again; an operator
deletes keys, writes garbage and reservations, and changes SubnetLen. Judged is etcd's own record
of what was written, in its order. tests/unit/test_lease_safety.py does the same in virtual time.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.client import HTTPException
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from flanneld.errors import ConfigChanged, LeaseLost, Stopped, StoreError
from flanneld.subnet import acquire, local_manager, monitor
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from flanneld.subnet.lease import (
    BadLease,
    Lease,
    LeaseAttrs,
    decode_attrs,
    subnet_key,
)
from flanneld.subnet.local_manager import LocalManager
from flanneld.subnet.monitor import LeaseMonitor
from lab.etcdv2 import EtcdV2Error
from lab.wait import eventually

from .hosts import SOON, Cluster
from .servers import Action, Forward, Request, Server

SECONDS = float(os.environ.get("FLANNEL_SAFETY_SECONDS", "15"))
SEED = int(os.environ.get("FLANNEL_SAFETY_SEED", str(random.randrange(10**6))))

HOSTS = 4
TTL = 3
MARGIN = 1.5
# Seven subnets for four hosts, or three of twice the size.
CONFIGS = ('{"Network":"10.5.0.0/21","SubnetLen":24}', '{"Network":"10.5.0.0/21","SubnetLen":23}')
STRANGER = LeaseAttrs(IPv4Address("10.97.0.99")).encode()


@dataclass
class Faults:
    """What becomes of one host's requests."""

    rng: random.Random
    cut: bool = False
    lose: float = 0.0
    delay: float = 0.0

    def __call__(self, request: Request) -> Action:
        if self.delay:
            time.sleep(self.rng.uniform(0, self.delay))
        if self.cut:
            return b""
        if not request.is_poll and self.rng.random() < self.lose:
            return b"" if self.rng.random() < 0.5 else Forward.RESET
        return Forward.ANSWER


class Manager(LocalManager):
    """Notes each key with which the host takes a subnet for its own: subnet and created index."""

    def __init__(self, store: EtcdV2Store, previous: IPv4Network | None) -> None:
        super().__init__(store, previous)
        self.tenures: set[tuple[IPv4Network, int]] = set()

    def acquire_lease(self, *arguments: Any) -> Lease:
        return self._note(super().acquire_lease(*arguments))

    def keep_lease(self, lease: Lease) -> Lease:
        return self._note(super().keep_lease(lease))

    def _note(self, lease: Lease) -> Lease:
        self.tenures.add((lease.subnet, lease.created_index))
        return lease


class Host:
    """What `flanneld.main` does for the lease, in threads."""

    def __init__(self, cluster: Cluster, number: int, rng: random.Random) -> None:
        self.ip = IPv4Address(f"10.97.0.{number + 1}")
        self.faults = Faults(rng)
        self.proxy = Server(self.faults, upstream=cluster.etcd.url)
        self.lease: Lease | None = None
        self.previous: IPv4Network | None = None
        self.errors: list[BaseException] = []
        self.tenures: set[tuple[IPv4Network, int]] = set()
        self._prefix = cluster.prefix
        self._stop = threading.Event()
        self._store: EtcdV2Store | None = None
        self._keeper: LeaseMonitor | None = None
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        self.lease, self._stop = None, threading.Event()
        self._store = EtcdV2Store(self.proxy.url, self._prefix, Credentials())
        self._thread = threading.Thread(target=self._run, args=(self._store, self._stop))
        self._thread.start()

    def end(self) -> None:
        """As a kill: whatever is under way is abandoned. The key stays."""
        self._stop.set()
        if self._keeper is not None:
            self._keeper.fail(Stopped())
        if self._store is not None:
            self._store.close()
        if self._thread is not None:
            self._thread.join(SOON)
            assert not self._thread.is_alive()
        self.lease = None

    def _run(self, store: EtcdV2Store, stop: threading.Event) -> None:
        manager = Manager(store, self.previous)
        try:
            lease = self._acquire(manager, stop)
            self.previous, self.lease = lease.subnet, lease
            self._keeper = keeper = LeaseMonitor(manager, lease, MARGIN)
            feed = threading.Thread(target=self._feed, args=(keeper, stop))
            feed.start()
            try:
                keeper.run(stop)
            finally:
                stop.set()
                store.close()
                feed.join()
        except (LeaseLost, Stopped):
            pass
        except StoreError as error:
            if not stop.is_set():
                self.errors.append(error)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.errors.append(error)
        finally:
            self.lease = None
            self.tenures |= manager.tenures

    def _acquire(self, manager: Manager, stop: threading.Event) -> Lease:
        while not stop.is_set():
            try:
                config = manager.network_config()
                return manager.acquire_lease(config, LeaseAttrs(self.ip, "host-gw"), stop)
            except ConfigChanged:
                continue
            except StoreError:
                stop.wait(0.1)
        raise Stopped

    def _feed(self, keeper: LeaseMonitor, stop: threading.Event) -> None:
        try:
            keeper.feed(stop)
        except BaseException as error:  # noqa: BLE001 - raised again by the monitor
            keeper.fail(error)


@dataclass
class Record:
    """Every write below ``subnets``, as etcd tells it."""

    cluster: Cluster
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._client = self.cluster.etcd.client(timeout=60.0)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, args=(self._client.index(),))
        self._thread.start()

    def _follow(self, index: int) -> None:
        key = f"{self.cluster.prefix}/subnets"
        while not self._end.is_set():
            query = {"wait": True, "recursive": True, "waitIndex": index + 1}
            try:
                event = self._client.keys("GET", key, query)
            except (OSError, HTTPException):
                return  # etcd has ended: the test has failed
            index = event["node"]["modifiedIndex"]
            self.events.append(event)

    def close(self) -> list[dict[str, Any]]:
        self._end.set()
        self.cluster.client.put(f"{self.cluster.prefix}/subnets/end", "")
        self._thread.join(SOON)
        assert not self._thread.is_alive()
        self._client.close()
        return self.events


def public_ip(node: dict[str, Any]) -> IPv4Address | None:
    """Whose lease this is; None if it is nobody's."""
    try:
        return decode_attrs(node.get("value", "")).public_ip
    except BadLease:
        return None


def judge(events: list[dict[str, Any]], hosts: list[Host]) -> None:
    """Check each write of a host, and that no two held overlapping subnets at one time.

    Hosts write on condition only, which is how etcd tells their writes from the operator's.
    """
    ends: dict[tuple[str, int], int] = {}
    seen: set[tuple[str, int]] = set()
    for event in events:
        node, before = event["node"], event.get("prevNode")
        name, index = node["key"].rpartition("/")[2], node["modifiedIndex"]
        if node.get("dir"):  # all of them were deleted
            ends |= dict.fromkeys(seen - ends.keys(), index)
            continue
        seen.add((name, node["createdIndex"]))
        if before is not None and before["createdIndex"] != node["createdIndex"]:
            ends[name, before["createdIndex"]] = index
        if event["action"] in ("delete", "expire", "compareAndDelete") and before is not None:
            ends[name, before["createdIndex"]] = index
        if before is not None and event["action"] in ("compareAndSwap", "compareAndDelete"):
            owner = public_ip(before)
            if event["action"] == "compareAndSwap":
                assert owner in (None, public_ip(node)), f"a lease was taken away: {event}"
                if "expiration" in before:
                    assert "expiration" in node, f"a lease was given no end: {event}"
            if owner is not None and "expiration" not in before:
                assert "expiration" not in node, f"a reservation was given an end: {event}"
                assert event["action"] == "compareAndSwap", f"a reservation was deleted: {event}"
    held = [
        (host, subnet, created, ends.get((subnet_key(subnet), created), 1 << 62))
        for host in hosts
        for subnet, created in host.tenures
    ]
    for position, (host, subnet, start, end) in enumerate(held):
        for other, others_subnet, others_start, others_end in held[:position]:
            if host is not other and start < others_end and others_start < end:
                assert not subnet.overlaps(others_subnet), (
                    f"{host.ip} held {subnet} in {start}..{end}, and"
                    f" {other.ip} held {others_subnet} in {others_start}..{others_end}"
                )


class Schedule:
    """What happens, at random: to the hosts, to their ways, and by the operator's hand."""

    def __init__(self, cluster: Cluster, hosts: list[Host], rng: random.Random) -> None:
        self._cluster = cluster
        self._hosts = hosts
        self._rng = rng
        self._events: list[Callable[[], None]] = [
            *[self._start_or_end] * 4,
            *[self._worsen] * 4,
            self._mend,
            self._mend,
            self._configure,
            *[self._delete] * 2,
            *[self._overwrite] * 3,
        ]

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._rng.choice(self._events)()
            time.sleep(self._rng.choice([0.0, 0.05, 0.2, 0.5]))

    def _host(self) -> Host:
        return self._rng.choice(self._hosts)

    def _start_or_end(self) -> None:
        host = self._host()
        if host.running and self._rng.random() < 0.5:
            host.end()
        elif not host.running:
            host.start()

    def _worsen(self) -> None:
        host = self._host()
        match self._rng.choice(["cut", "lose", "delay"]):
            case "cut":
                host.faults.cut = True
                host.proxy.cut()
            case "lose":
                host.faults.lose = 0.5
            case "delay":
                host.faults.delay = 0.5

    def _mend(self) -> None:
        mend(self._host())

    def _configure(self) -> None:
        self._cluster.put_config(self._rng.choice(CONFIGS))

    def _pick(self) -> tuple[str, str]:
        leases = self._cluster.leases()
        if not leases:
            return "none", ""
        name = self._rng.choice(sorted(leases))
        return name, leases[name].value

    def _delete(self) -> None:
        self._cluster.client.delete(f"{self._cluster.prefix}/subnets/{self._pick()[0]}")

    def _overwrite(self) -> None:
        """With garbage, another host's lease, or what was there without an end: a reservation."""
        name, value = self._pick()
        text, ttl = self._rng.choice([("garbage", None), (STRANGER, TTL), *[(value, None)] * 2])
        try:
            key = f"{self._cluster.prefix}/subnets/{name}"
            self._cluster.client.put(key, text, ttl=ttl, prev_exist=True)
        except EtcdV2Error:
            return  # it has expired meanwhile


def mend(host: Host) -> None:
    host.faults.cut, host.faults.lose, host.faults.delay = False, 0.0, 0.0


def agreed(cluster: Cluster, hosts: list[Host]) -> bool:
    """Whether each host holds one lease, etcd has the same, and nothing else."""
    for host in hosts:
        if not host.running:
            host.end()
            host.start()
    leases = {subnet: public_ip({"value": node.value}) for subnet, node in cluster.leases().items()}
    assert leases == {subnet_key(host.lease.subnet): host.ip for host in hosts if host.lease}
    assert len(leases) == len(hosts)
    return True


def test_no_subnet_has_two_hosts_whatever_happens(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``FLANNEL_SAFETY_SECONDS`` makes it longer, ``FLANNEL_SAFETY_SEED`` repeats a schedule."""
    # One line for each request that fails says nothing.
    monkeypatch.setattr(logging.getLogger("etcd.client"), "disabled", True)
    for module, values in (
        (acquire, {"LEASE_TTL": TTL, "OUT_OF_SUBNETS_PAUSE": 0.3}),
        (local_manager, {"LEASE_TTL": TTL, "OWN_POLL": 2.0}),
        (monitor, {"RETRY": 0.4, "RETRY_LOST": 0.2}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    print(f"FLANNEL_SAFETY_SEED={SEED}")
    rng = random.Random(SEED)
    cluster.put_config(CONFIGS[0])
    with ExitStack() as stack:
        record = Record(cluster)
        hosts = [Host(cluster, number, random.Random(rng.random())) for number in range(HOSTS)]
        for host in hosts:
            stack.callback(host.proxy.close)
            stack.callback(host.end)
        Schedule(cluster, hosts, rng).run(SECONDS)

        for host in hosts:
            mend(host)
        cluster.put_config(CONFIGS[0])
        cluster.client.delete(f"{cluster.prefix}/subnets", recursive=True)
        eventually(
            lambda: agreed(cluster, hosts), SOON, "each host to hold one lease", interval=0.3
        )

        # A host that can keep its subnet keeps it; here all of them can, as SubnetLen is one.
        for host in hosts:
            host.end()
        cluster.client.delete(f"{cluster.prefix}/subnets", recursive=True)
        eventually(lambda: agreed(cluster, hosts), SOON, "each host to start anew", interval=0.3)
        before = [host.previous for host in hosts]
        for host in hosts:
            host.end()
        for host in hosts:
            host.start()
        eventually(lambda: agreed(cluster, hosts), SOON, "the same after a restart", interval=0.3)
        assert [host.previous for host in hosts] == before
        for host in hosts:
            host.end()
            assert host.errors == []
        events = record.close()
    judge(events, hosts)
    kinds = {event["action"] for event in events}
    assert {"create", "compareAndSwap", "delete"} <= kinds
    assert sum(len(host.tenures) for host in hosts) > 2 * HOSTS
