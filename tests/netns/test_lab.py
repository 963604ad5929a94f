"""The lab keeps its promises: what it makes works, and nothing of it stays behind."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from lab import Flanneld, Host, Lab, LabError, NotInTime, eventually, names
from lab.etcd import Etcd, Login
from lab.etcdv2 import EtcdV2, EtcdV2Error
from lab.notify import NotifySocket
from lab.process import is_running

MakeLab = Callable[..., Lab]

TOP = Path(__file__).parents[2]

# Stands in for flanneld: it says its flags and READY=1, then waits for SIGTERM.
READY = """
import os, signal, socket, sys, time
def leave(*_):
    print("leaving", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, leave)
print(" ".join(sys.argv[1:]), flush=True)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    for text in (b"STATUS=starting", b"READY=1"):
        notify.sendto(text, os.environ["NOTIFY_SOCKET"])
while True:
    time.sleep(10)
"""


def stand_in(host: Host, code: str, *extra: str) -> Flanneld:
    return Flanneld(host, *extra, program=(sys.executable, "-c", code))


def write_subnet_env(host: Host, subnet: str, mtu: int = 1450) -> None:
    host.subnet_file.write_text(
        f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={subnet}\n"
        f"FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n"
    )


def left_of(prefix: str) -> list[str]:
    """Namespaces and directories of a run, and processes whose command line names it."""
    parents = (names.NETNS_DIRECTORY, Path("/tmp"), names.MEMORY)  # noqa: S108 - only listed
    found = [str(path) for parent in parents for path in parent.glob(f"{prefix}-*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if f"{prefix}-".encode() in command:
            found.append(f"{process.name} {command.decode(errors='replace')}")
    return found


def root_links() -> set[str]:
    shown = subprocess.run(["ip", "-j", "link"], capture_output=True, check=True, timeout=10)
    return {link["ifname"] for link in json.loads(shown.stdout)}


# Namespaces, hosts, containers


def test_hosts_come_and_go_and_the_machine_is_left_alone() -> None:
    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    before = (root_links(), forwarding.read_text())
    with Lab(hosts=2) as lab:
        one, two = lab.hosts
        assert (str(one.address), str(two.address)) == ("10.97.0.1", "10.97.0.2")
        assert one.ping(two.address, 3).lost == 0
        assert one.ping("10.97.0.254").lost == 0
        (eth0,) = one.ip_json("link", "show", "eth0")
        assert (eth0["mtu"], eth0["address"]) == (1500, "02:97:00:00:00:01")
        (default,) = one.ip_json("route", "show", "default")
        assert (default["gateway"], default["dev"]) == ("10.97.0.254", "eth0")
        assert one.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "1\n"
        assert (root_links(), forwarding.read_text()) == before
    assert left_of(lab.prefix) == []
    assert (root_links(), forwarding.read_text()) == before


def test_two_labs_side_by_side_do_not_meet(make_lab: MakeLab) -> None:
    one, other = make_lab(), make_lab()
    for lab, value in ((one, "one"), (other, "other")):
        assert isinstance(lab.etcd, Etcd)
        lab.etcd.client().put("/who", value)
    for lab, value in ((one, "one"), (other, "other")):
        assert isinstance(lab.etcd, Etcd)
        node = lab.etcd.client().get("/who")
        assert node is not None
        assert node.value == value
    one.close()
    assert other.hosts[0].ping(other.hosts[1].address).lost == 0


def test_containers_are_set_up_from_subnet_env(make_lab: MakeLab) -> None:
    lab = make_lab(etcd=False)
    one, two = lab.hosts
    write_subnet_env(one, "10.5.17.1/24")
    write_subnet_env(two, "10.5.18.1/24")
    first, second = one.add_container(), two.add_container()
    neighbour = one.add_container()
    addresses = [str(c.address) for c in (first, second, neighbour)]
    assert addresses == ["10.5.17.2", "10.5.18.2", "10.5.17.3"]
    assert [link["mtu"] for link in first.ip_json("link", "show", "eth0")] == [1450]
    assert [link["mtu"] for link in one.ip_json("link", "show", "cni0")] == [1450]
    assert first.ping(neighbour.address, 2).lost == 0
    assert first.ping(second.address, 2, deadline=0.3).lost == 2
    one.ip(f"route add 10.5.18.0/24 via {two.address}")
    two.ip(f"route add 10.5.17.0/24 via {one.address}")
    assert first.ping(second.address, 3).lost == 0


def test_a_running_ping_counts_what_a_cut_cable_costs(make_lab: MakeLab) -> None:
    one, two = make_lab(etcd=False).hosts
    untouched, cut = one.start_ping(two.address), one.start_ping(two.address)
    untouched.wait_received(3)
    assert untouched.stop().lost == 0
    cut.wait_received(3)
    two.unplug()
    time.sleep(0.3)
    two.plug()
    cut.wait_received(3)
    result = cut.stop()
    assert result.lost == len(result.missing) > 5
    assert result.sent == result.received + result.lost
    first, last = result.missing[0], result.missing[-1]
    assert result.missing == tuple(range(first, last + 1))


def test_a_command_that_fails_names_itself_and_its_error(make_lab: MakeLab) -> None:
    (host,) = make_lab(hosts=1, etcd=False).hosts
    with pytest.raises(LabError, match=r"`nsenter .* ip link show nope` .*status 1.*nope"):
        host.run(["ip", "link", "show", "nope"])
    with pytest.raises(LabError, match=r"did not end within 0\.2 s"):
        host.run(["sleep", "10"], timeout=0.2)
    with pytest.raises(LabError, match=r"`ip link add br7 .*h1: .*File exists"):
        host.ip("link set lo up", "link add br7 type bridge", "link add br7 type bridge")


# etcd


def test_etcd_reads_writes_expires_and_compares() -> None:
    with Etcd() as etcd, etcd.client() as client:
        assert client.get("/a/b") is None
        assert client.list("/a") == {}
        assert client.delete("/a/b") is False
        written = client.put("/a/b", "x=1&y ü", ttl=100, prev_exist=False)
        assert written.ttl == 100
        assert client.index() == written.modified_index
        with pytest.raises(EtcdV2Error) as exists:
            client.put("/a/b", "again", prev_exist=False)
        assert exists.value.code == 105
        with pytest.raises(EtcdV2Error) as changed:
            client.put("/a/b", "again", prev_index=written.modified_index + 1)
        assert changed.value.code == 101
        assert {name: node.value for name, node in client.list("/a").items()} == {"b": "x=1&y ü"}
        assert client.put("/a/b", "for ever").ttl is None
        assert client.delete("/a", recursive=True) is True


def test_etcd_frozen_killed_emptied_and_restored() -> None:
    with Etcd() as etcd, etcd.client(timeout=0.3) as client:
        client.put("/kept", "1")
        etcd.freeze()
        with pytest.raises(TimeoutError):
            client.get("/kept")
        etcd.thaw()
        assert client.get("/kept") is not None
        backup = etcd.backup()
        client.put("/later", "2")
        etcd.kill()
        with pytest.raises((OSError, http.client.HTTPException)):
            client.get("/kept")
        etcd.start()
        assert client.get("/later") is not None
        index = client.index()
        etcd.restore(backup)
        assert client.get("/kept") is not None
        assert client.get("/later") is None
        etcd.wipe()
        assert client.get("/kept") is None
        assert client.index() < index


def test_etcd_that_cannot_start_shows_its_log() -> None:
    with Etcd() as first:
        second = Etcd(port=first.member.client_port)
        with pytest.raises(LabError, match="address already in use"), second:
            pass
        assert not second.directory.exists()


def test_etcd_with_tls_wants_a_certificate(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1, etcd=False)
    etcd = lab.start_etcd(tls=True)
    assert etcd.client().put("/a", "secret").value == "secret"
    flags = dict(flag[2:].split("=", 1) for flag in etcd.client_flags())
    assert flags["etcd-endpoints"] == "https://10.97.0.254:2379"
    curl = """
