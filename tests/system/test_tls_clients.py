"""TLS with clients: when it is spoken, with which certificate, and what the authenticator learns by it."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
import ssl
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trustme
from cryptography import x509
from cryptography.x509.oid import NameOID

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import StartGateway
from tests.system.conftest import (
    DEBIAN,
    PASSWORD,
    Asked,
    Backends,
    asking_gateway,
    wait_until,
)
from tests.tls import HOST, Authority, Identity, TlsClient
from tests.wire import (
    GSSENC_REQUEST,
    SSL_REQUEST,
    RawClient,
    cancel_request,
    error_fields,
    message,
    password,
    query,
    startup,
)

SECONDS = 30
TLS_REQUIRED = ("28000", "connection requires TLS (sslmode=require or better)")
NO_MORE_REQUESTS = "0A000"
LATER_PLAINTEXT = "received unencrypted data after SSL request"

AskedWith = Callable[..., Asked]


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Identity:
    """The gateway's."""
    return authority.issue("gateway", "localhost", HOST)


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    """How a client speaks TLS that has no certificate."""
    return authority.client_context()


@pytest.fixture(scope="module")
def allowing(
    tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres, authority: Authority, identity: Identity
) -> Iterator[Asked]:
    """A gateway that speaks TLS with those who ask for it, and takes certificates from those who have one."""
    tls = identity.settings | {"client_ca": str(authority.cert), "client_cert": "optional"}
    folder = tmp_path_factory.mktemp("allowing")
    with asking_gateway(folder, postgres.port, cleartext=False, tls=tls) as asked:
        yield asked


@pytest.fixture(scope="module")
def requiring(
    tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres, identity: Identity
) -> Iterator[Asked]:
    """A gateway that serves nobody without TLS."""
    tls = identity.settings | {"mode": "require"}
    folder = tmp_path_factory.mktemp("requiring")
    with asking_gateway(folder, postgres.port, cleartext=False, tls=tls) as asked:
        yield asked


@pytest.fixture
def asked_with(tmp_path: Path, postgres: ThrowawayPostgres, identity: Identity) -> Iterator[AskedWith]:
    """Starts a gateway with these settings of TLS on top of a certificate and its key."""
    with contextlib.ExitStack() as stack:

        def start(**tls: Any) -> Asked:
            found = asking_gateway(tmp_path, postgres.port, cleartext=False, tls=identity.settings | tls)
            return stack.enter_context(found)

        yield start


def psql(port: int, conninfo: str, sql: str = "select 42") -> subprocess.CompletedProcess[str]:
    assert DEBIAN is not None
    return subprocess.run(
        [DEBIAN / "psql", "-XAtc", sql, f"host={HOST} port={port} user=alice dbname=postgres {conninfo}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PGPASSWORD": PASSWORD},
        timeout=SECONDS,
        check=False,
    )


@contextlib.contextmanager
def refused_by(asked: Asked) -> Iterator[None]:
    """What happens in the block is refused in its handshake."""
    known = len(asked.questions)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        yield
    assert len(asked.questions) == known


needs_debian = pytest.mark.skipif(DEBIAN is None, reason="no psql of Debian's here, whose libpq speaks TLS")


# tls.mode


@pytest.mark.parametrize("direct", [False, True])
def test_with_a_certificate_tls_is_spoken_with_those_who_ask_for_it(
    allowing: Asked, context: ssl.SSLContext, *, direct: bool
) -> None:
    with TlsClient(allowing.port, context, direct=direct) as client:
        assert client.tls.version() == "TLSv1.3"
        client.log_in()
        client.assert_served()


def test_with_a_certificate_those_who_do_not_ask_for_tls_are_served_too(allowing: Asked) -> None:
    with RawClient(allowing.port) as client:
        client.log_in()
        client.assert_served()


def test_where_tls_is_required_a_plain_client_is_refused_before_any_password(requiring: Asked) -> None:
    known = len(requiring.questions)
    with RawClient(requiring.port) as client:
        client.send(startup())
        assert client.read_fatal() == TLS_REQUIRED
    assert len(requiring.questions) == known


