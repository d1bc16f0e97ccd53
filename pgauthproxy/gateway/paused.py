"""Clients that are gone while nothing is read from them.

The loop tells of a reset only where it reads. A client whose target takes nothing at the moment is not read, so it is
looked at twice a second; where there is no such client, nothing runs.
"""

import asyncio
from typing import Final

from pgauthproxy._relay import ForwardBuffer

LOOK_SECONDS: Final = 0.5


class PausedClients:
    """Ends the sessions of paused clients that have been reset."""

    def __init__(self, buffer: ForwardBuffer) -> None:
        self._buffer = buffer
        self._timer: asyncio.TimerHandle | None = None
        buffer.when_paused = self._look_later

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        for end in list(self._buffer.paused):
            if end.is_reset:
                end.transport.abort()
        if self._buffer.paused:
            self._look_later()
