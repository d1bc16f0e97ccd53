"""Clients that get TLS wrong, or attack by it: each is refused, leaves nothing behind, and the next one is served."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway
from tests.system.conftest import running_gateway, wait_until, write_mapped
from tests.tls import HOST, LAST_YEAR, LONG_AGO, NEXT_YEAR, Authority, Identity, TlsClient, self_signed
from tests.wire import RESET_ON_CLOSE, SSL_REQUEST, RawClient, password, startup

SECONDS = 30
LOGIN_SECONDS = 0.5
TIMED_OUT = ("28000", "canceling authentication due to timeout")
MEGABYTE = 1024 * 1024


class Guarded:
    """A gateway that asks for certificates, of which every test must leave nothing behind."""

    def __init__(self, gateway: Gateway, authority: Authority) -> None:
        self.gateway = gateway
        self.port = gateway.port
        self.known = authority.client_context(authority.issue("known client", common_name="known"))
        self.serves()
        # Threads in which handshakes run, and what they hold, are there from here on.
        self._descriptors = gateway.descriptors
        self._earlier = 0
        """How many lines of the log are about clients that were refused before the block of `unharmed`."""
        self._asked_about = Counter[str]()
        """Addresses of those in the block whose line is known: a port may be used again."""

    def serves(self) -> None:
        with TlsClient(self.port, self.known) as client:
            address = "{}:{}".format(*client.socket.getsockname())
            client.log_in()
            client.assert_served()
        session = self.gateway.wait_for("login", client=address)["session"]
        self.gateway.wait_for("session ended", session=session)

    def reason(self, client: socket.socket | tuple[str, int]) -> str:
        """Why this client, or the one of this address, was refused."""
        address = "{}:{}".format(*(client.getsockname() if isinstance(client, socket.socket) else client))
        known = [line["client"] for line in self.gateway.log_lines("refused")[: self._earlier]].count(address)
        self._asked_about[address] += 1
        line = self.gateway.wait_for("refused", known + self._asked_about[address], client=address)
        assert (line["level"], line["fault_of"]) == ("info", "client"), line
        reason: str = line["reason"]
        return reason

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        """What happens in the block leaves no descriptor and no session, and the next client is served."""
        self._earlier = len(self.gateway.log_lines("refused"))
        self._asked_about.clear()
        yield
        wait_until(lambda: self.gateway.descriptors <= self._descriptors, "all descriptors to be closed")
        self.serves()


@contextlib.contextmanager
def guarded_gateway(folder: Path, port: int, authority: Authority, **settings: Any) -> Iterator[Guarded]:
    tls = authority.issue("guarded gateway", "localhost", HOST).settings
    tls |= {"client_ca": str(authority.cert), "client_cert": "require"}
    # One authenticator at a time, so that descriptors can be counted.
    alone = {"max_parallel": 1}
    script = write_mapped(folder / "authenticator", port)
    with running_gateway(folder, script, tls=tls, authenticator=alone, **settings) as gateway:
        yield Guarded(gateway, authority)


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres, authority: Authority
) -> Iterator[Guarded]:
    with guarded_gateway(tmp_path_factory.mktemp("guarded"), postgres.port, authority) as found:
        yield found


@pytest.fixture(scope="module")
def hasty(
    tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres, authority: Authority
) -> Iterator[Guarded]:
    """With little time for logins."""
    folder = tmp_path_factory.mktemp("hasty")
    with guarded_gateway(folder, postgres.port, authority, login_timeout=LOGIN_SECONDS) as found:
        yield found


def begun(port: int, *, direct: bool) -> RawClient:
    """A client that has come as far as the ClientHello."""
    client = RawClient(port)
    if not direct:
        client.send(SSL_REQUEST)
        assert client.read(1) == b"S"
    return client


def client_hello(context: ssl.SSLContext) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def record(kind: int, body: bytes, version: bytes = b"\x03\x01") -> bytes:
    return bytes([kind]) + version + struct.pack("!H", len(body)) + body


BOTH_WAYS = pytest.mark.parametrize("direct", [False, True], ids=["SSLRequest", "direct"])


# Garbage


@BOTH_WAYS
@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(record(0x16, bytes(100)), id="a handshake of zeros"),
        pytest.param(record(0x16, b"\x01\x00\x00\x04\x03\x03\x00\x00"), id="a ClientHello that is too short"),
        pytest.param(record(0x16, b"\x02\x00\x00\x00"), id="a ServerHello"),
        pytest.param(record(0x16, b"\x01\xff\xff\xff" + bytes(1000)), id="a ClientHello of 16 megabytes"),
        pytest.param(b"\x16\x03\x01\xff\xff" + bytes(70_000), id="a record that is too long"),
        pytest.param(record(0x16, b""), id="an empty record"),
        pytest.param(record(0x16, random.Random(1).randbytes(500)), id="random bytes in a record"),
        pytest.param(b"\x16" + random.Random(2).randbytes(500), id="random bytes"),
        pytest.param(b"\x16\x00\x00\x00\x00\x00", id="version 0.0"),
        pytest.param(record(0x16, b"\x01\x00\x00\x00") * 500, id="many records"),
    ],
)
def test_garbage_in_place_of_a_client_hello_is_refused(guarded: Guarded, garbage: bytes, *, direct: bool) -> None:
    with guarded.unharmed(), begun(guarded.port, direct=direct) as client:
        address = client.socket.getsockname()
        with contextlib.suppress(ConnectionError):
            client.send(garbage)
        # Some of it would have to be waited for, were it meant.
        with contextlib.suppress(OSError):
            client.socket.shutdown(socket.SHUT_WR)
        answer = client.read_to_end()
        # Nothing, or an alert and not a word of PostgreSQL's.
        assert answer[:1] in (b"", b"\x15")
        reason = guarded.reason(address)
    assert reason.startswith(("TLS with the client failed: ", "client left during its login"))


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(record(0x17, bytes(32)), id="application data"),
        pytest.param(record(0x15, b"\x02\x28"), id="an alert"),
        pytest.param(record(0x14, b"\x01"), id="ChangeCipherSpec"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="HTTP"),
        pytest.param(b"SSH-2.0-OpenSSH_9.0\r\n", id="SSH"),
        pytest.param(startup() + password(), id="a login in plain"),
        pytest.param(bytes(5000), id="zeros"),
        pytest.param(b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(37), id="a ClientHello of SSL 2"),
    ],
)
def test_what_is_no_handshake_behind_an_ssl_request_is_refused(guarded: Guarded, garbage: bytes) -> None:
    with guarded.unharmed(), begun(guarded.port, direct=False) as client:
        address = client.socket.getsockname()
        client.send(garbage)
        answer = client.read_to_end()
        assert answer[:1] in (b"", b"\x15")
        assert guarded.reason(address).startswith("TLS with the client failed: ")


@BOTH_WAYS
def test_a_client_hello_with_any_byte_changed_does_no_harm(guarded: Guarded, *, direct: bool) -> None:
    hello = client_hello(guarded.known)
    source = random.Random(3)
    with guarded.unharmed():
        for _ in range(40):
            changed = bytearray(hello)
            changed[source.randrange(1, len(hello))] ^= 1 << source.randrange(8)
            with begun(guarded.port, direct=direct) as client:
                client.send(bytes(changed))
                client.socket.shutdown(socket.SHUT_WR)
                client.read_to_end()


@BOTH_WAYS
def test_a_client_hello_cut_anywhere_does_no_harm(guarded: Guarded, *, direct: bool) -> None:
    hello = client_hello(guarded.known)
    with guarded.unharmed():
        for at in range(1, len(hello), 9):
            with begun(guarded.port, direct=direct) as client:
                client.send(hello[:at])
                client.socket.shutdown(socket.SHUT_WR)
                assert client.read_to_end() == b""


def test_what_pours_in_before_the_handshake_is_done_takes_no_memory(guarded: Guarded) -> None:
    with guarded.unharmed(), begun(guarded.port, direct=False) as client:
        before = guarded.gateway.resident_bytes
        # Fragments of one handshake message, none of which completes it.
        client.send(record(0x16, b"\x01\xff\xff\xff" + bytes(16_000)))
        with contextlib.suppress(OSError):
            for _ in range(50 * MEGABYTE // 16_005):
                client.send(record(0x16, bytes(16_000)))
        assert guarded.gateway.peak_bytes - before < 8 * MEGABYTE


# Who does not get done


@BOTH_WAYS
@pytest.mark.parametrize("part", [0, 1, 5, 50, -1], ids=["nothing", "a byte", "a header", "a part", "all but a byte"])
def test_a_handshake_that_stops_is_ended_by_the_time_to_log_in(hasty: Guarded, part: int, *, direct: bool) -> None:
    with hasty.unharmed(), begun(hasty.port, direct=direct) as client:
        address = client.socket.getsockname()
        client.send(client_hello(hasty.known)[:part])
        # Where only records are understood, nothing can be said.
        assert client.read_to_end()[:1] == (b"E" if direct and not part else b"")
        line = hasty.gateway.wait_for("refused", client="{}:{}".format(*address))
        assert line["reason"] == "login_timeout: the login took too long"


@BOTH_WAYS
def test_one_that_drips_its_handshake_has_no_more_time_than_others(hasty: Guarded, *, direct: bool) -> None:
    hello = client_hello(hasty.known)
    with hasty.unharmed(), begun(hasty.port, direct=direct) as client:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in hello:
                client.send(bytes([byte]))
                time.sleep(0.01)
        assert client.read_to_end() == b""
        assert time.monotonic() - began < 20 * LOGIN_SECONDS


@BOTH_WAYS
def test_one_that_stops_behind_the_servers_part_is_ended_too(hasty: Guarded, *, direct: bool) -> None:
    with hasty.unharmed(), begun(hasty.port, direct=direct) as client:
        client.send(client_hello(hasty.known))
        # ServerHello and what follows it are records; so is all that comes.
        answer = client.read_to_end()
        while answer:
            assert answer[:3] in (b"\x16\x03\x03", b"\x14\x03\x03", b"\x17\x03\x03")
            answer = answer[5 + struct.unpack("!H", answer[3:5])[0] :]


@BOTH_WAYS
def test_one_that_stops_behind_the_handshake_is_told(hasty: Guarded, *, direct: bool) -> None:
    with hasty.unharmed(), TlsClient(hasty.port, hasty.known, direct=direct) as client:
        assert client.read_fatal() == TIMED_OUT


def test_many_that_stop_in_their_handshakes_hold_nobody_up(guarded: Guarded) -> None:
    hello = client_hello(guarded.known)
    with guarded.unharmed(), contextlib.ExitStack() as stack:
        for number in range(100):
            client = stack.enter_context(begun(guarded.port, direct=number % 2 == 0))
            client.send(hello[: 1 + number * 2])
        guarded.serves()


@BOTH_WAYS
@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize("part", [0, 5, 100, None], ids=["nothing", "a header", "a part", "a ClientHello"])
def test_a_client_that_leaves_in_mid_handshake_leaves_nothing(
    guarded: Guarded, part: int | None, *, reset: bool, direct: bool
) -> None:
    with guarded.unharmed():
        for _ in range(3):
            with begun(guarded.port, direct=direct) as client:
                address = client.socket.getsockname()
                client.send(client_hello(guarded.known)[:part])
                if part is None:
                    client.read(1)
                if reset:
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            assert guarded.reason(address).startswith("client left during its login")


def test_a_client_that_leaves_while_its_handshake_is_computed_leaves_nothing(guarded: Guarded) -> None:
    hello = client_hello(guarded.known)
    with guarded.unharmed():
        for _ in range(30):
            with begun(guarded.port, direct=True) as client:
                client.send(hello)
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def test_a_client_that_leaves_right_behind_its_handshake_leaves_nothing(guarded: Guarded) -> None:
    with guarded.unharmed():
        for reset in (False, True):
            for _ in range(3):
                client = TlsClient(guarded.port, guarded.known)
                address = client.socket.getsockname()
                with socket.socket(fileno=client.socket.detach()) as raw:
                    if reset:
                        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                assert guarded.reason(address).startswith("client left during its login")


@pytest.mark.parametrize("sent", [startup(), startup()[:10]], ids=["a startup packet", "a part of one"])
def test_a_client_that_says_goodbye_during_its_login_leaves_nothing(guarded: Guarded, sent: bytes) -> None:
    with guarded.unharmed():
        with TlsClient(guarded.port, guarded.known) as client:
            address = client.socket.getsockname()
            client.send(sent)
            client.tls.setblocking(False)
            with contextlib.suppress(ssl.SSLError):
                client.tls.unwrap()
        assert guarded.reason(address).startswith("client left during its login")


def test_garbage_during_the_login_ends_it(guarded: Guarded) -> None:
    with guarded.unharmed(), TlsClient(guarded.port, guarded.known) as client:
        address = client.socket.getsockname()
        client.send(startup())
        client.read_message()
        with socket.socket(fileno=client.socket.detach()) as raw:
            raw.settimeout(SECONDS)
            raw.sendall(record(0x17, bytes(64), b"\x03\x03"))
            with contextlib.suppress(ConnectionResetError):
                while raw.recv(65536):
                    continue
        assert "DECRYPTION_FAILED_OR_BAD_RECORD_MAC" in guarded.reason(address)


# Certificates


def bad_identities(authority: Authority, stranger: Authority) -> dict[str, tuple[Identity, str]]:
    """What a client may show, and what the log says of it."""
    future = {"not_before": NEXT_YEAR, "not_after": NEXT_YEAR + (LAST_YEAR - LONG_AGO)}
    return {
        "expired": (authority.issue_expired("expired client", common_name="alice"), "certificate has expired"),
        "not valid yet": (
            authority.issue("future client", common_name="alice", **future),
            "certificate is not yet valid",
        ),
        "another authority": (
            stranger.issue("strange client", common_name="alice"),
            "unable to get local issuer certificate",
        ),
        "self-signed": (self_signed(authority.folder, "self-signed client", "alice"), "self-signed certificate"),
    }


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("what", ["expired", "not valid yet", "another authority", "self-signed"])
def test_a_bad_certificate_lets_nobody_in(
    guarded: Guarded, authority: Authority, stranger: Authority, what: str, version: ssl.TLSVersion
) -> None:
    identity, reason = bad_identities(authority, stranger)[what]
    context = authority.client_context(identity)
    context.maximum_version = version
    with guarded.unharmed(), begun(guarded.port, direct=True) as client:
        address = client.socket.getsockname()
        assert not gets_in(client.socket, context)
        assert guarded.reason(address).startswith(f"TLS with the client failed: CERTIFICATE_VERIFY_FAILED: {reason}")


def gets_in(connection: socket.socket, context: ssl.SSLContext) -> bool:
    """Whether this client hears anything of PostgreSQL's. In TLS 1.3 it is done before it hears of a refusal."""
    try:
        with context.wrap_socket(connection, server_hostname="localhost") as tls:
            tls.sendall(startup() + password())
            return bool(tls.recv(1))
    except OSError:
        return False


