"""A leg: one side of a session while it logs in. It pumps a sans-IO login over a transport.

States, in order: connected, at end of file (`at_eof`), lost. `gone` says that nothing can come any more and nothing
is left to be read.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar, cast

from pgauthproxy import _wire
from pgauthproxy.errors import Fault
from pgauthproxy.proto.steps import DeriveKey, Login, More

T = TypeVar("T")
MAX_PENDING: Final = 128 * 1024
"""Bytes that may wait to be read; above, the transport's reading is paused."""

Derive = Callable[[DeriveKey], Awaitable[bytes]]


class Leg(asyncio.Protocol):
    """A protocol that collects what it receives until a login asks for it."""

    def __init__(self) -> None:
        self.framer = _wire.Framer({})
        self.transport: asyncio.Transport
        self.at_eof = False
        self.error: Exception | None = None
        self._lost = False
        self._waiting: asyncio.Future[None] | None = None
        self._watcher: Callable[[], object] | None = None

    @property
    def gone(self) -> bool:
        return self._lost or (self.at_eof and not self.framer.pending)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface without the class.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.framer.feed(data)
        if self.framer.pending > MAX_PENDING:
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self.at_eof = True
        self._wake()
        # Kept open: the answer to what the peer has sent may still be owed.
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self.error = error
        self._wake()

    def watch(self, watcher: Callable[[], object] | None) -> None:
        """Calls `watcher` once the peer is gone, at once if it is; None ends that."""
        self._watcher = watcher
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        if self._watcher is not None and self.gone:
            watcher, self._watcher = self._watcher, None
            watcher()

    async def drive(self, login: Login[T], derive: Derive | None = None) -> T:
        """Runs a login to its end. Raises its Fault, and `gone_fault` when the peer leaves in the middle."""
        answer: bytes | None = None
        try:
            while True:
                step = login.send(answer)
                answer = None
                if isinstance(step, bytes):
                    self.transport.write(step)
                elif isinstance(step, More):
                    await self._more()
                else:
                    assert derive is not None  # noqa: S101 (client logins derive nothing)
                    answer = await derive(step)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _more(self) -> None:
        """Waits until something was received. Raises `gone_fault` if nothing will be."""
        if self._lost or self.at_eof:
            raise self.gone_fault()
        self.transport.resume_reading()
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None
        if self._lost:
            raise self.gone_fault()

    def gone_fault(self) -> Fault:
        """What it means that this peer left during its login."""
        raise NotImplementedError

    def hand_over(self) -> tuple[asyncio.Transport, bytes, bool]:
        """Ends the leg: the transport (its reading paused), what nobody has read, and whether it is at its end.

        Raises `gone_fault` if the transport is lost.
        """
        if self._lost:
            raise self.gone_fault()
        self._watcher = None
        self.transport.pause_reading()
        return self.transport, self.framer.take_rest(), self.at_eof

    def abort(self) -> None:
        """Drops the connection without a word."""
        self._watcher = None
        if not self._lost:
            self.transport.abort()
