"""The choice of the external interface, against recordings of flannel v0.8.0."""

import re
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.errors import InterfaceError
from flanneld.interface import (
    Address,
    DefaultRoute,
    ExternalInterface,
    HostFacts,
    Link,
    SelectionError,
    look_up,
    preferred_address,
)

RECORDING = Path(__file__).parents[1] / "fixtures" / "edge" / "interface-selection.txt"

UNICAST, BLACKHOLE, UNREACHABLE = 1, 6, 7


class Recorded(NamedTuple):
    exit_code: int
    log: list[str]
    error: str | None


def recorded_host() -> HostFacts:
    """The host of the recording's first line: "NAME ADDRESS/LENGTH ... (up|down|none)"."""
    with RECORDING.open() as lines:
        first = next(lines)
    links, addresses = [], []
    device = r"(\w+)((?: [\d.]+/\d+)+)(?: \((up|down)\))?|(\w+) \(none\)"
    for index, found in enumerate(re.finditer(device, first), start=1):
        name, texts, state, bare = found.groups()
        links.append(Link(index, name or bare, 1500, state != "down", None))
        for text in (texts or "").split():
            own = IPv4Interface(text)
            addresses.append(Address(index, own.ip, own.network.prefixlen, 0))
    return HostFacts(tuple(links), tuple(addresses), ())


def recorded_cases() -> dict[str, Recorded]:
    cases: dict[str, Recorded] = {}
    for part in RECORDING.read_text().split("### ")[1:]:
        title, _, body = part.partition("\n")
        entries = re.findall(r"^([IE])\d{4} \S+ +\d+ \S+\] (.*)$", body, re.MULTILINE)
        errors = [text for level, text in entries if level == "E"]
        cases[title] = Recorded(
            exit_code=int("exit 1\n" in body),
            log=[text for level, text in entries if level == "I"],
            error=errors[0] if errors else None,
        )
    return cases


HOST = recorded_host()
CASES = recorded_cases()
INDEX = {link.name: link.index for link in HOST.links}
ETH0 = DefaultRoute(INDEX["eth0"], 0, UNICAST)


def via(device: str, metric: int = 0) -> DefaultRoute:
    return DefaultRoute(INDEX[device], metric, UNICAST)


class Asked(NamedTuple):
    ifaces: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
    public_ip: str = ""
    defaults: tuple[DefaultRoute, ...] = (ETH0,)


# The options and default routes behind each title of the recording, which shows only the outcome.
ASKED = {
    "default": Asked(),
    "iface=secondary IP": Asked(ifaces=("10.97.0.101",)),
    "iface=link-local IP of eth0": Asked(ifaces=("169.254.7.7",)),
    "iface=127.0.0.1": Asked(ifaces=("127.0.0.1",)),
    "iface-regex matching a secondary IP": Asked(regexes=(r"10\.97\.0\.101",)),
    "no default route": Asked(defaults=()),
    "default only in another table": Asked(defaults=()),
    "blackhole default route": Asked(defaults=(DefaultRoute(None, 0, BLACKHOLE),)),
    "unreachable default first": Asked(
        defaults=(DefaultRoute(None, 0, UNREACHABLE), via("eth0", 50))
    ),
    "iface=dum0": Asked(ifaces=("dum0",)),
    "iface=dum1 (link down)": Asked(ifaces=("dum1",)),
    "iface=ll0 (only a link-local address)": Asked(ifaces=("ll0",)),
    "iface=noip0 (no address)": Asked(ifaces=("noip0",)),
    "iface-regex matching the IPs of two interfaces": Asked(regexes=(r"^172\.31\.",)),
    "iface-regex by name only": Asked(regexes=("^dum1$",)),
    "iface-regex on a name without address": Asked(regexes=("noip",)),
    "iface-regex: IP of one and name of an earlier one": Asked(
        regexes=(r"^172\.31\.6\.|^eth0$|^dum0$",)
    ),
    "two regexes, second matches": Asked(regexes=("zzz", "dum0")),
    "regex given before iface": Asked(ifaces=("dum1",), regexes=("dum0",)),
    "iface fails, regex matches": Asked(ifaces=("nope",), regexes=("dum0",)),
    "iface + public-ip": Asked(ifaces=("dum0",), public_ip="203.0.113.9"),
    "public-ip equal to another interface's address, no iface": Asked(public_ip="172.31.5.5"),
    "two default routes: metric 100 dum0, metric 50 eth0": Asked(
        defaults=(via("eth0", 50), via("dum0", 100))
    ),
    "two default routes: metric 100 dum0, metric 500 eth0": Asked(
        defaults=(via("dum0", 100), via("eth0", 500))
    ),
    "default route without gateway": Asked(defaults=(via("dum0"),)),
    "multipath default route": Asked(defaults=(DefaultRoute(None, 0, UNICAST),)),
}


