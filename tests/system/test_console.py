"""The admin console as operators and their drivers use it: who gets in, what they see, and what they can do."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pg8000.dbapi
import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres, free_port
from tests.conftest import WAIT_SECONDS, Gateway, StartGateway
from tests.system.conftest import Run, assert_one_clear_line, assert_serves, configure, wait_until
from tests.system.operators import ACTING, LOOKING, USERS, connect, do, rows
from tests.wire import RawClient, message, password, proxy_v1, query, startup

Start = Callable[..., Gateway]


@pytest.fixture
def start(start_gateway: StartGateway, mapped: Path) -> Start:
    """Starts gateways before `postgres` with a console for alice, who may act, and bob."""

    def begin(**settings: Any) -> Gateway:
        return start_gateway(mapped, **{"admin": USERS} | settings)

    return begin


# Who gets in


def test_a_user_gets_in_by_scram_and_the_log_says_so(start: Start) -> None:
    gateway = start()
    assert rows(gateway, "SHOW VERSION")[0]["version"].startswith("pgauthproxy ")
    line = gateway.wait_for("admin login")
    assert (line["user"], line["may_act"]) == ("alice", True)
    assert gateway.wait_for("admin left")["session"] == line["session"]
    rows(gateway, "SHOW VERSION", user="bob", secret=LOOKING)
    assert gateway.wait_for("admin login", user="bob")["may_act"] is False
    assert gateway.log_lines("login") == []


@pytest.mark.parametrize(("user", "secret"), [("alice", LOOKING), ("bob", ""), ("mallory", ACTING), ("postgres", "x")])
def test_nobody_else_gets_in_and_all_are_told_the_same(start: Start, user: str, secret: str) -> None:
    gateway = start()
    with pytest.raises(psycopg.OperationalError) as caught:
        connect(gateway, user, secret or "wrong")
    assert f'password authentication failed for user "{user}"' in str(caught.value)
    assert gateway.wait_for("refused")["sqlstate"] == "28P01"


def test_a_user_proves_it_by_scram_whatever_other_clients_do(start: Start) -> None:
    gateway = start(authenticator={"cleartext_password": True})
    with RawClient(gateway.port) as client:
        client.send(startup(user="alice", database="pgauthproxy"))
        kind, body = client.read_message()
        assert (kind, body) == (b"R", b"\0\0\0\x0aSCRAM-SHA-256\0\0")


def test_what_a_balancer_brings_is_nobody_of_this_machine(start: Start, tmp_path: Path) -> None:
    port = free_port()
    listen = [{"address": f"unix:{tmp_path}:{port}", "proxy_protocol": True}]
    start(listen=listen, proxy_protocol_from=["local"])
    with socket.socket(socket.AF_UNIX) as balancer:
        balancer.settimeout(WAIT_SECONDS)
        wait_until((tmp_path / f".s.PGSQL.{port}").exists, "the socket")
        balancer.connect(str(tmp_path / f".s.PGSQL.{port}"))
        balancer.sendall(proxy_v1() + startup(user="root", database="pgauthproxy"))
        assert balancer.recv(100).startswith(b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256")


def test_its_passwords_are_guessed_no_faster_than_others(start: Start) -> None:
    gateway = start(throttle={"failures": 2, "delay": 0.01, "max_delay": 0.02, "exempt": []})
    for _ in range(3):
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            connect(gateway, secret="wrong")
    for secret in ("wrong", ACTING):
        with pytest.raises(psycopg.OperationalError, match="too many failed logins"):
            connect(gateway, secret=secret)


def test_clients_behind_a_balancer_are_shown_by_their_own_addresses(start: Start) -> None:
    marked = {"address": "127.0.0.1:0", "proxy_protocol": True}
    gateway = start(listen=["127.0.0.1:0", marked], proxy_protocol_from=["127.0.0.1"])
    port = int(gateway.wait_for("listening", 2)["address"].rpartition(":")[2])
    with RawClient(port) as client:
        client.send(proxy_v1("192.0.2.7", 56324))
        client.log_in()
        shown = [row for row in rows(gateway, "SHOW CLIENTS") if row["state"] == "relaying"]
        assert [row["client"] for row in shown] == ["192.0.2.7:56324"]


def test_without_users_a_database_of_that_name_is_one_like_any_other(
    start_gateway: StartGateway, mapped: Path, postgres: ThrowawayPostgres
) -> None:
    gateway = start_gateway(mapped)
    with RawClient(gateway.port) as client:
        client.send(startup(database="pgauthproxy"))
        client.read_message()
        client.send(password())
        assert client.read_fatal()[0] == "3D000"
    gateway.wait_for("refused")


def psql(
    postgres: ThrowawayPostgres, folder: Path, port: int, text: str, *options: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [postgres.binaries / "psql", "-X", *options, "-h", folder, "-p", str(port), "-d", "pgauthproxy", "-c", text],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


def test_the_gateways_own_user_needs_no_password_on_a_unix_socket(
    start_gateway: StartGateway, mapped: Path, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    port = free_port()
    gateway = start_gateway(mapped, listen=["127.0.0.1:0", f"unix:{tmp_path}:{port}"])
    done = psql(postgres, tmp_path, port, "SHOW HELP", "-At")
    assert done.returncode == 0, done.stderr
    assert "SHOW CLIENTS|sessions and logins: who is connected, and as whom" in done.stdout.splitlines()
    assert psql(postgres, tmp_path, port, "PAUSE; RESUME", "-q").returncode == 0
    assert gateway.wait_for("admin login")["client"] == "[local]"
    wrong = psql(postgres, tmp_path, port, "select 1")
    assert (wrong.returncode, wrong.stderr.split(":")[0]) == (1, "ERROR")


def test_who_holds_back_on_the_way_is_ended_by_the_login_deadline(start: Start) -> None:
    gateway = start(login_timeout=0.3)
    with RawClient(gateway.port) as client:
        client.send(startup(user="alice", database="pgauthproxy"))
        client.read_message()
        assert client.read_fatal()[0] == "28000"
    with connect(gateway) as connection:
        gateway.wait_for("refused")
        assert connection.execute("SHOW VERSION").fetchone()


def test_what_is_no_verifier_keeps_the_gateway_from_starting(run: Run, folder: Path) -> None:
    config = configure(folder, admin={"users": {"alice": "a plain password"}})
    done = run("--config", str(config))
    assert_one_clear_line(done, "admin.users: alice", "SCRAM-SHA-256")
    assert "a plain password" not in done.stderr


# What drivers make of it


def test_psycopg_reads_typed_columns_within_a_transaction(start: Start) -> None:
    gateway = start()
    with connect(gateway) as connection:
        for binary in (False, True):
            cursor = connection.execute("SHOW STATS", binary=binary)
            row = cursor.fetchone()
            assert row is not None
            assert isinstance(row[1], bool)
            assert row[0].tzinfo is not None
            assert isinstance(row[3], int)
        with pytest.raises(psycopg.errors.SyntaxError):
            connection.execute("select 1")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            connection.execute("SHOW STATS")
        connection.rollback()
        assert connection.execute("SHOW HELP").rowcount != 0


def test_asyncpg_reads_it(start: Start) -> None:
    gateway = start()

    async def read() -> list[asyncpg.Record]:
        settings = {"host": "127.0.0.1", "port": gateway.port, "database": "pgauthproxy"}
        connection = await asyncpg.connect(user="alice", password=ACTING, **settings)
        try:
            found: list[asyncpg.Record] = await connection.fetch("SHOW CLIENTS")
            assert await connection.fetch("SHOW CLIENTS")
            return found
        finally:
            await connection.close()

    (row,) = asyncio.run(read())
    assert (row["user"], row["state"], row["target"]) == ("alice", "console", None)
    assert row["seconds"] >= 0


def test_pg8000_reads_it(start: Start) -> None:
    gateway = start()
    connection = pg8000.dbapi.connect(
        host="127.0.0.1", port=gateway.port, user="alice", password=ACTING, database="pgauthproxy"
    )
    cursor = connection.cursor()
    cursor.execute("SHOW TARGETS")
    assert list(cursor.fetchall()) == []
    connection.rollback()
    connection.close()


# What it shows


def test_clients_are_shown_with_who_became_whom(start: Start, postgres: ThrowawayPostgres) -> None:
    gateway = start()
    with RawClient(gateway.port) as client, RawClient(gateway.port) as slow:
        client.log_in(user="carol", application_name="reports")
        client.assert_served()
        slow.send(startup(user="dave"))
        slow.read_message()
        by_user = {row["user"]: row for row in rows(gateway, "SHOW CLIENTS", user="bob", secret=LOOKING)}
        carol, dave = by_user["carol"], by_user["dave"]
        assert (carol["target"], carol["target_user"]) == (f"127.0.0.1:{postgres.port}", "postgres")
        assert (carol["state"], carol["application_name"]) == ("relaying", "reports")
        assert carol["bytes_from_client"] == len(query("select 42"))
        assert (dave["state"], dave["target"]) == ("logging in", None)
        (target,) = rows(gateway, "SHOW TARGETS")
        assert (target["target"], target["up"], target["sessions"]) == (carol["target"], True, 1)
        (stats,) = rows(gateway, "SHOW STATS")
        assert (stats["sessions"], stats["logging_in"], stats["logins"], stats["paused"]) == (1, 1, 1, False)
        assert stats["login_ms_p50"] > 0
        (authenticator,) = rows(gateway, "SHOW AUTHENTICATORS")
        assert (authenticator["kind"], authenticator["queued"]) == ("command", 0)


def test_text_of_clients_cannot_act_on_a_terminal(start: Start) -> None:
    gateway = start()
    with RawClient(gateway.port) as client:
        client.log_in(user="\x1b[31mred", application_name="\x07bell")
        shown = rows(gateway, "SHOW CLIENTS")
        assert any(row["user"] == "\\x1b[31mred" for row in shown)
        assert "\x1b" not in repr([list(row.values()) for row in shown]).replace("\\x1b", "")


# What it does


def test_a_session_is_killed_and_told_why(start: Start) -> None:
    gateway = start()
    with RawClient(gateway.port) as client, RawClient(gateway.port) as other:
        client.log_in(user="carol")
        other.log_in(user="dave")
        session = next(row["session"] for row in rows(gateway, "SHOW CLIENTS") if row["user"] == "carol")
        assert do(gateway, f"KILL {session}") == "KILL 1"
        assert client.read_fatal() == ("57P01", "terminating connection due to administrator command")
        other.assert_served()
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            do(gateway, f"KILL {session}")
    assert gateway.wait_for("session ended", session=session)["why"] == "ended by an administrator"
    act = gateway.wait_for("admin act")
    assert (act["user"], act["act"], act["outcome"]) == ("alice", f"KILL {session}", "1 ended")


def test_all_sessions_and_logins_of_a_user_are_killed(start: Start) -> None:
    gateway = start()
    with RawClient(gateway.port) as first, RawClient(gateway.port) as second, RawClient(gateway.port) as other:
        first.log_in(user="carol")
        other.log_in(user="dave")
        second.send(startup(user="carol"))
        second.read_message()
        assert do(gateway, "KILL USER carol") == "KILL 2"
        assert first.read_fatal()[0] == "57P01"
        assert second.read_fatal()[0] == "57P01"
        other.assert_served()


def test_new_logins_wait_while_they_are_paused_and_sessions_go_on(start: Start) -> None:
    gateway = start()
    with RawClient(gateway.port) as before, RawClient(gateway.port) as waiting, RawClient(gateway.port) as gone:
        before.log_in()
        assert do(gateway, "PAUSE") == "PAUSE"
        waiting.send(startup(user="carol") + password())
        gone.send(startup(user="dave"))
        wait_until(lambda: rows(gateway, "SHOW STATS")[0]["logging_in"] == 2, "them to wait")
        gone.socket.close()
        gateway.wait_for("refused", user="dave")
        before.assert_served()
        assert rows(gateway, "SHOW STATS")[0]["paused"] is True
        assert len(gateway.log_lines("login")) == 1
        assert do(gateway, "RESUME") == "RESUME"
        waiting.read_until(b"Z")
        waiting.assert_served()


def test_who_waits_too_long_while_logins_are_paused_is_refused(start: Start) -> None:
    gateway = start(login_timeout=0.5)
    do(gateway, "PAUSE")
    with RawClient(gateway.port) as client:
        client.send(startup())
        assert client.read_fatal()[0] == "28000"
    do(gateway, "RESUME")
    assert_serves(gateway.port)


def test_what_a_signal_does_the_console_can_do(start_gateway: StartGateway, tmp_path: Path) -> None:
    users = tmp_path / "users.yaml"
    users.write_text("targets: {t: {host: '127.0.0.1:1', user: x}}\nusers: {}\n")
    users.chmod(0o600)
    settings = {"users": {"file": str(users)}}
    gateway = start_gateway(None, authenticator=settings, admin=USERS, drain_timeout=600)
    assert do(gateway, "RELOAD") == "RELOAD"
    gateway.wait_for("users loaded", count=2)
    with connect(gateway, autocommit=True) as idle:
        assert do(gateway, "SHUTDOWN") == "SHUTDOWN"

        def is_told() -> bool:
            try:
                idle.execute("SHOW VERSION")
            except psycopg.errors.AdminShutdown:
                return True
            return False

        wait_until(is_told, "the other console to be ended")
    assert gateway.process.wait(WAIT_SECONDS) == 0


def test_who_may_only_look_does_nothing(start: Start) -> None:
    gateway = start()
    with RawClient(gateway.port) as client:
        client.log_in(user="carol")
        for text in ("KILL USER carol", "PAUSE", "SHUTDOWN"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                do(gateway, text, user="bob", secret=LOOKING)
        client.assert_served()
    assert gateway.wait_for("admin act", count=3)["outcome"] == "denied"


# What is too much


def logged_in_console(gateway: Gateway, folder: Path, port: int) -> socket.socket:
    """A console over a Unix socket, past its greeting."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(WAIT_SECONDS)
    client.connect(f"{folder}/.s.PGSQL.{port}")
    client.sendall(startup(database="pgauthproxy"))
    read_until_ready(client)
    return client


