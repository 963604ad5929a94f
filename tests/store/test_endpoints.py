"""Members that are dead, mute or slow; answers that are lost; closing in the middle."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlencode

import pytest

from flanneld.errors import StoreError, StoreSilent, StoreUnavailable
from flanneld.subnet import etcd_member
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from lab.etcd import Etcd
from lab.etcdv2 import EtcdV2
from lab.wait import eventually

from .conftest import MakeStore
from .hosts import OWN_IP, SOON, Cluster, attrs
from .servers import Action, DeafListener, Forward, Request, Server, Stall, answer, free_url

NAME = "10.5.17.0-24"
VALUE = attrs().encode()


@pytest.fixture(autouse=True)
def _endpoints_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "shuffle", lambda _: None)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a test need not wait as long as a daemon does."""
    monkeypatch.setattr(etcd_member, "CONNECT_TIMEOUT", 0.7)
    monkeypatch.setattr(etcd_member, "ANSWER_TIMEOUT", 0.7)


@contextmanager
def mute_endpoint(kind: str) -> Iterator[str]:
    """An endpoint that gives no answer, in one of the ways there are."""
    with ExitStack() as stack:
        if kind == "dead":
            yield free_url()
        elif kind == "deaf":
            yield stack.enter_context(DeafListener()).url
        elif kind == "black hole":
            yield stack.enter_context(DeafListener(full=True)).url
        elif kind == "half an answer":
            half = Stall(b"HTTP/1.1 200 OK\r\nX-Etcd-Index: 9")
            yield stack.enter_context(Server(lambda _: half)).url
        else:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(socket, "getaddrinfo", _resolve)
            yield "http://no-such-host.invalid:2379"


_getaddrinfo = socket.getaddrinfo


def _resolve(host: str, *args: Any, **kwargs: Any) -> Any:
    """Know no name, without asking a name server."""
    if host.endswith(".invalid"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return _getaddrinfo(host, *args, **kwargs)


MUTE = ["dead", "deaf", "black hole", "half an answer", "unknown name"]


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("kind", MUTE)
def test_reads_and_polls_go_to_the_next_endpoint(
    etcd: Etcd, client: EtcdV2, prefix: str, make_store: MakeStore, kind: str
) -> None:
    client.put(f"{prefix}/config", "text")
    with mute_endpoint(kind) as mute:
        assert make_store(f"{mute},{etcd.url}").read_config() == "text"
        store = make_store(f"{mute},{etcd.url}")
        start = client.index()
        client.put(f"{prefix}/subnets/{NAME}", VALUE)
        assert store.poll(None, start, 30).event is not None


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("kind", ["dead", "black hole", "unknown name"])
def test_write_goes_on_to_the_next_endpoint_if_nobody_can_have_seen_it(
    etcd: Etcd, make_store: MakeStore, kind: str
) -> None:
    with mute_endpoint(kind) as mute:
        assert make_store(f"{mute},{etcd.url}").create(NAME, VALUE, 60).value == VALUE


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("kind", ["deaf", "half an answer"])
def test_write_that_may_have_been_seen_is_not_repeated_elsewhere(
    etcd: Etcd, make_store: MakeStore, kind: str
) -> None:
    with mute_endpoint(kind) as mute:
        store = make_store(f"{mute},{etcd.url}")
        with pytest.raises(StoreUnavailable, match="the write may have been carried out"):
            store.create(NAME, VALUE, 60)
        # The next call does not begin with the mute one.
        assert store.create(NAME, VALUE, 60).value == VALUE


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dead", "connection refused"),
        ("deaf", "i/o timeout"),
        ("black hole", "i/o timeout"),
        ("unknown name", "name or service not known"),
    ],
)
def test_every_endpoint_and_its_reason_is_named(
    make_store: MakeStore, kind: str, reason: str
) -> None:
    with mute_endpoint(kind) as mute:
        dead = free_url()
        with pytest.raises(StoreUnavailable) as caught:
            make_store(f"{mute},{dead}").read_config()
    text = str(caught.value)
    start = "client: etcd cluster is unavailable or misconfigured; error #0: "
    assert text.startswith(f"{start}{mute}: ")
    assert text.endswith(f"; error #1: {dead}: connection refused")
    first = text.removeprefix(start).partition("; error #1")[0].partition(": ")[2]
    assert first == reason


