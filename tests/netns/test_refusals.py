"""What cannot work is refused at the start: one line that says why, and the right exit status."""

import os
import stat
import sys
from collections.abc import Iterator

import pytest
from network import MakeLab, etcd_of, leases, put_config, start, wait_routes

from lab import Lab
from lab.etcd import Etcd

PROGRAM = [sys.executable, "-m", "flanneld"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One host and an etcd with a config, for tests whose daemon ends by itself."""
    with Lab(1) as lab:
        put_config(lab)
        yield lab


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--nope", "flag provided but not defined: -nope"),
        ("---iface=eth0", "bad flag syntax: ---iface=eth0"),
        ("--healthz-port=x", 'invalid value "x" for flag -healthz-port: parse error'),
        ("--etcd-prefix", "flag needs an argument: -etcd-prefix"),
    ],
)
def test_a_bad_flag_ends_it_with_status_2_and_the_usage(lab: Lab, flag: str, message: str) -> None:
    done = lab.hosts[0].run([*PROGRAM, flag], check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == message
    assert "Usage: flanneld [OPTION]..." in done.stderr


def test_help_and_version_end_it_with_status_0(lab: Lab) -> None:
    for flag, text in (("--help", "Usage: flanneld [OPTION]..."), ("--version", "v")):
        done = lab.hosts[0].run([*PROGRAM, flag], check=False)
        assert done.returncode == 0
        assert done.stderr.startswith(text)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--iface=nope"], ["Failed to find interface", "lo 127.0.0.1, eth0 10.97.0.1"]),
        (["--iface=10.97.0.99"], ["Failed to find interface", "lo 127.0.0.1, eth0 10.97.0.1"]),
        (["--iface-regex=^zz$"], ["Failed to find interface", "lo 127.0.0.1, eth0 10.97.0.1"]),
        (
            ["--iface=eth0", "--public-ip=203.0.113.5"],
            ["Error fetching backend: your PublicIP differs", "203.0.113.5", "10.97.0.1"],
        ),
        (["--iface=eth0", "--public-ip=nonsense"], ["invalid public IP address: nonsense"]),
        (["--kube-subnet-mgr"], ["no Kubernetes support", "kube-subnet-mgr"]),
        (["--kube-api-url=http://10.97.0.254"], ["no Kubernetes support", "kube-api-url"]),
        (["--kubeconfig-file=/root/.kube"], ["no Kubernetes support", "kubeconfig-file"]),
        (["--iptables-resync=0"], ["invalid iptables-resync: 0"]),
        (["--subnet-lease-renew-margin=1440"], ["Invalid subnet-lease-renew-margin", "1440"]),
        (["--etcd-certfile=/x"], ["etcd-certfile is given without etcd-keyfile"]),
        (["--etcd-cafile=/x"], ["cannot use the etcd CA file /x: ", "No such file"]),
        (["--subnet-file="], ["Failed to write subnet file", "names no file"]),
        (["--subnet-file=/"], ["Failed to write subnet file", "names no file"]),
        (["--etcd-endpoints=ftp://x"], ["unusable etcd endpoint 'ftp://x'"]),
    ],
)
def test_what_cannot_work_ends_it_with_status_1_and_one_line(
    lab: Lab, flags: list[str], words: list[str]
) -> None:
    (host,) = lab.hosts
    assert isinstance(lab.etcd, Etcd)
    store = [] if "--etcd-endpoints=ftp://x" in flags else lab.etcd.client_flags()
    file = f"--subnet-file={host.subnet_file}"
    done = host.run([*PROGRAM, *store, file, *flags], check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line[0] not in "IW"]
    assert len(errors) == 1
    assert errors[0].startswith("E")
    for word in words:
        assert word in errors[0]
    assert not host.subnet_file.exists()
    assert leases(lab) == {}


@pytest.mark.parametrize("what", [[], ["--cleanup"]])
def test_a_device_in_the_place_of_the_subnet_file_stays(lab: Lab, what: list[str]) -> None:
    """``--subnet-file=/dev/null`` must not cost the host its null device."""
    (host,) = lab.hosts
    assert isinstance(lab.etcd, Etcd)
    device = lab.scratch_file("null")
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    before = sorted(lab.directory.iterdir())
    file = f"--subnet-file={device}"
    done = host.run([*PROGRAM, *lab.etcd.client_flags(), "--iface=eth0", file, *what], check=False)
    assert done.returncode == 1
    assert "not a regular file" in done.stderr
    assert "Traceback" not in done.stderr
    assert stat.S_ISCHR(device.lstat().st_mode)
    assert sorted(lab.directory.iterdir()) == before
    assert leases(lab) == {}


def test_of_several_interfaces_the_first_that_exists_is_used(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab)
    one, two = lab.hosts
    (peer,) = start(two)
    flags = [*etcd_of(lab).client_flags(), "--iface=nope", "--iface-regex=^eth[0-9]$"]
    one.popen(
        [*PROGRAM, *flags, f"--subnet-file={one.subnet_file}"], output=lab.scratch_file("one")
    )
    wait_routes(one, {str(peer.subnet()): "10.97.0.2"})
