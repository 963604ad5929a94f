"""What goes over the wire: v0.8.0's requests, byte for byte, and keys below any prefix."""

import secrets
from pathlib import Path
from urllib.parse import unquote

import pytest

from flanneld.subnet.etcdv2 import EtcdV2Store
from flanneld.subnet.lease import LeaseAttrs
from flanneld.subnet.store import Change, Node
from lab.etcd import Etcd
from lab.etcdv2 import EtcdV2

from .conftest import MakeStore
from .hosts import OWN_IP, attrs, later
from .servers import Forward, Request, Server, answer

RECORDED = Path(__file__).parents[1] / "fixtures" / "etcd-v2-http.txt"
NAME = "10.5.17.0-24"
VALUE = attrs().encode()


def recorded(start: str) -> str:
    """The first request of the recording that starts so: method, path and query, body."""
    for line in RECORDED.read_text().splitlines():
        request = line.partition(": ")[2] if line.startswith("host") else line
        if request.startswith(start):
            return request
    raise AssertionError(f"not in the recording: {start}")


def sent_by_recorded_session(make_store: MakeStore) -> list[str]:
    """Let a store do what the recorded daemon did; the answers do not matter here."""

    def behave(request: Request) -> bytes:
        key = request.target.removeprefix("/v2/keys").partition("?")[0]
        kind = '"dir":true' if key.endswith("/subnets") else '"value":"{}"'
        node = f'{{"key":"{key}",{kind},"ttl":9,"modifiedIndex":5,"createdIndex":5}}'
        return answer(f'{{"action":"set","node":{node}}}', index=5)

    with Server(behave) as server:
        store = make_store(server.url, at="/coreos.com/network")
        store.read_config()
        store.snapshot()
        store.create(NAME, LeaseAttrs(OWN_IP).encode(), 86400)
        store.read(NAME)
        store.poll(None, 5, 1)
        store.poll(NAME, 5, 1)
        vxlan = LeaseAttrs(OWN_IP, "vxlan", '{"VtepMAC":"da:63:8f:5d:82:15"}').encode()
        before = Node("10.5.7.0-24", "{}", 60, 5)
        store.swap(before, vxlan, 86400)
        store.swap(before, vxlan, None)
        store.remove(before)
        return [str(request) for request in server.requests]


def test_requests_are_byte_for_byte_those_of_the_original(make_store: MakeStore) -> None:
    keys = "/v2/keys/coreos.com/network"
    expected = [
        recorded(f"GET {keys}/config"),
        recorded(f"GET {keys}/subnets?quorum"),
        recorded(f"PUT {keys}/subnets/{NAME}?prevExist=false"),
        recorded(f"GET {keys}/subnets/{NAME}?quorum"),
        recorded(f"GET {keys}/subnets?recursive=true&wait"),
        recorded(f"GET {keys}/subnets/{NAME}?recursive=false&wait"),
        # The original's writes of a key that exists have no condition; ours say what it was.
        *(
            recorded(start).replace("10.5.7.0-24", "10.5.7.0-24?prevIndex=5&prevValue=%7B%7D")
            for start in (
                f"PUT {keys}/subnets/10.5.7.0-24 ttl",
                f"PUT {keys}/subnets/10.5.7.0-24 value",
                f"DELETE {keys}/subnets/10.5.7.0-24",
            )
        ),
    ]
    assert sent_by_recorded_session(make_store) == expected


def test_real_etcd_understands_them(
    etcd: Etcd, client: EtcdV2, prefix: str, make_store: MakeStore
) -> None:
    with Server(upstream=etcd.url) as proxy:
        store = make_store(proxy.url)
        created = store.create(NAME, VALUE, 86400)
        assert created.name == NAME
        assert created.value == VALUE
        assert created.ttl == 86400
        swapped = store.swap(created, "changed & <b>ä+%", None)
        assert (swapped.value, swapped.ttl) == ("changed & <b>ä+%", None)
        assert store.poll(None, created.index, 5).index == swapped.index
        store.remove(swapped)
        assert len(proxy.requests) == 4
    assert client.get(f"{prefix}/subnets/{NAME}") is None


@pytest.mark.parametrize("name", ["10.5.1.0-24", "a b?c%d", "ü"])
def test_names_of_keys_are_escaped(
    store: EtcdV2Store, client: EtcdV2, prefix: str, name: str
) -> None:
    node = store.create(name, "x", None)
    assert node.name == name
    assert client.list(f"{prefix}/subnets").keys() == {name}
    assert store.read(name)[0] == node
    assert store.snapshot().nodes == (node,)
    poll = store.poll(name, node.index - 1, 5)
    assert poll.event is not None
    assert poll.event.name == name
    store.remove(node)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/{}/network", "/{}/network"),
        ("{}/network", "/{}/network"),
        ("/{}/network/", "/{}/network"),
        ("//{}//network///", "/{}/network"),
        ("/{}/./x/../network", "/{}/network"),
        ("/../{}", "/{}"),
        ("/{}", "/{}"),
        ("/{}/why?", "/{}/why?"),
        ("/{}/100%", "/{}/100%"),
        ("/{}/%2F", "/{}/%2F"),
        ("/{}/a b", "/{}/a b"),
        ("/{}/a+b&c=d#e;f", "/{}/a+b&c=d#e;f"),
        ("/{}/netz-übersicht-網", "/{}/netz-übersicht-網"),
    ],
)
def test_any_prefix_is_used_as_the_original_does(
    etcd: Etcd, client: EtcdV2, make_store: MakeStore, given: str, path: str
) -> None:
    """The original cleans the path (Go's path.Join) and escapes it."""
    unique = secrets.token_hex(4)
    top = path.format(unique)
    client.put(f"{top}/config", "{}")
    with Server(upstream=etcd.url) as proxy:
        store = make_store(proxy.url, at=given.format(unique))
        assert store.read_config() == "{}"
        assert unquote(proxy.requests[0].target.partition("?")[0]) == f"/v2/keys{top}/config"
    store = make_store(etcd.url, at=given.format(unique))
    created = store.create(NAME, VALUE, 60)
    assert client.get(f"{top}/subnets/{NAME}") is not None
    (found,) = store.snapshot().nodes
    assert found == later(created, found)
    event = store.poll(None, created.index - 1, 5).event
    assert event is not None
    assert (event.change, event.name, event.node) == (Change.SET, NAME, created)
    client.delete(top, recursive=True)
    gone = store.poll(None, created.index, 5).event
    assert gone is not None
    assert gone.change is Change.ALL_GONE


def test_prefix_may_be_the_root(make_store: MakeStore) -> None:
    with Server(lambda _: Forward.ANSWER, upstream="http://127.0.0.1:1") as server:
        server.behaviour = lambda _: answer(
            '{"action":"get","node":{"key":"/config","value":"{}","modifiedIndex":1}}'
        )
        assert make_store(server.url, at="/").read_config() == "{}"
        assert server.requests[0].target.startswith("/v2/keys/config?")
