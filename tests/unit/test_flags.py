"""Flag syntax, environment, help and checks, against what Go flannel v0.8.0 was recorded doing."""

import contextlib
import ipaddress
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flanneld import flags
from flanneld.errors import OptionError, UsageError
from flanneld.flags import FLAGS, HelpRequested, Options, check, go_quote, parse, usage

FIXTURES = Path(__file__).parent.parent / "fixtures" / "cli"


def options(*argv: str, **environ: str) -> Options:
    parsed = parse(argv, {f"FLANNELD_{name}": value for name, value in environ.items()})
    assert all(warning.startswith("Ignoring the argument ") for warning in parsed.warnings)
    return parsed.options


def failure(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        parse(argv, environ or {})
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- the recordings


def recorded(name: str) -> list[tuple[str, str]]:
    """(command, output) of each case in a recording."""
    text = (FIXTURES / name).read_text()
    cases = [case.partition("\n") for case in re.split(r"^### ", text, flags=re.M)[1:]]
    return [(command, output) for command, _, output in cases]


FLAG_CASES = recorded("flags-0.8.0.txt")
ENV_CASES = recorded("env-0.8.0.txt")


def test_the_recordings_are_read() -> None:
    assert len(FLAG_CASES) == 27
    assert len(ENV_CASES) == 10


@pytest.mark.parametrize(("command", "output"), FLAG_CASES, ids=[c for c, _ in FLAG_CASES])
def test_recorded_command_line(command: str, output: str) -> None:
    argv = shlex.split(command)[1:]
    stderr = re.findall(r"^stderr: (.*)$", output, re.M)
    if "kept running" in output:
        assert not options(*argv).version
    elif stderr == ["v0.8.0"]:
        assert options(*argv).version
    elif stderr[0] == "Usage: flanneld [OPTION]...":
        with pytest.raises(HelpRequested):
            parse(argv, {})
    else:
        assert failure(argv) == stderr[0]


@pytest.mark.parametrize(("command", "output"), ENV_CASES, ids=[c for c, _ in ENV_CASES])
def test_recorded_environment(command: str, output: str) -> None:
    words = shlex.split(command)
    program = words.index("flanneld")
    environ = dict(word.rstrip(";").split("=", 1) for word in words[1:program])
    got = parse(words[program + 1 :], environ).options
    assert not got.version
    # What the original did shows which values it had.
    if "Key not found" in output:
        assert got.etcd_endpoints == "http://10.97.0.254:22379"
    elif "unavailable" in output:
        assert got.etcd_endpoints == Options().etcd_endpoints
    if match := re.search(r"interface matching ([^:]*):", output):
        assert got.iface == (match[1],)
    elif "FLANNELD_IFACE" in environ:
        assert got.iface == ("eth0",)
    else:
        assert got.iface == ()
    external = re.search(r"Using ([0-9.]+) as external address", output)
    assert got.public_ip == (external[1] if external else "")


# Flags that v0.8.0 did not have.
# Of later versions, and our own.
LATER = ("cleanup", "ip-masq-fully-random-disable", "iptables-forward-rules", "iptables-resync")


def _without_later_flags(text: str) -> str:
    for name in LATER:
        text, found = re.subn(rf"^  -{name}( .*)?\n    \t.*\n", "", text, flags=re.M)
        assert found == 1, name
    return text


def test_help_is_laid_out_as_recorded() -> None:
    blank = re.sub(
        r"^(    \t).*?(?=( \(default .*\))?$)", r"\1<description>", usage("flanneld"), flags=re.M
    )
    ours = _without_later_flags(blank)
    assert ours == (FIXTURES / "help-0.8.0.txt").read_text()


def test_help_names_the_program_and_describes_every_flag() -> None:
    assert usage("./x/flanneld").startswith("Usage: ./x/flanneld [OPTION]...\n")
    for flag in FLAGS:
        assert re.fullmatch(r"[^\s`(][^\n`]*[^\s.]", flag.usage), flag.name


# --- the table


def test_table_and_options_agree() -> None:
    assert [flag.attribute for flag in FLAGS] == [entry.name for entry in fields(Options)]
    assert len({flag.name for flag in FLAGS}) == 22 + len(LATER)
    for flag in FLAGS:
        assert getattr(Options(), flag.attribute) == flag.default


def test_nothing_given_is_the_defaults() -> None:
    parsed = parse([], {})
    assert parsed.options == Options()
    assert parsed.warnings == ()
    assert parsed.options.etcd_endpoints == "http://127.0.0.1:4001,http://127.0.0.1:2379"
    assert parsed.options.etcd_prefix == "/coreos.com/network"
    assert parsed.options.subnet_file == "/run/flannel/subnet.env"
    assert parsed.options.subnet_lease_renew_margin == 60
    assert parsed.options.healthz_ip == "0.0.0.0"  # noqa: S104 - the default


def test_options_are_values_and_hide_the_password() -> None:
    got = options("-etcd-password=hunter2", "-etcd-username=bob")
    assert got.etcd_password == "hunter2"  # noqa: S105 - no password of anyone's
    assert "hunter2" not in repr(got)
    assert "bob" in repr(got)
    with pytest.raises(FrozenInstanceError):
        got.v = 3  # type: ignore[misc]  # that it is refused is what is tested
    assert not hasattr(got, "__dict__")


# --- syntax


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-public-ip=1.2.3.4"], {"public_ip": "1.2.3.4"}),
        (["--public-ip", "1.2.3.4"], {"public_ip": "1.2.3.4"}),
        (["-public-ip=1.2.3.4", "-public-ip", "5.6.7.8"], {"public_ip": "5.6.7.8"}),
        (["-public-ip=a=b"], {"public_ip": "a=b"}),
        (["-public-ip="], {}),
        (["-public-ip", "-v"], {"public_ip": "-v"}),
        (["-public-ip", "--", "-v=1"], {"public_ip": "--", "v": 1}),
        (["-iface", "a", "-iface=b", "--iface", "a"], {"iface": ("a", "b", "a")}),
        (["-iface", ""], {"iface": ("",)}),
        (["-iface-regex=^eth.*,x"], {"iface_regex": ("^eth.*,x",)}),
        (["-ip-masq"], {"ip_masq": True}),
        (["-ip-masq", "false", "-v=2"], {"ip_masq": True}),
        (["-ip-masq", "-ip-masq=false"], {}),
        (["-v", "2", "-", "-v=3"], {"v": 2}),
        (["-v", "2", "", "-v=3"], {"v": 2}),
        (["-v", "2", "--", "-v=3"], {"v": 2}),
        (["-v=2", "x", "-bogus"], {"v": 2}),
        (["-v=-1"], {"v": -1}),
        (["-v=+07"], {"v": 7}),
        (["-v", "9223372036854775807"], {"v": 2**63 - 1}),
        (["-healthz-port", "-1"], {"healthz_port": -1}),
        (["-vmodule=vxlan=2,route*=1,"], {"vmodule": "vxlan=2,route*=1,"}),
        (["-vmodule="], {}),
        (["-vmodule=a=0"], {"vmodule": "a=0"}),
        (["-log_backtrace_at=main.go:459"], {"log_backtrace_at": "main.go:459"}),
        (["-version", "-subnet-file", "f"], {"version": True, "subnet_file": "f"}),
    ],
)
def test_accepted(argv: list[str], expected: dict[str, Any]) -> None:
    assert options(*argv) == replace(Options(), **expected)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["-ip-masq", "false", "-etcd-password=secret"], '"false"'),
        (["x"], '"x"'),
        (["-v=2", "--", "-v=3"], '"-v=3"'),
        (["-v=2", "--"], None),
    ],
)
def test_what_is_no_flag_is_ignored_with_a_warning(argv: list[str], named: str | None) -> None:
    """The original says nothing. The warning names the first, and never what may be a secret."""
    text = (
        "Ignoring the argument {} and all after it: it is no flag (the value of a switch is given"
        " with =, as in -ip-masq=false)"
    )
    assert parse(argv, {}).warnings == (() if named is None else (text.format(named),))


