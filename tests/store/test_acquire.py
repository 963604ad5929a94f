"""A host takes its subnet and keeps it, against a real etcd and other hosts."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Network

import pytest

from flanneld.errors import LeaseLost, Stopped, StoreUnavailable
from flanneld.subnet.config import Config, parse_config
from flanneld.subnet.lease import LEASE_TTL, Lease
from flanneld.subnet.local_manager import LocalManager
from lab.etcdv2 import Node

from .hosts import NETWORK, OWN_IP, SOON, Cluster, attrs, peer_ip
from .servers import Action, Forward, Request, Server

OWN = "10.5.7.0/24"
WIDE = "10.5.4.0/22"
NEW = attrs(mac="da:63:8f:5d:82:15")


def acquire(cluster: Cluster, previous: str | None = None, config: str = NETWORK) -> Lease:
    manager = cluster.manager(previous)
    cluster.put_config(config)
    return cluster.acquire(manager, manager.network_config(), NEW)


def check_stored(cluster: Cluster, lease: Lease) -> Node:
    """The key is what the lease says."""
    stored = cluster.get(lease.subnet)
    assert stored is not None
    assert stored.value == NEW.encode()
    assert lease.attrs == NEW
    assert lease.modified_index == stored.modified_index
    if lease.ttl is None:
        assert stored.ttl is None
    else:
        assert lease.ttl == LEASE_TTL
        assert stored.ttl is not None
        assert LEASE_TTL - 60 <= stored.ttl <= LEASE_TTL
    return stored


def test_first_lease_in_an_empty_store(cluster: Cluster) -> None:
    lease = acquire(cluster)
    check_stored(cluster, lease)
    assert cluster.leases().keys() == {lease.key}
    assert lease.subnet.subnet_of(IPv4Network("10.5.0.0/16"))
    assert lease.subnet.prefixlen == 24


def test_lease_of_our_own_ip_is_reused_whatever_its_backend(cluster: Cluster) -> None:
    before = cluster.put(OWN, attrs(), ttl=100)
    lease = acquire(cluster, previous="10.5.9.0/24")
    assert str(lease.subnet) == OWN
    assert check_stored(cluster, lease).modified_index > before.modified_index
    assert len(cluster.leases()) == 1


def test_reservation_is_used_and_stays_one(cluster: Cluster) -> None:
    cluster.put(OWN, attrs(), ttl=None)
    lease = acquire(cluster)
    assert str(lease.subnet) == OWN
    assert lease.is_reservation
    check_stored(cluster, lease)
    kept = cluster.manager().keep_lease(lease)
    assert kept.is_reservation
    assert kept.modified_index > lease.modified_index
    check_stored(cluster, kept)


def test_free_previous_subnet_is_taken_again(cluster: Cluster) -> None:
    cluster.put("10.5.1.0/24", attrs(peer_ip(1)))
    lease = acquire(cluster, previous=OWN)
    assert str(lease.subnet) == OWN
    check_stored(cluster, lease)


def test_previous_subnet_of_another_host_is_left_to_it(cluster: Cluster) -> None:
    other = cluster.put(OWN, attrs(peer_ip(1)))
    lease = acquire(cluster, previous=OWN)
    assert str(lease.subnet) != OWN
    check_stored(cluster, lease)
    stored = cluster.get(OWN)
    assert stored is not None
    assert (stored.value, stored.modified_index) == (other.value, other.modified_index)


def test_lease_that_does_not_fit_the_config_is_deleted(cluster: Cluster) -> None:
    cluster.put("10.6.7.0/24", attrs())
    cluster.put("10.5.7.0/26", attrs())
    lease = acquire(cluster, previous="10.6.7.0/24")
    check_stored(cluster, lease)
    assert cluster.leases().keys() == {lease.key}


def test_reservation_that_does_not_fit_is_left_alone(cluster: Cluster) -> None:
    cluster.put("10.6.7.0/24", attrs(), ttl=None)
    lease = acquire(cluster)
    assert cluster.leases().keys() == {lease.key, "10.6.7.0-24"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("10.5.1.0-24", "garbage"),
        ("10.5.1.0-24", '{"PublicIP":"fd00::1"}'),
        ("x10.5.1.0-24y", '{"PublicIP":"10.98.0.1"}'),
        ("10.5.1.7-32", '{"PublicIP":"10.98.0.1"}'),
        ("10.5.1.0-24/directory", ""),
    ],
)
def test_what_looks_taken_is_not_taken(cluster: Cluster, key: str, value: str) -> None:
    """Also where the store would refuse it again and again: a directory in the way."""
    cluster.client.put(f"{cluster.prefix}/subnets/{key}", value)
    two = '{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.2.0"}'
    lease = acquire(cluster, previous="10.5.1.0/24", config=two)
    assert str(lease.subnet) == "10.5.2.0/24"


def test_keep_lease_renews(cluster: Cluster) -> None:
    lease = acquire(cluster)
    short = cluster.put(lease.subnet, NEW, ttl=60)
    kept = cluster.manager().keep_lease(replace(lease, ttl=60, modified_index=short.modified_index))
    assert kept.subnet == lease.subnet
    check_stored(cluster, kept)


@pytest.mark.parametrize("index_known", [True, False])
def test_keep_lease_puts_a_lost_lease_back(cluster: Cluster, index_known: bool) -> None:
    lease = acquire(cluster)
    assert cluster.client.delete(cluster.key(lease.subnet))
    known = lease if index_known else replace(lease, modified_index=0, ttl=0)
    check_stored(cluster, cluster.manager().keep_lease(known))


@pytest.mark.parametrize(
    "value", [attrs().encode(), "garbage", "", '{"PublicIP":"10.97.0.1","BackendType":"udp"}']
)
def test_keep_lease_mends_what_nobody_else_owns(cluster: Cluster, value: str) -> None:
    lease = acquire(cluster)
    cluster.put(lease.subnet, value)
    check_stored(cluster, cluster.manager().keep_lease(lease))


def test_keep_lease_leaves_an_operators_reservation_one(cluster: Cluster) -> None:
    lease = acquire(cluster)
    cluster.put(lease.subnet, NEW, ttl=None)
    kept = cluster.manager().keep_lease(lease)
    assert kept.ttl is None
    check_stored(cluster, kept)


@pytest.mark.parametrize("index_known", [True, False])
def test_keep_lease_never_overwrites_another_host(cluster: Cluster, index_known: bool) -> None:
    lease = acquire(cluster)
    other = cluster.put(lease.subnet, attrs(peer_ip(1)))
    known = lease if index_known else replace(lease, modified_index=0)
    with pytest.raises(LeaseLost, match=rf"{lease.subnet} is now held by {peer_ip(1)}"):
        cluster.manager().keep_lease(known)
    stored = cluster.get(lease.subnet)
    assert stored is not None
    assert (stored.value, stored.modified_index) == (other.value, other.modified_index)


@pytest.mark.parametrize("other", ["10.5.7.0/25", "10.5.6.0/23"])
def test_lost_lease_is_not_put_back_across_another_hosts(cluster: Cluster, other: str) -> None:
    """After a change of SubnetLen another host may have got a part of what was ours."""
    lease = acquire(cluster, previous=OWN)
    cluster.client.delete(cluster.key(OWN))
    cluster.put(other, attrs(peer_ip(1)))
    with pytest.raises(LeaseLost, match=rf"{peer_ip(1)} holds {other}"):
        cluster.manager().keep_lease(lease)
    assert cluster.get(OWN) is None


def test_keep_lease_whose_answer_was_lost(cluster: Cluster) -> None:
    """The next try finds its own write and goes on from there."""
    lose = [True]

    def lose_one_write(request: Request) -> Action:
        return Forward.RESET if request.is_write and lose and lose.pop() else Forward.ANSWER

    with Server(lose_one_write, upstream=cluster.etcd.url) as proxy:
        lease = acquire(cluster)
        manager = cluster.manager(endpoints=proxy.url)
        with pytest.raises(StoreUnavailable, match="may have been carried out"):
            manager.keep_lease(lease)
        assert len(proxy.writes()) == 1
        stored = cluster.get(lease.subnet)
        assert stored is not None
        assert stored.modified_index > lease.modified_index
        check_stored(cluster, manager.keep_lease(lease))


def run_together(cluster: Cluster, managers: list[LocalManager], config: Config) -> list[Lease]:
    """All acquire at the same moment; each has a public IP of its own."""
    barrier = threading.Barrier(len(managers))

    def acquire_one(number: int) -> Lease:
        barrier.wait(SOON)
        return cluster.acquire(managers[number], config, attrs(peer_ip(number)))

    with ThreadPoolExecutor(len(managers)) as pool:
        return list(pool.map(acquire_one, range(len(managers)), timeout=60))


def test_two_hosts_race_for_the_last_two_subnets(cluster: Cluster) -> None:
    config = cluster.put_config(
        '{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.2.0"}'
    )
    managers = [cluster.manager() for _ in range(2)]
    for _ in range(20):
        leases = run_together(cluster, managers, config)
        assert {str(lease.subnet) for lease in leases} == {"10.5.1.0/24", "10.5.2.0/24"}
        for number, lease in enumerate(leases):
            stored = cluster.get(lease.subnet)
            assert stored is not None
            assert stored.json()["PublicIP"] == peer_ip(number)
            cluster.client.delete(cluster.key(lease.subnet))


def test_two_hosts_race_for_one_subnet(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """One gets it; the other waits, and gets it as soon as it is free."""
    monkeypatch.setattr("flanneld.subnet.acquire.OUT_OF_SUBNETS_PAUSE", 0.1)
    config = cluster.put_config(
        '{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.1.0"}'
    )
    managers = [cluster.manager("10.5.1.0/24") for _ in range(2)]
    order: list[int] = []
    lock = threading.Lock()

    def acquire_and_leave(number: int) -> None:
        lease = cluster.acquire(managers[number], config, attrs(peer_ip(number)))
        time.sleep(0.1)
        with cluster.etcd.client() as client:
            stored = client.get(cluster.key(lease.subnet))
            assert stored is not None
            assert stored.json()["PublicIP"] == peer_ip(number)
            with lock:
                order.append(number)
            client.delete(cluster.key(lease.subnet))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(acquire_and_leave, range(2), timeout=60))
    assert sorted(order) == [0, 1]


@pytest.mark.parametrize("written_between", [False, True])
@pytest.mark.parametrize(("first", "second"), [(OWN, WIDE), (WIDE, OWN)])
def test_of_two_overlapping_creations_the_first_is_kept(
    cluster: Cluster, first: str, second: str, written_between: bool
) -> None:
    """SubnetLen was changed between two hosts' starts: etcd takes both keys, in this order.

    With a write in between the first host, too, has to look again, and finds both.
    """
    looked, took = threading.Barrier(2), [threading.Event(), threading.Event()]

    def host(number: int, subnet: str) -> Lease:
        stages = ["look", "create", "look again"]

        def behave(request: Request) -> Action:
            stage = stages.pop(0) if stages else ""
            assert request.is_write is (stage == "create") or not stage
            if stage == "create":
                looked.wait(SOON)
                if number == 1:
                    assert took[0].wait(SOON)
                elif written_between:
                    with cluster.etcd.client() as client:
                        client.put("/elsewhere", "")
            if stage == "look again":
                took[number].set()
                assert all(event.wait(SOON) for event in took)
            return Forward.ANSWER

        with Server(behave, upstream=cluster.etcd.url) as proxy:
            manager = cluster.manager(subnet, endpoints=proxy.url)
            lease = cluster.acquire(manager, configs[number], attrs(peer_ip(number)))
            took[number].set()
            return lease

    configs = [
        parse_config(f'{{"Network":"10.5.0.0/16","SubnetLen":{subnet.rpartition("/")[2]}}}')
        for subnet in (first, second)
    ]
    with ThreadPoolExecutor(2) as pool:
        leases = list(pool.map(host, range(2), (first, second), timeout=60))
    assert str(leases[0].subnet) == first
    assert leases[1].subnet.prefixlen == IPv4Network(second).prefixlen
    assert not leases[0].subnet.overlaps(leases[1].subnet)
    held = {name: node.json()["PublicIP"] for name, node in cluster.leases().items()}
    assert held == {lease.key: peer_ip(number) for number, lease in enumerate(leases)}
    first_key = cluster.get(first)
    assert first_key is not None
    assert first_key.created_index == first_key.modified_index == leases[0].created_index


def test_twenty_hosts_start_at_once(cluster: Cluster) -> None:
    config = cluster.put_config(
        '{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.20.0"}'
    )
    leases = run_together(cluster, [cluster.manager() for _ in range(20)], config)
    assert len({lease.subnet for lease in leases}) == 20
    assert cluster.leases().keys() == {lease.key for lease in leases}


def test_out_of_subnets_waits_until_stopped(cluster: Cluster) -> None:
    config = cluster.put_config(
        '{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.1.0"}'
    )
    cluster.put("10.5.1.0/24", attrs(peer_ip(1)))
    threading.Timer(0.2, cluster.stop.set).start()
    with pytest.raises(Stopped):
        cluster.manager().acquire_lease(config, attrs(), cluster.stop)
    assert len(cluster.leases()) == 1


def test_acquire_waits_for_the_store(own_cluster: Cluster) -> None:
    config = own_cluster.put_config()
    own_cluster.etcd.stop()
    manager = own_cluster.manager()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own_cluster.acquire, manager, config, attrs())
        time.sleep(0.3)
        assert not waiting.done()
        own_cluster.etcd.start()
        lease = waiting.result(SOON)
    stored = own_cluster.get(lease.subnet)
    assert stored is not None
    assert json.loads(stored.value)["PublicIP"] == str(OWN_IP)


def test_acquire_without_a_store_can_be_stopped(own_cluster: Cluster) -> None:
    config = own_cluster.put_config()
    own_cluster.etcd.stop()
    threading.Timer(0.2, own_cluster.stop.set).start()
    with pytest.raises(Stopped):
        own_cluster.manager().acquire_lease(config, attrs(), own_cluster.stop)
