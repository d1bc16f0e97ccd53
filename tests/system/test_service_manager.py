"""Under systemd, and as the first process of a container: what is told, what is taken, and what is collected."""

from __future__ import annotations

import configparser
import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS, Gateway, StartGateway, WriteAuthenticator
from tests.system.conftest import Run, assert_serves, configure, environment, wait_until
from tests.wire import RawClient, message, startup

UNIT = Path(__file__).parents[2] / "deploy/pgauthproxy.service"
ACTIVATE = """
import os, sys
for number, descriptor in enumerate(map(int, sys.argv[1].split(",")), 3):
    os.dup2(descriptor, number)
os.environ["LISTEN_FDS"] = str(len(sys.argv[1].split(",")))
os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[2]))
os.execv(sys.argv[3], sys.argv[3:])
"""


class Manager:
    """The socket that a service manager listens on."""

    def __init__(self, path: str) -> None:
        self.environment = environment | {"NOTIFY_SOCKET": path}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + path[1:] if path.startswith("@") else path)
        self._socket.settimeout(WAIT_SECONDS)

    def close(self) -> None:
        self._socket.close()

    def told(self) -> dict[str, str]:
        """The next that it is told."""
        lines = self._socket.recv(4096).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def fill(self) -> None:
        """From here on who tells it something waits."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as teller, contextlib.suppress(BlockingIOError):
            teller.setblocking(False)
            while True:
                teller.sendto(b"", self._socket.getsockname())


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "notify") if request.param == "file" else f"@pgauthproxy-test-{os.getpid()}"
    with contextlib.closing(Manager(path)) as found:
        yield found


# What it is told


@pytest.mark.parametrize("workers", [1, 2])
def test_the_manager_hears_of_start_reload_and_end(
    manager: Manager, start_gateway: StartGateway, mapped: Path, workers: int
) -> None:
    gateway = start_gateway(mapped, environment=manager.environment, workers=workers, drain_timeout=600)
    assert manager.told() == {"READY": "1"}
    gateway.process.send_signal(signal.SIGHUP)
    told = manager.told()
    assert told["RELOADING"] == "1"
    assert int(told["MONOTONIC_USEC"]) > 0
    assert manager.told() == {"READY": "1"}
    gateway.config.write_text("max_clients: 0")
    gateway.process.send_signal(signal.SIGHUP)
    assert "RELOADING" in manager.told()
    assert manager.told() == {"READY": "1"}
    with RawClient(gateway.port) as client:
        client.log_in()
        gateway.process.send_signal(signal.SIGTERM)
        assert manager.told() == {"STOPPING": "1"}
        client.assert_served()
        client.send(message(b"X"))
    assert gateway.process.wait(WAIT_SECONDS) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_the_watchdog_hears_of_the_gateway_while_it_serves_and_drains(
    manager: Manager, start_gateway: StartGateway, mapped: Path, workers: int
) -> None:
    watched = manager.environment | {"WATCHDOG_USEC": "100000"}
    gateway = start_gateway(mapped, environment=watched, workers=workers, drain_timeout=600)
    assert manager.told() == {"READY": "1"}
    assert [manager.told() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
    with RawClient(gateway.port) as client:
        client.log_in()
        gateway.process.send_signal(signal.SIGTERM)
        assert any(manager.told() == {"STOPPING": "1"} for _ in range(100))
        assert manager.told() == {"WATCHDOG": "1"}


def test_a_watchdog_that_is_meant_for_another_process_hears_nothing(
    manager: Manager, start_gateway: StartGateway, mapped: Path
) -> None:
    watched = manager.environment | {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    gateway = start_gateway(mapped, environment=watched)
    assert_serves(gateway.port)
    assert manager.told() == {"READY": "1"}
    assert gateway.stop() == 0
    assert manager.told() == {"STOPPING": "1"}


def test_a_manager_that_is_gone_or_does_not_read_is_no_reason_not_to_serve(
    manager: Manager, start_gateway: StartGateway, mapped: Path
) -> None:
    watched = manager.environment | {"WATCHDOG_USEC": "1000"}
    gateway = start_gateway(mapped, environment=watched)
    for _ in range(5):
        assert_serves(gateway.port)
    gateway.process.send_signal(signal.SIGHUP)
    gateway.wait_for("configuration loaded anew")
    manager.close()
    assert_serves(gateway.port)


def test_authenticators_cannot_speak_in_the_gateways_name(
    manager: Manager, start_gateway: StartGateway, authenticator: WriteAuthenticator, tmp_path: Path
) -> None:
    script = authenticator(f"env >'{tmp_path}/environment'; exit 1")
    watched = manager.environment | {"WATCHDOG_USEC": "60000000", "LISTEN_FDS": "0", "KEPT": "yes"}
    gateway = start_gateway(script, environment=watched)
    with RawClient(gateway.port) as client:
        client.send(startup())
        client.read_message()
        client.send(message(b"p", b"md5" + b"0" * 32 + b"\0"))
        client.read_to_end()
    seen = (tmp_path / "environment").read_text()
    assert "KEPT=yes" in seen
    assert not re.search("^(NOTIFY_SOCKET|WATCHDOG_USEC|LISTEN_FDS)=", seen, re.MULTILINE)


# What it gives


@contextlib.contextmanager
def listening(family: int, address: object) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_STREAM) as opened:
        opened.bind(address)  # type: ignore[arg-type]
        opened.listen()
        yield opened


def activated(*given: socket.socket, pid: int = 0) -> dict[str, Any]:
    """How a program is started with these sockets, as systemd does; `pid` is added to the number that it is told."""
    descriptors = [each.fileno() for each in given]
    words = [sys.executable, "-c", ACTIVATE, ",".join(map(str, descriptors)), str(pid)]
    return {"before": words, "descriptors": descriptors}


@pytest.mark.parametrize("workers", [1, 2])
def test_sockets_that_were_opened_before_are_listened_on(
    start_gateway: StartGateway, mapped: Path, tmp_path: Path, workers: int
) -> None:
    path = tmp_path / ".s.PGSQL.6000"
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as tcp, listening(socket.AF_UNIX, str(path)) as unix:
        early = socket.create_connection(tcp.getsockname())
        # Who asks before anybody runs waits, and is served.
        early.sendall(startup())
        gateway = start_gateway(mapped, **activated(tcp, unix), workers=workers, listen="127.0.0.1:1")
        port = tcp.getsockname()[1]
        assert {line["address"] for line in gateway.log_lines("listening")} == {f"127.0.0.1:{port}", f"unix:{path}"}
        early.settimeout(WAIT_SECONDS)
        assert early.recv(1) == b"R"
        early.close()
        for _ in range(10):
            assert_serves(port)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT_SECONDS)
            client.connect(str(path))
            client.sendall(startup())
            assert client.recv(1) == b"R"
        assert gateway.stop() == 0
        # It is the manager's, which starts the next one with it.
        assert path.is_socket()


def test_sockets_that_are_meant_for_another_process_are_not_taken(start_gateway: StartGateway, mapped: Path) -> None:
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as tcp:
        gateway = start_gateway(mapped, **activated(tcp, pid=1))
        assert gateway.port != tcp.getsockname()[1]
        assert_serves(gateway.port)


def test_what_is_no_listening_socket_ends_the_start(run: Run, folder: Path) -> None:
    configure(folder)
    with socket.socket() as silent:
        done = run(**activated(silent))
    assert done.returncode == 2
    assert "descriptor 3 that was given is no socket that listens" in done.stderr


# The unit


def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, strict=True)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read(UNIT)
    return found


def test_the_unit_says_what_the_gateway_needs_and_gives_it_no_more() -> None:
    service = dict(unit()["Service"])
    assert service["Type"] == "notify"
    assert int(service["LimitNOFILE"]) >= 2 * 10_000 + 512
    assert int(service["TimeoutStopSec"]) > 30
    for restriction in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictSUIDSGID"):
        assert service[restriction] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    assert service["RuntimeDirectory"] == "pgauthproxy"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "pgauthproxy"
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={command}", UNIT.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, said) == (0, []), done.stderr


# The first process


@pytest.fixture
def first_process(
    start_gateway: StartGateway, authenticator: WriteAuthenticator, postgres: ThrowawayPostgres, tmp_path: Path
) -> Iterator[tuple[Gateway, int]]:
    """A gateway that is number 1 where it runs, and its number here. Its authenticator leaves a process behind."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a namespace of processes needs root and unshare")
    script = authenticator(
        f"setsid sh -c 'until [ -e {tmp_path}/go ]; do sleep 0.05; done' </dev/null >/dev/null 2>&1 &\n"
        f"echo _META_TARGET_HOST=127.0.0.1:{postgres.port}; echo user=postgres"
    )
    before = ["unshare", "--pid", "--fork", "--kill-child"]
    gateway = start_gateway(script, before=before, admin={"listen": "127.0.0.1:0"})
    (first,) = gateway.children
    yield gateway, first
    (tmp_path / "go").touch()
    if gateway.process.poll() is None:
        os.kill(first, signal.SIGTERM)
        gateway.process.wait(WAIT_SECONDS)


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_the_first_process_of_a_container_collects_what_others_leave(
    first_process: tuple[Gateway, int], tmp_path: Path
) -> None:
    gateway, first = first_process
    workers = children(first)
    assert len(workers) == 1
    assert_serves(gateway.port)
    wait_until(lambda: len(children(first)) == 2, "the orphan to be handed to the first process")
    (tmp_path / "go").touch()
    wait_until(lambda: children(first) == workers, "the orphan to be collected")
    assert_serves(gateway.port)


def test_the_first_process_of_a_container_is_not_replaced(first_process: tuple[Gateway, int]) -> None:
    gateway, first = first_process
    os.kill(first, signal.SIGUSR2)
    gateway.wait_for("not upgraded: the first process of a container cannot be another")
    assert_serves(gateway.port)


def test_operators_of_a_container_are_served(first_process: tuple[Gateway, int]) -> None:
    gateway, first = first_process
    address = gateway.wait_for("serving operators")["address"]

    def status(path: str) -> int:
        connection = http.client.HTTPConnection(address, timeout=WAIT_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    assert (status("/metrics"), status("/readyz")) == (200, 200)
    with RawClient(gateway.port) as client:
        client.log_in()
        os.kill(first, signal.SIGTERM)
        wait_until(lambda: status("/readyz") == 503, "the gateway to be no longer ready")
        assert status("/healthz") == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_process_of_a_container_ends_when_it_is_told_to(
    first_process: tuple[Gateway, int], number: signal.Signals
) -> None:
    gateway, first = first_process
    with RawClient(gateway.port) as client:
        client.log_in()
        os.kill(first, number)
        assert client.read_fatal()[0] == "57P01"
    assert gateway.process.wait(WAIT_SECONDS) == 0
