"""Leases: which host holds which subnet, as the store's keys and values say it.

A lease is one key below ``<prefix>/subnets``: its name is the subnet (``10.5.34.0-24``), its
value a JSON object with the host's public IP and its backend's data. Both are shared with Go
daemons: they are written byte for byte as v0.8.0 writes them. What is read comes from outside
and is checked: what cannot be used as a lease is a :class:`BadLease`.
"""

import re
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network

from flanneld.subnet import gojson

# Seconds a lease lives; the original's.
LEASE_TTL = 86400

_OCTET = r"(0|[1-9][0-9]{0,2})"
_KEY = re.compile(rf"{_OCTET}\.{_OCTET}\.{_OCTET}\.{_OCTET}-([1-9]|[12][0-9]|3[01])")
# What v0.8.0 and this daemon write, without blanks and escapes. A start reads ten thousand of them
# at once, and the way through `gojson` takes four times as long.
_USUAL = re.compile(
    r'\{"PublicIP":"([0-9.]+)"(?:,"BackendType":"([a-z-]+)")?'
    r'(?:,"BackendData":(\{"VtepMAC":"[0-9a-f:]*"\}))?\}'
)
# Keys whose subnets are remembered for the seconds of a start, which reads every lease two or three
# times. Whoever follows the leases empties it then: full it takes 5 MB.
_KEYS = 16384
_RANGE = re.compile(r"(?<![0-9])([0-9]{1,3}(?:\.[0-9]{1,3}){3})-0*([0-9]+)")


class BadLease(ValueError):
    """A key or value that cannot be used as a lease. The text says why."""


@dataclass(frozen=True, slots=True)
class LeaseAttrs:
    """What a host publishes about itself: the value of its lease.

    ``backend_type`` is empty for udp and alloc. ``backend_data`` is JSON text, or ``None`` for
    a backend without any.
    """

    public_ip: IPv4Address
    backend_type: str = ""
    backend_data: str | None = None

    def encode(self) -> str:
        """The value as v0.8.0 writes it, byte for byte.

        Raises ``ValueError`` if ``backend_data`` is not JSON.
        """
        fields = [f'"PublicIP":"{self.public_ip}"']
        if self.backend_type:
            fields.append(f'"BackendType":{gojson.quote(self.backend_type)}')
        if self.backend_data is not None:
            gojson.decode(self.backend_data)
            fields.append(f'"BackendData":{gojson.compact(self.backend_data)}')
        return "{" + ",".join(fields) + "}"


@dataclass(frozen=True, slots=True)
class Lease:
    """One host's hold on one subnet, as last read from the store.

    ``ttl`` is the rest of its life in seconds when it was read; ``None`` if it has no end.
    ``modified_index`` is what a compare-and-swap of the key must name. ``created_index`` tells
    which of two leases is the older one; 0 if the key is not in the store yet.
    """

    subnet: IPv4Network
    attrs: LeaseAttrs
    ttl: int | None
    modified_index: int
    created_index: int = field(default=0, compare=False)

    @property
    def is_reservation(self) -> bool:
        """A key without a TTL: an operator keeps the subnet for this public IP."""
        return self.ttl is None

    @property
    def key(self) -> str:
        """The name of the lease's key."""
        return subnet_key(self.subnet)


def subnet_key(subnet: IPv4Network) -> str:
    """The name of a subnet's key: ``10.5.34.0-24`` for 10.5.34.0/24."""
    return f"{subnet.network_address}-{subnet.prefixlen}"


@lru_cache(_KEYS)
def parse_subnet_key(name: str) -> IPv4Network:
    """The subnet a key is named after: the inverse of :func:`subnet_key`.

    Raises :class:`BadLease` for any other spelling, host bits, and a length not in 1..31.
    """
    match = _KEY.fullmatch(name)
    if match is None:
        raise BadLease(f"failed to parse subnet key {gojson.shown(name)}: not like 10.5.34.0-24")
    *octets, length = (int(digits) for digits in match.groups())
    if max(octets) > 255:
        raise BadLease(f"failed to parse subnet key {name}: no IPv4 address")
    address = int.from_bytes(octets)
    if address & ((1 << (32 - length)) - 1):
        raise BadLease(f"failed to parse subnet key {name}: not the first address of a /{length}")
    return IPv4Network((address, length))


