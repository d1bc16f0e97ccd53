"""What a sans-IO login asks of whoever drives it.

A login is a generator. It yields steps and gets the answers: bytes are to be sent (answer: None); MORE means that the
framer has no whole message (answer: None, once more was fed); a DeriveKey is to be computed where that does not
hold up others (answer: the salted password); a StartTls makes the connection speak TLS, beginning with what the framer
holds (answer: the Encryption); a Perform is a statement of the admin console, which is a login's like in this (answer:
what came of it). It returns what the login found out, and raises a Fault if it fails.
"""

from collections.abc import Generator
from enum import Enum
from typing import Any, Final, Protocol, TypeVar

import msgspec

from pgauthproxy import _wire
from pgauthproxy._tls import Channel
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Encryption


class More(Enum):
    """The one value MORE."""

    MORE = "more"


MORE: Final = More.MORE


class DeriveKey(msgspec.Struct, frozen=True):
    """PBKDF2-HMAC-SHA-256 of a password (RFC 5802's Hi), one block."""

    password: Secret
    salt: bytes
    iterations: int


class TlsSide(Protocol):
    """How one side of connections speaks TLS."""

    def open(self) -> Channel:
        """A new connection's TLS, before its handshake."""

    def describe(self, channel: Channel) -> Encryption:
        """What is known once the handshake is done. Raises TlsError if that is not acceptable."""

    def remember(self, channel: Channel) -> None:
        """Keeps what may make the next handshake shorter."""


class StartTls(msgspec.Struct, frozen=True):
    """From here on TLS is spoken."""

    side: TlsSide


class TlsPlan(msgspec.Struct, frozen=True):
    """How a target is to be spoken to.

    `required`: not without TLS; `verified`: its certificate is checked against an authority; `direct`: TLS from the
    first byte on.
    """

    side: TlsSide
    required: bool
    verified: bool
    direct: bool


class Perform(msgspec.Struct, frozen=True):
    """A statement of the console, as proto.console has it."""

    statement: object


T = TypeVar("T")
Step = bytes | More | DeriveKey | StartTls | Perform
Login = Generator[Step, Any, T]


def next_message(framer: _wire.Framer) -> Login[tuple[int, bytes]]:
    """Waits for one whole message. Raises FrameError as the framer does."""
    while (message := framer.message()) is None:
        yield MORE
    return message
