"""A server that is no etcd, or a broken one: every answer ends in a StoreError, and no other way.

Anything else would end the daemon; what cannot be understood must not be believed either.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flanneld.errors import (
    CompareFailed,
    HistoryCleared,
    KeyNotFound,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from flanneld.subnet import etcd_member
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from flanneld.subnet.store import Node, Poll, Snapshot
from lab.etcd import Etcd
from lab.etcdv2 import EtcdV2

from .conftest import MakeStore
from .servers import Server, Stall, answer, poll_head

NAME = "10.5.17.0-24"
KEY = f"/p/subnets/{NAME}"
NODE = Node(NAME, "{}", 60, 5)

CALLS: dict[str, Callable[[EtcdV2Store], object]] = {
    "read_config": lambda store: store.read_config(),
    "snapshot": lambda store: store.snapshot(),
    "read": lambda store: store.read(NAME),
    "create": lambda store: store.create(NAME, "v", 60),
    "swap": lambda store: store.swap(NODE, "v", 60),
    "remove": lambda store: store.remove(NODE),
    "poll all": lambda store: store.poll(None, 5, 0.3),
    "poll own": lambda store: store.poll(NAME, 5, 0.3),
}

HTML = b"<html><body><h1>It works!</h1></body></html>"


def event(node: object, action: str = "get") -> str:
    return json.dumps({"action": action, "node": node})


# What no call can make sense of, whatever the status.
NONSENSE: dict[str, bytes] = {
    "not http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "closed": b"",
    "bad status line": b"HTTP/1.1 abc def\r\n\r\n",
    "endless header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000 + b"\r\n\r\n{}",
    "html": answer(HTML),
    "blanks": answer(" \n"),
    "half json": answer('{"action":"get","node":{"key":"/p/su'),
    "not utf-8": answer(b'{"action":"get","node":{"key":"\xff\xfe"}}'),
    "null": answer("null"),
    "list": answer("[]"),
    "number": answer("7"),
    "string": answer('"x"'),
    "empty object": answer("{}"),
    "null node": answer(event(None)),
    "list node": answer(event([])),
    "string node": answer(event("x")),
    "deep": answer("[" * 200_000),
    "shorter than announced": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}",
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n",
    "bad gzip": answer(HTML, headers=("Content-Encoding: gzip",)),
    "bad index header": answer(event({"key": KEY}), index="many"),
    "huge index header": answer(event({"key": KEY}), index="9" * 5000),
    "error in html": answer(HTML, 502),
    "empty error": answer("", 503),
    "error not utf-8": answer(b"\xff\xfe", 500),
    "error null": answer("null", 500),
    "error list": answer("[]", 500),
    "error deep": answer("[" * 200_000, 500),
    "error code a list": answer('{"errorCode":[]}', 400),
    "error code a text": answer('{"errorCode":"x"}', 400),
    "error code infinite": answer('{"errorCode":1e999}', 400),
    "error index a list": answer('{"errorCode":100,"index":[]}', 404),
    "error index a text": answer('{"errorCode":401,"index":"x"}', 400),
    "page not found": answer("404 page not found\n", 404),
    "not found in json": answer('{"message":"no such page"}', 404),
    "teapot": answer("", 418),
    "redirect to nowhere": answer("", 302, headers=("Location: http://127.0.0.1:1/",)),
    "redirect to itself": answer("", 307, headers=("Location: /",)),
    "redirect to nonsense": answer("", 307, headers=("Location: http://[::1:x/",)),
    "redirect without location": answer("", 307),
    "informational": b"HTTP/1.1 100 Continue\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_member, "ANSWER_TIMEOUT", 1.0)


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_unavailability(make_store: MakeStore, kind: str) -> None:
    with Server(lambda _: NONSENSE[kind]) as server:
        for call, run in CALLS.items():
            store = make_store(server.url, at="/p")
            if kind == "blanks" and call.startswith("poll"):
                continue  # an empty answer is how some servers end an idle poll
            with pytest.raises(StoreError) as caught:
                run(store)
            # Not KeyNotFound, CompareFailed...: these would be believed.
            assert not isinstance(
                caught.value, KeyNotFound | CompareFailed | HistoryCleared | StoreDenied
            ), call
            assert len(str(caught.value)) < 1000, call


@pytest.mark.parametrize("kind", [kind for kind in NONSENSE if kind != "blanks"])
def test_next_endpoint_is_asked_instead(
    *,
    etcd: Etcd,
    client: EtcdV2,
    prefix: str,
    make_store: MakeStore,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random, "shuffle", lambda _: None)
    client.put(f"{prefix}/config", "text")
    with Server(lambda _: NONSENSE[kind]) as server:
        assert make_store(f"{server.url},{etcd.url}").read_config() == "text"


WRONG_VALUES: list[object] = [
    None,
    True,
    -1,
    1.5,
    "x",
    "7",
    [],
    {},
    [[]],
    10**30,
    "\ud800",
    float("inf"),
]
FIELDS = ["key", "value", "dir", "nodes", "modifiedIndex", "createdIndex", "ttl", "expiration"]


@pytest.mark.parametrize("field", [*FIELDS, "action", "prevNode"])
def test_fields_of_another_type(make_store: MakeStore, field: str) -> None:
    """Whatever a field holds, the answer is understood or it is a StoreError."""
    good = {"key": KEY, "value": "v", "ttl": 60, "modifiedIndex": 6, "createdIndex": 6}
    with Server() as server:
        store = make_store(server.url, at="/p")
        for wrong, directory in itertools.product(WRONG_VALUES, (False, True)):
            node = {**good, "dir": True, "nodes": [good]} if directory else dict(good)
            document: dict[str, object] = {"action": "set", "node": node}
            if field in ("action", "prevNode"):
                document[field] = wrong
            else:
                node[field] = wrong
                if directory:
                    node["nodes"] = [{**good, field: wrong}]
            check_survives(store, server, answer(json.dumps(document), index=6))


def check_survives(store: EtcdV2Store, server: Server, data: bytes) -> None:
    server.behaviour = lambda _: data
    for run in CALLS.values():
        try:
            result = run(store)
        except StoreError:
            continue
        if isinstance(result, Snapshot):
            assert all(isinstance(node.index, int) for node in result.nodes)
        if isinstance(result, Poll):
            assert result.index >= 5


@pytest.fixture
def json_server(make_store: MakeStore) -> Iterator[tuple[Server, EtcdV2Store]]:
    with Server() as server:
        yield server, make_store(server.url, at="/p")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*FIELDS, "node", "action", "errorCode"]), inner)
    ),
    max_leaves=8,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "action": json_values,
            "node": json_values,
            "prevNode": json_values,
            "errorCode": json_values,
            "index": json_values,
            "message": json_values,
        },
    ),
    st.sampled_from([200, 201, 400, 401, 403, 404, 412, 500]),
)
def test_any_json(
    json_server: tuple[Server, EtcdV2Store], document: dict[str, object], status: int
) -> None:
    server, store = json_server
    check_survives(store, server, answer(json.dumps(document), status, index=6))


def test_answer_of_an_etcd_without_v2_names_the_flag(make_store: MakeStore) -> None:
    with (
        Server(lambda _: NONSENSE["page not found"]) as server,
        pytest.raises(StoreUnavailable, match=r"404 page not found.*--enable-v2"),
    ):
        make_store(server.url).read_config()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (404, '{"errorCode":100,"message":"Key not found","cause":"/p","index":7}', KeyNotFound),
        (412, '{"errorCode":101,"message":"Compare failed","index":7}', CompareFailed),
        (412, '{"errorCode":105,"message":"Key already exists","index":7}', CompareFailed),
        (400, '{"errorCode":401,"message":"outdated","index":7}', HistoryCleared),
        (401, '{"errorCode":110,"message":"authenticate","index":7}', StoreDenied),
        (401, '{"message":"Insufficient credentials"}', StoreDenied),
        (401, "go away", StoreDenied),
        (500, '{"errorCode":300,"message":"Raft Internal Error","index":7}', StoreUnavailable),
        (503, '{"errorCode":301,"message":"During leader election","index":7}', StoreUnavailable),
        (400, '{"errorCode":400,"message":"watcher is cleared","index":7}', StoreUnavailable),
        (500, '{"errorCode":100,"message":"odd","index":7}', StoreUnavailable),
        (403, '{"errorCode":102,"message":"Not a file","index":7}', StoreError),
        (400, '{"errorCode":209,"message":"Invalid field","index":7}', StoreError),
        (400, '{"errorCode":999,"message":"from the future","index":7}', StoreError),
    ],
)
def test_etcds_own_errors(
    make_store: MakeStore, status: int, body: str, kind: type[StoreError]
) -> None:
    with Server(lambda _: answer(body, status, index=7)) as server:
        store = make_store(server.url)
        for run in (CALLS["read_config"], CALLS["create"], CALLS["poll all"]):
            with pytest.raises(StoreError) as caught:
                run(store)
            assert type(caught.value) is kind
            if isinstance(caught.value, KeyNotFound):
                assert caught.value.index == 7


@pytest.mark.parametrize(
    "tail", [b"", b"1\r\n{\r\n", b"20\r\n{"], ids=["nothing", "half json", "half a chunk"]
)
def test_poll_that_stalls_is_an_idle_poll(make_store: MakeStore, tail: bytes) -> None:
    """Its event, if there was one, comes again: the index does not go past it."""
    with Server(lambda _: Stall(poll_head(8) + tail)) as server:
        poll = make_store(server.url).poll(None, 5, 0.2)
        assert (poll.event, poll.index, poll.store_index) == (None, 8, 8)


def test_redirects_are_followed(etcd: Etcd, client: EtcdV2, prefix: str) -> None:
    """As a proxy member of etcd sends them; 10 at most, so that a loop ends."""
    client.put(f"{prefix}/config", "text")
    with Server() as server:
        server.behaviour = lambda request: answer(
            "", 307, headers=(f"Location: {etcd.url}{request.target}",)
        )
        store = EtcdV2Store(server.url, prefix, Credentials())
        assert store.read_config() == "text"
        assert store.create(NAME, "v", 60).value == "v"
        store.close()
        server.requests.clear()
        server.behaviour = lambda request: answer("", 307, headers=(f"Location: {request.target}",))
        store = EtcdV2Store(server.url, prefix, Credentials())
        with pytest.raises(StoreUnavailable, match="too many redirects"):
            store.read_config()
        assert len(server.requests) <= 11
        store.close()
