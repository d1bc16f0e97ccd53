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
from pgauthproxy.proto.scram import Keys
from pgauthproxy.proto.steps import Login, StartTls, TlsPlan
from pgauthproxy.proto.target_login import TargetLimits, TargetTerms, Welcome
from pgauthproxy.secret import Secret
from pgauthproxy.stages import (
    Accepted,
    Address,
    Encryption,
    Granted,
    Greeting,
    Mapping,
    Password,
    ProvedKeys,
    Started,
    StoredMd5,
)
from tests.sans_io import TLS, Outcome, Raised, Turn, Waiting, encrypted, run, run_in_every_chunking

LIMITS = TargetLimits(auth_request=150, error=300, message=200, scram_iterations=50)
USER, PASSWORD, SALT = b"reader", b"secret", b"\x01\xab\x00\xff"
HASH = md5_password(PASSWORD, USER)
SCRAM_SALT, ITERATIONS, NONCE_BYTES = b"sixteen bytes...", 3, b"N" * scram.NONCE_BYTES
PARAMETERS = ((b"user", USER), (b"database", b"shop"))
STARTUP = messages.startup_message(messages.PROTOCOL_3_0, PARAMETERS)
STARTED = Started(Accepted("1", "192.0.2.1:1"), ((b"user", b"alice"),))

OK = messages.authentication(messages.AUTH_OK)
MD5 = messages.authentication(messages.AUTH_MD5_PASSWORD, SALT)
CLEARTEXT = messages.authentication(messages.AUTH_CLEARTEXT_PASSWORD)
SASL = messages.authentication(messages.AUTH_SASL, b"SCRAM-SHA-256\0\0")
NEGOTIATE = messages.negotiate_protocol_version(messages.PROTOCOL_3_0, [b"_pq_.unheard_of"])
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


Credential = Password | StoredMd5 | ProvedKeys | None
WITH_PASSWORD, WITH_HASH = Password(Secret(PASSWORD)), StoredMd5(Secret(HASH))
KEYS = Keys.of(scram.salted_password(PASSWORD, SCRAM_SALT, ITERATIONS))
WITH_KEYS = ProvedKeys(Secret(KEYS.client), Secret(KEYS.server), SCRAM_SALT, ITERATIONS)
IN_TLS = TlsPlan(TLS, required=True, verified=False, direct=False)
UNBOUND, BINDING = encrypted(), b"the hash of a certificate"
BOUND = encrypted(binding=BINDING)


def logging_in(
    credential: Credential = WITH_PASSWORD,
    *,
    private: bool = True,
    pass_text: bool = False,
    version: int = messages.PROTOCOL_3_0,
    tls: TlsPlan | None = None,
    limits: TargetLimits = LIMITS,
) -> Callable[[_wire.Framer], Login[Welcome]]:
    granted = Granted(STARTED, Mapping((Address("db", 5432),), PARAMETERS, None), credential, 0.0)
    terms = TargetTerms(version, tls, private, pass_text, limits)
    return lambda framer: target_login.target_login(framer, granted, terms)


def logged_in(
    *turns: Turn, credential: Credential = WITH_PASSWORD, private: bool = True, pass_text: bool = False
) -> Outcome:
    """How a login in plain at such a target goes, in every chunking."""
    return run_in_every_chunking(logging_in(credential, private=private, pass_text=pass_text), turns)


def logged_in_over_tls(
    *turns: Turn,
    encryption: Encryption = UNBOUND,
    tls: TlsPlan = IN_TLS,
    credential: Credential = WITH_PASSWORD,
    private: bool = False,
    pass_text: bool = False,
) -> Outcome:
    """How it goes once the target has agreed to TLS; what was said for that is left out."""
    login = logging_in(credential, private=private, tls=tls, pass_text=pass_text)
    outcome = run_in_every_chunking(login, [b"S", *turns], encryption=encryption)
    assert outcome.sent[:2] == (messages.ssl_request(), StartTls(TLS))
    return Outcome(outcome.sent[2:], outcome.ending, outcome.rest, outcome.derived)


