"""The real things that tests run against: a PostgreSQL, the gateway as a process, an authenticator as a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgauthproxy.throwaway import ThrowawayPostgres

LATE_SECONDS = 2.0
"""How late a line of the log may come after the end of the process that was started."""
WAIT_SECONDS = 20

HBA = """
local   all          all                       trust
host    all          trusted   127.0.0.1/32    trust
host    all          postgres  127.0.0.1/32    trust
host    replication  postgres  127.0.0.1/32    trust
host    all          hashed    127.0.0.1/32    md5
host    all          clear     127.0.0.1/32    password
host    all          all       127.0.0.1/32    scram-sha-256
"""

ROLES = """
SET password_encryption = 'md5';
CREATE ROLE hashed LOGIN PASSWORD 'hashed secret';
SET password_encryption = 'scram-sha-256';
CREATE ROLE trusted LOGIN;
CREATE ROLE clear LOGIN PASSWORD 'clear secret';
CREATE ROLE scrammed LOGIN PASSWORD 'scram secret';
CREATE ROLE umlaut LOGIN PASSWORD 'ⅸ¨Á\u00a0x';
CREATE DATABASE other;
GRANT ALL ON SCHEMA public TO public;
"""


@pytest.fixture(scope="session")
def postgres() -> Iterator[ThrowawayPostgres]:
    """PostgreSQL 18 with one role for each way to log in (see HBA and ROLES)."""
    settings = {"wal_level": "logical", "max_connections": "300", "max_prepared_transactions": "10"}
    with ThrowawayPostgres(settings=settings, hba=HBA) as server:
        server.sql(ROLES)
        yield server


SETTINGS: dict[str, Any] = {"listen": "127.0.0.1:0", "drain_timeout": 1}


class Gateway:
    """`pgauthproxy` as a process. `log_lines` are its log's JSON objects."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.port = 0
        self.may_say_more: Callable[[], bool] = lambda: process.poll() is None
        """Whether there is a process that could write to the log."""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def config(self) -> Path:
        """The file with its settings."""
        return self.log.with_suffix(".yaml")

    def rewrite(self, **settings: Any) -> None:
        """Other settings in its file, nested ones as dictionaries; the others stay. It does not read them by itself."""
        content = yaml.safe_load(self.config.read_text())
        for name, value in settings.items():
            content[name] = content.get(name, {}) | value if isinstance(value, dict) else value
        self.config.write_text(yaml.safe_dump(content))

    def log_lines(self, event: str = "") -> list[dict[str, Any]]:
        whole = self.log.read_text().rpartition("\n")[0]
        lines = [json.loads(line) for line in whole.split("\n") if line.startswith("{")]
        return [line for line in lines if not event or line["event"] == event]

    def wait_for(self, event: str, count: int = 1, **fields: Any) -> dict[str, Any]:
        """The count-th log line of this event with these fields, once it is there."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            found = [line for line in self.log_lines(event) if fields.items() <= line.items()]
            if len(found) >= count:
                return found[count - 1]
            if not self.may_say_more():
                # Not waited for in vain; but another process may write the same log, a little late.
                deadline = min(deadline, time.monotonic() + LATE_SECONDS)
            time.sleep(0.01)
        raise AssertionError(f"no {count}. {event!r} with {fields} in the log:\n{self.log.read_text()}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal, waits, gives the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(WAIT_SECONDS)

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @property
    def sockets(self) -> int:
        """How many of its descriptors are sockets."""
        count = 0
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            # It may be closed by now.
            with contextlib.suppress(FileNotFoundError):
                count += str(descriptor.readlink()).startswith("socket:")
        return count

    @property
    def children(self) -> set[int]:
        """Its processes, those included that are gone and not yet reaped."""
        return children_of(self.pid)

    @property
    def family(self) -> set[int]:
        """Itself, and whatever it and its processes have started."""
        found, new = {self.pid}, {self.pid}
        while new := set().union(*map(children_of, new)) - found:
            found |= new
        return found

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_bytes(self) -> int:
        return resident_bytes(self.pid)

    @property
    def peak_bytes(self) -> int:
        """The most memory that it ever had."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def children_of(pid: int) -> set[int]:
    """The processes of a process, those included that are gone and not yet reaped."""
    found: set[int] = set()
    # It, or one of its threads, may be gone by now.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.update(map(int, (thread / "children").read_text().split()))
    return found


