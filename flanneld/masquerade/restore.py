"""The rules through ``iptables -S`` and ``iptables-restore --noflush``.

For the nft variant of iptables, where every call is one transaction of the kernel's, and for the
legacy one where python-iptables cannot be loaded.
"""

import logging
from collections.abc import Sequence

from flanneld.masquerade.driver import (
    LEGACY,
    LOCK_TIMEOUT,
    NF_TABLES,
    Commands,
    Iptables,
    MasqueradeError,
    Verdict,
    find,
    legacy_tables,
)
from flanneld.masquerade.generation import Generation
from flanneld.masquerade.rules import FILTER, NAT, Chain, Edit, Found, Rules, blocks, edit
from flanneld.masquerade.text import parse_list, render, without_false_ends

log = logging.getLogger(__name__)

# Times to read and write again when the rules change in between.
_TRIES = 3

# What iptables says of a chain with a rule of nft's own that it cannot show; v1.8.9 says it also
# of a chain that does not exist.
_INCOMPATIBLE = "is incompatible, use 'nft' tool"
_NO_CHAIN = (_INCOMPATIBLE, "No chain/target/match by that name", "does not exist")


class _UnreadableError(MasqueradeError):
    """A hook has rules that iptables cannot show. The other table can be kept all the same."""

    def __init__(self, chain: Chain) -> None:
        super().__init__(
            f"iptables cannot read {chain.hook} in the table {chain.table}, as nft has put a rule"
            f" into it that iptables does not know (nft list chain ip {chain.table} {chain.hook});"
            " move that rule into a table of its own, or set EnableNFTables in the network config,"
            " and where FORWARD drops, accept the network there yourself"
        )
        self.chain = chain


class RestoreDriver:
    """Implements `driver.Driver`."""

    name = "iptables-restore"

    def __init__(self, iptables: Iptables, rules: Rules, commands: Commands) -> None:
        self._run = commands.run
        self._iptables = iptables
        self._rules = rules if iptables.knows_random_fully else rules.plain()
        self._wait = ["--wait", str(LOCK_TIMEOUT)] if iptables.waits else []
        self._said = False
        self._generation = Generation()

    def supported(self) -> Verdict:
        """Whether some of the rules can be kept; nothing is written."""
        try:
            _, unreadable = self._edits(self._rules.chains)
        except MasqueradeError as error:
            return Verdict(False, str(error))
        lost = [error for error in unreadable if error.chain.rules]
        if lost and len(lost) == sum(bool(chain.rules) for chain in self._rules.chains):
            return Verdict(False, str(lost[0]))
        return Verdict(True, f"the host's iptables is {self._iptables}")

    def check(self) -> bool:
        """Four calls of iptables, each of which lists one chain: a host may have 30,000 rules.

        None, mostly, while nothing in nf_tables changes.
        """
        if self._iptables.variant == NF_TABLES:
            return self._generation.check(self._check)
        return self._check()

    def _check(self) -> bool:
        edits, unreadable = self._edits(self._rules.chains)
        if unreadable and not edits:
            raise unreadable[0]
        return not edits

    def apply(self) -> None:
        """One call of iptables-restore, if anything is to change."""
        self._make(self._rules.chains)

    def remove(self) -> list[str]:
        """Our rules, chains and jumps, and what an original left of the networks."""
        return [line for table in (NAT, FILTER) for line in self.remove_from(table)]

    def remove_from(self, table: str) -> list[str]:
        """The same for one table."""
        chains = [chain for chain in self._rules.nothing().chains if chain.table == table]
        return [line for edit_found in self._make(chains) for line in describe(*edit_found)]

    def _make(self, chains: Sequence[Chain]) -> list[tuple[Edit, Found]]:
        """Make them so; returns what was done."""
        command = [self._iptables.restore, "--noflush", *self._wait]
        tries = 1
        while True:
            edits, unreadable = self._edits(chains)
            try:
                if edits:
                    self._run(command, render(edits))
            except MasqueradeError:
                # A rule to delete may be gone since it was read.
                if tries == _TRIES:
                    raise
                tries += 1
                continue
            if unreadable:
                raise unreadable[0]
            return edits

    def _edits(
        self, chains: Sequence[Chain]
    ) -> tuple[list[tuple[Edit, Found]], list[_UnreadableError]]:
        """What is to change, and what is in the way of the rest."""
        edits: list[tuple[Edit, Found]] = []
        unreadable: list[_UnreadableError] = []
        for chain in chains:
            try:
                found = self._read(chain)
            except _UnreadableError as error:
                unreadable.append(error)
                continue
            change = edit(chain, found)
            if change is not None:
                edits.append((change, found))
        return edits, unreadable

    def _read(self, chain: Chain) -> Found:
        if self._iptables.variant == LEGACY and chain.table not in legacy_tables():
            return Found()  # to list a table that is not there makes it
        try:
            hook = self._list(chain.table, chain.hook)
        except MasqueradeError as error:
            if _INCOMPATIBLE not in str(error):
                raise
            return self._unreadable(chain)
        try:
            own = self._list(chain.table, chain.name)
        except MasqueradeError as error:
            if not any(text in str(error) for text in _NO_CHAIN):
                raise
            own = None
        found = parse_list(chain, hook, own)
        if found is None:
            raise MasqueradeError(
                f"{self._iptables.path} -t {chain.table} -S {chain.hook} does not show the chain"
            )
        return self._checked_ends(chain, found)

    def _list(self, table: str, name: str) -> str:
        return self._run([self._iptables.path, *self._wait, "-t", table, "-S", name])

    def _unreadable(self, chain: Chain) -> Found:
        """Nothing, if none of our rules is wanted or there; otherwise raises an error."""
        nft = find("nft")
        if not chain.rules and nft is not None:
            try:
                self._run([nft, "list", "chain", "ip", chain.table, chain.name])
            except MasqueradeError:
                return Found()
        raise _UnreadableError(chain)

    def _checked_ends(self, chain: Chain, found: Found) -> Found:
        """The same with those last rules only that drop everything in nft's view, too.

        iptables v1.8.9 shows nft's ``ip saddr @blocked drop`` as ``-j DROP``.
        """
        nft = find("nft")
        if (
            self._iptables.variant != NF_TABLES
            or chain.table != FILTER
            or nft is None
            or not blocks(chain, Found(found.hook))
        ):
            return found
        listing = self._run([nft, "--stateless", "list", "chain", "ip", chain.table, chain.hook])
        checked = without_false_ends(chain, found, listing)
        if checked != found and not self._said:
            self._said = True
            log.warning(
                "%s has rules that nft has put there and iptables shows as if they dropped"
                " everything: our jump goes behind them (nft list chain ip %s %s)",
                chain.hook,
                chain.table,
                chain.hook,
            )
        return checked


def describe(change: Edit, found: Found) -> list[str]:
    """What a removal takes away, for the operator."""
    chain = change.chain
    lines = [f"{chain.table}: -A {chain.hook} {found.hook[place].text}" for place in change.delete]
    if found.rules is not None and not change.rules:
        lines.append(f"{chain.table}: chain {chain.name} with {len(found.rules)} rules")
    elif found.rules is not None and len(found.rules) > len(change.rules):
        gone = len(found.rules) - len(change.rules)
        lines.append(f"{chain.table}: {gone} rules of chain {chain.name}")
    return lines
