"""What a login costs with each kind of authenticator, beside PostgreSQL itself and HAProxy.

Strategy: everybody logs in as a role of the same name and with the same password on both sides, by the method that is
measured, so that what is added to a direct login is all that the gateway does: it holds the client to a verifier, asks
its authenticator, and logs in itself.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from peers import (
    HERE,
    LOGIN_ROLES,
    OUR_GATEWAY,
    PASSWORD,
    SCRAM_VERIFIER,
    Bench,
    Peer,
    Recipe,
    clocked,
    configured_gateway,
    direct,
    find_program,
    haproxy,
    latenesses_file,
    package_environment,
)
from processes import LOOPBACK

WARM = 16
"""Connections that stand open: more than clients of any row log in at once."""

CONFIGURATION = """\
listen: {host}:{port}
max_clients: {most}
max_logins: {most}
authenticator:
  method: METHOD
"""
COMMAND = "  cmd: [{authenticator}]\n"
FOUR_WORKERS = "  kind: worker\n  cmd: [{authenticator}, worker]\n  workers: {{min: 4, max: 4}}\n"
WORKER = "  kind: worker\n  cmd: [{authenticator}, worker]\n  workers: {{min: 2, max: 8}}\n"
IN_PROCESS = "  callable: in_process:decide\n"
USERS = "  users: {{file: {folder}/people.yaml}}\n"
TARGET = "target:\n  warm: WARM\n  tls: {{mode: MODE}}\n"


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to run the gateway: what stands under `authenticator` in its configuration, and how many warm targets."""

    authenticator: str
    warm: int = 0


KINDS: Mapping[str, Kind] = {
    "command": Kind(COMMAND),
    "worker": Kind(WORKER),
    "python": Kind(IN_PROCESS),
    "users": Kind(USERS),
    "users-warm": Kind(USERS, WARM),
}


@contextlib.contextmanager
def _gateway(bench: Bench, *, name: str, method: str) -> Iterator[Peer]:
    kind = KINDS[name]
    _write_users(bench, method)
    target = TARGET.replace("WARM", str(kind.warm)).replace("MODE", "require" if bench.tls else "disable")
    template = CONFIGURATION.replace("METHOD", method) + kind.authenticator + target
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), package_environment().get("PYTHONPATH")])),
        "BENCHMARK_TARGET": f"{LOOPBACK}:{bench.postgres_port}",
    }
    with configured_gateway(bench, name, OUR_GATEWAY, template, environment) as peer:
        yield peer


def _write_users(bench: Bench, method: str) -> None:
    role = LOGIN_ROLES[method]
    md5 = "md5" + hashlib.md5((PASSWORD + role).encode()).hexdigest()  # noqa: S324 (PostgreSQL's own)
    file = bench.folder / "people.yaml"
    file.write_text(
        f"""\
targets:
  benchmark: {{host: "{LOOPBACK}:{bench.postgres_port}", user: "{{user}}", password: {PASSWORD}}}
users:
  {role}: {{verifier: "{md5 if method == "md5" else SCRAM_VERIFIER}", databases: {{"*": benchmark}}}}
"""
    )
    file.chmod(0o600)


@contextlib.contextmanager
def four_workers(bench: Bench) -> Iterator[Peer]:
    """Our gateway with four workers and a clock in its event loop; see peers.stalled_gateway."""
    latenesses_file(bench).unlink(missing_ok=True)
    template = CONFIGURATION.replace("METHOD", "md5") + FOUR_WORKERS
    with configured_gateway(bench, "gateway", clocked(bench, "--megabytes", "1"), template) as peer:
        yield replace(peer, user=LOGIN_ROLES["md5"])


def kind_peers(method: str, wanted: Callable[[str], bool]) -> dict[str, Recipe]:
    """The peers of one method, by name, in the order of the table's columns; `wanted` knows the usual peers' names."""
    found = {"direct": direct} | ({"haproxy": haproxy} if find_program("haproxy") else {})
    recipes = {name: recipe for name, recipe in found.items() if wanted(name)} | _gateways(method, wanted)
    return {name: partial(_logged_in_as, recipe=recipe, role=LOGIN_ROLES[method]) for name, recipe in recipes.items()}


def tls_target_peers(wanted: Callable[[str], bool]) -> dict[str, Recipe]:
    """The peers where the server wants TLS. HAProxy would relay the client's, which is the direct login once more."""
    method = "md5"
    known = partial(_logged_in_as, role=LOGIN_ROLES[method])
    found = {"direct": partial(known, recipe=direct)} if wanted("direct") else {}
    gateways = _gateways(method, wanted).items()
    return found | {name: partial(known, recipe=recipe, never_tls=True) for name, recipe in gateways}


def _gateways(method: str, wanted: Callable[[str], bool]) -> dict[str, Recipe]:
    return {name: partial(_gateway, name=name, method=method) for name in KINDS} if wanted("gateway") else {}


@contextlib.contextmanager
def _logged_in_as(bench: Bench, *, recipe: Recipe, role: str, never_tls: bool = False) -> Iterator[Peer]:
    with recipe(bench) as peer:
        yield replace(peer, user=role, never_tls=never_tls)
