"""The vxlan backend's decisions: its keys, the MAC, the lease data, a peer's entries."""

import json
import re
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flanneld.backend.vxlan import (
    VxlanConfig,
    choose_mac,
    decode_mac,
    encode_data,
    peer_entries,
    read_config,
)
from flanneld.errors import BackendError
from flanneld.kernel.state import Entry, FdbEntry, Neighbour, Route
from flanneld.subnet.config import parse_config
from flanneld.subnet.lease import BadLease, Lease, LeaseAttrs, decode_attrs, parse_lease

RECORDED = Path(__file__).parents[1] / "fixtures" / "backends"

# Device indexes of the recorded hosts.
ETH0, FLANNEL = 2, 3
NAMES = {ETH0: "eth0", FLANNEL: "flannel.1"}

MACS = st.binary(min_size=6, max_size=6).filter(lambda mac: any(mac) and not mac[0] & 1)


def config_with(**keys: object) -> VxlanConfig:
    text = json.dumps({"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", **keys}})
    return read_config(parse_config(text))


def attrs(data: str | None) -> LeaseAttrs:
    return LeaseAttrs(IPv4Address("10.97.0.2"), "vxlan", data)


# The backend's keys


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, VxlanConfig(1, 0, False, False, False, 0)),
        ({"VNI": 0}, VxlanConfig(0, 0, False, False, False, 0)),
        ({"VNI": 9_999_999}, VxlanConfig(9_999_999, 0, False, False, False, 0)),
        ({"Port": 65535}, VxlanConfig(1, 65535, False, False, False, 0)),
        ({"MTU": 118}, VxlanConfig(1, 0, False, False, False, 118)),
        ({"MTU": 65535}, VxlanConfig(1, 0, False, False, False, 65535)),
        (
            {"VNI": 7, "Port": 4789, "GBP": True, "Learning": True, "DirectRouting": True},
            VxlanConfig(7, 4789, True, True, True, 0),
        ),
        ({"vni": 7, "pORT": 1, "gbp": True}, VxlanConfig(7, 1, True, False, False, 0)),
        ({"VNI": None, "Port": None, "GBP": None}, VxlanConfig(1, 0, False, False, False, 0)),
        ({"Unknown": [1]}, VxlanConfig(1, 0, False, False, False, 0)),
    ],
)
def test_the_keys_and_their_defaults(keys: dict[str, object], expected: VxlanConfig) -> None:
    assert config_with(**keys) == expected


def test_the_config_is_logged_in_the_originals_words() -> None:
    assert str(config_with()) == "VNI=1 Port=0 GBP=false Learning=false DirectRouting=false"
    assert (
        str(config_with(VNI=7, Port=4789, GBP=True, Learning=True, DirectRouting=True))
        == "VNI=7 Port=4789 GBP=true Learning=true DirectRouting=true"
    )


WRONG: dict[str, list[object]] = {
    "VNI": [-1, 10_000_000, 2**64, 1.0, "1", True, [], {}],
    "Port": [-1, 65536, 70000, 84.72, "8472", False],
    "MTU": [-1, 1, 117, 65536, "1450", 1450.0, True],
    "GBP": [0, 1, "true", []],
    "Learning": [0, 1, "true", []],
    "DirectRouting": [0, 1, "true", []],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_wrong_key_is_one_error_that_names_it(key: str, value: object) -> None:
    with pytest.raises(BackendError, match=rf"^Backend key {key} must be ") as caught:
        config_with(**{key: value})
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


# The MAC


def test_the_mac_stays_the_same_over_versions() -> None:
    """A device made anew after a reboot or an upgrade has the MAC its peers know."""
    assert choose_mac(IPv4Address("10.97.0.1"), 1) == "da:62:fe:2a:23:b1"


@given(st.ip_addresses(v=4), st.integers(0, 9_999_999))
def test_the_mac_is_unicast_and_locally_administered(ip: IPv4Address, vni: int) -> None:
    mac = choose_mac(ip, vni)
    assert re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac)
    assert int(mac[:2], 16) & 3 == 2
    assert choose_mac(ip, vni) == mac


def test_hosts_and_vnis_have_different_macs() -> None:
    first = int(IPv4Address("10.97.0.0"))
    macs = {choose_mac(IPv4Address(first + n), vni) for n in range(10_000) for vni in (1, 2)}
    assert len(macs) == 20_000


# The lease data


