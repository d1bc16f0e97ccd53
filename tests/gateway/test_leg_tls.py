"""One side of a session that logs in over TLS: real handshakes in any chunking, the transport driven by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgauthproxy import _wire
from pgauthproxy._tls import Channel
from pgauthproxy.errors import ClientFault, GatewayFault, TargetFault, TlsError, TlsRefused
from pgauthproxy.gateway.client_leg import ClientLeg, ClientPolicy
from pgauthproxy.gateway.leg import MAX_PENDING, Leg
from pgauthproxy.gateway.target_leg import TargetLeg
from pgauthproxy.net.tls import CertificateFiles, ClientSide, TargetContexts
from pgauthproxy.proto import messages
from pgauthproxy.proto.startup import StartupMessage
from pgauthproxy.proto.steps import Login, StartTls, TlsPlan, TlsSide
from pgauthproxy.proto.target_login import target_login
from pgauthproxy.stages import Address, Encryption, TargetTls
from tests.channels import NAME, Renegotiating, authority, client_context, server_context
from tests.conftest import resident_bytes
from tests.gateway.legs import (
    BUFFER,
    CLIENT_MEANS,
    GRANTED,
    PASSWORD,
    POLICY,
    QUERY,
    SECONDS,
    STARTED,
    STARTUP,
    STATUS,
    TARGET_MEANS,
    TARGET_SENDS,
    ConnectLeg,
    Side,
    Watcher,
    both_ends,
    one_message,
    terms,
    until,
    until_it_waits,
)
from tests.sans_io import TLS, encrypted


@pytest.fixture
def towards_clients(tmp_path: Path) -> ClientSide:
    """TLS as clients meet it, on a certificate of NAME's."""
    issued = authority().issue_cert(NAME)
    cert, key = tmp_path / "server.crt", tmp_path / "server.key"
    issued.cert_chain_pems[0].write_to_path(str(cert))
    issued.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    files = CertificateFiles(str(cert), str(key))
    return ClientSide(files, {}, "", "none", "1.2", "ECDHE+AESGCM")


async def towards_target(folder: Path, **wishes: str) -> TlsPlan:
    """TLS as targets meet it; it wants to see NAME's certificate."""
    ca = folder / "ca.crt"
    authority().cert_pem.write_to_path(str(ca))
    asked = {"mode": "verify-full", "ca": str(ca), "name": NAME} | wishes
    plan = await TargetContexts(TargetTls()).plan(tuple(asked.items()), Address("127.0.0.1", 5432))
    assert plan is not None
    return plan


class InTls:
    """The peer of a leg, speaking TLS with it: what it is sent is read in order, and answered in pieces."""

    def __init__(self, side: Side, channel: Channel, size: int) -> None:
        self.side = side
        self.channel = channel
        self._size = size
        self._read = 0
        self.heard = b""

    @property
    def _news(self) -> bytes:
        news = self.side.transport.written[self._read :]
        self._read += len(news)
        return news

    async def until_written(self) -> bytes:
        """What the leg has written since, once it has."""
        await until(lambda: len(self.side.transport.written) > self._read, "the leg to say something")
        return self._news

    def sends(self, wire: bytes) -> None:
        for at in range(0, len(wire), self._size):
            self.side.receive(wire[at : at + self._size])

    def says(self, data: bytes) -> None:
        self.sends(self.channel.encrypt(data))

    async def shake_hands(self, hello: bytes, behind: bytes = b"") -> None:
        """Beginning with what this side says first; `behind` is said with the last of it."""
        answer = hello
        while not self.channel.established:
            if answer:
                self.sends(answer)
            answer = self.channel.handshake(await self.until_written())
        self.sends(answer + (self.channel.encrypt(behind) if behind else b""))

    def listens(self) -> bytes:
        self.heard += self.channel.decrypt(self._news)
        return self.heard


def client_of(side: Side, size: int = BUFFER) -> InTls:
    """The client of a leg."""
    return InTls(side, Channel(client_context(), server_side=False, server_hostname=NAME), size)


