"""Which fault a lost packet is counted to."""

from soak.record import UNDER_WAY, Event, Record

ONE, TWO, THREE = "h1", "h2", "h3"


def record() -> Record:
    """Nobody's packets may be lost in the first fault, those from h1 to h2 in the second."""
    quiet = Event(1, "nothing", ONE, begun=10.0, undone=10.0, until=20.0)
    killed = Event(
        2, "a tunnel killed", ONE, begun=20.0, undone=21.0, pairs=[[ONE, TWO]], until=23.0
    )
    return Record(1, 1.0, "udp", "", "", events=[quiet, killed])


def belongs(pair: tuple[str, str], at: float) -> tuple[int, bool]:
    event = record().event_of(pair, at)
    return event.number, event.allows(pair, at)


def test_a_packet_belongs_to_the_latest_fault() -> None:
    assert belongs((ONE, TWO), 5.0) == (1, False)
    assert belongs((ONE, TWO), 15.0) == (1, False)
    assert belongs((ONE, TWO), 22.0) == (2, True)
    assert belongs((ONE, TWO), 23.1) == (2, False)


def test_a_packet_that_was_under_way_belongs_to_the_fault_it_met() -> None:
    assert belongs((ONE, TWO), 20.0 - UNDER_WAY / 2) == (2, True)
    assert belongs((ONE, TWO), 20.0 - 2 * UNDER_WAY) == (1, False)
    # That fault is none of theirs.
    assert belongs((ONE, THREE), 20.0 - UNDER_WAY / 2) == (1, False)
