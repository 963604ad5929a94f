"""Which driver this host's rules go through, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flanneld.masquerade.driver import (
    LEGACY,
    NF_TABLES,
    Commands,
    Driver,
    Iptables,
    MasqueradeError,
    find,
    find_iptables,
    legacy_tables,
)
from flanneld.masquerade.nft import NftDriver
from flanneld.masquerade.restore import RestoreDriver
from flanneld.masquerade.rules import FILTER, NAT, Rules


@dataclass(frozen=True, slots=True)
class Choice:
    """The driver to use. ``reason`` is for the log; ``others`` remove what other drivers left."""

    driver: Driver
    reason: str
    others: tuple[Callable[[], list[str]], ...]


def choose(rules: Rules, enable_nftables: bool, commands: Commands) -> Choice:
    """The driver for these rules. Raises MasqueradeError with the reason if there is none.

    The rules must go where the host's other rules are: what the legacy iptables accepts, a rule
    of the nft variant may still drop, and the other way round.
    """
    host: Iptables | None = None
    iptables: Driver | None
    try:
        host = find_iptables(commands)
        iptables, reason = _iptables_driver(
            host, rules.forward_only() if enable_nftables else rules, commands
        )
    except MasqueradeError as error:
        iptables, reason = None, str(error)
    nft = find("nft")
    others = _other_variants(host, rules.nothing(), commands)
    if enable_nftables:
        if nft is None:
            raise MasqueradeError(
                "EnableNFTables is set in the network config, but nft was not found in PATH,"
                " /usr/sbin and /sbin: install nftables, or remove the key"
            )
        driver = NftDriver(nft, rules, iptables, commands)
        verdict = driver.supported()
        if not verdict.usable:
            raise MasqueradeError(verdict.reason)
        lacking = f"; no forward rules: {reason}" if iptables is None else ""
        return Choice(driver, verdict.reason + lacking, tuple(others))
    if iptables is None:
        raise MasqueradeError(reason)
    if nft is not None:
        others.append(NftDriver(nft, rules.nothing(), None, commands).remove)
    return Choice(iptables, reason, tuple(others))


def removals(rules: Rules) -> list[Callable[[], list[str]]]:
    """Steps that remove flannel's rules, through each driver there is; they return what was there.

    ``rules`` are `rules.absent` of the networks whose old rules are to go as well. Each may raise
    MasqueradeError, which does not concern the others.
    """
    commands = Commands()
    steps: list[Callable[[], list[str]]] = []
    nft = find("nft")
    if nft is not None:
        steps.append(NftDriver(nft, rules, None, commands).remove)
    host: Iptables | None = None
    if find("iptables") is not None:
        try:
            host = find_iptables(commands)
        except MasqueradeError as error:
            steps.append(_failing(error))
        else:
            restore = RestoreDriver(host, rules, commands)
            steps += (partial(restore.remove_from, table) for table in (NAT, FILTER))
    return steps + _other_variants(host, rules, commands)


def _failing(error: MasqueradeError) -> Callable[[], list[str]]:
    def remove() -> list[str]:
        raise error

    return remove


def _iptables_driver(host: Iptables, rules: Rules, commands: Commands) -> tuple[Driver, str]:
    why_not = ""
    if host.variant == LEGACY:
        driver, why_not = _python_iptables(host, rules)
        if driver is not None:
            verdict = driver.supported()
            if verdict.usable:
                return driver, verdict.reason
            why_not = verdict.reason
    restore = RestoreDriver(host, rules, commands)
    verdict = restore.supported()
    if not verdict.usable:
        raise MasqueradeError(verdict.reason)
    return restore, f"{verdict.reason}{'; ' if why_not else ''}{why_not}"


def _python_iptables(host: Iptables, rules: Rules) -> tuple[Driver | None, str]:
    """The driver, or why it cannot be loaded."""
    try:
        # It starts ldconfig and gcc to find its C libraries: only where it is needed.
        from flanneld.masquerade.iptc import IptcDriver
    except Exception as error:  # noqa: BLE001 - it raises many kinds, TypeError for a missing library
        return None, f"python-iptables cannot be loaded: {error}"
    return IptcDriver(host, rules), ""


def _other_variants(
    host: Iptables | None, rules: Rules, commands: Commands
) -> list[Callable[[], list[str]]]:
    """Removers for the variants of iptables that are not the host's."""
    removers: list[Callable[[], list[str]]] = []
    for name, variant in (("iptables-legacy", LEGACY), ("iptables-nft", NF_TABLES)):
        if host is not None and host.variant == variant:
            continue
        # To ask the legacy one when it has no tables would load it into the kernel.
        if (variant == LEGACY and not legacy_tables()) or find(name) is None:
            continue
        try:
            found = find_iptables(commands, name)
        except MasqueradeError as error:
            removers.append(_failing(error))
        else:
            removers.append(RestoreDriver(found, rules, commands).remove)
    return removers
