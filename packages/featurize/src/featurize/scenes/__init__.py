"""`scenes`, the embedded data set: small images in the look of a tiny COCO, drawn by a seeded generator.

A scene has one main object, the largest, that gives its label, and up to three guests whose relation to it the
captions state. `composition` decides what is where, `grounds` and `things` draw it with a `pen`, `captions` describes it,
`drawing` puts the four together and `shards` writes files. May import errors and io.
"""

from __future__ import annotations

from featurize.scenes.composition import CLASSES
from featurize.scenes.drawing import Scene, Story, draw_scene, tell_scene
from featurize.scenes.shards import write_shards

__all__ = ["CLASSES", "Scene", "Story", "draw_scene", "tell_scene", "write_shards"]
