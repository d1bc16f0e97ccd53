"""How long a session may live and idle, where the mapping says so: every kind of authenticator that can say it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway
from tests.tokens import AUDIENCE, ISSUER, Issuer
from tests.wire import RawClient, ScriptedTarget, password, query, startup

SECRET = "secret"
IDLE = ("57P05", "terminating connection due to idle-session timeout")
IDLE_IN_TRANSACTION = ("25P03", "terminating connection due to idle-in-transaction timeout")
LIVED_TOO_LONG = ("57P01", "terminating connection: its time limit is reached")
RULES = {"session_seconds": 3, "idle_timeout": 0.4, "idle_in_transaction_timeout": 0.3}
"""None of them would end all three sessions of a test."""
LENIENT: dict[str, Any] = {"max_session_seconds": 600, "idle_timeout": 600, "idle_in_transaction_timeout": 600}
"""What the configuration says."""

Authenticator = tuple[dict[str, Any], str]
"""Settings, and what users have to answer."""


@contextlib.contextmanager
def of_command(target: dict[str, Any], folder: Path) -> Iterator[Authenticator]:
    script = folder / "authenticator"
    lines = {"_META_TARGET_HOST": target["host"], "user": target["user"], "database": target["database"]}
    lines |= {f"_META_{name.upper()}": RULES[name] for name in RULES}
    script.write_text("#!/bin/sh\n" + "".join(f"echo {name}={value}\n" for name, value in lines.items()))
    script.chmod(0o755)
    yield {"cmd": [str(script)]}, SECRET


@contextlib.contextmanager
def of_users(target: dict[str, Any], folder: Path) -> Iterator[Authenticator]:
    file = folder / "users.yaml"
    file.touch(0o600)
    users = {"alice": {"verifier": SECRET, "databases": {"*": "main"}}}
    file.write_text(yaml.safe_dump({"targets": {"main": target | RULES}, "users": users}))
    yield {"users": {"file": str(file)}}, SECRET


@contextlib.contextmanager
def of_python(target: dict[str, Any], folder: Path) -> Iterator[Authenticator]:
    (folder / "ruling.py").write_text(
        "from pgauthproxy.authenticator import Mapping\n\n\n"
        f"def decide(request):\n    return Mapping(**{target | RULES!r})\n"
    )
    yield {"callable": "ruling:decide"}, SECRET


@contextlib.contextmanager
def of_http(target: dict[str, Any], _folder: Path) -> Iterator[Authenticator]:
    answer = json.dumps(target | RULES).encode()

    def serve(connection: socket.socket) -> None:
        received = b""
        while not (whole := re.search(rb"(?is)content-length: (\d+).*\r\n\r\n(.*)", received)) or len(whole[2]) < int(
            whole[1]
        ):
            if not (chunk := connection.recv(65536)):
                return
            received += chunk
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)

    with ScriptedTarget(serve, opens=lambda connection: connection) as service:
        yield {"http": {"url": f"http://127.0.0.1:{service.port}/"}}, SECRET


@contextlib.contextmanager
def of_jwt(target: dict[str, Any], folder: Path) -> Iterator[Authenticator]:
    issuer, keys = Issuer(), folder / "keys.json"
    keys.write_bytes(issuer.key_set)
    jwt = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": str(keys), "rules": [{"target": "main"}]}
    yield {"kind": "jwt", "jwt": jwt, "targets": {"main": target | RULES}}, issuer.token()


@contextlib.contextmanager
def of_ldap(target: dict[str, Any], _folder: Path) -> Iterator[Authenticator]:
    def let_bind(connection: socket.socket) -> None:
        # BindResponse, success, to the message of this number; what comes behind it is the end.
        request = connection.recv(65536)
        connection.sendall(b"\x30\x0c" + request[2:5] + b"\x61\x07\x0a\x01\x00\x04\x00\x04\x00")
        connection.recv(65536)

    with ScriptedTarget(let_bind, opens=lambda connection: connection) as directory:
        ldap = {
            "url": [f"ldap://127.0.0.1:{directory.port}"],
            "user_dn": "uid={user},dc=example",
            "name_attribute": "",
            "rules": [{"target": "main"}],
        }
        yield {"kind": "ldap", "ldap": ldap, "targets": {"main": target | RULES}}, SECRET


KINDS = {
    "command": of_command,
    "users": of_users,
    "python": of_python,
    "http": of_http,
    "jwt": of_jwt,
    "ldap": of_ldap,
}

StartRuling = Callable[[str], tuple[Gateway, str]]


@pytest.fixture
def start_ruling(start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path) -> Iterator[StartRuling]:
    """Starts a gateway with an authenticator of this kind that maps everybody with RULES."""
    with contextlib.ExitStack() as stack:

        def start(kind: str) -> tuple[Gateway, str]:
            target = {"host": f"127.0.0.1:{postgres.port}", "user": "postgres", "database": "postgres"}
            settings, answer = stack.enter_context(KINDS[kind](target, tmp_path))
            return start_gateway(None, authenticator={"method": "cleartext", **settings}, **LENIENT), answer

        yield start


@pytest.mark.parametrize("kind", KINDS)
def test_each_rule_of_a_mapping_ends_the_session_that_it_is_for(start_ruling: StartRuling, kind: str) -> None:
    gateway, answer = start_ruling(kind)
    with contextlib.ExitStack() as stack:
        idle, in_transaction, busy = (stack.enter_context(RawClient(gateway.port)) for _ in range(3))
        for client in (busy, idle, in_transaction):
            client.send(startup())
            client.read_message()
            client.send(password(answer))
            client.read_until(b"Z")
        busy.send(query("select pg_sleep(20)"))
        in_transaction.send(query("begin; select pg_sleep(1)"))
        # Longer than anybody may idle: a session that has a query running does not.
        assert (b"C", b"SELECT 1\0") in in_transaction.read_until(b"Z")
        assert in_transaction.read_fatal() == IDLE_IN_TRANSACTION
        assert idle.read_fatal() == IDLE
        assert busy.read_fatal() == LIVED_TOO_LONG
    whys = {gateway.wait_for("session ended", number)["why"] for number in (1, 2, 3)}
    assert whys == {"idle timeout reached", "idle-in-transaction timeout reached", "time limit reached"}
