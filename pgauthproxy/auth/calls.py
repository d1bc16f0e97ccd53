"""Calls of an author's function in this process: bounded in number and time, whatever the function does.

Strategy: nothing ends a thread, and a coroutine may ignore that it is cancelled. So a call that runs over its time is
given up, and its login gets its verdict at once. A coroutine is cancelled, and if that does not end it, left. A thread
keeps its place until it returns; when all places are held so, logins are refused at once, for waiting would be in vain.
"""

import asyncio
import contextlib
import functools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

from pgauthproxy.auth.fields import NonsenseError
from pgauthproxy.auth.model import Denied, Load, Question
from pgauthproxy.auth.typed import mapping_of, request_of
from pgauthproxy.authoring import Denied as AuthorDenied
from pgauthproxy.authoring import FieldError, Request, checked, told_by, what_failed
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.events import Noticed
from pgauthproxy.stages import Mapping

HELD_UP_SECONDS: Final = 0.05
"""An async function that keeps the loop for longer is reported, but only every REPORT_SECONDS."""
REPORT_SECONDS: Final = 60.0

Function = Callable[[Request], Any]
Verdict = Mapping | Denied | AuthenticatorFault
Notice = Callable[[Noticed], None]


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Times in seconds. `grace` is what a coroutine has after it was cancelled."""

    timeout: float
    grace: float
    max_parallel: int


class Call:
    """One call. States, in order: running; given up, if its verdict is no longer waited for; ended."""

    __slots__ = ("ended", "given_up", "question", "task", "timer", "verdict")

    def __init__(self, question: Question) -> None:
        self.question = question
        self.verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[Verdict] | None = None
        self.given_up = False
        self.ended = False


class Places:
    """Who may run. Those who must wait get a place in the order in which they came."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.held = 0
        """Places of threads that run on for longer than they may."""
        self._free = count
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def taken(self) -> int:
        return self.count - self._free

    @property
    def wanted(self) -> int:
        """How many wait for one."""
        return sum(not waiter.done() for waiter in self._waiting)

    async def take(self) -> None:
        """Raises AuthenticatorFault if no place will come free."""
        if self.held >= self.count:
            raise self._none_left()
        if self._free and not self._waiting:
            self._free -= 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                # Unless a place that came free in the same moment has passed it by.
                with contextlib.suppress(ValueError):
                    self._waiting.remove(waiter)
            elif waiter.exception() is None:
                # The place was given while its waiter was on the way out.
                self.give_back()
            raise

    def give_back(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1

    def hold(self) -> None:
        """A place is held by a call that was given up."""
        self.held += 1
        while self.held >= self.count and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(self._none_left())

    def _none_left(self) -> AuthenticatorFault:
        return AuthenticatorFault(f"authenticator is not called: {self.held} calls run on after their time-out")


class Calls(ABC):
    """Calls one function; `call` may be used any number of times at once."""

    def __init__(self, function: Function, limits: CallLimits, notice: Notice) -> None:
        self._function = function
        self._limits = limits
        self._notice = notice
        self._author: CodeType | None = getattr(
            function, "__code__", getattr(type(function).__call__, "__code__", None)
        )
        self._places = Places(limits.max_parallel)
        self._loop = asyncio.get_running_loop()
        self._asking = 0
        self._unasked = asyncio.Event()

    async def call(self, question: Question) -> Mapping:
        """Raises Denied and AuthenticatorFault. Cancelling it gives up the call."""
        self._asking += 1
        try:
            return await self._call(question)
        finally:
            self._asking -= 1
            if not self._asking:
                self._unasked.set()

    async def finish(self) -> None:
        """Closes once all who have asked have their verdict. Nobody asks any more."""
        try:
            if self._asking:
                self._unasked.clear()
                await self._unasked.wait()
        finally:
            await self.close()

    def load(self) -> Load:
        """What runs on after its time-out runs."""
        return Load("python", self._places.taken, self._places.wanted)

    async def _call(self, question: Question) -> Mapping:
        await self._places.take()
        call = Call(question)
        call.timer = self._loop.call_later(self._limits.timeout, self._run_over, call)
        self._begin(call)
        try:
            verdict = await call.verdict
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        try:
            if isinstance(verdict, Mapping):
                return verdict
            raise verdict
        finally:
            # An error knows this frame: it must not know the error, or both stay until the collector comes.
            del verdict, call

    @abstractmethod
    def _begin(self, call: Call) -> None:
        """Makes the function run."""

    @abstractmethod
    def _give_up(self, call: Call) -> None:
        """Nobody waits for this call any more."""

    @abstractmethod
    async def close(self) -> None:
        """Ends what can be ended."""

    def _run_over(self, call: Call) -> None:
        """The call's time is up."""
        call.timer = None
        if not call.verdict.done():
            call.verdict.set_result(AuthenticatorFault(f"authenticator took longer than {self._limits.timeout:g} s"))
        self._abandon(call)

    def _abandon(self, call: Call) -> None:
        """Gives the call up, unless it has ended, or been given up, in the same moment."""
        if not (call.ended or call.given_up):
            call.given_up = True
            self._give_up(call)

    def _end(self, call: Call, verdict: Verdict) -> None:
        """The function has returned."""
        call.ended = True
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None
        self._places.give_back()
        if not call.verdict.done():
            call.verdict.set_result(verdict)

    def _judge(self, answer: object, question: Question) -> Verdict:
        try:
            return mapping_of(checked(answer), question.started)
        except (FieldError, NonsenseError) as error:
            return AuthenticatorFault(f"authenticator answered nonsense: {error}")

    def _verdict_of(self, error: BaseException) -> Verdict:
        if isinstance(error, AuthorDenied):
            return Denied(f"authenticator refused: {error.reason}", told_by(error))
        return AuthenticatorFault(f"authenticator failed: {what_failed(error, self._author)}")


class Threads(Calls):
    """Calls of a plain function."""

    def __init__(self, function: Function, limits: CallLimits, notice: Notice) -> None:
        super().__init__(function, limits, notice)
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._started = 0
        self._held: set[Call] = set()

    def _begin(self, call: Call) -> None:
        if self._started < self._places.taken:
            # Daemons, since the gateway must be able to end while one of them does not.
            thread = threading.Thread(target=self._serve, name=f"authenticator-{self._started + 1}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self._end(call, AuthenticatorFault("authenticator is not called: no thread can be started"))
                return
            self._started += 1
        self._queue.put(call)

    def _serve(self) -> None:
        """One thread's life."""
        while (call := self._queue.get()) is not None:
            verdict = self._run(call.question)
            try:
                self._loop.call_soon_threadsafe(self._end, call, verdict)
            except RuntimeError:
                # The gateway has ended meanwhile.
                return
            # Nothing of a login stays here until the next.
            del call, verdict

    def _run(self, question: Question) -> Verdict:
        try:
            return self._judge(self._function(request_of(question)), question)
        except BaseException as error:  # SystemExit too is one login's failure and nothing more
            return self._verdict_of(error)

    def _judge(self, answer: object, question: Question) -> Verdict:
        if isinstance(answer, Coroutine):
            answer.close()
        return super()._judge(answer, question)

    def _give_up(self, call: Call) -> None:
        """It runs on: nothing is amiss before its time is up."""

    def _run_over(self, call: Call) -> None:
        super()._run_over(call)
        self._held.add(call)
        self._places.hold()
        self._tell("warning", "authenticator runs on after its time-out", call)

    def _end(self, call: Call, verdict: Verdict) -> None:
        if call in self._held:
            self._held.remove(call)
            self._places.held -= 1
            self._tell("info", "authenticator has ended after its time-out", call)
        super()._end(call, verdict)

    def _tell(self, level: str, what: str, call: Call) -> None:
        held = f"{self._places.held} of {self._places.count}"
        facts = (("session", call.question.started.accepted.session), ("threads_held", held))
        self._notice(Noticed(level, what, facts))

    async def close(self) -> None:
        for _ in range(self._started):
            self._queue.put(None)


class Tasks(Calls):
    """Calls of an async function, in the gateway's loop."""

    def __init__(self, function: Function, limits: CallLimits, notice: Notice) -> None:
        super().__init__(function, limits, notice)
        self._running: dict[Call, _Steps] = {}
        self._next_report = 0.0

    def _begin(self, call: Call) -> None:
        call.task = self._loop.create_task(self._run(call))
        # Not in the task itself: one that is cancelled before its first step runs none of its code.
        call.task.add_done_callback(functools.partial(self._done, call))

    async def _run(self, call: Call) -> Verdict:
        try:
            steps = self._running[call] = _Steps(self._function(request_of(call.question)), self._watch)
            return self._judge(await steps, call.question)
        except BaseException as error:  # its own CancelledError too; who cancels this task waits for no verdict
            return self._verdict_of(error)

    def _done(self, call: Call, task: asyncio.Task[Verdict]) -> None:
        self._running.pop(call, None)
        self._end(call, AuthenticatorFault("authenticator was cancelled") if task.cancelled() else task.result())

    def _watch(self, seconds: float) -> None:
        """The function has kept the loop for so long, and with it every session of the gateway."""
        if seconds > HELD_UP_SECONDS and time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + REPORT_SECONDS
            facts = (("milliseconds", round(seconds * 1000)), ("remedy", "a plain function runs in a thread"))
            self._notice(Noticed("warning", "authenticator held up the gateway", facts))

    def _give_up(self, call: Call) -> None:
        if call.timer is not None:
            call.timer.cancel()
        if call.task is not None and not call.task.done():
            call.task.cancel()
            call.timer = self._loop.call_later(self._limits.grace, self._leave, call)

    def _leave(self, call: Call) -> None:
        """It has had its time to clean up."""
        if (steps := self._running.get(call)) is not None and call.task is not None:
            steps.left = True
            call.task.cancel()
            facts = (("session", call.question.started.accepted.session),)
            self._notice(Noticed("warning", "authenticator did not heed being cancelled, and was left", facts))

    async def close(self) -> None:
        for call in list(self._running):
            self._abandon(call)
        while self._running:
            tasks = [call.task for call in self._running if call.task is not None]
            await asyncio.wait(tasks, return_when=asyncio.ALL_COMPLETED)


class _Steps:
    """A coroutine, driven step by step: `watch` gets the seconds of each. Once `left`, cancelling it always ends it."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], watch: Callable[[float], None]) -> None:
        self.left = False
        self._coroutine = coroutine
        self._watch = watch

    def __await__(self) -> Generator[Any, Any, Any]:
        step, value = self._coroutine.send, None
        while True:
            began = time.perf_counter()
            try:
                awaited = step(value)
            except StopIteration as ended:
                return ended.value
            finally:
                # As in `call`: it may be an error that knows this frame.
                value = None
                self._watch(time.perf_counter() - began)
            try:
                value = yield awaited
                step = self._coroutine.send
            except BaseException as error:
                if self.left:
                    raise
                step, value = self._coroutine.throw, error
