"""The authenticator contract to the letter: what a command is given, what its answer means, how it is run."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import trustme

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import Gateway, StartGateway
from tests.system.conftest import PASSWORD, Rewritable, new_user, refusal, rewritable_gateway
from tests.wire import (
    AUTH_OK,
    READY,
    RawClient,
    ScriptedTarget,
    message,
    raw_startup,
    read_startup,
    startup,
)

Pairs = list[tuple[bytes, bytes]]

MD5_ANSWER = b"md5" + b"0123456789abcdef" * 2
# Every byte that somebody's idea of a line or a word ends at, and some that are no UTF-8.
ODD_VALUES = [
    pytest.param(b"\xff\xfe\x80", id="no UTF-8"),
    pytest.param("grüße \u2028\u2029\u0085 ⅸ".encode(), id="UTF-8"),
    pytest.param("grüße".encode("latin-1"), id="Latin-1"),
    pytest.param(b"a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\x01h\x7fi\tj", id="line ends elsewhere"),
    pytest.param(b"  lead and trail  ", id="spaces"),
    pytest.param(b"=a==b=", id="signs"),
    pytest.param(b"\"$HOME\" `id` $(id) \\n 'x' * ; # %s", id="what a shell would act on"),
    pytest.param(b"", id="empty"),
]


class RecordingTarget(ScriptedTarget):
    """A target that lets anybody in, and keeps the startup packets that it was sent."""

    def __init__(self) -> None:
        super().__init__(self._record)
        self.startups: list[Pairs] = []

    def _record(self, connection: socket.socket) -> None:
        packet = read_startup(connection)
        assert packet[:4] == struct.pack("!i", 196608)
        assert packet.endswith(b"\0\0")
        strings = packet[4:-2].split(b"\0")
        self.startups.append(list(zip(strings[::2], strings[1::2], strict=True)))
        connection.sendall(AUTH_OK + READY)

    @property
    def host_line(self) -> bytes:
        return b"_META_TARGET_HOST=127.0.0.1:%d\n" % self.port


@pytest.fixture
def target() -> Iterator[RecordingTarget]:
    with RecordingTarget() as recording:
        yield recording


@pytest.fixture(scope="module")
def rewritable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rewritable]:
    with rewritable_gateway(tmp_path_factory.mktemp("authenticator")) as found:
        yield found


@pytest.fixture(scope="module")
def cleartext(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rewritable]:
    settings = {"cleartext_password": True}
    with rewritable_gateway(tmp_path_factory.mktemp("cleartext"), authenticator=settings) as found:
        yield found


def log_in(client: RawClient, pairs: Pairs, answer: bytes = MD5_ANSWER) -> bytes:
    """Logs in with startup parameters of any bytes; returns the salt that the gateway chose, if any."""
    client.send(raw_startup(b"".join(name + b"\0" + value + b"\0" for name, value in pairs) + b"\0"))
    kind, body = client.read_message()
    assert kind == b"R"
    client.send(message(b"p", answer + b"\0"))
    client.read_until(b"Z")
    return body[4:]


def told(gateway: Gateway) -> dict[str, str]:
    """What a client that is refused gets to hear."""
    return refusal(gateway, new_user())[0]


# What it reads


def source_lines(gateway: Gateway, client: RawClient, user: str, method: bytes, answer: bytes, salt: bytes) -> bytes:
    host, port = client.socket.getsockname()
    session = gateway.wait_for("login", user=user)["session"]
    return (
        b"_SOURCE_ADDR=%s:%d\n" % (host.encode(), port)
        + b"_SOURCE_METHOD=%s\n" % method
        + b"_SOURCE_SESSION=%s\n" % session.encode()
        + b"_SOURCE_CRED=%s\n" % answer
        + b"_SOURCE_SALT=%s\n" % salt
    )


def reads_all(rewritable: Rewritable, target: RecordingTarget) -> Path:
    """Makes the authenticator keep what it reads up to the end of file in the file that is returned."""
    kept = rewritable.folder / new_user()
    rewritable.becomes(f"cat > '{kept}'\necho user=x\necho {target.host_line.decode()}")
    return kept


def test_it_reads_the_parameters_in_their_order_then_the_gateways_own_lines_then_the_end(
    rewritable: Rewritable, target: RecordingTarget
) -> None:
    kept, user = reads_all(rewritable, target), new_user()
    pairs = [
        (b"zone", b"last comes first"),
        (b"database", b"a=b"),
        (b"user", user.encode()),
        (b"application_name", b""),
        (b"options", b"-c work_mem=1MB"),
        (b"Ume\xcc\x88", b"\xff"),
    ]
    with RawClient(rewritable.gateway.port) as client:
        salt = log_in(client, pairs)
        own = source_lines(rewritable.gateway, client, user, b"md5", MD5_ANSWER, salt.hex().encode())
    assert kept.read_bytes() == b"".join(name + b"=" + value + b"\n" for name, value in pairs) + own


def test_in_cleartext_mode_it_reads_the_password_as_typed_and_a_salt_of_zeroes(
    cleartext: Rewritable, target: RecordingTarget
) -> None:
    kept, user = reads_all(cleartext, target), new_user()
    typed = b" p=a\xffs\x0bs \xe2\x80\xa8w\x85 "
    with RawClient(cleartext.gateway.port) as client:
        assert log_in(client, [(b"user", user.encode())], typed) == b""
        own = source_lines(cleartext.gateway, client, user, b"cleartext", typed, b"00000000")
    assert kept.read_bytes() == b"user=%s\n" % user.encode() + own


def test_what_libpq_answers_can_be_checked_with_the_salt(rewritable: Rewritable, target: RecordingTarget) -> None:
    salts = set()
    for _ in range(3):
        kept, user = reads_all(rewritable, target), new_user()
        with psycopg.connect(host="127.0.0.1", port=rewritable.gateway.port, user=user, password=PASSWORD):
            read = dict(line.split("=", 1) for line in kept.read_text().splitlines())
        stored = hashlib.md5((PASSWORD + user).encode()).hexdigest()  # noqa: S324 (the protocol's own)
        salted = hashlib.md5(stored.encode() + bytes.fromhex(read["_SOURCE_SALT"])).hexdigest()  # noqa: S324
        assert read["_SOURCE_CRED"] == "md5" + salted
        salts.add(read["_SOURCE_SALT"])
    assert len(salts) == 3


def test_more_than_a_pipe_holds_is_read_whole(cleartext: Rewritable, target: RecordingTarget) -> None:
    kept, user = reads_all(cleartext, target), new_user()
    typed, long = b"p" * 65_000, b"v" * 9_000
    with RawClient(cleartext.gateway.port) as client:
        log_in(client, [(b"user", user.encode()), (b"application_name", long)], typed)
        own = source_lines(cleartext.gateway, client, user, b"cleartext", typed, b"00000000")
    assert kept.read_bytes() == b"user=%s\napplication_name=%s\n" % (user.encode(), long) + own


def test_a_client_on_ipv6_has_its_address_in_brackets(
    start_gateway: StartGateway, target: RecordingTarget, tmp_path: Path
) -> None:
    keeps = f"cat > read; echo user=x; echo {target.host_line.decode()}"
    gateway = start_gateway(["sh", "-c", keeps], listen=["[::1]:0"])
    with RawClient(gateway.port, socket.AF_INET6) as client:
        client.log_in()
        port = client.socket.getsockname()[1]
    assert f"\n_SOURCE_ADDR=[::1]:{port}\n" in (tmp_path / "read").read_text()


def test_a_client_on_a_unix_socket_is_local(
    start_gateway: StartGateway, target: RecordingTarget, tmp_path: Path
) -> None:
    keeps = f"cat > read; echo user=x; echo {target.host_line.decode()}"
    start_gateway(["sh", "-c", keeps], listen=[f"unix:{tmp_path}:5432"])
    psycopg.connect(host=str(tmp_path), port=5432, user="alice", password=PASSWORD).close()
    assert "\n_SOURCE_ADDR=[local]\n" in (tmp_path / "read").read_text()


# What its answer means


@pytest.mark.parametrize("value", ODD_VALUES)
def test_bytes_go_in_and_out_unchanged_and_input_printed_back_maps_nothing_of_the_gateways_own(
    rewritable: Rewritable, target: RecordingTarget, value: bytes
) -> None:
    rewritable.becomes(f"cat\necho {target.host_line.decode()}")
    pairs = [(b"application_name", value), (b"database", b"db" + value), (b"user", b"u" + value), (b"x" + value, b"y")]
    pairs = [(name.replace(b"=", b"-"), given) for name, given in pairs]
    with RawClient(rewritable.gateway.port) as client:
        log_in(client, pairs)
    assert target.startups == [pairs]


@pytest.mark.parametrize(
    ("output", "sent"),
    [
        pytest.param(b"user=x\n", [(b"user", b"x")], id="nothing is taken from the client"),
        pytest.param(b"user=x", [(b"user", b"x")], id="the last line need not end"),
        pytest.param(b"user=x\r\ndatabase=y\r\n", [(b"user", b"x"), (b"database", b"y")], id="CR is dropped"),
        pytest.param(b"user=x\r\r\n", [(b"user", b"x\r")], id="one CR is dropped"),
        pytest.param(b"user=a\rb\n", [(b"user", b"a\rb")], id="CR inside stays"),
        pytest.param(b"options=-c a=b =c\nuser=x\n", [(b"options", b"-c a=b =c"), (b"user", b"x")], id="first sign"),
        pytest.param(b"hello\n\n  \nuser=x\nuser\n", [(b"user", b"x")], id="lines without a sign"),
        pytest.param(b" user= x \nuser=y\n", [(b" user", b" x "), (b"user", b"y")], id="nothing is trimmed"),
        pytest.param(b"user=a\ndatabase=d\nuser=b\n", [(b"database", b"d"), (b"user", b"b")], id="last wins"),
        pytest.param(b"user=x\nUSER=y\n", [(b"user", b"x"), (b"USER", b"y")], id="case counts"),
        pytest.param(b"application_name=\nuser=x\n", [(b"application_name", b""), (b"user", b"x")], id="empty value"),
        pytest.param(
            b"_SOURCE_CRED=a\n_SOURCE_=b\n_SOURCE_X=c\nuser=x\n_SOURCE_ADDR=d\n", [(b"user", b"x")], id="_SOURCE_"
        ),
        pytest.param(
            b"_META_=a\n_META_FUTURE=b\nuser=x\n_META_CACHE_SECONDS=5\n_META_ERROR=no\n", [(b"user", b"x")], id="_META_"
        ),
        pytest.param(
            b"_META_TARGET_CRED=c\n_META_TARGET_PASSWORD=p\n_META_SESSION_SECONDS=60.5\nuser=x\n",
            [(b"user", b"x")],
            id="credentials",
        ),
        pytest.param(
            b"_META_TARGET_TLS=disable\n_META_TARGET_CA=\nuser=x\n", [(b"user", b"x")], id="TLS that is not asked for"
        ),
        pytest.param(b"replication=true\nuser=x\n", [(b"replication", b"true"), (b"user", b"x")], id="replication"),
    ],
)
def test_an_answer_means_what_it_always_did(
    rewritable: Rewritable, target: RecordingTarget, output: bytes, sent: Pairs
) -> None:
    rewritable.prints(target.host_line + output)
    with RawClient(rewritable.gateway.port) as client:
        client.log_in(application_name="mine", options="-c work_mem=1MB", replication="database")
    assert target.startups == [sent]


def test_the_last_target_wins(rewritable: Rewritable, target: RecordingTarget) -> None:
    rewritable.prints(b"_META_TARGET_HOST=127.0.0.1:1\nuser=x\n" + target.host_line)
    with RawClient(rewritable.gateway.port) as client:
        client.log_in()
    assert target.startups == [[(b"user", b"x")]]


@pytest.mark.parametrize("status", [1, 2, 100, 255])
def test_the_exit_status_decides_whatever_was_printed(
    rewritable: Rewritable, target: RecordingTarget, status: int
) -> None:
    rewritable.prints(target.host_line + b"user=x\n", f"exit {status}")
    user = new_user()
    error, reason = refusal(rewritable.gateway, user)
    assert (error["S"], error["V"], error["C"]) == ("FATAL", "FATAL", "28P01")
    assert error["M"] == f'password authentication failed for user "{user}"'
    assert reason == f"authenticator refused with exit status {status}"
    assert target.startups == []


def test_the_exit_is_waited_for_when_the_output_has_ended(rewritable: Rewritable, target: RecordingTarget) -> None:
    rewritable.prints(target.host_line + b"user=x\n", "exec >&- 2>&- <&-\nsleep 0.2\nexit 1")
    assert told(rewritable.gateway)["C"] == "28P01"
    assert target.startups == []


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (b"_META_ERROR=your account is locked\n", "your account is locked"),
        (b"_META_ERROR= a=b \r\n", " a=b "),
        (b"_META_ERROR=first\n_META_ERROR=last\n", "last"),
        ("_META_ERROR=gesperrt für ⅸ\n".encode(), "gesperrt für ⅸ"),
        (b"user=x\n_META_TARGET_HOST=127.0.0.1:1\n_META_ERROR=no\n", "no"),
    ],
)
def test_a_refused_client_is_told_what_the_authenticator_says(rewritable: Rewritable, output: bytes, text: str) -> None:
    rewritable.prints(output, "exit 1")
    error = told(rewritable.gateway)
    assert (error["S"], error["C"], error["M"]) == ("FATAL", "28P01", text)


@pytest.mark.parametrize("output", [b"_META_ERROR=\n", b"_META_ERROR\n", b"_META_ERROR=a\0b\n", b"_meta_error=no\n"])
def test_without_words_of_its_own_a_refusal_has_the_usual_ones(rewritable: Rewritable, output: bytes) -> None:
    rewritable.prints(output, "exit 1")
    error = told(rewritable.gateway)
    assert error["C"] == "28P01"
    assert error["M"].startswith("password authentication failed for user ")


def test_words_in_another_encoding_reach_the_client_unchanged(rewritable: Rewritable) -> None:
    rewritable.prints("_META_ERROR=für\n".encode("latin-1"), "exit 1")
    with RawClient(rewritable.gateway.port) as client:
        client.send(startup() + message(b"p", MD5_ANSWER + b"\0"))
        _, body = client.read_until(b"E")[-1]
    assert b"\0Mf\xfcr\0" in body


def test_words_that_are_too_long_for_libpq_are_cut(rewritable: Rewritable) -> None:
    rewritable.becomes("printf _META_ERROR=%060000d 7; exit 1")
    with pytest.raises(psycopg.OperationalError, match="FATAL:  000000"):
        psycopg.connect(host="127.0.0.1", port=rewritable.gateway.port, user=new_user(), password=PASSWORD)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of an authority that signed for nobody here."""
    path = tmp_path_factory.mktemp("ca") / "ca.crt"
    trustme.CA().cert_pem.write_to_path(str(path))
    return str(path)


