"""An upgrade in place: a new process takes over, and clients in the middle of something notice nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS, WriteAuthenticator, is_alive
from tests.system.conftest import (
    SUCCEEDED,
    Backends,
    Run,
    StartUpgradable,
    Upgradable,
    assert_serves,
    transactions_through,
    wait_until,
)
from tests.system.operators import USERS, connect, do, rows
from tests.system.test_service_manager import Manager
from tests.system.test_throttle import ATTACKER, BALANCED, BLOCKED, OTHER, SHORT, refusal
from tests.tls import Authority
from tests.wire import (
    RawClient,
    ScriptedTarget,
    cancel_request,
    error_fields,
    greet,
    message,
    password,
    proxy_v1,
    query,
    read_exactly,
    startup,
)

# What moves


def test_a_session_in_the_middle_of_a_transaction_moves_and_notices_nothing(upgradable: Upgradable) -> None:
    with RawClient(upgradable.port) as client:
        client.log_in()
        client.ask("begin; create temp table kept (n int); insert into kept values (42)")
        for _ in range(3):
            upgradable.upgrade()
            upgradable.wait_until_moved()
            assert client.ask("select n from kept") == [b"42"]
        assert client.ask("commit; select count(*) from kept") == [b"1"]
        assert_serves(upgradable.port)
        client.send(message(b"X"))
        assert client.read_to_end() == b""
    wait_until(lambda: len(upgradable.gateway.log_lines("session ended")) == 2, "the log to say that they have ended")


def test_a_session_that_moves_has_its_places_there(start_upgradable: StartUpgradable) -> None:
    upgradable = start_upgradable(max_clients_per_user=1, max_session_seconds=60)
    with RawClient(upgradable.port) as client:
        client.log_in()
        upgradable.upgrade()
        upgradable.wait_until_moved()
        with RawClient(upgradable.port) as other:
            other.send(startup())
            other.read_message()
            other.send(password())
            assert other.read_fatal()[0] == "53300"
        client.send(message(b"X"))
        client.read_to_end()
    wait_until(lambda: upgradable.gateway.log_lines("session ended"), "the session to have ended")
    assert_serves(upgradable.port)


def test_the_protocol_of_balancers_is_spoken_to_the_new_process(start_upgradable: StartUpgradable) -> None:
    listen = [{"address": "127.0.0.1:0", "proxy_protocol": True}]
    upgradable = start_upgradable(listen=listen, proxy_protocol_from=["127.0.0.1"])
    upgradable.upgrade()
    with RawClient(upgradable.port) as client:
        client.send(proxy_v1())
        client.log_in()
    assert upgradable.gateway.wait_for("login")["client"] == "192.0.2.7:56324"


@pytest.mark.parametrize("unix", [False, True], ids=["tcp", "unix"])
def test_operators_go_on_too_and_see_who_has_moved(
    start_upgradable: StartUpgradable, tmp_path: Path, *, unix: bool
) -> None:
    path = tmp_path / "admin"
    upgradable = start_upgradable(admin={"listen": f"unix:{path}" if unix else "127.0.0.1:0"})
    address = upgradable.gateway.wait_for("serving operators")["address"]

    def state() -> list[tuple[str, str]]:
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as connection:
            connection.settimeout(WAIT_SECONDS)
            host, _, port = address.rpartition(":")
            connection.connect(str(path) if unix else (host, int(port)))
            connection.sendall(b"GET /state HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        found = json.loads(answer.partition(b"\r\n\r\n")[2])
        return [(row["user"], row["client"]) for row in found["sessions"]]

    with RawClient(upgradable.port) as client:
        client.log_in(user="alice")
        here = "{}:{}".format(*client.socket.getsockname())
        assert state() == [("alice", here)]
        for _ in range(2):
            upgradable.upgrade()
        upgradable.wait_until_moved()
        wait_until(lambda: state() == [("alice", here)], "the session to be seen where it is now")
    upgradable.stop()
    assert not path.exists()


def test_where_operators_are_served_no_more_no_file_is_left(start_upgradable: StartUpgradable, tmp_path: Path) -> None:
    path = tmp_path / "admin"
    upgradable = start_upgradable(admin={"listen": f"unix:{path}"})
    upgradable.gateway.wait_for("serving operators")
    upgradable.gateway.rewrite(admin={"listen": ""})
    upgradable.upgrade()
    upgradable.wait_until_moved()
    assert not path.exists()
    assert_serves(upgradable.port)


def test_a_query_that_runs_meanwhile_is_answered(upgradable: Upgradable, backends: Backends) -> None:
    name = f"running {upgradable.port}"
    with RawClient(upgradable.port) as client:
        client.log_in(application_name=name)
        client.send(query("select pg_sleep(1)"))
        wait_until(lambda: backends.sleeps_as(name), "the query to run")
        upgradable.upgrade()
        upgradable.wait_until_moved()
        assert b"Z" in [kind for kind, _ in client.read_until(b"Z")]
        client.assert_served()


def test_what_the_log_says_of_a_session_that_moved_is_about_all_of_it(upgradable: Upgradable) -> None:
    with RawClient(upgradable.port) as client:
        client.log_in()
        sent = query("select 42")
        client.assert_served()
        upgradable.upgrade()
        client.assert_served()
        client.send(message(b"X"))
        client.read_to_end()
    wait_until(lambda: upgradable.gateway.log_lines("session ended"), "the log to say that it has ended")
    (login,) = upgradable.gateway.log_lines("login")
    (ended,) = upgradable.gateway.log_lines("session ended")
    assert (ended["session"], ended["why"]) == (login["session"], "client closed")
    assert ended["bytes_from_client"] == 2 * len(sent) + 5
    assert ended["bytes_from_target"] > 2 * len(message(b"D", b"\0\x01\0\0\0\x0242"))


def test_new_sessions_have_names_of_their_own(upgradable: Upgradable) -> None:
    assert_serves(upgradable.port)
    upgradable.upgrade()
    assert_serves(upgradable.port)
    wait_until(lambda: len(upgradable.gateway.log_lines("login")) == 2, "the log to tell of both")
    names = [line["session"] for line in upgradable.gateway.log_lines("login")]
    assert len(set(names)) == 2


@pytest.mark.parametrize("version", [0x30000, 0x30002])
def test_a_cancel_key_is_good_after_the_move(upgradable: Upgradable, backends: Backends, version: int) -> None:
    name = f"cancelled {upgradable.port}"
    with RawClient(upgradable.port) as client:
        client.send(startup(version, application_name=name))
        client.read_message()
        client.send(password())
        key = next(body for kind, body in client.read_until(b"Z") if kind == b"K")
        upgradable.upgrade()
        upgradable.wait_until_moved()
        client.send(query("select pg_sleep(60)"))
        wait_until(lambda: backends.sleeps_as(name), "the query to run")
        with RawClient(upgradable.port) as other:
            other.send(cancel_request(key))
            assert other.read_to_end() == b""
        assert [error_fields(body)["C"] for kind, body in client.read_until(b"Z") if kind == b"E"] == ["57014"]


def test_a_time_limit_goes_on(
    start_upgradable: StartUpgradable, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres
) -> None:
    lines = f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}; echo user=postgres; echo _META_SESSION_SECONDS=6"
    upgradable = start_upgradable(authenticator(lines))
    with RawClient(upgradable.port) as client:
        client.log_in()
        upgradable.upgrade()
        upgradable.wait_until_moved()
        client.assert_served()
        assert client.read_fatal() == ("57P01", "terminating connection: its time limit is reached")
    wait_until(lambda: upgradable.gateway.log_lines("session ended"), "the log to say that it has ended")
    assert upgradable.gateway.log_lines("session ended")[0]["seconds"] >= 6


class Typing:
    """Sends a query so slowly that it is not whole when the block ends, and so often that nobody idles meanwhile.

    `rest` is what is left of it then.
    """

    def __init__(self, client: RawClient) -> None:
        self.rest = query("select 42" + " " * 10_000)
        self._client = client
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._type)

    def __enter__(self) -> Typing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _type(self) -> None:
        while not self._is_over.wait(0.05):
            self._client.send(self.rest[:1])
            self.rest = self.rest[1:]


def test_a_session_that_idles_is_ended_where_it_is(start_upgradable: StartUpgradable) -> None:
    upgradable = start_upgradable(idle_timeout=1.5)
    with RawClient(upgradable.port) as client:
        client.log_in()
        with Typing(client) as typing:
            upgradable.upgrade()
            upgradable.wait_until_moved()
        client.send(typing.rest)
        assert b"D" in [kind for kind, _ in client.read_until(b"Z")]
        assert client.read_fatal()[0] == "57P05"
    wait_until(lambda: upgradable.gateway.log_lines("session ended"), "the log to say that it has ended")
    assert upgradable.gateway.log_lines("session ended")[0]["why"] == "idle timeout reached"


def test_a_session_that_moves_is_in_its_transaction_there(start_upgradable: StartUpgradable) -> None:
    """Nobody says so again: ReadyForQuery has passed through the old process alone."""
    upgradable = start_upgradable(idle_in_transaction_timeout=1.5, idle_timeout=600)
    with RawClient(upgradable.port) as client:
        client.log_in()
        client.ask("begin")
        with Typing(client):
            upgradable.upgrade()
            upgradable.wait_until_moved()
        assert client.read_fatal()[0] == "25P03"


def test_a_session_whose_query_is_not_answered_yet_does_not_idle_there(start_upgradable: StartUpgradable) -> None:
    upgradable = start_upgradable(idle_timeout=1)
    with RawClient(upgradable.port) as client:
        client.log_in()
        client.send(query("select pg_sleep(3)") + query("select 42"))
        upgradable.upgrade()
        upgradable.wait_until_moved()
        for _ in range(2):
            assert b"D" in [kind for kind, _ in client.read_until(b"Z")]
        assert client.read_fatal()[0] == "57P05"


def test_a_statement_is_recorded_once_though_its_session_moves_in_the_middle_of_it(
    start_upgradable: StartUpgradable, tmp_path: Path
) -> None:
    file = tmp_path / "audit"
    upgradable = start_upgradable(audit={"file": str(file), "statements": True})
    whole = query("select 'the whole of it'")
    with RawClient(upgradable.port) as client:
        client.log_in()
        client.ask("select 1")
        client.send(whole[:17])
        upgradable.upgrade()
        upgradable.wait_until_moved()
        client.send(whole[17:])
        assert b"D" in [kind for kind, _ in client.read_until(b"Z")]
        client.ask("select 2")
        client.send(message(b"X"))
        client.read_to_end()
    wait_until(lambda: upgradable.gateway.log_lines("session ended"), "the session to have ended")
    statements = [line for line in map(json.loads, file.read_text().splitlines()) if line["event"] == "statement"]
    assert [line["sql"] for line in statements] == ["select 1", "select 'the whole of it'", "select 2"]
    assert {line["session"] for line in statements} == {upgradable.gateway.log_lines("login")[0]["session"]}


def test_what_is_recorded_no_more_is_not(start_upgradable: StartUpgradable, tmp_path: Path) -> None:
    file = tmp_path / "audit"
    upgradable = start_upgradable(audit={"file": str(file), "statements": True})
    with RawClient(upgradable.port) as client:
        client.log_in()
        client.ask("select 1")
        upgradable.gateway.rewrite(audit={"statements": False})
        upgradable.upgrade()
        upgradable.wait_until_moved()
        client.ask("select 2")
    assert "select 1" in file.read_text()
    assert "select 2" not in file.read_text()


def test_a_login_in_progress_is_finished_where_it_began_and_moves_then(upgradable: Upgradable) -> None:
    with RawClient(upgradable.port) as client:
        client.send(startup())
        client.read_message()
        upgradable.upgrade()
        client.send(password())
        client.read_until(b"Z")
        upgradable.wait_until_moved()
        client.assert_served()


def test_nobody_is_refused_meanwhile(upgradable: Upgradable) -> None:
    is_over = threading.Event()
    failures: list[BaseException] = []

    def go_on() -> None:
        while not is_over.is_set():
            try:
                assert_serves(upgradable.port)
            except BaseException as failure:  # told to the test below
                failures.append(failure)
                return

    clients = [threading.Thread(target=go_on) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for _ in range(3):
            upgradable.upgrade()
    finally:
        is_over.set()
        for client in clients:
            client.join(WAIT_SECONDS)
    assert failures == []
    upgradable.wait_until_moved()


def test_logins_that_are_paused_wait_in_both_processes_until_they_may_go_on(start_upgradable: StartUpgradable) -> None:
    upgradable = start_upgradable(admin=USERS)
    gateway = upgradable.gateway
    with contextlib.ExitStack() as stack:
        clients: list[RawClient] = []

        def log_in() -> None:
            clients.append(stack.enter_context(RawClient(upgradable.port)))
            clients[-1].send(startup() + password())
            wait_until(lambda: rows(gateway, "SHOW STATS")[0]["logging_in"] == 1, "the newest process to have it wait")

        do(gateway, "PAUSE")
        log_in()
        for _ in range(2):
            upgradable.upgrade()
            assert rows(gateway, "SHOW STATS")[0]["paused"] is True
            log_in()
        assert not gateway.log_lines("login")
        do(gateway, "RESUME")
        for client in clients:
            client.read_until(b"Z")
            client.assert_served()
        upgradable.wait_until_moved()
        assert_serves(upgradable.port)


def test_an_open_console_ends_and_keeps_no_process(start_upgradable: StartUpgradable) -> None:
    upgradable = start_upgradable(admin=USERS)
    with connect(upgradable.gateway, autocommit=True) as console:
        assert console.execute("SHOW VERSION").fetchone()
        upgradable.upgrade()
        upgradable.wait_until_moved()
        with pytest.raises(psycopg.errors.AdminShutdown):
            console.execute("SHOW VERSION")
    assert rows(upgradable.gateway, "SHOW VERSION")


def test_logins_that_may_go_on_just_before_the_new_process_is_believed_do_so(
    start_upgradable: StartUpgradable, tmp_path: Path
) -> None:
    """It is held up by a service manager that reads nothing, and has been told by then that they are paused."""
    with contextlib.closing(Manager(str(tmp_path / "notify"))) as manager:
        upgradable = start_upgradable(environment=manager.environment, admin=USERS)
        with connect(upgradable.gateway, autocommit=True) as console:
            console.execute("PAUSE")
            manager.fill()
            upgradable.gateway.process.send_signal(signal.SIGUSR2)
            upgradable.gateway.wait_for("listening", 2)
            console.execute("RESUME")
        upgradable.gateway.wait_for(SUCCEEDED)
        wait_until(lambda: not rows(upgradable.gateway, "SHOW STATS")[0]["paused"], "the new process to be told")
        assert_serves(upgradable.port)
        upgradable.wait_until_moved()


# Bytes


def test_not_one_byte_is_lost_or_doubled_either_way(
    start_upgradable: StartUpgradable, authenticator: WriteAuthenticator
) -> None:
    """Both sides pour what each can check, with pauses now and then: in one of them the session moves."""
    block = bytes(range(256)) * 64
    count = 4000
    received = hashlib.sha256()
    target_read = threading.Event()

    def speak(connection: socket.socket) -> None:
        greet(connection)
        pouring = threading.Thread(target=pour, args=(connection,))
        pouring.start()
        left = count * (len(block) + 4)
        while left and (data := connection.recv(min(left, 65536))):
            received.update(data)
            left -= len(data)
        target_read.set()
        pouring.join()

    def pour(connection: socket.socket) -> None:
        for number in range(count):
            connection.sendall(struct.pack("!I", number) + block)
            if number % 50 == 0:
                time.sleep(0.05)

    expected = hashlib.sha256()
    for number in range(count):
        expected.update(struct.pack("!I", number) + block)
    with ScriptedTarget(speak) as target:
        upgradable = start_before(start_upgradable, authenticator, target)
        with RawClient(upgradable.port) as client:
            client.log_in()
            pouring = threading.Thread(target=pour, args=(client.socket,))
            pouring.start()
            seen = hashlib.sha256()
            left = count * (len(block) + 4)
            upgrades = 0
            while left:
                data = client.socket.recv(min(left, 65536))
                assert data
                seen.update(data)
                left -= len(data)
                if upgrades < 4 and left < count * (len(block) + 4) * (4 - upgrades) // 5:
                    upgradable.upgrade()
                    upgrades += 1
            pouring.join(WAIT_SECONDS)
            assert target_read.wait(WAIT_SECONDS)
    assert upgrades == 4
    assert len(upgradable.gateway.log_lines("sessions handed over")) > 1
    assert seen.hexdigest() == expected.hexdigest()
    assert received.hexdigest() == expected.hexdigest()


FLOOD_BYTES = 40 << 20
"""More than the kernel's buffers and the gateway's take between a sender and one who does not read."""
STUCK_SECONDS = 0.3


class Pouring:
    """Sends more than anybody takes who does not read, in a thread; `is_stuck` once no more of it goes."""

    def __init__(self, connection: socket.socket) -> None:
        self.sent = random.Random(connection.fileno()).randbytes(FLOOD_BYTES)
        self.is_stuck = threading.Event()
        self._connection = connection
        self._thread = threading.Thread(target=self._pour)
        self._thread.start()

    def _pour(self) -> None:
        rest = memoryview(self.sent)
        while rest and select.select([], [self._connection], [], STUCK_SECONDS)[1]:
            rest = rest[self._connection.send(rest[:65536], socket.MSG_DONTWAIT) :]
        if rest:
            self.is_stuck.set()
            self._connection.sendall(rest)

    def wait(self) -> None:
        self._thread.join(WAIT_SECONDS)


class UnreadTarget(ScriptedTarget):
    """A target that pours, reads nothing before it is told to, and then so much as a flood has; or that does not pour,
    and reads to the end of file first. `read` is that."""

    def __init__(self, *, pours: bool = False, reads_to_end: bool = False) -> None:
        super().__init__(self._speak)
        self.pouring: Pouring | None = None
        self.may_read = threading.Event()
        self.read = b""
        self._pours = pours
        self._reads_to_end = reads_to_end

    def _speak(self, connection: socket.socket) -> None:
        greet(connection)
        if self._reads_to_end:
            self.read = read_exactly(connection, FLOOD_BYTES)
        if self._pours:
            self.pouring = Pouring(connection)
        assert self.may_read.wait(WAIT_SECONDS)
        if not self._reads_to_end:
            self.read = read_exactly(connection, FLOOD_BYTES)
        if self.pouring is not None:
            self.pouring.wait()

    def is_stuck(self) -> bool:
        return self.pouring is not None and self.pouring.is_stuck.is_set()


def start_before(
    start_upgradable: StartUpgradable, authenticator: WriteAuthenticator, target: ScriptedTarget, **settings: Any
) -> Upgradable:
    """A gateway whose authenticator names this target."""
    return start_upgradable(authenticator(f"echo _META_TARGET_HOST=127.0.0.1:{target.port}; echo user=x"), **settings)


def move_twice(upgradable: Upgradable) -> None:
    for _ in range(2):
        upgradable.upgrade()
        upgradable.wait_until_moved()


def test_a_session_whose_client_does_not_read_moves_with_what_it_is_owed(
    start_upgradable: StartUpgradable, authenticator: WriteAuthenticator
) -> None:
    with UnreadTarget(pours=True) as target:
        upgradable = start_before(start_upgradable, authenticator, target)
        with RawClient(upgradable.port) as client:
            client.log_in()
            wait_until(target.is_stuck, "the target to be stuck")
            move_twice(upgradable)
            assert target.pouring is not None
            assert read_exactly(client.socket, FLOOD_BYTES) == target.pouring.sent
            sending = Pouring(client.socket)
            target.may_read.set()
            sending.wait()
            assert client.read_to_end() == b""
        wait_until(lambda: upgradable.gateway.log_lines("session ended"), "the log to say that it has ended")
        assert target.read == sending.sent


def test_a_session_whose_target_does_not_read_moves_with_what_it_is_owed(
    start_upgradable: StartUpgradable, authenticator: WriteAuthenticator
) -> None:
    with UnreadTarget() as target:
        upgradable = start_before(start_upgradable, authenticator, target)
        with RawClient(upgradable.port) as client:
            client.log_in()
            pouring = Pouring(client.socket)
            assert pouring.is_stuck.wait(WAIT_SECONDS)
            move_twice(upgradable)
            target.may_read.set()
            pouring.wait()
            assert client.read_to_end() == b""
        wait_until(lambda: upgradable.gateway.log_lines("session ended"), "the log to say that it has ended")
        (ended,) = upgradable.gateway.log_lines("session ended")
        assert (ended["why"], ended["bytes_from_client"]) == ("target closed", FLOOD_BYTES)
        assert target.read == pouring.sent


def test_a_session_in_which_nobody_reads_moves_with_what_both_are_owed(
    start_upgradable: StartUpgradable, authenticator: WriteAuthenticator
) -> None:
    with UnreadTarget(pours=True) as target:
        upgradable = start_before(start_upgradable, authenticator, target, buffer_size=1 << 20)
        with RawClient(upgradable.port) as client:
            client.log_in()
            pouring = Pouring(client.socket)
            assert pouring.is_stuck.wait(WAIT_SECONDS)
            wait_until(target.is_stuck, "the target to be stuck too")
            move_twice(upgradable)
            target.may_read.set()
            assert target.pouring is not None
            assert read_exactly(client.socket, FLOOD_BYTES) == target.pouring.sent
            pouring.wait()
            assert client.read_to_end() == b""
        assert target.read == pouring.sent


def test_a_half_closed_session_moves_and_gets_all_of_its_answer(
    start_upgradable: StartUpgradable, authenticator: WriteAuthenticator
) -> None:
    with UnreadTarget(pours=True, reads_to_end=True) as target:
        upgradable = start_before(start_upgradable, authenticator, target)
        with RawClient(upgradable.port) as client:
            client.log_in()
            client.send(query("select 42"))
            client.socket.shutdown(socket.SHUT_WR)
            wait_until(target.is_stuck, "the target to be stuck")
            assert target.read == query("select 42")
            move_twice(upgradable)
            target.may_read.set()
            assert target.pouring is not None
            assert read_exactly(client.socket, FLOOD_BYTES) == target.pouring.sent
            assert client.read_to_end() == b""
        wait_until(lambda: upgradable.gateway.log_lines("session ended"), "the log to say that it has ended")
        assert upgradable.gateway.log_lines("session ended")[0]["why"] == "client closed"


def test_transactions_go_on_through_ten_upgrades(upgradable: Upgradable, postgres: ThrowawayPostgres) -> None:
    with transactions_through(upgradable.gateway, postgres, clients=4):
        for _ in range(10):
            upgradable.upgrade()
            wait_until(lambda: not any(map(is_alive, upgradable.pids[1:-1])), "the sessions to be moved")
        upgradable.wait_until_moved()


# What stays


@contextlib.contextmanager
def staying(upgradable: Upgradable, authority: Authority) -> Iterator[RawClient]:
    """A client that speaks TLS."""
    with socket.create_connection(("127.0.0.1", upgradable.port), WAIT_SECONDS) as plain:
        plain.sendall(struct.pack("!ii", 8, 80877103))
        assert plain.recv(1) == b"S"
        client = RawClient.__new__(RawClient)
        with authority.client_context().wrap_socket(plain, server_hostname="localhost") as client.socket:
            yield client


def is_refused(upgradable: Upgradable) -> bool:
    """Whether there is no place for another client of the same name."""
    with RawClient(upgradable.port) as other:
        other.send(startup())
        kind, body = other.read_message()
        if kind == b"R":
            other.send(password())
            kind, body = other.read_message()
        assert kind == b"R" or error_fields(body)["C"] == "53300"
        return kind == b"E"


@pytest.fixture
def with_tls(authority: Authority) -> dict[str, str]:
    identity = authority.issue("upgraded", "localhost")
    return {"cert": str(identity.cert), "key": str(identity.key)}


@pytest.mark.parametrize("limit", ["max_clients", "max_clients_per_user", "max_clients_per_address"])
def test_a_session_that_stays_counts_until_it_ends(
    start_upgradable: StartUpgradable, authority: Authority, with_tls: dict[str, str], limit: str
) -> None:
    upgradable = start_upgradable(tls=with_tls, **{limit: 1})
    with staying(upgradable, authority) as client:
        client.log_in()
        for _ in range(2):
            upgradable.upgrade()
        client.assert_served()
        assert is_refused(upgradable)
        client.send(message(b"X"))
        with contextlib.suppress(ssl.SSLError):
            client.read_to_end()
    upgradable.wait_until_moved()
    assert_serves(upgradable.port)


def test_a_session_that_is_lost_with_its_old_process_counts_no_more(
    start_upgradable: StartUpgradable, authority: Authority, with_tls: dict[str, str]
) -> None:
    upgradable = start_upgradable(tls=with_tls, max_clients=1)
    # Its successor's: the first one must end in order.
    upgradable.upgrade()
    with staying(upgradable, authority) as client:
        client.log_in()
        upgradable.upgrade()
        assert is_refused(upgradable)
        os.kill(upgradable.pids[1], signal.SIGKILL)
        wait_until(lambda: not is_refused(upgradable), "its place to be free")
    assert_serves(upgradable.port)


def test_who_was_refused_for_guessing_still_is(
    start_upgradable: StartUpgradable, authenticator: WriteAuthenticator
) -> None:
    upgradable = start_upgradable(
        authenticator("exit 1"), authenticator={"cleartext_password": True}, throttle=SHORT, **BALANCED
    )
    gateway = upgradable.gateway
    answers = [refusal(gateway, ATTACKER, "alice") for _ in range(4)]
    assert (answers[0][0], answers[-1]) == ("28P01", BLOCKED)
    for _ in range(2):
        upgradable.upgrade()
        upgradable.wait_until_moved()
        assert refusal(gateway, ATTACKER, "bob") == BLOCKED
        assert refusal(gateway, OTHER, f"bob {len(upgradable.pids)}")[0] == "28P01"


def test_a_session_with_tls_stays_until_it_ends_and_can_be_cancelled(
    start_upgradable: StartUpgradable, authority: Authority, with_tls: dict[str, str], backends: Backends
) -> None:
    upgradable = start_upgradable(tls=with_tls)
    name = f"staying {upgradable.port}"
    with staying(upgradable, authority) as client:
        key = next(body for kind, body in client.log_in(application_name=name) if kind == b"K")
        upgradable.upgrade()
        upgradable.upgrade()
        assert_serves(upgradable.port)
        client.assert_served()
        client.send(query("select pg_sleep(60)"))
        wait_until(lambda: backends.sleeps_as(name), "the query to run")
        # The newest process passes it on to the one between, which has nothing left but that.
        with RawClient(upgradable.port) as other:
            other.send(cancel_request(key))
            assert other.read_to_end() == b""
        assert [error_fields(body)["C"] for kind, body in client.read_until(b"Z") if kind == b"E"] == ["57014"]
        assert all(map(is_alive, upgradable.pids))
        client.send(message(b"X"))
        with contextlib.suppress(ssl.SSLError):
            client.read_to_end()
    upgradable.wait_until_moved()


def test_an_old_process_can_be_told_to_end(
    start_upgradable: StartUpgradable, authority: Authority, with_tls: dict[str, str]
) -> None:
    upgradable = start_upgradable(tls=with_tls, drain_timeout=0)
    with staying(upgradable, authority) as client:
        client.log_in()
        upgradable.upgrade()
        client.assert_served()
        upgradable.gateway.process.send_signal(signal.SIGTERM)
        assert client.read_fatal()[0] == "57P01"
    upgradable.wait_until_moved()
    assert_serves(upgradable.port)


def test_what_has_moved_is_inherited_by_no_authenticator(
    start_upgradable: StartUpgradable, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    upgradable = start_upgradable(
        authenticator(
            f"ls -l /proc/$$/fd | grep -c socket: >'{tmp_path}/sockets'\n"
            f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}; echo user=postgres"
        )
    )
    with RawClient(upgradable.port) as client:
        client.log_in()
        upgradable.upgrade()
        upgradable.wait_until_moved()
        (tmp_path / "sockets").unlink()
        assert_serves(upgradable.port)
        assert (tmp_path / "sockets").read_text() == "0\n"


# When it fails


@pytest.mark.parametrize("workers", [1, 2])
def test_a_gateway_that_is_told_to_end_during_an_upgrade_leaves_no_other_process(
    start_upgradable: StartUpgradable, tmp_path: Path, workers: int
) -> None:
    upgradable = start_upgradable(workers=workers)
    gateway = upgradable.gateway
    before = gateway.family
    (tmp_path / "stuck.py").write_text(
        "import pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "time.sleep(60)\n"
        "def answer(request):\n    return None\n"
    )
    gateway.rewrite(authenticator={"kind": "python", "callable": "stuck:answer", "cmd": []})
    gateway.process.send_signal(signal.SIGUSR2)
    wait_until((tmp_path / "begun").exists, "the new process to be stuck")
    (successor,) = gateway.children - before
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(WAIT_SECONDS) == 0
    wait_until(lambda: not is_alive(successor), "the new process to be gone")


def test_a_new_process_that_cannot_start_leaves_the_old_one_as_it_was(upgradable: Upgradable) -> None:
    upgradable.gateway.rewrite(max_clients=0)
    with RawClient(upgradable.port) as client:
        client.log_in()
        upgradable.gateway.process.send_signal(signal.SIGUSR2)
        upgradable.gateway.wait_for("upgrade failed, this process goes on")
        client.assert_served()
        assert_serves(upgradable.port)
        wait_until(lambda: not upgradable.gateway.children, "the new process to be collected")
        upgradable.gateway.rewrite(max_clients=10)
        upgradable.upgrade()
        upgradable.wait_until_moved()
        client.assert_served()


def test_a_new_process_that_cannot_write_its_pid_file_leaves_the_old_one_as_it_was(upgradable: Upgradable) -> None:
    upgradable.gateway.rewrite(pid_file="/no/such/folder/pid")
    with RawClient(upgradable.port) as client:
        client.log_in()
        upgradable.gateway.process.send_signal(signal.SIGUSR2)
        upgradable.gateway.wait_for("upgrade failed, this process goes on")
        client.assert_served()
        assert_serves(upgradable.port)
    assert is_alive(upgradable.gateway.pid)


def test_a_new_process_that_ends_before_the_old_one_believes_it_leaves_that_as_it_was(
    start_upgradable: StartUpgradable, tmp_path: Path
) -> None:
    """It accepts by then. What it waits for is a service manager that reads nothing."""
    path, pid_file = tmp_path / "admin", tmp_path / "pid"
    with contextlib.closing(Manager(str(tmp_path / "notify"))) as manager:
        upgradable = start_upgradable(
            environment=manager.environment, admin={"listen": f"unix:{path}"}, pid_file=str(pid_file), max_clients=1
        )
        gateway = upgradable.gateway
        with RawClient(upgradable.port) as client:
            client.log_in()
            manager.fill()
            gateway.process.send_signal(signal.SIGUSR2)
            gateway.wait_for("serving operators", 2)
            (successor,) = gateway.children
            os.kill(successor, signal.SIGKILL)
            gateway.wait_for("upgrade failed, this process goes on")
            client.assert_served()
            assert is_refused(upgradable)
            client.send(message(b"X"))
            client.read_to_end()
        wait_until(lambda: not is_refused(upgradable), "the place of the client to be free")
        assert_serves(upgradable.port)
        assert pid_file.read_text() == f"{gateway.pid}\n"
        assert path.is_socket()
        assert gateway.process.poll() is None


def test_who_ends_anyway_ends_in_order_however_often_it_is_told_to(upgradable: Upgradable) -> None:
    upgradable.upgrade()
    process = upgradable.gateway.process
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    assert_serves(upgradable.port)


# Who is told


def test_the_command_upgrades_and_the_pid_file_names_the_new_process(
    start_upgradable: StartUpgradable, tmp_path: Path, run: Run
) -> None:
    pid_file = tmp_path / "pid"
    upgradable = start_upgradable(pid_file=str(pid_file), listen=["127.0.0.1:0", f"unix:{tmp_path}:5432"])
    for count in (1, 2):
        done = run("upgrade", "--config", str(upgradable.gateway.config))
        assert (done.returncode, done.stderr) == (0, "")
        upgradable.gateway.wait_for(SUCCEEDED, count)
        assert pid_file.read_text() == f"{upgradable.pids[-1]}\n"
        assert (tmp_path / ".s.PGSQL.5432").is_socket()
    upgradable.wait_until_moved()
    assert_serves(upgradable.port)
    upgradable.stop()
    assert not pid_file.exists()
    assert not (tmp_path / ".s.PGSQL.5432").exists()


def test_systemd_is_told_which_process_it_is(start_upgradable: StartUpgradable, tmp_path: Path) -> None:
    with contextlib.closing(Manager(str(tmp_path / "notify"))) as manager:
        upgradable = start_upgradable(environment=manager.environment)
        assert manager.told() == {"READY": "1"}
        upgradable.upgrade()
        assert manager.told() == {"READY": "1"}
        assert manager.told() == {"MAINPID": str(upgradable.pids[-1])}
        upgradable.wait_until_moved()
        upgradable.stop()
        assert manager.told() == {"STOPPING": "1"}
