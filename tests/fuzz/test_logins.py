"""Any bytes into a login: it returns, raises a Fault, or waits for more. Never another exception."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgauthproxy import _wire
from pgauthproxy.errors import ClientFault, Fault, FrameError
from pgauthproxy.proto import client_login, messages, scram, startup
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.messages import ServerError
from pgauthproxy.proto.scram import Challenge, Keys, ScramClient, ScramError, ScramServer, Verifier
from pgauthproxy.proto.startup import CancelRequest, StartupMessage
from pgauthproxy.proto.steps import Login, StartTls, TlsPlan, TlsSide
from pgauthproxy.proto.target_login import TargetLimits, TargetTerms, Welcome, target_login
from pgauthproxy.secret import Secret
from pgauthproxy.stages import (
    Accepted,
    Address,
    Encryption,
    Granted,
    Mapping,
    Password,
    ProvedKeys,
    Started,
    StoredMd5,
    parameter,
)
from tests.sans_io import TLS, Outcome, Raised, Waiting, encrypted, run

MAX_PACKET = 200
NAMES = st.sampled_from([b"user", b"database", b"_SOURCE_CRED", b"_meta_x", b"_pq_.x", b"a=b", b"", b"\n"]) | st.binary(
    max_size=8
)
LAYOUTS = st.lists(NAMES, max_size=8).map(b"\0".join) | st.binary(max_size=40)
ENDS = st.sampled_from([b"", b"\0", b"\0\0", b"\0\0\0"])
BODIES = st.builds(bytes.__add__, LAYOUTS, ENDS)
CODES = st.sampled_from([196608, 196610, 131072, 80877102, 80877103, 80877104]) | st.integers(0, (1 << 32) - 1)
PACKETS = st.builds(_wire.startup_packet, CODES, BODIES) | st.binary(max_size=30)
CLIENT_HELLOS = st.binary(max_size=30).map(b"\x16".__add__)
AGREED = st.builds(
    lambda alpn, binding: encrypted(alpn=alpn, binding=binding),
    st.sampled_from(["postgresql", "", "http/1.1"]),
    st.sampled_from([b"", b"hash"]),
)


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

receive_md5 = functools.partial(client_login.receive_md5, user=b'\xff"', salt=b"salt", max_message=100)
receive_cleartext = functools.partial(client_login.receive_cleartext, user=b'\xff"', max_message=100)


def outcome(
    login: Callable[[_wire.Framer], Login[Any]], chunks: list[bytes], encryption: Encryption | None = None
) -> Outcome:
    framer = _wire.Framer({})
    return run(login(framer), framer, chunks, encryption=encryption)


@given(st.lists(PACKETS | CLIENT_HELLOS, max_size=6), st.sampled_from([None, TLS]), st.booleans(), AGREED)
def test_a_startup_phase_ends_in_order_whatever_is_sent(
    chunks: list[bytes], tls: TlsSide | None, required: bool, agreed: Encryption
) -> None:
    required = required and tls is not None
    went = outcome(
        lambda framer: startup.receive_startup(framer, MAX_PACKET, tls, tls_required=required), chunks, agreed
    )
    ending = went.ending
    assert isinstance(ending, StartupMessage | CancelRequest | Raised | Waiting)
    started = [step for step in went.sent if isinstance(step, StartTls)]
    assert len(started) <= (tls is not None)
    if isinstance(ending, StartupMessage):
        assert parameter(ending.parameters, b"user")
        assert ending.minor <= 2
        assert ending.encryption == (agreed if started else None)
        assert started or not required
        # Without being asked for it first, TLS is only spoken with who knows our protocol.
        assert not started or b"S" in went.sent or agreed.application_protocol == "postgresql"
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


SCRAM_MESSAGES = st.lists(
    st.sampled_from(
        [b"n", b"y", b"p=tls-server-end-point", b"", b"a=x", b"n=", b"r=nonce", b"m=x", b"c=biws", b"c=eSws", b"p=AAAA"]
    )
    | st.binary(max_size=8),
    max_size=6,
).map(b",".join)
INITIAL = st.builds(
    lambda mechanism, length, data: mechanism + b"\0" + (length % (1 << 32)).to_bytes(4) + data,
    st.sampled_from([b"SCRAM-SHA-256", b"SCRAM-SHA-256-PLUS", b"", b"OAUTHBEARER"]),
    st.integers(-2, 20) | st.just(1 << 31),
    SCRAM_MESSAGES,
) | st.builds(
    lambda mechanism, data: mechanism + b"\0" + len(data).to_bytes(4) + data,
    st.sampled_from([b"SCRAM-SHA-256", b"SCRAM-SHA-256-PLUS"]),
    SCRAM_MESSAGES,
)
VERIFIER = Verifier.of(b"secret", b"salt", 1)


@given(
    st.lists(framed(b"p", INITIAL | SCRAM_MESSAGES) | st.binary(max_size=20), max_size=4),
    st.sampled_from([b"", b"hash"]),
)
def test_a_scram_exchange_ends_in_order_whatever_is_sent(chunks: list[bytes], binding: bytes) -> None:
    went = outcome(lambda framer: client_login.receive_scram(framer, b'\xff"', VERIFIER, binding, 100), chunks)
    # Nobody guesses a proof.
    assert isinstance(went.ending, Raised | Waiting)
    if isinstance(went.ending, Raised):
        assert went.ending.sqlstate in ("08P01", "28000", "28P01")
        assert went.ending.told
    assert len(went.sent) <= 3


@given(INITIAL | st.binary(max_size=40))
def test_an_initial_response_is_taken_whole_or_refused(body: bytes) -> None:
    try:
        mechanism, data = messages.parse_sasl_initial_response(body)
    except FrameError:
        return
    assert b"\0" not in mechanism
    length = b"\xff" * 4 if data is None else len(data).to_bytes(4)
    assert mechanism + b"\0" + length + (data or b"") == body


@given(SCRAM_MESSAGES, st.sampled_from([b"", b"hash"]), st.booleans())
def test_a_first_message_is_challenged_or_refused_whatever_it_says(message: bytes, binding: bytes, plus: bool) -> None:
    server = ScramServer(VERIFIER, b"server", binding)
    mechanism = scram.MECHANISM_PLUS if plus and binding else scram.MECHANISM
    try:
        challenge = server.first(mechanism, message)
    except ScramError:
        return
    nonce, salt, iterations = challenge.split(b",")
    assert nonce.startswith(b"r=")
    assert nonce.endswith(b"server")
    assert len(nonce) > len(b"r=server")
    assert (salt, iterations) == (b"s=c2FsdA==", b"i=1")
    # The one way to be bound is that of this connection, and nobody who could be is told otherwise.
    assert message.startswith(b"p=tls-server-end-point,,") is (mechanism == scram.MECHANISM_PLUS)
    assert not (message.startswith(b"y") and binding)


@given(SCRAM_MESSAGES | st.binary(max_size=40))
def test_nothing_that_is_made_up_is_a_clients_proof(message: bytes) -> None:
    server = ScramServer(VERIFIER, b"server", b"")
    server.first(scram.MECHANISM, b"n,,n=,r=nonce")
    for final in (message, b"c=biws,r=nonceserver," + message, b"c=biws,r=nonceserver,p=" + message):
        with pytest.raises(ScramError):
            server.final(final)


@given(st.binary(max_size=100) | st.text(max_size=60).map(str.encode))
def test_a_verifier_is_read_as_it_is_written_or_not_at_all(text: bytes) -> None:
    for given_text in (text, b"SCRAM-SHA-256$" + text, VERIFIER.text().replace(b"$1:", b"$" + text[:8] + b":")):
        verifier = Verifier.parse(given_text)
        if verifier is not None:
            assert Verifier.parse(verifier.text()) == verifier
            assert verifier.iterations >= 1


PARAMETERS = ((b"user", b"reader"),)
STARTED = Started(Accepted("1", "192.0.2.1:1"), PARAMETERS)
CREDENTIALS = st.sampled_from(
    [
        None,
        Password(Secret(b"secret")),
        StoredMd5(Secret(b"md5" + b"0" * 32)),
        ProvedKeys(Secret(bytes(32)), Secret(bytes(32)), b"salt", 1),
    ]
)
PLANS = st.none() | st.builds(
    lambda required, verified, direct: TlsPlan(TLS, required=required, verified=verified, direct=direct),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
LIMITS = TargetLimits(auth_request=60, error=60, message=60, scram_iterations=10)


Credential = Password | StoredMd5 | ProvedKeys | None


def logging_in(
    credential: Credential, plan: TlsPlan | None, *, local: bool, pass_text: bool
) -> Callable[[_wire.Framer], Login[Welcome]]:
    granted = Granted(STARTED, Mapping((Address("db", 1),), PARAMETERS, None), credential, 0)
    terms = TargetTerms(messages.PROTOCOL_3_0, plan, local, pass_text, LIMITS)
    return lambda framer: target_login(framer, granted, terms)


@given(
    st.lists(FROM_TARGET | st.sampled_from([b"S", b"N"]), max_size=8),
    CREDENTIALS,
    PLANS,
    st.booleans(),
    st.booleans(),
    AGREED,
)
def test_a_targets_login_ends_in_order_whatever_is_sent(
    chunks: list[bytes],
    credential: Credential,
    plan: TlsPlan | None,
    local: bool,
    pass_text: bool,
    agreed: Encryption,
) -> None:
    went = outcome(logging_in(credential, plan, local=local, pass_text=pass_text), chunks, agreed)
    assert isinstance(went.ending, Welcome | Raised | Waiting)
    if isinstance(went.ending, Raised):
        assert (went.ending.whose, len(went.ending.sqlstate)) == ("target", 5)
        assert went.ending.told
    in_tls = StartTls(TLS) in went.sent
    if isinstance(went.ending, Welcome):
        assert went.ending.encryption == (agreed if in_tls else None)
    # For TLS a request and its beginning; then a startup packet, and at most the two messages of SCRAM.
    assert len(went.sent) <= 5
    required = plan is not None and plan.required
    assert local or (in_tls and required) or messages.password_message(b"secret") not in went.sent
    if required and not in_tls:
        assert set(went.sent) <= {messages.ssl_request()}


@given(st.lists(FROM_TARGET, max_size=8), st.data())
def test_chunking_makes_no_difference_to_a_targets_login(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6), label="cuts"))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    login = logging_in(Password(Secret(b"secret")), None, local=True, pass_text=True)
    assert outcome(login, chunks).ending == outcome(login, [stream]).ending


ATTRIBUTES = st.sampled_from([b"r=nonce", b"r=nonce+", b"s=QUJD", b"s=", b"i=1", b"i=10", b"i=", b"x=y"]) | st.binary(
    max_size=8
)


@given(st.lists(ATTRIBUTES, max_size=5).map(b",".join))
def test_a_challenge_is_taken_or_refused_whatever_it_says(message: bytes) -> None:
    try:
        challenge = ScramClient(b"nonce", scram.CANNOT_BIND).challenge(message, 10)
    except ScramError:
        return
    assert isinstance(challenge, Challenge)
    assert challenge.nonce.startswith(b"nonce")
    assert challenge.salt
    assert 1 <= challenge.iterations <= 10


@given(st.binary(max_size=20) | st.binary(max_size=12).map(b"v=".__add__))
def test_nothing_that_is_made_up_is_a_servers_proof(message: bytes) -> None:
    client = ScramClient(b"nonce", scram.CANNOT_BIND)
    client.final(client.challenge(b"r=nonce+,s=QUJD,i=1", 10), Keys(bytes(32), bytes(32)))
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
