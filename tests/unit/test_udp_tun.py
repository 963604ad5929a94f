"""Which offloads the tunnel's descriptors end up with on kernels that lack some."""

import errno
import fcntl
import socket
from ipaddress import IPv4Address

import pytest

from flanneld.backend.udp import tun
from flanneld.backend.udp.tun import ALL, Offload
from flanneld.errors import DeviceError

CSUM, TSO, USO = 0x01, 0x02, 0x60


@pytest.mark.parametrize(
    ("known", "missing", "lines"),
    [
        (CSUM | TSO | USO, Offload(0), 0),
        (CSUM | TSO, Offload.USO | Offload.JOIN_UDP, 1),
        (CSUM, Offload.USO | Offload.JOIN_UDP | Offload.TSO, 2),
        (0, Offload.USO | Offload.JOIN_UDP | Offload.TSO | Offload.CSUM, 3),
    ],
)
def test_the_device_gets_what_the_kernel_knows(
    monkeypatch: pytest.MonkeyPatch, known: int, missing: Offload, lines: int
) -> None:
    def ioctl(_fd: int, _request: int, bits: int) -> int:
        if bits & ~known:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    said: list[str] = []
    assert tun._set_offloads(3, said.append, ALL) == ALL & ~missing
    assert len(said) == lines


@pytest.mark.parametrize(
    ("wanted", "bits"),
    [
        (ALL, CSUM | TSO | USO),
        (ALL & ~Offload.USO, CSUM | TSO),
        (ALL & ~Offload.TSO, CSUM),
        (ALL & ~Offload.CSUM, 0),
        (Offload(0), 0),
    ],
)
def test_what_is_not_wanted_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, wanted: Offload, bits: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda _fd, _request, value: asked.append(value))
    tun._set_offloads(3, pytest.fail, wanted)
    assert asked == [bits]


class OldSocket(socket.socket):
    """A socket of Linux 4.17."""

    def getsockopt(self, level: int, name: int, *more: int) -> int:  # type: ignore[override]  # no bytes
        if level == socket.IPPROTO_UDP:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        return super().getsockopt(level, name, *more)

    def setsockopt(self, level: int, name: int, *value: object) -> None:
        if level == socket.IPPROTO_UDP or name in (32, 33):
            number = errno.EPERM if level == socket.SOL_SOCKET else errno.ENOPROTOOPT
            raise OSError(number, "refused")
        super().setsockopt(level, name, *value)  # type: ignore[call-overload]  # any


def test_an_old_socket_goes_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", OldSocket)
    said: list[str] = []
    udp, offload = tun.open_socket(said.append, IPv4Address("127.0.0.1"), 0)
    with udp:
        assert offload == ALL & ~(Offload.SEGMENT | Offload.GRO)
        assert len(said) == 2
        assert not udp.getblocking()


def test_a_port_in_use_is_said() -> None:
    first, _ = tun.open_socket(pytest.fail, IPv4Address("127.0.0.1"), 0, Offload(0))
    with first, pytest.raises(DeviceError, match="another flanneld"):
        tun.open_socket(pytest.fail, IPv4Address("127.0.0.1"), first.getsockname()[1])
