"""The drivers and programs that people use, each through the gateway, in both password modes."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pg8000.dbapi
import pg8000.exceptions
import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway
from tests.system.conftest import PASSWORD, Backends, wait_until

SECONDS = 30
TOGETHER = 8
ROWS = 5000
ENDLESS = "select pg_sleep(30)"


def fresh(prefix: str = "t") -> str:
    """A name that no other test has."""
    return f"{prefix}_{uuid.uuid4().hex[:12]}"


@pytest.fixture
def table(postgres: ThrowawayPostgres) -> Iterator[str]:
    """An empty table with the columns id and name."""
    name = fresh()
    postgres.sql(f"create table {name} (id int primary key, name text)")
    yield name
    postgres.sql(f"drop table {name}")


# psycopg 3, on libpq


def psycopg_connect(gateway: Gateway, **more: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(
        host="127.0.0.1",
        port=gateway.port,
        user="alice",
        password=PASSWORD,
        dbname="postgres",
        connect_timeout=10,
        **more,
    )


@pytest.fixture
def psycopg_session(either_gateway: Gateway) -> Iterator[psycopg.Connection[Any]]:
    with psycopg_connect(either_gateway, autocommit=True) as session:
        yield session


def test_psycopg_is_let_in_as_the_mapped_role(psycopg_session: psycopg.Connection[Any]) -> None:
    assert psycopg.pq.version() >= 180000
    assert psycopg_session.execute("select current_user, %s::int", [7]).fetchone() == ("postgres", 7)
    assert psycopg_session.info.parameter_status("server_version") is not None


def test_psycopg_refused_is_told_what_postgresql_would_say(either_gateway: Gateway) -> None:
    with pytest.raises(psycopg.OperationalError, match='password authentication failed for user "mallory"'):
        psycopg.connect(host="127.0.0.1", port=either_gateway.port, user="mallory", password=PASSWORD)


def test_psycopg_reads_and_writes_binary_values(psycopg_session: psycopg.Connection[Any]) -> None:
    blob = bytes(range(256)) * 400
    row = psycopg_session.execute("select %b::bytea, %b::text", [blob, "grüße"], binary=True).fetchone()
    assert row == (blob, "grüße")


def test_psycopg_runs_a_prepared_statement_many_times(psycopg_session: psycopg.Connection[Any]) -> None:
    seen = [psycopg_session.execute("select %s + 1", [number], prepare=True).fetchone() for number in range(50)]
    assert seen == [(number + 1,) for number in range(50)]
    assert psycopg_session.execute("select count(*) from pg_prepared_statements").fetchone() == (1,)


def test_psycopg_copies_in_and_out(psycopg_session: psycopg.Connection[Any], table: str) -> None:
    cursor = psycopg_session.cursor()
    with cursor.copy(f"copy {table} from stdin") as copy_in:
        for number in range(ROWS):
            copy_in.write_row((number, f"name {number}"))
    with cursor.copy(f"copy (select * from {table} order by id) to stdout") as copy_out:
        copy_out.set_types(["int4", "text"])
        assert list(copy_out.rows()) == [(number, f"name {number}") for number in range(ROWS)]


@pytest.mark.parametrize("how", ["cancel", "cancel_safe"])
def test_psycopg_cancels_a_query_and_goes_on(
    psycopg_session: psycopg.Connection[Any], backends: Backends, how: str
) -> None:
    pid = psycopg_session.execute("select pg_backend_pid()").fetchone()[0]  # type: ignore[index]

    def cancel_once_it_sleeps() -> None:
        wait_until(lambda: backends.sleeps(pid), "the query to begin")
        getattr(psycopg_session, how)()

    canceller = threading.Thread(target=cancel_once_it_sleeps)
    canceller.start()
    try:
        with pytest.raises(psycopg.errors.QueryCanceled):
            psycopg_session.execute(ENDLESS)
    finally:
        canceller.join(SECONDS)
    assert psycopg_session.execute("select 1").fetchone() == (1,)


def test_psycopg_goes_on_after_an_error(psycopg_session: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        psycopg_session.execute("select 1/0")
    with pytest.raises(psycopg.errors.SyntaxError):
        psycopg_session.execute("selekt")
    assert psycopg_session.execute("select 1").fetchone() == (1,)


def test_psycopg_hears_what_another_session_notifies(
    psycopg_session: psycopg.Connection[Any], either_gateway: Gateway
) -> None:
    channel = fresh("channel")
    psycopg_session.execute(f"listen {channel}")
    with psycopg_connect(either_gateway, autocommit=True) as other:
        other.execute("select pg_notify(%s, 'hello')", [channel])
    heard = next(psycopg_session.notifies(timeout=SECONDS, stop_after=1))
    assert (heard.channel, heard.payload) == (channel, "hello")


def test_psycopg_pipelines(psycopg_session: psycopg.Connection[Any], table: str) -> None:
    cursor = psycopg_session.cursor()
    with psycopg_session.pipeline():
        for number in range(1000):
            cursor.execute(f"insert into {table} values (%s, %s)", [number, "x"])
        counted = psycopg_session.execute(f"select count(*) from {table}")
    assert counted.fetchone() == (1000,)


def test_psycopg_pipeline_with_an_error_in_it_ends_in_order(psycopg_session: psycopg.Connection[Any]) -> None:
    answers: list[psycopg.Cursor[Any]] = []

    def pipeline() -> None:
        with psycopg_session.pipeline() as sent:
            answers.append(psycopg_session.execute("select 1"))
            sent.sync()
            psycopg_session.execute("select 1/0")
            psycopg_session.execute("select 2")

    with pytest.raises(psycopg.errors.DivisionByZero):
        pipeline()
    assert answers[0].fetchone() == (1,)
    assert psycopg_session.execute("select 3").fetchone() == (3,)


def test_psycopg_transactions_commit_and_roll_back(either_gateway: Gateway, table: str) -> None:
    with psycopg_connect(either_gateway) as session:
        with session.transaction():
            session.execute(f"insert into {table} values (1, 'kept')")
            with pytest.raises(psycopg.errors.UniqueViolation), session.transaction():
                session.execute(f"insert into {table} values (1, 'twice')")
        session.execute(f"insert into {table} values (2, 'lost')")
        session.rollback()
        assert session.execute(f"select * from {table}").fetchall() == [(1, "kept")]


def test_psycopg_prepares_a_transaction_for_two_phases(either_gateway: Gateway, table: str) -> None:
    with psycopg_connect(either_gateway) as session:
        session.tpc_begin(session.xid(1, fresh("gtrid"), "bqual"))
        session.execute(f"insert into {table} values (1, 'kept')")
        session.tpc_prepare()
        session.tpc_commit()
        assert session.execute(f"select count(*) from {table}").fetchone() == (1,)


def test_psycopg_sends_a_server_side_cursor_in_pieces(either_gateway: Gateway) -> None:
    with psycopg_connect(either_gateway) as session, session.cursor("scroll") as cursor:
        cursor.itersize = 100
        cursor.execute("select generate_series(1, 1000)")
        assert sum(row[0] for row in cursor) == 500500


def test_several_psycopg_sessions_work_at_once(either_gateway: Gateway) -> None:
    def work(number: int) -> int:
        with psycopg_connect(either_gateway) as session:
            total: int = sum(
                session.execute("select %s * %s", [number, step]).fetchone()[0]  # type: ignore[index]
                for step in range(50)
            )
            return total

    with ThreadPoolExecutor(TOGETHER) as threads:
        assert list(threads.map(work, range(TOGETHER))) == [number * 1225 for number in range(TOGETHER)]


def test_asynchronous_psycopg_works_too(either_gateway: Gateway) -> None:
    async def work() -> list[int]:
        async with await psycopg.AsyncConnection.connect(
            host="127.0.0.1", port=either_gateway.port, user="alice", password=PASSWORD, dbname="postgres"
        ) as session:
            cursor = await session.execute("select generate_series(1, 3)")
            return [row[0] for row in await cursor.fetchall()]

    assert asyncio.run(work()) == [1, 2, 3]


# asyncpg, which speaks the protocol itself

Asyncpg = Callable[[Callable[[Any], Any]], Any]


def asyncpg_connect(gateway: Gateway, **more: Any) -> Any:
    where = {
        "host": "127.0.0.1",
        "port": gateway.port,
        "user": "alice",
        "password": PASSWORD,
        "database": "postgres",
    }
    return asyncpg.connect(**(where | more))


@pytest.fixture
def with_asyncpg(either_gateway: Gateway) -> Asyncpg:
    """Runs an async function with a session of asyncpg."""

    def run(work: Callable[[Any], Any]) -> Any:
        async def connected() -> Any:
            session = await asyncpg_connect(either_gateway)
            try:
                async with asyncio.timeout(SECONDS):
                    return await work(session)
            finally:
                await session.close()

        return asyncio.run(connected())

    return run


def test_asyncpg_is_let_in_as_the_mapped_role(with_asyncpg: Asyncpg) -> None:
    async def work(session: asyncpg.Connection) -> None:
        assert tuple(await session.fetchrow("select current_user, $1::int", 7)) == ("postgres", 7)
        assert session.get_server_version().major == 18

    with_asyncpg(work)


def test_asyncpg_refused_gets_its_own_exception(either_gateway: Gateway) -> None:
    async def work() -> None:
        with pytest.raises(asyncpg.InvalidPasswordError, match='failed for user "mallory"'):
            await asyncpg_connect(either_gateway, user="mallory")

    asyncio.run(work())


def test_asyncpg_runs_a_prepared_statement_many_times(with_asyncpg: Asyncpg) -> None:
    async def work(session: asyncpg.Connection) -> None:
        statement = await session.prepare("select $1::int + 1")
        assert [await statement.fetchval(number) for number in range(50)] == list(range(1, 51))

    with_asyncpg(work)


def test_asyncpg_copies_in_and_out(with_asyncpg: Asyncpg, table: str) -> None:
    async def work(session: asyncpg.Connection) -> None:
        records = [(number, f"name {number}") for number in range(ROWS)]
        assert await session.copy_records_to_table(table, records=records) == f"COPY {ROWS}"
        output = io.BytesIO()
        await session.copy_from_query(f"select * from {table} order by id", output=output)
        assert output.getvalue() == b"".join(b"%d\tname %d\n" % (number, number) for number in range(ROWS))

    with_asyncpg(work)


def test_asyncpg_cancels_a_query_and_goes_on(with_asyncpg: Asyncpg, backends: Backends) -> None:
    async def work(session: asyncpg.Connection) -> None:
        pid = await session.fetchval("select pg_backend_pid()")
        sleeping = asyncio.create_task(session.execute(ENDLESS))
        await asyncio.to_thread(wait_until, lambda: backends.sleeps(pid), "the query to begin")
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeping
        assert await session.fetchval("select 1") == 1

    with_asyncpg(work)


def test_asyncpg_query_canceled_by_its_time_limit_lets_the_session_go_on(with_asyncpg: Asyncpg) -> None:
    async def work(session: asyncpg.Connection) -> None:
        with pytest.raises(TimeoutError):
            await session.execute(ENDLESS, timeout=0.05)
        assert await session.fetchval("select 1") == 1

    with_asyncpg(work)


def test_asyncpg_goes_on_after_an_error(with_asyncpg: Asyncpg) -> None:
    async def work(session: asyncpg.Connection) -> None:
        with pytest.raises(asyncpg.DivisionByZeroError):
            await session.fetchval("select 1/0")
        assert await session.fetchval("select 1") == 1

    with_asyncpg(work)


def test_asyncpg_hears_what_another_session_notifies(with_asyncpg: Asyncpg, either_gateway: Gateway) -> None:
    async def work(session: asyncpg.Connection) -> None:
        channel = fresh("channel")
        heard: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await session.add_listener(channel, lambda _session, _pid, _channel, payload: heard.set_result(payload))
        other = await asyncpg_connect(either_gateway)
        try:
            await other.execute("select pg_notify($1, 'hello')", channel)
        finally:
            await other.close()
        assert await heard == "hello"

    with_asyncpg(work)


def test_asyncpg_sends_many_rows_in_one_go(with_asyncpg: Asyncpg, table: str) -> None:
    async def work(session: asyncpg.Connection) -> None:
        await session.executemany(
            f"insert into {table} values ($1, $2)", [(number, "x" * 100) for number in range(ROWS)]
        )
        assert await session.fetchval(f"select count(*) from {table}") == ROWS

    with_asyncpg(work)


def test_asyncpg_transactions_commit_and_roll_back(with_asyncpg: Asyncpg, table: str) -> None:
    async def work(session: asyncpg.Connection) -> None:
        async with session.transaction():
            await session.execute(f"insert into {table} values (1, 'kept')")
        lost = session.transaction()
        await lost.start()
        await session.execute(f"insert into {table} values (2, 'lost')")
        await lost.rollback()
        assert [tuple(row) for row in await session.fetch(f"select * from {table}")] == [(1, "kept")]

    with_asyncpg(work)


def test_asyncpg_iterates_over_a_cursor(with_asyncpg: Asyncpg) -> None:
    async def work(session: asyncpg.Connection) -> None:
        async with session.transaction():
            cursor = session.cursor("select generate_series(1, 1000)", prefetch=100)
            assert sum([row[0] async for row in cursor]) == 500500

    with_asyncpg(work)


def test_a_pool_of_asyncpg_sessions_works_at_once(either_gateway: Gateway) -> None:
    async def work() -> list[int]:
        async with asyncpg.create_pool(
            host="127.0.0.1",
            port=either_gateway.port,
            user="alice",
            password=PASSWORD,
            database="postgres",
            min_size=TOGETHER,
            max_size=TOGETHER,
        ) as pool:
            return await asyncio.gather(*(pool.fetchval("select $1::int", number) for number in range(200)))

    assert asyncio.run(work()) == list(range(200))


# pg8000, in plain Python


def pg8000_connect(gateway: Gateway, user: str = "alice") -> pg8000.dbapi.Connection:
    return pg8000.dbapi.connect(
        user=user,
        host="127.0.0.1",
        port=gateway.port,
        password=PASSWORD,
        database="postgres",
        timeout=SECONDS,
    )


@pytest.fixture
def pg8000_session(either_gateway: Gateway) -> Iterator[pg8000.dbapi.Connection]:
    session = pg8000_connect(either_gateway)
    try:
        session.autocommit = True
        yield session
    finally:
        session.close()


def pg8000_rows(session: pg8000.dbapi.Connection, sql: str, values: tuple[Any, ...] = ()) -> list[list[Any]]:
    cursor = session.cursor()
    cursor.execute(sql, values)
    return [list(row) for row in cursor.fetchall()]


def test_pg8000_is_let_in_as_the_mapped_role(pg8000_session: pg8000.dbapi.Connection) -> None:
    assert pg8000_rows(pg8000_session, "select current_user::text, %s::int", (7,)) == [["postgres", 7]]


def test_pg8000_refused_is_told_what_postgresql_would_say(either_gateway: Gateway) -> None:
    with pytest.raises(pg8000.exceptions.DatabaseError) as refused:
        pg8000_connect(either_gateway, "mallory")
    assert refused.value.args[0]["C"] == "28P01"


def test_pg8000_runs_a_prepared_statement_many_times(either_gateway: Gateway) -> None:
    import pg8000.native

    with pg8000.native.Connection(
        "alice", host="127.0.0.1", port=either_gateway.port, password=PASSWORD, database="postgres"
    ) as session:
        statement = session.prepare("select cast(:number as int) + 1")
        assert [statement.run(number=number) for number in range(50)] == [[[number + 1]] for number in range(50)]
        statement.close()


def test_pg8000_copies_in_and_out(pg8000_session: pg8000.dbapi.Connection, table: str) -> None:
    lines = b"".join(b"%d\tname %d\n" % (number, number) for number in range(ROWS))
    cursor = pg8000_session.cursor()
    cursor.execute(f"copy {table} from stdin", stream=io.BytesIO(lines))
    output = io.BytesIO()
    cursor.execute(f"copy (select * from {table} order by id) to stdout", stream=output)
    assert output.getvalue() == lines


def test_pg8000_key_cancels_a_query_and_the_session_goes_on(
    pg8000_session: pg8000.dbapi.Connection, either_gateway: Gateway, backends: Backends
) -> None:
    pid = pg8000_rows(pg8000_session, "select pg_backend_pid()")[0][0]
    # It has no call for that, so that its users do as libpq does.
    key = pg8000_session._backend_key_data

    def cancel_once_it_sleeps() -> None:
        wait_until(lambda: backends.sleeps(pid), "the query to begin")
        with socket.create_connection(("127.0.0.1", either_gateway.port), SECONDS) as canceller:
            canceller.sendall(struct.pack("!ii", 16, 80877102) + key)
            assert canceller.recv(1) == b""

    with ThreadPoolExecutor(1) as threads:
        cancelled = threads.submit(cancel_once_it_sleeps)
        with pytest.raises(pg8000.exceptions.DatabaseError) as error:
            pg8000_rows(pg8000_session, ENDLESS)
        cancelled.result(SECONDS)
    assert error.value.args[0]["C"] == "57014"
    assert pg8000_rows(pg8000_session, "select 1") == [[1]]


def test_pg8000_goes_on_after_an_error(pg8000_session: pg8000.dbapi.Connection) -> None:
    with pytest.raises(pg8000.exceptions.DatabaseError) as error:
        pg8000_rows(pg8000_session, "select 1/0")
    assert error.value.args[0]["C"] == "22012"
    assert pg8000_rows(pg8000_session, "select 1") == [[1]]


def test_pg8000_hears_what_another_session_notifies(
    pg8000_session: pg8000.dbapi.Connection, either_gateway: Gateway
) -> None:
    channel = fresh("channel")
    pg8000_session.cursor().execute(f"listen {channel}")
    other = pg8000_connect(either_gateway)
    try:
        other.autocommit = True
        other.cursor().execute(f"notify {channel}, 'hello'")
    finally:
        other.close()

    def heard() -> bool:
        # It reads notifications along with the answer to a query.
        pg8000_rows(pg8000_session, "select 1")
        return bool(pg8000_session.notifications)

    wait_until(heard, "the notification")
    assert pg8000_session.notifications.popleft()[1:] == (channel, "hello")


def test_pg8000_transactions_commit_and_roll_back(either_gateway: Gateway, table: str) -> None:
    session = pg8000_connect(either_gateway)
    try:
        session.cursor().execute(f"insert into {table} values (1, 'kept')")
        session.commit()
        session.cursor().execute(f"insert into {table} values (2, 'lost')")
        session.rollback()
        assert pg8000_rows(session, f"select * from {table}") == [[1, "kept"]]
    finally:
        session.close()


def test_several_pg8000_sessions_work_at_once(either_gateway: Gateway) -> None:
    def work(number: int) -> int:
        session = pg8000_connect(either_gateway)
        try:
            return sum(pg8000_rows(session, "select %s::int", (number,))[0][0] for _ in range(20))
        finally:
            session.close()

    with ThreadPoolExecutor(TOGETHER) as threads:
        assert list(threads.map(work, range(TOGETHER))) == [20 * number for number in range(TOGETHER)]


# psql and pgbench: PostgreSQL 18's of the wheel, and the system's where there is one


def programs(name: str) -> list[str]:
    return ["the wheel's", "the system's"] if shutil.which(name) else ["the wheel's"]


class Programs:
    """A PostgreSQL program, pointed at the gateway by its environment."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(port),
            "PGUSER": "alice",
            "PGPASSWORD": PASSWORD,
            "PGDATABASE": "postgres",
            "PGCONNECT_TIMEOUT": "10",
        }

    def run(self, name: str, *arguments: str, script: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.folder / name, *arguments],
            input=script,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=SECONDS,
            check=False,
        )

    def start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.folder / name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )


