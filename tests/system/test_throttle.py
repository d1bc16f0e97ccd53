"""Whoever guesses passwords waits, and then is refused; nobody else is, and no right login counts as a guess."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway, WriteAuthenticator
from tests.system.conftest import Run, assert_one_clear_line, configure, wait_until
from tests.wire import RawClient, error_fields, message, password, proxy_v1, startup

RIGHT = "right"
BLOCKED = ("28000", "too many failed logins")
ATTACKER, OTHER = "192.0.2.66", "198.51.100.1"
BALANCED: dict[str, Any] = {
    "listen": [{"address": "127.0.0.1:0", "proxy_protocol": True}],
    "proxy_protocol_from": ["127.0.0.1"],
}
SHORT = {"failures": 2, "delay": 0.01, "max_delay": 0.02}
"""The fourth failure makes an address one that is refused."""
LONG = {"failures": 1, "delay": 1000, "max_delay": 1000, "block": 0}
"""Whoever has failed once waits for as long as a login may take."""

SPRAYED = 4000
"""Addresses, several times as many as are remembered."""

StartGuarded = Callable[..., Gateway]


@pytest.fixture
def guarded(
    start_gateway: StartGateway, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres
) -> StartGuarded:
    """Starts gateways for which a balancer says where clients come from; the password of everybody is RIGHT.

    `broken` breaks the authenticator, `unreachable` has no target.
    """
    script = authenticator(
        f"port={postgres.port}\n"
        "[ $user = broken ] && exit 0\n"
        "[ $user = unreachable ] && port=1\n"
        'echo "_META_TARGET_HOST=127.0.0.1:$port"\n'
        "echo user=postgres\n"
        "echo database=postgres\n"
        f"[ $(field _SOURCE_CRED) = {RIGHT} ]"
    )

    def start(throttle: dict[str, Any], **settings: Any) -> Gateway:
        kind = {"cleartext_password": True}
        return start_gateway(script, authenticator=kind, throttle=throttle, **(BALANCED | settings))

    return start


@contextlib.contextmanager
def client_of(gateway: Gateway, address: str, user: str, answer: str = "wrong") -> Iterator[RawClient]:
    """A client that has sent all that it has to say."""
    with RawClient(gateway.port) as client:
        client.send(proxy_v1(address) + startup(user=user) + password(answer))
        yield client


def refusal(gateway: Gateway, address: str, user: str, answer: str = "wrong") -> tuple[str, str]:
    """What such a client is told, whenever it is."""
    with client_of(gateway, address, user, answer) as client:
        # It is asked for its password before that, unless it is refused at once.
        _, error = client.read_until(b"E")[-1]
        assert client.read_to_end() == b""
    fields = error_fields(error)
    return fields["C"], fields["M"]


def assert_let_in(gateway: Gateway, address: str, user: str) -> None:
    with client_of(gateway, address, user, RIGHT) as client:
        client.read_until(b"Z")
        client.assert_served()


def test_an_address_that_keeps_failing_is_refused_whoever_it_says_it_is(guarded: StartGuarded) -> None:
    gateway = guarded(SHORT)
    told = [refusal(gateway, ATTACKER, f"user{number}")[0] for number in range(5)]
    assert told == ["28P01", "28P01", "28P01", "28000", "28000"]
    assert refusal(gateway, ATTACKER, "alice", RIGHT) == BLOCKED
    with RawClient(gateway.port) as client:
        # Before any password.
        client.send(proxy_v1(ATTACKER) + startup())
        assert client.read_fatal() == BLOCKED
    assert_let_in(gateway, OTHER, "alice")
    line = gateway.wait_for("address refused for a while")
    assert (line["client"].rpartition(":")[0], line["failures"], line["seconds"]) == (ATTACKER, 4, 300)
    assert len(gateway.log_lines("address refused for a while")) == 1
    refused = gateway.wait_for("refused", sqlstate="28000", count=4)
    assert (refused["reason"], refused["fault_of"]) == ("too many failed logins of this address", "client")


def test_each_failure_makes_the_next_login_wait_for_longer(guarded: StartGuarded) -> None:
    gateway = guarded({"failures": 2, "delay": 0.1, "max_delay": 1000, "block": 0})
    took = []
    for _ in range(5):
        began = time.monotonic()
        assert refusal(gateway, ATTACKER, "alice")[0] == "28P01"
        took.append(time.monotonic() - began)
    for seconds, least in zip(took, (0, 0, 0.1, 0.2, 0.4), strict=True):
        assert seconds >= least, took


def test_the_block_ends(guarded: StartGuarded) -> None:
    gateway = guarded({"failures": 1, "delay": 0.02, "max_delay": 0.02, "block": 0.5})
    assert refusal(gateway, ATTACKER, "alice")[0] == "28P01"
    assert refusal(gateway, ATTACKER, "alice") == BLOCKED
    wait_until(lambda: is_let_in(gateway, ATTACKER, "bob"), "the block to end")


def is_let_in(gateway: Gateway, address: str, user: str) -> bool:
    with client_of(gateway, address, user, RIGHT) as client:
        while (kind := client.read_message()[0]) not in (b"Z", b"E"):
            continue
        return kind == b"Z"


def test_ipv6_addresses_of_one_network_are_one(guarded: StartGuarded) -> None:
    gateway = guarded(SHORT)
    for number in range(4):
        with RawClient(gateway.port) as client:
            header = proxy_v1(f"2001:db8::{number}")
            client.send(header + startup(user=f"user{number}") + password("wrong"))
            client.read_to_end()
    for address, answer in (("2001:db8::ffff:1", b"E"), ("2001:db8:0:1::1", b"R")):
        with RawClient(gateway.port) as client:
            client.send(proxy_v1(address) + startup())
            assert client.read_message()[0] == answer


def test_a_user_is_held_up_and_not_where_it_has_logged_in_before(guarded: StartGuarded) -> None:
    gateway = guarded(LONG)
    assert_let_in(gateway, OTHER, "alice")
    for number in range(3):
        with client_of(gateway, f"203.0.113.{number}", "alice") as client:
            client.read_message()
            if number == 0:
                assert client.read_fatal()[0] == "28P01"
    assert_let_in(gateway, OTHER, "alice")
    assert_let_in(gateway, "198.51.100.2", "bob")
    gateway.wait_for("refused", user="alice", count=3)
    assert [line["sqlstate"] for line in gateway.log_lines("refused")] == ["28P01", "08P01", "08P01"]


def test_a_login_that_waits_is_over_in_the_time_of_a_login(guarded: StartGuarded) -> None:
    gateway = guarded({"failures": 1, "delay": 0.1, "max_delay": 1000}, login_timeout=1)
    # No longer than half of it: the login itself still has its time.
    for _ in range(2):
        assert refusal(gateway, ATTACKER, "alice")[0] == "28P01"
    assert_let_in(gateway, ATTACKER, "alice")


def test_whoever_waits_can_leave_and_leaves_nothing_behind(guarded: StartGuarded) -> None:
    gateway = guarded(LONG, max_logins=5, max_clients=5, max_clients_per_address=5)
    before = gateway.sockets
    assert refusal(gateway, ATTACKER, "alice")[0] == "28P01"
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            for number in range(4):
                client = stack.enter_context(client_of(gateway, ATTACKER, f"user{number}", RIGHT))
                client.read_message()
            wait_until(lambda: gateway.sockets == before + 4, "four to wait")
            wait_until(lambda: is_told_that_too_many_wait(gateway), "all four to be held up")
            assert_let_in(gateway, OTHER, "bob")
        wait_until(lambda: gateway.sockets == before, "everything to be given back")
    assert_let_in(gateway, OTHER, "bob")


def is_told_that_too_many_wait(gateway: Gateway) -> bool:
    """Whether one more of the attacker's is turned away at once; if not, it leaves."""
    with client_of(gateway, ATTACKER, "one_more", RIGHT) as client:
        client.read_message()
        client.socket.settimeout(0.2)
        try:
            return client.read_fatal() == ("53300", "sorry, too many clients already")
        except TimeoutError:
            return False


