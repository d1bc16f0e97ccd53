"""`pgauthproxy hash-password`: PostgreSQL takes what it prints for a role's password, the gateway for a verifier."""

from __future__ import annotations

import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS
from tests.system.conftest import MODULE, Terminal, answering_gateway, environment
from tests.tls import HOST

COMMAND = [*MODULE, "hash-password"]
SECRET = "a secret"
SCRAM = re.compile(r"SCRAM-SHA-256\$(\d+):([A-Za-z0-9+/=]{24})\$([A-Za-z0-9+/]{43}=):([A-Za-z0-9+/]{43}=)\n")


def hashed(given: bytes, *arguments: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    """Runs it with this on its standard input."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=given,
        capture_output=True,
        timeout=WAIT_SECONDS,
        env=environment | more,
        check=False,
    )


def verifier_of(given: bytes, *arguments: str) -> str:
    done = hashed(given, *arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    assert SCRAM.fullmatch(done.stdout.decode())
    return done.stdout.decode().strip()


@dataclass
class Role:
    """A role without a password, in a server that asks for one."""

    server: ThrowawayPostgres
    name: str

    @property
    def stored(self) -> str:
        return self.server.sql(f"select rolpassword from pg_authid where rolname = '{self.name}'")

    def takes(self, stored: str) -> None:
        """The server must store it as it is."""
        self.server.sql(f"alter role {self.name} password '{stored}'")
        assert self.stored == stored

    def lets_in(self, secret: str) -> bool:
        where = {"host": HOST, "port": str(self.server.port), "user": self.name, "dbname": "postgres"}
        try:
            session = psycopg.connect(**where, password=secret, require_auth="scram-sha-256")  # type: ignore[arg-type]
        except psycopg.OperationalError as error:
            if "password authentication failed" not in str(error):
                raise
            return False
        with session:
            return session.execute("select current_user::text").fetchone() == (self.name,)


@pytest.fixture
def role(postgres: ThrowawayPostgres) -> Iterator[Role]:
    name = f"role_{uuid.uuid4().hex[:12]}"
    postgres.sql(f"create role {name} login")
    yield Role(postgres, name)
    postgres.sql(f"drop role {name}")


# What PostgreSQL makes of it


@pytest.mark.parametrize(
    "secret",
    [
        SECRET,
        " spaces ",
        "quote ' and \" and $",
        "zoë",
        "ⅸ¨Á\u00a0x",
        "soft\u00adhyphen",
        "\u00aa",
        "💣 not assigned \U000e0080",
        "\u0627\u0031",
        "x" * 500,
        "md5" + "0" * 32,
        "SCRAM-SHA-256$4096:c2FsdA==$x:y",
        "\\n",
        "tab\there",
    ],
)
def test_the_verifier_of_a_password_lets_that_password_in_and_no_other(role: Role, secret: str) -> None:
    role.takes(verifier_of(secret.encode() + b"\n"))
    assert role.lets_in(secret)
    assert not role.lets_in(secret + "x")
    assert not role.lets_in(SECRET + "y")


def test_a_password_that_is_no_utf8_is_taken_as_it_is(role: Role) -> None:
    role.takes(verifier_of(b"z\xf6e\n"))
    server, name = role.server, role.name
    done = subprocess.run(
        [server.binaries / "psql", "-XAtc", "select 42", f"host={HOST} port={server.port} user={name} dbname=postgres"],
        capture_output=True,
        env=os.environb | {b"PGPASSWORD": b"z\xf6e"},
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"42\n"), done.stderr


@pytest.mark.parametrize("iterations", [1, 4096, 20_000])
def test_the_number_of_iterations_may_be_chosen(role: Role, iterations: int) -> None:
    verifier = verifier_of(b"a secret\n", "--iterations", str(iterations))
    assert verifier.startswith(f"SCRAM-SHA-256${iterations}:")
    role.takes(verifier)
    assert role.lets_in(SECRET)


def test_iterations_are_as_many_as_postgresql_has(postgres: ThrowawayPostgres) -> None:
    assert verifier_of(b"x\n").split("$")[1].split(":")[0] == postgres.sql("show scram_iterations")


def test_no_verifier_is_like_another() -> None:
    assert verifier_of(b"a secret\n") != verifier_of(b"a secret\n")


def test_md5_is_what_postgresql_makes(role: Role) -> None:
    done = hashed(b"a secret\n", "--md5", "--user", role.name)
    assert (done.returncode, done.stderr) == (0, b"")
    printed = done.stdout.decode().strip()
    role.takes(printed)
    role.server.sql(f"set password_encryption = 'md5'; alter role {role.name} password 'a secret'")
    assert role.stored == printed


def test_what_it_prints_serves_as_a_verifier_of_the_gateway(
    tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres
) -> None:
    for method, arguments in (("scram-sha-256", []), ("md5", ["--md5", "--user", "alice"])):
        printed = hashed(b"a secret\n", *arguments).stdout.decode().strip()
        lines = {"_META_TARGET_HOST": f"{HOST}:{postgres.port}", "user": "trusted", "database": "postgres"}
        with answering_gateway(tmp_path_factory.mktemp(method), authenticator={"method": method}) as answering:
            answering.user(lines | {"_META_SOURCE_VERIFIER": printed}, "alice")
            where = {"host": HOST, "port": str(answering.gateway.port), "user": "alice", "dbname": "postgres"}
            with psycopg.connect(**where, password=SECRET) as session:  # type: ignore[arg-type]
                assert session.execute("select current_user::text").fetchone() == ("trusted",)
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                psycopg.connect(**where, password="wrong")  # type: ignore[arg-type]


# What it reads


@pytest.mark.parametrize("given", [b"a secret\n", b"a secret", b"a secret\r\n", b"a secret\nanother line\n"])
def test_the_password_is_the_first_line_of_its_input(role: Role, given: bytes) -> None:
    role.takes(verifier_of(given))
    assert role.lets_in(SECRET)


@pytest.mark.parametrize("given", [b"", b"\n", b"\r\n", b"\nsecond line\n"])
def test_an_empty_password_is_refused(given: bytes) -> None:
    done = hashed(given)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"empty password" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--md5"], b"--user"),
        (["--iterations", "0"], b"--iterations"),
        (["--iterations", "many"], b"--iterations"),
        (["--no-such-flag"], b"--no-such-flag"),
        (["a secret"], b"unexpected extra argument"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_usage(arguments: list[str], says: bytes) -> None:
    done = hashed(b"a secret\n", *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert says in done.stderr
    assert b"Usage: " in done.stderr


def test_it_needs_no_settings(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("empty")
    (folder / "pgauthproxy.yaml").write_text("no: such: thing\n")
    done = subprocess.run(
        COMMAND, input=b"x\n", capture_output=True, cwd=folder, timeout=WAIT_SECONDS, env=environment, check=False
    )
    assert done.returncode == 0
    assert SCRAM.fullmatch(done.stdout.decode())


# At a terminal


def test_at_a_terminal_the_password_is_asked_for_twice_and_not_shown(role: Role) -> None:
    with Terminal("hash-password") as terminal:
        terminal.wait_for(b"Password")
        terminal.type(b"a secret\n")
        terminal.wait_for(b"confirmation: ")
        terminal.type(b"a secret\n")
        status, printed = terminal.finish()
    assert status == 0
    assert b"secret" not in terminal.shown
    assert SCRAM.fullmatch(printed.decode())
    role.takes(printed.decode().strip())
    assert role.lets_in(SECRET)


def test_at_a_terminal_two_that_differ_are_asked_for_again() -> None:
    with Terminal("hash-password") as terminal:
        for count, (once, twice) in enumerate([(b"first\n", b"second\n"), (b"third\n", b"third\n")], 1):
            terminal.wait_for(b"Password: ", count)
            terminal.type(once)
            terminal.wait_for(b"confirmation: ", count)
            terminal.type(twice)
        status, printed = terminal.finish()
    assert status == 0
    assert SCRAM.fullmatch(printed.decode())
    for typed in (b"first", b"second", b"third"):
        assert typed not in terminal.shown
    assert b"do not match" in terminal.shown


def test_at_a_terminal_it_can_be_broken_off() -> None:
    with Terminal("hash-password") as terminal:
        terminal.wait_for(b"Password")
        terminal.type(b"half a sec\x03")
        status, printed = terminal.finish()
    assert status != 0
    assert printed == b""
    assert b"Traceback" not in terminal.shown
    assert b"half" not in terminal.shown