def test_where_tls_is_required_a_password_that_came_along_is_not_read(requiring: Asked) -> None:
    known = len(requiring.questions)
    with RawClient(requiring.port) as client:
        client.send(startup() + password() + query("select 1"))
        assert client.read_fatal() == TLS_REQUIRED
    assert len(requiring.questions) == known


def test_where_tls_is_required_a_client_may_not_go_on_in_plain_after_gssapi_was_refused(requiring: Asked) -> None:
    with RawClient(requiring.port) as client:
        client.send(GSSENC_REQUEST)
        assert client.read(1) == b"N"
        client.send(startup())
        assert client.read_fatal() == TLS_REQUIRED


@pytest.mark.parametrize("direct", [False, True])
def test_where_tls_is_required_those_who_speak_it_are_served(
    requiring: Asked, context: ssl.SSLContext, *, direct: bool
) -> None:
    with TlsClient(requiring.port, context, direct=direct) as client:
        client.log_in()
        client.assert_served()


def test_the_log_says_why_a_plain_client_was_refused(requiring: Asked) -> None:
    with RawClient(requiring.port) as client:
        address = "{}:{}".format(*client.socket.getsockname())
        client.send(startup())
        client.read_fatal()
    line = requiring.gateway.wait_for("refused", client=address)
    assert (line["sqlstate"], line["fault_of"], line["reason"]) == ("28000", "client", TLS_REQUIRED[1])


def test_where_tls_is_required_a_unix_socket_needs_none(
    start_gateway: StartGateway, mapped: Path, identity: Identity, tmp_path: Path
) -> None:
    listen = ["127.0.0.1:0", f"unix:{tmp_path}:5432"]
    start_gateway(mapped, listen=listen, tls=identity.settings | {"mode": "require"})
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(tmp_path / ".s.PGSQL.5432"))
        client.sendall(SSL_REQUEST)
        assert client.recv(1) == b"N"
        client.sendall(startup())
        assert client.recv(9, socket.MSG_WAITALL) == b"R\0\0\0\x0c\0\0\0\x05"
    with psycopg.connect(host=str(tmp_path), user="alice", password=PASSWORD, dbname="postgres") as session:
        assert session.execute("select 42").fetchone() == (42,)
        assert not session.pgconn.ssl_in_use


def connect(port: int, context: ssl.SSLContext, way: str) -> RawClient:
    return RawClient(port) if way == "plain" else TlsClient(port, context, direct=way == "direct")


@pytest.mark.parametrize("way", ["plain", "SSLRequest", "direct"])
def test_where_tls_is_required_a_cancel_request_may_come_with_it_and_without(
    requiring: Asked, context: ssl.SSLContext, backends: Backends, way: str
) -> None:
    with TlsClient(requiring.port, context) as client:
        (key,) = [body for kind, body in client.log_in() if kind == b"K"]
        client.send(query("select pg_backend_pid()"))
        pid = int(next(body for kind, body in client.read_until(b"Z") if kind == b"D")[6:])
        client.send(query("select pg_sleep(60)"))
        wait_until(lambda: backends.sleeps(pid), "the query to begin")
        with connect(requiring.port, context, way) as canceller:
            canceller.send(cancel_request(key))
            assert canceller.read_to_end() == b""
        errors = [error_fields(body)["C"] for kind, body in client.read_until(b"Z") if kind == b"E"]
    assert errors == ["57014"]


def test_where_tls_is_disabled_the_certificate_is_not_used(asked_with: AskedWith, context: ssl.SSLContext) -> None:
    asked = asked_with(mode="disable")
    with RawClient(asked.port) as client:
        client.send(SSL_REQUEST)
        assert client.read(1) == b"N"
        client.log_in()
        client.assert_served()
    with asked.nobody(), pytest.raises((ssl.SSLError, ConnectionError)):
        TlsClient(asked.port, context, direct=True)


@needs_debian
@pytest.mark.parametrize("sslmode", ["allow", "prefer", "require"])
def test_psql_finds_its_way_to_tls_where_that_is_required(requiring: Asked, sslmode: str) -> None:
    done = psql(requiring.port, f"sslmode={sslmode}")
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr


