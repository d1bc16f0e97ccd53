"""TLS in memory: certificates that are made on the spot, and pairs of channels that talk to each other."""

from __future__ import annotations

import functools
import hmac
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import trustme
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pgauthproxy._tls import Channel

NAME: Final = "db.example.com"
VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def server_context(version: str = "1.3", *, asks: bool = False) -> ssl.SSLContext:
    """A server named NAME; `asks`: clients must have a certificate of the same authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = VERSIONS[version]
    context.set_alpn_protocols(["postgresql"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    authority().issue_cert(NAME).configure_cert(context)
    if asks:
        authority().configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@functools.cache
def client_context(*, trusts: bool = True) -> ssl.SSLContext:
    """A client; it trusts the authority, or nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["postgresql"])
    if trusts:
        authority().configure_trust(context)
    return context


def channels(version: str = "1.3") -> tuple[Channel, Channel]:
    """A client's and a server's channel, before their handshake."""
    client = Channel(client_context(), server_side=False, server_hostname=NAME)
    return client, Channel(server_context(version), server_side=True)


Cut = Callable[[bytes], Iterable[bytes]]


def in_pieces_of(size: int) -> Cut:
    return lambda data: (data[at : at + size] for at in range(0, len(data), size))


def whole(data: bytes) -> Iterable[bytes]:
    return [data]


def shake_hands(client: Channel, server: Channel, cut: Cut = whole) -> None:
    """The handshake, what each says cut into pieces on its way. What comes behind it is decrypted: it says nothing."""
    said, listener, speaker = client.handshake(b""), server, client
    while said or not (client.established and server.established):
        answer = b""
        for piece in cut(said):
            if listener.established:
                assert listener.decrypt(piece) == b""
                answer += listener.take_output()
            else:
                answer += listener.handshake(piece)
        said, listener, speaker = answer, speaker, listener


def shaken(version: str = "1.3") -> tuple[Channel, Channel]:
    """A client's and a server's channel that have shaken hands."""
    client, server = channels(version)
    shake_hands(client, server)
    return client, server


class Renegotiating:
    """A client of TLS 1.2 that asks for renegotiation, which Python's ssl never does: it makes the records by itself.

    `server` is whom it has shaken hands with.
    """

    def __init__(self, folder: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_ciphers("ECDHE-ECDSA-AES256-GCM-SHA384")
        context.keylog_filename = str(folder / "keys")
        authority().configure_trust(context)
        self.client = Channel(context, server_side=False, server_hostname=NAME)
        self.server = Channel(server_context("1.2"), server_side=True)
        hello = self.server.handshake(self.client.handshake(b""))
        # Type and version of record and message, and their lengths, stand before it.
        server_random = hello[11 : 11 + 32]
        self.server.decrypt(self.client.handshake(self.server.handshake(self.client.handshake(hello))))
        _, client_random, master = (folder / "keys").read_text().splitlines()[-1].split()
        keys = expanded(bytes.fromhex(master), b"key expansion", server_random + bytes.fromhex(client_random), 72)
        self._cipher, self._salt = AESGCM(keys[:32]), keys[64:68]
        # Number 0 was the end of the handshake.
        self._number = 1

    def asks(self) -> bytes:
        """A record that holds a ClientHello."""
        hello = b"\3\3" + bytes(32) + b"\0" + b"\0\2\xc0\x2c" + b"\1\0"
        message = b"\1" + len(hello).to_bytes(3) + hello
        number = self._number.to_bytes(8)
        self._number += 1
        header = b"\x16\3\3"
        sealed = self._cipher.encrypt(self._salt + number, message, number + header + len(message).to_bytes(2))
        return header + (8 + len(sealed)).to_bytes(2) + number + sealed


def expanded(secret: bytes, label: bytes, seed: bytes, size: int) -> bytes:
    """The pseudorandom function of TLS 1.2 (RFC 5246, section 5)."""
    made, last = b"", label + seed
    while len(made) < size:
        last = hmac.digest(secret, last, "sha384")
        made += hmac.digest(secret, last + label + seed, "sha384")
    return made[:size]
