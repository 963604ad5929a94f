"""A real etcd with the v2 API, to be frozen, killed, emptied, restored.

Needs etcd 3.4 or 3.5 (Debian's etcd-server): 3.6 no longer has ``--enable-v2``.
"""

import random
import shutil
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lab import certs, names
from lab.etcdv2 import EtcdV2
from lab.process import LabError, end, environment, freeze, tail, thaw
from lab.wait import NotInTime, eventually

if TYPE_CHECKING:
    from lab.namespaces import Namespace

LOOPBACK = IPv4Address("127.0.0.1")
# etcd allocates a log segment of 64 MB ahead, and a second one early.
_DATA_BYTES = 256 << 20
_START_SECONDS = 20.0
# Below those that Linux gives to connections (from 32768 on): one of the many connections of labs
# beside this one would get the port between our look and etcd's start, or while etcd is down.
_PORTS = range(10_000, 32_768)


@dataclass(frozen=True, slots=True)
class Member:
    """Where one member of a cluster listens."""

    name: str
    address: IPv4Address
    client_port: int
    peer_port: int

    @property
    def peer_url(self) -> str:
        return f"http://{self.address}:{self.peer_port}"


@dataclass(frozen=True, slots=True)
class Login:
    """A user of etcd's v2 authentication."""

    user: str
    password: str