import socket, ssl, sys
ca, certificate, key = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
if certificate:
    context.load_cert_chain(certificate, key)
with socket.create_connection(("10.97.0.254", 2379), 3) as raw:
    with context.wrap_socket(raw, server_hostname="10.97.0.254") as tls:
        tls.sendall(b"GET /health HTTP/1.0\\r\\n\\r\\n")
        print(tls.recv(1000))
"""
    argv = [sys.executable, "-c", curl, flags["etcd-cafile"]]
    known = [flags["etcd-certfile"], flags["etcd-keyfile"]]
    assert "200 OK" in lab.hosts[0].run([*argv, *known]).stdout
    assert "200 OK" not in lab.hosts[0].run([*argv, "", ""], check=False).stdout


def test_etcd_with_authentication_lets_only_the_user_in() -> None:
    with Etcd() as etcd:
        etcd.enable_auth(Login("flannel", "secret"))
        key = "/coreos.com/network/config"
        assert etcd.client().put(key, "{}").value == "{}"
        for login in (Login("flannel", "wrong"), Login("nobody", "")):
            with etcd.client(login) as stranger, pytest.raises(EtcdV2Error):
                stranger.get(key)
        with etcd.client() as client, pytest.raises(EtcdV2Error):
            client.put("/elsewhere", "1")
        assert etcd.client_flags()[1:] == ["--etcd-username=flannel", "--etcd-password=secret"]


def test_an_etcd_that_says_nothing_about_itself_is_not_yet_there() -> None:
    """Its statistics have no body while a rate in them is infinite."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname(), timeout=5)
        far, _ = server.accept()
        with far, EtcdV2(lambda _timeout: near, IPv4Address("127.0.0.1")) as client:
            far.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            assert client.member_name() == ""
            assert far.recv(4096).startswith(b"GET /v2/stats/self ")


