"""What becomes of the tunnel's process, and what is said about it; process and clock are fakes."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import cast

import pytest

from flanneld.backend.udp import keeper as module
from flanneld.backend.udp.backend import UdpConfig, read_config
from flanneld.backend.udp.counters import Counters
from flanneld.backend.udp.descriptors import Descriptors
from flanneld.backend.udp.keeper import CALM, CHECK, DROPS_EVERY, PAUSE, TunnelKeeper
from flanneld.backend.udp.peers import PeerRoute
from flanneld.backend.udp.process import (
    ANSWER_SECONDS,
    START_SECONDS,
    Exit,
    TunnelError,
    TunnelProcess,
)
from flanneld.errors import BackendError
from flanneld.subnet.config import parse_config


def route(number: int, host: int = 2) -> PeerRoute:
    return PeerRoute(IPv4Network(f"10.5.{number}.0/24"), IPv4Address(f"10.97.0.{host}"))


class Process:
    """Does what it is told at once, until it is told to fail."""

    def __init__(self, pid: int, bench: "Bench") -> None:
        self.pid = pid
        self.bench = bench
        self.ready = False
        self.exit: Exit | None = None
        self.stuck = False
        self.closed = False
        self.calls: list[str] = []
        self.peers: dict[IPv4Network, PeerRoute] = {}
        self.real = Counters()
        self.counters = Counters()
        self.waiting: float | None = None

    def fileno(self) -> int:
        return 100 + self.pid

    def dispatch(self) -> None:
        if self.waiting is not None and self.bench.time >= self.waiting:
            raise TunnelError("it does not answer for 5 s")

    @property
    def is_settled(self) -> bool:
        return self.waiting is None

    def deadline(self) -> float | None:
        return self.waiting

    def poll(self) -> Exit | None:
        return self.exit

    def ending(self) -> str:
        return "killed by SIGKILL" if self.exit is not None else ""

    def _told(self, call: str) -> bool:
        self.calls.append(call)
        if self.exit is not None:
            raise TunnelError("it cannot be told anything: broken pipe")
        if self.stuck:
            self.waiting = self.bench.time + ANSWER_SECONDS
        return not self.stuck

    def replace_peers(self, routes: Iterable[PeerRoute]) -> None:
        if self._told("replace"):
            self.peers = {each.subnet: each for each in routes}

    def set_peers(self, routes: Iterable[PeerRoute]) -> None:
        if self._told("set"):
            self.peers.update((each.subnet, each) for each in routes)

    def remove_peers(self, subnets: Iterable[IPv4Network]) -> None:
        if self._told("remove"):
            for subnet in subnets:
                self.peers.pop(subnet)

    def set_fast_path(self, secret: bytes) -> None:
        self._told(f"fast path {secret!r}")

    def ask_counters(self) -> None:
        if self._told("counters"):
            self.counters = replace(self.real)

    def close(self) -> None:
        self.closed = True


class Bench:
    """A keeper, its processes, its device and its clock."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.processes: list[Process] = []
        self.device_lost = False
        self.refusal: str | None = None
        self.keeper = TunnelKeeper(cast(Descriptors, self), self.start)

    def tun_lost(self) -> bool:
        return self.device_lost

    def start(self) -> TunnelProcess:
        if self.refusal is not None:
            raise TunnelError(self.refusal)
        self.processes.append(Process(len(self.processes) + 1, self))
        return cast(TunnelProcess, self.processes[-1])

    @property
    def process(self) -> Process:
        return self.processes[-1]

    def pass_time(self, seconds: float) -> None:
        """Let time pass; work is done when it is due, as by the backend's loop."""
        end = self.time + seconds
        while True:
            due = self.keeper.due()
            if due is None or self.time + due > end:
                break
            self.time += max(due, 0.001)
            self.keeper.work()
        self.time = end

    def run(self, *routes: PeerRoute) -> None:
        """Have a tunnel in step with these peers."""
        self.keeper.change(routes, [])
        self.keeper.work()
        self.get_ready()

    def get_ready(self) -> None:
        """Have the present tunnel get ready, and in step."""
        self.process.ready = True
        self.keeper.work()
        self.keeper.work()
        assert self.keeper.in_step


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Bench:
    made = Bench()
    monkeypatch.setattr(module, "now", lambda: made.time)
    monkeypatch.setattr(logging.getLogger("flanneld"), "propagate", True)
    caplog.set_level(logging.INFO, "flanneld")
    return made


