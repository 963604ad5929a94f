"""Keep the few inputs that reach all that many inputs reach: ``python -m fuzz.distill FOUND KEPT``.

FOUND/<target> is what `fuzz.explore` left; to KEPT/<target> go the smallest inputs that together
take every step from line to line of flanneld's code that short ones take. What was kept before
counts like the rest.
"""

import contextlib
import hashlib
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz.targets import TARGETS, Target

LONGEST, MOST_FILES, MOST_BYTES = 1500, 60, 24_000

Step = tuple[str, int, int]


def steps_of(target: Target, data: bytes) -> frozenset[Step]:
    """Return the steps (file, line before, line) inside flanneld of one run."""
    taken: set[Step] = set()

    def trace(frame: FrameType, _event: str, _argument: object) -> Any:
        name = frame.f_code.co_filename
        if "/flanneld/" not in name:
            return None
        before = 0

        def local(inner: FrameType, _event: str, _argument: object) -> Any:
            nonlocal before
            taken.add((name, before, inner.f_lineno))
            before = inner.f_lineno
            return local

        return local

    sys.settrace(trace)
    try:
        with contextlib.suppress(AssertionError):
            target(data)
    finally:
        sys.settrace(None)
    return frozenset(taken)


def distill(target: Target, inputs: set[bytes]) -> list[bytes]:
    """Choose the inputs to keep, each the one that adds most of those left."""
    left = {data: steps_of(target, data) for data in inputs if len(data) <= LONGEST}
    kept: list[bytes] = []
    reached: set[Step] = set()
    while left and len(kept) < MOST_FILES:
        best = max(left, key=lambda data: (len(left[data] - reached), -len(data)))
        if not left[best] - reached or sum(map(len, kept)) + len(best) > MOST_BYTES:
            break
        reached |= left.pop(best)
        kept.append(best)
    return kept


def main(found: Path, kept: Path) -> None:
    """Replace what is kept for each target, but not what has a name given by a person."""
    for name, target in TARGETS.items():
        directory = kept / name
        directory.mkdir(parents=True, exist_ok=True)
        paths = [*directory.iterdir(), *(found / name).iterdir()]
        chosen = distill(target, {path.read_bytes() for path in paths})
        for path in directory.glob("found-*"):
            path.unlink()
        for data in chosen:
            digest = hashlib.sha256(data).hexdigest()[:12]
            (directory / f"found-{digest}").write_bytes(data)
        print(f"{name}: {len(chosen)} of {len(paths)}, {sum(map(len, chosen))} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