def test_two_of_three_endpoints_are_dead(
    etcd: Etcd, client: EtcdV2, prefix: str, make_store: MakeStore
) -> None:
    client.put(f"{prefix}/config", "text")
    for place in range(3):
        endpoints = [free_url(), free_url()]
        endpoints.insert(place, etcd.url)
        store = make_store(",".join(endpoints))
        assert store.read_config() == "text"
        node = store.create(f"{place}-{NAME}", VALUE, 60)
        assert store.poll(None, node.index - 1, 5).event is not None


def test_dead_endpoints_get_their_turn_again(
    etcd: Etcd, client: EtcdV2, prefix: str, make_store: MakeStore
) -> None:
    """Each endpoint dies in its turn, and comes back while another serves."""

    def answering(_: Request) -> Action:
        return Forward.ANSWER

    def closing(_: Request) -> Action:
        return b""

    client.put(f"{prefix}/config", "text")
    with ExitStack() as stack:
        proxies = [stack.enter_context(Server(upstream=etcd.url)) for _ in range(3)]
        store = make_store(",".join(proxy.url for proxy in proxies))
        for turn in range(7):
            serving = turn % 3
            for number, proxy in enumerate(proxies):
                proxy.behaviour = answering if number == serving else closing
                proxy.requests.clear()
            assert store.read_config() == "text"
            assert store.read_config() == "text"
            # It stays with the one that answered.
            reads = [sum(not request.is_look for request in proxy.requests) for proxy in proxies]
            assert reads.pop(serving) == 2
            assert max(reads) <= 1


def test_frozen_etcd_costs_one_timeout(
    own_etcd: Etcd, etcd: Etcd, client: EtcdV2, prefix: str, make_store: MakeStore
) -> None:
    """With the real timeouts: python-etcd by itself would take four of them (20 s) and fail."""
    client.put(f"{prefix}/config", "text")
    with own_etcd.client() as direct:
        direct.put(f"{prefix}/config", "frozen")
    store = make_store(f"{own_etcd.url},{etcd.url}")
    assert store.read_config() == "frozen"  # the connection exists, and is used again
    own_etcd.freeze()
    try:
        began = time.monotonic()
        assert store.read_config() == "text"
        assert time.monotonic() - began < 12
        began = time.monotonic()
        assert store.read_config() == "text"
        assert time.monotonic() - began < 3
    finally:
        own_etcd.thaw()


@pytest.mark.usefixtures("_impatient")
def test_a_list_that_comes_late_is_waited_for_longer(
    etcd: Etcd, store: EtcdV2Store, make_store: MakeStore
) -> None:
    """Given up as early each time, an etcd that is busy with many would be asked for ever."""
    created = store.create(NAME, VALUE, None)

    def busy(_: Request) -> Action:
        time.sleep(2.0)
        return Forward.ANSWER

    with Server(busy, upstream=etcd.url) as server:
        slow = make_store(server.url)
        with pytest.raises(StoreUnavailable, match="i/o timeout"):
            slow.snapshot()
        for _ in range(2):  # once more too early, if need be
            with contextlib.suppress(StoreUnavailable):
                assert slow.snapshot().nodes == (created,)
                break
        else:
            pytest.fail("it gives up too early for ever")
        # It is still busy, so that it gets the same time again; but one key has no such excuse.
        assert slow.snapshot().nodes == (created,)
        with pytest.raises(StoreUnavailable, match="i/o timeout"):
            slow.read(NAME)


def test_poll_goes_on_at_the_next_endpoint_when_its_own_dies(
    etcd: Etcd, client: EtcdV2, prefix: str, make_store: MakeStore
) -> None:
    with Server(upstream=etcd.url) as proxy:
        store = make_store(f"{proxy.url},{etcd.url}")
        start = store.snapshot().index
        answers: list[object] = []
        thread = threading.Thread(target=lambda: answers.append(store.poll(None, start, 60).event))
        thread.start()
        eventually(proxy.polls, SOON, "a poll at the first endpoint")
        proxy.close()
        client.put(f"{prefix}/subnets/{NAME}", VALUE)
        thread.join(SOON)
    assert len(answers) == 1
    assert answers[0] is not None


@pytest.mark.parametrize("action", [Forward.RESET, b""], ids=["reset", "closed"])
@pytest.mark.parametrize("warm", [False, True], ids=["new connection", "kept connection"])
def test_request_is_never_repeated_by_itself(
    etcd: Etcd, make_store: MakeStore, action: Action, warm: bool
) -> None:
    def lose_writes(request: Request) -> Action:
        return action if request.is_write else Forward.ANSWER

    with Server(lose_writes, upstream=etcd.url) as proxy:
        store = make_store(proxy.url)
        if warm:
            store.snapshot()
        node = make_store(etcd.url).create("other", VALUE, 60)
        attempts: list[Callable[[], object]] = [
            lambda: store.create(NAME, VALUE, 60),
            lambda: store.swap(node, "changed", 60),
            lambda: store.remove(node),
        ]
        for number, attempt in enumerate(attempts, 1):
            with pytest.raises(StoreUnavailable):
                attempt()
            assert len(proxy.writes()) == number


