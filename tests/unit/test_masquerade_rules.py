"""Which rules are wanted, and what makes the rules that are there become those."""

import re
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanneld.flags import Options
from flanneld.masquerade.nft import chain_of, chains, ours, script
from flanneld.masquerade.rules import (
    Chain,
    Found,
    Rules,
    absent,
    blocks,
    edit,
    instance_of,
    is_stale,
    options,
    wanted,
)
from flanneld.masquerade.text import parse_line, parse_list, render, without_false_ends

FIXTURES = Path(__file__).parent.parent / "fixtures" / "iptables"

N = IPv4Network("10.5.0.0/16")
S = IPv4Network("10.5.34.0/24")
RULES = wanted(N, S, masquerade=True, forward=True)

FROM_NOTHING = """\
*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j ACCEPT
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" \
-j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.34.0/24 -m comment --comment "flanneld masq" -j ACCEPT
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" \
-j MASQUERADE --random-fully
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
COMMIT
"""


def parsed(chain: Chain, save: str) -> Found:
    """Return what is found of a chain when iptables-save says this."""
    own: str | None = None
    table, policy, hook = "", "ACCEPT", ""
    for line in save.splitlines():
        word = line.split(" ")[0]
        if line.startswith("*"):
            table = word[1:]
        elif table != chain.table:
            continue
        elif word == f":{chain.name}":
            own = f"-N {chain.name}\n"
        elif word == f":{chain.hook}":
            policy = line.split(" ")[1]
        elif line.startswith(f"-A {chain.hook} "):
            hook += f"{line}\n"
        elif line.startswith(f"-A {chain.name} "):
            own = f"{own or ''}{line}\n"
    found = parse_list(chain, f"-P {chain.hook} {policy}\n{hook}", own)
    assert found is not None
    return found


def payload(rules: Rules, save: str) -> str:
    """Return what iptables-restore is to be given when iptables-save says this."""
    found = {chain.table: parsed(chain, save) for chain in rules.chains}
    edits = [(edit(chain, found[chain.table]), found[chain.table]) for chain in rules.chains]
    return render((change, there) for change, there in edits if change is not None)


def table(name: str, *lines: str, chains: str = "") -> str:
    return "\n".join([f"*{name}", *chains.split("|"), *lines, "COMMIT", ""])


def carried_out(
    save: dict[str, dict[str, list[str]]], text: str
) -> dict[str, dict[str, list[str]]]:
    """Do to tables (chains of rule texts) what iptables-restore --noflush would."""
    tables = {name: {c: [*rules] for c, rules in chains.items()} for name, chains in save.items()}
    now: dict[str, list[str]] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if line.startswith("*"):
            now = tables[line[1:]]
        elif line.startswith(":"):
            now[word[1:]] = []
        elif word == "-X":
            assert now.pop(rest) == []
        elif word != "COMMIT":
            chain, _, rule = rest.partition(" ")
            if word == "-A":
                now[chain].append(rule)
            elif word == "-D":
                now[chain].remove(rule)
            else:
                assert word == "-I"
                number, _, rule = rule.partition(" ")
                assert int(number) <= len(now[chain]) + 1
                now[chain].insert(int(number) - 1, rule)
    return tables


def as_save(tables: dict[str, dict[str, list[str]]]) -> str:
    lines = []
    for name, table in tables.items():
        lines.append(f"*{name}")
        lines += [f":{chain} - [0:0]" for chain in table]
        lines += [f"-A {chain} {rule}" for chain, rules in table.items() for rule in rules]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


# --- golden texts


def test_the_text_for_iptables_restore() -> None:
    assert payload(RULES, "") == FROM_NOTHING


def test_what_is_right_is_not_touched() -> None:
    assert payload(RULES, FROM_NOTHING) == ""


