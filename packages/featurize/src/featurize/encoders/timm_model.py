"""Any timm backbone with a feature map: `timm:<model>`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from featurize.encoders import Encoder, EncoderSpec, read_state_dict, sha256_of, sidecar, weights_file
from featurize.errors import UserError


def build(spec: EncoderSpec, device: str) -> Encoder:
    """`timm:<model>`: the last feature map after the model's own final norm, prefix tokens dropped.

    A JSON beside the weights gives the model's arguments and the pictures' mean and std; `--model-args` goes over them.
    """
    name = spec.name.partition(":")[2]
    if spec.weights is None:
        raise UserError(
            f"The encoder {spec.name} needs its weights: --weights FILE (safetensors, or a torch state dict)."
        )
    weights = weights_file(spec.weights, spec.name)
    described = sidecar(weights)
    if described.get("model", name) != name:
        raise UserError(
            f"The weights {weights} are of '{described['model']}', not of '{name}'; use timm:{described['model']}."
        )
    return build_from(spec, name, weights, described, device)


def build_from(spec: EncoderSpec, name: str, weights: Path, described: dict[str, Any], device: str) -> Encoder:
    """The timm model `name` with a weights file and what is known about it."""
    arguments = described.get("model_args", {}) | json.loads(spec.model_args)
    model = _create(name, arguments)
    _load(model, weights)
    model.eval().requires_grad_(False).to(device)

    data = resolve_model_data_config(model)
    data |= {key: described[key] for key in ("mean", "std", "interpolation") if key in described}
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
        "norm": "the model's own final norm",
        "prefix_tokens_dropped": int(getattr(model, "num_prefix_tokens", 0)),
        "input_size": size,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "interpolation": data["interpolation"],
        "crop": "largest centred square",
        "precision": spec.precision,
    }
    return Encoder(
        name=spec.name,
        input_size=size,
        grid=grid,
        channels=channels,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
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
        channels_first = features.shape[1] == model.num_features
        return features.permute(0, 2, 3, 1) if channels_first else features
    raise UserError(
        f"The timm model {type(model).__name__} gives no feature map but a {features.ndim}-dimensional array."
    )


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


def _load(model: nn.Module, weights: Path) -> None:
    state = read_state_dict(weights)
    classifier: Any = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise UserError(
            f"The weights {weights} don't fit the model: {len(missing)} keys are missing{_first(missing)} and "
            f"{len(unexpected)} unexpected{_first(unexpected)}; check the model's name and --model-args."
        )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(
                f"The weights {weights} don't fit the model: '{key}' is {tuple(value.shape)}, "
                f"the model has {tuple(expected[key].shape)}; check --model-args (img_size, patch_size, depth...)."
            )
    model.load_state_dict(state)


def _first(keys: list[str]) -> str:
    return f" (first '{keys[0]}')" if keys else ""
