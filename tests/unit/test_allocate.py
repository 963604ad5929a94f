"""Which subnet this host takes, against a walk over every subnet."""

import random
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flanneld.errors import OutOfSubnets
from flanneld.subnet import allocate
from flanneld.subnet.allocate import Create, Decision, Discard, Reuse, decide, elder, first_free
from flanneld.subnet.config import Config, parse_config
from flanneld.subnet.lease import Lease, LeaseAttrs

OWN_IP = IPv4Address("10.97.0.1")
PEER_IP = IPv4Address("10.97.0.2")


def config(network: str = "10.5.0.0/16", extra: str = "") -> Config:
    return parse_config(f'{{"Network":"{network}"{extra}}}')


def lease(subnet: str | IPv4Network, ip: IPv4Address = PEER_IP, ttl: int | None = 86400) -> Lease:
    return Lease(IPv4Network(subnet), LeaseAttrs(ip), ttl, 1)


def choose(
    leases: list[Lease],
    unreadable: tuple[str, ...] = (),
    previous: str | None = None,
    cfg: Config | None = None,
) -> Decision:
    return decide(
        leases,
        [IPv4Network(text) for text in unreadable],
        OWN_IP,
        IPv4Network(previous) if previous else None,
        cfg or config(),
        rng=random.Random(1),
    )


def test_own_lease_is_reused() -> None:
    own = lease("10.5.7.0/24", OWN_IP)
    assert choose([lease("10.5.8.0/24"), own], previous="10.5.9.0/24") == Reuse(
        own, ("Found lease (10.5.7.0/24) for current IP (10.97.0.1), reusing",)
    )


@pytest.mark.parametrize(
    ("own", "previous", "kept"),
    [
        ([("10.5.9.0/24", 5), ("10.5.7.0/24", 5)], None, "10.5.7.0/24"),
        ([("10.5.7.0/24", 5), ("10.5.9.0/24", 5)], "10.5.9.0/24", "10.5.9.0/24"),
        ([("10.5.7.0/24", 5), ("10.5.9.0/24", None)], None, "10.5.9.0/24"),
        ([("10.5.7.0/24", 5), ("10.5.9.0/24", None)], "10.5.7.0/24", "10.5.7.0/24"),
        ([("10.5.9.0/24", None), ("10.5.7.0/24", None)], None, "10.5.7.0/24"),
        ([("10.6.1.0/24", 5), ("10.5.7.0/24", 5)], "10.6.1.0/24", "10.5.7.0/24"),
    ],
)
def test_best_of_several_own_leases_is_reused(
    own: list[tuple[str, int | None]], previous: str | None, kept: str
) -> None:
    leases = [lease(subnet, OWN_IP, ttl) for subnet, ttl in own]
    decision = choose(leases, previous=previous)
    assert isinstance(decision, Reuse)
    assert str(decision.lease.subnet) == kept
    [other] = [subnet for subnet, _ in own if subnet != kept]
    assert decision.notes == (f"Found lease ({kept}) for current IP (10.97.0.1), reusing",)
    (warning,) = decision.warnings
    assert warning.startswith(f"Found lease ({other}) for current IP (10.97.0.1) too")


@pytest.mark.parametrize(
    ("subnet", "extra"),
    [
        ("10.6.7.0/24", ""),
        ("10.5.7.0/26", ""),
        ("10.5.0.0/24", ""),
        ("10.5.7.0/24", ',"SubnetMin":"10.5.8.0"'),
        ("10.5.7.0/24", ',"SubnetMax":"10.5.6.0"'),
    ],
)
def test_own_lease_that_does_not_fit_is_discarded(subnet: str, extra: str) -> None:
    own = lease(subnet, OWN_IP)
    assert choose([own], previous=subnet, cfg=config(extra=extra)) == Discard(
        own,
        (
            f"Found lease ({subnet}) for current IP (10.97.0.1) "
            "but not compatible with current config, deleting",
        ),
    )


