"""What a daemon has imported when it says READY=1: each module costs every start time.

And what it imports later: nothing when something is wrong. The account is the interpreter's own.
Whoever adds a module to the start adds it here.
"""

import re
import sys

import pytest
from network import PATIENCE, MakeLab, etcd_of, put_config, wait_settled

from lab import Flanneld, Host, eventually

READY = "READY=1 is said now"

# flanneld as it is, but that its log says when READY=1 is about to be sent.
PROGRAM = f"""
import os, sys
from flanneld import main, notify
ready = notify.Notifier.ready
def tell(self):
    os.write(2, b"{READY}\\n")
    ready(self)
notify.Notifier.ready = tell
sys.exit(main.main(sys.argv[1:], os.environ))
"""

TRACED = (sys.executable, "-X", "importtime", "-c", PROGRAM)

# flanneld's own modules, by package.
OWN = {
    "flanneld": (
        "backend clock docker0 errors flags heartbeat interface kernel lock logs main memory"
        " notify retry signals subnet"
    ),
    "flanneld.backend": "base device feed hostgw peers registry",
    "flanneld.kernel": "hostwire link netlink reconcile refusals spared state wire",
    "flanneld.subnet": (
        "acquire allocate config env etcd_member etcd_wait etcdv2 gojson lease local_manager"
        " manager monitor python_etcd store watch"
    ),
}
OF_VXLAN = {
    "flanneld.backend.mtu",
    "flanneld.backend.vxlan",
    "flanneld.kernel.device",
    "flanneld.kernel.vxlan",
}
# Imported by a thread that READY=1 does not wait for: on host-gw it removes an earlier backend's
# device. What keeps the rules is not even begun with.
LATER = OF_VXLAN

THIRD_PARTY = {"etcd", "sdnotify", "urllib3"}
# Of the standard library these are heavy; pyroute2 brings them.
HEAVY = {"argparse", "asyncio", "multiprocessing", "unittest"}

# What making the device takes; where it is made already, nothing of it is imported before READY=1.
MAKES_DEVICE = HEAVY | {"flanneld.kernel.iproute", "pyroute2"}


def imported(log: str) -> set[str]:
    """Return the modules that the log of a traced daemon names."""
    return set(re.findall(r"^import time: .*\|\s+([\w.]+)\n", log, re.MULTILINE))


def before_ready(daemon: Flanneld) -> set[str]:
    """Return the modules that a traced daemon had imported when it said READY=1."""
    log, said, _ = daemon.log().partition(READY)
    assert said
    return imported(log)


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
        found = counted(before_ready(daemon))
        assert daemon.terminate() == 0
        wanted = listed(backend)
        if backend == "vxlan" and start == "first":
            wanted |= MAKES_DEVICE
        assert found - wanted - LATER == set()
        assert wanted - found - LATER == set()


@pytest.mark.parametrize("backend", ["host-gw", "vxlan"])
def test_nothing_is_imported_when_something_is_wrong(make_lab: MakeLab, backend: str) -> None:
    """It would take time then, and memory from then on."""
    lab = make_lab(1)
    (host,) = lab.hosts
    put_config(lab, Backend={"Type": backend})
    daemon = Flanneld(host, program=TRACED)
    for _ in range(2):
        daemon.start().wait_ready(30)
        wait_settled([daemon])
        if backend == "vxlan":
            eventually(
                lambda: "flanneld.kernel.iproute" in imported(daemon.log()), PATIENCE, "pyroute2"
            )
        before = imported(daemon.log())
        if backend == "vxlan":
            spoil_device(host, daemon)
        etcd = etcd_of(lab)
        etcd.kill()
        daemon.wait_log("Watch subnets: client: etcd cluster is unavailable", PATIENCE)
        etcd.start()
        daemon.wait_log("Watch subnets is back", PATIENCE)
        assert imported(daemon.log()) == before
        assert daemon.terminate() == 0


def spoil_device(host: Host, daemon: Flanneld) -> None:
    """Have the daemon mend its device in each way there is."""
    host.ip("link set flannel.1 down")
    daemon.wait_log("flannel.1 was set down", PATIENCE)
    host.ip("addr flush dev flannel.1")
    daemon.wait_log("flannel.1 has lost its address", PATIENCE)
    host.ip("link set flannel.1 mtu 1400")
    daemon.wait_log("MTU of flannel.1: 1400", PATIENCE)
    host.ip("link set flannel.1 address 02:00:00:00:00:01")
    daemon.wait_log("flannel.1 has got another MAC", PATIENCE)
    host.ip("link del flannel.1")
    daemon.wait_log("flannel.1 was gone", PATIENCE)