@needs_debian
def test_psql_that_will_not_speak_tls_is_told_what_it_needs(requiring: Asked) -> None:
    done = psql(requiring.port, "sslmode=disable")
    assert done.returncode == 2
    assert f"FATAL:  {TLS_REQUIRED[1]}" in done.stderr


# Negotiation


def test_bytes_in_plain_behind_the_request_are_refused(allowing: Asked) -> None:
    for behind in (b"\0", startup(), startup() + password(), b"\x16\x03\x01", SSL_REQUEST):
        with allowing.nobody(), RawClient(allowing.port) as client:
            client.send(SSL_REQUEST + behind)
            assert client.read_fatal() == ("08P01", LATER_PLAINTEXT)


def test_what_was_sent_before_the_handshake_is_never_taken_for_what_came_after_it(
    allowing: Asked, context: ssl.SSLContext
) -> None:
    with allowing.nobody(), RawClient(allowing.port) as client:
        client.send(SSL_REQUEST)
        assert client.read(1) == b"S"
        client.send(startup(user="mallory") + password())
        with pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(client.socket, server_hostname="localhost")


def test_gssapi_may_be_asked_for_before_tls(allowing: Asked, context: ssl.SSLContext) -> None:
    with RawClient(allowing.port) as client:
        client.send(GSSENC_REQUEST)
        assert client.read(1) == b"N"
        client.send(SSL_REQUEST)
        assert client.read(1) == b"S"
        client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
        client.log_in()
        client.assert_served()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("request_", [SSL_REQUEST, GSSENC_REQUEST], ids=["SSLRequest", "GSSENCRequest"])
def test_no_encryption_is_asked_for_within_tls(
    allowing: Asked, context: ssl.SSLContext, request_: bytes, *, direct: bool
) -> None:
    with allowing.nobody(), TlsClient(allowing.port, context, direct=direct) as client:
        client.send(request_)
        sqlstate, _ = client.read_fatal()
    assert sqlstate == NO_MORE_REQUESTS


@pytest.mark.parametrize("direct", [False, True])
def test_the_application_protocol_is_offered_everywhere(
    allowing: Asked, context: ssl.SSLContext, *, direct: bool
) -> None:
    with TlsClient(allowing.port, context, direct=direct) as client:
        assert client.tls.selected_alpn_protocol() == "postgresql"


@pytest.mark.parametrize("offered", [[], ["http/1.1"], ["postgresql", "http/1.1"], ["h2", "postgresql"]], ids=str)
def test_direct_tls_needs_the_application_protocol(allowing: Asked, authority: Authority, offered: list[str]) -> None:
    context = ssl.create_default_context(cafile=str(authority.cert))
    if offered:
        context.set_alpn_protocols(offered)
    if "postgresql" in offered:
        with TlsClient(allowing.port, context, direct=True) as client:
            assert client.tls.selected_alpn_protocol() == "postgresql"
            client.log_in()
        return
    with allowing.nobody(), TlsClient(allowing.port, context, direct=True) as client:
        client.send(startup() + password())
        assert client.read_fatal() == ("08P01", "direct TLS without the application protocol postgresql")


def test_behind_an_ssl_request_the_application_protocol_is_not_needed(allowing: Asked, authority: Authority) -> None:
    context = ssl.create_default_context(cafile=str(authority.cert))
    with TlsClient(allowing.port, context) as client:
        assert client.tls.selected_alpn_protocol() is None
        client.log_in()
        client.assert_served()


@pytest.mark.parametrize("direct", [False, True])
def test_a_handshake_may_come_byte_by_byte(allowing: Asked, context: ssl.SSLContext, *, direct: bool) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with RawClient(allowing.port) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not direct:
            client.send(SSL_REQUEST)
            assert client.read(1) == b"S"

        def pump(step: Callable[[], Any]) -> Any:
            while True:
                try:
                    result = step()
                except ssl.SSLWantReadError:
                    result = None
                for byte in outgoing.read():
                    client.send(bytes([byte]))
                if result is not None:
                    return result
                incoming.write(client.socket.recv(65536))

        pump(lambda: tls.do_handshake() or True)
        pump(lambda: tls.write(startup()))
        assert pump(lambda: tls.read(9)) == b"R\0\0\0\x0c\0\0\0\x05"


