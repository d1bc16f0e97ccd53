"""The authenticator that is kept running: the same command as ever, in a pool of processes, for microseconds a login.

A process has one login in hand at a time; others wait in order. One that dies, takes too long or says what it was not
asked for costs the login that it has in hand, and is replaced: at once the first time, then more and more slowly, until
one has answered again.
"""

import asyncio
import os
from collections import deque
from collections.abc import Coroutine, Sequence
from collections.abc import Mapping as Environment
from dataclasses import dataclass
from typing import Final

from pgauthproxy.auth import fields
from pgauthproxy.auth.command import SaidSink, missing_command
from pgauthproxy.auth.model import AuthenticatorConfigError, Denied, Question
from pgauthproxy.auth.worker_process import WorkerProcess, WorkerRetiredError
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.stages import Mapping

IS_WORKER: Final = b"PGAUTHPROXY_WORKER=1"
"""Tells a program that can be both that it is to answer more than one request."""
FIRST_BACK_OFF_SECONDS: Final = 0.1
LONGEST_BACK_OFF_SECONDS: Final = 30.0
SURPLUS_SECONDS: Final = 60.0
"""How long a process beyond the least number may have nothing to do."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Numbers of processes, times in seconds, sizes in bytes."""

    least: int
    most: int
    timeout: float
    grace: float
    max_output: int
    max_lines: int


