"""Who may connect at all: judged by the address alone, before a byte is read.

Whoever may not is closed upon without a word, and costs nothing but the accept. That must also hold for the log, which
a stranger could fill otherwise: the first is told of at once, those that follow are counted.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from pgauthproxy.auth.networks import Networks, is_local
from pgauthproxy.events import Noticed, Sink

REPORT_SECONDS: Final = 10.0


class Access:
    """The lists `allow` and `deny`. An empty `allow` is everybody; `deny` wins. `balancers` may say who a client is."""

    def __init__(self, allow: Sequence[str], deny: Sequence[str], balancers: Sequence[str] = ()) -> None:
        """Raises ValueError, which names the text."""
        self._balancers = Networks(tuple(balancers))
        self._allowed = Networks(tuple(allow)) if allow else None
        self._denied = Networks(tuple(deny)) if deny else None

    def refusal(self, address: str, *, as_balancer: bool = False) -> str | None:
        """Why a client with this address may not connect; None if it may."""
        if as_balancer and not self._balancers.has(address):
            return "not in proxy_protocol_from"
        if self._denied is not None and self._denied.has(address):
            return "in deny"
        # Who can reach a Unix socket is the file system's to say, unless `deny` has `local`.
        if self._allowed is None or self._allowed.has(address) or is_local(address):
            return None
        return "not in allow"


class Denials:
    """Tells of connections that were closed unread, however many they are, in one line every REPORT_SECONDS."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._count = 0
        self._last = ("", "")
        self._next_report: asyncio.TimerHandle | None = None

    def note(self, address: str, reason: str) -> None:
        """One more."""
        self._count += 1
        self._last = address, reason
        if self._next_report is None:
            self._report()

    def _report(self) -> None:
        """A quiet period ends the reports: the next one is told of at once again."""
        self._next_report = None
        if self._count:
            self.flush()
            self._next_report = asyncio.get_running_loop().call_later(REPORT_SECONDS, self._report)

    def flush(self) -> None:
        """Tells of all that were not told of yet; client and reason are the last one's."""
        if self._count:
            address, reason = self._last
            facts = (("count", self._count), ("client", address), ("reason", reason))
            self._count = 0
            self._sink(Noticed("warning", "connections denied", facts))
