"""What `LeaseStore` promises, kept by `EtcdV2Store` on a real etcd."""

import json
import threading
from dataclasses import replace
from http.client import HTTPConnection
from urllib.parse import urlencode

import pytest

from flanneld.errors import CompareFailed, HistoryCleared, KeyNotFound, StoreError
from flanneld.subnet.etcdv2 import EtcdV2Store
from flanneld.subnet.lease import parse_lease
from flanneld.subnet.store import Behind, Change, Node, StoreEvent
from lab.etcd import Etcd
from lab.etcdv2 import EtcdV2

from .conftest import MakeStore
from .hosts import NETWORK, Cluster, attrs, later, peer_ip
from .servers import Server

NAME = "10.5.17.0-24"
VALUE = attrs().encode()


def test_read_config(store: EtcdV2Store, client: EtcdV2, prefix: str) -> None:
    with pytest.raises(KeyNotFound, match=r"^100: Key not found \(/coreos.com.*\) \[\d+\]$"):
        store.read_config()
    client.put(f"{prefix}/config", NETWORK + " ü")
    assert store.read_config() == NETWORK + " ü"


def test_config_that_is_a_directory(store: EtcdV2Store, client: EtcdV2, prefix: str) -> None:
    client.put(f"{prefix}/config/x", "")
    with pytest.raises(StoreError, match="is a directory: it must hold the network config"):
        store.read_config()


def test_snapshot_of_nothing_has_the_stores_index(store: EtcdV2Store, client: EtcdV2) -> None:
    snapshot = store.snapshot()
    assert snapshot.nodes == ()
    assert snapshot.index == client.index() > 0


def test_snapshot_holds_every_key_and_the_stores_index(
    store: EtcdV2Store, client: EtcdV2, prefix: str
) -> None:
    first = client.put(f"{prefix}/subnets/{NAME}", VALUE, ttl=3600)
    second = client.put(f"{prefix}/subnets/junk", "")
    client.put(f"{prefix}/subnets/deep/10.5.1.0-24", VALUE)
    client.put("/elsewhere", "x")
    snapshot = store.snapshot()
    nodes = {node.name: node for node in snapshot.nodes}
    assert nodes.keys() == {NAME, "junk", "deep"}
    lease = nodes[NAME]
    assert (lease.value, lease.index) == (VALUE, first.modified_index)
    assert lease.ttl is not None
    assert 3000 < lease.ttl <= 3600
    assert nodes["junk"] == Node("junk", "", None, second.modified_index)
    assert snapshot.index == client.index() > second.modified_index


def test_snapshot_of_what_is_no_directory(store: EtcdV2Store, client: EtcdV2, prefix: str) -> None:
    client.put(f"{prefix}/subnets", "x")
    with pytest.raises(StoreError, match="subnets is not a directory: delete it"):
        store.snapshot()


def test_snapshot_of_10000_keys(own_etcd: Etcd, make_store: MakeStore, prefix: str) -> None:
    with own_etcd.client() as client:
        for number in range(10_000):
            name = f"10.{number >> 8}.{number & 255}.0-24"
            client.put(f"{prefix}/subnets/{name}", attrs(peer_ip(number)).encode(), ttl=86400)
    snapshot = make_store(own_etcd.url).snapshot()
    assert len(snapshot.nodes) == 10_000
    leases = [parse_lease(node.name, node.value, node.ttl, node.index) for node in snapshot.nodes]
    assert {str(lease.attrs.public_ip) for lease in leases} == {peer_ip(n) for n in range(10_000)}
    assert snapshot.index == max(node.index for node in snapshot.nodes)


def test_read_one_key(store: EtcdV2Store, client: EtcdV2, prefix: str) -> None:
    assert store.read(NAME) == (None, client.index())
    put = client.put(f"{prefix}/subnets/{NAME}", VALUE)
    client.put("/elsewhere", "x")
    assert store.read(NAME) == (Node(NAME, VALUE, None, put.modified_index), client.index())


