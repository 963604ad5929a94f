"""python-etcd's client for one endpoint, mended.

python-etcd 0.4.5 speaks the protocol well, but was not written for a daemon that must outlive
its servers. What it gets wrong about one connection is put right here:

* It repeats requests by itself, so that a create whose answer was lost comes back as "already
  exists" for our own write, and a hung server costs four timeouts. Here: no retries.
* A blocked watch cannot be ended from another thread. Here: `OpenSockets.close` shuts down every
  socket, which ends a request in whichever phase it is.
* A hung server is noticed only after the watch's own timeout. Here: the answer's head must come
  within seconds; only the wait for the event itself may last long, and `Member.trouble` tells
  meanwhile whether there is still somebody who would send it.
* A watch that timed out forgets how far the store had come, and is later told that the history
  is cleared. Here: the head's index is kept, and a member that lags behind is recognised by it.
* Passwords beyond Latin-1 fail, and a user without a password is not sent at all.
* An error that is not etcd's may be taken for one that is: any 404 for an absent key. Here:
  `Refused` says whether it has an errorCode.

HTTP proxies from the environment are not used.
"""

import contextlib
import json
import logging
import math
import random
import socket
import ssl
import threading
import time
import weakref
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar
from urllib.parse import urlencode, urlsplit

from flanneld.errors import OptionError, StoreUnavailable
from flanneld.logs import verbose
from flanneld.subnet.etcd_wait import WatchfulTLSSocket, pause_for, watchful
from flanneld.subnet.python_etcd import etcd
from flanneld.subnet.store import Behind

# isort: split
# After python_etcd, which imports urllib3 without what is not needed.
import urllib3
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ClosedPoolError, HTTPError

T = TypeVar("T")

log = logging.getLogger(__name__)

# Seconds. The original waits 1 s for a connection and for ever for an answer. etcd itself gives
# up a write without quorum after 7 s, but by then another member deserves its turn.
CONNECT_TIMEOUT = 2.0
ANSWER_TIMEOUT = 5.0

# Seconds until the list of all leases must begin to come, at most. For 2,000 hosts that all ask at
# once etcd is at work for 18 s; if they gave up after 5 s and asked again, it would be for ever.
LIST_TIMEOUT = 20.0

# Seconds between looks at a member that lets us wait for an event, an eighth more or less. One that
# is cut off knows no leader after one to two election timeouts (etcd's default is 1 s); together
# that stays below 5 s.
LOOK = 2.0

# Seconds until a member is looked at that owes an answer: they take milliseconds.
LATE = 1.0

# Seconds for the answer to such a look, which needs neither a disk nor another member. Less where
# it is only the question whether another member is better.
LOOK_TIMEOUT = 1.5
OTHER_TIMEOUT = 1.0

# The trouble of a member that lets such a look wait, too.
SILENT = "it does not answer"

# Characters of a foreign answer that a log line shows.
_SHOWN = 200

# So that a host that vanished without closing its connections is noticed within a minute.
_KEEPALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


def look_pause() -> float:
    """Return about `LOOK` seconds: hosts that got the same event do not all look at one moment."""
    return LOOK * random.uniform(0.875, 1.125)  # noqa: S311 - keeps no secret


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to reach the store: TLS files (PEM paths) and HTTP basic auth; empty means unused."""

    cert_file: str = ""
    key_file: str = ""
    ca_file: str = ""
    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(slots=True)
class Head:
    """What the head of the answer to a poll said."""

    after: int
    timeout: float
    index: int = 0


class Refused(etcd.EtcdException):  # type: ignore[misc]  # python-etcd has no type information
    """An answer other than success. Its text is the original's where etcd gave a reason."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.code = 0
        """etcd's errorCode; 0 if the answer has none."""
        self.index = 0
        try:
            found = json.loads(body)
            if isinstance(found, dict) and "errorCode" in found:
                self.code, self.index = int(found["errorCode"]), int(found.get("index", 0))
        except (ValueError, TypeError, OverflowError, RecursionError):
            found = None
        if self.code:
            message, cause = found.get("message", ""), found.get("cause", "")
            super().__init__(f"{self.code}: {message} ({cause}) [{self.index}]")
            return
        reason = found.get("message") if isinstance(found, dict) else None
        text = str(reason or body.decode(errors="replace"))
        text = " ".join(text.split())[:_SHOWN]
        hint = ": is this etcd, and started with --enable-v2?" if status == 404 else ""
        super().__init__(f"HTTP {status}: {text}{hint}")


