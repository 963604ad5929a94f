"""Which device and address this host uses for traffic to the other hosts.

Pure: ``HostFacts`` in, ``Selection`` out. The value types stand here, not beside the netlink code,
so that the decision needs no netlink library; ``kernel.link`` imports them and fills them in.

The rules and the log lines are those of flannel v0.8.0, with its order of trials: every
``--iface``, then every ``--iface-regex``, and the default route only when neither was given. The
last error keeps the original's wording, followed by a remedy in parentheses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

from flanneld.errors import InterfaceError

_LIMITED_BROADCAST = IPv4Address("255.255.255.255")

# rtm_type of routes that lead to no device (linux/rtnetlink.h, RTN_*).
_ROUTES_WITHOUT_DEVICE = {6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}

# An error line stays readable on a host with hundreds of container devices.
_LISTED_DEVICES = 12


@dataclass(frozen=True, slots=True)
class Link:
    """A network device. ``kind`` is rtnetlink's ("veth", "vxlan"), None for a hardware device."""

    index: int
    name: str
    mtu: int
    up: bool
    kind: str | None


@dataclass(frozen=True, slots=True)
class Address:
    """An IPv4 address of the device with that index; ``ip`` is the host's own end of it."""

    index: int
    ip: IPv4Address
    prefixlen: int
    scope: int


@dataclass(frozen=True, slots=True)
class DefaultRoute:
    """An IPv4 default route of the main table.

    ``index`` is None where the route names no single device: several next hops, or a ``type``
    (rtnetlink's RTN_*) such as blackhole.
    """

    index: int | None
    metric: int
    type: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the kernel said, in its order. Of default routes that order is lowest metric first."""

    links: tuple[Link, ...]
    addresses: tuple[Address, ...]
    defaults: tuple[DefaultRoute, ...]

    def addresses_of(self, index: int) -> tuple[IPv4Address, ...]:
        return tuple(address.ip for address in self.addresses if address.index == index)

    def links_by_index(self) -> list[Link]:
        return sorted(self.links, key=lambda link: link.index)


@dataclass(frozen=True, slots=True)
class ExternalInterface:
    """The chosen device. ``iface_addr`` is its own address, ``ext_addr`` the one peers are told."""

    index: int
    name: str
    mtu: int
    iface_addr: IPv4Address
    ext_addr: IPv4Address


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen interface, and the lines to log at level info on the way to it, in order."""

    interface: ExternalInterface
    log: tuple[str, ...]


class SelectionError(InterfaceError):
    """No interface could be chosen. ``log`` holds the info lines up to there, as in Selection."""

    def __init__(self, message: str, log: Sequence[str]) -> None:
        super().__init__(message)
        self.log = tuple(log)


class _Miss(Exception):
    """One trial led nowhere; the next may succeed. ``remedy`` is for the operator."""

    def __init__(self, message: str, remedy: str = "choose an interface with --iface") -> None:
        super().__init__(message)
        self.remedy = remedy


class _Found(NamedTuple):
    link: Link
    address: IPv4Address | None


_Trial = Callable[[HostFacts, str, list[str]], _Found]


def look_up(
    facts: HostFacts, ifaces: Sequence[str], regexes: Sequence[str], public_ip: str
) -> Selection:
    """Choose the external interface.

    ``ifaces`` are device names or addresses, ``regexes`` are in RE2 syntax; an empty entry of
    either stands for the default route's device. ``public_ip`` replaces the interface's address
    towards the peers, or is empty. Raises SelectionError.
    """
    log: list[str] = []
    external = _public_address(public_ip) if public_ip else None
    if not ifaces and not regexes:
        try:
            return Selection(_complete(facts, _default(facts, log), external, log), tuple(log))
        except _Miss as miss:
            raise SelectionError(
                f"Failed to find any valid interface to use: {miss} "
                f"({miss.remedy}; {_describe(facts)})",
                log,
            ) from None
    trials: list[tuple[str, _Trial]] = [(iface, _by_name_or_address) for iface in ifaces]
    trials += [(regex, _by_regex) for regex in regexes]
    for wanted, trial in trials:
        try:
            found = trial(facts, wanted, log) if wanted else _default(facts, log)
            return Selection(_complete(facts, found, external, log), tuple(log))
        except _Miss as miss:
            log.append(f"Could not find valid interface matching {wanted}: {miss}")
    raise SelectionError(
        "Failed to find interface to use that matches the interfaces and/or regexes provided "
        f"({_describe(facts)})",
        log,
    )


def preferred_address(facts: HostFacts, index: int) -> IPv4Address | None:
    """The address a device is known by: its first global unicast one, else its last link-local.

    None if it has neither, so for a device with only loopback addresses.
    """
    link_local = None
    for ip in facts.addresses_of(index):
        if ip.is_link_local:
            link_local = ip
        elif _is_global_unicast(ip):
            return ip
    return link_local


