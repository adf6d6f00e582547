"""torch.compile: whether this machine can, and how denoisers are compiled."""

from __future__ import annotations

import os
import shutil
import sys

import torch
from torch import nn

SHAPES = 64  # for which a network's code is compiled: levels share it, and the last batch is a smaller one


def missing_compiler(device: torch.device | str) -> str | None:
    """The program that torch.compile needs for a device and does not find: a C++ compiler on a CPU, a C compiler on a GPU,
    for Triton. None where it is there.
    """
    if torch.device(device).type == "cpu":
        variable, names = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    else:
        variable, names = "CC", ["gcc", "clang"]
    names = [os.environ[variable]] if os.environ.get(variable) else names
    return None if any(map(shutil.which, names)) else names[0]


def compile_in_place(network: nn.Module, mode: str | None = None) -> None:
    """Compiles a network, whose weights keep their names, for each shape that it meets.

    Not for variable shapes: denoisers share their code, so that torch would take what differs between levels for variables,
    and the last level would get a slower graph than the first.
    """
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    network.compile(mode=mode, dynamic=False)
