"""The users file: what it says, who it lets in by it, and what is said of a file with faults."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgauthproxy import private_file
from pgauthproxy._digest import md5_password
from pgauthproxy.auth import users_file
from pgauthproxy.auth.model import AuthenticatorConfigError, Denied, Question
from pgauthproxy.auth.targets import Target
from pgauthproxy.auth.users import UsersAuthenticator, UsersPolicy
from pgauthproxy.auth.users_file import UsersFile
from pgauthproxy.private_file import PrivateFileError
from pgauthproxy.proto import scram
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Address, Certificate, Encryption, Mapping, Password, Started

SALT = bytes(16)
VERIFIER = scram.Verifier.of(b"wonderland", SALT, 1).text().decode()
MD5 = md5_password(b"wonderland", b"alice").decode()
TARGETS = "targets:\n  main: {host: db1, user: app}\n  other: {host: db2, user: other}\n"
SCRAM, MD5_METHOD, CLEARTEXT, CERT = "scram-sha-256", "md5", "cleartext", "cert"
ALICE = Certificate("CN=alice,O=Example Ltd", "CN=ca", "1", "DNS:a.example,email:alice@example.com", "ab" * 32)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a users file that nobody else may read."""

    def put(content: str | bytes, mode: int = 0o600) -> Path:
        file = tmp_path / "users.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        file.chmod(mode)
        return file

    return put


Read = Callable[..., UsersFile]


@pytest.fixture
def read(write: Write) -> Read:
    def reading(content: str | bytes, method: str = SCRAM, mode: int = 0o600) -> UsersFile:
        return users_file.read(write(content, mode), method, lambda target: None, lambda: None)

    return reading


Faults = Callable[..., list[str]]


@pytest.fixture
def faults(read: Read, tmp_path: Path) -> Faults:
    """The faults of such a file, without the file's name before them."""

    def reading(content: str | bytes, method: str = SCRAM, mode: int = 0o600) -> list[str]:
        with pytest.raises(AuthenticatorConfigError) as raised:
            read(content, method, mode)
        prefix = f"{tmp_path}/users.yaml:"
        assert all(fault.startswith(prefix) for fault in raised.value.faults)
        assert str(raised.value) == "\n".join(raised.value.faults)
        return [fault.removeprefix(prefix).strip() for fault in raised.value.faults]

    return reading


def users(body: str, targets: str = TARGETS) -> str:
    """A file with these users."""
    return f"{targets}users:\n{body}"


def alice(keys: str = "", databases: str = "{'*': main}", verifier: str = VERIFIER) -> str:
    """A file with alice alone; what is wrong with her stands in line 6 or below."""
    return users(f"  alice:\n    verifier: '{verifier}'\n    databases: {databases}\n{keys}")


def started(
    user: str = "alice",
    database: str = "shop",
    address: str = "192.0.2.1:50000",
    certificate: Certificate | None = None,
    **more: str,
) -> Started:
    parameters = {"user": user, "database": database, **more}
    encryption = Encryption("TLSv1.3", "", "", "", b"", certificate) if certificate else None
    pairs = tuple((name.encode(), value.encode()) for name, value in parameters.items())
    return Started(Accepted("2a", address), pairs, encryption)


class Asked:
    """The authenticator of a file."""

    def __init__(self, file: Path, method: str) -> None:
        self.notices: list[tuple[str, str, dict[str, object]]] = []
        self.authenticator = UsersAuthenticator(
            file,
            UsersPolicy(method, Secret(b"seed"), 7),
            lambda target: None,
            lambda level, what, facts: self.notices.append((level, what, dict(facts))),
        )
        self.method = method
        asyncio.run(self.authenticator.start())

    def __call__(self, **identity: Any) -> Mapping:
        return asyncio.run(self.authenticator.ask(Question(started(**identity), self.method)))

    def denied(self, **identity: Any) -> Denied:
        with pytest.raises(Denied) as raised:
            self(**identity)
        assert raised.value.told is None
        return raised.value

    def verifier_of_nobody(self, name: str = "nobody") -> scram.Verifier:
        shown = self.denied(user=name).verifier
        assert shown is not None
        parsed = scram.Verifier.parse(shown.reveal())
        assert parsed is not None
        return parsed


Ask = Callable[..., Asked]


