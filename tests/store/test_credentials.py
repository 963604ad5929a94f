"""TLS, basic auth, and options that cannot be used."""

import contextlib
import os
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from flanneld.errors import OptionError, StoreDenied, StoreUnavailable
from flanneld.subnet.etcd_member import Credentials, OpenSockets, parse_endpoint, tls_context
from lab import certs
from lab.etcd import LOOPBACK, Etcd, Login
from lab.process import run

from .conftest import MakeStore
from .hosts import NETWORK, attrs, later
from .servers import Server, answer

PREFIX = "/coreos.com/network"
NAME = "10.5.17.0-24"
VALUE = attrs().encode()


@pytest.fixture(scope="module")
def secure(_etcd_installed: None) -> Iterator[Etcd]:
    """An etcd that speaks only TLS, and only with clients that have a certificate."""
    with Etcd(tls=True) as etcd:
        with etcd.client() as client:
            client.put(f"{PREFIX}/config", NETWORK)
        yield etcd


@pytest.fixture(scope="module")
def files(secure: Etcd) -> certs.Certificates:
    assert secure.certificates is not None
    return secure.certificates


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> certs.Certificates:
    """As good as ours, but of another authority."""
    return certs.make(tmp_path_factory.mktemp("other") / "tls", [LOOPBACK])


def test_tls_with_client_certificate(
    secure: Etcd, files: certs.Certificates, make_store: MakeStore
) -> None:
    good = Credentials(str(files.client), str(files.client_key), str(files.ca))
    store = make_store(secure.url, credentials=good)
    node = store.create(NAME, VALUE, 3600)
    (found,) = store.snapshot().nodes
    assert found == later(node, found)
    event = store.poll(None, node.index - 1, 5).event
    assert event is not None
    assert event.node == node
    assert store.poll(None, node.index, 0.2).event is None
    store.remove(node)
    assert make_store(secure.url, at=PREFIX, credentials=good).read_config() == NETWORK


def test_server_of_another_authority_is_refused(
    secure: Etcd, files: certs.Certificates, strangers: certs.Certificates, make_store: MakeStore
) -> None:
    for ca in (str(strangers.ca), ""):  # "": the system's authorities
        wrong = Credentials(str(files.client), str(files.client_key), ca)
        store = make_store(secure.url, at=PREFIX, credentials=wrong)
        with pytest.raises(StoreUnavailable, match="certificate verify failed: unable to get"):
            store.read_config()


def test_server_with_another_name_is_refused(
    files: certs.Certificates, make_store: MakeStore
) -> None:
    good = Credentials(str(files.client), str(files.client_key), str(files.ca))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server, files.server_key)
    with Server(lambda _: answer("{}"), tls=context) as server:
        store = make_store(server.url.replace("127.0.0.1", "localhost"), credentials=good)
        with pytest.raises(StoreUnavailable, match=r"(?i)hostname mismatch.*'localhost'"):
            store.read_config()
        assert server.requests == []


