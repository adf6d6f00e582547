"""One scene from its number: composed, drawn at any size, described in captions."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from featurize.scenes.captions import captions
from featurize.scenes.composition import CLASSES, KINDS, Composition, Thing, compose
from featurize.scenes.grounds import draw_ground, draw_shadow
from featurize.scenes.pen import Pen

SUPERSAMPLE = 4  # pixels of the canvas per pixel of the image, a side


@dataclass(frozen=True)
class Story:
    """Label, captions and objects of a scene, whatever its size.

    `objects` are dicts, the main object first: `class`, `colour`, `box` (left, upper, right, lower in sides of the
    picture; may reach a little over the edge), `place` (where in the picture) and `relation` to the main object
    ("main" for itself).
    """

    label: int  # of the main object, an index of CLASSES
    captions: tuple[str, ...]
    objects: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Scene(Story):
    """A drawn scene. `class_map` is (size, size) uint8: 0 for the ground, 1 + class where an object is seen."""

    image: Image.Image  # RGB, size x size
    class_map: np.ndarray

    def png(self) -> bytes:
        """The picture as a PNG file, stored and not deflated: zlib's work may differ between machines."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()


def tell_scene(seed: int, split: str, index: int) -> Story:
    """What `draw_scene` says of the same scene, many times faster because nothing is drawn."""
    return _story(compose(seed, split, index))


def draw_scene(seed: int, split: str, index: int, size: int) -> Scene:
    """Scene number `index` of a split, on size x size pixels.

    The content is a function of (seed, split, index) alone; the size only decides on how many pixels it is drawn.
    """
    scene = compose(seed, split, index)
    side = size * SUPERSAMPLE
    paint, marks = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    draw_ground(paint, scene.ground, scene.light, scene.horizon, scene.wall, scene.generator)
    for thing in scene.things:
        left, _, right, lower = thing.box
        if KINDS[thing.name].habit == "stand" and thing.relation != "on":
            draw_shadow(paint, (left + right) / 2, lower, right - left)
    for thing in scene.things:
        KINDS[thing.name].draw(Pen(paint, marks, 1 + thing.label, thing.box, thing.look))
    story = _story(scene)
    class_map = np.asarray(marks.resize((size, size), Image.Resampling.NEAREST))
    return Scene(story.label, story.captions, story.objects, paint.reduce(SUPERSAMPLE), class_map)


def _story(scene: Composition) -> Story:
    objects = tuple(_description(thing) for thing in (scene.main, *scene.guests))
    return Story(scene.main.label, captions(scene), objects)


def _description(thing: Thing) -> dict[str, Any]:
    return {
        "class": CLASSES[thing.label],
        "colour": thing.colour,
        "box": [round(edge, 4) for edge in thing.box],
        "place": thing.place,
        "relation": thing.relation,
    }
