"""What the documents say is what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jsonschema
import msgspec
import pytest
import yaml

from pgauthproxy.auth import users_file
from pgauthproxy.auth.targets import TargetSpec
from pgauthproxy.auth.users_file import UserSpec
from pgauthproxy.config import load, reference, schema
from pgauthproxy.ops import metrics
from pgauthproxy.ops.snapshot import AuthenticatorRow, Process, Snapshot, TargetRow

ROOT = Path(__file__).parents[2]
SECONDS = 120


def test_the_reference_of_settings_is_made_from_the_schema() -> None:
    assert (ROOT / "docs/config.md").read_text() == reference.markdown()


def test_the_changelog_knows_this_version() -> None:
    assert f"## [{version('pgauthproxy')}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_link_to_a_file_leads_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_setting_that_a_document_names_exists() -> None:
    known = {key.path for key in schema.all_keys()}
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"`((?:authenticator|target|tcp|log|audit|admin)(?:\.[a-z_]+)+)`", document.read_text()):
            assert name in known or any(path.startswith(f"{name}.") for path in known), f"{document.name}: {name}"


def test_the_examples_of_the_documents_are_the_files() -> None:
    shown = {"authenticators.md": ("two_roles.py", "two_roles.sh"), "python-authenticators.md": ("two_roles_typed.py",)}
    for document, names in shown.items():
        text = (ROOT / "docs" / document).read_text()
        for name in names:
            assert (ROOT / "examples" / name).read_text() in text, name


def test_the_tests_that_are_shown_to_authors_pass(tmp_path: Path) -> None:
    document = (ROOT / "docs/python-authenticators.md").read_text()
    (shown,) = (code for code in re.findall(r"```python\n(.+?)```", document, re.DOTALL) if "TestClient" in code)
    (tmp_path / "test_two_roles.py").write_text(shown)
    (tmp_path / "two_roles_typed.py").write_text((ROOT / "examples/two_roles_typed.py").read_text())
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_two_roles.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_the_json_that_is_shown_to_authors_fits_the_schema() -> None:
    schema = json.loads((ROOT / "docs/http-authenticator.schema.json").read_text())
    document = (ROOT / "docs/http-authenticators.md").read_text()
    shown = [json.loads(code) for code in re.findall(r"```json\n(.+?)```", document, re.DOTALL)]
    for content, name in zip(shown, ("request", "mapping"), strict=True):
        jsonschema.Draft202012Validator({**schema, "$ref": f"#/$defs/{name}"}).validate(content)


def test_the_settings_that_are_shown_to_authors_exist(tmp_path: Path) -> None:
    document = (ROOT / "docs/http-authenticators.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.+?)```", document, re.DOTALL)
    (tmp_path / "pgauthproxy.yaml").write_text(shown)
    assert load.load(tmp_path / "pgauthproxy.yaml", {}, {}).settings.authenticator.decided_kind == "http"


def test_the_example_of_a_users_file_is_the_file_and_has_no_fault() -> None:
    example = (ROOT / "examples/users.yaml").read_bytes()
    assert example.decode() in (ROOT / "docs/users.md").read_text()
    # What it refers to is the operator's.
    alone = re.sub(rb"env:\w+", b"secret", example)
    found, faults = users_file.parse(alone, "scram-sha-256", lambda target: None, lambda: None)
    assert faults == []
    assert found is not None
    assert (len(found.targets), len(found.users)) == (2, 3)


def test_the_document_of_the_users_file_has_every_key() -> None:
    document = (ROOT / "docs/users.md").read_text()
    for spec in (TargetSpec, UserSpec):
        for field in msgspec.structs.fields(spec):
            assert f"| `{field.encode_name}` |" in document, field.encode_name


def names_of_metrics() -> set[str]:
    """All that Prometheus sees of a gateway in which everything has happened."""
    busy = Snapshot(
        version="1",
        started=0.0,
        refused={"53300 full": 1},
        ended={"client closed": 1},
        cancels={"passed on": 1},
        targets=[TargetRow("a:1")],
        authenticators=[AuthenticatorRow("command", 1, 1, 1)],
        processes=[Process("0", 1, 1, 1, 1, 1.0)],
    )
    text, _ = metrics.render(busy, openmetrics=False)
    return set(re.findall(r"^(pgauthproxy_\w+)", text.decode(), re.MULTILINE))


@pytest.mark.parametrize("file", ["deploy/grafana.json", "deploy/alerts.yml", "docs/admin.md"])
def test_the_metrics_that_a_file_names_exist(file: str) -> None:
    text = (ROOT / file).read_text()
    named = set(re.findall(r"\bpgauthproxy_\w+", text))
    assert named
    assert named <= names_of_metrics()


def test_every_metric_is_explained_and_drawn() -> None:
    explained = (ROOT / "docs/admin.md").read_text()
    drawn = (ROOT / "deploy/grafana.json").read_text()
    for name in names_of_metrics():
        if not name.endswith(("_count", "_sum")):
            assert f"`{name}`" in explained, name
            assert name in drawn, name


def test_the_dashboard_and_the_alert_rules_can_be_read() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource", "job", "instance"}
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")"), target["expr"]
    (group,) = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["expr"].count("(") == rule["expr"].count(")"), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


def test_the_document_of_reloads_names_what_needs_a_restart() -> None:
    (row,) = re.findall(r"(?m)^\| (.*) \| stay as they were", (ROOT / "docs/operations.md").read_text())
    assert tuple(re.findall(r"`([\w.]+?)(?:\.\*)?`", row)) == schema.FIXED
