"""Listeners behind a load balancer: a client comes from where the balancer says, and that holds everywhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway
from tests.system.conftest import (
    PASSWORD,
    Asked,
    Run,
    asking_gateway,
    assert_one_clear_line,
    configure,
    is_listened_on,
    wait_until,
)
from tests.tls import HOST, Authority, Identity, TlsClient
from tests.wire import (
    SSL_REQUEST,
    RawClient,
    cancel_request,
    message,
    password,
    proxy_v1,
    proxy_v2,
    raw_proxy_v2,
    startup,
)

IPV6 = "2001:db8::7"
BEHIND_A_BALANCER: dict[str, Any] = {
    "listen": [{"address": "127.0.0.1:0", "proxy_protocol": True}],
    "proxy_protocol_from": ["127.0.0.1"],
}
HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
HAPROXY_CONFIGURATION = """\
global
    nbthread 1
    maxconn 50
defaults
    mode tcp
    timeout connect 10s
    timeout client 1m
    timeout server 1m
listen postgres
    bind 127.0.0.1:{port}
    server gateway {target} {speaks}
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres) -> Iterator[Asked]:
    """A gateway that only balancers of 127.0.0.1 may connect to; its authenticator keeps what it was asked."""
    folder = tmp_path_factory.mktemp("balanced")
    with asking_gateway(folder, postgres.port, cleartext=False, **BEHIND_A_BALANCER) as asked:
        yield asked


@pytest.fixture
def balanced(start_gateway: StartGateway, mapped: Path) -> Callable[..., Gateway]:
    """Starts gateways behind a balancer."""
    return lambda **settings: start_gateway(mapped, **(BEHIND_A_BALANCER | settings))


HEADERS = {
    "version 1": (proxy_v1(), "192.0.2.7:56324"),
    "version 1 with IPv6": (proxy_v1(IPV6, destination="::1"), "[2001:db8::7]:56324"),
    "version 2": (proxy_v2(), "192.0.2.7:56324"),
    "version 2 with IPv6": (proxy_v2(IPV6, destination="::1"), "[2001:db8::7]:56324"),
}
NO_ADDRESS = {
    "version 1, unknown": b"PROXY UNKNOWN\r\n",
    "version 2, local": raw_proxy_v2(0x20, 0x00, b""),
    "version 2, unspecified": raw_proxy_v2(0x21, 0x00, b""),
}


@pytest.mark.parametrize("header", HEADERS)
def test_the_authenticator_and_the_log_have_the_address_that_the_balancer_says(asked: Asked, header: str) -> None:
    sent, address = HEADERS[header]
    user = header.replace(" ", "_")
    with RawClient(asked.port) as client:
        client.send(sent)
        client.log_in(user=user)
        client.assert_served()
    assert f"_SOURCE_ADDR={address}".encode() in asked.questions[-1].split(b"\n")
    assert asked.gateway.wait_for("login", user=user)["client"] == address
    with RawClient(asked.port) as client:
        client.send(sent + startup(user="mallory") + password())
        client.read_message()
        assert client.read_fatal()[0] == "28P01"
    asked.gateway.wait_for("refused", user="mallory", client=address)


@pytest.mark.parametrize("header", NO_ADDRESS)
def test_a_header_without_an_address_leaves_the_connections_own(asked: Asked, header: str) -> None:
    user = header.replace(" ", "_")
    with RawClient(asked.port) as client:
        host, port = client.socket.getsockname()
        client.send(NO_ADDRESS[header])
        client.log_in(user=user)
        client.assert_served()
    assert asked.gateway.wait_for("login", user=user)["client"] == f"{host}:{port}"


@pytest.mark.parametrize("header", [proxy_v1(), proxy_v2()], ids=["version 1", "version 2"])
def test_a_header_may_come_in_pieces_or_with_all_that_follows(asked: Asked, header: bytes) -> None:
    whole = header + startup() + password()
    for points in ([5], [len(header) - 1], [len(header)], [len(header) + 3], []):
        with RawClient(asked.port) as client:
            client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start, end in zip([0, *points], [*points, len(whole)], strict=True):
                client.send(whole[start:end])
            client.read_until(b"Z")
            client.assert_served()


@pytest.mark.parametrize(
    "sent",
    [
        startup(),
        SSL_REQUEST,
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 ²\r\n".encode(),
        raw_proxy_v2(0x21, 0x11, bytes(5000)),
        b"PROXY ".ljust(107, b"x"),
        b"\x16\x03\x01",
    ],
    ids=["startup", "SSLRequest", "UTF-8", "too long", "no end", "TLS"],
)
def test_whoever_sends_no_header_is_closed_upon_and_the_log_says_why(asked: Asked, sent: bytes) -> None:
    before = len(asked.gateway.log_lines("refused"))
    with RawClient(asked.port) as client:
        client.send(sent)
        assert client.read_to_end() == b""
    line = asked.gateway.wait_for("refused", count=before + 1)
    assert (line["sqlstate"], line["fault_of"]) == ("08P01", "client")
    assert line["reason"].startswith("PROXY protocol: ")
    assert line["client"].startswith("127.0.0.1:")


