"""One side of a session while it logs in, with its transport driven by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pgauthproxy import _wire
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

QUERY = b"Q\0\0\0\x0dselect 1\0"
PASSWORD = _wire.message(messages.PASSWORD_MESSAGE, b"secret\0")
POLICY = ClientPolicy(method="cleartext", max_startup_packet=10_000, max_password_message=65_535)
STARTED = Started(Accepted("1", "192.0.2.1:1"), ((b"user", b"alice"),))


def connected(leg: Leg) -> RecordingTransport:
    transport = RecordingTransport()
    leg.connection_made(transport)
    return transport


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
def test_a_login_is_pumped_in_every_chunking(chunks: list[bytes]) -> None:
    async def scenario() -> None:
        leg = ClientLeg()
        transport = connected(leg)
        driven = asyncio.create_task(leg.drive(one_message(leg.framer)))
        for chunk in chunks:
            await until_it_waits()
            assert transport.written == b"question"
            assert not driven.done()
            leg.data_received(chunk)
        assert await driven == b"secret\0"
        assert transport.written == b"questionthanks"

    asyncio.run(scenario())


def test_what_came_early_is_read_without_waiting() -> None:
    async def scenario() -> None:
        leg = ClientLeg()
        connected(leg)
        leg.data_received(PASSWORD + QUERY)
        assert await leg.drive(one_message(leg.framer)) == b"secret\0"
        assert leg.framer.take_rest() == QUERY

    asyncio.run(scenario())


@pytest.mark.parametrize(("leg", "fault"), [(ClientLeg, ClientFault), (TargetLeg, TargetFault)])
@pytest.mark.parametrize("lost", [None, ConnectionResetError(104, "Connection reset by peer")])
@pytest.mark.parametrize("received", [b"", PASSWORD[:4]])
def test_a_peer_that_goes_in_the_middle_ends_its_login(
    leg: type[Leg], fault: type[Fault], lost: Exception | None, received: bytes
) -> None:
    async def scenario(end: Callable[[Leg], object]) -> None:
        going = leg()
        connected(going)
        driven = asyncio.create_task(going.drive(one_message(going.framer)))
        await until_it_waits()
        if received:
            going.data_received(received)
            await until_it_waits()
        end(going)
        with pytest.raises(fault):
            await driven

    asyncio.run(scenario(lambda going: going.connection_lost(lost)))
    asyncio.run(scenario(lambda going: going.eof_received()))


def test_a_client_that_is_gone_is_told_nothing_and_a_target_is_told_of() -> None:
    assert (ClientLeg().gone_fault().told, ClientLeg().gone_fault().sqlstate) == (None, "08P01")
    target = TargetLeg()
    assert target.gone_fault().detail == "target closed the connection during the login: end of file"
    target.connection_lost(ConnectionResetError("reset"))
    assert target.gone_fault().detail == "target closed the connection during the login: reset"
    assert target.gone_fault().sqlstate == "08006"


def test_what_was_sent_before_the_end_of_file_still_counts() -> None:
    async def scenario() -> None:
        leg = ClientLeg()
        connected(leg)
        leg.data_received(PASSWORD + QUERY)
        assert leg.eof_received() is True
        assert not leg.gone
        assert await leg.drive(one_message(leg.framer)) == b"secret\0"
        assert leg.hand_over()[1:] == (QUERY, True)

    asyncio.run(scenario())


def test_a_peer_that_sends_too_much_too_early_is_not_read_until_it_is_asked() -> None:
    async def scenario() -> None:
        leg = ClientLeg()
        transport = connected(leg)
        leg.data_received(bytes(MAX_PENDING))
        assert transport.reading
        leg.data_received(b"x")
        assert not transport.reading
        leg.framer.take_rest()
        driven = asyncio.create_task(leg.drive(one_message(leg.framer)))
        await until_it_waits()
        assert transport.reading
        leg.data_received(PASSWORD)
        await driven

    asyncio.run(scenario())


def test_a_login_that_is_cancelled_can_be_followed_by_another() -> None:
    async def scenario() -> None:
        leg = ClientLeg()
        connected(leg)
        driven = asyncio.create_task(leg.drive(one_message(leg.framer)))
        await until_it_waits()
        driven.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driven
        leg.data_received(PASSWORD)
        assert await leg.drive(one_message(leg.framer)) == b"secret\0"

    asyncio.run(scenario())


def test_a_key_is_derived_by_whoever_can_and_handed_back() -> None:
    def deriving() -> Login[bytes]:
        answer = yield DeriveKey(Secret(b"secret"), b"salt", 7)
        assert answer is not None
        yield b"after the key"
        return answer

    async def derive(step: DeriveKey) -> bytes:
        return step.password.reveal() + step.salt + b"%d" % step.iterations

    async def scenario() -> None:
        leg = TargetLeg()
        transport = connected(leg)
        assert await leg.drive(deriving(), derive) == b"secretsalt7"
        assert transport.written == b"after the key"

    asyncio.run(scenario())


class Watcher:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


@pytest.mark.parametrize("end", [lambda leg: leg.eof_received(), lambda leg: leg.connection_lost(None)])
def test_a_watcher_is_called_once_when_the_peer_is_gone(end: Callable[[Leg], object]) -> None:
    leg, watcher = ClientLeg(), Watcher()
    connected(leg)
    leg.watch(watcher)
    leg.data_received(b"")
    assert watcher.calls == 0
    end(leg)
    assert watcher.calls == 1
    leg.connection_lost(None)
    assert watcher.calls == 1


@pytest.mark.parametrize("end", [lambda leg: leg.eof_received(), lambda leg: leg.connection_lost(None)])
def test_a_watcher_is_called_at_once_if_the_peer_is_gone_already(end: Callable[[Leg], object]) -> None:
    leg, watcher = ClientLeg(), Watcher()
    connected(leg)
    end(leg)
    leg.watch(watcher)
    assert watcher.calls == 1


def test_a_peer_that_has_closed_its_sending_side_is_not_gone_while_its_last_words_wait() -> None:
    leg, watcher = ClientLeg(), Watcher()
    connected(leg)
    leg.data_received(QUERY)
    leg.watch(watcher)
    leg.eof_received()
    assert watcher.calls == 0
    leg.connection_lost(None)
    assert watcher.calls == 1


@pytest.mark.parametrize("stop", [lambda leg: leg.watch(None), lambda leg: leg.hand_over(), lambda leg: leg.abort()])
def test_a_watcher_is_not_called_once_it_is_taken_away(stop: Callable[[Leg], object]) -> None:
    leg, watcher = ClientLeg(), Watcher()
    connected(leg)
    leg.watch(watcher)
    stop(leg)
    leg.eof_received()
    leg.connection_lost(None)
    assert watcher.calls == 0


@pytest.mark.parametrize("rest", [b"", QUERY, bytes(MAX_PENDING + 1)])
@pytest.mark.parametrize("at_eof", [False, True])
def test_a_leg_hands_over_what_nobody_has_read(rest: bytes, *, at_eof: bool) -> None:
    leg = ClientLeg()
    transport = connected(leg)
    if rest:
        leg.data_received(rest)
    if at_eof:
        leg.eof_received()
    assert leg.hand_over() == (transport, rest, at_eof)
    assert not transport.reading
    assert leg.framer.pending == 0


@pytest.mark.parametrize(("leg", "fault"), [(ClientLeg, ClientFault), (TargetLeg, TargetFault)])
def test_a_transport_that_is_lost_is_not_handed_over(leg: type[Leg], fault: type[Fault]) -> None:
    lost = leg()
    transport = connected(lost)
    lost.data_received(QUERY)
    lost.connection_lost(None)
    with pytest.raises(fault):
        lost.hand_over()
    assert transport.calls == []


def test_a_leg_is_aborted_unless_it_is_lost() -> None:
    leg = TargetLeg()
    transport = connected(leg)
    leg.abort()
    assert transport.calls == ["abort"]
    leg.connection_lost(None)
    leg.abort()
    assert transport.calls == ["abort"]


@pytest.mark.parametrize(
    ("fault", "written"),
    [
        (GatewayFault("53300", "sorry"), messages.fatal("53300", b"sorry")),
        (ClientFault("08P01", None, "for the log"), b""),
    ],
)
def test_a_refused_client_is_told_what_it_may_know_and_closed(fault: Fault, written: bytes) -> None:
    leg = ClientLeg()
    transport = connected(leg)
    leg.refuse(fault)
    assert transport.written == written
    assert transport.calls[-1] == "close"


@pytest.mark.parametrize("end", [lambda leg: leg.connection_lost(OSError()), lambda leg: leg.transport.close()])
def test_a_client_that_is_gone_is_told_nothing(end: Callable[[Leg], object]) -> None:
    leg = ClientLeg()
    transport = connected(leg)
    end(leg)
    leg.refuse(GatewayFault("53300", "sorry"))
    assert transport.written == b""


async def log_in_client(leg: Leg) -> object:
    assert isinstance(leg, ClientLeg)
    return await leg.receive_startup(POLICY), await leg.receive_proof(STARTED, POLICY)


async def log_in_at_target(leg: Leg) -> object:
    mapping = Mapping((Address("db", 5432),), STARTED.parameters, None)
    limits = TargetLimits(auth_request=2000, error=30_000, message=65_536, scram_iterations=1)
    return await leg.drive(target_login(leg.framer, mapping, limits, private_channel=True, pass_error_text=False))


CLIENT_SENDS = messages.startup_message(STARTED.parameters) + PASSWORD
CLIENT_MEANS = (StartupMessage(STARTED.parameters), Proof("cleartext", Secret(b"secret"), bytes(4)))
STATUS, READY = (
    _wire.message(messages.PARAMETER_STATUS, b"TimeZone\0UTC\0"),
    _wire.message(messages.READY_FOR_QUERY, b"I"),
)
TARGET_SENDS = messages.authentication(messages.AUTH_OK) + STATUS + READY
TARGET_MEANS = Greeting(STATUS + READY, b"", b"")


@pytest.mark.parametrize(
    ("leg", "log_in", "sent", "meant"),
    [(ClientLeg, log_in_client, CLIENT_SENDS, CLIENT_MEANS), (TargetLeg, log_in_at_target, TARGET_SENDS, TARGET_MEANS)],
    ids=["client", "target"],
)
def test_wherever_what_a_peer_sends_is_cut_nothing_is_lost(
    leg: type[Leg], log_in: Callable[[Leg], Coroutine[Any, Any, object]], sent: bytes, meant: object
) -> None:
    async def scenario(cut: int) -> None:
        logging_in = leg()
        connected(logging_in)
        login = asyncio.create_task(log_in(logging_in))
        stream = sent + QUERY
        handed_over = b""
        for part in (stream[:cut], stream[cut:]):
            await until_it_waits()
            if login.done():
                # What comes from here on goes to the next protocol.
                handed_over = logging_in.hand_over()[1] + part
            else:
                logging_in.data_received(part)
        assert await login == meant
        assert (handed_over or logging_in.hand_over()[1]) == QUERY

    async def scenarios() -> None:
        for cut in range(len(sent + QUERY) + 1):
            await scenario(cut)

    asyncio.run(scenarios())
