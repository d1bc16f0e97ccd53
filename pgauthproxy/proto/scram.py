"""SCRAM-SHA-256 as PostgreSQL speaks it (RFC 5802, RFC 7677; PostgreSQL manual, "SASL Authentication").

Passwords are prepared with SASLprep (RFC 4013) as libpq does: one that cannot be prepared is used as it is.
"""

import base64
import binascii
import hashlib
import hmac
import stringprep
import unicodedata
from dataclasses import dataclass
from typing import Final

MECHANISM: Final = b"SCRAM-SHA-256"
NONCE_BYTES: Final = 18
MAX_NONCE: Final = 1024
GS2_HEADER_NO_BINDING: Final = b"n,,"

_PROHIBITED: Final = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
    stringprep.in_table_a1,
)


class ScramError(ValueError):
    """The server's part of an exchange is malformed, out of bounds, or proves that it does not know the verifier."""


def saslprep(password: bytes) -> bytes:
    """The password as it enters the key derivation. Never fails: what RFC 4013 forbids is returned as it came.

    Strategy: as PostgreSQL's pg_saslprep, where that differs from the RFC: what a server stored must be found again.
    Spaces are mapped before anything is dropped, and it is the text before normalization that is judged.
    """
    if password.isascii():
        return password
    try:
        text = password.decode()
    except UnicodeDecodeError:
        return password
    mapped = "".join(
        " " if stringprep.in_table_c12(char) else char
        for char in text
        if stringprep.in_table_c12(char) or not stringprep.in_table_b1(char)
    )
    if not mapped or any(prohibited(char) for char in mapped for prohibited in _PROHIBITED):
        return password
    if any(map(stringprep.in_table_d1, mapped)) and (
        any(map(stringprep.in_table_d2, mapped))
        or not (stringprep.in_table_d1(mapped[0]) and stringprep.in_table_d1(mapped[-1]))
    ):
        return password
    return unicodedata.normalize("NFKC", mapped).encode()


def salted_password(password: bytes, salt: bytes, iterations: int) -> bytes:
    """RFC 5802's SaltedPassword; hundreds of microseconds of CPU without the GIL."""
    return hashlib.pbkdf2_hmac("sha256", saslprep(password), salt, iterations)


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


@dataclass(frozen=True, slots=True)
class Challenge:
    """The server's first message."""

    nonce: bytes
    salt: bytes
    iterations: int
    message: bytes


class ScramClient:
    """The client's side of one exchange. In order: `first`, `challenge`, `final`, `verify`."""

    __slots__ = ("_bare", "_nonce", "_server_signature")

    def __init__(self, nonce: bytes) -> None:
        """`nonce`: printable ASCII without commas, fresh for each exchange."""
        self._nonce = nonce
        # The server knows the user from the startup packet, so the name is left empty.
        self._bare = b"n=,r=" + nonce
        self._server_signature = b""

    def first(self) -> bytes:
        return GS2_HEADER_NO_BINDING + self._bare

    def challenge(self, message: bytes, max_iterations: int) -> Challenge:
        """Reads `r=…,s=…,i=…`. Raises ScramError if it is malformed or asks for too much."""
        attributes = message.split(b",")
        if len(attributes) < 3 or [attribute[:2] for attribute in attributes[:3]] != [b"r=", b"s=", b"i="]:
            raise ScramError("malformed server-first-message")
        nonce, salt, iterations = (attribute[2:] for attribute in attributes[:3])
        if not nonce.startswith(self._nonce) or len(nonce) == len(self._nonce) or len(nonce) > MAX_NONCE:
            raise ScramError("the server's nonce does not extend ours, or is too long")
        if not all(0x21 <= char <= 0x7E for char in nonce):
            raise ScramError("the server's nonce is not printable")
        try:
            salt = base64.b64decode(salt, validate=True)
        except binascii.Error as error:
            raise ScramError("the server's salt is not base64") from error
        if not salt:
            raise ScramError("the server's salt is empty")
        if not iterations.isdigit() or len(iterations) > 9 or not 1 <= int(iterations) <= max_iterations:
            raise ScramError(f"the server asks for an iteration count outside 1 to {max_iterations}")
        return Challenge(nonce, salt, int(iterations), message)

    def final(self, challenge: Challenge, salted: bytes) -> bytes:
        """The proof that we know the password, from its salted form."""
        without_proof = b"c=" + base64.b64encode(GS2_HEADER_NO_BINDING) + b",r=" + challenge.nonce
        auth_message = b",".join((self._bare, challenge.message, without_proof))
        client_key = _hmac(salted, b"Client Key")
        signature = _hmac(hashlib.sha256(client_key).digest(), auth_message)
        proof = bytes(left ^ right for left, right in zip(client_key, signature, strict=True))
        self._server_signature = _hmac(_hmac(salted, b"Server Key"), auth_message)
        return without_proof + b",p=" + base64.b64encode(proof)

    def verify(self, message: bytes) -> None:
        """Reads `v=…`. Raises ScramError unless the server knows the verifier of our password."""
        if not message.startswith(b"v="):
            raise ScramError("malformed server-final-message")
        try:
            signature = base64.b64decode(message[2:].split(b",")[0], validate=True)
        except binascii.Error as error:
            raise ScramError("the server's signature is not base64") from error
        if not self._server_signature or not hmac.compare_digest(signature, self._server_signature):
            raise ScramError("wrong server signature")
