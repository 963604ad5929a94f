"""Hosts with the real lease code on one store, in virtual time, one request at a time.

Each loop of a daemon (acquiring and monitoring its lease; watching it) is a thread that runs only
while it is given the turn. It hands the turn back at every request to the store, before and after
it is carried out, and whenever it waits. So a test decides the order of everything that happens,
and the same decisions always end the same.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Literal, TypeVar

from memory_store import PATIENCE, Clock, Data, Key, MemoryStore

from flanneld.errors import ConfigChanged, ConfigError, Stopped, StoreError, StoreUnavailable
from flanneld.subnet.config import Config
from flanneld.subnet.lease import BadLease, Lease, LeaseAttrs, parse_lease
from flanneld.subnet.local_manager import LocalManager
from flanneld.subnet.manager import LeaseStatus
from flanneld.subnet.monitor import LeaseMonitor
from flanneld.subnet.store import Node, Poll, Snapshot

T = TypeVar("T")

MARGIN = 3600.0

Fault = Literal["before", "after", "late"]
"""A request that never arrives, one whose answer is lost, one that arrives after it was given up"""


class Killed(BaseException):
    """Ends a thread as kill -9 ends a process: where it stands."""


class Task:
    """A thread that runs only while it is given the turn."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.over = False
        self.error: BaseException | None = None
        self._body = body
        self._killed = False
        self._ready: Callable[[], object] = lambda: True
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.read_in = 0
        """The store's history in which it has read last."""
        self.until: float | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._killed:
                self._body()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - judged by the test
            self.error = error
        finally:
            self.over = True
            self._back.release()

    def pause(self, ready: Callable[[], object], until: float | None) -> None:
        """Give the turn back until ``ready``, or until a time. Called in the thread itself."""
        self._ready, self.until = ready, until
        self._back.release()
        self._turn.acquire()
        if self._killed:
            raise Killed

    def runnable(self, now: float) -> bool:
        return not self.over and bool(
            (self.until is not None and now >= self.until) or self._ready()
        )

    def step(self) -> None:
        """Let it go on to its next pause."""
        self._turn.release()
        assert self._back.acquire(timeout=PATIENCE), "it waits for what is not simulated"

    def kill(self) -> None:
        self._killed = True
        if not self.over:
            self.step()


def readable(name: str, key: Key) -> Lease | None:
    """The lease in a key; None if there is none."""
    try:
        return parse_lease(name, key.value, None if key.end is None else 1, key.index)
    except BadLease:
        return None


class SharedData(Data):
    """The store's data, and judge of every write that a host makes."""

    def __init__(self, clock: Clock, config: str) -> None:
        super().__init__(clock, config)
        self.writer: Host | None = None
        self.decided_in = 0
        self.late: list[Callable[[], object]] = []
        self.history: list[tuple[str, Key]] = []
        self.restarts = 0
        self.on_loss: Callable[[str], None] = lambda _: None

    def put(
        self, name: str, value: str, ttl: int | None = None, created: int | None = None
    ) -> Node:
        self._judge(name, ends=ttl is not None)
        node = super().put(name, value, ttl, created)
        if self.writer is None:
            self.on_loss(name)
        self.history.append((name, self.keys[name]))
        return node

    def delete(self, name: str) -> None:
        self._judge(name, ends=True)
        super().delete(name)
        self.on_loss(name)

    def _judge(self, name: str, *, ends: bool) -> None:
        """Never another host's lease overwritten or deleted, never an end for a reservation."""
        key = self.keys.get(name)
        lease = readable(name, key) if key else None
        if self.writer is not None and lease is not None:
            assert lease.attrs.public_ip == self.writer.attrs.public_ip, (
                f"{self.writer} wrote into {lease}"
            )
            # Nothing tells that only a key's end is new if a restored store counted on from
            # before it, and came to the same index and value again.
            same = self.decided_in == self.restarts
            assert not (same and lease.is_reservation and ends), f"{self.writer} ended {lease}"

    def delete_directory(self) -> None:
        names = list(self.keys)
        super().delete_directory()
        for name in names:
            self.on_loss(name)

    def restore(self, backup: tuple[int, dict[str, Key]]) -> None:
        names = list(self.keys)
        super().restore(backup)
        for name in names:
            self.on_loss(name)
        self.history.extend(self.keys.items())
        self.late.clear()
        self.restarts += 1

    def deliver_late(self) -> None:
        """What was given up for lost arrives all the same."""
        while self.late:
            try:
                self.late.pop(0)()
            except StoreError:
                continue