asking_for_tls = pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])


@asking_for_tls
def test_tls_that_is_asked_for_of_a_target_that_has_none_is_an_error_and_never_plain_text(
    rewritable: Rewritable, target: RecordingTarget, ca: str, mode: str
) -> None:
    rewritable.prints(target.host_line + f"user=x\n_META_TARGET_TLS={mode}\n_META_TARGET_CA={ca}\n".encode())
    error, reason = refusal(rewritable.gateway, new_user())
    assert (error["S"], error["C"], error["M"]) == ("FATAL", "08001", "could not connect to the target server")
    assert "target speaks no TLS, which is required" in reason
    assert target.startups == []


@asking_for_tls
def test_direct_tls_with_a_target_that_has_none_is_an_error_and_never_plain_text(
    rewritable: Rewritable, ca: str, mode: str
) -> None:
    heard: list[bytes] = []

    def close_as_postgresql_does(connection: socket.socket) -> None:
        heard.append(connection.recv(65_536))

    with ScriptedTarget(close_as_postgresql_does) as target:
        lines = f"_META_TARGET_HOST=127.0.0.1:{target.port}\nuser=somebody\n_META_TARGET_TLS={mode}\n"
        lines += f"_META_TARGET_CA={ca}\n_META_TARGET_TLS_NEGOTIATION=direct\n"
        rewritable.prints(lines.encode())
        error, reason = refusal(rewritable.gateway, new_user())
    assert (error["S"], error["C"], error["M"]) == ("FATAL", "08001", "could not connect to the target server")
    assert "during the TLS handshake" in reason
    (hello,) = heard
    assert hello.startswith(b"\x16")
    assert b"somebody" not in hello


