"""The etcd v2 store: `LeaseStore` on python-etcd.

Requests and their parameters are those of flannel v0.8.0, except that every write is conditional.
What python-etcd gets wrong about one connection is mended in `etcd_member`; about a cluster, here:
its failover goes to the URLs which the cluster advertises, and loses endpoints for ever. This one
asks the endpoints given, in a ring; a failed one is asked again in its turn. While one owes an
answer or an event it is looked after: if it is frozen, or cut off from its cluster, and another is
not, the request goes on there.
"""

import errno
import logging
import posixpath
import random
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from http.client import IncompleteRead, RemoteDisconnected
from typing import Any, TypeVar
from urllib.parse import quote

from flanneld.clock import now
from flanneld.errors import (
    CompareFailed,
    HistoryCleared,
    KeyNotFound,
    OptionError,
    StoreDenied,
    StoreError,
    StoreSilent,
    StoreUnavailable,
)
from flanneld.logs import verbose
from flanneld.subnet import etcd_member
from flanneld.subnet.etcd_member import (
    Credentials,
    Member,
    OpenSockets,
    Refused,
    parse_endpoint,
    tls_context,
)
from flanneld.subnet.etcd_wait import Watch, watching
from flanneld.subnet.python_etcd import etcd
from flanneld.subnet.store import Behind, Change, Node, Poll, Snapshot, StoreEvent