@pytest.mark.parametrize("subnet", ["10.5.16.0-24", "10.5.90.0-24"])
def test_a_lease_is_byte_for_byte_that_of_v080(subnet: str) -> None:
    text = (RECORDED / "v080-vxlan" / "etcd-v2.json").read_text()
    subnets = json.loads(text)["node"]["nodes"][0]["nodes"]
    (value,) = [node["value"] for node in subnets if node["key"].endswith(subnet)]
    recorded = decode_attrs(value)
    mac = decode_mac(recorded).hex(":")
    again = LeaseAttrs(recorded.public_ip, "vxlan", encode_data(mac))
    assert again.encode() == value
    assert again == recorded


@given(MACS)
def test_what_is_encoded_is_decoded(mac: bytes) -> None:
    assert decode_mac(attrs(encode_data(mac.hex(":")))) == mac


@pytest.mark.parametrize(
    "data",
    [
        '{"VtepMAC":"aa:03:d2:2b:e7:be"}',
        '{"VNI":1,"VtepMAC":"aa:03:d2:2b:e7:be"}',
        '{"VtepMAC":"AA:03:D2:2B:E7:BE","VNI":16777215,"More":{"VtepMAC":5}}',
        '{"vtepmac":"aa:03:d2:2b:e7:be"}',
        '{"VtepMAC":"02:00:00:00:00:01","VtepMAC":"aa:03:d2:2b:e7:be"}',
        ' { "VtepMAC" : "aa:03:d2:2b:e7:be" } ',
    ],
)
def test_the_data_of_every_version_is_understood(data: str) -> None:
    assert decode_mac(attrs(data)).hex(":") == "aa:03:d2:2b:e7:be"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (None, "empty text"),
        ("", "empty text"),
        ("null", "VtepMAC is missing"),
        ("{}", "VtepMAC is missing"),
        ('{"VNI":1}', "VtepMAC is missing"),
        ("[]", "VtepMAC is missing"),
        ('"aa:03:d2:2b:e7:be"', "VtepMAC is missing"),
        ('{"VtepMAC":"zz"}', 'must be a MAC address, not "zz"'),
        ('{"VtepMAC":5}', "must be a MAC address, not 5"),
        ('{"VtepMAC":null}', "must be a MAC address, not null"),
        ('{"VtepMAC":""}', 'must be a MAC address, not ""'),
        ('{"VtepMAC":"aa:03:d2:2b:e7"}', "must be a MAC address"),
        ('{"VtepMAC":"aa:03:d2:2b:e7:be:00:01"}', "must be a MAC address"),
        ('{"VtepMAC":"aa:03:d2:2b:e7:be\\n"}', "must be a MAC address"),
        ('{"VtepMAC":"00:00:00:00:00:00"}', "is no host's address"),
        ('{"VtepMAC":"ff:ff:ff:ff:ff:ff"}', "is no host's address"),
        ('{"VtepMAC":"01:00:5e:00:00:01"}', "is no host's address"),
        ('{"VtepMAC"', "BackendData: "),
    ],
)
def test_data_that_cannot_be_used_is_said(data: str | None, why: str) -> None:
    with pytest.raises(BadLease) as caught:
        decode_mac(attrs(data))
    assert why in str(caught.value)


def test_a_message_stays_short() -> None:
    with pytest.raises(BadLease) as caught:
        decode_mac(attrs(json.dumps({"VtepMAC": "x" * 100_000})))
    assert len(str(caught.value)) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("VtepMAC"), inner),
    max_leaves=8,
)
GARBAGE = (
    st.text()
    | JSON.map(json.dumps)
    | st.text("0123456789abcdef:-.").map(lambda text: json.dumps({"VtepMAC": text}))
)


@given(GARBAGE)
@example("[" * 100_000)
@example('{"VtepMAC":' * 10_000)
def test_garbage_gives_a_hosts_mac_or_a_bad_lease_and_nothing_else(data: str) -> None:
    try:
        mac = decode_mac(attrs(data))
    except BadLease as error:
        said = str(error)
    else:
        said = ""
        assert len(mac) == 6
        assert any(mac)
        assert not mac[0] & 1
    assert said.isprintable()


# A peer's entries


