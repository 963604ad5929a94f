"""The rules are kept: what others do to them is mended, and what is others' stays as it is."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest
from firewall import (
    CHAIN,
    FORWARD,
    KINDS,
    LEGACY,
    MASQ,
    NFTABLES,
    RESTORE,
    TABLE,
    Kind,
    forward_lines,
    in_place,
    iptables,
    make,
    masquerade_lines,
    nft_chain,
    restored,
    saved,
    start,
    tools_environment,
    wait_forward,
    wait_in_place,
)
from network import PATIENCE, MakeLab, count
from overlay import udp_both_ways

from lab import Flanneld, Host, Lab, eventually
from lab.namespaces import UNDERLAY
from lab.process import end

BACK = "Masquerade or forward rules were missing or changed: they are back in place"

FOREIGN_NAT = [
    '-A POSTROUTING -s 192.168.0.0/16 -m comment --comment "another\\\'s" -j MASQUERADE',
    "-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -p udp -j MASQUERADE --to-ports 1024-2048",
    "-A POSTROUTING ! -s 10.5.0.0/16 -d 10.6.0.0/16 -j RETURN",
]


def running(make_lab: MakeLab, kind: Kind, code: str = "") -> tuple[Lab, Host, Flanneld]:
    """Return a lab with one host, whose FORWARD drops and whose daemon looks each second."""
    lab = make(make_lab, kind)
    host = lab.hosts[0]
    iptables(host, kind, "-P", "FORWARD", "DROP")
    return lab, host, start(host, kind, "--ip-masq", "--iptables-resync=1", code=code)


def spoil(host: Host, kind: Kind, *rules: str) -> None:
    """Change the rules by hand: lines of iptables-restore for the nat table, or of nft."""
    if kind.nftables:
        text = "\n".join(rules).replace(CHAIN, nft_chain(host))
        host.run(["nft", "-f", "-"], stdin=text + "\n")
    else:
        restored(host, kind, "\n".join(["*nat", *rules, "COMMIT", ""]))


def is_spoilt(host: Host, kind: Kind, subnet: object, lines: Sequence[str]) -> bool:
    """Spoil the rules, and return whether they are seen so; the daemon may have been quicker."""
    spoil(host, kind, *lines)
    try:
        return not in_place(host, kind, subnet)
    except AssertionError:
        return True


ACCEPT_ALL = {
    "the jump is gone": [f"-D {masquerade_lines('')[1][3:]}"],
    "the jump is doubled": [masquerade_lines("")[1]],
    "a jump without our comment": [f"-A POSTROUTING -j {MASQ}"],
    "the chain is empty": [f"-F {MASQ}"],
    "a rule more": [f"-I {MASQ} -j ACCEPT"],
    "out of order": [f"-D {MASQ} 3", f"-A {MASQ} -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE"],
    "everything is flushed": ["-F POSTROUTING", f"-F {MASQ}", f"-X {MASQ}"],
}
NFT_SPOILT = {
    "the table is gone": ["delete table ip flannel-ipv4"],
    "the chain is empty": ["flush table ip flannel-ipv4"],
    "a rule more": ["add rule ip flannel-ipv4 postrtg accept"],
    "everything is flushed": ["flush ruleset"],
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_whatever_is_changed_by_hand_is_put_back(make_lab: MakeLab, kind: Kind) -> None:
    _, host, daemon = running(make_lab, kind)
    subnet = daemon.subnet()
    wait_in_place(host, kind, subnet)
    ways = NFT_SPOILT if kind.nftables else ACCEPT_ALL
    # The daemon has just looked when it has mended something: so we look before it does again.
    spoil(host, kind, *next(iter(ways.values())))
    daemon.wait_log(BACK, PATIENCE)
    wait_in_place(host, kind, subnet)
    for what, lines in ways.items():
        eventually(partial(is_spoilt, host, kind, subnet, lines), PATIENCE, f"spoilt: {what}")
        eventually(lambda: in_place(host, kind, subnet), PATIENCE, f"{kind}: mended: {what}")
        # It looks at what it has written, and pauses if that is gone three times in a row.
        time.sleep(0.5)
    # One line a minute, whatever happens.
    assert count(daemon, BACK) == 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_flushed_under_load_it_masquerades_again(make_lab: MakeLab, kind: Kind) -> None:
    lab, host, daemon = running(make_lab, kind)
    wait_in_place(host, kind, daemon.subnet())
    wait_forward(host, kind, forward_lines())
    container = host.add_container()
    eventually(lambda: container.ping(UNDERLAY.ip).lost == 0, PATIENCE, "an answer")
    ping = container.start_ping(UNDERLAY.ip, 0.01)
    for _ in range(3):
        ping.wait_received(20, PATIENCE)
        # As a firewalld reload does.
        iptables(host, kind, "-t", "nat", "-F")
        iptables(host, kind, "-t", "nat", "-X")
        iptables(host, kind, "-F")
        iptables(host, kind, "-X")
        if kind.nftables:
            host.run(["nft", "delete", *TABLE])
        wait_in_place(host, kind, daemon.subnet())
        wait_forward(host, kind, forward_lines())
    ping.wait_received(20, PATIENCE)
    ping.stop()
    assert udp_both_ways(container, lab.underlay, UNDERLAY.ip, 100) == host.address


# Writes and removes the rules through the driver that suits the host, over and over.
HAMMER = """
import sys
from ipaddress import IPv4Network
from flanneld.masquerade.choose import choose
from flanneld.masquerade.driver import Commands
from flanneld.masquerade.rules import wanted

