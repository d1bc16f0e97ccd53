"""Counts what happens, and says what a process of the gateway knows of itself at one moment.

Counting is done where events are told, once or twice a login: nothing here is on the path of relayed bytes, whose own
counters are read when somebody asks. Whoever asks does not hold up the loop: many sessions are gone through in parts.
"""

import asyncio
import heapq
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

import msgspec

from pgauthproxy.auth.model import load_of
from pgauthproxy.errors import (
    ADMIN_SHUTDOWN,
    CANNOT_CONNECT,
    CANNOT_CONNECT_NOW,
    CONNECTION_FAILURE,
    FEATURE_NOT_SUPPORTED,
    INTERNAL_ERROR,
    INVALID_AUTHORIZATION,
    INVALID_PASSWORD,
    PROTOCOL_VIOLATION,
    SYSTEM_ERROR,
    TARGET_REJECTED,
    TOO_MANY_CONNECTIONS,
    Fault,
)
from pgauthproxy.events import Cancelled, Ended, Event, LoggedIn, Refused, TargetFailed
from pgauthproxy.gateway.session import Gateway, Session
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.ops.log import printable
from pgauthproxy.ops.snapshot import (
    MAX_REFUSALS,
    MAX_SESSIONS,
    MAX_TARGETS,
    OTHERS,
    AuthenticatorRow,
    Histograms,
    Process,
    RefusalRow,
    SessionRow,
    Snapshot,
    TargetRow,
)
from pgauthproxy.release import version
from pgauthproxy.stages import Address

LAG_SECONDS: Final = 1.0
"""How often the loop's lag is measured."""
AT_ONCE: Final = 16
TURN_SECONDS: Final = 0.0004
"""How long sessions are gone through before the loop has its turn; looked at after each AT_ONCE."""
KEPT_OF_NAMES: Final = 256
"""Bytes of a client's words that a refusal is kept with."""
REASONS: Final = {
    ("client", INVALID_PASSWORD): "wrong_credential",
    ("client", INVALID_AUTHORIZATION): "not_allowed",
    ("client", PROTOCOL_VIOLATION): "broken_protocol",
    ("client", FEATURE_NOT_SUPPORTED): "unknown_protocol",
    ("authenticator", SYSTEM_ERROR): "authenticator_failed",
    ("target", CANNOT_CONNECT): "target_unreachable",
    ("target", TARGET_REJECTED): "target_rejected_credential",
    ("target", CONNECTION_FAILURE): "target_lost",
    ("target", PROTOCOL_VIOLATION): "target_broke_protocol",
    ("gateway", TOO_MANY_CONNECTIONS): "full",
    ("gateway", CANNOT_CONNECT_NOW): "shutting_down",
    ("gateway", INVALID_AUTHORIZATION): "too_slow",
    ("gateway", ADMIN_SHUTDOWN): "killed",
    ("gateway", INTERNAL_ERROR): "internal_error",
}
"""What a refusal is counted as, by whose fault it is and its SQLSTATE. A client that has left is counted apart."""
TARGETS_OWN: Final = ("3D000", "42501", "53300", "55000", "57P03")
"""SQLSTATEs of a target that are counted by themselves; whatever else one thinks of is OTHER_SQLSTATE."""
OTHER_SQLSTATE: Final = "other"
CANCELS: Final = ("nobody's key", "passed on", "passed on, not confirmed", "not passed on")
"""What may become of a cancel request, as its outcome begins; the longest that fits."""


def counted_as(fault: Fault) -> str:
    """SQLSTATE and reason of a refusal, in words that nobody outside chooses."""
    if fault.whose == "client" and fault.told is None:
        return f"{fault.sqlstate} left_or_garbage"
    reason = REASONS.get((fault.whose, fault.sqlstate))
    if reason is not None:
        return f"{fault.sqlstate} {reason}"
    if fault.whose == "target":
        sqlstate = fault.sqlstate if fault.sqlstate in TARGETS_OWN else OTHER_SQLSTATE
        return f"{sqlstate} target_refused"
    return f"{OTHER_SQLSTATE} {fault.whose}"


