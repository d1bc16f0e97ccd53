"""The login at a target with bytes alone: every method, and a target that does anything else.

Which message may come when is data here (MAY_COME): each type is tried in each state.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from pgauthproxy import _wire
from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.proto import messages, scram, target_login
from pgauthproxy.proto.steps import Login
from pgauthproxy.proto.target_login import TargetLimits
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Address, Greeting, Mapping
from tests.sans_io import Outcome, Raised, Turn, Waiting, run, run_in_every_chunking

LIMITS = TargetLimits(auth_request=150, error=300, message=200, scram_iterations=50)
USER, PASSWORD, SALT = b"reader", b"secret", b"\x01\xab\x00\xff"
HASH = md5_password(PASSWORD, USER)
SCRAM_SALT, ITERATIONS, NONCE_BYTES = b"sixteen bytes...", 3, b"N" * scram.NONCE_BYTES
PARAMETERS = ((b"user", USER), (b"database", b"shop"))
STARTUP = messages.startup_message(PARAMETERS)

OK = messages.authentication(messages.AUTH_OK)
MD5 = messages.authentication(messages.AUTH_MD5_PASSWORD, SALT)
CLEARTEXT = messages.authentication(messages.AUTH_CLEARTEXT_PASSWORD)
SASL = messages.authentication(messages.AUTH_SASL, b"SCRAM-SHA-256\0\0")
NEGOTIATE = messages.negotiate_protocol_version([b"_pq_.unheard_of"])
STATUS = _wire.message(messages.PARAMETER_STATUS, b"server_version\x0018.0\0")
NOTICE = _wire.message(messages.NOTICE_RESPONSE, b"SNOTICE\0C00000\0Mhello\0\0")
KEY = bytes(range(8))
KEY_DATA = messages.backend_key_data(KEY)
READY = _wire.message(messages.READY_FOR_QUERY, b"I")
GREETING = STATUS + KEY_DATA + READY


def error(sqlstate: bytes, text: bytes = b"the target's own words") -> bytes:
    return _wire.message(messages.ERROR_RESPONSE, b"SFATAL\0VFATAL\0C" + sqlstate + b"\0M" + text + b"\0\0")


@pytest.fixture(autouse=True)
def _known_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a login sends the same in every chunking."""
    monkeypatch.setattr(secrets, "token_bytes", lambda size: NONCE_BYTES[:size])


def mapping(credential: bytes | None = PASSWORD, *, is_md5: bool = False) -> Mapping:
    secret = None if credential is None else Secret(credential)
    return Mapping((Address("db", 5432),), PARAMETERS, secret, is_md5)


def logging_in(
    mapped: Mapping, *, private: bool = True, pass_text: bool = False
) -> Callable[[_wire.Framer], Login[Greeting]]:
    return lambda framer: target_login.target_login(
        framer, mapped, LIMITS, private_channel=private, pass_error_text=pass_text
    )


def logged_in(*turns: Turn, mapped: Mapping | None = None, **options: bool) -> Outcome:
    """How a login at such a target goes, in every chunking."""
    return run_in_every_chunking(logging_in(mapped or mapping(), **options), turns)


def refused(detail: str) -> Raised:
    """The gateway's own login failed, which is none of the client's business."""
    return Raised("target", "08004", b"the target server refused the gateway", detail)


def broke(detail: str) -> Raised:
    told = b"the target server broke the protocol"
    return Raised("target", "08P01", told, f"target broke the protocol: {detail}")


class ScramTarget:
    """The server's part of SCRAM-SHA-256 (RFC 5802), as turns; each message can be replaced."""

    def __init__(self, *, first: Callable[[bytes], bytes] | None = None, signature: bytes | None = None) -> None:
        self._first = first
        self._signature = signature

    def challenge(self, sent: bytes) -> bytes:
        client_nonce = sent.rpartition(b"n=,r=")[2]
        usual = b"r=%bserver,s=%b,i=%d" % (client_nonce, base64.b64encode(SCRAM_SALT), ITERATIONS)
        return messages.authentication(messages.AUTH_SASL_CONTINUE, self._first(client_nonce) if self._first else usual)

    def final(self, sent: bytes) -> bytes:
        client_first = sent[sent.rindex(b"n=,r=") : sent.rindex(b"p\0\0")]
        without_proof, _, proof = sent[sent.rindex(b"c=biws,") :].rpartition(b",p=")
        challenge = self.challenge(client_first)[9:]
        signed = b",".join((client_first, challenge, without_proof))
        salted = hashlib.pbkdf2_hmac("sha256", PASSWORD, SCRAM_SALT, ITERATIONS)
        stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
        client_signature = hmac.digest(stored, signed, "sha256")
        client_key = bytes(a ^ b for a, b in zip(base64.b64decode(proof), client_signature, strict=True))
        assert hashlib.sha256(client_key).digest() == stored, "the gateway's proof is wrong"
        signature = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256")
        verified = self._signature if self._signature is not None else b"v=" + base64.b64encode(signature)
        return messages.authentication(messages.AUTH_SASL_FINAL, verified)

    def turns(self, *behind: Turn) -> list[Turn]:
        return [SASL, self.challenge, self.final, *behind]


