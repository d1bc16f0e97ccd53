"""Who gets a place, and who makes way."""

from __future__ import annotations

import pytest

from pgauthproxy.errors import TOO_MANY_CONNECTIONS, Fault, GatewayFault
from pgauthproxy.gateway.limits import Limits


class Newcomer:
    """Begins a login; keeps why it had to make way."""

    def __init__(self, limits: Limits, number: int) -> None:
        self.evicted: list[Fault] = []
        limits.begin_login(number, self.evicted.append)


def counts(limits: Limits) -> tuple[int, int]:
    return limits.clients, limits.logins


def test_what_is_taken_is_given_back() -> None:
    limits = Limits(10, 10)
    for number in range(3):
        Newcomer(limits, number)
    assert counts(limits) == (0, 3)
    limits.named(0)
    limits.begin_client()
    assert counts(limits) == (1, 3)
    limits.end_login(0)
    assert counts(limits) == (1, 2)
    limits.end_client()
    limits.end_login(1)
    limits.end_login(2)
    assert counts(limits) == (0, 0)


def test_one_client_more_than_allowed_is_refused_and_not_counted() -> None:
    limits = Limits(2, 10)
    limits.begin_client()
    limits.begin_client()
    with pytest.raises(GatewayFault) as raised:
        limits.begin_client()
    assert (raised.value.sqlstate, raised.value.told) == (TOO_MANY_CONNECTIONS, b"sorry, too many clients already")
    assert raised.value.detail == "2 clients (max_clients)"
    assert limits.clients == 2
    limits.end_client()
    limits.begin_client()
    assert limits.clients == 2


def test_the_one_silent_for_longest_makes_way() -> None:
    limits = Limits(10, 2)
    newcomers = [Newcomer(limits, number) for number in range(4)]
    assert [len(each.evicted) for each in newcomers] == [1, 1, 0, 0]
    (fault,) = newcomers[0].evicted
    assert isinstance(fault, GatewayFault)
    assert (fault.sqlstate, fault.told) == (TOO_MANY_CONNECTIONS, b"sorry, too many clients already")
    assert fault.detail == "made way for a newer client: it had said nothing (max_logins)"
    # Until it has gone it counts.
    assert limits.logins == 4


def test_one_that_has_named_itself_keeps_its_place() -> None:
    limits = Limits(10, 2)
    first, second = Newcomer(limits, 1), Newcomer(limits, 2)
    limits.named(1)
    third = Newcomer(limits, 3)
    assert [len(each.evicted) for each in (first, second, third)] == [0, 1, 0]


def test_when_all_have_named_themselves_the_newcomer_is_refused() -> None:
    limits = Limits(10, 2)
    for number in range(2):
        Newcomer(limits, number)
        limits.named(number)
    with pytest.raises(GatewayFault) as raised:
        Newcomer(limits, 3)
    assert raised.value.sqlstate == TOO_MANY_CONNECTIONS
    assert raised.value.detail == "2 logins in progress (max_logins)"
    assert limits.logins == 2


def test_nobody_is_asked_to_make_way_twice() -> None:
    limits = Limits(10, 1)
    newcomers = [Newcomer(limits, number) for number in range(3)]
    assert [len(each.evicted) for each in newcomers] == [1, 1, 0]


def test_a_login_that_is_over_makes_way_for_nobody() -> None:
    limits = Limits(10, 1)
    first = Newcomer(limits, 1)
    limits.end_login(1)
    second = Newcomer(limits, 2)
    assert first.evicted == second.evicted == []
    assert limits.logins == 1


def test_naming_itself_late_or_twice_does_no_harm() -> None:
    limits = Limits(10, 1)
    Newcomer(limits, 1)
    Newcomer(limits, 2)
    limits.named(1)
    limits.named(2)
    limits.named(2)
    with pytest.raises(GatewayFault):
        Newcomer(limits, 3)
