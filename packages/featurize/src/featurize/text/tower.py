"""CLIP's text tower: described without loading, or loaded to embed captions and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from featurize.checkpoints.clip import ACTIVATIONS, activation_layer, prove_activation, read_clip
from featurize.checkpoints.downloads import PUBLISHED, find_weights
from featurize.checkpoints.files import fit, sha256_of, sidecar, sidecar_path
from featurize.errors import UserError
from featurize.execution.precision import inference
from featurize.io.files import json_sha256
from featurize.recipe import Features

REMOTE = PUBLISHED["clip-vit_l14"]
WHAT, FLAG = "the text encoder clip", "--text-weights"
IMPORTS = ("torch", "open_clip")  # that take long, and that loading needs
NETWORK = {
    "context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12, "activation": "quick_gelu",
}  # fmt: skip


@dataclass(frozen=True)
class TextSpec:
    """Which text encoder a user requests; small enough to send to any worker."""

    name: str
    weights: str | None = None


@dataclass(frozen=True)
class TextDescription:
    """A text encoder without its network: its file, its tokens and width, and everything that decides its values."""

    weights: Path
    network: dict[str, Any]
    identity: dict[str, Any]

    @property
    def tokens(self) -> int:
        return int(self.network["context_length"])

    @property
    def width(self) -> int:
        return int(self.network["width"])


@dataclass(frozen=True)
class TextEncoder:
    """A loaded text encoder: `encode` takes captions and gives their hidden states (B, tokens, width) float32."""

    description: TextDescription
    encode: Callable[[Sequence[str]], np.ndarray]


def describe_text_encoder(spec: TextSpec) -> TextDescription:
    """The text encoder without loading it: torch is not imported, of its weights only the digest is taken.

    A JSON beside the weights may describe another, smaller tower (`model_args`: width, heads, layers...). Raises UserError
    for weights that are missing and for a description that no tower has.
    """
    weights = find_weights(spec.weights, REMOTE, WHAT, FLAG)
    changes = sidecar(weights).get("model_args") or {}
    if changes.keys() - NETWORK.keys():
        raise UserError(
            f"{sidecar_path(weights)} describes what no text tower has: {min(changes.keys() - NETWORK.keys())}."
        )
    network: dict[str, Any] = {**NETWORK, **changes}
    if network["activation"] not in ACTIVATIONS:
        raise UserError(f"{WHAT} has no activation '{network['activation']}'; known are {', '.join(ACTIVATIONS)}.")
    identity = {
        "name": spec.name,
        "network": network,
        "weights_sha256": sha256_of(weights),
        "layer": "last",
        "norm": "final layer norm",
        "projection": False,
        "padding": "end of text",
    }
    return TextDescription(weights, network, identity)


def load_text_encoder(spec: TextSpec, device: str) -> TextEncoder:
    """`clip`: the text tower of CLIP ViT-L/14, whose last hidden states after the final layer norm condition Stable
    Diffusion and U-ViT (transformers' `CLIPTextModel`). It is kept in memory as long as its weights file stays the same.

    Raises UserError for weights that are missing or don't fit.
    """
    return _load_identified(spec, json_sha256(describe_text_encoder(spec).identity), device)


@lru_cache(maxsize=1)
def _load_identified(spec: TextSpec, identity: str, device: str) -> TextEncoder:
    """`load_text_encoder`, kept by the digest of the identity as well: a file may be overwritten by another training."""
    import torch
    from open_clip.transformer import LayerNorm, TextTransformer

    description = describe_text_encoder(spec)
    network, weights = description.network, description.weights
    file = read_clip(weights)
    prove_activation(
        file, network["activation"], weights, WHAT,
        f'write {{"model_args": {{"activation": "{file.activation}"}}}} into {sidecar_path(weights)}',
    )  # fmt: skip
    model = TextTransformer(
        context_length=network["context_length"],
        vocab_size=network["vocab_size"],
        width=network["width"],
        heads=network["heads"],
        layers=network["layers"],
        output_dim=None,  # the projection comes after what is wanted
        act_layer=activation_layer(network["activation"]),
        norm_layer=LayerNorm,
    )
    state = {key: value for key, value in file.text.items() if key != "text_projection"}
    fit(model, state, weights, f"{FLAG} names a CLIP with a text tower of 12 layers and 768 channels (ViT-L/14)")
    model.eval().requires_grad_(False).to(device)

    def encode(captions: Sequence[str]) -> np.ndarray:
        ids_BT = torch.tensor([token_ids(caption, description.tokens) for caption in captions], device=device)
        with inference(device, "float32"):
            x_BTD = model.token_embedding(ids_BT) + model.positional_embedding
            x_BTD = model.ln_final(model.transformer(x_BTD, attn_mask=model.attn_mask))
        return x_BTD.float().cpu().numpy()

    return TextEncoder(description, encode)


@cache
def _tokenizer() -> Any:
    """CLIP's byte-pair encoding, whose vocabulary ships with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def text_spec(features: Features) -> TextSpec:
    """The text encoder that a recipe or the command line names."""
    return TextSpec(str(features.text), features.text_weights)


def token_ids(caption: str, tokens: int) -> list[int]:
    """Start of text, the caption's tokens (cut to fit), end of text, and end of text again up to `tokens`.

    The padding is transformers', on which U-ViT trained. open_clip's own pads with 0, which gives other hidden states after
    the caption's end, and the denoiser sees those too.
    """
    tokenizer = _tokenizer()
    ids = tokenizer.encode(caption)[: tokens - 2]
    return [tokenizer.sot_token_id, *ids, *[tokenizer.eot_token_id] * (tokens - 1 - len(ids))]


def seen_part(caption: str, tokens: int) -> str | None:
    """The part of a caption that the encoder sees where it has too many tokens; None where it sees all."""
    ids = _tokenizer().encode(caption)
    return _tokenizer().decode(ids[: tokens - 2]).strip() if len(ids) > tokens - 2 else None
