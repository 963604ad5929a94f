"""The rules in a table of nftables' own, for the config key ``EnableNFTables``.

The table's name is that of flannel since v0.25. It masquerades; the forward rules stay with
iptables, see `rules.Rules.forward_only`.
"""

from flanneld.masquerade.driver import Commands, Driver, MasqueradeError, Verdict
from flanneld.masquerade.rules import Rules, Words, split

TABLE = "ip flannel-ipv4"
CHAIN = "postrtg"

# v0.28 makes this one, too, whatever it serves.
_TABLES = ("ip flannel-ipv4", "ip6 flannel-ipv6")

_VERDICTS = {"RETURN": "return", "ACCEPT": "accept", "MASQUERADE": "masquerade"}


def script(rules: Rules) -> str:
    """The input of ``nft -f`` that puts our table in place at once, whatever was in it.

    Without rules the table goes. No verdict here keeps another table from masquerading.
    """
    # Added first, since a table that is not there cannot be deleted.
    lines = [f"add table {TABLE}", f"delete table {TABLE}"]
    if rules.nat.rules:
        lines += [
            f"table {TABLE} {{",
            f"  chain {CHAIN} {{",
            "    type nat hook postrouting priority 100; policy accept;",
            *(f"    {_rule(rule)}" for rule in rules.nat.rules),
            "  }",
            "}",
        ]
    return "".join(f"{line}\n" for line in lines)


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
        # What the table looks like when it is right. Each version of nft shows it its own way.
        self._shown: str | None = None

    def supported(self) -> Verdict:
        """Whether the kernel would take the table; drops ``fully-random`` if only that fails."""
        try:
            self._submit(self._rules, "--check")
        except MasqueradeError as error:
            try:
                self._submit(self._rules.plain(), "--check")
            except MasqueradeError:
                return Verdict(False, str(error))
            self._rules = self._rules.plain()
        where = " and the forward rules in iptables" if self._forward else ""
        return Verdict(True, f"EnableNFTables is set; {self._nft}, table {TABLE}{where}")

    def check(self) -> bool:
        """One call of nft, and what the forward rules cost."""
        if self._rules.nat.rules:
            as_wanted = self._shown is not None and self._show(TABLE) == self._shown
        else:
            as_wanted = self._show(TABLE) is None
        return as_wanted and (self._forward is None or self._forward.check())

    def apply(self) -> None:
        """One transaction. Connections keep the addresses they have."""
        self._submit(self._rules)
        self._shown = self._show(TABLE)
        if self._forward is not None:
            self._forward.apply()

    def remove(self) -> list[str]:
        """Flannel's tables, those of later originals included."""
        return self.remove_tables() + (self._forward.remove() if self._forward else [])

    def remove_tables(self) -> list[str]:
        """The same without what is in iptables."""
        there = [table for table in _TABLES if self._show(table) is not None]
        for table in there:
            self._run([self._nft, "delete", "table", *table.split()])
        return [f"nftables: table {table}" for table in there]

    def _submit(self, rules: Rules, *flags: str) -> None:
        self._run([self._nft, *flags, "--file", "-"], script(rules))

    def _show(self, table: str) -> str | None:
        """The table without counters; None if there is none."""
        try:
            return self._run([self._nft, "--stateless", "list", "table", *table.split()])
        except MasqueradeError as error:
            if "No such file or directory" in str(error):
                return None
            raise
