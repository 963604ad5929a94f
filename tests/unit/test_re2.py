"""Go's regular expression syntax on Python's engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld import re2


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("th", "eth0", True),
        ("^th", "eth0", False),
        (r"^eth[[:digit:]]+$", "eth10", True),
        (r"^eth[[:digit:]]+$", "ethx", False),
        ("[x[:alpha:]-]", "-", True),
        ("[[:punct:]]", "]", True),
        ("[[:alnum:]]", "_", False),
        (r"eth0\z", "eth0", True),
        (r"eth0\z", "eth01", False),
        (r"^\Q10.97.0.1\E$", "10.97.0.1", True),
        (r"^\Q10.97.0.1\E$", "10x97.0.1", False),
        (r"\Q[", "[", True),
        ("^a{2}$", "aa", True),
        ("a{,2}$", "a{,2}", True),
        ("^a{,2}$", "aa", False),
        ("(?i)ETH", "eth0", True),
        ("(?:a|e)th(?P<n>[0-9]+)", "eth0", True),
        (r"\d", "\u0664", False),
        (r"[\]]", "]", True),
        ("[]a]+$", "]a", True),
        ("^[^]a]$", "]", False),
        # Python would warn of these sets, and the tests take warnings for errors.
        ("[[]", "[", True),
        ("[a--]|x", "x", None),
        ("[+--]", ",", True),
        ("[a||b]", "|", True),
        ("a+?", "a", True),
    ],
)
def test_regular_expressions_mean_what_they_mean_to_go(
    pattern: str, text: str, matches: bool | None
) -> None:
    if matches is None:
        with pytest.raises(ValueError, match="bad character range a--"):
            re2.compile(pattern)
    else:
        assert bool(re2.compile(pattern).search(text)) is matches


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("[", "unterminated character set"),
        ("(", "missing \\), unterminated subpattern"),
        ("*", "nothing to repeat"),
        ("eth(?=0)", r"^\(\?= is not RE2 syntax$"),
        ("(?!x)", r"^\(\?! is"),
        ("(?<=x)y", r"^\(\?< is"),
        ("(?>x)", r"^\(\?> is"),
        ("(?#x)", r"^\(\?# is"),
        ("(?x) e", r"^\(\?x is"),
        ("(?P=n)", r"^\(\?P is"),
        ("(?", r"^\(\? is"),
        (r"(e)\1", r"^\\1 is not RE2 syntax$"),
        (r"eth0\Z", r"^\\Z is"),
        ("a++", r"nested repetition operator \+\+"),
        ("a{1}+", "nested repetition"),
        ("[[:foo:]]", r"invalid character class \[:foo:\]"),
        ("[[:^digit:]]", "negate the whole set"),
        (r"\pN", r"bad escape \\p"),
        ("a\\", "bad escape"),
        ("a{99999999999999999999}", "repetition number is too large"),
        ("(" * 5000 + ")" * 5000, "recursion"),
    ],
)
def test_what_go_refuses_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        re2.compile(pattern)


@given(st.text(alphabet=r"eth0.\[]^$()?*+{},1:-|zQE&~<=iP", max_size=12), st.text(max_size=6))
def test_any_pattern_compiles_or_is_a_value_error(pattern: str, text: str) -> None:
    try:
        compiled = re2.compile(pattern)
    except ValueError:
        return
    compiled.search(text)