@pytest.fixture
def ask(write: Write) -> Ask:
    return lambda content, method=SCRAM: Asked(write(content), method)


# Whom it maps, and where


def test_a_user_is_mapped_by_the_database_asked_for(ask: Ask) -> None:
    asked = ask(alice(databases="{shop: main, billing: other}"))
    assert asked(database="shop").hosts == (Address("db1", 5432),)
    assert asked(database="billing").hosts == (Address("db2", 5432),)
    assert asked.denied(database="hr").reason == "this user has no target for this database"


def test_a_star_stands_for_every_other_database(ask: Ask) -> None:
    asked = ask(alice(databases="{shop: main, '*': other}"))
    assert asked(database="shop").user == b"app"
    assert asked(database="hr").user == b"other"


def test_the_mapping_has_the_verifier_and_the_targets_words(ask: Ask) -> None:
    targets = (
        "targets:\n"
        "  main:\n"
        "    host: [db1, '[::1]:6000', '/run/postgresql:5433']\n"
        "    user: app_{database}\n"
        "    database: prod_{database}\n"
        "    password: secret\n"
        "    application_name: gw:{user}@{address}#{session}\n"
        "    parameters: {search_path: app}\n"
        "    pass: [client_encoding]\n"
        "    tls: {mode: require}\n"
        "    session_seconds: 3600\n"
        "    idle_timeout: 0\n"
        "    idle_in_transaction_timeout: 2.5\n"
        "    warm: 3\n"
    )
    body = f"  alice: {{verifier: '{VERIFIER}', databases: {{'*': main}}, session_seconds: 60}}\n"
    mapping = ask(users(body, targets))(client_encoding="UTF8", DateStyle="ISO", options="-c x=y")
    assert mapping == Mapping(
        hosts=(Address("db1", 5432), Address("::1", 6000), Address("/run/postgresql", 5433)),
        parameters=(
            (b"user", b"app_shop"),
            (b"database", b"prod_shop"),
            (b"application_name", b"gw:alice@192.0.2.1:50000#2a"),
            (b"search_path", b"app"),
            (b"client_encoding", b"UTF8"),
        ),
        credential=Password(Secret(b"secret")),
        verifier=Secret(VERIFIER.encode()),
        tls=(("mode", "require"),),
        session_seconds=60.0,
        idle_timeout=0.0,
        idle_in_transaction_timeout=2.5,
        warm=3,
    )


@pytest.mark.parametrize(
    ("of_user", "in_force"), [("", 100), ("session_seconds: 99", 99), ("session_seconds: 101", 100)]
)
def test_the_shorter_life_of_target_and_user_counts(ask: Ask, of_user: str, in_force: float) -> None:
    targets = "targets:\n  main: {host: db1, user: app, session_seconds: 100}\n"
    body = f"  alice: {{verifier: '{VERIFIER}', databases: {{'*': main}}, {of_user}}}\n"
    assert ask(users(body, targets))().session_seconds == in_force


@pytest.mark.parametrize("name", ["no", "null", "1e3", "0x10", "2026-01-01", "~", "o'neil", "ä b", "a=b", "{user}"])
def test_a_name_is_what_it_says_and_never_a_number_or_a_truth(ask: Ask, name: str) -> None:
    quoted = name if re.fullmatch(r"[\w~-]+", name) else f'"{name}"'
    asked = ask(users(f"  {quoted}: {{verifier: '{VERIFIER}', databases: {{{quoted}: main}}}}\n"))
    assert asked(user=name, database=name).user == b"app"


def test_bytes_that_are_no_utf_8_are_nobodys_name(ask: Ask) -> None:
    asked = ask(users(f"  ä: {{verifier: '{VERIFIER}', databases: {{'*': main}}}}\n"))
    question = Question(Started(Accepted("2a", "[local]"), ((b"user", "ä".encode("latin-1")),)), SCRAM)
    with pytest.raises(Denied, match="does not have this user"):
        asyncio.run(asked.authenticator.ask(question))


# Where from


