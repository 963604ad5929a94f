"""etcd comes back empty, or older than it was, while hosts run and while one of them starts."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from network import (
    PATIENCE,
    SUBNETS_KEY,
    MakeLab,
    Pings,
    client_of,
    etcd_of,
    key_of,
    leases,
    put_config,
)
from overlay import entries

from flanneld.kernel.spared import SPARE
from flanneld.subnet.watch import LINGER, UNSEEN
from lab import Flanneld, Host, eventually
from lab.process import freeze, thaw

from .fleet import Fleet, value_of_peer

WAYS = ["emptied", "restored from a backup"]

# Peers made up by hand: one that publishes nothing again, and one whose subnet gets another host.
GONE, TAKEN = 201, 202


def subnet_of(number: int) -> str:
    return f"10.5.{number}.0/24"


def put_peer(fleet: Fleet, number: int, host: int = 0) -> None:
    """Write the lease of 10.5.NUMBER.0/24 for 10.97.0.HOST; the two are one unless said."""
    last = host or number
    value = value_of_peer(fleet.backend, f"10.97.0.{last}", f"02:00:00:00:01:{last:02x}")
    with client_of(fleet.lab) as client:
        client.put(key_of(subnet_of(number)), value, ttl=600)


def write_for_nothing(fleet: Fleet, times: int) -> None:
    """Have etcd's index so far ahead that an emptied one does not come there soon."""
    key = f"{SUBNETS_KEY}/nobody"
    with client_of(fleet.lab) as client:
        for number in range(times):
            client.put(key, str(number))
        client.delete(key)


def start_fleet(make_lab: MakeLab, backend: str, hosts: int) -> tuple[Fleet, Callable[[str], None]]:
    """Start hosts, the last of them after a backup. Return them, and how etcd loses its data."""
    lab = make_lab(hosts)
    put_config(lab, Backend={"Type": backend})
    fleet = Fleet(lab, backend)
    fleet.start(*lab.hosts[:-1])
    etcd = etcd_of(lab)
    backup = etcd.backup()
    fleet.start(lab.hosts[-1])

    def lose(how: str) -> None:
        if how == WAYS[0]:
            etcd.wipe()
            put_config(lab, Backend={"Type": backend})
        else:
            etcd.restore(backup)

    return fleet, lose


@pytest.mark.parametrize(
    ("how", "backend"),
    [(WAYS[0], "vxlan"), (WAYS[0], "udp"), (WAYS[1], "host-gw")],
)
def test_etcd_comes_back_empty_or_older_while_hosts_run(
    make_lab: MakeLab, how: str, backend: str
) -> None:
    """One of them is slow to publish its lease again: meanwhile its peers keep their ways to it."""
    fleet, lose = start_fleet(make_lab, backend, 5)
    before = {subnet: node.value for subnet, node in leases(fleet.lab).items()}
    assert len(before) == 5
    if how == WAYS[0]:
        write_for_nothing(fleet, 50)
    # The newest host, which the backup knows nothing of, and one of those with pings.
    slow = fleet.daemons[-1]
    others = {subnet: value for subnet, value in before.items() if subnet != str(slow.subnet())}

    def are_back(wanted: dict[str, str]) -> bool:
        return {s: node.value for s, node in leases(fleet.lab).items()} == wanted

    with Pings(fleet.lab.hosts[-2:]) as pings:
        with frozen(slow):
            lose(how)
            eventually(partial(are_back, others), PATIENCE, "the others' leases in etcd again")
            # So long that a lease which was only deleted would have cost it its ways. The backup
            # lacks one write, and so is not known for one.
            time.sleep((UNSEEN if how == WAYS[0] else LINGER) + 1.0)
            pings.go_on(20)
        began = time.monotonic()
        eventually(partial(are_back, before), PATIENCE, "all leases in etcd again")
        print(f"{how}, {backend}: all leases back in {time.monotonic() - began:.1f} s")
        fleet.expect_converged(f"{how}, {backend}")
        pings.go_on(20)
        # The watches work on etcd's new count.
        fleet.start(fleet.lab.add_host())
    for daemon in fleet.daemons:
        assert "Subnet removed" not in daemon.log()


