"""Checkpoints of random weights in the official key layouts, small enough for a test."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Dice:
    """Random tensors of sensible size: linear weights keep variance, norms are near one."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(*shape, generator=self.generator)

    def linear(self, name: str, out: int, into: int, bias: bool = True) -> State:
        state = {f"{name}.weight": self.normal(out, into, std=1 / math.sqrt(into))}
        return state | ({f"{name}.bias": self.normal(out, std=0.2)} if bias else {})

    def norm(self, name: str, width: int) -> State:
        return {f"{name}.weight": 1 + self.normal(width, std=0.3), f"{name}.bias": self.normal(width, std=0.3)}

    def conv(self, name: str, out: int, into: int, side: int) -> State:
        weight = self.normal(out, into, side, side, std=1 / math.sqrt(into * side * side))
        return {f"{name}.weight": weight, f"{name}.bias": self.normal(out, std=0.2)}


def sine_cosine(side: int, width: int) -> Tensor:
    """MoCo-v3's fixed position embedding, value by value from its formula."""
    quarter = width // 4
    table = torch.zeros(1, 1 + side * side, width)
    for token in range(side * side):
        row, column = divmod(token, side)
        for k in range(quarter):
            omega = 10000 ** -(k / quarter)
            angles = (row * omega, row * omega, column * omega, column * omega)
            for part, (wave, angle) in enumerate(zip((math.sin, math.cos, math.sin, math.cos), angles)):
                table[0, 1 + token, part * quarter + k] = wave(angle)
    return table


def vit_state(width: int, depth: int, patch: int, side: int, seed: int = 0, registers: int = 0) -> State:
    """DINO's layout; with registers DINOv2's, with layer scales and a mask token."""
    dice = Dice(seed)
    state = {
        "cls_token": dice.normal(1, 1, width),
        "pos_embed": dice.normal(1, 1 + side * side, width),
        **dice.conv("patch_embed.proj", width, 3, patch),
    }
    if registers:
        state |= {"register_tokens": dice.normal(1, registers, width), "mask_token": dice.normal(1, width)}
    for block in range(depth):
        stem = f"blocks.{block}"
        state |= dice.norm(f"{stem}.norm1", width) | dice.linear(f"{stem}.attn.qkv", 3 * width, width)
        state |= dice.linear(f"{stem}.attn.proj", width, width) | dice.norm(f"{stem}.norm2", width)
        state |= dice.linear(f"{stem}.mlp.fc1", 4 * width, width) | dice.linear(f"{stem}.mlp.fc2", width, 4 * width)
        if registers:
            state |= {f"{stem}.ls1.gamma": dice.normal(width), f"{stem}.ls2.gamma": dice.normal(width)}
    return state | dice.norm("norm", width)


def moco_state(width: int, depth: int, side: int, hidden: int = 32, out: int = 16, seed: int = 0) -> State:
    """MoCo-v3's base encoder with its projection head, without the prefix."""
    dice = Dice(seed + 1000)
    state = vit_state(width, depth, 16, side, seed) | {"pos_embed": sine_cosine(side, width)}
    for layer, (rows, columns) in enumerate(((hidden, width), (hidden, hidden), (out, hidden))):
        state |= dice.linear(f"head.{3 * layer}", rows, columns, bias=False)
        norm = f"head.{3 * layer + 1}"
        state |= dice.norm(norm, rows) if layer < 2 else {}
        state |= {
            f"{norm}.running_mean": dice.normal(rows, std=0.3),
            f"{norm}.running_var": 0.5 + dice.normal(rows).abs(),
            f"{norm}.num_batches_tracked": torch.tensor(7),
        }
    return state


def moco_file(path: Path, state: State, arch: str = "vit_base", **model_args: Any) -> Path:
    """The official pre-training file around a base encoder, and a JSON that says how it was shrunk."""
    whole = {f"module.base_encoder.{key}": value for key, value in state.items()}
    # A momentum encoder of other values: taking it by mistake shows.
    whole |= {f"module.momentum_encoder.{key}": value * 2 for key, value in state.items()}
    whole |= {"module.predictor.0.weight": torch.ones(4, 4)}
    torch.save({"epoch": 300, "arch": arch, "state_dict": whole, "optimizer": {"state": {}}, "scaler": {}}, path)
    return described(path, **model_args)


def described(path: Path, **model_args: Any) -> Path:
    path.with_suffix(".json").write_text(json.dumps({"model_args": model_args}))
    return path


def clip_state(
    width: int, depth: int, patch: int, side: int, embed: int, text: tuple[int, int, int], seed: int = 0
) -> State:
    """OpenAI's layout, both towers; `text` is width, depth and context length. Half precision's values, as published."""
    dice = Dice(seed)
    state = {
        "visual.class_embedding": dice.normal(width),
        "visual.positional_embedding": dice.normal(1 + side * side, width),
        "visual.conv1.weight": dice.conv("c", width, 3, patch)["c.weight"],
        "visual.proj": dice.normal(width, embed, std=width**-0.5),
        **dice.norm("visual.ln_pre", width),
        **dice.norm("visual.ln_post", width),
        **_clip_blocks(dice, "visual.", width, depth),
    }
    text_width, text_depth, context = text
    state |= {
        "positional_embedding": dice.normal(context, text_width),
        "token_embedding.weight": dice.normal(49408, text_width),
        "text_projection": dice.normal(text_width, embed, std=text_width**-0.5),
        "logit_scale": torch.tensor(4.6),
        **dice.norm("ln_final", text_width),
        **_clip_blocks(dice, "", text_width, text_depth),
    }
    return {key: value.half().float() for key, value in state.items()}