@pytest.fixture(params=programs("psql"))
def psql(request: pytest.FixtureRequest, either_gateway: Gateway, postgres: ThrowawayPostgres) -> Programs:
    found = Path(shutil.which("psql") or "/").parent
    return Programs(postgres.binaries if request.param == "the wheel's" else found, either_gateway.port)


def psql_says(psql: Programs, script: str, *arguments: str) -> list[str]:
    """The lines that psql prints for a script, unaligned."""
    done = psql.run("psql", "-XqAt", *arguments, script=script)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_psql_is_let_in_as_the_mapped_role(psql: Programs) -> None:
    assert psql_says(psql, "select current_user, 6 * 7;") == ["postgres|42"]


def test_psql_refused_says_why_and_ends_with_status_2(psql: Programs) -> None:
    done = psql.run("psql", "-X", "-U", "mallory", "-c", "select 1")
    assert done.returncode == 2
    assert 'FATAL:  password authentication failed for user "mallory"' in done.stderr


def test_psql_prepares_and_executes(psql: Programs) -> None:
    assert psql_says(psql, "prepare plus (int) as select $1 + 1;\nexecute plus(1);\nexecute plus(2);") == [
        "2",
        "3",
    ]


def test_psql_copies_in_and_out(psql: Programs, table: str, tmp_path: Path) -> None:
    source, copied = tmp_path / "in", tmp_path / "out"
    source.write_text("".join(f"{number}\tname {number}\n" for number in range(ROWS)))
    psql_says(psql, f"\\copy {table} from '{source}'\n\\copy (select * from {table} order by id) to '{copied}'")
    assert copied.read_bytes() == source.read_bytes()


