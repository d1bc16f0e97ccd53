"""Forwarding on uvloop, by the compiled ends and by plain-Python ones: the same bytes, and how long they take.

    pytest benchmarks/test_forwarding.py --benchmark-enable --benchmark-group-by=group

Client, target and the two ends between them share one event loop and talk over loopback TCP or socket pairs. What is
measured holds the peers' own work too, the same for both; compare.py measures the gateway alone, from outside.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from types import ModuleType
from typing import Any, TypeVar, cast

import pytest
import uvloop
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import reference
from pgauthproxy import _relay
from pgauthproxy._observe import Observer

T = TypeVar("T")
SECONDS = 30
BUFFER_BYTES = 65_536
EXCHANGES = 100
CHUNKS = 256
"""16 MB in all."""


def message(kind: bytes, size: int) -> bytes:
    """A message of so many bytes."""
    return kind + (size - 1).to_bytes(4) + bytes(number % 256 for number in range(size - 5))


QUESTION = message(b"Q", 100)
ANSWER = message(b"T", 80) + message(b"D", 100) + message(b"C", 14) + b"Z\0\0\0\x05I"
CHUNK = message(b"d", 256) * 256


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
    return one, other


class Peer(asyncio.Protocol):
    """A client or a target: sends with back-pressure, counts what it gets, and keeps it if `keeps`."""

    keeps = False

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.kept = bytearray()
        self.received = 0
        self.ended = asyncio.get_running_loop().create_future()
        self._expected = 0
        self._arrived: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface without the class.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.keeps:
            self.kept += data
        if self._arrived is not None and self.received >= self._expected and not self._arrived.done():
            self._arrived.set_result(None)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def eof_received(self) -> bool:
        self._end()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._writable.set()
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    @property
    def can_write(self) -> bool:
        return self._writable.is_set()

    async def pour(self, chunk: bytes, times: int) -> None:
        for _ in range(times):
            await self._writable.wait()
            self.transport.write(chunk)

    async def receive(self, count: int) -> None:
        """Returns once this many bytes more have come."""
        self._expected = self.received + count
        self._arrived = asyncio.get_running_loop().create_future()
        await self._arrived


class KeepingPeer(Peer):
    keeps = True


class Asking(Peer):
    """A client that sends a question when the last one is answered."""

    def ask(self, times: int) -> asyncio.Future[None]:
        self._left = times
        self._missing = len(ANSWER)
        self._arrived = asyncio.get_running_loop().create_future()
        self.transport.write(QUESTION)
        return self._arrived

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        if self._missing == 0:
            self._left -= 1
            self._missing = len(ANSWER)
            if self._left:
                self.transport.write(QUESTION)
            elif self._arrived is not None:
                self._arrived.set_result(None)


class Answering(Peer):
    """A target that answers each question."""

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        while self.received >= len(QUESTION):
            self.received -= len(QUESTION)
            self.transport.write(ANSWER)


class Paused(asyncio.Protocol):
    """Whom a transport belongs to until it is handed over."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).pause_reading()


class Forwarded:
    """A session as the gateway has it: two ends, and the peers beyond them."""

    def __init__(self) -> None:
        self.client: Any
        self.target: Any
        self.client_end: Any
        self.target_end: Any
        self._lost = 0
        self._over = asyncio.Event()

    async def connect(
        self,
        relay: Any,
        pair: Callable[[], tuple[socket.socket, socket.socket]],
        client: type[Peer],
        target: type[Peer],
    ) -> None:
        buffer = _relay.ForwardBuffer(BUFFER_BYTES)
        self.client, self.client_end = await self._connect(relay, pair, client, False, buffer)
        self.target, self.target_end = await self._connect(relay, pair, target, True, buffer)
        relay.join(self.client_end, self.target_end)
        self.target_end.start(b"", False)
        self.client_end.start(b"", False)

    async def _connect(
        self,
        relay: Any,
        pair: Callable[[], tuple[socket.socket, socket.socket]],
        kind: type[Peer],
        faces_target: bool,
        buffer: _relay.ForwardBuffer,
    ) -> tuple[Peer, Any]:
        loop = asyncio.get_running_loop()
        theirs, ours = pair()
        for one in (theirs, ours):
            one.setblocking(False)
        _, peer = await loop.connect_accepted_socket(kind, theirs)
        transport, _ = await loop.connect_accepted_socket(Paused, ours)
        return peer, relay.End(self, transport, ours.fileno(), faces_target, buffer)

    def target_finished(self) -> None:
        self.close()

    def end_lost(self, end: object, error: Exception | None) -> None:
        self._lost += 1
        self.close()
        if self._lost == 2:
            self._over.set()

    def close(self) -> None:
        for end in (self.client_end, self.target_end):
            end.transport.close()

    async def end(self) -> None:
        """Returns once both connections are gone, from whichever side."""
        self.client.transport.close()
        self.target.transport.close()
        await self._over.wait()


class Bench:
    """An event loop with one session on it. An exception that nobody handles fails."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._unhandled: list[dict[str, Any]] = []
        self._loop.set_exception_handler(lambda _loop, context: self._unhandled.append(context))
        self._session: Forwarded | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, SECONDS))

    def session(
        self,
        relay: Any,
        client: type[Peer] = Peer,
        target: type[Peer] = Peer,
        pair: Callable[[], tuple[socket.socket, socket.socket]] = tcp_pair,
    ) -> Forwarded:
        self._session = Forwarded()
        self.run(self._session.connect(relay, pair, client, target))
        return self._session

    def close(self) -> None:
        if self._session is not None:
            self.run(self._session.end())
        self._loop.close()
        assert self._unhandled == []


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


class ObservedRelay:
    """Compiled ends that are followed, as in sessions with rules; with audited statements the client's alone."""

    join = staticmethod(_relay.join)

    def __init__(self, *, statements: bool) -> None:
        self.statements = 0
        self._audits = statements
        self._observer: Observer

    def End(
        self, session: Any, transport: asyncio.Transport, fd: int, faces_target: bool, buffer: _relay.ForwardBuffer
    ) -> _relay.End:
        if not faces_target:
            self._observer = Observer(self._count, 65_536) if self._audits else Observer()
        elif self._audits:
            return _relay.End(session, transport, fd, faces_target, buffer)
        return _relay.ObservedEnd(session, transport, fd, faces_target, buffer, None, self._observer)

    def _count(self, _is_prepared: bool, _text: bytes, _size: int) -> None:
        self.statements += 1


