"""Method oauth: PostgreSQL's own bearer tokens (SASL OAUTHBEARER), with libpq 18 and byte by byte, over TLS alone."""

from __future__ import annotations

import contextlib
import ctypes
import json
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway, WriteAuthenticator
from tests.system.conftest import Run, assert_one_clear_line, new_user, running_gateway
from tests.tls import HOST, Authority, Identity, TlsClient
from tests.tokens import AUDIENCE, ISSUER, Endpoint, Issuer, publishes
from tests.wire import RawClient, message, startup

SCOPE = "openid db"
WELL_KNOWN = f"{ISSUER}/.well-known/openid-configuration"
OFFER = (b"R", b"\0\0\0\x0aOAUTHBEARER\0\0")
REFUSED = 'OAuth bearer authentication failed for user "{}"'
MALFORMED = ("08P01", "malformed OAUTHBEARER message")


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Identity:
    return authority.issue("oauth", "localhost", HOST)


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    return authority.client_context()


@pytest.fixture(scope="module")
def gateway_of_bearers(
    issuer: Issuer, identity: Identity, postgres: ThrowawayPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway of kind jwt and method oauth, shared by the tests of this file."""
    with Endpoint(publishes(issuer)) as endpoint:
        authenticator = {
            "kind": "jwt",
            "cmd": [],
            "method": "oauth",
            "targets": {"all": {"host": f"127.0.0.1:{postgres.port}", "user": "trusted", "application_name": "{user}"}},
            "jwt": {
                "issuer": ISSUER,
                "audience": AUDIENCE,
                "jwks_url": endpoint.url,
                "jwks_min_seconds": 0.05,
                "rules": [{"target": "all"}],
            },
            "oauth": {"scope": SCOPE},
        }
        folder = tmp_path_factory.mktemp("oauth")
        with running_gateway(folder, Path(), authenticator=authenticator, tls=identity.settings) as gateway:
            yield gateway


# With libpq


class BearerRequest(ctypes.Structure):
    """PGoauthBearerRequest of libpq-fe.h."""

    _fields_ = (
        ("openid_configuration", ctypes.c_char_p),
        ("scope", ctypes.c_char_p),
        ("flow", ctypes.c_void_p),
        ("cleanup", ctypes.c_void_p),
        ("token", ctypes.c_char_p),
        ("user", ctypes.c_void_p),
    )


BEARER_TOKEN = 1
HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(BearerRequest))


class Libpq:
    """psycopg's own libpq, with an answer to its question for a token."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.asked: list[tuple[str, str]] = []
        """The URL of discovery and the scope that a token was asked for with."""
        self._library = library
        self._token = b""
        self._hook = HOOK(self._answer)
        library.PQsetAuthDataHook.argtypes = (ctypes.c_void_p,)
        library.PQsetAuthDataHook(ctypes.cast(self._hook, ctypes.c_void_p))

    def unhook(self) -> None:
        self._library.PQsetAuthDataHook(None)

    def _answer(self, kind: int, _connection: int, request: Any) -> int:
        if kind != BEARER_TOKEN:
            return 0
        asked = request.contents
        self.asked.append((asked.openid_configuration.decode(), (asked.scope or b"").decode()))
        asked.token = self._token
        return 1

    def connect(self, port: int, token: str, authority: Authority, **more: str) -> psycopg.Connection[Any]:
        self._token = token.encode()
        options = {"host": "localhost", "hostaddr": HOST, "user": "alice", "dbname": "postgres"}
        options |= {"sslmode": "verify-full", "sslrootcert": str(authority.cert), "require_auth": "oauth"}
        options |= {"oauth_issuer": ISSUER, "oauth_client_id": "psql"} | more
        return psycopg.connect(port=port, **options)


@pytest.fixture
def libpq() -> Iterator[Libpq]:
    assert psycopg.pq.version() >= 180000
    (path,) = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "psycopg" in line and "/libpq" in line
    }
    loaded = Libpq(ctypes.CDLL(path))
    yield loaded
    loaded.unhook()


