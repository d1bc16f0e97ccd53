"""The target's side of a session while it logs in: the gateway is the client here."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from pgauthproxy import _relay
from pgauthproxy.errors import (
    CANNOT_CONNECT,
    CANNOT_CONNECT_NOW,
    CONNECTION_FAILURE,
    PROTOCOL_VIOLATION,
    Fault,
    TargetFault,
    TlsError,
    TlsRefused,
)
from pgauthproxy.events import Sink, TargetFailed, ignore
from pgauthproxy.gateway.leg import Leg
from pgauthproxy.gateway.salted_keys import SaltedKeys
from pgauthproxy.gateway.warm import WarmTargets
from pgauthproxy.net import dial
from pgauthproxy.net.tls import TargetContexts
from pgauthproxy.proto import messages, target_tls
from pgauthproxy.proto.steps import Login, TlsPlan
from pgauthproxy.proto.target_login import TargetLimits, TargetTerms, Welcome, log_in, target_login
from pgauthproxy.stages import Address, Attached, Encryption, Granted, TargetTls

PLAIN_SECONDS: Final = 60.0
"""How long a target that speaks no TLS, where that is only preferred, is not asked for it again."""
MAX_PLAIN: Final = 1024
NO_ANSWER: Final = (CANNOT_CONNECT, CONNECTION_FAILURE, PROTOCOL_VIOLATION)
"""SQLSTATEs of ours for a target that is not well."""


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """How targets are reached, and what they may send. Times in seconds.

    `warm`: how many connections stand open before they are needed.
    """

    connect_timeout: float
    login_timeout: float
    error_text: bool
    version: int
    tls: TargetTls
    warm: int
    limits: TargetLimits
    tcp: dial.TcpOptions


class TargetLeg(Leg):
    """A connection to a target that is not let in yet. `plan` is how TLS came about, None without it."""

    plan: TlsPlan | None = None
    encryption: Encryption | None = None

    def gone_fault(self) -> Fault:
        how = self.error or "end of file"
        if self.shaking_hands:
            return TlsRefused(f"target closed the connection during the TLS handshake: {how}")
        detail = f"target closed the connection during the login: {how}"
        return TargetFault(CONNECTION_FAILURE, "the target server closed the connection", detail)

    def tls_fault(self, error: TlsError) -> Fault:
        return TlsRefused(f"TLS with the target failed: {error}")


class Targets:
    """The way to targets that all sessions of a gateway share."""

    def __init__(self, policy: TargetPolicy, buffer: _relay.ForwardBuffer, sink: Sink = ignore) -> None:
        self.policy = policy
        self.sink = sink
        self.buffer = buffer
        self.salted = SaltedKeys()
        self.contexts = TargetContexts(policy.tls)
        self.warm = WarmTargets(self._open_warm)
        self._plain_until: dict[Address, float] = {}

    def forget_certificates(self) -> None:
        """Certificates, keys and authorities are read anew when they are next needed."""
        self.contexts = TargetContexts(self.policy.tls)
        self.warm.close()

    def is_plain(self, address: Address) -> bool:
        """Whether a target has said lately that it speaks no TLS."""
        return self._plain_until.get(address, 0.0) > time.monotonic()

    def remember_plain(self, address: Address) -> None:
        self._plain_until.pop(address, None)
        self._plain_until[address] = time.monotonic() + PLAIN_SECONDS
        if len(self._plain_until) > MAX_PLAIN:
            self._plain_until.pop(next(iter(self._plain_until)))

    async def attach(self, granted: Granted) -> tuple[Attached, TargetLeg]:
        """Connects and logs in to the first of the mapping's hosts that can be had.

        A host that cannot be reached, with which TLS fails, or that is starting up or shutting down (57P03), is passed
        over. Raises TargetFault, and AuthenticatorFault if the mapping asks for what cannot be.
        """
        attempt = _Attempt(self, granted)
        seconds = self.policy.login_timeout
        # asyncio.timeout does it in three times as many steps.
        deadline = asyncio.get_running_loop().call_later(seconds, attempt.expire, asyncio.current_task())
        try:
            return await attempt.run()
        except asyncio.CancelledError:
            if not attempt.expired:
                raise
            raise attempt.too_late(seconds) from None
        finally:
            deadline.cancel()

    async def dial(self, address: Address) -> TargetLeg:
        """A connection to an address. Raises DialError."""
        connection = await dial.connect(address, self.policy.connect_timeout, self.policy.tcp)
        return TargetLeg(connection, self.buffer)

    def learn(self, leg: TargetLeg, address: Address, plan: TlsPlan | None) -> None:
        """Remembers for the next connection what came of a plan for TLS."""
        if plan is None:
            return
        if leg.tls is None:
            self.remember_plain(address)
        else:
            leg.plan = plan
            plan.side.remember(leg.tls)

    async def _open_warm(self, address: Address, plan: TlsPlan | None) -> TargetLeg:
        """A connection that is as far as it gets without a user. Raises DialError and TargetFault."""
        leg = await self.dial(address)
        try:
            async with asyncio.timeout(self.policy.login_timeout):
                leg.encryption = await leg.drive(target_tls.start_tls(leg.framer, plan))
                await leg.open()
        except TimeoutError:
            leg.abort()
            raise dial.DialError(f"{address}: TLS took too long") from None
        except BaseException:
            leg.abort()
            raise
        self.learn(leg, address, plan)
        return leg

    async def cancel(self, address: Address, plan: TlsPlan | None, key: bytes) -> None:
        """Sends a cancel request; returns once the target has closed, as it does when it has acted.

        `plan` is None if the session speaks no TLS. Raises DialError and TargetFault. The time-out is the caller's.
        """
        if plan is not None:
            # It may have been a matter of choice for the session, but the key opens what TLS has kept to itself.
            plan = msgspec.structs.replace(plan, required=True)
        leg = await self.dial(address)
        try:
            await leg.drive(target_tls.start_tls(leg.framer, plan))
            leg.send(messages.cancel_request(key))
            await leg.until_gone()
        finally:
            leg.abort()


class _Attempt:
    """One session's way through its mapping's hosts."""

    def __init__(self, targets: Targets, granted: Granted) -> None:
        self.connected = False
        self.failures: list[str] = []
        self._targets = targets
        self._granted = granted
        self.expired = False
        self._trying: Address | None = None
        self._not_now: TargetFault | None = None

    def expire(self, task: "asyncio.Task[Any] | None") -> None:
        """Ends the attempt, which is that task's, from outside."""
        assert task is not None  # noqa: S101 (a coroutine runs in one)
        self.expired = True
        task.cancel()

    def too_late(self, seconds: float) -> TargetFault:
        if self._trying is not None:
            self._targets.sink(TargetFailed(self._trying, False, f"no login in {seconds:g} s"))
        if self.connected:
            told = "the target server did not complete the login in time"
            return TargetFault(CONNECTION_FAILURE, told, f"no login in {seconds:g} s")
        return _unreachable([f"no connection in {seconds:g} s", *self.failures])

    async def run(self) -> tuple[Attached, TargetLeg]:
        for host in self._granted.mapping.hosts:
            try:
                addresses = await dial.resolve(host, self._targets.policy.connect_timeout)
            except dial.DialError as error:
                self.failures.append(str(error))
                continue
            plan = await self._targets.contexts.plan(self._granted.mapping.tls, host)
            for address in addresses:
                if (result := await self._try(address, plan)) is not None:
                    return result
        raise self._not_now or _unreachable(self.failures)

    async def _try(self, address: Address, plan: TlsPlan | None) -> tuple[Attached, TargetLeg] | None:
        self._trying = address
        if plan is not None and not plan.required and self._targets.is_plain(address):
            plan = None
        try:
            try:
                return await self._log_in(address, plan)
            except TlsRefused:
                if plan is None or plan.required:
                    raise
                return await self._log_in(address, None)
        except dial.DialError as error:
            self._failed(address, str(error))
        except TlsRefused as fault:
            self._failed(address, f"{address}: {fault.detail}")
        except TargetFault as fault:
            if fault.sqlstate != CANNOT_CONNECT_NOW:
                self._targets.sink(TargetFailed(address, fault.sqlstate not in NO_ANSWER, fault.detail))
                raise
            self._failed(address, f"{address}: {fault.detail}")
            self._not_now = fault
        return None

    def _failed(self, address: Address, detail: str) -> None:
        """This address is passed over."""
        self.failures.append(detail)
        self._targets.sink(TargetFailed(address, False, detail))

    async def _log_in(self, address: Address, plan: TlsPlan | None) -> tuple[Attached, TargetLeg]:
        """On a connection that stands open already, if there is one."""
        targets = self._targets
        wanted = self._granted.mapping.warm
        warm = targets.warm.take(address, plan, targets.policy.warm if wanted is None else wanted)
        if warm is not None:
            self.connected = True
            began = time.monotonic()
            login = log_in(warm.framer, self._granted, self._terms(address, plan), warm.encryption)
            try:
                return await self._drive(warm, login, address, plan, began, began)
            except TargetFault:
                # It may have been closed just now. Then nothing was heard, and a connection of our own will tell.
                if warm.heard or not warm.gone:
                    raise
        began = time.monotonic()
        leg = await targets.dial(address)
        self.connected = True
        login = target_login(leg.framer, self._granted, self._terms(address, plan))
        return await self._drive(leg, login, address, plan, began, time.monotonic())

    def _terms(self, address: Address, plan: TlsPlan | None) -> TargetTerms:
        policy = self._targets.policy
        return TargetTerms(policy.version, plan, dial.is_private(address), policy.error_text, policy.limits)

    async def _drive(
        self,
        leg: TargetLeg,
        login: Login[Welcome],
        address: Address,
        plan: TlsPlan | None,
        began: float,
        connected: float,
    ) -> tuple[Attached, TargetLeg]:
        targets = self._targets
        try:
            welcome = await leg.drive(login, targets.salted.derive)
        except BaseException:
            leg.abort()
            raise
        targets.learn(leg, address, plan)
        seconds = connected - began, time.monotonic() - connected
        return Attached(self._granted, address, welcome.encryption, welcome.greeting, *seconds), leg


def _unreachable(failures: list[str]) -> TargetFault:
    return TargetFault(
        CANNOT_CONNECT, "could not connect to the target server", "target not reachable: " + "; ".join(failures)
    )
