"""The subnet changes under docker's feet: flanneld says so, and a restart of docker mends it."""

from lab import eventually

from .cluster import Cluster, options

SUBNETS_KEY = "/coreos.com/network/subnets"
STRANGER = (
    '{"PublicIP":"10.97.0.77","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:77"}}'
)
PATIENCE = 15.0


def test_docker_is_restarted_with_the_options_of_a_new_subnet(own_cluster: Cluster) -> None:
    daemon, other = own_cluster.daemons
    docker, _ = own_cluster.dockers
    stranded, peer = own_cluster.containers
    eventually(lambda: not peer.ping(stranded.address, 1).lost, PATIENCE, "a ping")
    assert "docker0" not in daemon.log()

    # While the host was away its lease ended, and another host took the subnet.
    old = daemon.subnet()
    daemon.terminate()
    assert own_cluster.lab.etcd is not None
    with own_cluster.lab.etcd.client() as etcd:
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
    eventually(lambda: not peer.ping(container.address, 1).lost, PATIENCE, "a ping")
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
