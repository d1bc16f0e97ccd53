"""The port for operators under siege, and scraped without pause: logins and queries go on, and so does it then."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import math
import resource
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from pgauthproxy.ops.http import MAX_CONNECTIONS, MAX_HEAD
from tests.conftest import WAIT_SECONDS, Gateway, StartGateway
from tests.system.conftest import assert_serves, wait_until
from tests.system.operators import address_of, ask
from tests.wire import RawClient, query

LOCAL = {"listen": "127.0.0.1:0"}
MEGABYTE = 1 << 20
FLOOD, SILENT_FLOOD = 250, 2000
"""Connections that say something, and that say nothing."""
LOGINS = 20
SCRAPES = 300
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
HOST = b" HTTP/1.1\r\nHost: localhost\r\n"
NOISE = {
    "nothing": b"",
    "half a request": b"GET /metrics" + HOST + b"X-Half: ",
    "a body that never comes": b"POST /kill" + HOST + b"Content-Length: 4000\r\n\r\n{",
    "headers without end": b"GET /metrics" + HOST + b"X: " + b"x" * 20 * MAX_HEAD,
    "garbage": bytes(range(256)) * 40 + b"\r\n\r\n" * 1000,
    "requests and no reading": (b"GET /metrics" + HOST + b"\r\n") * 400,
    "events and no reading": b"GET /events" + HOST + b"\r\n",
    "the page and no reading": (b"GET /" + HOST + b"\r\n") * 200,
}


@contextlib.contextmanager
def flooded(gateway: Gateway, noise: bytes) -> Iterator[None]:
    """So many connections that have said this, as far as it was taken, and read nothing."""
    host, _, port = address_of(gateway).rpartition(":")
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(FLOOD if noise else SILENT_FLOOD):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            connection.connect_ex((host, int(port)))
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(noise)
        yield


@pytest.fixture(autouse=True)
def _enough_descriptors() -> Iterator[None]:
    """For the connections of a flood."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def healthy(gateway: Gateway) -> bool:
    try:
        return ask(gateway, "/healthz").status == 200
    except (OSError, http.client.HTTPException):
        # It was one of those that made way.
        return False


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_a_flood_of_the_port_for_operators_reaches_no_login_and_leaves_nothing(
    start_gateway: StartGateway, mapped: Path, noise: bytes
) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    with RawClient(gateway.port) as client:
        client.log_in()
        assert healthy(gateway)
        assert_serves(gateway.port)
        sockets, memory = gateway.sockets, gateway.peak_bytes
        with flooded(gateway, noise):
            for _ in range(LOGINS):
                assert_serves(gateway.port)
                client.assert_served()
                assert gateway.sockets <= sockets + MAX_CONNECTIONS + 4
            wait_until(lambda: healthy(gateway), "it to be answered among them")
        assert gateway.peak_bytes - memory < 16 * MEGABYTE
        wait_until(lambda: gateway.sockets <= sockets, "the connections to be given back")
        assert healthy(gateway)
        client.assert_served()


def counters(families: Iterator[Metric]) -> dict[str, float]:
    """All values that must never go down, by name and labels."""
    found = {}
    for family in families:
        if family.type in ("counter", "histogram"):
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    found[f"{sample.name} {sorted(sample.labels.items())}"] = sample.value
    return found


def test_metrics_that_are_scraped_without_pause_hold_up_no_relay_and_never_go_down(
    start_gateway: StartGateway, mapped: Path
) -> None:
    gateway = start_gateway(mapped, admin=LOCAL)
    answered = itertools.count()
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            with RawClient(gateway.port) as client:
                client.log_in()
                client.send(query("select repeat('x', 100000) from generate_series(1, 5)"))
                rows = [body for kind, body in client.read_until(b"Z") if kind == b"D"]
                assert [len(row) for row in rows] == [2 + 4 + 100_000] * 5
                for _ in range(10):
                    client.assert_served()
            next(answered)

    connection = http.client.HTTPConnection(address_of(gateway), timeout=WAIT_SECONDS)
    forms = (("text/plain", parse_text), (OPENMETRICS, parse_openmetrics))
    with contextlib.closing(connection), ThreadPoolExecutor(2) as threads:
        working = [threads.submit(work) for _ in range(2)]
        try:
            latest: dict[str, dict[str, float]] = {form: {} for form, _ in forms}
            for _ in range(SCRAPES // len(forms)):
                for form, parse in forms:
                    connection.request("GET", "/metrics", headers={"Accept": form})
                    found = counters(parse(connection.getresponse().read().decode()))
                    assert found
                    assert not any(map(math.isnan, found.values()))
                    lower = {name: value for name, value in latest[form].items() if found.get(name, -1.0) < value}
                    assert not lower
                    latest[form] = found
        finally:
            is_over.set()
        for each in working:
            each.result()
    assert next(answered) > 0
    sessions = "pgauthproxy_received_bytes_total [('side', 'target')]"
    assert all(found[sessions] > 500_000 for found in latest.values())