def taken_range(name: str) -> IPv4Network | None:
    """The addresses a key may stand for although it is not a readable lease.

    As lenient as v0.8.0, which looks for a subnet anywhere in the name and keeps host bits
    (masked here), so that no subnet is allocated that a Go daemon believes taken. Also
    ``/32``, which v0.8.0 writes but cannot read back. ``None`` for anything else; ``/0``
    too, since one such key would take the whole network.
    """
    with suppress(BadLease):
        return parse_subnet_key(name)
    match = _RANGE.search(name)
    if match is None or len(match[2]) > 2 or not 1 <= int(match[2]) <= 32:
        return None
    try:
        return IPv4Network((match[1], int(match[2])), strict=False)
    except ValueError:
        return None


def decode_attrs(text: str) -> LeaseAttrs:
    """Read the value of a lease, with Go's rules for names, order and null.

    ``backend_data`` is the field's own text without blanks; null counts as absent. Raises
    :class:`BadLease` if the text is not such a value, or ``PublicIP`` cannot be the address
    of a host.
    """
    usual = _USUAL.fullmatch(text)
    if usual is not None:
        address, backend_type, backend_data = usual.groups()
        return LeaseAttrs(_public_ip(address, f'"{address}"'), backend_type or "", backend_data)
    return _decode_any(text)


def _decode_any(text: str) -> LeaseAttrs:
    try:
        found = gojson.members(text)
    except gojson.JSONError as error:
        raise BadLease(f"not JSON: {error}") from None
    if found is None:
        raise BadLease(f"not a JSON object: {gojson.shown(text)}")
    public_ip: IPv4Address | None = None
    backend_type = ""
    backend_data: str | None = None
    for member in found:
        match gojson.fold(member.name):
            case "publicip":
                if not isinstance(member.value, str):
                    raise BadLease(f"PublicIP is {gojson.shown(member.raw)}, not a string")
                public_ip = _public_ip(member.value, member.raw)
            case "backendtype":
                if isinstance(member.value, str):
                    backend_type = gojson.scrub(member.value)
                elif member.value is not None:
                    raise BadLease(f"BackendType is {gojson.shown(member.raw)}, not a string")
            case "backenddata":
                backend_data = None if member.value is None else gojson.compact(member.raw)
    if public_ip is None:
        raise BadLease("PublicIP is missing")
    return LeaseAttrs(public_ip, backend_type, backend_data)


def _public_ip(text: str, raw: str) -> IPv4Address:
    try:
        # As strict as IPv4Address is with text, in a fifth of the time.
        address = IPv4Address(socket.inet_pton(socket.AF_INET, text))
    except (OSError, ValueError):
        raise BadLease(f"PublicIP {gojson.shown(raw)} is no IPv4 address") from None
    problem = unusable_public_ip(address)
    if problem is not None:
        raise BadLease(f"PublicIP {address} {problem}")
    return address


def unusable_public_ip(address: IPv4Address) -> str | None:
    """Why no host can be reached at ``address`` from others; ``None`` if one can."""
    match int(address) >> 24:
        case 0:
            return "is unspecified"
        case 127:
            return "is a loopback address"
        case first if 224 <= first < 240:
            return "is a multicast address"
        case first if first >= 240:
            return "is a reserved or broadcast address"
    return None


def parse_lease(
    name: str, value: str, ttl: int | None, modified_index: int, created_index: int = 0
) -> Lease:
    """The lease in one key. ``name`` is the last part of the key. Raises :class:`BadLease`."""
    return Lease(parse_subnet_key(name), decode_attrs(value), ttl, modified_index, created_index)


def check_peer(
    lease: Lease,
    config_network: IPv4Network,
    own_subnet: IPv4Network,
    own_public_ip: IPv4Address,
) -> str | None:
    """Why another host's lease must be ignored, or ``None`` if it may be used.

    The store must not be able to steer traffic other than the overlay's, nor this host's own.
    """
    subnet = lease.subnet
    if not _contains(config_network, subnet):
        return f"lease {subnet} is outside of Network {config_network}"
    if subnet.prefixlen == config_network.prefixlen:
        return f"lease {subnet} takes all of Network"
    if overlap(subnet, own_subnet):
        return f"lease {subnet} overlaps this host's subnet {own_subnet}"
    if lease.attrs.public_ip == own_public_ip:
        return f"lease {subnet} is for this host's own public IP {own_public_ip}"
    return None


def overlap(one: IPv4Network, other: IPv4Network) -> bool:
    """Whether they have addresses in common; cheaper than `IPv4Network.overlaps`."""
    return _contains(one, other) or _contains(other, one)


def _contains(outer: IPv4Network, inner: IPv4Network) -> bool:
    # subnet_of() is slow, and this runs for every lease of every snapshot.
    length = outer.prefixlen
    if length > inner.prefixlen:
        return False
    return (int(outer.network_address) ^ int(inner.network_address)) >> (32 - length) == 0
