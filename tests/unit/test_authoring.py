"""What authors of authenticators in Python work with: requests, mappings, the decorator, and the TestClient."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgauthproxy import authenticator as public
from pgauthproxy._digest import md5_answer, md5_password
from pgauthproxy.auth import fields, typed
from pgauthproxy.auth.fields import NonsenseError
from pgauthproxy.auth.model import Question
from pgauthproxy.authenticator import (
    Certificate,
    Denied,
    FieldError,
    Mapping,
    NoPasswordError,
    Request,
    TestClient,
    Tls,
    authenticator,
    mapping_lines,
    read_request,
)
from pgauthproxy.authoring import told_by, what_failed
from pgauthproxy.proto import scram
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Accepted, Encryption, Started
from pgauthproxy.stages import Certificate as Verified
from tests.contract import SECONDS, WorkerProcess, answered, request_lines, run_command, salted

SALT = b"\x01\xab\x00\xff"
MAX_LINES = 256
ODD = b"\xff\xfe p\xc3\xa4ss"
# What would cost a command some of its milliseconds.
HEAVY = {"asyncio", "dataclasses", "hashlib", "hmac", "inspect", "msgspec", "ssl", "subprocess", "typing", "uvloop"}


def asked(password: str, method: str = "md5", user: str = "alice") -> Request:
    """The request that a client with this password makes."""
    if method == "md5":
        return Request(user, method=method, answer=salted(password, user, SALT), salt=SALT)
    return Request(user, method=method, password=password if method == "cleartext" else None)


def md5_verifier(password: str, user: str = "alice") -> str:
    return "md5" + hashlib.md5((password + user).encode()).hexdigest()  # noqa: S324 (the protocol's own)


def scram_verifier(password: str) -> str:
    return scram.Verifier.of(password.encode(), b"salt of 16 bytes", 4).text().decode()


# Requests


@pytest.mark.parametrize("method", ["md5", "cleartext"])
def test_a_password_is_judged_in_either_method(method: str) -> None:
    assert asked("wonderland", method).password_is("wonderland")
    assert asked("wonderland", method).password_is(b"wonderland")
    assert not asked("wonderland", method).password_is("Wonderland")
    assert not asked("", method).password_is("wonderland")


@pytest.mark.parametrize("method", ["md5", "cleartext"])
def test_neither_no_password_nor_an_empty_one_is_ever_right(method: str) -> None:
    for typed_in in ("wonderland", "", "\0"):
        assert not asked(typed_in, method).password_is(None)
        assert not asked(typed_in, method).password_is("")
        assert not asked(typed_in, method).verify(None)
    assert not asked("", "cleartext").verify(md5_verifier(""))
    assert not asked("", "cleartext").verify(scram_verifier(""))


@pytest.mark.parametrize(
    "request_",
    [
        Request("alice", method="cleartext", password=ODD.decode(errors="surrogateescape")),
        Request("alice", method="md5", answer=md5_answer(md5_password(ODD, b"alice"), SALT).decode(), salt=SALT),
    ],
)
def test_passwords_are_bytes(request_: Request) -> None:
    assert request_.password_is(ODD)
    assert request_.password_is(ODD.decode(errors="surrogateescape"))
    assert not request_.password_is(ODD.replace(b"\xff", b"?"))


@pytest.mark.parametrize("method", ["md5", "cleartext"])
def test_an_md5_hash_is_a_verifier_in_either_method(method: str) -> None:
    assert asked("wonderland", method).verify(md5_verifier("wonderland"))
    assert asked("wonderland", method).verify(md5_verifier("wonderland").encode())
    assert not asked("wonderland", method).verify(md5_verifier("builder"))
    assert not asked("wonderland", method).verify(md5_verifier("wonderland", "bob"))


def test_a_scram_verifier_is_one_in_cleartext_mode() -> None:
    assert asked("wonderland", "cleartext").verify(scram_verifier("wonderland"))
    assert not asked("builder", "cleartext").verify(scram_verifier("wonderland"))


@pytest.mark.parametrize(
    ("method", "verifier"),
    [
        ("md5", scram_verifier("wonderland")),
        ("md5", "md5wonderland"),
        ("md5", ""),
        ("cleartext", "wonderland"),
        ("cleartext", ""),
        ("cleartext", "SCRAM-SHA-256$wonderland"),
    ],
)
def test_what_is_no_verifier_is_an_error_that_does_not_show_it(method: str, verifier: str) -> None:
    with pytest.raises(ValueError, match="verifier") as raised:
        asked("wonderland", method).verify(verifier)
    assert "wonderland" not in str(raised.value)
    assert "SCRAM" not in str(raised.value)


@pytest.mark.parametrize("method", ["scram-sha-256", "cert"])
def test_where_no_password_was_asked_for_there_is_none_to_judge(method: str) -> None:
    request = asked("wonderland", method)
    for judge, expected in ((request.password_is, "wonderland"), (request.verify, md5_verifier("wonderland"))):
        with pytest.raises(NoPasswordError):
            judge(expected)
    for judge in (request.password_is, request.verify):
        with pytest.raises(NoPasswordError):
            judge(None)


def test_nothing_secret_is_shown() -> None:
    shown = repr(asked("wonderland", "cleartext")) + repr(asked("wonderland"))
    shown += repr(Mapping("db", "reader", password="wonderland", verifier=scram_verifier("x")))
    assert "alice" in shown
    assert "reader" in shown
    assert "wonderland" not in shown
    assert "SCRAM" not in shown
    assert salted("wonderland", "alice", SALT) not in shown


def test_the_settings_that_may_go_on_are_those_that_only_say_how_values_are_written() -> None:
    pairs = {"user": "alice", "options": "-c x=y", "client_encoding": "UTF8", "replication": "true", "TimeZone": "CET"}
    assert Request("alice", parameters=pairs).client_settings == {"client_encoding": "UTF8", "TimeZone": "CET"}


# The same request, by lines and in-process

SOME_BYTES = st.binary(max_size=20).map(lambda data: data.translate(None, b"\n\r\0"))
NAMES = SOME_BYTES.map(lambda data: b"x" + data.translate(None, b"="))
TEXT = st.text("aä =,:é\u2028", max_size=10)
CERTIFICATES = st.builds(Verified, TEXT, TEXT, TEXT, TEXT, TEXT)
ENCRYPTIONS = st.builds(
    Encryption, st.just("TLSv1.3"), st.just(""), TEXT, st.just(""), st.just(b""), st.none() | CERTIFICATES
)
PARAMETERS = st.builds(
    lambda user, rest: ((b"user", b"u" + user), *rest.items()),
    SOME_BYTES,
    st.dictionaries(NAMES | st.just(b"database"), SOME_BYTES, max_size=4),
)
STARTED = st.builds(Started, st.builds(Accepted, TEXT, TEXT), PARAMETERS, st.none() | ENCRYPTIONS)
QUESTIONS = st.one_of(
    st.builds(Question, STARTED, st.just("md5"), st.just(Secret(b"md5" + b"0" * 32)), st.just(SALT)),
    st.builds(Question, STARTED, st.just("cleartext"), SOME_BYTES.map(Secret), st.just(bytes(4))),
    st.builds(Question, STARTED, st.sampled_from(["scram-sha-256", "cert"])),
)


def facts(value: Any) -> Any:
    """An object of ours as a dictionary, to its last part."""
    if isinstance(value, (Request, Tls, Certificate)):
        return {name: facts(getattr(value, name)) for name in value.__slots__}
    return value


@given(question=QUESTIONS)
def test_a_request_is_the_same_by_lines_and_in_process(question: Question) -> None:
    by_lines = facts(read_request(fields.encode_question(question)))
    in_process = facts(typed.request_of(question))
    if question.method in ("scram-sha-256", "cert"):
        # Without a credential there is no salt either; by lines that cannot be told from one that is zero.
        in_process["salt"] = bytes(4)
    assert by_lines == in_process


def test_what_pgauthproxy_before_us_sends_is_read_too() -> None:
    hashed = salted("wonderland", "alice", SALT)
    old = read_request(f"user=alice\n_SOURCE_CRED={hashed}\n_SOURCE_SALT={SALT.hex()}\n".encode())
    assert (old.method, old.password_is("wonderland"), old.database) == ("md5", True, "alice")
    old = read_request(b"user=alice\n_SOURCE_CRED=wonderland\n_SOURCE_SALT=00000000\n")
    assert (old.method, old.password) == ("cleartext", "wonderland")


# Mappings


def question_of(user: bytes = b"alice", database: bytes = b"") -> Question:
    parameters = ((b"user", user), (b"database", database)) if database else ((b"user", user),)
    return Question(Started(Accepted("2a", "192.0.2.1:50000"), parameters), "cert")


@pytest.mark.parametrize(
    "answer",
    [
        Mapping("db7:6432", "reader"),
        Mapping(["db7", "[::1]:5433", "/run/postgresql:5432"], "reader", database="shop"),
        Mapping("db7", b"\xff\xfe", database=b"\xfd", password=b"\xfc", parameters={"x": "\udcff=a"}),
        Mapping("db7", "reader", password="client"),
        Mapping("db7", "reader", password=md5_verifier("x")),
        Mapping("db7", "reader", password=""),
        Mapping("db7", "reader", md5_hash=md5_verifier("x")),
        Mapping("db7", "reader", credential_from_client=True),
        Mapping("db7", "reader", verifier=scram_verifier("x"), session_seconds=1.5, cache_seconds=0),
        Mapping("db7", "reader", idle_timeout=0, idle_in_transaction_timeout=2.5),
        Mapping("db7", "reader", cache_seconds=30, parameters={"application_name": "gateway:alice", "options": ""}),
        Mapping(
            "db7",
            "reader",
            tls="verify-full",
            tls_ca="/ca.pem",
            tls_cert="/c.pem",
            tls_key="/k.pem",
            tls_negotiation="direct",
            tls_name="db.example",
        ),
    ],
)
def test_a_mapping_is_the_same_by_lines_and_in_process(answer: Mapping) -> None:
    question = question_of(database=b"\xfeshop")
    lines = mapping_lines(answer, typed.request_of(question))
    in_process = typed.mapping_of(answer, question.started)
    assert fields.decode_mapping(lines, MAX_LINES) == in_process
    assert typed.mapping_of(typed.authored(in_process), question.started) == in_process


def test_without_a_database_it_is_the_one_that_was_asked_for() -> None:
    for question, database in ((question_of(database=b"shop"), b"shop"), (question_of(), b"alice")):
        assert typed.mapping_of(Mapping("db7", "reader"), question.started).database == database
        assert b"\ndatabase=%s\n" % database in mapping_lines(Mapping("db7", "reader"), typed.request_of(question))


SECRET = "wonderland"
BAD_MAPPINGS: list[tuple[dict[str, Any], str]] = [
    ({"host": ""}, "host"),
    ({"host": []}, "host"),
    ({"user": ""}, "user"),
    ({"user": 5}, "user"),
    ({"user": f"{SECRET}\nuser=postgres"}, "user"),
    ({"database": f"{SECRET}\r"}, "database"),
    ({"password": f"{SECRET}\0"}, "password"),
    ({"password": f"{SECRET}\nx"}, "password"),
    ({"password": 5}, "password"),
    ({"password": f"{SECRET}\ud800"}, "password"),
    ({"md5_hash": SECRET}, "md5_hash"),
    ({"password": SECRET, "credential_from_client": True}, "more than one"),
    ({"password": SECRET, "md5_hash": md5_verifier("x")}, "more than one"),
    ({"parameters": {"application_name": f"{SECRET}\n_META_TARGET_HOST=x"}}, "parameter application_name"),
    ({"parameters": {"_META_TARGET_HOST": SECRET}}, "parameters"),
    ({"parameters": {"_source_x": SECRET}}, "parameters"),
    ({"parameters": {"": SECRET}}, "parameters"),
    ({"parameters": {"a=b": SECRET}}, "parameters"),
    ({"parameters": {"a\nb": SECRET}}, "parameter"),
    ({"parameters": {"user": SECRET}}, "user"),
    ({"parameters": {"database": SECRET}}, "database"),
    ({"parameters": {"x": None}}, "parameter x"),
    ({"tls": SECRET}, "tls"),
    ({"tls_negotiation": SECRET}, "tls_negotiation"),
    ({"tls_ca": f"{SECRET}\n"}, "tls_ca"),
    ({"verifier": f"{SECRET}\n"}, "verifier"),
    ({"session_seconds": 0}, "session_seconds"),
    ({"idle_timeout": -1}, "idle_timeout"),
    ({"idle_in_transaction_timeout": float("inf")}, "idle_in_transaction_timeout"),
    ({"session_seconds": float("nan")}, "session_seconds"),
    ({"session_seconds": float("inf")}, "session_seconds"),
    ({"session_seconds": SECRET}, "session_seconds"),
    ({"cache_seconds": -1}, "cache_seconds"),
    ({"cache_seconds": True}, "cache_seconds"),
]


@pytest.mark.parametrize(("changes", "named"), BAD_MAPPINGS)
def test_what_cannot_be_is_an_error_that_names_the_field_and_not_its_value(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(FieldError) as raised:
        Mapping(**{"host": "db7", "user": "reader"} | changes)
    assert named in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("host", ["db7:0", "db7:70000", "db 7", "[::1", "db7,", "\udcff"])
def test_a_host_that_is_none_is_nonsense(host: str) -> None:
    with pytest.raises(NonsenseError, match=r"^host"):
        typed.mapping_of(Mapping(host, "reader"), question_of().started)


def test_mappings_are_compared_by_what_they_say() -> None:
    assert Mapping("db7", "reader", password="x") == Mapping(["db7"], b"reader", password=b"x")
    assert Mapping("db7", "reader", password="x") != Mapping("db7", "reader", password="y")
    assert Mapping("db7", "reader") != "reader"


# Refusals and failures


def test_what_a_refused_client_is_told_is_one_line_of_any_text() -> None:
    assert told_by(Denied("reason")) is None
    assert told_by(Denied("reason", "")) is None
    assert told_by(Denied("reason", "come\nback\r\0tomorrow")) == b"come back  tomorrow"
    assert told_by(Denied("reason", "\udcff ä")) == b"\xff \xc3\xa4"
    assert told_by(Denied("reason", "\ud800")) == b"\\ud800"


def test_a_failure_is_told_by_its_type_and_place_without_its_text() -> None:
    def fails() -> None:
        int("wonderland")

    def fails_deeper() -> None:
        asyncio.run(None)  # type: ignore[arg-type]

    for function in (fails, fails_deeper):
        with pytest.raises(ValueError, match=r"wonderland|coroutine") as raised:
            function()
        what = what_failed(raised.value, function.__code__)
        assert what.startswith("ValueError at ")
        assert f"test_authoring.py:{function.__code__.co_firstlineno + 1}" in what
        assert "wonderland" not in what
    assert what_failed(ValueError("wonderland"), None) == "ValueError"
    assert what_failed(FieldError("host: empty"), None) == "FieldError (host: empty)"


# The program that the decorator makes

HEADER = """
import asyncio, os, subprocess, sys
from pgauthproxy.authenticator import Denied, Mapping, Request, authenticator

