"""The grounds of a scene: sky or wall above the horizon, the ground below it, and the marks that structure both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from featurize.scenes.pen import LIGHTS, RGB, Point, disc, mix, rect, shade

WHITE: RGB = (255, 255, 255)


@dataclass(frozen=True)
class Sheet:
    """A picture to fill polygons on, in unit coordinates of the whole picture."""

    paint: Image.Image

    def fill(self, points: Iterable[Point], colour: RGB) -> None:
        """One filled polygon."""
        side = self.paint.width
        ImageDraw.Draw(self.paint).polygon([(round(x * side), round(y * side)) for x, y in points], fill=colour)

    def gradient(self, top: RGB, bottom: RGB, upper: float, lower: float) -> None:
        """A vertical gradient over the rows from `upper` to `lower`."""
        side = self.paint.width
        first, last = round(upper * side), round(lower * side)
        steps = np.linspace(0.0, 1.0, last - first)[:, None]
        column = np.rint(np.asarray(top) * (1 - steps) + np.asarray(bottom) * steps).astype(np.uint8)
        band = np.broadcast_to(column[:, None, :], (last - first, side, 3)).copy()
        self.paint.paste(Image.fromarray(band), (0, first))


# Marks of a surface: (sheet, colour far off, colour near, horizon, uniform random numbers (20, 4)).
Marks = Callable[[Sheet, RGB, RGB, float, list[list[float]]], None]


def blades(sheet: Sheet, far: RGB, near: RGB, horizon: float, random: list[list[float]]) -> None:
    """Grass."""
    for x, y, length, tone in random:
        y = horizon + 0.06 + y * (1 - horizon)
        colour = shade(mix(far, near, min(y, 1.0)), 0.82 if tone < 0.5 else 1.18)
        sheet.fill([(x, y), (x + 0.018, y - 0.05 - 0.05 * length), (x + 0.036, y)], colour)


def waves(sheet: Sheet, far: RGB, near: RGB, horizon: float, random: list[list[float]]) -> None:
    """Crests and troughs."""
    for x, y, length, tone in random:
        y, half = horizon + 0.03 + y * (1 - horizon), 0.05 + 0.08 * length
        colour = mix(near, WHITE, 0.35) if tone < 0.6 else shade(near, 0.85)
        sheet.fill([(x - half, y), (x, y - 0.014), (x + half, y), (x, y + 0.014)], colour)


def grains(sheet: Sheet, far: RGB, near: RGB, horizon: float, random: list[list[float]]) -> None:
    """Flat lumps of sand or snow."""
    for x, y, length, tone in random:
        y, half = horizon + 0.04 + y * (1 - horizon), 0.015 + 0.03 * length
        sheet.fill(disc(x, y, half, half * 0.5), shade(near, 0.9 if tone < 0.6 else 1.08))


def beach(sheet: Sheet, far: RGB, near: RGB, horizon: float, random: list[list[float]]) -> None:
    """Sand before a strip of sea."""
    grains(sheet, far, near, horizon, random)
    light = sum(near) / sum(GROUNDS["sand"].near)
    sheet.fill(rect(0, horizon - 0.06, 1, horizon + 0.01), shade(GROUNDS["sea"].near, light))


def lane(sheet: Sheet, far: RGB, near: RGB, horizon: float, random: list[list[float]]) -> None:
    """A dashed line on the road, houses of a town behind it."""
    for k, (height, tone, _, _) in enumerate(random[:7]):
        x = k / 6.5 - 0.05
        sheet.fill(rect(x, horizon - 0.06 - 0.16 * height, x + 0.12, horizon), shade(far, 0.72 + 0.4 * tone))
    middle, shift = horizon + 0.62 * (1 - horizon), 0.3 * random[0][2]
    for k in range(5):
        x = k * 0.3 - shift
        sheet.fill(rect(x, middle - 0.02, x + 0.17, middle + 0.02), mix(near, WHITE, 0.7))


def planks(sheet: Sheet, far: RGB, near: RGB, horizon: float, random: list[list[float]]) -> None:
    """A plank floor with a skirting board; a window in the wall, more often than not."""
    row = (1 - horizon) / 4
    for k in range(4):
        y = horizon + k * row
        sheet.fill(rect(0, y - 0.008, 1, y + 0.008), shade(near, 0.8))
        for x in (random[k][0] / 2, random[k][0] / 2 + 0.5):
            sheet.fill(rect(x, y, x + 0.014, y + row), shade(near, 0.8))
    sheet.fill(rect(0, horizon - 0.02, 1, horizon + 0.015), (248, 240, 222))
    if random[4][0] < 0.6:
        x = 0.08 + 0.6 * random[4][1]
        sheet.fill(rect(x, 0.06, x + 0.26, horizon - 0.16), (248, 240, 222))
        sheet.fill(rect(x + 0.03, 0.09, x + 0.23, horizon - 0.19), LIGHTS["day"].top)


def weeds(sheet: Sheet, far: RGB, near: RGB, horizon: float, random: list[list[float]]) -> None:
    """A sandy bottom, weeds and bubbles."""
    sheet.fill([(0, 1), (0, 0.92), (0.3, 0.88), (0.7, 0.93), (1, 0.89), (1, 1)], mix(near, (236, 206, 140), 0.5))
    for x, _, length, tone in random[:7]:
        top, foot = 0.78 - 0.22 * length, 0.94
        half = (top + foot) / 2
        blade = [(x, foot), (x - 0.03, half), (x + 0.02, top), (x + 0.04, half), (x + 0.05, foot)]
        sheet.fill(blade, mix(near, (50, 160, 90), 0.45 + 0.3 * tone))
    for x, y, size, _ in random[7:14]:
        sheet.fill(disc(x, y * 0.8, 0.012 + 0.014 * size), mix(far, WHITE, 0.6))


@dataclass(frozen=True)
class Ground:
    """Colours of a ground in daylight, from the horizon down, its marks, and what is above the horizon."""

    far: RGB
    near: RGB
    marks: Marks | None
    above: str = "sky"  # "sky", "wall", or "nothing" where the ground fills the picture


GROUNDS: dict[str, Ground] = {
    "meadow": Ground((140, 200, 98), (74, 152, 62), blades),
    "sea": Ground((86, 160, 212), (32, 92, 166), waves),
    "sand": Ground((246, 222, 164), (222, 184, 116), beach),
    "snow": Ground((248, 250, 254), (214, 226, 244), grains),
    "road": Ground((150, 150, 156), (104, 104, 112), lane),
    "room": Ground((190, 140, 96), (150, 102, 64), planks, above="wall"),
    "water": Ground((92, 190, 214), (16, 66, 130), weeds, above="nothing"),
    "sky": Ground(WHITE, WHITE, None),  # nothing but sky: its own colours are never seen
}


def draw_ground(
    paint: Image.Image, name: str, light: str, horizon: float, wall: RGB, generator: np.random.Generator
) -> None:
    """Paint the whole picture, in place. `horizon` is the share of it above the ground, `wall` a room's colour."""
    sheet, ground, sky = Sheet(paint), GROUNDS[name], LIGHTS[light]
    factors = (generator.random(3) * 0.2 + 0.9).tolist()
    random = generator.random((28, 4)).tolist()
    outside = ground.above == "sky"
    if outside:
        factors = [f * g for f, g in zip(factors, sky.on_ground)]
    far, near = shade(ground.far, factors), shade(ground.near, factors)
    if ground.marks is None:
        horizon = 1.0
    if outside:
        sheet.gradient(sky.top, sky.horizon, 0.0, horizon)
        draw_sky(sheet, light, horizon, random[:8])
    elif ground.above == "wall":
        sheet.gradient(wall, shade(wall, 0.92), 0.0, horizon)
    else:
        horizon = 0.0
    if ground.marks is not None:
        sheet.gradient(far, near, horizon, 1.0)
        ground.marks(sheet, far, near, horizon, random[8:])


