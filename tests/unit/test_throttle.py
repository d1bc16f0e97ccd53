"""Who waits, who is refused, and what takes a failure back; with a clock that a test sets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pgauthproxy._ledger import Ledger
from pgauthproxy.auth.networks import Networks
from pgauthproxy.errors import INVALID_AUTHORIZATION, TOO_MANY_CONNECTIONS, GatewayFault
from pgauthproxy.events import Event, Noticed
from pgauthproxy.gateway import throttle
from pgauthproxy.gateway.throttle import MOST_WAITING, Attempt, Blocked, Throttle, ThrottleRules
from pgauthproxy.stages import Accepted, Started

ATTACKER, OTHER, LOCAL = "192.0.2.66:1", "198.51.100.1:1", "[local]"
BLOCK = 300.0


def login(user: str, address: str) -> Started:
    return Started(Accepted("1", address), ((b"user", user.encode()),))


class Gate:
    """A throttle that waits in no time; `waited` is how long it would have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, exempt: tuple[str, ...] = (), **rules: Any) -> None:
        self.now = 1000.0
        self.told: list[Event] = []
        wanted = {"failures": 3, "window": 60.0, "delay": 1.0, "max_delay": 4.0, "block": BLOCK} | rules
        self.throttle = Throttle(
            ThrottleRules(**wanted), Networks(exempt), Ledger(failures=1 << 12), self.told.append, lambda: self.now
        )
        self._waited = 0.0
        monkeypatch.setattr(throttle.asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self._waited += seconds

    def waits(self, user: str = "alice", address: str = ATTACKER) -> float:
        """How long such a login waits before it is judged."""
        self._waited = 0.0
        if (attempt := self.throttle.attempt(login(user, address))) is not None:
            asyncio.run(attempt.hold())
        return self._waited

    def fail(self, user: str = "alice", address: str = ATTACKER, times: int = 1) -> None:
        for _ in range(times):
            if (attempt := self.throttle.attempt(login(user, address))) is not None:
                asyncio.run(attempt.hold())
                attempt.failed()

    def succeed(self, user: str = "alice", address: str = ATTACKER) -> None:
        attempt = self.throttle.attempt(login(user, address))
        assert attempt is not None
        attempt.succeeded()

    def is_blocked(self, user: str = "alice", address: str = ATTACKER) -> bool:
        attempt = self.throttle.attempt(login(user, address))
        try:
            if attempt is not None:
                attempt.check()
        except Blocked:
            return True
        return False


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_the_wait_doubles_until_the_address_is_refused_for_a_while(gate: Gate) -> None:
    waits = []
    for number in range(5):
        gate.fail(f"user {number}")
        waits.append(gate.waits("somebody"))
    assert waits == [0, 0, 1, 2, 4]
    with pytest.raises(Blocked):
        gate.fail("another")
    assert gate.is_blocked("somebody else")
    with pytest.raises(Blocked):
        gate.waits("somebody else")
    facts = (("client", ATTACKER), ("failures", 6), ("seconds", BLOCK))
    assert gate.told == [Noticed("warning", "address refused for a while", facts)]
    assert not gate.is_blocked(address=OTHER)
    gate.now += BLOCK
    assert not gate.is_blocked()
    # It has only shown that it waits.
    assert gate.waits() == 4
    gate.now += 61
    assert gate.waits() == 0


def test_what_nobody_was_asked_about_is_no_failure(gate: Gate) -> None:
    for _ in range(100):
        attempt = gate.throttle.attempt(login("alice", ATTACKER))
        assert attempt is not None
        attempt.failed()
    assert (gate.waits(), gate.is_blocked()) == (0, False)


def test_failures_far_apart_hold_up_nobody(gate: Gate) -> None:
    for _ in range(20):
        gate.fail()
        gate.now += 31
    assert gate.waits() == 0


def test_a_user_waits_wherever_it_comes_from_and_is_never_refused(gate: Gate) -> None:
    for number in range(100):
        gate.fail("alice", f"203.0.113.{number}:1")
    assert gate.waits("alice", OTHER) == 4
    assert not gate.is_blocked("alice", OTHER)
    assert gate.waits("bob", OTHER) == 0
    assert gate.told == []


def test_a_user_does_not_wait_where_it_has_logged_in_before(gate: Gate) -> None:
    gate.succeed("alice", OTHER)
    for number in range(100):
        gate.fail("alice", f"203.0.113.{number}:1")
    assert gate.waits("alice", OTHER) == 0
    assert gate.waits("alice", "198.51.100.2:1") == 4
    # For what the address itself has failed it waits.
    gate.fail("bob", OTHER, times=3)
    assert gate.waits("alice", OTHER) == 1


def test_a_right_login_takes_back_what_the_same_user_has_failed_there(gate: Gate) -> None:
    gate.fail("alice", times=4)
    assert gate.waits("alice") == 2
    gate.succeed("alice")
    assert gate.waits("alice") == 0
    gate.fail("alice", times=2)
    assert gate.waits("alice") == 0


def test_whoever_owns_an_account_cannot_use_it_to_go_on_guessing(gate: Gate) -> None:
    for _ in range(4):
        gate.fail("alice")
        gate.succeed("mallory")
        gate.fail("mallory")
        gate.succeed("mallory")
    gate.fail("alice")
    with pytest.raises(Blocked) as raised:
        gate.fail("alice")
    assert (raised.value.sqlstate, raised.value.told) == (INVALID_AUTHORIZATION, b"too many failed logins")
    assert gate.is_blocked("mallory")


def test_the_failures_of_an_attacker_stay_when_the_user_logs_in_elsewhere(gate: Gate) -> None:
    gate.fail("alice", times=4)
    gate.succeed("alice", OTHER)
    assert gate.waits("alice", ATTACKER) == 2
    assert gate.waits("bob", ATTACKER) == 2


def test_what_was_under_way_when_the_address_is_refused_learns_nothing(gate: Gate) -> None:
    under_way = [gate.throttle.attempt(login("alice", ATTACKER)) for _ in range(2)]
    for attempt in under_way:
        assert attempt is not None
        asyncio.run(attempt.hold())
    with pytest.raises(Blocked):
        gate.fail(times=6)
    wrong, right = under_way
    assert wrong is not None
    assert right is not None
    for outcome in (wrong.failed, right.succeeded):
        with pytest.raises(Blocked):
            outcome()
    assert not gate.throttle._ledger.is_known(b"p4" + bytes([192, 0, 2, 66]) + b"alice")


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ("[2001:db8::1]:1", "[2001:db8::ffff:0:1:2]:2", "[2001:db8:0:1::1]:1"),
        ("192.0.2.66:1", "192.0.2.66:2", "192.0.2.67:1"),
    ],
)
def test_an_address_of_ipv6_is_its_network(gate: Gate, one: str, same: str, other: str) -> None:
    with pytest.raises(Blocked):
        gate.fail("alice", one, times=6)
    assert gate.is_blocked("bob", same)
    assert not gate.is_blocked("bob", other)


