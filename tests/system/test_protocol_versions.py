"""Protocol 3.0 and 3.2: what is negotiated with each side, how long cancel keys are, and that they cancel."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import HBA, ROLES
from tests.system.conftest import DEBIAN, Answering, Backends, answering_gateway, wait_until
from tests.tls import HOST, Authority, TlsClient
from tests.wire import (
    AUTH_OK,
    CANCEL_REQUEST,
    READY,
    RawClient,
    ScriptedTarget,
    cancel_request,
    error_fields,
    message,
    password,
    query,
    read_startup,
    startup,
)

SECONDS = 30
V3_0, V3_2 = 3 << 16, (3 << 16) + 2
GREASED = (3 << 16) + 9999
# What the client asks for, and what it is spoken to then.
VERSIONS = {V3_0: V3_0, V3_0 + 1: V3_0 + 1, V3_2: V3_2, V3_0 + 3: V3_2, GREASED: V3_2}
PROCESS_ID, SHORT, LONG = 4, 4, 32
LONG_KEYS_SINCE = 18

needs_debian = pytest.mark.skipif(DEBIAN is None, reason="no PostgreSQL of Debian's here")


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Callable[[str], Answering]]:
    """The gateway that asks targets for a version: started when first wanted, there until the file is done."""
    started: dict[str, Answering] = {}
    identity = authority.issue("versions", "localhost")
    with contextlib.ExitStack() as stack:

        def gateway(version: str) -> Answering:
            if version not in started:
                folder = tmp_path_factory.mktemp(f"gateway-{version}")
                found = answering_gateway(folder, target={"protocol": version}, tls=identity.settings)
                started[version] = stack.enter_context(found)
            return started[version]

        yield gateway


@pytest.fixture(params=["3.0", "3.2"], ids=lambda version: f"target {version}")
def answering(request: pytest.FixtureRequest, gateways: Callable[[str], Answering]) -> Answering:
    """A gateway that asks targets for either version."""
    return gateways(request.param)


@pytest.fixture(scope="module")
def older_postgres() -> Iterator[ThrowawayPostgres]:
    """Debian's PostgreSQL, which mostly knows no 3.2."""
    if DEBIAN is None:
        pytest.skip("no PostgreSQL of Debian's here")
    with ThrowawayPostgres(binaries=DEBIAN, hba=HBA) as server:
        server.sql(ROLES)
        yield server


@pytest.fixture(params=["newest", "older"])
def server(request: pytest.FixtureRequest) -> ThrowawayPostgres:
    """PostgreSQL 18, and one that is older."""
    found: ThrowawayPostgres = request.getfixturevalue("postgres" if request.param == "newest" else "older_postgres")
    return found


def at(target: ThrowawayPostgres | ScriptedTarget) -> dict[str, str]:
    """The lines that send somebody there."""
    return {"_META_TARGET_HOST": f"{HOST}:{target.port}", "user": "trusted", "database": "postgres"}


def begin(client: RawClient, version: int, **parameters: str) -> list[tuple[bytes, bytes]]:
    """Logs in; all messages up to ReadyForQuery, those before the request for a password first."""
    client.send(startup(version, **parameters))
    before = client.read_until(b"R")
    client.send(password())
    return before + client.read_until(b"Z")


def key_of(messages: list[tuple[bytes, bytes]]) -> bytes:
    (key,) = [body for kind, body in messages if kind == b"K"]
    return key