def test_create_whose_answer_is_lost_is_adopted(
    etcd: Etcd, cluster: Cluster, client: EtcdV2
) -> None:
    """The write was carried out: the manager finds its own lease, and does not take two."""
    lost: list[Request] = []

    def lose_first_create(request: Request) -> Action:
        if request.is_write and not lost:
            lost.append(request)
            return Forward.RESET
        return Forward.ANSWER

    with Server(lose_first_create, upstream=etcd.url) as proxy:
        manager = cluster.manager(endpoints=proxy.url)
        lease = cluster.acquire(manager, manager.network_config(), attrs())
        writes = proxy.writes()
    assert [write.target.partition("?")[2] for write in writes] == [
        "prevExist=false",
        urlencode({"prevIndex": client.index() - 1, "prevValue": attrs().encode()}),
    ]
    assert writes[0].target.partition("?")[0] == writes[1].target.partition("?")[0]
    assert cluster.leases().keys() == {lease.key}
    assert lease.attrs.public_ip == OWN_IP
    assert cluster.leases()[lease.key].modified_index == lease.modified_index


def test_write_after_etcd_restarted_is_not_taken_for_lost(
    own_etcd: Etcd, make_store: MakeStore
) -> None:
    """The kept connection is dead, which shows before anything is sent."""
    store = make_store(own_etcd.url)
    node = store.create(NAME, VALUE, 60)
    own_etcd.restart()
    assert store.swap(node, "new", 60).value == "new"


def start_and_close(store: EtcdV2Store, call: Callable[[], object], ready: float) -> None:
    """Close the store while another thread is in ``call``; it must end within a second."""
    ended: list[BaseException | None] = []

    def body() -> None:
        try:
            call()
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 - looked at below
            ended.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    time.sleep(ready)
    assert ended == []
    began = time.monotonic()
    store.close()
    thread.join(1.0)
    late = thread.is_alive()
    thread.join(60)
    assert not late, f"ended only after {time.monotonic() - began:.1f} s"
    [error] = ended
    assert isinstance(error, StoreUnavailable), repr(error)
    assert str(error) == "the connection to the store was closed"
    with pytest.raises(StoreUnavailable, match="was closed"):
        store.snapshot()


def credentials(etcd: Etcd) -> Credentials:
    files = etcd.certificates
    if files is None:
        return Credentials()
    return Credentials(str(files.client), str(files.client_key), str(files.ca))


@pytest.mark.usefixtures("_etcd_installed")
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_close_ends_a_blocked_poll(make_store: MakeStore, tls: bool) -> None:
    with Etcd(tls=tls) as etcd:
        store = make_store(etcd.url, credentials=credentials(etcd))
        index = store.snapshot().index
        start_and_close(store, lambda: store.poll(None, index, 60), 0.3)


@pytest.mark.usefixtures("_etcd_installed")
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("warm", [False, True], ids=["new connection", "kept connection"])
def test_close_ends_a_request_to_a_frozen_etcd(
    make_store: MakeStore, tls: bool, warm: bool
) -> None:
    """With TLS a new connection hangs in its handshake."""
    with Etcd(tls=tls) as etcd:
        store = make_store(etcd.url, credentials=credentials(etcd))
        if warm:
            store.snapshot()
        etcd.freeze()
        try:
            start_and_close(store, store.snapshot, 0.3)
        finally:
            etcd.thaw()


def test_close_is_safe_to_repeat_and_before_any_request(make_store: MakeStore) -> None:
    store = make_store(free_url())
    store.close()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.create(NAME, VALUE, 60)


@pytest.mark.parametrize(
    ("cause", "silent"), [("etcdserver: request timed out", True), ("etcdserver: no leader", False)]
)
def test_a_member_that_says_it_was_too_slow(
    make_store: MakeStore, cause: str, silent: bool
) -> None:
    """It has more to do than it can; one without a leader has nothing to do."""
    body = f'{{"errorCode":300,"message":"Raft Internal Error","cause":"{cause}","index":7}}'
    with Server(lambda _: answer(body, 500)) as server:
        store = make_store(server.url)
        for request in (store.read_config, store.snapshot):
            with pytest.raises(StoreUnavailable, match=cause) as caught:
                request()
            assert isinstance(caught.value, StoreSilent) is silent