def test_whoever_owns_an_account_cannot_use_it_to_go_on_guessing(guarded: StartGuarded) -> None:
    gateway = guarded(SHORT)
    for expected in ("28P01", "28P01", "28P01"):
        assert refusal(gateway, ATTACKER, "alice")[0] == expected
        assert_let_in(gateway, ATTACKER, "mallory")
    assert refusal(gateway, ATTACKER, "alice") == BLOCKED
    assert refusal(gateway, ATTACKER, "mallory", RIGHT) == BLOCKED


def test_whoever_mistypes_and_gets_it_right_begins_anew(guarded: StartGuarded) -> None:
    gateway = guarded(SHORT)
    for _ in range(3):
        for _ in range(3):
            assert refusal(gateway, ATTACKER, "alice")[0] == "28P01"
        assert_let_in(gateway, ATTACKER, "alice")


def test_what_is_not_the_clients_fault_is_no_failure(guarded: StartGuarded) -> None:
    gateway = guarded(LONG, max_clients=1, target={"connect_timeout": 1})
    assert refusal(gateway, ATTACKER, "broken", RIGHT)[0] == "58000"
    assert refusal(gateway, ATTACKER, "unreachable", RIGHT)[0] == "08001"
    with client_of(gateway, ATTACKER, "alice", RIGHT) as client:
        client.read_until(b"Z")
        assert refusal(gateway, ATTACKER, "alice", RIGHT)[0] == "53300"
    gateway.wait_for("session ended")
    with RawClient(gateway.port) as client:
        client.send(proxy_v1(ATTACKER) + startup() + message(b"Q", b"\0"))
        client.read_message()
        assert client.read_fatal()[0] == "08P01"
    with RawClient(gateway.port) as client:
        client.send(proxy_v1(ATTACKER) + startup())
        client.read_message()
    gateway.wait_for("refused", reason="client left during its login")
    assert_let_in(gateway, ATTACKER, "alice")


