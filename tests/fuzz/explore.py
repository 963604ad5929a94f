"""Coverage-guided search for inputs that break a promise: ``make fuzz``.

    python -m fuzz.explore SECONDS CORPUS NEW

The targets run one after the other, each in a process of its own with its part of the time. What is
in CORPUS/<target> is where each begins; what it finds goes to NEW/<target>, and an input that
breaks a promise to NEW/<target>-crash-*. Exit status 1 if there is one.
"""

import subprocess
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run every target for its part of the time."""
    from fuzz.seeds import SEEDS
    from fuzz.targets import TARGETS

    seconds, corpus, new = int(arguments[0]), Path(arguments[1]), Path(arguments[2])
    failed = []
    for name in TARGETS:
        found = new / name
        found.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(SEEDS[name]):
            (found / f"seed-{number}").write_bytes(seed)
        known = [str(corpus / name)] if (corpus / name).is_dir() else []
        done = subprocess.run(
            [
                *(sys.executable, "-m", "fuzz.explore", name),
                *(str(found), *known),
                f"-max_total_time={max(1, seconds // len(TARGETS))}",
                *("-max_len=4096", "-timeout=20", "-rss_limit_mb=1024", "-verbosity=0"),
                *("-print_final_stats=1", f"-artifact_prefix={new / name}-"),
            ],
            check=False,
        )
        if done.returncode:
            failed.append(name)
    print(f"broken: {', '.join(failed)}" if failed else "no promise was broken", flush=True)
    return 1 if failed else 0


def explore(name: str, options: list[str]) -> None:
    """Run one target in this process, until its time is over or a promise is broken."""
    import atheris

    # Only what is imported in here is watched.
    with atheris.instrument_imports(include=["flanneld"]):
        from fuzz.targets import TARGETS
    atheris.Setup([name, *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        sys.exit(main(sys.argv[1:]))
    explore(sys.argv[1], sys.argv[2:])
