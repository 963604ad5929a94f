"""The udp backend as a whole: real daemons, whose tunnels carry the containers' packets."""

import errno
import json
import os
import re
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from network import (
    PATIENCE,
    MakeLab,
    Pings,
    client_of,
    count,
    etcd_of,
    key_of,
    leases,
    put_config,
    routes,
    start,
)
from overlay import (
    addresses,
    link,
    problems,
    start_containers,
    tcp_both_ways,
    the_link,
    udp_both_ways,
)

from bench.pairs import build, start_proxy
from lab import Container, Flanneld, Host, Lab, eventually
from lab.namespaces import CONFIG_KEY
from lab.process import freeze, is_running, thaw

FULL = 1472
PORT = 8285


def running(make_lab: MakeLab, hosts: int = 2, **keys: object) -> tuple[Lab, list[Flanneld]]:
    """Return a lab with a running udp network, and a container on each host that reaches all."""
    lab = make_lab(hosts)
    put_config(lab, Backend={"Type": "udp", **keys})
    daemons = start(*lab.hosts)
    start_containers(lab.hosts)
    wait_connected(lab)
    return lab, daemons


def connected(lab: Lab) -> bool:
    one, *others = (host.containers[0] for host in lab.hosts)
    return all(
        source.ping(target.address).lost == 0
        for other in others
        for source, target in ((one, other), (other, one))
    )


def wait_connected(lab: Lab) -> None:
    eventually(lambda: connected(lab), PATIENCE, "all containers to reach each other")


def tunnels_of(daemon: Flanneld) -> list[int]:
    """Return the process ids of the daemon's children that are tunnels."""
    tasks = Path(f"/proc/{daemon.pid}/task")
    pids = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "flannel-udp\n"]


def tunnel_of(daemon: Flanneld) -> int:
    """Return the process id of the daemon's tunnel."""
    found = eventually(lambda: tunnels_of(daemon), PATIENCE, "a tunnel")
    assert found is not None
    (pid,) = found
    return pid


def has_other_tunnel(daemon: Flanneld, pid: int) -> bool:
    """Whether the daemon has a tunnel, and not the one with this process id."""
    return tunnels_of(daemon) not in ([], [pid])


# As the original


@pytest.mark.parametrize("config", [{"Backend": {"Type": "udp"}}, {}], ids=["udp", "no Backend"])
def test_device_lease_and_file_are_the_originals(
    make_lab: MakeLab, config: dict[str, object]
) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    with client_of(lab) as client:
        backend = ', "Backend": {"Type": "udp"}' if config else ""
        client.put(CONFIG_KEY, '{"Network": "10.5.0.0/16"' + backend + "}")
    (daemon,) = start(host)
    subnet = daemon.subnet()
    (node,) = leases(lab).values()
    assert node.value == '{"PublicIP":"10.97.0.1"}'
    device = the_link(host, "flannel0")
    assert device["mtu"] == FULL
    assert {"POINTOPOINT", "NOARP", "UP"} <= set(device["flags"])
    assert device["linkinfo"]["info_kind"] == "tun"
    assert addresses(host, "flannel0") == [f"{subnet.network_address}/16"]
    (route,) = routes(host, "dev", "flannel0")
    assert (route["dst"], route["scope"]) == ("10.5.0.0/16", "link")
    assert host.subnet_env().mtu == FULL
    sockets = host.run(["ss", "-Hulnp"]).stdout
    assert f"10.97.0.1:{PORT}" in sockets
    assert problems(daemon) == []


def test_the_keys_port_and_mtu_count(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, Port=9000, MTU=1400)
    for daemon, host in zip(daemons, lab.hosts, strict=True):
        assert f"{host.address}:9000" in host.run(["ss", "-Hulnp"]).stdout
        assert the_link(host, "flannel0")["mtu"] == 1400 - 28
        assert host.subnet_env().mtu == 1400 - 28
        assert problems(daemon) == []


