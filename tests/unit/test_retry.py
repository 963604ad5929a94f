"""What an outage logs, and how long it pauses."""

import logging

import pytest
from memory_store import Clock, Stop

from flanneld import retry
from flanneld.retry import (
    CALM,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MOST_LINES,
    REPEAT,
    Outage,
    Sparing,
)


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []

    def __call__(self, level: int, text: str) -> None:
        self.lines.append((level, text))


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    clock = Clock()
    monkeypatch.setattr(retry, "now", clock)
    return Stop(clock)


def test_the_same_reason_is_logged_once_a_minute(stop: Stop) -> None:
    log = Log()
    outage = Outage(log, "Watch", steady=1.0)
    for _ in range(int(2 * REPEAT) + 1):
        assert outage.failed(OSError("refused"), stop)
    assert log.lines == [(logging.ERROR, "Watch: refused")] * 3


def test_another_reason_is_logged_at_once(stop: Stop) -> None:
    log = Log()
    outage = Outage(log, "Watch", steady=1.0)
    for reason in ("refused", "refused", "timeout", "refused"):
        outage.failed(reason, stop, logging.INFO)
    assert [text for _, text in log.lines] == ["Watch: refused", "Watch: timeout", "Watch: refused"]
    assert {level for level, _ in log.lines} == {logging.INFO}


def test_failures_of_one_kind_are_one_reason(stop: Stop) -> None:
    log = Log()
    outage = Outage(log, "Watch", steady=1.0)
    for reason in ("closed", "refused", "timeout"):
        outage.failed(reason, stop, kind="away")
    outage.failed("denied", stop)
    outage.failed("refused", stop, kind="away")
    assert [text for _, text in log.lines] == ["Watch: closed", "Watch: denied", "Watch: refused"]
    for _ in range(int(REPEAT)):
        outage.failed("timeout", stop, kind="away")
    assert log.lines[-1][1] == "Watch: timeout"
    assert len(log.lines) == 4


REFUSED = "http://10.97.0.11:2379: connection refused"
SILENT = "http://10.97.0.12:2379: i/o timeout"


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("100: Key not found (/config) [7]", "100: Key not found (/config) [8]", True),
        ("100: Key not found (/config) [7]", "100: Key not found (/config)", True),
        ("100: Key not found (/config) [7]", "100: Key not found (/subnets) [7]", False),
        ("100: Key not found (/config) [7]", "101: Compare failed (/config) [7]", False),
        ("[7] and [8]", "[8] and [8]", False),
        (
            f"unavailable; error #0: {REFUSED}; error #1: {SILENT}",
            f"unavailable; error #0: {SILENT}; error #1: {REFUSED}",
            True,
        ),
        (
            f"unavailable; error #0: {REFUSED}; error #1: {SILENT}",
            f"unavailable; error #0: {SILENT}; error #1: {SILENT}",
            False,
        ),
        (f"unavailable; error #0: {REFUSED}", f"misconfigured; error #0: {REFUSED}", False),
    ],
)
def test_what_makes_two_reasons_the_same(stop: Stop, first: str, second: str, same: bool) -> None:
    log = Log()
    outage = Outage(log, "Watch", steady=1.0)
    for reason in (first, second, first):
        outage.failed(reason, stop)
    texts = [f"Watch: {reason}" for reason in (first, second, first)]
    assert [text for _, text in log.lines] == (texts[:1] if same else texts)


def test_pauses_grow_up_to_the_longest_and_vary(stop: Stop) -> None:
    outage = Outage(Log(), "Watch")
    for _ in range(10):
        outage.failed("refused", stop)
    whole = FIRST_PAUSE
    for pause in stop.waits:
        assert whole / 2 <= pause <= whole
        whole = min(2 * whole, LONGEST_PAUSE)
    assert whole == LONGEST_PAUSE
    assert len({pause / LONGEST_PAUSE for pause in stop.waits[4:]}) > 1


def test_a_steady_pause(stop: Stop) -> None:
    outage = Outage(Log(), "Watch", steady=5.0)
    for _ in range(3):
        outage.failed("refused", stop)
    assert stop.waits == [5.0] * 3


def test_a_success_is_logged_with_the_time_it_took(stop: Stop) -> None:
    log = Log()
    outage = Outage(log, "Watch", steady=45.0, recovered="Watch is back")
    outage.failed("refused", stop)
    outage.failed("refused", stop)
    outage.over()
    outage.over()
    assert log.lines[1:] == [(logging.INFO, "Watch is back (after 1m30s)")]


def test_after_a_success_everything_starts_anew(stop: Stop) -> None:
    log = Log()
    outage = Outage(log, "Watch")
    for _ in range(5):
        outage.failed("refused", stop)
    outage.over()
    stop.wait(CALM)
    outage.failed("refused", stop)
    assert [text for _, text in log.lines] == ["Watch: refused"] * 2
    assert stop.waits[-1] <= FIRST_PAUSE


def test_success_and_failure_in_turns_are_one_outage(stop: Stop) -> None:
    """A server that answers the first of two requests, over and over."""
    log = Log()
    outage = Outage(log, "Watch", recovered="Watch is back")
    for _ in range(10):
        outage.failed("refused", stop)
        outage.over()
    assert len(log.lines) == 2
    assert stop.waits[-1] >= LONGEST_PAUSE / 2


def test_neither_the_stores_index_nor_the_order_of_endpoints_is_news(stop: Stop) -> None:
    log = Log()
    outage = Outage(log, "Watch")
    outage.failed("100: Key not found (/a) [7]", stop)
    outage.failed("100: Key not found (/a) [8]", stop)
    outage.failed("no; error #0: a: refused; error #1: b: timeout", stop)
    outage.failed("no; error #0: b: timeout; error #1: a: refused", stop)
    assert len(log.lines) == 2


def test_a_success_without_a_failure_is_silent(stop: Stop) -> None:
    log = Log()
    Outage(log, "Watch", recovered="Watch is back").over()
    assert log.lines == []
    assert stop.waits == []


def test_it_says_when_to_stop(stop: Stop) -> None:
    outage = Outage(Log(), "Watch")
    stop.set()
    assert not outage.failed("refused", stop)


def test_what_others_write_is_logged_but_not_without_end(stop: Stop) -> None:
    log = Log()
    warn = Sparing(log)
    for number in range(5 * MOST_LINES):
        warn(f"bad {number}")
    texts = [text for _, text in log.lines]
    assert texts[:MOST_LINES] == [f"bad {number}" for number in range(MOST_LINES)]
    assert texts[MOST_LINES:] == ["Too many such lines: no more for up to 60 s"]
    stop.wait(REPEAT)
    warn("one more")
    assert [text for _, text in log.lines][MOST_LINES + 1 :] == [
        f"{4 * MOST_LINES} more such lines were left out",
        "one more",
    ]
