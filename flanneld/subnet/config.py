"""The network config: the JSON object under ``<prefix>/config`` in the store.

What v0.8.0 accepts is accepted with the values it derives. The exception is what crashes it
or cannot work (subnets of /31, a range on no boundary, no ``Network`` at all): that is a
:class:`ConfigError`, which is retried, because the config may be mended in the store.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from types import MappingProxyType

from flanneld.errors import BackendError, ConfigError
from flanneld.subnet import gojson

DEFAULT_BACKEND = "udp"

# A subnet needs an address for the host and one for a container, beside the first and last.
LONGEST_SUBNET_LEN = 30

_UNSPECIFIED = IPv4Address(0)
_LONGEST_DIGITS = 9  # of a prefix length; more is no length, however many zeros it starts with
_IPV4_ONLY = "this version serves IPv4 only"

# Keys of later versions: folded name -> (name, value without effect, why it is ignored).
_LATER_KEYS: dict[str, tuple[str, object, str]] = {
    gojson.fold(name): (name, harmless, why)
    for name, harmless, why in (
        ("EnableIPv4", True, "this version always serves IPv4"),
        ("EnableIPv6", False, _IPV4_ONLY),
        ("IPv6Network", None, _IPV4_ONLY),
        ("IPv6SubnetLen", None, _IPV4_ONLY),
        ("IPv6SubnetMin", None, _IPV4_ONLY),
        ("IPv6SubnetMax", None, _IPV4_ONLY),
        ("Networks", [], "this version serves the one range in Network"),
        ("IPv6Networks", [], _IPV4_ONLY),
    )
}


@dataclass(frozen=True, slots=True)
class Config:
    """A checked network config.

    ``network.prefixlen < subnet_len <= 30``; ``subnet_min <= subnet_max``, both the addresses
    of subnets of that length inside ``network``. ``backend_type`` is as written, ``backend``
    the decoded ``Backend`` object with its keys as written (empty if there was none).
    ``ignored`` notes the keys of later versions that have no effect here. ``enable_nftables``:
    masquerade rules go into nftables, not iptables.
    """

    network: IPv4Network
    subnet_len: int
    subnet_min: IPv4Address
    subnet_max: IPv4Address
    backend_type: str
    backend: Mapping[str, object] = field(hash=False)
    ignored: tuple[str, ...] = ()
    enable_nftables: bool = False

    @property
    def backend_name(self) -> str:
        """The backend type for comparison: lower case."""
        return self.backend_type.lower()

    @property
    def subnet_size(self) -> int:
        """Addresses in each host's subnet."""
        return 1 << (32 - self.subnet_len)


@dataclass(slots=True)
class _Fields:
    """The members as read so far, before anything is derived."""

    network: IPv4Network | None = None
    subnet_len: int = 0
    subnet_min: IPv4Address = _UNSPECIFIED
    subnet_max: IPv4Address = _UNSPECIFIED
    backend: str | None = None
    enable_nftables: bool = False
    later: dict[str, object] = field(default_factory=dict)


def parse_config(text: str) -> Config:
    """Read and check the network config.

    Raises :class:`ConfigError` naming the field, its value and the remedy; never anything
    else, whatever the text.
    """
    try:
        fields = _read_fields(text)
        backend_type, backend = _read_backend(fields.backend)
    except gojson.JSONError as error:
        raise ConfigError(
            f"network config is not valid JSON: {error}; "
            'write one object such as {"Network":"10.5.0.0/16"}'
        ) from None
    except RecursionError:
        raise ConfigError("network config is nested too deep; write it flat") from None
    network = fields.network
    ignored = _ignored_notes(fields.later)
    if network is None or network.prefixlen == 0:
        value = "missing" if network is None else str(network)
        hint = f" ({'; '.join(ignored)})" if ignored else ""
        raise ConfigError(
            "please define a correct Network parameter in the flannel config: "
            f'Network is {value}; set it to an IPv4 range such as "10.5.0.0/16"{hint}'
        )
    subnet_len = _derive_subnet_len(network, fields.subnet_len)
    low, high = _derive_range(network, subnet_len, fields)
    nft = fields.enable_nftables
    return Config(network, subnet_len, low, high, backend_type, backend, ignored, nft)


