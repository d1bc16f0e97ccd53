"""How long a session may live and idle: who is ended, with which words, and who is not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway
from tests.system.conftest import PASSWORD, Answering, answering_gateway, new_user, wait_until
from tests.tls import HOST, Authority, TlsClient
from tests.wire import RawClient, ScriptedTarget, error_fields, greet, message, query, read_exactly

SECONDS = 20
SHORT = "0.8"
"""Yet longer than it takes a test to get on, on a machine that is busy."""
LONG = "600"
IDLE = ("57P05", "terminating connection due to idle-session timeout")
IDLE_IN_TRANSACTION = ("25P03", "terminating connection due to idle-in-transaction timeout")
LIVED_TOO_LONG = ("57P01", "terminating connection: its time limit is reached")
RULES = {
    "idle": {"_META_IDLE_TIMEOUT": SHORT},
    "idle in transaction": {"_META_IDLE_IN_TRANSACTION_TIMEOUT": SHORT, "_META_IDLE_TIMEOUT": LONG},
}
SLEEP = "select pg_sleep(1.3)"
"""Longer than anybody may idle."""

Lines = dict[str, str]
by_rule = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


class Ruled:
    """A gateway before a PostgreSQL whose sessions have the rules that a test wants."""

    def __init__(self, answering: Answering, server: ThrowawayPostgres, context: ssl.SSLContext | None = None) -> None:
        self.gateway = answering.gateway
        self._answering = answering
        self._server = server
        self._context = context

    def user(self, rules: Lines) -> str:
        tls = {} if self._context is None else {"_META_TARGET_TLS": "require"}
        where = {"_META_TARGET_HOST": f"{HOST}:{self._server.port}", "user": "postgres", "database": "postgres"}
        return self._answering.user(where | tls | rules, f"rules_{new_user()}")

    @contextlib.contextmanager
    def raw(self, rules: Lines, target: ScriptedTarget | None = None) -> Iterator[RawClient]:
        """A client that is logged in, and whose session has ended when the block does."""
        elsewhere = {} if target is None else {"_META_TARGET_HOST": f"{HOST}:{target.port}"}
        port = self.gateway.port
        with RawClient(port) if self._context is None else TlsClient(port, self._context) as client:
            client.log_in(user=self.user(rules | elsewhere))
            yield client

    def psycopg(self, rules: Lines, **options: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(
            host=HOST, port=self.gateway.port, user=self.user(rules), password=PASSWORD, dbname="postgres", **options
        )

    def outlast(self, rules: Lines) -> None:
        """Returns when somebody who did nothing at all would have been ended by this rule."""
        with self.raw({"_META_IDLE_TIMEOUT": next(iter(rules.values()))}) as other:
            assert other.read_fatal() == IDLE

    def why(self, user: str) -> str:
        """Why this user's session has ended, as the log has it."""
        session = self.gateway.wait_for("login", user=user)["session"]
        return str(self.gateway.wait_for("session ended", session=session)["why"])


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Answering]:
    identity = authority.issue("ruling gateway", "localhost", HOST)
    with answering_gateway(tmp_path_factory.mktemp("answering"), tls=identity.settings) as found:
        yield found


@pytest.fixture
def ruled(answering: Answering, postgres: ThrowawayPostgres) -> Ruled:
    return Ruled(answering, postgres)


@pytest.fixture(params=["plain", "tls"])
def either(request: pytest.FixtureRequest, answering: Answering, authority: Authority) -> Ruled:
    """Sessions in plain, or with TLS on both sides."""
    if request.param == "plain":
        return Ruled(answering, request.getfixturevalue("postgres"))
    return Ruled(answering, request.getfixturevalue("tls_postgres"), authority.client_context())


# Who is ended


def test_an_idle_session_is_ended_with_postgresqls_own_words(either: Ruled) -> None:
    with either.raw(RULES["idle"]) as client:
        client.assert_served()
        assert client.read_fatal() == IDLE


@pytest.mark.parametrize("begins", ["begin", "begin; select 1/0"])
def test_a_session_that_idles_in_a_transaction_is_ended(either: Ruled, begins: str) -> None:
    with either.raw(RULES["idle in transaction"]) as client:
        client.send(query(begins))
        client.read_until(b"Z")
        assert client.read_fatal() == IDLE_IN_TRANSACTION


def test_a_session_that_says_nothing_behind_its_login_is_ended(ruled: Ruled) -> None:
    user = ruled.user(RULES["idle"])
    with RawClient(ruled.gateway.port) as client:
        client.log_in(user=user)
        assert client.read_fatal() == IDLE
    assert ruled.why(user) == "idle timeout reached"


def test_what_a_transaction_had_locked_is_free_again(ruled: Ruled, postgres: ThrowawayPostgres) -> None:
    postgres.sql("create table if not exists locked_by_idler ()")
    with ruled.psycopg(RULES["idle in transaction"]) as idler, ruled.psycopg({}) as waiting:
        idler.execute("lock table locked_by_idler")
        waiting.execute("lock table locked_by_idler")
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            idler.execute("select 1")


