"""The authenticator that is a function in Python, plain or async: what it is given, what it may do, and what it costs
when it fails, blocks or never ends.

One file of functions serves all tests; what a function does depends on the user who logs in.
"""

from __future__ import annotations

import json
import os
import re
import signal
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway
from tests.system.conftest import (
    Run,
    assert_one_clear_line,
    assert_serves,
    configure,
    new_user,
    running_gateway,
    wait_until,
)
from tests.wire import RawClient, error_fields, message, password, raw_startup, startup

FAILED = ("58000", "authentication service failed")

FUNCTIONS = """
import asyncio, json, os, sys, threading, time
from pathlib import Path
from pgauthproxy.authenticator import Denied, Mapping, Request, authenticator

HERE = Path(__file__).parent
running, most = 0, 0
lock = threading.Lock()


def note(name, text):
    # Several threads may note the same at once.
    new = HERE / f"{name}.{threading.get_ident()}"
    new.write_text(text)
    new.rename(HERE / name)


def enter():
    global running, most
    with lock:
        running += 1
        most = max(most, running)
        note("most", str(most))


def leave():
    global running
    with lock:
        running -= 1


def asked(request):
    note("asked", json.dumps({
        "user": request.user, "database": request.database, "parameters": request.parameters,
        "address": request.address, "method": request.method, "session": request.session,
        "password": request.password, "answer": request.answer, "salt": request.salt.hex(),
        "tls": request.tls and request.tls.version,
    }))


def judge(request):
    what = request.user.partition("_")[0]
    if what == "denied":
        raise Denied("not on\\ntuesdays", told="come back\\ntomorrow")
    if what == "plainly":
        raise Denied("for a secret reason")
    if what == "raises":
        raise KeyError("hunter2")
    if what == "deeper":
        json.loads("hunter2")
    if what == "exits":
        sys.exit("hunter2")
    if what == "interrupts":
        raise KeyboardInterrupt("hunter2")
    if what == "cancels":
        raise asyncio.CancelledError("hunter2")
    if what == "nothing":
        return None
    if what == "dictionary":
        return {"password": "hunter2"}
    if what == "line":
        return Mapping("db7", "reader", password="hunter2\\n")
    if what == "hosts":
        return Mapping("hunter 2", "reader")
    if what == "verifier":
        return Mapping("db7", "reader", verifier="hunter2")
    if what == "scram":
        raise LookupError if request.password_is("hunter2") else AssertionError
    asked(request)
    return Mapping(
        os.environ["TARGET"], "postgres", database="postgres",
        parameters={"application_name": f"for {request.user}"},
    )


def plain(request):
    what = request.user.partition("_")[0]
    if what == "coroutine":
        return later(request)
    enter()
    try:
        if what == "waits":
            note("waiting-" + request.user, str(threading.get_ident()))
            while not (HERE / "go").exists():
                time.sleep(0.005)
        return judge(request)
    finally:
        leave()


async def later(request):
    what = request.user.partition("_")[0]
    enter()
    try:
        if what == "waits":
            note("waiting-" + request.user, "")
            while not (HERE / "go").exists():
                await asyncio.sleep(0.005)
        if what == "blocks":
            time.sleep(0.1)
        while what == "stubborn":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                note("ignored-" + request.user, "")
        if what == "times":
            for _ in range(3):
                try:
                    async with asyncio.timeout(0.01):
                        await asyncio.sleep(60)
                except TimeoutError:
                    pass
        return judge(request)
    except asyncio.CancelledError:
        note("cancelled-" + request.user, "")
        raise
    finally:
        leave()


class Callable:
    def __init__(self, function):
        self.function = function

    def method(self, request):
        return self.function(request)

    def __call__(self, request):
        return self.function(request)


class AsyncCallable:
    async def __call__(self, request):
        return await later(request)


decorated = authenticator(plain)
decorated_async = authenticator(later)
an_object = Callable(plain)
an_async_object = AsyncCallable()
neither = 5
"""
CALLABLES = [
    "who:plain",
    "who:later",
    "who:decorated",
    "who:decorated_async",
    "who:an_object",
    "who:an_object.method",
    "who:an_async_object",
]


