"""Rows of stored arrays as a torch Dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from featurize.store.read import open_array, read_rows

if TYPE_CHECKING:
    import zarr


class LatentDataset(Dataset[dict[str, Any]]):
    """What `StoreRoot.dataset` describes. A DataLoader reads a whole batch at once, sorted by the blocks that hold it."""

    def __init__(
        self,
        paths: Mapping[str, Path],
        labels: np.ndarray,
        captions: Sequence[tuple[str, ...]] | None,
        view: int | None,
    ) -> None:
        self.paths, self.labels, self.captions, self.view = paths, labels, captions, view
        self._process = -1
        self._arrays: dict[str, zarr.Array] = {}

    @property
    def arrays(self) -> dict[str, zarr.Array]:
        """The arrays, opened once in each process: a DataLoader's worker that is forked can't use this one's connections."""
        if self._process != os.getpid():
            self._arrays = {name: open_array(path) for name, path in self.paths.items()}
            self._process = os.getpid()
        return self._arrays

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One sample."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of some rows: a DataLoader calls this with each batch. Raises IndexError for a row that is not there."""
        for row in rows:
            if not -len(self) <= row < len(self):
                raise IndexError(f"there is no row {row} among {len(self)}")
        chosen = np.array(rows, dtype=np.int64) % len(self)
        latents = {
            name: torch.from_numpy(np.moveaxis(read_rows(array, chosen, self.view).astype(np.float32), -1, -3))
            for name, array in self.arrays.items()
        }
        return [
            {
                "row": int(row),
                "label": int(self.labels[row]),
                **({} if self.captions is None else {"captions": self.captions[row]}),
                **{name: values[number] for name, values in latents.items()},
            }
            for number, row in enumerate(chosen)
        ]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples, for DataLoader's `collate_fn`: values stacked, captions as a list with a tuple for each row."""
    batch = default_collate([{key: value for key, value in one.items() if key != "captions"} for one in samples])
    return batch | ({"captions": [one["captions"] for one in samples]} if "captions" in samples[0] else {})