def test_a_cluster_of_three_survives_one(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1, etcd=False)
    cluster = lab.start_etcd_cluster(3)
    assert cluster.endpoints.split(",") == [f"http://10.97.0.25{n}:2379" for n in (1, 2, 3)]
    lab.put_config("vxlan", VNI=7)
    cluster.members[0].kill()

    for member in cluster.members[1:]:
        member.wait_healthy()
        with member.client() as client:
            node = client.get("/coreos.com/network/config")
        assert node is not None
        assert node.json()["Backend"] == {"Type": "vxlan", "VNI": 7}
    assert lab.hosts[0].ping("10.97.0.252").lost == 0
    cluster.members[0].start()
    cluster.wipe()
    with cluster.client() as client:
        assert client.get("/coreos.com/network/config") is None


# Daemons


def test_a_daemon_gets_its_flags_says_ready_and_ends(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=1)
    (host,) = lab.hosts
    daemon = stand_in(host, READY, "--ip-masq").start()
    daemon.wait_ready()
    assert [message.text for message in daemon.notifications] == ["STATUS=starting", "READY=1"]
    ready_after = daemon.ready_after()
    assert ready_after is not None
    assert 0 < ready_after < 10
    assert daemon.log().split() == [
        "--etcd-endpoints=http://10.97.0.254:2379",
        "--iface=eth0",
        f"--subnet-file={host.subnet_file}",
        "--ip-masq",
    ]
    assert Path(f"/proc/{daemon.pid}/ns/net").stat().st_ino == host.path.stat().st_ino
    assert daemon.rss_kb() > 1000
    write_subnet_env(host, "10.5.17.1/24")
    assert daemon.subnet() == IPv4Network("10.5.17.0/24")
    assert daemon.terminate() == 7
    assert daemon.wait_log("^leaving$")


