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
import os
import secrets
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from typing import Final

from pgauthproxy.build import examine, with_lasting_seed
from pgauthproxy.config.load import ConfigError
from pgauthproxy.config.schema import Settings
from pgauthproxy.control import (
    Answered,
    Asked,
    Begin,
    BeSucceeded,
    CancelAsked,
    CancelDone,
    Channel,
    Drain,
    EndNow,
    Failed,
    Listen,
    Look,
    OpenAnew,
    Ping,
    Ready,
    Settle,
    ToWorker,
)
from pgauthproxy.events import Noticed, Reloaded, Reloading, ignore, to_all
from pgauthproxy.link import Link, Serving, TakeGateway, TakeSlot
from pgauthproxy.net import listen
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.operators import Operators
from pgauthproxy.ops.acts import Pause, Resume
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.log import LogSink
from pgauthproxy.passing import CancelPassing
from pgauthproxy.pid_file import PidFile
from pgauthproxy.process import announce, hear_no_more, hear_signals, prepare_process
from pgauthproxy.reload import CONFIGURATION, LOADED, NOT_LOADED, OneAtATime, Read, changed_keys, complain, keep_fixed
from pgauthproxy.service import Service
from pgauthproxy.shared_counts import SharedCounts
from pgauthproxy.slots import Child, Slot, kill, start_worker
from pgauthproxy.upgrade import UpgradeError, offer_all, start_successor, take_gateway, when_exited
from pgauthproxy.whole import Part, Whole

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