def target_of(side: Side, size: int = BUFFER) -> InTls:
    """The target of a leg."""
    return InTls(side, Channel(server_context(), server_side=True), size)


async def log_in_over_tls(leg: Leg, tls: TlsSide) -> tuple[Any, Any]:
    assert isinstance(leg, ClientLeg)
    wanted = await leg.receive_startup(POLICY, tls, local=False)
    return wanted, await leg.receive_password(STARTED, POLICY)


@pytest.mark.parametrize("size", [1, 7, 100, BUFFER])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("behind", [b"", STARTUP, STARTUP + PASSWORD], ids=["nothing", "startup", "password"])
def test_a_client_logs_in_over_tls_however_its_bytes_are_cut(
    connect_leg: ConnectLeg, towards_clients: ClientSide, size: int, behind: bytes, *, direct: bool
) -> None:
    async def scenario() -> None:
        side = connect_leg()
        client = client_of(side, size)
        login = asyncio.create_task(log_in_over_tls(side.leg, towards_clients))
        if not direct:
            client.sends(messages.ssl_request())
            assert await client.until_written() == b"S"
        await client.shake_hands(client.channel.handshake(b""), behind)
        client.says((STARTUP + PASSWORD + QUERY)[len(behind) :])
        async with asyncio.timeout(SECONDS):
            wanted, proof = await login
        encryption = wanted.encryption
        assert (wanted, proof) == (StartupMessage(STARTED.parameters, 0, encryption), CLIENT_MEANS[1])
        assert (encryption.version, encryption.application_protocol) == ("TLSv1.3", "postgresql")
        assert encryption.server_name == NAME
        assert len(encryption.binding) == 32
        assert client.listens() == messages.authentication(messages.AUTH_CLEARTEXT_PASSWORD)
        assert side.leg.hand_over() == (side.transport, QUERY, False)
        assert side.leg.tls is not None
        assert side.leg.tls.established

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [1, 7, 100, BUFFER])
@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
def test_a_target_is_logged_in_to_over_tls_however_its_bytes_are_cut(
    connect_leg: ConnectLeg, tmp_path: Path, size: int, negotiation: str
) -> None:
    async def scenario() -> None:
        plan = await towards_target(tmp_path, negotiation=negotiation)
        side = connect_leg(TargetLeg)
        target = target_of(side, size)
        login = asyncio.create_task(side.leg.drive(target_login(side.leg.framer, GRANTED, terms(plan))))
        if negotiation == "postgres":
            assert await target.until_written() == messages.ssl_request()
            target.sends(b"S")
        await target.shake_hands(b"", TARGET_SENDS[:20])
        target.says(TARGET_SENDS[20:] + QUERY)
        async with asyncio.timeout(SECONDS):
            welcome = await login
        assert welcome.greeting == TARGET_MEANS.greeting
        assert welcome.encryption is not None
        assert welcome.encryption.certificate is not None
        assert welcome.encryption.version == "TLSv1.3"
        assert welcome.encryption.certificate.subject.startswith("OU=Testing cert")
        assert len(welcome.encryption.binding) == 32
        assert target.listens() == STARTUP
        assert side.leg.hand_over() == (side.transport, QUERY, False)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("garbage", "alert"), [(b"\x16\x03\x01\x00\x04abcd", b"\x15"), (b"\x16GET / HTTP/1.1\r\n\r\n", b"")]
)
@pytest.mark.parametrize("asks", [False, True])
def test_garbage_instead_of_a_clients_handshake_is_a_fault_of_its_own(
    connect_leg: ConnectLeg, towards_clients: ClientSide, garbage: bytes, alert: bytes, *, asks: bool
) -> None:
    async def scenario() -> None:
        side = connect_leg()
        login = asyncio.create_task(log_in_over_tls(side.leg, towards_clients))
        if asks:
            side.receive(messages.ssl_request())
            await until(lambda: side.transport.written == b"S", "the answer")
        side.receive(garbage)
        with pytest.raises(ClientFault, match=r"^TLS with the client failed: [A-Z_]+$") as raised:
            await asyncio.wait_for(login, SECONDS)
        assert (raised.value.sqlstate, raised.value.told) == ("08P01", None)
        # OpenSSL's alert, in plain: no keys are agreed on. To what is no TLS at all it says nothing.
        assert side.transport.written[asks:][:1] == alert

    asyncio.run(scenario())


