"""docker ran before flanneld, and dropped what it forwarded: with every keeper of the rules."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .cluster import MakeCluster, Outside, forward_policy, wait_answer

ChooseIptables = Callable[[str], None]

COMMANDS = [
    f"{family}{what}" for family in ("iptables", "ip6tables") for what in ("", "-restore", "-save")
]


@pytest.fixture
def choose_iptables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChooseIptables:
    """Choose the host's variant of iptables, as the administrator does with alternatives."""

    def choose(variant: str) -> None:
        for command in COMMANDS:
            family, dash, what = command.partition("-")
            chosen = shutil.which(f"{family}-{variant}{dash}{what}", path="/usr/sbin")
            assert chosen is not None
            (tmp_path / command).symlink_to(chosen)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin")

    return choose


@pytest.mark.parametrize(
    ("variant", "nftables", "driver"),
    [
        ("nft", False, "iptables-restore"),
        ("legacy", False, "python-iptables"),
        ("nft", True, "nftables"),
    ],
)
def test_docker_may_start_before_flanneld(
    make_cluster: MakeCluster,
    choose_iptables: ChooseIptables,
    variant: str,
    nftables: bool,
    driver: str,
) -> None:
    choose_iptables(variant)
    cluster = make_cluster(docker_first=True, nftables=nftables)
    for daemon in cluster.daemons:
        daemon.wait_log(
            "docker0 has 172.17.0.1/16, .* docker was started without flannel's options"
        )
        assert f"Masquerade and forward rules through {driver}: " in daemon.log()
        assert forward_policy(daemon.host) == "DROP"
        bridge = daemon.host.ip_json("-4", "addr", "show", "dev", "docker0")[0]["addr_info"]
        # docker has taken the address of its own choice from the bridge.
        assert [each["local"] for each in bridge] == [str(daemon.host.subnet_env().subnet.ip)]
    one, two = cluster.containers
    for source, target in ((one, two), (two, one)):
        wait_answer(source, target)
        assert source.seen_by(target) == str(source.address)
    for docker, container in zip(cluster.dockers, cluster.containers, strict=True):
        with Outside(cluster.lab) as outside:
            assert container.fetch(outside.url) == str(docker.host.address)
