"""What could not be written now is tried again a little later, once, however many ask for that."""

import asyncio
from collections.abc import Callable
from typing import Final

RETRY_SECONDS: Final = 0.2


class Later:
    """Calls `act` once RETRY_SECONDS after it was first asked to; only then it may be asked anew."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_planned(self) -> bool:
        return self._timer is not None

    def plan(self) -> None:
        """Does nothing before or after the loop's life: whatever is written next tries again then."""
        if self._timer is not None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        self._timer = loop.call_later(RETRY_SECONDS, self._call)

    def _call(self) -> None:
        self._timer = None
        self._act()
