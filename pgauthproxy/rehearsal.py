"""Trying out an authenticator without a gateway. Authors import `TestClient` from `pgauthproxy.authenticator`.

It asks as the gateway asks, and reads the answer with the gateway's own reader.
"""

import asyncio
import os
import secrets
import selectors
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Mapping as Pairs
from typing import Any, Self

from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.auth import fields
from pgauthproxy.auth.fields import NonsenseError
from pgauthproxy.auth.model import Question
from pgauthproxy.auth.typed import authored, mapping_of, request_of
from pgauthproxy.authoring import Denied, FieldError, Mapping, Request, Tls, checked
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Certificate, Encryption, Started

MAX_OUTPUT = 65_536
MAX_LINES = 256
WORKER = {"PGAUTHPROXY_WORKER": "1"}


class TestClient:
    """A client's side of an authenticator: a function (plain, async, decorated or not), or the words of a command.

        client = TestClient(main)
        client = TestClient([sys.executable, "who.py"])                  # a process for each request
        with TestClient([sys.executable, "who.py"], worker=True) as client:  # one process for them all

    `environment` is added to this process's own. A request that takes longer than `timeout` seconds is a failure.
    """

    __test__ = False  # nothing that pytest should collect

    def __init__(
        self,
        authenticator: Callable[[Request], Mapping | Awaitable[Mapping]] | Sequence[str | os.PathLike[str]],
        *,
        worker: bool = False,
        environment: Pairs[str, str] | None = None,
        timeout: float = 10.0,
    ) -> None:
        variables = {**os.environ, **(environment or {})}
        self._asked: _Function | _Command | _Worker
        if callable(authenticator):
            if worker or environment:
                raise TypeError("a function is neither a worker nor has an environment")
            self._asked = _Function(authenticator)
        elif worker:
            self._asked = _Worker(authenticator, variables, timeout)
        else:
            self._asked = _Command(authenticator, variables, timeout)

    def ask(
        self,
        user: str,
        password: str = "",
        database: str | None = None,
        *,
        method: str = "md5",
        parameters: Pairs[str, str] | None = None,
        address: str = "127.0.0.1:50000",
        session: str = "1",
        tls: Tls | None = None,
    ) -> Mapping:
        """What the gateway would make of the answer: hosts have a port, and there is always a database.

        Raises Denied, or whatever the function raises; RuntimeError, with what it wrote to standard error, if a command
        or worker failed; ValueError if the answer means nothing.
        """
        pairs = {"user": user, **({"database": database} if database is not None else {}), **(parameters or {})}
        encoded = tuple((_bytes(name), _bytes(value)) for name, value in pairs.items())
        started = Started(Accepted(session, address), encoded, _encryption(tls) if tls is not None else None)
        if method == "md5":
            salt = secrets.token_bytes(4)
            answer = md5_answer(md5_password(_bytes(password), _bytes(user)), salt)
            return self._asked.ask(Question(started, method, Secret(answer), salt))
        if method == "cleartext":
            return self._asked.ask(Question(started, method, Secret(_bytes(password)), bytes(4)))
        return self._asked.ask(Question(started, method))

    def close(self) -> None:
        """Ends what goes on. Raises RuntimeError if a worker does not end with its input, and with status 0."""
        self._asked.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()


class _Function:
    def __init__(self, function: Callable[[Request], Mapping | Awaitable[Mapping]]) -> None:
        self._function = function
        self._runner: asyncio.Runner | None = None

    def ask(self, question: Question) -> Mapping:
        answer: Any = self._function(request_of(question))
        if isinstance(answer, Awaitable):
            answer = self._wait_for(answer)
        return _understood(lambda: mapping_of(checked(answer), question.started))

    def _wait_for(self, answer: Awaitable[Mapping]) -> Mapping:
        async def waiting() -> Mapping:
            return await answer

        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(waiting())

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
            self._runner = None


