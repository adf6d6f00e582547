"""A training step as U-ViT publishes it: attention written out in float32, AdamW, and an average of the weights by a loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestgen.denoiser.blocks import Mlp, PatchEmbed, sinusoids


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v, every product a tensor of its own."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        b, n, d = x.shape
        qkv = self.qkv(x).float().view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        with torch.autocast(x.device.type, enabled=False):
            weights = (qkv[0] @ qkv[1].transpose(-2, -1) * self.scale).softmax(-1)
            y = (weights @ qkv[2]).transpose(1, 2).reshape(b, n, d)
        return self.proj(y)


class Block(nn.Module):
    """Pre-norm attention and MLP, after the long skip if there is one."""

    def __init__(self, dim: int, heads: int, skip: bool = False) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainUViT(nn.Module):
    """The unconditional backbone for images (C, side, side)."""

    def __init__(self, side: int, channels: int, patch: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch, self.dim, self.channels, self.side = patch, dim, channels, side
        self.patch_embed = PatchEmbed(channels, patch, dim)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, dim))
        self.in_blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth // 2))
        self.mid_block = Block(dim, heads)
        self.out_blocks = nn.ModuleList(Block(dim, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, z: Tensor, time: Tensor) -> Tensor:
        """The noise in z."""
        x = torch.cat([sinusoids(time, self.dim)[:, None], self.patch_embed(z)], 1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 1:]
        p, n = self.patch, self.side // self.patch
        x = x.view(len(x), n, n, p, p, self.channels).permute(0, 5, 1, 3, 2, 4)
        return self.final_layer(x.reshape(len(x), self.channels, self.side, self.side))


class PlainTraining:
    """The published loop's state and step."""

    def __init__(self, net: PlainUViT, betas: Tensor, device: torch.device, precision: torch.dtype | None) -> None:
        self.net, self.precision, self.device = net.to(device), precision, device
        self.average = [weight.detach().clone() for weight in net.parameters()]
        self.optimizer = torch.optim.AdamW(net.parameters(), 2e-4, (0.9, 0.9), weight_decay=0.03)
        self.signal = torch.cumprod(1 - betas, 0).sqrt().float().to(device)
        self.noise = (1 - torch.cumprod(1 - betas, 0)).sqrt().float().to(device)

    def step(self, z: Tensor) -> None:
        """One optimiser step on a batch."""
        n = torch.randint(0, len(self.signal), (len(z),), device=self.device)
        eps = torch.randn_like(z)
        z_t = self.signal[n][:, None, None, None] * z + self.noise[n][:, None, None, None] * eps
        with torch.autocast(self.device.type, self.precision or torch.bfloat16, enabled=self.precision is not None):
            predicted = self.net(z_t, (n + 1).float())
        loss = (predicted.float() - eps).square().flatten(1).mean(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for average, weight in zip(self.average, self.net.parameters()):
                average.mul_(0.9999).add_(weight, alpha=1e-4)
