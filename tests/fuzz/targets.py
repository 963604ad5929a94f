"""What comes from outside, one function per kind of input, and what is promised about it.

A target takes any bytes and returns nothing; it raises (AssertionError, or whatever escaped) when a
promise is broken. The tests feed them from hypothesis and from the corpus, `fuzz.explore` with
atheris. They need neither root nor network.
"""

import contextlib
import io
import os
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network

from flanneld import flags, re2
from flanneld.backend import hostgw, vxlan
from flanneld.backend.registry import BACKENDS, find_backend
from flanneld.backend.udp import backend as udp
from flanneld.errors import BackendError, ConfigError, OptionError, UsageError
from flanneld.flags import HelpRequested
from flanneld.kernel import netlink, wire
from flanneld.kernel.netlink import AddressEvent, EntryEvent, EntrySocket, LinkEvent
from flanneld.kernel.state import FdbEntry, Found, Neighbour, Route
from flanneld.logs import LONGEST
from flanneld.subnet import env, lease
from flanneld.subnet.config import Config, parse_config
from flanneld.subnet.etcd_member import parse_endpoint
from flanneld.subnet.lease import BadLease, Lease, LeaseAttrs
from flanneld.subnet.store import Change, Node, Snapshot, StoreEvent
from flanneld.subnet.watch import EventType, LeaseTracker
from fuzz import tunnel

Target = Callable[[bytes], None]

NETWORK = IPv4Network("10.5.0.0/16")
OWN = IPv4Network("10.5.16.0/24")
OWN_IP = IPv4Address("10.97.0.1")


def one_line(error: object) -> None:
    """What is said of an input is one printable line that the log need not cut.

    A value in etcd may have a megabyte.
    """
    text = str(error)
    assert text
    assert len(text) < LONGEST, len(text)
    assert text.isascii(), ascii(text)
    assert text.isprintable(), ascii(text)


def config(data: bytes) -> None:
    """The network config: a usable one, or a ConfigError; the backends' keys: BackendError."""
    try:
        found = parse_config(data.decode(errors="replace"))
    except ConfigError as error:
        one_line(error)
        return
    network = found.network
    assert 0 < network.prefixlen < found.subnet_len <= 30
    assert network.network_address <= found.subnet_min <= found.subnet_max
    for address in (found.subnet_min, found.subnet_max):
        assert IPv4Network((address, found.subnet_len)).subnet_of(network)
    for note in found.ignored:
        one_line(note)
    assert hash(found) == hash(parse_config(data.decode(errors="replace")))
    try:
        find_backend(found.backend_type)
        assert found.backend_name in BACKENDS
    except BackendError as error:
        one_line(error)
    backend_keys(found)


def backend_keys(found: Config) -> None:
    """Every backend reads the keys of every config, whoever they are meant for."""
    try:
        keys = vxlan.read_config(found)
    except BackendError as error:
        one_line(error)
    else:
        assert 0 <= keys.vni <= 9_999_999
        assert 0 <= keys.port <= 65535
        assert keys.mtu == 0 or 118 <= keys.mtu <= 65535
        one_line(keys)
    try:
        tunnel_keys = udp.read_config(found)
    except BackendError as error:
        one_line(error)
    else:
        assert 1 <= tunnel_keys.port <= 65535
        assert tunnel_keys.mtu == 0 or 96 <= tunnel_keys.mtu <= 65535


def lease_key_and_value(data: bytes) -> None:
    """A key's name, a newline, its value: a lease, or a BadLease."""
    name, _, value = data.decode(errors="replace").partition("\n")
    taken = lease.taken_range(name)
    if taken is not None:
        assert 1 <= taken.prefixlen <= 32
    try:
        found = lease.parse_lease(name, value, 60, 7)
    except BadLease as error:
        one_line(error)
        return
    assert found.key == name
    # What a Go daemon believes taken is never given to a host.
    assert taken == found.subnet
    check_attrs(found.attrs)
    problem = lease.check_peer(found, NETWORK, OWN, OWN_IP)
    if problem is not None:
        one_line(problem)
        return
    check_peer(found)


def check_attrs(attrs: LeaseAttrs) -> None:
    """What was read is written again such that it is read again, also by etcd: it is UTF-8."""
    again = lease.decode_attrs(attrs.encode())
    assert again == attrs
    attrs.encode().encode()
    assert lease.unusable_public_ip(attrs.public_ip) is None