@pytest.mark.parametrize(
    ("allow", "address", "let_in"),
    [
        ("[10.0.0.0/8]", "10.255.0.1:1", True),
        ("[10.0.0.0/8]", "11.0.0.1:1", False),
        ("[10.0.0.0/8, 192.0.2.7]", "192.0.2.7:1", True),
        ("[10.0.0.0/8, 192.0.2.7]", "192.0.2.8:1", False),
        ("[10.0.0.0/8]", "[local]", False),
        ("[local]", "[local]", True),
        ("[local]", "127.0.0.1:1", False),
        ("[0.0.0.0/0]", "203.0.113.9:1", True),
        ("[0.0.0.0/0]", "[2001:db8::1]:1", False),
        ("['2001:db8::/32']", "[2001:db8::1]:1", True),
        ("['2001:db8::/32']", "[2001:db9::1]:1", False),
        ("['fe80::/10']", "[fe80::1%eth0]:1", True),
        ("['::/0']", "1.2.3.4:1", False),
        ("[]", "127.0.0.1:1", False),
        ("[]", "[local]", False),
    ],
)
def test_a_user_comes_from_the_networks_that_are_allowed(ask: Ask, allow: str, address: str, let_in: bool) -> None:
    asked = ask(alice(f"    allow: {allow}\n"))
    if let_in:
        assert asked(address=address).user == b"app"
    else:
        assert asked.denied(address=address).reason == "this user may not come from this address"


def test_without_a_list_a_user_comes_from_everywhere(ask: Ask) -> None:
    asked = ask(alice())
    for address in ("192.0.2.1:1", "[2001:db8::1]:1", "[local]"):
        assert asked(address=address).user == b"app"


# By what


@pytest.mark.parametrize(
    ("method", "secret", "given"),
    [
        (SCRAM, VERIFIER, VERIFIER),
        (CLEARTEXT, VERIFIER, VERIFIER),
        (CLEARTEXT, MD5, MD5),
        (MD5_METHOD, MD5, MD5),
        (CLEARTEXT, "wonderland", MD5),
        (MD5_METHOD, "wonderland", MD5),
        (MD5_METHOD, "md5wonderland", md5_password(b"md5wonderland", b"alice").decode()),
    ],
)
@pytest.mark.parametrize("how", ["written", "env", "file"])
def test_a_verifier_is_given_as_the_method_needs_it(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, secret: str, given: str, how: str
) -> None:
    (tmp_path / "secret").write_text(f"{secret}\n")
    monkeypatch.setenv("ALICES_SECRET", secret)
    written = {"written": secret, "env": "env:ALICES_SECRET", "file": f"file:{tmp_path}/secret"}[how]
    assert ask(alice(verifier=written), method)().verifier == Secret(given.encode())


