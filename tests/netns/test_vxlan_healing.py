"""Whatever somebody does to the device and its entries by hand, the daemon puts it right."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
from network import PATIENCE, MakeLab, client_of, start, wait_settled
from overlay import (
    SOON,
    addresses,
    entries,
    link,
    mac_of,
    mesh,
    of_peers,
    problems,
    put_keys,
    put_peer,
    running,
    start_containers,
    the_link,
    wait_entries,
)

from lab import Flanneld, Host, Lab, eventually
from lab.namespaces import UNDERLAY
from lab.process import freeze, thaw


@dataclass(frozen=True, slots=True)
class State:
    """All of a host's network that flanneld is responsible for."""

    mac: str
    mtu: int
    flags: frozenset[str]
    addresses: tuple[str, ...]
    entries: tuple[str, ...]

    @classmethod
    def of(cls, host: Host) -> "State | None":
        """Return the present state; None without a device."""
        device = link(host)
        if device is None:
            return None
        return cls(
            device["address"],
            device["mtu"],
            frozenset(device["flags"]),
            tuple(addresses(host)),
            tuple(entries(host)),
        )


def wait_state(host: Host, wanted: State | None, timeout: float = SOON) -> None:
    """Wait until a host is as it was. Two seconds are what is promised."""

    def as_wanted() -> bool:
        found = State.of(host)
        assert found == wanted
        return True

    eventually(as_wanted, timeout, f"{host.label} as it was")


@pytest.fixture(scope="module")
def pair(_machine: None) -> Iterator[Lab]:
    """Two running hosts that several tests share."""
    with Lab(2) as lab:
        put_keys(lab)
        for daemon in start(*lab.hosts):
            wait_entries(daemon.host, mesh(lab.daemons, daemon.host))
        yield lab


def connected(make_lab: MakeLab, **keys: object) -> tuple[Lab, Host, Flanneld, State]:
    """Return two running hosts with a container each, the first host, its daemon and state."""
    lab, daemons = running(make_lab, 2, **keys)
    start_containers(lab.hosts)
    wait_settled(daemons)
    state = State.of(lab.hosts[0])
    assert state is not None
    return lab, lab.hosts[0], daemons[0], state


def spoil(host: Host, commands: Sequence[str], **values: str) -> None:
    """Carry out commands of ``ip``, or of ``bridge`` where they begin with it."""
    for command in commands:
        words = command.format(**values).split()
        host.run(words if words[0] == "bridge" else ["ip", *words])


@pytest.mark.parametrize(
    ("commands", "line"),
    [
        (["link del flannel.1"], "flannel.1 was gone: it is made anew"),
        (["link set flannel.1 down"], "flannel.1 was set down: it is set up again"),
        (
            ["addr del {address} dev flannel.1"],
            "flannel.1 has lost its address {address}: it is put back",
        ),
        (
            ["link set flannel.1 address 02:00:00:00:00:99"],
            "flannel.1 has got another MAC, 02:00:00:00:00:99: ours, {mac}, is put back",
        ),
        (["link set flannel.1 mtu 1300"], "MTU of flannel.1: 1300, set to 1450"),
        (
            ["addr add 10.5.250.0/32 dev flannel.1"],
            "Removed IP address 10.5.250.0/32 from flannel.1",
        ),
        (
            ["link set flannel.1 type vxlan learning"],
            '"flannel.1" already exists with incompatible configuration: learning: True vs False;'
            " recreating device",
        ),
    ],
    ids=["deleted", "down", "address", "MAC", "MTU", "another address", "changed"],
)
def test_a_device_spoilt_by_hand_is_back_at_once_and_the_log_says_it_in_one_line(
    make_lab: MakeLab, commands: list[str], line: str
) -> None:
    lab, host, daemon, state = connected(make_lab)
    source, target = (each.containers[0] for each in lab.hosts)
    line = line.format(address=state.addresses[0], mac=state.mac)
    ping = source.start_ping(target.address)
    for _ in range(2):
        ping.wait_received(5)
        since = len(daemon.log())
        spoil(host, commands, address=state.addresses[0])
        wait_state(host, state)
        ping.wait_received(5, SOON)
        said = re.findall(r"^\w\d{4} [^]]*\] (.*)$", daemon.log()[since:], re.MULTILINE)
        # Beside it only which entries it had cost.
        assert [s for s in said if not s.startswith(("Route recovered ", "Recovered "))] == [line]
    ping.stop()


def test_a_device_that_was_renamed_is_named(make_lab: MakeLab) -> None:
    """Nothing but a person can tell whose it is now; it is not deleted."""
    _, host, daemon, state = connected(make_lab)
    # Both in one run of ip, and now and then too late: the daemon is quick to set it up again.
    eventually(partial(_renamed, host), PATIENCE, "flannel.1 to be renamed")
    daemon.wait_log(
        "cannot make flannel.1: mine already uses VNI 1 on port 8472: delete it, or set another"
        r" VNI or Port in the network config \(trying again every second\)"
    )
    assert link(host, "mine") is not None
    host.ip("link del mine")
    wait_state(host, state)
    assert len([line for line in problems(daemon) if "mine already uses" in line]) == 1