class WorkersFailedError(Exception):
    """No worker can begin; `faults` says why, one line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


def supervise(
    settings: Settings,
    slots: list[Slot],
    admin_listening: list[StreamSocket],
    read: Read,
    log: LogSink,
    audit: AuditSink | None,
    service: Service,
    words: Sequence[str],
    link: Link | None,
    ledger: int,
) -> None:
    """Runs until a signal ends it. The program is started anew, for an upgrade, with `words`; `link` leads to the
    supervisor that is to be succeeded, if there is one, and `ledger` is the descriptor of what that counts in.

    Raises WorkersFailedError, PidFileError and UpgradeError if it cannot begin to.
    """
    prepare_process(core_dumps=settings.core_dumps)
    # Those of a gateway that is to be succeeded are asked for later, once it has said which parts of them it has.
    counts = SharedCounts.begin(settings, len(slots)) if link is None else SharedCounts(-1, (), None)
    supervisor = Supervisor(settings, slots, admin_listening, counts, read, log, audit, service, words)
    asyncio.run(supervisor.run(link, ledger))


class Supervisor:
    """States, in order: starting, serving, draining or succeeded, ended."""

    def __init__(
        self,
        settings: Settings,
        slots: list[Slot],
        admin_listening: list[StreamSocket],
        counts: SharedCounts,
        read: Read,
        log: LogSink,
        audit: AuditSink | None,
        service: Service,
        words: Sequence[str],
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
        self._words = words
        self._pid_file = PidFile(settings.pid_file)
        self._removes_files = not service.descriptors
        self._children: dict[int, Child] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._generations = 0
        self._faults: dict[str, None] = {}
        self._cancels = CancelPassing(self._child_at, self._tell)
        self._is_serving = False
        self._is_in_force = True
        """Whether files of sockets are its own to remove."""
        self._is_draining = False
        self._is_succeeded = False
        self._why = ""
        self._begun = asyncio.Event()
        self._leaving = asyncio.Event()
        self._ended = asyncio.Event()
        self._reloading = OneAtATime(self._reload, lambda: sink(Reloading()))
        self._upgrading = OneAtATime(self._upgrade)
        self._whole = Whole(lambda: self._is_draining, audit)
        self._operators = Operators(admin_listening, self._whole.snapshot, self._whole.act, sink)

    async def run(self, predecessor: Link | None, ledger: int) -> None:
        if predecessor is not None:
            await self._take_over(predecessor, ledger)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._collect)
        loop.add_signal_handler(signal.SIGUSR2, self._upgrading.ask)
        hear_signals(self._drain, self._end_now, self._reloading, self._service)
        for number in range(len(self._slots)):
            self._start(number)
        watching = loop.create_task(self._watch())
        try:
            await self._begun.wait()
            if self._faults:
                self._drain(("reason", "workers cannot begin"))
            else:
                await self._serve(predecessor)
            if not self._is_succeeded:
                self._service.stopping()
            self._close_sockets()
            self._check_end()
            await self._ended.wait()
        finally:
            watching.cancel()
            self._pid_file.give_up()
            await self._reloading.close()
            await self._upgrading.close()
            await self._operators.close(removes_files=self._is_in_force)
            for task in self._tasks:
                task.cancel()
            await asyncio.wait([watching, *self._tasks])
            hear_no_more()
        if self._faults:
            raise WorkersFailedError(list(self._faults))
        self._sink(Noticed("info", "ended"))

    async def _serve(self, predecessor: Link | None) -> None:
        try:
            self._pid_file.take()
            if not self._is_draining:
                self._is_serving = True
                for child in self._children.values():
                    self._tell(child, Listen())
                announce(self._settings, self._slots[0].listening, self._sink)
                self._operators.serve(self._settings)
                self._service.ready()
                if predecessor is not None:
                    await predecessor.send(Serving())
                    when_exited(predecessor.other, self._counts.forget_the_dead)
                    predecessor.close()
                    self._operators.drop_unwanted()
                self._is_in_force = True
                await self._leaving.wait()
            self._pid_file.give_up()
        except BaseException:
            self._end_now(("reason", "it cannot begin"))
            raise

    # Upgrades

    async def _take_over(self, predecessor: Link, ledger: int) -> None:
        """Everything but the sessions, which workers take from workers. Raises UpgradeError."""
        self._is_in_force = False
        taken, admin_listening, slots = await take_gateway(predecessor)
        self._generations, self._removes_files, self._seed = taken.generation, taken.removes_files, taken.seed
        self._whole.is_paused = taken.is_paused
        self._operators.take_over(self._settings, admin_listening)
        self._slots = [Slot(listening, inbox, predecessor=worker) for listening, inbox, worker in slots]
        if ledger >= 0:
            self._counts = SharedCounts.share(self._settings, ledger, len(slots), taken.ledger_slots)
        else:
            self._counts = SharedCounts.begin(self._settings, len(slots))

    async def _upgrade(self) -> None:
        reason = ""
        if not self._is_serving or self._is_draining or self._is_succeeded:
            reason = "not upgraded: this process is on its way, in or out"
        elif os.getpid() == 1:
            reason = "not upgraded: the first process of a container cannot be another"
        if reason:
            self._sink(Noticed("warning", reason))
            return
        try:
            pid, link = await start_successor(
                self._words,
                self._service.environment,
                self._counts.descriptor,
                self._counts.forget_the_dead,
                len(self._slots),
            )
            await offer_all(pid, link, self._offer, self._pid_file, lambda: self._is_draining)
        except UpgradeError as error:
            self._sink(Noticed("error", "upgrade failed, this process goes on", (("reason", str(error)),)))
            return
        link.close()
        self._sink(Noticed("info", "succeeded by another process", (("pid", pid),)))
        self._service.hand_to(pid)
        await self._be_succeeded()

    async def _offer(self, link: Link) -> None:
        """Offers everything but the sessions."""
        operators_sockets = [each.fileno() for each in self._operators.listening]
        paused = self._whole.is_paused
        said = TakeGateway(
            self._generations, self._removes_files, paused, self._seed, len(self._slots), tuple(self._counts.slots)
        )
        await link.send(said, operators_sockets)
        for slot in self._slots:
            marks = tuple(each.proxy_protocol for each in slot.listening)
            descriptors = [each.fileno() for each in (*slot.listening, *slot.inbox)]
            child = slot.child
            has_worker = child is not None and child.is_ready
            if child is not None and child.is_ready:
                descriptors.append(child.successor.fileno())
            await link.send(TakeSlot(marks, has_worker), descriptors)

    async def _be_succeeded(self) -> None:
        self._is_succeeded = True
        self._is_in_force = False
        await self._operators.close(removes_files=False)
        for slot in self._slots:
            if slot.retry is not None:
                slot.retry.cancel()
        for child in self._children.values():
            # It has to see when its successor is gone.
            child.successor.close()
            if child.is_ready:
                self._tell(child, BeSucceeded())
            else:
                kill(child)
        self._leaving.set()

    # Workers' lives

    def _start(self, number: int) -> None:
        slot = self._slots[number]
        slot.retry = None
        ours, theirs = socket.socketpair()
        successor, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        relatives = (slot.predecessor, worker_end.fileno())
        try:
            pid = start_worker(theirs, slot, self._inboxes(), self._counts.descriptor, relatives)
        except OSError as error:
            ours.close()
            successor.close()
            if self._is_serving:
                self._sink(Noticed("error", "worker not started", (("worker", number), ("reason", error.strerror))))
                self._replace_later(number)
            else:
                self._faults[f"workers cannot be started: {sys.executable}: {error.strerror}"] = None
                self._begun.set()
            return
        finally:
            theirs.close()
            worker_end.close()
            if slot.predecessor >= 0:
                os.close(slot.predecessor)
                slot.predecessor = -1
        now = asyncio.get_running_loop().time()
        child = slot.child = self._children[pid] = Child(
            number, self._generations, pid, ours, now, successor, relatives
        )
        self._generations += 1
        self._spawn_task(self._attend(child))

    def _spawn_task(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attend(self, child: Child) -> None:
        channel = child.channel = await Channel.open(child.connection)
        child.was_paused = self._whole.is_paused
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
            tuple(self._counts.slots),
            self._slots[child.slot].inbox[0].fileno(),
            self._inboxes(),
            child.was_paused,
            *child.relatives,
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
                        self._cancels.pass_on(child, frame)
                    case CancelDone():
                        self._cancels.pass_back(frame)
                    case Asked():
                        self._spawn_task(self._do(child, frame))
                    case Answered() if child.part is not None:
                        child.part.answered(frame)
        finally:
            channel.close()

    def _ready(self, child: Child) -> None:
        child.is_ready = True
        child.part = Part(lambda asked: self._tell(child, asked))
        self._whole.join(child.part)
        if self._whole.is_paused != child.was_paused:
            self._spawn_task(self._pause_anew(child.part))
        facts = (("worker", child.slot), ("pid", child.pid))
        self._sink(Noticed("info", "worker ready", facts))
        if self._is_serving:
            self._tell(child, Listen())
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
        expected = (self._is_draining or self._is_succeeded) and code == 0
        child.successor.close()
        self._sink(Noticed("info" if expected else "error", "worker ended", facts))
        self._cancels.owner_gone(child)
        if child.part is not None:
            self._whole.leave(child.part)
        slot = self._slots[child.slot]
        slot.child = None
        self._counts.forget(self._counts.slots[child.slot])
        if self._is_draining or self._is_succeeded:
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
                    kill(child)
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
                kill(child)
        self._begun.set()
        self._leaving.set()

    def _end_now(self, fact: tuple[str, object]) -> None:
        self._drain(fact)
        self._sink(Noticed("warning", "ending at once", (fact,)))
        for child in self._children.values():
            self._tell(child, EndNow(str(fact[1])))
        asyncio.get_running_loop().call_later(END_SECONDS, self._kill_all)

    def _kill_all(self) -> None:
        for child in self._children.values():
            kill(child)

    def _check_end(self) -> None:
        if (self._is_draining or self._is_succeeded) and not self._children:
            self._ended.set()

    def _close_sockets(self) -> None:
        """Workers have closed theirs, or will: nobody is to wait in a queue that is never served."""
        for each in {each for slot in self._slots for each in slot.listening}:
            if self._is_in_force and self._removes_files and each.family == socket.AF_UNIX:
                listen.remove_file(each.getsockname())
            each.close()

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

    def _inboxes(self) -> tuple[int, ...]:
        return tuple(slot.inbox[1].fileno() for slot in self._slots)

    def _child_at(self, number: int) -> Child | None:
        return self._slots[number].child if number < len(self._slots) else None

    def _tell(self, child: Child, frame: ToWorker) -> bool:
        return child.channel is not None and child.channel.send(frame)

    async def _do(self, asker: Child, asked: Asked) -> None:
        """An operator is at this worker's console."""
        wanted = asked.wanted
        said = await (self._whole.snapshot(wanted.rows) if isinstance(wanted, Look) else self._whole.act(wanted))
        self._tell(asker, Answered(asked.ticket, said))

    async def _pause_anew(self, part: Part) -> None:
        """It began while that was changed."""
        await part.act(Pause() if self._whole.is_paused else Resume())
