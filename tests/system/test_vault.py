"""Credentials from Vault: lent to one session, renewed while it lives, given back when it ends.

The server answers as the documentation of Vault's HTTP API has it, and does to PostgreSQL what the database engine
does: it creates a role for each lease and drops it when that ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg
import pytest
import yaml
from aiohttp import web

from pgauthproxy.proto.scram import Verifier
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS, Gateway, StartGateway, WriteAuthenticator, is_alive
from tests.system.conftest import (
    NOT_LOADED,
    Run,
    Upgradable,
    assert_one_clear_line,
    new_user,
    refusal,
    reload,
    wait_until,
)
from tests.tls import Authority, server_context
from tests.tokens import AUDIENCE, ISSUER, Issuer
from tests.wire import RawClient, ScriptedTarget, password, startup

TOKEN = "hvs.the-gateways-own"
ROLE_ID, SECRET_ID = "a role of the gateway", "its secret"
FAILED = "authentication service failed"
ENDED = "terminating connection: the lease of its credential has ended"
SEALED = (503, {"errors": ["Vault is sealed"]})
DENIED = (403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]})

Wrong = Callable[[web.Request], Awaitable[web.StreamResponse]] | tuple[int, object] | None


class Vault:
    """A Vault with a database engine at `database/`. `wrong` is what it does wrong, by words in paths."""

    def __init__(self, postgres: ThrowawayPostgres, context: ssl.SSLContext | None = None) -> None:
        self.lease_seconds: float = 3600
        self.renewable = True
        self.token_seconds = 0
        self.tokens = {TOKEN}
        self.wrong: dict[str, Wrong] = {}
        self.spoiled_password = False
        self.requests: list[tuple[str, str]] = []
        self.namespaces: set[str] = set()
        self.leases: dict[str, str] = {}
        """The roles of the leases that run, by lease id."""
        self.passwords: list[str] = []
        self.renewed: list[str] = []
        self.revoked: list[str] = []
        self._postgres = postgres
        self._context = context
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self.port = 0

    def __enter__(self) -> Vault:
        self._thread.start()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    def asked(self, words: str) -> int:
        """How often a path with these words was asked for."""
        return sum(words in path for _, path in self.requests)

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)

    def stop(self) -> None:
        """Goes down; what it knows stays."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        server = runner.server
        asyncio.run_coroutine_threadsafe(runner.cleanup(), self._loop).result(20)
        wait_until(lambda: server is None or not server.connections, "the connections to be gone")

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._context, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _end(self) -> None:
        """Returns once nothing is under way any more."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for _ in range(3):
            # Transports close in the loop's next turns.
            await asyncio.sleep(0)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        self.requests.append((request.method, path))
        self.namespaces.add(request.headers.get("X-Vault-Namespace", ""))
        for words, wrong in self.wrong.items():
            if words in path and wrong is not None:
                if callable(wrong):
                    return await wrong(request)
                return web.json_response(wrong[1], status=wrong[0])
        body = json.loads(await request.read() or b"{}")
        if path == "v1/auth/approle/login":
            return self._log_in(body)
        if request.headers.get("X-Vault-Token") not in self.tokens:
            return web.json_response(DENIED[1], status=DENIED[0])
        answers: dict[str, Callable[[dict[str, Any]], Awaitable[web.Response]]] = {
            "v1/database/creds/app": self._lend,
            "v1/database/static-creds/app": self._static,
            "v1/sys/leases/renew": self._renew,
            "v1/sys/leases/revoke": self._revoke,
            "v1/auth/token/lookup-self": self._look_up,
            "v1/auth/token/renew-self": self._renew_token,
        }
        if path not in answers:
            return web.json_response({"errors": []}, status=404)
        return await answers[path](body)

    def _log_in(self, body: dict[str, Any]) -> web.Response:
        if body != {"role_id": ROLE_ID, "secret_id": SECRET_ID}:
            return web.json_response({"errors": ["invalid role or secret ID"]}, status=400)
        token = f"hvs.{uuid.uuid4().hex}"
        self.tokens.add(token)
        return _answer(auth={"client_token": token, "lease_duration": self.token_seconds, "renewable": True})

    async def _look_up(self, _body: dict[str, Any]) -> web.Response:
        return _answer(data={"ttl": self.token_seconds, "renewable": True})

    async def _renew_token(self, _body: dict[str, Any]) -> web.Response:
        return _answer(auth={"lease_duration": self.token_seconds, "renewable": True})

    async def _lend(self, _body: dict[str, Any]) -> web.Response:
        role, secret = f"v-token-app-{uuid.uuid4().hex[:20]}", f"A1a-{uuid.uuid4().hex}"
        await self._sql(f"CREATE ROLE \"{role}\" LOGIN PASSWORD '{secret}'")
        lease = f"database/creds/app/{uuid.uuid4().hex}"
        self.leases[lease] = role
        self.passwords.append(secret)
        shown = "wrong" if self.spoiled_password else secret
        return _answer(
            lease_id=lease,
            renewable=self.renewable,
            lease_duration=self.lease_seconds,
            data={"username": role, "password": shown},
        )

    async def _static(self, _body: dict[str, Any]) -> web.Response:
        return _answer(data={"username": "scrammed", "password": "scram secret", "ttl": 60})

    async def _renew(self, body: dict[str, Any]) -> web.Response:
        lease = body["lease_id"]
        if lease not in self.leases:
            return web.json_response({"errors": ["lease not found"]}, status=400)
        self.renewed.append(lease)
        return _answer(lease_id=lease, renewable=self.renewable, lease_duration=self.lease_seconds)

    async def _revoke(self, body: dict[str, Any]) -> web.Response:
        lease = body["lease_id"]
        self.revoked.append(lease)
        role = self.leases.pop(lease, None)
        if role is None:
            return web.json_response({"errors": ["invalid lease"]}, status=400)
        await self._sql(f'DROP ROLE "{role}"')
        return web.Response(status=204)

    async def _sql(self, statement: str) -> None:
        await asyncio.to_thread(self._postgres.sql, statement)


def _answer(**fields: Any) -> web.Response:
    whole = {"request_id": str(uuid.uuid4()), "lease_id": "", "renewable": False, "lease_duration": 0, "data": None}
    return web.json_response(whole | {"wrap_info": None, "warnings": None, "auth": None} | fields)


@pytest.fixture
def vault(postgres: ThrowawayPostgres) -> Iterator[Vault]:
    with Vault(postgres) as running:
        yield running


Start = Callable[..., Gateway]


@pytest.fixture
def start(
    vault: Vault, start_gateway: StartGateway, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres
) -> Start:
    """Starts a gateway whose users, all but mallory, get a credential of Vault's. It ends before Vault does."""

    def begin(path: str = "database/creds/app", port: int = 0, *, lines: str = "", **more: Any) -> Gateway:
        script = authenticator(
            f"echo '_META_TARGET_HOST=127.0.0.1:{port or postgres.port}'\n"
            f"echo '_META_TARGET_CRED=vault:{path}'\n"
            "echo user=nobody\n"
            'echo "database=$database"\n'
            f"{lines}\n"
            '[ "$user" != mallory ]'
        )
        wanted = {"vault": {"address": vault.address, "token": TOKEN, "timeout": 2, **more.pop("vault", {})}}
        return start_gateway(script, authenticator=wanted | more.pop("authenticator", {}), **more)

    return begin


