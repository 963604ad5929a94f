"""mk-docker-opts: the original's recorded output, and values that want more than to be values."""

import os
import re
import shlex
import stat
import string
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanneld import flags
from flanneld.docker_opts import USAGE, Request, main, parse

FIXTURES = Path(__file__).parent.parent / "fixtures" / "mk-docker-opts"

USUAL = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\n"

# What the recorded cases were given: the subnet file's text, and more environment.
INPUTS = {
    "8-ipmasq-true": USUAL + "FLANNEL_IPMASQ=true\n",
    "9-ipmasq-true-m": USUAL + "FLANNEL_IPMASQ=true\n",
    "10-ipmasq-bad": USUAL + "FLANNEL_IPMASQ=maybe\n",
    "11-ipmasq-bad-m": USUAL + "FLANNEL_IPMASQ=maybe\n",
    "14-subnet-only": "FLANNEL_SUBNET=10.5.72.1/24\n",
    "15-mtu-only": "FLANNEL_MTU=1450\n",
    "16-empty": "",
}
ENVIRONMENTS = {
    "17-env-docker-opts": {"DOCKER_OPTS": "--debug"},
    "18-env-docker-opt-foo": {"DOCKER_OPT_FOO": "--foo=1"},
}


@dataclass(frozen=True, slots=True)
class Case:
    """A recorded run of the shell script: its arguments, status, stderr and output file."""

    name: str
    arguments: list[str]
    status: int
    stderr: list[str]
    output: str | None


def recorded(shell: str) -> list[Case]:
    """Return the cases recorded under a shell."""
    text = (FIXTURES / f"{shell}.txt").read_text()
    return [_case(part) for part in text.split("=== case ")[1:]]


def _case(text: str) -> Case:
    name, command, status, *rest = text.splitlines()
    output = None
    if "--- docker.env" in rest:
        # `cat -A` showed the line ends.
        lines = rest[rest.index("--- docker.env") + 1 :]
        output = "".join(line.removesuffix("$") + "\n" for line in lines)
    stderr = [line.removeprefix("stderr: ") for line in rest if line.startswith("stderr: ")]
    return Case(name, shlex.split(command)[2:], int(status.split()[1]), stderr, output)


DASH = recorded("dash")
BASH = recorded("bash-posix")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory the program runs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_that_was_recorded_is_compared() -> None:
    assert [int(case.name.split("-")[0]) for case in DASH] == list(range(1, 24))
    assert [case.name for case in BASH] == [case.name for case in DASH]
    # The shells differ in the words of their own errors, and in the status of one.
    for one, other in zip(DASH, BASH, strict=True):
        assert one.output == other.output
        assert one.status == other.status or one.name == "22-unwritable"


