"""Log lines as glog writes them, verbosity, broken outputs, and the small helpers."""

import io
import linecache
import logging
import os
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from datetime import timedelta
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld import logs
from flanneld.logs import LONGEST, GlogFormatter, go_duration, setup, verbose

LINE = re.compile(r"([IWEF])(\d{4}) (\d\d:\d\d:\d\d\.\d{6}) ([ \d]{7,}) ([^ :]+):(\d+)\] (.*)\n")
HERE = "test_logs.py"


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("flanneld", *logs.LIBRARIES)]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


@pytest.fixture
def new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "EST+5EDT,M3.2.0,M11.1.0")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def started(v: int = 0, vmodule: str = "", at: str = ":0") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    setup(v, vmodule, at, stream)
    return logging.getLogger("flanneld.test"), stream


def record(
    message: object,
    *args: object,
    level: int = logging.INFO,
    created: float = 1479840863.616463,
    path: str = "/opt/flanneld/main.py",
    line: int = 459,
) -> logging.LogRecord:
    made = logging.LogRecord("flanneld.main", level, path, line, message, args, None)
    made.created = created
    made.process = 19439
    return made


# --- the line


@pytest.mark.usefixtures("new_york")
@pytest.mark.parametrize(
    ("given_record", "line"),
    [
        (
            record("Using interface with name %s and address %s", "eth0", "10.97.0.1"),
            "I1122 13:54:23.616463   19439 main.py:459] "
            "Using interface with name eth0 and address 10.97.0.1\n",
        ),
        (
            record("late", created=1467345599.9999999, line=7),
            "I0701 00:00:00.000000   19439 main.py:7] late\n",
        ),
        (
            record("early", created=1483246800.000001),
            "I0101 00:00:00.000001   19439 main.py:459] early\n",
        ),
        (
            record("a\nb", level=logging.WARNING),
            "W1122 13:54:23.616463   19439 main.py:459] a\\nb\n",
        ),
        (
            record("bad node: %s", "x\nE1122 13:54:23.616463   19439 main.py:459] forged"),
            "I1122 13:54:23.616463   19439 main.py:459] "
            "bad node: x\\nE1122 13:54:23.616463   19439 main.py:459] forged\n",
        ),
        (
            record("\t\r\x1b[2J\x7f\x85\u2028Ger\u00e4t\n\n"),
            "I1122 13:54:23.616463   19439 main.py:459] "
            "\\t\\r\\x1b[2J\\x7f\\x85\\u2028Ger\u00e4t\\n\n",
        ),
        (
            record("ended\n", level=logging.ERROR),
            "E1122 13:54:23.616463   19439 main.py:459] ended\n",
        ),
        (
            record("", level=logging.CRITICAL),
            "F1122 13:54:23.616463   19439 main.py:459] \n",
        ),
        (
            record("v", level=verbose(4), path="watch.py", line=12345),
            "I1122 13:54:23.616463   19439 watch.py:12345] v\n",
        ),
        (
            record("100% of it"),
            "I1122 13:54:23.616463   19439 main.py:459] 100% of it\n",
        ),
        (
            record("%d peers", "many"),
            "I1122 13:54:23.616463   19439 main.py:459] %d peers ('many',)\n",
        ),
    ],
)
def test_golden_lines(given_record: logging.LogRecord, line: str) -> None:
    assert GlogFormatter().format(given_record) == line


@pytest.mark.parametrize(
    ("pid", "field"), [(1, "       1 "), (1234567, " 1234567 "), (4194304999, " 4194304999 ")]
)
def test_process_id_is_right_aligned(pid: int, field: str) -> None:
    made = record("x")
    made.process = pid
    assert field + "main.py" in GlogFormatter().format(made)


