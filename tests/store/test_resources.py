"""Nothing is left behind: descriptors, threads, warnings."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flanneld.errors import StoreError
from flanneld.subnet import etcd_member
from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from lab.etcd import Etcd
from lab.wait import eventually

from .hosts import SOON, Cluster, attrs
from .servers import DeafListener, Server, Stall, answer, free_url, poll_head

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
    assert threading.active_count() == before


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
    store.remove("10.5.1.0-24", node.index)
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