def test_own_reservation_that_does_not_fit_is_left_alone_and_taken() -> None:
    reservation = lease("10.5.0.0/20", OWN_IP, ttl=None)
    decision = choose([reservation], previous="10.5.3.0/24")
    assert isinstance(decision, Create)
    assert not decision.subnet.overlaps(reservation.subnet)
    assert [line.partition(" (")[0] for line in (*decision.warnings, *decision.notes)] == [
        "Found lease",
        "Found previously leased subnet",
        "Picking subnet in range 10.5.1.0 ... 10.5.255.0",
    ]
    assert "it is a reservation" in decision.warnings[0]
    other = lease("10.6.7.0/24", OWN_IP)
    discard = choose([reservation, other])
    assert isinstance(discard, Discard)
    assert discard.lease is other


def created(index: int, subnet: str, ip: IPv4Address, ttl: int | None = 86400) -> Lease:
    return Lease(IPv4Network(subnet), LeaseAttrs(ip), ttl, 100, index)


@pytest.mark.parametrize("other", ["10.5.4.0/22", "10.5.7.128/25"])
def test_of_two_overlapping_leases_the_elder_is_kept(other: str) -> None:
    """As two hosts with different values of SubnetLen can create them at one instant."""
    own = created(8, "10.5.7.0/24", OWN_IP)
    elder = created(7, other, PEER_IP)
    assert choose([own, elder]) == Discard(
        own,
        (
            f"Found lease (10.5.7.0/24) for current IP (10.97.0.1) but lease {other} of 10.97.0.2"
            " has been there longer, deleting",
        ),
    )
    reused = choose([own, created(9, other, PEER_IP)])
    assert isinstance(reused, Reuse)
    # Two keys of one host take nothing from another.
    assert isinstance(choose([own, created(7, other, OWN_IP, None)]), Reuse)


def test_a_reservation_that_overlaps_an_elder_lease_is_left_alone_and_not_used() -> None:
    own = created(8, "10.5.7.0/24", OWN_IP, None)
    decision = choose([own, created(7, "10.5.4.0/22", PEER_IP)])
    assert isinstance(decision, Create)
    assert not decision.subnet.overlaps(IPv4Network("10.5.4.0/22"))
    assert decision.warnings[0].endswith(
        "leaving it alone: it is a reservation; delete one of the two"
    )


def test_free_previous_subnet_is_taken_again() -> None:
    assert choose([lease("10.5.124.0/24")], ("10.5.122.0/24",), "10.5.123.0/24") == Create(
        IPv4Network("10.5.123.0/24"),
        previous=True,
        notes=("Found previously leased subnet (10.5.123.0/24), reusing",),
    )


@pytest.mark.parametrize(
    ("leases", "unreadable", "why"),
    [
        (["10.5.123.0/24"], (), "lease 10.5.123.0/24 of 10.97.0.2"),
        (["10.5.112.0/20"], (), "lease 10.5.112.0/20 of 10.97.0.2"),
        (["10.5.123.128/26"], (), "lease 10.5.123.128/26 of 10.97.0.2"),
        ([], ("10.5.123.0/24",), "unreadable key in the store stands for 10.5.123.0/24"),
    ],
)
def test_previous_subnet_of_another_host_is_not_taken(
    leases: list[str], unreadable: tuple[str, ...], why: str
) -> None:
    decision = choose([lease(text) for text in leases], unreadable, "10.5.123.0/24")
    assert isinstance(decision, Create)
    assert not decision.previous
    assert decision.warnings[0].startswith("Found previously leased subnet (10.5.123.0/24), but ")
    assert why in decision.warnings[0]
    assert decision.notes[0] == "Picking subnet in range 10.5.1.0 ... 10.5.255.0"


