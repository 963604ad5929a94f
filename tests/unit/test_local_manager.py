"""Acquiring, keeping and watching leases on a store that fails at the worst moment.

On a double, see `memory_store`; the real etcd is in tests/store.
"""

import logging
import random
import threading
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import PATIENCE, Clock, Data, MemoryStore, Stop

from flanneld import memory, retry
from flanneld.errors import ConfigChanged, LeaseLost, Stopped, StoreError, StoreUnavailable
from flanneld.subnet import acquire, local_manager
from flanneld.subnet.config import parse_config
from flanneld.subnet.lease import LEASE_TTL, Lease, LeaseAttrs, parse_subnet_key, subnet_key
from flanneld.subnet.local_manager import RACES, LocalManager
from flanneld.subnet.manager import LeaseState

IP = IPv4Address("10.97.0.1")
ATTRS = LeaseAttrs(IP, "host-gw")
OTHER = LeaseAttrs(IPv4Address("10.97.0.2"), "host-gw").encode()
SUBNET = IPv4Network("10.5.34.0/24")
KEY = "10.5.34.0-24"
CONFIG = parse_config('{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}')
SMALL_TEXT = '{"Network":"10.5.0.0/22"}'


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (acquire, local_manager, retry):
        monkeypatch.setattr(module, "now", clock)
    return clock


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(Data(clock))


@pytest.fixture
def manager(store: MemoryStore) -> LocalManager:
    return LocalManager(store, SUBNET)


@pytest.fixture
def stop(clock: Clock) -> Stop:
    return Stop(clock)


def held(store: MemoryStore) -> dict[str, tuple[str, int | None]]:
    """Return value and time to live of each key."""
    data = store.data
    return {name: (n.value, n.ttl) for name in data.keys if (n := data.node(name))}


OURS = {KEY: (ATTRS.encode(), LEASE_TTL)}


# Acquiring.


