"""Cores, GPUs and memory of this machine, and which of them a task uses."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

TASKS_PER_GPU = 2  # of a worker: images of one are decoded while the rows of the other are written
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's, WSL2's and AMD's
SIDE = 256  # pixels
MEMORY_PER_VIEW = 320 << 20  # bytes of a GPU: Stable Diffusion's VAE takes half of it for an image of this side
LARGEST_BATCH = 256  # views in a forward pass; more make a ViT-B no faster
FREE_MEMORY_KEPT = 2**31 - 1  # bytes at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
CGROUP = Path("/sys/fs/cgroup")

_worker_number: int | None = None  # of a local worker process, set once at its start
_decoders: int | None = None  # requested of this process


def become_worker(number: int, decoders: int | None = None) -> None:
    """Tell this process which of the local workers it is, and how many processes are to decode for it (None: its share)."""
    global _worker_number
    _worker_number = number
    request_decoders(decoders)


def request_decoders(count: int | None) -> None:
    """How many processes are to decode for this one; None: its share of the cores."""
    global _decoders
    _decoders = count


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
    if not (any(Path(driver).exists() for driver in DRIVERS) or "torch" in sys.modules):
        return 0
    import torch

    return torch.cuda.device_count()


def default_workers() -> int:
    """A process for each GPU, else for each core."""
    return gpus() or cores()


def tasks_per_worker() -> int:
    """Tasks that a worker does at once: on a GPU two, else one, as each computes on the worker's core."""
    return TASKS_PER_GPU if gpus() else 1


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


def decoders() -> int:
    """Processes that read and decode images for this one: as requested, else a GPU's share of the cores, and none where the
    encoder needs the core."""
    if _decoders is not None:
        return _decoders
    return max(1, cores() // gpus()) if gpus() else 0


def views_per_batch(device: str, least: int, views: int, side: int = SIDE) -> int:
    """How many views a forward pass takes of a task that has so many: `least` on a CPU, and more where a GPU has memory for them.

    It depends on the GPU's model and the side of the images alone, not on what is free: another size may round in another way.
    Images of more pixels than SIDE x SIDE are fewer in proportion.
    """
    if device == "cpu":
        return least
    import torch

    larger = max(1.0, (side / SIDE) ** 2)
    least = max(2, int(least / larger))  # an image and its flip
    fitting = int(torch.cuda.get_device_properties(device).total_memory / (MEMORY_PER_VIEW * larger))
    wanted = min(LARGEST_BATCH, max(least, fitting), 1 << (views - 1).bit_length())
    return max(least, 1 << (wanted.bit_length() - 1))


def keep_memory() -> None:
    """Tells glibc to keep what is freed, for the next batch, which needs as much.

    By default it gives large blocks back, and the kernel has to find and zero their pages anew for every layer's output: that
    is a fifth of the time of a ViT-B on a CPU.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, FREE_MEMORY_KEPT)
        mallopt(M_MMAP_MAX, 0)
