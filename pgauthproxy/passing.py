"""Cancel requests that reach one worker, and whose keys are another one's."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pgauthproxy.control import CancelAsked, CancelDone
from pgauthproxy.gateway.cancel import NOBODYS, slot_of
from pgauthproxy.slots import Child

MOST_CANCELS: Final = 1024
"""Those that are under way at once."""


@dataclass(frozen=True, slots=True)
class Passing:
    """One on its way from one worker to another; the ticket is the asker's."""

    asker: Child
    ticket: int
    owner: Child


class CancelPassing:
    """Passes them on, and their outcomes back.

    `child_at` says who has the place of this number; `tell` sends a frame, and says whether it is on its way.
    """

    def __init__(
        self, child_at: Callable[[int], Child | None], tell: Callable[[Child, CancelAsked | CancelDone], bool]
    ) -> None:
        self._child_at = child_at
        self._tell = tell
        self._tickets = itertools.count()
        self._passing: dict[int, Passing] = {}

    def pass_on(self, asker: Child, asked: CancelAsked) -> None:
        """To the worker that the key names."""
        owner = self._child_at(slot_of(asked.key))
        if owner is None or owner is asker:
            self._tell(asker, CancelDone(asked.ticket, "", NOBODYS))
        elif len(self._passing) >= MOST_CANCELS:
            self._tell(asker, CancelDone(asked.ticket, "", "not passed on: too many cancel requests"))
        else:
            ticket = next(self._tickets)
            self._passing[ticket] = Passing(asker, asked.ticket, owner)
            if not self._tell(owner, CancelAsked(ticket, asked.key)):
                self.pass_back(CancelDone(ticket, "", "not passed on: its worker takes nothing"))

    def pass_back(self, done: CancelDone) -> None:
        """To the worker that has asked."""
        passing = self._passing.pop(done.ticket, None)
        if passing is not None:
            self._tell(passing.asker, CancelDone(passing.ticket, done.session, done.outcome))

    def owner_gone(self, child: Child) -> None:
        """Nothing comes back from it any more."""
        for ticket, passing in list(self._passing.items()):
            if passing.owner is child:
                self.pass_back(CancelDone(ticket, "", "not passed on: its worker is gone"))
