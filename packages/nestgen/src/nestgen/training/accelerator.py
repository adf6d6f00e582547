"""Accelerate's part: where a training runs, in which precision, and what ends with other processes of it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.distributed import Backend, DistNetworkError, DistStoreError, FileStore

from nestgen.compiler import missing_compiler
from nestgen.denoiser.cpu_linear import is_intel
from nestgen.denoiser.memory import is_out_of_memory
from nestgen.errors import LostProcess, UserError
from nestgen.recipe.recipe import Recipe
from nestgen.recipe.sections import TrainingOptions
from nestgen.runs.checkpoint import newest
from nestgen.training.launch import STORE_FILE, stop_with_the_parent

# What Accelerate's configuration may ask for, and another training would follow from.
REFUSED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
TIMEOUT = timedelta(minutes=30)  # of a process that waits for the others: a preview or a large checkpoint takes long


def start_accelerator(options: TrainingOptions, folder: Path) -> Accelerator:
    """This process alone, or among those that `--processes`, `accelerate launch` or `torchrun` started.

    The recipe decides the training: Accelerate's environment variables for precision, compiling and accumulation have no
    effect. Raises UserError for those that would change more.
    """
    stop_with_the_parent()
    for name in (f"ACCELERATE_USE_{one}" for one in REFUSED):
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise UserError(
                f"{name} is set in the environment, and nestgen trains without it; unset it (or answer no in "
                "`accelerate config`), and set training.shard to shard a denoiser over several processes"
            )
    for tracker in options.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"training.trackers names {tracker}, which is not installed; install nestgen[{tracker}]")
    # Unless `cpu` is set, Accelerate takes every process that torchrun starts on a CPU for the only one.
    on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    if STORE_FILE in os.environ:
        _join_the_others()
    try:
        accelerator = Accelerator(
            mixed_precision=options.precision,
            cpu=on_cpu,
            log_with=list(options.trackers) or None,
            project_dir=folder,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else the environment decides
            dynamo_backend="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
    except ValueError as error:
        raise UserError(
            f"this machine does not support training.precision {options.precision} ({error}); set `no` or another one"
        ) from None
    if options.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("training.precision fp16 needs a GPU; set bf16 or no")
    if options.compile and (compiler := missing_compiler(accelerator.device)):
        of_cpu, of_gpu = ("C++ compiler on a CPU", "CXX"), ("C compiler on a GPU", "CC")
        kind, variable = of_cpu if accelerator.device.type == "cpu" else of_gpu
        raise UserError(
            f"training.compile needs a {kind}, and {compiler} is not there; install it, name another one in the environment "
            f"variable {variable}, or leave training.compile out"
        )
    if accelerator.device.type == "cuda" and torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise UserError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes of this machine need as many GPUs, and it has "
            f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
        )
    if options.batch % accelerator.num_processes:
        raise UserError(
            f"training.batch {options.batch} does not divide among {accelerator.num_processes} processes; "
            "set a multiple of them"
        )
    return accelerator


def _join_the_others() -> None:
    """Begins torch's process group among those that `launch` started, through the file they share; Accelerate takes it."""
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    store = FileStore(os.environ[STORE_FILE], processes)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    backend = Backend.default_device_backend_map[device.type if device else "cpu"]
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=TIMEOUT)


def with_actual_precision(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with bf16 or no in place of `auto`: that of the run's newest checkpoint, or the faster one of this machine.

    So a checkpoint records what it was trained in, and a run goes on in it on another machine.
    """
    if recipe.training.precision != "auto":
        return recipe
    started, faster = newest(run), "bf16" if bfloat16_is_faster() else "no"
    precision = started.meta["training"]["precision"] if started else faster
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"precision": precision})})


def bfloat16_is_faster() -> bool:
    """Whether this machine trains faster in bfloat16 than in float32; a CPU without instructions for it takes ten times as long.

    Those of AVX-512 are worth a quarter to a third on AMD's processors. On an Intel Xeon they took 1.5 times as long as float32,
    for which MKL has all of AVX-512: so there AMX alone counts (docs/training.md).
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not is_intel())


@contextmanager
def out_of_memory(options: TrainingOptions, samples: int) -> Iterator[None]:
    """Raises UserError where forward and backward passes of so many samples do not fit into memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        gpu = isinstance(error, torch.OutOfMemoryError)
        less = (
            f"set training.micro_batch to {samples // 2} or fewer"
            if samples > 1
            else "shard the denoiser (training.shard)"
        )
        recompute = "" if options.checkpoint_activations else ", or training.checkpoint_activations to true"
        raise UserError(
            f"a training step does not fit into the memory of the {'GPU' if gpu else 'machine'}, with {samples} sample(s) in "
            f"one forward pass; {less}{recompute}: the same command goes on from the last checkpoint"
        ) from None


def check_alike(accelerator: Accelerator, folder: Path, step: int, digest: str) -> None:
    """Raises UserError in every process unless all go on from one checkpoint, by one recipe and on the same stores.

    `digest`, in hex, is of what decides a training. Otherwise each would train weights of its own, and none would notice.
    """
    mine = torch.tensor([[step, int(digest[:15], 16)]], device=accelerator.device)
    found = accelerator.gather(mine).tolist()
    steps = sorted({step for step, _ in found})
    if len(steps) > 1:
        raise UserError(
            f"the processes of this training find different checkpoints in {folder} (steps {', '.join(map(str, steps))}); "
            "put the folder runs/ on a disk that all machines share, and look whether all of them see it as it is"
        )
    if len({digest for _, digest in found}) > 1:
        raise UserError(
            f"the processes of the training {folder} differ in recipe, stores, checkpoint or `precision: auto`; give all "
            "machines the same files, and name the precision"
        )


@contextmanager
def lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """Raises LostProcess instead of what gloo and torch's store raise once another process of a training has ended.

    NCCL's errors pass as they are: most are faults of the machine, which their traceback describes.
    """
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, DistNetworkError | DistStoreError) or "gloo" in str(error)
        if accelerator.num_processes > 1 and gone:
            raise LostProcess(
                f"another process of this training ended, or did not answer for {TIMEOUT.seconds // 60} minutes; "
                "the same command goes on from the last checkpoint"
            ) from None
        raise
