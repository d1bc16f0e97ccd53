"""What several files of this folder need: gateways that live for a file, and waiting for a condition."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgauthproxy.throwaway import UNPRIVILEGED_USER, ThrowawayPostgres
from tests.conftest import HBA, ROLES, SETTINGS, WAIT_SECONDS, Gateway, StartGateway, is_alive
from tests.tls import HOST, Authority
from tests.wire import SSL_REQUEST, RawClient, ScriptedTarget, message, password, query, startup

PASSWORD = "of no importance"
MODULE = [sys.executable, "-m", "pgauthproxy"]
FEW_DESCRIPTORS = 200
LISTENING = re.compile(r'listening.*?address="?([^\s"]+)|"address":"([^"]+)"')

environment = {name: value for name, value in os.environ.items() if not name.startswith("PGPROXY_")}
SUCCEEDED = "succeeded by another process"
MANY = 64
"""Connections of which each worker gets at least one: that it does not is as likely as 2 to the power of -63."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Returns once the condition holds; fails with `what` was waited for if it never does."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_SECONDS} s for {what}"
        time.sleep(0.005)


def limited_to(descriptors: int) -> list[str]:
    """What stands before a command so that it gets no more descriptors than that."""
    return ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh"]


def assert_serves(port: int, user: str = "alice") -> None:
    """A gateway before `postgres` must serve a new client."""
    with RawClient(port) as client:
        client.log_in(user=user)
        client.assert_served()


def is_listened_on(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def write_mapped(script: Path, port: int) -> Path:
    """An authenticator as the fixture `mapped` is: lets everybody but mallory in, as postgres."""
    script.write_text(
        "#!/bin/sh\n"
        "input=$(cat)\n"
        'field() { printf "%s\\n" "$input" | sed -n "s/^$1=//p"; }\n'
        "database=$(field database)\n"
        f'echo "_META_TARGET_HOST=127.0.0.1:{port}"\n'
        'echo "user=postgres"\n'
        'echo "database=${database:-postgres}"\n'
        'printf "%s\\n" "$input" | grep -E "^(application_name|client_encoding|options|replication)="\n'
        '[ "$(field user)" != mallory ]\n'
    )
    script.chmod(0o755)
    return script


@contextlib.contextmanager
def running_gateway(folder: Path, cmd: Path, **settings: Any) -> Iterator[Gateway]:
    """A gateway that lives as long as the block; it must end with status 0 and without an internal error."""
    authenticator = {"cmd": [str(cmd)], **settings.pop("authenticator", {})}
    content = {**SETTINGS, "authenticator": authenticator, **settings}
    config, log = folder / "gateway.yaml", folder / "gateway.log"
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "pgauthproxy", "--config", str(config), "--log-format", "json"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output, stdin=subprocess.DEVNULL, cwd=folder)
    gateway = Gateway(process, log)
    try:
        gateway.port = int(gateway.wait_for("listening")["address"].rpartition(":")[2])
        yield gateway
        status = gateway.stop()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    written = log.read_text()
    assert status == 0, written
    assert "internal error" not in written, written
    assert "Traceback" not in written, written


LOADED_ANEW = "authenticator loaded anew"
NOT_LOADED = "authenticator not loaded, the old one stays"


def reload(gateway: Gateway, what: str = LOADED_ANEW) -> dict[str, Any]:
    """Asks for everything to be read anew; what the log says of the authenticator then."""
    count = len(gateway.log_lines(what))
    gateway.process.send_signal(signal.SIGHUP)
    gateway.wait_for(what, count + 1)
    return gateway.log_lines(what)[-1]


@pytest.fixture(scope="module", params=["md5", "cleartext"])
def either_gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres
) -> Iterator[Gateway]:
    """A gateway before `postgres` in either password mode, shared by the tests of a file."""
    folder = tmp_path_factory.mktemp(f"gateway-{request.param}")
    cmd = write_mapped(folder / "authenticator", postgres.port)
    cleartext = request.param == "cleartext"
    with running_gateway(folder, cmd, authenticator={"cleartext_password": cleartext}) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres) -> Iterator[Gateway]:
    """A gateway before `postgres`, shared by the tests of a file."""
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(folder, write_mapped(folder / "authenticator", postgres.port)) as gateway:
        yield gateway


