"""The merge of snapshots and events: a table for each sentence of the module's text."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

from flanneld.retry import LONGEST_PAUSE
from flanneld.subnet import watch
from flanneld.subnet.lease import Lease, LeaseAttrs, check_peer, overlap, parse_lease
from flanneld.subnet.store import Change, Node, Snapshot, StoreEvent
from flanneld.subnet.watch import (
    HOLD_RESERVATION,
    LINGER,
    UNSEEN,
    EventType,
    LeaseEvent,
    LeaseTracker,
)

if TYPE_CHECKING:
    from _typeshed import TraceFunction

TTL = 1000
OWN = Lease(IPv4Network("10.5.99.0/24"), LeaseAttrs(IPv4Address("10.97.0.99")), TTL, 1)


def reject(lease: Lease) -> str | None:
    return check_peer(lease, IPv4Network("10.5.0.0/16"), OWN.subnet, OWN.attrs.public_ip)


def lease(
    number: int,
    index: int,
    *,
    host: int = 0,
    mac: str = "",
    ttl: int | None = TTL,
    length: int = 24,
) -> Lease:
    """The lease of 10.5.NUMBER.0/24 by 10.97.0.HOST; the two numbers are the same unless said."""
    attrs = LeaseAttrs(IPv4Address(f"10.97.0.{host or number}"), "vxlan", f'"{mac}"')
    return Lease(IPv4Network(f"10.5.{number}.0/{length}"), attrs, ttl, index)


def node(item: Lease) -> Node:
    return Node(item.key, item.attrs.encode(), item.ttl, item.modified_index)


def garbage(item: Lease, index: int = 0) -> Node:
    return replace(node(item), value="garbage", index=index or item.modified_index)


def snap(index: int, *leases: Lease, others: Iterable[Node] = (), own: bool = True) -> Snapshot:
    nodes = [node(item) for item in ((OWN, *leases) if own else leases)]
    return Snapshot((*nodes, *others), index)


def put(item: Lease) -> StoreEvent:
    return StoreEvent(Change.SET, item.key, node(item), item.modified_index)


def gone(item: Lease, index: int) -> StoreEvent:
    return StoreEvent(Change.GONE, item.key, None, index)


def all_gone(index: int) -> StoreEvent:
    return StoreEvent(Change.ALL_GONE, "", None, index)


def added(item: Lease, previous: Lease | None = None) -> LeaseEvent:
    return LeaseEvent(EventType.ADDED, item, previous)


def removed(item: Lease) -> LeaseEvent:
    return LeaseEvent(EventType.REMOVED, item)


def tracking(*leases: Lease, index: int = 100) -> LeaseTracker:
    """Return a tracker that has seen a snapshot with these leases at time 0."""
    tracker = LeaseTracker(OWN.key, reject)
    assert tracker.snapshot(snap(index, *leases), 0) == [added(item) for item in leases]
    assert tracker.take_notes() == []
    return tracker


def held_after_loss(*leases: Lease) -> LeaseTracker:
    """Return a tracker whose store has lost these leases: it is empty, at index 2."""
    tracker = tracking(*leases)
    assert tracker.snapshot(snap(2), 1) == []
    return tracker


ONE, TWO = lease(1, 50), lease(2, 60)


def test_a_snapshot_holds_everything_up_to_its_index() -> None:
    tracker = tracking(ONE, index=100)
    assert tracker.index == 100
    assert tracker.event(gone(ONE, 100), 1) == []
    assert tracker.event(put(replace(ONE, modified_index=99)), 1) == []
    assert tracker.event(gone(ONE, 101), 1) == []
    assert tracker.index == 101
    assert tracker.expire(1 + LINGER) == [removed(ONE)]
    assert tracker.leases() == []
    assert len(tracker) == 0


def test_a_lease_that_is_gone_lingers() -> None:
    tracker = tracking(ONE, TWO)
    assert tracker.due(0) is None
    assert tracker.event(gone(ONE, 101), 5) == []
    assert tracker.due(5) == LINGER
    assert tracker.due(5 + 2 * LINGER) == 0
    # That it is missing in snapshots, too, does not prolong it.
    assert tracker.snapshot(snap(102, TWO), 5 + LINGER / 2) == []
    assert tracker.take_notes() == []
    assert tracker.leases() == [ONE, TWO]
    assert tracker.expire(5 + LINGER) == [removed(ONE)]
    assert tracker.expire(6 + LINGER) == []
    assert tracker.due(6 + LINGER) is None


def test_a_lease_taken_back_in_time_was_never_gone() -> None:
    tracker = tracking(ONE)
    again = replace(ONE, modified_index=102)
    tracker.event(gone(ONE, 101), 1)
    assert tracker.event(put(again), 1.1) == []
    assert tracker.expire(1 + 2 * LINGER) == []
    assert tracker.leases() == [again]
    tracker.snapshot(snap(103), 2)
    assert tracker.snapshot(snap(104, replace(ONE, modified_index=104)), 2.1) == []
    assert tracker.due(3) is None


def test_a_lease_that_expired_lingers_too() -> None:
    """Its host may be there, and take it back as soon as it hears of it."""
    tracker = tracking(lease(1, 50, ttl=10))
    tracker.event(gone(ONE, 101), 9.75)
    assert tracker.due(9.75) == LINGER


def test_what_is_gone_twice_lingers_once() -> None:
    tracker = tracking(ONE)
    tracker.event(gone(ONE, 101), 1)
    tracker.event(gone(ONE, 102), 1.5)
    assert tracker.due(1.5) == LINGER - 0.5


def test_attributes_published_anew_after_a_wipe_are_believed() -> None:
    """At a lower index than the former ones, but with an end that no backup could have."""
    tracker = tracking(lease(1, 100, ttl=1000))
    moved = lease(1, 5, host=9, ttl=1000)
    assert tracker.snapshot(snap(5, moved), 500) == [added(moved, previous=lease(1, 100, ttl=1000))]


def test_a_lingering_lease_gives_way_to_the_next_owner() -> None:
    tracker = tracking(ONE)
    moved = lease(7, 102, host=1)
    tracker.event(gone(ONE, 101), 1)
    assert tracker.event(put(moved), 1.1) == [removed(ONE), added(moved)]


def test_an_event_is_applied_once() -> None:
    tracker = tracking()
    assert tracker.event(put(lease(3, 101)), 1) == [added(lease(3, 101))]
    assert tracker.event(put(lease(3, 101)), 1) == []
    assert tracker.event(gone(ONE, 100), 1) == []


def test_advance_never_goes_back() -> None:
    tracker = tracking(index=100)
    tracker.advance(200)
    tracker.advance(150)
    assert tracker.index == 200
    assert tracker.event(put(lease(3, 200)), 1) == []


CHANGED = [
    pytest.param(lease(1, 101, mac="new"), id="MAC"),
    pytest.param(lease(1, 101, host=7), id="public IP"),
    pytest.param(replace(lease(1, 101), attrs=replace(ONE.attrs, backend_type="udp")), id="type"),
]


@pytest.mark.parametrize("changed", CHANGED)
def test_changed_attributes_are_seen_live(changed: Lease) -> None:
    assert tracking(ONE).event(put(changed), 1) == [added(changed, ONE)]


@pytest.mark.parametrize("changed", CHANGED)
def test_changed_attributes_are_seen_on_resync(changed: Lease) -> None:
    tracker = tracking(ONE, TWO)
    assert tracker.snapshot(snap(101, changed, TWO), 1) == [added(changed, ONE)]
    assert tracker.leases() == [changed, TWO]


def test_a_snapshot_tells_what_came_and_went() -> None:
    tracker = tracking(ONE, TWO)
    three = lease(3, 105)
    assert tracker.snapshot(snap(105, three, TWO), 1) == [added(three)]
    assert tracker.snapshot(snap(105, three, TWO), 1 + UNSEEN) == [removed(ONE)]
    # Of a host that moved the old one goes first: both may have the same MAC.
    moved = lease(7, 106, host=3)
    assert tracker.snapshot(snap(106, moved, TWO), 9) == [removed(three), added(moved)]


def test_a_renewal_yields_nothing() -> None:
    tracker = tracking(ONE)
    assert tracker.event(put(replace(ONE, modified_index=101, ttl=500)), 1) == []
    assert tracker.snapshot(snap(110, replace(ONE, modified_index=105)), 2) == []


def test_our_own_key_is_nobodys_business() -> None:
    tracker = tracking()
    assert tracker.event(put(replace(OWN, modified_index=101)), 1) == []
    assert tracker.event(gone(OWN, 102), 1) == []
    assert tracker.take_notes() == []


REJECTED = [
    pytest.param(lease(1, 101, host=99), id="our own public IP"),
    pytest.param(replace(lease(1, 101), attrs=LeaseAttrs(IPv4Address("127.0.0.1"))), id="loopback"),
]


@pytest.mark.parametrize("bad", REJECTED)
def test_a_lease_that_must_not_be_used_counts_as_gone(bad: Lease) -> None:
    tracker = tracking(ONE)
    assert tracker.event(put(bad), 1) == []
    assert tracker.expire(1 + LINGER) == [removed(ONE)]
    tracker = tracking(ONE)
    assert tracker.snapshot(snap(101, bad), 1) == []
    assert tracker.expire(1 + LINGER) == [removed(ONE)]
    assert tracking().event(put(bad), 1) == []


def test_an_unreadable_key_counts_as_gone_until_it_is_readable() -> None:
    tracker = tracking(ONE)
    bad = garbage(ONE, 101)
    assert tracker.event(StoreEvent(Change.SET, bad.name, bad, 101), 1) == []
    assert tracker.expire(1 + LINGER) == [removed(ONE)]
    again = lease(1, 102)
    assert tracker.event(put(again), 5) == [added(again)]
    assert tracker.snapshot(snap(103, others=[garbage(ONE, 103)]), 5) == []
    assert tracker.snapshot(snap(103, others=[garbage(ONE, 103)]), 5 + LINGER) == [removed(again)]


def test_a_bad_key_is_noted_in_one_line_whatever_its_name_is() -> None:
    tracker = tracking()
    bad = replace(garbage(ONE, 101), name="x\nE1122 forged" + "y" * 9999)
    tracker.event(StoreEvent(Change.SET, bad.name, bad, 101), 1)
    (note,) = tracker.take_notes()
    assert note.startswith("Ignoring bad subnet node x\\x0aE1122 forgedyyy")
    assert len(note) < 400


def test_a_bad_key_is_noted_once() -> None:
    tracker = tracking()
    bad = garbage(ONE, 101)
    note = "Ignoring bad subnet node 10.5.1.0-24: not JSON: Expecting value at line 1 column 1"
    tracker.event(StoreEvent(Change.SET, bad.name, bad, 101), 1)
    assert tracker.take_notes() == [note]
    assert tracker.take_notes() == []
    tracker.snapshot(snap(102, others=[bad]), 1)
    assert tracker.take_notes() == []
    # Another reason, and the same one after it was gone, are news.
    tracker.event(put(lease(1, 103, host=99)), 1)
    assert "this host's own public IP" in tracker.take_notes()[0]
    tracker.snapshot(snap(105, others=[bad]), 1)
    assert tracker.take_notes() == [note]
    tracker.event(gone(ONE, 106), 1)
    tracker.snapshot(snap(107, others=[bad]), 1)
    assert tracker.take_notes() == [note]
    tracker.snapshot(snap(108), 1)
    tracker.snapshot(snap(109, others=[bad]), 1)
    assert tracker.take_notes() == [note]


def test_a_directory_event_without_a_key_changes_nothing() -> None:
    tracker = tracking(ONE)
    assert tracker.event(StoreEvent(Change.SET, "", None, 101), 1) == []
    assert tracker.leases() == [ONE]


# A store that went back in time.


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(snap(2), id="emptied, our key is there again"),
        pytest.param(snap(100, own=False), id="emptied, its index is where it was"),
        pytest.param(snap(150, own=False), id="emptied, its index came past ours"),
        pytest.param(snap(150, lease(2, 7)), id="the index of a key went back"),
        pytest.param(snap(55, ONE), id="restored"),
    ],
)
def test_what_the_store_lost_is_held(lost: Snapshot) -> None:
    tracker = tracking(ONE, TWO)
    assert tracker.snapshot(lost, 1) == []
    assert {item.attrs for item in tracker.leases()} == {ONE.attrs, TWO.attrs}
    [note] = tracker.take_notes()
    assert note.startswith("The store has lost ")
    # The next snapshot of the same store does not drop it either, and is not worth a note.
    tracker.snapshot(lost, 2)
    assert len(tracker) == 2
    assert tracker.take_notes() == []
    assert tracker.index == lost.index


def test_a_store_that_went_on_is_believed_in_what_it_lacks() -> None:
    tracker = tracking(ONE, TWO)
    assert tracker.snapshot(snap(150, TWO), 1) == []
    assert tracker.expire(1 + UNSEEN) == [removed(ONE)]


def test_a_backup_that_lacks_the_last_writes_only_costs_no_way_to_a_host() -> None:
    """etcd's own writes at its start hide it. The host looks again when its pause is over."""
    tracker = tracking(ONE, TWO, index=60)
    assert tracker.snapshot(snap(62, ONE), 1) == []
    assert tracker.expire(1 + LONGEST_PAUSE + 0.5) == []
    again = replace(TWO, modified_index=63)
    assert tracker.event(put(again), 1 + LONGEST_PAUSE + 0.5) == []
    assert tracker.expire(1 + 2 * UNSEEN) == []
    assert tracker.leases() == [ONE, again]


