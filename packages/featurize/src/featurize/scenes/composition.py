"""What is where in a scene: the main object, its guests and their places, from the scene's number alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from featurize.scenes import things
from featurize.scenes.grounds import GROUNDS
from featurize.scenes.pen import COLOURS, LIGHTS, RGB, Box, Look, Pen, mix, shade

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A class of objects: how it is drawn and where it is found."""

    draw: Callable[[Pen], None]
    aspect: float  # width / height
    habit: str  # "stand", "fly" or "swim"
    colours: tuple[str, ...]
    textures: tuple[str, ...]
    grounds: dict[str, float]  # where it is the main object, with weights


ANY = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
WALLS = ("white", "yellow", "pink", "blue", "orange", "grey", "green")
LEAVES = ("green", "orange", "yellow", "red", "pink", "white")
PETALS = ("red", "yellow", "pink", "purple", "white", "blue", "orange")
CAPS = ("red", "orange", "brown", "purple", "white", "blue")
FUR = ("black", "orange", "grey", "white", "brown")
KINDS: dict[str, Kind] = {
    "house": Kind(things.house, 0.95, "stand", WALLS, ("plain", "bands"),
                  {"meadow": 4, "snow": 3, "road": 2, "sand": 2}),
    "tree": Kind(things.tree, 0.75, "stand", LEAVES, ("plain", "plain", "dots"),
                 {"meadow": 4, "snow": 3, "road": 2, "room": 1, "sand": 1}),
    "car": Kind(things.car, 1.75, "stand", (*ANY, "black", "grey"), ("plain", "plain", "stripes"),
                {"road": 6, "meadow": 2, "snow": 2, "sand": 1}),
    "boat": Kind(things.boat, 0.95, "stand", (*ANY, "brown", "black"), ("plain", "bands", "stripes"),
                 {"sea": 9, "sand": 1}),
    "fish": Kind(things.fish, 1.5, "swim", ANY, ("plain", "stripes", "dots"),
                 {"water": 8, "sea": 2}),
    "flower": Kind(things.flower, 0.72, "stand", PETALS, ("plain",),
                   {"meadow": 6, "room": 3, "sand": 1}),
    "mushroom": Kind(things.mushroom, 1.05, "stand", CAPS, ("dots", "dots", "plain"),
                     {"meadow": 7, "snow": 2, "road": 1}),
    "ball": Kind(things.ball, 1.0, "stand", ANY, ("plain", "stripes", "bands", "checks", "dots"),
                 {"meadow": 3, "room": 3, "sand": 3, "sea": 1}),
    "cat": Kind(things.cat, 0.85, "stand", FUR, ("plain", "bands"),
                {"room": 5, "meadow": 3, "road": 1, "snow": 1, "sand": 1}),
    "balloon": Kind(things.balloon, 0.78, "fly", ANY, ("stripes", "checks", "plain", "bands"),
                    {"sky": 4, "meadow": 3, "sea": 2, "snow": 1, "sand": 1}),
    "snowman": Kind(things.snowman, 0.68, "stand", ("red", "orange", "green", "blue", "purple", "pink"), ("plain",),
                    {"snow": 8, "road": 1, "meadow": 1}),
    "sun": Kind(things.sun, 1.0, "fly", ("yellow", "orange", "red"), ("plain",),
                {"sea": 4, "sky": 3, "sand": 2, "meadow": 2, "snow": 1}),
}  # fmt: skip
CLASSES: tuple[str, ...] = tuple(KINDS)

# Who keeps the main object company on each ground; twice is twice as often.
GUESTS: dict[str, tuple[str, ...]] = {
    "meadow": ("house", "tree", "car", "flower", "mushroom", "ball", "cat", "sun", "balloon"),
    "sea": ("boat", "boat", "ball", "sun", "balloon"),
    "sand": ("ball", "cat", "house", "tree", "boat", "sun", "balloon"),
    "snow": ("house", "tree", "snowman", "cat", "car", "sun", "balloon"),
    "road": ("car", "car", "tree", "house", "cat", "ball", "sun", "balloon"),
    "room": ("cat", "ball", "flower"),
    "water": ("fish",),
    "sky": ("balloon", "sun"),
}
# Where the top of a main object lets a guest sit, as a share of its height.
SEATS = {"house": 0.05, "car": 0.02, "mushroom": 0.03}


