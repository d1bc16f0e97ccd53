"""Counts that a process shares with the one that it takes over from, and with the one that takes over from it.

A session that stays in the old process still counts for the limits of the gateway, and whoever was throttled is so in
the new one.

Strategy: each process counts in a slot of its own, and holds a lock of the file on that slot. The kernel takes the lock
away when the process is gone, however that came. So a slot whose lock can be had is nobody's, and what stands in it
counts for nobody any more.
"""

import fcntl
import os
from typing import Final, Self

from pgauthproxy._ledger import SLOTS, Ledger
from pgauthproxy.build import build_ledger, suits
from pgauthproxy.config.schema import Settings

LOCKS_AT: Final = 1 << 40
"""Where in the file the locks of slots are: nothing else is there."""


class SharedCounts:
    """The descriptor of the memory that is counted in (-1 where none can be shared so), and this process's slot."""

    def __init__(self, descriptor: int, slot: int, ledger: Ledger | None) -> None:
        self.descriptor = descriptor
        self.slot = slot
        self._ledger = ledger

    @classmethod
    def begin(cls, settings: Settings) -> Self:
        """Counts that nobody has shared yet."""
        if not hasattr(os, "memfd_create"):
            return cls(-1, 0, None)
        descriptor = os.memfd_create("pgauthproxy-ledger")
        _lock(descriptor, 0)
        return cls(descriptor, 0, build_ledger(settings, descriptor))

    @classmethod
    def share(cls, settings: Settings, descriptor: int) -> Self:
        """Those of the process that is to be succeeded; begun anew if their tables are too small for these settings, or
        another version's."""
        slot = next((slot for slot in range(SLOTS) if _lock(descriptor, slot)), None)
        if slot is not None and (ledger := _open(settings, descriptor, slot)) is not None:
            if slot in ledger.slots:
                ledger.clear_slot(slot)
            return cls(descriptor, slot, ledger)
        os.close(descriptor)
        return cls.begin(settings)

    def forget_the_dead(self) -> None:
        """Clears the slots of processes that are no more."""
        if self._ledger is None:
            return
        for slot in self._ledger.slots:
            if slot != self.slot and _lock(self.descriptor, slot):
                self._ledger.clear_slot(slot)
                _unlock(self.descriptor, slot)


def _open(settings: Settings, descriptor: int, slot: int) -> Ledger | None:
    """None if it would not do."""
    try:
        ledger = build_ledger(settings, descriptor, slot)
    except ValueError:
        return None
    return ledger if suits(ledger, settings) else None


def _lock(descriptor: int, slot: int) -> bool:
    """Whether it could be had. It is the process's, and lost when that closes any descriptor of the file."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, LOCKS_AT + slot)
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int, slot: int) -> None:
    fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, LOCKS_AT + slot)
