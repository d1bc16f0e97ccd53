"""`pgauthproxy users`: the file is edited safely, and nothing of it that was not asked for changes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgauthproxy._digest import md5_password
from pgauthproxy.proto import scram
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS, StartGateway
from tests.system.conftest import MODULE, Terminal, environment
from tests.tls import HOST

SECRET = "wonderland"
FILE = """\
# Who may in. Ask ops before you change it.
targets:
  main:
    host: 127.0.0.1:5432   # the old one
    user: app
    password: env:NOT_SET_HERE
  hr: {host: db2, user: hr}

users:
  # Their boss.
  bob:
    verifier: {verifier}
    databases: {"*": main}

# the end
"""
BOB = scram.Verifier.of(b"builder", bytes(16), 1).text().decode()

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A users file with bob in it, whose secrets are not at hand here, and settings that name it."""
    found = tmp_path / "users.yaml"
    found.write_text(FILE.replace("{verifier}", BOB))
    found.chmod(0o600)
    (tmp_path / "pgauthproxy.yaml").write_text("authenticator: {users: {file: users.yaml}}\n")
    return found


@pytest.fixture
def users(tmp_path: Path) -> Command:
    """Runs the command in the folder of the file, with this on its standard input."""

    def run(*arguments: str, given: str = f"{SECRET}\n", before: tuple[str, ...] = ()) -> Any:
        return subprocess.run(
            [*MODULE, *before, "users", *arguments],
            input=given,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=WAIT_SECONDS,
            check=False,
        )

    return run


def known(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())["users"]
    return found


def lets_in(verifier: str, secret: str = SECRET) -> bool:
    found = scram.Verifier.parse(verifier.encode())
    assert found is not None
    return found.fits(scram.salted_password(secret.encode(), found.salt, found.iterations))


# Adding


def test_a_user_is_added_and_nothing_else_changes(users: Command, file: Path) -> None:
    before = file.read_text()
    done = users("add", "alice", "--target", "main", "--password-stdin")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "alice is in users.yaml; a running gateway reads it on SIGHUP\n"
    alice = known(file)["alice"]
    assert alice["databases"] == {"*": "main"}
    assert lets_in(alice["verifier"])
    assert alice["verifier"].startswith("SCRAM-SHA-256$4096:")
    added = (
        "  alice:\n"
        f"    verifier: {alice['verifier']}\n"
        "    databases:\n"
        '      "*": main\n'
    )  # fmt: skip
    assert file.read_text() == before.replace("\n# the end", f"{added}\n# the end")
    assert SECRET not in file.read_text()


def test_databases_and_networks_are_written_as_they_were_said(users: Command, file: Path) -> None:
    said = ["--database", "shop=main", "--database", "*=hr", "--allow", "10.0.0.0/8", "--allow", "fd00::/8"]
    assert users("add", "alice", *said, "--allow", "local", "--password-stdin").returncode == 0
    alice = known(file)["alice"]
    assert alice["databases"] == {"shop": "main", "*": "hr"}
    assert alice["allow"] == ["10.0.0.0/8", "fd00::/8", "local"]


