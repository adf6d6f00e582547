"""CLIP weights in any of their three layouts, and what a file itself says of its activation.

CLIP was trained with QuickGELU, x * sigmoid(1.702 x), most of its open reproductions with GELU. The tensors look alike and
the features do not, so whatever names the activation is read: the code inside OpenAI's archive (as text), transformers'
`config.json` and open_clip's `open_clip_config.json` beside the weights. A bare state dict says nothing.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurize.checkpoints.files import read_checkpoint, read_description, tensors_of
from featurize.checkpoints.unwrap import without_prefixes
from featurize.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from featurize.checkpoints.files import State

log = logging.getLogger(__name__)

ACTIVATIONS = ("quick_gelu", "gelu")
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TOWERS = {
    "vision_model": {
        "prefix": "visual.",
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
    },
    "text_model": {
        "prefix": "",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    },
}


@dataclass(frozen=True)
class ClipFile:
    """Both towers' tensors under OpenAI's names, and the activation with who says so (None where nothing does)."""

    visual: State
    text: State
    activation: str | None
    witness: str


def read_clip(weights: Path) -> ClipFile:
    """Read OpenAI's TorchScript archive, open_clip's state dict or transformers' CLIPModel.

    Raises UserError for a file that is none of them, or that can't be read.
    """
    from featurize.checkpoints.torchscript import is_torchscript, read_torchscript

    state = tensors_of(read_checkpoint(weights), weights)  # first, as it has the sentence for a damaged archive
    if is_torchscript(weights):
        activation, witness = _activation_of_code(read_torchscript(weights)[1]), "the code inside the archive"
    else:
        activation, witness = _activation_beside(weights)
    state = without_prefixes(state)
    for tower, own in (
        ("text_model", "embeddings.token_embedding.weight"),
        ("vision_model", "embeddings.class_embedding"),
    ):
        if own in state:  # transformers' CLIPTextModel or CLIPVisionModel saved alone
            state = {
                key if key.endswith("_projection.weight") else f"{tower}.{key}": value for key, value in state.items()
            }
    if any(key.startswith(("vision_model.", "text_model.")) for key in state):
        state = _from_transformers(state, weights)
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    # OpenAI's archive holds three plain numbers as well; `logit_scale` belongs to neither tower.
    apart = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size", "attn_mask")
    text = {key: value for key, value in state.items() if not key.startswith("visual.") and key not in apart}
    if not visual and not any(key.startswith("token_embedding") for key in text):
        first = f" (its first key is '{min(state)}')" if state else ""
        raise UserError(
            f"The weights {weights} are not a CLIP file in OpenAI's, open_clip's or transformers' layout{first}."
        )
    return ClipFile(visual, text, activation, witness)


def activation_layer(name: str) -> type[nn.Module]:
    """The layer of an activation."""
    from open_clip.transformer import QuickGELU  # all of open_clip takes seconds to import
    from torch import nn

    return QuickGELU if name == "quick_gelu" else nn.GELU


def prove_activation(file: ClipFile, wanted: str, weights: Path, what: str, remedy: str) -> str:
    """Who confirms the activation; '' where nothing does, with a warning.

    Raises UserError where the file contradicts it; `remedy` is how the user says the file's own.
    """
    if file.activation is None:
        log.warning(
            "Nothing in or beside %s says whether it was trained with QuickGELU or GELU; %s is computed with %s, which a JSON "
            "beside it (model_args: activation) changes.", weights, what, wanted,
        )  # fmt: skip
        return ""
    if file.activation != wanted:
        raise UserError(
            f"{what} computes with {wanted}, but {file.witness} of {weights} says {file.activation}: the features would be "
            f"wrong; take the right weights, or {remedy}."
        )
    return file.witness


def _activation_of_code(code: str) -> str | None:
    if re.search(r"1\.702", code):
        return "quick_gelu"
    return "gelu" if "gelu" in code else None


def _activation_beside(weights: Path) -> tuple[str | None, str]:
    config = read_description(weights.with_name("config.json"))
    for part in (config.get("vision_config"), config.get("text_config"), config):
        if isinstance(part, dict) and isinstance(part.get("hidden_act"), str):
            return part["hidden_act"], "config.json beside"
    # transformers leaves out what equals its default, and its CLIP's default is QuickGELU.
    if str(config.get("model_type", "")).startswith("clip"):
        return "quick_gelu", "config.json beside"
    described: Any = read_description(weights.with_name("open_clip_config.json")).get("model_cfg")
    if isinstance(described, dict):
        return ("quick_gelu" if described.get("quick_gelu") else "gelu"), "open_clip_config.json beside"
    return None, ""


def _from_transformers(state: State, weights: Path) -> State:
    """transformers' names to OpenAI's: three projections become one, linear projections are transposed."""
    found: State = {}
    for key, value in state.items():
        tower, _, rest = key.partition(".")
        if rest == "embeddings.position_ids" or key == "logit_scale":
            continue
        if tower in _TOWERS:
            names = _TOWERS[tower]
            block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", rest)
            if block is None:
                found[names["prefix"] + names.get(rest, rest)] = value
                continue
            number, part, kind = block.groups()
            stem = f"{names['prefix']}transformer.resblocks.{number}."
            if part.removeprefix("self_attn.") not in _ATTENTION:
                found[f"{stem}{_BLOCK.get(part, part)}.{kind}"] = value
            elif part.endswith("q_proj"):
                found[f"{stem}attn.in_proj_{kind}"] = _joined(
                    state, f"{tower}.encoder.layers.{number}.self_attn", kind, weights
                )
        else:
            projections = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
            found[projections.get(key, key)] = value.T if key in projections else value
    return found


def _joined(state: State, stem: str, kind: str, weights: Path) -> Tensor:
    import torch

    try:
        return torch.cat([state[f"{stem}.{name}.{kind}"] for name in _ATTENTION])
    except KeyError as error:
        raise UserError(
            f"The weights {weights} lack '{error.args[0]}' beside its sisters; take a whole file."
        ) from None
