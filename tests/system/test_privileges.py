"""The gateway as another user: root binds, somebody else serves."""

from __future__ import annotations

import contextlib
import grp
import http.client
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgauthproxy.throwaway import UNPRIVILEGED_USER, ThrowawayPostgres
from tests.conftest import WAIT_SECONDS, Gateway, StartGateway
from tests.system.conftest import Run, assert_one_clear_line, assert_serves, configure, wait_until, write_mapped
from tests.tls import HOST, Authority, TlsClient
from tests.wire import RawClient, password, startup

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
NOBODY = pwd.getpwnam(UNPRIVILEGED_USER)


def may_run_python() -> bool:
    """Whether another user can start the Python that runs this, as root."""
    if os.geteuid() != 0:
        return True
    try:
        return subprocess.run([sys.executable, "-c", "import pgauthproxy.cli"], user=NOBODY.pw_uid).returncode == 0
    except PermissionError:
        return False


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can read, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="pgauthproxy-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def script(open_folder: Path, postgres: ThrowawayPostgres) -> Path:
    """An authenticator that everybody may run; it leaves its user's number in the name of the application."""
    written = write_mapped(open_folder / "authenticator", postgres.port)
    written.write_text(written.read_text().replace('echo "user=', 'echo "application_name=$(id -u)"\necho "user='))
    return written


