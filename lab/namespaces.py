"""Hosts and containers as network namespaces on one bridge.

    underlay   br0 10.97.0.254/24 ── p1, p2, ...      etcd listens here
    host N     eth0 10.97.0.N/24, default via .254    flanneld runs here
    container  eth0, behind the host's bridge cni0    addresses from the host's subnet.env

The machine's own namespace gets nothing but the namespaces' names under /run/netns.
"""

import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lab import names, setns, subnetenv
from lab.ping import BackgroundPing, PingResult, count_command, endless_command, parse
from lab.process import LabError, end, environment, run
from lab.signals import stop_signals_raise, undisturbed

if TYPE_CHECKING:
    from lab.cluster import EtcdCluster
    from lab.daemon import Flanneld
    from lab.etcd import Etcd

T = TypeVar("T")

UNDERLAY = IPv4Interface("10.97.0.254/24")
NETWORK = "10.5.0.0/16"
CONFIG_KEY = "/coreos.com/network/config"
# The addresses above belong to etcd.
MAX_HOSTS = 200


class Namespace:
    """One network namespace of a lab. ``label`` is its short name (h1), ``name`` the full one."""

    def __init__(self, lab: "Lab", label: str) -> None:
        self.lab = lab
        self.label = label
        self.name = f"{lab.prefix}-{label}"
        self.path = names.NETNS_DIRECTORY / self.name
        # Noted before it exists: an interruption in between must not leave it behind.
        lab.namespaces.append(self)
        run(["ip", "netns", "add", self.name])
        self.ip("link set lo up")

    def command(self, argv: Sequence[str]) -> list[str]:
        """``argv`` as a command that enters the namespace first and then becomes ``argv``.

        Not ``ip netns exec``, which mounts a /sys of its own without the cgroups.
        """
        return ["nsenter", f"--net={self.path}", *argv]

    def environment(self) -> dict[str, str]:
        """The environment of the commands inside.

        With a lock for iptables of its own: that in /run would be shared with all other labs.
        """
        return environment(XTABLES_LOCKFILE=str(self.lab.directory / f"{self.label}-xtables.lock"))

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30.0,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end. Raises LabError as ``process.run`` does."""
        argv = self.command(argv)
        return run(argv, check=check, timeout=timeout, stdin=stdin, env=self.environment())

    def popen(
        self, argv: Sequence[str], *, output: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process inside; what it writes is appended to ``output``.

        Its process id is the command's own. It is ended with the lab at the latest.
        """
        with output.open("ab") as file:
            process = subprocess.Popen(
                self.command(argv),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment() if env is None else env,
                start_new_session=True,
            )
        self.lab.processes.append(process)
        return process

    def inside(self, call: Callable[[], T]) -> T:
        """The result of a Python call made inside the namespace (``setns.inside``)."""
        return setns.inside(self.path, call)

    def ip(self, *commands: str) -> None:
        """Carry out lines of ``ip`` commands; the first that fails raises LabError."""
        argv = ["ip", "-n", self.name, "-batch", "-"]
        done = run(argv, stdin="\n".join(commands) + "\n", check=False)
        if done.returncode != 0:
            # "Command failed -:2" is the number of the line.
            failed = re.search(r"^Command failed -:(\d+)", done.stderr, re.MULTILINE)
            command = commands[int(failed[1]) - 1] if failed else "; ".join(commands)
            raise LabError(f"`ip {command}` in {self.label}: {done.stderr.strip()}")

    def ip_json(self, *arguments: str) -> list[dict[str, Any]]:
        """What ``ip -j ARGUMENTS`` shows: one dictionary for each route, link, neighbour..."""
        # An empty table is no output at all, or "[ ]" with an empty object inside.
        text = run(["ip", "-n", self.name, "-j", *arguments]).stdout.strip()
        return [entry for entry in json.loads(text or "[]") if entry]

    def set_sysctl(self, key: str, value: str) -> None:
        """Set ``net.*`` of this namespace, written as a path: ``net/ipv4/ip_forward``."""
        # /proc/sys/net is the one of the thread that opens it.
        self.inside(lambda: Path("/proc/sys", key).write_text(value))

    def ping(
        self,
        address: IPv4Address | str,
        count: int = 1,
        interval: float = 0.02,
        deadline: float = 1.0,
    ) -> PingResult:
        """Send ``count`` echo requests; waits ``deadline`` seconds for the last answer."""
        argv = count_command(address, count, interval, deadline)
        done = self.run(argv, check=False, timeout=count * interval + deadline + 10.0)
        return parse(done.stdout + done.stderr)

    def start_ping(self, address: IPv4Address | str, interval: float = 0.02) -> BackgroundPing:
        """Start an endless ping."""
        output = self.lab.scratch_file(f"{self.label}-ping")
        return BackgroundPing(self.popen(endless_command(address, interval), output=output), output)


