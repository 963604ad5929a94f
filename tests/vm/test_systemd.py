"""The installed unit under a real systemd, beside a real etcd and a real docker.

`make test-systemd` runs this in a machine of its own; the other tests leave it out. The tests share
the machine, and each begins with a flanneld that runs on vxlan.
"""

import ipaddress
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab import vm, vm_image

TOP = Path(__file__).resolve().parents[2]
PREFIX = "/coreos.com/network"
SETTINGS = "/etc/default/flanneld"
DROP_IN = "/run/systemd/system/flanneld.service.d/test.conf"

# Backend -> what a peer's lease holds beside its public IP, where the route that leads to
# 10.5.99.0/24 goes, and its device.
BACKENDS = {
    "vxlan": ('"BackendData":{"VtepMAC":"02:00:00:00:00:63"}', "10.5.99.0/24", "flannel.1"),
    "host-gw": ("", "10.5.99.0/24", "enp0s1"),
    "udp": ("", "10.5.0.0/16", "flannel0"),
}

# linux/capability.h: CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN,
# CAP_NET_RAW, CAP_BPF.
CAPABILITIES = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 39

# What is asked of etcd in the machine, which has no curl.
ETCD = """
import json, sys, urllib.error, urllib.parse, urllib.request
method, key, *form = sys.argv[1:]
data = urllib.parse.urlencode([tuple(pair.split("=", 1)) for pair in form]).encode() or None
request = urllib.request.Request("http://127.0.0.1:2379/v2/keys" + key, data, method=method)
try:
    print(urllib.request.urlopen(request, timeout=300).read().decode())
except urllib.error.HTTPError as error:
    print(error.read().decode())
"""

