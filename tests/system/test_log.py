"""The log: what its lines hold, what they never hold, and that nobody who fails to read it stops the gateway."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgauthproxy.auth.command import MAX_SAID_LINES
from pgauthproxy.throwaway import ThrowawayPostgres, free_port
from tests.conftest import WAIT_SECONDS, Gateway
from tests.system.conftest import (
    MODULE,
    Serve,
    Serving,
    assert_serves,
    configure,
    environment,
    is_listened_on,
    wait_until,
    write_mapped,
)
from tests.wire import RawClient, ScriptedTarget, greet, message, password, query, raw_startup, startup

FORMATS = ["text", "json"]
TEXT_LINE = re.compile(r'(\S+) (debug|info|warning|error) +(.*?)((?: [a-z_]+=(?:"(?:[^"\\]|\\.)*"|[^\s"]*))*)')
TEXT_FIELD = re.compile(r' ([a-z_]+)=("(?:[^"\\]|\\.)*"|\S*)')
CLIENTS_PASSWORD = "what Alice knows"
TARGETS_PASSWORD = "scram secret"
WRONG_PASSWORD = "the wrong secret"
TARGETS_HASH = "md5" + hashlib.md5(b"hashed secrethashed").hexdigest()  # noqa: S324 (the protocol's own)

Line = dict[str, str]


def parsed(line: str) -> Line:
    """The fields of one line of the log in either form, as strings."""
    if line.startswith("{"):
        return {name: str(value) for name, value in json.loads(line).items()}
    found = TEXT_LINE.fullmatch(line)
    assert found is not None, line
    fields = {
        name: json.loads(value) if value.startswith('"') else value for name, value in TEXT_FIELD.findall(found[4])
    }
    return {"timestamp": found[1], "level": found[2], "event": found[3]} | fields


class Log:
    """The lines of a gateway's log."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.port = serving.port

    def lines(self, event: str = "") -> list[Line]:
        whole = self.serving.text.rpartition("\n")[0]
        lines = [parsed(line) for line in whole.split("\n")]
        return [line for line in lines if not event or line["event"] == event]

    def wait_for(self, event: str) -> Line:
        """The only line of this event, once it is there."""
        wait_until(lambda: self.lines(event), event)
        (line,) = self.lines(event)
        return line


StartLog = Callable[..., Log]


@pytest.fixture(params=FORMATS)
def log_of(request: pytest.FixtureRequest, serve: Serve, folder: Path) -> StartLog:
    """Starts a gateway with these settings, and an authenticator of this body, that logs in either form."""

    def start(body: str, **settings: object) -> Log:
        script = "#!/bin/sh\ninput=$(cat)\nuser=$(printf '%s\\n' \"$input\" | sed -n s/^user=//p)\n"
        (folder / "authenticator").write_text(script + body)
        configure(folder, **settings)
        return Log(serve("--log-format", request.param, "--log-level", "debug"))

    return start


def mapped_to(port: int, user: str = "postgres", database: str = "postgres") -> str:
    return f"echo '_META_TARGET_HOST=127.0.0.1:{port}'; echo 'user={user}'; echo 'database={database}'\n"


# Fields


def test_a_login_has_one_line_with_who_came_from_where_and_who_they_became(
    log_of: StartLog, postgres: ThrowawayPostgres
) -> None:
    log = log_of(mapped_to(postgres.port, "trusted", "other"))
    with RawClient(log.port) as client:
        client.log_in(user="alice", database="asked for")
        address = "{}:{}".format(*client.socket.getsockname())
        line = log.wait_for("login")
    durations = [float(line.pop(name)) for name in ("authenticator_ms", "connect_ms", "login_ms", "total_ms")]
    assert min(durations) > 0
    assert sum(durations[:3]) <= durations[3] + 0.02
    began = datetime.datetime.fromisoformat(line.pop("timestamp"))
    assert abs(datetime.datetime.now().astimezone() - began.astimezone()).total_seconds() < WAIT_SECONDS
    assert line == {
        "level": "info",
        "event": "login",
        "session": "1",
        "client": address,
        "user": "alice",
        "database": "asked for",
        "target": f"127.0.0.1:{postgres.port}",
        "target_user": "trusted",
        "target_database": "other",
    }