def test_a_store_that_went_back_is_believed_in_what_it_adds() -> None:
    tracker = tracking(ONE)
    three = lease(3, 4)
    assert tracker.snapshot(snap(4, three), 1) == [added(three)]
    assert tracker.leases() == [ONE, three]


def test_after_a_loss_new_leases_can_go_as_ever() -> None:
    tracker = held_after_loss(ONE)
    three = lease(3, 4)
    tracker.event(put(three), 2)
    assert tracker.snapshot(snap(8), 3) == []
    assert tracker.expire(3 + UNSEEN) == [removed(three)]
    assert tracker.leases() == [ONE]


def test_the_directory_was_deleted() -> None:
    tracker = tracking(ONE, TWO)
    assert tracker.event(all_gone(101), 1) == []
    assert tracker.leases() == [ONE, TWO]
    assert "lost 2 leases" in tracker.take_notes()[0]
    assert tracker.snapshot(snap(102, replace(ONE, modified_index=102)), 2) == []
    assert tracker.expire(TTL) == [removed(TWO)]


def test_a_held_lease_is_published_again() -> None:
    tracker = held_after_loss(ONE)
    again = replace(ONE, modified_index=3)
    assert tracker.event(put(again), 2) == []
    assert tracker.expire(TTL + 1) == []
    assert tracker.leases() == [again]
    # It is believed again: its absence counts.
    tracker.snapshot(snap(5), 3)
    assert tracker.expire(3 + UNSEEN) == [removed(again)]


