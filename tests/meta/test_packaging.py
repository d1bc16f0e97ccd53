"""What is installed is whole: every package, every stub and source of a compiled module, and one version everywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pgauthproxy import cli

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pgauthproxy"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def compiled() -> list[str]:
    return sorted(file.stem for file in PACKAGE.rglob("*.pyx"))


def test_the_version_is_one(project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert metadata.version("pgauthproxy") == version
    newest = re.search(r"^## \[([^\]]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    shown = CliRunner().invoke(cli._command, ["--version"])
    assert shown.exit_code == 0
    assert version in shown.output.split()[-1]


def test_every_compiled_module_is_built() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (built,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "modules"
    )
    assert sorted(built) == compiled()


def test_every_compiled_module_has_a_stub() -> None:
    assert sorted(file.stem for file in PACKAGE.rglob("*.pyi")) == compiled()


def test_every_folder_of_modules_is_a_package_that_is_installed(project: dict[str, Any]) -> None:
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("__init__.py")}
    with_modules = {
        ".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("*.py*") if file.suffix != ".pyc"
    }
    assert with_modules == folders
    assert set(project["tool"]["setuptools"]["packages"]) == folders | {"pgauthproxy.examples"}


def test_every_file_that_is_no_python_is_declared(project: dict[str, Any]) -> None:
    """The wheel has what package-data names, the sdist what MANIFEST.in names besides."""
    declared = project["tool"]["setuptools"]["package-data"]
    manifest = (ROOT / "MANIFEST.in").read_text()
    assert (PACKAGE / "py.typed").exists()
    for file in PACKAGE.rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc", ".so", ".c", ".html"):
            assert any(file.match(pattern) for pattern in declared["pgauthproxy"]), file
            in_sdist = re.search(r"^recursive-include pgauthproxy (.+)$", manifest, re.MULTILINE)
            assert in_sdist is not None
            assert any(file.match(pattern) for pattern in in_sdist[1].split()), file
    for file in (ROOT / "examples").iterdir():
        if file.is_file() and file.suffix != ".py":
            assert any(file.match(pattern) for pattern in declared["pgauthproxy.examples"]), file
    for file in (ROOT / "docs").iterdir():
        in_sdist = re.search(r"^recursive-include docs (.+)$", manifest, re.MULTILINE)
        assert in_sdist is not None
        assert any(file.match(pattern) for pattern in in_sdist[1].split()), file
    for name in ("CHANGELOG.md", "LICENSE", "SECURITY.md"):
        assert name in manifest


def imported(folder: Path) -> set[str]:
    """The top-level names of others that the Python files of a folder import."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {(node.module or "").partition(".")[0]}
    return names - sys.stdlib_module_names - {"pgauthproxy", "tests", "benchmarks", "examples"}


def required(requirements: list[str]) -> set[str]:
    """The import names of what is required."""
    names = {re.split(r"[\[><=]", requirement)[0] for requirement in requirements}
    return {{"PyYAML": "yaml", "PyJWT": "jwt"}.get(name, name.replace("-", "_")) for name in names}


def test_what_is_imported_is_required(project: dict[str, Any]) -> None:
    dependencies, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    for_users = [name for extra in extras if extra not in ("test", "lint") for name in extras[extra]]
    assert imported(PACKAGE) <= required(dependencies + for_users)
    assert imported(ROOT / "tests") <= required(dependencies + extras["test"])


def test_without_any_extra_it_can_be_imported(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    optional = [name for extra in extras if extra not in ("test", "lint") for name in extras[extra]]
    absent = required(optional) - required(project["project"]["dependencies"])
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)})); import pgauthproxy.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_python_versions_are_the_same_everywhere(project: dict[str, Any]) -> None:
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert project["tool"]["mypy"]["python_version"] == oldest
    wheels = tomllib.loads((ROOT / "cibuildwheel.toml").read_text())["tool"]["cibuildwheel"]["build"]
    assert wheels.split()[0] == f"cp{oldest.replace('.', '')}-*"