def test_containers_exchange_full_mtu_packets_tcp_udp_and_fragments(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    one, two = (host.containers[0] for host in lab.hosts)
    for source, target in ((one, two), (two, one)):
        for size, fits in ((FULL - 28, True), (FULL - 27, False)):
            ping = ["ping", "-n", "-M", "do", "-s", str(size), "-c", "3", "-i", "0.02", "-W", "2"]
            shown = source.run([*ping, str(target.address)], check=False)
            assert (shown.returncode == 0) == fits, shown.stdout
        tcp_both_ways(source, target, target.address, 4 << 20)
        for size in (1, FULL - 28, FULL - 27, 30_000):
            assert udp_both_ways(source, target, target.address, size) == source.address
    for n, host in enumerate(lab.hosts):
        # Host to container and back, with the device's address.
        own, (target,) = daemons[n].subnet().network_address, lab.hosts[1 - n].containers
        assert udp_both_ways(host, target, target.address, 1000) == own
        assert target.ping(own, 3).lost == 0


def test_a_peer_with_the_originals_proxy_works_both_ways(make_lab: MakeLab, tmp_path: Path) -> None:
    """The C loop moves one packet per system call, as the original does."""
    _, proxy = build(tmp_path)
    lab = make_lab(2)
    one, two = lab.hosts
    put_config(lab, Backend={"Type": "udp"})
    subnet = "10.5.77.0/24"
    with client_of(lab) as client:
        client.put(key_of(subnet), f'{{"PublicIP":"{two.address}"}}', ttl=1000)
    (daemon,) = start(one)
    two.subnet_file.write_text(
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.77.1/24\n"
        f"FLANNEL_MTU={FULL}\nFLANNEL_IPMASQ=false\n"
    )
    start_proxy(two, "10.5.77.0/16", daemon.subnet(), one.address, proxy)
    start_containers(lab.hosts)
    near, far = one.containers[0], two.containers[0]
    wait_connected(lab)
    assert near.ping(far.address, 5).lost == far.ping(near.address, 5).lost == 0
    tcp_both_ways(near, far, far.address, 4 << 20)
    tcp_both_ways(far, near, near.address, 4 << 20)
    for size in (1, FULL - 28, 5000):
        udp_both_ways(near, far, far.address, size)
        udp_both_ways(far, near, near.address, size)
    assert problems(daemon) == []


# The tunnel's process


def test_neither_a_frozen_daemon_nor_a_frozen_etcd_stalls_the_tunnel(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    pids = [daemon.pid for daemon in daemons]
    with Pings(lab.hosts) as pings:
        etcd_of(lab).freeze()
        pings.go_on(50)
        for pid in pids:
            freeze(pid)
        pings.go_on(50)
        for pid in pids:
            thaw(pid)
        etcd_of(lab).thaw()
        pings.go_on(10)


def test_a_tunnel_that_dies_is_started_again_and_the_reason_logged(make_lab: MakeLab) -> None:
    lab, (daemon, _) = running(make_lab)
    index = the_link(lab.hosts[0], "flannel0")["ifindex"]
    for _ in range(2):
        pid = tunnel_of(daemon)
        os.kill(pid, signal.SIGKILL)
        eventually(partial(has_other_tunnel, daemon, pid), PATIENCE, "a new tunnel")
        wait_connected(lab)
    # It has not lived long the second time: the same once more is no news.
    assert problems(daemon) == ["The udp tunnel has ended (killed by SIGKILL): it is started again"]
    # Its device was there all the time.
    assert the_link(lab.hosts[0], "flannel0")["ifindex"] == index


def test_nobody_is_told_unreachable_while_the_tunnel_is_started_again(make_lab: MakeLab) -> None:
    """What waits for the new tunnel is forwarded by it, once it knows the peers."""
    lab, (daemon, _) = running(make_lab)
    one, two = (host.containers[0] for host in lab.hosts)
    pid = tunnel_of(daemon)
    freeze(pid)
    client = one.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    with closing(client):
        client.setblocking(False)
        client.connect_ex((str(two.address), 7))
        os.kill(pid, signal.SIGKILL)
        assert select.select([], [client], [], PATIENCE)[1]
        # Nobody listens there: the answer comes from the container itself.
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


def test_the_tunnel_gets_no_secrets_and_is_not_ended_by_itself(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    put_config(lab, Backend={"Type": "udp"})
    daemon = Flanneld(lab.hosts[0], environ={"FLANNELD_ETCD_PASSWORD": "s3cret"}).start()
    daemon.wait_ready()
    pid = tunnel_of(daemon)
    assert b"s3cret" in Path(f"/proc/{daemon.pid}/environ").read_bytes()
    assert b"s3cret" not in Path(f"/proc/{pid}/environ").read_bytes()
    # A service manager that signals the whole control group.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(pid, number)
    time.sleep(0.2)
    assert tunnels_of(daemon) == [pid]
    masks = re.findall(r"^SigBlk:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert [int(mask, 16) for mask in masks] == [0]


def descriptors_at_rest(daemon: Flanneld) -> int:
    """Return how many it has once that changes no more: who keeps the rules starts programs."""
    daemon.wait_log("Masquerade and forward rules through", PATIENCE)
    seen: list[int] = []

    def settled() -> bool:
        seen.append(len(os.listdir(f"/proc/{daemon.pid}/fd")))
        return len(seen) > 10 and len(set(seen[-10:])) == 1

    eventually(settled, PATIENCE, "as many descriptors for ten looks")
    return seen[-1]


def test_without_free_descriptors_it_waits_for_some(make_lab: MakeLab) -> None:
    lab, (daemon, _) = running(make_lab)
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    open_now = descriptors_at_rest(daemon)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (open_now - 3, before[1]))
    os.kill(tunnel_of(daemon), signal.SIGKILL)
    daemon.wait_log(r"The udp tunnel has ended \(cannot be started: Too many open files\)")
    spent = cpu_seconds(daemon.pid)
    time.sleep(1.5)
    assert cpu_seconds(daemon.pid) - spent < 0.3
    assert count(daemon, "Too many open files") == 1
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
    wait_connected(lab)


def test_a_tunnel_that_is_stuck_is_replaced(make_lab: MakeLab) -> None:
    lab, (daemon, _) = running(make_lab)
    pid = tunnel_of(daemon)
    freeze(pid)
    daemon.wait_log(r"The udp tunnel has ended \(it does not answer for 5 s\)", 30)
    assert not is_running(pid)
    wait_connected(lab)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_tunnel_ends_with_its_daemon_and_the_next_takes_over(
    make_lab: MakeLab, number: signal.Signals
) -> None:
    lab, (daemon, _) = running(make_lab)
    host, subnet, pid = lab.hosts[0], daemon.subnet(), tunnel_of(daemon)
    if number is signal.SIGKILL:
        daemon.kill9()
    else:
        assert daemon.terminate() == 0
        assert link(host, "flannel0") is None
    daemon.start()
    daemon.wait_ready()
    assert not is_running(pid)
    assert daemon.subnet() == subnet
    # The name is in people's firewall rules.
    assert link(host, "flannel0") is not None
    assert link(host, "flannel1") is None
    wait_connected(lab)


def test_the_daemon_stays_free_of_numpy_and_the_tunnel_of_rights(make_lab: MakeLab) -> None:
    _, (daemon,) = running(make_lab, 1)
    pid = tunnel_of(daemon)
    assert "numpy" not in Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "numpy" in Path(f"/proc/{pid}/maps").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    assert re.search(r"^Uid:\t65534\t", status, re.MULTILINE)


# Peers come, go, move


def test_peers_come_go_and_move(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab)
    new = Flanneld(lab.add_host()).start()
    new.wait_ready()
    new.host.add_container()
    wait_connected(lab)
    one, two = daemons[0].host.containers[0], daemons[1].host.containers[0]
    # The second host's subnet is now said to be at the third: nothing comes back.
    node = leases(lab)[str(daemons[1].subnet())]
    daemons[1].kill9()
    with client_of(lab) as client:
        client.put(key_of(daemons[1].subnet()), '{"PublicIP":"10.97.0.99"}', ttl=1000)
        eventually(lambda: one.ping(two.address).lost == 1, PATIENCE, "the peer to have moved away")
        daemons[0].wait_log(rf"Subnet added: {daemons[1].subnet()} via 10.97.0.99")
        client.put(key_of(daemons[1].subnet()), node.value, ttl=1000)
        daemons[1].start()
        wait_connected(lab)
        new.kill9()
        client.delete(key_of(new.subnet()))
    daemons[0].wait_log(rf"Subnet removed: {new.subnet()}")
    far = new.host.containers[0].address
    eventually(lambda: connect_error(one, far) == errno.ENETUNREACH, PATIENCE, "no route to it")


def connect_error(container: Container, address: object) -> int:
    """Return the errno of an attempt to connect to an address by TCP."""
    probe = container.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    with closing(probe):
        probe.settimeout(1.0)
        try:
            return probe.connect_ex((str(address), 7))
        except TimeoutError:
            return errno.ETIMEDOUT


def test_leases_of_other_backends_count_as_with_the_original(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 1)
    with client_of(lab) as client:
        value = '{"PublicIP":"10.97.0.9","BackendType":"alloc"}'
        client.put(key_of("10.5.88.0/24"), value, ttl=1000)
    daemons[0].wait_log("Subnet added: 10.5.88.0/24 via 10.97.0.9")


# What is done by hand


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("link del flannel0", "flannel0 was gone: it is made anew"),
        ("link set flannel0 down", "flannel0 was set down: it is set up again"),
        ("addr del {address}/16 dev flannel0", "flannel0 has lost its address"),
        ("link set flannel0 mtu 1000", "MTU of flannel0: 1000, set to 1472"),
        ("route del 10.5.0.0/16", "Route recovered 10.5.0.0/16"),
        ("route replace 10.5.0.0/16 via 10.97.0.254", "Route recovered 10.5.0.0/16"),
    ],
)
def test_a_device_spoilt_by_hand_is_back(make_lab: MakeLab, command: str, words: str) -> None:
    lab, (daemon, _) = running(make_lab)
    host, one = lab.hosts[0], daemon.subnet().network_address
    host.ip(command.format(address=one))

    def as_before() -> bool:
        assert the_link(host, "flannel0")["mtu"] == FULL
        assert addresses(host, "flannel0") == [f"{one}/16"]
        assert [route["dst"] for route in routes(host, "dev", "flannel0")] == ["10.5.0.0/16"]
        return connected(lab)

    eventually(as_before, PATIENCE, "everything to be as before")
    daemon.wait_log(re.escape(words))
    assert count(daemon, words) == 1


@pytest.mark.parametrize(
    ("commands", "name"),
    [
        (["link set flannel0 name foo0", "link set foo0 down"], "flannel0"),
        (["link set flannel0 name foo0", "link add flannel0 type bridge"], "flannel1"),
        (["link set flannel0 netns {other}"], "flannel0"),
    ],
    ids=["renamed", "its name taken", "moved away"],
)
def test_a_device_that_is_not_ours_any_more_is_given_up(
    make_lab: MakeLab, commands: list[str], name: str
) -> None:
    lab, (daemon, _) = running(make_lab)
    host = lab.hosts[0]
    index = the_link(host, "flannel0")["ifindex"]
    host.ip(*(command.format(other=lab.underlay.name) for command in commands))
    wait_connected(lab)
    assert the_link(host, name)["ifindex"] != index
    assert link(host, "foo0") is None
    if name != "flannel0":
        # Who took the name keeps it, and is left alone.
        assert addresses(host, "flannel0") == []
        assert "UP" not in the_link(host, "flannel0")["flags"]
        daemon.wait_log(f"flannel0 was gone: it is made anew, as {name}")


def test_a_stuck_tunnel_does_not_keep_a_deleted_device_away(make_lab: MakeLab) -> None:
    lab, (daemon, _) = running(make_lab)
    freeze(tunnel_of(daemon))
    lab.hosts[0].ip("link del flannel0")
    wait_connected(lab)
    assert [line for line in problems(daemon) if "does not answer" in line] == []


def test_of_two_daemons_each_keeps_its_device(make_lab: MakeLab) -> None:
    lab, (first, _) = running(make_lab)
    host = lab.hosts[0]
    config = {"Network": "10.9.0.0/16", "Backend": {"Type": "udp", "Port": 9000}}
    with client_of(lab) as client:
        client.put("/two/config", json.dumps(config))
    second = Flanneld(host, "--etcd-prefix=/two", f"--subnet-file={host.directory / 'two.env'}")
    second.start().wait_ready()
    (own,) = addresses(host, "flannel1")
    assert first.terminate() == 0
    host.ip("link del flannel1")
    eventually(lambda: addresses(host, "flannel1") == [own], PATIENCE, "flannel1 to be back")
    first.start().wait_ready()
    wait_connected(lab)
    assert link(host, "flannel2") is None


def test_a_deleted_device_is_no_busy_loop(make_lab: MakeLab) -> None:
    lab, (daemon, _) = running(make_lab)
    lab.hosts[0].ip("link del flannel0")
    wait_connected(lab)
    before = cpu_seconds(daemon.pid) + cpu_seconds(tunnel_of(daemon))
    time.sleep(1.0)
    assert cpu_seconds(daemon.pid) + cpu_seconds(tunnel_of(daemon)) - before < 0.2


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Who is let in, and what is said


def test_strangers_are_kept_out_and_reported_once(make_lab: MakeLab) -> None:
    lab, (daemon, _) = running(make_lab)
    host = lab.hosts[0]
    stranger = lab.underlay.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with closing(stranger):
        for _ in range(7):
            stranger.sendto(bytes([0x45]) + bytes(40), (str(host.address), PORT))
        words = "The udp tunnel dropped packets: 7 from no peer's public IP"
        daemon.wait_log(re.escape(words), PATIENCE)
        stranger.sendto(bytes([0x45]) + bytes(40), (str(host.address), PORT))
        time.sleep(6.0)
    assert problems(daemon) == [words]
    assert connected(lab)


def test_sigusr1_has_the_counters_logged(make_lab: MakeLab) -> None:
    _, daemons = running(make_lab)
    for daemon in daemons:
        os.kill(daemon.pid, signal.SIGUSR1)
        daemon.wait_log(r"State: leased 10\.5\.\d+\.0/24, 1 peers, .* device flannel0: in order")
        found = daemon.wait_log(r"udp tunnel: tun_read_calls=(\d+) .* peers=1; [\d.]+ packets per")
        assert int(found[1]) > 0
        assert daemon.is_running


# Before and after


def test_from_vxlan_and_host_gw_to_udp_and_back(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    put_config(lab, Backend={"Type": "vxlan"})
    daemons = start(*lab.hosts)
    subnets = [daemon.subnet() for daemon in daemons]
    start_containers(lab.hosts)
    for backend in ("udp", "host-gw", "udp", "vxlan"):
        for daemon in daemons:
            daemon.terminate()
        put_config(lab, Backend={"Type": backend})
        for daemon in daemons:
            daemon.start()
        for daemon in daemons:
            daemon.wait_ready()
        assert [daemon.subnet() for daemon in daemons] == subnets
        for host in lab.hosts:
            eventually(devices_are(host, backend), PATIENCE, f"the devices of {backend}")
        wait_connected(lab)


def devices_are(host: Host, backend: str) -> Callable[[], bool]:
    """Return a check that the host has the device and the routes of this backend and no other."""

    def check() -> bool:
        assert (link(host, "flannel.1") is not None) is (backend == "vxlan")
        assert (link(host, "flannel0") is not None) is (backend == "udp")
        found = {route["dst"] for route in routes(host, "proto", "102")}
        assert ("10.5.0.0/16" in found) is (backend == "udp")
        assert len(found) == 1
        return True

    return check


def test_a_port_in_use_ends_it_with_one_clear_error(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    put_config(lab, Backend={"Type": "udp"})
    other = host.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with closing(other):
        other.bind((str(host.address), PORT))
        daemon = Flanneld(host).start()
        assert daemon.wait_exit() == 1
    (line,) = [line for line in problems(daemon) if "8285" in line]
    assert "UDP 10.97.0.1:8285 is in use" in line
    assert "another Port" in line
    assert link(host, "flannel0") is None
