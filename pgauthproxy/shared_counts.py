"""Counts that the processes of a gateway share: its workers, the process that it has taken over from, and the one that
takes over from it.

So a limit holds for all workers together, a session that stays in an old process still counts for the limits of the
gateway, and whoever was throttled is so in the new one.

Strategy: each process that counts does so in a slot of its own, and holds a lock of the file on that slot. The kernel
takes the lock away when the process is gone, however that came. So a slot whose lock can be had is nobody's, and what
stands in it counts for nobody any more.
"""

import fcntl
import os
from collections.abc import Sequence
from typing import Final, Self

from pgauthproxy._ledger import SLOTS, Ledger
from pgauthproxy.build import build_ledger, suits
from pgauthproxy.config.schema import Settings

LOCKS_AT: Final = 1 << 40
"""Where in the file the locks of slots are: nothing else is there."""


class SharedCounts:
    """The descriptor of the memory that is counted in (-1 where none can be shared so), and the slots of this process,
    or of its workers."""

    def __init__(self, descriptor: int, slots: Sequence[int], ledger: Ledger | None) -> None:
        self.descriptor = descriptor
        self.slots = slots
        self._ledger = ledger

    @classmethod
    def begin(cls, settings: Settings, count: int = 1) -> Self:
        """Counts that nobody has shared yet."""
        if not hasattr(os, "memfd_create"):
            return cls(-1, range(count), None)
        descriptor = os.memfd_create("pgauthproxy-ledger")
        return cls(descriptor, range(count), build_ledger(settings, descriptor))

    @classmethod
    def share(cls, settings: Settings, descriptor: int, count: int = 1, others: Sequence[int] = ()) -> Self:
        """Those of the gateway that is to be succeeded, which has these slots itself; begun anew if their tables are
        too small for these settings, or another version's."""
        free = [slot for slot in range(SLOTS) if slot not in others and is_free(descriptor, slot)][:count]
        if len(free) == count and (ledger := _open(settings, descriptor)) is not None:
            for slot in {*free} & {*ledger.slots}:
                ledger.clear_slot(slot)
            return cls(descriptor, free, ledger)
        os.close(descriptor)
        return cls.begin(settings, count)

    def forget(self, slot: int) -> None:
        """Its process is no more."""
        if self._ledger is not None:
            self._ledger.clear_slot(slot)

    def forget_the_dead(self) -> None:
        """Clears the slots of processes that are no more, as far as they are not our own."""
        if self._ledger is None:
            return
        for slot in self._ledger.slots:
            if slot not in self.slots and is_free(self.descriptor, slot):
                self._ledger.clear_slot(slot)


def _open(settings: Settings, descriptor: int) -> Ledger | None:
    """None if it would not do."""
    try:
        ledger = build_ledger(settings, descriptor)
    except ValueError:
        return None
    return ledger if suits(ledger, settings) else None


def hold(descriptor: int, slot: int) -> bool:
    """Holds the lock of this slot for as long as the process lives; whether it could be had.

    It is lost when the process closes any descriptor of the file.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, LOCKS_AT + slot)
    except BlockingIOError:
        return False
    return True


def is_free(descriptor: int, slot: int) -> bool:
    """Whether no other process holds the lock of this slot. This one does not, after that."""
    if not hold(descriptor, slot):
        return False
    fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, LOCKS_AT + slot)
    return True
