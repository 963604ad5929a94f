"""``make soak``: a soak by hand; what it has seen is written to a directory.

    python -m soak [--minutes 30] [--seed N] [--backend vxlan] [--out .soak] [--only FAULT ...]

soak.json has everything, soak.md the figures, soak.png the timeline (if matplotlib is there), and
logs/ what the daemons and etcds wrote. Exit status 1 if anything was not as promised.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from lab import Lab, needs

from .faults import ALL, named
from .record import Record
from .report import report
from .run import soak


def main(argv: Sequence[str] | None = None) -> int:
    """Run one. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="default: by chance")
    parser.add_argument("--backend", choices=ALL, default="vxlan")
    parser.add_argument("--out", type=Path, default=Path(".soak"))
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="these, in this order")
    parser.add_argument("--draw", type=Path, help="only write what soak.json has seen once more")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="soak.json of other runs")
    parser.add_argument("--note", type=Path, help="a file with what is to be noted about the run")
    options = parser.parse_args(argv)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.draw is not None:
        record = Record.read(options.draw)
    else:
        problem = needs.missing(needs.PACKAGES | needs.FIREWALL_PACKAGES)
        if problem:
            print(f"cannot soak: {problem}", file=sys.stderr)
            return 1
        Lab.sweep_stale()
        seed = random.randrange(1 << 31) if options.seed is None else options.seed
        record = soak(
            seed,
            options.minutes,
            options.backend,
            only=named(options.only) if options.only else None,
            logs=out / "logs",
        )
        record.write(out / "soak.json")
    (out / "soak.md").write_text(
        report(
            record,
            [Record.read(path) for path in options.also],
            options.note.read_text() if options.note else "",
        )
    )
    try:
        from .picture import draw
    except ModuleNotFoundError as error:
        print(f"no picture: {error}")
    else:
        draw(record, out / "soak.png")
    print(f"{'FAILED' if record.failures else 'all as promised'}; see {out}/soak.md")
    return 1 if record.failures else 0


if __name__ == "__main__":
    sys.exit(main())
