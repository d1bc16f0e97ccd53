"""How busy authenticators of each kind are: logins that they are at work on, and logins that wait for their turn."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway, WriteAuthenticator
from tests.system.conftest import reload, wait_until
from tests.system.operators import samples
from tests.tokens import AUDIENCE, ISSUER, Issuer
from tests.wire import RawClient, ScriptedTarget, password, startup

ADMIN = {"listen": "127.0.0.1:0"}
TARGETS = {"any": {"host": "127.0.0.1", "user": "nobody"}}


def load_of(gateway: Gateway, kind: str) -> tuple[float, float]:
    """Running and queued, as they were a moment ago; -1 if there is none of the kind."""
    found = samples(gateway)
    running, queued = (
        found.get(f'pgauthproxy_authenticators_{what}{{kind="{kind}"}}', -1) for what in ("running", "queued")
    )
    return running, queued


@contextlib.contextmanager
def asking(gateway: Gateway, count: int, answer: str = "secret") -> Iterator[None]:
    """So many clients have said who they are and wait for what comes of it."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(RawClient(gateway.port))
            client.send(startup())
            client.read_message()
            client.send(password(answer))
        yield


def assert_busy(gateway: Gateway, kind: str, *, running: int, queued: int, answer: str = "secret") -> None:
    """So many of the clients that ask are being decided about, the others wait; nothing is left when they have gone."""
    assert load_of(gateway, kind) == (0, 0)
    with asking(gateway, running + queued, answer):
        wait_until(lambda: load_of(gateway, kind) == (running, queued), f"{running} to run and {queued} to wait")
    wait_until(lambda: load_of(gateway, kind) == (0, 0), "all to be given up")


@pytest.fixture
def silent() -> Iterator[ScriptedTarget]:
    """A service of any kind that takes every request and answers none."""

    def listen(connection: socket.socket) -> None:
        while connection.recv(65536):
            continue

    with ScriptedTarget(listen, opens=lambda connection: connection) as service:
        yield service


@pytest.fixture
def start_python(start_gateway: StartGateway, tmp_path: Path) -> Callable[..., Gateway]:
    """Starts a gateway with this function, two of whose calls may run at once."""

    def start(function: str) -> Gateway:
        (tmp_path / "deciding.py").write_text(f"import asyncio, pathlib, time\n{function}")
        wanted = {"callable": "deciding:decide", "max_parallel": 2, "method": "cleartext"}
        return start_gateway(None, authenticator=wanted, admin=ADMIN)

    return start


def test_an_async_function_is_busy_while_it_waits(start_python: Callable[..., Gateway]) -> None:
    gateway = start_python("async def decide(request):\n    await asyncio.sleep(60)\n")
    assert_busy(gateway, "python", running=2, queued=3)