def read_until_ready(client: socket.socket) -> bytes:
    """All up to a ReadyForQuery that ends what has come."""
    found = b""
    while not found.endswith(message(b"Z", b"I")):
        chunk = client.recv(65536)
        assert chunk, found
        found += chunk
    return found


def read_to_end(client: socket.socket) -> bytes:
    """All until the console is closed."""
    found = b""
    while chunk := client.recv(65536):
        found += chunk
    return found


@pytest.fixture
def local(start_gateway: StartGateway, mapped: Path, tmp_path: Path) -> tuple[Gateway, Path, int]:
    """A gateway that listens on a Unix socket too."""
    port = free_port()
    gateway = start_gateway(mapped, listen=["127.0.0.1:0", f"unix:{tmp_path}:{port}"], close_timeout=0.5)
    return gateway, tmp_path, port


def test_who_does_not_read_the_answers_takes_no_memory_and_can_be_killed(local: tuple[Gateway, Path, int]) -> None:
    gateway, folder, port = local
    with logged_in_console(gateway, folder, port) as deaf, logged_in_console(gateway, folder, port) as other:
        before = gateway.resident_bytes
        deaf.setblocking(False)
        sent = 0
        questions = query("SHOW HELP; " * 1000)
        try:
            for _ in range(2000):
                sent += deaf.send(questions)
        except BlockingIOError:
            assert sent < 4 << 20
        else:
            raise AssertionError("all of it was taken")
        other.sendall(query("SHOW VERSION"))
        assert b"pgauthproxy" in read_until_ready(other)
        assert gateway.resident_bytes < before + (16 << 20)
        other.sendall(query("KILL USER alice"))
        wait_until(lambda: len(gateway.log_lines("admin left")) == 2, "both consoles to end")


