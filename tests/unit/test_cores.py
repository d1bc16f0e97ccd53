"""How many workers `auto` is: the cores that the process is bound to, within a container's quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from pgauthproxy import cores

V1 = "11:memory:/a\n4:{controllers}:/a/b\n1:name=systemd:/\n"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def quota(folder: Path, cgroup: str) -> float:
    write(folder / "cgroup", cgroup)
    return cores.cpu_quota(folder / "cgroup", folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", math.inf),
        ("200000 100000\n", 2.0),
        ("150000 100000\n", 1.5),
        ("5000 100000\n", 0.05),
        ("", math.inf),
        ("words\n", math.inf),
        ("100000 0\n", math.inf),
    ],
)
def test_a_quota_of_version_2_is_that_of_the_group(tmp_path: Path, text: str, expected: float) -> None:
    write(tmp_path / "a/b/cpu.max", text)
    assert quota(tmp_path, "0::/a/b\n") == expected


def test_the_least_quota_of_the_groups_above_counts(tmp_path: Path) -> None:
    write(tmp_path / "a/b/cpu.max", "max 100000\n")
    write(tmp_path / "a/cpu.max", "300000 100000\n")
    write(tmp_path / "cpu.max", "900000 100000\n")
    assert quota(tmp_path, "0::/a/b\n") == 3.0


def test_a_container_sees_its_own_group_at_the_top_whatever_its_path_is(tmp_path: Path) -> None:
    write(tmp_path / "cpu.max", "100000 50000\n")
    assert quota(tmp_path, "0::/../../kubepods/pod1/c2\n") == 2.0


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_a_quota_of_version_1_is_found_where_its_controllers_are(tmp_path: Path, controllers: str) -> None:
    write(tmp_path / controllers / "a/b/cpu.cfs_quota_us", "250000\n")
    write(tmp_path / controllers / "a/b/cpu.cfs_period_us", "100000\n")
    assert quota(tmp_path, V1.format(controllers=controllers)) == 2.5


def test_without_a_quota_there_is_no_bound(tmp_path: Path) -> None:
    write(tmp_path / "cpu/a/b/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu/a/b/cpu.cfs_period_us", "100000\n")
    assert quota(tmp_path, V1.format(controllers="cpu")) == math.inf
    assert quota(tmp_path, "0::/\n") == math.inf
    assert cores.cpu_quota(tmp_path / "no such file", tmp_path) == math.inf


@pytest.mark.parametrize(("bound", "quota", "expected"), [(8, math.inf, 8), (8, 1.2, 2), (8, 0.1, 1), (1, 4.0, 1)])
def test_parts_of_a_core_count_whole_and_there_is_always_one(bound: int, quota: float, expected: int) -> None:
    assert cores.whole_cores(bound, quota) == expected


def test_here_there_are_as_many_as_this_process_is_bound_to_or_fewer() -> None:
    assert 1 <= cores.available_cores() <= len(os.sched_getaffinity(0))
