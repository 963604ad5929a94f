"""What the reconciler does with entries of a former run that nobody wants; the kernel is a fake."""

import logging
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network

import pytest

from flanneld.kernel import reconcile, spared
from flanneld.kernel.netlink import EntryEvent, KernelEvent, Refusal
from flanneld.kernel.reconcile import CHECK_FAILED, Reconciler
from flanneld.kernel.spared import SPARE
from flanneld.kernel.state import PROTOCOL, Entry, Found, Route, Slot, Territory

TERRITORY = Territory((IPv4Network("10.5.0.0/16"),))


def route(number: int, via: int = 0) -> Route:
    return Route(IPv4Network(f"10.5.{number}.0/24"), IPv4Address(f"10.97.0.{via or number}"), 4)


ONE, TWO, THREE = route(1), route(2), route(3)


class Kernel:
    """Our routes in the kernel, by slot; stands in for both sockets."""

    port = 1

    def __init__(self, *routes: Route) -> None:
        self.routes_there: dict[Slot, Route] = {route.slot: route for route in routes}
        self.events: list[KernelEvent] = []
        self.broken = False

    def ignore(self, _port: int) -> None:
        pass

    def close(self) -> None:
        pass

    def read(self) -> list[KernelEvent]:
        events, self.events = self.events, []
        return events

    def apply(
        self,
        write: Sequence[Entry],
        delete: Sequence[Found],
        _may_replace: Callable[[Entry], bool] = lambda _: True,
        **_options: bool,
    ) -> tuple[dict[Entry, Refusal], dict[Found, Refusal]]:
        for entry in write:
            assert isinstance(entry, Route)
            self.routes_there[entry.slot] = entry
        for item in delete:
            del self.routes_there[item.entry.slot]
        return {}, {}

    def routes(self, _protocol: int) -> list[Found]:
        if self.broken:
            raise OSError(1, "not now")
        return [Found(route, PROTOCOL) for route in self.routes_there.values()]

    def there(self) -> set[Route]:
        return set(self.routes_there.values())


class Clock:
    time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(reconcile, "now", made)
    monkeypatch.setattr(spared, "now", made)
    return made


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    # logs.setup() of another test may have cut it off.
    monkeypatch.setattr(logging.getLogger("flanneld"), "propagate", True)
    with caplog.at_level(logging.INFO, "flanneld"):
        yield


@pytest.fixture
def started(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], Reconciler]:
    """A reconciler on this kernel, that wants ONE at first and spares all but THREE."""
    assert clock.time

    def start(kernel: Kernel) -> Reconciler:
        monkeypatch.setattr(reconcile, "EntrySocket", lambda: kernel)
        monkeypatch.setattr(reconcile, "Monitor", lambda **_: kernel)
        reconciler = Reconciler()
        reconciler.set_all([ONE], TERRITORY, lambda found: found.entry != THREE)
        return reconciler

    return start


Started = Callable[[Kernel], Reconciler]


def pass_time(reconciler: Reconciler, clock: Clock, seconds: float) -> None:
    """Let the time pass, with the work that is due in it."""
    end = clock.time + seconds
    while (due := reconciler.due()) is not None and clock.time + due <= end:
        clock.time += due
        reconciler.work()
    clock.time = end


def test_it_is_kept_for_a_while_and_swept_then(
    started: Started, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel(TWO, THREE)
    reconciler = started(kernel)
    assert reconciler.in_step
    assert kernel.there() == {ONE, TWO}
    assert "Keeping 1 kernel entries of a former run for 15 s" in caplog.text
    pass_time(reconciler, clock, SPARE - 1)
    assert kernel.there() == {ONE, TWO}
    pass_time(reconciler, clock, 1)
    assert kernel.there() == {ONE}
    assert "Removed stale route to 10.5.2.0/24 via 10.97.0.2" in caplog.text


def test_who_comes_back_has_lost_nothing_and_may_go_again(started: Started, clock: Clock) -> None:
    kernel = Kernel(TWO)
    reconciler = started(kernel)
    reconciler.update([TWO], [])
    pass_time(reconciler, clock, 2 * SPARE)
    assert kernel.there() == {ONE, TWO}
    reconciler.update([], [TWO.slot])
    assert kernel.there() == {ONE}


def test_a_subnet_with_a_new_owner_is_his_at_once(started: Started, clock: Clock) -> None:
    moved = route(2, 9)
    kernel = Kernel(TWO)
    reconciler = started(kernel)
    reconciler.update([moved], [])
    assert kernel.there() == {ONE, moved}
    pass_time(reconciler, clock, 2 * SPARE)
    assert kernel.there() == {ONE, moved}


def test_another_comparison_meanwhile_spares_it_too(started: Started, clock: Clock) -> None:
    kernel = Kernel(TWO)
    reconciler = started(kernel)
    reconciler.set_all([ONE], TERRITORY)
    assert kernel.there() == {ONE, TWO}
    pass_time(reconciler, clock, SPARE)
    assert kernel.there() == {ONE}


def test_what_others_write_meanwhile_is_not_of_a_former_run(started: Started, clock: Clock) -> None:
    kernel = Kernel(TWO)
    reconciler = started(kernel)
    for new in (route(4), route(2, 8)):
        kernel.routes_there[new.slot] = new
        kernel.events.append(EntryEvent(Found(new, PROTOCOL), deleted=False))
    reconciler.handle()
    pass_time(reconciler, clock, 1)
    assert kernel.there() == {ONE}


def test_a_kernel_that_cannot_be_asked_at_first(started: Started, clock: Clock) -> None:
    """The time runs from the first comparison, as only that shows what is there."""
    kernel = Kernel(TWO, THREE)
    kernel.broken = True
    reconciler = started(kernel)
    pass_time(reconciler, clock, 2 * SPARE)
    kernel.broken = False
    pass_time(reconciler, clock, CHECK_FAILED)
    assert kernel.there() == {ONE, TWO}
    pass_time(reconciler, clock, SPARE)
    assert kernel.there() == {ONE}
