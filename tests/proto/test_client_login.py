"""The client's password with bytes alone: one request, one message, and nothing else will do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from pgauthproxy import _wire
from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.proto import client_login, messages
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.steps import Login
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Attached, Granted, Greeting, Mapping, Started
from tests.sans_io import Outcome, Raised, Waiting, run, run_in_every_chunking

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
    granted = Granted(started, Mapping((address,), ((b"user", b"reader"),), None), 0.0)
    return Attached(granted, address, greeting, 0.0, 0.0)


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
