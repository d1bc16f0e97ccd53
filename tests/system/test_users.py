"""The kind `users`: a file says who may log in, from where, by what, and to which target."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from pgauthproxy._digest import md5_password
from pgauthproxy.proto import scram
from pgauthproxy.proto.scram import ScramClient, Verifier
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway, WriteAuthenticator
from tests.system.conftest import NOT_LOADED, Run, assert_one_clear_line, wait_until
from tests.tls import HOST, Authority, Identity
from tests.wire import RawClient, message, password, startup

SECRET = "wonderland"
SCRAM = Verifier.of(SECRET.encode(), b"sixteen bytes of", 4096).text().decode()
MD5 = md5_password(SECRET.encode(), b"alice").decode()
REFUSED = 'password authentication failed for user "{}"'
LOADED = "users loaded"

Content = dict[str, Any]


@dataclass(frozen=True)
class Users:
    """A gateway that knows the users of a file."""

    gateway: Gateway
    file: Path

    def connect(self, user: str = "alice", secret: str = SECRET, **more: Any) -> psycopg.Connection[Any]:
        where: dict[str, Any] = {"host": HOST, "port": self.gateway.port, "user": user, "password": secret}
        return psycopg.connect(**(where | {"dbname": "postgres", "sslmode": "disable"} | more))

    def asks(self, sql: str, user: str = "alice", secret: str = SECRET, **more: Any) -> Any:
        """The one value that a query gives to such a client."""
        with self.connect(user, secret, **more) as session:
            row = session.execute(sql).fetchone()
        assert row is not None
        return row[0]

    def lets_in(self, user: str = "alice", secret: str = SECRET, **more: Any) -> bool:
        return bool(self.asks("select true", user, secret, **more))

    def refuses(self, user: str = "alice", secret: str = SECRET, **more: Any) -> str:
        """The reason in the log; the client must be told that its password is wrong."""
        # Lines come late: those of others may still be on their way.
        count = sum(line.get("user") == user for line in self.gateway.log_lines("refused"))
        with pytest.raises(psycopg.OperationalError, match=re.escape(REFUSED.format(user))):
            self.connect(user, secret, **more)
        line = self.gateway.wait_for("refused", count + 1, user=user)
        assert line["sqlstate"] == "28P01"
        return str(line["reason"])

    def becomes(self, content: Content | str, mode: int = 0o600) -> None:
        """Replaces the file and has it read."""
        write(self.file, content, mode)
        self.gateway.process.send_signal(signal.SIGHUP)

    def reloads(self, content: Content | str) -> None:
        count = len(self.gateway.log_lines(LOADED))
        self.becomes(content)
        self.gateway.wait_for(LOADED, count + 1)

    def keeps_the_old(self, content: Content | str, mode: int = 0o600) -> list[str]:
        """Why the new file is not used."""
        old = len(self.gateway.log_lines(NOT_LOADED))
        self.becomes(content, mode)
        self.gateway.wait_for(NOT_LOADED, old + 1)
        return [line["reason"] for line in self.gateway.log_lines(NOT_LOADED)[old:]]


def write(file: Path, content: Content | str, mode: int = 0o600) -> None:
    new = file.with_suffix(".new")
    new.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    new.chmod(mode)
    new.replace(file)


StartUsers = Callable[..., Users]


@pytest.fixture
def start_users(start_gateway: StartGateway, tmp_path: Path) -> StartUsers:
    """Starts a gateway with a file of this content, for clients that prove themselves by this method."""

    def start(content: Content | str, method: str | None = None, **settings: Any) -> Users:
        file = tmp_path / "users.yaml"
        write(file, content)
        authenticator: dict[str, Any] = {"users": {"file": "users.yaml"}, **settings.pop("authenticator", {})}
        if method is not None:
            authenticator["method"] = method
        return Users(start_gateway(None, authenticator=authenticator, **settings), file)

    return start


@pytest.fixture
def main(postgres: ThrowawayPostgres) -> Content:
    """A target that lets the gateway in."""
    return {"host": f"{HOST}:{postgres.port}", "user": "scrammed", "password": "scram secret"}


def users_of(main: Content, /, **users: Content) -> Content:
    """A file with this target; whose users go there with any database, by SCRAM, unless they say otherwise."""
    known = {name: {"verifier": SCRAM, "databases": {"*": "main"}} | keys for name, keys in users.items()}
    return {"targets": {"main": main}, "users": known}


# By what they prove themselves


@pytest.mark.parametrize(
    ("method", "verifier"),
    [
        (None, SCRAM),
        ("scram-sha-256", SCRAM),
        ("scram-sha-256", SECRET),
        ("md5", MD5),
        ("md5", SECRET),
        ("cleartext", SCRAM),
        ("cleartext", MD5),
        ("cleartext", SECRET),
    ],
)
def test_who_knows_the_password_gets_in_as_the_targets_user(
    start_users: StartUsers, main: Content, method: str | None, verifier: str
) -> None:
    users = start_users(users_of(main, alice={"verifier": verifier}), method)
    assert users.asks("select current_user::text") == "scrammed"
    assert users.refuses(secret="wonder land") == "wrong password"
    assert users.refuses("nobody") == "the users file does not have this user"
    line = users.gateway.wait_for("login", user="alice")
    assert (line["target_user"], line["target_database"]) == ("scrammed", "postgres")
    assert SECRET not in users.gateway.log.read_text()
    assert "scram secret" not in users.gateway.log.read_text()


@pytest.mark.parametrize("method", ["md5", "cleartext", "scram-sha-256"])
def test_secrets_may_stand_elsewhere(start_users: StartUsers, main: Content, tmp_path: Path, method: str) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    target = main | {"password": "env:SECRET_OF_THE_TARGET"}
    content = users_of(target, alice={"verifier": f"file:{tmp_path}/secret"}, bob={"verifier": "env:SECRET_OF_BOB"})
    variables = {"SECRET_OF_THE_TARGET": "scram secret", "SECRET_OF_BOB": "builder"}
    users = start_users(content, method, environment=dict(os.environ) | variables)
    assert users.lets_in("alice")
    assert users.lets_in("bob", "builder")
    assert users.refuses("bob", SECRET) == "wrong password"
    assert not users.gateway.log_lines("passwords in plain text")


def test_a_password_in_plain_text_is_warned_about(start_users: StartUsers, main: Content) -> None:
    users = start_users(users_of(main, alice={"verifier": SECRET}, bob={}))
    line = users.gateway.wait_for("passwords in plain text")
    assert (line["level"], line["users"]) == ("warning", "alice")
    assert users.lets_in()


@dataclass(frozen=True)
class WithCertificates:
    """A gateway that knows its clients by their certificates."""

    users: Users
    authority: Authority

    def client(self, name: str, *identities: str) -> Identity:
        return self.authority.issue(name, *identities, common_name=name)

    def asks(self, sql: str, user: str, identity: Identity, secret: str = "") -> Any:
        shown = {"sslmode": "require", "sslcert": str(identity.cert), "sslkey": str(identity.key)}
        return self.users.asks(sql, user, secret, **shown)

    def refuses(self, user: str, identity: Identity, secret: str = "") -> str:
        shown = {"sslmode": "require", "sslcert": str(identity.cert), "sslkey": str(identity.key)}
        return self.users.refuses(user, secret, **shown)


StartWithCertificates = Callable[..., WithCertificates]


@pytest.fixture
def start_with_certificates(start_users: StartUsers, authority: Authority) -> StartWithCertificates:
    def start(content: Content, method: str) -> WithCertificates:
        identity = authority.issue("users gateway", "localhost", HOST)
        tls = identity.settings | {"mode": "require", "client_ca": str(authority.cert), "client_cert": "optional"}
        return WithCertificates(start_users(content, method, tls=tls), authority)

    return start


def subject_of(identity: Identity) -> str:
    return identity.certificate.subject.rfc4514_string()


def test_a_certificate_lets_its_user_in_and_nobody_else(
    start_with_certificates: StartWithCertificates, authority: Authority, main: Content
) -> None:
    alice = authority.issue("alice of users", "alice@example.com", common_name="alice")
    bob = authority.issue("bob of users", "bob@example.com", common_name="bob")
    fingerprint = hashlib.sha256(bob.der).hexdigest()
    content = users_of(
        main | {"application_name": "{certificate}"},
        alice={"certificate": subject_of(alice)},
        mail={"certificate": {"san": "email:alice@example.com"}},
        exact={"certificate": {"fingerprint": fingerprint}},
    )
    for user in content["users"].values():
        del user["verifier"]
    gateway = start_with_certificates(content, "cert")
    name = gateway.asks("select current_setting('application_name')", "alice", alice)
    assert name == subject_of(alice)[:63]
    assert gateway.asks("select true", "mail", alice)
    assert gateway.asks("select true", "exact", bob)
    for user, identity in (("alice", bob), ("mail", bob), ("exact", alice)):
        assert gateway.refuses(user, identity) == "the client's certificate is not this user's"
    assert gateway.refuses("nobody", alice) == "the users file does not have this user"


def test_a_certificate_that_is_asked_for_besides_the_password_must_be_there_too(
    start_with_certificates: StartWithCertificates, authority: Authority, main: Content
) -> None:
    alice = authority.issue("alice of users", "alice@example.com", common_name="alice")
    bob = authority.issue("bob of users", "bob@example.com", common_name="bob")
    gateway = start_with_certificates(users_of(main, alice={"certificate": subject_of(alice)}), "scram-sha-256")
    assert gateway.asks("select true", "alice", alice, SECRET)
    assert gateway.refuses("alice", bob, SECRET) == "the client's certificate is not this user's"
    assert gateway.refuses("alice", alice, "wonder land") == "wrong password"
    assert gateway.users.refuses(sslmode="require") == "this user needs a client certificate"


# Where from, where to


def test_a_user_comes_from_allowed_networks_alone(start_users: StartUsers, main: Content) -> None:
    content = users_of(
        main, near={"allow": ["127.0.0.0/8", "::1"]}, far={"allow": ["10.0.0.0/8", "local"]}, never={"allow": []}
    )
    users = start_users(content)
    assert users.lets_in("near")
    for user in ("far", "never"):
        assert users.refuses(user) == "this user may not come from this address"
        assert users.refuses(user, "wonder land") == "this user may not come from this address"


def test_ipv6_and_unix_sockets_are_networks_too(
    start_users: StartUsers, main: Content, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("socket")
    content = users_of(main, six={"allow": ["::1/128"]}, local={"allow": ["local"]}, four={"allow": ["127.0.0.1"]})
    users = start_users(content, listen=["[::1]:0", f"unix:{folder}:5432"])
    port = int(users.gateway.wait_for("listening")["address"].rpartition(":")[2])
    users.gateway.wait_for("listening", 2)
    over_six: dict[str, Any] = {"host": "::1", "port": port}
    over_unix: dict[str, Any] = {"host": str(folder), "port": 5432}
    assert users.lets_in("six", **over_six)
    assert users.lets_in("local", **over_unix)
    for user, where in (("six", over_unix), ("local", over_six), ("four", over_six), ("four", over_unix)):
        assert users.refuses(user, **where) == "this user may not come from this address"


def test_the_database_asked_for_chooses_the_target(start_users: StartUsers, main: Content) -> None:
    content = users_of(main, alice={"databases": {"shop": "shop", "other": "main"}}, bob={"databases": {"*": "shop"}})
    content["targets"]["shop"] = main | {"user": "trusted", "database": "postgres"}
    users = start_users(content)
    who = "select current_user || ' in ' || current_database()"
    assert users.asks(who, dbname="shop") == "trusted in postgres"
    assert users.asks(who, dbname="other") == "scrammed in other"
    assert users.refuses(dbname="postgres") == "this user has no target for this database"
    assert users.asks(who, "bob", dbname="anything") == "trusted in postgres"


def test_the_servers_log_and_statistics_know_who_it_is(
    start_users: StartUsers, main: Content, postgres: ThrowawayPostgres
) -> None:
    content = users_of(main | {"application_name": "{user} from {address}"}, alice={})
    users = start_users(content)
    with users.connect(application_name="psql") as session:
        address = users.gateway.wait_for("login")["client"]
        ((pid,),) = session.execute("select pg_backend_pid()").fetchall()
        shown = postgres.sql(f"select application_name from pg_stat_activity where pid = {pid}")
    assert shown == f"alice from {address}"


def test_a_target_may_pass_on_what_the_client_says(start_users: StartUsers, main: Content) -> None:
    content = users_of(main, alice={"databases": {"*": "main", "strict": "strict"}})
    content["targets"]["strict"] = main | {
        "database": "postgres", "pass": [], "parameters": {"search_path": "app"}, "application_name": "gateway"
    }  # fmt: skip
    users = start_users(content)
    settings = "select current_setting('application_name') || ' ' || current_setting('search_path')"
    asked = {"application_name": "mine", "options": "-c search_path=evil"}
    assert users.asks(settings, **asked) == 'mine "$user", public'
    assert users.asks(settings, dbname="strict", **asked) == "gateway app"


def test_a_session_lives_as_long_as_user_and_target_allow(start_users: StartUsers, main: Content) -> None:
    users = start_users(users_of(main | {"session_seconds": 3600}, alice={"session_seconds": 0.3}, bob={}))
    with users.connect() as session, pytest.raises(psycopg.errors.AdminShutdown):
        session.execute("select pg_sleep(20)")
    assert users.gateway.wait_for("session ended")["why"] == "time limit reached"
    assert users.lets_in("bob")


# What somebody learns who is refused


@dataclass
class Exchange:
    """What a client sees of a SCRAM exchange that fails."""

    salt: bytes
    iterations: int
    error: dict[str, str]


def fails_by_scram(users: Users, user: str, database: str = "postgres", secret: str = SECRET) -> Exchange:
    """Logs in with this password; nothing may come between the proof and the error."""
    exchange = ScramClient(scram.fresh_nonce(), scram.CANNOT_BIND)
    with RawClient(users.gateway.port) as client:
        client.send(startup(user=user, database=database))
        assert client.read_message() == (b"R", struct.pack("!i", 10) + b"SCRAM-SHA-256\0\0")
        first = exchange.first()
        client.send(message(b"p", b"SCRAM-SHA-256\0" + struct.pack("!i", len(first)) + first))
        kind, body = client.read_message()
        assert (kind, body[:4]) == (b"R", struct.pack("!i", 11))
        challenge = exchange.challenge(body[4:], 100_000)
        salted = scram.salted_password(secret.encode(), challenge.salt, challenge.iterations)
        client.send(message(b"p", exchange.final(challenge, scram.Keys.of(salted))))
        return Exchange(challenge.salt, challenge.iterations, client.read_error())


def test_nobody_learns_by_scram_who_exists(start_users: StartUsers, main: Content) -> None:
    verifier = Verifier.of(SECRET.encode(), b"sixteen bytes of", 5000).text().decode()
    content = users_of(
        main,
        alice={"verifier": verifier, "databases": {"other": "main"}},
        bob={"verifier": verifier, "allow": ["10.0.0.0/8"]},
    )
    users = start_users(content)
    wrong = fails_by_scram(users, "alice", "other", "wonder land")
    assert (wrong.salt, wrong.iterations) == (b"sixteen bytes of", 5000)
    # The same for a database that alice does not have, though her password is right, and for bob.
    assert fails_by_scram(users, "alice", "postgres") == wrong
    bob = fails_by_scram(users, "bob")
    assert dataclasses.replace(bob, error=wrong.error) == wrong
    assert bob.error["M"] == REFUSED.format("bob")
    nobody, again = fails_by_scram(users, "nobody"), fails_by_scram(users, "nobody", "other")
    assert nobody == again
    assert (len(nobody.salt), nobody.iterations) == (16, 5000)
    assert nobody.error == {name: text.replace("alice", "nobody") for name, text in wrong.error.items()}


@pytest.mark.parametrize("method", ["md5", "cleartext"])
def test_nobody_learns_by_the_error_who_exists(start_users: StartUsers, main: Content, method: str) -> None:
    content = users_of(
        main, alice={"databases": {"other": "main"}}, far={"allow": ["10.0.0.0/8"]}, bob={"verifier": "builder"}
    )
    for name in ("alice", "far"):
        content["users"][name]["verifier"] = md5_password(SECRET.encode(), name.encode()).decode()
    users = start_users(content, method)
    errors = []
    for user in ("alice", "far", "bob", "nobody"):
        with RawClient(users.gateway.port) as client:
            client.send(startup(user=user))
            assert client.read_message()[0] == b"R"
            client.send(password("md5" + "0" * 32))
            errors.append({name: text.replace(user, "?") for name, text in client.read_error().items()})
    assert errors == [errors[0]] * 4
    users.gateway.wait_for("refused", 4)
    assert [line["reason"] for line in users.gateway.log_lines("refused")] == [
        "this user has no target for this database",
        "this user may not come from this address",
        "wrong password",
        "the users file does not have this user",
    ]


# Reloading


def test_sighup_reads_the_file_anew(start_users: StartUsers, main: Content) -> None:
    users = start_users(users_of(main, alice={}, bob={}))
    with users.connect() as session:
        users.reloads(users_of(main, bob={"verifier": "builder"}, carol={}))
        assert users.refuses() == "the users file does not have this user"
        assert users.refuses("bob") == "wrong password"
        assert users.lets_in("bob", "builder")
        assert users.lets_in("carol")
        # Who is in stays in.
        assert session.execute("select 42").fetchone() == (42,)


def test_what_a_reference_leads_to_is_read_anew_too(start_users: StartUsers, main: Content, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    content = users_of(main, alice={"verifier": f"file:{secret}"})
    users = start_users(content)
    assert users.lets_in()
    secret.write_text("another")
    users.reloads(content)
    assert users.lets_in(secret="another")
    assert users.refuses() == "wrong password"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", [":1: is empty; it needs targets and users"]),
        ("users: {", [":2: not YAML: did not find expected node content"]),
        (
            "targets: {}\nusers:\n  alice: {verifier: x, databases: {a: main}}\n  bob: {x: y}\n",
            [
                ":3: users.alice.databases: a: there is no target main",
                ":4: users.bob: has no databases",
                ":4: users.bob.x: unknown key; there are databases, verifier, certificate, allow, session_seconds",
            ],
        ),
    ],
)
def test_a_broken_file_leaves_the_old_one_in_force(
    start_users: StartUsers, main: Content, content: str, said: list[str]
) -> None:
    users = start_users(users_of(main, alice={}))
    assert users.keeps_the_old(content) == [f"users.yaml{fault}" for fault in said]
    assert users.lets_in()
    users.reloads(users_of(main, bob={}))
    assert users.lets_in("bob")


def test_a_file_that_others_may_read_by_now_leaves_the_old_one_in_force(start_users: StartUsers, main: Content) -> None:
    users = start_users(users_of(main, alice={}))
    said = users.keeps_the_old(users_of(main, bob={}), mode=0o644)
    assert said == ["users.yaml: others may read it; it must have mode 0600, or 0640 if root owns it"]
    users.file.unlink()
    users.gateway.process.send_signal(signal.SIGHUP)
    line = users.gateway.wait_for(NOT_LOADED, 2)
    assert line["reason"] == "users.yaml: No such file or directory"
    assert users.lets_in()
    assert users.refuses("bob") == "the users file does not have this user"


def test_many_signals_at_once_end_with_the_latest_file(start_users: StartUsers, main: Content) -> None:
    users = start_users(users_of(main, alice={}))
    for number in range(20):
        users.becomes(users_of(main, **{f"user{number}": {}}))
    wait_until(lambda: users.gateway.log_lines(LOADED)[-1:] and users_known(users, "user19"), "the latest file")
    assert users.refuses("user18") == "the users file does not have this user"


def users_known(users: Users, name: str) -> bool:
    try:
        return users.lets_in(name)
    except psycopg.OperationalError:
        return False


def test_a_gateway_that_is_reloading_ends_in_order(start_users: StartUsers, main: Content) -> None:
    users = start_users(users_of(main, alice={}))
    many = users_of(main, **{f"user{number}": {} for number in range(2000)})
    users.becomes(many)
    assert users.gateway.stop() == 0
    assert users.gateway.log_lines("ended")


def test_ten_thousand_users_are_known_and_read_anew_while_others_log_in(
    start_users: StartUsers, main: Content, tmp_path: Path
) -> None:
    lines = yaml.safe_dump({"targets": {"main": main}}) + "users:\n"
    lines += f"  alice: {{verifier: '{SCRAM}', databases: {{'*': main}}, allow: [127.0.0.0/8]}}\n"
    for number in range(10_000):
        lines += f"  user{number}:\n    verifier: '{SCRAM}'\n    databases: {{'*': main}}\n    allow: [127.0.0.0/8]\n"
    users = start_users(lines)
    assert users.gateway.wait_for(LOADED)["users"] == 10_001
    assert users.lets_in("user9999")
    users.becomes(lines.replace("user9999:", "latest:"))
    while len(users.gateway.log_lines(LOADED)) < 2:
        assert users.lets_in("user0")
    assert users.lets_in("latest")
    assert users.refuses("user9999") == "the users file does not have this user"


# At the start, and by check


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration with a users file of this content."""

    def configure(content: Content | str, mode: int = 0o600, **authenticator: Any) -> Path:
        file = tmp_path / "users.yaml"
        write(file, content, mode)
        settings = {"listen": "127.0.0.1:0", "authenticator": {"users": {"file": "users.yaml"}} | authenticator}
        (tmp_path / "pgauthproxy.yaml").write_text(yaml.safe_dump(settings))
        return file

    return configure


