"""Framing and message writing, compiled and in plain Python: the same messages, and how long they take.

pytest benchmarks/test_framing.py --benchmark-enable --benchmark-group-by=group
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import reference
from pgauthproxy import _wire
from pgauthproxy.errors import FrameError
from pgauthproxy.proto import messages

SEGMENT = 1448
"""Bytes of one TCP segment."""

STARTUP = messages.startup_message(
    messages.PROTOCOL_3_0, ((b"user", b"alice"), (b"database", b"shop"), (b"application_name", b"psql"))
)
PASSWORD = messages.password_message(b"md5" + b"0" * 32)
STATUS = [_wire.message(messages.PARAMETER_STATUS, b"name_of_it\0value %d\0" % number) for number in range(14)]
GREETING = b"".join(
    [
        messages.authentication(messages.AUTH_OK),
        *STATUS,
        messages.backend_key_data(bytes(8)),
        _wire.message(messages.READY_FOR_QUERY, b"I"),
    ]
)
LARGE = _wire.message(messages.ERROR_RESPONSE, b"x" * 1_000_000)
LIMITS = dict.fromkeys(map(ord, "RSKZEp"), 1 << 20)

both = pytest.mark.parametrize("wire", [_wire, reference], ids=["compiled", "python"])


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def read_messages(wire: ModuleType, chunks: list[bytes]) -> list[tuple[int, bytes]]:
    """All messages of a stream that comes in these chunks."""
    framer = wire.Framer(LIMITS)
    feed, message = framer.feed, framer.message
    found = []
    for chunk in chunks:
        feed(chunk)
        while (one := message()) is not None:
            found.append(one)
    return found


def pass_on(wire: ModuleType) -> bytes:
    """A greeting whose messages nobody looks at."""
    framer = wire.Framer(LIMITS)
    framer.feed(GREETING)
    whole: bytes = framer.run(b"RSKZ")
    return whole


def read_login(wire: ModuleType) -> tuple[bytes, tuple[int, bytes]]:
    """What a client sends until it is let in."""
    framer = wire.Framer({})
    framer.feed(STARTUP)
    packet = framer.startup_packet(10_000)
    framer.allow(LIMITS)
    framer.feed(PASSWORD)
    return packet, framer.message()


@pytest.mark.parametrize("size", [1, 2, 7, 64, SEGMENT, 1 << 20])
def test_both_read_the_same(size: int) -> None:
    for stream in (GREETING, GREETING * 10 + PASSWORD):
        assert read_messages(_wire, pieces(stream, size)) == read_messages(reference, pieces(stream, size))
    assert read_login(_wire) == read_login(reference)
    assert pass_on(_wire) == pass_on(reference) == GREETING
    assert read_messages(_wire, pieces(LARGE, SEGMENT)) == read_messages(reference, pieces(LARGE, SEGMENT))


@pytest.mark.parametrize("stream", [b"Q", b"p\0\0\0\x03", b"p\0\x10\0\x01", b"p\xff\xff\xff\xff", GREETING + b"\0"])
def test_both_refuse_the_same(stream: bytes) -> None:
    for wire in (_wire, reference):
        with pytest.raises(FrameError):
            read_messages(wire, pieces(stream, 1))


def test_both_write_the_same() -> None:
    for size in (0, 1, 1000, 1 << 20):
        assert _wire.message(ord("p"), bytes(size)) == reference.message(ord("p"), bytes(size))
        assert _wire.startup_packet(196608, bytes(size)) == reference.startup_packet(196608, bytes(size))


@both
@pytest.mark.benchmark(group="framing: a client's startup packet and password")
def test_reading_a_clients_login(benchmark: BenchmarkFixture, wire: Any) -> None:
    _, password = benchmark(read_login, wire)
    assert password == (messages.PASSWORD_MESSAGE, PASSWORD[5:])


@both
@pytest.mark.benchmark(group="framing: a target's greeting, 17 messages in one piece")
def test_reading_a_greeting(benchmark: BenchmarkFixture, wire: Any) -> None:
    assert len(benchmark(read_messages, wire, [GREETING])) == 17


@both
@pytest.mark.benchmark(group="framing: a target's greeting, 17 messages that are only passed on")
def test_passing_a_greeting_on(benchmark: BenchmarkFixture, wire: Any) -> None:
    assert benchmark(pass_on, wire) == GREETING


@both
@pytest.mark.benchmark(group="framing: a target's greeting, byte by byte")
def test_reading_a_greeting_byte_by_byte(benchmark: BenchmarkFixture, wire: Any) -> None:
    assert len(benchmark(read_messages, wire, pieces(GREETING, 1))) == 17


@both
@pytest.mark.benchmark(group="framing: one message of 1 MB in TCP segments")
def test_reading_a_large_message(benchmark: BenchmarkFixture, wire: Any) -> None:
    assert len(benchmark(read_messages, wire, pieces(LARGE, SEGMENT))) == 1


@both
@pytest.mark.benchmark(group="framing: writing a message of 100 bytes")
def test_writing_a_message(benchmark: BenchmarkFixture, wire: Any) -> None:
    assert len(benchmark(wire.message, ord("p"), bytes(100))) == 105