def test_clean_up_takes_no_argument() -> None:
    """Who forgets the flag in front of a subnet file must not clean up by another."""
    assert failure(["-cleanup", "/run/two.env"]) == 'unexpected argument "/run/two.env"'
    assert parse(["-cleanup", "--"], {}).options.cleanup


def test_defaults_are_written_as_they_are_given() -> None:
    assert "which docker has drop them (default true)\n" in usage("flanneld")


ATOI = "strconv.Atoi: parsing"
VMODULE = "syntax error: expect comma-separated list of filename=N"
BACKTRACE = "syntax error: expect file.go:234"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bogus=1"], "flag provided but not defined: -bogus"),
        (["-etcd_prefix=/x"], "flag provided but not defined: -etcd_prefix"),
        (["-log-backtrace-at=a.go:1"], "flag provided but not defined: -log-backtrace-at"),
        (["-V"], "flag provided but not defined: -V"),
        (["--=x"], "bad flag syntax: --=x"),
        (["----"], "bad flag syntax: ----"),
        (["-v=1", "--etcd-prefix"], "flag needs an argument: -etcd-prefix"),
        (["-bogus", "-h"], "flag provided but not defined: -bogus"),
        (["-version", "-bogus"], "flag provided but not defined: -bogus"),
        (["-ip-masq=yes"], 'invalid boolean value "yes" for -ip-masq: parse error'),
        (["-ip-masq="], 'invalid boolean value "" for -ip-masq: parse error'),
        (["-v="], f'invalid value "" for flag -v: {ATOI} "": invalid syntax'),
        (["-v=1_0"], f'invalid value "1_0" for flag -v: {ATOI} "1_0": invalid syntax'),
        (["-v=0x1"], f'invalid value "0x1" for flag -v: {ATOI} "0x1": invalid syntax'),
        (["-v=1 "], f'invalid value "1 " for flag -v: {ATOI} "1 ": invalid syntax'),
        (
            ["-v=9223372036854775808"],
            f'invalid value "9223372036854775808" for flag -v: {ATOI} "9223372036854775808": '
            "value out of range",
        ),
        (["-vmodule=a"], f'invalid value "a" for flag -vmodule: {VMODULE}'),
        (["-vmodule=a=1=2"], f'invalid value "a=1=2" for flag -vmodule: {VMODULE}'),
        (["-vmodule=b=1,=1"], f'invalid value "b=1,=1" for flag -vmodule: {VMODULE}'),
        (["-vmodule=a="], f'invalid value "a=" for flag -vmodule: {VMODULE}'),
        (["-vmodule=a=0x1"], f'invalid value "a=0x1" for flag -vmodule: {VMODULE}'),
        (
            ["-vmodule=a=-1"],
            'invalid value "a=-1" for flag -vmodule: negative value for vmodule level',
        ),
        (["-log_backtrace_at="], f'invalid value "" for flag -log_backtrace_at: {BACKTRACE}'),
        (["-log_backtrace_at=:0"], f'invalid value ":0" for flag -log_backtrace_at: {BACKTRACE}'),
        (["-log_backtrace_at=a:1"], f'invalid value "a:1" for flag -log_backtrace_at: {BACKTRACE}'),
        (
            ["-log_backtrace_at=a.go:1:2"],
            f'invalid value "a.go:1:2" for flag -log_backtrace_at: {BACKTRACE}',
        ),
        (
            ["-log_backtrace_at=a.go:0"],
            'invalid value "a.go:0" for flag -log_backtrace_at: negative or zero value for level',
        ),
    ],
)
def test_refused_with_gos_words(argv: list[str], message: str) -> None:
    assert failure(argv) == message


