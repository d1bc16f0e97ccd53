"""What goes through a session: every byte, in order, at once, in bounded memory, until either side closes."""

from __future__ import annotations

import hashlib
import os
import random
import re
import select
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway
from tests.system.conftest import PASSWORD, wait_until
from tests.wire import (
    AUTH_OK,
    KEY,
    READY,
    RawClient,
    ScriptedTarget,
    error_fields,
    greet,
    password,
    query,
    read_exactly,
    read_startup,
    startup,
)

SECONDS = 60
MEGABYTE = 1024 * 1024
MAX_GROWTH = 16 * MEGABYTE
AT_ONCE_SECONDS = 1.0
RESET_ON_CLOSE = struct.pack("ii", 1, 0)

MappedTo = Callable[..., Gateway]


def connect(gateway: Gateway, database: str = "postgres", **more: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(
        host="127.0.0.1", port=gateway.port, user="alice", password=PASSWORD, dbname=database, **more
    )


def before(target: ScriptedTarget) -> dict[str, str]:
    """What an authenticator prints to send a client there."""
    return {"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "postgres"}


def program(
    folder: Path, gateway: Gateway, name: str, *arguments: str, status: int = 0
) -> subprocess.CompletedProcess[bytes]:
    """A program of PostgreSQL, run through the gateway."""
    where = ["-h", "127.0.0.1", "-p", str(gateway.port), "-U", "alice"]
    done = subprocess.run(
        [folder / name, *where, *arguments],
        capture_output=True,
        env=os.environ | {"PGPASSWORD": PASSWORD},
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == status, done.stderr.decode()
    return done


# Closing


def test_a_client_that_has_closed_its_sending_side_still_gets_its_answer(shared_gateway: Gateway) -> None:
    with RawClient(shared_gateway.port) as client:
        client.log_in()
        client.send(query("select generate_series(1, 100000)"))
        client.socket.shutdown(socket.SHUT_WR)
        messages = client.read_until(b"Z")
        assert client.read_to_end() == b""
    assert sum(kind == b"D" for kind, _ in messages) == 100_000


def test_a_client_that_closes_its_sending_side_during_its_login_still_gets_its_answer(
    shared_gateway: Gateway,
) -> None:
    with RawClient(shared_gateway.port) as client:
        client.send(startup())
        client.read_message()
        client.send(password() + query("select 42"))
        client.socket.shutdown(socket.SHUT_WR)
        client.read_until(b"Z")
        assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")
        assert client.read_to_end() == b""


def test_a_target_that_goes_closes_its_client_at_once(shared_gateway: Gateway, postgres: ThrowawayPostgres) -> None:
    with RawClient(shared_gateway.port) as client:
        client.log_in(application_name="to be ended")
        postgres.sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'to be ended'")
        began = time.monotonic()
        error = client.read_error()
        assert time.monotonic() - began < AT_ONCE_SECONDS
    assert error["C"] == "57P01"
    assert "administrator" in error["M"]


@pytest.mark.parametrize("reset", [False, True])
def test_a_target_whose_connection_breaks_closes_its_client_at_once(mapped_to: MappedTo, *, reset: bool) -> None:
    now = threading.Event()

    def script(connection: socket.socket) -> None:
        greet(connection)
        now.wait(SECONDS)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    with ScriptedTarget(script) as target:
        gateway = mapped_to(before(target))
        with RawClient(gateway.port) as client:
            client.log_in()
            now.set()
            began = time.monotonic()
            assert client.read_to_end() == b""
            assert time.monotonic() - began < AT_ONCE_SECONDS
        why = gateway.wait_for("session ended")["why"]
    assert why == ("target connection lost" if reset else "target closed")


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_closes_its_target_at_once(mapped_to: MappedTo, *, reset: bool) -> None:
    closed: list[float] = []

    def script(connection: socket.socket) -> None:
        greet(connection)
        try:
            assert connection.recv(1) == b""
        except ConnectionResetError:
            assert reset
        closed.append(time.monotonic())

    with ScriptedTarget(script) as target:
        gateway = mapped_to(before(target))
        with RawClient(gateway.port) as client:
            client.log_in()
            if reset:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        left = time.monotonic()
        wait_until(lambda: closed, "the target's connection to close")
        why = gateway.wait_for("session ended")["why"]
    assert closed[0] - left < AT_ONCE_SECONDS
    assert why == ("client connection lost" if reset else "client closed")


def test_a_client_that_is_reset_while_its_target_takes_nothing_is_noticed(mapped_to: MappedTo) -> None:
    done = threading.Event()

    def script(connection: socket.socket) -> None:
        greet(connection)
        # Nothing is read; the end of the session is seen by the gateway's log.
        assert done.wait(SECONDS)

    with ScriptedTarget(script) as target:
        # What the target is still owed is kept for it for so long.
        gateway = mapped_to(before(target), close_timeout=0.5)
        with RawClient(gateway.port) as client:
            client.log_in()
            client.socket.setblocking(False)
            while select.select([], [client.socket], [], 0.5)[1]:
                client.socket.send(bytes(65536))
            # Both buffers of the system and ours are full: the gateway reads this client no more.
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        ended = gateway.wait_for("session ended")
        done.set()
    assert (ended["why"], ended["seconds"] < SECONDS) == ("client connection lost", True)


def test_a_client_that_goes_in_the_middle_of_an_answer_closes_its_target_at_once(mapped_to: MappedTo) -> None:
    closed: list[float] = []

    def script(connection: socket.socket) -> None:
        greet(connection)
        try:
            while True:
                connection.sendall(bytes(65536))
        except ConnectionError:
            closed.append(time.monotonic())

    with ScriptedTarget(script) as target:
        gateway = mapped_to(before(target))
        with RawClient(gateway.port) as client:
            client.log_in()
            client.read(10 * MEGABYTE)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        left = time.monotonic()
        wait_until(lambda: closed, "the target's connection to close")
        gateway.wait_for("session ended")
    assert closed[0] - left < AT_ONCE_SECONDS


def test_clients_that_abort_in_an_answer_leave_no_session_behind(gateway: Gateway) -> None:
    for _ in range(20):
        with RawClient(gateway.port) as client:
            client.log_in()
            client.send(query("select repeat('x', 1000) from generate_series(1, 1000)"))
            client.read(1000)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    wait_until(lambda: len(gateway.log_lines("session ended")) == 20, "20 sessions to end")


def test_what_the_target_said_last_arrives_before_the_connection_closes(mapped_to: MappedTo) -> None:
    def script(connection: socket.socket) -> None:
        greet(connection)
        connection.sendall(bytes(5 * MEGABYTE) + b"the end")

    with ScriptedTarget(script) as target, RawClient(mapped_to(before(target)).port) as client:
        client.log_in()
        assert client.read_to_end() == bytes(5 * MEGABYTE) + b"the end"


# Every byte, in order


def test_what_is_sent_behind_the_password_is_answered_after_the_login(shared_gateway: Gateway) -> None:
    with RawClient(shared_gateway.port) as client:
        client.send(startup())
        client.read_message()
        client.send(password() + b"".join(query(f"select {number}") for number in range(100, 150)))
        client.read_until(b"Z")
        rows = [body for _ in range(50) for kind, body in client.read_until(b"Z") if kind == b"D"]
    assert rows == [b"\0\x01\0\0\0\x03%d" % number for number in range(100, 150)]


def test_a_lot_sent_behind_the_password_reaches_the_target_in_order(mapped_to: MappedTo) -> None:
    sent = random.Random(1).randbytes(3 * MEGABYTE)
    received: list[bytes] = []

    def script(connection: socket.socket) -> None:
        greet(connection)
        received.append(read_exactly(connection, len(sent)))

    with ScriptedTarget(script) as target, RawClient(mapped_to(before(target)).port) as client:
        client.send(startup())
        client.read_message()
        client.send(password() + sent)
        client.read_until(b"Z")
        assert client.read_to_end() == b""
    assert received == [sent]


@pytest.mark.parametrize("size", [1, 1000, 3 * MEGABYTE])
def test_what_the_target_sends_behind_ready_for_query_arrives(mapped_to: MappedTo, size: int) -> None:
    behind = random.Random(size).randbytes(size)

    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(AUTH_OK + KEY + READY + behind)

    with ScriptedTarget(script) as target, RawClient(mapped_to(before(target)).port) as client:
        client.log_in()
        assert client.read_to_end() == behind


def test_copy_moves_a_hundred_megabytes_both_ways_unchanged(shared_gateway: Gateway) -> None:
    sent, received = hashlib.sha256(), hashlib.sha256()
    source = random.Random(100)
    with connect(shared_gateway) as session:
        session.execute("set synchronize_seqscans = off")
        session.execute("create temp table bulk (line text)")
        cursor = session.cursor()
        with cursor.copy("copy bulk from stdin") as copy_in:
            for _ in range(100):
                text = source.randbytes(MEGABYTE // 2).hex().encode()
                block = b"\n".join(text[at : at + 1024] for at in range(0, MEGABYTE, 1024)) + b"\n"
                sent.update(block)
                copy_in.write(block)
        with cursor.copy("copy bulk to stdout") as copy_out:
            for block in copy_out:
                received.update(block)
    assert received.digest() == sent.digest()


def test_bytes_go_both_ways_at_once(mapped_to: MappedTo) -> None:
    there, back = random.Random(1).randbytes(20 * MEGABYTE), random.Random(2).randbytes(20 * MEGABYTE)
    received: list[bytes] = []

    def script(connection: socket.socket) -> None:
        greet(connection)
        pouring = threading.Thread(target=connection.sendall, args=(back,))
        pouring.start()
        received.append(read_exactly(connection, len(there)))
        pouring.join()

    with ScriptedTarget(script) as target, RawClient(mapped_to(before(target)).port) as client:
        client.log_in()
        pouring = threading.Thread(target=client.send, args=(there,))
        pouring.start()
        got = read_exactly(client.socket, len(back))
        pouring.join()
        client.read_to_end()
    assert got == back
    assert received == [there]


def test_large_objects_go_in_and_out(shared_gateway: Gateway) -> None:
    content = random.Random(3).randbytes(5 * MEGABYTE)
    with connect(shared_gateway) as session:
        row = session.execute("select lo_from_bytea(0, %b)", [content]).fetchone()
        assert row is not None
        got = session.execute("select lo_get(%s)", row, binary=True).fetchone()
        session.execute("select lo_unlink(%s)", row)
    assert got == (content,)


def test_psql_imports_and_exports_large_objects_by_function_calls(
    shared_gateway: Gateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    source, copied = tmp_path / "source", tmp_path / "copied"
    source.write_bytes(random.Random(4).randbytes(MEGABYTE))
    commands = (f"\\lo_import {source}", f"\\lo_export :LASTOID {copied}", "\\lo_unlink :LASTOID")
    words = [word for command in commands for word in ("-c", command)]
    program(postgres.binaries, shared_gateway, "psql", "-X", "-d", "postgres", *words)
    assert copied.read_bytes() == source.read_bytes()


# Replication and dumps


@pytest.fixture
def slot(postgres: ThrowawayPostgres) -> Iterator[str]:
    """The name of a replication slot that a test makes; it is dropped afterwards."""
    name = f"slot_{uuid.uuid4().hex[:12]}"
    yield name
    postgres.sql(f"select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = '{name}'")


def test_logical_replication_streams_changes(
    shared_gateway: Gateway, postgres: ThrowawayPostgres, slot: str, tmp_path: Path
) -> None:
    streamed = tmp_path / "changes"
    common = ["-d", "postgres", "--slot", slot]
    program(postgres.binaries, shared_gateway, "pg_recvlogical", *common, "--create-slot", "-P", "test_decoding")
    postgres.sql(f"create table {slot} (id int, name text); insert into {slot} values (1, 'streamed')")
    end = postgres.sql("select pg_current_wal_insert_lsn()")
    program(
        *(postgres.binaries, shared_gateway, "pg_recvlogical", *common),
        *("--start", "--no-loop", "--endpos", end, "-f", str(streamed)),
    )
    postgres.sql(f"drop table {slot}")
    assert f"table public.{slot}: INSERT: id[integer]:1 name[text]:'streamed'" in streamed.read_text()


def test_physical_replication_streams_the_log(
    shared_gateway: Gateway, postgres: ThrowawayPostgres, slot: str, tmp_path: Path
) -> None:
    # With a slot it begins there, not where the server is by then.
    postgres.sql(f"select pg_create_physical_replication_slot('{slot}', true)")
    end = postgres.sql("select pg_current_wal_insert_lsn()")
    # The receiver ends at the first that lies behind it, so there must be more, and on disk.
    postgres.sql("select pg_logical_emit_message(false, 'x', 'y'); select pg_switch_wal();")
    program(
        *(postgres.binaries, shared_gateway, "pg_receivewal"),
        *("-D", str(tmp_path), "--slot", slot, "--no-loop", "--endpos", end),
    )
    files = [file for file in tmp_path.iterdir() if re.fullmatch(r"[0-9A-F]{24}(\.partial)?", file.name)]
    assert files
    assert all(file.stat().st_size == 16 * MEGABYTE for file in files)


def test_a_base_backup_with_its_log_is_whole(
    shared_gateway: Gateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    program(
        *(postgres.binaries, shared_gateway, "pg_basebackup"),
        *("-D", str(copy), "-X", "stream", "-c", "fast", "--no-sync"),
    )
    verified = subprocess.run(
        [postgres.binaries / "pg_verifybackup", str(copy)], capture_output=True, timeout=SECONDS, check=False
    )
    assert verified.returncode == 0, verified.stderr.decode()


FILL = """
create table parent (id int primary key, note text, made timestamptz default '2020-01-01 00:00 UTC');
insert into parent select n, repeat(md5(n::text), 10) from generate_series(1, 20000) n;
create table child (parent int references parent, amount numeric);
insert into child select n, n / 7.0 from generate_series(1, 20000) n;
create view both_of_them as select * from parent join child on parent = id;
create function twice(int) returns int language sql as 'select $1 * 2';
select lo_from_bytea(424242, decode(repeat('00ff', 100000), 'hex'));
"""


@pytest.fixture
def two_databases(postgres: ThrowawayPostgres) -> Iterator[tuple[str, str]]:
    """A database with something in it, and an empty one."""
    full, empty = (f"{prefix}_{uuid.uuid4().hex[:12]}" for prefix in ("full", "empty"))
    postgres.sql(f"create database {full}")
    postgres.sql(f"create database {empty}")
    postgres.sql(FILL, database=full)
    yield full, empty
    postgres.sql(f"drop database {full} (force)")
    postgres.sql(f"drop database {empty} (force)")


def test_a_dump_restored_through_the_gateway_equals_its_source(
    shared_gateway: Gateway, postgres: ThrowawayPostgres, two_databases: tuple[str, str], tmp_path: Path
) -> None:
    full, empty = two_databases
    archive = tmp_path / "archive"
    program(postgres.binaries, shared_gateway, "pg_dump", "-d", full, "-Fc", "-f", str(archive))
    program(postgres.binaries, shared_gateway, "pg_restore", "-d", empty, "-j", "2", "-e", str(archive))

    def dump(database: str) -> bytes:
        return subprocess.run(
            [
                postgres.binaries / "pg_dump",
                "--restrict-key=x",
                *postgres.connect_arguments(database=database),
            ],
            capture_output=True,
            timeout=SECONDS,
            check=True,
        ).stdout

    direct = dump(full)
    plain = program(postgres.binaries, shared_gateway, "pg_dump", "-d", full, "--restrict-key=x").stdout
    assert len(direct) > MEGABYTE
    assert plain == direct
    assert dump(empty) == direct


# At once


def test_a_notification_arrives_without_any_traffic_of_the_client(
    shared_gateway: Gateway, postgres: ThrowawayPostgres
) -> None:
    channel = f"channel_{uuid.uuid4().hex[:12]}"
    with (
        RawClient(shared_gateway.port) as client,
        psycopg.connect(host=str(postgres.folder), port=postgres.port, user="postgres", autocommit=True) as notifier,
    ):
        client.log_in()
        client.send(query(f"listen {channel}"))
        client.read_until(b"Z")
        for number in range(20):
            began = time.monotonic()
            notifier.execute("select pg_notify(%s, %s)", [channel, str(number)])
            kind, body = client.read_message()
            assert time.monotonic() - began < AT_ONCE_SECONDS
            assert kind == b"A"
            assert body[4:] == channel.encode() + b"\0" + str(number).encode() + b"\0"


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_what_trickles_in_is_forwarded_before_the_next_is_sent(mapped_to: MappedTo, size: int) -> None:
    arrived = threading.Semaphore(0)
    pieces = [random.Random(number).randbytes(size) for number in range(20)]

    def script(connection: socket.socket) -> None:
        greet(connection)
        for piece in pieces:
            connection.sendall(piece)
            assert arrived.acquire(timeout=SECONDS)

    with ScriptedTarget(script) as target, RawClient(mapped_to(before(target)).port) as client:
        client.log_in()
        for piece in pieces:
            assert client.read(size) == piece
            arrived.release()


def test_what_a_client_sends_byte_by_byte_is_forwarded_before_the_next_is_sent(mapped_to: MappedTo) -> None:
    arrived = threading.Semaphore(0)

    def script(connection: socket.socket) -> None:
        greet(connection)
        for byte in query("select 1"):
            assert connection.recv(1) == bytes([byte])
            arrived.release()
        connection.sendall(READY)

    with ScriptedTarget(script) as target, RawClient(mapped_to(before(target)).port) as client:
        client.log_in()
        for byte in query("select 1"):
            client.send(bytes([byte]))
            assert arrived.acquire(timeout=SECONDS)
        client.read_until(b"Z")


def test_a_notice_of_a_running_query_arrives_before_the_query_goes_on(
    shared_gateway: Gateway, postgres: ThrowawayPostgres
) -> None:
    lock = random.SystemRandom().getrandbits(31)
    with (
        RawClient(shared_gateway.port) as client,
        psycopg.connect(host=str(postgres.folder), port=postgres.port, user="postgres", autocommit=True) as holder,
    ):
        client.log_in()
        holder.execute("select pg_advisory_lock(%s)", [lock])
        steps = (
            "raise notice 'before'",
            f"perform pg_advisory_lock({lock})",
            "raise notice 'after'",
            "end $$",
        )
        client.send(query("do $$ begin " + "; ".join(steps)))
        kind, body = client.read_message()
        assert (kind, error_fields(body)["M"]) == (b"N", "before")
        holder.execute("select pg_advisory_unlock(%s)", [lock])
        kind, body = client.read_message()
        assert (kind, error_fields(body)["M"]) == (b"N", "after")
        client.read_until(b"Z")


# In bounded memory


def read_and_count(client: RawClient, size: int) -> int:
    """Reads this many bytes and drops them; returns how many came."""
    space = bytearray(MEGABYTE)
    counted = 0
    while counted < size and (count := client.socket.recv_into(space, min(MEGABYTE, size - counted))):
        counted += count
    return counted


def test_a_row_of_two_hundred_megabytes_takes_no_memory_of_the_gateway(gateway: Gateway) -> None:
    size = 200_000_000
    with RawClient(gateway.port) as client:
        client.log_in()
        before_it = gateway.resident_bytes
        client.send(query(f"select repeat('x', {size})"))
        assert client.read_message()[0] == b"T"
        kind, length = struct.unpack("!ci", client.read(5))
        assert (kind, length) == (b"D", size + 10)
        assert read_and_count(client, length - 4) == length - 4
        client.read_until(b"Z")
        assert gateway.peak_bytes - before_it <= MAX_GROWTH
        assert gateway.resident_bytes - before_it <= MAX_GROWTH


def test_a_row_of_a_gigabyte_goes_through_in_bounded_memory(mapped_to: MappedTo) -> None:
    megabytes = 1024
    row = struct.pack("!ci", b"D", megabytes * MEGABYTE - 1)

    def script(connection: socket.socket) -> None:
        greet(connection)
        connection.sendall(row)
        block = bytes(MEGABYTE)
        for _ in range(megabytes):
            connection.sendall(block)
        connection.sendall(READY)

    with ScriptedTarget(script) as target:
        gateway = mapped_to(before(target))
        with RawClient(gateway.port) as client:
            client.log_in()
            before_it = gateway.resident_bytes
            assert client.read(5) == row
            assert read_and_count(client, megabytes * MEGABYTE) == megabytes * MEGABYTE
            assert client.read_message() == (b"Z", b"I")
        assert gateway.peak_bytes - before_it <= MAX_GROWTH


def test_a_reader_that_stops_holds_up_the_sender_and_no_memory(mapped_to: MappedTo) -> None:
    poured = 0
    stuck = threading.Event()

    def script(connection: socket.socket) -> None:
        nonlocal poured
        greet(connection)
        connection.settimeout(0.5)
        try:
            while poured < 200 * MEGABYTE:
                poured += connection.send(bytes(65536))
        except TimeoutError:
            stuck.set()
        connection.settimeout(SECONDS)
        connection.sendall(b"the end")

    with ScriptedTarget(script) as target:
        gateway = mapped_to(before(target))
        with RawClient(gateway.port) as client:
            client.log_in()
            before_it = gateway.resident_bytes
            assert stuck.wait(SECONDS)
            assert gateway.peak_bytes - before_it <= MAX_GROWTH
            assert read_exactly(client.socket, poured) == bytes(poured)
            assert client.read_to_end() == b"the end"


# For days


def test_keepalive_is_on_at_both_sides(mapped_to: MappedTo, postgres: ThrowawayPostgres) -> None:
    lines = {"_META_TARGET_HOST": f"127.0.0.1:{postgres.port}", "user": "postgres", "database": "postgres"}
    gateway = mapped_to(lines, tcp={"keepalive_idle": 1234})
    with RawClient(gateway.port) as client:
        client.log_in()
        client.send(query("select inet_client_port()"))
        row = next(body for kind, body in client.read_until(b"Z") if kind == b"D")
        clients_port, gateways_port = client.socket.getsockname()[1], int(row[6:])
        legs = [(gateway.port, clients_port), (gateways_port, postgres.port)]
        # Right after a message it is another timer that runs.
        wait_until(lambda: all(timer(*leg).startswith("(keepalive,20min") for leg in legs), "keepalive")


def timer(port: int, peer: int) -> str:
    """The timer that runs for a connection of loopback, as ss shows it."""
    select = ["src", f"127.0.0.1:{port}", "dst", f"127.0.0.1:{peer}"]
    done = subprocess.run(["ss", "-tnHo", *select], capture_output=True, text=True, timeout=SECONDS, check=True)
    return done.stdout.partition("timer:")[2]
