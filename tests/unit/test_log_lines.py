"""Lines of the log: nothing in them acts on a terminal or forges another, and nobody ever waits for their reader."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import re
import select
from collections.abc import Callable, Iterator
from contextvars import Context
from typing import Any

import pytest

from pgauthproxy.errors import AuthenticatorFault, ClientFault
from pgauthproxy.events import AuthenticatorSaid, Cancelled, CloseReason, Ended, Event, Noticed, Refused
from pgauthproxy.ops import log
from pgauthproxy.ops.log import LineWriter, LogSink, printable, render_json, render_text
from pgauthproxy.stages import Accepted, Started

SECONDS = 20
NOON = datetime.datetime(2026, 11, 24, 12, 0, 0, 123456, datetime.UTC)


class Pipe:
    """A pipe with nobody at its end unless a test reads."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def fill(self) -> None:
        """Puts in as much as goes in, as lines of dots."""
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b"." * 511 + b"\n")
        os.set_blocking(self.writer, True)

    def lines(self) -> list[str]:
        """All that can be read now, but what `fill` put in."""
        read = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.reader, 1 << 20):
                read += chunk
        assert read == b"" or read.endswith(b"\n")
        return [line for line in read.decode(errors="surrogateescape").split("\n")[:-1] if not line.startswith(".")]

    def line_writer(self) -> LineWriter:
        return LineWriter(self.writer, lambda count: f"{count} lines were dropped")

    def drain(self, writer: LineWriter) -> list[str]:
        """Reads and lets the writer write until it has nothing more."""
        lines = self.lines()
        while True:
            writer.flush()
            more = self.lines()
            if not more:
                return lines
            lines += more

    def close_reader(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def close(self) -> None:
        for descriptor in (self.reader, self.writer):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


@pytest.mark.parametrize("text", ["", "alice", "Zoë Ὀδυσσεύς 密码", "a b", "a=b", 'say "hi"', "back\\slash"])
def test_what_can_be_shown_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text
    assert printable(text.encode()) == text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"a\nb", "a\\nb"),
        (b"a\r\n\tb\0", "a\\r\\n\\tb\\x00"),
        (b"\x1b[2Jcleared", "\\x1b[2Jcleared"),
        (b"\x7f", "\\x7f"),
        ("\u0085\u009b31m", "\\x85\\x9b31m"),
        ("a\u2028b\u2029c", "a\\u2028b\\u2029c"),
        ("\u202eevil", "\\u202eevil"),
        ("\u200b\ufeff", "\\u200b\\ufeff"),
        ("\U000e0041", "\\U000e0041"),
        (b"\xff\xfe", "\\xff\\xfe"),
        (b"caf\xe9", "caf\\xe9"),
        ("\udcff", "\\udcff"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_would_act_on_a_terminal_or_a_line_is_escaped(value: bytes | str, shown: str) -> None:
    assert printable(value) == shown
    assert printable(shown) == shown


def test_every_byte_alone_becomes_one_printable_line() -> None:
    for byte in range(256):
        shown = printable(bytes([byte]))
        assert shown.isprintable()
        assert len(shown.split("\n")) == 1


def test_a_long_value_is_cut_between_characters_and_shows_it() -> None:
    assert printable("ä" * (log.MAX_VALUE // 2)) == "ä" * (log.MAX_VALUE // 2)
    assert printable("x" + "ä" * (log.MAX_VALUE // 2)) == "x" + "ä" * (log.MAX_VALUE // 2 - 1) + "…"
    assert printable("x" * log.MAX_VALUE) == "x" * log.MAX_VALUE
    assert printable("x" * (log.MAX_VALUE + 1)) == "x" * log.MAX_VALUE + "…"
    assert len(printable(b"\n" * 10_000)) == log.MAX_VALUE + 1


def test_a_line_of_text_quotes_what_could_be_taken_for_something_else() -> None:
    fields = {
        "at": NOON.timestamp(),
        "event": "login",
        "user": "alice",
        "empty": "",
        "spaced": "a b",
        "forged": "x user=bob",
        "quoted": 'say "hi"',
        "apostrophe": "it's",
        "umlaut": "Zoë",
        "number": 1.5,
        "none": None,
    }
    moment, _, rest = render_text(None, "warning", fields).partition(" ")
    assert datetime.datetime.fromisoformat(moment).astimezone(datetime.UTC) == NOON
    assert rest == (
        'warning login user=alice empty="" spaced="a b" forged="x user=bob" quoted="say \\"hi\\"" '
        'apostrophe="it\'s" umlaut=Zoë number=1.5 none=None'
    )


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_levels_line_up(level: str) -> None:
    assert render_text(None, level, {"at": 0, "event": "x"}).endswith(f" {level.ljust(7)} x")


def test_a_line_of_json_is_one_object_with_the_time_in_utc() -> None:
    fields = {"at": NOON.timestamp(), "event": "login", "user": 'a"\n\u2028b', "bytes": 1, "ms": 0.5, "none": None}
    line = render_json(None, "info", fields)
    assert "\n" not in line
    assert json.loads(line) == {
        "timestamp": "2026-11-24T12:00:00.123456+00:00",
        "level": "info",
        "event": "login",
        "user": 'a"\n\u2028b',
        "bytes": 1,
        "ms": 0.5,
        "none": None,
    }


def test_lines_are_written_when_they_are_flushed(pipe: Pipe) -> None:
    writer = pipe.line_writer()
    writer.msg("one")
    writer.msg("zwei ä \udcff")
    assert pipe.lines() == []
    writer.flush()
    assert pipe.lines() == ["one", "zwei ä \\udcff"]


def test_a_line_is_never_longer_than_a_pipe_takes_in_one_piece(pipe: Pipe) -> None:
    writer = pipe.line_writer()
    writer.msg("x" * 100_000)
    writer.flush()
    assert pipe.lines() == ["x" * (select.PIPE_BUF - 1)]


@pytest.mark.parametrize("blocking", [True, False])
def test_with_a_full_pipe_lines_wait_and_come_in_order(pipe: Pipe, *, blocking: bool) -> None:
    writer = pipe.line_writer()
    pipe.fill()
    os.set_blocking(pipe.writer, blocking)
    expected = [f"line {number}" for number in range(5000)]
    for line in expected:
        writer.msg(line)
        writer.flush()
    assert pipe.drain(writer) == expected


def test_what_waits_for_too_long_is_dropped_and_counted(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MAX_WAITING", 3)
    writer = pipe.line_writer()
    pipe.fill()
    for number in range(10):
        writer.msg(f"line {number}")
    writer.flush()
    assert pipe.drain(writer) == ["line 0", "line 1", "line 2", "7 lines were dropped"]
    writer.msg("on we go")
    writer.flush()
    assert pipe.lines() == ["on we go"]


def test_a_reader_that_is_gone_costs_nothing(pipe: Pipe) -> None:
    writer = pipe.line_writer()
    pipe.fill()
    writer.msg("waiting")
    writer.flush()
    pipe.close_reader()
    for number in range(100):
        writer.msg(f"line {number}")
    writer.flush()
    assert not writer._waiting
    assert writer._dropped == 0


def test_while_a_loop_runs_what_waits_is_written_without_another_line(pipe: Pipe) -> None:
    async def wait_for_the_line() -> list[str]:
        writer = pipe.line_writer()
        pipe.fill()
        writer.msg("late")
        writer.flush()
        seen = pipe.lines()
        assert seen == []
        async with asyncio.timeout(SECONDS):
            while not seen:
                await asyncio.sleep(0.01)
                seen = pipe.lines()
        return seen

    assert asyncio.run(wait_for_the_line()) == ["late"]


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often it was asked to do something later."""

    later = 0

    def call_later(
        self, delay: float, callback: Callable[..., object], *arguments: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self.later += 1
        return super().call_later(delay, callback, *arguments, context=context)


def count_timers(work: Callable[[], None]) -> int:
    """How often a loop was asked to do something later while this ran on it."""

    async def run_it() -> None:
        work()

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(run_it())
        loop = runner.get_loop()
        assert isinstance(loop, CountingLoop)
        return loop.later


def test_many_lines_that_wait_have_one_timer(pipe: Pipe) -> None:
    writer = pipe.line_writer()
    pipe.fill()

    def write_many() -> None:
        for number in range(1000):
            writer.msg(f"line {number}")
            writer.flush()

    assert count_timers(write_many) == 1


def test_lines_are_written_after_the_loops_life_too(pipe: Pipe) -> None:
    async def write_one() -> LineWriter:
        writer = pipe.line_writer()
        pipe.fill()
        writer.msg("one")
        writer.flush()
        return writer

    writer = asyncio.run(write_one())
    pipe.lines()
    writer.msg("two")
    writer.flush()
    assert pipe.lines() == ["one", "two"]


def test_events_that_happen_together_are_written_together_by_one_timer(pipe: Pipe) -> None:
    sink = LogSink("json", "info", pipe.writer)

    def happen() -> None:
        for _ in range(100):
            sink(Cancelled("192.0.2.1:1", "", "nobody's key"))

    assert count_timers(happen) == 1
    assert pipe.lines() == []
    sink.flush()
    assert len(pipe.lines()) == 100


def test_what_concerns_the_gateway_itself_is_written_at_once_behind_what_waits(pipe: Pipe) -> None:
    sink = LogSink("json", "info", pipe.writer)

    def happen() -> None:
        sink(Cancelled("192.0.2.1:1", "", "nobody's key"))
        sink(Noticed("info", "shutting down"))

    count_timers(happen)
    assert [json.loads(line)["event"] for line in pipe.lines()] == ["cancel request", "shutting down"]


def test_lines_that_were_dropped_are_told_in_the_logs_own_form(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MAX_WAITING", 1)
    sink = LogSink("json", "info", pipe.writer)
    pipe.fill()
    for _ in range(5):
        sink(Noticed("info", "listening"))
    pipe.lines()
    sink.flush()
    sink.flush()
    told = json.loads(pipe.lines()[-1])
    assert (told["level"], told["lines"]) == ("warning", 4)
    assert told["event"] == "lines of the log were dropped: nobody read them"


def logged(pipe: Pipe, event: Event, level: str = "debug") -> list[dict[str, object]]:
    sink = LogSink("json", level, pipe.writer)
    count_timers(lambda: sink(event))
    sink.flush()
    lines = [json.loads(line) for line in pipe.lines()]
    for line in lines:
        del line["timestamp"]
    return lines


def test_a_refusal_says_whose_fault_it_was_and_escapes_what_the_client_sent(pipe: Pipe) -> None:
    started = Started(Accepted("1f", "192.0.2.1:50000"), ((b"user", b"a\x1b[2J\xff"),))
    assert logged(pipe, Refused(started.accepted, started, ClientFault("28P01", "no", "wrong\npassword"))) == [
        {
            "level": "info",
            "event": "refused",
            "session": "1f",
            "client": "192.0.2.1:50000",
            "user": "a\\x1b[2J\\xff",
            "database": "a\\x1b[2J\\xff",
            "sqlstate": "28P01",
            "fault_of": "client",
            "reason": "wrong\\npassword",
        }
    ]
    assert logged(pipe, Refused(started.accepted, None, AuthenticatorFault("it hangs"))) == [
        {
            "level": "warning",
            "event": "refused",
            "session": "1f",
            "client": "192.0.2.1:50000",
            "sqlstate": "58000",
            "fault_of": "authenticator",
            "reason": "it hangs",
        }
    ]


def test_an_end_says_why_and_how_much(pipe: Pipe) -> None:
    ended = Ended("1f", CloseReason.TARGET_LOST, "reset\r", 12, 34, 1.23456)
    (line,) = logged(pipe, ended)
    assert line == {
        "level": "info",
        "event": "session ended",
        "session": "1f",
        "why": "target connection lost",
        "detail": "reset\\r",
        "bytes_from_client": 12,
        "bytes_from_target": 34,
        "seconds": 1.235,
    }
    (line,) = logged(pipe, Ended("1f", CloseReason.CLIENT_CLOSED, "", 0, 0, 0))
    assert "detail" not in line


def test_what_an_authenticator_says_is_escaped_line_by_line(pipe: Pipe) -> None:
    said = AuthenticatorSaid("1f", ("first", "sec\x07ond", "x" * 1000), 5)
    assert [line.get("text", line.get("dropped_bytes")) for line in logged(pipe, said)] == [
        "first",
        "sec\\x07ond",
        "x" * log.MAX_VALUE + "…",
        5,
    ]


def test_other_events_have_a_line_each(pipe: Pipe) -> None:
    (line,) = logged(pipe, Cancelled("192.0.2.1:1", "", "nobody's key"))
    assert (line["event"], line["outcome"]) == ("cancel request", "nobody's key")
    (line,) = logged(pipe, Noticed("error", "accepting pauses", (("reason", "too many"),)))
    assert (line["level"], line["event"], line["reason"]) == ("error", "accepting pauses", "too many")


@pytest.mark.parametrize(("level", "count"), [("debug", 3), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_hides_what_is_below_it(pipe: Pipe, level: str, count: int) -> None:
    lines = [line for each in ("info", "warning", "error") for line in logged(pipe, Noticed(each, "x"), level)]
    assert len(lines) == count


def test_text_lines_hold_no_control_characters(pipe: Pipe) -> None:
    sink = LogSink("text", "info", pipe.writer)
    hostile = "".join(map(chr, range(0x20))) + "\x7f\x9b\u2028\u202e"
    started = Started(Accepted("1", "192.0.2.1:1"), ((b"user", hostile.encode()),))

    def happen() -> None:
        sink(Refused(started.accepted, started, ClientFault("28P01", None, hostile)))
        sink(AuthenticatorSaid("1", (hostile,), 0))
        sink(Ended("1", CloseReason.CLIENT_LOST, hostile, 0, 0, 0))

    count_timers(happen)
    sink.flush()
    lines = pipe.lines()
    assert len(lines) == 3
    for line in lines:
        assert line.isprintable()
        assert re.match(r"\S+ (info   |warning) \w", line)
