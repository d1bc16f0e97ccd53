"""What operators see of a gateway, and do to it: the admin console, and what is served by HTTP.

Both are given what the gateway knows of itself, and what acts on it, by whoever can reach the whole of it: a process
that serves alone itself (`Own`), a supervisor through its workers (whole.py), a worker through its supervisor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pgauthproxy.build import admin_token, build_console
from pgauthproxy.config.schema import Settings
from pgauthproxy.events import Noticed, Sink
from pgauthproxy.gateway.session import Gateway
from pgauthproxy.net import listen
from pgauthproxy.net.listen import ListenError
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.ops import console
from pgauthproxy.ops.acts import Act, PerformAct, Reload, Shutdown, act_on, signal_itself
from pgauthproxy.ops.counts import Counts
from pgauthproxy.ops.snapshot import Snapshot, TakeSnapshot

if TYPE_CHECKING:
    from pgauthproxy.ops.admin import AdminServer

BACKLOG: Final = 64


def open_listeners(settings: Settings) -> list[StreamSocket]:
    """Binds what operators are to be served on, if anything. Raises ListenError."""
    if not settings.admin.listen:
        return []
    # Loaded here, and not later: the user that the gateway becomes need not be able to.
    import pgauthproxy.ops.admin

    assert pgauthproxy.ops.admin  # noqa: S101 (it is loaded now)
    try:
        return listen.open_sockets(listen.parse_admin_listen(settings.admin.listen), BACKLOG)
    except ListenError as error:
        raise ListenError(f"admin.{error}") from None


def remove_files(settings: Settings) -> None:
    """Removes what the process that served operators cannot remove any more, since it is gone."""
    if settings.admin.listen:
        address = listen.parse_admin_listen(settings.admin.listen)
        if address.folder:
            listen.remove_file(address.socket_path)


class Own:
    """What one process knows of its own sessions, and does to them."""

    def __init__(self, gateway: Gateway, counts: Counts) -> None:
        self._gateway = gateway
        self._counts = counts

    async def snapshot(self, rows: int) -> Snapshot:
        """As TakeSnapshot has it, for a process that is the whole gateway."""
        return await self._counts.snapshot(self._gateway, rows=rows)

    async def act(self, act: Act) -> int:
        """As PerformAct has it, for a process that is the whole gateway."""
        match act:
            case Reload() | Shutdown():
                signal_itself(act)
                return 0
            case _:
                return act_on(self._gateway, act)


def open_console(
    gateway: Gateway, take: TakeSnapshot, act: PerformAct, settings: Callable[[], Settings], sink: Sink
) -> None:
    """Has clients find the admin console, if the settings have one."""
    answers = console.Answers(take, act, settings, sink)
    gateway.console = build_console(settings(), console.parse, answers.perform, gateway.admission.throttle)


class Operators:
    """Who is served by HTTP, from `serve` to `close`, on sockets that it owns; if there are any."""

    def __init__(self, listening: list[StreamSocket], take: TakeSnapshot, act: PerformAct, sink: Sink) -> None:
        self.listening = listening
        self._take = take
        self._act = act
        self._sink = sink
        self._unwanted: list[StreamSocket] = []
        self._server: AdminServer | None = None

    def take_over(self, settings: Settings, taken: list[StreamSocket]) -> None:
        """To be served on what another process has served on, if the settings still want that. Raises ListenError."""
        if taken and settings.admin.listen:
            self.listening = taken
        else:
            self._unwanted = taken
            self.listening = open_listeners(settings)

    def drop_unwanted(self) -> None:
        """Nobody serves any more on what was taken over, and is not wanted."""
        for each in self._unwanted:
            listen.close(each)
        self._unwanted = []

    def serve(self, settings: Settings) -> None:
        if not self.listening:
            return
        # Only now: what it takes to make metrics is not loaded where nobody asks for them.
        from pgauthproxy.ops.admin import AdminPolicy, AdminServer

        own = listen.parse_admin_listen(settings.admin.listen).host
        policy = AdminPolicy([*settings.admin.hosts, *([own] if own else [])], admin_token(settings))
        self._server = AdminServer(self.listening, policy, self._take, self._act, self._sink)
        self._server.start()
        for each in self.listening:
            level = "info" if listen.is_local(each) else "warning"
            remedy = () if listen.is_local(each) else (("beware", "other machines reach it, and it is not encrypted"),)
            self._sink(Noticed(level, "serving operators", (("address", listen.describe(each)), *remedy)))

    async def close(self, *, removes_files: bool = True) -> None:
        """Serves no more; `removes_files`: those of Unix sockets, unless another process serves on them."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.close(removes_files=removes_files)
        else:
            for each in self.listening:
                if removes_files:
                    listen.close(each)
                else:
                    each.close()
        self.listening = []
