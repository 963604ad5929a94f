"""A member of a cluster that lets us wait: frozen, cut off, or with nothing to say.

The waits themselves are far longer than the tests: only what looks after the member can end them.
"""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from flanneld.errors import StoreUnavailable
from flanneld.subnet import etcd_member, etcdv2, local_manager
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from flanneld.subnet.manager import LeaseState
from lab import certs
from lab.etcd import LOOPBACK, Etcd, Login, Member, free_ports
from lab.wait import eventually

from .conftest import MakeStore
from .hosts import SOON, Cluster, attrs
from .servers import Action, DeafListener, Forward, Request, Server, Stall, answer, poll_head
from .test_resources import descriptors

NAME = "10.5.17.0-24"
VALUE = attrs().encode()
# Seconds: longer than any test waits, and an end if it fails.
NEVER = 60.0

ELECTION = answer('{"message":"During election"}', 503)
NO_ETCD = answer("<html>", 404)


@pytest.fixture(autouse=True)
def _endless_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.shuffle", lambda _: None)
    monkeypatch.setattr(local_manager, "POLL", NEVER)
    monkeypatch.setattr(local_manager, "OWN_POLL", NEVER)
    monkeypatch.setattr(etcd_member, "ANSWER_TIMEOUT", NEVER)


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look more often than a daemon does."""
    monkeypatch.setattr(etcd_member, "LOOK", 0.2)
    monkeypatch.setattr(etcd_member, "LATE", 0.2)
    # The servers here are threads of a busy process.
    monkeypatch.setattr(etcd_member, "LOOK_TIMEOUT", 5.0)
    monkeypatch.setattr(etcd_member, "OTHER_TIMEOUT", 5.0)


@pytest.fixture
def members(_etcd_installed: None) -> Iterator[list[Etcd]]:
    """A real cluster of three."""
    ports = iter(free_ports(6))
    known = [Member(f"m{n}", LOOPBACK, next(ports), next(ports)) for n in range(3)]
    with ExitStack() as stack:
        cluster = [Etcd(members=known, name=member.name) for member in known]
        for etcd in cluster:
            stack.callback(etcd.close)
            etcd.launch()
        wait_healthy(cluster)
        yield cluster


def is_leader(etcd: Etcd) -> bool:
    with etcd.client() as client:
        return client.is_leader()


def wait_healthy(etcds: list[Etcd]) -> None:
    for etcd in etcds:
        etcd.wait_healthy()


def urls(etcds: list[Etcd]) -> str:
    return ",".join(etcd.url for etcd in etcds)


@pytest.mark.parametrize("leads", [False, True], ids=["follower", "leader"])
def test_frozen_with_both_watches_on_it(members: list[Etcd], prefix: str, leads: bool) -> None:
    """With the daemon's own pauses. Each event comes once, before and after it is thawed."""
    members.sort(key=lambda etcd: is_leader(etcd) is not leads)
    frozen, *others = members
    with Cluster(others[0], prefix) as hosts:
        manager, own = hosts.host(urls(members))
        peers = hosts.watch_peers(manager, own)
        watched = hosts.watch_own(manager, own)
        hosts.join(1)
        peers.expect_numbers([1])
        watched.expect(LeaseState.HELD)
        frozen.freeze()
        try:
            wait_healthy(others)
            hosts.join(2)
            peers.expect_numbers([1, 2])
            assert hosts.client.delete(hosts.key(own.subnet))
            watched.expect(LeaseState.ABSENT)
            hosts.join(3)
            peers.expect_numbers([1, 2, 3])
        finally:
            frozen.thaw()
        hosts.join(4)
        peers.expect_numbers([1, 2, 3, 4])
        assert len(peers.events()) == 4
        assert watched.states() == [LeaseState.HELD, LeaseState.ABSENT]


