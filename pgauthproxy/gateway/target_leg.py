"""The target's side of a session while it logs in: the gateway is the client here."""

import asyncio
import time
from dataclasses import dataclass

from pgauthproxy import _relay
from pgauthproxy.errors import CANNOT_CONNECT, CANNOT_CONNECT_NOW, CONNECTION_FAILURE, Fault, TargetFault
from pgauthproxy.gateway.leg import Leg
from pgauthproxy.gateway.salted_keys import SaltedKeys
from pgauthproxy.net import dial
from pgauthproxy.proto import messages
from pgauthproxy.proto.target_login import TargetLimits, target_login
from pgauthproxy.stages import Address, Attached, Granted


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """How targets are reached, and what they may send. Times in seconds."""

    connect_timeout: float
    login_timeout: float
    error_text: bool
    limits: TargetLimits
    tcp: dial.TcpOptions


class TargetLeg(Leg):
    """A connection to a target that is not let in yet."""

    def gone_fault(self) -> Fault:
        detail = f"target closed the connection during the login: {self.error or 'end of file'}"
        return TargetFault(CONNECTION_FAILURE, "the target server closed the connection", detail)


class Targets:
    """The way to targets that all sessions of a gateway share."""

    def __init__(self, policy: TargetPolicy, buffer: _relay.ForwardBuffer) -> None:
        self.policy = policy
        self.buffer = buffer
        self.salted = SaltedKeys()

    async def attach(self, granted: Granted) -> tuple[Attached, TargetLeg]:
        """Connects and logs in to the first of the mapping's hosts that can be had.

        A host that cannot be reached, or is starting up or shutting down (57P03), is passed over. Raises TargetFault.
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

    async def cancel(self, address: Address, key: bytes) -> None:
        """Sends a cancel request; returns once the target has closed, as it does when it has acted.

        Raises DialError. The time-out is the caller's.
        """
        connection = await dial.connect(address, self.policy.connect_timeout, self.policy.tcp)
        leg = TargetLeg(connection, self.buffer)
        try:
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
            for address in addresses:
                if (result := await self._try(address)) is not None:
                    return result
        raise self._not_now or _unreachable(self.failures)

    async def _try(self, address: Address) -> tuple[Attached, TargetLeg] | None:
        policy = self._targets.policy
        began = time.monotonic()
        try:
            connection = await dial.connect(address, policy.connect_timeout, policy.tcp)
        except dial.DialError as error:
            self.failures.append(str(error))
            return None
        self.connected = True
        connected = time.monotonic()
        leg = TargetLeg(connection, self._targets.buffer)
        login = target_login(
            leg.framer,
            self._granted.mapping,
            policy.limits,
            private_channel=dial.is_private(address),
            pass_error_text=policy.error_text,
        )
        try:
            greeting = await leg.drive(login, self._targets.salted.derive)
        except TargetFault as fault:
            leg.abort()
            if fault.sqlstate != CANNOT_CONNECT_NOW:
                raise
            self.failures.append(f"{address}: {fault.detail}")
            self._not_now = fault
            return None
        except BaseException:
            leg.abort()
            raise
        logged_in = time.monotonic()
        return Attached(self._granted, address, greeting, connected - began, logged_in - connected), leg


def _unreachable(failures: list[str]) -> TargetFault:
    return TargetFault(
        CANNOT_CONNECT, "could not connect to the target server", "target not reachable: " + "; ".join(failures)
    )
