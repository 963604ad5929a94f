"""Hosts without a kernel: the daemon's own subnet managers, many of them in a few processes.

Each host has a store with its own connections, and the three threads that keep a daemon's lease:
one follows the other hosts' leases, one watches its own, one renews it. What a backend would do
with the changes is replaced by a checksum of the peers. The parent's side of it is `bench.fleet`.

One thing is made cheaper than it is: the hosts of a process read the same leases, and each is
parsed once for all of them. What goes over the wire is not changed by it.
"""

import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from flanneld.clock import now
from flanneld.errors import Stopped, StoreError
from flanneld.subnet import acquire, local_manager, watch
from flanneld.subnet.config import Config
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from flanneld.subnet.lease import Lease, LeaseAttrs, parse_lease
from flanneld.subnet.local_manager import LocalManager
from flanneld.subnet.monitor import LeaseMonitor
from flanneld.subnet.store import LeaseStore, Node, Poll, Snapshot
from flanneld.subnet.watch import EventType

T = TypeVar("T")

FIRST_IP = IPv4Address("172.16.0.1")
# As the flag --subnet-lease-renew-margin has it, in seconds.
_MARGIN = 3600.0
# Seconds until the config is asked for again; the daemon's.
_RETRY = 1.0
# Bytes; the interpreter's frames are elsewhere. Thousands of threads have one each.
_STACK = 256 << 10
# The hosts yield to etcd, which in truth has a machine of its own.
_NICE = 19
# Seconds. Hundreds of threads wait for the interpreter, and each wakes up this often to ask for it.
_SWITCH = 0.2
# Parsed leases kept: each reading has other lifetimes.
_PARSED = 1 << 16


def ip_of(number: int) -> IPv4Address:
    """The public IP of a host."""
    return FIRST_IP + number


def attrs_of(number: int) -> LeaseAttrs:
    """What a host publishes: a lease of the vxlan backend, the longest there is."""
    mac = f"02:00:00:{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
    return LeaseAttrs(ip_of(number), "vxlan", f'{{"VtepMAC":"{mac}"}}')


def checksum(leases: Iterable[tuple[IPv4Network, IPv4Address]]) -> int:
    """A number for a set of leases, whatever their order; that of one more is its own XORed in."""
    total = 0
    for subnet, address in leases:
        total ^= hash((int(subnet.network_address), subnet.prefixlen, int(address)))
    return total


