"""The etcd v2 store: `LeaseStore` on python-etcd.

Requests and their parameters are those of flannel v0.8.0, except that every write is conditional.
What python-etcd gets wrong about one connection is mended in `etcd_member`; about a cluster, here:
its failover goes to the URLs which the cluster advertises, and loses endpoints for ever. This one
asks the endpoints given, in a ring; a failed one is asked again in its turn.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import etcd
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, SSLError

from flanneld.errors import (
    CompareFailed,
    HistoryCleared,
    KeyNotFound,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from flanneld.subnet.etcd_member import (
    Credentials,
    Member,
    OpenSockets,
    parse_endpoint,
    tls_context,
)
from flanneld.subnet.store import Behind, Change, Node, Poll, Snapshot, StoreEvent

T = TypeVar("T")

# Error codes of the v2 API that say nothing about the key, only about the member:
# 300 raft internal error, 301 during leader election, 400 watcher cleared, 402 timeout.
_MEMBER_ERRORS = frozenset({300, 301, 400, 402})


class EtcdV2Store:
    """A `LeaseStore` on the etcd v2 API. Safe for use by several threads."""

    def __init__(self, endpoints: str, prefix: str, credentials: Credentials) -> None:
        """Prepare clients for ``endpoints`` (comma list of base URLs); nothing is sent yet.

        Raises OptionError for an unusable URL, prefix or TLS file.
        """
        self._sockets = OpenSockets()
        context = tls_context(credentials)
        urls = [parse_endpoint(text) for text in endpoints.split(",")]
        # As the original: hosts spread themselves over the members.
        random.shuffle(urls)
        self._members = [Member(url, context, credentials, self._sockets) for url in urls]
        self._current = 0
        path = "/" + prefix.strip("/") if prefix.strip("/") else ""
        self._config_key = quote(path + "/config")
        self._subnets_key = quote(path + "/subnets")
        self._subnets_path = path + "/subnets"

    def read_config(self) -> str:
        """See `LeaseStore.read_config`."""
        result = self._call(lambda member: member.read(self._config_key, **_QUORUM))
        if result.dir or result.value is None:
            raise StoreError(f"{self._config_key} is a directory: it must hold the network config")
        return str(result.value)

    def snapshot(self) -> Snapshot:
        """See `LeaseStore.snapshot`."""
        try:
            every = _QUORUM | {"recursive": True}
            result = self._call(lambda member: member.read(self._subnets_key, **every))
        except KeyNotFound as absent:
            return Snapshot((), absent.index)
        # `leaves` would build an object for each of what may be 10,000 keys; this is what it reads.
        nodes = tuple(_node(raw) for raw in result._children if not raw.get("dir"))
        return Snapshot(nodes, int(result.etcd_index))

    def read(self, name: str) -> tuple[Node | None, int]:
        """See `LeaseStore.read`."""
        try:
            result = self._call(lambda member: member.read(self._key(name), **_QUORUM))
        except KeyNotFound as absent:
            return None, absent.index
        return _node(vars(result)), int(result.etcd_index)

    def create(self, name: str, value: str, ttl: int | None) -> Node:
        """See `LeaseStore.create`."""
        result = self._call(
            lambda member: member.write(self._key(name), value, ttl=ttl, prevExist=False),
            write=True,
        )
        return _node(vars(result))

    def swap(self, name: str, value: str, ttl: int | None, index: int) -> Node:
        """See `LeaseStore.swap`."""
        if index <= 0:  # etcd takes prevIndex=0 for no condition at all
            raise ValueError(f"compare-and-swap of {name} needs an index, not {index}")
        result = self._call(
            lambda member: member.write(self._key(name), value, ttl=ttl, prevIndex=index),
            write=True,
        )
        return _node(vars(result))

    def remove(self, name: str, index: int) -> None:
        """See `LeaseStore.remove`."""
        if index <= 0:
            raise ValueError(f"compare-and-delete of {name} needs an index, not {index}")
        self._call(lambda member: member.delete(self._key(name), prevIndex=index), write=True)

    def poll(self, name: str | None, after: int, timeout: float) -> Poll:
        """See `LeaseStore.poll`."""
        key = self._subnets_key if name is None else self._key(name)
        return self._call(
            lambda member: self._poll_member(member, key, name is None, after, timeout)
        )

    def close(self) -> None:
        """See `LeaseStore.close`."""
        self._sockets.close()

    def _key(self, name: str) -> str:
        return f"{self._subnets_key}/{quote(name, safe='')}"

    def _poll_member(
        self, member: Member, key: str, recursive: bool, after: int, timeout: float
    ) -> Poll:
        head = member.expect_event(after, timeout)
        try:
            result = member.read(key, wait=True, waitIndex=after + 1, recursive=recursive)
        except etcd.EtcdWatchTimedOut:
            # No event in this time, and none between `after` and the head's index either.
            return Poll(None, max(after, head.index), head.index)
        finally:
            member.expect_event(None, 0)
        event = self._event(result)
        index = int(result.modifiedIndex)
        return Poll(event, max(after, index), max(head.index, index))

    def _event(self, result: Any) -> StoreEvent:
        key, index = str(result.key), int(result.modifiedIndex)
        gone = result.action in ("delete", "expire", "compareAndDelete")
        if key == self._subnets_path or self._subnets_path.startswith(key.rstrip("/") + "/"):
            # A directory that is made or refreshed changes no lease.
            return StoreEvent(Change.ALL_GONE if gone else Change.SET, "", None, index)
        name = key.removeprefix(self._subnets_path + "/")
        if gone or result.dir:
            return StoreEvent(Change.GONE, name, None, index)
        return StoreEvent(Change.SET, name, _node(vars(result)), index)

    def _call(self, request: Callable[[Member], T], *, write: bool = False) -> T:
        """Ask one member after the other, beginning with the one that answered last.

        A write is given to a second member only if the first cannot have seen it.
        """
        failures: list[str] = []
        start = self._current
        for step in range(len(self._members)):
            position = (start + step) % len(self._members)
            member = self._members[position]
            self._sockets.check_open()
            try:
                result = request(member)
            except Behind:
                self._current = (position + 1) % len(self._members)
                raise
            except etcd.EtcdException as error:
                reason = _member_failure(error)
                if reason is None:
                    self._current = position
                    raise _answer(error) from error
                failures.append(f"; error #{len(failures)}: {member.base_uri}: {reason}")
                if write and not _never_sent(error):
                    self._current = (position + 1) % len(self._members)
                    failures.append(" (the write may have been carried out)")
                    break
            else:
                self._current = position
                return result
        self._sockets.check_open()
        raise StoreUnavailable(
            "client: etcd cluster is unavailable or misconfigured" + "".join(failures)
        )


_QUORUM: dict[str, Any] = {"quorum": True, "recursive": False, "sorted": False}


def _node(raw: dict[str, Any]) -> Node:
    ttl = raw.get("ttl")
    return Node(
        name=str(raw["key"]).rpartition("/")[2],
        value=str(raw.get("value") or ""),
        ttl=None if ttl is None else int(ttl),
        index=int(raw["modifiedIndex"]),
    )


def _payload(error: etcd.EtcdException) -> dict[str, Any]:
    return error.payload if isinstance(error.payload, dict) else {}


def _member_failure(error: etcd.EtcdException) -> str | None:
    """Say why the member could not answer; None if this is the store's answer."""
    if isinstance(error, etcd.EtcdConnectionFailed):
        return _cause_text(error.cause)
    payload = _payload(error)
    if payload.get("errorCode") in _MEMBER_ERRORS or int(payload.get("status", 0)) >= 500:
        return _error_text(error)
    if not payload:  # python-etcd could not read the answer at all
        return str(error)
    return None


