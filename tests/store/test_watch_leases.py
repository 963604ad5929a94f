"""Following the other hosts' leases in a real etcd, whatever becomes of it."""

import threading
from collections.abc import Callable

import pytest

from flanneld.errors import HistoryCleared
from flanneld.subnet import local_manager, watch
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from flanneld.subnet.lease import Lease, LeaseAttrs
from flanneld.subnet.local_manager import LocalManager
from flanneld.subnet.store import Poll
from flanneld.subnet.watch import EventType
from lab.wait import eventually

from .hosts import SOON, Cluster, Peers, attrs, peer_ip, peer_subnet
from .servers import Action, Forward, Request, Server, Stall, poll_head


def start(cluster: Cluster, endpoints: str = "") -> tuple[Lease, Peers]:
    """A host that follows its peers; its first batch has come."""
    manager, own = cluster.host(endpoints)
    peers = cluster.watch_peers(manager, own)
    peers.until(len, "the first batch")
    return own, peers


def settle(cluster: Cluster, peers: Peers, number: int = 999) -> None:
    """Wait until all that was written before has been seen."""
    cluster.join(number)
    peers.until(lambda _: peer_subnet(number) in peers.now(), "the last lease")


def test_first_batch_is_everything_there_is(cluster: Cluster) -> None:
    for number in range(1, 4):
        cluster.join(number)
    own, peers = start(cluster)
    assert len(peers.items) == 1
    peers.expect_numbers(range(1, 4))
    assert str(own.subnet) not in peers.now()


def test_first_batch_comes_even_if_it_is_empty(cluster: Cluster) -> None:
    _, peers = start(cluster)
    assert peers.items == [[]]


def test_join_change_and_leave(cluster: Cluster) -> None:
    _, peers = start(cluster)
    cluster.join(1)
    peers.expect_numbers([1])
    subnet = peer_subnet(1)
    for changed in (
        attrs(peer_ip(1), mac="aa:7b:75:bf:06:90"),
        attrs(peer_ip(1), mac="aa:7b:75:bf:06:91"),
        attrs(peer_ip(2), mac="aa:7b:75:bf:06:91"),
    ):
        cluster.put(subnet, changed)
        peers.expect({subnet: changed})
    cluster.leave(1)
    peers.expect({})
    kinds = [event.type for event in peers.events()]
    assert kinds == [EventType.ADDED] * 4 + [EventType.REMOVED]


def test_lease_that_expires(cluster: Cluster) -> None:
    _, peers = start(cluster)
    cluster.put(peer_subnet(1), attrs(peer_ip(1)), ttl=1)
    peers.expect_numbers([1])
    peers.expect({})


def test_lease_taken_back_at_once_was_never_gone(cluster: Cluster) -> None:
    _, peers = start(cluster)
    cluster.join(1)
    cluster.leave(1)
    cluster.join(1)
    settle(cluster, peers)
    assert len(peers.events()) == 2


def test_renewals_and_foreign_writes_are_no_news(cluster: Cluster) -> None:
    own, peers = start(cluster)
    cluster.join(1)
    for _ in range(5):
        cluster.join(1)
        cluster.client.put("/elsewhere", "x")
        cluster.client.put(f"{cluster.prefix}/config", local_manager.__name__)
        cluster.put(own.subnet, own.attrs)
    settle(cluster, peers)
    assert len(peers.events()) == 2


GARBAGE = {
    "10.5.200.0-24": "garbage",
    "10.5.201.0-24": "",
    "10.5.202.0-24": '{"PublicIP":"fd00::1"}',
    "10.5.203.0-24": '{"PublicIP":"127.0.0.1"}',
    "10.5.204.0-24": "{}",
    "10.5.205.7-24": '{"PublicIP":"10.98.0.1"}',
    "10.5.206.0-33": '{"PublicIP":"10.98.0.1"}',
    "x10.5.207.0-24": '{"PublicIP":"10.98.0.1"}',
    "10.6.0.0-24": '{"PublicIP":"10.98.0.1"}',
    "0.0.0.0-1": '{"PublicIP":"10.98.0.1"}',
    "10.5.0.0-16": '{"PublicIP":"10.98.0.1"}',
    "10.5.208.0-24": '{"PublicIP":"10.97.0.1"}',
    "10.5.209.0-24": "[" * 100_000,
    "unsinn-ü?%": "x",
    "directory/10.5.210.0-24": '{"PublicIP":"10.98.0.1"}',
    "10.5.211.0-24/x": '{"PublicIP":"10.98.0.1"}',
}


