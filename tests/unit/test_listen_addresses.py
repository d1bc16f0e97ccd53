"""Addresses to listen on, as operators write them."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from pgauthproxy.net import listen
from pgauthproxy.net.listen import ListenAddress, ListenError

BACKLOG = 5


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":5432", ListenAddress("", "5432")),
        ("[]:5432", ListenAddress("", "5432")),
        ("localhost:5432", ListenAddress("localhost", "5432")),
        ("0.0.0.0:5432", ListenAddress("0.0.0.0", "5432")),
        ("127.0.0.1:0", ListenAddress("127.0.0.1", "0")),
        (":postgresql", ListenAddress("", "postgresql")),
        ("[::]:5432", ListenAddress("::", "5432")),
        ("[fe80::1%eth0]:5432", ListenAddress("fe80::1%eth0", "5432")),
        ("unix:/run/postgresql:5432", ListenAddress("", "5432", "/run/postgresql")),
        ("unix:/with:colon:5432", ListenAddress("", "5432", "/with:colon")),
        ("unix:/:1", ListenAddress("", "1", "/")),
    ],
)
def test_an_address_takes_all_its_forms(text: str, address: ListenAddress) -> None:
    assert listen.parse_listen(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "5432", "localhost", "localhost:", ":", "::1:5432", "[::1]", "[::1:5432", "::1]:5432", "a:b:c", "[a]b:1"],
)
def test_what_is_no_address_is_named_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(ListenError) as raised:
        listen.parse_listen(text)
    assert str(raised.value) == f"listen: {text}: an address is written host:port, :port or [v6]:port"


@pytest.mark.parametrize(
    "text", ["unix:", "unix:/run", "unix:/run:", "unix:run:5432", "unix::5432", "unix:/run:postgresql", "unix:/run:-1"]
)
def test_what_is_no_socket_folder_is_named_with_the_form_there_is(text: str) -> None:
    with pytest.raises(ListenError) as raised:
        listen.parse_listen(text)
    assert str(raised.value) == f"listen: {text}: a Unix socket is written unix:/path/to/folder:5432"


@pytest.mark.parametrize("text", ["127.0.0.1:65536", ":65536", "[::1]:99999", "localhost:70976"])
def test_a_port_that_is_too_large_is_not_taken_for_another(text: str) -> None:
    with pytest.raises(ListenError) as raised:
        listen.parse_listen(text)
    assert str(raised.value) == f"listen: {text}: a port is at most 65535"


def test_a_unix_socket_has_the_name_that_postgresqls_clients_look_for() -> None:
    assert listen.parse_listen("unix:/run/postgresql:6000").socket_path == "/run/postgresql/.s.PGSQL.6000"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("127.0.0.1:no-such-service", "127.0.0.1:no-such-service: "),
        (":no-such-service", ":no-such-service: "),
        ("192.0.2.1:0", "192.0.2.1:0: Cannot assign requested address"),
        ("unix:/no/such/folder:5432", "/no/such/folder/.s.PGSQL.5432: No such file or directory"),
    ],
)
def test_what_cannot_be_listened_on_is_one_line_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ListenError) as raised:
        listen.open_sockets(listen.parse_listen(text), BACKLOG)
    assert str(raised.value).startswith(f"listen: {reason}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "shown"), [("127.0.0.1:0", "127.0.0.1:"), (":0", "[::]:")])
def test_an_open_socket_is_described_as_an_operator_would_write_it(text: str, shown: str) -> None:
    (listening,) = listen.open_sockets(listen.parse_listen(text), BACKLOG)
    with listening:
        port = listening.getsockname()[1]
        assert listen.describe(listening) in (f"{shown}{port}", f"0.0.0.0:{port}")
        assert not listening.getblocking()


def test_all_interfaces_means_both_families() -> None:
    (listening,) = listen.open_sockets(listen.parse_listen(":0"), BACKLOG)
    with listening:
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            if family == socket.AF_INET or socket.has_dualstack_ipv6():
                with socket.socket(family) as client:
                    client.connect((host, listening.getsockname()[1]))


def test_a_unix_socket_may_be_used_by_everybody(tmp_path: Path) -> None:
    (listening,) = listen.open_sockets(listen.parse_listen(f"unix:{tmp_path}:5432"), BACKLOG)
    with listening:
        path = tmp_path / ".s.PGSQL.5432"
        assert stat.S_IMODE(path.stat().st_mode) == 0o777
        assert listen.describe(listening) == f"unix:{path}"


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / ".s.PGSQL.5432"
    path.write_text("somebody's work")
    with pytest.raises(ListenError, match="Address already in use"):
        listen.open_sockets(listen.parse_listen(f"unix:{tmp_path}:5432"), BACKLOG)
    assert path.read_text() == "somebody's work"


def test_an_address_that_fails_leaves_no_descriptor_open() -> None:
    (taken,) = listen.open_sockets(listen.parse_listen("127.0.0.1:0"), BACKLOG)
    with taken:
        address = ListenAddress("127.0.0.1", str(taken.getsockname()[1]))
        before = sorted(os.listdir("/dev/fd"))
        with pytest.raises(ListenError, match="Address already in use"):
            listen.open_sockets(address, BACKLOG)
        assert sorted(os.listdir("/dev/fd")) == before