class Member(etcd.Client):  # type: ignore[misc]  # python-etcd has no type information
    """python-etcd's client for one endpoint, mended."""

    def __init__(
        self,
        url: tuple[str, str, int],
        context: ssl.SSLContext | None,
        credentials: Credentials,
        sockets: "OpenSockets",
    ) -> None:
        scheme, host, port = url
        super().__init__(host=host, port=port, protocol=scheme, allow_reconnect=False)
        self._read_timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=ANSWER_TIMEOUT)
        self._authorization = _basic_auth(credentials)
        self._expected = threading.local()
        self._looking = threading.Lock()
        self._looked_at = -math.inf
        self._trouble = ""
        self.http.connection_pool_kw.update(
            # `total` would also count redirects, which a follower may need to send.
            retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
            timeout=self._read_timeout,
            socket_options=_KEEPALIVE,
        )
        if scheme == "https" and context is not None:
            self.http.connection_pool_kw["ssl_context"] = context
        self.http.pool_classes_by_scheme = _pool_classes(sockets)

    def read_patiently(self, patience: float, key: str, options: dict[str, Any]) -> Any:
        """As `read`; the answer must begin within ``patience`` seconds."""
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=patience)
        return self.read(key, timeout=timeout, **options)

    def put(self, key: str, value: str, ttl: int | None, condition: dict[str, Any]) -> Any:
        """Write a key; the condition goes into the query, as the original sends it."""
        form = {"value": value} if ttl is None else {"ttl": ttl, "value": value}
        path = f"{self.key_endpoint}{key}?{urlencode(condition)}"
        return self._result_from_response(self.api_execute(path, self._MPUT, params=form))

    def remove(self, key: str, condition: dict[str, Any]) -> Any:
        """Delete a key. python-etcd's own sends the parts of the condition in any order."""
        path = f"{self.key_endpoint}{key}?{urlencode(condition)}"
        return self._result_from_response(self.api_execute(path, self._MDELETE))

    def asked(self, request: Callable[[Self], T]) -> T:
        """Return the answer to a request, whatever `forget_connections` does meanwhile."""
        try:
            return request(self)
        except etcd.EtcdConnectionFailed as error:
            if not isinstance(error.cause, ClosedPoolError):
                raise
        # Nothing was sent: the connections were forgotten between two steps of ours.
        return request(self)

    def forget_connections(self) -> None:
        """Close the connections that are idle now, and the others when their request has ended."""
        pools = [self.http.pools.get(key) for key in self.http.pools.keys()]  # noqa: SIM118 - no dict
        self.http.clear()
        for pool in pools:
            if pool is not None:
                pool.close()

    def look(self, timeout: float, fresh: float = 0.0) -> tuple[str, float]:
        """Say why it cannot serve: it does not answer, or knows no leader. Empty if it can.

        And how many seconds ago that was found out: what is ``fresh`` is not asked for again,
        nor what another thread is just asking.

        This is cheap for etcd: no entry in its log, no word to another member. What is no etcd's
        answer is taken for health: it may be a proxy's.
        """
        began = time.monotonic()
        with self._looking:
            age = time.monotonic() - self._looked_at
            if self._looked_at < began and (self._trouble or age >= fresh):
                self._trouble = self._ask_for_leader(timeout)
                self._looked_at = time.monotonic()
            return self._trouble, time.monotonic() - self._looked_at

    def _ask_for_leader(self, timeout: float) -> str:
        url = f"{self.base_uri}{self.version_prefix}/members/leader"
        options: Any = {"headers": self._authorization, "timeout": urllib3.Timeout(total=timeout)}
        try:
            try:
                answer = self.http.request("GET", url, **options)
            except ClosedPoolError:  # see `asked`
                answer = self.http.request("GET", url, **options)
        except (HTTPError, OSError, ValueError) as error:
            log.log(verbose(2), "%s: %r", url, error)
            return SILENT
        return str(Refused(answer.status, answer.data)) if answer.status >= 500 else ""

    def expect_event(self, after: int | None, timeout: float) -> Head:
        """Announce that this thread's next request is a poll (None: is not)."""
        head = Head(after or 0, timeout)
        self._expected.head = head if after is not None else None
        return head

    def _check_cluster_id(self, response: Any) -> None:
        # python-etcd calls this between an answer's head and its body: the one moment to look at
        # a poll's head. A changed cluster id is no error here: a store that lost its data shows
        # by its index, and a poll must not fail once for each connection.
        head: Head | None = getattr(self._expected, "head", None)
        if head is None or response.status != 200:
            return
        index = response.headers.get("X-Etcd-Index", "")
        head.index = int(index) if index.isdecimal() and len(index) < 20 else 0
        if head.index < head.after:
            response.close()
            raise Behind(f"{self.base_uri} is at index {head.index}, not yet at {head.after}")
        if response.connection is not None and response.connection.sock is not None:
            response.connection.sock.settimeout(head.timeout)
            pause_for(look_pause())

    def _result_from_response(self, response: Any) -> Any:
        if not response.data.strip():
            if getattr(self._expected, "head", None) is None:
                raise etcd.EtcdException("empty answer")
            # Some servers end an idle poll like this.
            raise etcd.EtcdWatchTimedOut("empty answer")
        return super()._result_from_response(response)

    def _handle_server_response(self, response: Any) -> Any:
        if response.status in (200, 201):
            return response
        raise Refused(response.status, response.data)

    def _get_headers(self) -> dict[str, str]:
        return self._authorization


