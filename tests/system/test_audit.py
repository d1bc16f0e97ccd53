"""The audit log of a gateway: who came in, who did not, what they said; and what happens if it cannot be kept."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import StartGateway
from tests.system.conftest import (
    PASSWORD,
    Run,
    answering_gateway,
    assert_one_clear_line,
    assert_serves,
    configure,
    wait_until,
)
from tests.tls import HOST, Authority, TlsClient
from tests.wire import RawClient, cancel_request, message, password, query, startup

CANNOT = ("57P03", "the gateway cannot accept logins at the moment")
MEGABYTE = 1 << 20
SECRETS = ["what Alice knows", "scram secret"]

Line = dict[str, Any]


def lines_of(file: Path, event: str = "") -> list[Line]:
    lines = [json.loads(line) for line in file.read_bytes().rpartition(b"\n")[0].split(b"\n") if line]
    return [line for line in lines if not event or line["event"] == event]


def wait_for(file: Path, event: str) -> Line:
    """The only line of this event, once it is there."""
    wait_until(lambda: lines_of(file, event), f"the event {event}")
    (line,) = lines_of(file, event)
    return line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


# What is in it


def test_a_login_is_in_it_before_the_client_is_let_in(start_gateway: StartGateway, mapped: Path, file: Path) -> None:
    gateway = start_gateway(mapped, audit={"file": str(file)})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for number in range(1, 6):
        with RawClient(gateway.port) as client:
            client.log_in(user="alice", database="postgres")
            address = "{}:{}".format(*client.socket.getsockname())
            login = lines_of(file, "login")[-1]
        assert (login["session"], login["user"], login["client"]) == (f"{number:x}", "alice", address)
        assert login["target_user"] == "postgres"
    assert gateway.wait_for("login", 5)["session"] == "5"


def test_everything_that_happens_to_somebody_is_in_it_once_and_in_order(
    start_gateway: StartGateway, mapped: Path, file: Path
) -> None:
    gateway = start_gateway(mapped, audit={"file": str(file)})
    with RawClient(gateway.port) as client:
        key = next(body for kind, body in client.log_in() if kind == b"K")
        with RawClient(gateway.port) as canceller:
            canceller.send(cancel_request(key))
            assert canceller.read_to_end() == b""
        wait_for(file, "cancel")
        client.send(message(b"X"))
        assert client.read_to_end() == b""
    wait_for(file, "end")
    with RawClient(gateway.port) as client:
        client.send(startup(user="mallory") + password())
        client.read_to_end()
    refused = wait_for(file, "refused")
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(lines_of(file, "reload")) == 2, "the reload")
    assert gateway.stop() == 0
    lines = lines_of(file)
    events = [line["event"] for line in lines]
    assert events == ["opened", "login", "cancel", "end", "refused", "opened", "reload", "reload", "closed"]
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["pid"] for line in lines} == {gateway.pid}
    assert (refused["user"], refused["sqlstate"], refused["fault_of"]) == ("mallory", "28P01", "client")
    assert lines_of(file, "cancel")[0]["outcome"] == "passed on"
    assert lines_of(file, "end")[0]["why"] == "client closed"


def test_a_reload_that_fails_says_why(start_gateway: StartGateway, tmp_path: Path, file: Path) -> None:
    users = tmp_path / "users.yaml"
    users.touch(0o600)
    users.write_text("targets: {}\nusers: {}\n")
    gateway = start_gateway(None, authenticator={"users": {"file": str(users)}}, audit={"file": str(file)})
    users.write_text("targets: {}\nusers: {alice: {}}\n")
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(lines_of(file, "reload")) == 2, "the reload")
    (failed,) = [line for line in lines_of(file, "reload") if line["what"] == "authenticator"]
    assert "users.alice" in failed["faults"][0]


def test_no_credential_is_in_it(
    start_gateway: StartGateway, authenticator: Callable[..., Path], postgres: ThrowawayPostgres, file: Path
) -> None:
    script = authenticator(
        f"echo '_META_TARGET_HOST=127.0.0.1:{postgres.port}'; echo user=scrammed; echo database=postgres\n"
        f"echo '_META_TARGET_CRED={SECRETS[1]}'; [ \"$user\" = alice ]"
    )
    gateway = start_gateway(
        script, authenticator={"cleartext_password": True}, audit={"file": str(file), "statements": True}
    )
    for user in ("alice", "mallory"):
        with RawClient(gateway.port) as client:
            client.send(startup(user=user))
            client.read_message()
            client.send(password(SECRETS[0]))
            client.read_until(b"Z" if user == "alice" else b"E")
    wait_for(file, "refused")
    gateway.stop()
    written = file.read_text()
    assert not [secret for secret in SECRETS if secret in written]


# Rotation


def test_a_file_that_is_moved_away_is_made_anew_on_sighup(
    start_gateway: StartGateway, mapped: Path, file: Path
) -> None:
    gateway = start_gateway(mapped, audit={"file": str(file)})
    assert_serves(gateway.port)
    wait_until(lambda: lines_of(file, "end"), "the session's end")
    moved = file.rename(file.with_suffix(".1"))
    gateway.process.send_signal(signal.SIGHUP)
    wait_until(lambda: file.exists() and lines_of(file, "reload"), "the new file")
    assert_serves(gateway.port)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    gateway.stop()
    lines = lines_of(moved) + lines_of(file)
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    assert [len(lines_of(each, "login")) for each in (moved, file)] == [1, 1]


# When it cannot be written


def test_nobody_gets_in_unrecorded_where_it_is_required(
    start_gateway: StartGateway, authenticator: Callable[..., Path], postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    script = authenticator(
        f"echo 1 >>{asked}\n"
        f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}; echo user=postgres; echo database=postgres"
    )
    gateway = start_gateway(script, audit={"file": "/dev/full", "required": True})
    for number in range(1, 4):
        with RawClient(gateway.port) as client:
            client.send(startup())
            # What is known to fail is refused before anybody is asked.
            assert client.read_fatal() == CANNOT
        refused = gateway.wait_for("refused", number)
        assert refused["reason"] == "audit.required: /dev/full cannot be written: No space left on device"
        assert refused["sqlstate"] == CANNOT[0]
    assert not asked.exists()
    assert gateway.log_lines("login") == []
    (complaint,) = gateway.log_lines("audit cannot be written")
    assert complaint["reason"] == "No space left on device"


def test_everybody_gets_in_where_it_is_not_required(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, audit={"file": "/dev/full"})
    for _ in range(5):
        assert_serves(gateway.port)
    gateway.wait_for("session ended", 5)
    # One complaint a minute is enough.
    assert len(gateway.log_lines("audit cannot be written")) == 1


# Where else it goes


def with_stdout(to: Path) -> list[str]:
    """What a command must be started by to have this as its standard output."""
    return ["sh", "-c", f'exec "$@" >{to}', "sh"]


def test_it_goes_to_standard_output(start_gateway: StartGateway, mapped: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    gateway = start_gateway(mapped, before=with_stdout(output), audit={"file": "stdout", "required": True})
    assert_serves(gateway.port)
    gateway.stop()
    assert [line["event"] for line in lines_of(output)] == ["opened", "login", "end", "closed"]


def test_a_pipe_that_nobody_reads_does_not_stop_the_gateway(
    start_gateway: StartGateway, mapped: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        gateway = start_gateway(mapped, before=with_stdout(pipe), audit={"file": "stdout", "statements": True})
        with RawClient(gateway.port) as client:
            client.log_in()
            # More than a pipe takes, and more than may wait for one.
            for _ in range(40):
                client.send(query(f"select 42 -- {'x' * 60_000}"))
                assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")
        gateway.wait_for("audit cannot be written")
        written = bytearray()

        def everything() -> bool:
            while (part := read_now(reader)) is not None:
                written.extend(part)
            return b'"event":"end"' in written or b'"event":"lost"' in written

        wait_until(everything, "what waited for a reader")
        assert_serves(gateway.port)
        gateway.stop()
        everything()
    finally:
        os.close(reader)
    lines = [json.loads(line) for line in bytes(written).split(b"\n") if line]
    (lost,) = [line for line in lines if line["event"] == "lost"]
    statements = [line for line in lines if line["event"] == "statement"]
    assert len(statements) + lost["lines"] > 40
    assert lines[-1]["event"] == "closed"


def read_now(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, MEGABYTE) or None
    except BlockingIOError:
        return None


def test_it_goes_to_the_system_logger(start_gateway: StartGateway, mapped: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as logger:
        logger.bind(str(tmp_path / "log"))
        logger.settimeout(20)
        gateway = start_gateway(mapped, audit={"file": f"syslog:{tmp_path}/log"})
        assert_serves(gateway.port)
        found = [logger.recv(65536).decode() for _ in range(3)]
    for text, event in zip(found, ("opened", "login", "end"), strict=True):
        line = re.fullmatch(r"<86>.{15} pgauthproxy\[\d+\]: (\{.*\})", text)
        assert line is not None
        assert json.loads(line[1])["event"] == event


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("no/such/folder/audit.log", ["audit.file", "no/such/folder", "No such file or directory"]),
        (".", ["audit.file", "Is a directory"]),
        ("syslog:/no/such/socket", ["audit.file", "No such file or directory"]),
    ],
)
def test_a_place_that_cannot_be_written_stops_the_start(run: Run, folder: Path, where: str, words: list[str]) -> None:
    configure(folder, audit={"file": where})
    assert_one_clear_line(run(), *words)
    checked = run("check")
    assert checked.returncode == 2
    assert all(word in checked.stderr for word in words)


@pytest.mark.parametrize("key", ["required", "statements"])
def test_what_an_audit_log_is_to_do_needs_one(run: Run, folder: Path, key: str) -> None:
    configure(folder, audit={key: True})
    assert_one_clear_line(run(), f"audit.{key}: needs audit.file")


# Statements


def test_statements_are_in_it_and_their_values_are_not(
    start_gateway: StartGateway, mapped: Path, postgres: ThrowawayPostgres, file: Path
) -> None:
    gateway = start_gateway(mapped, audit={"file": str(file), "statements": True})
    postgres.sql("create table if not exists audited (t text)")
    with psycopg.connect(
        host=HOST, port=gateway.port, user="alice", password=PASSWORD, dbname="postgres", autocommit=True
    ) as client:
        client.execute("select 'Bücher'")
        client.execute("select %s::text", ["a bound value"])
        client.execute("select %s::int", [4711], prepare=True)
        with client.cursor().copy("copy audited from stdin") as copy:
            copy.write("a copied value\n")
        with client.pipeline():
            client.execute("select 1 + %s", [1])
            client.execute("select 2 + %s", [2])
    wait_for(file, "end")
    session = lines_of(file, "login")[0]["session"]
    statements = lines_of(file, "statement")
    assert {line["session"] for line in statements} == {session}
    said = [(line["message"], line["sql"]) for line in statements]
    assert said == [
        ("query", "select 'Bücher'"),
        ("parse", "select $1::text"),
        ("parse", "select $1::int"),
        ("query", "copy audited from stdin"),
        ("parse", "select 1 + $1"),
        ("parse", "select 2 + $1"),
    ]
    written = file.read_text()
    assert not [value for value in ("a bound value", "4711", "a copied value") if value in written]


def test_a_statement_is_cut_where_it_is_too_long(start_gateway: StartGateway, mapped: Path, file: Path) -> None:
    gateway = start_gateway(mapped, audit={"file": str(file), "statements": True, "max_statement": 2000})
    long = f"select 42 -- {'x' * 300_000}"
    with RawClient(gateway.port) as client:
        client.log_in()
        client.send(query(long))
        assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")
    (line,) = lines_of(file, "statement")
    assert (line["sql"], line["cut"], line["bytes"]) == (long[:2000], True, len(long))


def test_statements_over_tls_are_in_it(
    tmp_path: Path, authority: Authority, tls_postgres: ThrowawayPostgres, file: Path
) -> None:
    identity = authority.issue("auditing gateway", "localhost", HOST)
    audit = {"file": str(file), "statements": True}
    with answering_gateway(tmp_path, tls=identity.settings, audit=audit) as answering:
        where = {"_META_TARGET_HOST": f"{HOST}:{tls_postgres.port}", "_META_TARGET_TLS": "require"}
        user = answering.user(where | {"user": "over_tls", "database": "postgres"})
        with TlsClient(answering.gateway.port, authority.client_context()) as client:
            client.log_in(user=user)
            client.assert_served()
    assert [line["sql"] for line in lines_of(file, "statement")] == ["select 42"]
    assert lines_of(file, "login")[0]["tls"].startswith("TLSv1.")


def test_no_statement_is_in_it_that_nobody_asked_for(start_gateway: StartGateway, mapped: Path, file: Path) -> None:
    gateway = start_gateway(mapped, audit={"file": str(file)})
    assert_serves(gateway.port)
    wait_for(file, "end")
    assert lines_of(file, "statement") == []