def test_the_text_for_nft() -> None:
    assert (
        script(RULES)
        == """\
table ip flannel-ipv4 {
  chain postrtg {
    type nat hook postrouting priority 100; policy accept;
    meta mark and 0x4000 == 0x4000 return
    ip saddr 10.5.0.0/16 ip daddr 10.5.0.0/16 accept
    ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
    ip saddr != 10.5.0.0/16 ip daddr 10.5.34.0/24 accept
    ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 masquerade fully-random
  }
}
"""
    )
    assert script(absent()) == ""
    whole = "add table ip flannel-ipv4\ndelete table ip flannel-ipv4\n"
    assert script(absent(), whole=True) == whole
    assert script(RULES, whole=True) == whole + script(RULES)
    assert (
        script(absent(), ["old"])
        == """\
add table ip flannel-ipv4
add chain ip flannel-ipv4 old
flush chain ip flannel-ipv4 old
delete chain ip flannel-ipv4 old
"""
    )


def test_which_chains_of_the_table_are_ours() -> None:
    fixture = (FIXTURES / "v0289-nftables-constructed.txt").read_text()
    there = chains(fixture)
    assert sorted(there) == ["forward", "postrtg"]
    assert there["forward"].endswith("\t\tip daddr 10.5.0.0/16 accept\n")
    assert ours(RULES, there) == ["forward", "postrtg"]
    far = IPv4Network("110.5.0.0/16")
    assert ours(wanted(far, far, masquerade=True, forward=True), there) == ["postrtg"]
    second = wanted(far, far, masquerade=True, forward=True, instance="/b.env")
    assert ours(second, there) == []
    assert ours(absent(), there) == ["forward", "postrtg"]
    moved = wanted(far, far, masquerade=True, forward=True, instance="/b.env", former_network=N)
    assert ours(moved, there) == ["forward", "postrtg"]
    own = chain_of(second)
    assert re.fullmatch(r"postrtg-[0-9a-f]{8}", own)
    assert ours(second, {own: "", "postrtg-1": ""}) == [own]


def test_without_random_fully() -> None:
    plain = wanted(N, S, masquerade=True, forward=True, random_fully=False)
    assert plain == RULES.plain()
    assert payload(plain, "") == FROM_NOTHING.replace(" --random-fully", "")
    assert script(plain) == script(RULES).replace(" fully-random", "")


@pytest.mark.parametrize(
    ("masquerade", "forward", "tables"),
    [(True, True, ["nat", "filter"]), (True, False, ["nat"]), (False, True, ["filter"]),
     (False, False, [])],
)  # fmt: skip
def test_the_flags_choose_the_chains(masquerade: bool, forward: bool, tables: list[str]) -> None:
    rules = wanted(N, S, masquerade=masquerade, forward=forward)
    assert re.findall(r"^\*(.*)$", payload(rules, ""), re.M) == tables
    # What is no longer wanted goes.
    gone = set(re.findall(r"^-X (.*)$", payload(rules, FROM_NOTHING), re.M))
    names = {"nat": "FLANNEL-POSTRTG", "filter": "FLANNEL-FWD"}
    assert gone == {chain for name, chain in names.items() if name not in tables}


def test_everything_removed() -> None:
    jump = '-m comment --comment "flanneld masq" -j FLANNEL-POSTRTG'
    assert payload(absent(), FROM_NOTHING).splitlines()[:5] == [
        "*nat",
        ":FLANNEL-POSTRTG - [0:0]",
        f"-D POSTROUTING {jump}",
        "-X FLANNEL-POSTRTG",
        "COMMIT",
    ]
    assert payload(absent(), "") == ""


# --- what originals left


@pytest.mark.parametrize(
    "rule",
    [
        "-s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN",
        "-s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
        "! -s 10.5.0.0/16 -d 10.5.34.0/24 -j RETURN",
        "! -s 10.5.0.0/16 -d 10.5.0.0/16 -j MASQUERADE",
        # A subnet it had before.
        "! -s 10.5.0.0/16 -d 10.5.7.0/24 -j RETURN",
        # v0.11, v0.16.2; in another order.
        "-s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
        '! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE',
        '-d 10.5.0.0/16 -s 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN',
    ],
)
def test_a_rule_of_an_original_is_recognised(rule: str) -> None:
    assert is_stale(RULES.nat, parse_line(rule))
    former = wanted(IPv4Network("10.9.0.0/16"), S, masquerade=True, forward=True, former_network=N)
    assert is_stale(former.nat, parse_line(rule))
    other = wanted(IPv4Network("10.9.0.0/16"), S, masquerade=True, forward=True)
    assert not is_stale(other.nat, parse_line(rule))
    # Without --ip-masq it may be the operator's.
    assert not is_stale(wanted(N, S, masquerade=False, forward=True).nat, parse_line(rule))


