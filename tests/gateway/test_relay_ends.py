"""The two compiled ends of a session, with their transports driven by hand: what system tests cannot time."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgauthproxy._relay import End, ForwardBuffer, join
from tests.gateway.transports import RecordingTransport

READY = b"Z\0\0\0\x05I"
TERMINATE = b"X\0\0\0\x04"
BUFFER = 64
NO_SOCKET = -1


@dataclass
class Owner:
    """What a session hears of its ends."""

    lost: list[tuple[End, Exception | None]] = field(default_factory=list)
    finished: int = 0

    def end_lost(self, end: End, error: Exception | None) -> None:
        self.lost.append((end, error))

    def target_finished(self) -> None:
        self.finished += 1


class Pair:
    """A session's two ends, their transports and, where a test wants them, their sockets."""

    def __init__(self, client_fd: int = NO_SOCKET, target_fd: int = NO_SOCKET, *, started: bool = True) -> None:
        self.owner = Owner()
        self.buffer = ForwardBuffer(BUFFER)
        self.client_transport, self.target_transport = RecordingTransport(), RecordingTransport()
        self.client_transport.reading = self.target_transport.reading = False
        self.client = End(self.owner, self.client_transport, client_fd, False, self.buffer)
        self.target = End(self.owner, self.target_transport, target_fd, True, self.buffer)
        join(self.client, self.target)
        if started:
            self.target.start(b"", False)
            self.client.start(b"", False)

    def receive(self, end: End, data: bytes) -> None:
        """As an event loop does: reads into the end's buffer, and says how much came."""
        for at in range(0, len(data), BUFFER):
            part = data[at : at + BUFFER]
            end.get_buffer(-1)[: len(part)] = part
            end.buffer_updated(len(part))
            # The buffer is shared: the next session's bytes come into it.
            end.get_buffer(-1)[:] = b"\xee" * BUFFER


def test_joined_ends_are_the_protocols_of_their_transports() -> None:
    pair = Pair(started=False)
    assert pair.client_transport.protocol is pair.client
    assert pair.target_transport.protocol is pair.target
    for transport in (pair.client_transport, pair.target_transport):
        # Any byte that the socket does not take pauses the other side.
        assert transport.calls == ["set_protocol", "set_write_buffer_limits(0, 0)"]


def test_both_begin_to_read_when_they_are_started() -> None:
    pair = Pair()
    assert pair.client_transport.reading
    assert pair.target_transport.reading


def test_what_one_reads_the_other_writes_unchanged() -> None:
    pair = Pair()
    data = bytes(range(256)) * 3
    pair.receive(pair.client, data)
    pair.receive(pair.target, data[::-1])
    assert pair.target_transport.written == data
    assert pair.client_transport.written == data[::-1]
    assert (pair.client.received, pair.target.received) == (len(data), len(data))


def test_the_rest_of_a_login_goes_first() -> None:
    pair = Pair(started=False)
    pair.target.start(b"greeted", False)
    pair.client.start(b"pipelined", False)
    pair.receive(pair.client, b" and more")
    pair.receive(pair.target, b" and more")
    assert pair.target_transport.written == b"pipelined and more"
    assert pair.client_transport.written == b"greeted and more"
    assert (pair.client.received, pair.target.received) == (18, 16)


def test_a_rest_that_the_other_side_does_not_take_holds_its_sender() -> None:
    pair = Pair(started=False)
    pair.target.pause_writing()
    pair.target.start(b"", False)
    pair.client.start(b"pipelined", False)
    assert not pair.client_transport.reading
    assert pair.target_transport.reading
    pair.target.resume_writing()
    assert pair.client_transport.reading


def test_a_client_that_had_closed_its_sending_side_hands_that_on_behind_its_rest() -> None:
    pair = Pair(started=False)
    pair.target.start(b"", False)
    pair.client.start(b"pipelined", True)
    assert pair.target_transport.written == b"pipelined"
    assert pair.target_transport.calls[-1] == "write_eof"
    assert not pair.client_transport.reading
    assert not pair.client_transport.closing
    pair.receive(pair.target, b"answer")
    assert pair.client_transport.written == b"answer"


def test_a_target_that_had_closed_ends_the_session_behind_its_rest() -> None:
    pair = Pair(started=False)
    pair.target.start(b"last words", True)
    assert pair.client_transport.written == b"last words"
    assert pair.owner.finished == 1
    assert pair.target_transport.closing


