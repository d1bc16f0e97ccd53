"""Observed ends: what a session is at, and what SQL it sends, however the bytes come; and that they pass unchanged."""

from __future__ import annotations

import contextlib
import itertools
import struct
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgauthproxy._observe import Observer
from tests.gateway.test_relay_ends import TLS_SIDES, Pair
from tests.wire import message, query

Statement = tuple[bool, bytes, int]
Step = tuple[str, bytes]

IDLE, IN_TRANSACTION, FAILED = (message(b"Z", status) for status in (b"I", b"T", b"E"))
PARSE_BIND_EXECUTE = message(b"P", b"\0select 1\0\0\0") + message(b"B", bytes(8)) + message(b"E", bytes(5))
SYNC, FLUSH, COPY_DONE, COPY_FAIL = message(b"S"), message(b"H"), message(b"c"), message(b"f", b"no\0")
COPY_IN, COPY_BOTH = message(b"G", b"\0\0\0"), message(b"W", b"\0\0\0")
ROW = message(b"D", b"\0\x01\0\0\0\x0142")
COMPLETE = message(b"C", b"SELECT 1\0")
ERROR = message(b"E", b"SERROR\0\0")


def parse(sql: bytes, name: bytes = b"") -> bytes:
    return message(b"P", name + b"\0" + sql + b"\0\0\x01\0\0\0\x17")


class Observed:
    """A session that is observed, and the statements in it."""

    def __init__(
        self, max_text: int = 1000, size: int = 4096, client_tls: str = "", target_tls: str = "", piece: int = 0
    ) -> None:
        self.statements: list[Statement] = []
        self.observer = Observer(lambda *statement: self.statements.append(statement), max_text)
        self.pair = Pair(client_tls=client_tls, target_tls=target_tls, size=size, observer=self.observer)
        self._piece = piece

    def client(self, *messages: bytes) -> None:
        self.pair.client.hears(b"".join(messages), self._piece)

    def target(self, *messages: bytes) -> None:
        self.pair.target.hears(b"".join(messages), self._piece)

    def goes(self, steps: Sequence[Step]) -> None:
        for side, data in steps:
            (self.client if side == "client" else self.target)(data)

    @property
    def is_idle(self) -> bool:
        return self.observer.idle_since is not None


@pytest.fixture
def observed() -> Iterator[Observed]:
    made = Observed()
    yield made
    made.pair.close()


def test_a_session_idles_from_its_greeting_on(observed: Observed) -> None:
    assert observed.is_idle
    assert not observed.observer.in_transaction


def test_it_does_not_idle_from_a_request_until_it_is_answered(observed: Observed) -> None:
    for request in (query("select 1"), PARSE_BIND_EXECUTE + SYNC, message(b"F", bytes(14))):
        observed.client(request)
        assert not observed.is_idle
        observed.target(ROW, COMPLETE)
        assert not observed.is_idle
        observed.target(IDLE)
        assert observed.is_idle


def test_it_idles_since_the_answer_was_whole(observed: Observed) -> None:
    before = time.monotonic()
    observed.client(query("select 1"))
    observed.target(IDLE)
    since = observed.observer.idle_since
    assert since is not None
    assert before <= since <= time.monotonic()
    observed.client(query("select 1"))
    observed.target(IDLE)
    later = observed.observer.idle_since
    assert later is not None
    assert later > since


@pytest.mark.parametrize(("ready", "in_transaction"), [(IDLE, False), (IN_TRANSACTION, True), (FAILED, True)])
def test_it_idles_in_the_transaction_that_the_target_says(
    observed: Observed, ready: bytes, *, in_transaction: bool
) -> None:
    observed.client(query("begin"))
    observed.target(COMPLETE, ready)
    assert observed.is_idle
    assert observed.observer.in_transaction == in_transaction


def test_requests_that_wait_behind_others_are_no_idling(observed: Observed) -> None:
    observed.client(query("select 1"), query("select 2"), PARSE_BIND_EXECUTE, SYNC, PARSE_BIND_EXECUTE, SYNC)
    for _ in range(3):
        observed.target(COMPLETE, IDLE)
        assert not observed.is_idle
    observed.target(COMPLETE, IDLE)
    assert observed.is_idle


@pytest.mark.parametrize("begun", [PARSE_BIND_EXECUTE, PARSE_BIND_EXECUTE + FLUSH, FLUSH], ids=["", "flushed", "flush"])
def test_what_is_not_synced_yet_is_no_idling(observed: Observed, begun: bytes) -> None:
    observed.client(query("select 1"), begun)
    observed.target(IDLE)
    assert not observed.is_idle
    observed.client(SYNC)
    observed.target(IDLE)
    assert observed.is_idle


def test_what_the_target_says_of_its_own_accord_leaves_a_session_idle(observed: Observed) -> None:
    since = observed.observer.idle_since
    observed.target(message(b"N", b"SNOTICE\0\0"), message(b"A", b"\0\0\0\x01channel\0\0"), message(b"S", b"x\0y\0"))
    assert observed.observer.idle_since == since


