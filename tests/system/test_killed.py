"""kill -9 and SIGSTOP of processes while clients come and go: others go on, and nothing is left of what was lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pgauthproxy.throwaway import ThrowawayError, ThrowawayPostgres
from tests.conftest import Gateway, StartGateway, children_of, is_alive
from tests.system.conftest import Backends, assert_serves, wait_until
from tests.wire import RawClient, error_fields, message, password, startup

KILLS = 10
CLIENTS = 4
PARALLEL = 2
"""Authenticators that run at once."""
NO_ANSWER = {"58000", "28P01"}
"""What a login is told whose authenticator is killed: a command that dies of a signal has refused."""
WORKER = "while read -r line; do [ -n \"$line\" ] || printf '{answer}\\n'; done"
COMMAND = "cat >/dev/null; sleep 0.05; printf '{answer}'"
by_kind = pytest.mark.parametrize("kind", ["command", "worker"])
by_workers = pytest.mark.parametrize("workers", [1, 2])


class Load:
    """Clients that log in, are served and leave, again and again, until the block ends.

    A client that waits for more than its time-out fails with TimeoutError, which is not one of those expected.
    """

    def __init__(self, port: int, may_be_told: set[str], user: str) -> None:
        self._port = port
        self._may_be_told = may_be_told
        self._user = user
        self._is_over = threading.Event()
        self._served = itertools.count()
        self.served = 0

    def __enter__(self) -> Load:
        self._threads = ThreadPoolExecutor(CLIENTS)
        self._clients = [self._threads.submit(self._go_on) for _ in range(CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._threads.shutdown()
        for client in self._clients:
            client.result()

    def wait_for_more(self) -> None:
        """Returns when somebody has been served who was not before."""
        known = self.served
        wait_until(lambda: self.served > known + CLIENTS or self._failed(), "clients to be served")

    def _failed(self) -> bool:
        return any(client.done() for client in self._clients)

    def _go_on(self) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(EOFError, ConnectionError), RawClient(self._port) as client:
                client.send(startup(user=self._user) + password())
                while (said := client.read_message())[0] not in (b"Z", b"E"):
                    continue
                if said[0] == b"E":
                    assert error_fields(said[1])["C"] in self._may_be_told, said
                    continue
                for _ in range(3):
                    client.assert_served()
                client.send(message(b"X"))
                client.read_to_end()
                self.served = next(self._served)


class Victims:
    """A gateway whose processes are known."""

    def __init__(self, gateway: Gateway, name: str) -> None:
        self.gateway = gateway
        self.name = name

    @property
    def serving(self) -> set[int]:
        """The processes of the gateway that serve."""
        return {line["pid"] for line in self.gateway.log_lines("worker ready")} or {self.gateway.pid}

    @property
    def authenticators(self) -> list[int]:
        """The processes of its authenticator that run."""
        return sorted(filter(is_alive, set().union(*map(children_of, self.serving))))

    def warm_up(self, *users: str) -> None:
        """Whatever is made once is there then: threads, and processes of the authenticator."""
        for user in users or ("alice",):
            with Load(self.gateway.port, set(), user) as load:
                for _ in range(3 * len(self.serving)):
                    load.wait_for_more()

    @property
    def descriptors(self) -> dict[int, int]:
        """How many each of the gateway's own processes has open."""
        return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in self.serving | {self.gateway.pid}}

    def has_no_more_than(self, before: dict[int, int]) -> bool:
        return all(count <= before[pid] for pid, count in self.descriptors.items())


StartVictims = Callable[..., Victims]


@pytest.fixture
def start_victims(start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path) -> StartVictims:
    """Starts a gateway before `postgres`; the target has its sessions by a name of their own."""

    def start(kind: str, body: str = "", **settings: Any) -> Victims:
        name = f"killed {uuid.uuid4().hex[:8]}"
        answer = f"_META_TARGET_HOST=127.0.0.1:{postgres.port}\\nuser=postgres\\napplication_name={name}\\n"
        script = tmp_path / "authenticator"
        script.write_text("#!/bin/sh\n" + (body or {"worker": WORKER, "command": COMMAND}[kind]).format(answer=answer))
        script.chmod(0o755)
        bounds = {"max_parallel": PARALLEL, "workers": {"min": PARALLEL, "max": PARALLEL}}
        wanted = {"kind": kind, **bounds, **settings.pop("authenticator", {})}
        return Victims(start_gateway(script, authenticator=wanted, **settings), name)

    return start


