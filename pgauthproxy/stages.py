"""What is known of a session at each stage of its login. Each stage takes the value of the one before.

Accepted → Started → Granted → Attached: an AuthenticationOk is made from an Attached alone, which is made from a
Granted alone, so that no client is let in without a grant and a target that let the gateway in.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec
from msgspec.structs import force_setattr

from pgauthproxy.secret import Secret

Parameters = tuple[tuple[bytes, bytes], ...]
"""Startup parameters, in the order in which they were sent, as bytes: their encoding is not ours to guess."""


def parameter(parameters: Parameters, name: bytes) -> bytes:
    """The value of one startup parameter, empty if it is missing."""
    for key, value in parameters:
        if key == name:
            return value
    return b""


class Accepted(msgspec.Struct, frozen=True):
    """A client has connected. `address` is `ip:port`, `[v6]:port` or `[local]`."""

    session: str
    address: str


class Certificate(msgspec.Struct, frozen=True):
    """A verified certificate. Names are in the form of RFC 4514, `alternative_names` as `DNS:…,IP:…`."""

    subject: str
    issuer: str
    serial: str
    alternative_names: str
    fingerprint: str
    """SHA-256 of the certificate, in lower-case hex digits."""


class Encryption(msgspec.Struct, frozen=True):
    """What TLS a connection speaks, and what is known by it.

    `binding` is the hash of the server's certificate that RFC 5929 calls tls-server-end-point, empty if there is none.
    """

    version: str
    cipher: str
    server_name: str
    application_protocol: str
    binding: bytes
    certificate: Certificate | None


class Started(msgspec.Struct, frozen=True):
    """The client has said who it is and what it wants; nothing of it is proved, but by a certificate.

    `user` and `database` are what the parameters say, which a login asks for a dozen times.
    """

    accepted: Accepted
    parameters: Parameters
    encryption: Encryption | None = None
    user: bytes = b""
    database: bytes = b""

    def __post_init__(self) -> None:
        _name(self)


class Address(msgspec.Struct, frozen=True):
    """One place where a target may listen: a host name or IP address and port, or a socket folder and port."""

    host: str
    port: int

    @property
    def is_socket_folder(self) -> bool:
        return self.host.startswith("/")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Password(msgspec.Struct, frozen=True):
    """A credential that can answer whatever a target asks for."""

    secret: Secret


class StoredMd5(msgspec.Struct, frozen=True):
    """A credential as pg_authid may hold it: `md5` and 32 hex digits. It can answer an MD5 request alone."""

    secret: Secret


class FromClient(msgspec.Struct, frozen=True):
    """No credential of the authenticator's: what the client itself proves is to be used."""


class Lease(Protocol):
    """What a session has been lent. Whoever has it gives it back exactly once."""

    def watch(self, lost: Callable[[], object]) -> None:
        """Calls `lost`, once, if the lease ends before it is given back; at once if it has ended."""

    async def release(self) -> None:
        """Gives it back. Never fails: what cannot be given back ends by itself."""


class Lender(Protocol):
    """Where credentials come from that are made for one session."""

    async def lend(self, mapping: "Mapping", path: str) -> "Mapping":
        """The mapping with the credential of this path, and with the lease of it. Raises AuthenticatorFault.

        Cancelling it gives back what was lent meanwhile.
        """


class Leased(msgspec.Struct, frozen=True):
    """A credential that is made for this session, once the client has proved who it is. None: nobody lends here."""

    path: str
    lender: Lender | None = None


class ProvedKeys(msgspec.Struct, frozen=True):
    """What a client's SCRAM exchange has shown: it answers targets that store the very verifier that it was held to."""

    client_key: Secret
    server_key: Secret
    salt: bytes
    iterations: int


class TargetTls(msgspec.Struct, frozen=True):
    """How TLS is spoken with a target; words and meanings are libpq's (sslmode, sslrootcert and so on).

    `ca`, `cert` and `key` are files; `ca` may be `system`. `name` is what the certificate must be for, if not the host.
    """

    mode: str = "prefer"
    ca: str = ""
    cert: str = ""
    key: str = ""
    negotiation: str = "postgres"
    name: str = ""


class Mapping(msgspec.Struct, frozen=True):
    """What an authenticator answers: where the session goes, as whom, with which credential.

    `hosts` are tried in order. `verifier` is what the client must prove to know, in the form of pg_authid, if the
    gateway is to compare. `tls` holds those fields of a TargetTls that are not to be as the configuration has them.
    `session_seconds` bounds the session's life, None for no bound. `idle_timeout` and `idle_in_transaction_timeout`
    bound how long it may idle, zero for no bound, None for what the configuration says. `warm` is how many connections
    to the target should stand open before they are needed, None for what the configuration says. `cache_seconds` is how
    long the same answer holds for the same question, None for not at all, and zero empties the cache. `lease` is what
    the credential was lent with. `user` and `database` are what the parameters say.
    """

    hosts: tuple[Address, ...]
    parameters: Parameters
    credential: Password | StoredMd5 | FromClient | Leased | None
    verifier: Secret | None = None
    tls: tuple[tuple[str, str], ...] = ()
    session_seconds: float | None = None
    idle_timeout: float | None = None
    idle_in_transaction_timeout: float | None = None
    warm: int | None = None
    cache_seconds: float | None = None
    lease: Lease | None = None
    user: bytes = b""
    database: bytes = b""

    def __post_init__(self) -> None:
        _name(self)


def _name(stage: Started | Mapping) -> None:
    """Takes the user and the database, which is the user's own if none is named, from the parameters."""
    user = parameter(stage.parameters, b"user")
    force_setattr(stage, "user", user)
    force_setattr(stage, "database", parameter(stage.parameters, b"database") or user)


class Granted(msgspec.Struct, frozen=True):
    """The authenticator has agreed, and the client has proved what it had to."""

    started: Started
    mapping: Mapping
    credential: Password | StoredMd5 | ProvedKeys | None
    authenticator_seconds: float


class Greeting(msgspec.Struct, frozen=True):
    """What a target sent between AuthenticationOk and its first ReadyForQuery, that included.

    `before_key` and `after_key` are the messages around BackendKeyData, unchanged; `key` is its body, empty if
    none came.
    """

    before_key: bytes
    key: bytes
    after_key: bytes


class Attached(msgspec.Struct, frozen=True):
    """The target has let the gateway in. `reached` is where cancel requests go too, with TLS as `tls` has it."""

    granted: Granted
    reached: Address
    encryption: Encryption | None
    greeting: Greeting
    connect_seconds: float
    login_seconds: float
