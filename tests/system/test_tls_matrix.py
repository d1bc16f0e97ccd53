"""Every way in, with every driver: how TLS begins, how the client proves itself, how the gateway does at the target.

What a driver cannot do stands in `cannot`, with the reason; everything else must work.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pg8000.dbapi
import psycopg
import pytest

from pgauthproxy.proto import scram
from pgauthproxy.throwaway import ThrowawayPostgres
from tests.system.conftest import DEBIAN, DEBIAN_VERSION, DIRECT_TLS_SINCE, Answering, answering_gateway, new_user
from tests.tls import HOST, Authority, Identity

SECONDS = 30
SECRET = "the client's own"
# Who we are at the target, and what it knows of our TLS, in one value.
WHO = "select concat_ws(' ', current_user, ssl, version, client_dn) from pg_stat_ssl where pid = pg_backend_pid()"

WAYS = ("plain", "SSLRequest", "direct")
# What the client must do by its own account; in libpq's words (require_auth).
METHODS = {
    "md5": "md5",
    "cleartext": "password",
    "scram": "scram-sha-256",
    "scram-plus": "scram-sha-256",
    "cert": "none",
}
SETTINGS = {
    "md5": "md5",
    "cleartext": "cleartext",
    "scram": "scram-sha-256",
    "scram-plus": "scram-sha-256",
    "cert": "cert",
}
NEEDS_TLS = ("scram-plus", "cert")
TARGETS = {
    "plain": "scrammed f",
    "TLS": "clear t TLSv1.3",
    "TLS and scram-plus": "scrammed t TLSv1.3",
    "client certificate": "certified t TLSv1.3 /O=testing/OU=gateways/CN=certified",
}


@dataclass(frozen=True)
class Login:
    """What a driver is to do."""

    port: int
    user: str
    way: str
    method: str
    ca: Path
    identity: Identity

    @property
    def context(self) -> ssl.SSLContext | None:
        """For drivers that take Python's own."""
        if self.way == "plain":
            return None
        context = ssl.create_default_context(cafile=str(self.ca))
        context.set_alpn_protocols(["postgresql"])
        if self.method == "cert":
            context.load_cert_chain(self.identity.cert, self.identity.key)
        return context

    @property
    def conninfo(self) -> dict[str, str]:
        """For libpq of any version."""
        options = {"host": HOST, "port": str(self.port), "user": self.user, "dbname": "postgres"}
        options["sslmode"] = "disable" if self.way == "plain" else "verify-full"
        options["sslrootcert"] = str(self.ca)
        options["channel_binding"] = "require" if self.method == "scram-plus" else "disable"
        if self.method == "cert":
            options |= {"sslcert": str(self.identity.cert), "sslkey": str(self.identity.key)}
        return options


@dataclass(frozen=True)
class Seen:
    """What came of it: the target's word, and what the driver knows of its own connection."""

    who: str
    encrypted: bool
    bound: bool | None = None
    """Whether the channel was bound, None if the driver does not tell or was made to bind it."""


def by_libpq(login: Login) -> Seen:
    assert psycopg.pq.version() >= 180000
    options: dict[str, Any] = login.conninfo | {"require_auth": METHODS[login.method]}
    if login.method == "cert":
        options["sslcertmode"] = "require"
    if login.way == "direct":
        options["sslnegotiation"] = "direct"
    with psycopg.connect(**options, password=SECRET, connect_timeout=SECONDS) as session:
        row = session.execute(WHO).fetchone()
        assert row is not None
        return Seen(row[0], encrypted=session.pgconn.ssl_in_use)


