"""The network config, against what three versions of the original make of 90 texts."""

import contextlib
import json
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.errors import BackendError, ConfigError
from flanneld.subnet.config import (
    Config,
    bool_key,
    int_key,
    parse_cidr,
    parse_config,
    str_key,
)

ZERO = str(IPv4Address(0))

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "fixtures" / "config_cases.json").read_text()
)

NO_NETWORK = "leases subnets of 0.0.0.0/0 there"
NO_TYPE = "ends the daemon there: unknown backend type"
TOO_LONG = "leaves no address for a container, or a key that cannot be read back"
OFF_BOUNDARY = "leases a subnet that starts in the middle of one"

REJECTED_HERE = {
    "/30 default len": TOO_LONG,
    "/31 default len": TOO_LONG,
    "/32 default len": TOO_LONG,
    "/0 network": NO_NETWORK,
    "no network": NO_NETWORK,
    "no network, backend": NO_NETWORK,
    "null document": NO_NETWORK,
    "IPv6 /62": NO_NETWORK,
    "IPv6 /63": NO_NETWORK,
    "IPv6 /124": NO_NETWORK,
    "IPv6 /125": NO_NETWORK,
    "IPv6SubnetLen 127": NO_NETWORK,
    "IPv6SubnetLen too short": NO_NETWORK,
    "IPv6SubnetMin outside": NO_NETWORK,
    "IPv6SubnetMin not aligned": NO_NETWORK,
    "SubnetLen equal to network": "never finds a free subnet there",
    "SubnetLen 31": TOO_LONG,
    "SubnetLen 32": TOO_LONG,
    "SubnetLen 33": TOO_LONG,
    "SubnetMin > SubnetMax": "never finds a free subnet there",
    "SubnetMin not aligned": OFF_BOUNDARY,
    "SubnetMax not aligned": OFF_BOUNDARY,
    "backend empty object": NO_TYPE,
    "backend null": NO_TYPE,
    "backend Type null": NO_TYPE,
}


