"""SIGHUP and `pgauthproxy reload`: the whole configuration, read and checked first, then in force for new logins."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgauthproxy.config import schema
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway, WriteAuthenticator
from tests.system.conftest import Run, assert_one_clear_line, assert_serves, refusal, wait_until
from tests.tls import Authority
from tests.wire import SSL_REQUEST, RawClient, ScriptedTarget, error_fields, greet, message, password, startup

LOADED = "configuration loaded anew"
KEPT = "configuration not loaded, the old one stays"
FIXED = "settings that need a restart stay as they were"
CLEARTEXT_REQUEST = struct.pack("!i", 3)


def reload(gateway: Gateway, event: str = LOADED) -> dict[str, Any]:
    """Sends SIGHUP; returns the line that is to come of it."""
    known = len(gateway.log_lines(event))
    gateway.process.send_signal(signal.SIGHUP)
    return gateway.wait_for(event, known + 1)


def assert_full(gateway: Gateway) -> None:
    with RawClient(gateway.port) as client:
        client.send(startup())
        assert client.read_fatal()[0] == "53300"


# What changes


def test_new_limits_count_for_new_clients_and_sessions_are_not_touched(gateway: Gateway) -> None:
    with RawClient(gateway.port) as first, RawClient(gateway.port) as second:
        first.log_in()
        second.log_in()
        gateway.rewrite(max_clients=1)
        assert reload(gateway)["changed"] == "max_clients"
        assert_full(gateway)
        first.assert_served()
        second.assert_served()
        gateway.rewrite(max_clients=3)
        reload(gateway)
        assert_serves(gateway.port)


def test_a_new_login_timeout_counts_for_new_clients(gateway: Gateway) -> None:
    with RawClient(gateway.port) as before:
        before.send(startup())
        before.read_message()
        gateway.rewrite(login_timeout=0.2)
        reload(gateway)
        with RawClient(gateway.port) as client:
            client.send(startup())
            client.read_message()
            assert client.read_fatal() == ("28000", "canceling authentication due to timeout")
        before.send(password())
        before.read_until(b"Z")


def test_the_command_and_the_method_change_together(
    gateway: Gateway, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres
) -> None:
    lines = f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}; echo user=hashed; echo database=postgres"
    script = authenticator(f'{lines}; echo "_META_TARGET_CRED=hashed secret"; [ "$user" = bob ]', "other")
    gateway.rewrite(authenticator={"cmd": [str(script)], "method": "cleartext"})
    assert reload(gateway)["changed"] == "authenticator.cmd, authenticator.method"
    with RawClient(gateway.port) as client:
        client.send(startup(user="bob"))
        assert client.read_message() == (b"R", CLEARTEXT_REQUEST)
        client.send(password("anything"))
        client.read_until(b"Z")
        client.assert_served()


def test_the_authenticator_changes_its_kind_and_nothing_of_the_old_one_is_left(
    start_gateway: StartGateway, tmp_path: Path, postgres: ThrowawayPostgres, mapped: Path
) -> None:
    worker = tmp_path / "worker"
    worker.write_text(
        "#!/bin/sh\n"
        "while read -r line; do\n"
        f'  [ -z "$line" ] && printf "_META_TARGET_HOST=127.0.0.1:{postgres.port}\\nuser=postgres\\n\\n"\n'
        "done\n"
    )
    worker.chmod(0o755)
    gateway = start_gateway(worker, authenticator={"kind": "worker"})
    assert_serves(gateway.port)
    processes = gateway.children
    assert processes
    gateway.rewrite(authenticator={"kind": "command", "cmd": [str(mapped)]})
    reload(gateway)
    assert_serves(gateway.port)
    wait_until(lambda: not gateway.children & processes, "the worker to be gone")


def test_a_login_in_the_hands_of_the_old_authenticator_is_decided_by_it(
    start_gateway: StartGateway, tmp_path: Path, postgres: ThrowawayPostgres
) -> None:
    """Its process, which a new one stands in for, lives until it has answered."""
    asked, go_on = tmp_path / "asked", tmp_path / "go_on"
    worker = tmp_path / "worker"
    worker.write_text(
        "#!/bin/sh\n"
        'while read -r line; do [ -n "$line" ] && continue\n'
        f"touch '{asked}'; until [ -e '{go_on}' ]; do sleep 0.02; done\n"
        f'printf "_META_TARGET_HOST=127.0.0.1:{postgres.port}\\nuser=postgres\\n\\n"\n'
        "done\n"
    )
    worker.chmod(0o755)
    gateway = start_gateway(worker, authenticator={"kind": "worker", "workers": {"max": 1}})
    with RawClient(gateway.port) as client:
        client.send(startup() + password())
        wait_until(asked.exists, "the worker to be asked")
        old = gateway.children
        gateway.rewrite(authenticator={"kind": "command", "cmd": ["false"]})
        reload(gateway)
        assert refusal(gateway, "late")[0]["C"] == "28P01"
        assert gateway.children >= old
        go_on.touch()
        client.read_until(b"Z")
        client.assert_served()
    wait_until(lambda: not gateway.children & old, "the old worker to be gone")


def test_tls_with_clients_is_switched_on(gateway: Gateway, authority: Authority) -> None:
    identity = authority.issue("reloaded", "localhost")
    gateway.rewrite(tls={"cert": str(identity.cert), "key": str(identity.key), "mode": "require"})
    reload(gateway)
    with RawClient(gateway.port) as client:
        client.send(SSL_REQUEST)
        assert client.read(1) == b"S"
    with RawClient(gateway.port) as client:
        client.send(startup())
        assert client.read_fatal()[0] == "28000"


def test_targets_are_spoken_to_as_the_new_settings_say(mapped_to: Callable[..., Gateway]) -> None:
    versions: list[int] = []

    def speak(connection: socket.socket) -> None:
        versions.append(struct.unpack("!ii", connection.recv(8, socket.MSG_PEEK | socket.MSG_WAITALL))[1])
        greet(connection)

    with ScriptedTarget(speak) as target:
        gateway = mapped_to({"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "x"})
        for protocol in ("3.0", "3.2"):
            gateway.rewrite(target={"protocol": protocol})
            reload(gateway)
            with RawClient(gateway.port) as client:
                client.log_in()
    assert versions == [0x30000, 0x30002]


def test_the_level_of_the_log_changes(gateway: Gateway) -> None:
    gateway.rewrite(log={"level": "warning"}, backlog=7)
    reload(gateway, FIXED)
    assert_serves(gateway.port)
    gateway.rewrite(log={"level": "info"})
    reload(gateway)
    assert not gateway.log_lines("login")
    assert_serves(gateway.port)
    gateway.wait_for("login")


def test_lists_of_networks_count_for_new_clients_and_sessions_are_not_touched(gateway: Gateway) -> None:
    with RawClient(gateway.port) as client:
        client.log_in()
        gateway.rewrite(deny=["127.0.0.0/8"])
        reload(gateway)
        with RawClient(gateway.port) as denied:
            assert denied.read_to_end() == b""
        client.assert_served()
    gateway.rewrite(deny=[])
    reload(gateway)
    assert_serves(gateway.port)


def test_limits_of_users_and_rules_of_sessions_count_for_new_clients(gateway: Gateway) -> None:
    gateway.rewrite(max_clients_per_user=1, max_session_seconds=0.3)
    assert reload(gateway)["changed"] == "max_clients_per_user, max_session_seconds"
    with RawClient(gateway.port) as client:
        client.log_in()
        with RawClient(gateway.port) as other:
            other.send(startup())
            other.read_message()
            other.send(password())
            assert other.read_fatal()[0] == "53300"
        assert client.read_fatal()[0] == "57P01"


def test_the_throttle_begins_with_a_reload_and_knows_then_what_it_has_counted(
    gateway: Gateway, authenticator: WriteAuthenticator
) -> None:
    def guess() -> str:
        with RawClient(gateway.port) as client:
            client.send(startup() + password())
            return error_fields(client.read_until(b"E")[-1][1])["M"]

    gateway.rewrite(authenticator={"cmd": [str(authenticator("exit 1", "refusing"))]})
    throttle = {"failures": 1, "delay": 0.01, "max_delay": 0.01, "block": 60, "exempt": list[str]()}
    for window in (60, 61):
        gateway.rewrite(throttle={**throttle, "window": window})
        reload(gateway)
        guess()
    assert guess() == "too many failed logins"


# What cannot change


def test_what_needs_a_restart_is_named_and_the_rest_is_in_force(gateway: Gateway, tmp_path: Path) -> None:
    gateway.rewrite(listen="127.0.0.1:1", backlog=7, buffer_size=4096, max_clients=1, pid_file=str(tmp_path / "new"))
    assert reload(gateway)["changed"] == "max_clients"
    line = gateway.wait_for(FIXED)
    assert line["keys"] == "listen, backlog, buffer_size, pid_file"
    with RawClient(gateway.port) as client:
        client.log_in()
        assert_full(gateway)


def test_every_setting_that_cannot_change_exists() -> None:
    paths = [key.path for key in schema.all_keys()]
    for fixed in schema.FIXED:
        assert any(path == fixed or path.startswith(f"{fixed}.") for path in paths), fixed


def test_of_a_section_what_needs_a_restart_stays_and_the_rest_is_in_force(
    start_gateway: StartGateway, mapped: Path, tmp_path: Path
) -> None:
    audit = tmp_path / "audit.log"
    gateway = start_gateway(mapped, audit={"file": str(audit)})
    gateway.rewrite(audit={"file": str(tmp_path / "other"), "statements": True}, admin={"database": ""})
    assert reload(gateway)["changed"] == "audit.statements"
    assert gateway.wait_for(FIXED)["keys"] == "admin, audit.file"
    with RawClient(gateway.port) as client:
        client.log_in()
        client.assert_served()
    wait_until(lambda: b'"event":"statement"' in audit.read_bytes(), "the statement")
    assert not (tmp_path / "other").exists()


# What changes nothing


@pytest.mark.parametrize(
    ("content", "event", "reasons"),
    [
        ("{listen: [", KEPT, ["not YAML"]),
        ("just words", KEPT, ["not a mapping"]),
        ("{max_clients: 0, drain_timeout: soon, lisen: a}", KEPT, ["unknown key lisen", "max_clients", "drain_time"]),
        ("{authenticator: {cmd: /no/such}}", "authenticator not loaded, the old one stays", ["/no/such: not found"]),
        ("{authenticator: {kind: users}}", KEPT, ["users needs users.file"]),
        ("{authenticator: {cmd: 'true'}, listen: nowhere}", KEPT, ["listen: nowhere"]),
    ],
)
def test_a_bad_file_changes_nothing_and_every_fault_is_a_line(
    gateway: Gateway, content: str, event: str, reasons: list[str]
) -> None:
    with RawClient(gateway.port) as session:
        session.log_in()
        gateway.config.write_text(content)
        gateway.process.send_signal(signal.SIGHUP)
        gateway.wait_for(event, len(reasons))
        said = [line["reason"] for line in gateway.log_lines(event)]
        assert len(said) == len(reasons)
        for reason in reasons:
            assert any(reason in line for line in said), (reason, said)
        session.assert_served()
    assert_serves(gateway.port)
    assert not gateway.log_lines(LOADED)


def test_faults_of_several_parts_are_told_together(gateway: Gateway) -> None:
    tls = {"cert": "/no/such.crt", "key": "/no/such.key"}
    gateway.rewrite(authenticator={"cmd": ["/no/such"]}, tls=tls, max_clients=1)
    gateway.process.send_signal(signal.SIGHUP)
    gateway.wait_for("authenticator not loaded, the old one stays")
    gateway.wait_for("certificates not loaded, the old ones stay")
    with RawClient(gateway.port) as client:
        client.log_in()
        assert_serves(gateway.port)


def test_a_file_that_is_gone_changes_nothing(gateway: Gateway) -> None:
    gateway.config.unlink()
    assert "No such file" in reload(gateway, KEPT)["reason"]
    assert_serves(gateway.port)


def test_many_signals_during_logins_do_no_harm(gateway: Gateway) -> None:
    for number in range(20):
        gateway.rewrite(max_clients=100 + number, authenticator={"timeout": 5.0 + number})
        gateway.process.send_signal(signal.SIGHUP)
        assert_serves(gateway.port)
    descriptors = gateway.descriptors
    wait_until(lambda: "max_clients" in gateway.log_lines(LOADED)[-1]["changed"], "the last one to be loaded")
    for _ in range(3):
        reload(gateway)
    assert gateway.descriptors <= descriptors


# The file with the process's number, and the command


@pytest.fixture
def with_pid_file(start_gateway: StartGateway, mapped: Path, tmp_path: Path) -> Gateway:
    return start_gateway(mapped, pid_file=str(tmp_path / "pid"))


def test_the_command_reloads_the_gateway_that_the_file_names(with_pid_file: Gateway, tmp_path: Path, run: Run) -> None:
    pid_file = tmp_path / "pid"
    assert pid_file.read_text() == f"{with_pid_file.pid}\n"
    with_pid_file.rewrite(max_clients=7)
    done = run("reload", "--config", str(with_pid_file.config))
    assert (done.returncode, done.stderr) == (0, "")
    assert with_pid_file.wait_for(LOADED)["changed"] == "max_clients"
    assert with_pid_file.stop() == 0
    assert not pid_file.exists()
    done = run("reload", "--config", str(with_pid_file.config))
    assert_one_clear_line(done, "pid_file", "No such file")


def test_the_command_tells_of_faults_and_leaves_the_gateway_alone(with_pid_file: Gateway, run: Run) -> None:
    with_pid_file.rewrite(max_clients=0)
    done = run("reload", "--config", str(with_pid_file.config))
    assert_one_clear_line(done, "max_clients")
    with_pid_file.rewrite(max_clients=5)
    reload(with_pid_file)
    assert not with_pid_file.log_lines(KEPT)


def test_a_number_that_was_left_behind_is_nobodys(gateway: Gateway, tmp_path: Path, run: Run) -> None:
    with sleeping() as stranger:
        (tmp_path / "pid").write_text(f"{stranger.pid}\n")
        gateway.rewrite(pid_file=str(tmp_path / "pid"))
        done = run("reload", "--config", str(gateway.config))
        assert_one_clear_line(done, "pid_file", "does not run any more")
        assert stranger.poll() is None


@contextlib.contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    """A process that SIGHUP would end."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_without_the_setting_the_command_says_what_is_missing(gateway: Gateway, run: Run) -> None:
    done = run("reload", "--config", str(gateway.config))
    assert_one_clear_line(done, "pid_file", "not set")


