"""One process that serves: start, serve, drain. It may be the only one, or one of several (supervised.py)."""

import asyncio
import contextlib
import dataclasses
import math
import os
import resource
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import uvloop

from pgauthproxy import _spawn
from pgauthproxy.auth.model import Authenticator
from pgauthproxy.build import build_gateway, build_ledger, tcp_options
from pgauthproxy.config.schema import AuthenticatorSettings, Settings
from pgauthproxy.errors import GatewayFault
from pgauthproxy.events import CloseReason, Noticed, Refused, Sink, to_all
from pgauthproxy.gateway.session import Gateway, Session, shutting_down
from pgauthproxy.net import listen
from pgauthproxy.net.dial import tune
from pgauthproxy.net.listen import Listener
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.operators import Operators
from pgauthproxy.operators import open_listeners as open_admin_listeners
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.counts import Counts
from pgauthproxy.ops.log import LogSink
from pgauthproxy.pid_file import PidFile, PidFileError
from pgauthproxy.proto import messages
from pgauthproxy.reload import OneAtATime, Read, Reloads, warn_of_cleartext
from pgauthproxy.service import Service
from pgauthproxy.stages import Accepted
from pgauthproxy.upgrade import (
    Link,
    Relatives,
    Serving,
    TakeListening,
    UpgradeError,
    abandon,
    expect,
    hand_over_sessions,
    start_successor,
    take_listening,
)

DESCRIPTORS_FOR_ITSELF: Final = 64
DESCRIPTORS_FOR_OPERATORS: Final = 68
DESCRIPTORS_OF_A_SESSION: Final = 2
DESCRIPTORS_OF_AN_AUTHENTICATOR: Final = 10
RELEASE_SECONDS: Final = 5.0
"""How long the end waits for what sessions have given back to arrive."""
SESSIONS_BITS: Final = 40
"""Of a session's number; the rest is the generation of its worker."""
TellWhy = Callable[[tuple[str, object]], object]


def open_listeners(settings: Settings, inherited: Sequence[int] = ()) -> list[StreamSocket]:
    """Binds everything that is to be listened on, or nothing, unless these descriptors are it. Raises ListenError."""
    _fill_standard_descriptors()
    opened: list[StreamSocket] = []
    addresses = [(listen.parse_listen(each.address), each.proxy_protocol) for each in settings.listeners]
    try:
        opened += map(listen.take_over, inherited)
        for listening in opened:
            listening.proxy_protocol = any(is_so and listen.is_at(listening, where) for where, is_so in addresses)
        for address, is_so in addresses if not inherited else ():
            opened += listen.open_sockets(address, settings.backlog, proxy_protocol=is_so)
    except listen.ListenError:
        for listening in opened:
            listening.close()
        raise
    for listening in opened:
        # What is accepted inherits it.
        tune(listening, tcp_options(settings))
    return opened


def serve(
    settings: Settings,
    authenticator: Authenticator,
    listening: list[StreamSocket],
    admin_listening: list[StreamSocket],
    read: Read,
    log: LogSink,
    audit: AuditSink | None,
    service: Service,
    words: Sequence[str],
    link: Link | None,
) -> None:
    """Runs until a signal ends it; `read` reads the settings anew. The program is started anew, for an
    upgrade, with `words`; `link` leads to the process that is to be succeeded, if there is one.

    Raises AuthenticatorConfigError, PidFileError and UpgradeError if it cannot begin to.
    """
    ignore_warnings()
    prepare_process()
    place = Place(removes_files=not service.descriptors)
    worker = Worker(settings, authenticator, listening, read, log, audit, place)
    uvloop.run(_Alone(worker, log, service, words, admin_listening).run(link))