# What the udp backend and a low port need, tried under the unit's own restrictions.
RIGHTS = """
import fcntl, os, signal, socket, struct
tun = open("/dev/net/tun", "r+b", buffering=0)
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"right0", 0x5001))
socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
socket.create_server(("127.0.0.1", 80)).close()
# A child that has become nobody can be ended.
read, write = os.pipe()
child = os.fork()
if not child:
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    os.write(write, b"1")
    signal.pause()
os.close(write)
assert os.read(read, 1) == b"1"
os.kill(child, signal.SIGKILL)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""

# What takes docker's drop-in away, and what brings it back.
FLANNEL_CONF = "docker.service.d/flannel.conf"
UNITS = "/usr/local/lib/systemd/system"
NO_DROP_IN = {
    "masked": (
        f"mkdir -p /etc/systemd/system/{os.path.dirname(FLANNEL_CONF)}"
        f" && ln -s /dev/null /etc/systemd/system/{FLANNEL_CONF}",
        f"rm /etc/systemd/system/{FLANNEL_CONF}",
    ),
    "taken away": (
        f"mv {UNITS}/{FLANNEL_CONF} /root/flannel.conf",
        f"mv /root/flannel.conf {UNITS}/{FLANNEL_CONF}",
    ),
}


@dataclass
class Node:
    """The machine, with flanneld installed."""

    machine: vm.Machine

    def ask(self, command: str) -> str:
        return self.machine.ask(command)

    def run(self, command: str) -> str:
        return self.machine.run(command).output

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.ask(f"systemctl show --property={name} --value {unit}")

    def pid(self, unit: str = "flanneld") -> int:
        return int(self.show(unit, "MainPID"))

    def write(self, path: str, text: str) -> None:
        self.run(f"mkdir -p {os.path.dirname(path)} && cat >{path} <<'END'\n{text}\nEND")

    def etcd(self, method: str, key: str, **form: str) -> Any:
        pairs = " ".join(f"'{name}={value}'" for name, value in form.items())
        return json.loads(self.run(f"python3 /root/etcd.py {method} {PREFIX}{key} {pairs}"))

    def put_config(self, backend: str) -> None:
        config = {"Network": "10.5.0.0/16", "SubnetMax": "10.5.49.0", "Backend": {"Type": backend}}
        self.etcd("PUT", "/config", value=json.dumps(config))

    def put_lease(self, subnet: str, public_ip: str, backend: str) -> None:
        """Write a lease as another host would."""
        data = BACKENDS[backend][0]
        value = f'{{"PublicIP":"{public_ip}","BackendType":"{backend}"{data and ","}{data}}}'
        self.etcd("PUT", f"/subnets/{subnet.replace('/', '-')}", value=value, ttl="3600")

    def subnet(self) -> str:
        """Return this host's subnet, as the subnet file has it."""
        found = re.search(r"FLANNEL_SUBNET=(\S+)", self.run("cat /run/flannel/subnet.env"))
        assert found
        return str(ipaddress.ip_interface(found[1]).network)

    def bip(self) -> str:
        """Return the address docker's bridge should have."""
        network = ipaddress.ip_network(self.subnet())
        return f"{network[1]}/{network.prefixlen}"

    def log(self, unit: str = "flanneld", since: str = "") -> str:
        """Return the journal of a unit, from ``since`` (a result of `time`) on."""
        after = f"--since='{since}'" if since else ""
        return self.ask(f"journalctl --no-pager --output=cat -u {unit} {after}")

    def time(self) -> str:
        """Return a time that everything so far is before, for `log`."""
        return self.ask("sleep 1; date '+%Y-%m-%d %H:%M:%S'")

    def wait_active(self, unit: str = "flanneld") -> None:
        self.machine.wait(
            lambda: self.ask(f"systemctl is-active {unit}") == "active", f"{unit} to be active"
        )

    def docker_has(self, bip: str) -> bool:
        """Tell whether docker is up with this address, and so is its bridge."""
        line = self.ask(f"tr '\\0' ' ' </proc/{self.pid('docker')}/cmdline")
        address = self.ask("ip -br -4 address show dev docker0")
        active = self.ask("systemctl is-active docker") == "active"
        return active and f"--bip={bip} " in line and bip in address.split()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[vm.Machine]:
    tree = tmp_path_factory.mktemp("tree")
    subprocess.run(["make", "-C", TOP, "install-system", f"DESTDIR={tree}"], check=True)
    (tree / "root").mkdir(mode=0o700)
    (tree / "root" / "etcd.py").write_text(ETCD)
    (tree / "root" / "rights.py").write_text(RIGHTS)
    with vm.Machine(vm_image.build(), tree) as running:
        yield running


@pytest.fixture
def node(machine: vm.Machine) -> Node:
    """The machine with a flanneld that runs on vxlan, whatever the test before has done."""
    node = Node(machine)
    node.run("systemctl stop docker.socket docker flanneld")
    node.run(
        f"rm -rf {os.path.dirname(DROP_IN)} && systemctl daemon-reload && systemctl start etcd"
    )
    node.write(SETTINGS, "")
    node.etcd("DELETE", "/subnets?recursive=true")
    node.put_config("vxlan")
    node.run("systemctl reset-failed && systemctl start flanneld")
    return node


