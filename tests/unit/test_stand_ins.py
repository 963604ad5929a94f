"""What is imported in part, for a fast start, must be whole for everybody else."""

import subprocess
import sys


def test_who_needs_what_python_etcd_did_not_get_gets_it() -> None:
    code = (
        "import flanneld.subnet.etcdv2, dns.resolver, importlib.metadata, urllib3.http2;"
        "print(dns.resolver.Resolver.__name__, importlib.metadata.version.__module__,"
        " urllib3.http2.version('urllib3') == urllib3.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "Resolver importlib.metadata True\n"


def test_who_needs_pyroute2_gets_the_whole_one() -> None:
    code = (
        "import sys, flanneld.kernel.iproute as own;"
        "print('pyroute2.ndb' in sys.modules);"
        "import pyroute2, pyroute2.ndb.main;"
        "print(pyroute2.IPRoute is own.IPRoute, pyroute2.NDB.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\nTrue NDB\n"