def test_two_gateways_do_not_share_a_file(with_pid_file: Gateway, run: Run) -> None:
    done = run("--config", str(with_pid_file.config))
    assert done.returncode == 2
    assert f"process {with_pid_file.pid} runs already" in done.stderr
    assert_serves(with_pid_file.port)


def test_a_file_that_was_left_behind_is_in_nobodys_way(
    start_gateway: StartGateway, mapped: Path, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    pid_file.write_text("1\n")
    successor = start_gateway(mapped, pid_file=str(pid_file))
    assert pid_file.read_text() == f"{successor.pid}\n"


def test_a_file_that_cannot_be_written_ends_the_start(gateway: Gateway, run: Run) -> None:
    gateway.rewrite(pid_file="/no/such/folder/pid", listen="127.0.0.1:0")
    done = run("--config", str(gateway.config))
    assert done.returncode == 2
    assert "pid_file: /no/such/folder/pid: No such file or directory" in done.stderr


def test_a_successor_takes_the_file_over_while_sessions_go_on(
    with_pid_file: Gateway, start_gateway: StartGateway, mapped: Path, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    with_pid_file.rewrite(drain_timeout=600)
    reload(with_pid_file)
    with RawClient(with_pid_file.port) as client:
        client.log_in()
        with_pid_file.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not pid_file.exists(), "the file to be given up")
        successor = start_gateway(mapped, pid_file=str(pid_file))
        client.assert_served()
        client.send(message(b"X"))
    with_pid_file.process.wait(20)
    assert pid_file.read_text() == f"{successor.pid}\n"


def test_a_reload_while_it_drains_does_no_harm(gateway: Gateway) -> None:
    gateway.rewrite(drain_timeout=600)
    reload(gateway)
    with RawClient(gateway.port) as client:
        client.log_in()
        gateway.process.send_signal(signal.SIGTERM)
        gateway.wait_for("shutting down")
        gateway.rewrite(drain_timeout=500)
        assert reload(gateway)["changed"] == "drain_timeout"
        client.assert_served()
        client.send(message(b"X"))
    assert gateway.process.wait(20) == 0


# Draining for ever


@pytest.mark.parametrize("how", ["file", "environment"])
def test_a_drain_may_last_as_long_as_its_sessions(start_gateway: StartGateway, mapped: Path, how: str) -> None:
    if how == "file":
        gateway = start_gateway(mapped, drain_timeout="forever")
    else:
        gateway = start_gateway(mapped, environment={**os.environ, "PGPROXY_DRAIN_TIMEOUT": "infinite"})
    with RawClient(gateway.port) as client:
        client.log_in()
        gateway.process.send_signal(signal.SIGTERM)
        gateway.wait_for("shutting down")
        client.assert_served()
        # Longer than the one second that the gateways of these tests have otherwise.
        with pytest.raises(subprocess.TimeoutExpired):
            gateway.process.wait(1.5)
        client.assert_served()
        client.send(message(b"X"))
    assert gateway.process.wait(20) == 0


def test_a_second_signal_ends_even_that(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, drain_timeout="forever")
    with RawClient(gateway.port) as client:
        client.log_in()
        gateway.process.send_signal(signal.SIGTERM)
        gateway.wait_for("shutting down")
        gateway.process.send_signal(signal.SIGTERM)
        assert client.read_fatal()[0] == "57P01"
    assert gateway.process.wait(20) == 0