@pytest.mark.parametrize("title", CASES)
def test_does_and_says_what_the_original_did(title: str) -> None:
    asked, recorded = ASKED[title], CASES[title]
    facts = replace(HOST, defaults=asked.defaults)
    if recorded.error is None:
        log = look_up(facts, asked.ifaces, asked.regexes, asked.public_ip).log
    else:
        with pytest.raises(SelectionError) as failure:
            look_up(facts, asked.ifaces, asked.regexes, asked.public_ip)
        log = failure.value.log
        assert str(failure.value).startswith(f"{recorded.error} (")
        assert failure.value.exit_code == recorded.exit_code
    assert list(log) == recorded.log


def test_the_recording_was_read_whole() -> None:
    assert list(CASES) == list(ASKED)
    assert all(case.log for case in CASES.values())
    assert [(link.name, link.up) for link in HOST.links] == [
        ("lo", True),
        ("eth0", True),
        ("dum0", True),
        ("dum1", False),
        ("ll0", True),
        ("noip0", True),
    ]
    assert len(HOST.addresses) == 7


def test_the_interface_itself() -> None:
    selected = look_up(HOST, ["dum0"], [], "203.0.113.9").interface
    assert selected == ExternalInterface(
        INDEX["dum0"], "dum0", 1500, IPv4Address("172.31.5.5"), IPv4Address("203.0.113.9")
    )


def facts_of(*devices: tuple[str, list[str]], mtu: int = 1500) -> HostFacts:
    links = tuple(Link(i, name, mtu, True, "veth") for i, (name, _) in enumerate(devices, start=1))
    addresses = tuple(
        Address(i, IPv4Address(text), 24, 0)
        for i, (_, texts) in enumerate(devices, start=1)
        for text in texts
    )
    return HostFacts(links, addresses, ())


@pytest.mark.parametrize(
    ("addresses", "preferred"),
    [
        (["10.0.0.1", "10.0.0.2"], "10.0.0.1"),
        (["169.254.0.1", "192.168.0.1"], "192.168.0.1"),
        (["169.254.0.1", "169.254.0.2"], "169.254.0.2"),
        (["127.0.0.1", "10.0.0.1"], "10.0.0.1"),
        (["127.0.0.1", "127.8.8.8"], None),
        (["224.0.0.5", "255.255.255.255"], None),
        ([str(IPv4Address(0))], None),
        (["240.0.0.1"], "240.0.0.1"),
        (["100.64.0.1"], "100.64.0.1"),
        ([], None),
    ],
)
def test_preferred_address(addresses: list[str], preferred: str | None) -> None:
    facts = facts_of(("eth0", addresses), ("eth1", ["10.9.9.9"]))
    assert preferred_address(facts, 1) == (preferred and IPv4Address(preferred))


LAB = facts_of(
    ("lo", ["127.0.0.1"]), ("eth0", ["10.97.0.1", "10.97.0.101"]), ("eth1", ["10.98.0.1"])
)


