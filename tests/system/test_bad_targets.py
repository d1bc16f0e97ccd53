"""Targets that fail, lie or attack: the client is told what it may know, the log why, and the next client is served."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from pgauthproxy import _wire
from pgauthproxy.errors import TargetFault
from pgauthproxy.proto import messages
from pgauthproxy.proto.target_login import TargetLimits, TargetTerms, target_login
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Granted, Mapping, Password, Started
from tests.system.conftest import Answering, answering_gateway, wait_until
from tests.wire import AUTH_OK, KEY, READY, RawClient, ScriptedTarget, greet, message, password, read_startup, startup

Script = Callable[[socket.socket], None]

MEGABYTE = 1024 * 1024
MAX_GROWTH = 16 * MEGABYTE
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# What a client must never hear of, and the log must have escaped (the words) or not at all (the secret).
ROLE = "role_5b1c77e0"
SECRET = "secret 0d4e2a91"
WORDS = "words 9f3377aa"
MD5_REQUEST = message(b"R", struct.pack("!i", 5) + b"salt")
CLEARTEXT_REQUEST = message(b"R", struct.pack("!i", 3))
NEGOTIATION = message(b"v", struct.pack("!ii", 196608, 1) + b"_pq_.x\0")


class Facing:
    """A gateway that a test puts before targets of its own."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.gateway = answering.gateway
        self.welcomes()
        self.gateway.wait_for("session ended")
        self._idle_descriptors = self.gateway.descriptors

    def lines(self, host: str) -> dict[str, str]:
        """What sends a client there, with a credential that answers whatever is asked for."""
        return {"_META_TARGET_HOST": host, "_META_TARGET_PASSWORD": SECRET, "user": ROLE}

    def welcomes(self, script: Script = greet) -> None:
        """Asserts that a client before such a target gets in."""
        with ScriptedTarget(script) as target:
            self.answering.greeted(self.lines(f"127.0.0.1:{target.port}"))

    def refused(self, script: Script, sqlstate: str, says: str, host: str = "127.0.0.1") -> None:
        """Asserts that a client before such a target is refused as it should be, and leaves nothing.

        `says`: what the log must say.
        """
        with ScriptedTarget(script, host) as target:
            self.refused_at(f"{host}:{target.port}", sqlstate, says)

    def refused_at(self, host: str, sqlstate: str, says: str) -> None:
        error, reason = self.answering.refused(self.lines(host))
        assert (error["S"], error["V"], error["C"]) == ("FATAL", "FATAL", sqlstate), reason
        assert set(error) == {"S", "V", "C", "M"}
        assert error["M"]
        for hidden in (ROLE, SECRET, WORDS, *host.replace(",", ":").split(":")):
            assert hidden not in error["M"]
        assert says in reason
        assert SECRET not in self.gateway.log.read_text()
        self.welcomes()
        wait_until(lambda: self.gateway.descriptors == self._idle_descriptors, "all descriptors to be closed")


@pytest.fixture(scope="module")
def facing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Facing]:
    """With the settings that everybody has. One authenticator at a time, so that descriptors can be counted."""
    with answering_gateway(tmp_path_factory.mktemp("facing"), authenticator={"max_parallel": 1}) as answering:
        yield Facing(answering)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Facing]:
    """With little time for its targets."""
    settings: dict[str, Any] = {"connect_timeout": 0.4, "login_timeout": 0.6}
    folder = tmp_path_factory.mktemp("hasty")
    with answering_gateway(folder, authenticator={"max_parallel": 1}, target=settings) as answering:
        yield Facing(answering)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Facing]:
    """With limits that are reached by little."""
    settings = {"max_auth_request": 100, "max_error": 200, "max_message": 300, "max_scram_iterations": 5000}
    folder = tmp_path_factory.mktemp("narrow")
    with answering_gateway(folder, authenticator={"max_parallel": 1}, target=settings) as answering:
        yield Facing(answering)


def read_to_end(connection: socket.socket) -> bytes:
    """All that the gateway sends until it closes, as it must."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            data += chunk
    return data


def read_answer(connection: socket.socket) -> bytes:
    """The body of the gateway's next message; it must be one of those that answer an authentication request."""
    header = connection.recv(5, socket.MSG_WAITALL)
    if len(header) < 5:
        raise ConnectionAbortedError("the gateway closed")
    assert header[:1] == b"p"
    return connection.recv(struct.unpack("!i", header[1:])[0] - 4, socket.MSG_WAITALL)


