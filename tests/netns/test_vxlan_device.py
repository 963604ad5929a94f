"""The vxlan device: as the original's, kept when it fits, made anew when not, never another's."""

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from network import PATIENCE, MakeLab, Pings, client_of, key_of, leases, wait_lease
from overlay import (
    addresses,
    entries,
    lease_mac,
    link,
    mac_of,
    make_vxlan,
    mesh,
    problems,
    put_keys,
    running,
    start_containers,
    the_link,
    wait_entries,
    write_subnet_env,
)

from lab import Flanneld, Lab
from lab.process import run

RECORDED = Path(__file__).parents[1] / "fixtures" / "backends" / "v080-vxlan"

# linux/netdevice.h: the MAC was set by whoever made the device. systemd's MACAddressPolicy
# replaces only one that the kernel chose at random.
NET_ADDR_SET = 3


@pytest.fixture(scope="module")
def idle(_machine: None) -> Iterator[Lab]:
    """One host on which no daemon ever gets anywhere, for several tests."""
    with Lab(1) as lab:
        yield lab


def failing(lab: Lab, **keys: object) -> Flanneld:
    """Return a daemon that ended with status 1 and one error line."""
    put_keys(lab, **keys)
    daemon = Flanneld(lab.hosts[0]).start()
    assert daemon.wait_exit(PATIENCE) == 1
    errors = [line for line in daemon.log().splitlines() if line.startswith("E")]
    assert len(errors) == 1, errors
    assert "Error registering network: " in errors[0]
    assert "Traceback" not in daemon.log()
    assert daemon.ready_after() is None
    return daemon


def attributes(text: str) -> str:
    """Return the line of ``ip -d link`` that shows the attributes of flannel.1's vxlan."""
    (line,) = [each for each in text.splitlines() if each.strip().startswith("vxlan id")]
    return line.strip()


def test_the_device_has_the_attributes_of_the_originals(make_lab: MakeLab) -> None:
    lab, (daemon,) = running(make_lab, 1)
    host = lab.hosts[0]
    recorded = (RECORDED / "h1-state-idle.txt").read_text()
    shown = host.run(["ip", "-d", "link", "show", "flannel.1"]).stdout
    assert attributes(shown) == attributes(recorded)
    device = the_link(host)
    assert device["mtu"] == 1450
    assert {"BROADCAST", "MULTICAST", "UP", "LOWER_UP"} == set(device["flags"])
    assert addresses(host) == [f"{daemon.subnet().network_address}/32"]
    assert host.subnet_env().mtu == 1450
    sysctl = "/proc/sys/net/ipv6/conf/flannel.1/accept_ra"
    assert host.inside(lambda: Path(sysctl).read_text()) == "0\n"
    listening = host.run(["ss", "-Hlun"]).stdout.split()
    assert "0.0.0.0:8472" in listening


def test_the_lease_holds_the_mac_byte_for_byte_as_the_originals(make_lab: MakeLab) -> None:
    lab, (daemon,) = running(make_lab, 1)
    node = leases(lab)[str(daemon.subnet())]
    mac = mac_of(lab.hosts[0])
    assert node.value == (
        '{"PublicIP":"10.97.0.1","BackendType":"vxlan","BackendData":{"VtepMAC":"' + mac + '"}}'
    )


@pytest.mark.parametrize(
    ("keys", "name", "shown", "mtu"),
    [
        ({"VNI": 7}, "flannel.7", {"id": 7}, 1450),
        ({"VNI": 9999999, "Port": 4789}, "flannel.9999999", {"port": 4789}, 1450),
        ({"GBP": True}, "flannel.1", {"gbp": True, "learning": False}, 1450),
        ({"Learning": True}, "flannel.1", {"learning": True}, 1450),
        ({"MTU": 1400}, "flannel.1", {"port": 8472}, 1350),
    ],
)
def test_the_keys_of_the_config(
    make_lab: MakeLab, keys: dict[str, object], name: str, shown: dict[str, object], mtu: int
) -> None:
    lab, daemons = running(make_lab, 2, **keys)
    for host in lab.hosts:
        device = the_link(host, name)
        data = {"gbp": False, **device["linkinfo"]["info_data"]}
        assert data | shown == data
        assert device["mtu"] == mtu
        assert host.subnet_env().mtu == mtu
    start_containers(lab.hosts)
    one, two = (host.containers[0] for host in lab.hosts)
    assert one.ping(two.address, 3).lost == 0
    # The kernel agrees with what was asked for: the next start keeps the device.
    index = the_link(lab.hosts[0], name)["ifindex"]
    daemons[0].kill9()
    daemons[0].start()
    daemons[0].wait_ready()
    assert the_link(lab.hosts[0], name)["ifindex"] == index
    assert [problems(daemon) for daemon in daemons] == [[], []]


