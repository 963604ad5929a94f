"""Two hosts with a real flanneld and a real dockerd each. They need root.

As root nothing is skipped: a missing tool is a failure. Without root they are not collected, and
the summary says so (tests/conftest.py).
"""

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack

import pytest

from lab import Lab, needs
from lab.docker import PACKAGES

from .cluster import Cluster, MakeCluster

ROOT = os.geteuid() == 0

if not ROOT:
    collect_ignore_glob = ["test_*.py"]


CLUSTERS = pytest.StashKey[list[Cluster]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows the last log lines of its daemons."""
    report = yield
    if report.failed:
        # One that several tests share is an argument.
        shared = [a for a in getattr(item, "funcargs", {}).values() if isinstance(a, Cluster)]
        for cluster in [*item.stash.get(CLUSTERS, []), *shared]:
            for daemon in cluster.daemons:
                report.sections.append(("flanneld", daemon.explain()))
            for docker in cluster.dockers:
                report.sections.append(("dockerd", docker.explain()))
    return report


@pytest.fixture(scope="session")
def _machine() -> None:
    problem = needs.missing(needs.PACKAGES | PACKAGES)
    if problem:
        pytest.fail(problem)
    Lab.sweep_stale()


@pytest.fixture(scope="module", params=["vxlan", "host-gw"])
def cluster(request: pytest.FixtureRequest, _machine: None) -> Iterator[Cluster]:
    """Shared by the tests of one module: they leave it as they found it."""
    with Lab(2) as lab:
        yield Cluster(lab, request.param)


@pytest.fixture
def make_cluster(request: pytest.FixtureRequest, _machine: None) -> Iterator[MakeCluster]:
    """Make a cluster for one test, which may do to it whatever it likes."""
    clusters = request.node.stash.setdefault(CLUSTERS, [])
    with ExitStack() as stack:

        def make(*, docker_first: bool = False, nftables: bool = False) -> Cluster:
            lab = stack.enter_context(Lab(2))
            cluster = Cluster(lab, docker_first=docker_first, nftables=nftables)
            clusters.append(cluster)
            return cluster

        yield make