# Names (SNI)


@pytest.fixture(scope="module")
def hosting(
    tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres, authority: Authority, identity: Identity
) -> Iterator[Asked]:
    """A gateway with certificates of their own for two names, which wants a certificate of every client."""
    hosts = {
        "one.example": authority.issue("one", "one.example").settings,
        "Two.example": authority.issue("two", "two.example").settings,
    }
    tls = identity.settings | {"hosts": hosts, "client_ca": str(authority.cert), "client_cert": "require"}
    with asking_gateway(tmp_path_factory.mktemp("hosting"), postgres.port, cleartext=False, tls=tls) as asked:
        yield asked


@pytest.fixture(scope="module")
def known_client(authority: Authority) -> Identity:
    return authority.issue("known client", common_name="known")


def shown_to(port: int, context: ssl.SSLContext, name: str | None) -> set[str]:
    """The names in the certificate that a client gets which asks for this one."""
    context.check_hostname = False
    with TlsClient(port, context, direct=True, server_name=name) as client:
        client.log_in()
        certificate = client.tls.getpeercert()
    assert certificate is not None
    return {str(value) for _, value in certificate["subjectAltName"]}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("one.example", {"one.example"}),
        ("ONE.example", {"one.example"}),
        ("two.example", {"two.example"}),
        ("three.example", {"localhost", HOST}),
        ("sub.one.example", {"localhost", HOST}),
        ("localhost", {"localhost", HOST}),
        (None, {"localhost", HOST}),
    ],
)
def test_a_client_is_shown_the_certificate_of_the_host_that_it_asks_for(
    hosting: Asked, authority: Authority, known_client: Identity, name: str | None, shown: set[str]
) -> None:
    assert shown_to(hosting.port, authority.client_context(known_client), name) == shown


@pytest.mark.parametrize("name", ["one.example", "localhost"])
def test_certificates_are_asked_for_at_every_host(
    hosting: Asked, authority: Authority, stranger: Authority, name: str
) -> None:
    for identity in (None, stranger.issue("unknown client", common_name="unknown")):
        context = authority.client_context(identity)
        with refused_by(hosting), TlsClient(hosting.port, context, server_name=name) as client:
            client.log_in()


@pytest.mark.parametrize(("name", "line"), [("one.example", b"one.example"), ("Three.Example", b"Three.Example")])
def test_the_name_reaches_the_authenticator_as_it_was_sent(
    hosting: Asked, authority: Authority, known_client: Identity, name: str, line: bytes
) -> None:
    shown_to(hosting.port, authority.client_context(known_client), name)
    assert b"_SOURCE_TLS_SNI=" + line in hosting.questions[-1].split(b"\n")


def test_an_address_is_no_name(hosting: Asked, authority: Authority, known_client: Identity) -> None:
    # As RFC 6066 has it, libpq and Python send none for it.
    assert shown_to(hosting.port, authority.client_context(known_client), HOST) == {"localhost", HOST}
    assert b"_SOURCE_TLS_SNI" not in hosting.questions[-1]


