"""Several workers: the supervisor serves no traffic and knows nothing of PostgreSQL.

Strategy:
- It opens a socket for each worker and each TCP address, all bound to the same port, and keeps them: when a worker
  dies, who waits in its queue is served by its successor. A Unix socket is one for all.
- A worker is the same program, started anew, with its sockets and one end of a socket pair. That pair is all they have
  in common: its end of file tells each that the other is gone.
- A worker that dies is replaced at once, then more and more slowly if it keeps dying. One that shows no sign of life is
  killed. The others are not touched.
- The settings are read and checked here, and sent to all: a file that is bad by the time a worker is replaced keeps no
  worker from starting.
- As the first process of a container it has orphans to collect, so that it collects every child there is.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pgauthproxy import program
from pgauthproxy._ledger import Ledger
from pgauthproxy.build import build_ledger, examine, with_lasting_seed
from pgauthproxy.config.load import ConfigError
from pgauthproxy.config.schema import Settings
from pgauthproxy.control import (
    Begin,
    CancelAsked,
    CancelDone,
    Channel,
    Drain,
    EndNow,
    Failed,
    OpenAnew,
    Ping,
    Ready,
    Settle,
)
from pgauthproxy.events import Noticed, Reloaded, Reloading, ignore, to_all
from pgauthproxy.gateway.cancel import NOBODYS, slot_of
from pgauthproxy.net import listen
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.log import LogSink
from pgauthproxy.pid_file import PidFile
from pgauthproxy.process import announce, hear_signals, prepare_process
from pgauthproxy.reload import CONFIGURATION, LOADED, NOT_LOADED, OneAtATime, Read, changed_keys, complain, keep_fixed
from pgauthproxy.service import Service

START_SECONDS: Final = 60.0
"""How long a worker may take to begin."""
SETTLED_SECONDS: Final = 10.0
"""Who has lived for so long is not one that keeps dying."""
FIRST_BACK_OFF_SECONDS: Final = 0.1
LONGEST_BACK_OFF_SECONDS: Final = 30.0
SIGNS_OF_LIFE: Final = 3
"""How often a worker is asked for one in its time-out."""
END_SECONDS: Final = 5.0
"""How long workers that are to end at once may take."""
MOST_CANCELS: Final = 1024
"""Cancel requests between workers that are under way at once."""


class WorkersFailedError(Exception):
    """No worker can begin; `faults` says why, one line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


@dataclass(eq=False, slots=True)
class Child:
    """A worker's process."""

    slot: int
    generation: int
    pid: int
    connection: socket.socket
    born: float
    channel: Channel | None = None
    is_ready: bool = False
    silent: int = 0
    """How many times in a row it was asked for a sign of life, or was not ready to be."""


@dataclass(slots=True)
class Slot:
    """A place for a worker, with the sockets of whoever has it."""

    listening: list[StreamSocket]
    child: Child | None = None
    deaths: int = 0
    retry: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Passing:
    """A cancel request on its way from one worker to another."""

    asker: Child
    ticket: int
    owner: Child = field(repr=False)


def open_slots(settings: Settings, count: int, listening: list[StreamSocket], service: Service) -> list[Slot]:
    """Places for so many workers. Raises ListenError.

    All sockets of an address must be opened by the same user, and some ports by root: here, before anything else.
    """
    # What a service manager has opened is its own: there is one for all.
    again = (lambda each: each) if service.descriptors else (lambda each: listen.open_again(each, settings.backlog))
    return [Slot(listening), *(Slot(list(map(again, listening))) for _ in range(count - 1))]


def supervise(
    settings: Settings, slots: list[Slot], read: Read, log: LogSink, audit: AuditSink | None, service: Service
) -> None:
    """Runs until a signal ends it. Raises WorkersFailedError and PidFileError if it cannot begin to."""
    prepare_process()
    counts = Counts(settings)
    asyncio.run(Supervisor(settings, slots, counts, read, log, audit, service).run())


