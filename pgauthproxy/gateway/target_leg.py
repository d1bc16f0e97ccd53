"""The target's side of a session while it logs in: the gateway is the client here."""

import asyncio
import time
from dataclasses import dataclass

from pgauthproxy.errors import CANNOT_CONNECT, CANNOT_CONNECT_NOW, CONNECTION_FAILURE, Fault, TargetFault
from pgauthproxy.gateway.leg import Derive, Leg
from pgauthproxy.net import dial
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


async def attach(granted: Granted, policy: TargetPolicy, derive: Derive) -> tuple[Attached, TargetLeg]:
    """Connects and logs in to the first of the mapping's hosts that can be had.

    A host that cannot be reached, or is starting up or shutting down (57P03), is passed over. Raises TargetFault.
    """
    attempt = _Attempt(granted, policy, derive)
    try:
        async with asyncio.timeout(policy.login_timeout):
            return await attempt.run()
    except TimeoutError:
        if attempt.connected:
            raise TargetFault(
                CONNECTION_FAILURE,
                "the target server did not complete the login in time",
                f"no login in {policy.login_timeout:g} s",
            ) from None
        raise _unreachable([f"no connection in {policy.login_timeout:g} s", *attempt.failures]) from None


class _Attempt:
    """One session's way through its mapping's hosts."""

    def __init__(self, granted: Granted, policy: TargetPolicy, derive: Derive) -> None:
        self.connected = False
        self.failures: list[str] = []
        self._granted = granted
        self._policy = policy
        self._derive = derive
        self._not_now: TargetFault | None = None

    async def run(self) -> tuple[Attached, TargetLeg]:
        for host in self._granted.mapping.hosts:
            try:
                addresses = await dial.resolve(host, self._policy.connect_timeout)
            except dial.DialError as error:
                self.failures.append(str(error))
                continue
            for address in addresses:
                if (result := await self._try(address)) is not None:
                    return result
        raise self._not_now or _unreachable(self.failures)

    async def _try(self, address: Address) -> tuple[Attached, TargetLeg] | None:
        policy = self._policy
        began = time.monotonic()
        try:
            leg = await dial.connect(address, TargetLeg, policy.connect_timeout, policy.tcp)
        except dial.DialError as error:
            self.failures.append(str(error))
            return None
        self.connected = True
        connected = time.monotonic()
        login = target_login(
            leg.framer,
            self._granted.mapping,
            policy.limits,
            private_channel=dial.is_private(address),
            pass_error_text=policy.error_text,
        )
        try:
            greeting = await leg.drive(login, self._derive)
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