class Asked:
    """A gateway, and what its authenticator was asked: it notes that, and lets everybody but mallory in, as postgres.

    It runs once at a time, so that the notes are in order.
    """

    def __init__(self, gateway: Gateway, notes: Path) -> None:
        self.gateway = gateway
        self._notes = notes

    @property
    def port(self) -> int:
        return self.gateway.port

    @property
    def questions(self) -> list[bytes]:
        """What the authenticator has read, each time that it ran."""
        return self._notes.read_bytes().split(b"\n\n")[:-1]

    @contextlib.contextmanager
    def nobody(self) -> Iterator[None]:
        """What happens in the block must not make the authenticator run; the next client is served."""
        known = len(self.questions)
        yield
        with RawClient(self.port) as client:
            client.send(startup(user="next") + password())
            client.read_until(b"Z")
        assert [question.split(b"\n")[0] for question in self.questions[known:]] == [b"user=next"]


@contextlib.contextmanager
def asking_gateway(folder: Path, port: int, *, cleartext: bool, **settings: Any) -> Iterator[Asked]:
    notes, script = folder / "notes", folder / "authenticator"
    notes.touch()
    script.write_text(
        "#!/bin/sh\n"
        f"tee -a '{notes}' | LC_ALL=C grep -a '^user=mallory$' >/dev/null && refused=1\n"
        f"echo >>'{notes}'\n"
        f"echo _META_TARGET_HOST=127.0.0.1:{port}\n"
        "echo user=postgres\n"
        "echo database=postgres\n"
        "exit ${refused:-0}\n"
    )
    script.chmod(0o755)
    asking = {"cleartext_password": cleartext, "max_parallel": 1, **settings.pop("authenticator", {})}
    with running_gateway(folder, script, authenticator=asking, **settings) as gateway:
        yield Asked(gateway, notes)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres) -> Iterator[Asked]:
    """A gateway before `postgres` that asks clients for an MD5, shared by the tests of a file."""
    with asking_gateway(tmp_path_factory.mktemp("asked"), postgres.port, cleartext=False) as found:
        yield found


@dataclass(frozen=True)
class Step:
    """Where a login can be held: what the client sends to get there, the answers to that, what the gateway has open."""

    sends: bytes
    answers: bytes = b""
    sockets: int = 1
    children: int = 0


STEPS = {
    "before the startup packet": Step(b""),
    "within the startup packet": Step(startup()[:20]),
    "behind an SSLRequest": Step(SSL_REQUEST, b"N"),
    "before the password": Step(startup(), b"R"),
    "within the password": Step(startup() + password()[:10], b"R"),
    "while the authenticator runs": Step(startup(user="hanging") + password(), b"R", children=1),
    "while the target connects": Step(startup(user="unreachable") + password(), b"R", sockets=2),
    "while the target logs in": Step(startup(user="unanswered") + password(), b"R", sockets=2),
}


class Holding:
    """A gateway in which a login can be held at each of STEPS; all others are let in, as postgres."""

    def __init__(self, gateway: Gateway, hanging: Path) -> None:
        self.gateway = gateway
        self.port = gateway.port
        self._hanging = hanging
        self._sockets = gateway.sockets

    def bring(self, client: RawClient, step: Step) -> None:
        """Holds a client's login there; it must be the only one."""
        client.send(step.sends)
        if step.answers == b"N":
            assert client.read(1) == b"N"
        elif step.answers == b"R":
            assert client.read_message()[0] == b"R"
        wait_until(lambda: self._has(step.sockets, step.children), "the login to get there")
        if step.children:
            wait_until(self._hanging.exists, "the authenticator to hang")

    def wait_until_clean(self) -> None:
        """Returns once no connection and no process of any login is left."""
        wait_until(lambda: self._has(0, 0), "everything to be given back")
        if self._hanging.exists():
            group = int(self._hanging.read_text())
            wait_until(lambda: not lives(group), "the authenticator's group to be gone")
            self._hanging.unlink()

    def _has(self, sockets: int, children: int) -> bool:
        return self.gateway.sockets == self._sockets + sockets and len(self.gateway.children) == children


