"""What a soak has seen, as docs/soak.md."""

import statistics
from collections.abc import Iterable, Sequence

from .faults import FAULTS, MARGIN
from .pinger import INTERVAL
from .record import Event, Process, Record
from .run import DESCRIPTORS, LIFE, PERIOD, RSS_KB, THREADS, calm_now
from .world import RENEWAL_MINUTES, STEADY

_HEAD = """\
# Soak

`make soak` (root, {minutes:g} minutes; `MINUTES=`, `SEED=` and `BACKEND=` choose others) has five
hosts on an etcd cluster of three run with one fault every {period:g} seconds. Each kind of fault
comes once, in an order by chance, then all come again in another. The containers of all hosts ping
each other all the time, each pair every {interval:g} ms. After each fault it is waited until

- etcd has exactly the hosts' leases,
- each host's kernel has exactly the entries that follow from them, its device is as it was, and
  its masquerade and forward rules are in place (odd hosts have the legacy iptables, even ones
  that of nftables),
- pings are answered on all paths.

A lost packet counts as wrong unless [operations.md](operations.md) lets that fault lose packets on
that path and at that time: while it lasts, and for as long after as its row says (and {margin:g} s
more, as all of this shares one small machine). At the end memory, descriptors and threads of each
daemon must be as at its start; faults that end daemons spare the first {steady} hosts, so that
these show the whole time.

Leases are renewed every {renewal} minutes here (`--subnet-lease-renew-margin`), so that renewals
meet the failures, too.

Libraries put before the C library of each daemon let its host's wall clock jump, and its kernel
refuse what it is asked for; but for that they do nothing.

Not all of operations.md happens here. Left out are

- what ends a start, or has it wait, as each has its own test and no peer notices: wrong flags and
  config, no free subnet, a subnet file that cannot be written, `READY=1`;
- that the kernel's events are lost: that takes tens of thousands of routes, and the memory to
  compare them would hide a leak;
- what needs another network: two hosts with one public IP, a peer out of reach or with a new public
  IP or MAC, a foreign route in a peer's place, a device whose VNI or port is taken, `SubnetLen`
  changed, docker, systemd and its watchdog, TLS and logins, no iptables or its lock held for long,
  strangers at the udp port;
- with udp also the kernel's refusals: they show only when its device goes, too, and then no packet
  gets through;
- suspend and resume of the host: what is frozen here is the daemon.

[failures.md](failures.md) names the tests for these.

The same seed gives the same faults in the same order. What else happens is up to the machine, so
two runs are not the same packet by packet.

This page and its picture are what the last run wrote; `.soak/` has more after each: `soak.json`,
and the logs of all daemons and etcds. `make test` runs a short form (`tests/chaos/test_soak.py`).

"""


def report(record: Record, others: Sequence[Record] = (), note: str = "") -> str:
    """Return the whole page, about one soak and, in short, about others; and what is to be noted
    about the runs."""
    head = _HEAD.format(
        minutes=record.minutes,
        period=PERIOD,
        interval=INTERVAL * 1000,
        margin=MARGIN,
        steady=STEADY,
        renewal=RENEWAL_MINUTES,
    )
    parts = [head, _result(record), _faults(record), _memory(record)]
    if others:
        parts.append(_others(others))
    if note:
        parts.append(f"### To be noted\n\n{note.strip()}\n")
    return "\n".join(parts)


def _command(record: Record) -> str:
    return f"`make soak SEED={record.seed} MINUTES={record.minutes:g} BACKEND={record.backend}`"


def _times(events: Iterable[Event]) -> list[float]:
    return [event.converged - event.undone for event in events if event.converged is not None]


