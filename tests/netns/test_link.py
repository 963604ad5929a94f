"""Reading devices, addresses and default routes from a real kernel. Needs root."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

UNICAST, BLACKHOLE, UNREACHABLE, PROHIBIT, THROW = 1, 6, 7, 8, 9
SCOPE_UNIVERSE, SCOPE_LINK, SCOPE_HOST = 0, 253, 254

READ = """
import json, sys
from dataclasses import asdict
from flanneld.kernel.link import read_host_facts
json.dump(asdict(read_host_facts()), sys.stdout, default=str)
"""
SELECT = """
import json, sys
from dataclasses import asdict
from flanneld.errors import InterfaceError
from flanneld.interface import look_up
from flanneld.kernel.link import read_host_facts
try:
    chosen = look_up(read_host_facts(), json.loads(sys.argv[1]), json.loads(sys.argv[2]), "")
    json.dump(asdict(chosen), sys.stdout, default=str)
except InterfaceError as error:
    sys.exit(str(error))
"""


class Namespace:
    """A network namespace of this test alone, with ``ip`` and Python to be run inside."""

    numbers = count()

    def __init__(self) -> None:
        self.name = f"flink{os.getpid()}-{next(self.numbers)}"
        subprocess.run(["ip", "netns", "add", self.name], check=True, timeout=10)

    def delete(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=True, timeout=10)

    def ip(self, *commands: str) -> None:
        subprocess.run(
            ["ip", "-n", self.name, "-batch", "-"],
            input="".join(f"{command}\n" for command in commands),
            check=True,
            text=True,
            timeout=30,
        )

    def shown(self, *what: str) -> list[dict[str, Any]]:
        """What iproute2 shows, to compare with."""
        text = subprocess.run(
            ["ip", "-n", self.name, "-json", "-details", *what],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout
        entries: list[dict[str, Any]] = json.loads(text or "[]")
        return entries

    def python(self, code: str, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", self.name, sys.executable, "-W", "error", "-c", code, *args],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def facts(self) -> dict[str, list[dict[str, Any]]]:
        done = self.python(READ)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        facts: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
        return facts

    def index(self, device: str) -> int:
        return int(self.shown("link", "show", "dev", device)[0]["ifindex"])


@pytest.fixture
def bare() -> Iterator[Namespace]:
    namespace = Namespace()
    try:
        yield namespace
    finally:
        namespace.delete()


@pytest.fixture
def host(bare: Namespace) -> Namespace:
    """The host of the recordings: eth0 with three addresses; eth1 down; ll0 link-local only."""
    bare.ip(
        "link set lo up",
        "link add eth0 mtu 1450 type veth peer name peer0",
        "link add eth1 type veth peer name peer1",
        "link add ll0 type veth peer name peer2",
        "link add noip0 type veth peer name peer3",
        "addr add 10.97.0.1/24 dev eth0",
        "addr add 169.254.7.7/16 dev eth0 scope link",
        "addr add 10.97.0.101/24 dev eth0",
        "addr add fd00:97::1/64 dev eth0",
        "addr add 172.31.6.6/24 dev eth1",
        "addr add 169.254.1.1/16 dev ll0",
        "link set eth0 up",
        "link set peer0 up",
        "link set ll0 up",
    )
    return bare


def test_devices_and_addresses_are_those_iproute2_shows(host: Namespace) -> None:
    facts = host.facts()
    assert facts["links"] == [
        {
            "index": shown["ifindex"],
            "name": shown["ifname"],
            "mtu": shown["mtu"],
            "up": "UP" in shown["flags"],
            "kind": shown.get("linkinfo", {}).get("info_kind"),
        }
        for shown in host.shown("link", "show")
    ]
    found = {link["name"]: (link["mtu"], link["up"], link["kind"]) for link in facts["links"]}
    assert found["lo"] == (65536, True, None)
    assert found["eth0"] == (1450, True, "veth")
    assert found["eth1"] == (1500, False, "veth")

    scopes = {"global": SCOPE_UNIVERSE, "link": SCOPE_LINK, "host": SCOPE_HOST}
    assert facts["addresses"] == [
        {
            "index": shown["ifindex"],
            "ip": address["local"],
            "prefixlen": address["prefixlen"],
            "scope": scopes[address["scope"]],
        }
        for shown in host.shown("-4", "addr", "show")
        for address in shown["addr_info"]
    ]
    eth0 = host.index("eth0")
    assert [each["ip"] for each in facts["addresses"] if each["index"] == eth0] == [
        "169.254.7.7",  # the kernel puts an address of scope link before the global ones
        "10.97.0.1",
        "10.97.0.101",
    ]


def test_a_namespace_with_nothing_in_it(bare: Namespace) -> None:
    facts = bare.facts()
    assert [link["name"] for link in facts["links"]] == ["lo"]
    assert facts["addresses"] == []
    assert facts["defaults"] == []


def test_the_own_end_of_a_point_to_point_address(bare: Namespace) -> None:
    bare.ip(
        "link add eth0 type veth peer name peer0",
        "addr add 10.1.1.1 peer 10.2.2.2/30 dev eth0",
    )
    [address] = bare.facts()["addresses"]
    assert (address["ip"], address["prefixlen"]) == ("10.1.1.1", 30)


def test_default_routes_of_the_main_table_lowest_metric_first(host: Namespace) -> None:
    host.ip(
        "link set eth1 up",
        "route add default via 10.97.0.254 metric 500",
        "route add default via 172.31.6.1 dev eth1 metric 100 onlink",
        "route add blackhole default metric 200",
        "route add unreachable default metric 300",
        "route add prohibit default metric 301",
        "route add throw default metric 302",
        "route add default metric 50 nexthop via 10.97.0.253 nexthop via 10.97.0.252",
        # Not default routes of the main table, though dumped before them.
        "route add blackhole 0.0.0.0/8",
        "route add default via 10.97.0.9 table 77",
        "route add default via 10.97.0.9 table 5000",
        "rule add to 10.0.0.0/8 table 77",
    )
    defaults = host.facts()["defaults"]
    assert [(each["metric"], each["index"], each["type"]) for each in defaults] == [
        (50, None, UNICAST),
        (100, host.index("eth1"), UNICAST),
        (200, None, BLACKHOLE),
        (300, None, UNREACHABLE),
        (301, None, PROHIBIT),
        (302, None, THROW),
        (500, host.index("eth0"), UNICAST),
    ]


def test_default_routes_among_thousands_of_others(host: Namespace) -> None:
    """More routes than one netlink message block holds, before and behind the default routes."""
    host.ip(
        *(
            f"route add 10.{200 + i // 250}.{i % 250}.0/24 dev eth0 table {table}"
            for table in (77, 254)
            for i in range(2000)
        ),
        *(f"route add blackhole 0.{i // 250}.{i % 250}.0/24" for i in range(1, 2000)),
        "route add default via 10.97.0.254 metric 7",
        "route add unreachable default metric 4278198272",
    )
    defaults = host.facts()["defaults"]
    assert [(each["metric"], each["index"]) for each in defaults] == [
        (7, host.index("eth0")),
        (4278198272, None),
    ]


@pytest.mark.parametrize(
    ("setup", "options", "name", "address"),
    [
        (["route add default via 10.97.0.254"], ([], []), "eth0", "10.97.0.1"),
        (
            [
                "link set eth1 up",
                "route add default via 10.97.0.254 metric 100",
                "route add default dev eth1 metric 50",
            ],
            ([], []),
            "eth1",
            "172.31.6.6",
        ),
        ([], (["10.97.0.101"], []), "eth0", "10.97.0.101"),
        ([], (["169.254.7.7"], []), "eth0", "169.254.7.7"),
        ([], (["127.0.0.1"], []), "lo", "127.0.0.1"),
        ([], (["eth1"], []), "eth1", "172.31.6.6"),
        ([], (["noip0"], ["^ll[[:digit:]]$"]), "ll0", "169.254.1.1"),
        ([], ([], [r"^172\.31\."]), "eth1", "172.31.6.6"),
    ],
)
def test_the_choice_on_a_real_host(
    host: Namespace, setup: list[str], options: tuple[list[str], list[str]], name: str, address: str
) -> None:
    host.ip(*setup)
    done = host.python(SELECT, *map(json.dumps, options))
    assert done.returncode == 0, done.stderr
    chosen = json.loads(done.stdout)
    assert chosen["interface"] == {
        "index": host.index(name),
        "name": name,
        "mtu": {"lo": 65536, "eth0": 1450}.get(name, 1500),
        "iface_addr": address,
        "ext_addr": address,
    }


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ([], "Unable to find default route"),
        (["route add default via 10.97.0.254 table 77"], "Unable to find default route"),
        (
            ["route add blackhole default", "route add default via 10.97.0.254 metric 50"],
            "Found default route but could not determine interface",
        ),
        (
            ["route add default nexthop via 10.97.0.254 nexthop via 10.97.0.253"],
            "Found default route but could not determine interface",
        ),
    ],
)
def test_no_choice_on_a_real_host(host: Namespace, setup: list[str], reason: str) -> None:
    host.ip(*setup)
    done = host.python(SELECT, "[]", "[]")
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"Failed to find any valid interface to use: failed to get default interface: {reason} ("
    )
    assert "this host has: lo 127.0.0.1, eth0 169.254.7.7 10.97.0.1 10.97.0.101, " in done.stderr


def test_a_kernel_that_refuses_is_an_interface_error(bare: Namespace) -> None:
    """No file descriptor is left for the socket."""
    code = """
import resource
from flanneld.errors import InterfaceError
from flanneld.kernel.link import read_host_facts
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    read_host_facts()
except InterfaceError as error:
    print(error)
"""
    done = bare.python(code)
    assert done.stdout.startswith("cannot read this host's interfaces from the kernel: [Errno 24]")
    assert done.returncode == 0
