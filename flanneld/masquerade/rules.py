"""Which rules this host needs, and how what is there becomes that. Pure.

Two chains are ours, named as in flannel since v0.20, each reached by one jump:

    nat     POSTROUTING -> FLANNEL-POSTRTG    the original's four rules, in its order
    filter  FORWARD     -> FLANNEL-FWD        accept the network's packets

A rule is a tuple of words as iptables takes and prints them. Two rules are the same if their
options are, in whatever order: see `options`.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from zlib import crc32

Words = tuple[str, ...]
Options = frozenset[Words]

NAT = "nat"
FILTER = "filter"
MASQ_CHAIN = "FLANNEL-POSTRTG"
FORWARD_CHAIN = "FLANNEL-FWD"
# The comments that flannel's rules carry since v0.16.2.
MASQ_COMMENT = "flanneld masq"
FORWARD_COMMENT = "flanneld forward"

# The subnet file unless --subnet-file names another.
DEFAULT_FILE = "/run/flannel/subnet.env"
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./-]{1,200}")

MULTICAST = "224.0.0.0/4"
# Kubernetes' kube-proxy sets this bit on packets that it will masquerade itself.
KUBE_MARK = "0x4000/0x4000"

# The options of a rule that every packet meets.
_NO_CONDITION = frozenset({"-m", "--comment", "-j", "--reject-with"})


@dataclass(frozen=True, slots=True)
class Chain:
    """One of our chains and the jump to it; without ``rules`` there must be neither.

    ``instance``: which daemon of this host it is, see `instance_of`. Its rules carry it in their
    comment, after the words all flannels have there.
    ``own``: the networks of this daemon, now and formerly. Rules of another instance, for a network
    apart from them, are a second daemon's; None: there is no such thing.
    ``networks``: of these, rules that an original wrote straight into the hook must be gone.
    ``if_blocked``: the rules are wanted only while the hook drops what no rule accepts.
    """

    table: str
    hook: str
    name: str
    comment: str
    rules: tuple[Words, ...] = ()
    instance: str = ""
    own: tuple[IPv4Network, ...] | None = None
    networks: tuple[IPv4Network, ...] = ()
    if_blocked: bool = False

    @property
    def jump(self) -> Words:
        """The one rule of ours in the hook, which is all daemons'."""
        return (*_comment(self.comment), "-j", self.name)

    @property
    def own_comment(self) -> str:
        """The comment of this daemon's rules in the chain."""
        return f"{self.comment} {self.instance}".rstrip()


@dataclass(frozen=True, slots=True)
class Rules:
    """The chains of both tables."""

    nat: Chain
    filter: Chain

    @property
    def chains(self) -> tuple[Chain, Chain]:
        return self.nat, self.filter

    def plain(self) -> "Rules":
        """The same without ``--random-fully``, which iptables before 1.6.2 does not know."""
        kept = tuple(
            tuple(word for word in rule if word != "--random-fully") for rule in self.nat.rules
        )
        return replace(self, nat=replace(self.nat, rules=kept))

    def nothing(self) -> "Rules":
        """No rules of this daemon. Those of a second one stay."""
        return Rules(replace(self.nat, rules=()), replace(self.filter, rules=()))

    def forward_only(self) -> "Rules":
        """What iptables holds while nftables masquerades: at most the forward rules.

        An accept in a table of nftables cannot overrule a drop in iptables, so it has to stand
        there; and only while there is one.
        """
        return Rules(replace(self.nat, rules=()), replace(self.filter, if_blocked=True))


def wanted(
    network: IPv4Network,
    subnet: IPv4Network,
    *,
    masquerade: bool,
    forward: bool,
    random_fully: bool = True,
    instance: str = "",
    former_network: IPv4Network | None = None,
) -> Rules:
    """The rules of a host with this subnet of this network.

    Traffic from container to container and from outside to our own containers keeps its
    addresses; what leaves the network is masqueraded, but for multicast, and so is what comes
    from outside (the hosts themselves, mostly) for another host's containers, so that the
    answers come back here. In v0.8.0's POSTROUTING a RETURN was the end of it. In a chain of its
    own only ACCEPT is: a RETURN would leave the packet to whatever masquerades behind us.

    ``instance`` is `instance_of` the subnet file. ``former_network``: the network of the last run,
    whose rules must go as well, whoever wrote them.
    """
    n, s = str(network), str(subnet)
    no_nat = replace(_NO_NAT, instance=instance)
    no_forward = replace(_NO_FORWARD, instance=instance)
    masq = _comment(no_nat.own_comment)
    forw = _comment(no_forward.own_comment)
    translate = ("-j", "MASQUERADE", *(("--random-fully",) if random_fully else ()))
    nat: tuple[Words, ...] = (
        _KUBE_RULE,
        ("-s", n, "-d", n, *masq, "-j", "ACCEPT"),
        ("-s", n, "!", "-d", MULTICAST, *masq, *translate),
        ("!", "-s", n, "-d", s, *masq, "-j", "ACCEPT"),
        ("!", "-s", n, "-d", n, *masq, *translate),
    )
    accept: tuple[Words, ...] = (
        ("-s", n, *forw, "-j", "ACCEPT"),
        ("-d", n, *forw, "-j", "ACCEPT"),
    )
    own = tuple(dict.fromkeys(each for each in (network, former_network) if each))
    # Without --ip-masq such rules cannot be told from those that the operator wrote instead.
    old = own if masquerade else ()
    return Rules(
        replace(no_nat, rules=nat if masquerade else (), own=own, networks=old),
        replace(no_forward, rules=accept if forward else (), own=own, networks=old),
    )


