"""What a change to a device takes is imported beforehand, and a package in pieces ends nobody."""

import sys

import pytest

from flanneld.kernel.device import prepare_changes


def test_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flanneld.kernel.iproute", raising=False)
    prepare_changes()
    assert "flanneld.kernel.iproute" in sys.modules


def test_a_package_that_is_being_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The backend, whose thread this is, has other things to do: traffic goes on."""
    monkeypatch.setitem(sys.modules, "flanneld.kernel.iproute", None)
    prepare_changes()
    (record,) = caplog.records
    assert "cannot import pyroute2" in record.getMessage()