def thawed(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: thawed(item) for name, item in value.items()}
    return [thawed(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_case(case: dict[str, Any]) -> None:
    expected = case["v0.8.0"]
    if "error" in expected or "panic" in expected or case["name"] in REJECTED_HERE:
        with pytest.raises(ConfigError):
            parse_config(case["input"])
        return
    config = parse_config(case["input"])
    assert str(config.network) == expected["Network"]
    assert config.subnet_len == expected["SubnetLen"]
    assert str(config.subnet_min) == expected["SubnetMin"]
    assert str(config.subnet_max) == expected["SubnetMax"]
    assert config.backend_type == expected["BackendType"]
    assert thawed(config.backend) == json.loads(expected["Backend"] or "{}")


def test_every_rejection_of_our_own_is_a_case_v080_accepts() -> None:
    accepted = {case["name"] for case in CASES if "Network" in case["v0.8.0"]}
    assert len(CASES) == 90
    assert set(REJECTED_HERE) <= accepted


# A check that v0.8.0 or v0.20.2 has keeps its wording at the beginning.
SAME_WORDING = {
    "/0 network", "no network", "no network, backend", "null document",
    "SubnetLen 31", "SubnetLen 32", "SubnetLen 33", "SubnetLen smaller than network",
    "SubnetMin outside", "SubnetMax outside", "SubnetMin not aligned", "SubnetMax not aligned",
    "SubnetMin with CIDR suffix", "SubnetMin empty string", "SubnetMin null",
    "SubnetMin leading zeros", "Network without prefix", "Network /33", "Network number",
    "Network null", "Network empty string", "Network leading zeros",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SAME_WORDING))
def test_recorded_wording(name: str) -> None:
    case = next(case for case in CASES if case["name"] == name)
    wordings = [case[v]["error"] for v in ("v0.8.0", "v0.20.2") if "error" in case[v]]
    with pytest.raises(ConfigError) as caught:
        parse_config(case["input"])
    message = str(caught.value)
    assert message.startswith(wordings[0])
    assert len(message) > len(wordings[0])


def config_text(**keys: object) -> str:
    return json.dumps({"Network": "10.3.0.0/16", **keys})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["not valid JSON", "empty"]),
        ('{"Network":"10.3.0.0/16",}', ["not valid JSON", "line 1"]),
        ('{"Network":NaN}', ["NaN"]),
        ("[]", ["must be a JSON object", "an array"]),
        ('"10.3.0.0/16"', ["must be a JSON object", "a string"]),
        ("7", ["must be a JSON object", "a number"]),
        ("[" * 100_000, ["nested too deep"]),
        ('{"x":' * 100_000, ["nested too deep"]),
        ('{"Network":"10.3.0.0/16","Backend":' + '{"Type":' * 100_000, ["nested too deep"]),
        ('{"Network":"fd00::/48"}', ["Network", "fd00::/48", "IPv4"]),
        ('{"Network":"10.3.0.0/255.255.0.0"}', ["Network", "255.255.0.0"]),
        ('{"Network":"10.3.0.0/-1"}', ["Network", "/-1"]),
        ('{"Network":["10.3.0.0/16"]}', ["Network", "10.3.0.0/16"]),
        ('{"Network":null,"Network":"10.3.0.0/16"}', ["Network", "null"]),
        (config_text(SubnetLen=True), ["SubnetLen", "true", "integer"]),
        (config_text(SubnetLen=24.5), ["SubnetLen", "24.5", "integer"]),
        ('{"Network":"10.3.0.0/16","SubnetLen":1e1}', ["SubnetLen", "1e1"]),
        ('{"Network":"10.3.0.0/16","SubnetLen":' + "9" * 5000 + "}", ["SubnetLen", "999..."]),
        (config_text(SubnetLen=2**63), ["SubnetLen", str(2**63), "17 to 30"]),
        (config_text(SubnetLen=16), ["SubnetLen is 16", "10.3.0.0/16", "17 to 30"]),
        ('{"Network":"10.3.0.0/30"}', ["network is too small", "10.3.0.0/30", "/29"]),
        ('{"Network":"10.3.0.0/30","SubnetLen":31}', ["network is too small", "/29"]),
        ('{"EnableIPv6":true}', ["Network is missing", "EnableIPv6: this version serves IPv4"]),
        (config_text(SubnetMin="::ffff:10.3.5.0"), ["SubnetMin", "::ffff:10.3.5.0", "IPv4"]),
        (config_text(SubnetMin=5), ["SubnetMin", "5"]),
        (config_text(SubnetMax="fd00::1"), ["SubnetMax", "fd00::1"]),
        (config_text(SubnetMax="10.3.8.200"), ["SubnetMax", "use 10.3.8.0"]),
        (config_text(SubnetMin="10.3.9.0", SubnetMax="10.3.8.0"), ["10.3.9.0", "10.3.8.0"]),
        (config_text(SubnetMax="10.3.0.0"), ["10.3.1.0 (the default", "10.3.0.0"]),
        (config_text(Backend={}), ["no Type", "{}", "vxlan"]),
        (config_text(Backend={"Type": ""}), ["no Type"]),
        (config_text(Backend={"Port": 1}), ["no Type"]),
        (config_text(Backend="vxlan"), ["error decoding Backend property of config: ", '"vxlan"']),
        (config_text(Backend={"Type": 5}), ["error decoding Backend property of config: ", "5"]),
        ('{"Network":"10.3.0.0/16","Backend":{"Type":"udp"},"Backend":null}', ["no Type"]),
    ],
)  # fmt: skip
def test_rejected_with_a_message_that_helps(text: str, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    message = str(caught.value)
    assert [part for part in says if part not in message] == []
    assert message.isprintable()
    assert message.isascii()
    assert len(message) < 400


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ('{"NETWORK":"10.3.0.0/16"}', config_text()),
        ('{"networ\u212a":"10.3.0.0/16","\u017fubnetlen":26}', config_text(SubnetLen=26)),
        ('{"Network":"10.4.0.0/16","network":"10.3.0.0/16"}', config_text()),
        ('{"Network":"10.3.0.0/016"}', config_text()),
        ('{"Network":"10.3.0.0\\/16"}', config_text()),
        ('\n{ "Network" :\t"10.3.0.0/16" }\r\n', config_text()),
        (config_text(SubnetMin=ZERO, SubnetMax=ZERO), config_text()),
        ('{"Network":"10.3.0.0/16","SubnetLen":26,"SubnetLen":null}', config_text(SubnetLen=26)),
        ('{"Network":"10.3.0.0/16","x":' + "9" * 5000 + "}", config_text()),
        ('{"Network":"10.3.0.0/16","\ud800":"\ud800\\ud800"}', config_text()),
        (
            '{"Network":"10.3.0.0/16","Backend":{"Type":"udp","type":"vxlan","Type":null}}',
            '{"Network":"10.3.0.0/16","Backend":{"Type":"udp","type":"vxlan"}}',
        ),
        (
            '{"Network":"10.3.0.0/16","Backend":5,"Backend":{"Type":"udp"}}',
            config_text(Backend={"Type": "udp"}),
        ),
    ],
)
def test_texts_that_mean_the_same(text: str, same_as: str) -> None:
    assert parse_config(text) == parse_config(same_as)


