"""A host whose iptables is of the nft variant, and who writes into its tables with nft, too."""

import pytest
from firewall import (
    NFTABLES,
    RESTORE,
    flanneld,
    forward_lines,
    iptables,
    make,
    saved,
    start,
    wait_forward,
    wait_in_place,
)
from network import PATIENCE, MakeLab, count

from lab import Host, eventually

# iptables v1.8.9 cannot show it, nor any other rule of the table then; its save says so in a
# comment, and ends with status 0.
UNKNOWN = "ct state vmap { established : accept, related : accept }"
BLOCKLIST = """
add set ip filter blocked { type ipv4_addr; elements = { 203.0.113.9 }; }
add rule ip filter FORWARD ip saddr @blocked drop
"""


def nft(host: Host, text: str) -> None:
    host.run(["nft", "-f", "-"], stdin=text)


def listed(host: Host, chain: str = "FORWARD") -> str:
    return host.run(["nft", "list", "chain", "ip", "filter", chain]).stdout


def test_a_chain_that_iptables_cannot_show_is_an_error_and_stays_as_it_is(
    make_lab: MakeLab,
) -> None:
    lab = make(make_lab, RESTORE)
    host = lab.hosts[0]
    iptables(host, RESTORE, "-A", "FORWARD", "-i", "lo", "-j", "ACCEPT")
    nft(host, f"add rule ip filter FORWARD {UNKNOWN}")
    before = listed(host)
    daemon = flanneld(host, RESTORE, "--ip-masq", "--iptables-resync=1").start()
    daemon.wait_log("iptables cannot read FORWARD in the table filter.* set EnableNFTables")
    with pytest.raises(AssertionError):
        eventually(lambda: listed(host) != before, 3, "a change")
    assert count(daemon, "iptables cannot read") == 1
    # The other table is kept.
    wait_in_place(host, RESTORE, daemon.subnet())
    iptables(host, RESTORE, "-t", "nat", "-F")
    wait_in_place(host, RESTORE, daemon.subnet())
    # Once the rule is gone, all is well.
    nft(host, "flush chain ip filter FORWARD")
    wait_forward(host, RESTORE, forward_lines())
    daemon.wait_log("Masquerade and forward rules through iptables-restore")
    # While the daemon runs, it is the same.
    nft(host, f"add rule ip filter FORWARD {UNKNOWN}")
    before = listed(host)
    daemon.wait_log("^E.*iptables cannot read FORWARD in the table filter")
    with pytest.raises(AssertionError):
        eventually(lambda: listed(host) != before, 3, "a change")


def test_what_iptables_cannot_show_elsewhere_does_not_matter(make_lab: MakeLab) -> None:
    lab = make(make_lab, RESTORE)
    host = lab.hosts[0]
    iptables(host, RESTORE, "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
    nft(host, f"add rule ip filter INPUT {UNKNOWN}")
    daemon = start(host, RESTORE, "--ip-masq", "--iptables-resync=1")
    wait_in_place(host, RESTORE, daemon.subnet())
    eventually(lambda: "FLANNEL-FWD" in listed(host), PATIENCE, "the forward rules")
    with pytest.raises(AssertionError):
        eventually(lambda: listed(host).count("FLANNEL-FWD") != 1, 2.5, "a second jump")
    nft(host, "flush chain ip filter FORWARD")
    eventually(lambda: "FLANNEL-FWD" in listed(host), PATIENCE, "the forward rules again")
    nft(host, "flush chain ip filter INPUT")
    wait_forward(host, RESTORE, forward_lines())


def test_with_nftables_such_a_chain_costs_the_forward_rules_only(make_lab: MakeLab) -> None:
    lab = make(make_lab, NFTABLES)
    host = lab.hosts[0]
    iptables(host, NFTABLES, "-P", "FORWARD", "DROP")
    nft(host, f"add rule ip filter FORWARD {UNKNOWN}")
    daemon = start(host, NFTABLES, "--ip-masq", "--iptables-resync=1")
    daemon.wait_log("through nftables: .*; no forward rules: iptables cannot read FORWARD")
    wait_in_place(host, NFTABLES, daemon.subnet())


def test_a_blocklist_of_nfts_stays_in_front(make_lab: MakeLab) -> None:
    """iptables v1.8.9 shows it as a rule that drops everything."""
    lab = make(make_lab, RESTORE)
    host = lab.hosts[0]
    iptables(host, RESTORE, "-A", "FORWARD", "-i", "lo", "-j", "ACCEPT")
    nft(host, BLOCKLIST)
    first = saved(host, RESTORE, "filter")
    daemon = start(host, RESTORE, "--iptables-resync=1")
    chain, jump, *rules = forward_lines()
    wait_forward(host, RESTORE, [chain, *first, jump, *rules])
    daemon.wait_log("^W.*our jump goes behind them")
    # A real end is still one.
    iptables(host, RESTORE, "-A", "FORWARD", "-j", "REJECT", "-m", "comment", "--comment", "end")
    end = saved(host, RESTORE, "filter")[-len(rules) - 1]
    iptables(host, RESTORE, "-D", "FORWARD", str(len(first) + 1))
    wait_forward(host, RESTORE, [chain, *first, jump, end, *rules])