@pytest.mark.parametrize("garbage", [messages.fatal("28000", b"no"), STATUS * 3, bytes(100)])
def test_garbage_instead_of_a_targets_handshake_is_no_tls(
    connect_leg: ConnectLeg, tmp_path: Path, garbage: bytes
) -> None:
    async def scenario() -> None:
        plan = await towards_target(tmp_path)
        side = connect_leg(TargetLeg)
        login = asyncio.create_task(side.leg.drive(target_login(side.leg.framer, GRANTED, terms(plan))))
        await until(lambda: side.transport.written, "the request")
        side.receive(b"S")
        await until(lambda: len(side.transport.written) > 8, "the hello")
        side.receive(garbage)
        with pytest.raises(TlsRefused, match=r"TLS with the target failed: [A-Z_]+$"):
            await asyncio.wait_for(login, SECONDS)

    asyncio.run(scenario())


def test_a_target_that_is_another_is_no_target(connect_leg: ConnectLeg, tmp_path: Path) -> None:
    async def scenario() -> None:
        plan = await towards_target(tmp_path, name="other.example.com")
        side = connect_leg(TargetLeg)
        target = target_of(side)
        login = asyncio.create_task(side.leg.drive(target_login(side.leg.framer, GRANTED, terms(plan))))
        assert await target.until_written() == messages.ssl_request()
        target.sends(b"S")
        target.sends(target.channel.handshake(await target.until_written()))
        with pytest.raises(TlsRefused, match="CERTIFICATE_VERIFY_FAILED: Hostname mismatch"):
            await asyncio.wait_for(login, SECONDS)
        alert = await target.until_written()
        with pytest.raises(TlsError, match="ALERT"):
            target.channel.handshake(alert)
        assert side.leg.tls is None

    asyncio.run(scenario())


def test_a_target_whose_name_tls_cannot_ask_for_is_no_target(connect_leg: ConnectLeg, tmp_path: Path) -> None:
    async def scenario() -> None:
        plan = await towards_target(tmp_path, name=".example.com")
        side = connect_leg(TargetLeg)
        login = asyncio.create_task(side.leg.drive(target_login(side.leg.framer, GRANTED, terms(plan))))
        await until(lambda: side.transport.written, "the request")
        side.receive(b"S")
        with pytest.raises(TlsRefused, match="the target's name is none that TLS can ask for"):
            await asyncio.wait_for(login, SECONDS)

    asyncio.run(scenario())


@both_ends
@pytest.mark.parametrize("part", [1, 50])
def test_a_client_that_goes_in_the_middle_of_a_handshake_is_gone(
    connect_leg: ConnectLeg, towards_clients: ClientSide, end: Callable[[Leg], object], part: int
) -> None:
    async def scenario() -> None:
        side = connect_leg()
        client = client_of(side)
        login = asyncio.create_task(log_in_over_tls(side.leg, towards_clients))
        client.sends(client.channel.handshake(b"")[:part])
        await until_it_waits()
        end(side.leg)
        with pytest.raises(ClientFault, match="client left during its login"):
            await asyncio.wait_for(login, SECONDS)

    asyncio.run(scenario())