def test_a_plain_function_is_busy_until_it_returns(start_python: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = start_python(
        "def decide(request):\n    while not pathlib.Path('over').exists():\n        time.sleep(0.01)\n"
    )
    with asking(gateway, 5):
        wait_until(lambda: load_of(gateway, "python") == (2, 3), "two to run and three to wait")
    # Its clients have gone; a thread cannot be ended.
    wait_until(lambda: load_of(gateway, "python") == (2, 0), "nobody to wait")
    (tmp_path / "over").touch()
    wait_until(lambda: load_of(gateway, "python") == (0, 0), "the threads to be free")


def test_calls_of_a_function_that_was_replaced_are_counted_until_they_end(
    start_python: Callable[..., Gateway], tmp_path: Path
) -> None:
    function = "async def decide(request):\n    await asyncio.sleep(60)\n"
    gateway = start_python(function)
    with asking(gateway, 1):
        wait_until(lambda: load_of(gateway, "python") == (1, 0), "one to run")
        reload(gateway)
        assert load_of(gateway, "python") == (1, 0)
        with asking(gateway, 1):
            wait_until(lambda: load_of(gateway, "python") == (2, 0), "one of the old and one of the new to run")
    wait_until(lambda: load_of(gateway, "python") == (0, 0), "all to be given up")


def of_http(port: int, **more: Any) -> dict[str, Any]:
    return {"http": {"url": f"http://127.0.0.1:{port}/", "max_in_flight": 2}, "method": "cleartext", **more}


def of_ldap(port: int) -> dict[str, Any]:
    ldap = {
        "url": [f"ldap://127.0.0.1:{port}"],
        "user_dn": "uid={user},dc=example",
        "timeout": 60,
        "max_parallel": 2,
        "rules": [{"target": "any"}],
    }
    return {"kind": "ldap", "ldap": ldap, "targets": TARGETS, "method": "cleartext"}


@pytest.mark.parametrize(("kind", "settings"), [("http", of_http), ("ldap", of_ldap)])
def test_a_service_that_does_not_answer_has_logins_wait(
    start_gateway: StartGateway, silent: ScriptedTarget, kind: str, settings: Callable[[int], dict[str, Any]]
) -> None:
    gateway = start_gateway(None, authenticator=settings(silent.port), admin=ADMIN)
    assert_busy(gateway, kind, running=2, queued=3)


def test_tokens_wait_for_the_keys_of_an_issuer_that_does_not_answer(
    start_gateway: StartGateway, silent: ScriptedTarget
) -> None:
    wanted = {
        "kind": "jwt",
        "method": "cleartext",
        "targets": TARGETS,
        "jwt": {
            "issuer": ISSUER,
            "audience": AUDIENCE,
            "jwks_url": f"http://127.0.0.1:{silent.port}/keys",
            "jwks_timeout": 60,
            "rules": [{"target": "any"}],
        },
    }
    gateway = start_gateway(None, authenticator=wanted, admin=ADMIN)
    # All wait for the same answer: none has to wait for a turn.
    assert_busy(gateway, "jwt", running=5, queued=0, answer=Issuer().token())


def test_logins_wait_for_a_vault_that_does_not_answer(
    start_gateway: StartGateway, silent: ScriptedTarget, authenticator: WriteAuthenticator
) -> None:
    script = authenticator(
        "echo _META_TARGET_HOST=127.0.0.1; echo user=x; echo _META_TARGET_CRED=vault:database/creds/x"
    )
    vault = {"address": f"http://127.0.0.1:{silent.port}", "token": "hvs.token", "timeout": 1}
    gateway = start_gateway(script, authenticator={"vault": vault, "method": "cleartext"}, admin=ADMIN)
    assert load_of(gateway, "vault") == (0, 0)
    with asking(gateway, 3):
        wait_until(lambda: load_of(gateway, "vault") == (3, 0), "three credentials to be asked for")
        assert load_of(gateway, "command") == (0, 0)


def test_every_link_of_a_chain_is_shown(
    start_gateway: StartGateway, silent: ScriptedTarget, authenticator: WriteAuthenticator
) -> None:
    chain = [
        {"kind": "command", "cmd": [str(authenticator("exit 1"))]},
        {"kind": "http", "http": of_http(silent.port)["http"]},
    ]
    wanted = {"kind": "chain", "chain": chain, "method": "cleartext"}
    gateway = start_gateway(None, authenticator=wanted, admin=ADMIN)
    assert load_of(gateway, "command") == (0, 0)
    assert_busy(gateway, "http", running=2, queued=2)


def test_a_file_of_users_is_shown_and_never_busy(start_gateway: StartGateway, tmp_path: Path) -> None:
    users = tmp_path / "users.yaml"
    content = {"targets": TARGETS, "users": {"alice": {"verifier": "secret", "databases": {"postgres": "any"}}}}
    users.touch(0o600)
    users.write_text(yaml.safe_dump(content))
    gateway = start_gateway(None, authenticator={"users": {"file": str(users)}}, admin=ADMIN)
    assert load_of(gateway, "users") == (0, 0)


def test_who_waits_for_the_same_answer_as_another_waits(
    start_gateway: StartGateway, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    """With an answer in the cache, the same login at the same time is asked about once."""
    script = authenticator(
        f'[ "$user" = alice ] || while ! [ -e "{tmp_path}/over" ]; do sleep 0.05; done\n'
        f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}; echo user=postgres; echo _META_CACHE_SECONDS=60\n"
    )
    gateway = start_gateway(script, authenticator={"method": "cleartext"}, admin=ADMIN)
    with RawClient(gateway.port) as client:
        client.send(startup())
        client.read_message()
        client.send(password("secret"))
        client.read_until(b"Z")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(gateway.port)) for _ in range(4)]
        for client in clients:
            client.send(startup(user="bob"))
            client.read_message()
            client.send(password("secret"))
        wait_until(lambda: load_of(gateway, "cache") == (0, 3), "three to wait for what the first is told")
        assert load_of(gateway, "command") == (1, 0)
        (tmp_path / "over").touch()
        for client in clients:
            client.read_until(b"Z")
    wait_until(lambda: load_of(gateway, "cache") == (0, 0), "nobody to wait")
