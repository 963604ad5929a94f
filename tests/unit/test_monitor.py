"""The lease monitor, through days that pass in no time.

A real `LocalManager` on the double of `memory_store`; its watch runs in a thread, as in the daemon.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from types import SimpleNamespace

import pytest
from memory_store import PATIENCE, Clock, Data, MemoryStore

from flanneld import retry
from flanneld.errors import LeaseLost, StoreUnavailable
from flanneld.subnet import acquire, local_manager, monitor
from flanneld.subnet.config import parse_config
from flanneld.subnet.lease import LEASE_TTL, Lease, LeaseAttrs
from flanneld.subnet.local_manager import LocalManager
from flanneld.subnet.monitor import FIGHT_TIME, FIGHTS, RETRY, RETRY_LOST, LeaseMonitor

KEY = "10.5.34.0-24"
ATTRS = LeaseAttrs(IPv4Address("10.97.0.1"), "host-gw")
VALUE = ATTRS.encode()
OTHER = LeaseAttrs(IPv4Address("10.97.0.2"), "host-gw").encode()
CONFIG = parse_config('{"Network":"10.5.0.0/16"}')
MARGIN = 3600
DUE = LEASE_TTL - MARGIN
LOOK = 600.0

Step = float | Callable[[], object]


class WatchStop(threading.Event):
    """A stop event that is waited for only while the store is away."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__()
        self._store = store
        self.waiting = threading.Event()

    def wait(self, _timeout: float | None = None) -> bool:
        with self._store.data.changed:
            self.waiting.set()
            while self._store.down and not self.is_set():
                assert self._store.data.changed.wait(PATIENCE)
            self.waiting.clear()
        return self.is_set()


class Host:
    """A host that holds a lease since the clock's 1000, its monitor, and the monitor's inbox."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.data = Data(clock)
        self.store = MemoryStore(self.data)
        self.stop = WatchStop(self.store)
        self.waits: list[float] = []
        self._inbox: deque[object] = deque()
        self._steps: deque[Step] = deque()

    def run(self, *steps: Step) -> None:
        """Run the monitor through the steps: numbers are seconds that pass, the rest is called."""
        self._steps.extend(steps)
        manager = LocalManager(self.store, IPv4Network("10.5.34.0/24"))
        lease = manager.acquire_lease(CONFIG, ATTRS, threading.Event())
        self.store.calls.clear()
        self.monitor = LeaseMonitor(manager, lease, MARGIN)
        thread = threading.Thread(target=self.monitor.feed, args=(self.stop,))
        thread.start()
        try:
            self.monitor.run(self.stop)
        finally:
            self.stop.set()
            self.store.close()
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not self._steps

    def put(self, item: object) -> None:
        """As `queue.SimpleQueue.put`."""
        self._inbox.append(item)

    def get(self, timeout: float) -> object:
        """As `queue.SimpleQueue.get`: when there is nothing, the next step happens."""
        self._settle()
        if not self._inbox:
            self._next(timeout)
            self._settle()
        if not self._inbox:
            raise queue.Empty
        return self._inbox.popleft()

    def _next(self, timeout: float) -> None:
        step = self._steps.popleft() if self._steps else self.stop.set
        if isinstance(step, int | float):
            self.waits.append(timeout)
            self.clock.time += min(step, timeout)
            if step > timeout:
                self._steps.appendleft(step - timeout)
        else:
            step()

    def _settle(self) -> None:
        """Wait until the watch has told everything there is."""
        if self.store.down or self.stop.is_set():
            return
        with self.data.changed:
            self.store.idle.clear()
            self.data.changed.notify_all()
        assert self.store.idle.wait(PATIENCE)

    # Steps.

    def check(self, writes: int, ttl: int | None = LEASE_TTL) -> Callable[[], None]:
        """Check how often our lease was written since the start, and that it is in place."""

        def step() -> None:
            assert self.writes() == writes
            node = self.data.node(KEY)
            assert node is not None
            assert (node.value, node.ttl) == (VALUE, ttl)

        return step

    def writes(self) -> int:
        return len([call for call in self.store.calls if call in ("create", "swap")])

    def write(self, value: str, ttl: int | None = LEASE_TTL) -> Callable[[], object]:
        """Somebody else writes our key."""
        return lambda: self.data.put(KEY, value, ttl)

    def fail_next(self, *faults: str | None) -> Callable[[], object]:
        """The next calls fail, see `MemoryStore.faults`."""
        return lambda: self.store.faults.extend(faults)

    def delete(self) -> None:
        self.data.delete(KEY)

    def away(self) -> None:
        self.store.go_down(True)
        assert self.stop.waiting.wait(PATIENCE)

    def back(self) -> None:
        self.store.go_down(False)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(Clock())
    for module in (acquire, local_manager, monitor, retry):
        monkeypatch.setattr(module, "now", host.clock)
    fake = SimpleNamespace(SimpleQueue=lambda: host, Empty=queue.Empty)
    monkeypatch.setattr(monitor, "queue", fake)
    monkeypatch.setattr(monitor, "LOOK", LOOK)
    monkeypatch.setattr(monitor, "EARLY", 0.0)
    return host


# In time.


def test_renewed_when_it_is_due(host: Host) -> None:
    host.run(DUE - 1, host.check(0, MARGIN + 1), 1, host.check(1), DUE - 1)
    # The echo of our own write is no reason for another one.
    assert host.writes() == 1
    # The clock is looked at now and then: a wait does not count the time a host sleeps.
    assert max(host.waits) == LOOK


def test_renewed_for_ever(host: Host) -> None:
    host.run(DUE, host.check(1), DUE, host.check(2), DUE, host.check(3))


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0])
def test_hosts_that_started_together_do_not_renew_together(
    host: Host, monkeypatch: pytest.MonkeyPatch, moment: float
) -> None:
    """A moment of its own for each host and each renewal, however often the store is read."""
    monkeypatch.setattr(monitor, "EARLY", 0.1)
    monkeypatch.setattr(monitor, "uniform", lambda low, high: low + moment * (high - low))
    due = round(DUE * (1 - 0.1 * moment))
    read = host.write(VALUE, LEASE_TTL)
    again = round((LEASE_TTL - MARGIN) * (1 - 0.1 * moment))
    host.run(due - 1, host.check(0, LEASE_TTL - due + 1), 1, host.check(1), read, again - 1)
    assert host.writes() == 1


def test_the_moment_is_drawn_once_for_each_renewal(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a lease that is read once a minute would be renewed at the earliest of 1,400 moments."""
    draws = iter([0.0, 0.1])
    monkeypatch.setattr(monitor, "EARLY", 0.1)
    monkeypatch.setattr(monitor, "uniform", lambda *_: next(draws))
    host.run(DUE - 100, host.away, host.back, 99, host.check(0, MARGIN + 1), 1, host.check(1))


