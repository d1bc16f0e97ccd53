"""Metrics and health: what operators' monitors see, and that nobody who asks for it holds up a login."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import stat
from pathlib import Path

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from pgauthproxy.ops.http import MAX_CONNECTIONS, MAX_HEAD
from pgauthproxy.throwaway import ThrowawayPostgres, free_port
from tests.conftest import WAIT_SECONDS, StartGateway, WriteAuthenticator
from tests.system.conftest import Run, assert_one_clear_line, assert_serves, configure, wait_until
from tests.system.operators import address_of, ask, raw, samples
from tests.wire import RawClient, cancel_request, message, password, query, startup

LOCAL = {"listen": "127.0.0.1:0"}
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def test_nothing_is_served_unless_asked_for(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped)
    assert_serves(gateway.port)
    assert gateway.log_lines("serving operators") == []


def test_metrics_count_logins_refusals_sessions_and_bytes(
    start_gateway: StartGateway, mapped: Path, postgres: ThrowawayPostgres
) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    target = f'{{target="127.0.0.1:{postgres.port}"}}'
    with RawClient(gateway.port) as refused:
        refused.send(startup(user="mallory"))
        refused.read_message()
        refused.send(password())
        assert refused.read_fatal()[0] == "28P01"
    with RawClient(gateway.port) as client:
        client.log_in()
        client.send(query("select repeat('x', 10000)"))
        client.read_until(b"Z")
        wait_until(lambda: samples(gateway).get(f"pgauthproxy_sessions{target}") == 1, "the session")
        found = samples(gateway)
        wrong = '{outcome="refused",reason="wrong_credential",sqlstate="28P01"}'
        assert found[f"pgauthproxy_logins_total{wrong}"] == 1
        assert found['pgauthproxy_logins_total{outcome="accepted",reason="accepted",sqlstate="00000"}'] == 1
        assert found["pgauthproxy_login_seconds_count"] == 1
        assert found["pgauthproxy_authenticator_seconds_count"] == 1
        assert 0 < found["pgauthproxy_authenticator_seconds_sum"] < found["pgauthproxy_login_seconds_sum"]
        assert found['pgauthproxy_received_bytes_total{side="client"}'] == len(query("select repeat('x', 10000)"))
        assert 10_000 < found['pgauthproxy_received_bytes_total{side="target"}'] < 11_000
        assert found[f"pgauthproxy_target_up{target}"] == 1
        assert found['pgauthproxy_resident_memory_bytes{process="0"}'] > 1 << 20
        client.send(message(b"X"))
        assert client.read_to_end() == b""
    ended = 'pgauthproxy_sessions_ended_total{reason="client closed"}'
    wait_until(lambda: samples(gateway).get(ended) == 1, "the session to be counted as over")
    after = samples(gateway)
    assert after[f"pgauthproxy_sessions{target}"] == 0
    assert after['pgauthproxy_received_bytes_total{side="target"}'] > 10_000


def test_cancel_requests_are_counted(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    with RawClient(gateway.port) as client:
        client.send(cancel_request(b"12345678"))
        assert client.read_to_end() == b""
    name = 'pgauthproxy_cancel_requests_total{outcome="nobody\'s key"}'
    wait_until(lambda: samples(gateway).get(name) == 1, "the request to be counted")


def test_a_target_that_does_not_answer_is_down(start_gateway: StartGateway, authenticator: WriteAuthenticator) -> None:
    port = free_port()
    gateway = start_gateway(authenticator(f"echo _META_TARGET_HOST=127.0.0.1:{port}; echo user=x"), admin=LOCAL)
    with RawClient(gateway.port) as client:
        client.send(startup() + password())
        client.read_until(b"E")
    target = f'{{target="127.0.0.1:{port}"}}'
    wait_until(lambda: samples(gateway).get(f"pgauthproxy_target_up{target}") == 0, "the target to be down")
    found = samples(gateway)
    assert found[f"pgauthproxy_target_failures_total{target}"] == 1
    assert found['pgauthproxy_logins_total{outcome="refused",reason="target_unreachable",sqlstate="08001"}'] == 1


def test_authenticators_at_work_and_logins_that_wait_are_counted(
    start_gateway: StartGateway, authenticator: WriteAuthenticator
) -> None:
    gateway = start_gateway(authenticator("sleep 60"), admin=LOCAL, authenticator={"max_parallel": 1})
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(RawClient(gateway.port)).send(startup() + password())
        kind = '{kind="command"}'

        def counted() -> tuple[float, float, float]:
            found = samples(gateway)
            return (
                found[f"pgauthproxy_authenticators_running{kind}"],
                found[f"pgauthproxy_authenticators_queued{kind}"],
                found["pgauthproxy_logins_in_progress"],
            )

        wait_until(lambda: counted() == (1, 2, 3), "one to run and two to wait")


def test_both_forms_are_what_their_parsers_take(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    assert_serves(gateway.port)
    text = ask(gateway, "/metrics")
    assert text.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert {family.name for family in parse_text(text.body)} >= {"pgauthproxy_logins", "pgauthproxy_build_info"}
    opened = ask(gateway, "/metrics", Accept=OPENMETRICS)
    assert opened.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.body.endswith("# EOF\n")
    assert {family.name for family in parse_openmetrics(opened.body)} >= {"pgauthproxy_logins", "pgauthproxy_build"}


def test_no_accept_header_gets_anything_else(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    for accept in (
        "application/openmetrics-text; version=abc",
        "text/plain; version=9; escaping=x",
        ";,;=",
        "x" * 4000,
    ):
        answer = ask(gateway, "/metrics", Accept=accept)
        assert answer.status == 200, accept
        assert answer.headers["Content-Type"] in (
            "text/plain; version=0.0.4; charset=utf-8",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        )


def test_no_label_is_what_a_client_says(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    for number in range(5):
        with RawClient(gateway.port) as client:
            client.log_in(user=f"chosen{number}", application_name=f"chosen{number}")
        with RawClient(gateway.port) as client:
            client.send(startup(user="mallory", database=f"chosen{number}") + password())
            client.read_until(b"E")
    wait_until(lambda: samples(gateway)["pgauthproxy_login_seconds_count"] == 5, "the logins to be counted")
    assert "chosen" not in ask(gateway, "/metrics").body


def test_a_draining_gateway_is_healthy_and_not_ready(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=LOCAL, drain_timeout=600)
    with RawClient(gateway.port) as client:
        client.log_in()
        assert (ask(gateway, "/healthz").status, ask(gateway, "/readyz").status) == (200, 200)
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(gateway, "/readyz").status == 503, "it to say that it is not ready")
        assert ask(gateway, "/healthz").status == 200
        client.assert_served()
    assert gateway.process.wait(WAIT_SECONDS) == 0


def test_only_names_that_are_known_may_be_asked_for(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=LOCAL | {"hosts": ["gateway.example"]})
    for host in ("127.0.0.1:9187", "[::1]:9187", "localhost", "LOCALHOST.:80", "gateway.example:9187"):
        assert ask(gateway, "/metrics", Host=host).status == 200, host
    for host in ("rebound.example", "localhost.rebound.example", "", "127.0.0.1.rebound.example", "[rebound.example]"):
        assert ask(gateway, "/metrics", Host=host).status == 421, host


def test_monitors_of_other_machines_may_use_any_name(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin={"listen": "0.0.0.0:0"})
    assert gateway.wait_for("serving operators")["level"] == "warning"
    assert ask(gateway, "/metrics", Host="gateway.monitoring").status == 200


def test_what_is_not_there_or_not_to_be_done_is_told(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    assert ask(gateway, "/nothing").status == 404
    assert ask(gateway, "/metrics", "DELETE").status == 405
    head = ask(gateway, "/metrics", "HEAD")
    assert (head.status, head.body) == (200, "")
    assert raw(gateway, b"GARBAGE\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert raw(gateway, b"GET / HTTP/1.1\r\nX: " + b"x" * 2 * MAX_HEAD).startswith(b"HTTP/1.1 431 ")


def test_one_connection_serves_many_requests(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    connection = http.client.HTTPConnection(address_of(gateway), timeout=WAIT_SECONDS)
    with contextlib.closing(connection):
        connection.connect()
        kept = connection.sock
        for _ in range(100):
            connection.request("GET", "/metrics")
            assert connection.getresponse().read()
        assert connection.sock is kept


def test_a_unix_socket_is_for_its_owner_and_group(start_gateway: StartGateway, mapped: Path, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    gateway = start_gateway(mapped, admin={"listen": f"unix:{path}"})
    assert gateway.wait_for("serving operators")["address"] == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(WAIT_SECONDS)
        client.connect(str(path))
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
    assert gateway.stop() == 0
    assert not path.exists()


def test_a_flood_of_silent_connections_hurts_neither_logins_nor_monitors(
    start_gateway: StartGateway, mapped: Path
) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    host, _, port = address_of(gateway).rpartition(":")
    before = gateway.sockets
    with contextlib.ExitStack() as stack:
        for _ in range(3 * MAX_CONNECTIONS):
            stack.enter_context(socket.create_connection((host, int(port)), WAIT_SECONDS))
        assert_serves(gateway.port)
        assert ask(gateway, "/healthz").status == 200
        assert gateway.sockets <= before + MAX_CONNECTIONS + 2
    wait_until(lambda: gateway.sockets <= before, "the connections to be given back")


def test_an_address_that_cannot_be_had_is_one_clear_line(run: Run, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = configure(folder, admin={"listen": address})
        assert_one_clear_line(run("--config", str(config)), f"admin.listen: {address}", "Address already in use")
