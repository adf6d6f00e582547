"""What a denoiser with `gaussian` predicts: the best linear prediction, plus what its network adds."""

from __future__ import annotations

from torch import Tensor

from nestgen.denoiser.gaussian import Given
from nestgen.denoiser.uvit import Denoiser, Outputs
from nestgen.diffusion.process import Coefficients, Process


def with_linear_part(
    outputs: Outputs, denoiser: Denoiser, process: Process, z_t_BCHW: Tensor, at: Coefficients, given: Given | None
) -> Outputs:
    """The outputs of a denoiser's network with the linear part (denoiser/gaussian.py) in both predictions.

    `given` is what `denoiser.gaussian` or `denoiser.prepare` made of the conditions, None of a denoiser without.
    """
    if given is None:
        return outputs
    mean_BCHW, eps_BCHW = denoiser.gaussian(z_t_BCHW, at.alpha_B, at.sigma_B, given)
    target_BCHW = process.target(mean_BCHW, eps_BCHW, at)
    side_BCHW = outputs.side_BCHW
    return outputs._replace(
        prediction_BCHW=outputs.prediction_BCHW + target_BCHW,
        side_BCHW=None if side_BCHW is None else side_BCHW + target_BCHW,
    )
