"""Who gets a place, and who makes way."""

from __future__ import annotations

import os

import pytest

from pgauthproxy._ledger import Ledger
from pgauthproxy.auth.networks import network_key
from pgauthproxy.errors import TOO_MANY_CONNECTIONS, Fault, GatewayFault
from pgauthproxy.gateway.limits import Limits, Place


class Newcomer:
    """Begins a login; keeps why it had to make way."""

    def __init__(self, limits: Limits, number: int) -> None:
        self.evicted: list[Fault] = []
        limits.begin_login(number, self.evicted.append)


USER, ADDRESS = b"alice", "192.0.2.1:1"


def counts(limits: Limits) -> tuple[int, int]:
    return limits.clients, limits.logins


def test_what_is_taken_is_given_back() -> None:
    limits = Limits(10, 10)
    for number in range(3):
        Newcomer(limits, number)
    assert counts(limits) == (0, 3)
    limits.named(0)
    place = limits.begin_client(USER, ADDRESS)
    assert counts(limits) == (1, 3)
    limits.end_login(0)
    assert counts(limits) == (1, 2)
    limits.end_client(place)
    limits.end_login(1)
    limits.end_login(2)
    assert counts(limits) == (0, 0)


def test_one_client_more_than_allowed_is_refused_and_not_counted() -> None:
    limits = Limits(2, 10)
    place = limits.begin_client(USER, ADDRESS)
    limits.begin_client(USER, ADDRESS)
    with pytest.raises(GatewayFault) as raised:
        limits.begin_client(USER, ADDRESS)
    assert (raised.value.sqlstate, raised.value.told) == (TOO_MANY_CONNECTIONS, b"sorry, too many clients already")
    assert raised.value.detail == "2 clients (max_clients)"
    assert limits.clients == 2
    limits.end_client(place)
    limits.begin_client(USER, ADDRESS)
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


# Users and addresses


def let_in(limits: Limits, user: bytes = USER, address: str = ADDRESS) -> Place:
    """A client that has proved who it is."""
    place = limits.begin_client(user, address)
    try:
        limits.prove(place, user)
    except GatewayFault:
        limits.end_client(place)
        raise
    return place


def refusal(limits: Limits, user: bytes = USER, address: str = ADDRESS) -> str:
    """Why such a client has no place."""
    before = counts(limits)
    with pytest.raises(GatewayFault) as raised:
        let_in(limits, user, address)
    assert (raised.value.sqlstate, raised.value.told) == (TOO_MANY_CONNECTIONS, b"sorry, too many clients already")
    assert counts(limits) == before
    return raised.value.detail


def test_a_user_has_so_many_places_wherever_it_comes_from() -> None:
    limits = Limits(10, 10, per_user=2)
    place = let_in(limits, b"alice", "192.0.2.1:1")
    let_in(limits, b"alice", "192.0.2.2:1")
    assert refusal(limits, b"alice", "192.0.2.3:1") == "2 clients of this user (max_clients_per_user)"
    let_in(limits, b"bob", "192.0.2.1:1")
    limits.end_client(place)
    let_in(limits, b"alice", "192.0.2.3:1")


def test_whoever_only_says_to_be_a_user_takes_none_of_its_places() -> None:
    limits = Limits(10, 10, per_user=1)
    claims = [limits.begin_client(b"alice", ADDRESS) for _ in range(3)]
    place = let_in(limits, b"alice")
    for claim in claims:
        limits.end_client(claim)
    assert limits.clients == 1
    limits.end_client(place)
    let_in(limits, b"alice")


@pytest.mark.parametrize(
    ("address", "same", "other"),
    [
        ("192.0.2.1:1", "192.0.2.1:2", "192.0.2.2:1"),
        ("[2001:db8::1]:1", "[2001:db8::ffff:0:0:2]:1", "[2001:db8:0:1::1]:1"),
    ],
)
def test_an_address_has_so_many_places_whoever_it_says_it_is(address: str, same: str, other: str) -> None:
    limits = Limits(10, 10, per_address=2)
    place = limits.begin_client(b"alice", address)
    let_in(limits, b"bob", same)
    assert refusal(limits, b"carol", same) == "2 clients of this address (max_clients_per_address)"
    let_in(limits, b"alice", other)
    limits.end_client(place)
    let_in(limits, b"alice", address)


