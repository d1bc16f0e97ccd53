"""How a client proves itself, with bytes alone: one exchange, and nothing else will do."""

from __future__ import annotations

import base64
import functools
import secrets
from collections.abc import Callable
from typing import Any

import pytest

from pgauthproxy import _wire
from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.proto import client_login, messages, scram
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.scram import Keys, ScramClient, Verifier
from pgauthproxy.proto.steps import Login
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Attached, Granted, Greeting, Mapping, Started
from tests.sans_io import Outcome, Raised, Turn, Waiting, run, run_in_every_chunking

MAX_MESSAGE = 100
USER = b'al"ice'
SALT = b"\x01\xab\x00\xff"
MD5_REQUEST = b"R\0\0\0\x0c\0\0\0\x05" + SALT
CLEARTEXT_REQUEST = b"R\0\0\0\x08\0\0\0\x03"
ANSWER = md5_answer(md5_password(b"secret", USER), SALT)

MakeLogin = Callable[[_wire.Framer], Login[Proof]]
receive_md5: MakeLogin = functools.partial(client_login.receive_md5, user=USER, salt=SALT, max_message=MAX_MESSAGE)
receive_cleartext: MakeLogin = functools.partial(client_login.receive_cleartext, user=USER, max_message=MAX_MESSAGE)
both = pytest.mark.parametrize(
    ("login", "request_"),
    [
        pytest.param(receive_md5, MD5_REQUEST, id="md5"),
        pytest.param(receive_cleartext, CLEARTEXT_REQUEST, id="cleartext"),
    ],
)


def password(body: bytes) -> bytes:
    return _wire.message(messages.PASSWORD_MESSAGE, body)


def wrong(detail: str) -> Raised:
    return Raised("client", "28P01", b'password authentication failed for user "al"ice"', detail)


def broken(detail: str) -> Raised:
    return Raised("client", "08P01", b"expected a valid password message", f"instead of a password: {detail}")


def test_an_md5_answer_is_proof_with_its_salt() -> None:
    proof = Proof("md5", Secret(ANSWER), SALT)
    assert run_in_every_chunking(receive_md5, [password(ANSWER + b"\0")]) == Outcome((MD5_REQUEST,), proof)


@pytest.mark.parametrize(
    "typed", [b"secret", b" ", b"p=q", "пароль".encode(), b"\xff\xfe", ANSWER, b"x" * (MAX_MESSAGE - 5)]
)
def test_a_password_as_typed_is_proof_with_no_salt(typed: bytes) -> None:
    proof = Proof("cleartext", Secret(typed), bytes(4))
    assert run_in_every_chunking(receive_cleartext, [password(typed + b"\0")]) == Outcome((CLEARTEXT_REQUEST,), proof)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"secret",
        ANSWER[3:],
        ANSWER[:-1],
        ANSWER + b"0",
        ANSWER.upper(),
        b"MD5" + ANSWER[3:],
        ANSWER[:-1] + b"g",
        ANSWER + b"\n",
    ],
)
def test_an_answer_that_is_no_md5_is_a_wrong_password(answer: bytes) -> None:
    outcome = run_in_every_chunking(receive_md5, [password(answer + b"\0")])
    assert outcome.ending == wrong("the answer to an MD5 request is not an MD5")


def test_an_empty_password_is_a_wrong_one() -> None:
    assert run_in_every_chunking(receive_cleartext, [password(b"\0")]).ending == wrong("empty password")


@pytest.mark.parametrize("typed", [b"a\nb", b"a\rb", b"\n", b"secret\r\n"])
def test_a_line_break_in_a_password_is_a_wrong_password(typed: bytes) -> None:
    outcome = run_in_every_chunking(receive_cleartext, [password(typed + b"\0")])
    assert outcome.ending == wrong("line break in the password")