def _is_global_unicast(ip: IPv4Address) -> bool:
    """Go's IsGlobalUnicast: private and reserved ranges count, unlike ``ipaddress.is_global``."""
    return not (
        ip.is_unspecified
        or ip.is_loopback
        or ip.is_link_local
        or ip.is_multicast
        or ip == _LIMITED_BROADCAST
    )


def _parse_ip(text: str) -> IPv4Address | IPv6Address | None:
    """Go's net.ParseIP: no zone, and an IPv4-mapped IPv6 address is the IPv4 address."""
    try:
        ip = ip_address(text)
    except ValueError:
        return None
    if isinstance(ip, IPv6Address):
        return None if ip.scope_id is not None else ip.ipv4_mapped or ip
    return ip


def _public_address(text: str) -> IPv4Address:
    ip = _parse_ip(text)
    if isinstance(ip, IPv4Address):
        return ip
    why = "it is not an IPv4 address" if ip is None else "a lease carries an IPv4 address only"
    raise SelectionError(
        f"invalid public IP address: {text} ({why}; correct --public-ip, or leave it out "
        "to use the interface's address)",
        (),
    )


def _default(facts: HostFacts, log: list[str]) -> _Found:
    log.append("Determining IP address of default interface")
    failed = "failed to get default interface: "
    if not facts.defaults:
        raise _Miss(
            f"{failed}Unable to find default route",
            "add a default route to the main table, or choose an interface with --iface",
        )
    route = facts.defaults[0]
    if route.index is None:
        kind = _ROUTES_WITHOUT_DEVICE.get(route.type)
        what = f"is of type {kind}" if kind else "has more than one next hop"
        raise _Miss(
            f"{failed}Found default route but could not determine interface",
            f"the first one, of metric {route.metric}, {what}; choose an interface with --iface",
        )
    for link in facts.links:
        if link.index == route.index:
            return _Found(link, None)
    raise _Miss(f"{failed}route ip+net: no such network interface")


def _by_name_or_address(facts: HostFacts, wanted: str, log: list[str]) -> _Found:
    ip = _parse_ip(wanted)
    if ip is None:
        for link in facts.links_by_index():
            if link.name == wanted:
                return _Found(link, None)
        raise _Miss(f"error looking up interface {wanted}: route ip+net: no such network interface")
    log.append(f"Searching for interface using {ip}")
    if isinstance(ip, IPv4Address):
        for link in facts.links_by_index():
            if ip in facts.addresses_of(link.index):
                return _Found(link, ip)
    raise _Miss(f"error looking up interface {wanted}: No interface with given IP found")


def _by_regex(facts: HostFacts, pattern: str, _log: list[str]) -> _Found:
    """Every device's preferred address is tried before any device's name."""
    links = facts.links_by_index()
    found = [_Found(link, preferred_address(facts, link.index)) for link in links]
    subjects = [(str(each.address), each) for each in found if each.address is not None]
    subjects += [(each.link.name, each) for each in found]
    from flanneld import re2

    try:
        matches = re2.compile(pattern).search
    except ValueError as error:
        first = subjects[0][0] if subjects else ""
        raise _Miss(f"regex error matching pattern {pattern} to {first}: {error}") from None
    for subject, each in subjects:
        if matches(subject):
            return each
    raise _Miss(f"Could not match pattern {pattern} to any of the available network interfaces")


def _complete(
    facts: HostFacts, found: _Found, external: IPv4Address | None, log: list[str]
) -> ExternalInterface:
    link = found.link
    address = found.address or preferred_address(facts, link.index)
    if address is None:
        raise _Miss(f"failed to find IPv4 address for interface {link.name}")
    log.append(f"Using interface with name {link.name} and address {address}")
    if link.mtu == 0:
        raise _Miss(f"failed to determine MTU for {address} interface")
    if external is None:
        log.append(f"Defaulting external address to interface address ({address})")
    else:
        log.append(f"Using {external} as external address")
    return ExternalInterface(link.index, link.name, link.mtu, address, external or address)


def _describe(facts: HostFacts) -> str:
    devices = [
        " ".join([link.name, *map(str, addresses)]) + ("" if link.up else " (down)")
        for link in facts.links_by_index()
        if (addresses := facts.addresses_of(link.index))
    ]
    if not devices:
        return "this host has no IPv4 address"
    more = len(devices) - _LISTED_DEVICES
    rest = f" and {more} more" if more > 0 else ""
    return f"this host has: {', '.join(devices[:_LISTED_DEVICES])}{rest}"
