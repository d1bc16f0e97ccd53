"""Limits and deadlines on the clients' side: each is reached, and whoever is turned away leaves nothing behind."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgauthproxy.proto import scram
from tests.conftest import Gateway, StartGateway, WriteAuthenticator
from tests.system.conftest import (
    FEW_DESCRIPTORS,
    STEPS,
    Holding,
    Run,
    assert_one_clear_line,
    assert_serves,
    configure,
    limited_to,
    wait_until,
)
from tests.wire import (
    RESET_ON_CLOSE,
    RawClient,
    ScriptedTarget,
    cancel_request,
    greet,
    message,
    password,
    query,
    raw_startup,
    startup,
)

MEGABYTE = 1024 * 1024
TIMED_OUT = ("28000", "canceling authentication due to timeout")
TOO_MANY = ("53300", "sorry, too many clients already")
LEFT = "client left during its login"

VERIFIER = scram.Verifier.of(b"secret", b"0123456789abcdef", 1000).text().decode()
ROOT: dict[str, Any] = {"admin": {"users": {"root": VERIFIER}}}

StartHolding = Callable[..., Holding]


@contextlib.contextmanager
def silent_clients(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Many connections at once that say nothing; nobody waits for them to be accepted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients: list[socket.socket] = []
    try:
        for _ in range(count):
            clients.append(socket.socket())
            clients[-1].setblocking(False)
            clients[-1].connect_ex(("127.0.0.1", port))
        yield clients
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Sizes


def test_the_longest_startup_packet_can_be_set(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, max_startup_packet=100)
    short = raw_startup(b"user\0" + b"x" * (100 - 8 - 5 - 2) + b"\0\0")
    assert len(short) == 100
    with RawClient(gateway.port) as client:
        client.send(short)
        assert client.read_message()[0] == b"R"
    with RawClient(gateway.port) as client:
        client.send(struct.pack("!i", 101))
        assert client.read_to_end() == b""
    reason = gateway.wait_for("refused", sqlstate="08P01", reason="startup packet of length 101, allowed are 8 to 100")
    assert reason["fault_of"] == "client"


def test_the_longest_password_message_can_be_set(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, max_password_message=41)
    assert_serves(gateway.port)
    with RawClient(gateway.port) as client:
        client.send(startup() + b"p" + struct.pack("!i", 42))
        client.read_message()
        assert client.read_fatal() == ("08P01", "expected a valid password message")
    gateway.wait_for("refused", reason="instead of a password: message 'p' of length 42, allowed are 4 to 41")


def test_a_client_that_pours_behind_its_password_is_held_up_and_takes_no_memory(holding: StartHolding) -> None:
    held = holding()
    with RawClient(held.port) as client:
        held.bring(client, STEPS["while the authenticator runs"])
        before = held.gateway.resident_bytes
        client.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.socket.sendall(bytes(100 * MEGABYTE))
        assert held.gateway.resident_bytes - before < 2 * MEGABYTE


# The deadline of a login


@pytest.mark.parametrize("where", STEPS)
def test_a_login_that_takes_too_long_ends_wherever_it_is(holding: StartHolding, where: str) -> None:
    held = holding(login_timeout=1, max_clients=1, max_clients_per_user=1, max_clients_per_address=1)
    with RawClient(held.port) as client:
        held.bring(client, STEPS[where])
        assert client.read_fatal() == TIMED_OUT
    line = held.gateway.wait_for("refused", sqlstate="28000")
    assert line["reason"] == "login_timeout: the login took too long"
    held.wait_until_clean()
    assert_serves(held.port)


@pytest.mark.parametrize(
    "sent", [startup(filling="x" * 5000), startup() + password("x" * 5000)], ids=["startup", "password"]
)
def test_a_client_that_sends_a_byte_now_and_then_gets_no_more_time(holding: StartHolding, sent: bytes) -> None:
    held = holding(login_timeout=1)
    with RawClient(held.port) as client:
        client.send(sent[: len(startup())])
        for at in range(len(startup()), len(sent)):
            client.send(sent[at : at + 1])
            readable, _, _ = select.select([client.socket], [], [], 0.01)
            if readable and client.socket.recv(1, socket.MSG_PEEK) == b"E":
                break
            if readable:
                assert client.read_message()[0] == b"R"
        assert client.read_fatal() == TIMED_OUT
    held.wait_until_clean()


def test_the_deadline_of_a_login_is_none_of_the_session(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, login_timeout=0.4)
    with RawClient(gateway.port) as client:
        client.log_in()
        client.send(query("select pg_sleep(0.8)"))
        client.read_until(b"Z")
        client.assert_served()


# Clients


def test_one_client_more_than_allowed_is_refused_until_another_leaves(
    start_gateway: StartGateway, mapped: Path
) -> None:
    gateway = start_gateway(mapped, max_clients=2)
    with RawClient(gateway.port) as first, RawClient(gateway.port) as second:
        first.log_in()
        second.log_in()
        with RawClient(gateway.port) as third:
            third.send(startup())
            assert third.read_fatal() == TOO_MANY
        line = gateway.wait_for("refused", sqlstate="53300")
        assert (line["fault_of"], line["reason"], line["user"]) == ("gateway", "2 clients (max_clients)", "alice")
        first.assert_served()
        first.send(message(b"X"))
        gateway.wait_for("session ended")
        assert_serves(gateway.port)
        second.assert_served()


def test_a_full_gateway_still_passes_cancel_requests_on(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, max_clients=1)
    with RawClient(gateway.port) as client:
        key = next(body for kind, body in client.log_in() if kind == b"K")
        with RawClient(gateway.port) as canceller:
            canceller.send(raw_startup(key, 80877102))
            assert canceller.read_to_end() == b""
        assert gateway.wait_for("cancel request")["outcome"] == "passed on"


def test_who_says_nothing_takes_no_clients_place(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, max_clients=2)
    before = gateway.sockets
    with silent_clients(gateway.port, 20), RawClient(gateway.port) as first, RawClient(gateway.port) as second:
        wait_until(lambda: gateway.sockets == before + 22, "all to be accepted")
        first.log_in()
        second.log_in()
        first.assert_served()
        second.assert_served()


# Users and addresses


def test_a_user_has_no_more_places_than_allowed(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, max_clients_per_user=1)
    with RawClient(gateway.port) as first, RawClient(gateway.port, source="127.0.0.2") as second:
        first.log_in(user="alice")
        second.send(startup(user="alice") + password())
        second.read_message()
        assert second.read_fatal() == TOO_MANY
        line = gateway.wait_for("refused", sqlstate="53300")
        assert (line["user"], line["reason"]) == ("alice", "1 clients of this user (max_clients_per_user)")
        assert_serves(gateway.port, user="bob")
        first.send(message(b"X"))
        gateway.wait_for("session ended", count=2)
        assert_serves(gateway.port, user="alice")


def test_whoever_only_says_to_be_a_user_takes_none_of_its_places(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, max_clients_per_user=1)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            claims = stack.enter_context(RawClient(gateway.port))
            claims.send(startup(user="alice"))
            assert claims.read_message()[0] == b"R"
        assert_serves(gateway.port, user="alice")


def test_an_address_has_no_more_places_than_allowed(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, max_clients_per_address=2)
    with RawClient(gateway.port) as first, RawClient(gateway.port) as second:
        key = next(body for kind, body in first.log_in() if kind == b"K")
        second.send(startup(user="bob"))
        assert second.read_message()[0] == b"R"
        with RawClient(gateway.port) as third:
            third.send(startup(user="carol"))
            assert third.read_fatal() == TOO_MANY
        line = gateway.wait_for("refused", sqlstate="53300")
        assert line["reason"] == "2 clients of this address (max_clients_per_address)"
        with RawClient(gateway.port) as canceller:
            canceller.send(cancel_request(key))
            assert canceller.read_to_end() == b""
        assert gateway.wait_for("cancel request")["outcome"] == "passed on"
        with RawClient(gateway.port, source="127.0.0.2") as elsewhere:
            elsewhere.log_in()
        second.socket.close()
        gateway.wait_for("refused", user="bob", reason=LEFT)
        assert_serves(gateway.port)


def test_places_are_kept_for_users_that_prove_who_they_are(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(
        mapped, max_clients=2, reserved_clients=1, admin={"users": {"mallory": VERIFIER, "root": VERIFIER}}
    )
    with RawClient(gateway.port) as first, RawClient(gateway.port) as claims, RawClient(gateway.port) as admin:
        first.log_in()
        with RawClient(gateway.port) as second:
            second.send(startup())
            assert second.read_fatal() == TOO_MANY
        line = gateway.wait_for("refused", sqlstate="53300")
        assert line["reason"] == "1 clients (max_clients), 1 kept free (reserved_clients)"
        # It may go on, and takes nothing by that.
        claims.send(startup(user="mallory"))
        assert claims.read_message()[0] == b"R"
        admin.log_in(user="root")
        admin.assert_served()
        claims.send(password())
        assert claims.read_fatal()[0] == "28P01"
        with RawClient(gateway.port) as another:
            another.send(startup(user="root") + password())
            another.read_message()
            assert another.read_fatal() == TOO_MANY
        gateway.wait_for("refused", reason="2 clients (max_clients), none kept free any more")


def test_every_way_out_gives_places_back(holding: StartHolding) -> None:
    held = holding(max_clients=2, max_clients_per_user=1, max_clients_per_address=2, reserved_clients=1, **ROOT)
    for user in ("alice", "root"):
        assert_serves(held.port, user=user)
        held.wait_until_clean()
        with RawClient(held.port) as client:
            client.send(startup(user=user) + password("not an MD5"))
            client.read_message()
            assert client.read_fatal()[0] == "28P01"
        held.wait_until_clean()
        with RawClient(held.port) as client:
            client.log_in(user=user)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        held.wait_until_clean()
        assert_serves(held.port, user=user)
        held.wait_until_clean()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"reserved_clients": 1}, "reserved_clients: needs admin.users"),
        (ROOT | {"max_clients": 5, "reserved_clients": 5}, "reserved_clients: leaves nothing of max_clients"),
    ],
)
def test_a_reserve_that_makes_no_sense_stops_the_start(
    folder: Path, run: Run, settings: dict[str, Any], fault: str
) -> None:
    configure(folder, **settings)
    assert_one_clear_line(run(), fault)


# Logins at once


@pytest.mark.parametrize("said", [b"", startup()[:20]], ids=["nothing", "half a startup packet"])
def test_who_has_said_nothing_for_longest_makes_way(start_gateway: StartGateway, mapped: Path, said: bytes) -> None:
    gateway = start_gateway(mapped, max_logins=2)
    before = gateway.sockets
    with RawClient(gateway.port) as first:
        first.send(said)
        wait_until(lambda: gateway.sockets == before + 1, "the first")
        with RawClient(gateway.port) as second:
            wait_until(lambda: gateway.sockets == before + 2, "the second")
            with RawClient(gateway.port) as third:
                third.log_in()
                assert first.read_fatal() == TOO_MANY
                second.log_in()
                second.assert_served()
                third.assert_served()
    line = gateway.wait_for("refused")
    assert line["reason"] == "made way for a newer client: it had said nothing (max_logins)"


def test_who_has_named_itself_keeps_its_place(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, max_logins=2)
    with RawClient(gateway.port) as first, RawClient(gateway.port) as second:
        for client in (first, second):
            client.send(startup())
            assert client.read_message()[0] == b"R"
        with RawClient(gateway.port) as third:
            assert third.read_fatal() == TOO_MANY
        assert gateway.wait_for("refused")["reason"] == "2 logins in progress (max_logins)"
        second.send(password())
        second.read_until(b"Z")
        assert_serves(gateway.port)
        first.send(password())
        first.read_until(b"Z")
        first.assert_served()
        second.assert_served()


def test_a_flood_of_connections_that_never_log_in_keeps_nobody_out(gateway: Gateway) -> None:
    before = gateway.sockets
    count = min(2500, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 2 - 100)
    with silent_clients(gateway.port, count), silent_clients(gateway.port, count):
        for _ in range(10):
            assert_serves(gateway.port)
        # The kernel, with more of them than the backlog holds, forgets some for good.
        wait_until(lambda: len(gateway.log_lines("refused")) > count, "most of them to have made way")
        wait_until(lambda: gateway.sockets - before <= 512, "no more of them than may log in at once")
        assert_serves(gateway.port)
    wait_until(lambda: gateway.sockets == before, "all to be gone")
    assert_serves(gateway.port)


def test_the_backlog_can_be_set(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, backlog=77)
    shown = subprocess.run(
        ["ss", "-Hltn", f"sport = :{gateway.port}"], capture_output=True, text=True, timeout=20, check=True
    )
    assert shown.stdout.split()[2] == "77"


# Descriptors


def test_few_descriptors_mean_few_clients_and_a_warning(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, before=limited_to(FEW_DESCRIPTORS), authenticator={"max_parallel": 4})
    for name, asked_for in (("max_clients", 10_000), ("max_logins", 512)):
        line = gateway.wait_for(f"{name} lowered to what the limit on descriptors allows")
        assert (line["level"], line["asked_for"], line["descriptors"]) == ("warning", asked_for, FEW_DESCRIPTORS)
    allowed = gateway.wait_for("max_clients lowered to what the limit on descriptors allows")["max_clients"]
    assert 10 < allowed < FEW_DESCRIPTORS / 2
    with contextlib.ExitStack() as stack:
        for _ in range(allowed):
            stack.enter_context(RawClient(gateway.port)).log_in()
        with RawClient(gateway.port) as another:
            another.send(startup())
            assert another.read_fatal() == TOO_MANY
        assert gateway.descriptors < FEW_DESCRIPTORS
    assert not gateway.log_lines("accepting pauses")


@pytest.mark.parametrize("links", [(100,), (40, 60)])
def test_connections_to_services_count_as_descriptors(links: tuple[int, ...], start_gateway: StartGateway) -> None:
    chain = [{"http": {"url": "http://localhost:1/", "max_in_flight": number}} for number in links]
    settings = chain[0] if len(chain) == 1 else {"chain": chain}
    gateway = start_gateway(
        [], before=limited_to(FEW_DESCRIPTORS), authenticator=settings, max_clients=20, max_logins=9
    )
    # Of 200, 64 are for itself and 100 for the services.
    assert gateway.wait_for("max_clients lowered to what the limit on descriptors allows")["max_clients"] == 13


def test_enough_descriptors_mean_no_warning(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, before=limited_to(FEW_DESCRIPTORS), max_clients=10, max_logins=10)
    assert not [line for line in gateway.log_lines() if line["level"] == "warning"]


def test_the_silent_cannot_take_all_descriptors(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, before=limited_to(FEW_DESCRIPTORS))
    before = gateway.sockets
    with silent_clients(gateway.port, 2 * FEW_DESCRIPTORS):
        wait_until(lambda: len(gateway.log_lines("refused")) > FEW_DESCRIPTORS, "the flood to be dealt with")
        assert_serves(gateway.port)
    wait_until(lambda: gateway.sockets == before, "all to be gone")
    assert_serves(gateway.port)


def test_running_out_of_descriptors_pauses_accepting_and_does_not_spin(
    start_gateway: StartGateway, mapped: Path
) -> None:
    gateway = start_gateway(mapped)
    soft, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
    with RawClient(gateway.port) as session, contextlib.ExitStack() as stack:
        session.log_in()
        resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (gateway.descriptors, hard))
        waiting = [stack.enter_context(RawClient(gateway.port)) for _ in range(20)]
        gateway.wait_for("accepting pauses", reason="Too many open files")
        used, began = gateway.cpu_seconds, time.monotonic()
        gateway.wait_for("accepting pauses", count=4)
        assert gateway.cpu_seconds - used < (time.monotonic() - began) / 5
        session.assert_served()
        resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (soft, hard))
        for client in waiting:
            client.log_in()
            client.assert_served()


def test_running_out_of_descriptors_at_any_step_costs_that_login_alone(
    start_gateway: StartGateway, mapped: Path
) -> None:
    gateway = start_gateway(mapped, authenticator={"max_parallel": 1})
    assert_serves(gateway.port)
    gateway.wait_for("session ended")
    at_rest = gateway.descriptors
    soft, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
    ends = []
    for more in range(1, 12):
        resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (at_rest + more, hard))
        with RawClient(gateway.port) as client:
            client.send(startup() + password())
            assert client.read_message()[0] == b"R"
            while (answer := client.read_message())[0] not in (b"Z", b"E"):
                continue
            ends.append(answer[0])
        resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (soft, hard))
        wait_until(lambda: gateway.descriptors == at_rest, "everything to be given back")
        assert_serves(gateway.port)
        wait_until(lambda: gateway.descriptors == at_rest, "everything to be given back")
    assert (ends[0], ends[-1]) == (b"E", b"Z")
    assert {line["sqlstate"] for line in gateway.log_lines("refused")} <= {"58000", "08001"}


# Clients that go


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("where", STEPS)
def test_a_client_that_goes_at_any_step_leaves_nothing_behind(
    holding: StartHolding, where: str, *, reset: bool
) -> None:
    held = holding(max_clients=1, max_logins=1, max_clients_per_user=1, max_clients_per_address=1)

    def come_and_go() -> None:
        with RawClient(held.port) as client:
            held.bring(client, STEPS[where])
            if reset:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        held.wait_until_clean()

    come_and_go()
    descriptors = held.gateway.descriptors
    for _ in range(3):
        come_and_go()
    assert held.gateway.descriptors == descriptors
    held.gateway.wait_for("refused", count=4, reason=LEFT)
    assert {line["reason"] for line in held.gateway.log_lines("refused")} == {LEFT}
    # A place that was not given back would be missed here.
    assert_serves(held.port)


def test_a_client_that_goes_while_its_authenticator_waits_for_its_turn_is_never_asked_about(
    start_gateway: StartGateway, authenticator: WriteAuthenticator, tmp_path: Path
) -> None:
    asked, go_on = tmp_path / "asked", tmp_path / "go-on"
    script = authenticator(
        f"echo $user >>'{asked}'\nwhile [ $user = first ] && ! [ -e '{go_on}' ]; do sleep 0.01; done\nexit 1"
    )
    gateway = start_gateway(script, authenticator={"max_parallel": 1})
    with RawClient(gateway.port) as first:
        first.send(startup(user="first") + password())
        wait_until(asked.exists, "the first authenticator")
        with RawClient(gateway.port) as second, RawClient(gateway.port) as third:
            for client, user in ((second, "second"), (third, "third")):
                client.send(startup(user=user) + password())
                assert client.read_message()[0] == b"R"
            second.socket.close()
            gateway.wait_for("refused", user="second", reason=LEFT)
            go_on.touch()
            assert third.read_fatal()[0] == "28P01"
    assert asked.read_text().split() == ["first", "third"]


def test_a_client_that_does_not_take_its_last_bytes_is_waited_for_no_longer_than_allowed(
    mapped_to: Callable[..., Gateway],
) -> None:
    def pour(connection: socket.socket) -> None:
        greet(connection)
        while True:
            connection.sendall(bytes(MEGABYTE))

    with ScriptedTarget(pour) as target:
        lines = {"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "x", "_META_SESSION_SECONDS": "0.5"}
        gateway = mapped_to(lines, close_timeout=0.3)
        before = gateway.sockets
        with RawClient(gateway.port) as client:
            client.log_in()
            assert gateway.wait_for("session ended")["why"] == "time limit reached"
            wait_until(lambda: gateway.sockets == before, "both connections to be gone")


def test_a_target_that_does_not_take_its_last_bytes_is_waited_for_no_longer_than_allowed(
    mapped_to: Callable[..., Gateway],
) -> None:
    done = threading.Event()

    def read_nothing(connection: socket.socket) -> None:
        greet(connection)
        done.wait(30)

    with ScriptedTarget(read_nothing) as target:
        lines = {"_META_TARGET_HOST": f"127.0.0.1:{target.port}", "user": "x", "_META_SESSION_SECONDS": "0.5"}
        gateway = mapped_to(lines, close_timeout=0.3)
        before = gateway.sockets
        with RawClient(gateway.port) as client:
            client.log_in()
            with contextlib.suppress(ConnectionError):
                client.send(bytes(100 * MEGABYTE))
        try:
            assert gateway.wait_for("session ended")["why"] == "time limit reached"
            wait_until(lambda: gateway.sockets == before, "both connections to be gone")
        finally:
            done.set()
