"""Speaks the contract's lines to commands and workers, as the gateway does."""

from __future__ import annotations

import hashlib
import os
import selectors
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

SECONDS = 20

Words = Sequence[str | Path]


def salted(password: str, user: str, salt: bytes) -> str:
    """The answer of a client in md5 mode, by the standard library."""
    stored = hashlib.md5((password + user).encode()).hexdigest()  # noqa: S324 (the protocol's own)
    return "md5" + hashlib.md5(stored.encode() + salt).hexdigest()  # noqa: S324


def request_lines(
    user: str, password: str, *, method: str = "md5", salt: bytes = b"\x01\xab\x00\xff", **parameters: str
) -> bytes:
    """What an authenticator reads for such a client, without the end of a worker's request."""
    pairs = {"user": user, **parameters, "_SOURCE_ADDR": "192.0.2.1:50000", "_SOURCE_METHOD": method}
    pairs |= {"_SOURCE_SESSION": "2a"}
    if method == "md5":
        pairs |= {"_SOURCE_CRED": salted(password, user, salt), "_SOURCE_SALT": salt.hex()}
    elif method == "cleartext":
        pairs |= {"_SOURCE_CRED": password, "_SOURCE_SALT": "0" * 8}
    return "".join(f"{name}={value}\n" for name, value in pairs.items()).encode(errors="surrogateescape")


def answered(output: bytes) -> dict[bytes, bytes]:
    """The pairs of an answer."""
    lines = output.removesuffix(b"\n").split(b"\n") if output else []
    return dict((name, value) for name, _, value in (line.partition(b"=") for line in lines))


def run_command(
    words: Words, lines: bytes, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """One process for one request."""
    variables = {**os.environ, **(environment or {})}
    return subprocess.run(words, input=lines, capture_output=True, env=variables, timeout=SECONDS, check=False)


class WorkerProcess:
    """One process for many requests. Every wait is bounded; it must end with its input, with status 0."""

    def __init__(self, words: Words, errors: Path, environment: Mapping[str, str] | None = None) -> None:
        variables = {**os.environ, **(environment or {}), "PGAUTHPROXY_WORKER": "1"}
        self.errors = errors
        with errors.open("wb") as file:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=variables, bufsize=0
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.requests.closed:
            self.requests.close()
        try:
            status = self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            rest = self.answers.read()
            self.answers.close()
        if kind is None:
            assert (status, rest) == (0, b""), self.errors.read_text()

    def ask(self, lines: bytes) -> bytes:
        """The lines of the answer, without the empty one that ends it."""
        self.requests.write(lines + b"\n")
        return self.read_answer()

    def read_answer(self) -> bytes:
        output, deadline = b"", time.monotonic() + SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            while not (output.endswith(b"\n\n") or output == b"\n"):
                assert selector.select(max(0.0, deadline - time.monotonic())), (output, self.errors.read_text())
                chunk = self.answers.read(65536)
                assert chunk, f"the worker has ended: {self.errors.read_text()}"
                output += chunk
        assert b"\n\n" not in output[:-1], output
        return output[:-1]