def test_half_a_header_is_waited_for_no_longer_than_a_login_may_take(balanced: Callable[..., Gateway]) -> None:
    gateway = balanced(login_timeout=0.5, max_logins=1, max_clients=1)
    before = gateway.sockets
    for half in (b"", proxy_v1()[:20], proxy_v2()[:20]):
        with RawClient(gateway.port) as client:
            client.send(half)
            client.read_to_end()
    gateway.wait_for("refused", count=3, reason="login_timeout: the login took too long")
    wait_until(lambda: gateway.sockets == before, "everything to be given back")
    with RawClient(gateway.port) as client:
        client.send(proxy_v1())
        client.log_in()


def test_only_listed_balancers_may_connect(balanced: Callable[..., Gateway]) -> None:
    gateway = balanced(proxy_protocol_from=["127.0.0.2", "127.0.0.3"], deny=["127.0.0.3"])
    for source in ("127.0.0.1", "127.0.0.3"):
        with RawClient(gateway.port, source=source) as client:
            with contextlib.suppress(ConnectionError):
                client.send(proxy_v1())
            assert client.read_to_end() == b""
    with RawClient(gateway.port, source="127.0.0.2") as client:
        client.send(proxy_v1())
        client.log_in()
    gateway.stop()
    denied = gateway.log_lines("connections denied")
    assert [line["reason"] for line in denied] == ["not in proxy_protocol_from", "in deny"]


def test_the_lists_of_networks_hold_for_the_address_that_the_balancer_says(balanced: Callable[..., Gateway]) -> None:
    gateway = balanced(allow=["127.0.0.1", "192.0.2.0/24"], deny=["192.0.2.66"], max_logins=1, max_clients=1)
    before = gateway.sockets
    for source in ("192.0.2.66", "198.51.100.1"):
        for header in (proxy_v1(source), proxy_v2(source)):
            with RawClient(gateway.port) as client:
                client.send(header + startup())
                assert client.read_to_end() == b""
    assert gateway.wait_for("connections denied")["client"] == "192.0.2.66:56324"
    wait_until(lambda: gateway.sockets == before, "everything to be given back")
    with RawClient(gateway.port) as client:
        client.send(proxy_v1("192.0.2.7"))
        client.log_in()
        client.assert_served()
    assert gateway.log_lines("refused") == []


def test_a_listener_without_the_mark_takes_no_header(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, listen=["127.0.0.1:0"], proxy_protocol_from=["127.0.0.1"])
    for header in (proxy_v1(), proxy_v2()):
        with RawClient(gateway.port) as client:
            client.send(header + startup())
            assert client.read_to_end() == b""
    with RawClient(gateway.port) as client:
        client.log_in()


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Identity:
    """The gateway's."""
    return authority.issue("gateway", "localhost", HOST)


@pytest.mark.parametrize("direct", [False, True], ids=["SSLRequest", "direct"])
@pytest.mark.parametrize("header", [proxy_v1(), proxy_v2()], ids=["version 1", "version 2"])
def test_tls_begins_behind_the_header(
    balanced: Callable[..., Gateway], authority: Authority, identity: Identity, header: bytes, *, direct: bool
) -> None:
    gateway = balanced(tls=identity.settings | {"mode": "require"})
    with TlsClient(gateway.port, authority.client_context(), direct=direct, before=header) as client:
        client.log_in()
        client.assert_served()
    line = gateway.wait_for("login")
    assert line["client"] == "192.0.2.7:56324"
    assert line["tls"].startswith("TLS")


def test_bytes_in_plain_behind_an_sslrequest_are_still_refused(
    balanced: Callable[..., Gateway], identity: Identity
) -> None:
    gateway = balanced(tls=identity.settings)
    with RawClient(gateway.port) as client:
        client.send(proxy_v1() + SSL_REQUEST + startup())
        assert client.read_fatal() == ("08P01", "received unencrypted data after SSL request")
    assert gateway.wait_for("refused")["client"] == "192.0.2.7:56324"


def test_a_balancer_may_come_over_a_unix_socket_and_its_clients_still_need_tls(
    balanced: Callable[..., Gateway], authority: Authority, identity: Identity, tmp_path: Path
) -> None:
    gateway = balanced(
        listen=[{"address": f"unix:{tmp_path}:5432", "proxy_protocol": True}],
        proxy_protocol_from=["local"],
        tls=identity.settings | {"mode": "require"},
    )
    with RawClient.of_folder(tmp_path, 5432) as client:
        client.send(proxy_v2() + startup())
        assert client.read_fatal()[0] == "28000"
    assert gateway.wait_for("refused")["client"] == "192.0.2.7:56324"
    with RawClient.of_folder(tmp_path, 5432) as client:
        client.send(proxy_v2() + SSL_REQUEST)
        assert client.read(1) == b"S"
        client.socket = authority.client_context().wrap_socket(client.socket, server_hostname="localhost")
        client.log_in()
        client.assert_served()