def instance_of(subnet_file: str) -> str:
    """What tells the daemon with this subnet file from others on its host; empty for the default.

    Each must have a file of its own. So rules of a network it had long ago are known as its own.
    """
    directory, name = os.path.split(os.path.abspath(subnet_file))
    path = os.path.join(os.path.realpath(directory), name)
    if path in (DEFAULT_FILE, os.path.realpath(DEFAULT_FILE)):
        return ""
    # A comment holds 255 bytes, and not all of them well.
    return path if _PLAIN_PATH.fullmatch(path) else f"{crc32(os.fsencode(path)):08x}"


def absent(networks: Iterable[IPv4Network] = ()) -> Rules:
    """No rules at all: neither chains and jumps nor what originals left of these networks."""
    old = tuple(dict.fromkeys(networks))
    return Rules(replace(_NO_NAT, networks=old), replace(_NO_FORWARD, networks=old))


def _comment(text: str) -> Words:
    return ("-m", "comment", "--comment", text)


_NO_NAT = Chain(NAT, "POSTROUTING", MASQ_CHAIN, MASQ_COMMENT)
_NO_FORWARD = Chain(FILTER, "FORWARD", FORWARD_CHAIN, FORWARD_COMMENT)
_KUBE_RULE = ("-m", "mark", "--mark", KUBE_MARK, *_comment(MASQ_COMMENT), "-j", "RETURN")


@dataclass(frozen=True, slots=True)
class Line:
    """A rule that is there: its options, its words, the text that names it to ``iptables -D``."""

    options: Options
    words: Words
    text: str


@dataclass(frozen=True, slots=True)
class Found:
    """What is there of one chain: the hook's rules and policy, and our chain's rules if it is."""

    hook: tuple[Line, ...] = ()
    policy: str = "ACCEPT"
    rules: tuple[Line, ...] | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """What to change for one chain, in one atomic step.

    ``delete``: places in the hook, from 0, as they are before the change. ``jump_at``: where the
    jump goes once these are gone; None if the right one is there. ``rules``: the new content of
    our chain; empty: the chain goes.
    """

    chain: Chain
    delete: tuple[int, ...]
    jump_at: int | None
    at_end: bool
    rules: tuple[Words, ...]


def edit(chain: Chain, found: Found) -> Edit | None:
    """What makes ``found`` be as wanted; None if it is."""
    rules = chain.rules if not chain.if_blocked or blocks(chain, found) else ()
    others = [line for line in found.rules or () if _is_anothers(chain, line)]
    if others and not rules and chain.table == NAT:
        rules = (_KUBE_RULE,)
    mine = [line.options for line in found.rules or () if line not in others]
    as_wanted = mine == [options(rule) for rule in rules]
    rules = (*rules, *(line.words for line in others))
    jumps = [place for place, line in enumerate(found.hook) if _is_jump(chain, line)]
    stale = [place for place, line in enumerate(found.hook) if is_stale(chain, line)]
    # Of several, a deletion by its text would take the first, wherever the right one stands.
    keep = jumps if rules and len(jumps) == 1 and _is_right(chain, found.hook, jumps[0]) else []
    delete = sorted({*stale, *jumps}.difference(keep))
    as_wanted = as_wanted and (found.rules is not None) == bool(rules)
    if as_wanted and not delete and bool(keep) == bool(rules):
        return None
    left = [line for place, line in enumerate(found.hook) if place not in delete]
    at = None if keep or not rules else _place(chain, left)
    return Edit(chain, tuple(delete), at, at == len(left), rules)


def blocks(chain: Chain, found: Found) -> bool:
    """Whether a packet that no rule accepts is dropped in this hook."""
    others = [line for line in found.hook if not _is_jump(chain, line)]
    return found.policy == "DROP" or bool(others and is_catch_all(others[-1]))