network, subnet = IPv4Network("10.5.0.0/16"), IPv4Network(sys.argv[2])
rules = wanted(network, subnet, masquerade=True, forward=True)
driver = choose(rules, sys.argv[1] == "nftables", Commands()).driver
while True:
    driver.apply()
    print(len(driver.remove()), flush=True)
"""

# A daemon that never pauses. One that three times in a row does not find what it has just written,
# as may happen beside the hammer, does so for ten minutes. Its lock is the one that iptables takes
# by itself, not that of the lab.
TIRELESS = """
import os
del os.environ["XTABLES_LOCKFILE"]
from flanneld.masquerade import keeper
keeper.UNSEEN_PAUSE = 0.0
from flanneld.__main__ import console
console()
"""


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_rule_of_concurrent_writers_is_lost(make_lab: MakeLab, kind: Kind) -> None:
    """Neither of theirs nor of ours, while the daemon and a second writer of ours are at work."""
    lab, host, daemon = running(make_lab, kind, TIRELESS)
    script = (
        "unset XTABLES_LOCKFILE; for i in $(seq 125); do"
        f" iptables-{kind.variant} -w -t nat -A POSTROUTING"
        " -s 192.0.2.$i -d 198.51.100.$1 -j RETURN || exit 1; done"
    )
    output = lab.scratch_file("hammer")
    argv = [sys.executable, "-c", HAMMER, kind.driver, str(daemon.subnet())]
    hammer = host.popen(argv, output=output, env=tools_environment(lab, kind))
    eventually(lambda: output.read_text().count("\n") > 2, PATIENCE, "the hammer at work")
    begun = output.read_text().count("\n")
    writers = [
        host.popen(["sh", "-c", script, "sh", str(n)], output=lab.scratch_file("writer"))
        for n in range(4)
    ]
    assert [writer.wait(300) for writer in writers] == [0, 0, 0, 0]
    # It was at work all the time, however few turns the other writers left it.
    assert output.read_text().count("\n") > begun
    assert hammer.poll() is None, output.read_text()[-2000:]
    end([hammer])
    foreign = [
        f"-A POSTROUTING -s 192.0.2.{i}/32 -d 198.51.100.{n}/32 -j RETURN"
        for n in range(4)
        for i in range(1, 126)
    ]
    wait_in_place(host, kind, daemon.subnet(), foreign)
    wait_forward(host, kind, forward_lines())


# Writes the rules once. Between reading and writing somebody who takes no lock puts a rule in
# front, as a program in a container does that has a /run of its own.
SURPRISED = """
import os, subprocess
from ipaddress import IPv4Network
from flanneld.masquerade import iptc
from flanneld.masquerade.driver import Commands, find_iptables
from flanneld.masquerade.rules import wanted

RULE = "-t nat -I POSTROUTING -s 192.0.2.1 -j RETURN"
read, seen = iptc._read, []

def interrupted(chain):
    found = read(chain)
    if chain.table == "nat" and not seen:
        seen.append(chain)
        environ = os.environ | {"XTABLES_LOCKFILE": "own.lock"}
        subprocess.run(["iptables", *RULE.split()], check=True, env=environ)
    return found

