"""``flanneld --cleanup``: what flanneld set up goes, everything else stays."""

import json
import subprocess
import sys

import pytest
from network import PATIENCE, MakeLab, put_config, start

from lab import Flanneld, Host, Lab
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


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
@pytest.mark.parametrize("hosts", [1, 2])
def test_while_a_daemon_runs_nothing_is_removed(
    make_lab: MakeLab, backend: str, hosts: int
) -> None:
    lab = make_lab(hosts)
    put_config(lab, Backend={"Type": backend})
    (daemon, *_) = start(*lab.hosts, extra=("--ip-masq",))
    host = lab.hosts[0]
    before = state(host)
    done = clean(host)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"flanneld runs on this host (process {daemon.pid}): stop it first" in done.stderr
    assert state(host) == before
    daemon.kill9()
    assert clean(host).returncode == 0


def clean_another(host: Host) -> subprocess.CompletedProcess[str]:
    """Clean up with a subnet file that no daemon has."""
    return host.run([*FLANNELD, "--cleanup", f"--subnet-file={host.directory}/x.env"], check=False)


def test_a_daemon_with_another_subnet_file_keeps_everything(make_lab: MakeLab) -> None:
    """As where the file is named in the service's settings, and not in the operator's shell."""
    lab = make_lab(2)
    put_config(lab)
    (daemon, other) = start(*lab.hosts, extra=("--ip-masq",))
    host = lab.hosts[0]
    before = state(host)
    done = clean_another(host)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"flanneld runs on this host (process {daemon.pid}): stop it first" in done.stderr
    assert state(host) == before
    # The other host's daemon does not matter.
    daemon.kill9()
    assert other.is_running
    assert clean_another(host).returncode == 0


# flanneld that does not show itself, as an original.
HIDDEN = """
from flanneld import main
main.show_presence = lambda: None
from flanneld.__main__ import console
console()
"""


def test_a_daemon_that_cannot_be_seen_is_noticed(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab)
    for host in lab.hosts:
        Flanneld(host, program=(sys.executable, "-c", HIDDEN)).start().wait_ready(2 * PATIENCE)
    done = clean_another(lab.hosts[0])
    assert done.returncode == 1
    assert "a flanneld runs on this host, and puts everything back" in done.stderr
    eventually(lambda: connected(lab), PATIENCE, "everything to be back")


def test_what_could_not_be_removed_is_found_by_the_next_try(make_lab: MakeLab) -> None:
    """Only the subnet file says whose rules the original's were."""
    lab = make_lab(1)
    put_config(lab)
    (daemon,) = start(*lab.hosts)
    daemon.terminate()
    host = lab.hosts[0]
    old = ["iptables", "-t", "nat", "-A", "POSTROUTING", "-s", "10.5.0.0/16"]
    host.run([*old, "!", "-d", "224.0.0.0/4", "-j", "MASQUERADE"])
    broken = host.directory / "bin"
    broken.mkdir()
    for name in ("iptables", "iptables-save", "iptables-restore"):
        (broken / name).write_text(
            '#!/bin/sh\n[ "$1" = --version ] && exec echo "iptables v1.8.9 (nf_tables)"\nexit 4\n'
        )
        (broken / name).chmod(0o755)
    program = ["env", f"PATH={broken}:/usr/bin:/bin", *FLANNELD]
    done = host.run([*program, "--cleanup", f"--subnet-file={host.subnet_file}"], check=False)
    assert done.returncode == 1
    assert "is kept, since not everything could be removed" in done.stderr
    assert host.subnet_file.exists()
    assert clean(host).returncode == 0
    assert "MASQUERADE" not in host.run(["iptables-save", "-t", "nat"]).stdout
    assert not host.subnet_file.exists()


def test_a_second_daemon_with_the_same_subnet_file_is_said(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    put_config(lab)
    (daemon,) = start(*lab.hosts)
    second = Flanneld(lab.hosts[0]).start()
    second.wait_log(rf"Another flanneld \(process {daemon.pid}\) uses .*subnet.env, too: end one")


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
