"""Our two logins joined: the gateway as client of the gateway as server, for every method that both know."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from pgauthproxy import _wire
from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.errors import ClientFault, TargetFault
from pgauthproxy.proto import client_login, messages, startup
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.startup import StartupMessage
from pgauthproxy.proto.steps import MORE, Login, Step
from pgauthproxy.proto.target_login import TargetLimits, target_login
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Attached, Granted, Greeting, Mapping, Parameters, Started, parameter

LIMITS = TargetLimits(auth_request=2000, error=30_000, message=65_536, scram_iterations=100_000)
ADDRESS = Address("127.0.0.1", 5432)
PARAMETERS: Parameters = ((b"user", "Zoë".encode()), (b"database", b"shop"), (b"options", b"-c a=b"))
SALT, OUR_KEY = b"\x00\xff\x0a\x0d", b"our  key"
STATUS, READY = _wire.message(ord("S"), b"TimeZone\0UTC\0"), _wire.message(ord("Z"), b"I")
TARGETS_GREETING = Greeting(STATUS * 2, bytes(8), STATUS + READY)

Ask = Callable[[_wire.Framer, bytes], Login[Proof]]
WholeLogin = Generator[Step, bytes | None, tuple[StartupMessage, Proof]]


def ask_md5(framer: _wire.Framer, user: bytes) -> Login[Proof]:
    return client_login.receive_md5(framer, user, SALT, 65_535)


def ask_cleartext(framer: _wire.Framer, user: bytes) -> Login[Proof]:
    return client_login.receive_cleartext(framer, user, 65_535)


def serve(framer: _wire.Framer, ask: Ask, greeting: Greeting) -> WholeLogin:
    """The server's side from the startup packet to the welcome."""
    wanted = yield from startup.receive_startup(framer, 10_000)
    assert isinstance(wanted, StartupMessage)
    proof = yield from ask(framer, parameter(wanted.parameters, b"user"))
    granted = Granted(Started(Accepted("1", "[local]"), wanted.parameters), Mapping((ADDRESS,), PARAMETERS, None), 0)
    yield client_login.welcome(Attached(granted, ADDRESS, greeting, 0, 0), OUR_KEY)
    return wanted, proof


class Side:
    """One of two logins that talk to each other."""

    def __init__(self, login: Callable[[_wire.Framer], Generator[Step, bytes | None, Any]]) -> None:
        self.framer = _wire.Framer({})
        self._login = login(self.framer)
        self.result: Any = None
        self.over = False

    def go_on(self) -> bytes:
        """Runs until it waits or ends; what it has to say meanwhile."""
        said = b""
        try:
            while not self.over:
                step = next(self._login)
                if step is MORE:
                    break
                assert isinstance(step, bytes)
                said += step
        except StopIteration as stop:
            self.result, self.over = stop.value, True
        return said


def converse(client: Side, server: Side, chunk: int) -> None:
    """Carries what each says to the other, in chunks of this size, until both are through."""
    talking = [(client, server), (server, client)]
    for _ in range(100):
        for speaker, listener in talking:
            said = speaker.go_on()
            for at in range(0, len(said), chunk):
                listener.framer.feed(said[at : at + chunk])
        if client.over and server.over:
            return
    raise AssertionError("they never come to an end")


def joined(mapping: Mapping, ask: Ask, chunk: int, greeting: Greeting = TARGETS_GREETING) -> tuple[Side, Side]:
    client = Side(lambda framer: target_login(framer, mapping, LIMITS, private_channel=True, pass_error_text=False))
    server = Side(lambda framer: serve(framer, ask, greeting))
    converse(client, server, chunk)
    return client, server


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("password", ["secret", "пароль", "a=b", "\u00a0", "x" * 5000])
def test_md5_is_asked_and_answered(password: str, chunk: int) -> None:
    stored = md5_password(password.encode(), PARAMETERS[0][1])
    for credential, is_md5 in ((password.encode(), False), (stored, True)):
        mapping = Mapping((ADDRESS,), PARAMETERS, Secret(credential), is_md5)
        client, server = joined(mapping, ask_md5, chunk)
        wanted, proof = server.result
        assert wanted == StartupMessage(PARAMETERS)
        assert proof == Proof("md5", Secret(md5_answer(stored, SALT)), SALT)
        assert client.result == Greeting(STATUS * 2, OUR_KEY, STATUS + READY)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("password", ["secret", "пароль", "a=b", "\u00a0", "x" * 5000])
def test_cleartext_is_asked_and_answered(password: str, chunk: int) -> None:
    client, server = joined(Mapping((ADDRESS,), PARAMETERS, Secret(password.encode())), ask_cleartext, chunk)
    wanted, proof = server.result
    assert wanted == StartupMessage(PARAMETERS)
    assert proof == Proof("cleartext", Secret(password.encode()), bytes(4))
    assert client.result == Greeting(STATUS * 2, OUR_KEY, STATUS + READY)


@pytest.mark.parametrize(
    "greeting", [Greeting(b"", b"", STATUS + READY), Greeting(b"", bytes(8), READY), Greeting(STATUS, bytes(36), READY)]
)
def test_a_greeting_comes_through_as_it_was_but_for_the_key(greeting: Greeting) -> None:
    client, _ = joined(Mapping((ADDRESS,), PARAMETERS, Secret(b"x")), ask_md5, 1 << 20, greeting)
    assert client.result == Greeting(greeting.before_key, OUR_KEY if greeting.key else b"", greeting.after_key)


@pytest.mark.parametrize("password", ["", "a\nb"])
def test_a_password_that_the_server_refuses_ends_both(password: str) -> None:
    mapping = Mapping((ADDRESS,), PARAMETERS, Secret(password.encode()))
    with pytest.raises(ClientFault) as raised:
        joined(mapping, ask_cleartext, 1 << 20)
    client = Side(lambda framer: target_login(framer, mapping, LIMITS, private_channel=True, pass_error_text=True))
    client.go_on()
    client.framer.feed(messages.fatal(raised.value.sqlstate, raised.value.told or b""))
    with pytest.raises(TargetFault) as refused:
        client.go_on()
    # What we say as a server, we read as a client: our credential was refused.
    assert refused.value.sqlstate == "08004"
    assert refused.value.detail == 'target refused: 28P01: password authentication failed for user "Zoë"'


def test_a_second_level_of_gateway_passes_protocol_options_on_as_unknown() -> None:
    parameters = (*PARAMETERS, (b"_pq_.wish", b"1"))
    client, server = joined(Mapping((ADDRESS,), parameters, Secret(b"x")), ask_md5, 1)
    assert server.result[0] == StartupMessage(PARAMETERS)
    assert client.result == Greeting(STATUS * 2, OUR_KEY, STATUS + READY)
