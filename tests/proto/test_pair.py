"""Our two logins joined: the gateway as client of the gateway as server, for every method that both know."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pytest

from pgauthproxy import _wire
from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.errors import ClientFault, TargetFault
from pgauthproxy.proto import client_login, messages, scram, startup
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.scram import Keys, Verifier
from pgauthproxy.proto.startup import StartupMessage
from pgauthproxy.proto.steps import MORE, DeriveKey, Login, StartTls, TlsPlan
from pgauthproxy.proto.target_login import TargetLimits, TargetTerms, Welcome, target_login
from pgauthproxy.secret import Secret
from pgauthproxy.stages import (
    Accepted,
    Address,
    Attached,
    Encryption,
    Granted,
    Greeting,
    Mapping,
    Parameters,
    Password,
    ProvedKeys,
    Started,
    StoredMd5,
    parameter,
)
from tests.sans_io import TLS, encrypted

LIMITS = TargetLimits(auth_request=2000, error=30_000, message=65_536, scram_iterations=100_000)
ADDRESS = Address("127.0.0.1", 5432)
PARAMETERS: Parameters = ((b"user", "Zoë".encode()), (b"database", b"shop"), (b"options", b"-c a=b"))
STARTED = Started(Accepted("1", "[local]"), PARAMETERS)
SALT, OUR_KEY = b"\x00\xff\x0a\x0d", b"our  key"
STATUS, READY = _wire.message(ord("S"), b"TimeZone\0UTC\0"), _wire.message(ord("Z"), b"I")
TARGETS_GREETING = Greeting(STATUS * 2, bytes(8), STATUS + READY)
CLIENT_HELLO = b"\x16"

Ask = Callable[[_wire.Framer, bytes, Encryption | None], Login[Any]]
Credential = Password | StoredMd5 | ProvedKeys | None
chunked = pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
for_passwords = pytest.mark.parametrize("password", ["secret", "пароль", "a=b", "\u00a0", "x" * 5000])


def ask_md5(framer: _wire.Framer, user: bytes, encryption: Encryption | None) -> Login[Proof]:
    return client_login.receive_md5(framer, user, SALT, 65_535)


def ask_cleartext(framer: _wire.Framer, user: bytes, encryption: Encryption | None) -> Login[Proof]:
    return client_login.receive_cleartext(framer, user, 65_535)


def ask_scram(verifier: Verifier) -> Ask:
    def ask(framer: _wire.Framer, user: bytes, encryption: Encryption | None) -> Login[Keys]:
        binding = b"" if encryption is None else encryption.binding
        return client_login.receive_scram(framer, user, verifier, binding, 1024)

    return ask


@dataclass(frozen=True)
class Line:
    """How the two are connected: what each knows of the TLS between them, if there is any."""

    clients: Encryption | None = None
    servers: Encryption | None = None
    direct: bool = False

    @property
    def plan(self) -> TlsPlan | None:
        return None if self.clients is None else TlsPlan(TLS, required=True, verified=False, direct=self.direct)


BOUND, UNBOUND = encrypted(binding=b"the hash of a certificate"), encrypted()
LINES = {
    "plain": Line(),
    "TLS that can be bound": Line(BOUND, BOUND),
    "direct TLS that can be bound": Line(BOUND, BOUND, direct=True),
    "TLS that cannot be bound": Line(UNBOUND, UNBOUND),
}


def serve(
    framer: _wire.Framer, ask: Ask, line: Line, greeting: Greeting = TARGETS_GREETING
) -> Login[tuple[StartupMessage, Any]]:
    """The server's side from the startup packet to the welcome."""
    tls = None if line.servers is None else TLS
    wanted = yield from startup.receive_startup(framer, 10_000, tls, tls_required=tls is not None)
    assert isinstance(wanted, StartupMessage)
    proof = yield from ask(framer, parameter(wanted.parameters, b"user"), wanted.encryption)
    granted = Granted(STARTED, Mapping((ADDRESS,), PARAMETERS, None), None, 0)
    yield client_login.welcome(Attached(granted, ADDRESS, None, greeting, 0, 0), OUR_KEY)
    return wanted, proof


