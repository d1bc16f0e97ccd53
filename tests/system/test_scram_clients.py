"""How clients prove that they know a password without showing it: SCRAM, and what else a verifier serves for."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography.hazmat.primitives import hashes

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.system.conftest import Answering, answering_gateway, asking_gateway, new_user
from tests.tls import HOST, Authority, Identity, TlsClient, opens_with_tls, self_signed, server_context
from tests.wire import SSL_REQUEST, RawClient, ScriptedTarget, message, password, query, startup

SECONDS = 30
SECRET = "the client's own"
SALT = b"sixteen bytes of"
ITERATIONS = 4096
PLAIN, PLUS = b"SCRAM-SHA-256", b"SCRAM-SHA-256-PLUS"
MALFORMED = ("08P01", "malformed SCRAM message")
NOT_BOUND = ("28000", "SCRAM channel binding check failed")
SERVICE_FAILED = ("58000", "authentication service failed")
NOT_LET_IN = ("08004", "the target server refused the gateway")
UMLAUT = "ⅸ¨Á\u00a0x"


def hmac_of(key: bytes, words: bytes) -> bytes:
    return hmac.digest(key, words, "sha256")


def xor(left: bytes, right: bytes) -> bytes:
    return bytes(one ^ other for one, other in zip(left, right, strict=True))


def encoded(data: bytes) -> bytes:
    return base64.b64encode(data)


def verifier_of(secret: str = SECRET, salt: bytes = SALT, iterations: int = ITERATIONS) -> str:
    """What PostgreSQL would store of a password that needs no preparation."""
    salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), salt, iterations)
    stored = hashlib.sha256(hmac_of(salted, b"Client Key")).digest()
    words = (encoded(salt), encoded(stored), encoded(hmac_of(salted, b"Server Key")))
    return "SCRAM-SHA-256${}:{}${}:{}".format(iterations, *(word.decode() for word in words))


def md5_of(secret: str, user: str) -> str:
    return "md5" + hashlib.md5((secret + user).encode()).hexdigest()  # noqa: S324 (the protocol's own)


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Identity:
    """The gateways'."""
    return authority.issue("scram gateway", "localhost", HOST)


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory, identity: Identity) -> Iterator[Callable[[str], Answering]]:
    """The gateway that asks for a method: started when first wanted, there until the file is done."""
    started: dict[str, Answering] = {}
    with contextlib.ExitStack() as stack:

        def gateway(method: str) -> Answering:
            if method not in started:
                folder = tmp_path_factory.mktemp(f"gateway-{method}")
                found = answering_gateway(folder, authenticator={"method": method}, tls=identity.settings)
                started[method] = stack.enter_context(found)
            return started[method]

        yield gateway


@pytest.fixture(scope="module")
def scram_gateway(gateways: Callable[[str], Answering]) -> Answering:
    return gateways("scram-sha-256")


@pytest.fixture
def known(scram_gateway: Answering, postgres: ThrowawayPostgres) -> str:
    """A user with a verifier of SECRET."""
    return scram_gateway.user(at(postgres, _META_SOURCE_VERIFIER=verifier_of()))


def at(server: ThrowawayPostgres, user: str = "trusted", **more: str) -> dict[str, str]:
    """The lines that send somebody there."""
    return {"_META_TARGET_HOST": f"{HOST}:{server.port}", "user": user, "database": "postgres"} | more


def connect(answering: Answering, user: str, secret: str = SECRET, **more: Any) -> psycopg.Connection[Any]:
    where: dict[str, Any] = {"host": HOST, "port": answering.gateway.port, "user": user, "password": secret}
    return psycopg.connect(**(where | {"dbname": "postgres", "sslmode": "disable"} | more))


def who(answering: Answering, user: str, secret: str = SECRET, **more: Any) -> str:
    """As whom such a client is let in."""
    with connect(answering, user, secret, **more) as session:
        row = session.execute("select current_user::text").fetchone()
        assert row is not None
        name: str = row[0]
        return name


def refused(answering: Answering, user: str, secret: str = SECRET, **more: Any) -> str:
    """What such a client is told."""
    with pytest.raises(psycopg.OperationalError) as caught:
        connect(answering, user, secret, **more)
    return str(caught.value)


# The exchange, byte by byte


def bound_and_nonce(bound: bytes, nonce: bytes) -> bytes:
    return b"c=%s,r=%s" % (bound, nonce)


def proof_attribute(proof: bytes) -> bytes:
    return b",p=" + encoded(proof)


