"""Kind ldap, against OpenLDAP's slapd as Debian packages it, and against directories that get it wrong."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway
from tests.system.conftest import (
    NOT_LOADED,
    Run,
    assert_one_clear_line,
    new_user,
    refusal,
    reload,
    running_gateway,
    wait_until,
)
from tests.tls import HOST, Authority, server_context
from tests.wire import RawClient, ScriptedTarget, password, startup

SLAPD = Path("/usr/sbin/slapd")
SCHEMAS = Path("/etc/ldap/schema")
SUFFIX = "dc=example,dc=com"
PEOPLE, GROUPS = f"ou=people,{SUFFIX}", f"ou=groups,{SUFFIX}"
SERVICE, SERVICE_PASSWORD = f"cn=gateway,{SUFFIX}", "the gateway's own"
REFUSED = 'password authentication failed for user "{}"'
FAILED = "authentication service failed"

needs_slapd = pytest.mark.skipif(
    not SLAPD.exists() or shutil.which("slapadd", path="/usr/sbin") is None, reason="no slapd of Debian's here"
)

CONFIGURATION = """
include {schemas}/core.schema
include {schemas}/cosine.schema
include {schemas}/inetorgperson.schema
include {schemas}/nis.schema
modulepath /usr/lib/ldap
moduleload back_mdb
pidfile {folder}/slapd.pid
TLSCertificateFile {cert}
TLSCertificateKeyFile {key}
TLSCACertificateFile {ca}
sizelimit 500
database mdb
suffix "dc=example,dc=com"
directory {folder}/data
maxsize 10485760
rootdn "cn=admin,dc=example,dc=com"
access to attrs=userPassword by anonymous auth by * none
access to dn.subtree="ou=hidden,dc=example,dc=com" by dn.exact="cn=gateway,dc=example,dc=com" read by * none
access to * by * read
"""

# A name as people have it, and one that is full of what means something in filters and DNs.
ODD_NAME = 'o\'hara (a*b), c=\\d+"e"<f>#;g'
ODD_DN = f"cn=odd,{PEOPLE}"
ENTRIES = f"""
dn: {SUFFIX}
objectClass: dcObject
objectClass: organization
o: Example
dc: example

dn: {PEOPLE}
objectClass: organizationalUnit
ou: people

dn: {GROUPS}
objectClass: organizationalUnit
ou: groups

dn: ou=hidden,{SUFFIX}
objectClass: organizationalUnit
ou: hidden

dn: {SERVICE}
objectClass: person
cn: gateway
sn: gateway
userPassword: {SERVICE_PASSWORD}

dn: uid=alice,{PEOPLE}
objectClass: inetOrgPerson
uid: alice
cn: Alice
sn: Alice
departmentNumber: 7
userPassword: wonderland

dn: uid=bob,{PEOPLE}
objectClass: inetOrgPerson
uid: bob
cn: Bob
sn: Bob
departmentNumber: 9
userPassword: builder

dn: uid=carol,{PEOPLE}
objectClass: inetOrgPerson
uid: carol
cn: Carol
sn: Carol
userPassword: no rule

dn: uid=Zoë,{PEOPLE}
objectClass: inetOrgPerson
uid: Zoë
cn: Zoë
sn: Zoë
departmentNumber: 7
userPassword: pässword

dn: {ODD_DN}
objectClass: inetOrgPerson
uid: {ODD_NAME}
cn: odd
sn: odd
departmentNumber: 7
userPassword: odd

dn: cn=twin one,{PEOPLE}
objectClass: inetOrgPerson
uid: twin
cn: twin one
sn: twin
userPassword: twin

dn: cn=twin two,{PEOPLE}
objectClass: inetOrgPerson
uid: twin
cn: twin two
sn: twin
userPassword: twin

dn: uid=hidden,ou=hidden,{SUFFIX}
objectClass: inetOrgPerson
uid: hidden
cn: hidden
sn: hidden
departmentNumber: 7
userPassword: hidden

