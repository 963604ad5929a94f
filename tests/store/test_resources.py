"""Nothing is left behind: descriptors, threads, warnings."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from flanneld.errors import StoreError
from flanneld.subnet import etcd_member
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from lab.etcd import Etcd
from lab.wait import eventually

from .hosts import SOON, Cluster, attrs
from .servers import (
    Action,
    DeafListener,
    Forward,
    Request,
    Server,
    Stall,
    answer,
    free_url,
    poll_head,
)

NAME = "10.5.17.0-24"


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_member, "ANSWER_TIMEOUT", 0.005)
    monkeypatch.setattr(etcd_member, "CONNECT_TIMEOUT", 0.005)


def use(store: EtcdV2Store) -> None:
    for call in (store.read_config, store.snapshot, lambda: store.poll(None, 5, 0.01)):
        try:
            call()
        except StoreError:
            continue


@pytest.mark.usefixtures("_impatient")
def test_200_stores_that_fail_leak_nothing() -> None:
    with (
        Server(lambda _: answer("<html>", 502)) as broken,
        Server(lambda _: Stall(poll_head(9))) as mute,
        Server(lambda _: answer("{}", index=1)) as behind,
        DeafListener() as deaf,
    ):
        urls = [broken.url, mute.url, behind.url, deaf.url, free_url()]

        def fail(number: int) -> None:
            url = urls[number % len(urls)]
            endpoints = f"{url},{free_url()}" if number % 2 else url
            store = EtcdV2Store(endpoints, "/p", Credentials())
            use(store)
            if number % 3:
                store.close()

        # The servers' own ends of the connections are counted too: close those first.
        for number in range(20):
            fail(number)
        for server in (broken, mute, behind):
            server.cut()
        before = descriptors()
        for number in range(200):
            fail(number)
        # The rest of the handlers; a leak would be 200 and more.
        mute.closing.set()
        eventually(lambda: descriptors() <= before + 20, SOON, "few descriptors")


def test_closed_store_holds_no_connection(etcd: Etcd, cluster: Cluster) -> None:
    before = descriptors()
    stores = [EtcdV2Store(etcd.url, cluster.prefix, Credentials()) for _ in range(50)]
    for store in stores:
        store.read_config()
    assert descriptors() >= before + 50
    for store in stores:
        store.close()
    assert descriptors() == before


def test_one_store_keeps_few_connections(etcd: Etcd, cluster: Cluster) -> None:
    """Hundreds of polls that end in every way do not add up."""
    store = EtcdV2Store(etcd.url, cluster.prefix, Credentials())
    index = store.snapshot().index
    before = descriptors()
    for number in range(100):
        store.poll(None, index, 0.005)
        with pytest.raises(StoreError):
            store.poll(None, index + 10**6, 1)
        store.create(f"{number}-{NAME}", attrs().encode(), 3600)
        index = store.poll(None, index, 5).index
    assert descriptors() <= before + 2
    store.close()


def test_failing_stores_leave_no_threads() -> None:
    before = threading.active_count()
    for _ in range(20):
        use(EtcdV2Store(free_url(), "/p", Credentials()))
    # Fewer: those of an earlier test's servers end when they like.
    assert threading.active_count() <= before


PROGRAM = """
import sys, threading
from flanneld.errors import StoreError
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store

def use(store):
    index = store.snapshot().index
    node = store.create("10.5.1.0-24", "x", 60)
    store.poll(None, index, 5)
    store.poll(None, node.index, 0.1)
    poller = threading.Thread(target=poll, args=(store, node.index))
    poller.start()
    store.remove(node)
    poller.join()

def poll(store, index):
    try:
        store.poll(None, index, 5)
    except StoreError as error:
        print(error)

live, dead, prefix = sys.argv[1:]
closed = EtcdV2Store(live, prefix, Credentials())
use(closed)
closed.close()
use(EtcdV2Store(live, prefix, Credentials()))
try:
    EtcdV2Store(dead, prefix, Credentials()).snapshot()
except StoreError as error:
    print(error)
"""


def test_python_in_development_mode_has_no_complaint(etcd: Etcd, prefix: str) -> None:
    """No ResourceWarning, no unraisable error; with a store that was not closed, too."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, etcd.url, free_url(), prefix],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "connection refused" in done.stdout


def test_of_a_member_left_nothing_stays_open(etcd: Etcd, cluster: Cluster) -> None:
    """Three members take turns; meanwhile several threads poll and read, as a daemon's do."""
    with ExitStack() as stack:
        proxies = [stack.enter_context(Server(upstream=etcd.url)) for _ in range(3)]
        store = EtcdV2Store(",".join(p.url for p in proxies), cluster.prefix, Credentials())
        stack.callback(store.close)
        ports = [urlsplit(proxy.url).port for proxy in proxies]
        for turn in range(6):
            for number, proxy in enumerate(proxies):
                proxy.behaviour = _answering if number == turn % 3 else _closing
                proxy.requests.clear()
            serving = proxies[turn % 3]
            start = cluster.client.index()
            with ThreadPoolExecutor(4) as pool:
                polls = [pool.submit(store.poll, None, start, 30.0) for _ in range(4)]
                eventually(partial(_is_asked, serving, 4), SOON, "four polls at once")
                cluster.join(turn)
                assert all(poll.result().event is not None for poll in polls)
            eventually(partial(_is_only_one, serving, ports), SOON, "connections to it alone")


def test_no_request_fails_because_connections_are_forgotten(
    etcd: Etcd, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the worst moment, when a request has its pool and not yet its connection; and in any."""
    store = EtcdV2Store(etcd.url, cluster.prefix, Credentials())
    (member,) = store._members
    original = member.http.connection_from_pool_key

    def worst(*args: Any, **kwargs: Any) -> Any:
        pool = original(*args, **kwargs)
        monkeypatch.undo()
        member.forget_connections()
        return pool

    monkeypatch.setattr(member.http, "connection_from_pool_key", worst)
    assert store.create(NAME, attrs().encode(), 60).value == attrs().encode()
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(store.read, NAME) for _ in range(400)]
        while not all(read.done() for read in reads):
            member.forget_connections()
        for read in reads:
            node, _ = read.result()
            assert node is not None
    store.close()


def _is_asked(server: Server, times: int) -> bool:
    return len(server.polls()) == times


def _is_only_one(server: Server, ports: Sequence[int | None]) -> bool:
    return _connected(ports) == {urlsplit(server.url).port}


def _answering(_: Request) -> Action:
    return Forward.ANSWER


def _closing(_: Request) -> Action:
    return b""


def _connected(ports: Sequence[int | None]) -> set[int]:
    """Return those of the ports to which this process holds a connection, closed or not."""
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
    found = set()
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        port = int(fields[2].rpartition(":")[2], 16)
        if port in ports and f"socket:[{fields[9]}]" in own:
            found.add(port)
    return found


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")
