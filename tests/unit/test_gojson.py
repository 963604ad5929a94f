"""JSON as Go reads and writes it."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.subnet import gojson

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(gojson.JSONError):
        gojson.decode(text)
    with contextlib.suppress(gojson.JSONError):
        gojson.members(text)


@given(st.dictionaries(st.text(), JSON_VALUES), st.sampled_from([None, 1, "\t"]))
def test_members_are_the_object_in_order_with_their_own_text(
    document: dict[str, object], indent: int | str | None
) -> None:
    found = gojson.members(f" {json.dumps(document, indent=indent)}\n")
    assert found is not None
    assert [member.name for member in found] == list(document)
    for member in found:
        assert gojson.decode(member.raw) == member.value
        assert member.raw == member.raw.strip()


def test_members_keeps_equal_names() -> None:
    assert gojson.members('{"a":1 , "a" : [2],"A":null}') == [
        gojson.Member("a", 1, "1"),
        gojson.Member("a", [2], "[2]"),
        gojson.Member("A", None, "null"),
    ]


@pytest.mark.parametrize("text", ["null", "[]", "1", '"{}"', "true"])
def test_members_of_something_else(text: str) -> None:
    assert gojson.members(text) is None


@pytest.mark.parametrize(
    "text",
    ["", " \n", "{", "{} x", '{"a":1,}', "{'a':1}", '{"a":NaN}', '{"a":-Infinity}', '{"a":01}',
     '{"a":+1}', '{"a":.5}', '"\x01"', "/* */ {}", "\ufeff{}", "[" * 100_000, '{"a":' * 100_000],
)  # fmt: skip
def test_not_json(text: str) -> None:
    with pytest.raises(gojson.JSONError):
        gojson.members(text)


@pytest.mark.parametrize("digits", ["1" * 21, "9" * 5000, "-" + "9" * 5000])
def test_an_integer_beyond_64_bits_is_no_integer(digits: str) -> None:
    assert isinstance(gojson.decode(digits), float)


@pytest.mark.parametrize(
    ("name", "folded"),
    [("SubnetLen", "subnetlen"), ("\u017fubnetLen", "subnetlen"), ("bac\u212aend", "backend")],
)
def test_names_match_as_go_folds_them(name: str, folded: str) -> None:
    assert gojson.fold(name) == folded


@pytest.mark.parametrize("name", ["S\u00dfubnetLen", "Subnet Len", "\u0130Pv6", "SubnetLen\0"])
def test_names_that_do_not_match(name: str) -> None:
    assert gojson.fold(name) not in {"subnetlen", "ssubnetlen", "ipv6"}


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("vxlan", '"vxlan"'),
        ("", '""'),
        ('a"b\\c', r'"a\"b\\c"'),
        ("\n\r\t\b\f\x00\x1f\x7f", '"\\n\\r\\t\\u0008\\u000c\\u0000\\u001f\x7f"'),
        ("<&>", r'"\u003c\u0026\u003e"'),
        ("\u2028\u2029é€😀", '"\\u2028\\u2029é€😀"'),
        ("a\ud800b", '"a\ufffdb"'),
        ("/", '"/"'),
    ],
)
def test_quote(text: str, quoted: str) -> None:
    assert gojson.quote(text) == quoted


@given(st.text())
def test_quoted_text_reads_back(text: str) -> None:
    assert json.loads(gojson.quote(text)) == text


@pytest.mark.parametrize(
    ("raw", "tight"),
    [
        ('{"VtepMAC":"aa:7b"}', '{"VtepMAC":"aa:7b"}'),
        ('{ "a" : [ 1 ,\r\n\t2.50 ] }', '{"a":[1,2.50]}'),
        (r'"two  words \" and \\"', r'"two  words \" and \\"'),
        ('"a<b>&\u2028\u2029"', r'"a\u003cb\u003e\u0026\u2028\u2029"'),
        (r'"\u003C \u00e9 é"', r'"\u003C \u00e9 é"'),
        (' "\ud800" ', '"\ufffd"'),
    ],
)
def test_compact(raw: str, tight: str) -> None:
    assert gojson.compact(raw) == tight


@given(JSON_VALUES, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_compact_changes_no_value_and_leaves_no_blank(
    value: object, indent: int | str | None, ascii_only: bool
) -> None:
    raw = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    tight = gojson.compact(raw)
    assert json.loads(tight) == json.loads(raw)
    assert gojson.compact(tight) == tight
    if ascii_only:
        escaped = json.dumps(value, separators=(",", ":"))
        for char in "<>&":
            escaped = escaped.replace(char, f"\\u{ord(char):04x}")
        assert tight == escaped


@given(st.text())
def test_shown_is_one_short_printable_line(text: str) -> None:
    line = gojson.shown(text)
    assert line.isascii()
    assert line == "" or line.isprintable()
    assert len(line) <= 80 * len("\\U0010ffff") + 3
