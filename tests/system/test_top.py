"""`pgauthproxy top`: a running gateway in a terminal, or as plain lines where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pgauthproxy.throwaway import free_port
from tests.conftest import Gateway, StartGateway
from tests.system.conftest import Run, Terminal, assert_one_clear_line, configure, wait_until
from tests.system.operators import address_of, ask
from tests.wire import RawClient

TOKEN = "a-token-of-the-operators"
ENTERS, LEAVES = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.fixture
def watched(start_gateway: StartGateway, mapped: Path) -> Gateway:
    """A gateway that operators can look at."""
    return start_gateway(mapped, admin={"listen": "127.0.0.1:0"})


def looking_at(gateway: Gateway, tmp_path: Path, **admin: Any) -> str:
    """A configuration whose admin.listen is where that gateway serves operators."""
    return str(configure(tmp_path, "top.yaml", admin={"listen": address_of(gateway), **admin}))


def test_without_a_terminal_it_looks_once_and_prints_plain_lines(watched: Gateway, run: Run, tmp_path: Path) -> None:
    with RawClient(watched.port) as client:
        client.log_in(user="carol")
        wait_until(lambda: ask(watched, "/state").json["open"] == 1, "the session to be seen")
        done = run("top", "--config", looking_at(watched, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "serving" in done.stdout.splitlines()[0]
    (line,) = [line for line in done.stdout.splitlines() if "carol" in line]
    assert "postgres @ postgres" in line


@pytest.mark.parametrize("leaving", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_at_a_terminal_it_goes_on_until_somebody_leaves(watched: Gateway, tmp_path: Path, leaving: bytes) -> None:
    arguments = ("top", "--interval", "0.2", "--config", looking_at(watched, tmp_path))
    with Terminal(*arguments, prints_there=True) as terminal:
        terminal.wait_for(b"serving", count=2)
        assert ENTERS in terminal.shown
        with RawClient(watched.port) as client:
            client.log_in(user="carol")
            terminal.wait_for(b"carol")
        terminal.type(leaving)
        assert terminal.finish()[0] == 0
        assert terminal.shown.endswith(LEAVES)
        assert b"Traceback" not in terminal.shown


def test_a_gateway_that_is_gone_meanwhile_is_told_of(watched: Gateway, tmp_path: Path) -> None:
    arguments = ("top", "--interval", "0.2", "--config", looking_at(watched, tmp_path))
    with Terminal(*arguments, prints_there=True) as terminal:
        terminal.wait_for(b"serving")
        assert watched.stop() == 0
        terminal.wait_for(b"trying again")
        terminal.type(b"q")
        terminal.wait_for(LEAVES)


def test_once_is_once_even_at_a_terminal(watched: Gateway, tmp_path: Path) -> None:
    with Terminal("top", "--once", "--config", looking_at(watched, tmp_path), prints_there=True) as terminal:
        assert terminal.finish()[0] == 0
        assert b"serving" in terminal.shown
        assert ENTERS not in terminal.shown


def test_it_shows_the_token_and_says_if_that_is_another(
    start_gateway: StartGateway, mapped: Path, run: Run, tmp_path: Path
) -> None:
    gateway = start_gateway(mapped, admin={"listen": "127.0.0.1:0", "token": TOKEN})
    assert run("top", "--config", looking_at(gateway, tmp_path, token=TOKEN)).returncode == 0
    done = run("top", "--config", looking_at(gateway, tmp_path, token="another-token-than-that"))
    assert_one_clear_line(done, "the gateway wants another admin.token")
    assert "another-token" not in done.stderr


def test_it_finds_a_unix_socket(start_gateway: StartGateway, mapped: Path, run: Run, tmp_path: Path) -> None:
    gateway = start_gateway(mapped, admin={"listen": f"unix:{tmp_path}/admin.sock"})
    done = run("top", "--config", looking_at(gateway, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "serving" in done.stdout


def test_what_cannot_be_looked_at_is_one_clear_line(run: Run, folder: Path) -> None:
    assert_one_clear_line(run("top", "--config", str(configure(folder))), "admin.listen: is not set")
    address = f"127.0.0.1:{free_port()}"
    config = configure(folder, admin={"listen": address})
    assert_one_clear_line(run("top", "--config", str(config)), address, "Connection refused")