@pytest.mark.parametrize(
    "rule",
    [
        "-s 10.5.0.0/16 -j RETURN",
        "-s 10.5.0.0/16 -d 10.5.0.0/16 -j ACCEPT",
        "! -s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN",
        "! -s 10.5.0.0/16 ! -d 10.5.34.0/24 -j RETURN",
        "! -s 10.5.0.0/16 -d 10.6.0.0/24 -j RETURN",
        "-s 10.5.0.0/16 -j MASQUERADE",
        "-s 10.5.0.0/16 ! -o docker0 -j MASQUERADE",
        "-s 10.5.0.0/16 ! -d 224.0.0.0/4 -o eth0 -j MASQUERADE",
        "-s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --to-ports 1024-2048",
        '-s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "mine" -j MASQUERADE',
        "! -s 10.5.0.0/16 -d 10.5.34.0/24 -p tcp -j RETURN",
        '-m comment --comment "an unclosed \\" quote" -j ACCEPT',
        '-m string --string "a -j FLANNEL-POSTRTG',
    ],
)
def test_a_foreign_rule_is_left_alone(rule: str) -> None:
    line = parse_line(rule)
    assert not is_stale(RULES.nat, line)
    save = table("nat", f"-A POSTROUTING {rule}", chains=":POSTROUTING ACCEPT [0:0]")
    assert "-D" not in payload(RULES, save)


def test_of_forward_rules_only_those_with_the_comment_are_recognised() -> None:
    bare = "-s 10.5.0.0/16 -j ACCEPT"
    assert not is_stale(RULES.filter, parse_line(bare))
    comment = '-m comment --comment "flanneld forward"'
    assert is_stale(RULES.filter, parse_line(f"-s 10.5.0.0/16 {comment} -j ACCEPT"))
    assert is_stale(RULES.filter, parse_line(f"-d 10.5.0.0/16 {comment} -j ACCEPT"))
    assert not is_stale(RULES.filter, parse_line(f"-d 10.5.0.0/16 {comment} -j DROP"))


# --- a second daemon on the host


def test_the_subnet_file_tells_daemons_apart(tmp_path: Path) -> None:
    assert instance_of(Options().subnet_file) == ""
    assert instance_of("/run/flannel/../flannel//subnet.env") == ""
    assert instance_of("/run/flannel/second.env") == "/run/flannel/second.env"
    (tmp_path / "link").symlink_to("/run/flannel")
    assert instance_of(f"{tmp_path}/link/subnet.env") == ""
    for path in ('/a "quoted" name', f"/{'long/' * 50}", "/\n-j DROP", "/\udcff"):
        assert re.fullmatch(r"[0-9a-f]{8}", instance_of(path))


def test_a_second_daemon_has_its_subnet_file_in_its_comments() -> None:
    second = wanted(N, S, masquerade=True, forward=True, instance="/b.env")
    expected = re.sub(
        r'^(-A FLANNEL.* -[sd] .*flanneld \w+)"', r'\1 /b.env"', FROM_NOTHING, flags=re.M
    )
    assert expected.count("/b.env") == 4 + 2
    assert payload(second, "") == expected
    # One and the same daemon with another file, before and after.
    assert payload(second, expected) == payload(RULES, FROM_NOTHING) == ""
    empty: dict[str, dict[str, list[str]]] = {"nat": {"POSTROUTING": []}, "filter": {"FORWARD": []}}
    for rules, other in ((RULES, second), (second, RULES)):
        one = carried_out(empty, payload(rules, ""))
        moved = carried_out(one, payload(other, as_save(one)))
        assert moved == carried_out(empty, payload(other, ""))


