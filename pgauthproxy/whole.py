"""The whole of a gateway that has several workers, as operators see it.

Each worker knows its own sessions, and is asked for them when somebody wants to know; all are asked at once. One that
does not answer in time stands there with what it said last. What a worker that is no more had counted, as far as it was
asked, is kept: the sum of a counter never goes back.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import msgspec

from pgauthproxy.control import Answered, Asked, Look, Questions
from pgauthproxy.ops.acts import Act, Kill, KillUser, Pause, Reload, Resume, Shutdown, UnansweredError, signal_itself
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.counts import measure_process
from pgauthproxy.ops.snapshot import Snapshot
from pgauthproxy.release import version

ANSWER_SECONDS: Final = 2.0
"""How long a worker may take to say what there is, or to do what it is told."""


class Part:
    """One worker, from when it is ready until it is gone."""

    def __init__(self, send: Callable[[Asked], bool]) -> None:
        """`send` says whether the question is on its way."""
        self._send = send
        self._questions = Questions[Snapshot | int]()
        self.known: Snapshot | None = None
        """What it said last of what it has counted."""

    async def look(self, rows: int) -> Snapshot | None:
        """What there is now; what is known of it if it does not say."""
        said = await self._ask(Look(rows))
        if not isinstance(said, Snapshot):
            return self.known
        self.known = said.counted()
        return said

    async def act(self, act: Act) -> int:
        """How many sessions it concerned, as far as the worker says."""
        said = await self._ask(act)
        return said if isinstance(said, int) else 0

    async def _ask(self, wanted: Look | Act) -> Snapshot | int | None:
        try:
            return await self._questions.ask(lambda ticket: self._send(Asked(ticket, wanted)), ANSWER_SECONDS)
        except (UnansweredError, TimeoutError):
            return None

    def answered(self, answer: Answered) -> None:
        self._questions.answered(answer.ticket, answer.said)

    def gone(self) -> None:
        self._questions.give_up("the worker is gone")


class Whole:
    """All workers that are ready.

    `is_draining` says whether the gateway is on its way out; `audit` is the supervisor's own part of the audit log.
    """

    def __init__(self, is_draining: Callable[[], bool], audit: AuditSink | None) -> None:
        self._is_draining = is_draining
        self._audit = audit
        self._parts: set[Part] = set()
        self._departed = Snapshot(version(), time.time())
        self.is_paused = False

    def join(self, part: Part) -> None:
        self._parts.add(part)

    def leave(self, part: Part) -> None:
        """It is no more."""
        self._parts.discard(part)
        if part.known is not None:
            self._departed = self._departed.merge(part.known)
        part.gone()

    async def snapshot(self, rows: int) -> Snapshot:
        """As TakeSnapshot has it."""
        parts = list(self._parts)
        looks = await asyncio.gather(*(part.look(rows) for part in parts))
        process = await measure_process("supervisor")
        whole = self._departed
        for part, seen in zip(parts, looks, strict=True):
            # One that has left meanwhile is among the departed.
            if seen is not None and part in self._parts:
                whole = whole.merge(seen)
        lost, is_failing = (self._audit.lost_in_all, self._audit.is_failing) if self._audit is not None else (0, False)
        whole = msgspec.structs.replace(
            whole,
            at=time.time(),
            draining=self._is_draining(),
            paused=self.is_paused,
            audit_lost=whole.audit_lost + lost,
            audit_failing=whole.audit_failing or is_failing,
            processes=[*sorted(whole.processes, key=lambda process: process.name), process],
        )
        return whole.with_newest(rows)

    async def act(self, act: Act) -> int:
        """As PerformAct has it."""
        match act:
            case Reload() | Shutdown():
                signal_itself(act)
                return 0
            case Pause() | Resume():
                self.is_paused = isinstance(act, Pause)
            case Kill() | KillUser():
                pass
        return sum(await asyncio.gather(*(part.act(act) for part in self._parts)))
