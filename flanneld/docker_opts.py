"""The program ``mk-docker-opts``: docker's options from the subnet file.

It has the options, the output and the exit statuses of flannel's ``mk-docker-opts.sh`` (recorded
under dash), which lets the shell execute the subnet file. Here nothing of it is executed: a line
has to be one plain assignment, and a value has to be what flanneld writes. Anything else is an
error, and the output file stays as it was.
"""

import getopt
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from typing import NoReturn

from flanneld.errors import SubnetFileError
from flanneld.subnet.env import read_text, replace
from flanneld.subnet.gojson import shown

USAGE = """\
usage: mk-docker-opts [-f FILE] [-d FILE] [-i] [-c] [-k KEY] [-m] [-s]

Writes docker's options for the subnet that flanneld leased.

  -f FILE   the subnet file; default /run/flannel/subnet.env
  -d FILE   where to write the options; default /run/docker_opts.env
  -i        one variable for each option: DOCKER_OPT_BIP, DOCKER_OPT_MTU ...
  -c        one variable with all options; without -i and -c: both
  -k KEY    the name of that one variable; default DOCKER_OPTS
  -m        leave --ip-masq out
  -s        a subnet file that is missing or names no subnet is an error
Statuses: 0 written; 1 wrong usage or subnet file; 2 cannot write.
"""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# What a shell would read as one assignment of a literal, and no more than that.
_ASSIGNMENT = re.compile(
    r"""[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=("[^"]*"|'[^']*'|[^\s"'#][^\s"']*|)"""
    r"[ \t]*(?:[ \t]#.*)?",
    re.ASCII,
)
_CIDR = re.compile(r"([0-9.]{7,15})/([0-9]{1,2})", re.ASCII)
_MTU = re.compile(r"[0-9]{1,5}", re.ASCII)
# Inside double quotes a shell and systemd read these back after a backslash.
_ESCAPED = re.compile(r'(["$`\\])')
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

_PREFIX = "DOCKER_OPT_"
# What Linux takes for a device's MTU (RFC 791's least, and the loopback device's).
_LEAST_MTU, _LARGEST_MTU = 68, 65536


