"""Authenticators that fail: the client is told no more than that, the log why, and the next client is served."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Gateway, StartGateway, WriteAuthenticator, is_alive
from tests.system.conftest import Rewritable, new_user, refusal, rewritable_gateway, wait_until
from tests.wire import RawClient, ScriptedTarget, error_fields, greet, message, password, startup

MEGABYTE = 1024 * 1024
MAX_GROWTH = 16 * MEGABYTE
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
TIMEOUT_SECONDS = 1.0
# Stands in all that these authenticators print, and must be seen by nobody.
HUSH = "hush1f0e9d8c"
MANY_LINES = 257
MD5_ANSWER = "md5" + "0" * 32


@pytest.fixture(scope="module")
def target() -> Iterator[ScriptedTarget]:
    with ScriptedTarget(greet) as welcoming:
        yield welcoming


@pytest.fixture(scope="module")
def rewritable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rewritable]:
    """In cleartext mode, which has more to leak and a longer input; with all the time in the world."""
    settings = {"cleartext_password": True, "timeout": 60, "grace": 0.3}
    with rewritable_gateway(tmp_path_factory.mktemp("patient"), authenticator=settings) as found:
        yield found


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rewritable]:
    """With little time for its authenticator."""
    settings = {"timeout": TIMEOUT_SECONDS, "grace": 0.3}
    with rewritable_gateway(tmp_path_factory.mktemp("hasty"), authenticator=settings) as found:
        yield found


def mapping(target: ScriptedTarget) -> bytes:
    return b"_META_TARGET_HOST=127.0.0.1:%d\nuser=x\n" % target.port


def printing(target: ScriptedTarget) -> str:
    """What a shell does to print a mapping."""
    return f"printf '{mapping(target).decode()}'"


def let_in(gateway: Gateway, user: str = "alice", answer: str = "", **parameters: str) -> None:
    """Logs in and out, in either password mode."""
    with RawClient(gateway.port) as client:
        client.send(startup(user=user, **parameters))
        client.read_message()
        client.send(password(answer or MD5_ANSWER))
        client.read_until(b"Z")


def serves(rewritable: Rewritable, target: ScriptedTarget) -> None:
    """Asserts that the next client, with an authenticator that works again, gets in."""
    rewritable.prints(mapping(target))
    let_in(rewritable.gateway)


def refused(rewritable: Rewritable, target: ScriptedTarget, sqlstate: str = "58000") -> str:
    """The reason in the log for a login that must fail, of which nothing else may be seen anywhere."""
    user, answer = new_user(), "md5" + uuid.uuid4().hex
    error, reason = refusal(rewritable.gateway, user, answer)
    says = "authentication service failed"
    if sqlstate == "28P01":
        says = f'password authentication failed for user "{user}"'
    assert error == {"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": says}
    log = rewritable.gateway.log.read_text()
    assert answer not in log
    assert HUSH not in log
    serves(rewritable, target)
    return reason


# It cannot be started


def test_one_that_is_gone_since_the_start(rewritable: Rewritable, target: ScriptedTarget) -> None:
    rewritable.script.unlink()
    assert refused(rewritable, target) == "authenticator could not be started: No such file or directory"


def test_one_that_is_not_executable_any_more(rewritable: Rewritable, target: ScriptedTarget) -> None:
    rewritable.script.chmod(0o644)
    assert refused(rewritable, target) == "authenticator could not be started: Permission denied"


def test_one_that_names_no_interpreter_is_not_given_to_a_shell(rewritable: Rewritable, target: ScriptedTarget) -> None:
    rewritable.becomes(printing(target), first_line="")
    assert refused(rewritable, target) == "authenticator could not be started: Exec format error"


def test_one_whose_interpreter_does_not_exist(rewritable: Rewritable, target: ScriptedTarget) -> None:
    rewritable.becomes(printing(target), first_line="#!/no/such/interpreter")
    assert refused(rewritable, target) == "authenticator could not be started: No such file or directory"


# It says no, or dies


def test_one_that_exits_1_is_a_plain_no(rewritable: Rewritable, target: ScriptedTarget) -> None:
    rewritable.prints(mapping(target) + f"_META_TARGET_CRED={HUSH}\n".encode(), "exit 1")
    assert refused(rewritable, target, "28P01") == "authenticator refused with exit status 1"


@pytest.mark.parametrize("number", ["SEGV", "ABRT", "KILL", "TERM", "PIPE"])
def test_one_that_dies_of_a_signal_lets_nobody_in(rewritable: Rewritable, target: ScriptedTarget, number: str) -> None:
    rewritable.prints(mapping(target) + f"_META_TARGET_CRED={HUSH}\n".encode(), f"kill -{number} $$")
    assert refused(rewritable, target, "28P01") == f"authenticator died of SIG{number}"


@pytest.mark.parametrize("status", [0, 1])
def test_one_that_says_that_it_failed_has_not_refused(
    rewritable: Rewritable, target: ScriptedTarget, status: int
) -> None:
    rewritable.prints(mapping(target) + b"_META_FAILED=no directory: \xff\n", f"exit {status}")
    assert refused(rewritable, target) == r"authenticator failed: no directory: \xff"


# It does not come to an end


def pids_in(file: Path, count: int) -> list[int]:
    """The process IDs that an authenticator wrote, once all are there."""
    wait_until(lambda: file.exists() and file.read_text().count("\n") == count, f"{count} lines in {file}")
    return [int(line) for line in file.read_text().split()]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("sleep 1000 & echo $! >> $pids; wait", id="hangs"),
        pytest.param("trap '' TERM; sleep 1000 & echo $! >> $pids; while :; do sleep 9; done", id="ignores TERM"),
        pytest.param("echo $$ >> $pids; kill -STOP $$", id="is stopped"),
        pytest.param("exec <&- >&- 2>&-; echo $$ >> $pids; sleep 1000", id="has closed everything"),
        pytest.param(f"echo $$ >> $pids; while :; do echo {HUSH}=1; sleep 0.02; done", id="drips"),
        pytest.param("echo $$ >> $pids; while :; do echo noise >&2; sleep 0.02; done", id="drips errors"),
        pytest.param("echo $$ >> $pids; cat | cat > /dev/null; exec cat /dev/zero >&2", id="pours errors"),
    ],
)
def test_one_that_does_not_come_to_an_end_is_ended_with_its_children(
    hasty: Rewritable, target: ScriptedTarget, body: str
) -> None:
    pids = hasty.folder / new_user()
    hasty.becomes(f"pids='{pids}'; echo $$ > $pids\n{printing(target)}\necho _META_TARGET_CRED={HUSH}\n{body}")
    assert refused(hasty, target) == "authenticator took longer than 1 s"
    assert not [pid for pid in pids_in(pids, 2) if is_alive(pid)]


def test_one_that_has_left_its_process_group_is_ended_too(hasty: Rewritable, target: ScriptedTarget) -> None:
    pids = hasty.folder / new_user()
    flees = "import os, time\nos.setpgid(0, os.getpgid(os.getppid()))\n"
    flees += f"print(os.getpid(), file=open('{pids}', 'w'), flush=True)\ntime.sleep(1000)"
    hasty.becomes(flees, first_line=f"#!{sys.executable}")
    assert refused(hasty, target) == "authenticator took longer than 1 s"
    assert not [pid for pid in pids_in(pids, 1) if is_alive(pid)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start what it may not end")
def test_one_that_cannot_be_ended_holds_nobody_up(
    start_gateway: StartGateway, authenticator: WriteAuthenticator, target: ScriptedTarget, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    body = f"[ $user = stuck ] || {{ {printing(target)}; exit; }}\necho $$ > {pid_file}\n"
    script = authenticator(f"{body}exec setpriv --reuid 65534 --clear-groups sleep 1000")
    settings = {"timeout": 0.3, "grace": 0.1, "max_parallel": 1}
    gateway = start_gateway(script, before=["setpriv", "--bounding-set=-kill"], authenticator=settings)
    _, reason = refusal(gateway, "stuck")
    (pid,) = pids_in(pid_file, 1)
    try:
        assert reason == f"authenticator took longer than 0.3 s, and process {pid} cannot be ended"
        let_in(gateway)
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: let_in(gateway) or not gateway.children, "the process to be reaped with a later one")


def test_one_that_takes_too_long_may_tidy_up_and_its_answer_counts_no_more(
    hasty: Rewritable, target: ScriptedTarget
) -> None:
    tidied = hasty.folder / new_user()
    hasty.becomes(f"trap 'touch {tidied}; exit 0' TERM\n{printing(target)}\nwhile :; do sleep 0.02; done")
    assert refused(hasty, target) == "authenticator took longer than 1 s"
    assert tidied.exists()


# Its answer is none


@pytest.mark.parametrize(
    ("output", "says"),
    [
        pytest.param(b"", "no user", id="nothing"),
        pytest.param(b"\n\n\n", "no user", id="empty lines"),
        pytest.param(f"{HUSH} {HUSH}\n".encode() * 100, "no user", id="words"),
        pytest.param(bytes(range(256)) * 8 + HUSH.encode(), "NUL", id="all bytes"),
        pytest.param(f"user={HUSH}\n".encode(), "no _META_TARGET_HOST", id="no target"),
        pytest.param(f"user={HUSH}\n_META_TARGET_HOST=\n".encode(), "no _META_TARGET_HOST", id="empty target"),
        pytest.param(f"_META_TARGET_HOST=127.0.0.1:1\ndatabase={HUSH}\n".encode(), "no user", id="no user"),
        pytest.param(f"_META_TARGET_HOST={HUSH}:1\nuser=\n".encode(), "no user", id="empty user"),
        pytest.param(f"_META_TARGET_HOST={HUSH}:1\nuser=x\n={HUSH}\n".encode(), "without a name", id="no name"),
        pytest.param(f"_META_TARGET_HOST={HUSH}:1\nuser=x\0y\n".encode(), "NUL", id="NUL in a value"),
        pytest.param(f"_META_TARGET_HOST={HUSH}:1\nuser=x\nna\0me=y\n".encode(), "NUL", id="NUL in a name"),
        pytest.param(f"_META_TARGET_HOST={HUSH}:1\nuser=x\n\0".encode(), "NUL", id="NUL at the end"),
        pytest.param(b"user=x\n_META_TARGET_HOST=%s\xff:1\n" % HUSH.encode(), "not UTF-8", id="no UTF-8"),
        pytest.param(b"x=%s\n" % HUSH.encode() * MANY_LINES, "over 256 lines", id="too many lines"),
    ],
)
def test_one_whose_answer_means_nothing(
    rewritable: Rewritable, target: ScriptedTarget, output: bytes, says: str
) -> None:
    rewritable.prints(output)
    reason = refused(rewritable, target)
    assert reason.startswith("authenticator answered nonsense: ")
    assert says in reason


@pytest.mark.parametrize(
    "host",
    [
        ":5432",
        " ",
        ",",
        f"{HUSH}:1,",
        f",{HUSH}:1",
        f"{HUSH}:1,,127.0.0.1:1",
        f"{HUSH}:0",
        f"{HUSH}:65536",
        f"{HUSH}:-1",
        f"{HUSH}:+1",
        f"{HUSH}:1.5",
        f"{HUSH}:postgres",
        f"{HUSH}: 5432",
        f"{HUSH}:١٢٣",
        pytest.param(f"{HUSH}:{'0' * 5000}1", id="a port of 5001 digits"),
        f"{HUSH} 1:5432",
        f"user@{HUSH}:5432",
        f"tcp://{HUSH}:5432",
        f"{HUSH}/folder:5432",
        f"host={HUSH}",
        f"ü{HUSH}:5432",
        f"[::1:5432{HUSH}",
        f"[::1]5432{HUSH}",
        "[]:5432",
        "[::1]:http",
        f"/{HUSH}:http",
        f"/{HUSH}:0",
    ],
)
def test_one_whose_target_is_no_address(rewritable: Rewritable, target: ScriptedTarget, host: str) -> None:
    rewritable.prints(f"_META_TARGET_HOST={host}\nuser=x\n".encode())
    reason = refused(rewritable, target)
    assert reason.startswith("authenticator answered nonsense: _META_TARGET_HOST ")


@pytest.mark.parametrize("host", ["a..b", ".", "-", "%", "a" * 64, "b" * 300, "/" + "c" * 200])
def test_one_whose_target_looks_like_an_address_and_is_none(
    rewritable: Rewritable, target: ScriptedTarget, host: str
) -> None:
    # Then it is the target that cannot be had, and the next of a list is tried.
    rewritable.prints(f"_META_TARGET_HOST={host}\nuser=x\n".encode())
    error, reason = refusal(rewritable.gateway, new_user())
    assert (error["S"], error["C"]) == ("FATAL", "08001")
    assert error["M"] == "could not connect to the target server"
    assert reason.startswith(f"target not reachable: {host[:100]}")
    rewritable.prints(f"_META_TARGET_HOST={host},127.0.0.1:{target.port}\nuser=x\n".encode())
    let_in(rewritable.gateway)


# There is too much of it


def test_one_that_prints_a_gigabyte_is_ended_in_bounded_memory(rewritable: Rewritable, target: ScriptedTarget) -> None:
    pids = rewritable.folder / new_user()
    pours = (
        f"echo $$ > '{pids}'; head -c 1000000000 /dev/zero | tr '\\0' x & echo $! >> '{pids}'; wait; touch '{pids}-'"
    )
    rewritable.becomes(pours)
    before = rewritable.gateway.resident_bytes
    assert refused(rewritable, target) == "authenticator printed more than 65536 bytes"
    assert rewritable.gateway.peak_bytes - before <= MAX_GROWTH
    assert not [pid for pid in pids_in(pids, 2) if is_alive(pid)]
    assert not Path(f"{pids}-").exists()


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Rewritable]:
    """With limits that are reached by little."""
    settings = {"max_output": 1000, "max_output_lines": 5, "max_errors": 100}
    with rewritable_gateway(tmp_path, authenticator=settings) as found:
        yield found


def test_as_much_as_the_settings_allow_is_taken_and_no_byte_or_line_more(
    narrow: Rewritable, target: ScriptedTarget
) -> None:
    def padded(size: int) -> bytes:
        return (mapping(target) + b"x=").ljust(size - 1, b"x") + b"\n"

    for output in (padded(1000), mapping(target) + b"\n\n\n", mapping(target) + b"\n\na=b"):
        narrow.prints(output)
        let_in(narrow.gateway)
    narrow.prints(padded(1001))
    assert refused(narrow, target) == "authenticator printed more than 1000 bytes"
    for output in (mapping(target) + b"\n\n\n\n", mapping(target) + b"\n\n\na=b"):
        narrow.prints(output)
        assert refused(narrow, target) == "authenticator answered nonsense: over 5 lines of output"


def test_standard_error_above_its_limit_is_dropped_and_counted(narrow: Rewritable, target: ScriptedTarget) -> None:
    narrow.becomes(f"printf '%0110d' 7 >&2; echo tail >&2; {printing(target)}")
    let_in(narrow.gateway)
    assert narrow.gateway.wait_for("authenticator says")["text"] == "0" * 100
    assert narrow.gateway.wait_for("authenticator says more")["dropped_bytes"] == 15


@pytest.mark.parametrize(
    ("noise", "lines"),
    [("yes noise | head -c 100000000", 256), ("head -c 100000000 /dev/zero | tr '\\0' n", 1)],
    ids=["many lines", "one line"],
)
def test_one_that_writes_a_hundred_megabytes_of_errors_is_heard_out_and_hardly_logged(
    rewritable: Rewritable, target: ScriptedTarget, noise: str, lines: int
) -> None:
    rewritable.becomes(f"{{ {noise}; }} >&2\n{printing(target)}")
    before, user = rewritable.gateway.resident_bytes, new_user()
    let_in(rewritable.gateway, user)
    assert rewritable.gateway.peak_bytes - before <= MAX_GROWTH
    session = rewritable.gateway.wait_for("login", user=user)["session"]
    said = [line["text"] for line in rewritable.gateway.log_lines("authenticator says") if line["session"] == session]
    assert len(said) == lines
    dropped = rewritable.gateway.wait_for("authenticator says more", session=session)["dropped_bytes"]
    assert 100_000_000 - 65_536 <= dropped <= 100_000_000


# What it does with its pipes


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("exec <&-; sleep 0.05", id="closes its input"),
        pytest.param("sleep 0.05", id="reads nothing"),
        pytest.param("head -c 10 > /dev/null; exec <&-; sleep 0.05", id="reads a little"),
        pytest.param("", id="is gone at once"),
    ],
)
def test_one_that_does_not_read_a_long_input_is_fine(rewritable: Rewritable, target: ScriptedTarget, body: str) -> None:
    rewritable.becomes(f"{body}\n{printing(target)}")
    let_in(rewritable.gateway, answer="p" * 65_000, application_name="x" * 9_000)


@pytest.mark.parametrize(("status", "kind"), [(0, b"Z"), (1, b"E")])
def test_its_exit_decides_even_if_a_child_of_it_holds_its_pipes(
    rewritable: Rewritable, target: ScriptedTarget, status: int, kind: bytes
) -> None:
    pids = rewritable.folder / new_user()
    rewritable.becomes(f"sleep 1000 & echo $! > '{pids}'\n{printing(target)}\nexit {status}")
    try:
        with RawClient(rewritable.gateway.port) as client:
            client.send(startup() + password())
            client.read_until(kind)
        assert is_alive(pids_in(pids, 1)[0])
    finally:
        os.kill(pids_in(pids, 1)[0], signal.SIGKILL)
    serves(rewritable, target)


# Many of them


def queued(client: RawClient, user: str) -> RawClient:
    """Sends a client as far as its authenticator; that the next one is asked for a password proves it got there."""
    client.send(startup(user=user))
    client.read_message()
    client.send(password())
    return client


GATED = """
name=$(sed -n s/^user=//p)
echo $name >> started
while [ ! -e go-$name ]; do sleep 0.01; done
"""


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """The users whose authenticators (GATED ones) have begun, in order."""
    file = tmp_path / "started"
    file.touch()
    return file


def begun(started: Path, count: int) -> list[str]:
    wait_until(lambda: started.read_text().count("\n") >= count, f"{count} authenticators to begin")
    return started.read_text().split()


def test_no_more_than_allowed_run_at_once_and_the_others_come_in_order(
    start_gateway: StartGateway, target: ScriptedTarget, started: Path, tmp_path: Path
) -> None:
    gated = ["sh", "-c", GATED + printing(target)]
    gateway = start_gateway(gated, authenticator={"max_parallel": 2})
    users = [f"user{number}" for number in range(7)]
    clients = []
    for number, user in enumerate(users):
        clients.append(queued(RawClient(gateway.port), user))
        begun(started, min(number + 1, 2))
    # Those that run may end in any order.
    released = [1, 2, 0, 4, 3, 6, 5]
    for number, one in enumerate(released):
        assert begun(started, min(2 + number, len(users))) == users[: 2 + number]
        assert len(gateway.children) <= 2
        (tmp_path / f"go-user{one}").touch()
        clients[one].read_until(b"Z")
    for client in clients:
        client.socket.close()
    wait_until(lambda: not gateway.children, "no child to be left")


def test_a_client_that_leaves_the_queue_is_passed_over(
    start_gateway: StartGateway, target: ScriptedTarget, started: Path, tmp_path: Path
) -> None:
    gated = ["sh", "-c", GATED + printing(target)]
    gateway = start_gateway(gated, authenticator={"max_parallel": 1})
    with RawClient(gateway.port) as first, RawClient(gateway.port) as third:
        queued(first, "first")
        with RawClient(gateway.port) as second:
            queued(second, "second")
        queued(third, "third")
        assert gateway.wait_for("refused", user="second")["reason"] == "client left during its login"
        assert begun(started, 1) == ["first"]
        (tmp_path / "go-first").touch()
        first.read_until(b"Z")
        assert begun(started, 2) == ["first", "third"]
        (tmp_path / "go-third").touch()
        third.read_until(b"Z")
    assert started.read_text().split() == ["first", "third"]


def test_who_waits_in_the_queue_waits_under_its_own_deadline(
    start_gateway: StartGateway, target: ScriptedTarget, started: Path
) -> None:
    gated = ["sh", "-c", GATED + printing(target)]
    gateway = start_gateway(gated, authenticator={"max_parallel": 1}, login_timeout=0.5)
    with RawClient(gateway.port) as first, RawClient(gateway.port) as second:
        queued(first, "first")
        queued(second, "second")
        for client in (first, second):
            error = client.read_error()
            assert (error["S"], error["M"]) == ("FATAL", "canceling authentication due to timeout")
    wait_until(lambda: not gateway.children, "the first one's authenticator to end")
    assert started.read_text().split() == ["first"]


BAD_ONES = {
    "exits": "exit 1",
    "dies": "kill -SEGV $$",
    "prints": f"yes {HUSH}",
    "complains": "yes >&2",
    "answers": "echo nothing",
    "hangs": "sleep 1000",
}


def test_many_at_once_leave_no_process_and_no_descriptor(start_gateway: StartGateway, target: ScriptedTarget) -> None:
    cases = "\n".join(f"{name}*) {body} ;;" for name, body in BAD_ONES.items())
    dispatch = f'case "$(sed -n s/^user=//p)" in\n{cases}\ngood*) {printing(target)} ;;\nesac'
    settings = {"max_parallel": 4, "timeout": 0.5, "grace": 0.1}
    gateway = start_gateway(["sh", "-c", dispatch], authenticator=settings)

    def together(names: list[str]) -> list[str]:
        """Logs all these in at the same time; what became of each: an SQLSTATE, or the empty string."""
        clients = [RawClient(gateway.port) for _ in names]
        for client, name in zip(clients, names, strict=True):
            client.send(startup(user=name) + password())
        outcomes = []
        for client in clients:
            kind, body = next((kind, body) for kind, body in iter(client.read_message, None) if kind in b"ZE")
            outcomes.append(error_fields(body)["C"] if kind == b"E" else "")
            client.socket.close()
        return outcomes

    assert together(["good"] * 8) == [""] * 8
    wait_until(lambda: len(gateway.log_lines("session ended")) == 8, "the sessions to end")
    before = gateway.descriptors
    names = [f"{name}{number}" for number in range(5) for name in (*BAD_ONES, "good", "good")]
    expected = {"exits": "28P01", "dies": "28P01", "good": ""}
    assert together(names) == [expected.get(name[:-1], "58000") for name in names]
    wait_until(lambda: not gateway.children, "no child to be left")
    wait_until(lambda: gateway.descriptors == before, f"{before} descriptors instead of {gateway.descriptors}")


@pytest.mark.parametrize("missing", [True, False])
def test_one_that_fails_often_leaves_no_descriptor(
    start_gateway: StartGateway, target: ScriptedTarget, tmp_path: Path, *, missing: bool
) -> None:
    script = tmp_path / "authenticator"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    gateway = start_gateway(script, authenticator={"max_parallel": 1})
    refusal(gateway, new_user())
    before = gateway.descriptors
    if missing:
        script.unlink()
    for _ in range(50):
        with RawClient(gateway.port) as client:
            client.send(startup() + password())
            _, body = client.read_until(b"E")[-1]
            assert error_fields(body)["C"] == ("58000" if missing else "28P01")
    wait_until(lambda: gateway.descriptors == before, f"{before} descriptors instead of {gateway.descriptors}")
    assert not gateway.children


# Nobody waits for it any more


@pytest.mark.parametrize("ignores_term", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_ends_its_authenticator_and_what_that_has_started(
    rewritable: Rewritable, target: ScriptedTarget, *, reset: bool, ignores_term: bool
) -> None:
    pids, user = rewritable.folder / new_user(), new_user()
    ignores = "trap '' TERM\n" if ignores_term else ""
    rewritable.becomes(f"{ignores}sleep 1000 & echo $! > '{pids}'; echo $$ >> '{pids}'; while :; do sleep 1; done")
    with RawClient(rewritable.gateway.port) as client:
        queued(client, user)
        running = pids_in(pids, 2)
        assert all(map(is_alive, running))
        if reset:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    wait_until(lambda: not any(map(is_alive, running)), "the authenticator and its child to end")
    assert rewritable.gateway.wait_for("refused", user=user)["reason"] == "client left during its login"
    serves(rewritable, target)


def test_what_a_client_sends_on_does_not_end_its_authenticator(rewritable: Rewritable, target: ScriptedTarget) -> None:
    go = rewritable.folder / new_user()
    rewritable.becomes(f"while [ ! -e '{go}' ]; do sleep 0.01; done\n{printing(target)}")
    with RawClient(rewritable.gateway.port) as client:
        queued(client, new_user())
        client.send(message(b"Q", b"select 1\0") * 1000)
        client.socket.shutdown(socket.SHUT_WR)
        go.touch()
        client.read_until(b"Z")


@pytest.mark.parametrize("ignores_term", [False, True])
def test_a_gateway_that_stops_ends_its_authenticators(
    start_gateway: StartGateway, tmp_path: Path, *, ignores_term: bool
) -> None:
    pids = tmp_path / "pids"
    ignores = "trap '' TERM\n" if ignores_term else ""
    hangs = f"{ignores}sleep 1000 & echo $! > '{pids}'; echo $$ >> '{pids}'; while :; do sleep 1; done"
    gateway = start_gateway(["sh", "-c", hangs])
    with RawClient(gateway.port) as client:
        queued(client, new_user())
        running = pids_in(pids, 2)
        assert gateway.stop() == 0
        error = client.read_error()
    assert (error["S"], error["C"]) == ("FATAL", "57P03")
    wait_until(lambda: not any(map(is_alive, running)), "the authenticator and its child to end")