def test_the_unit_is_in_order(node: Node) -> None:
    units = "flanneld.service flannel-docker.service docker.service"
    assert node.run(f"systemd-analyze verify {units} 2>&1 | grep -i flannel || true") == ""
    print(node.ask("systemd-analyze security flanneld --no-pager"))
    assert node.run("systemd-analyze security flanneld --threshold=30 >/dev/null; echo $?") == "0\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_ready_and_at_work(node: Node, backend: str) -> None:
    node.run("systemctl stop flanneld")
    node.etcd("DELETE", "/subnets?recursive=true")
    node.put_config(backend)
    since = node.time()
    node.run("systemctl start flanneld")
    assert node.ask("systemctl is-active flanneld") == "active"
    subnet = node.subnet()
    assert node.show("flanneld", "StatusText") == f"leased {subnet}, following the other hosts"
    lease = node.etcd("GET", f"/subnets/{subnet.replace('/', '-')}")["node"]
    assert json.loads(lease["value"])["PublicIP"] == "10.0.2.15"
    node.put_lease("10.5.99.0/24", "10.0.2.99", backend)
    _, destination, device = BACKENDS[backend]
    node.machine.wait(
        lambda: f"dev {device}" in node.ask(f"ip route show proto 102 {destination}"), "the route"
    )
    if backend == "vxlan":
        assert "dst 10.0.2.99" in node.ask("bridge fdb show dev flannel.1")
        # A sysctl that the daemon sets: /proc/sys/net may be written.
        assert node.ask("cat /proc/sys/net/ipv6/conf/flannel.1/accept_ra") == "0"
    if backend == "udp":
        tunnel = node.ask(f"pgrep --parent {node.pid()}")
        assert "65534" in node.ask(f"grep Uid: /proc/{tunnel}/status")
        # Debian 12's kernel: 6.1.
        assert "no fast path (this kernel has no TCX" in node.log(since=since)
    assert not re.search("(?i)not permitted|denied|read-only|stays root", node.log(since=since))


def test_it_has_these_rights_and_no_others(node: Node) -> None:
    status = node.ask(f"cat /proc/{node.pid()}/status")
    held = {name: int(value, 16) for name, value in re.findall(r"(Cap\w+):\s*(\w+)", status)}
    assert held["CapBnd"] == held["CapPrm"] == held["CapEff"] == CAPABILITIES
    assert re.search(r"NoNewPrivs:\s*1", status)
    assert re.search(r"Seccomp:\s*2", status)
    assert re.search(r"Max core file size\s+0\s+0", node.ask(f"cat /proc/{node.pid()}/limits"))


def test_the_rights_are_enough_for_what_other_configs_need(node: Node) -> None:
    """A TUN device, a raw socket, a low port, a child that is another user, and rules with both
    kinds of iptables, whose modules are loaded by nobody else."""
    # The udp backend's test has loaded it.
    node.run("modprobe --remove tun")
    commands = [
        "/usr/local/lib/flanneld/bin/python /root/rights.py",
        *(
            f"{program} --wait -t nat -A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE --random-fully"
            for program in ("iptables-nft", "iptables-legacy")
        ),
    ]
    node.run("cp /root/rights.py /usr/local/share/rights.py")
    lines = [f"ExecStartPost={c.replace('/root/', '/usr/local/share/')}" for c in commands]
    node.write(DROP_IN, "\n".join(["[Service]", *lines]))
    node.run("rm -f /run/xtables.lock; systemctl daemon-reload && systemctl restart flanneld")
    assert "10.9.0.0/16" in node.ask("iptables-legacy-save -t nat")
    assert "10.9.0.0/16" in node.ask("nft list ruleset")
    for program in ("iptables-nft", "iptables-legacy"):
        node.run(f"{program} -t nat -F POSTROUTING")


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_masquerade_and_forward_rules(node: Node, kind: str) -> None:
    node.run("systemctl stop flanneld")
    node.run(f"update-alternatives --set iptables /usr/sbin/iptables-{kind}")
    node.write(SETTINGS, "FLANNELD_IP_MASQ=true")
    since = node.time()
    node.run("systemctl start flanneld")
    assert "10.5.0.0/16" in node.ask(f"iptables-{kind} -t nat -S FLANNEL-POSTRTG"), node.log()
    assert "10.5.0.0/16" in node.ask(f"iptables-{kind} -S FLANNEL-FWD")
    assert not re.search("Failed to set up|(?i:not permitted|denied)", node.log(since=since))
    node.run("update-alternatives --auto iptables")