def test_a_side_that_does_not_take_its_bytes_holds_the_other() -> None:
    pair = Pair()
    for waiting, sender in ((pair.client, pair.target_transport), (pair.target, pair.client_transport)):
        assert not waiting.holding
        waiting.pause_writing()
        assert waiting.holding
        assert not sender.reading
        waiting.resume_writing()
        assert not waiting.holding
        assert sender.reading


def test_a_side_that_has_ended_is_not_read_again() -> None:
    pair = Pair()
    pair.target.pause_writing()
    assert pair.client.eof_received() is True
    pair.target.resume_writing()
    assert pair.client_transport.calls[-1] == "pause_reading"


def test_a_clients_half_close_goes_on_and_leaves_the_way_back_open() -> None:
    pair = Pair()
    assert pair.client.eof_received() is True
    assert pair.client.has_finished
    assert pair.target_transport.calls[-1] == "write_eof"
    pair.receive(pair.target, b"answer")
    assert pair.client_transport.written == b"answer"
    assert pair.owner == Owner()


def test_a_target_that_was_sent_a_terminate_is_not_half_closed_too() -> None:
    pair = Pair()
    pair.receive(pair.client, b"Q\0\0\0\x05\0" + TERMINATE)
    assert pair.client.eof_received() is True
    assert "write_eof" not in pair.target_transport.calls


def test_a_targets_end_is_told_and_closes_it() -> None:
    pair = Pair()
    assert pair.target.eof_received() is False
    assert pair.owner.finished == 1
    assert "write_eof" not in pair.client_transport.calls


def test_each_end_is_lost_once_and_then_knows_nobody() -> None:
    pair = Pair()
    error = ConnectionResetError(104, "reset")
    pair.client.connection_lost(error)
    pair.client.connection_lost(error)
    assert pair.owner.lost == [(pair.client, error)]
    pair.receive(pair.target, b"to nobody")
    pair.target.pause_writing()
    pair.target.resume_writing()
    assert pair.client_transport.written == b""
    pair.target.connection_lost(None)
    assert pair.owner.lost == [(pair.client, error), (pair.target, None)]
    assert (pair.client.received, pair.target.received) == (0, 9)


def test_a_client_that_half_closes_after_its_target_is_lost_closes() -> None:
    pair = Pair()
    pair.target.connection_lost(None)
    assert pair.client.eof_received() is True
    assert "write_eof" not in pair.target_transport.calls


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection: the target's socket as the gateway has it, and the target itself."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := connection.recv(1 << 20):
            data += chunk
    return data


