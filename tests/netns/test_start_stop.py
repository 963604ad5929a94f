"""How the daemon starts, what it tells its service manager, and how it ends."""

import fcntl
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from network import (
    PATIENCE,
    MakeLab,
    client_of,
    etcd_of,
    key_of,
    leases,
    mesh,
    peer_routes,
    put_config,
    running,
    value_of,
    wait_told,
)

from lab import Flanneld, Host, Lab, eventually
from lab.process import freeze, thaw

# Seconds. The promise is two; a request that were waited for to its end would take five.
EXIT = 4.5

PROGRAM = [sys.executable, "-m", "flanneld"]


def said(daemon: Flanneld) -> list[str]:
    return [notification.text for notification in daemon.notifications]


# The stages at which a signal may come: each brings the daemon there.


def etcd_refuses(lab: Lab, daemon: Flanneld) -> None:
    etcd_of(lab).stop()
    daemon.start().wait_log("Couldn't fetch network config: .*connection refused")


def etcd_is_a_black_hole(_: Lab, daemon: Flanneld) -> None:
    daemon.host.unplug()
    daemon.start().wait_log("Created subnet manager")
    time.sleep(0.3)


def no_config(_: Lab, daemon: Flanneld) -> None:
    daemon.start().wait_log("Couldn't fetch network config: 100: Key not found")


def invalid_config(lab: Lab, daemon: Flanneld) -> None:
    put_config(lab, Network="10.5.0.0/33")
    daemon.start().wait_log("Couldn't fetch network config: invalid CIDR")


def no_free_subnet(lab: Lab, daemon: Flanneld) -> None:
    put_config(lab, SubnetMin="10.5.1.0", SubnetMax="10.5.1.0")
    with client_of(lab) as client:
        client.put(key_of("10.5.1.0/24"), value_of("10.97.0.99"))
    daemon.start().wait_log("out of subnets")


def ready(lab: Lab, daemon: Flanneld) -> None:
    put_config(lab)
    daemon.start().wait_ready()


def renewing_at_a_frozen_etcd(lab: Lab, daemon: Flanneld) -> None:
    ready(lab, daemon)
    etcd = etcd_of(lab)
    with etcd.client() as client:
        # Ready is not yet that: one that is frozen before would not hear of what comes now.
        eventually(lambda: client.watchers() == 2, PATIENCE, "both watches to wait")
        # While the daemon sleeps, it is given a reason to renew, and nobody to answer.
        freeze(daemon.pid)
        client.put(key_of(daemon.subnet()), value_of(daemon.host.address), ttl=100)
    wait_told(daemon)
    etcd.freeze()
    thaw(daemon.pid)
    daemon.wait_log("was rewritten by somebody else")
    time.sleep(0.3)
    assert "Lease renewed" not in daemon.log()


