"""systemd/flannel-docker: when docker is restarted, and when not.

A real systemd runs it in tests/vm; here a script answers in systemctl's place.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "systemd" / "flannel-docker"
OPTIONS = " --bip=10.5.72.1/24 --ip-masq=false --mtu=1450"
DROP_IN = "EnvironmentFiles=/run/flannel/docker (ignore_errors=no)"

SYSTEMCTL = """#!/bin/sh
case "$*" in
*"is-active flanneld"*) exit {flanneld} ;;
*"is-failed docker"*) exit {failed} ;;
*--property=EnvironmentFiles*) echo "EnvironmentFiles=/etc/default/docker (ignore_errors=yes)
{files}" ;;
*--property=MainPID*) echo {pid} ;;
*--property=Result*) echo {result} ;;
*) echo "$*" >>{calls} ;;
esac
"""

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs the program and returns what it has systemctl do."""

    def run(
        pid: int = 0, *, files: str = DROP_IN, flanneld: int = 0, failed: int = 1, result: str = ""
    ) -> str:
        calls = tmp_path / "calls"
        calls.write_text("")
        systemctl = tmp_path / "systemctl"
        systemctl.write_text(
            SYSTEMCTL.format(
                pid=pid, files=files, flanneld=flanneld, failed=failed, result=result, calls=calls
            )
        )
        systemctl.chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        environ = {"PATH": path, "DOCKER_NETWORK_OPTIONS": OPTIONS}
        subprocess.run(["sh", PROGRAM], check=True, env=environ, capture_output=True, timeout=30)
        return calls.read_text()

    return run


@pytest.fixture
def docker() -> Iterator[Callable[[str | None], int]]:
    """Return a function that starts a process with these options, and returns its id."""
    started = []

    def start(options: str | None) -> int:
        environ = {} if options is None else {"DOCKER_NETWORK_OPTIONS": options}
        started.append(subprocess.Popen(["/bin/sleep", "60"], env=environ))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


RESTART = "--no-block try-restart docker.service\n"


@pytest.mark.parametrize(
    ("options", "calls"),
    [(OPTIONS, ""), (OPTIONS.replace("72", "9"), RESTART), (None, RESTART)],
    ids=["the subnet's", "another subnet's", "none yet"],
)
def test_docker_runs(
    run: Run, docker: Callable[[str | None], int], options: str | None, calls: str
) -> None:
    pid = docker(options)
    assert run(pid) == calls
    # A flanneld that is not up says nothing about this host's subnet.
    assert run(pid, flanneld=3) == ""


def test_docker_that_is_not_given_the_options_is_left_alone(
    run: Run, docker: Callable[[str | None], int]
) -> None:
    """As where its drop-in was taken away, or is another."""
    assert run(docker(None), files="") == ""
    assert run(files="", failed=0, result="resources") == ""


@pytest.mark.parametrize(
    ("failed", "result", "starts"),
    [(0, "resources", True), (0, "exit-code", False), (1, "success", False)],
)
def test_docker_does_not_run(run: Run, failed: int, result: str, starts: bool) -> None:
    calls = "reset-failed docker.service\n--no-block start docker.service\n" if starts else ""
    assert run(failed=failed, result=result) == calls
