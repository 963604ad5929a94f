"""JSON as Go's ``encoding/json`` reads and writes it (Go 1.19, the original's build).

The store's values are shared with Go daemons, so both directions follow Go: member names
match without regard to case, the last of equal names wins, numbers keep their JSON kind, and
what is written is the same bytes. Nothing here raises anything but :class:`JSONError`,
whatever the text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

# More digits than any 64-bit integer has. Python itself refuses to read very long ones.
_LONGEST_INTEGER = 20

_NOT_COMPACT = re.compile("[ \t\n\r<>&\u2028\u2029\ud800-\udfff]")
_STRING_OR_BLANKS = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|[ \t\n\r]+', re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_IN_STRINGS = re.compile('["\\\\\x00-\x1f<>&\u2028\u2029]')
_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_HTML_ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


class JSONError(ValueError):
    """The text is not JSON, or nested too deep to read. Says where."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an object: the name and value decoded, and the value's own text."""

    name: str
    value: object
    raw: str


def _integer(digits: str) -> int | float:
    # A float is never taken for an integer later on, so the number is refused where it counts.
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


def _refuse(constant: str) -> NoReturn:
    raise JSONError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=_refuse)


def decode(text: str) -> object:
    """The one value in ``text``. Integers beyond 64 bits come back as floats."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise JSONError(f"{error.msg} at {where}" if text.strip() else "empty text") from None
    except RecursionError:
        raise JSONError("nested too deep") from None


def members(text: str) -> list[Member] | None:
    """The members of the object in ``text``, in order, equal names included.

    ``None`` if the text is JSON but not an object.
    """
    if not isinstance(decode(text), dict):
        return None
    try:
        return list(_walk(text))
    except RecursionError:
        raise JSONError("nested too deep") from None


def _walk(text: str) -> Iterator[Member]:
    """The members of an object already known to be well formed."""
    at = _skip(text, text.index("{") + 1)
    while text[at] != "}":
        name, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + len(":"))
        value, end = _DECODER.raw_decode(text, at)
        yield Member(name, value, text[at:end])
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, position: int) -> int:
    """The position of the next character that is not blank. There is one."""
    while text[position] in " \t\n\r":
        position += 1
    return position


def fold(name: str) -> str:
    """``name`` for comparison with an ASCII name, as Go folds case.

    Beside the ASCII letters Go takes U+017F for ``s`` and U+212A for ``k``.
    """
    return name.lower().replace("\u017f", "s")


def quote(text: str) -> str:
    """``text`` as a JSON string, escaped as Go does it: also ``<``, ``>``, ``&``, U+2028/9."""

    def escape(match: re.Match[str]) -> str:
        char = match[0]
        return _SHORT_ESCAPES.get(char) or f"\\u{ord(char):04x}"

    return f'"{_ESCAPED_IN_STRINGS.sub(escape, scrub(text))}"'


def compact(raw: str) -> str:
    """JSON text as Go copies a ``json.RawMessage``: no blanks, HTML characters escaped."""
    if not _NOT_COMPACT.search(raw):
        return raw
    tight = _STRING_OR_BLANKS.sub(lambda match: match[1] or "", raw)
    return scrub(tight.translate(_HTML_ESCAPES))


def scrub(text: str) -> str:
    """``text`` with lone surrogates replaced by U+FFFD, so that it can be encoded."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def kind(value: object) -> str:
    """What JSON calls this value, with its article, for messages."""
    names: dict[type, str] = {
        bool: "a boolean", int: "a number", float: "a number", str: "a string", type(None): "null",
        list: "an array", tuple: "an array",
    }  # fmt: skip
    return names.get(type(value), "an object")


def shown(text: str, limit: int = 80) -> str:
    """``text`` for a message: one printable ASCII line, cut to ``limit`` characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    line = cut.encode("ascii", "backslashreplace").decode("ascii")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
