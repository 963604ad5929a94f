"""The heartbeat: who is watched, who is late, and when the watchdog is fed."""

import logging
import os
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld import heartbeat
from flanneld.heartbeat import SLACK, Heartbeat, late, take_watchdog_interval, watchdog_interval
from flanneld.notify import Notifier

PID = 4711


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "4711"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": ""}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "x"}, None),
        ({"WATCHDOG_PID": "4711"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "1.5"}, None),
        ({"WATCHDOG_USEC": "30s"}, None),
        ({"WATCHDOG_USEC": "\u0663"}, None),
    ],
)
def test_who_is_watched(environ: dict[str, str], interval: float | None) -> None:
    assert watchdog_interval(environ, PID) == interval


def test_no_child_takes_itself_for_the_watched_one() -> None:
    environ = {"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    assert take_watchdog_interval(environ) == 2.0
    assert environ == {"HOME": "/"}


def test_without_a_socket_nobody_is_fed() -> None:
    environ = {"WATCHDOG_USEC": "2000000"}
    assert Notifier(environ).watchdog_interval is None
    assert environ == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 100), max_size=8), st.floats(0, 100))
def test_late_are_exactly_those_past_their_deadline(
    deadlines: dict[str, float], time: float
) -> None:
    found = late(deadlines, time)
    assert set(found) == {name for name, due in deadlines.items() if due < time}
    assert [deadlines[name] for name in found] == sorted(deadlines[name] for name in found)


class Clock:
    """A clock that stands until it is told, and the stop event of a heartbeat that goes by it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 1000.0
        self.fed: list[float] = []
        monkeypatch.setattr(heartbeat, "_clock", lambda: self.time)

    def beat(
        self, heart: Heartbeat, interval: float, until: float, each: Callable[[], None]
    ) -> None:
        """Run the heartbeat until this time; ``each`` is called between its looks."""
        clock = self

        class Stop(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                assert timeout is not None
                clock.time += timeout
                each()
                return clock.time >= until

            def is_set(self) -> bool:
                return clock.time >= until

        heart.run(Stop(), interval, lambda: self.fed.append(self.time))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_watchdog_is_fed_more_often_than_it_asks_for(clock: Clock) -> None:
    heart = Heartbeat()
    pulse = heart.pulse("backend")
    clock.beat(heart, 30.0, 2000.0, pulse.beat)
    gaps = [after - before for before, after in zip(clock.fed, clock.fed[1:], strict=False)]
    assert clock.fed[0] == 1000.0
    assert max(gaps) <= 15.0


def test_one_loop_that_does_not_come_round_is_enough(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    heart = Heartbeat()
    well, stuck = heart.pulse("own lease"), heart.pulse("backend")
    stuck.beat(10.0)
    with caplog.at_level(logging.ERROR):
        clock.beat(heart, 3.0, 1200.0, well.beat)
    assert clock.fed[-1] == 1010.0 + SLACK
    assert heart.late() == ["backend"]
    assert {record.getMessage() for record in caplog.records} == {
        "Stuck: backend. The watchdog is not fed any more and ends the daemon"
    }


def test_an_announced_wait_is_no_delay(clock: Clock) -> None:
    heart = Heartbeat()
    heart.pulse("leases").beat(600.0)
    clock.beat(heart, 3.0, 1600.0 + SLACK, lambda: None)
    assert clock.fed[-1] > 1600.0


def test_a_loop_that_never_began_is_late_too(clock: Clock) -> None:
    heart = Heartbeat()
    heart.pulse("backend")
    clock.time += SLACK + 1
    assert heart.late() == ["backend"]


def test_a_process_that_was_frozen_says_nothing_and_goes_on(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    heart = Heartbeat()
    pulse = heart.pulse("backend")
    frozen = iter([3600.0])

    def each() -> None:
        # The first look after the thaw comes before the loop's first round.
        clock.time += next(frozen, 0.0)
        if clock.time > 4601.0:
            pulse.beat()

    with caplog.at_level(logging.ERROR):
        clock.beat(heart, 3.0, 4700.0, each)
    assert clock.fed[-1] == pytest.approx(4699.0, abs=2)
    assert caplog.records == []
