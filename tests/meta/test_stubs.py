"""The stubs of the compiled modules are true: a parameter that is renamed, or a method without a stub, fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pgauthproxy"
SECONDS = 120

# What Cython makes of its own accord.
GENERATED = ".*\\.__reduce_cython__\n.*\\.__setstate_cython__\n.*\\.__test__\n"


def test_the_stubs_say_what_the_compiled_modules_have(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text(GENERATED)
    modules = [f"{PACKAGE.name}.{file.stem}" for file in sorted(PACKAGE.glob("*.pyx"))]
    command = [sys.executable, "-m", "mypy.stubtest", "--allowlist", str(allowed), "--ignore-unused-allowlist"]
    done = subprocess.run(
        [*command, *modules], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