@pytest.fixture(scope="module", params=["plain", "later"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres
) -> Iterator[tuple[Gateway, Path]]:
    """A gateway with either function, shared by the tests of this file, and the folder that they write to."""
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, postgres)
    settings = {"cmd": [], "callable": f"who:{request.param}", "cleartext_password": True}
    with running_gateway(folder, folder / "none", authenticator=settings) as found:
        yield found, folder


def write(folder: Path, postgres: ThrowawayPostgres) -> None:
    where = f'os.environ["TARGET"] = "127.0.0.1:{postgres.port}"\n'
    (folder / "who.py").write_text(textwrap.dedent(FUNCTIONS) + where)


@pytest.fixture
def start(start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path) -> Callable[..., Gateway]:
    """Starts a gateway with this callable; its functions write to tmp_path."""

    def start(name: str, **settings: Any) -> Gateway:
        write(tmp_path, postgres)
        return start_gateway([], authenticator={"callable": name, **settings})

    return start


def knock(port: int, user: str, answer: str = "md5" + "0" * 32) -> RawClient:
    """A client that has said everything it has to say to log in."""
    client = RawClient(port)
    client.send(startup(user=user))
    assert client.read_message()[0] == b"R"
    client.send(password(answer))
    return client


def refused(port: int, user: str, answer: str = "md5" + "0" * 32) -> tuple[str, str]:
    with knock(port, user, answer) as client:
        return client.read_fatal()


def application_name(port: int, user: str) -> str:
    """What the function has named this user's session."""
    with psycopg.connect(host="127.0.0.1", port=port, user=user, password="x", dbname="x") as connection:
        ((found,),) = connection.execute("select current_setting('application_name')").fetchall()
    return str(found)


def named(what: str) -> str:
    return f"{what}_{new_user()}"


# What it is, and what it is given


@pytest.mark.parametrize("name", CALLABLES)
def test_every_form_of_a_function_lets_clients_in_as_it_says(name: str, start: Callable[..., Gateway]) -> None:
    gateway = start(name)
    where = {"host": "127.0.0.1", "port": gateway.port, "user": "alice", "password": "x", "dbname": "shop"}
    with psycopg.connect(**where) as connection:
        (found,) = connection.execute("select current_user || ' ' || current_setting('application_name')").fetchall()
    assert found == ("postgres for alice",)
    line = gateway.wait_for("login", user="alice")
    assert (line["target_user"], line["target_database"]) == ("postgres", "postgres")


def test_it_is_given_all_that_is_known_of_the_client(gateway: tuple[Gateway, Path]) -> None:
    served, folder = gateway
    user = new_user()
    pairs = [("user", user), ("database", "a=b"), ("options", "-c x=\udcff")]
    body = "".join(f"{name}\0{value}\0" for name, value in pairs) + "\0"
    with RawClient(served.port) as client:
        client.send(raw_startup(body.encode(errors="surrogateescape")))
        assert client.read_message()[0] == b"R"
        client.send(message(b"p", b"\xff p\xc3\xa4ss\0"))
        client.read_until(b"Z")
        port = client.socket.getsockname()[1]
    assert json.loads((folder / "asked").read_text()) == {
        "user": user,
        "database": "a=b",
        "parameters": dict(pairs),
        "address": f"127.0.0.1:{port}",
        "method": "cleartext",
        "session": served.wait_for("login", user=user)["session"],
        "password": "\udcff päss",
        "answer": None,
        "salt": "00000000",
        "tls": None,
    }