@pytest.mark.parametrize("case", DASH, ids=lambda case: case.name)
def test_status_output_and_stderr_are_the_original_ones(
    case: Case, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = USUAL + "FLANNEL_IPMASQ=false\n"
    (directory / "subnet.env").write_text(INPUTS.get(case.name, usual))
    status = main(case.arguments, ENVIRONMENTS.get(case.name, {}))
    said = capsys.readouterr()
    output = directory / "docker.env"
    assert (output.read_text() if output.exists() else None) == case.output
    assert status == case.status
    assert said.out == ""
    if case.name == "22-unwritable":
        assert "cannot create no/such/docker.env" in said.err
        assert "-d" in said.err
    elif "<usage text, 12 lines>" in case.stderr:
        assert said.err == "".join(f"{line}\n" for line in case.stderr[:-1]) + USAGE
    else:
        # The original's line, and after it what is wanted.
        assert said.err.startswith("".join(case.stderr))
        assert bool(said.err) == bool(case.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-k", "A;reboot"], "Invalid value of -k: A;reboot"),
        (["-k", ""], "Invalid value of -k: "),
        (["-k", "ÄÖ"], "Invalid value of -k"),
        (["-i", "-c", "-f"], "No arg for -f option"),
        (["-ix"], "Illegal option -x"),
        (["--help"], "Illegal option"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["-d", "docker.env", *arguments], {}) == 1
    assert words in capsys.readouterr().err
    assert os.listdir(directory) == []


def test_an_empty_subnet_file_is_the_default_as_flanneld_has_it() -> None:
    """The unit passes on FLANNELD_SUBNET_FILE, whatever it is."""
    subnet_file = flags.parse([], {"FLANNELD_SUBNET_FILE": ""}).options.subnet_file
    assert parse(["-s", "-f", ""]).subnet_file == subnet_file == Request().subnet_file


def test_options_may_share_a_dash_and_touch_their_argument(directory: Path) -> None:
    (directory / "subnet.env").write_text(USUAL)
    assert main(["-icfsubnet.env", "-ddocker.env", "-kX", "--", "more"], {}) == 0
    assert (directory / "docker.env").read_text().endswith('\nX=" --bip=10.5.72.1/24 --mtu=1450"\n')


@pytest.mark.parametrize(
    "text",
    [
        "FLANNEL_SUBNET=\"10.5.72.1/24\"\nFLANNEL_MTU='1450'\n",
        "# by flanneld\n\n  \t\nexport FLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450 # bytes\n",
        "FLANNEL_SUBNET=10.5.9.1/24\nFLANNEL_SUBNET=10.5.72.1/24  \n\tFLANNEL_MTU=1450",
        "FLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=\nOTHER='$(reboot)'\n",
        "DOCKER_OPT_EVIL=-H=tcp://0.0.0.0\nDOCKER_OPTS=-D\n" + USUAL,
    ],
)
def test_plain_assignments_are_read_as_a_shell_would(directory: Path, text: str) -> None:
    """Of the file only what flanneld writes counts: nobody else's options get to docker by it."""
    (directory / "subnet.env").write_text(text)
    assert main(["-f", "subnet.env", "-d", "docker.env", "-c"], {}) == 0
    assert (
        directory / "docker.env"
    ).read_text() == 'DOCKER_OPTS=" --bip=10.5.72.1/24 --mtu=1450"\n'


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("FLANNEL_SUBNET=$(touch HIT)", "FLANNEL_SUBNET", "$(touch HIT)"),
        ("FLANNEL_SUBNET='$(touch HIT)'", "FLANNEL_SUBNET", "$(touch HIT)"),
        ("FLANNEL_SUBNET=`touch HIT`", "FLANNEL_SUBNET", "`touch HIT`"),
        ("FLANNEL_SUBNET=10.5.72.1/24;touch HIT", "FLANNEL_SUBNET", "10.5.72.1/24;touch HIT"),
        ("FLANNEL_SUBNET=10.5.72.1/24 touch HIT", "FLANNEL_SUBNET", "10.5.72.1/24 touch HIT"),
        ('FLANNEL_SUBNET="10.5.72.1/24 -D"', "FLANNEL_SUBNET", "10.5.72.1/24 -D"),
        ('FLANNEL_SUBNET=10.5.72.1/24"', "FLANNEL_SUBNET", '10.5.72.1/24"'),
        ("FLANNEL_SUBNET=10.5.72.1/24\r", "FLANNEL_SUBNET", r"10.5.72.1/24\x0d"),
        ("FLANNEL_SUBNET='10.5.72.1/24\r'", "FLANNEL_SUBNET", r"10.5.72.1/24\x0d"),
        ("FLANNEL_SUBNET='10.5.72.1/24\n-D'", "FLANNEL_SUBNET", "'10.5.72.1/24"),
        ("FLANNEL_SUBNET= 10.5.72.1/24", "FLANNEL_SUBNET", " 10.5.72.1/24"),
        ("FLANNEL_SUBNET=10.5.72.1", "FLANNEL_SUBNET", "10.5.72.1"),
        ("FLANNEL_SUBNET=10.5.72.256/24", "FLANNEL_SUBNET", "10.5.72.256/24"),
        ("FLANNEL_SUBNET=10.5.72.1/33", "FLANNEL_SUBNET", "10.5.72.1/33"),
        ("FLANNEL_SUBNET=10.5.72.1/0", "FLANNEL_SUBNET", "10.5.72.1/0"),
        ("FLANNEL_SUBNET=fd00::1/64", "FLANNEL_SUBNET", "fd00::1/64"),
        ("FLANNEL_SUBNET=\uff110.5.72.1/24", "FLANNEL_SUBNET", r"\uff110.5.72.1/24"),
        ("FLANNEL_MTU=1450\\", "FLANNEL_MTU", "1450\\"),
        ("FLANNEL_MTU=-1", "FLANNEL_MTU", "-1"),
        ("FLANNEL_MTU=67", "FLANNEL_MTU", "67"),
        ("FLANNEL_MTU=99999", "FLANNEL_MTU", "99999"),
        ("FLANNEL_MTU=14 50", "FLANNEL_MTU", "14 50"),
        ("FLANNEL_IPMASQ=TRUE", "FLANNEL_IPMASQ", "TRUE"),
        ("FLANNEL_IPMASQ=true\x00", "FLANNEL_IPMASQ", r"true\x00"),
        ("touch HIT", "line 1", "touch HIT"),
        ("$(touch HIT)=1", "$(touch HIT)", "1"),
        ("OTHER=$(touch HIT)", "OTHER", "$(touch HIT)"),
        ("FLANNEL_SUBNET: 10.5.72.1/24", "line 1", "FLANNEL_SUBNET: 10.5.72.1/24"),
    ],
)
def test_a_hostile_value_is_one_clear_error(
    directory: Path, capsys: pytest.CaptureFixture[str], line: str, field: str, value: str
) -> None:
    (directory / "subnet.env").write_text(f"{line}\nFLANNEL_NETWORK=10.5.0.0/16\n")
    assert main(["-f", "subnet.env", "-d", "docker.env"], {}) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"Invalid value of {field}: {value} (wanted: ")
    assert said.endswith("; restart flanneld, which writes the subnet file anew)\n")
    assert said.count("\n") == 1
    assert os.listdir(directory) == ["subnet.env"]