def test_a_session_has_one_line_at_its_end_with_why_and_how_much(log_of: StartLog, postgres: ThrowawayPostgres) -> None:
    log = log_of(mapped_to(postgres.port))
    asked = query("select 42")
    with RawClient(log.port) as client:
        client.log_in()
        client.send(asked)
        answered = sum(len(body) + 5 for _, body in client.read_until(b"Z"))
        client.send(message(b"X"))
        assert client.read_to_end() == b""
    line = log.wait_for("session ended")
    line.pop("timestamp")
    assert 0 < float(line.pop("seconds")) < WAIT_SECONDS
    assert line == {
        "level": "info",
        "event": "session ended",
        "session": log.wait_for("login")["session"],
        "why": "client closed",
        "bytes_from_client": str(len(asked) + len(message(b"X"))),
        "bytes_from_target": str(answered),
    }


def test_a_user_without_a_database_is_logged_with_the_one_that_is_meant(
    log_of: StartLog, postgres: ThrowawayPostgres
) -> None:
    port = postgres.port
    log = log_of(f"echo '_META_TARGET_HOST=127.0.0.1:{port}'; echo user=postgres\n")
    with RawClient(log.port) as client:
        client.send(raw_startup(b"user\0alice\0\0") + password())
        client.read_until(b"Z")
        line = log.wait_for("login")
    assert (line["database"], line["target_database"]) == ("alice", "postgres")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        pytest.param(
            b"GET / HTTP/1.1\r\n\r\n",
            {"fault_of": "client", "reason": "startup packet of length 1195725856, allowed are 8 to 10000"},
            id="no client of PostgreSQL",
        ),
        pytest.param(
            raw_startup(b"\0"),
            {"sqlstate": "28000", "reason": "no PostgreSQL user name specified in startup packet"},
            id="no user",
        ),
    ],
)
def test_a_stranger_has_one_line_with_what_was_wrong(log_of: StartLog, sent: bytes, expected: Line) -> None:
    log = log_of("exit 1")
    with RawClient(log.port) as client:
        client.send(sent)
        client.read_to_end()
        address = "{}:{}".format(*client.socket.getsockname())
    line = log.wait_for("refused")
    line.pop("timestamp")
    common = {"level": "info", "event": "refused", "session": "1", "client": address}
    assert line == common | {"sqlstate": "08P01", "fault_of": "client"} | expected


DENIED = {"level": "info", "sqlstate": "28P01", "fault_of": "client"}
BROKEN = {"level": "warning", "sqlstate": "58000", "fault_of": "authenticator"}


@pytest.mark.parametrize(
    ("body", "answer", "expected"),
    [
        pytest.param(
            "exit 3", password(), DENIED | {"reason": "authenticator refused with exit status 3"}, id="refused"
        ),
        pytest.param(
            "kill -SEGV $$", password(), DENIED | {"reason": "authenticator died of SIGSEGV"}, id="died of a signal"
        ),
        pytest.param(
            "echo user=x",
            password(),
            BROKEN | {"reason": "authenticator answered nonsense: no _META_TARGET_HOST"},
            id="nonsense",
        ),
        pytest.param(
            "exec sleep 60", password(), BROKEN | {"reason": "authenticator took longer than 1 s"}, id="too long"
        ),
        pytest.param(
            "exit 0",
            password("secret"),
            DENIED | {"reason": "the answer to an MD5 request is not an MD5"},
            id="no md5",
        ),
        pytest.param(
            "exit 0",
            query("select 1"),
            DENIED
            | {"sqlstate": "08P01", "reason": "instead of a password: message of type 0x51, which may not come here"},
            id="no password",
        ),
        pytest.param(
            mapped_to(1),
            password(),
            {
                "level": "warning",
                "sqlstate": "08001",
                "fault_of": "target",
                "reason": "target not reachable: 127.0.0.1:1: Connection refused",
            },
            id="nobody there",
        ),
    ],
)
def test_a_refusal_has_one_line_with_its_true_reason(
    log_of: StartLog, body: str, answer: bytes, expected: Line
) -> None:
    log = log_of(body, authenticator={"cmd": "./authenticator", "timeout": 1})
    with RawClient(log.port) as client:
        client.send(startup() + answer)
        client.read_until(b"E")
        address = "{}:{}".format(*client.socket.getsockname())
    line = log.wait_for("refused")
    line.pop("timestamp")
    who = {"event": "refused", "session": "1", "client": address, "user": "alice", "database": "postgres"}
    assert line == who | expected