@pytest.mark.parametrize("instance", ["", "/b.env"])
def test_rules_of_a_network_that_nobody_remembers_go(instance: str) -> None:
    """The daemon ended before it could write the new rules, but after the subnet file."""
    lost = IPv4Network("10.66.0.0/16")
    before = wanted(lost, lost, masquerade=True, forward=True, instance=instance)
    after = wanted(N, S, masquerade=True, forward=True, instance=instance)
    empty: dict[str, dict[str, list[str]]] = {"nat": {"POSTROUTING": []}, "filter": {"FORWARD": []}}
    old = carried_out(empty, payload(before, ""))
    assert carried_out(old, payload(after, as_save(old))) == carried_out(empty, payload(after, ""))


@pytest.mark.parametrize("instances", [("", "/b.env"), ("/b.env", ""), ("/a.env", "/b.env")])
def test_two_daemons_with_networks_of_their_own_share_the_chains(
    instances: tuple[str, str],
) -> None:
    mine, theirs = instances
    rules = wanted(N, S, masquerade=True, forward=True, instance=mine)
    other = wanted(
        IPv4Network("10.9.0.0/16"),
        IPv4Network("10.9.7.0/24"),
        masquerade=True,
        forward=True,
        instance=theirs,
    )
    empty: dict[str, dict[str, list[str]]] = {"nat": {"POSTROUTING": []}, "filter": {"FORWARD": []}}
    one = carried_out(empty, payload(rules, ""))
    both = carried_out(one, payload(other, as_save(one)))
    assert payload(rules, as_save(both)) == payload(other, as_save(both)) == ""
    assert len(both["nat"]["FLANNEL-POSTRTG"]) == 1 + 4 + 4
    assert len(both["filter"]["FLANNEL-FWD"]) == 2 + 2
    # What is wrong of one's own is mended, and the other's stays.
    torn = carried_out(both, "*nat\n-D FLANNEL-POSTRTG " + both["nat"]["FLANNEL-POSTRTG"][2])
    text = payload(rules, as_save(torn)) or payload(other, as_save(torn))
    mended = carried_out(torn, text)
    assert payload(rules, as_save(mended)) == payload(other, as_save(mended)) == ""
    # One that wants no rules any more takes its own away only, the last one the chains.
    none = wanted(N, S, masquerade=False, forward=False, instance=mine)
    left = carried_out(both, payload(none, as_save(both)))
    assert payload(other, as_save(left)) == payload(none, as_save(left)) == ""
    assert "10.5." not in as_save(left)
    last = other.nothing()
    assert carried_out(left, payload(last, as_save(left))) == empty
    # A former network of one's own is no second daemon's, and everything can be removed.
    network = other.nat.networks[0]
    moved = wanted(N, S, masquerade=True, forward=True, instance=mine, former_network=network)
    assert "10.9." not in as_save(carried_out(both, payload(moved, as_save(both))))
    assert carried_out(both, payload(absent(), as_save(both))) == empty


# --- where the jump goes


