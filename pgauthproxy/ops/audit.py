"""The audit log: a JSON line for each login, refusal, end, cancel, reload and admin act, wherever else they are told.

It has the facts of the log, but is neither filtered nor capped, and what is missing in it shows: lines are numbered,
and those that could not be written are counted in the next one that can.

Strategy: a line is made when something happens and written in the same turn of the event loop, together with others of
that turn. That of a login is written before its client is let in. Nothing is forced to the disk (fsync): what was
written survives the end of the gateway, not that of the machine.
"""

import asyncio
import datetime
import errno
import functools
import itertools
import json
import os
import time
from collections import deque
from typing import Final, NamedTuple

import msgspec

from pgauthproxy.errors import CANNOT_CONNECT_NOW, GatewayFault
from pgauthproxy.events import (
    AdminActed,
    AdminLeft,
    AdminLoggedIn,
    Cancelled,
    Ended,
    Event,
    LoggedIn,
    Noticed,
    Refused,
    Reloaded,
    Reloading,
    Sink,
)
from pgauthproxy.ops.later import Later
from pgauthproxy.ops.log import admin_facts, cancel_facts, end_facts, login_facts, refusal_facts
from pgauthproxy.ops.outlets import Outlet

MAX_WAITING_BYTES: Final = 1 << 20
"""Lines that wait for a reader who is slow; more are lost."""
COMPLAIN_SECONDS: Final = 60.0
DELETE: Final = 0x7F

Facts = dict[str, object]


def exact(value: bytes | str) -> str:
    """What a client sent, whole; bytes that are no UTF-8 as their escapes."""
    if isinstance(value, str):
        value = value.encode(errors="backslashreplace")
    return value.decode(errors="backslashreplace")


class _Entry(NamedTuple):
    """Something to write, and how many lines are lost if that fails."""

    text: bytes
    stands_for: int
    tells_of_loss: bool = False


END_OF_BROKEN_LINE: Final = _Entry(b"\n", 0)