@pytest.mark.parametrize("mode", ["", "disable", "prefer"])
@pytest.mark.parametrize("ca_line", [False, True])
def test_a_target_without_tls_is_spoken_to_in_plain_where_none_is_required(
    rewritable: Rewritable, target: RecordingTarget, ca: str, mode: str, *, ca_line: bool
) -> None:
    lines = f"user=x\n_META_TARGET_TLS={mode}\n_META_TARGET_CA={ca if ca_line else ''}\n"
    rewritable.prints(target.host_line + lines.encode())
    with RawClient(rewritable.gateway.port) as client:
        client.log_in()
    assert target.startups == [[(b"user", b"x")]]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        *((f"_META_TARGET_TLS={mode}", "mode is none of") for mode in ("REQUIRE", "nonsense", "allow", "true", " ")),
        ("_META_TARGET_TLS_NEGOTIATION=tls", "negotiation is none of"),
        ("_META_TARGET_TLS_NEGOTIATION=direct", "negotiation direct needs mode require or better"),
        ("_META_TARGET_TLS=verify-ca", "mode verify-ca needs a ca to verify with"),
        ("_META_TARGET_TLS=verify-full", "mode verify-full needs a ca to verify with"),
        ("_META_TARGET_TLS=require\n_META_TARGET_CA=system", "ca system needs mode verify-full"),
        ("_META_TARGET_TLS=require\n_META_TARGET_CA=/no/such.crt", "/no/such.crt: No such file or directory"),
        ("_META_TARGET_CERT=/no/such.crt", "cert and key need each other"),
        ("_META_TARGET_KEY=/no/such.key", "cert and key need each other"),
        ("_META_TARGET_CERT=/etc/passwd\n_META_TARGET_KEY=/no/such.key", "/no/such.key: No such file or directory"),
        ("_META_TARGET_CERT=/etc/passwd\n_META_TARGET_KEY=/dev/null", "/dev/null: not a regular file"),
        ("_META_TARGET_TLS=\udcff", "a _META_TARGET_ field for TLS that is not UTF-8"),
    ],
)
def test_wishes_for_tls_that_make_no_sense_are_an_error_and_never_plain_text(
    rewritable: Rewritable, target: RecordingTarget, lines: str, says: str
) -> None:
    rewritable.prints(target.host_line + b"user=x\n" + lines.encode(errors="surrogateescape") + b"\n")
    error, reason = refusal(rewritable.gateway, new_user())
    assert (error["S"], error["C"], error["M"]) == ("FATAL", "58000", "authentication service failed")
    assert says in reason
    assert target.startups == []


