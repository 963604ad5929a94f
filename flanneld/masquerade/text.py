"""Rules as the iptables commands print and take them. Pure."""

import re
import shlex
from collections.abc import Iterable
from dataclasses import replace

from flanneld.masquerade.rules import Chain, Edit, Found, Line, Words, is_catch_all, options

# A rule of nft's that drops every packet. Releases show what iptables wrote in words of their own.
_DROPS_ALL = re.compile(
    r'(?:xt match "?comment"? |/\*.*\*/ )?\s*'
    r"(?:counter (?:packets \d+ bytes \d+ )?)?"
    r'(?:drop|reject(?: with icmpx?(?: type)? [\w-]+)?|xt target "?REJECT"?)'
    r'(?: comment ".*")?'
)
_UNKNOWN_CONDITION = ("?", "of nft")


def parse_line(text: str) -> Line:
    """A rule as iptables-save prints it, without ``-A HOOK``.

    Quoted words are taken apart only where ours could be meant: a foreign comment may be anything.
    """
    try:
        words = shlex.split(text) if '"' in text else text.split()
    except ValueError:
        return Line(frozenset({(text,)}), (text,), text)
    return Line(options(words), tuple(words), text)


def parse_list(chain: Chain, hook: str, own: str | None) -> Found | None:
    """What ``iptables -S`` says about a hook and our chain; None if it does not show the hook."""
    policy = re.search(rf"^-P {chain.hook} (\S+)", hook, re.MULTILINE)
    if policy is None:
        return None
    rules = None if own is None else _appended(chain.name, own)
    return Found(_appended(chain.hook, hook), policy[1], rules)


def _appended(name: str, text: str) -> tuple[Line, ...]:
    start = f"-A {name} "
    # Not splitlines, which knows more line ends than one: a foreign comment may hold them.
    lines = (line for line in text.split("\n") if line.startswith(start))
    return tuple(parse_line(line[len(start) :]) for line in lines)


def without_false_ends(chain: Chain, found: Found, listing: str) -> Found:
    """The same, but where nft lists another rule than one that drops all, it does not count as one.

    ``listing`` is nft's of the hook; one that does not fit says nothing about any.
    """
    _, _, rest = listing.partition(f"chain {chain.hook} {{\n")
    body = [line.strip() for line in rest.partition("\n\t}")[0].split("\n")]
    rules = [line for line in body if line and not line.startswith(("type ", 'comment "'))]
    fits = len(rules) == len(found.hook)
    hook = tuple(
        replace(line, options=line.options | {_UNKNOWN_CONDITION})
        if is_catch_all(line) and not (fits and _DROPS_ALL.fullmatch(rules[place]))
        else line
        for place, line in enumerate(found.hook)
    )
    return replace(found, hook=hook)


def render(edits: Iterable[tuple[Edit, Found]]) -> str:
    """The input of ``iptables-restore --noflush`` that makes these changes, each table at once."""
    lines = []
    for change, found in edits:
        chain = change.chain
        lines.append(f"*{chain.table}")
        # This makes the chain, or empties it.
        lines.append(f":{chain.name} - [0:0]")
        lines += [f"-D {chain.hook} {found.hook[place].text}" for place in change.delete]
        lines += [f"-A {chain.name} {_text(rule)}" for rule in change.rules]
        if change.jump_at is not None:
            where = "-A" if change.at_end else "-I"
            place = "" if change.at_end else f" {change.jump_at + 1}"
            lines.append(f"{where} {chain.hook}{place} {_text(chain.jump)}")
        if not change.rules:
            lines.append(f"-X {chain.name}")
        lines.append("COMMIT")
    return "".join(f"{line}\n" for line in lines)


def _text(rule: Words) -> str:
    """A rule of ours as iptables-save prints it."""
    return " ".join(f'"{word}"' if " " in word else word for word in rule)
