"""When free memory is given back, and that a C library without the settings is no error."""

import ctypes
import gc

import pytest

from flanneld import memory
from flanneld.memory import CALM, Tidying


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list with one item for each time that memory was given back."""
    times: list[None] = []
    monkeypatch.setattr(memory, "give_back", lambda: times.append(None))
    return times


def test_it_is_given_back_once_some_time_after_something_large(given: list[None]) -> None:
    forgotten: list[int] = []
    # Before it is given back, or it could not be.
    tidying = Tidying(lambda: forgotten.append(len(given)))
    tidying.plan(100.0)
    tidying.work(100.0 + CALM - 0.1)
    assert not given
    tidying.work(100.0 + CALM)
    tidying.work(100.0 + 2 * CALM)
    assert len(given) == 1
    assert forgotten == [0]


def test_more_of_it_does_not_put_it_off(given: list[None]) -> None:
    """Somebody writes for hours: memory is given back all the same, but not for each list."""
    tidying = Tidying(lambda: None)
    for tenth in range(100):
        tidying.plan(tenth / 10)
        tidying.work(tenth / 10)
    assert len(given) == 1


def test_nothing_is_given_back_without_a_reason(given: list[None]) -> None:
    Tidying(lambda: given.append(None)).work(1e9)
    assert not given


def test_a_c_library_without_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As musl."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    memory.keep_little()
    memory.give_back()


def test_each_setting_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """mallopt returns 0 for one it does not know or that it refuses."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    answers: list[int] = []

    class Library:
        def mallopt(self, number: int, value: int) -> int:
            answers.append(library.mallopt(number, value))
            return answers[-1]

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    memory.keep_little()
    assert answers == [1, 1, 1]


def test_garbage_is_looked_for_less_often_but_it_is() -> None:
    before = gc.get_threshold()
    try:
        memory.look_seldom_for_garbage()
        often, *rest = gc.get_threshold()
        assert before[0] < often < 20 * before[0]
        assert tuple(rest) == before[1:]
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
