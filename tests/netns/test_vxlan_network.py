"""The vxlan network as its containers see it, and what keeps it running: nothing but the kernel."""

import json
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from network import (
    PATIENCE,
    MakeLab,
    Pings,
    RouteMonitor,
    client_of,
    key_of,
    leases,
    routes,
    start,
)
from overlay import (
    add_peer_by_hand,
    addresses,
    entries,
    lease_mac,
    lines,
    mac_of,
    make_vxlan,
    mesh,
    of_peers,
    problems,
    put_keys,
    put_peer,
    running,
    start_containers,
    tcp_both_ways,
    the_link,
    udp_both_ways,
    wait_entries,
    write_subnet_env,
)

from lab import Flanneld, Host, eventually
from lab.namespaces import CONFIG_KEY
from lab.process import freeze, thaw

RECORDED = Path(__file__).parents[1] / "fixtures" / "backends"

FULL = 1450


# What the containers see


def test_containers_exchange_full_mtu_packets_tcp_udp_and_fragments(make_lab: MakeLab) -> None:
    lab, _ = running(make_lab)
    one, two = (host.add_container() for host in lab.hosts)
    for source, target in ((one, two), (two, one)):
        # 28 bytes of each packet are the headers of IP and ICMP.
        for size, fits in ((FULL - 28, True), (FULL - 27, False)):
            ping = ["ping", "-n", "-M", "do", "-s", str(size), "-c", "3", "-i", "0.02", "-W", "2"]
            shown = source.run([*ping, str(target.address)], check=False)
            assert (shown.returncode == 0) == fits, shown.stdout
        assert f"mtu={FULL}" in shown.stdout + shown.stderr
        tcp_both_ways(source, target, target.address, 4 << 20)
        for size in (1, FULL - 28, FULL - 27, 30_000, 65_507):
            assert udp_both_ways(source, target, target.address, size) == source.address


