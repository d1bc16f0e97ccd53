"""A worker without a supervisor: it hears signals itself, and can be succeeded (upgrade.py)."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Sequence

import uvloop

from pgauthproxy.auth.model import Authenticator
from pgauthproxy.config.schema import Settings
from pgauthproxy.events import Noticed, ignore
from pgauthproxy.net import listen
from pgauthproxy.net.sockets import StreamSocket
from pgauthproxy.operators import open_listeners as open_admin_listeners
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.log import LogSink
from pgauthproxy.pid_file import PidFile, PidFileError
from pgauthproxy.process import announce, fitting, hear_signals, ignore_warnings, prepare_process
from pgauthproxy.reload import OneAtATime, Read
from pgauthproxy.service import Service
from pgauthproxy.shared_counts import SharedCounts
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
    until_exited,
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
    prepare_process()
    fitted = fitting(settings, ignore)
    counts = SharedCounts.share(fitted, ledger) if ledger >= 0 else SharedCounts.begin(fitted)
    place = Place(slot=counts.slot, removes_files=not service.descriptors, ledger=counts.descriptor)
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
        assert worker.operators is not None  # noqa: S101 (it is the only worker)
        self._worker = worker
        self._counts = counts
        self._operators = worker.operators
        self._admin_listening = admin_listening
        self._admin_unwanted: list[StreamSocket] = []
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
                said, listening, self._admin_listening = await take_listening(predecessor)
                worker.succeed(said.generation, said.removes_files, listening)
                if said.is_paused:
                    self._relatives.pause(predecessor)
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
                self._drop_unwanted()
                when_exited(predecessor.other, self._counts.forget_the_dead)
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
            # Whoever asks for an end now is getting it. The loop, as it closes, would leave the signal to the kernel.
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2))
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
        if self._worker.is_draining:
            abandon(pid, link)
            return
        self._worker.pause()
        held = self._worker.gateway.held
        self._pid_file.give_up()
        try:
            await link.send(
                TakeListening(
                    self._worker.generation + 1,
                    self._worker.removes_files,
                    tuple(each.proxy_protocol for each in self._worker.listening),
                    len(self._operators.listening),
                    is_paused=held is not None,
                ),
                [each.fileno() for each in (*self._worker.listening, *self._operators.listening)],
            )
            await expect(link, Serving)
        except UpgradeError as error:
            abandon(pid, link)
            # It may have the lock of the file.
            await until_exited(pid)
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
        if held is not None:
            # It may have been told so here meanwhile.
            self._relatives.tell_resumed(link, held)
        self._handing_over = asyncio.get_running_loop().create_task(self._hand_over(link))

    def _fitting(self, taken: list[StreamSocket]) -> list[StreamSocket]:
        """What operators are to be served on, of what was taken over. Raises ListenError."""
        settings = self._worker.reloads.settings
        if taken and settings.admin.listen:
            return taken
        self._admin_unwanted = taken
        return open_admin_listeners(settings)

    def _drop_unwanted(self) -> None:
        """Nobody serves operators there any more."""
        for each in self._admin_unwanted:
            if each.family == socket.AF_UNIX:
                listen.remove_file(each.getsockname())
            each.close()
        self._admin_unwanted = []

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