@both_ends
@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
def test_a_target_that_goes_in_the_middle_of_a_handshake_speaks_no_tls(
    connect_leg: ConnectLeg, tmp_path: Path, end: Callable[[Leg], object], negotiation: str
) -> None:
    async def scenario() -> None:
        plan = await towards_target(tmp_path, negotiation=negotiation)
        side = connect_leg(TargetLeg)
        login = asyncio.create_task(side.leg.drive(target_login(side.leg.framer, GRANTED, terms(plan))))
        await until(lambda: side.transport.written, "the target to be asked")
        if negotiation == "postgres":
            side.receive(b"S")
            await until(lambda: len(side.transport.written) > 8, "the hello")
        end(side.leg)
        with pytest.raises(TlsRefused, match="target closed the connection during the TLS handshake: end of file"):
            await asyncio.wait_for(login, SECONDS)

    asyncio.run(scenario())


@both_ends
def test_a_target_that_goes_behind_the_handshake_is_gone(
    connect_leg: ConnectLeg, tmp_path: Path, end: Callable[[Leg], object]
) -> None:
    async def scenario() -> None:
        plan = await towards_target(tmp_path, negotiation="direct")
        side = connect_leg(TargetLeg)
        target = target_of(side)
        login = asyncio.create_task(side.leg.drive(target_login(side.leg.framer, GRANTED, terms(plan))))
        await target.shake_hands(b"")
        await until(lambda: target.listens() == STARTUP, "the startup packet")
        end(side.leg)
        with pytest.raises(TargetFault, match="target closed the connection during the login: end of file") as raised:
            await asyncio.wait_for(login, SECONDS)
        assert raised.value.sqlstate == "08006"
        assert not isinstance(raised.value, TlsRefused)

    asyncio.run(scenario())


def test_a_handshake_can_be_cancelled(connect_leg: ConnectLeg, towards_clients: ClientSide) -> None:
    async def scenario() -> None:
        side = connect_leg()
        client = client_of(side)
        login = asyncio.create_task(log_in_over_tls(side.leg, towards_clients))
        client.sends(client.channel.handshake(b"")[:100])
        await until_it_waits()
        login.cancel()
        with pytest.raises(asyncio.CancelledError):
            await login
        side.leg.close()
        # Nobody has agreed on anything: there is no goodbye.
        assert side.transport.written == b""
        assert side.transport.calls[-1] == "close"

    asyncio.run(scenario())


async def in_tls(side: Side, tls: TlsSide) -> InTls:
    """The client of a leg that has shaken hands with it, and no more."""

    def handshake(framer: _wire.Framer) -> Login[Encryption]:
        agreed: Encryption = yield StartTls(tls)
        return agreed

    client = client_of(side)
    login = asyncio.create_task(side.leg.drive(handshake(side.leg.framer)))
    await client.shake_hands(client.channel.handshake(b""))
    await asyncio.wait_for(login, SECONDS)
    return client


def test_a_leg_that_speaks_tls_ends_with_a_goodbye(connect_leg: ConnectLeg, towards_clients: ClientSide) -> None:
    async def scenario() -> None:
        side = connect_leg()
        client = await in_tls(side, towards_clients)
        leg = side.leg
        assert isinstance(leg, ClientLeg)
        leg.refuse(GatewayFault("53300", "sorry"))
        assert client.listens() == messages.fatal("53300", b"sorry")
        assert client.channel.finished
        assert side.transport.calls[-1] == "close"

    asyncio.run(scenario())


def test_a_goodbye_is_an_end_of_file(connect_leg: ConnectLeg, towards_clients: ClientSide) -> None:
    async def scenario() -> None:
        side, watcher = connect_leg(), Watcher()
        client = await in_tls(side, towards_clients)
        side.leg.watch(watcher)
        client.sends(client.channel.encrypt(QUERY) + client.channel.say_goodbye())
        assert side.leg.at_eof
        # Its last words wait to be read.
        assert not side.leg.gone
        assert watcher.calls == 0
        assert side.leg.hand_over() == (side.transport, QUERY, True)

    asyncio.run(scenario())


def test_a_goodbye_without_last_words_is_the_end(connect_leg: ConnectLeg, towards_clients: ClientSide) -> None:
    async def scenario() -> None:
        side, watcher = connect_leg(), Watcher()
        client = await in_tls(side, towards_clients)
        side.leg.watch(watcher)
        client.sends(client.channel.say_goodbye())
        assert side.leg.gone
        assert watcher.calls == 1

    asyncio.run(scenario())


