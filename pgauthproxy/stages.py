"""What is known of a session at each stage of its login. Each stage takes the value of the one before.

Accepted → Started → Granted → Attached: an AuthenticationOk is made from an Attached alone, which is made from a
Granted alone, so that no client is let in without a grant and a target that let the gateway in.
"""

import msgspec

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


class Started(msgspec.Struct, frozen=True):
    """The client has said who it is and what it wants; nothing of it is proved."""

    accepted: Accepted
    parameters: Parameters

    @property
    def user(self) -> bytes:
        return parameter(self.parameters, b"user")

    @property
    def database(self) -> bytes:
        return parameter(self.parameters, b"database") or self.user


class Address(msgspec.Struct, frozen=True):
    """One place where a target may listen: a host name or IP address and port, or a socket folder and port."""

    host: str
    port: int

    @property
    def is_socket_folder(self) -> bool:
        return self.host.startswith("/")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Mapping(msgspec.Struct, frozen=True):
    """What an authenticator answers: where the session goes, as whom, with which credential.

    `hosts` are tried in order. `credential` is a password, or `md5` and 32 hex digits when `credential_is_md5`.
    `session_seconds` bounds the session's life, None for no bound.
    """

    hosts: tuple[Address, ...]
    parameters: Parameters
    credential: Secret | None
    credential_is_md5: bool = False
    session_seconds: float | None = None

    @property
    def user(self) -> bytes:
        return parameter(self.parameters, b"user")

    @property
    def database(self) -> bytes:
        return parameter(self.parameters, b"database") or self.user


class Granted(msgspec.Struct, frozen=True):
    """The authenticator has agreed."""

    started: Started
    mapping: Mapping
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
    """The target has let the gateway in. `reached` is where cancel requests go too."""

    granted: Granted
    reached: Address
    greeting: Greeting
    connect_seconds: float
    login_seconds: float
