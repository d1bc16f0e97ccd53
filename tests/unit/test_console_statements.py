"""What the admin console understands, and who may do what there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pgauthproxy.auth.admins import AdminsAuthenticator
from pgauthproxy.auth.model import Question, UnknownUser
from pgauthproxy.build import admin_verifiers, build_console
from pgauthproxy.config.schema import AdminSettings, AuthenticatorSettings, Settings, conflicts
from pgauthproxy.events import AdminActed, Event
from pgauthproxy.gateway.console import NO_USER, Admin
from pgauthproxy.ops.acts import Act, Kill, KillUser, Pause, Reload, Resume, Shutdown
from pgauthproxy.ops.console import ROWS, SHOWN, Answers, Nothing, Show, parse
from pgauthproxy.ops.snapshot import AuthenticatorRow, SessionRow, Snapshot, TargetRow
from pgauthproxy.proto import scram
from pgauthproxy.proto.console import ConsoleError, Control, Result, Statement
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Started

VERIFIER = scram.Verifier.of(b"secret", b"0123456789abcdef", 1000).text().decode()
STRANGER = 4711
ACTING = Admin("1", "[local]", b"alice", True)
LOOKING = Admin("2", "[local]", b"bob", False)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("SHOW CLIENTS", Show("CLIENTS")),
        ("show  clients ;", Show("CLIENTS")),
        ("/* by habit */ Show Stats -- and more", Show("STATS")),
        ("KILL 1f", Kill("1f")),
        ("kill '1f'", Kill("1f")),
        ("KILL USER alice", KillUser(b"alice")),
        ('KILL USER "al""ice b;c"', KillUser(b'al"ice b;c')),
        ("KILL USER 'it''s'", KillUser(b"it's")),
        ("kill user Älice", KillUser("Älice".encode())),
        ("pause", Pause()),
        ("RESUME;", Resume()),
        ("reload", Reload()),
        ("Shutdown", Shutdown()),
        ("BEGIN ISOLATION LEVEL SERIALIZABLE", Control.BEGIN),
        ("start transaction", Control.BEGIN),
        ("COMMIT", Control.COMMIT),
        ("ROLLBACK", Control.ROLLBACK),
        ("SET application_name = 'x'", Nothing("SET")),
        ("DEALLOCATE ALL", Nothing("DEALLOCATE")),
    ],
)
def test_a_statement_is_understood(text: str, command: object) -> None:
    (statement,) = parse(text)
    assert statement.command == command


@pytest.mark.parametrize("text", ["", ";", " ; ;; ", "-- nothing", "/* nothing */"])
def test_nothing_is_no_statement(text: str) -> None:
    assert parse(text) == []


def test_several_statements_are_told_apart() -> None:
    assert [statement.command for statement in parse("PAUSE; KILL USER 'a;b';SHOW VERSION")] == [
        Pause(),
        KillUser(b"a;b"),
        Show("VERSION"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "select 1",
        "SHOW",
        "SHOW EVERYTHING",
        "SHOW CLIENTS now",
        "KILL",
        "KILL USER",
        "KILL USER a b",
        "KILL 1 2",
        "PAUSE everything",
        "'SHOW' CLIENTS",
        "KILL USER 'no end",
        '"',
        "KILL $1 $2",
    ],
)
def test_anything_else_is_a_syntax_error(text: str) -> None:
    with pytest.raises(ConsoleError) as caught:
        parse(text)
    assert caught.value.sqlstate == "42601"


def test_an_error_repeats_little_of_what_was_said() -> None:
    with pytest.raises(ConsoleError) as caught:
        parse("x" * 10_000)
    assert len(caught.value.text) < 200


# What statements do


class Gateway:
    """What statements are performed on: one session, of alice."""

    def __init__(self) -> None:
        self.acts: list[Act] = []
        self.events: list[Event] = []
        settings = Settings(
            authenticator=AuthenticatorSettings(cmd=["true"], scram_seed="a secret"),
            admin=AdminSettings(users={"alice": VERIFIER}),
        )
        self.answers = Answers(self.take, self.act, lambda: settings, self.events.append)

    async def take(self, rows: int) -> Snapshot:
        row = SessionRow("1f", "relaying", "[local]", "alice", "db", "", "", "a:1", "r", "d", 100.0, 5, 6)
        return Snapshot(
            version="1.2",
            started=50.0,
            at=160.0,
            open=1,
            sessions=[row] if rows else [],
            targets=[TargetRow("a:1")],
            authenticators=[AuthenticatorRow("command", 1, 2, 3)],
        )

    async def act(self, act: Act) -> int:
        self.acts.append(act)
        return int(act in (Kill("1f"), KillUser(b"alice")))

    def does(self, text: str, admin: Admin = ACTING) -> Result | ConsoleError:
        (statement,) = parse(text)
        return asyncio.run(self.answers.perform(statement, admin))


@pytest.mark.parametrize("what", SHOWN)
def test_every_row_has_a_value_for_every_column(what: str) -> None:
    result = Gateway().does(f"SHOW {what}", LOOKING)
    assert isinstance(result, Result)
    assert result.rows
    assert {len(row) for row in result.rows} == {len(SHOWN[what])}
    assert set(ROWS) | {"CLIENTS", "HELP", "CONFIG"} == set(SHOWN)


def test_help_names_everything_and_all_of_it_is_understood() -> None:
    result = Gateway().does("SHOW HELP")
    assert isinstance(result, Result)
    for command, _ in result.rows:
        assert parse(str(command).replace("<session>", "1").replace("<name>", "alice"))
    assert {f"SHOW {what}" for what in SHOWN} <= {row[0] for row in result.rows}


def test_settings_are_shown_without_secrets() -> None:
    result = Gateway().does("SHOW CONFIG", LOOKING)
    assert isinstance(result, Result)
    shown = {row[0]: row[1] for row in result.rows}
    assert shown["authenticator.scram_seed"] == "***"
    assert shown["admin.users"] == "alice"
    assert "SCRAM-SHA-256$" not in repr(result.rows)


@pytest.mark.parametrize(
    ("text", "tag", "outcome"),
    [
        ("KILL 1f", "KILL 1", "1 ended"),
        ("KILL USER alice", "KILL 1", "1 ended"),
        ("KILL USER nobody", "KILL 0", "0 ended"),
        ("PAUSE", "PAUSE", "done"),
        ("RESUME", "RESUME", "done"),
        ("RELOAD", "RELOAD", "done"),
        ("SHUTDOWN", "SHUTDOWN", "done"),
    ],
)
def test_an_act_is_done_and_told(text: str, tag: str, outcome: str) -> None:
    gateway = Gateway()
    result = gateway.does(text)
    assert isinstance(result, Result)
    assert result.tag == tag
    assert len(gateway.acts) == 1
    assert gateway.events == [AdminActed("1", "[local]", b"alice", text, outcome)]


def test_a_session_that_is_not_there_cannot_be_killed() -> None:
    result = Gateway().does("KILL 2")
    assert isinstance(result, ConsoleError)
    assert (result.sqlstate, result.text) == ("22023", 'no session "2"')


@pytest.mark.parametrize("text", ["KILL 1f", "KILL USER alice", "PAUSE", "RESUME", "RELOAD", "SHUTDOWN"])
def test_who_may_look_may_do_nothing_and_trying_is_told(text: str) -> None:
    gateway = Gateway()
    result = gateway.does(text, LOOKING)
    assert isinstance(result, ConsoleError)
    assert result.sqlstate == "42501"
    assert gateway.acts == []
    assert gateway.events == [AdminActed("2", "[local]", b"bob", text, "denied")]


# Who is let in


def started(database: str, user: str = "alice") -> Started:
    return Started(Accepted("1", "[local]"), ((b"user", user.encode()), (b"database", database.encode())))


async def refuse(_statement: Statement, _admin: Admin) -> ConsoleError:
    return ConsoleError("XX000", "nothing is performed here")


def console(**admin: Any) -> Any:
    settings = Settings(authenticator=AuthenticatorSettings(cmd=["true"]), admin=AdminSettings(**admin))
    return build_console(settings, parse, refuse)


def test_without_users_only_the_gateways_own_user_and_root_find_the_console() -> None:
    found = console()
    assert found.is_meant(started("pgauthproxy"), 0)
    assert not found.is_meant(started("pgauthproxy"), STRANGER)
    assert not found.is_meant(started("pgauthproxy"), NO_USER)
    assert not found.is_meant(started("postgres"), 0)


def test_with_users_everybody_who_asks_for_it_finds_it() -> None:
    found = console(stats_users={"bob": VERIFIER})
    assert found.is_meant(started("pgauthproxy"), NO_USER)
    assert found.admission.policy.method == "scram-sha-256"
    assert found.users == frozenset()


def test_it_may_have_another_name_or_none() -> None:
    assert console(database="operators").is_meant(started("operators"), 0)
    assert console(database="") is None


def test_a_user_is_held_to_their_verifier_and_nobody_to_one_like_it() -> None:
    authenticator = AdminsAuthenticator({b"alice": Secret(VERIFIER.encode())}, Secret(b"seed"))
    mapping = asyncio.run(authenticator.ask(Question(started("x"), "scram-sha-256")))
    assert mapping.verifier == Secret(VERIFIER.encode())
    seen = []
    for _ in range(2):
        with pytest.raises(UnknownUser) as caught:
            asyncio.run(authenticator.ask(Question(started("x", "mallory"), "scram-sha-256")))
        assert caught.value.verifier is not None
        made_up = scram.Verifier.parse(caught.value.verifier.reveal())
        assert made_up is not None
        seen.append((made_up.iterations, made_up.salt))
    assert seen[0] == seen[1]
    assert seen[0][0] == 1000


def test_verifiers_may_stand_elsewhere_and_what_is_none_is_a_fault(tmp_path: Any) -> None:
    file = tmp_path / "verifier"
    file.write_text(VERIFIER + "\n")
    good = Settings(admin=AdminSettings(users={"alice": f"file:{file}"}))
    assert admin_verifiers(good) == ({b"alice": Secret(VERIFIER.encode())}, [])
    bad = Settings(admin=AdminSettings(users={"alice": "plain"}, stats_users={"bob": "file:/no/such"}))
    _, faults = admin_verifiers(bad)
    assert faults[0].startswith("admin.users: alice: is not given a SCRAM-SHA-256 verifier")
    assert faults[1] == "admin.stats_users: bob: file:/no/such: No such file or directory"
    assert "plain" not in " ".join(faults)


def test_nobody_may_both_act_and_only_look() -> None:
    both = Settings(
        authenticator=AuthenticatorSettings(cmd=["true"]),
        admin=AdminSettings(users={"alice": VERIFIER}, stats_users={"alice": VERIFIER}),
    )
    assert list(conflicts(both)) == ["admin.stats_users: alice is one of admin.users"]