# isort: split
# After python_etcd, as in etcd_member.
from urllib3.exceptions import (
    ConnectTimeoutError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

# Error codes of the v2 API that say nothing about the key, only about the member:
# 300 raft internal error, 301 during leader election, 400 watcher cleared, 402 timeout.
_MEMBER_ERRORS = frozenset({300, 301, 400, 402})

# So often within so many seconds a member is left because it does not answer; two watches leave it
# together. A store that is slow everywhere gets slower with each host that begins anew elsewhere.
_LEFT_MOST = 6
_LEFT_WITHIN = 60.0

# What reading an answer raises that has not etcd's form; it comes from every layer.
_NOT_UNDERSTOOD = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class EtcdV2Store:
    """A `LeaseStore` on the etcd v2 API. Safe for use by several threads."""

    def __init__(self, endpoints: str, prefix: str, credentials: Credentials) -> None:
        """Prepare clients for ``endpoints`` (comma list of base URLs); nothing is sent yet.

        Raises OptionError for an unusable URL, prefix or TLS file.
        """
        self._sockets = OpenSockets()
        urls = [parse_endpoint(text) for text in endpoints.split(",")]
        files = credentials.cert_file or credentials.key_file or credentials.ca_file
        tls = files or any(scheme == "https" for scheme, _, _ in urls)
        context = tls_context(credentials, self._sockets) if tls else None
        # As the original: hosts spread themselves over the members.
        random.shuffle(urls)
        self._members = [Member(url, context, credentials, self._sockets) for url in urls]
        self._current = 0
        # Seconds that the next list of all leases may take to begin.
        self._patience = 0.0
        # When a member was left because it did not answer.
        self._left: deque[float] = deque(maxlen=_LEFT_MOST)
        self._config_key = quote(_path(prefix, "config"))
        self._subnets_path = _path(prefix, "subnets")
        self._subnets_key = quote(self._subnets_path)

    def read_config(self) -> str:
        """See `LeaseStore.read_config`."""
        return self._call(lambda member: _config(member.read(self._config_key, **_QUORUM)))

    def snapshot(self) -> Snapshot:
        """See `LeaseStore.snapshot`."""
        every = _QUORUM | {"recursive": True}
        patience, began = max(self._patience, etcd_member.ANSWER_TIMEOUT), now()
        try:
            snapshot = self._call(
                lambda member: _snapshot(member.read_patiently(patience, self._subnets_key, every))
            )
        except KeyNotFound as absent:
            snapshot = Snapshot((), absent.index)
        except StoreSilent:
            self._patience = min(2 * patience, etcd_member.LIST_TIMEOUT)
            raise
        if now() - began < etcd_member.ANSWER_TIMEOUT:
            self._patience = 0.0
        return snapshot

    def read(self, name: str) -> tuple[Node | None, int]:
        """See `LeaseStore.read`."""
        try:
            return self._call(lambda member: _read(member.read(self._key(name), **_QUORUM)))
        except KeyNotFound as absent:
            return None, absent.index

    def create(self, name: str, value: str, ttl: int | None) -> Node:
        """See `LeaseStore.create`."""
        return self._write(name, value, ttl, {"prevExist": "false"})

    def swap(self, before: Node, value: str, ttl: int | None) -> Node:
        """See `LeaseStore.swap`."""
        return self._write(before.name, value, ttl, _still(before))

    def _write(self, name: str, value: str, ttl: int | None, condition: dict[str, Any]) -> Node:
        key = self._key(name)
        return self._call(
            lambda member: _written(member.put(key, value, ttl, condition)), write=True
        )

    def remove(self, before: Node) -> None:
        """See `LeaseStore.remove`."""
        key, condition = self._key(before.name), _still(before)
        self._call(lambda member: _written(member.remove(key, condition)), write=True)

    def poll(self, name: str | None, after: int, timeout: float) -> Poll:
        """See `LeaseStore.poll`."""
        key = self._subnets_key if name is None else self._key(name)
        return self._call(
            lambda member: self._poll_member(member, key, name is None, after, timeout)
        )

    def close(self) -> None:
        """See `LeaseStore.close`."""
        self._sockets.close()
        for member in self._members:
            member.http.clear()

    def _key(self, name: str) -> str:
        return f"{self._subnets_key}/{quote(name, safe='')}"

    def _poll_member(
        self, member: Member, key: str, recursive: bool, after: int, timeout: float
    ) -> Poll:
        head = member.expect_event(after, timeout)
        try:
            result = member.read(key, recursive=recursive, wait=True, waitIndex=after + 1)
        except etcd.EtcdWatchTimedOut:
            # No event in this time, and none between `after` and the head's index either.
            return Poll(None, max(after, head.index), head.index)
        finally:
            member.expect_event(None, 0)
        event = self._event(result)
        return Poll(event, max(after, event.index), max(head.index, event.index))

    def _event(self, result: Any) -> StoreEvent:
        key, index = str(result.key), int(result.modifiedIndex)
        gone = result.action in ("delete", "expire", "compareAndDelete")
        if key == self._subnets_path or self._subnets_path.startswith(key.rstrip("/") + "/"):
            # A directory that is made or refreshed changes no lease.
            return StoreEvent(Change.ALL_GONE if gone else Change.SET, "", None, index)
        name = key.removeprefix(self._subnets_path + "/")
        if gone:
            return StoreEvent(Change.GONE, name, None, index)
        # In a directory below, `name` has a slash in it, and so is no lease's: as in a snapshot.
        return StoreEvent(Change.SET, name, replace(_node(vars(result)), name=name), index)

    def _call(self, request: Callable[[Member], T], *, write: bool = False) -> T:
        """Ask one member after the other, beginning with the one that answered last.

        A write is given to a second member only if the first cannot have seen it.
        """
        failures: list[str] = []
        unavailable = StoreUnavailable
        tried: set[int] = set()
        while (position := self._next(tried)) is not None:
            tried.add(position)
            member = self._members[position]
            self._sockets.check_open()
            try:
                with watching(self._watch(position)):
                    result = member.asked(request)
            except Behind:
                self._turn_to(position + 1)
                raise
            except (etcd.EtcdException, *_NOT_UNDERSTOOD) as error:
                if isinstance(error, Refused) and not _is_members_fault(error):
                    self._turn_to(position)
                    raise _answer(error) from error
                if _is_silence(error):
                    unavailable = StoreSilent
                reason = _failure_text(error)
                failures.append(f"; error #{len(failures)}: {member.base_uri}: {reason}")
                if position == self._current:
                    # At once: a poll that goes on elsewhere may last, others must not meet this.
                    self._turn_to(position + 1)
                if write and not _never_sent(error):
                    failures.append(" (the write may have been carried out)")
                    break
            else:
                self._turn_to(position)
                return result
        self._sockets.check_open()
        raise unavailable(
            "client: etcd cluster is unavailable or misconfigured" + "".join(failures)
        )

    def _next(self, tried: Collection[int]) -> int | None:
        """Return which member to ask now; None if all were."""
        count, start = len(self._members), self._current
        ring = ((start + step) % count for step in range(count))
        return next((position for position in ring if position not in tried), None)

    def _watch(self, position: int) -> Watch | None:
        """Return how to wait for this member; None if there is nobody else to ask."""
        if len(self._members) == 1:
            return None
        return Watch(etcd_member.LATE, lambda: self._look(position))

    def _look(self, position: int) -> float:
        """Look after a member that lets us wait; return the seconds until the next look.

        Raises OSError, which ends the request, if it is in trouble and another member is not; the
        next call begins there.
        """
        member, pause = self._members[position], etcd_member.look_pause()
        trouble, age = member.look(etcd_member.LOOK_TIMEOUT, fresh=pause)
        if not trouble:
            return max(0.0, pause - age)
        silent = trouble == etcd_member.SILENT
        if silent and (rest := self._rest()):
            return max(pause, rest)
        for step in range(1, len(self._members)):
            if self._sockets.are_closed:
                break
            better = (position + step) % len(self._members)
            other = self._members[better]
            if not other.look(etcd_member.OTHER_TIMEOUT)[0]:
                if silent:
                    self._left.append(time.monotonic())
                log.log(verbose(1), "Leaving %s: %s", member.base_uri, trouble)
                if position == self._current:
                    self._turn_to(better)
                raise ConnectionAbortedError(errno.ECONNABORTED, trouble)
            other.forget_connections()
        return pause

    def _rest(self) -> float:
        """Return the seconds in which no member is left for its silence: it was done too often."""
        if len(self._left) < _LEFT_MOST:
            return 0.0
        return max(0.0, self._left[0] + _LEFT_WITHIN - time.monotonic())

    def _turn_to(self, position: int) -> None:
        """Begin the next call with this member, and keep no idle connection to the one left.

        It would stay half closed once that member stops, until its turn comes again.
        """
        left, self._current = self._current, position % len(self._members)
        if left != self._current:
            self._members[left].forget_connections()


_CREDENTIALS = "check --etcd-username and --etcd-password, and the role"

_QUORUM: dict[str, Any] = {"quorum": True, "recursive": False, "sorted": False}

# In etcd's words for a request that waited for longer than it grants.
_TIMED_OUT = "request timed out"

# Bytes, quoted. etcd resets a connection whose first line is longer than 4 KB; a lease has 100.
_COMPARED = 2048

# In what was read of a value that is no text: etcd puts U+FFFD into its JSON, and never surrogates.
_NO_TEXT = re.compile("[\ud800-\udfff\ufffd]")


def _path(prefix: str, name: str) -> str:
    """Join and clean as Go's path.Join does; the store cleans the paths of its keys too."""
    # normpath keeps a double slash at the start.
    path = "/" + posixpath.normpath(f"/{prefix}/{name}").lstrip("/")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"unusable etcd prefix {prefix!r}: it is not UTF-8") from error
    return path