def test_a_bad_file_leaves_the_old_output_as_it_was(directory: Path) -> None:
    (directory / "subnet.env").write_text("FLANNEL_MTU=$(reboot)\n")
    (directory / "docker.env").write_text("old\n")
    assert main(["-f", "subnet.env", "-d", "docker.env"], {}) == 1
    assert (directory / "docker.env").read_text() == "old\n"
    assert main(["-f", "/dev/zero", "-d", "docker.env"], {}) == 1
    assert (directory / "docker.env").read_text() == "old\n"


SAFE_VALUE = re.compile(r"[A-Za-z0-9_./=:, -]*", re.ASCII)
AWKWARD = st.text(
    st.one_of(st.sampled_from("\"'$`\\;&|<>(){}*?!#~ \t\n\r\x00\x7f=0"), st.characters()),
    max_size=20,
)


@settings(deadline=None)
@given(
    key=st.sampled_from(["FLANNEL_SUBNET", "FLANNEL_MTU", "FLANNEL_IPMASQ", "DOCKER_OPT_X"]),
    before=st.sampled_from(["", "10.5.72.1/24", "1450", "true"]),
    value=AWKWARD,
    quote=st.sampled_from(["", "'", '"']),
)
def test_no_metacharacter_of_the_file_reaches_the_output(
    key: str, before: str, value: str, quote: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name, "subnet.env"), Path(name, "docker.env")
        source.write_bytes(
            f"{key}={quote}{before}{value}{quote}\n".encode("utf-8", "surrogatepass")
        )
        if main(["-f", str(source), "-d", str(output)], {}) != 0:
            assert not output.exists()
            return
        for line in output.read_text().splitlines():
            match = re.fullmatch(r'(DOCKER_OPT_(?:BIP|MTU|IPMASQ)|DOCKER_OPTS)="(.*)"', line)
            assert match is not None
            assert SAFE_VALUE.fullmatch(match[2])


PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " "


@settings(deadline=None)
@given(st.text(PRINTABLE, max_size=15), st.text(PRINTABLE + "äñ", max_size=15))
def test_what_the_operator_set_is_read_back_unchanged_by_a_shell(option: str, debug: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        output = Path(name, "docker.env")
        environ = {"DOCKER_OPT_X": option, "DOCKER_OPTS": debug}
        assert main(["-f", "/nowhere/subnet.env", "-d", str(output)], environ) == 0
        text = output.read_text()
    # The whole of it is one shell word after the name, with nothing to expand.
    whole = f"{debug}  {option}" if debug else f" {option}"
    for line, value in zip(text.splitlines(), [option, whole], strict=True):
        quoted = line.partition("=")[2]
        assert re.fullmatch(r'"(?:[^"$`\\]|\\["$`\\])*"', quoted)
        assert re.sub(r'\\(["$`\\])', r"\1", quoted[1:-1]) == value


def test_a_real_shell_reads_back_what_was_written(directory: Path) -> None:
    nasty = "a\"b$(touch HIT)`touch HIT`\\c\\\\'d'${IFS}!*"
    assert main(["-f", "none", "-d", "docker.env", "-c"], {"DOCKER_OPTS": nasty}) == 0
    done = subprocess.run(
        ["sh", "-c", '. ./docker.env; printf %s "$DOCKER_OPTS"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == nasty + " "
    assert os.listdir(directory) == ["docker.env"]


@pytest.mark.parametrize("name", ["DOCKER_OPTS", "DOCKER_OPT_X"])
def test_what_the_operator_set_must_be_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["-f", "none", "-d", "docker.env"], {name: "a\nb"}) == 1
    assert f"Invalid value of {name}: a\\x0ab" in capsys.readouterr().err
    assert os.listdir(directory) == []


def test_a_variable_that_no_shell_could_have_is_left_out(directory: Path) -> None:
    assert main(["-f", "none", "-d", "docker.env"], {"DOCKER_OPT_$(reboot)": "x"}) == 0
    assert (directory / "docker.env").read_text() == 'DOCKER_OPTS=""\n'


@pytest.mark.parametrize("text", [None, "", "FLANNEL_MTU=1450\n"])
def test_strictly_a_file_without_a_subnet_is_an_error(
    directory: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    """docker with a bridge of its own choice is worse than none."""
    source, output = directory / "subnet.env", directory / "out"
    if text is not None:
        source.write_text(text)
    arguments = ["-s", "-f", str(source), "-d", str(output)]
    assert main(arguments, {}) == 1
    assert "has no FLANNEL_SUBNET: start flanneld" in capsys.readouterr().err
    assert not output.exists()
    source.write_text("FLANNEL_SUBNET=10.5.72.1/24\n")
    assert main(arguments, {}) == 0
    assert "--bip=10.5.72.1/24" in output.read_text()


def test_the_output_file_is_replaced_whole_and_only_when_it_changes(directory: Path) -> None:
    source, output = directory / "subnet.env", directory / "docker.env"
    source.write_text(USUAL)
    arguments = ["-f", "subnet.env", "-d", "docker.env"]
    assert main(arguments, {}) == 0
    first = output.stat()
    assert stat.S_IMODE(first.st_mode) == 0o644
    with output.open() as reader:
        assert main(arguments, {}) == 0
        assert output.stat().st_ino == first.st_ino
        assert output.stat().st_mtime_ns == first.st_mtime_ns
        source.write_text(USUAL.replace("10.5.72.1", "10.5.9.1"))
        assert main(arguments, {}) == 0
        # A reader that has it open keeps the old text.
        assert "10.5.72.1" in reader.read()
    assert "10.5.9.1" in output.read_text()
    assert sorted(os.listdir(directory)) == ["docker.env", "subnet.env"]


def test_a_link_and_what_is_no_file_are_written_through(directory: Path) -> None:
    (directory / "subnet.env").write_text(USUAL)
    (directory / "link").symlink_to("real")
    assert main(["-f", "subnet.env", "-d", "link"], {}) == 0
    assert (directory / "link").is_symlink()
    assert (directory / "real").read_text().startswith("DOCKER_OPT_BIP=")
    os.mkfifo(directory / "pipe")
    reader = os.open(directory / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert main(["-f", "subnet.env", "-d", "pipe"], {}) == 0
        assert os.read(reader, 100).startswith(b"DOCKER_OPT_BIP=")
    finally:
        os.close(reader)


def test_a_subnet_file_that_the_options_were_written_over_stays(directory: Path) -> None:
    """Some hosts have it so: the second run must not lose what the first one made."""
    file = directory / "subnet.env"
    file.write_text(USUAL)
    assert main(["-f", "subnet.env", "-d", "subnet.env"], {}) == 0
    first = file.read_text()
    assert "--bip=10.5.72.1/24" in first
    assert main(["-f", "subnet.env", "-d", "subnet.env"], {}) == 0
    assert file.read_text() == first


def test_as_a_program_it_imports_nothing_heavy(directory: Path) -> None:
    (directory / "subnet.env").write_text(USUAL)
    command = [sys.executable, "-X", "importtime", "-m", "flanneld.docker_opts"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "-f", "subnet.env", "-d", "docker.env"],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert done.returncode == 0
    assert (directory / "docker.env").exists()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "flanneld.subnet.env" in imported
    assert not imported & {"pyroute2", "etcd", "argparse", "subprocess", "socket", "logging"}