class Counts:
    """What workers share: the memory in which they count, where there is such a thing."""

    def __init__(self, settings: Settings) -> None:
        self.descriptor = os.memfd_create("pgauthproxy-ledger") if hasattr(os, "memfd_create") else -1
        self._ledger: Ledger | None = build_ledger(settings, self.descriptor) if self.descriptor >= 0 else None

    def forget(self, slot: int) -> None:
        """Its worker is no more."""
        if self._ledger is not None:
            self._ledger.clear_slot(slot)


class Supervisor:
    """States, in order: starting, serving, draining, ended."""

    def __init__(
        self,
        settings: Settings,
        slots: list[Slot],
        counts: Counts,
        read: Read,
        log: LogSink,
        audit: AuditSink | None,
        service: Service,
    ) -> None:
        sink = log if audit is None else to_all(audit, log)
        self._seed = secrets.token_hex(32)
        self._settings = settings
        self._slots = slots
        self._read = read
        self._counts = counts
        self._log = log
        self._sink = sink
        self._service = service
        self._removes_files = not service.descriptors
        self._children: dict[int, Child] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._generations = 0
        self._faults: dict[str, None] = {}
        self._passing: dict[int, Passing] = {}
        self._tickets = 0
        self._is_serving = False
        self._is_draining = False
        self._why = ""
        self._begun = asyncio.Event()
        self._drained = asyncio.Event()
        self._ended = asyncio.Event()
        self._reloading = OneAtATime(self._reload, lambda: sink(Reloading()))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._collect)
        loop.add_signal_handler(signal.SIGUSR2, self._refuse_upgrade)
        hear_signals(self._drain, self._end_now, self._reloading, self._service)
        for number in range(len(self._slots)):
            self._start(number)
        watching = loop.create_task(self._watch())
        try:
            await self._begun.wait()
            if self._faults:
                self._drain(("reason", "workers cannot begin"))
            else:
                await self._serve()
            self._service.stopping()
            self._close_sockets()
            self._check_end()
            await self._ended.wait()
        finally:
            watching.cancel()
            await self._reloading.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.wait([watching, *self._tasks])
        if self._faults:
            raise WorkersFailedError(list(self._faults))
        self._sink(Noticed("info", "ended"))

    async def _serve(self) -> None:
        try:
            with PidFile(self._settings.pid_file):
                if not self._is_draining:
                    self._is_serving = True
                    announce(self._settings, self._slots[0].listening, self._sink)
                    self._service.ready()
                    await self._drained.wait()
        except BaseException:
            self._end_now(("reason", "it cannot begin"))
            raise

    # Workers' lives

    def _start(self, number: int) -> None:
        slot = self._slots[number]
        slot.retry = None
        ours, theirs = socket.socketpair()
        try:
            pid = _spawn_worker(theirs, slot.listening, self._counts.descriptor)
        except OSError as error:
            ours.close()
            if self._is_serving:
                self._sink(Noticed("error", "worker not started", (("worker", number), ("reason", error.strerror))))
                self._replace_later(number)
            else:
                self._faults[f"workers cannot be started: {sys.executable}: {error.strerror}"] = None
                self._begun.set()
            return
        finally:
            theirs.close()
        now = asyncio.get_running_loop().time()
        child = slot.child = self._children[pid] = Child(number, self._generations, pid, ours, now)
        self._generations += 1
        self._spawn_task(child)

    def _spawn_task(self, child: Child) -> None:
        task = asyncio.get_running_loop().create_task(self._attend(child))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attend(self, child: Child) -> None:
        channel = child.channel = await Channel.open(child.connection)
        settings = with_lasting_seed(self._settings, self._seed)
        listening = self._slots[child.slot].listening
        begin = Begin(
            child.slot,
            child.generation,
            settings,
            tuple(each.fileno() for each in listening),
            tuple(each.proxy_protocol for each in listening),
            self._removes_files,
            self._counts.descriptor,
            len(self._slots) == 1,
        )
        channel.send(begin)
        try:
            async for frame in channel.frames():
                child.silent = 0
                match frame:
                    case Ready():
                        self._ready(child)
                    case Failed(faults):
                        self._failed(child, faults)
                    case CancelAsked():
                        self._pass_on(child, frame)
                    case CancelDone(ticket, session, outcome):
                        self._pass_back(ticket, session, outcome)
        finally:
            channel.close()

    def _ready(self, child: Child) -> None:
        child.is_ready = True
        facts = (("worker", child.slot), ("pid", child.pid))
        self._sink(Noticed("info", "worker ready", facts))
        if self._is_draining:
            self._tell(child, Drain(self._why))
        if all(slot.child is not None and slot.child.is_ready for slot in self._slots):
            self._begun.set()

    def _failed(self, child: Child, faults: Sequence[str]) -> None:
        if self._is_serving:
            complain(self._sink, f"worker {child.slot} cannot begin", *faults)
        else:
            self._faults |= dict.fromkeys(faults)
            self._begun.set()

    def _collect(self) -> None:
        """Collects every child that has ended: workers, and what others left to the first process of a container."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if (child := self._children.pop(pid, None)) is not None:
                self._gone(child, os.waitstatus_to_exitcode(status))

    def _gone(self, child: Child, code: int) -> None:
        how = ("signal", signal.Signals(-code).name) if code < 0 else ("status", code)
        facts = (("worker", child.slot), ("pid", child.pid), how)
        expected = self._is_draining and code == 0
        self._sink(Noticed("info" if expected else "error", "worker ended", facts))
        for ticket, passing in list(self._passing.items()):
            if passing.owner is child:
                self._pass_back(ticket, "", "not passed on: its worker is gone")
        slot = self._slots[child.slot]
        slot.child = None
        self._counts.forget(child.slot)
        if self._is_draining:
            self._check_end()
        elif not self._is_serving and not self._faults:
            self._faults[f"worker {child.slot} ended while it began, with {how[0]} {how[1]}"] = None
            self._begun.set()
        elif self._is_serving:
            if asyncio.get_running_loop().time() - child.born > SETTLED_SECONDS:
                slot.deaths = 0
            self._replace_later(child.slot)

    def _replace_later(self, number: int) -> None:
        """At once after the first death in a row, then later and later."""
        slot = self._slots[number]
        slot.deaths += 1
        delay = 0.0 if slot.deaths == 1 else FIRST_BACK_OFF_SECONDS * 2.0 ** min(slot.deaths - 2, 16)
        slot.retry = asyncio.get_running_loop().call_later(min(delay, LONGEST_BACK_OFF_SECONDS), self._start, number)

    async def _watch(self) -> None:
        """Kills workers that show no sign of life. A pause of this process itself counts for little."""
        while True:
            await asyncio.sleep(self._settings.worker_timeout / SIGNS_OF_LIFE)
            for child in list(self._children.values()):
                most = SIGNS_OF_LIFE
                if not child.is_ready:
                    most = max(most, int(START_SECONDS * SIGNS_OF_LIFE / self._settings.worker_timeout))
                if child.silent >= most:
                    facts = (("worker", child.slot), ("pid", child.pid))
                    self._sink(Noticed("error", "worker killed: it shows no sign of life", facts))
                    _kill(child)
                else:
                    child.silent += 1
                    if child.is_ready:
                        self._tell(child, Ping())

    # Ending

    def _drain(self, fact: tuple[str, object]) -> None:
        if self._is_draining:
            return
        self._is_draining = True
        self._why = str(fact[1])
        self._sink(Noticed("info", "shutting down", (fact, ("workers", len(self._children)))))
        for slot in self._slots:
            if slot.retry is not None:
                slot.retry.cancel()
        for child in self._children.values():
            if child.is_ready:
                self._tell(child, Drain(self._why))
            else:
                # It has nobody to take leave of.
                _kill(child)
        self._begun.set()
        self._drained.set()

    def _end_now(self, fact: tuple[str, object]) -> None:
        self._drain(fact)
        self._sink(Noticed("warning", "ending at once", (fact,)))
        for child in self._children.values():
            self._tell(child, EndNow(str(fact[1])))
        asyncio.get_running_loop().call_later(END_SECONDS, self._kill_all)

    def _kill_all(self) -> None:
        for child in self._children.values():
            _kill(child)

    def _check_end(self) -> None:
        if self._is_draining and not self._children:
            self._ended.set()

    def _close_sockets(self) -> None:
        """Workers have closed theirs, or will: nobody is to wait in a queue that is never served."""
        for each in {each for slot in self._slots for each in slot.listening}:
            if self._removes_files and each.family == socket.AF_UNIX:
                listen.remove_file(each.getsockname())
            each.close()

    def _refuse_upgrade(self) -> None:
        self._sink(Noticed("warning", "not upgraded: with several workers that is a restart"))

    # Settings

    async def _reload(self) -> None:
        try:
            wanted = await asyncio.to_thread(self._read)
        except ConfigError as error:
            self._keep_settings(error.faults)
            return
        _, faults = await asyncio.to_thread(examine, wanted, ignore)
        if faults:
            self._keep_settings(faults)
            return
        old, self._settings = self._settings, keep_fixed(self._settings, wanted, self._sink)
        self._log.change(self._settings.log.format, self._settings.log.level)
        changed = changed_keys(old, self._settings)
        self._sink(Noticed("info", LOADED, (("changed", ", ".join(changed) or "nothing"),)))
        self._sink(Reloaded(CONFIGURATION))
        settings = with_lasting_seed(self._settings, self._seed)
        for child in self._children.values():
            self._tell(child, Settle(settings))

    def _keep_settings(self, faults: Sequence[str]) -> None:
        """The new ones are not to be used; but files that were asked for anew are opened anew everywhere."""
        complain(self._sink, NOT_LOADED, *faults)
        self._sink(Reloaded(CONFIGURATION, tuple(faults)))
        for child in self._children.values():
            self._tell(child, OpenAnew())

    # Between workers

    def _tell(self, child: Child, frame: Drain | EndNow | Ping | Settle | OpenAnew | CancelAsked | CancelDone) -> bool:
        return child.channel is not None and child.channel.send(frame)

    def _pass_on(self, asker: Child, asked: CancelAsked) -> None:
        number = slot_of(asked.key)
        owner = self._slots[number].child if number < len(self._slots) else None
        if owner is None or owner is asker:
            self._tell(asker, CancelDone(asked.ticket, "", NOBODYS))
        elif len(self._passing) >= MOST_CANCELS:
            self._tell(asker, CancelDone(asked.ticket, "", "not passed on: too many cancel requests"))
        else:
            self._tickets += 1
            self._passing[self._tickets] = Passing(asker, asked.ticket, owner)
            if not self._tell(owner, CancelAsked(self._tickets, asked.key)):
                self._pass_back(self._tickets, "", "not passed on: its worker takes nothing")

    def _pass_back(self, ticket: int, session: str, outcome: str) -> None:
        passing = self._passing.pop(ticket, None)
        if passing is not None:
            self._tell(passing.asker, CancelDone(passing.ticket, session, outcome))


def _spawn_worker(control: socket.socket, listening: Sequence[socket.socket], ledger: int) -> int:
    """Starts this program as a worker. It inherits these descriptors, and no others."""
    shared = [control.fileno(), *(each.fileno() for each in listening), *([ledger] if ledger >= 0 else [])]
    return program.start(["worker", str(control.fileno())], shared, os.environ)


def _kill(child: Child) -> None:
    # It is not collected yet, so that its number is its own.
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