def test_certificates_of_a_plain_openssl_are_taken_by_every_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Go takes an authority without a key usage; Python 3.13 and later do not, by default."""
    default = ssl.create_default_context

    def as_since_3_13(*, cafile: str) -> ssl.SSLContext:
        context = default(cafile=cafile)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    ca, ca_key, cert, key = (str(tmp_path / name) for name in ("ca", "ca-key", "cert", "key"))
    names = tmp_path / "names"
    names.write_text("subjectAltName=IP:127.0.0.1")
    run(["openssl", "req", "-x509", *curve, "-subj", "/CN=ca", "-keyout", ca_key, "-out", ca])
    run(["openssl", "req", "-new", *curve, "-subj", "/CN=x", "-keyout", key, "-out", f"{cert}-req"])
    by_ca = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-extfile", str(names))
    run(["openssl", "x509", "-req", "-in", f"{cert}-req", *by_ca, "-out", cert])
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(cert, key)
    monkeypatch.setattr(ssl, "create_default_context", as_since_3_13)
    context = tls_context(Credentials(ca_file=ca), OpenSockets())
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(there, back, server_side=True)
    client = context.wrap_bio(back, there, server_hostname="127.0.0.1")
    for end in (client, server, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert client.getpeercert()


def test_client_without_certificate_is_refused(
    secure: Etcd, files: certs.Certificates, strangers: certs.Certificates, make_store: MakeStore
) -> None:
    for cert, key in (("", ""), (str(strangers.client), str(strangers.client_key))):
        store = make_store(secure.url, at=PREFIX, credentials=Credentials(cert, key, str(files.ca)))
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
            store.read_config()


def test_plain_http_to_a_tls_server(secure: Etcd, make_store: MakeStore) -> None:
    store = make_store(secure.url.replace("https", "http"))
    with pytest.raises(StoreUnavailable, match=r": connection closed by the server$"):
        store.read_config()


def test_tls_to_a_plain_http_server(
    etcd: Etcd, files: certs.Certificates, make_store: MakeStore
) -> None:
    store = make_store(
        etcd.url.replace("http", "https"), credentials=Credentials(ca_file=str(files.ca))
    )
    with pytest.raises(StoreUnavailable, match=r"SSL|does it speak TLS"):
        store.read_config()


def test_server_that_resets_the_tls_handshake(
    files: certs.Certificates, make_store: MakeStore
) -> None:
    """The kernel does so when a server closes before it has read everything."""

    def reset_each() -> None:
        with contextlib.suppress(OSError):  # the test has ended
            while True:
                connection, _ = server.accept()
                connection.recv(1)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=reset_each, daemon=True).start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        store = make_store(url, credentials=Credentials(ca_file=str(files.ca)))
        with pytest.raises(StoreUnavailable, match=r"reset by peer in the TLS handshake: does it"):
            store.read_config()
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("cert", "key", "ca", "named"),
    [
        ("", "", "missing", "CA file {missing}"),
        ("", "", "garbage", "CA file {garbage}"),
        ("", "", "directory", "CA file {directory}"),
        ("missing", "key", "ca", "client certificate {missing}"),
        ("cert", "missing", "ca", "with key {missing}"),
        ("cert", "", "ca", "client certificate {cert} with key "),
        ("", "key", "ca", "client certificate  with key {key}"),
        ("cert", "other key", "ca", "with key {other key}"),
        ("garbage", "key", "", "client certificate {garbage}"),
        ("cert", "encrypted", "ca", "with key {encrypted}"),
        ("cert\0", "key", "ca", "client certificate"),
    ],
)
def test_tls_file_that_cannot_be_used(
    *,
    files: certs.Certificates,
    make_store: MakeStore,
    tmp_path: Path,
    cert: str,
    key: str,
    ca: str,
    named: str,
) -> None:
    """Also for http endpoints: the operator believes that it is used."""
    (tmp_path / "garbage").write_text("garbage")
    encrypted = tmp_path / "encrypted"
    secret = ("-aes256", "-passout", "pass:secret")
    run(["openssl", "ec", "-in", str(files.client_key), "-out", str(encrypted), *secret])
    known = {
        "missing": str(tmp_path / "missing"),
        "garbage": str(tmp_path / "garbage"),
        "directory": str(tmp_path),
        "encrypted": str(encrypted),
        "cert": str(files.client),
        "cert\0": f"{files.client}\0",
        "key": str(files.client_key),
        "other key": str(files.server_key),
        "ca": str(files.ca),
        "": "",
    }
    options = Credentials(known[cert], known[key], known[ca])
    for scheme in ("http", "https"):
        with pytest.raises(OptionError) as caught:
            make_store(f"{scheme}://127.0.0.1:1", credentials=options)
        assert str(caught.value).startswith("cannot use the etcd ")
        assert named.format_map(known) in str(caught.value)
        assert "[Errno" not in str(caught.value)


LOGINS = [
    Login("flannel", "secret"),
    Login("flannel", "pass:wörd-網 \u20ac"),
]


@pytest.mark.parametrize("login", LOGINS, ids=["ascii", "beyond latin-1"])
def test_basic_auth(own_etcd: Etcd, make_store: MakeStore, login: Login) -> None:
    with own_etcd.client() as client:
        client.put(f"{PREFIX}/config", NETWORK)
    own_etcd.enable_auth(login)

    def log_in(user: str, password: str) -> Credentials:
        return Credentials(username=user, password=password)

    store = make_store(own_etcd.url, at=PREFIX, credentials=log_in(login.user, login.password))
    assert store.read_config() == NETWORK
    node = store.create(NAME, VALUE, 3600)
    (found,) = store.snapshot().nodes
    assert found == later(node, found)
    assert store.poll(None, node.index, 0.2).event is None
    for wrong in (
        log_in(login.user, "wrong"),
        log_in(login.user, ""),
        log_in("nobody", login.password),
        Credentials(),
    ):
        store = make_store(own_etcd.url, at=PREFIX, credentials=wrong)
        hint = r"^110: .*\(Insufficient credentials\) .*: check --etcd-username and --etcd-password"
        with pytest.raises(StoreDenied, match=hint):
            store.read_config()
        with pytest.raises(StoreDenied):
            store.snapshot()
        with pytest.raises(StoreDenied):
            store.swap(node, "stolen", 3600)
        with pytest.raises(StoreDenied):
            store.remove(node)
        with pytest.raises(StoreDenied):
            store.poll(None, node.index, 1)
    elsewhere = make_store(
        own_etcd.url, at="/secret", credentials=log_in(login.user, login.password)
    )
    with pytest.raises(StoreDenied):
        elsewhere.create(NAME, VALUE, 3600)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_wrong_credentials_are_not_tried_at_every_member(
    make_store: MakeStore, files: certs.Certificates, scheme: str
) -> None:
    """They are the same everywhere; a lock-out would come three times as fast."""
    denied = answer('{"message":"Insufficient credentials"}', 401)
    context = None
    if scheme == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.server, files.server_key)
    with (
        Server(lambda _: denied, tls=context) as first,
        Server(lambda _: denied, tls=context) as second,
    ):
        store = make_store(
            f"{first.url},{second.url}", credentials=Credentials(ca_file=str(files.ca))
        )
        with pytest.raises(StoreDenied):
            store.read_config()
        assert len(first.requests) + len(second.requests) == 1


def test_password_never_shows() -> None:
    typed = "hush"
    assert typed not in repr(Credentials(username="u", password=typed))


def test_command_line_bytes_that_are_not_utf8(make_store: MakeStore) -> None:
    """Python hands them over as surrogates; a password goes out as it was typed."""
    typed = b"p\xff"
    with Server(lambda _: answer('{"action":"get","node":{"value":"x"}}')) as server:
        login = Credentials(username="u", password=os.fsdecode(typed))
        make_store(server.url, credentials=login).read_config()
        sent = server.requests[0].authorization
    assert sent == "Basic " + b64encode(b"u:" + typed).decode()
    with pytest.raises(OptionError, match="unusable etcd prefix"):
        make_store(server.url, at="/caf\udce9")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:2379", ("http", "127.0.0.1", 2379)),
        ("http://127.0.0.1:2379/", ("http", "127.0.0.1", 2379)),
        ("https://etcd.example.org:4001", ("https", "etcd.example.org", 4001)),
        ("HTTPS://Etcd:1", ("https", "etcd", 1)),
        ("http://etcd", ("http", "etcd", 80)),
        ("https://etcd", ("https", "etcd", 443)),
        ("etcd:2379", ("http", "etcd", 2379)),
        ("127.0.0.1:2379", ("http", "127.0.0.1", 2379)),
        ("http://[::1]:2379", ("http", "[::1]", 2379)),
        ("https://[fd00:97::1]", ("https", "[fd00:97::1]", 443)),
    ],
)
def test_endpoint(text: str, expected: tuple[str, str, int]) -> None:
    assert parse_endpoint(text) == expected


@pytest.mark.parametrize(
    "endpoints",
    [
        "",
        ",",
        "http://127.0.0.1:2379,",
        ",http://127.0.0.1:2379",
        "http://127.0.0.1:2379, http://127.0.0.2:2379",
        "http://127.0.0.1:2379;http://127.0.0.2:2379",
        "http://",
        "http://:2379",
        "://127.0.0.1:2379",
        "ftp://127.0.0.1:2379",
        "unix:///run/etcd.sock",
        "http://127.0.0.1:port",
        "http://127.0.0.1:0",
        "http://127.0.0.1:-1",
        "http://127.0.0.1:65536",
        "http://127.0.0.1:2379/v2/keys",
        "http://127.0.0.1:2379?x=1",
        "http://127.0.0.1:2379#x",
        "http://user:secret@127.0.0.1:2379",
        "user:secret@127.0.0.1:2379",
        "http://@127.0.0.1:2379",
        "http://[::1:2379",
        "http://::1:2379",
        "http://ho st:2379",
        "http://host\n:2379",
        "http://host\0:2379",
        "http://host\\x:2379",
        "http://ho\udcffst:2379",
    ],
)
def test_endpoints_that_cannot_be_used(make_store: MakeStore, endpoints: str) -> None:
    with pytest.raises(OptionError, match=r"unusable etcd endpoint .*: write http://") as caught:
        make_store(endpoints)
    assert "secret" not in str(caught.value)