class _Command:
    def __init__(
        self, words: Sequence[str | os.PathLike[str]], environment: Pairs[str, str], timeout_seconds: float
    ) -> None:
        self._words = words
        self._environment = environment
        self._timeout = timeout_seconds

    def ask(self, question: Question) -> Mapping:
        try:
            done = subprocess.run(  # noqa: S603 (the author's own command)
                self._words,
                input=fields.encode_question(question),
                capture_output=True,
                env=self._environment,
                timeout=self._timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no answer in {self._timeout:g} s") from None
        said = done.stderr.decode(errors="backslashreplace").strip()
        _check_success(done.stdout, said)
        if done.returncode:
            raise _denied(f"exit status {done.returncode}: {said}".removesuffix(": "), done.stdout)
        return _understood(lambda: fields.decode_mapping(done.stdout, MAX_LINES))

    def close(self) -> None:
        """Nothing goes on."""


class _Worker:
    """A process that is started for the first request, and anew after it did not keep the contract."""

    def __init__(
        self, words: Sequence[str | os.PathLike[str]], environment: Pairs[str, str], timeout_seconds: float
    ) -> None:
        self._words = words
        self._environment = {**environment, **WORKER}
        self._timeout = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)

    def ask(self, question: Question) -> Mapping:
        if self._process is None:
            self._process = subprocess.Popen(  # noqa: S603 (the author's own command)
                self._words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=self._environment,
                bufsize=0,
            )
        try:
            output = self._exchange(self._process, fields.encode_question(question) + b"\n")
        except RuntimeError:
            self._process.kill()
            self._wait(self._process)
            raise
        _check_success(output, self._said())
        if not _has_host(output):
            raise _denied("an answer without _META_TARGET_HOST", output)
        return _understood(lambda: fields.decode_mapping(output, MAX_LINES))

    def _exchange(self, process: subprocess.Popen[bytes], lines: bytes) -> bytes:
        """One request and its answer, without the empty line. Raises RuntimeError."""
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 (both were asked for)
        try:
            process.stdin.write(lines)
        except BrokenPipeError:
            raise RuntimeError(f"the worker has ended: {self._said()}") from None
        output, deadline = b"", time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not (output.endswith(b"\n\n") or output == b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"no whole answer in {self._timeout:g} s: {self._said()}")
                if not (chunk := process.stdout.read(MAX_OUTPUT)):
                    raise RuntimeError(f"the worker has ended: {self._said()}")
                output += chunk
                if len(output) > MAX_OUTPUT:
                    raise RuntimeError(f"an answer of more than {MAX_OUTPUT} bytes")
        if b"\n\n" in output[:-1] or (output.startswith(b"\n") and output != b"\n"):
            raise RuntimeError("more than one answer")
        return output[:-1]

    def _said(self) -> str:
        # The process shares the file's position, which must stay at the end.
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), size, 0).decode(errors="backslashreplace").strip()

    def close(self) -> None:
        with self._errors:
            if self._process is None:
                return
            try:
                status = self._wait(self._process)
            except subprocess.TimeoutExpired:
                raise RuntimeError("the worker does not end with its input") from None
            if status:
                raise RuntimeError(f"the worker ended with status {status}: {self._said()}")

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit status; a process that does not end is ended."""
        self._process = None
        with process:
            assert process.stdin is not None  # noqa: S101 (it was asked for)
            process.stdin.close()
            try:
                return process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _understood(read: Callable[[], Any]) -> Mapping:
    try:
        return authored(read())
    except NonsenseError as error:
        raise FieldError(str(error)) from None


def _has_host(output: bytes) -> bool:
    return any(line.startswith(b"_META_TARGET_HOST=") for line in output.split(b"\n"))


def _check_success(output: bytes, said: str) -> None:
    if (failure := fields.decode_failure(output, MAX_LINES)) is not None:
        raise RuntimeError(f"{failure.decode(errors='backslashreplace')}\n{said}".strip())


def _denied(reason: str, output: bytes) -> Denied:
    told = fields.decode_error(output, MAX_LINES)
    return Denied(reason, told.decode(errors="surrogateescape") if told is not None else None)


def _encryption(tls: Tls) -> Encryption:
    found = tls.certificate
    certificate = None
    if found is not None:
        names = found.alternative_names
        certificate = Certificate(found.subject, found.issuer, found.serial, names, found.fingerprint)
    return Encryption(tls.version, "", tls.server_name, "", b"", certificate)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
