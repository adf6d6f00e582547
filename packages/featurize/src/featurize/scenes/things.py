"""The things of a scene, one function a class: each draws itself into the unit box of a pen."""

from __future__ import annotations

import math

from featurize.scenes.pen import COLOURS, RGB, Pen, arc, disc, mix, rect, shade

DARK: RGB = (34, 30, 38)
CREAM: RGB = (248, 240, 222)
WOOD: RGB = (112, 76, 46)
LEAF: RGB = (64, 140, 58)
GLASS: RGB = (176, 216, 240)
LAMP: RGB = (255, 224, 120)
CAT_EYES: RGB = (150, 214, 90)


def house(pen: Pen) -> None:
    """Walls, a roof in the second colour, door, windows (lit at night), chimney."""
    pen.shape(rect(0.7, 0.04, 0.82, 0.4), WOOD)
    pen.body(rect(0.1, 0.42, 0.9, 1.0))
    pen.shape([(0.0, 0.46), (0.5, 0.0), (1.0, 0.46)], pen.look.second)
    pen.shape(rect(0.42, 0.64, 0.62, 1.0), WOOD)
    for x in (0.19, 0.68):
        pen.shape(rect(x, 0.55, x + 0.15, 0.73), LAMP if pen.look.light == "night" else GLASS)


def tree(pen: Pen) -> None:
    """A round crown or a fir, by the variant."""
    pen.shape(rect(0.42, 0.6, 0.58, 1.0), WOOD)
    if pen.look.variant < 0.5:
        pen.body(disc(0.5, 0.36, 0.46, 0.36))
        pen.shape(disc(0.36, 0.24, 0.16, 0.11), shade(pen.look.colour, 1.2), outline=False)
    else:
        for top, half in ((0.42, 0.5), (0.21, 0.42), (0.0, 0.32)):
            pen.body([(0.5, top), (0.5 + half, top + 0.4), (0.5 - half, top + 0.4)])


def car(pen: Pen) -> None:
    """From the side, with cabin, wheels and a lamp."""
    pen.shape([(0.18, 0.42), (0.3, 0.0), (0.7, 0.0), (0.84, 0.42)], pen.look.colour)
    pen.shape([(0.27, 0.4), (0.35, 0.1), (0.48, 0.1), (0.48, 0.4)], GLASS, outline=False)
    pen.shape([(0.53, 0.4), (0.53, 0.1), (0.66, 0.1), (0.75, 0.4)], GLASS, outline=False)
    pen.body([(0.0, 0.5), (0.1, 0.38), (0.88, 0.38), (1.0, 0.52), (1.0, 0.8), (0.0, 0.8)])
    for x in (0.24, 0.76):
        pen.shape(disc(x, 0.8, 0.13, 0.21), DARK)
        pen.shape(disc(x, 0.8, 0.05, 0.08), COLOURS["grey"], outline=False)
    pen.shape(rect(0.92, 0.5, 1.0, 0.6), LAMP, outline=False)


def boat(pen: Pen) -> None:
    """A hull under one sail or two."""
    second = pen.look.second
    pen.shape(rect(0.47, 0.0, 0.52, 0.75), WOOD, outline=False)
    pen.shape([(0.54, 0.03), (0.54, 0.64), (0.98, 0.64)], second)
    if pen.look.variant < 0.6:
        pen.shape([(0.44, 0.14), (0.44, 0.64), (0.1, 0.64)], shade(second, 0.88))
    pen.body([(0.0, 0.7), (1.0, 0.7), (0.82, 1.0), (0.18, 1.0)])


def fish(pen: Pen) -> None:
    """From the side, looking left unless flipped."""
    pen.shape([(0.64, 0.5), (1.0, 0.12), (0.92, 0.5), (1.0, 0.88)], pen.look.second)
    pen.shape([(0.28, 0.24), (0.5, 0.0), (0.6, 0.3)], pen.look.second)
    pen.body(disc(0.37, 0.5, 0.37, 0.38))
    pen.shape(disc(0.18, 0.4, 0.075, 0.12), CREAM, outline=False)
    pen.shape(disc(0.165, 0.4, 0.04, 0.065), DARK, outline=False)


