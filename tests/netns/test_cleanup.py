"""``flanneld --cleanup``: what flanneld set up goes, everything else stays."""

import json
import subprocess

import pytest
from network import PATIENCE, MakeLab, put_config, start

from lab import Host, Lab
from lab.daemon import FLANNELD
from lab.wait import eventually


def clean(host: Host) -> subprocess.CompletedProcess[str]:
    return host.run([*FLANNELD, "--cleanup", f"--subnet-file={host.subnet_file}"], check=False)


def state(host: Host) -> dict[str, object]:
    """Everything that flanneld may set up on a host."""
    return {
        "routes": host.run(["ip", "route", "show", "table", "main"]).stdout,
        "links": [each["ifname"] for each in host.ip_json("link")],
        "rules": [
            line.partition(" [")[0]
            for line in host.run(["iptables-save"]).stdout.splitlines()
            if not line.startswith("#")
        ],
        "file": host.subnet_file.exists(),
    }


def foreign(host: Host) -> None:
    """Things of others that look a bit like flanneld's."""
    host.ip(
        "link add flannel.x type bridge",
        "link add vx9 type vxlan id 9 dstport 4789 dev eth0",
        "route add 10.5.250.0/24 via 10.97.0.254",
        "route add 10.9.0.0/24 via 10.97.0.254 proto 103",
    )
    host.run(["iptables", "-t", "nat", "-A", "POSTROUTING", "-s", "10.5.0.0/16", "-j", "ACCEPT"])
    host.run(["iptables", "-A", "FORWARD", "-s", "10.5.0.0/16", "-j", "ACCEPT"])


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_all_of_ours_goes_and_nothing_else(make_lab: MakeLab, backend: str) -> None:
    lab = make_lab(2)
    put_config(lab, Backend={"Type": backend})
    for host in lab.hosts:
        foreign(host)
    before = state(lab.hosts[0])
    (daemon, _) = start(*lab.hosts, extra=("--ip-masq",))
    subnet = daemon.subnet()
    assert daemon.terminate() == 0
    host = lab.hosts[0]
    assert state(host) != before
    done = clean(host)
    assert (done.returncode, done.stderr) == (0, "")
    assert state(host) == before
    said = done.stdout
    assert "FLANNEL-POSTRTG" in said
    assert "FLANNEL-FWD" in said
    assert f"removed file {host.subnet_file}" in said
    assert ("removed device flannel.1" in said) is (backend == "vxlan")
    if backend != "udp":
        assert "removed route to 10.5." in said
    # Again, and on a host that never had any.
    for _ in range(2):
        done = clean(host)
        assert done.returncode == 0
        assert done.stdout == "nothing of flanneld's was found on this host\n"
    # The lease is still this host's.
    host.subnet_file.unlink(missing_ok=True)
    daemon.start()
    daemon.wait_ready()
    assert daemon.subnet() == subnet


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_a_running_daemon_is_noticed(make_lab: MakeLab, backend: str) -> None:
    lab = make_lab(2)
    put_config(lab, Backend={"Type": backend})
    daemons = start(*lab.hosts)
    done = clean(lab.hosts[0])
    assert done.returncode == 1
    assert "a flanneld is running on this host" in done.stderr
    eventually(lambda: connected(lab), PATIENCE, "everything to be back")
    assert all(daemon.is_running for daemon in daemons)


def connected(lab: Lab) -> bool:
    return all(host.ip_json("route", "show", "proto", "102") for host in lab.hosts)


def test_without_rights_it_says_so(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab)
    daemons = start(*lab.hosts)
    for daemon in daemons:
        daemon.terminate()
    host = lab.hosts[0]
    before = json.dumps(host.ip_json("route"))
    program = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *FLANNELD]
    done = host.run([*program, "--cleanup", f"--subnet-file={host.subnet_file}"], check=False)
    assert done.returncode == 1
    assert "flanneld --cleanup: " in done.stderr
    assert "operation not permitted" in done.stderr.lower()
    assert json.dumps(host.ip_json("route")) == before
