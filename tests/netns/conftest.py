"""Tests on the real kernel, with a real etcd and real processes. They need root.

As root nothing is skipped: a missing tool is a failure. Without root they are not collected, and
the summary says so.
"""

import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack

import pytest

from lab import Lab, needs

# A shell that starts a command in the background has it ignore SIGINT, and so would the daemons
# and demos that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = os.geteuid() == 0

if not ROOT:
    collect_ignore_glob = ["test_*.py"]

# An assertion in there shows its values, too.
pytest.register_assert_rewrite("network")

LABS = pytest.StashKey[list[Lab]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROOT:
        terminalreporter.write_line("not root: the tests on the real kernel did not run")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows the last log lines of its daemons."""
    report = yield
    if report.failed:
        # Of a fixture that several tests share, it is an argument.
        shared = getattr(item, "funcargs", {}).values()
        for lab in [*item.stash.get(LABS, []), *(arg for arg in shared if isinstance(arg, Lab))]:
            for daemon in lab.daemons:
                report.sections.append((f"flanneld on {daemon.host.label}", daemon.explain()))
            if lab.etcd is not None:
                report.sections.append(("etcd", lab.etcd.explain()))
    return report


@pytest.fixture(scope="session")
def _machine() -> None:
    problem = needs.missing(needs.PACKAGES | needs.TLS_PACKAGES | needs.FIREWALL_PACKAGES)
    if problem:
        pytest.fail(problem)
    Lab.sweep_stale()


@pytest.fixture
def make_lab(request: pytest.FixtureRequest, _machine: None) -> Iterator[Callable[..., Lab]]:
    """``make_lab(hosts=2, etcd=True)``: a lab that is gone when the test ends, however it ends."""
    labs = request.node.stash.setdefault(LABS, [])
    with ExitStack() as stack:

        def make(hosts: int = 2, *, etcd: bool = True) -> Lab:
            lab = stack.enter_context(Lab(hosts, etcd=etcd))
            labs.append(lab)
            return lab

        yield make
