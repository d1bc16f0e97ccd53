"""The authenticator that is an HTTP service: what it is sent, what its answers mean, and what a service can do wrong.

The service is a real one, in this process; what it answers depends on the user who logs in.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gzip
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psycopg
import pytest
import trustme
from aiohttp import web

from pgauthproxy.throwaway import ThrowawayPostgres
from tests.conftest import WAIT_SECONDS, Gateway, StartGateway
from tests.system.conftest import (
    Run,
    assert_one_clear_line,
    assert_serves,
    configure,
    environment,
    new_user,
    running_gateway,
    wait_until,
)
from tests.wire import RESET_ON_CLOSE, RawClient, ScriptedTarget, message, password, raw_startup, startup

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/http-authenticator.schema.json").read_text())
FAILED = ("58000", "authentication service failed")
MAX_OUTPUT = 65_536
GIGABYTE = 1 << 30

Handler = Callable[["Service", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def conforms(value: object, name: str) -> None:
    """Holds a request or an answer to the schema that is documented."""
    jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{name}"}).validate(value)


class Service:
    """An authenticator that people could have written. `handlers` answer for users by the first part of their names."""

    def __init__(self, target_port: int) -> None:
        self.target = f"127.0.0.1:{target_port}"
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.peers: list[tuple[str, int]] = []
        self.handlers: dict[str, Handler] = {}
        self.running = 0
        self.most = 0
        self.cancelled: list[str] = []
        self.go = asyncio.Event()
        self.port = 0
        self.loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/login?from=test"

    def answer(self, **changes: Any) -> dict[str, Any]:
        """A mapping that lets in."""
        return {"host": self.target, "user": "postgres", "database": "postgres"} | changes

    def answers_json(self, what: str, content: Any, status: int = 200) -> None:
        async def handler(_service: Service, _request: web.Request, _body: dict[str, Any]) -> web.Response:
            return web.json_response(content, status=status)

        self.handlers[what] = handler

    def answers_bytes(self, what: str, content: bytes, status: int = 200, **headers: str) -> None:
        async def handler(_service: Service, _request: web.Request, _body: dict[str, Any]) -> web.Response:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return web.Response(body=content, status=status, headers=named)

        self.handlers[what] = handler

    def __enter__(self) -> Service:
        self._thread.start()
        assert self._ready.wait(WAIT_SECONDS)
        return self

    def __exit__(self, *_raised: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()

    def set_going(self) -> None:
        self.loop.call_soon_threadsafe(self.go.set)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=1 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert (request.method, request.path_qs) == ("POST", "/login?from=test")
        body = json.loads(await request.read())
        conforms(body, "request")
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        assert request.transport is not None
        self.peers.append(request.transport.get_extra_info("peername"))
        handler = self.handlers.get(body.get("user", "").partition("_")[0])
        if handler is not None:
            return await handler(self, request, body)
        answer = self.answer(parameters={"application_name": "by http"})
        conforms(answer, "mapping")
        return web.json_response(answer)


@pytest.fixture
def service(postgres: ThrowawayPostgres) -> Iterator[Service]:
    with Service(postgres.port) as found:
        yield found


@pytest.fixture
def start(start_gateway: StartGateway) -> Callable[..., Gateway]:
    """Starts a gateway that asks a service."""

    def start(
        url: str, *, http: dict[str, Any] | None = None, variables: dict[str, str] | None = None, **settings: Any
    ) -> Gateway:
        asked = {"http": {"url": url, **(http or {})}, **settings}
        return start_gateway([], authenticator=asked, environment={**environment, **(variables or {})})

    return start


@pytest.fixture
def gateway(start: Callable[..., Gateway], service: Service) -> Gateway:
    return start(service.url)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, postgres: ThrowawayPostgres) -> Iterator[tuple[Gateway, Service]]:
    """A gateway and its service, shared by the tests of what services answer."""
    folder = tmp_path_factory.mktemp("shared")
    with Service(postgres.port) as service:
        settings = {"cmd": [], "http": {"url": service.url}}
        with running_gateway(folder, folder / "none", authenticator=settings) as gateway:
            yield gateway, service


def knock(port: int, user: str, answer: str = "md5" + "0" * 32) -> RawClient:
    """A client that has said everything it has to say to log in."""
    client = RawClient(port)
    client.send(startup(user=user))
    assert client.read_message()[0] == b"R"
    client.send(password(answer))
    return client


def refused(gateway: Gateway, user: str) -> tuple[tuple[str, str], str]:
    """What such a client is told, and what the log says."""
    with knock(gateway.port, user) as client:
        told = client.read_fatal()
    return told, gateway.wait_for("refused", user=user)["reason"]


# What it is sent


def test_a_client_is_let_in_as_the_service_says(gateway: Gateway, service: Service) -> None:
    where = {"host": "127.0.0.1", "port": gateway.port, "user": "alice", "password": "x", "dbname": "shop"}
    with psycopg.connect(**where) as connection:
        (found,) = connection.execute("select current_user || current_setting('application_name')").fetchall()
    assert found == ("postgresby http",)
    (asked,) = service.asked
    assert (asked["user"], asked["database"], asked["method"]) == ("alice", "shop", "md5")
    assert service.headers[0]["Content-Type"] == "application/json"


def test_in_md5_mode_it_is_sent_the_answer_and_the_salt(gateway: Gateway, service: Service) -> None:
    user = new_user()
    with RawClient(gateway.port) as client:
        client.send(startup(user=user, database="a=b", options="-c x=y"))
        salt = client.read_message()[1][4:]
        client.send(password("md5" + "0123456789abcdef" * 2))
        client.read_until(b"Z")
        port = client.socket.getsockname()[1]
    assert service.asked == [
        {
            "version": 1,
            "session": gateway.wait_for("login", user=user)["session"],
            "address": f"127.0.0.1:{port}",
            "method": "md5",
            "user": user,
            "database": "a=b",
            "parameters": {"user": user, "database": "a=b", "options": "-c x=y"},
            "answer": "md5" + "0123456789abcdef" * 2,
            "salt": salt.hex(),
        }
    ]


def test_bytes_that_are_no_text_are_sent_in_base64(start: Callable[..., Gateway], service: Service) -> None:
    gateway = start(service.url, method="cleartext")
    pairs = [(b"user", b"\xff"), (b"database", b"\xfe"), (b"gr\xfc\xdfe", b"x"), (b"options", "grüße".encode())]
    with RawClient(gateway.port) as client:
        client.send(raw_startup(b"".join(name + b"\0" + value + b"\0" for name, value in pairs) + b"\0"))
        assert client.read_message()[0] == b"R"
        client.send(message(b"p", b"\xfd\0"))
        client.read_until(b"Z")
    (asked,) = service.asked
    assert asked["parameters"] == {"options": "grüße"}
    assert asked["parameters_base64"] == [
        {"name": "dXNlcg==", "value": "/w=="},
        {"name": "ZGF0YWJhc2U=", "value": "/g=="},
        {"name": "Z3L832U=", "value": "eA=="},
    ]
    assert (asked["user_base64"], asked["database_base64"], asked["password_base64"]) == ("/w==", "/g==", "/Q==")
    assert not {"user", "database", "password", "answer", "salt"} & asked.keys()


def test_in_cleartext_mode_it_is_sent_the_password(start: Callable[..., Gateway], service: Service) -> None:
    gateway = start(service.url, method="cleartext")
    with knock(gateway.port, "alice", "won der=länd") as client:
        client.read_until(b"Z")
    (asked,) = service.asked
    assert asked["password"] == "won der=länd"
    assert not {"answer", "salt"} & asked.keys()


def test_in_scram_mode_it_answers_with_a_verifier(
    start: Callable[..., Gateway], service: Service, postgres: ThrowawayPostgres
) -> None:
    verifier = postgres.sql("select rolpassword from pg_authid where rolname = 'scrammed'")
    answer = service.answer(user="scrammed", verifier=verifier, credential_from_client=True)
    conforms(answer, "mapping")
    service.answers_json("alice", answer)
    gateway = start(service.url, method="scram-sha-256")
    where = {"host": "127.0.0.1", "port": gateway.port, "user": "alice", "dbname": "shop"}
    with psycopg.connect(**where, password="scram secret") as connection:
        assert connection.execute("select current_user").fetchall() == [("scrammed",)]
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(**where, password="wrong")
    assert not {"password", "answer", "salt"} & service.asked[0].keys()


def test_headers_may_hold_secrets_by_reference(start: Callable[..., Gateway], service: Service, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from a file\n")
    headers = {"Authorization": "env:TOKEN", "X-Token": f"file:{tmp_path}/token", "X-Plain": "pläin"}
    gateway = start(service.url, http={"headers": headers}, variables={"TOKEN": "Bearer from the environment"})
    assert_serves(gateway.port)
    (sent,) = service.headers
    assert sent["Authorization"] == "Bearer from the environment"
    assert (sent["X-Token"], sent["X-Plain"]) == ("from a file", "pläin")


def test_a_reload_reads_secrets_anew_and_keeps_the_old_ones_where_there_are_none(
    start: Callable[..., Gateway], service: Service, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("the first")
    gateway = start(service.url, http={"headers": {"X-Token": f"file:{tmp_path}/token"}})
    assert_serves(gateway.port)
    (tmp_path / "token").write_text("the second")
    gateway.process.send_signal(signal.SIGHUP)
    gateway.wait_for("authenticator loaded anew", url=service.url.partition("?")[0])
    assert_serves(gateway.port)
    (tmp_path / "token").unlink()
    gateway.process.send_signal(signal.SIGHUP)
    reason = gateway.wait_for("authenticator not loaded, the old one stays")["reason"]
    assert reason.startswith("authenticator.http.headers: X-Token: ")
    assert_serves(gateway.port)
    assert [sent["X-Token"] for sent in service.headers] == ["the first", "the second", "the second"]
    assert len(set(service.peers)) == 1


def test_check_shows_no_header(run: Run, tmp_path: Path) -> None:
    http = {"url": "https://who.example/", "headers": {"X-Token": "a secret"}}
    configure(tmp_path, authenticator={"http": http})
    done = run("check")
    assert done.returncode == 0, done.stderr
    assert "X-Token" in done.stdout
    assert "a secret" not in done.stdout


# What its answers mean


def test_all_of_a_mapping_is_taken(gateway: Gateway, service: Service, postgres: ThrowawayPostgres) -> None:
    answer = {
        "host": ["127.0.0.1:1", service.target],
        "user": "clear",
        "password": "clear secret",
        "parameters": {"application_name": "by http", "DateStyle": "German"},
        "parameters_base64": [{"name": "c2VhcmNoX3BhdGg=", "value": "YSxi"}],
        "tls": {"mode": "disable"},
        "session_seconds": 3600,
        "idle_timeout": 0,
        "idle_in_transaction_timeout": 600.5,
        "cache_seconds": 0,
    }
    conforms(answer, "mapping")
    service.answers_json("alice", answer)
    where = {"host": "127.0.0.1", "port": gateway.port, "user": "alice", "password": "x", "dbname": "other"}
    with psycopg.connect(**where) as connection:
        sql = "select current_user, current_database(), current_setting('DateStyle'), current_setting('search_path')"
        assert connection.execute(sql).fetchall() == [("clear", "other", "German, DMY", "a,b")]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_says_what_the_client_is_told_and_why(status: int, gateway: Gateway, service: Service) -> None:
    content = {"error": "come back\ntomorrow", "reason": "it is\ntuesday", "more": [1]}
    conforms(content, "refusal")
    service.answers_json("denied", content, status)
    told, reason = refused(gateway, "denied_1")
    assert told == ("28P01", "come back tomorrow")
    assert reason == rf"authenticator refused with status {status}: it is\ntuesday"


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"no json", b"[]", b'{"error": 5}', b"\xff", b"x" * (MAX_OUTPUT + 1), b"[" * 60_000]
)
def test_a_refusal_is_one_whatever_else_it_says(status: int, content: bytes, shared: tuple[Gateway, Service]) -> None:
    gateway, service = shared
    service.answers_bytes("denied", content, status)
    user = f"denied_{new_user()}"
    told, reason = refused(gateway, user)
    assert told == ("28P01", f'password authentication failed for user "{user}"')
    assert reason == f"authenticator refused with status {status}"


@pytest.mark.parametrize("status", [201, 204, 301, 302, 303, 307, 308, 304, 400, 404, 407, 429, 500, 502, 503])
def test_every_other_status_is_a_failure(status: int, shared: tuple[Gateway, Service]) -> None:
    gateway, service = shared
    content = json.dumps(service.answer()).encode() if status not in (204, 304) else b""
    service.answers_bytes("other", content, status, Location=service.url)
    before = len(service.asked)
    assert refused(gateway, f"other_{new_user()}") == (FAILED, f"authenticator answered with status {status}")
    assert len(service.asked) == before + 1
    assert_serves(gateway.port)


HOST = b'"host": "127.0.0.1:1"'
NONSENSE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "JSON|truncated"),
    "no JSON": (b"hunter2", "JSON"),
    "half": (b'{"host": "hunter2', "truncated"),
    "more behind it": (b"{%s} {}" % HOST, "JSON|required|trailing"),
    "no object": (b'["hunter2"]', "object"),
    "no host": (b'{"user": "hunter2"}', "host"),
    "no user": (b"{%s}" % HOST, "no user"),
    "empty user": (b'{%s, "user": ""}' % HOST, "user: empty"),
    "empty host": (b'{"host": "", "user": "hunter2"}', "host: empty"),
    "no hosts": (b'{"host": [], "user": "hunter2"}', "host: empty"),
    "a host that is none": (b'{"host": "hunter 2", "user": "x"}', "host names no host"),
    "an unknown field": (b'{%s, "user": "x", "databse": "hunter2"}' % HOST, "databse"),
    "a number for text": (b'{%s, "user": 5}' % HOST, "user"),
    "null for a host": (b'{"host": null, "user": "x"}', "host"),
    "a list of parameters": (b'{%s, "user": "x", "parameters": ["hunter2"]}' % HOST, "parameters"),
    "a reserved parameter": (b'{%s, "user": "x", "parameters": {"_META_X": "hunter2"}}' % HOST, "parameters"),
    "user twice": (b'{%s, "user": "x", "parameters": {"user": "hunter2"}}' % HOST, "user"),
    "a NUL": (b'{%s, "user": "hunter2\\u0000"}' % HOST, "user"),
    "a line break": (b'{%s, "user": "x", "password": "hunter2\\n"}' % HOST, "password"),
    "a lone surrogate": (b'{%s, "user": "\\ud800"}' % HOST, "."),
    "no UTF-8": (b'{%s, "user": "\xff"}' % HOST, "."),
    "no base64": (b'{%s, "user_base64": "hunter2!"}' % HOST, "user_base64"),
    "base64 of a NUL": (b'{%s, "user": "x", "password_base64": "AA=="}' % HOST, "password"),
    "both forms": (b'{%s, "user": "hunter2", "user_base64": "eA=="}' % HOST, "both user and user_base64"),
    "two credentials": (
        b'{%s, "user": "x", "password": "hunter2", "credential_from_client": true}' % HOST,
        "more than",
    ),
    "no MD5": (b'{%s, "user": "x", "md5_hash": "hunter2"}' % HOST, "md5_hash"),
    "an unknown mode of TLS": (b'{%s, "user": "x", "tls": {"mode": "hunter2"}}' % HOST, "tls"),
    "an unknown field of TLS": (b'{%s, "user": "x", "tls": {"moed": "hunter2"}}' % HOST, "moed"),
    "no time": (b'{%s, "user": "x", "session_seconds": 0}' % HOST, "session_seconds"),
    "endless time": (b'{%s, "user": "x", "session_seconds": 1e400}' % HOST, "."),
    "a negative cache": (b'{%s, "user": "x", "cache_seconds": -1}' % HOST, "cache_seconds"),
    "not a number": (b'{%s, "user": "x", "cache_seconds": NaN}' % HOST, "."),
    "deep": (b'{"host": ' + b"[" * 60_000, "."),
    "a huge number": (b'{%s, "user": "x", "cache_seconds": %s}' % (HOST, b"9" * 60_000), "."),
}

# What is no JSON, and what a schema has no words for.
BEYOND_THE_SCHEMA = {
    "empty",
    "no JSON",
    "half",
    "more behind it",
    "a host that is none",
    "a lone surrogate",
    "no UTF-8",
    "base64 of a NUL",
    "not a number",
    "deep",
    "a huge number",
}


@pytest.mark.parametrize("what", NONSENSE)
def test_an_answer_that_makes_no_sense_is_a_failure_told_without_its_values(
    what: str, shared: tuple[Gateway, Service]
) -> None:
    gateway, service = shared
    content, said = NONSENSE[what]
    service.answers_bytes("nonsense", content)
    user = f"nonsense_{new_user()}"
    told, reason = refused(gateway, user)
    assert told == FAILED
    assert reason.startswith("authenticator answered nonsense: ")
    assert re.search(said, reason.removeprefix("authenticator answered nonsense: "))
    assert "hunter" not in gateway.log.read_text()


@pytest.mark.parametrize("what", [name for name in NONSENSE if name not in BEYOND_THE_SCHEMA])
def test_the_schema_finds_such_an_answer_wrong_too(what: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        conforms(json.loads(NONSENSE[what][0]), "mapping")


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for name in ("request", "mapping", "refusal"):
        for example in SCHEMA["$defs"][name]["examples"]:
            conforms(example, name)


# Bounds


def test_an_answer_of_the_longest_length_is_taken_and_one_byte_more_is_not(gateway: Gateway, service: Service) -> None:
    whole = json.dumps(service.answer()).encode()
    service.answers_bytes("fits", whole + b" " * (MAX_OUTPUT - len(whole)))
    service.answers_bytes("long", whole + b" " * (MAX_OUTPUT - len(whole) + 1))
    assert_serves(gateway.port, "fits")
    assert refused(gateway, "long") == (FAILED, f"authenticator answered with more than {MAX_OUTPUT} bytes")
    assert_serves(gateway.port)


@pytest.mark.parametrize("status", [200, 403, 500])
def test_an_answer_without_end_is_not_read_to_its_end(status: int, gateway: Gateway, service: Service) -> None:
    sent = 0

    async def pour(_service: Service, request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(status=status, headers={"Content-Length": str(GIGABYTE)})
        await response.prepare(request)
        chunk = b" " * (1 << 20)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while sent < GIGABYTE:
                await response.write(chunk)
                sent += len(chunk)
        return response

    service.handlers["pours"] = pour
    before = gateway.peak_bytes
    told, reason = refused(gateway, "pours_1")
    if status == 403:
        assert told[0] == "28P01"
        assert reason == "authenticator refused with status 403"
    else:
        assert told == FAILED
        assert reason in (
            f"authenticator answered with more than {MAX_OUTPUT} bytes",
            "authenticator answered with status 500",
        )
    assert gateway.peak_bytes - before < 32 << 20
    assert sent < 64 << 20
    assert_serves(gateway.port)


def test_a_compressed_answer_is_not_unpacked(gateway: Gateway, service: Service) -> None:
    service.answers_bytes("packed", gzip.compress(b" " * (64 << 20)), Content_Encoding="gzip")
    told, reason = refused(gateway, "packed_1")
    assert told == FAILED
    assert reason == "authenticator answered with a content encoding, which was not asked for"
    assert service.headers[0]["Accept-Encoding"] == "identity"


def test_a_service_that_hangs_is_given_up(start: Callable[..., Gateway], service: Service) -> None:
    async def hang(_service: Service, _request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(WAIT_SECONDS)
        raise AssertionError

    async def drip(_service: Service, request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.01)
        return response

    service.handlers |= {"hangs": hang, "drips": drip}
    gateway = start(service.url, timeout=0.7)
    for user in ("hangs_1", "drips_1"):
        assert refused(gateway, user) == (FAILED, "authenticator took longer than 0.7 s")
    assert_serves(gateway.port)


async def until_told(service: Service, _request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    service.running += 1
    service.most = max(service.most, service.running)
    try:
        await service.go.wait()
    except asyncio.CancelledError:
        service.cancelled.append(body["user"])
        raise
    finally:
        service.running -= 1
    return web.json_response(service.answer())


def test_when_the_client_leaves_the_request_is_given_up(gateway: Gateway, service: Service) -> None:
    service.handlers["waits"] = until_told
    with knock(gateway.port, "waits_1"):
        wait_until(lambda: service.running == 1, "the service to be asked")
    assert "client left" in gateway.wait_for("refused", user="waits_1")["reason"]
    wait_until(lambda: service.cancelled == ["waits_1"], "the service to notice")


def test_no_more_than_max_in_flight_are_asked_at_once_and_the_others_wait(
    start: Callable[..., Gateway], service: Service
) -> None:
    service.handlers["waits"] = until_told
    gateway = start(service.url, http={"max_in_flight": 2})
    clients = [knock(gateway.port, f"waits_{number}") for number in range(6)]
    wait_until(lambda: service.running == 2, "two to be asked about")
    wait_until(lambda: gateway.sockets >= 9, "all clients to be there")
    with knock(gateway.port, "leaves") as leaving:
        leaving.socket.close()
        gateway.wait_for("refused", user="leaves")
    assert service.running == 2
    service.set_going()
    for client in clients:
        client.read_until(b"Z")
        client.socket.close()
    assert service.most == 2
    assert len(service.asked) == 6


def test_the_time_for_an_answer_begins_when_it_is_asked_for(start: Callable[..., Gateway], service: Service) -> None:
    async def slowly(_service: Service, _request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return web.json_response(service.answer())

    service.handlers["slow"] = slowly
    gateway = start(service.url, http={"max_in_flight": 1}, timeout=2)
    clients = [knock(gateway.port, f"slow_{number}") for number in range(5)]
    for client in clients:
        client.read_until(b"Z")
        client.socket.close()


# Connections


def test_connections_are_kept_and_used_again(gateway: Gateway, service: Service) -> None:
    for _ in range(5):
        assert_serves(gateway.port)
    service.answers_json("denied", {}, 403)
    refused(gateway, "denied_1")
    assert_serves(gateway.port)
    assert len(set(service.peers)) == 1
    assert len(service.peers) == 7


def test_nothing_of_one_login_is_sent_with_the_next(gateway: Gateway, service: Service) -> None:
    service.answers_bytes("baker", json.dumps(service.answer()).encode(), Set_Cookie="session=alice; Path=/")
    assert_serves(gateway.port, "baker")
    assert_serves(gateway.port)
    assert "Cookie" not in service.headers[1]


def read_request(connection: socket.socket) -> bytes:
    """One request, whole; empty if the connection was closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (chunk := connection.recv(65536)):
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += connection.recv(65536)
    return body