def test_a_unix_socket_is_no_address(gate: Gate) -> None:
    gate.fail("alice", LOCAL, times=50)
    assert not gate.is_blocked("alice", LOCAL)
    assert (gate.waits("alice", LOCAL), gate.waits("bob", LOCAL)) == (4, 0)


def test_exempt_networks_are_neither_counted_nor_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, exempt=("192.0.2.0/24", "local"))
    for address in (ATTACKER, LOCAL):
        gate.fail("alice", address, times=50)
        assert (gate.waits("alice", address), gate.is_blocked("alice", address)) == (0, False)
    assert gate.waits("alice", OTHER) == 0
    gate.fail("alice", OTHER, times=4)
    assert gate.waits("alice", ATTACKER) == 0


def test_without_a_block_an_address_only_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, block=0.0)
    gate.fail(times=5000)
    assert (gate.waits("bob"), gate.is_blocked()) == (4, False)


def test_only_so_many_logins_of_an_address_wait_at_once() -> None:
    rules = ThrottleRules(1, 60.0, 100.0, 100.0, 0.0)
    ledger = Ledger()
    held = Throttle(rules, Networks(()), ledger, lambda event: None)

    def attempt(user: str, address: str) -> Attempt:
        found = held.attempt(login(user, address))
        assert found is not None
        return found

    async def scenario() -> None:
        first = attempt("alice", ATTACKER)
        await first.hold()
        first.failed()
        waiting = [asyncio.create_task(attempt("alice", ATTACKER).hold()) for _ in range(MOST_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(GatewayFault) as raised:
            await attempt("bob", ATTACKER).hold()
        assert raised.value.sqlstate == TOO_MANY_CONNECTIONS
        assert raised.value.detail == "4 logins from here are held up already (throttle)"
        waiting.append(asyncio.create_task(attempt("alice", OTHER).hold()))
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert ledger.count(b"wa" + bytes([192, 0, 2, 66])) == 0

    asyncio.run(scenario())


def test_a_spray_of_addresses_and_users_takes_no_memory_beyond_the_table(gate: Gate) -> None:
    gate.succeed("alice", OTHER)
    for number in range(3 * 4096):
        gate.fail(f"user {number}", f"[2001:db8:{number % 65536:x}:{number // 65536:x}::1]:1")
        gate.now += 0.001
    with pytest.raises(Blocked):
        gate.fail("alice", times=6)
    assert gate.is_blocked()
    assert gate.waits("bob", OTHER) == 0