def test_iterations_are_those_of_the_settings(users: Command, file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("authenticator: {users: {file: users.yaml}, scram_iterations: 5000}\n")
    for before, arguments in (((), ("--config", "other.yaml")), (("--config", "other.yaml"), ())):
        done = users(*arguments, "add", "alice", "--target", "main", "--password-stdin", before=before)
        assert done.returncode == 0
        assert known(file)["alice"]["verifier"].startswith("SCRAM-SHA-256$5000:")
        assert users("remove", "alice").returncode == 0


def test_an_md5_hash_is_stored_where_that_is_the_method(users: Command, file: Path, tmp_path: Path) -> None:
    content = file.read_text().replace(BOB, md5_password(b"builder", b"bob").decode())
    file.write_text(content)
    (tmp_path / "pgauthproxy.yaml").write_text("authenticator: {users: {file: users.yaml}, method: md5}\n")
    assert users("add", "alice", "--target", "main", "--md5", "--password-stdin").returncode == 0
    assert known(file)["alice"]["verifier"] == md5_password(SECRET.encode(), b"alice").decode()


def test_a_certificate_needs_no_password_where_it_is_the_method(users: Command, file: Path, tmp_path: Path) -> None:
    settings = {"method": "cert", "users": {"file": "users.yaml"}}
    tls = {"cert": "a", "key": "b", "client_ca": "c", "client_cert": "require"}
    (tmp_path / "pgauthproxy.yaml").write_text(yaml.safe_dump({"authenticator": settings, "tls": tls}))
    assert users("add", "alice", "--target", "main", "--certificate", "CN=alice,O=Example Ltd").returncode == 0
    assert known(file)["alice"] == {"certificate": "CN=alice,O=Example Ltd", "databases": {"*": "main"}}


def test_a_name_may_be_anything_that_a_client_may_say(users: Command, file: Path) -> None:
    names = ["no", "123", 'a "b": {c}', "ä # ö"]
    for name in names:
        assert users("add", "--target", "main", "--password-stdin", "--", name).returncode == 0
    assert set(map(str, known(file))) == {"bob", *names}
    shown = users("list").stdout
    for name in names:
        assert users("remove", "--", name).returncode == 0
        assert re.search(rf"^{re.escape(name)} ", shown, re.MULTILINE)
    assert set(known(file)) == {"bob"}


def test_at_a_terminal_the_password_is_asked_for_twice_and_not_shown(file: Path) -> None:
    with Terminal("users", "add", "alice", "--target", "main", folder=file.parent) as terminal:
        terminal.wait_for(b"Password: ")
        terminal.type(SECRET.encode() + b"\n")
        terminal.wait_for(b"Repeat for confirmation: ")
        terminal.type(SECRET.encode() + b"\n")
        status, printed = terminal.finish()
    assert (status, printed) == (0, b"alice is in users.yaml; a running gateway reads it on SIGHUP\n")
    assert SECRET.encode() not in terminal.shown
    assert lets_in(known(file)["alice"]["verifier"])


def test_without_a_terminal_the_password_must_be_said_to_come_from_a_line(users: Command, file: Path) -> None:
    before = file.read_text()
    done = users("add", "alice", "--target", "main")
    assert done.returncode == 2
    assert "--password-stdin" in done.stderr
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["alice"], "--target or --database"),
        (["alice", "--database", "shop"], "DB=TARGET"),
        (["alice", "--database", "=main"], "DB=TARGET"),
        (["alice", "--database", "a=main", "--database", "a=hr"], "stands twice"),
        (["alice", "--target", "main", "--database", "*=hr"], "say the same"),
        (["alice", "--target", "nowhere"], "users.yaml: users.alice.databases: *: there is no target nowhere"),
        (["alice", "--target", "main", "--allow", "10.0.0.1/8"], "users.alice.allow: 10.0.0.1/8 has host bits set"),
        (["alice", "--target", "main", "--md5"], "is an MD5 hash, and authenticator.method is scram-sha-256"),
        (["alice", "--target", "main", "--certificate", "alice"], "none in the form of RFC 4514"),
        (["", "--target", "main"], "no name that a user can have"),
        (["bob", "--target", "main"], "users.yaml: there is a user bob already"),
        ([b"m\xfcller", "--target", "main"], "must be UTF-8"),
    ],
)
def test_what_makes_no_sense_is_said_and_not_done(users: Command, file: Path, arguments: list[Any], said: str) -> None:
    before = file.read_text()
    done = users("add", *arguments, "--password-stdin")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
    assert file.read_text() == before


def test_an_empty_password_is_refused(users: Command, file: Path) -> None:
    done = users("add", "alice", "--target", "main", "--password-stdin", given="\n")
    assert done.returncode == 2
    assert "empty password" in done.stderr
    assert set(known(file)) == {"bob"}


def test_a_fault_that_was_there_before_stands_in_nobodys_way(users: Command, file: Path) -> None:
    file.write_text(file.read_text().replace("databases: {", "database: {"))
    assert users("add", "alice", "--target", "main", "--password-stdin").returncode == 0
    assert "alice" in known(file)


