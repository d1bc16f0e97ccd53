"""A worker without a supervisor: it hears signals itself, and can be succeeded (upgrade.py)."""

import asyncio
import signal
from collections.abc import Sequence

import uvloop

from pgauthproxy.auth.model import Authenticator
from pgauthproxy.config.schema import Settings
from pgauthproxy.events import Noticed, ignore
from pgauthproxy.link import Link, Serving, TakeListening
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.operators import Operators, open_console
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.log import LogSink
from pgauthproxy.pid_file import PidFile
from pgauthproxy.process import announce, fitting, hear_no_more, hear_signals, ignore_warnings, prepare_process
from pgauthproxy.reload import OneAtATime, Read
from pgauthproxy.service import Service
from pgauthproxy.shared_counts import SharedCounts, hold
from pgauthproxy.upgrade import (
    Relatives,
    UpgradeError,
    hand_over,
    offer_all,
    start_successor,
    take_listening,
    when_exited,
)
from pgauthproxy.worker import Place, Worker


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
    ledger: int = -1,
) -> None:
    """Runs until a signal ends it; `read` reads the settings anew. The program is started anew, for an
    upgrade, with `words`; `link` leads to the process that is to be succeeded, if there is one, and `ledger` is the
    descriptor of what that counts in.

    Raises AuthenticatorConfigError, PidFileError and UpgradeError if it cannot begin to.
    """
    ignore_warnings()
    prepare_process(core_dumps=settings.core_dumps)
    fitted, _ = fitting(settings, ignore)
    counts = SharedCounts.share(fitted, ledger) if ledger >= 0 else SharedCounts.begin(fitted)
    slot = counts.slots[0]
    if counts.descriptor >= 0:
        hold(counts.descriptor, slot)
    place = Place(removes_files=not service.descriptors, ledger=counts.descriptor, ledger_slot=slot)
    worker = Worker(settings, authenticator, listening, read, log, audit, place)
    uvloop.run(_Alone(worker, counts, log, service, words, admin_listening).run(link))


class _Alone:
    """A worker without a supervisor: it hears signals itself, and can be succeeded."""

    def __init__(
        self,
        worker: Worker,
        counts: SharedCounts,
        sink: LogSink,
        service: Service,
        words: Sequence[str],
        admin_listening: list[StreamSocket],
    ) -> None:
        self._worker = worker
        self._counts = counts
        self._operators = Operators(admin_listening, worker.own.snapshot, worker.own.act, worker.sink)
        open_console(worker.gateway, worker.own.snapshot, worker.own.act, lambda: worker.reloads.settings, worker.sink)
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
                said, listening, admin_listening = await take_listening(predecessor)
                worker.succeed(said.generation, said.removes_files, listening)
                if said.is_paused:
                    self._relatives.pause(predecessor)
                self._operators.take_over(worker.reloads.settings, admin_listening)
            hear_signals(worker.drain, worker.end_now, worker.reloads.reloading, self._service)
            self._pid_file.take()
            worker.listen()
            announce(worker.reloads.settings, worker.listening, self._sink)
            self._operators.serve(worker.reloads.settings)
            self._service.ready()
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGUSR2, self._upgrading.ask)
            if predecessor is not None:
                await predecessor.send(Serving())
                is_in_force = True
                self._operators.drop_unwanted()
                when_exited(predecessor.other, self._counts.forget_the_dead)
                attending = loop.create_task(self._relatives.attend(predecessor))
            await worker.serve()
            self._pid_file.give_up()
            if not self._is_succeeded:
                self._service.stopping()
            await worker.finish()
            if self._is_succeeded:
                await worker.until_told(loop.create_task(self._relatives.until_all_is_given_back()))
                # Cancel requests for a predecessor's sessions go through this process, as does what they give back.
                if attending is not None:
                    await worker.until_told(attending)
                await worker.until_all_is_released()
        finally:
            self._pid_file.give_up()
            for task in (attending, self._handing_over):
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])
            await self._upgrading.close()
            await self._operators.close(removes_files=is_in_force)
            await worker.close()
            hear_no_more()
        self._sink(Noticed("info", "ended"))

    async def _upgrade(self) -> None:
        if self._is_succeeded or self._worker.is_draining:
            self._sink(Noticed("warning", "not upgraded: this process is on its way out"))
            return
        try:
            pid, link = await start_successor(
                self._words, self._service.environment, self._counts.descriptor, self._counts.forget_the_dead
            )
        except UpgradeError as error:
            self._failed(error)
            return
        held = self._worker.gateway.held
        try:
            await offer_all(pid, link, self._offer, self._pid_file, lambda: self._worker.is_draining)
        except UpgradeError as error:
            if not self._worker.is_draining:
                self._worker.listen()
            self._failed(error)
            return
        self._sink(Noticed("info", "succeeded by another process", (("pid", pid),)))
        self._service.hand_to(pid)
        self._is_succeeded = True
        await self._operators.close(removes_files=False)
        self._worker.be_succeeded()
        if held is not None:
            # It may have been told so here meanwhile.
            self._relatives.tell_resumed(link, held)
        self._handing_over = asyncio.get_running_loop().create_task(
            hand_over(self._relatives, self._worker.gateway, link, self._sink)
        )

    async def _offer(self, link: Link) -> None:
        """Offers everything but the sessions; who comes meanwhile waits."""
        worker = self._worker
        worker.pause()
        said = TakeListening(
            worker.generation + 1,
            worker.removes_files,
            tuple(each.proxy_protocol for each in worker.listening),
            len(self._operators.listening),
            is_paused=worker.gateway.held is not None,
        )
        await link.send(said, [each.fileno() for each in (*worker.listening, *self._operators.listening)])

    def _failed(self, error: UpgradeError) -> None:
        self._sink(Noticed("error", "upgrade failed, this process goes on", (("reason", str(error)),)))