@pytest.mark.parametrize("client_cert", ["optional", "require"])
def test_a_bad_certificate_is_not_better_than_none(
    tmp_path: Path,
    postgres: ThrowawayPostgres,
    authority: Authority,
    stranger: Authority,
    client_cert: str,
) -> None:
    script = write_mapped(tmp_path / "authenticator", postgres.port)
    tls = authority.issue("asking gateway", "localhost").settings
    tls |= {"client_ca": str(authority.cert), "client_cert": client_cert}
    with running_gateway(tmp_path, script, tls=tls) as gateway:
        for identity, _ in bad_identities(authority, stranger).values():
            with begun(gateway.port, direct=False) as client:
                assert not gets_in(client.socket, authority.client_context(identity))
        wait_until(lambda: len(gateway.log_lines("refused")) == 4, "all of them to be refused")
        assert not gateway.log_lines("login")


def test_a_certificate_without_its_key_lets_nobody_in(guarded: Guarded, authority: Authority) -> None:
    mine, other = (authority.issue(name, common_name=name) for name in ("mine", "other"))
    context = authority.client_context()
    with guarded.unharmed(), pytest.raises(ssl.SSLError):
        context.load_cert_chain(mine.cert, other.key)
    # What Python will not do by itself: the last byte of the proof is another.
    identity = authority.client_context(mine)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    identity.maximum_version = ssl.TLSVersion.TLSv1_2
    tls = identity.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with guarded.unharmed(), begun(guarded.port, direct=True) as client:
        address = client.socket.getsockname()
        while b"\x0f\x00" not in (flight := step(tls, outgoing)):
            client.send(flight)
            incoming.write(client.socket.recv(65536))
        # CertificateVerify: its signature stands at the end of its record, which ChangeCipherSpec follows.
        end = flight.rindex(b"\x14\x03\x03\x00\x01\x01")
        client.send(flight[: end - 1] + bytes([flight[end - 1] ^ 1]) + flight[end:])
        assert client.read_to_end()[:1] in (b"\x15", b"")
        assert guarded.reason(address).startswith("TLS with the client failed: ")


def step(tls: ssl.SSLObject, outgoing: ssl.MemoryBIO) -> bytes:
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()
