"""The difference between what is wanted and what the kernel has."""

from collections.abc import Hashable
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.kernel.state import (
    PROTOCOL,
    PROTOCOL_BOOT,
    Difference,
    Entry,
    FdbEntry,
    Found,
    Neighbour,
    Route,
    Territory,
    contains,
    difference,
)

NETWORK = IPv4Network("10.5.0.0/16")
HOSTGW = Territory((NETWORK,))
VXLAN = Territory((NETWORK,), device=7)

STATIC = 4  # RTPROT_STATIC


def route(subnet: str, via: str = "192.168.0.2", oif: int = 3, onlink: bool = False) -> Route:
    return Route(IPv4Network(subnet), IPv4Address(via), oif, onlink)


def neighbour(ip: str, mac: int = 1, oif: int = 7) -> Neighbour:
    return Neighbour(IPv4Address(ip), bytes([2, 0, 0, 0, 0, mac]), oif)


def fdb(mac: int, dst: str = "192.168.0.2", oif: int = 7) -> FdbEntry:
    return FdbEntry(bytes([2, 0, 0, 0, 0, mac]), IPv4Address(dst), oif)


def compare(wanted: list[Entry], found: list[Found], territory: Territory) -> Difference:
    return difference({entry.slot: entry for entry in wanted}, found, territory.holds)


A, B = route("10.5.1.0/24"), route("10.5.2.0/24")
A_ELSEWHERE = route("10.5.1.0/24", "192.168.0.9")


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        pytest.param([], [], Difference((), ()), id="nothing"),
        pytest.param([B, A], [], Difference((B, A), ()), id="new, in the order wanted"),
        pytest.param([A], [Found(A, PROTOCOL)], Difference((), ()), id="in place"),
        pytest.param(
            [A, B],
            [Found(A_ELSEWHERE, PROTOCOL), Found(B, PROTOCOL)],
            Difference((A,), ()),
            id="changed gateway is replaced, not deleted",
        ),
        pytest.param(
            [A],
            [Found(route("10.5.1.0/24", oif=4), PROTOCOL)],
            Difference((A,), ()),
            id="changed device",
        ),
        pytest.param(
            [A],
            [Found(route("10.5.1.0/24", onlink=True), PROTOCOL)],
            Difference((A,), ()),
            id="onlink only there",
        ),
        pytest.param([A], [Found(A, STATIC)], Difference((A,), ()), id="right, but not marked"),
        pytest.param(
            [A], [Found(A, PROTOCOL, plain=False)], Difference((A,), ()), id="two next hops"
        ),
        pytest.param(
            [A],
            [Found(A_ELSEWHERE, STATIC, metric=100)],
            Difference((A,), ()),
            id="foreign route with a metric stands beside ours",
        ),
        pytest.param(
            [A],
            [Found(A, PROTOCOL, metric=100), Found(A, PROTOCOL)],
            Difference((), (Found(A, PROTOCOL, metric=100),)),
            id="one of ours with a metric goes",
        ),
        pytest.param(
            [A],
            [Found(A_ELSEWHERE, STATIC, tos=16)],
            Difference((A,), ()),
            id="foreign route with a TOS stands beside ours",
        ),
        pytest.param(
            [A],
            [Found(A, PROTOCOL, tos=16), Found(A, PROTOCOL)],
            Difference((), (Found(A, PROTOCOL, tos=16),)),
            id="one of ours with a TOS goes",
        ),
        pytest.param(
            [A],
            [Found(A, PROTOCOL), Found(A_ELSEWHERE, STATIC)],
            Difference((), ()),
            id="of two in the slot ours is the first: it counts",
        ),
        pytest.param(
            [A],
            [Found(A_ELSEWHERE, STATIC), Found(A, PROTOCOL)],
            Difference((A,), ()),
            id="of two in the slot ours is behind: the packets go elsewhere",
        ),
        pytest.param(
            [],
            [Found(A, PROTOCOL), Found(B, STATIC)],
            Difference((), (Found(A, PROTOCOL),)),
            id="stale goes, foreign stays",
        ),
        pytest.param(
            [],
            [Found(A, PROTOCOL, plain=False)],
            Difference((), (Found(A, PROTOCOL, plain=False),)),
            id="stale and altered",
        ),
        pytest.param(
            [],
            [Found(route("10.6.1.0/24"), PROTOCOL), Found(route("10.0.0.0/8"), PROTOCOL)],
            Difference((), ()),
            id="another network's daemon, and a wider range",
        ),
    ],
)
def test_host_gw(wanted: list[Entry], found: list[Found], expected: Difference) -> None:
    assert compare(wanted, found, HOSTGW) == expected