# Removing


def test_a_user_is_removed_and_nothing_else_changes(users: Command, file: Path) -> None:
    before = file.read_text()
    assert users("add", "alice", "--target", "main", "--password-stdin").returncode == 0
    done = users("remove", "alice")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "alice is no more in users.yaml; a running gateway reads it on SIGHUP\n"
    assert file.read_text() == before


def test_who_is_not_there_cannot_be_removed(users: Command, file: Path) -> None:
    before = file.read_text()
    done = users("remove", "alice")
    assert (done.returncode, done.stderr) == (2, "pgauthproxy: users.yaml: there is no user alice\n")
    assert file.read_text() == before


# Listing


def test_list_shows_users_and_targets_and_no_secret(users: Command, file: Path) -> None:
    file.write_text(
        file.read_text().replace(
            "users:\n",
            "users:\n"
            "  alice: {verifier: hush, databases: {shop: main, '*': hr}, allow: [10.0.0.0/8, local]}\n"
            f"  carol: {{verifier: md5{'a' * 32}, certificate: CN=carol, databases: {{a: hr}}, allow: []}}\n"
            "  dave: {verifier: env:DAVES, databases: {a: hr}}\n",
        )
    )
    done = users("list")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.rstrip() for line in done.stdout.splitlines()] == [
        "user   proof                   databases        from",
        "alice  password in plain text  shop=main, *=hr  10.0.0.0/8, local",
        "carol  md5 + certificate       a=hr             nowhere",
        "dave   env:DAVES               a=hr             anywhere",
        "bob    scram-sha-256           *=main           anywhere",
        "",
        "target  host            user  database",
        "main    127.0.0.1:5432  app   {database}",
        "hr      db2             hr    {database}",
    ]


def test_list_shows_what_can_be_read_of_a_file_with_faults(users: Command, file: Path) -> None:
    file.write_text(file.read_text().replace("users:\n", 'users:\n  "\\e[2J": {verifier: [hush]}\n'))
    done = users("list")
    assert done.returncode == 2
    assert "bob" in done.stdout
    assert "users.yaml:10: users.\\x1b[2J: has no databases" in done.stderr
    assert "hush" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr


# The file


def test_the_file_is_that_of_the_flag_where_one_is_given(users: Command, file: Path, tmp_path: Path) -> None:
    (tmp_path / "pgauthproxy.yaml").unlink()
    other = file.rename(tmp_path / "other.yaml")
    assert users("--file", "other.yaml", "add", "alice", "--target", "main", "--password-stdin").returncode == 0
    assert users("--file", str(other), "add", "eve", "--target", "main", "--md5", "--password-stdin").returncode == 0
    assert set(known(other)) == {"bob", "alice", "eve"}


def test_the_file_of_a_chain_is_found(users: Command, file: Path, tmp_path: Path) -> None:
    chain = [{"cmd": ["/bin/true"]}, {"users": {"file": "users.yaml"}}]
    settings = {"authenticator": {"chain": chain, "method": "scram-sha-256"}}
    (tmp_path / "pgauthproxy.yaml").write_text(yaml.safe_dump(settings))
    assert users("add", "alice", "--target", "main", "--password-stdin").returncode == 0
    assert "alice" in known(file)