def test_psql_interrupted_at_a_terminal_cancels_its_query_and_goes_on(psql: Programs, backends: Backends) -> None:
    name = fresh("psql")
    terminal, its_terminal = os.openpty()
    process = subprocess.Popen(
        [psql.folder / "psql", "-XqAtn", "-P", "pager=off"],
        stdin=its_terminal,
        stdout=its_terminal,
        stderr=its_terminal,
        env=psql.environment | {"PGAPPNAME": name},
    )
    os.close(its_terminal)
    with os.fdopen(terminal, "rb+", buffering=0) as typed:
        try:
            typed.write(f"{ENDLESS};\n".encode())
            wait_until(lambda: backends.sleeps_as(name), "the query to begin")
            process.send_signal(signal.SIGINT)
            typed.write(b"select 'still ' || 'here';\n\\q\n")
            process.wait(SECONDS)
            shown = read_terminal(typed)
        finally:
            process.kill()
            process.wait()
    assert b"canceling statement due to user request" in shown
    assert b"still here" in shown
    assert process.returncode == 0


def read_terminal(terminal: io.FileIO) -> bytes:
    """All that was written to a terminal whose last user is gone."""
    shown = b""
    try:
        while chunk := terminal.read(65536):
            shown += chunk
    except OSError:  # EIO: that is how a terminal says so
        return shown
    return shown


