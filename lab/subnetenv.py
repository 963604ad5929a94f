"""Reading ``subnet.env`` the way docker's start scripts do, with no help from flanneld's code."""

from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SubnetEnv:
    """``subnet`` is the bridge's address with the subnet's length: 10.5.17.1/24."""

    network: IPv4Network
    subnet: IPv4Interface
    mtu: int
    ipmasq: bool


def read(path: Path) -> SubnetEnv:
    """Raises FileNotFoundError, KeyError for a missing variable, ValueError for a bad value."""
    values = dict(line.split("=", 1) for line in path.read_text().splitlines() if line)
    return SubnetEnv(
        IPv4Network(values["FLANNEL_NETWORK"]),
        IPv4Interface(values["FLANNEL_SUBNET"]),
        int(values["FLANNEL_MTU"]),
        {"true": True, "false": False}[values["FLANNEL_IPMASQ"]],
    )
