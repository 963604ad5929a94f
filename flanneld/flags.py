"""Command line and environment of flanneld: Go's flag syntax over one table of options.

``Options`` is that table: each field declares its flag with name, kind, default and usage text.
The command line, the ``FLANNELD_*`` variables and the help text are all read from it.

The syntax, the order of evaluation and every error text are those of Go's ``flag`` and
``strconv`` packages and of glog, as flannel v0.8.0 shows them. Deliberate differences: an
invalid environment value gives a warning, and a wrong flag ends with status 2 instead of 0.
"""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

from flanneld.errors import OptionError, UsageError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

ENV_PREFIX = "FLANNELD_"
# Flags that are no settings but have the program do something else: not read from the environment.
COMMANDS = frozenset({"cleanup", "version"})
# A day, in seconds: more is a mistake.
LONGEST_RESYNC = 86400
# glog's "no location"; it is only ever a default, since as a flag value it is a syntax error.
NO_BACKTRACE = ":0"

_TRUE = ("1", "t", "T", "TRUE", "true", "True")
_FALSE = ("0", "f", "F", "FALSE", "false", "False")
_DIGITS = {char: int(char, 16) for char in "0123456789abcdefABCDEF"}
_RADIX = {"b": 2, "B": 2, "o": 8, "O": 8, "x": 16, "X": 16}
_ESCAPES = dict(zip('\a\b\f\n\r\t\v\\"', 'abfnrtv\\"', strict=True))


class HelpRequested(Exception):
    """``-h`` or ``-help`` was given: print ``usage`` and exit with status 0."""


def go_quote(text: str) -> str:
    """Quote text as Go's ``%q`` does. A byte that was not UTF-8 in argv becomes ``\\xNN``."""

    def char(c: str) -> str:
        code = ord(c)
        if c in _ESCAPES:
            return "\\" + _ESCAPES[c]
        if c.isprintable():
            return c
        if code < 0x80:
            return f"\\x{code:02x}"
        if 0xDC80 <= code <= 0xDCFF:  # surrogateescape
            return f"\\x{code - 0xDC00:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return '"' + "".join(map(char, text)) + '"'


def parse_int(text: str, base: int) -> int:
    """Go's ``strconv.ParseInt`` for 64 bits and base 0 or 10.

    Base 0 takes ``0x``, ``0o``, ``0b``, a leading ``0`` for octal, and ``_`` between digits.
    Raises ValueError for wrong syntax and OverflowError for a value out of range.
    """
    body = text[1:] if text[:1] in ("+", "-") else text
    radix, digits = 10, body
    if base == 0 and body.startswith("0"):
        if len(body) >= 3 and body[1] in _RADIX:
            radix, digits = _RADIX[body[1]], body[2:]
        else:
            radix, digits = 8, body[1:]
    if not body:
        raise ValueError("invalid syntax")
    value = 0
    for char in digits:
        if char == "_" and base == 0:
            continue
        digit = _DIGITS.get(char, radix)
        if digit >= radix:
            raise ValueError("invalid syntax")
        value = value * radix + digit
        # Go stops here too: what follows an overflow is never looked at.
        if value >= 1 << 64:
            raise OverflowError("value out of range")
    if "__" in body or body.startswith("_") or body.endswith("_"):
        raise ValueError("invalid syntax")
    if text[0] == "-":
        value = -value
    if not -(1 << 63) <= value < 1 << 63:
        raise OverflowError("value out of range")
    return value


def _int(text: str) -> int:
    try:
        return parse_int(text, 0)
    except ValueError:
        raise ValueError("parse error") from None
    except OverflowError as error:
        raise ValueError(str(error)) from None


def _level(text: str) -> int:
    try:
        return parse_int(text, 10)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"strconv.Atoi: parsing {go_quote(text)}: {error}") from None