def client_hello_for(name: bytes) -> bytes:
    """A ClientHello that asks for a name which Python would not send."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.set_alpn_protocols(["postgresql"])
    placeholder = b"x" * len(name)
    tls = context.wrap_bio(incoming, outgoing, server_hostname=placeholder.decode())
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    assert hello.count(placeholder) == 1
    return hello.replace(placeholder, name)


@pytest.mark.parametrize("name", [b"a\nuser=mallory", b"a\r_SOURCE_X=1", b"a=b.example", b"\xff\xfe.example", b"a b.c"])
def test_a_name_that_no_host_can_have_is_refused(hosting: Asked, name: bytes) -> None:
    known = len(hosting.questions)
    with RawClient(hosting.port) as client:
        client.send(client_hello_for(name))
        alert = client.read_to_end()
    # A fatal alert: unrecognized_name, or of a name that cannot be decoded.
    assert alert[0] == 0x15
    assert alert[5] == 2
    assert len(hosting.questions) == known


# What the authenticator learns


def question_of(
    asked: Asked, context: ssl.SSLContext, *, server_name: str | None = "localhost", sent: bytes | None = None
) -> list[str]:
    """What it is asked about a client, from the session on, as far as the credential."""
    with TlsClient(asked.port, context, server_name=server_name) as client:
        client.log_in()
    lines = asked.questions[-1].decode().split("\n")
    session = next(at for at, line in enumerate(lines) if line.startswith("_SOURCE_SESSION="))
    assert lines[-2].startswith("_SOURCE_CRED=")
    assert lines[-1].startswith("_SOURCE_SALT=")
    return lines[session + 1 : -2]


def without_checks(context: ssl.SSLContext) -> ssl.SSLContext:
    context.check_hostname = False
    return context


def test_a_client_without_a_certificate_is_known_by_version_and_name(allowing: Asked, context: ssl.SSLContext) -> None:
    assert question_of(allowing, context) == ["_SOURCE_TLS=TLSv1.3", "_SOURCE_TLS_SNI=localhost"]


def test_a_client_of_an_older_version_is_known_by_that(allowing: Asked, authority: Authority) -> None:
    context = without_checks(authority.client_context())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert question_of(allowing, context, server_name=None) == ["_SOURCE_TLS=TLSv1.2"]


def test_a_plain_client_has_no_line_about_tls(allowing: Asked) -> None:
    with RawClient(allowing.port) as client:
        client.log_in()
    assert b"_SOURCE_TLS" not in allowing.questions[-1]


def test_a_certificate_that_nobody_asked_for_is_not_told(asked_with: AskedWith, authority: Authority) -> None:
    asked = asked_with(client_ca=str(authority.cert), client_cert="none")
    context = authority.client_context(authority.issue("unasked client", common_name="unasked"))
    assert question_of(asked, context) == ["_SOURCE_TLS=TLSv1.3", "_SOURCE_TLS_SNI=localhost"]


def test_a_certificate_is_told_in_these_lines(allowing: Asked, authority: Authority) -> None:
    names: list[x509.GeneralName] = [
        x509.DNSName("a.example"),
        x509.DNSName("*.b.example"),
        x509.IPAddress(ipaddress.ip_address("192.0.2.1")),
        x509.IPAddress(ipaddress.ip_address("2001:db8::1")),
        x509.RFC822Name("alice@example.com"),
        x509.UniformResourceIdentifier("spiffe://example.com/alice"),
    ]
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Müller & Söhne, GmbH"),
            x509.NameAttribute(NameOID.COMMON_NAME, "alice"),
        ]
    )
    identity = authority.sign("alice", subject, names)
    issuer = identity.certificate.issuer
    assert question_of(allowing, authority.client_context(identity)) == [
        "_SOURCE_TLS=TLSv1.3",
        "_SOURCE_TLS_SNI=localhost",
        "_SOURCE_TLS_SUBJECT=CN=alice,O=Müller & Söhne\\, GmbH,C=DE",
        f"_SOURCE_TLS_ISSUER={issuer.rfc4514_string()}",
        f"_SOURCE_TLS_SERIAL={identity.certificate.serial_number:x}",
        "_SOURCE_TLS_SAN=DNS:a.example,DNS:*.b.example,IP:192.0.2.1,IP:2001:db8::1,email:alice@example.com,"
        "URI:spiffe://example.com/alice",
        f"_SOURCE_TLS_FINGERPRINT={hashlib.sha256(identity.der).hexdigest()}",
    ]


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ([(NameOID.COMMON_NAME, 'a,b+c"d\\e<f>g;h')], 'CN=a\\,b\\+c\\"d\\\\e\\<f\\>g\\;h'),
        ([(NameOID.COMMON_NAME, " a ")], "CN=\\ a\\ "),
        ([(NameOID.COMMON_NAME, "#a")], "CN=\\#a"),
        ([(NameOID.COMMON_NAME, "a=b")], "CN=a=b"),
        ([(NameOID.COMMON_NAME, "zoë 😀")], "CN=zoë 😀"),
        ([(NameOID.COMMON_NAME, "a"), (NameOID.COMMON_NAME, "b")], "CN=b,CN=a"),
        ([(NameOID.EMAIL_ADDRESS, "a@b.c")], "1.2.840.113549.1.9.1=a@b.c"),
        ([], ""),
        # What would forge a line stands there as RFC 4514 writes any byte.
        ([(NameOID.COMMON_NAME, "alice\n_SOURCE_TLS_SUBJECT=CN=root")], "CN=alice\\0A_SOURCE_TLS_SUBJECT=CN=root"),
        ([(NameOID.COMMON_NAME, "a\r\n\tb\x85\u2028c")], "CN=a\\0D\\0A\\09b\\C2\\85\\E2\\80\\A8c"),
    ],
)
def test_a_subject_is_told_as_rfc_4514_has_it(
    allowing: Asked, authority: Authority, attributes: list[tuple[x509.ObjectIdentifier, str]], told: str
) -> None:
    subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])
    identity = authority.sign("subject", subject, [x509.DNSName("x.example")])
    lines = question_of(allowing, authority.client_context(identity))
    assert [line for line in lines if line.startswith("_SOURCE_TLS_SUBJECT")] == [f"_SOURCE_TLS_SUBJECT={told}"]
    assert len(lines) == 7


def test_several_values_in_one_place_of_a_subject_are_told_together(allowing: Asked, authority: Authority) -> None:
    both = x509.RelativeDistinguishedName(
        [x509.NameAttribute(NameOID.COMMON_NAME, "alice"), x509.NameAttribute(NameOID.USER_ID, "1000")]
    )
    identity = authority.sign("both", x509.Name([both]), [])
    (line,) = [
        line for line in question_of(allowing, authority.client_context(identity)) if line.startswith("_SOURCE_TLS_SUB")
    ]
    assert line in ("_SOURCE_TLS_SUBJECT=CN=alice+UID=1000", "_SOURCE_TLS_SUBJECT=UID=1000+CN=alice")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], ""),
        ([x509.UniformResourceIdentifier("urn:a,DNS:root.example")], "URI:urn:a%2CDNS:root.example"),
        ([x509.RFC822Name("a@b.c\nuser=root")], "email:a@b.c\\0Auser=root"),
        ([x509.DirectoryName(x509.Name([])), x509.DNSName("a.example")], "DNS:a.example"),
        ([x509.RegisteredID(NameOID.COMMON_NAME)], ""),
    ],
)
def test_other_names_of_a_certificate_cannot_look_like_more(
    allowing: Asked, authority: Authority, names: list[x509.GeneralName], told: str
) -> None:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alice")])
    lines = question_of(allowing, authority.client_context(authority.sign("names", subject, names)))
    assert [line for line in lines if line.startswith("_SOURCE_TLS_SAN")] == [f"_SOURCE_TLS_SAN={told}"]


@pytest.mark.parametrize("name", ["_SOURCE_TLS", "_SOURCE_TLS_SUBJECT", "_source_tls_subject"])
def test_a_client_cannot_tell_these_lines_itself(allowing: Asked, context: ssl.SSLContext, name: str) -> None:
    with allowing.nobody(), TlsClient(allowing.port, context) as client:
        client.send(startup(**{name: "CN=root"}) + password())
        assert client.read_fatal() == ("08P01", "reserved name of startup parameter")


def test_a_session_that_is_resumed_is_known_by_its_certificate_as_before(allowing: Asked, authority: Authority) -> None:
    # TLS 1.2: the gateway gives no tickets for 1.3.
    context = authority.client_context(authority.issue("resuming", common_name="resuming"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with TlsClient(allowing.port, context) as client:
        client.log_in()
        session = client.tls.session
    first = allowing.questions[-1].decode().split("\n")[5:-2]
    with RawClient(allowing.port) as client:
        client.send(SSL_REQUEST)
        assert client.read(1) == b"S"
        client.socket = resumed = context.wrap_socket(client.socket, server_hostname="localhost", session=session)
        client.log_in()
        assert resumed.session_reused
    again = allowing.questions[-1].decode().split("\n")[5:-2]
    assert again == first
    assert "_SOURCE_TLS=TLSv1.2" in again
    assert any(line.startswith("_SOURCE_TLS_SUBJECT=CN=resuming,") for line in again)


def test_no_tickets_are_given_where_nobody_would_use_them(allowing: Asked, context: ssl.SSLContext) -> None:
    with TlsClient(allowing.port, context) as client:
        client.log_in()
        client.assert_served()
        session = client.tls.session
    assert session is None or not session.has_ticket


# Certificates of clients


@pytest.mark.parametrize("client_cert", ["none", "optional", "require"])
@pytest.mark.parametrize("shows", [False, True])
def test_certificates_are_asked_for_as_configured(
    asked_with: AskedWith, authority: Authority, client_cert: str, *, shows: bool
) -> None:
    asked = asked_with(client_ca=str(authority.cert), client_cert=client_cert)
    context = authority.client_context(authority.issue("shown", common_name="shown") if shows else None)
    if client_cert == "require" and not shows:
        with refused_by(asked), TlsClient(asked.port, context) as client:
            client.log_in()
        reason = asked.gateway.wait_for("refused")["reason"]
        assert reason.startswith("TLS with the client failed: PEER_DID_NOT_RETURN_A_CERTIFICATE")
        return
    lines = question_of(asked, context)
    assert ("_SOURCE_TLS_SUBJECT=CN=shown,OU=certificates,O=testing" in lines) == (shows and client_cert != "none")


@needs_debian
def test_psql_without_a_certificate_is_told_that_one_is_required(asked_with: AskedWith, authority: Authority) -> None:
    asked = asked_with(client_ca=str(authority.cert), client_cert="require")
    done = psql(asked.port, "sslmode=require sslcert=/nowhere")
    assert done.returncode == 2
    assert "certificate required" in done.stderr


@pytest.fixture(scope="module")
def certifying(
    tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres, authority: Authority, identity: Identity
) -> Iterator[Asked]:
    """A gateway to which the certificate is the credential."""
    tls = identity.settings | {"client_ca": str(authority.cert), "client_cert": "optional"}
    folder = tmp_path_factory.mktemp("certifying")
    method = {"method": "cert"}
    with asking_gateway(folder, postgres.port, cleartext=False, authenticator=method, tls=tls) as asked:
        yield asked


def test_in_method_cert_no_password_is_asked_for(certifying: Asked, authority: Authority) -> None:
    context = authority.client_context(authority.issue("entering", common_name="entering"))
    with TlsClient(certifying.port, context) as client:
        client.send(startup())
        assert client.read_message() == (b"R", b"\0\0\0\0")
        client.read_until(b"Z")
        client.assert_served()
    lines = certifying.questions[-1].decode().split("\n")
    assert "_SOURCE_METHOD=cert" in lines
    assert "_SOURCE_TLS_SUBJECT=CN=entering,OU=certificates,O=testing" in lines
    assert not [line for line in lines if line.startswith(("_SOURCE_CRED", "_SOURCE_SALT"))]


def test_in_method_cert_the_authenticator_may_refuse(certifying: Asked, authority: Authority) -> None:
    context = authority.client_context(authority.issue("refused", common_name="refused"))
    with TlsClient(certifying.port, context) as client:
        client.send(startup(user="mallory"))
        assert client.read_fatal() == ("28P01", 'password authentication failed for user "mallory"')


def test_in_method_cert_nobody_is_served_without_one(certifying: Asked, context: ssl.SSLContext) -> None:
    known = len(certifying.questions)
    with TlsClient(certifying.port, context) as client:
        client.send(startup())
        assert client.read_fatal() == ("28000", "connection requires a valid client certificate")
    with RawClient(certifying.port) as client:
        client.send(startup())
        assert client.read_fatal() == ("28000", "connection requires a valid client certificate")
    assert len(certifying.questions) == known


# Versions and ciphers


def old_context(version: ssl.TLSVersion) -> ssl.SSLContext:
    """A client that speaks this version and no other, as carelessly as OpenSSL lets it."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    return context


