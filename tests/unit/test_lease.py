"""Lease keys and values: what is written, what is read, what is refused."""

import json
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.subnet import gojson
from flanneld.subnet.lease import (
    BadLease,
    Lease,
    LeaseAttrs,
    check_peer,
    decode_attrs,
    parse_lease,
    parse_subnet_key,
    subnet_key,
    taken_range,
)

HOST = IPv4Address("10.97.0.1")
SUBNETS = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(1, 31),
)

# As recorded from v0.8.0.
RECORDED = [
    ('{"PublicIP":"10.97.0.1"}', LeaseAttrs(HOST)),
    ('{"PublicIP":"10.97.0.1","BackendType":"host-gw"}', LeaseAttrs(HOST, "host-gw")),
    (
        '{"PublicIP":"10.97.0.1","BackendType":"vxlan",'
        '"BackendData":{"VtepMAC":"aa:7b:75:bf:06:90"}}',
        LeaseAttrs(HOST, "vxlan", '{"VtepMAC":"aa:7b:75:bf:06:90"}'),
    ),
    (
        '{"PublicIP":"10.97.0.1","BackendType":"extension","BackendData":"pre-out\\npre-err"}',
        LeaseAttrs(HOST, "extension", r'"pre-out\npre-err"'),
    ),
]


@pytest.mark.parametrize(("text", "attrs"), RECORDED)
def test_recorded_values(text: str, attrs: LeaseAttrs) -> None:
    assert attrs.encode() == text
    assert decode_attrs(text) == attrs


def test_encode_escapes_as_go_does() -> None:
    attrs = LeaseAttrs(HOST, "<a&b>\u2028\x08", '{ "x" : "<\u2029>", "n":\t1.50 }')
    assert attrs.encode() == (
        r'{"PublicIP":"10.97.0.1","BackendType":"\u003ca\u0026b\u003e\u2028\u0008",'
        r'"BackendData":{"x":"\u003c\u2029\u003e","n":1.50}}'
    )


def test_encode_refuses_data_that_is_not_json() -> None:
    with pytest.raises(ValueError, match="line 1"):
        LeaseAttrs(HOST, "x", '{"a":1}, "PublicIP":"1.2.3.4"').encode()


@pytest.mark.parametrize(
    ("text", "attrs"),
    [
        (' { "publicip" : "10.97.0.1" , "x" : [] }\n', LeaseAttrs(HOST)),
        ('{"PUBLICIP":"10.97.0.1","bac\u212aendType":"udp"}', LeaseAttrs(HOST, "udp")),
        ('{"PublicIP":"10.9.9.9","PublicIP":"10.97.0.1"}', LeaseAttrs(HOST)),
        ('{"PublicIP":"10.97.0.1","BackendType":"x","BackendType":null}', LeaseAttrs(HOST, "x")),
        ('{"PublicIP":"10.97.0.1","BackendData":null}', LeaseAttrs(HOST)),
        ('{"PublicIP":"10.97.0.1","BackendData":{"a":1},"BackendData":null}', LeaseAttrs(HOST)),
        ('{"PublicIP":"10.97.0.1","BackendData": [ 1 , 2.0 ]}', LeaseAttrs(HOST, "", "[1,2.0]")),
        ('{"PublicIP":"10.97.0.1","BackendType":"\\ud800"}', LeaseAttrs(HOST, "\ufffd")),
        (
            '{"PublicIP":"10.97.0.1","PublicIPv6":null,"BackendType":"vxlan",'
            '"BackendData":{"VNI":1,"VtepMAC":"aa:03:d2:2b:e7:be"}}',
            LeaseAttrs(HOST, "vxlan", '{"VNI":1,"VtepMAC":"aa:03:d2:2b:e7:be"}'),
        ),
        ('{"PublicIP":"169.254.7.1"}', LeaseAttrs(IPv4Address("169.254.7.1"))),
        ('{"PublicIP":"223.255.255.255"}', LeaseAttrs(IPv4Address("223.255.255.255"))),
    ],
)
def test_decode_accepts(text: str, attrs: LeaseAttrs) -> None:
    assert decode_attrs(text) == attrs


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON: empty text"),
        ("garbage", "not JSON: Expecting value"),
        ('{"PublicIP":"10.97.0.1"} x', "not JSON: Extra data"),
        ('{"PublicIP":"10.97.0.1","BackendData":NaN}', "not JSON: NaN"),
        ("[" * 100_000, "not JSON: nested too deep"),
        ('{"PublicIP":"10.97.0.1","BackendData":' + "[" * 100_000, "not JSON: nested too deep"),
        ("null", "not a JSON object: null"),
        ('"10.97.0.1"', 'not a JSON object: "10.97.0.1"'),
        ("{}", "PublicIP is missing"),
        ('{"PublicIPv6":"fd00::1"}', "PublicIP is missing"),
        ('{"PublicIP":null}', "PublicIP is null, not a string"),
        ('{"PublicIP":174129153}', "PublicIP is 174129153, not a string"),
        ('{"PublicIP":""}', 'PublicIP "" is no IPv4 address'),
        ('{"PublicIP":"10.97.0.01"}', 'PublicIP "10.97.0.01" is no IPv4 address'),
        ('{"PublicIP":"10.97.0.1/24"}', 'PublicIP "10.97.0.1/24" is no IPv4 address'),
        ('{"PublicIP":"fd00::1"}', 'PublicIP "fd00::1" is no IPv4 address'),
        ('{"PublicIP":"::ffff:10.97.0.1"}', 'PublicIP "::ffff:10.97.0.1" is no IPv4 address'),
        ('{"PublicIP":"0.0.0.0"}', "PublicIP 0.0.0.0 is unspecified"),
        ('{"PublicIP":"0.1.2.3"}', "PublicIP 0.1.2.3 is unspecified"),
        ('{"PublicIP":"127.0.0.1"}', "PublicIP 127.0.0.1 is a loopback address"),
        ('{"PublicIP":"224.0.0.1"}', "PublicIP 224.0.0.1 is a multicast address"),
        ('{"PublicIP":"239.255.255.255"}', "PublicIP 239.255.255.255 is a multicast address"),
        ('{"PublicIP":"240.0.0.1"}', "PublicIP 240.0.0.1 is a reserved or broadcast address"),
        ('{"PublicIP":"255.255.255.255"}', "is a reserved or broadcast address"),
        ('{"PublicIP":"fd00::1","PublicIP":"10.97.0.1"}', 'PublicIP "fd00::1"'),
        ('{"PublicIP":"10.97.0.1","BackendType":5}', "BackendType is 5, not a string"),
        ('{"PublicIP":"10.97.0.1","BackendType":["udp"]}', 'BackendType is ["udp"], not'),
    ],
)
def test_decode_refuses(text: str, reason: str) -> None:
    with pytest.raises(BadLease) as caught:
        decode_attrs(text)
    assert reason in str(caught.value)


