"""One side of a session while it logs in, with its transport driven by hand."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from pgauthproxy import _wire
from pgauthproxy._relay import ForwardBuffer
from pgauthproxy.errors import ClientFault, Fault, GatewayFault, TargetFault
from pgauthproxy.gateway.client_leg import ClientLeg, ClientPolicy
from pgauthproxy.gateway.leg import MAX_PENDING, Leg
from pgauthproxy.gateway.target_leg import TargetLeg
from pgauthproxy.proto import messages
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.startup import StartupMessage
from pgauthproxy.proto.steps import DeriveKey, Login, next_message
from pgauthproxy.proto.target_login import TargetLimits, target_login
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Greeting, Mapping, Started
from tests.gateway.transports import RecordingTransport
from tests.sans_io import chunkings

BUFFER, SECONDS = 4096, 20
QUERY = b"Q\0\0\0\x0dselect 1\0"
PASSWORD = _wire.message(messages.PASSWORD_MESSAGE, b"secret\0")
POLICY = ClientPolicy(method="cleartext", max_startup_packet=10_000, max_password_message=65_535)
STARTED = Started(Accepted("1", "192.0.2.1:1"), ((b"user", b"alice"),))


class Side:
    """A leg whose transport is driven by hand; `socket` is its own, `peer` whom that is connected to."""

    def __init__(self, kind: type[Leg]) -> None:
        self.socket, self.peer = socket.socketpair()
        for each in (self.socket, self.peer):
            each.setblocking(False)
        self.leg = kind(self.socket, ForwardBuffer(BUFFER))
        self.transport = RecordingTransport()

    def receive(self, data: bytes) -> None:
        """As an event loop does: reads into the leg's buffer, and says how much came."""
        for at in range(0, len(data), BUFFER):
            part = data[at : at + BUFFER]
            self.leg.get_buffer(-1)[: len(part)] = part
            self.leg.buffer_updated(len(part))
            # The buffer is shared: another session's bytes come into it.
            self.leg.get_buffer(-1)[:] = b"\xee" * BUFFER