dn: cn=writers,{GROUPS}
objectClass: groupOfNames
cn: writers
member: uid=alice,{PEOPLE}
member: {ODD_DN}

dn: cn=posix,{GROUPS}
objectClass: posixGroup
cn: posix
gidNumber: 1000
memberUid: bob
"""


@dataclass(frozen=True)
class Directory:
    """A running slapd."""

    plain_port: int
    tls_port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def plain_url(self) -> str:
        return f"ldap://{HOST}:{self.plain_port}"

    @property
    def url(self) -> str:
        return f"ldaps://{HOST}:{self.tls_port}"

    def said(self, words: str) -> int:
        """How often the log says that."""
        return self.log.read_text(errors="replace").count(words)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def free_ports() -> tuple[int, int]:
    with socket.create_server((HOST, 0)) as one, socket.create_server((HOST, 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


def is_up(port: int) -> bool:
    with socket.socket() as knocking:
        return knocking.connect_ex((HOST, port)) == 0


def start_slapd(folder: Path, authority: Authority, ports: tuple[int, int] | None = None) -> Directory:
    identity = authority.issue(f"slapd-{folder.name}", "localhost", HOST)
    configuration = folder / "slapd.conf"
    if not configuration.exists():
        (folder / "data").mkdir()
        configuration.write_text(
            CONFIGURATION.format(
                schemas=SCHEMAS, folder=folder, cert=identity.cert, key=identity.key, ca=authority.cert
            )
        )
        subprocess.run(
            ["/usr/sbin/slapadd", "-f", configuration], input=ENTRIES.encode(), check=True, capture_output=True
        )
    log = folder / "slapd.log"
    for _ in range(5):
        # slapd cannot be asked for any free port, so somebody may take one in between.
        plain, encrypted = ports or free_ports()
        with log.open("wb") as output:
            urls = f"ldap://{HOST}:{plain} ldaps://{HOST}:{encrypted}"
            process = subprocess.Popen(
                [SLAPD, "-f", configuration, "-h", urls, "-d", "stats"], stdout=output, stderr=output
            )
        wait_until(lambda: process.poll() is not None or (is_up(plain) and is_up(encrypted)), "slapd")  # noqa: B023
        if process.poll() is None:
            return Directory(plain, encrypted, process, log)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Directory]:
    """A slapd with people and groups."""
    running = start_slapd(tmp_path_factory.mktemp("slapd"), authority)
    yield running
    running.stop()


def settings(postgres: ThrowawayPostgres, **ldap: Any) -> dict[str, Any]:
    host = f"127.0.0.1:{postgres.port}"
    return {
        "kind": "ldap",
        "cmd": [],
        "method": "cleartext",
        "targets": {
            "writing": {"host": host, "user": "scrammed", "password": "scram secret", "application_name": "{user}"},
            "reading": {"host": host, "user": "trusted"},
            "clear": {"host": host, "user": "clear", "password": "clear secret"},
        },
        "ldap": {
            "rules": [
                {"group": f"cn=writers,{GROUPS}", "target": "writing"},
                {"group": f"cn=posix,{GROUPS}", "target": "clear"},
                {"group": f"cn=none such,{GROUPS}", "target": "writing"},
                {"filter": "(departmentNumber=7)", "target": "reading"},
            ],
            "timeout": 5,
            **ldap,
        },
    }


def by_dn(directory: Directory, authority: Authority, **more: Any) -> dict[str, Any]:
    return {"url": directory.url, "ca": str(authority.cert), "user_dn": f"uid={{user}},{PEOPLE}"} | more


def by_search(directory: Directory, authority: Authority, **more: Any) -> dict[str, Any]:
    service = {"bind_dn": SERVICE, "bind_password": SERVICE_PASSWORD}
    return {"url": directory.url, "ca": str(authority.cert), "base": SUFFIX} | service | more


WAYS = {"by DN": by_dn, "by search": by_search}


@pytest.fixture(scope="module", params=WAYS)
def gateway_of_names(
    request: pytest.FixtureRequest,
    directory: Directory,
    authority: Authority,
    postgres: ThrowawayPostgres,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    """A gateway that finds users either way, shared by the tests of this file."""
    found = settings(postgres, **WAYS[request.param](directory, authority))
    with running_gateway(tmp_path_factory.mktemp("ldap"), Path(), authenticator=found) as gateway:
        yield gateway


@pytest.fixture
def start(
    start_gateway: StartGateway, directory: Directory, authority: Authority, postgres: ThrowawayPostgres
) -> Callable[..., Gateway]:
    """Starts a gateway that looks for users, with these settings on top."""

    def begin(way: str = "by search", **ldap: Any) -> Gateway:
        return start_gateway([], authenticator=settings(postgres, **WAYS[way](directory, authority, **ldap)))

    return begin


def asked(port: int, user: str, typed: str, sql: str = "select current_user") -> Any:
    """The one value that a query gives to who logs in like this."""
    with psycopg.connect(host="127.0.0.1", port=port, user=user, password=typed, dbname="postgres") as session:
        return session.execute(sql).fetchone()[0]


def is_served(gateway: Gateway) -> bool:
    try:
        return bool(asked(gateway.port, "alice", "wonderland") == "scrammed")
    except psycopg.OperationalError:
        return False


def refused(gateway: Gateway, user: str, typed: str = "of no importance") -> str:
    """Why somebody is refused, who must be told what everybody is."""
    known = len(gateway.log_lines("refused"))
    with RawClient(gateway.port) as client:
        client.send(startup(user=user))
        client.read_message()
        client.send(password(typed))
        assert client.read_fatal() == ("28P01", REFUSED.format(user))
    wait_until(lambda: len(gateway.log_lines("refused")) > known, "the refusal in the log")
    return str(gateway.log_lines("refused")[known]["reason"])


# Who gets in, and as whom


@needs_slapd
@pytest.mark.parametrize(
    ("user", "typed", "role"),
    [("alice", "wonderland", "scrammed"), ("bob", "builder", "clear"), ("Zoë", "pässword", "trusted")],
)
def test_groups_and_filters_say_as_whom_a_user_goes_in(
    gateway_of_names: Gateway, user: str, typed: str, role: str
) -> None:
    assert asked(gateway_of_names.port, user, typed) == role


@needs_slapd
def test_the_target_knows_who_it_is_for(gateway_of_names: Gateway) -> None:
    name = asked(gateway_of_names.port, "alice", "wonderland", "select current_setting('application_name')")
    assert name == "alice"


@needs_slapd
def test_a_wrong_password_and_an_unknown_user_look_the_same(gateway_of_names: Gateway) -> None:
    assert "invalid credentials" in refused(gateway_of_names, "alice", "wrong")
    unknown = refused(gateway_of_names, new_user(), "wrong")
    assert "unknown user" in unknown or "invalid credentials" in unknown


@needs_slapd
def test_a_user_for_whom_there_is_no_rule_is_refused(gateway_of_names: Gateway) -> None:
    assert refused(gateway_of_names, "carol", "no rule") == "no rule has a target for this user"


@needs_slapd
@pytest.mark.parametrize("user", ["Alice", "ALICE", "alice ", " alice", "al  ice"])
def test_a_name_is_the_one_of_the_entry_to_the_letter(gateway_of_names: Gateway, user: str) -> None:
    refused(gateway_of_names, user, "wonderland")


@needs_slapd
def test_an_empty_password_is_never_sent(gateway_of_names: Gateway, directory: Directory) -> None:
    asked(gateway_of_names.port, "alice", "wonderland")
    wait_until(lambda: directory.said(f'BIND dn="uid=alice,{PEOPLE}" method=128'), "the bind in slapd's log")
    binds = directory.said("BIND dn=")
    assert refused(gateway_of_names, "alice", "") == "empty password"
    assert refused(gateway_of_names, new_user(), "") == "empty password"
    assert directory.said("BIND dn=") == binds
    assert directory.said("BIND anonymous") == 0


INJECTIONS = [
    "*",
    "a*",
    "alice*",
    "alice)(uid=*",
    "*)(objectClass=*",
    "alice)(|(uid=*",
    "alice\\2a",
    "\\61lice",
    f"alice,{PEOPLE}",
    "alice,ou=people",
    "alice+cn=Alice",
    "#616c696365",
    '"alice"',
    "alice\\",
    "x;uid=alice",
    "{user}",
    "{dn}",
]


@needs_slapd
@pytest.mark.parametrize("user", INJECTIONS)
def test_what_means_something_in_a_filter_or_dn_means_nothing_in_a_name(gateway_of_names: Gateway, user: str) -> None:
    refused(gateway_of_names, user, "wonderland")


@needs_slapd
def test_a_name_full_of_such_is_a_name(start: Callable[..., Gateway]) -> None:
    gateway = start()
    assert asked(gateway.port, ODD_NAME, "odd") == "scrammed"
    assert asked(gateway.port, ODD_NAME, "odd", "select current_setting('application_name')") == ODD_NAME


@needs_slapd
def test_bytes_that_are_no_utf8_are_nobodys_name(gateway_of_names: Gateway) -> None:
    with RawClient(gateway_of_names.port) as client:
        client.send(startup(user="@@").replace(b"@@", b"\xff\xfe"))
        client.read_message()
        client.send(password("wonderland"))
        sqlstate, _ = client.read_fatal()
    assert sqlstate == "28P01"


@needs_slapd
def test_a_filter_that_finds_two_finds_nobody(start: Callable[..., Gateway]) -> None:
    assert "several users" in refused(start(), "twin", "twin")


@needs_slapd
def test_a_user_outside_the_base_or_below_the_scope_is_not_found(start: Callable[..., Gateway]) -> None:
    assert refused(start(base=f"ou=groups,{SUFFIX}"), "alice", "wonderland") == "unknown user"
    assert refused(start(scope="one"), "alice", "wonderland") == "unknown user"
    assert asked(start(scope="one", base=PEOPLE).port, "alice", "wonderland") == "scrammed"
    assert refused(start(base=f"ou=none such,{SUFFIX}"), "alice", "wonderland") == "unknown user"


@needs_slapd
def test_who_may_not_be_seen_is_found_by_the_service_account_alone(start: Callable[..., Gateway]) -> None:
    assert asked(start().port, "hidden", "hidden") == "trusted"
    anonymous = start(bind_dn="", bind_password="")
    assert refused(anonymous, "hidden", "hidden") == "unknown user"
    assert asked(anonymous.port, "alice", "wonderland") == "scrammed"
    hidden = start("by DN", user_dn=f"uid={{user}},ou=hidden,{SUFFIX}")
    assert "uid is not, to the letter" in refused(hidden, "hidden", "hidden")


@needs_slapd
def test_the_name_is_not_looked_at_if_that_is_asked(start: Callable[..., Gateway]) -> None:
    assert asked(start(name_attribute="").port, "ALICE", "wonderland") == "scrammed"
    other = start(name_attribute="sn")
    assert asked(other.port, "Alice", "wonderland") == "scrammed"
    assert "sn is not" in refused(other, "alice", "wonderland")


@needs_slapd
def test_the_first_rule_that_fits_decides(start: Callable[..., Gateway]) -> None:
    rules = [
        {"filter": "(&(departmentNumber=9)(!(sn=Alice)))", "target": "reading"},
        {"group": f"cn=writers,{GROUPS}", "target": "writing"},
        {"target": "clear"},
    ]
    gateway = start(rules=rules)
    assert asked(gateway.port, "bob", "builder") == "trusted"
    assert asked(gateway.port, "alice", "wonderland") == "scrammed"
    assert asked(gateway.port, "carol", "no rule") == "clear"
    narrow = start(group_filter="(memberUid={user})", rules=rules[1:])
    assert asked(narrow.port, "alice", "wonderland") == "clear"


# Connections


@needs_slapd
def test_searches_share_a_connection_that_is_kept(start: Callable[..., Gateway], directory: Directory) -> None:
    gateway = start()
    before = directory.said(f'BIND dn="{SERVICE}" method=128')
    for _ in range(5):
        assert asked(gateway.port, "alice", "wonderland") == "scrammed"
    assert directory.said(f'BIND dn="{SERVICE}" method=128') == before + 1


@needs_slapd
def test_a_kept_connection_that_died_is_replaced_unseen(
    tmp_path: Path, authority: Authority, postgres: ThrowawayPostgres, start_gateway: StartGateway
) -> None:
    first = start_slapd(tmp_path, authority)
    gateway = start_gateway([], authenticator=settings(postgres, **by_search(first, authority)))
    assert is_served(gateway)
    first.stop()
    user = new_user()
    error, reason = refusal(gateway, user, "of no importance")
    assert (error["C"], error["M"]) == ("58000", FAILED)
    assert "directory" in reason
    second = start_slapd(tmp_path, authority, (first.plain_port, first.tls_port))
    try:
        assert is_served(gateway)
    finally:
        second.stop()


@needs_slapd
def test_starttls_protects_as_ldaps_does(
    start: Callable[..., Gateway], directory: Directory, stranger: Authority
) -> None:
    before = directory.said("STARTTLS")
    assert is_served(start(url=directory.plain_url, start_tls=True))
    assert directory.said("STARTTLS") > before
    doubting = start(url=directory.plain_url, start_tls=True, ca=str(stranger.cert))
    error, reason = refusal(doubting, new_user(), "wonderland")
    assert error["C"] == "58000"
    assert "certificate" in reason


@needs_slapd
def test_a_directory_that_cannot_be_verified_gets_no_password(
    start: Callable[..., Gateway], directory: Directory, authority: Authority, stranger: Authority
) -> None:
    for changes in ({"ca": str(stranger.cert)}, {"ca": ""}, {"url": directory.url.replace(HOST, "127.0.0.2")}):
        gateway = start(**changes)
        error, reason = refusal(gateway, new_user(), "wonderland")
        assert error["C"] == "58000", changes
        assert "directory" in reason


@needs_slapd
def test_plain_is_for_loopback(start: Callable[..., Gateway], directory: Directory) -> None:
    gateway = start(url=directory.plain_url)
    assert is_served(gateway)
    assert not gateway.log_lines("passwords go to the directory in clear")


@needs_slapd
def test_the_next_url_serves_where_the_first_does_not(start: Callable[..., Gateway], directory: Directory) -> None:
    with socket.create_server((HOST, 0)) as unused:
        dead = unused.getsockname()[1]
    gateway = start(url=[f"ldaps://{HOST}:{dead}", directory.url])
    assert is_served(gateway)
    assert is_served(gateway)


@needs_slapd
def test_a_service_account_that_is_refused_fails_logins_and_says_so(start: Callable[..., Gateway]) -> None:
    gateway = start(bind_password="wrong")
    error, reason = refusal(gateway, new_user(), "wonderland")
    assert (error["C"], error["M"]) == ("58000", FAILED)
    assert "bind_dn cannot log in: invalid credentials" in reason


@needs_slapd
def test_what_references_lead_to_is_read_anew(
    start_gateway: StartGateway,
    directory: Directory,
    authority: Authority,
    stranger: Authority,
    postgres: ThrowawayPostgres,
    tmp_path: Path,
) -> None:
    service, ca, secret = (tmp_path / name for name in ("service", "ca.pem", "secret"))
    right = {service: SERVICE_PASSWORD, ca: authority.cert.read_text(), secret: "scram secret"}
    wrong = {service: "wrong", ca: stranger.cert.read_text(), secret: "wrong"}
    for file, text in right.items():
        file.write_text(text)
    wanted = settings(postgres, **by_search(directory, authority, ca=str(ca), bind_password=f"file:{service}"))
    wanted["targets"]["writing"]["password"] = f"file:{secret}"
    gateway = start_gateway([], authenticator=wanted)
    assert is_served(gateway)
    for file in right:
        file.write_text(wrong[file])
        reload(gateway)
        assert not is_served(gateway)
        file.unlink()
        assert file.name in reload(gateway, NOT_LOADED)["reason"]
        file.write_text(right[file])
        reload(gateway)
        assert is_served(gateway)


@needs_slapd
def test_many_at_once_are_all_served(start: Callable[..., Gateway]) -> None:
    gateway = start(max_parallel=3)
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda: results.append(asked(gateway.port, "alice", "wonderland"))) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == ["scrammed"] * 20


@needs_slapd
def test_no_password_is_in_the_log(gateway_of_names: Gateway) -> None:
    refused(gateway_of_names, "alice", "hunter2 for alice")
    asked(gateway_of_names.port, "alice", "wonderland")
    log = gateway_of_names.log.read_text()
    for secret in ("hunter2", "wonderland", SERVICE_PASSWORD, "scram secret"):
        assert secret not in log


# Directories that get it wrong


def at(port: int, **more: Any) -> dict[str, Any]:
    """Settings for a directory that is none."""
    return {"url": f"ldap://{HOST}:{port}", "user_dn": "uid={user}", "rules": [{"target": "clear"}]} | more


def ldap_message(number: int, operation: bytes) -> bytes:
    content = bytes((2, 1, number)) + operation
    return bytes((0x30, len(content))) + content


def result(tag: int, code: int) -> bytes:
    return bytes((tag, 7, 0x0A, 1, code, 4, 0, 4, 0))


BIND_RESPONSE, SEARCH_DONE, EXTENDED_RESPONSE = 0x61, 0x65, 0x78


def answers(*said: bytes) -> Callable[[socket.socket], None]:
    """Answers each request with the next of these, and then says nothing more."""

    def script(connection: socket.socket) -> None:
        for each in said:
            if not connection.recv(65_536):
                return
            connection.sendall(each)
        while connection.recv(65_536):
            continue

    return script


@contextlib.contextmanager
def scripted(script: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a directory that follows a script."""
    with ScriptedTarget(script, opens=lambda connection: connection) as target:
        yield target.port


