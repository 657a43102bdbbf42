"""What a figure was measured on: cores and what their instructions can do, never whose they are."""

import os
import platform
from pathlib import Path

__all__ = ["CORES", "machine"]

CORES = sorted(os.sched_getaffinity(0))  # that may be used

_TOLD = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def machine() -> dict[str, object]:
    """Cores that may be used, architecture, and the extensions that decide speed."""
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text().split()) if flags.is_file() else set()
    return {
        "cores": len(CORES),
        "architecture": platform.machine(),
        "extensions": [name for name in _TOLD if name in words],
    }
