"""Starting the tunnel's process where that fails."""

import os
import socket
import sys
from pathlib import Path

import pytest

from flanneld.backend.udp.descriptors import Descriptors
from flanneld.backend.udp.process import TunnelError, TunnelProcess
from flanneld.backend.udp.tun import ALL, Tun


def test_a_start_that_fails_leaves_no_descriptor_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # It is tried again every second, for as long as it takes.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    device = Tun(os.open("/dev/null", os.O_RDWR), "flannel0", 1, ALL)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    descriptors = Descriptors(device, udp, None, ALL)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(TunnelError, match="No such file"):
            TunnelProcess(descriptors, port=8285, mtu=1472)
    assert os.listdir("/proc/self/fd") == before
    descriptors.close()