def let_in(before_key: bytes, key: bytes, after_key: bytes) -> Welcome:
    return Welcome(Greeting(before_key, key, after_key), None)


def refused(detail: str) -> Raised:
    """The gateway's own login failed, which is none of the client's business."""
    return Raised("target", "08004", b"the target server refused the gateway", detail)


def broke(detail: str) -> Raised:
    told = b"the target server broke the protocol"
    return Raised("target", "08P01", told, f"target broke the protocol: {detail}")


class ScramTarget:
    """The server's part of SCRAM-SHA-256 (RFC 5802), as turns; each message can be replaced.

    `header` and `binding` are what the client must be bound with.
    """

    def __init__(
        self,
        *,
        first: Callable[[bytes], bytes] | None = None,
        signature: bytes | None = None,
        header: bytes = b"n,,",
        binding: bytes = b"",
    ) -> None:
        self._first = first
        self._signature = signature
        self._bound = b"c=" + base64.b64encode(header + binding) + b","

    def challenge(self, sent: bytes) -> bytes:
        client_nonce = sent.rpartition(b"n=,r=")[2]
        usual = b"r=%bserver,s=%b,i=%d" % (client_nonce, base64.b64encode(SCRAM_SALT), ITERATIONS)
        return messages.authentication(messages.AUTH_SASL_CONTINUE, self._first(client_nonce) if self._first else usual)

    def final(self, sent: bytes) -> bytes:
        client_first = sent[sent.rindex(b"n=,r=") : sent.rindex(b"p\0\0")]
        without_proof, _, proof = sent[sent.rindex(self._bound) :].rpartition(b",p=")
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


GREETED = let_in(STATUS, KEY, READY)
GREETED_IN_TLS = Welcome(GREETED.greeting, UNBOUND)


def test_a_target_that_asks_for_nothing_lets_the_gateway_in() -> None:
    assert logged_in(OK + GREETING) == Outcome((STARTUP,), GREETED)
    assert logged_in(OK, STATUS, KEY_DATA, READY, credential=None) == Outcome((STARTUP,), GREETED)


@pytest.mark.parametrize("credential", [WITH_PASSWORD, WITH_HASH], ids=["password", "hash"])
def test_md5_is_answered_with_a_password_or_its_hash(credential: Credential) -> None:
    answer = messages.password_message(md5_answer(HASH, SALT))
    assert logged_in(MD5, OK + GREETING, credential=credential) == Outcome((STARTUP, answer), GREETED)


@pytest.mark.parametrize("password", [PASSWORD, HASH, b"", "пароль".encode(), b"\xff"])
def test_cleartext_is_answered_on_a_private_channel(password: bytes) -> None:
    answer = messages.password_message(password)
    typed = Password(Secret(password))
    assert logged_in(CLEARTEXT, OK + GREETING, credential=typed) == Outcome((STARTUP, answer), GREETED)


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
    [b"SCRAM-SHA-256\0\0", b"SCRAM-SHA-256\0OAUTHBEARER\0\0", b"X\0SCRAM-SHA-256\0Y\0\0"],
)
def test_the_one_mechanism_that_is_known_is_picked(mechanisms: bytes) -> None:
    offered = messages.authentication(messages.AUTH_SASL, mechanisms)
    outcome = logged_in(offered, *ScramTarget().turns(OK + GREETING)[1:])
    assert outcome.ending == GREETED
    chosen = outcome.sent[1]
    assert isinstance(chosen, bytes)
    assert chosen[5:19] == b"SCRAM-SHA-256\0"


