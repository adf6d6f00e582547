"""JPEG's pixels by libjpeg-turbo itself (simplejpeg), and what it warns of; Pillow decides what is damaged."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from functools import cache

import numpy as np
import simplejpeg
from PIL import Image

from featurize.images.reasons import BadImage

log = logging.getLogger(__name__)

COLOURS = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # Pillow's mode: simplejpeg's name
# A progressive JPEG is decoded scan by scan, each over all pixels. Sound files have a dozen scans; this is 5 s at most.
MAX_SCANNED_PIXELS = 20 * 89_478_485
SMALLER = 2  # times; libjpeg has seven to five eighths too, whose transforms are slower than the whole's
START_OF_SCAN, START_OF_IMAGE, END_OF_IMAGE = b"\xff\xda", b"\xff\xd8", b"\xff\xd9"
BASELINE = 0xC0
# A marker in entropy-coded data that does not belong there: neither a stuffed zero nor a restart.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
NVJPEG_SUBSAMPLINGS = ("444", "422", "420")  # of the decoding engines
# Markers of a frame's header (SOF): all of 0xC0 to 0xCF but DHT, JPG and DAC.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def load_jpeg(image: Image.Image, data: bytes, least: int = 0) -> tuple[Image.Image, str]:
    """(the image with its pixels, what libjpeg warns of or ""). `image` is opened and not loaded.

    It may be decoded at four, three, two or one eighths of its size where its sides are `least` pixels or more then, by the
    smaller inverse transforms of the blocks; 0 stands for the whole. Only whole it is equal to Pillow's.

    The pixels are Pillow's to the byte, in less time. In its strict mode simplejpeg raises what libjpeg only warns of, and
    Pillow passes over most of that; what Pillow refuses too raises its error. Raises BadImage for so many scans that decoding
    would take minutes.
    """
    pixels_per_scan = image.width * image.height
    # An upper bound that costs nothing, then the count: entropy-coded data never hold the marker, though a thumbnail may.
    if data.count(START_OF_SCAN[1:]) * pixels_per_scan > MAX_SCANNED_PIXELS:
        scans = data.count(START_OF_SCAN)
        if scans * pixels_per_scan > MAX_SCANNED_PIXELS:
            raise BadImage(
                f"a JPEG of {scans} scans over {image.width} x {image.height} pixels takes too long to decode"
            )
    colour = COLOURS.get(image.mode)
    warning = ""
    if colour is not None:
        try:
            scaled = {"min_height": least, "min_width": least, "min_factor": SMALLER} if least else {}
            pixels = simplejpeg.decode_jpeg(data, colour, **scaled)
        except ValueError as error:
            # TurboJPEG's own sentences ("tjDecompress...") are about layouts that it does not know, not about damage.
            warning = "" if str(error).startswith("tj") else f"libjpeg warns: {' '.join(str(error).split())}"[:200]
        else:
            # CMYK is inverted in some files, which Pillow knows to tell.
            if colour != "CMYK" and (least or (pixels.shape[1::-1] == image.size and equals_pillow())):
                return Image.fromarray(pixels if colour == "RGB" else pixels[..., 0]), ""
    image.load()
    return image, warning


@cache
def equals_pillow() -> bool:
    """Whether simplejpeg's bytes are Pillow's here: both bring a libjpeg of their own, and builds may differ."""
    noise_HWC = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    noise_HWC[:20] = np.linspace(0, 255, 61 * 3).reshape(61, 3)
    for image in (Image.fromarray(noise_HWC), Image.fromarray(noise_HWC[..., 0])):
        for subsampling in (0, 1, 2):
            for progressive in (False, True):
                file = io.BytesIO()
                image.save(file, "JPEG", quality=80, subsampling=subsampling, progressive=progressive)
                own = simplejpeg.decode_jpeg(file.getvalue(), COLOURS[image.mode])
                if not np.array_equal(np.squeeze(own), np.asarray(Image.open(file))):
                    log.warning(
                        "simplejpeg and Pillow decode JPEG to other bytes here, so Pillow decodes, more slowly."
                    )
                    return False
    return True


def why_unreadable(data: bytes) -> str:
    """What a sound JPEG is that libjpeg-turbo as built into Pillow can't decode, "" for any other file."""
    bits = next((data[place + 4] for place in _segments(data) if data[place + 1] in FRAMES), 8)
    return f"a JPEG of {bits} bits a sample" if bits != 8 else ""


def is_for_nvjpeg(data: bytes) -> bool:
    """Whether a JPEG is one that a GPU's engines decode: baseline, in YCbCr, with nothing amiss that libjpeg would refuse.

    Its headers are sound, one scan follows them, and the file ends where the image does. Wrong bits within the scan are not
    seen: libjpeg would warn of some.
    """
    places = {data[place + 1]: place for place in _segments(data)}
    scan = places.get(START_OF_SCAN[1])
    if scan is None or FRAMES & places.keys() != {BASELINE}:
        return False
    begins = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    marker = MARKER.search(data, begins)
    if marker is None or data[marker.start() :] != END_OF_IMAGE:
        return False
    try:
        *_, colour, subsampling = simplejpeg.decode_jpeg_header(data, strict=True)
        # libjpeg looks at all tables only when it decodes: an image of 16 pixels a side with these headers and no content.
        sides = places[BASELINE] + 5
        empty = data[:sides] + b"\0\x10\0\x10" + data[sides + 4 : begins] + END_OF_IMAGE
        simplejpeg.decode_jpeg(empty, strict=False)
    except ValueError:
        return False
    return colour == "YCbCr" and subsampling in NVJPEG_SUBSAMPLINGS


def _segments(data: bytes) -> Iterator[int]:
    """Where the segments of a JPEG begin, to that of its first scan."""
    place = len(START_OF_IMAGE)
    while data.startswith(START_OF_IMAGE) and place + 5 <= len(data) and data[place] == 0xFF:
        yield place
        if data[place + 1] == START_OF_SCAN[1]:
            return
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
