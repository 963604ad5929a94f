"""The lease monitor, through days that pass in no time.

A real `LocalManager` on the double of `memory_store`; its watch runs in a thread, as in the daemon.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from types import SimpleNamespace

import pytest
from memory_store import PATIENCE, Clock, Data, MemoryStore, Stop

from flanneld import retry
from flanneld.errors import LeaseLost
from flanneld.subnet import local_manager, monitor
from flanneld.subnet.config import parse_config
from flanneld.subnet.lease import LeaseAttrs
from flanneld.subnet.local_manager import LEASE_TTL, LocalManager
from flanneld.subnet.monitor import FIGHTS, LOOK, RETRY, RETRY_LOST, LeaseMonitor

KEY = "10.5.34.0-24"
IP = IPv4Address("10.97.0.1")
ATTRS = LeaseAttrs(IP, "host-gw")
VALUE = ATTRS.encode()
OTHER = LeaseAttrs(IPv4Address("10.97.0.2"), "host-gw").encode()
CONFIG = parse_config('{"Network":"10.5.0.0/16"}')
MARGIN = 3600.0

Step = Callable[[], object]


class Inbox:
    """The monitor's inbox: when it is empty the next step of the test happens, or time passes."""

    def __init__(self) -> None:
        self.items: deque[object] = deque()
        self.steps: deque[Step | float] = deque()
        self.clock = Clock()
        self.finish: Step = lambda: None
        self.waits: list[float] = []

    def put(self, item: object) -> None:
        self.items.append(item)

    def get(self, timeout: float) -> object:
        if not self.items and self.steps:
            match self.steps[0]:
                case int() | float() as seconds:
                    # As much of it as the monitor would wait.
                    self.waits.append(timeout)
                    self.clock.time += min(seconds, timeout)
                    self.steps.popleft()
                    if seconds > timeout:
                        self.steps.appendleft(seconds - timeout)
                case step:
                    self.steps.popleft()
                    step()
        elif not self.items:
            self.finish()
            return None
        if self.items:
            return self.items.popleft()
        raise queue.Empty


class Host:
    """A host that holds a lease since the clock's 1000, and its monitor."""

    def __init__(self, clock: Clock, inbox: Inbox) -> None:
        self.clock = inbox.clock = clock
        self.inbox = inbox
        self.data = Data(clock)
        self.store = MemoryStore(self.data)
        self.stop = Stop(clock)
        self.manager = LocalManager(self.store, IPv4Network("10.5.34.0/24"))

    def start(self) -> None:
        lease = self.manager.acquire_lease(CONFIG, ATTRS, threading.Event())
        self.monitor = LeaseMonitor(self.manager, lease, MARGIN)
        self.thread = threading.Thread(target=self.monitor.feed, args=(self.stop,))

    def run(self, *steps: Step | float) -> None:
        """Run the monitor through the steps: numbers are seconds to pass, the rest is called."""
        self.inbox.steps.extend([self.settle])
        for step in steps:
            self.inbox.steps.extend([step] if isinstance(step, int | float) else [step, self.settle])
        self.inbox.finish = self.stop.set
        self.thread.start()
        try:
            self.monitor.run(self.stop)
        finally:
            self.stop.set()
            self.store.close()
            self.thread.join(PATIENCE)
            assert not self.thread.is_alive()

    def settle(self) -> None:
        """Wait until the watch has told everything there is."""
        if self.store.down:
            return
        with self.data.changed:
            self.store.idle.clear()
            self.data.changed.notify_all()
        assert self.store.idle.wait(PATIENCE)

    def ours(self, ttl: int | None = LEASE_TTL) -> bool:
        node = self.data.node(KEY)
        return node is not None and (node.value, node.ttl) == (VALUE, ttl)

    def writes(self) -> int:
        return len([call for call in self.store.calls if call in ("create", "swap")])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    clock, inbox = Clock(), Inbox()
    for module in (local_manager, monitor, retry):
        monkeypatch.setattr(module, "now", clock)
    fake = SimpleNamespace(SimpleQueue=lambda: inbox, Empty=queue.Empty)
    monkeypatch.setattr(monitor, "queue", fake)
    host = Host(clock, inbox)
    host.start()
    return host


DUE = LEASE_TTL - MARGIN


def test_nothing_happens_before_the_time(host: Host) -> None:
    host.run(DUE - 1)
    assert host.writes() == 1
    # The clock is looked at again and again, for a host may sleep.
    assert max(host.inbox.waits) == LOOK


def test_renewed_in_time(host: Host) -> None:
    renewed: list[float] = []

    def note() -> None:
        node = host.data.node(KEY)
        assert node is not None
        renewed.append(host.clock())

    host.run(DUE - 1, lambda: renewed.append(host.writes()), 1, lambda: renewed.append(host.writes()), note)
    assert renewed == [1, 2, 1000 + DUE]
    assert host.ours()
    assert host.monitor._lease.modified_index == host.data.keys[KEY].index
