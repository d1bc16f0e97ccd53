"""The target's side of a session while it logs in: the gateway is the client here."""

import asyncio
import time
from dataclasses import dataclass
from typing import Final

import msgspec

from pgauthproxy import _relay
from pgauthproxy.errors import (
    CANNOT_CONNECT,
    CANNOT_CONNECT_NOW,
    CONNECTION_FAILURE,
    Fault,
    TargetFault,
    TlsError,
    TlsRefused,
)
from pgauthproxy.gateway.leg import Leg
from pgauthproxy.gateway.salted_keys import SaltedKeys
from pgauthproxy.net import dial
from pgauthproxy.net.tls import TargetContexts
from pgauthproxy.proto import messages, target_tls
from pgauthproxy.proto.steps import TlsPlan
from pgauthproxy.proto.target_login import TargetLimits, TargetTerms, target_login
from pgauthproxy.stages import Address, Attached, Granted, TargetTls

PLAIN_SECONDS: Final = 60.0
"""How long a target that speaks no TLS, where that is only preferred, is not asked for it again."""
MAX_PLAIN: Final = 1024


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """How targets are reached, and what they may send. Times in seconds."""

    connect_timeout: float
    login_timeout: float
    error_text: bool
    version: int
    tls: TargetTls
    limits: TargetLimits
    tcp: dial.TcpOptions


class TargetLeg(Leg):
    """A connection to a target that is not let in yet. `plan` is how TLS came about, None without it."""

    plan: TlsPlan | None = None

    def gone_fault(self) -> Fault:
        detail = f"target closed the connection during the login: {self.error or 'end of file'}"
        return TargetFault(CONNECTION_FAILURE, "the target server closed the connection", detail)

    def tls_fault(self, error: TlsError) -> Fault:
        return TlsRefused(f"TLS with the target failed: {error}")


class Targets:
    """The way to targets that all sessions of a gateway share."""

    def __init__(self, policy: TargetPolicy, buffer: _relay.ForwardBuffer) -> None:
        self.policy = policy
        self.buffer = buffer
        self.salted = SaltedKeys()
        self.contexts = TargetContexts(policy.tls)
        self._plain_until: dict[Address, float] = {}

    def forget_certificates(self) -> None:
        """Certificates, keys and authorities are read anew when they are next needed."""
        self.contexts = TargetContexts(self.policy.tls)

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
        try:
            async with asyncio.timeout(seconds):
                return await attempt.run()
        except TimeoutError:
            if attempt.connected:
                raise TargetFault(
                    CONNECTION_FAILURE,
                    "the target server did not complete the login in time",
                    f"no login in {seconds:g} s",
                ) from None
            raise _unreachable([f"no connection in {seconds:g} s", *attempt.failures]) from None

    async def cancel(self, address: Address, plan: TlsPlan | None, key: bytes) -> None:
        """Sends a cancel request; returns once the target has closed, as it does when it has acted.

        `plan` is None if the session speaks no TLS. Raises DialError and TargetFault. The time-out is the caller's.
        """
        if plan is not None:
            # It may have been a matter of choice for the session, but the key opens what TLS has kept to itself.
            plan = msgspec.structs.replace(plan, required=True)
        connection = await dial.connect(address, self.policy.connect_timeout, self.policy.tcp)
        leg = TargetLeg(connection, self.buffer)
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
        self._not_now: TargetFault | None = None

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
            self.failures.append(str(error))
        except TlsRefused as fault:
            self.failures.append(f"{address}: {fault.detail}")
        except TargetFault as fault:
            if fault.sqlstate != CANNOT_CONNECT_NOW:
                raise
            self.failures.append(f"{address}: {fault.detail}")
            self._not_now = fault
        return None

    async def _log_in(self, address: Address, plan: TlsPlan | None) -> tuple[Attached, TargetLeg]:
        targets, policy = self._targets, self._targets.policy
        began = time.monotonic()
        connection = await dial.connect(address, policy.connect_timeout, policy.tcp)
        self.connected = True
        connected = time.monotonic()
        leg = TargetLeg(connection, targets.buffer)
        terms = TargetTerms(policy.version, plan, dial.is_private(address), policy.error_text, policy.limits)
        try:
            welcome = await leg.drive(target_login(leg.framer, self._granted, terms), targets.salted.derive)
        except BaseException:
            leg.abort()
            raise
        if plan is not None:
            if leg.tls is None:
                targets.remember_plain(address)
            else:
                plan.side.remember(leg.tls)
        logged_in = time.monotonic()
        attached = Attached(
            self._granted, address, welcome.encryption, welcome.greeting, connected - began, logged_in - connected
        )
        leg.plan = plan if leg.tls is not None else None
        return attached, leg


def _unreachable(failures: list[str]) -> TargetFault:
    return TargetFault(
        CANNOT_CONNECT, "could not connect to the target server", "target not reachable: " + "; ".join(failures)
    )
