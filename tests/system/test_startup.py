"""The startup phase against strangers: what is no startup packet, what a packet may not hold, what is negotiated."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import socket
import ssl
import struct
import subprocess

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import StartGateway, WriteAuthenticator
from tests.system.conftest import PASSWORD, Asked
from tests.wire import GSSENC_REQUEST, SSL_REQUEST, RawClient, message, password, query, raw_startup, startup

SECONDS = 30
MAX_PACKET = 10_000
REQUESTS = {"SSL": SSL_REQUEST, "GSS": GSSENC_REQUEST}
NO_USER = ("28000", "no PostgreSQL user name specified in startup packet")


def packet(*strings: bytes, version: int = 3 << 16) -> bytes:
    """A startup packet of these names and values, in turn."""
    return raw_startup(b"".join(string + b"\0" for string in strings) + b"\0", version)


def refused(asked: Asked, sent: bytes) -> tuple[str, str]:
    """SQLSTATE and text that this gets. Nobody is asked about it, and the next client is served."""
    with asked.nobody(), RawClient(asked.port) as client:
        client.send(sent)
        return client.read_fatal()


def assert_closed_silently(asked: Asked, sent: bytes) -> None:
    with asked.nobody(), RawClient(asked.port) as client:
        client.send(sent)
        assert client.read_to_end() == b""


def question_about(asked: Asked, sent: bytes) -> list[bytes]:
    """The lines that the authenticator reads about a client that sends this startup packet, but for the gateway's."""
    with RawClient(asked.port) as client:
        client.send(sent + password())
        client.read_until(b"Z")
    return [line for line in asked.questions[-1].split(b"\n") if not line.startswith(b"_SOURCE_")]


# Lengths


@pytest.mark.parametrize("length", [0, 1, 4, 7, MAX_PACKET + 1, 2**31 - 1, -1, -8, -(2**31)])
def test_a_packet_of_a_forbidden_length_is_closed_on_its_first_four_bytes(asked: Asked, length: int) -> None:
    assert_closed_silently(asked, struct.pack("!i", length))


@pytest.mark.parametrize("length", [MAX_PACKET + 1, 2**31 - 1, -1])
def test_a_packet_of_a_forbidden_length_takes_no_memory(asked: Asked, length: int) -> None:
    assert_closed_silently(asked, struct.pack("!i", length))
    before = asked.gateway.resident_bytes
    clients = [RawClient(asked.port) for _ in range(50)]
    for client in clients:
        client.send(struct.pack("!i", length))
    for client in clients:
        assert client.read_to_end() == b""
        client.socket.close()
    assert asked.gateway.resident_bytes - before < 1024 * 1024


def test_the_longest_packet_that_is_allowed_is_served(asked: Asked) -> None:
    names = (b"user", b"alice", b"filling")
    value = b"x" * (MAX_PACKET - len(packet(*names, b"")))
    sent = packet(*names, value)
    assert len(sent) == MAX_PACKET
    assert question_about(asked, sent) == [b"user=alice", b"filling=" + value]


# Layout


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"user", id="a name cut short"),
        pytest.param(b"user\0", id="a name alone"),
        pytest.param(b"user\0alice", id="a value cut short"),
        pytest.param(b"user\0alice\0", id="no terminator"),
        pytest.param(b"user\0alice\0database\0\0", id="a name without a value"),
        pytest.param(b"user\0alice\0database\0", id="a name without a value or terminator"),
        pytest.param(b"user\0alice\0\0x", id="a byte behind the terminator"),
        pytest.param(b"user\0alice\0\0\0", id="a NUL behind the terminator"),
        pytest.param(b"user\0alice\0\0database\0x\0\0", id="more behind the terminator"),
        pytest.param(b"\0user\0alice\0\0", id="the terminator first"),
        pytest.param(b"\0\0", id="two terminators"),
        pytest.param(b"\0" * 100, id="NULs"),
        pytest.param(b"user\0ali\0ce\0\0", id="a NUL in a value"),
        pytest.param(b"us\0er\0alice\0\0", id="a NUL in a name"),
        pytest.param(bytes(range(1, 256)), id="bytes without a NUL"),
    ],
)
def test_a_packet_of_a_broken_layout_is_refused(asked: Asked, body: bytes) -> None:
    sqlstate, text = refused(asked, raw_startup(body))
    assert sqlstate == "08P01"
    assert text.startswith("invalid startup packet layout: ")


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(packet(), id="no parameters"),
        pytest.param(packet(b"database", b"postgres"), id="no user"),
        pytest.param(packet(b"user", b""), id="an empty user"),
        pytest.param(packet(b"user", b"", b"database", b"postgres"), id="an empty user and a database"),
        pytest.param(packet(b"USER", b"alice"), id="a user in capitals"),
    ],
)
def test_a_packet_without_a_user_is_refused(asked: Asked, sent: bytes) -> None:
    assert refused(asked, sent) == NO_USER


