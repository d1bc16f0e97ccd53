"""A small HTTP/1.1 server for operators: every size, number and time of it is bounded, and so is what it costs.

It shares the event loop with logins, so that a flood of its port must not reach them: connections are accepted and
requests answered at a pace, one by one, and whoever says nothing, or takes no answer, makes way when all places are
taken.
"""

import asyncio
import contextlib
import email.utils
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from http import HTTPStatus
from typing import Final

import msgspec

from pgauthproxy.net import listen
from pgauthproxy.net.sockets import StreamSocket

MAX_CONNECTIONS: Final = 64
MAX_HEAD: Final = 8192
"""Bytes of a request line and its headers."""
MAX_BODY: Final = 4096
REQUEST_SECONDS: Final = 30.0
"""For a whole request to come, from the end of the one before."""
WRITE_SECONDS: Final = 30.0
"""For an answer to be taken."""
ACCEPTS_A_SECOND: Final = 200
REQUESTS_A_SECOND: Final = 500
ALWAYS: Final = (
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)


class Request(msgspec.Struct, frozen=True):
    """Names of headers are in lower case. `local`: it came to a listener that only this machine reaches.

    `address` is the peer's, as a client's is.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    local: bool
    address: str = ""


class Response(msgspec.Struct, frozen=True):
    """`stream` comes instead of `body`, for as long as it lasts."""

    status: HTTPStatus
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()
    stream: AsyncGenerator[bytes] | None = None


Handler = Callable[[Request], Awaitable[Response]]


class BadRequestError(Exception):
    """What came is no request that is answered; `status` says why."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


def parse_head(head: bytes, *, local: bool) -> tuple[Request, int]:
    """A request without its body, and how long that is. Raises BadRequestError."""
    try:
        lines = head.decode("ascii").removesuffix("\r\n\r\n").split("\r\n")
        method, target, version = lines[0].split(" ")
    except ValueError:
        raise BadRequestError(HTTPStatus.BAD_REQUEST) from None
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise BadRequestError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or name != name.strip() or (name in headers and name in ("host", "content-length")):
            raise BadRequestError(HTTPStatus.BAD_REQUEST)
        headers[name] = value.strip()
    if "transfer-encoding" in headers:
        raise BadRequestError(HTTPStatus.NOT_IMPLEMENTED)
    if version == "HTTP/1.0":
        headers["connection"] = "close"
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise BadRequestError(HTTPStatus.BAD_REQUEST)
    if len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
        raise BadRequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    path = target.partition("?")[0]
    return Request(method, path, headers, b"", local), int(length)


def head_of(response: Response, *, close: bool) -> bytes:
    """The status line and headers of an answer."""
    lines = [
        f"HTTP/1.1 {response.status} {response.status.phrase}",
        f"Date: {email.utils.formatdate(usegmt=True)}",
        f"Content-Type: {response.content_type}",
        *(f"{name}: {value}" for name, value in (*ALWAYS, *response.headers)),
    ]
    if response.stream is None:
        lines.append(f"Content-Length: {len(response.body)}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


class Pace:
    """Lets through so many a second, in order; a second's worth may come at once."""

    def __init__(self, a_second: float) -> None:
        self._interval = 1 / a_second
        self._next = 0.0

    async def turn(self) -> None:
        now = asyncio.get_running_loop().time()
        self._next = max(self._next + self._interval, now - 1.0)
        if self._next > now:
            await asyncio.sleep(self._next - now)


class HttpServer:
    """Serves on listening sockets, which it owns, from `start` to `close`."""

    def __init__(self, listening: list[StreamSocket], handler: Handler) -> None:
        self._listening = listening
        self._handler = handler
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Task[None], None] = {}
        """Those of which something is waited for, a request or that they take an answer, the longest so first."""
        self._accepts = Pace(ACCEPTS_A_SECOND)
        self._requests = Pace(REQUESTS_A_SECOND)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._accepting = [loop.create_task(self._accept(each)) for each in self._listening]

    async def close(self, *, removes_files: bool = True) -> None:
        """Drops all connections; `removes_files`: those of Unix sockets."""
        tasks = [*self._accepting, *self._connections]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for each in self._listening:
            if removes_files:
                listen.close(each)
            else:
                each.close()

    async def _accept(self, listening: StreamSocket) -> None:
        loop = asyncio.get_running_loop()
        local = listen.is_local(listening)
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError:
                # Out of descriptors, say: logins need them more.
                await asyncio.sleep(1.0)
                continue
            if self._make_room():
                task = loop.create_task(self._serve(connection, listen.address_of(peer), local=local))
                self._connections.add(task)
                self._waiting[task] = None
                task.add_done_callback(self._connections.discard)
            else:
                connection.close()
            await self._accepts.turn()

    def _make_room(self) -> bool:
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        if not self._waiting:
            return False
        longest = next(iter(self._waiting))
        del self._waiting[longest]
        longest.cancel()
        return True

    async def _serve(self, connection: socket.socket, address: str, *, local: bool) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (a coroutine runs in one)
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_HEAD)
            # Zero: what is written is gone once `drain` returns.
            writer.transport.set_write_buffer_limits(0)
            while await self._answer_one(reader, writer, task, address, local=local):
                self._waiting[task] = None
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            # It has gone, or is as good as gone.
            return
        finally:
            self._waiting.pop(task, None)
            if writer is None:
                connection.close()
            elif self._is_stuck(writer):
                writer.transport.abort()
            else:
                writer.close()

    @staticmethod
    def _is_stuck(writer: asyncio.StreamWriter) -> bool:
        # One that was reset knows no size any more.
        return not writer.is_closing() and writer.transport.get_write_buffer_size() > 0

    async def _answer_one(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
        address: str,
        *,
        local: bool,
    ) -> bool:
        """Reads a request and answers it. False if the connection is to be closed."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                request = await self._read(reader, local=local)
        except BadRequestError as error:
            response = Response(error.status, f"{error.status.phrase}\n".encode())
            await self._write(writer, head_of(response, close=True) + response.body, task)
            return False
        self._waiting.pop(task, None)
        await self._requests.turn()
        response = await self._handler(msgspec.structs.replace(request, address=address))
        keep = response.stream is None and "close" not in request.headers.get("connection", "").lower()
        head = head_of(response, close=not keep)
        await self._write(writer, head if request.method == "HEAD" else head + response.body, task)
        if response.stream is not None and request.method != "HEAD":
            async with contextlib.aclosing(response.stream) as stream:
                async for chunk in stream:
                    await self._write(writer, chunk, task)
        return keep

    @staticmethod
    async def _read(reader: asyncio.StreamReader, *, local: bool) -> Request:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise BadRequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE) from None
        request, length = parse_head(head, local=local)
        if length:
            request = msgspec.structs.replace(request, body=await reader.readexactly(length))
        return request

    async def _write(self, writer: asyncio.StreamWriter, data: bytes, task: asyncio.Task[None]) -> None:
        if writer.is_closing():
            # It was reset meanwhile, and cannot even be written to.
            raise ConnectionResetError
        writer.write(data)
        if self._is_stuck(writer):
            self._waiting[task] = None
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await writer.drain()
        finally:
            self._waiting.pop(task, None)
