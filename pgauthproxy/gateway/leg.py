"""A leg: one side of a session while it logs in. It pumps a sans-IO login over a transport.

States, in order: connected, at end of file (`at_eof`), lost. `gone` says that nothing can come any more and nothing
is left to be read.
"""

import abc
import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from pgauthproxy import _relay, _wire
from pgauthproxy._tls import Channel
from pgauthproxy.errors import CONNECTION_FAILURE, Fault, GatewayFault, TlsError
from pgauthproxy.proto.steps import MORE, Login, StartTls
from pgauthproxy.stages import Encryption

T = TypeVar("T")
MAX_PENDING: Final = 128 * 1024
"""Bytes that may wait to be read; above, the transport's reading is paused."""

LONG_STEP: Final = 8 * 1024
"""Bytes to send in one step above which others have their turn before the next: it is part of a long answer."""

Derive = Callable[[Any], Awaitable[object]]
"""Answers the steps that need more than a transport: DeriveKey, Perform."""


class Leg(asyncio.BufferedProtocol, abc.ABC):
    """A protocol that collects what it receives until a login asks for it.

    It owns a connected, non-blocking socket, which becomes the loop's when there is first something to wait for: what
    a login has to say before that is on its way by then. It reads into the same buffer as the ends that forward later,
    so that handing over changes nothing but the protocol. `heard`: whether anything was received since it was set back.
    """

    # The loop looks for it, and not finding it is an exception each time.
    data_received = None

    def __init__(self, connection: socket.socket, buffer: _relay.ForwardBuffer) -> None:
        self.framer = _wire.Framer({})
        self.fd = connection.fileno()
        self.tls: Channel | None = None
        self.at_eof = False
        self.error: Exception | None = None
        self.shaking_hands = False
        self.heard = False
        self._connection = connection
        self._transport: asyncio.Transport | None = None
        self._unsent = b""
        self._buffer = buffer
        self._lost = False
        self._waiting: asyncio.Future[None] | None = None
        self._full: asyncio.Future[None] | None = None
        """Done once the peer has read what is on its way to it; None while there is little."""
        self._watcher: Callable[[], object] | None = None

    @property
    def gone(self) -> bool:
        return self._lost or (self.at_eof and not self.framer.pending)

    @property
    def is_full(self) -> bool:
        """Whether the peer does not read what it is sent."""
        return self._full is not None

    def send(self, data: bytes) -> None:
        if self.tls is not None:
            data = self.tls.encrypt(data)
        self._send(data)

    def _send(self, data: bytes) -> None:
        if self._transport is not None:
            # It may have been lost while a thread was at work.
            if not self._transport.is_closing():
                self._transport.write(data)
            return
        sent = 0
        if not self._unsent:
            try:
                sent = self._connection.send(data)
            except OSError:
                # What the socket does not take, or why it takes nothing, is the transport's to find out.
                sent = 0
        self._unsent += data[sent:]

    async def open(self) -> asyncio.Transport:
        """The transport, made at the first call."""
        if self._transport is None:
            try:
                await asyncio.get_running_loop().connect_accepted_socket(lambda: self, self._connection)
            except BaseException:
                # The loop has closed the transport and will say no more: without this it and we would keep each other.
                self._transport = None
                raise
            assert self._transport is not None  # noqa: S101 (connection_made was called)
            if self._unsent:
                self._transport.write(self._unsent)
                self._unsent = b""
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's have the interface without the class

    def get_buffer(self, size_hint: int) -> bytearray:
        return self._buffer.space

    def buffer_updated(self, count: int) -> None:
        self.heard = True
        data = memoryview(self._buffer.space)[:count]
        if self.tls is None:
            self.framer.feed(data)
        elif not self._decrypt(self.tls, data):
            return
        if self.framer.pending > MAX_PENDING and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def _decrypt(self, tls: Channel, data: bytes | memoryview) -> bool:
        """Feeds what the records say. False if the connection is of no use any more."""
        try:
            self.framer.feed(tls.decrypt(data))
            output = tls.take_output()
            if output and self._transport is not None and self._transport.get_write_buffer_size() > MAX_PENDING:
                raise TlsError("the peer makes TLS talk and does not listen", b"")
        except TlsError as error:
            self.error = error
            self._lost = True
            self._send(error.alert)
            self.abort()
            return False
        if output:
            self._send(output)
        if tls.finished:
            self.at_eof = True
        return True

    def eof_received(self) -> bool:
        self.at_eof = True
        self._wake()
        # Kept open: the answer to what the peer has sent may still be owed.
        return True

    def pause_writing(self) -> None:
        self._full = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._full is not None and not self._full.done():
            self._full.set_result(None)
        self._full = None

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self.resume_writing()
        self.error = self.error or error
        self._wake()

    def watch(self, watcher: Callable[[], object] | None) -> None:
        """Calls `watcher` once the peer is gone, at once if it is; None ends that."""
        self._watcher = watcher
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
        if self._watcher is not None and self.gone:
            watcher, self._watcher = self._watcher, None
            watcher()

    async def drive(self, login: Login[T], derive: Derive | None = None) -> T:
        """Runs a login to its end. Raises its Fault, and `gone_fault` when the peer leaves in the middle."""
        answer: object = None
        try:
            while True:
                step = login.send(answer)
                answer = None
                if step is MORE:
                    await self._more()
                elif isinstance(step, bytes):
                    self.send(step)
                    if self._full is not None:
                        await self._full
                    elif len(step) > LONG_STEP:
                        await asyncio.sleep(0)
                elif isinstance(step, StartTls):
                    answer = await self._start_tls(step)
                else:
                    assert derive is not None  # noqa: S101 (who drives a login knows what it needs)
                    answer = await derive(step)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _start_tls(self, step: StartTls) -> Encryption:
        """The handshake. What costs milliseconds of it runs in a thread, and nothing is read meanwhile."""
        self.shaking_hands = True
        try:
            tls = step.side.open()
            output = tls.handshake(b"") if not self.framer.pending else b""
            while not tls.established:
                if output:
                    self._send(output)
                if not self.framer.pending:
                    await self._more()
                data = self.framer.take_rest()
                output = tls.handshake(data) if tls.past_the_costly else await asyncio.to_thread(tls.handshake, data)
            self._send(output)
            encryption = step.side.describe(tls)
        except TlsError as error:
            self._send(error.alert)
            raise self.tls_fault(error) from None
        self.shaking_hands = False
        self.tls = tls
        if not self._decrypt(tls, self.framer.take_rest()):
            raise self.gone_fault()
        return encryption

    async def _more(self) -> None:
        """Waits until something was received. Raises `gone_fault` if nothing will be."""
        if self._lost or self.at_eof:
            raise self.gone_fault()
        if self._transport is None:
            # Something may be here before we are told that the transport stands: then there is nothing to wait for.
            await self.open()
            if self.framer.pending or self.at_eof:
                return
        else:
            self._transport.resume_reading()
        await self._heard()
        if self._lost:
            raise self.gone_fault()

    async def until_gone(self) -> None:
        """Waits until the peer has closed its side. What it says until then is dropped."""
        await self.open()
        while not self._lost and not self.at_eof:
            await self._heard()
            self.framer.take_rest()

    def _heard(self) -> asyncio.Future[None]:
        """Done once there is anything new from the peer, be it that it is gone. One at a time waits for it."""
        self._waiting = asyncio.get_running_loop().create_future()
        return self._waiting

    @abc.abstractmethod
    def gone_fault(self) -> Fault:
        """What it means that this peer left during its login."""

    @abc.abstractmethod
    def tls_fault(self, error: TlsError) -> Fault:
        """What it means that TLS with this peer came to nothing."""

    def hand_over(self) -> tuple[asyncio.Transport, bytes, bool]:
        """Ends the leg: the transport, what nobody has read, and whether it is at its end. `tls` goes with them.

        Raises `gone_fault` if the transport is lost.
        """
        if self._lost or self._transport is None:
            raise self.gone_fault()
        self._watcher = None
        return self._transport, self.framer.take_rest(), self.at_eof

    def close(self) -> None:
        """Ends the connection once what was sent is gone."""
        self._watcher = None
        if self.tls is not None and not self._lost:
            self._send(self.tls.say_goodbye())
        if self._transport is not None:
            self._transport.close()
        else:
            self._connection.close()

    def abort(self) -> None:
        """Drops the connection without a word."""
        self._watcher = None
        if self._transport is not None:
            self._transport.abort()
        else:
            self._connection.close()


class TakenUpLeg(Leg):
    """A leg of a session that another process has let in: there is nothing left to log in.

    A transport reads as soon as it is made. This one then reads a single byte, so that what a session holds for a peer
    that does not read does not grow with each process that takes it up.
    """

    @property
    def is_lost(self) -> bool:
        """Whether the connection is gone for good."""
        return self._lost

    def gone_fault(self) -> Fault:
        return GatewayFault(CONNECTION_FAILURE, None, "the connection was lost while the session moved")

    def tls_fault(self, error: TlsError) -> Fault:
        # Sessions that speak TLS do not move.
        return self.gone_fault()

    def get_buffer(self, size_hint: int) -> memoryview:  # type: ignore[override]  # any buffer will do
        return memoryview(self._buffer.space)[:1]

    def buffer_updated(self, count: int) -> None:
        super().buffer_updated(count)
        assert self._transport is not None  # noqa: S101 (it has read)
        self._transport.pause_reading()
