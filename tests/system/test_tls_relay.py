"""What goes through a session with TLS on one side or both: every byte, in order, in bounded memory, to a clean end."""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.system.conftest import Answering, answering_gateway, wait_until
from tests.tls import HOST, Authority, Identity, TlsClient, opens_with_tls, server_context
from tests.wire import (
    AUTH_OK,
    KEY,
    READY,
    RESET_ON_CLOSE,
    SSL_REQUEST,
    RawClient,
    ScriptedTarget,
    greet,
    message,
    password,
    query,
    read_exactly,
    read_startup,
    startup,
)

SECONDS = 60
MEGABYTE = 1024 * 1024
MAX_GROWTH = 16 * MEGABYTE
TRUNCATED = "the {} ended TLS without saying so: its last words may be missing"
SIDES = ["client", "target", "both"]
NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

Script = Callable[[socket.socket], None]


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Answering]:
    """A gateway that speaks TLS with those who ask for it."""
    identity = authority.issue("relaying gateway", "localhost", HOST)
    with answering_gateway(tmp_path_factory.mktemp("answering"), tls=identity.settings) as found:
        yield found


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    return authority.client_context()


@pytest.fixture(scope="module")
def target_identity(authority: Authority) -> Identity:
    return authority.issue("relayed target", "localhost", HOST)


class Sides:
    """Sessions with TLS on the sides that are named."""

    def __init__(self, answering: Answering, context: ssl.SSLContext, identity: Identity, sides: str) -> None:
        self.answering = answering
        self.gateway = answering.gateway
        self._context = context
        self._identity = identity
        self.client_has_tls = sides in ("client", "both")
        self.target_has_tls = sides in ("target", "both")

    def user(self, target: ScriptedTarget | ThrowawayPostgres) -> str:
        """Somebody who is sent there."""
        mode = "require" if self.target_has_tls else "disable"
        where = {"_META_TARGET_HOST": f"{HOST}:{target.port}", "_META_TARGET_TLS": mode}
        return self.answering.user(where | {"user": "trusted", "database": "postgres"})

    def target(self, script: Script) -> ScriptedTarget:
        opens = opens_with_tls(server_context(self._identity)) if self.target_has_tls else None
        return ScriptedTarget(script, opens=opens)

    def connect(self) -> RawClient:
        port = self.gateway.port
        return TlsClient(port, self._context) if self.client_has_tls else RawClient(port)

    @contextlib.contextmanager
    def session(self, script: Script) -> Iterator[tuple[RawClient, str]]:
        """A client that is logged in to a target that does this once it is, and the session's id."""

        def greets(connection: socket.socket) -> None:
            greet(connection)
            script(connection)

        with self.target(greets) as target, self.connect() as client:
            user = self.user(target)
            client.log_in(user=user)
            yield client, self.gateway.wait_for("login", user=user)["session"]

    def psycopg(self, postgres: ThrowawayPostgres) -> psycopg.Connection[Any]:
        sslmode = "require" if self.client_has_tls else "disable"
        where: dict[str, Any] = {"host": HOST, "port": self.gateway.port, "user": self.user(postgres)}
        return psycopg.connect(**where, dbname="postgres", password="x", sslmode=sslmode)


@pytest.fixture(params=SIDES)
def sides(
    request: pytest.FixtureRequest, answering: Answering, context: ssl.SSLContext, target_identity: Identity
) -> Sides:
    return Sides(answering, context, target_identity, request.param)


@pytest.fixture
def both(answering: Answering, context: ssl.SSLContext, target_identity: Identity) -> Sides:
    return Sides(answering, context, target_identity, "both")


def read_and_drop(connection: socket.socket) -> None:
    while connection.recv(65536):
        continue


# Every byte, in order


