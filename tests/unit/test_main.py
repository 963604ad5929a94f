"""The command line as a user meets it: exit status, stdout and stderr of the real program."""

import os
import re
import subprocess
import sys

import pytest

from flanneld import __version__
from flanneld.flags import usage


def flanneld(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FLANNELD_", "NOTIFY_"))}
    return subprocess.run(
        [sys.executable, "-m", "flanneld", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=env | environ,
    )


@pytest.mark.parametrize("flag", ["--help", "-h", "-help"])
def test_help(flag: str) -> None:
    result = flanneld(flag, "--no-such-flag")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == usage("flanneld")
    assert result.stderr.startswith("Usage: flanneld [OPTION]...\n  -cleanup\n")


@pytest.mark.parametrize("flag", ["--version", "-version", "--version=true"])
def test_version(flag: str) -> None:
    result = flanneld(flag, FLANNELD_V="garbage")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", f"v{__version__}\n")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--no-such-flag", "flag provided but not defined: -no-such-flag"),
        ("---iface", "bad flag syntax: ---iface"),
        ("-iface", "flag needs an argument: -iface"),
        (
            "-ip-masq=maybe",
            'invalid boolean value "maybe" for -ip-masq: parse error',
        ),
        ("-healthz-port=x", 'invalid value "x" for flag -healthz-port: parse error'),
    ],
)
def test_a_bad_flag(argument: str, message: str) -> None:
    result = flanneld(argument)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{message}\n{usage('flanneld')}"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--kube-subnet-mgr"], "this version has no Kubernetes support: remove kube-subnet-mgr"),
        (
            ["--kube-api-url=http://127.0.0.1:1", "--kubeconfig-file=/x"],
            "this version has no Kubernetes support: remove kube-api-url, kubeconfig-file",
        ),
        (["--subnet-lease-renew-margin=1440"], "Invalid subnet-lease-renew-margin option"),
        (["--subnet-lease-renew-margin=0"], "Invalid subnet-lease-renew-margin option"),
        (["--etcd-keyfile=/x"], "etcd-keyfile is given without etcd-certfile"),
        (["--public-ip=example"], "invalid public IP address: example"),
        (["--iface=no-such-device"], "Failed to find interface to use"),
    ],
)
def test_an_option_that_cannot_work(arguments: list[str], reason: str) -> None:
    result = flanneld(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert re.match(r"E\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ main\.py:\d+\] ", lines[-1])
    assert reason in lines[-1]
    assert "Traceback" not in result.stderr
    assert "Usage" not in result.stderr


def test_an_option_from_the_environment() -> None:
    result = flanneld(FLANNELD_KUBE_SUBNET_MGR="true", FLANNELD_HEALTHZ_PORT="garbage")
    assert result.returncode == 1
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("W")
    assert 'Ignoring FLANNELD_HEALTHZ_PORT="garbage"' in first
    assert "no Kubernetes support" in last