def test_the_mtu_is_the_external_interfaces_minus_fifty(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    lab.hosts[0].ip("link set eth0 mtu 1400")
    put_keys(lab)
    Flanneld(lab.hosts[0]).start().wait_ready()
    assert the_link(lab.hosts[0])["mtu"] == 1350
    assert lab.hosts[0].subnet_env().mtu == 1350


@pytest.mark.parametrize(
    "keys",
    [
        {"VNI": "one"},
        {"VNI": 10_000_000},
        {"Port": 70000},
        {"GBP": 1},
        {"Learning": "no"},
        {"DirectRouting": "yes"},
        {"MTU": -1},
        {"MTU": 1501},
    ],
    ids=lambda keys: " ".join(f"{key}={value}" for key, value in keys.items()),
)
def test_a_wrong_key_ends_the_daemon_and_nothing_is_touched(
    idle: Lab, keys: dict[str, object]
) -> None:
    daemon = failing(idle, **keys)
    (key,) = keys
    assert f"Backend key {key} " in daemon.log()
    assert leases(daemon.host.lab) == {}
    assert not [each for each in daemon.host.ip_json("link") if "flannel" in each["ifname"]]
    assert not daemon.host.subnet_file.exists()


def test_a_compatible_device_is_kept_with_its_mac(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    host = lab.hosts[0]
    make_vxlan(host, "10.5.17.0/24", "02:11:22:33:44:55")
    host.ip("link set flannel.1 mtu 1300", "link set flannel.1 down")
    index = the_link(host)["ifindex"]
    write_subnet_env(host, "10.5.17.0/24")
    put_keys(lab)
    daemon = Flanneld(host).start()
    daemon.wait_ready()
    device = the_link(host)
    assert (device["ifindex"], device["address"]) == (index, "02:11:22:33:44:55")
    assert lease_mac(daemon) == "02:11:22:33:44:55"
    # What can be put right without making it anew is put right.
    assert device["mtu"] == 1450
    assert "UP" in device["flags"]
    assert addresses(host) == ["10.5.17.0/32"]
    assert problems(daemon) == []


@pytest.mark.parametrize(
    ("options", "keys", "reason"),
    [
        ("id 5 local 10.97.0.1 dev eth0 dstport 8472 nolearning", {}, "vni: 5 vs 1"),
        (
            "id 1 local 10.97.0.1 dev lo dstport 8472 nolearning",
            {},
            "vtep (external) interface: 1 vs 2",
        ),
        (
            "id 1 local 10.97.0.9 dev eth0 dstport 8472 nolearning",
            {},
            "vtep (external) IP: 10.97.0.9 vs 10.97.0.1",
        ),
        (
            "id 1 local 10.97.0.1 group 239.1.1.1 dev eth0 dstport 8472 nolearning",
            {},
            "group address: 239.1.1.1 vs None",
        ),
        ("id 1 local 10.97.0.1 dev eth0 dstport 8472", {}, "learning: True vs False"),
        (
            "id 1 local 10.97.0.1 dev eth0 dstport 4789 nolearning",
            {},
            "port: 4789 vs 8472",
        ),
        ("id 1 local 10.97.0.1 dev eth0 dstport 8472 nolearning gbp", {}, "gbp: True vs False"),
        (
            "id 1 local 10.97.0.1 dev eth0 dstport 8472 nolearning",
            {"GBP": True},
            "gbp: False vs True",
        ),
    ],
)
def test_an_incompatible_device_is_made_anew_and_the_reason_logged(
    make_lab: MakeLab, options: str, keys: dict[str, object], reason: str
) -> None:
    lab = make_lab(1)
    host = lab.hosts[0]
    host.ip(f"link add flannel.1 type vxlan {options}", "link set flannel.1 up")
    before = the_link(host)["ifindex"]
    put_keys(lab, **keys)
    daemon = Flanneld(host).start()
    daemon.wait_ready()
    assert problems(daemon) == [
        f'"flannel.1" already exists with incompatible configuration: {reason}; recreating device'
    ]
    device = the_link(host)
    assert device["ifindex"] != before
    data = device["linkinfo"]["info_data"]
    assert (data["id"], data["link"], data["local"]) == (1, "eth0", "10.97.0.1")
    assert (data["port"], data["learning"], "group" in data) == (8472, False, False)
    assert data.get("gbp", False) == keys.get("GBP", False)


def test_addresses_of_earlier_leases_are_removed_and_others_are_not(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    host = lab.hosts[0]
    make_vxlan(host, "10.5.123.0/24", "02:11:22:33:44:55")
    host.ip(
        *(
            f"addr add {address} dev flannel.1"
            for address in ("10.5.58.0/32", "10.5.17.0/24", "192.168.7.1/32", "10.8.3.0/32")
        )
    )
    write_subnet_env(host, "10.5.17.0/24", "10.8.0.0/16")
    put_keys(lab)
    daemon = Flanneld(host).start()
    daemon.wait_ready()
    # 10.8.0.0/16 is the Network of the former run; 192.168.7.1 is somebody else's business.
    own = f"{daemon.subnet().network_address}/32"
    assert sorted(addresses(host)) == sorted([own, "192.168.7.1/32"])
    daemon.wait_log(r"Removed IP address 10\.5\.123\.0/32 from flannel\.1")


# Devices of others


@pytest.mark.parametrize("kind", ["bridge", "veth"])
def test_a_foreign_device_of_that_name_is_refused_and_left_alone(
    make_lab: MakeLab, kind: str
) -> None:
    lab = make_lab(1)
    host = lab.hosts[0]
    host.ip(f"link add flannel.1 type {kind}", "addr add 172.30.0.1/24 dev flannel.1")
    before = the_link(host)
    daemon = failing(lab)
    assert f"flannel.1 exists and is no vxlan device (but {kind})" in daemon.log()
    assert the_link(host) == before
    assert addresses(host) == ["172.30.0.1/24"]
    assert leases(lab) == {}


def test_another_device_with_the_vni_and_port_is_named(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    host = lab.hosts[0]
    host.ip("link add other type vxlan id 1 local 10.97.0.1 dev eth0 dstport 8472")
    before = the_link(host, "other")
    daemon = failing(lab)
    assert "other already uses VNI 1 on port 8472: delete it, or set another VNI" in daemon.log()
    assert the_link(host, "other") == before
    assert link(host) is None


def test_a_udp_port_in_use_is_named(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    host = lab.hosts[0]
    taken = host.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with closing(taken):
        taken.bind(("", 8472))
        daemon = failing(lab)
    assert "UDP port 8472 is in use" in daemon.log()
    daemon.start()
    daemon.wait_ready()


# The MAC


def test_systemd_has_no_reason_to_change_the_mac(make_lab: MakeLab) -> None:
    lab, (daemon,) = running(make_lab, 1)
    # /sys shows the devices of the namespace it was mounted in.
    show = ["ip", "netns", "exec", lab.hosts[0].name, "cat"]
    shown = run([*show, "/sys/class/net/flannel.1/addr_assign_type"]).stdout
    assert int(shown) == NET_ADDR_SET
    # From its creation on: it never had another one.
    assert problems(daemon) == []


def test_the_mac_is_the_same_after_restarts_and_a_reboot(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    (one, _), daemon = lab.hosts, daemons[0]
    mac = mac_of(one)
    for end in (daemon.terminate, daemon.kill9):
        end()
        daemon.start()
        daemon.wait_ready()
        assert mac_of(one) == lease_mac(daemon) == mac
    daemon.terminate()
    one.ip("link del flannel.1")
    one.subnet_file.unlink()
    daemon.start()
    daemon.wait_ready()
    assert mac_of(one) == lease_mac(daemon) == mac
    assert mac_of(lab.hosts[1]) != mac


def test_a_mac_that_changed_while_no_daemon_ran_is_published(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    one, two = lab.hosts
    daemons[0].terminate()
    one.ip("link set flannel.1 address 02:00:00:00:00:99")
    daemons[0].start()
    daemons[0].wait_ready()
    assert mac_of(one) == lease_mac(daemons[0]) == "02:00:00:00:00:99"
    wait_entries(two, mesh(daemons, two))
    assert "02:00:00:00:00:99 dst 10.97.0.1 self permanent" in entries(two)
    start_containers(lab.hosts)
    with Pings(lab.hosts):
        pass


def test_a_lease_whose_mac_was_overwritten_is_written_again(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    two, subnet = lab.hosts[1], daemons[0].subnet()
    wanted, value = mesh(daemons, two), leases(lab)[str(subnet)].value
    wrong = json.loads(value) | {"BackendData": {"VtepMAC": "02:00:00:00:00:99"}}
    with client_of(lab) as client:
        client.put(key_of(subnet), json.dumps(wrong), ttl=1000)
    wait_lease(lab, subnet, lambda node: node.value == value)
    wait_entries(two, wanted)
