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

from pgauthproxy.auth import users_file
from pgauthproxy.auth.targets import TargetSpec
from pgauthproxy.auth.users_file import UserSpec
from pgauthproxy.config import load, reference, schema

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
        for name in re.findall(r"`((?:authenticator|target|tcp|log|audit)(?:\.[a-z_]+)+)`", document.read_text()):
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


def test_the_document_of_reloads_names_what_needs_a_restart() -> None:
    (row,) = re.findall(r"(?m)^\| (.*) \| stay as they were", (ROOT / "docs/operations.md").read_text())
    assert tuple(re.findall(r"`([\w.]+?)(?:\.\*)?`", row)) == schema.FIXED
