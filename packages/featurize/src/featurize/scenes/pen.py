"""A pen in unit coordinates: polygons with colours, light and texture on the picture and on its class map.

Everything drawn is a polygon in unit coordinates (x to the right, y down, 0..1 over a thing's box), rounded to
whole pixels of the supersampled canvas: so a picture does not depend on the last bit of a machine's cosine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, upper, right, lower, in sides of the picture

COLOURS: dict[str, RGB] = {
    "red": (214, 48, 44),
    "orange": (240, 134, 36),
    "yellow": (246, 210, 56),
    "green": (58, 148, 66),
    "blue": (48, 98, 206),
    "purple": (140, 72, 178),
    "pink": (240, 142, 178),
    "white": (244, 242, 236),
    "grey": (140, 142, 150),
    "brown": (136, 86, 48),
    "black": (48, 44, 52),
}


def shade(colour: RGB, factor: float | Sequence[float]) -> RGB:
    """Each channel times its factor, clipped."""
    factors = (factor,) * 3 if isinstance(factor, (int, float)) else factor
    red, green, blue = (min(255, max(0, round(c * f))) for c, f in zip(colour, factors))
    return red, green, blue


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """`share` of b in a."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b))
    return red, green, blue


def disc(x: float, y: float, rx: float, ry: float | None = None) -> list[Point]:
    """An ellipse; a circle without `ry`."""
    return arc(x, y, rx, rx if ry is None else ry, 0, 345)


def arc(x: float, y: float, rx: float, ry: float, start: int, stop: int) -> list[Point]:
    """The part of an ellipse between two angles, in degrees, clockwise from the right."""
    angles = [math.radians(a) for a in range(start, stop + 1, 15)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def rect(left: float, upper: float, right: float, lower: float) -> list[Point]:
    """A rectangle."""
    return [(left, upper), (right, upper), (right, lower), (left, lower)]


@dataclass(frozen=True)
class Light:
    """The sky, and what the light does to the colours of the ground and of the things (factors)."""

    top: RGB
    horizon: RGB
    on_ground: tuple[float, float, float]
    on_things: float


LIGHTS: dict[str, Light] = {
    "day": Light((104, 172, 242), (208, 232, 250), (1.0, 1.0, 1.0), 1.0),
    "dusk": Light((120, 88, 160), (252, 176, 112), (0.92, 0.76, 0.74), 0.95),
    "night": Light((16, 22, 58), (48, 58, 112), (0.36, 0.4, 0.56), 0.82),
}


DOTS = ((0.2, 0.25), (0.5, 0.15), (0.8, 0.3), (0.35, 0.5), (0.65, 0.55), (0.2, 0.75), (0.5, 0.82), (0.8, 0.8))
SQUARES = [(x / 4, y / 4) for x in range(4) for y in range(4) if (x + y) % 2]
# What a texture paints in the second colour, over the thing's box; "plain" paints nothing.
TEXTURES: dict[str, list[list[Point]]] = {
    "plain": [],
    "stripes": [rect(x, -0.1, x + 0.12, 1.1) for x in (0.06, 0.3, 0.58, 0.82)],
    "bands": [rect(-0.1, y, 1.1, y + 0.12) for y in (0.1, 0.36, 0.62, 0.86)],
    "dots": [disc(x, y, 0.085) for x, y in DOTS],
    "checks": [rect(x, y, x + 0.25, y + 0.25) for x, y in SQUARES],
}


@dataclass(frozen=True)
class Look:
    """What a thing looks like: nothing here depends on the size of the picture."""

    colour: RGB
    second: RGB  # of its texture and trimmings
    texture: str
    variant: float  # 0..1, picks a build where the class has several
    flip: bool
    tilt: float  # degrees
    light: str  # a key of LIGHTS


@dataclass(frozen=True)
class Pen:
    """Draws polygons of one thing on the picture and on the class map (L mode, `mark` where the thing is)."""

    paint: Image.Image
    marks: Image.Image
    mark: int
    box: Box
    look: Look

    def pixels(self, points: Iterable[Point]) -> list[tuple[int, int]]:
        """Unit coordinates of the thing's box to pixels of the canvas."""
        left, upper, right, lower = self.box
        side = self.paint.width
        half_w, half_h = (right - left) * side / 2, (lower - upper) * side / 2
        middle_x, middle_y = (left + right) * side / 2, (upper + lower) * side / 2
        cos, sin = math.cos(math.radians(self.look.tilt)), math.sin(math.radians(self.look.tilt))
        sign = -1 if self.look.flip else 1
        placed = []
        for x, y in points:
            dx, dy = sign * (2 * x - 1) * half_w, (2 * y - 1) * half_h
            placed.append((round(middle_x + dx * cos - dy * sin), round(middle_y + dx * sin + dy * cos)))
        return placed

    def shape(self, points: Iterable[Point], colour: RGB, outline: bool = True) -> None:
        """One filled polygon, with a darker line around it."""
        placed = self.pixels(points)
        colour = shade(colour, LIGHTS[self.look.light].on_things)
        line = max(1, round(self.paint.width * 0.014))
        ImageDraw.Draw(self.marks).polygon(placed, fill=self.mark)
        draw = ImageDraw.Draw(self.paint)
        draw.polygon(placed, fill=colour)
        if outline:
            draw.line([*placed, placed[0]], fill=shade(colour, 0.6), width=line)

    def body(self, points: Sequence[Point]) -> None:
        """A polygon in the thing's own colour and texture."""
        look = self.look
        self.shape(points, look.colour)
        if not TEXTURES[look.texture]:
            return
        stencil, pattern = Image.new("L", self.paint.size), Image.new("L", self.paint.size)
        ImageDraw.Draw(stencil).polygon(self.pixels(points), fill=255)
        draw = ImageDraw.Draw(pattern)
        for mark in TEXTURES[look.texture]:
            draw.polygon(self.pixels(mark), fill=255)
        second = shade(look.second, LIGHTS[look.light].on_things)
        self.paint.paste(second, mask=ImageChops.multiply(stencil, pattern))
