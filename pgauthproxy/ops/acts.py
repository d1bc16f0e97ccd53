"""What an operator can do to a running gateway: plain values, so that they can be sent to the process they concern."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from pgauthproxy.errors import ADMIN_SHUTDOWN, GatewayFault
from pgauthproxy.events import CloseReason
from pgauthproxy.gateway.session import Gateway, Session

KILLED: Final = "terminating connection due to administrator command"


class Kill(msgspec.Struct, frozen=True, tag=True):
    """Ends one session, or one login."""

    session: str


class KillUser(msgspec.Struct, frozen=True, tag=True):
    """Ends all sessions and logins of a user, by the name that clients log in with."""

    user: bytes


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Has new logins wait, for as long as their login deadline lets them."""


class Resume(msgspec.Struct, frozen=True, tag=True):
    """Lets them go on."""


class Reload(msgspec.Struct, frozen=True, tag=True):
    """As SIGHUP."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """As SIGTERM."""


ActOnSessions = Kill | KillUser | Pause | Resume
Act = ActOnSessions | Reload | Shutdown
PerformAct = Callable[[Act], Awaitable[int]]
"""Does it to the whole gateway; says how many sessions it concerned. Raises UnansweredError."""


class UnansweredError(Exception):
    """Another process of the gateway was asked, and has not answered; the text says why."""


def in_words(act: Act) -> str:
    """An act, for the log."""
    match act:
        case Kill(session=session):
            return f"KILL {session}"
        case KillUser(user=user):
            return f"KILL USER {user.decode(errors='backslashreplace')}"
    return type(act).__name__.upper()


def signal_itself(act: Reload | Shutdown) -> None:
    """Does it to the process that hears the gateway's signals, which must be this one."""
    os.kill(os.getpid(), signal.SIGHUP if isinstance(act, Reload) else signal.SIGTERM)


def act_on(gateway: Gateway, act: ActOnSessions) -> int:
    """Does it to the sessions of one process; says how many it concerned."""
    match act:
        case Kill(session=name):
            return _kill([session for session in gateway.sessions if session.id == name])
        case KillUser(user=user):
            return _kill([session for session in gateway.sessions if _user_of(session) == user])
        case Pause():
            if gateway.held is None:
                gateway.held = asyncio.Event()
        case Resume():
            if gateway.held is not None:
                gateway.held.set()
                gateway.held = None
    return 0


def _kill(sessions: list[Session]) -> int:
    for session in sessions:
        session.refuse_login(GatewayFault(ADMIN_SHUTDOWN, KILLED, "killed by an administrator"))
        session.end(CloseReason.KILLED, KILLED.encode())
    return len(sessions)


def _user_of(session: Session) -> bytes | None:
    if session.identity is not None:
        return session.identity.user
    return session.started.user if session.started is not None else None