class Access(MemoryStore):
    """One host's way to the store: each request is two steps, there and back."""

    data: SharedData

    def __init__(self, host: "Host") -> None:
        super().__init__(host.network.data)
        self.host = host
        self.seen: Snapshot | None = None
        self.decided_on: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        self.seen = super().snapshot()
        return self.seen

    def poll(self, name: str | None, after: int, timeout: float) -> Poll:
        network, data = self.host.network, self.data
        end = network.clock.time + timeout
        self._call("poll", lambda: None)
        restarts = data.restarts
        while True:
            if self.host.cut or data.restarts != restarts:
                raise StoreUnavailable("connection reset by peer")
            found = data.look(name, after)
            if found is None and network.clock.time >= end:
                found = Poll(None, data.index, data.index)
            if found is not None:
                return found
            network.pause(partial(self._has_news, data.index, restarts), end)

    def _has_news(self, index: int, restarts: int) -> bool:
        return self.host.cut or (self.data.index, self.data.restarts) != (index, restarts)

    def _call(self, name: str, action: Callable[[], T], *, write: bool = False) -> T:
        host, network = self.host, self.host.network
        task = network.task
        assert task is not None
        self.calls.append(name)
        if write:
            self.decided_on = self.seen

        def carry_out() -> T:
            self.data.expire()
            self.data.writer, self.data.decided_in = host, task.read_in
            try:
                return action()
            finally:
                self.data.writer = None

        network.pause()
        fault = host.faults.popleft() if host.faults and write else None
        if host.cut or fault == "before":
            raise StoreUnavailable("connection refused")
        if fault == "late":
            self.data.late.append(carry_out)
            raise StoreUnavailable("i/o timeout (the write may have been carried out)")
        result = carry_out()
        if not write:
            task.read_in = self.data.restarts
        network.pause()
        if host.cut or fault == "after":
            raise StoreUnavailable("i/o timeout (the write may have been carried out)")
        return result


class Manager(LocalManager):
    """Notes from when on the host holds its lease again."""

    def __init__(self, host: "Host", store: Access) -> None:
        super().__init__(store, host.previous)
        self._host = host

    def keep_lease(self, lease: Lease) -> Lease:
        kept = super().keep_lease(lease)
        self._host.entitled = self._host.published(kept)
        return kept


class Stop(threading.Event):
    """A stop event that is waited for in virtual time."""

    def __init__(self, network: "Network") -> None:
        super().__init__()
        self._network = network

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if not self.is_set():
            self._network.pause(self.is_set, self._network.clock.time + timeout)
        return self.is_set()


class Inbox:
    """As `queue.SimpleQueue`, in virtual time."""

    def __init__(self, network: "Network") -> None:
        self._network = network
        self._items: deque[LeaseStatus] = deque()

    def put(self, item: LeaseStatus) -> None:
        self._items.append(item)

    def get(self, timeout: float) -> LeaseStatus:
        if not self._items:
            self._network.pause(lambda: self._items, self._network.clock.time + timeout)
        if not self._items:
            raise queue.Empty
        return self._items.popleft()


