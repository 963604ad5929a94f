"""Backends by name."""

import subprocess
import sys

import pytest

from flanneld.backend.base import Constructor
from flanneld.backend.hostgw import HostGW
from flanneld.backend.registry import BACKENDS, find_backend
from flanneld.backend.udp.backend import Udp
from flanneld.backend.vxlan import Vxlan
from flanneld.errors import BackendError


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(("host-gw", HostGW), ("HOST-GW", HostGW), ("Host-Gw", HostGW)),
        *(("udp", Udp), ("UDP", Udp)),
        *(("vxlan", Vxlan), ("VXLAN", Vxlan), ("VxLan", Vxlan)),
    ],
)
def test_names_are_compared_without_case(name: str, backend: Constructor) -> None:
    assert find_backend(name) is backend


@pytest.mark.parametrize("name", ["", "hostgw", "host-gw ", "vxlan6", "wireguard"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(BackendError) as caught:
        find_backend(name)
    text = str(caught.value)
    assert text.startswith(f"unknown backend type: {name} (this version has: udp, vxlan, host-gw;")
    assert "correct Backend.Type in the network config" in text


def test_every_backend_can_be_loaded() -> None:
    for name in BACKENDS:
        assert callable(find_backend(name))
        assert name == name.lower()


def test_no_backend_is_loaded_unasked() -> None:
    code = (
        "import sys, flanneld.backend.registry; "
        "unasked = ('flanneld.backend.hostgw', 'flanneld.backend.vxlan', 'pyroute2', "
        "'flanneld.backend.udp.backend'); "
        "print([m for m in sys.modules if m in unasked])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
