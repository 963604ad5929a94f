"""Which driver is chosen, what a failing tool leads to, and what the keeper says about it."""

import builtins
import logging
import threading
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from flanneld.masquerade import choose, driver, keeper
from flanneld.masquerade.driver import Iptables, MasqueradeError, Verdict, find_iptables, run
from flanneld.masquerade.restore import RestoreDriver
from flanneld.masquerade.rules import wanted

RULES = wanted(
    IPv4Network("10.5.0.0/16"), IPv4Network("10.5.34.0/24"), masquerade=True, forward=True
)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that makes a command of a script; only such commands are found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(driver, "_MORE_PATH", "")
    monkeypatch.setattr(driver, "_LEGACY_TABLES", tmp_path / "ip_tables_names")

    def make(name: str, script: str = "exit 0") -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


def iptables(tools: Callable[..., Path], version: str, save: str = "exit 0") -> None:
    """Make an iptables that says this version."""
    tools("iptables", f"echo '{version}'")
    tools("iptables-save", save)
    tools("iptables-restore")


# --- the host's iptables


@pytest.mark.parametrize(
    ("said", "version", "variant"),
    [
        ("iptables v1.8.9 (nf_tables)", (1, 8, 9), "nf_tables"),
        ("iptables v1.8.9 (legacy)", (1, 8, 9), "legacy"),
        ("iptables v1.6.1", (1, 6, 1), "legacy"),
        ("iptables v1.4.21", (1, 4, 21), "legacy"),
        ("iptables v2.0 (nf_tables)", (2, 0), "nf_tables"),
    ],
)
def test_the_variant_and_version(
    tools: Callable[..., Path], said: str, version: tuple[int, ...], variant: str
) -> None:
    iptables(tools, said)
    found = find_iptables()
    assert (found.version, found.variant) == (version, variant)
    assert found.save == f"{found.path}-save"
    assert found.waits is found.knows_random_fully is (version >= (1, 6, 2))


def test_no_iptables(tools: Callable[..., Path]) -> None:
    with pytest.raises(MasqueradeError, match=r"^iptables was not found in PATH"):
        find_iptables()
    tools("iptables", "echo nonsense")
    with pytest.raises(MasqueradeError, match="says 'nonsense', which has no version"):
        find_iptables()
    tools("iptables", "echo iptables v1.8.9")
    with pytest.raises(MasqueradeError, match="iptables-save is missing beside "):
        find_iptables()