class Side:
    """One of two logins that talk to each other. TLS is played: the client's hello is all there is to a handshake."""

    def __init__(
        self, login: Callable[[_wire.Framer], Login[Any]], encryption: Encryption | None, *, greets: bool
    ) -> None:
        self.framer = _wire.Framer({})
        self.result: Any = None
        self.over = False
        self._login: Generator[Any, Any, Any] = login(self.framer)
        self._encryption = encryption
        self._greets = greets
        self._awaits_hello = False
        self._answer: bytes | Encryption | None = None

    def go_on(self) -> bytes:
        """Runs until it waits or ends; what it has to say meanwhile."""
        said = b""
        try:
            while not self.over and not self._waits_for_hello():
                step = self._login.send(self._answer)
                self._answer = None
                if step is MORE:
                    break
                if isinstance(step, DeriveKey):
                    self._answer = scram.salted_password(step.password.reveal(), step.salt, step.iterations)
                elif not isinstance(step, StartTls):
                    said += step
                elif self._greets:
                    self._answer = self._encryption
                    return said + CLIENT_HELLO
                else:
                    self._awaits_hello = True
        except StopIteration as stop:
            self.result, self.over = stop.value, True
        return said

    def _waits_for_hello(self) -> bool:
        if self._awaits_hello and self.framer.pending:
            assert self.framer.take_rest() == CLIENT_HELLO, "bytes in plain behind the hello"
            self._awaits_hello, self._answer = False, self._encryption
        return self._awaits_hello


Tamper = Callable[[bytes], bytes]


def converse(client: Side, server: Side, chunk: int, tamper: Tamper) -> None:
    """Carries what each says to the other, in chunks of this size, until both are through.

    `tamper` is what somebody in between makes of the server's words.
    """
    for _ in range(100):
        for speaker, listener in ((client, server), (server, client)):
            said = speaker.go_on()
            if speaker is server:
                said = tamper(said)
            for at in range(0, len(said), chunk):
                listener.framer.feed(said[at : at + chunk])
        if client.over and server.over:
            return
    raise AssertionError("they never come to an end")


def logging_in(credential: Credential, line: Line, parameters: Parameters = PARAMETERS) -> Side:
    granted = Granted(STARTED, Mapping((ADDRESS,), parameters, None), credential, 0)
    terms = TargetTerms(messages.PROTOCOL_3_0, line.plan, local=True, pass_error_text=False, limits=LIMITS)
    return Side(lambda framer: target_login(framer, granted, terms), line.clients, greets=True)


def joined(
    credential: Credential,
    ask: Ask,
    chunk: int = 1 << 20,
    line: Line = LINES["plain"],
    greeting: Greeting = TARGETS_GREETING,
    tamper: Tamper = bytes,
) -> tuple[Side, Side]:
    client = logging_in(credential, line)
    server = Side(lambda framer: serve(framer, ask, line, greeting), line.servers, greets=False)
    converse(client, server, chunk, tamper)
    return client, server


def password_of(text: str) -> Password:
    return Password(Secret(text.encode()))


def welcomed(line: Line = LINES["plain"]) -> Welcome:
    return Welcome(Greeting(STATUS * 2, OUR_KEY, STATUS + READY), line.clients)


@chunked
@for_passwords
@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_md5_is_asked_and_answered(password: str, chunk: int, line: Line) -> None:
    stored = md5_password(password.encode(), PARAMETERS[0][1])
    credentials: list[Credential] = [password_of(password), StoredMd5(Secret(stored))]
    for credential in credentials:
        client, server = joined(credential, ask_md5, chunk, line)
        wanted, proof = server.result
        assert wanted == StartupMessage(PARAMETERS, 0, line.servers)
        assert proof == Proof("md5", Secret(md5_answer(stored, SALT)), SALT)
        assert client.result == welcomed(line)


@chunked
@for_passwords
@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_cleartext_is_asked_and_answered(password: str, chunk: int, line: Line) -> None:
    client, server = joined(password_of(password), ask_cleartext, chunk, line)
    wanted, proof = server.result
    assert wanted == StartupMessage(PARAMETERS, 0, line.servers)
    assert proof == Proof("cleartext", Secret(password.encode()), bytes(4))
    assert client.result == welcomed(line)


@chunked
@for_passwords
@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_scram_is_asked_and_answered(password: str, chunk: int, line: Line) -> None:
    verifier = Verifier.of(password.encode(), SALT * 4, 2)
    client, server = joined(password_of(password), ask_scram(verifier), chunk, line)
    wanted, keys = server.result
    assert wanted == StartupMessage(PARAMETERS, 0, line.servers)
    assert keys == Keys.of(scram.salted_password(password.encode(), SALT * 4, 2))
    assert client.result == welcomed(line)