def leases(case: str) -> list[Lease]:
    """Return the leases of a recorded run of the later original, without the hosts' own order."""
    lines = (RECORDED / case / "etcd-v3.txt").read_text().splitlines()
    pairs = zip(lines[::2], lines[1::2], strict=True)
    return [
        parse_lease(key.rpartition("/")[2], value, 86400, 1)
        for key, value in pairs
        if "/subnets/" in key
    ]


def recorded(case: str, host: str, command: str) -> list[str]:
    """Return the lines of a command in a host's recorded state that flanneld is the cause of."""
    text = (RECORDED / case / f"{host}-state-idle.txt").read_text()
    section = text.split(f"$ {command}\n")[1].split("\n\n")[0]
    lines = [line.strip() for line in section.splitlines()]
    return [line for line in lines if "flannel.1" in line or line.startswith("10.5.")]


def shown(entry: Entry) -> str:
    """Return the line of ``ip -4 route``, ``ip neigh`` or ``bridge fdb`` for an entry."""
    device = NAMES[entry.oif]
    match entry:
        case Route(dst=dst, via=via, onlink=onlink):
            return f"{dst} via {via} dev {device}" + " onlink" * onlink
        case Neighbour(ip=ip, mac=mac):
            return f"{ip} dev {device} lladdr {mac.hex(':')} PERMANENT"
        case FdbEntry(mac=mac, dst=dst):
            return f"{mac.hex(':')} dev {device} dst {dst} self permanent"


def everywhere(_: IPv4Address) -> bool:
    return True


def nowhere(_: IPv4Address) -> bool:
    return False


@pytest.mark.parametrize(
    ("case", "direct"), [("v0202-vxlan", False), ("v0202-vxlan-directrouting", True)]
)
@pytest.mark.parametrize(("host", "own"), [("h1", "10.97.0.1"), ("h2", "10.97.0.2")])
def test_a_peers_entries_are_those_of_the_later_original(
    case: str, direct: bool, host: str, own: str
) -> None:
    (peer,) = [lease for lease in leases(case) if str(lease.attrs.public_ip) != own]
    entries = peer_entries(peer, FLANNEL, ETH0, everywhere if direct else nowhere)
    kinds = [type(entry) for entry in entries]
    # A packet that finds the route must find the neighbour, too.
    assert kinds == ([Route] if direct else [Neighbour, FdbEntry, Route])
    assert {shown(entry) for entry in entries if isinstance(entry, Route)} == {
        line
        for line in recorded(case, host, "ip -4 route show table all")
        if "table local" not in line
    }
    neighbours = [shown(entry) for entry in entries if isinstance(entry, Neighbour)]
    assert neighbours == recorded(case, host, "ip neigh")
    fdb = [shown(entry) for entry in entries if isinstance(entry, FdbEntry)]
    assert fdb == recorded(case, host, "bridge fdb show")


def peer(subnet: str, data: str | None) -> Lease:
    return Lease(IPv4Network(subnet), attrs(data), 86400, 1)


@given(MACS, st.integers(0, 2**24 - 1), st.integers(1, 30))
def test_the_entries_are_a_function_of_the_lease_and_the_indexes(
    mac: bytes, bits: int, length: int
) -> None:
    subnet = IPv4Network((bits << 8, length), strict=False)
    lease = Lease(subnet, attrs(encode_data(mac.hex(":"))), None, 1)
    neighbour, fdb, route = peer_entries(lease, 7, 4, nowhere)
    assert neighbour == Neighbour(subnet.network_address, mac, 7)
    assert fdb == FdbEntry(mac, lease.attrs.public_ip, 7)
    assert route == Route(subnet, subnet.network_address, 7, onlink=True)
    assert peer_entries(lease, 7, 4, everywhere) == (Route(subnet, lease.attrs.public_ip, 4),)


def test_direct_routing_is_decided_for_each_public_ip() -> None:
    asked = []

    def on_link(address: IPv4Address) -> bool:
        asked.append(str(address))
        return False

    peer_entries(peer("10.5.1.0/24", '{"VtepMAC":"02:00:00:00:00:01"}'), 7, 4, on_link)
    assert asked == ["10.97.0.2"]


@pytest.mark.parametrize("on_link", [everywhere, nowhere])
def test_a_peer_without_a_mac_is_of_no_use_on_link_or_not(on_link: object) -> None:
    """What is on-link may change at any time; the answer must not."""
    assert callable(on_link)
    with pytest.raises(BadLease):
        peer_entries(peer("10.5.1.0/24", "{}"), 7, 4, on_link)