def test_the_words_of_a_target_that_refuses_are_in_the_log_alone(log_of: StartLog, postgres: ThrowawayPostgres) -> None:
    log = log_of(mapped_to(postgres.port, "nobody at all") + "echo '_META_TARGET_PASSWORD=the wrong secret'")
    with RawClient(log.port) as client:
        client.send(startup() + password())
        client.read_message()
        assert client.read_fatal()[0] == "08004"
    line = log.wait_for("refused")
    assert (line["level"], line["sqlstate"], line["fault_of"]) == ("warning", "08004", "target")
    assert 'password authentication failed for user "nobody at all"' in line["reason"]


def test_many_sessions_have_two_lines_each(log_of: StartLog, postgres: ThrowawayPostgres) -> None:
    log = log_of(mapped_to(postgres.port))
    for _ in range(20):
        with RawClient(log.port) as client:
            client.log_in()
    wait_until(lambda: len(log.lines("session ended")) == 20, "all to end")
    sessions = [line["session"] for line in log.lines("login")]
    assert len(set(sessions)) == 20
    assert sorted(sessions) == sorted(line["session"] for line in log.lines("session ended"))
    assert {line["event"] for line in log.lines()} <= {
        *("listening", "login", "session ended"),
        "max_clients lowered to what the limit on descriptors allows",
    }


def test_what_an_authenticator_says_is_logged_line_by_line_with_its_session(log_of: StartLog) -> None:
    log = log_of("printf 'one\\n\\n  two\\033[1m\\ttabs\\n\\377' >&2; exit 1")
    with RawClient(log.port) as client:
        client.send(startup() + password())
        client.read_until(b"E")
    session = log.wait_for("refused")["session"]
    said = log.lines("authenticator says")
    assert [line["text"] for line in said] == ["one", "  two\\x1b[1m\\ttabs", "\\xff"]
    assert {line["session"] for line in said} == {session}


# What a client sends


@pytest.fixture
def greeting() -> Iterator[ScriptedTarget]:
    """A target that lets everybody in, whatever they are called."""
    with ScriptedTarget(greet) as target:
        yield target


@pytest.mark.parametrize(
    ("sent", "logged"),
    [
        pytest.param(
            "ev\x1b[31mil\x07\x7f\u202e\x85\u2028", "ev\\x1b[31mil\\x07\\x7f\\u202e\\x85\\u2028", id="controls"
        ),
        pytest.param("tab\there", "tab\\there", id="a tab"),
        pytest.param("two words", "two words", id="a space"),
        pytest.param("x target=evil event=login", "x target=evil event=login", id="what looks like fields"),
        pytest.param('x" target="evil', 'x" target="evil', id="quotes"),
        pytest.param('x\\" y', 'x\\" y', id="an escaped quote"),
        pytest.param('","event":"login', '","event":"login', id="what looks like JSON"),
        pytest.param("zoë 😀", "zoë 😀", id="other letters"),
        pytest.param("\\", "\\", id="a backslash"),
    ],
)
def test_what_a_client_sends_can_neither_forge_a_field_nor_move_a_terminal(
    log_of: StartLog, greeting: ScriptedTarget, sent: str, logged: str
) -> None:
    log = log_of(mapped_to(greeting.port, "x"))
    with RawClient(log.port) as client:
        client.log_in(user=sent, database=sent)
    line = log.wait_for("login")
    assert (line["user"], line["database"]) == (logged, logged)
    assert line["target"] == f"127.0.0.1:{greeting.port}"
    assert all(char.isprintable() or char == "\n" for char in log.serving.text)


