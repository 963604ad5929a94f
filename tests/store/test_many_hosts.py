"""`bench.many_hosts` with few hosts: that it works, and what it must find whatever their number."""

import json
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from bench import many_hosts
from bench.fleet import Fleet, agreed
from bench.many_hosts import WIDE, Bench, Step
from lab.etcd import Etcd

HOSTS = 30
TIGHT = IPv4Network("10.0.0.0/19")


@pytest.fixture
def bench(own_etcd: Etcd) -> Bench:
    return Bench([own_etcd], HOSTS, processes=2)


@pytest.fixture
def fleet(bench: Bench) -> Iterator[Fleet]:
    """Hosts that have started together, and know each other."""
    with bench.fleet("/wide", WIDE) as fleet:
        many_hosts.start(bench, fleet, "start")
        check_whole(fleet)
        yield fleet


def check_whole(fleet: Fleet) -> None:
    """Each host has a subnet of its own and uses the leases of all the others."""
    states = fleet.states()
    assert [state.died for state in states] == [""] * HOSTS
    assert len({state.subnet for state in states} - {None}) == HOSTS
    assert agreed(states) == HOSTS


def figure(step: Step, name: str) -> float:
    return next(value for known, value, _ in step.figures if known == name)


def test_hosts_that_start_together_in_a_network_with_hardly_more_subnets(bench: Bench) -> None:
    """There are 31, and no two hosts get one. At their next start they keep them."""
    with bench.fleet("/tight", TIGHT) as fleet:
        held = many_hosts.start(bench, fleet, "start")
        check_whole(fleet)
    assert sorted(held) == list(range(HOSTS))
    assert bench.steps[0].requests["create"] >= HOSTS
    with bench.fleet("/tight", TIGHT, held) as fleet:
        assert many_hosts.start(bench, fleet, "again") == held
        check_whole(fleet)
    assert bench.steps[2].requests["swap"] == HOSTS
    assert bench.steps[2].requests["create"] == 0


def test_hosts_that_renew_together(bench: Bench, fleet: Fleet) -> None:
    many_hosts.renew_together(bench, fleet)
    step = bench.steps[-1]
    assert step.requests["swap"] == HOSTS
    assert figure(step, "renewals carried out") == HOSTS
    assert figure(step, "hosts that do not know all") == 0
    check_whole(fleet)


def test_hosts_whose_etcd_goes_away(
    bench: Bench, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_hosts, "_AWAY", 0.5)
    many_hosts.restart_etcd(bench, fleet)
    assert figure(bench.steps[-1], "hosts that do not") == 0
    many_hosts.empty_etcd(bench, fleet)
    assert figure(bench.steps[-1], "leases that are not") == 0
    check_whole(fleet)


def test_what_was_found_is_written_down(
    bench: Bench, fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many_hosts.renew_one_by_one(bench, fleet)
    many_hosts.costs(bench)
    assert 30 * 200 < 1024 * figure(bench.steps[-1], "the list of all leases: size") < 30 * 300
    many_hosts.write(bench, {"machine": "this"}, tmp_path)
    found = json.loads((tmp_path / "many_hosts.json").read_text())
    assert [step["step"] for step in found["steps"]] == [step.title for step in bench.steps]
    assert (tmp_path / "many_hosts.txt").read_text() == capsys.readouterr().out