def test_any_bytes_at_all_in_a_packet_do_no_harm(asked: Asked) -> None:
    source = random.Random(1)
    for _ in range(200):
        with RawClient(asked.port) as client:
            client.send(raw_startup(source.randbytes(source.randrange(200))))
            assert client.read_fatal()[0] == "08P01"
    with asked.nobody():
        pass


# What reaches the authenticator


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"\xff\xfe\xfd\x80", id="no UTF-8"),
        pytest.param("zoë".encode("latin-1"), id="Latin-1"),
        pytest.param(b"\xc3", id="UTF-8 cut short"),
        pytest.param(b"\xed\xa0\x80", id="a surrogate"),
        pytest.param("äöü ⅸ 😀".encode(), id="UTF-8"),
        pytest.param(bytes(byte for byte in range(1, 256) if byte not in b"\r\n"), id="every byte"),
        pytest.param("\v\f\x1c\x1d\x1e\x85\u2028\u2029".encode(), id="what only Python takes for line ends"),
        pytest.param(b"a=b=c==", id="equals signs"),
        pytest.param(b" spaces ", id="spaces"),
        pytest.param(b"'\"`$(true)\\", id="what a shell would act on"),
    ],
)
def test_a_value_reaches_the_authenticator_byte_for_byte(asked: Asked, value: bytes) -> None:
    sent = packet(b"user", value, b"database", value, b"application_name", value)
    expected = [name + b"=" + value for name in (b"user", b"database", b"application_name")]
    assert question_about(asked, sent) == expected


def test_parameters_reach_the_authenticator_in_the_clients_order(asked: Asked) -> None:
    sent = packet(b"z", b"1", b"user", b"alice", b"a", b"", b"\xff", b"2", b"database", b"")
    assert question_about(asked, sent) == [b"z=1", b"user=alice", b"a=", b"\xff=2", b"database="]


def test_a_refused_user_is_named_as_it_was_sent(start_gateway: StartGateway, authenticator: WriteAuthenticator) -> None:
    gateway = start_gateway(authenticator("exit 1"))
    user = b"\xff\x80 \xc3"
    with RawClient(gateway.port) as client:
        client.send(packet(b"user", user) + password())
        client.read_message()
        _, body = client.read_message()
    assert b'Mpassword authentication failed for user "' + user + b'"\0' in body


@pytest.mark.parametrize(
    "strings",
    [
        (b"user", b"alice", b"user", b"mallory"),
        (b"user", b"alice", b"user", b"alice"),
        (b"user", b"", b"user", b"alice"),
        (b"user", b"alice", b"database", b"a", b"database", b"b"),
        (b"user", b"alice", b"x", b"1", b"y", b"2", b"x", b"1"),
        (b"user", b"alice", b"_pq_.x", b"1", b"_pq_.x", b"2"),
    ],
)
def test_a_name_that_stands_twice_is_refused(asked: Asked, strings: tuple[bytes, ...]) -> None:
    assert refused(asked, packet(*strings)) == ("08P01", "startup parameter given twice")


