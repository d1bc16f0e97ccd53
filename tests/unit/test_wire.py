"""The framer and the two writers: every bound, at the bound and one beyond it, in every chunking."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import reference
from pgauthproxy import _wire
from pgauthproxy.errors import FrameError
from tests.sans_io import chunkings

LIMIT = 40
PASSWORD, ERROR = ord("p"), ord("E")


def framed(kind: int, length: int, body: bytes = b"") -> bytes:
    return bytes([kind]) + length.to_bytes(4) + body


def collect(framer: _wire.Framer, chunks: list[bytes]) -> list[tuple[int, bytes]]:
    messages = []
    for chunk in chunks:
        framer.feed(chunk)
        while (message := framer.message()) is not None:
            messages.append(message)
    return messages


@pytest.mark.parametrize("size", [0, 1, LIMIT - 5, LIMIT - 4])
def test_a_message_up_to_its_limit_comes_whole_in_every_chunking(size: int) -> None:
    body = bytes(range(size))
    for chunks in chunkings(framed(PASSWORD, size + 4, body)):
        framer = _wire.Framer({PASSWORD: LIMIT})
        assert collect(framer, chunks) == [(PASSWORD, body)]
        assert framer.pending == 0


@pytest.mark.parametrize("length", [0, 1, 3, LIMIT + 1, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_length_out_of_bounds_is_judged_on_the_header_alone(length: int) -> None:
    framer = _wire.Framer({PASSWORD: LIMIT})
    header = framed(PASSWORD, length)
    for byte in header[:-1]:
        framer.feed(bytes([byte]))
        assert framer.message() is None
    framer.feed(header[-1:])
    with pytest.raises(FrameError, match=f"^message 'p' of length {length}, allowed are 4 to {LIMIT}$"):
        framer.message()


def test_a_type_that_may_not_come_is_judged_on_its_one_byte() -> None:
    for kind in set(range(256)) - {PASSWORD}:
        framer = _wire.Framer({PASSWORD: LIMIT})
        framer.feed(bytes([kind]))
        with pytest.raises(FrameError, match=f"^message of type 0x{kind:02x}, which may not come here$"):
            framer.message()


def test_every_type_can_be_allowed_with_a_limit_of_its_own() -> None:
    for kind in range(256):
        framer = _wire.Framer({kind: 4, kind ^ 1: 5})
        framer.feed(framed(kind, 4) + framed(kind ^ 1, 5, b"x") + framed(kind, 5, b"x"))
        assert framer.message() == (kind, b"")
        assert framer.message() == (kind ^ 1, b"x")
        with pytest.raises(FrameError, match="of length 5, allowed are 4 to 4"):
            framer.message()


def test_the_largest_limit_is_that_of_the_field() -> None:
    framer = _wire.Framer({PASSWORD: (1 << 32) - 1})
    framer.feed(framed(PASSWORD, (1 << 32) - 1, b"the beginning of four gigabytes"))
    assert framer.message() is None


@pytest.mark.parametrize("limits", [{256: 4}, {-1: 4}, {1: -1}, {1: 1 << 32}, {"p": 4}])
def test_limits_that_are_none_are_an_error(limits: dict[int, int]) -> None:
    with pytest.raises((OverflowError, TypeError)):
        _wire.Framer(limits)


def test_what_is_allowed_counts_from_the_next_message_on() -> None:
    framer = _wire.Framer({PASSWORD: LIMIT})
    framer.feed(framed(PASSWORD, 4) + framed(ERROR, 4) + framed(PASSWORD, 4))
    assert framer.message() == (PASSWORD, b"")
    framer.allow({ERROR: LIMIT})
    assert framer.message() == (ERROR, b"")
    with pytest.raises(FrameError, match="of type 0x70"):
        framer.message()


def test_an_error_stays_until_something_else_is_allowed() -> None:
    framer = _wire.Framer({})
    framer.feed(framed(PASSWORD, 4))
    for _ in range(2):
        with pytest.raises(FrameError, match="of type 0x70"):
            framer.message()
    framer.allow({PASSWORD: 4})
    assert framer.message() == (PASSWORD, b"")


def test_many_messages_in_one_chunk_come_in_order() -> None:
    bodies = [str(number).encode() for number in range(1000)]
    framer = _wire.Framer({PASSWORD: LIMIT})
    stream = b"".join(framed(PASSWORD, len(body) + 4, body) for body in bodies)
    assert collect(framer, [stream]) == [(PASSWORD, body) for body in bodies]


def test_a_run_is_all_that_is_of_its_types_as_it_came() -> None:
    first, second, other = framed(PASSWORD, 6, b"ab"), framed(ERROR, 4), framed(ord("Z"), 5, b"I")
    stream = first + second + first + other + first
    for cut in range(len(stream) + 1):
        framer = _wire.Framer({PASSWORD: LIMIT, ERROR: LIMIT, ord("Z"): 5})
        runs = []
        for part in (stream[:cut], stream[cut:]):
            framer.feed(part)
            runs.append(framer.run(b"pE"))
        assert b"".join(runs) == first + second + first
        assert framer.message() == (ord("Z"), b"I")
        assert framer.run(b"Z") == b""
        assert framer.run(b"p") == first
        assert framer.pending == 0


def test_a_run_of_what_may_not_come_is_an_error() -> None:
    for bad, says in (
        (b"Q", "of type 0x51"),
        (framed(PASSWORD, 3), "of length 3"),
        (framed(ERROR, 41), "of length 41"),
    ):
        framer = _wire.Framer({PASSWORD: LIMIT, ERROR: LIMIT})
        framer.feed(framed(PASSWORD, 4) + bad)
        with pytest.raises(FrameError, match=says):
            framer.run(b"p")


def test_pending_counts_what_was_not_taken() -> None:
    framer = _wire.Framer({PASSWORD: LIMIT})
    assert framer.pending == 0
    framer.feed(framed(PASSWORD, 6, b"ab") * 3 + b"p")
    for taken in range(4):
        assert framer.pending == 7 * (3 - taken) + 1
        framer.message()


def test_a_byte_can_be_looked_at_and_taken_by_itself() -> None:
    framer = _wire.Framer({ord("R"): 8})
    assert framer.first_byte == -1
    assert framer.byte() is None
    framer.feed(b"\xffS" + framed(ord("R"), 8, b"abcd"))
    for expected in (0xFF, ord("S")):
        assert framer.first_byte == framer.first_byte == expected
        assert framer.byte() == expected
    assert framer.first_byte == ord("R")
    assert framer.message() == (ord("R"), b"abcd")
    assert framer.first_byte == -1
    assert framer.byte() is None


def test_the_rest_is_what_was_not_taken_and_is_given_once() -> None:
    messages, rest = framed(PASSWORD, 6, b"ab") * 3, b"Q\0\0\0\x09select a row"
    stream = messages + rest
    for cut in range(len(stream) + 1):
        framer = _wire.Framer({PASSWORD: LIMIT})
        framer.feed(stream[:cut])
        taken = 0
        while taken < 3 and framer.message() is not None:
            taken += 1
        assert framer.take_rest() + stream[cut:] == stream[7 * taken :]
        assert framer.pending == 0
        assert framer.take_rest() == b""
        framer.feed(framed(PASSWORD, 4))
        assert framer.message() == (PASSWORD, b"")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_is_fed_may_be_changed_afterwards(kind: type) -> None:
    source = bytearray(framed(PASSWORD, 6, b"ab"))
    framer = _wire.Framer({PASSWORD: LIMIT})
    framer.feed(kind(source))
    source[:] = bytes(len(source))
    assert framer.message() == (PASSWORD, b"ab")


@pytest.mark.parametrize("size", [4, 5, LIMIT - 4])
def test_a_startup_packet_up_to_its_limit_comes_whole_in_every_chunking(size: int) -> None:
    body = bytes(range(size))
    for chunks in chunkings((size + 4).to_bytes(4) + body):
        framer = _wire.Framer({})
        packets = []
        for chunk in chunks:
            framer.feed(chunk)
            packets.append(framer.startup_packet(LIMIT))
        assert packets == [None] * (len(chunks) - 1) + [body]
        assert framer.pending == 0


@pytest.mark.parametrize("length", [0, 1, 4, 7, LIMIT + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_startup_length_out_of_bounds_is_judged_on_its_four_bytes(length: int) -> None:
    framer = _wire.Framer({})
    for byte in length.to_bytes(4):
        assert framer.startup_packet(LIMIT) is None
        framer.feed(bytes([byte]))
    with pytest.raises(FrameError, match=f"^startup packet of length {length}, allowed are 8 to {LIMIT}$"):
        framer.startup_packet(LIMIT)


def test_messages_follow_a_startup_packet() -> None:
    framer = _wire.Framer({PASSWORD: LIMIT})
    framer.feed(_wire.startup_packet(196608, b"\0") + _wire.message(PASSWORD, b"secret\0"))
    assert framer.startup_packet(LIMIT) == b"\0\x03\0\0\0"
    assert framer.message() == (PASSWORD, b"secret\0")


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_535, 65_536, 1 << 20])
def test_what_is_written_is_what_the_manual_says(size: int) -> None:
    body = bytes(size)
    assert _wire.message(PASSWORD, body) == framed(PASSWORD, size + 4, body)
    assert _wire.startup_packet(80877103, body) == (size + 8).to_bytes(4) + (80877103).to_bytes(4) + body


def test_every_type_can_be_written() -> None:
    for kind in range(256):
        assert _wire.message(kind, b"x") == reference.message(kind, b"x")


@pytest.mark.parametrize("code", [0, 196608, 80877102, 1 << 31, (1 << 32) - 1])
def test_every_code_can_be_written(code: int) -> None:
    assert _wire.startup_packet(code, b"x") == reference.startup_packet(code, b"x")


@pytest.mark.parametrize("write", [_wire.message, _wire.startup_packet])
def test_a_body_of_a_gigabyte_is_refused_before_any_memory_is_taken(write: Callable[[int, bytes], bytes]) -> None:
    body = bytes(1 << 30)  # zero pages: the kernel gives them when they are touched, and nobody does
    with pytest.raises(ValueError, match="1 GiB or more"):
        write(PASSWORD, body)


@pytest.mark.parametrize(("kind", "body"), [(256, b""), (-1, b""), (PASSWORD, None), (PASSWORD, "text")])
def test_what_cannot_be_a_message_is_an_error(kind: int, body: bytes) -> None:
    with pytest.raises((OverflowError, TypeError)):
        _wire.message(kind, body)
