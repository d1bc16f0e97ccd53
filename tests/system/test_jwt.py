"""Kind jwt: tokens in the place of passwords, their keys at a real endpoint that changes, breaks and comes back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway
from tests.system.conftest import (
    NOT_LOADED,
    Run,
    assert_one_clear_line,
    new_user,
    refusal,
    reload,
    running_gateway,
    wait_until,
)
from tests.tls import Authority, server_context
from tests.tokens import AUDIENCE, ISSUER, Answer, Endpoint, Issuer, publishes, respond
from tests.wire import RawClient, password, startup

REFUSED = 'password authentication failed for user "{}"'
FAILED = "authentication service failed"


def settings(postgres: ThrowawayPostgres, **jwt: Any) -> dict[str, Any]:
    """A kind jwt that sends users of group writers in as one role, all others as another one."""
    host = f"127.0.0.1:{postgres.port}"
    return {
        "kind": "jwt",
        "cmd": [],
        "method": "cleartext",
        "targets": {
            "writing": {"host": host, "user": "scrammed", "password": "scram secret", "application_name": "{user}"},
            "reading": {"host": host, "user": "trusted"},
        },
        "jwt": {
            "issuer": ISSUER,
            "audience": AUDIENCE,
            "jwks_min_seconds": 0.05,
            "jwks_timeout": 1,
            "rules": [{"claim": "groups", "contains": "writers", "target": "writing"}, {"target": "reading"}],
            **jwt,
        },
    }


def asked(port: int, user: str, token: str, sql: str = "select current_user") -> Any:
    """The one value that a query gives to who logs in with this token."""
    with psycopg.connect(host="127.0.0.1", port=port, user=user, password=token, dbname="postgres") as session:
        return session.execute(sql).fetchone()[0]


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture(scope="module")
def gateway_of_tokens(
    issuer: Issuer, postgres: ThrowawayPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway that reads the keys of `issuer`, shared by the tests of this file that break nothing."""
    with (
        Endpoint(publishes(issuer)) as endpoint,
        running_gateway(
            tmp_path_factory.mktemp("jwt"),
            Path(),
            authenticator=settings(postgres, jwks_url=endpoint.url, end_with_token=True),
        ) as gateway,
    ):
        yield gateway


def test_the_claims_of_a_token_say_as_whom_its_user_goes_in(gateway_of_tokens: Gateway, issuer: Issuer) -> None:
    port = gateway_of_tokens.port
    assert asked(port, "alice", issuer.token("alice")) == "trusted"
    assert asked(port, "alice", issuer.token("alice", groups=["readers", "writers"])) == "scrammed"
    named = issuer.token("alice", groups=["writers"])
    assert asked(port, "alice", named, "select current_setting('application_name')") == "alice"


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": 1}, "expired"),
        ({"nbf": 4_000_000_000}, "not yet valid"),
        ({"aud": "other.example"}, "Audience"),
        ({"iss": "https://mallory.example"}, "issuer"),
        ({"sub": "somebody else"}, "another user"),
    ],
)
def test_a_bad_token_looks_like_a_wrong_password_and_the_log_says_why(
    gateway_of_tokens: Gateway, issuer: Issuer, claims: dict[str, Any], reason: str
) -> None:
    user = new_user()
    token = issuer.token(user, **claims)
    error, said = refusal(gateway_of_tokens, user, token)
    assert (error["C"], error["M"]) == ("28P01", REFUSED.format(user))
    assert reason in said
    assert token.split(".")[2] not in gateway_of_tokens.log.read_text()


