"""The backends by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from flanneld.backend.base import Constructor
from flanneld.errors import BackendError


def _host_gw() -> Constructor:
    from flanneld.backend.hostgw import HostGW

    return HostGW


def _vxlan() -> Constructor:
    from flanneld.backend.vxlan import Vxlan

    return Vxlan


def _udp() -> Constructor:
    from flanneld.backend.udp.backend import Udp

    return Udp


# Each entry imports its backend only when it is asked for: a host uses one of them.
BACKENDS: Mapping[str, Callable[[], Constructor]] = MappingProxyType(
    {"udp": _udp, "vxlan": _vxlan, "host-gw": _host_gw}
)


def find_backend(name: str) -> Constructor:
    """Return the constructor of the backend ``name``, in whatever case it is written.

    Raises BackendError for an unknown name.
    """
    try:
        load = BACKENDS[name.lower()]
    except KeyError:
        known = ", ".join(BACKENDS)
        raise BackendError(
            f"unknown backend type: {name} (this version has: {known}; correct Backend.Type in the"
            " network config)"
        ) from None
    return load()