@contextmanager
def frozen(daemon: Flanneld) -> Iterator[None]:
    """The daemon does nothing for a while; its host goes on."""
    freeze(daemon.pid)
    try:
        yield
    finally:
        thaw(daemon.pid)


def in_kernel(host: Host, backend: str, number: int) -> list[str]:
    """Return what a host's kernel has of 10.5.NUMBER.0/24."""
    shown = entries(host, "flannel.1" if backend == "vxlan" else "eth0")
    return [line for line in shown if f"10.5.{number}.0" in line]


@pytest.mark.parametrize(("how", "backend"), [(WAYS[0], "host-gw"), (WAYS[1], "vxlan")])
def test_a_daemon_starts_on_an_etcd_that_came_back_empty_or_older(
    make_lab: MakeLab, how: str, backend: str
) -> None:
    """It knows nobody, but its kernel does: a peer that is slow to publish again loses nothing.

    Of who does not come back the entries go in the end; who gets a free subnet has it at once.
    """
    fleet, lose = start_fleet(make_lab, backend, 2)
    starter, slow = fleet.daemons
    host = starter.host
    for number in (GONE, TAKEN):
        put_peer(fleet, number)
    fleet.expect_converged("made-up peers")
    before = in_kernel(host, backend, TAKEN)
    with Pings(fleet.lab.hosts) as pings:
        starter.kill9()
        with frozen(slow):
            lose(how)
            starter.start()
            starter.wait_ready()
            starter.wait_log(r"Keeping \d+ kernel entries of a former run for 15 s")
            pings.go_on(20)
            assert str(slow.subnet()) not in leases(fleet.lab)
            assert in_kernel(host, backend, GONE)
            put_peer(fleet, TAKEN, host=203)

            def taken_over() -> bool:
                now = in_kernel(host, backend, TAKEN)
                return len(now) == len(before) and now != before

            eventually(taken_over, PATIENCE, "the new owner's entries")
            assert in_kernel(host, backend, GONE)
        eventually(
            lambda: str(slow.subnet()) in leases(fleet.lab), PATIENCE, "the slow peer's lease"
        )
        # The other one, which saw the leases before, keeps those of the made-up peers to their end.
        alone = Fleet(fleet.lab, backend, [starter])
        alone.expect_converged(f"start on etcd {how}", SPARE + PATIENCE)
        assert not in_kernel(host, backend, GONE)
    starter.wait_log(f"Removed stale route to {subnet_of(GONE)}")
    assert f"Removed stale route to {slow.subnet()}" not in starter.log()


def test_etcd_is_restored_from_a_backup_in_which_the_subnet_was_another_hosts(
    make_lab: MakeLab,
) -> None:
    """Nobody can tell whether that host is alive: it keeps the subnet, and ours goes elsewhere."""
    lab = make_lab(1)
    put_config(lab, Backend={"Type": "host-gw"}, SubnetMin="10.5.1.0", SubnetMax="10.5.2.0")
    etcd = etcd_of(lab)
    fleet = Fleet(lab, "host-gw")
    put_peer(fleet, 1, host=203)
    put_peer(fleet, 2, host=204)
    backup = etcd.backup()
    with client_of(lab) as client:
        client.delete(key_of(subnet_of(1)))
    daemon = Flanneld(lab.hosts[0]).start()
    daemon.wait_ready()
    assert str(daemon.subnet()) == subnet_of(1)
    etcd.restore(backup)
    assert daemon.wait_exit(2 * PATIENCE) == 1
    daemon.wait_log(r"^E.*Lease has been revoked.*\(10\.5\.1\.0/24 is now held by 10\.97\.0\.203\)")
    before = leases(lab)[subnet_of(1)].modified_index
    with client_of(lab) as client:
        client.delete(key_of(subnet_of(2)))
    daemon.start().wait_ready()
    assert str(daemon.subnet()) == subnet_of(2)
    assert leases(lab)[subnet_of(1)].modified_index == before
    fleet.daemons.append(daemon)
    fleet.expect_converged("restarted elsewhere")