@dataclass
class Exchange:
    """A client's side of SCRAM. Whatever a test has set is sent in place of what would be right."""

    client: RawClient
    user: str
    mechanism: bytes = PLAIN
    header: bytes = b"n,,"
    binding: bytes = b""
    bare: bytes = b"n=,r=client+nonce"
    without_proof: Callable[[bytes, bytes], bytes] = bound_and_nonce
    proof: Callable[[bytes], bytes] = proof_attribute
    challenge: bytes = b""

    def begin(self) -> bytes:
        """The mechanisms that are offered, as they are sent."""
        self.client.send(startup(user=self.user))
        kind, body = self.client.read_message()
        assert (kind, body[:4]) == (b"R", struct.pack("!i", 10)), (kind, body)
        return body[4:]

    def first(self) -> bytes:
        """The server's first message."""
        words = self.header + self.bare
        self.client.send(message(b"p", self.mechanism + b"\0" + struct.pack("!i", len(words)) + words))
        kind, body = self.client.read_message()
        assert (kind, body[:4]) == (b"R", struct.pack("!i", 11)), (kind, body)
        self.challenge = body[4:]
        return self.challenge

    def final(self, secret: str = SECRET) -> bytes:
        """Sends the proof; returns what the server's signature must be."""
        nonce, salt, iterations = (part[2:] for part in self.challenge.split(b","))
        salted = hashlib.pbkdf2_hmac("sha256", secret.encode(), base64.b64decode(salt), int(iterations))
        client_key = hmac_of(salted, b"Client Key")
        without_proof = self.without_proof(encoded(self.header + self.binding), nonce)
        words = b",".join((self.bare, self.challenge, without_proof))
        proof = xor(client_key, hmac_of(hashlib.sha256(client_key).digest(), words))
        self.client.send(message(b"p", without_proof + self.proof(proof)))
        return b"v=" + encoded(hmac_of(hmac_of(salted, b"Server Key"), words))

    def goes_through(self) -> None:
        self.begin()
        self.first()
        signature = self.final()
        assert self.client.read_message() == (b"R", struct.pack("!i", 12) + signature)
        assert self.client.read_message() == (b"R", struct.pack("!i", 0))
        self.client.read_until(b"Z")
        self.client.assert_served()


def test_a_client_that_knows_the_password_is_let_in(scram_gateway: Answering, known: str) -> None:
    with RawClient(scram_gateway.gateway.port) as client:
        exchange = Exchange(client, known)
        assert exchange.begin() == PLAIN + b"\0\0"
        challenge = exchange.first()
        nonce, salt, iterations = challenge.split(b",")
        assert nonce.startswith(b"r=client+nonce")
        assert len(nonce) >= len(b"r=client+nonce") + 24
        assert (salt, iterations) == (b"s=" + encoded(SALT), b"i=4096")
    with RawClient(scram_gateway.gateway.port) as client:
        Exchange(client, known).goes_through()


def test_nonces_differ(scram_gateway: Answering, known: str) -> None:
    nonces = set()
    for _ in range(20):
        with RawClient(scram_gateway.gateway.port) as client:
            exchange = Exchange(client, known)
            exchange.begin()
            nonces.add(exchange.first().split(b",")[0])
    assert len(nonces) == 20


def test_over_tls_the_channel_can_be_bound(
    scram_gateway: Answering, known: str, authority: Authority, identity: Identity
) -> None:
    with TlsClient(scram_gateway.gateway.port, authority.client_context()) as client:
        assert Exchange(client, known).begin() == PLUS + b"\0" + PLAIN + b"\0\0"
    binding = hashlib.sha256(identity.der).digest()
    with TlsClient(scram_gateway.gateway.port, authority.client_context()) as client:
        Exchange(client, known, PLUS, b"p=tls-server-end-point,,", binding).goes_through()
    # Who cannot bind may say so.
    with TlsClient(scram_gateway.gateway.port, authority.client_context()) as client:
        Exchange(client, known).goes_through()


@pytest.mark.parametrize("iterations", [1, 4095, 100_000])
def test_any_number_of_iterations_will_do(
    scram_gateway: Answering, postgres: ThrowawayPostgres, iterations: int
) -> None:
    verifier = verifier_of(salt=b"x", iterations=iterations)
    user = scram_gateway.user(at(postgres, _META_SOURCE_VERIFIER=verifier))
    assert who(scram_gateway, user) == "trusted"
    assert "password authentication failed" in refused(scram_gateway, user, "wrong")


@pytest.mark.parametrize("name", [b"n=,r=x", b"n=*,r=x", b"n=mallory,r=x", b"n=a=2Cb,r=x"])
def test_the_name_in_the_exchange_counts_for_nothing(scram_gateway: Answering, known: str, name: bytes) -> None:
    with RawClient(scram_gateway.gateway.port) as client:
        Exchange(client, known, bare=name).goes_through()


def test_an_exchange_may_begin_without_a_message(scram_gateway: Answering, known: str) -> None:
    with RawClient(scram_gateway.gateway.port) as client:
        exchange = Exchange(client, known)
        exchange.begin()
        client.send(message(b"p", PLAIN + b"\0" + struct.pack("!i", -1)))
        assert client.read_message() == (b"R", struct.pack("!i", 11))
        client.send(message(b"p", exchange.header + exchange.bare))
        _, body = client.read_message()
        exchange.challenge = body[4:]
        signature = exchange.final()
        assert client.read_message() == (b"R", struct.pack("!i", 12) + signature)
        client.read_until(b"Z")


def test_extensions_that_may_be_ignored_are(scram_gateway: Answering, known: str) -> None:
    with RawClient(scram_gateway.gateway.port) as client:
        extended = {
            "bare": b"n=,r=nonce,x=first",
            "without_proof": lambda bound, nonce: b"c=%s,r=%s,y=final" % (bound, nonce),
        }
        Exchange(client, known, **extended).goes_through()  # type: ignore[arg-type]


# What a client is told, right or wrong


def test_a_wrong_password_is_refused_in_postgresqls_words(scram_gateway: Answering, known: str) -> None:
    for secret in ("wrong", SECRET + " ", SECRET[:-1], SECRET.upper()):
        assert f'FATAL:  password authentication failed for user "{known}"' in refused(scram_gateway, known, secret)
    assert scram_gateway.gateway.wait_for("refused", user=known)["reason"] == "wrong password"


def test_an_unknown_user_is_refused_in_the_same_words(scram_gateway: Answering) -> None:
    user = new_user()
    assert f'FATAL:  password authentication failed for user "{user}"' in refused(scram_gateway, user)
    assert "exit status" in scram_gateway.gateway.wait_for("refused", user=user)["reason"]


