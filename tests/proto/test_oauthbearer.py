"""SASL OAUTHBEARER with bytes alone: a token in one message, or an error that the client has to answer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgauthproxy import _wire
from pgauthproxy.proto import client_login, messages
from pgauthproxy.proto.steps import Login
from pgauthproxy.secret import Secret
from tests.sans_io import Outcome, Raised, Waiting, run, run_in_every_chunking

MAX_MESSAGE = 200
OFFER = _wire.message(ord("R"), b"\0\0\0\x0aOAUTHBEARER\0\0")
ERROR = b'{"status": "invalid_token"}'
CONTINUE = _wire.message(ord("R"), b"\0\0\0\x0b" + ERROR)
EMPTY_CHALLENGE = _wire.message(ord("R"), b"\0\0\0\x0b")
GOOD = b"n,,\x01auth=Bearer a.B-c_9~+/==\x01\x01"
DUMMY = messages.sasl_response(b"\x01")

MakeLogin = Callable[[_wire.Framer], Login[Secret]]
receive: MakeLogin = functools.partial(
    client_login.receive_oauthbearer, user=b"alice", token_error=ERROR, max_message=MAX_MESSAGE
)


def initial(data: bytes, mechanism: bytes = b"OAUTHBEARER") -> bytes:
    return messages.sasl_initial_response(mechanism, data)


def refused(detail: str) -> Raised:
    return Raised("client", "28000", b'OAuth bearer authentication failed for user "alice"', detail)


def malformed(detail: str) -> Raised:
    return Raised("client", "08P01", b"malformed OAUTHBEARER message", f"malformed OAUTHBEARER message: {detail}")


@pytest.mark.parametrize(
    "data",
    [
        GOOD,
        GOOD.replace(b"Bearer", b"bEARER  "),
        GOOD.replace(b"n,,", b"y,,"),
        b"n,,\x01host=db.example.com\x01port=5432\x01auth=Bearer a.B-c_9~+/==\x01\x01",
        b"n,,\x01auth=Bearer a.B-c_9~+/==\x01other=\x01\x01",
    ],
)
def test_a_token_is_taken_as_it_is(data: bytes) -> None:
    outcome = run_in_every_chunking(receive, [initial(data)])
    assert outcome == Outcome((OFFER,), Secret(b"a.B-c_9~+/=="))


def test_a_client_may_choose_the_mechanism_first_and_answer_then() -> None:
    without_data = _wire.message(ord("p"), b"OAUTHBEARER\0\xff\xff\xff\xff")
    outcome = run_in_every_chunking(receive, [without_data, messages.sasl_response(GOOD)])
    assert outcome == Outcome((OFFER, EMPTY_CHALLENGE), Secret(b"a.B-c_9~+/=="))


def test_a_client_without_a_token_is_told_where_tokens_are_given_and_then_refused() -> None:
    outcome = run_in_every_chunking(receive, [initial(b"n,,\x01auth=\x01\x01"), DUMMY])
    assert outcome == Outcome((OFFER, CONTINUE), refused("the client asks where tokens are given"))


@pytest.mark.parametrize(
    "value", [b"Basic YWxhZGRpbg==", b"Bearer", b"Bearer ", b"Bearera", b"Bearer a b", b"Bearer a=b", b"Bearer \ta"]
)
def test_what_is_no_bearer_token_is_refused_like_a_bad_one(value: bytes) -> None:
    outcome = run_in_every_chunking(receive, [initial(b"n,,\x01auth=" + value + b"\x01\x01"), DUMMY])
    assert outcome == Outcome((OFFER, CONTINUE), refused("no bearer token"))


def test_the_error_is_not_the_end_before_the_client_has_answered_it() -> None:
    outcome = run_in_every_chunking(receive, [initial(b"n,,\x01auth=\x01\x01")])
    assert outcome == Outcome((OFFER, CONTINUE), Waiting())


@pytest.mark.parametrize("answer", [b"", b"\x01\x01", b"\0", b"n,,\x01auth=\x01\x01", GOOD])
def test_an_error_is_answered_by_a_separator_and_nothing_else(answer: bytes) -> None:
    outcome = run_in_every_chunking(receive, [initial(b"n,,\x01auth=\x01\x01"), messages.sasl_response(answer)])
    assert outcome.ending == malformed("more than a separator in answer to an error")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no header, or one that binds the channel"),
        (b"n", "no header, or one that binds the channel"),
        (b"n,", "no header, or one that binds the channel"),
        (b"p=tls-server-end-point,,\x01auth=Bearer a\x01\x01", "no header, or one that binds the channel"),
        (b"x,,\x01auth=Bearer a\x01\x01", "no header, or one that binds the channel"),
        (b"n,,", "a separator is missing, or something stands where none may"),
        (b"n,,\x01", "a separator is missing, or something stands where none may"),
        (b"n,,auth=Bearer a\x01\x01", "a separator is missing, or something stands where none may"),
        (b"n,,\x01auth=Bearer a", "a separator is missing, or something stands where none may"),
        (b"n,,\x01auth=Bearer a\x01", "a separator is missing, or something stands where none may"),
        (b"n,,\x01auth=Bearer a\x01\x01x", "a separator is missing, or something stands where none may"),
        (b"n,,\x01auth=Bearer a\x01\x01\0", "a separator is missing, or something stands where none may"),
        (b"n,x=y,\x01auth=Bearer a\x01\x01", "a separator is missing, or something stands where none may"),
        (b"n,,\x01\x01", "not exactly one auth value"),
        (b"n,,\x01host=db\x01\x01", "not exactly one auth value"),
        (b"n,,\x01auth=Bearer a\x01auth=Bearer b\x01\x01", "not exactly one auth value"),
        (b"n,,\x01auth=\x01auth=Bearer b\x01\x01", "not exactly one auth value"),
        (b"n,,\x01auth=Bearer a\x01\x01\x01", "a key or value that is none"),
        (b"n,,\x01auth\x01\x01", "a key or value that is none"),
        (b"n,,\x01=Bearer a\x01\x01", "a key or value that is none"),
        (b"n,,\x01au th=Bearer a\x01\x01", "a key or value that is none"),
        (b"n,,\x01auth=Bearer a\0b\x01\x01", "a key or value that is none"),
        (b"n,,\x01auth=Bearer \xc3\xa9\x01\x01", "a key or value that is none"),
    ],
)
def test_a_message_that_is_none_breaks_the_protocol(data: bytes, why: str) -> None:
    outcome = run_in_every_chunking(receive, [initial(data)])
    assert outcome == Outcome((OFFER,), malformed(why))


def test_nobody_can_ask_to_be_somebody_else() -> None:
    outcome = run_in_every_chunking(receive, [initial(b"n,a=mallory,\x01auth=Bearer a\x01\x01")])
    what = "client uses authorization identity, but it is not supported"
    assert outcome == Outcome((OFFER,), Raised("client", "0A000", what.encode(), what))


@pytest.mark.parametrize("mechanism", [b"", b"SCRAM-SHA-256", b"OAUTHBEARER2", b"oauthbearer"])
def test_no_other_mechanism_will_do(mechanism: bytes) -> None:
    outcome = run_in_every_chunking(receive, [initial(GOOD, mechanism)])
    assert outcome.ending == malformed("a SASL mechanism that was not offered")


@pytest.mark.parametrize("length", [3, MAX_MESSAGE + 1, 1 << 20, 1 << 31])
def test_a_length_out_of_bounds_is_not_waited_for(length: int) -> None:
    outcome = run_in_every_chunking(receive, [b"p" + length.to_bytes(4)])
    assert outcome.ending == malformed(f"message 'p' of length {length}, allowed are 4 to {MAX_MESSAGE}")


def test_what_comes_behind_the_token_belongs_to_the_session() -> None:
    outcome = run_in_every_chunking(receive, [initial(GOOD) + b"Q\0\0\0\x05\0"])
    assert outcome == Outcome((OFFER,), Secret(b"a.B-c_9~+/=="), b"Q\0\0\0\x05\0")


@pytest.mark.parametrize(
    ("issuer", "well_known"),
    [
        ("https://id.example", "https://id.example/.well-known/openid-configuration"),
        ("https://id.example/", "https://id.example/.well-known/openid-configuration"),
        ("https://id.example/realm", "https://id.example/realm/.well-known/openid-configuration"),
        (
            "https://id.example/.well-known/oauth-authorization-server",
            "https://id.example/.well-known/oauth-authorization-server",
        ),
    ],
)
def test_the_error_names_where_the_issuer_says_how_tokens_are_given(issuer: str, well_known: str) -> None:
    told = json.loads(client_login.token_error(issuer, 'openid "db"'))
    assert told == {"status": "invalid_token", "openid-configuration": well_known, "scope": 'openid "db"'}


PIECES = st.sampled_from([b"n", b"y", b"p=", b",", b"a=", b"\x01", b"auth=", b"Bearer ", b"host", b"=", b"\0", b"x"])


@given(st.one_of(st.binary(max_size=80), st.lists(PIECES, max_size=12).map(b"".join)))
def test_whatever_a_client_says_is_a_token_or_a_fault(data: bytes) -> None:
    framer = _wire.Framer({})
    outcome = run(receive(framer), framer, [initial(data), DUMMY])
    if isinstance(outcome.ending, Raised):
        assert outcome.ending.sqlstate in ("08P01", "0A000", "28000")
    else:
        assert outcome.ending.reveal() in data
