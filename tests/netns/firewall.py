"""What the masquerade tests have in common: hosts whose iptables is of one variant or the other."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from zlib import crc32

from network import PATIENCE, MakeLab, put_config

from lab import Flanneld, Host, Lab, eventually
from lab.process import environment

MASQ = "FLANNEL-POSTRTG"
FORWARD = "FLANNEL-FWD"
TOP = Path(__file__).parent.parent.parent
CHAIN = "postrtg"
TABLE = ["table", "ip", "flannel-ipv4"]


@dataclass(frozen=True, slots=True)
class Kind:
    """A driver, the variant of iptables its host has, and what its log line says."""

    driver: str
    variant: str
    nftables: bool = False

    def __str__(self) -> str:
        return self.driver


LEGACY = Kind("python-iptables", "legacy")
RESTORE = Kind("iptables-restore", "nft")
NFTABLES = Kind("nftables", "nft", True)
KINDS = [LEGACY, RESTORE, NFTABLES]


def commands(lab: Lab, variant: str) -> Path:
    """Return a directory in which iptables is of this variant, as update-alternatives makes it."""
    directory = lab.directory / f"iptables-{variant}"
    if not directory.exists():
        directory.mkdir()
        for part in ("", "-save", "-restore"):
            real = which(f"iptables-{variant}{part}", path=environment()["PATH"])
            assert real is not None
            (directory / f"iptables{part}").symlink_to(real)
    return directory


def tools_environment(lab: Lab, kind: Kind) -> dict[str, str]:
    """Return the environment of a program of ours on a host with this iptables."""
    path = f"{commands(lab, kind.variant)}:{environment()['PATH']}"
    return environment(PATH=path, PYTHONPATH=str(TOP))


def flanneld(host: Host, kind: Kind, *extra: str, code: str = "") -> Flanneld:
    """Return a daemon on a host with this iptables; not started. ``code``: what starts it."""
    path = f"PATH={commands(host.lab, kind.variant)}:{environment()['PATH']}"
    how = ["-c", code] if code else ["-m", "flanneld"]
    return Flanneld(host, *extra, program=["env", path, sys.executable, *how])


def start(host: Host, kind: Kind, *extra: str, code: str = "") -> Flanneld:
    """Start such a daemon; it is ready."""
    daemon = flanneld(host, kind, *extra, code=code).start()
    daemon.wait_ready(2 * PATIENCE)
    return daemon


def make(make_lab: MakeLab, kind: Kind, hosts: int = 1, **keys: object) -> Lab:
    """Make a lab whose network config suits the driver."""
    lab = make_lab(hosts)
    configure(lab, kind, **keys)
    return lab


def configure(lab: Lab, kind: Kind, **keys: object) -> None:
    """Write the network config that leads to this driver."""
    put_config(lab, **{"EnableNFTables": True} if kind.nftables else {}, **keys)


def iptables(host: Host, kind: Kind, *words: str) -> str:
    """Run the host's iptables, waiting for its lock; raises LabError if it fails."""
    return host.run([f"iptables-{kind.variant}", "-w", *words]).stdout


def saved(host: Host, kind: Kind, table: str) -> list[str]:
    """Return the rules and own chains of a table, as iptables-save prints them.

    But without the subnet file in our comments, as it is with the default one.
    """
    text = host.run([f"iptables-{kind.variant}-save", "-t", table]).stdout
    text = text.replace(f' {host.subnet_file}"', '"')
    return [
        line
        for line in text.splitlines()
        if line.startswith("-A") or (line.startswith(":") and " - " in line)
    ]


def restored(host: Host, kind: Kind, text: str) -> None:
    """Add rules, in the syntax of iptables-save."""
    host.run([f"iptables-{kind.variant}-restore", "-w", "--noflush"], stdin=text)


def table_text(host: Host) -> str:
    """Return our table of nftables; empty if there is none.

    The chain's name is as with the default subnet file.
    """
    text = host.run(["nft", "--stateless", "list", *TABLE], check=False).stdout
    return text.replace(nft_chain(host), CHAIN)


def nft_chain(host: Host) -> str:
    """Return the name of our chain of nftables for the host's subnet file."""
    return f"{CHAIN}-{crc32(str(host.subnet_file).encode()):08x}"


def masquerade_lines(subnet: object, network: str = "10.5.0.0/16") -> list[str]:
    """Return the nat table's lines of ours: chain, jump and rules."""
    end = '-m comment --comment "flanneld masq" -j'
    chain = f"-A {MASQ}"
    return [
        f":{MASQ} - [0:0]",
        f"-A POSTROUTING {end} {MASQ}",
        f"{chain} -m mark --mark 0x4000/0x4000 {end} RETURN",
        f"{chain} -s {network} -d {network} {end} ACCEPT",
        f"{chain} -s {network} ! -d 224.0.0.0/4 {end} MASQUERADE --random-fully",
        f"{chain} ! -s {network} -d {subnet} {end} ACCEPT",
        f"{chain} ! -s {network} -d {network} {end} MASQUERADE --random-fully",
    ]


def forward_lines(network: str = "10.5.0.0/16") -> list[str]:
    """Return the filter table's lines of ours."""
    end = '-m comment --comment "flanneld forward" -j'
    return [
        f":{FORWARD} - [0:0]",
        f"-A FORWARD {end} {FORWARD}",
        f"-A {FORWARD} -s {network} {end} ACCEPT",
        f"-A {FORWARD} -d {network} {end} ACCEPT",
    ]


def nft_text(subnet: object, network: str = "10.5.0.0/16") -> str:
    """Return our table as nft lists it."""
    return f"""table ip flannel-ipv4 {{
	chain postrtg {{
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr {network} ip daddr {network} accept
		ip saddr {network} ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != {network} ip daddr {subnet} accept
		ip saddr != {network} ip daddr {network} masquerade fully-random
	}}
}}
"""


def in_place(host: Host, kind: Kind, subnet: object, others: Sequence[str] = ()) -> bool:
    """Assert that the masquerade rules are exactly right, beside these lines of the nat table."""
    if kind.nftables:
        assert table_text(host) == nft_text(subnet)
        assert sorted(saved(host, kind, "nat")) == sorted(others)
    else:
        assert sorted(saved(host, kind, "nat")) == sorted([*masquerade_lines(subnet), *others])
        # And in order.
        ours = [line for line in saved(host, kind, "nat") if line not in others]
        assert ours == masquerade_lines(subnet)
        assert table_text(host) == ""
    return True


def wait_in_place(host: Host, kind: Kind, subnet: object, others: Sequence[str] = ()) -> None:
    """Wait until they are."""
    eventually(
        lambda: in_place(host, kind, subnet, others), PATIENCE, f"{kind}: the masquerade rules"
    )


def wait_forward(host: Host, kind: Kind, wanted: Sequence[str]) -> None:
    """Wait until the filter table has exactly these lines."""

    def as_wanted() -> bool:
        assert saved(host, kind, "filter") == [*wanted]
        return True

    eventually(as_wanted, PATIENCE, f"{kind}: the forward rules")