def lives(group: int) -> bool:
    """Whether a process group has a member that is more than an entry which nobody has reaped yet."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # It may be gone by now.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, number = stat.read_text().rpartition(") ")[2].split()[:3]
            if int(number) == group and state not in "ZX":
                return True
    return False


@pytest.fixture
def holding(
    tmp_path: Path, start_gateway: StartGateway, postgres: ThrowawayPostgres
) -> Iterator[Callable[..., Holding]]:
    """Starts gateways with these settings that hold logins."""
    hanging = tmp_path / "hanging"

    def answer_nothing(connection: socket.socket) -> None:
        while connection.recv(65536):
            continue

    with contextlib.ExitStack() as stack:
        unanswered = stack.enter_context(ScriptedTarget(answer_nothing))
        # Once its queue is full the kernel drops whoever knocks.
        unreachable = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            knocking = stack.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex(unreachable.getsockname())
        script = tmp_path / "holding"
        script.write_text(
            "#!/bin/sh\n"
            f"port={postgres.port}\n"
            "while read -r line; do case $line in\n"
            f"user=hanging) sleep 60 & echo $$ >'{hanging}.new'; mv '{hanging}.new' '{hanging}'; wait ;;\n"
            f"user=unreachable) port={unreachable.getsockname()[1]} ;;\n"
            f"user=unanswered) port={unanswered.port} ;;\n"
            "esac; done\n"
            'echo "_META_TARGET_HOST=127.0.0.1:$port"\n'
            "echo user=postgres\n"
            "echo database=postgres\n"
        )
        script.chmod(0o755)

        def start(**settings: Any) -> Holding:
            longer = {"timeout": 60, "max_parallel": 1, **settings.pop("authenticator", {})}
            target = {"connect_timeout": 60, "login_timeout": 60, **settings.pop("target", {})}
            return Holding(start_gateway(script, authenticator=longer, target=target, **settings), hanging)

        yield start


@dataclass(frozen=True)
class Backends:
    """What the server itself knows of its sessions; asked directly, past the gateway."""

    server: ThrowawayPostgres

    def sleeps(self, pid: int) -> bool:
        return self._counts(f"pid = {pid} and wait_event = 'PgSleep'")

    def sleeps_as(self, application_name: str) -> bool:
        return self._counts(f"application_name = '{application_name}' and wait_event = 'PgSleep'")

    def named(self, application_name: str) -> bool:
        return self._counts(f"application_name = '{application_name}'")

    def _counts(self, condition: str) -> bool:
        return self.server.sql(f"select count(*) from pg_stat_activity where {condition}") != "0"


@pytest.fixture
def backends(postgres: ThrowawayPostgres) -> Backends:
    return Backends(postgres)


@pytest.fixture
def mapped_to(authenticator: Callable[..., Path], start_gateway: StartGateway) -> Callable[..., Gateway]:
    """Starts a gateway whose authenticator prints these lines, whoever asks."""
    numbers = itertools.count()

    def start(lines: dict[str, str], **settings: Any) -> Gateway:
        printed = "\n".join(f"{key}={value}" for key, value in lines.items())
        script = authenticator(f"cat <<'END'\n{printed}\nEND", f"authenticator-{next(numbers)}")
        return start_gateway(script, **settings)

    return start


def new_user() -> str:
    """A name that nobody else in the log has."""
    return f"user_{uuid.uuid4().hex[:12]}"


def refusal(gateway: Gateway, user: str, answer: str = "md5" + "0" * 32) -> tuple[dict[str, str], str]:
    """What this user, who must be refused after the password, is told, and what the log says."""
    with RawClient(gateway.port) as client:
        client.send(startup(user=user))
        client.read_message()
        client.send(password(answer))
        error = client.read_error()
    return error, gateway.wait_for("refused", user=user)["reason"]


class Answering:
    """A gateway whose authenticator answers each user with what a test said beforehand."""

    def __init__(self, gateway: Gateway, folder: Path) -> None:
        self.gateway = gateway
        self._folder = folder

    def user(self, lines: dict[str, str], name: str = "") -> str:
        """A user who gets these lines."""
        name = name or new_user()
        (self._folder / name).write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
        return name

    def asked(self, lines: dict[str, str], sql: str) -> str:
        """The one value that a query gives to such a user."""
        with RawClient(self.gateway.port) as client:
            client.log_in(user=self.user(lines))
            client.send(query(sql))
            rows = [body for kind, body in client.read_until(b"Z") if kind == b"D"]
            client.send(message(b"X"))
            assert client.read_to_end() == b""
        return rows[0][6:].decode()

    def greeted(self, lines: dict[str, str]) -> None:
        with RawClient(self.gateway.port) as client:
            client.log_in(user=self.user(lines))

    def refused(self, lines: dict[str, str]) -> tuple[dict[str, str], str]:
        """What such a user is told, and what the log says."""
        return refusal(self.gateway, self.user(lines))


@contextlib.contextmanager
def answering_gateway(folder: Path, **settings: object) -> Iterator[Answering]:
    script = folder / "authenticator"
    script.write_text(f'#!/bin/sh\ncat "{folder}/$(sed -n s/^user=//p)"\n')
    script.chmod(0o755)
    with running_gateway(folder, script, **settings) as gateway:
        yield Answering(gateway, folder)


class Rewritable:
    """A gateway whose authenticator is a file that a test writes anew: each login runs what is there at that moment."""

    def __init__(self, gateway: Gateway, script: Path) -> None:
        self.gateway = gateway
        self.script = script

    @property
    def folder(self) -> Path:
        return self.script.parent

    def becomes(self, body: str, first_line: str = "#!/bin/sh") -> None:
        new = self.script.with_name("new")
        new.write_text(f"{first_line}\n{body}\n")
        new.chmod(0o755)
        new.rename(self.script)

    def prints(self, output: bytes, then: str = "") -> None:
        """It prints these bytes, and then does what is said."""
        printed = self.script.with_name("printed")
        printed.write_bytes(output)
        self.becomes(f'cat "{printed}"\n{then}')


@contextlib.contextmanager
def rewritable_gateway(folder: Path, **settings: Any) -> Iterator[Rewritable]:
    script = folder / "authenticator"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    with running_gateway(folder, script, **settings) as gateway:
        yield Rewritable(gateway, script)


class Serving:
    """A gateway that was started as anybody would; its log is text in a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str | re.Pattern[str], count: int = 1) -> list[str]:
        """What the pattern found in the log, once it was found so often."""
        deadline = time.monotonic() + WAIT_SECONDS
        while len(found := re.findall(pattern, self.text)) < count:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text}"
            assert self.process.poll() is None, self.text
            time.sleep(0.01)
        return found

    def addresses(self, count: int = 1) -> list[str]:
        return ["".join(either) for either in self.wait_for(LISTENING, count)]

    @property
    def port(self) -> int:
        return int(self.addresses()[0].rpartition(":")[2])

    def asks_for(self) -> bytes:
        """The authentication request that a client gets."""
        with RawClient(self.port) as client:
            client.send(startup())
            kind, body = client.read_message()
        assert kind == b"R"
        return body[:4]


