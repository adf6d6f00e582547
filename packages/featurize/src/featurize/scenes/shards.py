"""Scenes as webdataset shards on disk."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from featurize.scenes.drawing import Scene, draw_scene


def write_shards(count: int, size: int, split: str, out: Path, seed: int = 0, per_shard: int = 1000) -> list[Path]:
    """Write scenes 0..count-1 of a split as shards `<split>-000000.tar`, ... and return their paths.

    A sample, `<split>-00000123`, has `.png`, `.cls` (the label) and `.json` (`captions`, `objects`). The same
    arguments give the same bytes. A shard gets its name when it is whole.
    """
    import webdataset  # takes a second to import, and only this function needs it

    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with tqdm(total=count, desc=f"scenes {split}", unit="picture") as progress:
        for number, first in enumerate(range(0, count, per_shard)):
            path = out / f"{split}-{number:06d}.tar"
            part = path.with_name(f"{path.name}.part-{os.getpid()}")
            try:
                with webdataset.TarWriter(str(part), user="scenes", group="scenes", mtime=0) as tar:
                    for index in range(first, min(first + per_shard, count)):
                        tar.write(_sample(f"{split}-{index:08d}", draw_scene(seed, split, index, size)))
                        progress.update()
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            paths.append(path)
    return paths


def _sample(key: str, scene: Scene) -> dict[str, Any]:
    png = io.BytesIO()
    # Stored, not deflated: what zlib makes of a picture may differ between machines.
    scene.image.save(png, "PNG", compress_level=0)
    told = {"captions": scene.captions, "objects": scene.objects}
    return {"__key__": key, "png": png.getvalue(), "cls": str(scene.label), "json": json.dumps(told).encode()}