def test_a_socket_without_tls_is_written_past_its_transport(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    pair = Pair(target_fd=ours.fileno())
    pair.receive(pair.client, b"select 1")
    assert read_all(theirs) == b"select 1"
    assert "write" not in pair.target_transport.calls


def test_what_a_full_socket_does_not_take_goes_through_its_transport_in_order(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    pair = Pair(target_fd=ours.fileno())
    sent = b""
    while not pair.target_transport.written:
        piece = bytes([len(sent) // BUFFER % 251]) * BUFFER
        pair.receive(pair.client, piece)
        sent += piece
    # The transport says at once that it holds something.
    pair.target.pause_writing()
    assert not pair.client_transport.reading
    # What was read before the pause came through must not overtake it, even if the socket could take it now.
    arrived = read_all(theirs)
    pair.receive(pair.client, b"last")
    assert read_all(theirs) == b""
    assert arrived + pair.target_transport.written == sent + b"last"
    pair.target.resume_writing()
    pair.receive(pair.client, b"direct")
    assert read_all(theirs) == b"direct"


def test_a_socket_that_takes_a_part_gets_the_rest_through_its_transport(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    large = ForwardBuffer(1 << 22)
    owner, transport = Owner(), RecordingTransport()
    client = End(owner, RecordingTransport(), NO_SOCKET, False, large)
    target = End(owner, transport, ours.fileno(), True, large)
    join(client, target)
    data = bytes(range(256)) * (1 << 14)
    client.get_buffer(-1)[:] = data
    client.buffer_updated(len(data))
    directly = read_all(theirs)
    assert 0 < len(directly) < len(data)
    assert directly + transport.written == data


def test_a_target_that_is_gone_is_not_closed_before_its_last_words_are_read(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    pair = Pair(target_fd=ours.fileno())
    theirs.close()
    pair.receive(pair.client, b"select 1")
    # The client has nobody to talk to, but is owed what the target said before it went.
    assert not pair.client_transport.reading
    assert not pair.target_transport.closing
    pair.receive(pair.client, b"select 2")
    pair.receive(pair.target, b"I am going")
    assert pair.client_transport.written == b"I am going"
    assert pair.target_transport.written == b""
    assert pair.target.eof_received() is False
    pair.target.connection_lost(None)
    ((end, error),) = pair.owner.lost
    assert end is pair.target
    # Its reset was spent on the send that failed.
    assert isinstance(error, ConnectionResetError)


def test_a_client_that_is_gone_is_told_of_even_if_it_looks_like_a_half_close(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    pair = Pair(client_fd=ours.fileno())
    theirs.close()
    pair.receive(pair.target, b"a row")
    assert not pair.target_transport.reading
    assert pair.client.eof_received() is False
    assert "write_eof" not in pair.target_transport.calls
    pair.client.connection_lost(None)
    ((end, error),) = pair.owner.lost
    assert end is pair.client
    assert isinstance(error, ConnectionResetError)


def test_a_side_that_is_gone_and_not_being_read_is_dropped(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    pair = Pair(client_fd=ours.fileno())
    # The target takes no more, so that the client's reading is paused: it would never tell that it is gone.
    pair.target.pause_writing()
    theirs.close()
    pair.receive(pair.target, b"a row")
    assert pair.client_transport.calls[-1] == "abort"


def test_a_client_that_is_gone_after_its_half_close_is_dropped(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    pair = Pair(client_fd=ours.fileno())
    pair.client.eof_received()
    theirs.close()
    pair.receive(pair.target, b"a row")
    assert pair.client_transport.calls[-1] == "abort"


def test_a_lost_end_never_writes_to_a_descriptor_that_may_be_anothers_by_now(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = sockets
    pair = Pair(target_fd=ours.fileno())
    pair.target.connection_lost(None)
    pair.receive(pair.client, b"select 1")
    assert read_all(theirs) == b""


def test_a_session_may_end_in_any_state_of_reading(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    pair = Pair(target_fd=ours.fileno())
    theirs.close()
    pair.receive(pair.client, b"x")
    pair.client.connection_lost(None)
    pair.target.connection_lost(None)
    assert [end for end, _ in pair.owner.lost] == [pair.client, pair.target]


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.sampled_from([READY, READY[:5], READY[:3], TERMINATE, b"Z", b"\0", b"D\0\0\0\x08data"])
        | st.binary(max_size=9)
    ),
    st.data(),
)
def test_a_message_boundary_is_known_however_the_stream_is_cut(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6), label="cuts"))
    pair = Pair(started=False)
    rest, *chunks = (stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True))
    pair.target.start(rest, False)
    pair.client.start(rest, False)
    seen = rest
    for chunk in [b"", *chunks]:
        for end in (pair.target, pair.client):
            pair.receive(end, chunk)
        seen += chunk
        # The greeting that went before ends in a ReadyForQuery.
        assert pair.target.at_message_boundary is ((READY + seen)[-6:-1] == READY[:5])
        assert pair.client.at_message_boundary is ((bytes(6) + seen)[-6:-1] == READY[:5])
        assert pair.client.has_finished is seen.endswith(TERMINATE)
    assert pair.client_transport.written == pair.target_transport.written == stream


@pytest.mark.parametrize("cut", range(len(READY) + 1))
def test_a_message_may_follow_a_whole_ready_for_query_and_not_a_part_of_it(cut: int) -> None:
    pair = Pair()
    assert pair.target.at_message_boundary
    pair.receive(pair.target, b"C\0\0\0\x0dSELECT 1\0")
    assert not pair.target.at_message_boundary
    for part in (READY[:cut], READY[cut:]):
        if part:
            pair.receive(pair.target, part)
            assert pair.target.at_message_boundary is (part.endswith(b"I"))


@pytest.mark.parametrize("size", [0, -1])
def test_a_buffer_holds_something(size: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        ForwardBuffer(size)
