"""Cancel requests: with the right key they reach the target, with any other nobody."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway
from tests.system.conftest import PASSWORD, Backends, wait_until
from tests.wire import (
    AUTH_OK,
    CANCEL_REQUEST,
    KEY,
    READY,
    RawClient,
    ScriptedTarget,
    cancel_request,
    error_fields,
    message,
    query,
    read_startup,
    refuse_tls,
)

SECONDS = 30
TARGET_KEY = KEY[5:]

MappedTo = Callable[..., Gateway]


def send_cancel(gateway: Gateway, key: bytes) -> bytes:
    """Sends a cancel request as libpq does, and returns what came before the connection closed."""
    with RawClient(gateway.port) as canceller:
        canceller.send(cancel_request(key))
        return canceller.read_to_end()


def key_of(greeting: list[tuple[bytes, bytes]]) -> bytes:
    (key,) = [body for kind, body in greeting if kind == b"K"]
    return key


def sleep_endlessly(client: RawClient, backends: Backends) -> None:
    client.send(query("select pg_backend_pid()"))
    pid = int(next(body for kind, body in client.read_until(b"Z") if kind == b"D")[6:])
    client.send(query("select pg_sleep(30)"))
    wait_until(lambda: backends.sleeps(pid), "the query to begin")


class Cancels:
    """A target that lets anybody in with a given key, and remembers the cancel requests that it gets."""

    def __init__(self, key: bytes = TARGET_KEY) -> None:
        self.received: list[bytes] = []
        self.connections = 0
        self.answer = threading.Event()
        self.answer.set()
        self._greeting = AUTH_OK + (message(b"K", key) if key else b"") + READY

    def __call__(self, connection: socket.socket) -> None:
        self.connections += 1
        packet = read_startup(connection)
        if packet[:4] == struct.pack("!i", CANCEL_REQUEST):
            self.received.append(packet[4:])
            assert self.answer.wait(SECONDS)
            return
        connection.sendall(self._greeting)
        while connection.recv(65536):
            continue


@pytest.fixture
def cancels() -> Cancels:
    return Cancels()


@pytest.fixture
def scripted(cancels: Cancels) -> Iterator[ScriptedTarget]:
    with ScriptedTarget(cancels) as target:
        yield target


@pytest.fixture
def scripted_gateway(scripted: ScriptedTarget, mapped_to: MappedTo) -> Gateway:
    return mapped_to({"_META_TARGET_HOST": f"127.0.0.1:{scripted.port}", "user": "postgres"})


def test_the_right_key_cancels_and_the_session_goes_on(shared_gateway: Gateway, backends: Backends) -> None:
    with RawClient(shared_gateway.port) as client:
        key = key_of(client.log_in())
        for _ in range(3):
            sleep_endlessly(client, backends)
            assert send_cancel(shared_gateway, key) == b""
            errors = [error_fields(body) for kind, body in client.read_until(b"Z") if kind == b"E"]
            assert [error["C"] for error in errors] == ["57014"]
        client.send(query("select 1"))
        assert (b"D", b"\0\x01\0\0\0\x011") in client.read_until(b"Z")


def test_the_target_gets_its_own_key_on_a_connection_of_its_own(scripted_gateway: Gateway, cancels: Cancels) -> None:
    with RawClient(scripted_gateway.port) as client:
        key = key_of(client.log_in())
        assert send_cancel(scripted_gateway, key) == b""
        assert cancels.received == [TARGET_KEY]
        assert cancels.connections == 2
        assert scripted_gateway.wait_for("cancel request")["outcome"] == "passed on"


def test_the_clients_connection_closes_only_when_the_target_has_acted(
    scripted_gateway: Gateway, cancels: Cancels
) -> None:
    cancels.answer.clear()
    with RawClient(scripted_gateway.port) as client, RawClient(scripted_gateway.port) as canceller:
        canceller.send(cancel_request(key_of(client.log_in())))
        wait_until(lambda: cancels.received, "the cancel request")
        canceller.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            canceller.socket.recv(1)
        canceller.socket.settimeout(SECONDS)
        cancels.answer.set()
        assert canceller.read_to_end() == b""


def wrong_secret(key: bytes) -> bytes:
    return key[:4] + bytes(byte ^ 1 for byte in key[4:])


def nearly_right_secret(key: bytes) -> bytes:
    return key[:-1] + bytes([key[-1] ^ 0x80])


def unknown_process(key: bytes) -> bytes:
    return struct.pack("!i", int.from_bytes(key[:4]) ^ 1) + key[4:]


def short(key: bytes) -> bytes:
    return key[:-1]


def without_secret(key: bytes) -> bytes:
    return key[:4]


def empty(key: bytes) -> bytes:
    return b""


def longer(key: bytes) -> bytes:
    return key + b"\0"


def much_longer(key: bytes) -> bytes:
    return key + bytes(9000)


def the_targets(key: bytes) -> bytes:
    return TARGET_KEY


def the_targets_secret(key: bytes) -> bytes:
    return key[:4] + TARGET_KEY[4:]


@pytest.mark.parametrize(
    "spoil",
    [
        wrong_secret,
        nearly_right_secret,
        unknown_process,
        short,
        without_secret,
        empty,
        longer,
        much_longer,
        the_targets,
        the_targets_secret,
    ],
)
def test_any_other_key_is_dropped_silently_and_nobody_is_contacted(
    scripted_gateway: Gateway, cancels: Cancels, spoil: Callable[[bytes], bytes]
) -> None:
    with RawClient(scripted_gateway.port) as client:
        key = key_of(client.log_in())
        assert send_cancel(scripted_gateway, spoil(key)) == b""
        # The right one afterwards shows that the wrong one was dealt with, and did no harm.
        assert send_cancel(scripted_gateway, key) == b""
    assert cancels.received == [TARGET_KEY]
    assert cancels.connections == 2


@pytest.mark.parametrize("length", [0, 7, 10_001, 2**31 - 1, -1])
def test_a_cancel_packet_of_a_forbidden_length_is_closed_silently(shared_gateway: Gateway, length: int) -> None:
    with RawClient(shared_gateway.port) as client:
        client.send(struct.pack("!ii", length, CANCEL_REQUEST) + bytes(8))
        assert client.read_to_end() == b""


def test_a_cancel_packet_cut_short_is_closed_silently(scripted_gateway: Gateway, cancels: Cancels) -> None:
    with RawClient(scripted_gateway.port) as client:
        key = key_of(client.log_in())
        with RawClient(scripted_gateway.port) as canceller:
            canceller.send(cancel_request(key)[:-1])
            canceller.socket.shutdown(socket.SHUT_WR)
            assert canceller.read_to_end() == b""
    assert cancels.received == []


def test_a_cancel_request_may_come_byte_by_byte_and_behind_an_encryption_request(
    scripted_gateway: Gateway, cancels: Cancels
) -> None:
    with RawClient(scripted_gateway.port) as client, RawClient(scripted_gateway.port) as canceller:
        key = key_of(client.log_in())
        canceller.send(struct.pack("!ii", 8, 80877103))
        assert canceller.read(1) == b"N"
        for byte in cancel_request(key):
            canceller.send(bytes([byte]))
        assert canceller.read_to_end() == b""
    assert cancels.received == [TARGET_KEY]


def test_keys_are_the_gateways_own_and_differ_between_sessions(scripted_gateway: Gateway) -> None:
    keys = set()
    clients = [RawClient(scripted_gateway.port) for _ in range(10)]
    try:
        for client in clients:
            keys.add(key_of(client.log_in()))
    finally:
        for client in clients:
            client.socket.close()
    assert len(keys) == 10
    assert len({key[:4] for key in keys}) == len({key[4:] for key in keys}) == 10
    for key in keys:
        process_id, _ = struct.unpack("!iI", key)
        assert process_id > 0
        assert key[:4] != TARGET_KEY[:4]
        assert key[4:] != TARGET_KEY[4:]


def test_a_session_whose_target_issues_no_key_gets_none_and_cannot_be_canceled(mapped_to: MappedTo) -> None:
    cancels = Cancels(key=b"")
    with ScriptedTarget(cancels) as target:
        gateway = mapped_to({"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "postgres"})
        with RawClient(gateway.port) as client:
            greeting = client.log_in()
            assert [kind for kind, _ in greeting] == [b"R", b"Z"]
            assert send_cancel(gateway, bytes(8)) == b""
    assert cancels.connections == 1


@pytest.mark.parametrize("key", [b"\xff" * 8, bytes(range(36)), bytes(range(256))], ids=len)
def test_a_targets_key_of_any_length_comes_back_to_it_unchanged(mapped_to: MappedTo, key: bytes) -> None:
    cancels = Cancels(key)
    with ScriptedTarget(cancels) as target:
        gateway = mapped_to({"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "postgres"})
        with RawClient(gateway.port) as client:
            ours = key_of(client.log_in())
            assert len(ours) == 8
            assert send_cancel(gateway, ours) == b""
    assert cancels.received == [key]


def test_a_key_is_forgotten_with_its_session(scripted_gateway: Gateway, cancels: Cancels) -> None:
    with RawClient(scripted_gateway.port) as client:
        key = key_of(client.log_in())
    scripted_gateway.wait_for("session ended")
    assert send_cancel(scripted_gateway, key) == b""
    assert cancels.connections == 1
    assert scripted_gateway.wait_for("cancel request")["session"] == ""


def test_a_cancel_request_for_a_target_that_listens_no_more_does_no_harm(mapped_to: MappedTo) -> None:
    cancels = Cancels()
    listening = socket.create_server(("127.0.0.1", 0))

    def serve_once() -> None:
        with listening:
            connection, _ = listening.accept()
        with connection:
            refuse_tls(connection)
            cancels(connection)

    serving = threading.Thread(target=serve_once)
    serving.start()
    gateway = mapped_to({"_META_TARGET_HOST": f"127.0.0.1:{listening.getsockname()[1]}", "user": "postgres"})
    with RawClient(gateway.port) as client:
        key = key_of(client.log_in())
        assert send_cancel(gateway, key) == b""
        assert gateway.wait_for("cancel request")["outcome"].startswith("not passed on")
        # The session itself is still there.
        client.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.socket.recv(1)
    serving.join(SECONDS)


def test_a_target_that_does_not_answer_a_cancel_request_holds_nobody_up_for_long(mapped_to: MappedTo) -> None:
    cancels = Cancels()
    cancels.answer.clear()
    with ScriptedTarget(cancels) as target:
        lines = {"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "postgres"}
        gateway = mapped_to(lines, cancel_timeout=0.2)
        with RawClient(gateway.port) as client:
            key = key_of(client.log_in())
            assert send_cancel(gateway, key) == b""
            assert "not confirmed" in gateway.wait_for("cancel request")["outcome"]
            cancels.answer.set()


def test_many_cancel_requests_at_once_make_one_connection_at_a_time(
    scripted_gateway: Gateway, cancels: Cancels
) -> None:
    cancels.answer.clear()
    with RawClient(scripted_gateway.port) as client:
        key = key_of(client.log_in())
        with RawClient(scripted_gateway.port) as first:
            first.send(cancel_request(key))
            wait_until(lambda: cancels.received, "the first cancel request")
            for _ in range(10):
                assert send_cancel(scripted_gateway, key) == b""
            assert cancels.connections == 2
            cancels.answer.set()
            assert first.read_to_end() == b""


def test_one_sessions_key_leaves_the_others_alone(shared_gateway: Gateway, backends: Backends) -> None:
    with RawClient(shared_gateway.port) as client, RawClient(shared_gateway.port) as other:
        key = key_of(client.log_in())
        other.log_in()
        other.send(query("select pg_backend_pid()"))
        other_pid = int(next(body for kind, body in other.read_until(b"Z") if kind == b"D")[6:])
        other.send(query("select pg_sleep(30)"))
        sleep_endlessly(client, backends)
        send_cancel(shared_gateway, key)
        assert any(kind == b"E" for kind, _ in client.read_until(b"Z"))
        assert backends.sleeps(other_pid)


def test_an_interrupt_of_psql_cancels_its_query(
    shared_gateway: Gateway, postgres: ThrowawayPostgres, backends: Backends
) -> None:
    name = f"psql_{uuid.uuid4().hex[:12]}"
    where = f"host=127.0.0.1 port={shared_gateway.port} user=alice dbname=postgres application_name={name}"
    process = subprocess.Popen(
        [postgres.binaries / "psql", "-Xc", "select pg_sleep(30)", where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PGPASSWORD": PASSWORD},
    )
    try:
        wait_until(lambda: backends.sleeps_as(name), "the query to begin")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert b"canceling statement due to user request" in errors
