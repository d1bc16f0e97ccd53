"""SCRAM-SHA-256 as PostgreSQL speaks it, both sides (RFC 5802, RFC 7677; PostgreSQL manual, "SASL Authentication").

Passwords are prepared with SASLprep (RFC 4013) as libpq does: one that cannot be prepared is used as it is. The
channel is bound with tls-server-end-point (RFC 5929), the one type that PostgreSQL knows.
"""

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import stringprep
import unicodedata
from dataclasses import dataclass
from typing import Final

MECHANISM: Final = b"SCRAM-SHA-256"
MECHANISM_PLUS: Final = b"SCRAM-SHA-256-PLUS"
NONCE_BYTES: Final = 18
SALT_BYTES: Final = 16
MAX_NONCE: Final = 1024
DEFAULT_ITERATIONS: Final = 4096
# The gs2-header of RFC 5802, section 7: the client cannot bind, thinks that the server cannot, or binds.
CANNOT_BIND: Final = b"n,,"
SERVER_CANNOT_BIND: Final = b"y,,"
BINDS: Final = b"p=tls-server-end-point,,"
VERIFIER: Final = re.compile(
    rb"SCRAM-SHA-256\$([0-9]{1,9}):([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]{44}):([A-Za-z0-9+/=]{44})"
)

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
    """The peer's part of an exchange is malformed, out of bounds, or proves that it does not know the secret."""


class BindingError(ScramError):
    """The two sides of an exchange do not speak over the same TLS connection, or somebody hides that they could."""


class WrongProofError(ScramError):
    """The client does not know the password."""


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


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(one ^ other for one, other in zip(left, right, strict=True))