# How long the session may live


def limited(rewritable: Rewritable, port: int, seconds: float) -> None:
    lines = f"_META_TARGET_HOST=127.0.0.1:{port}\nuser=postgres\n_META_SESSION_SECONDS={seconds}\n"
    rewritable.prints(lines.encode())


def test_an_idle_session_ends_at_its_time_limit(rewritable: Rewritable, postgres: ThrowawayPostgres) -> None:
    limited(rewritable, postgres.port, 0.3)
    user = new_user()
    with RawClient(rewritable.gateway.port) as client:
        client.log_in(user=user)
        error = client.read_error()
    assert (error["S"], error["V"], error["C"]) == ("FATAL", "FATAL", "57P01")
    session = rewritable.gateway.wait_for("login", user=user)["session"]
    assert rewritable.gateway.wait_for("session ended", session=session)["why"] == "time limit reached"


def test_a_session_at_work_ends_at_its_time_limit(rewritable: Rewritable, postgres: ThrowawayPostgres) -> None:
    limited(rewritable, postgres.port, 0.5)
    with (
        psycopg.connect(host="127.0.0.1", port=rewritable.gateway.port, user="alice", password=PASSWORD) as session,
        pytest.raises(psycopg.errors.AdminShutdown),
    ):
        session.execute("select pg_sleep(3)")


