"""Following the other hosts' leases in a real etcd, whatever becomes of it."""

import threading
from collections.abc import Callable

import pytest

from flanneld.errors import HistoryCleared
from flanneld.subnet import local_manager, watch
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from flanneld.subnet.lease import LeaseAttrs
from flanneld.subnet.local_manager import LocalManager
from flanneld.subnet.store import Poll
from flanneld.subnet.watch import EventType
from lab.wait import eventually

from .hosts import SOON, Cluster, Peers, attrs, follow_peers, peer_ip, peer_subnet
from .servers import Server


@pytest.fixture(autouse=True)
def _short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LINGER", 0.1)
    monkeypatch.setattr(watch, "UNSEEN", 0.1)


def settle(cluster: Cluster, peers: Peers, number: int = 999) -> None:
    """Wait until all that was written before has been seen."""
    cluster.join(number)
    peers.until(lambda _: peer_subnet(number) in peers.now(), "the last lease")


def test_first_batch_is_everything_there_is(cluster: Cluster) -> None:
    for number in range(1, 4):
        cluster.join(number)
    own, peers = follow_peers(cluster)
    assert len(peers.items) == 1
    peers.expect_numbers(range(1, 4))
    assert str(own.subnet) not in peers.now()


def test_first_batch_comes_even_if_it_is_empty(cluster: Cluster) -> None:
    _, peers = follow_peers(cluster)
    assert peers.items == [[]]


def test_join_change_and_leave(cluster: Cluster) -> None:
    _, peers = follow_peers(cluster)
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
    _, peers = follow_peers(cluster)
    cluster.put(peer_subnet(1), attrs(peer_ip(1)), ttl=1)
    peers.expect_numbers([1])
    peers.expect({})


def test_lease_taken_back_at_once_was_never_gone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LINGER", 20.0)
    _, peers = follow_peers(cluster)
    cluster.join(1)
    cluster.leave(1)
    cluster.join(1)
    settle(cluster, peers)
    assert len(peers.events()) == 2


def test_renewals_and_foreign_writes_are_no_news(cluster: Cluster) -> None:
    own, peers = follow_peers(cluster)
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
    _, peers = follow_peers(cluster)
    cluster.join(1)
    peers.expect_numbers([1])
    cluster.put(peer_subnet(1), "garbage")
    peers.expect({})
    cluster.join(1)
    peers.expect_numbers([1])


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
        _, peers = follow_peers(cluster, proxy.url)
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
    _, peers = follow_peers(cluster)

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


def test_changed_config_is_told_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_manager, "POLL", 0.1)
    follow_peers(cluster)
    cluster.put_config('{"Network":"10.6.0.0/16"}')

    def said() -> int:
        return sum("network config has changed" in message for message in caplog.messages)

    eventually(said, SOON, "the warning")
    threading.Event().wait(0.5)
    assert said() == 1