def test_a_command_that_fails(tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tools("tool", "echo 'no  such' >&2; echo chain >&2; exit 3")
    with pytest.raises(MasqueradeError, match=r"^tool -x ended with status 3: no such chain$"):
        run([str(path), "-x"])
    monkeypatch.setattr(driver, "COMMAND_TIMEOUT", 0.1)
    with pytest.raises(MasqueradeError, match=r"^slow did not end within 0.1 s$"):
        run([str(tools("slow", "exec /bin/sleep 10"))])
    with pytest.raises(MasqueradeError, match=r"^/nowhere/x cannot be run: No such file"):
        run(["/nowhere/x"])


# --- the choice


def test_the_nft_variant_goes_through_restore(tools: Callable[..., Path]) -> None:
    iptables(tools, "iptables v1.8.9 (nf_tables)")
    chosen = choose.choose(RULES, False)
    assert chosen.driver.name == "iptables-restore"
    assert "v1.8.9 (nf_tables)" in chosen.reason
    assert chosen.others == ()


def test_the_legacy_one_goes_through_python_iptables_or_says_why_not(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    iptables(tools, "iptables v1.8.9 (legacy)")
    real = builtins.__import__

    def broken(name: str, *arguments: Any) -> Any:
        if name == "flanneld.masquerade.iptc":
            raise TypeError("no libxtables")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", broken)
    chosen = choose.choose(RULES, False)
    assert chosen.driver.name == "iptables-restore"
    assert chosen.reason.endswith("; python-iptables cannot be loaded: no libxtables")


def test_an_old_iptables_gets_no_random_fully_and_no_wait(
    tools: Callable[..., Path], tmp_path: Path
) -> None:
    iptables(tools, "iptables v1.6.1")
    seen = tmp_path / "seen"
    tools("iptables-restore", f'echo "$@" >{seen}; exec /bin/cat >>{seen}')
    old = RestoreDriver(find_iptables(), RULES)
    assert not old.check()
    old.apply()
    arguments, *lines = seen.read_text().splitlines()
    assert arguments == "--noflush"
    assert "MASQUERADE" in "".join(lines)
    assert "random" not in "".join(lines)


def test_an_iptables_that_cannot_read_is_no_driver(tools: Callable[..., Path]) -> None:
    failing = "echo Protocol not supported >&2; exit 3"
    iptables(tools, "iptables v1.8.9 (nf_tables)", failing)
    with pytest.raises(MasqueradeError, match=r"^iptables-save ended with status 3: Protocol not"):
        choose.choose(RULES, False)


def test_nftables_is_used_when_the_config_says_so(tools: Callable[..., Path]) -> None:
    with pytest.raises(MasqueradeError, match=r"^EnableNFTables is set .* nft was not found"):
        choose.choose(RULES, True)
    tools("nft", "/bin/cat >/dev/null")
    chosen = choose.choose(RULES, True)
    assert chosen.driver.name == "nftables"
    assert chosen.reason.startswith("EnableNFTables is set; ")
    assert "; no forward rules: iptables was not found in PATH" in chosen.reason
    iptables(tools, "iptables v1.8.9 (nf_tables)")
    assert choose.choose(RULES, True).reason.endswith("and the forward rules in iptables")


def test_an_nft_without_fully_random_gets_a_table_without(
    tools: Callable[..., Path], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    listing = '[ "$2" != list ] || exit 0'
    tools("nft", f"{listing}; /bin/cat >{seen}; ! /bin/grep -q fully-random {seen}")
    chosen = choose.choose(RULES, True)
    chosen.driver.apply()
    assert "masquerade\n" in seen.read_text()
    tools("nft", "echo 'not permitted' >&2; exit 1")
    with pytest.raises(MasqueradeError, match="not permitted"):
        choose.choose(RULES, True)


# --- the keeper


class Fake:
    """A driver of which the test says what happens; each check ends one round of the keeper."""

    name = "fake"

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.applied = 0

    def supported(self) -> Verdict:
        return Verdict(True, "")

    def check(self) -> bool:
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    def apply(self) -> None:
        self.applied += 1

    def remove(self) -> list[str]:
        return []


class Rounds(threading.Event):
    """A stop event that is set after some waits, none of which takes time."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.left = rounds

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002 - the signature
        self.left -= 1
        if self.left <= 0:
            self.set()
        return self.is_set()


def logged(
    caplog: pytest.LogCaptureFixture,
    chosen: Callable[[], choose.Choice],
    rounds: int,
    rules: Any = RULES,
) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        kept = keeper.Keeper(rules, chosen, 5)
        kept.run(Rounds(rounds))
        assert kept.wait_tried(0)
    return [f"{record.levelname[0]} {record.getMessage()}" for record in caplog.records]


def choice(fake: Fake, *others: Callable[[], list[str]]) -> Callable[[], choose.Choice]:
    return lambda: choose.Choice(fake, "because", others)


CHOSEN = "I Masquerade and forward rules through fake: because"
BACK = "W Masquerade or forward rules were missing or changed: they are back in place"


def test_it_applies_once_and_then_checks(caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake()
    assert logged(caplog, choice(fake), 5) == [CHOSEN]
    assert fake.applied == 1


def test_it_puts_them_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake(True, *[False, True] * 4)
    assert logged(caplog, choice(fake), 6) == [CHOSEN, BACK]
    assert fake.applied == 5


def test_an_error_is_said_when_it_begins_and_when_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = Fake(True, *[MasqueradeError("busy")] * 3)
    lines = logged(caplog, choice(fake), 6)
    failed = "E Failed to set up the masquerade and forward rules: busy"
    assert lines[:2] == [CHOSEN, failed]
    assert lines[2].startswith("I Masquerade and forward rules are in place again (after ")
    assert len(lines) == 3


def test_rules_that_do_not_stay_are_an_error(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = logged(caplog, choice(Fake(*[False] * 9)), 3)
    assert line.startswith("E Failed to set up the masquerade and forward rules: the rules are not")


def test_a_bug_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake(True, *[KeyError("x")] * 3)
    lines = logged(caplog, choice(fake), 6)
    assert sum("This is a bug" in line for line in lines) == 1
    assert lines[-1].startswith("I Masquerade and forward rules are in place again")


def test_no_driver_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def lacking() -> choose.Choice:
        tries.append(1)
        if len(tries) < 4:
            raise MasqueradeError("no iptables")
        return choice(Fake())()

    lines = logged(caplog, lacking, 6)
    assert lines == ["E Failed to set up IP Masquerade: no iptables", CHOSEN]


def test_if_no_rules_are_wanted_it_removes_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    none = wanted(RULES.nat.networks[0], RULES.nat.networks[0], masquerade=False, forward=False)
    fake = Fake()
    stop = Rounds(1000)
    keeper.Keeper(none, choice(fake), 5).run(stop)
    assert (fake.applied, stop.left) == (1, 1000)

    def lacking() -> choose.Choice:
        raise MasqueradeError("no iptables")

    assert logged(caplog, lacking, 3, none) == []


def test_what_other_drivers_left_is_named_and_their_failure_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing() -> list[str]:
        raise MasqueradeError("modules are disabled")

    lines = logged(caplog, choice(Fake(), failing, lambda: ["nat: chain X"]), 2)
    assert lines == [
        CHOSEN,
        "W What another driver may have left stays: modules are disabled",
        "I Removed what another driver left: nat: chain X",
    ]


def test_iptables_is_named_in_the_log() -> None:
    named = Iptables("/sbin/iptables", "s", "r", (1, 8, 9), "nf_tables")
    assert str(named) == "/sbin/iptables, v1.8.9 (nf_tables)"