def test_host_to_container_uses_the_devices_address(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    start_containers(lab.hosts)
    for n, host in enumerate(lab.hosts):
        own = daemons[n].subnet().network_address
        (target,) = lab.hosts[1 - n].containers
        assert host.ping(target.address, 3).lost == 0
        assert udp_both_ways(host, target, target.address, 1000) == own
        tcp_both_ways(host, target, target.address, 1 << 20)
        # And back: a container reaches the other host by that address.
        assert target.ping(own, 3).lost == 0


def test_only_vxlan_is_on_the_wire(make_lab: MakeLab) -> None:
    """The containers' packets take no other way: without the port they are lost."""
    lab, _ = running(make_lab)
    start_containers(lab.hosts)
    one, two = (host.containers[0] for host in lab.hosts)
    assert one.ping(two.address, 3).lost == 0
    lab.hosts[0].run(["iptables", "-A", "OUTPUT", "-p", "udp", "--dport", "8472", "-j", "DROP"])
    assert one.ping(two.address, 3, deadline=0.3).lost == 3


# No packet waits for the daemon


def test_the_first_ping_to_a_new_peer_is_answered(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    start_containers(lab.hosts)
    new = Flanneld(lab.add_host()).start()
    new.wait_ready()
    daemons.append(new)
    for host in lab.hosts:
        wait_entries(host, mesh(daemons, host))
    container = new.host.add_container()
    # With the daemons unable to do anything for it.
    for daemon in daemons:
        freeze(daemon.pid)
    try:
        assert lab.hosts[0].containers[0].ping(container.address, 1).missing == ()
        assert container.ping(lab.hosts[1].containers[0].address, 1).missing == ()
    finally:
        for daemon in daemons:
            thaw(daemon.pid)


def test_the_network_lives_on_without_its_daemons(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    for daemon in daemons:
        daemon.kill9()
    one, two = (host.add_container() for host in lab.hosts)
    assert one.ping(two.address, 1).missing == ()
    for host in lab.hosts:
        # Nothing of it ages.
        neighbours = host.ip_json("neigh", "show", "dev", "flannel.1")
        assert [each["state"] for each in neighbours] == [["PERMANENT"]]
        assert entries(host) == mesh(daemons, host)


# Restarts


class Watch:
    """Everything that happens to a host's device and entries, its addresses included."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._output = host.lab.scratch_file(f"{host.label}-all")
        host.popen(
            ["ip", "-4", "-oneline", "monitor", "link", "addr", "neigh"], output=self._output
        )
        self._routes = RouteMonitor(host)
        eventually(self._listens, PATIENCE, "ip monitor to listen")

    def _listens(self) -> bool:
        self._host.ip("link add mark type bridge", "link del mark")
        return self._output.exists() and "mark" in self._output.read_text()

    def lines(self) -> list[str]:
        """Return the events that concern flannel.1."""
        seen = [*self._routes.lines(), *self._output.read_text().splitlines()]
        return [line for line in seen if "flannel.1" in line]


@pytest.mark.parametrize("how", ["SIGTERM", "kill -9"])
def test_a_restart_adopts_everything_and_loses_no_packet(make_lab: MakeLab, how: str) -> None:
    lab, daemons = running(make_lab)
    one, daemon = lab.hosts[0], daemons[0]
    before = (the_link(one)["ifindex"], mac_of(one), addresses(one), entries(one))
    lease = leases(lab)[str(daemon.subnet())]
    watches = [Watch(host) for host in lab.hosts]
    with Pings(lab.hosts) as pings:
        for _ in range(2):
            if how == "SIGTERM":
                assert daemon.terminate() == 0
            else:
                daemon.kill9()
            assert entries(one) == before[-1]
            pings.go_on(10)
            daemon.start()
            daemon.wait_ready()
            pings.go_on(10)
    assert (the_link(one)["ifindex"], mac_of(one), addresses(one), entries(one)) == before
    assert leases(lab)[str(daemon.subnet())].value == lease.value
    # Neither the device nor an entry was touched.
    assert [watch.lines() for watch in watches] == [[], []]
    assert problems(daemon) == []


# Golden: lease in, exact entries out


def recorded(case: str, host: str, command: str, device: str) -> list[str]:
    text = (RECORDED / case / f"{host}-state-idle.txt").read_text()
    section = text.split(f"$ {command}\n")[1].split("\n\n")[0]
    found = [line.strip() for line in section.splitlines()]
    return sorted(line for line in found if f"dev {device}" in line and "table local" not in line)


@pytest.mark.parametrize(
    ("case", "device"), [("v0202-vxlan", "flannel.1"), ("v0202-vxlan-directrouting", "eth0")]
)
def test_the_kernel_shows_what_it_showed_for_the_later_original(
    make_lab: MakeLab, case: str, device: str
) -> None:
    """The recorded leases, and the same lines of ip and bridge; the protocol number apart."""
    lab = make_lab(2)
    one = lab.hosts[0]
    pairs = (RECORDED / case / "etcd-v3.txt").read_text().splitlines()
    with client_of(lab) as client:
        client.put(CONFIG_KEY, (RECORDED / case / "config.json").read_text())
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if "/subnets/" in key:
                client.put(key, value, ttl=1000)
    # The device with the MAC of the lease that is this host's.
    (own,) = [node for node in leases(lab).values() if '"10.97.0.1"' in node.value]
    subnet = own.name.replace("-", "/")
    make_vxlan(one, subnet, own.json()["BackendData"]["VtepMAC"])
    (daemon,) = start(one)
    assert str(daemon.subnet()) == subnet
    assert lines(one, "ip", "-4", "route", "show") == sorted(
        {
            *recorded(case, "h1", "ip -4 route show table all", "eth0"),
            *recorded(case, "h1", "ip -4 route show table all", device),
        }
    )
    assert [line for line in lines(one, "ip", "-4", "neigh") if "flannel.1" in line] == recorded(
        case, "h1", "ip neigh", "flannel.1"
    )
    assert [
        line for line in lines(one, "bridge", "fdb", "show") if "flannel.1" in line
    ] == recorded(case, "h1", "bridge fdb show", "flannel.1")


# Go flanneld as a peer


@pytest.mark.parametrize("data", ['{"VtepMAC":"%s"}', '{"VNI":1,"VtepMAC":"%s"}'])
@pytest.mark.parametrize("since_v09", [False, True], ids=["v0.8.0", "since v0.9.0"])
def test_a_go_peer_works_both_ways(make_lab: MakeLab, data: str, since_v09: bool) -> None:
    """What Go's daemon would have done is done by hand, with the lease it would have written."""
    lab = make_lab(2)
    one, two = lab.hosts
    put_keys(lab)
    subnet, mac = "10.5.77.0/24", "aa:7b:75:bf:06:90"
    with client_of(lab) as client:
        put_peer(client, subnet, two.address, mac, data=data % mac)
    (daemon,) = start(one)
    assert entries(one) == of_peers([(subnet, two.address, mac)])
    make_vxlan(two, subnet, mac)
    write_subnet_env(two, subnet)
    start_containers(lab.hosts)
    near, far = one.containers[0], two.containers[0]
    own, own_mac = daemon.subnet(), lease_mac(daemon)
    if since_v09:
        add_peer_by_hand(two, str(own), one.address, own_mac)
    else:
        # A neighbour for each address, as its daemon answers the kernel's questions.
        two.ip(
            "route add 10.5.0.0/16 dev flannel.1",
            *(
                f"neigh replace {address} lladdr {own_mac} dev flannel.1 nud reachable"
                for address in (near.address, own.network_address)
            ),
        )
        fdb = ["dev", "flannel.1", "dst", str(one.address)]
        two.run(["bridge", "fdb", "add", own_mac, *fdb])
    assert near.ping(far.address, 3).lost == 0
    assert far.ping(near.address, 3).lost == 0
    tcp_both_ways(near, far, far.address, 1 << 20)
    udp_both_ways(far, near, near.address, 5000)
    assert one.ping(far.address, 3).lost == 0
    assert problems(daemon) == []


# Two networks on one host


def test_two_vnis_by_two_daemons_do_not_disturb_each_other(make_lab: MakeLab) -> None:
    lab, first = running(make_lab)
    config = {"Network": "10.9.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}
    with client_of(lab) as client:
        client.put("/two/config", json.dumps(config))
    files = {host: host.directory / "two.env" for host in lab.hosts}
    second = [
        Flanneld(host, "--etcd-prefix=/two", f"--subnet-file={files[host]}").start()
        for host in lab.hosts
    ]
    for daemon in second:
        daemon.wait_ready()
    with client_of(lab) as client:
        found = client.list("/two/subnets").values()
    peers = {
        node.json()["PublicIP"]: (
            node.name.replace("-", "/"),
            node.json()["PublicIP"],
            node.json()["BackendData"]["VtepMAC"],
        )
        for node in found
    }

    def as_wanted(host: Host, other: Host) -> bool:
        assert entries(host) == mesh(first, host)
        assert entries(host, "flannel.2") == of_peers([peers[str(other.address)]])
        return True

    one, two = lab.hosts
    for host, other in ((one, two), (two, one)):
        eventually(partial(as_wanted, host, other), PATIENCE, f"two networks on {host.label}")
    watch, kept = Watch(one), entries(one, "flannel.2")
    with Pings(lab.hosts) as pings:
        for daemon in (first[0], second[0]):
            daemon.kill9()
            daemon.start()
            daemon.wait_ready()
        # What one of them mends is none of the other's business.
        one.ip("link del flannel.2")
        eventually(lambda: entries(one, "flannel.2") == kept, PATIENCE, "flannel.2 to be back")
        pings.go_on(10)
    assert watch.lines() == []
    assert entries(one) == mesh(first, one)
    assert problems(first[0]) == []
    # Traffic in the second, too: its containers sit behind the same bridges.
    _ping_in_the_second(lab.hosts, [IPv4Network(peers[str(h.address)][0]) for h in lab.hosts])


def _ping_in_the_second(hosts: list[Host], subnets: list[IPv4Network]) -> None:
    containers = [host.containers[0] for host in hosts]
    for host, container, subnet in zip(hosts, containers, subnets, strict=True):
        host.ip(f"addr add {subnet.network_address + 1}/24 dev cni0")
        container.ip(
            f"addr add {subnet.network_address + 2}/24 dev eth0",
            f"route add 10.9.0.0/16 via {subnet.network_address + 1}",
        )
    for container, subnet in zip(containers, reversed(subnets), strict=True):
        assert container.ping(subnet.network_address + 2, 3).lost == 0


def test_a_lease_key_is_where_go_looks_for_it(make_lab: MakeLab) -> None:
    lab, (daemon,) = running(make_lab, 1)
    assert key_of(daemon.subnet()).startswith("/coreos.com/network/subnets/10.5.")
    assert list(leases(lab)) == [str(daemon.subnet())]
    assert routes(lab.hosts[0], "proto", "102") == []