def test_a_held_lease_is_published_with_other_attributes() -> None:
    tracker = held_after_loss(ONE)
    changed = lease(1, 3, mac="new")
    assert tracker.event(put(changed), 2) == [added(changed, ONE)]


def test_a_held_lease_ends_with_an_event_for_its_key() -> None:
    bad = garbage(ONE, 3)
    for event in (gone(ONE, 3), StoreEvent(Change.SET, bad.name, bad, 3)):
        tracker = held_after_loss(ONE)
        assert tracker.event(event, 2) == []
        assert tracker.expire(2 + LINGER) == [removed(ONE)]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lease(7, 3, host=1), id="its host has another subnet now"),
        pytest.param(lease(0, 3, host=7, length=22), id="a wider range"),
    ],
)
def test_a_held_lease_is_replaced(other: Lease) -> None:
    beside = lease(200, 51)
    tracker = held_after_loss(ONE, beside)
    assert tracker.event(put(other), 2) == [removed(ONE), added(other)]
    assert tracker.leases() == [beside, other]
    assert tracking(ONE).snapshot(snap(3, other), 2) == [removed(ONE), added(other)]


def test_a_held_lease_ends_with_its_time() -> None:
    tracker = held_after_loss(lease(1, 50, ttl=500), lease(2, 60, ttl=None))
    assert tracker.expire(499.9) == []
    assert tracker.expire(500) == [removed(lease(1, 50, ttl=500))]
    assert tracker.expire(HOLD_RESERVATION - 1) == []
    assert tracker.expire(HOLD_RESERVATION) == [removed(lease(2, 60, ttl=None))]


