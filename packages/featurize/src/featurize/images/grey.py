"""Grey images of more than 8 bits: which of their values are black and white."""

from __future__ import annotations

import numpy as np
from PIL import Image

from featurize.images.reasons import BadImage

BITS, INVERTED, WHITE_IS_ZERO = (
    258,
    262,
    0,
)  # TIFF's tags BitsPerSample and PhotometricInterpretation, and a value of it
# A float image whose brightest value lies between 1 and this is neither 0 to 1 nor 0 to 255: it would be almost black.
DARKEST_OF_255 = 32


def grey_to_8_bits(image: Image.Image) -> Image.Image:
    """An image of mode I;16, I or F as L.

    Whole numbers of up to 16 bits run from 0 to the largest that their format holds: 4095 for 12 bits, 65535 for 16. Whole
    numbers of 32 bits and floats have no such end, so their own range decides: floats within 0..1 or 0..255, whole numbers
    within 0..255 or 0..65535. Raises BadImage for any other range, and for values that are not finite.
    """
    values = np.asarray(image)
    lowest, highest = values.min(), values.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise BadImage("a grey picture whose values are not all finite numbers")
    white = _white(image, float(lowest), float(highest))
    if values.dtype.kind in "iu":
        grey = values.astype(np.uint32)
        grey *= 255
        grey += white // 2
        grey //= white
    else:
        grey = np.rint(values * (255 / white))
    if _tag(image, INVERTED) == WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8))


def _white(image: Image.Image, lowest: float, highest: float) -> int:
    """The value that is white."""
    bits = _tag(image, BITS)
    if image.mode == "F":
        allowed = {1: highest <= 1, 255: DARKEST_OF_255 <= highest <= 255}
        kind, ranges = "a grey picture of floats", "0 to 1 or 0 to 255"
    elif image.mode == "I" and bits == 32:
        allowed = {255: highest <= 255, 65535: highest <= 65535}
        kind, ranges = "a grey picture of 32-bit whole numbers", "0 to 255 or 0 to 65535"
    else:
        # Pillow scales all formats but TIFF to 16 bits itself.
        allowed = {2 ** (bits or 16) - 1: True}
        kind, ranges = "a grey picture of signed whole numbers", "0 upwards"
    if lowest >= 0:
        for white, fits in allowed.items():
            if fits:
                return white
    raise BadImage(f"{kind} from {lowest:g} to {highest:g}, whose range is not {ranges}")


def _tag(image: Image.Image, tag: int) -> int | None:
    """The first value of a TIFF's tag; None for other formats and where it is not there."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value
