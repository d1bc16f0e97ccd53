"""The kind `worker`: processes that are kept running, whatever they do with what they are asked."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Gateway, StartGateway, is_alive
from tests.system.conftest import new_user, refusal, running_gateway, wait_until
from tests.wire import RawClient, ScriptedTarget, greet, password, startup

TIMEOUT_SECONDS = 1.0
BEHAVES = """#!{python}
import os, sys, time

served = 0
print("begins", file=sys.stderr, flush=True)
while True:
    lines = []
    for line in iter(sys.stdin.buffer.readline, b""):
        if line == b"\\n":
            break
        lines.append(line.rstrip(b"\\n"))
    else:
        sys.exit(0)
    served += 1
    fields = dict(line.split(b"=", 1) for line in lines)
    user = fields[b"user"].decode(errors="surrogateescape")
    answer = (
        "_META_TARGET_HOST=127.0.0.1:{port}\\nuser=%s\\napplication_name=%d:%d\\n\\n" % (user, os.getpid(), served)
    ).encode(errors="surrogateescape")
    what = user.partition("-")[0]
    out = sys.stdout.buffer
    if what == "refused":
        answer = b"_META_ERROR=not today\\n\\n"
    elif what == "wordless":
        answer = b"\\n"
    elif what == "fails":
        answer = b"_META_FAILED=no directory: \\xff\\n\\n"
    elif what == "twice":
        answer += answer
    elif what == "half":
        out.write(answer[:20]); out.flush(); os._exit(3)
    elif what == "dies":
        os._exit(3)
    elif what == "slow":
        time.sleep(0.3)
    elif what == "late":
        time.sleep({timeout} * 1.5)
    elif what == "hangs":
        time.sleep(1000)
    elif what == "huge":
        try:
            while True:
                out.write(b"x" * 65536)
        except BrokenPipeError:
            os._exit(0)
    elif what == "babbles":
        out.write(answer + b"and more\\n"); out.flush(); continue
    elif what == "nonsense":
        answer = b"_META_TARGET_HOST=a b\\nuser=x\\n\\n"
    elif what == "closes":
        os.close(1); time.sleep(1000)
    elif what == "leaves":
        out.write(answer); out.flush(); os._exit(0)
    elif what == "complains":
        for number in range(1000):
            print("complaint", number, file=sys.stderr)
        sys.stderr.flush()
    out.write(answer)
    out.flush()