class OpenSockets:
    """The sockets of all connections, so that another thread can shut them down."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._closed = False

    def add(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.add(sock)
            if self._closed:
                _shut_down(sock)

    def check_open(self) -> None:
        """Raise StoreUnavailable after `close`."""
        if self._closed:
            raise StoreUnavailable("the connection to the store was closed")

    @property
    def are_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for sock in self._sockets:
                _shut_down(sock)


def _shut_down(sock: socket.socket) -> None:
    # A socket that is not connected any more has nobody waiting for it.
    with contextlib.suppress(OSError):
        # Not sock.shutdown: SSLSocket's takes the TLS state away under the thread that reads.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _pool_classes(sockets: OpenSockets) -> dict[str, type[HTTPConnectionPool]]:
    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            self.sock = watchful(self.sock)
            sockets.add(self.sock)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    # A TLS connection's socket registers itself: see `tls_context`.
    return {"http": PlainPool, "https": HTTPSConnectionPool}


def parse_endpoint(text: str) -> tuple[str, str, int]:
    """Return (scheme, host, port) of one base URL; without a scheme it is http."""
    # Without what may be a password.
    shown = text.rpartition("@")[2]
    problem = f"unusable etcd endpoint {shown!r}: write http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError as error:
        raise OptionError(f"{problem} ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
        raise OptionError(problem)
    if "@" in text or not text.isprintable() or any(c in text for c in " ?#\\"):
        raise OptionError(problem)
    if port == 0:
        raise OptionError(problem)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)


def tls_context(credentials: Credentials, sockets: OpenSockets) -> ssl.SSLContext:
    """Return how to make TLS connections, whose sockets join ``sockets``.

    Raises OptionError for a file that cannot be used.
    """

    class Socket(WatchfulTLSSocket):
        def do_handshake(self, block: bool = False) -> None:
            # Not later: a hung server does not answer the handshake either.
            sockets.add(self)
            try:
                super().do_handshake(block)
            except ConnectionError as error:
                # As the end of the stream is told: which of the two it is, is a matter of chance.
                # Not chained: the reason told is the innermost.
                text = f"{(error.strerror or str(error)).lower()} in the TLS handshake"
                raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, text) from None

    cert, key, ca = credentials.cert_file, credentials.key_file, credentials.ca_file
    step = f"CA file {ca}"
    try:
        context = ssl.create_default_context(cafile=ca or None)
        # Since Python 3.13: it refuses what plain openssl makes, and what the original takes.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if cert or key:
            step = f"client certificate {cert} with key {key}"
            # A password, so that OpenSSL does not ask the terminal for one.
            context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = str(error)
        if isinstance(error, OSError) and not isinstance(error, ssl.SSLError):
            why = error.strerror or why
        raise OptionError(f"cannot use the etcd {step}: {why}") from error
    context.sslsocket_class = Socket
    return context


def _basic_auth(credentials: Credentials) -> dict[str, str]:
    if not credentials.username:
        return {}
    text = f"{credentials.username}:{credentials.password}".encode(errors="surrogateescape")
    return {"Authorization": "Basic " + b64encode(text).decode()}
