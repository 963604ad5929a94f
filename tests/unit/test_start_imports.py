"""What the daemon imports before it is ready: each module costs every start time and memory."""

import subprocess
import sys

# Heavy ones, and what keeps them out.
UNASKED = {
    "asyncio": "pyroute2's; only to make or mend a device",
    "pyroute2": "only to make or mend a device",
    "iptc": "only with --ip-masq on a legacy host",
    "numpy": "only in the udp tunnel's process",
    "dns": "python-etcd's, for SRV records",
    "argparse": "flags are Go's",
    "subprocess": "only where a process is started",
    "unittest": "nobody's",
}

CODE = """
import sys
import flanneld.__main__, flanneld.main
import flanneld.kernel.link, flanneld.kernel.reconcile, flanneld.backend.hostgw
import flanneld.subnet.etcdv2
print("\\n".join(sys.modules))
"""


def test_nothing_heavy_is_imported_by_a_host_gw_daemon() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "etcd" in loaded
    assert {name: why for name, why in UNASKED.items() if name in loaded} == {}


def test_who_needs_dnspython_gets_the_real_one() -> None:
    code = "import flanneld.subnet.etcdv2, dns.resolver; print(dns.resolver.Resolver.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "Resolver\n"