def test_unix_sockets_are_no_address() -> None:
    limits = Limits(10, 10, per_address=1)
    for _ in range(3):
        let_in(limits, address="[local]")
    assert limits.clients == 3


def test_no_key_of_one_address_is_anothers() -> None:
    addresses = ["[local]", "192.0.2.1:1", "192.0.2.2:1", "[c000:201::1]:1", "[2001:db8::1]:1", "[::1]:1"]
    assert len({network_key(address) for address in addresses}) == len(addresses)
    assert network_key("[fe80::1%eth0]:1") == network_key("[fe80::2]:7")


def test_a_place_is_given_back_once() -> None:
    limits = Limits(10, 10, per_user=3, per_address=3)
    first, second = let_in(limits), let_in(limits)
    for _ in range(3):
        limits.end_client(first)
    assert limits.clients == 1
    assert [let_in(limits).user for _ in range(2)] == [second.user] * 2
    assert refusal(limits)


# Places that are kept


def kept(max_clients: int = 3, reserved: int = 1) -> Limits:
    return Limits(max_clients, 10, reserved=reserved, reserved_for=frozenset({b"admin"}))


def test_some_places_are_kept_for_some_users() -> None:
    limits = kept()
    places = [let_in(limits, b"alice") for _ in range(2)]
    assert refusal(limits, b"alice") == "2 clients (max_clients), 1 kept free (reserved_clients)"
    places.append(let_in(limits, b"admin"))
    assert refusal(limits, b"admin") == "3 clients (max_clients), none kept free any more"
    limits.end_client(places[0])
    # The place that is free now is the one that is kept.
    assert refusal(limits, b"alice")
    places[0] = let_in(limits, b"admin")
    for place in places:
        limits.end_client(place)
    assert counts(limits) == (0, 0)


def test_whoever_only_says_to_be_such_a_user_takes_none_of_those() -> None:
    limits = kept()
    taken = [let_in(limits, b"alice") for _ in range(2)]
    claims = [limits.begin_client(b"admin", ADDRESS) for _ in range(5)]
    assert limits.clients == 2
    admin = let_in(limits, b"admin")
    for place in (*claims, *taken, admin):
        limits.end_client(place)
    assert limits.clients == 0


# Several processes


def test_limits_hold_for_all_workers_together() -> None:
    memory = os.memfd_create("ledger")
    one, other = (Limits(2, 1, per_user=1, ledger=Ledger(memory, slot)) for slot in range(2))
    place = let_in(one, b"alice")
    assert refusal(other, b"alice") == "1 clients of this user (max_clients_per_user)"
    let_in(other, b"bob")
    assert refusal(one, b"carol") == "2 clients (max_clients)"
    one.end_client(place)
    let_in(other, b"alice")
    Newcomer(one, 1)
    with pytest.raises(GatewayFault, match="1 logins in progress"):
        Newcomer(other, 1)
    # The one that died held what is free now.
    Ledger(memory).clear_slot(0)
    Newcomer(other, 1)
    os.close(memory)


# Descriptors of one process


def test_what_a_process_has_descriptors_for_bounds_its_own_clients_alone() -> None:
    shared = os.memfd_create("limits")
    here, there = (Limits(10, 10, ledger=Ledger(shared, slot)) for slot in range(2))
    os.close(shared)
    here.own_clients = 2
    place = let_in(here)
    here.take_up(USER, ADDRESS)
    assert refusal(here) == "2 clients in this worker, which has no descriptors for more"
    for _ in range(3):
        let_in(there)
    assert here.clients == 5
    here.end_client(place)
    here.end_client(place)
    let_in(here)
    assert refusal(here) == "2 clients in this worker, which has no descriptors for more"


def test_places_that_are_kept_are_kept_of_the_descriptors_too() -> None:
    limits = Limits(10, 10, reserved=1, reserved_for=frozenset([b"root"]))
    limits.own_clients = 2
    let_in(limits)
    assert (
        refusal(limits) == "1 clients in this worker, which has no descriptors for more, 1 kept free (reserved_clients)"
    )
    let_in(limits, b"root")
    assert (
        refusal(limits, b"root")
        == "2 clients in this worker, which has no descriptors for more, none kept free any more"
    )


def test_where_all_places_are_taken_that_is_said_and_not_descriptors() -> None:
    limits = Limits(2, 10)
    limits.own_clients = 2
    let_in(limits)
    let_in(limits)
    assert refusal(limits) == "2 clients (max_clients)"