def _result(record: Record) -> str:
    events = record.events
    allowed = sum(event.lost for event in events)
    wrong = sum(event.lost_wrongly for event in events)
    times = _times(events)
    lines = [
        "## The last run",
        "",
        "![Timeline of the soak](soak.png)",
        "",
        f"{_command(record)}, begun on {record.began} UTC, flanneld {record.version}.",
        "",
        *_table(
            ["", ""],
            [
                ["seconds", f"{record.seconds:.0f}"],
                ["faults", f"{len(events)} of {len({event.name for event in events})} kinds"],
                ["hosts that took part", f"{len(record.hosts)}"],
                ["pings sent", f"{record.sent}"],
                ["lost where that is allowed", f"{allowed}"],
                ["**lost where it is not**", f"**{wrong}**"],
                ["converged", f"after {len(times)} of {len(events)} faults"],
                ["time to converge", f"median {_median(times)} s, max {_max(times)} s"],
            ],
        ),
        "",
    ]
    if record.failures:
        lines += ["**Not as promised:**", "", *(f"- {each}" for each in record.failures), ""]
    else:
        lines += ["Everything was as promised.", ""]
    return "\n".join(lines)


def _faults(record: Record) -> str:
    rows = []
    for fault in FAULTS:
        events = [event for event in record.events if event.name == fault.name]
        if not events:
            continue
        times = _times(events)
        losing = record.backend in fault.losing
        until = f"{fault.after:g} s" if losing else "none"
        after = f"{max(event.lost_for for event in events):.1f} s" if losing else ""
        rows.append(
            [
                fault.name,
                str(len(events)),
                _median(times),
                _max(times),
                until,
                str(sum(event.lost for event in events)) if losing else "",
                after,
                str(sum(event.lost_wrongly for event in events)),
            ]
        )
    head = [
        *("fault", "times", "converged, median s", "max s"),
        *("packets may be lost until", "lost", "the last after", "lost wrongly"),
    ]
    return "\n".join(
        [
            "### Faults",
            "",
            "Convergence is counted from the moment the fault was undone (the member is back, the"
            " daemon ready), or was there if nobody undoes it. So are the times until which packets"
            " may be, and were, lost. To look whether all is converged takes some 0.3 s itself."
            " Two waits are not counted: when a host is replaced, or its subnet handed over, until"
            " all know the new one (its own pings pause meanwhile); and when the kernel refused,"
            " until it has taken what it had refused (up to 10 s, with the pauses between the"
            " attempts).",
            "",
            *_table(head, rows),
            "",
        ]
    )


def _memory(record: Record) -> str:
    last = record.seconds
    shown = [p for p in record.processes if p.steady or p.at[-1] - p.at[0] >= LIFE]
    rows = [
        [
            process.name,
            f"{(process.at[-1] - process.at[0]) / 60:.0f} min",
            _growth(process, process.rss_kb, last),
            _growth(process, process.descriptors, last),
            _growth(process, process.threads, last),
        ]
        for process in sorted(shown, key=lambda p: (not p.steady, p.name, p.at[0]))
    ]
    return "\n".join(
        [
            "### Memory, descriptors, threads",
            "",
            "Each: first sample → at its end (most in between). A failure is more than"
            f" {RSS_KB} KiB, {DESCRIPTORS} descriptors or {THREADS} thread above the first sample."
            f" Daemons that lived for less than {LIFE / 60:g} minutes are left out.",
            "",
            "Descriptors may grow by two: another connection to the same etcd member, for a write"
            " while both polls run, and a socket of the kernel's. Both are kept once they were"
            " needed.",
            "",
            *_table(["", "lived", "RSS, KiB", "descriptors", "threads"], rows),
            "",
        ]
    )


def _others(records: Sequence[Record]) -> str:
    rows = [
        [
            _command(record),
            str(len(record.events)),
            str(record.sent),
            str(sum(event.lost for event in record.events)),
            str(sum(event.lost_wrongly for event in record.events)),
            f"{_median(_times(record.events))}, {_max(_times(record.events))}",
            "; ".join(record.failures) or "none",
        ]
        for record in records
    ]
    head = [
        *("", "faults", "pings", "lost, allowed", "lost wrongly"),
        *("converged, median and max s", "failures"),
    ]
    return "\n".join(["### The other backends, in short", "", *_table(head, rows), ""])


def _growth(process: Process, values: Sequence[int], end: float) -> str:
    living = process.at[-1] > end - PERIOD
    return f"{values[0]} → {calm_now(values, living)} ({max(values)})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _median(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.1f}" if times else "-"


def _max(times: Sequence[float]) -> str:
    return f"{max(times):.1f}" if times else "-"