def test_check_reads_the_file_and_says_what_is_in_force(
    run: Run, configured: Callable[..., Path], main: Content
) -> None:
    configured(users_of(main, alice={}))
    done = run("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "authenticator.kind = users  (default)" in done.stdout
    assert "authenticator.method = scram-sha-256  (default)" in done.stdout
    assert "authenticator.users.file = users.yaml  (file pgauthproxy.yaml)" in done.stdout
    assert done.stdout.endswith("ok\n")


def test_check_warns_of_passwords_in_plain_text(run: Run, configured: Callable[..., Path], main: Content) -> None:
    configured(users_of(main, alice={"verifier": SECRET}))
    done = run("check")
    assert done.returncode == 0
    assert "warning: passwords in plain text: file users.yaml, users alice" in done.stdout
    assert SECRET not in done.stdout


@pytest.mark.parametrize("command", [["check"], []], ids=["check", "start"])
def test_a_file_with_faults_is_told_and_nothing_starts(
    run: Run, configured: Callable[..., Path], command: list[str]
) -> None:
    configured("targets:\n  main: {host: a, usr: b}\nusers:\n  alice: {databases: {a: main}, allow: [x]}\n")
    done = run(*command)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "pgauthproxy: users.yaml:2: targets.main: has no user",
        "pgauthproxy: users.yaml:2: targets.main.usr: unknown key; there are host, user, database, password, "
        "application_name, parameters, pass, tls, session_seconds, idle_timeout, "
        "idle_in_transaction_timeout, warm",
        "pgauthproxy: users.yaml:4: users.alice.allow: 'x' is no network, as 10.0.0.0/8 or fd00::/8 are",
        "pgauthproxy: users.yaml:4: users.alice.verifier: is missing, and authenticator.method is scram-sha-256",
    ]


