"""What a daemon has imported when it says READY=1: each module costs every start time and memory.

The account is the interpreter's own. Whoever adds a module to the start adds it here.
"""

import re
import sys

import pytest
from network import MakeLab, put_config

from lab import Flanneld

TRACED = (sys.executable, "-X", "importtime", "-m", "flanneld")

# flanneld's own modules, by package.
OWN = {
    "flanneld": (
        "backend clock docker0 errors flags heartbeat interface kernel lock logs main masquerade"
        " notify retry signals subnet"
    ),
    "flanneld.backend": "base device feed hostgw peers registry",
    "flanneld.kernel": "hostwire link netlink reconcile refusals spared state wire",
    "flanneld.masquerade": "choose driver generation keeper nft restore rules text",
    "flanneld.subnet": (
        "allocate config env etcd_member etcd_wait etcdv2 gojson lease local_manager manager"
        " monitor python_etcd store watch"
    ),
}
OF_VXLAN = {
    "flanneld.backend.mtu",
    "flanneld.backend.vxlan",
    "flanneld.kernel.device",
    "flanneld.kernel.vxlan",
}
# Imported by threads that READY=1 does not wait for: who keeps the rules, and, on host-gw, who
# removes an earlier backend's device.
LATER = {f"flanneld.masquerade.{name}" for name in OWN["flanneld.masquerade"].split()} | OF_VXLAN

THIRD_PARTY = {"etcd", "sdnotify", "urllib3"}
# Of the standard library these are heavy; pyroute2 brings them.
HEAVY = {"argparse", "asyncio", "multiprocessing", "unittest"}

# What making the device takes; where it is made already, nothing of it is imported.
MAKES_DEVICE = HEAVY | {"flanneld.kernel.iproute", "pyroute2"}


def imported(daemon: Flanneld) -> set[str]:
    """Return the modules that the log of a traced daemon names up to now."""
    return set(re.findall(r"^import time: .*\|\s+([\w.]+)\n", daemon.log(), re.MULTILINE))


def counted(modules: set[str]) -> set[str]:
    """Return what is judged: our own modules, others' packages, and the heavy ones."""
    packages = {name.partition(".")[0] for name in modules}
    own = {name for name in modules if name.startswith("flanneld.")}
    elsewhere = packages - set(sys.stdlib_module_names) - {"flanneld"}
    return own | (elsewhere & KNOWN) | (packages & HEAVY)


# Looked for, where they are installed, and not found: the account names these too.
KNOWN = THIRD_PARTY | {"pyroute2", "iptc", "numpy", "dns", "pytest", "hypothesis"}


def listed(backend: str) -> set[str]:
    names = {f"{package}.{name}" for package, names in OWN.items() for name in names.split()}
    if backend == "vxlan":
        names = names - {"flanneld.backend.hostgw"} | OF_VXLAN
    return names | THIRD_PARTY


@pytest.mark.parametrize("backend", ["host-gw", "vxlan"])
def test_modules_imported_before_ready(make_lab: MakeLab, backend: str) -> None:
    """On the first start of a host, and on the next."""
    lab = make_lab(1)
    put_config(lab, Backend={"Type": backend})
    daemon = Flanneld(lab.hosts[0], program=TRACED)
    for start in ("first", "second"):
        daemon.start().wait_ready(30)
        found = counted(imported(daemon))
        assert daemon.terminate() == 0
        wanted = listed(backend)
        if backend == "vxlan" and start == "first":
            wanted |= MAKES_DEVICE
        assert found - wanted - LATER == set()
        assert wanted - found - LATER == set()
