"""Cancel requests: keys of our own making towards clients, the target's own towards the target.

PostgreSQL manual, "Message Flow", Canceling Requests in Progress. A request gets no answer, whatever comes of it; its
connection closes once the target has closed ours, since a client takes that for "it was passed on".
"""

import asyncio
import hmac
import secrets
from typing import Final, Protocol

from pgauthproxy.errors import TargetFault
from pgauthproxy.gateway.target_leg import Targets
from pgauthproxy.net import dial
from pgauthproxy.proto.steps import TlsPlan
from pgauthproxy.stages import Address

PROCESS_ID_BYTES: Final = 4
MOST_SLOTS: Final = 256
SLOT_SHIFT: Final = 23
MOST_NUMBER: Final = (1 << SLOT_SHIFT) - 1
"""A process ID is never negative, as PostgreSQL's are: eight bits for the worker that holds the key, and the rest."""
NOBODYS: Final = "nobody's key"
SECRET_BYTES: Final = 4
LONG_SECRET_BYTES: Final = 32
LONG_SECRETS_SINCE: Final = 2
"""The minor version of protocol 3 from which on a secret may be longer than 4 bytes."""


class Cancellable(Protocol):
    """A session, as far as cancelling goes."""

    cancel_key: bytes
    cancelling: bool

    @property
    def id(self) -> str: ...
    @property
    def target_key(self) -> bytes: ...
    @property
    def reached(self) -> Address: ...
    @property
    def reached_tls(self) -> TlsPlan | None: ...


class CancelKeys:
    """The keys that clients of one worker hold; `slot` is its place among the workers."""

    def __init__(self, slot: int = 0) -> None:
        self._slot = slot
        self._sessions: dict[int, Cancellable] = {}

    def issue(self, session: Cancellable, minor: int) -> bytes:
        """A fresh key for a session whose client speaks protocol 3.`minor`.

        4 bytes of process ID and the secret, as long as the client understands.
        """
        size = PROCESS_ID_BYTES + (LONG_SECRET_BYTES if minor >= LONG_SECRETS_SINCE else SECRET_BYTES)
        process_id = 0
        while process_id == 0 or process_id in self._sessions:
            random = secrets.token_bytes(size)
            process_id = self._slot << SLOT_SHIFT | int.from_bytes(random[:PROCESS_ID_BYTES]) & MOST_NUMBER
        self._sessions[process_id] = session
        session.cancel_key = process_id.to_bytes(PROCESS_ID_BYTES) + random[PROCESS_ID_BYTES:]
        return session.cancel_key

    def take_up(self, session: Cancellable) -> None:
        """A session that has its key from another process."""
        self._sessions[int.from_bytes(session.cancel_key[:PROCESS_ID_BYTES])] = session

    def forget(self, key: bytes) -> None:
        self._sessions.pop(int.from_bytes(key[:PROCESS_ID_BYTES]), None)

    def may_be_elsewhere(self, key: bytes) -> bool:
        """Whether a key names another worker."""
        return slot_of(key) != self._slot

    def find(self, key: bytes) -> Cancellable | None:
        """The session that this whole key belongs to."""
        session = self._sessions.get(int.from_bytes(key[:PROCESS_ID_BYTES]))
        if session is None or not hmac.compare_digest(session.cancel_key, key):
            return None
        return session


def slot_of(key: bytes) -> int:
    """Whose a key is, if it is anybody's."""
    return int.from_bytes(key[:PROCESS_ID_BYTES]) >> SLOT_SHIFT


async def forward(session: Cancellable, seconds: float, targets: Targets) -> str:
    """Passes a cancel request on to a session's target, one at a time; returns what came of it, for the log."""
    if not session.target_key:
        return "the target issued no key"
    if session.cancelling:
        return "another request for this session is on its way"
    session.cancelling = True
    try:
        async with asyncio.timeout(seconds):
            await targets.cancel(session.reached, session.reached_tls, session.target_key)
    except (dial.DialError, TargetFault) as error:
        return f"not passed on: {error}"
    except TimeoutError:
        return f"passed on, not confirmed in {seconds:g} s"
    finally:
        session.cancelling = False
    return "passed on"
