"""A check of rules that nobody has touched starts no process; whatever is done to them is noticed.

Each test looks through the driver itself, check by check: a daemon looks again a moment later, and
in full once in a while.
"""

import json
import sys

import pytest
from firewall import LEGACY, NFTABLES, RESTORE, Kind, make, tools_environment
from network import MakeLab

from flanneld.masquerade.generation import COMPLETE_EVERY

# Its forward rules are with the legacy iptables, which the kernel counts no generations of.
NFTABLES_LEGACY = Kind("nftables", "legacy", True)

# A host whose rules are in place. Its FORWARD drops, as docker has it.
HOST = """
import json, os, subprocess, sys
from ipaddress import IPv4Network
from flanneld.masquerade.choose import choose
from flanneld.masquerade.driver import Commands
from flanneld.masquerade.generation import read_generation
from flanneld.masquerade.rules import wanted

STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec")
started = []
sys.addaudithook(lambda event, _: started.append(event) if event in STARTS else None)

def shell(text):
    subprocess.run(["sh", "-ec", text], check=True)

def check():
    began = len(started)
    return driver.check(), len(started) - began

def put():
    shell("iptables -w -P FORWARD DROP")
    driver.apply()

network, subnet = IPv4Network("10.5.0.0/16"), IPv4Network("10.5.34.0/24")
rules = wanted(network, subnet, masquerade=True, forward=True)
shell("iptables -w -P FORWARD DROP")
driver = choose(rules, sys.argv[1] == "nftables", Commands()).driver
put()
"""


def run(make_lab: MakeLab, kind: Kind, script: str, *arguments: str) -> list[list[int]]:
    """Run this on a host; return the pairs it prints: is all as wanted, and processes started."""
    lab = make(make_lab, kind)
    argv = [sys.executable, "-c", HOST + script, kind.driver, *arguments]
    output = lab.scratch_file("output")
    process = lab.hosts[0].popen(argv, output=output, env=tools_environment(lab, kind))
    assert process.wait(60) == 0, output.read_text()
    found: list[list[int]] = json.loads(output.read_text().splitlines()[-1])
    return found


CHECKS = """
print(json.dumps([check() for _ in range(int(sys.argv[2]))]))
"""


@pytest.mark.parametrize(
    ("kind", "complete"),
    [(LEGACY, 0), (RESTORE, 4), (NFTABLES, 5), (NFTABLES_LEGACY, 1)],
    ids=["python-iptables", "iptables-restore", "nftables", "nftables and legacy iptables"],
)
def test_an_undisturbed_check_starts_no_process(
    make_lab: MakeLab, kind: Kind, complete: int
) -> None:
    """But for one in so many, which lists what is there."""
    turn = [[True, complete], *[[True, 0]] * (COMPLETE_EVERY - 1)]
    assert run(make_lab, kind, CHECKS, str(2 * COMPLETE_EVERY)) == 2 * turn


FOREIGN = """
found = [check(), check()]
for text in sys.argv[2:]:
    shell(text)
    found += [check(), check()]
print(json.dumps(found))
"""


def test_what_others_do_elsewhere_leads_to_a_look_and_to_nothing_else(make_lab: MakeLab) -> None:
    ways = (
        "nft add table ip other",
        "nft add chain ip other x; nft add rule ip other x accept",
        "iptables -w -t nat -I POSTROUTING -s 192.0.2.1 -j RETURN",
        "iptables -w -I FORWARD -s 192.0.2.1 -j DROP",
    )
    assert run(make_lab, RESTORE, FOREIGN, *ways) == [[True, 4], [True, 0]] * (1 + len(ways))


# After each, the rules are put in place anew. What is printed: the checks before it, the one after,
# and those after the rules are back.
DISTURBED = """
found = []
for text in sys.argv[2:]:
    put()
    found += [check(), check()]
    shell(text)
    found.append(check())
    driver.apply()
    found.append(check())
print(json.dumps(found))
"""