def status(gateway: Gateway) -> dict[str, list[str]]:
    lines = Path(f"/proc/{gateway.pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def application_name(client: RawClient) -> bytes:
    """What the target says that it is."""
    return next(
        body[17:-1] for kind, body in client.log_in() if kind == b"S" and body.startswith(b"application_name\0")
    )


@as_root
def test_it_serves_as_another_user_and_so_do_its_authenticators(
    start_gateway: StartGateway, script: Path, open_folder: Path
) -> None:
    folder = open_folder / "socket"
    folder.mkdir()
    # A place where the other user could not listen.
    listen = ["127.0.0.1:0", f"unix:{folder}:5432"]
    for _ in range(2):
        gateway = start_gateway(script, listen=listen, user=UNPRIVILEGED_USER)
        gateway.wait_for("listening", count=2)
        found = status(gateway)
        assert found["Uid"] == [str(NOBODY.pw_uid)] * 4
        assert found["Gid"] == [str(NOBODY.pw_gid)] * 4
        assert set(map(int, found["Groups"])) == set(os.getgrouplist(UNPRIVILEGED_USER, NOBODY.pw_gid))
        assert set(found["CapEff"] + found["CapPrm"]) == {"0" * 16}
        assert found["NoNewPrivs"] == ["0"]
        with RawClient(gateway.port) as client:
            assert application_name(client) == str(NOBODY.pw_uid).encode()
        with RawClient.of_folder(folder, 5432) as client:
            client.log_in()
        assert gateway.stop() == 0


@as_root
def test_operators_are_served_as_that_user_too(start_gateway: StartGateway, script: Path) -> None:
    gateway = start_gateway(script, user=UNPRIVILEGED_USER, admin={"listen": "127.0.0.1:0"})
    connection = http.client.HTTPConnection(gateway.wait_for("serving operators")["address"], timeout=WAIT_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        assert b"pgauthproxy_" in answer.read()


@as_root
@pytest.mark.skipif(not may_run_python(), reason="Python stands where only root can read")
def test_several_workers_are_that_user_from_the_start_and_share_what_root_has_opened(
    start_gateway: StartGateway, script: Path, open_folder: Path
) -> None:
    audit = open_folder / "audit"
    audit.mkdir()
    shutil.chown(audit, UNPRIVILEGED_USER)
    file = audit / "log"
    gateway = start_gateway(script, workers=2, user=UNPRIVILEGED_USER, audit={"file": str(file)})
    gateway.wait_for("worker ready", count=2)
    for pid in (gateway.pid, *gateway.children):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        assert [line.split()[1:] for line in lines if line.startswith("Uid:")] == [[str(NOBODY.pw_uid)] * 4]
    for _ in range(8):
        with RawClient(gateway.port) as client:
            assert application_name(client) == str(NOBODY.pw_uid).encode()
    old = gateway.children
    os.kill(min(old), signal.SIGKILL)
    gateway.wait_for("worker ready", count=3)
    for _ in range(8):
        assert_serves(gateway.port)
    assert file.stat().st_uid == NOBODY.pw_uid


@as_root
@pytest.mark.skipif(may_run_python(), reason="Python stands where everybody can read")
def test_workers_that_the_user_cannot_start_stop_the_start(folder: Path, run: Run, script: Path) -> None:
    configure(folder, workers=2, user=UNPRIVILEGED_USER, authenticator={"cmd": [str(script)]})
    done = run()
    assert done.returncode == 2
    assert f"pgauthproxy: workers cannot be started: {sys.executable}: Permission denied" in done.stderr


@as_root
def test_settings_that_this_user_cannot_read_are_not_read_anew(start_gateway: StartGateway, script: Path) -> None:
    gateway = start_gateway(script, user=UNPRIVILEGED_USER)
    gateway.process.send_signal(signal.SIGHUP)
    assert "Permission denied" in gateway.wait_for("configuration not loaded, the old one stays")["reason"]
    assert_serves(gateway.port)


@as_root
def test_its_group_can_be_another(start_gateway: StartGateway, script: Path) -> None:
    group = next(each for each in grp.getgrall() if each.gr_gid not in (0, NOBODY.pw_gid))
    gateway = start_gateway(script, user=UNPRIVILEGED_USER, group=group.gr_name)
    assert status(gateway)["Gid"] == [str(group.gr_gid)] * 4
    assert_serves(gateway.port)


def test_nothing_that_it_starts_gets_more_rights(start_gateway: StartGateway, mapped: Path) -> None:
    gateway = start_gateway(mapped, no_new_privs=True)
    assert status(gateway)["NoNewPrivs"] == ["1"]
    assert_serves(gateway.port)


@as_root
def test_certificates_are_read_anew_as_that_user(
    start_gateway: StartGateway, script: Path, open_folder: Path, authority: Authority
) -> None:
    identity = authority.issue("gateway", "localhost", HOST)
    tls: dict[str, Any] = {}
    for name, source in (("cert", identity.cert), ("key", identity.key)):
        copied = open_folder / name
        copied.touch(0o600)
        copied.write_bytes(source.read_bytes())
        shutil.chown(copied, UNPRIVILEGED_USER)
        tls[name] = str(copied)
    gateway = start_gateway(script, folder=open_folder, user=UNPRIVILEGED_USER, tls=tls)
    gateway.process.send_signal(signal.SIGHUP)
    gateway.wait_for("certificates loaded anew")
    shutil.chown(tls["key"], "root")
    gateway.process.send_signal(signal.SIGHUP)
    gateway.wait_for("certificates not loaded, the old ones stay")
    with TlsClient(gateway.port, authority.client_context()) as client:
        client.log_in()
        client.assert_served()


@as_root
@pytest.mark.parametrize("command", [(), ("check",)], ids=["start", "check"])
def test_what_that_user_cannot_read_stops_the_start(
    folder: Path, run: Run, authority: Authority, script: Path, command: tuple[str, ...]
) -> None:
    identity = authority.issue("gateway", "localhost", HOST)
    # Root's own key, which root could read.
    configure(folder, user=UNPRIVILEGED_USER, authenticator={"cmd": [str(script)]}, tls=identity.settings)
    done = run(*command)
    assert done.returncode == 2
    assert "pgauthproxy: tls: " in done.stderr
    assert "Permission denied" in done.stderr


@as_root
def test_whom_it_cannot_become_stops_the_start(folder: Path, run: Run) -> None:
    configure(folder, user="nobody at all")
    assert_one_clear_line(run(), "user: nobody at all: there is no such user")
    configure(folder, user=UNPRIVILEGED_USER, group="no group at all")
    assert_one_clear_line(run(), "group: no group at all: there is no such group")
    configure(folder, group="root")
    assert_one_clear_line(run(), "group: needs user")


@as_root
def test_only_root_can_become_another_user(run: Run, script: Path, open_folder: Path) -> None:
    config = configure(open_folder, user="root", authenticator={"cmd": [str(script)]})
    before = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups"]
    done = run("check", "--config", str(config), before=before)
    assert (done.returncode, done.stderr) == (2, "pgauthproxy: user: root: only root can become another user\n")
    # Who it is already it need not become.
    config = configure(open_folder, user=UNPRIVILEGED_USER, authenticator={"cmd": [str(script)]})
    done = run("check", "--config", str(config), before=before)
    assert done.returncode == 0, done


# What it leaves behind


def core_limits(pid: int) -> list[str]:
    """How large a core dump of a process may be: soft and hard limit."""
    (line,) = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max core")]
    return line.split()[4:6]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["command", "worker"])
def test_no_process_of_it_leaves_a_core_dump_in_which_credentials_are(
    start_gateway: StartGateway, open_folder: Path, workers: int, kind: str
) -> None:
    script = open_folder / "authenticator"
    script.write_text("#!/bin/sh\nsleep 60\n")
    script.chmod(0o755)
    before = ["sh", "-c", 'ulimit -c unlimited && exec "$@"', "sh"]
    gateway = start_gateway(None, before=before, workers=workers, authenticator={"kind": kind, "cmd": [str(script)]})
    with RawClient(gateway.port) as client:
        client.send(startup() + password())
        # The script, and what it has started.
        least = (1 if workers == 1 else 1 + workers) + 2
        wait_until(lambda: len(gateway.family) >= least, "the authenticator to run")
        for pid in gateway.family:
            assert core_limits(pid) == ["0", "0"], Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this")
@pytest.mark.parametrize("core_dumps", [False, True])
def test_no_debugger_of_its_own_user_gets_at_the_memory_of_a_process(*, core_dumps: bool) -> None:
    program = (
        "import ctypes, sys; from pgauthproxy.process import prepare_process\n"
        f"prepare_process(core_dumps={core_dumps})\n"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == f"{int(core_dumps)}\n"
