"""What a former flanneld left on the host is recognised: an original's, another driver's."""

import fcntl
import json
import sys
from pathlib import Path

import pytest
from firewall import (
    KINDS,
    LEGACY,
    NFTABLES,
    RESTORE,
    TABLE,
    Kind,
    commands,
    configure,
    forward_lines,
    iptables,
    make,
    masquerade_lines,
    nft_text,
    restored,
    saved,
    start,
    table_text,
    tools_environment,
    wait_forward,
    wait_in_place,
)
from network import PATIENCE, MakeLab, client_of, count, key_of
from overlay import problems, write_subnet_env

from lab import Flanneld, Lab, eventually
from lab.process import environment

FIXTURES = Path(__file__).parent.parent / "fixtures" / "iptables"

# Nearly flannel's, but nobody's but the operator's.
FOREIGN = [
    "-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random",
    "-A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -p udp -j MASQUERADE --to-ports 1024-2048",
    "-A POSTROUTING -s 10.5.0.0/16 ! -o docker0 -j MASQUERADE",
    "-A POSTROUTING -s 10.7.0.0/16 -d 10.7.0.0/16 -j RETURN",
    "-A POSTROUTING ! -s 10.5.0.0/16 -d 192.168.7.0/24 -j RETURN",
]


def four_rules(network: str, *subnets: str) -> list[str]:
    """Return what v0.8.0 leaves behind after it had these subnets one after the other."""
    return [
        f"-A POSTROUTING -s {network} -d {network} -j RETURN",
        f"-A POSTROUTING -s {network} ! -d 224.0.0.0/4 -j MASQUERADE",
        f"-A POSTROUTING ! -s {network} -d {subnets[0]} -j RETURN",
        f"-A POSTROUTING ! -s {network} -d {network} -j MASQUERADE",
        *(f"-A POSTROUTING ! -s {network} -d {subnet} -j RETURN" for subnet in subnets[1:]),
    ]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_rules_of_v080_go_and_nothing_else_does(make_lab: MakeLab, kind: Kind) -> None:
    lab = make(make_lab, kind)
    host = lab.hosts[0]
    write_subnet_env(host, "10.6.7.0/24", "10.6.0.0/16")
    old = four_rules("10.5.0.0/16", "10.5.34.0/24", "10.5.35.0/24")
    older = four_rules("10.6.0.0/16", "10.6.7.0/24")
    mixed = [old[0], *FOREIGN[:2], *old[1:4], FOREIGN[2], *older, *FOREIGN[3:], *old[4:]]
    restored(host, kind, "\n".join(["*nat", *mixed, "COMMIT", ""]))
    daemon = start(host, kind, "--ip-masq")
    wait_in_place(host, kind, daemon.subnet(), FOREIGN)
    # In their own order, too.
    assert [line for line in saved(host, kind, "nat") if line in FOREIGN] == FOREIGN


def test_without_ip_masq_the_operators_own_rules_stay(make_lab: MakeLab) -> None:
    lab = make(make_lab, RESTORE)
    host = lab.hosts[0]
    by_hand = four_rules("10.5.0.0/16", "10.5.34.0/24")
    restored(host, RESTORE, "\n".join(["*nat", *by_hand, "COMMIT", ""]))
    start(host, RESTORE)
    wait_forward(host, RESTORE, forward_lines())
    assert saved(host, RESTORE, "nat") == by_hand


