"""How many cores this process may use: a batch system or a container often gives it fewer than there are."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that the scheduler lets this process run on, within its control group's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min(allowed or 1, quota())))


def quota(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """Seconds of processor time per second that control groups grant, infinity without a limit.

    A limit of any group above this process's own holds for it too.

    Args:
        cgroups: where control groups are mounted. own: the file that names this process's groups.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return math.inf  # not Linux
    limits = [math.inf]
    for _, controllers, path in lines:
        base = cgroups if not controllers else cgroups / controllers
        group = base / path.strip("/")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container, its own group is often mounted as the root.
        for directory in {base, *(p for p in (group, *group.parents) if p.is_relative_to(base))}:
            limits.append(_limit(directory))
    return min(limits)


def _limit(directory: Path) -> float:
    try:
        if (directory / "cpu.max").exists():
            granted, period = (directory / "cpu.max").read_text().split()
        else:
            granted = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text()
        return math.inf if granted in ("max", "-1") else int(granted) / int(period)
    except (OSError, ValueError):
        return math.inf  # the root has no such files
