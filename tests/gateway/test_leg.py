"""One side of a session while it logs in, with its transport driven by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from pgauthproxy import _wire
from pgauthproxy.errors import ClientFault, Fault, GatewayFault, TargetFault
from pgauthproxy.gateway.client_leg import ClientLeg
from pgauthproxy.gateway.leg import MAX_PENDING, Leg
from pgauthproxy.gateway.target_leg import TargetLeg
from pgauthproxy.proto import messages
from pgauthproxy.proto.steps import DeriveKey, Login, next_message
from pgauthproxy.proto.target_login import target_login
from pgauthproxy.secret import Secret
from tests.gateway.legs import (
    CLIENT_MEANS,
    CLIENT_SENDS,
    GRANTED,
    PASSWORD,
    POLICY,
    QUERY,
    SECONDS,
    STARTED,
    TARGET_MEANS,
    TARGET_SENDS,
    ConnectLeg,
    Watcher,
    both_ends,
    one_message,
    terms,
    until_it_waits,
)
from tests.sans_io import chunkings


@pytest.mark.parametrize("chunks", chunkings(PASSWORD), ids=len)
def test_a_login_is_pumped_in_every_chunking(connect_leg: ConnectLeg, chunks: list[bytes]) -> None:
    async def scenario() -> None:
        side = connect_leg()
        driven = asyncio.create_task(side.leg.drive(one_message(side.leg.framer)))
        for chunk in chunks:
            await until_it_waits()
            assert side.transport.written == b"question"
            assert not driven.done()
            side.receive(chunk)
        assert await driven == b"secret\0"
        assert side.transport.written == b"questionthanks"

    asyncio.run(scenario())


def test_what_came_early_is_read_without_waiting(connect_leg: ConnectLeg) -> None:
    async def scenario() -> None:
        side = connect_leg()
        side.receive(PASSWORD + QUERY)
        assert await side.leg.drive(one_message(side.leg.framer)) == b"secret\0"
        assert side.leg.framer.take_rest() == QUERY

    asyncio.run(scenario())


@pytest.mark.parametrize(("kind", "fault"), [(ClientLeg, ClientFault), (TargetLeg, TargetFault)])
@pytest.mark.parametrize("lost", [None, ConnectionResetError(104, "Connection reset by peer")])
@pytest.mark.parametrize("received", [b"", PASSWORD[:4]])
def test_a_peer_that_goes_in_the_middle_ends_its_login(
    connect_leg: ConnectLeg, kind: type[Leg], fault: type[Fault], lost: Exception | None, received: bytes
) -> None:
    async def scenario(end: Callable[[Leg], object]) -> None:
        side = connect_leg(kind)
        driven = asyncio.create_task(side.leg.drive(one_message(side.leg.framer)))
        await until_it_waits()
        side.receive(received)
        await until_it_waits()
        end(side.leg)
        with pytest.raises(fault):
            await driven

    asyncio.run(scenario(lambda leg: leg.connection_lost(lost)))
    asyncio.run(scenario(lambda leg: leg.eof_received()))


def test_a_client_that_is_gone_is_told_nothing_and_a_target_is_told_of(connect_leg: ConnectLeg) -> None:
    fault = connect_leg(ClientLeg).leg.gone_fault()
    assert (fault.told, fault.sqlstate) == (None, "08P01")
    target = connect_leg(TargetLeg).leg
    assert target.gone_fault().detail == "target closed the connection during the login: end of file"
    target.connection_lost(ConnectionResetError("reset"))
    assert target.gone_fault().detail == "target closed the connection during the login: reset"
    assert target.gone_fault().sqlstate == "08006"


def test_what_was_sent_before_the_end_of_file_still_counts(connect_leg: ConnectLeg) -> None:
    async def scenario() -> None:
        side = connect_leg()
        side.receive(PASSWORD + QUERY)
        assert side.leg.eof_received() is True
        assert not side.leg.gone
        assert await side.leg.drive(one_message(side.leg.framer)) == b"secret\0"
        assert side.leg.hand_over() == (side.transport, QUERY, True)

    asyncio.run(scenario())


def test_a_peer_that_sends_too_much_too_early_is_not_read_until_it_is_asked(connect_leg: ConnectLeg) -> None:
    async def scenario() -> None:
        side = connect_leg()
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


def test_a_login_that_is_cancelled_can_be_followed_by_another(connect_leg: ConnectLeg) -> None:
    async def scenario() -> None:
        side = connect_leg()
        driven = asyncio.create_task(side.leg.drive(one_message(side.leg.framer)))
        await until_it_waits()
        driven.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driven
        side.receive(PASSWORD)
        assert await side.leg.drive(one_message(side.leg.framer)) == b"secret\0"

    asyncio.run(scenario())


def test_a_key_is_derived_by_whoever_can_and_handed_back(connect_leg: ConnectLeg) -> None:
    def deriving() -> Login[bytes]:
        answer: bytes = yield DeriveKey(Secret(b"secret"), b"salt", 7)
        assert answer
        yield b"after the key"
        return answer

    async def derive(step: DeriveKey) -> bytes:
        return step.password.reveal() + step.salt + b"%d" % step.iterations

    async def scenario() -> None:
        side = connect_leg(TargetLeg)
        assert await side.leg.drive(deriving(), derive) == b"secretsalt7"
        assert side.transport.written == b"after the key"

    asyncio.run(scenario())


@both_ends
def test_a_watcher_is_called_once_when_the_peer_is_gone(connect_leg: ConnectLeg, end: Callable[[Leg], object]) -> None:
    leg, watcher = connect_leg().leg, Watcher()
    leg.watch(watcher)
    assert watcher.calls == 0
    end(leg)
    assert watcher.calls == 1
    leg.connection_lost(None)
    assert watcher.calls == 1


@both_ends
def test_a_watcher_is_called_at_once_if_the_peer_is_gone_already(
    connect_leg: ConnectLeg, end: Callable[[Leg], object]
) -> None:
    leg, watcher = connect_leg().leg, Watcher()
    end(leg)
    leg.watch(watcher)
    assert watcher.calls == 1


def test_a_peer_that_has_closed_its_sending_side_is_not_gone_while_its_last_words_wait(connect_leg: ConnectLeg) -> None:
    side, watcher = connect_leg(), Watcher()
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
def test_a_watcher_is_not_called_once_it_is_taken_away(connect_leg: ConnectLeg, stop: Callable[[Leg], object]) -> None:
    leg, watcher = connect_leg().leg, Watcher()
    leg.watch(watcher)
    stop(leg)
    leg.eof_received()
    leg.connection_lost(None)
    assert watcher.calls == 0


@pytest.mark.parametrize("rest", [b"", QUERY, bytes(MAX_PENDING + 1)], ids=len)
@pytest.mark.parametrize("at_eof", [False, True])
def test_a_leg_hands_over_what_nobody_has_read(connect_leg: ConnectLeg, rest: bytes, *, at_eof: bool) -> None:
    side = connect_leg()
    side.receive(rest)
    if at_eof:
        side.leg.eof_received()
    assert side.leg.hand_over() == (side.transport, rest, at_eof)
    assert side.leg.framer.pending == 0


@pytest.mark.parametrize(("kind", "fault"), [(ClientLeg, ClientFault), (TargetLeg, TargetFault)])
def test_a_transport_that_is_lost_or_never_stood_is_not_handed_over(
    connect_leg: ConnectLeg, kind: type[Leg], fault: type[Fault]
) -> None:
    lost = connect_leg(kind)
    lost.receive(QUERY)
    lost.leg.connection_lost(None)
    for side in (lost, connect_leg(kind, opened=False)):
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
def test_a_refused_client_is_told_what_it_may_know_and_closed(
    connect_leg: ConnectLeg, fault: Fault, written: bytes
) -> None:
    side = connect_leg()
    leg = side.leg
    assert isinstance(leg, ClientLeg)
    leg.refuse(fault)
    assert side.transport.written == written
    assert side.transport.calls[-1] == "close"


@both_ends
def test_a_client_that_is_gone_is_told_nothing(connect_leg: ConnectLeg, end: Callable[[Leg], object]) -> None:
    side = connect_leg()
    end(side.leg)
    leg = side.leg
    assert isinstance(leg, ClientLeg)
    leg.refuse(GatewayFault("53300", "sorry"))
    assert side.transport.written == b""
    assert side.transport.calls == ["close"]


def test_before_its_transport_stands_a_leg_says_what_it_has_to_say_by_itself(connect_leg: ConnectLeg) -> None:
    side = connect_leg(opened=False)
    side.leg.send(b"one ")
    side.leg.send(b"two")
    assert side.peer.recv(100) == b"one two"
    side.leg.close()
    assert side.peer.recv(100) == b""


def test_a_peer_that_is_gone_before_its_transport_stands_raises_nothing(connect_leg: ConnectLeg) -> None:
    side = connect_leg(opened=False)
    side.peer.close()
    side.leg.send(b"to nobody")
    side.leg.abort()
    assert side.socket.fileno() == -1


def test_what_a_full_socket_does_not_take_is_sent_in_order_once_its_transport_stands(connect_leg: ConnectLeg) -> None:
    async def scenario() -> None:
        side = connect_leg(opened=False)
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
def test_what_a_peer_says_before_or_behind_the_opening_is_the_same_to_a_login(
    connect_leg: ConnectLeg, early: bytes
) -> None:
    async def scenario() -> None:
        side = connect_leg(opened=False)
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
def test_a_leg_can_wait_for_nothing_but_its_peers_end(connect_leg: ConnectLeg, say: bytes) -> None:
    async def scenario() -> None:
        side = connect_leg(TargetLeg, opened=False)
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


def test_a_leg_is_closed_or_aborted_by_its_transport(connect_leg: ConnectLeg) -> None:
    closed, aborted = connect_leg(), connect_leg()
    closed.leg.close()
    aborted.leg.abort()
    assert closed.transport.calls == ["close"]
    assert aborted.transport.calls == ["abort"]


async def log_in_client(leg: Leg) -> object:
    assert isinstance(leg, ClientLeg)
    return await leg.receive_startup(POLICY, None, local=False), await leg.receive_password(STARTED, POLICY)


async def log_in_at_target(leg: Leg) -> object:
    return await leg.drive(target_login(leg.framer, GRANTED, terms(None)))


@pytest.mark.parametrize(
    ("kind", "log_in", "sent", "meant"),
    [(ClientLeg, log_in_client, CLIENT_SENDS, CLIENT_MEANS), (TargetLeg, log_in_at_target, TARGET_SENDS, TARGET_MEANS)],
    ids=["client", "target"],
)
def test_wherever_what_a_peer_sends_is_cut_nothing_is_lost(
    connect_leg: ConnectLeg,
    kind: type[Leg],
    log_in: Callable[[Leg], Coroutine[Any, Any, object]],
    sent: bytes,
    meant: object,
) -> None:
    async def scenario(cut: int) -> None:
        side = connect_leg(kind)
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
