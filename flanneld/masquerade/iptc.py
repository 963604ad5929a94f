"""The rules through python-iptables, which speaks to the legacy iptables' tables in the kernel.

What it lacks is done here: the lock that iptables commands take, explicit commits (its automatic
ones hide their failure, and other writers' rules were lost), a comparison that knows MASQUERADE.
Everything is to be called by one thread. It loads C libraries: import this module where it is used.
"""

import fcntl
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flanneld.masquerade.driver import (
    LOCK_TIMEOUT,
    Iptables,
    MasqueradeError,
    Verdict,
    legacy_tables,
)
from flanneld.masquerade.python_iptables import easy, iptc
from flanneld.masquerade.restore import describe
from flanneld.masquerade.rules import (
    Chain,
    Edit,
    Found,
    Line,
    Options,
    Rules,
    Words,
    absent,
    edit,
    options,
    split,
)

# iptables' own default; the variable is iptables', too (since v1.8.8).
_LOCK = "/run/xtables.lock"
_LOCK_POLL = 0.005  # seconds

# Times to begin again when somebody without the lock changed the table in between.
_TRIES = 3

# Checks between two searches for garbage. python-iptables' objects refer to each other in circles,
# and a few of each check become so old that Python looks for them after hours only: by then they
# are 2.7 MB. A search takes up to 30 ms.
_COLLECT = 50

_ATTRIBUTES = {"src": "-s", "dst": "-d", "protocol": "-p", "in-interface": "-i",
               "out-interface": "-o", "fragment": "-f"}  # fmt: skip
_FIELDS = {"-s": "src", "-d": "dst"}


class IptcDriver:
    """Implements `driver.Driver`."""

    name = "python-iptables"

    def __init__(self, iptables: Iptables, rules: Rules) -> None:
        self._iptables = iptables
        self._rules = rules if iptables.knows_random_fully else rules.plain()
        self._checks = 0

    def supported(self) -> Verdict:
        """Whether the tables that are there can be read."""
        try:
            self.check()
        except MasqueradeError as error:
            return Verdict(False, str(error))
        return Verdict(True, f"the host's iptables is {self._iptables}")

    def check(self) -> bool:
        """Two reads from the kernel; no lock, no process."""
        self._checks += 1
        if self._checks % _COLLECT == 0:
            gc.collect()
        with _as_our_error():
            return not any(edit(chain, _read(chain)) for chain in self._rules.chains)

    def apply(self) -> None:
        """One commit for each table that is to change."""
        self._make(self._rules)

    def remove(self) -> list[str]:
        """Our chains, their jumps, and what an original left of the networks."""
        return self._make(absent(self._rules.nat.networks))

    def _make(self, rules: Rules) -> list[str]:
        """Make the tables so; returns what was removed."""
        removed: list[str] = []
        with _lock(), _as_our_error():
            for chain in rules.chains:
                removed += _change(chain)
        return removed


def _change(chain: Chain) -> list[str]:
    """Make one table as wanted with one commit; returns what was removed."""
    tries = 1
    while True:
        found = _read(chain)
        change = edit(chain, found)
        if change is None:
            return []
        try:
            _commit(change)
        except iptc.IPTCError:
            # Somebody without the lock changed the table after we read it.
            if tries == _TRIES:
                raise
            tries += 1
        else:
            return describe(change, found)


def _commit(change: Edit) -> None:
    name = change.chain.name
    # Still the snapshot that was read, without a refresh: in another one the places to delete may
    # be somebody else's. The kernel refuses it if rules have come or gone meanwhile.
    table = iptc.Table(change.chain.table, autocommit=False)
    _look_for_chains_in(change.chain.table)
    try:
        hook = iptc.Chain(table, change.chain.hook)
        there = hook.rules
        for place in reversed(change.delete):
            hook.delete_rule(there[place])
        if not table.is_chain(name):
            table.create_chain(name)
        table.flush_entries(name)
        own = iptc.Chain(table, name)
        for rule in change.rules:
            own.append_rule(_rule(rule))
        if change.jump_at is not None:
            hook.insert_rule(_rule(change.chain.jump), change.jump_at)
        if not change.rules:
            table.delete_chain(name)
        table.commit()
    finally:
        # Drops what was not committed, and the snapshot that is old now.
        table.refresh()