@pytest.mark.parametrize("argument", ["-h", "--h", "-help", "--help", "-h=x", "--help=false"])
def test_help_is_recognized(argument: str) -> None:
    with pytest.raises(HelpRequested):
        parse(["-v=1", argument, "-bogus"], {})


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True"])
def test_true(text: str) -> None:
    assert options(f"-ip-masq={text}").ip_masq is True


@pytest.mark.parametrize("text", ["0", "f", "F", "FALSE", "false", "False"])
def test_false(text: str) -> None:
    assert options("-ip-masq", f"-ip-masq={text}").ip_masq is False


# The syntax of strconv.ParseInt(text, 0, 64), and which of its two errors comes first.
INTEGERS: list[tuple[str, int | str]] = [
    ("0", 0),
    ("-0", 0),
    ("+60", 60),
    ("010", 8),
    ("0o10", 8),
    ("0O1_0", 8),
    ("0_7", 7),
    ("0x3c", 60),
    ("-0X3C", -60),
    ("0x_3c", 60),
    ("0b101", 5),
    ("1_000", 1000),
    ("9223372036854775807", 2**63 - 1),
    ("-9223372036854775808", -(2**63)),
    ("0x7fff_ffff_ffff_ffff", 2**63 - 1),
    ("", "parse error"),
    ("-", "parse error"),
    ("+-1", "parse error"),
    ("08", "parse error"),
    ("0x", "parse error"),
    ("0x_", "parse error"),
    ("0b2", "parse error"),
    ("_1", "parse error"),
    ("1_", "parse error"),
    ("1__0", "parse error"),
    ("0_", "parse error"),
    ("-_1", "parse error"),
    ("3c", "parse error"),
    ("1.0", "parse error"),
    (" 1", "parse error"),
    ("1\n", "parse error"),
    ("\u0661", "parse error"),
    ("9223372036854775808", "value out of range"),
    ("-9223372036854775809", "value out of range"),
    ("9223372036854775808x", "parse error"),
    ("18446744073709551616x", "value out of range"),
    ("1__8446744073709551616", "value out of range"),
    ("1__8446744073709551615", "parse error"),
    ("0x10000000000000000", "value out of range"),
]