@given(
    st.integers(1, 223).filter(lambda first: first != 127),
    st.integers(0, 2**24 - 1),
    st.text(),
    st.none() | st.dictionaries(st.text(), st.text() | st.integers() | st.none(), min_size=1),
)
def test_what_is_written_is_read_back(
    first: int, rest: int, backend_type: str, data: dict[str, object] | None
) -> None:
    raw = None if data is None else json.dumps(data, ensure_ascii=False)
    attrs = LeaseAttrs(IPv4Address((first << 24) + rest), backend_type, raw)
    text = attrs.encode()
    again = decode_attrs(text)
    assert again.public_ip == attrs.public_ip
    assert again.backend_type == backend_type
    assert (again.backend_data and json.loads(again.backend_data)) == data
    assert again.encode() == text
    # Go's reader has no trouble with it either.
    assert json.loads(text).keys() <= {"PublicIP", "BackendType", "BackendData"}


USUAL = st.builds(
    lambda ip, kind, data: f'{{"PublicIP":"{ip}"{kind}{data}}}',
    st.ip_addresses(v=4).map(str) | st.from_regex(r"[0-9.]{1,16}", fullmatch=True),
    st.sampled_from(
        ["", ',"BackendType":"vxlan"', ',"BackendType":"host-gw"', ',"BackendType":""']
    ),
    st.sampled_from(["", ',"BackendData":null', ',"BackendData":{"VtepMAC":"02:00:5e:10:00:01"}']),
)


def read(how: Callable[[str], LeaseAttrs], text: str) -> LeaseAttrs | str:
    try:
        return how(text)
    except BadLease as error:
        return str(error)


def test_what_flanneld_writes_needs_no_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gojson, "decode", None)
    for attrs in (
        LeaseAttrs(HOST),
        LeaseAttrs(HOST, "host-gw"),
        LeaseAttrs(HOST, "vxlan", '{"VtepMAC":"02:00:5e:10:00:01"}'),
    ):
        text = f'{{"PublicIP":"{HOST}"'
        text += f',"BackendType":"{attrs.backend_type}"' if attrs.backend_type else ""
        text += f',"BackendData":{attrs.backend_data}' if attrs.backend_data else ""
        assert decode_attrs(text + "}") == attrs


@given(USUAL)
def test_a_usual_value_is_read_as_any_other_way_of_writing_it(text: str) -> None:
    """A blank more, and it goes another way."""
    assert read(decode_attrs, text) == read(decode_attrs, text.replace("{", "{ ", 1))


@given(st.text() | st.from_regex(r'\{"PublicIP":.*\}', fullmatch=True))
def test_any_value_is_read_or_refused(text: str) -> None:
    try:
        attrs = decode_attrs(text)
    except BadLease:
        return
    assert decode_attrs(attrs.encode()) == attrs


@pytest.mark.parametrize(
    ("name", "subnet"),
    [
        ("10.5.34.0-24", "10.5.34.0/24"),
        ("0.0.0.0-1", "0.0.0.0/1"),
        ("255.255.255.254-31", "255.255.255.254/31"),
        ("10.0.0.0-9", "10.0.0.0/9"),
    ],
)
def test_subnet_key(name: str, subnet: str) -> None:
    assert parse_subnet_key(name) == IPv4Network(subnet)
    assert subnet_key(IPv4Network(subnet)) == name