def test_backend_as_written_and_in_lower_case() -> None:
    text = config_text(Backend={"type": "VXLan", "Vni": 7, "More": {"A": [1, {"b": None}]}})
    config = parse_config(text)
    assert config.backend_type == "VXLan"
    assert config.backend_name == "vxlan"
    assert dict(config.backend) == {
        "type": "VXLan",
        "Vni": 7,
        "More": MappingProxyType({"A": (1, MappingProxyType({"b": None}))}),
    }


def test_absent_backend_is_udp() -> None:
    config = parse_config(config_text())
    assert (config.backend_type, dict(config.backend)) == ("udp", {})


def test_config_is_immutable_and_hashable() -> None:
    config = parse_config(config_text(Backend={"Type": "udp", "Port": 8285}))
    with pytest.raises(TypeError):
        config.backend["Port"] = 1  # type: ignore[index]  # that it cannot be done is the point
    assert hash(config) == hash(parse_config(config_text(Backend={"Type": "udp"})))


def test_type_can_be_encoded_again() -> None:
    config = parse_config('{"Network":"10.3.0.0/16","Backend":{"Type":"a\\ud800","K":"\\udfff"}}')
    assert config.backend_type == "a\ufffd"
    assert config.backend["K"] == "\ufffd"


@pytest.mark.parametrize(
    ("keys", "noted"),
    [
        ({}, []),
        ({"EnableIPv4": True, "EnableIPv6": False, "Networks": [], "EnableNFTables": False}, []),
        ({"EnableIPv4": None, "EnableIPv6": None, "IPv6Network": None}, []),
        ({"EnableIPv4": False}, ["EnableIPv4"]),
        ({"enableipv6": True}, ["EnableIPv6"]),
        ({"EnableIPv6": True, "IPv6Network": "fd00::/48"}, ["EnableIPv6", "IPv6Network"]),
        ({"IPv6SubnetLen": 64, "IPv6SubnetMin": "x", "IPv6SubnetMax": 1},
         ["IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"]),
        ({"Networks": ["10.4.0.0/16"], "IPv6Networks": [1]}, ["Networks", "IPv6Networks"]),
        ({"EnableNFTables": True, "Bogus": True}, []),
    ],
)  # fmt: skip
def test_keys_of_later_versions_are_noted(keys: dict[str, object], noted: list[str]) -> None:
    config = parse_config(config_text(**keys))
    assert [note.partition(": ")[0] for note in config.ignored] == noted
    assert config.network == IPv4Network("10.3.0.0/16")
    assert (config.subnet_len, config.subnet_min) == (24, IPv4Address("10.3.1.0"))


@pytest.mark.parametrize(
    ("keys", "enabled"),
    [
        ({}, False),
        ({"EnableNFTables": False}, False),
        ({"EnableNFTables": None}, False),
        ({"EnableNFTables": True}, True),
        ({"enablenftables": True}, True),
    ],
)
def test_nftables_is_chosen_by_its_key(keys: dict[str, object], enabled: bool) -> None:
    assert parse_config(config_text(**keys)).enable_nftables is enabled


@pytest.mark.parametrize("value", ["true", 1, 0, [], {}])
def test_the_nftables_key_is_true_or_false(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^EnableNFTables must be true or false, not "):
        parse_config(config_text(EnableNFTables=value))


@pytest.mark.parametrize(
    "text",
    ["10.3.0.0", "10.3.0.0/", "/16", "10.3.0.0/33", "10.3.0/16", "10.3.0.0/1_6", "10.3.0.0/²",
     "a/16", "10.3.0.0 /16", "fd00::/16", "10.3.0.0/16/16", "10.3.0.0/" + "0" * 5000,
     "0x0a030000/16"],
)  # fmt: skip
def test_parse_cidr_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"^invalid CIDR address: "):
        parse_cidr(text)


