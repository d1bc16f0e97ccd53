"""The question to an authenticator, its answer, and the interface that every kind of authenticator has."""

from typing import Protocol, runtime_checkable

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
    """A plain "no". `reason` is for the log; `told` is what the client gets instead of the usual words, if not None.

    `verifier` is what the client is held to before it is told, and fails, whatever it answers: that of a user who may
    not in, or one that is made up to look like others', so that neither bytes nor time tell who exists. Without it
    nothing is compared where the client has answered already, and where it has not the gateway makes one up.
    """

    def __init__(self, reason: str, told: bytes | None = None, verifier: Secret | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.told = told
        self.verifier = verifier


class UnknownUser(Denied):
    """There is nobody of that name; a `verifier` is made up."""


class AuthenticatorConfigError(Exception):
    """An authenticator that cannot be used as it is configured; `faults` says why, one line each for the operator."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Authenticator(Protocol):
    """Decides about logins. One instance serves all sessions of a process.

    Made without any effect beyond reading files and importing code, which may raise AuthenticatorConfigError; then
    started, asked any number of times at once, reloaded now and then, closed.
    """

    async def start(self) -> None:
        """Makes ready to be asked. Raises AuthenticatorConfigError."""

    async def ask(self, question: Question) -> Mapping:
        """Raises Denied for "no", AuthenticatorFault if there is no answer. Cancelling it ends what it started."""

    async def reload(self) -> None:
        """Reads anew what it has read. Raises AuthenticatorConfigError; then everything stays as it was."""

    async def close(self) -> None:
        """Gives back what it holds; nothing is asked any more."""


class Load(msgspec.Struct, frozen=True):
    """How busy an authenticator of one kind is: questions it answers now, questions that wait, processes that stand."""

    kind: str
    running: int = 0
    queued: int = 0
    processes: int = 0


@runtime_checkable
class Busy(Protocol):
    """An authenticator that says how busy it is, as all do that settings can name."""

    def load(self) -> list[Load]:
        """Its own, or those of the authenticators that it stands round."""


def load_of(authenticator: Authenticator) -> list[Load]:
    """Empty for one that does not say."""
    return authenticator.load() if isinstance(authenticator, Busy) else []
