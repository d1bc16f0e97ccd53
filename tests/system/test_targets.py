"""Where the authenticator sends a session, and how the gateway proves itself there, against real servers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgauthproxy._relay import ForwardBuffer
from pgauthproxy.gateway.target_leg import TargetPolicy, Targets
from pgauthproxy.net.dial import TcpOptions
from pgauthproxy.proto import messages
from pgauthproxy.proto.target_login import TargetLimits
from pgauthproxy.stages import Accepted, Address, Granted, Mapping, Started, TargetTls
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import HBA, ROLES, Gateway
from tests.system.conftest import Answering, answering_gateway
from tests.wire import RawClient, ScriptedTarget, greet, message, query, read_startup

DEBIAN = Path("/usr/lib/postgresql/15/bin")
UMLAUT = "ⅸ¨Á\u00a0x"
PASSWORDS = {"clear": "clear secret", "hashed": "hashed secret", "scrammed": "scram secret", "umlaut": UMLAUT}
HASH = "md5" + hashlib.md5(b"hashed secrethashed").hexdigest()  # noqa: S324 (the protocol's own)
DEFAULT_PORT = 5432

WAYS_IN = [
    pytest.param("trusted", {}, id="trust"),
    pytest.param("trusted", {"_META_TARGET_CRED": "not asked for"}, id="trust with a credential"),
    pytest.param("clear", {"_META_TARGET_CRED": "clear secret"}, id="cleartext"),
    pytest.param("clear", {"_META_TARGET_PASSWORD": "clear secret"}, id="cleartext, password"),
    pytest.param("hashed", {"_META_TARGET_CRED": "hashed secret"}, id="md5"),
    pytest.param("hashed", {"_META_TARGET_CRED": HASH}, id="md5, hash"),
    pytest.param("hashed", {"_META_TARGET_PASSWORD": "hashed secret"}, id="md5, password"),
    pytest.param("scrammed", {"_META_TARGET_CRED": "scram secret"}, id="scram"),
    pytest.param("scrammed", {"_META_TARGET_PASSWORD": "scram secret"}, id="scram, password"),
    pytest.param("umlaut", {"_META_TARGET_CRED": UMLAUT}, id="scram, to be prepared"),
    pytest.param("umlaut", {"_META_TARGET_PASSWORD": "ix \u0308\u00c1 x"}, id="scram, prepared"),
    pytest.param("scrammed", {"_META_TARGET_CRED": "wrong", "_META_TARGET_PASSWORD": "scram secret"}, id="scram, both"),
]
WAYS_NOT_IN = [
    pytest.param("clear", {"_META_TARGET_CRED": "the wrong one"}, id="cleartext"),
    pytest.param("hashed", {"_META_TARGET_CRED": "the wrong one"}, id="md5"),
    pytest.param("hashed", {"_META_TARGET_CRED": "md5" + "0123456789abcdef" * 2}, id="md5, hash"),
    pytest.param("hashed", {"_META_TARGET_PASSWORD": HASH}, id="md5, hash as a password"),
    pytest.param("scrammed", {"_META_TARGET_CRED": "the wrong one"}, id="scram"),
    pytest.param("scrammed", {"_META_TARGET_CRED": HASH}, id="scram, hash"),
    pytest.param("clear", {"_META_TARGET_CRED": HASH}, id="cleartext, hash"),
    pytest.param("clear", {}, id="cleartext, none"),
    pytest.param("hashed", {}, id="md5, none"),
    pytest.param("scrammed", {}, id="scram, none"),
    pytest.param("nobody at all", {"_META_TARGET_CRED": "the wrong one"}, id="no such role"),
]


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answering]:
    with answering_gateway(tmp_path_factory.mktemp("answering")) as found:
        yield found


@pytest.fixture(scope="module")
def debian_postgres() -> Iterator[ThrowawayPostgres]:
    """PostgreSQL 15 with the same roles, where Debian's is installed."""
    if not DEBIAN.exists():
        pytest.skip(f"no {DEBIAN}")
    with ThrowawayPostgres(binaries=DEBIAN, hba=HBA) as server:
        server.sql(ROLES)
        yield server


def at(server: ThrowawayPostgres, user: str = "trusted", **more: str) -> dict[str, str]:
    """The lines that send somebody there."""
    return {"_META_TARGET_HOST": f"127.0.0.1:{server.port}", "user": user, "database": "postgres"} | more


# Methods


@pytest.mark.parametrize("role", PASSWORDS)
def test_libpq_gets_in_with_the_same_password(postgres: ThrowawayPostgres, role: str) -> None:
    where = {"host": "127.0.0.1", "port": postgres.port, "user": role, "dbname": "postgres"}
    with psycopg.connect(**where, password=PASSWORDS[role]) as session:
        assert session.execute("select current_user").fetchone() == (role,)


