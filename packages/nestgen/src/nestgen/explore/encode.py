"""An image that somebody brings, as the latents of every level: by `featurize extract`, as the training images were."""

from __future__ import annotations

import io
import json
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nestgen.errors import UserError
from nestgen.recipe.locations import store_root
from nestgen.recipe.recipe import Recipe
from nestgen.sampling.featurize_command import find_featurize
from nestgen.sampling.real import open_real, real_latents
from nestgen.sharing.features import extraction_recipe
from nestgen.stores.store import Store

SUFFIXES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",  # what Pillow calls a JPEG with further pictures in it, such as many phones write
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
}


def cannot_encode(recipe: Recipe) -> str:
    """Why images can't be encoded for a hierarchy, in a sentence; nothing where they can."""
    if len(recipe.levels) == 1:
        return "A hierarchy of one level has no levels to take from an image."
    try:
        extraction_recipe(recipe)
    except (UserError, KeyError):
        return "Its stores are not at hand, which say how images are encoded; a newer export has them in features/."
    return "" if find_featurize() else "Images are encoded by featurize, which is not installed."


def encode_image(recipe: Recipe, image: bytes) -> dict[int, Tensor]:
    """Latents (C, H, W) of an image file's content by level, as the denoisers see them.

    Raises UserError for what is no image, and where `featurize` can't encode it.
    """
    if reason := cannot_encode(recipe):
        raise UserError(reason)
    suffix = _suffix(image)
    with tempfile.TemporaryDirectory(prefix="nestgen-image-") as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "images" / f"image{suffix}").write_bytes(image)
        root = store_root(recipe).absolute()
        settings = root / "nested.yaml"  # of an export
        if not settings.is_file():
            settings = folder / "nested.yaml"
            settings.write_text(json.dumps(extraction_recipe(recipe)), encoding="utf-8")
        words = [f"folder:{folder / 'images'}", "--recipe", settings, "--basis", root, "--out", folder / "store"]
        command = [str(find_featurize()), "extract", *map(str, words), "--workers", "0"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it ended without a word"]
            reason = lines[-1].removeprefix("error: ").partition(";")[0]  # then: advice on files that are gone by now
            raise UserError(f"featurize could not encode the image: {reason}")
        stores: dict[int, Store] = {
            level: open_real(recipe, level, folder / "store") for level in range(len(recipe.levels))
        }
        return {level: real_latents(store, [0], recipe.seed)[0] for level, store in stores.items()}


def _suffix(image: bytes) -> str:
    """The ending of a file with such content."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return SUFFIXES[str(opened.format)]
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        raise UserError("this is no image that can be read; choose a JPEG, PNG or WebP file") from None
    except KeyError:
        raise UserError("images of this kind are not read; choose a JPEG, PNG or WebP file") from None