@pytest.mark.parametrize("previous", ["10.6.123.0/24", "10.5.123.0/25", "10.5.0.0/24", "0.0.0.0/0"])
def test_previous_subnet_that_does_not_fit_is_ignored(previous: str) -> None:
    decision = choose([], previous=previous)
    assert isinstance(decision, Create)
    assert not decision.previous
    assert decision.warnings == (
        f"Found previously leased subnet ({previous}) "
        "that is not compatible with the Etcd network config, ignoring",
    )
    assert decision.notes == ("Picking subnet in range 10.5.1.0 ... 10.5.255.0",)


def test_the_choice_is_any_of_the_first_hundred() -> None:
    rng = random.Random(5)
    picked = {
        str(decision.subnet)
        for _ in range(3000)
        if isinstance(decision := decide([], [], OWN_IP, None, config(), rng=rng), Create)
    }
    assert picked == {f"10.5.{n}.0/24" for n in range(1, 101)}


@pytest.mark.parametrize(
    ("leases", "unreadable"),
    [
        (["10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24"], ()),
        (["10.5.0.0/20"], ()),
        (["10.5.1.0/24"], ("10.5.2.4/32", "10.5.3.0/26")),
        (["0.0.0.0/1"], ()),
    ],
)
def test_out_of_subnets(leases: list[str], unreadable: tuple[str, ...]) -> None:
    cfg = config(extra=',"SubnetMax":"10.5.3.0"')
    with pytest.raises(OutOfSubnets) as caught:
        choose([lease(text) for text in leases], unreadable, cfg=cfg)
    assert str(caught.value) == (
        "out of subnets: all 3 of length /24 from 10.5.1.0 to 10.5.3.0 are taken; "
        "delete leases no longer used, or widen Network, SubnetMin and SubnetMax"
    )


def lines_run(cfg: Config, taken: list[IPv4Network]) -> tuple[int, list[int]]:
    """How many lines of the allocator ran, and what it found."""
    lines = 0

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != allocate.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = first_free(taken, cfg)
    finally:
        sys.settrace(before)
    return lines, found


def test_a_huge_network_is_not_walked() -> None:
    cfg = config("10.0.0.0/8", ',"SubnetLen":30')
    taken = [
        IPv4Network(text)
        for text in ("10.0.0.0/9", "10.0.0.0/10", "10.128.0.0/10", "10.192.0.0/11", "10.224.0.0/12")
    ]
    lines, found = lines_run(cfg, taken)
    assert found[0] == int(IPv4Address("10.240.0.0"))
    assert len(found) == 100
    assert lines < 1500
    assert lines_run(cfg, [IPv4Network("10.0.0.0/8")]) == (lines_run(cfg, [cfg.network])[0], [])


def test_time_grows_with_the_number_of_leases_only() -> None:
    cfg = config("10.0.0.0/8")
    some, many = (
        lines_run(cfg, [IPv4Network((0x0A000000 + n * 256, 24)) for n in range(count)])[0]
        for count in (1000, 4000)
    )
    assert many < 5 * some


def looks(hosts: int, cfg: Config) -> int:
    """How many lists of all leases hosts need that start together: all look before one writes."""
    rng = random.Random(1)
    taken: list[Lease] = []
    looked, waiting = 0, hosts
    while waiting:
        looked += waiting
        chosen = {
            decision.subnet
            for _ in range(waiting)
            if isinstance(
                decision := decide(
                    taken, [], OWN_IP, None, cfg, rng=rng, contended=waiting < hosts
                ),
                Create,
            )
        }
        taken += [lease(subnet) for subnet in chosen]
        waiting -= len(chosen)
    return looked


@pytest.mark.parametrize("network", ["10.0.0.0/14", "10.0.0.0/15"])
def test_many_hosts_that_start_together_soon_have_subnets(network: str) -> None:
    """Picking among the same hundred again and again, each would look more than three times.

    In the second network there are 511 subnets for them.
    """
    assert looks(500, config(network, ',"SubnetLen":24')) < 2.5 * 500