@pytest.mark.parametrize(
    "mechanisms",
    [b"", b"\0", b"SCRAM-SHA-1\0\0", b"scram-sha-256\0\0", b"xSCRAM-SHA-256\0\0", b"SCRAM-SHA-256-plus\0\0"],
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
    outcome = logged_in(request_, credential=None)
    assert outcome == Outcome((STARTUP,), refused(f"target asks for {what}, and the authenticator gave no credential"))


@pytest.mark.parametrize(
    ("request_", "what"), [(CLEARTEXT, "a cleartext password"), (SASL, "SCRAM")], ids=["clear", "scram"]
)
def test_a_hash_answers_nothing_but_md5(request_: bytes, what: str) -> None:
    outcome = logged_in(request_, credential=WITH_HASH)
    assert outcome == Outcome((STARTUP,), refused(f"target asks for {what}, which an md5 credential cannot answer"))


@pytest.mark.parametrize(
    ("request_", "what"), [(CLEARTEXT, "a cleartext password"), (MD5, "MD5")], ids=["clear", "md5"]
)
def test_what_a_client_has_proved_answers_nothing_but_scram(request_: bytes, what: str) -> None:
    outcome = logged_in(request_, credential=WITH_KEYS)
    assert outcome == Outcome(
        (STARTUP,), refused(f"target asks for {what}, which what the client proved cannot answer")
    )


def test_what_a_client_has_proved_answers_scram_without_any_password() -> None:
    outcome = logged_in(*ScramTarget().turns(OK + GREETING), credential=WITH_KEYS)
    assert outcome.ending == GREETED
    assert outcome.derived == ()
    by_password = logged_in(*ScramTarget().turns(OK + GREETING))
    assert outcome.sent == by_password.sent


@pytest.mark.parametrize(
    "proved",
    [
        ProvedKeys(WITH_KEYS.client_key, WITH_KEYS.server_key, b"another salt....", ITERATIONS),
        ProvedKeys(WITH_KEYS.client_key, WITH_KEYS.server_key, SCRAM_SALT, ITERATIONS + 1),
    ],
    ids=["salt", "iterations"],
)
def test_what_a_client_has_proved_is_shown_to_no_target_that_stores_another_verifier(proved: ProvedKeys) -> None:
    outcome = logged_in(SASL, ScramTarget().challenge, credential=proved)
    assert outcome.ending == refused("target does not store the verifier that the client was held to")
    assert len(outcome.sent) == 2


def test_a_target_must_prove_itself_to_what_a_client_has_proved_too() -> None:
    impostor = ProvedKeys(WITH_KEYS.client_key, Secret(bytes(32)), SCRAM_SALT, ITERATIONS)
    outcome = logged_in(*ScramTarget().turns(OK + GREETING), credential=impostor)
    assert outcome.ending == broke("wrong server signature")


every_credential = pytest.mark.parametrize(
    "credential", [WITH_PASSWORD, None, WITH_HASH, WITH_KEYS], ids=["password", "none", "hash", "keys"]
)


@every_credential
def test_no_password_goes_in_clear_where_others_can_read_it(credential: Credential) -> None:
    outcome = logged_in(CLEARTEXT, credential=credential, private=False)
    assert outcome == Outcome((STARTUP,), refused("target asks for the password in clear over a network without TLS"))


@pytest.mark.parametrize("verified", [False, True])
def test_a_password_goes_in_clear_over_tls_that_is_required(*, verified: bool) -> None:
    plan = TlsPlan(TLS, required=True, verified=verified, direct=False)
    outcome = logged_in_over_tls(CLEARTEXT, OK + GREETING, tls=plan)
    assert outcome == Outcome((STARTUP, messages.password_message(PASSWORD)), GREETED_IN_TLS)


PREFERRED = TlsPlan(TLS, required=False, verified=False, direct=False)


@every_credential
def test_no_password_goes_in_clear_over_tls_that_is_merely_preferred(credential: Credential) -> None:
    outcome = logged_in_over_tls(CLEARTEXT, tls=PREFERRED, credential=credential)
    detail = "target asks for the password in clear over TLS that is not required"
    assert outcome == Outcome((STARTUP,), refused(detail))


def test_no_password_goes_in_clear_behind_a_refusal_of_tls() -> None:
    login = logging_in(private=False, tls=PREFERRED)
    outcome = run_in_every_chunking(login, [b"N", CLEARTEXT])
    detail = "target asks for the password in clear over a network without TLS"
    assert outcome == Outcome((messages.ssl_request(), STARTUP), refused(detail))


def test_over_tls_on_a_private_channel_a_password_goes_in_clear_however_tls_came_about() -> None:
    outcome = logged_in_over_tls(CLEARTEXT, OK + GREETING, tls=PREFERRED, private=True)
    assert outcome == Outcome((STARTUP, messages.password_message(PASSWORD)), GREETED_IN_TLS)


BOTH_MECHANISMS = messages.authentication(messages.AUTH_SASL, b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")
PLUS_ALONE = messages.authentication(messages.AUTH_SASL, b"SCRAM-SHA-256-PLUS\0\0")


@pytest.mark.parametrize("offer", [BOTH_MECHANISMS, PLUS_ALONE], ids=["both", "alone"])
def test_where_both_sides_can_bind_they_do(offer: bytes) -> None:
    target = ScramTarget(header=scram.BINDS, binding=BINDING)
    outcome = logged_in_over_tls(offer, *target.turns(OK + GREETING)[1:], encryption=BOUND)
    assert outcome.ending == Welcome(GREETED.greeting, BOUND)
    first = b"p=tls-server-end-point,,n=,r=" + base64.b64encode(NONCE_BYTES)
    assert outcome.sent[:2] == (STARTUP, messages.sasl_initial_response(b"SCRAM-SHA-256-PLUS", first))


def test_what_a_client_has_proved_is_bound_to_this_channel() -> None:
    target = ScramTarget(header=scram.BINDS, binding=BINDING)
    turns = [PLUS_ALONE, *target.turns(OK + GREETING)[1:]]
    outcome = logged_in_over_tls(*turns, encryption=BOUND, credential=WITH_KEYS)
    assert outcome.ending == Welcome(GREETED.greeting, BOUND)


@pytest.mark.parametrize(
    ("offer", "encryption", "header"),
    [(SASL, BOUND, b"y,,"), (SASL, UNBOUND, b"n,,"), (BOTH_MECHANISMS, UNBOUND, b"n,,")],
    ids=["the target does not offer it", "neither", "the certificate has no hash"],
)
def test_where_one_side_cannot_bind_the_other_is_told_so(offer: bytes, encryption: Encryption, header: bytes) -> None:
    turns = [offer, *ScramTarget(header=header).turns(OK + GREETING)[1:]]
    outcome = logged_in_over_tls(*turns, encryption=encryption)
    assert outcome.ending == Welcome(GREETED.greeting, encryption)
    first = header + b"n=,r=" + base64.b64encode(NONCE_BYTES)
    assert outcome.sent[1] == messages.sasl_initial_response(b"SCRAM-SHA-256", first)


@pytest.mark.parametrize("offer", [BOTH_MECHANISMS, PLUS_ALONE], ids=["both", "alone"])
@every_credential
def test_plus_without_tls_breaks_the_protocol(offer: bytes, credential: Credential) -> None:
    outcome = logged_in(offer, credential=credential)
    assert outcome == Outcome((STARTUP,), broke("SCRAM-SHA-256-PLUS offered without TLS"))


def test_plus_alone_is_not_known_where_the_certificate_has_no_hash() -> None:
    outcome = logged_in_over_tls(PLUS_ALONE)
    assert outcome == Outcome((STARTUP,), refused("target offers no SASL mechanism that the gateway knows"))


NOT_OVER_TLS = Raised(
    "target", "08001", b"could not connect to the target server", "target does not let this role in over TLS"
)


def test_where_tls_is_merely_preferred_a_role_that_may_not_use_it_is_tried_without() -> None:
    assert logged_in_over_tls(error(b"28000"), tls=PREFERRED) == Outcome((STARTUP,), NOT_OVER_TLS)
    assert logged_in_over_tls(NEGOTIATE, error(b"28000"), tls=PREFERRED) == Outcome((STARTUP,), NOT_OVER_TLS)


def test_that_is_no_reason_to_go_without_tls_where_it_is_required_or_the_role_was_asked_for_something() -> None:
    detail = "target refused: 28000: the target's own words"
    assert logged_in_over_tls(error(b"28000")).ending == refused(detail)
    assert logged_in_over_tls(MD5, error(b"28000"), tls=PREFERRED).ending == refused(detail)
    assert run_in_every_chunking(logging_in(tls=PREFERRED), [b"N", error(b"28000")]).ending == refused(detail)
    assert logged_in(error(b"28000")).ending == refused(detail)


@pytest.mark.parametrize("sqlstate", ["28P01", "53300", "57P03", "08P01"])
def test_another_refusal_is_no_reason_to_go_without_tls(sqlstate: str) -> None:
    ending = logged_in_over_tls(error(sqlstate.encode()), tls=PREFERRED).ending
    assert ending.detail == f"target refused: {sqlstate}: the target's own words"


@pytest.mark.parametrize("version", [messages.PROTOCOL_3_0, messages.PROTOCOL_3_2])
def test_the_target_is_asked_for_the_version_that_the_terms_name(version: int) -> None:
    outcome = run_in_every_chunking(logging_in(version=version), [NEGOTIATE, OK + GREETING])
    assert outcome == Outcome((messages.startup_message(version, PARAMETERS),), GREETED)


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
        outcome = run(logging_in()(framer), framer, [*state.before, bytes([kind])])
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
            outcome = run(logging_in()(framer), framer, [*state.before, header])
            assert outcome.ending == broke(f"message '{letter}' of length {length}, allowed are 4 to {longest}")
        framer = _wire.Framer({})
        header = letter.encode() + longest.to_bytes(4)
        assert run(logging_in()(framer), framer, [*state.before, header]).ending == Waiting()


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
    for verified in (False, True):
        plan = TlsPlan(TLS, required=True, verified=verified, direct=False)
        own_words = b"role reader is mine" if verified else told.encode()
        assert logged_in_over_tls(refusal, tls=plan, pass_text=True).ending.told == own_words
        assert logged_in_over_tls(refusal, tls=plan).ending.told == told.encode()


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
        (READY, let_in(b"", b"", READY)),
        (STATUS + READY, let_in(b"", b"", STATUS + READY)),
        (KEY_DATA + READY, let_in(b"", KEY, READY)),
        (NOTICE + STATUS + KEY_DATA + NOTICE + STATUS + READY, let_in(NOTICE + STATUS, KEY, NOTICE + STATUS + READY)),
    ],
)
def test_the_greeting_is_kept_unchanged_round_the_key(greeting: bytes, expected: Welcome) -> None:
    assert logged_in(OK + greeting).ending == expected