PEER: list[Entry] = [
    neighbour("10.5.1.0"),
    fdb(1),
    route("10.5.1.0/24", "10.5.1.0", 7, onlink=True),
]
PEER_FOUND = [Found(PEER[0]), Found(PEER[1]), Found(PEER[2], PROTOCOL)]


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        pytest.param(PEER, [], Difference(tuple(PEER), ()), id="new peer, route last"),
        pytest.param(PEER, PEER_FOUND, Difference((), ()), id="in place"),
        pytest.param([], PEER_FOUND, Difference((), tuple(PEER_FOUND)), id="peer gone"),
        pytest.param(
            [neighbour("10.5.1.0", mac=2), fdb(2), PEER[2]],
            PEER_FOUND,
            Difference((neighbour("10.5.1.0", mac=2), fdb(2)), (Found(fdb(1)),)),
            id="new MAC: neighbour replaced, the old FDB entry goes",
        ),
        pytest.param(
            [PEER[0], fdb(1, "192.168.0.9"), PEER[2]],
            PEER_FOUND,
            Difference((fdb(1, "192.168.0.9"),), ()),
            id="new public IP: FDB entry replaced",
        ),
        pytest.param(
            PEER,
            [Found(neighbour("10.5.1.0"), plain=False), *PEER_FOUND[1:]],
            Difference((PEER[0],), ()),
            id="neighbour made reachable by ARP",
        ),
        pytest.param(
            [],
            [
                Found(neighbour("10.5.1.0", oif=2)),
                Found(fdb(1, oif=2)),
                Found(neighbour("10.5.9.0"), plain=False, permanent=False),
                Found(fdb(9), plain=False, permanent=False),
            ],
            Difference((), ()),
            id="of other devices, or learned: not ours",
        ),
        pytest.param(
            PEER,
            [PEER_FOUND[0], Found(PEER[1], plain=False), PEER_FOUND[2]],
            Difference((PEER[1],), ()),
            id="FDB entry given another port",
        ),
        pytest.param(
            [neighbour("10.5.1.0")],
            [Found(neighbour("10.5.1.0", oif=2))],
            Difference((neighbour("10.5.1.0"),), ()),
            id="the same address on another device is another slot",
        ),
    ],
)
def test_vxlan(wanted: list[Entry], found: list[Found], expected: Difference) -> None:
    assert compare(wanted, found, VXLAN) == expected


KERNEL = 2  # RTPROT_KERNEL
NOWHERE = str(IPv4Address(0))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(Found(A, PROTOCOL), True, id="ours"),
        pytest.param(Found(route("10.5.1.0/24", NOWHERE), PROTOCOL), True, id="ours, no gateway"),
        pytest.param(Found(A, PROTOCOL, plain=False), True, id="ours, altered"),
        pytest.param(Found(A, PROTOCOL_BOOT), True, id="as the original's"),
        pytest.param(Found(route("10.5.1.0/24", NOWHERE), PROTOCOL_BOOT), False, id="ip route"),
        pytest.param(Found(route("10.5.1.0/24", NOWHERE), KERNEL), False, id="to a bridge"),
        pytest.param(Found(A, KERNEL), False, id="kernel"),
        pytest.param(Found(A, STATIC), False, id="static"),
        pytest.param(Found(A, 0), False, id="without protocol"),
        pytest.param(Found(neighbour("10.5.1.0"), plain=False), True, id="neighbour"),
        pytest.param(Found(fdb(1)), True, id="FDB entry"),
    ],
)
def test_what_gives_way_where_we_had_nothing(found: Found, expected: bool) -> None:
    assert found.may_be_replaced is expected


@pytest.mark.parametrize(
    ("metric", "tos", "expected"), [(0, 0, True), (100, 0, False), (0, 16, False)]
)
def test_where_ours_would_stand(metric: int, tos: int, expected: bool) -> None:
    assert Found(A, PROTOCOL, metric, tos).in_slot is expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(
            Found(route("10.5.1.0/24", "10.5.1.0", 7, True), PROTOCOL_BOOT), True, id="a peer's"
        ),
        pytest.param(Found(route("10.5.0.0/16", NOWHERE, 7), PROTOCOL_BOOT), True, id="Network's"),
        pytest.param(
            Found(route("172.30.0.0/16", "10.5.1.0", 7, True), PROTOCOL_BOOT),
            False,
            id="to what is behind a peer",
        ),
        pytest.param(
            Found(route("10.5.1.0/24", "10.97.0.9", 2), PROTOCOL_BOOT), False, id="another device"
        ),
    ],
)
def test_which_routes_without_our_number_are_ours_to_remove(found: Found, expected: bool) -> None:
    assert VXLAN.holds(found) is expected
    assert not HOSTGW.holds(found)


