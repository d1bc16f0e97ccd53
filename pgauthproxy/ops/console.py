"""The admin console's language: what statements there are, and what each answers.

Whoever is let in may look; acts are for those who may act, each of which is an event for the log. Text of clients is
shown as the log shows it.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from pgauthproxy.config import schema
from pgauthproxy.config.schema import Settings
from pgauthproxy.errors import CANNOT_CONNECT_NOW, INSUFFICIENT_PRIVILEGE, INVALID_PARAMETER_VALUE, SYNTAX_ERROR
from pgauthproxy.events import AdminActed, Sink
from pgauthproxy.gateway.console import Admin
from pgauthproxy.ops.acts import (
    Act,
    Kill,
    KillUser,
    Pause,
    PerformAct,
    Reload,
    Resume,
    Shutdown,
    UnansweredError,
    in_words,
)
from pgauthproxy.ops.snapshot import MAX_SESSIONS, Histogram, SessionRow, Snapshot, TakeSnapshot
from pgauthproxy.proto.console import ROWS_AT_ONCE, Column, ConsoleError, Control, Result, Statement, Type, Value

TOKEN: Final = re.compile(
    r"""
    (?P<space> \s+ | --[^\n]*(?:\n|$) | /\*.*?\*/ )
  | (?P<end> ; )
  | (?P<quoted> "(?:[^"]|"")*" | '(?:[^']|'')*' )
  | (?P<word> [^\s;'"]+ )
    """,
    re.VERBOSE | re.DOTALL,
)
"""A quote that is not closed is none of these."""
MAX_SHOWN: Final = 60
"""Characters of a statement that an error repeats."""

SESSION_COLUMNS: Final = (
    Column("session"),
    Column("state"),
    Column("user"),
    Column("database"),
    Column("client"),
    Column("application_name"),
    Column("tls"),
    Column("target"),
    Column("target_user"),
    Column("target_database"),
    Column("connected_at", Type.TIMESTAMPTZ),
    Column("seconds", Type.FLOAT8),
    Column("bytes_from_client", Type.INT8),
    Column("bytes_from_target", Type.INT8),
)
TARGET_COLUMNS: Final = (
    Column("target"),
    Column("up", Type.BOOL),
    Column("sessions", Type.INT8),
    Column("logins", Type.INT8),
    Column("failures", Type.INT8),
    Column("last_login", Type.TIMESTAMPTZ),
    Column("last_failure", Type.TIMESTAMPTZ),
    Column("last_error"),
)
STATS_COLUMNS: Final = (
    Column("started_at", Type.TIMESTAMPTZ),
    Column("paused", Type.BOOL),
    Column("draining", Type.BOOL),
    Column("sessions", Type.INT8),
    Column("logging_in", Type.INT8),
    Column("logins", Type.INT8),
    Column("refused", Type.INT8),
    Column("ended", Type.INT8),
    Column("cancels", Type.INT8),
    Column("bytes_from_client", Type.INT8),
    Column("bytes_from_target", Type.INT8),
    *(
        Column(f"{name}_ms_p{part}", Type.FLOAT8)
        for name in ("login", "authenticator", "connect", "target_login", "lag")
        for part in (50, 99)
    ),
)
AUTHENTICATOR_COLUMNS: Final = (
    Column("kind"),
    Column("running", Type.INT8),
    Column("queued", Type.INT8),
    Column("processes", Type.INT8),
)
CONFIG_COLUMNS: Final = (Column("key"), Column("value"), Column("default"))
HELP: Final = (
    ("SHOW CLIENTS", "sessions and logins: who is connected, and as whom"),
    ("SHOW TARGETS", "the servers that sessions were sent to, and whether they answer"),
    ("SHOW STATS", "counts since the start, and how long things take"),
    ("SHOW AUTHENTICATORS", "how busy they are"),
    ("SHOW CONFIG", "the settings in force, without secrets"),
    ("SHOW VERSION", "the version of the gateway"),
    ("SHOW HELP", "this"),
    ("KILL <session>", "ends a session or a login, by its name in SHOW CLIENTS"),
    ("KILL USER <name>", "ends all sessions of a user; quote a name with spaces"),
    ("PAUSE", "has new logins wait; sessions go on"),
    ("RESUME", "lets new logins go on"),
    ("RELOAD", "reads certificates, users and what else can be, anew (SIGHUP)"),
    ("SHUTDOWN", "accepts nobody new and ends when sessions have ended, as SIGTERM"),
)
SHOWN: Final = {
    "CLIENTS": SESSION_COLUMNS,
    "TARGETS": TARGET_COLUMNS,
    "STATS": STATS_COLUMNS,
    "AUTHENTICATORS": AUTHENTICATOR_COLUMNS,
    "CONFIG": CONFIG_COLUMNS,
    "VERSION": (Column("version"),),
    "HELP": (Column("command"), Column("meaning")),
}
ACTS: Final[dict[tuple[str, ...], Act]] = {
    ("PAUSE",): Pause(),
    ("RESUME",): Resume(),
    ("RELOAD",): Reload(),
    ("SHUTDOWN",): Shutdown(),
}
CONTROLS: Final = {
    "BEGIN": Control.BEGIN,
    "START": Control.BEGIN,
    "COMMIT": Control.COMMIT,
    "END": Control.COMMIT,
    "ROLLBACK": Control.ROLLBACK,
    "ABORT": Control.ROLLBACK,
}
IGNORED: Final = ("SET", "RESET", "DISCARD", "DEALLOCATE", "CLOSE", "UNLISTEN")
"""What drivers and pools say by habit; nothing here could be set."""


class Show(msgspec.Struct, frozen=True):
    """One of SHOWN."""

    what: str


class Nothing(msgspec.Struct, frozen=True):
    """One of IGNORED."""

    tag: str


def parse(text: str) -> list[Statement]:
    """The statements of a text. Raises ConsoleError."""
    return [_statement(words) for words in _split(text)]


def _split(text: str) -> list[list[tuple[str, bool]]]:
    """The words of each statement that is not empty, and whether each was quoted. Raises ConsoleError."""
    found: list[list[tuple[str, bool]]] = [[]]
    at = 0
    while at < len(text):
        token = TOKEN.match(text, at)
        if token is None:
            raise ConsoleError(SYNTAX_ERROR, f"unterminated quoted string at or near {_shown(text[at:])}")
        at = token.end()
        if token.lastgroup == "end":
            found.append([])
        elif token.lastgroup == "word":
            found[-1].append((token[0], False))
        elif token.lastgroup == "quoted":
            quote = token[0][0]
            found[-1].append((token[0][1:-1].replace(2 * quote, quote), True))
    return [words for words in found if words]


def _statement(words: list[tuple[str, bool]]) -> Statement:
    names = tuple("" if quoted else word.upper() for word, quoted in words)
    if names in ACTS:
        return Statement(ACTS[names])
    if names[0] == "SHOW" and len(names) == 2 and names[1] in SHOWN:
        return Statement(Show(names[1]), SHOWN[names[1]])
    if names[0] == "KILL" and len(names) == 2 and names[1] != "USER":
        return Statement(Kill(words[1][0]))
    if names[:2] == ("KILL", "USER") and len(names) == 3:
        return Statement(KillUser(words[2][0].encode(errors="surrogateescape")))
    if names[0] in CONTROLS:
        return Statement(CONTROLS[names[0]])
    if names[0] in IGNORED:
        return Statement(Nothing(names[0]))
    raise ConsoleError(SYNTAX_ERROR, f"syntax error at or near {_shown(words[0][0])}: SHOW HELP lists what there is")


def _shown(text: str) -> str:
    return f'"{text[:MAX_SHOWN]}"'


@dataclass(frozen=True, slots=True)
class Answers:
    """Performs statements, on what it is given: the gateway's snapshot, what acts on it, and its settings."""

    take: TakeSnapshot
    act: PerformAct
    settings: Callable[[], Settings]
    sink: Sink

    async def perform(self, statement: Statement, admin: Admin) -> Result | ConsoleError:
        """What came of a statement."""
        try:
            return await self._perform(statement, admin)
        except UnansweredError as error:
            return ConsoleError(CANNOT_CONNECT_NOW, str(error))

    async def _perform(self, statement: Statement, admin: Admin) -> Result | ConsoleError:
        match statement.command:
            case Show(what=what):
                return Result("SHOW", await self._show(what))
            case Nothing(tag=tag):
                return Result(tag)
            case Kill() | KillUser() | Pause() | Resume() | Reload() | Shutdown() as act:
                return await self._do(act, admin)
        raise AssertionError(statement)

    async def _do(self, act: Act, admin: Admin) -> Result | ConsoleError:
        if not admin.may_act:
            self._tell(admin, act, "denied")
            return ConsoleError(INSUFFICIENT_PRIVILEGE, "permission denied: this user may only look (admin.users)")
        outcome = "not confirmed"
        try:
            count = await self.act(act)
            outcome = f"{count} ended" if isinstance(act, Kill | KillUser) else "done"
        finally:
            self._tell(admin, act, outcome)
        if isinstance(act, Kill | KillUser):
            if isinstance(act, Kill) and not count:
                return ConsoleError(INVALID_PARAMETER_VALUE, f"no session {_shown(act.session)}")
            return Result(f"KILL {count}")
        return Result(type(act).__name__.upper())

    def _tell(self, admin: Admin, act: Act, outcome: str) -> None:
        self.sink(AdminActed(admin.session, admin.address, admin.user, in_words(act), outcome))

    async def _show(self, what: str) -> list[tuple[Value, ...]]:
        if what == "HELP":
            return list(HELP)
        if what == "CONFIG":
            settings = self.settings()
            return [
                (key.path, schema.shown(key, schema.in_force(settings, key)), key.default_text)
                for key in schema.all_keys()
            ]
        if what == "CLIENTS":
            return await _clients(await self.take(MAX_SESSIONS))
        return ROWS[what](await self.take(0))


async def _clients(snapshot: Snapshot) -> list[tuple[Value, ...]]:
    """Many may be there: others have their turn now and then."""
    rows: list[tuple[Value, ...]] = []
    for row in sorted(snapshot.sessions, key=lambda row: row.since):
        rows.append(_client(row, snapshot.at))
        if len(rows) % ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)
    return rows


def _client(row: SessionRow, now: float) -> tuple[Value, ...]:
    return (
        row.session,
        row.state,
        row.user,
        row.database,
        row.client,
        row.application_name,
        row.tls or None,
        row.target or None,
        row.target_user or None,
        row.target_database or None,
        row.since,
        round(now - row.since, 3),
        row.bytes_from_client,
        row.bytes_from_target,
    )


def _targets(snapshot: Snapshot) -> list[tuple[Value, ...]]:
    return [
        (
            row.target,
            row.is_up,
            row.sessions,
            row.logins,
            row.failures,
            row.last_login or None,
            row.last_failure or None,
            row.last_error or None,
        )
        for row in snapshot.targets
    ]


def _stats(snapshot: Snapshot) -> list[tuple[Value, ...]]:
    took = snapshot.histograms
    histograms: tuple[Histogram, ...] = (took.login, took.authenticator, took.connect, took.target_login, took.lag)
    milliseconds = (round(each.quantile(part) * 1000, 3) for each in histograms for part in (0.5, 0.99))
    return [
        (
            snapshot.started,
            snapshot.paused,
            snapshot.draining,
            snapshot.open,
            snapshot.logging_in,
            snapshot.accepted,
            sum(snapshot.refused.values()),
            sum(snapshot.ended.values()),
            sum(snapshot.cancels.values()),
            snapshot.bytes_from_client,
            snapshot.bytes_from_target,
            *milliseconds,
        )
    ]


def _authenticators(snapshot: Snapshot) -> list[tuple[Value, ...]]:
    return [(row.kind, row.running, row.queued, row.processes) for row in snapshot.authenticators]


ROWS: Final[dict[str, Callable[[Snapshot], list[tuple[Value, ...]]]]] = {
    "TARGETS": _targets,
    "STATS": _stats,
    "AUTHENTICATORS": _authenticators,
    "VERSION": lambda snapshot: [(f"pgauthproxy {snapshot.version}",)],
}
