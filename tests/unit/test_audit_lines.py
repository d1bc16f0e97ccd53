"""The audit log: what is written where, what is lost when it cannot be, and that both can be told from its lines."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import resource
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pgauthproxy.errors import GatewayFault
from pgauthproxy.events import (
    AdminActed,
    AdminLeft,
    AdminLoggedIn,
    CloseReason,
    Ended,
    Event,
    LoggedIn,
    Noticed,
    Refused,
    Reloaded,
    Reloading,
)
from pgauthproxy.ops import audit, outlets
from pgauthproxy.ops.audit import AuditSink
from pgauthproxy.stages import Accepted, Address, Attached, Granted, Greeting, Mapping, Started

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BLOCKED = BlockingIOError(errno.EAGAIN, "nobody reads it")
RELOADED = Reloaded("users")


class Script:
    """An outlet that takes so many bytes at each call, or raises what it is told; all that it took is `taken`."""

    can_be_moved = True
    at_once = 1 << 20

    def __init__(self) -> None:
        self.taken = b""
        self.steps: list[int | OSError] = []
        self.calls = 0

    def open(self) -> bool:
        return False

    def write(self, lines: Sequence[bytes]) -> int:
        self.calls += 1
        data = b"".join(lines)
        step = self.steps.pop(0) if self.steps else len(data)
        if isinstance(step, OSError):
            raise step
        self.taken += data[:step]
        return len(data[:step])

    def close(self) -> None:
        return


class Audited:
    """An audit log in a test, and what it complains of. All `outlets` are closed when the test ends."""

    outlets: ClassVar[list[outlets.Outlet]] = []

    def __init__(self, outlet: outlets.Outlet, *, required: bool = False) -> None:
        self.outlets.append(outlet)
        self.complaints: list[Event] = []
        self.sink = AuditSink(outlet, "there", required=required, complain=self.complaints.append)
        self.sink.open()

    def happens(self, *events: Event) -> None:
        """All in one turn of an event loop, which then ends."""

        async def turn() -> None:
            for event in events:
                self.sink(event)

        asyncio.run(turn())

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(event.level, event.what) for event in self.complaints if isinstance(event, Noticed)]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while Audited.outlets:
        Audited.outlets.pop().close()


@pytest.fixture
def script() -> Script:
    return Script()


def parsed(written: bytes) -> list[dict[str, Any]]:
    assert written.endswith(b"\n")
    return [json.loads(line) for line in written.splitlines()]


def numbers(written: bytes) -> list[tuple[str, int]]:
    return [(line["event"], line["sequence"]) for line in parsed(written)]


def started(user: bytes = b"alice") -> Started:
    return Started(Accepted("2a", "192.0.2.1:50000"), ((b"user", user), (b"database", b"shop")))


def login(user: bytes = b"alice") -> LoggedIn:
    mapping = Mapping(hosts=(Address("db", 5432),), parameters=((b"user", b"app"),), credential=None)
    granted = Granted(started(user), mapping, None, 0.001)
    return LoggedIn(Attached(granted, Address("db", 5432), None, Greeting(b"", b"", b""), 0.002, 0.003), 0.007)


def refused(user: bytes = b"mallory", detail: str = "no") -> Refused:
    started_as = started(user)
    return Refused(started_as.accepted, started_as, GatewayFault("28000", "no", detail))


ENDED = Ended("2a", CloseReason.CLIENT_CLOSED, "", 12, 34, 5.6789)


# Lines


def test_each_line_has_its_time_process_and_number(script: Script) -> None:
    audited = Audited(script)
    audited.happens(login(), ENDED)
    audited.sink.close()
    lines = parsed(script.taken)
    assert [line["event"] for line in lines] == ["opened", "login", "end", "closed"]
    assert [line["sequence"] for line in lines] == [1, 2, 3, 4]
    assert {line["pid"] for line in lines} == {os.getpid()}
    assert all(TIMESTAMP.fullmatch(line["timestamp"]) for line in lines)
    assert sorted(line["timestamp"] for line in lines) == [line["timestamp"] for line in lines]


def test_lines_have_the_facts_of_the_log(script: Script) -> None:
    audited = Audited(script)
    audited.happens(login(), refused(), ENDED, Reloaded("certificates", ("bad", "worse")))
    facts = [{name: line[name] for name in line if name not in ("timestamp", "pid")} for line in parsed(script.taken)]
    assert facts[1:] == [
        {
            "sequence": 2,
            "event": "login",
            "session": "2a",
            "client": "192.0.2.1:50000",
            "user": "alice",
            "database": "shop",
            "target": "db:5432",
            "target_user": "app",
            "target_database": "app",
            "authenticator_ms": 1.0,
            "connect_ms": 2.0,
            "login_ms": 3.0,
            "total_ms": 7.0,
        },
        {
            "sequence": 3,
            "event": "refused",
            "session": "2a",
            "client": "192.0.2.1:50000",
            "user": "mallory",
            "database": "shop",
            "sqlstate": "28000",
            "fault_of": "gateway",
            "reason": "no",
        },
        {
            "sequence": 4,
            "event": "end",
            "session": "2a",
            "why": "client closed",
            "bytes_from_client": 12,
            "bytes_from_target": 34,
            "seconds": 5.679,
        },
        {"sequence": 5, "event": "reload", "what": "certificates", "faults": ["bad", "worse"]},
    ]


def test_what_administrators_do_is_audited(script: Script) -> None:
    audited = Audited(script)
    who = ("3c", "[local]", b"root")
    audited.happens(AdminLoggedIn(*who, True), AdminActed(*who, "KILL 2a", "1 session"), AdminLeft("3c", "", 1.5))
    facts = [{name: line[name] for name in line if name not in ("timestamp", "pid")} for line in parsed(script.taken)]
    assert facts[1:] == [
        {
            "sequence": 2,
            "event": "admin login",
            "session": "3c",
            "client": "[local]",
            "user": "root",
            "may_act": True,
        },
        {
            "sequence": 3,
            "event": "admin act",
            "session": "3c",
            "client": "[local]",
            "user": "root",
            "act": "KILL 2a",
            "outcome": "1 session",
        },
        {"sequence": 4, "event": "admin left", "session": "3c", "seconds": 1.5},
    ]


@pytest.mark.parametrize(
    "user",
    [b'"}\n{"event":"login"', b"\x00\x1b[2J\x7f", "é\x9b\u202e\U0001f600".encode(), b"\xff\xfe", b"x" * 10_000],
    ids=["json", "control", "unicode", "no UTF-8", "long"],
)
def test_what_clients_send_is_whole_and_does_nothing_to_a_line_or_a_terminal(script: Script, user: bytes) -> None:
    audited = Audited(script)
    audited.happens(refused(user))
    (line,) = script.taken.splitlines()[1:]
    assert all(0x20 <= byte < 0x7F for byte in line)
    assert json.loads(line)["user"] == user.decode(errors="backslashreplace")


def test_what_concerns_nobodys_session_is_not_audited(script: Script) -> None:
    audited = Audited(script)
    audited.happens(Noticed("info", "listening"))
    assert [line["event"] for line in parsed(script.taken)] == ["opened"]


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [
        (b"select 1", 8, {"sql": "select 1"}),
        (b"select", 8, {"sql": "select", "cut": True, "bytes": 8}),
        ("aé".encode(), 9, {"sql": "aé", "cut": True, "bytes": 9}),
        ("aé".encode()[:-1], 9, {"sql": "a", "cut": True, "bytes": 9}),
        ("a\U0001f600".encode()[:-1], 9, {"sql": "a", "cut": True, "bytes": 9}),
        (b"\x80\x80\x80\x80\x80", 9, {"sql": r"\x80\x80\x80\x80\x80", "cut": True, "bytes": 9}),
        (b"", 9, {"sql": "", "cut": True, "bytes": 9}),
    ],
)
def test_a_statement_says_whether_it_was_cut(script: Script, text: bytes, size: int, shown: dict[str, object]) -> None:
    audited = Audited(script)

    async def turn() -> None:
        audited.sink.statement("2a", True, text, size)

    asyncio.run(turn())
    line = parsed(script.taken)[-1]
    assert {name: line[name] for name in line if name not in ("timestamp", "pid", "sequence")} == {
        "event": "statement",
        "session": "2a",
        "message": "parse",
        **shown,
    }


def test_what_happens_in_one_turn_is_written_at_once_and_a_login_before_it_goes_on(script: Script) -> None:
    audited = Audited(script)
    calls = script.calls
    audited.happens(ENDED, ENDED, ENDED)
    assert script.calls == calls + 1

    async def turn() -> None:
        audited.sink(ENDED)
        audited.sink(login())
        assert numbers(script.taken)[-2:] == [("end", 5), ("login", 6)]

    asyncio.run(turn())


# Losses


def test_what_could_not_be_written_is_counted_in_the_next_line_that_can(script: Script) -> None:
    audited = Audited(script)
    script.steps = [FULL, FULL]
    audited.happens(ENDED, ENDED)
    audited.happens(ENDED)
    audited.happens(ENDED)
    assert numbers(script.taken) == [("opened", 1), ("lost", 4), ("end", 5)]
    assert parsed(script.taken)[1]["lines"] == 3
    assert audited.said == [("error", "audit cannot be written"), ("warning", "audit can be written again")]


def test_a_line_about_losses_that_is_lost_itself_counts_for_those(script: Script) -> None:
    audited = Audited(script)
    script.steps = [FULL] * 5
    for _ in range(6):
        audited.happens(ENDED)
    assert numbers(script.taken) == [("opened", 1), ("lost", 6), ("end", 7)]
    assert parsed(script.taken)[1]["lines"] == 5


@pytest.mark.parametrize("written", [1, 50])
def test_a_part_of_a_line_is_not_joined_to_the_next(script: Script, written: int) -> None:
    audited = Audited(script)
    script.steps = [written, FULL, FULL]
    audited.happens(ENDED)
    audited.happens(ENDED)
    audited.happens(ENDED)
    opened, part, lost, end = script.taken.splitlines()
    assert len(part) == written
    assert json.loads(lost)["lines"] == 2
    assert (json.loads(opened)["sequence"], json.loads(lost)["sequence"], json.loads(end)["sequence"]) == (1, 3, 4)


def test_whole_lines_of_a_batch_that_was_cut_off_are_not_lost(script: Script) -> None:
    audited = Audited(script)
    audited.happens(ENDED)
    size = len(script.taken.splitlines(keepends=True)[-1])
    script.steps = [2 * size + 10, FULL]
    audited.happens(ENDED, ENDED, ENDED)
    audited.happens(ENDED)
    lines = script.taken.splitlines()
    assert len(lines.pop(4)) == 10
    assert [json.loads(line)["sequence"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert json.loads(lines[4]) == {**json.loads(lines[4]), "event": "lost", "lines": 1}


@pytest.mark.parametrize("taken", [1, 7, 100, 1000])
def test_an_outlet_that_takes_little_at_once_gets_all_of_it(script: Script, taken: int) -> None:
    audited = Audited(script)
    script.steps = [taken] * 5000
    audited.happens(ENDED, ENDED, ENDED)
    assert [number for _, number in numbers(script.taken)] == [1, 2, 3, 4]


def test_complaints_are_few(script: Script) -> None:
    audited = Audited(script)
    for _ in range(50):
        script.steps = [FULL]
        audited.happens(ENDED)
        audited.happens(ENDED)
    assert audited.said == [("error", "audit cannot be written"), ("warning", "audit can be written again")]


def test_a_message_that_is_too_long_for_a_logger_takes_no_other_with_it(script: Script) -> None:
    audited = Audited(script)
    script.steps = [OSError(errno.EMSGSIZE, "too long")]
    audited.happens(ENDED, ENDED, ENDED)
    assert numbers(script.taken) == [("opened", 1), ("end", 3), ("end", 4), ("lost", 4)]
    assert parsed(script.taken)[-1]["lines"] == 1


def test_lines_wait_for_a_slow_reader(script: Script) -> None:
    audited = Audited(script)
    script.steps = [BLOCKED]
    audited.happens(ENDED, ENDED)
    assert numbers(script.taken) == [("opened", 1)]
    audited.sink.flush()
    assert numbers(script.taken) == [("opened", 1), ("end", 2), ("end", 3)]


def test_lines_that_wait_are_written_later_without_any_other_event(script: Script) -> None:
    audited = Audited(script)

    async def turn() -> None:
        script.steps = [BLOCKED, BLOCKED]
        audited.sink(ENDED)
        async with asyncio.timeout(20):
            while script.taken.count(b"\n") < 2:  # noqa: ASYNC110 (the loop's own timer writes it)
                await asyncio.sleep(0.01)

    asyncio.run(turn())
    assert numbers(script.taken) == [("opened", 1), ("end", 2)]


def test_no_more_lines_wait_than_there_is_room_for(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_WAITING_BYTES", 1000)
    audited = Audited(script)
    script.steps = [BLOCKED] * 1000

    async def pour() -> None:
        for _ in range(100):
            audited.sink(ENDED)
            await asyncio.sleep(0)

    asyncio.run(pour())
    script.steps = []
    audited.sink.flush()
    lines = parsed(script.taken)
    assert [line["event"] for line in lines] == ["opened", *["end"] * (len(lines) - 2), "lost"]
    assert len(lines) < 15
    assert lines[-1]["sequence"] == 101
    assert lines[-1]["lines"] == 101 - lines[-2]["sequence"]


def test_a_flood_in_one_turn_is_no_reason_to_lose_anything(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_WAITING_BYTES", 1000)
    audited = Audited(script)
    audited.happens(*[ENDED] * 200)
    assert [number for _, number in numbers(script.taken)] == list(range(1, 202))


# Required


def test_a_login_that_cannot_be_recorded_is_refused_where_that_is_required(script: Script) -> None:
    audited = Audited(script, required=True)
    script.steps = [FULL]
    with pytest.raises(GatewayFault) as refusal:
        audited.happens(login())
    assert refusal.value.sqlstate == "57P03"
    assert refusal.value.told == b"the gateway cannot accept logins at the moment"
    assert refusal.value.detail == "audit.required: there cannot be written: No space left on device"


def test_nobody_may_try_while_nothing_can_be_written(script: Script) -> None:
    audited = Audited(script, required=True)
    audited.sink.check()
    script.steps = [FULL, FULL, FULL]
    audited.happens(ENDED)
    for _ in range(2):
        with pytest.raises(GatewayFault):
            audited.sink.check()
    audited.sink.check()
    assert numbers(script.taken) == [("opened", 1), ("lost", 2)]
    audited.happens(login())
    assert numbers(script.taken)[-1] == ("login", 3)


def test_a_login_that_waits_for_a_reader_and_is_refused_is_not_recorded_as_one(script: Script) -> None:
    audited = Audited(script, required=True)
    script.steps = [BLOCKED, BLOCKED]
    audited.happens(ENDED)
    with pytest.raises(GatewayFault):
        audited.happens(login())
    audited.happens(refused())
    audited.sink.flush()
    assert numbers(script.taken) == [("opened", 1), ("end", 2), ("refused", 3)]


def test_where_it_is_not_required_everybody_may(script: Script) -> None:
    audited = Audited(script)
    script.steps = [FULL, FULL]
    audited.happens(login())
    audited.sink.check()
    audited.happens(login())
    audited.happens(ENDED)
    assert numbers(script.taken) == [("opened", 1), ("lost", 3), ("end", 4)]


# Files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


def test_a_file_is_made_for_its_owner_alone(file: Path) -> None:
    Audited(outlets.outlet_of(str(file)))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("before", "joint"), [(b"", b""), (b"whole\n", b""), (b'{"half":', b"\n")], ids=["new", "whole", "half"]
)
def test_a_file_is_appended_to_on_a_line_of_its_own(file: Path, before: bytes, joint: bytes) -> None:
    file.write_bytes(before)
    Audited(outlets.outlet_of(str(file)))
    after = file.read_bytes()
    assert after.startswith(before + joint + b'{"timestamp"')
    assert numbers(after[len(before + joint) :]) == [("opened", 1)]


def test_a_file_that_was_moved_away_is_followed_by_a_new_one(file: Path) -> None:
    audited = Audited(outlets.outlet_of(str(file)))
    audited.happens(ENDED)
    moved = file.rename(file.with_suffix(".1"))
    audited.happens(ENDED)
    audited.happens(Reloading(), RELOADED)
    assert numbers(moved.read_bytes()) == [("opened", 1), ("end", 2), ("end", 3)]
    assert numbers(file.read_bytes()) == [("opened", 4), ("reload", 5)]


def test_a_file_that_cannot_be_opened_anew_leaves_the_old_one_in_use(file: Path) -> None:
    audited = Audited(outlets.outlet_of(str(file)))
    moved = file.rename(file.with_suffix(".1"))
    file.mkdir()
    audited.happens(Reloading(), RELOADED)
    assert numbers(moved.read_bytes()) == [("opened", 1), ("reload", 2)]
    assert audited.said == [("error", "audit not opened anew, the old one stays")]


def test_a_file_that_is_full_in_the_middle_of_a_line_has_no_part_of_it(file: Path) -> None:
    audited = Audited(outlets.outlet_of(str(file)))
    audited.happens(ENDED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 30, hard))
    try:
        audited.happens(ENDED, ENDED)
        audited.happens(ENDED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    audited.happens(ENDED)
    lines = file.read_bytes().splitlines()
    assert [(json.loads(line)["event"], json.loads(line)["sequence"]) for line in lines] == [
        ("opened", 1),
        ("end", 2),
        ("lost", 5),
        ("end", 6),
    ]
    assert json.loads(lines[2])["lines"] == 3


def test_a_part_of_a_line_stays_where_another_process_has_written_behind_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outlet = outlets.outlet_of(str(file))
    outlet.open()
    write = os.write

    def take_little(descriptor: int, data: bytes) -> int:
        taken = write(descriptor, data[:10])
        with file.open("ab") as other:
            other.write(b"another\n")
        return taken

    monkeypatch.setattr(os, "write", take_little)
    assert outlet.write([b"a line that is cut\n"]) == 10
    outlet.close()
    assert file.read_bytes() == b"a line thaanother\n"


def test_a_full_device_loses_every_line_and_says_so(file: Path) -> None:
    audited = Audited(outlets.outlet_of("/dev/full"))
    audited.happens(ENDED)
    (complaint,) = audited.complaints
    assert isinstance(complaint, Noticed)
    assert dict(complaint.facts) == {"audit": "there", "reason": "No space left on device", "lost": 1}


def test_a_named_pipe_that_nobody_reads_is_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(OSError, match="No such device"):
        Audited(outlets.outlet_of(str(file)))
    reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        audited = Audited(outlets.outlet_of(str(file)))
        audited.happens(*[ENDED] * 1000)
        assert audited.said == [("error", "audit cannot be written")]
        written = b""
        while len(parsed(written or b"\n") if written.endswith(b"\n") else []) < 1001:
            with contextlib.suppress(BlockingIOError):
                written += os.read(reader, 1 << 20)
            audited.sink.flush()
    finally:
        os.close(reader)
    assert [number for _, number in numbers(written)] == list(range(1, 1002))


# Syslog


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Callable[[], socket.socket]]:
    """Starts a system's logger, as far as its socket goes."""
    started: list[socket.socket] = []

    def start() -> socket.socket:
        (tmp_path / "log").unlink(missing_ok=True)
        started.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        started[-1].bind(str(tmp_path / "log"))
        started[-1].settimeout(20)
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_syslog_gets_a_message_for_each_line(listening: Callable[[], socket.socket], tmp_path: Path) -> None:
    logger = listening()
    audited = Audited(outlets.outlet_of(f"syslog:{tmp_path}/log"))
    audited.happens(ENDED, ENDED)
    for event, number in (("opened", 1), ("end", 2), ("end", 3)):
        message = logger.recv(65536).decode()
        head, _, line = message.partition("]: ")
        assert re.fullmatch(rf"<86>[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d pgauthproxy\[{os.getpid()}", head)
        assert (json.loads(line)["event"], json.loads(line)["sequence"]) == (event, number)
        assert not line.endswith("\n")


