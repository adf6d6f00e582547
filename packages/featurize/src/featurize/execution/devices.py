"""Cores, GPUs and memory of this machine, and which of them a task uses."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

# Pillow holds the interpreter's lock too often for one process to keep a GPU busy: docs/performance.md has rates for 1, 2 and 4.
WORKERS_PER_GPU = 4
MEMORY_PER_WORKER = 10 << 30  # bytes of a GPU: Stable Diffusion's VAE takes about half of it for a batch
FREE_MEMORY_KEPT = 2**31 - 1  # bytes at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
CGROUP = Path("/sys/fs/cgroup")

_worker_number: int | None = None  # of a local worker process, set once at its start


def become_worker(number: int) -> None:
    """Tell this process which of the local workers it is."""
    global _worker_number
    _worker_number = number


def cores() -> int:
    """Cores that this process may use: its affinity, bounded by the quota of its control group (containers), rounded up."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(available, -int(-quota // 1))) if quota else available


def _cgroup_quota() -> float | None:
    """Cores' worth of time that the control group grants; None where it sets no limit."""
    with suppress(OSError, ValueError):  # version 2; "max" is no limit
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):  # version 1; -1 is no limit
        quota, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


@cache
def gpus() -> int:
    """GPUs of this machine. Torch takes seconds to import, so it is used only where a driver is installed."""
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or "torch" in sys.modules):
        return 0
    import torch

    return torch.cuda.device_count()


def default_workers() -> int:
    """Up to four processes for each GPU, as its memory allows (they decode in threads beside the encoder), else one per core."""
    if not gpus():
        return cores()
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory
    return gpus() * max(1, min(WORKERS_PER_GPU, memory // MEMORY_PER_WORKER))


def device_of_worker() -> str:
    """The device a task computes on: a GPU where there is one, shared evenly among the workers."""
    if not gpus():
        return "cpu"
    return f"cuda:{_number() % gpus()}"


def _number() -> int:
    """Number of this worker. In a cluster its name, where that is a number; else 0: a launcher shows each worker its GPU."""
    if _worker_number is not None or "distributed" not in sys.modules:
        return _worker_number or 0
    from distributed import get_worker

    try:
        name = str(get_worker().name)
    except ValueError:
        return 0
    return int(name) if name.isdecimal() else 0


def decoding_threads() -> int:
    """Threads that read and decode beside the encoder: a GPU's share of the cores; none where the encoder needs the core."""
    return max(1, cores() // gpus()) if gpus() else 0


def keep_memory() -> None:
    """Tells glibc to keep what is freed, for the next batch, which needs as much.

    By default it gives large blocks back, and the kernel has to find and zero their pages anew for every layer's output: that
    is a fifth of the time of a ViT-B on a CPU.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, FREE_MEMORY_KEPT)
        mallopt(M_MMAP_MAX, 0)