# Small enough to walk: up to 2^8 subnets, with a range and leases of every length about it.
@st.composite
def situations(draw: st.DrawFn) -> tuple[Config, list[IPv4Network]]:
    prefix = draw(st.integers(16, 26))
    length = draw(st.integers(prefix + 1, min(30, prefix + 8)))
    size = 2 ** (32 - length)
    start = 0x0A050000
    last = 2 ** (length - prefix) - 1
    low = draw(st.integers(0, last))
    high = draw(st.integers(low, last))
    cfg = Config(
        network=IPv4Network((start, prefix)),
        subnet_len=length,
        subnet_min=IPv4Address(start + low * size),
        subnet_max=IPv4Address(start + high * size),
        backend_type="udp",
        backend={},
    )
    addresses = st.integers(start - 2 * size, start + 2 ** (32 - prefix) + 2 * size)
    networks = st.builds(
        lambda address, bits: IPv4Network((address, bits), strict=False),
        addresses,
        st.integers(max(prefix - 1, length - 3), min(32, length + 2)),
    )
    return cfg, draw(st.lists(networks, max_size=40))


def walk(cfg: Config, taken: list[IPv4Network]) -> Iterator[IPv4Network]:
    spans = [(int(net.network_address), int(net.broadcast_address)) for net in taken]
    for first in range(int(cfg.subnet_min), int(cfg.subnet_max) + 1, cfg.subnet_size):
        last = first + cfg.subnet_size - 1
        if all(end < first or last < start for start, end in spans):
            yield IPv4Network((first, cfg.subnet_len))


@given(situations())
def test_first_free_is_the_walk(situation: tuple[Config, list[IPv4Network]]) -> None:
    cfg, taken = situation
    assert first_free(taken, cfg) == [int(net.network_address) for net in walk(cfg, taken)][:100]


@settings(deadline=None)
@given(situations(), st.data())
def test_any_decision_is_sound(
    situation: tuple[Config, list[IPv4Network]], data: st.DataObject
) -> None:
    cfg, taken = situation
    ips = st.sampled_from([PEER_IP, PEER_IP, PEER_IP, OWN_IP])
    ttls = st.sampled_from([86400, None])
    split = data.draw(st.integers(0, len(taken)))
    leases = [lease(net, data.draw(ips), data.draw(ttls)) for net in taken[:split]]
    unreadable = taken[split:]
    subnets = st.builds(
        lambda index, bits: IPv4Network(
            (int(cfg.network.network_address) + index * cfg.subnet_size, bits), strict=False
        ),
        st.integers(0, cfg.network.num_addresses // cfg.subnet_size),
        st.sampled_from([cfg.subnet_len, cfg.subnet_len, cfg.subnet_len - 1]),
    )
    previous = data.draw(st.none() | subnets)
    free = list(walk(cfg, taken))
    own = [item for item in leases if item.attrs.public_ip == OWN_IP]
    fitting = [
        item
        for item in own
        if item.subnet.prefixlen == cfg.subnet_len
        and cfg.subnet_min <= item.subnet.network_address <= cfg.subnet_max
        and not elder(item, leases)
    ]
    try:
        decision = decide(leases, unreadable, OWN_IP, previous, cfg, rng=random.Random(0))
    except OutOfSubnets:
        assert free == []
        assert fitting == []
        return
    assert all(note.isprintable() for note in decision.notes)
    match decision:
        case Reuse(chosen):
            assert chosen in fitting
        case Discard(chosen):
            assert fitting == []
            assert chosen in own
            assert not chosen.is_reservation
        case Create(subnet, was_previous):
            assert fitting == []
            assert all(item.is_reservation for item in own)
            assert was_previous == (subnet == previous if previous in free else False)
            assert subnet in (free if was_previous else free[:100])
            assert not any(subnet.overlaps(net) for net in taken)
            if previous in free:
                assert subnet == previous