def heard(port: int, user: str, context: ssl.SSLContext | None = None) -> tuple[bytes, ...]:
    """All that a client hears who does not know the password, in messages, without what differs by chance."""
    with RawClient(port) if context is None else TlsClient(port, context) as client:
        exchange = Exchange(client, user)
        offered = exchange.begin()
        nonce, salt, iterations = exchange.first().split(b",")
        exchange.final("wrong")
        rest = client.read_to_end().replace(user.encode(), b"?")
    return offered, nonce[:14], bytes([len(nonce)]), bytes([len(salt)]), iterations, rest


def test_an_unknown_user_and_a_wrong_password_look_the_same_in_bytes(
    scram_gateway: Answering, known: str, authority: Authority
) -> None:
    port = scram_gateway.gateway.port
    for context in (None, authority.client_context()):
        assert heard(port, known, context) == heard(port, new_user(), context)


def salt_of(port: int, user: str) -> tuple[bytes, bytes]:
    with RawClient(port) as client:
        exchange = Exchange(client, user)
        exchange.begin()
        _, salt, iterations = exchange.first().split(b",")
    return salt, iterations


def test_an_unknown_user_has_one_salt_and_another_has_another(scram_gateway: Answering) -> None:
    port = scram_gateway.gateway.port
    one, other = new_user(), new_user()
    assert salt_of(port, one) == salt_of(port, one)
    assert salt_of(port, one) != salt_of(port, other)


@pytest.mark.parametrize(
    ("seed", "with_key", "stable"),
    [("a seed", False, True), ("a seed", True, True), ("", True, True), ("", False, False)],
)
def test_the_salt_of_an_unknown_user_is_as_stable_as_what_it_is_made_from(
    tmp_path: Path, identity: Identity, seed: str, *, with_key: bool, stable: bool
) -> None:
    settings = {"method": "scram-sha-256", "scram_seed": seed, "scram_iterations": 5000}
    salts = []
    for _ in range(2):
        tls = identity.settings if with_key else {}
        with answering_gateway(tmp_path, authenticator=settings, tls=tls) as answering:
            salts.append(salt_of(answering.gateway.port, "carol"))
    assert (salts[0] == salts[1]) == stable
    assert {iterations for _, iterations in salts} == {b"i=5000"}


def test_another_seed_makes_other_salts(tmp_path: Path) -> None:
    salts = []
    for seed in ("one", "other"):
        settings = {"method": "scram-sha-256", "scram_seed": seed}
        with answering_gateway(tmp_path, authenticator=settings) as answering:
            salts.append(salt_of(answering.gateway.port, "carol"))
    assert salts[0] != salts[1]


def test_an_unknown_user_who_breaks_off_is_told_as_anybody(scram_gateway: Answering, known: str) -> None:
    told = []
    for user in (known, new_user()):
        with RawClient(scram_gateway.gateway.port) as client:
            exchange = Exchange(client, user)
            exchange.begin()
            exchange.first()
            client.send(message(b"p", b"nonsense"))
            told.append(client.read_fatal())
    assert told == [MALFORMED, MALFORMED]


# Every attribute wrong once


def with_last_bit_changed(proof: bytes) -> bytes:
    return b",p=" + encoded(proof[:-1] + bytes([proof[-1] ^ 1]))


WRONG_FIRST: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "nothing": ({"header": b"", "bare": b""}, MALFORMED),
    "no header": ({"header": b""}, MALFORMED),
    "half a header": ({"header": b"n,"}, MALFORMED),
    "an unknown flag": ({"header": b"x,,"}, MALFORMED),
    "a flag in capitals": ({"header": b"N,,"}, MALFORMED),
    "a flag with more to it": ({"header": b"nn,,"}, MALFORMED),
    "an authorization identity": ({"header": b"n,a=postgres,"}, MALFORMED),
    "something in its place": ({"header": b"n,postgres,"}, MALFORMED),
    "a binding that was not offered": ({"header": b"p=tls-server-end-point,,"}, MALFORMED),
    "an unknown kind of binding": ({"header": b"p=tls-unique,,"}, MALFORMED),
    "a binding without a kind": ({"header": b"p=,,"}, MALFORMED),
    "a mandatory extension": ({"bare": b"m=x,n=,r=nonce"}, MALFORMED),
    "no name": ({"bare": b"r=nonce"}, MALFORMED),
    "no nonce": ({"bare": b"n="}, MALFORMED),
    "something else in place of the nonce": ({"bare": b"n=,x=nonce"}, MALFORMED),
    "an empty nonce": ({"bare": b"n=,r="}, MALFORMED),
    "a nonce with a space": ({"bare": b"n=,r=a nonce"}, MALFORMED),
    "a nonce with a NUL": ({"bare": b"n=,r=non\0ce"}, MALFORMED),
    "a nonce that is no ASCII": ({"bare": "n=,r=nöncé".encode()}, MALFORMED),
    "random bytes": ({"header": bytes(range(128, 256))}, MALFORMED),
    "a mechanism that was not offered": ({"mechanism": b"SCRAM-SHA-1"}, MALFORMED),
    "a mechanism that needs TLS": ({"mechanism": PLUS}, MALFORMED),
    "a mechanism in small letters": ({"mechanism": b"scram-sha-256"}, MALFORMED),
    "no mechanism": ({"mechanism": b""}, MALFORMED),
}
WRONG_FINAL: dict[str, tuple[dict[str, Any], tuple[str, str] | None]] = {
    "the header of another": ({"without_proof": lambda _, nonce: b"c=eSws,r=" + nonce}, NOT_BOUND),
    "no header": ({"without_proof": lambda _, nonce: b"c=,r=" + nonce}, NOT_BOUND),
    "a binding that was not announced": ({"binding": bytes(32)}, NOT_BOUND),
    "a header that is no base64": ({"without_proof": lambda _, nonce: b"c=!!!!,r=" + nonce}, MALFORMED),
    "no binding attribute": ({"without_proof": lambda _, nonce: b"r=" + nonce}, MALFORMED),
    "another nonce": ({"without_proof": lambda bound, _: b"c=%s,r=other" % bound}, MALFORMED),
    "the client's part of the nonce": ({"without_proof": lambda bound, _: b"c=%s,r=client+nonce" % bound}, MALFORMED),
    "a nonce cut short": ({"without_proof": lambda bound, nonce: b"c=%s,r=%s" % (bound, nonce[:-1])}, MALFORMED),
    "a nonce with more to it": ({"without_proof": lambda bound, nonce: b"c=%s,r=%sx" % (bound, nonce)}, MALFORMED),
    "no nonce": ({"without_proof": lambda bound, _: b"c=%s" % bound}, MALFORMED),
    "attributes in another order": ({"without_proof": lambda bound, nonce: b"r=%s,c=%s" % (nonce, bound)}, MALFORMED),
    "a wrong proof": ({"proof": with_last_bit_changed}, None),
    "a proof of zeros": ({"proof": lambda _: b",p=" + encoded(bytes(32))}, None),
    "a proof cut short": ({"proof": lambda proof: b",p=" + encoded(proof[:-1])}, MALFORMED),
    "a proof with more to it": ({"proof": lambda proof: b",p=" + encoded(proof + b"\0")}, MALFORMED),
    "a proof that is no base64": ({"proof": lambda _: b",p=" + b"!" * 44}, MALFORMED),
    "an empty proof": ({"proof": lambda _: b",p="}, MALFORMED),
    "no proof": ({"proof": lambda _: b""}, MALFORMED),
    "more behind the proof": ({"proof": lambda proof: b",p=" + encoded(proof) + b",x=y"}, MALFORMED),
    "a NUL behind the proof": ({"proof": lambda proof: b",p=" + encoded(proof) + b"\0"}, MALFORMED),
    "two proofs": ({"proof": lambda proof: (b",p=" + encoded(proof)) * 2}, None),
}


