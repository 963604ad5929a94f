"""README's "Run it on real hosts", word for word, on two machines with systemd, docker and etcd.

`make test-systemd` runs this. The commands are read from README and docs/, so what stands there is
what is tried. The machines have no internet; what stands in for it:

- `apt-get install`: the packages it names are in the machines' image already.
- pip finds its packages in a directory, `/etc/pip.conf` says so.
- the image `busybox` is made from Debian's busybox-static with `docker import`.

The tests share the machines and build on one another: they run in the order they stand here, and
each leaves two hosts whose containers talk, but for the last two, which remove flannel from one.
"""

import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv4Interface, ip_interface
from pathlib import Path

import pytest

from lab import vm, vm_image

TOP = Path(__file__).resolve().parents[2]
COPY = "/srv/flannel"
ADDRESSES = {"host1": IPv4Interface("10.0.0.5/24"), "host2": IPv4Interface("10.0.0.6/24")}
ROUTER = IPv4Address("10.0.0.1")

# What pip has to have beside flanneld's own dependencies: what these, and flanneld, are built with.
BUILD_TOOLS = ("setuptools", "wheel", "hatchling")
# Debian's etcd listens for this host only, if not told otherwise, and has no v2 API.
ETCD = """ETCD_ENABLE_V2=true
ETCD_LISTEN_CLIENT_URLS=http://0.0.0.0:2379
ETCD_ADVERTISE_CLIENT_URLS=http://10.0.0.5:2379
"""
BUSYBOX = """mkdir -p /tmp/image/bin && cp /bin/busybox /tmp/image/bin
for applet in ping httpd wget; do ln -sf busybox /tmp/image/bin/$applet; done
tar -C /tmp/image -c . | docker import - busybox
"""
# Seconds for a build in a machine.
BUILD = 3600.0
# Where files of flanneld's may be.
PLACES = "/etc /usr /var/lib/systemd /run"