def test_bytes_that_are_no_text_are_logged_by_their_numbers(log_of: StartLog) -> None:
    log = log_of("exit 1")
    with RawClient(log.port) as client:
        client.send(raw_startup(b"user\0\xff\xfe\xc3\0\0") + password())
        client.read_until(b"E")
    assert log.wait_for("refused")["user"] == "\\xff\\xfe\\xc3"


@pytest.mark.parametrize("character", ["x", "ö", "😀", "\\", '"', "\x01", "\u2028", "\U000e0001"])
def test_long_names_are_cut_and_their_line_stays_whole(
    log_of: StartLog, greeting: ScriptedTarget, character: str
) -> None:
    body = (
        f'echo "_META_TARGET_HOST=127.0.0.1:{greeting.port}"\nprintf "%s\\n" "$input" | grep -aE "^(user|database)="\n'
    )
    log = log_of(body)
    name = character * (4000 // len(character.encode()))
    with RawClient(log.port) as client:
        client.log_in(user=name, database=name)
    line = log.wait_for("login")
    for field in ("user", "database", "target_user", "target_database"):
        assert len(line[field].encode()) <= 256 + len("…".encode())
        assert line[field].endswith("…")
    assert log.wait_for("session ended")["session"] == line["session"]


# Levels


def test_the_level_error_hides_logins(serve: Serve, folder: Path, greeting: ScriptedTarget) -> None:
    write_mapped(folder / "authenticator", greeting.port)
    port = free_port()
    configure(folder, listen=[f"127.0.0.1:{port}"])
    serving = serve("--log-level", "error")
    wait_until(lambda: is_listened_on(port), "the gateway")
    with RawClient(port) as client:
        client.log_in()
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(WAIT_SECONDS) == 0
    assert serving.text == ""


def test_the_level_warning_hides_logins_and_shows_what_is_broken(serve: Serve, folder: Path) -> None:
    (folder / "authenticator").write_text("#!/bin/sh\nread -r user\n[ $user = user=alice ]\n")
    port = free_port()
    configure(folder, listen=[f"127.0.0.1:{port}"], max_clients=5, max_logins=5)
    serving = serve("--log-level", "warning")
    wait_until(lambda: is_listened_on(port), "the gateway")
    for user, sqlstate in (("mallory", "28P01"), ("alice", "58000")):
        with RawClient(port) as client:
            client.send(startup(user=user) + password())
            client.read_message()
            assert client.read_fatal()[0] == sqlstate
    serving.wait_for("refused.*fault_of=authenticator")
    assert len(serving.text.splitlines()) == 1


# Credentials


def whole(answer: bytes) -> bytes:
    return message(b"p", answer + b"\0")


def spoilt(answer: bytes) -> Iterator[bytes]:
    """Messages that hold the answer and are refused for their form."""
    yield message(b"p", answer)
    yield message(b"p", answer + b"\0more\0")
    yield message(b"p", answer + b"\n\0")
    yield message(b"p", answer * 5000 + b"\0")
    yield message(b"Q", answer + b"\0")


@pytest.mark.parametrize("cleartext", [False, True], ids=["md5", "cleartext"])
def test_no_credential_is_in_any_line_whatever_becomes_of_the_login(
    log_of: StartLog, postgres: ThrowawayPostgres, *, cleartext: bool
) -> None:
    scram, hashed = mapped_to(postgres.port, "scrammed"), mapped_to(postgres.port, "hashed")
    bodies = {
        "served-by-scram": f"{scram} echo '_META_TARGET_PASSWORD={TARGETS_PASSWORD}'",
        "served-by-hash": f"{hashed} echo '_META_TARGET_CRED={TARGETS_HASH}'",
        "wrong-there": f"{scram} echo '_META_TARGET_CRED={WRONG_PASSWORD}'",
        "hash-for-scram": f"{scram} echo '_META_TARGET_CRED={TARGETS_HASH}'",
        "unreachable": f"{mapped_to(free_port())} echo '_META_TARGET_CRED={TARGETS_PASSWORD}'",
        "refused": f"printf '%s\\n' \"$input\"; echo '_META_TARGET_CRED={TARGETS_PASSWORD}'; exit 1",
        "nonsense": f"printf '%s\\n' \"$input\"; echo '{TARGETS_PASSWORD}'",
        "bad-host": f"echo user=x; echo '_META_TARGET_HOST={TARGETS_PASSWORD}'",
        "bad-port": f"echo user=x; echo '_META_TARGET_HOST=x:{TARGETS_PASSWORD}'",
        "bad-seconds": f"{scram} echo '_META_SESSION_SECONDS={TARGETS_PASSWORD}'",
        "flood": f"yes '{TARGETS_PASSWORD}'",
        "killed": f"echo '_META_TARGET_CRED={TARGETS_PASSWORD}'; kill -KILL $$",
    }
    cases = "\n".join(f"{user}) {body}\n;;" for user, body in bodies.items())
    log = log_of(
        f"case $user in\n{cases}\nesac", authenticator={"cmd": "./authenticator", "cleartext_password": cleartext}
    )
    secret = CLIENTS_PASSWORD.encode()
    hidden = [secret, *(word.encode() for word in (TARGETS_PASSWORD, WRONG_PASSWORD, TARGETS_HASH))]

    def answer(user: str, salt: bytes) -> bytes:
        if cleartext:
            return secret
        stored = hashlib.md5(secret + user.encode()).hexdigest().encode()  # noqa: S324 (the protocol's own)
        digest = hashlib.md5(stored + salt).hexdigest().encode()  # noqa: S324 (as above)
        hidden.extend((stored, digest, salt.hex().encode()))
        return b"md5" + digest

    def log_in(user: str, number: int | None = None) -> bytes:
        """Logs in, with one of the spoilt messages if a number is given; returns the last message's type."""
        with RawClient(log.port) as client:
            client.send(startup(user=user))
            _, request = client.read_message()
            answered = answer(user, request[4:])
            client.send(whole(answered) if number is None else list(spoilt(answered))[number])
            while (kind := client.read_message()[0]) not in (b"Z", b"E"):
                continue
        return kind

    served = {user for user in bodies if log_in(user) == b"Z"}
    assert served == {"served-by-scram", "served-by-hash"}
    for number in range(5):
        assert log_in("served-by-scram", number) == b"E"
    wait_until(lambda: len(log.lines("refused")) == len(bodies) - 2 + 5, "a line for each")
    log.serving.process.send_signal(signal.SIGTERM)
    assert log.serving.process.wait(WAIT_SECONDS) == 0
    written = log.serving.log.read_bytes()
    for value in hidden:
        assert value not in written


# Nobody reads it


DROPPED = "lines of the log were dropped: nobody read them"
CHATTY_LINES = MAX_SAID_LINES + 3
"""Of a session whose authenticator says as much as it may: that, that there was more, the login's and the end's."""


class Unread:
    """A gateway whose log goes into a pipe that is read only when `read_line` is called."""

    def __init__(self, folder: Path) -> None:
        command = [*MODULE, "--config", str(folder / "pgauthproxy.yaml"), "--log-format", "json"]
        self.process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder, env=environment
        )
        assert self.process.stderr is not None
        self._pipe = self.process.stderr
        self._lines: deque[bytes] = deque()
        self._begun = b""
        self.gateway = Gateway(self.process, folder / "no-log")
        while (line := self.read_line())["event"] != "listening":
            continue
        self.port = int(line["address"].rpartition(":")[2])

    def read_line(self) -> Line:
        while not self._lines:
            assert select.select([self._pipe], [], [], WAIT_SECONDS)[0], f"no line in {WAIT_SECONDS} s"
            chunk = self._pipe.read(65_536)
            assert chunk, "the log has ended"
            *lines, self._begun = (self._begun + chunk).split(b"\n")
            self._lines.extend(lines)
        return {name: str(value) for name, value in json.loads(self._lines.popleft()).items()}

    def hang_up(self) -> None:
        self._pipe.close()

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(WAIT_SECONDS) == 0
        finally:
            self.process.kill()
            self.process.wait()
            self._pipe.close()


