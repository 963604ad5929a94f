"""A `LeaseStore` in memory, a clock that stands still, and a stop event that never sleeps.

A double, for what cannot be had from a real etcd: an answer that is lost after the write was
carried out, another host's write at one exact moment, a day that passes in no time. That a real
etcd keeps the same contract is tested in tests/store.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from flanneld.errors import (
    CompareFailed,
    HistoryCleared,
    KeyNotFound,
    StoreSilent,
    StoreUnavailable,
)
from flanneld.subnet.store import Behind, Change, Node, Poll, Snapshot, StoreEvent

T = TypeVar("T")

# Seconds; a test that waits so long has failed.
PATIENCE = 10.0
ENDLESS = 1000


@dataclass
class Clock:
    """Seconds that pass only when they are told to; takes the place of `flanneld.clock.now`."""

    time: float = 1000.0

    def __call__(self) -> float:
        return self.time


class Stop(threading.Event):
    """A stop event whose waits take no time, but move the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            self.waits.append(timeout or 0)
            assert len(self.waits) < ENDLESS, "waiting for ever"
            self.clock.time += timeout or 0
        return self.is_set()


@dataclass
class Key:
    value: str
    end: float | None
    index: int
    created: int


@dataclass
class Data:
    """What all hosts share."""

    clock: Clock
    config: str = '{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}'
    index: int = 1
    keys: dict[str, Key] = field(default_factory=dict)
    log: list[StoreEvent] = field(default_factory=list)
    log_start: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def put(
        self, name: str, value: str, ttl: int | None = None, created: int | None = None
    ) -> Node:
        """Write a key unconditionally, as an operator or a Go daemon may.

        That makes it a new one for etcd; a swap keeps the index at which it was ``created``.
        """
        with self.changed:
            self.index += 1
            end = None if ttl is None else self.clock() + ttl
            key = self.keys[name] = Key(value, end, self.index, created or self.index)
            node = Node(name, value, ttl, self.index, key.created)
            self._log(StoreEvent(Change.SET, name, node, self.index))
            return node

    def delete(self, name: str) -> None:
        with self.changed:
            self.index += 1
            del self.keys[name]
            self._log(StoreEvent(Change.GONE, name, None, self.index))

    def delete_directory(self) -> None:
        with self.changed:
            self.index += 1
            self.keys.clear()
            self._log(StoreEvent(Change.ALL_GONE, "", None, self.index))

    def backup(self) -> tuple[int, dict[str, Key]]:
        return self.index, dict(self.keys)

    def restore(self, backup: tuple[int, dict[str, Key]]) -> None:
        with self.changed:
            self.index, self.keys = backup[0], dict(backup[1])
            self.log, self.log_start = [], self.index
            self.changed.notify_all()

    def forget_history(self) -> None:
        """Keep no event from before now."""
        with self.changed:
            self.log, self.log_start = [], self.index
            self.changed.notify_all()

    def expire(self) -> None:
        now = self.clock()
        for name in [n for n, key in self.keys.items() if key.end is not None and key.end <= now]:
            self.delete(name)

    def node(self, name: str) -> Node | None:
        key = self.keys.get(name)
        if key is None:
            return None
        ttl = None if key.end is None else int(key.end - self.clock())
        return Node(name, key.value, ttl, key.index, key.created)

    def look(self, name: str | None, after: int) -> Poll | None:
        """Answer a poll; None while there is nothing to tell."""
        self.expire()
        if after > self.index:
            raise Behind(f"index {self.index} is behind {after}")
        if after < self.log_start:
            raise HistoryCleared("401: The event in requested index is outdated")
        for event in self.log:
            if event.index > after and event.name in (name or event.name, ""):
                return Poll(event, event.index, self.index)
        return None

    def _log(self, event: StoreEvent) -> None:
        self.log.append(event)
        self.changed.notify_all()


class MemoryStore:
    """One host's way to the shared data."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.faults: deque[str | None] = deque()
        """For each of the next calls: "before" or "after" it is carried out the store fails."""
        self.before_write: deque[Callable[[], object]] = deque()
        """Called before each of the next writes: what other hosts do between read and write."""
        self.on_call: Callable[[], object] = lambda: None
        self.on_idle: Callable[[float], bool] | None = None
        """Called with the timeout when a poll finds nothing; says if it is over. Default: wait."""
        self.idle = threading.Event()
        """A poll waits, and has nothing to tell."""
        self.calls: list[str] = []
        self.closed = False
        self.down = False

    def read_config(self) -> str:
        def look() -> str:
            if not self.data.config:
                raise KeyNotFound("100: Key not found (/config)", self.data.index)
            return self.data.config

        return self._call("config", look)

    def snapshot(self) -> Snapshot:
        def take() -> Snapshot:
            nodes = [node for name in self.data.keys if (node := self.data.node(name))]
            return Snapshot(tuple(nodes), self.data.index)

        return self._call("snapshot", take)

    def read(self, name: str) -> tuple[Node | None, int]:
        return self._call("read", lambda: (self.data.node(name), self.data.index))

    def create(self, name: str, value: str, ttl: int | None) -> Node:
        def write() -> Node:
            if name in self.data.keys:
                raise CompareFailed(f"105: Key already exists ({name})")
            return self.data.put(name, value, ttl)

        return self._call("create", write, write=True)

    def swap(self, before: Node, value: str, ttl: int | None) -> Node:
        def write() -> Node:
            return self.data.put(before.name, value, ttl, self._compare(before).created)

        return self._call("swap", write, write=True)

    def remove(self, before: Node) -> None:
        def write() -> None:
            self._compare(before)
            self.data.delete(before.name)

        self._call("remove", write, write=True)

    def poll(self, name: str | None, after: int, timeout: float) -> Poll:
        self._call("poll", lambda: None)
        data = self.data
        with data.changed:
            while True:
                if self.closed or self.down:
                    raise StoreUnavailable("connection refused")
                found = data.look(name, after)
                if found is not None:
                    return found
                if self.on_idle is None:
                    self.idle.set()
                    assert data.changed.wait(PATIENCE), "nothing happened"
                    self.idle.clear()
                elif self.on_idle(timeout):
                    return Poll(None, data.index, data.index)

    def close(self) -> None:
        with self.data.changed:
            self.closed = True
            self.data.changed.notify_all()

    def go_down(self, down: bool) -> None:
        """Make every call fail, also those under way; or none any more."""
        with self.data.changed:
            self.down = down
            self.data.changed.notify_all()

    def _compare(self, before: Node) -> Key:
        assert before.index > 0
        key = self.data.keys.get(before.name)
        if key is None:
            raise KeyNotFound(f"100: Key not found ({before.name})", self.data.index)
        if (key.value, key.index) != (before.value, before.index):
            raise CompareFailed(f"101: Compare failed ({before} != {key})")
        return key

    def _call(self, name: str, action: Callable[[], T], *, write: bool = False) -> T:
        self.on_call()
        self.calls.append(name)
        if write and self.before_write:
            self.before_write.popleft()()
        fault = self.faults.popleft() if self.faults else None
        if self.closed or self.down or fault == "before":
            raise StoreUnavailable("connection refused")
        if fault == "silent":
            raise StoreSilent("i/o timeout")
        with self.data.changed:
            self.data.expire()
            result = action()
        if fault == "after":
            raise StoreUnavailable("i/o timeout (the write may have been carried out)")
        return result
