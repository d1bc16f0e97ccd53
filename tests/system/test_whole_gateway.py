"""What operators see of a gateway with several workers, and do to it: all of it, wherever they ask."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import WAIT_SECONDS, StartGateway
from tests.system.conftest import MANY, StartWorkers, Workers, wait_until
from tests.system.operators import ACTING, ask, connect, samples, verifier
from tests.wire import RawClient, error_fields, startup

TOKEN = "what operators alone know"
LOGINS = 'pgauthproxy_logins_total{outcome="accepted",reason="accepted",sqlstate="00000"}'
Psycopg = psycopg.Connection[Any]


@pytest.fixture
def seen(start_workers: StartWorkers) -> Workers:
    """Two workers, with a console and pages for operators."""
    return start_workers(admin={"listen": "127.0.0.1:0", "token": TOKEN, "users": {"operator": verifier(ACTING)}})


@pytest.fixture
def clients(seen: Workers) -> Iterator[list[RawClient]]:
    """One that is logged in at each worker."""
    with contextlib.ExitStack() as stack:
        yield [seen.client_at(stack, worker) for worker in (0, 1)]


@pytest.fixture
def consoles(seen: Workers) -> Iterator[list[Psycopg]]:
    """One at each worker."""
    found: dict[int, Psycopg] = {}
    with contextlib.ExitStack() as stack:
        for _ in range(MANY):
            console = stack.enter_context(connect(seen.gateway, "operator", autocommit=True))
            worker = seen.gateway.wait_for("admin login", client=address_of(console))["worker"]
            if found.setdefault(worker, console) is not console:
                console.close()
            if len(found) == 2:
                yield [found[0], found[1]]
                return
    raise AssertionError("one worker has no console")


def address_of(console: Psycopg) -> str:
    with socket.socket(fileno=os.dup(console.fileno())) as connection:
        host, port = connection.getsockname()
        return f"{host}:{port}"


def all_of(console: Psycopg, text: str) -> list[dict[str, Any]]:
    cursor = console.execute(text)
    assert cursor.description is not None
    names = [column.name for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def sessions(seen: Workers) -> set[str]:
    """Those that are open, of clients."""
    lines = seen.gateway.log_lines("login")
    ended = {line["session"] for line in seen.gateway.log_lines("session ended")}
    return {line["session"] for line in lines} - ended


def assert_killed(client: RawClient) -> None:
    assert error_fields(client.read_until(b"E")[-1][1])["C"] == "57P01"


# What there is


def test_metrics_are_those_of_all_workers_together(seen: Workers, clients: list[RawClient]) -> None:
    logins = len(seen.gateway.log_lines("login"))
    # What is asked for often is made seldom.
    wait_until(lambda: samples(seen.gateway)[LOGINS] == logins, "all logins to be counted")
    found = samples(seen.gateway)
    assert sum(value for name, value in found.items() if name.startswith("pgauthproxy_sessions{")) == len(
        sessions(seen)
    )
    assert found["pgauthproxy_login_seconds_count"] == logins
    resident = {name for name in found if name.startswith("pgauthproxy_resident_memory_bytes")}
    assert resident == {
        f'pgauthproxy_resident_memory_bytes{{process="{process}"}}' for process in ("0", "1", "supervisor")
    }
    assert all(found[name] > 1 << 20 for name in resident)


def test_what_a_worker_has_counted_outlives_it(seen: Workers, clients: list[RawClient]) -> None:
    logins = len(seen.gateway.log_lines("login"))
    wait_until(lambda: samples(seen.gateway)[LOGINS] == logins, "all logins to be counted")
    before = samples(seen.gateway)
    old = seen.pids[0]
    seen.kill(0)
    seen.wait_for_successor(0, old)
    after = samples(seen.gateway)
    totals = [name for name in before if name.partition("{")[0].endswith(("_total", "_count", "_bucket", "_sum"))]
    less = {name: (before[name], after.get(name)) for name in totals if not after.get(name, -1) >= before[name]}
    # The CPU of a process is its own.
    assert {name for name in less if "cpu_seconds" not in name} == set()
    assert after[LOGINS] == before[LOGINS]
    with contextlib.ExitStack() as stack:
        seen.client_at(stack, 0)
        logins = len(seen.gateway.log_lines("login"))
        wait_until(lambda: samples(seen.gateway)[LOGINS] == logins, "the new ones to be counted too")


def test_a_worker_that_is_stopped_stands_there_with_what_it_said_last(
    start_workers: StartWorkers,
) -> None:
    seen = start_workers(admin={"listen": "127.0.0.1:0"}, worker_timeout=60)
    with contextlib.ExitStack() as stack:
        for worker in (0, 1):
            seen.client_at(stack, worker)
        logins = len(seen.gateway.log_lines("login"))
        wait_until(lambda: samples(seen.gateway)[LOGINS] == logins, "all logins to be counted")
        seen.kill(1, signal.SIGSTOP)
        try:
            wait_until(lambda: 'process="1"' not in " ".join(samples(seen.gateway)), "the worker to be missed")
            assert samples(seen.gateway)[LOGINS] == logins
            assert ask(seen.gateway, "/healthz").status == 200
        finally:
            seen.kill(1, signal.SIGCONT)
        wait_until(lambda: 'process="1"' in " ".join(samples(seen.gateway)), "the worker to be seen again")


def test_every_console_shows_the_sessions_of_all_workers(
    seen: Workers, clients: list[RawClient], consoles: list[Psycopg]
) -> None:
    for console in consoles:
        shown = all_of(console, "SHOW CLIENTS")
        assert sessions(seen) <= {row["session"] for row in shown}
        assert {row["client"] for row in shown} >= {address_of(each) for each in consoles}
        assert all_of(console, "SHOW STATS")[0]["logins"] == len(seen.gateway.log_lines("login"))
        assert sum(row["sessions"] for row in all_of(console, "SHOW TARGETS")) == len(sessions(seen))
        assert [row["kind"] for row in all_of(console, "SHOW AUTHENTICATORS")] == ["command"]


def test_the_live_page_shows_the_sessions_of_all_workers_and_kills_them(
    seen: Workers, clients: list[RawClient]
) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    state = ask(seen.gateway, "/state", **bearer).json
    assert {row["session"] for row in state["sessions"]} == sessions(seen)
    for client in clients:
        address = f"127.0.0.1:{client.socket.getsockname()[1]}"
        (name,) = (row["session"] for row in state["sessions"] if row["client"] == address)
        answer = ask(seen.gateway, "/kill", "POST", b'{"session": "%s"}' % name.encode(), **bearer)
        assert (answer.status, answer.json) == (200, {"ended": 1})
        assert_killed(client)


# What is done to it


def test_a_session_is_killed_from_whichever_console(
    seen: Workers, clients: list[RawClient], consoles: list[Psycopg]
) -> None:
    for console, client in zip(consoles, reversed(clients), strict=True):
        address = f"127.0.0.1:{client.socket.getsockname()[1]}"
        (name,) = (row["session"] for row in all_of(console, "SHOW CLIENTS") if row["client"] == address)
        assert console.execute(f"KILL {name}").statusmessage == "KILL 1"
        assert_killed(client)
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        consoles[0].execute("KILL ffff")


def test_all_sessions_of_a_user_are_killed_at_all_workers(
    seen: Workers, clients: list[RawClient], consoles: list[Psycopg]
) -> None:
    count = len(sessions(seen))
    assert consoles[0].execute("KILL USER alice").statusmessage == f"KILL {count}"
    for client in clients:
        assert_killed(client)


def test_logins_wait_at_all_workers_and_at_their_successors(
    seen: Workers, clients: list[RawClient], consoles: list[Psycopg]
) -> None:
    consoles[0].execute("PAUSE")
    old = seen.pids[1]
    seen.kill(1)
    seen.wait_for_successor(1, old)
    assert all_of(consoles[0], "SHOW STATS")[0]["paused"] is True
    logins = len(seen.gateway.log_lines("login"))
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(RawClient(seen.port)) for _ in range(16)]
        for client in waiting:
            client.send(startup(user="alice", database="postgres"))
        wait_until(
            lambda: sum(row["state"] != "relaying" for row in all_of(consoles[0], "SHOW CLIENTS")) >= len(waiting),
            "all to be there",
        )
        assert len(seen.gateway.log_lines("login")) == logins
        consoles[0].execute("RESUME")
        for client in waiting:
            client.read_until(b"R")
    assert all_of(consoles[0], "SHOW STATS")[0]["paused"] is False


def test_settings_are_read_anew_from_a_console(seen: Workers, consoles: list[Psycopg]) -> None:
    consoles[1].execute("RELOAD")
    loaded = "configuration loaded anew"
    wait_until(lambda: len(seen.gateway.log_lines(loaded)) == 3, "the supervisor and both workers to load")


def test_a_console_ends_the_whole_gateway_and_monitors_see_it_drain(
    seen: Workers, clients: list[RawClient], consoles: list[Psycopg]
) -> None:
    assert ask(seen.gateway, "/readyz").status == 200
    consoles[1].execute("SHUTDOWN")
    wait_until(lambda: ask(seen.gateway, "/readyz").status == 503, "it to drain")
    assert ask(seen.gateway, "/healthz").status == 200
    for client in clients:
        client.assert_served()
        client.socket.close()
    assert seen.gateway.process.wait(WAIT_SECONDS) == 0


@pytest.mark.parametrize("how", ["in order", "supervisor killed"])
def test_the_socket_of_operators_leaves_no_file(
    start_gateway: StartGateway, mapped: Path, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "operators"
    # The shell is what the test has to wait for; the gateway is its child.
    gateway = start_gateway(
        mapped, before=["sh", "-c", '"$@"; exit 0', "sh"], workers=2, admin={"listen": f"unix:{path}"}
    )
    gateway.wait_for("serving operators")
    assert path.is_socket()
    (supervisor,) = gateway.children
    os.kill(supervisor, signal.SIGKILL if how == "supervisor killed" else signal.SIGTERM)
    wait_until(lambda: not path.exists(), "the file to be gone")
    assert gateway.process.wait(WAIT_SECONDS) == 0