@pytest.fixture
def unread(folder: Path, postgres: ThrowawayPostgres) -> Iterator[Unread]:
    """Lets everybody in as postgres; for `chatty` the authenticator says more than it may."""
    write_mapped(folder / "authenticator", postgres.port)
    script = folder / "authenticator"
    script.write_text(script.read_text() + "\n[ $(field user) != chatty ] || yes | head -n 30000 >&2\n")
    configure(folder)
    unread = Unread(folder)
    yield unread
    unread.end()


def test_a_log_that_nobody_reads_stops_nobody(unread: Unread) -> None:
    for _ in range(500):
        with RawClient(unread.port) as client:
            client.send(b"GET / HTTP/1.1\r\n\r\n")
            assert client.read_to_end() == b""
    assert_serves(unread.port)
    # Once somebody reads it, every line is there.
    for number in range(1, 501):
        line = unread.read_line()
        assert (line["event"], line["session"]) == ("refused", f"{number:x}")
    assert unread.read_line()["event"] == "login"
    assert unread.read_line()["event"] == "session ended"


def test_lines_that_nobody_reads_take_no_more_memory_than_allowed_and_are_counted(unread: Unread) -> None:
    sessions = 60
    for _ in range(sessions):
        assert_serves(unread.port, "chatty")
    read = dropped = 0
    while read + dropped < sessions * CHATTY_LINES:
        line = unread.read_line()
        if line["event"] == DROPPED:
            dropped += int(line["lines"])
            # What waited is out by then.
            assert 10_000 < read < 12_000
        else:
            read += 1
    assert dropped
    assert read + dropped == sessions * CHATTY_LINES


def test_a_log_that_nobody_reads_costs_no_processor(unread: Unread) -> None:
    # More than a pipe takes.
    for _ in range(5):
        assert_serves(unread.port, "chatty")
    used, began = unread.gateway.cpu_seconds, time.monotonic()
    with RawClient(unread.port) as client:
        client.log_in()
        client.send(query("select pg_sleep(1)"))
        client.read_until(b"Z")
    assert unread.gateway.cpu_seconds - used < (time.monotonic() - began) / 5


def test_a_reader_of_the_log_that_goes_away_stops_nobody(unread: Unread) -> None:
    unread.hang_up()
    for _ in range(3):
        assert_serves(unread.port)


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_log_that_cannot_be_written_stops_nobody(folder: Path, postgres: ThrowawayPostgres, redirect: str) -> None:
    write_mapped(folder / "authenticator", postgres.port)
    port = free_port()
    configure(folder, listen=f"127.0.0.1:{port}")
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {redirect}', "sh", *MODULE], cwd=folder, env=environment)
    try:
        wait_until(lambda: is_listened_on(port), "the gateway")
        for _ in range(3):
            assert_serves(port)
        for number in range(3):
            assert not Path(f"/proc/{process.pid}/fd/{number}").readlink().name.startswith("socket:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
