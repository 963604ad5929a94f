"""Docker's bridge: its address as the kernel has it, and what a running flanneld says of it."""

from ipaddress import IPv4Interface

from network import PATIENCE, MakeLab, put_config, start

from flanneld.docker0 import read_address


def test_the_address_is_read_as_it_is(make_lab: MakeLab) -> None:
    (host,) = make_lab(1, etcd=False).hosts
    assert host.inside(read_address) is None
    host.ip("link add docker0 type bridge")
    assert host.inside(read_address) is None
    for address in ("10.5.9.1/24", "172.17.0.1/16", "10.5.4.129/25", "10.5.0.9/32"):
        host.ip("addr flush dev docker0", f"addr add {address} dev docker0")
        assert host.inside(read_address) == IPv4Interface(address)
    # An address does not depend on the bridge being up.
    host.ip("link set docker0 up")
    assert host.inside(read_address) == IPv4Interface("10.5.0.9/32")
    host.ip("link del docker0")
    assert host.inside(read_address) is None


def test_a_bridge_of_docker_without_flannels_options_is_reported_once(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    put_config(lab)
    (host,) = lab.hosts
    host.ip("link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0")
    (daemon,) = start(host)
    subnet = daemon.subnet()
    line = daemon.wait_log(r"^W.*docker0.*$", PATIENCE).group(0)
    assert "docker0 has 172.17.0.1/16" in line
    assert f"--bip={subnet.network_address + 1}/24" in line
    assert daemon.terminate() == 0
    assert daemon.log().count("docker0 has") == 1
    # flanneld does not touch the bridge.
    assert host.inside(read_address) == IPv4Interface("172.17.0.1/16")

    host.ip("addr flush dev docker0", f"addr add {subnet.network_address + 1}/24 dev docker0")
    daemon.start()
    daemon.wait_ready()
    assert daemon.terminate() == 0
    assert "docker0" not in daemon.log()