def test_a_password_becomes_one_scram_verifier_that_stays_the_same(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALICES_SECRET", "wonderland")
    asked = ask(alice(verifier="env:ALICES_SECRET"))
    given = asked().verifier
    assert given is not None
    verifier = scram.Verifier.parse(given.reveal())
    assert verifier is not None
    assert verifier.iterations == 7
    assert verifier.fits(scram.salted_password(b"wonderland", verifier.salt, 7))
    assert asked().verifier == given
    asyncio.run(asked.authenticator.reload())
    assert asked().verifier == given


def test_nobody_is_shown_the_salt_that_a_password_of_that_name_would_have(ask: Ask) -> None:
    there = ask(alice(verifier="wonderland"))().verifier
    assert there is not None
    verifier = scram.Verifier.parse(there.reveal())
    assert verifier is not None
    gone = ask(users("  bob: {verifier: builder, databases: {'*': main}}\n")).verifier_of_nobody("alice")
    assert (gone.salt, gone.iterations) == (verifier.salt, verifier.iterations)


def test_passwords_in_plain_text_are_warned_about_once_and_without_showing_them(ask: Ask) -> None:
    body = "".join(f"  user{i}: {{verifier: secret{i}, databases: {{'*': main}}}}\n" for i in range(12))
    body += f"  alice: {{verifier: '{VERIFIER}', databases: {{'*': main}}}}\n"
    warnings = [(what, facts) for level, what, facts in ask(users(body)).notices if level == "warning"]
    ((what, facts),) = warnings
    assert what == "passwords in plain text"
    assert facts["users"] == ", ".join(f"user{i}" for i in range(10)) + ", …"
    assert "secret" not in str(warnings)


def test_a_reference_is_not_warned_about(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALICES_SECRET", "wonderland")
    assert [level for level, _, _ in ask(alice(verifier="env:ALICES_SECRET")).notices] == ["info"]


@pytest.mark.parametrize(
    "wanted",
    [
        "CN=alice,O=Example Ltd",
        "{subject: 'CN=alice,O=Example Ltd'}",
        "{san: 'email:alice@example.com'}",
        "{san: 'DNS:a.example'}",
        f"{{fingerprint: {'ab' * 32}}}",
        f"{{fingerprint: '{':'.join(['AB'] * 32)}'}}",
        f"{{subject: 'CN=alice,O=Example Ltd', san: 'DNS:a.example', fingerprint: {'ab' * 32}}}",
    ],
)
@pytest.mark.parametrize("method", [CERT, SCRAM])
def test_a_certificate_must_be_the_users(ask: Ask, method: str, wanted: str) -> None:
    asked = ask(alice(f"    certificate: {wanted}\n"), method)
    assert asked(certificate=ALICE).user == b"app"
    other = Certificate("CN=alice,O=Example", "CN=ca", "1", "DNS:a.example.net,email:mallory@example.com", "cd" * 32)
    assert asked.denied(certificate=other).reason == "the client's certificate is not this user's"
    assert asked.denied().reason == "this user needs a client certificate"


def test_all_that_is_said_of_a_certificate_must_be_so(ask: Ask) -> None:
    asked = ask(alice("    certificate: {subject: 'CN=alice,O=Example Ltd', san: 'DNS:b.example'}\n"), CERT)
    assert asked.denied(certificate=ALICE).reason == "the client's certificate is not this user's"


def test_a_subject_is_the_same_however_it_is_escaped(ask: Ask) -> None:
    asked = ask(alice("    certificate: 'CN=alice,O=Acme\\2C Inc'\n"), CERT)
    certificate = Certificate("CN=alice,O=Acme\\, Inc", "CN=ca", "1", "", "ab" * 32)
    assert asked(certificate=certificate).user == b"app"


# What somebody who is refused is held to


def test_a_user_who_may_not_in_is_held_to_their_own_verifier(ask: Ask) -> None:
    asked = ask(alice("    allow: [10.0.0.0/8]\n", databases="{shop: main}"))
    for identity in ({"address": "192.0.2.1:1"}, {"address": "10.0.0.1:1", "database": "hr"}):
        assert asked.denied(**identity).verifier == Secret(VERIFIER.encode())


def test_nobody_is_held_to_a_verifier_with_a_salt_that_stays(ask: Ask) -> None:
    asked = ask(alice())
    first, again, other = map(asked.verifier_of_nobody, ("nobody", "nobody", "somebody"))
    assert first.salt == again.salt != other.salt
    assert first.stored_key != again.stored_key


def test_nobody_is_shown_the_iterations_of_users(ask: Ask) -> None:
    verifiers = [scram.Verifier.of(b"x", SALT, count).text().decode() for count in (2, 3)]
    body = "".join(
        f"  user{number}: {{verifier: '{verifiers[number % 2]}', databases: {{'*': main}}}}\n" for number in range(10)
    )
    asked = ask(users(body))
    assert {asked.verifier_of_nobody(f"nobody{number}").iterations for number in range(50)} == {2, 3}
    assert {asked.verifier_of_nobody().iterations for _ in range(10)} in ({2}, {3})


def test_nobody_is_shown_the_configured_iterations_where_there_are_no_users(ask: Ask) -> None:
    assert ask(users("  {}\n")).verifier_of_nobody().iterations == 7


@pytest.mark.parametrize(("method", "content"), [(MD5_METHOD, alice(verifier=MD5)), (MD5_METHOD, users("  {}\n"))])
def test_nobody_is_held_to_an_md5_where_md5_is_asked_for(ask: Ask, method: str, content: str) -> None:
    given = ask(content, method).denied(user="nobody").verifier
    assert given is not None
    assert re.fullmatch(rb"md5[0-9a-f]{32}", given.reveal())


def test_nobody_costs_what_users_cost_in_cleartext(ask: Ask) -> None:
    body = f"  alice: {{verifier: '{VERIFIER}', databases: {{'*': main}}}}\n"
    body += f"  bob: {{verifier: {MD5}, databases: {{'*': main}}}}\n"
    asked = ask(users(body), CLEARTEXT)
    kinds = set()
    for number in range(50):
        given = asked.denied(user=f"nobody{number}").verifier
        assert given is not None
        kinds.add(given.reveal()[:3])
    assert kinds == {b"SCR", b"md5"}


# Faults


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ["1: is empty; it needs targets and users"]),
        ("# nothing\n", ["1: is empty; it needs targets and users"]),
        ("- users", ["1: must be a mapping with the keys targets, users"]),
        ("users: [alice]\ntargets:\n", ["1: users: must be a mapping of names"]),
        ("targets: {}\n", ["1: users: is missing"]),
        ("a: b\n", ["1: a: unknown key; there are targets, users", "1: targets: is missing", "1: users: is missing"]),
        (f"{TARGETS}user: {{}}\nusers:\n", ["4: user: unknown key; there are targets, users"]),
    ],
)
def test_a_file_without_targets_and_users_is_none(faults: Faults, content: str, said: list[str]) -> None:
    assert faults(content) == said