def test_libpq_is_told_where_tokens_are_given_and_gets_in_with_one(
    gateway_of_bearers: Gateway, libpq: Libpq, issuer: Issuer, authority: Authority
) -> None:
    with libpq.connect(gateway_of_bearers.port, issuer.token("alice"), authority) as session:
        (row,) = session.execute("select current_user, current_setting('application_name')").fetchall()
    assert row == ("trusted", "alice")
    assert libpq.asked == [(WELL_KNOWN, SCOPE)]


def test_libpq_that_knows_its_issuer_shows_its_token_at_once(
    gateway_of_bearers: Gateway, libpq: Libpq, issuer: Issuer, authority: Authority
) -> None:
    user = new_user()
    options = {"user": user, "oauth_issuer": WELL_KNOWN, "oauth_scope": "mine"}
    with libpq.connect(gateway_of_bearers.port, issuer.token(user), authority, **options) as session:
        assert session.execute("select 42").fetchone() == (42,)
    assert libpq.asked == [(WELL_KNOWN, "mine")]
    assert gateway_of_bearers.wait_for("login", user=user)["tls"] == "TLSv1.3"
    assert not [line for line in gateway_of_bearers.log_lines("refused") if line["user"] == user]


def test_libpq_with_a_bad_token_is_refused_and_the_log_says_why(
    gateway_of_bearers: Gateway, libpq: Libpq, issuer: Issuer, authority: Authority
) -> None:
    user = new_user()
    token = issuer.token("somebody else")
    with pytest.raises(psycopg.OperationalError) as refused:
        libpq.connect(gateway_of_bearers.port, token, authority, user=user, oauth_issuer=WELL_KNOWN)
    assert REFUSED.format(user) in str(refused.value)
    line = gateway_of_bearers.wait_for("refused", user=user)
    assert line["sqlstate"] == "28000"
    assert "another user" in line["reason"]
    assert token.split(".")[2] not in gateway_of_bearers.log.read_text()


def test_libpq_does_not_take_tokens_to_an_issuer_that_is_not_its_own(
    gateway_of_bearers: Gateway, libpq: Libpq, issuer: Issuer, authority: Authority
) -> None:
    with pytest.raises(psycopg.OperationalError, match="issuer"):
        libpq.connect(gateway_of_bearers.port, issuer.token(), authority, oauth_issuer="https://other.example")
    assert libpq.asked == []


# Byte by byte


def bearer(token: str) -> bytes:
    return f"n,,\x01auth=Bearer {token}\x01\x01".encode()


def initial(data: bytes, mechanism: bytes = b"OAUTHBEARER") -> bytes:
    return message(b"p", mechanism + b"\0" + len(data).to_bytes(4) + data)


@contextlib.contextmanager
def offered(
    gateway: Gateway, context: ssl.SSLContext, user: str = "alice", *, direct: bool = False
) -> Iterator[TlsClient]:
    """A client that has been asked for a token."""
    with TlsClient(gateway.port, context, direct=direct) as client:
        client.send(startup(user=user))
        assert client.read_message() == OFFER
        yield client


@pytest.mark.parametrize("direct", [False, True])
def test_a_token_over_tls_lets_its_user_in(
    gateway_of_bearers: Gateway, context: ssl.SSLContext, issuer: Issuer, *, direct: bool
) -> None:
    with offered(gateway_of_bearers, context, direct=direct) as client:
        client.send(initial(bearer(issuer.token("alice"))))
        assert client.read_message() == (b"R", bytes(4))
        client.read_until(b"Z")
        client.assert_served()


def test_a_token_that_comes_byte_by_byte_is_the_same(
    gateway_of_bearers: Gateway, context: ssl.SSLContext, issuer: Issuer
) -> None:
    with offered(gateway_of_bearers, context) as client:
        whole = initial(bearer(issuer.token("alice")))
        for at in range(len(whole)):
            client.send(whole[at : at + 1])
        client.read_until(b"Z")
        client.assert_served()


