"""Peers that speak the protocol byte by byte, as tests want it: a client, and a target that follows a script."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

SECONDS = 20
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
CANCEL_REQUEST = 80877102
GSSENC_REQUEST = struct.pack("!ii", 8, 80877104)
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""The value of SO_LINGER that makes a close a reset."""


def startup(version: int = 196608, **parameters: str) -> bytes:
    """A startup packet; `user` is alice unless given."""
    pairs = {"user": "alice", "database": "postgres"} | parameters
    body = b"".join(name.encode() + b"\0" + value.encode() + b"\0" for name, value in pairs.items()) + b"\0"
    return raw_startup(body, version)


def raw_startup(body: bytes, version: int = 196608) -> bytes:
    return struct.pack("!ii", len(body) + 8, version) + body


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def password(text: str = "md5" + "0" * 32) -> bytes:
    return message(b"p", text.encode() + b"\0")


def query(sql: str) -> bytes:
    return message(b"Q", sql.encode() + b"\0")


def cancel_request(key: bytes) -> bytes:
    return struct.pack("!ii", 8 + len(key), CANCEL_REQUEST) + key


def proxy_v1(source: str = "192.0.2.7", port: int = 56324, destination: str = "") -> bytes:
    """A load balancer's header in version 1 of the PROXY protocol."""
    family = 6 if ":" in source else 4
    destination = destination or ("::1" if family == 6 else "198.51.100.1")
    return f"PROXY TCP{family} {source} {destination} {port} 5432\r\n".encode()


def proxy_v2(
    source: str = "192.0.2.7", port: int = 56324, destination: str = "198.51.100.1", additions: bytes = b""
) -> bytes:
    """The same in version 2."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    body = socket.inet_pton(family, source) + socket.inet_pton(family, destination) + struct.pack("!HH", port, 5432)
    return raw_proxy_v2(0x21, 0x21 if ":" in source else 0x11, body + additions)


def raw_proxy_v2(command: int, family: int, body: bytes) -> bytes:
    return b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", command, family, len(body)) + body


def error_fields(body: bytes) -> dict[str, str]:
    return {field[:1].decode(): field[1:].decode(errors="replace") for field in body.split(b"\0") if field}


class RawClient:
    """A socket that reads whole messages. Every wait is bounded."""

    def __init__(self, port: int, family: int = socket.AF_INET, source: str = "") -> None:
        """`source` is the address to come from, if it is to be a particular one."""
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(SECONDS)
        try:
            if source:
                self.socket.bind((source, 0))
            self.socket.connect(("127.0.0.1" if family == socket.AF_INET else "::1", port))
        except OSError:
            self.socket.close()
            raise

    @classmethod
    def of_folder(cls, folder: object, port: int) -> Self:
        """A client of the Unix socket there."""
        client = cls.__new__(cls)
        client.socket = socket.socket(socket.AF_UNIX)
        client.socket.settimeout(SECONDS)
        client.socket.connect(f"{folder}/.s.PGSQL.{port}")
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, count: int) -> bytes:
        """Exactly this many bytes. Raises EOFError."""
        data = b""
        while len(data) < count:
            chunk = self.socket.recv(count - len(data))
            if not chunk:
                raise EOFError(data)
            data += chunk
        return data

    def read_message(self) -> tuple[bytes, bytes]:
        header = self.read(5)
        return header[:1], self.read(struct.unpack("!i", header[1:])[0] - 4)

    def read_until(self, kind: bytes) -> list[tuple[bytes, bytes]]:
        """All messages up to and with the first of this kind."""
        seen = [self.read_message()]
        while seen[-1][0] != kind:
            seen.append(self.read_message())
        return seen

    def read_error(self) -> dict[str, str]:
        """The fields of the error that must come next, after which the connection must close."""
        kind, body = self.read_message()
        assert kind == b"E", (kind, body)
        assert self.read_to_end() == b""
        return error_fields(body)

    def read_fatal(self) -> tuple[str, str]:
        """SQLSTATE and text of the error that must come next and be final, in PostgreSQL's form."""
        error = self.read_error()
        assert error["S"] == error["V"] == "FATAL"
        return error["C"], error["M"]

    def read_to_end(self) -> bytes:
        """All that comes until the connection closes, by a reset or in order."""
        data = b""
        try:
            while chunk := self.socket.recv(65536):
                data += chunk
        except ConnectionResetError:
            return data
        return data

    def log_in(self, **parameters: str) -> list[tuple[bytes, bytes]]:
        """Startup and an MD5 answer (of no password in particular); all messages up to ReadyForQuery."""
        self.send(startup(**parameters))
        kind, body = self.read_message()
        assert (kind, body[:4]) == (b"R", b"\0\0\0\x05"), (kind, body)
        self.send(password())
        return self.read_until(b"Z")

    def ask(self, sql: str) -> list[bytes]:
        """The first column of the rows."""
        self.send(query(sql))
        messages = self.read_until(b"Z")
        assert not [error_fields(body) for kind, body in messages if kind == b"E"]
        return [body[6:] for kind, body in messages if kind == b"D"]

    def assert_served(self) -> None:
        """A query must be answered."""
        self.send(query("select 42"))
        assert (b"D", b"\0\x01\0\0\0\x0242") in self.read_until(b"Z")


