"""One process that serves: start, serve, drain. It is the only one (alone.py), or one of several (supervised.py)."""

import asyncio
import contextlib
import dataclasses
import math
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pgauthproxy.auth.model import Authenticator
from pgauthproxy.build import build_gateway, build_ledger
from pgauthproxy.config.schema import Settings
from pgauthproxy.errors import GatewayFault
from pgauthproxy.events import CloseReason, Noticed, Refused, Sink, to_all
from pgauthproxy.gateway.session import Gateway, Session, shutting_down
from pgauthproxy.net import listen
from pgauthproxy.net.listen import Listener
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.operators import Own
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.counts import Counts, measure_lag
from pgauthproxy.ops.log import LogSink
from pgauthproxy.process import fitting
from pgauthproxy.proto import messages
from pgauthproxy.reload import Read, Reloads
from pgauthproxy.stages import Accepted

RELEASE_SECONDS: Final = 5.0
"""How long the end waits for what sessions have given back to arrive."""
SESSIONS_BITS: Final = 40
"""Of a session's number; the rest is the generation of its worker."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands among others: its slot, which its successor has too, and its own generation.

    `removes_files`: those of Unix sockets, once it listens no more. `ledger`: the descriptor of the counts that they
    share, and `ledger_slot` its place in them. `is_only`: whether there are no others.
    """

    slot: int = 0
    generation: int = 0
    removes_files: bool = True
    ledger: int = -1
    ledger_slot: int = 0
    is_only: bool = True