def test_frozen_when_a_host_joins(members: list[Etcd], prefix: str) -> None:
    """Reads go on elsewhere; the host gets its lease although its first endpoint is frozen."""
    frozen, *others = members
    with Cluster(others[0], prefix) as hosts:
        frozen.freeze()
        try:
            wait_healthy(others)
            _, own = hosts.host(urls(members))
            assert hosts.leases().keys() == {own.key}
        finally:
            frozen.thaw()


def test_all_others_ended(members: list[Etcd], make_store: MakeStore) -> None:
    """It knows no leader, and it is the only one left: the poll stays, and hears the next event."""
    alone, *others = members
    store = make_store(urls(members))
    start = store.snapshot().index
    polling = Polling(store, start)
    for etcd in others:
        etcd.kill()
    with alone.client() as client:
        eventually(lambda: not client.is_healthy(), SOON, "a member without leader")
    threading.Event().wait(2 * etcd_member.LOOK)
    assert polling.is_waiting()
    for etcd in others:
        etcd.launch()
    alone.wait_healthy()
    with alone.client() as client:
        client.put(f"{store._subnets_path}/{NAME}", VALUE)
    polling.expect_event()


class Polling:
    """One poll in a thread."""

    def __init__(self, store: EtcdV2Store, after: int) -> None:
        self._answers: list[object] = []
        self._thread = threading.Thread(target=self._run, args=(store, after), daemon=True)
        self._thread.start()

    def _run(self, store: EtcdV2Store, after: int) -> None:
        try:
            self._answers.append(store.poll(None, after, NEVER).event)
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self._answers.append(error)

    def is_waiting(self) -> bool:
        return not self._answers

    def expect_event(self) -> None:
        self._thread.join(SOON)
        assert len(self._answers) == 1
        assert getattr(self._answers[0], "name", "") == NAME, repr(self._answers[0])


def polled(look: Callable[[], Action]) -> Callable[[Request], Action]:
    """Let a server hold every poll, and answer looks so."""

    def behave(request: Request) -> Action:
        if request.is_poll:
            return Stall(poll_head(10**6))
        return look() if request.is_look else Forward.ANSWER

    return behave


@pytest.fixture(params=[False, True], ids=["http", "https"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ssl.SSLContext | None, str]:
    """What a server needs, and the authority that its clients need."""
    if not request.param:
        return None, ""
    made = certs.make(tmp_path / "tls", [LOOPBACK])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.server, made.server_key)
    return context, str(made.ca)


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("trouble", [ELECTION, Stall(), b""], ids=["election", "mute", "closed"])
def test_left_when_it_is_in_trouble_and_another_is_not(
    cluster: Cluster,
    make_store: MakeStore,
    trouble: Action,
    tls: tuple[ssl.SSLContext | None, str],
) -> None:
    context, authority = tls
    upstream = cluster.etcd.url
    well = threading.Event()
    well.set()
    look = polled(lambda: Forward.ANSWER if well.is_set() else trouble)
    with (
        Server(look, upstream, context) as first,
        Server(upstream=upstream, tls=context) as second,
    ):
        credentials = Credentials(ca_file=authority)
        store = make_store(f"{first.url},{second.url}", credentials=credentials)
        polling = Polling(store, store.snapshot().index)
        eventually(lambda: len(first.looks()) > 2, SOON, "looks")
        assert polling.is_waiting()
        well.clear()
        eventually(second.polls, SOON, "a poll at the second")
        # Whoever asks next does not meet the first again.
        before = len(first.requests)
        store.snapshot()
        assert all(request.is_look for request in first.requests[before:])
        cluster.client.put(f"{cluster.prefix}/subnets/{NAME}", VALUE)
        polling.expect_event()


