"""The folder of an exported hierarchy, which needs no run, no stores and no other machine's paths.

    config.json           format, recipe (with the sigmas as trained), levels, codec, class_names, data
    z0.safetensors, ...   the averaged weights of each level's denoiser; of a text model with its empty caption's embedding
    z0-weak.safetensors   the denoiser that a level is guided away from, if sampling.autoguide names one
    codec/                the VAE of z_0, if it is small, as diffusers saves one; of a large one config.json has the file's name
                          and digest
    features/             a store root without rows, by which `featurize extract` encodes further images (sharing/features.py)
    scores/*.json         score cards
    README.md             the model card

`levels[l]` of config.json has the shape, `weights` (their file), `meta` (the checkpoint's meta.json: denoiser, process,
training, fingerprints of the stores, step), `weak` (the same of the weak denoiser) and `statistics`: mean and std per channel
of the features before they were standardised, features = std z + mean.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nestgen.errors import UserError
from nestgen.files import read_json, sha256_of, write_json
from nestgen.recipe.recipe import Recipe, parse_recipe
from nestgen.recipe.sections import shape_name
from nestgen.runs.checkpoint import Checkpoint
from nestgen.sampling.decoder import Decoder
from nestgen.sampling.trained import LevelSampler, SavedDenoiser, SavedLevel, TrainedDenoiser
from nestgen.sharing.features import write_features
from nestgen.sharing.model_card import model_card
from nestgen.sharing.names import CODEC
from nestgen.sharing.portable import portable

FORMAT = "nestgen-hierarchy/1"
LARGE = 64 * 2**20  # bytes from which a codec is named, not copied


@dataclass(frozen=True)
class About:
    """What is known of a hierarchy besides what samples it.

    statistics   mean and std of each level above z_0, by its number
    data         where the images were, how many, the encoder
    class_names  by class number
    scores       score cards by name
    """

    statistics: Mapping[int, dict[str, list[float]]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    scores: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """An exported hierarchy on disk; `levels` load as those of a run do."""

    recipe: Recipe
    levels: tuple[SavedLevel, ...]
    codec: dict[str, Any]
    about: About


def write_exported(
    out: Path,
    recipe: Recipe,
    samplers: Sequence[LevelSampler],
    decoder: Decoder,
    about: About,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a hierarchy to a folder, in place of an earlier export there. `dtype` is of the weights on disk.

    Raises UserError for a folder that holds anything else, and for class names or a precision that do not fit.
    """
    if about.class_names and len(about.class_names) != recipe.denoiser.labels:
        raise UserError(
            f"there are {len(about.class_names)} class names, but the denoisers know {recipe.denoiser.labels} classes; "
            "give one name a line, in the order of the class numbers"
        )
    with _replaced(out) as draft:
        levels = [_write_level(draft, sampler, about, dtype) for sampler in samplers]
        config = {
            "format": FORMAT,
            "nestgen": importlib.metadata.version("nestgen"),
            "recipe": _recipe_document(recipe),
            "levels": levels,
            "codec": _write_codec(draft, samplers[0].trained.meta["codec"], decoder),
            "class_names": list(about.class_names),
            "data": portable(dict(about.data)),
        }
        write_json(draft / "config.json", config)
        write_features(recipe, draft)
        scores = {name: portable(card) for name, card in about.scores.items()}
        for name, card in scores.items():
            write_json(draft / "scores" / f"{name}.json", card)
        (draft / "README.md").write_text(model_card(config, scores), encoding="utf-8")


