"""etcd with certificates, with passwords, as a cluster; away, emptied, restored, misconfigured."""

import time

import pytest
from network import (
    PATIENCE,
    MakeLab,
    Pings,
    RouteMonitor,
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
    wait_settled,
)

from lab import Flanneld, eventually
from lab.certs import make as make_certificates
from lab.cluster import EtcdCluster
from lab.etcd import Login
from lab.namespaces import CONFIG_KEY, UNDERLAY
from lab.process import freeze, thaw


def errors(daemon: Flanneld) -> list[str]:
    return [line for line in daemon.log().splitlines() if line.startswith("E")]


def test_with_tls_and_client_certificates(make_lab: MakeLab) -> None:
    lab = make_lab(2, etcd=False)
    lab.start_etcd(tls=True)
    put_config(lab)
    daemons = start(*lab.hosts)
    wait_meshed(daemons)
    # Watches work over TLS, too, and end at once.
    with client_of(lab) as client:
        client.put(key_of("10.5.250.0/24"), value_of("10.97.0.99"), ttl=100)
    wait_routes(lab.hosts[0], mesh(daemons, lab.hosts[0]) | {"10.5.250.0/24": "10.97.0.99"})
    for daemon in daemons:
        assert daemon.terminate(4.5) == 0


def test_without_the_right_certificates_it_waits_and_says_why(make_lab: MakeLab) -> None:
    lab = make_lab(1, etcd=False)
    lab.start_etcd(tls=True)
    put_config(lab)
    strangers = make_certificates(lab.directory / "strangers", [UNDERLAY.ip])
    for flags, reason in (
        (["--etcd-certfile=", "--etcd-keyfile="], "certificate required|bad certificate"),
        ([f"--etcd-cafile={strangers.ca}"], "certificate verify failed"),
    ):
        daemon = Flanneld(lab.hosts[0], *flags).start()
        daemon.wait_log(f"(?i)^E.*Couldn't fetch network config: .*({reason})")
        time.sleep(1.5)
        assert daemon.ready_after() is None
        assert len(errors(daemon)) == 1
        assert daemon.terminate(4.5) == 0


def test_with_a_password(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab)
    etcd_of(lab).enable_auth(Login("flannel", "s3crét: &?"))
    daemons = start(*lab.hosts)
    wait_meshed(daemons)
    # Passwords belong in no log.
    assert not any("s3cr" in daemon.log() for daemon in daemons)