@pytest.mark.parametrize(
    "stage",
    [
        etcd_refuses,
        etcd_is_a_black_hole,
        no_config,
        invalid_config,
        no_free_subnet,
        ready,
        renewing_at_a_frozen_etcd,
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_in_order_at_every_stage(
    make_lab: MakeLab, stage: Callable[[Lab, Flanneld], None], number: signal.Signals
) -> None:
    """STOPPING=1 and status 0, within two seconds."""
    lab = make_lab(1)
    daemon = Flanneld(lab.hosts[0])
    stage(lab, daemon)
    os.kill(daemon.pid, number)
    assert daemon.wait_exit(EXIT) == 0
    assert said(daemon)[-1] == "STOPPING=1"
    assert daemon.log().splitlines()[-1].endswith("] Exiting...")
    assert "Starting shutdown..." in daemon.log()
    assert "Traceback" not in daemon.log()


def test_after_the_end_routes_lease_and_subnet_file_are_as_before(make_lab: MakeLab) -> None:
    lab, daemons = running(make_lab, 2)
    before = leases(lab)
    for daemon in daemons:
        text = daemon.host.subnet_file.read_text()
        assert daemon.terminate(EXIT) == 0
        assert daemon.host.subnet_file.read_text() == text
        assert peer_routes(daemon.host) == mesh(daemons, daemon.host)
    assert {name: node.modified_index for name, node in leases(lab).items()} == {
        name: node.modified_index for name, node in before.items()
    }


def test_a_signal_in_the_very_first_moments_ends_the_daemon_too(make_lab: MakeLab) -> None:
    """Before it can handle signals it ends by the signal itself; in neither case in a mess."""
    lab = make_lab(1)
    put_config(lab)
    daemon = Flanneld(lab.hosts[0])
    for step in range(12):
        daemon.start()
        time.sleep(0.03 * step)
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.wait_exit(EXIT) in (0, -signal.SIGTERM)
        assert "Traceback" not in daemon.log()
        assert "this is a bug" not in daemon.log()


def test_a_signal_while_the_health_servers_name_is_looked_up_ends_the_daemon(
    make_lab: MakeLab,
) -> None:
    """The C library waits ten seconds for a name server that does not answer."""
    lab = make_lab(1)
    silent = lab.underlay.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    lab.when_closing(silent.close)
    silent.bind(("10.97.0.254", 53))
    silent.settimeout(PATIENCE)
    servers = lab.scratch_file("resolv.conf")
    servers.write_text("nameserver 10.97.0.254\n")
    # In a mount namespace of its own, which leaves the process as it is.
    script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    program = ["unshare", "--mount", "sh", "-c", script, str(servers), *PROGRAM]
    flags = ("--healthz-ip=health.example", "--healthz-port=10471")
    daemon = Flanneld(lab.hosts[0], *flags, program=program).start()
    daemon.wait_log("Start healthz server on health.example:10471")
    assert silent.recv(512)  # it is asking
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait_exit(EXIT) == 0
    assert said(daemon)[-1] == "STOPPING=1"


# What keeps the rules cannot even be made.
BROKEN = """
from flanneld.masquerade import keeper

def make(*_, **__):
    raise RuntimeError("spoilt")

keeper.make = make
from flanneld.__main__ import console
console()
"""


@pytest.mark.parametrize("flags", [(), ("--ip-masq",)], ids=["later", "at once"])
def test_a_bug_in_what_keeps_the_rules_ends_the_daemon(
    make_lab: MakeLab, flags: tuple[str, ...]
) -> None:
    """Also where nobody waits for the rules: it must not run on without them in silence."""
    lab = make_lab(1)
    put_config(lab)
    daemon = Flanneld(lab.hosts[0], *flags, program=(sys.executable, "-c", BROKEN)).start()
    assert daemon.wait_exit(PATIENCE) == 1
    assert "RuntimeError: spoilt" in daemon.log()
    assert "this is a bug, please report it" in daemon.log()
    assert ("READY=1" in said(daemon)) is (not flags)


def test_a_signal_to_a_daemon_that_is_stopped_ends_it_when_it_goes_on(make_lab: MakeLab) -> None:
    """Of a process that wakes up the kernel asks any thread to take the signal."""
    lab = make_lab(1)
    put_config(lab)
    daemon = Flanneld(lab.hosts[0], "--healthz-port=10471")
    for _ in range(6):
        daemon.start().wait_ready()
        freeze(daemon.pid)
        os.kill(daemon.pid, signal.SIGTERM)
        thaw(daemon.pid)
        assert daemon.wait_exit(EXIT) == 0


def test_a_second_signal_ends_the_daemon_at_once(make_lab: MakeLab) -> None:
    """However stuck it is: here it cannot write its log, as nobody reads it."""
    lab = make_lab(1)
    put_config(lab)
    daemon = Flanneld(lab.hosts[0])
    reader, writer = os.pipe()
    with open(reader, "rb") as unread, open(writer, "wb") as full:
        process = subprocess.Popen(
            daemon.host.command(daemon.argv), stderr=full, stdin=subprocess.DEVNULL
        )
        lab.processes.append(process)
        eventually(lambda: leases(lab), PATIENCE, "a lease")
        eventually(daemon.host.subnet_file.exists, PATIENCE, "a subnet file")
        time.sleep(0.3)
        fcntl.fcntl(unread, fcntl.F_SETPIPE_SZ, 4096)
        # Through a description of its own: the daemon's must go on to block.
        filler = os.open(f"/proc/self/fd/{full.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
        try:
            while True:
                os.write(filler, b"x")
        except BlockingIOError:
            os.close(filler)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT) == -signal.SIGTERM


# READY=1 and STATUS


def test_ready_is_said_when_the_subnet_file_and_all_routes_are_there(make_lab: MakeLab) -> None:
    """The daemon is frozen the moment it says READY=1, and the state looked at."""
    lab = make_lab(1)
    (host,) = lab.hosts
    put_config(lab, Network="10.16.0.0/12", SubnetLen=24, SubnetMax="10.16.49.0")
    host.ip("addr add 172.30.0.1/16 dev eth0")
    wanted = {f"10.17.{n}.0/24": f"172.30.1.{n}" for n in range(1, 255)}
    with client_of(lab) as client:
        for subnet, gateway in wanted.items():
            client.put(key_of(subnet), value_of(gateway), ttl=600)
    path = host.directory / "trap"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trap:
        trap.bind(str(path))
        trap.settimeout(2 * PATIENCE)
        process = host.popen(
            Flanneld(host).argv,
            output=lab.scratch_file("trapped"),
            env={**os.environ, "NOTIFY_SOCKET": str(path)},
        )
        while trap.recv(4096) != b"READY=1":
            pass
        freeze(process.pid)
        assert host.subnet_file.read_text().count("\n") == 4
        assert peer_routes(host) == wanted


def test_the_service_manager_is_told_every_step(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    daemon = Flanneld(lab.hosts[0]).start()
    daemon.wait_log("Key not found")
    put_config(lab)
    daemon.wait_ready()
    subnet = daemon.subnet()
    assert daemon.terminate(EXIT) == 0
    texts = said(daemon)
    assert texts[0] == "STATUS=waiting for the network config"
    reasons = [text for text in texts if text.startswith(texts[0] + ": ")]
    assert reasons
    assert all("100: Key not found" in text for text in reasons)
    assert [text for text in texts[1:] if text not in reasons] == [
        "STATUS=acquiring a lease",
        f"STATUS=leased {subnet}, waiting for the other hosts' leases",
        "READY=1",
        f"STATUS=leased {subnet}, following the other hosts",
        "STOPPING=1",
    ]


def test_it_is_not_ready_while_etcd_is_away(make_lab: MakeLab) -> None:
    """Neither before nor after it knows the config; a frozen etcd answers nothing at all."""
    lab = make_lab(1)
    put_config(lab)
    etcd = etcd_of(lab)
    etcd.freeze()
    daemon = Flanneld(lab.hosts[0]).start()
    daemon.wait_log("Created subnet manager")
    time.sleep(0.5)
    assert daemon.ready_after() is None
    assert not daemon.host.subnet_file.exists()
    etcd.thaw()
    daemon.wait_ready()


@pytest.mark.parametrize("path", ["{}", "/proc/no/subnet.env", "{}/file/subnet.env"])
def test_a_subnet_file_that_cannot_be_written_ends_it_before_ready(
    make_lab: MakeLab, path: str
) -> None:
    lab = make_lab(1)
    put_config(lab)
    (lab.directory / "file").write_text("")
    path = path.format(lab.directory)
    daemon = Flanneld(lab.hosts[0], f"--subnet-file={path}").start()
    assert daemon.wait_exit(2 * PATIENCE) == 1
    assert daemon.ready_after() is None
    errors = [line for line in daemon.log().splitlines() if line.startswith("E")]
    assert len(errors) == 1
    assert f"Failed to write subnet file {path}: " in errors[0]
    assert "--subnet-file" in errors[0]


# The health server


def get(host: Host, path: str, port: int = 10471) -> tuple[int, bytes]:
    def request() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(str(host.address), port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    return host.inside(request)


def test_health_is_answered_before_and_after_the_config(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    daemon = Flanneld(host, "--healthz-port=10471").start()
    daemon.wait_log("Key not found")
    assert get(host, "/healthz") == (200, b"flanneld is running")
    put_config(lab)
    daemon.wait_ready()
    assert get(host, "/healthz") == (200, b"flanneld is running")
    for path in ("/", "/healthz/", "/health", "/metrics"):
        assert get(host, path)[0] == 404
    etcd_of(lab).freeze()
    assert get(host, "/healthz") == (200, b"flanneld is running")
    assert daemon.terminate(EXIT) == 0
    with pytest.raises(ConnectionRefusedError):
        get(host, "/healthz")


def test_a_health_port_in_use_ends_it(make_lab: MakeLab) -> None:
    lab = make_lab(1)
    (host,) = lab.hosts
    with host.inside(lambda: socket.create_server(("0.0.0.0", 10471))):  # noqa: S104 - a namespace
        daemon = Flanneld(host, "--healthz-port=10471").start()
        assert daemon.wait_exit(2 * PATIENCE) == 1
    assert "listen tcp 0.0.0.0:10471: Address already in use" in daemon.log()
    assert daemon.ready_after() is None
