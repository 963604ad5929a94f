"""Reads that look up while they wait."""

import errno
import socket
import ssl
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from flanneld.subnet.etcd_wait import Watch, WatchfulTLSSocket, pause_for, watchful, watching
from lab import certs

NEVER = 3000.0
SOON = 30.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our socket, and the other end."""
    left, right = socket.socketpair()
    left.settimeout(NEVER)
    ours = watchful(left)
    with ours, right:
        yield ours, right


@pytest.fixture
def tls_pair(tmp_path: Path) -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket, socket.socket]]:
    """The same with TLS, right after the handshake; and a third, that sends us bare bytes.

    With TLS 1.3 the other end has sent its session tickets then.
    """
    made = certs.make(tmp_path / "tls", [IPv4Address("127.0.0.1")])
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(made.server, made.server_key)
    context = ssl.create_default_context(cafile=str(made.ca))
    context.sslsocket_class = WatchfulTLSSocket
    left, right = socket.socketpair()
    raw = right.dup()
    left.settimeout(SOON)
    shaking = threading.Thread(
        target=lambda: ends.append(serving.wrap_socket(right, server_side=True))
    )
    ends: list[ssl.SSLSocket] = []
    shaking.start()
    ours = context.wrap_socket(left, server_hostname="127.0.0.1")
    shaking.join()
    with ours, ends[0], raw:
        yield ours, ends[0], raw


Pair = tuple[socket.socket, socket.socket]


class Looks:
    """Does what it is told at each look, the last again and again."""

    def __init__(self, *acts: float | OSError | bytes, other: socket.socket | None = None) -> None:
        self.acts = list(acts)
        self.count = 0
        self.other = other

    def __call__(self) -> float:
        self.count += 1
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        if isinstance(act, OSError):
            raise act
        if isinstance(act, bytes):
            assert self.other is not None
            self.other.sendall(act)
            return NEVER
        return act


def test_what_is_there_is_read_without_a_look(pair: Pair) -> None:
    ours, other = pair
    looks = Looks(NEVER)
    other.sendall(b"there")
    with watching(Watch(0.0, looks)):
        assert ours.recv_into(bytearray(9)) == 5
        other.close()
        assert ours.recv_into(bytearray(9)) == 0
    assert looks.count == 0


def test_looks_come_after_the_pauses_until_there_is_something(pair: Pair) -> None:
    ours, other = pair
    looks = Looks(0.0, 0.01, b"there", other=other)
    with watching(Watch(0.01, looks)):
        assert ours.recv_into(bytearray(9)) == 5
    assert looks.count == 3


def test_a_look_ends_the_read(pair: Pair) -> None:
    ours, _ = pair
    bad = ConnectionAbortedError(errno.ECONNABORTED, "enough")
    with (
        watching(Watch(0.0, Looks(0.0, bad))),
        ours.makefile("rb") as file,
        pytest.raises(ConnectionAbortedError, match="enough"),
    ):
        file.readline()


def test_the_sockets_timeout_holds(pair: Pair) -> None:
    ours, _ = pair
    ours.settimeout(0.05)
    with watching(Watch(0.01, Looks(0.01))), pytest.raises(TimeoutError):
        ours.recv_into(bytearray(9))
    with watching(Watch(NEVER, Looks(NEVER))), pytest.raises(TimeoutError):
        ours.recv_into(bytearray(9))


def test_reads_of_the_look_itself_do_not_look(pair: Pair) -> None:
    ours, other = pair
    depth = 0

    def look() -> float:
        nonlocal depth
        depth += 1
        ours.settimeout(0.01)
        with pytest.raises(TimeoutError):
            ours.recv_into(bytearray(9))
        ours.settimeout(NEVER)
        other.sendall(b"there")
        return NEVER

    with watching(Watch(0.0, look)):
        assert ours.recv_into(bytearray(9)) == 5
    assert depth == 1


def test_the_pause_can_be_changed_on_the_way(pair: Pair) -> None:
    ours, other = pair
    looks = Looks(b"there", other=other)
    pause_for(0.0)  # nobody watches: no harm
    with watching(Watch(NEVER, looks)):
        pause_for(0.01)
        assert ours.recv_into(bytearray(9)) == 5
    assert looks.count == 1


def test_one_thread_does_not_watch_for_another(pair: Pair) -> None:
    ours, other = pair
    looks = Looks(0.0)
    read = threading.Thread(target=lambda: ours.recv_into(bytearray(9)))
    with watching(Watch(0.0, looks)):
        read.start()
        read.join(0.1)
        assert read.is_alive()
        other.sendall(b"there")
        read.join(10)
    assert not read.is_alive()
    assert looks.count == 0


def test_without_a_watch_it_is_an_ordinary_socket(pair: Pair) -> None:
    ours, other = pair
    other.sendall(b"there")
    assert ours.recv(9) == b"there"
    assert ours.gettimeout() == NEVER


TLSPair = tuple[ssl.SSLSocket, ssl.SSLSocket, socket.socket]


@pytest.mark.parametrize("sent", [b"", b"\x17\x03\x03"], ids=["tickets", "part of a record"])
def test_what_is_of_tls_alone_is_no_answer(tls_pair: TLSPair, sent: bytes) -> None:
    """There is something to read, but nothing in it for us: that is to wait, too."""
    ours, _, raw = tls_pair
    raw.sendall(sent)
    looks = Looks(0.0, ConnectionAbortedError(errno.ECONNABORTED, "enough"))
    with watching(Watch(0.01, looks)), pytest.raises(ConnectionAbortedError, match="enough"):
        ours.recv_into(bytearray(9))
    assert looks.count == 2
    assert ours.gettimeout() == SOON


def test_tls_reads_what_comes(tls_pair: TLSPair) -> None:
    ours, other, raw = tls_pair
    looks = Looks(0.0, b"there", other=other)
    with watching(Watch(0.01, looks)):
        assert ours.recv_into(bytearray(3)) == 3
        # The rest is in OpenSSL's memory: nothing to wait for.
        assert ours.recv_into(bytearray(9)) == 2
    assert looks.count == 2
    with watching(Watch(NEVER, looks)):
        ours.settimeout(0.05)
        with pytest.raises(TimeoutError):
            ours.recv_into(bytearray(9))
        raw.shutdown(socket.SHUT_WR)
        assert ours.recv_into(bytearray(9)) == 0
    assert looks.count == 2


def test_what_has_come_during_a_bad_look_is_read(pair: Pair) -> None:
    """It was slow to answer the look, and is alive: what it says counts."""
    ours, other = pair

    def look() -> float:
        other.sendall(b"there")
        raise ConnectionAbortedError(errno.ECONNABORTED, "it does not answer")

    with watching(Watch(0.0, look)):
        assert ours.recv_into(bytearray(9)) == 5
