"""The box of an image that every encoder and codec sees, and its pixels at their size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels of the decoded image

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


@dataclass(frozen=True)
class CropRule:
    """Which box of an image every encoder and codec sees, so that their grids see the same pixels.

    Without numbers the largest centred square. With them what an encoder's published evaluation sees: torchvision's
    Resize of the short side to `resize` pixels, then CenterCrop to `centre`.
    """

    resize: int | None = None
    centre: int | None = None

    def __str__(self) -> str:
        return "square" if self.resize is None else f"resize {self.resize} centre {self.centre}"

    def box(self, width: int, height: int) -> Box:
        """The box in an image of this size."""
        if self.resize is None or self.centre is None:
            return square_box(width, height)
        return centre_box(width, height, self.resize, self.centre)


SQUARE = CropRule()


def square_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def centre_box(width: int, height: int, resize: int, centre: int) -> Box:
    """What torchvision's Resize(resize) and CenterCrop(centre) see, in pixels of the original.

    Both round: the long side down to whole pixels, the crop's corner to the nearest. So the box is a square only nearly, and
    its corners lie between pixels.
    """
    short = min(width, height)
    across, down = int(resize * width / short), int(resize * height / short)
    left, upper = round((across - centre) / 2), round((down - centre) / 2)
    x, y = width / across, height / down
    return left * x, upper * y, min((left + centre) * x, width), min((upper + centre) * y, height)


def crop(image: Image.Image, box: Box, size: int, interpolation: str) -> np.ndarray:
    """The box of an image, resized with antialiasing to (size, size, 3) uint8.

    The filter reaches over the edge of the box into the image, so this is what resizing the whole image and cropping
    afterwards gives, without making the whole. Always across first, then down: so did Pillow when the encoders were
    published; today's takes the cheaper order, and bicubic overshoot clipped in between makes it other pixels.
    """
    left, upper, right, lower = box
    if (right - left, lower - upper) == (size, size) and all(float(edge).is_integer() for edge in box):
        return np.asarray(image.crop((int(left), int(upper), int(right), int(lower))))
    filter_ = INTERPOLATIONS[interpolation]
    # Rows that the second pass can't reach need no first pass; the widest filter reaches three scaled pixels.
    reach = 4 * max(1.0, (lower - upper) / size)
    top, bottom = max(0, int(upper - reach)), min(image.height, int(lower + reach) + 1)
    rows = image.crop((0, top, image.width, bottom)) if (top, bottom) != (0, image.height) else image
    across = rows.resize((size, rows.height), filter_, box=(left, 0, right, rows.height))
    return np.asarray(across.resize((size, size), filter_, box=(0, upper - top, size, lower - top)))
