"""How the daemon is asked to end, with real signals to real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flanneld.signals import LIMIT

PATIENCE = 30

# Says "ready" when it may be signalled. What comes after is the test's.
PREAMBLE = """
import ctypes, os, signal, sys, threading, time
from flanneld import signals

def say(text):
    os.write(1, text.encode() + b"\\n")

signals.install(lambda: say("last words"))
"""


@contextmanager
def child(program: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a program up to its "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.05)
            yield process
        finally:
            process.kill()


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, float]:
    """Return status, output and how many seconds it took."""
    began = time.monotonic()
    output, errors = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in errors
    return process.returncode, output, time.monotonic() - began


# The C library restarts its wait by itself: it waits in a mutex that this thread has locked.
STUCK = """
import ctypes
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(128)
libc.pthread_mutex_lock(mutex)
say("ready")
libc.pthread_mutex_lock(mutex)
say("unreachable")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_call_that_cannot_be_interrupted_ends_all_the_same(number: signal.Signals) -> None:
    with child(STUCK) as process:
        process.send_signal(number)
        status, output, seconds = finish(process)
    assert (status, output) == (0, "last words\n")
    assert LIMIT - 0.2 <= seconds < LIMIT + 2


def test_other_signals_do_not_end_it() -> None:
    with child(STUCK) as process:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGWINCH):
            process.send_signal(number)
        time.sleep(LIMIT + 0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert finish(process)[:2] == (0, "last words\n")


def test_a_signal_just_before_the_main_thread_waits_ends_it_at_once() -> None:
    """Python notes it between two steps, and the wait that follows knows nothing of it."""
    program = """
def signalled():
    time.sleep(0.3)
    # What the interpreter's own handler does in that moment: nothing interrupts the wait.
    ctypes.pythonapi.PyErr_SetInterruptEx(15)
threading.Thread(target=signalled, daemon=True).start()
say("ready")
try:
    threading.Event().wait()
except signals.Terminated:
    say("terminated")
"""
    with child(program) as process:
        status, output, seconds = finish(process)
    assert (status, output) == (0, "terminated\n")
    assert seconds < LIMIT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "blocked",
    [
        "time.sleep(60)",
        "threading.Event().wait(60)",
        "threading.Event().wait()",
        "__import__('queue').SimpleQueue().get(timeout=60)",
        "__import__('select').poll().poll()",
        "os.read(os.pipe()[0], 1)",
    ],
)
def test_terminated_is_raised_at_once(number: signal.Signals, blocked: str) -> None:
    program = f"""
try:
    say("ready")
    {blocked}
except Exception:
    say("a library took it for its own")
except signals.Terminated:
    say("terminated")
    sys.exit(7)
"""
    with child(program) as process:
        process.send_signal(number)
        status, output, seconds = finish(process)
    assert (status, output) == (7, "terminated\n")
    assert seconds < LIMIT


def test_the_main_thread_is_woken_whichever_thread_the_kernel_picks() -> None:
    """The kernel prefers the main thread, but may give a signal to any that does not block it."""
    program = """
with signals.kept_in_this_thread():
    for _ in range(4):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
blocked = []
for task in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{task}/status") as status:
        masks = dict(line.split(":", 1) for line in status)
    mask = int(masks["SigBlk"], 16)
    if all(mask >> (number - 1) & 1 for number in signals.ENDING):
        blocked.append(int(task))
# All but the main thread, the one that guards the end included.
assert len(blocked) == 5 and os.getpid() not in blocked, blocked
assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
try:
    say("ready")
    time.sleep(60)
except signals.Terminated:
    say("terminated")
    os._exit(0)
"""
    with child(program) as process:
        os.kill(process.pid, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGCONT)
        status, output, seconds = finish(process)
    assert (status, output) == (0, "terminated\n")
    assert seconds < LIMIT


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills(first: signal.Signals, second: signal.Signals) -> None:
    program = """
try:
    say("ready")
    time.sleep(60)
except signals.Terminated:
    say("terminated")
    time.sleep(60)
"""
    with child(program) as process:
        process.send_signal(first)
        assert process.stdout
        assert process.stdout.readline() == "terminated\n"
        process.send_signal(second)
        status, output, seconds = finish(process)
    assert (status, output) == (-second, "")
    assert seconds < LIMIT


def test_an_end_that_takes_too_long_is_cut() -> None:
    program = """
try:
    say("ready")
    time.sleep(60)
finally:
    time.sleep(60)
"""
    with child(program) as process:
        process.send_signal(signal.SIGTERM)
        status, output, seconds = finish(process)
    assert (status, output) == (0, "last words\n")
    assert seconds < LIMIT + 2


def has_read_its_program(pid: int) -> bool:
    """Tell whether Python itself is up: from then on the signal is the program's."""
    with open(f"/proc/{pid}/status") as status:
        [caught] = [line for line in status if line.startswith("SigCgt:")]
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("delay", [0.03, 0.06, 0.09, 0.12, 0.15, 0.2, 0.25, 0.3])
def test_a_signal_while_it_starts(number: signal.Signals, delay: float) -> None:
    # Without an etcd it waits for the network config, so that it never ends by itself.
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "flanneld", "--etcd-endpoints=http://127.0.0.1:1"),
            "--subnet-file=/nonexistent/subnet.env",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("FLANNELD_", "NOTIFY_"))},
    )
    with process:
        try:
            time.sleep(delay)
            prepared = has_read_its_program(process.pid)
            process.send_signal(number)
            began = time.monotonic()
            _, errors = process.communicate(timeout=PATIENCE)
            seconds = time.monotonic() - began
        finally:
            process.kill()
    status = process.returncode
    if status == 1 and "Failed to find" in errors:
        return  # a host without any network; it had ended before
    if prepared and number == signal.SIGTERM:
        assert status == 0
    else:
        # Before that nobody can do anything about it (SIGINT: KeyboardInterrupt in Python's site,
        # which some of its steps make an exit with status 1).
        assert status in (0, -number) or (number == signal.SIGINT and not prepared)
    assert seconds < LIMIT + 2