def _base64(text: bytes, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ScramError(f"{what} is not base64") from None


def fresh_nonce() -> bytes:
    """Printable ASCII without commas, never the same twice."""
    return base64.b64encode(secrets.token_bytes(NONCE_BYTES))


def stable_salt(user: bytes, seed: bytes) -> bytes:
    """The salt of a user who has no verifier to take it from, the same each time."""
    return _hmac(seed, user)[:SALT_BYTES]


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """What proves each side to the other; as good as the password for servers that store its verifier."""

    client: bytes
    server: bytes

    @classmethod
    def of(cls, salted: bytes) -> "Keys":
        """RFC 5802's ClientKey and ServerKey of a SaltedPassword."""
        return cls(_hmac(salted, b"Client Key"), _hmac(salted, b"Server Key"))


@dataclass(frozen=True, slots=True, repr=False)
class Verifier:
    """What a server keeps of a password, in the form of pg_authid."""

    iterations: int
    salt: bytes
    stored_key: bytes
    server_key: bytes

    @classmethod
    def parse(cls, text: bytes) -> "Verifier | None":
        """Reads `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`; None if it is none."""
        found = VERIFIER.fullmatch(text)
        if found is None:
            return None
        try:
            salt, stored_key, server_key = (_base64(part, "") for part in found.groups()[1:])
        except ScramError:
            return None
        iterations = int(found[1])
        if iterations < 1 or not salt or len(stored_key) != 32 or len(server_key) != 32:
            return None
        return cls(iterations, salt, stored_key, server_key)

    @classmethod
    def of(cls, password: bytes, salt: bytes, iterations: int) -> "Verifier":
        """Derived from a password: milliseconds of CPU."""
        keys = Keys.of(salted_password(password, salt, iterations))
        return cls(iterations, salt, hashlib.sha256(keys.client).digest(), keys.server)

    @classmethod
    def made_up(cls, user: bytes, seed: bytes, iterations: int) -> "Verifier":
        """One that no password fits. The same user is given the same salt each time, as a real one would be."""
        return cls(iterations, stable_salt(user, seed), secrets.token_bytes(32), secrets.token_bytes(32))

    def unfitting(self) -> "Verifier":
        """One that looks the same to a client, and that no password fits."""
        return Verifier(self.iterations, self.salt, secrets.token_bytes(32), secrets.token_bytes(32))

    def text(self) -> bytes:
        """The form that `parse` reads, and that PostgreSQL takes for a password."""
        salt, stored_key, server_key = map(base64.b64encode, (self.salt, self.stored_key, self.server_key))
        return b"SCRAM-SHA-256$%d:%s$%s:%s" % (self.iterations, salt, stored_key, server_key)

    def fits(self, salted: bytes) -> bool:
        """Whether this is the verifier of that SaltedPassword; in constant time."""
        stored_key = hashlib.sha256(Keys.of(salted).client).digest()
        return hmac.compare_digest(stored_key, self.stored_key)


@dataclass(frozen=True, slots=True)
class Challenge:
    """The server's first message."""

    nonce: bytes
    salt: bytes
    iterations: int
    message: bytes


class ScramClient:
    """The client's side of one exchange. In order: `first`, `challenge`, `final`, `verify`."""

    __slots__ = ("_bare", "_binding", "_header", "_nonce", "_server_signature")

    def __init__(self, nonce: bytes, header: bytes, binding: bytes = b"") -> None:
        """`nonce` as `fresh_nonce` gives it; `header` CANNOT_BIND, SERVER_CANNOT_BIND or, with `binding`, BINDS."""
        self._nonce = nonce
        self._header = header
        self._binding = binding
        # The server knows the user from the startup packet, so the name is left empty.
        self._bare = b"n=,r=" + nonce
        self._server_signature = b""

    def first(self) -> bytes:
        return self._header + self._bare

    def challenge(self, message: bytes, max_iterations: int) -> Challenge:
        """Reads `r=…,s=…,i=…`. Raises ScramError if it is malformed or asks for too much."""
        attributes = message.split(b",")
        if len(attributes) < 3 or [attribute[:2] for attribute in attributes[:3]] != [b"r=", b"s=", b"i="]:
            raise ScramError("malformed server-first-message")
        nonce, salt, iterations = (attribute[2:] for attribute in attributes[:3])
        if not nonce.startswith(self._nonce) or len(nonce) == len(self._nonce) or len(nonce) > MAX_NONCE:
            raise ScramError("the server's nonce does not extend ours, or is too long")
        if not _is_printable(nonce):
            raise ScramError("the server's nonce is not printable")
        salt = _base64(salt, "the server's salt")
        if not salt:
            raise ScramError("the server's salt is empty")
        if not iterations.isdigit() or len(iterations) > 9 or not 1 <= int(iterations) <= max_iterations:
            raise ScramError(f"the server asks for an iteration count outside 1 to {max_iterations}")
        return Challenge(nonce, salt, int(iterations), message)

    def final(self, challenge: Challenge, keys: Keys) -> bytes:
        """The proof that we know the password."""
        without_proof = b"c=" + base64.b64encode(self._header + self._binding) + b",r=" + challenge.nonce
        auth_message = b",".join((self._bare, challenge.message, without_proof))
        signature = _hmac(hashlib.sha256(keys.client).digest(), auth_message)
        self._server_signature = _hmac(keys.server, auth_message)
        return without_proof + b",p=" + base64.b64encode(_xor(keys.client, signature))

    def verify(self, message: bytes) -> None:
        """Reads `v=…`. Raises ScramError unless the server knows the verifier of our password."""
        if not message.startswith(b"v="):
            raise ScramError("malformed server-final-message")
        signature = _base64(message[2:].split(b",")[0], "the server's signature")
        if not self._server_signature or not hmac.compare_digest(signature, self._server_signature):
            raise ScramError("wrong server signature")


class ScramServer:
    """The server's side of one exchange. In order: `first`, `final`.

    `binding` is what the channel is bound with, empty where it cannot be: then there is no PLUS. Raises ScramError.
    """

    __slots__ = ("_binding", "_client_first_bare", "_header", "_nonce", "_own_nonce", "_server_first", "_verifier")

    def __init__(self, verifier: Verifier, nonce: bytes, binding: bytes) -> None:
        self._verifier = verifier
        self._own_nonce = nonce
        self._binding = binding
        self._header = self._nonce = self._client_first_bare = self._server_first = b""

    def mechanisms(self) -> tuple[bytes, ...]:
        """What the client may choose from, the best first."""
        return (MECHANISM_PLUS, MECHANISM) if self._binding else (MECHANISM,)

    def first(self, mechanism: bytes, message: bytes) -> bytes:
        """Reads the client-first-message, gives the challenge."""
        flag, comma, rest = message.partition(b",")
        authorization, second_comma, self._client_first_bare = rest.partition(b",")
        if not comma or not second_comma:
            raise ScramError("malformed client-first-message")
        if authorization:
            raise ScramError("an authorization identity, which is not supported")
        self._check_binding_flag(mechanism == MECHANISM_PLUS, flag)
        self._header = flag + b",,"
        attributes = self._client_first_bare.split(b",")
        if attributes[0].startswith(b"m="):
            raise ScramError("a mandatory extension, which is not supported")
        if len(attributes) < 2 or not attributes[0].startswith(b"n=") or not attributes[1].startswith(b"r="):
            raise ScramError("malformed client-first-message")
        client_nonce = attributes[1][2:]
        if not client_nonce or not _is_printable(client_nonce):
            raise ScramError("the client's nonce is empty or not printable")
        self._nonce = client_nonce + self._own_nonce
        salt = base64.b64encode(self._verifier.salt)
        self._server_first = b"r=%s,s=%s,i=%d" % (self._nonce, salt, self._verifier.iterations)
        return self._server_first

    def _check_binding_flag(self, plus: bool, flag: bytes) -> None:
        if flag == b"y" and self._binding:
            raise BindingError("the client thinks that the channel cannot be bound, though that was offered")
        if flag in (b"n", b"y"):
            if plus:
                raise ScramError("SCRAM-SHA-256-PLUS without a channel binding")
        elif flag != b"p=tls-server-end-point":
            raise ScramError("an unknown channel binding flag or type")
        elif not plus:
            raise ScramError("a channel binding with a mechanism that has none")

    def final(self, message: bytes) -> tuple[bytes, Keys]:
        """Reads the client-final-message; gives our own, and the client's keys, once its proof is right."""
        without_proof, separator, proof_text = message.rpartition(b",p=")
        attributes = without_proof.split(b",")
        if not separator or len(attributes) < 2:
            raise ScramError("malformed client-final-message")
        if not attributes[0].startswith(b"c=") or not attributes[1].startswith(b"r="):
            raise ScramError("malformed client-final-message")
        binding = self._binding if self._header.startswith(b"p") else b""
        if not hmac.compare_digest(_base64(attributes[0][2:], "the channel binding"), self._header + binding):
            raise BindingError("the channel binding is not that of this connection")
        if not hmac.compare_digest(attributes[1][2:], self._nonce):
            raise ScramError("the nonce is not the one of this exchange")
        proof = _base64(proof_text, "the proof")
        if len(proof) != 32:
            raise ScramError("a proof of the wrong length")
        auth_message = b",".join((self._client_first_bare, self._server_first, without_proof))
        client_key = _xor(proof, _hmac(self._verifier.stored_key, auth_message))
        if not hmac.compare_digest(hashlib.sha256(client_key).digest(), self._verifier.stored_key):
            raise WrongProofError("wrong password")
        signature = _hmac(self._verifier.server_key, auth_message)
        return b"v=" + base64.b64encode(signature), Keys(client_key, self._verifier.server_key)


def _is_printable(nonce: bytes) -> bool:
    return all(0x21 <= char <= 0x7E for char in nonce)