GREETED = Greeting(STATUS, KEY, READY)


def test_a_target_that_asks_for_nothing_lets_the_gateway_in() -> None:
    assert logged_in(OK + GREETING) == Outcome((STARTUP,), GREETED)
    assert logged_in(OK, STATUS, KEY_DATA, READY, mapped=mapping(None)) == Outcome((STARTUP,), GREETED)


@pytest.mark.parametrize("mapped", [mapping(), mapping(HASH, is_md5=True)], ids=["password", "hash"])
def test_md5_is_answered_with_a_password_or_its_hash(mapped: Mapping) -> None:
    answer = messages.password_message(md5_answer(HASH, SALT))
    assert logged_in(MD5, OK + GREETING, mapped=mapped) == Outcome((STARTUP, answer), GREETED)


@pytest.mark.parametrize("password", [PASSWORD, HASH, b"", "пароль".encode(), b"\xff"])
def test_cleartext_is_answered_on_a_private_channel(password: bytes) -> None:
    answer = messages.password_message(password)
    assert logged_in(CLEARTEXT, OK + GREETING, mapped=mapping(password)) == Outcome((STARTUP, answer), GREETED)


def test_scram_is_answered_and_the_server_must_prove_itself() -> None:
    outcome = logged_in(*ScramTarget().turns(OK + GREETING))
    assert outcome.ending == GREETED
    assert outcome.derived == ((SCRAM_SALT, ITERATIONS),)
    first = b"n,,n=,r=" + base64.b64encode(NONCE_BYTES)
    assert outcome.sent[:2] == (STARTUP, messages.sasl_initial_response(b"SCRAM-SHA-256", first))
    assert len(outcome.sent) == 3


def test_scram_works_over_a_network_without_tls_and_md5_too() -> None:
    assert logged_in(*ScramTarget().turns(OK + GREETING), private=False).ending == GREETED
    assert logged_in(MD5, OK + GREETING, private=False).ending == GREETED


