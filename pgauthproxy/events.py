"""What happened to a session, told to the outside through the one sink that the core is given."""

from collections.abc import Callable
from enum import StrEnum

import msgspec

from pgauthproxy.errors import Fault
from pgauthproxy.stages import Accepted, Address, Attached, Started


class CloseReason(StrEnum):
    """Why a session that was let in has ended."""

    CLIENT_CLOSED = "client closed"
    CLIENT_LOST = "client connection lost"
    TARGET_CLOSED = "target closed"
    TARGET_LOST = "target connection lost"
    LEASE_ENDED = "lease of the credential ended"
    TIME_LIMIT = "time limit reached"
    IDLE = "idle timeout reached"
    IDLE_IN_TRANSACTION = "idle-in-transaction timeout reached"
    SHUTDOWN = "gateway shut down"
    KILLED = "ended by an administrator"
    HANDED_OVER = "handed over"


class LoggedIn(msgspec.Struct, frozen=True):
    """A client is let in: it is told next."""

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


class Reloading(msgspec.Struct, frozen=True):
    """A reload was asked for: whoever keeps files open opens them anew."""


class Reloaded(msgspec.Struct, frozen=True):
    """Something was read anew; with faults the old one stays."""

    what: str
    faults: tuple[str, ...] = ()


class TargetFailed(msgspec.Struct, frozen=True):
    """An attempt at a target came to nothing. `answered`: it was reached, and said no."""

    target: Address
    answered: bool
    detail: str


class AdminLoggedIn(msgspec.Struct, frozen=True):
    """Somebody was let in at the admin console."""

    session: str
    address: str
    user: bytes
    may_act: bool


class AdminActed(msgspec.Struct, frozen=True):
    """An administrator has done something: by what session (empty: by HTTP), what, and what came of it."""

    session: str
    address: str
    user: bytes
    act: str
    outcome: str


class AdminLeft(msgspec.Struct, frozen=True):
    """A session of the admin console is over."""

    session: str
    detail: str
    seconds: float


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


AdminEvent = AdminLoggedIn | AdminActed | AdminLeft
Event = (
    LoggedIn
    | Refused
    | Ended
    | Cancelled
    | TargetFailed
    | AdminEvent
    | Reloading
    | Reloaded
    | AuthenticatorSaid
    | Noticed
)
Sink = Callable[[Event], None]
"""It may refuse a login by raising GatewayFault for its LoggedIn, and never raises anything else."""


def to_all(*sinks: Sink) -> Sink:
    """One sink for several, in this order; what one refuses the next is not told."""

    def tell(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return tell


def ignore(_event: Event) -> None:
    """A sink for where nobody is to be told."""
