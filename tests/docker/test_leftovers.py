"""Nothing of a dockerd of the lab stays: no process, no mount, no control group, no file."""

import os
import subprocess
import sys
import tempfile
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from lab import Lab, eventually
from lab.docker import Dockerd
from lab.names import CGROUPS
from lab.process import environment

PATIENCE = 30.0

pytestmark = pytest.mark.usefixtures("_machine")

# A run that is killed before it can clean up.
_KILLED = """
import time
from lab import Lab
from lab.docker import Dockerd
with Lab(1, etcd=False) as lab:
    Dockerd(lab.hosts[0]).start("--bip=10.5.7.1/24").run()
    print(lab.prefix, flush=True)
    time.sleep(600)
"""


def test_the_end_of_a_lab_is_the_end_of_its_docker() -> None:
    with Lab(1, etcd=False) as lab:
        docker = Dockerd(lab.hosts[0]).start("--bip=10.5.7.1/24")
        assert docker.run().address == IPv4Address("10.5.7.2")
        assert {"dockerd", "containerd"} <= set(_commands(lab.prefix))
        assert _groups(lab.prefix)
        # Its mounts are not the machine's.
        assert not [line for line in _mounts() if str(lab.directory) in line]
        docker.stop()
        assert _commands(lab.prefix) == []
        docker.start("--bip=10.5.8.1/24")
        assert docker.run().address == IPv4Address("10.5.8.2")
    assert _left(lab.prefix) == []


def test_a_killed_runs_docker_is_swept() -> None:
    output = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _KILLED], stdout=output, env=environment()) as run:
        try:
            assert run.stdout is not None
            prefix = run.stdout.readline().decode().strip()
        finally:
            run.kill()
        assert prefix
        # Tests beside this one may sweep, too: not before this process has waited for it.
        os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)
        assert "dockerd" in _commands(prefix)
    Lab.sweep_stale()
    eventually(lambda: not _commands(prefix), PATIENCE, "the end of what was killed")
    # A control group can be removed when its last process is gone.
    Lab.sweep_stale()
    assert _left(prefix) == []


def _left(prefix: str) -> list[str]:
    directories = [str(path) for path in Path(tempfile.gettempdir()).glob(f"{prefix}-*")]
    mounts = [line for line in _mounts() if prefix in line]
    return [*_commands(prefix), *_groups(prefix), *directories, *mounts]


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def _commands(prefix: str) -> list[str]:
    """Return the names of the processes whose command line or control group names the lab."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (
                process.joinpath("cmdline").read_bytes() + process.joinpath("cgroup").read_bytes()
            )
            if prefix.encode() in told:
                found.append(process.joinpath("comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _groups(prefix: str) -> list[str]:
    return [str(path) for path in [*CGROUPS.glob(f"{prefix}-*"), *CGROUPS.glob(f"*/{prefix}-*")]]
