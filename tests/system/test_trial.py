"""`pgauthproxy auth`: one login without a client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pgauthproxy.proto.scram import Verifier
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS
from tests.system.conftest import MODULE, environment

PASSWORD = "wonder land"
Try = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def trial(tmp_path: Path) -> Try:
    """Tries a login with an authenticator of this body."""

    def run(body: str, *arguments: str, typed: str = PASSWORD, **settings: object) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "authenticator"
        script.write_text(f"#!/bin/sh\ninput=$(cat)\n{body}\n")
        script.chmod(0o755)
        config = tmp_path / "pgauthproxy.yaml"
        config.write_text(yaml.safe_dump({"authenticator": {"cmd": "./authenticator", **settings}}))
        return subprocess.run(
            [*MODULE, "auth", "--user", "alice", *arguments],
            input=typed + "\n",
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            cwd=tmp_path,
            env=environment,
            check=False,
        )

    return run


MAPS = """
echo _META_TARGET_HOST=db7:5433
echo "_META_TARGET_PASSWORD=target secret"
echo user=reader
echo _META_SESSION_SECONDS=60
echo _META_IDLE_TIMEOUT=0
"""


def test_it_shows_what_was_sent_and_what_was_answered_but_no_secret(trial: Try) -> None:
    done = trial(MAPS, "--database", "shop", "--param", "application_name=me", cleartext_password=True)
    assert done.returncode == 0
    for line in (
        "  user=alice",
        "  database=shop",
        "  application_name=me",
        "  _SOURCE_METHOD=cleartext",
        "  _SOURCE_CRED=***",
        "  host=db7:5433",
        "  user=reader",
        "  credential: a password, ***",
        "  session_seconds=60",
        "  idle_timeout=0",
        "let in",
    ):
        assert line in done.stdout.splitlines()
    assert PASSWORD not in done.stdout + done.stderr
    assert "target secret" not in done.stdout + done.stderr


def test_the_password_that_is_typed_is_what_the_authenticator_gets(trial: Try) -> None:
    body = f'printf "%s\\n" "$input" | grep -qx "_SOURCE_CRED={PASSWORD}" || exit 1\n{MAPS}'
    assert trial(body, cleartext_password=True).returncode == 0
    assert trial(body, cleartext_password=True, typed="another").returncode == 1


def test_a_refusal_ends_with_status_1_and_its_reason(trial: Try) -> None:
    done = trial("exit 3")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "refused: authenticator refused with exit status 3"


@pytest.mark.parametrize("body", ["echo nonsense", "kill -STOP $$"])
def test_what_is_broken_ends_with_status_2(trial: Try, body: str) -> None:
    done = trial(body, timeout=0.5)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1].startswith("broken: authenticator ")


@pytest.mark.parametrize(("typed", "status"), [(PASSWORD, 0), ("wrong", 1)])
def test_a_verifier_is_held_to_the_password(trial: Try, typed: str, status: int) -> None:
    verifier = Verifier.of(PASSWORD.encode(), os.urandom(16), 4096).text().decode()
    done = trial(f"{MAPS}\necho '_META_SOURCE_VERIFIER={verifier}'", typed=typed, method="scram-sha-256")
    assert done.returncode == status
    assert "_SOURCE_CRED" not in done.stdout
    assert verifier not in done.stdout


def test_its_complaints_are_shown(trial: Try) -> None:
    assert "  (it says: cannot reach the directory)" in trial(f"echo cannot reach the directory >&2\n{MAPS}").stdout


def test_connecting_tells_where_that_was(trial: Try, postgres: ThrowawayPostgres) -> None:
    done = trial(f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}\necho user=postgres", "--connect")
    assert done.returncode == 0
    assert f"connected to 127.0.0.1:{postgres.port}, PostgreSQL 18" in done.stdout
    refused = trial("echo _META_TARGET_HOST=127.0.0.1:1\necho user=postgres", "--connect")
    assert refused.returncode == 2
    assert "target not reachable" in refused.stdout


def test_a_function_is_asked_as_a_command_is(trial: Try, tmp_path: Path) -> None:
    (tmp_path / "who.py").write_text(
        "from pgauthproxy.authenticator import Denied, Mapping\n"
        "def main(request):\n"
        "    if not request.password_is('wonder land'):\n"
        "        raise Denied('unknown user or wrong password')\n"
        "    return Mapping('db7', 'reader', password='target secret')\n"
    )
    agreed = trial("", cmd=[], callable="who:main")
    assert agreed.returncode == 0, agreed.stdout + agreed.stderr
    for line in ("  user=alice", "  _SOURCE_CRED=***", "  host=db7:5432", "  user=reader", "let in"):
        assert f"{line}\n" in agreed.stdout
    assert "target secret" not in agreed.stdout
    denied = trial("", cmd=[], callable="who:main", typed="another")
    assert denied.returncode == 1
    assert denied.stdout.endswith("refused: authenticator refused: unknown user or wrong password\n")
    broken = trial("", cmd=[], callable="nobody:main")
    assert (broken.returncode, broken.stdout[:8]) == (2, "broken: ")


def test_no_terminal_echoes_the_password(trial: Try, tmp_path: Path) -> None:
    trial(MAPS)
    script = (
        "import os, pty, sys\n"
        "def typed(fd):\n"
        "    data = os.read(fd, 1024)\n"
        "    if b'Password' in data: os.write(fd, b'sesame\\n')\n"
        "    return data\n"
        "status = pty.spawn([sys.executable, '-m', 'pgauthproxy', 'auth', '--user', 'alice'], typed)\n"
        "sys.exit(os.waitstatus_to_exitcode(status))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert (done.returncode, "sesame" in done.stdout) == (0, False), done