def test_what_was_said_is_there_at_once(tmp_path: Path) -> None:
    """Also when the thread that listens has had no turn since."""
    notify = NotifySocket(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        for number in range(500):
            daemon.sendto(b"WATCHDOG=1", str(notify.path))
            assert len(notify.messages) == number + 1
    notify.close()
    assert len(notify.messages) == 500


def test_a_daemon_killed_can_be_started_again(make_lab: MakeLab) -> None:
    (host,) = make_lab(hosts=1).hosts
    daemon = stand_in(host, READY).start()
    daemon.wait_ready()
    first = daemon.pid
    daemon.kill9()
    assert daemon.exit_code == -signal.SIGKILL
    assert not is_running(first)
    daemon.start()
    daemon.wait_ready()
    assert daemon.pid != first
    assert daemon.log().count("--iface=eth0") == 1


def test_a_daemon_that_ends_is_not_waited_for(make_lab: MakeLab) -> None:
    (host,) = make_lab(hosts=1).hosts
    daemon = stand_in(host, "import sys; sys.exit('E no such backend')").start()
    began = time.monotonic()
    with pytest.raises(NotInTime, match=r"(?s)h1.*status 1.*E no such backend"):
        daemon.wait_ready(30)
    assert time.monotonic() - began < 15


def test_waiting_in_vain_says_for_what_and_what_was_seen() -> None:
    with pytest.raises(NotInTime, match=r"(?s)0\.05 s: the moon; last seen: \[\].*detail"):
        eventually(list, 0.05, "the moon", detail=lambda: "detail")


# Nothing stays behind

# Under nohup SIGHUP is ignored, and would be in here.
CHILD = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path.insert(0, sys.argv[1])
from lab import Lab
with Lab(hosts=2) as lab:
    lab.hosts[0].popen(["sleep", "600"], output=lab.scratch_file("sleep"))
    lab.hosts[1].run(["sh", "-c", "setsid sleep 601 >/dev/null 2>&1 &"])
    lab.etcd.freeze()
    print(lab.prefix, flush=True)
    ENDING
"""


def start_child(ending: str) -> tuple[subprocess.Popen[str], str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.replace("ENDING", ending), str(TOP)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    prefix = child.stdout.readline().strip()
    assert re.fullmatch(r"fl\d+-[0-9a-f]{4}", prefix)
    return child, prefix


def three_pids(prefix: str) -> list[int]:
    pids = [pid for n in ("net", "h1", "h2") for pid in names.pids(f"{prefix}-{n}")]
    assert len(pids) == 3
    return pids


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_stays_after_a_signal(number: signal.Signals) -> None:
    child, prefix = start_child("time.sleep(60)")
    with child:
        # What was started may not have entered its namespace yet.
        pids = eventually(lambda: three_pids(prefix), 20, "etcd and two sleeps")
        child.send_signal(number)
        # A second one, while it cleans up, must not cut that short.
        time.sleep(0.02)
        child.send_signal(number)
        assert child.wait(20) != 0
    assert left_of(prefix) == []
    assert [pid for pid in pids if is_running(pid)] == []


# A second SIGTERM when the first has ended the work, and nothing is cleaned up yet.
TWICE = """
    import os
    from lab import namespaces
    def undisturbed(real=namespaces.undisturbed):
        namespaces.undisturbed = real
        os.kill(os.getpid(), signal.SIGTERM)
        return real()
    namespaces.undisturbed = undisturbed
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_nothing_stays_after_a_second_signal_before_the_clean_up() -> None:
    child, prefix = start_child(TWICE.strip())
    with child:
        assert child.wait(20) != 0
    assert left_of(prefix) == []


def test_nothing_stays_after_an_exception() -> None:
    child, prefix = start_child("raise ValueError")
    with child:
        assert child.wait(20) == 1
    assert left_of(prefix) == []


def test_a_failure_half_way_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(hosts=1)
    monkeypatch.setattr(Etcd, "_command", lambda _: ["sh", "-c", "echo no luck"])
    with pytest.raises(LabError, match="no luck"), lab:
        pass
    assert left_of(lab.prefix) == []


def test_a_killed_run_is_swept_by_the_next_and_a_living_one_is_not(make_lab: MakeLab) -> None:
    living = make_lab(hosts=1, etcd=False)
    child, prefix = start_child("time.sleep(60)")
    with child:
        child.kill()
        # Tests beside this one may sweep, too: not before this process has waited for it.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert f"{names.NETNS_DIRECTORY}/{prefix}-net" in left_of(prefix)
    Lab.sweep_stale()
    eventually(lambda: left_of(prefix) == [], 10, "the end of what was killed")
    assert living.hosts[0].path.exists()
    assert living.hosts[0].ping("10.97.0.254").lost == 0


def test_the_sweep_says_what_it_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a directory for temporary files that no other run looks into."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    nobody = 2**22 + 1  # more than Linux has
    stale, living = f"fl{nobody}-0a1b-x", f"fl{os.getpid()}-0a1b-x"
    for name in (stale, living, stale[1:], f"fl{nobody}-0a1-x"):
        (tmp_path / name).mkdir()
    removed = Lab.sweep_stale()
    assert [path for path in removed if path.startswith(str(tmp_path))] == [f"{tmp_path}/{stale}"]
    assert len(list(tmp_path.iterdir())) == 3