def test_a_cancel_request_comes_through_a_balancer_too(balanced: Callable[..., Gateway]) -> None:
    gateway = balanced()
    with RawClient(gateway.port) as client:
        client.send(proxy_v1())
        key = next(body for kind, body in client.log_in() if kind == b"K")
        with RawClient(gateway.port) as canceller:
            canceller.send(proxy_v1("192.0.2.8") + cancel_request(key))
            assert canceller.read_to_end() == b""
    line = gateway.wait_for("cancel request")
    assert (line["outcome"], line["client"]) == ("passed on", "192.0.2.8:56324")


def test_a_users_own_networks_hold_for_the_address_that_the_balancer_says(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    users = tmp_path / "users.yaml"
    users.touch(0o600)
    users.write_text(
        f"targets: {{main: {{host: '127.0.0.1:{postgres.port}', user: trusted}}}}\n"
        "users: {alice: {verifier: secret, databases: {'*': main}, allow: [192.0.2.0/24]}}\n"
    )
    kind = {"kind": "users", "users": {"file": str(users)}, "cleartext_password": True}
    gateway = start_gateway(None, authenticator=kind, **BEHIND_A_BALANCER)
    for source, last in (("192.0.2.7", b"Z"), ("198.51.100.7", b"E")):
        with RawClient(gateway.port) as client:
            client.send(proxy_v1(source) + startup() + password("secret"))
            client.read_until(last)
    assert gateway.wait_for("refused")["reason"] == "this user may not come from this address"


# A real one


@contextlib.contextmanager
def haproxy(folder: Path, target: str, speaks: str) -> Iterator[int]:
    """Runs HAProxy before a gateway; gives its port."""
    if HAPROXY is None:
        pytest.skip("no HAProxy here: the package haproxy is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    configuration = folder / "haproxy.cfg"
    configuration.write_text(HAPROXY_CONFIGURATION.format(port=port, target=target, speaks=speaks))
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen([HAPROXY, "-db", "-f", str(configuration)], stdout=log, stderr=log)
    try:
        wait_until(lambda: is_listened_on(port), "HAProxy to listen")
        yield port
    finally:
        process.terminate()
        process.wait(20)


SPEAKS = ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options unique-id,crc32c"]


@pytest.mark.parametrize("speaks", SPEAKS)
def test_a_driver_behind_haproxy_is_seen_with_its_own_address(
    balanced: Callable[..., Gateway], authority: Authority, identity: Identity, tmp_path: Path, speaks: str
) -> None:
    gateway = balanced(tls=identity.settings)
    with haproxy(tmp_path, f"127.0.0.1:{gateway.port}", speaks) as port:
        for mode in ("disable", "require"):
            with psycopg.connect(
                host="127.0.0.1", port=port, user=mode, password=PASSWORD, dbname="postgres", sslmode=mode
            ) as session:
                assert session.execute("select 42").fetchone() == (42,)
                with socket.socket(fileno=os.dup(session.fileno())) as own:
                    host, its_port = own.getsockname()
            line = gateway.wait_for("login", user=mode)
            assert line["client"] == f"{host}:{its_port}"
            assert ("tls" in line) == (mode == "require")


def test_the_checks_of_haproxy_are_no_clients(balanced: Callable[..., Gateway], tmp_path: Path) -> None:
    gateway = balanced()
    with haproxy(tmp_path, f"127.0.0.1:{gateway.port}", "send-proxy-v2 check inter 50ms check-send-proxy"):
        gateway.wait_for("refused", count=2, reason="client left during its login")
    assert all(line["client"].startswith("127.0.0.1:") for line in gateway.log_lines("refused"))


# The settings


def test_a_marked_listener_needs_to_know_its_balancers(folder: Path, run: Run) -> None:
    configure(folder, listen=[{"address": ":0", "proxy_protocol": True}])
    assert_one_clear_line(run(), "listen: proxy_protocol needs proxy_protocol_from")
    configure(folder, listen=[{"address": ":0", "proxy_protocol": True}], proxy_protocol_from=["everybody"])
    assert_one_clear_line(run(), "proxy_protocol_from: 'everybody' is no network")


def test_check_shows_which_listeners_are_marked(folder: Path, run: Run) -> None:
    configure(folder, listen=[":5432", {"address": ":6432", "proxy_protocol": True}], proxy_protocol_from=["::1"])
    shown = run("check")
    assert shown.returncode == 0, shown
    assert "listen = :5432, :6432 (PROXY protocol)  (file pgauthproxy.yaml)" in shown.stdout
    assert "proxy_protocol_from = ::1  (file pgauthproxy.yaml)" in shown.stdout


def test_a_marked_listener_on_loopback_counts_as_open_to_the_network(balanced: Callable[..., Gateway]) -> None:
    gateway = balanced(authenticator={"method": "cleartext"})
    gateway.wait_for("passwords cross the network in clear")
    with RawClient(gateway.port) as client:
        client.send(proxy_v1() + startup() + message(b"p", b"secret\0"))
        client.read_until(b"Z")
