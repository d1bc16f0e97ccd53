"""A new supervisor with workers takes over from one that runs, and each session moves from worker to worker."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS, is_alive
from tests.system.conftest import (
    Backends,
    StartUpgradable,
    Upgradable,
    Workers,
    assert_serves,
    logged_in_by_tls,
    transactions_through,
    wait_until,
)
from tests.system.operators import ask as ask_operators
from tests.tls import Authority
from tests.wire import RawClient, cancel_request, error_fields, message, password, query, startup


@pytest.fixture
def upgradable(start_upgradable: StartUpgradable) -> Upgradable:
    return start_upgradable(workers=2)


# What moves


def test_sessions_in_the_middle_of_a_transaction_move_from_each_worker(upgradable: Upgradable) -> None:
    workers = Workers(upgradable.gateway)
    with contextlib.ExitStack() as stack:
        clients = [workers.client_at(stack, worker) for worker in (0, 1)]
        for client in clients:
            client.ask("begin; create temp table kept (n int); insert into kept values (42)")
        old = set(workers.pids.values())
        upgradable.upgrade()
        upgradable.wait_until_moved()
        wait_until(lambda: not any(map(is_alive, old)), "the old workers to be gone")
        assert not old & set(workers.pids.values())
        for client in clients:
            assert client.ask("select n from kept") == [b"42"]
            client.ask("commit")
        assert_serves(upgradable.port)


def test_transactions_go_on_through_upgrades(upgradable: Upgradable, postgres: ThrowawayPostgres) -> None:
    with transactions_through(upgradable.gateway, postgres, clients=4):
        for _ in range(4):
            upgradable.upgrade()
            wait_until(lambda: not any(map(is_alive, upgradable.pids[1:-1])), "the sessions to be moved")
        upgradable.wait_until_moved()


@pytest.mark.parametrize("moved", ["moved", "in the old process"])
def test_a_query_is_cancelled_wherever_its_session_is(
    start_upgradable: StartUpgradable, authority: Authority, backends: Backends, moved: str
) -> None:
    identity = authority.issue("upgraded", "localhost")
    upgradable = start_upgradable(workers=2, tls={"cert": str(identity.cert), "key": str(identity.key)})
    name = f"upgraded {upgradable.port}"
    with contextlib.ExitStack() as stack:
        if moved == "moved":
            client = stack.enter_context(RawClient(upgradable.port))
            messages = client.log_in(application_name=name)
        else:
            client, messages = stack.enter_context(logged_in_by_tls(upgradable.port, authority, name))
        key = next(body for kind, body in messages if kind == b"K")
        client.send(query("select pg_sleep(60)"))
        wait_until(lambda: backends.sleeps_as(name), "the query to run")
        upgradable.upgrade()
        upgradable.upgrade()
        if moved == "moved":
            upgradable.wait_until_moved()
        # Whichever worker gets it.
        for _ in range(8):
            with RawClient(upgradable.port) as other:
                other.send(cancel_request(key))
                assert other.read_to_end() == b""
        assert [error_fields(body)["C"] for kind, body in client.read_until(b"Z") if kind == b"E"] == ["57014"]
        client.send(message(b"X"))
    upgradable.wait_until_moved()


def test_what_operators_have_goes_along(start_upgradable: StartUpgradable, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    upgradable = start_upgradable(
        workers=2,
        admin={"listen": "127.0.0.1:0"},
        pid_file=str(pid_file),
        listen=["127.0.0.1:0", f"unix:{tmp_path}:5432"],
    )
    socket_file = tmp_path / ".s.PGSQL.5432"
    upgradable.upgrade()
    upgradable.wait_until_moved()
    assert int(pid_file.read_text()) == upgradable.pids[-1]
    assert ask_operators(upgradable.gateway, "/readyz").status == 200
    assert socket_file.is_socket()
    assert_serves(upgradable.port)
    os.kill(upgradable.pids[-1], signal.SIGTERM)
    wait_until(lambda: not is_alive(upgradable.pids[-1]), "the new process to end")
    assert not socket_file.exists()
    assert not pid_file.exists()


def test_their_number_stays(upgradable: Upgradable) -> None:
    upgradable.gateway.rewrite(workers=1)
    upgradable.upgrade()
    upgradable.wait_until_moved()
    assert_serves(upgradable.port)
    ready = upgradable.gateway.log_lines("worker ready")
    assert sorted(line["worker"] for line in ready) == [0, 0, 1, 1]


# When it fails


def test_a_new_supervisor_that_cannot_start_leaves_the_old_one_as_it_was(upgradable: Upgradable) -> None:
    workers = Workers(upgradable.gateway)
    with contextlib.ExitStack() as stack:
        clients = [workers.client_at(stack, worker) for worker in (0, 1)]
        upgradable.gateway.rewrite(max_clients=0)
        os.kill(upgradable.pids[-1], signal.SIGUSR2)
        upgradable.gateway.wait_for("upgrade failed, this process goes on")
        for client in clients:
            client.assert_served()
        assert_serves(upgradable.port)
        upgradable.gateway.rewrite(max_clients=10)
        upgradable.upgrade()
        upgradable.wait_until_moved()
        for client in clients:
            client.assert_served()


def test_an_old_worker_that_is_killed_takes_its_sessions_alone(
    start_upgradable: StartUpgradable, authority: Authority
) -> None:
    identity = authority.issue("upgraded", "localhost")
    upgradable = start_upgradable(workers=2, tls={"cert": str(identity.cert), "key": str(identity.key)})
    workers = Workers(upgradable.gateway)
    old = dict(workers.pids)
    with contextlib.ExitStack() as stack:
        moving = [workers.client_at(stack, worker) for worker in (0, 1)]
        client, _ = stack.enter_context(logged_in_by_tls(upgradable.port, authority, "staying"))
        worker = workers.worker_of(client)
        upgradable.upgrade()
        client.assert_served()
        wait_until(lambda: not is_alive(old[1 - worker]), "the other old worker to be gone")
        os.kill(old[worker], signal.SIGKILL)
        upgradable.wait_until_moved()
        for each in moving:
            each.assert_served()
        assert_serves(upgradable.port)


def test_a_new_worker_that_is_killed_takes_no_session_of_the_old_one_along(
    start_upgradable: StartUpgradable, authority: Authority
) -> None:
    identity = authority.issue("upgraded", "localhost")
    tls = {"cert": str(identity.cert), "key": str(identity.key)}
    upgradable = start_upgradable(workers=2, tls=tls, login_timeout=60)
    workers = Workers(upgradable.gateway)
    with logged_in_by_tls(upgradable.port, authority, "staying") as (staying, _):
        slow = RawClient(upgradable.port)
        with slow:
            # A login in progress moves once it is done; by then there is nobody to move to.
            slow.send(startup())
            slow.read_message()
            upgradable.upgrade()
            for worker, pid in list(workers.pids.items()):
                workers.kill(worker)
                workers.wait_for_successor(worker, pid)
            slow.send(password())
            slow.read_until(b"Z")
            slow.assert_served()
            staying.assert_served()
            assert_serves(upgradable.port)


def test_an_old_supervisor_can_be_told_to_end(start_upgradable: StartUpgradable, authority: Authority) -> None:
    identity = authority.issue("ended", "localhost")
    tls = {"cert": str(identity.cert), "key": str(identity.key)}
    upgradable = start_upgradable(workers=2, tls=tls, drain_timeout=0)
    with logged_in_by_tls(upgradable.port, authority, "ended") as (client, _):
        upgradable.upgrade()
        client.assert_served()
        upgradable.gateway.process.send_signal(signal.SIGTERM)
        assert client.read_fatal()[0] == "57P01"
        assert upgradable.gateway.process.wait(WAIT_SECONDS) == 0
    assert_serves(upgradable.port)


# What counts


def is_refused(port: int) -> bool:
    """Whether there is no place for another client."""
    with RawClient(port) as client:
        client.send(startup())
        kind, body = client.read_message()
        return kind == b"E" and error_fields(body)["C"] == "53300"


def test_what_stays_still_counts_and_what_moves_counts_once(
    start_upgradable: StartUpgradable, authority: Authority
) -> None:
    identity = authority.issue("counted", "localhost")
    tls = {"cert": str(identity.cert), "key": str(identity.key)}
    upgradable = start_upgradable(workers=2, tls=tls, max_clients=2)
    with logged_in_by_tls(upgradable.port, authority, "staying") as (staying, _), RawClient(upgradable.port) as moving:
        moving.log_in()
        for _ in range(2):
            upgradable.upgrade()
            # While the session is on its way, it counts nowhere.
            wait_until(lambda: is_refused(upgradable.port), "all places to be taken")
        moving.send(message(b"X"))
        wait_until(lambda: upgradable.gateway.log_lines("session ended"), "one to end")
        assert_serves(upgradable.port)
        staying.assert_served()
