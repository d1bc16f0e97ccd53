"""Credentials on loan whose sessions have moved to another process.

A lease hangs from the token that it was made with, which only the process that has made it keeps alive. So that process
goes on renewing it, and gives it back once the session is over, or the process that has the session is gone. It lives
for as long as it keeps any.
"""

import asyncio
from collections.abc import Awaitable, Callable

from pgauthproxy.stages import Lease


class KeptLeases:
    """Those of sessions that one process, or more, have taken over from this one."""

    def __init__(self, give_back: Callable[[Lease], object]) -> None:
        self._give_back = give_back
        self._kept: dict[int, Lease] = {}
        self._changed = asyncio.Event()

    def keep(self, session: int, lease: Lease, tell_ended: Callable[[], object]) -> None:
        """Of this session; `tell_ended` is called if the lease ends before the session does."""
        self._kept[session] = lease
        lease.watch(tell_ended)

    def over(self, session: int) -> None:
        """The session is; nothing happens if no lease of it is kept."""
        lease = self._kept.pop(session, None)
        if lease is not None:
            self._give_back(lease)
            self._changed.set()

    def over_all(self) -> None:
        """Whoever has the sessions is gone."""
        for session in list(self._kept):
            self.over(session)

    async def until_none(self) -> None:
        """Waits until none is kept any more."""
        while self._kept:
            self._changed.clear()
            await self._changed.wait()


class LeaseElsewhere:
    """The lease of a session that has come from another process, which keeps it. A Lease itself."""

    def __init__(self, tell_over: Callable[[], Awaitable[object]]) -> None:
        """`tell_over` tells that process that the session is over."""
        self._tell_over = tell_over
        self._lost: Callable[[], object] | None = None
        self._has_ended = False

    def watch(self, lost: Callable[[], object]) -> None:
        if self._has_ended:
            lost()
        else:
            self._lost = lost

    async def release(self) -> None:
        await self._tell_over()

    def end(self) -> None:
        """The other process says so."""
        self._has_ended = True
        if self._lost is not None:
            self._lost()
