"""The two compiled ends of a session, with their transports driven by hand: what system tests cannot time."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgauthproxy._observe import Observer
from pgauthproxy._relay import End, ForwardBuffer, ObservedEnd, join
from pgauthproxy._tls import Channel
from pgauthproxy.errors import TlsError
from tests.channels import Renegotiating, shaken
from tests.conftest import resident_bytes
from tests.gateway.transports import RecordingTransport

READY = b"Z\0\0\0\x05I"
TERMINATE = b"X\0\0\0\x04"
BUFFER = 64
MEGABYTE = 1 << 20


@dataclass
class Owner:
    """What a session hears of its ends."""

    lost: list[tuple[End, Exception | None]] = field(default_factory=list)
    finished: int = 0

    def end_lost(self, end: End, error: Exception | None) -> None:
        self.lost.append((end, error))

    def target_finished(self) -> None:
        self.finished += 1


class Side:
    """An end, its transport and socket, and whom that is connected to: the client or the target itself.

    `tls` is the end's channel and `peer_tls` that of the other side, if TLS is spoken.
    """

    def __init__(
        self,
        owner: Owner,
        buffer: ForwardBuffer,
        *,
        faces_target: bool,
        tls: tuple[Channel, Channel] | None,
        full: bool,
        observer: Observer | None = None,
    ) -> None:
        self.socket, self.peer = socket.socketpair()
        for each in (self.socket, self.peer):
            each.setblocking(False)
        self.tls: Channel | None = tls[0] if tls else None
        self.peer_tls: Channel | None = tls[1] if tls else None
        # What a socket that is full does not take stays with the transport.
        self.full = full
        self.transport = RecordingTransport(None if full else self.socket)
        self.transport.reading = False
        self.buffer = buffer
        facts = (owner, self.transport, self.socket.fileno(), faces_target, buffer, self.tls)
        self.end = End(*facts) if observer is None else ObservedEnd(*facts, observer)
        self.opposite = self
        self._arrived = self._heard = b""

    def says(self, data: bytes) -> bytes:
        """What is on the wire when the peer says this."""
        return data if self.peer_tls is None else self.peer_tls.encrypt(data)

    def receives(self, wire: bytes, size: int = 0) -> None:
        """As an event loop does: reads into the end's buffer, at most this much at once, and says how much came."""
        most = min(size or len(self.buffer.space), len(self.buffer.space))
        for at in range(0, len(wire), most):
            part = wire[at : at + most]
            self.end.get_buffer(-1)[: len(part)] = part
            self.end.buffer_updated(len(part))
            self.opposite.listens()
            # The buffer is shared: the next session's bytes come into it.
            self.end.get_buffer(-1)[:] = b"\xee" * len(self.buffer.space)

    def hears(self, data: bytes, size: int = 0) -> None:
        """The peer says this, and it comes here in pieces."""
        self.receives(self.says(data), size)

    def listens(self) -> None:
        """The peer reads, unless it is one that does not, or is gone."""
        if not self.full and self.peer.fileno() >= 0:
            self._arrived += read_all(self.peer)

    @property
    def heard(self) -> bytes:
        """All that the peer was sent so far, as it understands it."""
        self.listens()
        arrived, self._arrived = self._arrived, b""
        self._heard += arrived if self.peer_tls is None else self.peer_tls.decrypt(arrived)
        return self._heard

    def close(self) -> None:
        self.socket.close()
        self.peer.close()