def saying(data: bytes) -> Script:
    """A target that says this to a startup packet; the gateway must close, and not have said the credential."""

    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(data)
        assert SECRET.encode() not in read_to_end(connection)

    return script


def error_response(fields: bytes) -> bytes:
    return message(b"E", fields)


# It cannot be reached, or goes


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port of 127.0.0.1 where connecting takes for ever: its queue is full, and what comes then is dropped."""
    with contextlib.ExitStack() as opened:
        listening = opened.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(10):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
            if not select.select([], [waiting], [], 0.2)[1]:
                break
        else:
            raise AssertionError("a queue that is never full")
        yield listening.getsockname()[1]


def test_one_that_drops_packets_is_given_up_after_the_time_to_connect(hasty: Facing, deaf_port: int) -> None:
    hasty.refused_at(f"127.0.0.1:{deaf_port}", "08001", f"127.0.0.1:{deaf_port}: no connection in 0.4 s")


def test_after_one_that_drops_packets_the_next_host_is_tried(hasty: Facing, deaf_port: int) -> None:
    with ScriptedTarget(greet) as target:
        hasty.answering.greeted(hasty.lines(f"127.0.0.1:{deaf_port},127.0.0.1:{target.port}"))


def test_many_that_drop_packets_share_the_time_to_log_in(hasty: Facing, deaf_port: int) -> None:
    hosts = ",".join([f"127.0.0.1:{deaf_port}"] * 20)
    hasty.refused_at(hosts, "08001", "target not reachable: no connection in 0.6 s; 127.0.0.1:")


def test_one_that_refuses_connections(facing: Facing) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        facing.refused_at(f"127.0.0.1:{bound.getsockname()[1]}", "08001", "Connection refused")


def goes(before: bytes, *, reset: bool, steps: int = 0) -> Script:
    """A target that says something, takes so many answers, and is gone."""

    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(before)
        for _ in range(steps):
            read_answer(connection)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    return script


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("before", "steps"),
    [
        pytest.param(b"", 0, id="after startup"),
        pytest.param(b"R", 0, id="in a header"),
        pytest.param(AUTH_OK[:-2], 0, id="in a message"),
        pytest.param(MD5_REQUEST, 1, id="after the answer"),
        pytest.param(AUTH_OK, 0, id="after AuthenticationOk"),
        pytest.param(AUTH_OK + KEY, 0, id="before ReadyForQuery"),
    ],
)
def test_one_that_goes_during_the_login(facing: Facing, before: bytes, steps: int, *, reset: bool) -> None:
    facing.refused(goes(before, reset=reset, steps=steps), "08006", "target closed the connection during the login")


def test_one_that_closes_whatever_it_accepts(facing: Facing) -> None:
    facing.refused(lambda _: None, "08006", "target closed the connection during the login")


def test_one_that_resets_whatever_it_accepts(facing: Facing) -> None:
    def script(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    with ScriptedTarget(script) as target:
        # Whether the reset still finds the gateway connecting is a matter of luck.
        for _ in range(30):
            error, _ = facing.answering.refused(facing.lines(f"127.0.0.1:{target.port}"))
            assert error["C"] in ("08001", "08006")
    facing.refused(lambda _: None, "08006", "target closed the connection during the login")


def test_one_that_closes_behind_ready_for_query_has_let_the_client_in(facing: Facing) -> None:
    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(AUTH_OK + READY)

    with ScriptedTarget(script) as target, RawClient(facing.gateway.port) as client:
        client.log_in(user=facing.answering.user(facing.lines(f"127.0.0.1:{target.port}")))
        assert client.read_to_end() == b""


@pytest.mark.parametrize("reset", [False, True])
def test_one_that_goes_in_the_middle_of_a_row_has_the_last_word(facing: Facing, *, reset: bool) -> None:
    half = message(b"D", bytes(3 * MEGABYTE))[: 2 * MEGABYTE]

    def script(connection: socket.socket) -> None:
        greet(connection)
        connection.sendall(half)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    with ScriptedTarget(script) as target, RawClient(facing.gateway.port) as client:
        client.log_in(user=facing.answering.user(facing.lines(f"127.0.0.1:{target.port}")))
        received = client.read_to_end()
    assert half.startswith(received)
    assert reset or received == half


# It takes its time


def drips(before: bytes, drop: bytes) -> Script:
    """A target that says something, and then this again and again."""

    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(before)
        while True:
            connection.sendall(drop)
            time.sleep(0.02)

    return script


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(saying(b""), id="says nothing"),
        pytest.param(saying(AUTH_OK), id="says no more"),
        pytest.param(saying(AUTH_OK + KEY), id="is never ready"),
        pytest.param(saying(AUTH_OK[:6]), id="stops in a message"),
        pytest.param(drips(message(b"R", bytes(1500))[:5], b"\0"), id="drips a request"),
        pytest.param(drips(message(b"E", bytes(29_000))[:5], b"\0"), id="drips an error"),
        pytest.param(drips(AUTH_OK, message(b"N", b"SNOTICE\0\0")), id="drips notices"),
        pytest.param(drips(AUTH_OK, message(b"S", b"a\0b\0")), id="drips parameters"),
    ],
)
def test_one_that_takes_too_long_to_log_in(hasty: Facing, script: Script) -> None:
    hasty.refused(script, "08006", "no login in 0.6 s")


# It says what is no message, or not one that may come

LENGTHS = [0, 3, -1, -(2**31), 2**31 - 1, 100_000_000]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("before", "kind"), [(b"", b"R"), (b"", b"E"), (b"", b"v"), (AUTH_OK, b"S"), (AUTH_OK, b"N"), (AUTH_OK, b"Z")]
)
def test_one_whose_message_has_an_impossible_length(facing: Facing, before: bytes, kind: bytes, length: int) -> None:
    header = kind + struct.pack("!i", length)
    facing.refused(
        saying(before + header), "08P01", f"message '{kind.decode()}' of length {length % 2**32}, allowed are"
    )


def test_an_error_of_a_hundred_megabytes_is_not_read(facing: Facing) -> None:
    before = facing.gateway.resident_bytes
    script = saying(struct.pack("!ci", b"E", 100_000_000) + bytes(100_000_000))
    facing.refused(script, "08P01", "message 'E' of length 100000000")
    assert facing.gateway.peak_bytes - before <= MAX_GROWTH


@pytest.mark.parametrize("drop", [message(b"N", WORDS.encode() * 1000), message(b"S", bytes(60_000))])
def test_messages_without_end_before_the_session_are_not_kept(facing: Facing, drop: bytes) -> None:
    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(AUTH_OK)
        for _ in range(100_000_000 // len(drop)):
            connection.sendall(drop)
        raise AssertionError("the gateway has read it all")

    before = facing.gateway.resident_bytes
    facing.refused(script, "08P01", "over 1048576 bytes before ReadyForQuery")
    assert facing.gateway.peak_bytes - before <= MAX_GROWTH


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="HTTP"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2p1\r\n", id="SSH"),
        pytest.param(b"\x15\x03\x03\x00\x02\x02\x0a", id="TLS"),
        pytest.param(b"J\0\0\0\x0a8.0.36\0", id="MySQL"),
        pytest.param(b"EFATAL:  unsupported frontend protocol\n\0", id="protocol 2"),
        pytest.param(b"\0" * 100, id="zeroes"),
        pytest.param(b"\xff" * 100, id="ones"),
        pytest.param(b"N", id="an answer to an SSLRequest"),
        pytest.param(b"R\0\0\0\x04", id="a request without a method"),
        pytest.param(b"R\0\0\0\x07\0\0\0", id="a request with half a method"),
        pytest.param(MD5_REQUEST[:1] + b"\0\0\0\x08\0\0\0\x05", id="an MD5 request without a salt"),
        pytest.param(message(b"R", b"\0\0\0\x05sal"), id="an MD5 request with a short salt"),
        pytest.param(message(b"R", b"\0\0\0\x05salty"), id="an MD5 request with a long salt"),
        pytest.param(NEGOTIATION * 2 + AUTH_OK + READY, id="two NegotiateProtocolVersions"),
        pytest.param(AUTH_OK + NEGOTIATION, id="a late NegotiateProtocolVersion"),
        pytest.param(AUTH_OK + AUTH_OK, id="a second AuthenticationOk"),
        pytest.param(AUTH_OK + MD5_REQUEST, id="a request after AuthenticationOk"),
        pytest.param(AUTH_OK + CLEARTEXT_REQUEST, id="a cleartext request after AuthenticationOk"),
        pytest.param(AUTH_OK + KEY + KEY + READY, id="a second BackendKeyData"),
        pytest.param(AUTH_OK + message(b"K", b"1234567") + READY, id="a cut BackendKeyData"),
        pytest.param(AUTH_OK + message(b"K", bytes(4 + 257)) + READY, id="a BackendKeyData that is too long"),
        pytest.param(AUTH_OK + message(b"Z"), id="a ReadyForQuery without a status"),
        pytest.param(AUTH_OK + message(b"Z", b"II"), id="a ReadyForQuery with two"),
    ],
)
def test_one_that_does_not_speak_the_protocol(facing: Facing, garbage: bytes) -> None:
    facing.refused(saying(garbage), "08P01", "target broke the protocol: ")


@pytest.mark.parametrize("kind", list("ZDTGHWCSKNAnIst123cdVX"))
@pytest.mark.parametrize("before", [b"", NEGOTIATION, MD5_REQUEST], ids=["at first", "negotiated", "answered"])
def test_nothing_of_a_session_may_come_before_authentication_ok(facing: Facing, before: bytes, kind: str) -> None:
    data = before + message(kind.encode(), WORDS.encode()) + AUTH_OK + READY
    facing.refused(saying(data), "08P01", f"message of type 0x{ord(kind):02x}, which may not come here")


@pytest.mark.parametrize("kind", list("DTGHWCAnIst123cdVXp"))
def test_nothing_of_a_query_may_come_before_ready_for_query(facing: Facing, kind: str) -> None:
    data = AUTH_OK + message(kind.encode(), WORDS.encode()) + READY
    facing.refused(saying(data), "08P01", f"message of type 0x{ord(kind):02x}, which may not come here")


def test_options_that_it_does_not_know_do_no_harm(facing: Facing) -> None:
    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(NEGOTIATION + AUTH_OK + READY)

    facing.welcomes(script)


# It asks for what it should not


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (1, "1"),
        (2, "Kerberos V5"),
        (4, "4"),
        (6, "SCM credentials"),
        (7, "GSSAPI"),
        (8, "GSSAPI continuation"),
        (9, "SSPI"),
        (11, "SASL continuation"),
        (12, "SASL final"),
        (13, "13"),
        (2**32 - 1, "4294967295"),
    ],
)
def test_a_method_that_the_gateway_cannot_do(facing: Facing, method: int, name: str) -> None:
    request = message(b"R", struct.pack("!I", method) + WORDS.encode())
    facing.refused(saying(request), "08004", f"target asks for {name}, which the gateway cannot do")


@pytest.mark.parametrize(
    "mechanisms",
    [
        b"",
        b"\0",
        b"\0\0\0",
        b"OAUTHBEARER\0\0",
        b"scram-sha-256\0\0",
        b"SCRAM-SHA-1\0SCRAM-SHA-512\0\0",
        b"PLAIN\0",
        WORDS.encode(),
    ],
)
def test_sasl_mechanisms_that_the_gateway_does_not_know(facing: Facing, mechanisms: bytes) -> None:
    request = message(b"R", struct.pack("!i", 10) + mechanisms)
    facing.refused(saying(request), "08004", "target offers no SASL mechanism that the gateway knows")


@pytest.mark.parametrize(
    "mechanisms", [b"SCRAM-SHA-256-PLUS\0\0", b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0", b"X\0SCRAM-SHA-256-PLUS\0"]
)
def test_a_channel_that_is_to_be_bound_and_is_not_encrypted(facing: Facing, mechanisms: bytes) -> None:
    request = message(b"R", struct.pack("!i", 10) + mechanisms)
    facing.refused(saying(request), "08P01", "SCRAM-SHA-256-PLUS offered without TLS")


@pytest.mark.parametrize(
    "second",
    [MD5_REQUEST, CLEARTEXT_REQUEST, message(b"R", b"\0\0\0\x0aSCRAM-SHA-256\0\0"), message(b"R", b"\0\0\0\x07")],
    ids=["MD5", "cleartext", "SASL", "GSSAPI"],
)
def test_only_one_request_is_answered(facing: Facing, second: bytes) -> None:
    answers: list[bytes] = []

    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(MD5_REQUEST)
        answers.append(read_answer(connection))
        while True:
            connection.sendall(second)
            answers.append(read_answer(connection))

    facing.refused(script, "08P01", "after the one exchange there is")
    assert [len(answer) for answer in answers] == [len(password()) - 5]


def own_address() -> str:
    """An address of this machine that is not loopback's; empty if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        # Nothing is sent: this only asks which address would be the sender's.
        probe.connect(("192.0.2.1", 9))
        host: str = probe.getsockname()[0]
        return "" if host.startswith(("127.", "0.")) else host
    return ""


