"""The benchmark itself works: what it writes is complete. Its figures are not looked at."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.start import children_seconds

TOP = Path(__file__).resolve().parents[2]


def bench(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it with as little effort as it knows."""
    argv = [sys.executable, "-m", "bench", "--quick", f"--output={output}", *arguments]
    return subprocess.run(
        argv,
        cwd=TOP,
        env={**os.environ, "PYTHONPATH": str(TOP)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def series(document: dict[str, Any], *fields: str) -> set[Sequence[Any]]:
    """Return these fields of all series."""
    return {tuple(one[field] for field in fields) for one in document["results"]}


def test_a_run_measures_each_binary_and_says_which_one_does_nothing(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -m flanneld "$@"\n')
    other.chmod(0o755)
    output = tmp_path / "results"
    peers = (f"--peer={other}", "--peer=/bin/false")
    done = bench(output, "--only=start", "--peers=30", *peers)
    assert done.returncode == 0, done.stderr
    document = json.loads((output / "results.json").read_text())
    measures = {
        "exec to subnet.env, first start",
        "exec to READY=1, as left",
        "exec to the last peer's entry",
        "restart to READY=1",
        "resident memory",
    }
    who = {("host-gw", "flanneld"), ("host-gw", "other"), ("vxlan", "flanneld"), ("vxlan", "other")}
    found = series(document, "measure", "backend", "implementation")
    assert {(measure, *way) for measure in measures for way in who} <= found
    assert not [each for each in found if each[2] == "false"]
    assert all(one["values"] and one["min"] > 0 for one in document["results"])
    assert document["problems"]
    assert all(problem.startswith("false, ") for problem in document["problems"])
    assert (output / "results.txt").read_text() in done.stdout


def test_events_and_resyncs_are_seen_in_the_kernel(tmp_path: Path) -> None:
    done = bench(tmp_path, "--only=events", "--peers=30")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["problems"] == []
    wanted = {"write of a lease to the entry", "write of a lease alone", "resync"}
    found = series(document, "measure", "backend", "peers")
    assert found == {(measure, way, 30) for measure in wanted for way in ("host-gw", "vxlan")}


def test_what_children_took_is_counted_once_they_have_ended() -> None:
    while not sum(os.times()[2:4]):
        subprocess.run([sys.executable, "-c", "pass"], check=True)
    # Sums of hundredths of a second, not added up in the same order.
    assert children_seconds(os.getpid()) == pytest.approx(sum(os.times()[2:4]))
