"""Which driver is chosen, what a failing tool leads to, and what the keeper says about it."""

import builtins
import importlib.util
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from flanneld.masquerade import choose, driver, keeper
from flanneld.masquerade.driver import (
    Commands,
    Iptables,
    MasqueradeError,
    Verdict,
    find_iptables,
)
from flanneld.masquerade.restore import RestoreDriver
from flanneld.masquerade.rules import wanted
from lab import eventually

N, S = IPv4Network("10.5.0.0/16"), IPv4Network("10.5.34.0/24")
RULES = wanted(N, S, masquerade=True, forward=True)


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


# Hooks without rules, and no chain of ours.
EMPTY = """for name; do :; done
case $name in
FLANNEL-*) echo "iptables: No chain/target/match by that name." >&2; exit 1 ;;
*) echo -P $name ACCEPT ;;
esac"""


def iptables(tools: Callable[..., Path], version: str, listing: str = EMPTY) -> None:
    """Make an iptables that says this version, and lists chains by this script."""
    tools("iptables", f"[ $1 != --version ] || {{ echo '{version}'; exit; }}\n{listing}")
    tools("iptables-restore")


def choice_of(nftables: bool) -> choose.Choice:
    return choose.choose(RULES, nftables, Commands())


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
    found = find_iptables(Commands())
    assert (found.version, found.variant) == (version, variant)
    assert found.restore == f"{found.path}-restore"
    assert found.waits is found.knows_random_fully is (version >= (1, 6, 2))


def test_no_iptables(tools: Callable[..., Path]) -> None:
    with pytest.raises(MasqueradeError, match=r"^iptables was not found in PATH"):
        find_iptables(Commands())
    tools("iptables", "echo nonsense")
    with pytest.raises(MasqueradeError, match="says 'nonsense', which has no version"):
        find_iptables(Commands())
    tools("iptables", "echo iptables v1.8.9")
    with pytest.raises(MasqueradeError, match="iptables-restore is missing beside "):
        find_iptables(Commands())