class Container(Namespace):
    """A container: a namespace behind its host's bridge, with an address of the host's subnet."""

    def __init__(self, host: "Host", label: str, address: IPv4Interface) -> None:
        super().__init__(host.lab, label)
        self.host = host
        self.address = address.ip


class Host(Namespace):
    """A host: ``address`` is that of its eth0, ``directory`` stands for its /run/flannel.

    All hosts share one file system, so each has a directory of its own; ``subnet_file`` is in it.
    ``port`` is the other end of eth0, in the lab's ``underlay``.
    """

    def __init__(self, lab: "Lab", number: int) -> None:
        super().__init__(lab, f"h{number}")
        self.number = number
        self.address = UNDERLAY.network[number]
        self.directory = lab.directory / self.label
        self.directory.mkdir()
        self.subnet_file = self.directory / "subnet.env"
        self.containers: list[Container] = []
        self.port = f"p{number}"
        mac = f"02:97:00:00:00:{number:02x}"
        lab.underlay.ip(
            f"link add {self.port} mtu 1500 type veth"
            f" peer name eth0 mtu 1500 address {mac} netns {self.name}",
            f"link set {self.port} master br0 up",
        )
        self.ip(
            f"addr add {self.address}/{UNDERLAY.network.prefixlen} dev eth0",
            "link set eth0 up",
            f"route add default via {UNDERLAY.ip} dev eth0",
        )
        self.set_sysctl("net/ipv4/ip_forward", "1")

    def unplug(self) -> None:
        """Cut the host off from everything. Its eth0 stays up, as behind a dead switch."""
        self.lab.underlay.ip(f"link set {self.port} nomaster")

    def plug(self) -> None:
        """Undo ``unplug``."""
        self.lab.underlay.ip(f"link set {self.port} master br0")

    def add_container(self, subnet_env: Path | None = None) -> Container:
        """Start a container the way docker would be told to by ``subnet_env``.

        The default is the host's own file. FLANNEL_SUBNET becomes the address of the bridge cni0,
        the containers get the addresses after it, FLANNEL_MTU is everybody's MTU.
        """
        env = subnetenv.read(subnet_env or self.subnet_file)
        prefix = env.subnet.network.prefixlen
        if not self.containers:
            self.ip(
                f"link add cni0 mtu {env.mtu} type bridge",
                f"addr add {env.subnet} dev cni0",
                "link set cni0 up",
            )
        number = self.lab.next_container()
        address = IPv4Interface(f"{env.subnet.ip + 1 + len(self.containers)}/{prefix}")
        container = Container(self, f"c{number}", address)
        self.containers.append(container)
        self.ip(
            f"link add c{number} mtu {env.mtu} type veth"
            f" peer name eth0 mtu {env.mtu} netns {container.name}",
            f"link set c{number} master cni0 up",
        )
        container.ip(
            f"addr add {address} dev eth0",
            "link set eth0 up",
            f"route add default via {env.subnet.ip} dev eth0",
        )
        return container

    def subnet_env(self) -> subnetenv.SubnetEnv:
        """The host's ``subnet.env``, read now."""
        return subnetenv.read(self.subnet_file)


