"""A shared etcd for each module, and a prefix of its own in it for each test.

Tests that stop, freeze or empty etcd make their own. A missing etcd is a failure, not a skip.
"""

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from flanneld.subnet.etcd_member import Credentials
from flanneld.subnet.etcdv2 import EtcdV2Store
from lab.etcd import Etcd
from lab.etcdv2 import EtcdV2
from lab.names import sweep_stale

from .hosts import Cluster

MakeStore = Callable[..., EtcdV2Store]


@pytest.fixture(scope="session")
def _etcd_installed() -> None:
    if shutil.which("etcd") is None:
        pytest.fail("not installed: etcd. On Debian: apt-get install etcd-server")
    sweep_stale()


@pytest.fixture(scope="module")
def etcd(_etcd_installed: None) -> Iterator[Etcd]:
    """Shared by the tests of one module: none may stop it or write outside its own prefix."""
    with Etcd() as server:
        yield server


@pytest.fixture
def own_etcd(_etcd_installed: None) -> Iterator[Etcd]:
    """For one test, which may do to it whatever it likes."""
    with Etcd() as server:
        yield server


@pytest.fixture
def client(etcd: Etcd) -> Iterator[EtcdV2]:
    """Our own way to the shared etcd, past all that is tested."""
    with etcd.client() as direct:
        yield direct


@pytest.fixture
def prefix() -> str:
    """An --etcd-prefix nobody else uses."""
    return f"/coreos.com/{secrets.token_hex(4)}"


@pytest.fixture
def make_store(prefix: str) -> Iterator[MakeStore]:
    """``make_store(endpoints, prefix=..., credentials=...)``: closed when the test ends."""
    with ExitStack() as stack:

        def make(
            endpoints: str, *, at: str = prefix, credentials: Credentials | None = None
        ) -> EtcdV2Store:
            store = EtcdV2Store(endpoints, at, credentials or Credentials())
            stack.callback(store.close)
            return store

        yield make


@pytest.fixture
def store(etcd: Etcd, make_store: MakeStore) -> EtcdV2Store:
    """A store on the shared etcd."""
    return make_store(etcd.url)


@pytest.fixture
def cluster(etcd: Etcd, prefix: str) -> Iterator[Cluster]:
    """Hosts on the shared etcd."""
    with Cluster(etcd, prefix) as hosts:
        yield hosts


@pytest.fixture
def own_cluster(own_etcd: Etcd, prefix: str) -> Iterator[Cluster]:
    """Hosts on an etcd of their own."""
    with Cluster(own_etcd, prefix) as hosts:
        yield hosts