def wrong_password(user: str) -> tuple[str, str]:
    return "28P01", f'password authentication failed for user "{user}"'


@pytest.mark.parametrize("what", WRONG_FIRST)
def test_a_first_message_that_is_wrong_is_refused(scram_gateway: Answering, known: str, what: str) -> None:
    changes, told = WRONG_FIRST[what]
    with RawClient(scram_gateway.gateway.port) as client:
        exchange = Exchange(client, known, **changes)
        exchange.begin()
        words = exchange.header + exchange.bare
        client.send(message(b"p", exchange.mechanism + b"\0" + struct.pack("!i", len(words)) + words))
        assert client.read_fatal() == told
    assert who(scram_gateway, known) == "trusted"


@pytest.mark.parametrize("what", WRONG_FINAL)
def test_a_final_message_that_is_wrong_is_refused(scram_gateway: Answering, known: str, what: str) -> None:
    changes, told = WRONG_FINAL[what]
    with RawClient(scram_gateway.gateway.port) as client:
        exchange = Exchange(client, known, **changes)
        exchange.begin()
        exchange.first()
        exchange.final()
        assert client.read_fatal() == (told or wrong_password(known))
    assert who(scram_gateway, known) == "trusted"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"header": b"y,,"}, NOT_BOUND, id="one who thinks that nothing could be bound"),
        pytest.param({"mechanism": PLUS, "header": b"n,,"}, MALFORMED, id="a binding mechanism without a binding"),
        pytest.param({"mechanism": PLUS, "header": b"y,,"}, NOT_BOUND, id="a binding mechanism, thinking it could not"),
        pytest.param({"mechanism": PLUS, "header": b"p=tls-unique,,"}, MALFORMED, id="another kind of binding"),
        pytest.param({"mechanism": PLUS, "header": b"p=tls-exporter,,"}, MALFORMED, id="a newer kind of binding"),
        pytest.param({"header": b"p=tls-server-end-point,,"}, MALFORMED, id="a binding with the other mechanism"),
    ],
)
def test_a_binding_that_is_wrong_from_the_start_is_refused(
    scram_gateway: Answering, known: str, authority: Authority, changes: dict[str, Any], told: tuple[str, str]
) -> None:
    with TlsClient(scram_gateway.gateway.port, authority.client_context()) as client:
        exchange = Exchange(client, known, **changes)
        exchange.begin()
        words = exchange.header + exchange.bare
        client.send(message(b"p", exchange.mechanism + b"\0" + struct.pack("!i", len(words)) + words))
        assert client.read_fatal() == told


@pytest.mark.parametrize("binding", [b"", bytes(32), b"x" * 48], ids=["none", "zeros", "too long"])
def test_a_binding_to_another_certificate_is_refused(
    scram_gateway: Answering, known: str, authority: Authority, binding: bytes
) -> None:
    with TlsClient(scram_gateway.gateway.port, authority.client_context()) as client:
        exchange = Exchange(client, known, PLUS, b"p=tls-server-end-point,,", binding)
        exchange.begin()
        exchange.first()
        exchange.final()
        assert client.read_fatal() == NOT_BOUND