class WorkerAuthenticator:
    """A pool of processes that answer."""

    def __init__(
        self, argv: Sequence[str], environment: Environment[bytes, bytes], limits: WorkerLimits, said: SaidSink
    ) -> None:
        """Raises AuthenticatorConfigError if there is no such command."""
        if (missing := missing_command(argv)) is not None:
            raise AuthenticatorConfigError(f"authenticator.cmd: {missing}")
        self._argv = [os.fsencode(word) for word in argv]
        self._environment = [name + b"=" + value for name, value in environment.items()] + [IS_WORKER]
        self._limits = limits
        self._said = said
        self.workers: set[WorkerProcess] = set()
        self._idle: deque[WorkerProcess] = deque()
        self._retiring: set[WorkerProcess] = set()
        self._waiting: deque[asyncio.Future[WorkerProcess]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = 0
        self._failures = 0
        self._why = ""
        self._retry: asyncio.TimerHandle | None = None
        self._surplus: asyncio.TimerHandle | None = None
        self._closed = False

    async def start(self) -> None:
        try:
            for _ in range(self._limits.least):
                self._welcome(await asyncio.to_thread(self._start_process))
        except OSError as error:
            await self.close()
            raise self._unstartable(error) from None

    async def ask(self, question: Question) -> Mapping:
        request = fields.encode_question(question)
        while True:
            try:
                return await self._ask_one(question.started.accepted.session, request)
            except WorkerRetiredError:
                # It was on its way out when it was asked.
                continue

    async def _ask_one(self, session: str, request: bytes) -> Mapping:
        worker = await self._take()
        try:
            async with asyncio.timeout(self._limits.timeout):
                answer = await worker.ask(session, request)
        except TimeoutError:
            worker.end("took too long")
            raise AuthenticatorFault(f"authenticator worker took longer than {self._limits.timeout:g} s") from None
        except asyncio.CancelledError:
            # The answer is still to come, and must not be taken for that to the next question.
            self._spawn(self._wait_out(worker))
            raise
        try:
            mapping = decide(answer, self._limits.max_lines)
        except fields.NonsenseError as error:
            worker.end("answered nonsense")
            raise AuthenticatorFault(f"authenticator worker answered nonsense: {error}") from None
        finally:
            self._release(worker)
        return mapping

    async def reload(self) -> None:
        """Replaces the processes one by one, each when it has no login in hand. Raises AuthenticatorConfigError."""
        for old in list(self.workers):
            try:
                self._welcome(await asyncio.to_thread(self._start_process))
            except OSError as error:
                raise self._unstartable(error) from None
            if old.is_usable:
                self._retiring.add(old)
                if old in self._idle:
                    self._idle.remove(old)
                    self._release(old)

    async def close(self) -> None:
        self._closed = True
        for timer in (self._retry, self._surplus):
            if timer is not None:
                timer.cancel()
        for worker in list(self.workers):
            worker.dismiss("was ended")
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _unstartable(self, error: OSError) -> AuthenticatorConfigError:
        return AuthenticatorConfigError(f"authenticator.cmd: {os.fsdecode(self._argv[0])}: {error.strerror}")

    async def _take(self) -> WorkerProcess:
        """A process that has nothing in hand; waits for one in order. Raises AuthenticatorFault if none is to come."""
        while True:
            worker = self._idle.pop() if self._idle else await self._next_released()
            if worker.is_ready():
                return worker

    async def _next_released(self) -> WorkerProcess:
        self._check_hope()
        waiting: asyncio.Future[WorkerProcess] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._start_more()
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._release(waiting.result())
            raise

    def _check_hope(self) -> None:
        """Raises AuthenticatorFault if there is no process, and none will be started for a while."""
        if self._retry is not None and not self.workers and not self._starting:
            raise AuthenticatorFault(f"authenticator workers keep failing: the last one {self._why}")

    def _release(self, worker: WorkerProcess) -> None:
        """This one has nothing in hand any more: it goes to who waits longest, or is idle."""
        if not worker.is_usable:
            return
        if worker in self._retiring:
            worker.dismiss("was replaced")
            return
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(worker)
                return
        self._idle.append(worker)
        if len(self.workers) > self._limits.least and self._surplus is None:
            self._surplus = asyncio.get_running_loop().call_later(SURPLUS_SECONDS, self._end_surplus)

    def _end_surplus(self) -> None:
        """Ends what was idle all the time: it stands at the bottom, since the last to come is the first to go."""
        self._surplus = None
        while self._idle and len(self.workers) > self._limits.least:
            self._idle.popleft().dismiss("had nothing to do")

    def _start_more(self) -> None:
        """Starts processes for those who wait, and for the least number, as many as there may be."""
        if self._closed or self._retry is not None:
            return
        there = len(self.workers) - len(self._retiring) + self._starting
        wanted = max(len(self._waiting) - self._starting, self._limits.least - there)
        for _ in range(min(wanted, self._limits.most - there)):
            self._starting += 1
            self._spawn(self._start_one())

    async def _start_one(self) -> None:
        try:
            worker = await asyncio.to_thread(self._start_process)
        except OSError as error:
            self._starting -= 1
            self._failed(f"could not be started: {os.strerror(error.errno or 0)}")
        else:
            self._starting -= 1
            self._welcome(worker)

    def _start_process(self) -> WorkerProcess:
        return WorkerProcess(self._argv, self._environment, self._limits.max_output, self._said, self._gone)

    def _welcome(self, worker: WorkerProcess) -> None:
        self.workers.add(worker)
        worker.listen()
        if self._closed:
            worker.dismiss("was ended")
        else:
            self._release(worker)

    def _gone(self, worker: WorkerProcess) -> None:
        """A process has gone, or was taken out of service: it is replaced unless that was ours to do."""
        self.workers.discard(worker)
        self._retiring.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        self._spawn(worker.bury(self._limits.grace))
        if not worker.was_dismissed:
            if worker.answers:
                self._failures = 0
            self._failed(worker.why_gone)

    def _failed(self, why: str) -> None:
        """Has another one started: at once after the first failure in a row, then later and later."""
        self._why = why
        self._failures += 1
        if self._closed or self._retry is not None:
            return
        loop = asyncio.get_running_loop()
        if self._failures == 1:
            loop.call_soon(self._start_more)
            return
        delay = min(FIRST_BACK_OFF_SECONDS * 2 ** (self._failures - 2), LONGEST_BACK_OFF_SECONDS)
        self._retry = loop.call_later(delay, self._try_again)
        if not self.workers and not self._starting:
            self._disappoint()

    def _disappoint(self) -> None:
        """Nobody is kept waiting for a process that is not to come soon."""
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(
                    AuthenticatorFault(f"authenticator workers keep failing: the last one {self._why}")
                )

    def _try_again(self) -> None:
        self._retry = None
        self._start_more()

    async def _wait_out(self, worker: WorkerProcess) -> None:
        """Lets a process finish what nobody waits for any more."""
        try:
            async with asyncio.timeout(self._limits.timeout):
                await worker.finish()
        except TimeoutError:
            worker.end("took too long")
        self._release(worker)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Runs something beside the logins; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def decide(answer: bytes, max_lines: int) -> Mapping:
    """What the lines of an answer mean: without a target they refuse.

    Raises Denied, NonsenseError, and AuthenticatorFault if it says that it failed.
    """
    pairs = fields.split_lines(answer, max_lines)
    if (failure := pairs.get(b"_META_FAILED")) is not None:
        raise AuthenticatorFault(f"authenticator worker failed: {failure.decode(errors='backslashreplace')}")
    if not pairs.get(b"_META_TARGET_HOST"):
        raise Denied("authenticator worker refused", pairs.get(b"_META_ERROR") or None)
    return fields.decode_mapping(answer, max_lines)
