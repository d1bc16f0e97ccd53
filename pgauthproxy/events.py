"""What happened to a session, told to the outside through the one sink that the core is given."""

from collections.abc import Callable
from enum import StrEnum

import msgspec

from pgauthproxy.errors import Fault
from pgauthproxy.stages import Accepted, Attached, Started


class CloseReason(StrEnum):
    """Why a session that was let in has ended."""

    CLIENT_CLOSED = "client closed"
    CLIENT_LOST = "client connection lost"
    TARGET_CLOSED = "target closed"
    TARGET_LOST = "target connection lost"
    TIME_LIMIT = "time limit reached"
    SHUTDOWN = "gateway shut down"
    HANDED_OVER = "handed over"


class LoggedIn(msgspec.Struct, frozen=True):
    """A client was let in."""

    attached: Attached
    total_seconds: float


class Refused(msgspec.Struct, frozen=True):
    """A connection ended before it was a session; `started` is None if it never said who it was."""

    accepted: Accepted
    started: Started | None
    fault: Fault


class Ended(msgspec.Struct, frozen=True):
    """A session is over."""

    session: str
    reason: CloseReason
    detail: str
    bytes_from_client: int
    bytes_from_target: int
    seconds: float


class Cancelled(msgspec.Struct, frozen=True):
    """A cancel request: `session` is the one that it was for, empty if its key is nobody's."""

    address: str
    session: str
    outcome: str


class AuthenticatorSaid(msgspec.Struct, frozen=True):
    """What an authenticator wrote to its standard error: its lines, and how many bytes were dropped."""

    session: str
    lines: tuple[str, ...]
    dropped: int


class Noticed(msgspec.Struct, frozen=True):
    """Something about the gateway itself that an operator should know."""

    level: str
    what: str
    facts: tuple[tuple[str, object], ...] = ()


Event = LoggedIn | Refused | Ended | Cancelled | AuthenticatorSaid | Noticed
Sink = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """A sink for where nobody is to be told."""