def blocks(page: str, heading: str) -> list[str]:
    """Return the indented blocks of commands below a heading of a page."""
    text = (TOP / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    # The text of a list's item has three blanks before it.
    found = re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


README = blocks("README.md", "Run it on real hosts")
INSTALL, PUT_CONFIG, START, SERVE, VISIT, BY_HAND, DOCKER_BY_HAND = README
REMOVE = blocks("docs/operations.md", "Remove flannel from a host")
_, NO_DOCKER = blocks("docs/systemd.md", "Install")
UPGRADE, UNINSTALL, DOCKER_ALONE = blocks("docs/systemd.md", "Upgrade, go back, remove")


def type_in(machine: vm.Machine, commands: str, timeout: float = vm.PATIENCE) -> str:
    """Run the lines of a block one after the other; fail at the first that fails."""
    return machine.run(f"set -e\n{commands}", timeout=timeout).output


class Hosts:
    """Two machines, with containers `web` that serve on each once `serve` was called."""

    def __init__(self, first: vm.Machine, second: vm.Machine) -> None:
        self.first = first
        self.second = second
        self.web = ""

    def on_both(self, what: Callable[[vm.Machine], object]) -> None:
        """Do something on both machines at the same time."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(what, [self.first, self.second]))


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    scratch = tmp_path_factory.mktemp("hosts")
    tree = _tree(scratch / "tree")
    image = vm_image.build()
    names = list(ADDRESSES)
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        ports = [
            vm.Port(name, ADDRESSES[name], ROUTER, scratch / name, scratch / other)
            for name, other in zip(names, reversed(names), strict=True)
        ]
        starting = [pool.submit(vm.Machine(image, tree, port=port).__enter__) for port in ports]
        # All of them: one that has started must be ended also if the other has not.
        failed = [error for start in starting if (error := start.exception())]
        started = [stack.enter_context(_ending(s.result())) for s in starting if not s.exception()]
        if failed:
            raise failed[0]
        yield Hosts(*started)


@contextmanager
def _ending(machine: vm.Machine) -> Iterator[vm.Machine]:
    try:
        yield machine
    finally:
        machine.__exit__(None, None, None)


def _tree(tree: Path) -> Path:
    """Make what is copied into the machines: this repository, and a directory for pip."""
    copy, wheels = tree / COPY[1:], tree / "srv" / "wheels"
    copy.mkdir(parents=True)
    for name in ("flanneld", "systemd"):
        shutil.copytree(TOP / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(TOP / name, copy)
    # For the interpreter that the machines have, which need not be the one that runs this.
    pip = [sys.executable, "-m", "pip", "--python", "/usr/bin/python3"]
    subprocess.run([*pip, "download", "--quiet", "--dest", wheels, TOP, *BUILD_TOOLS], check=True)
    (tree / "etc" / "default").mkdir(parents=True)
    (tree / "etc" / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /srv/wheels\n")
    (tree / "etc" / "default" / "etcd").write_text(ETCD)
    return tree


@pytest.fixture(scope="module")
def hosts(machines: Hosts) -> Hosts:
    """The machines after README's steps 1 to 3."""
    machines.second.run("systemctl disable --now etcd")
    machines.first.run("systemctl restart etcd")
    machines.on_both(_install)
    type_in(machines.first, PUT_CONFIG)
    machines.on_both(lambda machine: type_in(machine, START))
    machines.on_both(lambda machine: type_in(machine, BUSYBOX))
    return machines


def _install(machine: vm.Machine) -> None:
    apt, make = INSTALL.splitlines()
    for package in apt.removeprefix("apt-get install -y ").split():
        machine.run(f"dpkg --status {package}")
    machine.run(f"cd {COPY} && {make}", timeout=BUILD)


def serve(machine: vm.Machine) -> str:
    """Start the container that serves, and return its address, as README does."""
    machine.run("docker rm --force web", check=False)
    return type_in(machine, SERVE).split()[-1]


def visit(machine: vm.Machine, address: str) -> None:
    """Ping a container and fetch its page, as README does."""
    example = re.search(r"ping .* (\S+)", VISIT)
    assert example
    said = type_in(machine, VISIT.replace(example[1], address))
    assert "3 packets transmitted, 3 packets received, 0% packet loss" in said
    # A container's hostname.
    assert re.fullmatch("[0-9a-f]{12}", said.split()[-1])


def subnet(machine: vm.Machine) -> str:
    """Return the host's subnet, as the subnet file has it."""
    found = re.search(r"FLANNEL_SUBNET=(\S+)", machine.run("cat /run/flannel/subnet.env").output)
    assert found
    return str(ip_interface(found[1]).network)


def pid(machine: vm.Machine, unit: str) -> int:
    return int(machine.ask(f"systemctl show --property=MainPID --value {unit}"))


@contextmanager
def no_ping_lost(machine: vm.Machine, address: str) -> Iterator[None]:
    """A container pings this address five times a second; fail if one gets no answer."""

    def answered() -> list[int]:
        said = machine.run("docker logs pinger").output
        return [int(number) for number in re.findall(r"^64 bytes .* seq=(\d+) ", said, re.M)]

    machine.run(f"docker run -d --name pinger busybox ping -i 0.2 {address}")
    try:
        machine.wait(lambda: len(answered()) >= 10, "pings")
        before = len(answered())
        yield
        during = len(answered()) - before
        machine.wait(lambda: len(answered()) >= before + during + 10, "more pings")
        assert during > 10
        seen = answered()
        assert seen == list(range(len(seen)))
        print(f"{during} pings answered")
    finally:
        machine.run("docker rm --force pinger")


def test_containers_talk(hosts: Hosts) -> None:
    """README's step 4, both ways."""
    for here, there in ((hosts.first, hosts.second), (hosts.second, hosts.first)):
        web = serve(here)
        assert IPv4Address(web) in ip_interface(subnet(here)).network
        visit(there, web)
        assert subnet(here) in there.ask("ip route show proto 102 dev flannel.1")
        assert "leased " + subnet(here) in here.ask("systemctl status flanneld")


def test_a_restart_costs_no_ping(hosts: Hosts) -> None:
    web, before = serve(hosts.first), pid(hosts.second, "flanneld")
    with no_ping_lost(hosts.second, web):
        hosts.second.run("systemctl restart flanneld")
        hosts.first.run("systemctl restart flanneld")
    assert pid(hosts.second, "flanneld") != before


def test_an_upgrade_costs_no_ping(hosts: Hosts) -> None:
    """All of it: the build beside the daemon that runs, the exchange, the restart."""
    pull, command = UPGRADE.strip().split(" && ", 1)
    assert pull == "git pull"
    web = serve(hosts.first)
    before, docker = pid(hosts.second, "flanneld"), pid(hosts.second, "docker")
    settings = hosts.second.run("cat /etc/default/flanneld").output
    with no_ping_lost(hosts.second, web):
        hosts.second.run(f"echo '__version__ = \"99.0\"' >>{COPY}/flanneld/__init__.py")
        hosts.second.run(f"cd {COPY} && {command}", timeout=BUILD)
    assert "99.0" in hosts.second.run("flanneld --version").output
    assert pid(hosts.second, "flanneld") not in (0, before)
    assert pid(hosts.second, "docker") == docker
    assert hosts.second.run("cat /etc/default/flanneld").output == settings


def test_a_rebooted_host_talks_again(hosts: Hosts) -> None:
    before = subnet(hosts.second)
    hosts.second.reboot()
    hosts.second.wait(
        lambda: hosts.second.ask("systemctl is-system-running") == "running",
        "the boot",
    )
    assert subnet(hosts.second) == before
    visit(hosts.second, serve(hosts.first))
    visit(hosts.first, serve(hosts.second))


def test_clean_up_and_start_again(hosts: Hosts) -> None:
    """docs/operations.md: nothing of flanneld's is left, and all comes back with the daemon."""
    before = subnet(hosts.second)
    said = type_in(hosts.second, REMOVE[0])
    print(said)
    for removed in ("flannel.1", "/run/flannel/subnet.env", "10.5."):
        assert removed in said
    assert_clean(hosts.second)
    assert "nothing of flanneld's" in hosts.second.run("flanneld --cleanup").output
    hosts.second.run("systemctl start flanneld")
    assert subnet(hosts.second) == before
    visit(hosts.second, serve(hosts.first))
    visit(hosts.first, serve(hosts.second))


def assert_clean(machine: vm.Machine) -> None:
    """Assert that nothing of flanneld's is left in the kernel, and no subnet file."""
    assert machine.ask("ip route show proto 102; ip -br link show type vxlan") == ""
    rules = machine.run("iptables-nft-save; iptables-legacy-save; nft list ruleset").output
    assert "flannel" not in rules.lower()
    assert machine.run("ls /run/flannel").output.split() in ([], ["docker"])


def test_docker_without_flannel(hosts: Hosts) -> None:
    """docs/systemd.md: the drop-in can be taken away from docker, which then lives by itself."""
    machine = hosts.second
    has = "systemctl show --property=EnvironmentFiles docker"
    looks = "journalctl --boot --output=cat -u flannel-docker | grep -c Finished"
    assert "flannel" in machine.ask(has)
    type_in(machine, NO_DOCKER)
    assert "flannel" not in machine.ask(has)
    machine.run("systemctl restart docker")
    docker, before = pid(machine, "docker"), int(machine.ask(looks))
    machine.run("systemctl restart flanneld")
    machine.wait(lambda: int(machine.ask(looks)) > before, "a look at docker")
    # No restart waits to be done, and none has been.
    assert "docker.service" not in machine.run("systemctl list-jobs").output
    assert pid(machine, "docker") == docker
    machine.run("rm -r /etc/systemd/system/docker.service.d && systemctl daemon-reload")


def test_removal(hosts: Hosts) -> None:
    """docs/systemd.md: what is left are the settings, and docker can have an address of its own."""
    machine = hosts.second
    disable, remove = UNINSTALL.split("\n", 1)
    type_in(machine, f"{disable}\nflanneld --cleanup\n{remove}")
    assert_clean(machine)
    found = machine.ask(f"find {PLACES} -iname '*flannel*'").split()
    assert sorted(found) == ["/etc/default/flanneld", "/run/flannel"]
    type_in(machine, DOCKER_ALONE)
    assert "172.17.0.1/16" in machine.ask("ip -br -4 address show dev docker0")
    # What follows gives it on the command line.
    machine.run("rm /etc/docker/daemon.json")


def test_without_systemd(hosts: Hosts) -> None:
    """README's last part, on the host that has no service any more."""
    machine = hosts.second
    machine.run("systemctl stop docker.socket docker")
    *install, start = BY_HAND.splitlines()
    type_in(machine, "\n".join([f"cd {COPY}", *install]), timeout=BUILD)
    start = start.replace("eth0", "enp0s1")
    machine.run(f"nohup {start} >/tmp/flanneld.log 2>&1 & echo $! >/tmp/flanneld.pid")
    machine.wait(
        lambda: machine.ask("ls /run/flannel/subnet.env") == "/run/flannel/subnet.env", "subnet.env"
    )
    source, dockerd = DOCKER_BY_HAND.splitlines()
    machine.run(f"{source}\nnohup {dockerd} >/tmp/dockerd.log 2>&1 &")
    machine.wait(lambda: not machine.run("docker info", check=False).status, "docker")
    visit(machine, serve(hosts.first))
    visit(hosts.first, serve(machine))
    machine.run("kill $(cat /tmp/flanneld.pid)")