def connected(gateway: Gateway, user: str = "alice") -> psycopg.Connection[Any]:
    return psycopg.connect(
        host="127.0.0.1", port=gateway.port, user=user, password="x", dbname="postgres", autocommit=True
    )


def is_served(gateway: Gateway) -> bool:
    try:
        with connected(gateway) as session:
            return session.execute("select 42").fetchone() == (42,)
    except psycopg.OperationalError:
        return False


def wait_until_given_back(vault: Vault, count: int = 1) -> None:
    wait_until(lambda: len(vault.revoked) >= count and not vault.leases, "all leases to be given back")
    assert len(vault.revoked) == len(set(vault.revoked)) == count


# A session and its lease


def test_each_session_has_a_role_of_its_own_that_is_gone_with_it(
    start: Start, vault: Vault, postgres: ThrowawayPostgres
) -> None:
    gateway = start()
    with connected(gateway) as one, connected(gateway) as two:
        names = {session.execute("select current_user").fetchone()[0] for session in (one, two)}
        assert names == set(vault.leases.values())
        assert one.execute("select current_database()").fetchone() == ("postgres",)
        assert vault.revoked == []
    wait_until_given_back(vault, 2)
    listed = ",".join(f"'{name}'" for name in names)
    wait_until(
        lambda: postgres.sql(f"select count(*) from pg_roles where rolname in ({listed})") == "0",
        "the roles to be gone",
    )
    gateway.wait_for("login", 2)
    logged = {line["target_user"] for line in gateway.log_lines("login")}
    assert logged == names