def test_the_previous_subnet_is_taken_again(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    assert lease == Lease(SUBNET, ATTRS, LEASE_TTL, store.data.index)
    assert held(store) == OURS


def test_the_lost_answer_of_a_creation(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    store.faults.extend([None, "after"])
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    assert lease.subnet == SUBNET
    assert held(store) == OURS
    assert lease.modified_index == store.data.keys[KEY].index
    assert store.calls == ["snapshot", "create", "snapshot", "swap"]
    assert stop.waits == [1.0]


def test_our_own_lease_is_renewed_on_acquiring(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    store.data.put("10.5.7.0-24", LeaseAttrs(IP, "vxlan", '{"VtepMAC":"x"}').encode(), 50)
    store.faults.extend([None, "after"])
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    assert lease.subnet == IPv4Network("10.5.7.0/24")
    assert held(store) == {"10.5.7.0-24": (ATTRS.encode(), LEASE_TTL)}


def test_a_reservation_is_used_and_stays_one(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    store.data.put("10.5.7.0-24", LeaseAttrs(IP).encode())
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    assert (lease.subnet, lease.ttl) == (IPv4Network("10.5.7.0/24"), None)
    assert held(store) == {"10.5.7.0-24": (ATTRS.encode(), None)}


def test_a_lease_that_fits_no_more_is_exchanged(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    store.data.put("10.6.7.0-24", ATTRS.encode(), 50)
    assert manager.acquire_lease(CONFIG, ATTRS, stop).subnet == SUBNET
    assert held(store) == OURS


def test_somebody_else_was_faster(store: MemoryStore, manager: LocalManager, stop: Stop) -> None:
    store.before_write.append(lambda: store.data.put(KEY, OTHER, 50))
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    assert lease.subnet != SUBNET
    assert store.data.keys[KEY].value == OTHER
    assert store.data.keys[lease.key].value == ATTRS.encode()
    assert len(stop.waits) == 1
    assert stop.waits[0] <= 0.05


WIDE = "10.5.32.0-22"


@pytest.mark.parametrize("fault", [None, "after"])
def test_a_host_with_another_subnet_len_was_faster(
    store: MemoryStore, manager: LocalManager, stop: Stop, fault: str | None
) -> None:
    """The store takes both keys; the second host looks again, and yields."""
    store.before_write.append(lambda: store.data.put(WIDE, OTHER, 50))
    store.faults.extend([None, fault])
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    assert not lease.subnet.overlaps(IPv4Network("10.5.32.0/22"))
    assert held(store) == {
        WIDE: (OTHER, 49 if fault else 50),
        lease.key: (ATTRS.encode(), LEASE_TTL),
    }


@pytest.mark.parametrize("fault", [None, "after"])
def test_a_host_with_another_subnet_len_was_faster_and_its_key_is_spoilt(
    store: MemoryStore, manager: LocalManager, stop: Stop, fault: str | None
) -> None:
    """It will write its lease again: what cannot be read is taken."""
    store.before_write.append(lambda: store.data.put(WIDE, "nonsense", 50))
    store.faults.extend([None, fault])
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    assert not lease.subnet.overlaps(IPv4Network("10.5.32.0/22"))
    assert set(held(store)) == {WIDE, lease.key}


@pytest.mark.parametrize("running", [False, True])
def test_a_store_was_restored_between_look_and_creation(
    store: MemoryStore, manager: LocalManager, stop: Stop, running: bool
) -> None:
    """It counts on from the index of the look; nothing but a second look tells of the other."""
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    store.data.delete(KEY)
    store.data.put(WIDE, OTHER)
    backup = store.data.backup()
    store.data.restore((backup[0], {}))
    store.before_write.append(lambda: store.data.restore(backup))
    if running:
        with pytest.raises(LeaseLost, match="which overlaps"):
            manager.keep_lease(lease)
        assert set(held(store)) == {WIDE}
        return
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    assert not lease.subnet.overlaps(IPv4Network("10.5.32.0/22"))
    assert set(held(store)) == {WIDE, lease.key}


def test_a_host_with_another_subnet_len_was_slower(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    store.before_write.append(lambda: store.data.put("elsewhere", OTHER, 50))

    def third_call_is_late() -> None:
        if len(store.calls) == 2:
            store.data.put(WIDE, OTHER, 50)

    store.on_call = third_call_is_late
    assert manager.acquire_lease(CONFIG, ATTRS, stop).subnet == SUBNET
    assert store.calls == ["snapshot", "create", "snapshot"]


@pytest.mark.parametrize("loss", ["delete", "renew"])
def test_our_lease_changed_while_we_took_it(
    store: MemoryStore, manager: LocalManager, stop: Stop, loss: str
) -> None:
    store.data.put(KEY, ATTRS.encode(), 50)
    change = {
        "delete": lambda: store.data.delete(KEY),
        "renew": lambda: store.data.put(KEY, ATTRS.encode(), 60),
    }[loss]
    store.before_write.append(change)
    assert manager.acquire_lease(CONFIG, ATTRS, stop).subnet == SUBNET
    assert held(store) == OURS
    assert stop.waits[0] <= 0.05


def test_who_was_too_slow_looks_further_away(store: MemoryStore, stop: Stop) -> None:
    """Many start together, so that the next of the first hundred is soon taken, too."""
    manager = LocalManager(store, None)
    manager._random = random.Random(1)

    def take_the_first_hundred() -> None:
        for third in range(1, 101):
            store.data.put(f"10.0.{third}.0-24", OTHER, 50)

    store.before_write.append(take_the_first_hundred)
    lease = manager.acquire_lease(parse_config('{"Network":"10.0.0.0/8"}'), ATTRS, stop)
    assert lease.subnet.network_address > IPv4Address("10.0.200.0")


def test_an_unreadable_key_keeps_its_range(
    store: MemoryStore, manager: LocalManager, stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    store.data.put(KEY, "garbage")
    with caplog.at_level("WARNING"):
        assert manager.acquire_lease(CONFIG, ATTRS, stop).subnet != SUBNET
    assert f"Ignoring bad subnet node {KEY}: not JSON" in caplog.text
    assert f"Found previously leased subnet ({SUBNET}), but an unreadable key" in caplog.text
    assert store.data.keys[KEY].value == "garbage"


def test_unreadable_keys_that_leave_no_subnet_are_said_once_and_not_without_end(
    store: MemoryStore, manager: LocalManager, stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    store.data.config = SMALL_TEXT
    config = manager.network_config()
    for third in range(1, 4):
        store.data.put(f"10.5.{third}.0-24", "garbage", 12 if third == 2 else None)
    for number in range(1000):
        store.data.put(f"key-{number}", "garbage")
    with caplog.at_level("WARNING"):
        assert manager.acquire_lease(config, ATTRS, stop).subnet == IPv4Network("10.5.2.0/24")
    assert caplog.text.count("Ignoring bad subnet node 10.5.2.0-24: not JSON") == 1
    assert caplog.text.count("failed to acquire lease: out of subnets") == 1
    assert len(caplog.messages) < 2 * retry.MOST_LINES


def test_a_full_network_is_waited_for(
    store: MemoryStore, manager: LocalManager, stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    store.data.config = SMALL_TEXT
    config = manager.network_config()
    for third in range(4):
        store.data.put(f"10.5.{third}.0-24", OTHER, 12 if third == 2 else None)
    with caplog.at_level("INFO"):
        lease = manager.acquire_lease(config, ATTRS, stop)
    assert lease.subnet == IPv4Network("10.5.2.0/24")
    assert stop.waits == [acquire.OUT_OF_SUBNETS_PAUSE] * 3
    assert caplog.text.count("failed to acquire lease: out of subnets") == 1


def fill(store: MemoryStore) -> None:
    for third in range(4):
        store.data.put(f"10.5.{third}.0-24", OTHER)


def test_a_full_network_gets_another_config(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    store.data.config = SMALL_TEXT
    config = manager.network_config()
    fill(store)

    def widen() -> None:
        if stop.waits.count(acquire.OUT_OF_SUBNETS_PAUSE) == 2:
            store.data.config = '{"Network":"10.5.0.0/20"}'

    store.on_call = widen
    with pytest.raises(ConfigChanged, match="config has changed"):
        manager.acquire_lease(config, ATTRS, stop)
    assert stop.waits == [acquire.OUT_OF_SUBNETS_PAUSE] * 2
    # Begun again with what the store has now, there is room.
    lease = manager.acquire_lease(manager.network_config(), ATTRS, stop)
    assert lease.subnet.subnet_of(IPv4Network("10.5.0.0/20"))


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_full_network_whose_config_cannot_be_read_is_waited_for(
    store: MemoryStore, manager: LocalManager, stop: Stop, fault: str
) -> None:
    store.data.config = SMALL_TEXT
    config = manager.network_config()
    fill(store)
    store.data.put("10.5.2.0-24", OTHER, 4)
    store.faults.extend([None, None, fault])
    assert manager.acquire_lease(config, ATTRS, stop).subnet == IPv4Network("10.5.2.0/24")
    assert stop.waits == [acquire.OUT_OF_SUBNETS_PAUSE, 1.0]
    look = ["snapshot", "config"]
    assert store.calls[:-1] == ["config", "snapshot", *look, *look, "create"]


@pytest.mark.parametrize("text", [SMALL_TEXT, ""], ids=["another", "none"])
@pytest.mark.parametrize("failures", [1, 3])
def test_a_store_that_was_away_may_have_another_config(
    store: MemoryStore, manager: LocalManager, stop: Stop, text: str, failures: int
) -> None:
    config = manager.network_config()

    def come_back() -> None:
        if len(stop.waits) == failures:
            store.data.config = text

    store.on_call = come_back
    store.faults.extend(["before"] * failures)
    with pytest.raises(ConfigChanged, match="config has changed"):
        manager.acquire_lease(config, ATTRS, stop)
    assert stop.waits == [1.0] * failures
    assert store.data.keys == {}


def test_a_store_that_was_away_and_has_the_same_config(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    config = manager.network_config()
    store.faults.extend(["before", "before"])
    assert manager.acquire_lease(config, ATTRS, stop).subnet == SUBNET
    assert stop.waits == [1.0] * 2
    # A store in trouble is asked for the config only once it has had a list for us.
    assert store.calls[:-1] == ["config", *["snapshot"] * 3, "config", "create"]


@pytest.mark.parametrize(("took", "pauses"), [(5, (2.5, 7.5)), (18, (3.3, 10))])
def test_a_store_that_is_silent_is_spared(
    store: MemoryStore, manager: LocalManager, stop: Stop, took: int, pauses: tuple[float, float]
) -> None:
    config = manager.network_config()

    def think() -> None:
        if store.faults:
            store.data.clock.time += took

    store.on_call = think
    store.faults.extend(["silent"] * 50)
    assert manager.acquire_lease(config, ATTRS, stop).subnet == SUBNET
    every_second, spared = stop.waits[::2], stop.waits[1::2]
    assert every_second == [1.0] * 50
    assert pauses[0] <= min(spared) < max(spared) <= pauses[1]
    # At random: those that failed together do not come back together.
    assert len(set(spared)) == 50


def test_a_store_that_cannot_be_reached_is_tried_every_second(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    """However long it takes to find that out: the network may drop what goes there."""
    config = manager.network_config()

    def wait_for_a_connection() -> None:
        store.data.clock.time += 6

    store.on_call = wait_for_a_connection
    store.faults.extend(["before"] * 5)
    assert manager.acquire_lease(config, ATTRS, stop).subnet == SUBNET
    assert stop.waits == [1.0] * 5


def test_what_keeps_a_host_from_its_subnet_is_said_though_none_is_free(
    store: MemoryStore, manager: LocalManager, stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    store.data.config = SMALL_TEXT
    config = manager.network_config()
    fill(store)
    store.data.put("10.6.7.0-24", ATTRS.encode())

    def third_look_is_the_last() -> None:
        if len(stop.waits) == 2:
            stop.set()

    store.on_call = third_look_is_the_last
    with caplog.at_level("WARNING"), pytest.raises(Stopped):
        manager.acquire_lease(config, ATTRS, stop)
    reserved = "Found lease (10.6.7.0/24) for current IP (10.97.0.1) but not compatible"
    assert caplog.text.count(reserved) == 1
    assert caplog.text.count(f"Found previously leased subnet ({SUBNET}) that is not") == 1
    assert caplog.text.count("failed to acquire lease: out of subnets") == 1


def test_acquiring_ends_when_asked_to(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    store.go_down(True)

    def fifth_call_stops() -> None:
        if len(store.calls) == 4:
            stop.set()

    store.on_call = fifth_call_stops
    with pytest.raises(Stopped):
        manager.acquire_lease(CONFIG, ATTRS, stop)
    assert stop.waits == [1.0] * 4


class Turns:
    """Lets hosts, each in a thread of its own, make one request to the store at a time."""

    def __init__(self, count: int) -> None:
        self.go = [threading.Semaphore(0) for _ in range(count)]
        self.arrived = [threading.Semaphore(0) for _ in range(count)]
        self.done = [False] * count

    def wait(self, host: int) -> None:
        self.arrived[host].release()
        assert self.go[host].acquire(timeout=PATIENCE)

    def finish(self, host: int) -> None:
        self.done[host] = True
        self.arrived[host].release()

    def take(self, host: int) -> None:
        """Let one host make its next request."""
        if not self.done[host]:
            self.go[host].release()
            assert self.arrived[host].acquire(timeout=PATIENCE)


FAULTS = st.lists(st.sampled_from([None, None, "before", "after"]), max_size=8)
HOSTS = st.lists(FAULTS, min_size=2, max_size=4)
# SMALL_TEXT has three subnets, of which the hosts may remember one; .0.0 is not one of them.
REMEMBERED = st.sampled_from([None, IPv4Network("10.5.1.0/24"), IPv4Network("10.5.2.0/24")])


@settings(deadline=None)
@given(
    HOSTS,
    st.lists(REMEMBERED, min_size=4, max_size=4),
    st.lists(st.sampled_from([None, 0, 1, 2]), min_size=4, max_size=4),
    st.lists(st.integers(0, 3), max_size=40),
)
def test_no_subnet_ever_has_two_hosts(
    faults: list[list[str | None]],
    remembered: list[IPv4Network | None],
    present: list[int | None],
    schedule: list[int],
) -> None:
    data, count = Data(Clock(), SMALL_TEXT), len(faults)
    for third, host in enumerate(present):
        if host is not None:
            data.put(f"10.5.{third}.0-24", value_of(host), 10**6)
    turns, stop = Turns(count), Stop(data.clock)
    leases: dict[int, Lease] = {}

    def acquire(host: int) -> None:
        store = MemoryStore(data)
        manager = LocalManager(store, remembered[host])
        config = manager.network_config()
        store.faults.extend(faults[host])
        store.on_call = lambda: turns.wait(host)
        try:
            leases[host] = manager.acquire_lease(config, LeaseAttrs(address(host)), stop)
        except Stopped:
            pass
        finally:
            turns.finish(host)

    threads = [threading.Thread(target=acquire, args=(host,)) for host in range(count)]
    for host, thread in enumerate(threads):
        thread.start()
        turns.arrived[host].acquire(timeout=PATIENCE)
    for host in [*(turn % count for turn in schedule), *list(range(count)) * 30]:
        turns.take(host)
        check_owners(leases, data)
    stop.set()
    for host, thread in enumerate(threads):
        while not turns.done[host]:
            turns.take(host)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    check_owners(leases, data)
    subnets = {f"10.5.{third}.0-24" for third in (1, 2, 3)}
    for host in range(count):
        before = {f"10.5.{third}.0-24" for third in (1, 2, 3) if present[third] == host}
        has = {
            name for name in subnets & data.keys.keys() if data.keys[name].value == value_of(host)
        }
        assert has == before or (not before and len(has) <= 1)
        # Who got none found all of them taken by the others.
        assert (host in leases) is bool(has)
        assert has or subnets <= data.keys.keys()


def address(host: int) -> IPv4Address:
    return IPv4Address(f"10.97.0.{host + 1}")


def value_of(host: int) -> str:
    return LeaseAttrs(address(host)).encode()


def check_owners(leases: dict[int, Lease], data: Data) -> None:
    """Each lease that was handed out is its host's in the store, and no two are the same."""
    for host, lease in list(leases.items()):
        assert data.keys[lease.key].value == value_of(host)
    assert len({lease.subnet for lease in leases.values()}) == len(leases)


# Keeping.


@pytest.fixture
def lease(store: MemoryStore, manager: LocalManager, stop: Stop) -> Lease:
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    store.data.clock.time += 1000
    store.calls.clear()
    return lease


def check_kept(store: MemoryStore, kept: Lease, ttl: int | None = LEASE_TTL) -> None:
    assert held(store) == {KEY: (ATTRS.encode(), ttl)}
    assert kept == Lease(SUBNET, ATTRS, ttl, store.data.keys[KEY].index)


def test_a_lease_is_renewed(store: MemoryStore, manager: LocalManager, lease: Lease) -> None:
    check_kept(store, manager.keep_lease(lease))
    assert store.calls == ["read", "swap"]


def test_a_lease_that_is_gone_is_put_back(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    store.data.delete(KEY)
    check_kept(store, manager.keep_lease(lease))


def test_a_renewal_whose_answer_was_lost(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    for fault in ("after", "before"):
        store.faults.append(fault)
        with pytest.raises(StoreUnavailable):
            manager.keep_lease(lease)
    check_kept(store, manager.keep_lease(lease))


def test_a_lost_answer_while_putting_back(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    store.data.delete(KEY)
    store.faults.extend([None, None, "after"])
    with pytest.raises(StoreUnavailable):
        manager.keep_lease(lease)
    check_kept(store, manager.keep_lease(lease))


@pytest.mark.parametrize("ttl", [None, 60])
def test_another_hosts_lease_is_never_overwritten(
    store: MemoryStore, manager: LocalManager, lease: Lease, ttl: int | None
) -> None:
    store.data.put(KEY, OTHER, ttl)
    with pytest.raises(LeaseLost, match=r"10\.5\.34\.0/24 is now held by 10\.97\.0\.2"):
        manager.keep_lease(lease)
    assert held(store) == {KEY: (OTHER, ttl)}


def test_another_host_is_faster_in_putting_back(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    store.data.delete(KEY)
    store.before_write.append(lambda: store.data.put(KEY, OTHER, 60))
    with pytest.raises(LeaseLost):
        manager.keep_lease(lease)
    assert held(store) == {KEY: (OTHER, 60)}


def test_it_is_not_put_back_into_another_hosts_range(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    store.data.delete(KEY)
    store.data.put("10.5.32.0-22", OTHER, 60)
    with pytest.raises(LeaseLost, match=r"10\.97\.0\.2 holds 10\.5\.32\.0/22, which overlaps"):
        manager.keep_lease(lease)
    assert list(store.data.keys) == ["10.5.32.0-22"]


def test_another_hosts_range_is_taken_while_it_is_put_back(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    store.data.delete(KEY)
    store.before_write.append(lambda: store.data.put(WIDE, OTHER, 60))
    with pytest.raises(LeaseLost, match=r"10\.97\.0\.2 holds 10\.5\.32\.0/22, which overlaps"):
        manager.keep_lease(lease)
    assert list(store.data.keys) == [WIDE]


def test_our_own_reservation_around_it_is_no_reason_to_give_up(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    store.data.delete(KEY)
    store.data.put(WIDE, ATTRS.encode())
    kept = manager.keep_lease(lease)
    assert held(store) == {WIDE: (ATTRS.encode(), None), KEY: (ATTRS.encode(), LEASE_TTL)}
    assert kept.modified_index == store.data.keys[KEY].index


def test_an_index_says_nothing_in_a_store_that_was_emptied(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    """It counts anew, and another host's write has the index that ours had."""
    store.data.restore((lease.modified_index - 1, {}))
    store.data.put(KEY, OTHER, 60)
    assert store.data.keys[KEY].index == lease.modified_index
    with pytest.raises(LeaseLost):
        manager.keep_lease(lease)
    assert held(store) == {KEY: (OTHER, 60)}


@pytest.mark.parametrize("step", ["keep", "acquire", "give back"])
def test_a_store_was_restored_between_read_and_write(
    store: MemoryStore, manager: LocalManager, lease: Lease, stop: Stop, step: str
) -> None:
    """Another host's key has the index that ours was read with."""

    def restore() -> None:
        store.data.restore((lease.modified_index - 1, {}))
        store.data.put(KEY, OTHER, 60)
        assert store.data.keys[KEY].index == lease.modified_index

    store.before_write.append(restore)
    if step == "keep":
        with pytest.raises(LeaseLost):
            manager.keep_lease(lease)
    elif step == "acquire":
        assert manager.acquire_lease(CONFIG, ATTRS, stop).subnet != SUBNET
    else:
        manager.acquire_lease(parse_config('{"Network":"10.6.0.0/16"}'), ATTRS, stop)
    assert store.data.keys[KEY].value == OTHER


@pytest.mark.parametrize("ttl", [None, 60])
@pytest.mark.parametrize("value", ["garbage", LeaseAttrs(IP, "vxlan").encode(), ATTRS.encode()])
def test_what_somebody_wrote_there_is_restored(
    store: MemoryStore, manager: LocalManager, lease: Lease, value: str, ttl: int | None
) -> None:
    # What has no end by somebody's wish keeps having none.
    store.data.put(KEY, value, ttl)
    check_kept(store, manager.keep_lease(lease), ttl and LEASE_TTL)


def test_a_reservation_stays_one(store: MemoryStore, manager: LocalManager, stop: Stop) -> None:
    store.data.put(KEY, ATTRS.encode())
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    for _ in range(2):
        lease = manager.keep_lease(lease)
        check_kept(store, lease, None)
    store.data.put(KEY, "garbage")
    check_kept(store, manager.keep_lease(lease), None)
    store.data.put(KEY, ATTRS.encode(), 60)
    check_kept(store, manager.keep_lease(lease), LEASE_TTL)


def test_a_deleted_reservation_comes_back_as_a_lease(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    store.data.put(KEY, ATTRS.encode())
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    store.data.delete(KEY)
    check_kept(store, manager.keep_lease(lease))


def test_a_reservation_made_while_it_was_put_back(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    store.data.delete(KEY)
    store.before_write.append(lambda: store.data.put(KEY, ATTRS.encode()))
    check_kept(store, manager.keep_lease(lease), None)


def test_endless_races_are_given_up(
    store: MemoryStore, manager: LocalManager, lease: Lease
) -> None:
    store.before_write.extend([lambda: store.data.put(KEY, ATTRS.encode(), 60)] * 2 * RACES)
    with pytest.raises(StoreError, match=f"changed {RACES} times"):
        manager.keep_lease(lease)
    assert store.calls == ["read", "swap"] * RACES


# Watching.


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged from warnings on."""
    # logs.setup() of another test may have cut it off.
    monkeypatch.setattr(logging.getLogger("flanneld"), "propagate", True)
    texts: list[str] = []
    handler = caplog.handler
    monkeypatch.setattr(handler, "emit", lambda record: texts.append(record.getMessage()))
    return texts


def forget(store: MemoryStore, before: str) -> None:
    """A peer joins and more is written elsewhere than the store remembers, once, before a call."""

    def on_call() -> None:
        if store.calls[-1:] == [before]:
            store.on_call = lambda: None
            store.data.put("10.5.7.0-24", OTHER, 60)
            store.data.index += 1000
            store.data.forget_history()

    store.on_call = on_call


def test_the_list_of_an_acquisition_is_the_first_of_the_watch(
    store: MemoryStore, manager: LocalManager, stop: Stop
) -> None:
    first, second = (IPv4Network(f"10.5.{third}.0/24") for third in (7, 8))
    store.data.put(subnet_key(first), OTHER, 3600)
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    store.data.put(subnet_key(second), OTHER, 3600)
    store.calls.clear()
    watch = manager.watch_leases(CONFIG, lease, stop)
    assert [event.lease.subnet for event in next(watch)] == [first]
    assert store.calls == []
    # What happened between the list and the watch is told as an event.
    assert [event.lease.subnet for event in next(watch)] == [second]
    assert store.calls == ["poll"]
    # It is used once: whoever watches again begins with another.
    again = next(manager.watch_leases(CONFIG, lease, stop))
    assert [event.lease.subnet for event in again] == [first, second]
    assert store.calls == ["poll", "snapshot"]


def test_an_old_list_is_not_followed(store: MemoryStore, manager: LocalManager, stop: Stop) -> None:
    store.data.put("10.5.7.0-24", OTHER, 3600)
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    store.data.delete("10.5.7.0-24")
    store.data.clock.time += local_manager.LIST_AGE + 0.1
    store.calls.clear()
    assert next(manager.watch_leases(CONFIG, lease, stop)) == []
    assert store.calls == ["snapshot"]


def test_a_list_of_before_is_no_sign_that_the_store_is_back(
    *,
    store: MemoryStore,
    manager: LocalManager,
    stop: Stop,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both watches say as one that it is away, and that it is back."""
    # Here the pauses move the clock.
    monkeypatch.setattr(local_manager, "LIST_AGE", 1000.0)
    caplog.set_level("INFO")
    lease = manager.acquire_lease(CONFIG, ATTRS, stop)
    store.faults.extend(["before", "before"])
    own = manager.watch_lease(lease, stop)
    store.on_call = lambda: stop.set() if len(store.faults) == 1 else None
    assert list(own) == []
    assert "Watch subnets: connection refused" in caplog.text
    stop.clear()
    assert next(manager.watch_leases(CONFIG, lease, stop)) == []
    assert "is back" not in caplog.text
    store.faults.clear()
    assert next(manager.watch_lease(lease, stop)).state is LeaseState.HELD
    assert "Watch subnets is back" in caplog.text


def test_a_history_used_up_by_others_while_nothing_happened_is_no_news(
    store: MemoryStore, manager: LocalManager, lease: Lease, stop: Stop, heard: list[str]
) -> None:
    store.on_idle = lambda _: True
    manager.network_config()
    watch = manager.watch_leases(CONFIG, lease, stop)
    assert next(watch) == []
    store.calls.clear()
    forget(store, before="config")
    (event,) = next(watch)
    assert str(event.lease.subnet) == "10.5.7.0/24"
    assert store.calls == ["poll", "config", "poll", "snapshot"]
    assert heard == []


def test_a_history_used_up_at_any_other_time_is_said(
    store: MemoryStore, manager: LocalManager, lease: Lease, stop: Stop, heard: list[str]
) -> None:
    watch = manager.watch_leases(CONFIG, lease, stop)
    assert next(watch) == []
    store.data.put("10.5.7.0-24", OTHER, 60)
    store.data.index += 1000
    store.data.forget_history()
    (event,) = next(watch)
    assert str(event.lease.subnet) == "10.5.7.0/24"
    assert heard == [
        "Watch of subnet leases failed because etcd index outside history window",
    ]


def test_memory_is_given_back_while_the_store_is_away(
    store: MemoryStore,
    manager: LocalManager,
    lease: Lease,
    stop: Stop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All leases were read just before, and an outage may last."""
    given: list[int] = []

    def give_back() -> None:
        given.append(len(store.calls))
        assert parse_subnet_key.cache_info().currsize == 0
        stop.set()

    def on_call() -> None:
        if len(store.calls) > 50:
            stop.set()

    monkeypatch.setattr(memory, "give_back", give_back)
    watch = manager.watch_leases(CONFIG, lease, stop)
    assert next(watch) == []
    parse_subnet_key(KEY)
    store.on_call = on_call
    store.go_down(True)
    assert list(watch) == []
    assert len(given) == 1


def test_polls_of_the_own_lease_that_end_at_once_are_not_repeated_at_once(
    store: MemoryStore, manager: LocalManager, lease: Lease, stop: Stop, clock: Clock
) -> None:
    """As through a proxy that answers for etcd, and knows nothing."""
    store.on_idle = lambda _timeout: True
    before = clock()
    reports = manager.watch_lease(lease, stop)
    for _ in range(11):
        next(reports)
    assert clock() - before >= 10.0