def test_in_method_scram_it_gives_a_verifier_and_the_client_proves_itself(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    verifier = postgres.sql("select rolpassword from pg_authid where rolname = 'scrammed'")
    (tmp_path / "who.py").write_text(
        "from pgauthproxy.authenticator import Mapping\n"
        "def main(request):\n"
        f"    return Mapping('127.0.0.1:{postgres.port}', 'scrammed', database='postgres',\n"
        f"                   verifier={verifier!r}, credential_from_client=True)\n"
    )
    settings = {"callable": "who:main", "method": "scram-sha-256"}
    gateway = start_gateway([], authenticator=settings)
    where = {"host": "127.0.0.1", "port": gateway.port, "user": "alice", "dbname": "shop"}
    with psycopg.connect(**where, password="scram secret") as connection:
        assert connection.execute("select current_user").fetchall() == [("scrammed",)]
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(**where, password="wrong")


# Refusals and failures


def test_a_refusal_is_told_to_the_client_as_it_says_and_to_the_log_with_its_reason(
    gateway: tuple[Gateway, Path],
) -> None:
    served, _ = gateway
    user = named("denied")
    assert refused(served.port, user) == ("28P01", "come back tomorrow")
    line = served.wait_for("refused", user=user)
    assert line["reason"] == r"authenticator refused: not on\ntuesdays"
    assert (line["fault_of"], line["sqlstate"]) == ("client", "28P01")
    user = named("plainly")
    assert refused(served.port, user) == ("28P01", f'password authentication failed for user "{user}"')
    assert served.wait_for("refused", user=user)["reason"] == "authenticator refused: for a secret reason"


FAILURES = {
    "raises": r"authenticator failed: KeyError at who\.py:\d+",
    "deeper": r"authenticator failed: JSONDecodeError at decoder\.py:\d+, called from who\.py:\d+",
    "exits": r"authenticator failed: SystemExit at who\.py:\d+",
    "interrupts": r"authenticator failed: KeyboardInterrupt at who\.py:\d+",
    "cancels": r"authenticator failed: CancelledError at who\.py:\d+",
    "nothing": r"authenticator answered nonsense: NoneType was returned, not a Mapping",
    "dictionary": r"authenticator answered nonsense: dict was returned, not a Mapping",
    "line": r"authenticator failed: FieldError \(password: a line break or NUL\) at .*, called from who\.py:\d+",
    "hosts": r"authenticator answered nonsense: host names no host",
    "verifier": r"authenticator gave a _META_SOURCE_VERIFIER that method cleartext cannot use",
}


@pytest.mark.parametrize("what", FAILURES)
def test_what_goes_wrong_costs_one_login_and_is_told_without_values(what: str, gateway: tuple[Gateway, Path]) -> None:
    served, _ = gateway
    user = named(what)
    assert refused(served.port, user, "hunter2") == FAILED
    line = served.wait_for("refused", user=user)
    assert re.fullmatch(FAILURES[what], line["reason"])
    assert (line["fault_of"], line["level"]) == ("authenticator", "warning")
    with knock(served.port, new_user()) as client:
        client.read_until(b"Z")
        client.assert_served()
    assert "hunter" not in served.log.read_text()


def test_a_coroutine_from_a_plain_function_is_named_as_what_it_is(start: Callable[..., Gateway]) -> None:
    gateway = start("who:plain")
    assert refused(gateway.port, "coroutine") == FAILED
    reason = gateway.wait_for("refused", user="coroutine")["reason"]
    assert reason == "authenticator answered nonsense: coroutine was returned, not a Mapping"


def test_a_password_is_not_to_be_judged_where_none_was_asked_for(start: Callable[..., Gateway]) -> None:
    gateway = start("who:plain", method="scram-sha-256")
    with RawClient(gateway.port) as client:
        client.send(startup(user="scram"))
        assert client.read_fatal() == FAILED
    reason = gateway.wait_for("refused", user="scram")["reason"]
    assert reason.startswith("authenticator failed: NoPasswordError (scram-sha-256) at authoring.py")


# Time, and how many at once


def test_a_plain_function_that_blocks_is_given_up_and_its_thread_counted(
    start: Callable[..., Gateway], tmp_path: Path
) -> None:
    gateway = start("who:plain", timeout=0.7, max_parallel=2)
    assert refused(gateway.port, "waits_1") == FAILED
    assert gateway.wait_for("refused", user="waits_1")["reason"] == "authenticator took longer than 0.7 s"
    line = gateway.wait_for("authenticator runs on after its time-out")
    assert (line["level"], line["threads_held"]) == ("warning", "1 of 2")
    assert line["session"] == gateway.wait_for("refused", user="waits_1")["session"]
    # The other place serves.
    assert_serves(gateway.port)
    assert refused(gateway.port, "waits_2") == FAILED
    assert gateway.wait_for("authenticator runs on after its time-out", 2)["threads_held"] == "2 of 2"
    # Nobody waits for a place that nobody may give back.
    assert refused(gateway.port, "bob") == FAILED
    reason = gateway.wait_for("refused", user="bob")["reason"]
    assert reason == "authenticator is not called: 2 calls run on after their time-out"
    (tmp_path / "go").touch()
    gateway.wait_for("authenticator has ended after its time-out", 2)
    assert_serves(gateway.port)
    assert_serves(gateway.port)


def test_logins_that_wait_for_places_are_refused_once_all_are_held(start: Callable[..., Gateway]) -> None:
    gateway = start("who:plain", timeout=0.5, max_parallel=1)
    with knock(gateway.port, "waits_1") as first, knock(gateway.port, "bob") as second:
        assert first.read_fatal() == FAILED
        assert second.read_fatal() == FAILED
    assert "is not called" in gateway.wait_for("refused", user="bob")["reason"]


def test_an_async_function_that_takes_too_long_is_cancelled(start: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = start("who:later", timeout=0.7, max_parallel=1)
    for number in range(2):
        user = f"waits_{number}"
        assert refused(gateway.port, user) == FAILED
        assert gateway.wait_for("refused", user=user)["reason"] == "authenticator took longer than 0.7 s"
        wait_until((tmp_path / f"cancelled-{user}").exists, "the function to be cancelled")
    assert_serves(gateway.port)


def test_an_async_function_that_does_not_heed_being_cancelled_is_left(
    start: Callable[..., Gateway], tmp_path: Path
) -> None:
    gateway = start("who:later", timeout=0.5, grace=0.1, max_parallel=1)
    assert refused(gateway.port, "stubborn_1") == FAILED
    line = gateway.wait_for("authenticator did not heed being cancelled, and was left")
    assert line["session"] == gateway.wait_for("refused", user="stubborn_1")["session"]
    assert (tmp_path / "ignored-stubborn_1").exists()
    assert_serves(gateway.port)


def test_time_outs_of_its_own_are_an_async_functions_own_affair(start: Callable[..., Gateway]) -> None:
    gateway = start("who:later")
    assert_serves(gateway.port, "times")
    assert not gateway.log_lines("authenticator did not heed being cancelled, and was left")


def test_an_async_function_that_holds_up_the_gateway_is_reported_but_not_for_each_login(
    start: Callable[..., Gateway],
) -> None:
    gateway = start("who:later")
    assert_serves(gateway.port, "blocks_1")
    assert_serves(gateway.port, "blocks_2")
    gateway.wait_for("login", user="blocks_2")
    (line,) = gateway.log_lines("authenticator held up the gateway")
    assert line["level"] == "warning"
    assert line["milliseconds"] >= 100


def test_when_the_client_leaves_an_async_function_is_cancelled(start: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = start("who:later", max_parallel=1)
    with knock(gateway.port, "waits_1"):
        wait_until((tmp_path / "waiting-waits_1").exists, "the function to run")
    wait_until((tmp_path / "cancelled-waits_1").exists, "the function to be cancelled")
    assert "client left" in gateway.wait_for("refused", user="waits_1")["reason"]
    assert_serves(gateway.port)


def test_when_the_client_leaves_a_thread_keeps_its_place_until_it_returns(
    start: Callable[..., Gateway], tmp_path: Path
) -> None:
    gateway = start("who:plain", max_parallel=1)
    with knock(gateway.port, "waits_1"):
        wait_until((tmp_path / "waiting-waits_1").exists, "the function to run")
    assert "client left" in gateway.wait_for("refused", user="waits_1")["reason"]
    with knock(gateway.port, "bob") as waiting, knock(gateway.port, "carol") as leaving:
        leaving.socket.close()
        gateway.wait_for("refused", user="carol")
        (tmp_path / "go").touch()
        waiting.read_until(b"Z")
    assert not gateway.log_lines("authenticator runs on after its time-out")


@pytest.mark.parametrize("name", ["who:plain", "who:later"])
def test_no_more_than_max_parallel_run_at_once_and_the_others_wait(
    name: str, start: Callable[..., Gateway], tmp_path: Path
) -> None:
    gateway = start(name, max_parallel=2)
    users = [f"waits_{number}" for number in range(6)]
    clients = []
    for at, user in enumerate(users):
        clients.append(knock(gateway.port, user))
        if at < 2:
            wait_until((tmp_path / f"waiting-{user}").exists, f"{user} to be asked about")
    wait_until(lambda: gateway.sockets > len(users), "all clients to be there")
    assert not any((tmp_path / f"waiting-{user}").exists() for user in users[2:])
    (tmp_path / "go").touch()
    for client in clients:
        client.read_until(b"Z")
        client.socket.close()
    assert (tmp_path / "most").read_text() == "2"


def test_a_place_is_kept_for_nobody_who_has_left(start: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = start("who:plain", max_parallel=1)
    first = knock(gateway.port, "waits_1")
    wait_until((tmp_path / "waiting-waits_1").exists, "the function to run")
    for number in range(5):
        with knock(gateway.port, f"gone_{number}"):
            pass
        gateway.wait_for("refused", user=f"gone_{number}")
    (tmp_path / "go").touch()
    first.read_until(b"Z")
    first.socket.close()
    assert_serves(gateway.port)


@pytest.mark.parametrize(("name", "user"), [("who:plain", "waits_1"), ("who:later", "stubborn_1")])
def test_the_gateway_ends_in_order_though_a_function_never_does(
    name: str, user: str, start: Callable[..., Gateway], tmp_path: Path
) -> None:
    gateway = start(name, grace=0.1)
    with knock(gateway.port, user) as client:
        if user == "waits_1":
            wait_until((tmp_path / f"waiting-{user}").exists, "the function to run")
        else:
            wait_until(lambda: (tmp_path / "most").exists(), "the function to run")
        assert gateway.stop() == 0
        kind, body = client.read_message()
    assert (kind, error_fields(body)["C"]) == (b"E", "57P03")
    gateway.wait_for("ended")


# What cannot be started

# Loaded anew


SAYS = """
import time
from pathlib import Path
from pgauthproxy.authenticator import Mapping

HERE = Path(__file__).parent

{word} main(request):
    if request.user.startswith("waits"):
        (HERE / "waiting").touch()
        while not (HERE / "go").exists():
            time.sleep(0.005)
    return Mapping("127.0.0.1:{port}", "postgres", database="postgres", parameters={{"application_name": "{says}"}})
"""


class Reloading:
    """A gateway whose function can be written anew."""

    def __init__(self, start_gateway: StartGateway, port: int, folder: Path, name: str, **settings: Any) -> None:
        self.file = folder / f"{name.partition(':')[0].replace('.', '/')}.py"
        self.folder = self.file.parent
        self.folder.mkdir(exist_ok=True)
        self._port = port
        self.write("the first")
        self.gateway = start_gateway([], authenticator={"callable": name, **settings})

    def write(self, says: str, word: str = "def") -> None:
        self.file.write_text(SAYS.format(port=self._port, says=says, word=word))

    def reload(self, event: str = "authenticator loaded anew") -> dict[str, Any]:
        seen = len(self.gateway.log_lines(event))
        self.gateway.process.send_signal(signal.SIGHUP)
        return self.gateway.wait_for(event, seen + 1)

    def says(self, user: str | None = None) -> str:
        return application_name(self.gateway.port, user or new_user())


@pytest.fixture(params=["who:main", "package.who:main"])
def reloading(
    request: pytest.FixtureRequest, start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> Reloading:
    return Reloading(start_gateway, postgres.port, tmp_path, request.param)


def test_a_reload_runs_its_code_anew(reloading: Reloading) -> None:
    assert reloading.says() == "the first"
    for word, says in (("def", "the second one"), ("async def", "one that is async"), ("def", "a plain one again")):
        reloading.write(says, word)
        reloading.reload()
        assert reloading.says() == says


@pytest.mark.parametrize("source", ["raise ValueError('a secret')\n", "def main(request)\n", "other = 5\n", None])
def test_what_cannot_be_loaded_leaves_the_old_code_in_force(source: str | None, reloading: Reloading) -> None:
    if source is None:
        reloading.file.unlink()
    else:
        reloading.file.write_text(source)
    line = reloading.reload("authenticator not loaded, the old one stays")
    assert line["reason"].startswith("authenticator.callable: ")
    assert reloading.says() == "the first"
    reloading.write("one that is whole again")
    reloading.reload()
    assert reloading.says() == "one that is whole again"


def test_a_call_that_is_under_way_ends_with_the_code_that_it_began_with(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    reloading = Reloading(start_gateway, postgres.port, tmp_path, "who:main", max_parallel=1)
    with ThreadPoolExecutor() as logins:
        waiting = logins.submit(reloading.says, named("waits"))
        wait_until((tmp_path / "waiting").exists, "the call")
        # It has the only place, so that this one waits for it.
        second = named("second")
        behind = knock(reloading.gateway.port, second)
        reloading.write("the second one")
        reloading.reload()
        assert reloading.says() == "the second one"
        (tmp_path / "go").touch()
        assert waiting.result() == "the first"
    with behind:
        reloading.gateway.wait_for("login", user=second)


# With others


@pytest.mark.parametrize("name", ["who:plain", "who:later"])
def test_in_a_chain_its_refusal_lets_the_next_be_asked_and_its_failure_does_not(
    name: str, start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    write(tmp_path, postgres)
    (tmp_path / "others.py").write_text(SAYS.format(port=postgres.port, says="others", word="def"))
    gateway = start_gateway([], authenticator={"chain": [{"callable": name}, {"callable": "others:main"}]})
    user = new_user()
    assert application_name(gateway.port, user) == f"for {user}"
    assert application_name(gateway.port, named("denied")) == "others"
    assert refused(gateway.port, named("raises")) == FAILED


MODULES = {
    "broken": "def main(request)\n",
    "raising": "raise ValueError('no\\nluck')\n",
    "leaving": "import sys\nsys.exit('bye')\n",
    "needing": "import not_installed_at_all\n",
    "lacking": "from json import no_such_thing\n",
    "good": "def main(request): ...\nneither = 5\n",
}
BAD_CALLABLES = {
    "nowhere:main": "nowhere:main: cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
    "broken:main": "broken:main: cannot be imported: SyntaxError",
    "raising:main": "raising:main: cannot be imported: ValueError at raising.py:1",
    "leaving:main": "leaving:main: cannot be imported: SystemExit",
    "needing:main": "needing:main: cannot be imported: ModuleNotFoundError: No module named 'not_installed_at_all'",
    "lacking:main": "lacking:main: cannot be imported: ImportError: cannot import name 'no_such_thing'",
    "good:absent": "good:absent: the module good has no absent",
    "good:main.absent": "good:main.absent: the module good has no main.absent",
    "good:neither": "good:neither: int cannot be called",
    "good:": "good:: neither package.module:function nor the name of an installed authenticator",
    ":main": ":main: neither package.module:function nor the name of an installed authenticator",
    "good.main": "good.main: no installed package has an authenticator of that name",
}


@pytest.mark.parametrize("name", BAD_CALLABLES)
@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_callable_that_cannot_be_had_stops_the_start_with_one_clear_line(
    name: str, command: str, run: Run, tmp_path: Path
) -> None:
    for module, source in MODULES.items():
        (tmp_path / f"{module}.py").write_text(source)
    configure(tmp_path, authenticator={"callable": name})
    done = run(*(["check"] if command == "check" else []))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pgauthproxy: authenticator.callable: {BAD_CALLABLES[name]}")


def test_two_authenticators_are_one_too_many(run: Run, tmp_path: Path) -> None:
    configure(tmp_path, authenticator={"callable": "good:main", "cmd": ["true"]})
    assert_one_clear_line(run(), "authenticator.kind: must say which, since cmd and callable are set")


def test_the_kind_decides_between_two(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(MODULES["good"])
    configure(tmp_path, authenticator={"kind": "python", "callable": "good:main", "cmd": ["/no/such/command"]})
    done = run("check")
    assert done.returncode == 0, done.stderr
    assert "authenticator.kind = python" in done.stdout


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("command", "cmd"),
        ("worker", "cmd"),
        ("python", "callable"),
        ("http", "http.url"),
        ("users", "users.file"),
        ("chain", "chain"),
    ],
)
def test_a_kind_without_its_own_settings_is_named(kind: str, key: str, run: Run, tmp_path: Path) -> None:
    configure(tmp_path, authenticator={"kind": kind})
    assert_one_clear_line(run(), f"authenticator.kind: {kind} needs {key}")


# Installed packages


def install(folder: Path, package: str, points: str) -> None:
    """What pip leaves of a package with these entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pgauthproxy.authenticators]\n{points}\n")


def test_an_installed_package_is_used_by_its_short_name(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    installed = tmp_path / "site"
    install(installed, "company-who", "company = company_who:main")
    (installed / "company_who.py").write_text(
        "from pgauthproxy.authenticator import Mapping, authenticator\n"
        "@authenticator\n"
        "def main(request):\n"
        f"    return Mapping('127.0.0.1:{postgres.port}', 'postgres', database='postgres')\n"
    )
    variables = {**os.environ, "PYTHONPATH": str(installed)}
    gateway = start_gateway([], authenticator={"callable": "company"}, environment=variables)
    assert_serves(gateway.port)


def test_a_short_name_that_is_nearly_one_is_set_right(run: Run, tmp_path: Path) -> None:
    install(tmp_path / "site", "company-who", "company = company_who:main")
    configure(tmp_path, authenticator={"callable": "compony"})
    assert_one_clear_line(run(PYTHONPATH=str(tmp_path / "site")), "did you mean company?")


def test_a_short_name_of_two_packages_is_nobodys(run: Run, tmp_path: Path) -> None:
    install(tmp_path / "site", "company-who", "company = company_who:main")
    install(tmp_path / "site", "other-who", "company = other_who:main")
    configure(tmp_path, authenticator={"callable": "company"})
    done = run(PYTHONPATH=str(tmp_path / "site"))
    assert_one_clear_line(done, "several packages have one: company_who:main, other_who:main")


def test_a_package_that_cannot_be_imported_is_named(run: Run, tmp_path: Path) -> None:
    install(tmp_path / "site", "company-who", "company = company_who:main")
    configure(tmp_path, authenticator={"callable": "company"})
    assert_one_clear_line(run(PYTHONPATH=str(tmp_path / "site")), "company: cannot be imported: ModuleNotFoundError")
