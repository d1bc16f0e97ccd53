"""One process that serves: start, serve, drain."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import warnings
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
import uvloop

from pgauthproxy import _spawn
from pgauthproxy.auth.model import Authenticator, AuthenticatorConfigError
from pgauthproxy.build import admin_token, build_client_tls, build_console, build_gateway, check_target_tls, tcp_options
from pgauthproxy.config.schema import AuthenticatorSettings, Settings
from pgauthproxy.errors import GatewayFault
from pgauthproxy.events import CloseReason, Noticed, Refused, Reloaded, Reloading, Sink, to_all
from pgauthproxy.gateway.session import Gateway, Session, shutting_down
from pgauthproxy.net import listen
from pgauthproxy.net.dial import tune
from pgauthproxy.net.listen import Listener
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.net.tls import TlsConfigError
from pgauthproxy.ops import console
from pgauthproxy.ops.acts import Act, Reload, Shutdown, act_on
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.counts import Counts
from pgauthproxy.ops.snapshot import Snapshot
from pgauthproxy.proto import messages
from pgauthproxy.stages import Accepted

DESCRIPTORS_FOR_ITSELF: Final = 64
DESCRIPTORS_FOR_OPERATORS: Final = 68
ADMIN_BACKLOG: Final = 64
DESCRIPTORS_OF_A_SESSION: Final = 2
DESCRIPTORS_OF_AN_AUTHENTICATOR: Final = 10
RELEASE_SECONDS: Final = 5.0
"""How long the end waits for what sessions have given back to arrive."""


def open_listeners(settings: Settings) -> list[StreamSocket]:
    """Binds everything that is to be listened on, or nothing. Raises ListenError."""
    _fill_standard_descriptors()
    opened: list[StreamSocket] = []
    try:
        for each in settings.listeners:
            address = listen.parse_listen(each.address)
            opened += listen.open_sockets(address, settings.backlog, proxy_protocol=each.proxy_protocol)
    except listen.ListenError:
        for listening in opened:
            listening.close()
        raise
    for listening in opened:
        # What is accepted inherits it.
        tune(listening, tcp_options(settings))
    return opened


def open_admin_listeners(settings: Settings) -> list[StreamSocket]:
    """Binds what operators are to be served on, if anything. Raises ListenError."""
    if not settings.admin.listen:
        return []
    # Loaded here, and not later: the user that the gateway becomes need not be able to.
    import pgauthproxy.ops.admin

    assert pgauthproxy.ops.admin  # noqa: S101 (it is loaded now)
    try:
        return listen.open_sockets(listen.parse_admin_listen(settings.admin.listen), ADMIN_BACKLOG)
    except listen.ListenError as error:
        raise listen.ListenError(f"admin.{error}") from None


def serve(
    settings: Settings,
    authenticator: Authenticator,
    listening: list[StreamSocket],
    admin_listening: list[StreamSocket],
    sink: Sink,
    audit: AuditSink | None = None,
) -> None:
    """Runs until a signal ends it. Raises AuthenticatorConfigError if it cannot begin to."""
    # What libraries tell their developers, of a certificate that a peer shows say, is nothing for the log.
    warnings.simplefilter("ignore")
    worker = Worker(prepare_process(settings, sink), authenticator, sink, audit)
    uvloop.run(worker.run(listening, admin_listening))


def prepare_process(settings: Settings, sink: Sink) -> Settings:
    """Closes what credentials could leak through, raises the limit on descriptors; returns the settings that fit it."""
    _spawn.keep_descriptors_private()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return settings if hard == resource.RLIM_INFINITY else _fitting(settings, hard, sink)


def _fitting(settings: Settings, descriptors: int, sink: Sink) -> Settings:
    """The settings with no more clients and logins than there are descriptors for.

    A login that has not named itself holds one; there may be max_logins of them besides the clients.
    """
    reserved = DESCRIPTORS_FOR_OPERATORS if settings.admin.listen else 0
    free = descriptors - DESCRIPTORS_FOR_ITSELF - reserved - _descriptors_of(settings.authenticator)
    if settings.max_clients * DESCRIPTORS_OF_A_SESSION + settings.max_logins <= free:
        return settings
    max_logins = min(settings.max_logins, max(1, free // 4))
    max_clients = min(settings.max_clients, max(1, (free - max_logins) // DESCRIPTORS_OF_A_SESSION))
    for name, fitting, asked_for in (
        ("max_clients", max_clients, settings.max_clients),
        ("max_logins", max_logins, settings.max_logins),
    ):
        if fitting < asked_for:
            facts = ((name, fitting), ("asked_for", asked_for), ("descriptors", descriptors))
            sink(Noticed("warning", f"{name} lowered to what the limit on descriptors allows", facts))
    return msgspec.structs.replace(settings, max_clients=max_clients, max_logins=max_logins)


def _descriptors_of(asked: AuthenticatorSettings) -> int:
    """What an authenticator holds at most."""
    match asked.decided_kind:
        case "http":
            return asked.http.max_in_flight
        case "chain":
            return sum(map(_descriptors_of, asked.chain))
        case _:
            return DESCRIPTORS_OF_AN_AUTHENTICATOR * asked.max_parallel


def _fill_standard_descriptors() -> None:
    """Descriptors 0 to 2 are open from here on, so that no socket ever gets one of these numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


