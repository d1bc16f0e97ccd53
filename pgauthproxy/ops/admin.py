"""What `admin.listen` serves: metrics and health.

Everything is made of the gateway's snapshot, which is asked for through one function, whoever has to be asked for it.
What is asked for often is made seldom: making it takes a fixed share of the loop's time at most.
"""

import asyncio
import ipaddress
import socket
import time
from http import HTTPStatus
from typing import Final

from pgauthproxy.ops import metrics
from pgauthproxy.ops.counts import Counts
from pgauthproxy.ops.http import HttpServer, Request, Response
from pgauthproxy.ops.snapshot import Snapshot, TakeSnapshot

LEAST_AGE_SECONDS: Final = 0.1
SHARE: Final = 50
"""A snapshot is not made anew before so many times the time that it took."""
MAX_FORMS: Final = 4
"""Accept headers that metrics are made for between two snapshots; for others they are made in the usual form."""
LAG_SECONDS: Final = 1.0
"""How often the loop's lag is measured."""
FOR_MONITORS: Final = ("/metrics", "/healthz", "/readyz")
"""What holds nothing about any client."""
KNOWN_HOSTS: Final = ("localhost",)


class AdminServer:
    """Answers on sockets that it owns, from `start` to `close`."""

    def __init__(self, listening: list[socket.socket], hosts: list[str], take: TakeSnapshot) -> None:
        """`hosts` are names, besides localhost and IP addresses, that the pages may be asked for by."""
        self._server = HttpServer(listening, self._answer)
        self._hosts = {name.lower() for name in (*KNOWN_HOSTS, *hosts)}
        self._take = take
        self._making = asyncio.Lock()
        self._kept: Snapshot | None = None
        self._keep_until = 0.0
        self._rendered: dict[str, tuple[bytes, str]] = {}

    def start(self) -> None:
        self._server.start()

    async def close(self) -> None:
        await self._server.close()

    async def _answer(self, request: Request) -> Response:
        if not self._may_be_asked_for(request):
            told = b"This name is not known here: use an IP address, or have it in admin.hosts.\n"
            return Response(HTTPStatus.MISDIRECTED_REQUEST, told)
        if request.method not in ("GET", "HEAD"):
            return Response(HTTPStatus.METHOD_NOT_ALLOWED, b"Method Not Allowed\n", headers=(("Allow", "GET, HEAD"),))
        match request.path:
            case "/metrics":
                return await self._metrics(request)
            case "/healthz":
                return Response(HTTPStatus.OK, b"ok\n")
            case "/readyz":
                return await self._readiness()
        return Response(HTTPStatus.NOT_FOUND, b"Not Found\n")

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

    async def _fresh(self) -> Snapshot:
        """A snapshot without rows that is new enough."""
        async with self._making:
            began = time.monotonic()
            if self._kept is None or began >= self._keep_until:
                self._kept = await self._take(False)
                self._rendered.clear()
                self._keep_for(began)
        return self._kept

    def _keep_for(self, began: float) -> None:
        now = time.monotonic()
        self._keep_until = max(self._keep_until, now + max(LEAST_AGE_SECONDS, SHARE * (now - began)))

    async def _metrics(self, request: Request) -> Response:
        snapshot = await self._fresh()
        wanted = request.headers.get("accept", "")
        if wanted not in self._rendered and len(self._rendered) >= MAX_FORMS:
            wanted = ""
        if wanted not in self._rendered:
            began = time.monotonic()
            self._rendered[wanted] = metrics.render(snapshot, wanted)
            self._keep_for(began)
        body, content_type = self._rendered[wanted]
        return Response(HTTPStatus.OK, body, content_type)

    async def _readiness(self) -> Response:
        if (await self._fresh()).draining:
            return Response(HTTPStatus.SERVICE_UNAVAILABLE, b"draining\n")
        return Response(HTTPStatus.OK, b"ready\n")


async def measure_lag(counts: Counts) -> None:
    """Notes how late the loop wakes who sleeps; runs until it is cancelled."""
    while True:
        due = time.monotonic() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        counts.histograms.lag.observe(max(0.0, time.monotonic() - due))
