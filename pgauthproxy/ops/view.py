"""What the live page and `pgauthproxy top` show of a gateway: its JSON is what `/state` and `/events` give."""

from typing import Final

import msgspec

from pgauthproxy.ops.history import Point
from pgauthproxy.ops.snapshot import AuthenticatorRow, Process, RefusalRow, SessionRow, Snapshot, TargetRow

MAX_ROWS: Final = 500
"""Sessions that are shown, the newest."""
COPIED: Final = (
    "version",
    "started",
    "at",
    "draining",
    "paused",
    "open",
    "logging_in",
    "accepted",
    "refused",
    "bytes_from_client",
    "bytes_from_target",
    "authenticators",
    "targets",
    "refusals",
    "processes",
)
"""What a View has of a snapshot as it is."""


class View(msgspec.Struct, frozen=True):
    """`point` is the newest of `history`, which is not given each time."""

    version: str
    started: float
    at: float
    draining: bool
    paused: bool
    open: int
    logging_in: int
    accepted: int
    refused: dict[str, int]
    bytes_from_client: int
    bytes_from_target: int
    authenticators: list[AuthenticatorRow]
    targets: list[TargetRow]
    sessions: list[SessionRow]
    sessions_left_out: int
    refusals: list[RefusalRow]
    processes: list[Process]
    can_act: bool
    token_is_set: bool
    point: Point | None = None
    history: list[Point] | None = None


def view_of(snapshot: Snapshot, points: list[Point], *, whole: bool, token_is_set: bool) -> View:
    """A view, with all of history if it is to be `whole`. Who gets one where a token is set has it, and may act."""
    newest = sorted(snapshot.sessions, key=lambda row: row.since, reverse=True)[:MAX_ROWS]
    return View(
        **{name: getattr(snapshot, name) for name in COPIED},
        sessions=newest,
        sessions_left_out=snapshot.sessions_left_out + len(snapshot.sessions) - len(newest),
        can_act=token_is_set,
        token_is_set=token_is_set,
        point=points[-1] if points else None,
        history=points if whole else None,
    )
