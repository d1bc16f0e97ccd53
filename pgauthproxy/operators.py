"""What operators see of one worker, and do to it: the admin console, and what is served by HTTP."""

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from typing import Final

from pgauthproxy.build import admin_token, build_console
from pgauthproxy.config.schema import Settings
from pgauthproxy.events import Noticed, Sink
from pgauthproxy.gateway.session import Gateway
from pgauthproxy.net import listen
from pgauthproxy.net.listen import ListenError
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.ops import console
from pgauthproxy.ops.acts import Act, Reload, Shutdown, act_on
from pgauthproxy.ops.counts import Counts
from pgauthproxy.ops.snapshot import Snapshot

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


class Operators:
    """States, in order: made (there is a console), serving by HTTP (`serve`), closed.

    `process` is whom signals for the whole gateway go to.
    """

    def __init__(
        self, gateway: Gateway, counts: Counts, settings: Callable[[], Settings], process: int, sink: Sink
    ) -> None:
        self._gateway = gateway
        self._counts = counts
        self._settings = settings
        self._process = process
        self._sink = sink
        answers = console.Answers(self._snapshot, self._act, settings, sink)
        gateway.console = build_console(settings(), console.parse, answers.perform, gateway.admission.throttle)
        self.listening: list[StreamSocket] = []

    def serve(self, listening: Sequence[StreamSocket]) -> None:
        """Serves on these sockets, if there are any, which it owns from here on."""
        self.listening = [*listening]
        if not listening:
            return
        # Only now: what it takes to make metrics is not loaded where nobody asks for them.
        from pgauthproxy.ops.admin import AdminPolicy, AdminServer, measure_lag

        settings = self._settings()
        own = listen.parse_admin_listen(settings.admin.listen).host
        policy = AdminPolicy([*settings.admin.hosts, *([own] if own else [])], admin_token(settings))
        self._server = AdminServer(self.listening, policy, self._snapshot, self._act, self._sink)
        self._measuring = asyncio.get_running_loop().create_task(measure_lag(self._counts))
        self._server.start()
        for each in listening:
            level = "info" if listen.is_local(each) else "warning"
            remedy = () if listen.is_local(each) else (("beware", "other machines reach it, and it is not encrypted"),)
            self._sink(Noticed(level, "serving operators", (("address", listen.describe(each)), *remedy)))

    async def close(self, *, removes_files: bool = True) -> None:
        """Serves no more; `removes_files`: those of Unix sockets, unless another process serves on them."""
        if self.listening:
            self._measuring.cancel()
            await self._server.close(removes_files=removes_files)
            self.listening = []

    async def _snapshot(self, rows: int) -> Snapshot:
        return await self._counts.snapshot(self._gateway, paused=self._gateway.held is not None, rows=rows)

    async def _act(self, act: Act) -> int:
        """Does what an operator asks for; says how many sessions it concerned."""
        match act:
            case Reload():
                os.kill(self._process, signal.SIGHUP)
            case Shutdown():
                os.kill(self._process, signal.SIGTERM)
            case _:
                return act_on(self._gateway, act)
        return 0
