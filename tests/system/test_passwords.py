"""The password step: what a client is asked, what it may answer, and what becomes of the answer."""

from __future__ import annotations

import hashlib
import os
import random
import re
import struct
import subprocess
from collections.abc import Iterator

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import StartGateway, WriteAuthenticator
from tests.system.conftest import Asked, asking_gateway
from tests.wire import GSSENC_REQUEST, SSL_REQUEST, RawClient, message, password, query, startup

SECONDS = 30
MAX_MESSAGE = 65_535
MEGABYTE = 1024 * 1024
MODES = ["md5", "cleartext"]
REQUESTS = {"md5": (b"\0\0\0\x05", 8), "cleartext": (b"\0\0\0\x03", 4)}
WRONG = ("28P01", 'password authentication failed for user "alice"')
NO_PASSWORD = ("08P01", "expected a valid password message")


@pytest.fixture(scope="module")
def asked_in_clear(tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres) -> Iterator[Asked]:
    """A gateway before `postgres` that asks clients for the password as it is, shared by the tests of this file."""
    with asking_gateway(tmp_path_factory.mktemp("asked-in-clear"), postgres.port, cleartext=True) as found:
        yield found


@pytest.fixture(params=MODES)
def either(request: pytest.FixtureRequest) -> Asked:
    """A gateway in either mode."""
    found: Asked = request.getfixturevalue("asked" if request.param == "md5" else "asked_in_clear")
    return found


def md5_answer(secret: bytes, user: bytes, salt: bytes) -> bytes:
    stored = hashlib.md5(secret + user).hexdigest().encode()  # noqa: S324 (the protocol's own)
    return b"md5" + hashlib.md5(stored + salt).hexdigest().encode()  # noqa: S324 (as above)


def ask(client: RawClient, sent: bytes | None = None) -> bytes:
    """Sends a startup packet and returns the body of the authentication request."""
    client.send(startup() if sent is None else sent)
    kind, body = client.read_message()
    assert kind == b"R"
    return body


def refused(asked: Asked, answer: bytes) -> tuple[str, str]:
    """SQLSTATE and text that this answer gets. Nobody is asked about it, and the next client is served."""
    with asked.nobody(), RawClient(asked.port) as client:
        ask(client)
        client.send(answer)
        return client.read_fatal()


def raw_password(body: bytes) -> bytes:
    return message(b"p", body)


# What is asked


@pytest.mark.parametrize("mode", MODES)
def test_the_request_is_postgresqls_own(request: pytest.FixtureRequest, mode: str) -> None:
    asked: Asked = request.getfixturevalue("asked" if mode == "md5" else "asked_in_clear")
    with RawClient(asked.port) as client:
        body = ask(client)
    kind, length = REQUESTS[mode]
    assert (body[:4], len(body)) == (kind, length)


def test_salts_differ_between_connections(asked: Asked) -> None:
    salts = []
    for _ in range(100):
        with RawClient(asked.port) as client:
            salts.append(ask(client)[4:])
    assert len(set(salts)) == len(salts)
    # No byte of it is a constant or a counter.
    for place in zip(*salts, strict=True):
        assert len(set(place)) > 50


def test_salts_differ_after_a_new_start(start_gateway: StartGateway, authenticator: WriteAuthenticator) -> None:
    refusing = authenticator("exit 1")
    salts = []
    for _ in range(2):
        gateway = start_gateway(refusing)
        for _ in range(10):
            with RawClient(gateway.port) as client:
                salts.append(ask(client)[4:])
    assert len(set(salts)) == len(salts)


# What the authenticator gets


def test_an_md5_answer_reaches_the_authenticator_with_its_salt(asked: Asked) -> None:
    sent = startup(application_name="test")
    with RawClient(asked.port) as client:
        address = "{}:{}".format(*client.socket.getsockname())
        salt = ask(client, sent)[4:]
        answer = md5_answer(b"secret", b"alice", salt)
        client.send(raw_password(answer + b"\0"))
        client.read_until(b"Z")
    session = asked.gateway.wait_for("login", client=address)["session"]
    assert asked.questions[-1].split(b"\n") == [
        b"user=alice",
        b"database=postgres",
        b"application_name=test",
        b"_SOURCE_ADDR=" + address.encode(),
        b"_SOURCE_METHOD=md5",
        b"_SOURCE_SESSION=" + session.encode(),
        b"_SOURCE_CRED=" + answer,
        b"_SOURCE_SALT=" + salt.hex().encode(),
    ]