def test_what_comes_behind_a_goodbye_takes_no_memory(connect_leg: ConnectLeg, towards_clients: ClientSide) -> None:
    async def scenario() -> None:
        side = connect_leg()
        client = await in_tls(side, towards_clients)
        client.sends(client.channel.encrypt(QUERY) + client.channel.say_goodbye())
        flood = bytes(1 << 20)
        before = resident_bytes()
        for _ in range(60):
            client.sends(flood)
        assert resident_bytes() - before < 16 << 20
        assert side.leg.hand_over() == (side.transport, QUERY, True)

    asyncio.run(scenario())


@pytest.mark.parametrize("waiting", [False, True])
def test_a_broken_record_ends_a_login_at_once(
    connect_leg: ConnectLeg, towards_clients: ClientSide, *, waiting: bool
) -> None:
    async def scenario() -> None:
        side = connect_leg()
        client = await in_tls(side, towards_clients)
        leg = side.leg
        assert isinstance(leg, ClientLeg)
        login = asyncio.create_task(leg.drive(one_message(leg.framer))) if waiting else None
        await until_it_waits()
        client.sends(b"\x17\x03\x03\x00\x20" + bytes(32))
        assert side.transport.calls[-1] == "abort"
        with pytest.raises(TlsError, match="ALERT_BAD_RECORD_MAC"):
            client.listens()
        # Whatever happens before the transport says that it is lost.
        assert leg.gone
        with pytest.raises(ClientFault, match="client left during its login: DECRYPTION_FAILED_OR_BAD_RECORD_MAC"):
            leg.hand_over()
        written = side.transport.written
        leg.refuse(GatewayFault("53300", "sorry"))
        assert side.transport.written == written
        leg.connection_lost(None)
        if login is not None:
            with pytest.raises(ClientFault, match="BAD_RECORD_MAC"):
                await asyncio.wait_for(login, SECONDS)

    asyncio.run(scenario())


def test_a_client_that_makes_tls_talk_and_does_not_listen_is_dropped(connect_leg: ConnectLeg, tmp_path: Path) -> None:
    asking = Renegotiating(tmp_path)

    class Shaken:
        """A side whose handshake was done elsewhere."""

        def open(self) -> Channel:
            return asking.server

        def describe(self, channel: Channel) -> Encryption:
            return encrypted()

        def remember(self, channel: Channel) -> None:
            raise AssertionError("only targets are remembered")

    def handshake(framer: _wire.Framer) -> Login[None]:
        yield StartTls(Shaken())

    async def scenario() -> None:
        side = connect_leg()
        await side.leg.drive(handshake(side.leg.framer))
        side.receive(asking.asks())
        assert side.transport.written[0] == 0x15
        for _ in range(1000):
            side.receive(b"".join(asking.asks() for _ in range(100)))
            if side.transport.closing:
                break
        assert side.transport.calls[-1] == "abort"
        assert len(side.transport.written) < 2 * MAX_PENDING
        assert "the peer makes TLS talk and does not listen" in side.leg.gone_fault().detail

    asyncio.run(scenario())


def test_a_local_client_is_neither_offered_tls_nor_held_to_it(connect_leg: ConnectLeg) -> None:
    strict = ClientPolicy("md5", 10_000, 65_535, 1024, tls_required=True)

    async def scenario() -> None:
        side = connect_leg()
        assert isinstance(side.leg, ClientLeg)
        side.receive(STARTUP)
        wanted = await side.leg.receive_startup(strict, TLS, local=True)
        assert wanted == StartupMessage(STARTED.parameters, 0, None)
        other = connect_leg()
        assert isinstance(other.leg, ClientLeg)
        other.receive(STARTUP)
        with pytest.raises(ClientFault, match="connection requires TLS"):
            await other.leg.receive_startup(strict, TLS, local=False)

    asyncio.run(scenario())
