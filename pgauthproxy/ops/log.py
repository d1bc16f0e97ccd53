"""The log: one line for each login, end and refusal, on standard error.

A line can neither be forged by what a client sent nor stop the gateway: values are escaped and capped, and when nobody
reads standard error, lines wait in memory up to a bound and are counted beyond it.
"""

import asyncio
import datetime
import functools
import os
import re
import select
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from json.encoder import encode_basestring as quoted
from typing import Any, Final

import msgspec
import structlog

from pgauthproxy.errors import Fault
from pgauthproxy.events import (
    AdminActed,
    AdminEvent,
    AdminLeft,
    AdminLoggedIn,
    AuthenticatorSaid,
    Cancelled,
    Ended,
    Event,
    LoggedIn,
    Noticed,
    Refused,
)
from pgauthproxy.ops.later import Later
from pgauthproxy.stages import Started

MAX_VALUE: Final = 256
"""Bytes of one value in UTF-8; longer ones are cut. A line of them all must fit PIPE_BYTES, quoted."""
MAX_WAITING: Final = 10_000
"""Lines that wait for a reader of standard error."""
LATE_SECONDS: Final = 0.02
"""How long lines may wait for others to be written with them."""
# POSIX promises that a pipe that polls writable takes this many bytes without blocking.
PIPE_BYTES: Final = select.PIPE_BUF
STDERR: Final = 2
MISLEADS: Final = re.compile(r"[\s=\"']|^$").search
# Bytes of a character in UTF-8.
LONGEST_CHARACTER: Final = 4


def printable(value: bytes | str) -> str:
    """What a client or program sent, with nothing in it that a terminal or a line of the log would act on."""
    text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
    if not text.isprintable():
        text = "".join(
            char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
        )
    elif len(text) <= MAX_VALUE // LONGEST_CHARACTER:
        return text
    encoded = text.encode()
    return text if len(encoded) <= MAX_VALUE else encoded[:MAX_VALUE].decode(errors="ignore") + "…"


def _milliseconds(seconds: float) -> float:
    # To hundredths. What `round` does besides, so that halves are even, costs ten times as much.
    return int(seconds * 100_000 + 0.5) / 100


class LineWriter:
    """Writes lines to a descriptor without ever waiting for its reader."""

    def __init__(self, descriptor: int, dropped_line: Callable[[int], str]) -> None:
        """`dropped_line` words how many lines nobody read."""
        self._descriptor = descriptor
        self._dropped_line = dropped_line
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._later = Later(self.flush)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def msg(self, line: str) -> None:
        """Takes one line, without its line feed; `flush` writes it."""
        if len(self._waiting) >= MAX_WAITING:
            self._dropped += 1
        else:
            self._waiting.append(line.encode(errors="backslashreplace")[: PIPE_BYTES - 1] + b"\n")

    debug = info = warning = error = msg

    def flush(self) -> None:
        """Writes what the reader takes now, and sees to the rest later."""
        while self._waiting or self._dropped:
            if not self._poll.poll(0):
                self._later.plan()
                return
            if not self._waiting:
                self._waiting.append(self._dropped_line(self._dropped).encode() + b"\n")
                self._dropped = 0
            chunk = self._next_chunk()
            try:
                os.write(self._descriptor, chunk)
            except BlockingIOError:
                self._waiting.appendleft(chunk)
                self._later.plan()
                return
            except OSError:
                # The reader is gone for good, and with it the one place where this could be said.
                self._waiting.clear()
                self._dropped = 0

    def _next_chunk(self) -> bytes:
        """Whole lines, as many as a pipe takes at once."""
        chunk = self._waiting.popleft()
        while self._waiting and len(chunk) + len(self._waiting[0]) <= PIPE_BYTES:
            chunk += self._waiting.popleft()
        return chunk


def render_text(_logger: object, level: str, fields: MutableMapping[str, Any]) -> str:
    """One line for people: time, level, what happened, then `key=value`s, quoted where they hold a space."""
    second, microseconds = divmod(int(fields.pop("at") * 1e6), 1_000_000)
    event = fields.pop("event")
    values = tuple(fields.values())
    template = _template(tuple(fields))
    line = template % values
    if _may_mislead(line, len(values)):
        # Those that could be mistaken for more, or less, than one value are put in quotes.
        line = template % tuple([quoted(each) if isinstance(each, str) and MISLEADS(each) else each for each in values])
    return f"{_local_second(second)}.{microseconds:06d} {level:7} {event} {line}".rstrip()


@functools.lru_cache(64)
def _template(names: tuple[str, ...]) -> str:
    """What `key=value`s of these names are put into; there are few kinds of lines."""
    return " ".join([f"{name}=%s" for name in names])


def _may_mislead(line: str, count: int) -> bool:
    """Whether so many `key=value`s could be taken for others."""
    if line.count(" ") >= count or line.count("=") > count:
        return True
    return '"' in line or "'" in line or "= " in line or line.endswith("=")


@functools.lru_cache(8)
def _local_second(second: int) -> str:
    """A time as the clock on the wall shows it; lines come many to the second."""
    return datetime.datetime.fromtimestamp(second).isoformat()


def render_json(_logger: object, level: str, fields: MutableMapping[str, Any]) -> str:
    """One JSON object; the time is UTC."""
    at = datetime.datetime.fromtimestamp(fields.pop("at"), datetime.UTC).isoformat(timespec="microseconds")
    return msgspec.json.encode({"timestamp": at, "level": level, **fields}).decode()


