"""A session that comes from another process and has lost one of its connections on the way."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest
import uvloop

from pgauthproxy.auth.admins import AdminsAuthenticator
from pgauthproxy.build import build_gateway, build_ledger
from pgauthproxy.config.schema import Settings
from pgauthproxy.events import CloseReason, Ended, Event, Noticed
from pgauthproxy.gateway.moving import HandedOver, Identity
from pgauthproxy.gateway.session import Session
from pgauthproxy.link import LeaseOver, Link, Said, TakeSession
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Address
from pgauthproxy.upgrade import Relatives
from tests.wire import RESET_ON_CLOSE, SECONDS

NOBODY_ASKS = AdminsAuthenticator({}, Secret(b""))
IDENTITY = Identity(b"alice", "127.0.0.1:1", b"postgres", b"", "", b"postgres", b"postgres")
HANDED_OVER = HandedOver(
    number=7,
    identity=msgspec.msgpack.encode(IDENTITY),
    began=0.0,
    cancel_key=b"12345678",
    target_key=b"",
    reached=Address("127.0.0.1", 1),
    client=(10, bytes(6), b""),
    target=(20, bytes(6), b"unsent"),
)


def connected() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection: that of the gateway, and the peer's."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        peer = socket.create_connection(listening.getsockname(), SECONDS)
        own, _ = listening.accept()
    own.setblocking(False)
    return own, peer


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("client", CloseReason.CLIENT_LOST),
        ("target", CloseReason.TARGET_LOST),
        ("both", None),
    ],
)
def test_it_ends_as_any_other_does(lost: str, reason: CloseReason | None) -> None:
    events: list[Event] = []
    settings = Settings()
    gateway = build_gateway(settings, NOBODY_ASKS, events.append, build_ledger(settings))
    client, client_peer = connected()
    target, target_peer = connected()
    for side, peer in (("client", client_peer), ("target", target_peer)):
        if lost in (side, "both"):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            peer.close()

    async def take_up() -> None:
        over = asyncio.Event()
        gateway.idle = over.set
        await Session.take_up(gateway, HANDED_OVER, client, target, None)
        await asyncio.wait_for(over.wait(), SECONDS)

    with client_peer, target_peer:
        uvloop.run(take_up())
        for side, peer in (("client", client_peer), ("target", target_peer)):
            if lost not in (side, "both"):
                while peer.recv(100):
                    assert side == "target"
    (ended,) = [event for event in events if isinstance(event, Ended)]
    assert (ended.session, ended.bytes_from_client, ended.bytes_from_target) == ("7", 10, 20)
    assert reason is None or ended.reason == reason
    assert gateway.limits.clients == 0
    assert gateway.keys.find(HANDED_OVER.cancel_key) is None


def test_one_that_comes_without_its_connections_is_told_of_and_leaves_no_descriptor() -> None:
    events: list[Event] = []
    settings = Settings()
    gateway = build_gateway(settings, NOBODY_ASKS, events.append, build_ledger(settings))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    leased = msgspec.structs.replace(HANDED_OVER, is_leased=True)
    inside, outside = socket.socketpair()

    async def attend() -> tuple[Said, list[int]] | None:
        old = Link(ours)
        attending = asyncio.create_task(Relatives(gateway).attend(Link(theirs)))
        # As the kernel does it where the limit on descriptors lets only one through.
        assert await old.send(TakeSession(leased), [inside.fileno()])
        inside.close()
        said = await asyncio.wait_for(old.receive(), SECONDS)
        old.close()
        await asyncio.wait_for(attending, SECONDS)
        return said

    with outside:
        assert uvloop.run(attend()) == (LeaseOver(7), [])
        outside.settimeout(SECONDS)
        assert outside.recv(1) == b""
    assert [event.what for event in events if isinstance(event, Noticed)] == ["session lost on its way here"]
    assert not gateway.sessions