@dataclass(frozen=True)
class Thing:
    """One object. `relation` is how it stands to the main object: "left", "on", ..., or "main" if it is that."""

    name: str
    colour: str
    box: Box
    relation: str
    look: Look

    @property
    def label(self) -> int:
        """Index of its class."""
        return CLASSES.index(self.name)

    @property
    def place(self) -> str:
        """Where in the picture its middle is: "upper left", "left", "middle", ..."""
        x, y = (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2
        words = ["upper"] * (y < 0.36) + ["lower"] * (y > 0.68) + ["left"] * (x < 0.38) + ["right"] * (x > 0.62)
        return " ".join(words) or "middle"


@dataclass(frozen=True)
class Composition:
    """A scene before it is drawn. `things` are in the order they are painted."""

    ground: str
    light: str
    horizon: float  # share of the picture above the ground
    wall: RGB  # of a room
    things: tuple[Thing, ...]
    generator: np.random.Generator  # what is left of it draws the ground's marks

    @property
    def main(self) -> Thing:
        """The object that gives the label."""
        return next(thing for thing in self.things if thing.relation == "main")

    @property
    def guests(self) -> tuple[Thing, ...]:
        """The others."""
        return tuple(thing for thing in self.things if thing.relation != "main")


@dataclass(frozen=True)
class Dice:
    """Random choices from a generator."""

    generator: np.random.Generator

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high), or the middle of an empty range."""
        return low + (high - low) * self.generator.random() if high > low else (low + high) / 2

    def pick(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of the options."""
        edges = np.cumsum(np.ones(len(options)) if weights is None else np.asarray(weights, float))
        return options[int(np.searchsorted(edges, self.generator.random() * edges[-1], side="right"))]


def compose(seed: int, split: str, index: int) -> Composition:
    """Scene number `index` of a split, from a generator keyed by the hash of all three."""
    digest = hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()
    dice = Dice(np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))))
    name = dice.pick(CLASSES)
    ground = dice.pick(tuple(KINDS[name].grounds), tuple(KINDS[name].grounds.values()))
    light = "day"
    if GROUNDS[ground].above == "sky":
        light = dice.pick(tuple(LIGHTS), (6, 4, 0) if name == "sun" else (6, 2, 2))
    horizon = dice.between(0.42, 0.6)
    main = _thing(dice, name, "main", _main_box(dice, name, ground, horizon), light)
    painted = [main]
    slots = _open_slots(main, ground, light)
    for _ in range(dice.pick((0, 1, 2, 3), (2, 4, 3, 1.5))):
        if slots:
            slot = dice.pick(tuple(slots))
            guest = dice.pick(slots.pop(slot))
            painted.append(_thing(dice, guest, slot, _guest_box(dice, guest, slot, main, horizon), light))
    wall = mix(COLOURS[dice.pick(ANY)], things.CREAM, 0.6)
    return Composition(ground, light, horizon, wall, tuple(sorted(painted, key=_nearness)), dice.generator)


def _nearness(thing: Thing) -> float:
    """What stands lower in the picture is nearer; what flies is far away; what sits on something hides it."""
    if thing.relation in ("behind", "above"):
        return 0.0
    if thing.relation in ("on", "front"):
        return 2.0
    return thing.box[3] if KINDS[thing.name].habit == "stand" else 0.5


def _thing(dice: Dice, name: str, relation: str, box: Box, light: str) -> Thing:
    kind = KINDS[name]
    colour = dice.pick(kind.colours)
    second = dice.pick([c for c in (ANY if name != "sun" else ("yellow", "orange")) if c != colour])
    wobble = [dice.between(0.88, 1.1) for _ in range(3)]
    tilt = 2.5 if kind.habit == "stand" and name != "ball" else 9.0
    look = Look(
        colour=shade(COLOURS[colour], wobble),
        second=shade(COLOURS[second], wobble),
        texture=dice.pick(kind.textures),
        variant=dice.between(0, 1),
        flip=dice.between(0, 1) < 0.5,
        tilt=dice.between(-tilt, tilt),
        light=light if name != "sun" else "day",
    )
    return Thing(name, colour, box, relation, look)