@pytest.mark.parametrize(
    ("ifaces", "regexes", "reason"),
    [
        (["nope"], [], "error looking up interface nope: route ip+net: no such network interface"),
        (
            ["10.97.0.99"],
            [],
            "error looking up interface 10.97.0.99: No interface with given IP found",
        ),
        (["fd00::1"], [], "error looking up interface fd00::1: No interface with given IP found"),
        # Go's parser knows no zones here, so this is a name.
        (
            ["fe80::1%eth0"],
            [],
            "error looking up interface fe80::1%eth0: route ip+net: no such network interface",
        ),
        (["lo"], [], "failed to find IPv4 address for interface lo"),
        (
            [],
            ["zzz"],
            "Could not match pattern zzz to any of the available network interfaces",
        ),
        (
            [],
            ["["],
            "regex error matching pattern [ to 10.97.0.1: unterminated character set",
        ),
        # An empty entry stands for the default route's device.
        ([""], [], "failed to get default interface: Unable to find default route"),
        ([], [""], "failed to get default interface: Unable to find default route"),
    ],
)
def test_a_miss_says_why(ifaces: list[str], regexes: list[str], reason: str) -> None:
    with pytest.raises(SelectionError) as failure:
        look_up(LAB, ifaces, regexes, "")
    wanted = (ifaces + regexes)[0]
    assert failure.value.log[-1] == f"Could not find valid interface matching {wanted}: {reason}"
    assert str(failure.value) == (
        "Failed to find interface to use that matches the interfaces and/or regexes provided "
        "(this host has: lo 127.0.0.1, eth0 10.97.0.1 10.97.0.101, eth1 10.98.0.1)"
    )


def test_a_broken_regex_without_any_address_is_tried_on_the_first_name() -> None:
    with pytest.raises(SelectionError) as failure:
        look_up(facts_of(("lo", ["127.0.0.1"])), [], ["("], "")
    assert "regex error matching pattern ( to lo: " in failure.value.log[-1]


def test_every_iface_comes_before_every_regex_in_order() -> None:
    selection = look_up(LAB, ["nope", "10.98.0.1", "eth0"], ["eth0"], "")
    assert selection.interface.name == "eth1"
    assert [line.split(":")[0] for line in selection.log] == [
        "Could not find valid interface matching nope",
        "Searching for interface using 10.98.0.1",
        "Using interface with name eth1 and address 10.98.0.1",
        "Defaulting external address to interface address (10.98.0.1)",
    ]


def test_an_empty_iface_is_the_default_interface() -> None:
    facts = replace(LAB, defaults=(DefaultRoute(3, 0, UNICAST),))
    selection = look_up(facts, [""], [], "")
    assert selection.interface.name == "eth1"
    assert selection.log[0] == "Determining IP address of default interface"


def test_a_mapped_ipv6_address_is_its_ipv4_address() -> None:
    selection = look_up(LAB, ["::ffff:10.98.0.1"], [], "::ffff:203.0.113.9")
    assert selection.log == (
        "Searching for interface using 10.98.0.1",
        "Using interface with name eth1 and address 10.98.0.1",
        "Using 203.0.113.9 as external address",
    )
    assert selection.interface.ext_addr == IPv4Address("203.0.113.9")


def test_the_lowest_index_wins_whatever_the_dump_order() -> None:
    shared = facts_of(("eth0", ["10.0.0.1"]), ("eth1", ["10.0.0.1"]))
    for facts in (shared, replace(shared, links=shared.links[::-1])):
        assert look_up(facts, ["10.0.0.1"], [], "").interface.name == "eth0"
        assert look_up(facts, [], ["eth"], "").interface.name == "eth0"


def test_mtu_zero_is_a_miss() -> None:
    facts = facts_of(("eth0", ["10.0.0.1"]), mtu=0)
    with pytest.raises(SelectionError) as failure:
        look_up(facts, ["eth0"], [], "")
    assert failure.value.log == (
        "Using interface with name eth0 and address 10.0.0.1",
        "Could not find valid interface matching eth0: "
        "failed to determine MTU for 10.0.0.1 interface",
    )
    with pytest.raises(SelectionError, match=r"any valid .*: failed to determine MTU for 10\.0"):
        look_up(replace(facts, defaults=(DefaultRoute(1, 0, UNICAST),)), [], [], "")


@pytest.mark.parametrize("text", ["foo", "1.2.3", "01.2.3.4", "fd00::1", " 1.2.3.4", "1.2.3.4/24"])
@pytest.mark.parametrize("ifaces", [[], ["eth0"]])
def test_a_bad_public_ip_is_named_whatever_the_interface(text: str, ifaces: list[str]) -> None:
    facts = replace(LAB, defaults=(DefaultRoute(2, 0, UNICAST),))
    with pytest.raises(InterfaceError, match=f"^invalid public IP address: {re.escape(text)} \\("):
        look_up(facts, ifaces, [], text)