@pytest.mark.parametrize("section", ["users:\n", "users: {}\n", "users: ~\n"])
def test_a_file_may_have_no_users_yet(read: Read, section: str) -> None:
    assert read(TARGETS + section).users == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("users: {\n", "2: not YAML: did not find expected node content"),
        ("users:\n  a: 1\n b: 2\n", "3: not YAML: did not find expected key"),
        ("users: a: b\n", "1: not YAML: mapping values are not allowed in this context"),
        ("users:\n\tx: y\n", "2: not YAML: found character that cannot start any token"),
        (b"users:\n  m\xfcller: {}\n", "2: not UTF-8"),
        ("users: {}\n".encode("utf-16"), "1: not UTF-8"),
        ("targets:\n  a: \0\n", "2: not YAML: control characters are not allowed"),
        ("users: {}\n---\nusers: {}\n", "2: a second document"),
        ("users:\n  ? [a, b]\n  : c\n", "2: users: a key that is no word"),
        ("users:\n  *a : c\n", "2: users: aliases are not used here"),
        ("x: " + "[" * 50 + "]" * 50, "1: x: more than 16 levels"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line_and_not_what_stands_there(
    faults: Faults, content: str | bytes, said: str
) -> None:
    assert faults(content) == [said]


def test_any_depth_is_refused_by_whoever_counts_first(faults: Faults) -> None:
    # libyaml looks ahead, and from 0.2.6 on counts levels too.
    (said,) = faults("x: " + "[" * 100_000)
    assert said in {"1: x: more than 16 levels", "1: not YAML: exceeded maximum nesting depth"}


def test_a_secret_in_a_line_that_is_no_yaml_is_not_shown(faults: Faults) -> None:
    (said,) = faults(users("  alice: {verifier: 'hush hush, databases: {'*': main}}\n"))
    assert "hush" not in said


USER_KEYS = "databases, verifier, certificate, allow, session_seconds"
TARGET_KEYS = (
    "host, user, database, password, application_name, parameters, pass, tls, session_seconds, "
    "idle_timeout, idle_in_transaction_timeout, warm"
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (alice("    database: x\n"), [f"8: users.alice.database: unknown key; there are {USER_KEYS}"]),
        (alice("    verifier: x\n"), ["8: users.alice.verifier: stands twice, first in line 6"]),
        (alice() + "  alice: {}\n", ["8: users.alice: stands twice, first in line 5"]),
        (alice() + "targets: {}\n", ["8: targets: stands twice, first in line 1"]),
        (
            alice(databases="{a: main, b: main, a: other}"),
            ["7: users.alice.databases.a: stands twice, first in line 7"],
        ),
        (alice(databases="{a: nowhere}"), ["7: users.alice.databases: a: there is no target nowhere"]),
        (alice(databases="{}"), ["7: users.alice.databases: is empty, so that there is nowhere to go"]),
        (alice(databases="main"), ["7: users.alice.databases: expected mapping, got text"]),
        (alice(databases=""), ["7: users.alice.databases: expected mapping, got nothing"]),
        (alice(databases="{a: [main]}"), ["7: users.alice.databases: expected text, got list"]),
        (users("  alice:\n"), [f"5: users.alice: must be a mapping with the keys {USER_KEYS}"]),
        (users("  alice: {verifier: a}\n"), ["5: users.alice: has no databases"]),
        (users("  '': {verifier: a, databases: {a: main}}\n"), ["5: users.: no name that a user can have"]),
        (users('  "a\\0b": {verifier: a, databases: {a: main}}\n'), ["5: users.a\\x00b: no name that a user can have"]),
        (
            users("  a: {databases: {a: main}}\n"),
            ["5: users.a.verifier: is missing, and authenticator.method is scram-sha-256"],
        ),
        (alice("    allow: [10.0.0.1/8]\n"), ["8: users.alice.allow: 10.0.0.1/8 has host bits set"]),
        (
            alice("    allow: [10.0.0.0/8, x]\n"),
            ["8: users.alice.allow: 'x' is no network, as 10.0.0.0/8 or fd00::/8 are"],
        ),
        (alice("    allow: 10.0.0.0/8\n"), ["8: users.alice.allow: expected list, got text"]),
        (alice("    session_seconds: 1h\n"), ["8: users.alice.session_seconds: expected number, got text"]),
        (alice("    session_seconds: 0\n"), ["8: users.alice.session_seconds: expected number > 0.0"]),
        (alice("    session_seconds: .inf\n"), ["8: users.alice.session_seconds: expected number, got text"]),
        (
            alice("    certificate: alice\n"),
            ["8: users.alice.certificate: subject: 'alice' is none in the form of RFC 4514, as CN=alice,O=Example is"],
        ),
        (alice("    certificate: {}\n"), ["8: users.alice.certificate: needs a subject, a san or a fingerprint"]),
        (
            alice("    certificate: {san: a.example}\n"),
            ["8: users.alice.certificate: san: must begin with one of DNS:, email:, URI:, IP:"],
        ),
        (
            alice("    certificate: {fingerprint: abc}\n"),
            ["8: users.alice.certificate: fingerprint: is no SHA-256 in hex digits"],
        ),
        (
            alice("    allow: &a [local]\n    certificate: *a\n"),
            ["9: users.alice.certificate: aliases are not used here"],
        ),
        (alice("    session_seconds: !!int 5\n"), ["8: users.alice.session_seconds: tags are not used here"]),
        (alice("    allow: !!python/tuple [local]\n"), ["8: users.alice.allow: tags are not used here"]),
    ],
)
def test_a_fault_of_a_user_has_its_line_and_key(faults: Faults, content: str, said: list[str]) -> None:
    assert faults(content) == said


