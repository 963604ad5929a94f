"""``make demo``: true when it says so, plain when it cannot, and nothing stays behind."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import names
from lab.demo import main, show
from lab.report import WIDTH, Report

TOP = Path(__file__).parents[2]


def demo(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lab.demo", *arguments],
        cwd=TOP,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_of(pid: int) -> list[Path]:
    """Namespaces and directories of the demo with this process id."""
    parents = (names.NETNS_DIRECTORY, Path("/tmp"), names.MEMORY)  # noqa: S108 - only listed
    return [path for parent in parents for path in parent.glob(f"fl{pid}-*")]


# With udp the packets' way ends with the daemon: what is lost while it is dead is shown.
@pytest.mark.parametrize(("backend", "lost"), [("vxlan", "0"), ("host-gw", "0"), ("udp", r"\d+")])
def test_the_demo_shows_two_hosts_and_what_is_lost(backend: str, lost: str) -> None:
    with demo("--hosts", "2", "--backend", backend) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert left_of(process.pid) == []
    lines = output.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line[0] for line in lines if re.match(r"\d\. ", line)] == list("1234567")
    assert "\x1b" not in output
    assert re.search(r"^ +c1 +- +3/3$", output, re.MULTILINE)
    assert re.search(rf"^ +c1 to c2 +\d+ +\d+ +{lost}$", output, re.MULTILINE)
    assert lines[-1].startswith("All of this was checked and is true.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_stopped_half_way_leaves_nothing(number: signal.Signals) -> None:
    with demo("--hosts", "2") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("2. "):
                break
        assert left_of(process.pid) != []
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "Stopped" in output
    assert "Traceback" not in output
    assert left_of(process.pid) == []


def test_the_demo_says_what_failed_and_shows_the_log() -> None:
    out = io.StringIO()
    broken = (sys.executable, "-c", "import sys; sys.exit('E no such backend: carrier-pigeon')")
    began = time.monotonic()
    assert show(2, "carrier-pigeon", Report(out), broken) == 1
    assert time.monotonic() - began < 20
    text = out.getvalue()
    assert "h1 was expected to be ready, but it ended with status 1" in text
    assert text.rstrip().endswith("E no such backend: carrier-pigeon")
    assert "is true" not in text
    assert left_of(os.getpid()) == []


def test_the_demo_does_not_believe_a_daemon_that_only_says_ready() -> None:
    out = io.StringIO()
    liar = """
import os, socket, sys, time
path = next(a for a in sys.argv if a.startswith("--subnet-file=")).partition("=")[2]
with open(path, "w") as file:
    file.write("FLANNEL_NETWORK=10.5.0.0/16\\nFLANNEL_SUBNET=10.5.1.1/24\\n")
    file.write("FLANNEL_MTU=1500\\nFLANNEL_IPMASQ=false\\n")
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
time.sleep(60)
"""
    assert show(2, "host-gw", Report(out), (sys.executable, "-c", liar)) == 1
    text = out.getvalue()
    assert re.search(r"expected: +a subnet of its own for each host", text)
    assert "flanneld on h2 (running)" in text


def test_without_root_or_tools_the_demo_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "lab.needs.shutil.which", lambda name, path: None if name == "etcd" else path
    )
    assert main([]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        "The demo cannot run: not installed: etcd. On Debian: apt-get install etcd-server\n"
    )
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main([]) == 1
    assert re.fullmatch(r"The demo cannot run: not root: .*\n", capsys.readouterr().err)


def test_colour_only_on_a_terminal_and_not_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def written(out: io.StringIO) -> str:
        Report(out).title("flannel")
        return out.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert written(io.StringIO()) == "flannel\n"
    assert written(Terminal()) == "\x1b[1mflannel\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert written(Terminal()) == "flannel\n"
