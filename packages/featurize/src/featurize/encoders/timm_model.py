"""Any timm backbone with a feature map: `timm:<model>`. timm itself says what a model is, and is asked once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurize.checkpoints.downloads import RemoteFile, find_weights
from featurize.checkpoints.files import fit, read_state_dict, sha256_of, sidecar
from featurize.encoders.encoder import (
    RESAMPLE,
    Encoder,
    EncoderDescription,
    EncoderSpec,
    Kind,
    check_argument,
    loaded,
)
from featurize.errors import UserError, explain_memory_error
from featurize.execution.precision import convert_weights
from featurize.images.crop import INTERPOLATIONS, CropRule
from featurize.io.files import json_sha256, read_json, write_json
from featurize.io.home import cache_folder
from featurize.versions import version

if TYPE_CHECKING:
    from torch import Tensor, nn


def describe(spec: EncoderSpec) -> EncoderDescription:
    """`timm:<model>`: the last feature map after the model's own final norm where it has one, prefix tokens dropped.

    A JSON beside the weights gives the model's arguments and the images' mean and std; `--model-args` overrides them.
    """
    name = spec.name.partition(":")[2]
    weights = find_weights(spec.weights, None if spec.weights is not None else published_file(name), spec.name)
    beside = sidecar(weights)
    if beside.get("model", name) != name:
        raise UserError(
            f"The weights {weights} are of '{beside['model']}', not of '{name}'; use timm:{beside['model']}."
        )
    arguments = beside.get("model_args", {}) | json.loads(spec.model_args)
    facts = _remembered(_model_facts, name, arguments, beside.get("input_size"))
    data = facts["data"] | {key: beside[key] for key in ("mean", "std", "interpolation") if key in beside}
    if data["interpolation"] not in INTERPOLATIONS:
        raise UserError(
            f"The encoder {spec.name} resizes by '{data['interpolation']}'; known are {', '.join(INTERPOLATIONS)}."
        )
    size, (height, width, channels) = facts["input_size"], facts["output"]
    # timm's own evaluation: the short side to size / crop_pct, then the centre. Its other crop modes are no such box.
    centred = data["crop_mode"] == "center" and "mean" not in beside
    return describe_model(
        spec, name, arguments, weights, size, (height, width), channels, data,
        norm=facts["norm"],
        prefix_tokens=facts["prefix_tokens"],
        official_crop=CropRule(math.floor(size / data["crop_pct"]), size) if centred else None,
    )  # fmt: skip


def _remembered(question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a function that asks timm, in JSON's types; from a file where an earlier run asked the same.

    It depends on timm's version and the arguments alone. Importing timm takes seconds, so that describing a model whose
    store is complete would take longer than all else.
    """
    return _answer(question, json.dumps(arguments, sort_keys=True))


@lru_cache(maxsize=8)  # a worker describes its encoder at each block
def _answer(question: Callable[..., Any], arguments: str) -> Any:
    key = json.dumps([question.__name__, version("timm"), json.loads(arguments)], sort_keys=True)
    path = cache_folder() / "timm" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, UserError, KeyError, TypeError):  # none yet, or a damaged one
        document = read_json(path)
        if document["sha256"] == json_sha256(document["answer"]):
            return document["answer"]
    answer = question(*json.loads(arguments))
    with suppress(OSError):  # without a place for it timm is asked again next time
        write_json(path, {"answer": answer, "sha256": json_sha256(answer)})
    return answer


def _model_facts(name: str, arguments: dict[str, Any], input_size: int | None) -> dict[str, Any]:
    """The input's side and statistics, the map's (H, W, D), its norm and prefix tokens.

    The model is built and run once on torch's meta device, which holds shapes and no values.
    """
    import torch
    from timm.data import resolve_model_data_config

    with torch.device("meta"):
        model = _create(name, arguments).eval()
        data = resolve_model_data_config(model)
        # A model built for another size than the one its configuration was published with says so itself.
        fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = int(fixed[0] if fixed else input_size or data["input_size"][-1])
        with torch.inference_mode():
            _, *output = feature_map(model, torch.zeros(1, 3, size, size)).shape
    return {
        "input_size": size,
        "output": [int(length) for length in output],
        "norm": final_norm(model),
        "prefix_tokens": int(getattr(model, "num_prefix_tokens", 0)),
        "data": {
            "mean": list(data["mean"]),
            "std": list(data["std"]),
            "interpolation": data["interpolation"],
            "crop_pct": data["crop_pct"],
            "crop_mode": data.get("crop_mode", "center"),
        },
    }


