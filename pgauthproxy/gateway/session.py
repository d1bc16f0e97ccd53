"""A session from accept to close, in the order of its nine steps.

`Session.log_in` is steps 1 to 7, top to bottom, under one deadline. Step 8 is `_attach` and the two compiled ends: no
coroutine and no task lives on. Step 9 is `_close`, the one door out of a session, and `_refuse`, that of a login.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from pgauthproxy import _relay
from pgauthproxy.errors import (
    ADMIN_SHUTDOWN,
    CANNOT_CONNECT_NOW,
    INTERNAL_ERROR,
    INVALID_AUTHORIZATION,
    Fault,
    GatewayFault,
)
from pgauthproxy.events import Cancelled, CloseReason, Ended, LoggedIn, Refused, Sink
from pgauthproxy.gateway import cancel
from pgauthproxy.gateway.admission import Admission
from pgauthproxy.gateway.cancel import CancelKeys
from pgauthproxy.gateway.client_leg import ClientLeg
from pgauthproxy.gateway.leg import Leg
from pgauthproxy.gateway.limits import Limits
from pgauthproxy.gateway.paused import PausedClients
from pgauthproxy.gateway.target_leg import TargetLeg, Targets
from pgauthproxy.proto import client_login, messages
from pgauthproxy.proto.startup import CancelRequest
from pgauthproxy.proto.steps import TlsPlan, TlsSide
from pgauthproxy.stages import Accepted, Address, Attached, Started


@dataclass(slots=True)
class Gateway:
    """What all sessions of a process share. Times in seconds."""

    admission: Admission
    client_tls: TlsSide | None
    targets: Targets
    limits: Limits
    login_timeout: float
    cancel_timeout: float
    close_timeout: float
    sink: Sink
    paused: PausedClients
    keys: CancelKeys = field(default_factory=CancelKeys)
    sessions: "set[Session]" = field(default_factory=set)
    draining: bool = False
    ask_elsewhere: Callable[[bytes], Awaitable[tuple[str, str]]] | None = None
    """Passes a cancel request on to a process that may have the key; returns the session's id and the outcome."""
    idle: Callable[[], None] | None = None
    """Called whenever the last session is over."""

    async def cancel(self, key: bytes) -> tuple[str, str]:
        """Passes a cancel request on, if the key is one of ours; returns the session's id and the outcome."""
        session = self.keys.find(key)
        if session is None:
            return "", cancel.NOBODYS
        return session.id, await cancel.forward(session, self.cancel_timeout, self.targets)


NOWHERE: Final = Address("", 0)


def shutting_down() -> GatewayFault:
    """57P03, for whoever is not in yet."""
    return GatewayFault(CANNOT_CONNECT_NOW, "the gateway is shutting down")


class HandedOver(msgspec.Struct, frozen=True):
    """A session on its way to another process. `client` and `target`: bytes received, and the last of them."""

    number: int
    began: float
    seconds_left: float | None
    cancel_key: bytes
    target_key: bytes
    reached: Address
    client: tuple[int, bytes]
    target: tuple[int, bytes]


