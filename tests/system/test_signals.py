"""SIGTERM and SIGINT: nobody new, logins refused, sessions let go on for a while, and in the end nothing left."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import WAIT_SECONDS, Gateway, StartGateway
from tests.system.conftest import STEPS, Backends, Holding, is_listened_on, lives, wait_until
from tests.wire import RawClient, ScriptedTarget, greet, message, query

SIGNALS = [signal.SIGTERM, signal.SIGINT]
ENDED = ("57P01", "terminating connection due to administrator command")
NOT_NOW = ("57P03", "the gateway is shutting down")

MappedTo = Callable[..., Gateway]


def end(gateway: Gateway) -> int:
    """The exit status of a gateway that is to end without more being asked of it."""
    return gateway.process.wait(WAIT_SECONDS)


# Draining


@pytest.mark.parametrize("number", SIGNALS)
def test_a_gateway_without_sessions_ends_at_once(start_gateway: StartGateway, mapped: Path, number: int) -> None:
    gateway = start_gateway(mapped, drain_timeout=600)
    gateway.process.send_signal(number)
    assert end(gateway) == 0
    assert [line["event"] for line in gateway.log_lines()][-2:] == ["shutting down", "ended"]


@pytest.mark.parametrize("number", SIGNALS)
def test_sessions_go_on_and_nobody_new_is_accepted(start_gateway: StartGateway, mapped: Path, number: int) -> None:
    gateway = start_gateway(mapped, drain_timeout=600)
    with RawClient(gateway.port) as first, RawClient(gateway.port) as second:
        first.log_in()
        second.log_in()
        gateway.process.send_signal(number)
        line = gateway.wait_for("shutting down")
        assert (line["signal"], line["sessions"]) == (signal.Signals(number).name, 2)
        wait_until(lambda: not is_listened_on(gateway.port), "nobody to listen")
        first.assert_served()
        first.send(message(b"X"))
        assert first.read_to_end() == b""
        second.assert_served()
        second.send(message(b"X"))
    assert end(gateway) == 0
    assert [line["why"] for line in gateway.log_lines("session ended")] == ["client closed"] * 2


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_sessions_that_last_longer_than_they_may_are_ended(
    start_gateway: StartGateway, mapped: Path, backends: Backends, seconds: float
) -> None:
    gateway = start_gateway(mapped, drain_timeout=seconds)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(gateway.port)) for _ in range(10)]
        for client in clients:
            client.log_in(application_name=f"drained {gateway.port}")
        gateway.process.send_signal(signal.SIGTERM)
        for client in clients:
            assert client.read_fatal() == ENDED
    assert end(gateway) == 0
    assert [line["why"] for line in gateway.log_lines("session ended")] == ["gateway shut down"] * 10
    wait_until(lambda: not backends.named(f"drained {gateway.port}"), "the server's side to end")


def test_a_session_whose_query_has_no_answer_yet_is_told_too(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, drain_timeout=0)
    with RawClient(gateway.port) as client:
        client.log_in()
        client.send(query("select pg_sleep(3)"))
        gateway.process.send_signal(signal.SIGTERM)
        assert client.read_fatal() == ENDED
    assert end(gateway) == 0


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(message(b"D", b"\0\x01\0\0\1\0" + b"x" * 256)[:100], id="a row cut short"),
        pytest.param(b"D", id="a type alone"),
        pytest.param(b"Z\0\0\0", id="a header cut short"),
        pytest.param(message(b"C", b"SELECT 1\0") + b"Z\0\0\0\x05", id="all but the last byte"),
    ],
)
def test_a_session_in_the_middle_of_a_message_is_closed_without_a_word(mapped_to: MappedTo, said: bytes) -> None:
    def speak(connection: socket.socket) -> None:
        greet(connection)
        connection.sendall(said)
        assert connection.recv(1) == b""

    with ScriptedTarget(speak) as target:
        lines = {"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "x"}
        gateway = mapped_to(lines, drain_timeout=0)
        with RawClient(gateway.port) as client:
            client.log_in()
            assert client.read(len(said)) == said
            gateway.process.send_signal(signal.SIGTERM)
            assert client.read_to_end() == b""
        assert end(gateway) == 0
    assert gateway.wait_for("session ended")["why"] == "gateway shut down"


def test_a_client_that_does_not_read_holds_nothing_up(mapped_to: MappedTo) -> None:
    def pour(connection: socket.socket) -> None:
        greet(connection)
        while True:
            connection.sendall(bytes(1 << 20))

    with ScriptedTarget(pour) as target:
        lines = {"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "x"}
        gateway = mapped_to(lines, drain_timeout=0, close_timeout=600)
        with RawClient(gateway.port) as client:
            client.log_in()
            client.read(1 << 20)
            gateway.process.send_signal(signal.SIGTERM)
            assert end(gateway) == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)],
)
def test_a_second_signal_ends_sessions_at_once(
    start_gateway: StartGateway, mapped: Path, first: int, second: int
) -> None:
    gateway = start_gateway(mapped, drain_timeout=600)
    with RawClient(gateway.port) as client:
        client.log_in()
        gateway.process.send_signal(first)
        gateway.wait_for("shutting down")
        client.assert_served()
        gateway.process.send_signal(second)
        assert client.read_fatal() == ENDED
    assert end(gateway) == 0
    gateway.wait_for("ending at once", signal=signal.Signals(second).name)


# Logins in progress


@pytest.mark.parametrize("where", STEPS)
def test_a_login_in_progress_is_refused_wherever_it_is(
    holding: Callable[..., Holding], tmp_path: Path, where: str
) -> None:
    held = holding(drain_timeout=600)
    with RawClient(held.port) as client:
        held.bring(client, STEPS[where])
        held.gateway.process.send_signal(signal.SIGTERM)
        assert client.read_fatal() == NOT_NOW
    assert end(held.gateway) == 0
    assert held.gateway.wait_for("refused")["sqlstate"] == "57P03"
    if (hanging := tmp_path / "hanging").exists():
        group = int(hanging.read_text())
        wait_until(lambda: not lives(group), "the authenticator's group to be gone")


def test_a_login_in_progress_keeps_no_session_from_going_on(holding: Callable[..., Holding]) -> None:
    held = holding(drain_timeout=600)
    with RawClient(held.port) as client, RawClient(held.port) as late:
        client.log_in()
        late.send(STEPS["before the password"].sends)
        late.read_message()
        held.gateway.process.send_signal(signal.SIGTERM)
        assert late.read_fatal() == NOT_NOW
        client.assert_served()
        client.send(message(b"X"))
    assert end(held.gateway) == 0


# What it listened on


def test_a_successor_can_listen_there_while_sessions_go_on(
    start_gateway: StartGateway, mapped: Path, tmp_path: Path
) -> None:
    path = tmp_path / ".s.PGSQL.5432"
    old = start_gateway(mapped, listen=["127.0.0.1:0", f"unix:{tmp_path}:5432"], drain_timeout=600)
    with RawClient(old.port) as client:
        client.log_in()
        assert path.is_socket()
        old.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not path.exists(), "the socket's file to be removed")
        new = start_gateway(mapped, listen=[f"127.0.0.1:{old.port}", f"unix:{tmp_path}:5432"])
        with RawClient(new.port) as other:
            other.log_in()
            other.assert_served()
        client.assert_served()
        client.send(message(b"X"))
    assert end(old) == 0
    assert path.is_socket()
    assert new.stop() == 0
    assert not path.exists()


def test_a_gateway_that_is_out_of_descriptors_ends_as_any_other(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped)
    _, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (gateway.descriptors, hard))
    with RawClient(gateway.port):
        gateway.wait_for("accepting pauses")
        gateway.process.send_signal(signal.SIGTERM)
        assert end(gateway) == 0


# Before it serves


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_it_starts_ends_it_without_a_traceback(tmp_path: Path, number: int) -> None:
    # It waits for its settings for as long as nobody writes them.
    settings = tmp_path / "settings.yaml"
    os.mkfifo(settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "pgauthproxy", "--config", str(settings)], stderr=subprocess.PIPE, cwd=tmp_path
    )
    writers: list[int] = []

    def is_read() -> bool:
        try:
            writers.append(os.open(settings, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    try:
        wait_until(is_read, "the settings to be read")
        process.send_signal(number)
        _, said = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
        process.wait()
        for writer in writers:
            os.close(writer)
    assert process.returncode != 0
    assert b"Traceback" not in said
    assert len(said.split(b"\n")) <= 3
