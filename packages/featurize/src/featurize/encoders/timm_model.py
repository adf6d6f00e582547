"""Any timm backbone with a feature map: `timm:<model>`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from featurize.checkpoints.downloads import Place, find_weights
from featurize.checkpoints.files import fit, read_state_dict, sha256_of, sidecar
from featurize.encoders import Encoder, EncoderSpec, Kind
from featurize.errors import UserError
from featurize.images.crop import INTERPOLATIONS, CropRule


def build(spec: EncoderSpec, device: str) -> Encoder:
    """`timm:<model>`: the last feature map after the model's own final norm where it has one, prefix tokens dropped.

    A JSON beside the weights gives the model's arguments and the pictures' mean and std; `--model-args` goes over them.
    """
    name = spec.name.partition(":")[2]
    weights = find_weights(spec.weights, place_of(name), spec.name)
    described = sidecar(weights)
    if described.get("model", name) != name:
        raise UserError(
            f"The weights {weights} are of '{described['model']}', not of '{name}'; use timm:{described['model']}."
        )
    return build_from(spec, name, weights, described, device)


def place_of(name: str) -> Place | None:
    """Where timm's authors keep the weights of a model, None where they keep none."""
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError:
        return None
    if published is None or not published.hf_hub_id:
        return None
    repository = published.hf_hub_id
    if repository.endswith("/"):
        repository += f"{published.architecture}.{published.tag}" if published.tag else str(published.architecture)
    address = f"https://huggingface.co/{repository}/resolve/main/model.safetensors"
    return Place(address, f"{repository.replace('/', '-')}.safetensors")


def build_from(spec: EncoderSpec, name: str, weights: Path, described: dict[str, Any], device: str) -> Encoder:
    """The timm model `name` with a weights file and what is known about it."""
    arguments = described.get("model_args", {}) | json.loads(spec.model_args)
    model = _create(name, arguments)
    fit(
        model,
        _without_classifier(model, read_state_dict(weights)),
        weights,
        "check the model's name and --model-args (img_size, patch_size, depth...)",
    )
    model.eval().requires_grad_(False).to(device)

    data = resolve_model_data_config(model)
    data |= {key: described[key] for key in ("mean", "std", "interpolation") if key in described}
    if data["interpolation"] not in INTERPOLATIONS:
        raise UserError(f"The encoder {spec.name} resizes by '{data['interpolation']}', which is not known here.")
    # A model built for another size than the one its configuration was published with says so itself.
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = int(fixed[0] if fixed else described.get("input_size", data["input_size"][-1]))
    with torch.inference_mode():
        probe = feature_map(model, torch.zeros(1, 3, size, size, device=device))
    grid, channels = (int(probe.shape[1]), int(probe.shape[2])), int(probe.shape[3])
    identity = {
        "name": spec.name,
        "model": name,
        "model_args": arguments,
        "weights_sha256": sha256_of(weights),
        "layer": "last",
        "norm": final_norm(model),
        "prefix_tokens_dropped": int(getattr(model, "num_prefix_tokens", 0)),
        "input_size": size,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "interpolation": data["interpolation"],
        "precision": spec.precision,
    }
    # timm's own evaluation: the short side to size / crop_pct, then the centre. Its other crop modes are no such box.
    centred = data.get("crop_mode", "center") == "center" and "mean" not in described
    return Encoder(
        name=spec.name,
        input_size=size,
        grid=grid,
        channels=channels,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        official_crop=CropRule(math.floor(size / data["crop_pct"]), size) if centred else None,
        weights=weights,
        forward=lambda x_BCHW: feature_map(model, x_BCHW),
        identity=identity,
    )


def feature_map(model: nn.Module, x_BCHW: Tensor) -> Tensor:
    """The model's last feature map f_BHWD: patch tokens laid on their grid, or a convolutional map with channels last."""
    features = model.forward_features(x_BCHW)  # type: ignore[operator]
    if features.ndim == 3:
        tokens_BND = features[:, getattr(model, "num_prefix_tokens", 0) :]
        height, width = model.patch_embed.grid_size  # type: ignore[union-attr, misc]
        return tokens_BND.unflatten(1, (int(height), int(width)))
    if features.ndim == 4:
        last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        return features if last else features.permute(0, 2, 3, 1)
    raise UserError(
        f"The timm model {type(model).__name__} gives no feature map but a {features.ndim}-dimensional array."
    )


def final_norm(model: nn.Module) -> str:
    """What norm the last feature map has passed; timm keeps that of some models for after the pooling."""
    norm = getattr(model, "norm", None)
    return f"final {type(norm).__name__}" if norm is not None and not isinstance(norm, nn.Identity) else "none"


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    # The classifier is never needed, whatever number of classes the weights were trained with.
    arguments = arguments | {"num_classes": 0}
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except RuntimeError as error:
        near = timm.list_models(f"*{name.split('.')[0][:8]}*")[:3]
        hint = f"; near are {', '.join(near)}" if near else ""
        raise UserError(f"timm has no model '{name}' ({str(error).splitlines()[0]}){hint}.") from None
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"timm can't build '{name}' with {arguments}: {str(error).splitlines()[0]}.") from None


def _without_classifier(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    classifier: Any = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {key: value for key, value in state.items() if not key.startswith(tuple(f"{head}." for head in heads))}


KIND = Kind(build, any_variant="MODEL")
