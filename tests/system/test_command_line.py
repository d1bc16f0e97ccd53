"""The command line: flags, environment, where settings are found, and what is said when something is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS
from tests.system.conftest import MODULE, Run, Serve, assert_one_clear_line, configure, environment, write_mapped
from tests.wire import RawClient, password, startup

COMMAND = [str(Path(sys.executable).parent / "pgauthproxy")]
AUTH_CLEARTEXT, AUTH_MD5 = b"\0\0\0\x03", b"\0\0\0\x05"


# Flags


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [MODULE, COMMAND], ids=["module", "command"])
def test_help_names_the_flags(command: list[str], flag: str) -> None:
    done = subprocess.run([*command, flag], capture_output=True, text=True, timeout=WAIT_SECONDS, check=True)
    for word in (
        "Usage: pgauthproxy",
        "--config",
        "--listen",
        "--clear-passwd",
        "--version",
        "check",
        "demo",
    ):
        assert word in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("command", [MODULE, COMMAND], ids=["module", "command"])
def test_version_is_that_of_the_package(command: list[str]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=WAIT_SECONDS, check=True)
    assert done.stdout.split()[-1] == metadata.version("pgauthproxy")


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["no-such-command"], ["--log-level", "loud"]])
def test_what_it_does_not_know_ends_with_status_2_and_the_usage(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Usage: pgauthproxy" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], AUTH_MD5),
        (["--clear-passwd"], AUTH_CLEARTEXT),
        (["--clear-passwd=true"], AUTH_CLEARTEXT),
        (["--clear-passwd=1"], AUTH_CLEARTEXT),
        (["--clear-passwd=false"], AUTH_MD5),
    ],
)
def test_clear_passwd_chooses_what_clients_are_asked(
    serve: Serve, folder: Path, flags: list[str], asked: bytes
) -> None:
    configure(folder)
    assert serve(*flags).asks_for() == asked


def test_clear_passwd_false_beats_the_file(serve: Serve, folder: Path) -> None:
    settings = {"cmd": "./authenticator", "cleartext_password": True}
    configure(folder, authenticator=settings)
    assert serve("--clear-passwd=false").asks_for() == AUTH_MD5


def test_a_flag_without_its_value_is_named(run: Run) -> None:
    done = run("--config")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--config" in done.stderr


def test_clear_passwd_takes_no_other_word(run: Run, folder: Path) -> None:
    configure(folder)
    done = run("--clear-passwd=perhaps")
    assert done.returncode == 2
    assert "perhaps" in done.stderr


# Where settings come from


def test_the_old_name_of_the_file_is_found_before_the_new_one(run: Run, folder: Path) -> None:
    configure(folder, "pgauthproxy.yaml", max_clients=11)
    configure(folder, "pgAuthProxy.yaml", max_clients=22)
    assert "max_clients = 22  (file pgAuthProxy.yaml)" in run("check").stdout
    (folder / "pgAuthProxy.yaml").unlink()
    assert "max_clients = 11  (file pgauthproxy.yaml)" in run("check").stdout


def test_a_file_that_is_named_is_the_only_one_read(run: Run, folder: Path) -> None:
    configure(folder, max_clients=11)
    configure(folder, "another.yaml", max_logins=33)
    said = run("check", "--config", "another.yaml").stdout
    assert "max_logins = 33  (file another.yaml)" in said
    assert "max_clients = 10000  (default)" in said


def test_flag_beats_environment_beats_file_beats_default(run: Run, folder: Path) -> None:
    configure(folder, listen="127.0.0.1:1", max_clients=11, max_logins=22)
    said = run("check", "--listen", "127.0.0.1:3", PGPROXY_LISTEN="127.0.0.1:2", PGPROXY_MAX_CLIENTS="44").stdout
    assert "listen = 127.0.0.1:3  (flag)" in said
    assert "max_clients = 44  (environment PGPROXY_MAX_CLIENTS)" in said
    assert "max_logins = 22  (file pgauthproxy.yaml)" in said
    assert "login_timeout = 60.0  (default)" in said


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"PGPROXY_LISTEN": "127.0.0.1:1,127.0.0.1:2"}, "listen = 127.0.0.1:1, 127.0.0.1:2  (environment"),
        ({"PGPROXY_CLEAR_PASSWD": "true"}, "authenticator.cleartext_password = true  (environment"),
        (
            {"PGPROXY_AUTHENTICATOR_CLEARTEXT_PASSWORD": "1"},
            "authenticator.cleartext_password = true  (environment",
        ),
        (
            {"PGPROXY_AUTHENTICATOR_CMD": "/bin/sh -c 'exit 1'"},
            "authenticator.cmd = /bin/sh, -c, exit 1  (environment",
        ),
        ({"PGPROXY_TARGET_CONNECT_TIMEOUT": "2.5"}, "target.connect_timeout = 2.5  (environment"),
        ({"PGPROXY_LOG_FORMAT": "json"}, "log.format = json  (environment"),
        ({"PGPROXY_MAX_CLIENTS": ""}, "max_clients = 10000  (default)"),
    ],
)
def test_a_variable_sets_each_key(run: Run, folder: Path, variables: dict[str, str], shown: str) -> None:
    configure(folder)
    done = run("check", **variables)
    assert shown in done.stdout
    assert done.returncode == 0


def test_the_environment_alone_is_enough(serve: Serve, folder: Path) -> None:
    serving = serve(PGPROXY_LISTEN="127.0.0.1:0", PGPROXY_AUTHENTICATOR_CMD="./authenticator")
    assert serving.asks_for() == AUTH_MD5


def test_a_relative_command_is_found_from_the_working_directory(serve: Serve, folder: Path) -> None:
    configure(folder)
    serving = serve()
    with RawClient(serving.port) as client:
        client.send(startup())
        client.read_message()
        client.send(password())
        assert client.read_error()["C"] == "28P01"
    serving.wait_for("authenticator refused with exit status 1")


# What is wrong is said in one line


def test_a_missing_file_is_named(run: Run) -> None:
    assert_one_clear_line(run("--config", "missing.yaml"), "missing.yaml", "No such file")


def test_a_folder_is_no_file(run: Run, tmp_path: Path) -> None:
    assert_one_clear_line(run("--config", str(tmp_path)), str(tmp_path), "directory")


def test_an_unreadable_file_is_named(run: Run, folder: Path) -> None:
    configure(folder).chmod(0)
    # Root may read everything, unless that right is taken away.
    before = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    assert_one_clear_line(run(before=before), "pgauthproxy.yaml", "Permission denied")


@pytest.mark.parametrize("content", ["a: [1", "\t- x: {", "a: 'b", "\0", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_yaml_mapping_is_named(run: Run, folder: Path, content: str) -> None:
    (folder / "pgauthproxy.yaml").write_text(content)
    assert_one_clear_line(run(), "pgauthproxy.yaml")


def test_a_file_that_is_not_utf8_is_named(run: Run, folder: Path) -> None:
    (folder / "pgauthproxy.yaml").write_bytes(b"listen: '\xff\xfe\xfd'\n")
    assert_one_clear_line(run(), "pgauthproxy.yaml")


def test_each_fault_of_a_file_has_a_line_of_its_own(run: Run, folder: Path) -> None:
    configure(folder, listn=":1", max_clients="many", target={"connect_timeout": -1})
    done = run()
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert any("listn" in line and "did you mean listen?" in line for line in lines)
    assert any("max_clients" in line for line in lines)
    assert any("target.connect_timeout" in line for line in lines)


def test_no_authenticator_is_no_start(run: Run, folder: Path) -> None:
    configure(folder, authenticator={})
    assert_one_clear_line(run(), "authenticator")


def test_without_any_file_the_missing_authenticator_is_named(run: Run) -> None:
    done = run()
    assert done.returncode == 2
    assert "authenticator" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("cmd", "says"),
    [
        ("./missing", "not found"),
        ("/no/such/authenticator", "not found"),
        ("no-such-command-on-path", "not found"),
        ("./plain", "not executable"),
        ("/tmp", "folder"),
    ],
)
def test_an_authenticator_that_cannot_run_is_named(run: Run, folder: Path, cmd: str, says: str) -> None:
    (folder / "plain").write_text("#!/bin/sh\n")
    configure(folder, authenticator={"cmd": [cmd]})
    for done in (run(), run("check")):
        assert done.returncode == 2
        assert done.stderr.splitlines() == [f"pgauthproxy: authenticator.cmd: {cmd}: {says}"] or (
            cmd in done.stderr and says in done.stderr and len(done.stderr.splitlines()) == 1
        )


def test_an_address_in_use_is_named(run: Run, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        configure(folder)
        assert_one_clear_line(run("--listen", address), address, "in use")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "no port:", "127.0.0.1:none", "[::1:5432", "unix:relative:5432", "unix:/tmp", "1:2:3"],
)
def test_an_address_that_is_none_is_named(run: Run, folder: Path, address: str) -> None:
    configure(folder)
    assert_one_clear_line(run("--listen", address), "listen")


def test_a_socket_folder_that_does_not_exist_is_named(run: Run, folder: Path) -> None:
    configure(folder)
    assert_one_clear_line(run("--listen", "unix:/no/such/folder:5432"), "/no/such/folder", "No such file")


def test_one_bad_address_of_several_opens_none(run: Run, folder: Path) -> None:
    configure(folder)
    assert_one_clear_line(run("--listen", f"unix:{folder}:5432,unix:/no/such/folder:1"), "/no/such/folder")


# check


def test_check_prints_every_setting_and_ends_with_status_0(run: Run, folder: Path) -> None:
    configure(folder)
    done = run("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "authenticator.cmd = ./authenticator  (file pgauthproxy.yaml)" in done.stdout
    assert "buffer_size = 65536  (default)" in done.stdout
    assert done.stdout.splitlines()[-1] == "ok"


def test_check_says_what_is_wrong_and_ends_with_status_2(run: Run, folder: Path) -> None:
    configure(folder, lisen=":1")
    assert_one_clear_line(run("check"), "lisen", "did you mean listen?")


def test_check_takes_flags_before_and_behind_it(run: Run, folder: Path) -> None:
    configure(folder, "mine.yaml", max_clients=5)
    for arguments in (["--config", "mine.yaml", "check"], ["check", "--config", "mine.yaml"]):
        assert "max_clients = 5  (file mine.yaml)" in run(*arguments).stdout


def test_check_warns_of_a_variable_that_is_nearly_one(run: Run, folder: Path) -> None:
    configure(folder)
    done = run("check", PGPROXY_MAX_CLIENT="5")
    assert done.returncode == 0
    assert "PGPROXY_MAX_CLIENT is not used, did you mean PGPROXY_MAX_CLIENTS?" in done.stdout


# listen


def accepts(family: socket.AddressFamily, host: str, port: int) -> bool:
    with socket.socket(family) as client:
        client.settimeout(WAIT_SECONDS)
        try:
            client.connect((host, port))
        except OSError:
            return False
        return True


def test_a_port_alone_means_all_interfaces(serve: Serve, folder: Path) -> None:
    configure(folder)
    serving = serve("--listen", ":0")
    assert accepts(socket.AF_INET, "127.0.0.1", serving.port)
    if socket.has_dualstack_ipv6():
        assert accepts(socket.AF_INET6, "::1", serving.port)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 on this machine")
def test_an_ipv6_address_means_itself(serve: Serve, folder: Path) -> None:
    configure(folder)
    serving = serve("--listen", "[::1]:0")
    assert serving.addresses()[0].startswith("[::1]:")
    assert accepts(socket.AF_INET6, "::1", serving.port)
    assert not accepts(socket.AF_INET, "127.0.0.1", serving.port)


def test_psql_finds_a_unix_socket_by_its_folder(serve: Serve, folder: Path, postgres: ThrowawayPostgres) -> None:
    write_mapped(folder / "authenticator", postgres.port)
    configure(folder, listen=[f"unix:{folder}:6543", "127.0.0.1:0"])
    serving = serve()
    serving.addresses(2)
    done = subprocess.run(
        [postgres.binaries / "psql", "-XAt", "-h", folder, "-p", "6543", "-c", "select current_user"],
        capture_output=True,
        text=True,
        env=environment | {"PGUSER": "alice", "PGPASSWORD": "x", "PGDATABASE": "postgres"},
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "postgres\n"), done.stderr
    serving.wait_for(r"login.*client=\S*\[local\]")
    assert (folder / ".s.PGSQL.6543").is_socket()
    serving.process.send_signal(signal.SIGTERM)
    serving.process.wait(WAIT_SECONDS)
    assert not (folder / ".s.PGSQL.6543").exists()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(serve: Serve, run: Run, folder: Path) -> None:
    configure(folder)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as stale:
        stale.bind(str(folder / ".s.PGSQL.5432"))
    serve("--listen", f"unix:{folder}:5432").addresses()
    assert_one_clear_line(run("--listen", f"unix:{folder}:5432"), ".s.PGSQL.5432", "in use")
    assert (folder / ".s.PGSQL.5432").is_socket()


def test_every_address_of_a_list_is_listened_on(serve: Serve, folder: Path) -> None:
    configure(folder, listen=["127.0.0.1:0", "127.0.0.1:0", "localhost:0"])
    for address in serve().addresses(3):
        assert accepts(socket.AF_INET, "127.0.0.1", int(address.rpartition(":")[2]))