def test_it_starts_the_tunnel_and_hands_it_all_peers_when_it_is_ready(bench: Bench) -> None:
    keeper = bench.keeper
    assert (keeper.due(), keeper.fileno()) == (0.0, None)
    keeper.change([route(1), route(2)], [])
    keeper.work()
    keeper.change([route(3)], [route(1).subnet])
    keeper.work()
    assert bench.process.peers == {}
    assert keeper.fileno() == 101
    bench.get_ready()
    assert set(bench.process.peers.values()) == {route(2), route(3)}


def test_later_changes_go_to_the_tunnel_new_ones_first(bench: Bench) -> None:
    bench.run(route(1), route(2))
    bench.process.calls.clear()
    bench.keeper.change([route(3), route(2, 9)], [route(1).subnet, route(2).subnet])
    assert bench.process.calls == ["set", "remove"]
    assert set(bench.process.peers.values()) == {route(3), route(2, 9)}
    bench.process.calls.clear()
    bench.keeper.change([], [route(77).subnet])
    assert bench.process.calls == []


def test_the_fast_path_is_told_when_the_tunnel_is_ready_and_when_it_changes(bench: Bench) -> None:
    """Not before: a slow start would count as no answer."""
    keeper = bench.keeper
    keeper.set_fast_path(b"one")
    keeper.work()
    assert bench.process.calls == []
    bench.get_ready()
    assert bench.process.calls[:2] == ["fast path b'one'", "replace"]
    bench.process.calls.clear()
    for secret in (b"one", b"", b"", b"two"):
        keeper.set_fast_path(secret)
    assert bench.process.calls == ["fast path b''", "fast path b'two'"]
    bench.process.exit = Exit.DIED
    keeper.set_fast_path(b"three")
    keeper.work()
    bench.get_ready()
    assert bench.process.calls[:2] == ["fast path b'three'", "replace"]