@pytest.mark.parametrize(
    "secret",
    [
        pytest.param(b"secret", id="a word"),
        pytest.param(b" two words ", id="spaces"),
        pytest.param(b"a=b=_SOURCE_SALT=", id="equals signs"),
        pytest.param("ünïcödé 😀".encode(), id="UTF-8"),
        pytest.param(bytes(byte for byte in range(1, 256) if byte not in b"\r\n"), id="every byte"),
        pytest.param("\v\f\x1c\x85\u2028".encode(), id="what only Python takes for line ends"),
        pytest.param(b"md5" + b"0" * 32, id="what looks like a hash"),
        pytest.param(b"x" * (MAX_MESSAGE - 5), id="the longest that is allowed"),
    ],
)
def test_a_cleartext_password_reaches_the_authenticator_byte_for_byte(asked_in_clear: Asked, secret: bytes) -> None:
    with RawClient(asked_in_clear.port) as client:
        ask(client)
        client.send(raw_password(secret + b"\0"))
        client.read_until(b"Z")
    lines = asked_in_clear.questions[-1].split(b"\n")
    assert lines[-2:] == [b"_SOURCE_CRED=" + secret, b"_SOURCE_SALT=00000000"]
    assert lines[3] == b"_SOURCE_METHOD=cleartext"
    assert [line.partition(b"=")[0] for line in lines] == [
        *(b"user", b"database", b"_SOURCE_ADDR", b"_SOURCE_METHOD", b"_SOURCE_SESSION"),
        *(b"_SOURCE_CRED", b"_SOURCE_SALT"),
    ]


def test_psql_answers_what_the_contract_says(either: Asked, postgres: ThrowawayPostgres) -> None:
    done = subprocess.run(
        [
            *(postgres.binaries / "psql", "-XAtc", "select 42"),
            f"host=127.0.0.1 port={either.port} user=zoë dbname=postgres",
        ],
        capture_output=True,
        env=os.environ | {"PGPASSWORD": "a secret ö"},
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"42\n"), done.stderr
    fields = dict(line.split(b"=", 1) for line in either.questions[-1].split(b"\n"))
    if fields[b"_SOURCE_METHOD"] == b"md5":
        salt = bytes.fromhex(fields[b"_SOURCE_SALT"].decode())
        assert fields[b"_SOURCE_CRED"] == md5_answer("a secret ö".encode(), "zoë".encode(), salt)
    else:
        assert fields[b"_SOURCE_CRED"] == "a secret ö".encode()


def test_a_password_may_come_with_the_startup_packet(either: Asked) -> None:
    with RawClient(either.port) as client:
        client.send(startup() + password() + query("select 42"))
        client.read_until(b"Z")
        assert (b"D", b"\0\x01\0\0\0\x0242") in client.read_until(b"Z")


# What is no password message


@pytest.mark.parametrize("length", [0, 1, 3, MAX_MESSAGE + 1, 64 * MEGABYTE, 2**31 - 1, -1, -(2**31)])
def test_a_password_of_a_forbidden_length_is_refused_on_its_header(either: Asked, length: int) -> None:
    before = either.gateway.resident_bytes
    assert refused(either, b"p" + struct.pack("!i", length)) == NO_PASSWORD
    assert either.gateway.resident_bytes - before < MEGABYTE