def parse_cidr(text: str) -> IPv4Network:
    """``a.b.c.d/len`` with the host bits cut off, as Go's ``ParseCIDR`` reads it.

    Raises ``ValueError`` with Go's text for anything else, netmasks and IPv6 included.
    """
    address, slash, length = text.partition("/")
    if slash and length.isascii() and length.isdigit() and len(length) <= _LONGEST_DIGITS:
        try:
            return IPv4Network((address, int(length)), strict=False)
        except ValueError:
            pass
    raise ValueError(f"invalid CIDR address: {gojson.shown(text)}")


def _read_fields(text: str) -> _Fields:
    found = gojson.members(text)
    fields = _Fields()
    if found is None:
        document = gojson.decode(text)
        if document is None:  # Go leaves every field unset
            return fields
        raise ConfigError(
            f"network config must be a JSON object, not {gojson.kind(document)}; "
            'write it as {"Network":"10.5.0.0/16"}'
        )
    for member in found:
        match gojson.fold(member.name):
            case "network":
                fields.network = _network(member)
            case "subnetlen":
                # null leaves a number as it was
                if member.value is not None:
                    fields.subnet_len = _subnet_len(member)
            case "subnetmin":
                fields.subnet_min = _address("SubnetMin", member)
            case "subnetmax":
                fields.subnet_max = _address("SubnetMax", member)
            case "backend":
                fields.backend = member.raw
            case "enablenftables":
                if member.value is not None:
                    fields.enable_nftables = _enable_nftables(member)
            case folded if folded in _LATER_KEYS:
                fields.later[folded] = member.value
    return fields


def _network(member: gojson.Member) -> IPv4Network:
    try:
        return parse_cidr(member.value if isinstance(member.value, str) else member.raw)
    except ValueError as error:
        raise ConfigError(f'{error}; set Network to an IPv4 range such as "10.5.0.0/16"') from None


def _subnet_len(member: gojson.Member) -> int:
    value = member.value
    if type(value) is not int or value < 0:
        raise ConfigError(
            f"SubnetLen must be an integer from 1 to {LONGEST_SUBNET_LEN}, "
            f"not {gojson.shown(member.raw)}; leave it out for the default"
        )
    return value


def _enable_nftables(member: gojson.Member) -> bool:
    if not isinstance(member.value, bool):
        raise ConfigError(
            f"EnableNFTables must be true or false, not {gojson.shown(member.raw)}; "
            "leave it out for iptables"
        )
    return member.value


def _address(name: str, member: gojson.Member) -> IPv4Address:
    if isinstance(member.value, str):
        try:
            return IPv4Address(member.value)
        except ValueError:
            pass
    raise ConfigError(
        f"Invalid IP address format: {name} is {gojson.shown(member.raw)}; "
        "set it to the IPv4 address of a subnet inside Network, or leave it out"
    )


def _read_backend(raw: str | None) -> tuple[str, Mapping[str, object]]:
    """Type and keys of the ``Backend`` object whose text is ``raw``."""
    if raw is None:
        return DEFAULT_BACKEND, MappingProxyType({})
    found = gojson.members(raw)
    remedy = 'write it as {"Type":"vxlan"}'
    if found is None and raw != "null":
        raise ConfigError(
            "error decoding Backend property of config: "
            f"Backend must be an object, not {gojson.shown(raw)}; {remedy}"
        )
    backend_type = ""
    keys: dict[str, object] = {}
    for member in found or ():
        if member.value is None and member.name in keys:
            continue  # null leaves a value as it was
        if gojson.fold(member.name) == "type" and member.value is not None:
            if not isinstance(member.value, str):
                raise ConfigError(
                    "error decoding Backend property of config: "
                    f"Type must be a string, not {gojson.shown(member.raw)}; {remedy}"
                )
            backend_type = gojson.scrub(member.value)
        # Later members go to the end, so that the last of names equal but for case wins.
        keys.pop(member.name, None)
        keys[member.name] = _frozen(member.value)
    if not backend_type:
        raise ConfigError(f"Backend has no Type: it is {gojson.shown(raw)}; {remedy}")
    return backend_type, MappingProxyType(keys)


def _frozen(value: object) -> object:
    """A decoded JSON value made immutable, its strings fit to be encoded again."""
    if isinstance(value, str):
        return gojson.scrub(value)
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return MappingProxyType({name: _frozen(item) for name, item in value.items()})
    return value