def refused_handshake(port: int, context: ssl.SSLContext) -> str:
    with pytest.raises(ssl.SSLError) as caught, TlsClient(port, context):
        pass
    return str(caught.value)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1], ids=["1.0", "1.1"])
def test_old_versions_are_refused(allowing: Asked, version: ssl.TLSVersion) -> None:
    assert "PROTOCOL_VERSION" in refused_handshake(allowing.port, old_context(version))


def test_min_version_refuses_what_is_older(asked_with: AskedWith) -> None:
    asked = asked_with(min_version="1.3")
    assert "PROTOCOL_VERSION" in refused_handshake(asked.port, old_context(ssl.TLSVersion.TLSv1_2))
    with TlsClient(asked.port, old_context(ssl.TLSVersion.TLSv1_3)) as client:
        client.log_in()


# A gateway whose key is RSA's can do all of these.
WEAK = [
    "AES128-SHA",
    "AES256-GCM-SHA384",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-RSA-AES256-SHA384",
    "DHE-RSA-AES128-GCM-SHA256",
]


@pytest.fixture(scope="module")
def rsa(authority: Authority) -> Identity:
    return authority.issue("gateway with RSA", "localhost", key_type=trustme.KeyType.RSA)


@pytest.fixture(scope="module")
def rsa_asked(tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres, rsa: Identity) -> Iterator[Asked]:
    folder = tmp_path_factory.mktemp("rsa")
    with asking_gateway(folder, postgres.port, cleartext=False, tls=rsa.settings) as asked:
        yield asked


