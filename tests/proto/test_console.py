"""The admin console's messages, byte by byte: both query protocols, errors, transactions, and what is too much."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from pgauthproxy import _wire
from pgauthproxy.proto import console
from pgauthproxy.proto.console import MAX_KEPT, MAX_STATEMENT, Column, ConsoleError, Control, Result, Statement, Type
from tests.sans_io import Outcome, Raised, Waiting, run, run_in_every_chunking
from tests.wire import error_fields, message, query

ONE = Statement("one", (Column("number", Type.INT8), Column("name")))
ALL_TYPES = tuple(Column(kind.name.lower(), kind) for kind in Type)
ALL = Statement("all", ALL_TYPES)
MANY = Statement("many", (Column("number", Type.INT8),))
ACT = Statement("act")
BROKEN = Statement("broken")
STATEMENTS = {
    "one": ONE,
    "all": ALL,
    "many": MANY,
    "act": ACT,
    "broken": BROKEN,
    "begin": Statement(Control.BEGIN),
    "commit": Statement(Control.COMMIT),
    "rollback": Statement(Control.ROLLBACK),
}
NOON = 1_795_521_600.123456
SYNC = message(b"S")
TERMINATE = message(b"X")
KEY = b"8 bytes."


def parse(text: str) -> list[Statement]:
    words = [word for word in text.split(";") if word]
    for word in words:
        if word not in STATEMENTS:
            raise ConsoleError("42601", f"syntax error: {word}")
    return [STATEMENTS[word] for word in words]


def perform(statement: Statement) -> object:
    match statement.command:
        case "one":
            return Result("SHOW", [(7, "seven")])
        case "all":
            return Result("SHOW", [(True, -1, "ä\0b", 1.5, NOON), (None, None, None, None, None)])
        case "many":
            return Result("SHOW", [(number,) for number in range(1000)])
        case "act":
            return Result("ACT 1")
    return ConsoleError("22023", "it does not work")


def serve(framer: _wire.Framer) -> Any:
    return console.serve(framer, parse, "1.2.3", b"alice", KEY)


def answered(*sent: bytes) -> list[tuple[bytes, bytes]]:
    """All messages behind the greeting, for these turns."""
    outcome = run_in_every_chunking(serve, sent, longest=60, perform=perform)
    return messages(outcome)[1:]


def messages(outcome: Outcome) -> list[tuple[bytes, bytes]]:
    """What was sent; the greeting is one entry, at the front."""
    assert isinstance(outcome.sent[0], bytes)
    framer = _wire.Framer(dict.fromkeys(range(1, 256), 1 << 24))
    framer.feed(b"".join(part for part in outcome.sent[1:] if isinstance(part, bytes)))
    found = [(b"greeting", outcome.sent[0])]
    while (read := framer.message()) is not None:
        found.append((bytes([read[0]]), read[1]))
    assert not framer.pending
    return found


def kinds(found: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(kind for kind, _ in found)


def prepare(text: str, name: str = "") -> bytes:
    return message(b"P", name.encode() + b"\0" + text.encode() + b"\0\0\0")


def bind(name: str = "", portal: str = "", formats: tuple[int, ...] = (), parameters: int = 0) -> bytes:
    said = struct.pack("!h", len(formats)) + b"".join(struct.pack("!h", each) for each in formats)
    given = struct.pack("!h", parameters) + b"\0\0\0\x01x" * parameters
    return message(b"B", portal.encode() + b"\0" + name.encode() + b"\0\0\0" + given + said)


def describe(what: bytes, name: str = "") -> bytes:
    return message(b"D", what + name.encode() + b"\0")


def execute(portal: str = "", rows: int = 0) -> bytes:
    return message(b"E", portal.encode() + b"\0" + struct.pack("!i", rows))


# Greeting and end


def test_the_greeting_is_what_drivers_look_for() -> None:
    framer = _wire.Framer({})
    (greeting,) = run(serve(framer), framer, []).sent
    assert isinstance(greeting, bytes)
    assert greeting.startswith(message(b"R", bytes(4)))
    assert message(b"S", b"server_version\0" + b"18.0 (pgauthproxy 1.2.3)\0") in greeting
    assert message(b"S", b"session_authorization\0alice\0") in greeting
    assert greeting.endswith(message(b"K", KEY) + message(b"Z", b"I"))


def test_a_client_that_takes_its_leave_ends_it() -> None:
    framer = _wire.Framer({})
    assert run(serve(framer), framer, [TERMINATE]).ending is None


# The simple protocol


def test_a_query_is_answered_with_rows() -> None:
    found = answered(query("one"))
    assert kinds(found) == b"TDCZ"
    assert found[0][1] == (
        b"\0\2number\0"
        + struct.pack("!ihihih", 0, 0, 20, 8, -1, 0)
        + b"name\0"
        + struct.pack("!ihihih", 0, 0, 25, -1, -1, 0)
    )
    assert found[1][1] == b"\0\2\0\0\0\x017\0\0\0\x05seven"
    assert found[2:] == [(b"C", b"SHOW\0"), (b"Z", b"I")]


def test_several_statements_are_answered_in_order_and_ready_is_said_once() -> None:
    assert kinds(answered(query("act;one;act;"))) == b"CTDCCZ"


@pytest.mark.parametrize("text", ["", ";"])
def test_an_empty_query_has_an_answer_of_its_own(text: str) -> None:
    assert kinds(answered(query(text))) == b"IZ"


def test_a_syntax_error_anywhere_means_that_nothing_is_done() -> None:
    (error, ready) = answered(query("act;nonsense"))
    assert error_fields(error[1]) == {"S": "ERROR", "V": "ERROR", "C": "42601", "M": "syntax error: nonsense"}
    assert ready == (b"Z", b"I")


def test_what_fails_ends_the_query_and_not_the_session() -> None:
    assert kinds(answered(query("act;broken;act"), query("act"))) == b"CEZCZ"


def test_every_type_has_its_text() -> None:
    _, full, empty, *_ = answered(query("all"))
    values = [b"t", b"-1", "ä?b".encode(), b"1.5", b"2026-11-24 12:00:00.123456+00"]
    assert full[1] == b"\0\5" + b"".join(struct.pack("!i", len(value)) + value for value in values)
    assert empty[1] == b"\0\5" + b"\xff\xff\xff\xff" * 5


def test_many_rows_are_sent_in_parts() -> None:
    framer = _wire.Framer({})
    outcome = run(serve(framer), framer, [query("many")], perform=perform)
    assert kinds(messages(outcome)[1:]) == b"T" + 1000 * b"D" + b"CZ"
    assert len(outcome.sent) == 1 + 1 + 10 + 1 + 1


# Transactions


def test_a_transaction_is_kept_track_of() -> None:
    found = answered(query("begin"), query("one"), query("commit"), query("act"))
    assert [body for kind, body in found if kind == b"Z"] == [b"T", b"T", b"I", b"I"]
    assert [body for kind, body in found if kind == b"C"] == [b"BEGIN\0", b"SHOW\0", b"COMMIT\0", b"ACT 1\0"]


def test_a_failed_transaction_does_nothing_until_it_is_rolled_back() -> None:
    found = answered(query("begin"), query("broken"), query("act"), query("commit"), query("act"))
    assert [body for kind, body in found if kind == b"Z"] == [b"T", b"E", b"E", b"I", b"I"]
    assert [error_fields(body)["C"] for kind, body in found if kind == b"E"] == ["22023", "25P02"]
    assert [body for kind, body in found if kind == b"C"] == [b"BEGIN\0", b"ROLLBACK\0", b"ACT 1\0"]


# The extended protocol


def test_the_extended_protocol_is_spoken() -> None:
    found = answered(prepare("one") + bind() + describe(b"P") + execute() + SYNC)
    assert kinds(found) == b"12TDCZ"
    assert found[3][1] == b"\0\2\0\0\0\x017\0\0\0\x05seven"


def test_a_prepared_statement_serves_again_and_again() -> None:
    found = answered(prepare("one", "s") + describe(b"S", "s") + SYNC, 2 * (bind("s") + execute() + SYNC))
    assert kinds(found) == b"1tTZ2DCZ2DCZ"
    assert found[1] == (b"t", b"\0\0")


def test_what_gives_no_rows_says_so() -> None:
    assert kinds(answered(prepare("act") + describe(b"S") + bind() + describe(b"P") + execute() + SYNC)) == b"1tn2nCZ"


def test_an_empty_statement_can_be_prepared() -> None:
    assert kinds(answered(prepare("") + bind() + describe(b"P") + execute() + SYNC)) == b"12nIZ"


def test_every_type_has_its_binary_form() -> None:
    found = answered(prepare("all") + bind(formats=(1,)) + describe(b"P") + execute() + SYNC)
    values = [b"\1", struct.pack("!q", -1), "ä?b".encode(), struct.pack("!d", 1.5)]
    at = struct.pack("!q", 848_836_800_123_456)
    assert found[3][1] == b"\0\5" + b"".join(struct.pack("!i", len(value)) + value for value in [*values, at])
    formats = [found[2][1][index] for index in range(len(found[2][1]))]
    assert formats.count(1) >= 5


def test_columns_may_have_formats_of_their_own() -> None:
    found = answered(prepare("one") + bind(formats=(1, 0)) + execute() + SYNC)
    assert found[2][1] == b"\0\2\0\0\0\x08" + struct.pack("!q", 7) + b"\0\0\0\x05seven"


def test_rows_may_be_fetched_in_parts() -> None:
    found = answered(prepare("many") + bind() + execute(rows=999) + execute(rows=999) + SYNC)
    assert kinds(found) == b"12" + 999 * b"D" + b"sDCZ"


def test_a_portal_is_run_once_however_often_it_is_executed() -> None:
    done: list[object] = []

    def count(statement: Statement) -> object:
        done.append(statement)
        return Result("ACT 1")

    framer = _wire.Framer({})
    run(serve(framer), framer, [prepare("act") + bind() + execute() + execute() + SYNC], perform=count)
    assert done == [ACT]


def test_after_an_error_all_is_skipped_until_sync() -> None:
    found = answered(prepare("nonsense") + bind() + execute() + message(b"H") + SYNC, query("act"))
    assert kinds(found) == b"EZCZ"
    assert error_fields(found[0][1])["C"] == "42601"


@pytest.mark.parametrize(
    ("sent", "sqlstate"),
    [
        (prepare("one;one"), "42601"),
        (bind("unknown"), "26000"),
        (describe(b"S", "unknown"), "26000"),
        (describe(b"P", "unknown"), "34000"),
        (execute("unknown"), "34000"),
        (prepare("one", "s") + prepare("one", "s"), "42P05"),
        (prepare("one") + bind(portal="p") + bind(portal="p"), "42P03"),
        (prepare("one") + bind(parameters=1), "08P01"),
        (prepare("one") + bind(formats=(0, 0, 0)), "08P01"),
        (prepare("one") + bind(formats=(2,)), "08P01"),
        (prepare("broken") + bind() + execute(), "22023"),
    ],
)
def test_what_cannot_be_done_has_its_sqlstate_and_the_session_goes_on(sent: bytes, sqlstate: str) -> None:
    found = answered(sent + SYNC, query("act"))
    (error,) = (error_fields(body) for kind, body in found if kind == b"E")
    assert error["C"] == sqlstate
    assert kinds(found).endswith(b"EZCZ")


def test_what_is_closed_makes_room() -> None:
    found = answered(prepare("one", "s") + message(b"C", b"Ss\0") + prepare("act", "s") + message(b"C", b"P\0") + SYNC)
    assert kinds(found) == b"1313Z"


def test_so_many_statements_and_portals_are_kept_and_no_more() -> None:
    framer = _wire.Framer({})
    many = b"".join(prepare("one", f"s{number}") for number in range(MAX_KEPT + 1))
    found = messages(run(serve(framer), framer, [many + SYNC], perform=perform))[1:]
    assert kinds(found) == MAX_KEPT * b"1" + b"EZ"
    assert error_fields(found[-2][1])["C"] == "53000"
    framer = _wire.Framer({})
    many = prepare("one") + b"".join(bind(portal=f"p{number}") for number in range(MAX_KEPT + 1))
    found = messages(run(serve(framer), framer, [many + SYNC], perform=perform))[1:]
    assert kinds(found) == b"1" + MAX_KEPT * b"2" + b"EZ"


# What is no protocol


@pytest.mark.parametrize(
    "sent",
    [
        message(b"Q", b"no end"),
        message(b"Q", b"two\0ends\0"),
        message(b"P", b"no end"),
        message(b"P", b"\0one\0\0\x05"),
        message(b"B", b"\0\0\0\x01"),
        message(b"D", b"X\0"),
        message(b"D", b""),
        message(b"E", b"\0\0"),
        message(b"S", b"x"),
        message(b"d", b"copied"),
        message(b"p", b"password\0"),
        message(b"F", b"function"),
        b"Q" + struct.pack("!i", MAX_STATEMENT + 1),
        b"Q" + struct.pack("!i", 3),
        b"P" + struct.pack("!I", 0xFFFFFFFF),
    ],
)
def test_what_breaks_the_protocol_ends_the_session(sent: bytes) -> None:
    outcome = run_in_every_chunking(serve, [prepare("one") + sent], longest=40, perform=perform)
    assert isinstance(outcome.ending, Raised)
    assert (outcome.ending.whose, outcome.ending.sqlstate) == ("client", "08P01")


def test_the_longest_statement_is_read() -> None:
    framer = _wire.Framer({})
    text = ";" * (MAX_STATEMENT - 5)
    outcome = run(serve(framer), framer, [query(text)], perform=perform)
    assert isinstance(outcome.ending, Waiting)
    assert kinds(messages(outcome)[1:]) == b"IZ"