@pytest.mark.parametrize(("text", "expected"), INTEGERS)
def test_integers(text: str, expected: int | str) -> None:
    if isinstance(expected, int):
        assert options(f"-healthz-port={text}").healthz_port == expected
    else:
        quoted = go_quote(text)
        assert failure(["-healthz-port", text]) == (
            f"invalid value {quoted} for flag -healthz-port: {expected}"
        )


@given(st.text("0123456789abcdefxXobOB_+-", max_size=12))
@example("0x_")
def test_integers_are_pythons_but_for_the_leading_zero(text: str) -> None:
    """Python took its literal syntax for base 0 from the same place; octal aside."""
    c_octal = re.fullmatch(r"([+-]?)0((?:_?[0-7])+)", text)
    try:
        expected: int | None = int("{}0o{}".format(*c_octal.groups()) if c_octal else text, 0)
    except ValueError:
        expected = None
    try:
        got: int | None = flags.parse_int(text, 0)
    except ValueError:
        got = None
    assert got == expected


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ('a"b\\', r'"a\"b\\"'),
        ("\a\b\f\n\r\t\v", r'"\a\b\f\n\r\t\v"'),
        ("\x00\x7f", r'"\x00\x7f"'),
        ("\u0080\u00ad\u2028\U000e0001", r'"\u0080\u00ad\u2028\U000e0001"'),
        ("é 世\U0001f600", '"é 世\U0001f600"'),
        (b"\xff".decode("utf-8", "surrogateescape"), r'"\xff"'),
    ],
)
def test_quoting(text: str, quoted: str) -> None:
    assert go_quote(text) == quoted


# --- environment