def test_no_secret_of_vaults_is_in_the_log(start: Start, vault: Vault) -> None:
    gateway = start()
    assert is_served(gateway)
    wait_until_given_back(vault)
    vault.wrong = {"creds": DENIED}
    refusal(gateway, new_user())
    log = gateway.log.read_text()
    for secret in (TOKEN, *vault.passwords):
        assert secret not in log


def test_without_a_database_it_stays_that_of_the_first_user(
    vault: Vault, start_gateway: StartGateway, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres
) -> None:
    script = authenticator(
        f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}\n"
        "echo _META_TARGET_CRED=vault:database/creds/app\n"
        "echo user=postgres"
    )
    gateway = start_gateway(script, authenticator={"vault": {"address": vault.address, "token": TOKEN}})
    with connected(gateway) as session:
        assert session.execute("select current_database()").fetchone() == ("postgres",)


def test_a_lease_is_renewed_as_long_as_its_session_lives(start: Start, vault: Vault) -> None:
    vault.lease_seconds = 0.6
    gateway = start()
    with connected(gateway) as session:
        wait_until(lambda: len(vault.renewed) >= 4, "four renewals")
        assert session.execute("select 42").fetchone() == (42,)
    wait_until_given_back(vault)
    renewals = len(vault.renewed)
    assert is_served(gateway)
    wait_until_given_back(vault, 2)
    assert set(vault.renewed[:renewals]) == {vault.revoked[0]}


UpgradableWithVault = Callable[..., Upgradable]


@pytest.fixture
def start_before_upgrades(start: Start) -> Iterator[UpgradableWithVault]:
    """The same, for gateways that other processes take over from."""
    started: list[Upgradable] = []

    def begin(**settings: Any) -> Upgradable:
        started.append(Upgradable(start(**settings)))
        return started[-1]

    yield begin
    for upgradable in started:
        upgradable.stop()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_session_moves_and_its_lease_is_renewed_and_given_back_by_the_process_that_has_made_it(
    start_before_upgrades: UpgradableWithVault, vault: Vault, workers: int
) -> None:
    vault.lease_seconds = 0.6
    upgradable = start_before_upgrades(workers=workers)
    with connected(upgradable.gateway) as session:
        for _ in range(2):
            upgradable.upgrade()
        wait_until(lambda: len(upgradable.gateway.log_lines("sessions handed over")) == 2, "the session to move twice")
        renewals = len(vault.renewed)
        wait_until(lambda: len(vault.renewed) >= renewals + 3, "three renewals")
        assert session.execute("select 42").fetchone() == (42,)
        assert vault.revoked == []
        assert all(map(is_alive, upgradable.pids))
    wait_until_given_back(vault)
    upgradable.wait_until_moved()
    assert is_served(upgradable.gateway)


def test_a_session_that_has_moved_ends_with_its_lease(start_before_upgrades: UpgradableWithVault, vault: Vault) -> None:
    vault.lease_seconds = 0.6
    upgradable = start_before_upgrades()
    with connected(upgradable.gateway) as session:
        upgradable.upgrade()
        upgradable.gateway.wait_for("sessions handed over")
        vault.leases.clear()
        assert ENDED in ended(session)
    upgradable.wait_until_moved()
    assert upgradable.gateway.wait_for("session ended")["why"] == "lease of the credential ended"
    assert vault.revoked == []


def test_leases_of_a_process_that_is_killed_are_given_back_by_the_one_before(
    start_before_upgrades: UpgradableWithVault, vault: Vault
) -> None:
    upgradable = start_before_upgrades()
    with connected(upgradable.gateway):
        upgradable.upgrade()
        upgradable.gateway.wait_for("sessions handed over")
        os.kill(upgradable.pids[-1], signal.SIGKILL)
        wait_until_given_back(vault)
        upgradable.gateway.process.wait(WAIT_SECONDS)