def test_without_a_device_no_neighbour_is_ours() -> None:
    assert compare([], PEER_FOUND[:2], HOSTGW) == Difference((), ())


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("10.5.0.0/16", "10.5.0.0/16", True),
        ("10.5.0.0/16", "10.5.255.0/24", True),
        ("10.5.0.0/16", "10.6.0.0/24", False),
        ("10.5.0.0/16", "10.0.0.0/8", False),
        ("0.0.0.0/0", "10.5.0.0/16", True),
        ("10.5.1.0/32", "10.5.1.0/32", True),
    ],
)
def test_contains(outer: str, inner: str, expected: bool) -> None:
    assert contains(IPv4Network(outer), IPv4Network(inner)) is expected


@given(st.integers(0, 2**32 - 1), st.integers(0, 32), st.integers(0, 2**32 - 1), st.integers(0, 32))
def test_contains_is_subnet_of(first: int, length: int, second: int, longer: int) -> None:
    outer = IPv4Network((first, length), strict=False)
    inner = IPv4Network((second ^ first if longer % 2 else first, longer), strict=False)
    assert contains(outer, inner) is inner.subnet_of(outer)


NETWORKS = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    # Close to each other, at both ends.
    st.sampled_from([0, 1, 0x0A050000, 0x0A050100, 0xFFFFFF00, 0xFFFFFFFF]),
    st.integers(0, 32),
)


@given(NETWORKS, NETWORKS)
def test_routes_share_a_slot_if_their_destination_is_the_same(
    one: IPv4Network, other: IPv4Network
) -> None:
    first, second = (Route(dst, IPv4Address("192.168.0.2"), 2) for dst in (one, other))
    assert (first.slot == second.slot) is (one == other)


# Few values, so that slots collide.
SUBNETS = st.sampled_from(["10.5.1.0/24", "10.5.2.0/24", "10.6.1.0/24", "10.5.0.0/16"])
GATEWAYS = st.sampled_from(["192.168.0.2", "192.168.0.3"])
DEVICES = st.sampled_from([2, 7])
ROUTES = st.builds(route, SUBNETS, GATEWAYS, DEVICES, st.booleans())
OTHERS: st.SearchStrategy[Neighbour | FdbEntry] = st.one_of(
    st.builds(neighbour, st.sampled_from(["10.5.1.0", "10.5.2.0"]), st.integers(1, 2), DEVICES),
    st.builds(fdb, st.integers(1, 3), GATEWAYS, DEVICES),
)
WANTED: st.SearchStrategy[list[Entry]] = st.lists(
    st.one_of(
        st.builds(route, st.sampled_from(["10.5.1.0/24", "10.5.2.0/24"]), GATEWAYS, DEVICES),
        st.builds(neighbour, st.sampled_from(["10.5.1.0", "10.5.2.0"]), st.integers(1, 2)),
        st.builds(fdb, st.integers(1, 3), GATEWAYS),
    ),
    unique_by=lambda entry: entry.slot,
)
FOUND: st.SearchStrategy[list[Found]] = st.lists(
    st.one_of(
        st.builds(
            Found,
            ROUTES,
            st.sampled_from([PROTOCOL, STATIC]),
            st.sampled_from([0, 100]),
            st.sampled_from([0, 16]),
            st.booleans(),
        ),
        st.builds(Found, OTHERS, plain=st.booleans()),
    )
)

Place = tuple[Hashable, int, int]


def place(found: Found) -> Place:
    """Return what the kernel tells entries apart by: it has one at each place."""
    return found.entry.slot, found.metric, found.tos


@given(WANTED, FOUND, st.sampled_from([HOSTGW, VXLAN]))
def test_applied_it_gives_what_is_wanted_and_leaves_the_rest(
    wanted: list[Entry], found: list[Found], territory: Territory
) -> None:
    if not territory.device:
        wanted = [entry for entry in wanted if isinstance(entry, Route)]
    before = {place(item): item for item in found}
    slots = {entry.slot for entry in wanted}
    changes = compare(wanted, list(before.values()), territory)

    kernel = dict(before)
    for entry in changes.write:
        item = Found(entry, PROTOCOL if isinstance(entry, Route) else 0)
        kernel[place(item)] = item
    for item in changes.delete:
        assert kernel.pop(place(item)) == item

    ours = {entry.slot: Found(entry, PROTOCOL * isinstance(entry, Route)) for entry in wanted}
    foreign = {
        where: item
        for where, item in before.items()
        if not territory.holds(item) and not (item.in_slot and item.entry.slot in slots)
    }
    expected = foreign | {place(item): item for item in ours.values()}
    assert kernel == expected
    assert compare(wanted, list(kernel.values()), territory) == Difference((), ())
    assert len(changes.write) == len({entry.slot for entry in changes.write})
    kept = [entry for entry in wanted if before.get(place(ours[entry.slot])) == ours[entry.slot]]
    assert [entry for entry in wanted if entry not in kept] == list(changes.write)
