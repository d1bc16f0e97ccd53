"""The console's side of a session that has no target: statements in, rows out (PostgreSQL manual, "Message Flow").

A generator as the logins are. It knows messages, formats and the state of a transaction; what a statement means is
said by the `parse` that it is given, and what comes of one by whoever drives it (the step Perform). The simple protocol
is spoken whole, the extended one without parameters. Lengths are judged on the header, and what a client can have the
gateway keep, prepared statements and portals, is bounded.
"""

import datetime
import struct
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, IntEnum
from typing import Final, TypeVar

import msgspec

from pgauthproxy import _wire
from pgauthproxy.errors import (
    DUPLICATE_CURSOR,
    DUPLICATE_STATEMENT,
    IN_FAILED_TRANSACTION,
    INSUFFICIENT_RESOURCES,
    PROTOCOL_VIOLATION,
    SYNTAX_ERROR,
    UNKNOWN_CURSOR,
    UNKNOWN_STATEMENT,
    ClientFault,
    FrameError,
)
from pgauthproxy.proto import messages
from pgauthproxy.proto.steps import Login, Perform, next_message

QUERY: Final = ord("Q")
PARSE: Final = ord("P")
BIND: Final = ord("B")
DESCRIBE: Final = ord("D")
EXECUTE: Final = ord("E")
CLOSE: Final = ord("C")
FLUSH: Final = ord("H")
SYNC: Final = ord("S")

PARSE_COMPLETE: Final = ord("1")
BIND_COMPLETE: Final = ord("2")
CLOSE_COMPLETE: Final = ord("3")
COMMAND_COMPLETE: Final = ord("C")
DATA_ROW: Final = ord("D")
EMPTY_QUERY_RESPONSE: Final = ord("I")
NO_DATA: Final = ord("n")
PARAMETER_DESCRIPTION: Final = ord("t")
PORTAL_SUSPENDED: Final = ord("s")
ROW_DESCRIPTION: Final = ord("T")

MAX_STATEMENT: Final = 16_384
"""Longest Query, Parse or Bind."""
LIMITS: Final = {
    QUERY: MAX_STATEMENT,
    PARSE: MAX_STATEMENT,
    BIND: MAX_STATEMENT,
    DESCRIBE: 1_024,
    EXECUTE: 1_024,
    CLOSE: 1_024,
    FLUSH: 4,
    SYNC: 4,
    messages.TERMINATE: 4,
}
MAX_KEPT: Final = 128
"""Prepared statements, and portals, of one client."""
ROWS_AT_ONCE: Final = 100
"""Rows that are sent in one step: whoever drives may wait between steps until the client has read."""

IDLE: Final = b"I"
IN_TRANSACTION: Final = b"T"
IN_FAILED: Final = b"E"
TEXT: Final = 0
BINARY: Final = 1
POSTGRES_EPOCH: Final = 946_684_800
"""2000-01-01 00:00:00 UTC, in Unix time."""

K = TypeVar("K")
Value = str | int | float | bool | None
"""A TIMESTAMPTZ is seconds since the Unix epoch, as a float."""


class Type(IntEnum):
    """What a column holds: the OIDs of pg_type."""

    BOOL = 16
    INT8 = 20
    TEXT = 25
    FLOAT8 = 701
    TIMESTAMPTZ = 1184

    @property
    def size(self) -> int:
        """As pg_type.typlen."""
        return {Type.BOOL: 1, Type.TEXT: -1}.get(self, 8)


class Column(msgspec.Struct, frozen=True):
    """One column of an answer."""

    name: str
    type: Type = Type.TEXT


class Control(Enum):
    """Statements that concern the transaction alone: nothing is done, but drivers want to hear of it."""

    BEGIN = "BEGIN"
    COMMIT = "COMMIT"
    ROLLBACK = "ROLLBACK"


class Statement(msgspec.Struct, frozen=True):
    """What was asked for. No columns: it gives no rows."""

    command: object
    columns: tuple[Column, ...] = ()


class Result(msgspec.Struct, frozen=True):
    """What came of a statement; `tag` as in CommandComplete."""

    tag: str
    rows: Sequence[tuple[Value, ...]] = ()


class ConsoleError(Exception):
    """A statement that fails; the session goes on."""

    def __init__(self, sqlstate: str, text: str) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate
        self.text = text


