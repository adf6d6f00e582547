"""The images of a page: sampled on request or brought, kept with their latents so that others can be made from them."""

from __future__ import annotations

import base64
import io
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nestgen.errors import UserError
from nestgen.explore.encode import cannot_encode, encode_image
from nestgen.pipeline import NestedPipeline
from nestgen.recipe.locations import store_root
from nestgen.recipe.sections import shape_name
from nestgen.sampling.arguments import whole_number
from nestgen.sampling.real import open_real, real_latents
from nestgen.scoring.hierarchy_sheet import slerp
from nestgen.scoring.memorisation import nearest_rows
from nestgen.stores.store import Store

KEPT = 1000  # images whose latents stay in memory
MOST = 64  # images of one request
LARGE = 2**31  # bytes from which a store is not searched while somebody waits


@dataclass(frozen=True)
class Shown:
    """An image of the page: its latents (C, H, W) by level, what its noise was drawn from, and its class if it has one."""

    latents: dict[int, Tensor]
    seed: int
    index: int
    label: int | None


@dataclass
class Session:
    """A pipeline and the images that a page has seen; one request at a time."""

    pipe: NestedPipeline
    images: OrderedDict[int, Shown] = field(default_factory=OrderedDict)  # the one used last at the end
    numbers: Iterator[int] = field(default_factory=itertools.count)
    last_seed: int = 0
    lock: Lock = field(default_factory=Lock)

    def answer(self, name: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the page is told. Raises TypeError, ValueError or UserError for a wrong request."""
        answers = {
            "describe": lambda request: self.describe(),
            "images": self.draw,
            "nearest": self.nearest,
            "encode": self.encode,
        }
        if name not in answers:
            raise ValueError(f"there is no request {name!r}")
        with self.lock:
            return answers[name](request)

    def describe(self) -> dict[str, Any]:
        """The hierarchy: levels from z_0 up with their settings, classes, and whether real rows are at hand."""
        levels = []
        sigmas = dict(zip(self.pipe.recipe.conditions(0), self.pipe.samplers[0].settings.sigmas))
        for sampler in self.pipe.samplers:
            settings = sampler.settings
            sigmas |= dict(zip(self.pipe.recipe.conditions(sampler.level), settings.sigmas))
            guidance = None if settings.guidance is None else 1 + settings.guidance
            levels.append({"shape": shape_name(sampler.config.shape), "guidance": guidance, "steps": settings.steps})
        for level, entry in enumerate(levels):
            entry["sigma"] = sigmas.get(level, 0.0)
        names = self.pipe.about.class_names
        classes = list(names) or [f"class {number}" for number in range(self.pipe.recipe.denoiser.labels)]
        return {
            "name": self.pipe.recipe.name,
            "levels": levels,
            "classes": classes,
            "rows": bool(self.searched),
            "cannot_encode": cannot_encode(self.pipe.recipe),
            "seed": self.pipe.recipe.seed,
        }

    def draw(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`count` images.

        `frozen` is what levels above z_0 are taken from, by level: {"image": A}, or {"from": A, "to": B} for the way between
        two images. The noise of the other levels is that of images 0, 1, ... of `seed`; of the image `noise`, if it is
        given; or else of a seed that was not used before. `settings` are guidance_scale (decayed, as `describe` tells it),
        sigma, num_inference_steps and label, by default that of the image which the highest frozen level is from.
        """
        count = whole_number("count", request.get("count", 1), 1)
        if count > MOST:
            raise ValueError(f"count is {count}; give {MOST} at most")
        sources = {int(level): source for level, source in request.get("frozen", {}).items()}
        frozen = {level: self._frozen(level, source, count) for level, source in sources.items()}
        settings = dict(request.get("settings", {}))
        if (
            settings.get("label") is None and sources
        ):  # else the levels below would be of another class than those above
            highest = sources[max(sources)]
            settings["label"] = self._image(highest.get("image", highest.get("from"))).label
        if "guidance_scale" in settings:
            settings["guidance_decay"] = 1.0
        seed, indices = request.get("seed"), list(range(count))
        if (same := request.get("noise")) is not None:
            origin = self._image(same)
            seed, indices = origin.seed, [origin.index] * count
        elif seed is None:
            seed = max(self.last_seed, self.pipe.recipe.seed) + 1
        found = self.pipe(seed=seed, indices=indices, frozen=frozen, progress=False, **settings)
        self.last_seed = max(self.last_seed, found.seed)
        labels = found.labels or (None,) * count
        shown = []
        for position, (image, index, label) in enumerate(zip(found.images, found.indices, labels)):
            latents = {level: z_NCHW[position].clone() for level, z_NCHW in found.latents.items()}
            shown.append({"id": self._keep(Shown(latents, found.seed, index, label)), "png": png(image)})
        return {"images": shown, "seed": found.seed}

    def nearest(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The training rows nearest to an image by each level, as their z_0 decodes."""
        image, count = self._image(request.get("image")), whole_number("count", request.get("count", 4), 1)
        rows = {}
        for level, store in self.searched.items():
            distance_1K, row_1K = nearest_rows(image.latents[level][None], store, min(count, store.rows), 0)
            decoded = self.pipe.decode(real_latents(self.stores[0], row_1K[0].tolist(), 0))
            rows[level] = [
                {"row": row, "distance": distance, "png": png(Image.fromarray(pixels))}
                for row, distance, pixels in zip(row_1K[0].tolist(), distance_1K[0].tolist(), decoded)
            ]
        return {"levels": rows}

    def encode(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """An image that somebody brings, `data` in base64: encoded as the training images were, and shown as its z_0 decodes.

        Drawing from it, the noise of levels that are not frozen to it is that of image 0 of the recipe's seed.
        """
        latents = encode_image(self.pipe.recipe, base64.b64decode(str(request.get("data", ""))))
        shown = Image.fromarray(self.pipe.decode(latents[0][None])[0])
        number = self._keep(Shown(latents, self.pipe.recipe.seed, 0, None))
        return {"images": [{"id": number, "png": png(shown)}]}

    @cached_property
    def stores(self) -> dict[int, Store]:
        """The training stores by level; none where they are not at hand."""
        recipe, stores = self.pipe.recipe, {}
        try:
            for sampler in self.pipe.samplers:
                fingerprint = sampler.trained.meta["stores"][f"z{sampler.level}"]
                stores[sampler.level] = open_real(recipe, sampler.level, store_root(recipe), fingerprint)
        except UserError:
            return {}
        if not all(store.rows for store in stores.values()):  # an exported hierarchy has the stores' metadata alone
            return {}
        return stores

    @property
    def searched(self) -> dict[int, Store]:
        """Those in which nearest rows are looked for: not the very large ones."""
        return {level: store for level, store in self.stores.items() if store.nbytes < LARGE}

    def _frozen(self, level: int, source: Mapping[str, Any], count: int) -> Tensor:
        """Latents (count, C, H, W) of a level."""
        if "image" in source:
            return self._latent(source["image"], level).expand(count, -1, -1, -1)
        a_CHW, b_CHW = (self._latent(source.get(end), level) for end in ("from", "to"))
        return torch.stack([slerp(a_CHW, b_CHW, share) for share in torch.linspace(0, 1, count).tolist()])

    def _latent(self, image: object, level: int) -> Tensor:
        latents = self._image(image).latents
        if level not in latents:
            raise ValueError(f"there is no level {level}; they are 0 to {len(latents) - 1}")
        return latents[level]

    def _image(self, number: object) -> Shown:
        if not isinstance(number, int) or number not in self.images:
            raise ValueError(f"image {number} is not known any more; draw or bring images again")
        self.images.move_to_end(number)
        return self.images[number]

    def _keep(self, image: Shown) -> int:
        number = next(self.numbers)
        self.images[number] = image
        if len(self.images) > KEPT:
            self.images.popitem(last=False)
        return number


def png(image: Image.Image) -> str:
    """An image as a data: address."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