class UsageError(Exception):
    """The command line is wrong, or asks for help. The text, if any, goes before the usage."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    subnet_file: str = "/run/flannel/subnet.env"
    output: str = "/run/docker_opts.env"
    individual: bool = True
    combined: bool = True
    key: str = "DOCKER_OPTS"
    ip_masq: bool = True
    strict: bool = False
    """A subnet file that is missing or names no subnet is an error."""


def console() -> NoReturn:
    """Run as a program."""
    sys.exit(main(sys.argv[1:], os.environ))


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Write the options; say on stderr what is wrong. Return the exit status."""
    try:
        request = parse(argv)
        assigned = assignments(request.subnet_file)
        if "FLANNEL_SUBNET" not in assigned and _same_file(request.subnet_file, request.output):
            # The options were written over the subnet file: they are all that is left of it.
            return 0
        if request.strict and "FLANNEL_SUBNET" not in assigned:
            raise SubnetFileError(
                f"mk-docker-opts: {shown(request.subnet_file)} is missing or has no FLANNEL_SUBNET:"
                " start flanneld, or name the file of its --subnet-file with -f"
            )
        text = render(request, assigned, environ)
    except UsageError as error:
        sys.stderr.write(f"{error}\n{USAGE}" if str(error) else USAGE)
        return 1
    except SubnetFileError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    try:
        put(request.output, text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        sys.stderr.write(
            f"mk-docker-opts: cannot create {shown(request.output)}: {reason};"
            " name a file in a directory that exists and is writable with -d\n"
        )
        return 2
    return 0


def parse(argv: Sequence[str]) -> Request:
    """Read the command line as the shell's getopts does. Raises UsageError."""
    try:
        options, _ = getopt.getopt(list(argv), "f:d:ick:msh?")
    except getopt.GetoptError as error:
        known = error.opt in ("f", "d", "k")
        raise UsageError(
            f"No arg for -{error.opt} option" if known else f"Illegal option -{shown(error.opt)}"
        ) from None
    given = dict(options)
    if given.keys() & {"-h", "-?"}:
        raise UsageError
    defaults = Request()
    key = given.get("-k", defaults.key)
    if not _NAME.fullmatch(key):
        raise UsageError(
            f"Invalid value of -k: {shown(key)} (a variable's name has letters, digits and _)"
        )
    either = "-i" in given or "-c" in given
    return Request(
        # Empty as flanneld takes it: the unit passes on FLANNELD_SUBNET_FILE, which may be.
        subnet_file=given.get("-f") or defaults.subnet_file,
        output=given.get("-d", defaults.output),
        individual="-i" in given or not either,
        combined="-c" in given or not either,
        key=key,
        ip_masq="-m" not in given,
        strict="-s" in given,
    )


def assignments(path: str) -> dict[str, str]:
    """Return the variables a subnet file sets; none if there is no such file.

    Raises SubnetFileError for a file that cannot be read, or with a line that is neither blank,
    a comment nor a plain assignment.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SubnetFileError(f"mk-docker-opts: cannot read {shown(path)}: {reason}") from error
    values = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \t") or line.lstrip(" \t").startswith("#"):
            continue
        match = _ASSIGNMENT.fullmatch(line)
        if match is None:
            name, separator, value = line.partition("=")
            field = name.strip() if separator else f"line {number}"
            raise _invalid(field, value if separator else line, "one plain NAME=value")
        name, value = match.groups()
        values[name] = value[1:-1] if value[:1] in ("'", '"') else value
    return values


def render(request: Request, assigned: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Return the output's text.

    ``assigned`` are the subnet file's variables: of these only what flanneld writes counts. An
    operator's own options come from ``environ``: every DOCKER_OPT_*, and what the combined
    variable begins with. Raises SubnetFileError for a value that is not what it should be.
    """
    options = {
        name: value
        for name, value in environ.items()
        if name.startswith(_PREFIX) and _NAME.fullmatch(name)
    }
    options |= docker_options(dict(environ) | dict(assigned), request.ip_masq)
    present = [(name, options[name]) for name in sorted(options)]
    lines = [f'{name}="{_quoted(name, value)}"\n' for name, value in present if request.individual]
    if request.combined:
        before = environ.get(request.key, "")
        whole = (f"{before} " if before else "") + "".join(f" {value}" for _, value in present)
        lines.append(f'{request.key}="{_quoted(request.key, whole)}"\n')
    return "".join(lines)


def docker_options(values: Mapping[str, str], ip_masq: bool) -> dict[str, str]:
    """Return docker's options for what flanneld wrote; what is missing there is missing here."""
    options = {}
    if subnet := values.get("FLANNEL_SUBNET"):
        if not _is_host_address(subnet):
            raise _invalid("FLANNEL_SUBNET", subnet, "an address with its length, as 10.5.72.1/24")
        options["DOCKER_OPT_BIP"] = f"--bip={subnet}"
    if mtu := values.get("FLANNEL_MTU"):
        if not _MTU.fullmatch(mtu) or not _LEAST_MTU <= int(mtu) <= _LARGEST_MTU:
            raise _invalid("FLANNEL_MTU", mtu, f"a number from {_LEAST_MTU} to {_LARGEST_MTU}")
        options["DOCKER_OPT_MTU"] = f"--mtu={mtu}"
    if ip_masq and (masquerades := values.get("FLANNEL_IPMASQ")):
        if masquerades not in ("true", "false"):
            raise _invalid("FLANNEL_IPMASQ", masquerades, "true or false")
        # One of the two has to masquerade, and only one.
        by_docker = "false" if masquerades == "true" else "true"
        options["DOCKER_OPT_IPMASQ"] = f"--ip-masq={by_docker}"
    return options


def _is_host_address(text: str) -> bool:
    match = _CIDR.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= 30:
        return False
    try:
        IPv4Address(match[1])
    except AddressValueError:
        return False
    return True


def _quoted(name: str, value: str) -> str:
    """Return a value for inside double quotes, where a shell and systemd read it back unchanged."""
    if _CONTROL.search(value):
        raise SubnetFileError(
            f"Invalid value of {name}: {shown(value)} (wanted: printable text on one line;"
            " mend it where it is set)"
        )
    return _ESCAPED.sub(r"\\\1", value)


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _invalid(field: str, value: str, wanted: str) -> SubnetFileError:
    return SubnetFileError(
        f"Invalid value of {shown(field)}: {shown(value)} (wanted: {wanted};"
        " restart flanneld, which writes the subnet file anew)"
    )


def put(path: str, text: str) -> None:
    """Make ``text`` the content of the file: a reader sees the whole old or the whole new one.

    A file that has this text already is left untouched, so that its time of change tells when
    docker needs a restart. What is not a regular file, such as /dev/stdout, is written to as it
    is. Raises OSError.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        regular = True
    if not regular:
        Path(path).write_text(text)
        return
    # A symbolic link stays one.
    target = Path(os.path.realpath(path))
    try:
        if target.read_bytes() == text.encode():
            return
    except FileNotFoundError:
        pass
    replace(target, text)


if __name__ == "__main__":
    console()
