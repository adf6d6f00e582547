"""First weights of a denoiser: U-ViT's, but for the way from the input to the output.

The noise to predict is most of what the network gets as input. So patches are embedded by an orthogonal matrix and read
out by its transpose, long skips begin as the mean of both branches and the last convolution as the identity: the
untrained network returns its input instead of having to learn that first. Measured on scenes (32x32x3, patch 4, nano,
batch 64): loss 0.19 after 30 steps; with U-ViT's own first weights 0.36 after 160.

U-ViT's position embeddings start 50 times shorter than a patch of noise, which a block normalises both with: on photos
a thousand steps passed before neighbouring patches met. `initialise_positions` starts them as long as the patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestgen.denoiser.blocks import PatchEmbed, sinusoids

STD = 0.02  # of U-ViT's truncated normal
LONGEST = 20.0  # tokens for a radian of the slowest sinusoid of a position; the fastest takes one


def initialise_linear_layers(module: nn.Module) -> None:
    """U-ViT's rule for every linear layer below a module: weights truncated normal of 0.02, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def initialise_identity_path(
    patch_embed: PatchEmbed, out_blocks: nn.ModuleList, decoder_pred: nn.Linear, final_layer: nn.Conv2d
) -> None:
    """Lets the input through to the output.

    The last LayerNorm would leave of a patch its direction and take its amplitude, all the more the fewer values it
    has. So every token gets a constant beside its patch, at right angles to all patches and as long as one of noise:
    what is then divided by varies half as much. The read-out's factor makes up for what it is on average. Measured on
    Gaussian data (2x2x3, patch 1, nano, batch 64): 1.24 times the least loss at the first step, not 14.
    """
    embed_DCpq = patch_embed.proj.weight
    dim, values = len(embed_DCpq), embed_DCpq[0].numel()
    nn.init.orthogonal_(embed_DCpq.view(dim, -1))
    decoder_pred.weight.copy_(embed_DCpq.permute(2, 3, 1, 0).flatten(0, 2))
    bias_D = patch_embed.proj.bias
    assert bias_D is not None
    nn.init.zeros_(bias_D)
    if values < dim:
        constant_D = torch.randn(dim)
        embed_DP = embed_DCpq.view(dim, -1)
        constant_D -= embed_DP @ (embed_DP.T @ constant_D)
        bias_D.copy_(constant_D * values**0.5 / constant_D.norm())
        decoder_pred.weight.mul_((2 * values / dim) ** 0.5)
    for block in out_blocks:
        mean = torch.eye(dim).repeat(1, 2) / 2
        block.skip_linear.weight.add_(mean)  # type: ignore[operator, union-attr]
    nn.init.dirac_(final_layer.weight)
    nn.init.zeros_(final_layer.bias)  # type: ignore[arg-type]


@torch.no_grad()
def initialise_positions(position_ND: Tensor, grid: tuple[int, int], patch_embed: PatchEmbed) -> None:
    """Adds to every image token's position embedding, in place, sinusoids of its row and its column.

    They are at right angles to the embedded patches, so that what the first layers let through stays the patch, and as
    long as a patch of noise, so that attention tells neighbours apart from the first step. Where a patch has
    as many values as a token nothing is at right angles to it, and they lie over the patch. Measured on photos
    (32x32x3, patch 4, nano, 800 steps of 128): loss 0.128, and 0.142 without.
    """
    if len(position_ND) == 1:  # no other token to be told apart from
        return
    embed_DP = patch_embed.proj.weight.flatten(1)
    dim, values = embed_DP.shape
    axes = torch.meshgrid(*(torch.arange(float(size)) for size in grid), indexing="ij")
    sinusoids_ND = torch.cat([sinusoids(axis.flatten(), dim // 2, LONGEST) for axis in axes], 1)
    sinusoids_ND = nn.functional.pad(sinusoids_ND, (0, dim - sinusoids_ND.shape[1]))  # where dim is no multiple of 4
    sinusoids_ND -= sinusoids_ND.mean(0)
    if values + 1 < dim:
        bias_D = patch_embed.proj.bias
        assert bias_D is not None
        basis_DP, _ = torch.linalg.qr(torch.cat([embed_DP, bias_D[:, None]], 1))
        sinusoids_ND -= sinusoids_ND @ basis_DP @ basis_DP.T
    position_ND += nn.functional.normalize(sinusoids_ND, dim=1) * values**0.5