def _renamed(host: Host) -> bool:
    batch = "link set flannel.1 down\nlink set flannel.1 name mine\n"
    return host.run(["ip", "-batch", "-"], stdin=batch, check=False).returncode == 0


@pytest.mark.parametrize(
    "commands",
    [
        ["neigh del {gateway} dev flannel.1"],
        ["neigh replace {gateway} dev flannel.1 lladdr 02:00:00:00:00:99 nud permanent"],
        ["neigh replace {gateway} dev flannel.1 lladdr {mac} nud reachable"],
        ["bridge fdb del {mac} dev flannel.1"],
        ["bridge fdb replace {mac} dev flannel.1 dst 10.97.0.99"],
        ["route del {subnet}"],
        ["route replace blackhole {subnet}"],
        ["route replace {subnet} via 10.97.0.2"],
        ["route replace {subnet} dev flannel.1"],
        ["neigh flush dev flannel.1 nud permanent", "route flush proto 102"],
        ["neigh add 10.5.250.0 dev flannel.1 lladdr 02:00:00:00:00:99 nud permanent"],
        ["bridge fdb add 02:00:00:00:00:99 dev flannel.1 dst 10.97.0.99"],
        ["bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 10.97.0.99"],
        ["bridge fdb append 02:00:00:00:00:99 dev flannel.1 dst 10.97.0.99 port 4790 vni 7"],
        ["bridge fdb replace {mac} dev flannel.1 dst 10.97.0.99 port 4790 vni 7"],
        [
            "bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 10.97.0.99 port 4790",
            "bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 10.97.0.99 vni 7",
            "bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 10.97.0.99 via eth0",
            "bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 10.97.0.99",
        ],
        ["route add 10.5.250.0/24 dev flannel.1"],
        ["route add 10.5.250.0/24 via 10.5.250.0 dev flannel.1 onlink proto 102"],
    ],
    ids=lambda commands: commands[0].replace("flannel.1", "device"),
)
def test_an_entry_spoilt_by_hand_is_put_right(pair: Lab, commands: list[str]) -> None:
    one, two = pair.hosts
    daemon, peer = pair.daemons
    subnet = peer.subnet()
    values = {
        "subnet": str(subnet),
        "gateway": str(subnet.network_address),
        "mac": mac_of(two),
    }
    wanted = mesh(pair.daemons, one)
    since = len(daemon.log())
    for _ in range(2):
        spoil(one, commands, **values)
        wait_entries(one, wanted, timeout=SOON)
    assert problems(daemon, since) == []


def test_what_somebody_changed_and_put_right_himself_is_no_repair(pair: Lab) -> None:
    one, two = pair.hosts
    daemon, peer = pair.daemons
    gateway, mac = peer.subnet().network_address, mac_of(two)
    spoilt, since = "02:00:00:00:00:99", len(daemon.log())
    freeze(daemon.pid)
    try:
        for each in (spoilt, mac):
            one.ip(f"neigh replace {gateway} dev flannel.1 lladdr {each} nud permanent")
        for each in ("10.97.0.99", str(two.address)):
            one.run(["bridge", "fdb", "replace", mac, "dev", "flannel.1", "dst", each])
        # Read after them, and mended.
        one.ip(f"route del {peer.subnet()}")
    finally:
        thaw(daemon.pid)
    wait_entries(one, mesh(pair.daemons, one), timeout=SOON)
    eventually(lambda: "Route recovered" in daemon.log()[since:], SOON, "a line in the log")
    # A later repair comes with its line; with it any of the first one has been written.
    one.ip(f"route del {peer.subnet()}")
    eventually(lambda: daemon.log()[since:].count("Route recovered") == 2, SOON, "another line")
    assert "Recovered" not in daemon.log()[since:]


def test_what_the_kernel_and_others_have_on_the_device_is_left_alone(make_lab: MakeLab) -> None:
    """Neighbours that age, routes of another kind, routes and addresses outside Network."""
    lab, host, daemon, _ = connected(make_lab)
    gateway = lab.daemons[1].subnet().network_address
    host.ip(
        "neigh add 10.5.250.7 dev flannel.1 lladdr 02:00:00:00:00:99 nud reachable",
        "route add 172.30.0.0/16 dev flannel.1 proto static",
        # To a network behind the peer, as anybody would write it.
        f"route add 172.31.0.0/16 via {gateway} dev flannel.1 onlink",
        "addr add 192.168.7.1/32 dev flannel.1",
    )
    others = [line for line in entries(host) if line.startswith("172.3")]
    assert len(others) == 2
    # Something to mend, so that everything is compared.
    host.ip("link set flannel.1 address 02:00:00:00:00:99")
    daemon.wait_log("is put back")
    wait_entries(
        host, sorted([*others, *mesh(lab.daemons, host)[:1]]) + mesh(lab.daemons, host)[1:]
    )
    assert "192.168.7.1/32" in addresses(host)
    assert "Removed stale" not in daemon.log()