@pytest.mark.parametrize("cipher", WEAK)
def test_ciphers_without_forward_secrecy_and_authentication_are_refused(rsa_asked: Asked, cipher: str) -> None:
    context = old_context(ssl.TLSVersion.TLSv1_2)
    context.set_ciphers(f"{cipher}:@SECLEVEL=0")
    assert "HANDSHAKE_FAILURE" in refused_handshake(rsa_asked.port, context)


@pytest.mark.parametrize("cipher", ["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-CHACHA20-POLY1305"])
def test_good_ciphers_are_spoken(rsa_asked: Asked, cipher: str) -> None:
    context = old_context(ssl.TLSVersion.TLSv1_2)
    context.set_ciphers(cipher)
    with TlsClient(rsa_asked.port, context) as client:
        assert client.tls.cipher()[0] == cipher  # type: ignore[index]
        client.log_in()


def test_ciphers_are_what_the_settings_say(asked_with: AskedWith, rsa: Identity) -> None:
    asked = asked_with(**rsa.settings, ciphers="AES128-SHA")
    context = old_context(ssl.TLSVersion.TLSv1_2)
    context.set_ciphers("AES128-SHA:@SECLEVEL=0")
    with TlsClient(asked.port, context) as client:
        client.log_in()
    context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
    assert "HANDSHAKE_FAILURE" in refused_handshake(asked.port, context)


def test_a_session_over_tls_ends_with_a_goodbye(allowing: Asked, context: ssl.SSLContext) -> None:
    with TlsClient(allowing.port, context) as client:
        client.log_in()
        client.send(message(b"X"))
        # It raises an error where there is none.
        assert client.read_to_end() == b""
    with TlsClient(allowing.port, context) as client:
        client.send(startup(user="mallory") + password())
        client.read_message()
        assert client.read_fatal()[0] == "28P01"


def test_the_log_names_version_and_subject(allowing: Asked, authority: Authority) -> None:
    context = authority.client_context(authority.issue("logged", common_name="logged"))
    with TlsClient(allowing.port, context) as client:
        address = "{}:{}".format(*client.socket.getsockname())
        client.log_in()
    line = allowing.gateway.wait_for("login", client=address)
    assert (line["tls"], line["certificate"]) == ("TLSv1.3", "CN=logged,OU=certificates,O=testing")