def ended(session: psycopg.Connection[Any]) -> str:
    """What the session is told at its end."""
    with pytest.raises(psycopg.errors.AdminShutdown) as told:
        session.execute("select pg_sleep(20)")
    return str(told.value)


def test_a_session_ends_when_its_lease_can_no_longer_be_renewed(start: Start, vault: Vault) -> None:
    vault.lease_seconds = 0.6
    gateway = start()
    with connected(gateway) as session:
        wait_until(lambda: vault.renewed, "a renewal")
        vault.leases.clear()
        assert ENDED in ended(session)
    assert gateway.wait_for("session ended")["why"] == "lease of the credential ended"
    assert vault.revoked == []


def test_a_session_ends_with_a_lease_that_is_not_renewable(start: Start, vault: Vault) -> None:
    vault.lease_seconds, vault.renewable = 0.6, False
    with connected(start()) as session:
        assert ENDED in ended(session)
    assert vault.renewed == []


def test_a_vault_that_is_away_for_a_moment_is_not_missed(start: Start, vault: Vault) -> None:
    vault.lease_seconds = 3
    gateway = start()
    with connected(gateway) as session:
        for wrong in (SEALED, (500, {}), (429, {"errors": []})):
            known = len(vault.renewed)
            tried = vault.asked("leases/renew")
            vault.wrong = {"leases/renew": wrong}
            wait_until(lambda: vault.asked("leases/renew") > tried, "a renewal that fails")  # noqa: B023
            vault.wrong = {}
            wait_until(lambda: len(vault.renewed) > known, "a renewal that does not")  # noqa: B023
        assert session.execute("select 42").fetchone() == (42,)


def test_a_session_ends_with_its_lease_if_vault_stays_away(start: Start, vault: Vault) -> None:
    vault.lease_seconds = 1
    gateway = start()
    with connected(gateway) as session:
        vault.wrong = {"leases/renew": SEALED}
        assert ENDED in ended(session)
    assert vault.asked("leases/renew") > 1


def test_a_session_that_is_idle_when_its_lease_ends_is_closed(start: Start, vault: Vault) -> None:
    vault.lease_seconds, vault.renewable = 0.5, False
    with RawClient(start().port) as client:
        client.log_in()
        assert client.read_fatal() == ("57P01", ENDED)


def test_leases_are_given_back_when_the_gateway_ends(start: Start, vault: Vault) -> None:
    gateway = start()
    with connected(gateway), connected(gateway):
        assert len(vault.leases) == 2
        assert gateway.stop() == 0
    assert len(vault.revoked) == 2
    assert vault.leases == {}


def test_a_lease_that_cannot_be_given_back_is_told_of(start: Start, vault: Vault) -> None:
    gateway = start(vault={"timeout": 0.3})
    with connected(gateway):
        vault.wrong = {"leases/revoke": SEALED}
    line = gateway.wait_for("lease not given back, it ends by itself")
    assert line["lease"] in vault.leases
    assert "sealed" in line["reason"]
    assert vault.asked("leases/revoke") > 1
    assert gateway.wait_for("session ended")["why"] == "client closed"


# Logins that come to nothing


def test_who_is_refused_costs_no_credential(start: Start, vault: Vault) -> None:
    gateway = start()
    error, _ = refusal(gateway, "mallory")
    assert error["C"] == "28P01"
    assert vault.requests == []


def test_who_cannot_prove_who_he_is_costs_no_credential(start: Start, vault: Vault) -> None:
    verifier = Verifier.of(b"the right one", b"salt of 16 bytes", 4096).text().decode()
    gateway = start(lines=f"echo '_META_SOURCE_VERIFIER={verifier}'", authenticator={"method": "scram-sha-256"})
    options = {"host": "127.0.0.1", "port": gateway.port, "user": "alice", "dbname": "postgres"}
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(**options, password="the wrong one")
    assert vault.requests == []
    with psycopg.connect(**options, password="the right one") as session:
        assert session.execute("select current_user").fetchone() == (next(iter(vault.leases.values())),)


