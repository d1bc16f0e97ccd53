"""The question to an authenticator, its answer, and the interface that every kind of authenticator has."""

from typing import Protocol

import msgspec

from pgauthproxy.secret import Secret
from pgauthproxy.stages import Mapping, Started


class Question(msgspec.Struct, frozen=True):
    """May this client in?

    `credential` is what it answered: a password in method `cleartext`, an MD5 of it in `md5`, to a `salt` of 4 bytes
    that is zero in cleartext mode; None where it has not answered yet (`scram-sha-256`) or need not (`cert`).
    """

    started: Started
    method: str
    credential: Secret | None = None
    salt: bytes = b""


class Denied(Exception):
    """A plain "no". `reason` is for the log; `told` is what the client gets instead of the usual words, if not None."""

    def __init__(self, reason: str, told: bytes | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.told = told


class AuthenticatorConfigError(Exception):
    """An authenticator that cannot be used as it is configured; the text is one line for the operator."""


class Authenticator(Protocol):
    """Decides about logins. One instance serves all sessions of a process.

    Made without any effect beyond reading files and importing code, which may raise AuthenticatorConfigError; then
    started, asked any number of times at once, closed.
    """

    async def start(self) -> None:
        """Makes ready to be asked. Raises AuthenticatorConfigError."""

    async def ask(self, question: Question) -> Mapping:
        """Raises Denied for "no", AuthenticatorFault if there is no answer. Cancelling it ends what it started."""

    async def reload(self) -> None:
        """Reads anew what it has read. Raises AuthenticatorConfigError; then everything stays as it was."""

    async def close(self) -> None:
        """Gives back what it holds; nothing is asked any more."""
