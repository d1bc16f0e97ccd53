"""The last minutes, for whoever comes to look now: what happened between one snapshot and the next."""

from collections import deque
from typing import Final

import msgspec

from pgauthproxy.ops.snapshot import Snapshot, quantile

STEP_SECONDS: Final = 2.0
MAX_POINTS: Final = 150


class Point(msgspec.Struct, frozen=True):
    """What happened in the seconds up to `at`: logins and refusals a second, and how long logins took, if there were
    any."""

    at: float
    logins: float
    refused: float
    open: int
    p50: float | None
    p95: float | None
    p99: float | None


class History:
    """Points, the oldest first."""

    def __init__(self) -> None:
        self.points: deque[Point] = deque(maxlen=MAX_POINTS)
        self._last: Snapshot | None = None

    def note(self, snapshot: Snapshot) -> None:
        """Takes the next snapshot. What was counted may be less than before: a process has gone, with its counts."""
        last, self._last = self._last, snapshot
        if last is None or snapshot.at <= last.at:
            return
        seconds = snapshot.at - last.at
        pairs = zip(snapshot.histograms.login.counts, last.histograms.login.counts, strict=True)
        counts = [max(0, now - before) for now, before in pairs]
        took = [quantile(counts, part) for part in (0.5, 0.95, 0.99)] if any(counts) else [None] * 3
        refused = sum(snapshot.refused.values()) - sum(last.refused.values())
        self.points.append(
            Point(
                snapshot.at,
                max(0, snapshot.accepted - last.accepted) / seconds,
                max(0, refused) / seconds,
                snapshot.open,
                *took,
            )
        )
