"""The MTU of containers behind a backend that wraps packets; the backend key ``MTU``."""

from collections.abc import Mapping

from flanneld.errors import BackendError
from flanneld.interface import ExternalInterface
from flanneld.subnet.config import int_key

# The least MTU with which IPv4 works (RFC 791), and the greatest a device can have.
LEAST, GREATEST = 68, 65535


def mtu_key(keys: Mapping[str, object], overhead: int) -> int:
    """Return the key: what counts as the external interface's MTU; 0 for its own.

    ``overhead`` is what the backend puts before a packet, in bytes. Raises BackendError.
    """
    mtu = int_key(keys, "MTU", 0, 0, GREATEST)
    if 0 < mtu < LEAST + overhead:
        raise BackendError(
            f"Backend key MTU must be 0 or at least {LEAST + overhead}, not {mtu}: the backend"
            f" itself takes {overhead} bytes of it"
        )
    return mtu


def inner_mtu(key: int, external: ExternalInterface, overhead: int) -> int:
    """Return what is left for packets of containers. Raises BackendError."""
    if key > external.mtu:
        raise BackendError(
            f"Backend key MTU is {key}, but {external.name} has an MTU of {external.mtu}:"
            " raise that of the interface, or lower the key"
        )
    mtu = (key or external.mtu) - overhead
    if mtu < LEAST:
        raise BackendError(
            f"the MTU of {external.name}, {external.mtu}, leaves {mtu} bytes for containers;"
            f" at least {LEAST} are needed"
        )
    return mtu