def _still(before: Node) -> dict[str, Any]:
    """Return the condition that a key is as it was read.

    By its index alone where etcd cannot compare the value: an empty one, one that is no text,
    and one that is too long for a request's first line. No flanneld writes any of these.
    """
    if before.index <= 0:  # etcd takes prevIndex=0 for no condition at all
        raise ValueError(f"a conditional write of {before.name} needs an index, not {before.index}")
    value = before.value
    if not value or _NO_TEXT.search(value) or len(quote(value)) > _COMPARED:
        return {"prevIndex": before.index}
    return {"prevIndex": before.index, "prevValue": value}


def _config(result: Any) -> str:
    if result.dir:
        raise StoreError(f"{result.key} is a directory: it must hold the network config")
    if not isinstance(result.value, str):
        raise TypeError(f"the value is {result.value!r}")
    return result.value


def _snapshot(result: Any) -> Snapshot:
    if not result.dir:
        if isinstance(result.value, str):
            raise StoreError(f"{result.key} is not a directory: delete it, leases belong below it")
        raise TypeError("no directory")
    # `leaves` would build an object for each of what may be 10,000 keys; this is what it reads.
    # Directories too: one with a subnet's name stands in the way of a lease.
    return Snapshot(tuple(map(_node, result._children)), int(result.etcd_index))