def flower(pen: Pen) -> None:
    """A stem with two leaves, five or seven petals."""
    pen.shape(rect(0.46, 0.4, 0.54, 1.0), LEAF, outline=False)
    pen.shape([(0.5, 0.92), (0.84, 0.66), (0.74, 0.88)], LEAF)
    pen.shape([(0.5, 0.88), (0.16, 0.68), (0.28, 0.86)], LEAF)
    petals = 5 if pen.look.variant < 0.5 else 7
    for k in range(petals):
        turn = 2 * math.pi * (k / petals - 0.25)
        x, y = 0.5 + 0.27 * math.cos(turn), 0.32 + 0.2 * math.sin(turn)
        pen.shape(disc(x, y, 0.18, 0.135), pen.look.colour)
    pen.shape(disc(0.5, 0.32, 0.15, 0.11), pen.look.second)


def mushroom(pen: Pen) -> None:
    """A pale stem under a dome."""
    pen.shape([(0.38, 0.45), (0.62, 0.45), (0.68, 1.0), (0.32, 1.0)], CREAM)
    pen.body([*arc(0.5, 0.55, 0.5, 0.55, 180, 360), (0.8, 0.62), (0.2, 0.62)])


def ball(pen: Pen) -> None:
    """A disc with a highlight."""
    pen.body(disc(0.5, 0.5, 0.5))
    pen.shape(disc(0.33, 0.28, 0.12, 0.1), mix(pen.look.colour, (255, 255, 255), 0.7), outline=False)


def cat(pen: Pen) -> None:
    """Sitting, seen from the front: ears, eyes, tail."""
    colour = pen.look.colour
    tail = [(0.66, 0.95), (0.95, 0.8), (0.9, 0.5), (1.0, 0.46), (1.06, 0.82), (0.7, 1.0)]
    pen.shape(tail, colour)
    pen.body([*arc(0.48, 0.78, 0.3, 0.32, 180, 360), (0.8, 1.0), (0.16, 1.0)])
    for side in (-1, 1):
        pen.shape([(0.48 + side * 0.08, 0.12), (0.48 + side * 0.3, 0.0), (0.48 + side * 0.31, 0.32)], colour)
    pen.shape(disc(0.48, 0.34, 0.34, 0.24), colour)
    for x in (0.34, 0.62):
        pen.shape(disc(x, 0.31, 0.07, 0.065), CAT_EYES, outline=False)
        pen.shape(disc(x, 0.31, 0.03, 0.055), DARK, outline=False)
    pen.shape([(0.42, 0.41), (0.54, 0.41), (0.48, 0.47)], COLOURS["pink"], outline=False)


def balloon(pen: Pen) -> None:
    """A hot-air balloon with its basket."""
    for x in (0.3, 0.66):
        pen.shape([(x, 0.6), (x + 0.04, 0.6), (0.48 + (x - 0.48) * 0.5, 0.88)], WOOD, outline=False)
    pen.shape(rect(0.38, 0.85, 0.62, 1.0), WOOD)
    pen.body([*arc(0.5, 0.37, 0.48, 0.37, 165, 375), (0.62, 0.74), (0.38, 0.74)])


def snowman(pen: Pen) -> None:
    """White whatever its colour, which is that of its scarf."""
    white, trim = COLOURS["white"], pen.look.colour
    pen.shape(disc(0.5, 0.77, 0.42, 0.24), white)
    pen.shape(disc(0.5, 0.47, 0.3, 0.18), white)
    pen.shape(disc(0.5, 0.24, 0.22, 0.14), white)
    pen.shape(rect(0.24, 0.33, 0.76, 0.41), trim)
    pen.shape(rect(0.6, 0.38, 0.72, 0.58), trim)
    pen.shape(rect(0.22, 0.1, 0.78, 0.15), pen.look.second)
    pen.shape(rect(0.32, 0.0, 0.68, 0.13), pen.look.second)
    pen.shape([(0.48, 0.23), (0.48, 0.29), (0.76, 0.27)], COLOURS["orange"], outline=False)
    for x, y in ((0.4, 0.21), (0.58, 0.21), (0.5, 0.5), (0.5, 0.7)):
        pen.shape(disc(x, y, 0.045, 0.03), DARK, outline=False)


def sun(pen: Pen) -> None:
    """A disc with ten rays."""
    for k in range(10):
        turn = 2 * math.pi * k / 10
        corners = [(0.32, turn - 0.2), (0.5, turn), (0.32, turn + 0.2)]
        ray = [(0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in corners]
        pen.shape(ray, pen.look.second, outline=False)
    pen.shape(disc(0.5, 0.5, 0.31), pen.look.colour)
