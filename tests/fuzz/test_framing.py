"""Any bytes in any chunking: the compiled framer gives what the plain-Python one gives, and never anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks import reference
from pgauthproxy import _digest, _wire
from pgauthproxy.errors import FrameError

TYPES = st.integers(0, 255)
LIMITS = st.dictionaries(
    TYPES | st.sampled_from(b"pRE"), st.sampled_from([0, 3, 4, 5, 20, 1 << 31, (1 << 32) - 1]), max_size=6
)
LENGTHS = st.sampled_from([0, 3, 4, 5, 7, 8, 9, 20, 21, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]) | st.integers(0, 40)
HEADERS = st.builds(lambda kind, length: bytes([kind]) + length.to_bytes(4), st.sampled_from(b"pRE"), LENGTHS)
STREAMS = st.lists(HEADERS | st.binary(max_size=30) | LENGTHS.map(lambda length: length.to_bytes(4)), max_size=12)

# What is done with a framer, one step after the other.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), HEADERS | st.binary(max_size=30)),
        st.tuples(st.just("message")),
        st.tuples(st.just("byte")),
        st.tuples(st.just("run"), st.sampled_from([b"", b"p", b"pR", bytes(range(256))])),
        st.tuples(st.just("startup_packet"), st.sampled_from([0, 7, 8, 20, (1 << 32) - 1])),
        st.tuples(st.just("allow"), LIMITS),
        st.tuples(st.just("take_rest")),
    ),
    max_size=40,
)


def attempt(do: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives, or that it is a FrameError; anything else is raised."""
    try:
        return do(*arguments)
    except FrameError:
        return FrameError


@given(LIMITS, STEPS)
def test_whatever_is_done_both_framers_answer_alike(limits: dict[int, int], steps: list[tuple[Any, ...]]) -> None:
    ours, theirs = _wire.Framer(limits), reference.Framer(limits)
    for name, *arguments in steps:
        assert attempt(getattr(ours, name), *arguments) == attempt(getattr(theirs, name), *arguments), (name, arguments)
        assert (ours.pending, ours.first_byte) == (theirs.pending, theirs.first_byte)


def read_all(framer: Any, chunks: list[bytes]) -> list[Any]:
    """Every message up to the first error."""
    messages: list[Any] = []
    for chunk in chunks:
        framer.feed(chunk)
        while (message := attempt(framer.message)) is not None:
            messages.append(message)
            if message is FrameError:
                return messages
    return messages


@given(st.data(), STREAMS)
def test_chunking_makes_no_difference(data: st.DataObject, parts: list[bytes]) -> None:
    stream = b"".join(parts)
    limits = {ord("p"): 20, ord("R"): (1 << 32) - 1}
    whole = read_all(_wire.Framer(limits), [stream])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10), label="cuts"))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read_all(_wire.Framer(limits), chunks) == whole
    assert read_all(reference.Framer(limits), chunks) == whole


@given(st.lists(st.tuples(TYPES, st.binary(max_size=50)), max_size=10), st.binary(max_size=20))
def test_what_is_written_is_read_back(messages: list[tuple[int, bytes]], rest: bytes) -> None:
    framer = _wire.Framer(dict.fromkeys(range(256), 54))
    framer.feed(b"".join(_wire.message(*message) for message in messages))
    assert [framer.message() for _ in messages] == messages
    framer.feed(rest)
    assert framer.take_rest() == rest


@given(st.integers(0, (1 << 32) - 1), st.binary(max_size=50))
def test_packets_are_written_alike_and_read_back(code: int, body: bytes) -> None:
    packet = _wire.startup_packet(code, body)
    assert packet == reference.startup_packet(code, body)
    framer = _wire.Framer({})
    framer.feed(packet)
    assert framer.startup_packet(58) == code.to_bytes(4) + body


@given(st.binary(max_size=300), st.binary(max_size=300))
@example(b"x" * 55, b"")
@example(b"x" * 56, b"")
@example(b"x" * 63, b"x")
def test_passwords_are_hashed_alike(password: bytes, user: bytes) -> None:
    assert _digest.md5_password(password, user) == reference.md5_password(password, user)


@given(st.binary(min_size=35, max_size=35), st.binary(min_size=4, max_size=4))
def test_answers_are_hashed_alike(stored: bytes, salt: bytes) -> None:
    assert _digest.md5_answer(stored, salt) == reference.md5_answer(stored, salt)