def test_a_command_that_fails(tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tools("tool", "echo 'no  such' >&2; echo chain >&2; exit 3")
    with pytest.raises(MasqueradeError, match=r"^tool -x ended with status 3: no such chain$"):
        Commands().run([str(path), "-x"])
    monkeypatch.setattr(driver, "COMMAND_TIMEOUT", 0.1)
    with pytest.raises(MasqueradeError, match=r"^slow did not end within 0.1 s$"):
        Commands().run([str(tools("slow", "exec /bin/sleep 10"))])
    with pytest.raises(MasqueradeError, match=r"^/nowhere/x cannot be run: No such file"):
        Commands().run(["/nowhere/x"])


def test_a_command_gets_nothing_of_the_daemons_secrets(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLANNELD_ETCD_PASSWORD", "secret")
    monkeypatch.setenv("XTABLES_LOCKFILE", "/lock")
    said = Commands().run([str(tools("tool", "exec /usr/bin/env"))])
    names = {line.partition("=")[0] for line in said.splitlines()}
    assert {"PATH", "LC_ALL", "XTABLES_LOCKFILE"} <= names <= {*names} - {"FLANNELD_ETCD_PASSWORD"}
    assert "secret" not in said


@pytest.mark.parametrize("stops", [False, True])
def test_what_hangs_is_killed_with_all_it_started(
    tools: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """After the time a command has, or when the daemon stops."""
    pids = tmp_path / "pids"
    script = (
        f"trap '' TERM; /bin/sleep 100 & echo $$ $! >{pids}.new; /bin/mv {pids}.new {pids}; wait"
    )
    path = tools("tool", script)
    stop = threading.Event()
    monkeypatch.setattr(driver, "COMMAND_TIMEOUT", 60.0 if stops else 0.5)
    failed: list[str] = []

    def work() -> None:
        try:
            Commands(stop).run([str(path), "-x"])
        except MasqueradeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    eventually(pids.exists, 10, "the command at work")
    if stops:
        stop.set()
    thread.join(10)
    assert failed == [
        "tool -x " + ("was ended: flanneld stops" if stops else "did not end within 0.5 s")
    ]
    eventually(lambda: not any(map(is_alive, pids.read_text().split())), 10, "both ended")
    if stops:
        with pytest.raises(MasqueradeError, match="tool is not run any more: flanneld stops"):
            Commands(stop).run([str(path)])


def is_alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_heart_beats_before_each_command(tools: Callable[..., Path]) -> None:
    beats: list[float] = []
    iptables(tools, "iptables v1.8.9 (nf_tables)")
    commands = Commands(beat=beats.append)
    chosen = choose.choose(RULES, False, commands)
    assert beats == [driver.COMMAND_TIMEOUT] * 5
    chosen.driver.check()
    assert len(beats) == 9


# --- the choice


def test_the_nft_variant_goes_through_restore(tools: Callable[..., Path]) -> None:
    iptables(tools, "iptables v1.8.9 (nf_tables)")
    chosen = choice_of(nftables=False)
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
    chosen = choice_of(nftables=False)
    assert chosen.driver.name == "iptables-restore"
    assert chosen.reason.endswith("; python-iptables cannot be loaded: no libxtables")


def test_an_old_iptables_gets_no_random_fully_and_no_wait(
    tools: Callable[..., Path], tmp_path: Path
) -> None:
    iptables(tools, "iptables v1.6.1")
    seen = tmp_path / "seen"
    tools("iptables-restore", f'echo "$@" >{seen}; exec /bin/cat >>{seen}')
    old = RestoreDriver(find_iptables(Commands()), RULES, Commands())
    assert not old.check()
    old.apply()
    arguments, *lines = seen.read_text().splitlines()
    assert arguments == "--noflush"
    assert "MASQUERADE" in "".join(lines)
    assert "random" not in "".join(lines)


def test_an_iptables_that_cannot_read_is_no_driver(tools: Callable[..., Path]) -> None:
    failing = "echo Protocol not supported >&2; exit 3"
    iptables(tools, "iptables v1.8.9 (nf_tables)", failing)
    with pytest.raises(
        MasqueradeError, match=r"^iptables .*-S POSTROUTING ended with status 3: Proto"
    ):
        choice_of(nftables=False)


INCOMPATIBLE = "echo \"iptables: chain in table is incompatible, use 'nft' tool.\" >&2; exit 1"


def test_a_hook_that_iptables_cannot_show_is_an_error(tools: Callable[..., Path]) -> None:
    """Its save says so with status 0, and shows no rules."""
    iptables(tools, "iptables v1.8.9 (nf_tables)", INCOMPATIBLE)
    with pytest.raises(
        MasqueradeError, match=r"^iptables cannot read POSTROUTING .* table nat.*NFT"
    ):
        choice_of(nftables=False)
    iptables(tools, "iptables v1.8.9 (nf_tables)", "exit 0")
    with pytest.raises(MasqueradeError, match=r"-S POSTROUTING does not show the chain$"):
        choice_of(nftables=False)


def test_a_hook_that_iptables_cannot_show_matters_only_with_rules_of_ours(
    tools: Callable[..., Path],
) -> None:
    script = f"[ $2$3$4 != 5-tnat ] || {{ {INCOMPATIBLE}; }}; {EMPTY}"
    iptables(tools, "iptables v1.8.9 (nf_tables)", script)
    commands = Commands()
    forward = wanted(N, S, masquerade=False, forward=True)
    tools("nft", "exit 1")
    assert not RestoreDriver(find_iptables(commands), forward, commands).check()
    assert RestoreDriver(find_iptables(commands), forward, commands).remove() == []
    tools("nft", "exit 0")
    with pytest.raises(MasqueradeError, match="cannot read POSTROUTING"):
        RestoreDriver(find_iptables(commands), forward, commands).remove()


def test_a_chain_that_wants_no_rules_is_no_reason_against_a_driver(
    tools: Callable[..., Path],
) -> None:
    """Without nft nobody can say whether an old chain of ours is in the one that is not shown."""
    script = f"[ $2$3$4 != 5-tnat ] || {{ {INCOMPATIBLE}; }}; {EMPTY}"
    iptables(tools, "iptables v1.8.9 (nf_tables)", script)
    commands = Commands()
    found = find_iptables(commands)
    forward = wanted(N, S, masquerade=False, forward=True)
    assert RestoreDriver(found, forward, commands).supported().usable
    assert RestoreDriver(found, RULES, commands).supported().usable
    masquerade = wanted(N, S, masquerade=True, forward=False)
    verdict = RestoreDriver(found, masquerade, commands).supported()
    assert not verdict.usable
    assert verdict.reason.startswith("iptables cannot read POSTROUTING in the table nat")


def test_each_driver_removes_on_its_own(tools: Callable[..., Path]) -> None:
    iptables(tools, "iptables v1.8.9 (nf_tables)", "echo torn >&2; exit 4")
    tools("nft", "echo broken >&2; exit 1")
    steps = choose.removals(RULES.nothing())
    for step, text in zip(steps, ("broken", "POSTROUTING.* torn", "FORWARD.* torn"), strict=True):
        with pytest.raises(MasqueradeError, match=text):
            step()
    tools("iptables", "exit 3")
    with pytest.raises(MasqueradeError, match="--version ended with status 3"):
        choose.removals(RULES.nothing())[1]()


def test_nftables_is_used_when_the_config_says_so(tools: Callable[..., Path]) -> None:
    with pytest.raises(MasqueradeError, match=r"^EnableNFTables is set .* nft was not found"):
        choice_of(nftables=True)
    tools("nft", "/bin/cat >/dev/null")
    chosen = choice_of(nftables=True)
    assert chosen.driver.name == "nftables"
    assert chosen.reason.startswith("EnableNFTables is set; ")
    assert "; no forward rules: iptables was not found in PATH" in chosen.reason
    iptables(tools, "iptables v1.8.9 (nf_tables)")
    assert choice_of(nftables=True).reason.endswith("and the forward rules in iptables")


def test_an_nft_without_fully_random_gets_a_table_without(
    tools: Callable[..., Path], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    listing = '[ "$2" != list ] || exit 0'
    tools("nft", f"{listing}; /bin/cat >{seen}; ! /bin/grep -q fully-random {seen}")
    chosen = choice_of(nftables=True)
    chosen.driver.apply()
    assert "masquerade\n" in seen.read_text()
    tools("nft", "echo 'not permitted' >&2; exit 1")
    with pytest.raises(MasqueradeError, match="not permitted"):
        choice_of(nftables=True)


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
    chosen: Callable[[Commands], choose.Choice],
    rounds: int,
    rules: Any = RULES,
) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        kept = keeper.Keeper(rules, chosen, 5)
        kept.run(Rounds(rounds))
        assert kept.wait_tried(0)
    return [f"{record.levelname[0]} {record.getMessage()}" for record in caplog.records]


def choice(fake: Fake, *others: Callable[[], list[str]]) -> Callable[[Commands], choose.Choice]:
    return lambda _: choose.Choice(fake, "because", others)


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


def test_rules_that_cannot_be_seen_are_not_written_again_and_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time may have added a rule."""
    time = 1000.0
    monkeypatch.setattr(keeper, "now", lambda: time)
    fake = Fake(True, *[False] * 99)
    kept = keeper.Keeper(RULES, choice(fake), 5)
    kept.run(Rounds(30))
    assert fake.applied == 1 + keeper.UNSEEN_TIMES
    time += keeper.UNSEEN_PAUSE
    kept.run(Rounds(30))
    assert fake.applied == 2 + keeper.UNSEEN_TIMES
    assert sum("the rules are not as they" in line for line in caplog.messages) == 2
    # Seen again, they are put back at once as ever.
    fake.answers = [True, False, True, False, True, False, True]
    kept.run(Rounds(4))
    assert fake.applied == 5 + keeper.UNSEEN_TIMES


def test_a_bug_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake(True, *[KeyError("x")] * 3)
    lines = logged(caplog, choice(fake), 6)
    assert sum("This is a bug" in line for line in lines) == 1
    assert lines[-1].startswith("I Masquerade and forward rules are in place again")


def test_no_driver_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def lacking(commands: Commands) -> choose.Choice:
        tries.append(1)
        if len(tries) < 4:
            raise MasqueradeError("no iptables")
        return choice(Fake())(commands)

    lines = logged(caplog, lacking, 6)
    assert lines == ["E Failed to set up IP Masquerade: no iptables", CHOSEN]


def test_if_no_rules_are_wanted_it_removes_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    none = wanted(RULES.nat.networks[0], RULES.nat.networks[0], masquerade=False, forward=False)
    fake = Fake()
    stop = Rounds(1000)
    keeper.Keeper(none, choice(fake), 5).run(stop)
    assert (fake.applied, stop.left) == (1, 1000)

    # Not before it has: the lock may have been held.
    tries = []

    def lacking(commands: Commands) -> choose.Choice:
        tries.append(1)
        if len(tries) < 3:
            raise MasqueradeError("no iptables")
        return choice(Fake())(commands)

    assert logged(caplog, lacking, 9, none) == [CHOSEN]
    assert len(tries) == 3


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
    named = Iptables("/sbin/iptables", "r", (1, 8, 9), "nf_tables")
    assert str(named) == "/sbin/iptables, v1.8.9 (nf_tables)"


def test_python_iptables_comes_without_setuptools() -> None:
    if importlib.util.find_spec("_distutils_hack") is None:
        pytest.skip("no setuptools is installed, which would come with distutils")
    program = """
import sys
from flanneld.masquerade.python_iptables import easy, iptc
assert iptc.Table.FILTER == "filter" and easy.get_tables
print(*sys.modules)
import distutils.sysconfig
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"setuptools", "distutils"} & set(done.stdout.split())