@pytest.mark.parametrize(
    ("version", "kind"),
    [("v080", RESTORE), ("v0202", LEGACY), ("v0202", RESTORE), ("v0289", RESTORE),
     ("v0289", NFTABLES)],
    ids=str,
)  # fmt: skip
def test_the_tables_of_an_original_are_taken_over(
    make_lab: MakeLab, kind: Kind, version: str
) -> None:
    lab = make(make_lab, kind)
    host = lab.hosts[0]
    names = {"v080": "v080-ip-masq-running", "v0202": "v0202-ip-masq-running"}
    name = names.get(version, "v0289-ip-masq-constructed")
    restored(host, kind, (FIXTURES / f"{name}.txt").read_text())
    if version == "v0289":
        nft = (FIXTURES / "v0289-nftables-constructed.txt").read_text()
        host.run(["nft", "-f", "-"], stdin=nft)
    daemon = start(host, kind, "--ip-masq")
    wait_in_place(host, kind, daemon.subnet())
    wait_forward(host, kind, [] if kind.nftables else forward_lines())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_another_subnet_and_another_network_replace_the_old_rules(
    make_lab: MakeLab, kind: Kind
) -> None:
    lab = make(make_lab, kind)
    host = lab.hosts[0]
    daemon = start(host, kind, "--ip-masq")
    wait_in_place(host, kind, daemon.subnet())
    first = daemon.subnet()
    daemon.terminate()
    with client_of(lab) as client:
        client.delete(key_of(first))
    configure(lab, kind, Network="10.5.0.0/16", SubnetMin="10.5.60.0", SubnetMax="10.5.60.0")
    daemon = start(host, kind, "--ip-masq")
    assert str(daemon.subnet()) == "10.5.60.0/24"
    wait_in_place(host, kind, "10.5.60.0/24")
    daemon.terminate()
    configure(lab, kind, Network="10.8.0.0/16")
    daemon = start(host, kind, "--ip-masq")
    subnet = daemon.subnet()
    if kind.nftables:
        assert "10.5." not in table_text(host)
        assert f"ip daddr {subnet} accept" in table_text(host)
    else:
        assert saved(host, kind, "nat") == masquerade_lines(subnet, "10.8.0.0/16")
        wait_forward(host, kind, forward_lines("10.8.0.0/16"))


@pytest.mark.parametrize(
    ("before", "after"),
    [(LEGACY, RESTORE), (RESTORE, LEGACY), (LEGACY, NFTABLES), (NFTABLES, RESTORE),
     (RESTORE, NFTABLES), (NFTABLES, LEGACY)],
    ids=str,
)  # fmt: skip
def test_what_another_driver_left_is_removed(make_lab: MakeLab, before: Kind, after: Kind) -> None:
    lab = make(make_lab, before)
    host = lab.hosts[0]
    restored(host, before, "\n".join(["*nat", *FOREIGN, "COMMIT", ""]))
    daemon = start(host, before, "--ip-masq")
    wait_in_place(host, before, daemon.subnet(), FOREIGN)
    daemon.terminate()
    configure(lab, after)
    daemon = start(host, after, "--ip-masq")
    same = before.variant == after.variant
    wait_in_place(host, after, daemon.subnet(), FOREIGN if same else [])
    if not same:
        eventually(lambda: saved(host, before, "nat") == FOREIGN, PATIENCE, "the old ones gone")
        eventually(lambda: saved(host, before, "filter") == [], PATIENCE, "the old ones gone")
    assert problems(daemon) == []


def without_tools(lab: Lab, *extra: str) -> Flanneld:
    """Return a daemon that finds neither iptables nor nft: they are hidden from it."""
    empty = lab.scratch_file("empty")
    empty.mkdir()
    hide = f'mount --bind {empty} /usr/sbin && exec "$@"'
    program = ["unshare", "--mount", "sh", "-c", hide, "sh", sys.executable, "-m", "flanneld"]
    return Flanneld(lab.hosts[0], *extra, program=program)


@pytest.mark.parametrize(
    ("kind", "flags", "line"),
    [
        (RESTORE, ["--ip-masq"], "E.*Failed to set up IP Masquerade: iptables was not found in"),
        (NFTABLES, ["--ip-masq"], "E.*Failed to set up IP Masquerade: .*nft was not found in"),
        (RESTORE, [], "W.*No forward rules.* iptables was not found in"),
        (RESTORE, ["--iptables-forward-rules=false"], None),
    ],
)
def test_without_a_tool_one_line_says_so_and_the_daemon_runs_on(
    make_lab: MakeLab, kind: Kind, flags: list[str], line: str | None
) -> None:
    lab = make(make_lab, kind)
    daemon = without_tools(lab, "--iptables-resync=1", *flags).start()
    daemon.wait_ready(2 * PATIENCE)
    if line is not None:
        daemon.wait_log(f"^{line}")
    with pytest.raises(AssertionError):  # no second one: nothing new happens in two more checks
        eventually(lambda: len(problems(daemon)) > (line is not None), 2.5, "a second line")
    assert len(problems(daemon)) == (line is not None)
    assert daemon.subnet()
    assert daemon.terminate() == 0


