"""systemd/flanneld.env against the table of flags."""

import re
from pathlib import Path

from flanneld import flags
from flanneld.flags import FLAGS, Options

TEXT = (Path(__file__).resolve().parents[2] / "systemd" / "flanneld.env").read_text()
LINES = re.findall(r"^#(FLANNEL\w*)=(.*)$", TEXT, re.MULTILINE)


def test_the_example_has_every_variable_once() -> None:
    # A command, such as --version, in the environment has no effect.
    wanted = [flag.variable for flag in FLAGS if flag.name not in flags.COMMANDS]
    assert sorted(name for name, _ in LINES) == sorted([*wanted, "FLANNEL_OPTIONS"])


def test_the_example_shows_the_defaults() -> None:
    shown = {name: value for name, value in LINES if name != "FLANNEL_OPTIONS"}
    parsed = flags.parse([], shown)
    assert parsed.options == Options()
    assert parsed.warnings == ()
    # What is not empty by default is not shown as empty.
    for flag in FLAGS:
        if flag.kind in (flags.STRING, flags.INT, flags.BOOL) and flag.variable in shown:
            assert bool(shown[flag.variable]) == (flag.default != ""), flag.variable


def test_the_example_changes_nothing_as_it_is() -> None:
    assert all(line == "" or line.startswith("#") for line in TEXT.splitlines())
