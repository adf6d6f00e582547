"""Where torch.compile can work, and that levels are compiled each for its own shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nestgen.compiler import SHAPES, compile_in_place, missing_compiler


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CXX", "icpx")
    assert (missing_compiler("cpu"), missing_compiler("cuda")) == ("icpx", "gcc")
    (tmp_path / "clang").write_text("#!/bin/sh\n")
    (tmp_path / "clang").chmod(0o755)
    assert missing_compiler("cuda") is None


@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="needs a C++ compiler")
def test_each_shape_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks share their code. With variable shapes torch would compile the second one for all sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    class Sine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin().sum()

    counter, real = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: real(*args, **options, backend=counter))
    networks = [Sine() for _ in range(3)]
    for size, network in zip((2, 3, 4), networks):
        compile_in_place(network)
        network(torch.zeros(size))
    assert counter.frame_count == len(networks)
    assert torch._dynamo.config.recompile_limit >= SHAPES