def http_answer(content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize("how", ["in order", "by a reset"])
def test_a_kept_connection_that_the_service_closes_meanwhile_costs_nobody_a_login(
    how: str, start: Callable[..., Gateway], postgres: ThrowawayPostgres
) -> None:
    """The service takes the second request of each connection and closes instead of answering."""
    answer = http_answer({"host": f"127.0.0.1:{postgres.port}", "user": "postgres", "database": "postgres"})

    connections = []

    def once_each(connection: socket.socket) -> None:
        connections.append(connection)
        read_request(connection)
        connection.sendall(answer)
        if how == "by a reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            connection.recv(1)
        else:
            read_request(connection)

    with ScriptedTarget(once_each) as service:
        gateway = start(f"http://127.0.0.1:{service.port}/")
        for _ in range(3):
            assert_serves(gateway.port)
    assert len(connections) == 3


def close(connection: socket.socket) -> None:
    read_request(connection)


def reset(connection: socket.socket) -> None:
    read_request(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def then(data: bytes) -> Callable[[socket.socket], None]:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(data)

    return script


def endless_headers(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(100_000):
        connection.sendall(b"X-%d: %s\r\n" % (number, b"x" * 1000))


BROKEN: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "closes at once": (lambda connection: None, "closed the connection without an answer"),
    "closes after the request": (close, "closed the connection without an answer"),
    "resets": (reset, "closed the connection without an answer"),
    "speaks something else": (then(b"220 smtp.example ESMTP\r\n"), "does not speak HTTP"),
    "speaks binary": (then(bytes(range(256))), "does not speak HTTP"),
    "breaks off": (then(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"), "broke off its answer"),
    "breaks off in a chunk": (then(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"), "broke off"),
    "breaks off in a header": (then(b"HTTP/1.1 200 OK\r\nContent-Le"), "closed the connection"),
    "sends a huge header": (then(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"), "does not speak HTTP"),
    "sends headers without end": (endless_headers, "does not speak HTTP"),
    "switches protocols": (
        then(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
        "answered with status 101",
    ),
    "sends two lengths": (then(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}"), "HTTP"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_service_that_breaks_http_costs_one_login(what: str, start: Callable[..., Gateway]) -> None:
    script, said = BROKEN[what]

    connections = []

    def once(connection: socket.socket) -> None:
        connections.append(connection)
        script(connection)

    with ScriptedTarget(once) as service:
        gateway = start(f"http://127.0.0.1:{service.port}/")
        before = gateway.peak_bytes
        told, reason = refused(gateway, "alice")
        assert told == FAILED
        assert reason.startswith("authenticator ")
        assert said in reason
        assert gateway.peak_bytes - before < 32 << 20
    assert len(connections) == 1


def test_what_is_sent_behind_an_answer_is_no_answer_to_the_next(
    start: Callable[..., Gateway], postgres: ThrowawayPostgres
) -> None:
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    allowed = http_answer({"host": f"127.0.0.1:{postgres.port}", "user": "postgres", "database": "postgres"})

    connections = []

    def script(connection: socket.socket) -> None:
        connections.append(connection)
        while read_request(connection):
            connection.sendall(refusal + (allowed if len(connections) == 1 else b""))

    with ScriptedTarget(script) as service:
        gateway = start(f"http://127.0.0.1:{service.port}/")
        for number in range(3):
            (sqlstate, _), _ = refused(gateway, f"mallory_{number}")
            assert sqlstate == "28P01"


def test_nobody_listens(start: Callable[..., Gateway]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    gateway = start(f"http://127.0.0.1:{port}/")
    told, reason = refused(gateway, "alice")
    assert (told, reason) == (FAILED, "authenticator cannot be reached: Connection refused")


def test_a_name_that_nobody_has(start: Callable[..., Gateway]) -> None:
    gateway = start("https://nobody.invalid/")
    told, reason = refused(gateway, "alice")
    assert (told, reason) == (FAILED, "authenticator has a host name that cannot be resolved")


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


class TlsService(ScriptedTarget):
    """A service that lets everybody in, over TLS; `requests` are the connections that it has had them from."""

    def __init__(self, context: ssl.SSLContext, target_port: int) -> None:
        super().__init__(self._answer_all)
        self.requests: list[socket.socket] = []
        self._context = context
        self._answer = http_answer({"host": f"127.0.0.1:{target_port}", "user": "postgres", "database": "postgres"})

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}/"

    def _answer_all(self, connection: socket.socket) -> None:
        # The gateway may not like what it is shown, and one that is asked to end is gone.
        with (
            contextlib.suppress(OSError),
            self._context.wrap_socket(connection.dup(), server_side=True) as encrypted,
        ):
            while read_request(encrypted):
                self.requests.append(connection)
                encrypted.sendall(self._answer)


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    return str(file)


def test_a_service_with_a_valid_certificate_is_asked(
    start: Callable[..., Gateway], authority: trustme.CA, ca_file: str, postgres: ThrowawayPostgres
) -> None:
    with TlsService(server_context(authority.issue_cert("localhost")), postgres.port) as service:
        gateway = start(service.url, http={"ca": ca_file})
        assert_serves(gateway.port)
        assert_serves(gateway.port)
        assert len(service.requests) == 2
        assert len(set(service.requests)) == 1
    assert not gateway.log_lines("passwords cross the network in clear")


def test_a_reload_reads_the_authorities_anew(
    start: Callable[..., Gateway], authority: trustme.CA, ca_file: str, postgres: ThrowawayPostgres
) -> None:
    other = trustme.CA()
    with TlsService(server_context(authority.issue_cert("localhost")), postgres.port) as service:
        gateway = start(service.url, http={"ca": ca_file})
        for number, known in enumerate((True, False, True)):
            if number:
                (authority if known else other).cert_pem.write_to_path(ca_file)
                gateway.process.send_signal(signal.SIGHUP)
                gateway.wait_for("authenticator loaded anew", number, url=service.url)
            if known:
                assert_serves(gateway.port)
            else:
                told, reason = refused(gateway, new_user())
                assert told == FAILED
                assert "unable to get local issuer" in reason


def expired(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("localhost", not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))


BAD_CERTIFICATES: dict[str, tuple[Callable[[trustme.CA], trustme.LeafCert], str]] = {
    "of another authority": (lambda _authority: trustme.CA().issue_cert("localhost"), "unable to get local issuer"),
    "of another host": (lambda authority: authority.issue_cert("other.example"), "Hostname mismatch"),
    "that has expired": (expired, "certificate has expired"),
}


@pytest.mark.parametrize("what", BAD_CERTIFICATES)
def test_a_service_with_a_certificate_that_is_not_valid_is_sent_nothing(
    what: str, start: Callable[..., Gateway], authority: trustme.CA, ca_file: str, postgres: ThrowawayPostgres
) -> None:
    issue, said = BAD_CERTIFICATES[what]
    with TlsService(server_context(issue(authority)), postgres.port) as service:
        gateway = start(service.url, http={"ca": ca_file})
        told, reason = refused(gateway, "alice")
        assert told == FAILED
        assert reason.startswith("authenticator has no valid certificate: ")
        assert said in reason
        assert service.requests == []


def test_without_a_ca_the_systems_authorities_count(
    start: Callable[..., Gateway], authority: trustme.CA, postgres: ThrowawayPostgres
) -> None:
    with TlsService(server_context(authority.issue_cert("localhost")), postgres.port) as service:
        _, reason = refused(start(service.url), "alice")
        assert "no valid certificate" in reason
        assert service.requests == []


def test_a_service_that_speaks_no_tls_or_an_old_one_is_sent_nothing(
    start: Callable[..., Gateway], service: Service, authority: trustme.CA, ca_file: str, postgres: ThrowawayPostgres
) -> None:
    gateway = start(service.url.replace("http:", "https:"), http={"ca": ca_file})
    told, reason = refused(gateway, "alice")
    assert told == FAILED
    assert reason.startswith("authenticator failed in TLS: ")
    old = server_context(authority.issue_cert("localhost"))
    old.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with TlsService(old, postgres.port) as antique:
        gateway = start(antique.url, http={"ca": ca_file})
        told, _ = refused(gateway, "bob")
        assert told == FAILED
        assert antique.requests == []


def test_without_tls_beyond_loopback_there_is_a_warning(start: Callable[..., Gateway], service: Service) -> None:
    gateway = start("http://192.0.2.1:8080/login?token=secret")
    line = gateway.wait_for("passwords cross the network in clear")
    assert (line["level"], line["authenticator"]) == ("warning", "http://192.0.2.1:8080/login")
    for host in ("localhost", "127.0.0.9", "[::1]"):
        local = start(f"http://{host}:{service.port}/")
        assert not local.log_lines("passwords cross the network in clear")


# What cannot be started


@pytest.mark.parametrize(
    ("http", "said"),
    [
        ({"url": "who.example"}, "http.url: not https://host[:port]/path"),
        ({"url": "ftp://who.example/"}, "http.url: not https://host[:port]/path"),
        ({"url": "https:///path"}, "http.url: not https://host[:port]/path"),
        ({"url": "https://who.example:99999/"}, "http.url: not a URL"),
        ({"url": "https://[::1/"}, "http.url: not a URL"),
        ({"url": "https://who.example/a b"}, "http.url: not https://host[:port]/path"),
        ({"url": "https://alice:secret@who.example/"}, "http.url: credentials belong into authenticator.http.headers"),
        ({"url": "https://x/", "headers": {"a b": "secret"}}, "http.headers: a name that no header can have"),
        ({"url": "https://x/", "headers": {"X": "secret\nY: z"}}, "http.headers: X: a line break"),
        (
            {"url": "https://x/", "headers": {"content-length": "5"}},
            "http.headers: content-length: is the gateway's own",
        ),
        ({"url": "https://x/", "headers": {"X": "env:NOT_THERE"}}, "http.headers: X: env:NOT_THERE: there is no such"),
        ({"url": "https://x/", "headers": {"X": "file:/no/such"}}, "http.headers: X: file:/no/such: No such file"),
        ({"url": "https://x/", "ca": "/no/such"}, "http.ca: /no/such: No such file"),
        ({"url": "https://x/", "ca": "/dev/null"}, "http.ca: /dev/null: "),
        ({"url": "https://x/", "max_in_flight": 0}, "http.max_in_flight"),
        ({"url": "https://x/", "verify": False}, "unknown key authenticator.http.verify"),
    ],
)
def test_what_cannot_be_used_is_named_without_its_secrets(
    http: dict[str, Any], said: str, run: Run, tmp_path: Path
) -> None:
    configure(tmp_path, authenticator={"http": http})
    done = run()
    assert_one_clear_line(done, said)
    assert "secret" not in done.stderr


def test_headers_can_be_given_by_a_variable(run: Run, tmp_path: Path) -> None:
    configure(tmp_path, authenticator={"http": {"url": "https://who.example/"}})
    done = run("check", PGPROXY_AUTHENTICATOR_HTTP_HEADERS="{X-Token: secret}")
    assert done.returncode == 0, done.stderr
    assert "authenticator.http.headers = X-Token  (environment PGPROXY_AUTHENTICATOR_HTTP_HEADERS)" in done.stdout
    for broken in ("{X-Token: secret", "secret", "[secret]", "{X-Token: [secret]}"):
        done = run(PGPROXY_AUTHENTICATOR_HTTP_HEADERS=broken)
        assert_one_clear_line(done, "authenticator.http.headers: ")
        assert "secret" not in done.stderr


def test_without_aiohttp_the_extra_is_named(tmp_path: Path) -> None:
    configure(tmp_path, authenticator={"http": {"url": "https://who.example/"}})
    blocked = "import sys; sys.modules['aiohttp'] = None; from pgauthproxy.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", blocked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert_one_clear_line(done, "needs aiohttp: pip install 'pgauthproxy[http]'")


def test_nothing_of_aiohttp_is_loaded_where_it_is_not_asked_for() -> None:
    code = "import sys, pgauthproxy.cli; print('aiohttp' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_SECONDS, check=True, env=os.environ
    )
    assert done.stdout == "False\n"


def test_kept_connections_are_closed_when_the_gateway_ends(gateway: Gateway, service: Service) -> None:
    assert_serves(gateway.port)
    assert gateway.stop() == 0
    assert "Unclosed" not in gateway.log.read_text()