def check_peer(found: Lease) -> None:
    """A peer that may be used leads nowhere but into its subnet inside Network."""
    subnet = found.subnet
    assert subnet.subnet_of(NETWORK)
    assert subnet != NETWORK
    assert not subnet.overlaps(OWN)
    assert found.attrs.public_ip != OWN_IP
    assert hostgw.peer_entries(found, 2) == (Route(subnet, found.attrs.public_ip, 2),)
    for direct in (False, True):
        try:
            entries = vxlan.peer_entries(found, 3, 2, lambda _, direct=direct: direct)  # type: ignore[misc]  # one argument
        except BadLease as error:
            one_line(error)
            continue
        check_entries(entries, found)
        for entry in entries:
            packed_and_back(entry)


def check_entries(entries: tuple[Route | Neighbour | FdbEntry, ...], found: Lease) -> None:
    """Everything that reaches the kernel for a peer is about its subnet and its public IP."""
    for entry in entries:
        match entry:
            case Route():
                assert entry.dst == found.subnet
                assert entry.via in (found.attrs.public_ip, found.subnet.network_address)
            case Neighbour():
                assert entry.ip in found.subnet
            case FdbEntry():
                assert entry.dst == found.attrs.public_ip
        if not isinstance(entry, Route):
            assert len(entry.mac) == 6
            assert not entry.mac[0] & 1


def packed_and_back(entry: Route | Neighbour | FdbEntry) -> None:
    """An entry is the same after a way through the bytes of a netlink message."""
    data = wire.with_ack(wire.pack_write(5, entry))
    ((offset, end, *_),) = wire.split_messages(data)
    parse = wire.parse_route if isinstance(entry, Route) else wire.parse_neighbour
    found = parse(data, offset, end)
    assert found is not None
    assert found.is_written_as(entry)


_NAMES = ["10.5.17.0-24", "10.5.18.0-24", "10.5.16.0-24", "10.5.0.0-17", "10.6.0.0-24", "x"]


def watch(data: bytes) -> None:
    """A store that says anything in any order; what is used is always usable.

    Each line: what happens (one character), a name, an index, a TTL and a value, all but the last
    ended by blanks. ``s`` sets a key, ``d`` deletes it, ``n`` puts it into the next snapshot, ``S``
    is the snapshot, ``A`` says that all is gone, ``t`` lets time pass.
    """
    tracker = LeaseTracker(
        lease.subnet_key(OWN), lambda found: lease.check_peer(found, NETWORK, OWN, OWN_IP)
    )
    used: dict[IPv4Network, Lease] = {}
    pending: list[Node] = []
    time = 0.0
    for line in data.decode(errors="replace").split("\n")[:64]:
        kind, name, index, ttl, value = _fields(line)
        events = []
        node = Node(name, value, ttl, index)
        match kind:
            case "s":
                events = tracker.event(StoreEvent(Change.SET, name, node, index), time)
            case "d":
                events = tracker.event(StoreEvent(Change.GONE, name, None, index), time)
            case "A":
                events = tracker.event(StoreEvent(Change.ALL_GONE, "", None, index), time)
            case "n":
                pending = [n for n in pending if n.name != name] + [node]
            case "S":
                events = tracker.snapshot(Snapshot(tuple(pending), index), time)
                pending = []
            case "t":
                time += index
                events = tracker.expire(time)
        for event in events:
            if event.type is EventType.ADDED:
                used[event.lease.subnet] = event.lease
            else:
                del used[event.lease.subnet]
        # The events are all there is to know, and nothing bad is among the leases.
        assert {found.subnet: found.attrs for found in tracker.leases()} == {
            subnet: found.attrs for subnet, found in used.items()
        }
        for found in used.values():
            check_peer(found)
        for note in tracker.take_notes():
            one_line(note)
        due = tracker.due(time)
        assert due is None or due >= 0


def _fields(line: str) -> tuple[str, str, int, int | None, str]:
    kind, name, index, ttl, value = [*line.split(" ", 4), "", "", "", "", ""][:5]
    name = _NAMES[int(name)] if name in tuple("012345") else name
    return kind, name, _number(index) or 0, _number(ttl), value


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def subnet_env(data: bytes) -> None:
    """The subnet file: never an error, and read back as it was written."""
    found = _read_previous(data)
    if found.warning is not None:
        one_line(found.warning)
    for network in (found.subnet, found.network):
        assert network is None or network.prefixlen > 0
    if found.subnet is None or found.network is None or found.subnet.prefixlen > 30:
        return
    text = env.render(found.network, found.subnet, 1450, ip_masq=True)
    assert _read_previous(text.encode()) == env.Previous(found.subnet, found.network)


