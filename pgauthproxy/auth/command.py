"""The authenticator that is a command: one process for each login, the contract's lines on its pipes."""

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from collections.abc import Mapping as Environment
from dataclasses import dataclass
from typing import Final

from pgauthproxy import _spawn
from pgauthproxy.auth import fields
from pgauthproxy.auth.model import AuthenticatorConfigError, Denied, Question
from pgauthproxy.errors import AuthenticatorFault
from pgauthproxy.stages import Mapping

MAX_SAID_LINES: Final = 256
"""Lines of one run's standard error that reach the log: each costs the loop some microseconds."""

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
        """Raises AuthenticatorConfigError if there is no such command."""
        if (missing := missing_command(argv)) is not None:
            raise AuthenticatorConfigError(f"authenticator.cmd: {missing}")
        self._argv = argv
        self._environment = environment
        self._limits = limits
        self._said = said
        self._runner: _spawn.Runner | None = None

    async def start(self) -> None:
        limits = self._limits
        self._runner = _spawn.Runner(
            [os.fsencode(word) for word in self._argv],
            [name + b"=" + value for name, value in self._environment.items()],
            limits.max_parallel,
            limits.timeout,
            limits.grace,
            limits.max_output,
            limits.max_errors,
        )
        asyncio.get_running_loop().add_reader(self._runner.fileno(), self._collect, self._runner)

    async def ask(self, question: Question) -> Mapping:
        assert self._runner is not None  # noqa: S101 (it was started)
        run = self._runner.start(fields.encode_question(question))
        run.done = asyncio.get_running_loop().create_future()
        try:
            await run.done
        except asyncio.CancelledError:
            run.stop()
            raise
        finally:
            run.done = None
        if run.failure:
            raise AuthenticatorFault(f"authenticator could not be started: {os.strerror(run.failure)}")
        if run.errors:
            self._report(question.started.accepted.session, run)
        return self._decide(run)

    async def reload(self) -> None:
        """Nothing: the command is read at each login."""

    async def close(self) -> None:
        if self._runner is not None:
            asyncio.get_running_loop().remove_reader(self._runner.fileno())
            self._runner.close()
            self._runner = None

    @staticmethod
    def _collect(runner: _spawn.Runner) -> None:
        for run in runner.collect():
            if run.done is not None and not run.done.done():
                run.done.set_result(None)

    def _report(self, session: str, run: _spawn.Run) -> None:
        lines = run.errors.split(b"\n", MAX_SAID_LINES)
        dropped = run.errors_dropped
        if len(lines) > MAX_SAID_LINES:
            dropped += len(lines.pop())
        said = (line.decode(errors="backslashreplace") for line in lines if line.strip())
        self._said(session, tuple(said), dropped)

    def _decide(self, run: _spawn.Run) -> Mapping:
        if run.ended_by == _spawn.BY_TIMEOUT:
            left = f", and process {run.left_behind} cannot be ended" if run.left_behind else ""
            raise AuthenticatorFault(f"authenticator took longer than {self._limits.timeout:g} s{left}")
        if run.ended_by == _spawn.BY_FLOOD:
            raise AuthenticatorFault(f"authenticator printed more than {self._limits.max_output} bytes")
        if run.status < 0:
            # As before: a signal is a refusal, though hardly a meant one.
            raise Denied(f"authenticator died of {_signal_name(-run.status)}")
        if (failure := fields.decode_failure(run.output, self._limits.max_lines)) is not None:
            raise AuthenticatorFault(f"authenticator failed: {failure.decode(errors='backslashreplace')}")
        if run.status > 0:
            told = fields.decode_error(run.output, self._limits.max_lines)
            raise Denied(f"authenticator refused with exit status {run.status}", told)
        try:
            return fields.decode_mapping(run.output, self._limits.max_lines)
        except fields.NonsenseError as error:
            raise AuthenticatorFault(f"authenticator answered nonsense: {error}") from None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