Parse = Callable[[str], list[Statement]]
"""The statements of a text. Raises ConsoleError."""


def serve(framer: _wire.Framer, parse: Parse, version: str, user: bytes, key: bytes) -> Login[None]:
    """Greets a client that is let in, and answers it until it leaves. Raises ClientFault if it breaks the protocol.

    `key` is what it is given to cancel with; there is nothing to cancel.
    """
    framer.allow(LIMITS)
    console = _Console(framer, parse)
    try:
        yield greeting(version, user, key)
        yield from console.run()
    except FrameError as error:
        raise ClientFault(PROTOCOL_VIOLATION, f"the console does not understand this: {error}") from error


def greeting(version: str, user: bytes, key: bytes) -> bytes:
    """From AuthenticationOk to the first ReadyForQuery."""
    parameters = (
        (b"server_version", f"18.0 (pgauthproxy {version})".encode()),
        (b"server_encoding", b"UTF8"),
        (b"client_encoding", b"UTF8"),
        (b"DateStyle", b"ISO, MDY"),
        (b"TimeZone", b"UTC"),
        (b"integer_datetimes", b"on"),
        (b"standard_conforming_strings", b"on"),
        (b"in_hot_standby", b"off"),
        (b"default_transaction_read_only", b"off"),
        (b"is_superuser", b"off"),
        (b"session_authorization", user),
    )
    said = b"".join(_wire.message(messages.PARAMETER_STATUS, b"%b\0%b\0" % pair) for pair in parameters)
    return messages.authentication(messages.AUTH_OK) + said + messages.backend_key_data(key) + ready(IDLE)


def ready(status: bytes) -> bytes:
    """A ReadyForQuery."""
    return _wire.message(messages.READY_FOR_QUERY, status)


def error_response(error: ConsoleError) -> bytes:
    """An ErrorResponse of severity ERROR."""
    text = error.text.encode(errors="replace").replace(b"\0", b"?")
    fields = b"SERROR\0VERROR\0C" + error.sqlstate.encode() + b"\0M" + text + b"\0\0"
    return _wire.message(messages.ERROR_RESPONSE, fields)


class _Portal:
    """A statement that is bound. States, in order: bound, run (`result` is set; `at` is the next row)."""

    def __init__(self, statement: Statement | None, formats: tuple[int, ...]) -> None:
        self.statement = statement
        self.formats = formats
        self.result: Result | None = None
        self.at = 0


