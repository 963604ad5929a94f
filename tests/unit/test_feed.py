"""The lease events on their way from the store's thread to the backend's loop."""

import queue
import select
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from flanneld.backend.feed import LeaseFeed
from flanneld.heartbeat import Heartbeat
from flanneld.subnet.config import parse_config
from flanneld.subnet.lease import Lease, LeaseAttrs
from flanneld.subnet.watch import EventType, LeaseEvent

CONFIG = parse_config('{"Network":"10.5.0.0/16"}')
PATIENCE_MS = 10_000


def batch(number: int) -> list[LeaseEvent]:
    lease = Lease(
        IPv4Network(f"10.5.{number}.0/24"), LeaseAttrs(IPv4Address("10.97.0.2")), 86400, number
    )
    return [LeaseEvent(EventType.ADDED, lease)]


class Store:
    """A subnet manager that yields what it is given; an exception it raises."""

    def __init__(self) -> None:
        self.given: queue.SimpleQueue[list[LeaseEvent] | Exception] = queue.SimpleQueue()
        self.asked = threading.Semaphore(0)

    def watch_leases(self, *_: object) -> Iterator[list[LeaseEvent]]:
        while True:
            self.asked.release()
            item = self.given.get()
            if isinstance(item, Exception):
                raise item
            yield item


class Following:
    """A feed that follows a store."""

    def __init__(self) -> None:
        self.store, stop = Store(), threading.Event()
        manager: Any = self.store
        own = batch(200)[0].lease
        self.feed = LeaseFeed(manager, CONFIG, own)
        self.feed.start(stop, Heartbeat().pulse("leases"))
        self.store.asked.acquire(timeout=10)

    def put(self, item: list[LeaseEvent] | Exception) -> None:
        """Have the store yield it; returns when it has come."""
        self.store.given.put(item)
        if not isinstance(item, Exception):
            assert self.store.asked.acquire(timeout=10)

    def rings(self, within_ms: int = 0) -> bool:
        poll = select.poll()
        poll.register(self.feed, select.POLLIN)
        return bool(poll.poll(within_ms))


@pytest.fixture
def following() -> Iterator[Following]:
    made = Following()
    yield made
    made.put(RuntimeError("the end"))


def test_each_batch_rings_for_itself_so_that_the_loop_comes_round(following: Following) -> None:
    """A loop that took all there is would do nothing else while leases change faster than that."""
    batches = [batch(n) for n in range(1, 4)]
    for each in batches:
        following.put(each)
    for each in batches:
        assert following.rings()
        assert following.feed.take() == each
    assert not following.rings()
    assert following.feed.take() is None


def test_a_wake_brings_no_batch_and_costs_none(following: Following) -> None:
    following.feed.wake()
    assert following.rings()
    assert following.feed.take() is None
    following.feed.wake()
    following.put(batch(1))
    assert following.feed.take() == batch(1)
    assert following.feed.take() is None
    assert not following.rings()


def test_what_ends_the_following_is_raised_after_the_batches() -> None:
    following = Following()
    following.put(batch(1))
    following.put(ValueError("no such store"))
    assert following.feed.take() == batch(1)
    assert following.rings(PATIENCE_MS)
    with pytest.raises(ValueError, match="no such store"):
        following.feed.take()