class Host:
    """A host, whose daemon runs or not. ``boot`` is how far its steady clock is off the others'."""

    def __init__(self, network: "Network", number: int) -> None:
        self.network = network
        self.number = number
        self.attrs = LeaseAttrs(IPv4Address(f"10.97.0.{number + 1}"), "host-gw")
        self.boot = 1e5 * number
        self.previous: IPv4Network | None = None
        """What its subnet file says."""
        self.faults: deque[Fault | None] = deque()
        self.cut = False
        self.suspended = False
        self.tasks: list[Task] = []
        self.lease: Lease | None = None
        """What its running daemon believes to hold."""
        self.entitled = False
        """And rightly: neither time nor an operator has taken it away since."""
        self.present: list[tuple[str, Key]] = []
        """The store's keys when it got its lease."""
        self.since = 0
        self.ended: BaseException | None = None

    def __str__(self) -> str:
        return f"host {self.attrs.public_ip}"

    @property
    def running(self) -> bool:
        return bool(self.tasks)

    def start(self) -> None:
        self.tasks = [Task(self._daemon)]

    def crash(self) -> None:
        for task in self.tasks:
            task.kill()
        self.tasks, self.lease, self.entitled = [], None, False

    def step(self, task: Task) -> None:
        self.network.current = self
        self.network.task = task
        task.step()
        if not task.over:
            return
        self.ended = task.error
        self.crash()

    def _daemon(self) -> None:
        access, stop = Access(self), Stop(self.network)
        manager = Manager(self, access)
        while True:
            try:
                config = manager.network_config()
                lease = manager.acquire_lease(config, self.attrs, stop)
            except (StoreError, ConfigError):
                stop.wait(1.0)
            except ConfigChanged:
                continue
            except Stopped:
                return
            else:
                break
        assert access.decided_on is not None
        self.network.on_acquired(self, config, lease, access.decided_on)
        self.previous, self.lease = lease.subnet, lease
        self.since = len(self.network.data.history)
        self.present = list(self.network.data.keys.items())
        self.entitled = self.published(lease)
        monitor = LeaseMonitor(manager, lease, MARGIN)
        self.tasks.append(Task(lambda: monitor.feed(stop)))
        monitor.run(stop)

    def published(self, lease: Lease) -> bool:
        """Whether the store has this lease for this host."""
        key = self.network.data.keys.get(lease.key)
        stored = readable(lease.key, key) if key else None
        return stored is not None and stored.attrs.public_ip == self.attrs.public_ip


@dataclass
class Network:
    """All hosts, and who has the turn."""

    clock: Clock
    data: SharedData
    on_acquired: Callable[[Host, Config, Lease, Snapshot], None]
    hosts: list[Host] = field(default_factory=list)
    current: Host | None = None
    task: Task | None = None

    def __post_init__(self) -> None:
        self.data.on_loss = self._lost

    def _lost(self, name: str) -> None:
        for host in self.hosts:
            if host.lease is not None and host.lease.key == name and not host.published(host.lease):
                host.entitled = False

    def now(self) -> float:
        """In the place of `flanneld.clock.now`: the clock of the host that has the turn."""
        return self.clock.time + (self.current.boot if self.current else 0.0)

    def pause(self, ready: Callable[[], object] = lambda: True, until: float | None = None) -> None:
        assert self.task is not None
        self.task.pause(ready, until)

    def runnable(self) -> list[tuple[Host, Task]]:
        time = self.clock.time
        return [
            (host, task)
            for host in self.hosts
            if not host.suspended
            for task in host.tasks
            if task.runnable(time)
        ]

    def run(self) -> None:
        """Let all hosts go on, in turns, until each waits for something."""
        for _ in range(1000):
            turns = self.runnable()
            if not turns:
                return
            for host, task in turns:
                if task in host.tasks:
                    host.step(task)
        raise AssertionError("the hosts never come to rest")

    def run_for(self, seconds: float) -> None:
        """Let time pass, and all hosts do what they do in it."""
        end = self.clock.time + seconds
        for _ in range(50_000):
            self.run()
            waits = [
                task.until
                for host in self.hosts
                if not host.suspended
                for task in host.tasks
                if task.until is not None
            ]
            self.clock.time = min([end, *waits])
            if self.clock.time >= end:
                self.run()
                return
        raise AssertionError("the hosts try without end")