class Session:
    """One client and its target. States, in order: logging in, relaying, closing (`_reason` is set), over."""

    __slots__ = (
        "_began",
        "_cause",
        "_client",
        "_client_end",
        "_detail",
        "_ends_lost",
        "_gateway",
        "_is_client",
        "_number",
        "_reason",
        "_started",
        "_target_end",
        "_task",
        "_timer",
        "cancel_key",
        "cancelling",
        "reached",
        "reached_tls",
        "target_key",
    )

    def __init__(self, gateway: Gateway, number: int, *, is_taken_up: bool = False) -> None:
        """`number` is unique in the gateway's life. Raises GatewayFault if there is no place for another login.

        `is_taken_up`: another process has let it in.
        """
        if not is_taken_up:
            gateway.limits.begin_login(number, self.refuse_login)
        gateway.sessions.add(self)
        self._gateway = gateway
        self._number = number
        self._began = time.monotonic()
        self._client: ClientLeg | None = None
        self._client_end: _relay.End | None = None
        self._target_end: _relay.End | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._started: Started | None = None
        self._cause: Fault | None = None
        self._reason: CloseReason | None = None
        self._detail = ""
        self._ends_lost = 0
        self._is_client = False
        self.cancel_key = b""
        self.cancelling = False
        self.target_key = b""
        self.reached: Address = NOWHERE
        self.reached_tls: TlsPlan | None = None

    @property
    def id(self) -> str:
        """As in the logs, and as the authenticator gets it."""
        return f"{self._number:x}"

    @property
    def login(self) -> "asyncio.Task[None] | None":
        """The login in progress, None once it is done."""
        return self._task

    def begin(self, connection: socket.socket, address: str) -> None:
        """Takes over an accepted, non-blocking socket."""
        loop = asyncio.get_running_loop()
        deadline = GatewayFault(
            INVALID_AUTHORIZATION, "canceling authentication due to timeout", "login_timeout: the login took too long"
        )
        self._timer = loop.call_later(self._gateway.login_timeout, self.refuse_login, deadline)
        self._task = loop.create_task(self._run(connection, Accepted(self.id, address)))

    def refuse_login(self, fault: Fault) -> None:
        """Ends a login from outside; a session that has logged in is left alone."""
        if self._task is not None and self._cause is None:
            self._cause = fault
            # Not at once: a task that is cancelled before its first step never gets to clean up.
            asyncio.get_running_loop().call_soon(self._task.cancel)

    def end(self, reason: CloseReason, told: bytes) -> None:
        """Ends a session that has logged in; its client is told with 57P01, unless it is in the middle of a message."""
        if self._client_end is None or self._target_end is None or self._reason is not None:
            return
        if self._target_end.at_message_boundary:
            self._client_end.send(messages.fatal(ADMIN_SHUTDOWN, told))
        self._close(reason)

    async def _run(self, connection: socket.socket, accepted: Accepted) -> None:
        """The login, and what becomes of it."""
        relaying = False
        try:
            relaying = await self.log_in(connection, accepted)
        except Fault as fault:
            self._refuse(accepted, fault)
        except asyncio.CancelledError:
            self._refuse(accepted, self._cause or shutting_down())
        except Exception as error:  # a bug of ours costs one login and is told to its client and the log
            what = f"internal error: {type(error).__name__}"
            self._refuse(accepted, GatewayFault(INTERNAL_ERROR, "internal error of the gateway", what))
            raise
        finally:
            self._task = None
            self._gateway.limits.end_login(self._number)
            if not relaying:
                self._over()

    async def log_in(self, connection: socket.socket, accepted: Accepted) -> bool:
        """Steps 1 to 7. True if the session relays now, False if it was a cancel request. Raises Fault."""
        gateway = self._gateway
        client = self._client = ClientLeg(connection, gateway.targets.buffer)

        local = connection.family == socket.AF_UNIX
        wanted = await client.receive_startup(gateway.admission.policy, gateway.client_tls, local=local)
        gateway.limits.named(self._number)
        if isinstance(wanted, CancelRequest):
            await self._cancel(client, wanted, accepted)
            return False
        started = self._started = Started(accepted, wanted.parameters, wanted.encryption)
        gateway.limits.begin_client()
        self._is_client = True

        granted = await gateway.admission.admit(started, client, self._client_left)
        attached, target = await gateway.targets.attach(granted)
        try:
            self._attach(client, target, attached, wanted.minor)
        except BaseException:
            target.abort()
            raise
        gateway.sink(LoggedIn(attached, time.monotonic() - self._began))
        return True

    def _client_left(self) -> None:
        assert self._client is not None  # noqa: S101 (its watcher calls this)
        self.refuse_login(self._client.gone_fault())

    async def _cancel(self, client: ClientLeg, request: CancelRequest, accepted: Accepted) -> None:
        """A cancel request is a connection of its own: it is answered by being closed."""
        gateway = self._gateway
        try:
            found, outcome = await gateway.cancel(request.key)
            if not found and gateway.ask_elsewhere is not None:
                found, outcome = await gateway.ask_elsewhere(request.key)
        finally:
            client.close()
        gateway.sink(Cancelled(accepted.address, found, outcome))

    def _attach(self, client: ClientLeg, target: TargetLeg, attached: Attached, minor: int) -> None:
        """Steps 7 and 8: lets the client in and sets the two ends back to back."""
        gateway = self._gateway
        client_transport, client_rest, client_at_eof = client.hand_over()
        target_transport, target_rest, target_at_eof = target.hand_over()
        self._cancel_timer()
        self.reached, self.reached_tls = attached.reached, target.plan
        self.target_key = attached.greeting.key
        buffer = gateway.targets.buffer
        self._client_end = _relay.End(self, client_transport, client.fd, False, buffer, client.tls)
        self._target_end = _relay.End(self, target_transport, target.fd, True, buffer, target.tls)
        self._client_end.send(client_login.welcome(attached, gateway.keys.issue(self, minor)))
        _relay.join(self._client_end, self._target_end)
        self._target_end.start(target_rest, target_at_eof)
        self._client_end.start(client_rest, client_at_eof)
        seconds = attached.granted.mapping.session_seconds
        if seconds is not None:
            self._limit_time(seconds)
        # What belongs to the login alone is not kept for the session's life.
        self._client = None
        self._started = None

    def hand_over(self) -> "tuple[HandedOver, _relay.End, _relay.End] | None":
        """Ends the session here, so that another process may go on with it: what that must know, and the two ends.

        Their connections are to be dropped here once the other process has them. None, and nothing has happened, for a
        session that cannot be handed over: one that speaks TLS, or that has bytes which are on their way.
        """
        client, target = self._client_end, self._target_end
        if client is None or target is None or self._reason is not None or self.cancelling:
            return None
        if not (client.is_at_rest and target.is_at_rest):
            return None
        client.leave()
        target.leave()
        handed = HandedOver(
            number=self._number,
            began=self._began,
            seconds_left=self._timer.when() - asyncio.get_running_loop().time() if self._timer is not None else None,
            cancel_key=self.cancel_key,
            target_key=self.target_key,
            reached=self.reached,
            client=(client.received, client.tail),
            target=(target.received, target.tail),
        )
        self._reason = CloseReason.HANDED_OVER
        self._gateway.keys.forget(self.cancel_key)
        self._client_end = self._target_end = None
        self._over()
        return handed, client, target

    @classmethod
    async def take_up(
        cls, gateway: Gateway, handed: "HandedOver", client: socket.socket, target: socket.socket
    ) -> None:
        """Goes on with a session of another process."""
        self = cls(gateway, handed.number, is_taken_up=True)
        gateway.limits.take_up_client()
        self._is_client = True
        self._began = handed.began
        self.cancel_key, self.target_key, self.reached = handed.cancel_key, handed.target_key, handed.reached
        gateway.keys.take_up(self)
        buffer = gateway.targets.buffer
        legs = Leg(client, buffer), Leg(target, buffer)
        try:
            client_transport, target_transport = await legs[0].open(), await legs[1].open()
        except OSError:
            # One of them is gone by now.
            for leg in legs:
                leg.abort()
            self._close(CloseReason.CLIENT_LOST)
            self._over()
            return
        self._client_end = _relay.End(self, client_transport, legs[0].fd, False, buffer)
        self._target_end = _relay.End(self, target_transport, legs[1].fd, True, buffer)
        self._client_end.take_up(*handed.client)
        self._target_end.take_up(*handed.target)
        (_, client_rest, client_at_eof), (_, target_rest, target_at_eof) = (leg.hand_over() for leg in legs)
        _relay.join(self._client_end, self._target_end)
        self._target_end.start(target_rest, target_at_eof)
        self._client_end.start(client_rest, client_at_eof)
        if handed.seconds_left is not None:
            self._limit_time(handed.seconds_left)

    def _limit_time(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(
            seconds, self.end, CloseReason.TIME_LIMIT, b"terminating connection: its time limit is reached"
        )

    def target_finished(self) -> None:
        """The target has said its last word: an `End` reports it."""
        assert self._client_end is not None  # noqa: S101 (ends report while they are joined)
        self._close(CloseReason.CLIENT_CLOSED if self._client_end.has_finished else CloseReason.TARGET_CLOSED)

    def end_lost(self, end: _relay.End, error: Exception | None) -> None:
        """A connection is gone for good: an `End` reports it."""
        if self._client_end is not None and self._client_end.has_finished:
            # A target that was told good-bye may close with our own still on its way, which looks like a reset.
            reason, error = CloseReason.CLIENT_CLOSED, None
        elif end.faces_target:
            reason = CloseReason.TARGET_LOST if error else CloseReason.TARGET_CLOSED
        else:
            reason = CloseReason.CLIENT_LOST if error else CloseReason.CLIENT_CLOSED
        self._close(reason, str(error or ""))
        self._ends_lost += 1
        client_end, target_end = self._client_end, self._target_end
        if self._ends_lost < 2 or client_end is None or target_end is None or self._reason is None:
            return
        self._client_end = self._target_end = None
        detail = self._detail
        for side, each in (("client", client_end), ("target", target_end)):
            if each.truncated and not detail:
                detail = f"the {side} ended TLS without saying so: its last words may be missing"
        seconds = time.monotonic() - self._began
        self._gateway.sink(Ended(self.id, self._reason, detail, client_end.received, target_end.received, seconds))
        self._over()

    def _close(self, reason: CloseReason, detail: str = "") -> None:
        """Step 9: ends both sides, each once it has what it is owed. Only the first reason counts."""
        if self._reason is not None:
            return
        self._reason = reason
        self._detail = detail
        self._cancel_timer()
        self._gateway.keys.forget(self.cancel_key)
        holding = False
        for end in (self._client_end, self._target_end):
            if end is not None:
                holding = holding or end.holding
                end.close()
        if holding:
            self._timer = asyncio.get_running_loop().call_later(self._gateway.close_timeout, self._abort)

    def _abort(self) -> None:
        for end in (self._client_end, self._target_end):
            if end is not None:
                end.transport.abort()

    def _refuse(self, accepted: Accepted, fault: Fault) -> None:
        """Ends a login that failed: the client is told what it may know, the log the rest."""
        if self._client is not None:
            self._client.refuse(fault)
        self._gateway.sink(Refused(accepted, self._started, fault))

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _over(self) -> None:
        """Gives back everything that was taken."""
        self._cancel_timer()
        self._client = None
        self._cause = None
        gateway = self._gateway
        if self._is_client:
            gateway.limits.end_client()
        gateway.sessions.discard(self)
        if not gateway.sessions and gateway.idle is not None:
            gateway.idle()