Connect = Callable[..., Side]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes legs whose transport stands, or, with `opened=False`, does not yet."""
    made: list[Side] = []

    def make(kind: type[Leg] = ClientLeg, *, opened: bool = True) -> Side:
        made.append(Side(kind))
        if opened:
            made[-1].leg.connection_made(made[-1].transport)
        return made[-1]

    yield make
    for side in made:
        side.socket.close()
        side.peer.close()


async def until_it_waits() -> None:
    """Lets everything run that can run without anything more from outside."""
    for _ in range(5):
        await asyncio.sleep(0)


def one_message(framer: _wire.Framer) -> Login[bytes]:
    """A login of one message, answered."""
    framer.allow({messages.PASSWORD_MESSAGE: 1000})
    yield b"question"
    _, body = yield from next_message(framer)
    yield b"thanks"
    return body


@pytest.mark.parametrize("chunks", chunkings(PASSWORD), ids=len)
def test_a_login_is_pumped_in_every_chunking(connect: Connect, chunks: list[bytes]) -> None:
    async def scenario() -> None:
        side = connect()
        driven = asyncio.create_task(side.leg.drive(one_message(side.leg.framer)))
        for chunk in chunks:
            await until_it_waits()
            assert side.transport.written == b"question"
            assert not driven.done()
            side.receive(chunk)
        assert await driven == b"secret\0"
        assert side.transport.written == b"questionthanks"

    asyncio.run(scenario())


def test_what_came_early_is_read_without_waiting(connect: Connect) -> None:
    async def scenario() -> None:
        side = connect()
        side.receive(PASSWORD + QUERY)
        assert await side.leg.drive(one_message(side.leg.framer)) == b"secret\0"
        assert side.leg.framer.take_rest() == QUERY

    asyncio.run(scenario())


@pytest.mark.parametrize(("kind", "fault"), [(ClientLeg, ClientFault), (TargetLeg, TargetFault)])
@pytest.mark.parametrize("lost", [None, ConnectionResetError(104, "Connection reset by peer")])
@pytest.mark.parametrize("received", [b"", PASSWORD[:4]])
def test_a_peer_that_goes_in_the_middle_ends_its_login(
    connect: Connect, kind: type[Leg], fault: type[Fault], lost: Exception | None, received: bytes
) -> None:
    async def scenario(end: Callable[[Leg], object]) -> None:
        side = connect(kind)
        driven = asyncio.create_task(side.leg.drive(one_message(side.leg.framer)))
        await until_it_waits()
        side.receive(received)
        await until_it_waits()
        end(side.leg)
        with pytest.raises(fault):
            await driven

    asyncio.run(scenario(lambda leg: leg.connection_lost(lost)))
    asyncio.run(scenario(lambda leg: leg.eof_received()))


def test_a_client_that_is_gone_is_told_nothing_and_a_target_is_told_of(connect: Connect) -> None:
    fault = connect(ClientLeg).leg.gone_fault()
    assert (fault.told, fault.sqlstate) == (None, "08P01")
    target = connect(TargetLeg).leg
    assert target.gone_fault().detail == "target closed the connection during the login: end of file"
    target.connection_lost(ConnectionResetError("reset"))
    assert target.gone_fault().detail == "target closed the connection during the login: reset"
    assert target.gone_fault().sqlstate == "08006"


def test_what_was_sent_before_the_end_of_file_still_counts(connect: Connect) -> None:
    async def scenario() -> None:
        side = connect()
        side.receive(PASSWORD + QUERY)
        assert side.leg.eof_received() is True
        assert not side.leg.gone
        assert await side.leg.drive(one_message(side.leg.framer)) == b"secret\0"
        assert side.leg.hand_over() == (side.transport, QUERY, True)

    asyncio.run(scenario())


def test_a_peer_that_sends_too_much_too_early_is_not_read_until_it_is_asked(connect: Connect) -> None:
    async def scenario() -> None:
        side = connect()
        side.receive(bytes(MAX_PENDING))
        assert side.transport.reading
        side.receive(b"x")
        assert not side.transport.reading
        side.leg.framer.take_rest()
        driven = asyncio.create_task(side.leg.drive(one_message(side.leg.framer)))
        await until_it_waits()
        assert side.transport.reading
        side.receive(PASSWORD)
        await driven

    asyncio.run(scenario())


def test_a_login_that_is_cancelled_can_be_followed_by_another(connect: Connect) -> None:
    async def scenario() -> None:
        side = connect()
        driven = asyncio.create_task(side.leg.drive(one_message(side.leg.framer)))
        await until_it_waits()
        driven.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driven
        side.receive(PASSWORD)
        assert await side.leg.drive(one_message(side.leg.framer)) == b"secret\0"

    asyncio.run(scenario())


def test_a_key_is_derived_by_whoever_can_and_handed_back(connect: Connect) -> None:
    def deriving() -> Login[bytes]:
        answer = yield DeriveKey(Secret(b"secret"), b"salt", 7)
        assert answer is not None
        yield b"after the key"
        return answer

    async def derive(step: DeriveKey) -> bytes:
        return step.password.reveal() + step.salt + b"%d" % step.iterations

    async def scenario() -> None:
        side = connect(TargetLeg)
        assert await side.leg.drive(deriving(), derive) == b"secretsalt7"
        assert side.transport.written == b"after the key"

    asyncio.run(scenario())


class Watcher:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


both_ends = pytest.mark.parametrize(
    "end", [lambda leg: leg.eof_received(), lambda leg: leg.connection_lost(None)], ids=["end of file", "lost"]
)


@both_ends
def test_a_watcher_is_called_once_when_the_peer_is_gone(connect: Connect, end: Callable[[Leg], object]) -> None:
    leg, watcher = connect().leg, Watcher()
    leg.watch(watcher)
    assert watcher.calls == 0
    end(leg)
    assert watcher.calls == 1
    leg.connection_lost(None)
    assert watcher.calls == 1


@both_ends
def test_a_watcher_is_called_at_once_if_the_peer_is_gone_already(
    connect: Connect, end: Callable[[Leg], object]
) -> None:
    leg, watcher = connect().leg, Watcher()
    end(leg)
    leg.watch(watcher)
    assert watcher.calls == 1


def test_a_peer_that_has_closed_its_sending_side_is_not_gone_while_its_last_words_wait(connect: Connect) -> None:
    side, watcher = connect(), Watcher()
    side.receive(QUERY)
    side.leg.watch(watcher)
    side.leg.eof_received()
    assert watcher.calls == 0
    side.leg.connection_lost(None)
    assert watcher.calls == 1


@pytest.mark.parametrize(
    "stop",
    [lambda leg: leg.watch(None), lambda leg: leg.hand_over(), lambda leg: leg.close(), lambda leg: leg.abort()],
    ids=["taken away", "handed over", "closed", "aborted"],
)
def test_a_watcher_is_not_called_once_it_is_taken_away(connect: Connect, stop: Callable[[Leg], object]) -> None:
    leg, watcher = connect().leg, Watcher()
    leg.watch(watcher)
    stop(leg)
    leg.eof_received()
    leg.connection_lost(None)
    assert watcher.calls == 0


@pytest.mark.parametrize("rest", [b"", QUERY, bytes(MAX_PENDING + 1)], ids=len)
@pytest.mark.parametrize("at_eof", [False, True])
def test_a_leg_hands_over_what_nobody_has_read(connect: Connect, rest: bytes, *, at_eof: bool) -> None:
    side = connect()
    side.receive(rest)
    if at_eof:
        side.leg.eof_received()
    assert side.leg.hand_over() == (side.transport, rest, at_eof)
    assert side.leg.framer.pending == 0


@pytest.mark.parametrize(("kind", "fault"), [(ClientLeg, ClientFault), (TargetLeg, TargetFault)])
def test_a_transport_that_is_lost_or_never_stood_is_not_handed_over(
    connect: Connect, kind: type[Leg], fault: type[Fault]
) -> None:
    lost = connect(kind)
    lost.receive(QUERY)
    lost.leg.connection_lost(None)
    for side in (lost, connect(kind, opened=False)):
        with pytest.raises(fault):
            side.leg.hand_over()
        assert side.transport.calls == []


@pytest.mark.parametrize(
    ("fault", "written"),
    [
        (GatewayFault("53300", "sorry"), messages.fatal("53300", b"sorry")),
        (ClientFault("08P01", None, "for the log"), b""),
    ],
    ids=["told", "silent"],
)
def test_a_refused_client_is_told_what_it_may_know_and_closed(connect: Connect, fault: Fault, written: bytes) -> None:
    side = connect()
    leg = side.leg
    assert isinstance(leg, ClientLeg)
    leg.refuse(fault)
    assert side.transport.written == written
    assert side.transport.calls[-1] == "close"


@both_ends
def test_a_client_that_is_gone_is_told_nothing(connect: Connect, end: Callable[[Leg], object]) -> None:
    side = connect()
    end(side.leg)
    leg = side.leg
    assert isinstance(leg, ClientLeg)
    leg.refuse(GatewayFault("53300", "sorry"))
    assert side.transport.written == b""
    assert side.transport.calls == ["close"]


def test_before_its_transport_stands_a_leg_says_what_it_has_to_say_by_itself(connect: Connect) -> None:
    side = connect(opened=False)
    side.leg.send(b"one ")
    side.leg.send(b"two")
    assert side.peer.recv(100) == b"one two"
    side.leg.close()
    assert side.peer.recv(100) == b""


def test_a_peer_that_is_gone_before_its_transport_stands_raises_nothing(connect: Connect) -> None:
    side = connect(opened=False)
    side.peer.close()
    side.leg.send(b"to nobody")
    side.leg.abort()
    assert side.socket.fileno() == -1


def test_what_a_full_socket_does_not_take_is_sent_in_order_once_its_transport_stands(connect: Connect) -> None:
    async def scenario() -> None:
        side = connect(opened=False)
        sent = b""
        for number in range(40):
            piece = bytes([number]) * 100_000
            side.leg.send(piece)
            sent += piece
        driven = asyncio.create_task(side.leg.drive(one_message(side.leg.framer)))
        received = b""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(SECONDS):
            while len(received) < len(sent + b"question"):
                received += await loop.sock_recv(side.peer, 1 << 20)
            assert received == sent + b"question"
            await loop.sock_sendall(side.peer, PASSWORD)
            assert await driven == b"secret\0"
            assert await loop.sock_recv(side.peer, 100) == b"thanks"
        side.leg.close()
        await until_it_waits()

    uvloop.run(scenario())


def one_query(framer: _wire.Framer) -> Login[tuple[int, bytes]]:
    framer.allow({ord("Q"): 100})
    return (yield from next_message(framer))


@pytest.mark.parametrize("early", [b"", PASSWORD[:3], PASSWORD, PASSWORD + QUERY])
def test_what_a_peer_says_before_or_behind_the_opening_is_the_same_to_a_login(connect: Connect, early: bytes) -> None:
    async def scenario() -> None:
        side = connect(opened=False)
        loop = asyncio.get_running_loop()
        side.peer.send(early)
        async with asyncio.timeout(SECONDS):
            driven = asyncio.create_task(side.leg.drive(one_message(side.leg.framer)))
            assert await loop.sock_recv(side.peer, 100) == b"question"
            await loop.sock_sendall(side.peer, (PASSWORD + QUERY)[len(early) :])
            assert await driven == b"secret\0"
            assert await side.leg.drive(one_query(side.leg.framer)) == (ord("Q"), QUERY[5:])
        transport, rest, at_eof = side.leg.hand_over()
        assert (rest, at_eof) == (b"", False)
        transport.close()
        await until_it_waits()

    uvloop.run(scenario())


@pytest.mark.parametrize("say", [b"", b"anything"])
def test_a_leg_can_wait_for_nothing_but_its_peers_end(connect: Connect, say: bytes) -> None:
    async def scenario() -> None:
        side = connect(TargetLeg, opened=False)
        waiting = asyncio.create_task(side.leg.until_gone())
        await until_it_waits()
        side.peer.send(say)
        assert not waiting.done()
        side.peer.close()
        async with asyncio.timeout(SECONDS):
            await waiting
        assert side.leg.framer.pending == 0
        side.leg.abort()
        await until_it_waits()

    uvloop.run(scenario())


def test_a_leg_is_closed_or_aborted_by_its_transport(connect: Connect) -> None:
    closed, aborted = connect(), connect()
    closed.leg.close()
    aborted.leg.abort()
    assert closed.transport.calls == ["close"]
    assert aborted.transport.calls == ["abort"]


async def log_in_client(leg: Leg) -> object:
    assert isinstance(leg, ClientLeg)
    return await leg.receive_startup(POLICY), await leg.receive_proof(STARTED, POLICY)


async def log_in_at_target(leg: Leg) -> object:
    mapping = Mapping((Address("db", 5432),), STARTED.parameters, None)
    limits = TargetLimits(auth_request=2000, error=30_000, message=65_536, scram_iterations=1)
    return await leg.drive(target_login(leg.framer, mapping, limits, private_channel=True, pass_error_text=False))


STATUS = _wire.message(messages.PARAMETER_STATUS, b"TimeZone\0UTC\0")
READY = _wire.message(messages.READY_FOR_QUERY, b"I")
CLIENT_SENDS = messages.startup_message(STARTED.parameters) + PASSWORD
CLIENT_MEANS = (StartupMessage(STARTED.parameters), Proof("cleartext", Secret(b"secret"), bytes(4)))
TARGET_SENDS = messages.authentication(messages.AUTH_OK) + STATUS + READY
TARGET_MEANS = Greeting(b"", b"", STATUS + READY)


@pytest.mark.parametrize(
    ("kind", "log_in", "sent", "meant"),
    [(ClientLeg, log_in_client, CLIENT_SENDS, CLIENT_MEANS), (TargetLeg, log_in_at_target, TARGET_SENDS, TARGET_MEANS)],
    ids=["client", "target"],
)
def test_wherever_what_a_peer_sends_is_cut_nothing_is_lost(
    connect: Connect, kind: type[Leg], log_in: Callable[[Leg], Coroutine[Any, Any, object]], sent: bytes, meant: object
) -> None:
    async def scenario(cut: int) -> None:
        side = connect(kind)
        login = asyncio.create_task(log_in(side.leg))
        stream = sent + QUERY
        handed_over = b""
        for part in (stream[:cut], stream[cut:]):
            await until_it_waits()
            if login.done():
                # What comes from here on goes to the next protocol.
                handed_over = side.leg.hand_over()[1] + part
            else:
                side.receive(part)
        assert await login == meant
        assert (handed_over or side.leg.hand_over()[1]) == QUERY

    async def scenarios() -> None:
        for cut in range(len(sent + QUERY) + 1):
            await scenario(cut)

    asyncio.run(scenarios())