def test_drivers_are_told(ruled: Ruled) -> None:
    with ruled.psycopg(RULES["idle"], autocommit=True) as client:
        client.execute("select 1")
        ruled.outlast(RULES["idle"])
        wait_until(lambda: is_readable(client), "the end of the session")
        with pytest.raises(psycopg.errors.IdleSessionTimeout):
            client.execute("select 1")


def is_readable(client: psycopg.Connection[Any]) -> bool:
    with socket.socket(fileno=client.fileno()) as watched:
        try:
            return bool(watched.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        finally:
            watched.detach()


def test_asyncpg_learns_that_its_session_is_over(ruled: Ruled) -> None:
    where = {"host": HOST, "port": ruled.gateway.port, "database": "postgres", "ssl": False}

    async def work() -> None:
        client = await asyncpg.connect(user=ruled.user(RULES["idle"]), password=PASSWORD, **where)
        ended = asyncio.Event()
        client.add_termination_listener(lambda _: ended.set())
        assert await client.fetchval("select 42") == 42
        async with asyncio.timeout(SECONDS):
            await ended.wait()
        with pytest.raises(asyncpg.InterfaceError, match="closed"):
            await client.fetchval("select 42")

    asyncio.run(work())


def test_notifications_do_not_keep_a_session_from_idling(ruled: Ruled, postgres: ThrowawayPostgres) -> None:
    with ruled.raw(RULES["idle"]) as client:
        client.send(query("listen something"))
        client.read_until(b"Z")
        postgres.sql("notify something")
        assert client.read_message()[0] == b"A"
        assert client.read_fatal() == IDLE


def test_a_session_is_ended_behind_the_last_byte_of_a_large_row(either: Ruled) -> None:
    with either.raw(RULES["idle"]) as client:
        client.send(query("select repeat('x', 5000000)"))
        (row,) = [body for kind, body in client.read_until(b"Z") if kind == b"D"]
        assert len(row) == 2 + 4 + 5_000_000
        assert client.read_fatal() == IDLE


def test_a_session_idles_again_behind_a_copy_by_the_extended_protocol(
    ruled: Ruled, postgres: ThrowawayPostgres
) -> None:
    # A Sync before the data and one behind, as libpq does it, have one answer.
    postgres.sql("create table if not exists copied_by_extended (i int)")
    copy = b"\0copy copied_by_extended from stdin\0\0\0"
    with ruled.raw(RULES["idle"]) as client:
        client.send(message(b"P", copy) + message(b"B", bytes(8)) + message(b"E", bytes(5)) + message(b"S"))
        client.read_until(b"G")
        ruled.outlast(RULES["idle"])
        client.send(message(b"d", b"42\n") + message(b"c") + message(b"S"))
        client.read_until(b"Z")
        assert client.read_fatal() == IDLE


# Who is not


@by_rule
def test_a_session_at_work_does_not_idle(either: Ruled, rules: Lines) -> None:
    with either.raw(rules) as client:
        client.send(query(f"begin; {SLEEP}"))
        assert any(kind == b"D" for kind, _ in client.read_until(b"Z"))
        client.send(query("commit"))
        assert (b"C", b"COMMIT\0") in client.read_until(b"Z")


def test_requests_that_wait_behind_others_do_not_idle(either: Ruled) -> None:
    with either.raw(RULES["idle"]) as client:
        client.send(query("select 1") + query(SLEEP) + query("select 42"))
        client.read_until(b"Z")
        client.read_until(b"Z")
        assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")


def test_a_pipeline_without_a_sync_does_not_idle(ruled: Ruled) -> None:
    with ruled.psycopg(RULES["idle"], autocommit=True) as client, client.pipeline() as pipeline:
        first = client.execute("select 1")
        pipeline.sync()
        assert first.fetchone() == (1,)
        second = client.execute("select 2")
        client.pgconn.send_flush_request()
        client.pgconn.flush()
        ruled.outlast(RULES["idle"])
        pipeline.sync()
        assert second.fetchone() == (2,)


@by_rule
def test_a_copy_that_waits_for_its_client_does_not_idle(either: Ruled, rules: Lines) -> None:
    with either.raw(rules) as client:
        client.send(query("begin; create temporary table t (i int); copy t from stdin"))
        client.read_until(b"G")
        either.outlast(rules)
        client.send(message(b"d", b"42\n") + message(b"c"))
        assert (b"C", b"COPY 1\0") in client.read_until(b"Z")


def test_a_session_that_is_kept_busy_lives_on(ruled: Ruled) -> None:
    over = threading.Event()
    with ruled.raw(RULES["idle"]) as client:
        waiting = threading.Thread(target=lambda: (ruled.outlast(RULES["idle"]), over.set()))
        waiting.start()
        served = 0
        while not over.is_set():
            client.assert_served()
            served += 1
        waiting.join(SECONDS)
        client.assert_served()
    assert served


def test_who_idles_outside_a_transaction_does_not_idle_in_one(ruled: Ruled) -> None:
    rules = {"_META_IDLE_IN_TRANSACTION_TIMEOUT": SHORT}
    with ruled.raw(rules) as client:
        ruled.outlast(rules)
        client.assert_served()


# Who is told what


@contextlib.contextmanager
def heard_by_target(script: Callable[[socket.socket], None]) -> Iterator[tuple[ScriptedTarget, list[bytes]]]:
    """A target that does this once it has greeted, and all that it hears from then on."""
    heard: list[bytes] = []

    def target(connection: socket.socket) -> None:
        greet(connection)
        script(connection)
        heard.append(read_exactly(connection, 1 << 20))

    with ScriptedTarget(target) as found:
        yield found, heard


def test_the_target_is_told_good_bye(ruled: Ruled) -> None:
    with heard_by_target(lambda _: None) as (target, heard), ruled.raw(RULES["idle"], target) as client:
        assert client.read_fatal() == IDLE
        wait_until(lambda: heard, "the target's end")
    assert heard == [message(b"X")]


def test_a_target_that_has_half_a_message_is_told_nothing(ruled: Ruled) -> None:
    with heard_by_target(lambda _: None) as (target, heard), ruled.raw(RULES["idle"], target) as client:
        client.send(query("select 1")[:7])
        assert client.read_fatal() == IDLE
        wait_until(lambda: heard, "the target's end")
    assert heard == [query("select 1")[:7]]


def test_a_client_that_has_half_a_message_is_told_nothing(ruled: Ruled) -> None:
    half = message(b"N", b"SNOTICE\0\0")[:7]
    with (
        heard_by_target(lambda target: target.sendall(half)) as (target, _),
        ruled.raw(RULES["idle"], target) as client,
    ):
        assert client.read_to_end() == half


# Where the rules come from


def test_the_configuration_has_rules_for_everybody(start_gateway: StartGateway, mapped: Any) -> None:
    gateway = start_gateway(mapped, idle_timeout=0.9, idle_in_transaction_timeout=0.8)
    with RawClient(gateway.port) as idler, RawClient(gateway.port) as in_transaction:
        for client in (idler, in_transaction):
            client.log_in()
        in_transaction.send(query("begin"))
        in_transaction.read_until(b"Z")
        assert in_transaction.read_fatal() == IDLE_IN_TRANSACTION
        assert idler.read_fatal() == IDLE
    for why in ("idle timeout reached", "idle-in-transaction timeout reached"):
        gateway.wait_for("session ended", why=why)


def test_a_session_lives_no_longer_than_the_configuration_allows(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, authenticator: Callable[..., Any]
) -> None:
    script = authenticator(
        f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}; echo user=postgres; echo database=postgres\n"
        "echo _META_SESSION_SECONDS=600"
    )
    gateway = start_gateway(script, max_session_seconds=0.4)
    with RawClient(gateway.port) as client:
        client.log_in()
        client.send(query("select pg_sleep(20)"))
        assert client.read_fatal() == LIVED_TOO_LONG
    assert gateway.wait_for("session ended")["why"] == "time limit reached"