needs_network = pytest.mark.skipif(not own_address(), reason="no network on this machine")


@needs_network
def test_the_password_in_clear_goes_to_no_other_machine(facing: Facing) -> None:
    facing.refused(saying(CLEARTEXT_REQUEST), "08004", "in clear over a network without TLS", own_address())


def test_the_password_in_clear_goes_over_no_channel_that_others_can_read() -> None:
    framer = _wire.Framer({})
    parameters = ((b"user", ROLE.encode()),)
    started = Started(Accepted("1", "192.0.2.1:1"), parameters)
    mapping = Mapping((Address("db.example", 5432),), parameters, None)
    granted = Granted(started, mapping, Password(Secret(SECRET.encode())), 0.0)
    limits = TargetLimits(2000, 30_000, 65_536, 100_000)
    terms = TargetTerms(messages.PROTOCOL_3_0, None, local=False, pass_error_text=True, limits=limits)
    login = target_login(framer, granted, terms)
    sent = [next(login)]
    framer.feed(CLEARTEXT_REQUEST)
    with pytest.raises(TargetFault, match="in clear over a network without TLS") as raised:
        sent.extend(login)
    assert raised.value.sqlstate == "08004"
    assert SECRET.encode() not in b"".join(step for step in sent if isinstance(step, bytes))