iptc._read = interrupted
network, subnet = IPv4Network("10.5.0.0/16"), IPv4Network("10.5.34.0/24")
rules = wanted(network, subnet, masquerade=True, forward=True)
iptc.IptcDriver(find_iptables(Commands()), rules).apply()
"""


def test_the_rule_of_a_writer_without_the_lock_is_not_taken_for_one_of_ours(
    make_lab: MakeLab,
) -> None:
    lab = make(make_lab, LEGACY)
    host = lab.hosts[0]
    old = "-A POSTROUTING ! -s 10.5.0.0/16 -d 10.5.9.0/24 -j RETURN"
    restored(host, LEGACY, "\n".join(["*nat", old, *FOREIGN_NAT, "COMMIT", ""]))
    output = lab.scratch_file("surprised")
    argv = ["env", "-C", str(lab.directory), sys.executable, "-c", SURPRISED]
    writer = host.popen(argv, output=output, env=tools_environment(lab, LEGACY))
    assert writer.wait(30) == 0, output.read_text()
    theirs = ["-A POSTROUTING -s 192.0.2.1/32 -j RETURN", *FOREIGN_NAT]
    in_place(host, LEGACY, "10.5.34.0/24", theirs)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_after_the_end_all_stays_and_the_next_start_changes_nothing(
    make_lab: MakeLab, kind: Kind
) -> None:
    _, host, daemon = running(make_lab, kind)
    restored(host, kind, "\n".join(["*nat", *FOREIGN_NAT, "COMMIT", ""]))
    wait_in_place(host, kind, daemon.subnet(), FOREIGN_NAT)
    wait_forward(host, kind, forward_lines())
    before = [saved(host, kind, table) for table in ("nat", "filter")]
    assert daemon.terminate() == 0
    assert [saved(host, kind, table) for table in ("nat", "filter")] == before
    in_place(host, kind, daemon.subnet(), FOREIGN_NAT)
    again = start(host, kind, "--ip-masq", "--iptables-resync=1")
    assert again.subnet() == daemon.subnet()
    again.wait_log("Masquerade and forward rules through")
    assert [saved(host, kind, table) for table in ("nat", "filter")] == before
    assert count(again, BACK) == 0


FIREWALLD = [
    "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "-A FORWARD -i lo -j ACCEPT",
    "-A FORWARD -j REJECT --reject-with icmp-host-prohibited",
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_jump_stands_before_a_last_rule_that_rejects_all_and_behind_the_others(
    make_lab: MakeLab, kind: Kind
) -> None:
    lab = make(make_lab, kind)
    host = lab.hosts[0]
    restored(host, kind, "\n".join(["*filter", *FIREWALLD, "COMMIT", ""]))
    daemon = start(host, kind, "--ip-masq", "--iptables-resync=1")
    chain, jump, *rules = forward_lines()
    wait_forward(host, kind, [chain, *FIREWALLD[:2], jump, FIREWALLD[2], *rules])
    container = host.add_container()
    eventually(lambda: container.ping(UNDERLAY.ip).lost == 0, PATIENCE, "an answer")
    # An emergency stop by the operator is not overruled.
    iptables(host, kind, "-I", "FORWARD", "-j", "DROP")
    iptables(host, kind, "-t", "nat", "-F")
    if kind.nftables:
        host.run(["nft", "delete", *TABLE])
    wait_in_place(host, kind, daemon.subnet())
    stopped = ["-A FORWARD -j DROP", *FIREWALLD[:2], jump, FIREWALLD[2], *rules]
    wait_forward(host, kind, [chain, *stopped])


@pytest.mark.parametrize("kind", [LEGACY, RESTORE], ids=str)
def test_without_ip_masq_there_are_the_forward_rules_only(make_lab: MakeLab, kind: Kind) -> None:
    lab = make(make_lab, kind)
    host = lab.hosts[0]
    daemon = start(host, kind)
    wait_forward(host, kind, forward_lines())
    assert saved(host, kind, "nat") == []
    daemon.terminate()
    # With --ip-masq and back again.
    daemon = start(host, kind, "--ip-masq", "--ip-masq-fully-random-disable")
    plain = [line.replace(" --random-fully", "") for line in masquerade_lines(daemon.subnet())]
    assert saved(host, kind, "nat") == plain
    daemon.terminate()
    start(host, kind)
    eventually(lambda: saved(host, kind, "nat") == [], PATIENCE, "no masquerade rules")
    assert saved(host, kind, "filter") == forward_lines()


def test_nftables_has_forward_rules_in_iptables_only_while_these_drop(make_lab: MakeLab) -> None:
    lab = make(make_lab, NFTABLES)
    host = lab.hosts[0]
    daemon = start(host, NFTABLES, "--ip-masq", "--iptables-resync=1")
    wait_in_place(host, NFTABLES, daemon.subnet())
    # docker comes later.
    iptables(host, NFTABLES, "-P", "FORWARD", "DROP")
    wait_forward(host, NFTABLES, forward_lines())
    iptables(host, NFTABLES, "-P", "FORWARD", "ACCEPT")
    wait_forward(host, NFTABLES, [])
    assert FORWARD not in daemon.log()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_with_no_rules_wanted_nothing_is_touched_and_what_was_is_taken_away(
    make_lab: MakeLab, kind: Kind
) -> None:
    _, host, daemon = running(make_lab, kind)
    wait_in_place(host, kind, daemon.subnet())
    wait_forward(host, kind, forward_lines())
    daemon.terminate()
    start(host, kind, "--iptables-forward-rules=false")
    wait_forward(host, kind, [])
    gone: Callable[[], bool] = lambda: saved(host, kind, "nat") == []  # noqa: E731 - one use
    eventually(gone, PATIENCE, "no rules in nat")
    eventually(lambda: not host.run(["nft", "list", "tables"]).stdout.count("flannel"), 5, "none")