def test_any_other_message_is_refused_on_its_first_byte(either: Asked) -> None:
    with either.nobody():
        for kind in set(range(256)) - {ord("p")}:
            with RawClient(either.port) as client:
                ask(client)
                client.send(bytes([kind]))
                assert client.read_fatal() == NO_PASSWORD, kind


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(query("select 1"), id="a query"),
        pytest.param(message(b"X"), id="Terminate"),
        pytest.param(message(b"S"), id="Sync"),
        pytest.param(startup(), id="a second startup packet"),
        pytest.param(startup(user="mallory") + password(), id="a second startup packet and a password"),
        pytest.param(SSL_REQUEST, id="an SSLRequest"),
        pytest.param(GSSENC_REQUEST, id="a GSSENCRequest"),
        pytest.param(raw_password(b""), id="a message without a body"),
        pytest.param(raw_password(b"md5" + b"0" * 32), id="no NUL"),
        pytest.param(raw_password(b"md5" + b"0" * 32 + b"\0\0"), id="two NULs"),
        pytest.param(raw_password(b"md5" + b"0" * 32 + b"\0extra\0"), id="more behind the NUL"),
        pytest.param(raw_password(b"md5" + b"0" * 32 + b"\0extra"), id="more behind the only NUL"),
        pytest.param(raw_password(b"\0\0"), id="NULs alone"),
        pytest.param(raw_password(b"SCRAM-SHA-256\0" + struct.pack("!i", 7) + b"n,,n=,r"), id="SASLInitialResponse"),
        pytest.param(raw_password(b"SCRAM-SHA-256\0" + struct.pack("!i", -1)), id="an empty SASLInitialResponse"),
        pytest.param(raw_password(b"c=biws,r=x,p=y"), id="SASLResponse"),
    ],
)
def test_what_is_no_password_message_is_refused(either: Asked, answer: bytes) -> None:
    assert refused(either, answer) == NO_PASSWORD


def test_any_bytes_at_all_in_a_password_message_do_no_harm(either: Asked) -> None:
    source = random.Random(1)
    with either.nobody():
        for _ in range(100):
            body = bytes(source.choices(b"\0\n\rmd5a\xff", k=source.randrange(1, 20))) + b"\n\0"
            with RawClient(either.port) as client:
                ask(client)
                client.send(raw_password(body))
                assert client.read_fatal()[0] in ("08P01", "28P01")


# What is no password


def test_an_empty_password_is_refused(either: Asked) -> None:
    assert refused(either, password("")) == WRONG


@pytest.mark.parametrize("secret", ["\n", "\r", "secret\n", "\nsecret", "sec\r\nret", "x\n_SOURCE_SALT=00000000"])
def test_a_line_break_in_a_cleartext_password_is_refused(asked_in_clear: Asked, secret: str) -> None:
    assert refused(asked_in_clear, password(secret)) == WRONG


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param("secret", id="the password as it is"),
        pytest.param("md5", id="md5 alone"),
        pytest.param("md5" + "0" * 31, id="a digit too few"),
        pytest.param("md5" + "0" * 33, id="a digit too many"),
        pytest.param("md5" + "A" * 32, id="capitals"),
        pytest.param("md5" + "g" * 32, id="no digits"),
        pytest.param("MD5" + "0" * 32, id="MD5 in capitals"),
        pytest.param("0" * 32, id="without md5"),
        pytest.param("md5" + "0" * 32 + "\n", id="a line feed behind it"),
        pytest.param("md5" + "0" * 32 + "\nuser=mallory", id="a line behind it"),
        pytest.param("md5" + "\u0660" * 16, id="digits of another script"),
        pytest.param("x" * 60_000, id="a long one"),
    ],
)
def test_what_is_no_md5_answer_is_refused(asked: Asked, answer: str) -> None:
    assert refused(asked, password(answer)) == WRONG


def test_a_refused_client_cannot_try_again_on_its_connection(either: Asked) -> None:
    known = len(either.questions)
    with RawClient(either.port) as client:
        ask(client, startup(user="mallory"))
        client.send(password() * 10)
        assert client.read_fatal() == ("28P01", 'password authentication failed for user "mallory"')
    with RawClient(either.port) as client:
        client.send(startup(user="next") + password())
        client.read_until(b"Z")
    users = [re.findall(rb"^user=(.*)", question) for question in either.questions[known:]]
    assert users == [[b"mallory"], [b"next"]]


def test_an_unknown_user_and_a_wrong_password_look_the_same(
    start_gateway: StartGateway, authenticator: WriteAuthenticator
) -> None:
    # Who is known is refused in the usual way, who is not by an authenticator that dies of it.
    gateway = start_gateway(
        authenticator('case $user in alice) echo "wrong password" >&2; exit 1 ;; *) echo user=x; kill -SEGV $$ ;; esac')
    )

    def heard(user: str) -> tuple[bytes, int, bytes]:
        with RawClient(gateway.port) as client:
            request = ask(client, startup(user=user))
            client.send(password())
            return request[:4], len(request), client.read_to_end().replace(user.encode(), b"?")

    assert heard("alice") == heard("carol")
