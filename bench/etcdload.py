"""What an etcd spends: processor time, log writes, descriptors; from /proc and its /metrics."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from lab.etcd import Etcd

_TICKS = os.sysconf("SC_CLK_TCK")
# Seconds; it may be busy.
_ANSWER = 120.0
_METRICS = {
    "written": "etcd_disk_wal_write_bytes_total",
    "syncs": "etcd_disk_wal_fsync_duration_seconds_count",
    "proposals": "etcd_server_proposals_applied_total",
}


@dataclass(frozen=True, slots=True)
class Spent:
    """What the members have spent, added up; the difference of two is what was spent between."""

    cpu: float
    """Seconds, of user and system together."""
    written: float
    """Bytes of the log."""
    syncs: float
    """Of the log to the disk."""
    proposals: float
    """Entries of the log: writes, and linearizable reads too."""

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Spent)))


NOTHING = Spent(0.0, 0.0, 0.0, 0.0)


def spent(members: Sequence[Etcd]) -> Spent:
    """What these have spent since their start."""
    metrics = [_metrics(member) for member in members]
    return Spent(
        sum(_cpu(member.pid) for member in members),
        sum(m["written"] for m in metrics),
        sum(m["syncs"] for m in metrics),
        sum(m["proposals"] for m in metrics),
    )


def descriptors(etcd: Etcd) -> int:
    """How many files and connections it has open."""
    return len(os.listdir(f"/proc/{etcd.pid}/fd"))


def memory(etcd: Etcd) -> float:
    """Its resident memory in MB."""
    status = Path(f"/proc/{etcd.pid}/status").read_text()
    return _number(r"^VmRSS:\s*(\d+)", status) / 1024


def _cpu(pid: int) -> float:
    # After the command's name in parentheses; utime and stime are fields 14 and 15 of all.
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / _TICKS


def _metrics(etcd: Etcd) -> dict[str, float]:
    with etcd.client(timeout=_ANSWER) as client:
        text = client.request("GET", "/metrics")[2].decode()
    return {name: _number(rf"^{metric} ([0-9.e+]+)$", text) for name, metric in _METRICS.items()}


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    return float(found[1]) if found else 0.0