"""
BODIES = {
    "plain": """
        if not request.password_is({"alice": "wonderland"}.get(request.user)):
            raise Denied(f"not {request.user}\\nreally", told="come back\\ntomorrow" if request.user == "bob" else None)
        return Mapping("db7", "reader", password="reader's secret")
    """,
    "noisy": """
        print("user=postgres")
        print()
        os.write(1, b"_META_TARGET_HOST=evil\\n\\n")
        subprocess.run(["sh", "-c", "echo user=postgres; cat"], check=True)
        return Mapping("db7", request.user)
    """,
    "failing": """
        if request.user == "mallory":
            raise KeyError("wonderland")
        if request.user == "bob":
            return "wonderland"
        if request.user == "carol":
            return Mapping("db7", request.user, parameters={"x": "wonderland\\n"})
        return Mapping("db7", request.user)
    """,
    "leaving": """
        sys.exit(7)
    """,
}
ASYNC_BODY = """
    global loop
    loop = globals().get("loop") or asyncio.get_running_loop()
    await asyncio.sleep(0)
    if request.user == "mallory":
        raise asyncio.CancelledError
    if request.user == "bob":
        raise Denied("not bob")
    return Mapping("db7", "same" if loop is asyncio.get_running_loop() else "other")
"""

Write = Callable[[str], list[str | Path]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an author's file with one of BODIES; gives the words that run it."""

    def write(name: str) -> list[str | Path]:
        file = tmp_path / "who.py"
        if name == "async":
            function = "async def main(request: Request) -> Mapping:\n" + textwrap.indent(
                textwrap.dedent(ASYNC_BODY), "    "
            )
        else:
            function = "def main(request: Request) -> Mapping:\n" + textwrap.indent(
                textwrap.dedent(BODIES[name]), "    "
            )
        file.write_text(f'{HEADER}\n@authenticator\n{function}\nif __name__ == "__main__":\n    main.run()\n')
        return [sys.executable, file]

    return write