class _Alone:
    """A worker without a supervisor: it hears signals itself, and can be succeeded."""

    def __init__(
        self,
        worker: "Worker",
        sink: LogSink,
        service: Service,
        words: Sequence[str],
        admin_listening: list[StreamSocket],
    ) -> None:
        assert worker.operators is not None  # noqa: S101 (it is the only worker)
        self._worker = worker
        self._operators = worker.operators
        self._admin_listening = admin_listening
        self._sink = sink
        self._service = service
        self._words = words
        self._pid_file = PidFile(worker.reloads.settings.pid_file)
        self._relatives = Relatives(worker.gateway)
        self._upgrading = OneAtATime(self._upgrade)
        self._is_succeeded = False
        self._handing_over: asyncio.Task[None] | None = None

    async def run(self, predecessor: Link | None) -> None:
        worker = self._worker
        await worker.start()
        attending: asyncio.Task[None] | None = None
        # Until the predecessor knows, the files of sockets are its own.
        is_in_force = predecessor is None
        try:
            if predecessor is not None:
                generation, removes_files, listening, self._admin_listening = await take_listening(predecessor)
                worker.succeed(generation, removes_files, listening)
                self._admin_listening = self._fitting(self._admin_listening)
            hear_signals(worker.drain, worker.end_now, worker.reloads.reloading, self._service)
            self._pid_file.take()
            worker.listen()
            announce(worker.reloads.settings, worker.listening, self._sink)
            self._operators.serve(self._admin_listening)
            self._service.ready()
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGUSR2, self._upgrading.ask)
            if predecessor is not None:
                await predecessor.send(Serving())
                is_in_force = True
                attending = loop.create_task(self._relatives.attend(predecessor))
            await worker.serve()
            self._pid_file.give_up()
            if not self._is_succeeded:
                self._service.stopping()
            await worker.finish()
            if self._is_succeeded and attending is not None:
                # Cancel requests for its sessions go through this process.
                await worker.until_told(attending)
        finally:
            self._pid_file.give_up()
            for task in (attending, self._handing_over):
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])
            await self._upgrading.close()
            await self._operators.close(removes_files=is_in_force)
            await worker.close()
        self._sink(Noticed("info", "ended"))

    async def _upgrade(self) -> None:
        if self._is_succeeded or self._worker.is_draining:
            self._sink(Noticed("warning", "not upgraded: this process is on its way out"))
            return
        try:
            pid, link = await start_successor(self._words, self._service.environment)
        except UpgradeError as error:
            self._failed(error)
            return
        if self._worker.is_draining:
            abandon(pid, link)
            return
        self._worker.pause()
        self._pid_file.give_up()
        try:
            await link.send(
                TakeListening(
                    self._worker.generation + 1,
                    self._worker.removes_files,
                    tuple(each.proxy_protocol for each in self._worker.listening),
                    len(self._operators.listening),
                ),
                [each.fileno() for each in (*self._worker.listening, *self._operators.listening)],
            )
            await expect(link, Serving)
        except UpgradeError as error:
            abandon(pid, link)
            with contextlib.suppress(PidFileError):
                self._pid_file.take()
            self._worker.listen()
            self._failed(error)
            return
        self._sink(Noticed("info", "succeeded by another process", (("pid", pid),)))
        self._service.hand_to(pid)
        self._is_succeeded = True
        await self._operators.close(removes_files=False)
        self._worker.be_succeeded()
        self._handing_over = asyncio.get_running_loop().create_task(self._hand_over(link))

    def _fitting(self, taken: list[StreamSocket]) -> list[StreamSocket]:
        """What operators are to be served on, of what was taken over. Raises ListenError."""
        settings = self._worker.reloads.settings
        if taken and settings.admin.listen:
            return taken
        for each in taken:
            each.close()
        return open_admin_listeners(settings)

    async def _hand_over(self, link: Link) -> None:
        attending = asyncio.get_running_loop().create_task(self._relatives.attend(link))
        try:
            await hand_over_sessions(self._worker.gateway, link, self._sink)
            await attending
        finally:
            attending.cancel()
            await asyncio.wait([attending])

    def _failed(self, error: UpgradeError) -> None:
        self._sink(Noticed("error", "upgrade failed, this process goes on", (("reason", str(error)),)))