TEMPLATE_FAULT = "in braces stand only {user}, {database}, {address}, {session}, {certificate}"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("hosts: a", f"unknown key; there are {TARGET_KEYS}"),
        ("host: ''", "no address"),
        ("host: 'a b'", "address names no host"),
        ("host: [db1, 'db2:99999']", "address with a port that is no port"),
        ("host: {a: b}", "expected text | list, got mapping"),
        ("user: ''", "is empty"),
        ("user: '{name}'", TEMPLATE_FAULT),
        ("user: '{}'", TEMPLATE_FAULT),
        ("user: '{0}'", TEMPLATE_FAULT),
        ("user: '{user'", TEMPLATE_FAULT),
        ("user: '{user!r}'", TEMPLATE_FAULT),
        ("user: '{user:>99999999}'", TEMPLATE_FAULT),
        ("user: '{user.__class__}'", TEMPLATE_FAULT),
        ('user: "a\\0b"', "a NUL in it"),
        ("database: '{x}'", TEMPLATE_FAULT),
        ("application_name: '{x}'", TEMPLATE_FAULT),
        (
            "password: env:NOT_SET_ANYWHERE",
            "env:NOT_SET_ANYWHERE: there is no such environment variable, or it is empty",
        ),
        ("password: file:/not/there", "file:/not/there: No such file or directory"),
        ("tls: {mode: sometimes}", "invalid enum value 'sometimes'"),
        ("tls: {cafile: x}", "unknown key; there are mode, ca, cert, key, negotiation, name"),
        ("warm: -1", "expected whole number >= 0"),
        ("warm: some", "expected whole number, got text"),
        ("session_seconds: -1", "expected number > 0.0"),
        ("pass: no", "expected list, got text"),
    ],
)
def test_a_fault_of_a_target_has_its_line_and_key(faults: Faults, key: str, said: str) -> None:
    name = key.partition(":")[0]
    inner = "".join(re.findall(r"tls: \{(\w+)", key))
    fields = {"host": "host: db", "user": "user: app"} | {name: key}
    lines = [f"    {text}\n" for text in fields.values()]
    content = users("  {}\n", "targets:\n  main:\n" + "".join(lines))
    path = f"targets.main.{name}.{inner}" if inner else f"targets.main.{name}"
    assert faults(content) == [f"{3 + list(fields).index(name)}: {path}: {said}"]


