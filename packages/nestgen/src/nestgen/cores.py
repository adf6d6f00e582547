"""The processor's cores that a process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores by this process's affinity: those of its SLURM job, not of the whole machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