def test_an_offer_of_binding_that_was_taken_out_on_the_way_is_found_out(
    scram_gateway: Answering, known: str, authority: Authority
) -> None:
    """Somebody in the middle strikes PLUS from the offer, and makes "I missed it" in the answer into "I cannot"."""
    with TlsClient(scram_gateway.gateway.port, authority.client_context()) as client:
        exchange = Exchange(client, known, header=b"y,,")
        exchange.begin()
        exchange.header = b"n,,"
        exchange.first()
        exchange.header = b"y,,"
        exchange.final()
        assert client.read_fatal() == NOT_BOUND


# What is no message of SASL


@pytest.mark.parametrize("length", [0, 3, 1025, 65_536, 2**31 - 1, -1])
def test_a_message_of_a_forbidden_length_is_refused_on_its_header(
    scram_gateway: Answering, known: str, length: int
) -> None:
    for steps in (1, 2):
        with RawClient(scram_gateway.gateway.port) as client:
            exchange = Exchange(client, known)
            exchange.begin()
            if steps == 2:
                exchange.first()
            client.send(b"p" + struct.pack("!i", length))
            assert client.read_fatal() == MALFORMED


def test_the_longest_message_that_is_allowed_is_served(scram_gateway: Answering, known: str) -> None:
    room = 1024 - 4 - len(PLAIN) - 1 - 4 - len(b"n,,n=,r=")
    # Its nonce comes back to be sent once more, with ours behind it, which would be too long then.
    with RawClient(scram_gateway.gateway.port) as client:
        exchange = Exchange(client, known, bare=b"n=,r=nonce,x=" + b"x" * (room - len(b"nonce,x=")))
        exchange.goes_through()
    with RawClient(scram_gateway.gateway.port) as client:
        exchange = Exchange(client, known, bare=b"n=,r=nonce,x=" + b"x" * (room - len(b"nonce,x=") + 1))
        exchange.begin()
        words = exchange.header + exchange.bare
        client.send(message(b"p", PLAIN + b"\0" + struct.pack("!i", len(words)) + words))
        assert client.read_fatal() == MALFORMED


def test_how_long_a_message_may_be_is_a_setting(tmp_path: Path, postgres: ThrowawayPostgres) -> None:
    settings = {"authenticator": {"method": "scram-sha-256"}, "max_sasl_message": 2000}
    with answering_gateway(tmp_path, **settings) as answering:
        user = answering.user(at(postgres, _META_SOURCE_VERIFIER=verifier_of()))
        with RawClient(answering.gateway.port) as client:
            Exchange(client, user, bare=b"n=,r=nonce,x=" + b"x" * 1500).goes_through()


FIRST = b"n,,n=,r=nonce"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(message(b"p", b""), id="an empty message"),
        pytest.param(message(b"p", PLAIN), id="a mechanism without its NUL"),
        pytest.param(message(b"p", PLAIN + b"\0"), id="no length"),
        pytest.param(message(b"p", PLAIN + b"\0\0\0\0"), id="half a length"),
        pytest.param(message(b"p", PLAIN + b"\0" + struct.pack("!i", 5) + FIRST), id="a length that is too short"),
        pytest.param(message(b"p", PLAIN + b"\0" + struct.pack("!i", 99) + FIRST), id="a length that is too long"),
        pytest.param(message(b"p", PLAIN + b"\0" + struct.pack("!i", -1) + FIRST), id="no message, and one"),
        pytest.param(message(b"p", PLAIN + b"\0" + struct.pack("!i", -2)), id="a negative length"),
        pytest.param(message(b"p", PLAIN + b"\0" + struct.pack("!i", -(2**31))), id="the most negative length"),
        pytest.param(password(), id="an MD5 answer"),
        pytest.param(password(SECRET), id="the password"),
        pytest.param(query("select 1"), id="a query"),
        pytest.param(message(b"X"), id="Terminate"),
        pytest.param(startup(), id="a startup packet"),
    ],
)
def test_what_is_no_message_of_the_exchange_is_refused(scram_gateway: Answering, known: str, answer: bytes) -> None:
    with RawClient(scram_gateway.gateway.port) as client:
        Exchange(client, known).begin()
        client.send(answer)
        assert client.read_fatal() == MALFORMED
    assert SECRET not in scram_gateway.gateway.log.read_text()


def test_what_is_sent_behind_the_proof_is_answered_after_the_login(scram_gateway: Answering, known: str) -> None:
    with RawClient(scram_gateway.gateway.port) as client:
        exchange = Exchange(client, known)
        exchange.begin()
        exchange.first()
        held_back: list[bytes] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client, "send", held_back.append)
            exchange.final()
        client.send(b"".join(held_back) + query("select 42"))
        client.read_until(b"Z")
        assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")


def test_a_refused_client_cannot_try_again_on_its_connection(scram_gateway: Answering, known: str) -> None:
    with RawClient(scram_gateway.gateway.port) as client:
        exchange = Exchange(client, known)
        exchange.begin()
        exchange.first()
        exchange.final("wrong")
        with contextlib.suppress(ConnectionError):
            exchange.final()
        assert client.read_fatal() == wrong_password(known)


# What the authenticator is asked, and what it must say


def test_the_authenticator_is_asked_without_a_credential(tmp_path: Path, postgres: ThrowawayPostgres) -> None:
    method = {"method": "scram-sha-256"}
    with asking_gateway(tmp_path, postgres.port, cleartext=False, authenticator=method) as asked:
        with RawClient(asked.port) as client:
            client.send(startup())
            assert client.read_fatal() == SERVICE_FAILED
        lines = asked.questions[-1].decode().split("\n")
    assert [line.partition("=")[0] for line in lines] == [
        *("user", "database", "_SOURCE_ADDR", "_SOURCE_METHOD", "_SOURCE_SESSION")
    ]
    assert "_SOURCE_METHOD=scram-sha-256" in lines


