"""The subnet changes under docker's feet: flanneld says so, and a restart of docker mends it."""

from lab import eventually

from .cluster import PATIENCE, MakeCluster, options, wait_answer

SUBNETS_KEY = "/coreos.com/network/subnets"
STRANGER = (
    '{"PublicIP":"10.97.0.77","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:77"}}'
)


def test_docker_is_restarted_with_the_options_of_a_new_subnet(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    daemon, other = cluster.daemons
    docker, _ = cluster.dockers
    stranded, peer = cluster.containers
    wait_answer(peer, stranded)
    assert "docker0" not in daemon.log()

    # While the host was away its lease ended, and another host took the subnet.
    old = daemon.subnet()
    daemon.terminate()
    assert cluster.lab.etcd is not None
    with cluster.lab.etcd.client() as etcd:
        key = f"{SUBNETS_KEY}/{str(old).replace('/', '-')}"
        assert etcd.get(key) is not None
        etcd.delete(key)
        etcd.put(key, STRANGER, ttl=1000)
    daemon.start()
    daemon.wait_ready(2 * PATIENCE)
    new = daemon.subnet()
    assert new != old

    line = daemon.wait_log(r"^W.*docker0 has (\S+), but this host's subnet is (\S+): .*").group(0)
    assert f"docker0 has {old.network_address + 1}/24" in line
    assert f"--bip={new.network_address + 1}/24" in line
    assert "systemctl restart docker" in line
    other.wait_log(f"Subnet added: {new}")
    assert peer.ping(stranded.address, 1).lost == 1

    docker.stop()
    docker.start(*options(docker.host))
    container = docker.run()
    assert container.address in new
    wait_answer(peer, container)
    assert peer.seen_by(container) == str(peer.address)
    assert container.seen_by(peer) == str(container.address)

    # The old bridge was in the way of the subnet's new owner.
    def follows_the_owner() -> bool:
        routes = docker.host.ip_json("-4", "route", "show", str(old))
        return [route["dev"] for route in routes] == ["flannel.1"]

    eventually(follows_the_owner, PATIENCE, f"the route to {old}")

    # Nothing to complain about at the next start.
    daemon.terminate()
    daemon.start()
    daemon.wait_ready(2 * PATIENCE)
    assert daemon.subnet() == new
    assert daemon.terminate() == 0
    assert "docker0" not in daemon.log()
