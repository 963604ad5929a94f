"""The rules through ``iptables-save`` and ``iptables-restore --noflush``.

For the nft variant of iptables, where every call is one transaction of the kernel's, and for the
legacy one where python-iptables cannot be loaded.
"""

from flanneld.masquerade.driver import (
    LEGACY,
    LOCK_TIMEOUT,
    Iptables,
    MasqueradeError,
    Verdict,
    legacy_tables,
    run,
)
from flanneld.masquerade.rules import Edit, Found, Rules, absent, edit, parse_save, render

# Times to read and write again when the rules change in between.
_TRIES = 3


class RestoreDriver:
    """Implements `driver.Driver`."""

    name = "iptables-restore"

    def __init__(self, iptables: Iptables, rules: Rules) -> None:
        self._iptables = iptables
        self._rules = rules if iptables.knows_random_fully else rules.plain()

    def supported(self) -> Verdict:
        """Whether the rules can be read; nothing is written."""
        try:
            self._read()
        except MasqueradeError as error:
            return Verdict(False, str(error))
        return Verdict(True, f"the host's iptables is {self._iptables}")

    def check(self) -> bool:
        """One call of iptables-save, two for the legacy variant."""
        return not self._edits(self._rules)

    def apply(self) -> None:
        """One call of iptables-restore, if anything is to change."""
        self._make(self._rules)

    def remove(self) -> list[str]:
        """Our chains, their jumps, and what an original left of the networks."""
        gone = absent(self._rules.nat.networks)
        there = self._edits(gone)
        self._make(gone)
        return [line for change, found in there for line in describe(change, found)]

    def _make(self, rules: Rules) -> None:
        command = [self._iptables.restore, "--noflush"]
        if self._iptables.waits:
            command += ["--wait", str(LOCK_TIMEOUT)]
        for tries in range(1, _TRIES + 1):
            edits = self._edits(rules)
            if not edits:
                return
            try:
                run(command, render(edits))
            except MasqueradeError:
                # A rule to delete may be gone since it was read.
                if tries == _TRIES:
                    raise
            else:
                return

    def _edits(self, rules: Rules) -> list[tuple[Edit, Found]]:
        found = self._read()
        edits = ((edit(chain, found[chain.table]), found[chain.table]) for chain in rules.chains)
        return [(change, there) for change, there in edits if change is not None]

    def _read(self) -> dict[str, Found]:
        if self._iptables.variant == LEGACY:
            # Without -t it would make every table there can be.
            there = legacy_tables()
            wanted = [chain.table for chain in self._rules.chains if chain.table in there]
            text = "".join(run([self._iptables.save, "-t", table]) for table in wanted)
        else:
            text = run([self._iptables.save])
        return parse_save(text, self._rules)


def describe(change: Edit, found: Found) -> list[str]:
    """What a removal takes away, for the operator."""
    chain = change.chain
    lines = [f"{chain.table}: -A {chain.hook} {found.hook[place].text}" for place in change.delete]
    if found.rules is not None:
        lines.append(f"{chain.table}: chain {chain.name} with {len(found.rules)} rules")
    return lines
