"""Legs whose transports are driven by hand, and what is said to them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from pgauthproxy import _wire
from pgauthproxy._relay import ForwardBuffer
from pgauthproxy.gateway.client_leg import ClientPolicy
from pgauthproxy.gateway.leg import Leg
from pgauthproxy.proto import messages
from pgauthproxy.proto.client_login import Proof
from pgauthproxy.proto.startup import StartupMessage
from pgauthproxy.proto.steps import Login, TlsPlan, next_message
from pgauthproxy.proto.target_login import TargetLimits, TargetTerms, Welcome
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Granted, Greeting, Mapping, Started
from tests.gateway.transports import RecordingTransport

BUFFER, SECONDS = 4096, 20
QUERY = b"Q\0\0\0\x0dselect 1\0"
PASSWORD = _wire.message(messages.PASSWORD_MESSAGE, b"secret\0")
POLICY = ClientPolicy(
    method="cleartext",
    max_startup_packet=10_000,
    max_password_message=65_535,
    max_sasl_message=1024,
    tls_required=False,
)
STARTED = Started(Accepted("1", "192.0.2.1:1"), ((b"user", b"alice"),))
STATUS = _wire.message(messages.PARAMETER_STATUS, b"TimeZone\0UTC\0")
READY = _wire.message(messages.READY_FOR_QUERY, b"I")
STARTUP = messages.startup_message(messages.PROTOCOL_3_0, STARTED.parameters)
CLIENT_SENDS = STARTUP + PASSWORD
CLIENT_MEANS = (StartupMessage(STARTED.parameters, 0, None), Proof("cleartext", Secret(b"secret"), bytes(4)))
TARGET_SENDS = messages.authentication(messages.AUTH_OK) + STATUS + READY
TARGET_MEANS = Welcome(Greeting(b"", b"", STATUS + READY), None)
GRANTED = Granted(STARTED, Mapping((Address("db", 5432),), STARTED.parameters, None), None, 0.0)


def terms(plan: TlsPlan | None) -> TargetTerms:
    limits = TargetLimits(auth_request=2000, error=30_000, message=65_536, scram_iterations=1)
    return TargetTerms(messages.PROTOCOL_3_0, plan, local=True, pass_error_text=False, limits=limits)


class Side:
    """A leg whose transport is driven by hand; `socket` is its own, `peer` whom that is connected to."""

    def __init__(self, kind: type[Leg]) -> None:
        self.socket, self.peer = socket.socketpair()
        for each in (self.socket, self.peer):
            each.setblocking(False)
        self.leg = kind(self.socket, ForwardBuffer(BUFFER))
        self.transport = RecordingTransport()

    def receive(self, data: bytes) -> None:
        """As an event loop does: reads into the leg's buffer, and says how much came."""
        for at in range(0, len(data), BUFFER):
            part = data[at : at + BUFFER]
            self.leg.get_buffer(-1)[: len(part)] = part
            self.leg.buffer_updated(len(part))
            # The buffer is shared: another session's bytes come into it.
            self.leg.get_buffer(-1)[:] = b"\xee" * BUFFER


ConnectLeg = Callable[..., Side]


async def until_it_waits() -> None:
    """Lets everything run that can run without anything more from outside."""
    for _ in range(5):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object], what: str) -> None:
    """Returns once it holds; something may have to be done in a thread until then."""
    for _ in range(SECONDS * 1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"waited for {what}")


def one_message(framer: _wire.Framer) -> Login[bytes]:
    """A login of one message, answered."""
    framer.allow({messages.PASSWORD_MESSAGE: 1000})
    yield b"question"
    _, body = yield from next_message(framer)
    yield b"thanks"
    return body


class Watcher:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


both_ends = pytest.mark.parametrize(
    "end", [lambda leg: leg.eof_received(), lambda leg: leg.connection_lost(None)], ids=["end of file", "lost"]
)