def _read_previous(data: bytes) -> env.Previous:
    descriptor = os.memfd_create("subnet.env")
    try:
        os.write(descriptor, data)
        return env.read_previous(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def command_line(data: bytes) -> None:
    """Arguments, each ended by a zero byte; after an empty one NAME=VALUE of the environment.

    Only the errors promised, and nothing is printed.
    """
    head, _, tail = data.partition(b"\0\0")
    argv = [os.fsdecode(word) for word in head.split(b"\0")]
    pairs = (os.fsdecode(word).partition("=") for word in tail.split(b"\0"))
    environ = {f"FLANNELD_{name}": value for name, _, value in pairs}
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            parsed = flags.parse(argv, environ)
            check_options(parsed.options)
        except (UsageError, OptionError, HelpRequested):
            parsed = None
    assert not output.getvalue()
    if parsed is None:
        return
    for warning in parsed.warnings:
        warning.encode()
        assert warning.isprintable()
    assert flags.parse(argv, environ) == parsed


def check_options(options: flags.Options) -> None:
    """What the rest of the start-up reads out of the options."""
    assert -(1 << 63) <= options.v < 1 << 63
    flags.vmodule_levels(options.vmodule)
    flags.check(options)
    for pattern in options.iface_regex:
        with contextlib.suppress(ValueError):
            re2.compile(pattern)
    for endpoint in options.etcd_endpoints.split(","):
        parse_endpoint(endpoint)


class Answers:
    """A netlink socket with some datagrams to read; then the kernel is silent."""

    def __init__(self, data: bytes) -> None:
        # A real one hands out whole datagrams: here they end at each 0xFF 0xFF.
        self._left = data.split(b"\xff\xff")[::-1]

    def send(self, data: bytes) -> int:
        return len(data)

    def recv(self, _size: int) -> bytes:
        if not self._left:
            raise TimeoutError("timed out")
        return self._left.pop()


def netlink_messages(data: bytes) -> None:
    """Whatever the kernel says is understood or passed over, and nothing is read into it."""
    events = netlink._events(data)
    assert len(events) <= len(data) // wire.HEADER.size
    for event in events:
        match event:
            case EntryEvent(found=found):
                check_found(found, data)
            case LinkEvent(link=link):
                assert link.index.to_bytes(4, "little", signed=True) in data
                # What is no UTF-8 is shown as U+FFFD.
                assert all(part.encode() in data for part in link.name.split("\ufffd"))
            case AddressEvent(index=index):
                assert index.to_bytes(4, "little") in data
    for ask in (
        lambda kernel: kernel.routes(0),
        lambda kernel: kernel.neighbours(3),
        lambda kernel: kernel.fdb(3),
        lambda kernel: list(kernel.apply([_SOME_ROUTE], [_SOME_FOUND])),
    ):
        kernel = EntrySocket.__new__(EntrySocket)
        kernel._socket = Answers(data)  # type: ignore[assignment]  # a double
        kernel._seq = 0
        try:
            result = ask(kernel)
        except OSError:
            continue
        for item in result:
            if isinstance(item, Found):
                check_found(item, data)


_SOME_ROUTE = Route(OWN, OWN_IP, 2)
_SOME_FOUND = Found(_SOME_ROUTE, 102)


def check_found(found: Found, data: bytes) -> None:
    """Every value of an entry stands in the message, or is nothing at all."""
    entry = found.entry
    match entry:
        case Route():
            # Without RTA_DST it is the default route.
            parts = [entry.dst.network_address.packed, entry.via.packed]
        case Neighbour():
            parts = [entry.ip.packed, entry.mac]
        case FdbEntry():
            parts = [entry.dst.packed, entry.mac]
    parts.append(entry.oif.to_bytes(4, "little", signed=entry.oif < 0))
    for part in parts:
        assert not any(part) or part in data
    str(entry)


TARGETS: Mapping[str, Target] = {
    "config": config,
    "lease": lease_key_and_value,
    "watch": watch,
    "subnet_env": subnet_env,
    "flags": command_line,
    "netlink": netlink_messages,
    "tunnel_receive": tunnel.receive,
    "tunnel_transmit": tunnel.transmit,
}