class Worker:
    """States, in order: made, started, serving (`listen`), draining (`drain`), ended (`finish`)."""

    def __init__(
        self,
        settings: Settings,
        authenticator: Authenticator,
        listening: list[StreamSocket],
        read: Read,
        log: LogSink,
        audit: AuditSink | None = None,
        place: Place | None = None,
    ) -> None:
        # The audit log goes first: what it refuses has not happened.
        sink = self.sink = log if audit is None else to_all(audit, log)
        place = self._place = place or Place()
        counts = self._counts = Counts(str(place.slot), audit)
        self.listening = listening
        fitted, own_clients = fitting(settings, log, is_only=place.is_only)
        ledger = build_ledger(fitted, place.ledger, place.ledger_slot)
        self.gateway: Gateway = build_gateway(fitted, authenticator, to_all(sink, counts), ledger, audit, place.slot)
        self.gateway.limits.own_clients = own_clients
        self.reloads = Reloads(self.gateway, settings, fitted, listening, read, self._fit, sink, log, audit)
        self.pass_on: Callable[[socket.socket, bool], bool] | None = None
        """Whether another worker has taken a client; told is also whether the PROXY protocol comes first."""
        self.own = Own(self.gateway, counts)
        self._measuring: asyncio.Task[None] | None = None
        self._listeners: list[Listener] = []
        self._sessions_begun = place.generation << SESSIONS_BITS
        self._is_draining = False
        self._leaving = asyncio.Event()
        self._told = asyncio.Event()
        self._ended = asyncio.Event()

    def _fit(self, settings: Settings, sink: Sink) -> Settings:
        """What new settings are here."""
        fitted, self.gateway.limits.own_clients = fitting(settings, sink, is_only=self._place.is_only)
        return fitted

    async def start(self) -> None:
        """Raises AuthenticatorConfigError if the authenticator cannot be started."""
        await self.gateway.admission.authenticator.start()
        loop = asyncio.get_running_loop()
        if self.reloads.settings.admin.listen:
            self._measuring = loop.create_task(measure_lag(self._counts))
        loop.set_exception_handler(self._report_exception)
        # It may be called by any thread.
        sys.unraisablehook = lambda found: loop.call_soon_threadsafe(self._report_unraisable, found.exc_value)

    def listen(self) -> None:
        removes = self._place.removes_files
        self._listeners = [
            Listener(each, self._accepted, self._starved, removes_file=removes) for each in self.listening
        ]

    @property
    def generation(self) -> int:
        return self._place.generation

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def removes_files(self) -> bool:
        return self._place.removes_files

    def succeed(self, generation: int, removes_files: bool, listening: Sequence[StreamSocket]) -> None:
        """Takes these sockets over from a process that is to be succeeded."""
        self._place = dataclasses.replace(self._place, generation=generation, removes_files=removes_files)
        self._sessions_begun = generation << SESSIONS_BITS
        self.listening += listening

    def pause(self) -> None:
        """Accepts nobody for now; who comes waits."""
        for listener in self._listeners:
            listener.stop()

    def be_succeeded(self) -> None:
        """Another process accepts on the same sockets: the sessions that are left here go on until they end."""
        for each in self.listening:
            each.close()
        self.listening.clear()
        self._listeners = []
        self._leaving.set()

    async def serve(self) -> None:
        """Returns once nobody new is accepted any more; a successor may stand in its place from then on."""
        await self._leaving.wait()
        for listener in self._listeners:
            listener.close()
        self.listening.clear()

    def drain(self, fact: tuple[str, object]) -> None:
        """Has it end once its sessions have; `fact` says why."""
        if not self._is_draining:
            self._is_draining = self.gateway.draining = True
            self.sink(Noticed("info", "shutting down", (fact, ("sessions", len(self.gateway.sessions)))))
            self._leaving.set()
            self._told.set()

    def end_now(self, fact: tuple[str, object]) -> None:
        """Ends it without waiting for sessions."""
        self.sink(Noticed("warning", "ending at once", (fact,)))
        self._is_draining = self.gateway.draining = True
        self._leaving.set()
        self._told.set()
        self._ended.set()

    def _accepted(self, connection: socket.socket, peer: Any, proxied: bool) -> None:
        if self.pass_on is None or not self.pass_on(connection, proxied):
            self.take_in(connection, peer, proxied)

    def take_in(self, connection: socket.socket, peer: Any, proxied: bool) -> None:
        """Begins a session with a client."""
        address = listen.address_of(peer)
        if (reason := self.gateway.access.refusal(address, as_balancer=proxied)) is not None:
            connection.close()
            self.gateway.denials.note(address, reason)
            return
        self._sessions_begun += 1
        try:
            session = Session(self.gateway, self._sessions_begun)
        except GatewayFault as fault:
            self._turn_away(connection, fault)
            self.gateway.sink(Refused(Accepted(f"{self._sessions_begun:x}", address), None, fault))
        else:
            session.begin(connection, address, proxied=proxied)

    def _turn_away(self, connection: socket.socket, fault: GatewayFault) -> None:
        """Tells a client why without waiting for anything; what it sent is read, so that closing does not reset it."""
        with connection:
            # It may have sent nothing yet, or have gone.
            with contextlib.suppress(OSError):
                connection.recv(self.reloads.settings.max_startup_packet)
            with contextlib.suppress(OSError):
                connection.send(messages.fatal(fault.sqlstate, fault.told or b""))

    def _starved(self, error: OSError) -> None:
        self.sink(Noticed("error", "accepting pauses", (("reason", error.strerror),)))

    async def finish(self) -> None:
        """Lets sessions go on until they end, the time is up, or it is to end at once.

        For one that was succeeded the time begins only when it is told to drain.
        """
        if not self._is_draining:
            self.gateway.idle = self._told.set
            while self.gateway.sessions and not self._is_draining:
                self._told.clear()
                await self._told.wait()
        for session in list(self.gateway.sessions):
            session.refuse_login(shutting_down())
        self.gateway.idle = self._ended.set
        if self.gateway.sessions:
            await self._wait_for_end(self.reloads.settings.drain_timeout)
        if self.gateway.sessions:
            self._ended.clear()
            for session in list(self.gateway.sessions):
                session.end(CloseReason.SHUTDOWN, b"terminating connection due to administrator command")
            await self._wait_for_end(min(1.0, self.reloads.settings.close_timeout))
        self.gateway.denials.flush()
        self.gateway.targets.warm.close()
        await self.until_all_is_released()
        await self.reloads.close()

    async def until_all_is_released(self) -> None:
        """Waits for what sessions have given back to arrive."""
        if self.gateway.releasing:
            await asyncio.wait(self.gateway.releasing, timeout=RELEASE_SECONDS)

    async def until_told(self, task: "asyncio.Task[None]") -> None:
        """Waits for a task, but no longer than until this worker is told to drain; then it is cancelled."""
        told = asyncio.get_running_loop().create_task(self._told.wait())
        self._told.clear()
        await asyncio.wait([task, told], return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        told.cancel()

    async def close(self) -> None:
        """Gives back what is left."""
        if self._measuring is not None:
            self._measuring.cancel()
        await self.gateway.admission.authenticator.close()

    async def _wait_for_end(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await self._ended.wait()
        except TimeoutError:
            return

    def _report_unraisable(self, error: BaseException | None) -> None:
        """What Python would write to standard error itself, past the log."""
        if isinstance(error, UnicodeDecodeError):
            # A client asks by TLS for a host whose name is no ASCII: its handshake fails, which has a line of its own.
            return
        self._report_internal("an exception that nobody could be told of", error)

    def _report_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._report_internal(str(context.get("message")), context.get("exception"))

    def _report_internal(self, what: str, error: object) -> None:
        """A bug of ours: where it happened, never with what values."""
        facts: list[tuple[str, object]] = [("what", what)]
        if isinstance(error, BaseException):
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
            facts += [("error", type(error).__name__), ("where", where.removeprefix(sys.prefix))]
        self.sink(Noticed("error", "internal error", tuple(facts)))