WRONG: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "silence": (answers(), "no answer in 0.3 s"),
    "closes": (lambda connection: connection.recv(10) and None, "closed the connection"),
    "closes at once": (lambda _connection: None, "closed the connection"),
    "not LDAP": (answers(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "broke the protocol"),
    "nothing but zeros": (answers(bytes(100)), "broke the protocol"),
    "a length of gigabytes": (answers(b"\x30\x84\x7f\xff\xff\xff" + b"x" * 1000), "no answer in 0.3 s"),
    "more than a megabyte": (answers(b"\x30\x84\x7f\xff\xff\xff" + b"x" * 1_100_000), "more than 1048576 bytes"),
    "an answer to nobody": (answers(ldap_message(77, result(BIND_RESPONSE, 0))), "broke the protocol"),
    "a search's end for a bind": (answers(ldap_message(1, result(SEARCH_DONE, 0))), "not asked"),
    "busy": (answers(ldap_message(1, result(BIND_RESPONSE, 51))), "busy"),
    "a referral": (answers(ldap_message(1, result(BIND_RESPONSE, 10))), "referral"),
    "a result that is none": (answers(ldap_message(1, result(BIND_RESPONSE, 125))), "bind failed"),
    "good-bye": (
        answers(ldap_message(0, b"\x78\x20\x0a\x01\x34\x04\x00\x04\x00\x8a\x17" + b"1.3.6.1.4.1.1466.20036"[:23])),
        "directory",
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_directory_that_gets_it_wrong_fails_the_login_and_nothing_else(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, how: str
) -> None:
    script, why = WRONG[how]
    with scripted(script) as port:
        options = {
            "url": f"ldap://{HOST}:{port}",
            "user_dn": "uid={user}",
            "timeout": 0.3,
            "rules": [{"target": "clear"}],
        }
        gateway = start_gateway([], authenticator=settings(postgres, **options))
        sockets = gateway.sockets
        for _ in range(2):
            error, reason = refusal(gateway, new_user(), "wonderland")
            assert (error["C"], error["M"]) == ("58000", FAILED)
            assert why in reason
        wait_until(lambda: gateway.sockets == sockets, "the connections to be given back")


def test_a_handshake_that_never_comes_costs_no_more_than_its_time_out(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, authority: Authority
) -> None:
    with scripted(answers()) as port:
        options = at(port, url=f"ldaps://{HOST}:{port}", timeout=0.3, ca=str(authority.cert))
        gateway = start_gateway([], authenticator=settings(postgres, **options))
        sockets = gateway.sockets
        error, reason = refusal(gateway, new_user(), "wonderland")
        assert error["C"] == "58000"
        assert "no connection in 0.3 s" in reason
        wait_until(lambda: gateway.sockets == sockets, "the connection to be given back")


START_TLS_DONE = ldap_message(1, result(EXTENDED_RESPONSE, 0))
LET_IN = ldap_message(1, result(BIND_RESPONSE, 0))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (ldap_message(1, result(EXTENDED_RESPONSE, 2)), "StartTLS refused: protocol error"),
        (START_TLS_DONE + LET_IN, "broke the protocol"),
        (START_TLS_DONE + b"\x30", "directory"),
        (START_TLS_DONE + b"not TLS at all", "directory"),
        (START_TLS_DONE, "no connection in 0.3 s"),
    ],
    ids=["refused", "an answer behind it", "half an answer behind it", "garbage behind it", "nothing behind it"],
)
def test_what_stands_behind_the_answer_to_starttls_is_not_believed(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, said: bytes, why: str
) -> None:
    with scripted(answers(said)) as port:
        gateway = start_gateway([], authenticator=settings(postgres, **at(port, timeout=0.3, start_tls=True)))
        error, reason = refusal(gateway, new_user(), "wonderland")
        assert error["C"] == "58000"
        assert why in reason