def test_what_is_pipelined_behind_the_token_is_answered(
    gateway_of_bearers: Gateway, context: ssl.SSLContext, issuer: Issuer
) -> None:
    with offered(gateway_of_bearers, context) as client:
        client.send(initial(bearer(issuer.token("alice"))) + message(b"Q", b"select 42\0"))
        client.read_until(b"Z")
        assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")


def test_a_token_of_tens_of_kilobytes_fits_where_the_settings_allow_it(
    gateway_of_bearers: Gateway, context: ssl.SSLContext, issuer: Issuer
) -> None:
    with offered(gateway_of_bearers, context) as client:
        client.send(initial(bearer(issuer.token("alice", filling="x" * 10_000))))
        client.read_until(b"Z")
        client.assert_served()


@pytest.mark.parametrize("data", [b"n,,\x01auth=\x01\x01", b"n,,\x01auth=Basic x\x01\x01", bearer("a.b.c")])
def test_a_client_without_a_good_token_is_told_where_to_get_one_then_refused(
    gateway_of_bearers: Gateway, context: ssl.SSLContext, data: bytes
) -> None:
    user = new_user()
    with offered(gateway_of_bearers, context, user) as client:
        client.send(initial(data))
        kind, body = client.read_message()
        assert (kind, body[:4]) == (b"R", b"\0\0\0\x0b")
        told = json.loads(body[4:])
        assert told == {"status": "invalid_token", "openid-configuration": WELL_KNOWN, "scope": SCOPE}
        client.send(message(b"p", b"\x01"))
        assert client.read_fatal() == ("28000", REFUSED.format(user))