def test_a_lease_is_given_back_when_the_target_does_not_let_the_gateway_in(start: Start, vault: Vault) -> None:
    vault.spoiled_password = True
    gateway = start()
    error, _ = refusal(gateway, new_user())
    assert error["C"] == "08004"
    wait_until_given_back(vault)


def test_a_lease_is_given_back_when_there_is_no_target(start: Start, vault: Vault) -> None:
    def close(_connection: Any) -> None:
        """Says nothing."""

    with ScriptedTarget(close) as target:
        gateway = start(port=target.port)
        error, _ = refusal(gateway, new_user())
    assert error["C"] == "08006"
    wait_until_given_back(vault)


def test_a_client_that_leaves_while_its_credential_is_made_leaves_no_lease(start: Start, vault: Vault) -> None:
    begun, over = threading.Event(), threading.Event()

    async def dawdle(request: web.Request) -> web.StreamResponse:
        begun.set()
        await asyncio.to_thread(over.wait, 20)
        return await vault._lend({})

    vault.wrong = {"creds": dawdle}
    gateway = start(vault={"timeout": 20})
    user = new_user()
    with RawClient(gateway.port) as client:
        client.send(startup(user=user))
        client.read_message()
        client.send(password())
        assert begun.wait(20)
    assert "left" in gateway.wait_for("refused", user=user)["reason"]
    over.set()
    wait_until_given_back(vault)


def test_a_login_that_takes_too_long_leaves_no_lease(start: Start, vault: Vault) -> None:
    async def dawdle(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.8)
        return await vault._lend({})

    vault.wrong = {"creds": dawdle}
    gateway = start(vault={"timeout": 20}, login_timeout=0.4)
    error, _ = refusal(gateway, new_user())
    assert error["C"] == "28000"
    wait_until_given_back(vault)


# A Vault that gets it wrong