# SCRAM


def accepts(nonce: bytes) -> bytes:
    return nonce + b"Theirs"


def tells(signature: bytes) -> bytes:
    return b"v=" + base64.b64encode(signature)


@dataclass(frozen=True)
class ScramTarget:
    """A target that lets the gateway in by SCRAM-SHA-256 as it should, but for what a test replaces.

    `first` is its whole first message; `after_first` and `after_final` come instead of what should come next.
    """

    mechanisms: bytes = b"SCRAM-SHA-256\0\0"
    nonce: Callable[[bytes], bytes] = accepts
    salt: bytes = base64.b64encode(b"a salt of theirs")
    iterations: bytes = b"1000"
    first: bytes | None = None
    final: Callable[[bytes], bytes] = tells
    after_initial: bytes = b""
    after_first: bytes = b""
    after_final: bytes = AUTH_OK + KEY + READY

    def __call__(self, connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(message(b"R", struct.pack("!i", 10) + self.mechanisms))
        mechanism, _, rest = read_answer(connection).partition(b"\0")
        assert mechanism == b"SCRAM-SHA-256"
        bare = rest[4:].removeprefix(b"n,,")
        if self.after_initial:
            connection.sendall(self.after_initial)
            assert SECRET.encode() not in read_to_end(connection)
            return
        nonce = self.nonce(bare.partition(b"r=")[2])
        first = self.first
        if first is None:
            first = b"r=%s,s=%s,i=%s" % (nonce, self.salt, self.iterations)
        connection.sendall(message(b"R", struct.pack("!i", 11) + first))
        without_proof = read_answer(connection).partition(b",p=")[0]
        if self.after_first:
            connection.sendall(self.after_first)
            assert SECRET.encode() not in read_to_end(connection)
            return
        salt = base64.b64decode(self.salt)
        salted = hashlib.pbkdf2_hmac("sha256", SECRET.encode(), salt, int(self.iterations))
        server_key = hmac.digest(salted, b"Server Key", "sha256")
        signature = hmac.digest(server_key, b",".join((bare, first, without_proof)), "sha256")
        connection.sendall(message(b"R", struct.pack("!i", 12) + self.final(signature)) + self.after_final)
        read_to_end(connection)


@pytest.mark.parametrize(
    "target",
    [
        ScramTarget(),
        ScramTarget(iterations=b"1"),
        ScramTarget(iterations=b"100000"),
        ScramTarget(salt=base64.b64encode(b"s")),
        ScramTarget(mechanisms=b"OAUTHBEARER\0SCRAM-SHA-256\0SCRAM-SHA-1\0\0"),
        ScramTarget(nonce=lambda nonce: nonce.ljust(1024, b"x")),
        ScramTarget(final=lambda signature: tells(signature) + b",x=an extension"),
    ],
)
def test_scram_as_it_should_be_lets_the_gateway_in(facing: Facing, target: ScramTarget) -> None:
    facing.welcomes(target)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (ScramTarget(final=lambda _: tells(bytes(32))), "wrong server signature"),
        (ScramTarget(final=lambda signature: tells(signature[:-1])), "wrong server signature"),
        (ScramTarget(final=lambda signature: tells(signature + b"x")), "wrong server signature"),
        (ScramTarget(final=lambda _: b"v="), "wrong server signature"),
        (ScramTarget(final=lambda _: b"v=?"), "signature is not base64"),
        (ScramTarget(final=lambda _: b"v=\xff"), "signature is not base64"),
        (ScramTarget(final=lambda _: b""), "malformed server-final-message"),
        (ScramTarget(final=lambda _: b"e=" + WORDS.encode()), "malformed server-final-message"),
        (ScramTarget(iterations=b"0"), "iteration count outside 1 to 100000"),
        (ScramTarget(iterations=b"-1"), "iteration count"),
        (ScramTarget(iterations=b"100001"), "iteration count"),
        (ScramTarget(iterations=b"10000000"), "iteration count"),
        (ScramTarget(iterations=b"9" * 1000), "iteration count"),
        (ScramTarget(iterations=b""), "iteration count"),
        (ScramTarget(iterations=b"1e3"), "iteration count"),
        (ScramTarget(iterations=b" 1000"), "iteration count"),
        (ScramTarget(iterations="\u0661\u0660".encode()), "iteration count"),
        (ScramTarget(nonce=lambda nonce: nonce), "nonce does not extend ours"),
        (ScramTarget(nonce=lambda nonce: nonce[:-1]), "nonce does not extend ours"),
        (ScramTarget(nonce=lambda nonce: b"x" + nonce), "nonce does not extend ours"),
        (ScramTarget(nonce=lambda nonce: nonce[::-1] + b"x"), "nonce does not extend ours"),
        (ScramTarget(nonce=lambda _: b""), "nonce does not extend ours"),
        (ScramTarget(nonce=lambda nonce: nonce.ljust(1025, b"x")), "too long"),
        (ScramTarget(nonce=lambda nonce: nonce + b" "), "not printable"),
        (ScramTarget(nonce=lambda nonce: nonce + b"\0"), "not printable"),
        (ScramTarget(nonce=lambda nonce: nonce + b"\xc3\xbc"), "not printable"),
        (ScramTarget(salt=b""), "salt is empty"),
        (ScramTarget(salt=b"?"), "salt is not base64"),
        (ScramTarget(salt=b"QQ"), "salt is not base64"),
        (ScramTarget(salt=b"QUJD\n"), "salt is not base64"),
        (ScramTarget(first=b""), "malformed server-first-message"),
        (ScramTarget(first=b",,,"), "malformed server-first-message"),
        (ScramTarget(first=b"r=x,s=QQ=="), "malformed server-first-message"),
        (ScramTarget(first=b"i=1000,s=QQ==,r=x"), "malformed server-first-message"),
        (ScramTarget(first=b"m=needed,r=x,s=QQ==,i=1000"), "malformed server-first-message"),
        (ScramTarget(first=b"e=" + WORDS.encode()), "malformed server-first-message"),
    ],
)
def test_scram_as_it_should_not_be_ends_the_login(facing: Facing, target: ScramTarget, says: str) -> None:
    facing.refused(target, "08P01", says)