# The external interface


def cut_eth0(lab: Lab) -> None:
    """Delete the first host's eth0, and the vxlan device on it along with it."""
    lab.underlay.ip("link del p1")


def restore_eth0(lab: Lab, mtu: int = 1500) -> None:
    """Make it anew, with another index."""
    host = lab.hosts[0]
    lab.underlay.ip(
        f"link add p1 mtu {mtu} type veth peer name eth0 mtu {mtu} address 02:97:00:00:00:01"
        f" netns {host.name}",
        "link set p1 master br0 up",
    )
    host.ip(
        f"addr add {host.address}/24 dev eth0",
        "link set eth0 up",
        f"route add default via {UNDERLAY.ip} dev eth0",
    )


@pytest.mark.parametrize("direct", [False, True], ids=["vxlan", "direct"])
def test_the_external_interface_deleted_and_made_anew(make_lab: MakeLab, direct: bool) -> None:
    lab, host, daemon, state = connected(make_lab, DirectRouting=direct)
    source, target = (each.containers[0] for each in lab.hosts)
    since = len(daemon.log())
    cut_eth0(lab)
    eventually(lambda: problems(daemon, since), SOON, "a line in the log")
    assert link(host) is None
    restore_eth0(lab)
    wait_state(host, state, PATIENCE)
    # ARP's failures between the hosts are remembered for a second or so.
    eventually(lambda: source.ping(target.address).lost == 0, PATIENCE, "an answer to a ping")
    # One line for the trouble, however long it lasts; the second says how it ended.
    assert problems(daemon, since)[0] == (
        "cannot set up flannel.1: there is no eth0 (trying again every second)"
    )
    assert not [line for line in problems(daemon, since) if "no such device" in line]
    daemon.wait_log("The device flannel.1 is in order again")


@pytest.mark.parametrize("direct", [False, True], ids=["vxlan", "direct"])
def test_the_external_interface_down_and_up(make_lab: MakeLab, direct: bool) -> None:
    lab, host, daemon, state = connected(make_lab, DirectRouting=direct)
    source, target = (each.containers[0] for each in lab.hosts)
    for _ in range(2):
        host.ip("link set eth0 down")
        assert source.ping(target.address, deadline=0.2).lost == 1
        host.ip("link set eth0 up", f"route add default via {UNDERLAY.ip} dev eth0")
        wait_state(host, state)
        eventually(partial(_answers, lab), PATIENCE, "an answer to a ping")
    assert daemon.is_running


def _answers(lab: Lab) -> bool:
    source, target = (each.containers[0] for each in lab.hosts)
    return source.ping(target.address).lost == 0


def test_an_external_interface_whose_mtu_shrank_does_not_keep_the_device_away(
    make_lab: MakeLab,
) -> None:
    """The kernel allows the device no more than the interface's MTU less fifty."""
    lab, host, daemon, state = connected(make_lab)
    host.ip("link set eth0 mtu 1400", "link del flannel.1")
    eventually(lambda: (link(host) or {}).get("mtu") == 1350, SOON, "a smaller device")
    wait_entries(host, list(state.entries))
    eventually(partial(_answers, lab), PATIENCE, "an answer to a ping")
    assert problems(daemon)[-1] == (
        "MTU of flannel.1: 1350 instead of 1450, as the MTU of eth0 is too small by now"
    )
    host.ip("link set eth0 mtu 1500")
    wait_state(host, state)


# Somebody who does not stop


def test_somebody_who_keeps_deleting_the_device_is_outlasted(make_lab: MakeLab) -> None:
    lab, host, _, state = connected(make_lab)
    for _ in range(20):
        eventually(lambda: link(host), PATIENCE, "the device")
        host.run(["ip", "link", "del", "flannel.1"], check=False)
    wait_state(host, state, PATIENCE)
    with client_of(lab) as client:
        put_peer(client, "10.5.201.0/24", "10.97.0.77", "02:00:00:00:00:aa")
    more = ("10.5.201.0/24", "10.97.0.77", "02:00:00:00:00:aa")
    wait_entries(host, mesh(lab.daemons, host, more))
    assert the_link(host)["address"] == state.mac


def test_leases_that_change_while_the_device_is_deleted_make_no_noise(make_lab: MakeLab) -> None:
    """Their entries are refused before the kernel reports that the device is gone."""
    lab, (daemon,) = running(make_lab, 1)
    (host,) = lab.hosts
    subnets = [f"10.5.{n}.0/24" for n in range(100, 200)]
    for turn in range(4):
        with client_of(lab) as client:
            peers = [
                (subnet, f"10.97.1.{n}", f"02:00:00:00:{turn:02x}:{n:02x}")
                for n, subnet in enumerate(subnets, 1)
            ]
            for number, peer in enumerate(peers):
                put_peer(client, *peer)
                if number == 20:
                    host.run(["ip", "link", "del", "flannel.1"], check=False)
        wait_entries(host, of_peers(peers))
    assert set(problems(daemon)) == {"flannel.1 was gone: it is made anew"}