class Counts:
    """A sink that counts; `snapshot` says what it has counted and what is there. `name` is the process's."""

    def __init__(self, name: str = "0", audit: AuditSink | None = None) -> None:
        self._name = name
        self.histograms = Histograms()
        self._audit = audit
        self._version = version()
        self._started = time.time()
        self._accepted = 0
        self._refused: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._cancels: dict[str, int] = {}
        self._authenticator_failures = 0
        self._bytes_of_ended = [0, 0]
        self._bytes_told = [0, 0]
        self._targets: dict[Address, TargetRow] = {}
        self._other_targets = TargetRow(OTHERS)
        self._refusals: deque[tuple[float, str, str, bytes, bytes, str, str]] = deque(maxlen=MAX_REFUSALS)

    def __call__(self, event: Event) -> None:
        if isinstance(event, LoggedIn):
            self._count_login(event)
        elif isinstance(event, Ended):
            self._ended[event.reason] = self._ended.get(event.reason, 0) + 1
            self._bytes_of_ended[0] += event.bytes_from_client
            self._bytes_of_ended[1] += event.bytes_from_target
        elif isinstance(event, Refused):
            self._count_refusal(event)
        elif isinstance(event, TargetFailed):
            target = self._target(event.target)
            target.failures += 1
            target.is_up = event.answered
            target.last_failure = time.time()
            target.last_error = event.detail[:KEPT_OF_NAMES]
        elif isinstance(event, Cancelled):
            outcome = max((each for each in CANCELS if event.outcome.startswith(each)), key=len, default="refused")
            self._cancels[outcome] = self._cancels.get(outcome, 0) + 1

    def _count_login(self, event: LoggedIn) -> None:
        attached = event.attached
        histograms = self.histograms
        self._accepted += 1
        histograms.login.observe(event.total_seconds)
        histograms.authenticator.observe(attached.granted.authenticator_seconds)
        histograms.connect.observe(attached.connect_seconds)
        histograms.target_login.observe(attached.login_seconds)
        target = self._target(attached.reached)
        target.logins += 1
        target.is_up = True
        target.last_login = time.time()

    def _count_refusal(self, event: Refused) -> None:
        fault, started = event.fault, event.started
        counted = counted_as(fault)
        self._refused[counted] = self._refused.get(counted, 0) + 1
        if fault.whose == "authenticator":
            self._authenticator_failures += 1
        user = database = b""
        if started is not None:
            user, database = started.user[:KEPT_OF_NAMES], started.database[:KEPT_OF_NAMES]
        accepted = event.accepted
        # Not the fault itself: it holds the login's frames.
        detail = fault.detail[:KEPT_OF_NAMES]
        self._refusals.append((time.time(), accepted.session, accepted.address, user, database, fault.sqlstate, detail))

    def _target(self, address: Address) -> TargetRow:
        found = self._targets.get(address)
        if found is None:
            if len(self._targets) >= MAX_TARGETS:
                return self._other_targets
            found = self._targets[address] = TargetRow(str(address))
        return found

    async def snapshot(self, gateway: Gateway, *, rows: int = MAX_SESSIONS) -> Snapshot:
        """What there is now, with so many of the newest sessions one by one, and refusals if there are any `rows`."""
        open_at: dict[Address, int] = {}
        sessions: list[SessionRow] = []
        running = [0, 0]
        logging_in = count = 0
        now = time.time()
        began = time.monotonic()
        ended = list(self._bytes_of_ended)
        turn = began
        shown = (
            set(heapq.nlargest(rows, gateway.sessions, key=_number_of)) if 0 < rows < len(gateway.sessions) else None
        )
        for number, session in enumerate(list(gateway.sessions), 1):
            if not session.has_target:
                logging_in += session.state != "console"
            else:
                count += 1
                open_at[session.reached] = open_at.get(session.reached, 0) + 1
                from_client, from_target = session.moved
                running[0] += from_client
                running[1] += from_target
            if rows and (shown is None or session in shown):
                sessions.append(_row(session, now))
            if number % AT_ONCE == 0 and time.monotonic() - turn > TURN_SECONDS:
                await asyncio.sleep(0)
                turn = time.monotonic()
        # One that ended meanwhile is missing in both, this time; but a counter never goes back.
        told = self._bytes_told
        for side in (0, 1):
            told[side] = max(told[side], ended[side] + running[side])
        process = await measure_process(self._name)
        return Snapshot(
            version=self._version,
            started=self._started,
            at=now,
            took=time.monotonic() - began,
            draining=gateway.draining,
            paused=gateway.held is not None,
            open=count,
            logging_in=logging_in,
            accepted=self._accepted,
            refused=dict(self._refused),
            ended=dict(self._ended),
            cancels=dict(self._cancels),
            bytes_from_client=told[0],
            bytes_from_target=told[1],
            histograms=self.histograms.merge(Histograms()),
            audit_lost=self._audit.lost_in_all if self._audit is not None else 0,
            audit_failing=self._audit is not None and self._audit.is_failing,
            authenticator_failures=self._authenticator_failures,
            authenticators=[
                AuthenticatorRow(load.kind, load.running, load.queued, load.processes)
                for load in load_of(gateway.admission.authenticator)
            ],
            targets=list(self._target_rows(open_at)),
            sessions=sessions,
            sessions_left_out=max(0, len(gateway.sessions) - len(sessions)) if rows else 0,
            refusals=[_refusal(*each) for each in self._refusals] if rows else [],
            processes=[process],
        )

    def _target_rows(self, open_at: dict[Address, int]) -> Iterator[TargetRow]:
        for address, row in self._targets.items():
            row.sessions = open_at.pop(address, 0)
            yield msgspec.structs.replace(row)
        others = self._other_targets
        others.sessions = sum(open_at.values())
        if others.logins or others.failures:
            yield msgspec.structs.replace(others)