def test_every_variable_sets_its_flag() -> None:
    texts: dict[flags.Kind[object], tuple[str, Any]] = {
        flags.STRING: ("text", "text"),
        flags.INT: ("0x11", 17),
        flags.BOOL: ("T", True),
        flags.LIST: ("a,b", ("a,b",)),
        flags.LEVEL: ("5", 5),
        flags.VMODULE: ("a=1", "a=1"),
        flags.BACKTRACE: ("a.py:1", "a.py:1"),
    }
    for flag in FLAGS:
        text, value = texts[flag.kind]
        got = options(**{flag.variable.removeprefix("FLANNELD_"): text})
        if flag.name in flags.COMMANDS:
            assert got == Options()
        else:
            expected: dict[str, Any] = {flag.attribute: value}
            assert got == replace(Options(), **expected)


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        ([], {"PUBLIC_IP": ""}, {}),
        (["-public-ip=5.6.7.8"], {"PUBLIC_IP": "1.2.3.4"}, {"public_ip": "5.6.7.8"}),
        (["-public-ip="], {"PUBLIC_IP": "1.2.3.4"}, {}),
        (["-ip-masq=false"], {"IP_MASQ": "true"}, {}),
        (["-iface=a"], {"IFACE": "b"}, {"iface": ("a",)}),
        (["-v=0"], {"V": "x"}, {}),
        (["x", "-v=1"], {"V": "2"}, {"v": 2}),
        (["-version"], {"V": "x", "PUBLIC_IP": "1.2.3.4"}, {"version": True}),
        (["-version=false"], {"VERSION": "true"}, {}),
        ([], {"VERSION": "maybe"}, {}),
        ([], {"BOGUS": "1", "LOG-BACKTRACE-AT": "x", "v": "3"}, {}),
    ],
)
def test_environment_against_command_line(
    argv: list[str], environ: dict[str, str], expected: dict[str, Any]
) -> None:
    assert options(*argv, **environ) == replace(Options(), **expected)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLANNELD_IP_MASQ", "maybe"),
        ("FLANNELD_HEALTHZ_PORT", "abc"),
        ("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "99999999999999999999"),
        ("FLANNELD_V", "0x1"),
        ("FLANNELD_VMODULE", "x"),
        ("FLANNELD_LOG_BACKTRACE_AT", "foo"),
    ],
)
def test_an_invalid_variable_is_one_warning_and_no_change(variable: str, value: str) -> None:
    parsed = parse([], {variable: value, "FLANNELD_IFACE": "eth0"})
    assert parsed.options == replace(Options(), iface=("eth0",))
    assert len(parsed.warnings) == 1
    (flag,) = [flag for flag in FLAGS if flag.variable == variable]
    assert parsed.warnings[0].startswith(f'Ignoring {variable}="{value}": ')
    assert parsed.warnings[0].endswith(f"the default stays; use {flag.kind.accepts}")


def test_the_command_line_comes_before_the_environment() -> None:
    assert failure(["-bogus"], {"FLANNELD_V": "x"}) == "flag provided but not defined: -bogus"


# --- properties

INT64 = st.integers(-(2**63), 2**63 - 1)
NAMES = st.text("abcz*?[]_-", min_size=1, max_size=8)
VALUES: dict[flags.Kind[object], st.SearchStrategy[Any]] = {
    flags.STRING: st.text(),
    flags.INT: INT64,
    flags.BOOL: st.booleans(),
    flags.LIST: st.lists(st.text(), max_size=3).map(tuple),
    flags.LEVEL: INT64,
    flags.VMODULE: st.lists(
        st.tuples(NAMES, st.integers(0, 9)).map(lambda pair: f"{pair[0]}={pair[1]}")
    ).map(",".join),
    flags.BACKTRACE: st.tuples(NAMES, st.integers(1, 999)).map(
        lambda pair: f"{pair[0]}.py:{pair[1]}"
    )
    | st.just(":0"),
}
OPTIONS = st.fixed_dictionaries({flag.attribute: VALUES[flag.kind] for flag in FLAGS}).map(
    lambda values: Options(**values)
)


def arguments(given_options: Options, dashes: str) -> list[list[str]]:
    """One group of arguments per flag that is not at its default."""
    groups = []
    for flag in FLAGS:
        value = getattr(given_options, flag.attribute)
        if value == flag.default:
            continue
        entries = value if flag.kind is flags.LIST else [value]
        joined = flag.kind is flags.BOOL or dashes == "--"
        group = []
        for entry in entries:
            text = str(entry).lower() if flag.kind is flags.BOOL else str(entry)
            name = dashes + flag.name
            group += [f"{name}={text}"] if joined else [name, text]
        groups.append(group)
    return groups


@given(OPTIONS, st.sampled_from(["-", "--"]), st.randoms(use_true_random=False), st.booleans())
def test_round_trip(wanted: Options, dashes: str, random: Any, end: bool) -> None:
    groups = arguments(wanted, dashes)
    random.shuffle(groups)
    argv = [argument for group in groups for argument in group]
    rest = ["--", "-bogus"] if end and not wanted.cleanup else []
    assert parse(argv + rest, {}).options == wanted


