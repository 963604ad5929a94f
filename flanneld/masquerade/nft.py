"""The rules in a table of nftables' own, for the config key ``EnableNFTables``.

The table's name is that of flannel since v0.25. Each daemon of the host has a chain of its own in
it. It masquerades; the forward rules stay with iptables, see `rules.Rules.forward_only`.
"""

import re
from collections.abc import Collection, Mapping
from zlib import crc32

from flanneld.masquerade.driver import Commands, Driver, MasqueradeError, Verdict
from flanneld.masquerade.generation import Generation
from flanneld.masquerade.rules import Rules, Words, split

TABLE = "ip flannel-ipv4"
CHAIN = "postrtg"

# v0.28 makes this one, too, whatever it serves.
TABLE_6 = "ip6 flannel-ipv6"

_VERDICTS = {"RETURN": "return", "ACCEPT": "accept", "MASQUERADE": "masquerade"}


def script(rules: Rules, gone: Collection[str] = (), *, whole: bool = False) -> str:
    """The input of ``nft -f`` that puts this daemon's chain into the table, at once.

    The chains ``gone`` go, or the ``whole`` table with all it has. No verdict here keeps another
    table from masquerading.
    """
    # Added first, since what is not there cannot be deleted.
    lines = [f"add table {TABLE}", f"delete table {TABLE}"] if whole else []
    for name in gone:
        lines += [f"add table {TABLE}", f"add chain {TABLE} {name}"]
        lines += [f"flush chain {TABLE} {name}", f"delete chain {TABLE} {name}"]
    if rules.nat.rules:
        lines += [
            f"table {TABLE} {{",
            f"  chain {chain_of(rules)} {{",
            "    type nat hook postrouting priority 100; policy accept;",
            *(f"    {_rule(rule)}" for rule in rules.nat.rules),
            "  }",
            "}",
        ]
    return "".join(f"{line}\n" for line in lines)


def chain_of(rules: Rules) -> str:
    """The name of this daemon's chain: `CHAIN` for one with the default subnet file."""
    instance = rules.nat.instance
    return f"{CHAIN}-{crc32(instance.encode()):08x}" if instance else CHAIN


def chains(listing: str) -> dict[str, str]:
    """The chains of a table that nft lists, by name."""
    return dict(re.findall(r"^\tchain (\S+) \{\n(.*?)^\t\}", listing, re.MULTILINE | re.DOTALL))


def ours(rules: Rules, there: Mapping[str, str]) -> list[str]:
    """The chains that are this daemon's: its own, and others that name one of its networks."""
    own = rules.nat.own
    if own is None:
        return list(there)
    names = re.compile("|".join(rf"(?<![\d.]){re.escape(str(each))}(?!\d)" for each in own))
    return [name for name in there if name == chain_of(rules) or names.search(there[name])]


def _rule(rule: Words) -> str:
    """A rule of ours in nft's words."""
    words = []
    for option in split(rule):
        match option:
            case ("-s", network):
                words.append(f"ip saddr {network}")
            case ("!", "-s", network):
                words.append(f"ip saddr != {network}")
            case ("-d", network):
                words.append(f"ip daddr {network}")
            case ("!", "-d", network):
                words.append(f"ip daddr != {network}")
            case ("--mark", mark):
                value, _, mask = mark.partition("/")
                words.append(f"meta mark and {mask} == {value}")
            case ("-j", target):
                words.append(_VERDICTS[target])
            case ("--random-fully",):
                words.append("fully-random")
    return " ".join(words)


class NftDriver:
    """Implements `driver.Driver`. ``forward`` is the driver of the host's iptables, if any."""

    name = "nftables"

    def __init__(self, nft: str, rules: Rules, forward: Driver | None, commands: Commands) -> None:
        self._run = commands.run
        self._nft = nft
        self._rules = rules
        self._forward = forward
        # What our chain looks like when it is right. Each version of nft shows it its own way.
        self._shown: str | None = None
        self._generation = Generation()

    def supported(self) -> Verdict:
        """Whether the kernel would take the table; drops ``fully-random`` if only that fails."""
        try:
            self._submit(script(self._rules), "--check")
        except MasqueradeError as error:
            try:
                self._submit(script(self._rules.plain()), "--check")
            except MasqueradeError:
                return Verdict(False, str(error))
            self._rules = self._rules.plain()
        where = " and the forward rules in iptables" if self._forward else ""
        return Verdict(True, f"EnableNFTables is set; {self._nft}, table {TABLE}{where}")

    def check(self) -> bool:
        """One call of nft, or mostly none while nothing changes, and what the forward rules cost.

        These may be the legacy iptables', of which no generation tells.
        """
        as_wanted = self._generation.check(self._check)
        return as_wanted and (self._forward is None or self._forward.check())

    def _check(self) -> bool:
        there = chains(self._show(TABLE) or "")
        found = ours(self._rules, there)
        if self._rules.nat.rules:
            name = chain_of(self._rules)
            return found == [name] and there[name] == self._shown
        return not found

    def apply(self) -> None:
        """One transaction. Connections keep the addresses they have."""
        self._make(self._rules)
        self._shown = chains(self._show(TABLE) or "").get(chain_of(self._rules))
        if self._forward is not None:
            self._forward.apply()

    def remove(self) -> list[str]:
        """Flannel's chains and tables, those of later originals included.

        Not those of a second daemon's networks.
        """
        removed = self._make(self._rules.nothing())
        if self._show(TABLE) is None and self._show(TABLE_6) is not None:
            self._run([self._nft, "delete", "table", *TABLE_6.split()])
            removed.append(f"nftables: table {TABLE_6}")
        return removed + (self._forward.remove() if self._forward else [])

    def _make(self, rules: Rules) -> list[str]:
        """Make our part of the table so; returns what was there of it."""
        listing = self._show(TABLE)
        there = chains(listing or "")
        gone = ours(rules, there)
        whole = listing is not None and len(gone) == len(there)
        if not rules.nat.rules and not gone and not whole:
            return []
        self._submit(script(rules, () if whole else gone, whole=whole))
        if whole:
            return [f"nftables: table {TABLE}"]
        return [f"nftables: chain {name} of table {TABLE}" for name in gone]

    def _submit(self, text: str, *flags: str) -> None:
        self._run([self._nft, *flags, "--file", "-"], text)

    def _show(self, table: str) -> str | None:
        """The table without counters; None if there is none."""
        try:
            return self._run([self._nft, "--stateless", "list", "table", *table.split()])
        except MasqueradeError as error:
            if "No such file or directory" in str(error):
                return None
            raise
