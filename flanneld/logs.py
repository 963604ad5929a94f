"""Log lines as glog writes them, on the standard library's ``logging``.

    Lmmdd hh:mm:ss.uuuuuu PPPPPPP file:line] message

L is I, W, E or F; the time is local, to the microsecond, without a year; P is the process id.
The format is that of https://github.com/golang/glog and is what log shippers expect of flannel.

Modules log with ``logging.getLogger(__name__)``, and with ``verbose(n)`` as the level for what
``-v=n`` should show.
"""

import contextlib
import fnmatch
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TextIO

from flanneld.flags import NO_BACKTRACE, backtrace_location, vmodule_levels

# Characters of a message; what is longer comes from outside.
LONGEST = 2000

# From this many lines of one kind on, one line says it for all.
MANY = 10

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_ESCAPES |= {ord(c): repr(c)[1:-1] for c in "\n\r\t\u2028\u2029"}

# Libraries that log by themselves, and the least level worth a line of ours. python-etcd reports
# every failed request as an error, though the caller gets an exception for it as well.
LIBRARIES: Mapping[str, int] = {
    "etcd": logging.CRITICAL,
    "urllib3": logging.ERROR,
    "pyroute2": logging.ERROR,
    "asyncio": logging.ERROR,  # below pyroute2
}


def verbose(n: int) -> int:
    """The logging level of a record that ``-v=n`` shows: 19 for 1, 18 for 2, down to 1."""
    return min(logging.INFO, max(1, logging.INFO - n))


def setup(
    options_v: int, vmodule: str, log_backtrace_at: str, stream: TextIO | None = None
) -> None:
    """Send the logger ``flanneld`` and those of ``LIBRARIES`` to stream, by default stderr.

    The texts are flag values as in ``Options``; ValueError if they are not. May be called again:
    the last call counts.
    """
    levels = vmodule_levels(vmodule)
    location = None
    if log_backtrace_at not in ("", NO_BACKTRACE):
        location = backtrace_location(log_backtrace_at)
    handler = LineHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(GlogFormatter(location))
    if levels:
        handler.addFilter(module_filter(options_v, levels))
    most = max([options_v, *(level for _, level in levels)])
    for name, level in {"flanneld": verbose(most), **LIBRARIES}.items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        for old in logger.handlers[:]:
            if isinstance(old, LineHandler):
                logger.removeHandler(old)
        logger.addHandler(handler)


def module_filter(
    v: int, levels: tuple[tuple[str, int], ...]
) -> Callable[[logging.LogRecord], bool]:
    """A filter for ``-vmodule``: the first pattern that fits a source file can raise, never
    lower, the verbosity that ``-v`` gives it. Patterns are matched against the file name without
    directory and extension."""
    # Go negates a class with ^, the shell with !.
    patterns = [(pattern.replace("[^", "[!"), level) for pattern, level in levels]
    lowest: dict[str, int] = {}

    def visible(record: logging.LogRecord) -> bool:
        module = record.module
        if module not in lowest:
            fits = (level for pattern, level in patterns if fnmatch.fnmatchcase(module, pattern))
            lowest[module] = verbose(max(v, next(fits, 0)))
        return record.levelno >= lowest[module]

    return visible


class GlogFormatter(logging.Formatter):
    """Turns a record into its line, line end included.

    A traceback follows on lines of its own. So does the stack of a record that comes from
    ``location``, a (file name, line) as ``-log_backtrace_at`` takes it.
    """

    def __init__(self, location: tuple[str, int] | None = None) -> None:
        super().__init__()
        if location and location[0].endswith(".go"):
            location = (location[0].removesuffix(".go") + ".py", location[1])
        self._location = location

    def format(self, record: logging.LogRecord) -> str:
        # To the nearest microsecond: a float's fraction alone would be cut to one less.
        second, micro = divmod(round(record.created * 1_000_000), 1_000_000)
        moment = time.localtime(second)
        text = (
            f"{_letter(record.levelno)}{moment.tm_mon:02d}{moment.tm_mday:02d} "
            f"{moment.tm_hour:02d}:{moment.tm_min:02d}:{moment.tm_sec:02d}.{micro:06d} "
            f"{record.process or os.getpid():7d} {record.filename}:{record.lineno}] "
            f"{_message(record)}"
        )
        stack = record.stack_info
        if self._location == (record.filename, record.lineno):
            stack = "".join(traceback.format_stack(_frame_of(record)))
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        for part in (trace, stack):
            if part:
                text = text.removesuffix("\n") + "\n" + part
        return text if text.endswith("\n") else text + "\n"


def _letter(levelno: int) -> str:
    if levelno >= logging.CRITICAL:
        return "F"
    if levelno >= logging.ERROR:
        return "E"
    return "W" if levelno >= logging.WARNING else "I"


def _message(record: logging.LogRecord) -> str:
    """Return the message on one line: a text from etcd must not look like a line of ours."""
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - a record with wrong arguments is still worth its line
        message = f"{record.msg} {record.args!r}"
    message = message.removesuffix("\n")
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]}... ({len(message)} characters)"
    return message if message.isprintable() else message.translate(_ESCAPES)


def _frame_of(record: logging.LogRecord) -> FrameType | None:
    """The frame that made the record, without the frames of ``logging`` above it.

    None, which stands for the caller, if the record was made elsewhere.
    """
    frame: FrameType | None = sys._getframe()
    while frame and (frame.f_code.co_filename, frame.f_lineno) != (record.pathname, record.lineno):
        frame = frame.f_back
    return frame


class LineHandler(logging.Handler):
    """Writes each record with one write, past the stream's buffer where it has a descriptor.

    Nothing is kept back, so a reader that goes away costs only the lines it did not read, and
    a closed or broken stream never becomes an error in the daemon.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            self._write(self.format(record))

    def _write(self, line: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            self._stream.write(line)
            self._stream.flush()
            return
        data = line.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(descriptor, data) :]


def go_duration(nanoseconds: int) -> str:
    """A duration as Go's ``time.Duration.String`` writes it: ``22h59m59.996867639s``, ``1.5ms``."""
    sign, rest = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    if rest == 0:
        return "0s"
    for unit, size in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000)):
        if rest < 1_000 * size:
            return f"{sign}{_decimal(rest, size)}{unit}"
    minutes, rest = divmod(rest, 60_000_000_000)
    text = f"{_decimal(rest, 1_000_000_000)}s"
    if minutes:
        text = f"{minutes % 60}m{text}"
    if minutes >= 60:
        text = f"{minutes // 60}h{text}"
    return sign + text


def _decimal(value: int, unit: int) -> str:
    """value / unit, for a unit that is a power of ten, exact and without trailing zeros."""
    whole, fraction = divmod(value, unit)
    if not fraction:
        return str(whole)
    return f"{whole}.{str(unit + fraction)[1:].rstrip('0')}"


def log_many(
    log: logging.Logger, text: str, items: Sequence[str], level: int = logging.INFO
) -> None:
    """Log one line for each item; of many, only a few and their number."""
    for number, item in enumerate(items):
        log.log(level if number < MANY else verbose(1), text, item)
    if len(items) > MANY:
        log.log(level, f"{text} (-v=1 lists them)", f"{len(items)} in all")
