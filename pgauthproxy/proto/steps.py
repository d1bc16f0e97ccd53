"""What a sans-IO login asks of whoever drives it.

A login is a generator. It yields steps and gets the answers: bytes are to be sent (answer: None); MORE means that the
framer has no whole message (answer: None, once more was fed); a DeriveKey is to be computed where that does not
hold up others (answer: the salted password). It returns what the login found out, and raises a Fault if it fails.
"""

from collections.abc import Generator
from enum import Enum
from typing import Final, TypeVar

import msgspec

from pgauthproxy import _wire
from pgauthproxy.secret import Secret


class More(Enum):
    """The one value MORE."""

    MORE = "more"


MORE: Final = More.MORE


class DeriveKey(msgspec.Struct, frozen=True):
    """PBKDF2-HMAC-SHA-256 of a password (RFC 5802's Hi), one block."""

    password: Secret
    salt: bytes
    iterations: int


T = TypeVar("T")
Step = bytes | More | DeriveKey
Login = Generator[Step, bytes | None, T]


def next_message(framer: _wire.Framer) -> Login[tuple[int, bytes]]:
    """Waits for one whole message. Raises FrameError as the framer does."""
    while (message := framer.message()) is None:
        yield MORE
    return message
