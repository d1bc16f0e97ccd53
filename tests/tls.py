"""Certificates as files, and peers that speak TLS as tests want it: a client, and what a scripted target opens with."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from tests.wire import SSL_REQUEST, RawClient

HOST = "127.0.0.1"
PEM = serialization.Encoding.PEM
LONG_AGO = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
LAST_YEAR = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=365)
NEXT_YEAR = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=365)


@dataclass(frozen=True)
class Identity:
    """A certificate, with what it is signed with, and its key: two files."""

    cert: Path
    key: Path

    @property
    def settings(self) -> dict[str, str]:
        return {"cert": str(self.cert), "key": str(self.key)}

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.cert.read_bytes())

    @property
    def der(self) -> bytes:
        """The certificate as it is sent."""
        return self.certificate.public_bytes(serialization.Encoding.DER)


def write_identity(folder: Path, name: str, cert: bytes, key: bytes) -> Identity:
    """Puts it into two files, the key for its owner alone."""
    identity = Identity(folder / f"{name}.pem", folder / f"{name}.key")
    identity.cert.write_bytes(cert)
    identity.key.touch(0o600)
    identity.key.write_bytes(key)
    return identity


class Authority:
    """Signs certificates, and keeps all that it makes in a folder. `cert` is what others trust it by."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._authority = trustme.CA()
        self.cert = folder / "authority.pem"
        self.cert.write_bytes(self._authority.cert_pem.bytes())

    def issue(self, name: str, *identities: str, **more: Any) -> Identity:
        """A certificate for these hosts; `more` as trustme has it. The same name overwrites."""
        # trustme's own words are longer than what PostgreSQL shows of a subject.
        words = {"organization_name": "testing", "organization_unit_name": "certificates"}
        leaf = self._authority.issue_cert(*identities, **(words | more))
        chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
        return write_identity(self.folder, name, chain, leaf.private_key_pem.bytes())

    def issue_expired(self, name: str, *identities: str, **more: Any) -> Identity:
        return self.issue(name, *identities, not_before=LONG_AGO, not_after=LAST_YEAR, **more)

    def sign(self, name: str, subject: x509.Name, names: list[x509.GeneralName]) -> Identity:
        """A certificate that says what trustme cannot."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority = x509.load_pem_x509_certificate(self.cert.read_bytes())
        authority_key: Any = serialization.load_pem_private_key(self._authority.private_key_pem.bytes(), None)
        builder = x509.CertificateBuilder(
            authority.subject, subject, key.public_key(), x509.random_serial_number(), LAST_YEAR, NEXT_YEAR
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        signed = builder.sign(authority_key, hashes.SHA256())
        return write_identity(self.folder, name, signed.public_bytes(PEM), pem_of(key))

    def client_context(self, identity: Identity | None = None) -> ssl.SSLContext:
        """How a client speaks TLS that trusts this authority alone."""
        context = ssl.create_default_context(cafile=str(self.cert))
        context.set_alpn_protocols(["postgresql"])
        if identity is not None:
            context.load_cert_chain(identity.cert, identity.key)
        return context


def self_signed(
    folder: Path,
    name: str,
    common_name: str = "localhost",
    *,
    algorithm: Any = None,
) -> Identity:
    """A certificate that no authority stands for, signed with this hash; Ed25519 has none of its own."""
    key: Any = ed25519.Ed25519PrivateKey.generate() if algorithm is None else ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))])
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), LAST_YEAR, NEXT_YEAR)
        .add_extension(names, critical=False)
        .sign(key, algorithm)
    )
    return write_identity(folder, name, signed.public_bytes(PEM), pem_of(key))


def pem_of(key: Any, password: bytes | None = None) -> bytes:
    """A private key as a file holds it, encrypted if there is a password."""
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem: bytes = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption)
    return pem


def with_negative_serial(folder: Path, name: str) -> Identity:
    """A certificate as RFC 5280 forbids it and OpenSSL takes it; its signature is wrong."""
    identity = self_signed(folder, name, algorithm=hashes.SHA256())
    serial = identity.certificate.serial_number
    written = serial.to_bytes(serial.bit_length() // 8 + 1)
    der = identity.der.replace(
        bytes([2, len(written)]) + written, bytes([2, len(written), written[0] | 0x80]) + written[1:]
    )
    identity.cert.write_text(ssl.DER_cert_to_PEM_cert(der))
    return identity


def server_context(identity: Identity) -> ssl.SSLContext:
    """How a target speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.cert, identity.key)
    context.set_alpn_protocols(["postgresql"])
    return context


class TlsClient(RawClient):
    """A client that speaks TLS, `direct` or behind an SSLRequest. An end without close_notify is an error to it.

    `before` is what it sends before anything else.
    """

    def __init__(
        self,
        port: int,
        context: ssl.SSLContext,
        *,
        direct: bool = False,
        server_name: str | None = "localhost",
        before: bytes = b"",
    ) -> None:
        super().__init__(port)
        try:
            self.send(before)
            if not direct:
                self.send(SSL_REQUEST)
                assert self.read(1) == b"S"
            self.tls = context.wrap_socket(self.socket, server_hostname=server_name, suppress_ragged_eofs=False)
        except BaseException:
            self.socket.close()
            raise
        self.socket = self.tls

    def read_to_end(self) -> bytes:
        data = b""
        # Raised instead of an empty read where we have said goodbye before the gateway does.
        with contextlib.suppress(ssl.SSLZeroReturnError):
            while chunk := self.socket.recv(65536):
                data += chunk
        return data


Opening = Callable[[socket.socket], socket.socket]


def opens_with_tls(context: ssl.SSLContext, *, direct: bool = False) -> Opening:
    """What a scripted target begins with, so that its script speaks TLS; a handshake that fails ends it in silence."""

    def open_it(connection: socket.socket) -> socket.socket:
        if not direct:
            assert connection.recv(len(SSL_REQUEST), socket.MSG_WAITALL) == SSL_REQUEST
            connection.sendall(b"S")
        try:
            return context.wrap_socket(connection, server_side=True)
        except ssl.SSLError as error:
            raise ConnectionAbortedError(error) from error

    return open_it
