"""Failures, on purpose and for real: what flanneld promises in docs/operations.md. They need root.

FLANNEL_CHAOS=1 (`make chaos`) makes the networks larger and the failures longer.
"""

import pytest
from labs import ROOT, _machine, make_lab, pytest_runtest_makereport

__all__ = ["_machine", "make_lab", "pytest_runtest_makereport"]

if not ROOT:
    collect_ignore_glob = ["test_*.py"]

pytest.register_assert_rewrite("network", "overlay", "chaos.fleet")