Serve = Callable[..., Serving]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts pgauthproxy in a folder of its own, without any flag but those given."""
    started: list[Serving] = []

    def start(*arguments: str, **variables: str) -> Serving:
        log = tmp_path / f"log{len(started)}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*MODULE, *arguments],
                stdin=subprocess.DEVNULL,
                stderr=output,
                cwd=tmp_path,
                env=environment | variables,
            )
        started.append(Serving(process, log))
        return started[-1]

    yield start
    for serving in started:
        if serving.process.poll() is None:
            serving.process.send_signal(signal.SIGTERM)
        try:
            status = serving.process.wait(WAIT_SECONDS)
        finally:
            serving.process.kill()
            serving.process.wait()
        assert status == 0, serving.text
        assert "Traceback" not in serving.text


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs pgauthproxy in a folder of its own until it ends; `typed` is what it reads."""

    def start(
        *arguments: str,
        before: Sequence[str] = (),
        descriptors: Sequence[int] = (),
        typed: str = "",
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, *MODULE, *arguments],
            input=typed,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment | variables,
            timeout=WAIT_SECONDS,
            check=False,
            pass_fds=descriptors,
        )

    return start


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("pgauthproxy: ")
    for word in words:
        assert word in line


class Terminal:
    """A command of pgauthproxy at a terminal; `shown` is all that stood there.

    What it prints goes elsewhere unless it `prints_there`.
    """

    def __init__(self, *arguments: str, folder: Path | None = None, prints_there: bool = False) -> None:
        self.master, slave = pty.openpty()
        # Its own terminal, as far as it knows: only then Ctrl-C means something there.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *MODULE, *arguments],
            stdin=slave,
            stdout=slave if prints_there else subprocess.PIPE,
            stderr=slave,
            env=environment,
            cwd=folder,
        )
        os.close(slave)
        self.shown = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.master)

    def wait_for(self, words: bytes, count: int = 1) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while self.shown.count(words) < count:
            assert select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0], self.shown
            self.shown += os.read(self.master, 65536)

    def type(self, words: bytes) -> None:
        os.write(self.master, words)

    def finish(self) -> tuple[int, bytes]:
        """Its exit status, and what it printed; all that it showed is there then."""
        printed, _ = self.process.communicate(timeout=WAIT_SECONDS)
        # A terminal that nobody writes to any more ends in an error.
        with contextlib.suppress(OSError):
            while select.select([self.master], [], [], 0)[0] and (more := os.read(self.master, 65536)):
                self.shown += more
        return self.process.returncode, printed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working directory: it holds an authenticator that refuses everybody, and nothing else."""
    script = tmp_path / "authenticator"
    script.write_text("#!/bin/sh\ncat >/dev/null\nexit 1\n")
    script.chmod(0o755)
    return tmp_path


def configure(folder: Path, name: str = "pgauthproxy.yaml", **settings: object) -> Path:
    """Writes a configuration with the authenticator of the folder."""
    content = {"listen": "127.0.0.1:0", "drain_timeout": 1, "authenticator": {"cmd": ["./authenticator"]}}
    file = folder / name
    file.write_text(yaml.safe_dump(content | settings))
    return file


# TLS


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs what gateways, clients and targets show each other."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))


def newest_of_debian() -> Path | None:
    """The programs of the newest PostgreSQL of Debian's packages. It speaks TLS, which that of the wheel does not."""
    found = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    return max((path.parent for path in found), key=lambda path: int(path.parent.name), default=None)