@pytest.mark.parametrize(("role", "credential"), WAYS_IN)
def test_the_gateway_logs_in_by_each_method(
    answering: Answering, postgres: ThrowawayPostgres, role: str, credential: dict[str, str]
) -> None:
    assert answering.asked(at(postgres, role) | credential, "select current_user") == role


@pytest.mark.parametrize(("role", "credential"), WAYS_IN)
def test_the_gateway_logs_in_at_an_older_server_by_each_method(
    answering: Answering, debian_postgres: ThrowawayPostgres, role: str, credential: dict[str, str]
) -> None:
    assert answering.asked(at(debian_postgres, role) | credential, "select current_user") == role


@pytest.mark.parametrize(("role", "credential"), WAYS_NOT_IN)
def test_a_credential_that_does_not_fit_is_none_of_the_clients_business(
    answering: Answering, postgres: ThrowawayPostgres, role: str, credential: dict[str, str]
) -> None:
    error, reason = answering.refused(at(postgres, role) | credential)
    assert (error["S"], error["C"]) == ("FATAL", "08004")
    told = " ".join(error.values())
    assert role not in told
    assert str(postgres.port) not in told
    assert "password" not in told
    assert "target" in reason
    log = answering.gateway.log.read_text()
    for secret in credential.values():
        assert secret not in log
        assert secret not in told


def test_the_true_reason_of_a_refusal_is_in_the_log(answering: Answering, postgres: ThrowawayPostgres) -> None:
    _, reason = answering.refused(at(postgres, "scrammed", _META_TARGET_CRED="the wrong one"))
    assert 'password authentication failed for user "scrammed"' in reason
    _, reason = answering.refused(at(postgres, "scrammed", _META_TARGET_CRED=HASH))
    assert "md5 credential" in reason


@pytest.fixture
def lookalike(postgres: ThrowawayPostgres) -> Iterator[tuple[str, str]]:
    """A role whose password looks like an MD5 credential, and that password."""
    role, secret = f"role_{uuid.uuid4().hex[:12]}", "md5" + "fedcba9876543210" * 2
    with psycopg.connect(host=str(postgres.folder), port=postgres.port, user="postgres", autocommit=True) as session:
        verifier = session.pgconn.encrypt_password(secret.encode(), role.encode(), b"scram-sha-256").decode()
        session.execute(f"create role {role} login password '{verifier}'")
        yield role, secret
        session.execute(f"drop role {role}")


def test_target_password_is_a_password_whatever_it_looks_like(
    answering: Answering, postgres: ThrowawayPostgres, lookalike: tuple[str, str]
) -> None:
    role, secret = lookalike
    assert answering.asked(at(postgres, role, _META_TARGET_PASSWORD=secret), "select current_user") == role
    error, _ = answering.refused(at(postgres, role, _META_TARGET_CRED=secret))
    assert error["C"] == "08004"


def test_many_logins_by_scram_all_succeed(answering: Answering, postgres: ThrowawayPostgres) -> None:
    lines = at(postgres, "scrammed", _META_TARGET_CRED="scram secret")
    assert {answering.asked(lines, "select current_user") for _ in range(10)} == {"scrammed"}


def test_a_cached_key_does_not_let_a_wrong_password_in(answering: Answering, postgres: ThrowawayPostgres) -> None:
    right = at(postgres, "scrammed", _META_TARGET_CRED="scram secret")
    assert answering.asked(right, "select current_user") == "scrammed"
    error, _ = answering.refused(right | {"_META_TARGET_CRED": "scram secret2"})
    assert error["C"] == "08004"


# Hosts


class TargetAt(ScriptedTarget):
    """A target that lets anybody in, on a socket of the test's choice."""

    def __init__(self, listening: socket.socket, script: Callable[[socket.socket], None] = greet) -> None:
        super().__init__(script)
        self._listening.close()
        self._listening = listening
        if listening.family != socket.AF_UNIX:
            self.port = listening.getsockname()[1]


def can_bind(family: socket.AddressFamily, host: str) -> bool:
    try:
        with socket.create_server((host, 0), family=family):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not can_bind(socket.AF_INET6, "::1"), reason="no ::1 on this machine")


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port of 127.0.0.1 that refuses, and that nobody else gets meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_a_host_may_be_a_name(answering: Answering, postgres: ThrowawayPostgres) -> None:
    lines = at(postgres) | {"_META_TARGET_HOST": f"localhost:{postgres.port}"}
    assert answering.asked(lines, "select inet_server_port()") == str(postgres.port)


def families(name: str) -> set[str]:
    """The addresses of loopback that a name stands for on this machine."""
    with contextlib.suppress(OSError):
        return {str(where[0]) for *_, where in socket.getaddrinfo(name, 1)} & {"127.0.0.1", "::1"}
    return set()


