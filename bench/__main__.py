"""The whole daemon, measured: ``python -m bench`` (root; under 10 minutes), or ``make bench``.

``--peer /path/to/flanneld`` runs another binary through the same measurements, side by side.
"""

import argparse
import compileall
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import flanneld
from bench import events, machine, report, start, traffic
from bench.scene import FULL, QUICK, Overlay, Scene, implementations
from lab import Lab, needs

SECTIONS = ("start", "events", "rest", "traffic")
SIZES = (100, 1_000, 5_000, 10_000)
# At which number of peers bursts come, and CPU at rest is measured.
USUAL = 1_000
# Seconds, and for each implementation measured: what a section may take, and the whole run.
_COLD, _WITH_PEERS, _TRAFFIC, _WHOLE = 60.0, 25.0, 120.0, 480.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write what was found. The exit status does not depend on the figures."""
    options = _parse(argv)
    wanted = needs.PACKAGES | ({"gcc": "gcc"} if "traffic" in options.only else {})
    problem = needs.missing(wanted)
    if problem:
        print(f"The benchmark cannot run: {problem}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    Lab.sweep_stale()
    # As pip does at an installation.
    compileall.compile_dir(Path(flanneld.__file__).parent, quiet=1)
    who = implementations(options.peer)
    about = machine.describe() | {"load average before": machine.load()}
    began = time.monotonic()
    with Lab(0) as lab:
        effort = QUICK if options.quick else FULL
        scene = Scene(lab, who, effort, began + _WHOLE * len(who))
        _measure(scene, options.only, options.peers)
    about["load average after"] = machine.load()
    about["duration"] = f"{time.monotonic() - began:.0f} s"
    names = [implementation.name for implementation in who]
    report.write(scene.results, names, about, options.output)
    return 0


def _measure(scene: Scene, sections: Sequence[str], sizes: Sequence[int]) -> None:
    many = len(scene.implementations)
    if "start" in sections:
        start.cold(scene, _COLD * many)
    if "rest" in sections:
        start.at_rest(scene, USUAL)
    if "traffic" in sections:
        traffic.measure(scene, _TRAFFIC * many)
    if not {"start", "events"} & set(sections):
        return
    for backend in start.BACKENDS:
        overlay = Overlay(scene, f"peers-{backend}", backend)
        for size in sorted(sizes):
            overlay.grow(size)
            if "start" in sections:
                start.with_peers(scene, overlay, _WITH_PEERS * many)
            if "events" in sections:
                events.measure(scene, overlay, bursts=size == USUAL)
        overlay.close()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--peer", type=_program, action="append", default=[], help="another flanneld (repeatable)"
    )
    parser.add_argument("--quick", action="store_true", help="once each: does it work at all?")
    parser.add_argument(
        "--only", type=_sections, default=SECTIONS, help=f"some of {','.join(SECTIONS)}"
    )
    parser.add_argument(
        "--peers", type=_sizes, default=SIZES, help="numbers of peers (100,1000,5000,10000)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench"), help="directory (build/bench)"
    )
    return parser.parse_args(argv)


def _program(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


def _sections(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name}: not one of {','.join(SECTIONS)}")
    return names


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if not all(0 < size <= max(SIZES) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text}: from 1 to {max(SIZES)} peers")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