def test_a_message_that_is_too_long_or_none_ends_the_console(local: tuple[Gateway, Path, int]) -> None:
    gateway, folder, port = local
    for said in (b"Q\x7f\xff\xff\xff", b"\0" * 10, message(b"d", b"x")):
        with logged_in_console(gateway, folder, port) as client:
            client.sendall(said)
            answer = read_to_end(client)
            assert b"SFATAL" in answer
            assert b"C08P01" in answer
    assert_serves(gateway.port)


def test_consoles_take_no_place_of_clients_and_are_bounded_themselves(local: tuple[Gateway, Path, int]) -> None:
    gateway, folder, port = local
    opened = [logged_in_console(gateway, folder, port) for _ in range(32)]
    try:
        with socket.socket(socket.AF_UNIX) as one_more:
            one_more.settimeout(WAIT_SECONDS)
            one_more.connect(f"{folder}/.s.PGSQL.{port}")
            one_more.sendall(startup(database="pgauthproxy"))
            assert b"C53300" in read_to_end(one_more)
        assert_serves(gateway.port)
    finally:
        for client in opened:
            client.close()
    wait_until(lambda: len(gateway.log_lines("admin left")) == 32, "all consoles to be over")
    logged_in_console(gateway, folder, port).close()


def test_a_signal_ends_consoles_and_they_hold_nothing_up(local: tuple[Gateway, Path, int]) -> None:
    gateway, folder, port = local
    with logged_in_console(gateway, folder, port) as client:
        gateway.process.send_signal(signal.SIGTERM)
        assert b"C57P01" in read_to_end(client)
    assert gateway.process.wait(WAIT_SECONDS) == 0