def read_exported(folder: Path) -> Exported:
    """Opens an exported folder. Raises UserError for a folder that is none, or that is damaged."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not an exported hierarchy: it has no config.json; make one with `nestgen export`")
    config = read_json(folder / "config.json")
    if config.get("format") != FORMAT:
        raise UserError(f"{folder} has format {config.get('format')}, and this nestgen reads {FORMAT}; export it again")
    try:
        codec = dict(config["codec"])
        weights = codec.get("weights", "")  # `codec.safetensors` in earlier exports, or a file that somebody put here
        if (file := folder / (weights if weights == CODEC else Path(weights).name)).is_file():
            codec["weights"] = str(file)
        levels = tuple(
            SavedLevel(
                number,
                _saved(folder, entry, codec if number == 0 else None),
                None if entry["weak"] is None else _saved(folder, entry["weak"], codec if number == 0 else None),
            )
            for number, entry in enumerate(config["levels"])
        )
        statistics = {
            number: entry["statistics"] for number, entry in enumerate(config["levels"]) if entry["statistics"]
        }
        scores = {path.stem: read_json(path) for path in sorted((folder / "scores").glob("*.json"))}
        about = About(statistics, config["data"], tuple(config["class_names"]), scores)
        # Relative to a folder that can be written to: embedded prompts are cached there.
        recipe = parse_recipe(config["recipe"], folder / "config.json").rooted(_cache())
        root = recipe.features.model_copy(update={"out": str(folder.resolve() / "features")})
        recipe = recipe.model_copy(update={"features": root})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'config.json'} is damaged ({type(error).__name__}); copy or export it again"
        ) from None
    return Exported(recipe, levels, codec, about)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestgen"


def _saved(folder: Path, entry: dict[str, Any], codec: dict[str, Any] | None) -> SavedDenoiser:
    name = entry["weights"]
    if Path(name).name != name:
        raise UserError(f"config.json of {folder} names {name}, which is not in that folder; do not use it")
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}, which its config.json names; copy or export it again")
    meta = {**entry["meta"], "codec": codec, "sha256": {name: entry["sha256"]}}
    return SavedDenoiser(Checkpoint(folder, meta), name.removesuffix(".safetensors"))


def _write_level(draft: Path, sampler: LevelSampler, about: About, dtype: torch.dtype | None) -> dict[str, Any]:
    """Writes the weights of a level; returns its entry in config.json."""
    name, weak = f"z{sampler.level}", sampler.weak
    return {
        "shape": shape_name(sampler.config.shape),
        **_write_weights(draft / f"{name}.safetensors", sampler.trained, dtype),
        "weak": None if weak is None else _write_weights(draft / f"{name}-weak.safetensors", weak, dtype),
        "statistics": about.statistics.get(sampler.level),
    }


def _write_weights(file: Path, trained: TrainedDenoiser, dtype: torch.dtype | None) -> dict[str, Any]:
    tensors = {name: value.detach().cpu().contiguous() for name, value in trained.denoiser.state_dict().items()}
    if dtype is not None:
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        if not all(value.isfinite().all() for value in tensors.values()):
            raise UserError(
                f"some weights of {file.stem} are too large for {str(dtype).removeprefix('torch.')}; export float32"
            )
    save_file(tensors, file)
    file.chmod(0o644)  # safetensors makes files that only their owner reads
    of_files = ("format", "files", "sha256", "meta_sha256", "codec")  # the codec has its own place in config.json
    meta = {key: value for key, value in trained.meta.items() if key not in of_files}
    return {"weights": file.name, "sha256": sha256_of(file), "meta": portable(meta)}


def _write_codec(draft: Path, codec: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    """Copies a small VAE; returns the codec with the file's name in place of its path."""
    document: dict[str, Any] = portable(dict(codec))
    file = decoder.file
    if file is not None and file.suffix == ".safetensors" and file.stat().st_size < LARGE:
        (draft / CODEC).parent.mkdir()
        shutil.copyfile(file, draft / CODEC)
        if "config" in document:
            text = json.dumps(document["config"], indent=1) + "\n"
            (draft / CODEC).with_name("config.json").write_text(text, encoding="utf-8")
        document["weights"] = CODEC
    return document


def _recipe_document(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a JSON document that reads as the same recipe: without what belongs to other stores or the workflow."""
    document: dict[str, Any] = recipe.model_dump(exclude_unset=True, exclude={"grid", "evaluation"})
    document["features"]["out"] = "features"
    for level in document["levels"]:
        level["shape"] = shape_name(level["shape"])
    if (text := document.get("denoiser", {}).get("text")) is not None:
        document["denoiser"]["text"] = shape_name(text)
    plain: dict[str, Any] = portable(document)
    return plain


@contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """A draft folder that takes the place of `out` when the block ends without an error."""
    out = out.resolve()  # it may be the working directory, or a link
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not _is_export(out):
        raise UserError(f"{out} is not empty and no exported hierarchy; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    draft.chmod(0o755)
    try:
        yield draft
        earlier = draft.with_name(f"{draft.name}-earlier")
        if out.is_dir():
            out.rename(earlier)
        draft.rename(out)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_export(folder: Path) -> bool:
    try:
        return read_json(folder / "config.json").get("format") == FORMAT
    except UserError:
        return False
