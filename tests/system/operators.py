"""What tests need of a gateway's pages and console for operators."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any

import psycopg

from pgauthproxy.proto import scram
from tests.conftest import WAIT_SECONDS, Gateway


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def address_of(gateway: Gateway) -> str:
    """Where a gateway serves operators."""
    address: str = gateway.wait_for("serving operators")["address"]
    return address


def ask(gateway: Gateway, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
    """One request; `_` in the names of headers is `-`."""
    connection = http.client.HTTPConnection(address_of(gateway), timeout=WAIT_SECONDS)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read().decode())
    finally:
        connection.close()


def raw(gateway: Gateway, sent: bytes) -> bytes:
    """All that comes back for these bytes, until the gateway closes."""
    host, _, port = address_of(gateway).rpartition(":")
    with socket.create_connection((host, int(port)), WAIT_SECONDS) as connection:
        connection.sendall(sent)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
    return found


def samples(gateway: Gateway) -> dict[str, float]:
    """The metrics of a gateway, by name with labels as they stand in Prometheus' text."""
    lines = ask(gateway, "/metrics").body.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


# The console

ACTING, LOOKING = "what alice knows", "what bob knows"


def verifier(of: str) -> str:
    return scram.Verifier.of(of.encode(), b"0123456789abcdef", 4096).text().decode()


USERS = {"users": {"alice": verifier(ACTING)}, "stats_users": {"bob": verifier(LOOKING)}}


def connect(gateway: Gateway, user: str = "alice", secret: str = ACTING, **more: Any) -> psycopg.Connection[Any]:
    settings = {"host": "127.0.0.1", "port": gateway.port, "dbname": "pgauthproxy", "connect_timeout": 10}
    return psycopg.connect(user=user, password=secret, **settings | more)  # type: ignore[arg-type]


def rows(gateway: Gateway, text: str, **who: Any) -> list[dict[str, Any]]:
    """What a statement gives, by column."""
    with connect(gateway, **who) as connection:
        cursor = connection.execute(text)
        assert cursor.description is not None
        names = [column.name for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def do(gateway: Gateway, text: str, **who: Any) -> str:
    """Performs a statement, gives its tag."""
    with connect(gateway, autocommit=True, **who) as connection:
        return connection.execute(text).statusmessage or ""
