"""For authors of authenticators in Python (docs/python-authenticators.md).

    from pgauthproxy.authenticator import Denied, Mapping, Request, authenticator

    @authenticator
    def main(request: Request) -> Mapping:
        if request.user != "alice" or not request.password_is("wonderland"):
            raise Denied("unknown user or wrong password")
        return Mapping("db7:5432", "shop_ro", password="only the gateway knows")

    if __name__ == "__main__":
        main.run()

The file is a command, a worker (with PGAUTHPROXY_WORKER=1, which the gateway sets for workers, or the argument
`--worker`), and in-process `callable: "file:main"`. What stands in `__all__` stays as it is; the rest may change.
"""

from __future__ import annotations

import os
import sys

from pgauthproxy.authoring import (
    TYPE_CHECKING,
    Certificate,
    Denied,
    FieldError,
    Mapping,
    NoPasswordError,
    Request,
    Tls,
    checked,
    told_by,
    what_failed,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Iterator
    from typing import Any, Generic, NoReturn, TypeVar

    from pgauthproxy.rehearsal import TestClient

    Answer = TypeVar("Answer", bound="Mapping | Awaitable[Mapping]", covariant=True)
else:

    class Generic:
        """typing's, as far as it is needed, in a fraction of its time."""

        def __class_getitem__(cls, _parameter):
            return cls

    Answer = None

    def __getattr__(name):
        """What tests need is loaded for tests alone."""
        if name == "TestClient":
            from pgauthproxy.rehearsal import TestClient

            return TestClient
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Certificate",
    "Denied",
    "FieldError",
    "Mapping",
    "NoPasswordError",
    "Request",
    "TestClient",
    "Tls",
    "authenticator",
]

WORKER_VARIABLE = "PGAUTHPROXY_WORKER"
WORKER_ARGUMENT = "--worker"
REFUSED = 1
STANDARD_INPUT, STANDARD_OUTPUT, STANDARD_ERROR = 0, 1, 2
CHUNK = 65_536


class Runnable(Generic[Answer]):
    """An author's function, which it calls when it is called, and what makes a program of it."""

    def __init__(self, function: Callable[[Request], Answer]) -> None:
        self.__wrapped__ = function
        self.__doc__ = function.__doc__
        self._runner: asyncio.Runner | None = None

    def __call__(self, request: Request) -> Answer:
        return self.__wrapped__(request)

    def run(self) -> NoReturn:
        """Is the program: answers one request and exits with its status, or as a worker one after the other until
        the end of its input."""
        worker = os.environ.pop(WORKER_VARIABLE, "") == "1" or WORKER_ARGUMENT in sys.argv[1:]
        requests, answers = _take_pipes()
        try:
            status = self._serve(requests, answers) if worker else self._answer_one(requests, answers)
        except BrokenPipeError:
            # The gateway has gone, or wants no answer any more.
            status = REFUSED
        finally:
            if self._runner is not None:
                self._runner.close()
        sys.exit(status)

    def _answer_one(self, requests: int, answers: int) -> int:
        chunks = []
        while chunk := os.read(requests, CHUNK):
            chunks.append(chunk)
        lines, agreed = self._judge(b"".join(chunks))
        _write(answers, lines)
        return 0 if agreed else REFUSED

    def _serve(self, requests: int, answers: int) -> int:
        for lines in _split_requests(requests):
            _write(answers, self._judge(lines)[0] + b"\n")
        return 0

    def _judge(self, lines: bytes) -> tuple[bytes, bool]:
        """The lines of the answer, and whether it lets the client in."""
        try:
            request = read_request(lines)
            answer: Any = self.__wrapped__(request)
            if hasattr(answer, "__await__"):
                answer = self._wait_for(answer)
            return mapping_lines(checked(answer), request), True
        except Denied as denied:
            _note(f"refused: {denied.reason}")
            told = told_by(denied)
            return (b"_META_ERROR=" + told + b"\n" if told else b""), False
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            what = what_failed(error, getattr(self.__wrapped__, "__code__", None))
            _note_failure(error, what)
            return _line("_META_FAILED", what), False

    def _wait_for(self, answer: Awaitable[Mapping]) -> Mapping:
        """In one event loop for the worker's whole life, so that what an author keeps open between requests lives."""
        import asyncio

        async def waiting() -> Mapping:
            return await answer

        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(waiting())


def authenticator(function: Callable[[Request], Answer]) -> Runnable[Answer]:
    """Makes a function, plain or async, an authenticator: a command, a worker, and in-process."""
    return Runnable(function)