class Lab:
    """Hosts, and by default one etcd, as a context manager. Needs root.

    Leaving it, in whatever way, ends every process started through it and removes the namespaces
    and files. Until then SIGTERM and SIGHUP raise ``signals.Terminated``.
    """

    def __init__(self, hosts: int = 2, *, etcd: bool = True) -> None:
        if not 0 <= hosts <= MAX_HOSTS:
            raise LabError(f"hosts: {hosts}, but a lab has 0 to {MAX_HOSTS}")
        self.prefix = names.new_prefix()
        self.namespaces: list[Namespace] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.daemons: list[Flanneld] = []
        self.hosts: list[Host] = []
        self.underlay: Namespace
        self.directory: Path
        self.etcd: Etcd | EtcdCluster | None = None
        self._wanted = (hosts, etcd)
        self._files = 0
        self._signals = ExitStack()
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        self._signals.enter_context(stop_signals_raise())
        try:
            self._set_up()
        except BaseException:
            self._close_surely()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close_surely()

    def _close_surely(self) -> None:
        try:
            self.close()
        except KeyboardInterrupt:
            # A second Ctrl-C or SIGTERM may come just before `close` holds such off.
            self.close()
            raise

    def _set_up(self) -> None:
        hosts, etcd = self._wanted
        self.directory = names.temporary_directory(self.prefix)
        self.underlay = Namespace(self, "net")
        self.underlay.ip(
            "link add br0 type bridge", f"addr add {UNDERLAY} dev br0", "link set br0 up"
        )
        for _ in range(hosts):
            self.add_host()
        if etcd:
            self.start_etcd()

    def add_host(self) -> Host:
        """One more host, with the next number."""
        host = Host(self, len(self.hosts) + 1)
        self.hosts.append(host)
        return host

    def start_etcd(self, *, tls: bool = False) -> "Etcd":
        """Start an etcd on 10.97.0.254:2379 and wait until it is healthy."""
        from lab.etcd import Etcd

        etcd = Etcd(UNDERLAY.ip, namespace=self.underlay, tls=tls)
        self.etcd = etcd
        self.when_closing(etcd.close)
        etcd.start()
        return etcd

    def start_etcd_cluster(self, members: int = 3) -> "EtcdCluster":
        """Start a cluster on 10.97.0.251 and up, port 2379, and wait until it is healthy."""
        from lab.cluster import EtcdCluster

        cluster = EtcdCluster(self, members)
        self.etcd = cluster
        self.when_closing(cluster.close)
        cluster.start()
        return cluster

    def put_config(self, backend: str = "host-gw", network: str = NETWORK, **keys: object) -> None:
        """Write the network config into etcd; ``keys`` are further keys of the Backend part."""
        if self.etcd is None:
            raise LabError("this lab has no etcd to put a config into")
        config = {"Network": network, "Backend": {"Type": backend, **keys}}
        with self.etcd.client() as client:
            client.put(CONFIG_KEY, json.dumps(config))

    def next_container(self) -> int:
        """The number of the next container, counted over all hosts."""
        return 1 + sum(len(host.containers) for host in self.hosts)

    def scratch_file(self, name: str) -> Path:
        """A path in the lab's directory that no one has used yet."""
        self._files += 1
        return self.directory / f"{name}-{self._files}"

    def when_closing(self, call: Callable[[], object]) -> None:
        """Call this when the lab closes, before the processes left in it are ended."""
        self._closing.callback(call)

    def close(self) -> None:
        """End and remove everything. Safe to repeat. Raises LabError if something stayed."""
        with self._signals, undisturbed():
            try:
                self._closing.close()
                end(self.processes)
            finally:
                for namespace in reversed(self.namespaces):
                    names.delete_namespace(namespace.name)
                names.remove_directories(self.prefix)
        left = [n.name for n in self.namespaces if n.path.exists()]
        if left:
            raise LabError(f"could not delete the namespaces {', '.join(left)}")

    @staticmethod
    def sweep_stale() -> list[str]:
        """Remove what killed runs of ours left behind (``names.sweep_stale``)."""
        return names.sweep_stale()
