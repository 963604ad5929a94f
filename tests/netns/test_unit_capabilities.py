"""The rights that systemd/flanneld.service leaves to the daemon are enough."""

import re
from pathlib import Path

import pytest
from network import PATIENCE, MakeLab, put_config
from overlay import problems, start_containers
from test_udp_network import tunnel_of, wait_connected

from lab import Flanneld, eventually
from lab.daemon import FLANNELD
from lab.process import freeze, is_running

UNIT = Path(__file__).parents[2] / "systemd" / "flanneld.service"


def confined() -> list[str]:
    """Return the command line of a daemon with the unit's capabilities and no others."""
    lines = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    names = [name.removeprefix("CAP_").lower() for line in lines for name in line.split()]
    bounding = ",".join(["-all", *(f"+{name}" for name in names)])
    program = ["setpriv", "--no-new-privs", f"--bounding-set={bounding}", "--inh-caps=-all"]
    return [*program, *FLANNELD]


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_every_backend_and_the_rules_work(make_lab: MakeLab, backend: str) -> None:
    lab = make_lab(2)
    put_config(lab, Backend={"Type": backend})
    daemons = [Flanneld(host, "--ip-masq", program=confined()).start() for host in lab.hosts]
    for daemon in daemons:
        daemon.wait_ready()
    start_containers(lab.hosts)
    wait_connected(lab)
    for daemon in daemons:
        rules = daemon.host.run(["iptables", "-t", "nat", "-S", "FLANNEL-POSTRTG"]).stdout
        assert rules.count("MASQUERADE") == 2
        assert problems(daemon) == []


def test_a_stuck_udp_tunnel_is_ended_and_a_low_port_bound(make_lab: MakeLab) -> None:
    """The tunnel is another user's, which takes CAP_KILL."""
    lab = make_lab(2)
    put_config(lab, Backend={"Type": "udp", "Port": 443})
    daemons = [Flanneld(host, program=confined()).start() for host in lab.hosts]
    for daemon in daemons:
        daemon.wait_ready()
    start_containers(lab.hosts)
    wait_connected(lab)
    pid = tunnel_of(daemons[0])
    freeze(pid)
    daemons[0].wait_log("The udp tunnel has ended", 30)
    eventually(lambda: not is_running(pid), PATIENCE, "the end of the stuck tunnel")
    wait_connected(lab)
    assert daemons[0].terminate() == 0
