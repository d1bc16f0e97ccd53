"""How TLS comes about with a target, with bytes alone: what its one byte means, and what nobody may put behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pgauthproxy import _wire
from pgauthproxy.proto import messages, target_tls
from pgauthproxy.proto.steps import Login, StartTls, TlsPlan
from pgauthproxy.stages import Encryption
from tests.sans_io import TLS, Outcome, Raised, Turn, Waiting, encrypted, run, run_in_every_chunking

REQUEST = messages.ssl_request()
AGREED = encrypted()
PREFERRED = TlsPlan(TLS, required=False, verified=False, direct=False)
REQUIRED = TlsPlan(TLS, required=True, verified=False, direct=False)
VERIFIED = TlsPlan(TLS, required=True, verified=True, direct=False)
DIRECT = TlsPlan(TLS, required=True, verified=True, direct=True)
asking = pytest.mark.parametrize("plan", [PREFERRED, REQUIRED, VERIFIED], ids=["preferred", "required", "verified"])


def starting(plan: TlsPlan | None) -> Callable[[_wire.Framer], Login[Encryption | None]]:
    return lambda framer: target_tls.start_tls(framer, plan)


def started(plan: TlsPlan | None, *turns: Turn, encryption: Encryption = AGREED) -> Outcome:
    """How it goes, in every chunking."""
    return run_in_every_chunking(starting(plan), turns, encryption=encryption)


def started_whole(plan: TlsPlan, turn: bytes) -> Outcome:
    """How it goes if all of this is here when its first byte is looked at."""
    framer = _wire.Framer({})
    return run(starting(plan)(framer), framer, [turn], encryption=AGREED)


def came_to_nothing(detail: str) -> Raised:
    return Raised("target", "08001", b"could not connect to the target server", detail)


def test_without_a_plan_nothing_is_asked_and_nothing_read() -> None:
    framer = _wire.Framer({})
    framer.feed(b"S")
    assert run(starting(None)(framer), framer, []) == Outcome((), None, b"S")


@asking
def test_a_yes_is_followed_by_tls_at_once(plan: TlsPlan) -> None:
    assert started(plan, b"S") == Outcome((REQUEST, StartTls(TLS)), AGREED)


@asking
def test_behind_a_request_no_application_protocol_is_needed(plan: TlsPlan) -> None:
    agreed = encrypted(alpn="")
    assert started(plan, b"S", encryption=agreed).ending == agreed


def test_a_no_is_plain_where_tls_is_preferred_and_the_end_where_it_is_required() -> None:
    assert started(PREFERRED, b"N") == Outcome((REQUEST,), None)
    for plan in (REQUIRED, VERIFIED):
        ending = came_to_nothing("target speaks no TLS, which is required")
        assert started(plan, b"N") == Outcome((REQUEST,), ending)


@asking
def test_any_other_answer_is_neither(plan: TlsPlan) -> None:
    detail = "target answered the SSL request with something else than yes or no"
    for answer in range(256):
        if answer not in b"SN":
            assert started_whole(plan, bytes([answer])) == Outcome((REQUEST,), came_to_nothing(detail))


@asking
def test_an_error_in_plain_is_not_believed_and_nothing_of_it_is_told(plan: TlsPlan) -> None:
    forged = messages.fatal("28000", b"please log in at evil.example.com")
    ending = started(plan, forged).ending
    assert (ending.sqlstate, ending.told) == ("08001", b"could not connect to the target server")
    assert "evil" not in ending.detail


@asking
@pytest.mark.parametrize("answer", [b"S", b"N"])
@pytest.mark.parametrize("behind", [b"\0", b"S", messages.authentication(messages.AUTH_OK), b"\x16\x03\x03\0\x01"])
def test_bytes_in_plain_behind_the_answer_are_an_attack(plan: TlsPlan, answer: bytes, behind: bytes) -> None:
    detail = "target sent bytes in plain behind its answer to the SSL request"
    assert started_whole(plan, answer + behind) == Outcome((REQUEST,), came_to_nothing(detail))


@asking
def test_a_target_that_does_not_answer_is_waited_for(plan: TlsPlan) -> None:
    assert started(plan) == Outcome((REQUEST,), Waiting())


def test_direct_tls_begins_without_a_word() -> None:
    assert started(DIRECT) == Outcome((StartTls(TLS),), AGREED)


@pytest.mark.parametrize("alpn", ["", "http/1.1", "postgresql2", "PostgreSQL"])
def test_direct_tls_without_our_application_protocol_comes_to_nothing(alpn: str) -> None:
    detail = "target speaks direct TLS without the application protocol postgresql"
    outcome = started(DIRECT, encryption=encrypted(alpn=alpn))
    assert outcome == Outcome((StartTls(TLS),), came_to_nothing(detail))