def _read(result: Any) -> tuple[Node, int]:
    return _written(result), int(result.etcd_index)


def _written(result: Any) -> Node:
    return _node(vars(result))


def _node(raw: dict[str, Any]) -> Node:
    ttl = raw.get("ttl")
    if ttl is None and raw.get("expiration"):
        ttl = 0  # etcd leaves it out of a key that has expired and is not deleted yet
    return Node(
        name=str(raw["key"]).rpartition("/")[2],
        value=str(raw.get("value") or ""),
        ttl=None if ttl is None else int(ttl),
        index=int(raw["modifiedIndex"]),
        created_index=int(raw["createdIndex"]),
    )


def _is_members_fault(error: Refused) -> bool:
    """Tell whether another member may answer better: this one fails, or is no etcd at all."""
    if error.code:
        return error.code in _MEMBER_ERRORS or error.status >= 500
    return error.status != 401  # etcd refuses credentials without an errorCode


def _failure_text(error: Exception) -> str:
    """Say why the member could not answer."""
    if isinstance(error, etcd.EtcdConnectionFailed):
        return _cause_text(error.cause)
    if isinstance(error, etcd.EtcdException):
        return str(error)
    return f"an answer that is not etcd's ({type(error).__name__}: {error})"


def _answer(error: Refused) -> StoreError:
    text = str(error)
    match error.code:
        case 100:
            return KeyNotFound(text, error.index)
        case 101 | 105:  # compare failed, key already exists
            return CompareFailed(text)
        case 401:  # the events asked for are cleared
            return HistoryCleared(text)
        case 110:
            return StoreDenied(f"{text}: {_CREDENTIALS}")
    if error.status == 401:
        return StoreDenied(f"{text}: {_CREDENTIALS}")
    return StoreError(text)


def _reasons(cause: BaseException | None) -> Sequence[BaseException]:
    """Unpack urllib3's exceptions, the outermost first."""
    chain: list[BaseException] = []
    while cause is not None and cause not in chain:
        chain.append(cause)
        # ProtocolError has its reason only among its arguments.
        inner = (getattr(cause, "reason", None), *cause.args, cause.__cause__)
        cause = next((one for one in inner if isinstance(one, BaseException)), None)
    return chain


def _cause_text(cause: BaseException | None) -> str:
    """Return the innermost reason: ``connection refused`` says more than six wrappers."""
    chain = _reasons(cause)
    if not chain:
        return "no answer"
    last = chain[-1]
    if isinstance(last, IncompleteRead | RemoteDisconnected):
        return "connection closed by the server"
    if isinstance(last, ConnectTimeoutError | TimeoutError) or "timed out" in str(last).lower():
        return "i/o timeout"
    if isinstance(last, ssl.SSLEOFError):
        return f"{last.strerror}: does it speak TLS, and accept our client certificate?"
    if isinstance(last, OSError) and last.strerror:
        return last.strerror if isinstance(last, ssl.SSLError) else last.strerror.lower()
    return str(last) or type(last).__name__


def _is_silence(error: Exception) -> bool:
    """Tell whether the member had the request, and no answer came in time."""
    if isinstance(error, Refused):
        return _TIMED_OUT in str(error)
    if not isinstance(error, etcd.EtcdConnectionFailed):
        return False
    return any(isinstance(reason, ReadTimeoutError) for reason in _reasons(error.cause))


def _never_sent(error: Exception) -> bool:
    """Tell whether the request failed before the member can have seen it."""
    if not isinstance(error, etcd.EtcdConnectionFailed):
        return False
    for reason in _reasons(error.cause):
        if isinstance(reason, NewConnectionError | ConnectTimeoutError):
            return True
        if isinstance(reason, SSLError):
            return "CERTIFICATE" in str(reason) or "handshake" in str(reason).lower()
    return False