needs_both = pytest.mark.skipif(len(families("localhost")) < 2, reason="localhost is not ::1 too on this machine")


@needs_ipv6
@pytest.mark.parametrize(
    "host",
    [
        "[::1]:{}",
        pytest.param("localhost:{}", marks=needs_both),
        "127.0.0.1:{},[::1]:{}",
        "localhost:{},[::1]:{}",
    ],
)
def test_a_target_that_listens_on_ipv6_alone_is_found(answering: Answering, host: str) -> None:
    with TargetAt(socket.create_server(("::1", 0), family=socket.AF_INET6)) as target:
        lines = {"_META_TARGET_HOST": host.replace("{}", str(target.port)), "user": "x"}
        answering.greeted(lines)


async def attached_at(host: Address) -> Address:
    """Where a login at a host ends up, without a process round it."""
    started = Started(Accepted("1", "127.0.0.1:1"), ((b"user", b"alice"),))
    granted = Granted(started, Mapping((host,), ((b"user", b"x"),), None), None, 0.0)
    policy = TargetPolicy(
        connect_timeout=5.0,
        login_timeout=15.0,
        error_text=False,
        version=messages.PROTOCOL_3_0,
        tls=TargetTls(),
        limits=TargetLimits(2000, 30_000, 65_536, 100_000),
        tcp=TcpOptions(60, 10, 6, 0.0),
        warm=0,
    )
    attached, leg = await Targets(policy, ForwardBuffer(65536)).attach(granted)
    leg.abort()
    await asyncio.sleep(0)
    return attached.reached


@needs_ipv6
@pytest.mark.parametrize("order", [["::1", "127.0.0.1"], ["127.0.0.1", "::1"]])
def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch, order: list[str]) -> None:
    with ScriptedTarget(greet) as target:
        found = [
            (
                socket.AF_INET6 if ":" in host else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (host, target.port),
            )
            for host in order
        ]
        real = socket.getaddrinfo

        def look_up(host: str, *rest: Any, **more: Any) -> Any:
            return found if host == "two-families" else real(host, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        reached = asyncio.run(attached_at(Address("two-families", target.port)))
    assert reached == Address("127.0.0.1", target.port)


def test_a_target_that_listens_on_ipv4_alone_is_found_by_a_name_with_both(answering: Answering) -> None:
    with ScriptedTarget(greet) as target:
        answering.greeted({"_META_TARGET_HOST": f"localhost:{target.port}", "user": "x"})


def test_a_host_without_a_port_means_5432(answering: Answering) -> None:
    # Somewhere in 127/8, where no real server listens.
    host = f"127.{random.randint(64, 127)}.{random.randint(1, 254)}.{random.randint(1, 254)}"
    with TargetAt(socket.create_server((host, DEFAULT_PORT))):
        answering.greeted({"_META_TARGET_HOST": host, "user": "x"})


def test_a_socket_folder_is_a_host(answering: Answering, postgres: ThrowawayPostgres) -> None:
    lines = at(postgres) | {"_META_TARGET_HOST": f"{postgres.folder}:{postgres.port}"}
    assert answering.asked(lines, "select inet_server_port() is null") == "t"


def test_a_socket_folder_without_a_port_means_5432(answering: Answering, tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / f".s.PGSQL.{DEFAULT_PORT}"))
    listening.listen()
    with TargetAt(listening):
        answering.greeted({"_META_TARGET_HOST": str(tmp_path), "user": "x"})


def test_a_list_is_tried_in_order(answering: Answering, postgres: ThrowawayPostgres, dead_port: int) -> None:
    hosts = f"127.0.0.1:{dead_port}, /no/such/folder:5432, 127.0.0.1:{postgres.port}"
    lines = at(postgres) | {"_META_TARGET_HOST": hosts}
    assert answering.asked(lines, "select inet_server_port()") == str(postgres.port)


def test_a_list_whose_first_host_answers_never_touches_the_second(answering: Answering) -> None:
    def refuse(_: socket.socket) -> None:
        raise AssertionError("connected to the second host")

    with ScriptedTarget(greet) as first, ScriptedTarget(refuse) as second:
        hosts = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
        answering.greeted({"_META_TARGET_HOST": hosts, "user": "x"})


def refusing(sqlstate: bytes) -> Callable[[socket.socket], None]:
    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(message(b"E", b"SFATAL\0VFATAL\0C" + sqlstate + b"\0Mits own words\0\0"))

    return script


def test_a_host_that_is_starting_up_is_passed_over(answering: Answering, postgres: ThrowawayPostgres) -> None:
    with ScriptedTarget(refusing(b"57P03")) as first:
        hosts = f"127.0.0.1:{first.port},127.0.0.1:{postgres.port}"
        lines = at(postgres) | {"_META_TARGET_HOST": hosts}
        assert answering.asked(lines, "select inet_server_port()") == str(postgres.port)