def _answer(error: etcd.EtcdException) -> StoreError:
    text = _error_text(error)
    match error:
        case etcd.EtcdKeyNotFound():
            return KeyNotFound(text, int(_payload(error).get("index", 0)))
        case etcd.EtcdCompareFailed() | etcd.EtcdAlreadyExist():
            return CompareFailed(text)
        case etcd.EtcdEventIndexCleared():
            return HistoryCleared(text)
        case etcd.EtcdInsufficientPermissions():
            return StoreDenied(f"{text}: check --etcd-username and --etcd-password, and the role")
    return StoreError(text)


def _error_text(error: etcd.EtcdException) -> str:
    """Render etcd's error as the original does: ``100: Key not found (/coreos.com) [3]``."""
    payload = _payload(error)
    if "errorCode" not in payload:
        status = f"HTTP {payload['status']}: " if "status" in payload else ""
        return status + str(payload.get("cause") or payload.get("message") or error)
    text = f"{payload['errorCode']}: {payload.get('message', '')}"
    return f"{text} ({payload.get('cause', '')}) [{payload.get('index', 0)}]"


def _reasons(cause: BaseException | None) -> Sequence[BaseException]:
    """Unpack urllib3's exceptions, the outermost first."""
    chain: list[BaseException] = []
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = getattr(cause, "reason", None) or cause.__cause__
        if not isinstance(cause, BaseException):
            break
    return chain


def _cause_text(cause: BaseException | None) -> str:
    """Return the innermost reason: ``connection refused`` says more than six wrappers."""
    chain = _reasons(cause)
    if not chain:
        return "no answer"
    last = chain[-1]
    if isinstance(last, ConnectTimeoutError | TimeoutError) or "timed out" in str(last).lower():
        return "i/o timeout"
    if isinstance(last, OSError) and last.strerror:
        return last.strerror.lower()
    return str(last) or type(last).__name__


def _never_sent(error: etcd.EtcdException) -> bool:
    """Tell whether the request failed before the member can have seen it."""
    if not isinstance(error, etcd.EtcdConnectionFailed):
        return False
    for reason in _reasons(error.cause):
        if isinstance(reason, NewConnectionError | ConnectTimeoutError):
            return True
        if isinstance(reason, SSLError):
            return "CERTIFICATE" in str(reason) or "handshake" in str(reason).lower()
    return False