class LogSink:
    """Turns what happened into lines of a descriptor, as `text` or `json`, from `level` on.

    Lines are made and written some milliseconds late, several at once: done in the middle of a login they would be a
    sixth of its cost. What concerns the gateway itself is written at once, and everything when it ends (`flush`).
    """

    def __init__(self, log_format: str, level: str, descriptor: int = STDERR, worker: int | None = None) -> None:
        """`worker` is which of several processes writes, if there are several."""
        self._always = {} if worker is None else {"worker": worker}
        self._writer = LineWriter(descriptor, self._dropped_line)
        self._waiting: list[tuple[float, Event]] = []
        self.change(log_format, level)

    def change(self, log_format: str, level: str) -> None:
        """What happens from here on is written in this form, from this level on."""
        self.flush()
        # One step: the level's name and the time are put in where the line is made.
        self._render = render_json if log_format == "json" else render_text
        self._tells_of_sessions = level in ("debug", "info")
        self._logger: Any = structlog.wrap_logger(
            self._writer,
            processors=[self._render],
            wrapper_class=structlog.make_filtering_bound_logger(level),
        ).bind(**self._always)

    def _dropped_line(self, count: int) -> str:
        return self._line("warning", "lines of the log were dropped: nobody read them", time.time(), {"lines": count})

    def _line(self, level: str, what: str, at: float, facts: dict[str, object]) -> str:
        """What structlog has made in the end, without the copies of all facts that it makes on the way."""
        return self._render(None, level, {**self._always, "at": at, **facts, "event": what})

    def __call__(self, event: Event) -> None:
        self._waiting.append((time.time(), event))
        if isinstance(event, Noticed):
            self.flush()
        elif len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(LATE_SECONDS, self.flush)

    def flush(self) -> None:
        """Writes all that has happened, as far as the reader takes it."""
        waiting, self._waiting = self._waiting, []
        for at, event in waiting:
            self._write(at, event)
        self._writer.flush()

    def _write(self, at: float, event: Event) -> None:
        match event:
            case LoggedIn():
                if self._tells_of_sessions:
                    self._writer.msg(self._line("info", "login", at, login_facts(event, printable)))
            case Ended():
                if self._tells_of_sessions:
                    self._writer.msg(self._line("info", "session ended", at, end_facts(event, printable)))
            case Refused():
                level = "info" if event.fault.whose == "client" else "warning"
                getattr(self._logger, level)("refused", at=at, **refusal_facts(event, printable))
            case Cancelled():
                self._logger.info("cancel request", at=at, **cancel_facts(event))
            case AdminLoggedIn() | AdminActed() | AdminLeft():
                what, facts = admin_facts(event, printable)
                self._logger.info(what, at=at, **facts)
            case AuthenticatorSaid():
                for line in event.lines:
                    self._logger.warning("authenticator says", at=at, session=event.session, text=printable(line))
                if event.dropped:
                    self._logger.warning(
                        "authenticator says more", at=at, session=event.session, dropped_bytes=event.dropped
                    )
            case Noticed():
                getattr(self._logger, event.level)(event.what, at=at, **dict(event.facts))


Text = Callable[[bytes | str], str]
"""Makes text of what came from outside."""


def login_facts(event: LoggedIn, text: Text) -> dict[str, object]:
    attached = event.attached
    granted = attached.granted
    mapping = granted.mapping
    facts: dict[str, object] = _identity(granted.started, text)
    facts["target"] = str(attached.reached)
    facts["target_user"] = text(mapping.user)
    facts["target_database"] = text(mapping.database)
    if attached.encryption is not None:
        facts["target_tls"] = attached.encryption.version
    facts["authenticator_ms"] = _milliseconds(granted.authenticator_seconds)
    facts["connect_ms"] = _milliseconds(attached.connect_seconds)
    facts["login_ms"] = _milliseconds(attached.login_seconds)
    facts["total_ms"] = _milliseconds(event.total_seconds)
    return facts


def end_facts(event: Ended, text: Text) -> dict[str, object]:
    return {
        "session": event.session,
        "why": event.reason.value,
        **({"detail": text(event.detail)} if event.detail else {}),
        "bytes_from_client": event.bytes_from_client,
        "bytes_from_target": event.bytes_from_target,
        "seconds": round(event.seconds, 3),
    }


def refusal_facts(event: Refused, text: Text) -> dict[str, object]:
    return {**_who(event, text), **_reason(event.fault, text)}


def cancel_facts(event: Cancelled) -> dict[str, object]:
    return {"client": event.address, "session": event.session, "outcome": event.outcome}


def admin_facts(event: AdminEvent, text: Text) -> tuple[str, dict[str, object]]:
    """What has happened, in two words, and what is to be said of it."""
    if isinstance(event, AdminLeft):
        detail = {"detail": text(event.detail)} if event.detail else {}
        return "admin left", {"session": event.session, **detail, "seconds": round(event.seconds, 3)}
    who = {"session": event.session, "client": event.address, "user": text(event.user)}
    if isinstance(event, AdminLoggedIn):
        return "admin login", {**who, "may_act": event.may_act}
    return "admin act", {**who, "act": text(event.act), "outcome": text(event.outcome)}


def _who(event: Refused, text: Text) -> dict[str, object]:
    if event.started is not None:
        return _identity(event.started, text)
    return {"session": event.accepted.session, "client": event.accepted.address}


def _identity(started: Started, text: Text) -> dict[str, object]:
    identity: dict[str, object] = {
        "session": started.accepted.session,
        "client": started.accepted.address,
        "user": text(started.user),
        "database": text(started.database),
    }
    if started.encryption is not None:
        identity["tls"] = started.encryption.version
        if started.encryption.certificate is not None:
            identity["certificate"] = text(started.encryption.certificate.subject)
    return identity


def _reason(fault: Fault, text: Text) -> dict[str, str]:
    return {"sqlstate": fault.sqlstate, "fault_of": fault.whose, "reason": text(fault.detail or "")}