@pytest.mark.parametrize(
    "name",
    [
        b"_SOURCE_CRED",
        b"_SOURCE_SALT",
        b"_source_cred",
        b"_Source_Addr",
        b"_SOURCE_",
        b"_SOURCE_WHATEVER",
        b"_META_TARGET_HOST",
        b"_META_TARGET_CRED",
        b"_meta_target_host",
        b"_Meta_Error",
        b"_META_",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_name_that_is_the_gateways_own_is_refused(asked: Asked, name: bytes, *, first: bool) -> None:
    forged, user = (name, b"127.0.0.1:1"), (b"user", b"alice")
    sent = packet(*forged, *user) if first else packet(*user, *forged)
    assert refused(asked, sent) == ("08P01", "reserved name of startup parameter")


@pytest.mark.parametrize(
    "name", [b"_SOURCE", b"SOURCE_CRED", b"x_SOURCE_CRED", b"_META", b"META_TARGET_HOST", b" _META_"]
)
def test_a_name_that_is_merely_alike_is_passed_on(asked: Asked, name: bytes) -> None:
    assert question_about(asked, packet(b"user", b"alice", name, b"1")) == [b"user=alice", name + b"=1"]


@pytest.mark.parametrize("broken", [b"\n", b"\r", b"\r\n", b"\n\n"])
@pytest.mark.parametrize(
    ("before", "behind"),
    [(b"user", b"alice"), (b"user", b"alice\nuser=mallory"), (b"database", b"x\n_SOURCE_CRED=y"), (b"x", b"y")],
)
def test_a_line_break_in_a_value_is_refused(asked: Asked, before: bytes, behind: bytes, broken: bytes) -> None:
    value = behind.replace(b"\n", broken) if b"\n" in behind else behind + broken
    others = () if before == b"user" else (b"user", b"alice")
    assert refused(asked, packet(*others, before, value)) == ("08P01", "invalid character in startup parameter")


@pytest.mark.parametrize("name", [b"x\n", b"\nx", b"x\r", b"a\nuser", b"a=b", b"=", b"user=mallory\nx", b"_pq_.\n"])
def test_a_line_break_or_equals_sign_in_a_name_is_refused(asked: Asked, name: bytes) -> None:
    sent = packet(b"user", b"alice", name, b"1")
    assert refused(asked, sent) == ("08P01", "invalid character in startup parameter")


# Encryption requests


@pytest.mark.parametrize("requests", [["SSL"], ["GSS"], ["SSL", "GSS"], ["GSS", "SSL"]])
def test_each_encryption_request_is_answered_once_and_the_login_goes_on(asked: Asked, requests: list[str]) -> None:
    with RawClient(asked.port) as client:
        for request in requests:
            client.send(REQUESTS[request])
            assert client.read(1) == b"N"
        client.log_in()
        client.assert_served()


@pytest.mark.parametrize(
    "requests",
    [["SSL", "SSL"], ["GSS", "GSS"], ["SSL", "GSS", "SSL"], ["SSL", "GSS", "GSS"], ["GSS", "SSL", "GSS"]],
)
def test_an_encryption_request_that_comes_again_is_refused(asked: Asked, requests: list[str]) -> None:
    with asked.nobody(), RawClient(asked.port) as client:
        for request in requests[:-1]:
            client.send(REQUESTS[request])
            assert client.read(1) == b"N"
        client.send(REQUESTS[requests[-1]])
        sqlstate, text = client.read_fatal()
    assert sqlstate == "0A000"
    assert text.startswith("unsupported frontend protocol 1234.")


@pytest.mark.parametrize(
    ("request_name", "says"), [("SSL", "SSL request"), ("GSS", "GSSAPI encryption request")], ids=["SSL", "GSS"]
)
@pytest.mark.parametrize(
    "behind",
    [
        pytest.param(startup(), id="a startup packet"),
        pytest.param(startup() + password() + query("select 1"), id="a whole login"),
        pytest.param(SSL_REQUEST, id="an SSLRequest"),
        pytest.param(GSSENC_REQUEST, id="a GSSENCRequest"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01", id="a TLS record"),
        pytest.param(b"\0", id="a byte"),
        pytest.param((SSL_REQUEST + GSSENC_REQUEST) * 400, id="hundreds of requests"),
    ],
)
def test_plain_bytes_behind_an_encryption_request_are_refused(
    asked: Asked, request_name: str, says: str, behind: bytes
) -> None:
    sent = REQUESTS[request_name] + behind
    assert refused(asked, sent) == ("08P01", f"received unencrypted data after {says}")


def test_plain_bytes_behind_the_second_encryption_request_are_refused(asked: Asked) -> None:
    with asked.nobody(), RawClient(asked.port) as client:
        client.send(SSL_REQUEST)
        assert client.read(1) == b"N"
        client.send(GSSENC_REQUEST + startup())
        assert client.read_fatal()[0] == "08P01"


@pytest.mark.parametrize("code", [80877103, 80877104])
def test_an_encryption_request_of_a_wrong_length_is_no_way_around(asked: Asked, code: int) -> None:
    # PostgreSQL takes the code alone for the request, whatever stands behind it in the packet.
    with RawClient(asked.port) as client:
        client.send(raw_startup(b"user\0mallory\0\0", code))
        assert client.read(1) == b"N"
        client.log_in()
    assert asked.questions[-1].startswith(b"user=alice\n")


# Versions


@pytest.mark.parametrize(
    ("version", "named"),
    [
        (2 << 16, "2.0"),
        (1 << 16, "1.0"),
        (0, "0.0"),
        (4 << 16, "4.0"),
        ((2 << 16) + 9999, "2.9999"),
        ((4 << 16) + 3, "4.3"),
        (80877105, "1234.5681"),
        (0x7FFFFFFF, "32767.65535"),
        (-1, "65535.65535"),
    ],
)
def test_a_protocol_that_is_not_3_is_refused(asked: Asked, version: int, named: str) -> None:
    sqlstate, text = refused(asked, packet(b"user", b"alice", version=version))
    assert sqlstate == "0A000"
    assert text == f"unsupported frontend protocol {named}: server supports 3.0 to 3.2"


def negotiation(minor: int, *refused_options: bytes) -> bytes:
    names = b"".join(name + b"\0" for name in refused_options)
    return message(b"v", struct.pack("!ii", (3 << 16) + minor, len(refused_options)) + names)


@pytest.mark.parametrize("minor", [0, 1, 2, 3, 9999, 65535])
@pytest.mark.parametrize("options", [(), (b"_pq_.new",), (b"_pq_.b", b"_pq_.a", b"_pq_."), (b"_pq_.\xff",)])
def test_what_is_newer_is_negotiated_down_and_the_session_works(
    asked: Asked, minor: int, options: tuple[bytes, ...]
) -> None:
    strings = itertools.chain.from_iterable((option, b"1") for option in options)
    sent = packet(b"user", b"alice", *strings, b"database", b"postgres", version=(3 << 16) + minor)
    with RawClient(asked.port) as client:
        client.send(sent)
        expected = negotiation(min(minor, 2), *options) if minor > 2 or options else b""
        assert client.read(len(expected)) == expected
        kind, body = client.read_message()
        assert (kind, body[:4]) == (b"R", b"\0\0\0\x05")
        client.send(password() + query("select 42"))
        client.read_until(b"Z")
        assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")
    assert asked.questions[-1].split(b"\n")[:2] == [b"user=alice", b"database=postgres"]
    assert b"_pq_" not in asked.questions[-1]


@pytest.mark.parametrize("name", [b"_PQ_.new", b"_pq_new", b"x_pq_.new"])
def test_what_is_no_option_of_the_protocol_is_not_negotiated(asked: Asked, name: bytes) -> None:
    with RawClient(asked.port) as client:
        client.send(packet(b"user", b"alice", name, b"1"))
        assert client.read_message()[0] == b"R"


@pytest.mark.parametrize(
    "wanted", ["", "max_protocol_version=latest", "min_protocol_version=3.2 max_protocol_version=3.2"]
)
def test_psql_speaks_the_protocol_that_it_wants(asked: Asked, postgres: ThrowawayPostgres, wanted: str) -> None:
    done = subprocess.run(
        [
            *(postgres.binaries / "psql", "-XAtc", "select 42"),
            f"host=127.0.0.1 port={asked.port} user=alice dbname=postgres {wanted}",
        ],
        capture_output=True,
        env=os.environ | {"PGPASSWORD": PASSWORD},
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"42\n"


# What is no client of PostgreSQL


def client_hello() -> bytes:
    """What a client of TLS says first."""
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    return sent.read()


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", id="HTTP"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(client_hello(), id="TLS"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", id="SSH"),
        pytest.param(b"EHLO localhost\r\n", id="SMTP"),
        pytest.param(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", id="PROXY"),
        pytest.param(query("select 1"), id="a query"),
        pytest.param(password(), id="a password"),
        pytest.param(b"\xff" * 100, id="ones"),
        pytest.param(bytes(100), id="zeros"),
    ],
)
def test_what_is_no_client_of_postgresql_is_closed_silently(asked: Asked, sent: bytes) -> None:
    assert_closed_silently(asked, sent)


# In any pieces


def test_a_login_byte_by_byte_is_answered_after_each_last_byte_and_not_before(asked: Asked) -> None:
    with RawClient(asked.port) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send_slowly(data: bytes) -> None:
            for byte in data[:-1]:
                client.send(bytes([byte]))
                readable, _, _ = select.select([client.socket], [], [], 0.002)
                assert not readable
            client.send(data[-1:])

        for request in REQUESTS.values():
            send_slowly(request)
            assert client.read(1) == b"N"
        send_slowly(startup())
        assert client.read_message()[0] == b"R"
        send_slowly(password())
        client.read_until(b"Z")
        send_slowly(query("select 42"))
        assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")


@pytest.mark.parametrize("size", [2, 3, 5, 8, 64])
def test_a_login_in_pieces_of_any_size_is_let_in(asked: Asked, size: int) -> None:
    sent = startup() + password() + query("select 42")
    with RawClient(asked.port) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(sent), size):
            client.send(sent[at : at + size])
        client.read_until(b"Z")
        assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")