def test_half_an_answer_in_plain_is_not_the_beginning_of_one_over_tls(
    start_gateway: StartGateway, postgres: ThrowawayPostgres, authority: Authority
) -> None:
    """Somebody in the middle lays the beginning of "let in" before the encrypted rest of the directory's refusal."""
    context = server_context(authority.issue("directory", HOST))

    def script(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(START_TLS_DONE + LET_IN[:5])
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.recv(65_536)
            encrypted.sendall(LET_IN[5:])
            encrypted.recv(65_536)

    with scripted(script) as port:
        options = at(port, timeout=0.5, start_tls=True, ca=str(authority.cert), name_attribute="")
        gateway = start_gateway([], authenticator=settings(postgres, **options))
        error, _ = refusal(gateway, new_user(), "wonderland")
        assert error["C"] == "58000"


def test_a_client_that_leaves_takes_its_connection_to_the_directory_with_it(
    start_gateway: StartGateway, postgres: ThrowawayPostgres
) -> None:
    connected = threading.Event()

    def script(connection: socket.socket) -> None:
        connected.set()
        while connection.recv(65_536):
            continue

    with scripted(script) as port:
        options = {
            "url": f"ldap://{HOST}:{port}",
            "user_dn": "uid={user}",
            "timeout": 20,
            "rules": [{"target": "clear"}],
        }
        gateway = start_gateway([], authenticator=settings(postgres, **options))
        sockets = gateway.sockets
        with RawClient(gateway.port) as client:
            client.send(startup())
            client.read_message()
            client.send(password("wonderland"))
            assert connected.wait(20)
        wait_until(lambda: gateway.sockets == sockets, "both connections to be given back")


# Settings


GOOD = {"url": "ldaps://ldap.example", "user_dn": "uid={user},dc=example", "rules": [{"target": "a"}]}


@pytest.mark.parametrize(
    ("ldap", "more", "words"),
    [
        ({"url": []}, {}, ["ldap.url"]),
        ({"url": "https://ldap.example"}, {}, ["ldap.url", "ldaps://"]),
        ({"url": "ldaps://ldap.example/dc=x"}, {}, ["ldap.url"]),
        ({"url": "ldaps://ldap.example:x"}, {}, ["ldap.url"]),
        ({"url": "ldap://ldap.example"}, {}, ["ldap.url", "in clear", "start_tls"]),
        ({"url": ["ldaps://a", "ldap://b"]}, {}, ["ldap.url", "b:389", "in clear"]),
        ({"ca": "missing.pem"}, {}, ["ldap.ca", "missing.pem"]),
        ({"user_dn": ""}, {}, ["user_dn", "base"]),
        ({"base": "dc=example"}, {}, ["user_dn", "base"]),
        ({"user_dn": "uid=alice,dc=example"}, {}, ["user_dn", "{user}"]),
        ({"user_dn": "", "base": "dc=x", "filter": "(uid=alice)"}, {}, ["filter", "{user}"]),
        ({"user_dn": "", "base": "dc=x", "filter": "(uid={user}"}, {}, ["filter", "not a filter"]),
        ({"group_filter": "member={dn})"}, {}, ["group_filter", "not a filter"]),
        ({"rules": [{"target": "a", "filter": "x"}]}, {}, ["rules", "not a filter"]),
        ({"rules": [{"target": "a", "filter": "(a=b)", "group": "cn=x"}]}, {}, ["rules", "not both"]),
        ({"rules": [{"target": "b"}]}, {}, ["rules", "b is none of"]),
        ({"rules": []}, {}, ["rules"]),
        ({"bind_dn": "cn=x"}, {}, ["bind_dn", "bind_password"]),
        ({"bind_dn": "cn=x", "bind_password": "env:NO_SUCH"}, {}, ["bind_password", "NO_SUCH"]),
        ({"scope": "base"}, {}, ["ldap.scope"]),
        ({"urls": "x"}, {}, ["ldap.urls", "did you mean"]),
        ({}, {"method": "md5"}, ["authenticator.method", "cleartext"]),
        ({}, {"method": "scram-sha-256"}, ["authenticator.method", "cleartext"]),
    ],
)
def test_settings_that_cannot_be_used_are_named_in_one_line(
    run: Run, tmp_path: Path, ldap: dict[str, Any], more: dict[str, Any], words: list[str]
) -> None:
    configure(tmp_path, GOOD | ldap, **more)
    assert_one_clear_line(run(), *words)


def configure(folder: Path, ldap: dict[str, Any], **more: Any) -> None:
    targets = {"a": {"host": "127.0.0.1", "user": "{user}"}}
    content = {"kind": "ldap", "method": "cleartext", "targets": targets, "ldap": ldap} | more
    (folder / "pgauthproxy.yaml").write_text(yaml.safe_dump({"listen": "127.0.0.1:0", "authenticator": content}))


def test_a_package_that_is_not_installed_is_named_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without/sansldap.py").write_text("raise ModuleNotFoundError('none', name='sansldap')\n")
    configure(tmp_path, GOOD)
    done = run(PYTHONPATH=str(tmp_path / "without"))
    assert_one_clear_line(done, "authenticator.ldap", "package sansldap", "pip install 'pgauthproxy[ldap]'")


def test_passwords_in_clear_to_a_directory_are_warned_of(
    start_gateway: StartGateway, postgres: ThrowawayPostgres
) -> None:
    gateway = start_gateway(
        [], authenticator=settings(postgres, **at(389, url="ldap://ldap.invalid", allow_plain=True))
    )
    line = gateway.wait_for("passwords go to the directory in clear")
    assert line["servers"] == "ldap.invalid:389"


def test_check_hides_the_password_of_the_service_account(run: Run, tmp_path: Path) -> None:
    configure(tmp_path, GOOD | {"bind_dn": "cn=gateway", "bind_password": "hunter2"})
    done = run("check")
    assert done.returncode == 0, done
    assert "authenticator.ldap.bind_password = ***" in done.stdout
    assert "hunter2" not in done.stdout