def test_a_part_of_a_message_begins_idling_anew(observed: Observed) -> None:
    since = observed.observer.idle_since
    assert since is not None
    observed.client(query("select 1")[:3])
    later = observed.observer.idle_since
    assert later is not None
    assert later > since


COPY_STEPS: dict[str, list[Step]] = {
    "by a Query": [
        ("client", query("copy t from stdin")),
        ("target", COPY_IN),
        ("client", message(b"d", b"1\n") + COPY_DONE),
        ("target", COMPLETE + IDLE),
    ],
    "by a Query, given up": [
        ("client", query("copy t from stdin")),
        ("target", COPY_IN),
        ("client", message(b"d", b"1\n") + COPY_FAIL),
        ("target", ERROR + IDLE),
    ],
    "by a Query, refused in the middle": [
        ("client", query("copy t from stdin")),
        ("target", COPY_IN),
        ("client", message(b"d", b"x\n")),
        ("target", ERROR + IDLE),
        ("client", message(b"d", b"y\n") + COPY_DONE),
    ],
    "with a Sync before and behind": [
        ("client", PARSE_BIND_EXECUTE + SYNC),
        ("target", COPY_IN),
        ("client", message(b"d", b"1\n")),
        ("client", COPY_DONE),
        ("client", SYNC),
        ("target", COMPLETE + IDLE),
    ],
    "with a Sync before and behind, given up": [
        ("client", PARSE_BIND_EXECUTE + SYNC),
        ("target", COPY_IN),
        ("client", COPY_FAIL + SYNC),
        ("target", ERROR + IDLE),
    ],
    "with a Sync behind alone": [
        ("client", PARSE_BIND_EXECUTE + FLUSH),
        ("target", COPY_IN),
        ("client", message(b"d", b"1\n") + COPY_DONE + SYNC),
        ("target", COMPLETE + IDLE),
    ],
    "both ways": [
        ("client", query("START_REPLICATION 0/0")),
        ("target", COPY_BOTH),
        ("client", message(b"d", b"r") + COPY_DONE),
        ("target", message(b"d", b"w") + COPY_DONE + COMPLETE + IDLE),
    ],
    "out": [
        ("client", query("copy t to stdout")),
        ("target", message(b"H", b"\0\0\0") + message(b"d", b"1\n") * 3 + COPY_DONE + COMPLETE + IDLE),
    ],
}


@pytest.mark.parametrize("steps", COPY_STEPS.values(), ids=COPY_STEPS)
def test_a_copy_is_no_idling_until_it_is_over(observed: Observed, steps: list[Step]) -> None:
    over = next(number for number, (_, data) in enumerate(steps) if data.endswith(IDLE))
    for number, step in enumerate(steps):
        observed.goes([step])
        assert observed.is_idle == (number >= over), step


def test_a_copy_done_for_nothing_takes_no_request_for_answered(observed: Observed) -> None:
    observed.client(PARSE_BIND_EXECUTE, SYNC, COPY_DONE, COPY_FAIL)
    assert not observed.is_idle


@pytest.mark.parametrize("side", ["client", "target"])
@pytest.mark.parametrize("length", [0, 3])
def test_bytes_that_are_no_messages_pass_and_make_nobody_idle(observed: Observed, side: str, length: int) -> None:
    garbage = b"Z" + struct.pack("!I", length) + b"garbage"
    observed.goes([(side, garbage), ("target", IDLE)])
    assert not observed.is_idle
    heard = (observed.pair.target if side == "client" else observed.pair.client).heard
    assert heard == (garbage if side == "client" else garbage + IDLE)
    assert not (observed.pair.client if side == "client" else observed.pair.target).end.at_message_boundary


# Boundaries


@pytest.mark.parametrize("piece", range(1, 12))
def test_between_messages_is_where_the_last_one_is_whole(piece: int) -> None:
    data = ROW + message(b"n") + message(b"D", IDLE) + IDLE + query("select 1") + SYNC
    ends = set(itertools.accumulate(map(len, (ROW, message(b"n"), message(b"D", IDLE), IDLE, query("select 1"), SYNC))))
    with contextlib.closing(Observed().pair) as pair:
        for side in (pair.client, pair.target):
            assert side.end.at_message_boundary
            for at in range(0, len(data), piece):
                side.hears(data[at : at + piece])
                assert side.end.at_message_boundary == (min(at + piece, len(data)) in ends)


# Statements


def test_the_sql_of_query_and_parse_is_told_and_nothing_else(observed: Observed) -> None:
    observed.client(
        query("select 'ü'"),
        parse(b"insert into t values ($1)", b"a name"),
        message(b"B", b"\0\0\0\0\0\x01\0\0\0\x06secret\0\0"),
        message(b"E", bytes(5)),
        SYNC,
        message(b"F", b"\0\0\0\x01\0\0\0\x01\0\0\0\x06secret\0\0"),
        message(b"d", b"Q\0\0\0\x0csecret\0"),
        COPY_DONE,
        query(""),
    )
    assert observed.statements == [
        (False, "select 'ü'".encode(), 11),
        (True, b"insert into t values ($1)", 25),
        (False, b"", 0),
    ]


