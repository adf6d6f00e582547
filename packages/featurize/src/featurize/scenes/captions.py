"""What is in a scene and how it is arranged, in words."""

from __future__ import annotations

from collections.abc import Sequence

from featurize.scenes.composition import KINDS, Composition, Thing

ON_GROUND = {
    "meadow": "on a meadow",
    "sea": "on the sea",
    "sand": "on a beach",
    "snow": "in the snow",
    "road": "on a road",
    "room": "in a room",
    "water": "under water",
    "sky": "in the sky",
}
IN_THE_AIR = {
    "meadow": "over a meadow",
    "sea": "over the sea",
    "sand": "over a beach",
    "snow": "over the snow",
    "water": "under water",
    "sky": "in the sky",
}
AT_TIME = {"day": "", "dusk": " at dusk", "night": " at night"}
RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
    "front": "in front of",
    "behind": "behind",
    "on": "on top of",
}
TEXTURE_WORDS = {"plain": "", "stripes": "striped ", "bands": "striped ", "dots": "dotted ", "checks": "checked "}
COUNTS = {1: "one thing", 2: "two things", 3: "three things", 4: "four things"}


def captions(scene: Composition) -> tuple[str, ...]:
    """Five captions, as in COCO; each names the main object."""
    main, guests = scene.main, scene.guests
    place = (ON_GROUND if KINDS[main.name].habit == "stand" else IN_THE_AIR)[scene.ground]
    where = place + AT_TIME[scene.light]
    arranged = [f"{_a(_phrase(guest))} {RELATIONS[guest.relation]} the {main.name}" for guest in guests]
    side = {"left": "on the left", "right": "on the right"}.get(main.place.split()[-1], "in the middle")
    large = f"{_a('large ' + TEXTURE_WORDS[main.look.texture] + main.name)} {side} of the picture"
    return (
        f"{_a(_phrase(main))} {where}",
        f"{_a(_phrase(main))} with {_list([_a(_phrase(guest)) for guest in guests]) or 'nothing around it'}",
        _list([large, *arranged]),
        f"{_list(arranged)} {where}" if arranged else f"there is only {_a(main.name)} {where}",
        f"{_a(main.name)} {place}, {COUNTS[1 + len(guests)]} in the picture",
    )


def _phrase(thing: Thing) -> str:
    """Colour and class; a snowman is known by its scarf."""
    if thing.name == "snowman":
        return f"snowman with {_a(thing.colour)} scarf"
    return f"{thing.colour} {thing.name}"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _list(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