IN_IPTABLES = {
    "nat is flushed": "iptables -w -t nat -F",
    "filter is flushed": "iptables -w -F",
    "the ruleset is flushed": "nft flush ruleset",
    "a masquerade rule is gone": "iptables -w -t nat -D FLANNEL-POSTRTG 3",
    "a forward rule is gone": "iptables -w -D FLANNEL-FWD 1",
    "a foreign rule before ours": "iptables -w -t nat -I FLANNEL-POSTRTG -j ACCEPT",
    "another before ours": "iptables -w -I FLANNEL-FWD -s 192.0.2.1 -j DROP",
    "a rule of nft's before ours": "nft insert rule ip nat FLANNEL-POSTRTG counter accept",
    "the jump is gone": "iptables -w -t nat -F POSTROUTING",
    "the jump is doubled": "iptables -w -A FORWARD -j FLANNEL-FWD",
    "one for another": "iptables -w -t nat -R FLANNEL-POSTRTG 2 -s 10.5.0.0/16 -j ACCEPT",
}
FORWARD_RULES = {
    "filter is flushed": "iptables -w -F",
    "a forward rule is gone": "iptables -w -D FLANNEL-FWD 1",
    "the jump is gone": "iptables -w -F FORWARD",
    "they are not wanted any more": "iptables -w -P FORWARD ACCEPT",
}
_FIRST = "$(nft -a list chain ip flannel-ipv4 postrtg | sed -n 's/.* return # handle //p')"
IN_NFTABLES = {
    "the ruleset is flushed": "nft flush ruleset",
    "the table is gone": "nft delete table ip flannel-ipv4",
    "the chain is empty": "nft flush chain ip flannel-ipv4 postrtg",
    "a rule is gone": f"nft delete rule ip flannel-ipv4 postrtg handle {_FIRST}",
    "a foreign rule before ours": "nft insert rule ip flannel-ipv4 postrtg accept",
    "one for another": f"nft replace rule ip flannel-ipv4 postrtg handle {_FIRST} counter",
    **FORWARD_RULES,
}


@pytest.mark.parametrize(
    ("kind", "ways"),
    [(RESTORE, IN_IPTABLES), (NFTABLES, IN_NFTABLES), (NFTABLES_LEGACY, IN_NFTABLES)],
    ids=["iptables-restore", "nftables", "nftables and legacy iptables"],
)
def test_whatever_is_done_to_the_rules_the_next_check_sees(
    make_lab: MakeLab, kind: Kind, ways: dict[str, str]
) -> None:
    found = iter(run(make_lab, kind, DISTURBED, *ways.values()))
    for what in ways:
        rounds = [next(found) for _ in range(4)]
        # The one before it was spared, so it is not that all checks are complete.
        assert rounds[1][1] == 0, what
        assert [good for good, _ in rounds] == [True, True, False, True], what


REFUSED = """
import os, resource
answers = [read_generation()]
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 4096))
answers.append(read_generation())
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
os.setresuid(65534, 65534, 65534)
answers.append(read_generation())
print(json.dumps([[answer is not None] for answer in answers]))
"""


def test_where_the_kernel_refuses_the_question_there_is_no_answer(make_lab: MakeLab) -> None:
    """Without a socket, and without CAP_NET_ADMIN. What that leads to is a unit test."""
    assert run(make_lab, RESTORE, REFUSED) == [[True], [False], [False]]


MANY_CHECKS = """
import gc
counts = []
for _ in range(2):
    for _ in range(200):
        assert driver.check()
    counts.append(len(gc.get_objects()))
print(json.dumps([counts]))
"""


def test_checks_leave_no_objects_behind(make_lab: MakeLab) -> None:
    """python-iptables leaves circles of objects. Two and more of each check were kept for hours."""
    ((before, after),) = run(make_lab, LEGACY, MANY_CHECKS)
    assert after - before < 200


TRACES = """
shell("iptables -w -S >/dev/null; iptables -w -t nat -S >/dev/null")
driver = choose(rules, False, Commands()).driver
from flanneld.masquerade import iptc

def traces():
    for chain in rules.chains:
        iptc._read(chain)
    with open("/proc/net/ip_tables_names") as names:
        return sorted(names), len(os.listdir("/proc/self/fd"))

before = traces()
put()
print(json.dumps([before, traces()]))
"""


def test_writing_makes_no_table_and_keeps_no_descriptor(make_lab: MakeLab) -> None:
    lab = make(make_lab, LEGACY)
    script = HOST.rpartition("shell(")[0] + TRACES
    output, environment = lab.scratch_file("output"), tools_environment(lab, LEGACY)
    process = lab.hosts[0].popen([sys.executable, "-c", script], output=output, env=environment)
    assert process.wait(60) == 0, output.read_text()
    before, after = json.loads(output.read_text().splitlines()[-1])
    assert before[0] == ["filter\n", "nat\n"]
    assert after == before
