"""What a process and its successor say to each other, over a socket pair: packets of msgpack, with descriptors."""

import array
import asyncio
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgspec

from pgauthproxy.control import CancelAsked, CancelDone, Frame
from pgauthproxy.gateway.moving import HandedOver

MOST_DESCRIPTORS: Final = 250
"""The kernel passes no more at once."""
MOST_PACKET: Final = 65_536
PIECE_BYTES: Final = 32_768
"""Frames that are longer are sent in pieces: the kernel takes no packet that its buffer does not hold."""
PIECE: Final = b"\xc1"
LAST_PIECE: Final = b"\xc0"
"""What no frame begins with."""
CREDENTIALS: Final = struct.Struct("iII")
"""The kernel's struct ucred."""
INT_BYTES: Final = array.array("i").itemsize


class Hello(Frame, frozen=True):
    """From the new process: it could serve."""


class TakeListening(Frame, frozen=True):
    """To the new process, with the listening sockets: its generation, whether it removes files of Unix sockets, and on
    which of the sockets the PROXY protocol is spoken. Behind them are `admin` sockets that operators are served on.
    `is_paused`: whether new logins are to wait."""

    generation: int
    removes_files: bool
    proxy_protocol: tuple[bool, ...]
    admin: int
    is_paused: bool = False


class Serving(Frame, frozen=True):
    """From the new process: it does."""


class Resumed(Frame, frozen=True):
    """Logins may go on, those as well that wait in the process that is told."""


class TakeGateway(Frame, frozen=True):
    """To a new supervisor, with the sockets that operators are served on: what its workers' generations begin with,
    whether files of Unix sockets are to be removed in the end, whether logins are paused, and what salts are made up
    from. For each of the `slots` there follows one TakeSlot; its workers count in `ledger_slots`."""

    generation: int
    removes_files: bool
    is_paused: bool
    seed: str
    slots: int
    ledger_slots: tuple[int, ...]


class TakeSlot(Frame, frozen=True):
    """To a new supervisor, with the sockets that a worker accepts on: on which of them the PROXY protocol is spoken.

    Behind them is its inbox, and if `has_worker`, what leads to the worker that is there now.
    """

    proxy_protocol: tuple[bool, ...]
    has_worker: bool


class TakeSession(Frame, frozen=True):
    """To the new process, with the client's socket and the target's."""

    session: HandedOver


class LeaseOver(Frame, frozen=True):
    """To the process that keeps the lease of a session's credential: the session, by its number, is over."""

    session: int


class LeaseEnded(Frame, frozen=True):
    """From that process: the lease has ended before the session has."""

    session: int


Said = (
    Hello
    | TakeListening
    | TakeGateway
    | TakeSlot
    | Serving
    | Resumed
    | TakeSession
    | LeaseOver
    | LeaseEnded
    | CancelAsked
    | CancelDone
)
_DECODER: Final = msgspec.msgpack.Decoder(Said)
Taken = TypeVar("Taken", TakeListening, TakeGateway, TakeSlot)


class Link:
    """One end of the socket pair that the two processes have."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._in_pieces = asyncio.Lock()
        self._pieces = bytearray()

    @property
    def other(self) -> int:
        """The number of the process that has made the link: to the new one that is the old one."""
        credentials = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        pid: int = CREDENTIALS.unpack(credentials)[0]
        return pid

    async def send(self, frame: Said, descriptors: Sequence[int] = ()) -> bool:
        """False if the other process is gone."""
        data = msgspec.msgpack.encode(frame)
        if len(data) <= PIECE_BYTES:
            return await self._send(data, descriptors)
        async with self._in_pieces:
            for at in range(0, len(data), PIECE_BYTES):
                piece = data[at : at + PIECE_BYTES]
                is_last = at + PIECE_BYTES >= len(data)
                if not await self._send((LAST_PIECE if is_last else PIECE) + piece, descriptors if is_last else ()):
                    return False
        return True

    async def _send(self, packet: bytes, descriptors: Sequence[int]) -> bool:
        while True:
            try:
                socket.send_fds(self._connection, [packet], descriptors)
            except BlockingIOError:
                await self.until_writable()
            except OSError:
                return False
            else:
                return True

    def send_now(self, frame: Said) -> bool:
        """False if it cannot be sent at once. It is a short one."""
        try:
            self._connection.send(msgspec.msgpack.encode(frame))
        except OSError:
            return False
        return True

    async def receive(self) -> tuple[Said, list[int]] | None:
        """The next frame with its descriptors; None once the other process is gone."""
        while (received := await self._receive()) is not None:
            packet, descriptors = received
            if packet.startswith(PIECE):
                self._pieces += packet[1:]
                continue
            if packet.startswith(LAST_PIECE):
                packet = bytes(self._pieces) + packet[1:]
                self._pieces.clear()
            return _DECODER.decode(packet), descriptors
        return None

    async def _receive(self) -> tuple[bytes, list[int]] | None:
        while True:
            try:
                # Not socket.recv_fds, which loses the flag: authenticators would inherit what it has received.
                packet, ancillary, _, _ = self._connection.recvmsg(
                    MOST_PACKET, socket.CMSG_SPACE(MOST_DESCRIPTORS * INT_BYTES), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await _wait(loop.add_reader, loop.remove_reader, self._connection)
            except OSError:
                return None
            else:
                descriptors = array.array("i")
                for _, _, passed in ancillary:
                    descriptors.frombytes(passed)
                return (packet, list(descriptors)) if packet else None

    async def until_writable(self) -> None:
        """Waits until the other process has read enough for something to be sent, or is gone."""
        loop = asyncio.get_running_loop()
        await _wait(loop.add_writer, loop.remove_writer, self._connection)

    def close(self) -> None:
        self._connection.close()


async def _wait(
    add: Callable[..., object], remove: Callable[[socket.socket], object], connection: socket.socket
) -> None:
    ready = asyncio.Event()
    add(connection, ready.set)
    try:
        await ready.wait()
    finally:
        remove(connection)
