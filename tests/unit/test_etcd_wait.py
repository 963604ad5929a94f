"""Reads that look up while they wait."""

import errno
import socket
import threading
from collections.abc import Iterator

import pytest

from flanneld.subnet.etcd_wait import Watch, pause_for, watchful, watching

NEVER = 3000.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Our socket, and the other end."""
    left, right = socket.socketpair()
    left.settimeout(NEVER)
    ours = watchful(left)
    with ours, right:
        yield ours, right


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
