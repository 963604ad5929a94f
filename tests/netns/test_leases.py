"""The host's own lease: taken, kept, lost, taken back; never one subnet for two hosts."""

import re
import time

from network import (
    LEASE_SECONDS,
    PATIENCE,
    MakeLab,
    Pings,
    client_of,
    count,
    etcd_of,
    key_of,
    leases,
    mesh,
    peer_routes,
    put_config,
    running,
    start,
    value_of,
    wait_lease,
    wait_meshed,
    wait_routes,
)

from lab import Flanneld, eventually
from lab.process import freeze, thaw

FULL = LEASE_SECONDS - 120


def test_an_own_lease_deleted_by_hand_is_taken_back_and_no_packet_lost(make_lab: MakeLab) -> None:
    """The same subnet again, within a second; all the time packets come through both ways."""
    lab, daemons = running(make_lab, 2)
    subnet = daemons[0].subnet()
    with Pings(lab.hosts) as pings, client_of(lab) as client:
        for _ in range(8):
            assert client.delete(key_of(subnet))
            node = wait_lease(lab, subnet, lambda node: node.ttl)
            assert node.value == value_of("10.97.0.1")
            assert node.ttl is not None
            assert node.ttl > FULL
            pings.go_on(8)
    assert daemons[0].subnet() == subnet
    assert count(daemons[0], "is gone from the store: taking it back") == 8
    assert "Subnet removed" not in daemons[1].log()
    wait_meshed(daemons)


def test_an_own_lease_that_expired_is_taken_back(make_lab: MakeLab) -> None:
    """The daemon slept (a suspended virtual machine) while its lease came to its end."""
    lab, daemons = running(make_lab, 2)
    sleeper, peer = daemons
    subnet = sleeper.subnet()
    freeze(sleeper.pid)
    with client_of(lab) as client:
        client.put(key_of(subnet), value_of("10.97.0.1"), ttl=1)
    wait_routes(peer.host, {})
    assert str(subnet) not in leases(lab)
    thaw(sleeper.pid)
    node = wait_lease(lab, subnet, lambda node: node.value == value_of("10.97.0.1"))
    assert node.ttl is not None
    assert node.ttl > FULL
    wait_meshed(daemons)
    assert sleeper.is_running


def test_a_lease_shortened_by_hand_is_renewed_at_once(make_lab: MakeLab) -> None:
    lab, (daemon,) = running(make_lab, 1)
    subnet = daemon.subnet()
    with client_of(lab) as client:
        client.put(key_of(subnet), value_of("10.97.0.1"), ttl=100)
    wait_lease(lab, subnet, lambda node: node.ttl and node.ttl > FULL)
    daemon.wait_log("Lease renewed, new expiration: ")