class ScriptedTarget:
    """A target that does what `script(connection)` does, for each connection, in a thread of its own.

    Before that it does what `opens` does, which gives the connection that the script gets. Unless that is said, it
    speaks no TLS, and says so.
    """

    def __init__(
        self,
        script: Callable[[socket.socket], None],
        host: str = "127.0.0.1",
        opens: Callable[[socket.socket], socket.socket] | None = None,
    ) -> None:
        self._script = script
        self._opens = opens or refuse_tls
        self._listening = socket.create_server((host, 0))
        self.port: int = self._listening.getsockname()[1]
        self.failures: list[BaseException] = []
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> ScriptedTarget:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self._open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join(SECONDS)
        if error is None and self.failures:
            raise self.failures[0]
        for failure in self.failures:
            assert error is not None
            error.add_note(f"the target failed: {failure!r}")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            connection.settimeout(SECONDS)
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, accepted: socket.socket) -> None:
        with contextlib.ExitStack() as opened:
            opened.enter_context(accepted)
            try:
                connection = opened.enter_context(self._opens(accepted))
                self._open.append(connection)
                self._script(connection)
            except (ConnectionError, BrokenPipeError):
                return
            except BaseException as failure:  # told to the test when the block ends
                self.failures.append(failure)


def refuse_tls(connection: socket.socket) -> socket.socket:
    """Answers an SSLRequest, if that is what comes first."""
    if connection.recv(len(SSL_REQUEST), socket.MSG_PEEK | socket.MSG_WAITALL) == SSL_REQUEST:
        connection.recv(len(SSL_REQUEST), socket.MSG_WAITALL)
        connection.sendall(b"N")
    return connection


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """This many bytes, less only at the end of what comes."""
    data = bytearray()
    while len(data) < size and (chunk := connection.recv(min(1 << 20, size - len(data)))):
        data += chunk
    return bytes(data)


def read_startup(connection: socket.socket) -> bytes:
    """The body of the startup packet that a target is sent. Raises ConnectionAbortedError if none comes."""
    header = read_exactly(connection, 4)
    if len(header) < 4:
        raise ConnectionAbortedError("no startup packet")
    return read_exactly(connection, struct.unpack("!i", header)[0] - 4)


AUTH_OK = message(b"R", struct.pack("!i", 0))
READY = message(b"Z", b"I")
KEY = message(b"K", struct.pack("!ii", 4711, 815))


def greet(connection: socket.socket) -> None:
    """Lets anybody in, as a target with method trust does."""
    read_startup(connection)
    connection.sendall(AUTH_OK + message(b"S", b"server_version\x0018.0\0") + KEY + READY)
