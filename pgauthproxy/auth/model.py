"""The question to an authenticator, its answer, and the interface that every kind of authenticator has."""

from typing import Protocol

import msgspec

from pgauthproxy.secret import Secret
from pgauthproxy.stages import Mapping, Started


class Question(msgspec.Struct, frozen=True):
    """May this client in? `method` is `md5` or `cleartext`; `salt` is 4 bytes, zero in cleartext mode."""

    started: Started
    method: str
    credential: Secret
    salt: bytes


class Denied(Exception):
    """A plain "no". `reason` is for the log; `told` is what the client gets instead of the usual words, if not None."""

    def __init__(self, reason: str, told: bytes | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.told = told


class Authenticator(Protocol):
    """Decides about logins. One instance serves all sessions."""

    async def ask(self, question: Question) -> Mapping:
        """Raises Denied for "no", AuthenticatorFault if there is no answer. Cancelling it ends what it started."""

    def close(self) -> None:
        """Gives back what it holds; nothing is asked any more."""