def test_a_tunnel_that_died_is_started_again_with_all_peers(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.run(route(1))
    bench.time += CALM
    bench.process.exit = Exit.DIED
    bench.keeper.work()
    assert not bench.keeper.in_step
    bench.keeper.change([route(2)], [])
    # It lived long enough to be started again at once.
    assert bench.keeper.due() == 0.0
    bench.keeper.work()
    bench.get_ready()
    assert len(bench.processes) == 2
    assert set(bench.process.peers.values()) == {route(1), route(2)}
    assert "The udp tunnel has ended (killed by SIGKILL): it is started again" in caplog.text
    assert "runs again" not in caplog.text
    bench.pass_time(CALM + CHECK)
    assert caplog.text.count("The udp tunnel runs again (process 2)") == 1


def test_a_tunnel_that_dies_again_and_again_waits_below_a_second_and_is_said_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.run(route(1))
    pauses = []
    for _ in range(5):
        bench.process.exit = Exit.DIED
        bench.keeper.work()
        due = bench.keeper.due()
        assert due is not None
        pauses.append(due)
        bench.time += due
        bench.keeper.work()
        bench.get_ready()
    # Twice at once, as then it may be bad luck.
    assert pauses == pytest.approx([0.0, 0.0, PAUSE, PAUSE, PAUSE])
    assert PAUSE < 1.0
    assert len(bench.processes) == 6
    assert caplog.text.count("has ended") == 1
    assert "runs again" not in caplog.text
    # Long after that, it is news.
    bench.pass_time(60)
    bench.process.exit = Exit.DIED
    bench.keeper.work()
    assert caplog.text.count("has ended") == 2


@pytest.mark.parametrize("when", ["check", "change", "report", "ready"])
def test_a_tunnel_that_does_not_answer_is_replaced(
    bench: Bench, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    if when == "ready":
        bench.keeper.work()
        bench.process.stuck = bench.process.ready = True
        bench.keeper.work()
        assert not bench.keeper.in_step
    else:
        bench.run(route(1))
        bench.process.stuck = True
    stuck = bench.process
    if when == "change":
        bench.keeper.change([route(2)], [])
    elif when == "report":
        bench.keeper.report()
    bench.pass_time(CHECK + ANSWER_SECONDS + 0.1)
    assert stuck.closed
    assert len(bench.processes) == 2
    assert "The udp tunnel has ended (it does not answer for 5 s)" in caplog.text


def test_the_reason_is_how_it_ended_whoever_notices(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.run(route(1))
    bench.process.exit = Exit.DIED
    bench.keeper.change([route(2)], [])
    assert "The udp tunnel has ended (killed by SIGKILL)" in caplog.text


def test_who_claims_that_the_device_is_lost_is_not_believed(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.run(route(1))
    for _ in range(20):
        bench.process.exit = Exit.TUN_LOST
        bench.keeper.work()
        bench.pass_time(0.1)
    assert len(bench.processes) <= 6
    assert "The udp tunnel has ended" in caplog.text


def test_a_tunnel_that_never_gets_ready_is_replaced(bench: Bench) -> None:
    bench.keeper.work()
    bench.pass_time(START_SECONDS - 1)
    assert [process.closed for process in bench.processes] == [False]
    bench.pass_time(2)
    assert [process.closed for process in bench.processes] == [True, False]


def test_a_tunnel_that_cannot_be_started_is_tried_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.refusal = "the udp tunnel cannot be started: too many open files"
    bench.pass_time(10)
    assert caplog.text.count("too many open files") == 1
    bench.refusal = None
    bench.pass_time(1)
    assert len(bench.processes) == 1


def test_without_its_device_it_waits_for_a_new_one(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.run(route(1))
    bench.device_lost = True
    bench.process.exit = Exit.TUN_LOST
    bench.keeper.work()
    assert bench.keeper.lost_device
    assert bench.keeper.due() is None
    bench.keeper.work()
    assert len(bench.processes) == 1
    bench.device_lost = False
    bench.keeper.work()
    assert len(bench.processes) == 2
    # The device's part is to say what happened.
    assert "has ended" not in caplog.text


def test_drops_are_said_at_most_once_a_minute_and_none_is_left_out(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.run(route(1))
    counters = bench.process.real
    counters.drop_unknown_peer, counters.drop_ttl = 3, 50
    bench.pass_time(CHECK + 0.1)
    for _ in range(int(DROPS_EVERY * 3 / CHECK)):
        counters.drop_unknown_peer += 1
        counters.drop_wrong_source += 2
        bench.pass_time(CHECK)
    bench.pass_time(DROPS_EVERY * 2)
    lines = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert lines[0] == "The udp tunnel dropped packets: 3 from no peer's public IP"
    assert 3 <= len(lines) <= 5
    said = [int(line.split(": ")[1].split()[0]) for line in lines]
    assert sum(said) == counters.drop_unknown_peer
    assert "with a source that is not in their sender's subnet" in lines[1]


def test_report_shows_every_counter(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.run(route(1))
    counters = bench.process.real
    counters.udp_send_calls, counters.udp_sent_packets, counters.drop_ttl = 2, 9, 4
    bench.keeper.report()
    bench.keeper.work()
    for text in ("udp_sent_packets=9", "drop_ttl=4", "4.5 packets per send", "0.0 per receive"):
        assert text in caplog.text


def test_stop_ends_the_process(bench: Bench) -> None:
    bench.run(route(1))
    bench.keeper.stop()
    assert bench.process.closed
    assert not bench.keeper.in_step
    bench.keeper.stop()


# The backend's keys


def keys(text: str) -> UdpConfig:
    return read_config(
        parse_config(f'{{"Network":"10.5.0.0/16","Backend":{{"Type":"udp"{text}}}}}')
    )


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", UdpConfig(8285, True, True, 0)),
        (',"Port":9000', UdpConfig(9000, True, True, 0)),
        (',"SourceCheck":false', UdpConfig(8285, False, True, 0)),
        (',"FastPath":false', UdpConfig(8285, True, False, 0)),
        (',"MTU":1400', UdpConfig(8285, True, True, 1400)),
        (',"MTU":96', UdpConfig(8285, True, True, 96)),
    ],
)
def test_keys(text: str, read: UdpConfig) -> None:
    assert keys(text) == read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (',"Port":"8285"', ["Port", '"8285"']),
        (',"Port":0', ["Port", "0"]),
        (',"Port":65536', ["Port", "65536"]),
        (',"SourceCheck":1', ["SourceCheck", "1"]),
        (',"FastPath":"no"', ["FastPath", '"no"']),
        (',"MTU":95', ["MTU", "96", "95"]),
        (',"MTU":-1', ["MTU", "-1"]),
        (',"MTU":70000', ["MTU", "70000"]),
    ],
)
def test_unusable_keys_are_named(text: str, words: list[str]) -> None:
    with pytest.raises(BackendError) as caught:
        keys(text)
    for word in words:
        assert word in str(caught.value)