@pytest.mark.parametrize("arguments", [["list"], ["remove", "bob"], ["add", "x", "--target", "y", "--password-stdin"]])
def test_a_file_that_is_not_set_or_not_there_is_told(
    users: Command, file: Path, tmp_path: Path, arguments: list[str]
) -> None:
    file.unlink()
    done = users(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("pgauthproxy: ")
    assert "users.yaml: No such file or directory" in done.stderr
    (tmp_path / "pgauthproxy.yaml").write_text("authenticator: {cmd: /bin/true}\n")
    done = users(*arguments)
    assert (done.returncode, done.stderr) == (
        2,
        "pgauthproxy: authenticator.users.file is not set; --file names a file\n",
    )


@pytest.mark.parametrize("command", ["add", "remove", "list"])
def test_help_needs_no_file(users: Command, command: str) -> None:
    done = users(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: pgauthproxy users" in done.stdout


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_mode_and_owner_stay(users: Command, file: Path, mode: int) -> None:
    owner = (1234, 2345) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(file, *owner)
    file.chmod(mode)
    assert users("add", "alice", "--target", "main", "--password-stdin").returncode == 0
    found = file.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, *owner)


def test_attributes_stay_where_there_are_any(users: Command, file: Path) -> None:
    # Not every file system has them.
    with contextlib.suppress(OSError):
        os.setxattr(file, "user.note", b"mine")
    before = {name: os.getxattr(file, name) for name in os.listxattr(file)}
    assert users("remove", "bob").returncode == 0
    assert {name: os.getxattr(file, name) for name in os.listxattr(file)} == before


def test_the_file_is_replaced_at_once_and_nothing_is_left_beside_it(users: Command, file: Path) -> None:
    with file.open() as before:
        assert users("add", "alice", "--target", "main", "--password-stdin").returncode == 0
        # Who has it open reads the old one to its end.
        assert "alice" not in before.read()
    assert "alice" in known(file)
    assert {entry.name for entry in file.parent.iterdir()} == {"users.yaml", "users.yaml.lock", "pgauthproxy.yaml"}


def test_a_link_stays_a_link(users: Command, file: Path, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    there.mkdir()
    file.rename(there / "real.yaml")
    file.symlink_to(there / "real.yaml")
    assert users("add", "alice", "--target", "main", "--password-stdin").returncode == 0
    assert file.is_symlink()
    assert "alice" in known(there / "real.yaml")


def test_edits_at_the_same_time_wait_for_each_other(file: Path) -> None:
    names = [f"user{number}" for number in range(8)]
    command = [*MODULE, "users", "add", "--target", "main", "--password-stdin"]
    running = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, cwd=file.parent, env=environment, text=True)
        for name in names
    ]
    for process in running:
        process.communicate(f"{SECRET}\n", timeout=WAIT_SECONDS)
    assert [process.returncode for process in running] == [0] * len(names)
    assert set(known(file)) == {"bob", *names}


def test_an_edit_waits_for_who_holds_the_lock(file: Path) -> None:
    with Path(f"{file}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen([*MODULE, "users", "remove", "bob"], cwd=file.parent, env=environment)
        deadline = time.monotonic() + WAIT_SECONDS
        lock_of = f"/proc/{process.pid}/fd"
        while not any(name.endswith(".lock") for name in open_files(lock_of)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "bob" in known(file)
    assert process.wait(WAIT_SECONDS) == 0
    assert "bob" not in (known(file) or {})


def open_files(folder: str) -> list[str]:
    found = []
    for entry in os.listdir(folder):
        try:
            found.append(os.readlink(f"{folder}/{entry}"))
        except FileNotFoundError:
            continue
    return found


# From nothing to a login, as the document has it


def test_two_minutes_lead_to_a_login(
    users: Command, start_gateway: StartGateway, postgres: ThrowawayPostgres, tmp_path: Path
) -> None:
    file = tmp_path / "users.yaml"
    file.write_text(
        "targets:\n"
        "  shop:\n"
        f"    host: {HOST}:{postgres.port}\n"
        "    user: scrammed\n"
        "    password: env:SHOP_RO_PASSWORD\n"
        '    application_name: "{user} from {address}"\n'
    )
    file.chmod(0o600)
    (tmp_path / "pgauthproxy.yaml").write_text("authenticator:\n  users:\n    file: users.yaml\n")
    assert users("add", "alice", "--target", "shop", "--password-stdin").returncode == 0
    variables = dict(os.environ) | {"SHOP_RO_PASSWORD": "scram secret"}
    gateway = start_gateway(None, authenticator={"users": {"file": str(file)}}, environment=variables)
    psql = [str(postgres.binaries / "psql"), "-XAtc", "select current_user", "-h", HOST, "-p", str(gateway.port)]
    asked = [*psql, "-U", "alice", "postgres"]
    done = subprocess.run(asked, env=variables | {"PGPASSWORD": SECRET}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("scrammed\n", "")