def test_what_is_not_needed_is_out_of_reach(node: Node) -> None:
    attempts = {
        "touch /etc/x": "a file of the system",
        "touch /usr/x": "a program",
        "ls /root/etcd.py": "root's home",
        "sysctl -w kernel.hostname=x": "a sysctl beyond net",
        "head -c1 /dev/nvme0n1": "a disk",
        "unshare --user true": "a namespace",
        "modprobe dummy": "a module",
    }
    lines = [f'ExecStartPost=/bin/sh -c "! {attempt} 2>/dev/null"' for attempt in attempts]
    lines += ["ExecStartPost=touch /run/flannel/x"]
    node.write(DROP_IN, "\n".join(["[Service]", *lines]))
    node.run("systemctl daemon-reload && systemctl restart flanneld && rm /run/flannel/x")


def test_a_frozen_daemon_is_restarted(node: Node) -> None:
    subnet, before, since = node.subnet(), node.pid(), node.time()
    node.run(f"kill -STOP {before}")
    node.machine.wait(lambda: "Watchdog timeout" in node.log(since=since), "the watchdog")
    node.machine.wait(lambda: node.pid() not in (0, before), "a new daemon")
    node.wait_active()
    assert node.subnet() == subnet
    assert node.show("flanneld", "NRestarts") == "1"
    log = node.log(since=since)
    # Where each thread was.
    assert "Fatal Python error: Aborted" in log
    assert "in poll" in log or "monitor.py" in log


def test_a_daemon_that_works_is_not_restarted(node: Node) -> None:
    """Twice the watchdog's time with nothing to do, half of it without etcd."""
    before = node.pid()
    node.run("sleep 35; systemctl stop etcd; sleep 35; systemctl start etcd")
    assert node.pid() == before
    assert node.ask("systemctl is-active flanneld") == "active"


def test_stop_is_clean_and_the_next_start_goes_on(node: Node) -> None:
    node.put_lease("10.5.99.0/24", "10.0.2.99", "vxlan")
    route = "ip route show proto 102 10.5.99.0/24"
    node.machine.wait(lambda: "flannel.1" in node.ask(route), "the route")
    subnet, since = node.subnet(), node.time()
    node.run("systemctl stop flanneld")
    assert node.show("flanneld", "Result") == "success"
    assert node.show("flanneld", "ExecMainStatus") == "0"
    assert node.show("flanneld", "ActiveState") == "inactive"
    log = node.log(since=since)
    assert "Exiting..." in log
    assert "SIGKILL" not in log
    # The network and the files stay.
    assert "flannel.1" in node.ask(route)
    assert node.subnet() == subnet
    node.run("systemctl start flanneld")
    assert node.subnet() == subnet


def test_another_subnet_file(node: Node) -> None:
    """docker's options come from the file that the settings name, not from an older one."""
    node.write(SETTINGS, "FLANNELD_SUBNET_FILE=/run/flannel/other.env")
    node.run("rm /run/flannel/docker && systemctl restart flanneld")
    assert node.bip() in node.run("cat /run/flannel/other.env")
    assert f"--bip={node.bip()} " in node.run("cat /run/flannel/docker")
    node.write(SETTINGS, "")
    node.run("systemctl restart flanneld && rm /run/flannel/other.env")


def test_cleanup_leaves_a_service_that_runs_alone(node: Node) -> None:
    before, subnet = node.pid(), node.subnet()
    assert node.run("flanneld --cleanup >/tmp/cleanup 2>&1; echo $?") == "1\n"
    print(node.ask("cat /tmp/cleanup"))
    assert node.pid() == before
    assert node.subnet() == subnet
    assert "flannel.1" in node.ask("ip -br link show type vxlan")


def test_a_killed_daemon_comes_back(node: Node) -> None:
    subnet, before = node.subnet(), node.pid()
    node.run(f"kill -KILL {before}")
    node.machine.wait(lambda: node.pid() not in (0, before), "a new daemon")
    node.wait_active()
    assert node.subnet() == subnet