def hear_signals(drain: TellWhy, end_now: TellWhy, reloading: OneAtATime, service: Service) -> None:
    """SIGTERM and SIGINT drain at first, and end at once when one comes again; SIGHUP reloads.

    The service manager is told of reloads.
    """
    heard: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        heard.append(number)
        (drain if len(heard) == 1 else end_now)(("signal", number.name))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)

    def reload() -> None:
        service.reloading()
        reloading.ask()

    reloading.when_done = service.ready
    loop.add_signal_handler(signal.SIGHUP, reload)


def announce(settings: Settings, listening: Sequence[StreamSocket], sink: Sink) -> None:
    """Tells where clients may connect now."""
    for each in listening:
        sink(Noticed("info", "listening", (("address", listen.describe(each)),)))
    warn_of_cleartext(settings, listening, sink)


def ignore_warnings() -> None:
    """What libraries tell their developers, of a certificate that a peer shows say, is nothing for the log."""
    warnings.simplefilter("ignore")


def prepare_process() -> None:
    """Closes what credentials could leak through, and raises the limit on descriptors."""
    _spawn.keep_descriptors_private()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def fitting(settings: Settings, sink: Sink) -> Settings:
    """The settings with no more clients and logins than there are descriptors for.

    A login that has not named itself holds one; there may be max_logins of them besides the clients.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return settings
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands among others: its slot, which its successor has too, and its own generation.

    `removes_files`: those of Unix sockets, once it listens no more. `ledger`: the descriptor of the counts that they
    share. `is_only`: whether it is the whole gateway, which operators see then. `process`: whom signals go to.
    """

    slot: int = 0
    generation: int = 0
    removes_files: bool = True
    ledger: int = -1
    is_only: bool = True
    process: int = field(default_factory=os.getpid)


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
        sink = self._sink = log if audit is None else to_all(audit, log)
        counts = Counts()
        place = self._place = place or Place()
        self.listening = listening
        fitted = fitting(settings, log)
        ledger = build_ledger(fitted, place.ledger, place.slot)
        self.gateway: Gateway = build_gateway(fitted, authenticator, to_all(sink, counts), ledger, audit, place.slot)
        self.reloads = Reloads(self.gateway, settings, fitted, listening, read, fitting, sink, log, audit)
        self.operators = (
            Operators(self.gateway, counts, lambda: self.reloads.settings, place.process, sink)
            if place.is_only
            else None
        )
        self._listeners: list[Listener] = []
        self._sessions_begun = place.generation << SESSIONS_BITS
        self._is_draining = False
        self._leaving = asyncio.Event()
        self._told = asyncio.Event()
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Raises AuthenticatorConfigError if the authenticator cannot be started."""
        await self.gateway.admission.authenticator.start()
        loop = asyncio.get_running_loop()
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
            self._sink(Noticed("info", "shutting down", (fact, ("sessions", len(self.gateway.sessions)))))
            self._leaving.set()
            self._told.set()

    def end_now(self, fact: tuple[str, object]) -> None:
        """Ends it without waiting for sessions."""
        self._sink(Noticed("warning", "ending at once", (fact,)))
        self._is_draining = self.gateway.draining = True
        self._leaving.set()
        self._told.set()
        self._ended.set()

    def _accepted(self, connection: socket.socket, peer: Any, proxied: bool) -> None:
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
        self._sink(Noticed("error", "accepting pauses", (("reason", error.strerror),)))

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
        if self.gateway.releasing:
            await asyncio.wait(self.gateway.releasing, timeout=RELEASE_SECONDS)
        await self.reloads.close()

    async def until_told(self, task: "asyncio.Task[None]") -> None:
        """Waits for a task, but no longer than until this worker is told to drain."""
        told = asyncio.get_running_loop().create_task(self._told.wait())
        self._told.clear()
        await asyncio.wait([task, told], return_when=asyncio.FIRST_COMPLETED)
        told.cancel()

    async def close(self) -> None:
        """Gives back what is left."""
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
        self._sink(Noticed("error", "internal error", tuple(facts)))