def _number_of(session: Session) -> int:
    return session.number


def _row(session: Session, now: float) -> SessionRow:
    identity, started = session.identity, session.started
    from_client, from_target = session.moved
    user = database = application = tls = target = target_user = target_database = ""
    if identity is not None:
        user, database = printable(identity.user), printable(identity.database)
        application, tls, target = printable(identity.application_name), identity.tls, str(session.reached)
        target_user, target_database = printable(identity.target_user), printable(identity.target_database)
    elif started is not None:
        user, database = printable(started.user), printable(started.database)
    return SessionRow(
        session=session.id,
        state=session.state,
        client=session.address,
        user=user,
        database=database,
        application_name=application,
        tls=tls,
        target=target,
        target_user=target_user,
        target_database=target_database,
        since=now - session.seconds,
        bytes_from_client=from_client,
        bytes_from_target=from_target,
    )


def _refusal(
    at: float, session: str, client: str, user: bytes, database: bytes, sqlstate: str, reason: str
) -> RefusalRow:
    return RefusalRow(at, session, client, printable(user), printable(database), sqlstate, printable(reason))


async def measure_lag(counts: Counts) -> None:
    """Notes how late the loop wakes who sleeps; runs until it is cancelled."""
    while True:
        due = time.monotonic() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        counts.histograms.lag.observe(max(0.0, time.monotonic() - due))


async def measure_process(name: str) -> Process:
    """What this process takes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Process(
        name=name,
        pid=os.getpid(),
        resident=_resident(used.ru_maxrss),
        descriptors=await _descriptors(),
        max_descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        cpu_seconds=used.ru_utime + used.ru_stime,
    )


def _resident(peak: int) -> int:
    """Bytes of memory now; where the system does not say, the most that it ever was."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak if sys.platform == "darwin" else peak * 1024


async def _descriptors() -> int:
    """How many are open. Newer kernels know; to list them takes milliseconds where there are many."""
    try:
        return os.stat("/proc/self/fd").st_size or await asyncio.to_thread(_listed, "/proc/self/fd")
    except OSError:
        return await asyncio.to_thread(_listed, "/dev/fd")


def _listed(folder: str) -> int:
    try:
        return len(os.listdir(folder))
    except OSError:
        return 0