def test_the_end_counts_from_the_last_renewal_seen() -> None:
    tracker = tracking(ONE)
    renewed = replace(ONE, modified_index=101)
    tracker.event(put(renewed), 600)
    assert tracker.snapshot(snap(2), 700) == []
    assert tracker.snapshot(snap(3), 1599) == []
    assert tracker.snapshot(snap(4), 1600) == [removed(renewed)]


def test_what_the_store_still_has_never_ends_by_the_clock() -> None:
    assert tracking(ONE).expire(10 * TTL) == []


# A store restored from a backup in which the key had other attributes.

OLDER = lease(1, 20, mac="old")
RESTORED = snap(30, OLDER)


def test_older_attributes_do_not_replace_those_last_known() -> None:
    tracker = tracking(ONE)
    assert tracker.snapshot(RESTORED, 1) == []
    assert tracker.snapshot(replace(RESTORED, index=35), 2) == []
    assert tracker.leases() == [ONE]


def test_older_attributes_count_when_the_time_is_over() -> None:
    tracker = tracking(ONE)
    tracker.snapshot(RESTORED, 1)
    assert tracker.expire(TTL) == [added(OLDER, ONE)]
    assert tracker.leases() == [OLDER]


@pytest.mark.parametrize("resync", [False, True])
def test_a_write_after_the_restore_replaces_them(resync: bool) -> None:
    tracker = tracking(ONE)
    tracker.snapshot(RESTORED, 1)
    fresh = lease(1, 31, mac="fresh")
    events = tracker.snapshot(snap(31, fresh), 2) if resync else tracker.event(put(fresh), 2)
    assert events == [added(fresh, ONE)]


