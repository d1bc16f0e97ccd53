"""So many logins at once, where an authenticator has no way of its own to have the others wait."""

import asyncio

from pgauthproxy.auth.model import Load


class Turns:
    """Within `async with` are at most `count`; the others wait in the order in which they came."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._places = asyncio.Semaphore(count)
        self._asking = 0

    async def __aenter__(self) -> None:
        self._asking += 1
        try:
            await self._places.acquire()
        except BaseException:
            self._asking -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._places.release()
        self._asking -= 1

    def load(self, kind: str) -> Load:
        """Of an authenticator of this kind, whose logins all come here."""
        running = min(self._asking, self._count)
        return Load(kind, running, self._asking - running)
