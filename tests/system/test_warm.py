"""Connections to targets that stand open before anyone needs them."""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway
from tests.system.conftest import Answering, answering_gateway, wait_until
from tests.wire import RawClient, ScriptedTarget, greet, message


class Counting:
    """A target that lets everybody in, and knows how many have connected and how many have said who they are."""

    def __init__(self) -> None:
        self.open: list[socket.socket] = []
        self.started: list[int] = []
        self.closed: list[int] = []
        self._counting = threading.Lock()

    def __call__(self, connection: socket.socket) -> None:
        with self._counting:
            self.open.append(connection)
            number = len(self.open)
        try:
            greet(connection)
            self.started.append(number)
            while connection.recv(65536):
                continue
        finally:
            self.closed.append(number)

    def wait_for(self, started: int, opened: int) -> None:
        wait_until(lambda: len(self.started) == started, f"{started} logins")
        wait_until(lambda: len(self.open) == opened, f"{opened} connections")


@pytest.fixture
def counting() -> Iterator[tuple[Counting, ScriptedTarget]]:
    script = Counting()
    with ScriptedTarget(script, opens=lambda connection: connection) as target:
        yield script, target


@pytest.fixture
def warm_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answering]:
    """Keeps two connections to each target open."""
    settings = {"target": {"warm": 2, "tls": {"mode": "disable"}}}
    with answering_gateway(tmp_path_factory.mktemp("warm"), **settings) as answering:
        yield answering


def at(port: int) -> dict[str, str]:
    return {"_META_TARGET_HOST": f"127.0.0.1:{port}", "user": "postgres"}


def test_after_the_first_login_connections_stand_open_and_the_next_logins_take_them(
    warm_gateway: Answering, counting: tuple[Counting, ScriptedTarget]
) -> None:
    script, target = counting
    warm_gateway.greeted(at(target.port))
    wait_until(lambda: len(script.open) == 3, "two connections more than the login's")
    for number in (2, 3, 4):
        warm_gateway.greeted(at(target.port))
        script.wait_for(started=number, opened=number + 2)
    # Each login took the connection that stood open for longest, and none was used twice.
    assert script.started == [1, 2, 3, 4]


def test_none_stands_open_unless_that_is_wanted(
    tmp_path_factory: pytest.TempPathFactory, counting: tuple[Counting, ScriptedTarget]
) -> None:
    script, target = counting
    with answering_gateway(tmp_path_factory.mktemp("cold"), target={"tls": {"mode": "disable"}}) as answering:
        for _ in range(3):
            answering.greeted(at(target.port))
    wait_until(lambda: len(script.started) == 3, "all logins to be noted")
    assert len(script.open) == 3


def test_one_that_the_target_has_closed_is_found_dead_before_use(
    warm_gateway: Answering, counting: tuple[Counting, ScriptedTarget]
) -> None:
    script, target = counting
    warm_gateway.greeted(at(target.port))
    wait_until(lambda: len(script.open) == 3, "two connections")
    for connection in script.open[1:3]:
        connection.shutdown(socket.SHUT_RDWR)
    warm_gateway.greeted(at(target.port))
    wait_until(lambda: len(script.started) == 2, "the second login to be noted")
    assert script.started[-1] > 3


def test_one_that_has_said_anything_is_not_used(
    warm_gateway: Answering, counting: tuple[Counting, ScriptedTarget]
) -> None:
    script, target = counting
    warm_gateway.greeted(at(target.port))
    wait_until(lambda: len(script.open) == 3, "two connections")
    for connection in script.open[1:3]:
        connection.sendall(message(b"E", b"SFATAL\0VFATAL\0C57P01\0Mtoo long\0\0"))
    # Its word is on its way; until it is here, the connection might still be taken, and then the client would be told.
    wait_until(lambda: unread(script.open[1:3]) == 0, "the gateway to read it")
    warm_gateway.greeted(at(target.port))
    wait_until(lambda: len(script.started) == 2, "the second login to be noted")
    assert script.started[-1] > 3


def unread(connections: list[socket.socket]) -> int:
    """How many bytes the other side has not taken yet."""
    waiting = 0
    for connection in connections:
        # SIOCOUTQ: what is sent and not acknowledged; on loopback that is what is on its way.
        waiting += struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0]
    return waiting


def test_postgresql_has_no_session_for_them(warm_gateway: Answering, postgres: ThrowawayPostgres) -> None:
    of_gateway = "select count(*) from pg_stat_activity where application_name = 'warm session'"
    lines = at(postgres.port) | {"application_name": "warm session"}
    with RawClient(warm_gateway.gateway.port) as client:
        client.log_in(user=warm_gateway.user(lines))
        wait_until(lambda: connections_to(warm_gateway.gateway, postgres.port) == 3, "two connections more")
        assert postgres.sql(of_gateway) == "1"
    for _ in range(20):
        assert warm_gateway.asked(lines, "select current_user") == "postgres"


def test_tls_is_done_before_the_login(
    tmp_path_factory: pytest.TempPathFactory, tls_postgres: ThrowawayPostgres
) -> None:
    settings = {"target": {"warm": 1, "tls": {"mode": "require"}}}
    lines = at(tls_postgres.port)
    with answering_gateway(tmp_path_factory.mktemp("warm"), **settings) as answering:
        encrypted = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
        for _ in range(5):
            assert answering.asked(lines, encrypted) == "t"
            wait_until(lambda: connections_to(answering.gateway, tls_postgres.port) >= 1, "one that stands open")


def test_the_end_of_the_gateway_closes_them(
    tmp_path_factory: pytest.TempPathFactory, counting: tuple[Counting, ScriptedTarget]
) -> None:
    script, target = counting
    settings = {"target": {"warm": 2, "tls": {"mode": "disable"}}}
    with answering_gateway(tmp_path_factory.mktemp("warm"), **settings) as answering:
        answering.greeted(at(target.port))
        wait_until(lambda: len(script.open) == 3, "two connections")
    wait_until(lambda: len(script.closed) == 3, "all connections to be closed")


def connections_to(gateway: Gateway, port: int) -> int:
    """How many connections the gateway's machine has to a port of loopback."""
    shown = subprocess.run(
        ["ss", "-tnHp", "state", "established", "dst", f"127.0.0.1:{port}"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    ).stdout
    return sum(f"pid={gateway.pid}," in line for line in shown.splitlines())
