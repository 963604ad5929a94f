"""An HTTP server in a thread, between the store and etcd or instead of etcd.

It records every request, and its `behaviour` says for each what becomes of it. So a test can
lose an answer, hold one back, or give one that no etcd would give.
"""

import contextlib
import http.client
import os
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from lab.etcd import free_ports

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came over the wire; ``target`` is path and query."""

    method: str
    target: str
    body: str
    authorization: str = ""

    @property
    def is_poll(self) -> bool:
        return "wait=true" in self.target

    @property
    def is_look(self) -> bool:
        """Whether it asks only if the member is well: how often depends on the machine."""
        return self.target == "/v2/members/leader"

    @property
    def is_write(self) -> bool:
        return self.method != "GET"

    def __str__(self) -> str:
        return f"{self.method} {self.target} {self.body}".rstrip()


class Forward(Enum):
    """Pass the request on to etcd."""

    ANSWER = auto()
    """And its answer back."""
    RESET = auto()
    """And reset the connection when etcd has answered: the answer is lost."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Send these bytes, then nothing more, and keep the connection open."""

    data: bytes = b""


Action = bytes | Forward | Stall
"""What to do with a request; bytes are the whole answer, after which the connection is closed."""


def answer(
    body: str | bytes, status: int = 200, index: object = 1, headers: tuple[str, ...] = ()
) -> bytes:
    """A complete HTTP answer, with etcd's headers."""
    data = body.encode() if isinstance(body, str) else body
    lines = [
        f"HTTP/1.1 {status} Whatever",
        "Content-Type: application/json",
        f"X-Etcd-Index: {index}",
        f"Content-Length: {len(data)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def poll_head(index: int) -> bytes:
    """What etcd sends at once in answer to a poll."""
    return (
        f"HTTP/1.1 200 OK\r\nX-Etcd-Index: {index}\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()


class Server:
    """See the module's text. ``upstream`` is the URL of a real etcd for `Forward`."""

    def __init__(
        self,
        behaviour: Callable[[Request], Action] = lambda _: Forward.ANSWER,
        upstream: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.behaviour = behaviour
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._upstream = urlsplit(upstream).netloc
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_of_test = outer

        class Listener(_Listener):
            def get_request(self) -> tuple[socket.socket, object]:
                connection, address = super().get_request()
                if tls is not None:
                    connection = tls.wrap_socket(
                        connection, server_side=True, do_handshake_on_connect=False
                    )
                outer.track(connection)
                return connection, address

        self._listener = Listener((LOOPBACK, 0), Handler)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://{LOOPBACK}:{self._listener.server_address[1]}"
        self._thread = threading.Thread(
            target=self._listener.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def writes(self) -> list[Request]:
        return [request for request in list(self.requests) if request.is_write]

    def polls(self) -> list[Request]:
        return [request for request in list(self.requests) if request.is_poll]

    def looks(self) -> list[Request]:
        return [request for request in list(self.requests) if request.is_look]

    def cut(self) -> None:
        """End every open connection, at whatever point its request is."""
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Safe to repeat. A server that was closed refuses connections."""
        self.closing.set()
        self._listener.shutdown()
        self._listener.server_close()
        self.cut()
        self._thread.join(5)

    def track(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.add(sock)

    def forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)

    def connect_upstream(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.track(connection.sock)
        return connection


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections break here all the time, on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_test: Server

    def do_GET(self) -> None:
        server = self.server_of_test
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        login = self.headers.get("Authorization", "")
        request = Request(self.command, self.path, body, login)
        server.requests.append(request)
        action = server.behaviour(request)
        if isinstance(action, Forward):
            self._forward(request, action)
            return
        self.close_connection = True
        if isinstance(action, Stall):
            self.wfile.write(action.data)
            server.closing.wait(60)
        else:
            self.wfile.write(action)

    do_PUT = do_GET  # noqa: N815 - the name http.server calls
    do_DELETE = do_GET  # noqa: N815 - the name http.server calls

    def _forward(self, request: Request, action: Forward) -> None:
        server = self.server_of_test
        upstream = server.connect_upstream()
        sock = upstream.sock
        try:
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() in ("content-type", "authorization")
            }
            upstream.request(request.method, request.target, request.body or None, headers)
            response = upstream.getresponse()
            if action is Forward.RESET:
                response.read()
                self._reset()
                return
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "date"):
                    self.send_header(name, value)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while data := response.read1(65536):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.write(b"0\r\n\r\n")
        except BaseException:
            self.close_connection = True
            raise
        finally:
            server.forget(sock)
            upstream.close()

    def _reset(self) -> None:
        """Close with RST, as a host does that has lost the connection."""
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.server_of_test.forget(self.connection)
        os.close(self.connection.detach())

    def finish(self) -> None:
        self.server_of_test.forget(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        """Nothing: pytest's output is for failures."""


class DeafListener:
    """A socket that listens and never accepts: connections are made, nothing is answered.

    With ``full`` its queue is full too, so that a connection is not even made: a black hole.
    """

    def __init__(self, *, full: bool = False) -> None:
        self._sockets = [socket.create_server((LOOPBACK, 0), backlog=0 if full else 16)]
        address = self._sockets[0].getsockname()
        self.url = f"http://{LOOPBACK}:{address[1]}"
        if not full:
            return
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            self._sockets.append(filler)
            with contextlib.suppress(BlockingIOError):
                filler.connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sock in self._sockets:
            sock.close()


def free_url() -> str:
    """The URL of a port nobody listens on."""
    return f"http://{LOOPBACK}:{free_ports(1)[0]}"
