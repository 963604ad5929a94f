"""What the lab needs of the machine, said in one line when it is missing."""

import os
import shutil

from lab.process import environment

# Command -> Debian package.
PACKAGES = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "ping": "iputils-ping",
    "etcd": "etcd-server",
}
TLS_PACKAGES = {"openssl": "openssl"}
FIREWALL_PACKAGES = {
    "iptables-legacy": "iptables",
    "iptables-nft": "iptables",
    "nft": "nftables",
}


def missing(packages: dict[str, str] | None = None) -> str:
    """Why the lab cannot work here and what to do about it, in one line; empty if it can."""
    if os.geteuid() != 0:
        return "not root: network namespaces need root. Run it again with sudo."
    path = environment()["PATH"]
    wanted = PACKAGES if packages is None else packages
    lacking = {
        name: package for name, package in wanted.items() if not shutil.which(name, path=path)
    }
    if not lacking:
        return ""
    return (
        f"not installed: {', '.join(lacking)}."
        f" On Debian: apt-get install {' '.join(sorted(set(lacking.values())))}"
    )