@contextlib.contextmanager
def sessions_at_each(victims: Victims, count: int) -> Iterator[list[RawClient]]:
    """Clients that are in and stay."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(victims.gateway.port)) for _ in range(count)]
        for client in clients:
            client.log_in()
        yield clients


def is_served(port: int) -> bool:
    """Whether a login is answered, and not refused."""
    try:
        assert_serves(port)
    except EOFError:
        return False
    return True


@by_workers
@by_kind
def test_an_authenticator_that_is_killed_again_and_again_costs_the_login_in_its_hands(
    start_victims: StartVictims, backends: Backends, kind: str, workers: int
) -> None:
    victims = start_victims(kind, workers=workers)
    chance = random.Random(f"{kind} {workers}")
    victims.warm_up()
    serving, before = victims.serving, victims.descriptors
    standing = len(victims.authenticators)
    with sessions_at_each(victims, 4) as staying, Load(victims.gateway.port, NO_ANSWER, "alice") as load:
        for _ in range(KILLS):
            load.wait_for_more()
            wait_until(lambda: victims.authenticators, "one to kill")
            # It may have come to its end meanwhile.
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(chance.choice(victims.authenticators), signal.SIGKILL)
            for client in staying:
                client.assert_served()
        load.wait_for_more()
    assert victims.serving == serving
    # The worker that it reaches may not have noticed yet that its authenticator was the last to be killed.
    wait_until(lambda: is_served(victims.gateway.port), "logins to be answered again")
    wait_until(lambda: len(victims.authenticators) == standing, "as many processes as before")
    wait_until(lambda: victims.has_no_more_than(before), "descriptors to be given back")
    wait_until(lambda: not backends.named(victims.name), "the server's sessions to end")


@by_kind
def test_a_gateway_that_is_killed_under_load_leaves_no_process_and_its_successor_finds_its_place(
    start_victims: StartVictims, backends: Backends, kind: str, tmp_path: Path
) -> None:
    files = [tmp_path / ".s.PGSQL.5432", tmp_path / "admin.sock", tmp_path / "pid"]
    settings: dict[str, Any] = {
        "listen": ["127.0.0.1:0", f"unix:{tmp_path}:5432"],
        "admin": {"listen": f"unix:{files[1]}"},
        "pid_file": str(files[2]),
    }
    for _ in range(3):
        # The shell is what the test has to wait for; the gateway is its child.
        victims = start_victims(kind, before=["sh", "-c", '"$@"; exit 0', "sh"], **settings)
        (killed,) = victims.gateway.children
        with sessions_at_each(victims, 4) as staying, Load(victims.gateway.port, set(), "alice") as load:
            load.wait_for_more()
            family = victims.gateway.family - {victims.gateway.pid}
            os.kill(killed, signal.SIGKILL)
            for client in staying:
                assert client.read_to_end() == b""
            wait_until(lambda: not any(map(is_alive, family)), "all its processes to be gone")  # noqa: B023
        wait_until(lambda: not backends.named(victims.name), "the server's sessions to end")  # noqa: B023
    assert all(file.exists() for file in files)
    successor = start_victims(kind, **settings).gateway
    assert_serves(successor.port)
    with RawClient.of_folder(tmp_path, 5432) as client:
        client.log_in()
        client.assert_served()
    assert successor.stop() == 0
    assert not any(file.exists() for file in files)


def backends_of(server: ThrowawayPostgres) -> list[int]:
    """Processes that serve the sessions of a test; none while it begins again."""
    try:
        found = server.sql("select pid from pg_stat_activity where application_name = 'fragile'")
    except ThrowawayError:
        return []
    return sorted(map(int, found.split()))


@by_workers
def test_a_target_whose_processes_are_killed_costs_its_own_sessions(
    start_victims: StartVictims, postgres: ThrowawayPostgres, workers: int
) -> None:
    """A server that loses a process that way ends all others, and begins again."""
    chance = random.Random(workers)
    with ThrowawayPostgres(settings={"max_connections": "50"}) as fragile:
        body = (
            f"port={postgres.port}\ngrep -q '^user=fragile$' && port={fragile.port}\n"
            'printf "_META_TARGET_HOST=127.0.0.1:$port\\nuser=postgres\\napplication_name=fragile\\n"'
        )
        victims = start_victims("command", body, workers=workers)
        victims.warm_up("alice", "fragile")
        before = victims.descriptors
        told = {"57P03", "08001", "08006"}
        with sessions_at_each(victims, 4) as staying, Load(victims.gateway.port, told, "fragile") as load:
            for _ in range(3):
                load.wait_for_more()
                wait_until(lambda: backends_of(fragile), "the server to be there")
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(chance.choice(backends_of(fragile)), signal.SIGKILL)
                for client in staying:
                    client.assert_served()
            load.wait_for_more()
        assert_serves(victims.gateway.port, "fragile")
        wait_until(lambda: victims.has_no_more_than(before), "descriptors to be given back")


@by_kind
def test_an_authenticator_that_is_stopped_is_ended_in_its_time_and_others_go_on(
    start_victims: StartVictims, kind: str
) -> None:
    victims = start_victims(kind, authenticator={"timeout": 1, "grace": 0.2})
    victims.warm_up()
    before, standing = victims.descriptors, len(victims.authenticators)
    with sessions_at_each(victims, 2) as staying, Load(victims.gateway.port, NO_ANSWER, "alice") as load:
        stopped = set()
        for _ in range(3):
            wait_until(lambda: set(victims.authenticators) - stopped, "one to stop")
            # It may have come to its end meanwhile.
            with contextlib.suppress(ProcessLookupError, KeyError):
                pid = (set(victims.authenticators) - stopped).pop()
                os.kill(pid, signal.SIGSTOP)
                stopped.add(pid)
            for client in staying:
                client.assert_served()
            load.wait_for_more()
        wait_until(lambda: not any(map(is_alive, stopped)), "those that were stopped to be gone")
    wait_until(lambda: len(victims.authenticators) == standing, "as many processes as before")
    wait_until(lambda: victims.has_no_more_than(before), "descriptors to be given back")