@pytest.mark.usefixtures("_often")
def test_goes_on_at_the_member_that_was_found_well(etcd: Etcd, make_store: MakeStore) -> None:
    """Not at the next in the ring, which is in trouble as well, and would have to be left, too."""
    well = threading.Event()
    well.set()
    look = polled(lambda: Forward.ANSWER if well.is_set() else ELECTION)
    with (
        Server(look, upstream=etcd.url) as first,
        Server(polled(lambda: ELECTION), upstream=etcd.url) as second,
        Server(upstream=etcd.url) as third,
    ):
        store = make_store(f"{first.url},{second.url},{third.url}")
        polling = Polling(store, store.snapshot().index)
        eventually(first.polls, SOON, "a poll at the first")
        well.clear()
        eventually(third.polls, SOON, "a poll at the third")
        assert second.polls() == []
        store.snapshot()
        assert all(request.is_look for request in second.requests)
        assert polling.is_waiting()


@pytest.mark.usefixtures("_often")
def test_kept_when_no_other_is_better(etcd: Etcd, make_store: MakeStore) -> None:
    """A store without quorum is no reason to ask round. Once another is well, it is left."""
    well = threading.Event()
    with (
        Server(polled(lambda: ELECTION), upstream=etcd.url) as first,
        Server(polled(lambda: Forward.ANSWER if well.is_set() else ELECTION), etcd.url) as second,
    ):
        store = make_store(f"{first.url},{second.url}")
        polling = Polling(store, store.snapshot().index)
        eventually(lambda: len(second.looks()) > 3, SOON, "looks")
        assert (len(first.polls()), len(second.polls())) == (1, 0)
        assert polling.is_waiting()
        well.set()
        eventually(second.polls, SOON, "a poll at the second")


@pytest.mark.usefixtures("_often")
def test_kept_when_it_is_no_etcd_that_answers(etcd: Etcd, make_store: MakeStore) -> None:
    """A proxy that lets keys through only: what it says proves nothing."""
    with (
        Server(polled(lambda: NO_ETCD), upstream=etcd.url) as first,
        Server(upstream=etcd.url) as second,
    ):
        store = make_store(f"{first.url},{second.url}")
        polling = Polling(store, store.snapshot().index)
        eventually(lambda: len(first.looks()) > 3, SOON, "looks")
        assert second.requests == []
        assert polling.is_waiting()


@pytest.mark.usefixtures("_often")
def test_a_sole_endpoint_is_not_looked_after(etcd: Etcd, make_store: MakeStore) -> None:
    with Server(polled(lambda: ELECTION), upstream=etcd.url) as sole:
        store = make_store(sole.url)
        polling = Polling(store, store.snapshot().index)
        eventually(sole.polls, SOON, "a poll")
        threading.Event().wait(5 * etcd_member.LOOK)
        assert sole.looks() == []
        assert polling.is_waiting()


def test_two_watches_look_as_often_as_one(etcd: Etcd, make_store: MakeStore) -> None:
    """What one has just seen the other need not ask: so there is one at a time, not two."""
    with Server(polled(lambda: Forward.ANSWER), upstream=etcd.url) as first:
        store = make_store(f"{first.url},{etcd.url}")
        start = store.snapshot().index
        polls = [Polling(store, start) for _ in range(8)]
        eventually(lambda: len(first.polls()) == len(polls), SOON, "polls")
        eventually(lambda: len(first.looks()) >= 2, SOON, "two looks")
        # Eight would come in each pause of 2 s.
        assert len(first.looks()) < len(polls)


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("kind", ["mute", "no leader"])
def test_requests_that_wait_for_ever(
    etcd: Etcd, make_store: MakeStore, kind: str, tls: tuple[ssl.SSLContext | None, str]
) -> None:
    """A read goes on at the next member. A write does not: it may have been carried out.

    With TLS the member has said something, its session tickets, but nothing of an answer.
    """
    context, authority = tls
    credentials = Credentials(ca_file=authority)

    def behave(request: Request) -> Action:
        return ELECTION if request.is_look and kind == "no leader" else Stall()

    with Server(behave, tls=context) as first:
        store = make_store(f"{first.url},{etcd.url}", credentials=credentials)
        assert store.snapshot().nodes == ()
        store = make_store(f"{first.url},{etcd.url}", credentials=credentials)
        with pytest.raises(StoreUnavailable, match="the write may have been carried out"):
            store.create(NAME, VALUE, 60)
        assert store.create(NAME, VALUE, 60).value == VALUE
        assert len(first.writes()) == 1


