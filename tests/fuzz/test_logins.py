"""Any bytes into a login: it returns, raises a Fault, or waits for more. Never another exception."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgauthproxy import _wire
from pgauthproxy.errors import ClientFault, Fault
from pgauthproxy.proto import client_login, messages, scram, startup
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.messages import ServerError
from pgauthproxy.proto.scram import Challenge, ScramClient, ScramError
from pgauthproxy.proto.startup import CancelRequest, StartupMessage
from pgauthproxy.proto.steps import Login
from pgauthproxy.proto.target_login import TargetLimits, target_login
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Address, Greeting, Mapping, parameter
from tests.sans_io import Outcome, Raised, Waiting, run

MAX_PACKET = 200
NAMES = st.sampled_from([b"user", b"database", b"_SOURCE_CRED", b"_meta_x", b"_pq_.x", b"a=b", b"", b"\n"]) | st.binary(
    max_size=8
)
LAYOUTS = st.lists(NAMES, max_size=8).map(b"\0".join) | st.binary(max_size=40)
ENDS = st.sampled_from([b"", b"\0", b"\0\0", b"\0\0\0"])
BODIES = st.builds(bytes.__add__, LAYOUTS, ENDS)
CODES = st.sampled_from([196608, 196610, 131072, 80877102, 80877103, 80877104]) | st.integers(0, (1 << 32) - 1)
PACKETS = st.builds(_wire.startup_packet, CODES, BODIES) | st.binary(max_size=30)


def framed(types: bytes, bodies: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Messages of these types, now and then with a wrong length."""
    lengths = st.integers(-4, 4) | st.sampled_from([1 << 20, 1 << 31])
    wrong = st.builds(
        lambda kind, body, off: bytes([kind]) + ((len(body) + 4 + off) % (1 << 32)).to_bytes(4) + body,
        st.sampled_from(types),
        bodies,
        lengths,
    )
    return st.builds(_wire.message, st.sampled_from(types), bodies) | wrong


REQUESTS = st.builds(
    lambda kind, data: kind.to_bytes(4) + data,
    st.sampled_from([0, 3, 5, 10, 11, 12, 7]) | st.integers(0, (1 << 32) - 1),
    st.sampled_from([b"", b"salt", b"SCRAM-SHA-256\0\0", b"v=AAAA"]) | st.binary(max_size=20),
)
ERRORS = st.lists(st.sampled_from([b"SFATAL", b"C3D000", b"C28P01", b"C", b"Mtext"]) | st.binary(max_size=8)).map(
    b"\0".join
)
FROM_TARGET = (
    framed(b"R", REQUESTS)
    | framed(b"E", ERRORS)
    | framed(b"SNKZ", st.binary(max_size=20) | st.just(b"I") | st.just(bytes(8)))
    | st.binary(max_size=20)
)
FROM_CLIENT = framed(b"p", st.binary(max_size=40) | st.just(b"md5" + b"0" * 32 + b"\0")) | st.binary(max_size=20)

receive_startup = functools.partial(startup.receive_startup, max_packet=MAX_PACKET)
receive_md5 = functools.partial(client_login.receive_md5, user=b'\xff"', salt=b"salt", max_message=100)
receive_cleartext = functools.partial(client_login.receive_cleartext, user=b'\xff"', max_message=100)


def outcome(login: Callable[[_wire.Framer], Login[Any]], chunks: list[bytes]) -> Outcome:
    framer = _wire.Framer({})
    return run(login(framer), framer, chunks)


@given(st.lists(PACKETS, max_size=6))
def test_a_startup_phase_ends_in_order_whatever_is_sent(chunks: list[bytes]) -> None:
    ending = outcome(receive_startup, chunks).ending
    assert isinstance(ending, StartupMessage | CancelRequest | Raised | Waiting)
    if isinstance(ending, StartupMessage):
        assert parameter(ending.parameters, b"user")
    if isinstance(ending, Raised):
        assert (ending.whose, len(ending.sqlstate)) == ("client", 5)


@given(BODIES)
def test_parameters_that_are_taken_cannot_forge_a_line(body: bytes) -> None:
    try:
        parameters = startup.parse_parameters(body)
    except ClientFault:
        return
    assert b"".join(name + b"\0" + value + b"\0" for name, value in parameters) + b"\0" == body
    for name, value in parameters:
        assert not {*b"=\r\n\0"} & {*name}
        assert not {*b"\r\n\0"} & {*value}
        assert not name.upper().startswith((b"_SOURCE_", b"_META_"))
    assert len({name for name, _ in parameters}) == len(parameters)


