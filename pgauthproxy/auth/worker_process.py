"""One process of an authenticator that is kept running: a request in, an answer out, one after the other.

Requests and answers are the contract's lines, each ended by an empty line. A process that says anything when it was not
asked, or anything behind the end of its answer, is not to be trusted with the next: it is ended.

States, in order: idle and asked in turns, ending (`end` was called, or it is gone), gone.
"""

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Callable, Sequence
from typing import Final

from pgauthproxy import _spawn
from pgauthproxy.auth.command import MAX_SAID_LINES, SaidSink
from pgauthproxy.errors import AuthenticatorFault

READ_BYTES: Final = 65_536
END_OF_ANSWER: Final = b"\n\n"
KILL_SECONDS: Final = 1.0
ASK_SECONDS: Final = 0.02

Gone = Callable[["WorkerProcess"], None]


class WorkerRetiredError(Exception):
    """The process has gone in order, without a word to the question: another may be asked."""


class ExitWatch:
    """Learns that a child has exited, and reaps it. Linux tells by a pidfd; elsewhere it is asked for."""

    def __init__(self, pid: int) -> None:
        self.status: int | None = None
        """The exit status, or minus the number of the signal, once it has exited."""
        self._pid = pid
        self._pid_fd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1

    async def exited(self, seconds: float) -> bool:
        """Waits so long, at most. Not to be called again once it was true."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while not self._reap():
            left = deadline - loop.time()
            if left <= 0:
                return False
            if self._pid_fd < 0:
                await asyncio.sleep(min(left, ASK_SECONDS))
            else:
                await self._readable(left)
        return True

    def _reap(self) -> bool:
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self.status = os.waitstatus_to_exitcode(status)
        return pid == self._pid

    async def _readable(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        exited = asyncio.Event()
        loop.add_reader(self._pid_fd, exited.set)
        try:
            async with asyncio.timeout(seconds):
                await exited.wait()
        except TimeoutError:
            return
        finally:
            loop.remove_reader(self._pid_fd)

    def close(self) -> None:
        if self._pid_fd >= 0:
            os.close(self._pid_fd)


class WorkerProcess:
    """Owns the process and its pipes. `gone` is called once, when the process is no more or of no more use."""

    def __init__(
        self, argv: Sequence[bytes], environment: Sequence[bytes], max_output: int, said: SaidSink, gone: Gone
    ) -> None:
        """Starts the process. Raises OSError. May run in any thread; everything else is the loop's."""
        self.pid, self._input, self._output, self._errors = _spawn.start_process(list(argv), list(environment))
        self.session = ""
        self.answers = 0
        self.why_gone = ""
        self.was_dismissed = False
        """Whether it was ended for no fault of its own."""
        self._max_output = max_output
        self._said = said
        self._gone = gone
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)
        self._answer: asyncio.Future[bytes] | None = None
        self._status: asyncio.Future[int | None]
        self._collected = b""
        self._unsent = b""
        self._unended_line = b""
        self._lines_left = MAX_SAID_LINES
        self._ended = False
        self._is_leaving = False

    def listen(self) -> None:
        """Begins to hear what the process says."""
        loop = asyncio.get_running_loop()
        self._status = loop.create_future()
        loop.add_reader(self._output, self._read_output)
        loop.add_reader(self._errors, self._read_errors)

    @property
    def is_usable(self) -> bool:
        return not self._ended

    def is_ready(self) -> bool:
        """Whether it can be asked. Looks whether it has gone, or said anything, since the loop last told."""
        if not self._ended and self._poll.poll(0):
            self._read_output()
        return not self._ended

    async def ask(self, session: str, request: bytes) -> bytes:
        """The lines of the answer to a request (its lines, without the empty one).

        One at a time. A caller who stops waiting leaves the process with a question open: it has to be ended, or
        waited for with `finish`. Raises AuthenticatorFault, and WorkerRetiredError.
        """
        self.session = session
        self._lines_left = MAX_SAID_LINES
        # Held here too: a process that has gone is found by writing to it, and then has given its answer already.
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._send(request + b"\n")
        try:
            return await asyncio.shield(answer)
        except AuthenticatorFault:
            if self._collected or await self._status != 0:
                raise
            raise WorkerRetiredError from None

    async def finish(self) -> None:
        """Waits for an answer that nobody wants any more."""
        if self._answer is not None:
            await asyncio.wait([self._answer])

    def dismiss(self, why: str) -> None:
        """Ends it, for no fault of its own."""
        self.was_dismissed = True
        self.end(why)

    def end(self, why: str) -> None:
        """Takes it out of service: its input is closed, and who waits for an answer is told `why`."""
        if self._ended:
            return
        self._ended = True
        self.why_gone = why
        self._read_errors(last=True)
        loop = asyncio.get_running_loop()
        for descriptor in (self._output, self._errors):
            loop.remove_reader(descriptor)
        loop.remove_writer(self._input)
        for descriptor in (self._input, self._output, self._errors):
            os.close(descriptor)
        self._give(AuthenticatorFault(f"authenticator worker {why}"))
        self._gone(self)

    async def bury(self, grace: float) -> None:
        """Sees to it that the process is gone and reaped: it has the end of its input, then TERM, then KILL.

        One that was dismissed, or is about to go, has `grace` seconds to do so; the same time lies between the signals.
        """
        watch = ExitWatch(self.pid)
        try:
            if (self.was_dismissed or self._is_leaving) and await watch.exited(grace):
                return
            for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, KILL_SECONDS)):
                self._kill(number)
                if await watch.exited(seconds):
                    return
        finally:
            watch.close()
            self._status.set_result(watch.status)

    def _kill(self, number: signal.Signals) -> None:
        """Sends a signal to it and its children. It has not been reaped: the numbers are still its own."""
        for target in (-self.pid, self.pid):
            # Gone, or another user's: whoever waits for its exit finds out.
            with contextlib.suppress(OSError):
                os.kill(target, number)

    def _send(self, data: bytes) -> None:
        """Writes what the pipe takes, and the rest when it takes more."""
        try:
            sent = os.write(self._input, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._is_leaving = True
            self.end("closed its input")
            return
        self._unsent = data[sent:]
        if self._unsent:
            asyncio.get_running_loop().add_writer(self._input, self._send_more)

    def _send_more(self) -> None:
        asyncio.get_running_loop().remove_writer(self._input)
        self._send(self._unsent)

    def _read_output(self) -> None:
        try:
            data = os.read(self._output, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._is_leaving = True
            self.end("closed its output")
        elif self._answer is None:
            self.end("said something without being asked")
        else:
            self._collected += data
            self._look_for_end()

    def _look_for_end(self) -> None:
        # An answer may be empty but for its end: that is a refusal too.
        if self._collected.startswith(b"\n"):
            answer, rest = b"", self._collected[1:]
        else:
            answer, end, rest = self._collected.partition(END_OF_ANSWER)
            if not end:
                if len(self._collected) > self._max_output:
                    self.end(f"printed more than {self._max_output} bytes")
                return
        if rest:
            self.end("said more than one answer")
        elif len(answer) > self._max_output:
            self.end(f"printed more than {self._max_output} bytes")
        else:
            self._collected = b""
            self.answers += 1
            self._give(answer)

    def _give(self, answer: bytes | AuthenticatorFault) -> None:
        waiting, self._answer = self._answer, None
        if waiting is None or waiting.done():
            return
        if isinstance(answer, bytes):
            waiting.set_result(answer)
        else:
            waiting.set_exception(answer)
            # Nobody may be waiting any more.
            waiting.exception()

    def _read_errors(self, *, last: bool = False) -> None:
        """Passes on what it complains of, line by line; `last`: also one that has not ended."""
        try:
            data = os.read(self._errors, READ_BYTES)
        except BlockingIOError:
            data = b""
            if not last:
                return
        if not data:
            asyncio.get_running_loop().remove_reader(self._errors)
        whole, _, self._unended_line = (self._unended_line + data).rpartition(b"\n")
        if last or not data or len(self._unended_line) > READ_BYTES:
            whole, self._unended_line = whole + b"\n" + self._unended_line, b""
        lines = [line for line in whole.split(b"\n") if line.strip()]
        if not lines:
            return
        passed, dropped = lines[: self._lines_left], lines[self._lines_left :]
        self._lines_left -= len(passed)
        said = tuple(line.decode(errors="backslashreplace") for line in passed)
        self._said(self.session or f"worker {self.pid}", said, sum(map(len, dropped)))
