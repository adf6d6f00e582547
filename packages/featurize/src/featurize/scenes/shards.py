"""Scenes as webdataset shards on disk."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from featurize.errors import UserError
from featurize.io.files import atomic_write
from featurize.scenes.drawing import draw_scene


def write_shards(count: int, size: int, split: str, out: Path, seed: int = 0, per_shard: int = 1000) -> list[Path]:
    """Write scenes 0..count-1 of a split as shards `<split>-000000.tar`, ... and return their paths.

    A sample, `<split>-00000123`, has `.png`, `.cls` (the label) and `.json` (`captions`, `objects`). The same
    arguments give the same bytes. A shard gets its name when it is whole, and replaces one of that name.

    Raises UserError where other shards of the split would be left over and be taken for part of this one.
    """
    import webdataset  # takes a second to import, and only this function needs it

    firsts = range(0, count, per_shard)
    paths = [out / f"{split}-{number:06d}.tar" for number in range(len(firsts))]
    left_over = sorted(set(out.glob(f"{split}-*.tar")) - set(paths))
    if left_over:
        raise UserError(
            f"{out} already holds {left_over[0].name}, which is not among the {len(paths)} shards to be written; "
            "remove it or choose another folder."
        )
    with tqdm(total=count, desc=f"scenes {split}", unit="picture") as progress:
        for first, path in zip(firsts, paths):
            with (
                atomic_write(path) as part,
                part.open("wb") as file,
                webdataset.TarWriter(file, user="scenes", group="scenes", mtime=0) as tar,
            ):
                for index in range(first, min(first + per_shard, count)):
                    scene = draw_scene(seed, split, index, size)
                    described = {"captions": scene.captions, "objects": scene.objects}
                    sample = {"png": scene.png(), "cls": str(scene.label), "json": json.dumps(described).encode()}
                    tar.write({"__key__": f"{split}-{index:08d}", **sample})
                    progress.update()
    return paths