def test_psql_goes_on_after_an_error(psql: Programs) -> None:
    assert psql_says(psql, "select 1/0;\nselect 'still here';") == ["still here"]


def test_psql_shows_a_notification(psql: Programs) -> None:
    channel = fresh("channel")
    lines = psql_says(psql, f"listen {channel};\nnotify {channel}, 'hello';\nselect 1;")
    assert any(channel in line and "hello" in line for line in lines)


def test_psql_transactions_commit_and_roll_back(psql: Programs, table: str) -> None:
    script = f"""
        begin; insert into {table} values (1, 'kept'); commit;
        begin; insert into {table} values (2, 'lost'); rollback;
        select * from {table};
    """
    assert psql_says(psql, script) == ["1|kept"]


def test_psql_describes_what_there_is(psql: Programs, table: str) -> None:
    assert any(table in line for line in psql_says(psql, "\\dt"))


def test_psql_reconnects_to_another_database(psql: Programs) -> None:
    lines = psql_says(psql, "\\c other\nselect current_database();")
    assert lines[-1] == "other"


def test_several_psqls_work_at_once(psql: Programs) -> None:
    with ThreadPoolExecutor(4) as threads:
        said = list(threads.map(lambda number: psql_says(psql, f"select {number};"), range(4)))
    assert said == [[str(number)] for number in range(4)]