BACKEND = {"Type": "x", "Port": 1, "vni": 7, "Port2": "8", "PORT": 9, "GBP": True, "Null": None,
           "Float": 1.0, "Name": "a\nb", "Big": 10**30, "Obj": MappingProxyType({})}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [("Port", 9), ("VNI", 7), ("Absent", 5), ("Null", 5)])
def test_int_key(key: str, value: int) -> None:
    assert int_key(BACKEND, key, 5, 1, 65535) == value


@pytest.mark.parametrize(
    ("key", "shown"),
    [("Port", "9"), ("Port2", '"8"'), ("GBP", "true"), ("Float", "1.0"), ("Big", str(10**30)),
     ("Name", '"a\\nb"'), ("Obj", "an object")],
)  # fmt: skip
def test_int_key_refuses(key: str, shown: str) -> None:
    with pytest.raises(BackendError) as caught:
        int_key(BACKEND, key, 5, 1, 8)
    assert str(caught.value) == (
        f"Backend key {key} must be an integer from 1 to 8, not {shown}; leave it out for 5"
    )


def test_bool_key() -> None:
    assert bool_key(BACKEND, "gbp", False) is True
    assert bool_key(BACKEND, "absent", True) is True
    assert bool_key(BACKEND, "null", False) is False
    with pytest.raises(BackendError, match="Port must be true or false, not 9; leave it out for f"):
        bool_key(BACKEND, "Port", False)


def test_str_key() -> None:
    assert str_key(BACKEND, "NAME", "") == "a\nb"
    assert str_key(BACKEND, "null", "none") == "none"
    with pytest.raises(BackendError, match="GBP must be a string, not true"):
        str_key(BACKEND, "GBP", "")


def test_last_of_equal_backend_keys_wins() -> None:
    config = parse_config(
        '{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":1,"port":2,"Port":3,"port":null}}'
    )
    assert int_key(config.backend, "Port", 0, 0, 9) == 3


def check_invariants(config: Config) -> None:
    size = 2 ** (32 - config.subnet_len)
    assert 0 < config.network.prefixlen < config.subnet_len <= 30
    assert config.subnet_min <= config.subnet_max
    for address in (config.subnet_min, config.subnet_max):
        assert address in config.network
        assert int(address) % size == 0
    assert config.subnet_size == size
    assert config.backend_type


def parse_or_refuse(text: str) -> None:
    with contextlib.suppress(ConfigError):
        check_invariants(parse_config(text))


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    parse_or_refuse(text)


ADDRESSES = st.integers(0, 2**32 - 1).map(lambda number: str(IPv4Address(number)))
LIKELY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 34),
    st.floats(),
    ADDRESSES,
    st.ip_addresses(v=6).map(str),
    st.builds("{}/{}".format, ADDRESSES, st.integers(0, 33)),
    st.sampled_from(["10.3.0.0/16", "10.3.0.0", "10.3.4.0", "10.3.8.0", "10.3.255.0", 24, 26]),
    st.sampled_from(["", "\ud800", "\n"]),
    st.dictionaries(st.sampled_from(["Type", "type", "VNI"]), st.text(max_size=4)),
)
NAMES = st.sampled_from(["Network", "network", "SubnetLen", "SubnetMin", "SubnetMax", "Backend",
                         "EnableIPv6", "Networks", "other"])  # fmt: skip


@given(st.lists(st.tuples(NAMES, LIKELY), max_size=6))
def test_any_object_is_read_or_refused(pairs: list[tuple[str, object]]) -> None:
    body = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)
    parse_or_refuse("{" + body + "}")


@given(st.data())
def test_any_sensible_config_is_accepted(data: st.DataObject) -> None:
    prefix = data.draw(st.integers(1, 29))
    length = data.draw(st.integers(prefix + 1, 30))
    size = 2 ** (32 - length)
    start = data.draw(st.integers(1, 2**prefix - 1)) << (32 - prefix)
    last = 2 ** (length - prefix) - 1
    low = data.draw(st.integers(0, last))
    high = data.draw(st.integers(low, last))
    network = IPv4Network((start, prefix))
    config = parse_config(
        json.dumps(
            {
                "Network": str(network),
                "SubnetLen": length,
                "SubnetMin": str(IPv4Address(start + low * size)),
                "SubnetMax": str(IPv4Address(start + high * size)),
            }
        )
    )
    check_invariants(config)
    assert config.network == network
    assert config.subnet_len == length
    assert int(config.subnet_min) == start + low * size
    assert int(config.subnet_max) == start + high * size