def test_a_host_that_refuses_the_role_ends_the_list(answering: Answering, postgres: ThrowawayPostgres) -> None:
    with ScriptedTarget(refusing(b"28P01")) as first:
        hosts = f"127.0.0.1:{first.port},127.0.0.1:{postgres.port}"
        error, _ = answering.refused(at(postgres) | {"_META_TARGET_HOST": hosts})
    assert error["C"] == "08004"
    assert "its own words" not in error["M"]


def test_a_list_of_which_nobody_answers_is_told_without_addresses(answering: Answering, dead_port: int) -> None:
    hosts = f"127.0.0.1:{dead_port},/no/such/folder,no-such-host.invalid:1"
    error, reason = answering.refused({"_META_TARGET_HOST": hosts, "user": "x"})
    assert (error["S"], error["C"]) == ("FATAL", "08001")
    for place in (str(dead_port), "/no/such/folder", "no-such-host.invalid"):
        assert place not in error["M"]
        assert place in reason


# What is passed on


def test_the_mapping_chooses_the_database(answering: Answering, postgres: ThrowawayPostgres) -> None:
    assert answering.asked(at(postgres, database="other"), "select current_database()") == "other"


def test_without_a_database_the_target_takes_the_roles_own(answering: Answering, postgres: ThrowawayPostgres) -> None:
    lines = {"_META_TARGET_HOST": f"127.0.0.1:{postgres.port}", "user": "postgres"}
    assert answering.asked(lines, "select current_database()") == "postgres"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("application_name", "an app = with 'signs' and ümlauts"),
        ("client_encoding", "LATIN1"),
        ("DateStyle", "German, DMY"),
        ("search_path", "a, b"),
    ],
)
def test_startup_parameters_of_the_mapping_reach_the_target(
    answering: Answering, postgres: ThrowawayPostgres, setting: str, value: str
) -> None:
    shown = answering.asked(at(postgres, **{setting: value}), f"show {setting}")
    # PostgreSQL cleans application names of all but ASCII; these bytes come back as it names them.
    assert shown == value.replace("ü", "\\xc3\\xbc")


def test_the_clients_application_name_passes_through(shared_gateway: Gateway) -> None:
    with RawClient(shared_gateway.port) as client:
        client.log_in(application_name="mine", options="-c work_mem=1234kB")
        client.send(query("select current_setting('application_name'), current_setting('work_mem')"))
        assert (b"D", b"\0\x02\0\0\0\x04mine\0\0\0\x061234kB") in client.read_until(b"Z")


def test_an_unknown_database_is_told_in_neutral_words(answering: Answering, postgres: ThrowawayPostgres) -> None:
    error, reason = answering.refused(at(postgres, database="nowhere"))
    assert (error["S"], error["C"]) == ("FATAL", "3D000")
    assert "nowhere" not in error["M"]
    assert 'database "nowhere" does not exist' in reason


def test_an_unknown_database_is_told_in_the_targets_words_if_that_is_wanted(
    tmp_path: Path, postgres: ThrowawayPostgres
) -> None:
    with answering_gateway(tmp_path, target={"error_text": True}) as answering:
        error, _ = answering.refused(at(postgres, database="nowhere"))
        assert (error["C"], error["M"]) == ("3D000", 'database "nowhere" does not exist')
        error, _ = answering.refused(at(postgres, "scrammed", _META_TARGET_CRED="the wrong one"))
        assert error["C"] == "08004"
        assert "scrammed" not in error["M"]


def test_a_bad_startup_parameter_keeps_the_targets_sqlstate(answering: Answering, postgres: ThrowawayPostgres) -> None:
    error, reason = answering.refused(at(postgres, no_such_setting="1"))
    assert error["C"] == "42704"
    assert "no_such_setting" in reason


def test_the_log_says_who_came_where_as_whom(answering: Answering, postgres: ThrowawayPostgres) -> None:
    user = answering.user(at(postgres, database="other"))
    with RawClient(answering.gateway.port) as client:
        client.log_in(user=user)
    line = answering.gateway.wait_for("login", user=user)
    assert line["target"] == f"127.0.0.1:{postgres.port}"
    assert (line["target_user"], line["target_database"]) == ("trusted", "other")
    assert line["client"].startswith("127.0.0.1:")


def test_psql_says_what_the_gateway_says(answering: Answering, postgres: ThrowawayPostgres) -> None:
    user = answering.user(at(postgres, database="nowhere"))
    done = subprocess.run(
        [postgres.binaries / "psql", f"host=127.0.0.1 port={answering.gateway.port} user={user} password=x"],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert b"FATAL:  database does not exist" in done.stderr
