"""The kernel says no: it is asked again, said once, and all is well when the cause is gone.

A real kernel takes rights away and has its buffers run over at will, but it is never out of memory
or space just when a test wants it. What stands in for that is `refuse.c`, a library put before the
daemon's C library, which makes the answers to its requests.
"""

import errno
import socket
import time
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
    mesh,
    peer_routes,
    put_config,
    routes,
    start,
    wait_meshed,
    wait_routes,
)
from overlay import (
    SOON,
    entries,
    link,
    problems,
    put_keys,
    put_peer,
    start_containers,
    the_link,
    wait_entries,
)
from overlay import mesh as vxlan_mesh

from lab import Flanneld, Host, Lab, eventually
from lab.daemon import FLANNELD
from lab.process import freeze, run, thaw

# Two rounds of trying again every second, and what may be late.
A_WHILE = 2.5

PEER, PEER_IP, PEER_MAC = "10.5.200.0/24", "10.97.0.77", "02:00:00:00:00:aa"

ORDERS = {
    "caps": "operation not permitted",
    f"send {errno.ENOBUFS}": "no buffer space available",
    f"answer {errno.ENOSPC}": "no space left on device",
    f"answer {errno.ENOMEM}": "cannot allocate memory",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes the kernel say no, compiled."""
    built = tmp_path_factory.mktemp("refuse") / "refuse.so"
    source = Path(__file__).with_name("refuse.c")
    run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", str(built), str(source), "-ldl"])
    return built


class Refused:
    """A daemon whose kernel says no on command, for this reason."""

    def __init__(self, host: Host, library: Path, order: str, reason: str) -> None:
        self._order, self._file = order, host.lab.scratch_file(f"{host.label}-refuse")
        self._file.touch()
        preload = (f"LD_PRELOAD={library}", f"FLANNEL_REFUSE={self._file}")
        self.daemon = Flanneld(host, program=("env", *preload, *FLANNELD)).start()
        self.reason = reason

    def begin(self) -> None:
        self._file.write_text(self._order)

    def end(self) -> None:
        self._file.write_text("")


def refused_hosts(make_lab: MakeLab, library: Path, **keys: object) -> tuple[Lab, list[Refused]]:
    """A running network with a host for each kind of refusal, nothing refused yet."""
    lab = make_lab(len(ORDERS))
    put_config(lab, Backend=keys)
    hosts = zip(lab.hosts, ORDERS.items(), strict=True)
    made = [Refused(host, library, *order) for host, order in hosts]
    for each in made:
        each.daemon.wait_ready(2 * PATIENCE)
    return lab, made


def everything_said(daemons: list[Flanneld]) -> list[list[str]]:
    return [problems(daemon) for daemon in daemons]


@pytest.mark.parametrize("kind", ["host-gw", "vxlan"])
def test_entries_that_the_kernel_does_not_take(make_lab: MakeLab, library: Path, kind: str) -> None:
    """A new peer has none, said once for each; the others' stay, and packets flow through them."""
    lab, made = refused_hosts(make_lab, library, Type=kind)
    daemons = [each.daemon for each in made]
    with Pings(lab.hosts), client_of(lab) as client:
        for each in made:
            each.begin()
        put_peer(client, PEER, PEER_IP, PEER_MAC, kind=kind)
        for each in made:
            each.daemon.wait_log(f"^E.*{each.reason}$", PATIENCE)
        time.sleep(A_WHILE)
        before = everything_said(daemons)
        for each, said in zip(made, before, strict=True):
            # A line for each entry, or one for all; none twice.
            assert 1 <= len([line for line in said if each.reason in line]) <= 3, said
            assert len(said) == len(set(said)), said
            assert PEER not in peer_routes(each.daemon.host)
        for each in made:
            each.end()
        for daemon in daemons:
            if kind == "vxlan":
                wanted = vxlan_mesh(daemons, daemon.host, (PEER, PEER_IP, PEER_MAC))
                wait_entries(daemon.host, wanted)
            else:
                wait_routes(daemon.host, mesh(daemons, daemon.host) | {PEER: PEER_IP})
            daemon.wait_log("takes our entries again|ecovered ")
        assert everything_said(daemons) == before


def test_a_device_that_the_kernel_does_not_make(make_lab: MakeLab, library: Path) -> None:
    """It was deleted by somebody, and cannot be made again."""
    lab, made = refused_hosts(make_lab, library, Type="vxlan")
    daemons = [each.daemon for each in made]
    start_containers(lab.hosts[:2])
    wanted = {daemon: vxlan_mesh(daemons, daemon.host) for daemon in daemons}
    for each in made:
        each.begin()
        each.daemon.host.ip("link del flannel.1")
    for each in made:
        each.daemon.wait_log(f"flannel.1: .*{each.reason}.* .trying again every second", PATIENCE)
    time.sleep(A_WHILE)
    for each, said in zip(made, everything_said(daemons), strict=True):
        # The device, and what else could not be asked for; the latter only if nothing can be.
        assert len(said) == len(set(said)) <= 2, said
        assert all(each.reason in line for line in said), said
        each.end()
    for daemon in daemons:
        wait_entries(daemon.host, wanted[daemon])
        daemon.wait_log("The device flannel.1 is in order again")
    source, target = (host.containers[0] for host in lab.hosts[:2])
    eventually(lambda: source.ping(target.address).lost == 0, PATIENCE, "an answer to a ping")


def test_a_new_device_that_is_not_in_order_yet_gets_no_entries(
    make_lab: MakeLab, library: Path
) -> None:
    """It was made anew and is up, but does not get its address; meanwhile a peer comes."""
    lab = make_lab(2)
    put_keys(lab)
    host, order = lab.hosts[0], f"address {errno.ENOBUFS}"
    refused = Refused(host, library, order, "no buffer space available")
    daemons = [refused.daemon, *start(lab.hosts[1])]
    wait_entries(host, vxlan_mesh(daemons, host))
    refused.begin()
    host.ip("link del flannel.1")
    refused.daemon.wait_log("cannot set the address of flannel.1: no buffer space", PATIENCE)
    with client_of(lab) as client:
        put_peer(client, PEER, PEER_IP, PEER_MAC)
    refused.daemon.wait_log(f"Subnet added: {PEER}", PATIENCE)
    time.sleep(A_WHILE)
    assert "UP" in the_link(host)["flags"]
    assert entries(host) == []
    refused.end()
    wait_entries(host, vxlan_mesh(daemons, host, (PEER, PEER_IP, PEER_MAC)))
    refused.daemon.wait_log("The device flannel.1 is in order again")
    assert "Error adding" not in refused.daemon.log()


@pytest.mark.parametrize("command", ["link del flannel0", "route del 10.5.0.0/16"])
def test_what_leads_to_the_udp_tunnel_and_the_kernel_does_not_take(
    make_lab: MakeLab, library: Path, command: str
) -> None:
    lab, made = refused_hosts(make_lab, library, Type="udp")
    start_containers(lab.hosts[:2])
    source, target = (host.containers[0] for host in lab.hosts[:2])
    eventually(lambda: source.ping(target.address).lost == 0, PATIENCE, "an answer to a ping")
    for each in made:
        each.begin()
        each.daemon.host.ip(command)
    for each in made:
        each.daemon.wait_log(f"^E.*{each.reason}", PATIENCE)
    time.sleep(A_WHILE)
    for each in made:
        said = [line for line in problems(each.daemon) if "is made anew" not in line]
        assert len(said) == len(set(said)) <= 2, said
        assert all(each.reason in line for line in said), said
        assert routes(each.daemon.host, "10.5.0.0/16") == []
        each.end()
    for each in made:
        each.daemon.wait_log(r"Route recovered 10\.5\.0\.0/16", PATIENCE)
    eventually(lambda: source.ping(target.address).lost == 0, PATIENCE, "an answer to a ping")


def test_without_the_capability_from_the_start(make_lab: MakeLab) -> None:
    """As in a container that was given too little."""
    lab = make_lab(2)
    put_config(lab)
    (peer,) = start(lab.hosts[1])
    drop = ("setpriv", "--bounding-set=-net_admin")
    # iptables would be refused, too.
    rules = "--iptables-forward-rules=false"
    daemon = Flanneld(lab.hosts[0], rules, program=(*drop, *FLANNELD)).start()
    message = f"Error adding route to {peer.subnet()} via 10.97.0.2: operation not permitted"
    daemon.wait_log(message, PATIENCE)
    time.sleep(A_WHILE)
    assert problems(daemon) == [message]
    assert daemon.terminate() == 0
    put_keys(lab)
    daemon.start()
    assert daemon.wait_exit(PATIENCE) == 1
    assert problems(daemon) == [
        "Error registering network: cannot set up flannel.1: operation not permitted"
    ]
    assert link(lab.hosts[0]) is None


def test_events_that_were_lost(make_lab: MakeLab) -> None:
    """The kernel's buffer runs over while the daemon sleeps: then everything is compared."""
    lab = make_lab(3)
    put_config(lab)
    daemons = start(*lab.hosts)
    wait_meshed(daemons)
    host, daemon = lab.hosts[0], daemons[0]
    gone, spoilt = (str(each.subnet()) for each in daemons[1:])
    freeze(daemon.pid)
    noise = [f"172.{16 + n // 65536}.{n // 256 % 256}.{n % 256}" for n in range(30_000)]
    host.run(["ip", "-batch", "-"], stdin="\n".join(f"route add blackhole {a}" for a in noise))
    # All after the buffer has run over.
    host.ip(
        f"route del {gone}",
        f"route replace {spoilt} via 10.97.0.99",
        "route add 10.5.250.0/24 via 10.97.0.99 proto 102",
    )
    rss = daemon.rss_kb()
    thaw(daemon.pid)
    wait_meshed(daemons)
    assert problems(daemon) == ["Kernel events were lost: comparing everything"]
    assert daemon.rss_kb() - rss < 20_000
    # What happens next is seen as ever.
    host.ip(f"route del {gone}")
    wait_meshed(daemons)
    assert count(daemon, "Kernel events were lost") == 1


# A device that is busy


def test_direct_routes_are_kept_while_the_device_cannot_be(make_lab: MakeLab) -> None:
    """Somebody has its VNI: what needs only eth0 is put right at once, the rest when it is free."""
    lab = make_lab(2)
    put_keys(lab, DirectRouting=True)
    daemons = start(*lab.hosts)
    host, daemon = lab.hosts[0], daemons[0]
    wait_meshed(daemons)
    with Pings(lab.hosts), client_of(lab) as client:
        eventually(partial(_renamed, host), PATIENCE, "flannel.1 to be renamed")
        daemon.wait_log("mine already uses VNI 1 on port 8472")
        # One peer on the link, one beyond a router.
        put_peer(client, PEER, PEER_IP, PEER_MAC)
        put_peer(client, "10.5.201.0/24", "192.168.9.9", "02:00:00:00:00:ab")
        direct = mesh(daemons, host) | {PEER: PEER_IP}
        wait_routes(host, direct)
        since = len(daemon.log())
        host.ip(f"route replace {PEER} via 10.97.0.99")
        wait_routes(host, direct, SOON)
        host.ip(f"route del {PEER}")
        wait_routes(host, direct, SOON)
        time.sleep(A_WHILE)
        assert problems(daemon, since) == []
        host.ip("link del mine")
        wait_routes(host, direct | {"10.5.201.0/24": "10.5.201.0"})
        eventually(lambda: len(entries(host)) == 3, PATIENCE, "the entries of the far peer")
    assert len([line for line in problems(daemon) if "mine already uses" in line]) == 1
    daemon.wait_log("The device flannel.1 is in order again")


def _renamed(host: Host) -> bool:
    batch = "link set flannel.1 down\nlink set flannel.1 name mine\n"
    return host.run(["ip", "-batch", "-"], stdin=batch, check=False).returncode == 0


def _taken_port() -> socket.socket:
    taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    taken.bind(("", 8473))
    return taken


def test_a_device_that_cannot_be_replaced_is_not_deleted(make_lab: MakeLab) -> None:
    """The config has another port by now, which a program or another device has: packets flow."""
    lab = make_lab(2)
    put_keys(lab)
    daemons = start(*lab.hosts)
    host, daemon = lab.hosts[0], daemons[0]
    wait_entries(host, vxlan_mesh(daemons, host))
    before = the_link(host)["ifindex"]
    with Pings(lab.hosts):
        daemon.terminate()
        put_keys(lab, Port=8473)
        with closing(host.inside(_taken_port)):
            assert daemon.start().wait_exit(PATIENCE) == 1
        assert "UDP port 8473 is in use by another program" in problems(daemon)[-1]
        host.ip("link add other type vxlan id 1 dstport 8473 local 10.97.0.1 dev eth0")
        assert daemon.start().wait_exit(PATIENCE) == 1
        assert "other already uses VNI 1 on port 8473" in problems(daemon)[-1]
    assert the_link(host)["ifindex"] == before
    assert entries(host) == vxlan_mesh(daemons, host)
    host.ip("link del other")
    daemon.start().wait_ready(PATIENCE)
    assert the_link(host)["ifindex"] != before