DEBIAN = newest_of_debian()
DEBIAN_VERSION = int(DEBIAN.parent.name) if DEBIAN is not None else 0
DIRECT_TLS_SINCE = 17

TLS_ROLES = """
CREATE ROLE certified LOGIN;
CREATE ROLE in_plain LOGIN;
CREATE ROLE over_tls LOGIN;
"""
TLS_HBA = """
hostssl   all  certified  127.0.0.1/32  cert
hostnossl all  in_plain   127.0.0.1/32  trust
hostssl   all  over_tls   127.0.0.1/32  trust
hostnossl all  certified,over_tls  127.0.0.1/32  reject
hostssl   all  in_plain            127.0.0.1/32  reject
"""


@pytest.fixture(scope="session")
def tls_postgres(authority: Authority) -> Iterator[ThrowawayPostgres]:
    """A PostgreSQL with a certificate for localhost, the roles of `postgres` and those of TLS_ROLES."""
    if DEBIAN is None:
        pytest.skip("no PostgreSQL that speaks TLS here: the package postgresql is not installed")
    files = {"ssl_cert_file": "server.pem", "ssl_key_file": "server.key", "ssl_ca_file": "authority.pem"}
    # They stand beside the data folder, to which such names are relative.
    settings = {"ssl": "on"} | {setting: f"../{name}" for setting, name in files.items()}
    server = ThrowawayPostgres(binaries=DEBIAN, settings=settings, hba=TLS_HBA + HBA)
    identity = authority.issue("server", "localhost", HOST)
    for source, name in zip((identity.cert, identity.key, authority.cert), files.values(), strict=True):
        copied = server.folder / name
        copied.touch(0o600)
        copied.write_bytes(source.read_bytes())
        if os.geteuid() == 0:
            shutil.chown(copied, UNPRIVILEGED_USER)
    with server:
        server.sql(ROLES + TLS_ROLES)
        yield server


