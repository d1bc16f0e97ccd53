"""A session from accept to close, in the order of its nine steps.

`Session.log_in` is steps 1 to 7, top to bottom, under one deadline. Step 8 is `_attach` and the two compiled ends: no
coroutine and no task lives on. Step 9 is `_close`, the one door out of a session, and `_refuse`, that of a login.
"""

import asyncio
import contextlib
import functools
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from pgauthproxy import _relay
from pgauthproxy._observe import Observer
from pgauthproxy.auth.networks import is_local
from pgauthproxy.errors import (
    ADMIN_SHUTDOWN,
    CANNOT_CONNECT_NOW,
    INTERNAL_ERROR,
    INVALID_AUTHORIZATION,
    Fault,
    GatewayFault,
)
from pgauthproxy.events import AdminLeft, AdminLoggedIn, Cancelled, CloseReason, Ended, LoggedIn, Refused, Sink
from pgauthproxy.gateway import cancel
from pgauthproxy.gateway.access import Access, Denials
from pgauthproxy.gateway.admission import Admission
from pgauthproxy.gateway.cancel import CancelKeys
from pgauthproxy.gateway.client_leg import ClientLeg
from pgauthproxy.gateway.console import NO_USER, Admin, Console, uid_of_peer
from pgauthproxy.gateway.leg import Leg, TakenUpLeg
from pgauthproxy.gateway.limits import Limits, Place
from pgauthproxy.gateway.moving import HandedOver, Identity, SendHandedOver
from pgauthproxy.gateway.paused import PausedClients
from pgauthproxy.gateway.rules import Breach, SessionRules, Watch
from pgauthproxy.gateway.target_leg import TargetLeg, Targets
from pgauthproxy.proto import client_login, messages
from pgauthproxy.proto.console import Statement, serve
from pgauthproxy.proto.startup import CancelRequest
from pgauthproxy.proto.steps import Perform, TlsPlan, TlsSide
from pgauthproxy.stages import Accepted, Address, Attached, Lease, Started, parameter


@dataclass(frozen=True, slots=True)
class Statements:
    """Who is told the SQL that clients send: `record(session, is_prepared, text, size)`, at most `max_bytes` of it."""

    record: Callable[[str, bool, bytes, int], object]
    max_bytes: int


@dataclass(slots=True)
class Gateway:
    """What all sessions of a process share. Times in seconds."""

    admission: Admission
    access: Access
    denials: Denials
    client_tls: TlsSide | None
    targets: Targets
    limits: Limits
    rules: SessionRules
    login_timeout: float
    cancel_timeout: float
    close_timeout: float
    sink: Sink
    paused: PausedClients
    check_logins: Callable[[], object] | None = None
    """Raises GatewayFault if nobody may log in at the moment."""
    statements: Statements | None = None
    keys: CancelKeys = field(default_factory=CancelKeys)
    sessions: "set[Session]" = field(default_factory=set)
    console: Console | None = None
    held: asyncio.Event | None = None
    """Where new logins wait, while they are paused; set once they may go on."""
    draining: bool = False
    ask_elsewhere: Callable[[bytes], Awaitable[tuple[str, str]]] | None = None
    """Passes a cancel request on to a process that may have the key; returns the session's id and the outcome."""
    releasing: set[asyncio.Task[None]] = field(default_factory=set)
    """What sessions give back, on its way."""
    idle: Callable[[], None] | None = None
    """Called whenever the last session is over."""

    async def cancel(self, key: bytes) -> tuple[str, str]:
        """Passes a cancel request on, if the key is one of ours; returns the session's id and the outcome."""
        session = self.keys.find(key)
        if session is None:
            return "", cancel.NOBODYS
        return session.id, await cancel.forward(session, self.cancel_timeout, self.targets)

    def give_back(self, lease: Lease) -> None:
        task = asyncio.get_running_loop().create_task(lease.release())
        self.releasing.add(task)
        task.add_done_callback(self.releasing.discard)