def describe_model(
    spec: EncoderSpec,
    name: str,
    arguments: dict[str, Any],
    weights: Path,
    size: int,
    grid: tuple[int, int],
    channels: int,
    data: dict[str, Any],
    norm: str,
    prefix_tokens: int,
    official_crop: CropRule | None,
) -> EncoderDescription:
    """The description of the timm model `name`; `data` holds mean, std and interpolation."""
    check_argument(spec, RESAMPLE, arguments.get(RESAMPLE, False), False)
    identity = {
        "name": spec.name,
        "model": name,
        "model_args": arguments,
        "weights_sha256": sha256_of(weights),
        "layer": "last",
        "norm": norm,
        "prefix_tokens_dropped": prefix_tokens,
        "input_size": size,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "interpolation": data["interpolation"],
        "precision": spec.precision,
    }
    return EncoderDescription(
        name=spec.name,
        input_size=size,
        grid=grid,
        channels=channels,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        official_crop=official_crop,
        weights=weights,
        network=arguments,
        identity=identity,
    )


def build(spec: EncoderSpec, description: EncoderDescription, device: str) -> Encoder:
    """timm's model with the weights."""
    model, weights = _create(description.identity["model"], description.network), description.weights_file
    state = _without_classifier(model, read_state_dict(weights))
    if description.network.get(RESAMPLE):
        from featurize.encoders.vit import with_resampled_positions

        prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 0))
        state = with_resampled_positions(state, "pos_embed", description.grid, prefix, weights)
    fit(
        model, state, weights,
        f"check the model's name and --model-args (img_size, patch_size, depth...; {RESAMPLE}=true for other positions)",
    )  # fmt: skip
    model.eval().requires_grad_(False).to(device)
    convert_weights(model, spec.precision)
    return loaded(description, lambda x_BCHW: feature_map(model, x_BCHW))


def published_file(name: str) -> RemoteFile | None:
    """Where timm's authors publish the weights of a model, None where they publish none."""
    repository = _remembered(_published_repository, name)
    if repository is None:
        return None
    return RemoteFile(
        f"https://huggingface.co/{repository}/resolve/main/model.safetensors",
        f"{repository.replace('/', '-')}.safetensors",
    )


def _published_repository(name: str) -> str | None:
    import timm

    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError:
        return None
    if published is None or not published.hf_hub_id:
        return None
    repository = str(published.hf_hub_id)
    if repository.endswith("/"):
        repository += f"{published.architecture}.{published.tag}" if published.tag else str(published.architecture)
    return repository


def feature_map(model: nn.Module, x_BCHW: Tensor) -> Tensor:
    """The model's last feature map f_BHWD: patch tokens laid on their grid, or a convolutional map with channels last.

    Raises UserError for a model that gives neither, or whose grid timm does not tell.
    """
    features = model.forward_features(x_BCHW)  # type: ignore[operator]
    shape = tuple(getattr(features, "shape", ()))  # some give a list
    if len(shape) == 3:
        tokens_BND = features[:, getattr(model, "num_prefix_tokens", 0) :]
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        if grid is not None and math.prod(grid) == tokens_BND.shape[1]:
            return tokens_BND.unflatten(1, (int(grid[0]), int(grid[1])))
    if len(shape) == 4:
        last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        return features if last else features.permute(0, 2, 3, 1)
    found = f"an array of shape {shape}" if shape else f"a {type(features).__name__}"
    raise UserError(
        f"The timm model {type(model).__name__} gives {found} instead of a feature map on a known grid; choose a model with a "
        "map of tokens or of convolutions."
    )


def final_norm(model: nn.Module) -> str:
    """What norm the last feature map has passed; timm keeps that of some models for after the pooling."""
    from torch import nn

    norm = getattr(model, "norm", None)
    return f"final {type(norm).__name__}" if norm is not None and not isinstance(norm, nn.Identity) else "none"


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    # The classifier is never needed, whatever number of classes the weights were trained with.
    arguments = {key: value for key, value in arguments.items() if key != RESAMPLE} | {"num_classes": 0}
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except RuntimeError as error:
        if explain_memory_error(error):
            raise
        near = timm.list_models(f"*{name.split('.')[0][:8]}*")[:3]
        hint = f"; near are {', '.join(near)}" if near else ""
        raise UserError(f"timm has no model '{name}' ({str(error).splitlines()[0]}){hint}.") from None
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"timm can't build '{name}' with {arguments}: {str(error).splitlines()[0]}.") from None


def _without_classifier(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    classifier: Any = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {key: value for key, value in state.items() if not key.startswith(tuple(f"{head}." for head in heads))}


KIND = Kind(describe, build, any_variant="MODEL")