def test_a_key_that_has_just_expired_is_no_reservation(
    store: EtcdV2Store, client: EtcdV2, prefix: str
) -> None:
    """etcd names no TTL for a key in the half second between its end and its deletion."""
    client.put(f"{prefix}/subnets/{NAME}", VALUE, ttl=1)
    seen: list[int | None] = []
    while True:
        nodes = [store.read(NAME)[0], *store.snapshot().nodes]
        if nodes == [None]:
            break
        seen += [node.ttl for node in nodes if node is not None]
    assert None not in seen
    assert 1 in seen


def test_create_only_if_absent(store: EtcdV2Store, client: EtcdV2, prefix: str) -> None:
    node = store.create(NAME, VALUE, 86400)
    assert node == Node(NAME, VALUE, 86400, client.index())
    with pytest.raises(CompareFailed, match=r"^105: Key already exists"):
        store.create(NAME, "other", 86400)
    stored = client.get(f"{prefix}/subnets/{NAME}")
    assert stored is not None
    assert (stored.value, stored.modified_index) == (VALUE, node.index)


def test_created_without_ttl_never_expires(store: EtcdV2Store, client: EtcdV2, prefix: str) -> None:
    assert store.create(NAME, VALUE, None).ttl is None
    stored = client.get(f"{prefix}/subnets/{NAME}")
    assert stored is not None
    assert stored.ttl is None


def test_swap_only_of_the_key_as_it_was(store: EtcdV2Store, client: EtcdV2, prefix: str) -> None:
    first = store.create(NAME, VALUE, 86400)
    second = store.swap(first, "new", 5000)
    assert (second.value, second.ttl, second.index) == ("new", 5000, client.index())
    for other in (first, replace(first, value="new"), replace(second, value=VALUE)):
        with pytest.raises(CompareFailed, match=r"^101: Compare failed"):
            store.swap(other, "late", 5000)
    third = store.swap(second, "new", None)
    assert third.ttl is None
    stored = client.get(f"{prefix}/subnets/{NAME}")
    assert stored is not None
    assert (stored.value, stored.ttl) == ("new", None)


def test_swap_of_an_absent_key_does_not_create_it(store: EtcdV2Store, client: EtcdV2) -> None:
    with pytest.raises(KeyNotFound) as caught:
        store.swap(Node(NAME, VALUE, None, 5), VALUE, 86400)
    assert caught.value.index == client.index()
    assert store.snapshot().nodes == ()


def test_remove_only_of_the_key_as_it_was(store: EtcdV2Store) -> None:
    node = store.create(NAME, VALUE, 86400)
    for other in (replace(node, index=node.index + 1), replace(node, value="other")):
        with pytest.raises(CompareFailed, match=r"^101: Compare failed"):
            store.remove(other)
    found = store.read(NAME)[0]
    assert found == later(node, found)
    store.remove(node)
    assert store.read(NAME)[0] is None
    with pytest.raises(KeyNotFound):
        store.remove(node)


# Of the last two the first line of the request, with the value in it, is short enough or not.
@pytest.mark.parametrize(
    "value",
    ["", VALUE, "<&>\u2028ü網 %2F+\n", "\udcff\udcfe", '"' * 682, '"' * 683, "x" * 10**6],
    ids=["empty", "lease", "any text", "no text", "long", "too long", "a megabyte"],
)
def test_whatever_a_key_holds_it_can_be_compared(
    etcd: Etcd, client: EtcdV2, store: EtcdV2Store, prefix: str, value: str
) -> None:
    key = f"/v2/keys{prefix}/subnets/{NAME}"
    form = urlencode({"value": value}, errors="surrogateescape")
    connection = HTTPConnection(etcd.url.removeprefix("http://"))
    for end in ("swap", "remove"):
        content = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("PUT", key, form, content)
        connection.getresponse().read()
        node = store.read(NAME)[0]
        assert node is not None
        with pytest.raises(CompareFailed):
            store.swap(replace(node, index=node.index - 1), VALUE, 60)
        with pytest.raises(CompareFailed):
            store.remove(replace(node, index=node.index - 1))
        if end == "swap":
            assert store.swap(node, VALUE, 60).value == VALUE
        else:
            store.remove(node)
    connection.close()
    assert client.get(f"{prefix}/subnets/{NAME}") is None


