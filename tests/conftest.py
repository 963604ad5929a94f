"""What holds for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# On a busy machine a step of a property may take its time: no test asserts one. What decides about
# a change (CI is set) sees the same examples each time; elsewhere each run searches on.
settings.register_profile("flannel", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("flannel")

HERE = Path(__file__).parent

# Here, since with several processes (pytest -n) the one that writes the summary collects nothing.
NEED_ROOT = {"netns": "the tests on the real kernel", "docker": "the tests with docker"}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if os.geteuid() == 0:
        return
    wanted = [(config.invocation_params.dir / arg.partition("::")[0]) for arg in config.args]
    for name, what in NEED_ROOT.items():
        directory = HERE / name
        if any(directory.is_relative_to(path) or path.is_relative_to(directory) for path in wanted):
            terminalreporter.write_line(f"not root: {what} did not run")