def test_a_file_that_others_may_read_is_refused_at_the_start(
    run: Run, configured: Callable[..., Path], main: Content
) -> None:
    configured(users_of(main, alice={}), 0o644)
    assert_one_clear_line(run(), "users.yaml", "others may read it")


def test_tls_of_a_target_is_looked_at_before_anybody_needs_it(
    run: Run, configured: Callable[..., Path], main: Content
) -> None:
    content = users_of(main | {"tls": {"mode": "verify-full", "ca": "/not/there.pem"}}, alice={})
    content["targets"]["lax"] = main | {"tls": {"mode": "verify-full"}}
    configured(content)
    done = run()
    assert done.returncode == 2
    lax, missing = done.stderr.splitlines()
    assert "targets.lax.tls: TLS to the target: mode verify-full needs a ca to verify with" in lax
    assert "targets.main.tls: /not/there.pem: No such file or directory" in missing


def test_a_method_that_the_verifiers_do_not_serve_is_told(
    run: Run, configured: Callable[..., Path], main: Content
) -> None:
    configured(users_of(main, alice={}), method="md5")
    assert_one_clear_line(run(), "users.alice.verifier: is a SCRAM verifier, and authenticator.method is md5")


def test_a_command_and_a_file_at_once_need_a_word(run: Run, configured: Callable[..., Path], main: Content) -> None:
    configured(users_of(main, alice={}), cmd="/bin/true")
    assert_one_clear_line(run(), "authenticator.kind: must say which, since cmd and users.file are set")


