"""What a supervisor and its workers say to each other, over a socket pair: frames of msgpack behind their length.

The end of the file means that the other process is gone.
"""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from typing import Final, Generic, Self, TypeVar

import msgspec

from pgauthproxy.config.schema import Settings
from pgauthproxy.ops.acts import Act, UnansweredError
from pgauthproxy.ops.snapshot import Snapshot

LENGTH_BYTES: Final = 4
MOST_WAITING: Final = 16 << 20
"""Bytes that may wait for a process that does not read them."""


class Frame(msgspec.Struct, frozen=True, tag=True):
    """One message."""


class Begin(Frame, frozen=True):
    """The first to a worker: who it is, and the descriptors that it has inherited to accept on.

    `slot` is its place among the workers, which its successor has too; `generation` is its own. `removes_files`: those
    of Unix sockets, should the supervisor no longer be there to do it. `proxy_protocol`: which of the descriptors it is
    spoken on. `ledger`: the descriptor of the counts that all workers share, -1 if each has its own, and `ledger_slots`
    their places in them. `inbox` is where others pass clients on to this one, `inboxes` where each gets them.
    `is_paused`: whether logins are to wait from the start. `predecessor` leads to the process whose sessions are to be
    taken over, -1 if there is none, and `successor` to the one that may take them over from here, once there is one.
    """

    slot: int
    generation: int
    settings: Settings
    listening: tuple[int, ...]
    proxy_protocol: tuple[bool, ...]
    removes_files: bool
    ledger: int
    ledger_slots: tuple[int, ...]
    inbox: int
    inboxes: tuple[int, ...]
    is_paused: bool
    predecessor: int
    successor: int


class Listen(Frame, frozen=True):
    """To accept from now on."""


class BeSucceeded(Frame, frozen=True):
    """To accept no more, and to hand its sessions over."""


class Settle(Frame, frozen=True):
    """New settings, to be put in force."""

    settings: Settings


class OpenAnew(Frame, frozen=True):
    """Whoever keeps files open opens them anew; the settings stay."""


class Drain(Frame, frozen=True):
    """To end once the sessions have, `why` for the log."""

    why: str


class EndNow(Frame, frozen=True):
    """To end without waiting for the sessions."""

    why: str


class Ping(Frame, frozen=True):
    """To be answered at once: shows that the worker's loop runs."""


class Pong(Frame, frozen=True):
    """The answer."""


class Ready(Frame, frozen=True):
    """From a worker: it could accept."""


class Failed(Frame, frozen=True):
    """From a worker: it cannot begin."""

    faults: tuple[str, ...]


class CancelAsked(Frame, frozen=True):
    """A cancel request whose key is another worker's; on its way there, and then there."""

    ticket: int
    key: bytes


class CancelDone(Frame, frozen=True):
    """What came of it, on its way back: the session's id, empty if the key is nobody's, and the outcome for the log."""

    ticket: int
    session: str
    outcome: str


class Look(msgspec.Struct, frozen=True, tag=True):
    """What is there, with so many of the newest sessions one by one."""

    rows: int


class Asked(Frame, frozen=True):
    """What an operator wants: from a worker that was asked, of the whole gateway; and to each worker, of its part."""

    ticket: int
    wanted: Look | Act


class Answered(Frame, frozen=True):
    """What there is, or how many sessions an act concerned."""

    ticket: int
    said: Snapshot | int


ToWorker = (
    Begin
    | Listen
    | BeSucceeded
    | Settle
    | OpenAnew
    | Drain
    | EndNow
    | Ping
    | CancelAsked
    | CancelDone
    | Asked
    | Answered
)
ToSupervisor = Ready | Failed | Pong | CancelAsked | CancelDone | Asked | Answered
_DECODER: Final = msgspec.msgpack.Decoder(ToWorker | ToSupervisor)


Said = TypeVar("Said")


class Questions(Generic[Said]):
    """Questions that another process was asked, and has not answered yet."""

    def __init__(self) -> None:
        self._tickets = itertools.count()
        self._waiting: dict[int, asyncio.Future[Said]] = {}

    async def ask(self, send: Callable[[int], bool], seconds: float) -> Said:
        """The answer; `send` puts the question under a ticket, and says whether it is on its way.

        Raises UnansweredError, and TimeoutError.
        """
        ticket = next(self._tickets)
        if not send(ticket):
            raise UnansweredError("the other process is gone")
        answer: asyncio.Future[Said] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = answer
        try:
            async with asyncio.timeout(seconds):
                return await answer
        finally:
            del self._waiting[ticket]

    def answered(self, ticket: int, said: Said) -> None:
        answer = self._waiting.get(ticket)
        if answer is not None and not answer.done():
            answer.set_result(said)

    def give_up(self, why: str) -> None:
        """Nobody will answer any more."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(UnansweredError(why))


class CancelQuestions:
    """Cancel requests that another process was asked to pass on, and has not answered yet."""

    def __init__(self, send: Callable[[CancelAsked], bool]) -> None:
        """`send` says whether the question is on its way."""
        self._send = send
        self._questions = Questions[tuple[str, str]]()

    async def ask(self, key: bytes, seconds: float) -> tuple[str, str]:
        """The session's id, and the outcome."""
        try:
            return await self._questions.ask(lambda ticket: self._send(CancelAsked(ticket, key)), seconds)
        except UnansweredError as error:
            return "", f"not passed on: {error}"
        except TimeoutError:
            return "", f"passed on to another worker, not confirmed in {seconds:g} s"

    def answered(self, done: CancelDone) -> None:
        self._questions.answered(done.ticket, (done.session, done.outcome))

    def give_up(self, why: str) -> None:
        """Nobody will answer any more."""
        self._questions.give_up(why)


class Channel:
    """One end of the pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, connection: socket.socket) -> Self:
        """Owns the socket from here on."""
        connection.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=connection))

    def send(self, frame: ToWorker | ToSupervisor) -> bool:
        """False if it was dropped: the other process is gone, or does not read."""
        if self._writer.transport.is_closing() or self._writer.transport.get_write_buffer_size() > MOST_WAITING:
            return False
        encoded = msgspec.msgpack.encode(frame)
        self._writer.write(len(encoded).to_bytes(LENGTH_BYTES) + encoded)
        return True

    async def receive(self) -> ToWorker | ToSupervisor | None:
        """The next frame; None once the other process is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES))
            frame: ToWorker | ToSupervisor = _DECODER.decode(await self._reader.readexactly(length))
            return frame
        except (asyncio.IncompleteReadError, OSError):
            return None

    async def frames(self) -> AsyncIterator[ToWorker | ToSupervisor]:
        """All that come, until the other process is gone."""
        while (frame := await self.receive()) is not None:
            yield frame

    def close(self) -> None:
        """Ends it once what was sent is gone."""
        self._writer.close()