@given(SUBNETS)
def test_subnet_key_reads_back(subnet: IPv4Network) -> None:
    assert parse_subnet_key(subnet_key(subnet)) == subnet
    assert taken_range(subnet_key(subnet)) == subnet


BAD_KEYS = {
    "x10.5.205.0-24y": "10.5.205.0/24",
    "10.5.207.0-24-x": "10.5.207.0/24",
    "10.5.208.7-24": "10.5.208.0/24",
    "10.5.0.79-32": "10.5.0.79/32",
    "10.5.50.0-24&fd00:10:5:2c::-64": "10.5.50.0/24",
    "10.5.34.0-024": "10.5.34.0/24",
    "10.5.34.0-24\n": "10.5.34.0/24",
    " 10.5.34.0-24": "10.5.34.0/24",
    "10.5.206.0-33": None,
    "10x5y6z0-24": None,
    "10.5.999.0-24": None,
    "010.5.34.0-24": None,
    "0.0.0.0-0": None,
    "0.0.0.0-0&fd00:10:5:2c::-64": None,
    "10.5.34.0/24": None,
    "10.5.34.0": None,
    "10.5.34-24": None,
    "10.5.34.0-": None,
    "10.5.34.0--24": None,
    "10.5.34.0-" + "1" * 5000: None,
    "1" * 5000: None,
    "1." * 5000: None,
    "\uff110.5.34.0-24": "0.5.34.0/24",
    "notasubnet": None,
    "": None,
}


@pytest.mark.parametrize(("name", "taken"), BAD_KEYS.items(), ids=[k[:32] for k in BAD_KEYS])
def test_bad_key(name: str, taken: str | None) -> None:
    with pytest.raises(BadLease, match="failed to parse subnet key"):
        parse_subnet_key(name)
    found = taken_range(name)
    assert (found and str(found)) == taken


@given(st.text() | st.from_regex(r"[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+-[0-9]+.?", fullmatch=True))
def test_any_key_is_read_or_refused(name: str) -> None:
    taken = taken_range(name)
    try:
        subnet = parse_subnet_key(name)
    except BadLease:
        return
    assert subnet == taken
    assert subnet_key(subnet) == name


def test_parse_lease() -> None:
    lease = parse_lease("10.5.34.0-24", '{"PublicIP":"10.97.0.1"}', 86400, 7)
    assert lease == Lease(IPv4Network("10.5.34.0/24"), LeaseAttrs(HOST), 86400, 7)
    assert not lease.is_reservation
    assert lease.key == "10.5.34.0-24"
    assert parse_lease("10.5.34.0-24", '{"PublicIP":"10.97.0.1"}', None, 7).is_reservation
    assert not parse_lease("10.5.34.0-24", '{"PublicIP":"10.97.0.1"}', 0, 7).is_reservation
    for name, value in (("foo", '{"PublicIP":"10.97.0.1"}'), ("10.5.34.0-24", "{}")):
        with pytest.raises(BadLease):
            parse_lease(name, value, None, 7)


NETWORK = IPv4Network("10.5.0.0/16")
OWN = IPv4Network("10.5.34.0/24")


@pytest.mark.parametrize(
    ("subnet", "public_ip", "reason"),
    [
        ("10.5.35.0/24", "10.97.0.2", None),
        ("10.5.0.0/24", "10.97.0.2", None),
        ("10.5.128.0/17", "10.97.0.2", None),
        ("10.5.255.254/31", "10.97.0.2", None),
        ("10.6.0.0/24", "10.97.0.2", "outside of Network 10.5.0.0/16"),
        ("10.4.0.0/15", "10.97.0.2", "outside of Network 10.5.0.0/16"),
        ("0.0.0.0/1", "10.97.0.2", "outside of Network 10.5.0.0/16"),
        ("10.5.0.0/16", "10.97.0.2", "takes all of Network"),
        ("10.5.34.0/24", "10.97.0.2", "overlaps this host's subnet 10.5.34.0/24"),
        ("10.5.32.0/22", "10.97.0.2", "overlaps this host's subnet 10.5.34.0/24"),
        ("10.5.34.128/25", "10.97.0.2", "overlaps this host's subnet 10.5.34.0/24"),
        ("10.5.35.0/24", "10.97.0.1", "this host's own public IP 10.97.0.1"),
    ],
)
def test_check_peer(subnet: str, public_ip: str, reason: str | None) -> None:
    lease = Lease(IPv4Network(subnet), LeaseAttrs(IPv4Address(public_ip)), 1, 1)
    found = check_peer(lease, NETWORK, OWN, HOST)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(f"lease {subnet} ")
        assert reason in found


@given(SUBNETS, SUBNETS, SUBNETS)
def test_a_peer_that_may_be_used_stays_within_bounds(
    subnet: IPv4Network, network: IPv4Network, own: IPv4Network
) -> None:
    lease = Lease(subnet, LeaseAttrs(IPv4Address("10.97.0.2")), 1, 1)
    usable = subnet.subnet_of(network) and subnet != network and not subnet.overlaps(own)
    assert (check_peer(lease, network, own, HOST) is None) == usable
