"""Certificates for one etcd: an authority, a server, a client. Made with the openssl command."""

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from lab.process import run

_AUTHORITY = """\
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""
_LEAF = """\
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
authorityKeyIdentifier = keyid
"""


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path

    def client_context(self) -> ssl.SSLContext:
        """What a Python client needs to be let in."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(self.client, self.client_key)
        return context


def make(directory: Path, addresses: Iterable[IPv4Address]) -> Certificates:
    """Write new certificates, valid for a day; the server's is for exactly these addresses."""
    directory.mkdir()
    names = ", ".join(f"IP:{address}" for address in addresses)
    extensions = directory / "extensions"
    extensions.write_text(
        f"[authority]\n{_AUTHORITY}"
        # etcd's gateway is a client of etcd itself, with the server's certificate.
        f"[server]\n{_LEAF}extendedKeyUsage = serverAuth, clientAuth\nsubjectAltName = {names}\n"
        f"[client]\n{_LEAF}extendedKeyUsage = clientAuth\n"
    )
    ca, ca_key = directory / "ca.pem", directory / "ca-key.pem"
    request = directory / "request.pem"

    def issue(name: str, section: str, *signer: str) -> tuple[Path, Path]:
        certificate, key = directory / f"{name}.pem", directory / f"{name}-key.pem"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        owner = ("-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request))
        run(["openssl", "req", "-new", *curve, *owner])
        files = ("-in", str(request), "-out", str(certificate))
        kind = ("-extfile", str(extensions), "-extensions", section)
        run(["openssl", "x509", "-req", "-days", "1", *files, *kind, *signer])
        return certificate, key

    issue("ca", "authority", "-signkey", str(ca_key))
    by_ca = ("-CA", str(ca), "-CAkey", str(ca_key), "-CAcreateserial")
    server, server_key = issue("server", "server", *by_ca)
    client, client_key = issue("client", "client", *by_ca)
    return Certificates(ca, server, server_key, client, client_key)
