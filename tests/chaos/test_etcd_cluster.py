"""A cluster of three etcds loses members in every way, while containers ping and hosts come and go.

Each test ends with: every host knows exactly the leases in etcd, no packet between the first two
hosts was lost. How long it took after the store was healthy is printed, and no budget.
"""

import re
import time

import pytest
from network import PATIENCE, MakeLab, Pings, client_of, key_of, leases, put_config
from overlay import problems

from lab import eventually

from .fleet import HOSTS, OUTAGE, Fleet, connected_to, make_fleet, value_of_peer

# Seconds until all hosts know what the healthy part of the store knows, and the same again for a
# busy machine.
PROMISED = SLACK = 5.0


def put_peer(fleet: Fleet, number: int, ttl: int = 600) -> None:
    """Write the lease of a made-up host."""
    value = value_of_peer(fleet.backend, f"10.97.0.{number}", f"02:00:00:00:01:{number:02x}")
    with client_of(fleet.lab) as client:
        client.put(key_of(f"10.5.{number}.0/24"), value, ttl=ttl)


def come_and_go(fleet: Fleet) -> None:
    """One host joins, one leaves; the store must be there, be it with a member less."""
    fleet.join()
    fleet.leave()
    fleet.free()


def check_nothing_was_given_up(fleet: Fleet) -> None:
    """No daemon dropped a peer that was there all the time.

    Not asked of a host that joined: it may have got the subnet of one that left.
    """
    stayed = {str(d.subnet()) for d in fleet.daemons if d.host.number <= HOSTS}
    for daemon in fleet.daemons:
        removed = re.findall(r"Subnet removed: (\S+)", daemon.log())
        assert stayed.isdisjoint(removed)


def test_the_leader_is_killed(make_lab: MakeLab) -> None:
    fleet = make_fleet(make_lab, "host-gw")
    cluster = fleet.cluster
    with Pings(fleet.lab.hosts) as pings:
        leader = cluster.leader()
        leader.kill()
        joined = fleet.join()
        fleet.leave()
        cluster.wait_healthy(without=leader)
        fleet.free()
        joined.wait_ready(2 * PATIENCE)
        fleet.expect_converged("leader killed")
        pings.go_on(20)
        leader.start()
        come_and_go(fleet)
        fleet.daemons[-1].wait_ready(2 * PATIENCE)
        fleet.expect_converged("leader back")
    check_nothing_was_given_up(fleet)


def test_the_leader_is_frozen(make_lab: MakeLab) -> None:
    """Its connections stay open, and it answers nothing; then it goes on as if nothing had been."""
    fleet = make_fleet(make_lab, "vxlan")
    cluster = fleet.cluster
    with Pings(fleet.lab.hosts) as pings:
        leader = cluster.leader()
        began = time.monotonic()
        leader.freeze()
        cluster.wait_healthy(without=leader)
        come_and_go(fleet)
        fleet.daemons[-1].wait_ready(2 * PATIENCE)
        fleet.expect_converged("leader frozen")
        time.sleep(max(0.0, OUTAGE - (time.monotonic() - began)))
        pings.go_on(20)
        leader.thaw()
        cluster.wait_healthy()
        fleet.expect_converged("leader thawed")
    check_nothing_was_given_up(fleet)


def test_quorum_is_lost_and_comes_back(make_lab: MakeLab) -> None:
    """Nothing can be written, and leases end meanwhile; who comes waits, who leaves is kept."""
    fleet = make_fleet(make_lab, "udp")
    cluster = fleet.cluster
    put_peer(fleet, 201, ttl=int(OUTAGE / 2))
    put_peer(fleet, 202)
    fleet.expect_converged("made-up peers")
    with Pings(fleet.lab.hosts) as pings:
        dead = cluster.members[:2]
        began = time.monotonic()
        for member in dead:
            member.kill()
        joined = fleet.join()
        fleet.leave()
        time.sleep(max(0.0, OUTAGE - (time.monotonic() - began)))
        assert joined.ready_after() is None
        pings.go_on(20)
        cluster.start()
        fleet.expect_converged("quorum back")
        assert "10.5.202.0/24" in leases(fleet.lab)
        eventually(
            lambda: "10.5.201.0/24" not in leases(fleet.lab), PATIENCE, "the end of a short lease"
        )
        fleet.free()
        fleet.expect_converged("leases ended and freed")
        joined.wait_ready()
    check_nothing_was_given_up(fleet)


