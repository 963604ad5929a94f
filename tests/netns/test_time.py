"""Renewal goes by etcd's answers and a steady clock: the wall clock jumps, the host is suspended.

A lease lives for a day, and is renewed `MARGIN` before its end: a minute after it was written, with
the longest margin there is. An operator who shortens it brings that moment near.
"""

import re
import sys
import time
from pathlib import Path

import pytest
from network import (
    LEASE_SECONDS,
    PATIENCE,
    MakeLab,
    Pings,
    RouteMonitor,
    client_of,
    count,
    key_of,
    leases,
    put_config,
    start,
    value_of,
    wait_lease,
    wait_meshed,
)

from lab import Flanneld, Host, Lab, eventually
from lab.etcdv2 import Node
from lab.process import freeze, thaw
from lab.wait import NotInTime

MARGIN_FLAG = "--subnet-lease-renew-margin=1439"
MARGIN = 1439 * 60


class WallClock:
    """The wall clock of one host, and the daemon that goes by it; its other clocks are real."""

    def __init__(self, host: Host) -> None:
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not found:
            pytest.fail("not installed: libfaketime. On Debian: apt-get install faketime")
        self._file = host.directory / "wall-clock"
        self.jump("+0")
        program = (
            "env",
            f"LD_PRELOAD={found[0]}",
            f"FAKETIME_TIMESTAMP_FILE={self._file}",
            "FAKETIME_NO_CACHE=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            sys.executable,
            "-m",
            "flanneld",
        )
        rules = "--iptables-forward-rules=false"
        self.daemon = Flanneld(host, MARGIN_FLAG, rules, program=program).start()

    def jump(self, offset: str) -> None:
        """Be this far off from now on: ``+1d``, ``-1d``."""
        new = self._file.with_suffix(".new")
        new.write_text(offset)
        new.replace(self._file)


def due_in(lab: Lab, daemon: Flanneld, seconds: int) -> Node:
    """Shorten the daemon's lease so that it is to be renewed then; return it as it is now."""
    before = count(daemon, "Waiting for")
    with client_of(lab) as client:
        node = client.put(
            key_of(daemon.subnet()), value_of(daemon.host.address), ttl=MARGIN + seconds
        )
    eventually(lambda: count(daemon, "Waiting for") > before, PATIENCE, "the new end to be known")
    return node


def wait_renewed(lab: Lab, daemon: Flanneld, since: Node, said: int) -> None:
    """Wait until the lease was written again, by a swap, with a full lifetime, and that was said.

    ``said`` is how many renewals were said before.
    """
    node = wait_lease(lab, daemon.subnet(), lambda n: n.modified_index > since.modified_index)
    assert node.ttl is not None
    assert LEASE_SECONDS - PATIENCE < node.ttl <= LEASE_SECONDS
    assert node.created_index == since.created_index
    assert node.value == value_of(daemon.host.address)
    # Said after etcd's answer, and so maybe after we saw it there.
    eventually(lambda: count(daemon, "Lease renewed") > said, PATIENCE, "the renewal to be said")


def test_a_wall_clock_that_jumps_a_day_changes_nothing(make_lab: MakeLab) -> None:
    """Ahead it brings no renewal before its time, back it delays none; and nothing else happens."""
    lab = make_lab(2)
    put_config(lab)
    clocks = [WallClock(host) for host in lab.hosts]
    daemons = [clock.daemon for clock in clocks]
    for daemon in daemons:
        daemon.wait_ready(2 * PATIENCE)
    wait_meshed(daemons)
    monitors = [RouteMonitor(host) for host in lab.hosts]
    with Pings(lab.hosts) as pings:
        for said, offsets in enumerate((("+1d", "-1d"), ("-1d", "+1d"))):
            before = [due_in(lab, daemon, 9) for daemon in daemons]
            for clock, offset in zip(clocks, offsets, strict=True):
                clock.jump(offset)
            time.sleep(1.0)
            for daemon, node in zip(daemons, before, strict=True):
                assert leases(lab)[str(daemon.subnet())].modified_index == node.modified_index
            for daemon, node in zip(daemons, before, strict=True):
                wait_renewed(lab, daemon, node, said)
            pings.go_on(5)
    wait_meshed(daemons)
    for daemon, monitor in zip(daemons, monitors, strict=True):
        assert daemon.is_running
        assert monitor.deleted() == []
        # What was done by hand is all that is worth a word; its clock did jump.
        warnings = re.findall(r"^[WE].*", daemon.log(), re.M)
        # Under libfaketime no command can be waited for with a time limit.
        warnings = [line for line in warnings if "cannot be run: Invalid argument" not in line]
        assert len([line for line in warnings if "was rewritten by somebody else" in line]) == 2
        assert len(warnings) == 2
        assert len(set(re.findall(r"^I(\d{4}) .*Lease renewed", daemon.log(), re.M))) == 2


def test_a_lease_whose_renewal_was_slept_through_is_renewed_on_waking(make_lab: MakeLab) -> None:
    """It has not ended meanwhile; for one that has see test_leases."""
    lab = make_lab(2)
    put_config(lab)
    daemons = start(*lab.hosts, extra=(MARGIN_FLAG,))
    wait_meshed(daemons)
    sleeper = daemons[0]
    node = due_in(lab, sleeper, 4)
    with Pings(lab.hosts) as pings:
        freeze(sleeper.pid)
        with pytest.raises(NotInTime):
            eventually(
                lambda: leases(lab)[str(sleeper.subnet())].modified_index > node.modified_index,
                6.0,
                "a renewal, which must not come",
            )
        thaw(sleeper.pid)
        wait_renewed(lab, sleeper, node, 0)
        pings.go_on(5)
    assert count(sleeper, "Lease renewed") == 1
    assert count(sleeper, "is gone from the store") == 0
    wait_meshed(daemons)