def test_a_write_for_a_key_of_another_history_is_refused(
    own_etcd: Etcd, make_store: MakeStore, prefix: str
) -> None:
    """An etcd that was emptied counts anew: another host's key has the index that ours had."""
    store, key = make_store(own_etcd.url), f"{prefix}/subnets/{NAME}"
    ours = store.create(NAME, VALUE, 3600)
    own_etcd.wipe()
    with own_etcd.client() as client:
        while client.index() < ours.index - 1:
            client.put("/elsewhere", "")
        other = client.put(key, attrs(peer_ip(1)).encode(), ttl=3600)
        assert other.modified_index == ours.index
        with pytest.raises(CompareFailed):
            store.swap(ours, VALUE, 86400)
        with pytest.raises(CompareFailed):
            store.remove(ours)
        assert client.get(key) == other


@pytest.mark.parametrize("index", [0, -1])
def test_an_index_that_etcd_would_ignore_is_never_sent(store: EtcdV2Store, index: int) -> None:
    node = store.create(NAME, VALUE, 86400)
    with pytest.raises(ValueError, match="needs an index"):
        store.swap(replace(node, index=index), "x", 86400)
    with pytest.raises(ValueError, match="needs an index"):
        store.remove(replace(node, index=index))
    found = store.read(NAME)[0]
    assert found == later(node, found)


def test_key_that_is_a_directory_is_an_error_of_the_store(
    store: EtcdV2Store, client: EtcdV2, prefix: str
) -> None:
    client.put(f"{prefix}/subnets/{NAME}/x", "")
    with pytest.raises(StoreError, match=r"^102: Not a file"):
        store.swap(Node(NAME, "", None, client.index()), VALUE, 86400)


def test_poll_replays_the_events_one_by_one(
    store: EtcdV2Store, client: EtcdV2, prefix: str
) -> None:
    start = store.snapshot().index
    put = client.put(f"{prefix}/subnets/{NAME}", VALUE)
    client.put("/elsewhere", "x")
    client.put(f"{prefix}/subnets/junk", "2", ttl=3600)
    client.delete(f"{prefix}/subnets/{NAME}")
    last = client.index()
    poll = store.poll(None, start, 5)
    index = put.modified_index
    node = Node(NAME, VALUE, None, index)
    assert poll.event == StoreEvent(Change.SET, NAME, node, index)
    assert (poll.index, poll.store_index) == (index, last)
    poll = store.poll(None, poll.index, 5)
    assert poll.event is not None
    assert (poll.event.change, poll.event.name) == (Change.SET, "junk")
    poll = store.poll(None, poll.index, 5)
    assert poll.event == StoreEvent(Change.GONE, NAME, None, last)
    assert poll.index == poll.store_index == last


def test_poll_of_one_key_sees_only_this_key(
    store: EtcdV2Store, client: EtcdV2, prefix: str
) -> None:
    start = store.snapshot().index
    client.put(f"{prefix}/subnets/10.5.18.0-24", VALUE)
    put = client.put(f"{prefix}/subnets/{NAME}", VALUE)
    poll = store.poll(NAME, start, 5)
    assert poll.event is not None
    assert (poll.event.name, poll.index) == (NAME, put.modified_index)


def test_poll_sees_expiry_and_the_end_of_the_directory(
    store: EtcdV2Store, client: EtcdV2, prefix: str
) -> None:
    node = store.create(NAME, VALUE, 1)
    expired = store.poll(None, node.index, 15)
    assert expired.event == StoreEvent(Change.GONE, NAME, None, expired.index)
    created = store.create(NAME, VALUE, 3600)
    client.delete(prefix, recursive=True)
    for name in (None, NAME):
        gone = store.poll(name, created.index, 5).event
        assert gone is not None
        assert gone.change is Change.ALL_GONE