class Etcd:
    """One etcd. A context manager when used outside a lab.

    ``address`` is where it listens, in ``namespace`` or, without one, in the machine's own
    namespace: use loopback there. ``port`` 0 takes a free one on loopback, else 2379.
    ``tls``: HTTPS only, and only for clients with a certificate of ours. ``members`` and ``name``
    make it one of a cluster.
    """

    def __init__(
        self,
        address: IPv4Address = LOOPBACK,
        *,
        namespace: "Namespace | None" = None,
        port: int = 0,
        tls: bool = False,
        members: Sequence[Member] = (),
        name: str = "",
    ) -> None:
        self.address = address
        self._namespace = namespace
        prefix = namespace.lab.prefix if namespace else names.new_prefix()
        self.directory = names.temporary_directory(prefix, memory=_DATA_BYTES)
        self.data = self.directory / "data"
        self._log = self.directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[EtcdV2] = []
        self._login: Login | None = None
        self.certificates: certs.Certificates | None = None
        if tls:
            try:
                self.certificates = certs.make(self.directory / "tls", [address, LOOPBACK])
            except BaseException:
                names.remove_directory(self.directory)
                raise
        own = [member for member in members if member.name == name]
        self.member = own[0] if own else self._sole_member(port)
        self._members = tuple(members) or (self.member,)

    def _sole_member(self, port: int) -> Member:
        name = self.directory.name
        if self._namespace is not None:
            return Member(name, self.address, port or 2379, 2380)
        client_port, peer_port = free_ports(2, self.address)
        return Member(name, self.address, port or client_port, peer_port)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        scheme = "https" if self.certificates else "http"
        return f"{scheme}://{self.address}:{self.member.client_port}"

    @property
    def endpoints(self) -> str:
        """The value of flanneld's --etcd-endpoints."""
        return self.url

    @property
    def pid(self) -> int:
        """Raises LabError when etcd does not run."""
        if self._process is None or self._process.poll() is not None:
            raise LabError(f"etcd {self.member.name} does not run")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def client_flags(self) -> list[str]:
        """The flags a flanneld needs to use this etcd: endpoints, certificates, user."""
        return client_flags(self.endpoints, self.certificates, self._login)

    def client(self, login: Login | None = None, timeout: float = 5.0) -> EtcdV2:
        """A new client, usable from here although etcd may listen inside a namespace.

        It is closed with this etcd at the latest. Default login: the one flanneld gets.
        """
        login = login or self._login
        client = EtcdV2(
            self._connect,
            self.address,
            tls=self.certificates.client_context() if self.certificates else None,
            user=login.user if login else "",
            password=login.password if login else "",
            timeout=timeout,
        )
        self._clients.append(client)
        return client

    def _connect(self, timeout: float) -> socket.socket:
        def connect() -> socket.socket:
            return socket.create_connection(
                (str(self.address), self.member.client_port), timeout=timeout
            )

        return self._namespace.inside(connect) if self._namespace else connect()

    def start(self, *, wait: bool = True) -> None:
        """Start etcd on the data it left, or on none. Raises LabError if it does not come up."""
        self.launch()
        if wait:
            self.wait_healthy()

    def launch(self) -> None:
        """Start the process only. Raises LabError if it runs already."""
        if self.is_running:
            raise LabError(f"etcd {self.member.name} runs already")
        argv = self._command()
        if self._namespace is not None:
            self._process = self._namespace.popen(argv, output=self._log, env=_environment())
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )

    def _command(self) -> list[str]:
        member = self.member
        # A sole member elects itself after one election time; others need time to hear of it.
        heartbeat, election = (20, 200) if len(self._members) == 1 else (100, 1000)
        argv = [
            "etcd",
            f"--name={member.name}",
            f"--data-dir={self.data}",
            "--enable-v2=true",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={member.peer_url}",
            f"--initial-advertise-peer-urls={member.peer_url}",
            "--initial-cluster=" + ",".join(f"{m.name}={m.peer_url}" for m in self._members),
            f"--heartbeat-interval={heartbeat}",
            f"--election-timeout={election}",
            "--logger=zap",
            "--log-outputs=stderr",
        ]
        if self.certificates:
            argv += [
                f"--cert-file={self.certificates.server}",
                f"--key-file={self.certificates.server_key}",
                f"--trusted-ca-file={self.certificates.ca}",
                "--client-cert-auth",
            ]
        return argv

    def wait_healthy(self, timeout: float = _START_SECONDS) -> None:
        """Wait until etcd answers and has a leader. Raises LabError with its log otherwise."""

        def healthy() -> bool:
            if self._process is None or self._process.poll() is not None:
                raise LabError(f"etcd {self.member.name} ended\n{self.explain()}")
            # The name, since another etcd may hold our port: ours is about to fail then.
            return client.is_healthy() and client.member_name() == self.member.name

        with self.client(timeout=1.0) as client:
            try:
                eventually(healthy, timeout, f"etcd {self.member.name} healthy")
            except NotInTime as error:
                raise LabError(f"{error}\n{self.explain()}") from None

    def stop(self) -> None:
        """Stop it in order; the data stays. Safe to repeat."""
        if self._process is not None:
            end([self._process])

    def kill(self) -> None:
        """kill -9; the data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Connections stay open, nothing is answered from now on."""
        freeze(self.pid)

    def thaw(self) -> None:
        """Undo ``freeze``."""
        thaw(self.pid)

    def restart(self) -> None:
        """Stop it and start it on the same data."""
        self.stop()
        self.start()

    def wipe(self, *, wait: bool = True) -> None:
        """Come back with no data at all, and with an index that starts again. Ends any login."""
        self.stop()
        shutil.rmtree(self.data, ignore_errors=True)
        self._login = None
        self.start(wait=wait)

    def backup(self) -> Path:
        """A copy of the data as a crash at this moment would leave it."""
        copy = self.directory / f"backup-{len(list(self.directory.glob('backup-*')))}"
        self.freeze()
        try:
            shutil.copytree(self.data, copy)
        finally:
            self.thaw()
        return copy

    def restore(self, backup: Path) -> None:
        """Come back with the data of an earlier ``backup``, as from a restored disk."""
        self.stop()
        shutil.rmtree(self.data, ignore_errors=True)
        shutil.copytree(backup, self.data)
        self.start()

    def enable_auth(self, login: Login, pattern: str = "/coreos.com/network*") -> None:
        """Let only ``login`` in, only to keys of ``pattern`` (and root, with the same password).

        From then on ``client`` and ``client_flags`` use this login.
        """
        root = Login("root", login.password)
        access = {"kv": {"read": [pattern], "write": [pattern]}}
        everything = {"kv": {"read": ["/*"], "write": ["/*"]}}
        with self.client() as client:
            client.auth("users/root", {"user": root.user, "password": root.password})
            client.auth("roles/network", {"role": "network", "permissions": access})
            client.auth(
                f"users/{login.user}",
                {"user": login.user, "password": login.password, "roles": ["network"]},
            )
            client.auth("enable")
        # Without this everybody keeps the rights of the role "guest", which are all.
        with self.client(root) as client:
            client.auth("roles/guest", {"role": "guest", "revoke": everything})
        self._login = login

    def log(self) -> str:
        """What etcd wrote, over all its starts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def explain(self) -> str:
        """The last lines of the log, for a message."""
        return f"--- etcd {self.member.name}, last lines of its log:\n{tail(self.log())}"

    def close(self) -> None:
        """Kill it and remove its files. Safe to repeat.

        Not an orderly stop: a member that lost the others takes seconds over that.
        """
        self.kill()
        for client in self._clients:
            client.close()
        self._clients.clear()
        names.remove_directory(self.directory)


def client_flags(
    endpoints: str, certificates: certs.Certificates | None, login: Login | None
) -> list[str]:
    flags = [f"--etcd-endpoints={endpoints}"]
    if certificates:
        flags += [
            f"--etcd-cafile={certificates.ca}",
            f"--etcd-certfile={certificates.client}",
            f"--etcd-keyfile={certificates.client_key}",
        ]
    if login:
        flags += [f"--etcd-username={login.user}", f"--etcd-password={login.password}"]
    return flags


def _environment() -> dict[str, str]:
    """Without ETCD_*, each of which etcd would take for a flag."""
    return {name: value for name, value in environment().items() if not name.startswith("ETCD_")}


def free_ports(count: int, address: IPv4Address = LOOPBACK) -> list[int]:
    """Different ports nobody listens on now, and that no connection gets by itself."""
    found: list[int] = []
    # Not from the random numbers that hypothesis sets: labs beside this one would have the same.
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if len(found) == count:
            return found
        with suppress(OSError), socket.create_server((str(address), port)):
            found.append(port)
    raise LabError(f"no free ports on {address}")
