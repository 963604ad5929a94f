"""The health server: ``GET /healthz`` answers 200 as long as the process lives, as the original."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from typing import Any

from flanneld.errors import OptionError
from flanneld.signals import kept_in_this_thread

_TEXT = "text/plain; charset=utf-8"

# Seconds a client may take for its request.
_CLIENT_TIMEOUT = 10


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _CLIENT_TIMEOUT

    def _answer(self) -> None:
        healthy = self.path.partition("?")[0] == "/healthz"
        body = b"flanneld is running" if healthy else b"404 page not found\n"
        self.send_response(200 if healthy else 404)
        self.send_header("Content-Type", _TEXT)
        self.send_header("Content-Length", str(len(body)))
        # A request's body, if any, is not read: the next request must not be looked for in it.
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = True

    # The original answers every method alike.
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = _answer  # noqa: N815 - http.server names them

    def log_message(self, *_: Any) -> None:
        """Keep requests out of the log: they come every few seconds."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, port: int) -> None:
        self.address_family = AF_INET6 if ":" in address else AF_INET
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        """Bind, without the look-up of our own name, which hangs while DNS is away."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, *_: Any) -> None:
        """A client that goes away in the middle is no event."""


def start_health_server(address: str, port: int) -> None:
    """Serve in threads of their own until the process ends. Raises OptionError if it cannot."""
    try:
        server = _Server(address, port)
    except OSError as error:
        raise OptionError(
            f"Start healthz server error. listen tcp {address}:{port}: {error.strerror}"
            " (choose another --healthz-port or --healthz-ip)"
        ) from error
    # Not around the above: a name that is looked up may take its time, and a signal must end that.
    with kept_in_this_thread():
        threading.Thread(target=server.serve_forever, name="healthz", daemon=True).start()