class AuditSink:
    """Writes what happens to an outlet, which is open (`open`) before anything does.

    If it cannot, and it is `required`, nobody may log in (`check`, and LoggedIn is refused); otherwise the lines are
    lost. `complain` gets what an operator should know of that.
    """

    def __init__(self, outlet: Outlet, where: str, *, required: bool, complain: Sink) -> None:
        self._outlet = outlet
        self._where = where
        self._required = required
        self._complain = complain
        self._sequence = 0
        self._waiting: deque[_Entry] = deque()
        self._waiting_bytes = 0
        self._begun = 0
        """Bytes of the first entry that are written already."""
        self._lost = 0
        """Lines that are missing and that no line tells of yet."""
        self.lost_in_all = 0
        """Lines that are missing, whether any tells of them or not."""
        self._is_broken = False
        """Whether the last line in the outlet is a part of one that was lost."""
        self._trouble = ""
        """Why nothing can be written at the moment."""
        self._has_complained = False
        """Whether that was said."""
        self._complained_at = -COMPLAIN_SECONDS
        self._flush_planned = False
        self._later = Later(self.flush)

    @property
    def is_failing(self) -> bool:
        """Whether it could not be written when that was last tried."""
        return self._trouble != ""

    def open(self) -> None:
        """Raises OSError."""
        self._is_broken = self._outlet.open()
        self._put("opened", {})
        self.flush()

    def __call__(self, event: Event) -> None:
        match event:
            case LoggedIn():
                self._record_login(login_facts(event, exact))
            case Refused():
                self._put("refused", refusal_facts(event, exact))
            case Ended():
                self._put("end", end_facts(event, exact))
            case Cancelled():
                self._put("cancel", cancel_facts(event))
            case AdminLoggedIn() | AdminActed() | AdminLeft():
                self._put(*admin_facts(event, exact))
            case Reloading():
                self._open_anew()
            case Reloaded():
                self._put("reload", {"what": event.what, "faults": event.faults})
            case _:
                return
        self._flush_soon()

    def statement(self, session: str, is_prepared: bool, text: bytes, size: int) -> None:
        """Takes the SQL of a Query or Parse message; of `size` bytes those that are not too many."""
        facts: Facts = {"session": session, "message": "parse" if is_prepared else "query"}
        if len(text) < size:
            facts |= {"sql": _without_half_a_character(text), "cut": True, "bytes": size}
        else:
            facts["sql"] = exact(text)
        self._put("statement", facts)
        self._flush_soon()

    def check(self) -> None:
        """Raises GatewayFault if a login could not be recorded and has to be."""
        if self._required and self._trouble:
            self.flush()
            if self._trouble:
                raise self._refusal()

    def flush(self) -> None:
        """Writes what waits, as far as it is taken."""
        while self._waiting or self._lost:
            if not self._waiting:
                self._note_loss()
            try:
                taken = self._outlet.write(self._unwritten())
            except BlockingIOError:
                self._trouble = "nobody reads it"
                self._tell_trouble()
                self._later.plan()
                return
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    self._lose_all(error)
                    return
                # One that is too long for a message of the system's logger: the others need not go with it.
                entry = self._waiting.popleft()
                self._waiting_bytes -= len(entry.text)
                self._lose(entry)
            else:
                self._took(taken)
        self._trouble = ""
        if self._has_complained:
            self._has_complained = False
            facts = (("audit", self._where), ("sequence", self._sequence))
            self._complain(Noticed("warning", "audit can be written again", facts))

    def close(self) -> None:
        """The gateway has come to its end."""
        self._put("closed", {})
        self.flush()
        self._outlet.close()

    def _record_login(self, facts: Facts) -> None:
        """Writes a login before it counts. Raises GatewayFault if that fails and must not."""
        entry = self._put("login", facts)
        self.flush()
        if self._required and self._trouble:
            if self._waiting and self._waiting[-1] is entry and (len(self._waiting) > 1 or not self._begun):
                # It waits, and it will not have happened.
                self._waiting_bytes -= len(self._waiting.pop().text)
                self._sequence -= 1
            raise self._refusal()

    def _refusal(self) -> GatewayFault:
        detail = f"audit.required: {self._where} cannot be written: {self._trouble}"
        return GatewayFault(CANNOT_CONNECT_NOW, "the gateway cannot accept logins at the moment", detail)

    def _open_anew(self) -> None:
        """For whoever has moved the file away. What cannot be opened leaves the old one in use."""
        self.flush()
        if not self._outlet.can_be_moved:
            return
        try:
            self._is_broken = self._outlet.open()
        except OSError as error:
            facts = (("audit", self._where), ("reason", error.strerror))
            self._complain(Noticed("error", "audit not opened anew, the old one stays", facts))
            return
        if self._begun:
            # It goes to the new one as a whole; and that may be the same pipe as before.
            self._begun = 0
            self._waiting.appendleft(END_OF_BROKEN_LINE)
            self._waiting_bytes += len(END_OF_BROKEN_LINE.text)
        self._put("opened", {})
        self.flush()

    def _put(self, event: str, facts: Facts) -> _Entry:
        """Makes a line and has it wait for `flush`, if there is room for it."""
        if self._waiting_bytes > MAX_WAITING_BYTES and not self._trouble:
            self.flush()
        if self._waiting_bytes < MAX_WAITING_BYTES // 2:
            self._note_loss()
        self._sequence += 1
        entry = _Entry(self._line(event, facts), 1)
        if self._lost or self._waiting_bytes > MAX_WAITING_BYTES:
            # Once one is lost so are all behind it, until there is room again: the numbers say which are missing.
            self._lose(entry)
        else:
            self._append(entry)
        return entry

    def _note_loss(self) -> None:
        """Says how many lines are missing up to the last number."""
        if self._is_broken:
            self._append(END_OF_BROKEN_LINE)
            self._is_broken = False
        if self._lost:
            self._append(_Entry(self._line("lost", {"lines": self._lost}), self._lost, tells_of_loss=True))
            self._lost = 0

    def _append(self, entry: _Entry) -> None:
        self._waiting.append(entry)
        self._waiting_bytes += len(entry.text)

    def _line(self, event: str, facts: Facts) -> bytes:
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        whole: Facts = {
            "timestamp": f"{_second(second)}.{nanoseconds // 1000:06d}Z",
            "pid": os.getpid(),
            "sequence": self._sequence,
            "event": event,
            **facts,
        }
        line = msgspec.json.encode(whole)
        if not line.isascii() or DELETE in line:
            # Escaped as a whole, a line holds nothing that a terminal would act on.
            line = json.dumps(whole, separators=(",", ":")).encode()
        return line + b"\n"

    def _unwritten(self) -> list[bytes]:
        """What waits, as much as is worth offering."""
        if not self._begun and self._waiting_bytes <= self._outlet.at_once:
            return [entry.text for entry in self._waiting]
        texts = [self._waiting[0].text[self._begun :]]
        size = len(texts[0])
        for entry in itertools.islice(self._waiting, 1, None):
            size += len(entry.text)
            if size > self._outlet.at_once:
                break
            texts.append(entry.text)
        return texts

    def _took(self, taken: int) -> None:
        taken += self._begun
        if taken == self._waiting_bytes:
            self._waiting.clear()
            self._waiting_bytes = self._begun = 0
            return
        while self._waiting and taken >= len(self._waiting[0].text):
            size = len(self._waiting.popleft().text)
            taken -= size
            self._waiting_bytes -= size
        self._begun = taken

    def _lose(self, entry: _Entry) -> None:
        self._count_lost(entry)
        self._trouble = self._trouble or "a line is too long"
        self._tell_trouble()

    def _lose_all(self, error: OSError) -> None:
        self._is_broken = self._is_broken or self._begun > 0 or END_OF_BROKEN_LINE in self._waiting
        for entry in self._waiting:
            self._count_lost(entry)
        self._waiting.clear()
        self._waiting_bytes = self._begun = 0
        self._trouble = error.strerror or type(error).__name__
        self._tell_trouble()

    def _count_lost(self, entry: _Entry) -> None:
        self._lost += entry.stands_for
        if not entry.tells_of_loss:
            self.lost_in_all += entry.stands_for

    def _tell_trouble(self) -> None:
        """Complains, now and then."""
        now = time.monotonic()
        if now - self._complained_at >= COMPLAIN_SECONDS:
            self._complained_at = now
            self._has_complained = True
            facts = (("audit", self._where), ("reason", self._trouble), ("lost", self._lost))
            self._complain(Noticed("error", "audit cannot be written", facts))

    def _flush_soon(self) -> None:
        """Writes in this turn of the loop, with whatever else it brings."""
        if self._waiting and not self._flush_planned and not self._later.is_planned:
            self._flush_planned = True
            asyncio.get_running_loop().call_soon(self._flush_as_planned)

    def _flush_as_planned(self) -> None:
        self._flush_planned = False
        self.flush()


def _without_half_a_character(text: bytes) -> str:
    """A text that was cut, without the part of a character of UTF-8 that it may end in."""
    for size in range(1, min(4, len(text)) + 1):
        if text[-size] & 0xC0 != 0x80:
            whole = text if _is_utf8(text[-size:]) else text[:-size]
            return exact(whole)
    return exact(text)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


@functools.lru_cache(8)
def _second(second: int) -> str:
    return datetime.datetime.fromtimestamp(second, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
