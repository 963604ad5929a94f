"""Following the other hosts' leases through outages and losses of a real etcd."""

import threading

import pytest

from flanneld.subnet import local_manager, watch
from lab.wait import eventually

from .hosts import SOON, Cluster, attrs, follow_peers, peer_ip, peer_subnet
from .servers import Action, Forward, Request, Server, Stall, poll_head


@pytest.fixture(autouse=True)
def _short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LINGER", 0.1)
    monkeypatch.setattr(watch, "UNSEEN", 0.1)


def test_deleted_directory_is_lost_data_not_departure(cluster: Cluster) -> None:
    """Their hosts are still there, and publish again; what is new or changed meanwhile counts."""
    _, peers = follow_peers(cluster)
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


def test_more_events_than_etcd_remembers_while_away(cluster: Cluster) -> None:
    away = threading.Event()

    def behave(_: Request) -> Action:
        return b"" if away.is_set() else Forward.ANSWER

    with Server(behave, upstream=cluster.etcd.url) as proxy:
        _, peers = follow_peers(cluster, proxy.url)
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


def test_etcd_restarts(own_cluster: Cluster) -> None:
    _, peers = follow_peers(own_cluster)
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
    _, peers = follow_peers(own_cluster)
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
    _, peers = follow_peers(own_cluster)
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
    _, peers = follow_peers(own_cluster)
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
        _, peers = follow_peers(cluster, proxy.url)
        eventually(lambda: not lagging, SOON, "the member was asked again")
        cluster.join(2)
        peers.expect_numbers([1, 2])
        assert len(peers.events()) == 2


def test_member_cut_off_from_its_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts polls and would let us wait for ever; a linearizable read finds it out."""
    monkeypatch.setattr(local_manager, "POLL", 0.3)
    monkeypatch.setattr("random.shuffle", lambda _: None)
    cut_off = threading.Event()
    # What it knew last, which holds nothing that was written after it was cut off.
    index, knows = 0, threading.Lock()

    def behave(request: Request) -> Action:
        nonlocal index
        if not request.is_poll:
            return b"" if cut_off.is_set() else Forward.ANSWER
        with knows:
            if not cut_off.is_set():
                with cluster.etcd.client() as client:
                    index = client.index()
            return Stall(poll_head(index))

    with Server(behave, upstream=cluster.etcd.url) as proxy:
        _, peers = follow_peers(cluster, f"{proxy.url},{cluster.etcd.url}")
        eventually(proxy.polls, SOON, "a poll")
        with knows:
            cut_off.set()
        cluster.join(1)
        peers.expect_numbers([1])


def test_held_peers_end_in_time(own_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HOLD_RESERVATION", 1.0)
    monkeypatch.setattr(local_manager, "POLL", 0.3)
    _, peers = follow_peers(own_cluster)
    own_cluster.put(peer_subnet(1), attrs(peer_ip(1)), ttl=None)
    own_cluster.join(2)
    peers.expect_numbers([1, 2])
    own_cluster.etcd.wipe()
    peers.expect_numbers([2])


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