@pytest.mark.parametrize("size", [9, 10, 11, 100_000])
def test_what_is_too_long_is_cut_and_its_size_told(size: int) -> None:
    observed = Observed(max_text=10)
    sql = b"x" * size
    with contextlib.closing(observed.pair):
        observed.client(query(sql.decode()), parse(sql, b"y" * 50))
    assert observed.statements == [(False, sql[:10], size), (True, sql[:10], size)]


def test_a_statement_is_told_when_it_is_whole(observed: Observed) -> None:
    whole = query("select 1")
    observed.client(whole[:-1])
    assert observed.statements == []
    observed.client(whole[-1:])
    assert observed.statements == [(False, b"select 1", 8)]


@pytest.mark.parametrize("body", [b"", b"no end", b"a\0b\0", b"\0", b"name alone\0"])
@pytest.mark.parametrize("kind", [b"Q", b"P"])
def test_a_message_without_the_layout_that_it_should_have_is_told_as_far_as_it_goes(
    observed: Observed, kind: bytes, body: bytes
) -> None:
    observed.client(message(kind, body))
    parts = body.split(b"\0")
    text = (parts[1] if len(parts) > 1 else b"") if kind == b"P" else parts[0]
    assert observed.statements == [(kind == b"P", text, len(text))]


# However it comes


CLIENT_SAYS = st.sampled_from(
    [query("select 1"), query("x" * 300), parse(b"select $1", b"name"), SYNC, FLUSH, message(b"d", b"d" * 100)]
)
TARGET_SAYS = st.sampled_from([IDLE, IN_TRANSACTION, ROW, message(b"D", bytes(700)), COMPLETE, ERROR])


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(
    st.sampled_from(TLS_SIDES),
    st.lists(
        st.tuples(st.just("client"), CLIENT_SAYS) | st.tuples(st.just("target"), TARGET_SAYS), min_size=1, max_size=12
    ),
    st.integers(1, 40),
)
def test_it_is_all_the_same_however_the_bytes_come(tls: tuple[str, str], steps: list[Step], piece: int) -> None:
    whole, pieces = Observed(), Observed(client_tls=tls[0], target_tls=tls[1], piece=piece)
    with contextlib.closing(whole.pair), contextlib.closing(pieces.pair):
        for step in steps:
            whole.goes([step])
            pieces.goes([step])
            assert pieces.is_idle == whole.is_idle
            assert pieces.observer.in_transaction == whole.observer.in_transaction
        assert pieces.statements == whole.statements
        assert pieces.pair.target.heard == b"".join(data for side, data in steps if side == "client")
        assert pieces.pair.client.heard == b"".join(data for side, data in steps if side == "target")


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(
    st.lists(
        st.tuples(st.just("client"), CLIENT_SAYS) | st.tuples(st.just("target"), TARGET_SAYS), min_size=1, max_size=12
    ),
    st.data(),
)
def test_another_observer_goes_on_wherever_the_first_has_stopped(steps: list[Step], data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, len(steps) - 1))
    side, said = steps[stop]
    at = data.draw(st.integers(0, len(said)))
    whole, begun, going_on = Observed(max_text=100), Observed(max_text=100), Observed(max_text=100)
    with contextlib.closing(whole.pair), contextlib.closing(begun.pair), contextlib.closing(going_on.pair):
        whole.goes(steps)
        begun.goes([*steps[:stop], (side, said[:at])])
        going_on.observer.take_up(begun.observer.state)
        assert going_on.observer.idle_since == begun.observer.idle_since
        going_on.goes([(side, said[at:]), *steps[stop + 1 :]])
        assert going_on.is_idle == whole.is_idle
        assert going_on.observer.in_transaction == whole.observer.in_transaction
        assert begun.statements + going_on.statements == whole.statements


def test_one_that_tells_nobody_keeps_no_text(observed: Observed) -> None:
    observed.client(query("select 1")[:-3])
    quiet = Observer()
    assert not quiet.tells_statements
    assert observed.observer.tells_statements
    quiet.take_up(observed.observer.state)
    assert b"select" in observed.observer.state
    assert b"select" not in quiet.state


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["client", "target"]), st.binary(max_size=200)), max_size=8))
def test_whatever_bytes_there_are_pass_unchanged(steps: list[Step]) -> None:
    observed = Observed(max_text=20)
    with contextlib.closing(observed.pair) as pair:
        observed.goes(steps)
        assert pair.target.heard == b"".join(data for side, data in steps if side == "client")
        assert pair.client.heard == b"".join(data for side, data in steps if side == "target")
    assert all(len(text) <= min(20, size) for _, text, size in observed.statements)