@pytest.mark.parametrize(
    "mechanisms",
    [b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0", b"SCRAM-SHA-256\0OAUTHBEARER\0\0", b"X\0SCRAM-SHA-256\0Y\0\0"],
)
def test_the_one_mechanism_that_is_known_is_picked(mechanisms: bytes) -> None:
    offered = messages.authentication(messages.AUTH_SASL, mechanisms)
    outcome = logged_in(offered, *ScramTarget().turns(OK + GREETING)[1:])
    assert outcome.ending == GREETED
    assert outcome.sent[1][5:19] == b"SCRAM-SHA-256\0"


@pytest.mark.parametrize(
    "mechanisms",
    [b"", b"\0", b"SCRAM-SHA-1\0\0", b"SCRAM-SHA-256-PLUS\0\0", b"scram-sha-256\0\0", b"xSCRAM-SHA-256\0\0"],
)
def test_other_mechanisms_are_not_known(mechanisms: bytes) -> None:
    outcome = logged_in(messages.authentication(messages.AUTH_SASL, mechanisms))
    assert outcome == Outcome((STARTUP,), refused("target offers no SASL mechanism that the gateway knows"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (2, "Kerberos V5"),
        (6, "SCM credentials"),
        (7, "GSSAPI"),
        (8, "GSSAPI continuation"),
        (9, "SSPI"),
        (11, "SASL continuation"),
        (12, "SASL final"),
        (1, "1"),
        (4, "4"),
        (13, "13"),
        ((1 << 32) - 1, "4294967295"),
    ],
)
def test_other_methods_are_named_in_the_log(kind: int, name: str) -> None:
    outcome = logged_in(messages.authentication(kind, b"data"))
    assert outcome == Outcome((STARTUP,), refused(f"target asks for {name}, which the gateway cannot do"))


@pytest.mark.parametrize(
    ("request_", "what"),
    [(MD5, "MD5"), (CLEARTEXT, "a cleartext password"), (SASL, "SCRAM")],
    ids=["md5", "clear", "scram"],
)
def test_without_a_credential_nothing_can_be_answered(request_: bytes, what: str) -> None:
    outcome = logged_in(request_, mapped=mapping(None))
    assert outcome == Outcome((STARTUP,), refused(f"target asks for {what}, and the authenticator gave no credential"))


@pytest.mark.parametrize(
    ("request_", "what"), [(CLEARTEXT, "a cleartext password"), (SASL, "SCRAM")], ids=["clear", "scram"]
)
def test_a_hash_answers_nothing_but_md5(request_: bytes, what: str) -> None:
    outcome = logged_in(request_, mapped=mapping(HASH, is_md5=True))
    assert outcome == Outcome((STARTUP,), refused(f"target asks for {what}, which an md5 credential cannot answer"))


@pytest.mark.parametrize("mapped", [mapping(), mapping(None), mapping(HASH, is_md5=True)])
def test_no_password_goes_in_clear_where_others_can_read_it(mapped: Mapping) -> None:
    outcome = logged_in(CLEARTEXT, mapped=mapped, private=False)
    assert outcome == Outcome((STARTUP,), refused("target asks for the password in clear over a network without TLS"))


@pytest.mark.parametrize("salt", [b"", b"abc", b"abcde"])
def test_an_md5_request_has_four_bytes_of_salt(salt: bytes) -> None:
    outcome = logged_in(messages.authentication(messages.AUTH_MD5_PASSWORD, salt))
    assert outcome == Outcome((STARTUP,), broke("MD5 request without 4 bytes of salt"))


@pytest.mark.parametrize("body", [b"", b"\0", b"\0\0\0"])
def test_a_request_has_a_method(body: bytes) -> None:
    outcome = logged_in(_wire.message(messages.AUTHENTICATION, body))
    assert outcome == Outcome((STARTUP,), broke("authentication request without a method"))


@pytest.mark.parametrize("first", [[MD5], [CLEARTEXT], ScramTarget().turns()], ids=["md5", "clear", "scram"])
@pytest.mark.parametrize("second", [3, 5, 10, 11, 12, 7])
def test_there_is_one_exchange_and_no_second(first: list[Turn], second: int) -> None:
    outcome = logged_in(*first, messages.authentication(second, SALT))
    assert outcome.ending == broke(f"authentication request {second} after the one exchange there is")


@pytest.mark.parametrize("kind", [0, 3, 5, 7, 10, 12])
def test_nothing_but_a_challenge_follows_the_choice_of_scram(kind: int) -> None:
    outcome = logged_in(SASL, messages.authentication(kind, SALT))
    assert outcome.ending == broke(f"authentication request {kind} in the middle of a SASL exchange")
    assert len(outcome.sent) == 2


@pytest.mark.parametrize("kind", [0, 3, 5, 7, 10, 11])
def test_nothing_but_the_servers_proof_follows_ours(kind: int) -> None:
    outcome = logged_in(SASL, ScramTarget().challenge, messages.authentication(kind, SALT))
    assert outcome.ending == broke(f"authentication request {kind} in the middle of a SASL exchange")


@pytest.mark.parametrize(
    ("first", "detail"),
    [
        (lambda _: b"", "malformed server-first-message"),
        (lambda nonce: b"r=%bx,s=QUJD" % nonce, "malformed server-first-message"),
        (lambda nonce: b"r=%b,s=QUJD,i=1" % nonce, "the server's nonce does not extend ours, or is too long"),
        (lambda _: b"r=another,s=QUJD,i=1", "the server's nonce does not extend ours, or is too long"),
        (lambda nonce: b"r=%bx,s=?,i=1" % nonce, "the server's salt is not base64"),
        (lambda nonce: b"r=%bx,s=QUJD,i=51" % nonce, "the server asks for an iteration count outside 1 to 50"),
        (lambda nonce: b"r=%bx,s=QUJD,i=9999999" % nonce, "the server asks for an iteration count outside 1 to 50"),
    ],
)
def test_a_bad_challenge_is_not_answered(first: Callable[[bytes], bytes], detail: str) -> None:
    outcome = logged_in(SASL, ScramTarget(first=first).challenge)
    assert outcome.ending == broke(detail)
    assert len(outcome.sent) == 2
    assert outcome.derived == ()


@pytest.mark.parametrize(
    ("signature", "detail"),
    [
        (b"", "malformed server-final-message"),
        (b"e=other-error", "malformed server-final-message"),
        (b"v=?", "the server's signature is not base64"),
        (b"v=", "wrong server signature"),
        (b"v=" + base64.b64encode(bytes(32)), "wrong server signature"),
    ],
)
def test_a_server_that_does_not_know_the_password_gets_no_session(signature: bytes, detail: str) -> None:
    outcome = logged_in(*ScramTarget(signature=signature).turns(OK + GREETING))
    assert outcome.ending == broke(detail)


@dataclass(frozen=True)
class State:
    """A place in a login: what leads there, and which messages may come, each with its longest length."""

    before: Sequence[Turn]
    may_come: dict[str, int]


ASKED = {"R": LIMITS.auth_request, "E": LIMITS.error}
LET_IN = {"E": LIMITS.error, "N": LIMITS.error, "S": LIMITS.message, "K": LIMITS.message, "Z": 5}
MAY_COME = {
    "before the first message": State([], ASKED | {"v": LIMITS.message}),
    "after a negotiated version": State([NEGOTIATE], ASKED),
    "after the answer to md5": State([MD5], ASKED),
    "after the password in clear": State([CLEARTEXT], ASKED),
    "after the choice of SCRAM": State([SASL], ASKED),
    "after the proof": State(ScramTarget().turns()[:-1], ASKED),
    "after the server's proof": State(ScramTarget().turns(), ASKED),
    "after AuthenticationOk": State([OK], LET_IN),
    "after AuthenticationOk behind md5": State([MD5, OK], LET_IN),
    "after AuthenticationOk behind SCRAM": State(ScramTarget().turns(OK), LET_IN),
    "in the greeting": State([OK + STATUS], LET_IN),
    "after the key": State([OK + STATUS + KEY_DATA], LET_IN),
}


@pytest.mark.parametrize("name", MAY_COME)
def test_each_message_type_may_come_or_may_not(name: str) -> None:
    state = MAY_COME[name]
    for kind in range(256):
        framer = _wire.Framer({})
        outcome = run(logging_in(mapping())(framer), framer, [*state.before, bytes([kind])])
        if chr(kind) in state.may_come:
            assert outcome.ending == Waiting(), chr(kind)
        else:
            # Its one byte is enough: no length is believed.
            assert outcome.ending == broke(f"message of type 0x{kind:02x}, which may not come here")


@pytest.mark.parametrize("name", MAY_COME)
def test_each_message_has_its_longest_length(name: str) -> None:
    state = MAY_COME[name]
    for letter, longest in state.may_come.items():
        for length in (0, 3, longest + 1, (1 << 31) - 1, (1 << 32) - 1):
            framer = _wire.Framer({})
            header = letter.encode() + length.to_bytes(4)
            outcome = run(logging_in(mapping())(framer), framer, [*state.before, header])
            assert outcome.ending == broke(f"message '{letter}' of length {length}, allowed are 4 to {longest}")
        framer = _wire.Framer({})
        header = letter.encode() + longest.to_bytes(4)
        assert run(logging_in(mapping())(framer), framer, [*state.before, header]).ending == Waiting()


@pytest.mark.parametrize("name", MAY_COME)
def test_an_error_of_the_target_ends_the_login_in_every_state(name: str) -> None:
    outcome = logged_in(*MAY_COME[name].before, error(b"53300", b"too many"))
    told = b"sorry, too many clients already"
    assert outcome.ending == Raised("target", "53300", told, "target refused: 53300: too many")


@pytest.mark.parametrize("name", MAY_COME)
def test_a_target_that_says_nothing_more_is_waited_for(name: str) -> None:
    assert logged_in(*MAY_COME[name].before).ending == Waiting()


NEUTRAL = "the target server refused the connection"


@pytest.mark.parametrize(
    ("sqlstate", "told"),
    [
        ("3D000", "database does not exist"),
        ("53300", "sorry, too many clients already"),
        ("57P03", "the database system is not accepting connections"),
        ("22023", NEUTRAL),
        ("XX000", NEUTRAL),
        ("08P01", NEUTRAL),
    ],
)
def test_an_error_that_concerns_the_client_keeps_its_sqlstate(sqlstate: str, told: str) -> None:
    detail = f"target refused: {sqlstate}: role reader is mine"
    refusal = error(sqlstate.encode(), b"role reader is mine")
    assert logged_in(refusal).ending == Raised("target", sqlstate, told.encode(), detail)
    # The target's own words: only if they are wanted, and nobody else can have put them there.
    assert logged_in(refusal, pass_text=True, private=False).ending.told == told.encode()
    assert logged_in(refusal, pass_text=True).ending.told == b"role reader is mine"


def test_a_client_is_told_something_even_if_the_target_says_nothing() -> None:
    assert logged_in(error(b"22023", b""), pass_text=True).ending.told == NEUTRAL.encode()


@pytest.mark.parametrize("sqlstate", ["28000", "28P01"])
@pytest.mark.parametrize("pass_text", [False, True])
def test_the_gateways_own_credential_is_none_of_the_clients_business(sqlstate: str, *, pass_text: bool) -> None:
    detail = f'target refused: {sqlstate}: no password for "reader"'
    outcome = logged_in(MD5, error(sqlstate.encode(), b'no password for "reader"'), pass_text=pass_text)
    assert outcome.ending == refused(detail)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", ""),
        (b"\0", ""),
        (b"SFATAL\0Mhello\0\0", "hello"),
        (b"C123\0Mhello\0\0", "hello"),
        (b"C3d000\0\0", ""),
        (b"C3D000x\0\0", ""),
        (b"C\xff\xff\xff\xff\xff\0M\xff\0\0", "\\xff"),
        (b"Mcut off", "cut off"),
        (b"garbage", ""),
        (b"\0\0\0\0\0", ""),
    ],
)
@pytest.mark.parametrize("pass_text", [False, True])
def test_an_error_without_sqlstate_is_a_failed_connection(body: bytes, text: str, *, pass_text: bool) -> None:
    outcome = logged_in(_wire.message(messages.ERROR_RESPONSE, body), pass_text=pass_text)
    detail = f"target refused: no SQLSTATE: {text}"
    assert outcome.ending == Raised("target", "08006", NEUTRAL.encode(), detail)


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [
        (READY, Greeting(b"", b"", READY)),
        (STATUS + READY, Greeting(b"", b"", STATUS + READY)),
        (KEY_DATA + READY, Greeting(b"", KEY, READY)),
        (NOTICE + STATUS + KEY_DATA + NOTICE + STATUS + READY, Greeting(NOTICE + STATUS, KEY, NOTICE + STATUS + READY)),
    ],
)
def test_the_greeting_is_kept_unchanged_round_the_key(greeting: bytes, expected: Greeting) -> None:
    assert logged_in(OK + greeting).ending == expected