def test_parameters_of_a_target_are_looked_at_each(faults: Faults) -> None:
    targets = "targets:\n  main:\n    host: db\n    user: app\n    parameters: {user: x, search_path: '{x}'}\n"
    assert faults(users("  {}\n", targets)) == [
        f"5: targets.main.parameters.search_path: {TEMPLATE_FAULT}",
        "5: targets.main.parameters.user: stands beside parameters, not in them",
    ]


def test_tls_settings_that_cannot_be_used_are_told(write: Write) -> None:
    targets = (
        "targets:\n  main:\n    host: db\n    user: app\n    tls: {mode: verify-full}\n  plain: {host: db, user: app}\n"
    )
    file = write(users("  {}\n", targets))

    def fault(target: Target) -> str | None:
        return f"tls: {dict(target.tls)} will not do" if target.tls else None

    with pytest.raises(AuthenticatorConfigError) as raised:
        users_file.read(file, SCRAM, fault, lambda: None)
    assert raised.value.faults == (f"{file}:5: targets.main.tls: {{'mode': 'verify-full'}} will not do",)


@pytest.mark.parametrize(
    ("method", "verifier", "said"),
    [
        (MD5_METHOD, VERIFIER, "is a SCRAM verifier, and authenticator.method is md5"),
        (SCRAM, MD5, "is an MD5 hash, and authenticator.method is scram-sha-256"),
        (SCRAM, VERIFIER[:-4], "is no SCRAM-SHA-256 verifier, though it begins as one"),
        (SCRAM, VERIFIER.replace("$1:", "$0:"), "is no SCRAM-SHA-256 verifier, though it begins as one"),
        (CLEARTEXT, "SCRAM-SHA-256$", "is no SCRAM-SHA-256 verifier, though it begins as one"),
        (SCRAM, "env:NOT_SET_ANYWHERE", "env:NOT_SET_ANYWHERE: there is no such environment variable, or it is empty"),
        (SCRAM, "file:/not/there", "file:/not/there: No such file or directory"),
        (SCRAM, "file:/", "file:/: Is a directory"),
        (MD5_METHOD, "", "is missing, and authenticator.method is md5"),
    ],
)
def test_a_verifier_that_cannot_be_used_is_a_fault(faults: Faults, method: str, verifier: str, said: str) -> None:
    assert faults(alice(verifier=verifier), method) == [f"6: users.alice.verifier: {said}"]


def test_a_user_without_a_certificate_cannot_be_used_where_it_is_the_method(faults: Faults) -> None:
    said = "5: users.alice.certificate: is missing, and authenticator.method is cert"
    assert faults(alice(), CERT) == [said]


def test_all_faults_are_told_at_once_in_the_order_of_lines(faults: Faults) -> None:
    content = (
        "targets:\n"
        "  main: {host: 'a b', user: '{x}', password: env:NOT_SET_ANYWHERE, warm: some}\n"
        "users:\n"
        "  alice: {verifier: SCRAM-SHA-256$, databases: {a: main, b: nowhere}, allow: [x]}\n"
        "  bob: {verifier: [], databases: {a: nowhere}}\n"
        "  bob: {}\n"
        "more: 1\n"
    )
    assert [fault.split(": ")[:2] for fault in faults(content)] == [
        ["2", "targets.main.host"],
        ["2", "targets.main.password"],
        ["2", "targets.main.user"],
        ["2", "targets.main.warm"],
        ["4", "users.alice.allow"],
        ["4", "users.alice.databases"],
        ["4", "users.alice.verifier"],
        ["5", "users.bob.databases"],
        ["5", "users.bob.verifier"],
        ["6", "users.bob"],
        ["7", "more"],
    ]


