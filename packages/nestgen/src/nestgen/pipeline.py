"""Sampling from Python: `NestedPipeline.from_run("runs/x")(num_images=8, seed=0).images`."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from nestgen.errors import UserError
from nestgen.recipe.locations import resolve_path, run_dir
from nestgen.recipe.recipe import Recipe
from nestgen.runs.ema_snapshots import average
from nestgen.sampling.arguments import (
    Frozen,
    check_frozen,
    image_numbers,
    label_number,
    sampling_settings,
    seed_of,
    step_argument,
)
from nestgen.sampling.captions import embed_prompts
from nestgen.sampling.conditions import ImageConditions, Request, open_conditions
from nestgen.sampling.decoder import Decoder, load_decoder
from nestgen.sampling.descent import default_device, sample_in_batches
from nestgen.sampling.hierarchies import Sigma, choose_hierarchy
from nestgen.sampling.trained import LevelSampler, find_levels, load_samplers, with_settings, with_weights
from nestgen.sharing.about import about_stores
from nestgen.sharing.folder import About, read_exported, write_exported
from nestgen.sharing.names import find_pretrained

# Gets the pipeline, the number of the step, its time in the process (1 is noise), and a mapping with `level`, `steps` (of the
# level), `indices` (of the batch's images) and `latents` (B, C, H, W), the latent of the level that the step predicted.
StepCallback = Callable[["NestedPipeline", int, float, dict[str, Any]], object]


@dataclass(frozen=True)
class Samples:
    """Sampled images.

    images   PIL images, float32 (N, height, width, 3) within 0..1, or the latents z_0 (N, C, H, W), by `output_type`
    latents  of each level by its number, (N, C, H, W) on the CPU
    seed     that gives these images again
    indices  their numbers in that seed
    labels   their classes; None for denoisers without
    """

    images: list[Image.Image] | np.ndarray | Tensor
    latents: dict[int, Tensor]
    seed: int
    indices: tuple[int, ...]
    labels: tuple[int, ...] | None


@dataclass(frozen=True)
class NestedPipeline:
    """The trained denoisers of a hierarchy and its decoder, ready to sample; made by `from_run` or `from_pretrained`.

    `exported` is what an exported folder says of itself; None for a run, whose stores say it.
    """

    recipe: Recipe
    samplers: tuple[LevelSampler, ...]
    decode: Decoder
    exported: About | None = None

    @property
    def about(self) -> About:
        """Statistics of the levels, data, names of the classes and scores, as far as they are known."""
        return about_stores(self.recipe) if self.exported is None else self.exported

    @property
    def device(self) -> torch.device:
        """Where the denoisers are."""
        return self.samplers[0].device

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        *,
        depth: int | None = None,
        sigma: float | Sequence[Sigma] | None = None,
        step: int | Literal["best"] | None = None,
        ema_length: float | None = None,
        device: str | torch.device | None = None,
        vae: str | Path | None = None,
    ) -> NestedPipeline:
        """Loads a hierarchy of a run's folder, runs/<name>, which may have been moved: the recipe lies within.

        A run may hold several. `depth` and `sigma`, the noise on all levels above z_0 or on each of them as trained, choose
        one; by default it is the deepest, with the recipe's sigmas. `step` is that of the checkpoints, "best" the one with
        the lowest distance in the previews, by default the newest. `ema_length` averages the weights over another share of
        the steps, for a run with training.ema_snapshots. The device is the GPU if there is one. `vae` is the file of the
        VAE's weights, if it is not where z_0's store said.

        Raises UserError for a folder without trained denoisers or without the VAE's weights, ValueError and TypeError for
        arguments that are wrong or choose none or several of its hierarchies.
        """
        folder = Path(run)
        recipe = choose_hierarchy(folder, depth, sigma)
        where = _device(device)
        step = step_argument(step)
        samplers = load_samplers(recipe, where, find_levels(recipe, folder, None if ema_length is not None else step))
        if ema_length is not None:
            if step == "best":
                raise ValueError("ema_length averages up to a step: give its number, or leave step out for the last")
            samplers = tuple(
                _averaged(one, folder / run_dir(recipe, one.level).name, ema_length, step) for one in samplers
            )
        decode = load_decoder(samplers[0].trained.meta["codec"], None if vae is None else Path(vae), str(where))
        return cls(recipe, samplers, decode)

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | Path,
        *,
        device: str | torch.device | None = None,
        vae: str | Path | None = None,
        **download: Any,
    ) -> NestedPipeline:
        """Loads an exported hierarchy: a folder, the name of one that ships with the package, or a repository of the Hub.

        `download` are options of huggingface_hub's `snapshot_download`, such as revision, token and cache_dir. Raises
        UserError where there is none, or where a file of it is damaged or missing.
        """
        exported = read_exported(find_pretrained(pretrained, **download))
        where = _device(device)
        samplers = load_samplers(exported.recipe, where, exported.levels)
        decode = load_decoder(exported.codec, None if vae is None else Path(vae), str(where))
        return cls(exported.recipe, samplers, decode, exported.about)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        class_names: Sequence[str] = (),
        scores: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """Writes one folder that samples the same images anywhere (sharing/folder.py says what is in it).

        `dtype` is of the weights on disk, by default that of the denoisers; torch.float16 is half as large. `scores` are
        score cards of `nestgen evaluate` by name. Raises UserError for a folder that holds anything else than an export.
        """
        about = self.about
        if class_names:
            about = replace(about, class_names=tuple(class_names))
        if scores:
            about = replace(about, scores=scores)
        write_exported(Path(folder), self.recipe, self.samplers, self.decode, about, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a hierarchy of nestgen",
        **options: Any,
    ) -> str:
        """Uploads the hierarchy to a repository of the Hugging Face Hub, made if it is not there; returns its address.

        `options` are those of `save_pretrained`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder, **options)
            return str(
                api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message, delete_patterns="*"
                )
            )

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> NestedPipeline:
        """Moves the denoisers and the decoder to a device, the denoisers to a precision; returns the pipeline itself.

        In half precision a network computes in it, everything around it in float32.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; give torch.float32, torch.bfloat16 or torch.float16")
        where = self.device if device is None else _device(device)
        for sampler in self.samplers:
            for trained in (sampler.trained, sampler.weak):
                if trained is not None:
                    trained.denoiser.to(where, dtype)
        self.decode.to(where)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_images: int | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        indices: Sequence[int] | None = None,
        label: int | str | None = None,
        prompts: str | Path | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        sigma: float | Sequence[float] | None = None,
        num_inference_steps: int | Sequence[int] | None = None,
        frozen: Frozen | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        progress: bool = True,
        **sampling: Any,
    ) -> Samples:
        """Images of a seed: the same as `nestgen sample` makes, for any batch size and device up to rounding.

        Args:
            prompt: the caption of all images, or a list with one for each; featurize embeds it.
            num_images: how many, numbers 0 to num_images - 1 of the seed; by default one, or one for each prompt.
            seed: by default the recipe's. Image i depends on (seed, i) and not on how many there are.
            generator: a seed is drawn from it, so that every call with it gives other images; excludes `seed`.
            indices: numbers of the images instead of `num_images`; for many images call with some of them at a time.
            label: class of all images, by number or name; by default one is drawn for each.
            prompts: a root of embedded captions (`featurize embed-text`), instead of `prompt`.
            guidance_scale: as in diffusers, 1 is none: the recipe's `guidance` plus 1. One for all levels, or z_0's first.
            sigma: noise on the levels above before they condition the level below; for all, or for z_1, z_2, ...
            num_inference_steps: network calls of each level; one for all levels, or z_0's first.
            frozen: latents of levels above z_0 that are not sampled, by level: (N, C, H, W), or (1, C, H, W) for all images.
            callback_on_step_end: called after each network call, see `StepCallback`. What it returns is not used.
            output_type: "pil", "np" (float32 within 0..1) or "latent" (z_0, not decoded).
            progress: whether to show a progress bar.
            **sampling: further keys of the recipe's section `sampling`: sampler="heun", batch=16, ...

        Raises TypeError or ValueError, with one sentence, for an argument that is wrong.
        """
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type is {output_type!r}; give 'pil', 'np' or 'latent'")
        settings = sampling_settings(self.recipe, guidance_scale, sigma, num_inference_steps, sampling)
        try:
            recipe = self.recipe.with_sampling(settings) if settings else self.recipe
            samplers = with_settings(self.samplers, recipe)
        except UserError as error:
            raise ValueError(str(error)) from None
        numbers = image_numbers(num_images, indices, prompt)
        frozen = check_frozen(samplers, frozen or {}, len(numbers))
        seed = seed_of(recipe, seed, generator)
        number = label_number(label, self.about.class_names if isinstance(label, str) else ())
        conditions = self._conditions(recipe, samplers, seed, prompt, number, prompts)
        sampled = [sampler for sampler in samplers if sampler.level not in frozen]
        batch, steps = recipe.sampling.batch, {sampler.level: sampler.settings.steps for sampler in sampled}
        total = sum(steps.values()) * len(numbers)
        with tqdm(total=total, unit=" steps", desc=recipe.name, disable=not progress) as bar:

            def report(level: int, indices: Sequence[int], call: int, t: float, x_BCHW: Tensor) -> None:
                bar.update(len(indices))
                if callback_on_step_end is not None:
                    values = {"level": level, "steps": steps[level], "indices": tuple(indices), "latents": x_BCHW}
                    callback_on_step_end(self, call, t, values)

            z = sample_in_batches(samplers, numbers, conditions, batch, frozen, report)
        latents = {level: z[level] for level in sorted(z)}
        label_B = conditions.labels(numbers)
        labels = None if label_B is None else tuple(label_B.tolist())
        return Samples(self._decoded(latents[0], output_type, batch), latents, seed, numbers, labels)

    def _conditions(
        self,
        recipe: Recipe,
        samplers: Sequence[LevelSampler],
        seed: int,
        prompt: str | Sequence[str] | None,
        label: int | None,
        prompts: str | Path | None,
    ) -> ImageConditions:
        if prompt is not None and prompts is not None:
            raise ValueError("prompt and prompts exclude each other; give one")
        root = None if prompts is None else resolve_path(Path(), str(prompts))
        try:
            if prompt is not None:
                root = embed_prompts(recipe, [prompt] if isinstance(prompt, str) else list(prompt))
            text = prompt if isinstance(prompt, str) else None
            return open_conditions(recipe, samplers, Request(1, seed, 1, label, prompts=root, prompt=text))
        except UserError as error:
            raise ValueError(str(error)) from None

    def _decoded(self, z_NCHW: Tensor, output_type: str, batch: int) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "latent":
            return z_NCHW
        images = np.concatenate([self.decode(part_BCHW) for part_BCHW in z_NCHW.split(batch)])
        if output_type == "np":
            return images.astype(np.float32) / 255
        return [Image.fromarray(image) for image in images]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return default_device()
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError, ValueError):
        raise ValueError(f"there is no device {device!r} here; give 'cpu', or 'cuda' where torch sees a GPU") from None
    return chosen


def _averaged(sampler: LevelSampler, folder: Path, length: float, step: int | None) -> LevelSampler:
    """A level's sampler with an average of the weights that is made of its run's snapshots."""
    try:
        tensors, meta = average(folder, length, step)
    except UserError as error:
        raise ValueError(str(error)) from None
    sha256 = hashlib.sha256(save(tensors)).hexdigest()
    return replace(sampler, trained=with_weights(meta, tensors, sha256, sampler.device))
