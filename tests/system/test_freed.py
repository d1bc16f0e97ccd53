"""A session that is over leaves nothing behind: no cycle for the collector, no object, no descriptor."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pgauthproxy.throwaway import ThrowawayPostgres, free_port
from tests.conftest import SETTINGS, Gateway
from tests.system.conftest import wait_until
from tests.wire import RESET_ON_CLOSE, SSL_REQUEST, RawClient, error_fields, message, password, query, startup

FEW, MANY = 50, 300
MAX_PARALLEL = 4
STRAY = 20
"""Objects that may differ between two runs for the interpreter's own reasons; far fewer than the sessions."""

# Runs the gateway with the collector off, and at its end says what there would have been to collect.
WITHOUT_COLLECTOR = """
import gc, sys
from pgauthproxy import cli
gc.collect()
gc.disable()
try:
    cli.main(sys.argv[2:])
finally:
    alive = len(gc.get_objects())
    with open(sys.argv[1], "w") as counted:
        counted.write(f"{gc.collect()} {alive}")
"""


@dataclass(frozen=True)
class Left:
    """What is left of a gateway's sessions: objects in cycles that nobody reaches, and objects in all."""

    unreachable: int
    alive: int


def normal(port: int) -> None:
    with RawClient(port) as client:
        client.log_in()
        client.send(query("select 1") + message(b"X"))
        client.read_to_end()


def refused(port: int) -> None:
    with RawClient(port) as client:
        client.send(startup(user="mallory") + password("wrong"))
        client.read_to_end()


def denied(port: int) -> None:
    with RawClient(port) as client:
        client.send(startup(user="mallory") + password())
        client.read_to_end()


def malformed(port: int) -> None:
    with RawClient(port) as client:
        client.send(SSL_REQUEST + b"not what comes next")
        client.read_to_end()


def no_target(port: int) -> None:
    with RawClient(port) as client:
        client.send(startup(user="nowhere") + password())
        _, body = client.read_until(b"E")[-1]
        assert error_fields(body)["C"] == "08001"


def refusing_target(port: int) -> None:
    with RawClient(port) as client:
        client.send(startup(user="unwelcome") + password())
        _, body = client.read_until(b"E")[-1]
        assert error_fields(body)["C"] == "08004"


def nonsense(port: int) -> None:
    with RawClient(port) as client:
        client.send(startup(user="nonsense") + password())
        _, body = client.read_until(b"E")[-1]
        assert error_fields(body)["C"] == "58000"


def scram(port: int) -> None:
    with RawClient(port) as client:
        client.log_in(user="scrammed")


def silent(port: int) -> None:
    with RawClient(port):
        return


def aborted_at_startup(port: int) -> None:
    with RawClient(port) as client:
        client.send(startup()[:20])
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def aborted_while_the_authenticator_runs(port: int) -> None:
    with RawClient(port) as client:
        client.send(startup() + password())
        client.read_message()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def aborted_in_an_answer(port: int) -> None:
    with RawClient(port) as client:
        client.log_in()
        client.send(query("select repeat('x', 1000) from generate_series(1, 1000)"))
        client.read(1000)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def ended_by_the_target(port: int) -> None:
    with RawClient(port) as client:
        client.log_in()
        client.send(query("select pg_terminate_backend(pg_backend_pid())"))
        client.read_to_end()


def canceled(port: int) -> None:
    with RawClient(port) as client:
        key = next(body for kind, body in client.log_in() if kind == b"K")
        for sent in (key, bytes(8)):
            with RawClient(port) as canceller:
                canceller.send(struct.pack("!ii", 16, 80877102) + sent)
                assert canceller.read_to_end() == b""


def ended_by_a_rule(port: int) -> None:
    with RawClient(port) as client:
        client.log_in(user="idler")
        assert client.read_fatal()[0] == "57P05"


def gone_before_a_rule_ends_it(port: int) -> None:
    with RawClient(port) as client:
        client.log_in(user="lazy")
        client.send(query("select 1"))
        client.read_until(b"Z")


KINDS: dict[str, tuple[Callable[[int], None], ...]] = {
    "that log in": (normal, scram),
    "that are refused": (refused, denied, malformed, nonsense),
    "whose target fails": (no_target, refusing_target, ended_by_the_target),
    "that are aborted": (
        silent,
        aborted_at_startup,
        aborted_while_the_authenticator_runs,
        aborted_in_an_answer,
    ),
    "that are canceled": (canceled,),
    "that rules concern": (ended_by_a_rule, gone_before_a_rule_ends_it),
}


@pytest.fixture
def left_by(tmp_path: Path, postgres: ThrowawayPostgres) -> Callable[..., Left]:
    """Runs sessions of some kinds through a gateway without a collector, and tells what is left of them."""
    script = tmp_path / "authenticator"
    script.write_text(
        "#!/bin/sh\n"
        f"port={postgres.port} role=postgres\n"
        "while read -r line; do case $line in\n"
        "user=mallory) exit 1 ;;\n"
        f"user=nowhere) port={free_port()} ;;\n"
        "user=unwelcome) role=clear ;;\n"
        "user=scrammed) role=scrammed ;;\n"
        "user=nonsense) exit 0 ;;\n"
        "user=idler) echo _META_IDLE_TIMEOUT=0.01 ;;\n"
        "user=lazy) echo _META_IDLE_TIMEOUT=600 ;;\n"
        "esac; done\n"
        'echo "_META_TARGET_HOST=127.0.0.1:$port"; echo "user=$role"; echo database=postgres\n'
        'echo "_META_TARGET_CRED=scram secret"\n'
    )
    script.chmod(0o755)

    def run(kinds: tuple[Callable[[int], None], ...], sessions: int, **settings: object) -> Left:
        config, log, counted = (tmp_path / f"{sessions}.{name}" for name in ("yaml", "log", "counted"))
        authenticator = {"cmd": str(script), "max_parallel": MAX_PARALLEL}
        content = {**SETTINGS, "authenticator": authenticator, **settings}
        config.write_text(yaml.safe_dump(content))
        flags = ["--config", str(config), "--log-format", "json"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", WITHOUT_COLLECTOR, str(counted), *flags],
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        gateway = Gateway(process, log)
        try:
            port = int(gateway.wait_for("listening")["address"].rpartition(":")[2])
            at_start, descriptors_at_start = gateway.sockets, gateway.descriptors
            for number in range(sessions):
                kinds[number % len(kinds)](port)
            wait_until(lambda: gateway.sockets == at_start, f"no more than {at_start} sockets")
            # The threads that run authenticators keep a pipe each, and what they have in common.
            assert gateway.descriptors <= descriptors_at_start + 2 * MAX_PARALLEL + 2
            assert gateway.stop() == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
        assert "internal error" not in log.read_text()
        return Left(*map(int, counted.read_text().split()))

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_sessions_leave_nothing_for_the_collector(left_by: Callable[..., Left], kind: str) -> None:
    few, many = left_by(KINDS[kind], FEW), left_by(KINDS[kind], MANY)
    assert many.unreachable <= few.unreachable + STRAY
    assert many.alive <= few.alive + STRAY


def test_audited_sessions_leave_nothing_for_the_collector(left_by: Callable[..., Left]) -> None:
    kinds = (*KINDS["that log in"], *KINDS["that are refused"])
    audited = {"audit": {"file": "/dev/null", "required": True, "statements": True}}
    few, many = left_by(kinds, FEW, **audited), left_by(kinds, MANY, **audited)
    assert many.unreachable <= few.unreachable + STRAY
    assert many.alive <= few.alive + STRAY