class Pair:
    """A session's two ends. A side speaks TLS if it is given a version of that, or channels: its own and its peer's.

    If there is an observer, it follows both.
    """

    def __init__(
        self,
        *,
        client_tls: str = "",
        target_tls: str = "",
        client_channels: tuple[Channel, Channel] | None = None,
        started: bool = True,
        size: int = BUFFER,
        buffer: ForwardBuffer | None = None,
        full: str = "",
        observer: Observer | None = None,
    ) -> None:
        self.owner = Owner()
        buffer = buffer or ForwardBuffer(size)
        if client_tls:
            # Towards clients an end is the server, towards targets the client.
            client, server = shaken(client_tls)
            client_channels = server, client
        target_channels = shaken(target_tls) if target_tls else None
        self.client = Side(
            self.owner, buffer, faces_target=False, tls=client_channels, full=full == "client", observer=observer
        )
        self.target = Side(
            self.owner, buffer, faces_target=True, tls=target_channels, full=full == "target", observer=observer
        )
        self.client.opposite, self.target.opposite = self.target, self.client
        join(self.client.end, self.target.end)
        if started:
            self.target.end.start(b"", False)
            self.client.end.start(b"", False)

    def close(self) -> None:
        self.client.close()
        self.target.close()


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := connection.recv(1 << 20):
            data += chunk
    return data


