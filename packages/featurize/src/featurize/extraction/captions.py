"""Captions of a ledger, and prompts of a file, embedded by a text encoder: `text/77x768.zarr` and its offsets."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from featurize.errors import UserError
from featurize.execution.devices import device_of_worker
from featurize.execution.tasks import Run, ordered_map
from featurize.io.files import atomic_write, resolve_path
from featurize.io.home import expand_home
from featurize.io.lock import root_lock
from featurize.store.layout import is_sealed, offsets_path, prompts_path, text_path
from featurize.store.ledger import Ledger, captions_digest
from featurize.store.metadata import FORMAT, ArraySpec
from featurize.store.seal import seal
from featurize.store.write import prepare, write_block
from featurize.text.tower import TextSpec, describe_text_encoder, load_text_encoder, seen_part

log = logging.getLogger(__name__)

ROWS_PER_BLOCK = 512  # 60 MB of 77x768 float16
OFFSETS_PER_BLOCK = 1 << 16
BATCH = 32  # captions a forward pass: fixed and padded, so that no setting changes a rounding


@dataclass(frozen=True)
class TextTask:
    """One block of text rows."""

    spec: ArraySpec
    block: int
    captions: tuple[str, ...]
    encoder: TextSpec


def captions_of(ledger: Ledger) -> tuple[list[str], np.ndarray]:
    """All captions, row by row, and the offsets (rows + 1,) int64 that tie the text rows to them."""
    by_row = ledger.table["captions"].to_pylist()
    offsets = 1 + np.concatenate([[0], np.cumsum([len(own) for own in by_row])]).astype(np.int64)
    return [caption for own in by_row for caption in own], offsets


def captions_spec(root: Path, ledger: Ledger, encoder: TextSpec) -> ArraySpec:
    """What the embedded captions of a root are to be. Raises UserError where there are none."""
    captions, _ = captions_of(ledger)
    if not captions:
        raise UserError(f"None of the pictures of {root} has a caption; leave --text out.")
    return _text_spec(root, captions, ledger.keys_sha256, encoder)


def offsets_spec(root: Path, ledger: Ledger) -> ArraySpec:
    """What the offsets of a root's captions are to be."""
    captions, offsets = captions_of(ledger)
    return ArraySpec(
        path=offsets_path(root),
        kind="offsets",
        shape=offsets.shape,
        dtype="int64",
        rows_per_block=min(len(offsets), OFFSETS_PER_BLOCK),
        keys_sha256=ledger.keys_sha256,
        provenance={
            "captions_sha256": captions_digest(captions),
            "offsets_sha256": hashlib.sha256(offsets.tobytes()).hexdigest(),
        },
        attributes={},
    )


def embed_prompts(prompts: Path, out: str | Path, encoder: TextSpec, run: Run) -> Path:
    """Embed a file of prompts, one a line, into `out`, once no other run holds that; the path of the sealed array.

    Raises UserError for a file that is empty or not UTF-8, and for a folder that holds other prompts.
    """
    try:
        text = prompts.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The prompts {prompts} are not UTF-8 text (byte {error.start}); save the file as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"The prompts {prompts} can't be read ({error.strerror}); check --prompts.") from None
    # Unlike `str.splitlines`, which breaks lines at further signs too: a prompt may hold them.
    lines = [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
    if not lines:
        raise UserError(f"The file {prompts} holds no prompt; write one a line.")
    root = resolve_path(out)
    if encoder.weights is not None:  # absolute: workers may have other working directories
        encoder = replace(encoder, weights=str(expand_home(encoder.weights).absolute()))
    tokens = describe_text_encoder(encoder).tokens
    keys = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    spec = _text_spec(root, lines, keys, encoder)
    table = pa.table(
        {
            "row": pa.array(range(1, len(lines) + 1), pa.int64()),
            "prompt": pa.array(lines, pa.string()),
            "truncated": pa.array([seen_part(line, tokens) is not None for line in lines], pa.bool_()),
        }
    )
    with root_lock(root, wait=True):  # several `nestgen sample` may embed the same prompts
        write_text(spec, lines, encoder, run)
        if not is_sealed(spec.path):
            seal(spec, ordered_map=ordered_map(run))
        with atomic_write(prompts_path(root)) as temporary:
            pq.write_table(table.replace_schema_metadata({"format": FORMAT, "keys_sha256": keys}), temporary)
    return spec.path


def _text_spec(root: Path, captions: Sequence[str], keys_sha256: str, encoder: TextSpec) -> ArraySpec:
    """The array of the empty caption and of these."""
    card = describe_text_encoder(encoder)
    return ArraySpec(
        path=text_path(root, card.tokens, card.width),
        kind="text",
        shape=(1 + len(captions), card.tokens, card.width),
        dtype="float16",
        rows_per_block=ROWS_PER_BLOCK,
        keys_sha256=keys_sha256,
        provenance={
            "encoder": card.identity,
            "captions_sha256": captions_digest(captions),
            "keys_sha256": keys_sha256,
            "dtype": "float16",
        },
        attributes={"views": 1, "null_row": 0, "options": {"text": encoder.name, "text_weights": encoder.weights}},
    )


def write_text(spec: ArraySpec, captions: Sequence[str], encoder: TextSpec, run: Run) -> None:
    """Embed the blocks that an array of the empty caption and of these lacks."""
    missing = prepare(spec)
    if missing:
        _warn_of_cuts(captions, spec.shape[1])
    texts = ["", *captions]
    tasks = [TextTask(spec, block, tuple(texts[row] for row in spec.rows_of(block)), encoder) for block in missing]
    with tqdm(total=spec.rows, desc="embedding captions", unit=" captions", smoothing=0.1) as progress:
        progress.update(spec.rows - sum(len(task.captions) for task in tasks))
        for _, count in run(_write_text_block, tasks):
            progress.update(count)


def _write_text_block(task: TextTask) -> int:
    """Embed and write the task's block; its number of captions."""
    encoder = load_text_encoder(task.encoder, device_of_worker())
    parts = []
    for start in range(0, len(task.captions), BATCH):
        batch = task.captions[start : start + BATCH]
        parts.append(encoder.encode([*batch, *[""] * (BATCH - len(batch))])[: len(batch)])
    write_block(task.spec, task.block, np.concatenate(parts))
    return len(task.captions)


def _warn_of_cuts(captions: Sequence[str], tokens: int) -> None:
    cuts = [
        (number, seen) for number, caption in enumerate(captions, 1) if (seen := seen_part(caption, tokens)) is not None
    ]
    if cuts:
        number, seen = cuts[0]
        log.warning(
            "%d of %d captions have more than %d tokens and are cut; the first is number %d, which ends for the encoder "
            "with '...%s'.", len(cuts), len(captions), tokens, number, seen[-40:],
        )  # fmt: skip
