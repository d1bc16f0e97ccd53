"""`pgauthproxy demo`: the gateway at work before an embedded PostgreSQL, in seconds, with nothing to set up."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Final

import click
import yaml

from pgauthproxy.throwaway import ThrowawayError, ThrowawayPostgres, free_port

SECONDS: Final = 20
WHO_AM_I: Final = (
    "select format('role %s in database %s, seen by the server as %s', "
    "current_user, current_database(), current_setting('application_name'))"
)
HBA: Final = "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
ROLES: Final = """
    create role reader login password 'reader''s secret';
    create role writer login password 'writer''s secret';
    create database demo;
"""
PASSWORDS: Final = {"alice": "wonderland", "bob": "builder", "mallory": "let me in"}


class DemoError(Exception):
    """The demonstration could not be given; the text is for the user."""


def example(name: str) -> Path:
    """An example of the package, or of the checkout that it runs from."""
    package = Path(__file__).parent
    return next(path for path in (package / "examples" / name, package.parent / "examples" / name) if path.exists())


def run(port: int) -> None:
    """Shows two logins and a refusal; on a terminal it stays until Ctrl-C. Raises DemoError."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThrowawayPostgres(hba=HBA) as server:
            server.sql(ROLES)
            click.echo(f"PostgreSQL listens on 127.0.0.1:{server.port}, with the roles reader and writer.")
            gateway = _start_gateway(server, port or free_port())
            try:
                _show(server, gateway)
            finally:
                gateway.process.terminate()
                gateway.process.wait(SECONDS)
    except KeyboardInterrupt:
        click.echo("\nBye.")
    except ThrowawayError as error:
        raise DemoError(str(error)) from None


class _GatewayProcess:
    """The gateway as anybody would start it. Its log is shown if it fails."""

    def __init__(self, folder: Path, target: str, port: int) -> None:
        self.port = port
        config = folder / "demo.yaml"
        settings = {
            "listen": f"127.0.0.1:{port}",
            "authenticator": {"cmd": [sys.executable, str(example("two_roles.py"))]},
            "drain_timeout": 1,
        }
        config.write_text(yaml.safe_dump(settings))
        self.process = subprocess.Popen(  # noqa: S603 (ourselves)
            [sys.executable, "-m", "pgauthproxy", "--config", str(config)],
            stderr=subprocess.PIPE,
            env=os.environ | {"TARGET_HOST": target},
            # Ctrl-C is for this process, which ends the gateway in order.
            start_new_session=True,
        )

    @property
    def log(self) -> IO[bytes]:
        assert self.process.stderr is not None  # noqa: S101 (it was asked for)
        return self.process.stderr


def _start_gateway(server: ThrowawayPostgres, port: int) -> _GatewayProcess:
    gateway = _GatewayProcess(server.folder, f"127.0.0.1:{server.port}", port)
    seen = b""
    while b"listening" not in seen:
        ready, _, _ = select.select([gateway.log], [], [], SECONDS)
        line = gateway.log.readline() if ready else b""
        if not line:
            gateway.process.kill()
            gateway.process.wait()
            raise DemoError(f"the gateway did not start:\n{seen.decode(errors='replace')}")
        seen += line
    click.echo(f"The gateway listens on 127.0.0.1:{port}, with the authenticator {example('two_roles.py')}.\n")
    return gateway


def _show(server: ThrowawayPostgres, gateway: _GatewayProcess) -> None:
    psql = server.binaries / "psql"
    for user, password in PASSWORDS.items():
        done = subprocess.run(  # noqa: S603 (psql, with arguments of ours)
            [psql, "-XqAt", "-h", "127.0.0.1", "-p", str(gateway.port), "-U", user, "-d", "demo", "-c", WHO_AM_I],
            env=os.environ | {"PGPASSWORD": password},
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        let_in = done.returncode == 0
        if let_in is (user == "mallory"):
            raise DemoError(f"the login of {user} went wrong:\n{done.stderr.decode(errors='replace')}")
        words = (done.stdout or done.stderr).decode(errors="replace").strip()
        click.echo(f"{user:8} became {words}" if let_in else f"{user:8} was refused: {words.partition('failed: ')[2]}")
    click.echo("\nTry it:\n")
    for user in ("alice", "bob"):
        click.echo(f"  PGPASSWORD={PASSWORDS[user]} {psql} -h 127.0.0.1 -p {gateway.port} -U {user} demo")
    if sys.stdin.isatty() and sys.stdout.isatty():
        click.echo("\nThe gateway's log follows. Ctrl-C ends the demonstration.\n")
        for line in gateway.log:
            click.echo(line.decode(errors="replace"), nl=False)