@pytest.mark.parametrize(
    ("forward", "place"),
    [
        ([], 0),
        (["-i lo -j ACCEPT"], 1),
        (["-i lo -j ACCEPT", "-j REJECT --reject-with icmp-host-prohibited"], 1),
        (["-j REJECT", "-j DROP"], 0),
        (['-m comment --comment "the end" -j DROP'], 0),
        (["-j DROP", "-i lo -j ACCEPT"], 2),
        (["-m conntrack --ctstate INVALID -j DROP"], 1),
        (["-i eth0 -j REJECT"], 1),
        (["! -i eth0 -j DROP"], 1),
        (["-j LOG"], 1),
        (["-j DOCKER-USER"], 1),
        (["-m comment --comment x"], 1),
    ],
)
def test_the_jump_is_last_but_before_an_end_that_drops(forward: list[str], place: int) -> None:
    lines = tuple(map(parse_line, forward))
    change = edit(RULES.filter, Found(lines))
    assert change is not None
    assert change.jump_at == place
    assert blocks(RULES.filter, Found(lines)) is (place < len(forward))
    assert blocks(RULES.filter, Found(lines, "DROP"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # Behind the end it would never be reached.
        (["-j REJECT", "JUMP"], ["JUMP", "-j REJECT"]),
        (["-i lo -j ACCEPT", "-j DROP", "JUMP"], ["-i lo -j ACCEPT", "JUMP", "-j DROP"]),
        (["-j DROP", "JUMP", "-j REJECT"], ["JUMP", "-j DROP", "-j REJECT"]),
        # A deletion by its text would take the first one.
        (["JUMP", "-j REJECT", "JUMP"], ["JUMP", "-j REJECT"]),
        (["JUMP", "-i lo -j ACCEPT", "JUMP"], ["-i lo -j ACCEPT", "JUMP"]),
        (["-j FLANNEL-FWD", "-i lo -j ACCEPT", "JUMP"], ["-i lo -j ACCEPT", "JUMP"]),
        # An emergency stop in front of all others is not overruled.
        (["-j DROP", "-i lo -j ACCEPT", "JUMP"], None),
        (["-j DROP", "-i lo -j ACCEPT", "JUMP", "-j REJECT"], None),
        (["JUMP", "-i lo -j ACCEPT", "-j REJECT"], None),
    ],
)
def test_a_jump_is_kept_only_where_it_is_reached(
    before: list[str], after: list[str] | None
) -> None:
    jump = '-m comment --comment "flanneld forward" -j FLANNEL-FWD'
    first, expected = (
        [rule.replace("JUMP", jump) for rule in rules] for rules in (before, after or before)
    )
    ours = [rule.partition(" ")[2].partition(" ")[2] for rule in FROM_NOTHING.splitlines()[11:13]]
    chains = {"FORWARD": first, "FLANNEL-FWD": ours}
    found: dict[str, dict[str, list[str]]] = {"nat": {"POSTROUTING": []}, "filter": chains}
    text = payload(wanted(N, S, masquerade=False, forward=True), as_save(found))
    assert bool(text) is (after is not None)
    assert carried_out(found, text)["filter"] == {"FORWARD": expected, "FLANNEL-FWD": ours}


LISTING = """\
# Warning: table ip filter is managed by iptables-nft, do not touch!
table ip filter {
	chain FORWARD {
		type filter hook forward priority filter; policy accept;
		%s
	}
}
"""


@pytest.mark.parametrize(
    ("listed", "place"),
    [
        (["ip saddr @blocked drop"], 1),
        (["drop"], 0),
        (["counter drop"], 0),
        ([" counter drop"], 0),
        (["counter packets 3 bytes 252 drop"], 0),
        (['/* the end */ counter packets 0 bytes 0 drop comment "x"'], 0),
        (['xt match "comment" counter packets 0 bytes 0 xt target "REJECT"'], 0),
        (["counter reject with icmp type host-prohibited"], 0),
        (["reject with icmpx admin-prohibited"], 0),
        (["reject with tcp reset"], 1),
        (["ct state invalid drop"], 1),
        (["meta mark 0x00000007 counter drop"], 1),
        (["ip saddr @blocked drop", "counter drop"], 1),
        (["counter drop", "ip saddr @blocked drop"], 2),
        (["drop", "drop"], 0),
    ],
)
def test_what_nft_lists_otherwise_is_no_end_that_drops(listed: list[str], place: int) -> None:
    """iptables v1.8.9 shows each of these rules as ``-j DROP``."""
    found = Found((parse_line("-j DROP"),) * len(listed))
    found = without_false_ends(RULES.filter, found, LISTING % "\n\t\t".join(listed))
    change = edit(RULES.filter, found)
    assert change is not None
    assert change.jump_at == place
    assert blocks(RULES.filter, found) is (place < len(listed))
    # A listing that does not fit proves nothing.
    unknown = without_false_ends(RULES.filter, found, "nonsense")
    assert not blocks(RULES.filter, unknown)