def _clip_blocks(dice: Dice, prefix: str, width: int, depth: int) -> State:
    state: State = {}
    for block in range(depth):
        stem = f"{prefix}transformer.resblocks.{block}"
        attention = dice.linear("a", 3 * width, width)
        state |= {
            f"{stem}.attn.in_proj_weight": attention["a.weight"],
            f"{stem}.attn.in_proj_bias": attention["a.bias"],
        }
        state |= dice.linear(f"{stem}.attn.out_proj", width, width)
        state |= dice.norm(f"{stem}.ln_1", width) | dice.norm(f"{stem}.ln_2", width)
        state |= dice.linear(f"{stem}.mlp.c_fc", 4 * width, width) | dice.linear(f"{stem}.mlp.c_proj", width, 4 * width)
    return state


def transformers_clip(state: State) -> State:
    """The same weights under the names of transformers' CLIPModel."""
    names = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    found: State = {"logit_scale": state["logit_scale"]}
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        stem = f"{prefix}transformer.resblocks."
        for key, value in state.items():
            if not key.startswith(stem):
                continue
            number, _, rest = key.removeprefix(stem).partition(".")
            layer = f"{tower}.encoder.layers.{number}"
            if rest.startswith("attn.in_proj_"):
                for part, third in zip("qkv", value.chunk(3)):
                    found[f"{layer}.self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = third.clone()
            else:
                part, _, kind = rest.rpartition(".")
                found[f"{layer}.{names[part]}.{kind}"] = value
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    found |= {
        f"{vision}.class_embedding": state["visual.class_embedding"],
        f"{vision}.patch_embedding.weight": state["visual.conv1.weight"],
        f"{vision}.position_embedding.weight": state["visual.positional_embedding"],
        f"{vision}.position_ids": torch.arange(len(state["visual.positional_embedding"]))[None],
        f"{text}.token_embedding.weight": state["token_embedding.weight"],
        f"{text}.position_embedding.weight": state["positional_embedding"],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        found[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        found[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        found[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
    return found


def torchscript_clip(path: Path, state: State, quick: bool = True) -> Path:
    """An archive as OpenAI published it: traced modules of half precision whose code holds the activation."""

    def attach(root: nn.Module, key: str, value: Tensor) -> None:
        *parts, last = key.split(".")
        for part in parts:
            if not hasattr(root, part):
                root.add_module(part, nn.Module())
            root = getattr(root, part)
        root.register_parameter(last, nn.Parameter(value.half(), requires_grad=False))

    activation: Callable[[Tensor], Tensor] = (lambda x: x * torch.sigmoid(1.702 * x)) if quick else nn.functional.gelu

    class Clip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return activation(x) * self.logit_scale  # type: ignore[operator]

    model = Clip()
    for key, value in state.items():
        attach(model, key, value)
    for key, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        model.register_buffer(key, torch.tensor(value))
    torch.jit.save(torch.jit.trace(model, torch.ones(2, dtype=torch.float16)), str(path))
    return path


def vae_state(channels: tuple[int, ...], blocks: int, latent: int, seed: int = 0) -> State:
    """An AutoencoderKL in CompVis' layout, encoder and decoder, with a loss that a training checkpoint holds as well."""
    dice = Dice(seed)

    def residual(name: str, into: int, out: int) -> State:
        state = dice.norm(f"{name}.norm1", into) | dice.conv(f"{name}.conv1", out, into, 3)
        state |= dice.norm(f"{name}.norm2", out) | dice.conv(f"{name}.conv2", out, out, 3)
        return state | (dice.conv(f"{name}.nin_shortcut", out, into, 1) if into != out else {})

    def middle(name: str, width: int) -> State:
        state = residual(f"{name}.block_1", width, width) | residual(f"{name}.block_2", width, width)
        state |= dice.norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            state |= dice.conv(f"{name}.attn_1.{part}", width, width, 1)
        return state

    top = channels[-1]
    state = dice.conv("encoder.conv_in", channels[0], 3, 3)
    into = channels[0]
    for stage, out in enumerate(channels):
        for block in range(blocks):
            state |= residual(f"encoder.down.{stage}.block.{block}", into, out)
            into = out
        if stage < len(channels) - 1:
            state |= dice.conv(f"encoder.down.{stage}.downsample.conv", out, out, 3)
    state |= middle("encoder.mid", top) | dice.norm("encoder.norm_out", top)
    state |= dice.conv("encoder.conv_out", 2 * latent, top, 3)
    state |= dice.conv("decoder.conv_in", top, latent, 3) | middle("decoder.mid", top)
    into = top
    for stage in reversed(range(len(channels))):
        for block in range(blocks + 1):
            state |= residual(f"decoder.up.{stage}.block.{block}", into, channels[stage])
            into = channels[stage]
        if stage > 0:
            state |= dice.conv(f"decoder.up.{stage}.upsample.conv", into, into, 3)
    state |= dice.norm("decoder.norm_out", channels[0]) | dice.conv("decoder.conv_out", 3, channels[0], 3)
    state |= dice.conv("quant_conv", 2 * latent, 2 * latent, 1) | dice.conv("post_quant_conv", latent, latent, 1)
    return state