def test_the_kind_needs_its_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pgauthproxy.yaml").write_text("authenticator: {kind: users}\n")
    assert_one_clear_line(run(), "authenticator.kind: users needs users.file")


# With others in a chain


def test_a_chain_asks_the_file_and_then_others(
    start_gateway: StartGateway, authenticator: WriteAuthenticator, main: Content, tmp_path: Path
) -> None:
    file = tmp_path / "users.yaml"
    write(file, users_of(main, alice={"verifier": MD5}))
    others = authenticator(
        f'[ "$user" = bob ] || exit 1\necho _META_TARGET_HOST={main["host"]}\necho user=trusted\necho database=postgres'
    )
    chain = [{"users": {"file": str(file)}}, {"cmd": [str(others)]}]
    users = Users(start_gateway(None, authenticator={"chain": chain}), file)
    assert users.asks("select current_user::text") == "scrammed"
    assert users.asks("select current_user::text", "bob", "whatever") == "trusted"
    assert users.refuses(secret="wonder land") == "wrong password"
    reason = users.refuses("nobody")
    assert reason.startswith("1 (users): the users file does not have this user; 2 (command): ")
    users.reloads(users_of(main, carol={"verifier": "builder"}))
    assert users.lets_in("carol", "builder")


def test_a_chain_holds_a_user_whom_it_knows_to_their_own_verifier(
    start_gateway: StartGateway, main: Content, tmp_path: Path
) -> None:
    empty, full = tmp_path / "empty.yaml", tmp_path / "users.yaml"
    write(empty, users_of(main))
    write(full, users_of(main, alice={"databases": {"other": "main"}}))
    chain = [{"users": {"file": str(file)}} for file in (empty, full)]
    users = Users(start_gateway(None, authenticator={"chain": chain, "method": "scram-sha-256"}), full)
    wrong = fails_by_scram(users, "alice", "other", "wonder land")
    assert fails_by_scram(users, "alice", "postgres") == wrong
    assert wrong.salt == b"sixteen bytes of"