def read_request(lines: bytes) -> Request:
    """The request that the contract's lines are. Raises ValueError if there is no user."""
    pairs = dict(line.split("=", 1) for line in lines.decode(errors="surrogateescape").split("\n") if "=" in line)
    source = {name: pairs.pop(name) for name in list(pairs) if name.startswith("_SOURCE_")}
    if not pairs.get("user"):
        raise FieldError("a request without a user")
    salt, credential = source.get("_SOURCE_SALT", "0" * 8), source.get("_SOURCE_CRED")
    # pgAuthProxy does not say which it is.
    method = source.get("_SOURCE_METHOD") or ("cleartext" if salt == "0" * 8 else "md5")
    return Request(
        pairs["user"],
        pairs.get("database"),
        parameters=pairs,
        address=source.get("_SOURCE_ADDR", ""),
        method=method,
        session=source.get("_SOURCE_SESSION", ""),
        password=credential if method == "cleartext" else None,
        answer=credential if method == "md5" else None,
        salt=bytes.fromhex(salt),
        tls=_read_tls(source),
    )


def _read_tls(source: dict[str, str]) -> Tls | None:
    if "_SOURCE_TLS" not in source:
        return None
    certificate = None
    if "_SOURCE_TLS_SUBJECT" in source:
        names = ("SUBJECT", "ISSUER", "SERIAL", "SAN", "FINGERPRINT")
        certificate = Certificate(*(source.get(f"_SOURCE_TLS_{name}", "") for name in names))
    return Tls(source["_SOURCE_TLS"], source.get("_SOURCE_TLS_SNI", ""), certificate)


def mapping_lines(mapping: Mapping, request: Request) -> bytes:
    """The contract's lines for a mapping. Without a database it is the one that was asked for."""
    pairs = {
        "_META_TARGET_HOST": mapping.host,
        "_META_TARGET_PASSWORD": mapping.password,
        "_META_TARGET_CRED": "client" if mapping.credential_from_client else mapping.md5_hash,
        "_META_TARGET_TLS": mapping.tls,
        "_META_TARGET_CA": mapping.tls_ca,
        "_META_TARGET_CERT": mapping.tls_cert,
        "_META_TARGET_KEY": mapping.tls_key,
        "_META_TARGET_TLS_NEGOTIATION": mapping.tls_negotiation,
        "_META_TARGET_TLS_NAME": mapping.tls_name,
        "_META_SOURCE_VERIFIER": mapping.verifier,
        "_META_SESSION_SECONDS": mapping.session_seconds,
        "_META_IDLE_TIMEOUT": mapping.idle_timeout,
        "_META_IDLE_IN_TRANSACTION_TIMEOUT": mapping.idle_in_transaction_timeout,
        "_META_CACHE_SECONDS": mapping.cache_seconds,
        "user": mapping.user,
        "database": mapping.database or request.database,
        **mapping.parameters,
    }
    return b"".join(_line(name, str(value)) for name, value in pairs.items() if value is not None)


def _line(name: str, value: str) -> bytes:
    return f"{name}={value}\n".encode(errors="surrogateescape")


def _take_pipes() -> tuple[int, int]:
    """Standard input and output, for the contract alone: what the author's code prints goes to standard error, and
    what it starts reads nothing. A stray line in between would be taken for part of an answer."""
    requests, answers = os.dup(STANDARD_INPUT), os.dup(STANDARD_OUTPUT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, STANDARD_INPUT)
    os.close(nothing)
    os.dup2(STANDARD_ERROR, STANDARD_OUTPUT)
    sys.stdout = sys.stderr
    return requests, answers


def _split_requests(descriptor: int) -> Iterator[bytes]:
    """Each ends with an empty line; one that is cut off by the end of the input is nobody's any more."""
    with open(descriptor, "rb") as pipe:
        lines: list[bytes] = []
        for line in pipe:
            if line == b"\n":
                yield b"".join(lines)
                lines.clear()
            else:
                lines.append(line)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _note(text: str) -> None:
    """Says something to the gateway's log, which takes lines."""
    line = text.replace("\n", " ")
    sys.stderr.write(line.encode(errors="backslashreplace").decode() + "\n")


def _note_failure(error: BaseException, what: str) -> None:
    """The traceback without the error's own text, which might hold a value."""
    import traceback

    for part in traceback.format_tb(error.__traceback__)[1:]:
        sys.stderr.write(part)
    _note(f"failed: {what}")