def test_syslog_that_was_started_anew_is_found_again(listening: Callable[[], socket.socket], tmp_path: Path) -> None:
    listening().close()
    with pytest.raises(ConnectionRefusedError):
        Audited(outlets.outlet_of(f"syslog:{tmp_path}/log"))
    first = listening()
    audited = Audited(outlets.outlet_of(f"syslog:{tmp_path}/log"))
    first.close()
    audited.happens(ENDED)
    second = listening()
    audited.happens(ENDED)
    events = [json.loads(second.recv(65536).decode().partition("]: ")[2]) for _ in range(2)]
    assert [(each["event"], each["sequence"]) for each in events] == [("lost", 2), ("end", 3)]


def test_syslog_that_takes_nothing_at_the_moment_is_not_waited_for(
    listening: Callable[[], socket.socket], tmp_path: Path
) -> None:
    logger = listening()
    audited = Audited(outlets.outlet_of(f"syslog:{tmp_path}/log"))
    audited.happens(*[ENDED] * 2000)
    assert audited.said == [("error", "audit cannot be written")]
    found = 0
    while found < 2001:
        found = json.loads(logger.recv(65536).decode().partition("]: ")[2])["sequence"]
        audited.sink.flush()
    assert audited.said[-1] == ("warning", "audit can be written again")


# What can be told beforehand


def test_a_place_where_nothing_can_be_written_is_known_beforehand(tmp_path: Path) -> None:
    assert outlets.fault_of("stdout") is None
    assert outlets.fault_of(str(tmp_path / "new")) is None
    assert outlets.fault_of(str(tmp_path)) == f"{tmp_path}: Is a directory"
    assert outlets.fault_of(str(tmp_path / "no/where")) == f"{tmp_path}/no: No such file or directory"
    assert outlets.fault_of(f"syslog:{tmp_path}/none") == f"{tmp_path}/none: No such file or directory"
