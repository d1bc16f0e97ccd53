"""What an end costs beside its system calls, with and without an observer; and that the observer is what it should be.

    pytest benchmarks/test_observing.py --benchmark-enable --benchmark-group-by=group

An end without a peer does all that an end does but send. One of a session that no rule and no audit of statements
concerns does not know that there are others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import reference
from pgauthproxy import _relay
from pgauthproxy._observe import Observer

BUFFER_BYTES = 65_536
MAX_TEXT = 20

Reads = Callable[[str, bytes], object]


class Nobody:
    """Whoever would hear of the end of a session."""

    def end_lost(self, end: object, error: Exception | None) -> None:
        raise AssertionError("nothing ends here")

    def target_finished(self) -> None:
        raise AssertionError("nothing ends here")


def an_end(observer: Observer | None, *, faces_target: bool) -> tuple[_relay.End, _relay.ForwardBuffer]:
    buffer = _relay.ForwardBuffer(BUFFER_BYTES)
    transport: Any = asyncio.Transport()
    if observer is None:
        return _relay.End(Nobody(), transport, -1, faces_target, buffer), buffer
    return _relay.ObservedEnd(Nobody(), transport, -1, faces_target, buffer, None, observer), buffer


def compiled(observer: Observer) -> Reads:
    ends = {side: an_end(observer, faces_target=side == "target") for side in ("client", "target")}

    def reads(side: str, data: bytes) -> None:
        end, buffer = ends[side]
        buffer.space[: len(data)] = data
        end.buffer_updated(len(data))

    return reads


def message(kind: bytes, body: bytes) -> bytes:
    return kind + (len(body) + 4).to_bytes(4) + body


QUERY = message(b"Q", b"select something from somewhere where something_else = 'a value of no importance'\0")
ROW = message(b"D", bytes(100))
ANSWER = message(b"T", bytes(80)) + ROW + message(b"C", b"SELECT 1\0") + message(b"Z", b"I")
ROWS = ROW * 600

SAYS = {
    "client": st.sampled_from([QUERY, message(b"P", b"a\0select $1\0\0\0")])
    | st.builds(message, st.sampled_from([bytes([kind]) for kind in b"QPBESHFdcfX"]), st.binary(max_size=60)),
    "target": st.sampled_from([ANSWER, message(b"Z", b"T"), message(b"G", b"\0\0\0")])
    | st.builds(message, st.sampled_from([bytes([kind]) for kind in b"TDCZGWNE"]), st.binary(max_size=60)),
}
STEPS = st.lists(
    st.sampled_from(["client", "target"]).flatmap(
        lambda side: st.tuples(st.just(side), SAYS[side] | st.binary(max_size=20))
    ),
    max_size=15,
)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(STEPS, st.integers(1, 50))
def test_the_compiled_observer_and_the_plain_one_see_the_same(steps: list[tuple[str, bytes]], size: int) -> None:
    told: tuple[list[Any], list[Any]] = ([], [])
    observer = Observer(lambda *statement: told[0].append(statement), MAX_TEXT)
    plain = reference.Observer(lambda *statement: told[1].append(statement), MAX_TEXT)
    reads = compiled(observer)
    for side, data in steps:
        for at in range(0, len(data), size):
            for each in (reads, plain.reads):
                each(side, data[at : at + size])
        assert (observer.idle_since is None) == (plain.idle_since is None)
        assert observer.in_transaction == plain.in_transaction
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", ["without", "rules", "statements"])
@pytest.mark.parametrize(
    ("side", "data"),
    [("client", QUERY), ("target", ANSWER), ("target", ROWS)],
    ids=["a query", "an answer", "600 rows"],
)
def test_receiving(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, kind: str, side: str, data: bytes
) -> None:
    benchmark.group = f"what an end does beside its system calls: {request.node.callspec.id.partition('-')[0]}"
    statements = 0

    def count(_is_prepared: bool, _text: bytes, _size: int) -> None:
        nonlocal statements
        statements += 1

    observer = {"without": None, "rules": Observer(), "statements": Observer(count, BUFFER_BYTES)}[kind]
    if kind == "statements" and side == "target":
        # There is nothing to be found.
        observer = None
    end, buffer = an_end(observer, faces_target=side == "target")
    buffer.space[: len(data)] = data
    benchmark(end.buffer_updated, len(data))
    assert end.received
    assert (statements > 0) == (kind == "statements" and side == "client")