def say_nothing_of_plus(said: bytes) -> bytes:
    """What somebody does who wants the two to speak over channels that they do not share."""
    both, one = (
        messages.authentication(messages.AUTH_SASL, mechanisms)
        for mechanisms in (b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0", b"SCRAM-SHA-256\0\0")
    )
    return said.replace(both, one)


VERIFIER = Verifier.of(b"secret", SALT * 4, 2)
ELSEWHERE = encrypted(binding=b"the hash of another certificate")


@pytest.mark.parametrize(
    ("line", "tamper"),
    [
        (Line(ELSEWHERE, BOUND), bytes),
        (Line(BOUND, BOUND), say_nothing_of_plus),
        (Line(ELSEWHERE, BOUND), say_nothing_of_plus),
    ],
    ids=["ends TLS twice", "hides the offer", "ends TLS twice and hides the offer"],
)
def test_whoever_stands_between_the_two_is_found_out_by_the_server(line: Line, tamper: Tamper) -> None:
    with pytest.raises(ClientFault) as raised:
        joined(password_of("secret"), ask_scram(VERIFIER), line=line, tamper=tamper)
    assert (raised.value.sqlstate, raised.value.told) == ("28000", b"SCRAM channel binding check failed")


def test_a_server_that_does_not_know_the_verifier_is_found_out_by_the_client() -> None:
    impostor = Verifier(VERIFIER.iterations, VERIFIER.salt, VERIFIER.stored_key, bytes(32))
    with pytest.raises(TargetFault) as raised:
        joined(password_of("secret"), ask_scram(impostor))
    assert raised.value.detail == "target broke the protocol: wrong server signature"


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_what_a_client_has_proved_opens_a_server_that_stores_the_same_verifier(line: Line) -> None:
    _, server = joined(password_of("secret"), ask_scram(VERIFIER), line=line)
    _, keys = server.result
    proved = ProvedKeys(Secret(keys.client), Secret(keys.server), VERIFIER.salt, VERIFIER.iterations)
    client, _ = joined(proved, ask_scram(VERIFIER), line=line)
    assert client.result == welcomed(line)


def test_what_a_client_has_proved_opens_no_server_that_stores_another_verifier() -> None:
    keys = Keys.of(scram.salted_password(b"secret", VERIFIER.salt, VERIFIER.iterations))
    proved = ProvedKeys(Secret(keys.client), Secret(keys.server), VERIFIER.salt, VERIFIER.iterations)
    for verifier in (Verifier.of(b"secret", b"another salt", 2), Verifier.of(b"secret", VERIFIER.salt, 3)):
        with pytest.raises(TargetFault) as raised:
            joined(proved, ask_scram(verifier))
        assert raised.value.sqlstate == "08004"
        assert raised.value.detail == "target does not store the verifier that the client was held to"
    with pytest.raises(ClientFault, match="wrong password"):
        joined(proved, ask_scram(Verifier.of(b"another", VERIFIER.salt, VERIFIER.iterations)))


@pytest.mark.parametrize(
    "greeting", [Greeting(b"", b"", STATUS + READY), Greeting(b"", bytes(8), READY), Greeting(STATUS, bytes(36), READY)]
)
def test_a_greeting_comes_through_as_it_was_but_for_the_key(greeting: Greeting) -> None:
    client, _ = joined(password_of("x"), ask_md5, greeting=greeting)
    expected = Greeting(greeting.before_key, OUR_KEY if greeting.key else b"", greeting.after_key)
    assert client.result == Welcome(expected, None)


@pytest.mark.parametrize("password", ["", "a\nb"])
def test_a_password_that_the_server_refuses_ends_both(password: str) -> None:
    with pytest.raises(ClientFault) as raised:
        joined(password_of(password), ask_cleartext)
    client = logging_in(password_of(password), LINES["plain"])
    client.go_on()
    client.framer.feed(messages.fatal(raised.value.sqlstate, raised.value.told or b""))
    with pytest.raises(TargetFault) as refused:
        client.go_on()
    # What we say as a server, we read as a client: our credential was refused.
    assert refused.value.sqlstate == "08004"
    assert refused.value.detail == 'target refused: 28P01: password authentication failed for user "Zoë"'


@pytest.mark.parametrize("version", [messages.PROTOCOL_3_0, messages.PROTOCOL_3_2])
def test_a_second_level_of_gateway_is_asked_for_the_version_that_the_terms_name(version: int) -> None:
    granted = Granted(STARTED, Mapping((ADDRESS,), PARAMETERS, None), password_of("x"), 0)
    terms = TargetTerms(version, None, local=True, pass_error_text=False, limits=LIMITS)
    client = Side(lambda framer: target_login(framer, granted, terms), None, greets=True)
    server = Side(lambda framer: serve(framer, ask_md5, LINES["plain"]), None, greets=False)
    converse(client, server, 1, bytes)
    assert server.result[0] == StartupMessage(PARAMETERS, version & 0xFFFF, None)
    assert client.result == welcomed()


def test_a_second_level_of_gateway_passes_protocol_options_on_as_unknown() -> None:
    client = logging_in(password_of("x"), LINES["plain"], (*PARAMETERS, (b"_pq_.wish", b"1")))
    server = Side(lambda framer: serve(framer, ask_md5, LINES["plain"]), None, greets=False)
    converse(client, server, 1, bytes)
    assert server.result[0] == StartupMessage(PARAMETERS, 0, None)
    assert client.result == welcomed()