def by_psql(login: Login) -> Seen:
    assert DEBIAN is not None
    options = dict(login.conninfo)
    if login.way == "direct":
        options["sslnegotiation"] = "direct"
    done = subprocess.run(
        [
            DEBIAN / "psql",
            "-XAt",
            "-c",
            WHO,
            "-c",
            "\\conninfo",
            " ".join(f"{key}={value}" for key, value in options.items()),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PGPASSWORD": SECRET},
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    who, _, about = done.stdout.partition("\n")
    return Seen(who, encrypted="SSL connection (protocol: TLSv1.3" in about)


def by_asyncpg(login: Login) -> Seen:
    async def work() -> Seen:
        session = await asyncpg.connect(
            host=HOST,
            port=login.port,
            user=login.user,
            password=SECRET,
            database="postgres",
            timeout=SECONDS,
            ssl=login.context or False,
            direct_tls=login.way == "direct",
        )
        try:
            who = await session.fetchval(WHO)
            return Seen(who, encrypted=session._transport.get_extra_info("cipher") is not None)
        finally:
            await session.close()

    return asyncio.run(work())


def by_pg8000(login: Login) -> Seen:
    session = pg8000.dbapi.connect(
        login.user,
        host=HOST,
        port=login.port,
        database="postgres",
        password=SECRET,
        timeout=SECONDS,
        ssl_context=login.context or False,
    )
    with contextlib.closing(session):
        cursor = session.cursor()
        cursor.execute(WHO)
        mechanism = session.auth.mechanism_name if hasattr(session, "auth") and session.auth else ""
        return Seen(cursor.fetchone()[0], isinstance(session._usock, ssl.SSLSocket), mechanism.endswith("PLUS"))


NODE_SCRIPT = """
const fs = require('fs')
const { Client } = require('pg')
const asked = JSON.parse(process.argv[1])
const { sql, cert, key, ca, tls, ...options } = asked
if (tls) {
  options.ssl = { ca: fs.readFileSync(ca) }
  if (cert) Object.assign(options.ssl, { cert: fs.readFileSync(cert), key: fs.readFileSync(key) })
}
const client = new Client(options)
let bound = false
const respond = client.connection.sendSASLInitialResponseMessage
client.connection.sendSASLInitialResponseMessage = function (mechanism, response) {
  bound = mechanism === 'SCRAM-SHA-256-PLUS'
  return respond.call(this, mechanism, response)
}
client.connect()
  .then(() => client.query({ text: sql, rowMode: 'array' }))
  .then(({ rows }) => {
    console.log(JSON.stringify({ who: rows[0][0], encrypted: !!client.connection.stream.encrypted, bound }))
    return client.end()
  })
  .catch((error) => { console.error(error); process.exit(1) })
"""


def by_node(login: Login, modules: Path) -> Seen:
    asked: dict[str, Any] = {
        "host": HOST,
        "port": login.port,
        "user": login.user,
        "password": SECRET,
        "database": "postgres",
        "sql": WHO,
        "ca": str(login.ca),
        "tls": login.way != "plain",
        "enableChannelBinding": login.method == "scram-plus",
    }
    if login.method == "cert":
        asked |= login.identity.settings
    if login.way == "direct":
        asked["sslnegotiation"] = "direct"
    done = subprocess.run(
        ["node", "-e", NODE_SCRIPT, json.dumps(asked)],
        capture_output=True,
        text=True,
        env=os.environ | {"NODE_PATH": str(modules)},
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Seen(**json.loads(done.stdout))


DRIVERS: dict[str, Callable[..., Seen]] = {
    "libpq": by_libpq,
    "psql": by_psql,
    "asyncpg": by_asyncpg,
    "pg8000": by_pg8000,
    "node": by_node,
}


def cannot(driver: str, way: str, method: str) -> str:
    """Why a driver cannot do a row, empty if it can."""
    if driver == "psql" and way == "direct" and DEBIAN_VERSION < DIRECT_TLS_SINCE:
        return f"libpq speaks direct TLS since version {DIRECT_TLS_SINCE}"
    if driver == "pg8000" and way == "direct":
        return "pg8000 speaks no direct TLS"
    if driver == "asyncpg" and method == "scram-plus":
        return "asyncpg binds no channels"
    if driver == "pg8000" and way == "SSLRequest" and method == "scram":
        return "pg8000 binds the channel wherever that is offered"
    return ""


ROWS = [
    pytest.param(driver, way, method, target, id=f"{driver}, {way}, {method}, {target}")
    for driver in DRIVERS
    for way in WAYS
    for method in METHODS
    for target in TARGETS
    if not (way == "plain" and method in NEEDS_TLS) and not cannot(driver, way, method)
]


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where node finds its `pg`."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm on this machine")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), "pg@8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install pg: {done.stderr.strip()}")
    return folder / "node_modules"


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Callable[[str], Answering]]:
    """The gateway that asks for a method: started when first wanted, there until the file is done."""
    identity = authority.issue("gateway", "localhost", HOST)
    started: dict[str, Answering] = {}
    with contextlib.ExitStack() as stack:

        def gateway(method: str) -> Answering:
            if method not in started:
                folder = tmp_path_factory.mktemp(f"gateway-{method}")
                asked = "require" if method == "cert" else "optional"
                tls = identity.settings | {"client_ca": str(authority.cert), "client_cert": asked}
                found = answering_gateway(folder, authenticator={"method": method}, tls=tls)
                started[method] = stack.enter_context(found)
            return started[method]

        yield gateway