def test_nftables_needs_iptables_only_while_it_drops() -> None:
    rules = RULES.forward_only()
    assert payload(rules, "") == ""
    dropping = table("filter", chains=":FORWARD DROP [0:0]")
    ours = FROM_NOTHING[FROM_NOTHING.index("*filter") :]
    assert payload(rules, dropping) == ours
    settled = ours.replace("*filter\n", "*filter\n:FORWARD DROP [0:0]\n")
    assert payload(rules, settled) == ""
    assert "-X FLANNEL-FWD" in payload(rules, ours)
    assert "-X FLANNEL-POSTRTG" in payload(rules, FROM_NOTHING)


# --- properties

FOREIGN = st.sampled_from(
    [
        "-s 192.168.0.0/16 -j MASQUERADE",
        "-s 10.5.0.0/16 -j RETURN",
        "-j KUBE-POSTROUTING",
        "-j DROP",
        "-j REJECT --reject-with icmp-host-prohibited",
        '-m comment --comment "it\\\'s" -j ACCEPT',
        "-o docker0 -j DOCKER",
    ]
)
OURS = st.sampled_from(
    [line.partition(" ")[2].partition(" ")[2] for line in FROM_NOTHING.splitlines() if "-A" in line]
    + [
        "-s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN",
        "! -s 10.5.0.0/16 -d 10.5.9.0/24 -j RETURN",
        "-s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
        "-j FLANNEL-POSTRTG",
        "-j FLANNEL-FWD",
        '-s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
    ]
)
CATCH_ALL = ("-j DROP", "-j REJECT")
LINES = st.lists(FOREIGN | OURS, max_size=8)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for name, hook, chain in (
        ("nat", "POSTROUTING", "FLANNEL-POSTRTG"),
        ("filter", "FORWARD", "FLANNEL-FWD"),
    ):
        found[name] = {hook: draw(LINES), "OTHER": draw(LINES)}
        if draw(st.booleans()):
            found[name][chain] = draw(LINES)
        else:  # nothing can jump to a chain that is not there
            found[name][hook] = [rule for rule in found[name][hook] if chain not in rule]
            found[name]["OTHER"] = [rule for rule in found[name]["OTHER"] if chain not in rule]
    return found


def of_ours(chain: Chain, rule: str) -> bool:
    line = parse_line(rule)
    return is_stale(chain, line) or ("-j", chain.name) in line.options


@settings(deadline=None)
@given(tables(), st.booleans(), st.booleans())
def test_from_any_state_one_step_leads_to_the_wanted_one_and_spares_all_others(
    before: dict[str, dict[str, list[str]]], masquerade: bool, forward: bool
) -> None:
    rules = wanted(N, S, masquerade=masquerade, forward=forward)
    rules = replace(rules, nat=replace(rules.nat, networks=(N,)))
    after = carried_out(before, payload(rules, as_save(before)))
    assert payload(rules, as_save(after)) == ""
    for chain in rules.chains:
        old, new = before[chain.table], after[chain.table]
        assert new["OTHER"] == old["OTHER"]
        spared = [rule for rule in old[chain.hook] if not of_ours(chain, rule)]
        assert [rule for rule in new[chain.hook] if not of_ours(chain, rule)] == spared
        jumps = [at for at, rule in enumerate(new[chain.hook]) if of_ours(chain, rule)]
        assert len(jumps) == bool(chain.rules)
        if jumps and chain.table == "filter":
            behind = new[chain.hook][jumps[0] :]
            assert len(behind) > 1 or not spared or not spared[-1].startswith(CATCH_ALL)
        assert (chain.name in new) == bool(chain.rules)
        if chain.rules:
            assert [parse_line(rule).options for rule in new[chain.name]] == [
                options(rule) for rule in chain.rules
            ]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_upsets_the_parser(text: str) -> None:
    parse_line(text)
    parse_list(RULES.nat, text, None)
    hook = f"-P POSTROUTING ACCEPT\n-A POSTROUTING {text}\n"
    found = parse_list(RULES.nat, hook, f"-A FLANNEL-POSTRTG {text}")
    assert found is not None
    without_false_ends(RULES.filter, found, text)
