"""Rules that nobody waits for come after the first peers."""

import threading
from typing import Any

import pytest

from flanneld import main
from flanneld.heartbeat import Heartbeat

PATIENCE = 5.0


class Kept:
    """A keeper, and for each time that it was made, whether the peers were in."""

    def __init__(self, peers_in: threading.Event) -> None:
        self.made: list[bool] = []
        self.ran = False
        self._peers_in = peers_in

    def make(self) -> Any:
        self.made.append(self._peers_in.is_set())
        return self

    def run(self, _stop: threading.Event, _pulse: object) -> None:
        self.ran = True


@pytest.fixture
def peers_in() -> threading.Event:
    return threading.Event()


def test_they_come_after_the_first_peers(peers_in: threading.Event) -> None:
    kept, heart = Kept(peers_in), Heartbeat()
    arguments = (kept.make, peers_in, threading.Event(), heart)
    thread = threading.Thread(target=main.keep_rules_later, args=arguments)
    thread.start()
    # Nothing is made before, however long that lasts within PEERS_FIRST.
    thread.join(0.1)
    assert kept.made == []
    peers_in.set()
    thread.join(PATIENCE)
    assert kept.made == [True]
    assert kept.ran
    assert "masquerade" in heart._pulses


def test_they_do_not_wait_for_ever(
    peers_in: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "PEERS_FIRST", 0.01)
    kept = Kept(peers_in)
    main.keep_rules_later(kept.make, peers_in, threading.Event(), Heartbeat())
    assert (kept.made, kept.ran) == ([False], True)


def test_a_daemon_that_ends_begins_with_none(peers_in: threading.Event) -> None:
    kept, stop = Kept(peers_in), threading.Event()
    stop.set()
    peers_in.set()
    main.keep_rules_later(kept.make, peers_in, stop, Heartbeat())
    assert (kept.made, kept.ran) == ([], False)