def test_a_time_limit_in_the_middle_of_a_row_closes_without_a_word(rewritable: Rewritable) -> None:
    half = message(b"D", bytes(1000))[:500]

    def script(connection: socket.socket) -> None:
        read_startup(connection)
        connection.sendall(AUTH_OK + READY + half)
        assert connection.recv(1) == b""

    with ScriptedTarget(script) as target, RawClient(rewritable.gateway.port) as client:
        limited(rewritable, target.port, 0.3)
        client.log_in()
        assert client.read_to_end() == half


@pytest.mark.parametrize("seconds", [b"0", b"-1", b"nan", b"inf", b"1e9", b"soon", b"1 h", b"\xff"])
def test_a_time_limit_that_is_none_is_nonsense(rewritable: Rewritable, target: RecordingTarget, seconds: bytes) -> None:
    rewritable.prints(target.host_line + b"user=x\n_META_SESSION_SECONDS=%s\n" % seconds)
    error, reason = refusal(rewritable.gateway, new_user())
    assert error["C"] == "58000"
    assert "_META_SESSION_SECONDS is no number of seconds" in reason
    assert target.startups == []


# How it is run

PRINTS_ENVIRONMENT = ["env"]


@pytest.fixture
def environment(target: RecordingTarget) -> dict[str, str]:
    """An environment that is a mapping, so that `env` is an authenticator, found on PATH."""
    return {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "_META_TARGET_HOST": f"127.0.0.1:{target.port}",
        "user": "x",
        "SOME": "thing = \udcff\udcfe",
    }