def test_a_mapping_may_lift_the_rules_on_idling(
    start_gateway: StartGateway, authenticator: Callable[..., Any], postgres: ThrowawayPostgres
) -> None:
    script = authenticator(
        f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}; echo user=postgres; echo database=postgres\n"
        '[ "$user" != favoured ] || echo _META_IDLE_TIMEOUT=0'
    )
    gateway: Gateway = start_gateway(script, idle_timeout=0.3)
    with RawClient(gateway.port) as favoured, RawClient(gateway.port) as other:
        favoured.log_in(user="favoured")
        other.log_in()
        assert other.read_fatal() == IDLE
        favoured.assert_served()


def test_a_target_of_the_users_file_has_rules_of_its_own(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Any
) -> None:
    file = tmp_path / "users.yaml"
    file.touch(0o600)
    file.write_text(
        "targets:\n"
        f"  main: {{host: '127.0.0.1:{postgres.port}', user: postgres, database: postgres, idle_timeout: 0.2}}\n"
        "users:\n"
        "  alice: {verifier: secret, databases: {'*': main}}\n"
    )
    gateway = start_gateway(None, authenticator={"users": {"file": str(file)}}, idle_timeout=600)
    with (
        psycopg.connect(host=HOST, port=gateway.port, user="alice", password="secret", dbname="x") as client,
        contextlib.suppress(psycopg.errors.IdleSessionTimeout),
    ):
        assert gateway.wait_for("session ended")["why"] == "idle timeout reached"
        client.execute("select 1")


def test_the_words_are_those_that_postgresql_has_for_it(postgres: ThrowawayPostgres) -> None:
    with psycopg.connect(host=HOST, port=postgres.port, user="postgres", dbname="postgres", autocommit=True) as client:
        client.execute("set idle_session_timeout = 100")
        wait_until(lambda: is_readable(client), "PostgreSQL to end it")
        with socket.socket(fileno=client.fileno()) as watched:
            data = watched.recv(65536, socket.MSG_PEEK)
            watched.detach()
    error = error_fields(data[5:])
    assert (error["C"], error["M"]) == IDLE