both = pytest.mark.parametrize("relay", [_relay, reference], ids=["compiled", "python"])
each = pytest.mark.parametrize(
    "relay",
    [_relay, ObservedRelay(statements=False), ObservedRelay(statements=True), reference],
    ids=["compiled", "with rules", "with statements", "python"],
)
over_either = pytest.mark.parametrize("pair", [tcp_pair, socket.socketpair], ids=["tcp", "unix"])


@both
@over_either
def test_both_carry_the_same_bytes_both_ways_at_once(bench: Bench, relay: ModuleType, pair: Any) -> None:
    session = bench.session(relay, KeepingPeer, KeepingPeer, pair)
    up, down = CHUNK, CHUNK[::-1]

    async def work() -> None:
        await asyncio.gather(
            session.target.receive(50 * len(up)),
            session.client.receive(50 * len(down)),
            session.client.pour(up, 50),
            session.target.pour(down, 50),
        )

    bench.run(work())
    assert session.target.kept == up * 50
    assert session.client.kept == down * 50
    assert (session.client_end.received, session.target_end.received) == (50 * len(up), 50 * len(down))


@both
@over_either
def test_both_hold_back_a_sender_whose_reader_has_stopped(bench: Bench, relay: ModuleType, pair: Any) -> None:
    session = bench.session(relay, KeepingPeer, KeepingPeer, pair)

    async def work() -> int:
        session.client.transport.pause_reading()
        pouring = asyncio.create_task(session.target.pour(CHUNK, 1000))
        # The sender is held back once the sockets on the way are full.
        while session.target.can_write or not session.client_end.holding:  # noqa: ASYNC110 (two states, no event)
            await asyncio.sleep(0)
        held: int = session.client_end.transport.get_write_buffer_size()
        session.client.transport.resume_reading()
        await session.client.receive(1000 * len(CHUNK) - session.client.received)
        await pouring
        return held

    assert 0 < bench.run(work()) <= BUFFER_BYTES
    assert session.client.kept == CHUNK * 1000


@both
def test_both_pass_a_half_close_on_and_leave_the_way_back_open(bench: Bench, relay: ModuleType) -> None:
    session = bench.session(relay, KeepingPeer, KeepingPeer)

    async def work() -> None:
        session.client.transport.write(b"the last question")
        session.client.transport.write_eof()
        await session.target.ended
        session.target.transport.write(b"its answer")
        await session.client.receive(len(b"its answer"))
        session.target.transport.close()
        await session.client.ended

    bench.run(work())
    assert session.target.kept == b"the last question"
    assert session.client.kept == b"its answer"
    assert session.client_end.has_finished


@both
@pytest.mark.parametrize("who", ["client", "target"])
def test_both_end_a_session_whose_peer_aborts(bench: Bench, relay: ModuleType, who: str) -> None:
    session = bench.session(relay)

    async def work() -> None:
        getattr(session, who).transport.abort()
        other = session.target if who == "client" else session.client
        await other.ended

    bench.run(work())
    assert getattr(session, "target" if who == "client" else "client").ended.done()


@both
def test_both_know_a_message_boundary(bench: Bench, relay: ModuleType) -> None:
    session = bench.session(relay)

    async def work() -> list[bool]:
        seen = [session.target_end.at_message_boundary]
        for part in (b"C\0\0\0\x0dSELECT 1\0", b"Z\0\0", b"\0\x05I"):
            received = session.client.receive(len(part))
            session.target.transport.write(part)
            await received
            seen.append(session.target_end.at_message_boundary)
        return seen

    assert bench.run(work()) == [True, False, False, True]


def test_statements_are_found_where_they_are_audited(bench: Bench) -> None:
    relay = ObservedRelay(statements=True)
    session = bench.session(relay, Asking, Answering)

    async def work() -> None:
        await session.client.ask(EXCHANGES)

    bench.run(work())
    assert relay.statements == EXCHANGES


@each
@pytest.mark.benchmark(group="forwarding: 100 questions of 100 bytes, each with an answer of 200")
def test_exchanging(benchmark: BenchmarkFixture, bench: Bench, relay: Any) -> None:
    session = bench.session(relay, Asking, Answering)

    async def work() -> None:
        await session.client.ask(EXCHANGES)

    benchmark(lambda: bench.run(work()))
    assert session.client_end.received % (EXCHANGES * len(QUESTION)) == 0
    assert session.target_end.received == 2 * session.client_end.received


@each
@pytest.mark.parametrize("way", ["to the client", "to the target"])
def test_pouring(benchmark: BenchmarkFixture, bench: Bench, relay: Any, way: str) -> None:
    session = bench.session(relay)
    sender, reader = (session.target, session.client) if way == "to the client" else (session.client, session.target)
    benchmark.group = f"forwarding: 16 MB {way}"

    async def work() -> None:
        await asyncio.gather(reader.receive(CHUNKS * len(CHUNK)), sender.pour(CHUNK, CHUNKS))

    benchmark(lambda: bench.run(work()))
    assert reader.received % (CHUNKS * len(CHUNK)) == 0
