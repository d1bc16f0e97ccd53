"""What the documents say is what the code does."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import msgspec

from pgauthproxy.auth import users_file
from pgauthproxy.auth.targets import TargetSpec
from pgauthproxy.auth.users_file import UserSpec
from pgauthproxy.config import reference, schema

ROOT = Path(__file__).parents[2]


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
        for name in re.findall(r"`((?:authenticator|target|tcp|log)\.[a-z_]+)`", document.read_text()):
            assert name in known, f"{document.name}: {name}"


def test_the_shell_and_python_examples_of_the_readme_are_the_files() -> None:
    readme = (ROOT / "docs/authenticators.md").read_text()
    for name in ("two_roles.py", "two_roles.sh"):
        assert (ROOT / "examples" / name).read_text() in readme, name


def test_the_example_of_a_users_file_is_the_file_and_has_no_fault() -> None:
    example = (ROOT / "examples/users.yaml").read_bytes()
    assert example.decode() in (ROOT / "docs/users.md").read_text()
    # What it refers to is the operator's.
    alone = re.sub(rb"env:\w+", b"secret", example)
    found, faults = users_file.parse(alone, "scram-sha-256", lambda wishes: None, lambda: None)
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
    assert tuple(re.findall(r"`(\w+)`", row)) == schema.FIXED
