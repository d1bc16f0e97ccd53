"""TLS with targets: when it is spoken, whom it trusts, and what becomes of targets that get it wrong or attack."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes

from pgauthproxy.proto import scram
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway
from tests.system.conftest import (
    DEBIAN_VERSION,
    DIRECT_TLS_SINCE,
    Answering,
    Backends,
    answering_gateway,
    wait_until,
)
from tests.tls import HOST, Authority, Identity, opens_with_tls, self_signed, server_context, with_negative_serial
from tests.wire import (
    AUTH_OK,
    CANCEL_REQUEST,
    KEY,
    READY,
    SSL_REQUEST,
    RawClient,
    ScriptedTarget,
    cancel_request,
    error_fields,
    greet,
    message,
    password,
    query,
    read_exactly,
    read_startup,
    startup,
)

SECONDS = 30
UNREACHABLE = "could not connect to the target server"
WORDS = "words 9f3377aa"
ENCRYPTED = "select coalesce(version, 'plain') from pg_stat_ssl where pid = pg_backend_pid()"
VERIFYING = ("verify-ca", "verify-full")
MappedTo = Callable[..., Gateway]


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answering]:
    """A gateway with the settings that everybody has."""
    with answering_gateway(tmp_path_factory.mktemp("answering")) as found:
        yield found


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answering]:
    """A gateway with little time for its targets."""
    settings = {"connect_timeout": 0.4, "login_timeout": 0.6}
    with answering_gateway(tmp_path_factory.mktemp("hasty"), target=settings) as found:
        yield found


@pytest.fixture(scope="module")
def identities(authority: Authority, stranger: Authority) -> dict[str, Identity]:
    """What a target may show."""
    return {
        "right": authority.issue("right", "localhost", HOST),
        "wrong host": authority.issue("wrong host", "elsewhere.example"),
        "self-signed": self_signed(authority.folder, "self-signed"),
        "expired": authority.issue_expired("expired", "localhost", HOST),
        "unknown authority": stranger.issue("unknown", "localhost", HOST),
    }


@dataclass
class Witness:
    """A target that speaks TLS with those who ask for it, lets anybody in, and remembers what it saw."""

    context: ssl.SSLContext
    requests: int = 0
    """How often it was asked for TLS."""
    versions: list[str] = field(default_factory=list)
    """Of each session that it greeted, empty for plain."""
    resumed: list[bool] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    """That it was asked for by, in each handshake."""
    certificates: list[dict[str, Any] | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context.sni_callback = lambda _, name, __: self.names.append(name)

    def opens(self, connection: socket.socket) -> socket.socket:
        if connection.recv(len(SSL_REQUEST), socket.MSG_PEEK | socket.MSG_WAITALL) != SSL_REQUEST:
            return connection
        self.requests += 1
        return opens_with_tls(self.context)(connection)

    def greets(self, connection: socket.socket) -> None:
        encrypted = connection if isinstance(connection, ssl.SSLSocket) else None
        self.versions.append((encrypted and encrypted.version()) or "")
        self.resumed.append(bool(encrypted and encrypted.session_reused))
        self.certificates.append(encrypted.getpeercert() if encrypted else None)
        greet(connection)
        while connection.recv(65536):
            continue


@contextlib.contextmanager
def witnessing(context: ssl.SSLContext) -> Iterator[tuple[Witness, ScriptedTarget]]:
    witness = Witness(context)
    with ScriptedTarget(witness.greets, opens=witness.opens) as target:
        yield witness, target


def at(target: ScriptedTarget | ThrowawayPostgres, host: str = HOST, **more: str) -> dict[str, str]:
    """The lines that send somebody there."""
    return {"_META_TARGET_HOST": f"{host}:{target.port}", "user": "postgres", "database": "postgres"} | more


def tls(mode: str, authority: Authority | None = None, **more: str) -> dict[str, str]:
    """The lines that say how."""
    lines = {"_META_TARGET_TLS": mode} | ({} if authority is None else {"_META_TARGET_CA": str(authority.cert)})
    return lines | {f"_META_TARGET_{name}": value for name, value in more.items()}


def refused(answering: Answering, lines: dict[str, str], says: str, sqlstate: str = "08001") -> None:
    """Such a client must be refused in neutral words, with the reason in the log."""
    error, reason = answering.refused(lines)
    assert (error["S"], error["C"]) == ("FATAL", sqlstate), reason
    assert says in reason
    for told in error.values():
        assert WORDS not in told
        assert "certificate" not in told.lower()


# Modes


@pytest.mark.parametrize("host", [HOST, "localhost"])
@pytest.mark.parametrize("shown", ["right", "wrong host", "self-signed", "expired", "unknown authority"])
@pytest.mark.parametrize("mode", ["disable", "prefer", "require", "require and ca", "verify-ca", "verify-full"])
def test_each_mode_trusts_whom_libpqs_does(
    answering: Answering, authority: Authority, identities: dict[str, Identity], mode: str, shown: str, host: str
) -> None:
    word, _, with_ca = mode.partition(" and ")
    verifies = with_ca or mode in VERIFYING
    trusted = ["right", "wrong host"] if mode != "verify-full" else ["right"]
    with witnessing(server_context(identities[shown])) as (witness, target):
        lines = at(target, host) | tls(word, authority if verifies else None)
        if verifies and shown not in trusted:
            refused(answering, lines, "TLS with the target failed: CERTIFICATE_VERIFY_FAILED: ")
            assert not witness.versions
        else:
            answering.greeted(lines)
            assert witness.versions == ([""] if mode == "disable" else ["TLSv1.3"])
        assert witness.requests == (mode != "disable")


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        ("wrong host", "certificate is not valid for '{}'"),
        ("self-signed", "self-signed certificate"),
        ("expired", "certificate has expired"),
        ("unknown authority", "unable to get local issuer certificate"),
    ],
)
@pytest.mark.parametrize("host", [HOST, "localhost"])
def test_the_log_says_what_is_wrong_with_a_certificate(
    answering: Answering, authority: Authority, identities: dict[str, Identity], shown: str, reason: str, host: str
) -> None:
    with witnessing(server_context(identities[shown])) as (_, target):
        refused(answering, at(target, host) | tls("verify-full", authority), reason.format(host))


@pytest.mark.parametrize("mode", ["disable", "prefer", "require", "verify-ca", "verify-full"])
def test_postgresql_sees_what_the_mode_says(
    answering: Answering, tls_postgres: ThrowawayPostgres, authority: Authority, mode: str
) -> None:
    lines = at(tls_postgres, user="trusted") | tls(mode, authority)
    assert answering.asked(lines, ENCRYPTED) == ("plain" if mode == "disable" else "TLSv1.3")


def test_without_a_word_tls_is_preferred(answering: Answering, tls_postgres: ThrowawayPostgres) -> None:
    assert answering.asked(at(tls_postgres, user="trusted"), ENCRYPTED) == "TLSv1.3"


def test_a_unix_socket_needs_no_tls(
    answering: Answering, tls_postgres: ThrowawayPostgres, authority: Authority
) -> None:
    lines = at(tls_postgres, user="trusted") | tls("verify-full", authority)
    lines["_META_TARGET_HOST"] = f"{tls_postgres.folder}:{tls_postgres.port}"
    assert answering.asked(lines, ENCRYPTED) == "plain"


def test_a_host_with_which_tls_fails_is_passed_over(
    answering: Answering, tls_postgres: ThrowawayPostgres, authority: Authority, identities: dict[str, Identity]
) -> None:
    with witnessing(server_context(identities["expired"])) as (witness, target):
        lines = at(tls_postgres, user="trusted") | tls("verify-full", authority)
        lines["_META_TARGET_HOST"] = f"{HOST}:{target.port},{HOST}:{tls_postgres.port}"
        assert answering.asked(lines, ENCRYPTED) == "TLSv1.3"
        assert witness.requests == 1


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1], ids=["1.0", "1.1"])
def test_old_versions_are_not_spoken(
    answering: Answering, identities: dict[str, Identity], version: ssl.TLSVersion
) -> None:
    context = server_context(identities["right"])
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    with witnessing(context) as (witness, target):
        refused(answering, at(target) | tls("require"), "PROTOCOL_VERSION")
        assert not witness.versions


def test_tls_1_2_is_spoken(answering: Answering, identities: dict[str, Identity]) -> None:
    context = server_context(identities["right"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with witnessing(context) as (witness, target):
        answering.greeted(at(target) | tls("require"))
    assert witness.versions == ["TLSv1.2"]


def test_what_is_odd_about_a_certificate_is_not_put_into_the_log_by_libraries(
    answering: Answering, tmp_path: Path
) -> None:
    with witnessing(server_context(with_negative_serial(tmp_path, "odd"))) as (witness, target):
        answering.greeted(at(target) | tls("require"))
    assert witness.versions == ["TLSv1.3"]
    assert {line[:1] for line in answering.gateway.log.read_text().splitlines()} == {"{"}


# Names


def test_a_target_is_asked_for_by_its_name(answering: Answering, identities: dict[str, Identity]) -> None:
    with witnessing(server_context(identities["right"])) as (witness, target):
        answering.greeted(at(target, "localhost") | tls("require"))
        # An address is no name, as RFC 6066 has it.
        answering.greeted(at(target, HOST) | tls("require"))
        answering.greeted(at(target, HOST) | tls("require", TLS_NAME="other.example"))
    assert witness.names == ["localhost", None, "other.example"]


def test_a_certificate_may_have_to_be_for_another_name(
    answering: Answering, authority: Authority, identities: dict[str, Identity]
) -> None:
    with witnessing(server_context(identities["wrong host"])) as (witness, target):
        answering.greeted(at(target) | tls("verify-full", authority, TLS_NAME="elsewhere.example"))
        refused(answering, at(target) | tls("verify-full", authority, TLS_NAME="nowhere.example"), "nowhere.example")
    with witnessing(server_context(identities["right"])) as (_, target):
        refused(
            answering, at(target) | tls("verify-full", authority, TLS_NAME="elsewhere.example"), "elsewhere.example"
        )
    assert len(witness.versions) == 1


@pytest.mark.parametrize("name", ["a" * 300, "..", "b\u00fccher.example", "-"])
def test_a_name_that_no_host_can_have_does_no_harm(
    answering: Answering, authority: Authority, identities: dict[str, Identity], name: str
) -> None:
    with witnessing(server_context(identities["right"])) as (witness, target):
        error, reason = answering.refused(at(target) | tls("verify-full", authority, TLS_NAME=name))
    assert error["C"] in ("08001", "58000"), reason
    assert not witness.versions


# What the configuration says, and what the authenticator does


def test_the_configuration_says_how_where_the_authenticator_does_not(
    tmp_path: Path, authority: Authority, identities: dict[str, Identity]
) -> None:
    mine = authority.issue("of the configuration", common_name="configured")
    theirs = authority.issue("of the authenticator", common_name="answered")
    settings = {
        "mode": "verify-full",
        "ca": str(authority.cert),
        "name": "elsewhere.example",
        **{name: value for name, value in mine.settings.items()},
    }
    context = server_context(identities["wrong host"])
    context.load_verify_locations(authority.cert)
    context.verify_mode = ssl.CERT_OPTIONAL
    with (
        answering_gateway(tmp_path, target={"tls": settings}) as answering,
        witnessing(context) as (witness, target),
    ):
        answering.greeted(at(target))
        answering.greeted(at(target, _META_TARGET_CERT=str(theirs.cert), _META_TARGET_KEY=str(theirs.key)))
        answering.greeted(at(target) | tls("disable"))
        refused(answering, at(target, _META_TARGET_TLS_NAME="localhost"), "not valid for 'localhost'")
        # What is left empty counts as not said.
        answering.greeted(at(target, _META_TARGET_TLS_NAME="", _META_TARGET_TLS="", _META_TARGET_CA=""))
    assert witness.versions == ["TLSv1.3", "TLSv1.3", "", "TLSv1.3"]
    assert [common_name(found) for found in witness.certificates] == ["configured", "answered", "", "configured"]


def common_name(certificate: dict[str, Any] | None) -> str:
    subject = dict(pair for part in (certificate or {}).get("subject", ()) for pair in part)
    return str(subject.get("commonName", ""))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (tls("sometimes"), "mode is none of disable, prefer"),
        (tls("VERIFY-FULL"), "mode is none of"),
        (tls("verify-full"), "needs a ca"),
        (tls("verify-ca", CA="system"), "needs mode verify-full"),
        (tls("verify-ca", CA="/nowhere/ca.pem"), "/nowhere/ca.pem: No such file"),
        (tls("require", CERT="/nowhere/x.pem"), "cert and key need each other"),
        (tls("require", CERT="/nowhere/x.pem", KEY="/nowhere/x.key"), "/nowhere/x.key: No such file"),
        (tls("require", TLS_NEGOTIATION="indirect"), "negotiation is none of"),
        (tls("prefer", TLS_NEGOTIATION="direct"), "needs mode require"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_the_authenticators_fault(
    answering: Answering, identities: dict[str, Identity], lines: dict[str, str], says: str
) -> None:
    with witnessing(server_context(identities["right"])) as (witness, target):
        refused(answering, at(target) | lines, says, "58000")
        assert (witness.requests, witness.versions) == (0, [])


def test_a_key_that_others_can_read_is_not_used(
    answering: Answering, authority: Authority, identities: dict[str, Identity]
) -> None:
    mine = authority.issue("read by others", common_name="x")
    mine.key.chmod(0o644)
    lines = tls("require", CERT=str(mine.cert), KEY=str(mine.key))
    with witnessing(server_context(identities["right"])) as (_, target):
        refused(answering, at(target) | lines, "others may read it", "58000")


@pytest.mark.parametrize(
    ("trusted", "shown", "says"),
    [
        ("authority", "right", ""),
        ("authority", "wrong host", "not valid for 'localhost'"),
        ("stranger", "right", "unable to get local issuer certificate"),
    ],
)
def test_the_systems_own_authorities_vouch_for_hosts(
    mapped_to: MappedTo,
    authority: Authority,
    stranger: Authority,
    identities: dict[str, Identity],
    trusted: str,
    shown: str,
    says: str,
) -> None:
    roots = authority if trusted == "authority" else stranger
    with witnessing(server_context(identities[shown])) as (witness, target):
        lines = at(target, "localhost", _META_TARGET_CA="system")
        gateway = mapped_to(lines, environment=os.environ | {"SSL_CERT_FILE": str(roots.cert)})
        with RawClient(gateway.port) as client:
            if not says:
                client.log_in()
                assert witness.versions == ["TLSv1.3"]
                return
            client.send(startup() + password())
            client.read_message()
            assert client.read_fatal() == ("08001", UNREACHABLE)
    assert says in gateway.wait_for("refused")["reason"]
    assert not witness.versions


# Certificates that the gateway shows


def test_the_gateway_logs_in_with_a_certificate(
    answering: Answering, tls_postgres: ThrowawayPostgres, authority: Authority
) -> None:
    mine = authority.issue("logging in", common_name="certified")
    lines = at(tls_postgres, user="certified") | tls("verify-full", authority, CERT=str(mine.cert), KEY=str(mine.key))
    who = "select current_user || ' ' || client_dn from pg_stat_ssl where pid = pg_backend_pid()"
    assert answering.asked(lines, who) == "certified /O=testing/OU=certificates/CN=certified"


def test_a_certificate_that_does_not_fit_is_none_of_the_clients_business(
    answering: Answering, tls_postgres: ThrowawayPostgres, authority: Authority, stranger: Authority
) -> None:
    lines = at(tls_postgres, user="certified")
    refused(answering, lines | tls("require"), "connection requires a valid client certificate", "08004")
    other = authority.issue("somebody else", common_name="somebody")
    lines |= tls("require", CERT=str(other.cert), KEY=str(other.key))
    refused(answering, lines, "ertificate authentication failed", "08004")
    unknown = stranger.issue("certified by a stranger", common_name="certified")
    error, reason = answering.refused(
        lines | {"_META_TARGET_CERT": str(unknown.cert), "_META_TARGET_KEY": str(unknown.key)}
    )
    assert error["C"] in ("08001", "08006")
    # The server's alert is lost where its reset comes first: it does not wait for what was under way to it.
    assert re.search("UNKNOWN_CA|reset by peer", reason)


# Falling back


@pytest.mark.parametrize("role", ["in_plain", "over_tls"])
def test_prefer_does_what_pg_hba_conf_asks_for(
    answering: Answering, tls_postgres: ThrowawayPostgres, role: str
) -> None:
    for _ in range(2):
        assert answering.asked(at(tls_postgres, user=role), ENCRYPTED) == ("plain" if role == "in_plain" else "TLSv1.3")


def test_where_tls_is_required_pg_hba_conf_does_not_change_that(
    answering: Answering, tls_postgres: ThrowawayPostgres
) -> None:
    refused(answering, at(tls_postgres, user="in_plain") | tls("require"), "28000", "08004")
    refused(answering, at(tls_postgres, user="over_tls") | tls("disable"), "28000", "08004")


def answers(*each: bytes, then: Callable[[socket.socket], None] | None = None) -> Callable[[socket.socket], None]:
    """A target that says each of these to an SSLRequest, each once something came; plain clients are greeted."""

    def script(connection: socket.socket) -> None:
        if connection.recv(len(SSL_REQUEST), socket.MSG_PEEK | socket.MSG_WAITALL) != SSL_REQUEST:
            greet(connection)
            while connection.recv(65536):
                continue
            return
        for words in each:
            connection.recv(65536)
            connection.sendall(words)
        if then is not None:
            then(connection)

    return script


def stays(connection: socket.socket) -> None:
    while connection.recv(65536):
        continue


ERROR = message(b"E", b"SFATAL\0VFATAL\0C0A000\0M" + WORDS.encode() + b"\0\0")
# What a target answers, where the gateway would rather speak TLS, and what the log says of it where it insists.
NOT_TLS = {
    "no": ([b"N"], "target speaks no TLS, which is required"),
    "an error": ([ERROR], "target answered the SSL request with something else than yes or no"),
    "the first byte of an error": ([b"E"], "target answered the SSL request with something else than yes or no"),
    "a byte that is none": ([b"\0"], "target answered the SSL request with something else than yes or no"),
    "yes, and speaks plain": ([b"S", AUTH_OK + KEY + READY], "TLS with the target failed: WRONG_VERSION_NUMBER"),
    "yes, and an error in plain": ([b"S", ERROR], "TLS with the target failed: WRONG_VERSION_NUMBER"),
    "yes with bytes behind it": ([b"S" + AUTH_OK], "target sent bytes in plain behind its answer"),
    "yes with a record behind it": ([b"S\x16\x03\x03\0\x01\0"], "target sent bytes in plain behind its answer"),
    "no with bytes behind it": ([b"N" + AUTH_OK], "target sent bytes in plain behind its answer"),
    "yes, and garbage": ([b"S", b"\x16\x03\x03\0\x04\x02\0\0\0"], "TLS with the target failed: "),
    "yes, and an alert": ([b"S", b"\x15\x03\x03\0\x02\x02\x28"], "HANDSHAKE_FAILURE"),
}


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
@pytest.mark.parametrize("what", NOT_TLS)
def test_where_tls_is_required_a_target_that_answers_otherwise_is_refused(
    answering: Answering, authority: Authority, what: str, mode: str
) -> None:
    said, reason = NOT_TLS[what]
    plain: list[bytes] = []

    def script(connection: socket.socket) -> None:
        answers(*said, then=stays)(connection)
        plain.append(b"")

    with ScriptedTarget(script, opens=lambda connection: connection) as target:
        refused(answering, at(target) | tls(mode, authority if mode in VERIFYING else None), reason)
        wait_until(lambda: plain, "the gateway to close")
    # There was one connection, and nothing but an SSLRequest and TLS on it.
    assert len(plain) == 1
    assert WORDS not in answering.gateway.log.read_text()


@pytest.mark.parametrize("what", [what for what in NOT_TLS if what != "no"])
def test_where_tls_is_preferred_the_next_attempt_is_without_it(answering: Answering, what: str) -> None:
    said, _ = NOT_TLS[what]
    with ScriptedTarget(answers(*said), opens=lambda connection: connection) as target:
        answering.greeted(at(target) | tls("prefer"))


def test_where_tls_is_preferred_no_is_taken_on_the_same_connection(answering: Answering) -> None:
    first: list[bytes] = []

    def script(connection: socket.socket) -> None:
        first.append(connection.recv(len(SSL_REQUEST), socket.MSG_PEEK | socket.MSG_WAITALL))
        if first[-1] == SSL_REQUEST:
            read_exactly(connection, len(SSL_REQUEST))
            connection.sendall(b"N")
        greet(connection)

    with ScriptedTarget(script, opens=lambda connection: connection) as target:
        for _ in range(3):
            answering.greeted(at(target) | tls("prefer"))
    # It is not asked again for a while.
    assert [sent == SSL_REQUEST for sent in first] == [True, False, False]


def test_what_a_target_said_when_tls_was_preferred_is_not_believed_where_it_is_required(
    answering: Answering, identities: dict[str, Identity]
) -> None:
    witness = Witness(server_context(identities["right"]))
    willing = threading.Event()

    def opens(connection: socket.socket) -> socket.socket:
        if willing.is_set():
            return witness.opens(connection)
        read_exactly(connection, len(SSL_REQUEST))
        connection.sendall(b"N")
        return connection

    with ScriptedTarget(witness.greets, opens=opens) as target:
        answering.greeted(at(target) | tls("prefer"))
        willing.set()
        answering.greeted(at(target) | tls("require"))
    assert witness.versions == ["", "TLSv1.3"]


# Time


def stops_in_the_handshake(connection: socket.socket) -> None:
    """Says yes, takes the ClientHello, and begins a record that never ends."""
    read_exactly(connection, len(SSL_REQUEST))
    connection.sendall(b"S")
    connection.recv(65536)
    connection.sendall(b"\x16\x03\x03\x20\x00")
    stays(connection)


def drips_in_the_handshake(connection: socket.socket) -> None:
    read_exactly(connection, len(SSL_REQUEST))
    connection.sendall(b"S")
    connection.recv(65536)
    connection.sendall(b"\x16\x03\x03\x20\x00")
    while True:
        connection.sendall(b"\0")
        time.sleep(0.02)


@pytest.mark.parametrize("mode", ["prefer", "require"])
@pytest.mark.parametrize("script", [stays, stops_in_the_handshake, drips_in_the_handshake])
def test_one_that_never_gets_done_is_given_up_after_the_time_to_log_in(
    hasty: Answering, script: Callable[[socket.socket], None], mode: str
) -> None:
    with ScriptedTarget(script, opens=lambda connection: connection) as target:
        refused(hasty, at(target) | tls(mode), "no login in 0.6 s", "08006")


def test_descriptors_of_handshakes_that_failed_are_closed(
    tmp_path: Path, authority: Authority, identities: dict[str, Identity]
) -> None:
    with (
        answering_gateway(tmp_path, authenticator={"max_parallel": 1}) as answering,
        witnessing(server_context(identities["expired"])) as (_, target),
        ScriptedTarget(answers(b"S", b"garbage"), opens=lambda connection: connection) as garbled,
    ):
        answering.greeted(at(target) | tls("require"))
        answering.gateway.wait_for("session ended")
        before = answering.gateway.descriptors
        for _ in range(5):
            refused(answering, at(target) | tls("verify-full", authority), "expired")
            refused(answering, at(garbled) | tls("require"), "WRONG_VERSION_NUMBER")
        wait_until(lambda: answering.gateway.descriptors == before, "all descriptors to be closed")


# Direct


@pytest.mark.parametrize("host", [HOST, "localhost"])
def test_direct_tls_begins_with_the_first_byte(
    answering: Answering, authority: Authority, identities: dict[str, Identity], host: str
) -> None:
    first: list[bytes] = []
    protocols: list[str | None] = []

    def opens(connection: socket.socket) -> socket.socket:
        first.append(connection.recv(1, socket.MSG_PEEK))
        opened = opens_with_tls(server_context(identities["right"]), direct=True)(connection)
        assert isinstance(opened, ssl.SSLSocket)
        protocols.append(opened.selected_alpn_protocol())
        return opened

    with ScriptedTarget(greet, opens=opens) as target:
        for mode in ("require", "verify-ca", "verify-full"):
            ca = authority if mode in VERIFYING else None
            answering.greeted(at(target, host) | tls(mode, ca, TLS_NEGOTIATION="direct"))
    assert first == [b"\x16"] * 3
    assert protocols == ["postgresql"] * 3


def test_direct_tls_without_the_application_protocol_is_refused(
    answering: Answering, identities: dict[str, Identity]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identities["right"].cert, identities["right"].key)
    with ScriptedTarget(greet, opens=opens_with_tls(context, direct=True)) as target:
        refused(
            answering,
            at(target) | tls("require", TLS_NEGOTIATION="direct"),
            "direct TLS without the application protocol postgresql",
        )


def test_direct_tls_with_one_that_cannot_is_refused(answering: Answering, postgres: ThrowawayPostgres) -> None:
    # The wheel's PostgreSQL was built without TLS.
    error, reason = answering.refused(at(postgres) | tls("require", TLS_NEGOTIATION="direct"))
    assert error["C"] in ("08001", "08006"), reason


@pytest.mark.skipif(DEBIAN_VERSION < DIRECT_TLS_SINCE, reason="Debian's PostgreSQL here is older than direct TLS")
def test_direct_tls_with_postgresql(
    answering: Answering, tls_postgres: ThrowawayPostgres, authority: Authority
) -> None:
    lines = at(tls_postgres, user="trusted") | tls("verify-full", authority, TLS_NEGOTIATION="direct")
    assert answering.asked(lines, ENCRYPTED) == "TLSv1.3"


# Resumption


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("mode", ["prefer", "require", "verify-full"])
def test_sessions_are_resumed_where_the_target_offers_it(
    answering: Answering,
    authority: Authority,
    identities: dict[str, Identity],
    mode: str,
    version: ssl.TLSVersion,
) -> None:
    context = server_context(identities["right"])
    context.maximum_version = version
    with witnessing(context) as (witness, target):
        lines = at(target) | tls(mode, authority if mode in VERIFYING else None)
        for _ in range(4):
            answering.greeted(lines)
        assert witness.resumed == [False, True, True, True]


def test_no_session_is_resumed_where_the_target_does_not_offer_it(
    answering: Answering, identities: dict[str, Identity]
) -> None:
    context = server_context(identities["right"])
    context.num_tickets = 0
    with witnessing(context) as (witness, target):
        for _ in range(2):
            answering.greeted(at(target) | tls("require"))
    assert witness.resumed == [False, False]


def test_a_session_that_was_not_verified_is_not_resumed_where_it_must_be(
    answering: Answering, authority: Authority, identities: dict[str, Identity]
) -> None:
    with witnessing(server_context(identities["expired"])) as (witness, target):
        answering.greeted(at(target) | tls("require"))
        refused(answering, at(target) | tls("verify-full", authority), "expired")
        answering.greeted(at(target) | tls("require"))
    assert witness.resumed == [False, True]


def test_a_target_that_has_forgotten_a_session_is_spoken_to_anew(
    answering: Answering, authority: Authority, identities: dict[str, Identity]
) -> None:
    lines = tls("verify-full", authority)
    contexts = [server_context(identities["right"]) for _ in range(2)]
    current = [contexts[0]]
    resumed: list[bool] = []

    def opens(connection: socket.socket) -> socket.socket:
        return opens_with_tls(current[0])(connection)

    def greets(connection: socket.socket) -> None:
        assert isinstance(connection, ssl.SSLSocket)
        resumed.append(bool(connection.session_reused))
        greet(connection)

    with ScriptedTarget(greets, opens=opens) as target:
        answering.greeted(at(target) | lines)
        answering.greeted(at(target) | lines)
        current[0] = contexts[1]
        answering.greeted(at(target) | lines)
        answering.greeted(at(target) | lines)
    assert resumed == [False, True, False, True]


# Contexts


def test_files_are_read_once_and_anew_after_sighup(
    tmp_path: Path, authority: Authority, stranger: Authority, identities: dict[str, Identity]
) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(authority.cert, ca)
    with (
        answering_gateway(tmp_path) as answering,
        witnessing(server_context(identities["right"])) as (_, right),
        witnessing(server_context(identities["unknown authority"])) as (_, strange),
    ):
        verified = {"_META_TARGET_TLS": "verify-full", "_META_TARGET_CA": str(ca)}
        answering.greeted(at(right) | verified)
        ca.write_text("just words\n")
        answering.greeted(at(right) | verified)
        shutil.copy(stranger.cert, ca)
        refused(answering, at(strange) | verified, "unable to get local issuer")
        answering.gateway.process.send_signal(signal.SIGHUP)
        answering.gateway.wait_for("certificates loaded anew")
        answering.greeted(at(strange) | verified)
        refused(answering, at(right) | verified, "unable to get local issuer")


def test_a_broken_authority_of_the_configuration_leaves_the_old_in_force(
    tmp_path: Path, authority: Authority, identities: dict[str, Identity]
) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(authority.cert, ca)
    with (
        answering_gateway(tmp_path, target={"tls": {"mode": "verify-full", "ca": str(ca)}}) as answering,
        witnessing(server_context(identities["right"])) as (_, target),
    ):
        answering.greeted(at(target))
        ca.write_text("just words\n")
        answering.gateway.process.send_signal(signal.SIGHUP)
        line = answering.gateway.wait_for("certificates not loaded, the old ones stay")
        assert str(ca) in line["reason"]
        answering.greeted(at(target))


# Cancel requests


def test_a_cancel_request_reaches_postgresql_over_tls(
    answering: Answering, tls_postgres: ThrowawayPostgres, authority: Authority
) -> None:
    backends = Backends(tls_postgres)
    with RawClient(answering.gateway.port) as client:
        lines = at(tls_postgres, user="over_tls") | tls("verify-full", authority)
        greeting = client.log_in(user=answering.user(lines))
        client.send(query("select pg_backend_pid()"))
        pid = int(next(body for kind, body in client.read_until(b"Z") if kind == b"D")[6:])
        client.send(query("select pg_sleep(60)"))
        wait_until(lambda: backends.sleeps(pid), "the query to begin")
        with RawClient(answering.gateway.port) as canceller:
            canceller.send(cancel_request(next(body for kind, body in greeting if kind == b"K")))
            assert canceller.read_to_end() == b""
        errors = [error_fields(body)["C"] for kind, body in client.read_until(b"Z") if kind == b"E"]
    assert errors == ["57014"]


@pytest.mark.parametrize("way", ["SSLRequest", "direct", "verify-full", "plain", "preferred"])
def test_a_cancel_request_uses_the_tls_of_its_session(
    answering: Answering, authority: Authority, identities: dict[str, Identity], way: str
) -> None:
    context = server_context(identities["right"])
    lines = {
        "SSLRequest": tls("require"),
        "direct": tls("require", TLS_NEGOTIATION="direct"),
        "verify-full": tls("verify-full", authority),
        "plain": tls("disable"),
        "preferred": tls("prefer"),
    }[way]
    witness = Witness(context)
    cancelled: list[tuple[bytes, str | None]] = []

    def script(connection: socket.socket) -> None:
        packet = read_startup(connection)
        if packet[:4] == struct.pack("!i", CANCEL_REQUEST):
            cancelled.append((packet[4:], connection.version() if isinstance(connection, ssl.SSLSocket) else None))
            return
        connection.sendall(AUTH_OK + KEY + READY)
        stays(connection)

    opens = opens_with_tls(context, direct=True) if way == "direct" else witness.opens
    with ScriptedTarget(script, opens=opens) as target, RawClient(answering.gateway.port) as client:
        greeting = client.log_in(user=answering.user(at(target) | lines))
        with RawClient(answering.gateway.port) as canceller:
            canceller.send(cancel_request(next(body for kind, body in greeting if kind == b"K")))
            assert canceller.read_to_end() == b""
    assert cancelled == [(KEY[5:], None if way == "plain" else "TLSv1.3")]


@pytest.mark.parametrize("mode", ["prefer", "require"])
def test_a_cancel_request_of_a_session_over_tls_never_goes_in_plain(
    answering: Answering, identities: dict[str, Identity], mode: str
) -> None:
    witness = Witness(server_context(identities["right"]))
    received: list[bytes] = []

    def opens(connection: socket.socket) -> socket.socket:
        if not witness.versions:
            return witness.opens(connection)
        read_exactly(connection, len(SSL_REQUEST))
        connection.sendall(b"N")
        received.append(read_exactly(connection, 1))
        raise ConnectionAbortedError("that was all")

    with ScriptedTarget(witness.greets, opens=opens) as target, RawClient(answering.gateway.port) as client:
        user = answering.user(at(target) | tls(mode))
        greeting = client.log_in(user=user)
        session = answering.gateway.wait_for("login", user=user)["session"]
        with RawClient(answering.gateway.port) as canceller:
            canceller.send(cancel_request(next(body for kind, body in greeting if kind == b"K")))
            assert canceller.read_to_end() == b""
        outcome = answering.gateway.wait_for("cancel request", session=session)["outcome"]
        wait_until(lambda: received, "the gateway to close")
    assert received == [b""]
    assert outcome.startswith("not passed on")


# SCRAM, bound to the channel


@dataclass
class ScramTarget:
    """A target that holds the gateway to a password by SCRAM, bound to this hash of its certificate."""

    identity: Identity
    binding: str = "sha256"
    offers: tuple[bytes, ...] = (scram.MECHANISM_PLUS, scram.MECHANISM)
    chosen: list[bytes] = field(default_factory=list)

    def __call__(self, connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(asks(10, b"".join(name + b"\0" for name in self.offers) + b"\0"))
        mechanism, _, rest = self._answer(connection).partition(b"\0")
        self.chosen.append(mechanism)
        binding = hashlib.new(self.binding, self.identity.der).digest() if self.binding else b""
        exchange = scram.ScramServer(VERIFIER, scram.fresh_nonce(), binding)
        connection.sendall(asks(11, exchange.first(mechanism, rest[4:])))
        final, _ = exchange.final(self._answer(connection))
        connection.sendall(asks(12, final) + AUTH_OK + KEY + READY)
        stays(connection)

    def _answer(self, connection: socket.socket) -> bytes:
        kind, length = struct.unpack("!ci", read_exactly(connection, 5))
        assert kind == b"p"
        return read_exactly(connection, length - 4)


SECRET = "the role's own"
VERIFIER = scram.Verifier.of(SECRET.encode(), b"salt", 10)


def asks(kind: int, data: bytes) -> bytes:
    return message(b"R", struct.pack("!i", kind) + data)


@pytest.mark.parametrize("times", [1, 3], ids=["a new session", "resumed sessions"])
def test_the_channel_is_bound_where_that_is_offered(
    answering: Answering, authority: Authority, identities: dict[str, Identity], times: int
) -> None:
    script = ScramTarget(identities["right"])
    with ScriptedTarget(script, opens=opens_with_tls(server_context(script.identity))) as target:
        for _ in range(times):
            answering.greeted(at(target, _META_TARGET_PASSWORD=SECRET) | tls("verify-full", authority))
    assert script.chosen == [scram.MECHANISM_PLUS] * times


@pytest.mark.parametrize("algorithm", [hashes.SHA256(), hashes.SHA384(), hashes.SHA512()], ids=lambda found: found.name)
def test_the_channel_is_bound_by_the_hash_that_the_certificate_is_signed_with(
    answering: Answering, tmp_path: Path, algorithm: hashes.HashAlgorithm
) -> None:
    script = ScramTarget(self_signed(tmp_path, "hashed", algorithm=algorithm), algorithm.name)
    with ScriptedTarget(script, opens=opens_with_tls(server_context(script.identity))) as target:
        answering.greeted(at(target, _META_TARGET_PASSWORD=SECRET) | tls("require"))
    assert script.chosen == [scram.MECHANISM_PLUS]


def test_the_channel_is_not_bound_where_that_is_not_offered(
    answering: Answering, identities: dict[str, Identity]
) -> None:
    script = ScramTarget(identities["right"], "", (scram.MECHANISM,))
    with ScriptedTarget(script, opens=opens_with_tls(server_context(script.identity))) as target:
        answering.greeted(at(target, _META_TARGET_PASSWORD=SECRET) | tls("require"))
    assert script.chosen == [scram.MECHANISM]


def test_a_certificate_that_nothing_can_be_bound_to_does_no_harm(answering: Answering, tmp_path: Path) -> None:
    # RFC 5929 does not say what it is with Ed25519, whose signatures have no hash of their own.
    script = ScramTarget(self_signed(tmp_path, "ed25519"), "")
    with ScriptedTarget(script, opens=opens_with_tls(server_context(script.identity))) as target:
        answering.greeted(at(target, _META_TARGET_PASSWORD=SECRET) | tls("require"))
    assert script.chosen == [scram.MECHANISM]


def test_a_man_in_the_middle_is_found_out_by_channel_binding(
    answering: Answering, tls_postgres: ThrowawayPostgres, authority: Authority
) -> None:
    """His certificate is good, and he passes everything on to the true server."""
    middle = server_context(authority.issue("in the middle", "localhost", HOST))

    def script(connection: socket.socket) -> None:
        onward = socket.create_connection((HOST, tls_postgres.port), SECONDS)
        onward.sendall(SSL_REQUEST)
        assert onward.recv(1) == b"S"
        context = ssl.create_default_context(cafile=str(authority.cert))
        with context.wrap_socket(onward, server_hostname="localhost") as server:
            assert isinstance(connection, ssl.SSLSocket)
            pass_on(connection, server)

    def pass_on(one: ssl.SSLSocket, other: ssl.SSLSocket) -> None:
        # In one thread: two must not use the same TLS at once.
        for each in (one, other):
            each.setblocking(False)
        peers = {one: other, other: one}
        with contextlib.suppress(OSError):
            while True:
                for source in select.select([one, other], [], [], SECONDS)[0]:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        if not (data := source.recv(65536)):
                            return
                        peers[source].sendall(data)

    with ScriptedTarget(script, opens=opens_with_tls(middle)) as target:
        lines = at(target, user="scrammed", _META_TARGET_PASSWORD="scram secret") | tls("verify-full", authority)
        refused(answering, lines, "SCRAM channel binding check failed", "08004")
        # Without it he could have listened.
        trusted = at(target, user="trusted") | tls("verify-full", authority)
        assert answering.asked(trusted, "select current_user") == "trusted"


# What clients and log are told


def test_the_log_names_the_version_that_is_spoken_with_the_target(
    answering: Answering, tls_postgres: ThrowawayPostgres
) -> None:
    for mode, spoken in (("require", "TLSv1.3"), ("disable", None)):
        user = answering.user(at(tls_postgres, user="trusted") | tls(mode))
        with RawClient(answering.gateway.port) as client:
            client.log_in(user=user)
        assert answering.gateway.wait_for("login", user=user).get("target_tls") == spoken


def test_a_client_of_a_gateway_whose_targets_need_tls_hears_nothing_of_it(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, mapped: Path
) -> None:
    gateway = start_gateway(mapped, target={"tls": {"mode": "require"}})
    with RawClient(gateway.port) as client:
        client.send(startup() + password())
        client.read_message()
        assert client.read_fatal() == ("08001", UNREACHABLE)
    assert "target speaks no TLS, which is required" in gateway.wait_for("refused")["reason"]
