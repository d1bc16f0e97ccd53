"""What a gateway knows of itself at one moment: plain values that can be encoded, and summed over several processes.

Nothing in it is a credential. Texts of clients are made printable and are capped. What could grow without bound is
bounded: targets, sessions and refusals are kept up to a number, and what is left out is counted.
"""

import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import msgspec

BOUNDS: Final = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
"""Upper bounds, in seconds, of the buckets of every histogram; what lies above them has one more bucket."""
MAX_TARGETS: Final = 200
"""Targets that are told apart; the others are one, named OTHERS."""
OTHERS: Final = "others"
MAX_SESSIONS: Final = 20_000
MAX_REFUSALS: Final = 50


class Histogram(msgspec.Struct):
    """How often something took how long; `total` is in seconds."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, part: float) -> float:
        """The seconds that this part (0 to 1) took at most, as far as buckets tell: linear within one."""
        return quantile(self.counts, part)

    def merge(self, other: "Histogram") -> "Histogram":
        counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        return Histogram(counts, self.total + other.total)


def quantile(counts: list[int], part: float) -> float:
    """As Histogram.quantile; 0 where nothing was counted."""
    wanted = part * sum(counts)
    below = 0
    for index, count in enumerate(counts):
        if count and below + count >= wanted:
            if index == len(BOUNDS):
                return BOUNDS[-1]
            least = BOUNDS[index - 1] if index else 0.0
            return least + (BOUNDS[index] - least) * (wanted - below) / count
        below += count
    return 0.0


class Histograms(msgspec.Struct):
    """Of logins that succeeded: all of it, the authenticator's part, connecting, logging in at the target. And how late
    the event loop was."""

    login: Histogram = msgspec.field(default_factory=Histogram)
    authenticator: Histogram = msgspec.field(default_factory=Histogram)
    connect: Histogram = msgspec.field(default_factory=Histogram)
    target_login: Histogram = msgspec.field(default_factory=Histogram)
    lag: Histogram = msgspec.field(default_factory=Histogram)

    def merge(self, other: "Histograms") -> "Histograms":
        names = self.__struct_fields__
        return Histograms(**{name: getattr(self, name).merge(getattr(other, name)) for name in names})


class SessionRow(msgspec.Struct, frozen=True):
    """One session, or one login in progress, whose target is empty. Times are those of the clock on the wall."""

    session: str
    state: str
    client: str
    user: str
    database: str
    application_name: str
    tls: str
    target: str
    target_user: str
    target_database: str
    since: float
    bytes_from_client: int
    bytes_from_target: int


class TargetRow(msgspec.Struct):
    """One target. `is_up`: whether it answered when it was last tried; times are 0 if there was none."""

    target: str
    is_up: bool = True
    sessions: int = 0
    logins: int = 0
    failures: int = 0
    last_login: float = 0.0
    last_failure: float = 0.0
    last_error: str = ""

    def merge(self, other: "TargetRow") -> "TargetRow":
        newer = max(self, other, key=lambda row: max(row.last_login, row.last_failure))
        failed = max(self, other, key=lambda row: row.last_failure)
        return TargetRow(
            target=self.target,
            is_up=newer.is_up,
            sessions=self.sessions + other.sessions,
            logins=self.logins + other.logins,
            failures=self.failures + other.failures,
            last_login=max(self.last_login, other.last_login),
            last_failure=failed.last_failure,
            last_error=failed.last_error,
        )


class AuthenticatorRow(msgspec.Struct, frozen=True):
    """One authenticator: `running` answer now, `queued` wait for one that is free; `processes` stand ready."""

    kind: str
    running: int
    queued: int
    processes: int

    def merge(self, other: "AuthenticatorRow") -> "AuthenticatorRow":
        return AuthenticatorRow(
            self.kind, self.running + other.running, self.queued + other.queued, self.processes + other.processes
        )


class RefusalRow(msgspec.Struct, frozen=True):
    """One login that failed, with its true reason. It is for operators, not for clients."""

    at: float
    session: str
    client: str
    user: str
    database: str
    sqlstate: str
    reason: str


class Process(msgspec.Struct, frozen=True):
    """What one process of the gateway takes of the machine. Sizes in bytes, 0 where the system does not say.

    `name` tells them apart, and stays when another takes one's place: a worker's number, or `supervisor`.
    """

    name: str
    pid: int
    resident: int
    descriptors: int
    max_descriptors: int
    cpu_seconds: float


class Snapshot(msgspec.Struct):
    """All of it. Counts begin at `started`; `refused` is by SQLSTATE and reason, in one word with a space between.

    `took`: seconds of its loop's time that it took the process in which that was longest.
    """

    version: str
    started: float
    at: float = msgspec.field(default_factory=time.time)
    took: float = 0.0
    draining: bool = False
    paused: bool = False
    open: int = 0
    logging_in: int = 0
    accepted: int = 0
    refused: dict[str, int] = {}
    ended: dict[str, int] = {}
    cancels: dict[str, int] = {}
    bytes_from_client: int = 0
    bytes_from_target: int = 0
    histograms: Histograms = msgspec.field(default_factory=Histograms)
    audit_lost: int = 0
    audit_failing: bool = False
    authenticator_failures: int = 0
    authenticators: list[AuthenticatorRow] = []
    targets: list[TargetRow] = []
    sessions: list[SessionRow] = []
    sessions_left_out: int = 0
    refusals: list[RefusalRow] = []
    processes: list[Process] = []

    def merge(self, other: "Snapshot") -> "Snapshot":
        """Both together, as if one process had done it all. What is bounded stays so."""
        sessions = self.sessions + other.sessions
        left_out = max(0, len(sessions) - MAX_SESSIONS)
        refusals = sorted(self.refusals + other.refusals, key=lambda row: row.at)
        return Snapshot(
            version=self.version,
            started=min(self.started, other.started),
            at=max(self.at, other.at),
            took=max(self.took, other.took),
            draining=self.draining or other.draining,
            paused=self.paused or other.paused,
            open=self.open + other.open,
            logging_in=self.logging_in + other.logging_in,
            accepted=self.accepted + other.accepted,
            refused=_sum(self.refused, other.refused),
            ended=_sum(self.ended, other.ended),
            cancels=_sum(self.cancels, other.cancels),
            bytes_from_client=self.bytes_from_client + other.bytes_from_client,
            bytes_from_target=self.bytes_from_target + other.bytes_from_target,
            histograms=self.histograms.merge(other.histograms),
            audit_lost=self.audit_lost + other.audit_lost,
            audit_failing=self.audit_failing or other.audit_failing,
            authenticator_failures=self.authenticator_failures + other.authenticator_failures,
            authenticators=_merge_authenticators(self.authenticators, other.authenticators),
            targets=_merge_targets([*self.targets, *other.targets]),
            sessions=sessions[:MAX_SESSIONS],
            sessions_left_out=self.sessions_left_out + other.sessions_left_out + left_out,
            refusals=refusals[-MAX_REFUSALS:],
            processes=self.processes + other.processes,
        )

    def counted(self) -> "Snapshot":
        """What stays true of a process that is no more: what it has counted."""
        return msgspec.structs.replace(
            self,
            took=0.0,
            draining=False,
            paused=False,
            open=0,
            logging_in=0,
            audit_failing=False,
            authenticators=[],
            targets=[msgspec.structs.replace(row, sessions=0) for row in self.targets],
            sessions=[],
            sessions_left_out=0,
            processes=[],
        )

    def with_newest(self, rows: int) -> "Snapshot":
        """With no more sessions than that one by one, the newest."""
        newest = sorted(self.sessions, key=lambda row: row.since)[max(0, len(self.sessions) - rows) :]
        left_out = self.sessions_left_out + len(self.sessions) - len(newest)
        return msgspec.structs.replace(self, sessions=newest, sessions_left_out=left_out)


TakeSnapshot = Callable[[int], Awaitable[Snapshot]]
"""Gives what the whole gateway knows of itself now, with so many of its newest sessions one by one.

Refusals are in it if any sessions are asked for. Raises UnansweredError.
"""


def _sum(mine: dict[str, int], theirs: dict[str, int]) -> dict[str, int]:
    return {name: mine.get(name, 0) + theirs.get(name, 0) for name in {**mine, **theirs}}


def _merge_authenticators(mine: list[AuthenticatorRow], theirs: list[AuthenticatorRow]) -> list[AuthenticatorRow]:
    """Those of a chain stand in the same order in every process, but while settings are read anew.

    What stands last may be missing in one: a cache is none before an answer is to be kept.
    """
    both = min(len(mine), len(theirs))
    if [row.kind for row in mine[:both]] != [row.kind for row in theirs[:both]]:
        return mine + theirs
    merged = [one.merge(other) for one, other in zip(mine, theirs, strict=False)]
    return merged + mine[both:] + theirs[both:]


def _merge_targets(rows: Iterable[TargetRow]) -> list[TargetRow]:
    merged: dict[str, TargetRow] = {}
    for row in rows:
        name = row.target if row.target in merged or len(merged) < MAX_TARGETS else OTHERS
        merged[name] = merged.get(name, TargetRow(name)).merge(row)
    return list(merged.values())
