"""Every example is run as the gateway runs it: a command for each request, and a worker for many.

They are one and the same authenticator: alice becomes reader, bob becomes writer, nobody else gets in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import StartGateway
from tests.contract import WorkerProcess, answered, request_lines, run_command
from tests.wire import RawClient, ScriptedTarget, error_fields, greet, password, startup

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPILE_SECONDS = 300
# Python is as strict about encodings as it may be where the locale is not C.
TARGET = {"TARGET_HOST": "db7:6432", "PYTHONIOENCODING": "utf-8:strict"}

Words = list[str | Path]
COMMANDS = ["two_roles.py", "two_roles_typed.py", "two_roles.sh", "two_roles.go", "two_roles.mjs"]
WORKERS = ["two_roles_typed.py", "two_roles_worker.sh", "two_roles.go", "two_roles.mjs"]
FOR_CLEARTEXT = ["two_roles_typed.py", "two_roles.go", "two_roles.mjs"]


def needed(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles an example in Go, once."""
    folder = tmp_path_factory.mktemp("go")

    def compile_it(name: str) -> Path:
        program = folder / name.removesuffix(".go")
        if not program.exists():
            go = needed("go")
            command = [go, "build", "-o", str(program), str(EXAMPLES / name)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
            assert done.returncode == 0, done.stderr
        return program

    return compile_it


@pytest.fixture
def example(request: pytest.FixtureRequest, compiled: Callable[[str], Path]) -> Words:
    """The words that start the example of this name."""
    name = request.param
    file = EXAMPLES / name
    match file.suffix:
        case ".py":
            return [sys.executable, file]
        case ".sh":
            return ["sh", file]
        case ".mjs":
            return [needed("node"), file]
        case _:
            return [compiled(name)]


def lets_in(output: bytes, user: str, role: str, database: str) -> None:
    assert answered(output) == {
        b"_META_TARGET_HOST": b"db7:6432",
        b"_META_TARGET_PASSWORD": f"{role}'s secret".encode(),
        b"user": role.encode(),
        b"database": database.encode(),
        b"application_name": f"gateway:{user}".encode(),
    }


@pytest.mark.parametrize("example", COMMANDS, indirect=True)
@pytest.mark.parametrize(
    ("user", "password", "role"), [("alice", "wonderland", "reader"), ("bob", "builder", "writer")]
)
def test_as_a_command_it_maps_each_to_a_role_of_their_own(example: Words, user: str, password: str, role: str) -> None:
    done = run_command(example, request_lines(user, password, database="a=b", options="-c a=b"), TARGET)
    assert (done.returncode, done.stderr) == (0, b"")
    lets_in(done.stdout, user, role, "a=b")


@pytest.mark.parametrize("example", COMMANDS, indirect=True)
def test_as_a_command_it_takes_the_users_name_where_no_database_is_asked_for(example: Words) -> None:
    done = run_command(example, request_lines("alice", "wonderland"), TARGET)
    assert done.returncode == 0
    lets_in(done.stdout, "alice", "reader", "alice")


@pytest.mark.parametrize("example", COMMANDS, indirect=True)
@pytest.mark.parametrize(
    ("user", "password"), [("alice", "builder"), ("mallory", "wonderland"), ("mallory", ""), ("alice", "")]
)
def test_as_a_command_it_refuses_all_others(example: Words, user: str, password: str) -> None:
    done = run_command(example, request_lines(user, password, database="demo"), TARGET)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize("example", FOR_CLEARTEXT, indirect=True)
def test_as_a_command_it_takes_a_password_as_typed(example: Words) -> None:
    done = run_command(example, request_lines("bob", "builder", method="cleartext"), TARGET)
    assert done.returncode == 0
    lets_in(done.stdout, "bob", "writer", "bob")
    assert run_command(example, request_lines("bob", "wonderland", method="cleartext"), TARGET).returncode == 1


@pytest.mark.parametrize("example", WORKERS, indirect=True)
def test_as_a_worker_it_answers_one_after_the_other_and_nothing_of_one_is_left_for_the_next(
    example: Words, tmp_path: Path
) -> None:
    with WorkerProcess(example, tmp_path / "errors", TARGET) as worker:
        for _ in range(3):
            lets_in(worker.ask(request_lines("alice", "wonderland", database="shop")), "alice", "reader", "shop")
            assert worker.ask(request_lines("alice", "builder", database="shop")) == b""
            assert worker.ask(request_lines("mallory", "wonderland")) == b""
            lets_in(worker.ask(request_lines("bob", "builder")), "bob", "writer", "bob")


@pytest.mark.parametrize("example", WORKERS, indirect=True)
def test_as_a_worker_it_takes_a_request_in_pieces_and_several_at_once(example: Words, tmp_path: Path) -> None:
    lines = request_lines("alice", "wonderland", database="shop") + b"\n"
    with WorkerProcess(example, tmp_path / "errors", TARGET) as worker:
        for at in range(0, len(lines), 11):
            worker.requests.write(lines[at : at + 11])
        lets_in(worker.read_answer(), "alice", "reader", "shop")
        worker.requests.write(lines + lines)
        worker.requests.close()
        whole = worker.answers.read()
        while chunk := worker.answers.read():
            whole += chunk
        first, second, rest = whole.split(b"\n\n")
        assert (first, rest) == (second, b"")
        lets_in(first, "alice", "reader", "shop")


@pytest.mark.parametrize("example", FOR_CLEARTEXT, indirect=True)
def test_as_a_worker_it_takes_a_password_as_typed(example: Words, tmp_path: Path) -> None:
    with WorkerProcess(example, tmp_path / "errors", TARGET) as worker:
        asked = request_lines("bob", "builder", method="cleartext")
        lets_in(worker.ask(asked), "bob", "writer", "bob")
        assert worker.ask(request_lines("bob", "wonderland", method="cleartext")) == b""


@pytest.mark.parametrize("example", COMMANDS, indirect=True)
def test_a_user_and_database_that_are_no_utf8_are_refused_and_break_nothing(example: Words) -> None:
    odd = b"\xff\xfe".decode(errors="surrogateescape")
    lines = request_lines("nobody", "wonderland", database=odd).replace(b"user=nobody", b"user=\xff\x80")
    done = run_command(example, lines, TARGET)
    assert (done.returncode, done.stdout) == (1, b"")
    lines = request_lines("alice", "wonderland", database=odd)
    lets = run_command(example, lines, TARGET)
    assert lets.returncode == 0
    assert answered(lets.stdout)[b"database"] == b"\xff\xfe"


def test_gofmt_changes_nothing() -> None:
    done = subprocess.run(
        [needed("gofmt"), "-l", *EXAMPLES.glob("*.go")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("example", WORKERS, indirect=True)
def test_as_a_worker_it_serves_behind_a_gateway(example: Words, start_gateway: StartGateway) -> None:
    with ScriptedTarget(greet) as target:
        variables = {**os.environ, **TARGET, "TARGET_HOST": f"127.0.0.1:{target.port}"}
        settings = {"kind": "worker", "workers": {"min": 1, "max": 1}}
        gateway = start_gateway([str(word) for word in example], environment=variables, authenticator=settings)
        for _ in range(2):
            for user, secret, role in (("alice", "wonderland", "reader"), ("bob", "builder", "writer")):
                seen = len(gateway.log_lines("login"))
                assert log_in(gateway.port, user, secret)[0] == b"R"
                assert gateway.wait_for("login", seen + 1)["target_user"] == role
            assert error_fields(log_in(gateway.port, "alice", "builder")[1])["C"] == "28P01"
        assert len(gateway.children) == 1


def log_in(port: int, user: str, secret: str) -> tuple[bytes, bytes]:
    """The gateway's answer to a user's password."""
    with RawClient(port) as client:
        client.send(startup(user=user))
        kind, salt = client.read_message()
        assert (kind, salt[:4]) == (b"R", b"\0\0\0\x05")
        client.send(password(md5_answer(md5_password(secret.encode(), user.encode()), salt[4:]).decode()))
        return client.read_message()


@pytest.mark.parametrize("kind", ["command", "worker", "callable"])
def test_the_typed_one_serves_behind_a_gateway(
    kind: str, start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    role = f"reader_{kind}"
    postgres.sql(f"create role {role} login password 'reader''s secret'")
    source = (EXAMPLES / "two_roles_typed.py").read_text().replace('("reader",', f'("{role}",')
    assert role in source
    script = tmp_path / "two_roles_typed.py"
    script.write_text(source)
    variables = {**os.environ, "TARGET_HOST": f"127.0.0.1:{postgres.port}"}
    cmd = [] if kind == "callable" else [sys.executable, str(script)]
    settings = {"callable": "two_roles_typed:main"} if kind == "callable" else {"kind": kind}
    gateway = start_gateway(cmd, environment=variables, authenticator=settings)
    where = {"host": "127.0.0.1", "port": gateway.port, "user": "alice", "dbname": "postgres"}
    with psycopg.connect(**where, password="wonderland") as connection:
        (found,) = connection.execute("select current_user || current_setting('application_name')").fetchall()
    assert found == (f"{role}gateway:alice",)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(**where, password="wrong")


def test_the_service_serves_behind_a_gateway(start_gateway: StartGateway, postgres: ThrowawayPostgres) -> None:
    postgres.sql("create role writer login password 'writer''s secret'")
    variables = {**os.environ, "TARGET_HOST": f"127.0.0.1:{postgres.port}"}
    words = [sys.executable, str(EXAMPLES / "two_roles_http.py"), "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=variables, text=True) as service:
        assert service.stdout is not None
        url = service.stdout.readline().split()[-1]
        try:
            for method in ("md5", "cleartext"):
                gateway = start_gateway([], authenticator={"http": {"url": url}, "method": method})
                where = {"host": "127.0.0.1", "port": gateway.port, "user": "bob", "dbname": "postgres"}
                with psycopg.connect(**where, password="builder") as connection:
                    (found,) = connection.execute(
                        "select current_user || current_setting('application_name')"
                    ).fetchall()
                assert found == ("writergateway:bob",)
                for user, password in (("bob", "wrong"), ("mallory", "builder")):
                    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                        psycopg.connect(**where | {"user": user}, password=password)
        finally:
            service.terminate()