def test_a_spray_of_addresses_and_users_takes_no_memory_and_hides_no_attacker(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    (tmp_path / "guarding.py").write_text(
        "from pgauthproxy.authenticator import Denied, Mapping\n\n\n"
        "async def decide(request):\n"
        f"    if request.password != {RIGHT!r}:\n        raise Denied('wrong')\n"
        f"    return Mapping(host='127.0.0.1:{postgres.port}', user='postgres', database='postgres')\n"
    )
    kind = {"callable": "guarding:decide", "method": "cleartext"}
    gateway = start_gateway(None, authenticator=kind, throttle=SHORT | {"max_entries": 1024}, **BALANCED)

    def spray(numbers: range) -> set[str]:
        addresses = (
            f"2001:db8:{number:x}::1" if number % 2 else f"10.1.{number >> 8}.{number & 255}" for number in numbers
        )
        return {refusal(gateway, address, f"user {address}")[0] for address in addresses}

    assert spray(range(SPRAYED // 10)) == {"28P01"}
    before, descriptors = gateway.peak_bytes, gateway.descriptors
    with ThreadPoolExecutor(4) as threads:
        parts = threads.map(spray, (range(SPRAYED // 10 + part, SPRAYED, 4) for part in range(4)))
        assert set().union(*parts) == {"28P01"}
    assert gateway.peak_bytes - before < 4 << 20
    wait_until(lambda: gateway.descriptors <= descriptors, "all connections to be given back")
    assert [refusal(gateway, ATTACKER, "alice")[0] for _ in range(4)][-1] == "28000"
    assert_let_in(gateway, OTHER, "bob")


def test_this_machine_is_exempt_by_itself_and_those_that_a_balancer_there_names_are_not(guarded: StartGuarded) -> None:
    gateway = guarded(SHORT)
    for _ in range(6):
        assert refusal(gateway, "127.0.0.1", "nobody")[0] == "28P01"
    for _ in range(4):
        refusal(gateway, ATTACKER, "somebody")
    assert refusal(gateway, ATTACKER, "somebody") == BLOCKED


def test_exempt_networks_are_left_alone(guarded: StartGuarded) -> None:
    gateway = guarded(SHORT | {"exempt": ["192.0.2.0/24"]})
    for _ in range(8):
        assert refusal(gateway, ATTACKER, "alice")[0] == "28P01"
    assert_let_in(gateway, ATTACKER, "alice")
    assert_let_in(gateway, OTHER, "alice")


def test_it_is_on_unless_it_is_switched_off(guarded: StartGuarded) -> None:
    off, on = guarded({"failures": 0}), guarded({"delay": 0.001, "max_delay": 0.001})
    for gateway, last in ((off, "28P01"), (on, "28000")):
        told = [refusal(gateway, ATTACKER, "alice")[0] for _ in range(6)]
        assert told == ["28P01"] * 5 + [last]


# What the gateway compares itself


@pytest.mark.parametrize("method", ["scram-sha-256", "md5", "cleartext"])
def test_a_password_that_the_gateway_finds_wrong_is_a_failure(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path, method: str
) -> None:
    users = tmp_path / "users.yaml"
    users.touch(0o600)
    users.write_text(
        f"targets: {{main: {{host: '127.0.0.1:{postgres.port}', user: trusted, database: postgres}}}}\n"
        f"users: {{alice: {{verifier: {RIGHT}, databases: {{'*': main}}}}}}\n"
    )
    kind = {"kind": "users", "users": {"file": str(users)}, "method": method}
    gateway = start_gateway(None, authenticator=kind, throttle=SHORT | {"exempt": []})

    def log_in(user: str, answer: str) -> str:
        """Who it became, or why not."""
        try:
            with psycopg.connect(
                host="127.0.0.1", port=gateway.port, user=user, password=answer, dbname="postgres", sslmode="disable"
            ) as session:
                row = session.execute("select current_user").fetchone()
                assert row is not None
                return str(row[0])
        except psycopg.OperationalError as error:
            return str(error)

    assert log_in("alice", RIGHT) == "trusted"
    for user in ("alice", "nobody", "nobody"):
        assert f'password authentication failed for user "{user}"' in log_in(user, "wrong")
    assert "too many failed logins" in log_in("nobody", "wrong")
    assert "too many failed logins" in log_in("alice", RIGHT)


# The settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"delay": 2, "max_delay": 1}, ("throttle.max_delay: is less than throttle.delay",)),
        ({"exempt": ["10.0.0.1/8"]}, ("throttle.exempt: ", "host bits")),
        ({"failures": -1}, ("throttle.failures: ",)),
    ],
)
def test_settings_that_make_no_sense_stop_the_start(
    folder: Path, run: Run, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    configure(folder, throttle=settings)
    assert_one_clear_line(run(), *words)
