"""U-ViT with its condition path, written from their descriptions: picture by picture and head by head, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nestgen.denoiser.condition_path import condition_stack
from nestgen.denoiser.config import DenoiserConfig


def plain_uvit(
    w: dict[str, Tensor],
    config: DenoiserConfig,
    z: Tensor,
    time: Tensor,
    label: Tensor | None = None,
    conditions: list[Tensor] | None = None,
    context: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Tensor:
    """U-ViT in plain tensor algebra: no nn.Module, attention and unfolding written out, one sample at a time."""
    side, d, heads = config.patch, config.dim, config.heads

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def block(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(d, -1)
        out = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            queries, keys = q[:, part], k[:, part]
            if config.qk_norm:
                queries, keys = (
                    x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.attn.{which}_norm.weight"]
                    for x, which in ((queries, "q"), (keys, "k"))
                )
            scores = queries @ keys.T / math.sqrt(d // heads)
            out.append(torch.softmax(scores, -1) @ v[:, part])
        x = x + linear(torch.cat(out, -1), f"{name}.attn.proj")
        hidden = gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + linear(hidden, f"{name}.mlp.fc2")

    def stacked(c: Tensor, shape: tuple[int, int, int], name: str) -> Tensor:
        for layer, module in enumerate(condition_stack(shape, config.grid, d)):
            weight, bias = w[f"{name}.{layer}.weight"], w[f"{name}.{layer}.bias"]
            op = F.conv_transpose2d if isinstance(module, torch.nn.ConvTranspose2d) else F.conv2d
            c = op(c[None], weight, bias, stride=module.stride, padding=module.padding)[0]
        return c

    def join(x: Tensor, site: int, given: list[Tensor] | None, extras: int) -> Tensor:
        if given is None:
            return x
        names = ["stack", *(f"further.{k}" for k in range(len(given) - 1))]
        c = sum(
            stacked(one, shape, f"sites.{site}.{name}")
            for one, shape, name in zip(given, config.condition_shapes, names, strict=True)
        )
        assert isinstance(c, Tensor)
        image = x[extras:]
        joined = torch.cat([image, c.reshape(d, -1).T], -1)
        result = linear(gelu(linear(joined, f"sites.{site}.fc1")), f"sites.{site}.fc2")
        return torch.cat([x[:extras], image + result if config.condition == "residual" else result])

    def told(number: Tensor) -> Tensor:
        angles = number * torch.tensor([10000 ** (-i / (d // 2)) for i in range(d // 2)], dtype=torch.float64)
        return torch.cat([torch.cos(angles), torch.sin(angles)])

    def one(
        z: Tensor, time: Tensor, label: Tensor | None, c: list[Tensor] | None, text: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        rows, columns = config.grid
        kernel = w["patch_embed.proj.weight"].reshape(d, -1)
        patches = [
            z[:, i * side : (i + 1) * side, j * side : (j + 1) * side].reshape(-1)
            for i in range(rows)
            for j in range(columns)
        ]
        image = torch.stack(patches) @ kernel.T + w["patch_embed.proj.bias"]
        first = told(time)
        if noise is not None:
            first = first + linear(torch.cat([told(100 * one) for one in noise]), "sigma_embed")
        tokens = [first[None]]
        if label is not None:
            tokens.insert(0, w["label_emb.weight"][label][None])
        if text is not None:
            tokens.append(linear(text, "context_embed"))
        extras = sum(map(len, tokens))
        x = torch.cat([*tokens, image]) + w["pos_embed"][0]
        half, site, skips = config.depth // 2, 0, []
        for i in range(half):
            if i % 2 == 0:
                x, site = join(x, site, c, extras), site + 1
            x = block(x, f"in_blocks.{i}")
            skips.append(x)
        x, site = join(x, site, c, extras), site + 1
        x = block(x, "mid_block")
        for i in range(half):
            if i % 2 == 0:
                x, site = join(x, site, c, extras), site + 1
            x = block(linear(torch.cat([x, skips.pop()], -1), f"out_blocks.{i}.skip_linear"), f"out_blocks.{i}")
        x = join(x, site, c, extras)
        x = linear(norm(x, "norm"), "decoder_pred")[extras:]
        picture = torch.zeros(config.shape[2], *config.shape[:2], dtype=torch.float64)
        for n, patch in enumerate(x):
            i, j = divmod(n, columns)
            picture[:, i * side : (i + 1) * side, j * side : (j + 1) * side] = patch.reshape(side, side, -1).permute(
                2, 0, 1
            )
        return F.conv2d(picture[None], w["final_layer.weight"], w["final_layer.bias"], padding=1)[0]

    return torch.stack(
        [
            one(
                z[i],
                time[i],
                None if label is None else label[i],
                None if conditions is None else [one[i] for one in conditions],
                None if context is None else context[i],
                None if sigma is None else sigma[i],
            )
            for i in range(len(z))
        ]
    )