def test_with_a_wrong_password_it_waits_until_that_is_mended(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    put_config(lab)
    etcd = etcd_of(lab)
    etcd.enable_auth(Login("flannel", "right"))
    daemon = Flanneld(lab.hosts[0], "--etcd-password=wrong").start()
    daemon.wait_log("^E.*Couldn't fetch network config: .*check --etcd-username and")
    time.sleep(2.5)
    assert len(errors(daemon)) == 1
    assert daemon.ready_after() is None
    with etcd.client(Login("root", "right")) as root:
        root.auth("users/flannel", {"user": "flannel", "password": "wrong"})
    daemon.wait_ready()


def test_of_three_endpoints_one_may_be_dead_at_any_time(make_lab: MakeLab) -> None:
    """The first at the start, another one later; no host that joins meanwhile is missed."""
    lab = make_lab(3, etcd=False)
    cluster: EtcdCluster = lab.start_etcd_cluster(3)
    put_config(lab)
    first, second, _ = cluster.members
    first.kill()
    cluster.wait_healthy(without=first)
    one, two, three = lab.hosts
    daemons = start(one, two)
    wait_meshed(daemons, 2 * PATIENCE)
    first.start()
    second.kill()
    cluster.wait_healthy(without=second)
    daemons += start(three)
    wait_meshed(daemons, 2 * PATIENCE)
    assert all(daemon.is_running for daemon in daemons)


def test_the_first_of_three_endpoints_does_not_exist(make_lab: MakeLab) -> None:
    """Neither where nobody listens nor where no host is; three tries, as the order is random."""
    lab = make_lab(1)
    put_config(lab)
    nowhere = f"http://{UNDERLAY.ip}:9,http://10.97.0.253:2379"
    daemon = Flanneld(lab.hosts[0], f"--etcd-endpoints={nowhere},{etcd_of(lab).url}")
    for _ in range(3):
        daemon.start().wait_ready(2 * PATIENCE)
        assert daemon.terminate(4.5) == 0


def test_etcd_away_for_a_while_costs_no_packet_and_few_lines(make_lab: MakeLab) -> None:
    """Stopped and started. Afterwards everything is as if nothing had been."""
    lab, daemons = running(make_lab, 3)
    etcd = etcd_of(lab)
    wait_settled(daemons)
    before = [daemon.log().count("\n") for daemon in daemons]
    with Pings(lab.hosts) as pings:
        monitors = [RouteMonitor(host) for host in lab.hosts]
        etcd.stop()
        for daemon in daemons:
            daemon.wait_log("^E.*Watch subnets: ")
        time.sleep(4.0)
        pings.go_on(20)
        for daemon in daemons:
            assert peer_routes(daemon.host) == mesh(daemons, daemon.host)
            # Neither one for each of both watches, nor one for each reason.
            assert len(errors(daemon)) == 1
        etcd.start()
        for daemon in daemons:
            daemon.wait_log("^I.*Watch subnets is back")
        pings.go_on(20)
        for monitor in monitors:
            assert monitor.lines() == []
    for daemon, lines in zip(daemons, before, strict=True):
        assert daemon.log().count("\n") - lines == 2
        assert count(daemon, "Subnet removed") == 0
    # Who joins and who leaves afterwards is seen.
    fourth = lab.add_host()
    daemons += start(fourth)
    wait_meshed(daemons)
    leaver = daemons.pop(0)
    gone = leaver.subnet()
    leaver.terminate()
    with client_of(lab) as client:
        client.delete(key_of(gone))
    wait_meshed(daemons)


def test_what_happened_while_this_host_was_cut_off_is_caught_up_with(make_lab: MakeLab) -> None:
    """A peer came, one left, one moved; the host's own lease was deleted."""
    lab, daemons = running(make_lab, 2)
    one, two = lab.hosts
    daemon = daemons[0]
    with client_of(lab) as client:
        for number in (1, 2):
            client.put(key_of(f"10.5.20{number}.0/24"), value_of(f"10.97.0.10{number}"), ttl=600)
        wait_routes(
            one,
            mesh(daemons, one) | {"10.5.201.0/24": "10.97.0.101", "10.5.202.0/24": "10.97.0.102"},
        )
        one.unplug()
        client.put(key_of("10.5.203.0/24"), value_of("10.97.0.103"), ttl=600)
        client.put(key_of("10.5.202.0/24"), value_of("10.97.0.112"), ttl=600)
        client.delete(key_of("10.5.201.0/24"))
        client.delete(key_of(daemon.subnet()))
        wait_routes(two, {"10.5.203.0/24": "10.97.0.103", "10.5.202.0/24": "10.97.0.112"})
        one.plug()
    made_up = {"10.5.203.0/24": "10.97.0.103", "10.5.202.0/24": "10.97.0.112"}
    wait_routes(one, mesh(daemons, one) | made_up, 2 * PATIENCE)
    wait_routes(two, mesh(daemons, two) | made_up, 2 * PATIENCE)
    assert daemon.is_running


@pytest.mark.parametrize("how", ["wiped", "restored from a backup"])
def test_etcd_that_lost_data_gets_all_leases_back_and_no_packet_is_lost(
    make_lab: MakeLab, how: str
) -> None:
    lab = make_lab(3)
    put_config(lab)
    etcd = etcd_of(lab)
    one, two, three = lab.hosts
    daemons = start(one)
    backup = etcd.backup()
    daemons += start(two, three)
    wait_meshed(daemons)
    subnets = {str(daemon.subnet()): value_of(daemon.host.address) for daemon in daemons}
    # A host whose daemon is down just now: it cannot publish its lease again, but it is there.
    with client_of(lab) as client:
        # Often, so that the backup is older than what is soon written anew, which hides its age.
        for _ in range(20):
            client.put(key_of("10.5.250.0/24"), value_of("10.97.0.99"), ttl=600)
    silent = {"10.5.250.0/24": "10.97.0.99"}
    for host in lab.hosts:
        wait_routes(host, mesh(daemons, host) | silent)
    with Pings([two, three]) as pings:
        monitors = [RouteMonitor(host) for host in lab.hosts]
        if how == "wiped":
            etcd.wipe()
        else:
            etcd.restore(backup)
        for subnet, value in subnets.items():
            wait_lease(lab, subnet, lambda node, value=value: node.value == value)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        # Longer than a lease that was deleted on purpose would stay.
        time.sleep(1.5)
        pings.go_on(10)
        for monitor in monitors:
            assert monitor.deleted() == []
    assert set(leases(lab)) == set(subnets)
    assert all(daemon.is_running for daemon in daemons)
    for daemon in daemons:
        daemon.wait_log("The store has lost [1-3] leases")
    # The watches work on the new count of events: who takes a held subnet gets its route.
    put_config(lab)
    with client_of(lab) as client:
        client.put(key_of("10.5.250.0/24"), value_of("10.97.0.98"), ttl=600)
    daemons += start(lab.add_host())
    for host in lab.hosts:
        wait_routes(host, mesh(daemons, host) | {"10.5.250.0/24": "10.97.0.98"})


def test_etcd_frozen_and_thawed_is_no_event(make_lab: MakeLab) -> None:
    """It hangs: connections stay open, nothing is answered, for longer than any timeout."""
    lab, daemons = running(make_lab, 2)
    etcd = etcd_of(lab)
    with Pings(lab.hosts) as pings:
        etcd.freeze()
        time.sleep(6.0)
        pings.go_on(10)
        etcd.thaw()
        with client_of(lab) as client:
            client.put(key_of("10.5.250.0/24"), value_of("10.97.0.99"), ttl=100)
        for host in lab.hosts:
            wait_routes(host, mesh(daemons, host) | {"10.5.250.0/24": "10.97.0.99"})
    assert not any("Subnet removed" in daemon.log() for daemon in daemons)


def test_mistakes_in_the_config_are_named_and_waited_out(make_lab: MakeLab) -> None:
    """One line for each, however often it is looked at; the correction is found in a second."""
    lab = make_lab(1)
    daemon = Flanneld(lab.hosts[0]).start()
    daemon.wait_log("^E.*Couldn't fetch network config: 100: Key not found")
    mistakes = [
        ("{bad", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "Network is missing"),
        ('{"Network":"10.5.0.0"}', "invalid CIDR address: 10.5.0.0; set Network"),
        ('{"Network":"fd00::/48"}', "invalid CIDR address: fd00::/48; set Network"),
        ('{"Network":"10.5.0.0/16","Backend":{}}', "Backend has no Type"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":7}}', "Type must be a string"),
        ('{"Network":"10.5.0.0/16","SubnetLen":31}', "SubnetLen must be less than /31"),
        ('{"Network":"10.5.0.0/16","SubnetMin":"10.6.0.0"}', "SubnetMin is not in the range"),
        (
            '{"Network":"10.5.0.0/16","SubnetMax":"10.5.1.7"}',
            "SubnetMax is not on a SubnetLen boundary: 10.5.1.7",
        ),
    ]
    with client_of(lab) as client:
        for text, words in mistakes:
            client.put(CONFIG_KEY, text)
            daemon.wait_log(f"(?m)^E.*Couldn't fetch network config: .*{words}")
            status = eventually(lambda: daemon.notifications[-1].text, PATIENCE, "a status")
            assert status.startswith("STATUS=waiting for the network config: ")
    assert len(errors(daemon)) == 1 + len(mistakes)
    assert daemon.ready_after() is None
    assert not daemon.host.subnet_file.exists()
    put_config(lab)
    daemon.wait_ready()


def test_the_watch_survives_a_history_that_is_gone(make_lab: MakeLab) -> None:
    """etcd remembers 1,000 events; a daemon that slept through more takes a snapshot instead."""
    lab, daemons = running(make_lab, 2)
    daemon = daemons[0]
    one = lab.hosts[0]
    with client_of(lab) as client:
        client.put(key_of("10.5.201.0/24"), value_of("10.97.0.101"), ttl=600)
        client.put(key_of("10.5.202.0/24"), value_of("10.97.0.102"), ttl=600)
        wait_routes(
            one,
            mesh(daemons, one) | {"10.5.201.0/24": "10.97.0.101", "10.5.202.0/24": "10.97.0.102"},
        )
        freeze(daemon.pid)
        client.put(key_of("10.5.203.0/24"), value_of("10.97.0.103"), ttl=600)
        client.put(key_of("10.5.202.0/24"), value_of("10.97.0.112"), ttl=600)
        client.delete(key_of("10.5.201.0/24"))
        for number in range(1100):
            client.put(f"/elsewhere/{number % 10}", str(number))
        thaw(daemon.pid)
        made_up = {"10.5.203.0/24": "10.97.0.103", "10.5.202.0/24": "10.97.0.112"}
        wait_routes(one, mesh(daemons, one) | made_up)
        client.put(key_of("10.5.204.0/24"), value_of("10.97.0.104"), ttl=600)
    wait_routes(one, mesh(daemons, one) | made_up | {"10.5.204.0/24": "10.97.0.104"})
    assert len(errors(daemon)) == 0