def request(method: int, data: bytes = b"") -> bytes:
    return message(b"R", struct.pack("!i", method) + data)


@pytest.mark.parametrize(
    "instead",
    [
        pytest.param(AUTH_OK + READY, id="AuthenticationOk"),
        pytest.param(CLEARTEXT_REQUEST, id="cleartext"),
        pytest.param(MD5_REQUEST, id="MD5"),
        pytest.param(request(10, b"SCRAM-SHA-256\0\0"), id="SASL again"),
        pytest.param(request(7), id="GSSAPI"),
        pytest.param(READY, id="ReadyForQuery"),
        pytest.param(message(b"N", WORDS.encode()), id="NoticeResponse"),
    ],
)
@pytest.mark.parametrize("step", ["after_initial", "after_first", "after_final"])
def test_an_exchange_that_has_begun_is_ended_in_order(facing: Facing, step: str, instead: bytes) -> None:
    if step == "after_final" and instead.startswith(AUTH_OK):
        # That is the order; once more is not.
        instead = AUTH_OK + instead
    facing.refused(ScramTarget(**{step: instead}), "08P01", "target broke the protocol: ")


@pytest.mark.parametrize("step", ["after_initial", "after_first"])
def test_the_parts_of_an_exchange_are_not_swapped(facing: Facing, step: str) -> None:
    swapped = request(12, tells(bytes(32))) if step == "after_initial" else request(11, b"r=x,s=QQ==,i=1000")
    facing.refused(ScramTarget(**{step: swapped}), "08P01", "in the middle of a SASL exchange")


