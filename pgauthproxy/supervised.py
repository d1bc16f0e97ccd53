"""A worker that is one of several: what it does is the same, but a supervisor tells it what to do.

Signals are the supervisor's to hear: those of a terminal or a service manager may come to all of its processes. When
that is gone, the worker drains: nobody would replace it.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import Final

import uvloop

from pgauthproxy.auth.model import AuthenticatorConfigError
from pgauthproxy.build import build_audit, examine
from pgauthproxy.config.schema import Settings
from pgauthproxy.control import (
    Answered,
    Asked,
    Begin,
    BeSucceeded,
    CancelAsked,
    CancelDone,
    CancelQuestions,
    Channel,
    Drain,
    EndNow,
    Failed,
    Listen,
    Look,
    OpenAnew,
    Ping,
    Pong,
    Questions,
    Ready,
    Settle,
)
from pgauthproxy.events import Noticed, Reloading
from pgauthproxy.link import Link
from pgauthproxy.neighbours import Neighbours
from pgauthproxy.net import listen
from pgauthproxy.operators import open_console, remove_files
from pgauthproxy.ops.acts import Act, Pause, Reload, Shutdown, UnansweredError, act_on
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.log import LogSink
from pgauthproxy.ops.snapshot import Snapshot
from pgauthproxy.process import ignore_warnings, prepare_process
from pgauthproxy.shared_counts import hold
from pgauthproxy.upgrade import Relatives, hand_over
from pgauthproxy.worker import Place, Worker

GONE: Final = "the supervisor is gone"
NOBODY_WAITS: Final = -1
"""The ticket of a question that is not waited for."""
SUPERVISOR_SECONDS: Final = 5.0
"""How long it may take to ask all workers."""
CANNOT_BEGIN: Final = 2
"""Exit status: the supervisor was told why."""


def run(descriptor: int) -> None:
    """The whole life of a worker whose supervisor listens at the other end of this descriptor."""
    ignore_warnings()
    sys.exit(uvloop.run(_run(descriptor)))


async def _run(descriptor: int) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: None)
    channel = await Channel.open(socket.socket(fileno=descriptor))
    begin = await channel.receive()
    if not isinstance(begin, Begin):
        return 0
    prepare_process(core_dumps=begin.settings.core_dumps)
    sink = LogSink(begin.settings.log.format, begin.settings.log.level, worker=begin.slot)
    audit = build_audit(begin.settings, sink)
    try:
        if audit is not None:
            audit.open()
    except OSError as error:
        channel.send(Failed((f"audit.file: {begin.settings.audit.file}: {error.strerror}",)))
        channel.close()
        return CANNOT_BEGIN
    try:
        return await _serve(channel, begin, sink, audit)
    finally:
        if audit is not None:
            audit.close()
        sink.flush()
        channel.close()


async def _serve(channel: Channel, begin: Begin, sink: LogSink, audit: AuditSink | None) -> int:
    marked = zip(begin.listening, begin.proxy_protocol, strict=True)
    listening = [listen.take_over(descriptor, proxy_protocol=is_so) for descriptor, is_so in marked]
    authenticator, faults = examine(begin.settings, sink)
    if authenticator is None or faults:
        channel.send(Failed(tuple(faults)))
        return CANNOT_BEGIN
    if begin.ledger >= 0:
        hold(begin.ledger, begin.ledger_slots[begin.slot])
    latest = Latest(begin.settings)
    place = Place(
        begin.slot,
        begin.generation,
        removes_files=False,
        ledger=begin.ledger,
        ledger_slot=begin.ledger_slots[begin.slot],
        is_only=len(begin.inboxes) == 1,
    )
    worker = Worker(begin.settings, authenticator, listening, latest.read, sink, audit, place)
    try:
        await worker.start()
    except AuthenticatorConfigError as error:
        channel.send(Failed(error.faults))
        return CANNOT_BEGIN
    obeying = Obeying(channel, worker, latest, begin, sink, audit)
    attending = asyncio.get_running_loop().create_task(obeying.attend())
    open_console(worker.gateway, obeying.look, obeying.act, lambda: worker.reloads.settings, worker.sink)
    if begin.is_paused:
        obeying.pause()
    try:
        channel.send(Ready())
        await worker.serve()
        await worker.finish()
        await obeying.until_not_needed()
    finally:
        attending.cancel()
        await asyncio.wait([attending])
        await obeying.close()
        await worker.close()
    return 0


class Latest:
    """The settings that the supervisor has sent last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def read(self) -> Settings:
        return self.settings


