"""How many cores this process may use: as many as it is bound to, and no more than a container's quota pays for."""

import math
import os
from pathlib import Path
from typing import Final

CGROUP: Final = Path("/proc/self/cgroup")
MOUNT: Final = Path("/sys/fs/cgroup")
V1_CONTROLLERS: Final = ("cpu", "cpu,cpuacct", "cpuacct,cpu")


def available_cores() -> int:
    """At least one."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return whole_cores(bound, cpu_quota(CGROUP, MOUNT))


def whole_cores(bound: int, quota: float) -> int:
    """A part of a core is paid for: it counts whole."""
    return max(1, math.ceil(min(bound, quota)))


def cpu_quota(cgroup: Path, mount: Path) -> float:
    """The quota in cores, the least of the process's groups and theirs; infinite without one."""
    quotas = [math.inf]
    try:
        lines = cgroup.read_text().splitlines()
    except OSError:
        return math.inf
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            quotas += [_v2(folder) for folder in _folders(mount, path)]
        elif "cpu" in controllers.split(","):
            quotas += [_v1(folder) for name in V1_CONTROLLERS for folder in _folders(mount / name, path)]
    return min(quotas)


def _folders(top: Path, path: str) -> list[Path]:
    """A group's folder and those above it. In a container the path may be one that only the host knows."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [top.joinpath(*parts[:count]) for count in range(len(parts) + 1)]


def _v2(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _v1(folder: Path) -> float:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