def test_renewed_at_once_after_a_suspension(host: Host) -> None:
    def sleep() -> None:
        host.clock.time += DUE + 5

    host.run(100, sleep, host.check(1))


def test_a_host_that_slept_too_long_takes_its_subnet_back(host: Host) -> None:
    def sleep() -> None:
        host.clock.time += 3 * LEASE_TTL

    host.run(100, sleep, lambda: None, host.check(1), 100, host.check(1, LEASE_TTL - 100))


# The store is away.


def test_a_failed_renewal_is_tried_again(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.run(
        DUE - 1,
        host.fail_next(None, "before", None, "before"),
        1,
        RETRY - 1,
        host.check(1, MARGIN - 59),
        1,
        host.check(2, MARGIN - 60),
        RETRY,
        host.check(3),
    )
    assert caplog.text.count("Error renewing lease (trying again in 1 min)") == 2


def test_the_lost_answer_of_a_renewal(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    lose_answer = host.fail_next(None, "after")
    host.run(DUE - 1, lose_answer, 1, DUE - 1, host.check(1, MARGIN + 1), 1, host.check(2))
    assert "somebody else" not in caplog.text
    assert "went back" not in caplog.text


def test_renewed_as_soon_as_the_store_is_back(host: Host) -> None:
    host.run(DUE - 100, host.away, 110, host.back, host.check(1))


def test_back_before_it_is_due(host: Host) -> None:
    host.run(100, host.away, 1000, host.back, 100, host.check(0, LEASE_TTL - 1200))


def test_tried_more_often_towards_the_end(host: Host) -> None:
    tries: list[int] = []

    def count() -> None:
        # Each try ends at its read; the watch read once, at the start.
        tries.append(host.store.calls.count("read") - 1 - sum(tries))

    host.run(
        DUE - 1, host.away, 1, MARGIN - 241, count, 230, count, 11, count, 60, count, host.back
    )
    minutely, faster, at_the_end, after_it = tries
    assert minutely == MARGIN // RETRY - 4
    assert 10 <= faster <= 20
    assert 5 <= at_the_end <= 11
    assert 59 <= after_it <= 60 / RETRY_LOST
    host.check(1)()


def test_a_renewal_that_fails_for_long_is_said_once_a_minute(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the lease's end, when it is tried every second, and whichever member is first."""
    members = ["; error #0: http://a: i/o timeout", "; error #1: http://b: connection refused"]

    def fail(_lease: Lease) -> Lease:
        members.reverse()
        raise StoreUnavailable(f"client: etcd cluster is unavailable{''.join(members)}")

    def away() -> None:
        host.away()
        monkeypatch.setattr(host.monitor._manager, "keep_lease", fail)

    host.run(DUE - 1, away, 1 + MARGIN + 10 * 60)
    said = caplog.text.count("Error renewing lease")
    assert (MARGIN + 10 * 60) // 60 - 5 <= said <= (MARGIN + 10 * 60) // 60 + 1


# Lost, altered, taken.


def test_a_deleted_lease_is_put_back_at_once(host: Host) -> None:
    host.run(100, host.delete, host.check(1), 100, host.check(1, LEASE_TTL - 100))
    calls = [call for call in host.store.calls if call != "poll"]
    assert calls == ["read", "snapshot", "create", "snapshot"]


def test_the_directory_is_deleted(host: Host) -> None:
    host.run(100, host.data.delete_directory, host.check(1))


@pytest.mark.parametrize("fault", ["before", "after"])
def test_putting_back_is_tried_again_in_a_second(host: Host, fault: str) -> None:
    def delete() -> None:
        host.data.delete(KEY)
        # The poll that reports it, a snapshot, and the write.
        host.store.faults.extend([None, None, fault])

    # When it turns out that the answer was lost, it is written anew: to look for overlaps.
    check = host.check(2) if fault == "before" else host.check(3, LEASE_TTL - 1)
    host.run(100, delete, RETRY_LOST, check)


def test_a_lost_answer_hides_no_overlap(host: Host) -> None:
    """A host with another SubnetLen was faster, and we did not come to look again."""

    def delete() -> None:
        host.data.delete(KEY)
        host.store.before_write.append(lambda: host.data.put("10.5.32.0-22", OTHER, LEASE_TTL))
        host.store.faults.extend([None, None, "after"])

    with pytest.raises(LeaseLost, match=r"10\.97\.0\.2 holds 10\.5\.32\.0/22"):
        host.run(100, delete, RETRY_LOST, 100)


@pytest.mark.parametrize("answer", ["garbage", VALUE])
def test_a_store_that_went_back_repeats_our_index(host: Host, answer: str) -> None:
    """Restored from a backup, it gives somebody else's write the index that ours had."""

    def restore() -> None:
        index = host.data.keys[KEY].index
        host.data.restore((index - 1, {}))
        host.data.put(KEY, answer, ttl and 50)
        assert host.data.keys[KEY].index == index

    ttl, writes = (None, 0) if answer == VALUE else (LEASE_TTL, 1)
    host.run(100, host.away, restore, host.back, host.check(writes, ttl), DUE)
    host.check(2 * writes, ttl)()


def test_a_lost_lease_is_tried_every_second_and_said_once(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    def vanish() -> None:
        # Gone while the watch cannot tell: the renewal finds out, and its write fails.
        host.data.delete(KEY)
        host.store.faults.extend([None, None, *["before"] * 5])

    host.run(100, vanish, *[RETRY_LOST] * 5, host.check(2), 100, host.check(2, LEASE_TTL - 100))
    # Once at the write, four times before it, and before and after the one that succeeds.
    assert host.store.calls.count("snapshot") == 7
    assert caplog.text.count("Error renewing lease (trying again in 1 s)") == 1


def test_an_altered_lease_that_cannot_be_restored_is_tried_every_second(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    def alter() -> None:
        host.data.put(KEY, "garbage", LEASE_TTL)
        # The poll under way tells it at once, then the next poll's turn; each try ends at its read.
        host.store.faults.extend([None, *["before"] * 4])

    host.run(100, alter, *[RETRY_LOST] * 4, host.check(1))
    assert caplog.text.count("Error renewing lease (trying again in 1 s)") == 1


@pytest.mark.parametrize("value", ["garbage", '{"PublicIP":"10.97.0.1","BackendType":"vxlan"}'])
def test_an_altered_lease_is_restored_at_once(
    host: Host, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    host.run(100, host.write(value, 60), host.check(1), 100, host.check(1, LEASE_TTL - 100))
    assert "was altered by somebody else" in caplog.text


def test_an_altered_lease_is_restored_when_the_store_is_back(host: Host) -> None:
    def alter() -> None:
        host.data.put(KEY, "garbage", LEASE_TTL)
        host.store.faults.extend([None, "before"])

    host.run(100, alter, host.away, host.back, host.check(1))


def test_who_keeps_altering_it_wins(host: Host) -> None:
    with pytest.raises(LeaseLost, match="another host keeps writing"):
        host.run(*(step for n in range(FIGHTS + 1) for step in (host.write("garbage"), 1.0)))
    assert host.writes() == FIGHTS


def test_rare_alterations_are_no_fight(host: Host) -> None:
    pause = FIGHT_TIME / FIGHTS
    host.run(
        *(step for n in range(8) for step in (host.write("garbage"), pause)),
        host.check(8, LEASE_TTL - 20),
    )


@pytest.mark.parametrize("gap", [False, True])
def test_taken_by_another_host(host: Host, gap: bool) -> None:
    def take() -> None:
        if gap:
            host.data.delete(KEY)
        host.data.put(KEY, OTHER, LEASE_TTL)

    with pytest.raises(LeaseLost, match=r"10\.5\.34\.0/24 is now held by 10\.97\.0\.2"):
        host.run(100, take, 100)
    assert host.data.keys[KEY].value == OTHER


def test_taken_while_the_store_was_away(host: Host) -> None:
    with pytest.raises(LeaseLost):
        host.run(100, host.away, host.write(OTHER), 100, host.back, 100)
    assert host.data.keys[KEY].value == OTHER


def test_another_lifetime_is_accepted(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    rewrite = host.write(VALUE, MARGIN + 100)
    host.run(10, rewrite, 99, host.check(0, MARGIN + 1), 1, host.check(1))
    assert "was rewritten by somebody else" in caplog.text


# Reservations.


def test_a_reservation_is_never_renewed(host: Host) -> None:
    host.data.put(KEY, VALUE)
    host.run(3 * LEASE_TTL, host.check(0, None))


def test_a_lease_becomes_a_reservation(host: Host) -> None:
    host.run(10, host.write(VALUE, None), 3 * LEASE_TTL, host.check(0, None))


def test_a_reservation_made_by_hand_for_a_running_host_is_kept(host: Host) -> None:
    """As docs/operations.md says how: the bare public IP, without an end."""
    host.run(10, host.write('{"PublicIP":"10.97.0.1"}', None), 1, host.check(1, None))


def test_nonsense_without_an_end_makes_no_reservation(host: Host) -> None:
    host.run(10, host.write("garbage", None), host.check(1))


def test_a_reservation_is_restored_as_one(host: Host) -> None:
    host.data.put(KEY, VALUE)
    host.run(10, host.write("garbage", None), host.check(1, None), LEASE_TTL, host.check(1, None))


def test_a_deleted_reservation_becomes_a_lease(host: Host) -> None:
    host.data.put(KEY, VALUE)
    host.run(10, host.delete, host.check(1), DUE, host.check(2))


# The store lost data.


def test_published_again_when_the_store_went_back(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    backups = []

    def backup() -> None:
        backups.append(host.data.backup())

    def restore() -> None:
        host.data.restore(backups[0])

    # The write in the backup is one of ours.
    host.run(10, backup, DUE - 10, host.check(1), 10, restore, host.check(2))
    assert "The store went back in time" in caplog.text


def test_published_again_when_the_store_was_emptied(host: Host) -> None:
    host.run(
        10, lambda: host.data.restore((0, {})), host.check(1), 100, host.check(1, LEASE_TTL - 100)
    )


def test_the_history_was_cleared(host: Host) -> None:
    def alter_and_forget() -> None:
        with host.data.changed:
            host.data.put(KEY, "garbage", LEASE_TTL)
            host.data.forget_history()

    host.run(10, alter_and_forget, host.check(1))


# The daemon's other threads.


def test_the_failure_of_another_thread_ends_it(host: Host) -> None:
    with pytest.raises(ZeroDivisionError):
        host.run(10, lambda: host.monitor.fail(ZeroDivisionError()), 10)


def test_nothing_is_written_once_it_is_to_stop(host: Host) -> None:
    def stop() -> None:
        host.data.delete(KEY)
        host.stop.set()

    host.run(10, stop)
    assert host.writes() == 0
    assert KEY not in host.data.keys
