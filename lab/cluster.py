"""Several real etcds in one cluster, each on a machine of its own, to be killed or cut off."""

import shutil
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

from lab.etcd import Etcd, Member, client_flags
from lab.etcdv2 import EtcdV2
from lab.process import LabError
from lab.wait import eventually

if TYPE_CHECKING:
    from lab.namespaces import Lab, Namespace

# The members are .251 and up.
_BELOW = IPv4Address("10.97.0.250")
_ELECTION_SECONDS = 20.0


class EtcdCluster:
    """Members with a namespace (m1 and up) and an address (10.97.0.251 and up) each."""

    def __init__(self, lab: "Lab", members: int = 3) -> None:
        known = [Member(f"m{n}", _BELOW + n, 2379, 2380) for n in range(1, members + 1)]
        self._places: dict[str, Namespace] = {m.name: _plug_in(lab, m) for m in known}
        self.members = [
            Etcd(m.address, namespace=self._places[m.name], members=known, name=m.name)
            for m in known
        ]

    @property
    def endpoints(self) -> str:
        """All members, for flanneld's --etcd-endpoints."""
        return ",".join(member.url for member in self.members)

    def client_flags(self) -> list[str]:
        """As ``Etcd.client_flags``, with all members."""
        return client_flags(self.endpoints, None, None)

    def client(self, timeout: float = 5.0) -> EtcdV2:
        """A client of the first member that is healthy. Raises LabError if none is."""
        for member in self.members:
            with member.client(timeout=1.0) as probe:
                healthy = probe.is_healthy()
            if healthy:
                return member.client(timeout=timeout)
        raise LabError("no member of the etcd cluster is healthy")

    def start(self) -> None:
        """Start all members that do not run, and wait until each has joined."""
        for member in self.members:
            if not member.is_running:
                member.launch()
        self.wait_healthy()

    def wait_healthy(self, without: Etcd | None = None) -> None:
        """Wait until all members, or all but one, have a leader. Raises LabError."""
        for member in self.members:
            if member is not without:
                member.wait_healthy()

    def leader(self) -> Etcd:
        """The member that leads now. Raises NotInTime if none does."""
        found = eventually(self._find_leader, _ELECTION_SECONDS, "a leader of the etcd cluster")
        assert found is not None
        return found

    def _find_leader(self) -> Etcd | None:
        for member in self.members:
            with member.client(timeout=1.0) as client:
                if client.is_leader():
                    return member
        return None

    def cut_off(self, member: Etcd) -> None:
        """Part a member from the others. Its clients reach it, and it answers what it knows."""
        self._part(member, "add")

    def reunite(self, member: Etcd) -> None:
        """Undo ``cut_off``."""
        self._part(member, "del")

    def _part(self, member: Etcd, verb: str) -> None:
        for other in self.members:
            if other is not member:
                # On both sides: what is not acknowledged would still come in for a while.
                for here, there in ((member, other), (other, member)):
                    self._places[here.member.name].ip(f"route {verb} blackhole {there.address}/32")

    def wipe(self) -> None:
        """All members come back with no data at all."""
        for member in self.members:
            member.kill()
            shutil.rmtree(member.data, ignore_errors=True)
        self.start()

    def backup(self) -> dict[str, Path]:
        """Copies of all members' data as a power cut at this moment would leave them."""
        for member in self.members:
            member.freeze()
        copies = {}
        try:
            for member in self.members:
                copies[member.member.name] = copy = member.directory / "backup"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(member.data, copy)
        finally:
            for member in self.members:
                member.thaw()
        return copies

    def restore(self, backup: Mapping[str, Path]) -> None:
        """All members come back with the data of the latest ``backup``."""
        for member in self.members:
            member.kill()
            shutil.rmtree(member.data, ignore_errors=True)
            shutil.copytree(backup[member.member.name], member.data)
        self.start()

    def explain(self) -> str:
        return "\n".join(member.explain() for member in self.members)

    def close(self) -> None:
        """End all members and remove their files. Safe to repeat."""
        for member in self.members:
            member.close()


def _plug_in(lab: "Lab", member: Member) -> "Namespace":
    """Make the member's machine."""
    from lab.namespaces import UNDERLAY, Namespace

    place = Namespace(lab, member.name)
    lab.underlay.ip(
        f"link add {member.name} type veth peer name eth0 netns {place.name}",
        f"link set {member.name} master br0 up",
    )
    place.ip(f"addr add {member.address}/{UNDERLAY.network.prefixlen} dev eth0", "link set eth0 up")
    return place