def draw_sky(sheet: Sheet, light: str, horizon: float, random: list[list[float]]) -> None:
    """Stars at night, clouds otherwise; more of them where the sky is all there is."""
    if light == "night":
        for x, y, size, _ in random:
            sheet.fill(disc(x, y * (horizon - 0.05), 0.008 + 0.012 * size), (236, 232, 200))
        return
    colour = mix(mix(LIGHTS[light].top, LIGHTS[light].horizon, 0.5), WHITE, 0.62)
    for x, y, size, share in random:
        if share < (0.6 if horizon == 1.0 else 0.25):
            y, r = 0.06 + y * (horizon - 0.12), 0.05 + 0.05 * size
            for dx, k in ((-1.2, 0.7), (0.0, 1.0), (1.3, 0.75)):
                sheet.fill(disc(x + dx * r, y + (1 - k) * r * 0.5, 1.1 * r * k, 0.7 * r * k), colour)


def draw_shadow(paint: Image.Image, x: float, foot: float, width: float) -> None:
    """A darker patch of the ground around (x, foot), under something that stands there."""
    side = paint.width
    pixel = paint.getpixel((min(max(round(x * side), 0), side - 1), min(round(foot * side), side - 1)))
    assert isinstance(pixel, tuple)
    Sheet(paint).fill(disc(x, foot, 0.52 * width, 0.035), shade((pixel[0], pixel[1], pixel[2]), 0.78))