def test_poll_of_a_key_in_a_directory_below_is_no_lease(
    store: EtcdV2Store, client: EtcdV2, prefix: str
) -> None:
    start = store.snapshot().index
    client.put(f"{prefix}/subnets/deep/{NAME}", VALUE)
    event = store.poll(None, start, 5).event
    assert event is not None
    assert event.node is not None
    assert event.name == event.node.name == f"deep/{NAME}"


def test_poll_waits_for_the_event(store: EtcdV2Store, client: EtcdV2, prefix: str) -> None:
    start = store.snapshot().index
    timer = threading.Timer(0.3, client.put, (f"{prefix}/subnets/{NAME}", VALUE))
    timer.start()
    try:
        poll = store.poll(None, start, 30)
    finally:
        timer.join()
    assert poll.event is not None
    assert poll.event.name == NAME
    assert poll.store_index >= start


def test_idle_poll_learns_how_far_the_store_has_come(store: EtcdV2Store, client: EtcdV2) -> None:
    start = store.snapshot().index
    client.put("/elsewhere", "x")
    poll = store.poll(None, start, 0.2)
    assert poll.event is None
    assert poll.index == poll.store_index == start + 1


def test_foreign_events_during_polls_do_not_use_up_the_history(
    etcd: Etcd, cluster: Cluster, make_store: MakeStore
) -> None:
    """etcd remembers 1000 events for all keys together; what an idle poll learns moves us on."""
    store = make_store(etcd.url)
    start = index = store.snapshot().index
    for _ in range(3):
        cluster.make_history(500)
        poll = store.poll(None, index, 0.2)
        assert poll.event is None
        assert poll.index > index
        index = poll.index
    with pytest.raises(HistoryCleared):
        store.poll(None, start, 0.2)
    cluster.join(1)
    assert store.poll(None, index, 5).event is not None


def test_poll_after_the_history(store: EtcdV2Store, cluster: Cluster) -> None:
    node = store.create(NAME, VALUE, 86400)
    cluster.make_history()
    for name in (None, NAME):
        with pytest.raises(HistoryCleared, match=r"^401: .*cleared"):
            store.poll(name, node.index, 1)


def test_poll_ahead_of_the_store(store: EtcdV2Store, client: EtcdV2) -> None:
    ahead = client.index() + 100
    with pytest.raises(Behind, match=rf"is at index \d+, not yet at {ahead}"):
        store.poll(None, ahead, 30)


def test_poll_through_a_proxy_that_ends_idle_polls(
    etcd: Etcd, client: EtcdV2, make_store: MakeStore
) -> None:
    with Server(upstream=etcd.url) as proxy:
        store = make_store(proxy.url)
        start = store.snapshot().index
        client.put("/elsewhere", "x")
        head = f"HTTP/1.1 200 OK\r\nX-Etcd-Index: {start + 1}\r\nContent-Length: 0\r\n\r\n"
        proxy.behaviour = lambda _: head.encode()
        poll = store.poll(None, start, 30)
        assert (poll.event, poll.index) == (None, start + 1)


def test_values_survive_as_they_are(store: EtcdV2Store, client: EtcdV2, prefix: str) -> None:
    value = json.dumps({"PublicIP": "10.97.0.1", "x": "<&>\u2028ü網 %2F+\n"}, ensure_ascii=False)
    node = store.create(NAME, value, None)
    assert node.value == value
    stored = client.get(f"{prefix}/subnets/{NAME}")
    assert stored is not None
    assert stored.value == value
    assert store.snapshot().nodes == (node,)


def test_threads_share_a_store(store: EtcdV2Store) -> None:
    """Polls and writes at once: no answer reaches another thread's question."""
    start = store.snapshot().index
    problems: list[object] = []

    def use(number: int) -> None:
        name = f"10.5.{number}.0-24"
        index = start
        node = store.create(name, "0", None)
        for turn in range(20):
            poll = store.poll(name, index, 5)
            if poll.event is None or poll.event.node != node:
                problems.append((name, turn, poll))
            index = poll.index
            node = store.swap(node, str(turn), None)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []
    assert len(store.snapshot().nodes) == 8