@pytest.mark.usefixtures("_often")
def test_any_user_may_look(own_etcd: Etcd, prefix: str, make_store: MakeStore) -> None:
    """etcd's authentication lets everybody ask for the leader, without a right to the keys too."""
    login = Login("flannel", "secret")
    own_etcd.enable_auth(login, f"{prefix}*")
    with Server(polled(lambda: Forward.ANSWER), own_etcd.url) as first, DeafListener() as deaf:
        credentials = Credentials(username=login.user, password=login.password)
        store = make_store(f"{first.url},{deaf.url}", credentials=credentials)
        polling = Polling(store, store.snapshot().index)
        eventually(lambda: len(first.looks()) > 2, SOON, "looks")
        assert polling.is_waiting()
        assert store._members[0].look(SOON)[0] == ""


@pytest.mark.usefixtures("_often")
def test_hosts_do_not_go_round_in_circles(
    etcd: Etcd, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever has our poll is too slow to answer a look, as if the polls made it so."""
    monkeypatch.setattr(etcdv2, "_LEFT_MOST", 4)
    at: list[int] = []

    def behaviour(number: int) -> Callable[[Request], Action]:
        def behave(request: Request) -> Action:
            if request.is_poll:
                at.append(number)
                return Stall(poll_head(10**6))
            if request.is_look:
                return b"" if at and at[-1] == number else NO_ETCD
            return Forward.ANSWER

        return behave

    with (
        Server(behaviour(0), upstream=etcd.url) as first,
        Server(behaviour(1), upstream=etcd.url) as second,
    ):
        store = make_store(f"{first.url},{second.url}")
        start = store.snapshot().index
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="does not answer"):
                store.poll(None, start, NEVER)
        before = len(first.looks())
        polling = Polling(store, start)
        eventually(lambda: len(first.looks()) > before, SOON, "one more look")
        threading.Event().wait(5 * etcd_member.LOOK)
        assert polling.is_waiting()
        assert len(at) == 5
        # And such a member is not asked all the time.
        assert len(first.looks()) == before + 1


@pytest.mark.usefixtures("_often")
def test_leaving_time_and_again_leaks_nothing(
    etcd: Etcd, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two members are in trouble in turn; the poll goes to and fro."""
    monkeypatch.setattr(etcd_member, "LOOK", 0.01)
    at: list[int] = []
    before = descriptors()

    def behaviour(number: int) -> Callable[[Request], Action]:
        def behave(request: Request) -> Action:
            if request.is_poll:
                at.append(number)
                return Stall(poll_head(10**6))
            if request.is_look:
                return ELECTION if at and at[-1] == number else NO_ETCD
            return Forward.ANSWER

        return behave

    with (
        Server(behaviour(0), upstream=etcd.url) as first,
        Server(behaviour(1), upstream=etcd.url) as second,
    ):
        store = make_store(f"{first.url},{second.url}")
        start = store.snapshot().index

        def leave(times: int) -> int:
            """Return how many sockets of the store are open afterwards."""
            for _ in range(times):
                with pytest.raises(StoreUnavailable, match="during election"):
                    store.poll(None, start, NEVER)
            return sum(sock.fileno() >= 0 for sock in store._sockets._sockets)

        assert leave(50) <= 4
        assert len(at) == 100
        for server in (first, second):
            server.close()
        # The servers' own ends of the connections are counted too.
        store.close()
        eventually(lambda: descriptors() <= before, SOON, "no more descriptors than before")