async def hang(_request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(20)
    return web.Response()


async def pour(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(100):
        await response.write(b" " * 65_536)
    return response


async def drop(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def redirect(_request: web.Request) -> web.StreamResponse:
    raise web.HTTPTemporaryRedirect("/v1/database/creds/app")


def says(body: object, status: int = 200) -> Wrong:
    return status, body


WRONG: dict[str, tuple[Wrong, str]] = {
    "sealed": (SEALED, "is sealed or down"),
    "refuses": (DENIED, "refuses"),
    "no such path": (says({"errors": []}, 404), "knows no such path"),
    "bad request": (says({"errors": ["x"]}, 400), "status 400"),
    "broken": (says({"errors": ["internal error"]}, 500), "status 500"),
    "too much to do": (says({"errors": ["x"]}, 429), "too much to do"),
    "redirects": (redirect, "status 307"),
    "hangs": (hang, "no answer in time, for 0.5 s"),
    "pours": (pour, "more than 1048576 bytes"),
    "drops": (drop, "cannot be asked"),
    "no object": (says([1, 2]), "no JSON object"),
    "no data": (says({"lease_id": "", "data": None}), "no user name and password"),
    "no password": (says({"data": {"username": "x"}}), "no user name and password"),
    "an empty user": (says({"data": {"username": "", "password": "x"}}), "no user name and password"),
    "a user of bytes": (says({"data": {"username": "a\0b", "password": "x"}}), "no user name and password"),
    "numbers": (says({"data": {"username": 1, "password": 2}}), "no user name and password"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_vault_that_gets_it_wrong_fails_the_login_and_nothing_else(start: Start, vault: Vault, how: str) -> None:
    wrong, why = WRONG[how]
    vault.wrong = {"creds": wrong}
    gateway = start(vault={"timeout": 0.5})
    error, reason = refusal(gateway, new_user())
    assert (error["C"], error["M"]) == ("58000", FAILED)
    assert why in reason
    vault.wrong = {}
    assert is_served(gateway)


def test_a_vault_that_is_down_fails_logins_until_it_is_back(start: Start, vault: Vault) -> None:
    gateway = start(vault={"timeout": 0.5})
    vault.stop()
    error, reason = refusal(gateway, new_user())
    assert (error["C"], error["M"]) == ("58000", FAILED)
    assert "cannot be asked" in reason
    vault.start()
    assert is_served(gateway)


@pytest.mark.parametrize("status", [412, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(start: Start, vault: Vault, status: int) -> None:
    tries = 0

    async def twice_wrong(_request: web.Request) -> web.StreamResponse:
        nonlocal tries
        tries += 1
        return web.json_response({"errors": []}, status=status) if tries < 3 else await vault._lend({})

    vault.wrong = {"creds": twice_wrong}
    assert is_served(start(vault={"timeout": 20}))
    assert tries == 3


def test_a_lease_of_what_is_no_credential_is_given_back(start: Start, vault: Vault) -> None:
    vault.leases["database/creds/app/odd"] = "odd"
    vault._postgres.sql("CREATE ROLE odd")
    vault.wrong = {"creds": says({"lease_id": "database/creds/app/odd", "lease_duration": 60, "data": {"key": "x"}})}
    error, reason = refusal(start(), new_user())
    assert error["C"] == "58000"
    assert "no user name and password" in reason
    wait_until_given_back(vault)


def test_a_static_role_has_no_lease(start: Start, vault: Vault) -> None:
    gateway = start("database/static-creds/app")
    with connected(gateway) as session:
        assert session.execute("select current_user").fetchone() == ("scrammed",)
    gateway.wait_for("session ended")
    assert vault.asked("leases") == 0


def test_a_vault_is_verified(
    start: Start, postgres: ThrowawayPostgres, authority: Authority, stranger: Authority
) -> None:
    context = server_context(authority.issue("vault", "127.0.0.1"))
    context.set_alpn_protocols(["http/1.1"])
    with Vault(postgres, context) as encrypted:
        good = start(vault={"address": encrypted.address, "ca": str(authority.cert)})
        assert is_served(good)
        doubting = start(vault={"address": encrypted.address, "ca": str(stranger.cert), "timeout": 0.5})
        error, reason = refusal(doubting, new_user())
        assert error["C"] == "58000"
        assert "certificate" in reason.lower()
        for gateway in (good, doubting):
            assert gateway.stop() == 0


# The gateway's own token


ROLE = {"token": "", "role_id": ROLE_ID, "secret_id": SECRET_ID}


def test_a_role_logs_in_once_for_many_sessions(start: Start, vault: Vault) -> None:
    vault.tokens.clear()
    gateway = start(vault=ROLE | {"namespace": "teams/db"})
    for _ in range(3):
        assert is_served(gateway)
    wait_until_given_back(vault, 3)
    assert vault.asked("approle/login") == 1
    assert vault.namespaces == {"teams/db"}


def test_a_role_logs_in_again_when_its_token_has_ended(start: Start, vault: Vault) -> None:
    gateway = start(vault=ROLE)
    assert is_served(gateway)
    vault.tokens.clear()
    assert is_served(gateway)
    assert vault.asked("approle/login") == 2


def test_a_role_that_is_refused_fails_logins(start: Start, vault: Vault) -> None:
    gateway = start(vault=ROLE | {"secret_id": "wrong", "timeout": 0.5})
    error, reason = refusal(gateway, new_user())
    assert error["C"] == "58000"
    assert "status 400" in reason
    assert "wrong" not in gateway.log.read_text()


@pytest.mark.parametrize("own", [{"token": TOKEN}, ROLE], ids=["token", "role"])
def test_a_token_is_renewed_before_it_ends(start: Start, vault: Vault, own: dict[str, str]) -> None:
    vault.token_seconds = 1
    gateway = start(vault=own)
    with connected(gateway):
        wait_until(lambda: vault.asked("renew-self") >= 2, "the token to be renewed twice")
    assert is_served(gateway)
    assert vault.asked("approle/login") == (own is ROLE)


def test_a_token_that_may_not_ask_about_itself_is_used_as_it_is(start: Start, vault: Vault) -> None:
    vault.wrong = {"lookup-self": DENIED}
    assert is_served(start())


def test_a_token_that_ends_is_told_of(start: Start, vault: Vault) -> None:
    vault.token_seconds = 1
    vault.wrong = {"renew-self": DENIED}
    gateway = start()
    with connected(gateway):
        gateway.wait_for("the token for Vault has ended, and cannot be renewed")


def test_a_token_may_be_in_a_file(start: Start, vault: Vault, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert is_served(start(vault={"token": f"file:{tmp_path / 'token'}"}))


def test_a_token_in_a_file_may_be_replaced(start: Start, vault: Vault, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    gateway = start(vault={"token": f"file:{file}"})
    with connected(gateway) as session:
        vault.tokens = {"hvs.another"}
        assert not is_served(gateway)
        file.write_text("hvs.another")
        reload(gateway)
        assert is_served(gateway)
        assert session.execute("select 42").fetchone() == (42,)
        file.unlink()
        assert "authenticator.vault.token" in reload(gateway, NOT_LOADED)["reason"]
        assert is_served(gateway)
    wait_until_given_back(vault, 3)


# Other kinds, and settings


def test_a_named_target_may_get_its_credential_from_vault(
    vault: Vault, start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    issuer = Issuer()
    keys = tmp_path / "keys.json"
    keys.write_bytes(issuer.key_set)
    target = {"host": f"127.0.0.1:{postgres.port}", "user": "nobody", "password": "vault:database/creds/app"}
    gateway = start_gateway(
        [],
        authenticator={
            "kind": "jwt",
            "cmd": [],
            "method": "cleartext",
            "targets": {"app": target},
            "jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": str(keys), "rules": [{"target": "app"}]},
            "vault": {"address": vault.address, "token": TOKEN},
        },
    )
    options = {"host": "127.0.0.1", "port": gateway.port, "user": "alice", "dbname": "postgres"}
    with psycopg.connect(**options, password=issuer.token("alice")) as session:
        assert session.execute("select current_user").fetchone() == (next(iter(vault.leases.values())),)
    wait_until_given_back(vault)


def write_users(file: Path, postgres: ThrowawayPostgres) -> None:
    """Alice, whose target has a credential of Vault's."""
    target = {"host": f"127.0.0.1:{postgres.port}", "user": "nobody", "password": "vault:database/creds/app"}
    alice = {"verifier": Verifier.of(b"x", b"sixteen bytes of", 4096).text().decode(), "databases": {"*": "app"}}
    file.write_text(yaml.safe_dump({"targets": {"app": target}, "users": {"alice": alice}}))
    file.chmod(0o600)


@pytest.mark.parametrize("chains", [0, 1, 2])
def test_a_target_in_a_file_of_users_may_get_its_credential_from_vault(
    vault: Vault, start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path, chains: int
) -> None:
    write_users(tmp_path / "users.yaml", postgres)
    asked: dict[str, Any] = {"users": {"file": "users.yaml"}}
    for _ in range(chains):
        asked = {"chain": [asked]}
    lends = {"method": "scram-sha-256", "vault": {"address": vault.address, "token": TOKEN}}
    gateway = start_gateway(None, authenticator=asked | lends)
    with connected(gateway) as session:
        assert session.execute("select current_user").fetchone() == (next(iter(vault.leases.values())),)
    wait_until_given_back(vault)
    gateway.process.send_signal(signal.SIGHUP)
    gateway.wait_for("users loaded", 2)
    assert is_served(gateway)
    wait_until_given_back(vault, 2)


def test_an_answer_that_is_kept_lends_each_session_a_credential_of_its_own(start: Start, vault: Vault) -> None:
    gateway = start(lines="echo _META_CACHE_SECONDS=60", authenticator={"method": "cleartext"})
    for count in (1, 2):
        assert is_served(gateway)
        wait_until_given_back(vault, count)


def test_a_target_that_borrows_where_there_is_no_vault_is_named_at_the_start(
    run: Run, folder: Path, postgres: ThrowawayPostgres
) -> None:
    write_users(folder / "users.yaml", postgres)
    settings = {"listen": "127.0.0.1:0", "authenticator": {"users": {"file": "users.yaml"}}}
    (folder / "pgauthproxy.yaml").write_text(yaml.safe_dump(settings))
    assert_one_clear_line(run(), "users.yaml:4: targets.app.password: ", "authenticator.vault.address")


def test_vault_stands_beside_a_chain(run: Run, folder: Path) -> None:
    link = {"cmd": ["./authenticator"], "vault": {"address": "https://vault.example", "token": "x"}}
    content = {"listen": "127.0.0.1:0", "authenticator": {"chain": [link]}}
    (folder / "pgauthproxy.yaml").write_text(yaml.safe_dump(content))
    assert_one_clear_line(run(), "authenticator.chain, 1.vault")


def test_a_trial_gives_back_what_it_was_lent(
    vault: Vault, run: Run, folder: Path, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres
) -> None:
    script = authenticator(
        f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}\n"
        "echo _META_TARGET_CRED=vault:database/creds/app\n"
        "echo user=nobody\necho database=postgres"
    )
    settings = {"cmd": [str(script)], "vault": {"address": vault.address, "token": TOKEN}}
    (folder / "pgauthproxy.yaml").write_text(yaml.safe_dump({"authenticator": settings}))
    for connect in ([], ["--connect"]):
        done = run("auth", "--user", "alice", *connect, typed="x\n")
        assert done.returncode == 0, done
        assert "  credential: from Vault, database/creds/app" in done.stdout.splitlines()
        assert vault.passwords[-1] not in done.stdout
    wait_until_given_back(vault, 2)


def test_without_a_vault_nobody_lends(start: Start) -> None:
    gateway = start(vault={"address": "", "token": ""})
    error, reason = refusal(gateway, new_user())
    assert (error["C"], error["M"]) == ("58000", FAILED)
    assert "authenticator.vault.address is not set" in reason


@pytest.mark.parametrize("path", ["", "database", "../sys/seal", "database//creds", "database/creds/a?b", "a/b c"])
def test_a_path_that_is_none_is_nonsense(start: Start, vault: Vault, path: str) -> None:
    error, reason = refusal(start(path), new_user())
    assert error["C"] == "58000"
    assert "path of a secret" in reason
    assert vault.requests == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"address": "http://vault.example:8200", "token": "x"}, ["vault.address", "loopback"]),
        ({"address": "vault.example:8200", "token": "x"}, ["vault.address"]),
        ({"address": "https://vault.example"}, ["token", "role_id"]),
        ({"address": "https://vault.example", "token": "x", "role_id": "y"}, ["token", "role_id"]),
        ({"address": "https://vault.example", "token": "env:NO_SUCH"}, ["vault.token", "NO_SUCH"]),
        ({"address": "https://vault.example", "role_id": "x", "secret_id": "file:/none"}, ["vault.secret_id", "/none"]),
        ({"address": "https://vault.example", "token": "x", "ca": "missing.pem"}, ["vault.ca", "missing.pem"]),
        ({"adress": "https://vault.example", "token": "x"}, ["vault.adress", "did you mean"]),
    ],
)
def test_settings_that_cannot_be_used_are_named_in_one_line(
    run: Run, folder: Path, settings: dict[str, Any], words: list[str]
) -> None:
    content = {"listen": "127.0.0.1:0", "authenticator": {"cmd": ["./authenticator"], "vault": settings}}
    (folder / "pgauthproxy.yaml").write_text(yaml.safe_dump(content))
    assert_one_clear_line(run(), *words)


def test_a_package_that_is_not_installed_is_named_in_one_line(run: Run, folder: Path) -> None:
    (folder / "without").mkdir()
    (folder / "without/aiohttp.py").write_text("raise ModuleNotFoundError('none', name='aiohttp')\n")
    settings = {"address": "https://vault.example", "token": "x"}
    content = {"listen": "127.0.0.1:0", "authenticator": {"cmd": ["./authenticator"], "vault": settings}}
    (folder / "pgauthproxy.yaml").write_text(yaml.safe_dump(content))
    done = run(PYTHONPATH=str(folder / "without"))
    assert_one_clear_line(done, "authenticator.vault", "package aiohttp", "pip install 'pgauthproxy[vault]'")


def test_check_hides_what_opens_vault(run: Run, folder: Path) -> None:
    settings = {"address": "https://vault.example", "role_id": "x", "secret_id": "hunter2"}
    content = {"listen": "127.0.0.1:0", "authenticator": {"cmd": ["./authenticator"], "vault": settings}}
    (folder / "pgauthproxy.yaml").write_text(yaml.safe_dump(content))
    done = run("check")
    assert done.returncode == 0, done
    assert "authenticator.vault.secret_id = ***" in done.stdout
    assert "hunter2" not in done.stdout
