"""Tests on the real kernel, with a real etcd and real processes. They need root.

Without root they are not collected, and the summary says so (tests/conftest.py).
"""

import pytest
from labs import ROOT, _machine, make_lab, pytest_runtest_makereport

__all__ = ["_machine", "make_lab", "pytest_runtest_makereport"]

if not ROOT:
    collect_ignore_glob = ["test_*.py"]

# An assertion in there shows its values, too.
pytest.register_assert_rewrite("network")