GOOD = verifier_of()
BAD_VERIFIERS = {
    "none": "",
    "an MD5": md5_of(SECRET, "alice"),
    "the password": SECRET,
    "another mechanism": GOOD.replace("SHA-256", "SHA-1"),
    "no iterations": GOOD.replace("4096", "0"),
    "negative iterations": GOOD.replace("4096", "-1"),
    "far too many iterations": GOOD.replace("4096", "1" + "0" * 30),
    "no salt": GOOD.replace(encoded(SALT).decode(), ""),
    "a salt that is no base64": GOOD.replace(encoded(SALT).decode(), "!!!!"),
    "a key too few": GOOD.rpartition(":")[0],
    "a key that is too short": GOOD[:-4] + "=" * 4,
    "a space behind it": GOOD + " ",
    "small letters": GOOD.replace("SCRAM", "scram"),
}


@pytest.mark.parametrize("what", BAD_VERIFIERS)
def test_an_answer_without_a_verifier_of_scram_is_the_authenticators_fault(
    scram_gateway: Answering, postgres: ThrowawayPostgres, what: str
) -> None:
    verifier = BAD_VERIFIERS[what]
    user = scram_gateway.user(at(postgres) | ({"_META_SOURCE_VERIFIER": verifier} if verifier else {}))
    with RawClient(scram_gateway.gateway.port) as client:
        client.send(startup(user=user))
        assert client.read_fatal() == SERVICE_FAILED
    line = scram_gateway.gateway.wait_for("refused", user=user)
    assert line["fault_of"] == "authenticator"
    assert "_META_SOURCE_VERIFIER" in line["reason"]
    if verifier:
        assert verifier not in scram_gateway.gateway.log.read_text()


def test_a_verifier_is_never_logged(scram_gateway: Answering, postgres: ThrowawayPostgres, known: str) -> None:
    who(scram_gateway, known)
    refused(scram_gateway, known, "wrong")
    scram_gateway.gateway.wait_for("refused", user=known)
    log = scram_gateway.gateway.log.read_text()
    for part in (*GOOD.replace("$", ":").split(":")[2:], SECRET):
        assert part not in log


# Drivers' own ideas of passwords


@pytest.mark.parametrize(
    "secret",
    [UMLAUT, "ix \u0308\u00c1 x", "pass\u00adword", "\u00aa", "a b", "x" * 1000, "💣", "\u0627\u0031", "tab\there"],
)
def test_passwords_are_prepared_as_postgresql_does_it(
    scram_gateway: Answering, postgres: ThrowawayPostgres, secret: str
) -> None:
    """The verifier is PostgreSQL's own, the client libpq, which prepares it too."""
    user = scram_gateway.user(at(postgres, _META_SOURCE_VERIFIER=stored_by(postgres, secret)))
    assert who(scram_gateway, user, secret) == "trusted"


def stored_by(server: ThrowawayPostgres, secret: str) -> str:
    """What PostgreSQL stores of a password."""
    quoted = secret.replace("'", "''")
    return server.sql(
        "begin; set local password_encryption = 'scram-sha-256'; create role stored login; "
        f"alter role stored password '{quoted}'; "
        "select rolpassword from pg_authid where rolname = 'stored'; rollback;"
    )


# Verifiers in the other methods


def test_an_md5_verifier_serves_method_md5(gateways: Callable[[str], Answering], postgres: ThrowawayPostgres) -> None:
    answering, user = gateways("md5"), new_user()
    answering.user(at(postgres, _META_SOURCE_VERIFIER=md5_of(SECRET, user)), user)
    assert who(answering, user, require_auth="md5") == "trusted"
    assert f'FATAL:  password authentication failed for user "{user}"' in refused(answering, user, "wrong")
    assert answering.gateway.wait_for("refused", user=user)["reason"] == "wrong password"


def test_an_md5_verifier_of_another_user_serves_nobody(
    gateways: Callable[[str], Answering], postgres: ThrowawayPostgres
) -> None:
    answering = gateways("md5")
    user = answering.user(at(postgres, _META_SOURCE_VERIFIER=md5_of(SECRET, "somebody else")))
    assert "password authentication failed" in refused(answering, user)


@pytest.mark.parametrize("method", ["md5", "cleartext"])
@pytest.mark.parametrize("verifier", ["nonsense", "md5" + "A" * 32, "md5" + "0" * 31, "SCRAM-SHA-256$x"])
def test_a_verifier_that_is_none_is_the_authenticators_fault(
    gateways: Callable[[str], Answering], postgres: ThrowawayPostgres, method: str, verifier: str
) -> None:
    answering = gateways(method)
    user = answering.user(at(postgres, _META_SOURCE_VERIFIER=verifier))
    assert "authentication service failed" in refused(answering, user)
    line = answering.gateway.wait_for("refused", user=user)
    assert (line["sqlstate"], line["fault_of"]) == ("58000", "authenticator")
    assert verifier not in answering.gateway.log.read_text()


def test_a_verifier_of_scram_does_not_serve_method_md5(
    gateways: Callable[[str], Answering], postgres: ThrowawayPostgres
) -> None:
    answering = gateways("md5")
    user = answering.user(at(postgres, _META_SOURCE_VERIFIER=verifier_of()))
    assert "authentication service failed" in refused(answering, user)
    assert "method md5 cannot use" in answering.gateway.wait_for("refused", user=user)["reason"]


