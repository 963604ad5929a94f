"""Claims on devices; what of them whole daemons see is tested in tests/netns."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from flanneld.lock import InUse, claim, present

CLAIM = """
import subprocess, sys
from flanneld import lock
lock.show_presence()
held = lock.claim(sys.argv[1])
child = subprocess.Popen(["sleep", "600"], close_fds=False, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def name() -> str:
    """A device that no daemon of this machine has."""
    return f"test-{os.getpid()}-{os.urandom(4).hex()}"


@pytest.fixture
def other(name: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that has claimed it, and a program which that one has started."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            os.kill(child, 9)


def test_a_claim_is_there_until_it_is_closed(name: str) -> None:
    with closing(claim(name)), closing(claim(name + "0")), pytest.raises(InUse):
        claim(name)
    claim(name).close()


def test_it_ends_with_its_process_whatever_that_has_started(
    name: str, other: tuple[subprocess.Popen[str], int]
) -> None:
    process, child = other
    with pytest.raises(InUse) as caught:
        claim(name)
    assert str(process.pid) in caught.value.pid.split(" or ")
    assert str(process.pid) in present()
    process.kill()
    process.wait()
    os.kill(child, 0)
    claim(name).close()


def test_a_claim_is_no_daemon(name: str) -> None:
    before = present()
    with closing(claim(name)):
        assert present() == before
