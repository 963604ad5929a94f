"""sd_notify, with a real datagram socket at the other end."""

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flanneld.notify import Notifier


@pytest.fixture
def service_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The service manager's end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def close(notifier: Notifier) -> None:
    """The daemon keeps its socket for life; a test must not leave it behind."""
    if notifier._notifier is not None and notifier._notifier.socket is not None:
        notifier._notifier.socket.close()


def test_what_is_said(service_manager: socket.socket) -> None:
    notifier = Notifier(os.environ)
    notifier.status("leased 10.5.34.0/24")
    notifier.ready()
    notifier.stopping()
    heard = [service_manager.recv(4096) for _ in range(3)]
    assert heard == [b"STATUS=leased 10.5.34.0/24", b"READY=1", b"STOPPING=1"]
    close(notifier)


@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("Gerät eth0 \u65e5\u672c", b"STATUS=Ger?t eth0 ??"),
        ("one\nREADY=1\n", b"STATUS=one READY=1 "),
        ("\udcff", b"STATUS=?"),
        ("", b"STATUS="),
    ],
)
def test_a_status_is_one_line_of_ascii(
    service_manager: socket.socket, text: str, heard: bytes
) -> None:
    notifier = Notifier(os.environ)
    notifier.status(text)
    assert service_manager.recv(4096) == heard
    close(notifier)


@pytest.mark.usefixtures("service_manager")
def test_no_child_process_can_speak_for_us() -> None:
    close(Notifier(os.environ))
    assert "NOTIFY_SOCKET" not in os.environ


def test_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"flanneld-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notifier = Notifier(os.environ)
        notifier.ready()
        assert sock.recv(4096) == b"READY=1"
        close(notifier)


def test_a_full_queue_does_not_block(service_manager: socket.socket) -> None:
    notifier = Notifier(os.environ)
    for number in range(5000):
        notifier.status(f"message {number}")
    assert service_manager.recv(4096) == b"STATUS=message 0"
    close(notifier)


@pytest.mark.usefixtures("service_manager")
def test_a_service_manager_that_went_away_is_no_failure(tmp_path: Path) -> None:
    notifier = Notifier(os.environ)
    (tmp_path / "notify").unlink()
    notifier.ready()
    close(notifier)


@pytest.mark.parametrize("value", [None, ""])
def test_nobody_to_talk_to(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    notifier = Notifier(os.environ)
    notifier.ready()
    notifier.status("x")
    notifier.stopping()
    assert notifier._notifier is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_socket_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nothing"))
    notifier = Notifier(os.environ)
    notifier.ready()
    notifier.stopping()
    assert "NOTIFY_SOCKET" not in os.environ
    # sdnotify leaves its unused socket to the garbage collector, which warns of it.
    gc.collect()