@pytest.fixture(scope="module")
def target_lines(tls_postgres: ThrowawayPostgres, authority: Authority) -> dict[str, dict[str, str]]:
    """What an authenticator says to send somebody to each of TARGETS."""
    verified = {"_META_TARGET_TLS": "verify-full", "_META_TARGET_CA": str(authority.cert)}
    mapped = authority.issue("certified", common_name="certified", organization_unit_name="gateways")
    shown = {"_META_TARGET_CERT": str(mapped.cert), "_META_TARGET_KEY": str(mapped.key)}
    lines = {
        "plain": {"user": "scrammed", "_META_TARGET_PASSWORD": "scram secret", "_META_TARGET_TLS": "disable"},
        "TLS": {"user": "clear", "_META_TARGET_PASSWORD": "clear secret", **verified},
        "TLS and scram-plus": {"user": "scrammed", "_META_TARGET_PASSWORD": "scram secret", **verified},
        "client certificate": {"user": "certified", **verified, **shown},
    }
    place = {"_META_TARGET_HOST": f"{HOST}:{tls_postgres.port}", "database": "postgres"}
    return {target: place | more for target, more in lines.items()}


def verifier(method: str, user: str) -> str:
    """What the gateway is to hold the client to: an MD5 or, where it serves, SCRAM's."""
    if method == "md5":
        return "md5" + hashlib.md5((SECRET + user).encode()).hexdigest()  # noqa: S324 (the protocol's own)
    return scram.Verifier.of(SECRET.encode(), os.urandom(16), 4096).text().decode()


@pytest.mark.parametrize(("driver", "way", "method", "target"), ROWS)
def test_it_gets_in_as_whom_it_is_mapped_to(
    request: pytest.FixtureRequest,
    gateways: Callable[[str], Answering],
    target_lines: dict[str, dict[str, str]],
    authority: Authority,
    driver: str,
    way: str,
    method: str,
    target: str,
) -> None:
    more = (request.getfixturevalue("node_modules"),) if driver == "node" else ()
    answering = gateways(SETTINGS[method])
    user = new_user()
    proved = {} if method == "cert" else {"_META_SOURCE_VERIFIER": verifier(method, user)}
    answering.user(target_lines[target] | proved, user)
    identity = authority.issue("client", common_name="client", organization_unit_name="clients")
    login = Login(answering.gateway.port, user, way, method, authority.cert, identity)

    seen = DRIVERS[driver](login, *more)

    assert seen.who == TARGETS[target]
    assert seen.encrypted == (way != "plain")
    if seen.bound is not None:
        assert seen.bound == (method == "scram-plus")
    logged = answering.gateway.wait_for("login", user=user)
    assert logged.get("tls") == (None if way == "plain" else "TLSv1.3")
    assert logged.get("target_tls") == (None if target == "plain" else "TLSv1.3")
    assert logged.get("certificate") == ("CN=client,OU=clients,O=testing" if method == "cert" else None)
