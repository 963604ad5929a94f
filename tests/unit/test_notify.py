"""sd_notify, with a real datagram socket at the other end."""

import gc
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flanneld import notify
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
        ("10.97.0.1 \t \x7f", b"STATUS=10.97.0.1 \t \x7f"),
    ],
)
def test_a_status_is_one_line_of_ascii(
    service_manager: socket.socket, text: str, heard: bytes
) -> None:
    notifier = Notifier(os.environ)
    notifier.status(text)
    assert service_manager.recv(4096) == heard
    close(notifier)


def test_a_status_is_said_once(service_manager: socket.socket) -> None:
    notifier = Notifier(os.environ)
    for text in ("", "one", "one", "two", "two", "one"):
        notifier.status(text)
    notifier.stopping()
    heard = [service_manager.recv(4096) for _ in range(4)]
    assert heard == [b"STATUS=one", b"STATUS=two", b"STATUS=one", b"STOPPING=1"]
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


def fill(notifier: Notifier) -> None:
    """Say more than the queue holds."""
    for number in range(1000):
        notifier.status(f"message {number}")


def test_ready_waits_for_a_full_queue(service_manager: socket.socket) -> None:
    notifier = Notifier(os.environ)
    fill(notifier)
    heard: list[bytes] = []

    def drain() -> None:
        time.sleep(0.2)
        while not heard or heard[-1] != b"STOPPING=1":
            heard.append(service_manager.recv(4096))

    reader = threading.Thread(target=drain)
    reader.start()
    notifier.ready()
    while b"READY=1" not in heard and reader.is_alive():
        time.sleep(0.001)
    # And nothing else is waited for afterwards.
    assert notifier._notifier.socket.gettimeout() == 0
    notifier.stopping()
    reader.join(10)
    assert not reader.is_alive()
    assert heard[-2:] == [b"READY=1", b"STOPPING=1"]
    close(notifier)


def test_ready_does_not_wait_for_ever_and_is_said_in_the_end(
    service_manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "READY_PATIENCE", 0.1)
    notifier = Notifier(os.environ)
    fill(notifier)
    began = time.monotonic()
    notifier.ready()
    assert time.monotonic() - began >= 0.1
    notifier.status("the last one")
    heard = [service_manager.recv(4096)]
    while not heard[-1].startswith(b"STATUS=the last"):
        heard.append(service_manager.recv(4096))
    assert heard[-2] == b"READY=1"
    assert notifier._notifier.socket.gettimeout() == 0
    join_late(notifier)


def join_late(notifier: Notifier) -> None:
    for thread in threading.enumerate():
        if thread.name == "ready":
            thread.join(5)
            assert not thread.is_alive()
    close(notifier)


@pytest.mark.parametrize("leaves", [False, True])
def test_the_status_after_a_late_ready_waits_for_room(
    service_manager: socket.socket, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """Its queue has room for READY=1, and only later for one more; or the daemon ends first."""
    said: list[str] = []
    notifier = Notifier(os.environ)

    def wait(_seconds: float) -> bool:
        said.append("wait")
        if leaves and said[-2:] == ["READY=1", "wait"]:
            notifier.stopping()
        return len(said) > 2

    monkeypatch.setattr(notifier, "_wait_for_room", wait)
    monkeypatch.setattr(notifier, "_send", said.append)
    notifier.status("as before")
    notifier.ready()
    join_late(notifier)
    late = "STOPPING=1" if leaves else "STATUS=as before"
    assert said[:5] == ["STATUS=as before", "wait", "wait", "READY=1", "wait"]
    assert said[5] == late
    assert service_manager


@pytest.mark.usefixtures("service_manager")
def test_who_leaves_before_it_could_say_ready_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "READY_PATIENCE", 0.1)
    notifier = Notifier(os.environ)
    fill(notifier)
    notifier.ready()
    notifier.stopping()
    join_late(notifier)


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
    assert "NOTIFY_SOCKET" not in os.environ


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_socket_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nothing"))
    notifier = Notifier(os.environ)
    notifier.ready()
    notifier.stopping()
    assert "NOTIFY_SOCKET" not in os.environ
    # sdnotify leaves its unused socket to the garbage collector, which warns of it.
    gc.collect()