def test_a_thousand_faults_are_a_hundred_lines_and_a_count(faults: Faults) -> None:
    said = faults(users("".join(f"  user{number}: {{}}\n" for number in range(1000))))
    assert len(said) == 101
    assert said[-1] == "900 more faults"


def test_a_bomb_of_aliases_does_not_go_off(faults: Faults) -> None:
    levels = [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else 'x'}]\n" for n in range(10)]
    said = faults(users("".join(levels)))
    assert "6: users.a1: aliases are not used here" in said


def test_no_secret_is_in_any_fault(faults: Faults, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("SCRAM-SHA-256$hush")
    content = (
        "targets:\n"
        "  main: {host: db, user: app, password: [hush]}\n"
        "users:\n"
        f"  alice: {{verifier: 'file:{tmp_path}/secret', databases: {{a: main}}}}\n"
        "  bob: {verifier: SCRAM-SHA-256$hush, databases: {a: main}}\n"
        "  carol: {verifier: {hush: hush}, databases: {a: main}}\n"
    )
    said = faults(content)
    assert len(said) == 4
    assert "hush" not in " ".join(said)


def test_control_characters_of_a_name_reach_no_terminal(faults: Faults) -> None:
    (said,) = faults(users('  "\\e[2J": {}\n'))
    assert said == "5: users.\\x1b[2J: has no databases"


# The file itself


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o660, 0o620, 0o777])
def test_a_file_that_others_may_read_or_write_is_refused(faults: Faults, mode: int) -> None:
    assert faults(alice(), mode=mode) == ["others may read it; it must have mode 0600, or 0640 if root owns it"]


@pytest.mark.parametrize(
    ("owner", "mode", "usable"),
    [
        (0, 0o600, True),
        (0, 0o640, True),
        (0, 0o644, False),
        (os.geteuid(), 0o600, True),
        (os.geteuid() or 1, 0o640, False),
        (54321, 0o600, False),
    ],
)
def test_a_file_belongs_to_root_or_to_the_gateways_user(owner: int, mode: int, usable: bool) -> None:
    found = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, owner, 0, 1, 0, 0, 0))
    with contextlib.nullcontext() if usable else pytest.raises(PrivateFileError, match="must"):
        assert private_file.check(found) is None  # type: ignore[func-returns-value]


def test_a_file_that_is_not_there_a_folder_or_a_pipe_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir()
    for name, said in (
        ("none", "No such file or directory"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
    ):
        with pytest.raises(AuthenticatorConfigError, match=said):
            users_file.read(tmp_path / name, SCRAM, lambda target: None, lambda: None)


# Reloading


def test_a_reload_replaces_everything(ask: Ask, write: Write) -> None:
    asked = ask(alice())
    write(users(f"  bob: {{verifier: '{VERIFIER}', databases: {{'*': other}}}}\n"))
    asyncio.run(asked.authenticator.reload())
    assert asked(user="bob").user == b"other"
    assert asked.denied(user="alice").reason == "the users file does not have this user"


def test_a_reload_of_a_broken_file_changes_nothing(ask: Ask, write: Write) -> None:
    asked = ask(alice())
    file = write(alice() + "  bob: {}\n")
    with pytest.raises(AuthenticatorConfigError) as raised:
        asyncio.run(asked.authenticator.reload())
    assert raised.value.faults == (f"{file}:8: users.bob: has no databases",)
    assert asked().user == b"app"


def test_reading_gives_way_again_and_again_and_leaves_the_collector_on(write: Write) -> None:
    body = "".join(f"  user{n}: {{verifier: '{VERIFIER}', databases: {{'*': main}}}}\n" for n in range(1000))
    given: list[bool] = []
    file = users_file.read(write(users(body)), SCRAM, lambda target: None, lambda: given.append(gc.isenabled()))
    assert len(file.users) == 1000
    assert len(given) > 20
    assert not any(given)
    assert gc.isenabled()


def test_what_users_have_in_common_is_there_once(read: Read) -> None:
    body = "".join(
        f"  user{n}: {{verifier: '{VERIFIER}', databases: {{a: main, b: other}}, allow: [10.0.0.0/8]}}\n"
        for n in range(9)
    )
    found = list(read(users(body)).users.values())
    assert len({id(user.targets) for user in found}) == 1
    assert len({id(user.allow) for user in found}) == 1
