"""Session rules: how long a session may live, and how long it may keep its target waiting.

Strategy: nothing is set up for each message. A session that a rule concerns has one timer, and when that fires, what
the session is at tells whether a rule is broken, or when to look again.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Self

from pgauthproxy._observe import Observer
from pgauthproxy.errors import ADMIN_SHUTDOWN, IDLE_IN_TRANSACTION_SESSION_TIMEOUT, IDLE_SESSION_TIMEOUT
from pgauthproxy.events import CloseReason
from pgauthproxy.stages import Mapping

LEAST_WAIT: Final = 0.001
"""Clocks of event loops are no finer."""


class Breach(NamedTuple):
    """A rule that was broken: the reason for the log, and what the client is told."""

    reason: CloseReason
    sqlstate: str
    told: bytes


LIVED_TOO_LONG: Final = Breach(
    CloseReason.TIME_LIMIT, ADMIN_SHUTDOWN, b"terminating connection: its time limit is reached"
)
# The words are PostgreSQL's own.
IDLE_TOO_LONG: Final = Breach(
    CloseReason.IDLE, IDLE_SESSION_TIMEOUT, b"terminating connection due to idle-session timeout"
)
IDLE_IN_TRANSACTION_TOO_LONG: Final = Breach(
    CloseReason.IDLE_IN_TRANSACTION,
    IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
    b"terminating connection due to idle-in-transaction timeout",
)


@dataclass(frozen=True, slots=True)
class SessionRules:
    """Times in seconds; 0 for no such rule."""

    max_session_seconds: float = 0.0
    idle_timeout: float = 0.0
    idle_in_transaction_timeout: float = 0.0

    def for_mapping(self, mapping: Mapping) -> "SessionRules":
        """Those of one session: of the two lives the shorter, and of the rest what the mapping says, if it does."""
        rules = self
        if mapping.session_seconds is not None:
            most = self.max_session_seconds or math.inf
            rules = replace(rules, max_session_seconds=min(mapping.session_seconds, most))
        if mapping.idle_timeout is not None:
            rules = replace(rules, idle_timeout=mapping.idle_timeout)
        if mapping.idle_in_transaction_timeout is not None:
            rules = replace(rules, idle_in_transaction_timeout=mapping.idle_in_transaction_timeout)
        return rules

    @property
    def limit_idling(self) -> bool:
        return self.idle_timeout > 0 or self.idle_in_transaction_timeout > 0

    @property
    def limit_anything(self) -> bool:
        return self.max_session_seconds > 0 or self.limit_idling


class Watched(NamedTuple):
    """A session that rules concern: since when, and when its client last had not taken yet what it was sent.

    Times are those of time.monotonic, which is one clock for all processes of a machine.
    """

    rules: SessionRules
    began: float
    last_held: float


class Watch:
    """Looks at one session now and then."""

    def __init__(self, rules: SessionRules, began: float, observer: Observer | None) -> None:
        """`observer` follows both sides of the session if idling is limited."""
        self._rules = rules
        self._began = began
        self._observer = observer
        self._last_held = began

    @classmethod
    def take_up(cls, watched: Watched, observer: Observer | None) -> Self:
        """Goes on where another watch was."""
        self = cls(watched.rules, watched.began, observer)
        self._last_held = watched.last_held
        return self

    @property
    def watched(self) -> Watched:
        """What another watch needs to go on in its place."""
        return Watched(self._rules, self._began, self._last_held)

    def look(self, now: float, *, held: bool) -> Breach | float:
        """The rule that is broken, or how many seconds to wait before looking again.

        `held`: whether the client has not taken yet what it was sent, so that it cannot know that it is its turn.
        """
        rules = self._rules
        waits = []
        if rules.max_session_seconds:
            waits.append(self._began + rules.max_session_seconds - now)
            if waits[0] <= 0:
                return LIVED_TOO_LONG
        if held:
            self._last_held = now
        for in_transaction, seconds, breach in (
            (False, rules.idle_timeout, IDLE_TOO_LONG),
            (True, rules.idle_in_transaction_timeout, IDLE_IN_TRANSACTION_TOO_LONG),
        ):
            if seconds:
                since = self._idle_since(now, in_transaction)
                waits.append(since + seconds - now)
                if waits[-1] <= 0:
                    return breach
        return max(LEAST_WAIT, min(waits))

    def _idle_since(self, now: float, in_transaction: bool) -> float:
        """Since when the session idles in this manner: since `now` at the earliest if it does not."""
        if self._observer is None or self._observer.in_transaction != in_transaction:
            return now
        since = self._observer.idle_since
        return now if since is None else max(since, self._last_held)
