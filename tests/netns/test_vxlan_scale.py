"""Ten thousand peers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from network import MakeLab, client_of, key_of, put_config
from overlay import entries, of_peers, problems, wait_entries

from lab import Flanneld, Lab

PEERS = 10_000
LIVE = 500

# As a busy machine needs; the log has the seconds.
LONG = 20.0

Peer = tuple[str, str, str]


def peer(n: int) -> Peer:
    """Return subnet, public IP and MAC of one of the peers."""
    high, low = divmod(n, 256)
    mac = f"02:00:00:00:{high:02x}:{low:02x}"
    return f"10.{100 + high}.{low}.0/24", f"172.16.{high}.{low}", mac


def put_peers(lab: Lab, peers: Sequence[Peer]) -> None:
    """Write their leases, over a few connections at once."""
    workers = 4

    def put(some: Sequence[Peer]) -> None:
        with client_of(lab) as client:
            for subnet, ip, mac in some:
                data = f'{{"VtepMAC":"{mac}"}}'
                value = f'{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{data}}}'
                client.put(key_of(subnet), value, ttl=1000)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(put, [peers[n::workers] for n in range(workers)]))


def test_ten_thousand_peers(make_lab: MakeLab) -> None:
    """Each has its route, its neighbour and its FDB entry; so have those that come and go live."""
    lab = make_lab(1)
    (host,) = lab.hosts
    put_config(lab, Network="10.0.0.0/8", SubnetMax="10.99.0.0", Backend={"Type": "vxlan"})
    peers = [peer(n) for n in range(PEERS)]
    put_peers(lab, peers[:-LIVE])
    daemon = Flanneld(host).start()
    daemon.wait_ready(3 * LONG)
    # READY=1 means that all of them are in the kernel.
    assert entries(host) == of_peers(peers[:-LIVE])
    put_peers(lab, peers[-LIVE:])
    wait_entries(host, of_peers(peers), timeout=LONG)
    # Some of it lost.
    last = peers[-1]
    host.run(["bridge", "fdb", "del", last[2], "dev", "flannel.1"])
    host.ip(f"route del {last[0]}")
    wait_entries(host, of_peers(peers), timeout=LONG)
    # All of it lost.
    host.ip("link del flannel.1")
    wait_entries(host, of_peers(peers), timeout=LONG)
    with client_of(lab) as client:
        client.delete(key_of(last[0]))
    wait_entries(host, of_peers(peers[:-1]), timeout=LONG)
    assert problems(daemon) == ["flannel.1 was gone: it is made anew"]
