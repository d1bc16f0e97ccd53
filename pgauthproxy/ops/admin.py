"""What `admin.listen` serves: metrics, health, and the live page with what it lives on.

Everything is made of the gateway's snapshot, which is asked for through one function, whoever has to be asked for it.
What is asked for often is made seldom: making it takes a fixed share of the loop's time at most.

Metrics and health are for monitors, and hold nothing about any client. Everything else is for whoever has the token;
where none is set, it is shown to this machine alone, and nobody acts.
"""

import asyncio
import ipaddress
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import msgspec

from pgauthproxy.events import AdminActed, Noticed, Sink
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.ops import metrics
from pgauthproxy.ops.acts import Kill, PerformAct, in_words
from pgauthproxy.ops.history import STEP_SECONDS, History
from pgauthproxy.ops.http import HttpServer, Request, Response
from pgauthproxy.ops.page import page
from pgauthproxy.ops.snapshot import Snapshot, TakeSnapshot
from pgauthproxy.ops.view import MAX_ROWS, view_of
from pgauthproxy.secret import Secret

LEAST_AGE_SECONDS: Final = 0.1
SHARE: Final = 50
"""A snapshot is not made anew before so many times the time that it took."""
OPENMETRICS: Final = "application/openmetrics-text"
"""What an Accept header has in it if that is to be had."""
EVENT_SECONDS: Final = 1.0
MAX_WATCHERS: Final = 16
WRONG_TOKEN_SECONDS: Final = 0.5
"""How long a wrong token waits for its answer."""
PATHS: Final = ("/", "/state", "/events", "/kill", "/metrics", "/healthz", "/readyz")
FOR_MONITORS: Final = ("/metrics", "/healthz", "/readyz")
"""What holds nothing about any client."""
KNOWN_HOSTS: Final = ("localhost",)


class KillRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a POST to /kill."""

    session: str


@dataclass(frozen=True, slots=True)
class AdminPolicy:
    """`hosts` are names, besides localhost and IP addresses, that the server may be asked for by."""

    hosts: list[str]
    token: Secret | None


class AdminServer:
    """Answers on sockets that it owns, from `start` to `close`."""

    def __init__(
        self, listening: list[StreamSocket], policy: AdminPolicy, take: TakeSnapshot, act: PerformAct, sink: Sink
    ) -> None:
        self._server = HttpServer(listening, self._answer)
        self._hosts = {name.lower() for name in (*KNOWN_HOSTS, *policy.hosts)}
        self._token = policy.token
        self._take = take
        self._act = act
        self._sink = sink
        self._without_rows = _Kept(take, rows=0)
        self._with_rows = _Kept(take, rows=MAX_ROWS)
        self._rendered: dict[bool, tuple[bytes, str]] = {}
        self._rendered_of: Snapshot | None = None
        self._history = History()
        self._remembering: asyncio.Task[None] | None = None
        self._watchers = 0

    def start(self) -> None:
        self._server.start()
        self._remembering = asyncio.get_running_loop().create_task(self._remember())

    async def close(self, *, removes_files: bool = True) -> None:
        """Ends it; `removes_files`: those of Unix sockets."""
        if self._remembering is not None:
            self._remembering.cancel()
        await self._server.close(removes_files=removes_files)

    async def _remember(self) -> None:
        while True:
            self._history.note(await self._without_rows.fresh())
            await asyncio.sleep(STEP_SECONDS)

    async def _answer(self, request: Request) -> Response:
        if not self._may_be_asked_for(request):
            told = b"This name is not known here: use an IP address, or have it in admin.hosts.\n"
            return Response(HTTPStatus.MISDIRECTED_REQUEST, told)
        allowed = ("POST",) if request.path == "/kill" else ("GET", "HEAD")
        if request.path in PATHS and request.method not in allowed:
            headers = (("Allow", ", ".join(allowed)),)
            return Response(HTTPStatus.METHOD_NOT_ALLOWED, b"Method Not Allowed\n", headers=headers)
        match request.path:
            case "/metrics":
                return await self._metrics(request)
            case "/healthz":
                return Response(HTTPStatus.OK, b"ok\n")
            case "/readyz":
                return await self._readiness()
            case "/":
                body, policy = page()
                headers = (("Content-Security-Policy", policy),)
                return Response(HTTPStatus.OK, body, "text/html; charset=utf-8", headers)
            case "/state" | "/events" | "/kill":
                return await self._for_the_trusted(request)
        return Response(HTTPStatus.NOT_FOUND, b"Not Found\n")

    async def _for_the_trusted(self, request: Request) -> Response:
        """What only those get who may have it."""
        if self._token is None:
            if request.path == "/kill" or not request.local:
                return Response(HTTPStatus.FORBIDDEN, b"admin.token is not set: this is for nobody.\n")
        elif not self._has_token(request):
            if request.headers.get("authorization"):
                facts = (("client", request.address), ("path", request.path))
                self._sink(Noticed("warning", "wrong admin token", facts))
                await asyncio.sleep(WRONG_TOKEN_SECONDS)
            headers = (("WWW-Authenticate", "Bearer"),)
            return Response(HTTPStatus.UNAUTHORIZED, b"The admin token is needed.\n", headers=headers)
        if request.path == "/kill":
            return await self._kill(request)
        if request.path == "/state":
            return Response(HTTPStatus.OK, await self._view(history=True), "application/json")
        if self._watchers >= MAX_WATCHERS:
            return Response(HTTPStatus.SERVICE_UNAVAILABLE, b"Too many are watching.\n")
        return Response(HTTPStatus.OK, content_type="text/event-stream", stream=self._events())

    def _has_token(self, request: Request) -> bool:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and Secret(given.strip().encode()) == self._token

    async def _kill(self, request: Request) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            return Response(HTTPStatus.FORBIDDEN, b"This is for the page itself.\n")
        try:
            wanted = msgspec.json.decode(request.body, type=KillRequest)
        except msgspec.DecodeError:
            return Response(HTTPStatus.BAD_REQUEST, b'Expected {"session": "..."}\n')
        act = Kill(wanted.session)
        ended = await self._act(act)
        self._sink(AdminActed("", request.address, b"", in_words(act), f"{ended} ended"))
        return Response(HTTPStatus.OK, msgspec.json.encode({"ended": ended}), "application/json")

    async def _view(self, *, history: bool) -> bytes:
        snapshot = await self._with_rows.fresh()
        token_is_set = self._token is not None
        view = view_of(snapshot, list(self._history.points), whole=history, token_is_set=token_is_set)
        return msgspec.json.encode(view)

    async def _events(self) -> AsyncGenerator[bytes]:
        """The state each second, for as long as somebody reads it."""
        self._watchers += 1
        try:
            history = True
            while True:
                yield b"data: " + await self._view(history=history) + b"\n\n"
                history = False
                await asyncio.sleep(EVENT_SECONDS)
        finally:
            self._watchers -= 1

    def _may_be_asked_for(self, request: Request) -> bool:
        """Whether the host's name is no stranger's: one that leads here only since its owner says so (DNS rebinding).

        Monitors of other machines may use what names they like, for what holds nothing that they could not have.
        """
        if request.path in FOR_MONITORS and not request.local:
            return True
        host = request.headers.get("host", "")
        name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if name.lower().removesuffix(".") in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def _metrics(self, request: Request) -> Response:
        snapshot = await self._without_rows.fresh()
        if snapshot is not self._rendered_of:
            self._rendered.clear()
            self._rendered_of = snapshot
        openmetrics = OPENMETRICS in request.headers.get("accept", "")
        if openmetrics not in self._rendered:
            began = time.monotonic()
            self._rendered[openmetrics] = metrics.render(snapshot, openmetrics=openmetrics)
            self._without_rows.keep_for(time.monotonic() - began)
        body, content_type = self._rendered[openmetrics]
        return Response(HTTPStatus.OK, body, content_type)

    async def _readiness(self) -> Response:
        if (await self._without_rows.fresh()).draining:
            return Response(HTTPStatus.SERVICE_UNAVAILABLE, b"draining\n")
        return Response(HTTPStatus.OK, b"ready\n")


class _Kept:
    """The newest snapshot, taken anew when it is asked for and old enough."""

    def __init__(self, take: TakeSnapshot, *, rows: int) -> None:
        self._take = take
        self._rows = rows
        self._making = asyncio.Lock()
        self._kept: Snapshot | None = None
        self._until = 0.0

    async def fresh(self) -> Snapshot:
        async with self._making:
            if self._kept is None or time.monotonic() >= self._until:
                self._kept = await self._take(self._rows)
                self.keep_for(self._kept.took)
        return self._kept

    def keep_for(self, cost: float) -> None:
        """So many seconds went into it, or into what was made of it."""
        self._until = max(self._until, time.monotonic() + max(LEAST_AGE_SECONDS, SHARE * cost))
