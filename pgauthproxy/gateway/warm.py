"""Connections to targets that stand open before anyone needs them.

A PostgreSQL has forked its process for such a connection, and TLS is done: a login there takes a third less time.
Nothing that belongs to a user has been sent on it, and it serves one login, whoever's is next. It takes none of the
server's max_connections until then. The server closes it when its authentication_timeout is over; we do before that.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final, Generic, TypeVar

from pgauthproxy.errors import Fault
from pgauthproxy.gateway.leg import Leg
from pgauthproxy.net.dial import DialError
from pgauthproxy.proto.steps import TlsPlan
from pgauthproxy.stages import Address

RENEW_SECONDS: Final = 45.0
"""The longest that one stands open; a server's authentication_timeout is 60 s."""
UNUSED_SECONDS: Final = 60.0
"""How long after its last login a target is kept warm."""

Place = tuple[Address, TlsPlan | None]
L = TypeVar("L", bound=Leg)


class WarmTargets(Generic[L]):
    """The open connections of a gateway, by where they lead and what TLS they speak. `open_leg` makes one."""

    def __init__(self, open_leg: Callable[[Address, TlsPlan | None], Awaitable[L]]) -> None:
        self._open_leg = open_leg
        self._pools: dict[Place, _Pool[L]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def standing(self) -> int:
        """How many stand open."""
        return sum(len(pool.legs) for pool in self._pools.values())

    def take(self, address: Address, plan: TlsPlan | None, wanted: int) -> L | None:
        """One that is ready, if there is one. From then on `wanted` are kept there, until nobody asks any more."""
        place = address, plan
        pool = self._pools.get(place)
        if pool is None:
            if not wanted:
                return None
            pool = self._pools[place] = _Pool()
        loop = asyncio.get_running_loop()
        pool.wanted = wanted
        pool.used = loop.time()
        if pool.timer is None:
            pool.timer = loop.call_later(UNUSED_SECONDS, self._look_at, place)
        leg = pool.take()
        self._fill(place, pool)
        return leg

    def close(self) -> None:
        """Drops them all."""
        for task in self._tasks:
            task.cancel()
        for place in list(self._pools):
            self._drop(place)

    def _fill(self, place: Place, pool: "_Pool[L]") -> None:
        while len(pool.legs) + pool.opening < pool.wanted:
            pool.opening += 1
            self._spawn(self._add(place, pool))

    async def _add(self, place: Place, pool: "_Pool[L]") -> None:
        try:
            leg = await self._open_leg(*place)
        except (DialError, Fault):
            # The next login finds out by itself, and tells.
            return
        finally:
            pool.opening -= 1
        if self._pools.get(place) is not pool:
            leg.abort()
            return
        pool.legs.append(leg)
        leg.watch(lambda: pool.legs.remove(leg))
        asyncio.get_running_loop().call_later(RENEW_SECONDS, self._renew, place, pool, leg)

    def _renew(self, place: Place, pool: "_Pool[L]", leg: L) -> None:
        """Drops one that has stood for long, and opens another."""
        if leg in pool.legs:
            pool.legs.remove(leg)
            leg.abort()
            self._fill(place, pool)

    def _look_at(self, place: Place) -> None:
        """Gives up a target that nobody was sent to for a while."""
        pool = self._pools[place]
        loop = asyncio.get_running_loop()
        left = pool.used + UNUSED_SECONDS - loop.time()
        if left > 0:
            pool.timer = loop.call_later(left, self._look_at, place)
        else:
            self._drop(place)

    def _drop(self, place: Place) -> None:
        pool = self._pools.pop(place)
        if pool.timer is not None:
            pool.timer.cancel()
        for leg in pool.legs:
            leg.abort()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Pool(Generic[L]):
    """What stands open at one place, the oldest first."""

    __slots__ = ("legs", "opening", "timer", "used", "wanted")

    def __init__(self) -> None:
        self.legs: deque[L] = deque()
        self.opening = 0
        self.wanted = 0
        self.used = 0.0
        self.timer: asyncio.TimerHandle | None = None

    def take(self) -> L | None:
        """The oldest that is of use. One that has said anything without being asked is of none."""
        while self.legs:
            leg = self.legs.popleft()
            leg.watch(None)
            if not leg.gone and not leg.framer.pending:
                leg.heard = False
                return leg
            leg.abort()
        return None