def _look_for_chains_in(table: str) -> None:
    """Have python-iptables look in this table alone for a chain that a rule jumps to.

    It would ask the kernel for all five. That makes those which are not there, and with each of
    them a stop on the way of every packet; and it keeps a socket for each.
    """
    iptc.Table.existing_table_names.update({name: name == table for name in iptc.Table.ALL})


def _read(chain: Chain) -> Found:
    """What the kernel has now of a chain and its hook."""
    if chain.table not in legacy_tables():
        return Found()
    table = iptc.Table(chain.table, autocommit=False)
    table.refresh()
    hook = iptc.Chain(table, chain.hook)
    policy, _ = table.get_policy(chain.hook)
    own = iptc.Chain(table, chain.name) if table.is_chain(chain.name) else None
    return Found(
        tuple(map(_line, hook.rules)),
        policy.name,
        None if own is None else tuple(map(_line, own.rules)),
    )


def _line(rule: Any) -> Line:
    found = _decoded(rule)
    words = tuple(word for option in sorted(found) for word in option)
    return Line(found, words, " ".join(words))


def _decoded(rule: Any) -> Options:
    """A rule's options, written as iptables-save would."""
    try:
        fields: dict[str, Any] = easy.decode_iptc_rule(rule)
    except Exception as error:  # noqa: BLE001 - a foreign rule with an extension this host lacks
        return frozenset({("?", str(error))})
    fields.pop("counters", None)
    found = set(_target(fields.pop("target", "")))
    for name, value in fields.items():
        if name in _ATTRIBUTES:
            found.add(_option(_ATTRIBUTES[name], value))
            continue
        for parameters in value if isinstance(value, list) else [value]:
            found.add(("-m", name))
            found |= _parameters(parameters)
    return frozenset(found)


def _target(target: str | dict[str, Any]) -> Iterator[Words]:
    if isinstance(target, str):
        if target:
            yield ("-j", target)
        return
    for name, parameters in target.items():
        if name == "goto":
            yield ("-g", str(parameters))
        else:
            yield ("-j", name)
            yield from _parameters(parameters)


def _parameters(parameters: object) -> set[Words]:
    if not isinstance(parameters, dict):
        return set()
    return {_option(f"--{name}", value) for name, value in parameters.items()}


def _option(flag: str, value: object) -> Words:
    words = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if words[0].startswith("!"):
        words[0] = words[0][1:].strip()
        return ("!", flag, *filter(None, words))
    return (flag, *filter(None, words))


def _rule(words: Words) -> Any:
    """A rule of ours for python-iptables."""
    fields: dict[str, Any] = {}
    target, parameters = "", {}
    for option in split(words):
        match option:
            case ("-s" | "-d" as flag, network):
                fields[_FIELDS[flag]] = network
            case ("!", "-s" | "-d" as flag, network):
                fields[_FIELDS[flag]] = f"!{network}"
            case ("--comment" | "--mark" as flag, value):
                fields[flag[2:]] = {flag[2:]: value}
            case ("-j", name):
                target = name
            case ("--random-fully",):
                parameters = {"random-fully": ""}
    fields["target"] = {target: parameters} if parameters else target
    rule = easy.encode_iptc_rule(fields)
    # It leaves out, without a word, what the C libraries do not take.
    if _decoded(rule) != options(words):
        raise MasqueradeError(f"python-iptables cannot write the rule {' '.join(words)}")
    return rule


@contextmanager
def _as_our_error() -> Iterator[None]:
    try:
        yield
    except iptc.IPTCError as error:
        # The C library's texts arrive as bytes.
        raise MasqueradeError("python-iptables: " + str(error).replace("b'", "'")) from error


@contextmanager
def _lock() -> Iterator[None]:
    """Hold the lock of the iptables commands."""
    path = os.environ.get("XTABLES_LOCKFILE") or _LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise MasqueradeError(f"cannot open the iptables lock {path}: {error.strerror}") from error
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise MasqueradeError(
                        f"another process holds the iptables lock {path}"
                        f" for more than {LOCK_TIMEOUT} s"
                    ) from None
            time.sleep(_LOCK_POLL)
        yield
    finally:
        os.close(descriptor)