def sent(environment: dict[str, str]) -> list[tuple[bytes, bytes]]:
    everything = ((os.fsencode(name), os.fsencode(value)) for name, value in environment.items())
    return sorted(pair for pair in everything if not pair[0].startswith(b"_META_"))


def test_it_gets_the_gateways_environment(
    start_gateway: StartGateway, environment: dict[str, str], target: RecordingTarget
) -> None:
    gateway = start_gateway(PRINTS_ENVIRONMENT, environment=environment)
    with RawClient(gateway.port) as client:
        client.log_in()
    assert sorted(target.startups[0]) == sent(environment)


def test_it_gets_of_the_environment_what_the_settings_name(
    start_gateway: StartGateway, environment: dict[str, str], target: RecordingTarget
) -> None:
    names = ["user", "_META_TARGET_HOST", "SOME", "NO_SUCH_VARIABLE"]
    gateway = start_gateway(PRINTS_ENVIRONMENT, environment=environment, authenticator={"env": names})
    with RawClient(gateway.port) as client:
        client.log_in()
    assert sorted(target.startups[0]) == sent({name: environment[name] for name in names[:3]})


@pytest.mark.parametrize("as_one_string", [False, True])
def test_no_shell_is_involved(start_gateway: StartGateway, target: RecordingTarget, *, as_one_string: bool) -> None:
    odd = "$(id) `id` $HOME * ? ; | > x & # ~ %d \\n é"
    words = ["printf", "%s=%s\\n", "user", odd, "_META_TARGET_HOST", f"127.0.0.1:{target.port}"]
    quoted = " ".join(f"'{word}'" for word in words)
    gateway = start_gateway([], authenticator={"cmd": quoted if as_one_string else words})
    with RawClient(gateway.port) as client:
        client.log_in()
    assert target.startups == [[(b"user", odd.encode())]]


# Says of itself what a process can know: printed as startup parameters, the target hears it.
INTROSPECTION = """
import os
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("user=x")
print("group_is_own=" + str(os.getpgrp() == os.getpid()))
print("terminal_session=" + str(os.getsid(0)))
print("folder=" + os.getcwd())
print("umask=%03o" % os.umask(0))
print("descriptors=" + str([fd for fd in range(4096) if is_open(fd)]))
print("blocked=" + status["SigBlk"].strip())
"""


def introspected(start_gateway: StartGateway, target: RecordingTarget, before: list[str]) -> dict[str, str]:
    """What the authenticator of a gateway that is started by `before` says of itself, while others are in."""
    words = [sys.executable, "-I", "-S", "-c", f"{INTROSPECTION}print('''{target.host_line.decode()}''')"]
    gateway = start_gateway(words, before=before)
    with RawClient(gateway.port) as one, RawClient(gateway.port) as other, RawClient(gateway.port) as silent:
        one.log_in()
        other.log_in()
        silent.send(startup())
        silent.read_message()
    return {name.decode(): value.decode() for name, value in target.startups[-1]}