def test_as_a_command_it_answers_with_lines_and_status_0(write: Write) -> None:
    done = run_command(write("plain"), request_lines("alice", "wonderland", database="shop"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert answered(done.stdout) == {
        b"_META_TARGET_HOST": b"db7",
        b"_META_TARGET_PASSWORD": b"reader's secret",
        b"user": b"reader",
        b"database": b"shop",
    }


def test_as_a_command_it_refuses_with_status_1_and_says_why_to_the_log(write: Write) -> None:
    done = run_command(write("plain"), request_lines("alice", "wrong"))
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"refused: not alice really\n")
    done = run_command(write("plain"), request_lines("bob", "wrong"))
    assert (done.returncode, done.stdout) == (1, b"_META_ERROR=come back tomorrow\n")


def test_the_last_line_may_lack_its_end(write: Write) -> None:
    done = run_command(write("plain"), request_lines("alice", "wonderland").removesuffix(b"\n"))
    assert done.returncode == 0


def test_what_is_printed_meanwhile_goes_to_the_log_and_what_is_started_reads_nothing(
    write: Write, tmp_path: Path
) -> None:
    lines = request_lines("alice", "wonderland")
    done = run_command(write("noisy"), lines)
    assert done.returncode == 0
    assert answered(done.stdout)[b"user"] == b"alice"
    assert b"evil" not in done.stdout
    assert done.stderr == b"user=postgres\n\n_META_TARGET_HOST=evil\n\nuser=postgres\n"
    with WorkerProcess(write("noisy"), tmp_path / "errors") as worker:
        for user in ("alice", "bob"):
            answer = answered(worker.ask(request_lines(user, "wonderland")))
            assert answer == {b"_META_TARGET_HOST": b"db7", b"user": user.encode(), b"database": user.encode()}


@pytest.mark.parametrize(
    ("user", "failed"),
    [
        ("mallory", rb"KeyError at who.py:\d+"),
        ("bob", rb"FieldError \(str was returned, not a Mapping\) at .*"),
        ("carol", rb"FieldError \(parameter x: a line break or NUL\) at .*, called from who.py:\d+"),
    ],
)
def test_a_failure_is_no_refusal_and_holds_no_value(write: Write, tmp_path: Path, user: str, failed: bytes) -> None:
    lines = request_lines(user, "wonderland")
    done = run_command(write("failing"), lines)
    assert done.returncode == 1
    assert re.fullmatch(rb"_META_FAILED=" + failed + rb"\n", done.stdout)
    assert b"failed: " in done.stderr
    with WorkerProcess(write("failing"), tmp_path / "errors") as worker:
        assert worker.ask(lines) == done.stdout
        assert answered(worker.ask(request_lines("alice", "")))[b"user"] == b"alice"
    # Source lines of the traceback are the author's own; what the error said is not there.
    for said in (done.stderr, (tmp_path / "errors").read_bytes()):
        assert b"KeyError: " not in said
        assert b"'wonderland'" not in said


def test_a_request_without_a_user_fails(write: Write) -> None:
    done = run_command(write("plain"), b"database=shop\n_SOURCE_METHOD=cert\n")
    assert done.returncode == 1
    assert done.stdout.startswith(b"_META_FAILED=FieldError (a request without a user)")


def test_as_a_worker_it_answers_until_the_end_of_its_input(write: Write, tmp_path: Path) -> None:
    with WorkerProcess(write("plain"), tmp_path / "errors") as worker:
        for _ in range(3):
            assert answered(worker.ask(request_lines("alice", "wonderland")))[b"user"] == b"reader"
            assert worker.ask(request_lines("alice", "wrong")) == b""
            assert worker.ask(request_lines("bob", "wrong")) == b"_META_ERROR=come back tomorrow\n"
            assert worker.ask(b"").startswith(b"_META_FAILED=")
        # A request that the gateway did not finish is nobody's.
        worker.requests.write(request_lines("alice", "wonderland"))


def test_an_argument_makes_it_a_worker_too(write: Write, tmp_path: Path) -> None:
    done = run_command([*write("plain"), "--worker"], request_lines("alice", "wonderland") + b"\n")
    assert done.returncode == 0
    assert done.stdout.endswith(b"\n\n")


def test_an_async_function_keeps_its_event_loop_for_the_workers_life(write: Write, tmp_path: Path) -> None:
    with WorkerProcess(write("async"), tmp_path / "errors") as worker:
        for _ in range(2):
            assert answered(worker.ask(request_lines("alice", "")))[b"user"] == b"same"
            assert worker.ask(request_lines("bob", "")) == b""
            assert worker.ask(request_lines("mallory", "")).startswith(b"_META_FAILED=CancelledError")
    done = run_command(write("async"), request_lines("alice", ""))
    assert (done.returncode, answered(done.stdout)[b"user"]) == (0, b"same")


def test_an_author_may_end_the_program(write: Write) -> None:
    done = run_command(write("leaving"), request_lines("alice", ""))
    assert (done.returncode, done.stdout) == (7, b"")


def test_a_gateway_that_has_gone_leaves_no_traceback(write: Write) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    words = write("plain")
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    _, said = process.communicate(request_lines("alice", "wonderland"), SECONDS)
    assert (process.returncode, said) == (1, b"")


def test_a_decorated_function_is_called_as_it_was_written() -> None:
    @authenticator
    def main(request: Request) -> Mapping:
        """Lets everybody in."""
        return Mapping("db7", request.user)

    assert main(Request("alice")) == Mapping("db7", "alice")
    assert main.__doc__ == "Lets everybody in."


def test_importing_it_loads_nothing_that_takes_time() -> None:
    code = "import sys; known = set(sys.modules); import pgauthproxy.authenticator; print(*set(sys.modules) - known)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True)
    loaded = set(done.stdout.split())
    assert not HEAVY & loaded
    others = {name for name in loaded if not name.startswith(("pgauthproxy", "_cython", "cython"))}
    assert others <= {"__future__"}


def test_everything_that_is_public_is_there_and_explained() -> None:
    for name in public.__all__:
        assert getattr(public, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        public.nothing_of_the_kind  # noqa: B018


# The TestClient


def judge(request: Request) -> Mapping:
    if not request.password_is("wonderland"):
        raise Denied("wrong password", told="try again")
    return Mapping("db7", request.user, parameters=request.client_settings)


async def judge_later(request: Request) -> Mapping:
    await asyncio.sleep(0)
    return judge(request)


@pytest.mark.parametrize("function", [judge, judge_later, authenticator(judge), authenticator(judge_later)])
@pytest.mark.parametrize("method", ["md5", "cleartext"])
def test_a_function_can_be_tried_out(function: Any, method: str) -> None:
    with TestClient(function) as client:
        for _ in range(2):
            mapping = client.ask("alice", "wonderland", "shop", method=method, parameters={"DateStyle": "ISO"})
            assert mapping == Mapping("db7:5432", "alice", database="shop", parameters={"DateStyle": "ISO"})
            with pytest.raises(Denied) as raised:
                client.ask("alice", "wrong", method=method)
            assert (raised.value.reason, raised.value.told) == ("wrong password", "try again")


def test_a_function_that_is_tried_out_gets_all_that_it_would_get() -> None:
    seen = []

    def look(request: Request) -> Mapping:
        seen.append(request)
        return Mapping("db7", "reader", verifier=scram_verifier("x"))

    tls = Tls("TLSv1.3", "db.example", Certificate("CN=alice", "CN=ca", "1", "DNS:a", "ff"))
    TestClient(look).ask("alice", method="scram-sha-256", address="[::1]:1", session="ff", tls=tls)
    (request,) = seen
    assert (request.method, request.address, request.session) == ("scram-sha-256", "[::1]:1", "ff")
    assert (request.password, request.answer) == (None, None)
    assert facts(request.tls) == facts(tls)


@pytest.mark.parametrize("worker", [False, True])
def test_a_program_can_be_tried_out(write: Write, worker: bool) -> None:
    with TestClient(write("plain"), worker=worker) as client:
        for _ in range(2):
            mapping = client.ask("alice", "wonderland", "shop")
            assert mapping == Mapping("db7:5432", "reader", database="shop", password="reader's secret")
            with pytest.raises(Denied) as raised:
                client.ask("bob", "builder")
            assert raised.value.told == "come back tomorrow"


def test_the_environment_of_a_program_can_be_given() -> None:
    with TestClient(["sh", "-c", 'echo "user=$WHO"; echo _META_TARGET_HOST=db7'], environment={"WHO": "me"}) as client:
        assert client.ask("alice").user == "me"


@pytest.mark.parametrize("worker", [False, True])
def test_a_program_that_fails_shows_what_it_wrote(write: Write, worker: bool) -> None:
    with TestClient(write("failing"), worker=worker) as client:
        with pytest.raises(RuntimeError, match=r"KeyError at who\.py") as raised:
            client.ask("mallory")
        assert 'who.py", line ' in str(raised.value)
        assert client.ask("alice").user == "alice"


ANSWER = "user=reader\\n_META_TARGET_HOST=db7\\n"


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        ("exec sleep 60", RuntimeError, "no answer in"),
        (f"printf '{ANSWER}_META_TARGET_HOST=\\n'", ValueError, "no _META_TARGET_HOST"),
        ("true", ValueError, "no user"),
        ("printf 'user=x\\n_META_TARGET_HOST=a b\\n'", ValueError, "names no host"),
    ],
)
def test_a_command_that_does_not_keep_the_contract_is_found_out(script: str, error: type[Exception], said: str) -> None:
    client = TestClient(["sh", "-c", script], timeout=0.5 if "sleep" in script else SECONDS)
    with pytest.raises(error, match=said):
        client.ask("alice")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("read -r line; exec sleep 60", "no whole answer in"),
        ("read -r line; echo broken >&2; exit 3", "broken"),
        (f"read -r line; printf '{ANSWER}'; exec sleep 60", "no whole answer in"),
        (f"read -r line; printf '{ANSWER}\\n{ANSWER}\\n'; cat >/dev/null", "more than one answer"),
        ("read -r line; yes a=b", "more than 65536 bytes"),
    ],
)
def test_a_worker_that_does_not_keep_the_contract_is_found_out(script: str, said: str) -> None:
    client = TestClient(["sh", "-c", script], worker=True, timeout=0.5 if "sleep" in script else SECONDS)
    with pytest.raises(RuntimeError, match=said):
        client.ask("alice")
    client.close()


def test_a_worker_must_end_with_its_input_and_with_status_0() -> None:
    answers = f"read -r line; printf '{ANSWER}\\n'"
    client = TestClient(["sh", "-c", f"{answers}; exec sleep 60"], worker=True, timeout=1)
    assert client.ask("alice").user == "reader"
    with pytest.raises(RuntimeError, match="does not end with its input"):
        client.close()
    client = TestClient(["sh", "-c", f"{answers}; cat >/dev/null; echo why >&2; exit 3"], worker=True)
    assert client.ask("alice").user == "reader"
    with pytest.raises(RuntimeError, match="ended with status 3: why"):
        client.close()


def test_a_function_is_no_worker() -> None:
    with pytest.raises(TypeError, match="neither a worker"):
        TestClient(judge, worker=True)