def test_garbage_is_ignored_in_snapshot_and_events(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    def write_all() -> None:
        for key, value in GARBAGE.items():
            cluster.client.put(f"{cluster.prefix}/subnets/{key}", value)

    manager, own = cluster.host()
    write_all()
    peers = cluster.watch_peers(manager, own)
    peers.until(len, "the first batch")
    write_all()
    settle(cluster, peers)
    peers.expect_numbers([999])
    for key in ("directory", "10.5.211.0-24"):
        cluster.client.delete(f"{cluster.prefix}/subnets/{key}", recursive=True)
    for key in GARBAGE:
        cluster.client.delete(f"{cluster.prefix}/subnets/{key}")
    settle(cluster, peers, 998)
    peers.expect_numbers([998, 999])
    assert len(peers.events()) == 2
    for key in ("10.5.200.0-24", "10.6.0.0-24", "10.5.208.0-24"):
        said = [
            line for line in caplog.messages if line.startswith(f"Ignoring bad subnet node {key}")
        ]
        assert len(said) == 1, said


def test_lease_that_becomes_unreadable_counts_as_gone(cluster: Cluster) -> None:
    _, peers = start(cluster)
    cluster.join(1)
    peers.expect_numbers([1])
    cluster.put(peer_subnet(1), "garbage")
    peers.expect({})
    cluster.join(1)
    peers.expect_numbers([1])


def test_deleted_directory_is_lost_data_not_departure(cluster: Cluster) -> None:
    """Their hosts are still there, and publish again; what is new or changed meanwhile counts."""
    _, peers = start(cluster)
    for number in (1, 2, 3):
        cluster.join(number)
    peers.expect_numbers([1, 2, 3])
    assert cluster.client.delete(f"{cluster.prefix}/subnets", recursive=True)
    cluster.join(4)
    peers.expect_numbers([1, 2, 3, 4])
    cluster.join(1)
    moved = attrs(peer_ip(20))
    cluster.put(peer_subnet(2), moved)
    subnets = {peer_subnet(n): attrs(peer_ip(n)) for n in (1, 3, 4)}
    peers.expect({**subnets, peer_subnet(2): moved})
    assert len(peers.events()) == 5


class Faulty(EtcdV2Store):
    """A store whose next poll fails on demand."""

    def __init__(self, endpoints: str, prefix: str) -> None:
        super().__init__(endpoints, prefix, Credentials())
        self.fail: Callable[[], None] | None = None

    def poll(self, name: str | None, after: int, timeout: float) -> Poll:
        fail, self.fail = self.fail, None
        if fail is not None:
            fail()
        return super().poll(name, after, timeout)


def _clear_history() -> None:
    raise HistoryCleared("401: The event in requested index is outdated and cleared")


def test_changes_around_cleared_history(cluster: Cluster) -> None:
    """Between the failure and the next snapshot everything may change, attributes too."""
    _, own = cluster.host()
    store = Faulty(cluster.etcd.url, cluster.prefix)
    manager = LocalManager(store, None)
    peers = cluster.watch_peers(manager, own, cluster.put_config())
    for number in (1, 2, 3):
        cluster.join(number)
    peers.expect_numbers([1, 2, 3])
    changed = attrs(peer_ip(3), mac="aa:7b:75:bf:06:90")

    def clear() -> None:
        with cluster.etcd.client() as client:
            client.delete(cluster.key(peer_subnet(1)))
            client.put(cluster.key(peer_subnet(3)), changed.encode(), ttl=3600)
            cluster.join(4, client)
        _clear_history()

    store.fail = clear
    cluster.join(2)  # ends the poll that is under way
    leases = {peer_subnet(n): attrs(peer_ip(n)) for n in (2, 4)}
    peers.expect({**leases, peer_subnet(3): changed})


def test_more_events_than_etcd_remembers_while_away(cluster: Cluster) -> None:
    away = threading.Event()

    def behave(_: Request) -> Action:
        return b"" if away.is_set() else Forward.ANSWER

    with Server(behave, upstream=cluster.etcd.url) as proxy:
        _, peers = start(cluster, proxy.url)
        for number in (1, 2, 3):
            cluster.join(number)
        peers.expect_numbers([1, 2, 3])
        away.set()
        proxy.cut()
        cluster.leave(1)
        cluster.join(4)
        moved = attrs(peer_ip(20))
        cluster.put(peer_subnet(2), moved)
        cluster.make_history()
        away.clear()
        leases = {peer_subnet(n): attrs(peer_ip(n)) for n in (3, 4)}
        peers.expect({**leases, peer_subnet(2): moved})
        assert len(peers.events()) == 6


def burst(cluster: Cluster, numbers: range, disturb: Callable[[int], None]) -> None:
    with cluster.etcd.client() as client:
        for number in numbers:
            cluster.join(number, client)
            disturb(number)


def test_burst_of_500_with_cut_connections(cluster: Cluster) -> None:
    """None lost, none told twice (`Peers.now` checks that)."""

    def disturb(number: int) -> None:
        if number % 100 == 50:
            proxy.cut()

    with Server(upstream=cluster.etcd.url) as proxy:
        _, peers = start(cluster, proxy.url)
        burst(cluster, range(1, 501), disturb)
        peers.expect_numbers(range(1, 501))
        assert len(peers.events()) == 500


def test_burst_of_500_with_cleared_history(cluster: Cluster) -> None:
    _, own = cluster.host()
    store = Faulty(cluster.etcd.url, cluster.prefix)
    peers = cluster.watch_peers(LocalManager(store, None), own, cluster.put_config())

    def disturb(number: int) -> None:
        if number % 100 == 50:
            store.fail = _clear_history

    burst(cluster, range(1, 501), disturb)
    peers.expect_numbers(range(1, 501))
    assert store.fail is None
    assert len(peers.events()) == 500


def test_burst_in_which_hosts_come_go_and_change(cluster: Cluster) -> None:
    """From several writers at once; the end counts, and each step must fit the one before."""
    _, peers = start(cluster)

    def write(offset: int) -> None:
        with cluster.etcd.client() as client:
            for number in range(offset, 200, 4):
                cluster.join(number, client)
                if number % 3 == 0:
                    changed = attrs(peer_ip(number), mac="aa:7b:75:bf:06:90").encode()
                    client.put(cluster.key(peer_subnet(number)), changed, ttl=3600)
                if number % 5 == 0:
                    client.delete(cluster.key(peer_subnet(number)))

    threads = [threading.Thread(target=write, args=(offset,)) for offset in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    expected: dict[str, LeaseAttrs] = {}
    for number in range(1, 200):
        if number % 5:
            mac = "" if number % 3 else "aa:7b:75:bf:06:90"
            expected[peer_subnet(number)] = attrs(peer_ip(number), mac)
    peers.expect(expected)


def test_etcd_restarts(own_cluster: Cluster) -> None:
    _, peers = start(own_cluster)
    for number in (1, 2):
        own_cluster.join(number)
    peers.expect_numbers([1, 2])
    own_cluster.etcd.restart()
    own_cluster.leave(1)
    own_cluster.join(3)
    peers.expect_numbers([2, 3])
    assert len(peers.events()) == 4


def test_etcd_loses_all_data(own_cluster: Cluster) -> None:
    """Peers are held until they publish again; who does with other attributes has changed."""
    _, peers = start(own_cluster)
    for number in (1, 2, 3):
        own_cluster.join(number)
    peers.expect_numbers([1, 2, 3])
    own_cluster.etcd.wipe()
    own_cluster.put_config()
    own_cluster.join(4)
    peers.expect_numbers([1, 2, 3, 4])
    own_cluster.join(1)
    changed = attrs(peer_ip(2), mac="aa:7b:75:bf:06:90")
    own_cluster.put(peer_subnet(2), changed)
    leases = {peer_subnet(n): attrs(peer_ip(n)) for n in (1, 3, 4)}
    peers.expect({**leases, peer_subnet(2): changed})
    assert len(peers.events()) == 5
    own_cluster.leave(1)
    del leases[peer_subnet(1)]
    peers.expect({**leases, peer_subnet(2): changed})


def test_etcd_is_restored_from_a_backup(own_cluster: Cluster) -> None:
    _, peers = start(own_cluster)
    own_cluster.join(1)
    own_cluster.put(peer_subnet(2), attrs(peer_ip(20)))
    backup = own_cluster.etcd.backup()
    own_cluster.join(2)
    own_cluster.join(3)
    peers.expect_numbers([1, 2, 3])
    before = len(peers.events())
    own_cluster.etcd.restore(backup)
    own_cluster.join(4)
    peers.expect_numbers([1, 2, 3, 4])
    own_cluster.join(2)
    own_cluster.join(3)
    own_cluster.leave(3)
    peers.expect_numbers([1, 2, 4])
    assert len(peers.events()) == before + 2


def test_etcd_frozen_for_a_while(own_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_manager, "POLL", 1.0)
    _, peers = start(own_cluster)
    own_cluster.join(1)
    peers.expect_numbers([1])
    own_cluster.etcd.freeze()
    threading.Event().wait(2)
    own_cluster.etcd.thaw()
    own_cluster.join(2)
    peers.expect_numbers([1, 2])


def test_member_that_lags_behind(cluster: Cluster) -> None:
    """It is asked again, and what it says of the past is not believed."""
    lagging = 5

    def behave(request: Request) -> Action:
        nonlocal lagging
        if request.is_poll and lagging:
            lagging -= 1
            return poll_head(1) + b"0\r\n\r\n"
        return Forward.ANSWER

    cluster.join(1)
    with Server(behave, upstream=cluster.etcd.url) as proxy:
        _, peers = start(cluster, proxy.url)
        eventually(lambda: not lagging, SOON, "the member was asked again")
        cluster.join(2)
        peers.expect_numbers([1, 2])
        assert len(peers.events()) == 2


def test_member_cut_off_from_its_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts polls and would let us wait for ever; a linearizable read finds it out."""
    monkeypatch.setattr(local_manager, "POLL", 0.3)
    monkeypatch.setattr("random.shuffle", lambda _: None)
    cut_off = threading.Event()

    def behave(request: Request) -> Action:
        if not cut_off.is_set():
            return Forward.ANSWER
        return Stall(poll_head(10**6)) if request.is_poll else b""

    with Server(behave, upstream=cluster.etcd.url) as proxy:
        _, peers = start(cluster, f"{proxy.url},{cluster.etcd.url}")
        cut_off.set()
        proxy.cut()
        eventually(proxy.polls, SOON, "a poll")
        cluster.join(1)
        peers.expect_numbers([1])


def test_held_peers_end_in_time(own_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HOLD_RESERVATION", 2.0)
    monkeypatch.setattr(local_manager, "POLL", 0.3)
    _, peers = start(own_cluster)
    own_cluster.put(peer_subnet(1), attrs(peer_ip(1)), ttl=None)
    own_cluster.join(2)
    peers.expect_numbers([1, 2])
    own_cluster.etcd.wipe()
    peers.expect_numbers([2])


def test_changed_config_is_told_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_manager, "POLL", 0.1)
    start(cluster)
    cluster.put_config('{"Network":"10.6.0.0/16"}')

    def said() -> int:
        return sum("network config has changed" in message for message in caplog.messages)

    eventually(said, SOON, "the warning")
    threading.Event().wait(0.5)
    assert said() == 1


@pytest.mark.parametrize("etcd_runs", [True, False])
def test_watch_ends_when_the_manager_is_closed(own_cluster: Cluster, etcd_runs: bool) -> None:
    manager, own = own_cluster.host()
    peers = own_cluster.watch_peers(manager, own)
    watched = own_cluster.watch_own(manager, own)
    peers.until(len, "the first batch")
    watched.until(len, "the first report")
    if not etcd_runs:
        own_cluster.etcd.stop()
        threading.Event().wait(0.3)
    own_cluster.stop.set()
    manager.close()
    eventually(lambda: peers.ended and watched.ended, 1.5, "both watches ended")
    assert peers.error is None
    assert watched.error is None
