"""A small client of etcd's v2 HTTP API for tests: no retries, no cleverness, keep-alive.

It shares nothing with flanneld's own client, so a mistake there is seen here.
API: https://etcd.io/docs/v2.3/api/ and https://etcd.io/docs/v2.3/auth_api/
"""

import base64
import http.client
import json
import select
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlencode

KEY_NOT_FOUND = 100


class EtcdV2Error(Exception):
    """etcd refused. ``code`` is its errorCode (100 key not found, 105 exists), else the status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Node:
    """A key. ``ttl`` is in whole seconds, None for a key that never expires."""

    key: str
    value: str
    ttl: int | None
    created_index: int
    modified_index: int
    is_directory: bool
    children: tuple["Node", ...]

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    def json(self) -> Any:
        """The value, read as JSON."""
        return json.loads(self.value)


class EtcdV2:
    """One connection to one etcd, for one thread.

    ``connect`` makes the TCP connection, in whichever network namespace that has to happen.
    An answer that does not come within ``timeout`` seconds raises TimeoutError, a connection
    that breaks ConnectionError; the request may then have been carried out or not. The next
    request connects anew.
    """

    def __init__(
        self,
        connect: Callable[[float], socket.socket],
        host: IPv4Address,
        *,
        tls: ssl.SSLContext | None = None,
        user: str = "",
        password: str = "",
        timeout: float = 5.0,
    ) -> None:
        self._connect = connect
        self._host = str(host)
        self._tls = tls
        self._timeout = timeout
        self._headers = {}
        if user:
            token = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        self._connection = http.client.HTTPConnection(self._host)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Safe to repeat; a later request opens a new one."""
        self._connection.close()

    def get(self, key: str, *, recursive: bool = False) -> Node | None:
        """The key as it is now, None if there is no such key."""
        try:
            return _node(self.keys("GET", key, {"recursive": recursive, "quorum": True})["node"])
        except EtcdV2Error as error:
            if error.code == KEY_NOT_FOUND:
                return None
            raise

    def list(self, key: str) -> dict[str, Node]:
        """A directory's keys by the last part of their names; empty if it does not exist."""
        node = self.get(key)
        return {child.name: child for child in node.children} if node else {}

    def put(
        self,
        key: str,
        value: str,
        *,
        ttl: int | None = None,
        prev_exist: bool | None = None,
        prev_index: int | None = None,
    ) -> Node:
        """Write a key. Without ``ttl`` it never expires, whatever it did before."""
        query = {"prevExist": prev_exist, "prevIndex": prev_index}
        form = {"value": value} | ({} if ttl is None else {"ttl": str(ttl)})
        return _node(self.keys("PUT", key, query, form)["node"])

    def delete(self, key: str, *, recursive: bool = False) -> bool:
        """Delete a key; False if it was not there."""
        try:
            self.keys("DELETE", key, {"recursive": recursive})
        except EtcdV2Error as error:
            if error.code == KEY_NOT_FOUND:
                return False
            raise
        return True

    def index(self) -> int:
        """etcd's index now: the number of the newest event."""
        _, headers, _ = self.request("GET", "/v2/keys/")
        return int(headers["X-Etcd-Index"])

    def is_healthy(self) -> bool:
        """Whether this member answers and has a leader. Never raises for a dead or mute etcd."""
        return self._status("/health").get("health") == "true"

    def member_name(self) -> str:
        """The name of the member that answers; empty when none does."""
        return str(self._status("/v2/stats/self").get("name", ""))

    def is_leader(self) -> bool:
        """Whether this member says that it leads. Never raises for a dead or mute etcd."""
        return self._status("/v2/stats/self").get("state") == "StateLeader"

    def watchers(self) -> int:
        """How many watches wait for an event; 0 when no etcd answers."""
        return int(self._status("/v2/stats/store").get("watchers", 0))

    def _status(self, path: str) -> dict[str, Any]:
        try:
            status, _, body = self.request("GET", path)
        except (OSError, http.client.HTTPException):
            return {}
        # /v2/stats/self has no body at all when a rate in it is no number.
        document: dict[str, Any] = json.loads(body) if status == 200 and body else {}
        return document

    def keys(
        self,
        method: str,
        key: str,
        query: Mapping[str, object] | None = None,
        form: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """A request on /v2/keys. Query values that are None are left out."""
        given = {
            name: str(value).lower() for name, value in (query or {}).items() if value is not None
        }
        path = f"/v2/keys/{quote(key.strip('/'))}?{urlencode(given)}"
        body = None if form is None else urlencode(form)
        status, _, answer = self.request(
            method, path, body, {"Content-Type": "application/x-www-form-urlencoded"}
        )
        return _answer(status, answer)

    def auth(self, path: str, document: object = None) -> None:
        """PUT a JSON document to /v2/auth/PATH."""
        status, _, answer = self.request(
            "PUT",
            f"/v2/auth/{path}",
            json.dumps(document) if document else None,
            {"Content-Type": "application/json"},
        )
        if status >= 300:
            raise EtcdV2Error(status, answer.decode(errors="replace"))

    def request(
        self,
        method: str,
        path: str,
        body: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Any request: status, headers, body."""
        self._ready()
        try:
            self._connection.request(method, path, body, {**self._headers, **(headers or {})})
            response = self._connection.getresponse()
            return response.status, response.headers, response.read()
        except (OSError, http.client.HTTPException):
            self.close()
            raise

    def _ready(self) -> None:
        """Have a connection that, as far as can be known, the server has not closed meanwhile."""
        old = self._connection.sock
        if old is not None:
            if not select.select([old], [], [], 0)[0]:
                return
            self.close()
        raw = self._connect(self._timeout)
        try:
            raw.settimeout(self._timeout)
            # Head and body leave in two pieces; the second must not wait for an acknowledgement.
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                raw = self._tls.wrap_socket(raw, server_hostname=self._host)
        except BaseException:
            raw.close()
            raise
        self._connection.sock = raw


def _answer(status: int, body: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(body)
    except ValueError:
        raise EtcdV2Error(status, body.decode(errors="replace").strip()) from None
    if "errorCode" in answer:
        message = f"{answer['message']} ({answer.get('cause', '')})"
        raise EtcdV2Error(answer["errorCode"], message)
    if status >= 300:
        raise EtcdV2Error(status, answer.get("message", ""))
    return answer


def _node(document: Mapping[str, Any]) -> Node:
    return Node(
        key=document.get("key", "/"),
        value=document.get("value", ""),
        ttl=document.get("ttl"),
        created_index=document.get("createdIndex", 0),
        modified_index=document.get("modifiedIndex", 0),
        is_directory=document.get("dir", False),
        children=tuple(_node(child) for child in document.get("nodes", ())),
    )