def test_a_lock_that_is_held_delays_the_rules_only(make_lab: MakeLab) -> None:
    lab = make(make_lab, LEGACY)
    host = lab.hosts[0]
    lock = lab.scratch_file("xtables.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        path = f"PATH={commands(lab, 'legacy')}:{environment()['PATH']}"
        program = ["env", path, f"XTABLES_LOCKFILE={lock}", sys.executable, "-m", "flanneld"]
        flags = ["--ip-masq", "--iptables-resync=1"]
        daemon = Flanneld(host, *flags, program=program).start()
        daemon.wait_log("Allocated lease")
        # It waits for the rules before it writes the subnet file; not so long if it is to end.
        assert daemon.terminate(3.0) == 0
        assert not host.subnet_file.exists()
        daemon.start().wait_ready(2 * PATIENCE)
        daemon.wait_log("^E.*another process holds the iptables lock")
        assert saved(host, LEGACY, "nat") == []
    wait_in_place(host, LEGACY, daemon.subnet())
    daemon.wait_log("Masquerade and forward rules are in place again")
    assert count(daemon, "holds the iptables lock") == 1


@pytest.mark.parametrize("kind", [LEGACY, RESTORE], ids=str)
def test_two_daemons_on_one_host_share_the_chains(make_lab: MakeLab, kind: Kind) -> None:
    lab = make(make_lab, kind)
    host = lab.hosts[0]
    with client_of(lab) as client:
        client.put("/second/config", '{"Network": "10.9.0.0/16", "Backend": {"Type": "host-gw"}}')
    flags = ["--ip-masq", "--iptables-resync=1"]
    one = start(host, kind, *flags)
    second = host.directory / "second.env"
    two = start(host, kind, *flags, "--etcd-prefix=/second", f"--subnet-file={second}")
    lines = saved(host, kind, "nat")
    ours = masquerade_lines(one.subnet())
    theirs = [line for line in lines if line not in ours]
    assert len(theirs) == 4
    assert all("10.9." in line for line in theirs)
    # Each puts back its own, and they come to rest.
    iptables(host, kind, "-t", "nat", "-F")
    eventually(lambda: set(saved(host, kind, "nat")) == set(lines), PATIENCE, "both back")
    # Who writes, writes its own rules first: a quarrel would show in the order.
    settled = saved(host, kind, "nat")
    with pytest.raises(AssertionError):
        eventually(lambda: saved(host, kind, "nat") != settled, 2.5, "a change")
    # The one that ends for good leaves the other's alone.
    two.terminate()
    again = ["--etcd-prefix=/second", f"--subnet-file={second}", "--iptables-forward-rules=false"]
    start(host, kind, *again)
    eventually(lambda: set(saved(host, kind, "nat")) == set(ours), PATIENCE, "ours alone")
    wait_forward(host, kind, forward_lines())


def test_two_daemons_on_one_host_share_the_table_of_nftables(make_lab: MakeLab) -> None:
    lab = make(make_lab, NFTABLES)
    host = lab.hosts[0]
    second = host.directory / "second.env"
    flags = ["--etcd-prefix=/second", f"--subnet-file={second}", "--iptables-resync=1"]

    def configure_second(**keys: object) -> None:
        config = {"Network": "10.9.0.0/16", "Backend": {"Type": "host-gw"}, **keys}
        with client_of(lab) as client:
            client.put("/second/config", json.dumps(config))

    def at_rest() -> None:
        with pytest.raises(AssertionError):
            eventually(lambda: handles() != settled, 2.5, "a change")

    def handles() -> str:
        """The table with the numbers that a rule or chain written anew does not have."""
        return host.run(["nft", "--stateless", "--handle", "list", *TABLE]).stdout

    configure_second(EnableNFTables=True)
    one = start(host, NFTABLES, "--ip-masq", "--iptables-resync=1")
    two = start(host, NFTABLES, "--ip-masq", *flags)
    eventually(lambda: "10.9.0.0/16" in table_text(host), PATIENCE, "both")
    assert nft_text(one.subnet())[:-2] in table_text(host)
    settled = handles()
    at_rest()
    # One that has no --ip-masq takes away its own, and so does one that goes over to iptables.
    two.terminate()
    two = start(host, NFTABLES, *flags)
    wait_in_place(host, NFTABLES, one.subnet())
    settled = handles()
    at_rest()
    two.terminate()
    start(host, NFTABLES, "--ip-masq", *flags).terminate()
    assert "10.9.0.0/16" in table_text(host)
    configure_second()
    start(host, RESTORE, "--ip-masq", *flags)
    eventually(lambda: table_text(host) == nft_text(one.subnet()), PATIENCE, "one's alone")
    settled = handles()
    at_rest()


@pytest.mark.parametrize("kind", [RESTORE, NFTABLES], ids=str)
def test_another_network_while_rules_could_not_be_written_replaces_the_old_ones(
    make_lab: MakeLab, kind: Kind
) -> None:
    """By then nothing names the old network, and a second daemon would have one of its own."""
    lab = make(make_lab, kind)
    host = lab.hosts[0]
    daemon = start(host, kind, "--ip-masq")
    wait_in_place(host, kind, daemon.subnet())
    daemon.terminate()
    configure(lab, kind, Network="10.66.0.0/16")
    daemon = without_tools(lab, "--ip-masq").start()
    daemon.wait_ready(2 * PATIENCE)
    daemon.terminate()
    assert "FLANNEL_NETWORK=10.66.0.0/16" in host.subnet_file.read_text()
    daemon = start(host, kind, "--ip-masq")
    if kind.nftables:
        expected = nft_text(daemon.subnet(), "10.66.0.0/16")
        eventually(lambda: table_text(host) == expected, PATIENCE, "the new rules alone")
    else:
        assert saved(host, kind, "nat") == masquerade_lines(daemon.subnet(), "10.66.0.0/16")
        wait_forward(host, kind, forward_lines("10.66.0.0/16"))


REMOVE_ALL = """
from ipaddress import IPv4Network
from flanneld.masquerade.choose import removals
from flanneld.masquerade.rules import absent

steps = removals(absent([IPv4Network("10.5.0.0/16")]))
print(*(line for step in steps for line in step()), sep="\\n")
"""
REMOVE = """
from ipaddress import IPv4Network
from flanneld.masquerade.choose import choose
from flanneld.masquerade.driver import Commands
from flanneld.masquerade.rules import absent

driver = choose(absent([IPv4Network("10.5.0.0/16")]), {nftables}, Commands()).driver
print(*driver.remove(), sep="\\n")
"""


@pytest.mark.parametrize(
    ("kind", "script"),
    [(RESTORE, REMOVE_ALL), (NFTABLES, REMOVE_ALL), (LEGACY, REMOVE_ALL), (LEGACY, REMOVE)],
    ids=["iptables-restore", "nftables", "python-iptables", "python-iptables itself"],
)
def test_everything_of_flannels_can_be_removed(make_lab: MakeLab, kind: Kind, script: str) -> None:
    lab = make(make_lab, kind)
    host = lab.hosts[0]
    iptables(host, kind, "-P", "FORWARD", "DROP")
    daemon = start(host, kind, "--ip-masq")
    old = four_rules("10.5.0.0/16", "10.5.34.0/24")
    restored(host, kind, "\n".join(["*nat", *old, *FOREIGN, "COMMIT", ""]))
    wait_forward(host, kind, forward_lines())
    daemon.terminate()
    argv = [sys.executable, "-c", script.format(nftables=kind.nftables)]
    output = lab.scratch_file("removed")
    assert host.popen(argv, output=output, env=tools_environment(lab, kind)).wait(30) == 0
    removed = output.read_text()
    assert saved(host, kind, "nat") == FOREIGN
    assert saved(host, kind, "filter") == []
    assert table_text(host) == ""
    assert "filter: chain FLANNEL-FWD with 2 rules" in removed
    assert ("nftables: table ip flannel-ipv4" in removed) is kind.nftables
    assert ("nat: chain FLANNEL-POSTRTG with 5 rules" in removed) is not kind.nftables
    assert removed.count("-A POSTROUTING") == 4 + (not kind.nftables)