def resident_bytes(pid: int | str = "self") -> int:
    """How much memory a process has."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4096


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2][0]
    except OSError:
        return False
    return state not in "ZX"


StartGateway = Callable[..., Gateway]


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[StartGateway]:
    """Starts gateways; each listens on a free port of 127.0.0.1 unless `listen` is given.

    `cmd` is the authenticator, None if the settings name another; `before` are the words of a program that starts it,
    `descriptors` what it inherits, `folder` where the file with its settings is; other keyword arguments are settings,
    nested ones as dictionaries.
    At the end each must go away with status 0, and must not have logged an internal error.
    """
    started: list[Gateway] = []

    def start(
        cmd: Any,
        *,
        before: list[str] | None = None,
        environment: dict[str, str] | None = None,
        descriptors: Sequence[int] = (),
        folder: Path = tmp_path,
        **settings: Any,
    ) -> Gateway:
        number = len(started)
        authenticator = settings.pop("authenticator", {})
        if cmd is not None:
            authenticator = {"cmd": cmd if isinstance(cmd, list) else [str(cmd)], **authenticator}
        content = {**SETTINGS, "authenticator": authenticator, **settings}
        config = folder / f"gateway{number}.yaml"
        config.write_text(yaml.safe_dump(content))
        log = tmp_path / f"gateway{number}.log"
        command = [sys.executable, "-m", "pgauthproxy", "--config", str(config), "--log-format", "json"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*(before or []), *command],
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=tmp_path,
                pass_fds=descriptors,
            )
        gateway = Gateway(process, log)
        started.append(gateway)
        address = gateway.wait_for("listening")["address"]
        gateway.port = int(address.rpartition(":")[2]) if not address.startswith("unix:") else 0
        return gateway

    yield start
    for gateway in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = gateway.stop()
        if gateway.process.poll() is None:
            gateway.process.kill()
            gateway.process.wait()
            raise AssertionError(f"the gateway did not end:\n{gateway.log.read_text()}")
        log = gateway.log.read_text()
        assert status == 0, log
        assert "internal error" not in log, log
        assert "Traceback" not in log, log


WriteAuthenticator = Callable[..., Path]


@pytest.fixture
def authenticator(tmp_path: Path) -> WriteAuthenticator:
    """Writes an authenticator: a shell script with this body. `$user` and `$database` are what the client sent."""

    def write(body: str, name: str = "authenticator") -> Path:
        script = tmp_path / name
        script.write_text(
            "#!/bin/sh\n"
            "input=$(cat)\n"
            'field() { printf "%s\\n" "$input" | sed -n "s/^$1=//p"; }\n'
            "user=$(field user) database=$(field database)\n"
            f"{body}\n"
        )
        script.chmod(0o755)
        return script

    return write


@pytest.fixture
def mapped(authenticator: WriteAuthenticator, postgres: ThrowawayPostgres) -> Path:
    """An authenticator that lets everybody but mallory in, as the superuser, to the database that they asked for."""
    return authenticator(
        f'echo "_META_TARGET_HOST=127.0.0.1:{postgres.port}"\n'
        'echo "user=postgres"\n'
        'echo "database=${database:-postgres}"\n'
        'printf "%s\\n" "$input" | grep -E "^(application_name|client_encoding|options|replication)="\n'
        '[ "$user" != mallory ]'
    )


@pytest.fixture
def gateway(start_gateway: StartGateway, mapped: Path) -> Gateway:
    """A gateway before `postgres`, with the authenticator `mapped`."""
    return start_gateway(mapped)