def test_copy_moves_fifty_megabytes_both_ways_unchanged(sides: Sides, tls_postgres: ThrowawayPostgres) -> None:
    sent, received = hashlib.sha256(), hashlib.sha256()
    source = random.Random(50)
    with sides.psycopg(tls_postgres) as session:
        assert session.pgconn.ssl_in_use == sides.client_has_tls
        encrypted = session.execute("select ssl from pg_stat_ssl where pid = pg_backend_pid()").fetchone()
        assert encrypted == (sides.target_has_tls,)
        session.execute("set synchronize_seqscans = off")
        session.execute("create temp table bulk (line text)")
        cursor = session.cursor()
        with cursor.copy("copy bulk from stdin") as copy_in:
            for _ in range(50):
                text = source.randbytes(MEGABYTE // 2).hex().encode()
                block = b"\n".join(text[at : at + 1024] for at in range(0, MEGABYTE, 1024)) + b"\n"
                sent.update(block)
                copy_in.write(block)
        with cursor.copy("copy bulk to stdout") as copy_out:
            for block in copy_out:
                received.update(block)
    assert received.digest() == sent.digest()


def test_a_row_of_a_megabyte_and_many_of_a_byte_arrive(sides: Sides, tls_postgres: ThrowawayPostgres) -> None:
    blob = random.Random(1).randbytes(MEGABYTE)
    with sides.psycopg(tls_postgres) as session:
        assert session.execute("select %b::bytea", [blob], binary=True).fetchone() == (blob,)
        for number in range(300):
            assert session.execute("select %s::int", [number]).fetchone() == (number,)
        assert len(session.execute("select 'x' from generate_series(1, 100000)").fetchall()) == 100_000
        assert session.execute("select %b::bytea", [blob], binary=True).fetchone() == (blob,)


def test_a_pipeline_of_a_thousand_statements_is_answered_in_order(
    sides: Sides, tls_postgres: ThrowawayPostgres
) -> None:
    with sides.psycopg(tls_postgres) as session:
        with session.pipeline():
            cursors = [session.execute("select %s::int", [number]) for number in range(1000)]
        assert [cursor.fetchone() for cursor in cursors] == [(number,) for number in range(1000)]


# Below, at and above what one record holds, and what the forwarding buffer does.
SIZES = [1, 2, 16_383, 16_384, 16_385, 32_768, 65_535, 65_536, 65_537, 200_003]


@pytest.mark.parametrize("size", SIZES)
def test_pieces_of_every_size_arrive_whole_both_ways(sides: Sides, size: int) -> None:
    piece = random.Random(size).randbytes(size)

    def script(connection: socket.socket) -> None:
        for _ in range(3):
            assert read_exactly(connection, size) == piece
            connection.sendall(piece)
        read_and_drop(connection)

    with sides.session(script) as (client, _):
        for _ in range(3):
            client.send(piece)
            assert client.read(size) == piece


def test_bytes_go_both_ways_at_once(sides: Sides) -> None:
    there, back = random.Random(1).randbytes(10 * MEGABYTE), random.Random(2).randbytes(10 * MEGABYTE)
    received: list[bytes] = []

    def script(connection: socket.socket) -> None:
        received.append(swap(connection, back, len(there)))
        connection.sendall(b"done")
        read_and_drop(connection)

    with sides.session(script) as (client, _):
        assert swap(client.socket, there, len(back)) == back
        assert client.read(4) == b"done"
    assert received == [there]


def swap(connection: socket.socket, sent: bytes, size: int) -> bytes:
    """Sends and receives at once; in one thread, since two must not share a connection of OpenSSL's."""
    connection.setblocking(False)
    left, received = memoryview(sent), bytearray()
    while left or len(received) < size:
        moved = False
        with contextlib.suppress(*NOT_NOW):
            if left:
                left = left[connection.send(left[:65536]) :]
                moved = True
        with contextlib.suppress(*NOT_NOW):
            if len(received) < size:
                chunk = connection.recv(min(65536, size - len(received)))
                assert chunk, "an end too early"
                received += chunk
                moved = True
        if not moved:
            select.select([connection], [connection] if left else [], [], SECONDS)
    connection.settimeout(SECONDS)
    return bytes(received)


def test_what_a_client_sends_byte_by_byte_is_forwarded_before_the_next_is_sent(sides: Sides) -> None:
    arrived = threading.Semaphore(0)
    words = query("select 1")

    def script(connection: socket.socket) -> None:
        for byte in words:
            assert connection.recv(1) == bytes([byte])
            arrived.release()
        connection.sendall(READY)
        read_and_drop(connection)

    with sides.session(script) as (client, _):
        for byte in words:
            client.send(bytes([byte]))
            assert arrived.acquire(timeout=SECONDS)
        client.read_until(b"Z")


def test_what_trickles_in_is_forwarded_before_the_next_is_sent(sides: Sides) -> None:
    arrived = threading.Semaphore(0)
    pieces = [random.Random(number).randbytes(7) for number in range(20)]

    def script(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)
            assert arrived.acquire(timeout=SECONDS)
        read_and_drop(connection)

    with sides.session(script) as (client, _):
        for piece in pieces:
            assert client.read(7) == piece
            arrived.release()


def test_records_that_come_in_pieces_are_put_together(both: Sides, context: ssl.SSLContext) -> None:
    """A client whose records the network cuts at every byte."""
    words = random.Random(3).randbytes(300)
    received: list[bytes] = []

    def script(connection: socket.socket) -> None:
        greet(connection)
        received.append(read_exactly(connection, len(words)))
        connection.sendall(b"got it")
        read_and_drop(connection)

    with both.target(script) as target, RawClient(both.gateway.port) as client:
        tls = InMemory(client, context)
        tls.send(startup(user=both.user(target)))
        tls.read(13)
        tls.send(password())
        while not tls.read(1 << 16).endswith(READY):
            continue
        for byte in tls.records(words):
            client.send(bytes([byte]))
        assert tls.read(6) == b"got it"
    assert received == [words]


class InMemory:
    """A client's TLS whose records a test holds in its hands."""

    def __init__(self, client: RawClient, context: ssl.SSLContext, *, direct: bool = False) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.client = client
        if not direct:
            client.send(SSL_REQUEST)
            assert client.read(1) == b"S"

    def handshake(self) -> bytes:
        """What ends the handshake, not sent yet (TLS 1.3)."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.client.send(self.outgoing.read())
                self.incoming.write(self.client.socket.recv(65536))
            else:
                return self.outgoing.read()

    def records(self, words: bytes) -> bytes:
        self.tls.write(words)
        return self.outgoing.read()

    def send(self, words: bytes) -> None:
        if not self.tls.version() or not self.tls.cipher():
            self.client.send(self.handshake())
        self.client.send(self.records(words))

    def read(self, size: int) -> bytes:
        """What comes next, at most so much. Raises EOFError behind a close_notify, ssl.SSLEOFError without one."""
        while True:
            try:
                data = self.tls.read(size)
            except ssl.SSLWantReadError:
                received = self.client.socket.recv(65536)
                if received:
                    self.incoming.write(received)
                else:
                    self.incoming.write_eof()
            except ssl.SSLZeroReturnError:
                raise EOFError from None
            else:
                return data


# Behind the handshake, and behind the password


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_sent_right_behind_the_handshake_is_part_of_it(
    both: Sides, context: ssl.SSLContext, tls_postgres: ThrowawayPostgres, *, direct: bool
) -> None:
    with RawClient(both.gateway.port) as client:
        tls = InMemory(client, context, direct=direct)
        # In one segment: the end of the handshake, the startup packet, the password and a query.
        finished = tls.handshake()
        words = startup(user=both.user(tls_postgres)) + password() + query("select 42")
        client.send(finished + tls.records(words))
        heard = b""
        while heard.count(READY) < 2:
            heard += tls.read(1 << 16)
    assert b"D\0\0\0\x0c\0\x01\0\0\0\x0242" in heard


def test_a_lot_sent_behind_the_password_reaches_the_target_in_order(sides: Sides) -> None:
    sent = random.Random(1).randbytes(3 * MEGABYTE)
    received: list[bytes] = []

    def script(connection: socket.socket) -> None:
        greet(connection)
        received.append(read_exactly(connection, len(sent)))
        connection.sendall(b"done")
        read_and_drop(connection)

    with sides.target(script) as target, sides.connect() as client:
        client.send(startup(user=sides.user(target)))
        client.read_message()
        client.send(password() + sent)
        client.read_until(b"Z")
        assert client.read(4) == b"done"
    assert received == [sent]


@pytest.mark.parametrize("size", [1, 1000, 3 * MEGABYTE])
def test_what_the_target_sends_behind_ready_for_query_arrives(sides: Sides, size: int) -> None:
    behind = random.Random(size).randbytes(size)

    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(AUTH_OK + KEY + READY + behind)
        read_and_drop(connection)

    with sides.target(script) as target, sides.connect() as client:
        client.log_in(user=sides.user(target))
        assert client.read(size) == behind


# Ends


def says_goodbye(connection: socket.socket) -> None:
    """Ends a connection as its protocol has it: with TLS by a close_notify."""
    if isinstance(connection, ssl.SSLSocket):
        with contextlib.suppress(ssl.SSLError, OSError):
            connection.unwrap()
    else:
        connection.shutdown(socket.SHUT_WR)


def raw_fd_of(connection: socket.socket) -> socket.socket:
    """The connection below TLS, for what TLS would not do."""
    return socket.socket(fileno=connection.detach())


def test_a_client_that_says_it_sends_no_more_still_gets_its_answer(sides: Sides) -> None:
    answer = random.Random(5).randbytes(2 * MEGABYTE)
    heard: list[bytes] = []
    may_answer = threading.Event()

    def script(connection: socket.socket) -> None:
        heard.append(read_exactly(connection, 9))
        # The half-close reaches the target, by which time nothing has been answered.
        assert connection.recv(1) == b""
        assert may_answer.wait(SECONDS)
        connection.sendall(answer)
        says_goodbye(connection)

    with sides.session(script) as (client, session):
        client.send(b"the query")
        if isinstance(client, TlsClient):
            end_writing(client)
        else:
            client.socket.shutdown(socket.SHUT_WR)
        may_answer.set()
        assert read_exactly(client.socket, len(answer)) == answer
        assert client.read_to_end() == b""
        line = sides.gateway.wait_for("session ended", session=session)
    assert heard == [b"the query"]
    assert line["why"] == "client closed"
    assert "detail" not in line


def end_writing(client: TlsClient) -> None:
    """Sends a close_notify, so that reading can go on; nothing may come meanwhile."""
    client.tls.setblocking(False)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.tls.unwrap()
    client.tls.settimeout(SECONDS)


def test_what_the_target_said_last_arrives_before_a_clean_end(sides: Sides) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(bytes(5 * MEGABYTE) + b"the end")
        says_goodbye(connection)

    with sides.session(script) as (client, session):
        # With TLS an end without close_notify would raise.
        assert client.read_to_end() == bytes(5 * MEGABYTE) + b"the end"
        line = sides.gateway.wait_for("session ended", session=session)
    assert line["why"] == "target closed"
    assert "detail" not in line


def test_a_client_that_terminates_and_says_goodbye_is_nothing_to_remark_on(
    both: Sides, tls_postgres: ThrowawayPostgres
) -> None:
    with both.connect() as client:
        user = both.user(tls_postgres)
        client.log_in(user=user)
        client.send(message(b"X"))
        assert client.read_to_end() == b""
    session = both.gateway.wait_for("login", user=user)["session"]
    line = both.gateway.wait_for("session ended", session=session)
    assert (line["why"], line["bytes_from_client"]) == ("client closed", 5)


@pytest.mark.parametrize("sides", ["client", "both"], indirect=True)
def test_what_a_client_sent_before_it_was_cut_off_is_passed_on_and_the_cut_logged(sides: Sides) -> None:
    received: list[bytes] = []

    def script(connection: socket.socket) -> None:
        received.append(read_exactly(connection, MEGABYTE + 1))

    with sides.session(script) as (client, session):
        client.send(bytes(MEGABYTE))
        raw_fd_of(client.socket).close()
        line = sides.gateway.wait_for("session ended", session=session)
    assert received == [bytes(MEGABYTE)]
    assert line["detail"] == TRUNCATED.format("client")
    assert line["bytes_from_client"] == MEGABYTE


@pytest.mark.parametrize("sides", ["target", "both"], indirect=True)
def test_what_a_target_sent_before_it_was_cut_off_is_passed_on_and_the_cut_logged(sides: Sides) -> None:
    def script(connection: socket.socket) -> None:
        connection.sendall(bytes(MEGABYTE))
        raw_fd_of(connection).close()

    with sides.session(script) as (client, session):
        assert client.read_to_end() == bytes(MEGABYTE)
        line = sides.gateway.wait_for("session ended", session=session)
    assert (line["why"], line["detail"]) == ("target closed", TRUNCATED.format("target"))
    assert line["bytes_from_target"] == MEGABYTE


@pytest.mark.parametrize("sides", ["client", "both"], indirect=True)
def test_a_client_that_is_reset_closes_its_target(sides: Sides) -> None:
    closed = threading.Event()

    def script(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            read_and_drop(connection)
        closed.set()

    with sides.session(script) as (client, session):
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        raw_fd_of(client.socket).close()
        line = sides.gateway.wait_for("session ended", session=session)
        assert closed.wait(SECONDS)
    assert line["why"] == "client connection lost"


def test_a_session_that_is_ended_is_told_to_a_client_over_tls(
    tmp_path: Path, authority: Authority, context: ssl.SSLContext, tls_postgres: ThrowawayPostgres
) -> None:
    identity = authority.issue("ended gateway", "localhost")
    with answering_gateway(tmp_path, tls=identity.settings, drain_timeout=0) as answering:
        where = {"_META_TARGET_HOST": f"{HOST}:{tls_postgres.port}", "_META_TARGET_TLS": "require"}
        user = answering.user(where | {"user": "trusted", "database": "postgres"})
        with TlsClient(answering.gateway.port, context) as client:
            client.log_in(user=user)
            client.assert_served()
            answering.gateway.process.send_signal(signal.SIGTERM)
            assert client.read_fatal() == ("57P01", "terminating connection due to administrator command")
        answering.gateway.process.wait(SECONDS)


def test_a_time_limit_is_told_to_a_client_over_tls(both: Sides, tls_postgres: ThrowawayPostgres) -> None:
    where = {"_META_TARGET_HOST": f"{HOST}:{tls_postgres.port}", "_META_SESSION_SECONDS": "0.2"}
    user = both.answering.user(where | {"user": "trusted", "database": "postgres"})
    with both.connect() as client:
        client.log_in(user=user)
        assert client.read_fatal() == ("57P01", "terminating connection: its time limit is reached")


def test_a_backend_that_is_terminated_says_so_over_tls(both: Sides, tls_postgres: ThrowawayPostgres) -> None:
    with both.connect() as client:
        client.log_in(user=both.user(tls_postgres))
        client.send(query("select pg_backend_pid()"))
        pid = int(next(body for kind, body in client.read_until(b"Z") if kind == b"D")[6:])
        tls_postgres.sql(f"select pg_terminate_backend({pid})")
        error = client.read_error()
    assert error["C"] == "57P01"


# Attacks


@pytest.mark.parametrize("sides", ["client", "both"], indirect=True)
@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"not a record at all", id="no record"),
        pytest.param(b"\x17\x03\x03\x00\x20" + bytes(32), id="a record of zeros"),
        pytest.param(b"\x17\x03\x03\xff\xff" + bytes(100), id="a record that is too long"),
        pytest.param(b"\x16\x03\x03\x00\x04\x00\x00\x00\x00", id="a handshake in plain"),
        pytest.param(query("select 1"), id="a query in plain"),
    ],
)
def test_garbage_from_a_client_in_mid_session_closes_both_sides(sides: Sides, garbage: bytes) -> None:
    received: list[bytes] = []
    closed = threading.Event()

    def script(connection: socket.socket) -> None:
        received.append(read_exactly(connection, 5))
        with contextlib.suppress(OSError):
            received.append(read_exactly(connection, 1))
        closed.set()

    with sides.session(script) as (client, session):
        client.send(b"right")
        wait_until(lambda: received, "what was right to arrive")
        with raw_fd_of(client.socket) as raw:
            raw.settimeout(SECONDS)
            raw.sendall(garbage)
            with contextlib.suppress(ConnectionResetError):
                while raw.recv(65536):
                    continue
        line = sides.gateway.wait_for("session ended", session=session)
        assert closed.wait(SECONDS)
    assert received in ([b"right", b""], [b"right"])
    assert line["why"] == "client connection lost"
    assert line["detail"]


@pytest.mark.parametrize("sides", ["target", "both"], indirect=True)
def test_garbage_from_a_target_in_mid_session_closes_both_sides(sides: Sides) -> None:
    def script(connection: socket.socket) -> None:
        assert read_exactly(connection, 2) == b"go"
        connection.sendall(b"right")
        with raw_fd_of(connection) as raw:
            raw.settimeout(SECONDS)
            raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            with contextlib.suppress(OSError):
                read_and_drop(raw)

    with sides.session(script) as (client, session):
        client.send(b"go")
        assert client.read_to_end() == b"right"
        line = sides.gateway.wait_for("session ended", session=session)
    assert line["why"] == "target connection lost"
    assert line["detail"]


class OpensslClient:
    """OpenSSL's own client, which does by a letter what Python's ssl cannot: R renegotiates, K asks for new keys."""

    def __init__(self, port: int, version: str, ca: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("no openssl on this machine")
        command = ["openssl", "s_client", "-connect", f"{HOST}:{port}", f"-{version}", "-starttls", "postgres"]
        # Quiet, it would take letters for what is to be sent, were it not for the second of these.
        self.process = subprocess.Popen(
            [*command, "-CAfile", str(ca), "-quiet", "-no_ign_eof"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        self.heard = b""

    def __enter__(self) -> OpensslClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, words: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(words)

    def wait_for(self, words: bytes) -> None:
        """Returns once this was said, by either side; drops what came up to there."""
        assert self.process.stdout is not None
        while words not in self.heard:
            assert select.select([self.process.stdout], [], [], SECONDS)[0], self.heard
            said = self.process.stdout.read(65536)
            assert said, self.heard
            self.heard += said
        self.heard = self.heard.partition(words)[2]


def test_renegotiation_is_refused(both: Sides, authority: Authority, tls_postgres: ThrowawayPostgres) -> None:
    with OpensslClient(both.gateway.port, "tls1_2", authority.cert) as client:
        client.send(startup(user=both.user(tls_postgres)))
        client.wait_for(b"R\0\0\0\x0c\0\0\0\x05")
        client.send(password())
        client.wait_for(READY)
        client.send(b"R\n")
        client.wait_for(b"RENEGOTIATING")
        client.wait_for(b"no renegotiation")
    with both.connect() as another:
        another.log_in(user=both.user(tls_postgres))
        another.assert_served()


def test_a_client_may_change_its_keys_and_go_on(
    both: Sides, authority: Authority, tls_postgres: ThrowawayPostgres
) -> None:
    with OpensslClient(both.gateway.port, "tls1_3", authority.cert) as client:
        client.send(startup(user=both.user(tls_postgres)))
        client.wait_for(b"R\0\0\0\x0c\0\0\0\x05")
        # Within the login, and later in the session.
        client.send(b"K\n")
        client.wait_for(b"KEYUPDATE")
        client.send(password())
        client.wait_for(READY)
        for number in (b"41", b"42"):
            client.send(b"K\n")
            client.wait_for(b"KEYUPDATE")
            client.send(asking(b"select " + number))
            client.wait_for(b"D\0\0\0\x0c\0\x01\0\0\0\x02" + number)
            client.wait_for(READY)


def asking(sql: bytes) -> bytes:
    """A query of the extended protocol: one that begins with Q would be an order to OpenSSL's client."""
    parse = message(b"P", b"\0" + sql + b"\0\0\0")
    return parse + message(b"B", b"\0\0\0\0\0\0\0\0") + message(b"E", b"\0\0\0\0\0") + message(b"S")


# In bounded memory


def pour_until_stuck(connection: socket.socket) -> int:
    """Sends zeros until nobody has taken any for half a second; how many there were."""
    poured = 0
    connection.settimeout(0.5)
    while poured < 200 * MEGABYTE:
        try:
            poured += connection.send(bytes(65536))
        except TimeoutError:
            connection.settimeout(SECONDS)
            return poured
    raise AssertionError("nothing held it up")


def test_a_reader_that_stops_holds_up_the_sender_and_no_memory(sides: Sides) -> None:
    poured = 0
    stuck = threading.Event()

    def script(connection: socket.socket) -> None:
        nonlocal poured
        poured = pour_until_stuck(connection)
        stuck.set()
        read_and_drop(connection)

    with sides.session(script) as (client, _):
        before_it = sides.gateway.resident_bytes
        assert stuck.wait(SECONDS)
        assert sides.gateway.peak_bytes - before_it <= MAX_GROWTH
        assert read_exactly(client.socket, poured) == bytes(poured)


def test_a_row_of_fifty_megabytes_takes_no_memory_of_the_gateway(sides: Sides, tls_postgres: ThrowawayPostgres) -> None:
    size = 50_000_000
    with sides.connect() as client:
        client.log_in(user=sides.user(tls_postgres))
        before_it = sides.gateway.resident_bytes
        client.send(query(f"select repeat('x', {size})"))
        assert client.read_message()[0] == b"T"
        kind, length = struct.unpack("!ci", client.read(5))
        assert (kind, length) == (b"D", size + 10)
        space, counted = bytearray(MEGABYTE), 0
        while counted < length - 4:
            counted += client.socket.recv_into(space, min(MEGABYTE, length - 4 - counted))
        client.read_until(b"Z")
        assert sides.gateway.peak_bytes - before_it <= MAX_GROWTH


def test_a_target_that_stops_reading_holds_up_the_client_and_no_memory(sides: Sides) -> None:
    go_on = threading.Event()
    received: list[bytes] = []
    poured = 0

    def script(connection: socket.socket) -> None:
        assert go_on.wait(SECONDS)
        received.append(read_exactly(connection, poured))
        connection.sendall(b"the end")
        read_and_drop(connection)

    with sides.session(script) as (client, _):
        before_it = sides.gateway.resident_bytes
        poured = pour_until_stuck(client.socket)
        assert sides.gateway.peak_bytes - before_it <= MAX_GROWTH
        go_on.set()
        assert client.read(7) == b"the end"
    assert received == [bytes(poured)]