def is_stale(chain: Chain, line: Line) -> bool:
    """Whether an original wrote this rule straight into the hook, for one of the networks.

    In nat: v0.8.0's four rules, and the same with what v0.11 (``--random-fully``) and v0.16.2
    (the comment) added. In filter only with the comment: without it, it may be anybody's.
    """
    bare = line.options - options(_comment(chain.comment))
    if chain.table == FILTER:
        if bare == line.options:
            return False
        return any(_is_accepted(network, bare) for network in chain.networks)
    bare -= {("--random-fully",)}
    return any(_is_of_the_four(network, bare) for network in chain.networks)


def _is_anothers(chain: Chain, line: Line) -> bool:
    """Whether a second daemon on this host, with a network of its own, put this into our chain."""
    comments = [option[1] for option in line.options if option[0] == "--comment" and option[1:]]
    if chain.own is None or len(comments) != 1 or comments[0] == chain.own_comment:
        return False
    if comments[0] != chain.comment and not comments[0].startswith(f"{chain.comment} "):
        return False
    bare = line.options - options(_comment(comments[0]))
    sources = [option[-1] for option in bare if option[-2:-1] in (("-s",), ("-d",))]
    try:
        networks = [IPv4Network(source) for source in sources if source != MULTICAST]
    except ValueError:
        return False
    if any(each.overlaps(mine) for each in networks for mine in chain.own):
        return False
    if chain.table == FILTER:
        return any(_is_accepted(network, bare) for network in networks)
    # An ACCEPT of ours is a RETURN of the originals'.
    bare = (bare - {("--random-fully",), ("-j", "ACCEPT")}) | (
        {("-j", "RETURN")} if ("-j", "ACCEPT") in bare else set()
    )
    return any(_is_of_the_four(network, bare) for network in networks)


def _is_accepted(network: IPv4Network, bare: Options) -> bool:
    return any(bare == options((flag, str(network), "-j", "ACCEPT")) for flag in ("-s", "-d"))


def _is_of_the_four(network: IPv4Network, bare: Options) -> bool:
    n = str(network)
    if bare in (
        options(("-s", n, "-d", n, "-j", "RETURN")),
        options(("-s", n, "!", "-d", MULTICAST, "-j", "MASQUERADE")),
        options(("!", "-s", n, "-d", n, "-j", "MASQUERADE")),
    ):
        return True
    # The third names the subnet. v0.8.0 left one behind for each subnet it ever had.
    rest = bare - options(("!", "-s", n, "-j", "RETURN"))
    if len(rest) != 1 or len(bare) != 3:
        return False
    (option,) = rest
    if len(option) != 2 or option[0] != "-d":
        return False
    try:
        subnet = IPv4Network(option[1])
    except ValueError:
        return False
    return subnet != network and subnet.subnet_of(network)


def _is_jump(chain: Chain, line: Line) -> bool:
    return ("-j", chain.name) in line.options or ("-g", chain.name) in line.options


def _is_right(chain: Chain, hook: Sequence[Line], place: int) -> bool:
    """Whether this jump is as wanted, and can be reached by what the hook's other rules let by."""
    others = [*hook[:place], *hook[place + 1 :]]
    return hook[place].options == options(chain.jump) and (
        chain.table != FILTER or place <= _place(chain, others)
    )


def is_catch_all(line: Line) -> bool:
    """Whether nothing gets past this rule, as far as its options say."""
    targets = {option[1:] for option in line.options if option[0] == "-j"}
    return targets in ({("DROP",)}, {("REJECT",)}) and all(
        option[0] in _NO_CONDITION and (option[0] != "-m" or option[1:] == ("comment",))
        for option in line.options
    )


def _place(chain: Chain, hook: Sequence[Line]) -> int:
    """Where the jump goes: last, so that everybody's more particular rules come first.

    But before a last rule that drops everything, as firewalld's and Red Hat's FORWARD have it:
    behind that it would never be reached.
    """
    last = len(hook)
    if chain.table == FILTER:
        while last and is_catch_all(hook[last - 1]):
            last -= 1
    return last


def options(words: Sequence[str]) -> Options:
    """A rule's options without their order."""
    return frozenset(split(words))


def split(words: Sequence[str]) -> list[Words]:
    """A rule's options with their values, each with its ``!`` in front if it has one."""
    found: list[Words] = []
    negated = False
    for word in words:
        if word == "!":
            negated = True
        elif word.startswith("-") or not found or negated:
            found.append(("!", word) if negated else (word,))
            negated = False
        else:
            found[-1] = (*found[-1], word)
    return found
