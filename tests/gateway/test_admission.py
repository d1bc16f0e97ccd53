"""How clients are let in: who is asked first, what is compared, and that nobody learns who exists."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pgauthproxy import _wire
from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.auth.model import Denied, Question
from pgauthproxy.errors import AuthenticatorFault, ClientFault, Fault
from pgauthproxy.gateway.admission import Admission
from pgauthproxy.gateway.client_leg import ClientLeg, ClientPolicy
from pgauthproxy.proto import messages, scram
from pgauthproxy.proto.scram import Keys, ScramClient, Verifier
from pgauthproxy.secret import Secret
from pgauthproxy.stages import (
    Accepted,
    Address,
    Certificate,
    Encryption,
    FromClient,
    Granted,
    Mapping,
    Password,
    ProvedKeys,
    Started,
    StoredMd5,
)
from tests.gateway.legs import SECONDS, ConnectLeg, Side, until, until_it_waits
from tests.sans_io import encrypted

USER, PASSWORD, SALT, ITERATIONS = b"alice", b"secret", b"sixteen bytes...", 5
HASH = md5_password(PASSWORD, USER)
VERIFIER = Verifier.of(PASSWORD, SALT, ITERATIONS)
TARGETS_OWN = Password(Secret(b"the target's"))
SEED = Secret(b"seed")


class Deciding:
    """An authenticator whose answer a test has made up; it keeps what it was asked."""

    def __init__(self, answer: Mapping | Exception) -> None:
        self.answer = answer
        self.questions: list[Question] = []

    async def ask(self, question: Question) -> Mapping:
        self.questions.append(question)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self) -> None:
        return


def mapped(
    credential: Password | StoredMd5 | FromClient | None = TARGETS_OWN, verifier: bytes | None = None
) -> Mapping:
    secret = None if verifier is None else Secret(verifier)
    return Mapping((Address("db", 5432),), ((b"user", b"reader"),), credential, secret)


def started(encryption: Encryption | None = None) -> Started:
    return Started(Accepted("1", "192.0.2.1:1"), ((b"user", USER),), encryption)


class Client:
    """A client of a leg: it answers what it is asked with a password."""

    def __init__(self, side: Side, password: bytes, encryption: Encryption | None) -> None:
        self._side = side
        self._password = password
        self._binding = b"" if encryption is None else encryption.binding
        self._read = 0

    async def _is_asked(self) -> tuple[int, bytes]:
        """The next authentication request: its method and data."""
        await until(lambda: len(self._side.transport.written) > self._read, "an authentication request")
        framer = _wire.Framer({messages.AUTHENTICATION: 2000})
        framer.feed(self._side.transport.written[self._read :])
        found = framer.message()
        assert found is not None
        self._read = len(self._side.transport.written) - framer.pending
        return messages.parse_authentication(found[1])

    async def by_password(self) -> None:
        method, data = await self._is_asked()
        if method == messages.AUTH_MD5_PASSWORD:
            answer = md5_answer(md5_password(self._password, USER), data)
        else:
            assert method == messages.AUTH_CLEARTEXT_PASSWORD
            answer = self._password
        self._side.receive(messages.password_message(answer))

    async def by_scram(self) -> list[bytes]:
        """What it was shown: the mechanisms, and the challenge without its nonce."""
        method, mechanisms = await self._is_asked()
        assert method == messages.AUTH_SASL
        header, mechanism = scram.CANNOT_BIND, scram.MECHANISM
        if self._binding:
            header, mechanism = scram.BINDS, scram.MECHANISM_PLUS
        exchange = ScramClient(scram.fresh_nonce(), header, self._binding)
        self._side.receive(messages.sasl_initial_response(mechanism, exchange.first()))
        method, first = await self._is_asked()
        assert method == messages.AUTH_SASL_CONTINUE
        challenge = exchange.challenge(first, 10_000)
        keys = Keys.of(scram.salted_password(self._password, challenge.salt, challenge.iterations))
        self._side.receive(messages.sasl_response(exchange.final(challenge, keys)))
        return [mechanisms, first.partition(b",")[2]]


def policy(method: str) -> ClientPolicy:
    return ClientPolicy(method, 10_000, 65_535, 1024, tls_required=False)


@pytest.fixture
def admit(connect_leg: ConnectLeg) -> Callable[..., tuple[Any, Any]]:
    """Lets one client in, or not: what comes of it, and what the client was shown."""

    def run(
        method: str,
        authenticator: Deciding,
        password: bytes = PASSWORD,
        encryption: Encryption | None = None,
        talks: bool = True,
    ) -> tuple[Any, Any]:
        side = connect_leg()
        leg = side.leg
        assert isinstance(leg, ClientLeg)
        admission = Admission(authenticator, policy(method), SEED, scram_iterations=ITERATIONS)
        client = Client(side, password, encryption)

        async def scenario() -> tuple[Any, Any]:
            admitting = asyncio.create_task(admission.admit(started(encryption), leg, lambda: None))
            shown = None
            if talks:
                shown = await (client.by_scram() if method == "scram-sha-256" else client.by_password())
            async with asyncio.timeout(SECONDS):
                try:
                    return await admitting, shown
                except Fault as fault:
                    return fault, shown

        return asyncio.run(scenario())

    return run


Admit = Callable[..., tuple[Any, Any]]
either_way = pytest.mark.parametrize("method", ["md5", "cleartext"])


@either_way
def test_a_password_is_judged_by_the_authenticator(admit: Admit, method: str) -> None:
    mapping = mapped()
    authenticator = Deciding(mapping)
    granted, _ = admit(method, authenticator, b"anything")
    (question,) = authenticator.questions
    assert (question.started, question.method) == (started(), method)
    assert question.credential is not None
    if method == "md5":
        assert question.credential.reveal() == md5_answer(md5_password(b"anything", USER), question.salt)
    else:
        assert (question.credential.reveal(), question.salt) == (b"anything", bytes(4))
    assert granted == Granted(started(), mapping, TARGETS_OWN, granted.authenticator_seconds)


@pytest.mark.parametrize(
    ("method", "verifier"),
    [("md5", HASH), ("cleartext", HASH), ("cleartext", VERIFIER.text())],
    ids=["md5", "cleartext, hash", "cleartext, verifier"],
)
@pytest.mark.parametrize("password", [PASSWORD, b"Secret", b"secret ", b"", HASH, b"x" * 1000])
def test_a_password_is_compared_where_the_authenticator_gives_a_verifier(
    admit: Admit, method: str, verifier: bytes, password: bytes
) -> None:
    outcome, _ = admit(method, Deciding(mapped(verifier=verifier)), password)
    if password == PASSWORD:
        assert isinstance(outcome, Granted)
        return
    assert isinstance(outcome, ClientFault)
    assert (outcome.sqlstate, outcome.told) == ("28P01", b'password authentication failed for user "alice"')
    assert outcome.detail in ("wrong password", "empty password")


@pytest.mark.parametrize(
    ("method", "verifier"),
    [
        ("md5", VERIFIER.text()),
        ("md5", HASH.upper()),
        ("md5", b"nonsense"),
        ("cleartext", b"nonsense"),
        ("cleartext", PASSWORD),
        ("cleartext", VERIFIER.text()[:-1]),
        ("scram-sha-256", None),
        ("scram-sha-256", HASH),
        ("scram-sha-256", b"nonsense"),
    ],
)
def test_a_verifier_that_cannot_be_compared_lets_nobody_in(admit: Admit, method: str, verifier: bytes | None) -> None:
    outcome, _ = admit(method, Deciding(mapped(verifier=verifier)), talks=method != "scram-sha-256")
    assert isinstance(outcome, AuthenticatorFault)
    assert outcome.told == b"authentication service failed"
    assert "_META_SOURCE_VERIFIER" in outcome.detail
    assert "secret" not in outcome.detail


@pytest.mark.parametrize("encryption", [None, encrypted(), encrypted(binding=b"hash")], ids=["plain", "TLS", "bound"])
def test_a_client_proves_by_scram_that_it_knows_what_the_authenticator_has_given(
    admit: Admit, encryption: Encryption | None
) -> None:
    authenticator = Deciding(mapped(verifier=VERIFIER.text()))
    granted, _ = admit("scram-sha-256", authenticator, encryption=encryption)
    # It is asked before the client has answered anything.
    assert authenticator.questions == [Question(started(encryption), "scram-sha-256")]
    assert granted.credential == TARGETS_OWN
    wrong, _ = admit("scram-sha-256", authenticator, b"wrong", encryption)
    assert (wrong.sqlstate, wrong.told) == ("28P01", b'password authentication failed for user "alice"')


@pytest.mark.parametrize("encryption", [None, encrypted(binding=b"hash")], ids=["plain", "bound"])
def test_who_is_refused_is_shown_what_anybody_is_and_fails_at_the_end(
    admit: Admit, encryption: Encryption | None
) -> None:
    denied = Deciding(Denied("no such user"))
    outcomes = [admit("scram-sha-256", denied, encryption=encryption) for _ in range(2)]
    known, shown_to_known = admit("scram-sha-256", Deciding(mapped(verifier=VERIFIER.text())), b"wrong", encryption)
    for fault, shown in outcomes:
        assert (fault.sqlstate, fault.told) == (known.sqlstate, known.told)
        assert fault.detail == "no such user"
        # The same salt each time, and everything as long as a real one.
        assert shown == outcomes[0][1]
        assert shown[0] == shown_to_known[0]
        assert len(shown[1]) == len(shown_to_known[1])


def test_who_is_refused_and_breaks_the_protocol_is_told_that(connect_leg: ConnectLeg) -> None:
    async def scenario() -> None:
        side = connect_leg()
        assert isinstance(side.leg, ClientLeg)
        admission = Admission(Deciding(Denied("no such user")), policy("scram-sha-256"), SEED, ITERATIONS)
        admitting = asyncio.create_task(admission.admit(started(), side.leg, lambda: None))
        await until_it_waits()
        side.receive(messages.password_message(b"secret"))
        with pytest.raises(ClientFault, match="malformed SCRAM message"):
            await asyncio.wait_for(admitting, SECONDS)

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["md5", "cleartext", "scram-sha-256"])
@pytest.mark.parametrize("told", [None, b"your account is locked"])
def test_a_no_is_a_wrong_password_unless_the_authenticator_words_it(
    admit: Admit, method: str, told: bytes | None
) -> None:
    fault, _ = admit(method, Deciding(Denied("locked", told)))
    assert isinstance(fault, ClientFault)
    usual = b'password authentication failed for user "alice"'
    assert (fault.sqlstate, fault.told, fault.detail) == ("28P01", told or usual, "locked")


CERTIFICATE = Certificate("CN=alice", "CN=authority", "1", "", "ab" * 32)
WITH_CERTIFICATE = Encryption("TLSv1.3", "", "", "", b"", CERTIFICATE)


def test_a_certificate_is_all_that_a_client_needs_where_it_is_asked_for(admit: Admit) -> None:
    authenticator = Deciding(mapped())
    granted, _ = admit("cert", authenticator, encryption=WITH_CERTIFICATE, talks=False)
    assert authenticator.questions == [Question(started(WITH_CERTIFICATE), "cert")]
    assert granted.credential == TARGETS_OWN


@pytest.mark.parametrize("encryption", [None, encrypted()], ids=["plain", "TLS"])
def test_nobody_is_asked_about_a_client_without_the_certificate_that_it_needs(
    admit: Admit, encryption: Encryption | None
) -> None:
    authenticator = Deciding(mapped())
    fault, _ = admit("cert", authenticator, encryption=encryption, talks=False)
    assert (fault.sqlstate, fault.told) == ("28000", b"connection requires a valid client certificate")
    assert authenticator.questions == []


def test_a_certificate_that_the_authenticator_does_not_like_lets_nobody_in(admit: Admit) -> None:
    fault, _ = admit("cert", Deciding(Denied("revoked")), encryption=WITH_CERTIFICATE, talks=False)
    assert (fault.sqlstate, fault.detail) == ("28P01", "revoked")


def test_what_the_client_proved_is_the_credential_where_that_is_wished_for(admit: Admit) -> None:
    granted, _ = admit("cleartext", Deciding(mapped(FromClient())))
    assert granted.credential == Password(Secret(PASSWORD))
    granted, _ = admit("scram-sha-256", Deciding(mapped(FromClient(), VERIFIER.text())))
    keys = Keys.of(scram.salted_password(PASSWORD, SALT, ITERATIONS))
    assert granted.credential == ProvedKeys(Secret(keys.client), Secret(keys.server), SALT, ITERATIONS)


@pytest.mark.parametrize("method", ["md5", "cert"])
def test_a_client_that_has_shown_nothing_of_use_proves_nothing(admit: Admit, method: str) -> None:
    encryption = WITH_CERTIFICATE if method == "cert" else None
    fault, _ = admit(method, Deciding(mapped(FromClient())), encryption=encryption, talks=method != "cert")
    assert isinstance(fault, AuthenticatorFault)
    assert "_META_TARGET_CRED=client" in fault.detail


@pytest.mark.parametrize("method", ["md5", "cleartext", "scram-sha-256", "cert"])
def test_a_client_is_watched_while_the_authenticator_thinks(connect_leg: ConnectLeg, method: str) -> None:
    class Thinking(Deciding):
        async def ask(self, question: Question) -> Mapping:
            self.questions.append(question)
            await asyncio.get_running_loop().create_future()
            raise AssertionError("nobody has answered")

    async def scenario() -> None:
        side = connect_leg()
        assert isinstance(side.leg, ClientLeg)
        left: list[bool] = []
        authenticator = Thinking(mapped())
        encryption = WITH_CERTIFICATE if method == "cert" else None
        admission = Admission(authenticator, policy(method), SEED, ITERATIONS)
        admitting = asyncio.create_task(admission.admit(started(encryption), side.leg, lambda: left.append(True)))
        if method in ("md5", "cleartext"):
            await Client(side, PASSWORD, None).by_password()
        await until(lambda: authenticator.questions, "the authenticator to be asked")
        assert left == []
        side.leg.eof_received()
        assert left == [True]
        admitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await admitting

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["md5", "cleartext", "scram-sha-256"])
def test_an_authenticator_that_fails_is_no_no(admit: Admit, method: str) -> None:
    fault, _ = admit(method, Deciding(AuthenticatorFault("it took too long")), talks=method != "scram-sha-256")
    assert isinstance(fault, AuthenticatorFault)
    assert fault.sqlstate == "58000"


@pytest.mark.parametrize("password", [PASSWORD, b"wrong"])
def test_a_refused_user_is_shown_their_own_salt_and_never_that_the_password_is_right(
    admit: Admit, password: bytes
) -> None:
    verifier = Verifier.of(PASSWORD, b"another salt....", ITERATIONS + 1)
    denied = Deciding(Denied("not from there", verifier=Secret(verifier.text())))
    outcome, shown = admit("scram-sha-256", denied, password)
    assert isinstance(outcome, ClientFault)
    assert (outcome.sqlstate, outcome.told) == ("28P01", b'password authentication failed for user "alice"')
    assert outcome.detail == "not from there"
    _, let_in_shown = admit("scram-sha-256", Deciding(mapped(verifier=verifier.text())))
    assert shown == let_in_shown


@pytest.mark.parametrize("password", [PASSWORD, b"wrong"])
@pytest.mark.parametrize(
    ("method", "verifier", "derived"),
    [("md5", HASH, 0), ("cleartext", HASH, 0), ("cleartext", VERIFIER.text(), 1)],
    ids=["md5", "cleartext, hash", "cleartext, verifier"],
)
def test_a_refused_users_answer_is_compared_for_nothing(
    admit: Admit, monkeypatch: pytest.MonkeyPatch, method: str, verifier: bytes, derived: int, password: bytes
) -> None:
    salts = []

    def salted_password(secret: bytes, salt: bytes, iterations: int) -> bytes:
        salts.append(salt)
        return derive(secret, salt, iterations)

    derive = scram.salted_password
    monkeypatch.setattr(scram, "salted_password", salted_password)
    outcome, _ = admit(method, Deciding(Denied("not from there", verifier=Secret(verifier))), password)
    assert isinstance(outcome, ClientFault)
    assert (outcome.sqlstate, outcome.detail) == ("28P01", "not from there")
    assert salts == [SALT] * derived
