"""The results for people and programs: tables on the screen and in a file, JSON, a picture."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from bench import budgets, events, start, traffic
from bench.results import Results, Series
from lab.report import Report

_HEAD = ("", "backend", "of", "peers", "median", "min", "max", "n")


def write(
    results: Results, names: Sequence[str], machine: Mapping[str, str], directory: Path
) -> None:
    """Print the tables; put them, results.json and, with matplotlib, results.png there."""
    document = {
        "machine": dict(machine),
        "problems": results.problems,
        "results": [series.document() for series in results],
        "budgets": [verdict.document() for verdict in budgets.check(results)],
    }
    (directory / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    tables(results, machine, sys.stdout)
    with (directory / "results.txt").open("w") as file:
        tables(results, machine, file)
    try:
        from bench import plot
    except ModuleNotFoundError as error:
        print(f"\nNo picture: {error.name} is not installed (`make bench` installs it).")
    else:
        plot.draw(results, names, directory / "results.png")
    print(f"\nIn {directory}: {', '.join(sorted(path.name for path in directory.iterdir()))}")


def tables(results: Results, machine: Mapping[str, str], out: TextIO) -> None:
    """Write everything that was found as text."""
    report = Report(out)
    report.title("flanneld, measured")
    for name, value in machine.items():
        report.text(f"{name}: {value}")
    cold = (
        start.SUBNET_ENV,
        start.READY,
        start.READY_AGAIN,
        start.CPU_READY,
        start.NOTHING,
    )
    _section(report, results, "Cold start", cold)
    peers = (
        start.PROGRAMMED,
        start.PROGRAMMED_AFTER,
        start.CPU_PROGRAMMED,
        start.READY_PEERS,
        start.RESTART,
        start.MEMORY,
        start.IDLE_CPU,
    )
    _section(report, results, "With peers", peers)
    bursts = [
        name
        for count in events.BURSTS
        for name in (events.writing(count), events.drained(count), events.lost(count))
    ]
    live = (events.LATENCY, events.WRITE, *bursts, events.RESYNC)
    _section(report, results, "While it runs", live)
    _section(
        report, results, "Traffic", (traffic.TCP, traffic.PACKETS, traffic.ROUND_TRIP), ratio=True
    )
    verdicts = budgets.check(results)
    if verdicts:
        report.step("Budgets")
        rows = [(v.what, v.wanted, v.found, "met" if v.met else "NOT met") for v in verdicts]
        report.table(("budget", "wanted", "found", "verdict"), rows)
    for problem in results.problems:
        report.bad(problem.partition("\n")[0])


def _section(
    report: Report, results: Results, title: str, measures: Sequence[str], ratio: bool = False
) -> None:
    found = [s for name in measures for s in results if s.key.measure == name]
    if not found:
        return
    report.step(title)
    for measure in measures:
        series = [s for s in found if s.key.measure == measure]
        if not series:
            continue
        head = [f"{measure}, {series[0].unit}", *_HEAD[1:]]
        rows = [_row(s) for s in series]
        if measure == events.LATENCY:
            head.append("99 %")
            rows = [[*r, _number(s.percentile(99))] for r, s in zip(rows, series, strict=True)]
        if ratio:
            head.append("x limit")
            rows = [[*r, _ratio(results, s)] for r, s in zip(rows, series, strict=True)]
        report.table(head, rows)


def _row(series: Series) -> list[str]:
    key = series.key
    figures = (series.median, min(series.values), max(series.values))
    peers = str(key.peers) if key.peers else ""
    shown = (_number(figure) for figure in figures)
    return ["", key.backend, key.implementation, peers, *shown, str(len(series.values))]


def _ratio(results: Results, series: Series) -> str:
    """To the same devices made by hand (udp: the loop in C), of the same round."""
    found = traffic.ratio(
        results, series.key.measure, series.key.backend, series.key.implementation
    )
    return "" if found is None else f"{found:.2f}"


def _number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0:
        return "0"
    for limit, digits in ((0.1, 4), (1, 3), (10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"