@both
@pytest.mark.parametrize("body", [b"", b"secret", b"\0\0", b"secret\0\0", b"sec\0ret\0", b"\0secret"])
def test_a_message_without_exactly_one_nul_at_its_end_breaks_the_protocol(
    login: MakeLogin, request_: bytes, body: bytes
) -> None:
    outcome = run_in_every_chunking(login, [password(body)])
    assert outcome == Outcome((request_,), broken("password message without exactly one NUL, at its end"))


@both
@pytest.mark.parametrize("length", [0, 3, MAX_MESSAGE + 1, 64 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_length_out_of_bounds_is_not_waited_for(login: MakeLogin, request_: bytes, length: int) -> None:
    outcome = run_in_every_chunking(login, [b"p" + length.to_bytes(4)])
    assert outcome == Outcome((request_,), broken(f"message 'p' of length {length}, allowed are 4 to {MAX_MESSAGE}"))


@both
def test_no_message_but_a_password_may_come(login: MakeLogin, request_: bytes) -> None:
    for kind in range(256):
        framer = _wire.Framer({})
        outcome = run(login(framer), framer, [bytes([kind])])
        assert outcome.sent == (request_,)
        if kind == messages.PASSWORD_MESSAGE:
            assert outcome.ending == Waiting()
        else:
            assert outcome.ending == broken(f"message of type 0x{kind:02x}, which may not come here")


@both
def test_what_is_pipelined_behind_the_password_is_left_in_order(login: MakeLogin, request_: bytes) -> None:
    rest = b"Q\0\0\0\x0dselect 1\0X\0\0\0\x04 and what is no message at all"
    outcome = run_in_every_chunking(login, [password(ANSWER + b"\0") + rest])
    assert (outcome.sent, outcome.rest) == ((request_,), rest)
    assert isinstance(outcome.ending, Proof)


@both
def test_what_came_before_the_request_was_sent_counts_too(login: MakeLogin, request_: bytes) -> None:
    framer = _wire.Framer({})
    framer.feed(password(ANSWER + b"\0"))
    outcome = run(login(framer), framer, [])
    assert outcome.sent == (request_,)
    assert isinstance(outcome.ending, Proof)


@both
def test_a_second_password_is_never_read(login: MakeLogin, request_: bytes) -> None:
    twice = password(ANSWER + b"\0") + password(b"another\0")
    outcome = run_in_every_chunking(login, [twice])
    assert outcome.rest == password(b"another\0")


def attached(greeting: Greeting) -> Attached:
    address = Address("127.0.0.1", 5432)
    started = Started(Accepted("1", "192.0.2.1:1"), ((b"user", b"alice"),))
    granted = Granted(started, Mapping((address,), ((b"user", b"reader"),), None), None, 0.0)
    return Attached(granted, address, None, greeting, 0.0, 0.0)


@pytest.mark.parametrize(
    ("key", "ours"), [(bytes(8), b"K\0\0\0\x0cour  key"), (bytes(36), b"K\0\0\0\x0cour  key"), (b"", b"")]
)
def test_the_welcome_is_the_targets_greeting_with_our_key_in_the_place_of_its_own(key: bytes, ours: bytes) -> None:
    status, ready = _wire.message(ord("S"), b"TimeZone\0UTC\0"), _wire.message(ord("Z"), b"I")
    greeted = attached(Greeting(status, key, status + ready))
    assert client_login.welcome(greeted, b"our  key") == b"R\0\0\0\x08\0\0\0\0" + status + ours + status + ready


def test_no_fault_holds_what_was_typed() -> None:
    cases: list[tuple[MakeLogin, bytes]] = [
        (receive_md5, b"hunter2\0"),
        (receive_cleartext, b"hunter2\n\0"),
        (receive_cleartext, b"hunter2"),
    ]
    for login, body in cases:
        framer = _wire.Framer({})
        ending: Any = run(login(framer), framer, [password(body)]).ending
        assert "hunter2" not in ending.detail
        assert b"hunter2" not in ending.told


SCRAM_PASSWORD, SCRAM_SALT, ITERATIONS, NONCE_BYTES = b"secret", b"sixteen bytes...", 3, b"N" * scram.NONCE_BYTES
SALTED = scram.salted_password(SCRAM_PASSWORD, SCRAM_SALT, ITERATIONS)
VERIFIER = Verifier.of(SCRAM_PASSWORD, SCRAM_SALT, ITERATIONS)
BINDING, CLIENT_NONCE = b"the hash of a certificate", b"the-clients-nonce"
NONCE = CLIENT_NONCE + base64.b64encode(NONCE_BYTES)
CHALLENGE = b"r=%b,s=%b,i=%d" % (NONCE, base64.b64encode(SCRAM_SALT), ITERATIONS)
OFFER = messages.authentication(messages.AUTH_SASL, b"SCRAM-SHA-256\0\0")
OFFER_OF_BOTH = messages.authentication(messages.AUTH_SASL, b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")
GO_ON = messages.authentication(messages.AUTH_SASL_CONTINUE)
CHALLENGED = messages.authentication(messages.AUTH_SASL_CONTINUE, CHALLENGE)


@pytest.fixture(autouse=True)
def _known_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a login sends the same in every chunking."""
    monkeypatch.setattr(secrets, "token_bytes", lambda size: NONCE_BYTES[:size])


def receive_scram(framer: _wire.Framer, binding: bytes = b"", verifier: Verifier = VERIFIER) -> Login[Keys]:
    return client_login.receive_scram(framer, USER, verifier, binding, MAX_MESSAGE + 200)


receive_scram_plus = functools.partial(receive_scram, binding=BINDING)


class Client:
    """A client's two messages of SCRAM, which know the nonce that they will be asked with."""

    def __init__(self, header: bytes = scram.CANNOT_BIND, binding: bytes = b"", salted: bytes = SALTED) -> None:
        exchange = ScramClient(CLIENT_NONCE, header, binding)
        self.first = exchange.first()
        self.final = exchange.final(exchange.challenge(CHALLENGE, ITERATIONS), Keys.of(salted))
        self.signed = b"v=" + base64.b64encode(exchange._server_signature)

    def turns(self, mechanism: bytes = scram.MECHANISM) -> list[Turn]:
        return [messages.sasl_initial_response(mechanism, self.first), messages.sasl_response(self.final)]

    @property
    def confirmed(self) -> bytes:
        return messages.authentication(messages.AUTH_SASL_FINAL, self.signed)


def malformed(detail: str) -> Raised:
    return Raised("client", "08P01", b"malformed SCRAM message", f"malformed SCRAM message: {detail}")


def test_scram_gives_the_keys_that_the_client_has_shown() -> None:
    client = Client()
    outcome = run_in_every_chunking(receive_scram, client.turns())
    assert outcome == Outcome((OFFER, CHALLENGED, client.confirmed), Keys.of(SALTED))


def test_what_is_pipelined_behind_the_proof_is_left_in_order() -> None:
    first, final = Client().turns()
    assert isinstance(final, bytes)
    rest = b"Q\0\0\0\x0dselect 1\0X\0\0\0\x04 and what is no message at all"
    assert run_in_every_chunking(receive_scram, [first, final + rest]).rest == rest


@pytest.mark.parametrize("header", [scram.CANNOT_BIND, scram.SERVER_CANNOT_BIND])
def test_a_client_that_cannot_bind_or_is_not_offered_to_is_let_in(header: bytes) -> None:
    client = Client(header)
    outcome = run_in_every_chunking(receive_scram, client.turns())
    assert outcome == Outcome((OFFER, CHALLENGED, client.confirmed), Keys.of(SALTED))


def test_over_tls_binding_is_offered_first_and_taken() -> None:
    client = Client(scram.BINDS, BINDING)
    outcome = run_in_every_chunking(receive_scram_plus, client.turns(scram.MECHANISM_PLUS))
    assert outcome == Outcome((OFFER_OF_BOTH, CHALLENGED, client.confirmed), Keys.of(SALTED))


def test_over_tls_a_client_that_cannot_bind_is_let_in_without() -> None:
    client = Client()
    outcome = run_in_every_chunking(receive_scram_plus, client.turns())
    assert outcome == Outcome((OFFER_OF_BOTH, CHALLENGED, client.confirmed), Keys.of(SALTED))


def test_a_client_that_was_hidden_the_offer_to_bind_is_refused() -> None:
    outcome = run_in_every_chunking(receive_scram_plus, Client(scram.SERVER_CANNOT_BIND).turns())
    detail = "the client thinks that the channel cannot be bound, though that was offered"
    assert outcome == Outcome(
        (OFFER_OF_BOTH,), Raised("client", "28000", b"SCRAM channel binding check failed", detail)
    )


@pytest.mark.parametrize("bound", [b"", BINDING[:-1], BINDING + b"x", BINDING.upper()])
def test_a_client_that_is_bound_to_another_channel_is_refused(bound: bytes) -> None:
    outcome = run_in_every_chunking(receive_scram_plus, Client(scram.BINDS, bound).turns(scram.MECHANISM_PLUS))
    detail = "the channel binding is not that of this connection"
    told = b"SCRAM channel binding check failed"
    assert outcome == Outcome((OFFER_OF_BOTH, CHALLENGED), Raised("client", "28000", told, detail))


def test_a_client_may_choose_before_it_says_anything() -> None:
    client = Client()
    chosen = _wire.message(messages.PASSWORD_MESSAGE, b"SCRAM-SHA-256\0\xff\xff\xff\xff")
    turns: list[Turn] = [chosen, messages.sasl_response(client.first), messages.sasl_response(client.final)]
    outcome = run_in_every_chunking(receive_scram, turns)
    assert outcome == Outcome((OFFER, GO_ON, CHALLENGED, client.confirmed), Keys.of(SALTED))


@pytest.mark.parametrize(
    ("verifier", "salted"),
    [
        (VERIFIER, scram.salted_password(b"wrong", SCRAM_SALT, ITERATIONS)),
        (Verifier(ITERATIONS, SCRAM_SALT, bytes(32), bytes(32)), SALTED),
        (Verifier.of(b"another", SCRAM_SALT, ITERATIONS), SALTED),
    ],
    ids=["another password", "a verifier that nothing fits", "another verifier"],
)
def test_a_wrong_password_and_an_unknown_user_look_the_same(verifier: Verifier, salted: bytes) -> None:
    login = functools.partial(receive_scram, verifier=verifier)
    outcome = run_in_every_chunking(login, Client(salted=salted).turns())
    assert outcome == Outcome((OFFER, CHALLENGED), wrong("wrong password"))


@pytest.mark.parametrize("login", [receive_scram, receive_scram_plus])
@pytest.mark.parametrize(
    "mechanism", [b"", b"SCRAM-SHA-1", b"scram-sha-256", b"SCRAM-SHA-256 ", b"OAUTHBEARER", b"SCRAM-SHA-512"]
)
def test_a_mechanism_that_was_not_offered_is_none(login: Callable[..., Login[Keys]], mechanism: bytes) -> None:
    outcome = run_in_every_chunking(login, Client().turns(mechanism))
    assert outcome.ending == malformed("a SASL mechanism that was not offered")


def test_a_channel_that_cannot_be_bound_is_not_bound() -> None:
    outcome = run_in_every_chunking(receive_scram, Client(scram.BINDS, BINDING).turns(scram.MECHANISM_PLUS))
    assert outcome == Outcome((OFFER,), malformed("a SASL mechanism that was not offered"))


LENGTH = len(Client().first)
WRONG_LENGTH = "SASL initial response with a length that is not its own"
CUT_SHORT = "SASL initial response that is cut short"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", CUT_SHORT),
        (b"SCRAM-SHA-256", CUT_SHORT),
        (b"SCRAM-SHA-256\0", CUT_SHORT),
        (b"SCRAM-SHA-256\0\0\0\0", CUT_SHORT),
        (b"SCRAM-SHA-256\0" + (LENGTH - 1).to_bytes(4) + Client().first, WRONG_LENGTH),
        (b"SCRAM-SHA-256\0" + (LENGTH + 1).to_bytes(4) + Client().first, WRONG_LENGTH),
        (b"SCRAM-SHA-256\0\xff\xff\xff\xff" + Client().first, WRONG_LENGTH),
        (b"SCRAM-SHA-256\0\xff\xff\xff\xfe", WRONG_LENGTH),
        (b"SCRAM-SHA-256\0\x80\0\0\0", WRONG_LENGTH),
        (b"SCRAM-SHA-256\0\x7f\xff\xff\xff", WRONG_LENGTH),
        (b"SCRAM-SHA-256\0\0\0\0\0", "malformed client-first-message"),
        (b"a password\0", CUT_SHORT),
    ],
)
def test_an_initial_response_that_is_broken_breaks_the_protocol(body: bytes, detail: str) -> None:
    assert run_in_every_chunking(receive_scram, [password(body)]) == Outcome((OFFER,), malformed(detail))


@pytest.mark.parametrize(
    ("final", "detail"),
    [
        (b"", "malformed client-final-message"),
        (b"c=biws", "malformed client-final-message"),
        (b"c=?,r=" + NONCE + b",p=AAAA", "the channel binding is not base64"),
        (b"c=biws,r=" + CLIENT_NONCE + b",p=AAAA", "the nonce is not the one of this exchange"),
        (b"c=biws,r=" + NONCE + b",p=?", "the proof is not base64"),
        (b"c=biws,r=" + NONCE + b",p=AAAA", "a proof of the wrong length"),
    ],
)
def test_a_final_message_that_is_broken_breaks_the_protocol(final: bytes, detail: str) -> None:
    outcome = run_in_every_chunking(receive_scram, [Client().turns()[0], messages.sasl_response(final)])
    assert outcome == Outcome((OFFER, CHALLENGED), malformed(detail))


SCRAM_STATES: dict[str, list[Turn]] = {
    "before the choice": [],
    "behind an empty choice": [_wire.message(messages.PASSWORD_MESSAGE, b"SCRAM-SHA-256\0\xff\xff\xff\xff")],
    "before the proof": Client().turns()[:1],
}


@pytest.mark.parametrize("state", SCRAM_STATES)
def test_no_message_but_those_of_scram_may_come(state: str) -> None:
    for kind in range(256):
        framer = _wire.Framer({})
        ending = run(receive_scram(framer), framer, [*SCRAM_STATES[state], bytes([kind])]).ending
        if kind == messages.PASSWORD_MESSAGE:
            assert ending == Waiting()
        else:
            assert ending == malformed(f"message of type 0x{kind:02x}, which may not come here")


@pytest.mark.parametrize("state", SCRAM_STATES)
@pytest.mark.parametrize("length", [0, 3, MAX_MESSAGE + 201, 64 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_scram_message_out_of_bounds_is_not_waited_for(state: str, length: int) -> None:
    outcome = run_in_every_chunking(receive_scram, [*SCRAM_STATES[state], b"p" + length.to_bytes(4)])
    allowed = MAX_MESSAGE + 200
    assert outcome.ending == malformed(f"message 'p' of length {length}, allowed are 4 to {allowed}")


def test_a_second_proof_is_never_read() -> None:
    first, final = Client(salted=bytes(32)).turns()
    assert isinstance(final, bytes)
    right = Client().turns()[1]
    assert isinstance(right, bytes)
    assert run_in_every_chunking(receive_scram, [first, final + right]).ending == wrong("wrong password")


def test_each_exchange_has_a_nonce_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    nonces = set()
    for _ in range(50):
        framer = _wire.Framer({})
        outcome = run(receive_scram(framer), framer, Client().turns()[:1])
        challenge = outcome.sent[1]
        assert isinstance(challenge, bytes)
        nonces.add(challenge[9:].split(b",")[0])
    assert len(nonces) == 50