def test_psql_pipelines(either_gateway: Gateway, postgres: ThrowawayPostgres) -> None:
    psql = Programs(postgres.binaries, either_gateway.port)
    sent = [f"select $1::int \\bind {number} \\sendpipeline" for number in range(9)]
    script = "\n".join(["\\startpipeline", *sent, "\\endpipeline", ""])
    assert psql_says(psql, script) == [str(number) for number in range(9)]


@pytest.fixture(scope="module")
def pgbench_database(postgres: ThrowawayPostgres) -> str:
    postgres.sql("create database pgbench")
    return "pgbench"


def pgbench(gateway: Gateway, postgres: ThrowawayPostgres, database: str, *arguments: str) -> str:
    done = Programs(postgres.binaries, gateway.port).run("pgbench", "-n", *arguments, database)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout or "number of failed transactions: 0 " in done.stdout, done.stdout
    return done.stdout


@pytest.fixture
def pgbench_tables(either_gateway: Gateway, postgres: ThrowawayPostgres, pgbench_database: str) -> str:
    """A database with pgbench's tables, filled through the gateway by COPY."""
    if postgres.sql("select to_regclass('pgbench_accounts') is null", database=pgbench_database) == "t":
        pgbench(either_gateway, postgres, pgbench_database, "-i", "-q")
    return pgbench_database


@pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
def test_pgbench_runs_in_each_query_mode(
    either_gateway: Gateway, postgres: ThrowawayPostgres, pgbench_tables: str, mode: str
) -> None:
    said = pgbench(either_gateway, postgres, pgbench_tables, "-M", mode, "-c", "4", "-j", "2", "-t", "25")
    assert "number of transactions actually processed: 100/100" in said


def test_pgbench_connects_anew_for_each_transaction(
    either_gateway: Gateway, postgres: ThrowawayPostgres, pgbench_tables: str
) -> None:
    said = pgbench(either_gateway, postgres, pgbench_tables, "-C", "-S", "-c", "2", "-t", "10")
    assert "number of transactions actually processed: 20/20" in said


def test_pgbench_pipelines(
    either_gateway: Gateway, postgres: ThrowawayPostgres, pgbench_database: str, tmp_path: Path
) -> None:
    script = tmp_path / "pipeline.sql"
    script.write_text("\\startpipeline\nselect 1;\nselect 2;\nselect 3;\n\\endpipeline\n")
    said = pgbench(
        either_gateway, postgres, pgbench_database, "-M", "prepared", "-f", str(script), "-c", "2", "-t", "50"
    )
    assert "number of transactions actually processed: 100/100" in said
