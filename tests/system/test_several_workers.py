"""Several worker processes under a supervisor: they share the clients, and the loss of one is nobody else's."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS, Gateway, StartGateway, WriteAuthenticator, is_alive
from tests.system.conftest import (
    FEW_DESCRIPTORS,
    MANY,
    Backends,
    Run,
    StartWorkers,
    Workers,
    assert_serves,
    configure,
    is_listened_on,
    limited_to,
    wait_until,
)
from tests.wire import RawClient, cancel_request, error_fields, message, password, proxy_v1, query, startup

PROTOCOL_3_2 = 0x30002
CLEARTEXT_REQUEST = struct.pack("!i", 3)


def wait_until_gone(pids: set[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)), "all processes to be gone")


# Counts of all


def test_limits_hold_for_all_workers_together_and_a_dead_one_takes_no_place(start_workers: StartWorkers) -> None:
    workers = start_workers(max_clients=3)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(RawClient(workers.port)) for _ in range(3)]
        for client in held:
            client.log_in()
        for _ in range(8):
            with RawClient(workers.port) as client:
                client.send(startup())
                assert client.read_fatal()[0] == "53300"
        at = [workers.worker_of(client) for client in held]
        old = workers.pids[at[0]]
        workers.kill(at[0])
        workers.wait_for_successor(at[0], old)
        for _ in range(at.count(at[0])):
            stack.enter_context(RawClient(workers.port)).log_in()
        with RawClient(workers.port) as client:
            client.send(startup())
            assert client.read_fatal()[0] == "53300"


def test_a_workers_descriptors_bound_its_own_clients_and_not_those_of_all(start_workers: StartWorkers) -> None:
    workers = start_workers(before=limited_to(FEW_DESCRIPTORS), authenticator={"max_parallel": 4}, max_clients=200)
    own = workers.gateway.wait_for("this worker has descriptors for fewer than max_clients")["clients"]
    assert 10 < own < FEW_DESCRIPTORS / 2
    with contextlib.ExitStack() as stack:
        # Neither can be full before there are as many, and one must be when there are twice as many.
        held: list[RawClient] = []
        for _ in range(own):
            held.append(stack.enter_context(RawClient(workers.port)))
            held[-1].log_in()
        for _ in range(own + 1):
            another = stack.enter_context(RawClient(workers.port))
            another.send(startup())
            if another.read_message()[0] == b"E":
                break
            another.send(password())
            another.read_until(b"Z")
            held.append(another)
        else:
            raise AssertionError("nobody was refused")
        assert workers.gateway.wait_for("refused")["reason"] == (
            f"{own} clients in this worker, which has no descriptors for more"
        )
        assert Counter(map(workers.worker_of, held)).most_common(1)[0][1] == own
        assert len(held) > own
    assert not workers.gateway.log_lines("accepting pauses")


def test_an_address_that_guesses_is_refused_by_all_workers(
    start_workers: StartWorkers, authenticator: WriteAuthenticator
) -> None:
    throttle = {"failures": 2, "delay": 0.01, "max_delay": 0.01, "block": 60, "exempt": list[str]()}
    workers = start_workers(authenticator("exit 1"), throttle=throttle)

    def guess() -> str:
        with RawClient(workers.port) as client:
            client.send(startup() + password())
            return error_fields(client.read_until(b"E")[-1][1])["M"]

    wait_until(lambda: guess() == "too many failed logins", "the address to be refused")
    assert {guess() for _ in range(16)} == {"too many failed logins"}


def test_the_audit_log_is_opened_anew_by_all_even_if_the_settings_have_a_fault(
    start_workers: StartWorkers, tmp_path: Path
) -> None:
    file, moved = tmp_path / "audit.log", tmp_path / "audit.old"
    workers = start_workers(audit={"file": str(file), "required": True})
    assert_serves(workers.port)
    wait_until(lambda: b'"event":"login"' in file.read_bytes(), "the login")
    for settings in ({"max_clients": 0}, {"max_clients": 100}):
        file.rename(moved)
        workers.gateway.rewrite(**settings)
        workers.gateway.process.send_signal(signal.SIGHUP)
        wait_until(lambda: file.exists() and file.read_bytes().count(b'"event":"opened"') == 3, "all to have opened it")
        wait_until(lambda: b'"event":"reload"' in file.read_bytes(), "the reload")
    pids = {json.loads(line)["pid"] for line in file.read_text().splitlines()}
    assert pids == {workers.gateway.pid, *workers.pids.values()}


def test_the_protocol_of_balancers_is_spoken_at_every_worker(start_workers: StartWorkers) -> None:
    listen = [{"address": "127.0.0.1:0", "proxy_protocol": True}]
    workers = start_workers(listen=listen, proxy_protocol_from=["127.0.0.1"])
    for port in range(1, 17):
        with RawClient(workers.port) as client:
            client.send(proxy_v1(port=port))
            client.log_in()
        workers.gateway.wait_for("login", client=f"192.0.2.7:{port}")
    assert {line["worker"] for line in workers.gateway.log_lines("login")} == {0, 1}


# Sharing


def test_a_single_worker_has_no_supervisor(gateway: Gateway) -> None:
    assert gateway.children == set()
    assert not gateway.log_lines("worker ready")
    assert_serves(gateway.port)
    assert "worker" not in gateway.wait_for("login")


def test_each_worker_is_a_process_that_gets_clients_and_says_in_the_log_which_it_is(workers: Workers) -> None:
    assert set(workers.pids.values()) == workers.gateway.children
    for _ in range(MANY):
        assert_serves(workers.port)
    workers.gateway.wait_for("session ended", MANY)
    lines = workers.gateway.log_lines("login")
    assert {line["worker"] for line in lines} == {0, 1}
    assert len({line["session"] for line in lines}) == MANY


def test_sessions_of_a_successor_have_names_of_their_own(workers: Workers) -> None:
    with contextlib.ExitStack() as stack:
        workers.client_at(stack, 1)
        old = workers.pids[1]
        workers.kill(1)
        workers.wait_for_successor(1, old)
        workers.client_at(stack, 1)
    names = [line["session"] for line in workers.gateway.log_lines("login")]
    assert len(set(names)) == len(names)


def test_a_unix_socket_is_shared_and_removed_at_the_end(start_workers: StartWorkers, tmp_path: Path) -> None:
    workers = start_workers(listen=[f"unix:{tmp_path}:5432"])
    path = tmp_path / ".s.PGSQL.5432"
    for _ in range(8):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT_SECONDS)
            client.connect(str(path))
            client.sendall(startup())
            assert client.recv(1) == b"R"
    old = workers.pids[0]
    workers.kill(0)
    workers.wait_for_successor(0, old)
    assert path.is_socket()
    assert workers.gateway.stop() == 0
    assert not path.exists()


def test_nobody_else_can_take_a_share_of_the_port(workers: Workers, run: Run, folder: Path) -> None:
    configure(folder, listen=f"127.0.0.1:{workers.port}", workers=2)
    done = run()
    assert done.returncode == 2
    assert "Address already in use" in done.stderr


def test_refused_users_look_the_same_at_every_worker(
    start_workers: StartWorkers, authenticator: Callable[..., Path]
) -> None:
    workers = start_workers(authenticator("exit 1"), authenticator={"method": "scram-sha-256"})
    first = b"n,,n=,r=abcdefghijklmnopqrstuvwx"
    initial = b"SCRAM-SHA-256\0" + struct.pack("!i", len(first)) + first
    salts = set()
    for _ in range(16):
        with RawClient(workers.port) as client:
            client.send(startup(user="nobody"))
            client.read_message()
            client.send(message(b"p", initial))
            salts.add(client.read_message()[1].split(b",")[1])
    wait_until(lambda: len({line["worker"] for line in workers.gateway.log_lines("refused")}) == 2, "both to be asked")
    assert len(salts) == 1


# Cancelling


@pytest.mark.parametrize("version", [0x30000, PROTOCOL_3_2])
def test_a_cancel_request_works_whichever_worker_gets_it(workers: Workers, backends: Backends, version: int) -> None:
    ways: set[bool] = set()
    name = f"cancelled {workers.port}"
    with RawClient(workers.port) as client:
        client.send(startup(version, application_name=name))
        client.read_message()
        client.send(password())
        key = next(body for kind, body in client.read_until(b"Z") if kind == b"K")
        assert len(key) == (8 if version == 0x30000 else 36)
        own = workers.worker_of(client)
        for count in range(1, MANY):
            client.send(query("select pg_sleep(60)"))
            wait_until(lambda: backends.sleeps_as(name), "the query to run")
            with RawClient(workers.port) as other:
                other.send(cancel_request(key))
                assert other.read_to_end() == b""
            errors = [error_fields(body)["C"] for kind, body in client.read_until(b"Z") if kind == b"E"]
            assert errors == ["57014"]
            line = workers.gateway.wait_for("cancel request", count)
            assert line["outcome"] == "passed on"
            ways.add(line["worker"] == own)
            if len(ways) == 2:
                break
    assert ways == {True, False}


@pytest.mark.parametrize("slot", [0, 1, 2, 255, 256, 511])
def test_a_key_that_is_nobodys_is_nobodys_everywhere(workers: Workers, slot: int) -> None:
    with RawClient(workers.port) as client:
        client.send(cancel_request((slot << 23 | 4711).to_bytes(4) + b"fake"))
        assert client.read_to_end() == b""
    line = workers.gateway.wait_for("cancel request")
    assert (line["outcome"], line["session"]) == ("nobody's key", "")


def test_a_cancel_request_for_a_worker_that_is_stuck_ends_in_time(start_workers: StartWorkers) -> None:
    workers = start_workers(cancel_timeout=0.3, worker_timeout=600)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(RawClient(workers.port))
        key = next(body for kind, body in client.log_in() if kind == b"K")
        own = workers.worker_of(client)
        workers.kill(own, signal.SIGSTOP)
        try:
            # Those that wait for the one that is stopped are not answered; some are the other's.
            for _ in range(MANY):
                other = stack.enter_context(RawClient(workers.port))
                other.send(cancel_request(key))
            line = workers.gateway.wait_for("cancel request")
            assert line["outcome"] == "passed on to another worker, not confirmed in 0.3 s"
        finally:
            workers.kill(own, signal.SIGCONT)

        def is_answered() -> bool:
            client.send(query("select 1"))
            return not [body for kind, body in client.read_until(b"Z") if kind == b"E"]

        # What has waited for it is passed on now, and may hit a query.
        wait_until(is_answered, "the requests to be over")


# Sharing


def workers_of(workers: Workers, clients: list[RawClient]) -> list[int]:
    return [workers.worker_of(client) for client in clients]


def logged_in(stack: contextlib.ExitStack, workers: Workers, count: int) -> list[RawClient]:
    clients = []
    for _ in range(count):
        clients.append(stack.enter_context(RawClient(workers.port)))
        clients[-1].log_in()
    return clients


def test_clients_are_shared_out_evenly(workers: Workers) -> None:
    with contextlib.ExitStack() as stack:
        share = workers_of(workers, logged_in(stack, workers, MANY)).count(0)
        assert 0.4 * MANY <= share <= 0.6 * MANY


def test_a_worker_that_was_replaced_fills_up_first(workers: Workers) -> None:
    with contextlib.ExitStack() as stack:
        old = workers.pids[0]
        clients = logged_in(stack, workers, MANY)
        staying = workers_of(workers, clients).count(1)
        workers.kill(0)
        workers.wait_for_successor(0, old)
        # Until it has nearly as many again, the kernel may deal as it likes.
        after = workers_of(workers, logged_in(stack, workers, staying * 3 // 4))
        assert set(after) == {0}


def test_who_is_passed_on_is_known_by_its_own_address(start_workers: StartWorkers) -> None:
    listen = [{"address": "127.0.0.1:0", "proxy_protocol": True}]
    workers = start_workers(listen=listen, proxy_protocol_from=["127.0.0.1"])
    with contextlib.ExitStack() as stack:
        for number in range(MANY // 2):
            client = stack.enter_context(RawClient(workers.port))
            client.send(proxy_v1(f"192.0.2.{number}"))
            client.log_in()
            workers.gateway.wait_for("login", client=f"192.0.2.{number}:56324")


# Loss of a worker


def test_the_others_go_on_when_a_worker_is_killed(workers: Workers, backends: Backends) -> None:
    with contextlib.ExitStack() as stack:
        staying = workers.client_at(stack, 0)
        name = f"lost {workers.port}"
        lost = workers.client_at(stack, 1)
        lost.send(query(f"set application_name = '{name}'"))
        lost.read_until(b"Z")
        old = workers.pids[1]
        workers.kill(1)
        assert lost.read_to_end() == b""
        staying.assert_served()
        line = workers.gateway.wait_for("worker ended")
        assert (line["worker"], line["pid"], line["signal"]) == (1, old, "SIGKILL")
        for _ in range(10):
            assert_serves(workers.port)
        workers.wait_for_successor(1, old)
        workers.client_at(stack, 1).assert_served()
        staying.assert_served()
        wait_until(lambda: not backends.named(name), "the server's side to end")


def test_who_waits_in_a_workers_queue_is_served_by_its_successor(workers: Workers) -> None:
    for worker in (0, 1):
        workers.kill(worker, signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(workers.port)) for _ in range(20)]
        for client in clients:
            client.send(startup())
        for worker in (0, 1):
            workers.kill(worker)
        for client in clients:
            assert client.read_message()[0] == b"R"


def test_a_worker_that_shows_no_sign_of_life_is_replaced(start_workers: StartWorkers) -> None:
    workers = start_workers(worker_timeout=0.6)
    with contextlib.ExitStack() as stack:
        staying = workers.client_at(stack, 0)
        stopped = workers.client_at(stack, 1)
        old = workers.pids[1]
        workers.kill(1, signal.SIGSTOP)
        # Some of them wait for it.
        clients = [stack.enter_context(RawClient(workers.port)) for _ in range(20)]
        for client in clients:
            client.send(startup())
        staying.assert_served()
        line = workers.gateway.wait_for("worker killed: it shows no sign of life")
        assert (line["worker"], line["pid"]) == (1, old)
        assert stopped.read_to_end() == b""
        for client in clients:
            assert client.read_message()[0] == b"R"
        staying.assert_served()
        assert len(workers.gateway.log_lines("worker ended")) == 1


def test_a_worker_that_cannot_begin_again_is_tried_again_and_the_others_go_on(
    start_workers: StartWorkers, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres
) -> None:
    script = authenticator(f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}; echo user=postgres")
    workers = start_workers(script)
    with contextlib.ExitStack() as stack:
        staying = workers.client_at(stack, 0)
        old = workers.pids[1]
        away = script.rename(script.with_name("away"))
        workers.kill(1)
        assert "not found" in workers.gateway.wait_for("worker 1 cannot begin", 3)["reason"]
        staying.assert_served()
        away.rename(script)
        workers.wait_for_successor(1, old)
        workers.client_at(stack, 1).assert_served()


def test_losing_workers_again_and_again_leaves_nothing_behind(workers: Workers) -> None:
    before = workers.gateway.descriptors
    for _ in range(4):
        old = workers.pids
        for worker in old:
            workers.kill(worker)
        for worker, pid in old.items():
            workers.wait_for_successor(worker, pid)
    assert_serves(workers.port)
    assert workers.gateway.children == set(workers.pids.values())
    wait_until(lambda: workers.gateway.descriptors <= before, "descriptors to be given back")


def test_workers_that_are_killed_under_load_cost_their_own_sessions_and_nothing_hangs(
    workers: Workers, backends: Backends
) -> None:
    """A client that waits for more than its time-out fails with TimeoutError, which is not one of those expected."""
    name = f"load {workers.port}"
    before = workers.gateway.descriptors
    served, lost = itertools.count(), itertools.count()
    is_over = threading.Event()

    def go_on() -> None:
        while not is_over.is_set():
            try:
                with RawClient(workers.port) as client:
                    client.log_in(application_name=name)
                    for _ in range(3):
                        client.assert_served()
                    client.send(message(b"X"))
                    assert client.read_to_end() == b""
                next(served)
            except (EOFError, ConnectionError):
                next(lost)

    with ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(go_on) for _ in range(4)]
        try:
            for worker in (0, 1, 0, 1):
                old = workers.pids[worker]
                workers.kill(worker)
                workers.wait_for_successor(worker, old)
        finally:
            is_over.set()
        for client in clients:
            client.result()
    assert next(served) > 0
    for _ in range(10):
        assert_serves(workers.port)
    assert workers.gateway.children == set(workers.pids.values())
    assert len(workers.gateway.log_lines("worker ended")) == 4
    wait_until(lambda: workers.gateway.descriptors <= before, "descriptors to be given back")
    wait_until(lambda: not backends.named(name), "the server's sessions to end")


def test_a_supervisor_that_pauses_kills_nobody_when_it_goes_on(start_workers: StartWorkers) -> None:
    workers = start_workers(worker_timeout=0.9)
    pids = workers.pids
    with contextlib.ExitStack() as stack:
        clients = [workers.client_at(stack, worker) for worker in (0, 1)]
        workers.gateway.process.send_signal(signal.SIGSTOP)
        for client in clients:
            client.send(query("select pg_sleep(2)"))
        # Longer than the workers may be silent.
        for client in clients:
            client.read_until(b"Z")
        workers.gateway.process.send_signal(signal.SIGCONT)
        workers.gateway.process.send_signal(signal.SIGHUP)
        workers.gateway.wait_for("configuration loaded anew", 3)
        for client in clients:
            client.assert_served()
    assert workers.pids == pids
    assert not workers.gateway.log_lines("worker ended")


def test_a_worker_holds_only_its_own_sockets(workers: Workers) -> None:
    def listening(pid: int) -> set[str]:
        inodes = set()
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            words = line.split()
            if int(words[1].rpartition(":")[2], 16) == workers.port and words[3] == "0A":
                inodes.add(words[9])
        links = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
        return {inode for inode in inodes if f"socket:[{inode}]" in links}

    held = {worker: listening(pid) for worker, pid in workers.pids.items()}
    assert all(len(each) == 1 for each in held.values())
    assert held[0] != held[1]
    assert listening(workers.gateway.pid) == held[0] | held[1]


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sessions_of_all_workers_go_on_until_they_end(start_workers: StartWorkers, number: signal.Signals) -> None:
    workers = start_workers(drain_timeout=600)
    pids = workers.gateway.children
    with contextlib.ExitStack() as stack:
        clients = [workers.client_at(stack, worker) for worker in (0, 1)]
        # A terminal's signal comes to all of them.
        for pid in [workers.gateway.pid, *pids]:
            os.kill(pid, number)
        wait_until(lambda: not is_listened_on(workers.port), "nobody to listen")
        for client in clients:
            client.assert_served()
    assert workers.gateway.process.wait(WAIT_SECONDS) == 0
    assert workers.gateway.log_lines()[-1]["event"] == "ended"
    wait_until_gone(pids)


def test_a_second_signal_ends_all_at_once(start_workers: StartWorkers) -> None:
    workers = start_workers(drain_timeout="forever")
    with contextlib.ExitStack() as stack:
        clients = [workers.client_at(stack, worker) for worker in (0, 1)]
        workers.gateway.process.send_signal(signal.SIGTERM)
        workers.gateway.wait_for("shutting down", 3)
        workers.gateway.process.send_signal(signal.SIGTERM)
        for client in clients:
            assert client.read_fatal()[0] == "57P01"
    assert workers.gateway.process.wait(WAIT_SECONDS) == 0


def test_workers_drain_when_their_supervisor_is_killed(
    start_gateway: StartGateway, mapped: Path, tmp_path: Path
) -> None:
    path = tmp_path / ".s.PGSQL.5432"
    listen = ["127.0.0.1:0", f"unix:{tmp_path}:5432"]
    # The shell is what the test has to wait for; the gateway is its child.
    gateway = start_gateway(
        mapped, before=["sh", "-c", '"$@"; exit 0', "sh"], workers=2, listen=listen, drain_timeout="forever"
    )
    (supervisor,) = gateway.children
    workers = Workers(gateway)
    pids = set(workers.pids.values())
    with contextlib.ExitStack() as stack:
        clients = [workers.client_at(stack, worker) for worker in (0, 1)]
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not is_listened_on(workers.port), "nobody to listen")
        wait_until(lambda: not path.exists(), "the socket's file to be removed")
        for client in clients:
            client.assert_served()
            assert is_alive(workers.pids[workers.worker_of(client)])
    wait_until_gone(pids)


def test_a_gateway_whose_workers_cannot_begin_says_why_once(run: Run, folder: Path) -> None:
    script = folder / "broken"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    configure(folder, workers=2, authenticator={"kind": "worker", "cmd": ["./broken"]})
    done = run()
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("pgauthproxy: ")]
    assert "authenticator.cmd: ./broken: No such file or directory" in line


# Settings


def asks(workers: Workers) -> set[bytes]:
    """What many clients are asked for."""
    asked = set()
    for _ in range(MANY):
        with RawClient(workers.port) as client:
            client.send(startup())
            asked.add(client.read_message()[1][:4])
    return asked


def test_new_settings_reach_every_worker_and_the_successors(workers: Workers) -> None:
    with contextlib.ExitStack() as stack:
        sessions = [workers.client_at(stack, worker) for worker in (0, 1)]
        workers.gateway.rewrite(authenticator={"method": "cleartext"}, workers=3)
        workers.gateway.process.send_signal(signal.SIGHUP)
        for worker in (0, 1):
            workers.gateway.wait_for("configuration loaded anew", worker=worker)
        assert asks(workers) == {CLEARTEXT_REQUEST}
        lines = workers.gateway.log_lines("settings that need a restart stay as they were")
        assert [line["keys"] for line in lines] == ["workers"]
        for session in sessions:
            session.assert_served()
    # What is wrong by now is not read by the successor.
    workers.gateway.rewrite(max_clients=0)
    workers.gateway.process.send_signal(signal.SIGHUP)
    assert "max_clients" in workers.gateway.wait_for("configuration not loaded, the old one stays")["reason"]
    old = workers.pids
    workers.kill(0)
    workers.wait_for_successor(0, old[0])
    assert asks(workers) == {CLEARTEXT_REQUEST}
    assert workers.pids[1] == old[1]


def test_the_pid_file_names_the_supervisor(start_workers: StartWorkers, tmp_path: Path, run: Run) -> None:
    workers = start_workers(pid_file=str(tmp_path / "pid"))
    assert (tmp_path / "pid").read_text() == f"{workers.gateway.pid}\n"
    done = run("reload", "--config", str(workers.gateway.config))
    assert done.returncode == 0
    workers.gateway.wait_for("configuration loaded anew", 3)
    assert workers.gateway.stop() == 0
    assert not (tmp_path / "pid").exists()