def test_without_etcd_the_start_waits_and_says_so(node: Node) -> None:
    node.run("systemctl stop flanneld etcd && systemctl start --no-block flanneld")
    node.machine.wait(
        lambda: "waiting for the network config" in node.show("flanneld", "StatusText"),
        "the status line",
    )
    node.run("sleep 35")
    assert node.show("flanneld", "ActiveState") == "activating"
    assert node.show("flanneld", "NRestarts") == "0"
    node.run("systemctl start etcd")
    node.wait_active()


def test_a_boot(node: Node) -> None:
    """docker starts after flanneld, with its subnet, and both after the network."""
    node.run("systemctl enable flanneld docker")
    node.machine.reboot()
    node.machine.wait(lambda: node.ask("systemctl is-system-running") == "running", "the boot")
    assert node.docker_has(node.bip())

    def at(unit: str, name: str) -> int:
        return int(node.show(unit, f"{name}TimestampMonotonic"))

    ready = at("flanneld", "ActiveEnter")
    assert at("network-online.target", "ActiveEnter") < at("flanneld", "ExecMainStart")
    assert ready < at("docker", "ExecMainStart")


def test_docker_keeps_running_while_flanneld_restarts(node: Node) -> None:
    node.run("systemctl start docker")
    assert node.docker_has(node.bip())
    before = node.pid("docker")
    since = node.time()
    node.run("systemctl restart flanneld")
    node.run(f"kill -KILL {node.pid()}")
    node.machine.wait(
        lambda: node.log("flannel-docker", since).count("Finished") >= 2, "two looks at docker"
    )
    node.run("systemctl stop flanneld && sleep 3")
    assert node.pid("docker") == before
    assert node.ask("systemctl is-active docker") == "active"


def test_another_subnet_restarts_docker(node: Node) -> None:
    node.run("systemctl start docker")
    before, lost = node.pid("docker"), node.subnet()
    node.put_lease(lost, "10.0.2.98", "vxlan")
    node.machine.wait(lambda: node.pid("docker") not in (0, before), "another docker")
    node.wait_active("docker")
    assert node.subnet() != lost
    node.machine.wait(lambda: node.docker_has(node.bip()), "docker with the new subnet")


def test_docker_does_not_start_without_a_subnet(node: Node) -> None:
    """And is started once there is one."""
    node.run("systemctl stop flanneld && rm /run/flannel/docker")
    node.write(SETTINGS, "FLANNEL_OPTIONS=-iface=nothing0")
    node.run("systemctl start docker || true")
    node.machine.wait(lambda: node.ask("systemctl is-failed docker") == "failed", "docker to fail")
    assert "nothing0" in node.log()
    # Nobody restarts flanneld but systemd.
    node.write(SETTINGS, "")
    node.wait_active("docker")
    assert node.docker_has(node.bip())


def test_docker_that_somebody_stopped_stays_stopped(node: Node) -> None:
    node.run("systemctl start docker")
    node.run("systemctl stop docker.socket docker")
    since = node.time()
    node.run("systemctl restart flanneld")
    node.machine.wait(lambda: "Finished" in node.log("flannel-docker", since), "a look at docker")
    assert node.pid("docker") == 0


@pytest.mark.parametrize("how", NO_DROP_IN)
def test_docker_without_the_drop_in_is_left_alone(node: Node, how: str) -> None:
    away, back = NO_DROP_IN[how]
    node.run(f"{away} && systemctl daemon-reload")
    try:
        node.run("systemctl start docker")
        before = node.pid("docker")
        assert "DOCKER_NETWORK_OPTIONS" not in node.run(f"cat /proc/{before}/environ")
        since = node.time()
        node.run("systemctl restart flanneld")
        node.machine.wait(
            lambda: "Finished" in node.log("flannel-docker", since), "a look at docker"
        )
        # No restart waits to be done, and none has been.
        assert "docker.service" not in node.run("systemctl list-jobs")
        assert node.pid("docker") == before
        assert node.ask("systemctl is-active docker") == "active"
    finally:
        node.run(f"{back} && systemctl daemon-reload")