class Workers:
    """A gateway with several workers."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.port = gateway.port

    @property
    def pids(self) -> dict[int, int]:
        """The latest process of each worker."""
        return {line["worker"]: line["pid"] for line in self.gateway.log_lines("worker ready")}

    def kill(self, worker: int, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pids[worker], number)

    def wait_for_successor(self, worker: int, old: int) -> None:
        wait_until(lambda: self.pids[worker] != old, "the worker to be replaced")

    def worker_of(self, client: RawClient) -> int:
        """Where a client that has just logged in is."""
        address = f"127.0.0.1:{client.socket.getsockname()[1]}"
        worker: int = self.gateway.wait_for("login", client=address)["worker"]
        return worker

    def client_at(self, stack: contextlib.ExitStack, worker: int) -> RawClient:
        """A client that is logged in there."""
        for _ in range(MANY):
            client = stack.enter_context(RawClient(self.port))
            client.log_in()
            if self.worker_of(client) == worker:
                return client
        raise AssertionError(f"nobody was sent to worker {worker}")


StartWorkers = Callable[..., Workers]


@pytest.fixture
def start_workers(start_gateway: StartGateway, mapped: Path) -> StartWorkers:
    """Starts gateways with two workers before `postgres`."""

    def start(cmd: Path | None = mapped, **settings: object) -> Workers:
        return Workers(start_gateway(cmd, **{"workers": 2, **settings}))

    return start


@pytest.fixture
def workers(start_workers: StartWorkers) -> Workers:
    return start_workers()


class Upgradable:
    """A gateway, and the processes that have taken over from it; `pids` has them in order, the first one included."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.port = gateway.port
        gateway.may_say_more = lambda: any(map(is_alive, self.pids))

    @property
    def pids(self) -> list[int]:
        return [self.gateway.pid, *(line["pid"] for line in self.gateway.log_lines(SUCCEEDED))]

    def upgrade(self) -> None:
        count = len(self.pids)
        os.kill(self.pids[-1], signal.SIGUSR2)
        self.gateway.wait_for(SUCCEEDED, count)

    def wait_until_moved(self) -> None:
        """Until the latest process is the only one."""
        self.gateway.process.wait(WAIT_SECONDS)
        wait_until(lambda: not any(map(is_alive, self.pids[:-1])), "all older processes to be gone")

    def stop(self) -> None:
        if len(self.pids) > 1:
            # It has nothing left: a signal while it ends would be its end.
            self.gateway.process.wait(WAIT_SECONDS)
        for pid in self.pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not any(map(is_alive, self.pids[1:])), "all processes to be gone")


@contextlib.contextmanager
def logged_in_by_tls(port: int, authority: Authority, application_name: str) -> Iterator[tuple[RawClient, list[Any]]]:
    """A client whose session speaks TLS, with the messages of its login."""
    with RawClient(port) as client:
        client.send(SSL_REQUEST)
        assert client.socket.recv(1) == b"S"
        client.socket = authority.client_context().wrap_socket(client.socket, server_hostname="localhost")
        yield client, client.log_in(application_name=application_name)


@contextlib.contextmanager
def transactions_through(gateway: Gateway, postgres: ThrowawayPostgres, clients: int) -> Iterator[None]:
    """pgbench, with as many clients, none of which may see anything fail; all are in when this begins."""
    script = gateway.log.with_name("load.sql")
    script.write_text("begin;\nselect 1;\nselect generate_series(1, 50);\ncommit;\n")
    words = ["-n", "-c", str(clients), "-T", "600", "-M", "prepared", "-P", "1", "-f", str(script)]
    load = subprocess.Popen(
        [postgres.binaries / "pgbench", *words, "-h", "127.0.0.1", "-p", str(gateway.port), "-U", "alice", "postgres"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment | {"PGPASSWORD": "any", "PGSSLMODE": "disable"},
        text=True,
    )
    try:
        # One more looks at the server first.
        gateway.wait_for("login", clients + 1)
        yield
        assert load.poll() is None
    finally:
        # Not SIGINT, which may be ignored here: it is in what a shell has put into the background.
        load.terminate()
        said, _ = load.communicate(timeout=WAIT_SECONDS)
    assert "aborted" not in said
    assert "error" not in said.lower(), said
    assert "progress" in said


StartUpgradable = Callable[..., Upgradable]


@pytest.fixture
def start_upgradable(start_gateway: StartGateway, mapped: Path) -> Iterator[StartUpgradable]:
    """Starts gateways before `postgres`, and ends their successors."""
    started: list[Upgradable] = []

    def start(cmd: Path | None = mapped, **settings: Any) -> Upgradable:
        started.append(Upgradable(start_gateway(cmd, **settings)))
        return started[-1]

    yield start
    for upgradable in started:
        upgradable.stop()


@pytest.fixture
def upgradable(start_upgradable: StartUpgradable) -> Upgradable:
    return start_upgradable()
