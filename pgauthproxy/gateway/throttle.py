"""Makes guessing passwords slow: logins wait, and then are refused, where too many have failed.

Failures are counted for the address and for the user. From `failures` on, each further one doubles the time that the
next login waits before the authenticator is asked. An address whose time would grow beyond the longest is refused for a
while. A user never is, or anybody could lock out anybody: a user's logins wait at most the longest time, and those
from an address where the user has logged in before do not even do that.

A right login takes back what the same user had failed at the same address, and nothing else. So whoever has mistyped
begins anew, and whoever owns one account cannot use it to go on guessing another's password.

What fails while an address is refused, or makes it so, is answered like what is right: of many guesses that were under
way at once, none is answered once there were too many.

Waiting is a timer. It happens under the login's deadline and in its place, and only for so many of an address at once.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pgauthproxy._ledger import Ledger
from pgauthproxy.auth.networks import Networks, network_key
from pgauthproxy.errors import INVALID_AUTHORIZATION, ClientFault
from pgauthproxy.events import Noticed, Sink
from pgauthproxy.gateway.limits import NONE, too_many
from pgauthproxy.stages import Started

MOST_WAITING: Final = 4
"""Logins of one address that wait at once."""
MOST_DOUBLINGS: Final = 60


class Blocked(ClientFault):
    """This address has failed too often."""

    def __init__(self) -> None:
        super().__init__(INVALID_AUTHORIZATION, "too many failed logins", "too many failed logins of this address")


@dataclass(frozen=True, slots=True)
class ThrottleRules:
    """What is done from so many `failures` within `window` on. Times in seconds."""

    failures: int
    window: float
    delay: float
    max_delay: float
    block: float

    def delay_after(self, failures: int) -> float:
        """How long a login would wait, were there no longest time."""
        if failures < self.failures:
            return 0.0
        return self.delay * 2.0 ** min(failures - self.failures, MOST_DOUBLINGS)


class Attempt:
    """One login, as the throttle counts it: for its address (unless it has none), its user, and both together."""

    __slots__ = ("_address", "_asked", "_ledger", "_now", "_pair", "_rules", "_sink", "_started", "_user")

    def __init__(
        self, started: Started, rules: ThrottleRules, ledger: Ledger, sink: Sink, now: Callable[[], float]
    ) -> None:
        network = network_key(started.accepted.address)
        self._started = started
        self._rules = rules
        self._ledger = ledger
        self._sink = sink
        self._now = now
        self._asked = False
        self._address = b"a" + network if network else b""
        self._user = b"u" + started.user
        self._pair = b"p%d" % len(network) + network + started.user

    def check(self) -> None:
        """Raises Blocked if its address is refused now."""
        if self._address and self._ledger.is_blocked(self._address, self._now()):
            raise Blocked

    async def hold(self) -> None:
        """Returns once it may be judged. Raises Blocked, and GatewayFault if too many wait already."""
        self._asked = True
        self.check()
        seconds = min(self._rules.max_delay, self._delay())
        if not seconds:
            return
        place = self._ledger.take(b"w" + (self._address or self._user), MOST_WAITING)
        if place == NONE:
            raise too_many(f"{MOST_WAITING} logins from here are held up already (throttle)")
        try:
            await asyncio.sleep(seconds)
        finally:
            self._ledger.give(place)
        self.check()

    def failed(self) -> None:
        """Notes a wrong password, or what else was not right. Raises Blocked if its address is refused by now.

        What was refused before anything could be judged (`hold`) is no guess: a client without a certificate, or one
        that asks where tokens are given.
        """
        if not self._asked:
            return
        rules, now = self._rules, self._now()
        for key in (self._user, self._pair):
            self._ledger.fail(key, now, rules.failures, rules.window)
        if not self._address:
            return
        failures = self._ledger.fail(self._address, now, rules.failures, rules.window)
        if rules.block and rules.delay_after(failures) > rules.max_delay:
            if not self._ledger.is_blocked(self._address, now):
                facts = (("client", self._started.accepted.address), ("failures", failures), ("seconds", rules.block))
                self._sink(Noticed("warning", "address refused for a while", facts))
            self._ledger.block(self._address, now, now + rules.block)
        self.check()

    def succeeded(self) -> None:
        """Notes that it was right. Raises Blocked if its address is refused by now."""
        self.check()
        self._ledger.know(self._pair, self._address, self._user, self._now(), self._rules.window)

    def _delay(self) -> float:
        rules, now = self._rules, self._now()
        of_user = self._ledger.failures(self._user, now, rules.window)
        if of_user >= rules.failures and self._ledger.is_known(self._pair):
            of_user = 0
        of_address = self._ledger.failures(self._address, now, rules.window) if self._address else 0
        return rules.delay_after(max(of_user, of_address))


class Throttle:
    """What logins are held to. Those from networks in `exempt` are neither counted nor held up."""

    def __init__(
        self,
        rules: ThrottleRules,
        exempt: Networks,
        ledger: Ledger,
        sink: Sink,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`now` must be the same clock for all processes that share the ledger."""
        self._rules = rules
        self._exempt = exempt
        self._ledger = ledger
        self._sink = sink
        self._now = now

    def attempt(self, started: Started) -> Attempt | None:
        """A login that is to be asked and told about; None if it is exempt."""
        if self._exempt.has(started.accepted.address):
            return None
        return Attempt(started, self._rules, self._ledger, self._sink, self._now)