def test_it_is_a_process_group_of_its_own_in_the_gateways_folder(
    start_gateway: StartGateway, target: RecordingTarget, tmp_path: Path
) -> None:
    said = introspected(start_gateway, target, ["sh", "-c", 'umask 026; exec "$@"', "sh"])
    assert said["group_is_own"] == "True"
    assert said["terminal_session"] == str(os.getsid(0))
    assert said["folder"] == str(tmp_path)
    assert said["umask"] == "026"


def test_it_gets_no_descriptor_but_the_three_standard_ones(
    start_gateway: StartGateway, target: RecordingTarget
) -> None:
    said = introspected(start_gateway, target, ["sh", "-c", 'exec "$@" 7</dev/null 9>/dev/null', "sh"])
    assert said["descriptors"] == "[0, 1, 2]"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_it_gets_pipes_even_if_the_gateway_was_started_without_standard_descriptors(
    start_gateway: StartGateway, target: RecordingTarget, closed: str
) -> None:
    said = introspected(start_gateway, target, ["sh", "-c", f'exec "$@" {closed}', "sh"])
    assert said["descriptors"] == "[0, 1, 2]"


def test_it_gets_default_signals(start_gateway: StartGateway, target: RecordingTarget) -> None:
    # Python itself ignores SIGPIPE, and nohup has it ignore SIGHUP; the shell changes neither before it looks.
    shows = f"grep '^Sig' /proc/$$/status | tr ':\\t' '= '; echo user=x; echo {target.host_line.decode()}"
    gateway = start_gateway(["sh", "-c", shows], before=["nohup"])
    ignored = re.findall(r"SigIgn:\s+(\w+)", Path(f"/proc/{gateway.pid}/status").read_text())
    assert int(ignored[0], 16) != 0
    with RawClient(gateway.port) as client:
        client.log_in()
    said = {name.decode(): value.decode().strip() for name, value in target.startups[0]}
    # glibc leaves its own two ignored, with which no program does anything.
    of_glibc = 1 << 31 | 1 << 32
    assert int(said["SigIgn"], 16) & ~of_glibc == 0
    assert int(said["SigBlk"], 16) == 0


def test_it_dies_quietly_of_a_broken_pipe(rewritable: Rewritable, target: RecordingTarget) -> None:
    rewritable.becomes(f"yes | head -n 1 >/dev/null\necho user=x\necho {target.host_line.decode()}")
    user = new_user()
    with RawClient(rewritable.gateway.port) as client:
        client.log_in(user=user)
    session = rewritable.gateway.wait_for("login", user=user)["session"]
    assert not [line for line in rewritable.gateway.log_lines("authenticator says") if line["session"] == session]


def test_it_runs_once_for_each_login_and_never_before_the_password(
    rewritable: Rewritable, target: RecordingTarget
) -> None:
    runs = rewritable.folder / new_user()
    rewritable.becomes(f"echo run >> '{runs}'\necho user=x\necho {target.host_line.decode()}")
    with RawClient(rewritable.gateway.port) as client:
        client.send(startup())
        client.read_message()
    for number in (1, 2, 3):
        with RawClient(rewritable.gateway.port) as client:
            client.log_in()
        assert runs.read_text() == "run\n" * number


# Standard error


def said(gateway: Gateway, user: str, event: str = "login") -> list[str]:
    """What the log has of the standard error of this user's authenticator."""
    session = gateway.wait_for(event, user=user)["session"]
    return [line["text"] for line in gateway.log_lines("authenticator says") if line["session"] == session]


def test_standard_error_goes_to_the_log_line_by_line(rewritable: Rewritable, target: RecordingTarget) -> None:
    words = 'first line\\n\\n  second\\tline\\n\\033[31mred\\377\\nand "the" last'
    rewritable.becomes(f"printf '{words}' >&2\necho user=x\necho {target.host_line.decode()}")
    user = new_user()
    with RawClient(rewritable.gateway.port) as client:
        client.log_in(user=user)
    expected = ["first line", "  second\\tline", "\\x1b[31mred\\xff", 'and "the" last']
    assert said(rewritable.gateway, user) == expected


def test_standard_error_of_a_refusal_never_reaches_the_client(rewritable: Rewritable) -> None:
    rewritable.becomes("echo the true reason >&2; exit 1")
    user = new_user()
    error, _ = refusal(rewritable.gateway, user)
    assert "true reason" not in " ".join(error.values())
    assert said(rewritable.gateway, user, "refused") == ["the true reason"]
