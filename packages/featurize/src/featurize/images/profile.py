"""Colours in an embedded ICC profile to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

from PIL import Image, ImageCms

SPACES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}  # a profile's colour space: Pillow's mode
# Modes whose pixels such a profile describes. Grey pictures often carry the RGB profile of the software that made them.
DESCRIBES = {"L": ("1", "L", "LA"), "RGB": ("RGB", "RGBA", "P", "PA", "1", "L", "LA"), "CMYK": ("CMYK",)}


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image as RGB in sRGB, by littleCMS' perceptual intent.

    A profile that can't be read, or that is of another colour space than the image's pixels, is ignored: what a viewer without
    colour management shows is the best there is.
    """
    found = _transform(profile)
    if found is None or image.mode not in DESCRIBES[found[0]]:
        return image.convert("RGB")
    mode, transform = found
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None  # None is of images changed in place
    return converted


@lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """(Pillow's mode of the profile's pixels, the transform to sRGB); None for a profile that can't be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = SPACES[source.profile.xcolor_space]
        # Without littleCMS' cache of the last pixel one transform may serve several threads.
        return mode, ImageCms.buildTransform(source, _srgb(), mode, "RGB", flags=ImageCms.Flags.NOCACHE)
    except (ImageCms.PyCMSError, OSError, KeyError):
        return None


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