def negotiated(messages: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [body for kind, body in messages if kind == b"v"]


def outcome(answering: Answering, key: bytes) -> str:
    """What comes of a cancel request with this key; its connection closes without a word."""
    with RawClient(answering.gateway.port) as canceller:
        client = "{}:{}".format(*canceller.socket.getsockname())
        canceller.send(cancel_request(key))
        assert canceller.read_to_end() == b""
    found: str = answering.gateway.wait_for("cancel request", client=client)["outcome"]
    return found


# Clients


@pytest.mark.parametrize("asked", VERSIONS, ids=lambda version: f"3.{version & 0xFFFF}")
def test_every_version_is_served_whatever_the_target_speaks(
    answering: Answering, server: ThrowawayPostgres, asked: int
) -> None:
    spoken = VERSIONS[asked]
    with RawClient(answering.gateway.port) as client:
        messages = begin(client, asked, user=answering.user(at(server)))
        assert negotiated(messages) == ([] if asked == spoken else [struct.pack("!ii", spoken, 0)])
        secret = LONG if spoken >= V3_2 else SHORT
        assert len(key_of(messages)) == PROCESS_ID + secret
        client.assert_served()


@pytest.mark.parametrize("version", [V3_0, V3_2], ids=["3.0", "3.2"])
@pytest.mark.parametrize("options", [("_pq_.new",), ("_pq_.b", "_pq_.a")], ids=str)
def test_options_of_the_protocol_are_declined_in_any_version(
    answering: Answering, postgres: ThrowawayPostgres, version: int, options: tuple[str, ...]
) -> None:
    with RawClient(answering.gateway.port) as client:
        user = answering.user(at(postgres))
        messages = begin(client, version, user=user, **{option: "on" for option in options})
        names = b"".join(option.encode() + b"\0" for option in options)
        assert negotiated(messages) == [struct.pack("!ii", version, len(options)) + names]
        # It comes first: what follows is in the version that it names.
        assert messages[0][0] == b"v"
        client.assert_served()


def test_what_is_negotiated_is_so_over_tls_too(
    answering: Answering, postgres: ThrowawayPostgres, authority: Authority
) -> None:
    for direct in (False, True):
        with TlsClient(answering.gateway.port, authority.client_context(), direct=direct) as client:
            messages = begin(client, GREASED, user=answering.user(at(postgres)))
            assert negotiated(messages) == [struct.pack("!ii", V3_2, 0)]
            assert len(key_of(messages)) == PROCESS_ID + LONG


@pytest.mark.parametrize("asked", [V3_0, V3_2, GREASED], ids=["3.0", "3.2", "3.9999"])
def test_the_key_cancels_and_the_session_goes_on(answering: Answering, server: ThrowawayPostgres, asked: int) -> None:
    backends = Backends(server)
    with RawClient(answering.gateway.port) as client:
        key = key_of(begin(client, asked, user=answering.user(at(server))))
        client.send(query("select pg_backend_pid()"))
        pid = int(next(body for kind, body in client.read_until(b"Z") if kind == b"D")[6:])
        client.send(query("select pg_sleep(60)"))
        wait_until(lambda: backends.sleeps(pid), "the query to begin")
        assert outcome(answering, key) == "passed on"
        errors = [error_fields(body)["C"] for kind, body in client.read_until(b"Z") if kind == b"E"]
        assert errors == ["57014"]
        client.assert_served()


def test_a_key_that_is_not_whole_or_not_right_is_nobodys(answering: Answering, postgres: ThrowawayPostgres) -> None:
    with RawClient(answering.gateway.port) as client:
        key = key_of(begin(client, V3_2, user=answering.user(at(postgres))))
        wrong = [
            key[:-1],
            key + b"\0",
            key[: PROCESS_ID + SHORT],
            key[:PROCESS_ID] + bytes(LONG),
            key[:-1] + bytes([key[-1] ^ 1]),
            key[:PROCESS_ID] + bytes([key[PROCESS_ID] ^ 1]) + key[PROCESS_ID + 1 :],
            key * 7,
        ]
        assert [outcome(answering, each) for each in wrong] == ["nobody's key"] * len(wrong)
        assert outcome(answering, key) == "passed on"
        client.assert_served()


def test_keys_of_either_length_stand_side_by_side(answering: Answering, postgres: ThrowawayPostgres) -> None:
    with contextlib.ExitStack() as stack:
        keys = []
        for number in range(10):
            client = stack.enter_context(RawClient(answering.gateway.port))
            keys.append(key_of(begin(client, V3_2 if number % 2 else V3_0, user=answering.user(at(postgres)))))
        assert [len(key) for key in keys] == [PROCESS_ID + SHORT, PROCESS_ID + LONG] * 5
        assert len({key[:PROCESS_ID] for key in keys}) == 10
        assert [outcome(answering, key) for key in keys] == ["passed on"] * 10


# libpq


@pytest.mark.parametrize(
    ("options", "spoken"),
    [
        ({}, 30000),
        ({"max_protocol_version": "3.0"}, 30000),
        ({"max_protocol_version": "latest"}, 30002),
        ({"min_protocol_version": "3.2", "max_protocol_version": "3.2"}, 30002),
    ],
    ids=str,
)
def test_libpq_speaks_what_it_is_told_to_and_cancels(
    answering: Answering, server: ThrowawayPostgres, options: dict[str, Any], spoken: int
) -> None:
    backends = Backends(server)
    where = {"host": HOST, "port": answering.gateway.port, "user": answering.user(at(server)), "dbname": "postgres"}
    with psycopg.connect(**(where | options), password="x") as session:
        assert session.info.full_protocol_version == spoken
        (pid,) = session.execute("select pg_backend_pid()").fetchone()

        def cancel_once_it_sleeps() -> None:
            wait_until(lambda: backends.sleeps(pid), "the query to begin")
            session.cancel_safe()

        canceller = threading.Thread(target=cancel_once_it_sleeps)
        canceller.start()
        try:
            with pytest.raises(psycopg.errors.QueryCanceled):
                session.execute("select pg_sleep(60)")
        finally:
            canceller.join(SECONDS)


@needs_debian
def test_psql_of_an_older_libpq_is_served(answering: Answering, server: ThrowawayPostgres) -> None:
    assert DEBIAN is not None
    where = f"host={HOST} port={answering.gateway.port} user={answering.user(at(server))} dbname=postgres"
    done = subprocess.run(
        [DEBIAN / "psql", "-XAtc", "select 42", where],
        capture_output=True,
        env=os.environ | {"PGPASSWORD": "x"},
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"42\n"), done.stderr


# Targets


class Versioned:
    """A target that speaks a version as a server would that knows this one; it remembers what it was asked for."""

    def __init__(self, knows: int, key: bytes, extra: bytes = b"") -> None:
        self.asked: list[int] = []
        self.cancelled: list[bytes] = []
        self._knows = knows
        self._key = key
        self._extra = extra

    def __call__(self, connection: socket.socket) -> None:
        packet = read_startup(connection)
        code = struct.unpack("!i", packet[:4])[0]
        if code == CANCEL_REQUEST:
            self.cancelled.append(packet[4:])
            return
        self.asked.append(code)
        down = message(b"v", struct.pack("!ii", self._knows, 0)) if code > self._knows else b""
        connection.sendall(down + self._extra + AUTH_OK + message(b"K", self._key) + READY)
        while connection.recv(65536):
            continue


@pytest.mark.parametrize("version", ["3.0", "3.2"])
def test_targets_are_asked_for_the_version_of_the_configuration(
    gateways: Callable[[str], Answering], version: str
) -> None:
    answering, script = gateways(version), Versioned(V3_2, bytes(36))
    with ScriptedTarget(script) as target:
        for asked in (V3_0, V3_2):
            with RawClient(answering.gateway.port) as client:
                begin(client, asked, user=answering.user(at(target)))
    assert script.asked == [V3_0 if version == "3.0" else V3_2] * 2


def test_a_target_that_is_older_is_spoken_to_in_its_own_version(gateways: Callable[[str], Answering]) -> None:
    answering, script = gateways("3.2"), Versioned(V3_0, bytes(8))
    with ScriptedTarget(script) as target, RawClient(answering.gateway.port) as client:
        messages = begin(client, V3_2, user=answering.user(at(target)))
        # What the two of them settle is no business of the client's.
        assert negotiated(messages) == []
        assert len(key_of(messages)) == PROCESS_ID + LONG
    assert script.asked == [V3_2]


@pytest.mark.parametrize("length", [8, 12, 36, 132, 260])
@pytest.mark.parametrize("asked", [V3_0, V3_2], ids=["3.0", "3.2"])
def test_the_target_gets_its_own_key_back_however_long_it_is(
    gateways: Callable[[str], Answering], length: int, asked: int
) -> None:
    key = bytes(range(length % 256)) if length < 256 else bytes(range(256)) + b"end."
    assert len(key) == length
    answering, script = gateways("3.2"), Versioned(V3_2, key)
    with ScriptedTarget(script) as target, RawClient(answering.gateway.port) as client:
        ours = key_of(begin(client, asked, user=answering.user(at(target))))
        assert len(ours) == PROCESS_ID + (LONG if asked == V3_2 else SHORT)
        assert outcome(answering, ours) == "passed on"
    assert script.cancelled == [key]


@pytest.mark.parametrize("length", [0, 4, 7, 261, 1000])
def test_a_key_of_a_length_that_no_version_has_breaks_the_protocol(answering: Answering, length: int) -> None:
    with ScriptedTarget(Versioned(V3_2, bytes(length))) as target:
        error, reason = answering.refused(at(target))
    assert error["C"] == "08P01"
    assert "BackendKeyData" in reason


def test_a_target_that_negotiates_twice_breaks_the_protocol(gateways: Callable[[str], Answering]) -> None:
    again = message(b"v", struct.pack("!ii", V3_0, 0))
    with ScriptedTarget(Versioned(V3_0, bytes(8), again)) as target:
        error, _ = gateways("3.2").refused(at(target))
    assert error["C"] == "08P01"


def test_postgresql_gives_long_keys_where_it_is_asked_for_them(
    gateways: Callable[[str], Answering], server: ThrowawayPostgres
) -> None:
    """Seen from the outside: a relay of the test's own stands between, and reads the key that goes by."""
    long = int(server.sql("show server_version_num")) >= LONG_KEYS_SINCE * 10_000
    for version, length in (("3.0", 8), ("3.2", 36 if long else 8)):
        answering, seen = gateways(version), bytearray()

        def script(connection: socket.socket, seen: bytearray = seen) -> None:
            with socket.create_connection((HOST, server.port), SECONDS) as onward:
                threading.Thread(target=pump, args=(connection, onward, bytearray()), daemon=True).start()
                pump(onward, connection, seen)

        with ScriptedTarget(script) as target, RawClient(answering.gateway.port) as client:
            begin(client, V3_2, user=answering.user(at(target)))
        at_key = seen.index(b"K\0\0\0")
        assert seen[at_key + 4] - 4 == length


def pump(source: socket.socket, sink: socket.socket, seen: bytearray) -> None:
    """Passes on what comes, and remembers it."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            seen += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)
