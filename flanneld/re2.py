"""Go's regular expressions, which are RE2's, on Python's engine."""

import re
import warnings

# What RE2 (github.com/google/re2/wiki/Syntax) and Python's re read differently, as tokens.
_RE2_TOKENS = r"""(?xs)
    (?P<set>     \[ \^? \]? (?: \[:\^?\w+:\] | \\. | [^\]\\] )* \] )
  | (?P<literal> \\Q (?:.*?) (?: \\E | \Z ) )
  | (?P<escape>  \\. )
  | (?P<group>   \( \? (?: P< | [imsU-]* [:)] )? )
  | (?P<repeat>  (?: [*+?] | \{ \d+ (?: ,\d* )? \} ) \?? \+? )
  | (?P<brace>   \{ )
"""
_POSIX_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": r"\x00-\x7f",
    "blank": r"\t ",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t-\r ",
    "upper": "A-Z",
    "word": "0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}


def compile(pattern: str) -> re.Pattern[str]:
    r"""Compile a pattern in the syntax of Go's regexp package, to be searched in ASCII text.

    Translated: POSIX classes, ``\z``, ``\Q...\E``, a literal ``{``. What only Python knows
    (lookaround, backreferences, possessive repeats) is refused, so that a pattern means here what
    it means to a Go flanneld. RE2's ``\p{..}`` and flags in the middle are refused too: names and
    addresses do not need them. Raises ValueError with the reason.
    """

    def translate(token: re.Match[str]) -> str:
        text = token[0]
        match token.lastgroup:
            case "set":
                return re.sub(r"\\.|\[:(\^?)(\w+):\]", _posix_class, text, flags=re.DOTALL)
            case "literal":
                return re.escape(text[2:].removesuffix(r"\E"))
            case "escape" if text == r"\z":
                return r"\Z"
            case "escape" if text[1] in "123456789uUNZ":
                raise ValueError(f"{text} is not RE2 syntax")
            case "group" if text == "(?":
                raise ValueError(f"{text}{token.string[token.end() :][:1]} is not RE2 syntax")
            case "repeat" if len(text) > 1 and text.endswith("+"):
                raise ValueError(f"invalid nested repetition operator {text}")
            case "brace":
                return r"\{"
        return text

    try:
        with warnings.catch_warnings():
            # Python warns that "[[" and "--" in a set may mean something else one day.
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(re.sub(_RE2_TOKENS, translate, pattern), re.ASCII)
    except re.error as error:
        raise ValueError(error.msg) from None
    except (OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _posix_class(token: re.Match[str]) -> str:
    if token[2] is None:
        return token[0]
    members = _POSIX_CLASSES.get(token[2])
    if members is None:
        raise ValueError(f"invalid character class {token[0]}")
    if token[1]:
        raise ValueError(f"negated class {token[0]} is not supported, negate the whole set")
    return members