@given(OPTIONS, OPTIONS)
def test_command_line_over_environment_over_default(first: Options, second: Options) -> None:
    first = replace(first, version=False)
    environ = {
        flag.variable: str(getattr(second, flag.attribute))
        for flag in FLAGS
        if flag.kind is not flags.LIST and getattr(second, flag.attribute) != flag.default
    }
    argv = [argument for group in arguments(first, "-") for argument in group]
    parsed = parse(argv, environ)
    assert parsed.warnings == ()
    for flag in FLAGS:
        mine, theirs = (getattr(source, flag.attribute) for source in (first, second))
        got = getattr(parsed.options, flag.attribute)
        if mine != flag.default:
            assert got == mine
        elif flag.variable in environ and flag.name not in flags.COMMANDS and theirs != "":
            assert got == theirs
        else:
            assert got == flag.default


FLAGLIKE = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "-", "--", "---"]),
    st.sampled_from([flag.name for flag in FLAGS]) | st.text(max_size=3),
    st.just("") | st.text(max_size=6).map("={}".format),
)


@given(
    st.lists(FLAGLIKE | st.text(max_size=5), max_size=8),
    st.dictionaries(st.sampled_from([flag.variable for flag in FLAGS]), st.text(max_size=6)),
)
def test_any_input_is_an_answer_or_a_usage_error(argv: list[str], environ: dict[str, str]) -> None:
    try:
        parsed = parse(argv, environ)
    except UsageError:
        return
    except HelpRequested:
        assert any(re.match("--?h(elp)?(=|$)", argument) for argument in argv)
    else:
        assert len(parsed.warnings) <= len(environ) + 1


# --- checks


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["-subnet-lease-renew-margin=1"],
        ["-subnet-lease-renew-margin=1439"],
        ["-etcd-keyfile=k", "-etcd-certfile=c"],
        ["-etcd-cafile=ca"],
        ["-kube-subnet-mgr=false", "-kube-api-url=", "-ip-masq=false"],
        ["-ip-masq", "-iptables-forward-rules=false", "-ip-masq-fully-random-disable"],
        ["-iptables-resync=1"],
        ["-iptables-resync=86400"],
        ["-healthz-port=65535", "-healthz-ip=::1"],
        ["-healthz-port=-1"],
        ["-healthz-ip=localhost", "-healthz-port=8080"],
        ["-public-ip=10.97.0.1"],
    ],
)
def test_usable(argv: list[str]) -> None:
    check(options(*argv))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["-subnet-lease-renew-margin=0"],
            "Invalid subnet-lease-renew-margin option, out of acceptable range: "
            "0 (use 1 to 1439 minutes)",
        ),
        (
            ["-subnet-lease-renew-margin=1440"],
            "Invalid subnet-lease-renew-margin option, out of acceptable range: "
            "1440 (use 1 to 1439 minutes)",
        ),
        (["-etcd-keyfile=k"], "etcd-keyfile is given without etcd-certfile: give both, or neither"),
        (
            ["-etcd-certfile=c"],
            "etcd-certfile is given without etcd-keyfile: give both, or neither",
        ),
        (
            ["-kube-subnet-mgr"],
            "this version has no Kubernetes support: remove kube-subnet-mgr "
            "and keep the network config in etcd",
        ),
        (
            ["-kube-api-url=http://a", "-kubeconfig-file=f"],
            "this version has no Kubernetes support: remove kube-api-url, kubeconfig-file "
            "and keep the network config in etcd",
        ),
        (["-iptables-resync=0"], "invalid iptables-resync: 0 (use 1 to 86400 seconds)"),
        (["-iptables-resync=86401"], "invalid iptables-resync: 86401 (use 1 to 86400 seconds)"),
        (
            ["-healthz-port=65536"],
            "invalid healthz-port: 65536 (use 1 to 65535, or 0 for none)",
        ),
        (
            ["-public-ip=foo"],
            "invalid public IP address: foo (use an IPv4 address like 192.0.2.1)",
        ),
        (
            ["-public-ip=fd00::1"],
            "invalid public IP address: fd00::1 (use an IPv4 address like 192.0.2.1)",
        ),
    ],
)
def test_unusable(argv: list[str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check(options(*argv))
    assert str(caught.value) == message
    assert caught.value.exit_code == 1


@given(OPTIONS)
def test_check_raises_nothing_else(wanted: Options) -> None:
    with contextlib.suppress(OptionError):
        check(wanted)
        ipaddress.IPv4Address(wanted.public_ip or "192.0.2.1")
        assert wanted.healthz_port <= 65535