class _Console:
    """One client's way through statements."""

    def __init__(self, framer: _wire.Framer, parse: Parse) -> None:
        self._framer = framer
        self._parse = parse
        self._status = IDLE
        self._statements: dict[bytes, Statement | None] = {}
        self._portals: dict[bytes, _Portal] = {}

    def run(self) -> Login[None]:
        skipping = False
        while True:
            kind, body = yield from next_message(self._framer)
            if kind == messages.TERMINATE:
                return
            if kind == SYNC:
                skipping = False
                if self._status == IDLE:
                    # The transaction that was only implied is over, and its portals with it.
                    self._portals.clear()
                yield ready(self._status)
            elif kind == QUERY:
                yield from self._query(_string(body))
                skipping = False
                yield ready(self._status)
            elif not skipping:
                try:
                    yield from self._extended(kind, body)
                except ConsoleError as error:
                    self._fail()
                    skipping = True
                    yield error_response(error)

    def _query(self, text: str) -> Login[None]:
        self._portals.pop(b"", None)
        try:
            statements = self._parse(text)
            if not statements:
                yield _wire.message(EMPTY_QUERY_RESPONSE, b"")
            for statement in statements:
                result = yield from self._perform(statement)
                if statement.columns:
                    yield row_description(statement.columns, ())
                for rows in _in_parts(result.rows):
                    yield b"".join(data_row(statement.columns, row, ()) for row in rows)
                yield _tag(result.tag)
        except ConsoleError as error:
            self._fail()
            yield error_response(error)

    def _perform(self, statement: Statement) -> Login[Result]:
        """Raises ConsoleError."""
        match statement.command:
            case Control.BEGIN:
                if self._status == IN_FAILED:
                    raise _aborted()
                self._status = IN_TRANSACTION
                return Result("BEGIN")
            case Control.COMMIT | Control.ROLLBACK as command:
                tag = "ROLLBACK" if self._status == IN_FAILED else command.value
                self._status = IDLE
                return Result(tag)
        if self._status == IN_FAILED:
            raise _aborted()
        result = yield Perform(statement)
        if isinstance(result, ConsoleError):
            raise result
        assert isinstance(result, Result)  # noqa: S101 (what the step is answered with)
        return result

    def _fail(self) -> None:
        if self._status == IN_TRANSACTION:
            self._status = IN_FAILED

    def _extended(self, kind: int, body: bytes) -> Login[None]:
        """Raises ConsoleError."""
        if kind == PARSE:
            self._prepare(body)
            yield _wire.message(PARSE_COMPLETE, b"")
        elif kind == BIND:
            self._bind(body)
            yield _wire.message(BIND_COMPLETE, b"")
        elif kind == DESCRIBE:
            yield self._describe(body)
        elif kind == EXECUTE:
            yield from self._execute(body)
        elif kind == CLOSE:
            what, name = _kind_and_name(body)
            if what == b"S":
                self._statements.pop(name, None)
            else:
                self._portals.pop(name, None)
            yield _wire.message(CLOSE_COMPLETE, b"")

    def _prepare(self, body: bytes) -> None:
        name, rest = _cut(body)
        text, rest = _cut(rest)
        _numbers(rest, width=4)
        statements = self._parse(text.decode(errors="surrogateescape"))
        if len(statements) > 1:
            raise ConsoleError(SYNTAX_ERROR, "cannot insert multiple commands into a prepared statement")
        if name and name in self._statements:
            raise ConsoleError(DUPLICATE_STATEMENT, "prepared statement already exists")
        _keep(self._statements, name, statements[0] if statements else None)

    def _bind(self, body: bytes) -> None:
        portal, rest = _cut(body)
        name, rest = _cut(rest)
        _, rest = _numbers(rest)
        if rest[:2] != b"\0\0":
            raise ConsoleError(PROTOCOL_VIOLATION, "statements of the console have no parameters")
        formats, rest = _numbers(rest[2:])
        statement = self._statement(name)
        columns = statement.columns if statement is not None else ()
        if rest or len(formats) not in (0, 1, len(columns)) or any(each not in (TEXT, BINARY) for each in formats):
            raise ConsoleError(PROTOCOL_VIOLATION, "bind message with result formats that do not fit")
        if portal and portal in self._portals:
            raise ConsoleError(DUPLICATE_CURSOR, "portal already exists")
        _keep(self._portals, portal, _Portal(statement, formats))

    def _describe(self, body: bytes) -> bytes:
        what, name = _kind_and_name(body)
        if what == b"S":
            statement = self._statement(name)
            formats: tuple[int, ...] = ()
            told = _wire.message(PARAMETER_DESCRIPTION, b"\0\0")
        else:
            portal = self._portal(name)
            statement, formats, told = portal.statement, portal.formats, b""
        if statement is None or not statement.columns:
            return told + _wire.message(NO_DATA, b"")
        return told + row_description(statement.columns, formats)

    def _execute(self, body: bytes) -> Login[None]:
        name, rest = _cut(body)
        if len(rest) != 4:
            raise FrameError("Execute without a number of rows")
        most = int.from_bytes(rest, signed=True)
        portal = self._portal(name)
        if portal.statement is None:
            yield _wire.message(EMPTY_QUERY_RESPONSE, b"")
            return
        if portal.result is None:
            portal.result = yield from self._perform(portal.statement)
        rows = portal.result.rows[portal.at :]
        if most > 0:
            rows = rows[:most]
        portal.at += len(rows)
        for part in _in_parts(rows):
            yield b"".join(data_row(portal.statement.columns, row, portal.formats) for row in part)
        if most > 0 and portal.at < len(portal.result.rows):
            yield _wire.message(PORTAL_SUSPENDED, b"")
        else:
            yield _tag(portal.result.tag)

    def _statement(self, name: bytes) -> Statement | None:
        if name not in self._statements:
            raise ConsoleError(UNKNOWN_STATEMENT, "prepared statement does not exist")
        return self._statements[name]

    def _portal(self, name: bytes) -> _Portal:
        if name not in self._portals:
            raise ConsoleError(UNKNOWN_CURSOR, "portal does not exist")
        return self._portals[name]