@pytest.mark.parametrize("size", [8, 36, 196])
def test_a_key_may_be_long(size: int) -> None:
    key = bytes(size)
    assert logged_in(OK + messages.backend_key_data(key) + READY).ending == let_in(b"", key, READY)


@pytest.mark.parametrize("keys", [*(messages.backend_key_data(bytes(size)) for size in (0, 4, 7)), KEY_DATA * 2])
def test_a_cut_or_second_key_breaks_the_protocol(keys: bytes) -> None:
    assert logged_in(OK + keys).ending == broke("a second BackendKeyData, or one of a wrong length")


@pytest.mark.parametrize("longer", [0, 1, 100])
def test_a_key_is_no_longer_than_the_protocol_has_it(longer: int) -> None:
    roomy = TargetLimits(auth_request=150, error=300, message=1000, scram_iterations=50)
    key = bytes(4 + 256 + longer)
    framer = _wire.Framer({})
    outcome = run(logging_in(limits=roomy)(framer), framer, [OK + messages.backend_key_data(key) + READY])
    broken = broke("a second BackendKeyData, or one of a wrong length")
    assert outcome.ending == (broken if longer else let_in(b"", key, READY))


def test_a_greeting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_login, "MAX_GREETING_BYTES", 3 * len(STATUS))
    assert logged_in(OK + STATUS * 3 + READY).ending == let_in(b"", b"", STATUS * 3 + READY)
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
        [BOTH_MECHANISMS],
    ]
    credentials: list[Credential] = [WITH_PASSWORD, WITH_HASH, WITH_KEYS]
    for turns in bad:
        for credential in credentials:
            ending = logged_in(*turns, credential=credential).ending
            for text in (ending.detail.encode(), ending.told):
                assert PASSWORD not in text
                assert HASH[3:] not in text
                assert KEYS.client not in text