NOWHERE: Final = Address("", 0)
NOBODY: Final = Accepted("", "")
CONSOLE_KEY_BYTES: Final = 8


def shutting_down() -> GatewayFault:
    """57P03, for whoever is not in yet."""
    return GatewayFault(CANNOT_CONNECT_NOW, "the gateway is shutting down")


class Session:
    """One client and its target. States, in order: logging in, relaying, closing (`_reason` is set), over.

    Or, for a client that asks for the admin console: logging in, console (`_console` is set), over.
    """

    __slots__ = (
        "_accepted",
        "_began",
        "_cause",
        "_client",
        "_client_end",
        "_console",
        "_detail",
        "_ends_lost",
        "_gateway",
        "_identity",
        "_lease",
        "_left",
        "_place",
        "_reason",
        "_started",
        "_target_end",
        "_task",
        "_timer",
        "_watch",
        "cancel_key",
        "cancelling",
        "number",
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
        self.number = number
        self._accepted = NOBODY
        self._began = time.monotonic()
        self._client: ClientLeg | None = None
        self._client_end: _relay.End | None = None
        self._target_end: _relay.End | None = None
        self._task: asyncio.Task[None] | None = None
        self._console: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watch: Watch | None = None
        self._started: Started | None = None
        self._cause: Fault | None = None
        self._reason: CloseReason | None = None
        self._detail = ""
        self._ends_lost = 0
        self._place: Place | None = None
        self._identity = b""
        self._lease: Lease | None = None
        self._left: asyncio.Future[None] | None = None
        """Done once both ends have left, for another process to go on."""
        self.cancel_key = b""
        self.cancelling = False
        self.target_key = b""
        self.reached: Address = NOWHERE
        self.reached_tls: TlsPlan | None = None

    @property
    def id(self) -> str:
        """As in the logs, and as the authenticator gets it."""
        return f"{self.number:x}"

    @property
    def seconds(self) -> float:
        """Since it was accepted."""
        return time.monotonic() - self._began

    @property
    def state(self) -> str:
        """In a word."""
        if self._console is not None:
            return "console"
        if not self._identity:
            return "logging in"
        return "relaying" if self._reason is None else "closing"

    @property
    def address(self) -> str:
        """The client's."""
        identity = self.identity
        return self._accepted.address if identity is None else identity.address

    @property
    def has_target(self) -> bool:
        """Whether it has logged in, and to more than the console."""
        return bool(self._identity)

    @property
    def identity(self) -> Identity | None:
        """None until it has a target."""
        return msgspec.msgpack.decode(self._identity, type=Identity) if self._identity else None

    @property
    def started(self) -> Started | None:
        """What the client says of itself, while it logs in or has the console."""
        return self._started

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes that came from the client and from the target so far."""
        if self._client_end is None or self._target_end is None:
            return 0, 0
        return self._client_end.received, self._target_end.received

    @property
    def login(self) -> "asyncio.Task[None] | None":
        """The login in progress, None once it is done."""
        return self._task

    @property
    def has_lease(self) -> bool:
        """Whether it has a credential that is to be given back."""
        return self._lease is not None

    def begin(self, connection: socket.socket, address: str, *, proxied: bool) -> None:
        """Takes over an accepted, non-blocking socket. `proxied`: the PROXY protocol is spoken on it first."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._gateway.login_timeout, self._too_late)
        self._accepted = Accepted(self.id, address)
        self._task = loop.create_task(self._run(connection, proxied))

    def _too_late(self) -> None:
        told = "canceling authentication due to timeout"
        self.refuse_login(GatewayFault(INVALID_AUTHORIZATION, told, "login_timeout: the login took too long"))

    def refuse_login(self, fault: Fault) -> None:
        """Ends a login, or a console, from outside; a session that has a target is left alone."""
        if self._console is not None:
            told = "terminating connection due to administrator command"
            self._cause = GatewayFault(ADMIN_SHUTDOWN, told, fault.detail)
            asyncio.get_running_loop().call_soon(self._console.cancel)
        if self._task is not None and self._cause is None:
            self._cause = fault
            # Not at once: a task that is cancelled before its first step never gets to clean up.
            asyncio.get_running_loop().call_soon(self._task.cancel)

    def end(self, reason: CloseReason, told: bytes, sqlstate: str = ADMIN_SHUTDOWN) -> None:
        """Ends a session that has logged in.

        The client is told, unless it is in the middle of a message; so is the target, where that is known of it.
        """
        if self._console is not None:
            self.refuse_login(GatewayFault(ADMIN_SHUTDOWN, told, reason.value))
        if self._client_end is None or self._target_end is None or self._reason is not None:
            return
        if self._target_end.at_message_boundary:
            self._client_end.send(messages.fatal(sqlstate, told))
        if self._client_end.at_message_boundary:
            self._target_end.send(messages.terminate())
        self._close(reason)

    async def _run(self, connection: socket.socket, proxied: bool) -> None:
        """The login, and what becomes of it."""
        relaying = False
        try:
            relaying = await self.log_in(connection, proxied)
        except Fault as fault:
            self._refuse(fault)
        except asyncio.CancelledError:
            self._refuse(self._cause or shutting_down())
        except Exception as error:  # a bug of ours costs one login and is told to its client and the log
            what = f"internal error: {type(error).__name__}"
            self._refuse(GatewayFault(INTERNAL_ERROR, "internal error of the gateway", what))
            raise
        finally:
            self._task = None
            self._gateway.limits.end_login(self.number)
            if not relaying:
                self._over()

    async def log_in(self, connection: socket.socket, proxied: bool) -> bool:
        """Steps 1 to 7. True if the session relays now, False if no session was wanted, or allowed. Raises Fault."""
        gateway = self._gateway
        client = self._client = ClientLeg(connection, gateway.targets.buffer)

        if proxied and not await self._learn_address(client):
            return False
        accepted = self._accepted
        local = is_local(accepted.address)
        wanted = await client.receive_startup(gateway.admission.policy, gateway.client_tls, local=local)
        gateway.limits.named(self.number)
        if isinstance(wanted, CancelRequest):
            await self._cancel(client, wanted)
            return False
        started = self._started = Started(accepted, wanted.parameters, wanted.encryption)
        if gateway.console is not None and started.database == gateway.console.database:
            # What a load balancer brings is not what the balancer runs as.
            uid = NO_USER if proxied else uid_of_peer(connection)
            if gateway.console.is_meant(started, uid):
                await self._open_console(gateway.console, started, uid, client)
                return True
        place = self._place = gateway.limits.begin_client(started.user, accepted.address)
        if gateway.check_logins is not None:
            gateway.check_logins()
        if gateway.held is not None:
            client.watch(self._client_left)
            await gateway.held.wait()
            client.watch(None)

        granted = await gateway.admission.admit(started, client, self._client_left)
        self._lease = granted.mapping.lease
        gateway.limits.prove(place, started.user)
        attached, target = await gateway.targets.attach(granted)
        try:
            self._attach(client, target, attached, wanted.minor)
        except BaseException:
            target.abort()
            raise
        return True

    async def _learn_address(self, client: ClientLeg) -> bool:
        """Takes over the address that a load balancer says. False if that may not connect: closed without a word."""
        address = await client.receive_proxy_header()
        if not address:
            return True
        self._accepted = Accepted(self.id, address)
        if (reason := self._gateway.access.refusal(address)) is None:
            return True
        self._gateway.denials.note(address, reason)
        client.close()
        return False

    async def _open_console(self, console: Console, started: Started, uid: int, client: ClientLeg) -> None:
        """Lets an administrator in, whose session is a task of its own from there on."""
        admin = await console.let_in(started, uid, client, self._client_left)
        self._cancel_timer()
        console.open += 1
        self._gateway.sink(AdminLoggedIn(admin.session, admin.address, admin.user, admin.may_act))
        self._console = asyncio.get_running_loop().create_task(self._serve_console(console, admin, client))

    async def _serve_console(self, console: Console, admin: Admin, client: ClientLeg) -> None:
        async def perform(step: Perform) -> object:
            assert isinstance(step.statement, Statement)  # noqa: S101 (the console's own)
            return await console.perform(step.statement, admin)

        detail = ""
        try:
            key = secrets.token_bytes(CONSOLE_KEY_BYTES)
            await client.drive(serve(client.framer, console.parse, console.version, admin.user, key), perform)
            client.close()
        except (Fault, asyncio.CancelledError) as error:
            fault = error if isinstance(error, Fault) else self._cause or shutting_down()
            detail = fault.detail
            client.refuse(fault)
        except BaseException:
            client.abort()
            raise
        finally:
            if client.is_full:
                asyncio.get_running_loop().call_later(self._gateway.close_timeout, client.abort)
            console.open -= 1
            self._console = None
            self._started = None
            self._gateway.sink(AdminLeft(self.id, detail, self.seconds))
            self._over()

    def _client_left(self) -> None:
        assert self._client is not None  # noqa: S101 (its watcher calls this)
        self.refuse_login(self._client.gone_fault())

    async def _cancel(self, client: ClientLeg, request: CancelRequest) -> None:
        """A cancel request is a connection of its own: it is answered by being closed."""
        gateway = self._gateway
        try:
            found, outcome = await gateway.cancel(request.key)
            if not found and gateway.ask_elsewhere is not None:
                found, outcome = await gateway.ask_elsewhere(request.key)
                if not found and gateway.keys.find(request.key) is not None:
                    # It was on its way here.
                    found, outcome = await gateway.cancel(request.key)
        finally:
            client.close()
        gateway.sink(Cancelled(self._accepted.address, found, outcome))

    def _attach(self, client: ClientLeg, target: TargetLeg, attached: Attached, minor: int) -> None:
        """Steps 7 and 8: lets the client in and sets the two ends back to back."""
        gateway = self._gateway
        client_transport, client_rest, client_at_eof = client.hand_over()
        target_transport, target_rest, target_at_eof = target.hand_over()
        # Before the client is told, so that a login that must be recorded first can still be refused.
        gateway.sink(LoggedIn(attached, time.monotonic() - self._began))
        self._cancel_timer()
        self.reached, self.reached_tls = attached.reached, target.plan
        self.target_key = attached.greeting.key
        rules = gateway.rules.for_mapping(attached.granted.mapping)
        observer = self._observer(rules, is_audited=True)
        self._client_end = self._end(client_transport, client, observer, faces_target=False)
        followed = observer if rules.limit_idling else None
        self._target_end = self._end(target_transport, target, followed, faces_target=True)
        self._client_end.send(client_login.welcome(attached, gateway.keys.issue(self, minor)))
        _relay.join(self._client_end, self._target_end)
        self._target_end.start(target_rest, target_at_eof)
        self._client_end.start(client_rest, client_at_eof)
        if rules.limit_anything:
            self._watch = Watch(rules, time.monotonic(), followed)
            self._keep_watch()
        started, mapping = attached.granted.started, attached.granted.mapping
        identity = Identity(
            user=started.user,
            address=started.accepted.address,
            database=started.database,
            application_name=parameter(started.parameters, b"application_name"),
            tls=started.encryption.version if started.encryption is not None else "",
            target_user=mapping.user,
            target_database=mapping.database,
        )
        self._identity = msgspec.msgpack.encode(identity)
        # What belongs to the login alone is not kept for the session's life.
        self._client = None
        self._started = None
        self._accepted = NOBODY
        if self._lease is not None:
            self._lease.watch(self._lease_ended)

    def _lease_ended(self) -> None:
        self.end(CloseReason.LEASE_ENDED, b"terminating connection: the lease of its credential has ended")

    def _observer(self, rules: SessionRules, *, is_audited: bool) -> Observer | None:
        """Who follows this session, if anybody has to. `is_audited`: so are all, if the gateway records statements."""
        statements = self._gateway.statements if is_audited else None
        if statements is not None:
            return Observer(functools.partial(statements.record, self.id), statements.max_bytes)
        return Observer() if rules.limit_idling else None

    def _end(
        self, transport: asyncio.Transport, leg: Leg, observer: Observer | None, *, faces_target: bool
    ) -> _relay.End:
        buffer = self._gateway.targets.buffer
        if observer is None:
            return _relay.End(self, transport, leg.fd, faces_target, buffer, leg.tls)
        return _relay.ObservedEnd(self, transport, leg.fd, faces_target, buffer, leg.tls, observer)

    def _keep_watch(self) -> None:
        """Ends the session if it has broken a rule; otherwise looks again when it could have."""
        if self._watch is None or self._client_end is None or self._reason is not None:
            return
        found = self._watch.look(time.monotonic(), held=self._client_end.holding)
        if isinstance(found, Breach):
            self.end(found.reason, found.told, found.sqlstate)
        else:
            self._timer = asyncio.get_running_loop().call_later(found, self._keep_watch)

    def leave_console(self) -> None:
        """Ends it if it is the admin console: another process is to be asked from now on."""
        if self._console is not None:
            self.refuse_login(GatewayFault(ADMIN_SHUTDOWN, None, "another process serves now"))

    @property
    def can_move(self) -> bool:
        """Whether another process could go on with it.

        Not with one that speaks TLS, nor while its cancel request is on its way.
        """
        client, target = self._client_end, self._target_end
        if client is None or target is None or self._reason is not None or self.cancelling:
            return False
        return client.can_leave and target.can_leave

    async def hand_over(self, send: SendHandedOver, keep: Callable[[int, Lease], object]) -> bool:
        """Ends the session here, so that another process may go on with it. False if that process is gone.

        It `can_move`. If its credential is on loan, `keep` gets the lease, with the session's number.
        """
        client, target = self._client_end, self._target_end
        assert client is not None  # noqa: S101 (it can move)
        assert target is not None  # noqa: S101 (it can move)
        with contextlib.ExitStack() as kept:
            descriptors = []
            for end in (client, target):
                descriptors.append(os.dup(end.fd))
                kept.callback(os.close, descriptors[-1])
            self._reason = CloseReason.HANDED_OVER
            self._left = asyncio.get_running_loop().create_future()
            client.leave()
            target.leave()
            await self._left
            observer = client.observer if isinstance(client, _relay.ObservedEnd) else None
            handed = HandedOver(
                number=self.number,
                identity=self._identity,
                began=self._began,
                cancel_key=self.cancel_key,
                target_key=self.target_key,
                reached=self.reached,
                client=(client.received, client.tail, client.unsent),
                target=(target.received, target.tail, target.unsent),
                watched=None if self._watch is None else self._watch.watched,
                observed=None if observer is None else observer.state,
                is_leased=self._lease is not None,
                is_audited=observer is not None and observer.tells_statements,
            )
            if self._lease is not None:
                keep(self.number, self._lease)
                self._lease = None
            is_sent = await send(handed, (descriptors[0], descriptors[1]))
        # Not before: until the other process knows them, cancel requests are for this one.
        self._gateway.keys.forget(self.cancel_key)
        self._client_end = self._target_end = None
        self._over()
        return is_sent

    @classmethod
    async def take_up(
        cls, gateway: Gateway, handed: HandedOver, client: socket.socket, target: socket.socket, lease: Lease | None
    ) -> None:
        """Goes on with a session of another process. `lease` is that of its credential, if it is on loan."""
        self = cls(gateway, handed.number, is_taken_up=True)
        self._identity = handed.identity
        identity = msgspec.msgpack.decode(handed.identity, type=Identity)
        self._place = gateway.limits.take_up(identity.user, identity.address)
        self._lease = lease
        self._began = handed.began
        self.cancel_key, self.target_key, self.reached = handed.cancel_key, handed.target_key, handed.reached
        gateway.keys.take_up(self)
        buffer = gateway.targets.buffer
        legs = TakenUpLeg(client, buffer), TakenUpLeg(target, buffer)
        try:
            for leg in legs:
                await leg.open()
            (client_transport, client_rest, _), (target_transport, target_rest, _) = (leg.hand_over() for leg in legs)
        except (Fault, OSError) as error:
            for leg in legs:
                leg.abort()
            self._close(CloseReason.TARGET_LOST if legs[1].is_lost else CloseReason.CLIENT_LOST)
            assert self._reason is not None  # noqa: S101 (it is closed)
            received = handed.client[0], handed.target[0]
            gateway.sink(Ended(self.id, self._reason, str(error), *received, self.seconds))
            self._over()
            return
        rules = SessionRules() if handed.watched is None else handed.watched.rules
        observer = self._observer(rules, is_audited=handed.is_audited)
        if observer is not None and handed.observed is not None:
            observer.take_up(handed.observed)
        followed = observer if rules.limit_idling else None
        self._client_end = self._end(client_transport, legs[0], observer, faces_target=False)
        self._target_end = self._end(target_transport, legs[1], followed, faces_target=True)
        _relay.join(self._client_end, self._target_end)
        self._client_end.take_up(*handed.client)
        self._target_end.take_up(*handed.target)
        # An end of file is read again, once what came before it is gone.
        self._target_end.start(target_rest, False)
        self._client_end.start(client_rest, False)
        if handed.watched is not None:
            self._watch = Watch.take_up(handed.watched, followed)
            self._keep_watch()
        if lease is not None:
            lease.watch(self._lease_ended)

    def target_finished(self) -> None:
        """The target has said its last word: an `End` reports it."""
        assert self._client_end is not None  # noqa: S101 (ends report while they are joined)
        self._close(CloseReason.CLIENT_CLOSED if self._client_end.has_finished else CloseReason.TARGET_CLOSED)

    def end_lost(self, end: _relay.End, error: Exception | None) -> None:
        """A connection is gone for good, or has left: an `End` reports it."""
        self._ends_lost += 1
        if self._left is not None:
            if self._ends_lost == 2:
                self._left.set_result(None)
            return
        if self._reason is None:
            if self._client_end is not None and self._client_end.has_finished:
                # A target that was told good-bye may close with our own still on its way, which looks like a reset.
                reason, error = CloseReason.CLIENT_CLOSED, None
            elif end.faces_target:
                reason = CloseReason.TARGET_LOST if error else CloseReason.TARGET_CLOSED
            else:
                reason = CloseReason.CLIENT_LOST if error else CloseReason.CLIENT_CLOSED
            self._close(reason, str(error or ""))
        client_end, target_end = self._client_end, self._target_end
        if self._ends_lost < 2 or client_end is None or target_end is None or self._reason is None:
            return
        self._client_end = self._target_end = None
        detail = self._detail
        for side, each in (("client", client_end), ("target", target_end)):
            if each.truncated and not detail:
                detail = f"the {side} ended TLS without saying so: its last words may be missing"
        received = client_end.received, target_end.received
        self._gateway.sink(Ended(self.id, self._reason, detail, *received, self.seconds))
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

    def _refuse(self, fault: Fault) -> None:
        """Ends a login that failed: the client is told what it may know, the log the rest."""
        if self._client is not None:
            self._client.refuse(fault)
        self._gateway.sink(Refused(self._accepted, self._started, fault))

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
        if self._lease is not None:
            gateway.give_back(self._lease)
            self._lease = None
        if self._place is not None:
            gateway.limits.end_client(self._place)
        gateway.sessions.discard(self)
        if not gateway.sessions and gateway.idle is not None:
            gateway.idle()