@pytest.mark.parametrize("login", [receive_md5, receive_cleartext])
@given(chunks=st.lists(FROM_CLIENT, max_size=4))
def test_a_clients_login_ends_in_order_whatever_is_sent(
    login: Callable[[_wire.Framer], Login[Proof]], chunks: list[bytes]
) -> None:
    ending = outcome(login, chunks).ending
    assert isinstance(ending, Proof | Raised | Waiting)
    if isinstance(ending, Proof):
        assert not {*b"\r\n\0"} & {*ending.answer.reveal()}
    if isinstance(ending, Raised):
        assert ending.sqlstate in ("08P01", "28P01")


CREDENTIALS = st.sampled_from([(None, False), (Secret(b"secret"), False), (Secret(b"md5" + b"0" * 32), True)])
LIMITS = TargetLimits(auth_request=60, error=60, message=60, scram_iterations=10)


@given(st.lists(FROM_TARGET, max_size=8), CREDENTIALS, st.booleans(), st.booleans())
def test_a_targets_login_ends_in_order_whatever_is_sent(
    chunks: list[bytes], credential: tuple[Secret | None, bool], private: bool, pass_text: bool
) -> None:
    mapping = Mapping((Address("db", 1),), ((b"user", b"reader"),), *credential)
    went = outcome(
        lambda framer: target_login(framer, mapping, LIMITS, private_channel=private, pass_error_text=pass_text), chunks
    )
    assert isinstance(went.ending, Greeting | Raised | Waiting)
    if isinstance(went.ending, Raised):
        assert (went.ending.whose, len(went.ending.sqlstate)) == ("target", 5)
        assert went.ending.told
    # A startup packet, and at most the two messages of SCRAM.
    assert len(went.sent) <= 3
    assert private or messages.password_message(b"secret") not in went.sent


@given(st.lists(FROM_TARGET, max_size=8), st.data())
def test_chunking_makes_no_difference_to_a_targets_login(parts: list[bytes], data: st.DataObject) -> None:
    mapping = Mapping((Address("db", 1),), ((b"user", b"reader"),), Secret(b"secret"))
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6), label="cuts"))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    def ending(chunks: list[bytes]) -> Any:
        return outcome(
            lambda framer: target_login(framer, mapping, LIMITS, private_channel=True, pass_error_text=True), chunks
        ).ending

    assert ending(chunks) == ending([stream])


ATTRIBUTES = st.sampled_from([b"r=nonce", b"r=nonce+", b"s=QUJD", b"s=", b"i=1", b"i=10", b"i=", b"x=y"]) | st.binary(
    max_size=8
)


@given(st.lists(ATTRIBUTES, max_size=5).map(b",".join))
def test_a_challenge_is_taken_or_refused_whatever_it_says(message: bytes) -> None:
    try:
        challenge = ScramClient(b"nonce").challenge(message, 10)
    except ScramError:
        return
    assert isinstance(challenge, Challenge)
    assert challenge.nonce.startswith(b"nonce")
    assert challenge.salt
    assert 1 <= challenge.iterations <= 10


@given(st.binary(max_size=20) | st.binary(max_size=12).map(b"v=".__add__))
def test_nothing_that_is_made_up_is_a_servers_proof(message: bytes) -> None:
    client = ScramClient(b"nonce")
    client.final(client.challenge(b"r=nonce+,s=QUJD,i=1", 10), bytes(32))
    with pytest.raises(ScramError):
        client.verify(message)


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_preparing_a_password_never_fails_and_is_done_once(password: bytes) -> None:
    prepared = scram.saslprep(password)
    assert scram.saslprep(prepared) == prepared
    assert bool(prepared) is bool(password)


@given(st.binary(max_size=60) | ERRORS)
def test_an_error_is_decoded_however_broken_it_is(body: bytes) -> None:
    error = ServerError.decode(body)
    assert error.sqlstate == "" or (len(error.sqlstate) == 5 and error.sqlstate.isalnum() and error.sqlstate.isascii())
    assert b"\0" not in error.text


@given(st.sampled_from(["08P01", "28P01"]), st.binary(max_size=40))
def test_an_error_that_we_write_is_one_that_we_read(sqlstate: str, text: bytes) -> None:
    framer = _wire.Framer({messages.ERROR_RESPONSE: 200})
    framer.feed(messages.fatal(sqlstate, text))
    message = framer.message()
    assert message is not None
    assert ServerError.decode(message[1]) == ServerError(sqlstate, text.replace(b"\0", b"?"))


@given(
    st.text(max_size=20), st.none() | st.text(max_size=20) | st.binary(max_size=20), st.none() | st.text(max_size=20)
)
def test_a_fault_can_be_made_of_any_text(sqlstate: str, told: str | bytes | None, detail: str | None) -> None:
    fault = Fault(sqlstate, told, detail)
    assert fault.told is None or isinstance(fault.told, bytes)
    assert isinstance(fault.detail, str)
