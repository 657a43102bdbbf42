"""How many CPUs this process may use: its affinity, and its container's quota."""

import math
import os
from pathlib import Path

__all__ = ["default_threads"]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def default_threads(*, cgroups: Path = _CGROUPS, own_group: Path = _OWN_GROUP) -> int:
    """CPUs that this process may run on, and no more than its cgroup's quota pays for.

    A container's quota bounds time, not CPUs: more threads than it pays for would all be halted
    for the rest of each period.
    """
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    paid = _quota(cgroups, own_group)
    return allowed if paid is None else max(1, min(allowed, math.ceil(paid)))


def _quota(cgroups: Path, own_group: Path) -> float | None:
    """CPUs paid for by cgroup v2 or v1; the smallest on the way to the root, None for any."""
    found = [_unified(folder) for folder in _ancestors(cgroups, own_group, "")]
    found += [
        _legacy(folder)
        for controller in ("cpu", "cpu,cpuacct")
        for folder in _ancestors(cgroups / controller, own_group, controller)
    ]
    return min((paid for paid in found if paid is not None), default=None)


def _ancestors(root: Path, own_group: Path, controller: str) -> list[Path]:
    """The group's folder and all above it; a container sees its own group as the root."""
    folders = [root]
    for line in _read(own_group).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == controller:
            part = root
            for name in Path(path.lstrip("/")).parts:
                part /= name
                folders.append(part)
    return folders


def _unified(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _legacy(folder: Path) -> float | None:
    quota = _read(folder / "cpu.cfs_quota_us").strip()
    period = _read(folder / "cpu.cfs_period_us").strip()
    if not quota.lstrip("-").isdigit() or not period.isdigit() or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