# It refuses, in whatever words


@pytest.mark.parametrize(
    ("fields", "sqlstate"),
    [
        pytest.param(b"SFATAL\0VFATAL\0C3D000\0M%s\0\0", "3D000", id="whole"),
        pytest.param(b"C53300\0M%s\0\0", "53300", id="without severity"),
        pytest.param(b"SERROR\0VERROR\0C42501\0M%s\0\0", "42501", id="of severity ERROR"),
        pytest.param(b"SFATAL\0C57P03\0M%s\0\0", "57P03", id="not now"),
        pytest.param(b"SFATAL\0C3D000\0D%s\0H%s\0Fx.c\0L1\0Rf\0\0", "3D000", id="without M"),
        pytest.param(b"SFATAL\0C3D000\0M\0\0", "3D000", id="empty M"),
        pytest.param(b"SFATAL\0C3D000\0M%s", "3D000", id="unterminated"),
        pytest.param(b"C3D000", "3D000", id="no more than an SQLSTATE"),
        pytest.param(b"SFATAL\0C28P01\0M%s\0\0", "08004", id="wrong credential"),
        pytest.param(b"SFATAL\0C28000\0M%s\0\0", "08004", id="wrong role"),
        pytest.param(b"SFATAL\0M%s\0\0", "08006", id="without SQLSTATE"),
        pytest.param(b"SFATAL\0C\0M%s\0\0", "08006", id="empty SQLSTATE"),
        pytest.param(b"SFATAL\0C3d000\0M%s\0\0", "08006", id="lower-case SQLSTATE"),
        pytest.param(b"SFATAL\0C3D00\0M%s\0\0", "08006", id="short SQLSTATE"),
        pytest.param(b"SFATAL\0C3D0000\0M%s\0\0", "08006", id="long SQLSTATE"),
        pytest.param(b"SFATAL\0C3D\n00\0M%s\0\0", "08006", id="broken SQLSTATE"),
        pytest.param(b"SFATAL\0C\xff\xff\xff\xff\xff\0M%s\0\0", "08006", id="no ASCII"),
        pytest.param(b"", "08006", id="empty"),
        pytest.param(b"\0", "08006", id="nothing but its end"),
        pytest.param(b"\xff" * 1000, "08006", id="ones"),
        pytest.param(b"%s", "08006", id="unterminated words"),
    ],
)
@pytest.mark.parametrize("before", [b"", MD5_REQUEST, AUTH_OK], ids=["at first", "answered", "authenticated"])
def test_an_error_is_told_by_its_sqlstate_alone(facing: Facing, before: bytes, fields: bytes, sqlstate: str) -> None:
    body = fields.replace(b"%s", WORDS.encode())
    facing.refused(saying(before + error_response(body)), sqlstate, "target refused: ")


