"""The authenticator that is a command: one process for each login, the contract's lines on its pipes.

Strategy: a thread for each process that may run at once, in which `_spawn` does everything from start to exit without
the GIL. The pool's queue is the order in which logins wait for their turn.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from collections.abc import Mapping as Environment
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pgauthproxy import _spawn
from pgauthproxy.auth import fields
from pgauthproxy.auth.model import Denied, Question
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.stages import Mapping

SaidSink = Callable[[str, tuple[str, ...], int], None]
"""Gets a session's id, the lines of standard error, and how many bytes were dropped."""


@dataclass(frozen=True, slots=True)
class CommandLimits:
    """Times in seconds, sizes in bytes."""

    timeout: float
    grace: float
    max_parallel: int
    max_output: int
    max_lines: int
    max_errors: int


def missing_command(argv: Sequence[str]) -> str | None:
    """Why the command could not be started, or None."""
    if shutil.which(argv[0]) is not None:
        return None
    if os.path.isdir(argv[0]):
        return f"{argv[0]}: is a folder"
    if os.path.exists(argv[0]):
        return f"{argv[0]}: not executable"
    return f"{argv[0]}: not found"


class CommandAuthenticator:
    """Runs the operator's command. The command is looked up on PATH, no shell is involved."""

    def __init__(
        self, argv: Sequence[str], environment: Environment[bytes, bytes], limits: CommandLimits, said: SaidSink
    ) -> None:
        self._command = _spawn.Command(
            [os.fsencode(word) for word in argv],
            [name + b"=" + value for name, value in environment.items()],
        )
        self._limits = limits
        self._said = said
        self._running: set[_spawn.Stop] = set()
        self._threads = ThreadPoolExecutor(limits.max_parallel, thread_name_prefix="authenticator")

    async def ask(self, question: Question) -> Mapping:
        stop = _spawn.Stop()
        running = asyncio.get_running_loop().run_in_executor(
            self._threads, self._run, fields.encode_question(question), stop
        )
        self._running.add(stop)
        try:
            outcome = await running
        except asyncio.CancelledError:
            stop.set()
            raise
        except OSError as error:
            raise AuthenticatorFault(f"authenticator could not be started: {error.strerror}") from None
        finally:
            self._running.discard(stop)
        if outcome.errors:
            self._report(question.started.accepted.session, outcome)
        return self._decide(outcome)

    def close(self) -> None:
        for stop in self._running:
            stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, data: bytes, stop: _spawn.Stop) -> _spawn.Outcome:
        limits = self._limits
        return self._command.run(data, stop, limits.timeout, limits.grace, limits.max_output, limits.max_errors)

    def _report(self, session: str, outcome: _spawn.Outcome) -> None:
        lines = outcome.errors.decode(errors="backslashreplace").split("\n")
        self._said(session, tuple(line for line in lines if line.strip()), outcome.errors_dropped)

    def _decide(self, outcome: _spawn.Outcome) -> Mapping:
        if outcome.ended_by == _spawn.BY_TIMEOUT:
            raise AuthenticatorFault(f"authenticator took longer than {self._limits.timeout:g} s")
        if outcome.ended_by == _spawn.BY_FLOOD:
            raise AuthenticatorFault(f"authenticator printed more than {self._limits.max_output} bytes")
        if outcome.status < 0:
            # As before: a signal is a refusal, though hardly a meant one.
            raise Denied(f"authenticator died of {_signal_name(-outcome.status)}")
        if outcome.status > 0:
            told = fields.decode_error(outcome.output, self._limits.max_lines)
            raise Denied(f"authenticator refused with exit status {outcome.status}", told)
        try:
            return fields.decode_mapping(outcome.output, self._limits.max_lines)
        except fields.NonsenseError as error:
            raise AuthenticatorFault(f"authenticator answered nonsense: {error}") from None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