BROKEN: dict[str, bytes] = {
    "an empty message": initial(b""),
    "channel binding": initial(b"p=tls-server-end-point,,\x01auth=Bearer a\x01\x01"),
    "no separators": initial(b"n,,auth=Bearer a"),
    "two tokens": initial(b"n,,\x01auth=Bearer a\x01auth=Bearer b\x01\x01"),
    "more behind it": initial(bearer("a") + b"\0"),
    "another mechanism": initial(bearer("a"), b"SCRAM-SHA-256"),
    "a password": message(b"p", b"secret\0"),
    "a query": message(b"Q", b"select 42\0"),
    "a megabyte": b"p" + (1 << 20).to_bytes(4),
    "a length below four": b"p\0\0\0\x03",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_message_that_is_none_ends_the_login(gateway_of_bearers: Gateway, context: ssl.SSLContext, how: str) -> None:
    with offered(gateway_of_bearers, context) as client:
        client.send(BROKEN[how])
        assert client.read_fatal() == MALFORMED


def test_a_client_cannot_answer_its_refusal_with_another_token(
    gateway_of_bearers: Gateway, context: ssl.SSLContext, issuer: Issuer
) -> None:
    with offered(gateway_of_bearers, context) as client:
        client.send(initial(bearer("a.b.c")))
        assert client.read_message()[0] == b"R"
        client.send(message(b"p", bearer(issuer.token("alice"))))
        assert client.read_fatal() == MALFORMED


def test_nobody_may_ask_to_be_somebody_else(
    gateway_of_bearers: Gateway, context: ssl.SSLContext, issuer: Issuer
) -> None:
    with offered(gateway_of_bearers, context) as client:
        client.send(initial(bearer(issuer.token("alice")).replace(b"n,,", b"n,a=mallory,")))
        sqlstate, text = client.read_fatal()
    assert sqlstate == "0A000"
    assert "authorization identity" in text


@pytest.mark.parametrize("sent", [b"", initial(bearer("a.b.c"))[:30], initial(bearer("a.b.c"))])
def test_a_client_that_leaves_in_the_middle_is_not_missed(
    gateway_of_bearers: Gateway, context: ssl.SSLContext, sent: bytes
) -> None:
    user = new_user()
    with offered(gateway_of_bearers, context, user) as client:
        client.send(sent)
    assert "left" in gateway_of_bearers.wait_for("refused", user=user)["reason"]


def test_without_tls_no_token_is_asked_for(gateway_of_bearers: Gateway) -> None:
    with RawClient(gateway_of_bearers.port) as client:
        client.send(startup())
        assert client.read_fatal() == ("28000", "OAuth bearer authentication requires TLS")


# With other kinds


Start = Callable[..., Gateway]


@pytest.fixture
def start(start_gateway: StartGateway, identity: Identity) -> Start:
    def begin(cmd: Path) -> Gateway:
        told = {"issuer": ISSUER, "scope": SCOPE}
        return start_gateway(cmd, authenticator={"method": "oauth", "oauth": told}, tls=identity.settings)

    return begin


def test_a_command_gets_the_token_and_says_who_that_is(
    start: Start, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres, context: ssl.SSLContext
) -> None:
    gateway = start(
        authenticator(
            f'echo "_META_TARGET_HOST=127.0.0.1:{postgres.port}"\n'
            "echo user=trusted\n"
            "echo database=postgres\n"
            'echo "application_name=$(field _SOURCE_METHOD) $(field _SOURCE_CRED) $(field _SOURCE_SALT)"\n'
            '[ "$(field _SOURCE_CRED)" != bad ]'
        )
    )
    with offered(gateway, context) as client:
        client.send(initial(bearer("good")))
        client.read_until(b"Z")
        client.send(message(b"Q", b"select current_setting('application_name')\0"))
        (row,) = [body for kind, body in client.read_until(b"Z") if kind == b"D"]
        assert row[6:] == b"oauth good 00000000"
    with offered(gateway, context) as client:
        client.send(initial(bearer("bad")))
        assert client.read_message()[1][:4] == b"\0\0\0\x0b"
        client.send(message(b"p", b"\x01"))
        assert client.read_fatal() == ("28000", REFUSED.format("alice"))


def test_a_verifier_is_no_answer_to_a_token(
    start: Start, authenticator: WriteAuthenticator, context: ssl.SSLContext
) -> None:
    script = authenticator("echo _META_TARGET_HOST=127.0.0.1:1\necho user=x\necho _META_SOURCE_VERIFIER=md5" + 32 * "0")
    with offered(start(script), context) as client:
        client.send(initial(bearer("whatever")))
        assert client.read_fatal()[0] == "58000"


def test_a_command_may_word_the_refusal(
    start: Start, authenticator: WriteAuthenticator, context: ssl.SSLContext
) -> None:
    gateway = start(authenticator("echo _META_ERROR=come back tomorrow\nexit 1"))
    with offered(gateway, context) as client:
        client.send(initial(bearer("bad")))
        client.read_message()
        client.send(message(b"p", b"\x01"))
        assert client.read_fatal() == ("28000", "come back tomorrow")


def test_a_token_may_be_tried_without_a_client(
    run: Run, issuer: Issuer, identity: Identity, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_bytes(issuer.key_set)
    wanted = {
        "kind": "jwt",
        "method": "oauth",
        "targets": {"all": {"host": f"127.0.0.1:{postgres.port}", "user": "trusted"}},
        "jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": str(keys), "rules": [{"target": "all"}]},
    }
    (tmp_path / "pgauthproxy.yaml").write_text(yaml.safe_dump({"authenticator": wanted, "tls": identity.settings}))
    token = issuer.token("alice")
    done = run("auth", "--user", "alice", "--database", "postgres", "--connect", typed=f"{token}\n")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "  _SOURCE_CRED=***" in done.stdout.splitlines()
    assert token not in done.stdout
    refused = run("auth", "--user", "bob", typed=f"{token}\n")
    assert refused.returncode == 1
    assert "token is for another user" in refused.stdout


@pytest.mark.parametrize("chained", [False, True])
def test_a_file_of_users_knows_no_tokens(run: Run, identity: Identity, tmp_path: Path, chained: bool) -> None:
    users: dict[str, Any] = {"users": {"file": "users.yaml"}}
    wanted = {"chain": [users]} if chained else users
    wanted |= {"method": "oauth", "oauth": {"issuer": ISSUER}}
    (tmp_path / "pgauthproxy.yaml").write_text(yaml.safe_dump({"authenticator": wanted, "tls": identity.settings}))
    assert_one_clear_line(run(), "users knows no tokens")