"""


@pytest.fixture(scope="module")
def target() -> Iterator[ScriptedTarget]:
    with ScriptedTarget(greet) as welcoming:
        yield welcoming


def write_worker(folder: Path, port: int) -> Path:
    script = folder / "worker"
    script.write_text(BEHAVES.format(python=sys.executable, port=port, timeout=TIMEOUT_SECONDS))
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, target: ScriptedTarget) -> Iterator[Gateway]:
    """A gateway with one process, and not more."""
    folder = tmp_path_factory.mktemp("worker")
    settings = {"kind": "worker", "workers": {"min": 1, "max": 1}, "timeout": TIMEOUT_SECONDS, "grace": 0.2}
    with running_gateway(folder, write_worker(folder, target.port), authenticator=settings) as gateway:
        yield gateway


def let_in(gateway: Gateway, user: str = "alice") -> None:
    with RawClient(gateway.port) as client:
        client.log_in(user=user)


def the_worker(gateway: Gateway) -> int:
    (pid,) = gateway.children
    return pid


def test_one_process_answers_many_logins(single: Gateway) -> None:
    let_in(single)
    before = the_worker(single)
    for _ in range(20):
        let_in(single)
    assert the_worker(single) == before


@pytest.mark.parametrize(("user", "told"), [("refused", "not today"), ("wordless", 'user "wordless')])
def test_an_answer_without_a_target_refuses(single: Gateway, user: str, told: str) -> None:
    let_in(single)
    before = the_worker(single)
    error, reason = refusal(single, f"{user}-{new_user()}")
    assert error["C"] == "28P01"
    assert told in error["M"]
    assert reason == "authenticator worker refused"
    let_in(single)
    assert the_worker(single) == before


def test_one_that_says_that_it_failed_has_not_refused_and_is_kept(single: Gateway) -> None:
    let_in(single)
    before = the_worker(single)
    error, reason = refusal(single, f"fails-{new_user()}")
    assert (error["C"], error["M"]) == ("58000", "authentication service failed")
    assert reason == r"authenticator worker failed: no directory: \xff"
    let_in(single)
    assert the_worker(single) == before


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ("twice", "authenticator worker said more than one answer"),
        ("half", "authenticator worker closed its output"),
        ("dies", "authenticator worker closed its output"),
        ("late", "authenticator worker took longer than 1 s"),
        ("hangs", "authenticator worker took longer than 1 s"),
        ("huge", "authenticator worker printed more than 65536 bytes"),
        ("babbles", "authenticator worker said more than one answer"),
        ("nonsense", "authenticator worker answered nonsense: _META_TARGET_HOST names no host"),
        ("closes", "authenticator worker closed its output"),
    ],
)
def test_one_that_misbehaves_costs_the_login_in_its_hands_and_is_replaced(
    single: Gateway, user: str, says: str
) -> None:
    let_in(single)
    before = the_worker(single)
    error, reason = refusal(single, f"{user}-{new_user()}")
    assert (error["S"], error["C"], error["M"]) == ("FATAL", "58000", "authentication service failed")
    assert reason == says
    wait_until(lambda: not is_alive(before), "the old process to be gone")
    let_in(single)
    assert the_worker(single) != before


def test_one_that_exits_between_requests_costs_nobody_anything(single: Gateway) -> None:
    for _ in range(3):
        let_in(single, f"leaves-{new_user()}")
    let_in(single)


def test_one_that_is_killed_between_requests_is_replaced_before_the_next(single: Gateway) -> None:
    let_in(single)
    before = the_worker(single)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: single.children - {before}, "another process")
    let_in(single)


def test_a_client_that_leaves_lets_the_answer_reach_nobody_else(single: Gateway) -> None:
    let_in(single)
    before = the_worker(single)
    user = f"slow-{new_user()}"
    with RawClient(single.port) as client:
        client.send(startup(user=user))
        client.read_message()
        client.send(password())
    single.wait_for("refused", user=user)
    other = new_user()
    with RawClient(single.port) as client:
        client.log_in(user=other)
    assert single.wait_for("login", user=other)["target_user"] == other
    assert the_worker(single) == before


def test_its_complaints_reach_the_log_with_the_session_and_are_capped(single: Gateway) -> None:
    user = f"complains-{new_user()}"
    let_in(single, user)
    session = single.wait_for("login", user=user)["session"]
    single.wait_for("authenticator says", session=session, text="complaint 0")
    single.wait_for("authenticator says more", session=session)


def test_a_pool_grows_to_its_most_when_all_are_busy(
    start_gateway: StartGateway, target: ScriptedTarget, tmp_path: Path
) -> None:
    settings = {"kind": "worker", "workers": {"min": 1, "max": 3}}
    gateway = start_gateway(write_worker(tmp_path, target.port), authenticator=settings)
    logins = [threading.Thread(target=let_in, args=(gateway, f"slow-{number}")) for number in range(9)]
    for login in logins:
        login.start()
    wait_until(lambda: len(gateway.children) == 3, "three processes")
    for login in logins:
        login.join()
    assert len(gateway.children) == 3
    gateway.wait_for("login", 9)


def test_a_command_that_always_fails_makes_nobody_wait(start_gateway: StartGateway, tmp_path: Path) -> None:
    script = tmp_path / "fails"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    gateway = start_gateway(script, authenticator={"kind": "worker", "timeout": 30}, login_timeout=30)
    for _ in range(20):
        error, reason = refusal(gateway, new_user())
        assert error["C"] == "58000"
        assert "authenticator worker" in reason


def test_the_end_of_the_gateway_ends_its_workers(
    start_gateway: StartGateway, target: ScriptedTarget, tmp_path: Path
) -> None:
    settings = {"kind": "worker", "workers": {"min": 4, "max": 4}, "grace": 0.3}
    gateway = start_gateway(write_worker(tmp_path, target.port), authenticator=settings)
    wait_until(lambda: len(gateway.children) == 4, "four processes")
    workers = gateway.children
    assert gateway.stop() == 0
    assert not [pid for pid in workers if is_alive(pid)]
