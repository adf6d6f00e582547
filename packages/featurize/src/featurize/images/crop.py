"""The part of an image that every encoder and codec sees, and its pixels at their size."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from PIL import Image

from featurize.errors import UserError

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels of the decoded image


class ImageLike(Protocol):
    """What a crop asks of an image: Pillow's own methods, which `on_device.DeviceImage` has too."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    def crop(self, box: Box) -> Self: ...
    def resize(self, size: tuple[int, int], resample: int, box: Box | None = None) -> Self: ...


AnyImage = TypeVar("AnyImage", bound=ImageLike)

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
    Resize of the short side to `resize` pixels, then CenterCrop to `centre`. The encoder gets the very pixels that torchvision
    gives; a network of another size gets the same box. `interpolation` is the published filter where it isn't the one that the
    encoder is given squares by. `between_pixels` is the rule of featurize 0.1.0: the encoder gets the box too, whose edges lie
    between pixels, so that some values differ by a grey level.
    """

    resize: int | None = None
    centre: int | None = None
    interpolation: str | None = None
    between_pixels: bool = False

    def __str__(self) -> str:
        if self.resize is None:
            return "square"
        if self.between_pixels:
            return f"resize {self.resize} centre {self.centre}"
        filter_ = f", {self.interpolation}" if self.interpolation else ""
        return f"Resize({self.resize}{filter_}) CenterCrop({self.centre})"

    def box(self, width: int, height: int) -> Box:
        """The box in an image of this size."""
        if self.resize is None or self.centre is None:
            return square_box(width, height)
        return centre_box(width, height, self.resize, self.centre)

    def least(self, spec: InputSpec) -> int:
        """The short side in pixels of the smallest image whose crop need not be made larger for a network that takes `spec`."""
        if spec.own_crop != "same" or self.resize is None or self.centre is None:
            return spec.side
        return -(-self.resize * spec.side // self.centre)

    def side(self, side: int) -> int:
        """Pixels a side of what an encoder of `side` is given: a published crop has its own size."""
        return side if self.centre is None or self.between_pixels else self.centre


SQUARE = CropRule()


class InputSpec(NamedTuple):
    """What a network takes: the crop's side in pixels and the filter; `own_crop` names one of OWN_CROPS, "same" the rule
    of the store root."""

    side: int
    interpolation: str
    own_crop: str = "same"


def parse_rule(text: str) -> CropRule:
    """The rule that a ledger names. Raises UserError for one that this version does not know."""
    if text == str(SQUARE):
        return SQUARE
    if former := re.fullmatch(r"resize (\d+) centre (\d+)", text):
        return CropRule(int(former[1]), int(former[2]), between_pixels=True)
    if found := re.fullmatch(r"Resize\((\d+)(?:, (\w+))?\) CenterCrop\((\d+)\)", text):
        return CropRule(int(found[1]), int(found[3]), found[2])
    raise UserError(f"The crop rule '{text}' is not known here; install the version of featurize that made the store.")


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
    across, down, left, upper = _resized_and_corner(width, height, resize, centre)
    x, y = width / across, height / down
    return left * x, upper * y, min((left + centre) * x, width), min((upper + centre) * y, height)


def _resized_and_corner(width: int, height: int, resize: int, centre: int) -> tuple[int, int, int, int]:
    """(width, height) after Resize(resize), then (left, upper) of CenterCrop(centre)."""
    short = min(width, height)
    across, down = int(resize * width / short), int(resize * height / short)
    return across, down, round((across - centre) / 2), round((down - centre) / 2)


def crop(image: Image.Image, rule: CropRule, spec: InputSpec) -> np.ndarray:
    """What a network that takes `spec` sees of an RGB image in a store root of this rule: (side, side, 3) uint8."""
    return np.asarray(cropped(image, rule, spec))


def cropped(image: AnyImage, rule: CropRule, spec: InputSpec) -> AnyImage:
    """`crop`, of and as an image of any kind."""
    if spec.own_crop != "same":
        return OWN_CROPS[spec.own_crop](image, spec.side)
    if rule.resize is not None and not rule.between_pixels and spec.side == rule.centre:
        return resize_then_centre(image, rule.resize, spec.side, rule.interpolation or spec.interpolation)
    return resize_box(image, rule.box(*image.size), spec.side, spec.interpolation)


def resize_then_centre(image: AnyImage, resize: int, centre: int, interpolation: str) -> AnyImage:
    """The pixels of torchvision's Resize(resize) and CenterCrop(centre).

    Always across first, then down: so did Pillow when the encoders were published; today's takes the cheaper order, and
    bicubic overshoot clipped in between makes it other pixels. Each pass resizes whole lines, because Pillow rounds its
    filter otherwise where a box lies between pixels; lines that are cropped away afterwards are not resized downwards.
    """
    across, down, left, upper = _resized_and_corner(*image.size, resize, centre)
    filter_ = INTERPOLATIONS[interpolation]
    columns = image.resize((across, image.height), filter_).crop((left, 0, left + centre, image.height))
    return columns.resize((centre, down), filter_).crop((0, upper, centre, upper + centre))


def resize_box(image: AnyImage, box: Box, side: int, interpolation: str) -> AnyImage:
    """The box of an image, resized with antialiasing to `side` pixels.

    The filter reaches over the edge of the box into the image, so this is what resizing the whole image and cropping
    afterwards gives to within a grey level, without making the whole. Across first, then down, as in `resize_then_centre`.
    """
    left, upper, right, lower = box
    if (right - left, lower - upper) == (side, side) and all(float(edge).is_integer() for edge in box):
        return image.crop((int(left), int(upper), int(right), int(lower)))
    filter_ = INTERPOLATIONS[interpolation]
    # Rows that the second pass can't reach need no first pass; the widest filter reaches three scaled pixels.
    reach = 4 * max(1.0, (lower - upper) / side)
    top, bottom = max(0, int(upper - reach)), min(image.height, int(lower + reach) + 1)
    rows = image.crop((0, top, image.width, bottom)) if (top, bottom) != (0, image.height) else image
    across = rows.resize((side, rows.height), filter_, box=(left, 0, right, rows.height))
    return across.resize((side, side), filter_, box=(0, upper - top, side, lower - top))


def lanczos_crop(image: AnyImage, side: int) -> AnyImage:
    """The centred square, cut out first and then resized by Lanczos' filter: the pixels of U-ViT's latents of COCO."""
    square = image.crop(square_box(*image.size))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def adm_crop(image: AnyImage, side: int) -> AnyImage:
    """ADM's centre crop (Dhariwal, Nichol 2021), whose pixels U-ViT's latents of ImageNet show.

    The image is halved by averaging until its short side is less than twice `side`, resized by the bicubic filter so
    that the short side is `side`, and the centre is cut at whole pixels.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, upper, left + side, upper + side))


OWN_CROPS: dict[str, Callable[[Any, int], Any]] = {"lanczos": lanczos_crop, "adm": adm_crop}