def test_either_verifier_serves_method_cleartext(
    gateways: Callable[[str], Answering], postgres: ThrowawayPostgres
) -> None:
    answering = gateways("cleartext")
    for make in (md5_of, lambda secret, _: verifier_of(secret)):
        user = new_user()
        answering.user(at(postgres, _META_SOURCE_VERIFIER=make(SECRET, user)), user)
        assert who(answering, user, require_auth="password") == "trusted"
        assert f'FATAL:  password authentication failed for user "{user}"' in refused(answering, user, "wrong")


def test_a_password_in_clear_is_prepared_before_it_is_compared(
    gateways: Callable[[str], Answering], postgres: ThrowawayPostgres
) -> None:
    answering = gateways("cleartext")
    user = answering.user(at(postgres, _META_SOURCE_VERIFIER=stored_by(postgres, UMLAUT)))
    assert who(answering, user, UMLAUT) == "trusted"
    assert who(answering, user, "ix \u0308\u00c1 x") == "trusted"
    assert "password authentication failed" in refused(answering, user, "ix")


@pytest.mark.parametrize("method", ["md5", "cleartext"])
def test_without_a_verifier_the_authenticator_has_judged(
    gateways: Callable[[str], Answering], postgres: ThrowawayPostgres, method: str
) -> None:
    answering = gateways(method)
    assert who(answering, answering.user(at(postgres)), "whatever") == "trusted"


# What the client proved, used at the target


def stored(server: ThrowawayPostgres, role: str) -> str:
    return server.sql(f"select rolpassword from pg_authid where rolname = '{role}'")


@pytest.mark.parametrize(
    ("role", "secret"),
    [("scrammed", "scram secret"), ("hashed", "hashed secret"), ("clear", "clear secret"), ("umlaut", UMLAUT)],
)
@pytest.mark.parametrize("compared", [False, True])
def test_a_password_in_clear_opens_the_target_too(
    gateways: Callable[[str], Answering], postgres: ThrowawayPostgres, role: str, secret: str, *, compared: bool
) -> None:
    answering, user = gateways("cleartext"), new_user()
    lines = at(postgres, role, _META_TARGET_CRED="client")
    if compared:
        lines["_META_SOURCE_VERIFIER"] = stored_by(postgres, secret)
    answering.user(lines, user)
    assert who(answering, user, secret) == role
    if not compared:
        # Then it is the target that finds out.
        assert NOT_LET_IN[1] in refused(answering, user, "wrong")
        assert answering.gateway.wait_for("refused", user=user)["sqlstate"] == "08004"


def test_what_scram_proves_opens_a_target_that_stores_the_same(
    scram_gateway: Answering, postgres: ThrowawayPostgres
) -> None:
    for role, secret in (("scrammed", "scram secret"), ("umlaut", UMLAUT)):
        verifier = stored(postgres, role)
        user = scram_gateway.user(at(postgres, role, _META_TARGET_CRED="client", _META_SOURCE_VERIFIER=verifier))
        assert who(scram_gateway, user, secret) == role
        assert "password authentication failed" in refused(scram_gateway, user, "wrong")


def test_what_scram_proves_opens_a_target_over_tls(
    scram_gateway: Answering, tls_postgres: ThrowawayPostgres, authority: Authority
) -> None:
    lines = at(tls_postgres, "scrammed", _META_TARGET_CRED="client", _META_TARGET_TLS="verify-full")
    lines |= {"_META_TARGET_CA": str(authority.cert), "_META_SOURCE_VERIFIER": stored(tls_postgres, "scrammed")}
    user = scram_gateway.user(lines)
    bound = {"sslmode": "verify-full", "sslrootcert": str(authority.cert), "channel_binding": "require"}
    assert who(scram_gateway, user, "scram secret", **bound) == "scrammed"


def forged(server: ThrowawayPostgres) -> str:
    """A verifier with the salt and iterations of the target's, of another password."""
    iterations, salt = stored(server, "scrammed").split("$")[1].split(":")
    return verifier_of(SECRET, base64.b64decode(salt), int(iterations))


@pytest.mark.parametrize(
    ("role", "which", "says"),
    [
        pytest.param("scrammed", "another", "does not store the verifier", id="another salt"),
        pytest.param("scrammed", "forged", "password authentication failed", id="another password"),
        pytest.param("hashed", "another", "target asks for MD5", id="MD5"),
        pytest.param("clear", "another", "target asks for a cleartext password", id="cleartext"),
    ],
)
def test_what_scram_proves_opens_no_target_that_stores_something_else(
    scram_gateway: Answering, postgres: ThrowawayPostgres, role: str, which: str, says: str
) -> None:
    verifier = verifier_of() if which == "another" else forged(postgres)
    user = scram_gateway.user(at(postgres, role, _META_TARGET_CRED="client", _META_SOURCE_VERIFIER=verifier))
    told = refused(scram_gateway, user)
    assert NOT_LET_IN[1] in told
    assert role not in told
    line = scram_gateway.gateway.wait_for("refused", user=user)
    assert (line["sqlstate"], line["fault_of"]) == ("08004", "target")
    assert says in line["reason"]


def test_what_was_proved_is_not_needed_where_the_target_asks_for_nothing(
    scram_gateway: Answering, postgres: ThrowawayPostgres
) -> None:
    lines = at(postgres, "trusted", _META_TARGET_CRED="client", _META_SOURCE_VERIFIER=verifier_of())
    assert who(scram_gateway, scram_gateway.user(lines)) == "trusted"


