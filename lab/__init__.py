"""A small network on one machine: hosts as network namespaces, a real etcd, real daemons.

The tests on the real kernel, the demo and the benchmark all stand on it:

    with Lab(hosts=2) as lab:
        lab.put_config("vxlan")
        daemons = [Flanneld(host).start() for host in lab.hosts]
        for daemon in daemons:
            daemon.wait_ready()
        one, two = (host.add_container() for host in lab.hosts)
        assert one.ping(two.address).lost == 0

Everything lives inside namespaces the lab made, carries the lab's own name, and is gone afterwards,
also after an exception, Ctrl-C or SIGTERM. Two labs may run side by side.
"""

from lab.daemon import Flanneld
from lab.namespaces import Container, Host, Lab, Namespace
from lab.ping import PingResult
from lab.process import LabError
from lab.wait import NotInTime, eventually

__all__ = [
    "Container",
    "Flanneld",
    "Host",
    "Lab",
    "LabError",
    "Namespace",
    "NotInTime",
    "PingResult",
    "eventually",
]