@pytest.mark.parametrize("shown", ["secret", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", "x" * 20_000])
def test_what_is_no_token_is_a_wrong_password(gateway_of_tokens: Gateway, shown: str) -> None:
    user = new_user()
    error, _ = refusal(gateway_of_tokens, user, shown)
    assert (error["C"], error["M"]) == ("28P01", REFUSED.format(user))


def test_a_token_of_a_megabyte_is_not_read(gateway_of_tokens: Gateway) -> None:
    with RawClient(gateway_of_tokens.port) as client:
        client.send(startup())
        client.read_message()
        client.send(b"p" + (1 << 20).to_bytes(4) + b"x" * 100)
        assert client.read_fatal() == ("08P01", "expected a valid password message")


def test_the_session_ends_with_its_token(gateway_of_tokens: Gateway, issuer: Issuer) -> None:
    user = new_user()
    # Within the leeway: a moment is left.
    token = issuer.token(user, exp=int(time.time()) + 1)
    with RawClient(gateway_of_tokens.port) as client:
        client.send(startup(user=user))
        client.read_message()
        client.send(password(token))
        client.read_until(b"Z")
        sqlstate, text = client.read_fatal()
    assert (sqlstate, text) == ("57P01", "terminating connection: its time limit is reached")


# The endpoint


@pytest.fixture
def start(start_gateway: StartGateway, postgres: ThrowawayPostgres) -> Any:
    """Starts a gateway with these settings of jwt."""
    return lambda **jwt: start_gateway([], authenticator=settings(postgres, **jwt))


def test_keys_that_change_are_found_without_a_restart_and_old_ones_end(start: Any) -> None:
    issuer = Issuer()
    with Endpoint(publishes(issuer)) as endpoint:
        gateway = start(jwks_url=endpoint.url)
        old = issuer.token("alice")
        assert asked(gateway.port, "alice", old) == "trusted"
        issuer.rotate()
        wait_until(lambda: served(gateway, issuer.token("alice")), "the new key to be known")
        user = new_user()
        _, reason = refusal(gateway, user, old)
        assert "not known" in reason


def served(gateway: Gateway, token: str, user: str = "alice") -> bool:
    try:
        return bool(asked(gateway.port, user, token) == "trusted")
    except psycopg.OperationalError:
        return False


def test_tokens_of_unknown_keys_do_not_make_the_gateway_ask_for_each_of_them(start: Any) -> None:
    issuer = Issuer()
    with Endpoint(publishes(issuer)) as endpoint:
        gateway = start(jwks_url=endpoint.url, jwks_min_seconds=300)
        assert asked(gateway.port, "alice", issuer.token("alice")) == "trusted"
        for number in range(10):
            _, reason = refusal(gateway, new_user(), issuer.token("alice", key_id=f"unknown {number}"))
            assert "not known" in reason
        assert endpoint.requests == 1


def test_an_endpoint_that_is_down_leaves_the_keys_that_are_known_in_force(start: Any) -> None:
    issuer = Issuer()
    with Endpoint(publishes(issuer)) as endpoint:
        gateway = start(jwks_url=endpoint.url, jwks_seconds=0.01)
        assert asked(gateway.port, "alice", issuer.token("alice")) == "trusted"
    for _ in range(5):
        assert asked(gateway.port, "alice", issuer.token("alice")) == "trusted"
    wait_until(lambda: served(gateway, issuer.token("alice")) and failures(gateway), "the endpoint to be missed")
    assert "the old ones stay" in failures(gateway)[0]["event"]


def failures(gateway: Gateway) -> list[dict[str, Any]]:
    return [line for line in gateway.log_lines() if line["event"].startswith("keys of tokens not read")]


def test_a_gateway_starts_without_its_endpoint_and_serves_once_that_is_there(start: Any) -> None:
    issuer = Issuer()
    with Endpoint(publishes(issuer)) as endpoint:
        port = endpoint.port
    gateway = start(jwks_url=endpoint.url)
    user = new_user()
    error, reason = refusal(gateway, user, issuer.token(user))
    assert (error["C"], error["M"]) == ("58000", FAILED)
    assert "no keys to verify tokens with" in reason
    with Endpoint(publishes(issuer), port=port):
        wait_until(lambda: served(gateway, issuer.token("alice")), "the keys to be read")


def redirect(request: BaseHTTPRequestHandler) -> None:
    respond(request, b"", 302, Location="/keys")


def pour(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            request.wfile.write(b" " * 65_536)


def reset(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


BROKEN: dict[str, tuple[Answer, str]] = {
    "error": (lambda request: respond(request, b"{}", 500), "status 500"),
    "redirect": (redirect, "status 302"),
    "not JSON": (lambda request: respond(request, b"<html>"), "not JSON"),
    "no key set": (lambda request: respond(request, b"{}"), "no JSON Web Key Set"),
    "no keys": (lambda request: respond(request, b'{"keys": []}'), "without a key"),
    "endless": (pour, "more than 1048576 bytes"),
    "cut": (reset, "ClientPayloadError"),
    "not HTTP": (lambda request: request.wfile.write(b"SSH-2.0-x\r\n") and None, "ClientResponseError"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_endpoint_that_answers_nonsense_fails_logins_until_it_answers_keys(start: Any, how: str) -> None:
    issuer = Issuer()
    answer, why = BROKEN[how]
    with Endpoint(answer) as endpoint:
        gateway = start(jwks_url=endpoint.url)
        user = new_user()
        error, reason = refusal(gateway, user, issuer.token(user))
        assert (error["C"], error["M"]) == ("58000", FAILED)
        assert why in reason
        endpoint.answer = publishes(issuer)
        wait_until(lambda: served(gateway, issuer.token("alice")), "the keys to be read")


def test_an_endpoint_that_never_answers_costs_no_more_than_its_time_out(start: Any) -> None:
    issuer = Issuer()
    over = threading.Event()
    with Endpoint(lambda _request: over.wait(20) and None) as endpoint:
        gateway = start(jwks_url=endpoint.url, jwks_timeout=0.2)
        user = new_user()
        error, reason = refusal(gateway, user, issuer.token(user))
        over.set()
        assert error["C"] == "58000"
        assert "no answer in time" in reason


def test_an_endpoint_is_verified(start: Any, authority: Authority, stranger: Authority) -> None:
    issuer = Issuer()
    context = server_context(authority.issue("endpoint", "127.0.0.1"))
    with Endpoint(publishes(issuer), context) as endpoint:
        trusting = start(jwks_url=endpoint.url, jwks_ca=str(authority.cert))
        assert asked(trusting.port, "alice", issuer.token("alice")) == "trusted"
        for ca in ({"jwks_ca": str(stranger.cert)}, {}):
            doubting = start(jwks_url=endpoint.url, **ca)
            user = new_user()
            error, reason = refusal(doubting, user, issuer.token(user))
            assert error["C"] == "58000"
            assert "certificate" in reason.lower()
    wrong_name = server_context(authority.issue("other", "other.example"))
    with Endpoint(publishes(issuer), wrong_name) as endpoint:
        gateway = start(jwks_url=endpoint.url, jwks_ca=str(authority.cert))
        assert not served(gateway, issuer.token("alice"))


def test_keys_may_be_in_a_file_that_is_replaced(start: Any, tmp_path: Path) -> None:
    issuer = Issuer()
    file = tmp_path / "keys.json"
    file.write_bytes(issuer.key_set)
    gateway = start(jwks_file=str(file))
    assert asked(gateway.port, "alice", issuer.token("alice")) == "trusted"
    issuer.rotate()
    new = tmp_path / "new.json"
    new.write_bytes(issuer.key_set)
    new.rename(file)
    wait_until(lambda: served(gateway, issuer.token("alice")), "the file to be read again")
    file.unlink()
    assert asked(gateway.port, "alice", issuer.token("alice")) == "trusted"


def test_keys_are_read_anew_when_that_is_asked_for(start: Any, tmp_path: Path) -> None:
    issuer = Issuer()
    file = tmp_path / "keys.json"
    file.write_bytes(issuer.key_set)
    gateway = start(jwks_file=str(file), jwks_min_seconds=3600, jwks_seconds=3600)
    assert served(gateway, issuer.token("alice"))
    issuer.rotate()
    file.write_bytes(issuer.key_set)
    assert not served(gateway, issuer.token("alice"))
    reload(gateway)
    assert served(gateway, issuer.token("alice"))
    file.write_text("{}")
    reload(gateway)
    gateway.wait_for("keys of tokens not read, the old ones stay")
    assert served(gateway, issuer.token("alice"))


def test_the_password_of_a_target_is_read_anew_and_a_broken_reference_leaves_the_old_one(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    issuer = Issuer()
    keys, secret = tmp_path / "keys.json", tmp_path / "secret"
    keys.write_bytes(issuer.key_set)
    secret.write_text("not yet")
    wanted = settings(postgres, jwks_file=str(keys), rules=[{"target": "writing"}])
    wanted["targets"]["writing"]["password"] = f"file:{secret}"
    gateway = start_gateway([], authenticator=wanted)
    with pytest.raises(psycopg.OperationalError):
        asked(gateway.port, "alice", issuer.token("alice"))
    secret.write_text("scram secret")
    reload(gateway)
    assert asked(gateway.port, "alice", issuer.token("alice")) == "scrammed"
    secret.unlink()
    assert reload(gateway, NOT_LOADED)["reason"].startswith("authenticator.targets.writing.password: file:")
    assert asked(gateway.port, "alice", issuer.token("alice")) == "scrammed"


def test_a_chain_takes_tokens_beside_passwords(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    issuer = Issuer()
    keys, users = tmp_path / "keys.json", tmp_path / "users.yaml"
    keys.write_bytes(issuer.key_set)
    host = f"127.0.0.1:{postgres.port}"
    bob = {"verifier": "builder", "databases": {"*": "all"}}
    users.write_text(yaml.safe_dump({"targets": {"all": {"host": host, "user": "trusted"}}, "users": {"bob": bob}}))
    users.chmod(0o600)
    wanted = settings(postgres, jwks_file=str(keys))
    # Targets may stand beside the chain, or in the link whose rules name them.
    beside = {name: wanted["targets"].pop(name) for name in ["writing"]}
    chain = [{"users": {"file": str(users)}}, {name: wanted[name] for name in ("kind", "targets", "jwt")}]
    gateway = start_gateway(None, authenticator={"chain": chain, "method": "cleartext", "targets": beside})
    assert asked(gateway.port, "bob", "builder") == "trusted"
    assert asked(gateway.port, "alice", issuer.token("alice")) == "trusted"
    assert asked(gateway.port, "alice", issuer.token("alice", groups=["writers"])) == "scrammed"
    for user, typed in (("bob", issuer.token("alice")), ("alice", "builder"), ("carol", issuer.token("alice"))):
        with pytest.raises(psycopg.OperationalError, match=REFUSED.format(user)):
            asked(gateway.port, user, typed)


def test_a_client_that_leaves_while_the_keys_are_read_leaves_nothing_behind(start: Any) -> None:
    issuer = Issuer()
    over, reading = threading.Event(), threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> None:
        reading.set()
        over.wait(20)
        respond(request, issuer.key_set)

    with Endpoint(answer) as endpoint:
        gateway = start(jwks_url=endpoint.url, jwks_timeout=20)
        user = new_user()
        with RawClient(gateway.port) as client:
            client.send(startup(user=user))
            client.read_message()
            client.send(password(issuer.token(user)))
            assert reading.wait(20)
        assert "left" in gateway.wait_for("refused", user=user)["reason"]
        over.set()
        wait_until(lambda: served(gateway, issuer.token("alice")), "the keys to be there all the same")


# Settings


GOOD = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": "https://id.example/keys", "rules": [{"target": "a"}]}


@pytest.mark.parametrize(
    ("jwt", "more", "words"),
    [
        ({"jwks_url": ""}, {}, ["jwks_file", "jwks_url"]),
        ({"jwks_file": "keys.json"}, {}, ["jwks_file", "jwks_url"]),
        ({"jwks_url": "", "jwks_file": "missing.json"}, {}, ["jwks_file", "missing.json"]),
        ({"jwks_url": "http://id.example/keys"}, {}, ["jwks_url", "loopback"]),
        ({"jwks_url": "ftp://id.example/keys"}, {}, ["jwks_url"]),
        ({"jwks_url": "https://me:hunter2@id.example/"}, {}, ["jwks_url", "user name"]),
        ({"jwks_ca": "missing.pem"}, {}, ["jwks_ca", "missing.pem"]),
        ({"issuer": ""}, {}, ["issuer"]),
        ({"audience": []}, {}, ["audience"]),
        ({"algorithms": ["HS256"]}, {}, ["algorithms", "HS256"]),
        ({"algorithms": ["none"]}, {}, ["algorithms", "none"]),
        ({"algorithms": []}, {}, ["algorithms"]),
        ({"rules": []}, {}, ["rules"]),
        ({"rules": [{"target": "b"}]}, {}, ["rules", "b is none of"]),
        ({"rules": [{"target": "a", "claim": "x"}]}, {}, ["rules", "equals"]),
        ({"rules": [{"target": "a", "clam": "x"}]}, {}, ["rules", "clam"]),
        ({"user_is": "everybody"}, {}, ["user_is"]),
        ({}, {"method": "md5"}, ["authenticator.method", "cleartext or oauth"]),
        ({}, {"method": "scram-sha-256"}, ["authenticator.method"]),
        ({}, {"method": "oauth"}, ["authenticator.method", "TLS"]),
        ({}, {"targets": {"a": {"host": "", "user": "x"}}}, ["targets.a", "host"]),
        ({}, {"targets": {"a": {"host": "h", "user": "{claim}"}}}, ["targets.a", "user"]),
        ({}, {"targets": {"a": {"host": "h", "user": "u", "password": "env:NO_SUCH"}}}, ["targets.a", "NO_SUCH"]),
        ({}, {"targets": {"a": {"host": "h", "user": "u", "password": "vault:"}}}, ["targets.a", "vault"]),
    ],
)
def test_settings_that_cannot_be_used_are_named_in_one_line(
    run: Run, tmp_path: Path, jwt: dict[str, Any], more: dict[str, Any], words: list[str]
) -> None:
    targets = {"a": {"host": "127.0.0.1", "user": "{user}"}}
    content = {"kind": "jwt", "method": "cleartext", "targets": targets, "jwt": GOOD | jwt} | more
    (tmp_path / "pgauthproxy.yaml").write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "authenticator": content}))
    done = run()
    assert_one_clear_line(done, *words)
    assert "hunter2" not in done.stderr


def test_a_package_that_is_not_installed_is_named_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without/jwt.py").write_text("raise ModuleNotFoundError(\"No module named 'jwt'\", name='jwt')\n")
    content = {
        "kind": "jwt",
        "method": "cleartext",
        "targets": {"a": {"host": "h", "user": "u"}},
        "jwt": GOOD,
    }
    (tmp_path / "pgauthproxy.yaml").write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "authenticator": content}))
    done = run(PYTHONPATH=str(tmp_path / "without"))
    assert_one_clear_line(done, "authenticator.jwt", "package jwt", "pip install 'pgauthproxy[jwt]'")


def test_check_shows_the_settings_of_tokens(run: Run, tmp_path: Path) -> None:
    targets = {"a": {"host": "127.0.0.1", "user": "{user}", "password": "a secret of the target"}}
    content = {"kind": "jwt", "method": "cleartext", "targets": targets, "jwt": GOOD}
    (tmp_path / "pgauthproxy.yaml").write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "authenticator": content}))
    done = run("check")
    assert done.returncode == 0, done
    assert "authenticator.jwt.issuer = https://id.example" in done.stdout
    assert 'authenticator.jwt.rules = {"target":"a"' in done.stdout
    assert "authenticator.targets = a" in done.stdout
    assert "a secret of the target" not in done.stdout