def test_the_words_of_an_error_are_in_the_log_with_nothing_in_them_that_acts_on_a_terminal(facing: Facing) -> None:
    body = b"SFATAL\0C3D000\0M%s\x1b[31m\nforged line\xff\0\0" % WORDS.encode()
    facing.refused(saying(error_response(body)), "3D000", f"3D000: {WORDS}\\x1b[31m\\nforged line\\xff")


@pytest.fixture(scope="module")
def outspoken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answering]:
    with answering_gateway(tmp_path_factory.mktemp("outspoken"), target={"error_text": True}) as answering:
        yield answering


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (b"SFATAL\0C42501\0Mgo away\0\0", "go away"),
        (b"SFATAL\0C42501\0M\0\0", "the target server refused the connection"),
        (b"SFATAL\0C42501\0\0", "the target server refused the connection"),
        (b"SFATAL\0C3D000\0\0", "database does not exist"),
    ],
    ids=["words", "empty words", "no words", "no words and a known SQLSTATE"],
)
def test_its_own_words_are_told_if_that_is_wanted_and_there_are_any(
    outspoken: Answering, fields: bytes, told: str
) -> None:
    with ScriptedTarget(saying(error_response(fields))) as target:
        error, _ = outspoken.refused({"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "x"})
    assert (error["S"], error["M"]) == ("FATAL", told)


@needs_network
def test_words_that_others_may_have_put_in_its_mouth_are_never_told(outspoken: Answering) -> None:
    script = saying(error_response(b"SFATAL\0C42501\0M%s\0\0" % WORDS.encode()))
    with ScriptedTarget(script, own_address()) as target:
        error, _ = outspoken.refused({"_META_TARGET_HOST": f"{own_address()}:{target.port}", "user": "x"})
    assert (error["C"], error["M"]) == ("42501", "the target server refused the connection")


# Its limits are settings


def ready_after(data: bytes) -> Script:
    """A target that lets the gateway in, and says this before it is ready."""

    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(AUTH_OK + data + READY)
        read_to_end(connection)

    return script


def sized(kind: bytes, length: int, start: bytes = b"") -> bytes:
    """A message with this in its length field."""
    return message(kind, start.ljust(length - 6, b"x") + b"\0\0")


def test_an_authentication_request_may_be_as_long_as_the_settings_say(narrow: Facing) -> None:
    fitting = b"SCRAM-SHA-256\0".ljust(90, b"x") + b"\0\0"
    narrow.welcomes(ScramTarget(mechanisms=fitting))
    narrow.refused(ScramTarget(mechanisms=b"x" + fitting), "08P01", "message 'R' of length 101, allowed are 4 to 100")


def test_scram_may_take_as_many_iterations_as_the_settings_say(narrow: Facing) -> None:
    narrow.welcomes(ScramTarget(iterations=b"5000"))
    narrow.refused(ScramTarget(iterations=b"5001"), "08P01", "iteration count outside 1 to 5000")


@pytest.mark.parametrize("before", [b"", AUTH_OK])
def test_an_error_may_be_as_long_as_the_settings_say(narrow: Facing, before: bytes) -> None:
    narrow.refused(saying(before + sized(b"E", 200, b"C3D000\0M")), "3D000", "target refused: 3D000")
    longer = before + sized(b"E", 201, b"C3D000\0M")
    narrow.refused(saying(longer), "08P01", "message 'E' of length 201, allowed are 4 to 200")


@pytest.mark.parametrize(("kind", "limit"), [(b"N", 200), (b"S", 300)])
def test_what_comes_before_the_session_may_be_as_long_as_the_settings_say(
    narrow: Facing, kind: bytes, limit: int
) -> None:
    narrow.welcomes(ready_after(sized(kind, limit)))
    longer = ready_after(sized(kind, limit + 1))
    narrow.refused(longer, "08P01", f"message '{kind.decode()}' of length {limit + 1}, allowed are 4 to {limit}")


def test_a_key_may_be_as_long_as_the_settings_and_the_protocol_say(narrow: Facing) -> None:
    narrow.welcomes(ready_after(message(b"K", bytes(4 + 256))))
    narrow.refused(ready_after(message(b"K", bytes(4 + 257))), "08P01", "BackendKeyData, or one of a wrong length")
    longer = ready_after(sized(b"K", 301))
    narrow.refused(longer, "08P01", "message 'K' of length 301, allowed are 4 to 300")


def test_a_negotiation_may_be_as_long_as_the_settings_say(narrow: Facing) -> None:
    longer = sized(b"v", 301, struct.pack("!ii", 196608, 1))
    narrow.refused(saying(longer), "08P01", "message 'v' of length 301, allowed are 4 to 300")


# Many of them


def test_many_bad_ones_at_once_leave_the_others_alone(hasty: Facing) -> None:
    scripts = [
        saying(b""),
        saying(b"\xff"),
        saying(error_response(b"")),
        goes(b"", reset=True),
        ScramTarget(salt=b"?"),
        greet,
    ]
    with contextlib.ExitStack() as opened:
        targets = [opened.enter_context(ScriptedTarget(script)) for script in scripts]
        users = [hasty.answering.user(hasty.lines(f"127.0.0.1:{target.port}")) for target in targets] * 5
        clients = [opened.enter_context(RawClient(hasty.gateway.port)) for _ in users]
        for client, user in zip(clients, users, strict=True):
            client.send(startup(user=user) + password())
        last = [next(kind for kind, _ in iter(client.read_message, None) if kind in b"ZE") for client in clients]
    assert last == [b"E", b"E", b"E", b"E", b"E", b"Z"] * 5
    hasty.refused(saying(b""), "08006", "no login in 0.6 s")
