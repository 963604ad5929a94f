"""What makes a daemon's wall clock jump and its kernel say no: libraries before the C library.

`refuse.c` is that of the tests. libfaketime, which the tests have for the clock, is not for a soak:
under it no command can be waited for with a time limit, and iptables is one.
"""

import os
import struct
from pathlib import Path

from lab import Host, Lab
from lab.process import run

DAY = 86400
_HERE = Path(__file__).parent
_SOURCES = (_HERE / "clock.c", _HERE.parent / "netns" / "refuse.c")


class Levers:
    """One file for each lever and host. Raises LabError when the compiler does not take them."""

    def __init__(self, lab: Lab) -> None:
        self._directory = lab.directory
        self._libraries = [lab.directory / f"{source.stem}.so" for source in _SOURCES]
        for source, built in zip(_SOURCES, self._libraries, strict=True):
            run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", str(built), str(source), "-ldl"])

    def environ(self, host: Host) -> dict[str, str]:
        """Return the variables with which the daemon of this host obeys."""
        clock, refusal = self._clock(host), self._refusal(host)
        if not clock.exists():
            self.set_clock(host, 0)
            self.refuse(host, "")
        return {
            "LD_PRELOAD": ":".join(map(str, self._libraries)),
            "FLANNEL_CLOCK": str(clock),
            "FLANNEL_REFUSE": str(refusal),
        }

    def clock(self, host: Host) -> int:
        """Return by how many days a host's wall clock is ahead."""
        (seconds,) = struct.unpack("=q", self._clock(host).read_bytes())
        return int(seconds) // DAY

    def set_clock(self, host: Host, days: int) -> None:
        """Have a host's wall clock be so many days ahead from now on."""
        # In place: the daemon has mapped it.
        file = os.open(self._clock(host), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, struct.pack("=q", days * DAY), 0)
        finally:
            os.close(file)

    def refuse(self, host: Host, order: str) -> None:
        """Have a host's kernel refuse what its daemon asks for: see refuse.c. Empty: nothing."""
        self._refusal(host).write_text(order)

    def _clock(self, host: Host) -> Path:
        return self._directory / f"{host.label}-clock"

    def _refusal(self, host: Host) -> Path:
        return self._directory / f"{host.label}-refuse"
