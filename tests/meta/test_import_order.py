"""Modules stand in one order, and import only what stands above them: no cycle, and a stranger can read downwards."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pgauthproxy"

LAYOUT = [
    "errors secret private_file pid_file cores service release stages events",
    "_wire _digest _tls _observe _relay _spawn _ledger",
    "proto.steps proto.messages proto.proxy_header proto.startup",
    "proto.scram proto.client_login proto.target_tls proto.target_login proto.console",
    "authoring",
    "auth.model auth.turns auth.fields auth.references auth.admins auth.targets",
    "auth.yaml_lines auth.networks auth.certificates auth.users_file auth.users_edit auth.users",
    "auth.command auth.worker_process auth.worker auth.chain auth.cache",
    "auth.typed rehearsal authenticator auth.calls auth.python auth.http_json auth.http",
    "net.sockets net.listen net.dial net.tls",
    "auth.https auth.keysets auth.jwt auth.directory auth.ldap auth.vault_client auth.vault",
    "gateway.access gateway.limits gateway.throttle gateway.rules gateway.moving gateway.salted_keys gateway.paused",
    "gateway.leg gateway.client_leg gateway.admission gateway.warm gateway.target_leg gateway.cancel",
    "gateway.console gateway.session",
    "ops.later ops.log ops.outlets ops.audit ops.privileges",
    "ops.snapshot ops.counts ops.acts ops.metrics ops.history ops.view ops.http ops.page ops.admin",
    "config.schema config.load config.reference",
    "ops.console",
    "kinds build shared_counts program control whole slots passing neighbours kept_leases",
    "link upgrade operators reload process worker alone supervised supervisor trial top",
    "throwaway demo",
    "terminal users_command",
    "cli __main__",
]
ORDER = [name for line in LAYOUT for name in line.split()]


def modules() -> dict[str, Path]:
    """Every module but the packages' own, which are empty."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py*")):
        if file.suffix in (".py", ".pyx") and file.name != "__init__.py":
            found[".".join(file.relative_to(PACKAGE).with_suffix("").parts)] = file
    return found


def names_imported(file: Path) -> Iterator[str]:
    """Dotted names that a module takes from the package, wherever in it that stands."""
    source = file.read_text()
    if file.suffix == ".pyx":
        for package, names in re.findall(r"^\s*from (pgauthproxy[\w.]*) c?import (.+)$", source, re.MULTILINE):
            yield from (f"{package}.{name.split()[0]}" for name in names.split(","))
        yield from re.findall(r"^\s*c?import (pgauthproxy[\w.]*)", source, re.MULTILINE)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def imported(file: Path, known: set[str]) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in names_imported(file):
        package, _, rest = name.partition(".")
        if package == PACKAGE.name:
            candidates = (rest, rest.rpartition(".")[0])
            found |= {next(candidate for candidate in candidates if candidate in known)}
    return found


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(ORDER) == sorted(modules())


def test_a_module_imports_only_what_stands_above_it() -> None:
    known = modules()
    above: set[str] = set()
    for name in ORDER:
        assert imported(known[name], set(known)) <= above, name
        above.add(name)


def test_packages_themselves_import_nothing() -> None:
    for file in PACKAGE.rglob("__init__.py"):
        assert not list(names_imported(file)), file


def test_the_protocol_knows_no_sockets_and_no_event_loop() -> None:
    known = modules()
    for name in ("_wire", "_digest", *(name for name in ORDER if name.startswith("proto."))):
        assert not re.search(
            r"^\s*(from|import|cimport) (asyncio|socket|uvloop|ssl|os)\b", known[name].read_text(), re.M
        )
