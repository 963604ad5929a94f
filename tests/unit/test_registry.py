"""Backends by name."""

import subprocess
import sys

import pytest

from flanneld.backend.hostgw import HostGW
from flanneld.backend.registry import BACKENDS, find_backend
from flanneld.errors import BackendError


@pytest.mark.parametrize("name", ["host-gw", "HOST-GW", "Host-Gw"])
def test_names_are_compared_without_case(name: str) -> None:
    assert find_backend(name) is HostGW


@pytest.mark.parametrize("name", ["", "hostgw", "host-gw ", "wireguard"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(BackendError) as caught:
        find_backend(name)
    text = str(caught.value)
    assert text.startswith(f"unknown backend type: {name} (this version has: host-gw")
    assert "correct Backend.Type in the network config" in text


def test_every_backend_can_be_loaded() -> None:
    for name in BACKENDS:
        assert callable(find_backend(name))
        assert name == name.lower()


def test_no_backend_is_loaded_unasked() -> None:
    code = (
        "import sys, flanneld.backend.registry; "
        "print([m for m in sys.modules if m in ('flanneld.backend.hostgw', 'pyroute2')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