def _half_sides(dice: Dice, name: str, smallest: float, largest: float) -> tuple[float, float]:
    """Half the width and the height of a box of the class's aspect whose area is a random side squared."""
    side, root = dice.between(smallest, largest), math.sqrt(KINDS[name].aspect)
    return side * root / 2, side / root / 2


def _main_box(dice: Dice, name: str, ground: str, horizon: float) -> Box:
    half_w, half_h = _half_sides(dice, name, 0.44, 0.58)
    x = dice.between(half_w - 0.03, 1.03 - half_w)
    if KINDS[name].habit == "stand":
        y = dice.between(horizon + 0.2, 0.93) - half_h
    elif ground in ("water", "sky"):
        y = dice.between(0.4, 0.6)
    else:
        y = dice.between(half_h + 0.02, 0.42)
    return (x - half_w, y - half_h, x + half_w, y + half_h)


def _open_slots(main: Thing, ground: str, light: str) -> dict[str, list[str]]:
    """The relations there is room for, and who may take each."""
    left, upper, right, lower = main.box
    guests = [g for g in GUESTS[ground] if g != "sun" or (light != "night" and main.name != "sun")]
    standing = [g for g in guests if KINDS[g].habit == "stand"]
    airborne = [g for g in guests if KINDS[g].habit != "stand"]
    stands = KINDS[main.name].habit == "stand"
    slots: dict[str, list[str]] = {}
    if left > 0.14:
        slots["left"] = standing if stands else airborne
    if right < 0.86:
        slots["right"] = standing if stands else airborne
    if upper > 0.16:
        slots["above"] = airborne
    if stands:
        slots |= {"behind": standing, "front": [g for g in standing if g != "house"]}
        if main.name in SEATS and upper > 0.14:
            slots["on"] = [g for g in guests if g in ("cat", "ball")]
    elif lower < 0.84:
        slots["below"] = standing or airborne
    return {slot: who for slot, who in slots.items() if who}


def _guest_box(dice: Dice, name: str, slot: str, main: Thing, horizon: float) -> Box:
    left, upper, right, lower = main.box
    half_w, half_h = _half_sides(dice, name, 0.18, 0.26)
    x, y = (left + right) / 2, (upper + lower) / 2
    if slot == "left":
        x = max(left - half_w * dice.between(0.3, 1.2), 0.8 * half_w)
    elif slot == "right":
        x = min(right + half_w * dice.between(0.3, 1.2), 1 - 0.8 * half_w)
    elif slot == "behind":
        x = min(max(dice.pick((left, right)) + dice.between(-0.06, 0.06), half_w), 1 - half_w)
    elif slot == "front":  # before one side of the main object, not before its middle
        x += dice.pick((-0.25, 0.25)) * (right - left) + dice.between(-0.06, 0.06)
    elif slot == "on":
        x += dice.between(-0.03, 0.03)
    else:
        x = dice.between(left + 0.05, right - 0.05)

    if slot == "on":
        y = upper + SEATS[main.name] * (lower - upper) - half_h + 0.02
    elif slot == "above":
        y = dice.between(half_h * 0.9, upper - 0.3 * half_h)
    elif slot == "below":
        y = dice.between(max(lower - 0.1, 0.84), 0.97) - half_h
    elif slot == "front":
        y = min(lower + dice.between(0.03, 0.08), 0.985) - half_h
    elif slot == "behind":
        y = max(lower - dice.between(0.1, 0.2), horizon + 0.03) - half_h
    elif KINDS[name].habit == "stand":
        y = dice.between(max(lower - 0.18, horizon + 0.06), min(lower + 0.06, 0.97)) - half_h
    else:
        y += dice.between(-0.12, 0.12)
    return (x - half_w, y - half_h, x + half_w, y + half_h)