def _bool(text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("parse error")


def vmodule_levels(text: str) -> tuple[tuple[str, int], ...]:
    """The (pattern, verbosity) pairs of a ``-vmodule`` value, in order, those with 0 left out.

    Raises ValueError with glog's text.
    """
    levels = []
    for item in text.split(","):
        if not item:
            continue
        pattern, _, number = item.partition("=")
        try:
            level = parse_int(number, 10)
        except (ValueError, OverflowError):
            level = None
        if not pattern or level is None:
            raise ValueError("syntax error: expect comma-separated list of filename=N")
        if level < 0:
            raise ValueError("negative value for vmodule level")
        if level:
            levels.append((pattern, level))
    return tuple(levels)


def backtrace_location(text: str) -> tuple[str, int]:
    """The (file name, line) of a ``-log_backtrace_at`` value. ValueError carries glog's text."""
    file, _, number = text.partition(":")
    try:
        line = parse_int(number, 10)
    except (ValueError, OverflowError):
        line = None
    if "." not in file or line is None:
        raise ValueError("syntax error: expect file.go:234")
    if line <= 0:
        raise ValueError("negative or zero value for level")
    return file, line


def _vmodule(text: str) -> str:
    vmodule_levels(text)
    return text


def _backtrace(text: str) -> str:
    backtrace_location(text)
    return text


@dataclass(frozen=True, slots=True)
class Kind(Generic[T_co]):
    """What a flag's value is: its word in the help, its zero, its parser, its description.

    ``parse`` raises ValueError with the reason as Go words it. A flag whose default is ``zero``
    shows no default in the help.
    """

    word: str
    zero: T_co
    parse: Callable[[str], T_co]
    accepts: str


STRING = Kind("string", "", str, "any text")
INT = Kind("int", 0, _int, "a whole number: decimal, 0x, 0o or 0b")
BOOL = Kind("", False, _bool, "true or false, t or f, 1 or 0")
LIST: Kind[tuple[str, ...]] = Kind("value", (), lambda text: (text,), "any text")
LEVEL = Kind("value", 0, _level, "a whole decimal number")
VMODULE = Kind("value", "", _vmodule, "pattern=N, several with commas between, N from 0 up")
BACKTRACE = Kind("value", NO_BACKTRACE, _backtrace, "file.py:N, N from 1 up")


@dataclass(frozen=True, slots=True)
class Flag:
    """One row of the table. ``name`` has no dash in front, ``usage`` is for the operator."""

    name: str
    kind: Kind[object]
    default: object
    usage: str

    @property
    def attribute(self) -> str:
        """Name of the field in ``Options``."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return ENV_PREFIX + self.attribute.upper()


def _flag(name: str, kind: Kind[T], default: T, usage: str, *, secret: bool = False) -> T:
    return field(
        default=default, repr=not secret, metadata={"flag": Flag(name, kind, default, usage)}
    )


@dataclass(frozen=True, slots=True)
class Options:
    """The value of every flag. ``Options()`` holds the defaults; ``repr`` hides the password."""

    etcd_endpoints: str = _flag(
        "etcd-endpoints",
        STRING,
        "http://127.0.0.1:4001,http://127.0.0.1:2379",
        "etcd base URLs: those of all members, with commas between, no blanks",
    )
    etcd_prefix: str = _flag(
        "etcd-prefix", STRING, "/coreos.com/network", "etcd key under which this network is kept"
    )
    etcd_keyfile: str = _flag(
        "etcd-keyfile", STRING, "", "private key (PEM) of the certificate in -etcd-certfile"
    )
    etcd_certfile: str = _flag(
        "etcd-certfile", STRING, "", "certificate (PEM) to show to etcd; needs -etcd-keyfile"
    )
    etcd_cafile: str = _flag(
        "etcd-cafile", STRING, "", "CA certificates (PEM) that etcd's certificate must come from"
    )
    etcd_username: str = _flag("etcd-username", STRING, "", "etcd user, for HTTP basic auth")
    etcd_password: str = _flag(
        "etcd-password", STRING, "", "password of the etcd user", secret=True
    )
    iface: tuple[str, ...] = _flag(
        "iface",
        LIST,
        (),
        "interface for traffic between hosts, by name or IPv4 address; "
        "may be given several times, the first that exists is used",
    )
    iface_regex: tuple[str, ...] = _flag(
        "iface-regex",
        LIST,
        (),
        "regular expression for the address or name of that interface; "
        "tried in order when no -iface fits",
    )
    subnet_file: str = _flag(
        "subnet-file",
        STRING,
        "/run/flannel/subnet.env",
        "file for this host's subnet and MTU; also read at start",
    )
    public_ip: str = _flag(
        "public-ip",
        STRING,
        "",
        "IPv4 address the other hosts reach this one at; empty: the interface's own",
    )
    subnet_lease_renew_margin: int = _flag(
        "subnet-lease-renew-margin",
        INT,
        60,
        "minutes before its end at which the lease is renewed at the latest",
    )
    ip_masq: bool = _flag(
        "ip-masq", BOOL, False, "masquerade traffic that leaves the flannel network"
    )
    ip_masq_fully_random_disable: bool = _flag(
        "ip-masq-fully-random-disable",
        BOOL,
        False,
        "masquerade without --random-fully: source ports are kept where they are free",
    )
    iptables_forward_rules: bool = _flag(
        "iptables-forward-rules",
        BOOL,
        True,
        "accept the network's packets in the FORWARD chain, which docker has drop them",
    )
    iptables_resync: int = _flag(
        "iptables-resync",
        INT,
        5,
        "seconds between two checks that the masquerade and forward rules are still there",
    )
    kube_subnet_mgr: bool = _flag(
        "kube-subnet-mgr", BOOL, False, "keep leases in Kubernetes nodes, not in etcd; unsupported"
    )
    kube_api_url: str = _flag(
        "kube-api-url", STRING, "", "URL of the Kubernetes API server; unsupported"
    )
    kubeconfig_file: str = _flag(
        "kubeconfig-file", STRING, "", "Kubernetes client configuration; unsupported"
    )
    healthz_ip: str = _flag("healthz-ip", STRING, "0.0.0.0", "address of the health server")  # noqa: S104 - the original's default
    healthz_port: int = _flag("healthz-port", INT, 0, "port of the health server; 0 turns it off")
    cleanup: bool = _flag(
        "cleanup",
        BOOL,
        False,
        "remove from this host the firewall rules, routes, devices and the subnet file of flannel,"
        " and exit; stop the daemon first",
    )
    version: bool = _flag("version", BOOL, False, "print the version and exit")
    v: int = _flag("v", LEVEL, 0, "verbosity of the log; 0 is the least")
    vmodule: str = _flag(
        "vmodule", VMODULE, "", "verbosity per source file: pattern=N, several with commas between"
    )
    log_backtrace_at: str = _flag(
        "log_backtrace_at",
        BACKTRACE,
        NO_BACKTRACE,
        "add a stack trace to the log line of file.py:N",
    )


FLAGS: tuple[Flag, ...] = tuple(entry.metadata["flag"] for entry in fields(Options))
_BY_NAME = {flag.name: flag for flag in FLAGS}


@dataclass(frozen=True, slots=True)
class Parsed:
    """The outcome of ``parse``. ``warnings`` are lines for the log, once it is set up."""

    options: Options
    warnings: tuple[str, ...]


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Parsed:
    """Options from the command line (without the program name), the environment, the defaults.

    The first argument that is not a flag ends the flags; the rest is ignored with a warning, and
    refused with ``-cleanup``. A variable counts if it is not empty and its flag is not on the
    command line. An invalid variable is left out with a warning. With ``-version`` the environment
    is not read.

    Raises UsageError with Go's text, or HelpRequested.
    """
    values, rest = _from_command_line(argv)
    warnings = []
    if rest and values.get("cleanup"):
        raise UsageError(f"unexpected argument {go_quote(rest[0])}")
    if rest:
        # Of what follows nothing is shown: a password may be in it.
        warnings.append(
            f"Ignoring the argument {go_quote(rest[0])} and all after it: it is no flag"
            " (the value of a switch is given with =, as in -ip-masq=false)"
        )
    if not values.get("version"):
        for flag in FLAGS:
            text = environ.get(flag.variable, "")
            if not text or flag.attribute in values or flag.name in COMMANDS:
                continue
            try:
                values[flag.attribute] = flag.kind.parse(text)
            except ValueError as error:
                warnings.append(
                    f"Ignoring {flag.variable}={go_quote(text)}: {error}; "
                    f"the default stays; use {flag.kind.accepts}"
                )
    return Parsed(replace(Options(), **values), tuple(warnings))


def _from_command_line(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Field name -> value, for the flags that are given; and what comes after the flags."""
    values: dict[str, Any] = {}
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            break
        if len(argument) < 2 or argument[0] != "-":
            return values, [argument, *arguments]
        body = argument.removeprefix("-").removeprefix("-")
        if body[0] in "-=":
            raise UsageError(f"bad flag syntax: {argument}")
        name, equals, rest = body.partition("=")
        text: str | None = rest if equals else None
        flag = _BY_NAME.get(name)
        if flag is None:
            if name in ("h", "help"):
                raise HelpRequested
            raise UsageError(f"flag provided but not defined: -{name}")
        if text is None:
            # A bool never takes the next argument as its value.
            text = "true" if flag.kind is BOOL else next(arguments, None)
        if text is None:
            raise UsageError(f"flag needs an argument: -{name}")
        try:
            value = flag.kind.parse(text)
        except ValueError as error:
            what = "boolean value" if flag.kind is BOOL else "value"
            target = f"-{name}" if flag.kind is BOOL else f"flag -{name}"
            raise UsageError(f"invalid {what} {go_quote(text)} for {target}: {error}") from None
        if flag.kind is LIST:
            value = (*values.get(flag.attribute, ()), text)
        values[flag.attribute] = value
    return values, list(arguments)


def usage(program: str) -> str:
    """The help text, laid out as Go's ``PrintDefaults`` does. ``program`` is argv[0]."""
    lines = [f"Usage: {program} [OPTION]...\n"]
    for flag in sorted(FLAGS, key=lambda flag: flag.name):
        head = f"  -{flag.name} {flag.kind.word}".rstrip()
        # Go puts a description beside a bool flag of one letter only; there is none here.
        lines.append(f"{head}\n    \t{flag.usage}")
        if flag.default != flag.kind.zero:
            default = flag.default
            shown = go_quote(default) if isinstance(default, str) else str(default).lower()
            lines.append(f" (default {shown})")
        lines.append("\n")
    return "".join(lines)


def check(options: Options) -> None:
    """Refuse, before anything is touched, values that cannot work. Raises OptionError."""
    margin = options.subnet_lease_renew_margin
    if not 1 <= margin <= 1439:
        # 1440 minutes is a lease's whole life.
        raise OptionError(
            "Invalid subnet-lease-renew-margin option, out of acceptable range: "
            f"{margin} (use 1 to 1439 minutes)"
        )
    if bool(options.etcd_keyfile) != bool(options.etcd_certfile):
        have, lack = "etcd-keyfile", "etcd-certfile"
        if options.etcd_certfile:
            have, lack = lack, have
        raise OptionError(f"{have} is given without {lack}: give both, or neither")
    if kube := [
        name
        for name in ("kube-subnet-mgr", "kube-api-url", "kubeconfig-file")
        if getattr(options, _BY_NAME[name].attribute)
    ]:
        raise OptionError(
            f"this version has no Kubernetes support: remove {', '.join(kube)} "
            "and keep the network config in etcd"
        )
    if not 1 <= options.iptables_resync <= LONGEST_RESYNC:
        raise OptionError(
            f"invalid iptables-resync: {options.iptables_resync} "
            f"(use 1 to {LONGEST_RESYNC} seconds)"
        )
    if options.healthz_port > 65535:
        raise OptionError(
            f"invalid healthz-port: {options.healthz_port} (use 1 to 65535, or 0 for none)"
        )
    if options.public_ip and not _is_address(options.public_ip, ipaddress.IPv4Address):
        raise OptionError(
            f"invalid public IP address: {options.public_ip} (use an IPv4 address like 192.0.2.1)"
        )


def _is_address(text: str, parser: Callable[[str], object]) -> bool:
    try:
        parser(text)
    except ValueError:
        return False
    return True