Connect = Callable[..., Pair]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes sessions."""
    made: list[Pair] = []

    def make(**options: object) -> Pair:
        made.append(Pair(**options))  # type: ignore[arg-type]  # as Pair has them
        return made[-1]

    yield make
    for pair in made:
        pair.close()


TLS_SIDES = [("", ""), ("1.3", ""), ("", "1.3"), ("1.3", "1.3"), ("1.2", "1.3"), ("1.2", "1.2")]
on_both_sides = pytest.mark.parametrize(
    ("client_tls", "target_tls"),
    TLS_SIDES,
    ids=["plain", "TLS to client", "TLS to target", "TLS", "old TLS to client", "old TLS"],
)
with_tls = pytest.mark.parametrize(("client_tls", "target_tls"), TLS_SIDES[1:], ids=lambda version: version or "plain")


def test_joined_ends_are_the_protocols_of_their_transports(connect: Connect) -> None:
    pair = connect(started=False)
    for side in (pair.client, pair.target):
        assert side.transport.protocol is side.end
        # Any byte that the socket does not take pauses the other side.
        assert side.transport.calls == ["set_protocol", "set_write_buffer_limits(0, 0)"]


@on_both_sides
def test_both_begin_to_read_when_they_are_started(connect: Connect, client_tls: str, target_tls: str) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    assert pair.client.transport.reading
    assert pair.target.transport.reading


@on_both_sides
@pytest.mark.parametrize("size", [1, 2, 5, 21, 22, 23, 64, 1000, 16_384, 16_406, 65_536])
def test_what_one_reads_the_other_is_sent_unchanged(
    connect: Connect, client_tls: str, target_tls: str, size: int
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls, size=65_536)
    data = bytes(range(256)) * (3 if size < 20 else 200)
    for part in (data[:1], data[1:300], data[300:]):
        pair.client.hears(part, size)
        pair.target.hears(part[::-1], size)
    assert pair.target.heard == data
    assert pair.client.heard == data[:1] + data[1:300][::-1] + data[300:][::-1]
    assert (pair.client.end.received, pair.target.end.received) == (len(data), len(data))
    # Nothing went the long way.
    for side in (pair.client, pair.target):
        assert "write" not in side.transport.calls


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    st.sampled_from(TLS_SIDES),
    st.lists(
        st.tuples(
            st.booleans(),
            st.binary(max_size=40) | st.sampled_from([b"x" * 16_384, b"y" * 40_000]),
            st.integers(1, 5000),
        ),
        max_size=8,
    ),
    st.sampled_from([BUFFER, 4096, 65_536]),
)
def test_whoever_speaks_when_the_other_hears_it_in_order(
    tls: tuple[str, str], sayings: list[tuple[bool, bytes, int]], buffer: int
) -> None:
    with contextlib.closing(Pair(client_tls=tls[0], target_tls=tls[1], size=buffer)) as pair:
        said = {True: b"", False: b""}
        for by_client, data, size in sayings:
            (pair.client if by_client else pair.target).hears(data, size)
            said[by_client] += data
            assert pair.target.heard == said[True]
            assert pair.client.heard == said[False]


@with_tls
def test_records_of_several_chunks_and_chunks_of_several_records_are_one_stream(
    connect: Connect, client_tls: str, target_tls: str
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls, size=65_536)
    parts = [b"a", b"b" * 16_384, b"c" * 100, b"d" * 16_383, b"e" * 50_000]
    wire = b"".join(map(pair.client.says, parts))
    for at in (1, 7, 16_400, 16_500, 40_000):
        pair.client.receives(wire[:at])
        wire = wire[at:]
    pair.client.receives(wire)
    assert pair.target.heard == b"".join(parts)


def test_sessions_share_one_buffer_and_nothing_in_it(connect: Connect) -> None:
    buffer = ForwardBuffer(4096)
    pairs = [connect(client_tls=client, target_tls=target, buffer=buffer) for client, target in TLS_SIDES]
    told = [bytes([number]) * 3000 for number in range(len(pairs))]
    wires = [pair.client.says(data) for pair, data in zip(pairs, told, strict=True)]
    for at in range(0, 3100, 50):
        for pair, wire in zip(pairs, wires, strict=True):
            pair.client.receives(wire[at : at + 50])
    for pair, data in zip(pairs, told, strict=True):
        assert pair.target.heard == data


@on_both_sides
def test_the_rest_of_a_login_goes_first(connect: Connect, client_tls: str, target_tls: str) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls, started=False)
    pair.target.end.start(b"greeted", False)
    pair.client.end.start(b"pipelined", False)
    pair.client.hears(b" and more")
    pair.target.hears(b" and more")
    assert pair.target.heard == b"pipelined and more"
    assert pair.client.heard == b"greeted and more"
    assert (pair.client.end.received, pair.target.end.received) == (18, 16)


def test_a_rest_that_the_other_side_does_not_take_holds_its_sender(connect: Connect) -> None:
    pair = connect(started=False)
    pair.target.end.pause_writing()
    pair.target.end.start(b"", False)
    pair.client.end.start(b"pipelined", False)
    assert not pair.client.transport.reading
    assert pair.target.transport.reading
    pair.target.end.resume_writing()
    assert pair.client.transport.reading


@on_both_sides
def test_a_client_that_had_closed_its_sending_side_hands_that_on_behind_its_rest(
    connect: Connect, client_tls: str, target_tls: str
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls, started=False)
    pair.target.end.start(b"", False)
    pair.client.end.start(b"pipelined", True)
    assert pair.target.heard == b"pipelined"
    assert pair.target.transport.calls[-1] == "write_eof"
    assert pair.target.peer_tls is None or pair.target.peer_tls.finished
    assert not pair.client.transport.reading
    assert not pair.client.transport.closing
    pair.target.hears(b"answer")
    assert pair.client.heard == b"answer"


@on_both_sides
def test_a_target_that_had_closed_ends_the_session_behind_its_rest(
    connect: Connect, client_tls: str, target_tls: str
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls, started=False)
    pair.target.end.start(b"last words", True)
    assert pair.client.heard == b"last words"
    assert pair.owner.finished == 1
    assert pair.target.transport.closing


def test_a_side_that_does_not_take_its_bytes_holds_the_other(connect: Connect) -> None:
    pair = connect()
    for waiting, sender in ((pair.client, pair.target), (pair.target, pair.client)):
        assert not waiting.end.holding
        waiting.end.pause_writing()
        assert waiting.end.holding
        assert not sender.transport.reading
        waiting.end.resume_writing()
        assert not waiting.end.holding
        assert sender.transport.reading


def test_a_side_that_has_ended_is_not_read_again(connect: Connect) -> None:
    pair = connect()
    pair.target.end.pause_writing()
    assert pair.client.end.eof_received() is True
    pair.target.end.resume_writing()
    assert pair.client.transport.calls[-1] == "pause_reading"


@pytest.mark.parametrize("last", [b"", b"Q\0\0\0\x05\0", b"Q\0\0\0\x05\0" + TERMINATE], ids=["", "query", "Terminate"])
def test_a_clients_half_close_goes_on_whatever_it_said_last(connect: Connect, last: bytes) -> None:
    pair = connect()
    pair.client.hears(last)
    assert pair.client.end.eof_received() is True
    assert pair.client.end.has_finished
    assert pair.target.transport.calls[-1] == "write_eof"
    pair.target.hears(b"answer")
    assert pair.client.heard == b"answer"
    assert pair.owner == Owner()


@with_tls
@pytest.mark.parametrize("last", [b"", b"Q\0\0\0\x05\0", b"Q\0\0\0\x05\0" + TERMINATE], ids=["", "query", "Terminate"])
@pytest.mark.parametrize("size", [1, 64])
def test_a_clients_goodbye_is_a_half_close(
    connect: Connect, client_tls: str, target_tls: str, last: bytes, size: int
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    if pair.client.peer_tls is None:
        pair.client.hears(last)
        assert pair.client.end.eof_received() is True
    else:
        pair.client.receives(pair.client.says(last) + pair.client.peer_tls.say_goodbye(), size)
    assert pair.client.end.has_finished
    assert not pair.client.transport.closing
    assert pair.target.heard == last
    assert pair.target.transport.calls[-1] == "write_eof"
    assert pair.target.peer_tls is None or pair.target.peer_tls.finished
    pair.target.hears(b"answer", size)
    assert pair.client.heard == b"answer"
    # Its end of file is nothing new then.
    assert pair.client.end.eof_received() is True
    assert not pair.client.end.truncated
    assert pair.owner == Owner()


@with_tls
@pytest.mark.parametrize("size", [1, 64])
def test_a_targets_goodbye_is_the_end(connect: Connect, client_tls: str, target_tls: str, size: int) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    last = b"its last words"
    if pair.target.peer_tls is None:
        pair.target.hears(last)
        assert pair.target.end.eof_received() is False
    else:
        pair.target.receives(pair.target.says(last) + pair.target.peer_tls.say_goodbye(), size)
        assert pair.target.transport.closing
    assert pair.client.heard == last
    assert pair.owner.finished == 1
    assert not pair.target.end.truncated
    assert "write_eof" not in pair.client.transport.calls


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("who", ["client", "target"])
@pytest.mark.parametrize("cut", [0, 1])
def test_an_end_of_file_without_a_goodbye_passes_on_what_came_and_is_noted(
    connect: Connect, version: str, who: str, cut: int
) -> None:
    pair = connect(client_tls=version, target_tls=version)
    side, other = (pair.client, pair.target) if who == "client" else (pair.target, pair.client)
    side.receives(side.says(b"said, ") + side.says(b"cut off")[: -cut or None])
    assert side.end.eof_received() is (who == "client")
    assert other.heard == (b"said, " if cut else b"said, cut off")
    assert side.end.truncated
    assert not other.end.truncated
    assert pair.owner.finished == (who == "target")


def test_in_plain_an_end_of_file_is_no_truncation(connect: Connect) -> None:
    pair = connect()
    pair.client.end.eof_received()
    pair.target.end.eof_received()
    assert not pair.client.end.truncated
    assert not pair.target.end.truncated


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_what_a_client_sends_behind_its_goodbye_is_dropped_and_takes_no_memory(connect: Connect, version: str) -> None:
    pair = connect(client_tls=version, size=65_536)
    assert pair.client.peer_tls is not None
    pair.client.receives(pair.client.peer_tls.say_goodbye())
    flood = bytes(65_536)
    before = resident_bytes()
    for _ in range(1000):
        pair.client.receives(flood)
    assert resident_bytes() - before < 16 * MEGABYTE
    assert pair.target.heard == b""
    pair.target.hears(b"answer")
    assert pair.client.heard == b"answer"
    assert not pair.client.transport.closing


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("who", ["client", "target"])
def test_a_broken_record_closes_its_side_behind_an_alert(connect: Connect, version: str, who: str) -> None:
    pair = connect(client_tls=version, target_tls=version)
    side, other = (pair.client, pair.target) if who == "client" else (pair.target, pair.client)
    broken = bytearray(side.says(b"question"))
    broken[-1] ^= 1
    side.receives(bytes(broken))
    assert other.heard == b""
    assert side.transport.calls[-1] == "close"
    with pytest.raises(TlsError, match="ALERT_BAD_RECORD_MAC"):
        assert side.heard == b""
    # Nothing more can be said to it, and nobody fails who tries.
    other.hears(b"answer")
    side.end.send(b"good-bye")
    side.end.close()
    assert read_all(side.peer) == b""
    side.end.connection_lost(None)
    ((end, error),) = pair.owner.lost
    assert end is side.end
    assert isinstance(error, TlsError)
    assert "BAD_RECORD_MAC" in str(error)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_what_came_before_a_broken_record_is_passed_on(connect: Connect, version: str) -> None:
    pair = connect(client_tls=version, size=65_536)
    wire = pair.client.says(b"commit") + b"\x17\x03\x03\x00\x20" + bytes(32)
    pair.client.receives(wire)
    assert pair.target.heard == b"commit"
    assert pair.client.transport.calls[-1] == "close"


def test_a_side_that_breaks_tls_and_does_not_read_is_dropped(connect: Connect) -> None:
    pair = connect(client_tls="1.3")
    pair.client.end.pause_writing()
    pair.client.receives(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert pair.client.transport.calls[-1] == "abort"


def test_a_fatal_alert_of_the_peer_is_told_as_it_is(connect: Connect) -> None:
    pair = connect(client_tls="1.3")
    assert pair.client.peer_tls is not None
    with pytest.raises(TlsError) as raised:
        pair.client.peer_tls.decrypt(b"\x17\x03\x03\x00\x20" + bytes(32))
    pair.client.receives(raised.value.alert)
    pair.client.end.connection_lost(None)
    ((_, error),) = pair.owner.lost
    assert str(error) == "SSLV3_ALERT_BAD_RECORD_MAC"


def test_what_tls_itself_has_to_say_is_sent(connect: Connect, tmp_path: Path) -> None:
    asking = Renegotiating(tmp_path)
    pair = connect(client_channels=(asking.server, asking.client))
    pair.client.receives(asking.asks())
    assert pair.client.transport.calls[-1] == "write"
    assert pair.client.transport.written[0] == 0x15
    assert not pair.client.transport.closing
    assert pair.target.heard == b""


def test_a_client_that_makes_tls_talk_and_does_not_listen_is_closed(connect: Connect, tmp_path: Path) -> None:
    asking = Renegotiating(tmp_path)
    pair = connect(client_channels=(asking.server, asking.client), size=65_536, full="client")
    transport = pair.client.transport
    for _ in range(1000):
        pair.client.receives(b"".join(asking.asks() for _ in range(100)))
        if transport.closing:
            break
    assert transport.closing
    assert len(transport.written) < 4 * 65_536
    pair.client.end.connection_lost(None)
    ((_, error),) = pair.owner.lost
    assert str(error) == "the peer makes TLS talk and does not listen"


@on_both_sides
def test_a_message_of_our_own_goes_to_its_side_alone(connect: Connect, client_tls: str, target_tls: str) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    pair.client.end.send(b"terminating connection")
    assert pair.client.heard == b"terminating connection"
    assert pair.target.heard == b""
    assert pair.client.end.received == 0


@on_both_sides
def test_closing_says_goodbye_once_and_behind_all_else(connect: Connect, client_tls: str, target_tls: str) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    for side in (pair.client, pair.target):
        side.end.send(b"last words")
        side.end.close()
        side.end.close()
        assert side.transport.closing
        assert side.heard == b"last words"
        assert side.peer_tls is None or side.peer_tls.finished
        assert side.transport.calls.count("write") == (1 if side.tls is None else 2)


def test_a_targets_end_is_told_and_closes_it(connect: Connect) -> None:
    pair = connect()
    assert pair.target.end.eof_received() is False
    assert pair.owner.finished == 1
    assert "write_eof" not in pair.client.transport.calls


@on_both_sides
def test_each_end_is_lost_once_and_then_knows_nobody(connect: Connect, client_tls: str, target_tls: str) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    error = ConnectionResetError(104, "reset")
    client, target = pair.client.end, pair.target.end
    client.connection_lost(error)
    client.connection_lost(error)
    assert pair.owner.lost == [(client, error)]
    pair.target.hears(b"to nobody")
    target.pause_writing()
    target.resume_writing()
    assert pair.client.heard == b""
    target.connection_lost(None)
    assert pair.owner.lost == [(client, error), (target, None)]
    assert (client.received, target.received) == (0, 9)


def test_a_client_that_half_closes_after_its_target_is_lost_closes(connect: Connect) -> None:
    pair = connect()
    pair.target.end.connection_lost(None)
    assert pair.client.end.eof_received() is True
    assert "write_eof" not in pair.target.transport.calls


@on_both_sides
def test_what_a_full_socket_does_not_take_goes_through_its_transport_in_order(
    connect: Connect, client_tls: str, target_tls: str
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls, size=65_536, full="target")
    transport, arrived = pair.target.transport, b""
    sent = b""
    while not transport.written:
        piece = bytes([len(sent) // 5000 % 251]) * 5000
        pair.client.hears(piece)
        sent += piece
    # The transport says at once that it holds something.
    pair.target.end.pause_writing()
    assert not pair.client.transport.reading
    # What was read before the pause came through must not overtake it, even if the socket could take it now.
    arrived += read_all(pair.target.peer)
    pair.client.hears(b"last")
    assert read_all(pair.target.peer) == b""
    arrived += transport.written
    decrypt = bytes if pair.target.peer_tls is None else pair.target.peer_tls.decrypt
    assert decrypt(arrived) == sent + b"last"
    pair.target.end.resume_writing()
    pair.client.hears(b"direct")
    assert decrypt(read_all(pair.target.peer)) == b"direct"


@on_both_sides
def test_a_socket_that_takes_a_part_gets_the_rest_through_its_transport(
    connect: Connect, client_tls: str, target_tls: str
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls, size=1 << 22, full="target")
    data = bytes(range(256)) * (1 << 13)
    pair.client.hears(data)
    directly = read_all(pair.target.peer)
    held = pair.target.transport.written
    assert directly
    assert held
    whole = directly + held
    assert (whole if pair.target.peer_tls is None else pair.target.peer_tls.decrypt(whole)) == data


@on_both_sides
def test_a_target_that_is_gone_is_not_closed_before_its_last_words_are_read(
    connect: Connect, client_tls: str, target_tls: str
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    last_words = pair.target.says(b"I am going")
    pair.target.peer.close()
    pair.client.hears(b"select 1")
    # The client has nobody to talk to, but is owed what the target said before it went.
    assert not pair.client.transport.reading
    assert not pair.target.transport.closing
    pair.client.hears(b"select 2")
    pair.target.receives(last_words)
    assert pair.client.heard == b"I am going"
    assert pair.target.transport.written == b""
    assert pair.target.end.eof_received() is False
    pair.target.end.connection_lost(None)
    ((end, error),) = pair.owner.lost
    assert end is pair.target.end
    # Its reset was spent on the send that failed.
    assert isinstance(error, ConnectionResetError)


@on_both_sides
def test_a_client_that_is_gone_is_told_of_even_if_it_looks_like_a_half_close(
    connect: Connect, client_tls: str, target_tls: str
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    pair.client.peer.close()
    pair.target.hears(b"a row")
    assert not pair.target.transport.reading
    assert pair.client.end.eof_received() is False
    assert "write_eof" not in pair.target.transport.calls
    pair.client.end.connection_lost(None)
    ((end, error),) = pair.owner.lost
    assert end is pair.client.end
    assert isinstance(error, ConnectionResetError)


@on_both_sides
def test_a_side_that_is_gone_and_not_being_read_is_dropped(connect: Connect, client_tls: str, target_tls: str) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    # The target takes no more, so that the client's reading is paused: it would never tell that it is gone.
    pair.target.end.pause_writing()
    pair.client.peer.close()
    pair.target.hears(b"a row")
    assert pair.client.transport.calls[-1] == "abort"


@on_both_sides
def test_a_client_that_is_gone_after_its_half_close_is_dropped(
    connect: Connect, client_tls: str, target_tls: str
) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    pair.client.end.eof_received()
    pair.client.peer.close()
    pair.target.hears(b"a row")
    assert pair.client.transport.calls[-1] == "abort"


@on_both_sides
def test_a_target_that_is_gone_is_not_half_closed(connect: Connect, client_tls: str, target_tls: str) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    pair.target.peer.close()
    pair.client.hears(b"select 1")
    assert pair.client.end.eof_received() is True
    assert "write_eof" not in pair.target.transport.calls
    assert "write" not in pair.target.transport.calls


def test_a_lost_end_never_writes_to_a_descriptor_that_may_be_anothers_by_now(connect: Connect) -> None:
    pair = connect()
    pair.target.end.connection_lost(None)
    pair.client.hears(b"select 1")
    assert pair.target.heard == b""


@on_both_sides
def test_a_session_may_end_in_any_state_of_reading(connect: Connect, client_tls: str, target_tls: str) -> None:
    pair = connect(client_tls=client_tls, target_tls=target_tls)
    pair.target.peer.close()
    pair.client.hears(b"x")
    pair.client.end.connection_lost(None)
    pair.target.end.connection_lost(None)
    assert [end for end, _ in pair.owner.lost] == [pair.client.end, pair.target.end]


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.sampled_from([READY, READY[:5], READY[:3], TERMINATE, b"Z", b"\0", b"D\0\0\0\x08data"])
        | st.binary(max_size=9)
    ),
    st.data(),
    st.sampled_from(["", "1.3"]),
)
def test_a_message_boundary_is_known_however_the_stream_is_cut(
    parts: list[bytes], data: st.DataObject, tls: str
) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6), label="cuts"))
    with contextlib.closing(Pair(client_tls=tls, target_tls=tls, started=False)) as pair:
        rest, *chunks = (stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True))
        pair.target.end.start(rest, False)
        pair.client.end.start(rest, False)
        seen = rest
        for chunk in [b"", *chunks]:
            for side in (pair.target, pair.client):
                side.hears(chunk)
            seen += chunk
            # The greeting that went before ends in a ReadyForQuery.
            assert pair.target.end.at_message_boundary is ((READY + seen)[-6:-1] == READY[:5])
            assert pair.client.end.at_message_boundary is ((bytes(6) + seen)[-6:-1] == READY[:5])
            assert pair.client.end.has_finished is seen.endswith(TERMINATE)
        assert pair.client.heard == pair.target.heard == stream


@pytest.mark.parametrize("cut", range(len(READY) + 1))
@pytest.mark.parametrize("tls", ["", "1.3"])
def test_a_message_may_follow_a_whole_ready_for_query_and_not_a_part_of_it(
    connect: Connect, cut: int, tls: str
) -> None:
    pair = connect(target_tls=tls)
    assert pair.target.end.at_message_boundary
    pair.target.hears(b"C\0\0\0\x0dSELECT 1\0")
    assert not pair.target.end.at_message_boundary
    for part in (READY[:cut], READY[cut:]):
        if part:
            pair.target.hears(part)
            assert pair.target.end.at_message_boundary is (part.endswith(b"I"))


@pytest.mark.parametrize("size", [0, -1])
def test_a_buffer_holds_something(size: int) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        ForwardBuffer(size)
