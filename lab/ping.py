"""Pings, counted packet by packet."""

import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from lab.process import LabError, end
from lab.wait import eventually

# Of iputils. "From ADDRESS icmp_seq=1 Destination Host Unreachable" must not match.
_REPLY = re.compile(r"^\d+ bytes from .*icmp_seq=(\d+) ", re.MULTILINE)
_SENT = re.compile(r"^(\d+) packets transmitted, ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PingResult:
    """What came of a series of echo requests. ``missing`` holds the numbers (from 1) unanswered."""

    sent: int
    received: int
    missing: tuple[int, ...]
    output: str

    @property
    def lost(self) -> int:
        return self.sent - self.received


def endless_command(address: IPv4Address | str, interval: float) -> list[str]:
    """An endless ping; intervals below 0.002 s are refused by ping."""
    return ["ping", "-n", "-i", f"{interval:g}", str(address)]


def parse(output: str, *, stopped: bool = False) -> PingResult:
    """Read ping's output. Raises LabError when the summary is missing.

    ``stopped``: the ping was interrupted, so the answer to its last packet may have been on its
    way; if unanswered that one packet is not counted.
    """
    total = _SENT.search(output)
    if total is None:
        raise LabError(f"ping gave no summary: {output.strip() or '(no output)'}")
    sent = int(total[1])
    answered = {int(number) for number in _REPLY.findall(output)}
    if stopped and sent > 1 and sent not in answered:
        sent -= 1
    missing = tuple(number for number in range(1, sent + 1) if number not in answered)
    return PingResult(sent, sent - len(missing), missing, output)


class BackgroundPing:
    """A ping that runs until ``stop()``."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self._process = process
        self._output = output

    def received(self) -> int:
        """Answers so far."""
        return len(set(_REPLY.findall(self._output.read_text())))

    def wait_received(self, count: int, timeout: float = 5.0) -> None:
        """Wait for ``count`` more answers. Raises NotInTime."""
        wanted = self.received() + count
        eventually(
            lambda: self.received() >= wanted, timeout, f"{count} more answers to a running ping"
        )

    def stop(self) -> PingResult:
        """Interrupt the ping and count. Raises LabError when it gives no summary."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(3.0)
        except subprocess.TimeoutExpired:
            end([self._process], grace=0.0)
        return parse(self._output.read_text(), stopped=True)


def count_command(
    address: IPv4Address | str, count: int, interval: float, deadline: float
) -> Sequence[str]:
    """A ping of ``count`` packets that waits ``deadline`` seconds for the last answers.

    Not ping's own -w: with it ping sends further packets in place of lost ones.
    """
    return [*endless_command(address, interval), "-c", str(count), "-W", f"{deadline:g}"]