class Worker:
    """States, in order: starting, serving, draining (first signal), ended."""

    def __init__(
        self, settings: Settings, authenticator: Authenticator, sink: Sink, audit: AuditSink | None = None
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._counts = Counts()
        self._gateway: Gateway = build_gateway(settings, authenticator, to_all(sink, self._counts), audit)
        answers = console.Answers(self._snapshot, self._act, lambda: self._settings, sink)
        throttle = self._gateway.admission.throttle
        self._gateway.console = build_console(settings, console.parse, answers.perform, throttle)
        self._listeners: list[Listener] = []
        self._sessions_begun = 0
        self._reloading: asyncio.Task[None] | None = None
        self._reload_again = False
        self._draining = asyncio.Event()
        self._ended = asyncio.Event()

    async def run(self, listening: list[StreamSocket], admin_listening: list[StreamSocket]) -> None:
        """Raises AuthenticatorConfigError if the authenticator cannot be started."""
        await self._gateway.admission.authenticator.start()
        async with self._administered(admin_listening):
            self._start(listening)
            await self._draining.wait()
            await self._drain()
        self._sink(Noticed("info", "ended"))

    @contextlib.asynccontextmanager
    async def _administered(self, listening: list[StreamSocket]) -> AsyncIterator[None]:
        """Operators are served within, if there is where to."""
        if not listening:
            yield
            return
        # Only now: what it takes to make metrics is not loaded where nobody asks for them.
        from pgauthproxy.ops.admin import AdminPolicy, AdminServer, measure_lag

        admin = self._settings.admin
        own = listen.parse_admin_listen(admin.listen).host
        policy = AdminPolicy([*admin.hosts, *([own] if own else [])], admin_token(self._settings))
        server = AdminServer(listening, policy, self._snapshot, self._act, self._sink)
        measuring = asyncio.create_task(measure_lag(self._counts))
        server.start()
        for each in listening:
            level = "info" if listen.is_local(each) else "warning"
            remedy = () if listen.is_local(each) else (("beware", "other machines reach it, and it is not encrypted"),)
            self._sink(Noticed(level, "serving operators", (("address", listen.describe(each)), *remedy)))
        try:
            yield
        finally:
            measuring.cancel()
            await server.close()

    async def _snapshot(self, rows: int) -> Snapshot:
        return await self._counts.snapshot(self._gateway, paused=self._gateway.held is not None, rows=rows)

    async def _act(self, act: Act) -> int:
        """Does what an operator asks for; says how many sessions it concerned."""
        match act:
            case Reload():
                self._reload()
            case Shutdown():
                self._shut_down("SHUTDOWN")
            case _:
                return act_on(self._gateway, act)
        return 0

    def _start(self, listening: list[StreamSocket]) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._report_exception)
        # It may be called by any thread.
        sys.unraisablehook = lambda found: loop.call_soon_threadsafe(self._report_unraisable, found.exc_value)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._listeners = [Listener(each, self._accepted, self._starved) for each in listening]
        for each in listening:
            self._sink(Noticed("info", "listening", (("address", listen.describe(each)),)))
        exposed = [listen.describe(each) for each in listening if not listen.is_local(each)]
        if exposed and self._settings.method == "cleartext" and self._settings.tls_mode != "require":
            facts = (("addresses", ", ".join(exposed)), ("remedy", "tls.mode: require"))
            self._sink(Noticed("warning", "passwords cross the network in clear", facts))

    def _accepted(self, connection: socket.socket, peer: Any, proxied: bool) -> None:
        address = listen.address_of(peer)
        if (reason := self._gateway.access.refusal(address, as_balancer=proxied)) is not None:
            connection.close()
            self._gateway.denials.note(address, reason)
            return
        self._sessions_begun += 1
        try:
            session = Session(self._gateway, self._sessions_begun)
        except GatewayFault as fault:
            self._turn_away(connection, fault)
            self._gateway.sink(Refused(Accepted(f"{self._sessions_begun:x}", address), None, fault))
        else:
            session.begin(connection, address, proxied=proxied)

    def _turn_away(self, connection: socket.socket, fault: GatewayFault) -> None:
        """Tells a client why without waiting for anything; what it sent is read, so that closing does not reset it."""
        with connection:
            # It may have sent nothing yet, or have gone.
            with contextlib.suppress(OSError):
                connection.recv(self._settings.max_startup_packet)
            with contextlib.suppress(OSError):
                connection.send(messages.fatal(fault.sqlstate, fault.told or b""))

    def _starved(self, error: OSError) -> None:
        self._sink(Noticed("error", "accepting pauses", (("reason", error.strerror),)))

    def _signalled(self, number: signal.Signals) -> None:
        if not self._draining.is_set():
            self._shut_down(number.name)
        else:
            self._sink(Noticed("warning", "ending at once", (("signal", number.name),)))
            self._ended.set()

    def _shut_down(self, by: str) -> None:
        if not self._draining.is_set():
            self._sink(Noticed("info", "shutting down", (("signal", by), ("sessions", len(self._gateway.sessions)))))
            self._draining.set()

    def _reload(self) -> None:
        """Reads everything anew that can be; one after the other, however often it is asked for."""
        self._sink(Reloading())
        self._reload_certificates()
        self._reload_again = self._reloading is not None
        if self._reloading is None:
            self._reloading = asyncio.get_running_loop().create_task(self._reload_authenticator())

    async def _reload_authenticator(self) -> None:
        try:
            await self._try_reload()
            while self._reload_again:
                self._reload_again = False
                await self._try_reload()
        finally:
            self._reloading = None

    async def _try_reload(self) -> None:
        try:
            await self._gateway.admission.authenticator.reload()
        except AuthenticatorConfigError as error:
            for fault in error.faults:
                self._sink(Noticed("error", "authenticator not loaded, the old one stays", (("reason", fault),)))
            self._sink(Reloaded("authenticator", error.faults))
        else:
            self._sink(Noticed("info", "authenticator loaded anew"))
            self._sink(Reloaded("authenticator"))

    def _reload_certificates(self) -> None:
        """Reads certificates anew, for connections from here on. What cannot be used leaves the old ones in force."""
        try:
            client_tls = build_client_tls(self._settings)
            check_target_tls(self._settings)
        except TlsConfigError as error:
            self._sink(Noticed("error", "certificates not loaded, the old ones stay", (("reason", str(error)),)))
            self._sink(Reloaded("certificates", (str(error),)))
            return
        self._gateway.client_tls = client_tls
        self._gateway.targets.forget_certificates()
        self._sink(Noticed("info", "certificates loaded anew"))
        self._sink(Reloaded("certificates"))

    async def _drain(self) -> None:
        """Lets sessions go on until they end, the time is up, or a second signal comes."""
        self._gateway.draining = True
        for listener in self._listeners:
            listener.close()
        for session in list(self._gateway.sessions):
            session.refuse_login(shutting_down())
        self._gateway.idle = self._ended.set
        if self._gateway.sessions:
            await self._wait_for_end(self._settings.drain_timeout)
        if self._gateway.sessions:
            self._ended.clear()
            for session in list(self._gateway.sessions):
                session.end(CloseReason.SHUTDOWN, b"terminating connection due to administrator command")
            await self._wait_for_end(min(1.0, self._settings.close_timeout))
        if self._reloading is not None:
            self._reloading.cancel()
            await asyncio.wait([self._reloading])
        self._gateway.denials.flush()
        self._gateway.targets.warm.close()
        if self._gateway.releasing:
            await asyncio.wait(self._gateway.releasing, timeout=RELEASE_SECONDS)
        await self._gateway.admission.authenticator.close()

    async def _wait_for_end(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
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
        self._sink(Noticed("error", "internal error", tuple(facts)))