@pytest.mark.parametrize("size", [8, 36, 196])
def test_a_key_may_be_long(size: int) -> None:
    key = bytes(size)
    assert logged_in(OK + messages.backend_key_data(key) + READY).ending == Greeting(b"", key, READY)


@pytest.mark.parametrize(
    "keys", [messages.backend_key_data(bytes(7)), messages.backend_key_data(b""), KEY_DATA + KEY_DATA]
)
def test_a_cut_or_second_key_breaks_the_protocol(keys: bytes) -> None:
    assert logged_in(OK + keys).ending == broke("a second or cut BackendKeyData")


def test_a_greeting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_login, "MAX_GREETING_BYTES", 3 * len(STATUS))
    assert logged_in(OK + STATUS * 3 + READY).ending == Greeting(b"", b"", STATUS * 3 + READY)
    over = f"over {3 * len(STATUS)} bytes before ReadyForQuery"
    assert logged_in(OK + STATUS * 4).ending == broke(over)
    assert logged_in(OK + STATUS * 2 + KEY_DATA + STATUS * 2).ending == broke(over)


def test_a_ready_for_query_says_how_it_stands() -> None:
    empty = _wire.message(messages.READY_FOR_QUERY, b"")
    assert logged_in(OK + STATUS + empty).ending == broke("ReadyForQuery without a status")


def test_notices_count_as_greeting_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_login, "MAX_GREETING_BYTES", 2 * len(NOTICE))
    assert logged_in(OK + NOTICE * 3).ending == broke(f"over {2 * len(NOTICE)} bytes before ReadyForQuery")


def test_what_the_target_sends_behind_ready_for_query_is_left_in_order() -> None:
    rest = NOTICE + b"and anything else"
    assert logged_in(OK + GREETING + rest) == Outcome((STARTUP,), GREETED, rest)


def test_an_unknown_protocol_option_does_not_end_the_login() -> None:
    assert logged_in(NEGOTIATE, OK + GREETING) == Outcome((STARTUP,), GREETED)
    assert logged_in(NEGOTIATE, *ScramTarget().turns(OK + GREETING)).ending == GREETED


def test_no_fault_holds_a_credential() -> None:
    bad: list[list[Turn]] = [
        [CLEARTEXT, CLEARTEXT],
        [MD5, MD5],
        [SASL, MD5],
        ScramTarget(signature=b"v=AAAA").turns(),
        [messages.authentication(7)],
    ]
    for turns in bad:
        ending = logged_in(*turns).ending
        for text in (ending.detail.encode(), ending.told):
            assert PASSWORD not in text
            assert HASH[3:] not in text
