"""A cluster of three etcds loses members in every way, while containers ping and hosts come and go.

Each test ends with: every host knows exactly the leases in etcd, no packet between the first two
hosts was lost. How long it took after the store was healthy is printed, and no budget.
"""

import re
import time

from network import PATIENCE, MakeLab, Pings, client_of, key_of, leases

from lab import eventually

from .fleet import HOSTS, OUTAGE, WHOLE, Fleet, connected_to, make_fleet, value_of_peer

# Seconds until a daemon leaves a member that answers nothing, or nothing new: an idle poll's 20 s
# and a quarter, and 5 s for the read that finds it out.
DEAF = 30.0


def put_short_lived(fleet: Fleet, number: int, ttl: int) -> None:
    """A made-up peer whose lease ends by itself."""
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
        if WHOLE:
            fleet.expect_converged("leader frozen", DEAF + PATIENCE)
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
    put_short_lived(fleet, 201, ttl=int(OUTAGE / 2))
    put_short_lived(fleet, 202, ttl=600)
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
        if WHOLE:
            fleet.expect_converged("member cut off", DEAF + PATIENCE)
        time.sleep(max(0.0, OUTAGE - (time.monotonic() - began)))
        pings.go_on(20)
        cluster.reunite(member)
        cluster.wait_healthy()
        fleet.expect_converged("member back")
    check_nothing_was_given_up(fleet)