def row_description(columns: tuple[Column, ...], formats: tuple[int, ...]) -> bytes:
    """A RowDescription; `formats` as Bind gave them: none, one for all, or one for each."""
    fields = b"".join(
        column.name.encode()
        + b"\0"
        + struct.pack("!ihihih", 0, 0, column.type, column.type.size, -1, _format_of(formats, at))
        for at, column in enumerate(columns)
    )
    return _wire.message(ROW_DESCRIPTION, len(columns).to_bytes(2) + fields)


def data_row(columns: tuple[Column, ...], row: tuple[Value, ...], formats: tuple[int, ...]) -> bytes:
    """A DataRow."""
    fields = bytearray(len(columns).to_bytes(2))
    for at, (column, value) in enumerate(zip(columns, row, strict=True)):
        if value is None:
            fields += b"\xff\xff\xff\xff"
        else:
            encoded = _binary(column.type, value) if _format_of(formats, at) == BINARY else _text(column.type, value)
            fields += len(encoded).to_bytes(4) + encoded
    return _wire.message(DATA_ROW, bytes(fields))


def _text(kind: Type, value: str | int | float) -> bytes:
    if kind is Type.BOOL:
        return b"t" if value else b"f"
    if kind is Type.TIMESTAMPTZ:
        at = datetime.datetime.fromtimestamp(float(value), datetime.UTC)
        return at.strftime("%Y-%m-%d %H:%M:%S.%f+00").encode()
    if kind is Type.FLOAT8:
        return repr(float(value)).encode()
    return str(value).encode(errors="replace").replace(b"\0", b"?")


def _binary(kind: Type, value: str | int | float) -> bytes:
    if kind is Type.BOOL:
        return b"\1" if value else b"\0"
    if kind is Type.INT8:
        return struct.pack("!q", int(value))
    if kind is Type.FLOAT8:
        return struct.pack("!d", float(value))
    if kind is Type.TIMESTAMPTZ:
        return struct.pack("!q", round((float(value) - POSTGRES_EPOCH) * 1_000_000))
    return _text(kind, value)


def _format_of(formats: tuple[int, ...], at: int) -> int:
    return TEXT if not formats else formats[0] if len(formats) == 1 else formats[at]


def _in_parts(rows: Sequence[tuple[Value, ...]]) -> Iterator[Sequence[tuple[Value, ...]]]:
    for at in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[at : at + ROWS_AT_ONCE]


def _tag(tag: str) -> bytes:
    return _wire.message(COMMAND_COMPLETE, tag.encode() + b"\0")


def _aborted() -> ConsoleError:
    text = "current transaction is aborted, commands ignored until end of transaction block"
    return ConsoleError(IN_FAILED_TRANSACTION, text)


def _keep(kept: dict[bytes, K], name: bytes, value: K) -> None:
    if name not in kept and len(kept) >= MAX_KEPT:
        raise ConsoleError(INSUFFICIENT_RESOURCES, f"more than {MAX_KEPT} at once")
    kept[name] = value


def _string(body: bytes) -> str:
    """The one string of a message. Raises FrameError."""
    if not body.endswith(b"\0") or body.count(b"\0") != 1:
        raise FrameError("a string without exactly one NUL, at its end")
    return body[:-1].decode(errors="surrogateescape")


def _cut(body: bytes) -> tuple[bytes, bytes]:
    """A string, and what follows it. Raises FrameError."""
    string, terminator, rest = body.partition(b"\0")
    if not terminator:
        raise FrameError("a string without an end")
    return string, rest


def _kind_and_name(body: bytes) -> tuple[bytes, bytes]:
    """What Describe and Close name: a statement (S) or a portal (P). Raises FrameError."""
    if body[:1] not in (b"S", b"P"):
        raise FrameError("neither a statement nor a portal")
    return body[:1], _string(body[1:]).encode(errors="surrogateescape")


def _numbers(body: bytes, width: int = 2) -> tuple[tuple[int, ...], bytes]:
    """A list of numbers of so many bytes, and what follows it. Raises FrameError."""
    count = int.from_bytes(body[:2])
    end = 2 + count * width
    if len(body) < end:
        raise FrameError("a list that is cut short")
    return tuple(int.from_bytes(body[at : at + width]) for at in range(2, end, width)), body[end:]