def test_all_members_are_restarted_one_by_one(make_lab: MakeLab) -> None:
    fleet = make_fleet(make_lab, "vxlan")
    with Pings(fleet.lab.hosts):
        for member in fleet.cluster.members:
            fleet.join()
            member.restart()
            fleet.leave()
            fleet.free()
        fleet.cluster.wait_healthy()
        fleet.expect_converged("rolling restart", 2 * PATIENCE)
    check_nothing_was_given_up(fleet)


def test_a_member_is_parted_from_the_others_with_our_connections_on_it(make_lab: MakeLab) -> None:
    """It takes polls and waits for events that never come, and reads of it would be stale."""
    fleet = make_fleet(make_lab, "host-gw")
    cluster = fleet.cluster
    with Pings(fleet.lab.hosts) as pings:
        member = max(cluster.members, key=lambda each: len(connected_to(fleet, each)))
        assert connected_to(fleet, member)
        began = time.monotonic()
        cluster.cut_off(member)
        cluster.wait_healthy(without=member)
        come_and_go(fleet)
        fleet.daemons[-1].wait_ready(2 * PATIENCE)
        fleet.expect_converged("member cut off")
        time.sleep(max(0.0, OUTAGE - (time.monotonic() - began)))
        pings.go_on(20)
        cluster.reunite(member)
        cluster.wait_healthy()
        fleet.expect_converged("member back")
    check_nothing_was_given_up(fleet)


@pytest.mark.parametrize("leads", [False, True], ids=["follower", "leader"])
@pytest.mark.parametrize("trouble", ["frozen", "cut off"])
def test_every_host_watches_at_the_member_in_trouble(
    make_lab: MakeLab, trouble: str, leads: bool
) -> None:
    """The worst case: nothing else brings them a word. Each new lease arrives all the same.

    Once the members that are left have a leader; and again when the member is back.
    """
    lab = make_lab(3, etcd=False)
    cluster = lab.start_etcd_cluster(3)
    leader = cluster.leader()
    member = leader if leads else next(each for each in cluster.members if each is not leader)
    only_there = [f"blackhole {o.address}/32" for o in cluster.members if o is not member]
    for host in lab.hosts:
        host.ip(*(f"route add {route}" for route in only_there))
    put_config(lab, SubnetMax="10.5.99.0", Backend={"Type": "host-gw"})
    fleet = Fleet(lab, "host-gw")
    fleet.start(*lab.hosts)
    for host in lab.hosts:
        host.ip(*(f"route del {route}" for route in only_there))
    assert connected_to(fleet, member) == fleet.daemons
    if trouble == "frozen":
        member.freeze()
    else:
        cluster.cut_off(member)
    began = time.monotonic()
    cluster.wait_healthy(without=member)
    print(f"{trouble}: the others healthy after {time.monotonic() - began:.1f} s")
    put_peer(fleet, 201)
    fleet.expect_converged(f"{trouble}, 3 hosts on it", PROMISED + SLACK)
    put_peer(fleet, 202)
    fleet.expect_converged("the next lease", PROMISED + SLACK)
    if trouble == "frozen":
        member.thaw()
    else:
        cluster.reunite(member)
    cluster.wait_healthy()
    put_peer(fleet, 203)
    fleet.expect_converged("member back", PROMISED + SLACK)
    for daemon in fleet.daemons:
        assert problems(daemon) == []
        added = re.findall(r"Subnet added: (10\.5\.20\d\.0/24)", daemon.log())
        assert sorted(added) == [f"10.5.{n}.0/24" for n in (201, 202, 203)]
    check_nothing_was_given_up(fleet)
