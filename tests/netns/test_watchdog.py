"""The watchdog of a real daemon: fed while its loops come round, whatever etcd does."""

import sys

import pytest
from network import PATIENCE, MakeLab, etcd_of, put_config

from lab import Flanneld, Lab, eventually

# flanneld that grants its loops one second beside their announced waits, so that a loop which
# does not announce enough is found out here, and that looks often whether etcd is still there.
# With {fault} something in it gets stuck.
IMPATIENT = """
import threading
from flanneld import heartbeat
from flanneld.subnet import local_manager
heartbeat.SLACK = 1.0
local_manager.POLL = local_manager.OWN_POLL = 2.0
{fault}
from flanneld.__main__ import console
console()
"""

STUCK_BACKEND = """
from flanneld.kernel import reconcile
reconcile.Reconciler.handle = lambda self: threading.Event().wait()
"""


def start(lab: Lab, fault: str = "") -> Flanneld:
    put_config(lab)
    program = (sys.executable, "-c", IMPATIENT.format(fault=fault))
    daemon = Flanneld(lab.hosts[0], program=program).start()
    daemon.wait_ready(2 * PATIENCE)
    return daemon


def beats(daemon: Flanneld) -> int:
    return sum(notification.text == "WATCHDOG=1" for notification in daemon.notifications)


def wait_beats(daemon: Flanneld, more: int) -> None:
    wanted = beats(daemon) + more
    eventually(lambda: beats(daemon) >= wanted, PATIENCE, f"{more} more beats")


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)


def test_the_watchdog_is_fed_while_etcd_is_frozen(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    daemon = start(lab)
    wait_beats(daemon, 5)
    etcd_of(lab).freeze()
    # Both watches have given etcd up, and try again.
    daemon.wait_log("Watch subnets: .*i/o timeout", 2 * PATIENCE)
    daemon.wait_log("Watch subnets: .*i/o timeout", 2 * PATIENCE)
    wait_beats(daemon, 15)
    etcd_of(lab).thaw()
    daemon.wait_log("Watch subnets is back", 2 * PATIENCE)
    wait_beats(daemon, 5)
    assert "Stuck" not in daemon.log()
    assert daemon.terminate() == 0


def test_a_stuck_backend_starves_the_watchdog(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    daemon = start(lab, STUCK_BACKEND)
    wait_beats(daemon, 2)
    lab.hosts[0].ip("route add blackhole 198.51.100.1")
    daemon.wait_log("Stuck: backend", 2 * PATIENCE)
    before = beats(daemon)
    daemon.terminate()
    assert beats(daemon) == before


def test_unwatched_there_is_no_beat(make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_PID", "1")
    lab = make_lab(1)
    daemon = start(lab)
    assert daemon.terminate() == 0
    assert [n.text for n in daemon.notifications if "WATCHDOG" in n.text] == []