@given(st.integers(0, 4_000_000_000_000_000))
def test_time_is_exact_to_the_microsecond(microseconds: int) -> None:
    line = GlogFormatter().format(record("x", created=microseconds / 1_000_000))
    moment = time.localtime(microseconds // 1_000_000)
    assert line[1:21] == time.strftime("%m%d %H:%M:%S.", moment) + f"{microseconds % 1000000:06d}"


@given(st.text(), st.sampled_from([5, 10, 20, 30, 40, 50]))
def test_any_message_makes_one_line_end(message: str, level: int) -> None:
    line = GlogFormatter().format(record(message, level=level))
    head, body = line.split("] ", 1)
    assert "\n" not in head
    assert body.endswith("\n")
    # One line, whatever a reader takes for the end of one, and no control character in it.
    assert len(line.splitlines()) == 1
    assert not [c for c in body[:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp")]
    message = message.removesuffix("\n")
    if message.isprintable():
        assert body == message + "\n"


@pytest.mark.parametrize("length", [LONGEST - 1, LONGEST, LONGEST + 1, 10 * LONGEST])
def test_a_long_message_is_cut(length: int) -> None:
    body = GlogFormatter().format(record("%s", "x" * length)).split("] ", 1)[1]
    if length <= LONGEST:
        assert body == "x" * length + "\n"
    else:
        assert body == "x" * LONGEST + f"... ({length} characters)\n"


def test_no_message_makes_a_line_of_its_own() -> None:
    logger, stream = started()
    logger.warning("Ignoring bad subnet node %s", "x\nE1122 forged")
    assert LINE.fullmatch(stream.getvalue())
    assert stream.getvalue().endswith("] Ignoring bad subnet node x\\nE1122 forged\n")


@pytest.mark.parametrize(
    ("level", "letter"),
    [(1, "I"), (10, "I"), (20, "I"), (29, "I"), (30, "W"), (40, "E"), (50, "F"), (99, "F")],
)
def test_letters(level: int, letter: str) -> None:
    assert GlogFormatter().format(record("x", level=level))[0] == letter


def test_a_logged_line_carries_its_own_place_time_and_process() -> None:
    logger, stream = started()
    before = time.time()
    logger.warning("lease of %s is gone", "10.5.1.0/24")
    match = LINE.fullmatch(stream.getvalue())
    assert match
    letter, day, clock, pid, file, line, message = match.groups()
    assert (letter, file, message) == ("W", HERE, "lease of 10.5.1.0/24 is gone")
    assert int(pid) == os.getpid()
    source = linecache.getline(__file__, int(line))
    assert "logger.warning" in source
    stamps = {time.strftime("%m%d %H:%M:%S", time.localtime(before + n)) for n in (0, 1)}
    assert f"{day} {clock[:8]}" in stamps


def test_a_traceback_follows_on_lines_of_its_own() -> None:
    logger, stream = started()
    try:
        raise OSError(19, "No such device")
    except OSError:
        logger.exception("flannel.1 cannot be made\n")
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("] flannel.1 cannot be made")
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "OSError: [Errno 19] No such device"
    assert stream.getvalue().endswith("device\n")


# --- verbosity


@pytest.mark.parametrize(
    ("n", "level"), [(-1, 20), (0, 20), (1, 19), (4, 16), (19, 1), (20, 1), (2**63, 1)]
)
def test_verbose_levels(n: int, level: int) -> None:
    assert verbose(n) == level


@pytest.mark.parametrize(
    ("v", "shown"),
    [(-3, []), (0, []), (1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (2**62, [1, 2, 3, 4, 30])],
)
def test_v_shows_what_is_up_to_it(v: int, shown: list[int]) -> None:
    logger, stream = started(v)
    for n in (1, 2, 3, 4, 30):
        logger.log(verbose(n), "verbosity %d", n)
        assert logger.isEnabledFor(verbose(n)) == (n in shown)
    logger.info("always")
    messages = [line.split("] ")[1] for line in stream.getvalue().splitlines()]
    assert messages == [f"verbosity {n}" for n in shown] + ["always"]


@pytest.mark.parametrize(
    ("v", "vmodule", "highest"),
    [
        (0, "test_logs=3", 3),
        (0, "other=3", 0),
        (2, "other=3", 2),
        (2, "test_logs=1", 2),
        (0, "test_*=2", 2),
        (0, "test_?ogs=2", 2),
        (0, "test_[k-m]ogs=2", 2),
        (0, "test_[^a]ogs=2", 2),
        (0, "test_[^l]ogs=2", 0),
        (0, "test=2", 0),
        (0, "logs=2", 0),
        (0, "test_logs.py=2", 0),
        (0, "test_logs=1,test_*=4", 1),
        (0, "test_logs=0,test_*=4", 4),
        (0, "other=4,test_logs=2", 2),
        (0, "[=4", 0),
    ],
)
def test_vmodule_raises_the_verbosity_of_a_file(v: int, vmodule: str, highest: int) -> None:
    logger, stream = started(v, vmodule)
    for _ in range(2):
        for n in range(1, 6):
            logger.log(verbose(n), "%d", n)
    shown = [int(line.split("] ")[1]) for line in stream.getvalue().splitlines()]
    assert shown == 2 * list(range(1, highest + 1))


@given(st.text(min_size=1).filter(lambda text: "," not in text and "=" not in text))
def test_no_pattern_breaks_a_log_call(pattern: str) -> None:
    logger, stream = started(vmodule=f"{pattern}=1")
    logger.info("said")
    assert stream.getvalue().endswith("] said\n")


@pytest.mark.parametrize(
    ("vmodule", "at"), [("x", ":0"), ("a=-1", ":0"), ("", "foo"), ("", "a.py:0")]
)
def test_setup_refuses_what_the_flags_refuse(vmodule: str, at: str) -> None:
    with pytest.raises(ValueError, match=r"syntax error|negative"):
        setup(0, vmodule, at, io.StringIO())


def say_one(logger: logging.Logger) -> None:
    logger.info("traced")


def say_two(logger: logging.Logger) -> None:
    logger.info("plain")


@pytest.mark.parametrize("extension", ["py", "go"])
def test_backtrace_at_one_line(extension: str) -> None:
    line = say_one.__code__.co_firstlineno + 1
    logger, stream = started(at=f"test_logs.{extension}:{line}")
    say_one(logger)
    say_two(logger)
    first, *stack, last = stream.getvalue().splitlines()
    assert first.endswith(f"{HERE}:{line}] traced")
    assert stack[-1].strip() == 'logger.info("traced")'
    assert stack[-2].strip().endswith(f'{HERE}", line {line}, in say_one')
    assert "in test_backtrace_at_one_line" in "".join(stack)
    assert last.endswith("] plain")


@pytest.mark.parametrize("at", ["", ":0", "other.py:1", "test_logs.py:1"])
def test_no_backtrace_elsewhere(at: str) -> None:
    logger, stream = started(at=at)
    say_one(logger)
    assert LINE.fullmatch(stream.getvalue())


# --- where it goes


def test_setup_again_replaces_the_first() -> None:
    _, old = started(4)
    logger, new = started()
    logger.info("once")
    logger.log(verbose(1), "too much")
    assert old.getvalue() == ""
    assert len(new.getvalue().splitlines()) == 1


def test_stderr_is_looked_up_when_called(capsys: pytest.CaptureFixture[str]) -> None:
    setup(0, "", ":0")
    logging.getLogger("flanneld.main").info("here")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert LINE.fullmatch(captured.err)


def test_libraries_are_quiet_and_in_the_same_format(capsys: pytest.CaptureFixture[str]) -> None:
    _, stream = started(9)
    for name in ("etcd.client", "etcd", "urllib3.connectionpool", "pyroute2.netlink", "asyncio"):
        logger = logging.getLogger(name)
        logger.info("chatter")
        logger.warning("chatter")
        if name.startswith("etcd"):
            logger.error("chatter")
        logger.critical("%s is broken", name)
    lines = stream.getvalue().splitlines(keepends=True)
    assert len(lines) == 5
    assert all(LINE.fullmatch(line) and "is broken" in line for line in lines)
    assert capsys.readouterr().err == ""


def packets(reader: int) -> list[bytes]:
    """What is in a pipe, one item per write. The pipe must be made with O_DIRECT."""
    got = []
    while True:
        try:
            got.append(os.read(reader, 65536))
        except BlockingIOError:
            return got


def test_one_write_per_record() -> None:
    reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    with open(writer, "w", buffering=1) as stream:
        setup(0, "", ":0", stream)
        logger = logging.getLogger("flanneld.test")
        try:
            raise ValueError("y" * 2000)
        except ValueError:
            logger.exception("one\ntwo\n%s", "x" * 1000)
        logger.error("not UTF-8: \udcff")
        threads = [threading.Thread(target=logger.info, args=("t",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        got = packets(reader)
    os.close(reader)
    assert len(got) == 10
    first, *_, last = got[0].splitlines()
    assert first.endswith(b"] one\\ntwo\\n" + b"x" * 1000)
    assert last == b"ValueError: " + b"y" * 2000
    assert got[0].endswith(b"\n")
    assert got[1].endswith(b"] not UTF-8: \\udcff\n")
    assert all(LINE.fullmatch(line.decode()) for line in got[1:])


def closed_text() -> TextIO:
    stream = io.StringIO()
    stream.close()
    return stream


def closed_file() -> TextIO:
    stream = open(os.devnull, "w")  # noqa: SIM115 - closed on the next line, on purpose
    stream.close()
    return stream


class Failing(io.StringIO):
    def write(self, text: str) -> int:
        raise RuntimeError(text)


@pytest.mark.parametrize("make", [closed_text, closed_file, Failing])
def test_a_stream_that_fails_never_raises(
    make: type[TextIO], capsys: pytest.CaptureFixture[str]
) -> None:
    setup(0, "", ":0", make())
    logging.getLogger("flanneld.test").error("nobody hears this")
    assert capsys.readouterr().err == ""


def test_a_message_that_cannot_be_made_never_raises() -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError

        __repr__ = __str__

    logger, stream = started()
    logger.info(Bad())
    logger.info("still here")
    assert stream.getvalue().endswith("] still here\n")


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    setup(0, "", ":0")
    logging.getLogger("flanneld.test").error("nobody hears this")


def test_a_reader_that_went_away_does_not_change_the_exit_status() -> None:
    program = (
        "import logging, sys; from flanneld.logs import setup; setup(0, '', ':0')\n"
        "sys.stdin.read()\n"
        "for n in range(100): logging.getLogger('flanneld').info('x' * 200)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin
    assert child.stderr
    child.stderr.close()
    child.stdin.close()
    try:
        assert child.wait(30) == 0
    finally:
        child.kill()


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (999, "999ns"),
        (1_000, "1µs"),
        (1_100, "1.1µs"),
        (999_999, "999.999µs"),
        (2_200_000, "2.2ms"),
        (998_825_768, "998.825768ms"),
        (1_000_000_000, "1s"),
        (3_300_000_001, "3.300000001s"),
        (59_999_999_999, "59.999999999s"),
        (60_000_000_000, "1m0s"),
        (245_001_000_000, "4m5.001s"),
        (3_600_000_000_000, "1h0m0s"),
        (82_799_996_867_639, "22h59m59.996867639s"),
        (82_740_000_000_000, "22h59m0s"),
        (-3_598_000_000_000, "-59m58s"),
        (-1_500, "-1.5µs"),
        ((1 << 63) - 1, "2562047h47m16.854775807s"),
        (-1 << 63, "-2562047h47m16.854775808s"),
    ],
)
def test_go_duration(nanoseconds: int, text: str) -> None:
    assert go_duration(nanoseconds) == text


UNITS = {"h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6, "µs": 10**3, "ns": 1}


@given(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-(10**10), 10**10))
def test_go_duration_says_the_whole_value(nanoseconds: int) -> None:
    text = go_duration(nanoseconds)
    parts = re.findall(r"(\d+)(?:\.(\d*[1-9]))?(ms|µs|ns|h|m|s)", text)
    assert "".join(f"{a}{'.' + b if b else ''}{unit}" for a, b, unit in parts) == text.lstrip("-")
    total = sum(int(a + b) * UNITS[unit] // 10 ** len(b) for a, b, unit in parts)
    assert total == abs(nanoseconds)
    assert text.startswith("-") == (nanoseconds < 0)


def test_go_duration_of_a_timedelta() -> None:
    assert go_duration(timedelta(hours=23) // timedelta(microseconds=1) * 1000) == "23h0m0s"