def test_an_md5_answer_opens_nothing_else(gateways: Callable[[str], Answering], postgres: ThrowawayPostgres) -> None:
    answering, user = gateways("md5"), new_user()
    lines = at(postgres, "hashed", _META_TARGET_CRED="client", _META_SOURCE_VERIFIER=md5_of(SECRET, user))
    answering.user(lines, user)
    assert "authentication service failed" in refused(answering, user)
    assert "_META_TARGET_CRED=client needs" in answering.gateway.wait_for("refused", user=user)["reason"]


# Channel binding with libpq


def bound_to(authority: Authority, **more: Any) -> dict[str, Any]:
    """What libpq is told that must bind the channel."""
    return {"sslmode": "verify-full", "sslrootcert": str(authority.cert), "channel_binding": "require"} | more


def test_libpq_binds_the_channel_by_itself_and_where_it_must(
    scram_gateway: Answering, known: str, authority: Authority
) -> None:
    for channel_binding in ("disable", "prefer", "require"):
        more = bound_to(authority, channel_binding=channel_binding, require_auth="scram-sha-256")
        assert who(scram_gateway, known, **more) == "trusted"


def test_libpq_that_must_bind_the_channel_speaks_to_no_other_method(
    gateways: Callable[[str], Answering], postgres: ThrowawayPostgres, authority: Authority
) -> None:
    for method in ("md5", "cleartext"):
        answering = gateways(method)
        told = refused(answering, answering.user(at(postgres)), **bound_to(authority))
        assert "channel binding required" in told


@contextlib.contextmanager
def in_the_middle(port: int, context: ssl.SSLContext, authority: Authority) -> Iterator[int]:
    """The port of somebody who has a good certificate too, and passes everything on."""

    def script(connection: socket.socket) -> None:
        with TlsClient(port, authority.client_context()) as onward:
            threading.Thread(target=pump, args=(onward.socket, connection), daemon=True).start()
            pump(connection, onward.socket)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    with ScriptedTarget(script, opens=opens_with_tls(context)) as listening:
        yield listening.port


@pytest.mark.parametrize("channel_binding", ["prefer", "require"])
def test_somebody_in_the_middle_is_found_out_by_channel_binding(
    scram_gateway: Answering, known: str, authority: Authority, channel_binding: str
) -> None:
    middle = server_context(authority.issue("in the middle of clients", "localhost", HOST))
    with in_the_middle(scram_gateway.gateway.port, middle, authority) as port:
        bound = bound_to(authority, channel_binding=channel_binding, port=port)
        assert NOT_BOUND[1] in refused(scram_gateway, known, **bound)
        # Without it he is not.
        assert who(scram_gateway, known, **(bound | {"channel_binding": "disable"})) == "trusted"


def bound_by(folder: Path, identity: Identity, **tls: Any) -> contextlib.AbstractContextManager[Answering]:
    """A gateway with this certificate, which clients trust by itself."""
    return answering_gateway(folder, authenticator={"method": "scram-sha-256"}, tls=identity.settings | tls)


@pytest.mark.parametrize("algorithm", [hashes.SHA256(), hashes.SHA384(), hashes.SHA512()], ids=lambda found: found.name)
def test_the_channel_is_bound_by_the_hash_that_the_certificate_is_signed_with(
    tmp_path: Path, postgres: ThrowawayPostgres, algorithm: hashes.HashAlgorithm
) -> None:
    identity = self_signed(tmp_path, "gateway", algorithm=algorithm)
    with bound_by(tmp_path, identity) as answering:
        user = answering.user(at(postgres, _META_SOURCE_VERIFIER=verifier_of()))
        trusting = {"sslmode": "verify-full", "sslrootcert": str(identity.cert), "channel_binding": "require"}
        assert who(answering, user, **trusting) == "trusted"


def test_a_certificate_that_nothing_can_be_bound_to_serves_who_need_not(
    tmp_path: Path, postgres: ThrowawayPostgres
) -> None:
    # Ed25519: its signatures have no hash of their own.
    identity = self_signed(tmp_path, "gateway")
    with bound_by(tmp_path, identity) as answering:
        user = answering.user(at(postgres, _META_SOURCE_VERIFIER=verifier_of()))
        assert who(answering, user, sslmode="require", channel_binding="prefer") == "trusted"
        assert "channel binding" in refused(answering, user, sslmode="require", channel_binding="require")


def test_the_channel_is_bound_to_the_certificate_of_the_host_that_was_asked_for(
    tmp_path: Path, postgres: ThrowawayPostgres, authority: Authority, identity: Identity
) -> None:
    hosts = {"one.example": authority.issue("bound one", "one.example").settings}
    with bound_by(tmp_path, identity, hosts=hosts) as answering:
        user = answering.user(at(postgres, _META_SOURCE_VERIFIER=verifier_of()))
        for name in ("one.example", "localhost"):
            assert who(answering, user, **bound_to(authority, host=name, hostaddr=HOST)) == "trusted"


def test_tickets_do_not_change_what_the_channel_is_bound_to(
    scram_gateway: Answering, known: str, authority: Authority, identity: Identity
) -> None:
    context = authority.client_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    binding = hashlib.sha256(identity.der).digest()
    with TlsClient(scram_gateway.gateway.port, context) as first:
        Exchange(first, known, PLUS, b"p=tls-server-end-point,,", binding).goes_through()
        session = first.tls.session
    with RawClient(scram_gateway.gateway.port) as client:
        client.send(SSL_REQUEST)
        assert client.read(1) == b"S"
        client.socket = resumed = context.wrap_socket(client.socket, server_hostname="localhost", session=session)
        assert resumed.session_reused
        Exchange(client, known, PLUS, b"p=tls-server-end-point,,", binding).goes_through()