def test_a_write_that_no_backup_can_hold_is_believed_at_once() -> None:
    # Index 80 of 100: written after the restore, since the key's last write before it was 50.
    tracker = tracking(ONE)
    fresh = lease(1, 80, mac="fresh")
    assert tracker.snapshot(snap(81, fresh), 1) == [added(fresh, ONE)]


def test_what_replaces_a_held_lease_does_so_in_any_order() -> None:
    older, other = lease(1, 20, host=3), lease(7, 31, host=1)
    for leases in ([older, other], [other, older]):
        tracker = tracking(ONE)
        tracker.snapshot(snap(31, *leases), 1)
        assert sorted(tracker.leases(), key=lambda item: item.key) == [older, other]


def test_a_replaced_lease_gives_way_to_what_the_store_has() -> None:
    # In the backup host 3 has the subnet of host 1. Then host 1 takes another.
    tracker = tracking(ONE)
    older, seven = lease(1, 20, host=3), lease(7, 31, host=1)
    tracker.snapshot(snap(30, older), 1)
    assert tracker.event(put(seven), 2) == [added(older, ONE), added(seven)]
    assert tracker.leases() == [older, seven]


def test_an_unreadable_key_is_not_held() -> None:
    tracker = tracking(ONE)
    assert tracker.snapshot(snap(30, others=[garbage(ONE, 20)]), 1) == []
    assert tracker.expire(1 + LINGER) == [removed(ONE)]


def held_in_turn() -> LeaseTracker:
    """Return a tracker that holds ONE, in whose place the store has a lease of host 2, and TWO."""
    two = lease(2, 10)
    tracker = tracking(ONE, two)
    assert tracker.snapshot(snap(30, OF_HOST_2, two), 1) == []
    assert tracker.snapshot(snap(25, OF_HOST_2), 1) == []
    return tracker


OF_HOST_2 = lease(1, 20, host=2)


def test_the_end_of_one_ends_another() -> None:
    tracker = held_in_turn()
    assert tracker.expire(TTL + 1) == [removed(lease(2, 10)), added(OF_HOST_2, ONE)]
    assert tracker.leases() == [OF_HOST_2]


def test_one_lease_replaces_two_in_turn() -> None:
    tracker = held_in_turn()
    moved = lease(7, 31, host=1)
    assert tracker.event(put(moved), 2) == [
        removed(lease(2, 10)),
        added(OF_HOST_2, ONE),
        added(moved),
    ]
    assert tracker.leases() == [OF_HOST_2, moved]


# What a snapshot does not change.


def test_an_index_does_not_tell_that_a_key_is_as_it_was() -> None:
    """A restored store gives it a second time, to another write."""
    tracker = tracking(ONE)
    other = replace(ONE, attrs=lease(1, 50, host=7).attrs)
    assert tracker.snapshot(snap(101, other), 1) == [added(other, ONE)]


def test_what_the_store_has_in_place_of_a_held_one_is_not_taken_for_it() -> None:
    """Both were written at one index; the held one is used until its end, and then the other."""
    tracker = tracking(ONE)
    older = replace(ONE, attrs=lease(1, 50, host=7).attrs)
    for index in (60, 61, 62):
        assert tracker.snapshot(snap(index, older), 1) == []
    assert tracker.leases() == [ONE]
    assert tracker.expire(TTL) == [added(older, ONE)]


