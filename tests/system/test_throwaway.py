"""The PostgreSQL of the demo, where only root may read what was installed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from pgauthproxy.throwaway import ThrowawayPostgres, wheel_binaries


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts it as somebody else")
def test_it_runs_though_its_user_may_not_enter_where_it_was_installed() -> None:
    with tempfile.TemporaryDirectory() as name:
        closed = Path(name)
        assert closed.stat().st_mode & 0o777 == 0o700
        package = wheel_binaries().parents[1]
        for each in (package, package.with_name(f"{package.name}.libs")):
            if each.exists():
                (closed / each.name).symlink_to(each)
        with ThrowawayPostgres(closed / package.name / "pginstall" / "bin") as server:
            server.sql("select 1")
            assert server.binaries.is_relative_to(server.folder)