class CountedStore:
    """A `LeaseStore` that counts a host's requests, and notes when it knew how much."""

    def __init__(self, store: LeaseStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self.seen = 0
        """The index up to which this host knows the leases, and since when (time.monotonic())."""
        self.seen_at = 0.0
        self.snapshot_at = 0.0
        """When the last list of all leases had come."""

    def take_calls(self) -> Counter[str]:
        """Return, once, the number of requests by kind, and of failures by kind and error."""
        with self._lock:
            taken, self._calls = self._calls, Counter()
        return taken

    def _counted(self, kind: str, call: Callable[[], T]) -> T:
        outcome = kind
        try:
            return call()
        except StoreError as error:
            outcome = f"{kind}: {type(error).__name__}"
            raise
        finally:
            with self._lock:
                self._calls[kind] += 1
                if outcome != kind:
                    self._calls[outcome] += 1

    def _knows(self, index: int) -> None:
        if index > self.seen:
            self.seen_at, self.seen = time.monotonic(), index

    def read_config(self) -> str:
        return self._counted("config", self._store.read_config)

    def snapshot(self) -> Snapshot:
        snapshot = self._counted("snapshot", self._store.snapshot)
        self.snapshot_at = time.monotonic()
        self._knows(snapshot.index)
        return snapshot

    def read(self, name: str) -> tuple[Node | None, int]:
        return self._counted("read own", lambda: self._store.read(name))

    def create(self, name: str, value: str, ttl: int | None) -> Node:
        return self._counted("create", lambda: self._store.create(name, value, ttl))

    def swap(self, before: Node, value: str, ttl: int | None) -> Node:
        return self._counted("swap", lambda: self._store.swap(before, value, ttl))

    def remove(self, before: Node) -> None:
        self._counted("remove", lambda: self._store.remove(before))

    def poll(self, name: str | None, after: int, timeout: float) -> Poll:
        kind = "poll leases" if name is None else "poll own"
        poll = self._counted(kind, lambda: self._store.poll(name, after, timeout))
        if name is None:
            self._knows(poll.index)
        return poll

    def close(self) -> None:
        self._store.close()


class _Monitor(LeaseMonitor):
    """A lease monitor that can be told that the time of renewal has come."""

    def renew_now(self) -> None:
        self._renew_at = now()
        self._inbox.put(None)


class SimulatedHost:
    """A daemon's subnet manager and the threads around it. `stop` ends them all."""

    def __init__(
        self, number: int, endpoints: str, prefix: str, previous: IPv4Network | None
    ) -> None:
        self.number = number
        self.store = CountedStore(EtcdV2Store(endpoints, prefix, Credentials()))
        self.lease: Lease | None = None
        self.leased_at = 0.0
        self.peers = 0
        """How many other hosts' leases it uses, and their checksum."""
        self.sum = 0
        self.changed_at = 0.0
        """When these last changed."""
        self.died: str = ""
        self._manager = LocalManager(self.store, previous)
        self._monitor: _Monitor | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, gate: threading.Event) -> None:
        """Begin, in a thread of its own, once ``gate`` is open."""
        self._spawn(lambda: self._live(gate))

    def renew(self) -> None:
        """Its lease is to be renewed now."""
        if self._monitor is not None:
            self._monitor.renew_now()

    def stop(self) -> None:
        self._stop.set()
        self._manager.close()
        if self._monitor is not None:
            self._monitor.fail(Stopped())

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10.0)

    def _spawn(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(run,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - told to whoever asks how it is
            if not self._stop.is_set():
                self.died = repr(error)

    def _live(self, gate: threading.Event) -> None:
        gate.wait()
        manager, stop = self._manager, self._stop
        config = self._config()
        lease = manager.acquire_lease(config, attrs_of(self.number), stop)
        self.leased_at = time.monotonic()
        self.lease = lease
        monitor = self._monitor = _Monitor(manager, lease, _MARGIN)
        self._spawn(lambda: monitor.feed(stop))
        self._spawn(lambda: monitor.run(stop))
        for events in manager.watch_leases(config, lease, stop):
            for event in events:
                leases = [event.lease] if event.previous is None else [event.lease, event.previous]
                self.sum ^= checksum((lease.subnet, lease.attrs.public_ip) for lease in leases)
                if event.type is EventType.REMOVED:
                    self.peers -= 1
                elif event.previous is None:
                    self.peers += 1
            self.changed_at = time.monotonic()

    def _config(self) -> Config:
        """The network config; asked for again and again, as the daemon's start does."""
        while not self._stop.is_set():
            try:
                return self._manager.network_config()
            except StoreError:
                self._stop.wait(_RETRY)
        raise Stopped


@dataclass(frozen=True, slots=True)
class State:
    """How one host is."""

    number: int
    subnet: IPv4Network | None
    leased_at: float
    """time.monotonic(), which all processes of a machine share."""
    peers: int
    sum: int
    changed_at: float
    seen: int
    seen_at: float
    snapshot_at: float
    died: str

    @staticmethod
    def of(host: SimulatedHost) -> "State":
        store = host.store
        return State(
            host.number,
            host.lease.subnet if host.lease else None,
            host.leased_at,
            host.peers,
            host.sum,
            host.changed_at,
            store.seen,
            store.seen_at,
            store.snapshot_at,
            host.died,
        )


@dataclass(frozen=True, slots=True)
class Tally:
    """What hosts have done since they were last asked."""

    calls: Counter[str] = field(default_factory=Counter)
    """Requests by kind (``create``), failures by kind and error (``create: CompareFailed``)."""
    lost: tuple[int, ...] = ()
    """For each host how often another was faster."""
    logged: Counter[str] = field(default_factory=Counter)
    """Warnings and errors in their logs, by their unfilled text."""
    cpu: float = 0.0
    """Seconds of their processes."""


class _LogCount(logging.Handler):
    """Counts warnings instead of writing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        # An index or a port in it must not make each its own.
        self.seen["".join("N" if c.isdecimal() else c for c in str(record.msg))] += 1


class _Worker:
    """One process with its share of the hosts; answers the parent's questions."""

    def __init__(self, endpoints: str, prefix: str, hosts: dict[int, IPv4Network | None]) -> None:
        self._log = _LogCount()
        logging.getLogger().addHandler(self._log)
        self._hosts = [SimulatedHost(n, endpoints, prefix, p) for n, p in hosts.items()]
        self._gate = threading.Event()
        for host in self._hosts:
            host.start(self._gate)

    def open(self, when: float) -> None:
        """Let all hosts begin at this moment (time.monotonic())."""
        time.sleep(max(0.0, when - time.monotonic()))
        self._gate.set()

    def renew(self, numbers: Sequence[int], when: float) -> None:
        """Let these hosts renew their leases at this moment."""
        wanted = set(numbers)
        chosen = [host for host in self._hosts if host.number in wanted]
        time.sleep(max(0.0, when - time.monotonic()))
        for host in chosen:
            host.renew()

    def states(self) -> list[State]:
        return [State.of(host) for host in self._hosts]

    def tally(self) -> Tally:
        each = [host.store.take_calls() for host in self._hosts]
        lost = [sum(n for kind, n in calls.items() if "CompareFailed" in kind) for calls in each]
        logged, self._log.seen = self._log.seen, Counter()
        used = resource.getrusage(resource.RUSAGE_SELF)
        total = sum(each, Counter[str]())
        return Tally(total, tuple(lost), logged, used.ru_utime + used.ru_stime)

    def stop(self) -> None:
        for host in self._hosts:
            host.stop()
        for host in self._hosts:
            host.join()


def serve(
    pipe: Connection, endpoints: str, prefix: str, hosts: dict[int, IPv4Network | None]
) -> None:
    """The body of a process: do what the parent asks until it says stop, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _yield_to_etcd()
    # Of a million leases in one process, which no daemon has: it took nine tenths of the time.
    gc.disable()
    sys.setswitchinterval(_SWITCH)
    threading.stack_size(_STACK)
    _raise_limit()
    _share_parsing()
    worker = _Worker(endpoints, prefix, hosts)
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            pipe.send(getattr(worker, name)(*arguments))
            if name == "stop":
                break
    # Threads that have not ended hold nothing that matters.
    os._exit(0)


def _yield_to_etcd() -> None:
    os.nice(_NICE)
    # Where the kernel shares the processors out by sessions first (sched(7), autogroup), the nice
    # value counts within one only: etcd, in another, got a sixth of what it could have used.
    with contextlib.suppress(OSError):
        os.setsid()
        Path("/proc/self/autogroup").write_text(str(_NICE))


def _share_parsing() -> None:
    once = lru_cache(_PARSED)(parse_lease)
    for module in (acquire, local_manager, watch):
        vars(module)["parse_lease"] = once


def _raise_limit() -> None:
    """Three connections for each host are more than the usual 1024 descriptors."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