class Obeying:
    """Does what the supervisor says, and passes on what concerns other workers too."""

    def __init__(
        self,
        channel: Channel,
        worker: Worker,
        latest: Latest,
        begin: Begin,
        sink: LogSink,
        audit: AuditSink | None,
    ) -> None:
        self._channel = channel
        self._worker = worker
        self._latest = latest
        self._removes_files = begin.removes_files
        self._successor = Link(socket.socket(fileno=begin.successor))
        self._predecessor = Link(socket.socket(fileno=begin.predecessor)) if begin.predecessor >= 0 else None
        self._relatives = Relatives(worker.gateway)
        self._taking_over: asyncio.Task[None] | None = None
        self._handing_over: asyncio.Task[None] | None = None
        self._is_in_force = False
        ledger, inbox = worker.gateway.limits.ledger, socket.socket(fileno=begin.inbox)
        self._neighbours = Neighbours(ledger, begin.slot, inbox, begin.inboxes, begin.ledger_slots)
        if begin.ledger >= 0:
            worker.pass_on = self._neighbours.pass_on
        self._sink = sink
        self._audit = audit
        self._cancels = CancelQuestions(channel.send)
        self._wishes = Questions[Snapshot | int]()
        self._answering: set[asyncio.Task[None]] = set()
        worker.gateway.ask_elsewhere = self._ask_elsewhere

    async def attend(self) -> None:
        """Until the supervisor is gone."""
        async for frame in self._channel.frames():
            match frame:
                case Ping():
                    self._channel.send(Pong())
                case Listen():
                    self._listen()
                case BeSucceeded():
                    self._be_succeeded()
                case Settle(settings):
                    self._latest.settings = settings
                    self._worker.reloads.reloading.ask()
                case OpenAnew():
                    if self._audit is not None:
                        self._audit(Reloading())
                case Drain(why):
                    self._neighbours.refuse()
                    self._worker.drain(("signal", why))
                case EndNow(why):
                    self._neighbours.refuse()
                    self._worker.end_now(("signal", why))
                case CancelAsked():
                    self._answer(self._cancel(frame))
                case CancelDone():
                    self._cancels.answered(frame)
                case Asked():
                    self._answer(self._do(frame))
                case Answered(ticket, said):
                    self._wishes.answered(ticket, said)
        self._orphaned()

    def _orphaned(self) -> None:
        self._sink(Noticed("warning", GONE))
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, self._worker.end_now, ("signal", signal.SIGTERM.name)
        )
        self._neighbours.refuse()
        self._cancels.give_up(GONE)
        self._wishes.give_up(GONE)
        if self._is_in_force:
            remove_files(self._latest.settings)
        if self._is_in_force and self._removes_files:
            for each in self._worker.listening:
                if each.family == socket.AF_UNIX and each.fileno() >= 0:
                    listen.remove_file(each.getsockname())
        self._worker.drain(("reason", GONE))

    def pause(self) -> None:
        """Has logins wait, as they do in the process whose sessions are to be taken over."""
        if self._predecessor is not None:
            self._relatives.pause(self._predecessor)
        else:
            act_on(self._worker.gateway, Pause())

    def _listen(self) -> None:
        self._is_in_force = True
        self._worker.listen()
        self._neighbours.open(self._worker.take_in)
        if self._predecessor is not None:
            self._taking_over = asyncio.get_running_loop().create_task(self._relatives.attend(self._predecessor))

    def _be_succeeded(self) -> None:
        self._is_in_force = False
        self._neighbours.close()
        self._worker.be_succeeded()
        self._handing_over = asyncio.get_running_loop().create_task(
            hand_over(self._relatives, self._worker.gateway, self._successor, self._sink)
        )

    async def until_not_needed(self) -> None:
        """For one that is succeeded: it may keep leases, and cancel requests for a predecessor go through it."""
        if self._handing_over is None:
            return
        await self._worker.until_told(asyncio.get_running_loop().create_task(self._relatives.until_all_is_given_back()))
        if self._taking_over is not None:
            await self._worker.until_told(self._taking_over)
        await self._worker.until_all_is_released()

    async def close(self) -> None:
        """Gives up what is under way."""
        self._neighbours.close()
        tasks = {*self._answering, *filter(None, (self._taking_over, self._handing_over))}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def look(self, rows: int) -> Snapshot:
        """The whole gateway's, as TakeSnapshot has it."""
        said = await self._ask(Look(rows))
        assert isinstance(said, Snapshot)  # noqa: S101 (what looks are answered with)
        return said

    async def act(self, act: Act) -> int:
        """On the whole gateway, as PerformAct has it."""
        if isinstance(act, Reload | Shutdown):
            # As with a signal, there is nothing to wait for; and who asks is to be told before it is done to him.
            self._channel.send(Asked(NOBODY_WAITS, act))
            return 0
        said = await self._ask(act)
        assert isinstance(said, int)  # noqa: S101 (what acts are answered with)
        return said

    async def _ask(self, wanted: Look | Act) -> Snapshot | int:
        try:
            return await self._wishes.ask(lambda ticket: self._channel.send(Asked(ticket, wanted)), SUPERVISOR_SECONDS)
        except TimeoutError:
            raise UnansweredError("the supervisor does not answer") from None

    def _answer(self, answering: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(answering)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _do(self, asked: Asked) -> None:
        """The supervisor wants to know what there is here, or has it changed."""
        own, wanted = self._worker.own, asked.wanted
        said = await (own.snapshot(wanted.rows) if isinstance(wanted, Look) else own.act(wanted))
        self._channel.send(Answered(asked.ticket, said))

    async def _ask_elsewhere(self, key: bytes) -> tuple[str, str]:
        gateway = self._worker.gateway
        if not gateway.keys.may_be_elsewhere(key):
            return await self._relatives.ask(key)
        return await self._cancels.ask(key, gateway.cancel_timeout)

    async def _cancel(self, asked: CancelAsked) -> None:
        """Another worker was asked for what is ours."""
        found, outcome = await self._worker.gateway.cancel(asked.key)
        if not found:
            found, outcome = await self._relatives.ask(asked.key)
        self._channel.send(CancelDone(asked.ticket, found, outcome))