def _derive_subnet_len(network: IPv4Network, given: int) -> int:
    """The subnet length given, or v0.8.0's default for the network, within its bounds."""
    if network.prefixlen >= LONGEST_SUBNET_LEN:
        raise ConfigError(
            f"network is too small: Network is {network}; "
            f"minimum useful network prefix is /{LONGEST_SUBNET_LEN - 1}"
        )
    if given:
        bounds = f"set it from {network.prefixlen + 1} to {LONGEST_SUBNET_LEN}"
        if given < network.prefixlen:
            raise ConfigError(
                "HostSubnet is larger network than Network: "
                f"SubnetLen is {given}, Network {network}; {bounds}"
            )
        if given > LONGEST_SUBNET_LEN:
            raise ConfigError(f"SubnetLen must be less than /31: it is {given}; {bounds}")
        if given == network.prefixlen:
            raise ConfigError(
                "network must be able to accommodate at least two subnets: "
                f"SubnetLen is {given}, Network {network}; {bounds}"
            )
        return given
    return 24 if network.prefixlen < 24 else network.prefixlen + 1


def _derive_range(
    network: IPv4Network, subnet_len: int, fields: _Fields
) -> tuple[IPv4Address, IPv4Address]:
    """First and last subnet to hand out: as given, else the network's second and last."""
    size = 1 << (32 - subnet_len)
    start = network.network_address
    low = fields.subnet_min
    if low == _UNSPECIFIED:
        low = start + size
    high = fields.subnet_max
    if high == _UNSPECIFIED:
        high = start + (network.num_addresses - size)
    for name, address in (("SubnetMin", low), ("SubnetMax", high)):
        if address not in network:
            raise ConfigError(
                f"{name} is not in the range of the Network: {name} is {address}, "
                f"Network {network}; set it to a subnet's address inside Network"
            )
        if int(address) % size:
            below = IPv4Address(int(address) // size * size)
            raise ConfigError(
                f"{name} is not on a SubnetLen boundary: {address}; "
                f"with SubnetLen {subnet_len} use {below}"
            )
    if low > high:
        default = "" if fields.subnet_min != _UNSPECIFIED else " (the default, the second subnet)"
        raise ConfigError(
            f"SubnetMin is above SubnetMax: {low}{default} > {high}; "
            "set SubnetMin to SubnetMax or below"
        )
    return low, high


def _ignored_notes(later: Mapping[str, object]) -> tuple[str, ...]:
    notes = []
    for folded, value in later.items():
        name, harmless, why = _LATER_KEYS[folded]
        if value is not None and value != harmless:
            notes.append(f"{name}: {why}")
    return tuple(notes)


def _backend_key(backend: Mapping[str, object], name: str) -> object:
    """The value under ``name``, as Go finds it; ``None`` if absent or null."""
    wanted = gojson.fold(name)
    for written, value in reversed(list(backend.items())):
        if value is not None and gojson.fold(written) == wanted:
            return value
    return None


def _value_text(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return gojson.shown(gojson.quote(value))
        case int() | float():
            return str(value)
        case _:
            return gojson.kind(value)


def int_key(backend: Mapping[str, object], name: str, default: int, lo: int, hi: int) -> int:
    """The integer under ``name`` in the backend's keys, or ``default`` if absent or null.

    Raises :class:`BackendError` unless it is a JSON integer with ``lo <= value <= hi``.
    """
    value = _backend_key(backend, name)
    if value is None:
        return default
    if type(value) is not int or not lo <= value <= hi:
        raise BackendError(
            f"Backend key {name} must be an integer from {lo} to {hi}, "
            f"not {_value_text(value)}; leave it out for {default}"
        )
    return value


def bool_key(backend: Mapping[str, object], name: str, default: bool) -> bool:
    """The boolean under ``name`` in the backend's keys, or ``default`` if absent or null.

    Raises :class:`BackendError` for any other kind of value.
    """
    value = _backend_key(backend, name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BackendError(
            f"Backend key {name} must be true or false, not {_value_text(value)}; "
            f"leave it out for {_value_text(default)}"
        )
    return value


def str_key(backend: Mapping[str, object], name: str, default: str) -> str:
    """The string under ``name`` in the backend's keys, or ``default`` if absent or null.

    Raises :class:`BackendError` for any other kind of value.
    """
    value = _backend_key(backend, name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise BackendError(f"Backend key {name} must be a string, not {_value_text(value)}")
    return value
