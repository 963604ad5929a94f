"""Packets of containers on hosts that masquerade, through each of the three drivers."""

import pytest
from firewall import KINDS, LEGACY, RESTORE, Kind, in_place, iptables, make, start
from network import PATIENCE, MakeLab, wait_meshed
from overlay import tcp_both_ways, udp_both_ways

from lab import eventually
from lab.namespaces import UNDERLAY


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_who_sees_which_address_behind_a_forward_chain_that_drops(
    make_lab: MakeLab, kind: Kind
) -> None:
    lab = make(make_lab, kind, 2)
    for host in lab.hosts:
        # As docker has it.
        iptables(host, kind, "-P", "FORWARD", "DROP")
    daemons = [start(host, kind, "--ip-masq") for host in lab.hosts]
    wait_meshed(daemons)
    for daemon in daemons:
        found = daemon.wait_log(r"Masquerade and forward rules through (\S+): (.*)")
        assert found[1] == kind.driver
        in_place(daemon.host, kind, daemon.subnet())
        assert daemon.host.subnet_file.read_text().endswith("FLANNEL_IPMASQ=true\n")
    one, two = lab.hosts
    near, far = one.add_container(), two.add_container()
    outside = lab.underlay

    # To the outside, which knows no way back to a container: as the host.
    eventually(lambda: near.ping(UNDERLAY.ip).lost == 0, PATIENCE, "an answer from outside")
    tcp_both_ways(near, outside, UNDERLAY.ip, 1 << 16)
    assert udp_both_ways(near, outside, UNDERLAY.ip, 100) == one.address
    # To a container on the other host: as itself, in both directions.
    tcp_both_ways(near, far, far.address, 1 << 16)
    assert udp_both_ways(near, far, far.address, 100) == near.address
    assert udp_both_ways(far, near, near.address, 100) == far.address
    # From the outside to a host's own containers: as itself.
    outside.ip(f"route add {daemons[0].subnet()} via {one.address}")
    assert udp_both_ways(outside, near, near.address, 100) == UNDERLAY.ip
    # From the outside to another host's: the answers must come back the same way.
    outside.ip(f"route add {daemons[1].subnet()} via {one.address}")
    assert udp_both_ways(outside, far, far.address, 100) == one.address
    # What kube-proxy has marked is left to kube-proxy.
    port = ["-p", "udp", "-s", str(near.address), "-d", str(UNDERLAY.ip)]
    mark = ["-j", "MARK", "--set-xmark", "0x4001/0x4001"]
    iptables(one, kind, "-t", "mangle", "-A", "PREROUTING", *port, *mark)
    assert udp_both_ways(near, outside, UNDERLAY.ip, 100) == near.address


@pytest.mark.parametrize("kind", [LEGACY, RESTORE], ids=str)
def test_a_rule_behind_ours_does_not_masquerade_container_to_container(
    make_lab: MakeLab, kind: Kind
) -> None:
    """As in v0.8.0, whose RETURN in POSTROUTING was the end of it."""
    lab = make(make_lab, kind, 2)
    daemons = [start(host, kind, "--ip-masq") for host in lab.hosts]
    wait_meshed(daemons)
    one, two = lab.hosts
    near, far = one.add_container(), two.add_container()
    iptables(one, kind, "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    eventually(lambda: near.ping(far.address).lost == 0, PATIENCE, "an answer")
    assert udp_both_ways(near, far, far.address, 100) == near.address