def test_a_lease_overwritten_by_another_host_ends_the_daemon(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    daemon, peer = daemons
    subnet = daemon.subnet()
    with client_of(lab) as client:
        client.put(key_of(subnet), value_of("10.97.0.99"), ttl=100)
    assert daemon.wait_exit(PATIENCE) == 1
    assert re.search(r"^E.*\] Lease has been revoked\. Shutting down daemon\.", daemon.log(), re.M)
    assert "10.97.0.99" in daemon.log().split("Lease has been revoked")[1]
    assert daemon.notifications[-1].text == "STOPPING=1"
    # Not one write: the other host has it, as far as etcd knows.
    assert leases(lab)[str(subnet)].value == value_of("10.97.0.99")
    wait_routes(peer.host, {str(subnet): "10.97.0.99"})
    # The service manager starts it again, and it leases another.
    daemon.start()
    daemon.wait_ready()
    assert daemon.subnet() != subnet
    assert leases(lab)[str(subnet)].value == value_of("10.97.0.99")
    everybody = mesh(daemons, peer.host) | {str(subnet): "10.97.0.99"}
    wait_routes(peer.host, everybody)


def test_a_lease_that_expired_and_went_to_another_host_is_not_fought_for(make_lab: MakeLab) -> None:
    lab, (daemon,) = running(make_lab, 1)
    subnet = daemon.subnet()
    freeze(daemon.pid)
    with client_of(lab) as client:
        client.delete(key_of(subnet))
        client.put(key_of(subnet), value_of("10.97.0.99"), ttl=100)
    thaw(daemon.pid)
    assert daemon.wait_exit(PATIENCE) == 1
    assert "Lease has been revoked. Shutting down daemon." in daemon.log()
    assert leases(lab)[str(subnet)].value == value_of("10.97.0.99")


def test_garbage_in_the_own_key_is_replaced_by_the_lease(make_lab: MakeLab) -> None:
    """With an end, also where what was written there by hand has none."""
    lab, daemons = running(make_lab, 2)
    subnet = daemons[0].subnet()
    with Pings(lab.hosts) as pings, client_of(lab) as client:
        nonsense = '{"PublicIP":"nonsense","BackendType":"host-gw"}'
        for garbage, ttl in (("garbage", None), ("", 100), (nonsense, 100)):
            client.put(key_of(subnet), garbage, ttl=ttl)
            node = wait_lease(lab, subnet, lambda node: node.value == value_of("10.97.0.1"))
            assert node.ttl is not None
            assert node.ttl > FULL
            pings.go_on(5)
    wait_meshed(daemons)
    assert daemons[0].is_running
    assert count(daemons[0], "altered by somebody else, restoring it") == 3


def test_a_lease_fought_over_is_given_up_before_it_becomes_a_storm(make_lab: MakeLab) -> None:
    lab, (daemon,) = running(make_lab, 1)
    subnet = daemon.subnet()
    other = '{"PublicIP":"10.97.0.1","BackendType":"vxlan"}'
    with client_of(lab) as client:
        for _ in range(3):
            client.put(key_of(subnet), other, ttl=100)
            wait_lease(lab, subnet, lambda node: node.value == value_of("10.97.0.1"))
        client.put(key_of(subnet), other, ttl=100)
    assert daemon.wait_exit(PATIENCE) == 1
    assert "keeps writing the lease" in daemon.log()
    assert "--public-ip" in daemon.log().splitlines()[-1]


def test_a_reservation_is_used_and_never_given_an_end(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab)
    one, two = lab.hosts
    with client_of(lab) as client:
        reserved = client.put(key_of("10.5.44.0/24"), value_of(one.address))
    daemons = start(one, two, extra=("--subnet-lease-renew-margin=1439",))
    assert str(daemons[0].subnet()) == "10.5.44.0/24"
    wait_meshed(daemons)
    node = leases(lab)["10.5.44.0/24"]
    assert node.ttl is None
    assert node.value == value_of(one.address)
    assert node.created_index == reserved.created_index
    assert count(daemons[0], "Lease of 10.5.44.0/24 is a reservation: it is never renewed") == 1
    # Also not when it is garbled and restored, nor by a restart.
    with client_of(lab) as client:
        client.put(key_of("10.5.44.0/24"), "garbage")
    wait_lease(lab, "10.5.44.0/24", lambda node: node.value == value_of(one.address))
    daemons[0].terminate()
    daemons[0].start()
    daemons[0].wait_ready()
    node = leases(lab)["10.5.44.0/24"]
    assert (node.value, node.ttl) == (value_of(one.address), None)


def test_a_reservation_for_another_host_is_not_taken(make_lab: MakeLab) -> None:
    """Of two subnets one is reserved: the other is what is left."""
    lab = make_lab(1)
    put_config(lab, SubnetMin="10.5.1.0", SubnetMax="10.5.2.0")
    with client_of(lab) as client:
        client.put(key_of("10.5.1.0/24"), value_of("10.97.0.99"))
    (daemon,) = start(*lab.hosts)
    assert str(daemon.subnet()) == "10.5.2.0/24"
    assert leases(lab)["10.5.1.0/24"].value == value_of("10.97.0.99")


def test_a_subnet_file_that_names_anothers_subnet_takes_nothing_away(make_lab: MakeLab) -> None:
    """As on a host made from the image of another one."""
    lab, daemons = running(make_lab, 1)
    original = daemons[0]
    copy = lab.add_host()
    copy.subnet_file.write_text(original.host.subnet_file.read_text())
    daemons += start(copy)
    assert daemons[1].subnet() != original.subnet()
    assert leases(lab)[str(original.subnet())].value == value_of(original.host.address)
    wait_meshed(daemons)
    assert original.is_running


def test_two_hosts_with_one_public_ip_are_told_in_the_log(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab)
    one, two = lab.hosts
    # Only for the daemon: on the wire the second host keeps its own address.
    two.set_sysctl("net/ipv4/conf/all/arp_ignore", "1")
    two.ip(
        "link add twin type bridge",
        f"addr add {one.address}/32 dev twin",
        "link set twin up",
        "rule add priority 0 to 10.97.0.254 lookup main",
        "route replace 10.97.0.254/32 dev eth0 src 10.97.0.2",
    )
    (first,) = start(one)
    second = Flanneld(two, f"--iface={one.address}")
    argv = [argument for argument in second.argv if argument != "--iface=eth0"]
    two.popen(argv, output=lab.scratch_file("second"))
    first.wait_log(
        r"^W.* was rewritten by somebody else.*another host may have the public IP 10\.9"
    )
    eventually(two.subnet_file.exists, PATIENCE, "the second daemon to have leased a subnet")
    assert first.is_running
    assert list(leases(lab)) == [str(first.subnet())]


def test_hosts_that_start_at_the_same_instant_never_share_a_subnet(make_lab: MakeLab) -> None:
    """Twenty times; with two subnets for two hosts every second start is a collision.

    Both ask while etcd is frozen, so that both are answered at the same instant.
    """
    lab = make_lab(2)
    put_config(lab, SubnetMin="10.5.1.0", SubnetMax="10.5.2.0")
    etcd = etcd_of(lab)
    daemons = [Flanneld(host) for host in lab.hosts]
    for _ in range(20):
        etcd.freeze()
        for daemon in daemons:
            daemon.start()
        for daemon in daemons:
            daemon.wait_log("Created subnet manager", PATIENCE)
        etcd.thaw()
        for daemon in daemons:
            daemon.wait_ready(2 * PATIENCE)
        assert {str(daemon.subnet()) for daemon in daemons} == {"10.5.1.0/24", "10.5.2.0/24"}
        assert {network: node.value for network, node in leases(lab).items()} == {
            str(daemon.subnet()): value_of(daemon.host.address) for daemon in daemons
        }
        for daemon in daemons:
            daemon.kill9()
            daemon.host.subnet_file.unlink()
            daemon.host.ip("route flush proto 102")
        with etcd.client() as client:
            client.delete("/coreos.com/network/subnets", recursive=True)


def test_a_host_too_many_waits_until_a_subnet_is_free(make_lab: MakeLab) -> None:
    """Asked again every five seconds; one line says what to do."""
    lab = make_lab(4)
    put_config(lab, SubnetMin="10.5.1.0", SubnetMax="10.5.3.0")
    daemons = [Flanneld(host).start() for host in lab.hosts]

    def ready() -> list[Flanneld]:
        return [daemon for daemon in daemons if daemon.ready_after() is not None]

    eventually(lambda: len(ready()) == 3, 2 * PATIENCE, "three of four hosts to be ready")
    (waiting,) = [daemon for daemon in daemons if daemon not in ready()]
    waiting.wait_log(r"^E.*out of subnets: all 3 of length /24 from 10\.5\.1\.0 to 10\.5\.3\.0")
    time.sleep(0.5)
    assert waiting.is_running
    assert not waiting.host.subnet_file.exists()
    assert peer_routes(waiting.host) == {}
    statuses = [n.text for n in waiting.notifications if n.text.startswith("STATUS=")]
    assert statuses[-1].startswith("STATUS=acquiring a lease: out of subnets: all 3 of length /24")

    leaver = ready()[0]
    freed = leaver.subnet()
    leaver.terminate()
    with client_of(lab) as client:
        client.delete(key_of(freed))
    waiting.wait_ready(2 * PATIENCE)
    assert waiting.subnet() == freed
    assert waiting.log().count("out of subnets") == 1
    wait_meshed([daemon for daemon in daemons if daemon is not leaver])