def test_an_unchanged_lease_ends_what_is_held_of_its_host() -> None:
    moved = lease(2, 60, host=1)
    tracker = tracking(ONE, moved)
    assert tracker.snapshot(snap(70, moved), 1) == [removed(ONE)]


def test_the_end_of_an_unchanged_lease_stays_where_it_was() -> None:
    tracker = tracking(ONE, TWO)
    # With TWO held, all others are looked at more closely.
    assert tracker.snapshot(snap(70, replace(ONE, ttl=TTL - 400)), 400) == []
    assert tracker.snapshot(snap(71, replace(ONE, ttl=TTL - 500)), 500) == []
    assert tracker.snapshot(snap(2), 501) == []
    assert sorted(map(str, tracker.expire(TTL))) == sorted(map(str, [removed(ONE), removed(TWO)]))


def test_an_unchanged_lease_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = tracking(ONE, TWO)
    read: list[str] = []

    def counted(name: str, *rest: Any) -> Lease:
        read.append(name)
        return parse_lease(name, *rest)

    monkeypatch.setattr(watch, "parse_lease", counted)
    renewed = replace(TWO, modified_index=101)
    assert tracker.snapshot(snap(102, ONE, renewed), 1) == []
    assert read == [TWO.key]
    assert tracker.leases() == [ONE, renewed]


# The work.


def comparisons(monkeypatch: pytest.MonkeyPatch, *leases: Lease) -> tuple[int, int]:
    """Lose all leases at one stroke, and have them back one by one.

    Return how many ranges were compared, and how many lines of the module were run on the way.
    """
    count = lines = 0

    def counted(one: IPv4Network, other: IPv4Network) -> bool:
        nonlocal count
        count += 1
        return overlap(one, other)

    def trace(frame: FrameType, event: str, _argument: object) -> "TraceFunction | None":
        nonlocal lines
        if frame.f_code.co_filename != watch.__file__:
            return None
        lines += event == "line"
        return trace

    tracker = tracking(*leases, index=10**6)
    assert tracker.event(all_gone(10**6 + 1), 1) == []
    before = sys.gettrace()
    with monkeypatch.context() as patch:
        patch.setattr(watch, "overlap", counted)
        sys.settrace(trace)
        try:
            for n, item in enumerate(leases):
                back = replace(item, modified_index=10**6 + 2 + n)
                assert tracker.event(put(back), 2) == []
                assert tracker.expire(2) == []
        finally:
            sys.settrace(before)
    assert len(tracker) == len(leases)
    assert tracker.due(2) is None
    return count, lines


def many(count: int) -> list[Lease]:
    return [
        Lease(
            IPv4Network((int(IPv4Address("10.5.0.0")) + 16 * n, 28)),
            LeaseAttrs(IPv4Address("10.98.0.0") + n),
            TTL,
            n + 1,
        )
        for n in range(count)
    ]


def test_many_that_come_back_cost_no_more_than_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, more = comparisons(monkeypatch, *many(300)), comparisons(monkeypatch, *many(600))
    assert few[0] == more[0] == 0
    assert few[1] > 300
    assert more[1] <= 2.1 * few[1]


def test_ranges_of_another_length_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = lease(128, 5000, length=20)
    assert comparisons(monkeypatch, *many(20), wide)[0] > 0
    tracker = held_after_loss(lease(1, 50), lease(2, 60), lease(9, 70))
    new = lease(0, 3, host=40, length=22)
    *gone, last = tracker.event(put(new), 2)
    assert sorted(gone, key=str) == [removed(lease(1, 50)), removed(lease(2, 60))]
    assert last == added(new)
    assert tracker.leases() == [lease(9, 70), new]


def test_a_host_that_moved_ends_all_its_held_leases() -> None:
    held = [lease(n, 50 + n, host=7) for n in (1, 2, 3)]
    tracker = held_after_loss(*held, lease(9, 70))
    new = lease(20, 3, host=7)
    events = tracker.event(put(new), 2)
    assert sorted(e.lease.key for e in events[:-1]) == sorted(item.key for item in held)
    assert events[-1] == added(new)
    assert tracker.leases() == [lease(9, 70), new]
    # The index of held leases is right again: the next one of that host replaces nothing.
    assert tracker.event(put(replace(new, modified_index=4)), 3) == []