@pytest.mark.parametrize(
    ("route", "reason", "remedy"),
    [
        (None, "Unable to find default route", "add a default route to the main table"),
        (
            DefaultRoute(None, 50, BLACKHOLE),
            "Found default route but could not determine interface",
            "the first one, of metric 50, is of type blackhole",
        ),
        (
            DefaultRoute(None, 0, UNICAST),
            "Found default route but could not determine interface",
            "the first one, of metric 0, has more than one next hop",
        ),
        (
            DefaultRoute(77, 0, UNICAST),
            "route ip+net: no such network interface",
            "choose an interface with --iface",
        ),
    ],
)
def test_the_default_route_errors_say_what_to_do(
    route: DefaultRoute | None, reason: str, remedy: str
) -> None:
    with pytest.raises(SelectionError) as failure:
        look_up(replace(LAB, defaults=(route,) if route else ()), [], [], "")
    text = str(failure.value)
    start = "Failed to find any valid interface to use: failed to get default interface: "
    assert text.startswith(f"{start}{reason} ({remedy}")
    assert "--iface; this host has: lo 127.0.0.1, eth0 10.97.0.1 10.97.0.101, " in text


def test_the_list_of_devices_is_bounded() -> None:
    many = facts_of(*((f"eth{i}", [f"10.0.0.{i}"]) for i in range(1, 100)))
    with pytest.raises(SelectionError, match=r"eth12 10\.0\.0\.12 and 87 more\)$"):
        look_up(many, ["nope"], [], "")
    down = replace(many, links=tuple(replace(link, up=False) for link in many.links))
    with pytest.raises(SelectionError, match=r"eth1 10\.0\.0\.1 \(down\), "):
        look_up(down, ["nope"], [], "")
    with pytest.raises(SelectionError, match=r"\(this host has no IPv4 address\)$"):
        look_up(facts_of(("eth0", [])), ["nope"], [], "")


def test_needs_no_netlink_library() -> None:
    code = "import sys, flanneld.interface; sys.exit('pyroute2' in sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=30)


ips = st.one_of(
    st.ip_addresses(v=4),
    st.sampled_from(["10.0.0.1", "10.0.0.2", "169.254.0.1", "127.0.0.1"]).map(IPv4Address),
)
indexes = st.integers(0, 5)
names = st.sampled_from(["lo", "eth0", "eth1", "flannel.1"])
hosts = st.builds(
    HostFacts,
    st.lists(
        st.builds(Link, indexes, names, st.sampled_from([0, 1500]), st.booleans(), st.just("veth")),
        max_size=5,
    ).map(tuple),
    st.lists(st.builds(Address, indexes, ips, st.integers(0, 32), st.just(0)), max_size=6).map(
        tuple
    ),
    st.lists(
        st.builds(DefaultRoute, st.none() | indexes, st.integers(0, 2**32 - 1), st.integers(0, 12)),
        max_size=3,
    ).map(tuple),
)
texts = st.one_of(names, ips.map(str), st.just(""), st.text(max_size=8))
patterns = st.one_of(names, st.text(alphabet=r"eth0.\[]^$()?*+{},1:-|zQE&~<=", max_size=10), texts)


@given(hosts, st.lists(texts, max_size=3), st.lists(patterns, max_size=3), texts)
def test_any_host_yields_an_own_address_or_an_interface_error(
    facts: HostFacts, ifaces: list[str], regexes: list[str], public_ip: str
) -> None:
    try:
        selection = look_up(facts, ifaces, regexes, public_ip)
    except InterfaceError:
        return
    chosen = selection.interface
    assert any(
        (link.index, link.name, link.mtu) == (chosen.index, chosen.name, chosen.mtu)
        for link in facts.links
    )
    assert chosen.iface_addr in facts.addresses_of(chosen.index)
    assert chosen.mtu > 0
    assert selection.log[-2:] == (
        f"Using interface with name {chosen.name} and address {chosen.iface_addr}",
        f"Using {chosen.ext_addr} as external address"
        if public_ip
        else f"Defaulting external address to interface address ({chosen.iface_addr})",
    )
